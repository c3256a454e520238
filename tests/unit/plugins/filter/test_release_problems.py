"""nemo.platform.release_problems: what is wrong with services, before any host is asked."""

from __future__ import annotations

from typing import Any

import pytest

from ansible_collections.nemo.platform.plugins.filter.release_problems import release_problems
from ansible_collections.nemo.platform.plugins.modules.container_release import ARGUMENTS

GOOD: dict[str, Any] = {
    "name": "ai-prod",
    "port": 8000,
    "repository": "ai",
    "tag_prefix": "prod",
    "memory": "1g",
    "secrets": {"TOKEN": "hush-hush"},
}


def test_good_services_have_no_problem() -> None:
    other = {"name": "ai-dev", "port": "8001", "repository": "team/ai", "tag": "hotfix", "digest": "sha256:" + "a" * 64}
    assert release_problems([GOOD, other], "services") == []


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"port": 0}, "services['ai-prod'].port is 0; allowed: 1 to 65535"),
        ({"port": "http"}, "services['ai-prod'].port is 'http'; allowed: 1 to 65535"),
        ({"port": None}, "services['ai-prod'].port is None; allowed: 1 to 65535"),
        ({"memory": "32m"}, "services['ai-prod'].memory is '32m'; allowed: 64m or more"),
        ({"secrets": {"TOKEN": ""}}, "services['ai-prod'].secrets.TOKEN is empty; allowed: a value that is not empty"),
        (
            {"health_path": "x"},
            "services['ai-prod'].health_path is 'x'; allowed: a path that begins with /, without blanks, quotes and #",
        ),
        ({"health_timeout": "x"}, "services['ai-prod'].health_timeout is 'x'; allowed: a number"),
        (
            {"repository": "A I"},
            "services['ai-prod'].repository is 'A I'; allowed: the name of a repository, such as ai",
        ),
        (
            {"tag_prefix": "a b"},
            "services['ai-prod'].tag_prefix is 'a b'; allowed: the beginning of a tag, such as prod",
        ),
        ({"tag_prefix": None}, "services['ai-prod'] says no tag; allowed: one of tag_prefix, tag_pattern and tag"),
        (
            {"tag": "prod-20261399-1200", "digest": "sha256:" + "a" * 64},
            "services['ai-prod'].tag is 'prod-20261399-1200'; allowed: a tag by the rule prod-YYYYMMDD-HHMM, "
            "or any with tag_outside_rule: true",
        ),
        (
            {"tag_pattern": "("},
            "services['ai-prod']: tag_pattern '(' is no regular expression: "
            "missing ), unterminated subpattern at position 0",
        ),
        ({"name": None}, "services[0].name is missing; allowed: the name of the service"),
    ],
    ids=str,
)
def test_each_problem_is_named_with_value_and_what_is_allowed(values: dict[str, Any], text: str) -> None:
    found = release_problems([{**GOOD, **values}], "services")
    assert found == [text]
    assert "hush-hush" not in str(found)


@pytest.mark.parametrize(
    "values",
    [
        {"tag": "prod-20261122-1200"},
        {"tag": "hotfix", "tag_outside_rule": True},
        {"tag": "hotfix-7", "tag_pattern": "^hotfix-[0-9]+$"},
        {"tag": "hotfix", "tag_prefix": None},
    ],
    ids=str,
)
def test_pinned_tag_follows_the_rule_or_says_that_it_does_not(values: dict[str, Any]) -> None:
    assert release_problems([{**GOOD, **values}], "services") == []


def test_services_of_one_host_do_not_clash() -> None:
    assert release_problems([GOOD, {**GOOD, "name": "b"}], "services") == [
        "services['b'].port is 8000, as that of services['ai-prod']; allowed: a port of its own"
    ]
    assert release_problems([GOOD, {**GOOD, "port": 1}], "services") == [
        "services['ai-prod'] is there twice; allowed: each name once"
    ]


def test_no_service_is_a_problem() -> None:
    assert release_problems([], "services") == ["services is empty; allowed: one service or more"]


WRONG_TYPES: tuple[Any, ...] = (5, 1.5, True, "²", "text", ["a"], {"a": {"b": 1}}, {5: "a", "c": 1}, float("inf"))


@pytest.mark.parametrize("value", WRONG_TYPES, ids=repr)
@pytest.mark.parametrize("key", [*ARGUMENTS, "repository", "tag_prefix", "tag_pattern", "tag_outside_rule"])
def test_wrong_type_is_no_exception(key: str, value: Any) -> None:
    found = release_problems([{**GOOD, "environment": {"A": "b"}, key: value}], "services")
    assert all(line.startswith("services[") and "\n" not in line for line in found)


@pytest.mark.parametrize(
    ("services", "text"),
    [
        ([{**GOOD, "name": 5}], "services[0].name is 5; allowed: the name of the service"),
        (
            [{**GOOD, "repository": 5}],
            "services['ai-prod'].repository is 5; allowed: the name of a repository, such as ai",
        ),
        (
            [{**GOOD, "tag_prefix": 5}],
            "services['ai-prod'].tag_prefix is 5; allowed: the beginning of a tag, such as prod",
        ),
        ([{**GOOD, "tag": 1.1}], "services['ai-prod'].tag is 1.1; allowed: text, in quotes if it looks like a number"),
        ([{**GOOD, "port": "²"}], "services['ai-prod'].port is '²'; allowed: 1 to 65535"),
        ([{**GOOD, "port": True}], "services['ai-prod'].port is True; allowed: 1 to 65535"),
        ([{**GOOD, "pids_limit": "x"}], "services['ai-prod'].pids_limit is 'x'; allowed: a number"),
        (
            [{**GOOD, "environment": "text"}],
            "services['ai-prod'].environment is a str; allowed: names with their values",
        ),
        (
            [{**GOOD, "phases": "text"}],
            "services['ai-prod'].phases is a str; allowed: a list, each entry names with their values",
        ),
        ([{**GOOD, "proxy_keys": [5]}], "services['ai-prod'].proxy_keys[0] is a int; allowed: text"),
        ([{**GOOD, "secrets": "hush-hush"}], "services['ai-prod'].secrets is a str; allowed: names with their values"),
        (["text"], "services[0] is a str; allowed: the keys of one service"),
        ("text", "services is a str; allowed: a list of services"),
        (5, "services is a int; allowed: a list of services"),
    ],
    ids=str,
)
def test_wrong_type_is_one_line(services: Any, text: str) -> None:
    assert release_problems(services, "services") == [text]


@pytest.mark.parametrize("values", [{"memory": 1073741824}, {"user": 10001}, {"cpus": "0.5"}, {"cpus": 0}], ids=str)
def test_number_stands_for_text_where_that_is_usual(values: dict[str, Any]) -> None:
    assert release_problems([{**GOOD, **values}], "services") == []
