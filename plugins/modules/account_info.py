#!/usr/bin/python
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Module: who may log in on a host, with which keys, and who did."""

from __future__ import annotations

DOCUMENTATION = r"""
module: account_info
short_description: Who may log in on a host by SSH, with which keys, and who did
version_added: "0.1.0"
author: The nemo platform project (@nemo-platform)
description:
  - Finds every account that the SSH daemon has keys for, those of some groups, and those that are named, with the fingerprints of
    their keys, whether they may use sudo, their last login, and their open sessions.
  - Where the keys are is asked of the SSH daemon, account by account. Logins are read from the journal, and from C(wtmp) where the
    journal knows of none. Sessions are those of the SSH daemon, which have neither terminal nor entry in C(utmp) when they only
    forward.
options:
  groups:
    description: Groups whose members are shown, with keys or without.
    type: list
    elements: str
    default: []
  users:
    description: Further accounts to show, with keys or without.
    type: list
    elements: str
    default: []
  days:
    description: How many days of the journal are looked through for logins.
    type: int
    default: 90
attributes:
  check_mode:
    description: Nothing is changed in any mode.
    support: full
  diff_mode:
    description: There is nothing to show.
    support: none
notes:
  - Needs root by C(become).
"""

EXAMPLES = r"""
- name: Who has access
  nemo.platform.account_info:
    groups: [nemo-operators]
  become: true
  register: access
"""

RETURN = r"""
accounts:
  description: One entry for each account, by name.
  returned: success
  type: list
  elements: dict
  contains:
    name:
      description: Its name.
      type: str
    groups:
      description: Those of O(groups) that it is in.
      type: list
      elements: str
    sudo:
      description: Whether it may use sudo.
      type: bool
    keys:
      description: Public keys that open it, each with C(type), C(fingerprint), C(comment) and C(file).
      type: list
      elements: dict
    last_login:
      description: C(at) (seconds since 1970), C(from) and C(key) of the last login that is known; empty when there is none.
      type: dict
    sessions:
      description: Open sessions, each with C(since), C(from), C(key) and C(terminal).
      type: list
      elements: dict
unreadable:
  description: Lines of key files that are no key, as C(file:line).
  returned: success
  type: list
  elements: str
