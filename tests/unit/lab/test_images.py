"""Images made without an engine: what a registry and an engine insist on."""

from __future__ import annotations

import datetime
import hashlib
import io
import json
import tarfile

import pytest

from lab.aws import images
from lab.console import LabError


def configuration(tag: str, behaviour: str = "healthy") -> bytes:
    return images._json(images.configuration(tag, behaviour, "amd64", ["sha256:a", "sha256:b"]))


def test_the_manifest_names_what_it_is_made_of() -> None:
    manifest = images.manifest_of(b"{}", [b"layer"])
    assert manifest["config"]["digest"] == "sha256:" + hashlib.sha256(b"{}").hexdigest()
    assert manifest["layers"] == [
        {"mediaType": images.LAYER, "size": 5, "digest": "sha256:" + hashlib.sha256(b"layer").hexdigest()}
    ]


def test_each_tag_and_each_behaviour_has_a_digest_of_its_own() -> None:
    every = [configuration(tag, behaviour) for tag in images.TAGS for behaviour in images.BEHAVIOURS]
    assert len({images.digest_of(images._json(images.manifest_of(config, []))) for config in every}) == len(every)


def test_the_same_image_has_the_same_digest() -> None:
    assert configuration("prod-20250718-1040") == configuration("prod-20250718-1040")


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
    first = images._archive({"b": (b"2", 0o755), "a/c": (b"1", 0o644)}, {"bin": "usr/bin"}, {"tmp": 0o1777})
    second = images._archive({"a/c": (b"1", 0o644), "b": (b"2", 0o755)}, {"bin": "usr/bin"}, {"tmp": 0o1777})
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
