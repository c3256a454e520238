"""The metadata service, and what the API answers to expired credentials."""

from __future__ import annotations

import http.client
import http.server
import io
import json
import os
import pathlib
import threading
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

HEADER = "X-aws-ec2-metadata-token"


@pytest.fixture(scope="module")
def server() -> ModuleType:
    """The module, which sets moto's environment when it is imported; other tests do not get to see that."""
    before = dict(os.environ)
    from lab.aws import server

    os.environ.clear()
    os.environ.update(before)
    return server


@pytest.fixture
def ask(server: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Requests to a running metadata service that knows one instance."""
    monkeypatch.setattr(server, "instance_at", lambda address: address)
    tree = {"meta-data": {"instance-id": "i-1", "iam": {"security-credentials": {"nemo-ai": "{}"}}}}
    monkeypatch.setattr(server, "metadata", lambda instance: tree)
    service = http.server.ThreadingHTTPServer(("127.0.0.1", 0), server.Metadata)
    threading.Thread(target=service.serve_forever, daemon=True).start()

    def request(method: str, path: str, headers: dict[str, str] | None = None) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", service.server_port, timeout=5)
        connection.request(method, path, headers=headers or {})
        answer = connection.getresponse()
        text = answer.read().decode()
        connection.close()
        return answer.status, text

    yield request
    service.shutdown()
    service.server_close()


def token(ask: Any, seconds: int = 60) -> dict[str, str]:
    status, text = ask("PUT", "/latest/api/token", {f"{HEADER}-ttl-seconds": str(seconds)})
    assert status == 200
    return {HEADER: text}


def test_nothing_is_told_without_a_token(ask: Any) -> None:
    assert ask("GET", "/latest/meta-data/instance-id")[0] == 401
    assert ask("GET", "/latest/meta-data/instance-id", {HEADER: "made-up"})[0] == 401


def test_files_folders_and_what_is_not_there(ask: Any) -> None:
    known = token(ask)
    assert ask("GET", "/latest/meta-data/instance-id", known) == (200, "i-1")
    assert ask("GET", "/latest/meta-data/", known) == (200, "instance-id\niam/")
    assert ask("GET", "/latest/meta-data/iam/security-credentials/", known) == (200, "nemo-ai")
    assert ask("GET", "/latest/meta-data/nothing", known)[0] == 404
    assert ask("GET", "/other", known)[0] == 404


@pytest.mark.parametrize("headers", [{}, {f"{HEADER}-ttl-seconds": "0"}, {f"{HEADER}-ttl-seconds": "21601"}])
def test_a_token_needs_a_lifetime(ask: Any, headers: dict[str, str]) -> None:
    assert ask("PUT", "/latest/api/token", headers)[0] == 400


def test_no_token_for_a_proxy(ask: Any) -> None:
    headers = {f"{HEADER}-ttl-seconds": "60", "X-Forwarded-For": "10.0.2.31"}
    assert ask("PUT", "/latest/api/token", headers)[0] == 403


def test_a_token_ends(ask: Any, server: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    known = token(ask)
    monkeypatch.setattr(server.Metadata, "tokens", dict.fromkeys(known.values(), (0.0, "127.0.0.1")))
    assert ask("GET", "/latest/meta-data/instance-id", known)[0] == 401


@pytest.mark.parametrize(
    ("service", "content_type", "status", "code"),
    [
        ("ec2", "application/x-www-form-urlencoded; charset=utf-8", "400", "<Code>RequestExpired</Code>"),
        ("sts", "application/x-www-form-urlencoded", "403", "<Code>ExpiredToken</Code>"),
        ("ecr", "application/x-amz-json-1.1", "400", '"ExpiredTokenException"'),
        ("eks", "", "403", '"ExpiredTokenException"'),
    ],
)
def test_expired_credentials_in_every_protocol(
    server: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path,
    service: str, content_type: str, status: str, code: str,
) -> None:  # fmt: skip
    def moto(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        start_response("200 OK", [])
        return [b"from moto"]

    said: list[str] = []
    environ = {
        "HTTP_AUTHORIZATION": f"AWS4-HMAC-SHA256 Credential=lab/20250101/ap-northeast-2/{service}/aws4_request, x",
        "CONTENT_TYPE": content_type,
        "wsgi.input": io.BytesIO(),
    }
    monkeypatch.setattr(server, "EXPIRED", tmp_path / "expired-token")
    application = server.ExpiredToken(moto)
    assert application(environ, lambda line, headers: said.append(line)) == [b"from moto"]
    (tmp_path / "expired-token").touch()
    body = b"".join(application(environ, lambda line, headers: said.append(line))).decode()
    assert said[0] == "200 OK"
    assert said[1].startswith(status)
    assert code in body
    if body.startswith("{"):
        assert "expired" in json.loads(body)["message"]
