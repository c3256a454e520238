"""Releases against a fake engine and a fake HAProxy: every path of a release, and a kill at every step of each."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ansible_collections.nemo.platform.plugins.module_utils import container_release as logic
from ansible_collections.nemo.platform.plugins.module_utils import release_flow
from ansible_collections.nemo.platform.plugins.modules import container_release as module
from tests.unit.plugins.modules.fake_docker import image
from tests.unit.plugins.modules.release_world import PORT, SECRET, TAGS, USER, World

ONE, TWO, BROKEN, FOUR = (TAGS[number] for number in (1, 2, 3, 4))


@pytest.fixture(autouse=True)
def _no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _descriptor: None)  # no power is lost here, and there are thousands


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """In memory where there is some: a kill at every step makes thousands of small files."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        yield Path(folder)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


# -- the plain paths


def test_first_release_runs_and_is_recorded(world: World) -> None:
    done = world.release(1, operator="alice")
    assert (done.changed, done.action) == (True, "released")
    world.expect_settled(ONE)
    record = world.record()
    assert record["digest"] == image(1)["digest"]
    assert record["image_id"] == image(1)["id"]
    assert record["by"] == "alice"
    entry = world.state()["history"][0]
    assert (entry["tag"], entry["by"], entry["result"], entry["kind"]) == (ONE, "alice", "ok", "release")
    assert entry["seconds"] > 0


@pytest.mark.parametrize("text", ["", "{", None], ids=["empty", "cut off", "gone"])
def test_a_record_that_is_lost_stops_nothing(world: World, text: str | None) -> None:
    """Nobody knows then what serves, and what is not known is not removed."""
    world.release(1)
    serving = world.record()["release"]
    file = world.path / "lib/ai-prod/state.json"
    file.unlink() if text is None else file.write_text(text)
    error, _ = world.failing(2)
    assert error.reason == "state"
    assert world.engine.containers()[f"ai-prod.{serving}"]["status"] == "running"


def test_no_change_costs_two_docker_commands(world: World) -> None:
    world.release(1)
    world.engine.calls.clear()
    done = world.release(1)
    assert (done.changed, done.action) == (False, "none")
    assert len(world.engine.calls) <= 4
    assert {" ".join(call[:2]) for call in world.engine.calls} == {"container ls", "container inspect"}


def test_the_new_release_runs_beside_the_old_one_which_is_kept_standing_still(world: World) -> None:
    first = world.release(1).record
    assert first
    done = world.release(2)
    assert (done.changed, done.action) == (True, "replaced")
    world.expect_settled(TWO)
    assert world.kept() == [TWO, ONE]
    assert world.box(first["release"])["status"] == "exited"
    assert world.record()["host_port"] != first["host_port"]
    assert world.record()["slot"] != first["slot"]


def test_a_switch_is_no_reload(world: World) -> None:
    world.release(1)
    world.proxy.calls.clear()
    world.release(2)
    assert world.proxy.calls == ["switch with standby", "switch"]


@pytest.mark.parametrize("values", [{}, {"bake_time": 0}, {"strategy": "stop-start"}])
def test_what_is_led_to_comes_back_by_itself_from_one_update_on(world: World, values: dict[str, Any]) -> None:
    world.release(1)
    world.engine.calls.clear()
    world.release(2, **values)
    updates = [words for words in world.engine.calls if words[:2] == ["container", "update"] and logic.RESTART in words]
    assert len(updates) == 1
    assert world.box()["policy"] == logic.RESTART


def test_old_releases_go_and_so_do_images_that_no_kept_release_needs(world: World) -> None:
    for number in (1, 2, 4):
        world.release(number, keep=1)
    world.expect_settled(FOUR)
    assert world.kept() == [FOUR, TWO]
    assert len(world.engine.containers()) == 2
    assert {entry["digest"] for entry in world.engine.load()["images"]} == {image(2)["digest"], image(4)["digest"]}


def test_the_same_again_is_nothing_to_roll_back_to(world: World) -> None:
    world.release(1)
    world.release(2)
    world.rollback()
    world.release(2, force=True)
    world.expect_settled(TWO)
    assert world.kept() == [TWO, ONE]


def test_prune_leaves_what_another_service_or_repository_needs(world: World) -> None:
    world.engine.push("prod-0", image(9))
    other = image(8, repository="registry/other")
    world.engine.push("x", other)
    world.engine.set(images=[image(9), other, image(7)])
    world.engine.container("unrelated", image=image(7)["id"], port=9999)
    world.release(None, name="ai-dev", tag="prod-0", port=8001)
    world.proxy.set(file=None, running=None)  # of the other service
    world.release(1)
    assert {entry["id"] for entry in world.engine.load()["images"]} == {image(number)["id"] for number in (1, 7, 8, 9)}


def test_a_digest_that_is_here_is_not_pulled(world: World) -> None:
    world.engine.set(images=[image(1)], errors={"pull": "dial tcp: no such host"})
    world.release(1)
    world.expect_settled(ONE)


def test_an_image_known_by_its_id_alone_is_run(world: World) -> None:
    loaded = {**image(9), "digest": ""}
    world.engine.set(images=[loaded])
    world.release(None, tag="prod-9", digest=loaded["id"])
    assert world.box()["argv"][-1] == loaded["id"]


def test_without_a_digest_the_tag_is_resolved_in_every_run(world: World) -> None:
    assert world.release(None, tag=ONE).changed
    assert world.record()["digest"] == image(1)["digest"]
    assert not world.release(None, tag=ONE).changed
    state = world.engine.load()
    state["registry"][f"registry/ai:{ONE}"] = image(2)  # the tag was moved
    world.engine.save(state)
    assert world.release(None, tag=ONE).changed
    assert world.record()["digest"] == image(2)["digest"]


@pytest.mark.parametrize(
    "values",
    [{"memory": "512m"}, {"environment": {"A": "b"}}, {"secrets": {"TOKEN": "other"}}, {"cpus": 1.5}],
    ids=lambda values: next(iter(values)),
)
def test_a_change_of_settings_is_a_new_release(world: World, values: dict[str, Any]) -> None:
    world.release(1)
    assert world.release(1, **values).action == "replaced"
    assert not world.release(1, **values).changed


@pytest.mark.parametrize(
    "values",
    [{"health_path": "/ready"}, {"bake_time": 9, "settle_time": 4}, {"keep": 7}, {"strategy": "stop-start"}],
    ids=lambda values: next(iter(values)),
)
def test_how_a_release_is_made_is_no_new_release(world: World, values: dict[str, Any]) -> None:
    world.release(1)
    assert not world.release(1, **values).changed


