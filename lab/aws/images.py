"""The images in the account's repositories: made from layers without an engine, and pushed.

`ai` is the lab's application, `vllm-openai` its inference server.
"""

from __future__ import annotations

import dataclasses
import datetime
import gzip
import json
import os
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

from lab import image, pki
from lab.aws import layers, payload, seed
from lab.aws.registry import Blob, Registry, digest_of
from lab.console import LabError, say, step
from lab.settings import LABEL, STATE
from lab.vllm import image as vllm

APPLICATION = pathlib.Path(__file__).resolve().parent.parent / "app" / "main.py"

LAYER = "application/vnd.docker.image.rootfs.diff.tar.gzip"
CONFIG = "application/vnd.docker.container.image.v1+json"
MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


@dataclasses.dataclass(frozen=True)
class Repository:
    """A repository of the account, and what the images in it are."""

    name: str
    program: str  # what its second layer is, in one word
    layer: Callable[[], bytes]  # that layer, as an archive
    configuration: Callable[[str, str], dict[str, Any]]  # how a container of it runs, by tag and behaviour
    behaviours: tuple[str, ...]
    tags: Mapping[str, str]  # what is there from the start, with its behaviour; pushed in this order


def _application() -> bytes:
    return layers.archive({"app/main.py": (APPLICATION.read_bytes(), 0o644)})


def _runs_application(_: str, behaviour: str) -> dict[str, Any]:
    return {
        "Cmd": ["python3", "/app/main.py"],
        "Env": ["PATH=/usr/bin", "PYTHONUNBUFFERED=1", "PYTHONDONTWRITEBYTECODE=1", f"LAB_BEHAVIOUR={behaviour}"],
        "ExposedPorts": {"8000/tcp": {}},
        "User": str(layers.USER),
        "WorkingDir": "/app",
    }


AI = Repository(
    "ai", "application", _application, _runs_application,
    ("healthy", "unhealthy", "crash", "crash-later", "slow-start", "hang", "stubborn", "errors", "leak"),
    # The newest of each kind well-formed and healthy, older ones, and what people push by mistake; the newest tag is not
    # the last one pushed.
    {
        "prod-20250718-1040": "healthy",
        "prod-20250714-1752": "healthy",
        "prod-20250701-0900": "crash",
        "dev-20250719-0930": "healthy",
        "dev-20250711-1615": "healthy",
        "prod-latest": "healthy",
        "prod-20251301-2561": "healthy",  # no such month, no such hour
        "prod-20250720": "healthy",
        "": "healthy",  # pushed without a tag
    },
)  # fmt: skip
VLLM = Repository("vllm-openai", "server", vllm.layer, vllm.configuration, vllm.BEHAVIOURS, vllm.TAGS)
REPOSITORIES = {repository.name: repository for repository in (AI, VLLM)}


# ---- what callers use


def ensure() -> bool:
    """Every repository's own images, in the registry and known to the API; whether one was missing."""
    changed = False
    for repository in REPOSITORIES.values():
        wanted = {tag: _built(repository, tag, behaviour) for tag, behaviour in repository.tags.items()}
        known = {(tag, entry["imageDigest"]) for entry in _known(repository) for tag in entry.get("imageTags") or [""]}
        missing = [tag for tag, made in wanted.items() if (tag, made.digest) not in known]
        if missing:
            changed = True
            with step(f"pushing {len(missing)} images to the repository {repository.name}"):
                for tag in missing:
                    publish(repository, tag, wanted[tag])
    return changed


def push(
    tag: str, behaviour: str = "healthy", *, repository: str = AI.name, foreign: bool = False, padding: int = 0
) -> str:
    """Push an image that behaves like this, and return its digest. A tag that is there already moves.

    A foreign image claims to be for another kind of processor than this machine's.
    With padding, it is larger by as many MiB that no compression makes smaller.
    """
    where = of_name(repository)
    if behaviour not in where.behaviours:
        raise LabError(f"no image of {where.name} behaves {behaviour!r}: one of {', '.join(where.behaviours)}")
    if not re.fullmatch(r"\w[\w.-]{0,127}", tag, re.ASCII):
        raise LabError(f"{tag!r} cannot be a tag: letters, digits, '_', '.' and '-', at most 128, not '.' or '-' first")
    made = _built(where, tag, behaviour, foreign=foreign, padding=padding)
    publish(where, tag, made)
    say(f"{where.name}:{tag} is {made.digest} ({behaviour})")
    return made.digest


