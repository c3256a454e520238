"""A load generator that counts what a client would notice: every request has an outcome, and none is tried again.

Three kinds of client at once: connections that are kept open (``keep``), a new connection for each request (``new``),
and requests whose answer takes seconds (``slow``). It needs nothing but Python's standard library, so that it can run
on any host:  python3 generator.py --url http://10.0.2.31:8000 --seconds 60 --keep 8 --new 4 --slow 2

It prints one JSON object: how many requests of each kind, how many failed and how, the latencies, and which releases
answered when. A connection that the server closed between two requests is no failure of a request (HTTP allows it,
and says so with ``Connection: close``); one that it closed after the request was sent is one. So is every status but 200,
unless the answer is the application's own error (``--own-error``, a text in its body), which is counted by itself.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import json
import signal
import sys
import time
import urllib.parse
from typing import Any

LIMIT = 60.0  # seconds that any request may take


class Failure(Exception):
    """A request that was not answered as it should be."""


class Outcome:
    """What happened, counted as it happens."""

    def __init__(self) -> None:
        self.begun = time.time()
        self.done: collections.Counter[str] = collections.Counter()
        self.failed: collections.Counter[str] = collections.Counter()
        self.first_failures: list[str] = []
        self.failed_from = self.failed_until = 0.0  # when the first and the last request that failed were begun
        self.own_errors = 0
        self.reconnects = 0
        self.latencies: dict[str, list[float]] = collections.defaultdict(list)
        self.releases: dict[str, list[float]] = {}
        self.longest = 0.0

    def good(self, kind: str, seconds: float, release: str) -> None:
        self.done[kind] += 1
        self.latencies[kind].append(seconds)
        self.longest = max(self.longest, seconds) if kind != "slow" else self.longest
        now = round(time.time() - self.begun, 3)
        seen = self.releases.setdefault(release, [now, now, 0])
        seen[1], seen[2] = now, seen[2] + 1

    def bad(self, kind: str, method: str, error: BaseException, began: float) -> None:
        self.failed_from = min(self.failed_from or began, began)
        self.failed_until = max(self.failed_until, began)
        text = f"{kind} {method}: {type(error).__name__} {error}"[:200]
        self.failed[text] += 1
        if len(self.first_failures) < 20:
            self.first_failures.append(f"{time.time() - self.begun:.3f} s {text}")

    def report(self) -> dict[str, Any]:
        shown = {}
        for kind, values in self.latencies.items():
            values.sort()
            shown[kind] = {
                f"p{share}": round(1000 * values[min(len(values) - 1, len(values) * share // 100)], 2)
                for share in (50, 90, 99)
            }
            shown[kind]["max"] = round(1000 * values[-1], 2)
        return {
            "seconds": round(time.time() - self.begun, 1),
            "requests": sum(self.done.values()) + sum(self.failed.values()) + self.own_errors,
            "failed": sum(self.failed.values()),
            "begun": self.begun,
            "failed_from": self.failed_from,
            "failed_until": self.failed_until,
            "own_errors": self.own_errors,
            "by_kind": dict(self.done),
            "failures": dict(self.failed),
            "first_failures": self.first_failures,
            "reconnects": self.reconnects,
            "milliseconds": shown,
            "releases": self.releases,
        }


class Connection:
    """One HTTP/1.1 connection, by hand: a library would hide the resets that this is here to see."""

    def __init__(self, host: str, port: int) -> None:
        self.host, self.port = host, port
        self.reader: asyncio.StreamReader | None = None
        self.writer: asyncio.StreamWriter | None = None

    @property
    def usable(self) -> bool:
        return bool(self.writer and self.reader and not self.reader.at_eof() and not self.writer.is_closing())

    async def open(self) -> None:
        self.reader, self.writer = await asyncio.open_connection(self.host, self.port)

    async def request(self, method: str, path: str, body: bytes, keep: bool) -> tuple[int, bytes]:
        assert self.reader
        assert self.writer
        head = f"{method} {path} HTTP/1.1\r\nHost: {self.host}:{self.port}\r\n"
        head += f"Connection: {'keep-alive' if keep else 'close'}\r\n"
        if body:
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        self.writer.write(head.encode() + b"\r\n" + body)
        await self.writer.drain()
        answer = await self.reader.readuntil(b"\r\n\r\n")
        lines = answer.decode("latin-1").split("\r\n")
        status = int(lines[0].split(" ")[1])
        headers = {
            name.strip().lower(): value.strip() for name, _colon, value in (li.partition(":") for li in lines[1:])
        }
        content = await self.reader.readexactly(int(headers.get("content-length", "0")))
        if not keep or headers.get("connection", "").lower() == "close":
            self.close()
        return status, content

    def close(self) -> None:
        if self.writer:
            self.writer.close()
        self.reader = self.writer = None


async def client(kind: str, target: argparse.Namespace, outcome: Outcome, stop: asyncio.Event, number: int) -> None:
    """Ask until it is over."""
    parts = urllib.parse.urlsplit(target.url)
    connection = Connection(parts.hostname or "", parts.port or 80)
    count = 0
    while not stop.is_set():
        count += 1
        if kind == "slow":
            wanted = ("GET", f"{target.slow_path}{target.slow_seconds}", b"")
        elif (count + number) % 5 == 0:
            wanted = ("POST", "/v1/echo", b'{"text": "hello"}')
        else:
            wanted = ("GET", target.path, b"")
        began, at = time.monotonic(), time.time()
        try:
            async with asyncio.timeout(LIMIT):
                if not connection.usable:
                    if kind == "keep" and count > 1:
                        outcome.reconnects += 1
                    connection.close()
                    await connection.open()
                status, content = await connection.request(*wanted, keep=kind != "new")
            if status != 200 and target.own_error and target.own_error.encode() in content:
                outcome.own_errors += 1
            elif status != 200:
                raise Failure(f"was answered {status}: {content[:60]!r}")
            else:
                answer = json.loads(content)
                outcome.good(kind, time.monotonic() - began, str(answer.get("tag", "-")))
        except Exception as error:
            outcome.bad(kind, wanted[0], error, at)
            connection.close()
            await asyncio.sleep(0.05)
        if target.pause:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(stop.wait(), target.pause)
    connection.close()


async def run(target: argparse.Namespace) -> Outcome:
    """All clients until the time is over or SIGTERM, but not before the number of requests is reached."""
    outcome, stop = Outcome(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    kinds = ["keep"] * target.keep + ["new"] * target.new + ["slow"] * target.slow
    over = asyncio.Event()
    tasks = [asyncio.create_task(client(kind, target, outcome, over, at)) for at, kind in enumerate(kinds)]
    begun = time.monotonic()
    while (passed := time.monotonic() - begun) < target.most:
        if sum(outcome.done.values()) >= target.requests and (stop.is_set() or passed >= target.seconds):
            break
        await asyncio.sleep(0.05)
    over.set()
    await asyncio.gather(*tasks)
    return outcome


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--url", required=True)
    parser.add_argument("--path", default="/health")
    parser.add_argument("--slow-path", default="/v1/slow?seconds=")
    parser.add_argument("--slow-seconds", default="4")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--requests", type=int, default=0, help="do not end before so many were answered")
    parser.add_argument(
        "--most", type=float, default=3000, help="seconds after which it ends, however few were answered"
    )
    parser.add_argument("--own-error", default="", help="text of the application's own errors; they are no failures")
    parser.add_argument("--keep", type=int, default=8, help="clients that keep their connection")
    parser.add_argument("--new", type=int, default=4, help="clients that make a connection for each request")
    parser.add_argument("--slow", type=int, default=2, help="clients whose answers take seconds")
    parser.add_argument("--pause", type=float, default=0.0, help="seconds between a client's requests")
    return parser.parse_args(argv)


if __name__ == "__main__":
    result = asyncio.run(run(arguments(sys.argv[1:]))).report()
    print(json.dumps(result))
    sys.exit(1 if result["failed"] else 0)
