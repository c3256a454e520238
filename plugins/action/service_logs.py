# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Action service_logs: turn after turn of the module, printed as one merged log. Documented in plugins/modules."""

from __future__ import annotations

import fcntl
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ansible import constants
from ansible.module_utils.parsing.convert_bool import boolean
from ansible.plugins.action import ActionBase
from ansible.utils.display import Display

from ansible_collections.nemo.platform.plugins.module_utils import access, service_logs

# A host that has not said up to where it was read for so long is not waited for.
PATIENCE_SECONDS = 3.0


class Spool:
    """Lines of all hosts of one task, on their way to one screen. Each host has a process of its own; this folder is what
    they share, and whoever has written prints what is ripe for all."""

    def __init__(self, folder: Path, hosts: Sequence[str], show: Callable[[str, service_logs.Line], None]) -> None:
        self.folder, self.hosts, self.show = folder, sorted(hosts), show
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def put(self, host: str, lines: Sequence[Sequence[Any]], until: float, now: float) -> None:
        """Add the lines of a host, which has been read up to a moment (infinity: for the last time), and print."""
        with (self.folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            path = self.folder / "state.json"
            state = (
                json.loads(path.read_text()) if path.exists() else {"lines": [], "until": {}, "seen": {}, "begun": now}
            )
            state["lines"] += [[host, *line] for line in lines]
            state["until"][host], state["seen"][host] = until, now
            ripe = self._ripe(state, now)
            logs: dict[str, list[Any]] = {}
            rest = []
            for owner, moment, *line in state["lines"]:
                if int(moment) <= ripe * 1_000_000_000:
                    logs.setdefault(owner, []).append([moment, *line])
                else:
                    rest.append([owner, moment, *line])
            for owner, entry in service_logs.merge(logs):
                self.show(owner, entry)
            path.write_text(json.dumps({**state, "lines": rest}))

    def _ripe(self, state: Mapping[str, Any], now: float) -> float:
        """Up to when every host has been read."""
        waited_for = [
            state["until"].get(host, 0.0)
            for host in self.hosts
            if state["until"].get(host) == float("inf")
            or now - state["seen"].get(host, state["begun"]) < PATIENCE_SECONDS
        ]
        return min(waited_for, default=float("inf"))


class ActionModule(ActionBase):
    """The action."""

    _supports_check_mode = True

    def _turn(self, cursors: Mapping[str, Any], task_vars: dict[str, Any]) -> dict[str, Any]:
        arguments = {**self._task.args, "cursors": cursors, "follow": False}
        result: dict[str, Any] = self._execute_module(
            module_name="nemo.platform.service_logs", module_args=arguments, task_vars=task_vars
        )
        result.pop("invocation", None)
        return result

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """One turn, or many."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        task_vars = task_vars or {}
        if not boolean(self._task.args.get("follow", False), strict=False):
            return {**result, **self._turn(self._task.args.get("cursors") or {}, task_vars)}

        host = str(task_vars["inventory_hostname"])
        hosts = [str(name) for name in task_vars.get("ansible_play_batch", [host])]
        width, display = max(map(len, hosts)), Display()

        def show(owner: str, line: service_logs.Line) -> None:
            display.display(service_logs.line_text(owner, line, width), color=access.colour(owner, hosts))

        # In the folder of this run, which Ansible makes for this user alone and removes at the end.
        spool = Spool(Path(constants.DEFAULT_LOCAL_TMP) / f"logs-{self._task._uuid}", hosts, show)
        end = time.monotonic() + float(self._task.args.get("follow_for", 600))
        interval = float(self._task.args.get("interval", 1))
        cursors: dict[str, Any] = {}
        problems: list[str] = []
        while True:
            started, asked = time.monotonic(), time.time()
            turn = self._turn(cursors, task_vars)
            if turn.get("failed") or turn.get("unreachable"):
                spool.put(host, [], float("inf"), time.time())
                return {**result, **turn}
            last = time.monotonic() + interval >= end
            spool.put(host, turn["lines"], float("inf") if last else asked, time.time())
            for problem in turn["problems"]:
                if problem not in problems:
                    display.display(f"{host}: {problem}", color="red")
            problems, cursors = turn["problems"], turn["cursors"]
            if last:
                return {**result, "changed": False, "problems": problems}
            time.sleep(max(0.0, interval - (time.monotonic() - started)))
