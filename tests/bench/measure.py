"""What one command costs: wall time, the machine's memory, and the commands that reach a host."""

from __future__ import annotations

import collections
import dataclasses
import os
import pathlib
import re
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

CHECKOUT = pathlib.Path(__file__).resolve().parents[2]
TASK = re.compile(r"^TASK \[(?:(?P<role>[\w.]+) : )?(?P<name>.*?)\] \*")
REMOTE = re.compile(r"^<(?P<host>[\d.]+)> SSH: EXEC ")
FIRST_OF_A_SERVICE = "TASK [nemo.platform.container_service : Validating"
# The AI servers' run, so loud that its commands can be counted; each of its hosts has one service.
AI_AGAIN = ["scripts/lab-env", "ansible-playbook", "-i", "inventories/lab", "nemo.platform.ai", "-vvv"]
CHANGED = re.compile(r"changed=(\d+)")


@dataclasses.dataclass
class Cost:
    """The measured cost of one command."""

    seconds: float
    memory_mib: float  # the machine's memory in use at the peak, above what was in use before
    output: str
    returncode: int
    seconds_by_role: dict[str, float] = dataclasses.field(default_factory=dict)
    tasks: list[tuple[str, float]] = dataclasses.field(default_factory=list)  # names as printed, and when each began

    @property
    def changed(self) -> int:
        return sum(int(number) for number in CHANGED.findall(self.output))


def memory_in_use() -> float:
    """MiB that are not available to new programs."""
    fields = dict(line.split(":") for line in pathlib.Path("/proc/meminfo").read_text().splitlines())
    return (int(fields["MemTotal"].split()[0]) - int(fields["MemAvailable"].split()[0])) / 1024


def cost(argv: Sequence[str], *, check: bool = True) -> Cost:
    """Run a command of the checkout and measure it."""
    before, peak, done = memory_in_use(), 0.0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.1):
            peak = max(peak, memory_in_use())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    start = time.monotonic()
    run = subprocess.Popen(
        list(argv), cwd=CHECKOUT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, stdin=subprocess.DEVNULL,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    limit = threading.Timer(3600, run.kill)
    limit.start()
    assert run.stdout
    lines = [(time.monotonic() - start, line) for line in run.stdout]
    returncode = run.wait()
    limit.cancel()
    seconds = time.monotonic() - start
    done.set()
    watcher.join()
    output = "".join(line for _, line in lines)
    if check and returncode != 0:
        sys.exit(f"{' '.join(argv)} failed with status {returncode}:\n{output[-4000:]}")
    tasks = [(task["name"], at) for at, task in ((at, TASK.match(line)) for at, line in lines) if task]
    return Cost(seconds, max(0.0, peak - before), output, returncode, _by_role([*lines, (seconds, "")]), tasks)


def _by_role(lines: Sequence[tuple[float, str]]) -> dict[str, float]:
    """Seconds from each task's heading to the next one, by role."""
    found: dict[str, float] = {}
    role, since = "(start)", 0.0
    for at, line in lines:
        task = TASK.match(line)
        if task or not line:
            found[role] = found.get(role, 0.0) + at - since
            since = at
        if task:
            role = _role(task)
    return found


def _role(task: re.Match[str]) -> str:
    return (task["role"] or task["name"]).removeprefix("nemo.platform.")


def remote_executions(output: str) -> dict[tuple[str, str], int]:
    """Commands sent to a host, by role and host, from the output of ansible-playbook -vvv."""
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    role = "(play)"
    for line in output.splitlines():
        task = TASK.match(line)
        if task:
            role = _role(task)
        remote = REMOTE.match(line)
        if remote:
            counts[role, remote["host"]] += 1
    return counts


def executions_for_services(output: str) -> dict[str, int]:
    """Commands sent to each host for its services alone: from where container_service begins, HAProxy's package included."""
    found: collections.Counter[str] = collections.Counter()
    for (_, host), count in remote_executions(output[output.index(FIRST_OF_A_SERVICE) :]).items():
        found[host] += count
    return found


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table with aligned columns."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return f"\n## {title}\n\n" + "\n".join(lines) + "\n"
