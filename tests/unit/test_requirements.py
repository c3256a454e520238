"""What Galaxy users install is what the `ansible` package ships."""

from __future__ import annotations

import json
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


def test_link_to_the_checkout() -> None:
    link = ROOT / "collections" / "ansible_collections" / "nemo" / "platform"
    assert str(link.readlink()) == "../../.."
