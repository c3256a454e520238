#!/usr/bin/python
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Files and systemd units of one concern, in one remote execution."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: host_config
short_description: Files and systemd units of one concern in one remote execution
version_added: "0.1.0"
author:
  - nemo platform maintainers (@nemo-platform)
description:
  - Brings directories, files, one-off commands and systemd units of one concern to their wanted state in a single
    remote execution, in this order - directories; staging and validation of every file; units that shall be stopped or
    disabled; replacement of the files; C(systemctl daemon-reload) where a unit file changed; commands; enabling,
    starting, restarting and reloading of units.
  - Every file is validated before the first one is replaced. A file is replaced atomically (written beside its
    target with its final owner, mode and SELinux context, flushed to disk, renamed).
  - Interrupted runs are finished by the next one. What was last applied is kept as hashes under
    C(/run/nemo/host_config) (units) and C(/var/lib/nemo/host_config) (commands). A unit without such a stamp counts as
    stale when one of its files is newer than the unit's start. No handler is needed, and a run that was killed between
    writing a file and restarting its unit loses nothing.
  - A unit whose C(Condition*=) does not hold (for example a time service in a container) is neither an error nor a
    change. It is listed in RV(conditions_unmet).
  - Where systemd is not the running init (image build) units are enabled and disabled by their links alone, and
    their states are left out and listed in RV(skipped_units).
  - The module's arguments are not written to the host's system log, as file contents may hold secrets.
options:
  directories:
    description: Directories that shall exist. Missing parents are created with mode V(0755).
    type: list
    elements: dict
    default: []
    suboptions:
      path:
        description: Absolute path.
        type: path
        required: true
      mode:
        description: Quoted octal mode with its leading zero.
        type: str
        default: '0755'
      owner:
        description: User name or number.
        type: str
        default: root
      group:
        description: Group name or number.
        type: str
        default: root
  files:
    description:
      - Files that shall exist with this content, or shall not exist.
      - A symbolic link at O(files[].path) is replaced by a regular file.
    type: list
    elements: dict
    default: []
    suboptions:
      path:
        description: Absolute path. Its directory must exist or be listed in O(directories).
        type: path
        required: true
      content:
        description:
          - The whole content as text. No newline is added.
          - Exactly one of O(files[].content) and O(files[].content_json) is needed for O(files[].state=present).
        type: str
      content_json:
        description:
          - The content as an object, written as indented JSON.
          - A file that holds the same data in another layout is left as it is.
        type: dict
      merge:
        description:
          - Merge O(files[].content_json) into the existing JSON object, so that foreign keys stay.
          - Objects are merged at every depth, a null removes its key, lists and other values replace (RFC 7396).
          - A file that is not valid JSON, or holds no object, is an error and left as it is.
        type: bool
        default: false
      state:
        description: Whether the file shall exist.
        type: str
        choices: [present, absent]
        default: present
      mode:
        description: Quoted octal mode with its leading zero.
        type: str
        default: '0644'
      owner:
        description: User name or number.
        type: str
        default: root
      group:
        description: Group name or number.
        type: str
        default: root
      validate:
        description:
          - Command that must succeed on the staged file before anything is replaced. C(%s) stands for its path, which
            lies in the target's directory and ends in the target's name.
          - Run without a shell. In check mode a command that is not installed yet is left out.
        type: str
      secret:
        description:
          - Show neither the content in a diff nor in the returned invocation. The diff says only that it differs.
          - Set it for a merged file whose foreign keys may be secret, too.
        type: bool
        default: false
  commands:
    description:
      - Commands that apply files, for example C(sysctl --system).
      - A command runs when one of its files changed, or when it is not known to have run successfully for their
        present content.
    type: list
    elements: dict
    default: []
    suboptions:
      argv:
        description: The command and its arguments, run without a shell.
        type: list
        elements: str
        required: true
      files:
        description: Absolute paths of the files that the command applies.
        type: list
        elements: path
        required: true
  units:
    description: systemd units, handled in this order.
    type: list
    elements: dict
    default: []
    suboptions:
      name:
        description: Unit name. V(.service) is added where it has no suffix.
        type: str
        required: true
      enabled:
        description: Whether the unit starts at boot. Left as it is when omitted.
        type: bool
      state:
        description: Whether the unit runs now. Left as it is when omitted.
        type: str
        choices: [started, stopped]
      on_change:
        description: What a running unit needs when one of O(units[].files) changed or is not applied yet.
        type: str
        choices: [restart, reload, none]
        default: restart
      files:
        description: Absolute paths of the files that matter to the unit, whether this task manages them or not.
        type: list
        elements: path
        default: []
