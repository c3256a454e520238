#!/usr/bin/python
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Module: what services of a host wrote to their logs, from where it was read last."""

from __future__ import annotations

DOCUMENTATION = r"""
module: service_logs
short_description: What services of a host wrote to their logs
version_added: "0.1.0"
author: The nemo platform project (@nemo-platform)
description:
  - Reads the logs of services or containers (C(docker logs)) or of one systemd unit (C(journalctl)), since a time or a cursor.
  - With O(follow), an action plugin of the same name asks again and again, merges the lines of all hosts of the play by time,
    and prints them while it runs. Each turn is one remote execution on each host.
  - Control characters and escape sequences are taken out of every line.
options:
  containers:
    description:
      - Names of services of M(nemo.platform.container_release), or of containers. One of this and O(unit) is needed.
      - The log of a service is that of all releases of it which are on the host, so that it does not begin anew with a release.
    type: list
    elements: str
    default: []
  unit:
    description: A systemd unit.
    type: str
    default: ""
  since:
    description: A time such as V(90s), V(10m), V(2h) or V(1d), or a moment such as V(2026-11-22T13:00), UTC unless it says otherwise.
    type: str
    default: 10m
  lines:
    description: The last so many lines of each log, after O(grep); V(0) for all.
    type: int
    default: 200
  grep:
    description: Only lines in which this regular expression is found.
    type: str
    default: ""
  follow:
    description: Whether to go on reading and to print what comes.
    type: bool
    default: false
  follow_for:
    description: Seconds after which following ends by itself.
    type: int
    default: 600
  wait:
    description: Seconds to wait on the host for a first line; with O(follow), how long a turn without one takes.
    type: float
    default: 0
  interval:
    description: Seconds between two looks at the logs while waiting.
    type: float
    default: 0.5
  cursors:
    description: Where to go on, as RV(cursors) of the turn before.
    type: dict
    default: {}
attributes:
  check_mode:
    description: Nothing is changed in any mode.
    support: full
  diff_mode:
    description: There is nothing to show.
    support: none
notes:
  - Needs root by C(become), or a user who may read the journal and talk to the Docker Engine.
"""

EXAMPLES = r"""
- name: What the API said in the last hour about timeouts
  nemo.platform.service_logs:
    containers: [ai-prod]
    since: 1h
    grep: (?i)timeout
  become: true
  register: log

- name: What the Docker Engine says from now on, for a minute
  nemo.platform.service_logs:
    unit: docker
    follow: true
    follow_for: 60
  become: true
"""

RETURN = r"""
lines:
  description: Lines by time. Each is the moment in nanoseconds since 1970 as text, the container or program, and the text.
  returned: success, without O(follow)
  type: list
  elements: list
  sample: [["1795354522124717000", "ai-prod", "Application startup complete."]]
problems:
  description: Logs that could not be read, one sentence each.
  returned: success
  type: list
  elements: str
absent:
  description: Whether this host does not have O(unit).
  returned: success
  type: bool
cursors:
  description: Where to go on, for O(cursors).
  returned: success, without O(follow)
  type: dict