"""

import base64
import binascii
import glob
import grp
import json
import os
import pwd
import re
import struct
import subprocess
import time
from collections.abc import Iterable
from typing import Any

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.nemo.platform.plugins.module_utils.operators import fingerprint

KEY_FILES = [".ssh/authorized_keys", ".ssh/authorized_keys2"]
NO_SHELL = ("nologin", "false", "sync", "shutdown", "halt")
DAEMON = re.compile(r"/usr/(local/)?(sbin|bin|lib|libexec)/(openssh/|ssh/)?sshd(-session)?( \(deleted\))?$")
_KEY = re.compile(r"(?:^|\s)([a-z][a-z0-9@.-]*) ([A-Za-z0-9+/]{16,}={0,2})(?:\s+(.*))?$")
_ACCEPTED = re.compile(r"Accepted (\S+) for (\S+) from (\S+) port (\d+) ssh2(?:: \S+ (SHA256:\S+))?")
_SESSION = re.compile(r"^sshd(?:-session)?: ([^\s@\[]+)@(\S+)")
# struct utmp of glibc: type, pid, line, id, user, host, exit status, session, seconds, ...
_UTMP = struct.Struct("<hxxi32s4s32s256shhiii16s20x")
_USER_PROCESS = 7


def read_key(line: str) -> dict[str, str] | None:
    """A line of authorized_keys, whatever stands in front of the key; None where there is no key in it."""
    for match in re.finditer(r"(?:^|(?<=\s))(?=(?:ssh|ecdsa|sk)-)", line):
        found = _KEY.match(line[match.start() :])
        if not found:
            continue
        try:
            blob = base64.b64decode(found[2], validate=True)
            (length,) = struct.unpack(">I", blob[:4])
        except (binascii.Error, ValueError, struct.error):
            continue
        if blob[4 : 4 + length] == found[1].encode():
            return {"type": found[1], "fingerprint": fingerprint(blob), "comment": (found[3] or "").strip()}
    return None


def read_keys(path: str) -> tuple[list[dict[str, str]], list[str]]:
    """The keys of a file, and where it holds what is none."""
    keys, wrong = [], []
    try:
        with open(path, encoding="utf-8", errors="replace") as stream:
            lines = stream.read().splitlines()
    except OSError:
        return [], []
    for number, line in enumerate(lines, 1):
        if line.strip() and not line.lstrip().startswith("#"):
            key = read_key(line.strip())
            if key:
                keys.append({**key, "file": path})
            else:
                wrong.append(f"{path}:{number}")
    return keys, wrong


def key_files(settings: str) -> list[str]:
    """The files that `sshd -T` names; those of its default where it does not answer."""
    for line in settings.splitlines():
        name, _blank, value = line.partition(" ")
        if name.lower() == "authorizedkeysfile":
            return [] if value.strip() == "none" else value.split()
    return KEY_FILES


def expanded(pattern: str, user: str, home: str, uid: int) -> str:
    """A pattern of AuthorizedKeysFile for one account."""
    text = re.sub(r"%[%huU]", lambda found: {"%%": "%", "%h": home, "%u": user, "%U": str(uid)}[found[0]], pattern)
    return text if text.startswith("/") else os.path.join(home, text)


def journal_logins(lines: Iterable[str]) -> tuple[dict[str, dict[str, Any]], dict[int, dict[str, Any]]]:
    """The last login of each account, and every login by the process of the daemon that let it in."""
    last: dict[str, dict[str, Any]] = {}
    by_process: dict[int, dict[str, Any]] = {}
    for raw in lines:
        if "Accepted " not in raw:
            continue
        try:
            entry = json.loads(raw)
            match = _ACCEPTED.match(str(entry.get("MESSAGE")))
            at = int(entry["__REALTIME_TIMESTAMP"]) // 1_000_000
        except (ValueError, KeyError):
            continue
        if match:
            login = {"user": match[2], "at": at, "from": match[3], "key": match[5] or match[1]}
            last[match[2]] = login
            by_process[int(entry.get("_PID") or 0)] = login
    return last, by_process


def wtmp_logins(data: bytes) -> dict[str, dict[str, Any]]:
    """The last login of each account in a wtmp file."""
    last: dict[str, dict[str, Any]] = {}
    for start in range(0, len(data) - _UTMP.size + 1, _UTMP.size):
        kind, _pid, _line, _id, user, host, _e1, _e2, _session, seconds, _micro, _address = _UTMP.unpack_from(
            data, start
        )
        name = user.split(b"\0")[0].decode("utf-8", "replace")
        if kind == _USER_PROCESS and name:
            source = host.split(b"\0")[0].decode("utf-8", "replace")
            last[name] = {"user": name, "at": seconds & 0xFFFFFFFF, "from": source, "key": ""}
    return last


def sessions(logins: dict[int, dict[str, Any]], proc: str = "/proc") -> dict[str, list[dict[str, Any]]]:
    """Open sessions of the SSH daemon by account: its process for the user, whose parent let the user in."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in glob.glob(f"{proc}/[0-9]*"):
        try:
            with open(f"{path}/cmdline", "rb") as stream:
                title = stream.read(256).replace(b"\0", b" ").decode("utf-8", "replace").strip()
            match = _SESSION.match(title)
            if not match or not DAEMON.match(os.readlink(f"{path}/exe")):  # anybody can call a process so
                continue
            with open(f"{path}/stat", encoding="utf-8", errors="replace") as stream:
                parent = int(stream.read().rpartition(")")[2].split()[1])
            since = int(os.stat(path).st_mtime)
        except (OSError, ValueError, IndexError):  # gone meanwhile
            continue
        login = logins.get(parent, {})
        login = login if login.get("user") == match[1] else {}
        found.setdefault(match[1], []).append(
            {
                "since": login.get("at") or since,
                "from": login.get("from", ""),
                "key": login.get("key", ""),
                "terminal": "" if match[2] == "notty" else match[2],
            }
        )
    return {name: sorted(entries, key=lambda entry: int(entry["since"])) for name, entries in found.items()}


