"""What a webhook is told, and that it can spoil nothing."""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from ansible_collections.nemo.platform.plugins.action import release_announcement
from tests.unit.helpers import ROOT

GOOD: dict[str, Any] = {
    "changed": True,
    "action": "replaced",
    "release": {"id": "r2", "tag": "prod-2", "digest": "sha256:2", "image": "registry/ai", "since": "then"},
    "previous": {"tag": "prod-1"},
    "steps": ["0.4 s: pulling x", "12.5 s: draining y"],
}
BAD: dict[str, Any] = {
    "failed": True,
    "changed": True,
    "action": "removed",
    "release": {"tag": "prod-1", "digest": "sha256:1"},
    "reason": "unhealthy",
    "msg": "api: registry/ai:prod-2 failed [unhealthy]: no answer.\nIts last log lines:\n  password=hunter2",
    "steps": [],
}
PATH = "/hooks/T0P-S3CRET"


class Webhook:
    """Takes announcements, or answers with these statuses first."""

    def __init__(self) -> None:
        self.statuses: list[int] = []
        self.asked = 0
        self.taken: list[dict[str, Any]] = []
        self.delay = 0.0
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                outer.asked += 1
                body = self.rfile.read(int(self.headers["Content-Length"]))
                status = outer.statuses.pop(0) if outer.statuses else 204
                if status < 300:
                    outer.taken.append(json.loads(body))
                outer.over.wait(outer.delay)
                self.send_response(status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.over = threading.Event()
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}{PATH}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def webhook() -> Iterator[Webhook]:
    made = Webhook()
    yield made
    made.over.set()
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture
def announce(tmp_path: Path) -> Callable[..., str]:
    """Run it as the role does; what Ansible said, with everything that -vvv shows."""

    def call(url: str, result: dict[str, Any], *options: str, **more: Any) -> str:
        task = {
            "nemo.platform.release_announcement": {
                "url": "{{ hook }}", "service": "api", "operator": "alice", "tag": "prod-2", "result": result, "timeout": 1, "retries": 1,
                **more,
            },
            "no_log": True,
        }  # fmt: skip
        path = tmp_path / "play.yml"
        play = {"hosts": "localhost", "gather_facts": False, "vars": {"hook": url}, "tasks": [task]}
        path.write_text(yaml.safe_dump([play]))
        done = subprocess.run(
            [str(Path(sys.executable).parent / "ansible-playbook"), "-i", "localhost,", "-c", "local", "-vvv", str(path), *options],
            cwd=ROOT, env={**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg")}, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60, check=False,
        )  # fmt: skip
        output = done.stdout
        assert done.returncode == 0, output
        assert "T0P-S3CRET" not in output
        return output

    return call


def test_a_release(webhook: Webhook, announce: Callable[..., str]) -> None:
    announce(webhook.url, GOOD, text_key="text")
    (said,) = webhook.taken
    assert said.pop("at").endswith("Z")
    assert said == {
        "service": "api", "host": "localhost", "by": "alice", "kind": "replaced", "result": "ok", "tag": "prod-2",
        "digest": "sha256:2", "image": "registry/ai", "previous": "prod-1", "reason": "", "seconds": 12.5,
        "text": "api on localhost: replaced prod-2 by alice",
    }  # fmt: skip


def test_a_failure_tells_the_tag_that_failed_and_no_log_line() -> None:
    arguments = {"service": "api", "operator": "", "tag": "prod-2", "digest": "", "result": BAD, "text_key": "sentence"}
    said = release_announcement.announcement(arguments, "one", "now")
    assert (said["result"], said["reason"], said["tag"], said["digest"]) == ("failed", "unhealthy", "prod-2", "")
    assert said["sentence"].startswith(
        "api on one: prod-2 by somebody FAILED: api: registry/ai:prod-2 failed [unhealthy]"
    )
    assert "hunter2" not in json.dumps(said)
    assert said["seconds"] is None


@pytest.mark.parametrize("result", [{"changed": False}, {}])
def test_nothing_to_say(webhook: Webhook, announce: Callable[..., str], result: dict[str, Any]) -> None:
    announce(webhook.url, result)
    announce("", GOOD)
    announce(webhook.url, GOOD, "--check")
    assert webhook.asked == 0


def test_a_second_attempt(webhook: Webhook, announce: Callable[..., str]) -> None:
    webhook.statuses = [503]
    assert "was not told" not in announce(webhook.url, GOOD)
    assert len(webhook.taken) == 1


@pytest.mark.parametrize(
    ("statuses", "asked", "says"),
    [([500, 502, 503], 2, "it answered 502"), ([404], 1, "it answered 404"), ([302], 1, "it answered 302")],
)
def test_a_webhook_that_does_not_want_it_is_a_warning(
    webhook: Webhook, announce: Callable[..., str], statuses: list[int], asked: int, says: str
) -> None:
    webhook.statuses = statuses
    assert says in announce(webhook.url, GOOD)
    assert webhook.asked == asked


def test_a_webhook_that_hangs(webhook: Webhook, announce: Callable[..., str]) -> None:
    webhook.delay = 30
    assert "it cannot be reached" in announce(webhook.url, GOOD, retries=0)


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:1/T0P-S3CRET", "http://no.invalid/T0P-S3CRET", "T0P-S3CRET", "http://[T0P-S3CRET"]
)
def test_an_address_where_nobody_is(announce: Callable[..., str], url: str) -> None:
    assert "was not told" in announce(url, GOOD, retries=0)
