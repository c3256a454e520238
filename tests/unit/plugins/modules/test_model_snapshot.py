# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""nemo.platform.model_snapshot against a hub of its own, as Ansible runs it: a process that reads its arguments from stdin."""

from __future__ import annotations

import hashlib
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
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ansible_collections.nemo.platform.plugins.module_utils import model_snapshot as logic
from ansible_collections.nemo.platform.plugins.module_utils.background import WorkError
from ansible_collections.nemo.platform.plugins.module_utils.downloads import Limits
from ansible_collections.nemo.platform.plugins.module_utils.model_hub import Hub, Passing, RemoteFile
from ansible_collections.nemo.platform.plugins.module_utils.progress import Progress
from tests.unit.helpers import ROOT
from tests.unit.plugins.modules.fake_hub import COMMIT, REPOSITORY, TOKEN, FakeHub, blob

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


def warned(result: dict[str, Any]) -> list[str]:
    """The warnings' texts, which ansible-core gives in an object of its own each."""
    return [json.dumps(warning) for warning in result.get("warnings", [])]


def eventually(what: Any, seconds: float = 15) -> Any:
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        found = what()
        if found:
            return found
        time.sleep(0.02)
    raise AssertionError("it did not come to be")


FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


# -- a download


def test_a_model_is_fetched_and_then_needs_no_hub(host: Host, hub: FakeHub) -> None:
    result = host.run()
    assert (result["changed"], result["action"]) == (True, "fetched"), result
    assert result["path"] == str(host.path)
    assert host.intact()
    assert not (host.root / ".partial").exists()
    assert [line.split(":")[0] for line in host.said()] == [
        "fetching 4 files of nemo-lab/tiny, 4.5 MB of 4.5 MB",
        "complete",
    ]
    assert result["total_size"] == sum(entry["size"] for entry in result["files"].values())
    assert result["files"][FIRST] == {"size": LARGE, "digest": f"sha256:{hashlib.sha256(hub.files[FIRST]).hexdigest()}"}
    assert set(result["files"]) == set(host.contents())
    hub.close()
    again = host.run()
    assert (again["changed"], again["action"]) == (False, "present"), again
    assert again["files"] == result["files"]


def test_in_the_background_and_attached_to(host: Host, hub: FakeHub) -> None:
    hub.rate = 200_000
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
    assert len(hub.asked(FIRST)) == 1


def test_two_runs_at_once_fetch_once(host: Host, hub: FakeHub) -> None:
    hub.rate = 2_000_000
    runs = [host.start() for _ in range(2)]
    assert [host.result(run)["action"] for run in runs] == ["fetched", "fetched"]
    assert host.intact()
    assert len(hub.asked(FIRST)) == len(hub.asked(SECOND)) == 1


def test_a_listing_of_many_pages(host: Host, hub: FakeHub) -> None:
    hub.page = 2
    assert host.run()["action"] == "fetched"
    assert host.intact()
    pages = [path for _host, _method, path, _range in hub.requests if "/tree/" in path]
    assert len(pages) == 3


def test_who_runs_the_engine_can_read_it_whatever_the_umask_is(host: Host) -> None:
    mask = os.umask(0o077)
    try:
        assert host.run(revision="main")["action"] == "fetched"
    finally:
        os.umask(mask)
    for path in [host.root, *host.root.rglob("*")]:
        assert path.stat().st_mode & 0o777 == (0o755 if path.is_dir() else 0o644), path
    assert host.progress_file.stat().st_mode & 0o777 == 0o644


def test_a_proxy_is_used(host: Host, hub: FakeHub) -> None:
    result = host.run(endpoint="http://hub.invalid", environment={"http_proxy": hub.url}, include=["*.json"])
    assert result["action"] == "fetched", result
    assert host.contents()["config.json"] == hub.files["config.json"]


# -- the token


