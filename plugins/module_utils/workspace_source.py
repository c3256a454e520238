# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The project as it lies on the controller: which files belong to it, which revision they are, and their archive.

Runs on the controller: in a checkout, in an installed collection, and in a workspace on the Bastion.
"""

from __future__ import annotations

import base64
import fnmatch
import hashlib
import io
import json
import os
import stat
import struct
import subprocess
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

RECORD = "REVISION"  # in the root of a workspace: which revision it is, and the hash of its content
REQUIREMENTS = "requirements/controller.txt"  # what the Python environment of a workspace is made of
LINK = "collections/ansible_collections/nemo/platform"  # makes a checkout the collection; an installed one has none
LINK_TARGET = "../../.."
# Never part of a workspace, whatever git says of them: what a machine made for itself, and what opens something.
NEVER = (
    ".git", ".lab", ".venv", ".env", ".env.*", ".ansible", ".cache", ".molecule", ".vault-password*", ".vault_pass*",
    "*_cache", "__pycache__", "build", "*.pyc", "*.pyo", "*.retry", "*.swp", "*.pem", "*.key", "*.p12", "id_rsa*", "id_dsa*",
    "id_ecdsa*", "id_ed25519*",
)  # fmt: skip
MADE_THERE = (RECORD, "environment", LINK)  # in a workspace, made with it
_PRIVATE_KEY = b"PRIVATE KEY-----"
_OPENSSH_MAGIC = b"openssh-key-v1\0"


class SourceError(Exception):
    """The project cannot be packed; the text names the file or folder."""


@dataclass(frozen=True)
class Source:
    """A project: its files, the hash of their content, and the name of that state."""

    root: str
    files: tuple[str, ...]
    revision: str
    content: str
    commit: str

    @property
    def record(self) -> dict[str, Any]:
        """What the workspace keeps about itself."""
        return {"revision": self.revision, "content": self.content, "commit": self.commit, "files": len(self.files)}


def _git(root: str, *arguments: str) -> bytes | None:
    """What git says, or None where there is no git or no repository; nothing of the caller's environment gets in."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    environment.update(GIT_OPTIONAL_LOCKS="0", LC_ALL="C")
    # A checkout that another user owns is read all the same: nothing of it is run.
    command = ["git", "-c", f"safe.directory={root}", "-c", "core.fsmonitor=false", "-C", root, *arguments]
    try:
        done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    except OSError:
        return None
    return done.stdout if done.returncode == 0 else None


def _is_repository(root: str) -> bool:
    top = _git(root, "rev-parse", "--show-toplevel")
    return top is not None and os.path.realpath(os.fsdecode(top).rstrip("\n")) == os.path.realpath(root)


def left_out(name: str) -> bool:
    """Whether a path may not go along because of a part of its name."""
    return any(fnmatch.fnmatchcase(part, pattern) for part in name.split("/") for pattern in NEVER)


def _holds_a_key(path: str) -> bool:
    with open(path, "rb") as handle:
        return _PRIVATE_KEY in handle.readline(100)


def _walk(root: str) -> Iterator[str]:
    for folder, folders, names in os.walk(root):
        relative = os.path.relpath(folder, root)
        prefix = "" if relative == "." else f"{relative}/"
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        folders[:] = [name for name in folders if name not in links and not left_out(name)]
        yield from (f"{prefix}{name}" for name in (*names, *links))


def _wanted(root: str, names: Iterable[str]) -> tuple[str, ...]:
    found = []
    for name in sorted(set(names)):
        path = os.path.join(root, name)
        if name in MADE_THERE or left_out(name) or not os.path.lexists(path):
            continue
        kind = os.lstat(path).st_mode
        if stat.S_ISLNK(kind):
            target = os.readlink(path)
            inside = os.path.normpath(os.path.join(os.path.dirname(name), target))
            if os.path.isabs(target) or inside.split("/")[0] == "..":
                raise SourceError(
                    f"{path} is a link to {target}, outside the project: it would lead nowhere on the Bastion"
                )
        elif not stat.S_ISREG(kind) or _holds_a_key(path):
            continue
        found.append(name)
    return tuple(found)


def _entry(root: str, name: str) -> tuple[str, bytes]:
    """Kind and content of a file: what a revision is made of."""
    path = os.path.join(root, name)
    status = os.lstat(path)
    if stat.S_ISLNK(status.st_mode):
        return "link", os.fsencode(os.readlink(path))
    with open(path, "rb") as handle:
        return ("program" if status.st_mode & stat.S_IXUSR else "file"), handle.read()


def _content(root: str, files: Iterable[str]) -> str:
    return _digest((name, *_entry(root, name)) for name in files)


