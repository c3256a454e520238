"""What listens in place of a service: the first words of each protocol, and who the cluster lets in."""

from __future__ import annotations

import asyncio
import base64
import datetime
import json
import struct
import urllib.parse
from collections.abc import Awaitable, Callable

import pytest

from lab import listeners

NOW = datetime.datetime(2026, 11, 22, 12, 0, tzinfo=datetime.UTC)
STRANGER = "arn:aws:sts::084375578827:assumed-role/nemo-ai/i-1"
BASTION = "arn:aws:sts::084375578827:assumed-role/nemo-bastion/i-1"


def talk(kind: str, *sent: bytes, until: int) -> bytes:
    """What a listener answers, up to a number of bytes."""

    async def conversation() -> bytes:
        accept: Callable[..., Awaitable[None]] = listeners.accepting(listeners.KINDS[kind])
        server = await asyncio.start_server(accept, "127.0.0.1", 0)
        async with server:
            reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname()[:2])
            for data in sent:
                writer.write(data)
            answer = b""
            while len(answer) < until and (data := await asyncio.wait_for(reader.read(4096), 5)):
                answer += data
            writer.close()
            return answer

    return asyncio.run(conversation())


# ---- the cluster


def token(host: str = "sts.ap-northeast-2.amazonaws.com", **changes: str) -> str:
    query = {
        "Action": "GetCallerIdentity", "Version": "2011-06-15", "X-Amz-Credential": "ASIA/20261122/r/sts/aws4_request",
        "X-Amz-Date": "20261122T115900Z", "X-Amz-SignedHeaders": "host;x-k8s-aws-id", "X-Amz-Signature": "abc",
    }  # fmt: skip
    query |= {name.replace("_", "-"): value for name, value in changes.items()}
    url = f"https://{host}/?{urllib.parse.urlencode(query)}"
    return "k8s-aws-v1." + base64.urlsafe_b64encode(url.encode()).decode().rstrip("=")


def test_a_token_of_the_aws_cli_becomes_a_question_to_sts() -> None:
    assert listeners.presigned(token(), NOW) == (
        "AWS4-HMAC-SHA256 Credential=ASIA/20261122/r/sts/aws4_request, SignedHeaders=host;x-k8s-aws-id, Signature=abc"
    )


@pytest.mark.parametrize(
    "bad",
    [
        "",
        "x",
        "k8s-aws-v1.%%%",
        token().removeprefix("k8s-aws-v1."),
        token(host="example.org"),
        token(host="sts.amazonaws.com.example.org"),
        token(Action="AssumeRole"),
        token(X_Amz_SignedHeaders="host"),
        token(X_Amz_Date="20261122T114400Z"),
        token(X_Amz_Date="yesterday"),
    ],
)
def test_what_is_no_token_is_nobody(bad: str) -> None:
    assert listeners.presigned(bad, NOW) == ""


@pytest.mark.parametrize("path", ["/version", "/version?timeout=32s", "/healthz", "/livez", "/readyz"])
def test_version_and_health_are_for_everyone(path: str) -> None:
    status, _, body = listeners.kubernetes("GET", path, {})
    assert status == 200
    if "version" in path:
        assert (json.loads(body)["major"], json.loads(body)["minor"]) == ("1", "33")


@pytest.mark.parametrize("who", ["", STRANGER])
@pytest.mark.parametrize("path", ["/", "/api", "/api/v1/nodes", "/versions"])
def test_all_else_is_not_for_strangers(monkeypatch: pytest.MonkeyPatch, who: str, path: str) -> None:
    monkeypatch.setattr(listeners, "caller", lambda _: who)
    status, _, body = listeners.kubernetes("GET", path, {"authorization": "Bearer x"})
    assert (status, json.loads(body)["reason"]) == (401, "Unauthorized")


def test_the_bastions_role_is_let_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listeners, "caller", lambda token: BASTION if token == "good" else "")
    headers = {"authorization": "Bearer good"}
    status, _, body = listeners.kubernetes("GET", "/api/v1/nodes?limit=500", headers)
    assert (status, json.loads(body)["items"][0]["metadata"]["name"]) == (200, "eks-node-a")
    assert listeners.kubernetes("GET", "/api/v1/secrets", headers)[0] == 404
    status, _, body = listeners.kubernetes("POST", "/apis/authentication.k8s.io/v1/selfsubjectreviews", headers)
    assert json.loads(body)["status"]["userInfo"]["username"] == BASTION


# ---- HTTP


def test_two_requests_of_one_connection() -> None:
    request = b"POST /x HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}"
    answer = talk("node-port", request, b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n", until=10_000)
    assert answer.count(b"HTTP/1.1 200 OK\r\n") == 2


def test_nonsense_ends_the_connection() -> None:
    assert talk("node-port", b"GET / HTTP/1.1\r\nContent-Length: x\r\n\r\n", until=1) == b""


# ---- MySQL, Kafka, Redis


def test_mysql_greets_and_lets_nobody_in() -> None:
    answer = talk("mysql", b"\x01\0\0\x01\x00", until=10_000)
    size = int.from_bytes(answer[:3], "little")
    assert answer[3:5] == b"\0\x0a"
    assert answer[5:].startswith(b"8.0.")
    assert answer[4 : 4 + size].endswith(b"\0caching_sha2_password\0")
    refusal = answer[4 + size :]
    assert int.from_bytes(refusal[:3], "little") == len(refusal) - 4
    assert (refusal[3], refusal[4]) == (2, 0xFF)
    assert struct.unpack("<H", refusal[5:7]) == (1045,)


def test_kafka_says_what_it_knows_and_who_it_is() -> None:
    def request(key: int, version: int, number: int) -> bytes:
        body = struct.pack(">hhih", key, version, number, -1)
        return struct.pack(">i", len(body)) + body

    answer = talk("kafka", request(18, 3, 7), until=8)
    assert struct.unpack(">iih", answer[:10])[1:] == (7, 35)  # that version is unknown: ask again
    answer = talk("kafka", request(18, 0, 8), until=8)
    assert struct.unpack(">iihi", answer[:14]) == (len(answer) - 4, 8, 0, 2)
    answer = talk("kafka", request(3, 1, 9), until=8)
    assert struct.unpack(">iiii", answer[:16]) == (len(answer) - 4, 9, 1, 0)
    assert b"127.0.0.1" in answer
    assert talk("kafka", request(0, 0, 1), until=1) == b""


@pytest.mark.parametrize("ping", [b"PING\r\n", b"*1\r\n$4\r\nPING\r\n", b"*2\r\n$4\r\nping\r\n$2\r\nhi\r\n"])
def test_redis_answers_a_ping(ping: bytes) -> None:
    assert talk("redis", ping, until=7) == b"+PONG\r\n"


def test_redis_knows_nothing_else() -> None:
    assert talk("redis", b"*1\r\n$4\r\nKEYS\r\n", until=5).startswith(b"-ERR unknown command 'KEYS'")