attributes:
  check_mode:
    support: full
    description: Predicts every change. Validation runs on staged copies, which are removed again.
  diff_mode:
    support: full
    description: One entry per changed file, attribute set and unit.
notes:
  - Needs root for everything that the defaults describe.
  - One execution at a time per host. A second one waits for up to 120 seconds.
  - A oneshot unit without C(RemainAfterExit=yes) is never active after it ran, so O(units[].state=started) would
    run it each time. Start such units by a timer, or use O(commands).
"""

EXAMPLES = r"""
- name: The Docker Engine runs with this configuration
  nemo.platform.host_config:
    directories:
      - path: /etc/docker
    files:
      - path: /etc/docker/daemon.json
        content_json:
          log-driver: json-file
          log-opts: {max-size: 10m, max-file: "3"}
        validate: dockerd --validate --config-file=%s
    units:
      - name: docker
        enabled: true
        state: started
        files: [/etc/docker/daemon.json]

- name: Kernel limits are written and applied
  nemo.platform.host_config:
    files:
      - path: /etc/sysctl.d/60-nemo.conf
        content: |
          vm.max_map_count = 262144
    commands:
      - argv: [sysctl, --system]
        files: [/etc/sysctl.d/60-nemo.conf]

- name: Docker's client uses a credential helper, other keys stay
  nemo.platform.host_config:
    directories:
      - path: /root/.docker
        mode: '0700'
    files:
      - path: /root/.docker/config.json
        content_json:
          credHelpers:
            111122223333.dkr.ecr.eu-central-1.amazonaws.com: ecr-login
        merge: true
        mode: '0600'
        secret: true

- name: An old unit is gone
  nemo.platform.host_config:
    files:
      - path: /etc/systemd/system/old.service
        state: absent
    units:
      - name: old
        enabled: false
        state: stopped
"""

RETURN = r"""
changed_paths:
  description: Files and directories that were created, replaced, removed or given other attributes.
  returned: always
  type: list
  elements: str
  sample: [/etc/docker/daemon.json]
restarted:
  description: Units that were restarted because their files changed or were not applied yet.
  returned: always
  type: list
  elements: str
  sample: [docker.service]
reloaded:
  description: Units that were reloaded for the same reason.
  returned: always
  type: list
  elements: str
started:
  description: Units that were not running and were started.
  returned: always
  type: list
  elements: str
stopped:
  description: Units that were running and were stopped.
  returned: always
  type: list
  elements: str
enabled:
  description: Units that were enabled.
  returned: always
  type: list
  elements: str
disabled:
  description: Units that were disabled.
  returned: always
  type: list
  elements: str
commands_run:
  description: Commands that ran, as shell words.
  returned: always
  type: list
  elements: str
  sample: [sysctl --system]
conditions_unmet:
  description: Units that systemd did not start because a C(Condition*=) of theirs does not hold on this host.
  returned: always
  type: list
  elements: str
skipped_units:
  description: Units whose state was not looked at because systemd is not the running init.
  returned: always
  type: list
  elements: str
path:
  description: The file that could not be brought to its state.
  returned: on failure, when a file is the cause
  type: str
unit:
  description: The unit that could not be brought to its state.
  returned: on failure, when a unit is the cause
  type: str
journal:
  description: The last journal lines of that unit.
  returned: on failure, when a unit is the cause
  type: str
