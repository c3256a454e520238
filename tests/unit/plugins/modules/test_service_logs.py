"""Reading the logs of containers and units, turn after turn, and how the turns of several hosts become one log."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ansible_collections.nemo.platform.plugins.action.service_logs import PATIENCE, PATIENCE_AT_FIRST, Spool
from ansible_collections.nemo.platform.plugins.modules import service_logs as module

NOW = 1795348800.0  # 2026-11-22T12:00Z


class Host:
    """Programs that answer from a list of lines, and what they were asked."""

    def __init__(self, **said: list[str] | str) -> None:
        self.said = {"systemctl": ["LoadState=loaded\n"], "ps": [], **said}
        self.asked: list[list[str]] = []

    def run(self, argv: list[str]) -> Iterator[str]:
        if argv[1] != "ps":
            self.asked.append(argv)
        said = self.said["ps" if argv[1] == "ps" else argv[0]]
        if isinstance(said, str):
            raise module.LogError(said)
        yield from said


def parameters(**changes: Any) -> dict[str, Any]:
    return {name: spec["default"] for name, spec in module.ARGUMENTS.items()} | changes


def test_a_container_from_turn_to_turn() -> None:
    host = Host(docker=["2026-11-22T11:59:00.000000002Z b\n", "2026-11-22T11:59:00.000000001Z a\n"])
    first = module.read(parameters(containers=["ai"]), NOW, host.run)
    assert [text for _moment, _source, text in first["lines"]] == ["a", "b"]
    assert host.asked[0] == ["docker", "logs", "--timestamps", "--since", "1795348200.000000000", "--tail", "200", "ai"]
    host.said["docker"] = [*host.said["docker"], "2026-11-22T11:59:30Z c\n"]
    second = module.read(parameters(containers=["ai"], cursors=first["cursors"]), NOW, host.run)
    assert [text for _moment, _source, text in second["lines"]] == ["c"]
    assert host.asked[1] == ["docker", "logs", "--timestamps", "--since", "1795348740.000000002", "ai"]


def test_a_service_is_all_its_releases(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(ps=["ai.r1\n", "ai.r2\n", "ai.r3\n"])

    def run(argv: list[str]) -> Iterator[str]:
        if argv[1] == "ps":
            assert "label=nemo.service=ai" in argv
            yield from host.run(argv)
        elif argv[-1] == "ai.r3":
            raise module.LogError("Error: No such container: ai.r3")
        else:
            yield f"2026-11-22T11:59:0{argv[-1][-1]}Z from {argv[-1]}\n"

    found = module.read(parameters(containers=["ai"]), NOW, run)
    assert [line[1:] for line in found["lines"]] == [["ai", "from ai.r1"], ["ai", "from ai.r2"]]
    assert set(found["cursors"]) == {"ai.r1", "ai.r2"}
    assert found["problems"] == []


def test_a_container_that_said_nothing_is_read_from_then_on() -> None:
    host = Host(docker=[])
    first = module.read(parameters(containers=["ai"], since="1m"), NOW, host.run)
    module.read(parameters(containers=["ai"], since="1m", cursors=first["cursors"]), NOW + 300, host.run)
    assert host.asked[1][4] == "1795348740.000000000"


def test_the_last_lines_that_match() -> None:
    host = Host(
        docker=[f"2026-11-22T11:59:0{number}Z {'error' if number % 2 else 'fine'} {number}\n" for number in range(8)]
    )
    found = module.read(parameters(containers=["ai"], grep="^err", lines=2), NOW, host.run)
    assert [text for _moment, _source, text in found["lines"]] == ["error 5", "error 7"]
    assert "--tail" not in host.asked[0], "the last lines are counted among those that match"


def test_a_container_that_is_not_there_is_a_problem_and_no_end_of_the_others() -> None:
    host = Host(docker="Error: No such container: ai")
    found = module.read(parameters(containers=["ai"]), NOW, host.run)
    assert found["problems"] == ["ai: Error: No such container: ai"]
    cursors = {"ai": {"moment": "1", "count": 1}}
    assert module.read(parameters(containers=["ai"], cursors=cursors), NOW, host.run)["cursors"] == cursors


def entry(seconds: float, message: str, cursor: str) -> str:
    return json.dumps(
        {
            "__REALTIME_TIMESTAMP": str(int(seconds * 10**6)),
            "MESSAGE": message,
            "SYSLOG_IDENTIFIER": "dockerd",
            "__CURSOR": cursor,
        }
    )


def test_a_unit_from_turn_to_turn() -> None:
    host = Host(journalctl=[entry(NOW - 1, "one", "s=1"), entry(NOW, "two", "s=2")])
    first = module.read(parameters(unit="docker", lines=1), NOW, host.run)
    assert [text for _moment, _source, text in first["lines"]] == ["two"]
    assert "--since=@1795348200" in host.asked[-1]
    host.said["journalctl"] = []
    module.read(parameters(unit="docker", cursors=first["cursors"]), NOW, host.run)
    assert "--after-cursor=s=2" in host.asked[-1]


def test_a_unit_that_is_not_there() -> None:
    host = Host(systemctl=["LoadState=not-found\n"], journalctl=[])
    found = module.read(parameters(unit="docker"), NOW, host.run)
    assert (found["absent"], found["problems"], found["lines"]) == (True, [], [])


def test_waiting_ends_with_the_first_line(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(docker=[])

    def sleep(_seconds: float) -> None:
        host.said["docker"] = [time.strftime("%Y-%m-%dT%H:%M:%SZ now\n", time.gmtime())]

    monkeypatch.setattr(module.time, "sleep", sleep)
    found = module.read_new(parameters(containers=["ai"], wait=30.0), host.run)
    assert [text for _moment, _source, text in found["lines"]] == ["now"]
    assert len(host.asked) == 2


def test_output_of_a_program_and_of_one_that_fails() -> None:
    assert list(module.output(["printf", "a\\rb\\nc"])) == ["a\rb\n", "c"]
    with pytest.raises(module.LogError, match=r"^no such thing$"):
        list(module.output(["sh", "-c", "echo no such thing >&2; exit 1"]))
    with pytest.raises(module.LogError, match="no-such-program: no such file"):
        list(module.output(["no-such-program"]))


class Screen:
    """What was printed."""

    def __init__(self, folder: Path, *hosts: str) -> None:
        self.lines: list[str] = []
        self.spool = Spool(folder / "spool", hosts, lambda host, line: self.lines.append(f"{host}:{line.text}"))

    def put(self, host: str, now: float, *entries: tuple[float, str], until: float | None = None) -> float:
        lines = [[str(int(moment * 10**9)), "ai", text] for moment, text in entries]
        return self.spool.put(host, lines, now if until is None else until, now)


def test_a_line_waits_for_older_ones_of_other_hosts(tmp_path: Path) -> None:
    screen = Screen(tmp_path, "a", "b")
    assert screen.put("a", 100.0, (99.5, "late")) == pytest.approx(PATIENCE_AT_FIRST)
    assert screen.lines == []
    screen.put("b", 100.2, (99.0, "early"))
    assert screen.lines == ["b:early", "a:late"]


def test_no_host_is_waited_for_beyond_all_patience(tmp_path: Path) -> None:
    screen = Screen(tmp_path, "a", "b")
    screen.put("a", 100.0)
    screen.put("b", 100.0)
    again = screen.put("a", 105.0, (104.9, "one"), until=105.0)
    assert again == pytest.approx(PATIENCE)
    assert screen.lines == []
    assert screen.put("a", 105.0 + again) == 0
    assert screen.lines == ["a:one"]


def test_a_host_that_has_ended_is_not_waited_for(tmp_path: Path) -> None:
    screen = Screen(tmp_path, "a", "b")
    screen.put("b", 100.0, until=float("inf"))
    assert screen.put("a", 101.0, (100.5, "one"), until=101.0) == 0
    assert screen.lines == ["a:one"]
