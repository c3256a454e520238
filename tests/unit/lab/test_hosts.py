"""The lab's hosts: who reaches which port, and how ssh gets there."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fcntl
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest

from lab import __main__ as commands
from lab import engine as engines
from lab import hosts
from lab.__main__ import engine_of_this_checkout
from lab.console import LabError
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

    own = True

    def __init__(self, containers: dict[str, tuple[str, bool]]) -> None:
        self.containers = containers

    def __call__(self, verb: str, *args: str, check: bool = True) -> str:
        if verb == "ps":
            return "\n".join(self.containers)
        if verb == "rm":
            assert "--volumes" in args
            if self.containers[args[-1]][1] and "--force" not in args:
                raise LabError("cannot remove a running container")
            del self.containers[args[-1]]
        return ""

    def inspect(self, kind: str, name: str) -> dict[str, object] | None:
        if kind == "network":
            return None
        owner, running = self.containers[name]
        return {"Config": {"Labels": {"nemo.lab": owner}}, "State": {"Running": running}}


MINE = str(hosts.STATE.parent)
EngineWith = Callable[..., engines.Engine]


@pytest.fixture
def engine_with(monkeypatch: pytest.MonkeyPatch) -> EngineWith:
    """An engine with these containers is the one that answers."""

    def make(**containers: tuple[str, bool]) -> engines.Engine:
        made = cast("engines.Engine", OneEngine(containers))
        monkeypatch.setattr(engines, "ensure", lambda: made)
        monkeypatch.setattr(engines, "running", lambda: made)
        return made

    return make


def left(engine: engines.Engine) -> list[str]:
    return list(cast("OneEngine", engine).containers)


def test_while_a_host_of_another_checkout_runs_this_one_has_no_lab(engine_with: EngineWith, tmp_path: Path) -> None:
    engine = engine_with(a=(str(tmp_path), True), b=(str(tmp_path), False), c=(MINE, True))
    with pytest.raises(LabError, match=f"run `make lab-down` in {tmp_path} first"):
        engine_of_this_checkout()
    assert left(engine) == ["a", "b", "c"]


def test_a_lab_that_is_being_brought_up_counts_as_up(engine_with: EngineWith, tmp_path: Path) -> None:
    (tmp_path / ".lab").mkdir()
    engine_with(a=(str(tmp_path), False))
    with (tmp_path / ".lab/lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(LabError, match="run `make lab-down`"):
            engine_of_this_checkout()


def test_what_a_killed_engine_left_of_another_lab_goes(engine_with: EngineWith, tmp_path: Path) -> None:
    (tmp_path / ".lab").mkdir()
    (tmp_path / ".lab/lock").touch()
    engine = engine_with(a=(str(tmp_path), False), b=(str(tmp_path / "gone"), True), c=(MINE, False))
    engine_of_this_checkout()
    assert left(engine) == ["c"]


def test_what_another_checkout_starts_meanwhile_stays(engine_with: EngineWith, tmp_path: Path) -> None:
    engine = engine_with(a=(str(tmp_path), True))
    with pytest.raises(LabError, match="running"):
        hosts.remove_left(engine)
    assert left(engine) == ["a"]


def test_lab_down_leaves_another_checkouts_hosts_stopped_or_not(
    engine_with: EngineWith, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_with(a=(str(tmp_path), False), b=(str(tmp_path / "gone"), False), c=(MINE, True))
    monkeypatch.setattr(hosts, "KNOWN_HOSTS", tmp_path / "known_hosts")
    hosts.down(engine)
    assert left(engine) == ["a"]
    assert hosts.others(engine) == {str(tmp_path): False}


@pytest.mark.parametrize("of_another", [True, False])
def test_lab_down_stops_the_engine_only_where_no_other_checkout_has_hosts(
    engine_with: EngineWith, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, of_another: bool
) -> None:
    engine_with(a=(str(tmp_path) if of_another else MINE, False))
    stopped = []
    monkeypatch.setattr(engines, "stop", lambda: stopped.append("the engine"))
    monkeypatch.setattr(hosts, "KNOWN_HOSTS", tmp_path / "known_hosts")
    monkeypatch.setattr(commands, "only_one", contextlib.nullcontext)  # a lab command may be at work beside the tests
    commands.down(argparse.Namespace())
    assert stopped == ([] if of_another else ["the engine"])


def test_a_checkout_in_a_home_that_cannot_be_read_is_not_gone(
    engine_with: EngineWith, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError

    monkeypatch.setattr(Path, "stat", refuse)
    assert hosts.others(engine_with(a=("/home/alice/project", True))) == {"/home/alice/project": True}
