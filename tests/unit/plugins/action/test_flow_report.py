"""Where a report goes, and that nothing is tried from outside while no host of the platform has answered."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from ansible_collections.nemo.platform.plugins.action import flow_probe as probe_action
from ansible_collections.nemo.platform.plugins.action import flow_report


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name in ("galaxy.yml", "ansible.cfg"):
        (tmp_path / name).touch()
    (tmp_path / "playbooks").mkdir()
    return tmp_path


def test_a_checkout_keeps_its_report(checkout: Path) -> None:
    assert flow_report.default_directory(str(checkout / "playbooks"), Path("/home/me")) == checkout / "build/verify"


def test_what_is_not_ones_own_is_not_written_to(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    home = Path("/home/me/.ansible/nemo_platform/verify")
    assert flow_report.default_directory(str(checkout / "playbooks"), Path("/home/me")) == home
    assert flow_report.default_directory("/", Path("/home/me")) == home


def test_files_are_written_as_a_whole(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    for text in (b"one", b"two"):
        flow_report.write(folder, {"verify.json": text})
    assert [(path.name, path.read_bytes()) for path in folder.iterdir()] == [("verify.json", b"two")]
    assert (folder / "verify.json").stat().st_mode & 0o777 == 0o644


def collect(results: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any, list[Any]]:
    tried: list[Any] = []

    def probe_all(flows: Any, *_: Any) -> list[Any]:
        tried.extend(flows)
        return [{"id": one["id"], "outcome": "refused"} for one in flows]

    monkeypatch.setattr(flow_report.flow_probe, "probe_all", probe_all)
    flows = [{"source": "outside", "probe": {"id": "o"}}, {"source": "a", "probe": {"id": "i"}}]
    arguments = {"plan": {"flows": flows}, "results": results, "timeout": 1, "total_timeout": 1, "retries": 0}
    return (*flow_report.ActionModule._collect(arguments), tried)


def test_outside_is_tried_when_a_host_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {"a": {"results": [{"id": "i"}], "problem": ""}, "b": {"results": [], "problem": "no key"}}
    results, missing, tried = collect(answers, monkeypatch)
    assert set(results) == {"i", "o"}
    assert missing == {"b": "no key"}
    assert tried == [{"id": "o"}]


def test_outside_is_not_tried_where_no_host_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    results, missing, tried = collect({"a": {"results": [], "problem": "timed out"}}, monkeypatch)
    assert (results, tried) == ({}, [])
    assert set(missing) == {"a", "outside"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("ssh: connect to host 10.0.1.10 port 22: Connection timed out", "10.0.1.10 port 22 does not answer"),
        ("warning\n/bin/sh: /usr/bin/python3: not found\n", "/bin/sh: /usr/bin/python3: not found"),
        ("", "no reason was given"),
    ],
)
def test_reason_of_a_failed_login(text: str, says: str) -> None:
    assert probe_action.reason(text).startswith(says)
