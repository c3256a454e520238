#!/usr/bin/python
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Accounts, keys, sudo and sessions of operators, in one remote execution."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: operator_accounts
short_description: Accounts, keys, sudo and sessions of operators in one remote execution
version_added: "0.1.0"
author:
  - nemo platform maintainers (@nemo-platform)
description:
  - Makes a host's operators those of a list, in this order - everything is checked; operators who are no longer in the
    list lose their keys, sudo, account and groups, jobs and sessions; accounts are made; keys and sudo are written;
    sessions that were opened with a key that is no longer an operator's end.
  - Keys lie in O(keys_directory), owned by root, so that nobody adds one himself. The SSH daemon has to be told to
    look there.
  - An account is this module's when it made it (recorded in C(/var/lib/nemo/operators.json)) or when it is a member of
    O(group). No other account is ever touched, and an operator with the name of another account is an error.
  - A removed operator's account is locked and expired, and leaves all groups. Neither it nor its files are deleted;
    his crontab and at jobs move to C(/var/lib/nemo/removed).
  - A session ends by logind, where that runs, and by its processes - those of the user, what they started as root,
    and what the kernel knows to come from his login. They have two seconds to go, and are killed for up to 15 s.
  - For an operator who stays, the journal says with which key each of his open sessions was opened. One opened with a
    key that is not his any more ends. One of which the journal knows nothing ends in a run that takes a key or sudo
    away from him, and else stays and is listed in RV(sessions_unknown).
  - Interrupted runs are finished by the next one. Key files and sudo rules are replaced atomically, and an operator
    who stays keeps his keys at each moment.
options:
  operators:
    description: The operators.
    type: list
    elements: dict
    required: true
    suboptions:
      name:
        description: Name of the account, up to 31 lower-case letters, digits, C(_) and C(-).
        type: str
        required: true
      keys:
        description:
          - Public keys, as in a C(.pub) file; ed25519, ecdsa, their hardware forms, or RSA.
          - In front of a key, V(restrict), V(from="...") and options that begin with V(no-) are allowed.
        type: list
        elements: str
        required: true
      sudo:
        description: Whether the operator may become root, without a password, with input and output recorded.
        type: bool
        default: false
  group:
    description: Group of all operators. Made where it does not exist.
    type: str
    default: nemo-operators
  groups:
    description: Further groups that all operators are in. They must exist. Memberships beside these are taken away.
    type: list
    elements: str
    default: []
  shell:
    description: Login shell.
    type: path
    default: /bin/bash
  keys_directory:
    description: Directory of the key files, one for each operator under his name. What else lies there is removed.
    type: path
    default: /etc/ssh/authorized_keys.d
  record_directory:
    description: Directory of sudo's records, for C(sudoreplay). Only root can read it.
    type: path
    default: /var/log/sudo-io
  record_retention:
    description: Age at which C(systemd-tmpfiles) removes a record, for example V(90d). Empty keeps them.
    type: str
    default: 90d
  rsa_bits:
    description: Smallest RSA key, in bits.
    type: int
    default: 3072
  own_users:
    description:
      - Users whom the run must not lock out, beside the one whose connection it came through, whom the module knows
        by itself.
    type: list
    elements: str
    default: []
  allow_empty:
    description: Whether the list may be empty, which takes access away from every operator.
    type: bool
    default: false
attributes:
  check_mode:
    support: full
    description: Predicts every change; keys are checked, and sudo rules proven, as in a real run.
  diff_mode:
    support: full
    description: Accounts, sudo and keys by fingerprint, one entry for all operators, and one per other file.
notes:
  - Needs root.
  - One execution at a time per host. A second one waits for up to 120 seconds.
  - What sudo records is what the terminal showed and what was typed, passwords included, so only root reads it. A root
    shell can remove records; send the journal elsewhere where that matters.
"""

EXAMPLES = r"""
- name: Alice and Bob are the operators
  nemo.platform.operator_accounts:
    operators:
      - name: alice
        sudo: true
        keys:
          - ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIMnZ0LQvCvG5RNP1+vD4nGFQ1X5+3sVJGHYdFhKk6Yto alice@laptop
      - name: bob
        keys:
          - from="10.0.0.0/8" ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIHsFQ8G3E8+XbN5rPvZ0u2pVJqUQ0Rf1m6dYt9cW7kLz bob@desk
