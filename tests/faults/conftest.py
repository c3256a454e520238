"""What is broken on purpose in the running lab; every fault puts back what it broke."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from lab import engine, hosts
from lab.aws import images

CHECKOUT = pathlib.Path(__file__).resolve().parents[2]
SITE = ["scripts/lab-env", "ansible-playbook", "-i", "inventories/lab", "site.yml"]
# Tags of ai-dev, later than those of any run before: hosts remember what failed. A second gone by is a minute of theirs, as tags
# have no seconds.
BEGAN = datetime.datetime(2099, 1, 1) + datetime.timedelta(minutes=time.time() - 1.79e9)
LATER = [f"{BEGAN + datetime.timedelta(minutes=minute):dev-%Y%m%d-%H%M}" for minute in range(6)]
RECAP = re.compile(r"^(\S+)\s+: ok=(\d+)\s+changed=(\d+)\s+unreachable=(\d+)\s+failed=(\d+)", re.MULTILINE)


@dataclasses.dataclass
class Run:
    """One run of site.yml."""

    returncode: int
    output: str
    killed_at: str = ""  # the line of the task; empty where the run ended by itself

    @property
    def tasks(self) -> int:
        return len(re.findall(r"^TASK \[", self.output, re.MULTILINE))

    @property
    def changed(self) -> int:
        return sum(int(row[2]) for row in RECAP.findall(self.output))

    def line(self, pattern: str) -> str:
        """The one line that says what is wrong; fails where there is none."""
        found = [line for line in self.output.splitlines() if re.search(pattern, line)]
        assert found, f"no line matches {pattern!r}:\n{self.output[-6000:]}"
        return found[0]


def pytest_sessionstart() -> None:
    if not hosts.is_up():
        pytest.exit("the lab is down: `make lab` brings it up", returncode=1)


@pytest.fixture(autouse=True, scope="session")
def nobody_else_releases() -> Iterator[None]:
    """Nothing on the Bastion releases what a test pushes, unless the test wants it to."""
    found = engine.running()
    assert found
    command = "! command -v nemo-follow > /dev/null || nemo-follow {} > /dev/null"
    found.exec("nemo-lab-bastion", ["sh", "-c", command.format("stop ai-dev tests of faults")])
    yield
    found.exec("nemo-lab-bastion", ["sh", "-c", command.format("resume ai-dev")])


@pytest.fixture
def site() -> Callable[..., Run]:
    """Run site.yml on the lab with these arguments."""

    def call(*arguments: str) -> Run:
        done = subprocess.run(
            [*SITE, *arguments], cwd=CHECKOUT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            stdin=subprocess.DEVNULL, timeout=900, check=False,
        )  # fmt: skip
        return Run(done.returncode, done.stdout)

    return call


@pytest.fixture
def site_killed() -> Callable[..., Run]:
    """Run site.yml and SIGKILL the controller some time after its nth task, or the task of a name, started."""

    def call(which: int | str, delay: float, *arguments: str) -> Run:
        process = subprocess.Popen(
            [*SITE, *arguments], cwd=CHECKOUT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            stdin=subprocess.DEVNULL, start_new_session=True, env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
        assert process.stdout
        seen, task, lines = 0, "", []
        watchdog = threading.Timer(600, process.kill)
        watchdog.start()
        try:
            for line in process.stdout:
                lines.append(line)
                if line.startswith("TASK ["):
                    seen += 1
                    if seen == which or (isinstance(which, str) and which in line):
                        task = line.strip()
                        break
            if task:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(delay)
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        finally:
            watchdog.cancel()
            process.stdout.close()
            process.wait()
        return Run(process.returncode, "".join(lines), task)

    return call


@pytest.fixture
def image() -> Iterator[Callable[..., str]]:
    """Push an image that behaves badly; it is gone from the registry afterwards."""
    pushed = []

    def push(tag: str, behaviour: str, padding: int = 0) -> str:
        pushed.append(tag)
        return images.push(tag, behaviour, padding=padding)

    yield push
    for tag in pushed:
        images.remove(tag)


@pytest.fixture
def on() -> Callable[[str, str], str]:
    """Run a shell command as root on a host, past SSH."""
    found = engine.running()
    assert found

    def call(host: str, command: str) -> str:
        return found.exec(f"nemo-lab-{host}", ["sh", "-c", command])

    return call


@pytest.fixture
def rebuilt() -> Callable[[str], None]:
    """Make a host as bare as at its first boot."""

    def call(host: str) -> None:
        subprocess.run([sys.executable, "-m", "lab", "rebuild", host], cwd=CHECKOUT, check=True, timeout=300)

    return call


@pytest.fixture
def health(on: Callable[[str, str], str]) -> Callable[[str], str]:
    """What a service answers to the Bastion."""
    ports = {"ai-prod": "10.0.2.31:8000", "ai-dev": "10.0.2.32:8001"}

    def call(service: str) -> str:
        return on("bastion", f"curl --silent --show-error --max-time 10 http://{ports[service]}/health")

    return call
