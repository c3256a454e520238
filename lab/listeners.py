"""Services of the platform that the lab does not have: each listens, and says what a client looks for first.

Runs on lab hosts, under their own Python and with its standard library alone:
  listeners.py KIND=ADDRESS:PORT[=TLS] ...      TLS: path of a certificate without its suffix .crt, its key beside it
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import datetime
import http.client
import json
import os
import re
import ssl
import struct
import sys
import urllib.parse
from collections.abc import Awaitable, Callable
from typing import Any

Reader = asyncio.StreamReader
Writer = asyncio.StreamWriter
IDLE = 600  # seconds after which a silent client is let go

# ---- HTTP

Answer = tuple[int, str, bytes]
Page = Callable[[str, str, dict[str, str]], Answer]


async def speak_http(reader: Reader, writer: Writer, page: Page) -> None:
    """Requests of one connection, one after the other; bodies are read and not looked at."""
    while head := await reader.readuntil(b"\r\n\r\n"):
        line, *rest = head.decode("latin-1").strip().split("\r\n")
        method, target, *_ = [*line.split(" "), "", ""]
        headers = {name.lower(): value.strip() for name, _, value in (entry.partition(":") for entry in rest)}
        await reader.readexactly(int(headers.get("content-length") or 0))
        status, kind, body = await asyncio.to_thread(page, method, target, headers)
        reason = http.client.responses.get(status, "")
        writer.write(
            f"HTTP/1.1 {status} {reason}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
            + (b"" if method == "HEAD" else body)
        )
        await writer.drain()
        if headers.get("connection", "").lower() == "close":
            return


def as_json(value: Any, status: int = 200) -> Answer:
    return status, "application/json", json.dumps(value).encode() + b"\n"


def node_port(_method: str, _target: str, _headers: dict[str, str]) -> Answer:
    """A service of the cluster, published on each node."""
    return 200, "text/plain", b"the cluster's service answers\n"


# ---- the cluster's API server

VERSION = {
    "major": "1", "minor": "33", "gitVersion": "v1.33.5-eks-lab", "gitCommit": "0" * 40, "gitTreeState": "clean",
    "buildDate": "2026-01-01T00:00:00Z", "goVersion": "go1.24.6", "compiler": "gc", "platform": "linux/amd64",
}  # fmt: skip
HEALTH = ("/healthz", "/livez", "/readyz")
NAMESPACES = ("default", "kube-system")
NODES = ("eks-node-a",)
STS = ("10.0.0.10", 5000)
ADMITTED = re.compile(r":assumed-role/nemo-bastion/")  # the roles with an access entry
TOKEN = "k8s-aws-v1."  # what `aws eks get-token` begins a token with
LIFETIME = datetime.timedelta(minutes=15)


def failure(code: int, reason: str, message: str) -> Answer:
    said = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure"}
    return as_json({**said, "message": message, "reason": reason, "code": code}, code)


def presigned(token: str, now: datetime.datetime) -> str:
    """Whose signature a token carries, as a header that STS understands; empty if it is none, or too old."""
    if not token.startswith(TOKEN):
        return ""
    text = token.removeprefix(TOKEN)
    try:
        url = urllib.parse.urlsplit(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)).decode())
        query = {name: values[0] for name, values in urllib.parse.parse_qs(url.query).items()}
        made = datetime.datetime.strptime(query["X-Amz-Date"], "%Y%m%dT%H%M%S%z")
    except (ValueError, KeyError):
        return ""
    if not re.fullmatch(r"sts(\.[a-z0-9-]+)?\.amazonaws\.com", url.hostname or "") or abs(now - made) > LIFETIME:
        return ""
    signed = query.get("X-Amz-SignedHeaders", "")
    if query.get("Action") != "GetCallerIdentity" or "x-k8s-aws-id" not in signed.split(";"):
        return ""
    parts = (
        f"Credential={query.get('X-Amz-Credential')}, SignedHeaders={signed}, Signature={query.get('X-Amz-Signature')}"
    )
    return f"AWS4-HMAC-SHA256 {parts}"


def caller(token: str) -> str:
    """The ARN of whoever made a token, by the account's own STS; empty if that is nobody."""
    signature = presigned(token, datetime.datetime.now(datetime.UTC))
    if not signature:
        return ""
    with contextlib.suppress(OSError):
        connection = http.client.HTTPConnection(*STS, timeout=5)
        path = "/?Action=GetCallerIdentity&Version=2011-06-15"
        connection.request("GET", path, headers={"Authorization": signature})
        answer = connection.getresponse()
        found = re.search(r"<Arn>([^<]+)</Arn>", answer.read().decode())
        return found[1] if answer.status == 200 and found else ""
    return ""


