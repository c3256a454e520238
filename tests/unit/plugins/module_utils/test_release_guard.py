"""The guard's script, run by a shell with stand-ins for docker and systemctl, and a lock that a run holds until it is killed."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from ansible_collections.nemo.platform.plugins.module_utils.container_release import Lock, ReleaseError, Store
from ansible_collections.nemo.platform.plugins.module_utils.release_guard import Guard
from ansible_collections.nemo.platform.plugins.module_utils.release_proxy import HAProxy
from tests.unit.plugins.module_utils.test_proxy_rules import settings

OLD_PORT, NEW_PORT = 20001, 20002
RELEASE = "20260101T000000Z-abcdef"
OLD, NEW = "api.20250101T000000Z-abcdef", f"api.{RELEASE}"


class Host:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.lock = str(path / "run/api.lock")
        self.store = Store("api", str(path / "lib"), str(path / "run"))
        self.proxy = HAProxy("api", lambda *_: (0, "", ""), "haproxy", folder=str(path))
        self.guard = Guard(
            "api",
            lambda *_: (0, "", ""),
            self.lock,
            str(Path(self.store.base) / "transition.json"),
            self.proxy.configuration,
        )
        programs = path / "bin"
        programs.mkdir()
        for name in ("docker", "systemctl"):
            program = programs / name
            program.write_text(f'#!/bin/sh\necho "{name} $*" >> {path}/done\n')
            program.chmod(0o755)
        self.environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}

    def leads_to(self, active: str, check: bool = False) -> None:
        Path(self.proxy.configuration).write_text(
            self.proxy.render(settings(proxy_check=check), active, {"a": OLD_PORT, "b": NEW_PORT})
        )

    def journal(self, release: str = RELEASE) -> None:
        self.store.write("transition.json", {"step": "start", "record": {"release": release}, "from": RELEASE})

    def start(self, port: int = OLD_PORT) -> subprocess.Popen[bytes]:
        script = self.guard.script(OLD, NEW, 9, port)
        return subprocess.Popen(["/bin/sh", "-c", script], env=self.environment, stdout=subprocess.DEVNULL)

    def done(self) -> list[str]:
        file = self.path / "done"
        return file.read_text().splitlines() if file.exists() else []


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


BACK = [f"docker container stop --time 9 {NEW}", f"docker container start {OLD}"]
RELOAD = ["systemctl reload nemo-proxy-api.service"]


@pytest.mark.parametrize("check", [False, True])
def test_the_old_release_starts_again_once_the_run_is_gone(host: Host, check: bool) -> None:
    host.leads_to("a", check)
    host.journal()
    lock = Lock(host.lock)
    assert lock.try_acquire()
    unit = host.start()
    with pytest.raises(subprocess.TimeoutExpired):
        unit.wait(0.5)
    assert host.done() == []
    lock.release()  # as the kernel does when the run is killed
    unit.wait(5)
    assert host.done() == BACK + RELOAD


def test_a_proven_release_stays_and_haproxy_reads_its_file(host: Host) -> None:
    host.leads_to("b", check=True)
    host.journal()
    (host.path / "run").mkdir()
    host.start().wait(5)
    assert host.done() == RELOAD


@pytest.mark.parametrize("release", ["", "20260102T000000Z-fedcba"])
def test_a_run_that_ended_or_another_one_is_none_of_its_business(host: Host, release: str) -> None:
    host.leads_to("a")
    if release:
        host.journal(release)
    (host.path / "run").mkdir()
    host.start().wait(5)
    assert host.done() == []


def test_a_container_of_before_haproxy_is_started_without_one(host: Host) -> None:
    host.journal()
    (host.path / "run").mkdir()
    host.start(port=0).wait(5)
    assert host.done() == BACK


def test_haproxy_in_the_place_of_a_container_of_before_is_left_alone(host: Host) -> None:
    """It holds the port: the old container could not start, and the new release is proven."""
    host.leads_to("a")
    host.journal()
    (host.path / "run").mkdir()
    host.start(port=0).wait(5)
    assert host.done() == []


def test_a_guard_that_cannot_be_started_stops_the_release_before_anything_stops(host: Host) -> None:
    guard = Guard("api", lambda words, *_: (int(words[0] == "systemd-run"), "", "no bus"), "lock", "transition", "file")
    with pytest.raises(ReleaseError, match="cannot be started: no bus"):
        guard.watch(OLD, NEW, 9, OLD_PORT)


def test_its_transition_is_that_of_the_store(host: Host) -> None:
    host.journal()
    assert json.loads(Path(host.guard.transition).read_text())["record"]["release"] == RELEASE
