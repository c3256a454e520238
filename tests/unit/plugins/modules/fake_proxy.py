"""An HAProxy for tests: what a file, a running process, a detour and the public port do, with its state in one JSON file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ansible_collections.nemo.platform.plugins.module_utils.container_release import ReleaseError
from ansible_collections.nemo.platform.plugins.module_utils.release_proxy import Counters
from tests.unit.plugins.modules.fake_docker import FakeDocker


class FakeProxy:
    def __init__(self, path: Path, engine: FakeDocker, after: Callable[[str], None] = lambda what: None) -> None:
        self.path = path
        self.configuration = str(path)
        self.engine = engine
        self.after = after
        self.calls: list[str] = []
        self.on_counters: Callable[[str], None] = lambda slot: None
        if not path.exists():
            self.save({"file": None, "running": None, "detour": None, "counters": {}, "installed": True, "error": ""})

    def load(self) -> dict[str, Any]:
        state: dict[str, Any] = json.loads(self.path.read_text())
        return state

    def save(self, state: dict[str, Any]) -> None:
        self.path.write_text(json.dumps(state))

    def set(self, **values: Any) -> None:
        self.save({**self.load(), **values})

    # for tests

    def kill(self) -> None:
        """SIGKILL of HAProxy: systemd starts it again, with what the file says."""
        state = self.load()
        if state["file"]:
            state["running"] = state["file"]
        self.save(state)

    def leads_to(self, port: int) -> int | None:
        """The port of the host at which a connection to this port ends, None where nobody listens."""
        state = self.load()
        if state["detour"] and state["detour"]["public"] == port:
            return int(state["detour"]["release"])
        if any(entry["status"] == "running" and entry["port"] == port for entry in self.engine.containers().values()):
            return port
        running = state["running"]
        if running and running["settings"]["port"] == port and not running.get("held"):
            ports = dict(running["ports"])
            first = [ports.pop(running["active"], None), *(ports.values() if running["standby"] else [])]
            return next((found for found in first if found and self.engine.listener(found)), first[0])
        return None

    # what a release uses

    def installed(self) -> bool:
        return bool(self.load()["installed"])

    def is_set_up(self) -> bool:
        return bool(self.load()["file"])

    @staticmethod
    def wanted(settings: dict[str, Any], active: str, ports: dict[str, int], standby: bool = False) -> dict[str, Any]:
        return {"settings": settings, "active": active, "ports": ports, "standby": standby}

    def difference(self, settings: dict[str, Any], active: str, ports: dict[str, int]) -> str:
        state = self.load()
        wanted = self.wanted(settings, active, ports)
        return "" if state["file"] == wanted and state["running"] == wanted else "something differs"

    def ensure(self, settings: dict[str, Any], active: str, ports: dict[str, int]) -> str:
        different = self.difference(settings, active, ports)
        if different:
            self.calls.append("ensure")
            self.put(settings, active, ports, opening=True)
        return different

    def switch(self, settings: dict[str, Any], active: str, ports: dict[str, int], standby: bool = False) -> None:
        self.calls.append("switch with standby" if standby else "switch")
        self.put(settings, active, ports, standby)

    def put(
        self, settings: dict[str, Any], active: str, ports: dict[str, int], standby: bool = False, opening: bool = False
    ) -> None:
        state = self.load()
        if state["error"]:
            raise ReleaseError("proxy", state["error"])
        wanted = self.wanted(settings, active, ports, standby)
        if state["file"] != wanted:
            state["file"] = wanted
            self.save(state)
            self.after("proxy file")
        closed = not state["running"] or state["running"]["settings"]["port"] != settings["port"]
        if opening and closed and self.engine.listener(settings["port"]):
            raise ReleaseError("port_taken", f"port {settings['port']} is taken")
        if state["running"] != wanted:
            state["running"] = wanted
            self.save(state)
            self.after("proxy led")

    def hold(self, active: str) -> None:
        self.calls.append("hold")
        state = self.load()
        assert state["running"]["active"] == active
        state["running"]["held"] = True
        self.save(state)
        self.after("proxy hold")

    def counters(self, slot: str) -> dict[str, Counters] | None:
        """A test sets those of one worker, those of several by their process ids, or None for no answer."""
        self.on_counters(slot)
        found = self.load()["counters"].get(slot, [0, 0, 0])
        if found is None:
            return None
        workers = found if isinstance(found, dict) else {"1": found}
        return {worker: Counters(*values) for worker, values in workers.items()}

    def cut(self, slot: str) -> None:
        self.calls.append("cut")
        self.set(counters={slot: [0, 0, 0]})

    def remove(self, drain: bool = False) -> bool:
        self.calls.append("remove and drain" if drain else "remove")
        state = self.load()
        there = bool(state["file"] or state["running"])
        if there:
            state.update(file=None, running=None)
            self.save(state)
            self.after("proxy removed")
        return there

    def detour(self, settings: dict[str, Any], port: int, release: int) -> bool:
        self.set(detour={"public": settings["port"], "port": port, "release": release})
        self.after("detour")
        return True

    def end_detour(self, _settings: dict[str, Any], _port: int, _drain: float) -> None:
        self.set(detour=None)
        self.after("detour ended")
