"""What ai-dev does when somebody pushes an image: the timer's run on the Bastion, started by hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.faults.conftest import LATER

GOOD, BAD, *MORE = LATER[1:]
# The unit fails where a release does; the state says which.
LOOK = "systemctl start nemo-follow.service || true"
On = Callable[[str, str], str]


@pytest.fixture
def following(on: On, site: Callable[..., Any], health: Callable[[str], str]) -> Iterator[None]:
    """ai-dev follows its registry, and is back on its newest image afterwards."""
    before = json.loads(health("ai-dev"))["tag"]
    on("bastion", "systemctl stop nemo-follow.timer nemo-follow.service; nemo-follow resume ai-dev")
    yield
    on("bastion", "nemo-follow stop ai-dev tests of faults; systemctl reset-failed; systemctl start nemo-follow.timer")
    assert site("--limit", "ai_dev").returncode == 0
    assert json.loads(health("ai-dev"))["tag"] == before


def looked(on: On) -> dict[str, Any]:
    """The state of ai-dev after one look."""
    on("bastion", LOOK)
    state: dict[str, Any] = json.loads(on("bastion", "nemo-follow --json"))["ai-dev"]
    return state


@pytest.mark.sample
def test_what_is_pushed_is_released_by_itself_and_what_fails_only_once(
    following: None, image: Callable[..., str], on: On, health: Callable[[str], str]
) -> None:
    image(GOOD, "healthy")
    state = looked(on)
    assert state["last"]["result"] == "released", state["text"]
    assert json.loads(health("ai-dev"))["tag"] == GOOD
    host = json.loads(on("ai-dev", "cat /var/lib/nemo/ai-dev/state.json"))
    assert (host["releases"][0]["tag"], host["releases"][0]["by"]) == (GOOD, "nemo-follower")
    run = json.loads(on("bastion", "nemo-operations --json -n 1"))[0]
    assert (run["user"], run["result"]) == ("nemo-follower", "ok")
    assert [name for name in run["locked"] if name.startswith("ai-dev")]

    image(BAD, "crash")
    state = looked(on)
    assert state["last"]["result"] == "failed", state["text"]
    state = looked(on)
    assert state["last"]["result"] == "nothing", "what failed is not tried again"
    assert json.loads(health("ai-dev"))["tag"] == GOOD
    shown = " ".join(on("bastion", "runuser -u alice -- ansible-playbook releases.yml").split())
    assert f"failed: {BAD}" in shown
    assert "follows the registry: nothing to release at" in shown


def test_a_service_whose_images_fail_again_and_again_is_stopped(
    following: None, image: Callable[..., str], on: On, health: Callable[[str], str]
) -> None:
    serves = health("ai-dev")
    for tag in MORE:
        image(tag, "crash")
        state = looked(on)
    assert [failure["tag"] for failure in state["failures"]] == MORE
    assert state["stopped"]["by"] == "nemo-follow"
    on("bastion", "systemctl start nemo-follow.service")  # a state, and no failure any more
    assert health("ai-dev") == serves
