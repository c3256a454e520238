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

# How long a line waits for older ones of other hosts: what was there before, and what comes while all are read.
PATIENCE_AT_FIRST, PATIENCE = 8.0, 0.7
# How long the hosts wait for a line before they say that there is none.
WAIT_SECONDS = 10.0


class Spool:
    """Lines of all hosts of one task, on their way to one screen. Each host has a process of its own; this folder is what
    they share, and whoever comes prints what is ripe for all."""

    def __init__(self, folder: Path, hosts: Sequence[str], show: Callable[[str, service_logs.Line], None]) -> None:
        self.folder, self.hosts, self.show = folder, list(hosts), show
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def put(self, host: str, lines: Sequence[Sequence[Any]], until: float, now: float) -> float:
        """Add the lines of a host, which has been read up to a moment (infinity: for the last time), and print. Returns in
        how many seconds to come again, 0 for no need."""
        with (self.folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            path = self.folder / "state.json"
            state: dict[str, Any] = {"lines": [], "until": {}, "begun": now}
            if path.exists():
                state = json.loads(path.read_text())
            state["lines"] += [[now, host, *line] for line in lines]
            state["until"][host] = until
            rest = self._print(state, now)
            path.write_text(json.dumps({**state, "lines": rest}))
            if not rest:
                return 0.0
            return max(0.05, self._patience(state, rest[0][0]) - now)

    def _print(self, state: Mapping[str, Any], now: float) -> list[Any]:
        """Print what is ripe: every host was read beyond it, or it has waited long enough. The rest is returned."""
        read = min(state["until"].get(host, 0.0) for host in self.hosts)
        logs: dict[str, list[Any]] = {}
        rest = []
        for entry in state["lines"]:
            arrived, owner, moment, *line = entry
            if int(moment) <= read * 1_000_000_000 or now >= self._patience(state, arrived):
                logs.setdefault(owner, []).append([moment, *line])
            else:
                rest.append(entry)
        for owner, line in service_logs.merge(logs):
            self.show(owner, line)
        return rest

    def _patience(self, state: Mapping[str, Any], arrived: float) -> float:
        """Until when a line waits that arrived then."""
        everybody = set(self.hosts) <= set(state["until"])
        return float(arrived + PATIENCE if everybody else max(arrived + PATIENCE, state["begun"] + PATIENCE_AT_FIRST))


class ActionModule(ActionBase):
    """The action."""

    _supports_check_mode = True

    def _turn(self, cursors: Mapping[str, Any], wait: float, task_vars: dict[str, Any]) -> dict[str, Any]:
        arguments = {**self._task.args, "cursors": cursors, "follow": False, "wait": wait}
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
            return {**result, **self._turn({}, 0, task_vars)}

        host = str(task_vars["inventory_hostname"])
        hosts = [str(name) for name in task_vars.get("ansible_play_batch", [host])]
        width, display = max(map(len, hosts)), Display()

        def show(owner: str, line: service_logs.Line) -> None:
            display.display(service_logs.line_text(owner, line, width), color=access.colour(owner, hosts))

        # In the folder of this run, which Ansible makes for this user alone and removes at the end.
        spool = Spool(Path(constants.DEFAULT_LOCAL_TMP) / f"logs-{self._task._uuid}", hosts, show)
        end = time.monotonic() + float(self._task.args.get("follow_for", 600))
        cursors: dict[str, Any] = {}
        problems: list[str] = []
        while True:
            asked = time.time()
            wait = min(float(self._task.args.get("wait") or WAIT_SECONDS), end - time.monotonic()) if cursors else 0.0
            turn = self._turn(cursors, max(0.0, wait), task_vars)
            failed = bool(turn.get("failed") or turn.get("unreachable"))
            last = failed or bool(turn.get("absent")) or time.monotonic() >= end
            again = spool.put(host, turn.get("lines", []), float("inf") if last else asked, time.time())
            for problem in turn.get("problems", []):
                if problem not in problems:
                    display.display(f"{host}: {service_logs.clean(problem)}", color="red")
            while again:
                time.sleep(again)
                again = spool.put(host, [], float("inf") if last else asked, time.time())
            if failed:
                return {**result, **turn}
            problems, cursors = turn["problems"], turn["cursors"]
            if last:
                return {**result, "changed": False, "problems": problems, "absent": turn["absent"]}
            if problems:  # such as a container that a release replaces: not at once again
                time.sleep(1)
