"""The command nemo-follow, with a playbook that does as it is told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from ansible_collections.nemo.platform.plugins.module_utils.release_flow import TO_REMEMBER
from tests.unit.helpers import ROOT

PROGRAM = ROOT / "roles/release_follower/files/follow.py"
# What it is told: {"code": ..., "report": ... or null, "say": [...], "wait": seconds}
PLAYBOOK = f"""#!{sys.executable}
import json, pathlib, sys, time
folder = pathlib.Path(__file__).parent
with (folder / "asked").open("a") as asked:
    asked.write(" ".join(sys.argv[1:]) + "\\n")
if sys.argv[1] != "follow.yml":
    sys.exit((folder / "deaf").exists())
told = json.loads((folder / "told").read_text())
if told["report"] is not None:
    pathlib.Path(sys.argv[-1].partition("=")[2]).write_text(json.dumps(told["report"]))
print("\\n".join(told["say"]), flush=True)
time.sleep(told["wait"])
sys.exit(told["code"])
"""
NEWER = {"hosts": ["one"], "why": "dev-2 is newer than dev-1", "tag": "dev-2", "digest": "sha256:2"}
NOTHING = {"hosts": [], "why": "dev-1 runs already", "tag": "dev-1", "digest": "sha256:1"}
BAD = "[ERROR]: Task failed: Module failed: ai-dev: registry/ai:dev-2 failed [unhealthy]: it answered 503."


class Follower:
    """A Bastion's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.states = folder, folder / "states"
        self.states.mkdir()
        self.settings("ai-dev")
        playbook = folder / "playbook"
        playbook.write_text(PLAYBOOK)
        playbook.chmod(0o755)
        self.environment = {
            **os.environ, "NEMO_FOLLOW_SETTINGS": str(folder / "follow.json"), "NEMO_FOLLOW_STATES": str(self.states),
            "NEMO_FOLLOW_PLAYBOOK": str(playbook), "SUDO_USER": "alice",
        }  # fmt: skip

    def settings(self, *services: str, failures: int = 3) -> None:
        (self.folder / "follow.json").write_text(json.dumps({"services": services, "failures": failures}))

    def tell(
        self, code: int = 0, report: dict[str, Any] | None = None, say: tuple[str, ...] = (), wait: float = 0
    ) -> None:
        (self.folder / "told").write_text(json.dumps({"code": code, "report": report, "say": say, "wait": wait}))

    def __call__(self, *words: str, code: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, "-I", str(PROGRAM), *words], env=self.environment, stdin=subprocess.DEVNULL, timeout=30,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == code, done.stdout
        return done.stdout

    @property
    def asked(self) -> list[str]:
        path = self.folder / "asked"
        return path.read_text().splitlines() if path.exists() else []

    def state(self, service: str = "ai-dev") -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self("--json"))[service]
        return found


@pytest.fixture
def follower(tmp_path: Path) -> Follower:
    return Follower(tmp_path)


def test_a_look_that_finds_nothing_is_one_line(follower: Follower) -> None:
    follower.tell(report=NOTHING, say=("PLAY [x]", "ok: [one]"))
    said = follower("run").splitlines()
    assert len(said) == 1
    assert said[0].endswith(": dev-1 runs already")
    assert follower.asked == [f"follow.yml -e service=ai-dev -e follow_report={follower.states}/ai-dev.report"]
    assert follower.state()["last"]["result"] == "nothing"


def test_a_release_is_shown_as_it_goes(follower: Follower) -> None:
    follower.tell(report=NEWER, say=("PLAY [x]", "changed: [one]"))
    assert "PLAY [x]\nchanged: [one]" in follower("run")
    assert "released dev-2 at" in follower.state()["text"]


def test_releases_that_fail_in_a_row_stop_it(follower: Follower) -> None:
    follower.tell(code=2, report=NEWER, say=("x", BAD, "y"))
    for _ in range(3):
        assert BAD in follower("run", code=1)
    follower.tell(report=NOTHING)
    assert "STOPPED" in follower("run"), "it is a state, and no failure any more"
    state = follower.states / "ai-dev.json"
    assert follower.asked[3:] == [f"includes/follow_stopped.yml -e service=ai-dev -e follow_state={state}"]
    text = follower()
    assert "STOPPED since" in text
    assert "3 releases in a row failed (dev-2, dev-2, dev-2); the last one: ai-dev: registry/ai:dev-2 failed" in text
    assert "nemo-follow resume ai-dev" in text
    assert "follows its registry again" in follower("resume", "ai-dev")
    follower("run")
    assert len(follower.asked) == 5


