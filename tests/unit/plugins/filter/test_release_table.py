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
    lines = release_table([SERVICE], {"ai-prod": "prod-20260101-0001"})
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
    lines = release_table([service], {"ai-prod": "prod-20260102-0001"})
    assert lines[1:6] == [
        "  in the registry: prod-20260102-0001",
        "  pinned: rolled back from t",
        "  under way: bob since then",
        "  kept: t (r, served since ?, was left because it was bad)",
        "  failed: t at then by bob [bake]",
    ]
    assert lines[6:] == ["  then: rollback of t by bob: ok in 4.2 s"] * 5
