"""The repository `vllm-openai`: the lab's inference server, in images with the settings of vLLM's own."""

from __future__ import annotations

import functools
import pathlib
import re
import tarfile
from typing import Any

from lab import image
from lab.aws import layers
from lab.console import LabError

HERE = pathlib.Path(__file__).resolve().parent
BEHAVIOURS = ("healthy", "slow", "oom", "bad-kernel", "hang", "exit-zero", "newer-cuda")

# What is there from the start: two releases, the first also for CUDA 12, and one that misbehaves in each way.
TAGS = {
    "v0.33.0": "healthy",
    "v0.33.0-cu129": "healthy",
    "v0.34.0": "healthy",
    **{behaviour: behaviour for behaviour in BEHAVIOURS[1:]},
}

# Of upstream's images: the brands of cards on which a library in the image makes up for an older driver, and which.
BRANDS = (
    "unknown", "grid", "tesla", "nvidia", "quadro", "quadrortx", "nvidiartx", "vapps", "vpc", "vcs", "vws", "cloudgaming",
)  # fmt: skip
OLDER = {"12.9": (535, 550, 565, 570), "13.0": (535, 550, 565, 570, 575)}


def layer() -> bytes:
    """The server, under the name that the image's entry point has, and the shell that upstream's image has too."""
    files = {
        f"opt/vllm/{name}": ((HERE / name).read_bytes(), mode)
        for name, mode in (("server.py", 0o755), ("options.txt", 0o644))
    }
    files["usr/bin/dash"] = (_shell(image.archive()), 0o755)
    return layers.archive(
        files, {"usr/bin/vllm": "/opt/vllm/server.py", "usr/bin/sh": "dash"}, {"vllm-workspace": 0o755}
    )


@functools.cache
def _shell(root: pathlib.Path) -> bytes:
    """The shell of the base image: the GPU's own programs in a container are scripts here."""
    with tarfile.open(root) as archive:
        for info in archive:
            file = archive.extractfile(info) if info.name.removeprefix("./") == "usr/bin/dash" else None
            if file:
                return file.read()
    raise LabError(f"{root} holds no shell: remove the folder .lab/cache, and run `make lab` again")


def configuration(tag: str, behaviour: str) -> dict[str, Any]:
    """Upstream's settings, as far as something reads them before or while the image runs."""
    release = re.match(r"v(\d+\.\d+\.\d+)", tag)
    cuda = "13.4.0" if behaviour == "newer-cuda" else "12.9.1" if tag.endswith("-cu129") else "13.0.2"
    series = cuda.rpartition(".")[0]
    older = [
        f"brand={brand},driver>={branch},driver<{branch + 1}" for branch in OLDER.get(series, ()) for brand in BRANDS
    ]
    return {
        "Entrypoint": ["vllm", "serve"],
        "Env": [
            "PATH=/usr/local/nvidia/bin:/usr/local/cuda/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "NVARCH=x86_64",
            f"NVIDIA_REQUIRE_CUDA={' '.join([f'cuda>={series}', *older])}",
            f"CUDA_VERSION={cuda}",
            "NVIDIA_VISIBLE_DEVICES=all",
            "NVIDIA_DRIVER_CAPABILITIES=compute,utility",
            "VLLM_USAGE_SOURCE=production-docker-image",
            "PYTHONUNBUFFERED=1",
            "PYTHONDONTWRITEBYTECODE=1",
            f"LAB_VERSION={release[1] if release else '0.33.0'}",
            f"LAB_BEHAVIOUR={behaviour}",
        ],
        "WorkingDir": "/vllm-workspace",
    }
