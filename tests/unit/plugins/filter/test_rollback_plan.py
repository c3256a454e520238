"""A rollback sends all hosts to one image, or none anywhere."""

from __future__ import annotations

from typing import Any

import pytest

from ansible_collections.nemo.platform.plugins.filter.rollback_plan import rollback_plan

A, B, C = ({"tag": f"prod-2026010{day}-0001", "digest": f"sha256:{day}"} for day in (1, 2, 3))


def runs(host: str, current: dict[str, str], *kept: dict[str, Any], **more: Any) -> list[dict[str, Any]]:
    """What a host says; the ids of its releases are its own."""
    entries = [{"left": False, **entry, "release": f"{host} {entry['tag']}"} for entry in kept]
    return [
        {
            **current, "release": f"{host} {current['tag']}", "kept": entries, "under_way": "",
            "history": [{"result": "ok"}, {"result": "failed"}], **more,
        }
    ]  # fmt: skip


def test_the_release_before_by_the_id_that_each_host_has_for_it() -> None:
    plan = rollback_plan({"one": runs("one", C, {**B, "left": True}, A), "two": runs("two", C, A, B)})
    assert plan == {"problem": "", "releases": {"one": f"one {A['tag']}", "two": f"two {A['tag']}"}}


FAILED = {"history": [{"result": "failed", "kind": "release", "tag": "prod-x", "at": "then", "reason": "no_space"}]}


@pytest.mark.parametrize(
    ("found", "text"),
    [
        pytest.param(
            {"one": runs("one", B, A), "two": runs("two", A, C)},
            f"do not run one release: {B['tag']} (sha256:2) on one, {A['tag']} (sha256:1) on two", id="split",
        ),
        pytest.param(
            {"one": runs("one", B, A), "two": runs("two", {**B, "digest": "sha256:9"}, A)}, "(sha256:9) on two",
            id="pushed-again",
        ),
        pytest.param({"one": runs("one", B, A), "two": []}, "nothing on two", id="never-released"),
        pytest.param(
            {"one": runs("one", B, A, **FAILED), "two": runs("two", B, A)},
            f"the last release on one, of prod-x, failed at then [no_space]: {B['tag']} serves",
            id="failed-on-one",
        ),
        pytest.param(
            {"one": runs("one", C, B), "two": runs("two", C, A)}, f"go back to: {B['tag']} (sha256:2) on one, {A['tag']}",
            id="other-past",
        ),
        pytest.param({"one": runs("one", C, B), "two": runs("two", C)}, "nothing on two", id="no-past"),
        pytest.param({"one": runs("one", C, B, under_way="bob since then")}, "under way on one: bob", id="somebody-works"),
    ],
)  # fmt: skip
def test_what_is_refused_without_a_name(found: dict[str, Any], text: str) -> None:
    problem = rollback_plan(found)["problem"]
    assert text in problem
    assert "; to go back all the same, name" in problem or problem.endswith("deploy one: playbooks/deploy.yml")


def test_what_there_is_to_name_is_on_all_hosts_is_good_and_is_a_move() -> None:
    one = runs("one", C, {**B, "left": True}, A, **FAILED)
    problem = rollback_plan({"one": one, "two": runs("two", C, A, B)})["problem"]
    assert problem.endswith(f"; to go back all the same, name what all of them get: -e release=sha256:1 ({A['tag']})")
    problem = rollback_plan({"one": runs("one", B, A), "two": runs("two", A, B)})["problem"]
    assert problem.endswith(f" -e release=sha256:2 ({B['tag']}) or -e release=sha256:1 ({A['tag']})")
    problem = rollback_plan({"one": runs("one", C, A), "two": runs("two", C, B)})["problem"]
    assert problem.endswith("; they have no other release in common, so deploy one: playbooks/deploy.yml")


def test_with_a_name_hosts_that_differ_get_the_same() -> None:
    found = {"one": runs("one", C, B, A, **FAILED), "two": runs("two", B, A)}
    for name in (A["tag"], A["digest"]):
        assert rollback_plan(found, name) == {"problem": "", "releases": dict.fromkeys(found, name)}


