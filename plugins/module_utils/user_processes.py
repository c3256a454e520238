# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Processes of a user on a managed host: whose they are, which SSH login they came from, and how they are ended.

Standard library only and Python 3.9 syntax, because this runs on managed hosts.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

PROC = "/proc"
NO_LOGIN = 4294967295  # loginuid of what no login started
INIT = 1
SSH_NAMES = ("sshd", "sshd-session")
TERM_SECONDS = 2.0
END_SECONDS = 15.0
# A container's processes have users of their own, whatever their numbers.
CONTAINERS = re.compile(r"/(system\.slice/)?(docker|containerd|libpod|kubepods|crio)[-/.]")
ACCEPTED = re.compile(r"^Accepted publickey for (\S+) from \S+ port \d+ ssh2: \S+ (SHA256:\S+)")

Runner = Callable[[Sequence[str]], "tuple[int, str, str]"]


@dataclass(frozen=True)
class Process:
    """One process at one moment."""

    pid: int
    parent: int
    name: str
    users: frozenset[int]  # real, effective, saved and file system user
    login: int  # the user who logged in, whatever became of him since; NO_LOGIN where unknown
    group: str  # control group
    started: float  # seconds since the epoch, to about one
    ticks: int  # the same since boot, exact

    @property
    def label(self) -> str:
        return f"{self.name}[{self.pid}]"


def _boot_time(proc: str) -> float:
    with open(f"{proc}/stat", encoding="ascii") as handle:
        return next((float(line.split()[1]) for line in handle if line.startswith("btime ")), 0.0)


def _read(path: str) -> str:
    with open(path, encoding="utf-8", errors="replace") as handle:
        return handle.read()


def _process(proc: str, pid: int, boot_time: float, tick: int) -> Process | None:
    try:
        stat = _read(f"{proc}/{pid}/stat")
        status = _read(f"{proc}/{pid}/status")
        group = _read(f"{proc}/{pid}/cgroup").strip()
    except OSError:  # gone meanwhile
        return None
    login = NO_LOGIN
    with contextlib.suppress(OSError, ValueError):
        login = int(_read(f"{proc}/{pid}/loginuid"))
    fields = stat[stat.rindex(")") + 2 :].split()
    users = next((line.split()[1:] for line in status.splitlines() if line.startswith("Uid:")), [])
    if fields[0] == "Z":
        return None
    return Process(
        pid=pid,
        parent=int(fields[1]),
        name=stat[stat.index("(") + 1 : stat.rindex(")")],
        users=frozenset(int(user) for user in users),
        login=login,
        group=group.splitlines()[-1].split(":", 2)[-1] if group else "",
        started=boot_time + int(fields[19]) / tick,
        ticks=int(fields[19]),
    )


class Table:
    """All processes at one moment."""

    def __init__(self, proc: str = PROC) -> None:
        boot_time, tick = _boot_time(proc), os.sysconf("SC_CLK_TCK")
        pids = [int(name) for name in os.listdir(proc) if name.isdigit()]
        found = (_process(proc, pid, boot_time, tick) for pid in pids)
        self.by_pid: dict[int, Process] = {one.pid: one for one in found if one is not None}
        # A machine that is a container may bear the number of whoever started its engine on every process.
        init = self.by_pid.get(INIT)
        self.logins_count = init is not None and init.login == NO_LOGIN

    def ancestors(self, pid: int) -> list[Process]:
        """A process and all above it."""
        found: list[Process] = []
        while pid in self.by_pid and len(found) < len(self.by_pid):
            found.append(self.by_pid[pid])
            pid = self.by_pid[pid].parent
        return found

    def below(self, roots: Collection[int]) -> set[int]:
        """These processes and all that descend from them."""
        children: dict[int, list[int]] = {}
        for one in self.by_pid.values():
            children.setdefault(one.parent, []).append(one.pid)
        found: set[int] = set()
        waiting = [pid for pid in roots if pid in self.by_pid]
        while waiting:
            pid = waiting.pop()
            if pid not in found:
                found.add(pid)
                waiting.extend(children.get(pid, []))
        return found

    def of_user(self, uid: int) -> set[int]:
        """Processes of a user, what he became root for included, and nothing of a container's."""
        own = {
            one.pid
            for one in self.by_pid.values()
            if (uid in one.users or (self.logins_count and one.login == uid)) and not CONTAINERS.match(one.group)
        }
        return {pid for pid in self.below(own) if pid != INIT}

    def ssh_sessions(self, uid: int) -> dict[int, int]:
        """The SSH daemon's processes that serve a user: its own, and root's above it, which logged the login."""
        return {
            one.pid: one.parent
            for one in self.by_pid.values()
            if one.name in SSH_NAMES
            and uid in one.users
            and one.parent in self.by_pid
            and self.by_pid[one.parent].name in SSH_NAMES
            and uid not in self.by_pid[one.parent].users
        }

    def of_session(self, pid: int) -> set[int]:
        """All that one SSH session started: what descends from it, and what shares logind's scope with it."""
        found = self.below([pid])
        group = self.by_pid[pid].group if pid in self.by_pid else ""
        if re.search(r"/session-[^/]*\.scope$", group):
            found |= {one.pid for one in self.by_pid.values() if one.group == group and 0 not in one.users}
        return found


def login_keys(run: Runner, table: Table, monitors: Iterable[int]) -> Mapping[int, str]:
    """Fingerprints by which sessions were opened, as far as the journal knows."""
    wanted = {pid: table.by_pid[pid] for pid in monitors if pid in table.by_pid}
    if not wanted:
        return {}
    arguments = ["journalctl", "--quiet", "--no-pager", "--boot", "--output=json"]
    try:
        code, out, _err = run([*arguments, *(f"_PID={pid}" for pid in sorted(wanted))])
    except OSError:
        return {}
    found: dict[int, str] = {}
    for line in out.splitlines() if code == 0 else ():
        try:
            entry = json.loads(line)
            match = ACCEPTED.match(str(entry["MESSAGE"]))
            pid, seconds = int(entry["_PID"]), int(entry["__REALTIME_TIMESTAMP"]) / 1e6
        except (ValueError, KeyError, TypeError):
            continue
        # A number that was another process's before says nothing of this one.
        if match and pid in wanted and seconds >= wanted[pid].started - 2:
            found[pid] = match.group(2)
    return found


def _signal(pids: Iterable[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def end(select: Callable[[Table], set[int]], spared: Collection[int]) -> tuple[list[str], list[str]]:
    """Asked to go, then made to; gives the labels of those that were there, and of those that would not go."""
    table = Table()
    first = select(table) - set(spared)
    seen = {pid: table.by_pid[pid].label for pid in first}
    if not first:
        return [], []
    _signal(first, signal.SIGTERM)
    _signal(first, signal.SIGCONT)
    started = time.monotonic()
    left: set[int] = first
    while time.monotonic() < started + END_SECONDS:
        time.sleep(0.05)
        table = Table()
        left = select(table) - set(spared)
        seen.update({pid: table.by_pid[pid].label for pid in left})
        if not left:
            break
        # Who was there first had time to go; who came since is not waited for.
        late = time.monotonic() > started + TERM_SECONDS
        _signal(left if late else left - first, signal.SIGKILL)
    names = sorted(seen.values())
    return names, sorted(table.by_pid[pid].label for pid in left)