def listing(kind: str, names: tuple[str, ...], **more: Any) -> Answer:
    items = [{"metadata": {"name": name, "creationTimestamp": "2026-01-01T00:00:00Z"}, **more} for name in names]
    return as_json({"kind": f"{kind}List", "apiVersion": "v1", "metadata": {"resourceVersion": "1"}, "items": items})


def kubernetes(_method: str, target: str, headers: dict[str, str]) -> Answer:
    """The API server: version and health for everyone, a little more for the roles that are let in."""
    path = target.partition("?")[0].rstrip("/") or "/"
    if path == "/version":
        return as_json(VERSION)
    if path in HEALTH:
        return 200, "text/plain", b"ok"
    who = caller(headers.get("authorization", "").removeprefix("Bearer "))
    if not who or not ADMITTED.search(who):
        return failure(401, "Unauthorized", "Unauthorized")
    if path == "/api":
        return as_json({"kind": "APIVersions", "versions": ["v1"]})
    if path == "/apis":
        return as_json({"kind": "APIGroupList", "apiVersion": "v1", "groups": []})
    if path == "/api/v1":
        kinds = {"namespaces": ("Namespace", "ns"), "nodes": ("Node", "no")}
        entries = [
            {"name": name, "singularName": kind.lower(), "shortNames": [short], "namespaced": False, "kind": kind,
             "verbs": ["get", "list"]}
            for name, (kind, short) in kinds.items()
        ]  # fmt: skip
        return as_json({"kind": "APIResourceList", "groupVersion": "v1", "resources": entries})
    if path == "/apis/authentication.k8s.io/v1/selfsubjectreviews":
        user = {"username": who, "groups": ["system:authenticated"]}
        review = {"kind": "SelfSubjectReview", "apiVersion": "authentication.k8s.io/v1"}
        return as_json({**review, "metadata": {}, "status": {"userInfo": user}}, 201)
    if path == "/api/v1/namespaces":
        return listing("Namespace", NAMESPACES, status={"phase": "Active"})
    if path == "/api/v1/nodes":
        ready = {"conditions": [{"type": "Ready", "status": "True"}], "nodeInfo": {"kubeletVersion": "v1.33.5-eks-lab"}}
        return listing("Node", NODES, status=ready)
    return failure(404, "NotFound", "the server could not find the requested resource")


# ---- MySQL


def greeting() -> bytes:
    """What MySQL 8.0 says to whoever connects."""
    salt = os.urandom(20).replace(b"\0", b"\1")
    capabilities = 0xDFFFF7FF & ~0x0800  # all but TLS
    body = b"\x0a8.0.42\0" + struct.pack("<I", 8) + salt[:8] + b"\0" + struct.pack("<H", capabilities & 0xFFFF)
    body += b"\xff" + struct.pack("<H", 2) + struct.pack("<H", capabilities >> 16) + b"\x15" + bytes(10)
    return packet(0, body + salt[8:] + b"\0caching_sha2_password\0")


def packet(number: int, body: bytes) -> bytes:
    return len(body).to_bytes(3, "little") + bytes([number]) + body


