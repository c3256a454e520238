#!/usr/bin/python
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Module: the project on a host as revisions, each with its Python environment, switched by one link."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: workspace
short_description: This project on a host as revisions with a pinned Python environment
version_added: 0.1.0
author: The nemo platform project (@nemo-platform)
description:
  - Brings the project of the controller to C(<path>/releases/<revision>), its Python environment from
    C(requirements/controller.txt) to C(<path>/environments/<hash>), and switches the link C(<path>/current) to it.
  - The revision is the commit of a clean checkout; with changes it is the commit and the hash of the content. Without git it
    is what the project's own file C(REVISION) says, as long as the content is still the same, and else the hash of the
    content. A workspace that looks at itself so finds its own revision.
  - What git ignores stays at home, and so do C(.lab), C(.venv), C(.env), passwords of vaults and private keys.
  - One remote execution where nothing is to be done. The archive is sent only when the host lacks the revision.
  - Everything is made beside its place and renamed, or marked complete last, so that an interrupted run is finished by the
    next one, and what worked goes on working until the one link is switched.
  - Revisions that a process uses are never removed.
options:
  path:
    description: Folder of the workspace. Its members are readable by O(group) and by nobody else.
    type: path
    default: /opt/nemo/workspace
  group:
    description: Group that may read the workspace. It must exist.
    type: str
    required: true
  source:
    description: Folder of the project on the controller. Default is the one that this module comes from.
    type: str
  revision:
    description: A revision that is on the host already, to go back to it. Excludes O(source).
    type: str
  python:
    description: Python that the environment is made with. A link is followed, so that it may move later.
    type: path
    required: true
  index_url:
    description: Package index. Empty means what pip is set up for on the host.
    type: str
    default: ""
  keep:
    description: How many revisions stay, the current one among them.
    type: int
    default: 3
  disk_free:
    description: MiB that must be free before an environment is made.
    type: int
    default: 1500
  lock_wait:
    description: Seconds to wait for another run that works on this workspace.
    type: int
    default: 600
  required_files:
    description: Files that must be there before anything is done, each with the sentence that is said otherwise.
    type: dict
    default: {}
  sent:
    description: Set by the action.
    type: bool
    default: false
  archive:
    description: Set by the action.
    type: path
attributes:
  check_mode:
    support: full
    description: Predicts the switch.
  diff_mode:
    support: full
    description: Revision and environment before and after.
notes:
  - Needs root on the host, and git on the controller where the project is a repository.
"""

EXAMPLES = r"""
- name: The workspace is the controller's revision
  nemo.platform.workspace:
    group: nemo-operators
    python: /opt/nemo/python/current/bin/python3

- name: The workspace goes back
  nemo.platform.workspace:
    group: nemo-operators
    python: /opt/nemo/python/current/bin/python3
    revision: 0d1f3a5b7c9e
"""

RETURN = r"""
revision:
  description: The current revision.
  returned: success
  type: str
  sample: 0d1f3a5b7c9e
previous:
  description: The revision before, when it was switched.
  returned: when it was switched
  type: str
environment:
  description: Folder of the Python environment.
  returned: when the revision is on the host
  type: str
removed:
  description: Revisions and environments that were removed.
  returned: success
  type: list
  elements: str
