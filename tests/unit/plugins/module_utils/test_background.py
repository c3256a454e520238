# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Work in the background: its worker, its lock, and those who wait; and what is said meanwhile."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from ansible_collections.nemo.platform.plugins.module_utils import progress
from ansible_collections.nemo.platform.plugins.module_utils.background import RESTARTS, Background, WorkError
from ansible_collections.nemo.platform.plugins.module_utils.progress import Pace, Progress, amount, duration


class Place:
    """Work that makes a file."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.made = folder, folder / "made"
        self.tries = folder / "tries"

    def background(self) -> Background:
        return Background("work", Progress("work", str(self.folder / "run")), str(self.folder / "run"))

    def look(self) -> dict[str, Any] | None:
        return {"text": self.made.read_text()} if self.made.exists() else None

    def run(self, work: Any, wait: bool = True, timeout: float = 10, since: float = 0) -> dict[str, Any] | None:
        def prepared() -> None:
            with self.tries.open("a") as tries:
                tries.write("x")
            work()

        return self.background().run(self.look, lambda: prepared, wait, timeout, since)

    def make(self) -> None:
        self.made.write_text("done")


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def fail(reason: str = "gone", text: str = "it is\ngone") -> None:
    raise WorkError(reason, text)


def test_work_is_done_once(place: Place) -> None:
    assert place.run(place.make) == {"text": "done"}
    assert place.run(place.make) == {"text": "done"}
    assert place.tries.read_text() == "x"


def test_what_is_not_waited_for_goes_on(place: Place) -> None:
    def slow() -> None:
        time.sleep(0.5)
        place.make()

    assert place.run(slow, wait=False) is None
    assert place.run(slow, wait=False) is None
    assert place.look() is None
    assert place.run(slow) == {"text": "done"}
    assert place.tries.read_text() == "x"


def test_a_failure_is_that_of_all_who_waited(place: Place) -> None:
    with pytest.raises(WorkError) as caught:
        place.run(fail)
    assert (caught.value.reason, caught.value.text) == ("gone", "it is gone")
    assert place.background().progress.last() == "failed: it is gone"
    assert place.run(place.make) == {"text": "done"}


def test_a_fault_of_ours_is_no_kill(place: Place) -> None:
    with pytest.raises(WorkError, match="ZeroDivisionError") as caught:
        place.run(lambda: print(1 / 0))
    assert caught.value.reason == "internal"
    assert place.tries.read_text() == "x"


def test_a_worker_that_goes_without_a_word_is_replaced_so_many_times(place: Place) -> None:
    with pytest.raises(WorkError) as caught:
        place.run(lambda: os._exit(9))
    assert caught.value.reason == "killed"
    assert len(place.tries.read_text()) == RESTARTS + 1


def test_an_old_failure_is_nobodys(place: Place) -> None:
    """A run waits for one that finds, before it starts anything, that it cannot; the failure of a day ago says nothing."""
    with pytest.raises(WorkError):
        place.run(fail)
    begun = place.folder / "begun"

    def give_up() -> Any:
        begun.touch()
        time.sleep(0.5)
        fail("no_space", "no room")

    child = os.fork()
    if not child:
        try:
            place.background().run(place.look, give_up, True, 5)
        finally:
            os._exit(0)
    while not begun.exists():
        time.sleep(0.01)
    try:
        assert place.run(place.make) == {"text": "done"}
    finally:
        os.waitpid(child, 0)


def test_a_failure_before_anybody_waited_is_no_reason_to_try_again(place: Place) -> None:
    begun = time.time()
    assert place.run(fail, wait=False) is None
    lock = place.background().lock
    while not lock.try_acquire():
        time.sleep(0.01)
    lock.release()
    with pytest.raises(WorkError, match="it is gone"):
        place.run(fail, since=begun)
    assert place.tries.read_text() == "x"
    assert place.run(place.make, since=time.time()) == {"text": "done"}, "one that failed before is another run's"


def test_what_stands_against_it_leaves_no_lock_behind(place: Place) -> None:
    with pytest.raises(WorkError, match="gone"):
        place.background().run(place.look, fail, True, 1)  # type: ignore[arg-type]
    assert place.background().lock.try_acquire()


def test_who_waits_too_long_is_told(place: Place) -> None:
    def slow() -> None:
        place.background().progress.say("half way")
        time.sleep(1.5)
        place.make()

    with pytest.raises(WorkError, match=r"under way after 1 s \(last: half way\)") as caught:
        place.run(slow, timeout=1)
    assert caught.value.reason == "timeout"
    assert place.run(slow) == {"text": "done"}


def test_the_worker_holds_no_pipe_of_the_run(place: Place) -> None:
    ours, theirs = os.pipe()
    os.set_inheritable(theirs, True)
    place.run(lambda: time.sleep(5), wait=False)
    os.close(theirs)
    os.set_blocking(ours, False)
    time.sleep(0.3)
    try:
        assert os.read(ours, 1) == b"", "everybody has closed it"
    finally:
        os.close(ours)
        lock = place.background().lock
        assert not lock.try_acquire()
        os.kill(int(json.loads(Path(lock.path).read_text())["pid"]), 9)


# -- what is said


def test_lines_are_whole_and_the_file_does_not_grow_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = Progress("x", str(tmp_path))
    assert said.last() == ""
    said.say("one\n two")
    assert said.last() == "one two"
    monkeypatch.setattr(progress, "LIMIT_BYTES", 10)
    said.say("three, which is long")
    said.say("four")
    assert Path(said.path).read_text() == "four\n"


def test_saying_never_fails(tmp_path: Path) -> None:
    (tmp_path / "progress").write_text("a file where the folder should be")
    Progress("x", str(tmp_path)).say("words")


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (6364, "6 kB"), (3_000_000, "3.0 MB"), (35_141_346, "35 MB"), (16.1e9, "16.1 GB")],
)
def test_amounts(size: float, text: str) -> None:
    assert amount(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.6, "1 min 0 s"), (153, "2 min 33 s"), (3600, "1 h 0 min"), (7500, "2 h 5 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_pace_is_that_of_the_last_moments() -> None:
    pace = Pace()
    pace.note(0, 0)
    assert pace.text(0, 1000) == "0 B of 1 kB"
    for second in range(1, 100):
        pace.note(second, second * 1_000_000 if second < 60 else 60_000_000 + (second - 60) * 2_000_000)
    assert pace.rate == pytest.approx(2_000_000)
    assert pace.text(138_000_000, 338_000_000) == "138 MB of 338 MB, 2.0 MB/s, 1 min 40 s left"
    pace.note(100, 0)
    assert pace.rate == 0