def remove(tag: str, *, repository: str = AI.name) -> bool:
    """Take a tag, and the image under it, out of the repository; whether it was there."""
    where = of_name(repository)
    found = [entry["imageDigest"] for entry in _known(where) if tag in entry.get("imageTags", [])]
    if found:
        registry = Registry(pki.authority(STATE / "pki"))
        for digest in found:
            registry.delete_manifest(where.name, digest)
        identifiers = [{"imageDigest": digest} for digest in found]
        seed.client("ecr").batch_delete_image(repositoryName=where.name, imageIds=identifiers)
        say(f"{where.name}:{tag} is gone")
    return bool(found)


def of_name(name: str) -> Repository:
    """A repository that the lab can make images for."""
    if name not in REPOSITORIES:
        raise LabError(f"the lab makes no images for the repository {name!r}: one of {', '.join(REPOSITORIES)}")
    return REPOSITORIES[name]


# ---- one image


class Image:
    """The parts of one image, the lowest layer first."""

    def __init__(self, layers: list[Blob], configuration: dict[str, Any]) -> None:
        self.layers, self.config = layers, Blob.of(_json(configuration))
        self.manifest = _json(manifest_of(self.config, layers))
        self.digest = digest_of(self.manifest)


def _built(repository: Repository, tag: str, behaviour: str, *, foreign: bool = False, padding: int = 0) -> Image:
    base, base_diff = layers.base(image.debs() / "app")
    program = repository.layer()
    blobs, diffs = [Blob.of(base), Blob.of(gzip.compress(program, 9, mtime=0))], [base_diff, digest_of(program)]
    if padding:
        ballast = layers.archive({"opt/padding": (os.urandom(padding << 20), 0o644)})
        blobs.append(Blob.of(gzip.compress(ballast, 1, mtime=0)))
        diffs.append(digest_of(ballast))
    own = ARCHITECTURES[payload.machine()]
    architecture = next(name for name in ARCHITECTURES.values() if (name == own) != foreign)
    return Image(blobs, configuration(repository, tag, behaviour, architecture, diffs))


def configuration(
    repository: Repository, tag: str, behaviour: str, architecture: str, diffs: list[str]
) -> dict[str, Any]:
    """What an engine needs to run it: the tag is in the labels, so that no two tags share one digest."""
    created = _time_of(tag).strftime("%Y-%m-%dT%H:%M:%SZ")
    labels = {LABEL: "image", "org.opencontainers.image.version": tag or "untagged"}
    return {
        "architecture": architecture,
        "os": "linux",
        "created": created,
        "config": {**repository.configuration(tag, behaviour), "Labels": labels},
        "rootfs": {"type": "layers", "diff_ids": diffs},
        "history": [
            {"created": created, "created_by": f"nemo lab: {part}"}
            for part in ("Debian packages", repository.program, "padding")[: len(diffs)]
        ],
    }


def manifest_of(config: Blob, layers: list[Blob]) -> dict[str, Any]:
    """The manifest of an image: its digest is what the platform runs."""
    return {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": {"mediaType": CONFIG, "size": config.size, "digest": config.digest},
        "layers": [{"mediaType": LAYER, "size": layer.size, "digest": layer.digest} for layer in layers],
    }


def _time_of(tag: str) -> datetime.datetime:
    """When an image with this tag was built, by the platform's rule; a fixed day for a tag outside of it."""
    found = re.search(r"-(\d{8}-\d{4})$", tag)
    try:
        return datetime.datetime.strptime(found[1] if found else "", "%Y%m%d-%H%M")
    except ValueError:
        return datetime.datetime(2025, 7, 1)


def publish(repository: Repository, tag: str, made: Image) -> None:
    """Blobs, manifest, and then the API, so that an interrupted push is simply made again."""
    registry = Registry(pki.authority(STATE / "pki"))
    for blob in (*made.layers, made.config):
        registry.push_blob(repository.name, blob)
    registry.push_manifest(repository.name, tag or made.digest, made.manifest, MANIFEST)
    if any(entry["imageDigest"] == made.digest for entry in _known(repository)):
        return
    # moto makes a digest of its own up where it is not told the real one.
    seed.client("ecr").put_image(
        repositoryName=repository.name, imageManifest=made.manifest.decode(), imageManifestMediaType=MANIFEST,
        imageDigest=made.digest, **({"imageTag": tag} if tag else {}),
    )  # fmt: skip


def _known(repository: Repository) -> list[dict[str, Any]]:
    pages = seed.client("ecr").get_paginator("describe_images").paginate(repositoryName=repository.name)
    return [entry for page in pages for entry in page["imageDetails"]]


def _json(content: dict[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
