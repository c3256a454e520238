"""Lines of logs: their time, which are new, and how many logs become one."""

from __future__ import annotations

import json

import pytest

from ansible_collections.nemo.platform.plugins.module_utils import service_logs as logs
from ansible_collections.nemo.platform.plugins.module_utils.service_logs import Cursor, Line

NOON = 1795348800  # 2026-11-22T12:00Z


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90s", NOON - 90),
        ("10m", NOON - 600),
        ("2h", NOON - 7200),
        ("1d", NOON - 86400),
        ("2026-11-22T11:00", NOON - 3600),
        ("2026-11-22T12:00:30Z", NOON + 30),
        ("2026-11-22T21:00+09:00", NOON),
    ],
)
def test_since(text: str, seconds: float) -> None:
    assert logs.parse_since(text, NOON) == seconds


@pytest.mark.parametrize("text", ["", "10", "10 m", "-10m", "yesterday", "10m; reboot"])
def test_since_that_is_none(text: str) -> None:
    with pytest.raises(ValueError, match=r".*"):
        logs.parse_since(text, NOON)


@pytest.mark.parametrize(
    ("raw", "moment"),
    [
        ("2026-11-22T12:00:00Z x\n", NOON * 10**9),
        ("2026-11-22T12:00:00.5Z x\n", NOON * 10**9 + 500_000_000),
        ("2026-11-22T12:00:00.000000001Z x\n", NOON * 10**9 + 1),
        ("2026-11-22T21:30:00.000000001+09:30 x\n", NOON * 10**9 + 1),
        ("2026-11-22T08:00:00-04:00 x\n", NOON * 10**9),
    ],
)
def test_time_of_a_container_line(raw: str, moment: int) -> None:
    assert logs.docker_line(raw, "ai") == Line(moment, "ai", "x")


def test_container_lines_without_a_time_are_the_clients_own() -> None:
    assert logs.docker_line("Error response from daemon: No such container: ai\n", "ai") is None
    empty = logs.docker_line("2026-11-22T12:00:00Z \n", "ai")
    assert empty == Line(NOON * 10**9, "ai", "")


def test_a_line_cannot_move_the_cursor_or_colour_what_is_not_its_own() -> None:
    assert logs.clean("a\x1b[31mred\x1b[0m\x1b]0;title\x07\tb\r\n") == "ared\tb"
    assert logs.clean("50%\r100%\x00\u202e") == "50%\ufffd100%\ufffd\ufffd"


def test_journal_entries() -> None:
    entry = {
        "MESSAGE": "one\ntwo",
        "__REALTIME_TIMESTAMP": "1795348800000001",
        "SYSLOG_IDENTIFIER": "dockerd",
        "__CURSOR": "s=1",
    }
    lines, cursor = logs.journal_lines(json.dumps(entry))
    assert [line.text for line in lines] == ["one", "two"]
    assert lines[0].moment == NOON * 10**9 + 1000
    assert (lines[0].source, cursor) == ("dockerd", "s=1")
    lines, _cursor = logs.journal_lines(json.dumps({**entry, "MESSAGE": [104, 105, 255]}))
    assert lines[0].text == "hi\ufffd"


def line(moment: int, text: str) -> Line:
    return Line(moment, "ai", text)


def test_nothing_is_read_twice_and_nothing_is_lost() -> None:
    first, cursor = logs.fresh([line(2, "b"), line(1, "a")], None)
    assert ([entry.text for entry in first], cursor) == (["a", "b"], Cursor(2, 1))
    # The engine gives the lines of the cursor's moment again, and one more of that very moment.
    second, cursor = logs.fresh([line(2, "b"), line(2, "c"), line(3, "d")], cursor)
    assert ([entry.text for entry in second], cursor) == (["c", "d"], Cursor(3, 1))
    assert logs.fresh([line(3, "d")], cursor) == ([], cursor)
    third, cursor = logs.fresh([line(3, "d"), line(3, "e")], cursor)
    assert ([entry.text for entry in third], cursor) == (["e"], Cursor(3, 2))


def test_many_logs_become_one_by_time() -> None:
    merged = logs.merge(
        {"b": [["2", "ai", "two"], ["9", "ai", "nine"]], "a": [["10", "ai", "ten"], ["2", "ai", "zwei"]]}
    )
    assert [(host, entry.text) for host, entry in merged] == [("a", "zwei"), ("b", "two"), ("b", "nine"), ("a", "ten")]


def test_a_line_as_it_is_shown() -> None:
    shown = logs.line_text("ai-dev", Line(NOON * 10**9 + 123_999_999, "ai", "hello"), 8)
    assert shown == "2026-11-22T12:00:00.123Z ai-dev   ai: hello"
