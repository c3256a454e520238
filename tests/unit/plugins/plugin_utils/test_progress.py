"""Progress of a module on the screen: new lines only, once, and never at the cost of the task."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ansible_collections.nemo.platform.plugins.action.container_image import ActionModule as ImageAction
from ansible_collections.nemo.platform.plugins.action.container_release import ActionModule as ReleaseAction
from ansible_collections.nemo.platform.plugins.action.model_snapshot import ActionModule as SnapshotAction
from ansible_collections.nemo.platform.plugins.module_utils.progress import Progress
from ansible_collections.nemo.platform.plugins.modules import container_image, model_snapshot
from ansible_collections.nemo.platform.plugins.plugin_utils.progress import LOOK, LOOKS_LOST, SHOWN_AT_ONCE, Follower


class Screen:
    def __init__(self, tmp_path: Path) -> None:
        self.lines: list[str] = []
        self.progress = Progress("of a test", str(tmp_path))
        self.looks = 0

    def look(self, offset: int) -> bytes:
        self.looks += 1
        path = "'" + self.progress.path + "'"
        return subprocess.run(
            ["/bin/sh", "-c", LOOK.format(path=path, offset=offset)], check=True, stdout=subprocess.PIPE
        ).stdout

    def follower(self, look: Callable[[int], bytes] | None = None) -> Follower:
        return Follower(look or self.look, self.lines.append, first_after=0.01, every=0.01)


@pytest.fixture
def screen(tmp_path: Path) -> Screen:
    return Screen(tmp_path)


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 5
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_each_line_is_shown_once(screen: Screen) -> None:
    follower = screen.follower()
    follower.start()
    for number in range(5):
        screen.progress.say(f"step {number}")
        until(lambda number=number: screen.lines[-1:] == [f"step {number}"])  # type: ignore[misc]
    follower.end()
    assert screen.lines == [f"step {number}" for number in range(5)]


def test_what_was_said_before_is_no_progress(screen: Screen) -> None:
    screen.progress.say("of yesterday")
    follower = screen.follower()
    follower.began += 100  # the file is older than this task
    assert follower.turn() == []
    screen.progress.say("of today")
    assert follower.turn() == ["of today"]


def test_of_what_is_there_already_the_last_line_tells_all(screen: Screen) -> None:
    for number in range(500):
        screen.progress.say(f"step {number} of many, which is a line")
    assert screen.follower().turn() == ["step 499 of many, which is a line"]


def test_many_lines_at_once_are_not_all_shown(screen: Screen) -> None:
    follower = screen.follower()
    screen.progress.say("first")
    follower.turn()
    for number in range(100):
        screen.progress.say(f"step {number}")
    assert len(follower.turn()) == SHOWN_AT_ONCE


def test_a_file_that_begins_anew_is_read_from_its_start(screen: Screen) -> None:
    follower = screen.follower()
    screen.progress.say("a long line, longer than what comes next")
    follower.turn()
    Path(screen.progress.path).write_text("anew\n")
    assert follower.turn() == ["anew"]


def test_a_line_that_is_being_written_comes_when_it_is_whole(screen: Screen) -> None:
    follower = screen.follower()
    screen.progress.say("one")
    follower.turn()
    with Path(screen.progress.path).open("a") as file:
        file.write("tw")
        file.flush()
        assert follower.turn() == []
        file.write("o\n")
    assert follower.turn() == ["two"]


def test_nothing_moves_the_cursor_of_who_reads(screen: Screen) -> None:
    screen.progress.say("\x1b[2Jhello\x07")
    assert screen.follower().turn() == ["hello\ufffd"]


def test_without_a_file_there_is_nothing_to_show(screen: Screen) -> None:
    assert screen.follower().turn() == []


def test_who_cannot_look_gives_up_in_silence(screen: Screen) -> None:
    looks = 0

    def look(_offset: int) -> bytes:
        nonlocal looks
        looks += 1
        raise RuntimeError("no second connection")

    follower = screen.follower(look)
    follower.start()
    follower.join(5)
    assert not follower.is_alive()
    assert (looks, screen.lines) == (LOOKS_LOST, [])


def test_a_look_that_hangs_does_not_keep_the_task(screen: Screen) -> None:
    def look(_offset: int) -> bytes:
        time.sleep(30)
        return b""

    follower = screen.follower(look)
    follower.start()
    time.sleep(0.1)
    began = time.monotonic()
    follower.end()
    assert time.monotonic() - began < 3


def test_a_short_task_costs_no_look(screen: Screen) -> None:
    follower = Follower(screen.look, screen.lines.append)
    follower.start()
    follower.end()
    assert screen.looks == 0


def test_actions_name_the_files_that_their_modules_write(tmp_path: Path) -> None:
    def of(action: Any, **arguments: Any) -> str:
        return str(action.progress_of(None, arguments))

    assert of(ReleaseAction, name="ai-prod") == "ai-prod"
    assert of(ReleaseAction, name="ai-prod", progress="other") == "other"
    image = {"image": "registry/a/ai", "tag": "t"}
    assert of(ImageAction, **image) == "image-ai"
    snapshot = {"repository": "Qwen/Qwen2.5"}
    assert of(SnapshotAction, **snapshot) == "model-Qwen--Qwen2.5"
    assert "image-" in str(container_image.DOCUMENTATION)
    assert "model-<owner>--<name>" in str(model_snapshot.DOCUMENTATION)
