# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Files of a managed host: planned, staged, validated and replaced as one set.

Standard library only and Python 3.9 syntax, because this runs on managed hosts.
"""

from __future__ import annotations

import contextlib
import glob
import grp
import hashlib
import json
import os
import pwd
import stat
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Callable

STAGED_PREFIX = ".nemo-"
DIFF_LIMIT_BYTES = 100_000


class HostFileError(Exception):
    """A file or directory cannot be brought to its wanted state; the text names the path."""

    def __init__(self, message: str, path: str) -> None:
        super().__init__(message)
        self.path = path


@dataclass
class FileSpec:
    """One wanted file, or one path that must not exist."""

    path: str
    content: bytes | None = None
    content_json: dict[str, Any] | None = None
    merge: bool = False
    state: str = "present"
    mode: int = 0o644
    owner: str = "root"
    group: str = "root"
    validate: str | None = None
    secret: bool = False


@dataclass
class FilePlan:
    """What a FileSpec means on this host right now."""

    spec: FileSpec
    before: bytes | None
    after: bytes | None
    replace: bool
    attributes: list[str] = field(default_factory=list)
    staged: str | None = None

    @property
    def changed(self) -> bool:
        return self.replace or bool(self.attributes)


def parse_mode(value: str, path: str) -> int:
    """Turn '0644' into a number; anything that YAML may have mangled is refused."""
    if not (value.startswith("0") and 4 <= len(value) <= 5 and all(c in "01234567" for c in value)):
        raise HostFileError(f"{path}: mode '{value}' must be a quoted octal number such as '0644'", path)
    return int(value, 8)


def user_id(name: str) -> int | None:
    """The uid of a name or number, None where the user does not exist."""
    if name.isdigit():
        return int(name)
    try:
        return pwd.getpwnam(name).pw_uid
    except KeyError:
        return None


def group_id(name: str) -> int | None:
    """The gid of a name or number, None where the group does not exist."""
    if name.isdigit():
        return int(name)
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        return None


def require_ids(path: str, owner: str, group: str) -> tuple[int, int]:
    """The numbers of owner and group, or an error that names the one that is missing."""
    uid, gid = user_id(owner), group_id(group)
    if uid is None:
        raise HostFileError(f"{path}: user '{owner}' does not exist on this host", path)
    if gid is None:
        raise HostFileError(f"{path}: group '{group}' does not exist on this host", path)
    return uid, gid


def deep_merge(base: Mapping[str, Any], patch: Mapping[str, Any]) -> dict[str, Any]:
    """RFC 7396 merge patch: objects merge, null removes a key, everything else replaces."""
    merged = dict(base)
    for key, value in patch.items():
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, Mapping):
            current = merged.get(key)
            merged[key] = deep_merge(current if isinstance(current, Mapping) else {}, value)
        else:
            merged[key] = value
    return merged


def dump_json(data: Mapping[str, Any], sort_keys: bool) -> bytes:
    return (json.dumps(data, indent=2, sort_keys=sort_keys, ensure_ascii=False) + "\n").encode()


def same_json(left: Any, right: Any) -> bool:
    """Equal as JSON, where true is not 1."""
    return json.dumps(left, sort_keys=True) == json.dumps(right, sort_keys=True)


def load_json_object(raw: bytes, path: str) -> dict[str, Any]:
    try:
        data = json.loads(raw.decode("utf-8")) if raw.strip() else {}
    except ValueError as error:
        raise HostFileError(f"{path}: existing file is not valid JSON ({error}); repair or remove it", path) from error
    if not isinstance(data, dict):
        raise HostFileError(f"{path}: existing file holds a JSON {type(data).__name__}, not an object", path)
    return data


def read_regular(path: str) -> bytes | None:
    """Content of a file (through a link), None where there is none."""
    try:
        with open(path, "rb") as handle:
            return handle.read()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except IsADirectoryError as error:
        raise HostFileError(f"{path}: is a directory, expected a file", path) from error
    except OSError as error:
        raise HostFileError(f"{path}: cannot be read: {error.strerror}", path) from error


def wanted_content(spec: FileSpec, before: bytes | None) -> bytes | None:
    """The bytes that the file shall hold, None for an absent file."""
    if spec.state == "absent":
        return None
    if spec.content_json is None:
        return spec.content if spec.content is not None else b""
    if spec.merge:
        current = load_json_object(before or b"", spec.path)
        merged = deep_merge(current, spec.content_json)
        # Same data in another layout is left alone: the file may be somebody else's too.
        unchanged = before is not None and before.strip() and same_json(merged, current)
        return before if unchanged else dump_json(merged, False)
    if before is not None:
        try:
            if same_json(json.loads(before.decode("utf-8")), spec.content_json):
                return before
        except ValueError:
            pass
    return dump_json(spec.content_json, True)


def attribute_changes(path: str, mode: int, owner: str, group: str) -> list[str]:
    """Which of mode, owner, group differ; an account that does not exist yet counts as differing."""
    try:
        current = os.stat(path)
    except OSError:
        return []
    changes = []
    if stat.S_IMODE(current.st_mode) != mode:
        changes.append(f"mode: {stat.S_IMODE(current.st_mode):04o} -> {mode:04o}")
    if current.st_uid != user_id(owner):
        changes.append(f"owner: {current.st_uid} -> {owner}")
    if current.st_gid != group_id(group):
        changes.append(f"group: {current.st_gid} -> {group}")
    return changes


def plan_file(spec: FileSpec) -> FilePlan:
    """Compare one wanted file with the host; reads only."""
    before = read_regular(spec.path)
    is_link = os.path.islink(spec.path)
    after = wanted_content(spec, before)
    if spec.state == "absent":
        return FilePlan(spec, before, None, replace=before is not None or is_link)
    plan = FilePlan(spec, before, after, replace=is_link or before != after)
    if before is not None and not is_link:
        plan.attributes = attribute_changes(spec.path, spec.mode, spec.owner, spec.group)
    return plan


def stage(plan: FilePlan, fallback_directory: str, check_mode: bool) -> None:
    """Write the new content beside its target, complete and on disk, under a hidden name.

    The name keeps the target's own ending, so that validators which look at it work. Configuration folders
    (sysctl.d, sudoers.d, sources.list.d, systemd drop-ins) ignore names that start with a dot.
    """
    spec = plan.spec
    parent, base = os.path.split(spec.path)
    if not os.path.isdir(parent):
        if not check_mode:
            raise HostFileError(
                f"{spec.path}: directory {parent} does not exist; list it under 'directories'", spec.path
            )
        parent = fallback_directory
    try:
        descriptor, plan.staged = tempfile.mkstemp(prefix=STAGED_PREFIX, suffix=f"-{base}", dir=parent)
        with os.fdopen(descriptor, "wb") as handle:
            handle.write(plan.after or b"")
            if not check_mode:
                uid, gid = require_ids(spec.path, spec.owner, spec.group)
                os.fchown(handle.fileno(), uid, gid)
                os.fchmod(handle.fileno(), spec.mode)
            handle.flush()
            os.fsync(handle.fileno())
    except OSError as error:
        raise HostFileError(f"{spec.path}: cannot write to {parent}: {error.strerror}", spec.path) from error


def fsync_directory(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def apply_plan(plan: FilePlan, label: Callable[[str, str], None]) -> None:
    """Make the host match; `label(staged, target)` gives the staged file the target's SELinux context."""
    spec = plan.spec
    try:
        if plan.replace and spec.state == "absent":
            os.unlink(spec.path)
            fsync_directory(os.path.dirname(spec.path))
        elif plan.replace and plan.staged is not None:
            label(plan.staged, spec.path)
            os.rename(plan.staged, spec.path)
            plan.staged = None
            fsync_directory(os.path.dirname(spec.path))
        elif plan.attributes:
            uid, gid = require_ids(spec.path, spec.owner, spec.group)
            os.chown(spec.path, uid, gid)
            os.chmod(spec.path, spec.mode)
    except OSError as error:
        raise HostFileError(f"{spec.path}: cannot be replaced: {error.strerror}", spec.path) from error