"""

import contextlib
import copy
import fcntl
import hashlib
import os
import shlex
import shutil
import time
from collections.abc import Sequence
from typing import IO, Any

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.nemo.platform.plugins.module_utils import host_files, systemd_units
from ansible_collections.nemo.platform.plugins.module_utils.host_files import FilePlan, FileSpec, HostFileError
from ansible_collections.nemo.platform.plugins.module_utils.systemd_units import Systemctl, UnitError, UnitStatus

RUN_DIRECTORY = "/run/nemo/host_config"
STATE_DIRECTORY = "/var/lib/nemo/host_config"
LOCK_TIMEOUT_SECONDS = 120
# systemd reads these itself; journald.conf and its like below /etc/systemd belong to services and need no reload.
UNIT_FILE_PATHS = (
    "/etc/systemd/system/",
    "/run/systemd/system/",
    "/usr/lib/systemd/system/",
    "/lib/systemd/system/",
    "/usr/local/lib/systemd/system/",
    "/etc/systemd/system.conf",
)
HIDDEN_CONTENT = "VALUE_SPECIFIED_IN_NO_LOG_PARAMETER"
# Shorter secrets cannot be cut out of results without tearing other words apart; they are never put there either.
SHORTEST_MASKED_SECRET = 8

OWNERSHIP: dict[str, Any] = {
    "owner": {"type": "str", "default": "root"},
    "group": {"type": "str", "default": "root"},
}
ARGUMENT_SPEC: dict[str, Any] = {
    "directories": {
        "type": "list",
        "elements": "dict",
        "default": [],
        "options": {
            "path": {"type": "path", "required": True},
            "mode": {"type": "str", "default": "0755"},
            **OWNERSHIP,
        },
    },
    "files": {
        "type": "list",
        "elements": "dict",
        "default": [],
        "options": {
            "path": {"type": "path", "required": True},
            "content": {"type": "str"},
            "content_json": {"type": "dict"},
            "merge": {"type": "bool", "default": False},
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
            "mode": {"type": "str", "default": "0644"},
            **OWNERSHIP,
            "validate": {"type": "str"},
            "secret": {"type": "bool", "default": False, "no_log": False},
        },
        "mutually_exclusive": [("content", "content_json")],
    },
    "commands": {
        "type": "list",
        "elements": "dict",
        "default": [],
        "options": {
            "argv": {"type": "list", "elements": "str", "required": True},
            "files": {"type": "list", "elements": "path", "required": True},
        },
    },
    "units": {
        "type": "list",
        "elements": "dict",
        "default": [],
        "options": {
            "name": {"type": "str", "required": True},
            "enabled": {"type": "bool"},
            "state": {"type": "str", "choices": ["started", "stopped"]},
            "on_change": {"type": "str", "choices": ["restart", "reload", "none"], "default": "restart"},
            "files": {"type": "list", "elements": "path", "default": []},
        },
    },
}


class QuietModule(AnsibleModule):
    """AnsibleModule that does not copy its arguments, file contents among them, to the host's system log."""

    def _log_invocation(self) -> None:
        files = ", ".join(str(entry.get("path")) for entry in self.params.get("files") or [])
        self.log(f"Invoked for files: {files or 'none'}")


