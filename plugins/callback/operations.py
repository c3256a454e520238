# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Callback: every run is logged, and no two runs work on one host at a time."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from ansible import context
from ansible.errors import AnsibleError
from ansible.plugins.callback import CallbackBase
from ansible.template import Templar

DOCUMENTATION = r"""
name: operations
type: aggregate
short_description: Logs each run, and keeps two runs from working on one host
version_added: 0.1.0
author: The nemo platform project (@nemo-platform)
description:
  - For a host on which several people run Ansible. The role C(operations_workspace) sets up both ends.
  - Tells a service of root's, on a Unix socket, what this run is and how it ended. The service knows from the kernel who runs
    it, appends that to a log which operators cannot write, and sees the end of a run that was killed.
  - Before the first task the service takes the locks of all hosts of the run. A second run that needs one of them says who
    holds it, since when and with which command, and waits. It ends with status 75 when the time is over.
  - Hosts that only turn up during a run (C(add_host), C(group_by), a second playbook) are locked when their play starts. A run
    that holds hosts by then does not wait for more, as two such runs could wait for each other. It stops before that play, with
    status 75; the plays before it were run.
  - Runs in check mode take no lock, and neither does a play that only looks and says so with the variable
    C(nemo_hosts_lock=false), nor C(ansible) with a module that only looks.
  - C(localhost) is never locked.
options:
  socket:
    description: Path of the service's socket.
    type: path
    default: /run/nemo/operations.sock
    ini:
      - section: callback_operations
        key: socket
  lock_wait:
    description:
      - Seconds to wait for hosts that another run works on; V(0) gives up at once.
      - It counts for the first hosts that a run locks. For those that turn up later nobody waits.
    type: int
    default: 600
    ini:
      - section: callback_operations
        key: lock_wait
    env:
      - name: NEMO_LOCK_WAIT
requirements:
  - Enable it with C(callbacks_enabled = nemo.platform.operations) in ansible.cfg; C(bin_ansible_callbacks = True) lets it see
    C(ansible) too.
"""

EXAMPLES = r"""
- name: A play that only looks, so that it runs beside others (callbacks_enabled = nemo.platform.operations in ansible.cfg)
  hosts: all
  gather_facts: false
  vars:
    nemo_hosts_lock: false
  tasks:
    - name: Reach every host
      ansible.builtin.ping:
"""

LOCKED_OUT = 75  # EX_TEMPFAIL: the same command works later
NO_SERVICE = 69  # EX_UNAVAILABLE
LOOKING_MODULES = {
    "assert",
    "debug",
    "find",
    "getent",
    "package_facts",
    "ping",
    "service_facts",
    "setup",
    "slurp",
    "stat",
}
NEVER_LOCKED = {"localhost", "127.0.0.1", "::1"}
BREAK = "/usr/local/bin/nemo-locks"  # sudo's PATH may lack /usr/local/bin


class ServiceError(Exception):
    """The service does not answer."""


class Service:
    """The connection to the service: lines of JSON. It stays open as long as the run lives."""

    def __init__(self, path: str) -> None:
        self.connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self.connection.connect(path)
        except OSError as error:
            raise ServiceError(f"{path}: {error.strerror}") from error
        self.lines = self.connection.makefile("r", encoding="utf-8")

    def say(self, **message: Any) -> None:
        try:
            self.connection.sendall(json.dumps(message).encode() + b"\n")
        except OSError as error:
            raise ServiceError(f"it hung up: {error.strerror}") from error

    def answer(self) -> dict[str, Any]:
        try:
            line = self.lines.readline()
        except OSError as error:
            raise ServiceError(str(error)) from error
        if not line:
            raise ServiceError("it hung up without an answer")
        answer: dict[str, Any] = json.loads(line)
        return answer


def held_line(host: str, holder: Mapping[str, Any]) -> str:
    """Who holds a host, since when, with which command, and what to do when that is stale."""
    if not holder:
        return f"{host} is being locked by another run"
    process = holder.get("process") or {}
    login = holder.get("login") or ""
    who = f"{login} as {holder['user']}" if login and login != holder.get("user") else holder.get("user")
    return (
        f"{host} is locked by {who} since {holder.get('since')}: {holder.get('command')} (process {process.get('pid')}). "
        f"nemo-locks shows all; a run that hangs is ended by: sudo {BREAK} break {host}"
    )