def _digest(entries: Iterable[tuple[str, str, bytes]]) -> str:
    digest = hashlib.sha256()
    for name, kind, data in entries:
        digest.update(f"{name}\0{kind}\0{len(data)}\0".encode(errors="surrogateescape"))
        digest.update(data)
    return digest.hexdigest()


def _recorded(root: str) -> dict[str, Any]:
    try:
        with open(os.path.join(root, RECORD), encoding="utf-8") as handle:
            record = json.load(handle)
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def look(root: str) -> Source:
    """The project in a folder, and its revision.

    A clean checkout is its commit; one with changes is its commit and the hash of its content. Without git it is what its own
    record says, as long as its content is still that of the record, and else the hash of its content.
    """
    root = os.path.realpath(root)
    if not os.path.isdir(root):
        raise SourceError(f"{root} is not a folder")
    try:
        if _is_repository(root):
            listed = _git(root, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
            if listed is None:
                raise SourceError(f"{root}: git cannot list the files of this repository")
            files = _wanted(root, os.fsdecode(listed).split("\0")[:-1])
            content = _content(root, files)
            head = _git(root, "rev-parse", "--verify", "HEAD")
            commit = head.decode().strip() if head else ""
            dirty = _git(root, "status", "--porcelain", "--untracked-files=all")
            short = commit[:12] or "uncommitted"
            revision = f"{short}-{content[:12]}" if dirty or not commit else short
            return Source(root, files, revision, content, commit)
        files = _wanted(root, _walk(root))
        content, record = _content(root, files), _recorded(root)
    except OSError as error:
        raise SourceError(f"{error.filename} cannot be read: {error.strerror}") from error
    if record.get("content") == content and record.get("revision"):
        return Source(root, files, str(record["revision"]), content, str(record.get("commit") or ""))
    return Source(root, files, f"content-{content[:12]}", content, "")


def _link(name: str, target: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.mode = tarfile.SYMTYPE, target, 0o777
    return info


def pack(source: Source, path: str) -> None:
    """Write the archive: the same bytes for the same content, no owner, no time."""
    entries = [(name, *_entry(source.root, name)) for name in source.files]
    if _digest(entries) != source.content:
        raise SourceError(f"{source.root} changed while it was packed: run again when nobody writes to it")
    record = (json.dumps(source.record, indent=2, sort_keys=True) + "\n").encode()
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, kind, data in (*entries, (RECORD, "file", record)):
            if kind == "link":
                tar.addfile(_link(name, os.fsdecode(data)))
                continue
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(data), 0o755 if kind == "program" else 0o644
            tar.addfile(info, io.BytesIO(data))
        tar.addfile(_link(LINK, LINK_TARGET))


def check_requirements(source: Source, name: str) -> None:
    """The lock of the Python environment must be among the files, with hashes."""
    path = os.path.join(source.root, name)
    if name not in source.files:
        raise SourceError(f"{path} is not there: it pins the workspace's Python environment")
    with open(path, encoding="utf-8") as handle:
        if "--hash=" not in handle.read():
            raise SourceError(f"{path} has no hashes: make lock writes them")


def key_problem(text: str) -> str:
    """Why a private key is none that ssh can use without asking, or an empty text."""
    lines = [line.strip() for line in text.strip().splitlines()]
    if not lines or not lines[0].startswith("-----BEGIN ") or not lines[0].endswith("PRIVATE KEY-----"):
        return "is no private key: it must begin with a line such as -----BEGIN OPENSSH PRIVATE KEY-----"
    if not lines[-1].startswith("-----END "):
        return "is cut off: its last line is not -----END ... PRIVATE KEY-----"
    encrypted = (
        "has a passphrase, and nobody is there to type it when Ansible connects: give a key of the platform without one"
        " (ssh-keygen -p -f FILE takes it off a copy)"
    )
    if "ENCRYPTED" in lines[0] or any("ENCRYPTED" in line for line in lines[1:4]):
        return encrypted
    if "OPENSSH" in lines[0]:
        try:
            data = base64.b64decode("".join(lines[1:-1]), validate=True)
        except ValueError:
            return "is damaged: its body is not base64"
        if not data.startswith(_OPENSSH_MAGIC):
            return "is damaged: its body is not that of an OpenSSH key"
        (length,) = struct.unpack(">I", data[len(_OPENSSH_MAGIC) : len(_OPENSSH_MAGIC) + 4])
        if data[len(_OPENSSH_MAGIC) + 4 : len(_OPENSSH_MAGIC) + 4 + length] != b"none":
            return encrypted
    return ""