def test_the_token_goes_to_the_hub_alone_and_stands_nowhere(host: Host, hub: FakeHub) -> None:
    hub.gated, hub.rate = True, 1_000_000
    started = host.run(token=TOKEN, wait=False)
    assert started["action"] == "started", started
    pid = eventually(host.worker)
    seen = Path(f"/proc/{pid}/cmdline").read_bytes() + Path(f"/proc/{pid}/environ").read_bytes()
    assert TOKEN.encode() not in seen
    result = host.run(token=TOKEN)
    assert result["action"] == "fetched", result
    assert {value for where, value in hub.tokens if where == "hub"} == {f"Bearer {TOKEN}"}
    assert {value for where, value in hub.tokens if where == "cdn"} == {""}
    shown = json.dumps([started, result]).replace("VALUE_SPECIFIED_IN_NO_LOG_PARAMETER", "")
    assert TOKEN not in shown
    for path in [*host.root.rglob("*"), *host.run_path.rglob("*")]:
        assert path.is_dir() or TOKEN.encode() not in path.read_bytes(), path


def test_a_gated_model_without_a_token(host: Host, hub: FakeHub) -> None:
    hub.gated = True
    result = host.run()
    assert (result["failed"], result["reason"]) == (True, "gated"), result
    assert "no token is given" in result["msg"]
    assert result["advice"] in result["msg"]
    assert not host.root.exists()


def test_a_token_without_access(host: Host, hub: FakeHub) -> None:
    hub.statuses[f"/{REPOSITORY}/resolve/{COMMIT}/config.json"] = [(403, {"X-Error-Code": "GatedRepo"})]
    result = host.run(token=TOKEN)
    assert (result["failed"], result["reason"]) == (True, "gated"), result
    assert "was not granted access" in result["msg"]


def test_a_token_that_the_hub_does_not_know(host: Host) -> None:
    result = host.run(token="hf_AnotherOne")
    assert (result["failed"], result["reason"]) == (True, "token"), result
    assert "hf_AnotherOne" not in json.dumps({**result, "invocation": ""})


def test_a_renamed_model_keeps_its_token(host: Host, hub: FakeHub) -> None:
    hub.gated, hub.renamed_from = True, "nemo-lab/old"
    result = host.run(repository="nemo-lab/old", token=TOKEN)
    assert result["action"] == "fetched", result
    assert {value for where, value in hub.tokens if where == "cdn"} == {""}


def test_a_redirect_away_from_tls_is_refused() -> None:
    hub = Hub("https://hub.invalid", TOKEN, Limits())
    with pytest.raises(WorkError, match="without TLS"):
        hub._check_target("https://hub.invalid/x", "http://hub.invalid/x")
    assert "Authorization" in hub._headers("https://hub.invalid/x")
    for other in ("http://hub.invalid/x", "https://hub.invalid:8443/x", "https://cdn.hub.invalid/x"):
        assert "Authorization" not in hub._headers(other)


# -- what the hub says no to


@pytest.mark.parametrize(
    ("changes", "reason", "text"),
    [
        ({"repository": "nemo-lab/nothing"}, "repository", "no model nemo-lab/nothing"),
        ({"revision": "f" * 40}, "revision", f"no revision {'f' * 40}"),
        ({"revision": "v9"}, "revision", "no revision v9"),
        ({"endpoint": "http://127.0.0.1:9"}, "unreachable", "http://127.0.0.1:9 does not answer"),
        ({"include": ["*.gguf"]}, "nothing", "none of the 6 files"),
        ({"min_free_disk_mb": 10**9}, "no_space", "free, and needs 4.5 MB for what is still missing and 1000000.0 GB"),
        ({"include": ["*.json", "*.md"], "exclude": []}, "", "holds weights"),
    ],
)
def test_what_is_found_before_anything_is_begun(host: Host, changes: dict[str, Any], reason: str, text: str) -> None:
    for check in (True, False):
        result = host.run(check=check, **changes)
        assert text in result.get("msg", "") or any(text in warning for warning in warned(result)), result
        assert result.get("reason", "") == reason
        if reason:
            assert result["failed"]
            assert not host.root.exists()
            assert not list(host.run_path.glob("*.outcome"))


