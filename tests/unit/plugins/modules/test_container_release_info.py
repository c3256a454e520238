"""nemo.platform.container_release_info on hosts that the fakes of container_release have made."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from ansible_collections.nemo.platform.plugins.filter.rollback_plan import rollback_plan
from ansible_collections.nemo.platform.plugins.module_utils import container_release as logic
from ansible_collections.nemo.platform.plugins.module_utils.release_follow import plan as follow_plan
from ansible_collections.nemo.platform.plugins.modules import container_release_info as module
from tests.unit.helpers import ROOT
from tests.unit.plugins.modules.fake_docker import image
from tests.unit.plugins.modules.release_world import TAGS, World


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setattr(os, "fsync", lambda _descriptor: None)
    monkeypatch.setattr(module, "probe_http", lambda *_arguments: None)
    return World(tmp_path)


def look(world: World) -> dict[str, Any]:
    found = module.service(logic.Store("ai-prod", str(world.path / "lib"), str(world.path / "run")), "ai-prod")
    assert found
    return found


def test_what_runs_what_is_kept_and_what_failed(world: World) -> None:
    world.release(1, operator="alice")
    world.release(2, operator="bob")
    world.failing(3)
    found = look(world)
    assert (found["tag"], found["by"], found["health"], found["port"]) == (TAGS[2], "bob", "ok", 8000)
    assert [(entry["tag"], entry["left"]) for entry in found["kept"]] == [(TAGS[1], False)]
    assert [(entry["tag"], entry["reason"]) for entry in found["failed"]] == [(TAGS[3], "unhealthy")]
    assert [entry["result"] for entry in found["history"]] == ["failed", "ok", "ok"]
    assert found["under_way"] == found["pinned"] == ""


def test_where_a_rollback_goes(world: World) -> None:
    world.release(1)
    world.release(2)
    found = look(world)
    assert rollback_plan({"host": [found]}) == {"problem": "", "releases": {"host": found["kept"][0]["release"]}}
    world.failing(3)
    assert f"the last release on host, of {TAGS[3]}, failed at" in rollback_plan({"host": [look(world)]})["problem"]
    world.release(4)
    world.failing(3, memory="1000g")
    assert "failed at" in rollback_plan({"host": [look(world)]})["problem"], "it did not even begin"
    assert rollback_plan({"host": [look(world)]}, TAGS[1]) == {"problem": "", "releases": {"host": TAGS[1]}}


class Killed(BaseException):
    """The run is gone."""


def kill_at(world: World, moment: int, number: int | None = None, **values: Any) -> bool:
    """One run, and the end of its process after so many of its steps; whether there were so many."""
    steps = 0

    def event(_what: str) -> None:
        nonlocal steps
        steps += 1
        if steps > moment:
            raise Killed

    releaser = world.releaser(world.params(number, **values), event=event)
    with contextlib.suppress(Killed):
        world.act(releaser)
    releaser.images_lock.release()  # as the end of the process would
    world.guard_acts()
    return steps > moment


def test_a_rollback_that_was_killed_and_is_begun_again_goes_no_further(tmp_path: Path) -> None:
    begun: list[str] = []
    for moment in range(0, 1000, 3):
        (tmp_path / str(moment)).mkdir()
        world = World(tmp_path / str(moment))
        for number in (1, 2, 4):
            world.release(number)
        if not kill_at(world, moment, state="rolled_back", image=None, port=None):
            break
        found = look(world)
        begun.append(found["begun"])
        plan = rollback_plan({"host": [found]})
        assert plan["problem"] == ""
        if begun[-1] or found["tag"] == TAGS[4]:
            world.rollback(release=plan["releases"]["host"])
        world.expect_settled(TAGS[2])
    assert [what for what in dict.fromkeys(begun) if what] == ["rollback", "rolled_back"]


def test_a_rollback_after_a_killed_release_goes_to_the_one_that_it_was_to_replace(tmp_path: Path) -> None:
    ends: list[str] = []
    for moment in range(0, 1000, 3):
        (tmp_path / str(moment)).mkdir()
        world = World(tmp_path / str(moment))
        world.release(1)
        world.release(2)
        kill_at(world, moment, 4)
        found = look(world)
        plan = rollback_plan({"host": [found]})
        assert plan["problem"] == ""
        world.rollback(release=plan["releases"]["host"])
        ends.append(found["begun"] or found["tag"])
        world.expect_settled(TAGS[1] if ends[-1] == TAGS[2] else TAGS[2])
        undone = TAGS[2] if ends[-1] == TAGS[2] else TAGS[4]
        after = look(world)
        assert after["pinned"].startswith(f"rolled back from {undone}, by ")
        assert [(entry["tag"], entry["reason"]) for entry in after["failed"]] == [(undone, "rolled_back")]
        newest = {"tag": TAGS[4], "digest": image(4)["digest"]}
        assert follow_plan(newest, {"host": [after]}).hosts == []
        assert world.release(4, intent="converge").kept, "neither does a run over the whole site"
        world.expect_settled(after["tag"])
        if ends[-1] == TAGS[4]:
            break
    assert list(dict.fromkeys(ends)) == [TAGS[2], "release", TAGS[4]], (
        "a kill before, in the middle, and after it counts"
    )


def test_a_state_that_cannot_be_read_is_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "ai-prod").mkdir()
    (tmp_path / "ai-prod/state.json").write_text('{"form')
    arguments = {"ANSIBLE_MODULE_ARGS": {"state_path": str(tmp_path), "run_path": str(tmp_path / "run")}}
    done = subprocess.run(
        [sys.executable, "-m", module.__name__], input=json.dumps(arguments), cwd=ROOT / "collections", capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert f"{tmp_path}/ai-prod/state.json cannot be read" in json.loads(done.stdout)["msg"]


def test_a_rollback_is_said_to_be_one(world: World) -> None:
    world.release(1)
    world.release(2)
    world.rollback(operator="bob")
    found = look(world)
    assert found["kind"] == "rollback"
    assert found["pinned"].startswith(f"rolled back from {TAGS[2]}, by bob at ")
    assert [(entry["tag"], entry["left"]) for entry in found["kept"]] == [(TAGS[2], True)]


def test_a_release_under_way_and_one_that_was_interrupted(world: World) -> None:
    world.release(1)
    store = logic.Store("ai-prod", str(world.path / "lib"), str(world.path / "run"))
    record = {"tag": TAGS[2], "release": "x"}
    store.write("transition.json", {"kind": "release", "by": "bob", "since": "then", "record": record})
    found = look(world)
    assert found["under_way"].startswith(f"interrupted: release of {TAGS[2]} by bob, begun at then")
    assert found["begun"] == "release"
    lock = logic.Lock(store.lock_path)
    lock.acquire(0)
    lock.sign({"by": "carol", "since": "now", "pid": os.getpid(), "what": "a restart"})
    assert look(world)["under_way"] == f"carol since now (process {os.getpid()}, a restart)"
    lock.release()


def test_a_service_that_is_not_there(tmp_path: Path) -> None:
    assert module.service(logic.Store("x", str(tmp_path), str(tmp_path)), "x") is None


def test_documentation_and_arguments_agree() -> None:
    documented = yaml.safe_load(module.DOCUMENTATION)["options"]
    assert set(documented) == set(module.ARGUMENTS)
    for name, spec in module.ARGUMENTS.items():
        for key in ("type", "default", "required"):
            assert documented[name].get(key) == spec.get(key), (name, key)
    yaml.safe_load(module.EXAMPLES)
    yaml.safe_load(module.RETURN)
