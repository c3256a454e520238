"""Images made without an engine: what a registry and an engine insist on."""

from __future__ import annotations

import datetime
import hashlib
import io
import json
import tarfile

import pytest

from lab.aws import images, layers, seed
from lab.aws.registry import Blob
from lab.console import LabError

EVERY = list(images.REPOSITORIES.values())


def configuration(tag: str, behaviour: str = "healthy", repository: images.Repository = images.AI) -> bytes:
    return images._json(images.configuration(repository, tag, behaviour, "amd64", ["sha256:a", "sha256:b"]))


def test_the_manifest_names_what_it_is_made_of() -> None:
    manifest = images.manifest_of(Blob.of(b"{}"), [Blob.of(b"layer")])
    assert manifest["config"]["digest"] == "sha256:" + hashlib.sha256(b"{}").hexdigest()
    assert manifest["layers"] == [
        {"mediaType": images.LAYER, "size": 5, "digest": "sha256:" + hashlib.sha256(b"layer").hexdigest()}
    ]


@pytest.mark.parametrize("repository", EVERY, ids=lambda repository: repository.name)
def test_each_tag_and_each_behaviour_has_a_digest_of_its_own(repository: images.Repository) -> None:
    every = [
        configuration(tag, behaviour, repository) for tag in repository.tags for behaviour in repository.behaviours
    ]
    assert len({images.digest_of(images._json(images.manifest_of(Blob.of(config), []))) for config in every}) == len(
        every
    )


def test_the_same_image_has_the_same_digest() -> None:
    assert configuration("prod-20250718-1040") == configuration("prod-20250718-1040")


def test_the_account_has_each_repository_and_images_behave_as_they_can() -> None:
    assert {repository.name for repository in EVERY} <= set(seed.REPOSITORIES)
    for repository in EVERY:
        assert set(repository.tags.values()) <= set(repository.behaviours)


def environment(tag: str, behaviour: str = "healthy") -> dict[str, str]:
    config = json.loads(configuration(tag, behaviour, images.VLLM))["config"]
    return dict(entry.split("=", 1) for entry in config["Env"])


@pytest.mark.parametrize(
    ("tag", "behaviour", "cuda", "needs", "version"),
    [
        ("v0.34.0", "healthy", "13.0.2", "cuda>=13.0", "0.34.0"),
        ("v0.33.0-cu129", "healthy", "12.9.1", "cuda>=12.9", "0.33.0"),
        ("newer-cuda", "newer-cuda", "13.4.0", "cuda>=13.4", "0.33.0"),
    ],
)
def test_an_inference_image_says_which_cuda_it_needs(
    tag: str, behaviour: str, cuda: str, needs: str, version: str
) -> None:
    found = environment(tag, behaviour)
    assert found["CUDA_VERSION"] == cuda
    assert found["NVIDIA_REQUIRE_CUDA"].split()[0] == needs
    assert found["NVIDIA_DRIVER_CAPABILITIES"] == "compute,utility"
    assert found["LAB_VERSION"] == version


def test_no_older_driver_makes_up_for_the_newest_cuda() -> None:
    assert "driver>=570" in environment("v0.33.0")["NVIDIA_REQUIRE_CUDA"]
    assert environment("newer-cuda", "newer-cuda")["NVIDIA_REQUIRE_CUDA"] == "cuda>=13.4"


def test_an_image_does_not_run_as_root_and_does_not_name_its_release() -> None:
    config = json.loads(configuration("prod-20250718-1040"))["config"]
    assert config["User"] == "10001"
    assert not [entry for entry in config["Env"] if entry.startswith("IMAGE_")]  # that is for the role to say


@pytest.mark.parametrize(
    ("tag", "moment"),
    [
        ("prod-20250718-1040", datetime.datetime(2025, 7, 18, 10, 40)),
        ("prod-20251301-2561", datetime.datetime(2025, 7, 1)),
        ("prod-latest", datetime.datetime(2025, 7, 1)),
        ("", datetime.datetime(2025, 7, 1)),
    ],
)
def test_the_time_of_a_build_comes_from_its_tag(tag: str, moment: datetime.datetime) -> None:
    assert images._time_of(tag) == moment


def test_an_archive_depends_on_its_contents_alone() -> None:
    first = layers.archive({"b": (b"2", 0o755), "a/c": (b"1", 0o644)}, {"bin": "usr/bin"}, {"tmp": 0o1777})
    second = layers.archive({"a/c": (b"1", 0o644), "b": (b"2", 0o755)}, {"bin": "usr/bin"}, {"tmp": 0o1777})
    assert first == second
    with tarfile.open(fileobj=io.BytesIO(first)) as archive:
        assert archive.getnames() == ["a", "a/c", "b", "bin", "tmp"]
        assert archive.getmember("tmp").mode == 0o1777
        assert archive.getmember("a").isdir()
        assert archive.getmember("bin").linkname == "usr/bin"


@pytest.mark.parametrize("tag", ["", "-x", ".x", "a b", "a/b", "x" * 129, "täg"])
def test_a_tag_that_no_registry_takes_is_refused(tag: str) -> None:
    with pytest.raises(LabError, match="cannot be a tag"):
        images.push(tag)


def test_an_unknown_behaviour_is_refused() -> None:
    with pytest.raises(LabError, match="one of healthy, unhealthy"):
        images.push("prod-20260101-0000", "broken")
    with pytest.raises(LabError, match="one of healthy, slow, oom"):
        images.push("v0.35.0", "leak", repository=images.VLLM.name)


def test_a_repository_that_the_lab_makes_nothing_for_is_refused() -> None:
    with pytest.raises(LabError, match="'backend': one of ai, vllm-openai"):
        images.push("v1", repository="backend")