def test_a_webhook_that_hears_nothing_stops_it_all_the_same(follower: Follower) -> None:
    (follower.folder / "deaf").touch()
    follower.settings("ai-dev", failures=1)
    follower.tell(code=2, report=NEWER, say=(BAD,))
    assert "the webhook was not told" in follower("run", code=1)
    assert "stopped" in follower.state()


@pytest.mark.parametrize(
    "line",
    [
        "[ERROR]: Task failed: Module failed: ai-dev: registry/ai:dev-2 failed [registry_unreachable]: no route.",
        "[ERROR]: Task failed: Module failed: ai-dev: registry/ai:dev-2 failed [lock]: another run is at work.",
        "[ERROR]: Task failed: Failed to connect to the host via ssh: timed out",
    ],
)
def test_what_no_image_did_does_not_count(follower: Follower, line: str) -> None:
    follower.tell(code=2, report=NEWER, say=(line,))
    for _ in range(4):
        follower("run", code=1)
    state = follower.state()
    assert "stopped" not in state
    assert not state.get("failures")
    assert "dev-2 COULD NOT BE RELEASED (look 4 of 10)" in state["text"]


def test_what_no_image_did_is_not_tried_for_ever(follower: Follower) -> None:
    line = "[ERROR]: Task failed: Module failed: ai-dev: registry/ai:dev-2 failed [proxy]: it answered 400."
    for said in (NEWER, NOTHING, NEWER, None, NEWER):  # what ends a row, and what does not
        follower.tell(code=0 if said == NOTHING else 2, report=said, say=(line,))
        for _ in range(1 if said is not NEWER else 5):
            assert "stopped" not in follower.state()
            follower("run", code=0 if said == NOTHING else 1)
    follower("run")
    assert [line.split()[0] for line in follower.asked] == ["follow.yml"] * 17 + ["includes/follow_stopped.yml"]
    why = "10 looks in a row could not release dev-2; the last one: ai-dev: registry/ai:dev-2 failed [proxy]: it answered 400."
    assert follower.state()["stopped"]["why"] == why
    follower("resume", "ai-dev")
    follower("run", code=1)
    assert "(look 1 of 10)" in follower()


def test_what_an_image_did_counts_beside_a_host_that_is_away(follower: Follower) -> None:
    follower.tell(code=2, report=NEWER, say=("[ERROR]: Task failed: Failed to connect to the host via ssh", BAD))
    follower("run", code=1)
    assert len(follower.state()["failures"]) == 1


def test_what_counts_is_what_a_host_remembers(follower: Follower) -> None:
    for reason in TO_REMEMBER:
        follower.tell(code=2, report=NEWER, say=(BAD.replace("unhealthy", reason),))
        follower("resume", "ai-dev")
        follower("run", code=1)
        assert len(follower.state()["failures"]) == 1, reason


def test_a_release_that_works_forgets_failures_and_a_look_does_not(follower: Follower) -> None:
    for report, code, failures in ((NEWER, 2, 1), (NOTHING, 0, 1), (NEWER, 2, 2), (NEWER, 0, 0), (NEWER, 2, 1)):
        follower.tell(code=code, report=report, say=(BAD,) if code else ())
        follower("run", code=1 if code else 0)
        assert len(follower.state().get("failures", [])) == failures


@pytest.mark.parametrize(("code", "result", "ends"), [(4, "unable", 1), (75, "locked", 0), (69, "unable", 1)])
def test_what_was_not_tried_does_not_count(follower: Follower, code: int, result: str, ends: int) -> None:
    follower.tell(code=code, say=("[ERROR]: one is locked by alice",))
    for _ in range(4):
        follower("run", code=ends)
    state = follower.state()
    assert "stopped" not in state
    assert (state["last"]["result"], state["last"]["text"]) == (result, "one is locked by alice")