def test_a_running_release_learns_how_it_is_asked_where_it_answers_that(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.release(1)
    real = world.probe

    def probe(address: str, port: int, question: logic.Question, timeout: float) -> str | None:
        return "it answered 404, not 200" if question.path == "/nowhere" else real(address, port, question, timeout)

    monkeypatch.setattr(world, "probe", probe)
    assert not world.release(1, health_timeout=99).changed
    assert world.record()["health"]["timeout"] == 99
    assert not world.release(1, health_path="/nowhere").changed
    assert world.record()["health"]["path"] == "/health"


def test_settings_of_the_public_port_are_no_new_release(world: World) -> None:
    world.release(1)
    first = world.state()["current"]
    assert world.release(1, proxy_timeout=99).changed
    assert world.proxy.load()["running"]["settings"]["timeout"] == 99
    assert world.state()["current"] == first
    assert not world.release(1, proxy_timeout=99).changed


def test_container_is_confined_and_knows_its_release(world: World) -> None:
    world.release(1, environment={"FLAG": True, "DOLLAR": "$HOME"})
    argv = world.box()["argv"]
    text = " ".join(argv)
    for part in (
        "--init",
        "--read-only",
        "--cap-drop ALL",
        "--security-opt no-new-privileges",
        "--restart unless-stopped",
        "--memory 1073741824 --memory-swap 1073741824",
        "--log-opt max-size=10m --log-opt max-file=3",
        f"--publish 127.0.0.1:{world.record()['host_port']}:8000",
        f"--user {USER}",
        "--env FLAG=true",
        "--env DOLLAR=$HOME",
        f"--env IMAGE_TAG={ONE}",
        f"--env IMAGE_DIGEST={image(1)['digest']}",
        "--env RELEASE_ID=",
        "--label nemo.spec=",
        "--tmpfs /tmp:",
    ):
        assert part in text
    assert argv[-1] == f"registry/ai@{image(1)['digest']}"


def test_secrets_are_files_of_the_container_alone(world: World) -> None:
    done = world.release(1)
    release = world.record()["release"]
    folder = world.path / "lib/ai-prod/releases" / release / "secrets"
    assert (folder / "TOKEN").read_text() == SECRET
    assert stat.S_IMODE((folder / "TOKEN").stat().st_mode) == 0o400
    assert stat.S_IMODE(folder.stat().st_mode) == 0o500
    assert stat.S_IMODE(folder.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE((world.path / "lib/ai-prod").stat().st_mode) == 0o700
    assert stat.S_IMODE((world.path / "lib/.key").stat().st_mode) == 0o600
    assert stat.S_IMODE((world.path / "lib/ai-prod/state.json").stat().st_mode) == 0o600
    assert f"--volume {folder}:/run/secrets:ro,Z" in " ".join(world.box()["argv"])
    shown = json.dumps([world.engine.containers(), world.state(), module.difference("x", done.before, done.after)])
    assert SECRET not in shown


def test_a_release_that_lost_its_secrets_is_made_again(world: World) -> None:
    world.release(1)
    release = world.record()["release"]
    shutil.rmtree(world.path / "lib/ai-prod/releases" / release)
    foreseen = world.releaser(world.params(1), check_mode=True)
    foreseen.present()
    assert foreseen.action == "recovered"
    assert world.release(1).changed
    assert world.answering() == ONE
    folder = world.path / "lib/ai-prod/releases" / world.record()["release"] / "secrets"
    assert (folder / "TOKEN").read_text() == SECRET
    assert not world.release(1).changed


# -- what goes wrong


def test_an_unhealthy_release_never_gets_a_request(world: World) -> None:
    world.release(1)
    world.proxy.calls.clear()
    error, done = world.failing(3)
    assert error.reason == "unhealthy"
    assert f"{ONE} (" in error.text
    assert "served all through" in error.text
    assert error.log_tail == [f"starting {BROKEN}", f"RuntimeError: {BROKEN} is broken"]
    assert done.action == "removed"
    assert world.proxy.calls == []
    world.expect_settled(ONE)
    assert [entry["result"] for entry in world.state()["history"]] == ["failed", "ok"]


@pytest.mark.parametrize(
    ("behaviour", "reason", "text"),
    [
        ("crash", "unhealthy", "ended with status 3"),
        ("loop", "unhealthy", "it ended, and was started again by the engine"),
        ("unhealthy", "unhealthy", "gave no healthy answer within 3 s: it answered 503"),
        ("nostart", "platform", "exec format error"),
    ],
)
def test_each_way_of_not_coming_up(world: World, behaviour: str, reason: str, text: str) -> None:
    world.release(1)
    world.engine.push("bad", image(6, behaviour))
    error, _done = world.failing(None, tag="bad")
    assert error.reason == reason
    assert text in error.text
    world.expect_settled(ONE)


def test_what_failed_is_not_tried_again_unless_it_is_forced_or_changed(world: World) -> None:
    world.release(1)
    world.failing(3)
    world.engine.calls.clear()
    error, _done = world.failing(3)
    assert error.reason == "failed_before"
    assert "force" in error.advice
    assert not [call for call in world.engine.calls if call[1] in ("create", "start")]
    world.expect_settled(ONE)
    assert world.failing(3, force=True)[0].reason == "unhealthy"
    assert world.failing(3, environment={"MENDED": "yes"})[0].reason == "unhealthy"
    state = world.engine.load()
    state["registry"][f"registry/ai@{image(3)['digest']}"]["behaviour"] = "healthy"
    for entry in state["images"]:
        entry["behaviour"] = "healthy"
    world.engine.save(state)
    world.release(3, force=True)
    world.expect_settled(BROKEN)
    assert [entry["tag"] for entry in world.state()["failed"]] == [BROKEN]  # the other settings failed all the same


@pytest.mark.parametrize("reason", ["registry_unreachable", "no_space"])
def test_what_is_not_the_image_s_fault_is_tried_again(world: World, reason: str) -> None:
    world.release(1)
    world.engine.set(errors={"pull": PULL_ERRORS[reason]})
    assert world.failing(2)[0].reason == reason
    world.engine.set(errors={})
    world.release(2)
    world.expect_settled(TWO)


def test_a_slow_start_is_waited_for(world: World) -> None:
    world.engine.push("slow", image(6, "slow:4"))
    world.release(None, tag="slow")
    assert world.record()["tag"] == "slow"


def test_an_old_release_that_is_not_healthy_is_not_said_to_serve(world: World) -> None:
    world.release(1)
    world.change(behaviour="unhealthy")
    assert "is not healthy (it answered 503, not 200)" in world.failing(3)[0].text


def test_a_failing_first_release_leaves_nothing(world: World) -> None:
    error, done = world.failing(3)
    assert "nothing serves now" in error.text
    assert error.log_tail
    assert done.action == "removed"
    assert world.engine.containers() == {}
    assert world.left() == ["state.json"]


def test_a_smoke_request_decides_too(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.release(1)
    asked: list[logic.Question] = []

    def probe(_address: str, _port: int, question: logic.Question, _timeout: float) -> str | None:
        asked.append(question)
        return "its answer does not contain 'pong'" if question.path == "/v1/ping" else None

    monkeypatch.setattr(world, "probe", probe)
    smoke = {"path": "/v1/ping", "method": "POST", "body": "{}", "contains": "pong"}
    error, _done = world.failing(2, smoke=smoke)
    assert error.reason == "unhealthy"
    assert "smoke request POST /v1/ping failed" in error.text
    assert [question.body for question in asked if question.path == "/v1/ping"] == ["{}"]
    monkeypatch.undo()
    world.expect_settled(ONE)


# -- the watch with real traffic


def test_requests_that_fail_lead_the_traffic_back(world: World) -> None:
    world.release(1)

    def counters(slot: str) -> None:
        state = world.proxy.load()
        if world.answering() == TWO:
            current, total, errors = state["counters"].get(slot, [0, 100, 7])
            world.proxy.set(counters={slot: [current, total + 50, errors + 10]})

    world.proxy.on_counters = counters
    error, done = world.failing(2)
    assert error.reason == "bake"
    assert "requests failed (20.0 %)" in error.text
    assert "serves again" in error.text
    assert done.action == "restored"
    world.expect_settled(ONE)
    assert world.failing(2)[0].reason == "failed_before"


def test_a_haproxy_that_does_not_answer_is_no_haproxy_without_requests(world: World) -> None:
    """Neither in the watch, where what it had counted before would be new afterwards, nor where the old release ends."""
    world.release(1)
    world.release(2)
    slot = world.record()["slot"]
    answers = iter([None, None, [0, 100_000, 90_000], None, {"1": [0, 100_000, 90_000], "2": [0, 30, 0]}, None])
    statuses: list[str] = []

    def counters(asked: str) -> None:
        if asked != slot:  # of the one that is watched
            world.proxy.set(counters={asked: next(answers, None), slot: None})
        else:
            statuses.append(world.box(old)["status"])

    old = world.record()["release"]
    world.proxy.on_counters = counters
    done = world.release(4)
    assert any("30 requests in the time of its watch, 0 failed" in step for step in done.steps)
    assert len(statuses) > 10
    assert set(statuses) == {"running"}
    assert any("HAProxy did not say how many requests were still being answered" in text for text in done.warnings)
    world.expect_settled(FOUR)


def test_an_engine_that_is_gone_keeps_nobody_at_what_fails(world: World) -> None:
    world.release(1)

    def counters(_slot: str) -> None:
        if world.answering() == TWO:
            world.engine.set(errors={"container inspect": PULL_ERRORS["engine_down"]})

    world.proxy.on_counters = counters
    error, _done = world.failing(2)
    assert error.reason == "engine_down"
    assert "has the traffic again" in error.text
    assert world.answering() == ONE
    assert world.state()["failed"] == [], "it was not the image"
    world.engine.set(errors={})
    world.release(4)
    world.expect_settled(FOUR)


@pytest.mark.parametrize("error", [OSError(12, "Cannot allocate memory"), KeyError("State"), ValueError("no JSON")])
def test_whatever_else_goes_wrong_is_taken_back_too(world: World, error: Exception) -> None:
    world.release(1)
    raised: list[Exception] = []

    def counters(_slot: str) -> None:
        if not raised and world.answering() == TWO:
            raised.append(error)
            raise error

    world.proxy.on_counters = counters
    failure, done = world.failing(2)
    assert failure.reason == "unexpected"
    assert type(error).__name__ in failure.text or str(error) in failure.text
    assert done.action == "restored"
    world.expect_settled(ONE)
    assert world.state()["failed"] == [], "it was not the image"


def test_few_requests_decide_nothing(world: World) -> None:
    world.release(1)
    world.proxy.on_counters = lambda slot: world.proxy.set(
        counters={slot: [0, world.proxy.load()["counters"].get(slot, [0, 0])[1] + 1, 99]}
    )
    world.release(2, bake_min_requests=1000)
    world.expect_settled(TWO)


@pytest.mark.parametrize("happens", [{"status": "exited", "exit": 4}, {"restarts": 1}, {"behaviour": "unhealthy"}])
def test_a_release_that_dies_with_traffic_on_it_is_taken_back(world: World, happens: dict[str, Any]) -> None:
    world.release(1)

    def counters(_slot: str) -> None:
        if world.answering() == TWO:
            name = next(n for n, c in world.engine.containers().items() if c["labels"]["nemo.tag"] == TWO)
            world.change(name, **happens)

    world.proxy.on_counters = counters
    error, _done = world.failing(2, bake_time=10)
    assert error.reason == "bake"
    assert error.log_tail
    world.expect_settled(ONE)


def test_a_release_that_ends_while_it_is_watched_costs_no_request(world: World) -> None:
    """Its port refuses what comes, which the one that stands by then answers; nothing starts it again meanwhile."""
    world.release(1)
    down: list[str] = []
    policies: list[str] = []

    def counters(_slot: str) -> None:
        for name, box in world.engine.containers().items():
            if box["labels"]["nemo.tag"] == TWO and box["status"] == "running" and world.answering() == TWO:
                policies.append(box["policy"])
                world.change(name, status="exited", exit=4)
                assert world.answering() == ONE

    def event(what: str) -> None:
        if not world.answering():
            down.append(what)

    world.proxy.on_counters = counters
    with pytest.raises(logic.ReleaseError, match="ended with status 4"):
        world.act(world.releaser(world.params(2), event=event))
    assert policies == ["no"]
    assert down == []
    world.expect_settled(ONE)


def test_an_old_release_that_comes_back_on_another_port_is_led_to(world: World) -> None:
    world.release(1)
    port = world.record()["host_port"]
    gone: list[Any] = []

    def event(what: str) -> None:
        state = world.engine.load()
        if what == "docker container start" and not gone:  # of the new one
            gone.append(state["containers"].pop(f"ai-prod.{world.state()['current']}"))
            world.engine.save(state)

    with pytest.raises(logic.ReleaseError, match="serves again"):
        world.act(world.releaser(world.params(3), event=event))
    assert world.record()["host_port"] != port
    world.expect_settled(ONE)


def test_requests_of_the_old_release_are_waited_for_and_then_ended(world: World) -> None:
    world.release(1)
    slot = world.record()["slot"]
    world.proxy.set(counters={slot: [3, 10, 0]})
    done = world.release(2)
    assert any("3 requests were still being answered" in text for text in done.warnings)
    assert "cut" in world.proxy.calls
    world.expect_settled(TWO)


# -- preflight

PULL_ERRORS = {
    "engine_down": "Cannot connect to the Docker daemon at unix:///var/run/docker.sock. Is the docker daemon running?",
    "registry_unreachable": "Error response from daemon: Get https://r/v2/: dial tcp 10.0.0.11:443: connect: connection refused",
    "registry_certificate": "Error response from daemon: Get https://r/v2/: x509: certificate signed by unknown authority",
    "authentication": "Error response from daemon: denied: Your authorization token has expired. Reauthenticate and try again.",
    "not_found": "Error response from daemon: manifest for r/ai:x not found: manifest unknown: Requested image not found",
    "no_space": "write /var/lib/docker/tmp/GetImageBlob1: no space left on device",
    "platform": "no matching manifest for linux/amd64 in the manifest list entries",
}
NO_CREDENTIALS = "Error response from daemon: Head https://r/v2/ai/manifests/x: no basic auth credentials"


@pytest.mark.parametrize("reason", PULL_ERRORS)
def test_a_failing_pull_never_touches_the_old_release(world: World, reason: str) -> None:
    world.release(1)
    before = world.engine.containers()
    world.engine.set(errors={"pull": PULL_ERRORS[reason]})
    error, done = world.failing(2)
    assert error.reason == reason
    assert error.advice
    assert not done.changed
    after = world.engine.containers()
    for name, entry in after.items():
        entry["asked"] = before[name]["asked"]
    assert after == before
    world.expect_settled(ONE)


@pytest.mark.parametrize("reason", [*PULL_ERRORS, "mount", "proxy_missing", "memory"])
def test_what_failed_before_it_began_is_recorded_once(world: World, reason: str) -> None:
    """Who does not see it goes back by reflex, and leaves the release that is good."""
    world.release(1)
    values: dict[str, Any] = {}
    if reason in PULL_ERRORS:
        world.engine.set(errors={"pull": PULL_ERRORS[reason]})
    elif reason == "mount":
        values = {"mounts": [{"source": "/nowhere/at/all", "target": "/models", "read_only": True}]}
    elif reason == "proxy_missing":
        world.proxy.set(installed=False)
    else:
        values = {"memory": "1000g"}
    for _attempt in range(2):
        error, _done = world.failing(2, force=True, **values)
        assert error.reason == reason
        entry, before = world.state()["history"]
        assert (entry["tag"], entry["result"], entry["reason"], entry["by"]) == (TWO, "failed", reason, "tester")
        assert entry["text"] in error.text
        assert (before["tag"], before["result"]) == (ONE, "ok")
    world.failing(4, force=True, **values)
    assert [entry["tag"] for entry in world.state()["history"]] == [FOUR, TWO, ONE]


def test_what_is_refused_because_it_failed_before_hides_no_failure(world: World) -> None:
    world.release(1)
    world.failing(3)
    for _attempt in range(2):
        assert world.failing(3)[0].reason == "failed_before"
        assert [entry["reason"] for entry in world.state()["history"]] == ["unhealthy", ""]
    world.release(2)
    for _attempt in range(2):
        world.failing(3)
        assert [entry["reason"] for entry in world.state()["history"]] == ["failed_before", "", "unhealthy", ""]
    assert "[unhealthy]" in world.state()["history"][0]["text"]


def test_a_failure_to_see_to_what_is_there_is_no_release(world: World) -> None:
    world.release(1)
    world.proxy.set(error="HAProxy refuses its configuration")
    for digest in (image(1)["digest"], None):
        assert world.failing(1, digest=digest, proxy_keep_alive=30)[0].reason == "proxy"
    assert len(world.state()["history"]) == 1


def test_a_lock_that_another_run_keeps_is_no_failed_release(world: World) -> None:
    world.release(1)
    lock = logic.Lock(str(world.path / "run/images.lock"))
    assert lock.try_acquire()
    assert world.failing(2, lock_timeout=0)[0].reason == "lock"
    lock.release()
    assert len(world.state()["history"]) == 1


def test_a_failure_that_cannot_be_recorded_is_still_the_one_that_is_told(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.release(1)

    def full(_self: logic.Store, _what: str, _data: dict[str, Any]) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(logic.Store, "write", full)
    world.engine.set(errors={"pull": PULL_ERRORS["not_found"]})
    error, done = world.failing(2)
    assert error.reason == "not_found"
    assert any("not recorded: " in text for text in done.warnings)


@pytest.mark.parametrize(
    ("stays", "error"), [(False, NO_CREDENTIALS), (True, NO_CREDENTIALS), (True, PULL_ERRORS["authentication"])]
)
def test_a_credential_helper_that_was_too_slow_is_asked_once_more(world: World, stays: bool, error: str) -> None:
    world.release(1)
    world.engine.set(errors={"pull": error})
    tries: list[float] = []

    def event(what: str) -> None:
        if what.startswith("docker pull"):
            tries.append(world.now)
            if not stays:
                world.engine.set(errors={})

    releaser = world.releaser(world.params(2), event=event)
    began = world.now
    if stays:
        with pytest.raises(logic.ReleaseError) as caught:
            releaser.present()
        assert caught.value.reason == "authentication"
        assert world.now - began <= 2
        assert len(tries) == (2 if error == NO_CREDENTIALS else 1)
    else:
        releaser.present()
        world.expect_settled(TWO)
        assert len(tries) == 2


def test_a_failing_create_never_touches_the_old_release(world: World) -> None:
    world.release(1)
    world.engine.set(errors={"container create": "mkdir: no space left on device"})
    error, _done = world.failing(2)
    assert error.reason == "no_space"
    world.engine.set(errors={})
    world.expect_settled(ONE)


def test_a_foreign_platform_is_found_before_anything_is_started(world: World) -> None:
    world.release(1)
    world.engine.push("arm", image(6, platform="arm64"))
    error, _done = world.failing(None, tag="arm")
    assert error.reason == "platform"
    assert "linux/arm64" in error.text
    assert "linux/amd64" in error.text
    world.expect_settled(ONE)


@pytest.mark.parametrize("digest", [True, False])
def test_a_foreign_platform_is_remembered(world: World, digest: bool) -> None:
    world.release(1)
    world.engine.push("arm", image(6, platform="arm64"))
    values = {"tag": "arm", "digest": image(6)["digest"] if digest else None}
    assert world.failing(None, **values)[0].reason == "platform"
    world.engine.calls.clear()
    assert world.failing(None, **values)[0].reason == "failed_before"
    assert [call[0] for call in world.engine.calls].count("pull") == (0 if digest else 1)
    world.expect_settled(ONE)
    assert [entry["tag"] for entry in world.state()["failed"]] == ["arm"]


def test_a_taken_port_names_its_holder(world: World) -> None:
    world.engine.container("nginx", port=PORT)
    error, _done = world.failing(1)
    assert (error.reason, error.text) == ("port_taken", "port 8000 is taken by container nginx")
    world.engine.container("nginx", port=80)
    world.listening = "process 4711 (python3)"
    error, _done = world.failing(1)
    assert error.text == "port 8000 is taken by process 4711 (python3)"


def test_a_port_that_is_taken_between_choice_and_start_is_another_s(world: World) -> None:
    world.release(1)
    taken: list[int] = []

    def event(what: str) -> None:
        if what == "docker container create" and len(taken) < 2:
            box = next(c for c in world.engine.containers().values() if c["status"] == "created")
            taken.append(box["port"])
            world.engine.container(f"thief-{len(taken)}", port=box["port"])

    world.releaser(world.params(2), event=event).present()
    assert world.answering() == TWO
    assert world.record()["host_port"] not in taken
    assert len(taken) == 2


def test_more_memory_than_the_host_has_is_refused(world: World) -> None:
    error, _done = world.failing(1, memory="5g")
    assert error.reason == "memory"
    assert "4096 MiB" in error.text


@pytest.mark.parametrize(("memory", "text"), [((2 << 30, 2 << 30), "may use 1024"), ((4 << 30, 1 << 29), "512 MiB")])
def test_a_host_on_which_two_do_not_fit_says_so_and_offers_stop_start(
    world: World, memory: tuple[int, int], text: str
) -> None:
    world.release(1)
    world.memory = memory
    before = world.engine.containers()
    error, done = world.failing(2)
    assert error.reason == "memory"
    assert text in error.text
    assert "strategy stop-start" in error.advice
    assert not done.changed
    assert list(world.engine.containers()) == list(before)
    world.release(2, strategy="stop-start")
    world.expect_settled(TWO)


def test_stop_start_puts_the_old_release_back(world: World) -> None:
    world.release(1)
    error, done = world.failing(3, strategy="stop-start")
    assert "serves again" in error.text
    assert done.action == "restored"
    world.expect_settled(ONE)


def test_taking_turns_only_one_of_two_ever_runs(world: World) -> None:
    world.release(1)
    world.engine.set(single=True)  # as where both want the same GPU
    error, _done = world.failing(3, strategy="stop-start")
    assert "serves again" in error.text
    world.expect_settled(ONE)
    world.release(2, strategy="stop-start")
    world.expect_settled(TWO)
    world.rollback(strategy="stop-start")
    world.expect_settled(ONE)


def test_one_that_fails_with_traffic_on_it_makes_room_for_the_old_one(world: World) -> None:
    world.release(1, proxy_retry_after=10)
    world.engine.set(single=True)
    world.engine.push(TAGS[4], image(4, "fades:6"))
    error, _done = world.failing(4, strategy="stop-start", bake_time=20, proxy_retry_after=10)
    assert error.reason == "bake"
    world.expect_settled(ONE)
    assert world.proxy.calls.count("hold") == 2  # first for the old one, then for the one that failed


def test_requests_of_the_old_release_are_answered_before_it_makes_room(world: World) -> None:
    world.release(1, proxy_retry_after=10)
    world.proxy.set(counters={"a": [3, 100, 0]})
    seen: list[str] = []

    def answered(_slot: str) -> None:
        seen.append(str(world.box()["status"]))
        if len(seen) == 4:
            world.proxy.set(counters={"a": [0, 100, 0]})

    world.proxy.on_counters = answered
    world.release(2, strategy="stop-start", proxy_retry_after=10)
    assert seen[:4] == ["running"] * 4
    assert [call for call in world.proxy.calls if call != "ensure"][-3:] == ["hold", "switch", "switch"]
    world.expect_settled(TWO)


def test_without_retry_after_haproxy_holds_what_comes_meanwhile(world: World) -> None:
    world.release(1)
    world.release(2, strategy="stop-start")
    assert "hold" not in world.proxy.calls


@pytest.mark.parametrize("strategy", ["beside", "stop-start"])
@pytest.mark.parametrize(
    ("values", "reason", "text"),
    [
        (
            {"mounts": [{"source": "/no/such/models", "target": "/models", "read_only": True}]},
            "mount",
            "/no/such/models, which the container sees as /models, is not on this host",
        ),
        ({"runtime": "kata"}, "runtime", "the Docker Engine has no runtime kata; allowed: nvidia, runc"),
    ],
)
def test_what_the_host_lacks_is_found_before_anything_stops(
    world: World, strategy: str, values: dict[str, Any], reason: str, text: str
) -> None:
    world.release(1)
    error, done = world.failing(2, strategy=strategy, **values)
    assert (error.reason, error.text) == (reason, text)
    assert not done.changed
    assert not [words for words in world.engine.calls if words[:2] == ["container", "stop"]]
    world.expect_settled(ONE)


def test_a_mount_that_is_gone_keeps_a_rollback_from_beginning(world: World, tmp_path: Path) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    mounts = [{"source": str(folder), "target": "/models", "read_only": True}]
    world.release(1, mounts=mounts)
    world.release(2)
    folder.rmdir()
    releaser = world.releaser(world.params(None, state="rolled_back", image=None, port=None))
    with pytest.raises(logic.ReleaseError) as caught:
        world.act(releaser)
    assert caught.value.reason == "mount"
    world.expect_settled(TWO)
    folder.mkdir()
    world.rollback()
    assert f"type=bind,source={folder},target=/models,readonly" in world.box()["argv"]


SHAPE: dict[str, Any] = {
    "command": ["--model", "/models/x", "--flag=a b"],
    "runtime": "nvidia",
    "shm_size": "1g",
    "pids_limit": 0,
    "health_method": "POST",
    "health_body": '{"prompt": "x"}',
    "health_headers": {"Content-Type": "application/json"},
    "health_request_timeout": 30.0,
}


def test_what_shapes_the_container_comes_back_with_it(world: World) -> None:
    mounts = [{"source": str(world.path), "target": "/models", "read_only": False}]
    world.release(1, mounts=mounts, **SHAPE)
    argv = world.box()["argv"]
    assert argv[-3:] == SHAPE["command"]
    assert argv[-4] == "registry/ai@" + image(1)["digest"]
    for words in (["--runtime", "nvidia"], ["--shm-size", str(1 << 30)]):
        assert argv[argv.index(words[0]) + 1] == words[1]
    assert f"type=bind,source={world.path},target=/models" in argv
    assert "--pids-limit" not in argv
    before = world.record()
    world.release(2)
    assert "--runtime" not in world.box()["argv"]
    world.engine.run(["docker", "container", "rm", f"ai-prod.{before['release']}"])
    world.rollback()
    assert world.box()["argv"][-3:] == SHAPE["command"]
    health = world.record()["health"]
    assert (health["method"], health["body"], health["request_timeout"]) == ("POST", '{"prompt": "x"}', 30.0)


def test_a_release_of_before_these_inputs_is_the_same_release() -> None:
    params = {key: spec.get("default") for key, spec in module.ARGUMENTS.items()}
    params.update(image="registry/ai", tag="t", port=8000)
    settings = logic.settings_of(params, None, "")
    assert not {"command", "mounts", "runtime", "shm_size"} & set(settings)
    assert not {"method", "headers", "body", "request_timeout"} & set(logic.health_of(params))


def test_health_is_asked_for_as_it_was_said(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[logic.Question, float]] = []
    real = world.probe

    def probe(address: str, port: int, question: logic.Question, timeout: float) -> str | None:
        asked.append((question, timeout))
        return real(address, port, question, timeout)

    monkeypatch.setattr(world, "probe", probe)
    world.release(1, health_timeout=60, **SHAPE)
    assert {question.method for question, _timeout in asked} == {"POST"}
    assert {question.body for question, _timeout in asked} == {SHAPE["health_body"]}
    assert {timeout for _question, timeout in asked} == {30.0}


PHASES = [
    {"name": "loading weights", "pattern": "Starting to load"},
    {"name": "compiling", "pattern": r"^torch\.compile"},
]


def said(done: release_flow.Releaser, word: str) -> list[str]:
    return [step.partition(": ")[2] for step in done.steps if word in step]


def test_the_phase_that_a_release_is_in_is_said_and_how_long_it_took_last_time(world: World) -> None:
    world.engine.push("slow", image(5, "slow:60"))
    world.engine.set(log="Starting to load the model")

    def at(seconds: float) -> None:
        world.now += seconds
        if world.now > 20:
            world.engine.set(log="Starting to load the model\ntorch.compile takes a while")

    world.sleep = at  # type: ignore[method-assign]
    first = world.releaser(
        {**world.params(None, tag="slow", phases=PHASES, health_timeout=60), "digest": image(5)["digest"]}
    )
    world.act(first)
    assert said(first, "loading") == ["loading weights", "loading weights since 10 s", "loading weights since 20 s"]
    assert said(first, "compiling")[0] == "compiling"
    durations = world.record()["durations"]
    assert durations["loading weights"] == pytest.approx(20, abs=2.5)
    assert set(durations) == {"loading weights", "compiling", "healthy"}
    world.engine.set(log="Starting to load the model")
    world.now = 0
    second = world.releaser(
        {
            **world.params(None, tag="slow", phases=PHASES, health_timeout=60, memory="512m"),
            "digest": image(5)["digest"],
        }
    )
    world.act(second)
    assert said(second, "loading")[0] == f"loading weights (last time: {durations['loading weights']} s)"
    assert said(second, "healthy after")[0].endswith(f"(last time: {durations['healthy']} s)")


def test_what_has_not_ended_in_time_is_named(world: World) -> None:
    world.release(1)
    world.engine.set(log="Starting to load the model")
    error, _done = world.failing(3, phases=PHASES)
    assert "; it was in the phase: loading weights since" in error.text


def test_the_reason_of_a_failure_is_found_in_the_log(world: World) -> None:
    world.release(1)
    world.engine.push("bad", image(6, "crash"))
    world.engine.set(log="\x1b[31mtorch.OutOfMemoryError: tried to allocate 2.50 GiB\x1b[0m\nRuntimeError: see above")
    patterns = [
        {"pattern": "no such thing", "text": "never"},
        {
            "pattern": r"OutOfMemoryError: tried to allocate (?P<size>[\d.]+ \w+)",
            "text": r"GPU memory is short of \g<size>",
        },
        {"pattern": "RuntimeError", "text": "too late"},
    ]
    error, done = world.failing(None, tag="bad", failure_patterns=patterns)
    assert error.cause == "GPU memory is short of 2.50 GiB (torch.OutOfMemoryError: tried to allocate 2.50 GiB)"
    assert error.text.startswith(f"it ended with status 3: found in its log: {error.cause}. The release before it")
    assert done.action == "removed"
    assert error.cause in world.state()["history"][0]["text"]
    assert world.now <= 1, "it was decided when it ended, not when its time was over"


def test_a_full_disk_is_refused_before_the_pull_and_old_images_go_first(world: World) -> None:
    world.release(1)
    state = world.engine.load()
    state["images"].append(image(9))
    world.engine.save(state)
    error, _done = world.failing(2, min_free_disk_mb=10**9)
    assert error.reason == "no_space"
    assert "MB free" in error.text
    assert image(9)["id"] not in [entry["id"] for entry in world.engine.load()["images"]]
    world.expect_settled(ONE)


def test_a_full_disk_of_containerd_s_own_is_seen(world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    full = tmp_path / "containerd"
    full.mkdir()
    monkeypatch.setattr(logic, "CONTAINERD_ROOT", str(full))
    world.engine.set(storage=[["driver-type", "io.containerd.snapshotter.v1"]])
    real = os.statvfs

    def statvfs(path: str) -> Any:
        return os.statvfs_result((4096, 4096, 9, 9, 1, 9, 9, 9, 0, 255)) if path == str(full) else real(path)

    monkeypatch.setattr(os, "statvfs", statvfs)
    error, _done = world.failing(1, min_free_disk_mb=1)
    assert (error.reason, str(full) in error.text) == ("no_space", True)


def test_a_failing_commit_is_undone(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.release(1)
    write = logic.Store.write

    def full(self: logic.Store, what: str, data: dict[str, Any]) -> None:
        if what == "state.json" and self.read("transition.json") and data["current"] != current:
            raise OSError(28, "No space left on device")
        write(self, what, data)

    current = world.state()["current"]
    monkeypatch.setattr(logic.Store, "write", full)
    error, _done = world.failing(2)
    assert error.reason == "no_space"
    world.expect_settled(ONE)


def test_a_proxy_that_cannot_be_told_keeps_the_old_release(world: World) -> None:
    world.release(1)
    world.proxy.set(error="HAProxy refuses its configuration")
    error, _done = world.failing(2)
    assert error.reason == "proxy"
    world.proxy.set(error="")
    world.release(1)
    world.expect_settled(ONE)


def test_a_host_without_haproxy_is_told_so_before_anything_is_touched(world: World) -> None:
    world.proxy.set(installed=False)
    error, done = world.failing(1)
    assert error.reason == "proxy_missing"
    assert not done.changed


def test_nothing_that_serves_at_all_is_said(world: World) -> None:
    world.release(1)
    world.change(behaviour="crash", status="exited")
    error, _done = world.failing(3)
    assert "DOES NOT SERVE EITHER" in error.text


# -- rollback


def test_rollback_goes_to_the_release_before_without_a_pull(world: World) -> None:
    world.release(1)
    world.release(2)
    world.engine.set(errors={"pull": PULL_ERRORS["registry_unreachable"]})
    done = world.rollback(operator="bob")
    assert (done.changed, done.action) == (True, "rolled_back")
    world.expect_settled(ONE)
    assert world.kept() == [ONE, TWO]
    assert world.state()["pinned"]["by"] == "bob"
    assert world.state()["history"][0]["kind"] == "rollback"


def test_a_rollback_does_not_go_forward_again(world: World) -> None:
    world.release(1)
    world.release(2)
    world.rollback()
    releaser = world.releaser(world.params(None, state="rolled_back"))
    with pytest.raises(logic.ReleaseError) as caught:
        releaser.rollback()
    assert caught.value.reason == "no_release"
    assert TWO in caught.value.text
    world.rollback(release=TWO)
    world.expect_settled(TWO)


@pytest.mark.parametrize("by", ["release", "tag", "digest"])
def test_rollback_to_a_named_release(world: World, by: str) -> None:
    world.release(1)
    name = world.record()[by]
    world.release(2)
    world.release(4)
    world.rollback(release=name)
    world.expect_settled(ONE)
    assert not world.rollback(release=name).changed


def test_rollback_to_a_tag_means_the_other_release_of_it(world: World) -> None:
    world.release(1, memory="512m")
    world.release(1)
    assert world.rollback(release=ONE).changed
    assert world.record()["settings"]["memory"] == 512 << 20
    done = world.rollback(release=ONE)
    assert not done.changed, "the other one was left"
    assert any("answers already" in step for step in done.steps)


@pytest.mark.parametrize("way", ["rollback", "release"])
def test_the_way_out_does_not_wait_for_what_hangs(world: World, way: str) -> None:
    world.release(1)
    world.release(2, health_timeout=900)
    world.change(status="exited", behaviour="unhealthy")
    began = world.now
    world.rollback() if way == "rollback" else world.release(4)
    assert world.now - began < 60
    world.expect_settled(ONE if way == "rollback" else FOUR)


def test_rollback_takes_the_settings_and_secrets_of_then(world: World) -> None:
    world.release(1, environment={"A": "then"})
    world.release(1, environment={"A": "now"}, secrets={"TOKEN": "changed"})
    world.rollback()
    assert "--env A=then" in " ".join(world.box()["argv"])
    folder = world.path / "lib/ai-prod/releases" / world.record()["release"] / "secrets"
    assert (folder / "TOKEN").read_text() == SECRET


def test_rollback_makes_a_container_that_somebody_removed_again(world: World) -> None:
    world.release(1)
    first = world.record()["release"]
    world.release(2)
    state = world.engine.load()
    del state["containers"][f"ai-prod.{first}"]
    world.engine.save(state)
    world.rollback()
    world.expect_settled(ONE)


def test_a_rollback_that_fails_changes_nothing(world: World) -> None:
    world.release(1)
    first = world.record()["release"]
    world.release(2)
    world.change(f"ai-prod.{first}", behaviour="crash")
    releaser = world.releaser(world.params(None, state="rolled_back"))
    with pytest.raises(logic.ReleaseError):
        releaser.rollback()
    world.expect_settled(TWO)
    assert world.kept() == [TWO, ONE]


def test_rollback_without_a_release_before_says_what_there_is(world: World) -> None:
    world.release(1)
    error, _done = world.failing(None, state="rolled_back")
    assert error.reason == "no_release"
    assert "kept are: none" in error.text


# -- a run over the whole site takes nothing back


def test_the_site_leaves_a_newer_release_alone(world: World) -> None:
    world.release(2)
    done = world.release(1, intent="converge")
    assert not done.changed
    assert "is newer than" in done.kept
    world.expect_settled(TWO)
    world.release(1)
    world.expect_settled(ONE)
    world.release(2, intent="converge")
    world.expect_settled(TWO)


@pytest.mark.parametrize("tag", ["hotfix-20200101-0001", f"{ONE.partition('-')[0]}-hotfix-20200101-0001"])
def test_a_hotfix_whose_name_looks_like_another_rules_stays(world: World, tag: str) -> None:
    world.engine.push(tag, image(6))
    world.release(1, intent="converge")
    world.release(None, tag=tag)
    assert "no rule compares with" in world.release(2, intent="converge").kept
    world.expect_settled(tag)


def test_the_site_leaves_a_hotfix_outside_of_the_rule_alone(world: World) -> None:
    world.engine.push("hotfix", image(6))
    world.release(1, intent="converge")
    world.release(None, tag="hotfix")
    done = world.release(2, intent="converge")
    assert not done.changed
    assert f"which tester deployed and no rule compares with {TWO}" in done.kept
    world.expect_settled("hotfix")
    world.engine.push("hotfix-2", image(7))
    assert world.release(None, tag="hotfix-2", intent="converge").changed, (
        "somebody has written that into the inventory"
    )


def test_the_site_leaves_what_is_pinned_alone_though_the_registry_has_moved(world: World) -> None:
    world.release(1, pin=True)
    done = world.release(2, intent="converge", image="elsewhere/ai")
    assert not done.changed
    assert "is pinned to" in done.kept
    world.expect_settled(ONE)


def test_the_site_keeps_what_runs_where_the_newest_has_failed(world: World) -> None:
    world.release(1, intent="converge")
    assert world.failing(3, intent="converge")[0].reason == "unhealthy"
    for check_mode in (True, False):
        done = world.act(world.releaser(world.params(3, intent="converge"), check_mode=check_mode))
        assert (done.changed, done.action) == (False, "none")
        assert f"runs {ONE}, and {BROKEN} is not tried again" in done.kept
        assert done.warnings == [f"{done.kept}. {logic.ADVICE['failed_before']}"]
    assert world.failing(3)[0].reason == "failed_before"
    world.change(behaviour="unhealthy")
    assert world.failing(3, intent="converge")[0].reason == "failed_before", "what runs is nothing to keep"


def test_the_site_goes_where_the_registry_goes_with_what_it_released_itself(world: World) -> None:
    world.release(2, intent="converge")
    world.release(1, intent="converge")
    world.expect_settled(ONE)


def test_the_site_leaves_a_rollback_and_a_pinned_hotfix_alone(world: World) -> None:
    world.release(1)
    world.release(2)
    world.rollback()
    done = world.release(2, intent="converge")
    assert not done.changed
    assert "rolled back from" in done.kept
    world.engine.push("hotfix", image(6))
    world.release(None, tag="hotfix", pin=True, operator="bob")
    done = world.release(4, intent="converge")
    assert "pinned to hotfix" in done.kept
    assert "by bob" in done.kept
    assert world.answering() == "hotfix"
    world.release(4)
    assert world.state()["pinned"] is None
    world.expect_settled(FOUR)


def test_the_site_still_changes_the_settings_of_what_is_pinned(world: World) -> None:
    world.release(1, pin=True)
    assert world.release(2, intent="converge", memory="512m").action == "replaced"
    world.expect_settled(ONE)
    assert world.record()["settings"]["memory"] == 512 << 20
    assert world.state()["pinned"]


# -- the way from a container that holds the public port


def test_a_release_of_before_haproxy_is_moved_from_and_can_be_rolled_back_to(world: World) -> None:
    world.old_container(1)
    done = world.release(2)
    assert done.action == "replaced"
    world.expect_settled(TWO)
    assert world.kept() == [TWO, ONE]
    world.rollback()
    world.expect_settled(ONE)


def test_a_failing_move_leaves_the_old_container_as_it_was(world: World) -> None:
    world.old_container(1)
    world.failing(3)
    assert world.answering() == ONE
    assert list(world.engine.containers()) == ["ai-prod"]
    assert not world.proxy.is_set_up()


def test_a_move_that_fails_with_traffic_on_it_is_taken_back(world: World) -> None:
    world.old_container(1)

    def counters(_slot: str) -> None:
        name = next((n for n, c in world.engine.containers().items() if c["labels"]["nemo.tag"] == TWO), "")
        if name and world.proxy.is_set_up():
            world.change(name, status="exited")

    world.proxy.on_counters = counters
    error, _done = world.failing(2)
    assert error.reason == "bake"
    assert world.answering() == ONE
    assert not world.proxy.is_set_up()
    assert world.proxy.load()["detour"] is None


def test_a_container_of_other_origin_is_moved_from(world: World) -> None:
    world.engine.container("ai-prod", port=PORT, policy="always")
    world.failing(3)
    assert world.answering() == "other"
    done = world.release(1)
    world.expect_settled(ONE)
    assert world.kept() == [ONE]
    aside = world.engine.containers()["ai-prod.before"]
    assert (aside["status"], aside["policy"]) == ("exited", "no")
    assert any("is kept, stopped, as ai-prod.before" in text for text in done.warnings)
    assert not world.release(1).changed
    assert "ai-prod.before" in world.engine.containers()
    world.release(2)
    assert "ai-prod.before" not in world.engine.containers()


def test_what_an_operator_has_put_aside_is_not_removed(world: World) -> None:
    world.release(1)
    world.engine.container("ai-prod.before", status="exited", port=9)
    world.release(2)
    absent = world.releaser(world.params(None, state="absent", image="registry/ai"))
    absent.absent()
    assert list(world.engine.containers()) == ["ai-prod.before"]
    again = world.releaser(world.params(None, state="absent", image="registry/ai"))
    again.absent()
    assert not again.changed


def test_what_a_release_has_put_aside_goes_with_the_service(world: World) -> None:
    world.engine.container("ai-prod", port=PORT)
    world.release(1)
    assert "ai-prod.before" in world.engine.containers()
    world.releaser(world.params(None, state="absent")).absent()
    assert world.engine.containers() == {}


def test_a_container_keeps_its_name_where_another_has_the_one_of_what_is_put_aside(world: World) -> None:
    world.engine.container("ai-prod", port=PORT)
    world.engine.container("ai-prod.before", status="exited", port=9, behaviour="nostart")
    done = world.release(1)
    for number in (2, 4):
        containers = world.engine.containers()
        assert containers["ai-prod"]["status"] == "exited"
        assert containers["ai-prod.before"]["behaviour"] == "nostart"
        world.release(number)
        assert world.answering() == TAGS[number]
    assert any("is kept, stopped: another has the name ai-prod.before" in text for text in done.warnings)


@pytest.mark.parametrize("foreign", [False, True])
def test_a_move_goes_back_without_a_gap(world: World, foreign: bool) -> None:
    world.engine.container("ai-prod", port=PORT) if foreign else world.old_container(1)
    errs_with_traffic_on_it(world)
    down: list[str] = []

    def event(what: str) -> None:
        if world.answering() is None:
            down.append(what)

    with pytest.raises(logic.ReleaseError, match="requests failed"):
        world.act(world.releaser(world.params(3), event=event))
    assert down == []
    assert world.proxy.calls[-1] == "remove and drain"
    assert world.answering() == ("other" if foreign else ONE)
    assert world.proxy.load()["detour"] is None
    assert list(world.engine.containers()) == ["ai-prod"]


def test_connections_of_the_old_container_are_waited_for(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.old_container(1)
    left, seen = [3, 3, 2, 0], []

    def connections(_process: str, port: int) -> list[str]:
        seen.append((port, world.proxy.load()["detour"] is not None, world.engine.containers()["ai-prod"]["status"]))
        return ["x"] * left.pop(0)

    monkeypatch.setattr(release_flow, "connections", connections)
    assert world.release(2).warnings == []
    assert seen == [(PORT, True, "running")] * 4
    world.expect_settled(TWO)


def test_connections_that_do_not_end_are_said(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.old_container(1)
    monkeypatch.setattr(release_flow, "connections", lambda _process, _port: ["x"])
    assert any(
        "1 connections to the old container were still open after 5 s" in text for text in world.release(2).warnings
    )


@pytest.mark.parametrize("strategy", ["beside", "stop-start"])
def test_a_move_by_either_strategy(world: World, strategy: str) -> None:
    world.old_container(1)
    world.failing(3, strategy=strategy)
    assert world.answering() == ONE
    world.release(2, strategy=strategy)
    world.expect_settled(TWO)


def test_an_old_container_that_made_room_is_back_as_it_was(world: World) -> None:
    """It comes back after a reboot while the new one is not proven; and it has room again when that one fails."""
    world.old_container(1, policy="on-failure")
    world.engine.set(single=True)
    policies: set[str] = set()

    def event(_what: str) -> None:
        boxes = world.engine.containers()
        if boxes["ai-prod"]["status"] == "exited" and world.answering() is None:
            policies.update(f"{name.partition('.')[0]}{len(name) > 7} {box['policy']}" for name, box in boxes.items())

    with pytest.raises(logic.ReleaseError, match="serves"):
        world.act(world.releaser(world.params(3, strategy="stop-start"), event=event))
    assert policies == {"ai-prodFalse always", "ai-prodTrue no"}
    assert world.answering() == ONE
    assert world.engine.containers()["ai-prod"]["policy"] == "on-failure"


# -- a host that is not as the last run left it


def test_a_stopped_release_serves_again(world: World) -> None:
    world.release(1)
    world.change(status="exited")
    done = world.release(1)
    assert (done.changed, done.action) == (True, "recovered")
    world.expect_settled(ONE)


def test_a_stopped_release_serves_again_even_when_the_new_one_cannot_be_pulled(world: World) -> None:
    world.release(1)
    world.change(status="exited")
    world.engine.set(errors={"pull": PULL_ERRORS["registry_unreachable"]})
    error, _done = world.failing(2)
    assert error.reason == "registry_unreachable"
    world.expect_settled(ONE)


def test_a_paused_release_serves_again(world: World) -> None:
    world.release(1)
    world.change(status="paused")
    assert world.release(1).changed
    world.expect_settled(ONE)


def test_a_release_that_hangs_is_replaced(world: World) -> None:
    world.release(1)
    first = world.record()["release"]
    world.change(behaviour="unhealthy")
    assert world.release(1).changed
    assert world.answering() == ONE
    assert world.record()["release"] != first


def test_a_removed_container_is_made_again(world: World) -> None:
    world.release(1)
    state = world.engine.load()
    state["containers"].clear()
    world.engine.save(state)
    assert world.release(1).changed
    world.expect_settled(ONE)


def test_a_proxy_that_is_gone_or_leads_elsewhere_is_put_in_order(world: World) -> None:
    world.release(1)
    for change in ({"running": None}, {"file": None, "running": None}):
        world.proxy.set(**change)
        assert world.answering() is None
        assert world.release(1).changed
        world.expect_settled(ONE)


def test_a_container_that_nobody_knows_is_removed(world: World) -> None:
    world.release(1)
    world.engine.container("ai-prod.20200101T000000Z-aaaaaa", port=20001, status="exited")
    world.change(
        "ai-prod.20200101T000000Z-aaaaaa",
        labels={"nemo.service": "ai-prod", "nemo.release": "20200101T000000Z-aaaaaa"},
    )
    world.release(1)
    world.expect_settled(ONE)


def test_absent_leaves_nothing(world: World) -> None:
    world.release(1)
    world.release(2)
    params = world.params(None, state="absent", image="registry/ai")
    done = world.releaser(params)
    done.absent()
    assert (done.changed, done.action) == (True, "removed")
    assert world.engine.containers() == {}
    assert world.engine.load()["images"] == []
    assert not world.proxy.is_set_up()
    assert not (world.path / "lib/ai-prod").exists()
    again = world.releaser(params)
    again.absent()
    assert not again.changed


# -- check mode


def everything(path: Path) -> dict[str, bytes]:
    return {str(entry): entry.read_bytes() for entry in sorted(path.rglob("*")) if entry.is_file()}


@pytest.mark.parametrize(("number", "action"), [(1, "none"), (2, "replaced")])
def test_check_mode_foresees_and_touches_nothing(world: World, number: int, action: str) -> None:
    world.release(1)
    state, proxy = world.engine.load(), world.proxy.load()
    before = everything(world.path / "lib")
    done = world.releaser(world.params(number), check_mode=True)
    done.present()
    assert (done.action, done.changed) == (action, action != "none")
    assert everything(world.path / "lib") == before
    after = world.engine.load()
    for name, entry in after["containers"].items():
        entry["asked"] = state["containers"][name]["asked"]
    assert after == state
    assert world.proxy.load() == proxy


def test_check_mode_on_an_empty_host(world: World) -> None:
    done = world.releaser(world.params(1), check_mode=True)
    done.present()
    assert done.action == "released"
    assert not (world.path / "lib").exists()


def test_check_mode_of_a_rollback(world: World) -> None:
    world.release(1)
    world.release(2)
    before = everything(world.path / "lib")
    done = world.releaser(world.params(None, state="rolled_back"), check_mode=True)
    done.rollback()
    assert (done.changed, done.action) == (True, "rolled_back")
    assert everything(world.path / "lib") == before


def test_check_mode_sees_an_interrupted_release(world: World) -> None:
    world.release(1)
    with_kill(world, 2, "docker container create")
    done = world.releaser(world.params(1), check_mode=True)
    done.present()
    assert done.changed


def test_what_cannot_be_cleared_away_gets_no_traffic(world: World) -> None:
    """The killed run's container was never proven; that it does not stop is no reason to lead anybody to it."""
    world.release(1)
    with_kill(world, 3, "docker container start")
    world.engine.set(
        errors={"container stop": "did not receive an exit event", "container rm": "device or resource busy"}
    )
    error, _releaser = world.failing(2)
    assert "exit event" in error.text or "busy" in error.text
    assert world.answering() == ONE
    world.engine.set(errors={})
    world.release(2)
    world.expect_settled(TWO)


def test_what_served_all_through_is_not_said_to_be_down(world: World) -> None:
    world.release(1)
    world.engine.set(errors={"container rm": "device or resource busy"})
    error, _releaser = world.failing(3)
    assert "The release before it has the traffic" in error.text
    assert "DOES NOT SERVE" not in error.text
    assert world.answering() == ONE


def test_another_services_broken_record_stops_no_release(world: World) -> None:
    world.release(1)
    other = world.path / "lib/ai-dev/state.json"
    other.parent.mkdir()
    other.write_text("{")
    done = world.release(2)
    world.expect_settled(TWO)
    assert any("no image is removed" in text for text in done.warnings)


def test_haproxy_that_cannot_be_told_keeps_nothing_from_coming_back(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.release(1, proxy_retry_after=10)
    world.engine.set(single=True)
    world.engine.push(TAGS[4], image(4, "fades:6"))
    hold = world.proxy.hold

    def told_once(active: str) -> None:
        if world.proxy.calls.count("hold"):
            raise TimeoutError(110, "timed out")
        hold(active)

    monkeypatch.setattr(world.proxy, "hold", told_once)
    error, _done = world.failing(4, strategy="stop-start", bake_time=20, proxy_retry_after=10)
    assert error.reason == "bake"
    assert "serves again" in error.text
    world.expect_settled(ONE)


# -- a kill at every step

ROLLBACK = -1
AT_ONCE = {"proxy_retry_after": 10}  # whoever comes while releases take turns is told so


def before_a_rollback(world: World, **values: Any) -> None:
    world.release(2, **values)
    world.release(1, **values)


def errs_with_traffic_on_it(world: World) -> None:
    """The broken release is healthy until it has users."""
    world.engine.push(BROKEN, image(3))

    def counters(slot: str) -> None:
        if world.answering() == BROKEN:
            current, total, errors = world.proxy.load()["counters"].get(slot) or [0, 100, 7]
            world.proxy.set(counters={slot: [current, total + 50, errors + 10]})

    world.proxy.on_counters = counters


def before_a_move_back(world: World) -> None:
    world.old_container(1)
    errs_with_traffic_on_it(world)


SCENARIOS: dict[str, tuple[Callable[[World], object], int, str]] = {
    "first": (lambda world: None, 1, "beside"),
    "first failing": (lambda world: None, 3, "beside"),
    "replacing": (lambda world: world.release(1), 2, "beside"),
    "failing": (lambda world: world.release(1), 3, "beside"),
    "settings": (lambda world: world.release(2, memory="512m"), 2, "beside"),
    "rolling back": (before_a_rollback, ROLLBACK, "beside"),
    "moving": (lambda world: world.old_container(1), 2, "beside"),
    "moving failing": (lambda world: world.old_container(1), 3, "beside"),
    "moving and back": (before_a_move_back, 3, "beside"),
    "moving by turns": (lambda world: world.old_container(1), 2, "stop-start"),
    "moving by turns failing": (lambda world: world.old_container(1), 3, "stop-start"),
    "stopping first": (lambda world: world.release(1), 2, "stop-start"),
    "stopping first failing": (lambda world: world.release(1), 3, "stop-start"),
    "taking turns back": (lambda world: before_a_rollback(world, **AT_ONCE), ROLLBACK, "stop-start"),
}


def params_of(world: World, number: int, strategy: str) -> dict[str, Any]:
    if number == ROLLBACK:
        return world.params(None, state="rolled_back", strategy=strategy)
    return world.params(number, strategy=strategy, **(AT_ONCE if strategy == "stop-start" else {}))


def counted(world: World, number: int, strategy: str, event: Callable[[str], None] = lambda what: None) -> list[str]:
    """The steps of a run, in order."""
    steps: list[str] = []

    def happened(what: str) -> None:
        steps.append(what)
        event(what)

    try:
        world.act(world.releaser(params_of(world, number, strategy), event=happened))
    except logic.ReleaseError:
        pass
    return steps


def with_kill(world: World, number: int, at: int | str, strategy: str = "beside") -> str:
    """Release in a process of its own that dies right after a step, as by SIGKILL: no handler, no finally runs."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        steps = 0

        def event(what: str) -> None:
            nonlocal steps
            steps += 1
            if at in (steps, what):
                os.write(writer, what.encode())
                os._exit(137)

        try:
            world.act(world.releaser(params_of(world, number, strategy), event=event))
        finally:
            os._exit(0)
    os.close(writer)
    _pid, status = os.waitpid(child, 0)
    what = os.read(reader, 200).decode()
    os.close(reader)
    assert os.waitstatus_to_exitcode(status) == 137, f"the run ended before step {at}"
    return what


def prepare(path: Path, scenario: str) -> World:
    world = World(path)
    SCENARIOS[scenario][0](world)
    return world


@functools.cache
def points() -> list[tuple[str, int]]:
    found = []
    for scenario, (_start, number, strategy) in SCENARIOS.items():
        with tempfile.TemporaryDirectory() as folder:
            steps = counted(prepare(Path(folder), scenario), number, strategy)
            found += [(scenario, at + 1) for at in range(len(steps))]
    return found


THEN = ("again", "back", "other")
EVERY = ("replacing", "moving")  # with each thing that may follow; for the others they take turns


@pytest.mark.parametrize(
    ("scenario", "at", "then"),
    [
        (scenario, at, then)
        for scenario, at in points()
        for number, then in enumerate(THEN)
        if scenario in EVERY or at % len(THEN) == number
    ],
)
def test_after_a_kill_at_any_step_the_next_run_ends_well(tmp_path: Path, scenario: str, at: int, then: str) -> None:
    world = prepare(tmp_path, scenario)
    _start, number, strategy = SCENARIOS[scenario]
    before = world.answering()
    if strategy == "stop-start":
        world.engine.set(single=True)
    with_kill(world, number, at, strategy)
    if strategy == "stop-start":
        world.guard_acts()
    if before:
        assert world.answering(), "the kill alone took the service down"
    if then == "again" and number == ROLLBACK:
        with contextlib.suppress(logic.ReleaseError):  # it had been rolled back already
            world.rollback()
        assert world.answering() in (ONE, TWO)
        world.expect_settled(ONE, TWO)
        return
    following = {"again": number, "back": 2 if number == ROLLBACK else 1, "other": 4}[then]
    try:
        values: dict[str, Any] = AT_ONCE if strategy == "stop-start" else {}
        world.release(following, strategy=strategy, force=True, **values)
    except logic.ReleaseError:
        assert following == 3
        assert world.answering() == before
        if before is None:
            assert world.engine.containers() == {}
            assert world.left() == ["state.json"]
        elif "moving" not in scenario:
            world.expect_settled(ONE)
        return
    assert following != 3
    world.expect_settled(TAGS[following])
    assert not world.release(following, strategy=strategy, **values).changed
    assert {entry["policy"] for entry in world.engine.containers().values()} == {"unless-stopped"}


@pytest.mark.parametrize(
    "scenario",
    [
        name
        for name, (_s, _n, strategy) in SCENARIOS.items()
        if strategy != "beside" or name in ("replacing", "rolling back")
    ],
)
def test_a_reboot_in_the_middle_brings_back_what_answers(tmp_path: Path, scenario: str) -> None:
    _start, number, strategy = SCENARIOS[scenario]
    down: list[str] = []
    for at in [at for name, at in points() if name == scenario]:
        path = tmp_path / str(at)
        path.mkdir()
        world = prepare(path, scenario)
        before = world.answering()
        world.engine.set(single=strategy == "stop-start")
        what = with_kill(world, number, at, strategy)
        world.engine.restart()
        world.proxy.kill()
        if before and not world.answering():
            down.append(what)
        world.release(4, strategy=strategy)
        world.expect_settled(FOUR)
    # HAProxy's file and the restart policies cannot change in one step.
    assert set(down) <= {"proxy file", "proxy led"}, down


@pytest.mark.parametrize("scenario", [name for name, (_s, _n, strategy) in SCENARIOS.items() if strategy == "beside"])
def test_a_client_is_answered_at_every_step(tmp_path: Path, scenario: str) -> None:
    world = prepare(tmp_path, scenario)
    _start, number, strategy = SCENARIOS[scenario]
    if world.answering() is None:
        return  # there is nothing yet that could be taken down
    down: list[str] = []

    def event(what: str) -> None:
        if world.answering() is None:
            down.append(what)

    counted(world, number, strategy, event)
    assert down == []


@pytest.mark.parametrize(
    ("scenario", "at"), [point for point in points() if point[0] in ("replacing", "rolling back", "moving")]
)
def test_two_kills_in_a_row_are_survived_too(tmp_path: Path, scenario: str, at: int) -> None:
    _start, number, strategy = SCENARIOS[scenario]
    for second in range(1 + at % 5, 60, 5):  # a fifth of all pairs; neighbours differ by a look at the engine
        path = tmp_path / str(second)
        path.mkdir()
        world = prepare(path, scenario)
        with_kill(world, number, at, strategy)
        try:
            with_kill(world, number, second, strategy)
        except AssertionError:
            break
        assert world.answering()
        world.release(4)
        world.expect_settled(FOUR)


@pytest.mark.parametrize("what", ["proxy", "engine"])
@pytest.mark.parametrize("scenario", ["replacing", "rolling back"])
def test_haproxy_or_the_host_may_start_again_at_any_step(tmp_path: Path, scenario: str, what: str) -> None:
    """With a kill of the run at the same moment, as by a reboot of the host."""
    _start, number, strategy = SCENARIOS[scenario]
    for at in [at for name, at in points() if name == scenario]:
        path = tmp_path / str(at)
        path.mkdir()
        world = prepare(path, scenario)
        with_kill(world, number, at, strategy)
        world.proxy.kill()
        if what == "engine":  # containers that ran come back, those that were stopped do not
            for name, entry in world.engine.containers().items():
                world.change(name, status="running" if entry["status"] == "running" else entry["status"])
        assert world.answering(), at
        world.release(4)
        world.expect_settled(FOUR)


@pytest.mark.parametrize("when", ["before the pull", "after a prune in the middle"])
def test_lock_of_the_images_that_another_run_keeps_is_named(
    world: World, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    held = logic.Lock(str(world.path / "run/images.lock"))
    values: dict[str, Any] = {"lock_timeout": 0}
    if when == "before the pull":
        held.acquire(0)
    else:
        values["min_free_disk_mb"] = 10**9
        monkeypatch.setattr(release_flow.Releaser, "prune", lambda self: held.acquire(0))
    error, _done = world.failing(1, **values)
    assert error.reason == "lock"
    assert "images.lock" in str(error)
    assert world.engine.containers() == {}


@pytest.mark.parametrize(
    ("one", "two", "expected"),
    [
        ("prod-20260101-0002", "prod-20260101-0001", True),
        ("prod-20260101-0001", "prod-20260101-0001", False),
        ("dev-20260101-0002", "prod-20260101-0001", False),
        ("hotfix", "prod-20260101-0001", False),
    ],
)
def test_newer(one: str, two: str, expected: bool) -> None:
    assert release_flow.newer(one, two) is expected