def test_the_id_of_one_host_is_its_image_on_the_others() -> None:
    plan = rollback_plan({"one": runs("one", C, A), "two": runs("two", B, A)}, f"one {A['tag']}")
    assert plan == {"problem": "", "releases": {"one": f"one {A['tag']}", "two": "sha256:1"}}


def test_a_host_that_runs_what_is_named_keeps_it_where_others_do_not() -> None:
    found = {"one": runs("one", C, A), "two": runs("two", A, {**A, "left": False})}
    assert rollback_plan(found, "sha256:1")["releases"] == {"one": "sha256:1", "two": f"two {A['tag']}"}
    found["one"] = runs("one", A, A)
    assert rollback_plan(found, "sha256:1")["releases"] == dict.fromkeys(found, "sha256:1")


def test_the_id_of_what_serves_is_the_image_that_all_who_run_it_keep() -> None:
    older = {**A, "tag": "older settings"}
    found = {"one": runs("one", A, older), "two": runs("two", A, older), "three": runs("three", B, A)}
    want = {"problem": "", "releases": {"one": f"one {A['tag']}", "two": f"two {A['tag']}", "three": "sha256:1"}}
    assert rollback_plan(found, f"one {A['tag']}") == want
    del found["three"]
    assert rollback_plan(found, f"two {A['tag']}")["releases"] == {host: f"{host} {A['tag']}" for host in found}


def test_the_id_of_an_older_release_says_nothing_where_a_host_has_several_of_its_image() -> None:
    again = {**A, "tag": "again"}
    found = {"one": runs("one", B, A), "two": runs("two", B, A, again), "three": runs("three", B, A)}
    problem = rollback_plan(found, f"one {A['tag']}")["problem"]
    assert f"of which there are two {A['tag']} or two again on two; name one for each host" in problem
    assert rollback_plan({"two": found["two"]}, "two again") == {"problem": "", "releases": {"two": "two again"}}


KILLED = {"under_way": "interrupted: release of prod-y by bob", "begun": "release"}


def test_a_killed_release_is_gone_back_from_to_the_one_that_it_was_to_replace() -> None:
    found = {"one": runs("one", B, A, **KILLED), "two": runs("two", B, A, **FAILED), "three": runs("three", B)}
    plan = {"problem": "", "releases": {host: f"{host} {B['tag']}" for host in found}}
    assert rollback_plan(found) == plan
    found["two"] = runs("two", A, **KILLED)
    assert "do not run one release" in rollback_plan(found)["problem"]


@pytest.mark.parametrize("begun", [pytest.param("rollback", id="it-goes-on"), pytest.param("", id="it-was-committed")])
def test_other_killed_runs_do_not_change_where_a_rollback_goes(begun: str) -> None:
    found = {"one": runs("one", B, A, **{**KILLED, "begun": begun})}
    assert rollback_plan(found) == {"problem": "", "releases": {"one": f"one {A['tag']}"}}


def test_a_rollback_that_was_killed_as_it_cleared_away_goes_no_further() -> None:
    found = {host: runs(host, B, A, **{**KILLED, "begun": "rolled_back"}) for host in ("one", "two")}
    assert rollback_plan(found) == {"problem": "", "releases": {host: f"{host} {B['tag']}" for host in found}}


def test_a_name_that_not_all_hosts_have_or_that_is_not_one_image() -> None:
    problem = rollback_plan({"one": runs("one", C, A), "two": runs("two", C, B)}, A["tag"])["problem"]
    assert problem == f"release {A['tag']} is not on all of its hosts; kept are: {B['tag']} (sha256:2) on two"
    again = {**A, "digest": "sha256:9"}
    problem = rollback_plan({"one": runs("one", C, A), "two": runs("two", C, again)}, A["tag"])["problem"]
    assert problem.endswith("is more than one image; name its digest: sha256:1, sha256:9")


def test_the_release_that_a_killed_run_began_can_be_named() -> None:
    found = {"one": runs("one", B, A, under_way="interrupted: release of prod-y by bob")}
    assert rollback_plan(found, "prod-y")["problem"] == ""


def test_a_host_without_a_release_before_is_left_to_the_module() -> None:
    assert rollback_plan({"one": runs("one", A)}) == {"problem": "", "releases": {"one": ""}}
