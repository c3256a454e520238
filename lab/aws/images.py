"""The images in the account's repository `ai`: built from distribution packages and the lab's application, and pushed."""

from __future__ import annotations

import datetime
import functools
import gzip
import hashlib
import io
import json
import os
import pathlib
import re
import shutil
import stat
import tarfile
import tempfile
from typing import Any

from lab import image, pki
from lab.aws import deb, payload, seed
from lab.aws.registry import Registry, digest_of
from lab.console import LabError, say, step
from lab.run import run
from lab.settings import CACHE, LABEL, STATE

REPOSITORY = "ai"
APPLICATION = pathlib.Path(__file__).resolve().parent.parent / "app" / "main.py"
BEHAVIOURS = (
    "healthy", "unhealthy", "crash", "crash-later", "slow-start", "hang", "stubborn", "errors", "leak",
)  # fmt: skip
USER = 10001

# What is there from the start: the newest of each kind well-formed and healthy, older ones, and what people push by
# mistake. Pushed in this order, so that the newest tag is not the last one pushed. BROKEN says which do not work.
TAGS = (
    "prod-20250718-1040",
    "prod-20250714-1752",
    "prod-20250701-0900",
    "dev-20250719-0930",
    "dev-20250711-1615",
    "prod-latest",
    "prod-20251301-2561",  # no such month, no such hour
    "prod-20250720",
    "",  # pushed without a tag
)

BROKEN = {"prod-20250701-0900": "crash"}

LAYER = "application/vnd.docker.image.rootfs.diff.tar.gzip"
CONFIG = "application/vnd.docker.container.image.v1+json"
MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"

# Of the packages, what a Python service in a container never opens.
LEFT_OUT_PACKAGES = ("dpkg", "tar", "media-types", "readline-common")
LEFT_OUT = re.compile(
    r"usr/share/(?!zoneinfo)|usr/lib/[^/]+/gconv/|usr/lib/python3[.\d]*/(test|pydoc_data|idlelib|lib2to3|distutils|turtledemo|"
    r"ensurepip|tkinter|unittest/test)(/|$)|(etc|var)/"
)
MERGED = re.compile(r"^(bin|sbin|lib|lib64)/")
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


# ---- what callers use


def ensure() -> bool:
    """Every image of TAGS, in the registry and known to the API; whether one was missing."""
    wanted = {tag: _built(tag, BROKEN.get(tag, "healthy")) for tag in TAGS}
    known = {(tag, entry["imageDigest"]) for entry in _known() for tag in entry.get("imageTags") or [""]}
    missing = [tag for tag, built in wanted.items() if (tag, digest_of(built.manifest)) not in known]
    if missing:
        with step(f"pushing {len(missing)} images to the registry"):
            registry = Registry(pki.authority(STATE / "pki"))
            for tag in missing:
                _push(registry, tag, wanted[tag])
    return bool(missing)


def push(tag: str, behaviour: str = "healthy", *, architecture: str = "", padding: int = 0) -> str:
    """Push an image that behaves like this, and return its digest. A tag that is there already moves.

    With an architecture other than this machine's (amd64, arm64), the image claims to be for that one.
    With padding, it is larger by as many MiB that no compression makes smaller.
    """
    if behaviour not in BEHAVIOURS:
        raise LabError(f"no image behaves {behaviour!r}: one of {', '.join(BEHAVIOURS)}")
    if not re.fullmatch(r"\w[\w.-]{0,127}", tag, re.ASCII):
        raise LabError(f"{tag!r} cannot be a tag: letters, digits, '_', '.' and '-', at most 128, not '.' or '-' first")
    built = _built(tag, behaviour, architecture, padding)
    _push(Registry(pki.authority(STATE / "pki")), tag, built)
    digest = digest_of(built.manifest)
    say(f"{REPOSITORY}:{tag} is {digest} ({behaviour})")
    return digest


def remove(tag: str) -> bool:
    """Take a tag, and the image under it, out of the repository; whether it was there."""
    found = [entry["imageDigest"] for entry in _known() if tag in entry.get("imageTags", [])]
    if found:
        registry = Registry(pki.authority(STATE / "pki"))
        for digest in found:
            registry.delete_manifest(REPOSITORY, digest)
        identifiers = [{"imageDigest": digest} for digest in found]
        seed.client("ecr").batch_delete_image(repositoryName=REPOSITORY, imageIds=identifiers)
        say(f"{REPOSITORY}:{tag} is gone")
    return bool(found)