def only_looks(module: str) -> bool:
    """Whether a module of an ad-hoc command changes nothing."""
    short = module.removeprefix("ansible.builtin.").removeprefix("ansible.legacy.")
    return short in LOOKING_MODULES or (module.rpartition(".")[2].endswith("_info"))


class CallbackModule(CallbackBase):
    """The callback."""

    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "aggregate"
    CALLBACK_NAME = "nemo.platform.operations"
    CALLBACK_NEEDS_ENABLED = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._service: Service | None = None
        self._locked: set[str] = set()

    # Which hosts

    @staticmethod
    def _takes_locks() -> bool:
        if context.CLIARGS.get("check"):
            return False
        module = context.CLIARGS.get("module_name")  # of `ansible`; a playbook has none
        return not (module and only_looks(str(module)))

    def _hosts_of(self, play: Any) -> tuple[set[str], bool]:
        """The hosts of a play, and whether it only looks."""
        manager = play.get_variable_manager()
        try:
            templar = Templar(play.get_loader(), manager.get_vars(play=play))
            pattern = templar.template(play.hosts)
            lock = templar.template((play.vars or {}).get("nemo_hosts_lock", True))
            found = {host.name for host in manager._inventory.get_hosts(pattern, ignore_restrictions=True)}
        except AnsibleError:
            return set(), False  # a pattern that only a play before it defines: known when it starts
        return found - NEVER_LOCKED, str(lock).lower() in ("false", "no", "0")

    # Talking

    def _fail(self, message: str, code: int) -> None:
        self._display.error(message, wrap_text=False)
        # An exception would be a warning: a callback's errors end no run.
        sys.stdout.flush()
        sys.exit(code)

    def _unavailable(self, error: ServiceError) -> None:
        self._fail(
            f"the operations log does not answer ({error}), and nothing is run without it. Start it: "
            "sudo systemctl start nemo-operations.socket",
            NO_SERVICE,
        )

    def _lock(self, hosts: Iterable[str]) -> None:
        wanted = sorted(set(hosts) - self._locked)
        if not wanted or self._service is None or not self._takes_locks():
            return
        late = bool(self._locked)  # who holds hosts waits for none: the run that has them may wait for ours
        wait = 0 if late else int(self.get_option("lock_wait"))
        try:
            self._service.say(say="lock", hosts=wanted, wait=wait)
            while True:
                answer = self._service.answer()
                if not answer.get("waiting"):
                    break
                line = held_line(answer["host"], answer["holder"])
                self._display.warning(f"{line} - waiting up to {answer['for']} s (NEMO_LOCK_WAIT)", formatted=True)
        except ServiceError as error:
            self._unavailable(error)
            return
        if not answer.get("ok"):
            line = held_line(answer["host"], answer["holder"])
            end = "stopped before this play" if late else f"waited {answer['waited']} s, nothing was run"
            self._fail(f"{line} - {end}", LOCKED_OUT)
        self._locked |= set(wanted)

    # Events

    def v2_playbook_on_start(self, playbook: Any) -> None:
        """Log the start, and lock every host that is known by now."""
        plays = [self._hosts_of(play) for play in playbook.get_plays()]
        try:
            if self._service is None:
                self._service = Service(str(self.get_option("socket")))
                self._service.say(
                    say="start",
                    playbook=getattr(playbook, "_file_name", ""),
                    revision=os.environ.get("NEMO_WORKSPACE_REVISION", ""),
                    check=bool(context.CLIARGS.get("check")),
                    hosts=sorted(set().union(*(hosts for hosts, _ in plays))),
                )
                self._service.answer()
            else:
                self._service.say(say="playbook")
        except ServiceError as error:
            self._unavailable(error)
        self._lock(set().union(*(hosts for hosts, looks in plays if not looks)))

    def v2_playbook_on_play_start(self, play: Any) -> None:
        """Lock what was not known before, without waiting where this run holds hosts already."""
        hosts, looks = self._hosts_of(play)
        if not looks:
            self._lock(hosts)

    def v2_playbook_on_stats(self, stats: Any) -> None:
        """Log the result."""
        hosts = {host: stats.summarize(host) for host in stats.processed}
        bad = any(counts.get("failures") or counts.get("unreachable") for counts in hosts.values())
        if self._service is not None:
            with contextlib.suppress(ServiceError):  # the run is over
                self._service.say(say="end", result="failed" if bad else "ok", hosts=hosts)
