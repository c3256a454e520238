"""Ad-hoc operations as an operator runs them: what is shown, and what happened on the hosts."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lab import hosts
from lab.settings import CHECKOUT

ACCESS = ["ansible-playbook", "-i", "inventories/lab", "playbooks/access.yml"]
DEV, PROD = "ai-dev-10.0.2.32", "ai-prod-10.0.2.31"


def access(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*ACCESS, *arguments],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        timeout=180,
        stdin=subprocess.DEVNULL,
        check=False,
    )


@pytest.fixture
def say(on: Callable[[str], Any], container: Callable[[str, str], str]) -> Callable[[str, str], None]:
    """A line in the log of a host's service, by the service's own process."""

    def write(host: str, text: str) -> None:
        program = f"open('/proc/1/fd/1', 'w').write('{text}' + chr(10))"
        on(host).check_output("docker exec %s python3 -c %s", container(host, host), program)

    return write


@pytest.fixture
def started(on: Callable[[str], Any], container: Callable[[str, str], str]) -> Callable[[str], str]:
    """When the container of a host's service was started."""

    def when(name: str) -> str:
        shown = "docker container inspect --format '{{.State.StartedAt}}' %s"
        return str(on(name).check_output(shown, container(name, name)))

    return when


def test_without_a_tag_it_says_how_it_is_used() -> None:
    done = access()
    assert done.returncode == 2
    assert "access.yml does one thing at a time" in done.stdout
    assert "services: ai-dev, ai-prod\n" in done.stdout
    assert "changed=0" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["restart"], r"service is missing; allowed: either -e service=\.\.\. \(ai-dev, ai-prod\)"),
        (["run", "-e", "command=uptime"], "group is missing; allowed: ai, ai_dev, ai_prod, all, bastion"),
        (["run", "-e", "command=uptime", "-e", "group=all", "-e", "become=true"], "allowed: --become"),
    ],
)
def test_what_is_wrong_is_one_sentence_before_any_connection(arguments: list[str], says: str) -> None:
    # Where nobody can be connected to: the key is none.
    done = access("--tags", *arguments, "-e", "nemo_ssh_private_key_file=/dev/null")
    assert done.returncode == 2
    assert re.search(says, " ".join(done.stdout.replace("''", "'").split())), done.stdout
    assert "unreachable=0" in done.stdout


def fingerprint_of(key: Path) -> str:
    shown = subprocess.run(["ssh-keygen", "-l", "-f", f"{key}.pub"], capture_output=True, text=True, check=True)
    return shown.stdout.split()[1]


def test_who_has_access() -> None:
    done = access("--tags", "who")
    assert done.returncode == 0, done.stdout
    fingerprint = fingerprint_of(hosts.KEY)
    for name, sudo in (("alice", "yes"), ("bob", "no")):
        key = fingerprint_of(hosts.KEY.parent / "operators" / name)
        assert re.search(
            rf"^bastion-10\.0\.1\.10 +{name} +operator +{sudo} .*{re.escape(key)}", done.stdout, re.MULTILINE
        ), done.stdout
    assert "nemo_operators" not in done.stdout, "the Bastion's operators are those of the inventory"
    for host in ("bastion-10.0.1.10", "vllm-10.0.2.20", PROD, DEV):
        (row,) = [line for line in done.stdout.splitlines() if re.match(rf"{host} +ec2-user +account +yes ", line)]
        assert fingerprint in row, done.stdout
        assert re.search(r"20\d\d-\d\d-\d\d \d\d:\d\dZ 10\.0\.", row), "no last login"
        assert re.search(r" [1-9]\d*, since 20", row), "the session of this very run is open"


def test_a_service_is_restarted_and_healthy_when_the_run_ends(started, get_json) -> None:
    before, other = started("ai-dev"), started("ai-prod")
    done = access("--tags", "restart", "-e", "service=ai-dev")
    assert done.returncode == 0, done.stdout
    assert get_json("bastion", "http://10.0.2.32:8001/health")["status"] == "ok"
    assert "http://127.0.0.1:8001/health is healthy after" in " ".join(done.stdout.split())
    assert started("ai-dev") > before
    assert started("ai-prod") == other


def test_check_mode_restarts_nothing(started) -> None:
    before = started("ai-dev")
    done = access("--tags", "restart", "-e", "service=ai-dev", "--check")
    assert done.returncode == 0, done.stdout
    assert "ai-dev would be restarted" in done.stdout
    assert started("ai-dev") == before


def test_a_restart_waits_for_a_release_that_is_at_work(on, started) -> None:
    """Held for a few seconds, as a release holds it."""
    holder = "import fcntl, time; f = open('/run/nemo/ai-dev.lock', 'r+'); fcntl.flock(f, fcntl.LOCK_EX); time.sleep(25); print(time.time())"
    released: list[float] = []
    thread = threading.Thread(target=lambda: released.append(float(on("ai-dev").check_output("python3 -c %s", holder))))
    thread.start()
    time.sleep(3)
    done = access("--tags", "restart", "-e", "service=ai-dev")
    thread.join()
    assert done.returncode == 0, done.stdout
    began = on("ai-dev").check_output("date --date=%s +%%s.%%N", started("ai-dev"))
    assert float(began) >= released[0] - 0.1


