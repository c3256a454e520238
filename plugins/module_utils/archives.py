# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Archives: looked through as a whole first, then unpacked without any way out of the folder.

Standard library only and Python 3.9 syntax, because this runs on managed hosts (`tarfile`'s own filters came later).
"""

from __future__ import annotations

import fnmatch
import os
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any, Union

Archive = Union[tarfile.TarFile, zipfile.ZipFile]
BROKEN = (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, NotImplementedError)


class ArchiveError(Exception):
    """An archive is broken, or holds what no archive of a tool does."""


@dataclass(frozen=True)
class Member:
    """One file, folder or link of an archive, with its place below the folder that it is unpacked to."""

    path: str
    kind: str  # file, folder or link
    size: int
    executable: bool
    target: str
    source: Any


def opened(path: str, archive_format: str) -> Archive:
    try:
        if archive_format == "zip":
            return zipfile.ZipFile(path)
        return tarfile.open(path, "r:gz")
    except BROKEN as error:
        raise ArchiveError(f"{path}: not a {archive_format} archive: {error}") from error


def safe_parts(name: str, path: str) -> list[str]:
    """The parts of a member's name; an error for every name that leads elsewhere or hides what it is."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or ".." in parts or "\\" in name or any(ord(letter) < 32 for letter in name):
        raise ArchiveError(f"{path}: member {name!r} would be written outside of its folder; nothing was unpacked")
    return parts


def safe_target(parts: Sequence[str], target: str, path: str) -> None:
    """A link may climb only to folders of its own archive, and only at its beginning."""
    steps = [step for step in target.split("/") if step not in ("", ".")]
    climbs = next((number for number, step in enumerate(steps) if step != ".."), len(steps))
    if target.startswith("/") or not target or ".." in steps[climbs:] or climbs >= len(parts):
        raise ArchiveError(f"{path}: link {'/'.join(parts)!r} leads to {target!r}, outside of it; nothing was unpacked")


def _raw(archive: Archive, path: str) -> Iterator[tuple[str, str, int, bool, str, Any]]:
    if isinstance(archive, zipfile.ZipFile):
        for info in archive.infolist():
            mode = info.external_attr >> 16
            if info.is_dir():
                yield info.filename, "folder", 0, True, "", info
            elif stat.S_ISLNK(mode):
                yield info.filename, "link", 0, False, archive.read(info).decode(errors="replace"), info
            elif stat.S_IFMT(mode) in (0, stat.S_IFREG):
                yield info.filename, "file", info.file_size, bool(mode & 0o111), "", info
            else:
                raise ArchiveError(f"{path}: member {info.filename!r} is neither file, folder nor link")
        return
    for member in archive:
        if member.isdir():
            yield member.name, "folder", 0, True, "", member
        elif member.issym():
            yield member.name, "link", 0, False, member.linkname, member
        elif member.isreg():
            yield member.name, "file", member.size, bool(member.mode & 0o111), "", member
        else:
            raise ArchiveError(f"{path}: member {member.name!r} is neither file, folder nor link")


def look_through(archive: Archive, path: str, strip: int, only: Sequence[str]) -> list[Member]:
    """Everything that will be unpacked; members that are left out must be safe as well."""
    members: list[Member] = []
    kinds: dict[str, str] = {}
    try:
        for name, kind, size, executable, target, source in _raw(archive, path):
            parts = safe_parts(name, path)
            if kind == "link":
                safe_target(parts, target, path)
            whole = "/".join(parts)
            if kinds.get(whole, kind) != kind or (kind != "folder" and whole in kinds):
                raise ArchiveError(f"{path}: member {name!r} is there twice; nothing was unpacked")
            kinds[whole] = kind
            place = "/".join(parts[strip:])
            if place and (not only or any(fnmatch.fnmatchcase(place, pattern) for pattern in only)):
                if kind == "link":
                    safe_target(parts[strip:], target, path)
                members.append(Member(place, kind, size, executable, target, source))
    except BROKEN as error:
        raise ArchiveError(f"{path}: the archive is broken: {error}") from error
    for whole in kinds:
        above = whole.split("/")[:-1]
        for depth in range(1, len(above) + 1):
            if kinds.get("/".join(above[:depth]), "folder") != "folder":
                raise ArchiveError(f"{path}: member {whole!r} lies below a file or link; nothing was unpacked")
    if not any(member.kind == "file" for member in members):
        raise ArchiveError(f"{path}: the archive has no file that is asked for ({', '.join(only) or 'it is empty'})")
    return members


def size_of(members: Sequence[Member]) -> int:
    """Room that the members take, with a block for each of them."""
    return sum(member.size + 4096 for member in members)


def unpack(archive: Archive, path: str, members: Sequence[Member], folder: str) -> None:
    """Write the members below a folder with the modes 0755 and 0644, whatever the archive says of owners and modes."""
    for member in members:
        place = os.path.join(folder, *member.path.split("/"))
        if member.kind == "folder":
            os.makedirs(place, mode=0o755, exist_ok=True)
            continue
        os.makedirs(os.path.dirname(place), mode=0o755, exist_ok=True)
        if member.kind == "link":
            os.symlink(member.target, place)
            continue
        try:
            with _content(archive, member) as content, open(place, "xb") as file:
                shutil.copyfileobj(content, file, 1 << 20)
                os.fchmod(file.fileno(), 0o755 if member.executable else 0o644)
        except OSError as error:
            if error.errno is None:  # of the archive, not of the disk
                raise ArchiveError(f"{path}: the archive is broken: {error}") from error
            raise
        except BROKEN as error:
            raise ArchiveError(f"{path}: the archive is broken: {error}") from error
        if os.path.getsize(place) != member.size:
            raise ArchiveError(f"{path}: member {member.path!r} has {os.path.getsize(place)} bytes, not {member.size}")


def _content(archive: Archive, member: Member) -> IO[bytes]:
    if isinstance(archive, zipfile.ZipFile):
        return archive.open(member.source)
    content = archive.extractfile(member.source)
    assert content is not None
    return content
