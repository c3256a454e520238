"""What the rules of the public port let through: by an HAProxy that runs, with a service behind it, on loopback."""

from __future__ import annotations

import http.server
import json
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ansible_collections.nemo.platform.plugins.module_utils.container_release import PROBE_AGENT
from ansible_collections.nemo.platform.plugins.module_utils.release_proxy import HAProxy, check_proxy, proxy_settings
from ansible_collections.nemo.platform.plugins.modules import container_release as module

BINARY = shutil.which("haproxy") or (shutil.which("haproxy", path="/usr/sbin") or "")
needs_haproxy = pytest.mark.skipif(
    not BINARY, reason="no haproxy on this machine; molecule/container_service_alternative proves the same on a host"
)
KEY, OTHER = "of-a-test-0123456789", "its-follower-0123456789"
RULES: list[dict[str, Any]] = [
    {"path": "/v1/models", "methods": ["GET"], "sources": [], "key": None},
    {"path": "/v1/chat/*", "methods": ["POST"], "sources": [], "key": None},
    {"path": "/metrics", "methods": [], "sources": ["10.9.0.0/16"], "key": False},
    {"path": "/metrics", "methods": ["POST"], "sources": ["127.0.0.0/8"], "key": None},
    {"path": "/open", "methods": [], "sources": ["127.0.0.0/8", "::1/128"], "key": False},
]
AUTHORIZED = "Authorization: Bearer " + KEY


def settings(**values: Any) -> dict[str, Any]:
    params = {name: spec.get("default") for name, spec in module.ARGUMENTS.items()}
    params.update(bind_address="127.0.0.1", port=8000, **values)
    assert check_proxy(params) == []
    return proxy_settings(params)