def test_logs_of_two_services_by_time(say) -> None:
    mark = f"mark-{time.time_ns()}"
    for number, host in enumerate(["ai-dev", "ai-prod", "ai-dev"]):
        say(host, f"{mark}-{number}")
    say("ai-prod", f"{mark}-\x1b[31mred")
    done = access("--tags", "logs", "-e", "service=ai-prod,ai-dev", "-e", "since=5m", "-e", f"grep={mark}")
    assert done.returncode == 0, done.stdout
    lines = [line for line in done.stdout.splitlines() if mark in line]
    assert [line.split()[1] for line in lines] == [DEV, PROD, DEV, PROD], done.stdout
    assert [line.rpartition("-")[2] for line in lines] == ["0", "1", "2", "red"]
    assert lines == sorted(lines)


def test_logs_of_a_unit_where_it_is() -> None:
    done = access("--tags", "logs", "-e", "unit=docker", "-e", "since=7d", "-e", "lines=2")
    assert done.returncode == 0, done.stdout
    assert re.search(rf"^20\S+Z {DEV} +\w+: ", done.stdout, re.MULTILINE)
    assert "no such unit on bastion-10.0.1.10" in done.stdout


class Follower:
    """A run that follows, and when each of its lines came."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [*ACCESS, "--tags", "logs", "-e", "follow=true", *arguments], cwd=CHECKOUT, text=True, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self.lines: list[tuple[float, str]] = []
        self.thread = threading.Thread(target=self._read)
        self.thread.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append((time.time(), line.rstrip()))

    def wait_for(self, text: str, seconds: float = 60) -> float:
        limit = time.time() + seconds
        while time.time() < limit:
            for at, line in list(self.lines):
                if text in line:
                    return at
            time.sleep(0.05)
        pytest.fail(f"{text!r} did not come within {seconds} s:\n" + "\n".join(line for _at, line in self.lines))

    def end(self) -> int:
        code = self.process.wait(60)
        self.thread.join()
        return code


@pytest.fixture
def follow() -> Iterator[Callable[..., Follower]]:
    made: list[Follower] = []

    def start(*arguments: str) -> Follower:
        made.append(Follower(*arguments))
        return made[-1]

    yield start
    for follower in made:
        if follower.process.poll() is None:
            os.killpg(follower.process.pid, signal.SIGKILL)
            follower.end()


def test_new_lines_come_while_it_follows_and_it_ends_by_itself(say, follow) -> None:
    mark = f"mark-{time.time_ns()}"
    say("ai-dev", f"{mark}-before")
    follower = follow("-e", "service=ai-prod,ai-dev", "-e", "follow_for=40")
    follower.wait_for(f"{mark}-before")
    time.sleep(3)
    delays = []
    for number, host in enumerate(["ai-dev", "ai-prod", "ai-dev"]):
        say(host, f"{mark}-{number}")
        written = time.time()
        delays.append(follower.wait_for(f"{mark}-{number}", 15) - written)
    # Two seconds where the machine is idle; three runs of Ansible share its two cores here with whatever else there is.
    assert sorted(delays)[1] < 6, delays
    assert follower.end() == 0
    shown = [line for _at, line in follower.lines if mark in line]
    assert len(shown) == 4, "each line once"


def test_an_interrupt_ends_it_and_leaves_nothing_on_the_hosts(on, say, follow) -> None:
    follower = follow("-e", "service=ai-dev", "-e", "follow_for=300")
    follower.wait_for("TASK [Logs]")
    time.sleep(4)
    os.killpg(follower.process.pid, signal.SIGINT)
    assert follower.end() != 0
    text = "\n".join(line for _at, line in follower.lines)
    assert "Traceback" not in text
    time.sleep(12)
    assert on("ai-dev").run("pgrep --full '[d]ocker logs'").rc == 1


def test_answers_that_are_the_same_stand_together() -> None:
    done = access("--tags", "run", "-e", "group=ai", "-e", "command=echo one  two; echo {{.x}}")
    assert done.returncode == 0, done.stdout
    assert f"{DEV}, {PROD} (2 hosts): status 0\n  one two\n  {{{{.x}}}}\n" in done.stdout


def test_one_failure_fails_the_run_and_all_answers_are_shown() -> None:
    done = access(
        "--tags", "run", "-e", "group=ai", "-e", "command=test $(hostname) = ip-10-0-2-32 || { echo no >&2; exit 3; }"
    )
    assert done.returncode != 0
    assert f"\n{DEV}: status 0\n" in done.stdout
    assert f"\n{PROD}: status 3\n  stderr: no\n" in done.stdout
    assert f"the command failed on {PROD}" in done.stdout


def test_a_command_is_the_login_users_and_roots_with_become() -> None:
    assert "\n  ec2-user\n" in access("--tags", "run", "-e", "group=ai_dev", "-e", "command=id -un").stdout
    assert "\n  root\n" in access("--tags", "run", "-e", "group=ai_dev", "-e", "command=id -un", "--become").stdout
