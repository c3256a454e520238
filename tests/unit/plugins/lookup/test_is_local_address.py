"""Whether this machine has an address."""

from __future__ import annotations

import socket

import pytest
from ansible.errors import AnsibleLookupError

from ansible_collections.nemo.platform.plugins.lookup.is_local_address import LookupModule, is_local_address


@pytest.mark.parametrize(
    ("address", "local"),
    [("127.0.0.1", True), ("192.0.2.1", False), ("2001:db8::1", False), ("0.0.0.0", False), ("224.0.0.1", False)],
)
def test_address(address: str, local: bool) -> None:
    assert is_local_address(address) is local


def test_own_address() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("this machine has no network")
        assert is_local_address(probe.getsockname()[0])


def test_lookup() -> None:
    lookup = LookupModule()
    assert lookup.run(["192.0.2.1", "", "127.0.0.1"]) == [True]
    assert lookup.run([["192.0.2.1"]]) == [False]
    assert lookup.run([""]) == [False]
    with pytest.raises(AnsibleLookupError, match="'bastion' does not appear to be"):
        lookup.run(["bastion"])
