# Copyright: the nemo.platform authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a module that works long says meanwhile, on the screen of the run.

The module writes lines to a file on its host (module_utils/progress). Here a second connection, in a thread, looks for new
ones every other second and shows them. The file is world-readable, so that it needs no other user there. Whatever keeps it
from looking costs the lines and nothing else: the result of the task never depends on it.
"""

from __future__ import annotations

import shlex
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from ansible import constants
from ansible.plugins.action import ActionBase
from ansible.plugins.connection import ConnectionBase
from ansible.plugins.loader import connection_loader
from ansible.utils.display import Display

from ansible_collections.nemo.platform.plugins.module_utils.progress import FOLDER
from ansible_collections.nemo.platform.plugins.module_utils.service_logs import clean

FIRST_AFTER = 3.0  # seconds: a run that has nothing to do is over by then, and costs no look
EVERY = 2.0
PATIENCE = 1.0  # seconds that a look under way may keep a finished task waiting
LOOKS_LOST = 3  # in a row, after which there are no more
SHOWN_AT_ONCE = 20
# Prints the file's age in seconds, the place from which on it is shown, and what it says from there; nothing without a file.
LOOK = (
    'f={path}; o={offset}; s=$(stat -c %s "$f" 2>/dev/null) || exit 0; '
    "if [ $o -lt 0 ]; then o=$(( s > 4096 ? s - 4096 : 0 )); elif [ $o -gt $s ]; then o=0; fi; "
    'echo $(( $(date +%s) - $(stat -c %Y "$f") )) $o; tail -c +$(( o + 1 )) "$f"'
)

Look = Callable[[int], bytes]


class Follower(threading.Thread):
    """Shows new lines until it is told to end. A look gets an offset, -1 at first, and returns what LOOK prints."""

    def __init__(
        self, look: Look, show: Callable[[str], None], first_after: float = FIRST_AFTER, every: float = EVERY
    ) -> None:
        super().__init__(daemon=True, name="progress")
        self.look = look
        self.show = show
        self.first_after = first_after
        self.every = every
        self.ended = threading.Event()
        self.offset = -1
        self.began = time.monotonic()

    def run(self) -> None:
        """The thread."""
        lost = 0
        pause = self.first_after
        while lost < LOOKS_LOST and not self.ended.wait(pause):
            pause = self.every
            try:
                lines = self.turn()
                lost = 0
            except Exception:  # whatever a connection plugin raises: the task goes on without its progress
                lines = []
                lost += 1
            for line in lines:
                if not self.ended.is_set():
                    self.show(line)

    def turn(self) -> list[str]:
        """One look: the lines that are new."""
        first = self.offset < 0
        head, newline, text = self.look(self.offset).partition(b"\n")
        if not newline:
            return []
        age, start = (int(word) for word in head.split())
        whole = text[: text.rfind(b"\n") + 1]  # a line that is just being written comes with the next look
        self.offset = start + len(whole)
        lines = [clean(line) for line in whole.decode("utf-8", "replace").splitlines() if line.strip()]
        if first:
            # What was said before this task began is not its progress; of what has been said since, the last line tells all.
            lines = lines[-1:] if age <= time.monotonic() - self.began + 1 else []
        return lines[-SHOWN_AT_ONCE:]

    def end(self) -> None:
        """No line is shown after this."""
        self.ended.set()
        self.join(PATIENCE)


class ProgressAction(ActionBase):
    """An action that runs the module of its name and shows what that says meanwhile."""

    _supports_check_mode = True
    _supports_diff = True
    _supports_async = True

    def progress_of(self, arguments: Mapping[str, Any]) -> str:
        """The name of the progress file that the module writes with these arguments; empty for none."""
        raise NotImplementedError

    def _second_connection(self) -> ConnectionBase:
        """To the same host in the same way, without another user there."""
        connection: ConnectionBase = connection_loader.get(self._connection._load_name, self._play_context)
        connection.set_options(direct=dict(self._connection.get_options()))
        if connection.has_option("reconnection_retries"):
            connection.set_option("reconnection_retries", 0)
        return connection

    def _looker(self, path: str) -> Look:
        connection: ConnectionBase | None = None

        def look(offset: int) -> bytes:
            nonlocal connection
            connection = connection or self._second_connection()
            command = LOOK.format(path=shlex.quote(path), offset=offset)
            rc, out, err = connection.exec_command("/bin/sh -c %s" % shlex.quote(command), sudoable=False)
            if rc:
                raise OSError(err)
            return bytes(out)

        return look

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Run the module."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        task_vars = task_vars or {}
        name = self.progress_of(self._task.args)
        background = bool(self._task.async_val)  # the task that asks for its result is another one
        follower = None
        if name and not background and not self._task.check_mode:
            host, display = str(task_vars.get("inventory_hostname", "")), Display()
            path = "%s/%s/%s" % (self._task.args.get("run_path") or "/run/nemo", FOLDER, name)
            follower = Follower(
                self._looker(path),
                lambda line: display.display("%s: %s" % (host, line), color=constants.COLOR_VERBOSE),
            )
            follower.start()
        try:
            return {**result, **self._execute_module(task_vars=task_vars, wrap_async=background)}
        finally:
            if follower:
                follower.end()
