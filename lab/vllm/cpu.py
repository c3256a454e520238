"""vLLM itself, built for CPUs, as an image in the lab's registry: `make lab VLLM=cpu`.

Made without a container engine or another registry: the files of the lab's base image are one layer, Python packages another.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import io
import json
import pathlib
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Callable
from typing import Any

from lab import image
from lab.aws import deb, images, layers, payload
from lab.aws.registry import Blob, digest_of
from lab.console import LabError, say, step
from lab.run import run
from lab.settings import CACHE

HERE = pathlib.Path(__file__).resolve().parent
VERSION = "0.32.0"
TAG = f"cpu-{VERSION}"
TORCH = "torch==2.13.0+cpu"  # as this vLLM requires it
PYTHON = "3.11"  # of Debian 12, the base image
GLIBC = 36  # its C library is 2.36: packages for that or an older one run
SITE = "opt/vllm/site"
# What serves to compile more of it, or to test it.
LEFT_OUT = ("bin", "torch/include", "torch/share", "numpy/*/tests", "sympy/*/tests", "numba/tests")

# Its engine is a process of its own, which reads this program again and must not start one more.
COMMAND = """#!/usr/bin/python3
import sys

from vllm.entrypoints.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
"""
# The program asks for its version by the name of the package that is built for GPUs.
METADATA = f"Metadata-Version: 2.1\nName: vllm\nVersion: {VERSION}\n"


def ensure() -> str:
    """The image in the registry, made where it is not in the cache; its digest."""
    if payload.machine() != "x86_64":
        raise LabError(f"VLLM=cpu: vLLM for CPUs is pinned for x86_64, and this machine is {payload.machine()}")
    root = image.archive()
    base, base_diff = _layer("base", root.name, lambda file: _copy(root, file))
    contents = [TORCH, (HERE / "requirements.txt").read_text(), *LEFT_OUT, SITE]
    site, site_diff = _layer("site", "\n".join(contents), _site)
    program = _program(_numa())
    diffs = [base_diff, site_diff, digest_of(program)]
    repository = dataclasses.replace(images.VLLM, program="Python packages", configuration=_configuration)
    made = images.Image(
        [base, site, Blob.of(gzip.compress(program, 9, mtime=0))],
        images.configuration(repository, TAG, "healthy", "amd64", diffs),
    )
    with step(f"pushing vLLM {VERSION} for CPUs to the registry"):
        images.publish(repository, TAG, made)
    say(f"{repository.name}:{TAG} is {made.digest} (vLLM {VERSION} for CPUs)")
    return made.digest


def _configuration(_tag: str, _behaviour: str) -> dict[str, Any]:
    return {
        "Entrypoint": ["vllm", "serve"],
        "Env": [
            "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "PYTHONUNBUFFERED=1",
            f"PYTHONPATH=/{SITE}",
            "PYTHONPYCACHEPREFIX=/cache/bytecode",  # else each start compiles some thousand files
            "VLLM_TARGET_DEVICE=cpu",
            "VLLM_NO_USAGE_STATS=1",
        ],
        "WorkingDir": "/vllm-workspace",
    }


# ---- layers


class _Hashed(io.RawIOBase):
    """A file that knows the digest of what was written to it."""

    def __init__(self, file: Any) -> None:
        self.file, self.sha256 = file, hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.sha256.update(data)
        self.file.write(data)
        return len(data)

    @property
    def digest(self) -> str:
        return f"sha256:{self.sha256.hexdigest()}"


def _layer(name: str, contents: str, write: Callable[[Any], None]) -> tuple[Blob, str]:
    """A compressed layer in the cache, and the digest of what is in it; made where these contents are not there yet."""
    target = CACHE / f"vllm-cpu-{name}-{hashlib.sha256(contents.encode()).hexdigest()[:16]}.tar.gz"
    about = target.with_suffix(".json")
    if not about.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        for old in CACHE.glob(f"vllm-cpu-{name}-*"):
            shutil.rmtree(old) if old.is_dir() else old.unlink()
        with target.open("wb") as file:
            packed = _Hashed(file)
            with gzip.GzipFile(filename="", mode="wb", compresslevel=1, fileobj=packed, mtime=0) as inner:
                plain = _Hashed(inner)
                write(plain)
        found = {"digest": packed.digest, "diff": plain.digest}
        about.write_text(json.dumps(found))
    found = json.loads(about.read_text())
    return Blob(found["digest"], target.stat().st_size, target), found["diff"]


def _copy(source: pathlib.Path, target: Any) -> None:
    with source.open("rb") as file:
        shutil.copyfileobj(file, target, 1 << 20)


def _site(target: Any) -> None:
    """vLLM, torch and what they need, as a tar archive."""
    with tempfile.TemporaryDirectory(dir=CACHE, prefix="vllm-cpu-site-new-") as folder:
        site = pathlib.Path(folder) / "site"
        with step(f"downloading vLLM {VERSION} and torch for CPUs (2 GB, some minutes, once)"):
            _install(site)
        with step("packing them as a layer"), tarfile.open(fileobj=target, mode="w|") as archive:
            for path in sorted(site.rglob("*")):
                if path.is_file():
                    info = tarfile.TarInfo(f"{SITE}/{path.relative_to(site)}")
                    info.size, info.mode, info.mtime = path.stat().st_size, 0o644, payload.MTIME
                    with path.open("rb") as file:
                        archive.addfile(info, file)


def _program(numa: pathlib.Path) -> bytes:
    """What is no Python package: the command, what it takes for its version, and a library."""
    files = {
        "usr/bin/vllm": (COMMAND.encode(), 0o755),
        f"{SITE}/vllm-{VERSION}.dist-info/METADATA": (METADATA.encode(), 0o644),
    }
    with deb.contents(numa) as archive:
        for info in archive:
            name = pathlib.PurePosixPath(info.name).name
            file = archive.extractfile(info) if info.isfile() and name.startswith("libnuma.so.1") else None
            if file:
                files["usr/lib/x86_64-linux-gnu/libnuma.so.1"] = (file.read(), 0o644)
    return layers.archive(files, folders={"vllm-workspace": 0o755})


def _numa() -> pathlib.Path:
    found = sorted(image.debs().glob("libnuma1_*.deb"))
    if not found:
        raise LabError(f"{image.debs()} holds no libnuma1: remove the folder .lab/cache, and run `make lab` again")
    return found[-1]


def _install(site: pathlib.Path) -> None:
    """The packages for the image's Python, whatever Python runs this."""
    platforms = [f"--platform=manylinux_2_{minor}_x86_64" for minor in range(5, GLIBC + 1)]
    argv = [
        sys.executable, "-m", "pip", "install", "--quiet", "--no-input", "--disable-pip-version-check", "--no-deps",
        "--only-binary=:all:", "--no-compile", "--implementation=cp", f"--python-version={PYTHON}", "--platform=linux_x86_64",
        *platforms, *(f"--platform=manylinux{year}_x86_64" for year in (1, 2010, 2014)), f"--target={site}",
    ]  # fmt: skip
    if run([*argv, TORCH], timeout=1800, check=False).returncode != 0:
        raise LabError(
            f"VLLM=cpu: pip finds no CPU build of torch here ({TORCH} for Python {PYTHON} on x86_64, which PyPI does not have). "
            "Tell pip where one is (PIP_FIND_LINKS or PIP_EXTRA_INDEX_URL), or run `make lab` without VLLM=cpu."
        )
    run([*argv, "--require-hashes", f"--requirement={HERE / 'requirements.txt'}"], timeout=1800)
    for pattern in LEFT_OUT:
        for path in site.glob(pattern):
            shutil.rmtree(path)