"""

import contextlib
import datetime
import fcntl
import grp
import hashlib
import json
import os
import re
import shutil
import stat
import tarfile
import time
import urllib.parse
from collections.abc import Iterator
from typing import Any

from ansible.module_utils.basic import AnsibleModule

REQUIREMENTS = "requirements/controller.txt"
RECORD = "REVISION"
COMPLETE = "complete"  # in an environment, written last
REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
MEBIBYTE = 1 << 20
ARGUMENTS: dict[str, Any] = {
    "path": {"type": "path", "default": "/opt/nemo/workspace"},
    "group": {"type": "str", "required": True},
    "source": {"type": "str"},
    "revision": {"type": "str"},
    "python": {"type": "path", "required": True},
    "index_url": {"type": "str", "default": ""},
    "keep": {"type": "int", "default": 3},
    "disk_free": {"type": "int", "default": 1500},
    "lock_wait": {"type": "int", "default": 600},
    "required_files": {"type": "dict", "default": {}},
    "sent": {"type": "bool", "default": False},
    "archive": {"type": "path"},
}


class WorkspaceError(Exception):
    """The workspace cannot be brought to its state; the text says why and what to do."""


def write_atomically(path: str, text: str, mode: int = 0o644) -> None:
    """A file that is there whole or not at all."""
    draft = f"{path}.new"
    with open(draft, "w", encoding="utf-8") as handle:
        handle.write(text)
        os.fchmod(handle.fileno(), mode)
        handle.flush()
        os.fsync(handle.fileno())
    os.rename(draft, path)


def link_atomically(path: str, target: str) -> None:
    """A link that leads to the old place or to the new one, never to none."""
    draft = f"{path}.new"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(draft)
    os.symlink(target, draft)
    os.rename(draft, path)
    descriptor = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as handle:
            data = json.load(handle)
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


class Workspace:
    """One run on one workspace."""

    def __init__(self, module: AnsibleModule) -> None:
        self.module = module
        self.path: str = module.params["path"]
        self.revision: str = module.params["revision"]
        self.releases = os.path.join(self.path, "releases")
        self.environments = os.path.join(self.path, "environments")
        self.current = os.path.join(self.path, "current")
        self.release = os.path.join(self.releases, self.revision)
        self.removed: list[str] = []

    # What is there

    def current_revision(self) -> str:
        try:
            return os.path.basename(os.readlink(self.current))
        except OSError:
            return ""

    def is_there(self) -> bool:
        return read_json(os.path.join(self.release, RECORD)).get("revision") == self.revision

    def environment_of(self, release: str) -> str:
        """The environment that a release needs with the Python of today."""
        python = os.path.realpath(self.module.params["python"])
        with open(os.path.join(release, REQUIREMENTS), "rb") as handle:
            digest = hashlib.sha256(handle.read() + b"\0" + os.fsencode(python)).hexdigest()
        return os.path.join(self.environments, digest[:16])

    def linked_environment(self, release: str) -> str:
        try:
            return os.path.join(self.environments, os.path.basename(os.readlink(os.path.join(release, "environment"))))
        except OSError:
            return ""

    @staticmethod
    def is_complete(environment: str) -> bool:
        return os.path.exists(os.path.join(environment, COMPLETE)) and os.path.exists(
            os.path.join(environment, "bin", "python3")
        )

    def group_id(self) -> int | None:
        try:
            return grp.getgrnam(self.module.params["group"]).gr_gid
        except KeyError:
            return None

    def shape_problems(self) -> list[str]:
        """Which attributes of the workspace's own folder differ."""
        try:
            found = os.stat(self.path)
        except FileNotFoundError:
            return ["absent"]
        wanted = (0, self.group_id(), 0o750) if os.geteuid() == 0 else (found.st_uid, found.st_gid, 0o750)
        return [] if (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == wanted else ["attributes"]

    # Making it

    def check(self) -> None:
        """What can be said before anything is changed."""
        parameters = self.module.params
        if not REVISION.fullmatch(self.revision):
            raise WorkspaceError(
                f"revision {self.revision!r} is none: allowed are letters, digits, dot, dash, underscore"
            )
        if parameters["keep"] < 1:
            raise WorkspaceError(f"keep is {parameters['keep']}; allowed is 1 or more")
        if self.group_id() is None and not self.module.check_mode:
            raise WorkspaceError(
                f"group {parameters['group']} does not exist on this host: the role operators makes it"
            )
        for path, sentence in parameters["required_files"].items():
            if not os.path.exists(path):
                raise WorkspaceError(str(sentence))
        if not os.path.exists(parameters["python"]) and not self.module.check_mode:
            raise WorkspaceError(
                f"{parameters['python']} does not exist: the role python_runtime makes it, with python_runtime_relocatable: true"
            )
        if not parameters["sent"] and not self.is_there():
            there = ", ".join(self.by_age()) or "none"
            raise WorkspaceError(f"revision {self.revision} is not on this host; there are: {there}")

    def make_folder(self) -> None:
        os.makedirs(self.path, exist_ok=True)
        if os.geteuid() == 0:
            os.chown(self.path, 0, self.group_id() or 0)
        os.chmod(self.path, 0o750)  # noqa: S103 - for the group
        for folder in (self.releases, self.environments):
            os.makedirs(folder, exist_ok=True)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """One run at a time; a second one waits, and says for whom."""
        path = os.path.join(self.path, ".lock")
        with open(path, "a+", encoding="utf-8") as handle:
            os.fchmod(handle.fileno(), 0o600)
            deadline = time.monotonic() + self.module.params["lock_wait"]
            while True:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except OSError:
                    if time.monotonic() > deadline:
                        handle.seek(0)
                        raise WorkspaceError(
                            f"another run works on {self.path}: {handle.read().strip() or 'unknown'}; waited "
                            f"{self.module.params['lock_wait']} s. A process that hangs is ended with kill"
                        ) from None
                    time.sleep(0.5)
            now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
            handle.truncate(0)
            handle.write(f"process {os.getpid()} of {os.environ.get('SUDO_USER') or 'root'}, since {now}")
            handle.flush()
            yield
            handle.truncate(0)

    def need_space(self, mebibytes: int, what: str) -> None:
        free = shutil.disk_usage(self.path).free // MEBIBYTE
        if free < mebibytes:
            raise WorkspaceError(
                f"{what} needs {mebibytes} MiB below {self.path}, and {free} MiB are free; nothing was changed"
            )

    def unpack(self) -> None:
        """The release beside its place, then in its place by one rename."""
        archive = self.module.params["archive"]
        self.need_space(3 * os.path.getsize(archive) // MEBIBYTE + 50, f"revision {self.revision}")
        draft = f"{self.release}.new"
        shutil.rmtree(draft, ignore_errors=True)
        os.mkdir(draft)
        with tarfile.open(archive) as tar:
            for member in tar:
                # Made by workspace_source.pack; looked at all the same, as root unpacks it.
                inside = os.path.normpath(member.name)
                if inside.startswith(("/", "..")) or not (member.isreg() or member.issym()):
                    raise WorkspaceError(f"the archive holds {member.name!r}, which is no file of a project")
                target = os.path.join(draft, inside)
                os.makedirs(os.path.dirname(target), exist_ok=True)
                if member.issym():
                    os.symlink(member.linkname, target)
                    continue
                content = tar.extractfile(member)
                assert content is not None
                with open(target, "xb") as handle:
                    shutil.copyfileobj(content, handle)
                os.chmod(target, 0o755 if member.mode & stat.S_IXUSR else 0o644)
        if read_json(os.path.join(draft, RECORD)).get("revision") != self.revision:
            raise WorkspaceError(f"the archive is not that of revision {self.revision}")
        os.sync()
        shutil.rmtree(self.release, ignore_errors=True)  # one without a record: nobody's
        os.rename(draft, self.release)

    def run(self, *command: str) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "PYTHON"))}
        if self.module.params["index_url"]:
            environment["PIP_CONFIG_FILE"] = os.devnull  # this index and no other
        environment |= {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_ROOT_USER_ACTION": "ignore", "PYTHONNOUSERSITE": "1"}
        code, out, err = self.module.run_command(
            list(command), environ_update={name: "" for name in os.environ if name not in environment} | environment
        )
        if code != 0:
            said = (err.strip() or out.strip()).splitlines()[-6:]
            raise WorkspaceError("\n".join([f"'{' '.join(command)}' ended with status {code}:", *said]))

    def make_environment(self, environment: str) -> None:
        """At its final place, because its programs name that; complete once the marker is there."""
        self.need_space(self.module.params["disk_free"], "the Python environment")
        shutil.rmtree(environment, ignore_errors=True)
        python, index = os.path.realpath(self.module.params["python"]), self.module.params["index_url"]
        self.run(python, "-I", "-m", "venv", environment)
        own = os.path.join(environment, "bin", "python3")
        options = ["--require-hashes", "--only-binary=:all:", "--no-compile", "--no-input", "--no-cache-dir", "--quiet"]
        if index:
            options.append(f"--index-url={index}")
            address = urllib.parse.urlsplit(index)
            if address.scheme == "http":
                options.append(f"--trusted-host={address.netloc.rpartition('@')[2]}")
        self.run(
            own, "-I", "-m", "pip", "install", *options, f"--requirement={os.path.join(self.release, REQUIREMENTS)}"
        )
        # Operators cannot write here, so each of their runs would compile anew. Ansible compiles collections by itself, always.
        self.run(
            own,
            "-I",
            "-m",
            "compileall",
            "-q",
            "-x",
            "/(ansible_collections|tests|pip)/",
            os.path.join(environment, "lib"),
        )
        os.sync()
        write_atomically(os.path.join(environment, COMPLETE), json.dumps({"python": python}) + "\n")

    # Pruning

    def by_age(self) -> list[str]:
        """The revisions, the one that was current last first."""
        try:
            names = [name for name in os.listdir(self.releases) if read_json(os.path.join(self.releases, name, RECORD))]
        except OSError:
            return []
        times = {
            name: os.stat(os.path.join(self.releases, name)).st_mtime_ns for name in names if not name.endswith(".new")
        }
        return sorted(times, key=lambda name: times[name], reverse=True)

    def in_use(self, name: str) -> bool:
        """Whether a run was started in a revision and has not ended: the launcher holds a shared lock on its record."""
        try:
            with open(os.path.join(self.releases, name, RECORD), "rb") as handle:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def prune(self) -> None:
        kept = {self.revision}
        for name in self.by_age():
            if name not in kept and (len(kept) < self.module.params["keep"] or self.in_use(name)):
                kept.add(name)
        environments = {self.linked_environment(os.path.join(self.releases, name)) for name in kept}
        for folder, wanted in (
            (self.releases, {os.path.join(self.releases, name) for name in kept}),
            (self.environments, environments),
        ):
            for name in sorted(os.listdir(folder)):
                path = os.path.join(folder, name)
                if path not in wanted:
                    shutil.rmtree(path)
                    if not name.endswith(".new"):
                        self.removed.append(os.path.relpath(path, self.path))

    # The run

    def state(self) -> str:
        environment = self.linked_environment(self.release) if self.is_there() else ""
        complete = bool(environment) and self.is_complete(environment)
        ready = (
            self.current_revision() == self.revision and complete and environment == self.environment_of(self.release)
        )
        return "ready" if ready and not self.shape_problems() else "archive" if not self.is_there() else "work"

    def result(self, **more: Any) -> dict[str, Any]:
        return {"revision": self.revision, "removed": self.removed, "archive_needed": False, **more}

    def converge(self) -> dict[str, Any]:
        self.check()
        state, before = self.state(), self.current_revision()
        if state == "ready":
            return self.result(changed=False, environment=self.linked_environment(self.release))
        used = os.path.basename(self.linked_environment(self.current)) if before else ""
        description = {
            "before": f"revision: {before or 'none'}\nenvironment: {used or 'none'}\n",
            "after": f"revision: {self.revision}\nenvironment: to be made\n",
        }
        changes: dict[str, Any] = {"changed": True, "diff": {"header": self.path, **description}}
        if self.module.check_mode or (state == "archive" and not self.module.params["archive"]):
            return self.result(**changes) | {"archive_needed": state == "archive"}
        os.umask(0o022)
        self.make_folder()
        with self.lock():
            if not self.is_there():
                self.unpack()
            environment = self.environment_of(self.release)
            if not self.is_complete(environment):
                self.make_environment(environment)
            if self.linked_environment(self.release) != environment:
                link_atomically(
                    os.path.join(self.release, "environment"), f"../../environments/{os.path.basename(environment)}"
                )
            if self.current_revision() != self.revision:
                os.utime(self.release)
                link_atomically(self.current, f"releases/{self.revision}")
                changes["previous"] = before
            self.prune()
        description["after"] = f"revision: {self.revision}\nenvironment: {os.path.basename(environment)}\n"
        changes["diff"] = {"header": self.path, **description}
        return self.result(environment=environment, **changes)


def main() -> None:
    module = AnsibleModule(argument_spec=ARGUMENTS, supports_check_mode=True, required_together=[])
    if not module.params["revision"]:
        module.fail_json(msg="revision is empty: the action of this module finds it on the controller")
    try:
        module.exit_json(**Workspace(module).converge())
    except WorkspaceError as error:
        module.fail_json(msg=str(error))
    except OSError as error:
        module.fail_json(msg=f"{error.filename or module.params['path']}: {error.strerror or error}")


if __name__ == "__main__":
    main()
