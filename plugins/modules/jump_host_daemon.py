#!/usr/bin/python
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The SSH daemon of a jump host: its rules written for this host's OpenSSH, proven as a whole, then used."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: jump_host_daemon
short_description: Rules of a jump host's SSH daemon, proven before they are used
version_added: "0.1.0"
author:
  - nemo platform maintainers (@nemo-platform)
description:
  - Writes one drop-in file of C(sshd_config), in one remote execution. Only members of O(group) and O(deploy_user) may
    log in, by key; they forward to O(permit_open) and to nothing else; each forward is logged.
  - The daemon of the host is asked which algorithms and options it knows, so that one input fits OpenSSH 7.4 and 10.
  - Before anything is replaced, the whole configuration is put together beside the real one, with the new file in its
    place, and C(sshd -T -C) says what it means for an operator, for a stranger and for O(deploy_user). Each setting has
    to arrive for each of them; C(AllowUsers), C(AllowGroups) and their opposites must let in the right ones; and
    O(deploy_user) must have a key where the daemon will look for it. If not, nothing is replaced, and the error names
    the setting, its value, and the file that set it first.
  - This is proven in each run, so a file of others that weakens the rules later is an error in the next one.
  - The daemon reloads, it never restarts, so no connection is cut. If it does not answer afterwards, the former file
    comes back.
  - A run that was killed between writing and reloading is completed by the next one.
options:
  path:
    description: The drop-in file. Files that sort before it win over it, which the proof notices.
    type: path
    default: /etc/ssh/sshd_config.d/10-nemo-jump-host.conf
  deploy_user:
    description: The user by whom the project itself connects. It keeps its own C(~/.ssh/authorized_keys).
    type: str
    required: true
  group:
    description: Group of the operators.
    type: str
    default: nemo-operators
  keys_directory:
    description: Directory of the operators' keys, a file for each under his name.
    type: path
    default: /etc/ssh/authorized_keys.d
  permit_open:
    description:
      - Where operators and O(deploy_user) may forward to, as V(host:port), V([address]:port) or V(host:*).
      - A client must ask for a host by the very name or address given here.
    type: list
    elements: str
    required: true
  agent_forwarding:
    description: Whether operators may forward their agent.
    type: bool
    default: false
  idle_seconds:
    description:
      - Age at which an operator's idle session or forward is closed; 0 never.
      - By the daemon from OpenSSH 9.2 on, and by the shell (C(TMOUT)) on every system. O(deploy_user) is exempt.
    type: int
    default: 1800
  alive_seconds:
    description: Interval at which silent clients are asked whether they are alive. Four without an answer end the connection.
    type: int
    default: 30
  instance_connect:
    description:
      - Whether keys that come from elsewhere at login time are accepted (C(AuthorizedKeysCommand), EC2 Instance Connect).
      - If V(false), a daemon that has such a command on its command line is an error, as no file can take that away.
    type: bool
    default: false
  unit:
    description: systemd unit of the daemon.
    type: str
    default: sshd.service
  composer:
    description:
      - Program that makes the main file out of the drop-ins, where OpenSSH knows no C(Include) (Amazon Linux 2).
      - Called as C(compose NAME FILE), which prints the whole with FILE in NAME's place, and C(apply).
    type: path
  profile:
    description: File for login shells that ends idle ones.
    type: path
    default: /etc/profile.d/nemo-idle.sh
attributes:
  check_mode:
    support: full
    description: Predicts every change; the proof is the same as in a real run.
  diff_mode:
    support: full
    description: One entry per file.
notes:
  - Needs root.
  - OpenSSH logs denied forwards at C(INFO), and permitted ones at C(DEBUG1). From 8.5 on, C(LogVerbose) brings just that
    line. Before (Amazon Linux 2 has 7.4) the whole daemon logs at C(DEBUG1).
"""

EXAMPLES = r"""
- name: The SSH daemon is the door to two services and to SSH of their host
  nemo.platform.jump_host_daemon:
    deploy_user: ec2-user
    permit_open: ["10.0.2.31:22", "10.0.2.31:8000", "10.0.2.31:8001"]
