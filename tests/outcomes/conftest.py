"""What the running lab must show. Without a lab these tests fail: a skipped outcome would look like a good one."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from typing import Any

import pytest
import testinfra

from lab import hosts
from lab.settings import HOSTS, USER

BY_NAME = {host.name: host for host in HOSTS}


def pytest_sessionstart() -> None:
    if not hosts.is_up():
        pytest.exit("the lab is down: `make lab` brings it up", returncode=1)


@pytest.fixture(scope="session")
def on() -> Callable[[str], Any]:
    """testinfra's view of a host of the lab, as root, by the same SSH that operators use."""
    made: dict[str, Any] = {}

    def get(name: str) -> Any:
        if name not in made:
            made[name] = testinfra.get_host(
                f"ssh://{USER}@{name}?ssh_config={hosts.SSH_CONFIG}&sudo=true&controlpersist=60", timeout=30
            )
        return made[name]

    return get


@pytest.fixture
def container(on: Callable[[str], Any]) -> Callable[[str, str], str]:
    """The container that runs a service on a host: its release is part of its name."""

    def name(host: str, service: str) -> str:
        listing = "docker ps --filter label=nemo.service=%s --format '{{.Names}}'"
        (found,) = on(host).check_output(listing, service).split()
        return str(found)

    return name


@pytest.fixture
def ssh_from() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a command on a host as the plain login user, without sudo."""

    def call(name: str, command: str) -> subprocess.CompletedProcess[str]:
        argv = ["ssh", "-F", str(hosts.SSH_CONFIG), name, command]
        return subprocess.run(argv, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL, check=False)

    return call


@pytest.fixture
def get_json(ssh_from: Callable[..., subprocess.CompletedProcess[str]]) -> Callable[[str, str], Any]:
    """The JSON that a URL answers, asked for by curl on a host of the lab."""

    def call(name: str, url: str) -> Any:
        done = ssh_from(name, f"curl --silent --show-error --fail --max-time 10 '{url}'")
        assert done.returncode == 0, f"{url} from {name}: {done.stderr}"
        return json.loads(done.stdout)

    return call


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    """A failed test about a unit prints that unit's journal: `pytestmark = pytest.mark.journal("host", "unit")`."""
    outcome = yield
    report = outcome.get_result()
    if report.when == "call" and report.failed:
        for mark in item.iter_markers("journal"):
            host, unit = mark.args
            argv = ["ssh", "-F", str(hosts.SSH_CONFIG), host, f"sudo journalctl --no-pager --lines=30 --unit={unit}"]
            done = subprocess.run(
                argv, capture_output=True, text=True, timeout=60, check=False, stdin=subprocess.DEVNULL
            )
            report.sections.append((f"journal of {unit} on {host}", done.stdout + done.stderr))
