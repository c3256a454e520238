# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""nemo.platform.model_snapshot against a hub of its own, as Ansible runs it: a process that reads its arguments from stdin."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.helpers import ROOT
from tests.unit.plugins.modules.fake_hub import COMMIT, REPOSITORY, TOKEN, FakeHub

MODULE = ROOT / "plugins" / "modules" / "model_snapshot.py"
SMALL = 3000
LARGE = 3_000_000


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    fake = FakeHub()
    noise = random.Random(4)
    fake.add("config.json", b'{"model_type": "llama"}')
    fake.add("tokenizer/tokenizer.json", noise.randbytes(SMALL))
    fake.add("README.md", b"# words")
    fake.add("model-00001-of-00002.safetensors", noise.randbytes(LARGE), large=True)
    fake.add("model-00002-of-00002.safetensors", noise.randbytes(LARGE // 2), large=True)
    fake.add("pytorch_model.bin", b"pickle", large=True)
    yield fake
    fake.close()


class Host:
    """One host: its folders, and runs on it."""

    def __init__(self, folder: Path, hub: FakeHub) -> None:
        self.root, self.run_path, self.hub = folder / "hub", folder / "run", hub
        self.path = self.root / REPOSITORY.replace("/", "--") / COMMIT
        self.partial = self.root / ".partial" / REPOSITORY.replace("/", "--") / COMMIT
        self.progress_file = self.run_path / "progress" / f"model-{REPOSITORY.replace('/', '--')}"

    def command(self, **changes: Any) -> tuple[list[str], bytes, dict[str, str]]:
        check, environment = changes.pop("check", False), changes.pop("environment", {})
        arguments = {
            "repository": REPOSITORY, "revision": COMMIT, "path": str(self.root), "endpoint": self.hub.url,
            "run_path": str(self.run_path), "stall_timeout": 2, "retries": 1, "min_free_disk_mb": 0, "timeout": 30,
            "_ansible_check_mode": check, "_ansible_diff": True, **changes,
        }  # fmt: skip
        bare = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
        paths = os.pathsep.join([str(ROOT / "collections"), str(ROOT), *sys.path])
        return (
            [sys.executable, "-W", "ignore", str(MODULE)],
            json.dumps({"ANSIBLE_MODULE_ARGS": arguments}).encode(),
            {**bare, "PYTHONPATH": paths, **environment},
        )

    def start(self, **changes: Any) -> subprocess.Popen[bytes]:
        command, given, environment = self.command(**changes)
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert process.stdin
        process.stdin.write(given)
        process.stdin.close()
        process.stdin = None
        return process

    @staticmethod
    def result(process: subprocess.Popen[bytes]) -> dict[str, Any]:
        out, err = process.communicate(timeout=60)
        assert out, err.decode()
        data: dict[str, Any] = json.loads(out)
        data["stderr"] = err.decode()
        return data

    def run(self, **changes: Any) -> dict[str, Any]:
        return self.result(self.start(**changes))

    def worker(self) -> int:
        """The process that holds the lock."""
        (lock,) = self.run_path.glob("model-*.lock")
        return int(json.loads(lock.read_text())["pid"])

    def said(self) -> list[str]:
        return self.progress_file.read_text().splitlines()

    def contents(self) -> dict[str, bytes]:
        return {
            str(path.relative_to(self.path)): path.read_bytes()
            for path in self.path.rglob("*")
            if path.is_file() and not path.name.startswith(".nemo")
        }

    def intact(self) -> bool:
        wanted = {path: data for path, data in self.hub.files.items() if not path.endswith((".md", ".bin"))}
        return self.contents() == wanted and not self.partial.exists()


@pytest.fixture
def host(tmp_path: Path, hub: FakeHub) -> Host:
    return Host(tmp_path, hub)


def eventually(what: Any, seconds: float = 15) -> Any:
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        found = what()
        if found:
            return found
        time.sleep(0.02)
    raise AssertionError("it did not come to be")


# -- a download


def test_a_model_is_fetched_and_then_needs_no_hub(host: Host, hub: FakeHub) -> None:
    result = host.run()
    assert (result["changed"], result["action"]) == (True, "fetched"), result
    assert result["path"] == str(host.path)
    assert host.intact()
    assert result["total_size"] == sum(entry["size"] for entry in result["files"].values())
    assert set(result["files"]) == set(host.contents())
    hub.requests.clear()
    again = host.run()
    assert (again["changed"], again["action"]) == (False, "present"), again
    assert again["files"] == result["files"]
    assert hub.requests == []


def test_in_the_background_and_attached_to(host: Host, hub: FakeHub) -> None:
    hub.rate = 1_000_000
    started = host.run(wait=False)
    assert (started["changed"], started["action"]) == (True, "started"), started
    assert started["missing"] == sum(
        len(data) for path, data in hub.files.items() if not path.endswith((".md", ".bin"))
    )
    assert not host.path.exists()
    assert host.run(wait=False)["action"] == "started"
    result = host.run()
    assert (result["changed"], result["action"]) == (True, "fetched"), result
    assert host.intact()
    assert len(hub.asked("model-00001-of-00002.safetensors")) == 1
    assert any(" MB/s, " in line and line.endswith(" left") for line in host.said()) or len(host.said()) < 4