"""

RETURN = r"""
changed_paths:
  description: Files that were replaced.
  returned: always
  type: list
  elements: str
reloaded:
  description: Whether the daemon was told to read its files again.
  returned: always
  type: bool
unknown_options:
  description: Options that the host's OpenSSH does not know, and that were left out.
  returned: success
  type: list
  elements: str
  sample: [ChannelTimeout, LogVerbose]
proven:
  description: For whom the configuration was proven.
  returned: success
  type: list
  elements: str
  sample: [deploy user ec2-user, operator alice, stranger nobody]
"""

import fcntl
import fnmatch
import glob
import grp
import os
import pwd
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.nemo.platform.plugins.module_utils import host_files, operators, systemd_units
from ansible_collections.nemo.platform.plugins.module_utils.host_files import FilePlan, FileSpec, HostFileError
from ansible_collections.nemo.platform.plugins.module_utils.systemd_units import Systemctl, UnitError

MAIN = "/etc/ssh/sshd_config"
RUN_DIRECTORY = "/run/nemo/jump_host_daemon"
PRIVILEGE_SEPARATION = "/run/sshd"
LOCK_TIMEOUT_SECONDS = 120
ANSWER_SECONDS = 10.0
STRANGER = "nobody"
COPIES = "drop-ins"
OUTSIDE = "192.0.2.1"  # of the range for documentation: no rule of anybody's is about it
MANAGED = "# Managed by Ansible (module nemo.platform.jump_host_daemon); changes made here are lost.\n"

# In order of preference. What the host's OpenSSH does not know is left out; what is not here is not used.
ALGORITHMS = {
    "KexAlgorithms": (
        "kex",
        (
            "mlkem768x25519-sha256",
            "sntrup761x25519-sha512",
            "sntrup761x25519-sha512@openssh.com",
            "curve25519-sha256",
            "curve25519-sha256@libssh.org",
            "diffie-hellman-group16-sha512",
            "diffie-hellman-group18-sha512",
        ),
    ),
    "Ciphers": (
        "cipher",
        (
            "chacha20-poly1305@openssh.com",
            "aes256-gcm@openssh.com",
            "aes128-gcm@openssh.com",
            "aes256-ctr",
            "aes128-ctr",
        ),
    ),
    "MACs": (
        "mac",
        ("hmac-sha2-512-etm@openssh.com", "hmac-sha2-256-etm@openssh.com", "umac-128-etm@openssh.com"),
    ),
}
# Signatures, which `ssh -Q` does not list in old releases; all releases from 7.2 on know these.
HOST_KEYS = "ssh-ed25519,rsa-sha2-512,rsa-sha2-256,ecdsa-sha2-nistp256"
PUBLIC_KEYS = (
    "ssh-ed25519,sk-ssh-ed25519@openssh.com,rsa-sha2-512,rsa-sha2-256,sk-ecdsa-sha2-nistp256@openssh.com,"
    "ecdsa-sha2-nistp256,ecdsa-sha2-nistp384,ecdsa-sha2-nistp521"
)
FORWARD_LOG = "serverloop.c:server_request_direct_tcpip():*"
# Options that are younger than OpenSSH 7.4. PubkeyAcceptedAlgorithms has an older name too, but under that one it
# means types of keys, where a list of signatures would refuse every RSA key.
YOUNG = {
    "LogVerbose": FORWARD_LOG,
    "PubkeyAcceptedAlgorithms": PUBLIC_KEYS,
    "RequiredRSASize": "2048",
    "PermitListen": "none",
    "ChannelTimeout": "session=60",
    "UnusedConnectionTimeout": "300",
}
# A file that comes first may set these otherwise: they are comfort, not the door.
NEGOTIABLE = ("LogLevel", "ClientAliveInterval", "ClientAliveCountMax", "ChannelTimeout", "UnusedConnectionTimeout")
# What must hold although these rules do not set it.
DEPLOY_NEEDS = {"pubkeyauthentication": "yes", "disableforwarding": "no", "forcecommand": "none"}
_TARGET = re.compile(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?):([0-9]{1,5}|\*)")

ARGUMENT_SPEC: dict[str, Any] = {
    "path": {"type": "path", "default": "/etc/ssh/sshd_config.d/10-nemo-jump-host.conf"},
    "deploy_user": {"type": "str", "required": True},
    "group": {"type": "str", "default": "nemo-operators"},
    "keys_directory": {"type": "path", "default": "/etc/ssh/authorized_keys.d", "no_log": False},
    "permit_open": {"type": "list", "elements": "str", "required": True},
    "agent_forwarding": {"type": "bool", "default": False},
    "idle_seconds": {"type": "int", "default": 1800},
    "alive_seconds": {"type": "int", "default": 30},
    "instance_connect": {"type": "bool", "default": False},
    "unit": {"type": "str", "default": "sshd.service"},
    "composer": {"type": "path"},
    "profile": {"type": "path", "default": "/etc/profile.d/nemo-idle.sh"},
}


class DoorError(Exception):
    """The daemon cannot be given these rules."""


@dataclass(frozen=True)
class Rules:
    """Settings for everybody, and those by which two kinds of users differ."""

    everyone: Mapping[str, str]
    deploy: Mapping[str, str]
    operator: Mapping[str, str]


@dataclass(frozen=True)
class Person:
    """Somebody at the door."""

    kind: str
    user: str
    admitted: bool
    settings: Mapping[str, str]
    groups: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        return f"{self.kind} {self.user}"


@dataclass
class Effective:
    """What `sshd -T` says: values by option in lower case."""

    values: dict[str, list[str]] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Effective:
        found: dict[str, list[str]] = {}
        for line in text.splitlines():
            name, _blank, value = line.strip().partition(" ")
            if name:
                found.setdefault(name.lower(), []).extend(value.split())
        return cls(found)

    def of(self, name: str) -> list[str] | None:
        return self.values.get(name.lower())


def target_problems(targets: Iterable[str]) -> list[str]:
    """Targets that are none."""
    return [
        target
        for target in targets
        if not (match := _TARGET.fullmatch(target)) or (match.group(3) != "*" and not 1 <= int(match.group(3)) <= 65535)
    ]


def make_rules(params: Mapping[str, Any], algorithms: Mapping[str, Sequence[str]], unknown: Iterable[str]) -> Rules:
    """The rules for a daemon with these algorithms that does not know these options."""
    unknown = set(unknown)
    old = "LogVerbose" in unknown
    targets = " ".join(params["permit_open"]) or "none"
    everyone = {
        "AuthenticationMethods": "publickey",
        "PubkeyAuthentication": "yes",
        "PasswordAuthentication": "no",
        "KbdInteractiveAuthentication": "no",
        **({"ChallengeResponseAuthentication": "no"} if old else {}),
        "HostbasedAuthentication": "no",
        "GSSAPIAuthentication": "no",
        "KerberosAuthentication": "no",
        "PermitRootLogin": "no",
        "PermitEmptyPasswords": "no",
        "StrictModes": "yes",
        "AllowGroups": params["group"],
        "AuthorizedKeysFile": "none",
        "TrustedUserCAKeys": "none",
        **({} if params["instance_connect"] else {"AuthorizedKeysCommand": "none"}),
        "AllowTcpForwarding": "no",
        "AllowStreamLocalForwarding": "no",
        "AllowAgentForwarding": "no",
        "GatewayPorts": "no",
        "PermitTunnel": "no",
        "PermitListen": YOUNG["PermitListen"],
        "X11Forwarding": "no",
        "PermitUserEnvironment": "no",
        "PermitUserRC": "no",
        **{name: ",".join(values) for name, values in algorithms.items() if values},
        "HostKeyAlgorithms": HOST_KEYS,
        "PubkeyAcceptedAlgorithms": PUBLIC_KEYS,
        "RequiredRSASize": YOUNG["RequiredRSASize"],
        "ClientAliveInterval": str(params["alive_seconds"]),
        "ClientAliveCountMax": "4",
        "LogLevel": "DEBUG1" if old else "VERBOSE",
        "LogVerbose": FORWARD_LOG,
    }
    forwards = {"AllowTcpForwarding": "local", "PermitOpen": targets}
    idle = params["idle_seconds"]
    limits = {"ChannelTimeout": f"session={idle} direct-tcpip={idle}", "UnusedConnectionTimeout": "300"} if idle else {}
    operator = {
        "AuthorizedKeysFile": f"{params['keys_directory']}/%u",
        **forwards,
        "AllowAgentForwarding": "yes" if params["agent_forwarding"] else "no",
        **limits,
    }
    deploy = {"AllowGroups": "*", "AuthorizedKeysFile": ".ssh/authorized_keys", **forwards}

    def known(settings: Mapping[str, str]) -> dict[str, str]:
        return {name: value for name, value in settings.items() if name not in unknown}

    return Rules(known(everyone), known(deploy), known(operator))


def render(rules: Rules, deploy_user: str, group: str) -> str:
    """The file. The first value of an option counts, and so does the first block that matches."""

    def lines(settings: Mapping[str, str], indent: str = "") -> str:
        return "".join(f"{indent}{name} {value}\n" for name, value in settings.items())

    return (
        f"{MANAGED}# Everybody, strangers included\n{lines(rules.everyone)}"
        f"# The user by whom the project connects\nMatch User {deploy_user}\n{lines(rules.deploy, '    ')}"
        f"Match Group {group}\n{lines(rules.operator, '    ')}Match all\n"
    )


def render_profile(group: str, idle_seconds: int) -> str:
    """A shell that waits for its operator this long ends; what runs in it is not counted."""
    return f"""{MANAGED}case $- in *i*)
  case " $(id -Gn) " in *' {group} '*)
    [ "${{TMOUT-}}" = {idle_seconds} ] || {{ TMOUT={idle_seconds}; readonly TMOUT; export TMOUT; }} ;;
  esac ;;
