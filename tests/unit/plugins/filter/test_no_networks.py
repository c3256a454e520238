"""The filter no_networks."""

from __future__ import annotations

from typing import Any

import pytest

from ansible_collections.nemo.platform.plugins.filter.no_networks import FilterModule

no_networks = FilterModule().filters()["no_networks"]


def test_networks() -> None:
    assert (
        no_networks(["10.0.3.0/24", "10.0.3.7/24", "127.0.0.0/8", "::1/128", "fd00::/8", "::ffff:10.0.0.0/104"]) == []
    )


@pytest.mark.parametrize(
    "entry",
    [
        "10.0.3/24",
        "10.0.3.0/33",
        "::g/8",
        "::1/129",
        "anywhere",
        "10.0.3.7",
        "10.0.3.0/255.255.255.0",
        "fe80::%eth0/64",
        " ::1/128",
        "",
        10,
    ],
)
def test_what_is_none_is_told(entry: Any) -> None:
    assert no_networks(["10.0.3.0/24", entry, "::1/128"]) == [entry]
