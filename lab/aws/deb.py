"""Reads Debian packages without dpkg: the lab also runs where there is none."""

from __future__ import annotations

import io
import pathlib
import tarfile
from collections.abc import Iterator

from lab.console import LabError

MAGIC = b"!<arch>\n"


def contents(package: pathlib.Path) -> tarfile.TarFile:
    """The archive of the files that a package installs."""
    for name, data in _members(package):
        if name.startswith("data.tar"):
            try:
                return tarfile.open(fileobj=io.BytesIO(data))
            except tarfile.ReadError as error:
                raise LabError(f"{package.name}: {name} is compressed in a way that this Python cannot read") from error
    raise LabError(f"{package.name} holds no data.tar: is it a Debian package?")


def read(package: pathlib.Path, path: str) -> bytes:
    """One file of a package."""
    with contents(package) as archive:
        for name in (f"./{path}", path):
            try:
                file = archive.extractfile(name)
            except KeyError:
                continue
            if file:
                return file.read()
    raise LabError(f"{package.name} holds no file {path}")


def _members(package: pathlib.Path) -> Iterator[tuple[str, bytes]]:
    """The members of an ar archive: 60-byte headers, contents padded to even offsets."""
    with package.open("rb") as file:
        if file.read(8) != MAGIC:
            raise LabError(f"{package.name} is not a Debian package")
        while header := file.read(60):
            if len(header) < 60 or header[58:] != b"`\n":
                raise LabError(f"{package.name} is cut off or damaged: remove it from the cache, and try again")
            size = int(header[48:58])
            data = file.read(size)
            if len(data) < size:
                raise LabError(f"{package.name} is cut off or damaged: remove it from the cache, and try again")
            file.read(size % 2)
            yield header[:16].decode().strip().rstrip("/"), data