esac
"""


def _matches(value: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(value, pattern.replace("[", "[[]"))


def _in_list(values: Iterable[str], patterns: Iterable[str]) -> bool:
    """sshd's pattern lists, where a pattern that begins with "!" takes out what the others let in."""
    hit = False
    values = list(values)
    for pattern in patterns:
        for one in pattern.split(","):
            if one.startswith("!") and any(_matches(value, one[1:]) for value in values):
                return False
            hit = hit or any(_matches(value, one) for value in values)
    return hit


def refused_by(effective: Effective, user: str, groups: Sequence[str]) -> str:
    """The option that keeps a user out, empty where none does. user@host counts as a refusal: it may be another host."""
    allow_users, allow_groups = effective.of("allowusers") or [], effective.of("allowgroups") or []
    denied = [pattern.split("@")[0] for pattern in effective.of("denyusers") or []]
    if _in_list([user], denied):
        return "DenyUsers"
    if allow_users and not _in_list([user], allow_users):
        return "AllowUsers"
    if _in_list(groups, effective.of("denygroups") or []):
        return "DenyGroups"
    if allow_groups and not _in_list(groups, allow_groups):
        return "AllowGroups"
    return ""


def _same(name: str, found: Sequence[str], wanted: str) -> bool:
    if name == "LogLevel" and wanted.startswith("DEBUG"):
        return bool(found) and found[0].startswith("DEBUG")
    if "," in wanted:
        return ",".join(found) == wanted
    return sorted(word.lower() for word in found) == sorted(word.lower() for word in wanted.split())


