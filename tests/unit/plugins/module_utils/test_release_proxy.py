"""What HAProxy is told, and what is made of its answers: against a stand-in for its command socket."""

from __future__ import annotations

import os
import re
import socketserver
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from ansible_collections.nemo.platform.plugins.module_utils.container_release import ReleaseError
from ansible_collections.nemo.platform.plugins.module_utils.release_proxy import HAProxy

SETTINGS: dict[str, Any] = {
    "address": "0.0.0.0",
    "port": 8000,
    "timeout": 300,
    "keep_alive": 60,
    "max_connections": 4000,
    "retries": 5,
    "drain": 60,
}
COLUMNS = ("pxname", "svname", "scur", "stot", "econ", "eresp", "status", "weight", "hrsp_5xx", "addr")


class Worker:
    """One process of HAProxy, as it started from the file."""

    def __init__(self, configuration: str) -> None:
        found = re.search(r'description "(\w+)"', configuration)
        self.identity = found.group(1) if found else ""
        self.servers = {
            name: {"addr": addr, "weight": int(weight), "status": "MAINT" if disabled else "no check", "scur": 0}
            for name, addr, weight, disabled in re.findall(
                r"^    server (\w) (\S+) weight (\d+)( disabled)?$", configuration, re.MULTILINE
            )
        }

    def ask(self, command: str) -> str:
        words = command.split()
        if words[:2] == ["show", "info"]:
            return f"Name: HAProxy\ndescription: {self.identity}\n"
        if words[:2] == ["show", "stat"]:
            rows = [
                ",".join(
                    str(
                        {
                            "pxname": "release",
                            "svname": name,
                            "stot": 100,
                            "econ": 1,
                            "eresp": 2,
                            "hrsp_5xx": 3,
                            **server,
                        }[c]
                    )
                    for c in COLUMNS
                )
                for name, server in self.servers.items()
            ]
            return "# " + ",".join(COLUMNS) + "\n" + "\n".join(rows) + "\n"
        server = self.servers[words[2].partition("/")[2]]
        if words[:2] == ["set", "server"] and words[3] == "addr":
            server["addr"] = f"{words[4]}:{words[6]}"
        elif words[:2] == ["set", "server"] and words[3] == "weight":
            server["weight"] = int(words[4])
        elif words[:2] == ["set", "server"] and words[3] == "state":
            server["status"] = {"ready": "no check", "drain": "DRAIN", "maint": "MAINT"}[words[4]]
        else:
            raise AssertionError(command)
        return "\n"