def test_a_volume_that_is_not_mounted(host: Host) -> None:
    changes = {"mount_point": str(host.root.parent), "min_free_disk_mb": 10**9}
    result = host.run(**changes)
    assert (result["failed"], result["reason"]) == (True, "mount"), result
    checked = host.run(check=True, **changes)
    assert (checked["changed"], checked["action"]) == (True, "fetched"), checked
    assert any("is no check mounts it first" in warning for warning in warned(checked))
    assert not host.root.exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("repository", "tiny"), ("repository", "a/../b"), ("repository", "a/b--c"), ("revision", ""), ("revision", "a..b"),
        ("endpoint", "ftp://hub"), ("endpoint", "https://user@hub"), ("timeout", 0), ("parallel", 0), ("retries", -1),
        ("mount_point", "/elsewhere"), ("name", "../x"), ("include", []), ("token", "hf_a b"), ("token", "hf_a\nHost: b"),
    ],
)  # fmt: skip
def test_arguments(host: Host, name: str, value: Any) -> None:
    result = host.run(**{name: value})
    assert (result["failed"], result["reason"]) == (True, "arguments"), result
    assert name in result["msg"]
    assert "hf_a" not in result["msg"]
    assert not host.root.exists()


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"path": "../evil"}, "unsafe"), ({"path": "/evil"}, "unsafe"), ({"path": "a//b"}, "unsafe"),
        ({"oid": "none"}, "hub_answer"), ({"size": "many"}, "hub_answer"), ({"path": ".nemo-snapshot.json"}, "unsafe"),
    ],
)  # fmt: skip
def test_a_listing_that_cannot_be_right(host: Host, hub: FakeHub, entry: dict[str, Any], reason: str) -> None:
    hub.overrides["config.json"] = entry
    result = host.run()
    assert (result["failed"], result["reason"]) == (True, reason), result
    assert not host.root.exists()


def test_an_answer_that_is_no_json(host: Host, hub: FakeHub) -> None:
    hub.statuses[f"/api/models/{REPOSITORY}/revision/{COMMIT}"] = [(200, {"Content-Type": "text/html"})]
    assert host.run()["reason"] == "hub_answer"


def test_pickled_weights_are_refused_and_taken_where_they_are_named(host: Host, hub: FakeHub) -> None:
    del hub.files[FIRST], hub.files[SECOND]
    result = host.run()
    assert (result["failed"], result["reason"]) == (True, "pickle"), result
    assert "pytorch_model.bin" in result["msg"]
    result = host.run(include=["*.bin", "*.json"])
    assert result["action"] == "fetched", result
    assert any("runs code" in warning for warning in warned(result))
    assert "pytorch_model.bin" in host.contents()


# -- what goes wrong on the way


def test_a_line_that_breaks_goes_on_where_it_was(host: Host, hub: FakeHub) -> None:
    hub.faults[FIRST] = [("cut", 1_000_000), ("cut", 1_500_000)]
    result = host.run(retries=2)
    assert result["action"] == "fetched", result
    assert host.intact()
    assert hub.asked(FIRST) == ["", "bytes=1000000-", "bytes=2500000-"]
    assert any("ended after 1.0 MB" in line or "after 1.0 MB" in line for line in host.said())


def test_tries_that_bring_something_do_not_count(host: Host, hub: FakeHub) -> None:
    hub.add(FIRST, random.Random(5).randbytes(6_000_000), large=True)
    hub.faults[FIRST] = [("cut", 1_100_000)] * 5
    result = host.run(retries=1)
    assert result["action"] == "fetched", result
    assert len(hub.asked(FIRST)) == 6
    assert host.intact()


