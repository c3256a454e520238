"""What Galaxy users install is what the `ansible` package ships."""

from __future__ import annotations

import json
import re
from pathlib import Path

import ansible_collections
import pytest
import yaml

from tests.unit.helpers import ROOT

REQUIREMENTS = {
    entry["name"]: entry["version"]
    for entry in yaml.safe_load((ROOT / "collections" / "requirements.yml").read_text())["collections"]
}


@pytest.mark.parametrize("name", sorted(REQUIREMENTS))
def test_version_of_the_ansible_package(name: str) -> None:
    manifests = [Path(base, *name.split("."), "MANIFEST.json") for base in ansible_collections.__path__]
    shipped = [json.loads(path.read_text())["collection_info"]["version"] for path in manifests if path.exists()]
    assert shipped == [REQUIREMENTS[name]]


def test_same_as_the_collection_asks_for() -> None:
    assert yaml.safe_load((ROOT / "galaxy.yml").read_text())["dependencies"] == REQUIREMENTS


LOCKS = ("requirements/controller", "requirements/dev", "lab/aws/requirements", "lab/vllm/requirements")


def pins(file: str, name: str) -> list[str]:
    return re.findall(rf"^{name}==(\S+)", (ROOT / file).read_text(), re.MULTILINE)


def test_the_lab_and_its_tests_have_the_same_moto() -> None:
    wanted = pins("requirements/dev.in", "moto")
    assert len(wanted) == 1
    for file in ("requirements/dev.txt", "lab/aws/requirements.in", "lab/aws/requirements.txt"):
        assert pins(file, "moto") == wanted, file


@pytest.mark.parametrize("lock", LOCKS)
def test_lock_names_no_index(lock: str) -> None:
    for suffix in ("in", "txt"):
        found = re.findall(
            r".*(?:--(?:extra-)?index|--find-links|://).*|^-[if] .*",
            (ROOT / f"{lock}.{suffix}").read_text(),
            re.MULTILINE,
        )
        assert found == [], f"{lock}.{suffix}"


@pytest.mark.parametrize("lock", LOCKS)
def test_lock_has_hashes_and_comes_from_make_lock(lock: str) -> None:
    text = (ROOT / f"{lock}.txt").read_text()
    assert "#    make lock\n" in text
    packages = re.findall(r"^[A-Za-z0-9][^\n]*\n(.*)", text, re.MULTILINE)
    assert packages
    assert all(after.startswith("    --hash=sha256:") for after in packages)
    assert lock in (ROOT / "scripts/lock").read_text()


@pytest.mark.parametrize("lock", [lock for lock in LOCKS if lock.startswith("lab/")])
def test_the_locks_of_the_lab_have_no_markers(lock: str) -> None:
    """pip would judge them by the machine's Python, not by that of the lab's hosts."""
    assert not re.findall(r"^[^#\n]*;.*", (ROOT / f"{lock}.txt").read_text(), re.MULTILINE)


def test_link_to_the_checkout() -> None:
    link = ROOT / "collections" / "ansible_collections" / "nemo" / "platform"
    assert str(link.readlink()) == "../../.."
