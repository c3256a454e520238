"""Debian packages read without dpkg."""

from __future__ import annotations

import io
import pathlib
import tarfile

import pytest

from lab.aws import deb
from lab.console import LabError


def package(path: pathlib.Path, files: dict[str, bytes], compression: str = "xz") -> pathlib.Path:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode=f"w:{compression}") as archive:  # type: ignore[call-overload]
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    blob = deb.MAGIC
    # An odd size first: the next member starts at an even offset.
    for name, content in (("debian-binary", b"2.0"), (f"data.tar.{compression}", data.getvalue())):
        blob += (
            f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n".encode()
            + content
            + b"\n" * (len(content) % 2)
        )
    path.write_bytes(blob)
    return path


@pytest.mark.parametrize("compression", ["xz", "gz"])
def test_a_file_of_a_package(tmp_path: pathlib.Path, compression: str) -> None:
    path = package(tmp_path / "a.deb", {"./usr/bin/a": b"binary", "./etc/a": b"settings"}, compression)
    assert deb.read(path, "usr/bin/a") == b"binary"
    with deb.contents(path) as archive:
        assert archive.getnames() == ["./usr/bin/a", "./etc/a"]


def test_a_missing_file_is_named(tmp_path: pathlib.Path) -> None:
    with pytest.raises(LabError, match=r"a\.deb holds no file usr/bin/b"):
        deb.read(package(tmp_path / "a.deb", {"./usr/bin/a": b""}), "usr/bin/b")


def test_a_package_cut_off_by_a_broken_download_is_refused(tmp_path: pathlib.Path) -> None:
    path = package(tmp_path / "a.deb", {"./usr/bin/a": b"binary" * 1000})
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(LabError, match=r"a\.deb is cut off or damaged"):
        deb.read(path, "usr/bin/a")


def test_something_else_is_refused(tmp_path: pathlib.Path) -> None:
    (tmp_path / "a.deb").write_bytes(b"<html>not found</html>")
    with pytest.raises(LabError, match=r"a\.deb is not a Debian package"):
        deb.read(tmp_path / "a.deb", "usr/bin/a")