def test_a_line_that_always_breaks_ends_and_keeps_what_came(host: Host, hub: FakeHub) -> None:
    hub.faults[FIRST] = [("cut", 1000)] * 9
    result = host.run(retries=2)
    assert (result["failed"], result["reason"]) == (True, "unreachable"), result
    assert "3 tries in a row" in result["msg"]
    assert len(hub.asked(FIRST)) == 3
    assert not host.path.exists()
    hub.faults.clear()
    assert host.run()["action"] == "fetched"
    assert hub.asked(FIRST)[3:] == ["bytes=3000-"]
    assert not any("damaged" in line for line in host.said())
    assert host.intact()


def test_a_line_that_hangs(host: Host, hub: FakeHub) -> None:
    hub.faults[FIRST] = [("hang", 500_000)]
    result = host.run(stall_timeout=1)
    assert result["action"] == "fetched", result
    assert hub.asked(FIRST) == ["", "bytes=500000-"]
    assert host.intact()


def test_a_line_that_trickles(host: Host, hub: FakeHub) -> None:
    hub.rate = 200
    hub.files["tokenizer/tokenizer.json"] = b"x" * 5000
    result = host.run(stall_timeout=1, retries=1, include=["*/tokenizer.json", "*.safetensors"], parallel=1)
    assert (result["failed"], result["reason"]) == (True, "slow"), result
    assert "kB in " in result["msg"] or "B in 1 s" in result["msg"]


def test_a_server_without_parts(host: Host, hub: FakeHub) -> None:
    hub.ranges = False
    hub.faults[FIRST] = [("cut", 1_000_000)]
    assert host.run()["action"] == "fetched"
    assert host.intact()


@pytest.mark.parametrize("fault", ["wrong-part", "other-size"])
def test_another_part_or_another_file(host: Host, hub: FakeHub, fault: str) -> None:
    hub.faults[FIRST] = [fault]
    assert host.run()["action"] == "fetched"
    assert host.intact()


@pytest.mark.parametrize(
    "answer", [(503, {"Retry-After": "1"}), (429, {"RateLimit": '"api";r=0;t=1'}), (403, {}), (500, {})]
)
def test_answers_of_the_store_that_pass(host: Host, hub: FakeHub, answer: tuple[int, dict[str, str]]) -> None:
    """A signed address that has expired is answered 403: the next one comes from the hub again."""
    hub.statuses[f"/{FIRST}"] = [answer]
    assert host.run()["action"] == "fetched"
    assert host.intact()
    asked = [
        path
        for where, method, path, _range in hub.requests
        if where == "hub" and method == "GET" and path.endswith(FIRST)
    ]
    assert len(asked) == 2


@pytest.mark.parametrize("path", ["config.json", FIRST])
def test_a_damaged_file_is_fetched_again(host: Host, hub: FakeHub, path: str) -> None:
    hub.faults[path] = ["flip"]
    result = host.run()
    assert result["action"] == "fetched", result
    assert host.intact()
    assert hub.asked(path) == ["", ""]
    assert any(f"{path} arrived damaged" in line for line in host.said())


def test_a_file_that_is_always_damaged(host: Host, hub: FakeHub) -> None:
    hub.faults[FIRST] = ["flip"] * 3
    result = host.run()
    assert (result["failed"], result["reason"]) == (True, "corrupt"), result
    assert f"{FIRST} arrived damaged 3 times" in result["msg"]
    assert not host.path.exists()
    asked = len(hub.requests)
    assert host.run()["action"] == "fetched"
    assert not [path for _host, _method, path, _range in hub.requests[asked:] if path.endswith("tokenizer.json")]
    assert host.intact()


def test_a_part_that_was_altered_while_nobody_looked(host: Host, hub: FakeHub) -> None:
    hub.faults[FIRST] = [("cut", 1_000_000)] * 2
    assert host.run(retries=0, parallel=1)["reason"] == "unreachable"
    (part,) = [path for path in (host.partial / "parts").iterdir() if path.stat().st_size >= 1_000_000]
    with part.open("r+b") as file:
        file.write(b"altered")
    hub.faults.clear()
    assert host.run()["action"] == "fetched"
    assert host.intact()


# -- what ends the work


