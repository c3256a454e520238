# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Lines of logs: when each was written, which of them are new, and many logs merged by time.

Standard library only and Python 3.9 syntax, because this runs on managed hosts. A moment is nanoseconds since 1970, as text in
results, so that no reader of JSON rounds it.
"""

from __future__ import annotations

import calendar
import datetime
import json
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

SINCE = "a time such as 90s, 10m, 2h or 1d, or a moment such as 2026-11-22T13:00 (UTC)"
_DURATION = re.compile(r"(\d+)([smhd])")
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_STAMP = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?(Z|[+-]\d\d:\d\d) ?(.*)", re.DOTALL)
# What a terminal would act on: escape sequences as a whole, then every other control character but the tab.
_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-Z\\-_])")
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


class Line(NamedTuple):
    """One line: when, which service or unit on its host, and what it says."""

    moment: int
    source: str
    text: str


class Cursor(NamedTuple):
    """Up to where a log was read: the moment of the last line, and how many lines of that very moment."""

    moment: int
    lines: int


def clean(text: str) -> str:
    """A line that cannot move the cursor of who reads it, or colour what is not its own."""
    return _CONTROLS.sub("\ufffd", _ESCAPES.sub("", text.rstrip("\r\n")))


def parse_since(text: str, now: float) -> float:
    """The moment that is meant, in seconds since 1970; ValueError where it is none."""
    match = _DURATION.fullmatch(text.strip())
    if match:
        return now - int(match[1]) * _UNITS[match[2]]
    moment = datetime.datetime.fromisoformat(re.sub(r"Z$", "+00:00", text.strip()))
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=datetime.timezone.utc)
    return moment.timestamp()


def docker_line(raw: str, source: str) -> Line | None:
    """A line of `docker logs --timestamps`; None for one without a time, which is the client's own."""
    match = _STAMP.match(raw)
    if not match:
        return None
    seconds = calendar.timegm(time.strptime(match[1], "%Y-%m-%dT%H:%M:%S"))
    if match[3] != "Z":
        hours, minutes = int(match[3][1:3]), int(match[3][4:6])
        seconds -= (1 if match[3][0] == "+" else -1) * (hours * 3600 + minutes * 60)
    return Line(seconds * 1_000_000_000 + int((match[2] or "").ljust(9, "0")), source, clean(match[4]))


def journal_lines(raw: str) -> tuple[list[Line], str]:
    """The lines of one entry of `journalctl --output=json`, and its cursor."""
    entry = json.loads(raw)
    message = entry.get("MESSAGE") or ""
    if isinstance(message, list):  # journalctl writes what is no UTF-8 as numbers
        message = bytes(message).decode("utf-8", "replace")
    moment = int(entry["__REALTIME_TIMESTAMP"]) * 1000
    source = str(entry.get("SYSLOG_IDENTIFIER") or entry.get("_COMM") or "")
    return [Line(moment, source, clean(part)) for part in str(message).split("\n")], str(entry.get("__CURSOR", ""))


def fresh(lines: Iterable[Line], cursor: Cursor | None) -> tuple[list[Line], Cursor | None]:
    """Those that were not read before, by time, and the new cursor. The engine gives lines of the cursor's moment again."""
    ordered = sorted(lines, key=lambda line: line.moment)
    if cursor:
        repeated = [line for line in ordered if line.moment == cursor.moment][cursor.lines :]
        ordered = repeated + [line for line in ordered if line.moment > cursor.moment]
    if not ordered:
        return [], cursor
    last = ordered[-1].moment
    count = sum(1 for line in ordered if line.moment == last)
    if cursor and last == cursor.moment:
        count += cursor.lines
    return ordered, Cursor(last, count)


def merge(logs: Mapping[str, Sequence[Sequence[Any]]]) -> list[tuple[str, Line]]:
    """All lines of all hosts by time; lines of one moment stay in the order of their hosts and logs."""
    lines = [(host, Line(int(moment), source, text)) for host in sorted(logs) for moment, source, text in logs[host]]
    return sorted(lines, key=lambda entry: entry[1].moment)


def moment_text(moment: int) -> str:
    """2026-11-22T13:35:01.123Z"""
    seconds, rest = divmod(moment, 1_000_000_000)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + ".%03dZ" % (rest // 1_000_000)


def line_text(host: str, line: Line, width: int) -> str:
    """One line as it is shown: when, where, what."""
    return f"{moment_text(line.moment)} {host:<{width}} {line.source + ': ' if line.source else ''}{line.text}"
