"""The lab's hosts: who reaches which port, and how ssh gets there."""

from __future__ import annotations

import dataclasses
import fcntl
import pathlib

import pytest

from lab import hosts
from lab.settings import BASTION, HOSTS, INSTANCES, NODE, OPERATORS


def allowed(host: hosts.Host) -> list[str]:
    lines = hosts.security_group(host).splitlines()
    first = next(number for number, line in enumerate(lines) if "icmpv6" in line) + 1
    last = next(number for number, line in enumerate(lines) if "reject" in line)
    return [line.strip() for line in lines[first:last]]


def test_the_bastion_is_for_the_machine_alone() -> None:
    assert allowed(BASTION) == ["ip saddr 10.0.0.1 tcp dport 22 accept"]


@pytest.mark.parametrize("host", [host for host in HOSTS if host != BASTION], ids=lambda host: host.name)
def test_ai_hosts_are_for_the_nodes_the_bastion_and_each_other(host: hosts.Host) -> None:
    assert allowed(host) == [
        "ip saddr 10.0.1.10 tcp dport 22 accept",
        "ip saddr { 10.0.3.0-10.0.5.255, 10.0.1.10 } tcp dport { 8000-8002, 9836 } accept",
        "ip saddr { 10.0.2.20, 10.0.2.31, 10.0.2.32 } tcp dport 8002 accept",
    ]


def test_a_node_is_for_the_vpc_and_its_ssh_for_the_bastion() -> None:
    assert allowed(NODE) == [
        "ip saddr 10.0.1.10 tcp dport 22 accept",
        "ip saddr 10.0.0.0/16 ip saddr != 10.0.0.1 tcp dport != 22 accept",
    ]


def test_instances_have_names_and_addresses_of_their_own() -> None:
    assert len({host.address for host in INSTANCES}) == len({host.name for host in INSTANCES}) == len(INSTANCES)


def blocks(text: str) -> dict[str, dict[str, str]]:
    """The settings of an ssh configuration by the pattern of their block."""
    found: dict[str, dict[str, str]] = {}
    current: dict[str, str] = {}
    for line in text.splitlines():
        word, _, value = line.strip().partition(" ")
        if word == "Host":
            current = found.setdefault(value, {})
        else:
            current.setdefault(word, value)
    return found


def test_the_platforms_user_goes_everywhere_with_one_key() -> None:
    everywhere = blocks(hosts.ssh_config())["*"]
    assert (everywhere["User"], everywhere["IdentityFile"]) == ("ec2-user", f'"{hosts.KEY}"')
    assert everywhere["ProxyJump"] == "bastion"


@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_goes_to_the_bastion_as_herself(name: str) -> None:
    found = blocks(hosts.ssh_config(name))
    bastion = found["bastion 10.0.1.10"]
    assert (bastion["User"], bastion["ProxyJump"]) == (name, "none")
    assert bastion["IdentityFile"] == f'"{hosts.OPERATORS_KEYS / name}"'
    assert "IdentityFile" not in found["*"], "the Bastion is not offered the platform's key"
    others = next(settings for hosts_, settings in found.items() if "10.0.2.31" in hosts_)
    assert others["IdentityFile"] == f'"{hosts.KEY}"'


def test_only_some_hosts_have_listeners() -> None:
    assert hosts._listeners(BASTION) == ([], [])
    files, units = hosts._listeners(dataclasses.replace(NODE, role="eks-node", address="10.9.9.9"))
    unit = {path: data for path, data, _ in files}[f"/etc/systemd/system/{units[0]}.service"]
    assert b"kafka=10.9.9.9:9094" in unit


class OneEngine:
    """An engine with containers of labs, by name: the checkout that owns each, and whether it runs."""

    def __init__(self, containers: dict[str, tuple[str, bool]]) -> None:
        self.containers = containers

    def __call__(self, verb: str, *args: str) -> str:
        if verb == "ps":
            return "\n".join(self.containers)
        assert verb == "rm"
        del self.containers[args[-1]]
        return ""

    def inspect(self, _kind: str, name: str) -> dict[str, object]:
        owner, running = self.containers[name]
        return {"Config": {"Labels": {"nemo.lab": owner}}, "State": {"Running": running}}


def test_a_lab_of_another_checkout_counts_while_one_of_its_hosts_runs(tmp_path: pathlib.Path) -> None:
    mine = str(hosts.STATE.parent)
    engine = OneEngine({"a": (str(tmp_path), True), "b": (str(tmp_path), False), "c": (mine, True)})
    assert hosts.others(engine) == {str(tmp_path)}  # type: ignore[arg-type]


def test_a_lab_whose_engine_was_killed_does_not_count(tmp_path: pathlib.Path) -> None:
    (tmp_path / ".lab").mkdir()
    (tmp_path / ".lab/lock").touch()
    engine = OneEngine({"a": (str(tmp_path), False), "b": (str(tmp_path), False)})
    assert hosts.others(engine) == set()  # type: ignore[arg-type]


def test_a_lab_of_a_checkout_that_is_gone_does_not_count(tmp_path: pathlib.Path) -> None:
    engine = OneEngine({"a": (str(tmp_path / "gone"), True)})
    assert hosts.others(engine) == set()  # type: ignore[arg-type]


def test_a_lab_that_is_being_brought_up_counts(tmp_path: pathlib.Path) -> None:
    (tmp_path / ".lab").mkdir()
    engine = OneEngine({"a": (str(tmp_path), False)})
    with (tmp_path / ".lab/lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert hosts.others(engine) == {str(tmp_path)}  # type: ignore[arg-type]


def test_taking_over_removes_what_others_left_and_no_host_of_this_checkout(tmp_path: pathlib.Path) -> None:
    mine = str(hosts.STATE.parent)
    engine = OneEngine({"a": (str(tmp_path), False), "b": (str(tmp_path / "gone"), True), "c": (mine, False)})
    hosts.take_over(engine)  # type: ignore[arg-type]
    assert list(engine.containers) == ["c"]