def deviations(effective: Effective, person: Person) -> list[tuple[str, str, str]]:
    """(option, value, what it must be) for each setting that does not arrive at somebody."""
    found = []
    for name, wanted in person.settings.items():
        values = effective.of(name)
        soft = name in NEGOTIABLE and not wanted.startswith("DEBUG")
        # An option that this build of the daemon does not have is not printed.
        if values is None or soft or _same(name, values, wanted):
            continue
        found.append((name, " ".join(values), wanted))
    by = refused_by(effective, person.user, person.groups)
    if person.admitted and by:
        found.append((by, " ".join(effective.of(by) or []), f"one that lets in {person.user}"))
    if not person.admitted and not by:
        found.append(("AllowGroups", "without effect", f"one that keeps {person.user} out"))
    return found


class Door:
    """One run."""

    def __init__(self, module: AnsibleModule) -> None:
        self.module = module
        self.params = module.params
        self.check_mode = bool(module.check_mode)
        self.path = os.path.normpath(self.params["path"])
        self.systemctl = Systemctl(self._try, systemd_units.is_running())
        self.stamps = host_files.Stamps(RUN_DIRECTORY)
        self.sshd = ""
        self.result: dict[str, Any] = {"changed": False, "changed_paths": [], "reloaded": False}
        self.diff: list[dict[str, str]] = []
        self._handle: IO[str] | None = None

    def _try(self, argv: Sequence[str]) -> tuple[int, str, str]:
        environment = {"LC_ALL": "C.UTF-8", "SYSTEMD_PAGER": "", "SYSTEMD_COLORS": "0"}
        code, out, err = self.module.run_command(list(argv), environ_update=environment, handle_exceptions=False)
        return int(code), str(out), str(err)

    def _lock(self) -> None:
        if self.check_mode:
            return
        os.makedirs(RUN_DIRECTORY, mode=0o700, exist_ok=True)
        lock = os.path.join(RUN_DIRECTORY, "lock")
        self._handle = open(lock, "w", encoding="utf-8")  # noqa: SIM115 - held until the process ends
        deadline = time.monotonic() + LOCK_TIMEOUT_SECONDS
        while True:
            try:
                fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise DoorError(f"another run has held {lock} for {LOCK_TIMEOUT_SECONDS} s") from error
                time.sleep(0.2)

    def _label(self, staged: str, target: str) -> None:
        if self.module.selinux_enabled():
            self.module.set_context_if_different(staged, self.module.selinux_default_context(target), False)

    # What the host's OpenSSH can do

    def _algorithms(self) -> dict[str, list[str]]:
        found = {}
        for option, (kind, wanted) in ALGORITHMS.items():
            try:
                code, out, err = self._try(["ssh", "-Q", kind])
            except OSError as error:
                raise DoorError(f"ssh cannot be run: {error.strerror}; it says which algorithms there are") from error
            known = set(out.split())
            if code != 0 or not known & set(wanted):
                raise DoorError(f"'ssh -Q {kind}' names none of {', '.join(wanted)}: {(err or out).strip()}")
            found[option] = [name for name in wanted if name in known]
        return found

    def _sshd(self, *arguments: str) -> tuple[int, str, str]:
        code, out, err = self._try([self.sshd, *arguments])
        missing = re.search(r"Missing privilege separation directory: (\S+)", err)
        if code != 0 and missing:  # its unit makes it, and need not have run yet
            os.makedirs(missing.group(1), mode=0o755, exist_ok=True)
            code, out, err = self._try([self.sshd, *arguments])
        return code, out, err

    def _unknown_options(self, folder: str) -> list[str]:
        """Asked all at once: the daemon complains of each line that it does not know."""
        path = os.path.join(folder, "options")
        with open(path, "w", encoding="utf-8") as handle:
            handle.writelines(f"{name} {value}\n" for name, value in YOUNG.items())
        _code, _out, err = self._sshd("-t", "-f", path)
        complained = {name.lower() for name in re.findall(r"Bad configuration option: (\S+)", err)}
        return sorted(name for name in YOUNG if name.lower() in complained)

    # The proof

    def _whole(self, folder: str, candidate: str) -> str:
        """The configuration as it would be, as a file of its own."""
        whole = os.path.join(folder, "sshd_config")
        directory, name = os.path.split(self.path)
        if self.params["composer"]:
            code, text, err = self._try([self.params["composer"], "compose", name, candidate])
            if code != 0:
                raise DoorError(f"{self.params['composer']} compose ended with status {code}: {err.strip()}")
        else:
            copies = os.path.join(folder, COPIES)
            os.mkdir(copies)
            for path in glob.glob(os.path.join(glob.escape(directory), "*.conf")):
                shutil.copyfile(path, os.path.join(copies, os.path.basename(path)))
            shutil.copyfile(candidate, os.path.join(copies, name))
            raw = host_files.read_regular(MAIN)
            if raw is None:
                raise DoorError(f"{MAIN} does not exist: is the SSH daemon's package installed?")
            include = re.compile(
                rf"^([ \t]*include[ \t]+){re.escape(directory)}/\*\.conf[ \t]*$", re.IGNORECASE | re.MULTILINE
            )
            text, count = include.subn(lambda match: f"{match.group(1)}{copies}/*.conf", raw.decode("utf-8", "replace"))
            if not count:
                raise DoorError(
                    f"{MAIN} does not heed {directory}: it needs, as its first line, 'Include {directory}/*.conf'"
                )
        with open(whole, "w", encoding="utf-8") as handle:
            handle.write(text)
        return whole

    def _culprit(self, name: str) -> str:
        """Where an option is set outside our file."""
        files = sorted(glob.glob(os.path.join(glob.escape(os.path.dirname(self.path)), "*.conf")))
        for path in [*files, MAIN]:
            if path == self.path:
                continue
            lines = (host_files.read_regular(path) or b"").decode("utf-8", "replace").splitlines()
            for number, line in enumerate(lines, 1):
                if re.match(rf"\s*{re.escape(name)}[\s=]", line, re.IGNORECASE):
                    return f" (set in {path}, line {number})"
        return ""

    def _source(self) -> str:
        """The address that this run's own connection comes from."""
        pid = os.getpid()
        while pid > 1:
            try:
                with open(f"/proc/{pid}/environ", "rb") as handle:
                    found = re.search(rb"(?:^|\0)SSH_CONNECTION=(\S+)", handle.read())
                with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as handle:
                    text = handle.read()
            except OSError:
                break
            if found:
                return found.group(1).decode("ascii", "replace")
            pid = int(text[text.rindex(")") + 2 :].split()[1])
        return OUTSIDE

    @staticmethod
    def _groups(account: pwd.struct_passwd) -> tuple[str, ...]:
        names = [one.gr_name for one in grp.getgrall() if account.pw_name in one.gr_mem or one.gr_gid == account.pw_gid]
        return tuple(names)

    def _people(self, rules: Rules) -> list[Person]:
        deploy_user = self.params["deploy_user"]
        try:
            account = pwd.getpwnam(deploy_user)
        except KeyError as error:
            raise DoorError(f"deploy_user is {deploy_user}, which is no user of this host") from error
        deploy = {**rules.everyone, **rules.deploy, **DEPLOY_NEEDS}
        people = [Person("deploy user", deploy_user, True, deploy, self._groups(account))]
        try:
            members = grp.getgrnam(self.params["group"]).gr_mem
        except KeyError:
            members = []
        for name in members:
            try:
                groups = self._groups(pwd.getpwnam(name))
            except KeyError:  # a member without an account
                continue
            people.append(Person("operator", name, True, {**rules.everyone, **rules.operator}, groups))
        people += [
            Person("stranger", name, False, rules.everyone, self._groups(pwd.getpwnam(name)))
            for name in (STRANGER, "root")
            if name not in members
        ]
        return people

    def _prove(self, whole: str, rules: Rules) -> list[str]:
        people, source = self._people(rules), self._source()
        found: dict[tuple[str, str, str], list[str]] = {}
        for person in people:
            where = f"user={person.user},host={source},addr={source}"
            code, out, err = self._sshd("-T", "-f", whole, "-C", where)
            if code != 0:
                # Its copies have other paths than the files that it is about.
                said = (
                    (err or out)
                    .strip()
                    .replace(os.path.join(os.path.dirname(whole), COPIES), os.path.dirname(self.path))
                )
                raise DoorError(f"sshd refuses the configuration, nothing was replaced: {said.replace(whole, MAIN)}")
            effective = Effective.parse(out)
            for deviation in deviations(effective, person):
                found.setdefault(deviation, []).append(person.label)
            if person.kind == "deploy user":
                self._prove_key(effective, person.user)
        if found:
            sentences = [
                f"{name} would be '{value}' for the {', '.join(labels)}, must be '{wanted}'{self._culprit(name)}"
                for (name, value, wanted), labels in found.items()
            ]
            raise DoorError("nothing was replaced: " + "; ".join(sentences))
        return [person.label for person in people]

    def _prove_key(self, effective: Effective, user: str) -> None:
        """Whoever replaces the lock has to have a key to it."""
        home = pwd.getpwnam(user).pw_dir
        paths = []
        for pattern in effective.of("authorizedkeysfile") or []:
            path = pattern.replace("%u", user).replace("%h", home).replace("%%", "%")
            path = path if os.path.isabs(path) else os.path.join(home, path)
            paths.append(path)
            for line in (host_files.read_regular(path) or b"").decode("utf-8", "replace").splitlines():
                if any(word in operators.TYPES for word in line.split()) and not line.lstrip().startswith("#"):
                    return
        raise DoorError(
            f"nothing was replaced: deploy_user {user} has no key in {' or '.join(paths) or 'any file'},"
            " and would be locked out"
        )

    def _check_command_line(self) -> None:
        """Options on the daemon's command line win over all files."""
        if self.params["instance_connect"] or not self.systemctl.online:
            return
        code, out, _err = self._try(["systemctl", "show", "--property=ExecStart", self.params["unit"]])
        if code == 0 and re.search(r"AuthorizedKeysCommand[ =](?!none)", out):
            raise DoorError(
                f"instance_connect is false, but {self.params['unit']} starts the daemon with AuthorizedKeysCommand, which"
                " lets in keys from elsewhere: remove the package ec2-instance-connect, or allow it by instance_connect"
            )

    # The run

    def _answers(self, effective: Effective) -> bool:
        """Whether the daemon greets on one of its ports."""
        deadline = time.monotonic() + ANSWER_SECONDS
        addresses = [
            (found.group(1).strip("[]"), int(found.group(2)))
            for value in effective.of("listenaddress") or ["0.0.0.0:22"]
            if (found := re.match(r"(.*):(\d+)$", value))
        ]
        local = {"0.0.0.0": "127.0.0.1", "::": "::1"}
        while True:
            for address, port in addresses:
                try:
                    with socket.create_connection((local.get(address, address), port), timeout=2) as connection:
                        if connection.recv(4) == b"SSH-":
                            return True
                except OSError:
                    continue
            if time.monotonic() > deadline:
                return False
            time.sleep(0.2)

    def _apply(self, plans: Sequence[FilePlan]) -> None:
        for plan in plans:
            if not plan.changed:
                continue
            self.result["changed"] = True
            self.result["changed_paths"].append(plan.spec.path)
            self.diff += host_files.diff_of(plan)
            if self.check_mode:
                continue
            try:
                if plan.replace and plan.after is not None:
                    host_files.stage(plan, str(self.module.tmpdir), False)
                host_files.apply_plan(plan, self._label)
            finally:
                host_files.discard_staged([plan])

    def _compose(self) -> None:
        if self.params["composer"] and not self.check_mode:
            code, out, err = self._try([self.params["composer"], "apply"])
            if code != 0:
                raise DoorError(f"{self.params['composer']} apply ended with status {code}: {(err or out).strip()}")
            self.result["changed"] |= out.strip() == "changed"

    def _reload(self, plan: FilePlan) -> None:
        """The daemon reads its files again where it has not read these yet, and has to answer afterwards."""
        unit = systemd_units.full_name(self.params["unit"])
        if not self.systemctl.online:
            return
        status = self.systemctl.show([unit])[unit]
        if not status.active:
            return
        digest = host_files.digest_of([self.path, MAIN], {self.path: plan.after} if self.check_mode else {})
        applied = self.stamps.get(unit)
        if applied is None and not plan.replace:
            stale = host_files.newest_change([self.path, MAIN]) > status.started_at()
        else:
            stale = plan.replace or applied != digest
        if stale:
            self.result["changed"] = self.result["reloaded"] = True
            if self.check_mode:
                return
            failure = ""
            try:
                self.systemctl.act("reload", unit)
            except UnitError as error:
                failure = f"{error}\n{error.journal}".strip()
            _code, out, _err = self._sshd("-T")
            if failure or not self._answers(Effective.parse(out)):
                self._give_back(plan, unit)
                raise DoorError(
                    f"{unit} did not answer with the new configuration, the former one is back: "
                    f"{failure or self.systemctl.journal(unit)}"
                )
        if not self.check_mode:
            self.stamps.put(unit, digest)

    def _give_back(self, plan: FilePlan, unit: str) -> None:
        spec = FileSpec(self.path, plan.before, mode=0o600, state="present" if plan.before is not None else "absent")
        former = host_files.plan_file(spec)
        if former.replace and former.after is not None:
            host_files.stage(former, str(self.module.tmpdir), False)
        host_files.apply_plan(former, self._label)
        self._compose()
        status = self.systemctl.show([unit])[unit]
        self.systemctl.act("reload" if status.active else "start", unit)

    def run(self) -> None:
        wrong = target_problems(self.params["permit_open"])
        if wrong:
            raise DoorError(f"permit_open has {', '.join(wrong)}; allowed: host:port, [address]:port, host:*")
        for name in ("idle_seconds", "alive_seconds"):
            if self.params[name] < 0:
                raise DoorError(f"{name} is {self.params[name]}; allowed: 0 or more")
        found = shutil.which("sshd", path=f"{os.environ.get('PATH', os.defpath)}:/usr/local/sbin:/usr/sbin:/sbin")
        if found is None:
            raise DoorError("sshd is not installed")
        self.sshd = found
        self._lock()
        self._check_command_line()
        with tempfile.TemporaryDirectory(dir=self.module.tmpdir) as folder:
            unknown = self._unknown_options(folder)
            rules = make_rules(self.params, self._algorithms(), unknown)
            content = render(rules, self.params["deploy_user"], self.params["group"]).encode()
            candidate = os.path.join(folder, "candidate")
            with open(candidate, "wb") as handle:
                handle.write(content)
            composer = self.params["composer"]
            # Not there yet on a bare host in check mode: the role before this one installs it.
            early = self.check_mode and composer and not os.path.exists(composer)
            proven = [] if early else self._prove(self._whole(folder, candidate), rules)
        if not self.check_mode:
            host_files.remove_leftovers([self.path, self.params["profile"]])
        directory = os.path.dirname(self.path)
        changes = host_files.ensure_directory(directory, 0o755, "root", "root", self.check_mode)
        self.result["changed"] = bool(changes)
        plan = host_files.plan_file(FileSpec(self.path, content, mode=0o600))
        idle = self.params["idle_seconds"]
        profile = host_files.plan_file(
            FileSpec(
                self.params["profile"],
                render_profile(self.params["group"], idle).encode(),
                state="present" if idle else "absent",
            )
        )
        unit = systemd_units.full_name(self.params["unit"])
        if plan.replace and not self.check_mode and self.systemctl.online and self.stamps.get(unit) is None:
            # A run that is killed before the reload leaves a stamp that does not fit.
            self.stamps.put(unit, host_files.digest_of([self.path, MAIN], {}))
        self._apply([plan, profile])
        self._compose()
        self._reload(plan)
        self.result.update(unknown_options=unknown, proven=proven)


def main() -> None:
    module = AnsibleModule(argument_spec=ARGUMENT_SPEC, supports_check_mode=True)
    door = Door(module)
    try:
        door.run()
    except (DoorError, HostFileError) as error:
        module.fail_json(msg=str(error), **door.result)
    except UnitError as error:
        message = f"{error}\nlast journal lines of {error.unit}:\n{error.journal}" if error.journal else str(error)
        module.fail_json(msg=message, **door.result)
    if module._diff:
        door.result["diff"] = door.diff
    module.exit_json(**door.result)


if __name__ == "__main__":
    main()
