"""Entries of the catalogue with their names."""

from __future__ import annotations

import pytest
from ansible.errors import AnsibleFilterError

from ansible_collections.nemo.platform.plugins.filter.catalogue import FilterModule, catalogue_entries

CATALOGUE = {"ai-prod": {"port": 8000}, "ai-dev": {"port": 8001}}


def test_entries_in_the_order_asked() -> None:
    assert catalogue_entries(["ai-prod", "ai-dev"], CATALOGUE) == [
        {"name": "ai-prod", "port": 8000},
        {"name": "ai-dev", "port": 8001},
    ]
    assert catalogue_entries([], CATALOGUE) == []
    assert set(FilterModule().filters()) == {"catalogue_entries"}


def test_unknown_name_lists_the_known() -> None:
    with pytest.raises(AnsibleFilterError, match="no such service: ai-test; the catalogue has ai-dev, ai-prod"):
        catalogue_entries(["ai-test"], CATALOGUE)


def test_what_is_left_out_is_not_touched() -> None:
    class Lazy(dict[str, object]):
        def __getitem__(self, key: str) -> object:
            assert key != "secrets", "it may have no value here"
            return super().__getitem__(key)

    entry = Lazy(port=8000, secrets="{{ nobody_knows }}")
    assert catalogue_entries(["x"], {"x": entry}, without=["secrets"]) == [{"name": "x", "port": 8000}]