def discard_staged(plans: Iterable[FilePlan]) -> None:
    for plan in plans:
        if plan.staged is not None:
            with contextlib.suppress(OSError):
                os.unlink(plan.staged)
            plan.staged = None


def remove_leftovers(paths: Iterable[str]) -> None:
    """Staged files of a run that was killed; the caller holds the lock, so nobody else owns them."""
    for path in paths:
        parent, base = os.path.split(path)
        pattern = os.path.join(glob.escape(parent), f"{STAGED_PREFIX}????????-{glob.escape(base)}")
        for leftover in glob.glob(pattern):
            with contextlib.suppress(OSError):
                os.unlink(leftover)


def ensure_directory(path: str, mode: int, owner: str, group: str, check_mode: bool) -> list[str]:
    """Create or correct one directory; returns what changed. Missing parents are made with 0755."""
    if os.path.isdir(path):
        changes = attribute_changes(path, mode, owner, group)
    elif os.path.lexists(path):
        raise HostFileError(f"{path}: exists and is not a directory", path)
    else:
        changes = ["state: absent -> directory"]
    if changes and not check_mode:
        uid, gid = require_ids(path, owner, group)
        try:
            if not os.path.isdir(path):
                os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
                os.mkdir(path, 0o700)
            os.chown(path, uid, gid)
            os.chmod(path, mode)
        except OSError as error:
            raise HostFileError(f"{path}: directory cannot be set up: {error.strerror}", path) from error
    return changes


