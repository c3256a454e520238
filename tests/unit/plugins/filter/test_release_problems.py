"""nemo.platform.release_problems: what is wrong with services, before any host is asked."""

from __future__ import annotations

from typing import Any

import pytest

from ansible_collections.nemo.platform.plugins.filter.release_problems import release_problems

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
        ({"health_path": "x"}, "services['ai-prod'].health_path is 'x'; allowed: a path that begins with /"),
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
            {"digest": "sha256:" + "a" * 64},
            "services['ai-prod'].digest is set without tag; allowed: both, or tag alone",
        ),
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