class HostConfig:
    """One run: everything that the task asks for, in the order that the documentation gives."""

    def __init__(self, module: AnsibleModule, online: bool, run_directory: str, state_directory: str) -> None:
        self.module = module
        self.check_mode = bool(module.check_mode)
        self.run_directory = run_directory
        self.systemctl = Systemctl(self._run, online)
        self.has_systemctl = shutil.which("systemctl") is not None
        self.unit_stamps = host_files.Stamps(run_directory)
        self.command_stamps = host_files.Stamps(state_directory)
        self.reload_marker = os.path.join(run_directory, "daemon-reload")
        self.diff: list[dict[str, str]] = []
        self.result: dict[str, Any] = {
            "changed": False,
            **{
                name: []
                for name in (
                    "changed_paths",
                    "restarted",
                    "reloaded",
                    "started",
                    "stopped",
                    "enabled",
                    "disabled",
                    "commands_run",
                    "conditions_unmet",
                    "skipped_units",
                )
            },
        }
        self.statuses: dict[str, UnitStatus] = {}
        self.overlay: dict[str, bytes | None] = {}
        self._lock: IO[str] | None = None

    # Tools

    def _run(self, argv: Sequence[str]) -> tuple[int, str, str]:
        environment = {"LC_ALL": "C.UTF-8", "SYSTEMD_COLORS": "0", "SYSTEMD_PAGER": ""}
        if not self.systemctl.online:
            environment["SYSTEMD_OFFLINE"] = "1"
        code, out, err = self.module.run_command(list(argv), environ_update=environment, handle_exceptions=False)
        return int(code), str(out), str(err)

    def _note(self, kind: str, name: str) -> None:
        self.result[kind].append(name)
        if kind not in ("conditions_unmet", "skipped_units"):
            self.result["changed"] = True

    def _note_unit(self, kind: str, unit: str, before: str, after: str) -> None:
        self._note(kind, unit)
        header = f"{unit} (unit)"
        self.diff.append(
            {"before": f"{before}\n", "after": f"{after}\n", "before_header": header, "after_header": header}
        )

    def _label(self, staged: str, target: str) -> None:
        if self.module.selinux_enabled():
            exists = os.path.lexists(target)
            context = self.module.selinux_context(target) if exists else self.module.selinux_default_context(target)
            self.module.set_context_if_different(staged, context, False)

    def _take_lock(self) -> None:
        path = os.path.join(self.run_directory, "lock")
        if self.check_mode and not os.path.exists(path):
            return
        try:
            os.makedirs(self.run_directory, mode=0o700, exist_ok=True)
            self._lock = open(path, "a", encoding="utf-8")  # noqa: SIM115 - held until the process ends
        except OSError as error:
            raise HostFileError(f"{path}: cannot be opened: {error.strerror}", path) from error
        deadline = time.monotonic() + LOCK_TIMEOUT_SECONDS
        while True:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except OSError:
                if time.monotonic() > deadline:
                    message = f"{path}: another host_config has run on this host for {LOCK_TIMEOUT_SECONDS} s"
                    raise HostFileError(message, path) from None
                time.sleep(0.2)

    # Files

    def _specs(self) -> list[FileSpec]:
        specs, seen = [], set()
        for entry in self.module.params["files"]:
            path = os.path.normpath(entry["path"])
            if not os.path.isabs(path):
                raise HostFileError(f"{path}: path must be absolute", path)
            if path in seen:
                raise HostFileError(f"{path}: listed twice in 'files'", path)
            seen.add(path)
            given = entry["content"] is not None or entry["content_json"] is not None
            if entry["state"] == "present" and not given:
                raise HostFileError(f"{path}: one of content and content_json is required", path)
            if entry["merge"] and entry["content_json"] is None:
                raise HostFileError(f"{path}: merge needs content_json", path)
            if entry["validate"] and "%s" not in entry["validate"]:
                raise HostFileError(f"{path}: validate must contain %s: {entry['validate']}", path)
            specs.append(
                FileSpec(
                    path=path,
                    content=None if entry["content"] is None else entry["content"].encode(),
                    content_json=entry["content_json"],
                    merge=entry["merge"],
                    state=entry["state"],
                    mode=host_files.parse_mode(entry["mode"], path),
                    owner=entry["owner"],
                    group=entry["group"],
                    validate=entry["validate"],
                    secret=entry["secret"],
                )
            )
        return specs

    def _directories(self) -> None:
        for entry in self.module.params["directories"]:
            path = os.path.normpath(entry["path"])
            if not os.path.isabs(path):
                raise HostFileError(f"{path}: path must be absolute", path)
            mode = host_files.parse_mode(entry["mode"], path)
            changes = host_files.ensure_directory(path, mode, entry["owner"], entry["group"], self.check_mode)
            if changes:
                self._note("changed_paths", path)
                self.diff.append(host_files.attribute_diff(path, changes))

    def _validate(self, plan: FilePlan) -> None:
        if plan.spec.validate is None or plan.staged is None:
            return
        argv = [word.replace("%s", plan.staged) for word in shlex.split(plan.spec.validate)]
        path = plan.spec.path
        # sbin is not on every user's PATH; run_command adds it, so look there as well.
        search = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin", "/sbin"])
        program = shutil.which(argv[0], path=search)
        if program is None:
            if self.check_mode:
                return
            raise HostFileError(f"{path}: validate command '{argv[0]}' is not installed; nothing was replaced", path)
        code, out, err = self._run([program, *argv[1:]])
        if code != 0:
            said = (err.strip() or out.strip()).replace(plan.staged, path)
            if plan.spec.secret:
                said = "(output not shown, the file is secret)"
            command = plan.spec.validate.replace("%s", path)
            message = f"{path}: not valid, nothing was replaced; '{command}' ended with status {code}: {said}"
            raise HostFileError(message, path)

    def _prepare(self, plans: list[FilePlan]) -> None:
        """Stage what will be replaced, and validate all of it before anything moves."""
        if not self.check_mode:
            host_files.remove_leftovers(plan.spec.path for plan in plans)
        for plan in plans:
            if plan.replace and plan.after is not None and (not self.check_mode or plan.spec.validate):
                host_files.stage(plan, str(self.module.tmpdir), self.check_mode)
        for plan in plans:
            self._validate(plan)

    def _replace(self, plans: list[FilePlan]) -> None:
        for plan in plans:
            if plan.changed:
                if not self.check_mode:
                    host_files.apply_plan(plan, self._label)
                self._note("changed_paths", plan.spec.path)
                self.diff.extend(host_files.diff_of(plan))

    # Commands

    def _commands(self, replaced: Sequence[str]) -> None:
        for entry in self.module.params["commands"]:
            argv, files = entry["argv"], [os.path.normpath(path) for path in entry["files"]]
            if not argv:
                raise HostFileError("commands: argv must not be empty", "")
            shown = shlex.join(argv)
            name = "command-" + hashlib.sha256(shown.encode()).hexdigest()[:16]
            digest = host_files.digest_of(files, self.overlay)
            applied = self.command_stamps.get(name)
            changed = any(path in replaced for path in files)
            if applied is None and not changed and all(host_files.read_regular(path) is None for path in files):
                continue
            if applied == digest and not changed:
                continue
            if not self.check_mode:
                try:
                    code, out, err = self._run(argv)
                except OSError as error:
                    raise HostFileError(f"command '{shown}' cannot be run: {error.strerror}", argv[0]) from error
                if code != 0:
                    said = err.strip() or out.strip()
                    raise HostFileError(f"command '{shown}' ended with status {code}: {said}", files[0])
                self.command_stamps.put(name, digest)
            self._note("commands_run", shown)

    # Units

    def _units(self) -> list[dict[str, Any]]:
        units, seen = [], set()
        for entry in self.module.params["units"]:
            name = systemd_units.full_name(entry["name"])
            if name in seen:
                raise UnitError(f"{name}: listed twice in 'units'", name)
            seen.add(name)
            files = [os.path.normpath(path) for path in entry["files"]]
            units.append({**entry, "name": name, "files": files})
        return units

    def _look(self, units: list[dict[str, Any]]) -> None:
        names = [unit["name"] for unit in units]
        if self.systemctl.online and self.has_systemctl:
            self.statuses = self.systemctl.show(names)
        else:
            self.statuses = {name: UnitStatus(name, {}) for name in names}

    @property
    def _offline(self) -> bool:
        return not (self.systemctl.online and self.has_systemctl)

    def _set_enabled(self, unit: dict[str, Any], wanted: bool, planned: bool) -> None:
        name, status = unit["name"], self.statuses[unit["name"]]
        if not self.has_systemctl:
            return
        if status.masked and wanted:
            raise UnitError(f"{name} is masked; unmask it first: systemctl unmask {name}", name)
        enabled = not planned and self.systemctl.is_enabled(status)
        # Static, generated and alias units have no links of their own to remove.
        if not wanted and status.enabled_state in ("static", "alias", "indirect", "generated", "masked"):
            return
        if enabled == wanted:
            return
        if not self.check_mode:
            self.systemctl.set_enabled(name, wanted)
        self._note_unit(
            "enabled" if wanted else "disabled",
            name,
            f"enabled: {str(enabled).lower()}",
            f"enabled: {str(wanted).lower()}",
        )

    def _bring_down(self, units: list[dict[str, Any]]) -> None:
        """Stop and disable before files go, because systemctl needs the unit file for both."""
        for unit in units:
            name, status = unit["name"], self.statuses[unit["name"]]
            if unit["state"] == "stopped" and not self._offline:
                if status.active or status.coming_up:
                    if not self.check_mode:
                        self.systemctl.act("stop", name)
                    self._note_unit("stopped", name, f"state: {status.active_state}", "state: inactive")
                if not self.check_mode:
                    self.unit_stamps.remove(name)
            if unit["enabled"] is False and not (status.missing and not self._offline):
                self._set_enabled(unit, False, planned=False)

    def _baseline(self, units: list[dict[str, Any]], replaced: Sequence[str]) -> None:
        """Remember, before files change, what a unit without a stamp was started with.

        A run that is killed between here and the restart leaves a stamp that no longer fits its files.
        """
        for unit in units:
            name = unit["name"]
            touched = any(path in replaced for path in unit["files"])
            if touched and self._follows(unit) and self.statuses[name].active and self.unit_stamps.get(name) is None:
                self.unit_stamps.put(name, host_files.digest_of(unit["files"], {}))

    @staticmethod
    def _follows(unit: dict[str, Any]) -> bool:
        return bool(unit["files"]) and unit["on_change"] != "none" and unit["state"] != "stopped"

    def _is_stale(self, unit: dict[str, Any], digest: str, replaced: Sequence[str]) -> bool:
        if any(path in replaced for path in unit["files"]):
            return True
        applied = self.unit_stamps.get(unit["name"])
        if applied is not None:
            return applied != digest
        return host_files.newest_change(unit["files"]) > self.statuses[unit["name"]].started_at()

    def _daemon_reload(self, replaced: Sequence[str]) -> None:
        if self._offline or self.check_mode:
            return
        unit_file = any(path.startswith(UNIT_FILE_PATHS) for path in replaced)
        pending = os.path.exists(self.reload_marker)
        if unit_file or pending or any(status.needs_daemon_reload for status in self.statuses.values()):
            self.systemctl.daemon_reload()
            if pending or unit_file:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self.reload_marker)
            self.statuses = self.systemctl.show(list(self.statuses))

    def _bring_up(self, units: list[dict[str, Any]], replaced: Sequence[str]) -> None:
        for unit in units:
            name, status = unit["name"], self.statuses[unit["name"]]
            if self._offline:
                if unit["enabled"] is True:
                    self._set_enabled(unit, True, planned=False)
                if unit["state"] is not None or self._follows(unit):
                    self._note("skipped_units", name)
                continue
            wants_up = unit["enabled"] is True or unit["state"] == "started"
            if status.missing and not self.check_mode:
                if wants_up:
                    raise UnitError(f"{name} does not exist on this host; is its package installed?", name)
                continue
            if unit["enabled"] is True:
                self._set_enabled(unit, True, planned=status.missing)
            if status.masked and unit["state"] == "started":
                raise UnitError(f"{name} is masked; unmask it first: systemctl unmask {name}", name)
            self._run_unit(unit, status, replaced)

    def _run_unit(self, unit: dict[str, Any], status: UnitStatus, replaced: Sequence[str]) -> None:
        """Start, restart or reload one unit where it needs that, and stamp what it now runs with."""
        name = unit["name"]
        follows = self._follows(unit)
        digest = host_files.digest_of(unit["files"], self.overlay) if follows else ""
        if status.active:
            if not follows:
                return
            if self._is_stale(unit, digest, replaced):
                verb = unit["on_change"]
                if not self.check_mode:
                    status = self.systemctl.act(verb, name)
                if verb == "restart" and status.condition_unmet:
                    self._note("conditions_unmet", name)
                    return
                kind = "restarted" if verb == "restart" else "reloaded"
                self._note_unit(kind, name, "configuration: not applied", f"configuration: applied ({verb})")
            elif self.unit_stamps.get(name) == digest:
                return
        elif unit["state"] == "started":
            before = "missing" if status.missing else status.active_state
            if self.check_mode:
                if status.condition_unmet:
                    self._note("conditions_unmet", name)
                    return
            else:
                status = self.systemctl.act("start", name)
                if status.condition_unmet:
                    self._note("conditions_unmet", name)
                    return
            self._note_unit("started", name, f"state: {before}", "state: active")
        else:
            return
        if follows and not self.check_mode:
            self.unit_stamps.put(name, digest)

    # The run

    def run(self) -> None:
        specs, units = self._specs(), self._units()
        self._take_lock()
        try:
            self._run_locked(specs, units)
        finally:
            if self._lock is not None:
                self._lock.close()

    def _run_locked(self, specs: list[FileSpec], units: list[dict[str, Any]]) -> None:
        plans: list[FilePlan] = [host_files.plan_file(spec) for spec in specs]
        replaced = [plan.spec.path for plan in plans if plan.replace]
        self.overlay = {plan.spec.path: plan.after for plan in plans}
        try:
            if units:
                self._look(units)
            self._directories()
            self._prepare(plans)
            self._bring_down(units)
            if not self.check_mode and not self._offline:
                self._baseline(units, replaced)
                if any(path.startswith(UNIT_FILE_PATHS) for path in replaced):
                    with open(self.reload_marker, "w", encoding="utf-8"):
                        pass
            self._replace(plans)
        finally:
            host_files.discard_staged(plans)
        self._daemon_reload(replaced)
        self._commands(replaced)
        self._bring_up(units, replaced)