def test_a_worker_that_is_killed_is_replaced(host: Host, hub: FakeHub) -> None:
    hub.rate = 1_500_000
    run = host.start()
    pid = eventually(lambda: (host.partial / "parts").is_dir() and host.worker())
    time.sleep(0.5)
    os.kill(pid, signal.SIGKILL)
    result = host.result(run)
    assert result["action"] == "fetched", result
    assert host.worker() != pid
    assert host.intact()
    assert any(part for part in hub.asked(FIRST)), "it went on where the other one ended"


def test_a_worker_that_is_killed_again_and_again(host: Host, hub: FakeHub) -> None:
    hub.rate = 100_000
    run = host.start()
    seen: set[int] = set()
    for _round in range(3):
        pid = eventually(lambda: next((found for found in [locked(host)] if found and found not in seen), None))
        seen.add(pid)
        os.kill(pid, signal.SIGKILL)
    result = host.result(run)
    assert (result["failed"], result["reason"]) == (True, "killed"), result
    hub.rate = 0
    assert host.run()["action"] == "fetched"
    assert host.intact()


def locked(host: Host) -> int:
    try:
        return host.worker()
    except ValueError:  # nobody yet
        return 0


def test_a_run_that_is_killed_leaves_the_worker_at_work(host: Host, hub: FakeHub) -> None:
    hub.rate = 1_500_000
    run = host.start()
    pid = eventually(lambda: (host.partial / "parts").is_dir() and host.worker())
    assert os.getsid(pid) != os.getsid(run.pid)
    run.kill()
    run.wait()
    eventually(host.path.is_dir)
    assert eventually(host.intact)
    assert host.run()["action"] == "present"


def test_a_run_that_waits_no_longer(host: Host, hub: FakeHub) -> None:
    hub.rate = 1_000_000
    result = host.run(timeout=1)
    assert (result["failed"], result["reason"]) == (True, "timeout"), result
    assert "goes on in the background" in result["msg"]
    assert host.run()["action"] == "fetched"
    assert len(hub.asked(FIRST)) == 1


def work(host: Host, hub: FakeHub, after: Any = lambda what: None, **changes: Any) -> None:
    """The work alone, in this process."""
    wanted = logic.Wanted(REPOSITORY, COMMIT, str(host.root), ("*.safetensors", "*.json"), ())
    snapshot = logic.Snapshot(wanted._replace(**changes), Progress("x", str(host.run_path)), after)
    client = Hub(hub.url, "", Limits(2, 1, 0.01))
    tree = {file.path: file for file in client.files(REPOSITORY, COMMIT)}
    snapshot.complete(tree, snapshot.look(), logic.Fetcher(snapshot, client, parallel=2).fetch)


class Killed(BaseException):
    """As if the power went."""


def events(host: Host, hub: FakeHub, prepare: Any) -> list[str]:
    prepare()
    seen: list[str] = []
    work(host, hub, seen.append)
    return seen


@pytest.mark.parametrize("state", ["nothing", "damaged"])
def test_the_work_may_end_at_any_point(tmp_path: Path, hub: FakeHub, state: str) -> None:
    def fresh(name: str) -> Host:
        host = Host(tmp_path / name, hub)
        if state == "damaged":
            work(host, hub)
            for path in ("config.json", FIRST):
                (host.path / path).write_bytes(b"altered")
        return host

    seen: list[str] = []
    work(fresh("whole"), hub, seen.append)
    assert len(seen) >= 4
    for number in range(len(seen)):
        host = fresh(f"{number}")
        pid = os.fork()
        if not pid:
            left = iter(range(number, -1, -1))

            def after(_what: str, left: Iterator[int] = left) -> None:
                if next(left) == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

            try:
                work(host, hub, after)
            finally:
                os._exit(1)
        assert os.waitpid(pid, 0)[1] == signal.SIGKILL, seen[number]
        found = logic.Snapshot(
            logic.Wanted(REPOSITORY, COMMIT, str(host.root), ("*",), ()), Progress("x", str(host.run_path))
        )
        if state == "nothing" and seen[number] != "renamed":
            assert found.look() is None, "nothing takes it for complete"
        result = host.run()
        assert result["action"] in ("fetched", "repaired", "present"), result
        assert host.intact(), seen[number]