"""

RETURN = r"""
operators:
  description: The operators with the fingerprints of their keys.
  returned: success
  type: list
  elements: dict
  sample: [{name: alice, sudo: true, keys: ["SHA256:..."]}]
created:
  description: Operators whose account was made.
  returned: always
  type: list
  elements: str
removed:
  description: Accounts that lost their access in this run.
  returned: always
  type: list
  elements: str
ended:
  description: Processes that were ended, by operator.
  returned: always
  type: list
  elements: dict
  sample: [{name: carol, reason: no operator any more, processes: ["bash[812]", "sshd[811]"]}]
sessions_unknown:
  description: Open sessions of which the journal does not say by which key they were opened.
  returned: always
  type: list
  elements: str
  sample: ["bob: sshd[811]"]
changed_paths:
  description: Files that were written or removed.
  returned: always
  type: list
  elements: str
"""

import fcntl
import functools
import glob
import grp
import json
import os
import pwd
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import IO, Any, Callable

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.nemo.platform.plugins.module_utils import host_files, operators, user_processes
from ansible_collections.nemo.platform.plugins.module_utils.host_files import FilePlan, FileSpec, HostFileError

STATE = "/var/lib/nemo/operators.json"
REMOVED_JOBS = "/var/lib/nemo/removed"
LOCK = "/run/nemo/operator_accounts.lock"
LOCK_TIMEOUT_SECONDS = 120
SUDOERS = "/etc/sudoers"
SUDOERS_DIRECTORY = "/etc/sudoers.d"
SUDOERS_NAME = "nemo-operators"  # letters sort after the digits of other files, and the last rule counts
TMPFILES = "/etc/tmpfiles.d/nemo-sudo-io.conf"
CRONTABS = ("/var/spool/cron/crontabs", "/var/spool/cron")
AT_JOBS = ("/var/spool/cron/atjobs", "/var/spool/at")
LINGER = "/var/lib/systemd/linger"
LOGIND_USERS = "/run/systemd/users"
SHADOW = "/etc/shadow"
LOGIN_DEFS = "/etc/login.defs"
SKELETON = "/etc/skel"
NO_PASSWORD = "*"  # refuses every password; "!" would refuse keys as well where the SSH daemon does without PAM
EXPIRED_DAY = "1"
MANAGED = "# Managed by Ansible (module nemo.platform.operator_accounts); changes made here are lost.\n"
SUDO_SETTINGS = (
    "!requiretty, use_pty, log_input, log_output, iolog_flush, iolog_dir={directory}, iolog_file=%{{user}}/%{{seq}}"
)

ARGUMENT_SPEC: dict[str, Any] = {
    "operators": {
        "type": "list",
        "elements": "dict",
        "required": True,
        "options": {
            "name": {"type": "str", "required": True},
            "keys": {"type": "list", "elements": "str", "required": True, "no_log": False},
            "sudo": {"type": "bool", "default": False},
        },
    },
    "group": {"type": "str", "default": "nemo-operators"},
    "groups": {"type": "list", "elements": "str", "default": []},
    "shell": {"type": "path", "default": "/bin/bash"},
    "keys_directory": {"type": "path", "default": "/etc/ssh/authorized_keys.d", "no_log": False},
    "record_directory": {"type": "path", "default": "/var/log/sudo-io"},
    "record_retention": {"type": "str", "default": "90d"},
    "rsa_bits": {"type": "int", "default": operators.RSA_BITS},
    "own_users": {"type": "list", "elements": "str", "default": []},
    "allow_empty": {"type": "bool", "default": False},
}

Select = Callable[[user_processes.Table], "set[int]"]


class AccountError(Exception):
    """The host's operators cannot be made those of the list."""


@dataclass
class Shadow:
    """What /etc/shadow says of an account."""

    password: str
    expires: str

    @property
    def locked(self) -> bool:
        return self.password.startswith("!")


@dataclass
class Operator:
    """One entry of the list."""

    name: str
    sudo: bool
    keys: list[operators.Key]

    @property
    def content(self) -> bytes:
        return (MANAGED + "".join(f"{key.line}\n" for key in self.keys)).encode()

    @property
    def fingerprints(self) -> list[str]:
        return [key.fingerprint for key in self.keys]