class Service(http.server.ThreadingHTTPServer):
    """Answers every path with itself, until it is broken."""

    daemon_threads = True

    def __init__(self, says: str = "") -> None:
        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                service: Any = self.server
                if service.broken and self.path != "/health":
                    self.close_connection = True
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                body = f"{says}{self.path} {self.headers.get('Upgrade', '')}".strip().encode()
                self.send_response(service.health if self.path == "/health" else 200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_POST = do_DELETE = do_GET

            def log_message(self, *_arguments: Any) -> None:
                """Nothing."""

        super().__init__(("127.0.0.1", 0), Handler)
        self.broken, self.health = False, 200
        threading.Thread(target=self.serve_forever, daemon=True, kwargs={"poll_interval": 0.05}).start()

    @property
    def port(self) -> int:
        return int(self.server_address[1])

    def handle_error(self, *_arguments: Any) -> None:
        """Who asks may go at any time."""

    def end(self) -> None:
        self.shutdown()
        self.server_close()


class Proxy:
    """The configuration as it is written, but with a port and a command socket of the test's own."""

    def __init__(self, folder: Path, wanted: dict[str, Any], ports: dict[str, int], standby: bool = False) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.control = folder / "control"
        made = HAProxy("api", lambda *_: (0, "", ""), BINARY, folder=str(folder))
        text = made.render(wanted, "a", ports, standby, bind=f"127.0.0.1:{self.port}")
        text = text.replace(
            "    user haproxy\n    group haproxy\n", f"    stats socket {self.control} mode 600 level admin\n"
        )
        file = folder / "api.cfg"
        file.write_text(text)
        checked = subprocess.run([BINARY, "-c", "-f", file], capture_output=True, text=True, check=False)
        assert checked.returncode == 0, checked.stderr
        assert "WARNING" not in checked.stderr
        self.process = subprocess.Popen([BINARY, "-f", file], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for(self.control.exists)

    def command(self, text: str) -> str:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(self.control))
            connection.sendall(text.encode() + b"\n")
            return connection.recv(65536).decode()

    def ask(self, line: str, *headers: str) -> tuple[int, dict[str, str], str]:
        """A request as it is written here, byte by byte."""
        lines = [line + " HTTP/1.1", "Host: test", "Connection: close", *headers, "", ""]
        with socket.create_connection(("127.0.0.1", self.port), timeout=10) as connection:
            connection.sendall("\r\n".join(lines).encode())
            answer = b""
            while part := connection.recv(65536):
                answer += part
        head, _blank, body = answer.decode().partition("\r\n\r\n")
        first, *rest = head.split("\r\n")
        found = {name.lower(): value for name, _colon, value in (entry.partition(": ") for entry in rest)}
        return int(first.split()[1]), found, body

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def wait_for(true: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    service = Service()
    made = Proxy(
        tmp_path_factory.mktemp("rules"), settings(proxy_rules=RULES, proxy_keys=[KEY, OTHER]), {"a": service.port}
    )
    yield made
    made.end()
    service.end()


@needs_haproxy
@pytest.mark.parametrize(
    ("line", "headers"),
    [
        ("GET /v1/models", [AUTHORIZED]),
        ("GET /v1/models", ["authorization: bearer " + OTHER]),
        ("GET /v1/models?limit=1&path=//metrics", [AUTHORIZED]),
        ("POST /v1/chat/completions", [AUTHORIZED, "Content-Length: 0"]),
        ("POST /v1/chat/some/thing", [AUTHORIZED, "Content-Length: 0"]),
        ("POST /metrics", [AUTHORIZED, "Content-Length: 0"]),  # by the second rule of its path
        ("GET /open", []),
        ("DELETE /open", []),
        ("GET /health", ["User-Agent: " + PROBE_AGENT]),  # of the host itself
    ],
)
def test_what_a_rule_names_passes(proxy: Proxy, line: str, headers: list[str]) -> None:
    status, _headers, body = proxy.ask(line, *headers)
    assert (status, body) == (200, line.split()[1])


@needs_haproxy
@pytest.mark.parametrize(
    "line",
    [
        "GET /", "GET /health", "GET /v1", "POST /v1/models", "GET /pause", "POST /invocations", "OPTIONS *",
        "GET /v1/chat/completions", "POST /v1/chat", "POST /v1/chatter", "GET /open/", "GET /openly",
        # other ways to write what would pass
        "GET //v1/models", "GET /v1//models", "GET /v1/models/", "GET /V1/models", "GET /v1/./models", "GET /v1/%6dodels",
        "GET /v1%2fmodels", "GET /v1/models%00", "GET /v1/models;x=y", "GET /v1\\models", "GET /open/../v1/models",
        # ways out of a folder that may be asked for
        "POST /v1/chat/../../pause", "POST /v1/chat/..", "POST /v1/chat/%2e%2e/%2e%2e/pause", "POST /v1/chat/..%2f..%2fpause",
        "POST /v1/chat//pause", "POST /v1/chat/./x", "POST /v1/chat/..;/pause", "POST /v1/chat/x%0d%0a",
        "GET http://test/v1/models", "GET http://test/pause", "POST http://test/v1/chat/completions",
    ],
)  # fmt: skip
def test_what_no_rule_names_is_not_there(proxy: Proxy, line: str) -> None:
    status, headers, body = proxy.ask(line, AUTHORIZED, "Content-Length: 0")
    assert (status, headers["content-type"]) == (404, "application/json")
    assert json.loads(body)["error"]["code"] == 404


@needs_haproxy
@pytest.mark.parametrize(
    "headers",
    [
        [],
        ["Authorization: Bearer"],
        ["Authorization: Bearer "],
        ["Authorization: Bearer x" + KEY],
        [AUTHORIZED + "x"],
        ["Authorization: Bearer  " + KEY],
        ["Authorization: " + KEY],
        ["Authorization: Basic " + KEY],
        ["X-Api-Key: " + KEY],
        ["Authorization: Bearer " + KEY.upper()],
    ],
)
def test_without_a_key_there_is_no_way_in(proxy: Proxy, headers: list[str]) -> None:
    status, found, body = proxy.ask("GET /v1/models", *headers)
    assert (status, found["www-authenticate"]) == (401, "Bearer")
    assert json.loads(body)["error"]["type"] == "authentication_error"


@needs_haproxy
def test_from_elsewhere_there_is_no_way_in(proxy: Proxy) -> None:
    status, _headers, body = proxy.ask("GET /metrics", AUTHORIZED)
    assert (status, json.loads(body)["error"]["type"]) == (403, "permission_error")


@needs_haproxy
def test_no_other_protocol_gets_past_the_rules(proxy: Proxy) -> None:
    assert proxy.ask("GET /open", "Upgrade: h2c", "Connection: upgrade")[2] == "/open"
    key = ["Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", "Sec-WebSocket-Version: 13"]
    assert proxy.ask("GET /open", "Upgrade: websocket", "Connection: upgrade", *key)[2] == "/open websocket"


@pytest.fixture
def two(tmp_path: Path) -> Iterator[tuple[Proxy, Service, Service]]:
    """A release, and one that stands by while it is watched."""
    new, old = Service("new "), Service("old ")
    wanted = settings(proxy_retry_after=7, proxy_check=True, proxy_retries=1)
    made = Proxy(tmp_path, wanted, {"a": new.port, "b": old.port}, standby=True)
    yield made, new, old
    made.end()
    for service in (new, old):
        service.end()


def unavailable(answer: tuple[int, dict[str, str], str]) -> bool:
    status, headers, body = answer
    return bool(
        status == 503
        and headers.get("retry-after") == "7"
        and headers["content-type"] == "application/json"
        and "x-nemo-unavailable" not in headers
        and json.loads(body)["error"] == {
            "message": "No release can answer now. Try again in 7 s.", "type": "service_unavailable", "code": 503,
        }
    )  # fmt: skip


@needs_haproxy
def test_who_stands_by_takes_over_alone_when_the_new_release_dies_or_turns_bad(
    two: tuple[Proxy, Service, Service],
) -> None:
    proxy, new, _old = two
    assert [proxy.ask("GET /x")[2] for _ in range(20)].count("new /x") >= 19
    new.health = 500
    wait_for(
        lambda: "DOWN" in next(line for line in proxy.command("show stat").splitlines() if line.startswith("release,a"))
    )
    assert {proxy.ask("GET /x")[2] for _ in range(20)} == {"old /x"}
    new.health = 200
    wait_for(lambda: proxy.ask("GET /x")[2] == "new /x")
    new.end()
    wait_for(lambda: proxy.ask("GET /x")[2] == "old /x")
    for line in ("GET /x", "POST /x"):
        answers = {proxy.ask(line, "Content-Length: 0")[0] for _ in range(20)}
        assert answers == {200}, "a refused connection goes to the other one"


@needs_haproxy
def test_while_no_release_answers_clients_are_told_at_once(two: tuple[Proxy, Service, Service]) -> None:
    proxy, new, _old = two
    for slot in "ab":
        proxy.command(f"set server release/{slot} state maint")
    began = time.monotonic()
    assert unavailable(proxy.ask("GET /x"))
    assert unavailable(proxy.ask("POST /x", "Content-Length: 0"))
    assert time.monotonic() - began < 0.5
    proxy.command("set server release/a state ready")
    assert proxy.ask("GET /x")[2] == "new /x"
    new.broken = True
    assert unavailable(proxy.ask("POST /x", "Content-Length: 0")), "what breaks off is 502 for HAProxy"


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"proxy_rules": [{"path": "v1", "methods": [], "sources": [], "key": None}]}, "proxy_rules[0].path is 'v1'"),
        (
            {"proxy_rules": [{"path": "/a b", "methods": [], "sources": [], "key": None}]},
            "proxy_rules[0].path is '/a b'",
        ),
        ({"proxy_rules": [{"path": "/a%20b", "methods": [], "sources": [], "key": None}]}, "proxy_rules[0].path is"),
        ({"proxy_rules": [{"path": "/a'b", "methods": [], "sources": [], "key": None}]}, "proxy_rules[0].path is"),
        ({"proxy_rules": [{"path": "/a/../b", "methods": [], "sources": [], "key": None}]}, "proxy_rules[0].path is"),
        ({"proxy_rules": [{"path": "/a*", "methods": [], "sources": [], "key": None}]}, "proxy_rules[0].path is '/a*'"),
        (
            {"proxy_rules": [{"path": "/*", "methods": ["get"], "sources": [], "key": None}]},
            "proxy_rules[0].methods is 'get'",
        ),
        (
            {"proxy_rules": [{"path": "/*", "methods": [], "sources": ["10.0.0.1/8"], "key": None}]},
            "proxy_rules[0].sources",
        ),
        ({"proxy_rules": [{"path": "/*", "methods": [], "sources": [], "key": True}]}, "true only with proxy_keys"),
        ({"proxy_rules": RULES, "proxy_keys": ["short"]}, "proxy_keys[0] is not shown; allowed: 16 or more visible"),
        ({"proxy_rules": RULES, "proxy_keys": ["with a blank, and so long"]}, "proxy_keys[0] is not shown"),
        ({"proxy_keys": [KEY]}, "proxy_keys has 1, proxy_rules none"),
    ],
)
def test_rules_and_keys_that_are_none(values: dict[str, Any], text: str) -> None:
    params = {name: spec.get("default") for name, spec in module.ARGUMENTS.items()}
    wrong = check_proxy({**params, **values})
    assert len(wrong) == 1
    assert text in wrong[0]
    assert KEY not in wrong[0]


def test_only_the_digest_of_a_key_is_kept_or_written() -> None:
    wanted = settings(proxy_rules=RULES, proxy_keys=[KEY])
    made = HAProxy("api", lambda *_: (0, "", ""), BINARY)
    assert KEY not in json.dumps(wanted) + made.render(wanted, "a", {})
    changed = settings(proxy_rules=RULES, proxy_keys=[OTHER])
    assert made.identity(wanted) != made.identity(changed), "another key is another configuration"