"""

import collections
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.nemo.platform.plugins.module_utils import service_logs
from ansible_collections.nemo.platform.plugins.module_utils.service_logs import Cursor, Line

ARGUMENTS: dict[str, dict[str, Any]] = {
    "containers": {"type": "list", "elements": "str", "default": []},
    "unit": {"type": "str", "default": ""},
    "since": {"type": "str", "default": "10m"},
    "lines": {"type": "int", "default": 200},
    "grep": {"type": "str", "default": ""},
    "follow": {"type": "bool", "default": False},
    "follow_for": {"type": "int", "default": 600},
    "wait": {"type": "float", "default": 0.0},
    "interval": {"type": "float", "default": 0.5},
    "cursors": {"type": "dict", "default": {}},
}
Output = Callable[[list[str]], Iterator[str]]


class LogError(Exception):
    """Why a log cannot be read, in one sentence."""


def output(argv: list[str]) -> Iterator[str]:
    """The lines of a program, while it writes them; a LogError with its own words when it fails."""
    environment = {**os.environ, "LC_ALL": "C.UTF-8", "TZ": "UTC"}
    last = collections.deque(maxlen=3)  # type: collections.deque[str]
    try:
        # As bytes: a line of text would end at a carriage return, too.
        process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment
        )
    except OSError as error:
        raise LogError(f"{argv[0]}: {(error.strerror or str(error)).lower()}") from error
    assert process.stdout is not None
    with process:
        for raw in process.stdout:
            line = raw.decode("utf-8", "replace")
            last.append(line)
            yield line
    if process.returncode:
        raise LogError(" ".join(" ".join(last).split()) or f"{argv[0]} ended with status {process.returncode}")


def limited(lines: Iterable[Line], limit: int, pattern: str) -> list[Line]:
    """The last lines that match."""
    found = re.compile(pattern).search if pattern else lambda text: True
    return list(collections.deque((line for line in lines if found(line.text)), maxlen=limit or None))


def members(name: str, run: Output = output) -> list[str]:
    """The containers of a service; where it has none, the container of that name is meant."""
    argv = ["docker", "ps", "--all", "--filter", f"label=nemo.service={name}", "--format", "{{.Names}}"]
    return sorted(line.strip() for line in run(argv) if line.strip()) or [name]


def read_container(
    name: str, source: str, params: dict[str, Any], cursor: dict[str, Any] | None, now: float, run: Output = output
) -> tuple[list[Line], dict[str, Any]]:
    """What a container wrote, in the name of its service."""
    known = Cursor(int(cursor["moment"]), int(cursor["count"])) if cursor else None
    start = known.moment if known else int(service_logs.parse_since(params["since"], now) * 1_000_000_000)
    argv = ["docker", "logs", "--timestamps", "--since", "%d.%09d" % divmod(start, 1_000_000_000)]
    if not known and params["lines"] and not params["grep"]:
        argv += ["--tail", str(params["lines"])]
    parsed = (service_logs.docker_line(raw, source) for raw in run([*argv, name]))
    lines, after = service_logs.fresh([line for line in parsed if line], known)
    after = after or Cursor(start, 0)
    # The cursor is that of all lines: those that do not match were read, too.
    return limited(lines, 0 if known else params["lines"], params["grep"]), {
        "moment": str(after.moment),
        "count": after.lines,
    }


def read_unit(
    name: str, params: dict[str, Any], cursor: dict[str, Any] | None, now: float, run: Output = output
) -> tuple[list[Line], dict[str, Any]]:
    """What a unit wrote to the journal."""
    argv = ["journalctl", "--no-pager", "--quiet", "--output=json", f"--unit={name}"]
    after = str((cursor or {}).get("journal") or "")
    since = float((cursor or {}).get("since") or service_logs.parse_since(params["since"], now))
    argv += [f"--after-cursor={after}"] if after else [f"--since=@{since:.0f}"]
    # Without --lines: together with --since it means the first ones on some releases of systemd.
    lines = []
    for raw in run(argv):
        if raw.startswith("{"):
            parts, after = service_logs.journal_lines(raw)
            lines += parts
    return limited(lines, 0 if cursor else params["lines"], params["grep"]), {"journal": after, "since": since}


def known_unit(name: str, run: Output = output) -> bool:
    """Whether this host has the unit."""
    return "".join(run(["systemctl", "show", "--property=LoadState", name])).strip() == "LoadState=loaded"


def read(params: dict[str, Any], now: float, run: Output = output) -> dict[str, Any]:
    """All logs that are asked for."""
    lines: list[Line] = []
    cursors: dict[str, Any] = {}
    problems, absent = [], False
    for service in params["containers"]:
        try:
            names = members(service, run)
        except LogError as error:
            problems.append(f"{service}: {error}")
            continue
        for name in names:
            try:
                found, cursors[name] = read_container(name, service, params, params["cursors"].get(name), now, run)
                lines += found
            except LogError as error:
                if name != service and "no such container" in str(error).lower():
                    continue  # a release that has just gone
                problems.append(f"{service}: {error}")
                if name in params["cursors"]:
                    cursors[name] = params["cursors"][name]
    if params["unit"]:
        name = params["unit"]
        try:
            absent = not params["cursors"] and not known_unit(name, run)
            if not absent:
                found, cursors[name] = read_unit(name, params, params["cursors"].get(name), now, run)
                lines += found
        except LogError as error:
            problems.append(f"{name}: {error}")
    ordered = sorted(lines, key=lambda line: line.moment)
    return {
        "lines": [[str(line.moment), line.source, line.text] for line in ordered],
        "problems": problems,
        "absent": absent,
        "cursors": cursors,
    }


def read_new(params: dict[str, Any], run: Output = output) -> dict[str, Any]:
    """All logs, as soon as there is something in one of them, or after the time to wait."""
    end = time.monotonic() + params["wait"]
    while True:
        result = read(params, time.time(), run)
        if result["lines"] or time.monotonic() >= end:
            return result
        # What does not match was read, too.
        params = {**params, "cursors": {**params["cursors"], **result["cursors"]}}
        time.sleep(params["interval"])


def main() -> None:
    """Run the module."""
    module = AnsibleModule(argument_spec=ARGUMENTS, supports_check_mode=True)
    params = module.params
    if bool(params["containers"]) == bool(params["unit"]):
        module.fail_json(msg="service_logs: allowed: either containers or unit")
    try:
        service_logs.parse_since(params["since"], time.time())
    except ValueError:
        module.fail_json(msg=f"service_logs: since is {params['since']!r}; allowed: {service_logs.SINCE}")
    try:
        re.compile(params["grep"])
    except re.error as error:
        module.fail_json(msg=f"service_logs: grep is {params['grep']!r}; allowed: a regular expression ({error})")
    module.exit_json(changed=False, **read_new(params))


if __name__ == "__main__":
    main()