@dataclass
class State:
    """What outlives a run: whose accounts are ours, and whose sessions a killed run still had to end."""

    accounts: list[str] = field(default_factory=list)
    ending: dict[str, str] = field(default_factory=dict)  # operator -> why

    def dump(self) -> bytes:
        data = {"accounts": sorted(set(self.accounts)), "ending": self.ending}
        return (json.dumps(data, indent=2, sort_keys=True) + "\n").encode()


def read_state(path: str) -> State:
    raw = host_files.read_regular(path)
    if raw is None:
        return State()
    try:
        data = json.loads(raw)
        return State([str(name) for name in data["accounts"]], {str(k): str(v) for k, v in data["ending"].items()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise AccountError(f"{path} is damaged: {error!r}. Remove it: members of the group stay known") from error


def read_shadow(path: str) -> dict[str, Shadow]:
    found = {}
    for line in (host_files.read_regular(path) or b"").decode("utf-8", "replace").splitlines():
        fields = line.split(":")
        if len(fields) >= 8:
            found[fields[0]] = Shadow(fields[1], fields[7])
    return found


def first_uid(path: str) -> int:
    """The smallest number of a person's account."""
    text = (host_files.read_regular(path) or b"").decode("utf-8", "replace")
    found = re.search(r"^\s*UID_MIN\s+(\d+)", text, re.MULTILINE)
    return max(1000, int(found.group(1))) if found else 1000


def owner_of(path: str) -> int:
    """The number of the account that a path belongs to."""
    return os.stat(path).st_uid


def sudo_rules(text: str) -> set[str]:
    """Who a file of ours lets become root."""
    return set(re.findall(r"^([a-z_][a-z0-9_-]*) ALL=", text, re.MULTILINE))


class Accounts:
    """One run."""

    def __init__(self, module: AnsibleModule) -> None:
        self.module = module
        self.params = module.params
        self.check_mode = bool(module.check_mode)
        self.group: str = self.params["group"]
        self.directory = os.path.normpath(self.params["keys_directory"])
        self.wanted: list[Operator] = []
        self.state = State()
        self.shadow: dict[str, Shadow] = {}
        self.table = user_processes.Table()
        self.spared = {one.pid for one in self.table.ancestors(os.getpid())}
        self.diff: list[dict[str, str]] = []
        self.result: dict[str, Any] = {
            "changed": False,
            "operators": [],
            "created": [],
            "removed": [],
            "ended": [],
            "sessions_unknown": [],
            "changed_paths": [],
        }
        self._handle: IO[str] | None = None

    # Tools

    def _try(self, argv: Sequence[str]) -> tuple[int, str, str]:
        environment = {"LC_ALL": "C.UTF-8", "SYSTEMD_PAGER": "", "SYSTEMD_COLORS": "0"}
        code, out, err = self.module.run_command(list(argv), environ_update=environment, handle_exceptions=False)
        return int(code), str(out), str(err)

    def _run(self, *argv: str) -> str:
        try:
            code, out, err = self._try(argv)
        except OSError as error:
            raise AccountError(f"'{argv[0]}' cannot be run: {error.strerror}") from error
        if code != 0:
            raise AccountError(f"'{' '.join(argv)}' ended with status {code}: {(err or out).strip()}")
        return out

    def _act(self, *argv: str) -> None:
        self.result["changed"] = True
        if not self.check_mode:
            self._run(*argv)

    def _lock(self) -> None:
        if self.check_mode:
            return
        os.makedirs(os.path.dirname(LOCK), mode=0o755, exist_ok=True)
        self._handle = open(LOCK, "w", encoding="utf-8")  # noqa: SIM115 - held until the process ends
        deadline = time.monotonic() + LOCK_TIMEOUT_SECONDS
        while True:
            try:
                fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise AccountError(
                        f"another run has held {LOCK} for {LOCK_TIMEOUT_SECONDS} s; see: fuser -v {LOCK}"
                    ) from error
                time.sleep(0.2)

    @staticmethod
    def _account(name: str) -> pwd.struct_passwd | None:
        try:
            return pwd.getpwnam(name)
        except KeyError:
            return None

    def _members(self) -> list[str]:
        try:
            return list(grp.getgrnam(self.group).gr_mem)
        except KeyError:
            return []

    @staticmethod
    def _groups_of(name: str) -> set[str]:
        return {one.gr_name for one in grp.getgrall() if name in one.gr_mem}

    def _put(self, plan: FilePlan) -> None:
        """Bring one file to its state, atomically."""
        if not plan.changed:
            return
        self.result["changed"] = True
        self.result["changed_paths"].append(plan.spec.path)
        if self.check_mode:
            return
        try:
            if plan.replace and plan.after is not None and plan.staged is None:
                host_files.stage(plan, str(self.module.tmpdir), False)
            host_files.apply_plan(plan, self._label)
        finally:
            host_files.discard_staged([plan])

    def _label(self, staged: str, target: str) -> None:
        """The SELinux context that a target of this name has."""
        if self.module.selinux_enabled():
            self.module.set_context_if_different(staged, self.module.selinux_default_context(target), False)

    def _save(self) -> None:
        """Not a change of the host's: what the next run needs to know."""
        if self.check_mode or host_files.read_regular(STATE) == self.state.dump():
            return
        os.makedirs(os.path.dirname(STATE), mode=0o755, exist_ok=True)
        plan = host_files.plan_file(FileSpec(STATE, self.state.dump(), mode=0o600))
        host_files.stage(plan, str(self.module.tmpdir), False)
        host_files.apply_plan(plan, self._label)

    # Checks, before the first change

    def _check_list(self) -> None:
        listed = self.params["operators"]
        found = operators.problems(listed, (), self.params["allow_empty"], self.params["rsa_bits"])
        if found:
            raise AccountError("; ".join(f"operators: {what} (allowed: {allowed})" for what, allowed in found))
        for entry in listed:
            self.wanted.append(
                Operator(entry["name"], entry["sudo"], operators.keys_of(entry, self.params["rsa_bits"]))
            )
        self.result["operators"] = [
            {"name": one.name, "sudo": one.sudo, "keys": one.fingerprints} for one in self.wanted
        ]

    def _own_users(self) -> set[str]:
        """Whose connection the run came through, and whom it was told of."""
        found = set(self.params["own_users"])
        for one in self.table.ancestors(os.getpid()):
            for uid in (*one.users, *((one.login,) if self.table.logins_count else ())):
                try:
                    found.add(pwd.getpwuid(uid).pw_name)
                except KeyError:
                    continue
        if os.environ.get("SUDO_USER"):
            found.add(os.environ["SUDO_USER"])
        return found - {"root"}

    def _ours(self) -> set[str]:
        return {name for name in {*self.state.accounts, *self._members()} if self._account(name)}

    def _check_host(self) -> None:
        ours, smallest = self._ours(), first_uid(LOGIN_DEFS)
        wanted = {one.name: one for one in self.wanted}
        found = []
        for name in sorted(ours):
            account = self._account(name)
            if account and account.pw_uid < smallest:
                found.append(
                    f"{name} (uid {account.pw_uid}) is a system's account and in the group {self.group}:"
                    f" take it out, or set another group"
                )
        for name, operator in wanted.items():
            account = self._account(name)
            if account and name not in ours:
                found.append(
                    f"operators: {name} is an account that was here before (uid {account.pw_uid}) and not in the group"
                    f" {self.group} (allowed: a name of the operator's own; or add the account to the group to hand it over)"
                )
            home = account.pw_dir if account else f"/home/{name}"
            if os.path.lexists(home) and (
                not os.path.isdir(home)
                or os.path.islink(home)
                or (name in ours and account and owner_of(home) != account.pw_uid)
                or not account
            ):
                found.append(f"operators: {home} exists and is not {name}'s; move it away")
            if operator.sudo and not self._visudo():
                found.append(f"operators: {name} shall have sudo, which is not installed")
        had = sudo_rules(self._sudoers_now())
        for name in sorted(self._own_users()):
            if name in ours and name not in wanted:
                found.append(
                    f"operators: {name} is not in the list, and this run is {name}'s own or may not lock him out:"
                    " have another operator, or the deploy user, remove him"
                )
            elif name in had and name in wanted and not wanted[name].sudo:
                found.append(
                    f"operators: sudo of {name} is false, and this run is {name}'s own: it would end what it needs"
                )
        shell = self.params["shell"]
        if not os.access(shell, os.X_OK):
            found.append(f"shell is {shell}, which is no program on this host")
        for name in self.params["groups"]:
            try:
                grp.getgrnam(name)
            except KeyError:
                found.append(f"groups has {name}, which does not exist on this host")
        if found:
            raise AccountError("; ".join(found))

    def _check_keys(self) -> None:
        """Whether this host's own OpenSSH can read the keys that it has not got yet: an old one lacks hardware keys."""
        for operator in self.wanted:
            now = (host_files.read_regular(self._key_path(operator.name)) or b"").decode("utf-8", "replace")
            for key in operator.keys:
                if key.body in now:
                    continue
                path = os.path.join(str(self.module.tmpdir), "key.pub")
                with open(path, "w", encoding="ascii") as handle:
                    handle.write(f"{key.kind} {key.body}\n")
                try:
                    code, out, _err = self._try(["ssh-keygen", "-l", "-E", "sha256", "-f", path])
                except OSError as error:
                    raise AccountError(f"ssh-keygen cannot be run: {error.strerror}") from error
                if code != 0 or key.fingerprint not in out.split():
                    raise AccountError(
                        f"operators: the OpenSSH of this host cannot read the key {key.fingerprint} ({key.kind}) of"
                        f" {operator.name} (allowed: a type that it knows, for example ssh-ed25519)"
                    )

    # sudo

    @staticmethod
    def _visudo() -> str | None:
        return shutil.which("visudo", path=f"{os.environ.get('PATH', os.defpath)}:/usr/local/sbin:/usr/sbin:/sbin")

    @property
    def _sudoers_path(self) -> str:
        return os.path.join(SUDOERS_DIRECTORY, SUDOERS_NAME)

    def _sudoers_now(self) -> str:
        return (host_files.read_regular(self._sudoers_path) or b"").decode("utf-8", "replace")

    def _sudoers_plan(self) -> FilePlan:
        names = [one.name for one in self.wanted if one.sudo]
        settings = SUDO_SETTINGS.format(directory=self.params["record_directory"])
        lines = [
            f"Defaults:{','.join(names)} {settings}\n",
            *(f"{name} ALL=(ALL:ALL) NOPASSWD: ALL\n" for name in names),
        ]
        content = (MANAGED + "".join(lines)).encode()
        spec = FileSpec(self._sudoers_path, content, mode=0o440, state="present" if names else "absent")
        return host_files.plan_file(spec)

    def _prove_sudo(self, plan: FilePlan) -> None:
        """visudo's judgement of all rules together, with ours as they shall be: a clash would take sudo from everyone."""
        visudo = self._visudo()
        if plan.after is None or visudo is None:
            return
        self._visudo_says(visudo, plan.after.decode(), self._sudoers_path)
        whole = []
        for line in (host_files.read_regular(SUDOERS) or b"").decode("utf-8", "replace").splitlines():
            if not re.match(rf"\s*[#@]includedir\s+{re.escape(SUDOERS_DIRECTORY)}/?\s*$", line):
                whole.append(line)
                continue
            names = {name for name in os.listdir(SUDOERS_DIRECTORY) if "." not in name and not name.endswith("~")}
            for name in sorted({*names, SUDOERS_NAME}):
                path = os.path.join(SUDOERS_DIRECTORY, name)
                content = plan.after if name == SUDOERS_NAME else host_files.read_regular(path)
                whole.append((content or b"").decode("utf-8", "replace"))
        if not any(MANAGED.strip() in part for part in whole):
            raise AccountError(
                f"{SUDOERS} does not include {SUDOERS_DIRECTORY}: it needs #includedir {SUDOERS_DIRECTORY}"
            )
        self._visudo_says(visudo, "\n".join(whole) + "\n", "all rules together")

    def _visudo_says(self, visudo: str, content: str, what: str) -> None:
        descriptor, path = tempfile.mkstemp(dir=self.module.tmpdir)
        with os.fdopen(descriptor, "w", encoding="utf-8") as handle:
            handle.write(content)
        os.chmod(path, 0o440)
        code, out, err = self._try([visudo, "-c", "-f", path])
        os.unlink(path)
        if code != 0:
            said = (err.strip() or out.strip()).replace(path, what)
            raise AccountError(f"sudo: visudo refuses {what}, nothing was changed: {said}")

    def _retention_plan(self) -> FilePlan:
        age = self.params["record_retention"] or "-"
        line = f"d {self.params['record_directory']} 0700 root root {age}\n"
        return host_files.plan_file(FileSpec(TMPFILES, (MANAGED + line).encode()))

    # One operator

    def _key_path(self, name: str) -> str:
        return os.path.join(self.directory, name)

    def _key_plan(self, operator: Operator) -> FilePlan:
        return host_files.plan_file(FileSpec(self._key_path(operator.name), operator.content))

    def _no_keys(self, name: str) -> FilePlan:
        return host_files.plan_file(FileSpec(self._key_path(name), state="absent"))

    def _keys_now(self, name: str) -> list[operators.Key]:
        text = (host_files.read_regular(self._key_path(name)) or b"").decode("utf-8", "replace")
        found = []
        for line in text.splitlines():
            if line.strip() and not line.startswith("#"):
                try:
                    found.append(operators.parse_key(line, 0))
                except operators.KeyProblem:
                    continue
        return found

    def _ensure_group(self) -> None:
        try:
            grp.getgrnam(self.group)
        except KeyError:
            self._act("groupadd", self.group)

    def _ensure_account(self, operator: Operator) -> None:
        name, shell = operator.name, self.params["shell"]
        groups = {self.group, *self.params["groups"]}
        account = self._account(name)
        if account is None:
            self.result["created"].append(name)
            self._act(
                "useradd", "--user-group", "--groups", ",".join(sorted(groups)), "--shell", shell,
                "--home-dir", f"/home/{name}", "--no-create-home", "--password", NO_PASSWORD, "--comment", "operator", name,
            )  # fmt: skip
            account = self._account(name)
        else:
            shadow = self.shadow.get(name)
            if shadow is None:  # a run that was killed inside useradd
                self._act("pwconv")
            try:
                grp.getgrgid(account.pw_gid)
            except KeyError:
                self._act("groupadd", "--gid", str(account.pw_gid), name)
            changes = []
            if account.pw_shell != shell:
                changes += ["--shell", shell]
            if shadow is None or shadow.password != NO_PASSWORD:
                changes += ["--password", NO_PASSWORD]
            if shadow is None or shadow.expires:
                changes += ["--expiredate", ""]
            if self._groups_of(name) != groups:
                changes += ["--groups", ",".join(sorted(groups))]
            if changes:
                self._act("usermod", *changes, name)
        if account is not None:
            self._ensure_home(account)

    def _ensure_home(self, account: pwd.struct_passwd) -> None:
        home = account.pw_dir
        if os.path.isdir(home):
            if os.stat(home).st_mode & 0o7777 != 0o700:
                self.result["changed"] = True
                if not self.check_mode:
                    os.chmod(home, 0o700)
            return
        self.result["changed"] = True
        if self.check_mode:
            return
        # Made beside its place, so that a killed run leaves no half home.
        parent = os.path.dirname(home)
        draft = os.path.join(parent, f".nemo-home-{account.pw_name}")
        shutil.rmtree(draft, ignore_errors=True)
        os.makedirs(parent, mode=0o755, exist_ok=True)
        if os.path.isdir(SKELETON):
            shutil.copytree(SKELETON, draft, symlinks=True)
        else:
            os.mkdir(draft, 0o700)
        for folder, _folders, files in os.walk(draft):
            for path in (folder, *(os.path.join(folder, name) for name in files)):
                os.chown(path, account.pw_uid, account.pw_gid, follow_symlinks=False)
        os.chmod(draft, 0o700)
        os.rename(draft, home)
        if self.module.selinux_enabled() and shutil.which("restorecon"):
            self._run("restorecon", "-R", home)

    def _remove(self, name: str) -> None:
        """All that a former operator could use goes, what opens the door first."""
        account = self._account(name)
        if account is None:
            return
        before = bool(self.result["changed"])
        self.result["changed"] = False
        self._put(self._no_keys(name))
        shadow = self.shadow.get(name)
        if shadow is None or not shadow.locked or shadow.expires != EXPIRED_DAY:
            self._act("usermod", "--lock", "--expiredate", "1970-01-02", name)
        if self._groups_of(name):
            self._act("usermod", "--groups", "", name)
        self._remove_jobs(account)
        touched = bool(self.result["changed"])
        self._end_user(name, account.pw_uid, "no operator any more")
        if touched and not self.check_mode:
            time.sleep(0.5)  # a login that was let in just before and has no process of his own yet
            self._end_user(name, account.pw_uid, "no operator any more")
        if self.result["changed"]:
            self.result["removed"].append(name)
            self.module.warn(
                f"{name} is no operator any more: replace what operators could read, the key for the hosts first"
            )
        self.result["changed"] = before or self.result["changed"]

    def _remove_jobs(self, account: pwd.struct_passwd) -> None:
        jobs = [os.path.join(folder, account.pw_name) for folder in CRONTABS]
        for folder in AT_JOBS:
            jobs += [
                path
                for path in glob.glob(os.path.join(folder, "[a-z]*"))
                if os.path.isfile(path) and os.stat(path).st_uid == account.pw_uid
            ]
        for path in jobs:
            if os.path.isfile(path):
                self.result["changed"] = True
                self.result["changed_paths"].append(path)
                if not self.check_mode:
                    os.makedirs(REMOVED_JOBS, mode=0o700, exist_ok=True)
                    # Not a rename: it may be another file system, and the copy is root's.
                    target = os.path.join(REMOVED_JOBS, f"{account.pw_name}-{os.path.basename(path)}")
                    shutil.copyfile(path, target)
                    os.chmod(target, 0o600)
                    os.unlink(path)
        linger = os.path.join(LINGER, account.pw_name)
        if os.path.lexists(linger):
            self.result["changed"] = True
            if not self.check_mode:
                os.unlink(linger)

    # Sessions

    def _end(self, name: str, reason: str, select: Select, logind_user: int | None = None) -> None:
        """End the selected processes; all of a user's by logind first, where it knows him."""
        table = user_processes.Table()
        chosen = select(table)
        labels = sorted(table.by_pid[pid].label for pid in chosen - self.spared)
        left: list[str] = []
        if labels and not self.check_mode:
            if logind_user is not None and os.path.exists(f"{LOGIND_USERS}/{logind_user}") and not chosen & self.spared:
                self._try(["loginctl", "terminate-user", str(logind_user)])
            more, left = user_processes.end(select, self.spared)
            labels = sorted({*labels, *more})
        if labels:
            self.result["changed"] = True
            self.result["ended"].append({"name": name, "reason": reason, "processes": labels})
        if left:
            raise AccountError(f"{name}: processes that do not end: {', '.join(left)}; the account is closed already")

    def _end_user(self, name: str, uid: int, reason: str) -> None:
        self._end(name, reason, lambda table: table.of_user(uid), uid)

    def _end_stale(self) -> None:
        """Sessions of operators who stay, opened with what they have no more."""
        table = user_processes.Table()
        monitors: dict[int, tuple[Operator, int]] = {}
        for operator in self.wanted:
            account = self._account(operator.name)
            if account is None:
                continue
            why = self.state.ending.get(operator.name)
            if why == "sudo":
                self._end_user(operator.name, account.pw_uid, "no sudo any more")
                continue
            for own, monitor in table.ssh_sessions(account.pw_uid).items():
                monitors[monitor] = (operator, own)
        known = user_processes.login_keys(self._try, table, monitors)
        for monitor, (operator, own) in sorted(monitors.items()):
            label = table.by_pid[own].label
            opened_by = known.get(monitor)
            if opened_by in operator.fingerprints:
                continue
            if opened_by is None and operator.name not in self.state.ending:
                self.result["sessions_unknown"].append(f"{operator.name}: {label}")
                continue
            reason = f"opened with {opened_by}, not a key of his" if opened_by else "opened with a key unknown"
            self._end(operator.name, reason, functools.partial(_still, then=table, pids=table.of_session(own)))

    # The run

    def _picture(self, name: str) -> list[str]:
        """What the host now lets a name do, for the diff."""
        account, shadow = self._account(name), self.shadow.get(name)
        if account is None:
            return []
        closed = shadow is not None and shadow.locked and bool(shadow.expires)
        lines = [f"{name}: account {'locked' if closed else 'active'}\n"]
        if name in sudo_rules(self._sudoers_now()):
            lines.append(f"{name}: sudo\n")
        return lines + [f"{name}: key {key}\n" for key in sorted(self._keys_now(name), key=str)]

    def _show(self, gone: Iterable[str]) -> None:
        before, after = [], []
        wanted = {one.name: one for one in self.wanted}
        for name in sorted({*wanted, *gone}):
            before += self._picture(name)
            if name not in wanted:
                after.append(f"{name}: account locked\n")
                continue
            after.append(f"{name}: account active\n")
            after += [f"{name}: sudo\n"] if wanted[name].sudo else []
            after += [f"{name}: key {key}\n" for key in sorted(wanted[name].keys, key=str)]
        if before != after:
            header = "operators"
            self.diff.append(
                {"before": "".join(before), "after": "".join(after), "before_header": header, "after_header": header}
            )

    def _note_endings(self, had_sudo: set[str]) -> None:
        """Whose sessions this run has to end, noted before the first change: a run that is killed owes it to the next."""
        for operator in self.wanted:
            lost = {key.fingerprint for key in self._keys_now(operator.name)} - set(operator.fingerprints)
            if operator.name in had_sudo and not operator.sudo:
                self.state.ending[operator.name] = "sudo"
            elif lost:
                self.state.ending.setdefault(operator.name, "key")

    def _ensure_directory(self, path: str, mode: int) -> None:
        changes = host_files.ensure_directory(path, mode, "root", "root", self.check_mode)
        if changes:
            self.result["changed"] = True
            self.result["changed_paths"].append(path)
            self.diff.append(host_files.attribute_diff(path, changes))

    def run(self) -> None:
        self._check_list()
        self._lock()
        self.state = read_state(STATE)
        self.shadow = read_shadow(SHADOW)
        self._check_host()
        self._check_keys()
        sudoers, retention = self._sudoers_plan(), self._retention_plan()
        if sudoers.replace:
            self._prove_sudo(sudoers)

        wanted = {one.name for one in self.wanted}
        gone = sorted(self._ours() - wanted)
        self._show(gone)
        self._note_endings(sudo_rules(self._sudoers_now()))
        self.state.accounts = sorted({*self.state.accounts, *self._ours(), *wanted})
        self._save()

        self._ensure_directory(self.directory, 0o755)
        if any(one.sudo for one in self.wanted):
            self._ensure_directory(self.params["record_directory"], 0o700)
        for name in gone:
            self._put(self._no_keys(name))
        if os.path.isdir(SUDOERS_DIRECTORY):
            self._put(sudoers)
        for name in gone:
            self._remove(name)
        for path in sorted(glob.glob(os.path.join(glob.escape(self.directory), "*")) + glob.glob(
            os.path.join(glob.escape(self.directory), ".nemo-*"))):  # fmt: skip
            if os.path.basename(path) not in {*wanted, *gone} and not os.path.isdir(path):
                self._put(host_files.plan_file(FileSpec(path, state="absent")))

        self._ensure_group()
        for operator in self.wanted:
            self._ensure_account(operator)
            self._put(self._key_plan(operator))
        self._put(retention)
        self.diff += [entry for plan in (sudoers, retention) if plan.changed for entry in host_files.diff_of(plan)]
        self._end_stale()
        self.state.ending = {}
        self.state.accounts = sorted(name for name in self.state.accounts if self._account(name))
        self._save()


def _still(now: user_processes.Table, then: user_processes.Table, pids: set[int]) -> set[int]:
    """Of a session's processes those that are still the same, and what they started since."""
    same = {pid for pid in pids if pid in now.by_pid and now.by_pid[pid].ticks == then.by_pid[pid].ticks}
    return now.below(same)


def main() -> None:
    module = AnsibleModule(argument_spec=ARGUMENT_SPEC, supports_check_mode=True)
    accounts = Accounts(module)
    try:
        accounts.run()
    except (AccountError, HostFileError) as error:
        module.fail_json(msg=str(error), **accounts.result)
    if accounts.result["sessions_unknown"]:
        module.warn(
            "the journal does not say with which key these sessions were opened; they stay: "
            + ", ".join(accounts.result["sessions_unknown"])
        )
    if module._diff:
        accounts.result["diff"] = accounts.diff
    module.exit_json(**accounts.result)


if __name__ == "__main__":
    main()
