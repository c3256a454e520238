"""One request for the metrics, on a connection that systemd accepted: GET /metrics, and nothing else.

    gpu_metrics_http.py FILE NETWORK...       only who comes from one of the networks is answered

Run by nemo-gpu-metrics-http@.service, whose standard input and output are the connection. Standard library only.
"""

from __future__ import annotations

import ipaddress
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

LONGEST_LINE = 8192
MOST_LINES = 100
# Seconds that a client may take.
PATIENCE = 10
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def inside(peer: str, networks: Sequence[ipaddress.IPv4Network | ipaddress.IPv6Network]) -> bool:
    """Whether an address, as systemd tells it, is in one of the networks."""
    try:
        address = ipaddress.ip_address(peer.partition("%")[0])
    except ValueError:
        return False
    return any(address in network for network in networks)


def answer(request: str, page: Path, allowed: bool) -> tuple[str, str, str]:
    """Status, content type and body."""
    words = request.split()
    if not allowed:
        return "403 Forbidden", "text/plain", "not from this address; see gpu_health_sources\n"
    if len(words) != 3 or not words[2].startswith("HTTP/1."):
        return "400 Bad Request", "text/plain", "a request line of HTTP/1.1 is expected\n"
    if words[0] not in ("GET", "HEAD"):
        return "405 Method Not Allowed", "text/plain", "GET and HEAD are answered\n"
    if words[1].partition("?")[0] != "/metrics":
        return "404 Not Found", "text/plain", "the metrics are at /metrics\n"
    try:
        return "200 OK", CONTENT_TYPE, page.read_text(encoding="utf-8")
    except OSError as error:
        return "503 Service Unavailable", "text/plain", f"{page}: {error.strerror}; see nemo-gpu-metrics.service\n"


def main(path: str, *sources: str) -> int:
    networks = [ipaddress.ip_network(source, strict=False) for source in sources]
    signal.alarm(PATIENCE)
    request = sys.stdin.buffer.readline(LONGEST_LINE).decode("latin-1").strip()
    for _ in range(MOST_LINES):
        if sys.stdin.buffer.readline(LONGEST_LINE).strip() == b"":
            break
    status, kind, body = answer(request, Path(path), inside(os.environ.get("REMOTE_ADDR", ""), networks))
    raw = body.encode()
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(raw)}\r\nConnection: close\r\n\r\n"
    sys.stdout.buffer.write(head.encode() + (b"" if request.startswith("HEAD ") else raw))
    sys.stdout.buffer.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