def program(*argv: str) -> tuple[int, str]:
    """Run a program; its status, and what it said."""
    environment = {**os.environ, "LC_ALL": "C", "PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin"}
    try:
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment,
            encoding="utf-8", errors="replace", check=False,
        )  # fmt: skip
    except OSError:
        return 127, ""
    return done.returncode, done.stdout


def journal(days: int) -> tuple[dict[str, dict[str, Any]], dict[int, dict[str, Any]]]:
    """Logins in the journal, read as it comes: it may be long."""
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time.time() - days * 86400))
    argv = ["journalctl", "--no-pager", "--quiet", "--output=json", f"--since={since}"]
    argv += ["SYSLOG_IDENTIFIER=sshd", "SYSLOG_IDENTIFIER=sshd-session"]
    try:
        with subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            encoding="utf-8", errors="replace",
        ) as process:  # fmt: skip
            assert process.stdout is not None
            return journal_logins(process.stdout)
    except OSError:
        return {}, {}


def may_sudo(user: str, uid: int) -> bool:
    """Whether sudo has any rule for the account."""
    if uid == 0:
        return True
    code, out = program("sudo", "-n", "-l", "-U", user)
    return code == 0 and "may run the following" in out


def collect(params: dict[str, Any]) -> dict[str, Any]:
    """Everything."""
    last, by_process = journal(params["days"])
    try:
        with open("/var/log/wtmp", "rb") as stream:
            earlier = wtmp_logins(stream.read())
    except OSError:
        earlier = {}
    opened = sessions(by_process)
    groups: dict[str, set[str]] = {}
    for name in params["groups"]:
        try:
            group = grp.getgrnam(name)
        except KeyError:
            continue
        groups[name] = set(group.gr_mem) | {entry.pw_name for entry in pwd.getpwall() if entry.pw_gid == group.gr_gid}
    wanted = set(params["users"]).union(*groups.values()) if groups else set(params["users"])
    accounts, unreadable = [], []
    for entry in sorted(pwd.getpwall(), key=lambda one: one.pw_name):
        shell = os.path.basename(entry.pw_shell)
        if shell in NO_SHELL and entry.pw_name not in wanted:
            continue
        _code, settings = program("sshd", "-T", "-C", f"user={entry.pw_name},host=localhost,addr=127.0.0.1")
        keys: list[dict[str, str]] = []
        for pattern in key_files(settings):
            found, wrong = read_keys(expanded(pattern, entry.pw_name, entry.pw_dir, entry.pw_uid))
            keys += found
            unreadable += wrong
        if not keys and entry.pw_name not in wanted and entry.pw_name not in opened:
            continue
        login = last.get(entry.pw_name) or earlier.get(entry.pw_name) or {}
        accounts.append(
            {
                "name": entry.pw_name,
                "groups": [name for name in params["groups"] if entry.pw_name in groups.get(name, ())],
                "sudo": may_sudo(entry.pw_name, entry.pw_uid),
                "keys": keys,
                "last_login": {key: login[key] for key in ("at", "from", "key")} if login else {},
                "sessions": opened.get(entry.pw_name, []),
            }
        )
    return {"accounts": accounts, "unreadable": sorted(set(unreadable))}


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "groups": {"type": "list", "elements": "str", "default": []},
            "users": {"type": "list", "elements": "str", "default": []},
            "days": {"type": "int", "default": 90},
        },
        supports_check_mode=True,
    )
    module.exit_json(changed=False, **collect(module.params))


if __name__ == "__main__":
    main()
