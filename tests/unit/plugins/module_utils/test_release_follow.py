"""What is released by itself, and what is left to people."""

from __future__ import annotations

from typing import Any

import pytest

from ansible_collections.nemo.platform.plugins.module_utils.release_follow import Plan, plan

OLD, NEW = "dev-20260101-0001", "dev-20260102-0001"
NEWEST = {"tag": NEW, "digest": "sha256:2"}


def runs(tag: str = OLD, digest: str = "sha256:1", **more: Any) -> list[dict[str, Any]]:
    service = {"release": "r", "tag": tag, "digest": digest, "pinned": "", "under_way": "", "failed": []}
    return [{**service, **more}]


def test_what_is_newer_is_released() -> None:
    assert plan(NEWEST, {"a": runs()}) == Plan(["a"], f"{NEW} is newer than {OLD}")


def test_what_runs_already_is_left_alone() -> None:
    assert plan(NEWEST, {"a": runs(NEW, "sha256:2")}) == Plan([], f"{NEW} runs already")


def test_only_hosts_that_are_behind() -> None:
    assert plan(NEWEST, {"b": runs(), "a": runs(NEW, "sha256:2")}).hosts == ["b"]


def test_a_tag_that_was_pushed_again() -> None:
    assert plan(NEWEST, {"a": runs(NEW, "sha256:1")}) == Plan(["a"], f"{NEW} was pushed again")


def test_a_tag_outside_of_the_rule_that_nobody_deployed_gives_way() -> None:
    assert plan(NEWEST, {"a": runs("hotfix-1")}).hosts == ["a"]


@pytest.mark.parametrize("tag", ["hotfix-1", "hotfix-20260101-0001"])
def test_a_hotfix_that_somebody_deployed_stays(tag: str) -> None:
    made = plan(NEWEST, {"a": runs(tag, intent="deploy", by="bob")})
    assert (made.hosts, made.why) == ([], f"{tag} runs on a, which bob deployed and no rule compares with {NEW}")


def test_what_was_deployed_by_hand_gives_way_to_what_is_newer() -> None:
    assert plan(NEWEST, {"a": runs(intent="deploy", by="bob")}).hosts == ["a"]


FAILED = [{"tag": NEW, "at": "then", "reason": "bake"}]


@pytest.mark.parametrize(
    ("found", "held", "why"),
    [
        pytest.param({}, "", "never released", id="no-host"),
        pytest.param({"a": []}, "", "never released", id="nothing-there"),
        pytest.param({"a": runs(release="")}, "", "never released", id="a-first-release-that-failed"),
        pytest.param({"a": runs()}, "dev-1", "holds it at dev-1", id="the-inventory-holds-it"),
        pytest.param({"a": runs(), "b": runs(pinned="by bob")}, "", "pinned on b: by bob", id="pinned-on-one-host"),
        pytest.param({"a": runs(under_way="alice since then")}, "", "under way on a: alice since then", id="somebody-works"),
        pytest.param({"a": runs("dev-20260103-0001")}, "", "dev-20260103-0001 runs already", id="runs-newer"),
        pytest.param({"a": runs(), "b": runs(failed=FAILED)}, "", "failed on b before (then, [bake])", id="failed-on-one-host"),
    ],
)  # fmt: skip
def test_what_is_left_to_people(found: dict[str, Any], held: str, why: str) -> None:
    made = plan(NEWEST, found, held)
    assert made.hosts == []
    assert why in made.why


def test_a_failure_with_other_settings_does_not_matter_to_what_runs() -> None:
    assert plan(NEWEST, {"a": runs(NEW, "sha256:2", failed=FAILED)}).why == f"{NEW} runs already"


def test_another_tag_that_failed_holds_nothing_up() -> None:
    assert plan(NEWEST, {"a": runs(failed=[{**FAILED[0], "tag": OLD}])}).hosts == ["a"]


def test_an_interrupted_release_is_put_in_order_by_the_next() -> None:
    assert plan(NEWEST, {"a": runs(under_way="interrupted: release of x")}).hosts == ["a"]
