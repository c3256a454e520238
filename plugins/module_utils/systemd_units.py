# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""systemd units as `systemctl show` tells of them, and the few acts that the modules need.

Standard library only and Python 3.9 syntax, because this runs on managed hosts.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Callable

UNIT_SUFFIXES = (
    ".service",
    ".socket",
    ".timer",
    ".path",
    ".target",
    ".mount",
    ".automount",
    ".swap",
    ".slice",
    ".scope",
    ".device",
)
PROPERTIES = (
    "Id",
    "LoadState",
    "ActiveState",
    "SubState",
    "Type",
    "UnitFileState",
    "NeedDaemonReload",
    "ConditionResult",
    "ConditionTimestampMonotonic",
    "ActiveEnterTimestampMonotonic",
)
# What `systemctl is-enabled` answers with status 0; enabled-runtime is left out because a reboot forgets it.
ENABLED_STATES = ("enabled", "static", "alias", "indirect", "generated")
JOURNAL_LINES = 20
# A process that dies at once is noticed; Type=notify and forking are waited for by systemctl itself.
SETTLE_SECONDS = 0.5

Runner = Callable[[Sequence[str]], tuple[int, str, str]]


class UnitError(Exception):
    """A unit cannot be brought to its wanted state; the text names it and holds its last journal lines."""

    def __init__(self, message: str, unit: str, journal: str = "") -> None:
        super().__init__(message)
        self.unit = unit
        self.journal = journal


def full_name(name: str) -> str:
    """'docker' -> 'docker.service', as systemctl itself completes names."""
    return name if name.endswith(UNIT_SUFFIXES) else f"{name}.service"


def is_running() -> bool:
    """Whether systemd is the running init (sd_booted(3)); false in an image build."""
    return os.path.isdir("/run/systemd/system")


@dataclass
class UnitStatus:
    """The properties of one unit at one moment."""

    name: str
    properties: dict[str, str]

    @property
    def missing(self) -> bool:
        return self.properties.get("LoadState", "not-found") == "not-found"

    @property
    def masked(self) -> bool:
        return self.properties.get("LoadState") == "masked"

    @property
    def active_state(self) -> str:
        return self.properties.get("ActiveState", "inactive")

    @property
    def active(self) -> bool:
        return self.active_state in ("active", "reloading", "refreshing")

    @property
    def coming_up(self) -> bool:
        return self.active_state == "activating"

    @property
    def needs_daemon_reload(self) -> bool:
        return self.properties.get("NeedDaemonReload") == "yes"

    @property
    def enabled_state(self) -> str:
        return self.properties.get("UnitFileState", "")

    @property
    def condition_unmet(self) -> bool:
        """A start was tried and systemd skipped it because a Condition did not hold."""
        tried = self.properties.get("ConditionTimestampMonotonic", "0") not in ("", "0")
        return tried and not self.active and self.properties.get("ConditionResult") == "no"

    @property
    def settles(self) -> bool:
        return self.properties.get("Type") in ("simple", "exec", "idle")

    def started_at(self) -> float:
        """Wall-clock time at which the unit became active, 0 where it never did.

        Reckoned from the monotonic property: the textual one depends on locale and time zone.
        """
        try:
            since_boot = int(self.properties.get("ActiveEnterTimestampMonotonic", "0"))
        except ValueError:
            return 0.0
        if since_boot == 0:
            return 0.0
        return time.time() - (time.clock_gettime(time.CLOCK_MONOTONIC) - since_boot / 1_000_000)


class Systemctl:
    """systemctl of a running systemd, or of a file system without one (`online` is false)."""

    def __init__(self, run: Runner, online: bool) -> None:
        self._run = run
        self.online = online

    def _call(self, *arguments: str) -> tuple[int, str, str]:
        return self._run(["systemctl", *arguments])

    def show(self, names: Sequence[str]) -> dict[str, UnitStatus]:
        """All units in one call."""
        if not names:
            return {}
        code, out, err = self._call("show", "--no-pager", "--property=" + ",".join(PROPERTIES), "--", *names)
        if code != 0:
            raise UnitError(f"systemctl show failed: {first_line(err or out)}", names[0])
        blocks = [block for block in out.strip("\n").split("\n\n") if block.strip()]
        if len(blocks) != len(names):
            raise UnitError(f"systemctl show answered for {len(blocks)} of {len(names)} units", names[0])
        result = {}
        for name, block in zip(names, blocks):
            pairs = (line.partition("=") for line in block.splitlines())
            result[name] = UnitStatus(name, {key: value for key, _separator, value in pairs})
        return result

    def is_enabled(self, status: UnitStatus) -> bool:
        state = status.enabled_state
        if self.online and state not in ("", "bad", "generated"):
            return state in ENABLED_STATES
        code, out, _err = self._call("is-enabled", status.name)
        return code == 0 and out.strip() in ENABLED_STATES

    def daemon_reload(self) -> None:
        code, out, err = self._call("daemon-reload")
        if code != 0:
            raise UnitError(f"systemctl daemon-reload failed: {first_line(err or out)}", "systemd")

    def set_enabled(self, name: str, enabled: bool) -> None:
        verb = "enable" if enabled else "disable"
        code, out, err = self._call(verb, name)
        if code != 0:
            raise UnitError(f"{name}: systemctl {verb} failed: {first_line(err or out)}", name)

    def act(self, verb: str, name: str) -> UnitStatus:
        """start, stop, restart or reload a unit and return its state; raises where it does not come up."""
        if verb in ("start", "restart"):
            # Earlier failures, and our own earlier restarts, count against the start limit.
            self._call("reset-failed", name)
        code, out, err = self._call(verb, name)
        status = self.show([name])[name]
        if code == 0 and verb in ("start", "restart") and status.settles and not status.condition_unmet:
            time.sleep(SETTLE_SECONDS)
            status = self.show([name])[name]
        broken = status.active_state == "failed" or status.properties.get("SubState") == "auto-restart"
        if code != 0 or (verb != "stop" and broken):
            reason = first_line(err or out) or f"state {status.active_state}/{status.properties.get('SubState', '')}"
            raise UnitError(f"{name} did not {verb}: {reason}", name, self.journal(name))
        return status

    def journal(self, name: str) -> str:
        try:
            arguments = ["-u", name, "-n", str(JOURNAL_LINES), "--no-pager", "-o", "cat"]
            code, out, _err = self._run(["journalctl", *arguments])
        except OSError:
            return ""
        return out.strip() if code == 0 else ""


def first_line(text: str) -> str:
    lines: list[str] = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0] if lines else ""
