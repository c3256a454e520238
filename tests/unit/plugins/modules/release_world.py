"""One host for tests of releases: its engine, its HAProxy, its files, its clock, and a client of the service."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from ansible_collections.nemo.platform.plugins.module_utils import container_release as logic
from ansible_collections.nemo.platform.plugins.module_utils.release_flow import Releaser
from ansible_collections.nemo.platform.plugins.modules import container_release as module
from tests.unit.plugins.modules.fake_docker import FakeDocker, image
from tests.unit.plugins.modules.fake_proxy import FakeProxy

USER = f"{os.getuid()}:{os.getgid()}"
SECRET = "s3cret-value-that-must-not-appear"
TAGS = {1: "prod-20260101-0001", 2: "prod-20260101-0002", 3: "prod-20260101-0003", 4: "prod-20260101-0004"}
PORT = 8000


class FakeGuard:
    """What is left of release_guard.Guard when the run is gone: its orders, on disk."""

    def __init__(self, path: Path, after: Callable[[str], None]) -> None:
        self.path, self.after = path, after

    def watch(self, old: str, new: str, seconds: int, port: int) -> None:
        self.path.write_text(json.dumps({"old": old, "new": new, "port": port}))
        self.after("guard")


class World:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.engine = FakeDocker(path / "engine.json")
        self.proxy = FakeProxy(path / "proxy.json", self.engine)
        self.listening: str | None = None
        self.memory = (4 << 30, 3 << 30)
        self.now = 0.0
        for number, behaviour in ((1, "healthy"), (2, "healthy"), (3, "unhealthy"), (4, "healthy")):
            self.engine.push(TAGS[number], image(number, behaviour))

    def params(self, number: int | None, **values: Any) -> dict[str, Any]:
        given = {
            "name": "ai-prod",
            "image": "registry/ai",
            "tag": TAGS.get(number or 0),
            "digest": image(number)["digest"] if number else None,
            "port": PORT,
            "user": USER,
            "health_timeout": 3,
            "settle_time": 1,
            "bake_time": 2,
            "drain_timeout": 5,
            "min_free_disk_mb": 0,
            "state_path": str(self.path / "lib"),
            "run_path": str(self.path / "run"),
            "secrets": {"TOKEN": SECRET},
        }
        defaults = {key: spec.get("default") for key, spec in module.ARGUMENTS.items()}
        return {**defaults, **given, **values}

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def probe(self, address: str, port: int, question: logic.Question, timeout: float) -> str | None:
        target = port if address.startswith("172.") else self.proxy.leads_to(port)
        return self.engine.probe(address, target, question, timeout) if target else "connection refused"

    def releaser(
        self, params: dict[str, Any], check_mode: bool = False, event: Callable[[str], None] | None = None
    ) -> Releaser:
        happened = event or (lambda what: None)

        def run(argv: Sequence[str]) -> tuple[int, str, str]:
            result = self.engine.run(argv)
            happened("docker " + " ".join(argv[1:3]))
            return result

        self.proxy.after = happened
        return Releaser(
            params,
            logic.Docker(run),
            logic.Store(params["name"], params["state_path"], params["run_path"], after=happened),
            self.proxy,
            params["operator"] or "tester",
            guard=FakeGuard(self.path / "guard.json", happened),
            check_mode=check_mode,
            probe=self.probe,
            find_listener=lambda _address, port: self.listening or self.engine.listener(port),
            memory=lambda: self.memory,
            sleep=self.sleep,
            clock=lambda: self.now,
        )

    def act(self, releaser: Releaser) -> Releaser:
        {"present": releaser.present, "absent": releaser.absent, "rolled_back": releaser.rollback}[
            releaser.params["state"]
        ]()
        return releaser

    def release(self, number: int | None, **values: Any) -> Releaser:
        return self.act(self.releaser(self.params(number, **values)))

    def rollback(self, **values: Any) -> Releaser:
        return self.act(self.releaser(self.params(None, state="rolled_back", image=None, port=None, **values)))

    def failing(self, number: int | None, **values: Any) -> tuple[logic.ReleaseError, Releaser]:
        releaser = self.releaser(self.params(number, **values))
        with pytest.raises(logic.ReleaseError) as caught:
            self.act(releaser)
        return caught.value, releaser

    def guard_acts(self) -> None:
        """The run is over, however it ended, and with it its lock."""
        transition, orders = self.path / "lib/ai-prod/transition.json", self.path / "guard.json"
        if not transition.exists():
            orders.unlink(missing_ok=True)
        if not orders.exists():
            return
        order = json.loads(orders.read_text())
        orders.unlink()  # it sees one end of a run
        file = self.proxy.load()["file"]
        if order["new"].rpartition(".")[2] != json.loads(transition.read_text())["record"]["release"]:
            return
        if file["ports"][file["active"]] == order["port"] if order["port"] else not file:
            if order["new"] in self.engine.containers():
                self.engine.run(["docker", "container", "stop", order["new"]])
            self.engine.run(["docker", "container", "start", order["old"]])
        self.proxy.kill()

    # what is there

    def state(self) -> dict[str, Any]:
        data: dict[str, Any] = json.loads((self.path / "lib/ai-prod/state.json").read_text())
        return data

    def record(self) -> dict[str, Any]:
        state = self.state()
        return next(entry for entry in state["releases"] if entry["release"] == state["current"])

    def kept(self) -> list[str]:
        return [entry["tag"] for entry in self.state()["releases"]]

    def left(self) -> list[str]:
        """What lies in the service's folder."""
        base = self.path / "lib/ai-prod"
        return sorted(str(path.relative_to(base)) for path in base.rglob("*") if path.is_file())

    def box(self, release: str | None = None) -> dict[str, Any]:
        entry: dict[str, Any] = self.engine.containers()[f"ai-prod.{release or self.state()['current']}"]
        return entry

    def change(self, name: str | None = None, **values: Any) -> None:
        """Something happens to a container: to the one that serves, or to this one."""
        state = self.engine.load()
        state["containers"][name or f"ai-prod.{self.state()['current']}"].update(values)
        self.engine.save(state)

    def answering(self) -> str | None:
        """The tag that a client of the public port is answered by, None where it is not answered well."""
        target = self.proxy.leads_to(PORT)
        for entry in self.engine.containers().values():
            if entry["status"] == "running" and entry["port"] == target and self.engine.is_healthy(entry):
                return str(entry["labels"].get("nemo.tag", "other"))
        return None

    def expect_settled(self, *tags: str) -> None:
        """One release answers, recorded as current; kept ones stand still; nothing else is there."""
        assert self.answering() in tags
        state, containers = self.state(), self.engine.containers()
        record = self.record()
        assert record["tag"] == self.answering()
        assert [name for name, entry in containers.items() if entry["status"] == "running"] == [
            f"ai-prod.{record['release']}"
        ]
        assert self.box()["port"] == record["host_port"] == state["ports"][record["slot"]]
        proxy = self.proxy.load()
        assert proxy["file"] == proxy["running"]
        assert proxy["running"]["active"] == record["slot"]
        assert proxy["detour"] is None
        known = {entry["release"] for entry in state["releases"]}
        assert {name.partition(".")[2] for name in containers} <= known | {"before"}
        allowed = {f"releases/{release}/secrets/TOKEN" for release in known} | {"state.json"}
        assert "state.json" in self.left()
        assert f"releases/{record['release']}/secrets/TOKEN" in self.left()
        assert set(self.left()) <= allowed

    def old_container(self, number: int = 1, **values: Any) -> None:
        """A release of before HAProxy: a container that publishes the public port, and its record."""
        release = "20250101T000000Z-abcdef"
        settings = {
            **logic.settings_of(self.params(number), image(number)["digest"], ""),
            "bind_address": "0.0.0.0",
            "port": PORT,
        }
        record = {
            "format": logic.OLD_FORMAT,
            "service": "ai-prod",
            "release": release,
            "image": "registry/ai",
            "image_id": image(number)["id"],
            "tag": TAGS[number],
            "digest": image(number)["digest"],
            "spec": "old",
            "settings": settings,
            "health": {"path": "/health", "status": 200, "timeout": 3, "interval": 0.5},
            "by": "earlier",
        }
        state = self.engine.load()
        state["images"].append(image(number))
        state["containers"]["ai-prod"] = {
            "status": "running", "behaviour": "healthy", "asked": 0, "restarts": 0, "port": PORT, "argv": [],
            "image": image(number)["id"],
            "labels": {
                "nemo.service": "ai-prod", "nemo.release": release, "nemo.tag": TAGS[number],
                "nemo.record": json.dumps(record),
            },
            **values,
        }  # fmt: skip
        self.engine.save(state)
        base = self.path / "lib/ai-prod"
        secrets = base / "releases" / release / "secrets"
        secrets.mkdir(parents=True)
        (secrets / "TOKEN").write_text(SECRET)
        (base / "release.json").write_text(json.dumps({**record, "since": "2025-01-01T00:00:00Z", "previous": None}))
