"""A hub on 127.0.0.1 that answers as the real one does, with a second host for large files, and misbehaves on demand."""

from __future__ import annotations

import hashlib
import http.server
import json
import re
import threading
import time
import urllib.parse
from collections import defaultdict
from collections.abc import Callable
from typing import Any

REPOSITORY = "nemo-lab/tiny"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_NeverToBeSeen"


def blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


class FakeHub:
    """One repository. `large` are the files that the hub keeps elsewhere and redirects to."""

    def __init__(self) -> None:
        self.repository, self.commit = REPOSITORY, COMMIT
        self.refs = {"main": COMMIT}
        self.files: dict[str, bytes] = {}
        self.large: set[str] = set()
        self.gated = False
        self.renamed_from = ""
        self.page = 1000
        self.overrides: dict[str, dict[str, Any]] = {}  # path -> fields of its entry in the listing
        self.requests: list[tuple[str, str, str, str]] = []  # host, method, path, Range
        self.tokens: list[tuple[str, str]] = []  # host, Authorization
        # What goes wrong with the bytes of a file, one entry for each request of it.
        self.faults: dict[str, list[Any]] = defaultdict(list)
        self.statuses: dict[str, list[tuple[int, dict[str, str]]]] = defaultdict(list)  # path -> status and headers
        self.ranges = True
        self.rate = 0  # bytes a second, 0 for all at once
        self.hold = threading.Event()  # what a fault "hang" waits for
        self.listing: Callable[[Any], Any] = lambda data: data
        self.hub, self.cdn = self._serve("hub"), self._serve("cdn")
        self.url = f"http://127.0.0.1:{self.hub.server_address[1]}"
        self.cdn_url = f"http://127.0.0.2:{self.cdn.server_address[1]}"

    def add(self, path: str, data: bytes, large: bool = False) -> None:
        self.files[path] = data
        if large:
            self.large.add(path)

    def close(self) -> None:
        self.hold.set()
        for server in (self.hub, self.cdn):
            server.shutdown()
            server.server_close()

    def asked(self, path: str) -> list[str]:
        """The ranges that were asked for of a file's bytes."""
        return [
            part for host, method, asked, part in self.requests
            if method == "GET" and asked.endswith(path) and (host == "cdn") == (path in self.large)
        ]  # fmt: skip

    def _serve(self, host: str) -> http.server.ThreadingHTTPServer:
        fake = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                fake.handle(host, self)

            def do_HEAD(self) -> None:
                fake.handle(host, self)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1" if host == "hub" else "127.0.0.2", 0), Handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return server

    def handle(self, host: str, request: Any) -> None:
        parts = urllib.parse.urlsplit(request.path)
        path, query = urllib.parse.unquote(parts.path), urllib.parse.parse_qs(parts.query)
        self.requests.append((host, request.command, path, request.headers.get("Range", "")))
        self.tokens.append((host, request.headers.get("Authorization", "")))
        if self.statuses[path]:
            status, headers = self.statuses[path].pop(0)
            return self.answer(request, status, b"", headers)
        if host == "cdn":
            return self.send(request, path[1:])
        if self.renamed_from and f"/{self.renamed_from}/" in path:
            target = path.replace(self.renamed_from, self.repository)
            return self.answer(request, 307, b"", {"Location": target + (f"?{parts.query}" if parts.query else "")})
        given = request.headers.get("Authorization", "")
        if given and given != f"Bearer {TOKEN}":
            return self.error(request, 401, "", "Invalid credentials in Authorization header")
        found = re.fullmatch(rf"/api/models/{self.repository}/(revision|tree)/(.+)", path)
        if found:
            return self.api(request, found[1], found[2], query)
        found = re.fullmatch(rf"/{self.repository}/resolve/([^/]+)/(.+)", path)
        if not found:
            return self.error(request, 401, "RepoNotFound", "Invalid username or password.")
        if self.gated and not given:
            return self.error(request, 401, "GatedRepo", "Access to this model is restricted.")
        if found[1] != self.commit:
            return self.error(request, 404, "RevisionNotFound", "Invalid rev id")
        if found[2] not in self.files:
            return self.error(request, 404, "EntryNotFound", "Entry not found")
        if found[2] in self.large:
            location = f"{self.cdn_url}/{urllib.parse.quote(found[2])}?X-Amz-Signature=secret-signature"
            linked = hashlib.sha256(self.files[found[2]]).hexdigest()
            return self.answer(request, 302, b"", {"Location": location, "X-Linked-Etag": f'"{linked}"'})
        return self.send(request, found[2])

    def api(self, request: Any, kind: str, revision: str, query: dict[str, list[str]]) -> None:
        commit = self.refs.get(revision, revision)
        if commit != self.commit:
            return self.error(request, 404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if kind == "revision":
            return self.json(request, {"id": self.repository, "sha": commit, "gated": self.gated and "auto"})
        entries = [self.entry(path) for path in sorted(self.files)]
        first = int(query.get("cursor", ["0"])[0])
        headers = {}
        if first + self.page < len(entries):
            following = (
                f"{self.url}/api/models/{self.repository}/tree/{revision}?recursive=true&cursor={first + self.page}"
            )
            headers["Link"] = f'<{following}>; rel="next"'
        return self.json(request, self.listing(entries[first : first + self.page]), headers)

    def entry(self, path: str) -> dict[str, Any]:
        data = self.files[path]
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": blob(data)}
        if path in self.large:
            entry["oid"] = blob(b"a pointer to " + path.encode())
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
        return {**entry, **self.overrides.get(path, {})}

    def send(self, request: Any, path: str) -> None:
        """The bytes of a file, or what a fault makes of them."""
        data = self.files[path]
        wanted = re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range", ""))
        start = int(wanted[1]) if wanted and self.ranges else 0
        if start and start >= len(data):
            return self.answer(request, 416, b"")
        fault = self.faults[path].pop(0) if self.faults[path] and request.command == "GET" else None
        rest = data[start:]
        if fault == "flip":
            rest = bytes([rest[0] ^ 1]) + rest[1:]
        headers = {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if start else {}
        if fault == "wrong-part":
            headers = {"Content-Range": f"bytes {start + 1}-{len(data) - 1}/{len(data)}"}
        if fault == "other-size":
            rest = rest + b"more"
            headers = {}
        status = 206 if start or fault == "wrong-part" else 200
        if isinstance(fault, tuple):  # ("cut", bytes) and ("hang", bytes)
            kind, count = fault
            self.answer(request, status, rest, headers, count)
            if kind == "hang":
                self.hold.wait(20)
            request.close_connection = True
            return None
        return self.answer(request, status, rest, headers)

    def answer(
        self, request: Any, status: int, body: bytes, headers: dict[str, str] | None = None, cut: int | None = None
    ) -> None:
        request.send_response(status)
        for name, value in (headers or {}).items():
            request.send_header(name, value)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        if request.command == "HEAD":
            return
        try:
            body = body if cut is None else body[:cut]
            step = max(self.rate // 20, 1) if self.rate else len(body) or 1
            for begin in range(0, len(body), step):
                request.wfile.write(body[begin : begin + step])
                if self.rate:
                    time.sleep(step / self.rate)
            request.wfile.flush()
        except OSError:
            request.close_connection = True  # the client is gone

    def json(self, request: Any, data: Any, headers: dict[str, str] | None = None) -> None:
        self.answer(request, 200, json.dumps(data).encode(), headers)

    def error(self, request: Any, status: int, code: str, message: str) -> None:
        headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
        self.answer(request, status, json.dumps({"error": message}).encode(), headers)
