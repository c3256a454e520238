"""The layers of images: archives that depend on their contents alone, and the one that all images here stand on."""

from __future__ import annotations

import functools
import gzip
import hashlib
import io
import pathlib
import re
import shutil
import stat
import tarfile
import tempfile

from lab.aws import deb, payload
from lab.aws.registry import digest_of
from lab.console import LabError, step
from lab.run import run
from lab.settings import CACHE

USER = 10001  # who runs the AI service

# Of the packages, what a Python service in a container never opens.
LEFT_OUT_PACKAGES = ("dpkg", "tar", "media-types", "readline-common")
LEFT_OUT = re.compile(
    r"usr/share/(?!zoneinfo)|usr/lib/[^/]+/gconv/|usr/lib/python3[.\d]*/(test|pydoc_data|idlelib|lib2to3|distutils|turtledemo|"
    r"ensurepip|tkinter|unittest/test)(/|$)|(etc|var)/"
)
MERGED = re.compile(r"^(bin|sbin|lib|lib64)/")


@functools.cache
def base(debs: pathlib.Path) -> tuple[bytes, str]:
    """Python, FastAPI and uvicorn as a compressed layer, and the digest of its contents; made once."""
    packages = sorted(debs.glob("*.deb"))
    if not packages:
        raise LabError(
            f"{debs} holds no packages for the AI image: remove the folder .lab/cache, and run `make lab` again"
        )
    key = hashlib.sha256(pathlib.Path(__file__).read_bytes())
    key.update("\n".join(f"{package.name} {package.stat().st_size}" for package in packages).encode())
    target = CACHE / f"ai-{key.hexdigest()[:16]}.tar.gz"
    diff = target.with_suffix(".diff")
    if not (target.exists() and diff.exists()):
        for old in CACHE.glob("ai-*"):
            shutil.rmtree(old) if old.is_dir() else old.unlink()
        with step("building the AI image from Debian packages"):
            with tempfile.TemporaryDirectory(dir=CACHE, prefix="ai-root-") as folder:
                contents = _root(pathlib.Path(folder), packages)
            for path, data in ((diff, digest_of(contents).encode()), (target, gzip.compress(contents, 6, mtime=0))):
                draft = path.with_suffix(".new")
                draft.write_bytes(data)
                draft.replace(path)
    return target.read_bytes(), diff.read_text()


def _root(root: pathlib.Path, packages: list[pathlib.Path]) -> bytes:
    """The root file system as a tar archive: packages unpacked, not installed, as nothing in them needs configuring."""
    for package in packages:
        if package.name.split("_")[0] not in LEFT_OUT_PACKAGES:
            _unpack(package, root)
    _compile(root)
    files: dict[str, tuple[bytes, int]] = {
        "etc/passwd": (f"root:x:0:0:root:/:/bin/false\napp:x:{USER}:{USER}:app:/app:/bin/false\n".encode(), 0o644),
        "etc/group": (f"root:x:0:\napp:x:{USER}:\n".encode(), 0o644),
    }
    links = {name: f"usr/{name}" for name in ("bin", "sbin", "lib", "lib64")}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if path.is_symlink():
            links[name] = str(path.readlink())
        elif path.is_file():
            files[name] = (path.read_bytes(), stat.S_IMODE(path.stat().st_mode))
    return archive(files, links, {"tmp": 0o1777, "run": 0o755, "proc": 0o755, "sys": 0o755, "dev": 0o755})


def _unpack(package: pathlib.Path, root: pathlib.Path) -> None:
    with deb.contents(package) as archive:
        for info in archive:
            name = MERGED.sub(r"usr/\1/", info.name.removeprefix("./"))
            target = root / name
            if LEFT_OUT.match(name) or ".." in pathlib.PurePosixPath(name).parts:
                continue
            if info.isfile() or info.issym():
                target.parent.mkdir(parents=True, exist_ok=True)
            if info.issym():
                target.symlink_to(info.linkname)
            elif file := archive.extractfile(info) if info.isfile() else None:
                target.write_bytes(file.read())
                target.chmod(info.mode & 0o755)


def _compile(root: pathlib.Path) -> None:
    """Bytecode, which a read-only container cannot keep: it starts in half the time. By the image's own Python."""
    usr = root / "usr"
    loaders = [*usr.glob("lib64/ld-linux-*.so.*"), *usr.glob("lib/ld-linux-*.so.*")]
    libraries = next(usr.glob("lib/*-linux-gnu*"))
    run(
        [
            str(loaders[0].resolve() if not loaders[0].is_symlink() else libraries / loaders[0].name),
            "--library-path", str(libraries), str(usr / "bin/python3.11"), "-m", "compileall", "-q",
            "--invalidation-mode=unchecked-hash", "-s", str(root), "-p", "/",
            str(usr / "lib/python3.11"), str(usr / "lib/python3/dist-packages"),
        ],
        # what compiles must not leave bytecode of its own behind, which names this folder
        env={"PYTHONHOME": str(usr), "PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1"}, check=False,
    )  # fmt: skip


def archive(
    files: dict[str, tuple[bytes, int]], links: dict[str, str] | None = None, folders: dict[str, int] | None = None
) -> bytes:
    """A tar archive in which nothing but the contents makes a difference."""
    names = {str(parent) for name in (*files, *(links or {})) for parent in pathlib.PurePosixPath(name).parents}
    every = {**dict.fromkeys(names - {"."}, 0o755), **(folders or {})}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in sorted({*every, *files, *(links or {})}):
            info = tarfile.TarInfo(name)
            info.mtime = payload.MTIME
            data = b""
            if name in files:
                data, info.mode = files[name]
                info.size = len(data)
            elif links and name in links:
                info.type, info.mode, info.linkname = tarfile.SYMTYPE, 0o777, links[name]
            else:
                info.type, info.mode = tarfile.DIRTYPE, every[name]
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()