def test_a_lock_that_is_found_at_the_release_does_not_count(follower: Follower) -> None:
    follower.tell(code=75, report=NEWER, say=("[ERROR]: one is locked by alice",))
    follower("run")
    assert follower.state()["last"]["result"] == "locked"
    assert not follower.state().get("failures")


def test_a_report_of_the_look_before_is_not_believed(follower: Follower) -> None:
    follower.tell(report=NEWER)
    follower("run")
    follower.tell(code=4)
    follower("run", code=1)
    assert follower.state()["last"]["result"] == "unable"


def test_somebody_stops_it(follower: Follower) -> None:
    follower.tell(report=NEWER)
    assert "STOPPED" in follower("stop", "ai-dev", "a", "demo")
    follower("run")
    assert follower.asked == []
    stopped = follower.state()["stopped"]
    assert (stopped["by"], stopped["why"]) == ("alice", "a demo")


def test_somebody_stops_it_in_the_middle_of_a_release(follower: Follower) -> None:
    follower.tell(report=NEWER, wait=3)
    running = threading.Thread(target=follower, args=("run",))
    running.start()
    while not follower.asked:
        time.sleep(0.05)
    follower("stop", "ai-dev", "enough")
    running.join()
    state = follower.state()
    assert state["stopped"]["why"] == "enough"
    assert state["last"]["result"] == "released"


@pytest.mark.parametrize("line", [BAD, "[ERROR]: Task failed: Failed to connect to the host via ssh"])
def test_what_an_operator_says_is_not_overwritten_by_the_look_that_would_have_stopped_it(
    follower: Follower, line: str
) -> None:
    (follower.states / "ai-dev.json").write_text(json.dumps({"failures": [{"tag": "dev-2"}] * 2, "hindered": 9}))
    follower.tell(code=2, report=NEWER, say=(line,), wait=3)
    running = threading.Thread(target=follower, args=("run",), kwargs={"code": 1})
    running.start()
    while not follower.asked:
        time.sleep(0.05)
    follower("stop", "ai-dev", "customer", "demo")
    running.join()
    stopped = follower.state()["stopped"]
    assert (stopped["by"], stopped["why"]) == ("alice", "customer demo")
    assert len(follower.asked) == 1, "the webhook is told nothing"


def test_what_an_image_did_ends_the_row_of_what_hindered_it(follower: Follower) -> None:
    line = "[ERROR]: Task failed: Failed to connect to the host via ssh"
    for said in (line, BAD, line):
        follower.tell(code=2, report=NEWER, say=(said,))
        follower("run", code=1)
    assert "(look 1 of 10)" in follower()


def test_a_state_of_before_looks_were_counted(follower: Follower) -> None:
    last = {"at": "then", "tag": "dev-2", "result": "hindered", "text": "x"}
    (follower.states / "ai-dev.json").write_text(json.dumps({"last": last}))
    assert "(look 1 of 10)" in follower()


def test_one_service_does_not_hold_up_the_other(follower: Follower) -> None:
    follower.settings("a", "b")
    follower.tell(code=4)
    follower("run", code=1)
    assert [line.split()[2] for line in follower.asked] == ["service=a", "service=b"]


def test_damaged_state_is_no_state(follower: Follower) -> None:
    (follower.states / "ai-dev.json").write_text('{"stop')
    assert "not looked at yet" in follower()


def test_control_characters_do_not_reach_the_terminal(follower: Follower) -> None:
    follower.tell(code=4, say=("[ERROR]: \x1b[2Jgone",))
    follower("run", code=1)
    assert "\x1b" not in follower()


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("stop", "ai-prod"), 1, "ai-prod follows nothing; those that do: ai-dev"),
        (("stop",), 2, "need a SERVICE"),
        (("run", "ai-dev"), 2, "run takes none"),
    ],
)
def test_what_it_refuses(follower: Follower, words: tuple[str, ...], code: int, says: str) -> None:
    assert says in follower(*words, code=code)


def test_where_nothing_follows(follower: Follower) -> None:
    follower.settings()
    assert "no service follows its registry" in follower()
    (follower.folder / "follow.json").unlink()
    assert "nothing follows here" in follower(code=1)
