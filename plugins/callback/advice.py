# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Callback: one line of advice for failures that are known."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleError
from ansible.plugins.callback import CallbackBase
from ansible.template import Templar

from ansible_collections.nemo.platform.plugins.module_utils import aws_advice

DOCUMENTATION = r"""
name: advice
type: aggregate
short_description: What to do about a host that cannot be reached, and other known failures
version_added: 0.1.0
author: The nemo platform project (@nemo-platform)
description:
  - Prints one line after an unreachable host or a failed task whose cause is known, namely a changed host key, a refused
    key or user, a Bastion or host that does not answer, a missing Bastion, and an expired AWS token.
  - What goes wrong on the way through the Bastion is read from the file that the host variable C(nemo_ssh_jump_log) names,
    as ssh shows nothing of it. A run begins a file anew that is named C(bastion.log) and longer than 1 MB.
  - The same advice is given once per run.
requirements:
  - Enable it with C(callbacks_enabled = nemo.platform.advice) in ansible.cfg.
"""

EXAMPLES = r"""
- name: See the advice (callbacks_enabled = nemo.platform.advice in ansible.cfg)
  hosts: all
  gather_facts: false
  tasks:
    - name: Reach every host
      ansible.builtin.ping:
"""

# ssh appends to its log for ever: a run that finds it longer begins it anew.
JUMP_LOG_BYTES = 1_000_000
_OFFENDING = re.compile(r"Offending (?P<kind>\S+) key in (?P<file>.+?):(?P<line>\d+)")
_CHANGED_HOST = re.compile(r"[Hh]ost key for (?P<host>\S+) has changed")
_DENIED = re.compile(r"(?P<who>\S+@\S+?): Permission denied \((?P<how>[^)]*)\)")
_NO_KEY = re.compile(r"no such identity: (?P<file>.+?): No such file")
_TIMEOUT = re.compile(r"connect to host (?P<host>\S+) port (?P<port>\d+): (?P<why>[^\r\n]+)")
_THROUGH = re.compile(r"channel \d+: open failed: (?P<why>[^\r\n]+)|stdio forwarding failed")
_BROKE_OFF = "UNKNOWN port 65535"
_TOKEN = re.compile(r"\b(ExpiredToken(Exception)?|RequestExpired)\b|token (included in the request is|has) expired")


def _changed_key(text: str) -> str | None:
    if "REMOTE HOST IDENTIFICATION HAS CHANGED" not in text and "Host key verification failed" not in text:
        return None
    place, host = _OFFENDING.search(text), _CHANGED_HOST.search(text)
    if not place or not host:
        return "ssh does not trust the host's key: compare it with the instance's console output, then see known_hosts"
    known_hosts = place["file"]
    return (
        f"the host key of {host['host']} is not the one in {known_hosts} line {place['line']}. Was the instance replaced?"
        " Compare the new key with its console output (aws ec2 get-console-output) or ask who did it; only then forget the"
        f" old key: ssh-keygen -R {shlex.quote(host['host'])} -f {shlex.quote(known_hosts)}"
    )


def _refused_user(text: str) -> str | None:
    found = _DENIED.search(text)
    if not found:
        return None
    missing = _NO_KEY.search(text)
    if missing:
        return f"{found['who']} was refused: the key {missing['file']} does not exist; set nemo_ssh_private_key_file"
    return (
        f"{found['who']} was refused ({found['how']}): is nemo_ssh_private_key_file the key of this instance (and readable"
        " by you alone, or in the agent), and nemo_ssh_user a user of its image?"
    )


def _no_answer(text: str) -> str | None:
    if "hostname contains invalid characters" in text or 'Could not resolve hostname "":' in text:
        return "there is no Bastion to go through: run playbooks/preflight.yml"
    found = _TIMEOUT.search(text)
    if found:
        return (
            f"{found['host']} port {found['port']} does not answer ({found['why'].strip()}): is the instance running, and"
            " does its security group let you in? The Bastion admits named addresses only, every other host the Bastion"
            " only; instances that changed since are found with --flush-cache"
        )
    found = _THROUGH.search(text)
    if found:
        why = (found["why"] or "refused").strip()
        return (
            f"the Bastion answers, but not the host behind it ({why}): is the instance running, and does its security group"
            " admit SSH from the Bastion? Instances that changed since are found with --flush-cache"
        )
    if "banner exchange" in text or "Operation timed out" in text or "Connection timed out" in text:
        return (
            "no answer in time: is the Bastion running, and is your address among those its security group admits? --flush-cache"
            " looks up the addresses again"
        )
    if _BROKE_OFF in text:
        return "the way through the Bastion broke off: try ssh to the Bastion itself (-vvv shows the command)"
    return None


def _expired(text: str) -> str | None:
    return aws_advice.EXPIRED_ADVICE if _TOKEN.search(text) else None


def advice(text: str, unreachable: bool) -> str | None:
    """One line of advice for the message of a failure, or None when its cause is not known."""
    checks = (_changed_key, _refused_user, _no_answer, _expired) if unreachable else (_expired,)
    for check in checks:
        line = check(text)
        if line:
            return line
    return None


class CallbackModule(CallbackBase):
    """The callback."""

    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "aggregate"
    CALLBACK_NAME = "nemo.platform.advice"
    CALLBACK_NEEDS_ENABLED = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._given: set[str] = set()
        self._play: Any = None
        self._started: dict[Path, int] = {}
        for path in Path("~/.ansible/cp").expanduser().glob("*/bastion.log"):
            with contextlib.suppress(OSError):  # another run's; no log is worth a failure
                if path.stat().st_size > JUMP_LOG_BYTES:
                    os.truncate(path, 0)
                self._started[path] = path.stat().st_size

    def _jump_log(self, result: Any) -> str:
        """What ssh has said about the connection to the Bastion since this run began."""
        if self._play is None:
            return ""
        manager = self._play.get_variable_manager()
        variables = manager.get_vars(play=self._play, host=result.host, task=result.task)
        if "nemo_ssh_jump_log" not in variables:
            return ""
        try:
            path = Path(Templar(self._play.get_loader(), variables).template(variables["nemo_ssh_jump_log"]))
            return path.read_bytes()[self._started.get(path, 0) :].decode(errors="replace")
        except (AnsibleError, OSError):
            return ""

    def _advise(self, result: Any, unreachable: bool) -> None:
        values = result.result
        text = "\n".join(str(values[key]) for key in ("msg", "stderr", "module_stderr") if values.get(key))
        if unreachable and _BROKE_OFF in text:
            text = f"{text}\n{self._jump_log(result)}"
        line = advice(text, unreachable)
        # The task's own message may say it already.
        if line and line not in self._given and line not in text:
            self._given.add(line)
            self._display.display(f"ADVICE [{result.host.get_name()}]: {line}", color="yellow")

    def v2_playbook_on_play_start(self, play: Any) -> None:
        """Remember the play, whose variables name the log."""
        self._play = play

    def v2_runner_on_unreachable(self, result: Any) -> None:
        """A host could not be reached."""
        self._advise(result, True)

    def v2_runner_on_failed(self, result: Any, ignore_errors: bool = False) -> None:
        """A task failed."""
        if not ignore_errors:
            self._advise(result, False)
