"""What is said of an endpoint from where the module runs."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from ansible_collections.nemo.platform.plugins.modules import endpoint_info as module


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    server = socket.create_server(("127.0.0.1", 0))
    yield server
    server.close()


def test_one_that_answers(listener: socket.socket) -> None:
    url = f"https://localhost:{listener.getsockname()[1]}/"
    found = module.examine(url, True, ["127.0.0.0/8", "::1/128"], 2)
    assert found == {"url": url, "addresses": found["addresses"], "problem": ""}
    assert "127.0.0.1" in found["addresses"]


def test_one_that_does_not_answer(listener: socket.socket) -> None:
    port = listener.getsockname()[1]
    listener.close()
    problem = module.examine(f"https://127.0.0.1:{port}", False, [], 2)["problem"]
    assert (
        f"127.0.0.1 (127.0.0.1) does not answer on port {port} (connection refused): check the security groups"
        in problem
    )


def test_a_name_that_leads_nowhere() -> None:
    found = module.examine("https://no-such-name.invalid", True, [], 2)
    assert found["addresses"] == []
    assert found["problem"].startswith("no-such-name.invalid cannot be resolved here (")


@pytest.mark.parametrize(
    ("addresses", "networks", "says"),
    [
        (["203.0.113.7"], ["10.0.0.0/16"], "outside 10.0.0.0/16"),
        (["10.1.0.1"], ["10.0.0.0/16", "172.16.0.0/12"], "outside 10.0.0.0/16 or 172.16.0.0/12"),
        (["8.8.8.8"], [], "outside a private network"),
    ],
)
def test_a_name_that_leads_out_of_the_vpc(monkeypatch, addresses, networks, says) -> None:
    monkeypatch.setattr(module, "look_up", lambda name, port: addresses)
    problem = module.examine("https://x", True, networks, 2)["problem"]
    assert f"x leads to {addresses[0]}, {says}: its private endpoint is off" in problem


def test_a_public_endpoint_may_lead_anywhere(monkeypatch) -> None:
    tried = []
    monkeypatch.setattr(module, "look_up", lambda name, port: ["203.0.113.7"])
    monkeypatch.setattr(module, "connect", lambda *arguments: tried.append(arguments))
    assert module.examine("https://x", False, ["10.0.0.0/16"], 2)["problem"] == ""
    assert tried == [("203.0.113.7", 443, 2)]


def test_networks_that_are_none() -> None:
    with pytest.raises(ValueError, match=r"10\.0\.0\.1/16"):
        module.outside([], ["10.0.0.1/16"])
