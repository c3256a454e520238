"""What clients see of a switch and of the way back: by an HAProxy that runs, told as a release tells it, under load."""

from __future__ import annotations

import collections
import http.client
import os
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from ansible_collections.nemo.platform.plugins.module_utils.release_proxy import HAProxy
from tests.unit.plugins.module_utils.test_proxy_rules import BINARY, Service, needs_haproxy, settings, wait_for

SLOW = 0.6


class Release(Service):
    """Answers with its name; with an error where it errs; to /slow after a while, and well."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.errs = False
        self.goes_on = threading.Event()  # while it is not set, what is slow does not end
        self.goes_on.set()
        release = self

        class Handler(self.RequestHandlerClass):  # type: ignore[name-defined] # the class above has made it
            def do_GET(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if self.path == "/slow":
                    time.sleep(SLOW)
                    release.goes_on.wait(20)
                self.send_response(500 if release.errs and self.path != "/slow" else 200)
                self.send_header("Content-Length", str(len(name)))
                self.end_headers()
                self.wfile.write(name.encode())

            do_POST = do_GET

        self.RequestHandlerClass = Handler


class OfTest(HAProxy):
    def render(self, *arguments: Any, **values: Any) -> str:
        return super().render(*arguments, **values).replace("    user haproxy\n    group haproxy\n", "")


class Load:
    """Clients on kept and on new connections, until it ends: how often which answer came from whom."""

    def __init__(self, port: int, methods: Sequence[str]) -> None:
        self.port, self.seen = port, collections.Counter[tuple[str, int, str]]()
        self.over = threading.Event()
        kinds = [(method, path, kept) for method in methods for path in ("/x", "/slow") for kept in (True, False)]
        self.threads = [threading.Thread(target=self.ask, args=kind) for kind in kinds]
        for thread in self.threads:
            thread.start()

    def ask(self, method: str, path: str, kept: bool) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        while not self.over.is_set():
            try:
                connection.request(method, path, body=b"hello" if method == "POST" else None)
                answer = connection.getresponse()
                body = answer.read().decode()
                self.seen[path, answer.status, body if len(body) < 9 else "HAProxy"] += 1
            except Exception as error:
                self.seen[path, 0, repr(error)] += 1
            if not kept:
                connection.close()
            time.sleep(0.005)
        connection.close()

    def end(self) -> collections.Counter[tuple[str, int, str]]:
        self.over.set()
        for thread in self.threads:
            thread.join()
        return self.seen


class Host:
    def __init__(self, folder: Path) -> None:
        self.old, self.new = Release("old"), Release("new")
        self.settings = settings()
        self.ports = {"a": self.old.port, "b": self.new.port}
        self.proxy = OfTest("api", self.execute, BINARY, folder=str(folder), runtime=str(folder))
        (folder / self.proxy.unit).mkdir()
        self.proxy.write(self.proxy.configuration, self.proxy.render(self.settings, "a", self.ports))
        self.socket = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port = self.socket.getsockname()[1]
        number = self.socket.fileno()
        self.process = subprocess.Popen(
            [BINARY, "-W", "-f", self.proxy.configuration, "-S", f"{self.proxy.master},mode,600"],
            env={**os.environ, "NEMO_FD": str(number)}, pass_fds=[number], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        wait_for(lambda: self.proxy.serves("a", self.old.port))

    @staticmethod
    def execute(words: Sequence[str], fds: Sequence[int], environment: Mapping[str, str]) -> tuple[int, str, str]:
        done = subprocess.run(words, pass_fds=fds, env={**os.environ, **environment}, capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr

    def end(self) -> None:
        self.process.terminate()
        self.process.wait()
        self.socket.close()
        self.old.end()


@pytest.fixture
def host() -> Iterator[Host]:
    # pytest's own folders are too deep for the path of a socket
    with tempfile.TemporaryDirectory(prefix="nemo-") as folder:
        made = Host(Path(folder))
        yield made
        made.end()


def left(host: Host) -> int | None:
    seen = host.proxy.counters("b")
    return None if seen is None else sum(entry.current for entry in seen.values())


@needs_haproxy
def test_the_way_back_from_a_release_that_errs_costs_only_its_own_errors(host: Host) -> None:
    load = Load(host.port, ["GET", "POST"])
    host.proxy.switch(host.settings, "b", host.ports, standby=True)
    time.sleep(0.5)
    host.new.errs = True
    host.new.goes_on.clear()
    time.sleep(0.5)
    host.proxy.switch(host.settings, "a", host.ports)
    assert left(host), "slow requests are still at the release that is left"
    host.new.goes_on.set()
    wait_for(lambda: left(host) == 0)
    host.new.end()
    time.sleep(SLOW + 0.3)
    seen = load.end()
    assert {status for _path, status, _body in seen} == {200, 500}, seen
    assert {(path, body) for path, status, body in seen if status == 500} == {("/x", "new")}
    assert seen["/slow", 200, "new"]
    assert seen["/slow", 200, "old"]


@needs_haproxy
def test_a_release_that_ends_is_stood_in_for_until_the_way_back(host: Host) -> None:
    load = Load(host.port, ["GET"])
    host.proxy.switch(host.settings, "b", host.ports, standby=True)
    time.sleep(0.5)
    host.new.end()
    after = Load(host.port, ["POST"])  # what it had begun was its own to answer
    time.sleep(0.5)
    host.proxy.switch(host.settings, "a", host.ports)
    time.sleep(0.3)
    for seen in (load.end(), after.end()):
        assert {status for _path, status, _body in seen} == {200}, seen
    assert after.seen["/x", 200, "old"]