class Host:
    """systemd and HAProxy of a host."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.workers: dict[str, Worker] = {}  # by process id, the newest first
        self.started = 0
        self.bound = ""
        self.commands: list[str] = []
        self.refuse = self.taken = ""
        self.proxy = HAProxy(
            "api",
            self.execute,
            "/usr/sbin/haproxy",
            folder=str(folder / "etc"),
            units=str(folder / "units"),
            runtime=str(folder / "run"),
            sleep=lambda seconds: None,
        )
        Path(self.proxy.master).parent.mkdir(parents=True)
        host = self

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                self.wfile.write(host.answer(self.rfile.readline().decode().strip()).encode())

        self.server = socketserver.ThreadingUnixStreamServer(self.proxy.master, Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True, kwargs={"poll_interval": 0.01}).start()

    def answer(self, command: str) -> str:
        if command == "show proc":
            lines = [f"{pid} worker 0 0d00h00m01s 2.6.12" for pid in self.workers]
            return "\n".join(
                ["#<PID> <type> <reloads> <uptime> <version>", "1 master 0 0d 2.6.12", "# workers", *lines]
            )
        found = re.match(r"@!(\d+) (.*)", command)
        assert found, command
        return self.workers[found[1]].ask(found[2])

    def start(self) -> None:
        text = Path(self.proxy.configuration).read_text()
        self.started += 1
        self.workers = {str(100 + self.started): Worker(text), **self.workers}

    def execute(
        self, command: Sequence[str], descriptors: Sequence[int], environment: Mapping[str, str]
    ) -> tuple[int, str, str]:
        words = list(command)
        self.commands.append(" ".join(words[:3]))
        if words[0] == "/usr/sbin/haproxy":
            assert "-c" in words
            assert int(environment["NEMO_FD"]) in descriptors
            assert Path(words[-1]).exists()
            return (1, "", f"[ALERT] {self.refuse}") if self.refuse else (0, "", "")
        if words[:2] == ["systemctl", "start"] and words[-1].endswith(".socket"):
            unit = (self.folder / "units" / words[-1]).read_text()
            found = re.search(r"ListenStream=(\S+)", unit)
            assert found
            if found[1] == self.taken:
                return 1, "", "Address already in use"
            self.bound = found[1]
        if words[:2] == ["systemctl", "start"] and words[2].endswith(".service") and not self.workers:
            self.start()
        if words[:2] == ["systemctl", "reload"]:
            self.start()
        if words[:2] == ["systemctl", "stop"]:
            self.workers, self.bound = {}, ""
        if words[:2] == ["systemctl", "is-active"]:
            return (0, "active\n", "") if self.workers else (3, "inactive\n", "")
        if words[:2] == ["systemctl", "show"]:
            state = f"ActiveState=active\nListen={self.bound} (Stream)\n" if self.bound else "ActiveState=inactive\n"
            return 0, state, ""
        return 0, "", ""

    def changing(self) -> list[str]:
        found = [" ".join(c.split()[1:2]) for c in self.commands if c.startswith("systemctl") and "show" not in c]
        self.commands.clear()
        return found


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    monkeypatch.setattr(os, "fsync", lambda _descriptor: None)
    with tempfile.TemporaryDirectory() as folder:  # a socket's path may not be long
        made = Host(Path(folder))
        yield made
        made.server.shutdown()
        made.server.server_close()


def test_first_time_it_opens_the_port_and_leads_to_the_release(host: Host) -> None:
    assert host.proxy.ensure(SETTINGS, "a", {"a": 20001})
    assert host.bound == "0.0.0.0:8000"
    assert host.proxy.serves("a", 20001)
    assert host.proxy.difference(SETTINGS, "a", {"a": 20001}) == ""
    assert host.proxy.ensure(SETTINGS, "a", {"a": 20001}) == ""


def test_a_switch_tells_every_worker_and_reloads_nothing(host: Host) -> None:
    host.proxy.ensure(SETTINGS, "a", {"a": 20001})
    host.start()  # a reload that left a worker behind
    host.changing()
    host.proxy.switch(SETTINGS, "b", {"a": 20001, "b": 20002})
    assert host.changing() == []
    assert len(host.workers) == 2
    for worker in host.workers.values():
        assert worker.servers["b"]["addr"] == "127.0.0.1:20002"
        assert worker.servers["b"]["status"] == "no check"
        assert worker.servers["a"]["status"] == "MAINT"
    assert host.proxy.difference(SETTINGS, "b", {"a": 20001, "b": 20002}) == ""


def test_the_file_says_the_same_as_the_process(host: Host) -> None:
    host.proxy.ensure(SETTINGS, "a", {"a": 20001})
    host.proxy.switch(SETTINGS, "b", {"a": 20001, "b": 20002})
    host.workers = {}
    host.start()  # as after a SIGKILL
    assert host.proxy.serves("b", 20002)


def test_a_standby_gets_what_the_release_does_not_accept(host: Host) -> None:
    host.proxy.ensure(SETTINGS, "a", {"a": 20001})
    host.proxy.switch(SETTINGS, "b", {"a": 20001, "b": 20002}, standby=True)
    (worker,) = host.workers.values()
    assert (worker.servers["a"]["status"], worker.servers["a"]["weight"]) == ("no check", 1)
    assert (worker.servers["b"]["status"], worker.servers["b"]["weight"]) == ("no check", 256)
    assert not host.proxy.serves("b", 20002)
    host.proxy.switch(SETTINGS, "b", {"a": 20001, "b": 20002})
    assert worker.servers["a"]["status"] == "MAINT"


def test_and_back_again(host: Host) -> None:
    host.proxy.ensure(SETTINGS, "a", {"a": 20001})
    host.proxy.switch(SETTINGS, "b", {"a": 20001, "b": 20002}, standby=True)
    host.proxy.switch(SETTINGS, "a", {"a": 20001})
    (worker,) = host.workers.values()
    assert (worker.servers["a"]["status"], worker.servers["a"]["weight"]) == ("no check", 256)
    assert worker.servers["b"]["status"] == "MAINT"


def test_a_changed_configuration_is_reloaded_and_not_restarted(host: Host) -> None:
    host.proxy.ensure(SETTINGS, "a", {"a": 20001})
    host.changing()
    assert host.proxy.ensure({**SETTINGS, "timeout": 30}, "a", {"a": 20001})
    assert host.changing() == ["reload"]
    assert "timeout server 30s" in Path(host.proxy.configuration).read_text()


def test_a_reload_that_was_never_made_is_made_up_for(host: Host) -> None:
    host.proxy.ensure(SETTINGS, "a", {"a": 20001})
    changed = {**SETTINGS, "timeout": 30}
    Path(host.proxy.configuration).write_text(host.proxy.render(changed, "a", {"a": 20001}))  # and then killed
    assert host.proxy.difference(changed, "a", {"a": 20001}) == "HAProxy runs with an older configuration"
    host.changing()
    host.proxy.ensure(changed, "a", {"a": 20001})
    assert host.changing() == ["reload"]


def test_another_public_port_is_the_only_thing_that_stops_it(host: Host) -> None:
    host.proxy.ensure(SETTINGS, "a", {"a": 20001})
    host.changing()
    host.proxy.ensure({**SETTINGS, "port": 8005}, "a", {"a": 20001})
    assert "stop" in host.changing()
    assert host.bound == "0.0.0.0:8005"


def test_a_public_port_that_is_taken_leaves_the_old_one_open(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    from ansible_collections.nemo.platform.plugins.module_utils import release_proxy

    host.proxy.ensure(SETTINGS, "a", {"a": 20001})
    before = Path(host.proxy.configuration).read_text()
    monkeypatch.setattr(release_proxy, "listener", lambda _address, port: "process 1 (x)" if port == 8005 else None)
    host.changing()
    with pytest.raises(ReleaseError, match="port 8005 is taken by process 1"):
        host.proxy.ensure({**SETTINGS, "port": 8005}, "a", {"a": 20001})
    assert host.changing() == []
    assert Path(host.proxy.configuration).read_text() == before
    assert "8000" in (host.folder / "units/nemo-proxy-api.socket").read_text()


def test_an_address_that_cannot_be_opened_leaves_the_old_one_open(host: Host) -> None:
    host.proxy.ensure(SETTINGS, "a", {"a": 20001})
    host.taken = "10.0.0.9:8000"
    with pytest.raises(ReleaseError, match="the public port cannot be opened"):
        host.proxy.ensure({**SETTINGS, "address": "10.0.0.9"}, "a", {"a": 20001})
    assert host.bound == "0.0.0.0:8000"
    assert host.workers


def test_what_haproxy_refuses_is_never_in_place(host: Host) -> None:
    host.proxy.ensure(SETTINGS, "a", {"a": 20001})
    before = Path(host.proxy.configuration).read_text()
    host.refuse = "unknown keyword 'timout'"
    with pytest.raises(ReleaseError, match="unknown keyword 'timout'"):
        host.proxy.ensure({**SETTINGS, "timeout": 30}, "a", {"a": 20001})
    assert Path(host.proxy.configuration).read_text() == before
    assert not Path(f"{host.proxy.configuration}.draft").exists()


def test_counters_are_those_of_each_worker(host: Host) -> None:
    host.proxy.ensure(SETTINGS, "a", {"a": 20001})
    host.start()
    for worker in host.workers.values():
        worker.servers["a"]["scur"] = 2
    assert host.proxy.counters("a") == {"102": (2, 100, 6), "101": (2, 100, 6)}


def test_a_worker_that_does_not_answer_is_no_zero(host: Host) -> None:
    host.proxy.ensure(SETTINGS, "a", {"a": 20001})
    host.start()
    host.workers["101"].servers.clear()  # it has just ended
    assert host.proxy.counters("a") is None


def test_a_haproxy_that_does_not_answer_counts_nothing_and_serves_nothing(host: Host) -> None:
    host.proxy.ensure(SETTINGS, "a", {"a": 20001})
    host.server.shutdown()
    Path(host.proxy.master).unlink()
    assert host.proxy.counters("a") is None
    assert host.proxy.difference(SETTINGS, "a", {"a": 20001}) == "HAProxy does not run"
    host.workers = {}
    assert host.proxy.counters("a") == {}, "one that does not run has nothing left to answer"


def test_nothing_is_left_after_its_removal(host: Host) -> None:
    host.proxy.ensure(SETTINGS, "a", {"a": 20001})
    assert host.proxy.remove()
    assert not host.proxy.is_set_up()
    assert list((host.folder / "units").iterdir()) == []
    assert not host.proxy.remove()
