"""Folders of files for the mirror: each made once for the same inputs, described by the digests of what is in it."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import pathlib
import re
import shutil
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import IO, Any

from lab.console import LabError
from lab.run import run
from lab.settings import CACHE

HERE = pathlib.Path(__file__).resolve().parent
REQUIREMENTS = HERE / "requirements.txt"
MTIME = 1_700_000_000  # an archive made twice is the same
LEVEL = 1  # of compression: these files travel inside one machine
# What runs on the lab's hosts, Debian 12 with its C library 2.36.
GLIBC = (2, 36)
MANYLINUX = ("manylinux1", "manylinux2010", "manylinux2014", *(f"manylinux_2_{minor}" for minor in range(5, 37)))


@dataclasses.dataclass(frozen=True)
class Made:
    """A folder that becomes part of the mirror's root, and the SHA-256 of each file in it by its path."""

    key: str
    folder: pathlib.Path
    digests: Mapping[str, str]

    def digest(self, path: str) -> str:
        return self.digests[path]


def made(kind: str, inputs: list[bytes], build: Callable[[pathlib.Path], None], cache: pathlib.Path = CACHE) -> Made:
    """The folder of this kind, from the cache if it was made of the same inputs."""
    key = hashlib.sha256(b"\0".join(hashlib.sha256(part).digest() for part in inputs)).hexdigest()[:16]
    target = cache / f"mirror-{kind}-{key}"
    if not target.exists():
        cache.mkdir(parents=True, exist_ok=True)
        for old in cache.glob(f"mirror-{kind}-*"):  # drafts of killed runs too
            shutil.rmtree(old)
        with tempfile.TemporaryDirectory(dir=cache, prefix=f"mirror-{kind}-new-") as folder:
            draft = pathlib.Path(folder) / "made"
            (draft / "files").mkdir(parents=True)
            build(draft / "files")
            found = {str(path.relative_to(draft / "files")): path for path in sorted((draft / "files").rglob("*"))}
            digests = {name: digest_of(path) for name, path in found.items() if path.is_file()}
            (draft / "digests.json").write_text(json.dumps(digests, indent=1))
            draft.rename(target)
    return Made(key, target / "files", json.loads((target / "digests.json").read_text()))


def digest_of(path: pathlib.Path) -> str:
    """The SHA-256 of a file, read in parts."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def source_of(module: str) -> bytes:
    """The text of a module of ours: part of what its files are made of."""
    return pathlib.Path(sys.modules[module].__file__ or "").read_bytes()


def locked(lock: pathlib.Path, names: list[str] | None = None) -> str:
    """The requirements of a lock with their hashes; of some names, if they are given."""
    entries = re.findall(r"^[a-zA-Z0-9](?:[^\\\n]|\\\n)*", lock.read_text(), re.MULTILINE)
    by_name = {re.split(r"[=<>~! ;\[]", entry, maxsplit=1)[0].lower(): entry for entry in entries}
    missing = sorted(set(names or []) - set(by_name))
    if missing:
        raise LabError(f"{lock} does not pin {', '.join(missing)}")
    return "\n".join(by_name[name] for name in names or by_name) + "\n"


def version_of(requirements: str, name: str) -> str:
    """The version that a lock pins for one name."""
    found = re.search(rf"^{re.escape(name)}==([^\s;\\]+)", requirements, re.MULTILINE)
    if not found:
        raise LabError(f"no version of {name} is pinned")
    return found[1]


def download(requirements: str, folder: pathlib.Path, machine: str, python: str = "3.11") -> list[pathlib.Path]:
    """Wheels of exactly these requirements for a lab host with this Python, by pip as this machine has set it up."""
    lock = folder.with_name(f"{folder.name}.txt")
    lock.write_text(requirements)
    platforms = [f"--platform={kind}_{machine}" for kind in MANYLINUX]
    done = run([
        sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check",
        "--require-hashes", "--no-deps", "--only-binary=:all:", "--implementation=cp", f"--python-version={python}",
        *platforms, f"--dest={folder}", f"--requirement={lock}",
    ], timeout=1200, check=False)  # fmt: skip
    lock.unlink()
    if done.returncode:
        names = ", ".join(re.findall(r"^([^\s;\\]+)", requirements, re.MULTILINE))
        said = [line for line in done.stderr.decode(errors="replace").splitlines() if not line.startswith("WARNING")]
        raise LabError(f"pip could not download {names}:\n  " + "\n  ".join(said[-10:]))
    return sorted(folder.glob("*.whl"))


@contextmanager
def tgz(path: pathlib.Path) -> Iterator[tarfile.TarFile]:
    """A compressed archive in which nothing but the contents makes a difference."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        path.open("wb") as raw,
        gzip.GzipFile(filename="", fileobj=raw, mode="wb", compresslevel=LEVEL, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w|", format=tarfile.PAX_FORMAT) as archive,
    ):
        yield archive


def add(archive: tarfile.TarFile, name: str, file: IO[bytes], size: int, mode: int = 0o644) -> None:
    """A root-owned file of an archive."""
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = size, mode, MTIME
    archive.addfile(info, file)


def zip_entry(name: str, mode: int = 0o644) -> zipfile.ZipInfo:
    """A file of a zip archive, with the permissions that unzip restores."""
    info = zipfile.ZipInfo(name, (2026, 1, 1, 0, 0, 0))
    info.external_attr = (0o100000 | mode) << 16
    info.create_system = 3
    info.compress_type = zipfile.ZIP_DEFLATED
    return info


def json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