async def mysql(reader: Reader, writer: Writer) -> None:
    writer.write(greeting())
    await writer.drain()
    head = await reader.readexactly(4)
    await reader.readexactly(int.from_bytes(head[:3], "little"))
    writer.write(
        packet(head[3] + 1, b"\xff" + struct.pack("<H", 1045) + b"#28000Access denied: the lab has no database")
    )


# ---- Kafka


def string(text: str | None) -> bytes:
    return struct.pack(">h", -1) if text is None else struct.pack(">h", len(text)) + text.encode()


def kafka_answer(key: int, version: int, address: tuple[str, int]) -> bytes | None:
    """The body of an answer: which requests are known (ApiVersions), and one broker without topics (Metadata)."""
    if key == 18:
        known = ((3, 0, 1), (18, 0, 0))
        error = 0 if version == 0 else 35  # then the client asks again, in version 0
        return struct.pack(">hi", error, len(known)) + b"".join(struct.pack(">hhh", *entry) for entry in known)
    if key == 3 and version <= 1:
        broker = struct.pack(">ii", 1, 0) + string(address[0]) + struct.pack(">i", address[1])
        rack_and_controller = string(None) + struct.pack(">i", 0) if version else b""
        return broker + rack_and_controller + struct.pack(">i", 0)
    return None


async def kafka(reader: Reader, writer: Writer) -> None:
    address = writer.get_extra_info("sockname")[:2]
    while True:
        (size,) = struct.unpack(">i", await reader.readexactly(4))
        if not 8 <= size <= 1 << 20:
            return
        request = await reader.readexactly(size)
        key, version, correlation = struct.unpack(">hhi", request[:8])
        body = kafka_answer(key, version, address)
        if body is None:
            return
        writer.write(struct.pack(">ii", 4 + len(body), correlation) + body)
        await writer.drain()


# ---- Redis


async def redis(reader: Reader, writer: Writer) -> None:
    """Redis and its Sentinel: a ping is answered, and nothing else is known."""
    while line := (await reader.readline()).strip():
        words = [line.decode(errors="replace")]
        if line[:1] == b"*":
            words = []
            for _ in range(min(int(line[1:]), 64)):
                size = int((await reader.readline())[1:])
                words.append((await reader.readexactly(size + 2))[:-2].decode(errors="replace"))
        name = words[0].split()[0].upper() if words and words[0].split() else ""
        writer.write(b"+PONG\r\n" if name == "PING" else f"-ERR unknown command '{name}'\r\n".encode())
        await writer.drain()


# ---- the process


def over_http(page: Page) -> Callable[[Reader, Writer], Awaitable[None]]:
    async def speak(reader: Reader, writer: Writer) -> None:
        await speak_http(reader, writer, page)

    return speak


KINDS: dict[str, Callable[[Reader, Writer], Awaitable[None]]] = {
    "kafka": kafka,
    "kubernetes": over_http(kubernetes),
    "mysql": mysql,
    "node-port": over_http(node_port),
    "redis": redis,
}


def accepting(speak: Callable[[Reader, Writer], Awaitable[None]]) -> Callable[[Reader, Writer], Awaitable[None]]:
    """One connection to its end; a client that hangs up or talks nonsense is nobody's error."""

    async def accept(reader: Reader, writer: Writer) -> None:
        with contextlib.suppress(OSError, EOFError, ValueError, asyncio.LimitOverrunError, asyncio.TimeoutError):
            await asyncio.wait_for(speak(reader, writer), IDLE)
        with contextlib.suppress(OSError):
            writer.close()
            await writer.wait_closed()

    return accept


async def main(arguments: list[str]) -> None:
    servers = []
    for argument in arguments:
        kind, address, *tls = argument.split("=")
        host, _, port = address.rpartition(":")
        context = None
        if tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(f"{tls[0]}.crt", f"{tls[0]}.key")
        servers.append(await asyncio.start_server(accepting(KINDS[kind]), host, int(port), ssl=context))
    await asyncio.gather(*(server.serve_forever() for server in servers))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1:]))