def test_a_full_disk_in_the_middle_keeps_what_is_there(
    host: Host, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = logic.Part.add

    def full(part: logic.Part, stream: Any, block: bytes) -> None:
        if part.have + len(block) > 1_000_000:
            raise OSError(28, "No space left on device")
        add(part, stream, block)

    with monkeypatch.context() as patch:
        patch.setattr(logic.Part, "add", full)
        with pytest.raises(WorkError) as caught:
            work(host, hub)
    assert caught.value.reason == "no_space"
    assert "what was fetched is kept" in caught.value.text
    kept = sum(path.stat().st_size for path in host.partial.rglob("*") if path.is_file())
    assert kept > 100_000
    asked = len(hub.requests)
    assert host.run()["action"] == "fetched"
    assert any(part for _host, _method, _path, part in hub.requests[asked:]), "it went on where the disk was full"
    assert host.intact()


def test_a_full_disk_names_what_no_release_uses(host: Host, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Older commits, other models, and downloads that were given up; not what a release mounts or will, nor what is asked for."""
    sizes = {"older": 3000, "used": 5, "soon": 5, "adapter": 5, "arriving": 5, "other": 2_000_000, "begun": 70}
    folders = {
        "older": host.path.with_name("e" * 40),
        "used": host.root / "org--used" / ("d" * 40),
        "soon": host.root / "org--soon" / ("f" * 40),
        "adapter": host.root / "org--adapter" / ("1" * 40),
        "arriving": host.root / ".partial/org--arriving" / ("2" * 40),
        "other": host.root / "org--other" / ("c" * 40),
        "begun": host.root / ".partial/org--other" / ("b" * 40),
    }
    for name, folder in folders.items():
        (folder / "files").mkdir(parents=True)
        (folder / "files/model.safetensors").write_bytes(b"x" * sizes[name])
    host.partial.mkdir(parents=True)
    state = host.root.parent / "state"
    for service, text in (
        (
            "vllm",
            json.dumps({"releases": [{"settings": {"mounts": [{"source": str(folders["used"])}]}}, {"settings": {}}]}),
        ),
        ("other", "{"),
        ("another", "[]"),
    ):
        (state / service).mkdir(parents=True)
        (state / service / "state.json").write_text(text)
    under_way = {"record": {"settings": {"mounts": [{"source": str(folders["soon"])}]}}}
    (state / "vllm/transition.json").write_text(json.dumps(under_way))
    monkeypatch.setattr(logic, "STATE", str(state))
    monkeypatch.setattr(logic, "free_bytes", lambda _path: 0)
    wanted = logic.Wanted(REPOSITORY, COMMIT, str(host.root), ("*.safetensors",), ())
    todo = Hub(hub.url, "", Limits(2, 1, 0.01)).files(REPOSITORY, COMMIT)
    keep = [str(folders["adapter"]), str(host.root / "org--arriving" / ("2" * 40))]
    with pytest.raises(WorkError) as caught:
        logic.Snapshot(wanted, Progress("x", str(host.run_path)), keep=keep).need_space(todo, 0)
    assert caught.value.text.endswith(
        f"; no release uses {folders['older']} (3 kB), {folders['other']} (2.0 MB), {folders['begun']} (70 B)"
    )


class Answer:
    """What a server sends, in pieces, until something goes wrong."""

    def __init__(self, data: bytes, start: int, fault: Any, whole: bool) -> None:
        begin = 0 if whole else start
        self.status = 206 if begin else 200
        self.headers = {"Content-Range": f"bytes {begin}-{len(data) - 1}/{len(data)}"} if begin else {}
        self.rest, self.sent, self.fault = data[begin:], 0, fault
        if fault == "flip" and self.rest:
            self.rest = bytes([self.rest[0] ^ 1]) + self.rest[1:]

    def __enter__(self) -> Answer:
        return self

    def __exit__(self, *_error: Any) -> None:
        pass

    def read1(self, _most: int) -> bytes:
        left = self.rest
        if isinstance(self.fault, tuple):
            left = self.rest[: max(self.fault[1] - self.sent, 0)]
            if not left and self.fault[0] == "reset":
                raise ConnectionResetError(104, "Connection reset by peer")
        block, self.rest = left[:700], self.rest[len(left[:700]) :]
        self.sent += len(block)
        return block


class Line:
    """A hub whose downloads go wrong as they are told to, one after the other."""

    def __init__(self, files: dict[str, bytes], faults: list[Any]) -> None:
        self.files, self.faults, self.limits = files, faults, Limits(30, 2, 0)
        self.sent: list[Answer] = []

    def download(self, _repository: str, _revision: str, path: str, start: int) -> Answer:
        fault = self.faults.pop(0) if self.faults else None
        if fault == "refuse":
            raise Passing("unreachable", "it answers 503")
        self.sent.append(Answer(self.files[path], start, fault, fault == "whole"))
        return self.sent[-1]


FAULTS = st.one_of(
    st.sampled_from(["flip", "refuse", "whole", None]),
    st.tuples(st.sampled_from(["cut", "reset"]), st.integers(0, 5000)),
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    files=st.dictionaries(st.sampled_from(["a", "b/c", "d.safetensors"]), st.binary(max_size=4000), min_size=1),
    faults=st.lists(FAULTS, max_size=12),
    parallel=st.integers(1, 3),
)
def test_whatever_a_line_does_files_are_right_or_not_there(
    tmp_path_factory: pytest.TempPathFactory, files: dict[str, bytes], faults: list[Any], parallel: int
) -> None:
    folder = tmp_path_factory.mktemp("line")
    snapshot = logic.Snapshot(logic.Wanted("o/n", COMMIT, str(folder), ("*",), ()), Progress("x", str(folder)))
    tree = {
        path: RemoteFile(path, len(data), hashlib.sha256(data).hexdigest() if path == "a" else "", blob(data))
        for path, data in files.items()
    }
    problem = ""
    try:
        snapshot.complete(tree, None, logic.Fetcher(snapshot, Line(files, faults), parallel).fetch)  # type: ignore[arg-type]
    except WorkError as error:
        problem = error.reason
    if problem:
        assert problem in ("unreachable", "corrupt")
        assert snapshot.look() is None
        left = {
            str(path.relative_to(snapshot.whole)): path.read_bytes()
            for path in Path(snapshot.whole).rglob("*")
            if path.is_file()
        }
        assert left.items() <= files.items()
        line = Line(files, [])
        snapshot.complete(tree, None, logic.Fetcher(snapshot, line, parallel).fetch)  # type: ignore[arg-type]
        assert len(line.sent) <= 2 * (len(files) - len(left)), "what was whole is not asked for again"
    found = snapshot.look(full=True)
    assert found
    assert found.good
    assert {path: (Path(snapshot.path) / path).read_bytes() for path in files} == files


# -- what is there


def alter(path: Path, keep_time: bool) -> None:
    status = path.stat()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    if keep_time:
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("harm", ["altered", "shorter", "missing", "link"])
def test_a_file_that_went_bad_is_replaced_alone(host: Host, hub: FakeHub, harm: str) -> None:
    host.run()
    bad = host.path / FIRST
    before = bad.stat()
    if harm == "altered":
        alter(bad, keep_time=False)
    elif harm == "shorter":
        bad.write_bytes(b"x")
        os.utime(bad, ns=(before.st_atime_ns, before.st_mtime_ns))
    else:
        bad.unlink()
        if harm == "link":
            bad.symlink_to("/etc/hostname")
    checked = host.run(check=True)
    assert (checked["changed"], checked["action"], checked["missing"]) == (True, "repaired", LARGE), checked
    assert FIRST in checked["diff"]["after"]
    hub.requests.clear()
    result = host.run()
    assert (result["changed"], result["action"]) == (True, "repaired"), result
    assert list(result["damaged"]) == [FIRST]
    assert host.intact()
    assert {path for _host, method, path, _range in hub.requests if method == "GET" and "/api/" not in path} == {
        f"/{FIRST}", f"/{REPOSITORY}/resolve/{COMMIT}/{FIRST}",
    }  # fmt: skip
    assert host.run()["action"] == "present"


def test_only_a_full_look_sees_what_kept_its_time(host: Host, hub: FakeHub) -> None:
    host.run()
    alter(host.path / FIRST, keep_time=True)
    assert host.run()["action"] == "present"
    result = host.run(verify="full")
    assert (result["action"], result["damaged"]) == ("repaired", {FIRST: "content differs"}), result
    assert host.intact()
    hub.close()
    assert host.run(verify="full")["action"] == "present"


def test_a_time_that_changed_alone_is_read_once(host: Host, hub: FakeHub) -> None:
    host.run()
    hub.close()
    os.utime(host.path / FIRST)
    marker = host.path / ".nemo-snapshot.json"
    before = marker.read_text()
    assert host.run(check=True)["action"] == "present"
    assert marker.read_text() == before
    assert host.run()["changed"] is False
    assert json.loads(marker.read_text())["files"][FIRST] == (host.path / FIRST).stat().st_mtime_ns


def test_other_patterns_bring_and_remove_files(host: Host, hub: FakeHub) -> None:
    host.run(include=["*.json"])
    hub.requests.clear()
    result = host.run(include=["*.safetensors", "config.json"])
    assert (result["action"], sorted(host.contents())) == ("repaired", ["config.json", FIRST, SECOND]), result
    assert not [
        path for _host, _method, path, _range in hub.requests if "/api/" in path or path.endswith("config.json")
    ]


def test_a_folder_that_somebody_copied_is_taken_over(host: Host, hub: FakeHub) -> None:
    for path in ("config.json", FIRST, SECOND):
        (host.path / path).parent.mkdir(parents=True, exist_ok=True)
        (host.path / path).write_bytes(hub.files[path])
    alter(host.path / SECOND, keep_time=True)
    result = host.run()
    assert result["action"] == "fetched", result
    assert host.intact()
    assert hub.asked(FIRST) == []
    assert len(hub.asked(SECOND)) == 1


@pytest.mark.parametrize("marker", ["", "{}", "[]", '{"format": 1}', '{"format": 1, "tree": [], "files": 3}'])
def test_a_marker_that_was_lost_costs_no_download(host: Host, hub: FakeHub, marker: str) -> None:
    host.run()
    (host.path / ".nemo-snapshot.json").write_text(marker)
    hub.requests.clear()
    assert host.run()["action"] == "fetched"
    assert host.intact()
    assert hub.asked(FIRST) == hub.asked(SECOND) == []


# -- names that move


def test_a_branch_is_resolved_once(host: Host, hub: FakeHub) -> None:
    checked = host.run(revision="main", check=True)
    assert (checked["action"], checked["revision"]) == ("fetched", COMMIT)
    assert not host.root.exists()
    result = host.run(revision="main")
    assert (result["action"], result["revision"]) == ("fetched", COMMIT), result
    assert any(f"revision: {COMMIT}" in warning for warning in warned(result))
    hub.refs["main"] = "f" * 40
    hub.close()
    again = host.run(revision="main")
    assert (again["action"], again["revision"]) == ("present", COMMIT), again
    assert any("since 20" in warning for warning in warned(again))


def test_check_mode_tells_and_does_nothing(host: Host, hub: FakeHub) -> None:
    result = host.run(check=True)
    assert (result["changed"], result["action"]) == (True, "fetched"), result
    assert result["missing"] == result["total_size"] > LARGE
    assert f"{FIRST} (3.0 MB)" in result["diff"]["after"]
    assert not host.root.exists()
    assert not host.run_path.exists()
    host.run()
    assert host.run(check=True)["changed"] is False
