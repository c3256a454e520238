"""A restart, and what proves it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from ansible_collections.nemo.platform.plugins.module_utils.container_release import ReleaseError
from ansible_collections.nemo.platform.plugins.modules.service_restart import Restarter

BOX = "ai.r1"
RECORD = {
    "service": "ai", "release": "r1", "host_port": 20123,
    "settings": {"stop_timeout": 7, "memory": 1 << 30},
    "health": {"path": "/health", "status": 200, "timeout": 10, "interval": 1},
}  # fmt: skip


class Host:
    """An engine with one release of a service, and an init."""

    def __init__(self, tmp_path: Path, **state: Any) -> None:
        self.state = {"Status": "running", "Running": True, **state}
        self.restarts = 0
        self.there, self.unit_state, self.load_state = True, "active", "loaded"
        self.problems: list[str | None] = []
        self.probed: list[tuple[Any, ...]] = []
        self.asked: list[str] = []
        self.now = 0.0
        self.params = {"state_path": str(tmp_path), "run_path": str(tmp_path / "run"), "lock_timeout": 0}
        self.folder = tmp_path / "ai"
        self.folder.mkdir()
        self.write(
            "state.json", current="r1", releases=[RECORD, {**RECORD, "release": "r0"}],
            proxy={"address": "0.0.0.0", "port": 8000},
        )  # fmt: skip

    def write(self, name: str, **values: Any) -> None:
        (self.folder / name).write_text(json.dumps({"format": 2, **values}))

    def run(self, command: Sequence[str]) -> tuple[int, str, str]:
        words = " ".join(command)
        self.asked.append(words)
        if words.startswith("docker container inspect"):
            assert command[-1] == BOX
            data = {"Name": "/" + BOX, "State": self.state, "RestartCount": self.restarts, "Config": {"Labels": {}}}
            return (0, json.dumps(data), "") if self.there else (1, "", "Error: No such container: ai")
        if words.startswith("docker container restart"):
            self.restarts = 0
        if words.startswith("docker container logs"):
            return 0, "it said\n", "why\n"
        if words.startswith("docker container ls"):
            return 0, BOX + "\nother.r1\n" if self.there else "", ""
        if "LoadState" in words:
            return 0, f"LoadState={self.load_state}\n", ""
        if "ActiveState" in words:
            return 0, f"ActiveState={self.unit_state}\n", ""
        if words.startswith("journalctl"):
            return 0, "the unit said\n", ""
        return 0, "", ""

    def probe(self, *where: Any) -> str | None:
        self.probed.append(where)
        return self.problems.pop(0) if self.problems else None

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def restarter(self, check_mode: bool = False) -> Restarter:
        return Restarter(self.params, self.run, check_mode, self.probe, lambda: self.now, self.sleep)


def test_a_container_is_restarted_and_waited_for(tmp_path: Path) -> None:
    host = Host(tmp_path)
    host.problems = ["connection refused", "connection refused"]
    result = host.restarter().container("ai")
    assert "docker container restart -t 7 ai.r1" in host.asked
    assert {(address, port) for address, port, _question, _timeout in host.probed} == {("127.0.0.1", 8000)}
    assert result["changed"]
    assert result["msg"] == "ai was restarted; http://127.0.0.1:8000/health is healthy after 2.0 s"


def test_check_mode_restarts_nothing(tmp_path: Path) -> None:
    host = Host(tmp_path)
    assert host.restarter(check_mode=True).container("ai")["msg"] == "ai would be restarted"
    assert host.restarter(check_mode=True).unit("docker")["msg"] == "docker.service would be restarted"
    assert not [words for words in host.asked if "restart" in words]


def test_a_paused_one_is_resumed_first(tmp_path: Path) -> None:
    host = Host(tmp_path, Paused=True)
    host.restarter().container("ai")
    assert host.asked.index("docker container unpause ai.r1") < host.asked.index("docker container restart -t 7 ai.r1")


def test_one_that_does_not_become_healthy(tmp_path: Path) -> None:
    host = Host(tmp_path)
    host.problems = ["it answered 503, not 200"] * 100
    with pytest.raises(ReleaseError, match=r"health gave no healthy answer within 10 s: it answered 503") as error:
        host.restarter().container("ai")
    assert error.value.log_tail == ["it said", "why"]


def test_one_that_dies(tmp_path: Path) -> None:
    host = Host(tmp_path, Running=False, Status="exited", ExitCode=3)
    host.problems = ["connection refused"] * 100
    with pytest.raises(ReleaseError, match="ai: it ended with status 3") as error:
        host.restarter().container("ai")
    assert error.value.log_tail == ["it said", "why"]
    assert host.now == 0.0


def test_one_that_is_not_there_or_nobodys_release(tmp_path: Path) -> None:
    host = Host(tmp_path)
    with pytest.raises(ReleaseError, match="this host has no release of nope"):
        host.restarter().container("nope")
    host.there = False
    with pytest.raises(ReleaseError, match=r"the container ai\.r1 is gone"):
        host.restarter().container("ai")


def test_health_is_asked_for_as_the_release_says(tmp_path: Path) -> None:
    host = Host(tmp_path)
    health = {**RECORD["health"], "method": "POST", "body": "x", "request_timeout": 30}  # type: ignore[dict-item]
    host.write(
        "state.json",
        current="r1",
        releases=[{**RECORD, "health": health}],
        proxy={"address": "10.0.2.20", "port": 8002},
    )
    host.restarter().container("ai")
    (address, port, question, timeout) = host.probed[0]
    assert (address, port, question.method, question.body, timeout) == ("10.0.2.20", 8002, "POST", "x", 30.0)


def test_after_an_interrupted_release_nothing_is_touched(tmp_path: Path) -> None:
    host = Host(tmp_path)
    host.write("transition.json")
    with pytest.raises(ReleaseError, match="a release of ai was interrupted"):
        host.restarter().container("ai")
    assert not [words for words in host.asked if "restart" in words]


def test_a_unit_is_restarted_and_its_services_are_waited_for(tmp_path: Path) -> None:
    host = Host(tmp_path)
    host.problems = ["connection refused"]
    result = host.restarter().unit("docker")
    assert "systemctl restart docker.service" in host.asked
    assert result["msg"].startswith("docker.service was restarted; it is active, ai healthy after 1.5 s")


def test_a_unit_waits_for_a_release_that_is_at_work(tmp_path: Path) -> None:
    from ansible_collections.nemo.platform.plugins.module_utils.container_release import Lock

    lock = Lock(str(tmp_path / "run/ai.lock"))
    assert lock.try_acquire()
    host = Host(tmp_path)
    with pytest.raises(ReleaseError, match="another run is at work on ai"):
        host.restarter().unit("docker")
    assert "systemctl restart docker.service" not in host.asked
    lock.release()


def test_who_waits_for_the_restart_of_a_unit_is_told_so(tmp_path: Path) -> None:
    host = Host(tmp_path)
    host.restarter().unit("nginx")
    from ansible_collections.nemo.platform.plugins.module_utils.container_release import Lock

    lock = Lock(str(tmp_path / "run/ai.lock"))
    assert not lock.try_acquire()
    assert ", a restart of nginx.service" in lock.holder()


def test_a_unit_that_fails_or_is_not_there(tmp_path: Path) -> None:
    host = Host(tmp_path)
    host.unit_state = "failed"
    with pytest.raises(ReleaseError, match=r"docker.service is failed after its restart") as error:
        host.restarter().unit("docker")
    assert error.value.log_tail == ["the unit said"]
    host.load_state = "not-found"
    with pytest.raises(ReleaseError, match=r"this host has no unit nope.service"):
        host.restarter().unit("nope")