def secret_texts(value: Any) -> list[str]:
    """Every text inside a secret content that is long enough to be masked."""
    if isinstance(value, dict):
        return [text for item in value.values() for text in secret_texts(item)]
    if isinstance(value, list):
        return [text for item in value for text in secret_texts(item)]
    return [value] if isinstance(value, str) and len(value) >= SHORTEST_MASKED_SECRET else []


def hide_secrets(module: AnsibleModule) -> dict[str, Any]:
    """Mask secret contents in everything that is returned, and give the arguments without them."""
    arguments: dict[str, Any] = copy.deepcopy(module.params)
    for entry in arguments["files"]:
        if entry["secret"]:
            for name in ("content", "content_json"):
                if entry[name] is not None:
                    module.no_log_values.update(secret_texts(entry[name]))
                    entry[name] = HIDDEN_CONTENT
    return arguments


def main() -> None:
    module = QuietModule(argument_spec=ARGUMENT_SPEC, supports_check_mode=True)
    invocation = {"module_args": hide_secrets(module)}
    config = HostConfig(module, systemd_units.is_running(), RUN_DIRECTORY, STATE_DIRECTORY)
    try:
        config.run()
    except HostFileError as error:
        module.fail_json(msg=str(error), path=error.path, invocation=invocation, **config.result)
    except UnitError as error:
        message = f"{error}\nlast journal lines of {error.unit}:\n{error.journal}" if error.journal else str(error)
        module.fail_json(msg=message, unit=error.unit, journal=error.journal, invocation=invocation, **config.result)
    if module._diff:
        config.result["diff"] = config.diff
    module.exit_json(invocation=invocation, **config.result)


if __name__ == "__main__":
    main()
