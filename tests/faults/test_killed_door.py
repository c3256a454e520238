"""SIGKILL at any moment of the play that makes the Bastion's door: nobody who has access loses it, and the next run ends well."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import threading

import pytest

from lab import hosts
from lab.settings import USER
from tests.faults.conftest import CHECKOUT, RECAP

DOOR = ["scripts/lab-env", "ansible-playbook", "-i", "inventories/lab", "playbooks/jump_host.yml"]
# Each changes something of the role that it is about, and is taken back by the run after.
OPERATORS = ("Operators are those of the list", '{"operators_groups": ["users"], "operators_shell": "/bin/sh"}')
DAEMON = ("SSH daemon lets in operators", '{"jump_host_alive_seconds": 31, "jump_host_agent_forwarding": true}')
# Ansible's mark of what it runs as root, and the module below it; the brackets keep this command out of its own sight.
MODULE_KILLED = """pids=$(pgrep -f '[B]ECOME-SUCCESS'); for pid in $pids; do pids="$pids $(pgrep -P $pid)"; done
kill -KILL $pids 2>/dev/null; true"""
SEED = random.SystemRandom().randrange(10_000)


def door(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*DOOR, *arguments], cwd=CHECKOUT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        stdin=subprocess.DEVNULL, timeout=600, check=False,
    )  # fmt: skip


def killed(on, task: str, delay: float, variables: str) -> bool:
    """Start the play, and SIGKILL it with the module that it runs on the Bastion some time after a task began."""
    process = subprocess.Popen(
        [*DOOR, "-e", variables], cwd=CHECKOUT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        stdin=subprocess.DEVNULL, start_new_session=True, env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    assert process.stdout
    watchdog = threading.Timer(300, process.kill)
    watchdog.start()
    reached = False
    try:
        for line in process.stdout:
            if line.startswith("TASK [") and task in line:
                reached = True
                break
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(delay)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        # The module goes on without its controller: it is killed as well, in the middle of what it does.
        on("bastion", MODULE_KILLED)
    finally:
        watchdog.cancel()
        process.stdout.close()
        process.wait()
    return reached


def access() -> dict[str, str]:
    """What each who may log in is told by the Bastion, over a connection of its own."""
    configs = {USER: hosts.SSH_CONFIG, "alice": hosts.operator_config("alice"), "bob": hosts.operator_config("bob")}
    found = {}
    for name, config in configs.items():
        # sshd closes its port for a moment when it is reloaded: ssh asks again, a second later, when it is refused.
        options = ("ControlPath=none", "BatchMode=yes", "ConnectionAttempts=5")
        argv = ["ssh", "-F", str(config), *(f"-o{option}" for option in options), "bastion", "id -un"]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False, stdin=subprocess.DEVNULL)
        found[name] = done.stdout.strip() or done.stderr.strip()
    return found


def _survives(on, task: str, delay: float, variables: str) -> None:
    everybody = {name: name for name in (USER, "alice", "bob")}
    assert access() == everybody
    reached = killed(on, task, delay, variables)
    assert access() == everybody
    assert "root" in on("bastion", f"su {USER} -c 'sudo -n id -un'")
    assert reached, f"the play has no task {task!r}"
    for changes in (True, False):
        run = door()
        assert run.returncode == 0, run.stdout[-6000:]
        assert changes or sum(int(row[2]) for row in RECAP.findall(run.stdout)) == 0, run.stdout[-6000:]
    assert access() == everybody


@pytest.mark.sample
@pytest.mark.parametrize(("task", "variables"), [OPERATORS, DAEMON], ids=["operators", "daemon"])
def test_killed_in_the_middle(on, task, variables):
    _survives(on, task, 0.6, variables)


@pytest.mark.parametrize("number", range(10))
@pytest.mark.parametrize(("task", "variables"), [OPERATORS, DAEMON], ids=["operators", "daemon"])
def test_killed_at_any_moment(on, task, variables, number):
    delay = random.Random(f"{SEED} {number}").uniform(0, 2.5)
    print(f"seed {SEED}: SIGKILL {delay:.2f} s into {task}")
    _survives(on, task, delay, variables)