# ---- one image


class _Built:
    """The parts of one image; blobs are read where they are needed."""

    def __init__(self, layers: list[bytes], config: bytes, manifest: bytes) -> None:
        self.layers, self.config, self.manifest = layers, config, manifest


def _built(tag: str, behaviour: str, architecture: str = "", padding: int = 0) -> _Built:
    base, base_diff = _base_layer(image.debs() / "app")
    application = _archive({"app/main.py": (APPLICATION.read_bytes(), 0o644)})
    layers = [base, gzip.compress(application, 9, mtime=0)]
    diffs = [base_diff, digest_of(application)]
    if padding:
        ballast = _archive({"app/padding": (os.urandom(padding << 20), 0o644)})
        layers.append(gzip.compress(ballast, 1, mtime=0))
        diffs.append(digest_of(ballast))
    config = _json(configuration(tag, behaviour, architecture or _architecture(), diffs))
    return _Built(layers, config, _json(manifest_of(config, layers)))


def configuration(tag: str, behaviour: str, architecture: str, diffs: list[str]) -> dict[str, Any]:
    """What an engine needs to run it: the tag is in the labels, so that no two tags share one digest."""
    created = _time_of(tag).strftime("%Y-%m-%dT%H:%M:%SZ")
    return {
        "architecture": architecture,
        "os": "linux",
        "created": created,
        "config": {
            "Cmd": ["python3", "/app/main.py"],
            "Env": ["PATH=/usr/bin", "PYTHONUNBUFFERED=1", "PYTHONDONTWRITEBYTECODE=1", f"LAB_BEHAVIOUR={behaviour}"],
            "ExposedPorts": {"8000/tcp": {}},
            "Labels": {LABEL: "image", "org.opencontainers.image.version": tag or "untagged"},
            "User": str(USER),
            "WorkingDir": "/app",
        },
        "rootfs": {"type": "layers", "diff_ids": diffs},
        "history": [
            {"created": created, "created_by": f"nemo lab: {part}"}
            for part in ("Debian packages", "application", "padding")[: len(diffs)]
        ],
    }


def manifest_of(config: bytes, layers: list[bytes]) -> dict[str, Any]:
    """The manifest of an image: its digest is what the platform runs."""
    return {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": {"mediaType": CONFIG, "size": len(config), "digest": digest_of(config)},
        "layers": [{"mediaType": LAYER, "size": len(layer), "digest": digest_of(layer)} for layer in layers],
    }


def _time_of(tag: str) -> datetime.datetime:
    """When an image with this tag was built, by the platform's rule; a fixed day for a tag outside of it."""
    found = re.search(r"-(\d{8}-\d{4})$", tag)
    try:
        return datetime.datetime.strptime(found[1] if found else "", "%Y%m%d-%H%M")
    except ValueError:
        return datetime.datetime(2025, 7, 1)


def _push(registry: Registry, tag: str, built: _Built) -> None:
    """Blobs, manifest, and then the API, so that an interrupted push is simply made again."""
    for blob in (*built.layers, built.config):
        registry.push_blob(REPOSITORY, blob)
    digest = digest_of(built.manifest)
    registry.push_manifest(REPOSITORY, tag or digest, built.manifest, MANIFEST)
    if any(entry["imageDigest"] == digest for entry in _known()):
        return
    # moto makes a digest of its own up where it is not told the real one.
    seed.client("ecr").put_image(
        repositoryName=REPOSITORY, imageManifest=built.manifest.decode(), imageManifestMediaType=MANIFEST,
        imageDigest=digest, **({"imageTag": tag} if tag else {}),
    )  # fmt: skip


def _known() -> list[dict[str, Any]]:
    pages = seed.client("ecr").get_paginator("describe_images").paginate(repositoryName=REPOSITORY)
    return [entry for page in pages for entry in page["imageDetails"]]


def _json(content: dict[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


def _architecture() -> str:
    return ARCHITECTURES[payload.machine()]


# ---- the layer below the application


@functools.cache
def _base_layer(debs: pathlib.Path) -> tuple[bytes, str]:
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
    return _archive(files, links, {"tmp": 0o1777, "run": 0o755, "proc": 0o755, "sys": 0o755, "dev": 0o755})


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
        env={"PYTHONHOME": str(usr)}, check=False,
    )  # fmt: skip


def _archive(
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