def _as_text(content: bytes | None) -> str:
    if content is None:
        return ""
    if len(content) > DIFF_LIMIT_BYTES:
        return f"({len(content)} bytes, too long to show)\n"
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return f"(binary, {len(content)} bytes)\n"


def diff_of(plan: FilePlan) -> list[dict[str, str]]:
    """The difference as Ansible shows it; of a secret file nothing but the fact that it differs."""
    path = plan.spec.path
    entries = []
    if plan.replace:
        absent = "/dev/null"
        before, after = _as_text(plan.before), _as_text(plan.after)
        if plan.spec.secret:
            before = "" if plan.before is None else "(secret)\n"
            after = "" if plan.after is None else "(secret, content differs)\n"
        entries.append(
            {
                "before": before,
                "after": after,
                "before_header": path if plan.before is not None else absent,
                "after_header": path if plan.after is not None else absent,
            }
        )
    if plan.attributes:
        entries.append(attribute_diff(path, plan.attributes))
    return entries


def attribute_diff(path: str, changes: Iterable[str]) -> dict[str, str]:
    """'mode: 0644 -> 0600' lines as a before/after pair."""
    before, after = [], []
    for change in changes:
        name, values = change.split(": ", 1)
        old, new = values.split(" -> ", 1)
        before.append(f"{name}: {old}\n")
        after.append(f"{name}: {new}\n")
    return {
        "before": "".join(before),
        "after": "".join(after),
        "before_header": f"{path} (attributes)",
        "after_header": f"{path} (attributes)",
    }


def digest_of(paths: Iterable[str], overlay: Mapping[str, bytes | None]) -> str:
    """One hash over the content of several files; `overlay` holds content that is only planned."""
    digest = hashlib.sha256()
    for path in sorted(set(paths)):
        content = overlay[path] if path in overlay else read_regular(path)
        digest.update(path.encode() + b"\0")
        digest.update(b"absent" if content is None else hashlib.sha256(content).digest())
    return digest.hexdigest()


def modified_at(path: str) -> float:
    try:
        return os.stat(path).st_mtime
    except OSError:
        return 0.0


def newest_change(paths: Iterable[str]) -> float:
    """Modification time of the newest existing file, 0 where there is none."""
    return max((modified_at(path) for path in paths), default=0.0)


class Stamps:
    """Hashes of what was last applied, one small file each, readable by root alone."""

    def __init__(self, directory: str) -> None:
        self.directory = directory

    def _path(self, name: str) -> str:
        return os.path.join(self.directory, f"{name.replace('/', '_')}.json")

    def get(self, name: str) -> str | None:
        try:
            with open(self._path(name), encoding="utf-8") as handle:
                data = json.load(handle)
        except (OSError, ValueError):
            return None
        value = data.get("applied") if isinstance(data, dict) else None
        return value if isinstance(value, str) else None

    def put(self, name: str, value: str) -> None:
        os.makedirs(self.directory, mode=0o700, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=STAGED_PREFIX, dir=self.directory)
        with os.fdopen(descriptor, "w", encoding="utf-8") as handle:
            json.dump({"applied": value}, handle)
            handle.flush()
            os.fsync(handle.fileno())
        os.rename(temporary, self._path(name))

    def remove(self, name: str) -> None:
        with contextlib.suppress(OSError):
            os.unlink(self._path(name))
