"""Releases, rollbacks, crashes and resumes in any order, against a model: what was healthy once is served for ever.

The model knows only what an operator knows: which tags are good, which release answered last, and that a run may end
early. Whatever happens, the service answers once it has answered, with one of the tags that the last runs were about.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import hypothesis
import hypothesis.strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ansible_collections.nemo.platform.plugins.module_utils import container_release as logic
from ansible_collections.nemo.platform.plugins.module_utils import release_flow
from tests.unit.plugins.modules.fake_docker import image
from tests.unit.plugins.modules.release_world import TAGS, World

GOOD, BAD = (1, 2, 4), (3, 5, 6, 7)
ALL_TAGS = {**TAGS, 5: "prod-20260101-0005", 6: "prod-20260101-0006", 7: "prod-20260101-0007"}
FADING = ALL_TAGS[7]  # stops answering by itself
NUMBERS = {tag: number for number, tag in ALL_TAGS.items()}


class Killed(BaseException):
    """SIGKILL, as far as one process can do it to itself: the fakes keep no state but on disk, and nothing catches it."""


class Releases(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        memory = Path("/dev/shm")
        self.folder = Path(tempfile.mkdtemp(dir=memory if os.access(memory, os.W_OK) else None))
        self.patch = mock.patch("os.fsync", return_value=None)
        self.patch.start()
        self.locks: list[logic.Lock] = []
        self.lock_patch = mock.patch.object(release_flow, "Lock", self.lock)
        self.lock_patch.start()
        self.world = World(self.folder)
        self.world.engine.push(ALL_TAGS[5], image(5, "crash"))
        self.world.engine.push(ALL_TAGS[6], image(6, "loop"))
        self.world.engine.push(ALL_TAGS[7], image(7, "fades:7"))  # healthy until it is watched
        self.served = False  # whether a healthy release has ever answered
        self.expected: set[str] = set()  # the tags that may answer now
        self.interrupted = False

    def lock(self, path: str) -> logic.Lock:
        self.locks.append(logic.Lock(path))
        return self.locks[-1]

    def teardown(self) -> None:
        self.patch.stop()
        self.lock_patch.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    @initialize(old=st.booleans())
    def begin(self, old: bool) -> None:
        if old:
            self.world.old_container(1)
            self.served, self.expected = True, {TAGS[1]}

    def run(self, kill_at: int | None, **values: Any) -> str:
        """One run; says how it ended: ok, failed or killed."""
        steps = 0

        def event(_what: str) -> None:
            nonlocal steps
            steps += 1
            if steps == kill_at:
                raise Killed

        number = values.pop("number", None)
        params = {**self.world.params(None, **values)}
        if number:
            params.update(tag=ALL_TAGS[number], digest=image(number)["digest"])
        try:
            self.world.act(self.world.releaser(params, event=event))
        except Killed:
            self.interrupted = True
            return "killed"
        except logic.ReleaseError:
            self.interrupted = False
            return "failed"
        finally:
            self.world.proxy.after = lambda what: None
            for lock in self.locks:
                lock.release()  # as the end of the process would
            self.locks.clear()
            self.world.guard_acts()
        self.interrupted = False
        return "ok"

    @rule(
        number=st.sampled_from(GOOD + BAD),
        kill_at=st.none() | st.integers(1, 45),
        strategy=st.sampled_from(["beside", "beside", "beside", "stop-start"]),
        memory=st.sampled_from(["1g", "512m"]),
        force=st.booleans(),
        retry_after=st.sampled_from([0, 10]),
    )
    def release(
        self, number: int, kill_at: int | None, strategy: str, memory: str, force: bool, retry_after: int
    ) -> None:
        before = self.world.answering()
        if number == 7 and not before:
            number = 3  # a first release is not watched
        ended = self.run(
            kill_at, number=number, strategy=strategy, memory=memory, force=force, proxy_retry_after=retry_after
        )
        tag = ALL_TAGS[number]
        now = self.world.answering()
        if ended == "ok":
            assert number in GOOD
            assert now == tag
        elif ended == "failed" and before:
            assert now == before or now in self.expected
        if ended == "killed":
            self.expected |= {tag} if number in GOOD else set()
            # one that fades while it is watched by a run that is killed waits for the next run
            if before not in (None, FADING) and tag != FADING:
                assert now, "a kill alone took the service down"
        else:
            self.expected = {now} if now else set()
        self.served = self.served or bool(now)

    @rule(kill_at=st.none() | st.integers(1, 45), name=st.none() | st.sampled_from(list(TAGS.values())))
    def rollback(self, kill_at: int | None, name: str | None) -> None:
        before = self.world.answering()
        ended = self.run(kill_at, state="rolled_back", release=name, image=None, port=None)
        now = self.world.answering()
        if ended == "ok" and name:
            assert now == name
        if ended == "killed":
            self.expected |= set(self.world.kept() if self.state_there() else [])
            assert now or before in (None, FADING)
        else:
            self.expected = {now} if now else set()
        self.served = self.served or bool(now)

    @rule()
    @precondition(lambda self: self.state_there() and self.world.state()["current"])
    def haproxy_is_killed(self) -> None:
        self.world.proxy.kill()

    @rule()
    @precondition(lambda self: not self.interrupted and self.state_there() and self.world.state()["current"])
    def the_container_is_stopped_by_hand(self) -> None:
        self.world.change(status="exited")
        self.run(None, number=NUMBERS[self.world.record()["tag"]], memory="1g")
        self.expected = {str(self.world.answering())}

    def state_there(self) -> bool:
        return (self.folder / "lib/ai-prod/state.json").exists()

    @invariant()
    def what_served_once_serves_after_the_next_run_that_is_not_killed(self) -> None:
        if self.served and not self.interrupted:
            assert self.world.answering() in self.expected

    @invariant()
    def nothing_is_left_over_by_a_run_that_was_not_killed(self) -> None:
        if self.interrupted or not self.state_there() or not self.world.state()["current"]:
            return
        self.world.expect_settled(*ALL_TAGS.values())


Releases.TestCase.settings = hypothesis.settings(
    max_examples=int(os.environ.get("NEMO_EXAMPLES", "60")),
    stateful_step_count=30,
    deadline=None,
    derandomize="NEMO_EXAMPLES" not in os.environ,
    database=None,
    # a failing example is shown as it was found: making it smaller takes minutes, and the steps are few
    phases=(hypothesis.Phase.explicit, hypothesis.Phase.generate),
    suppress_health_check=list(hypothesis.HealthCheck),
)
TestReleases = Releases.TestCase
