"""The lab's model hub: the part of the Hugging Face Hub's HTTP interface that a download needs, below /hub on the mirror.

Models lie in <folder>/hub/<owner>/<name>: repository.json says what there is, and <commit>/ has the files of a commit. Large files are
answered with a redirect, as the real hub does. How it behaves beyond that is set by `PUT /hub/lab` with a JSON object, and `GET /hub/lab`
tells it, together with the number of requests so far:

  rate   bytes a second of each download, 0 for as fast as it goes
  flip   the next N downloads of a large file have a wrong byte
  cut    the next N downloads of a large file end half way
  fail   the next N requests are answered 503
"""

from __future__ import annotations

import json
import pathlib
import re
import threading
import time
import urllib.parse
from typing import Any, BinaryIO

PREFIX = "/hub"
TOKEN = "lab-hub-token"
CONTROL = f"{PREFIX}/lab"
DEFAULTS = {"rate": 0, "flip": 0, "cut": 0, "fail": 0}
CHUNK = 1 << 16


class Behaviour:
    """What is wrong with the hub at the moment."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.values = dict(DEFAULTS)
        self.requests = 0

    def state(self) -> dict[str, int]:
        with self.lock:
            return {**self.values, "requests": self.requests}

    def set(self, given: dict[str, Any]) -> None:
        unknown = sorted(set(given) - set(DEFAULTS))
        if unknown:
            raise ValueError(f"unknown: {', '.join(unknown)}; allowed: {', '.join(DEFAULTS)}")
        with self.lock:
            self.values = {**DEFAULTS, **{name: int(value) for name, value in given.items()}}

    def take(self, name: str) -> bool:
        """Whether this is one of the next N."""
        with self.lock:
            if self.values[name] <= 0:
                return False
            self.values[name] -= 1
            return True


BEHAVIOUR = Behaviour()


def answer(request: Any, root: pathlib.Path) -> None:
    """One request below /hub, with or without its body."""
    parts = urllib.parse.urlsplit(request.path)
    path = urllib.parse.unquote(parts.path)
    if path == CONTROL:
        return _control(request)
    with BEHAVIOUR.lock:
        BEHAVIOUR.requests += 1
    if BEHAVIOUR.take("fail"):
        return _send(request, 503, b"", {"Retry-After": "1"})
    found = re.fullmatch(rf"{PREFIX}/cdn/([^/]+/[^/]+)/([0-9a-f]{{40}})/([0-9a-f]{{64}})/(.+)", path)
    if found:  # a signed address needs no token
        known = {"X-Repo-Commit": found[2], "ETag": f'"{found[3]}"'}
        return _file(request, root / "hub" / found[1] / found[2] / found[4], known, large=True)
    given = request.headers.get("Authorization", "")
    if given and given != f"Bearer {TOKEN}":
        return _error(request, 401, "", "Invalid credentials in Authorization header")
    found = re.fullmatch(rf"{PREFIX}/api/models/([^/]+/[^/]+)/(revision|tree)/(.+)", path) or re.fullmatch(
        rf"{PREFIX}/([^/]+/[^/]+)/(resolve)/([^/]+)/.+", path
    )
    repository = _repository(root, found[1]) if found else None
    if not found or not repository:
        return _error(request, 401, "RepoNotFound", "Invalid username or password.")
    commit = repository["refs"].get(found[3], found[3])
    if commit not in repository["commits"]:
        return _error(request, 404, "RevisionNotFound", f"Invalid rev id: {found[3]}")
    if found[2] == "revision":
        gated = "manual" if repository["gated"] else False
        return _json(request, {"id": found[1], "sha": commit, "gated": gated, "private": False})
    entries = repository["commits"][commit]
    if found[2] == "tree":
        return _json(request, entries)
    if repository["gated"] and not given:
        return _error(request, 401, "GatedRepo", f"Access to model {found[1]} is restricted.")
    name = path.split(f"/resolve/{found[3]}/", 1)[1]
    entry = next((entry for entry in entries if entry["path"] == name), None)
    if not entry:
        return _error(request, 404, "EntryNotFound", "Entry not found")
    if "lfs" in entry:
        digest = entry["lfs"]["oid"]
        location = f"{PREFIX}/cdn/{found[1]}/{commit}/{digest}/{urllib.parse.quote(name)}?Signature=lab"
        linked = {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(entry["size"])}
        return _send(request, 302, b"", {"Location": location, "X-Repo-Commit": commit, **linked})
    known = {"X-Repo-Commit": commit, "ETag": f'"{entry["oid"]}"'}
    return _file(request, root / "hub" / found[1] / commit / name, known, large=False)


def _control(request: Any) -> None:
    if request.command == "PUT":
        try:
            BEHAVIOUR.set(json.loads(request.rfile.read(int(request.headers.get("Content-Length") or 0)) or b"{}"))
        except (ValueError, TypeError, AttributeError) as error:
            return _send(request, 400, f"{error}\n".encode())
    return _json(request, BEHAVIOUR.state())


def _repository(root: pathlib.Path, name: str) -> Any:
    description = root / "hub" / name / "repository.json"
    if ".." in name or not description.is_file():
        return None
    return json.loads(description.read_bytes())


def _file(request: Any, path: pathlib.Path, headers: dict[str, str], large: bool) -> None:
    if ".." in path.parts or not path.is_file():
        return _error(request, 404, "EntryNotFound", "Entry not found")
    size = path.stat().st_size
    wanted = re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range", ""))
    start = int(wanted[1]) if wanted else 0
    if start and start >= size:
        return _send(request, 416, b"", {"Content-Range": f"bytes */{size}"})
    request.send_response(206 if start else 200)
    if start:
        request.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
    for name, value in headers.items():
        request.send_header(name, value)
    request.send_header("Content-Type", "application/octet-stream")
    request.send_header("Content-Length", str(size - start))
    request.end_headers()
    if request.command == "HEAD":
        return None
    flip, cut = large and BEHAVIOUR.take("flip"), large and BEHAVIOUR.take("cut")
    with path.open("rb") as file:
        file.seek(start)
        _body(request, file, (size - start) // 2 if cut else size - start, flip)
    if cut:
        request.close_connection = True
    return None


def _body(request: Any, file: BinaryIO, length: int, flip: bool) -> None:
    begun, sent = time.monotonic(), 0
    while sent < length:
        block = file.read(min(CHUNK, length - sent))
        if flip and not sent:
            block = bytes([block[0] ^ 1]) + block[1:]
        request.wfile.write(block)
        sent += len(block)
        rate = BEHAVIOUR.values["rate"]
        if rate:
            time.sleep(max(sent / rate - (time.monotonic() - begun), 0))


def _json(request: Any, data: Any) -> None:
    _send(request, 200, json.dumps(data).encode(), {"Content-Type": "application/json"})


def _error(request: Any, status: int, code: str, message: str) -> None:
    headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
    _send(request, status, json.dumps({"error": message}).encode(), headers)


def _send(request: Any, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
    request.send_response(status)
    for name, value in (headers or {}).items():
        request.send_header(name, value)
    request.send_header("Content-Length", str(len(body)))
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.write(body)
