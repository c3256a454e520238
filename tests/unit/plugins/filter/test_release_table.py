"""The lines of playbooks/releases.yml."""

from __future__ import annotations

from typing import Any

from ansible_collections.nemo.platform.plugins.filter.release_table import release_table

SERVICE: dict[str, Any] = {
    "name": "ai-prod", "port": 8000, "tag": "prod-20260101-0001", "digest": "sha256:" + "a" * 64, "health": "ok",
    "since": "2026-01-01T00:00:00Z", "by": "alice", "pinned": "", "under_way": "", "kept": [], "failed": [], "history": [],
}  # fmt: skip


def test_nothing() -> None:
    assert release_table([]) == ["no service has been released here"]


def test_what_is_newest_is_one_line() -> None:
    lines = release_table([SERVICE], {"ai-prod": {"tag": SERVICE["tag"], "digest": SERVICE["digest"]}})
    assert lines == [
        "ai-prod on port 8000: prod-20260101-0001 (sha256:aaaaaaaaaaaa), ok, since 2026-01-01T00:00:00Z by alice"
    ]


def test_all_there_is_to_say() -> None:
    entry = {"release": "r", "tag": "t", "since": "", "at": "then", "by": "bob", "reason": "bake", "left": True}
    past = {"at": "then", "kind": "rollback", "tag": "t", "by": "bob", "result": "ok", "seconds": 4.2}
    service = {
        **SERVICE, "pinned": "rolled back from t", "under_way": "bob since then", "kept": [entry], "failed": [entry],
        "history": [past] * 9,
    }  # fmt: skip
    newest = {"tag": "prod-20260102-0001", "digest": "sha256:b", "pushed_at": "now"}
    lines = release_table([service], {"ai-prod": newest}, {"ai-prod": {"text": "stopped"}, "other": {"text": "x"}})
    assert lines[1:7] == [
        "  in the registry: prod-20260102-0001, pushed at now",
        "  pinned: rolled back from t",
        "  follows the registry: stopped",
        "  under way: bob since then",
        "  kept: t (r, served since ?, was left because it was bad)",
        "  failed: t at then by bob [bake]",
    ]
    assert lines[7:] == ["  then: rollback of t by bob: ok in 4.2 s"] * 5


def test_a_hotfix_outside_the_rule_is_seen() -> None:
    newest = {"tag": "prod-20260102-0001", "digest": "sha256:b", "pushed_at": ""}
    lines = release_table([{**SERVICE, "tag": "hotfix-1"}], {"ai-prod": newest})
    assert lines[1:] == [
        "  outside its rule: hotfix-1 is no tag such as prod-20260102-0001",
        "  in the registry: prod-20260102-0001, pushed at ?",
    ]


def test_a_tag_that_was_pushed_again_is_seen() -> None:
    lines = release_table([SERVICE], {"ai-prod": {"tag": SERVICE["tag"], "digest": "sha256:" + "b" * 64}})
    assert lines[1:] == ["  in the registry: prod-20260101-0001 was pushed again (sha256:bbbbbbbbbbbb)"]
