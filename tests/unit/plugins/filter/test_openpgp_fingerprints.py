"""Fingerprints of keys that are known, and of what is none."""

from __future__ import annotations

import pytest

from ansible_collections.nemo.platform.plugins.filter.openpgp_fingerprints import openpgp_fingerprints
from tests.unit.helpers import ROOT

KEYS = sorted(path for path in (ROOT / "roles").glob("*/files/*.asc") if len(path.stem) == 40)


@pytest.mark.parametrize("path", KEYS, ids=lambda path: path.stem)
def test_a_key_of_a_role_is_the_one_that_its_name_says(path) -> None:
    assert openpgp_fingerprints(path.read_text()) == [path.stem]


def test_keys_are_there() -> None:
    assert KEYS


def test_two_keys_one_after_the_other() -> None:
    assert openpgp_fingerprints("".join(path.read_text() for path in KEYS[:2])) == [path.stem for path in KEYS[:2]]


def test_a_key_with_a_header_line() -> None:
    text = KEYS[0].read_text().replace("BLOCK-----\n", "BLOCK-----\nVersion: GnuPG v2\n", 1)
    assert openpgp_fingerprints(text) == [KEYS[0].stem]


def test_another_key_has_another_fingerprint() -> None:
    lines = KEYS[0].read_text().splitlines()
    lines[4] = lines[4][:10] + ("A" if lines[4][10] != "A" else "B") + lines[4][11:]
    assert openpgp_fingerprints("\n".join(lines)) != [KEYS[0].stem]


@pytest.mark.parametrize(
    "text",
    ["", "no key", "-----BEGIN PGP PUBLIC KEY BLOCK-----\n\n!!!\n-----END PGP PUBLIC KEY BLOCK-----\n",
     "-----BEGIN PGP PUBLIC KEY BLOCK-----\n\naGVsbG8gd29ybGQ=\n-----END PGP PUBLIC KEY BLOCK-----\n"],
)  # fmt: skip
def test_what_is_no_key(text: str) -> None:
    assert openpgp_fingerprints(text) == []
