"""The Bastion as a place to work: what a fresh operator and a stranger see there."""

from __future__ import annotations

import json
import subprocess
import time
from typing import Any

import pytest

from lab import hosts
from lab.settings import BASTION, HOSTS, INSTANCES, STATE, USER

ADDRESSES = {host.address for host in HOSTS}


def ssh(user: str, command: str, wait: int = 600) -> subprocess.CompletedProcess[str]:
    """A command on the Bastion as an operator, with nothing but their key."""
    return subprocess.run(
        _argv(user, command), capture_output=True, text=True, timeout=wait, stdin=subprocess.DEVNULL, check=False
    )


def _argv(user: str, command: str) -> list[str]:
    return [
        "ssh", "-F", "/dev/null", "-i", str(STATE / "ssh/operators" / user), "-o", "IdentitiesOnly=yes", "-o", "BatchMode=yes",
        "-o", f"UserKnownHostsFile={hosts.KNOWN_HOSTS}", "-o", "LogLevel=ERROR", f"{user}@{BASTION.address}", command,
    ]  # fmt: skip


def works(user: str, command: str) -> str:
    done = ssh(user, command)
    assert done.returncode == 0, f"{user}: {command}\n{done.stdout}{done.stderr}"
    return done.stdout


def runs(user: str = "alice") -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(works(user, "nemo-operations --json --lines 0"))
    return found


@pytest.fixture
def fresh(on) -> None:
    """Bob as on his first day: nothing in his home is from an earlier run."""
    on("bastion").check_output("rm -rf ~bob/.ansible")


def test_fresh_operator_sees_the_inventory(fresh):
    graph = works("bob", "cd / && ansible-inventory --graph")
    for group in ("bastion", "vllm", "ai", "ai_prod", "ai_dev"):
        assert f"@{group}:" in graph
    assert all(address in graph for address in ADDRESSES)


def test_fresh_operator_reaches_every_host(fresh):
    said = works("bob", "cd /tmp && ansible all -m ping")
    assert said.count("ping: pong") + said.count('"ping": "pong"') == len(INSTANCES), said
    assert works("bob", "stat --format=%a ~/.ansible ~/.ansible/nemo_platform").split() == ["700", "700"]
    assert ssh("alice", "ls ~bob/.ansible").returncode != 0


@pytest.mark.parametrize(
    ("command", "answer"),
    [
        ("kubectl version --client", "Client Version: v1.33."),
        ("helm diff version", "3."),
        ("aws sts get-caller-identity --query Arn --output text", "assumed-role/nemo-bastion/"),
        ("kubectl get nodes", "eks-node-a"),
    ],
)
def test_operators_tools_work(command, answer):
    assert answer in works("bob", command)


def test_site_has_nothing_to_change_there():
    done = ssh("alice", "cd / && ansible-playbook site.yml")
    assert done.returncode == 0, done.stdout + done.stderr
    recap = done.stdout.partition("PLAY RECAP")[2].strip().splitlines()[1:]
    assert recap, done.stdout
    assert [line for line in recap if "changed=0 " not in line] == [], done.stdout
    last = [run for run in runs() if "site.yml" in run["command"]][-1]
    assert (last["user"], last["login"] or "alice", last["result"]) == ("alice", "alice", "ok")
    assert all(counts["changed"] == 0 for counts in last["results"].values())


def test_log_is_not_an_operators_to_write():
    works("bob", "ansible ai_dev -m command -a true")
    assert runs()[-1]["user"] == "bob"
    for command in ("echo x >> {0}", "rm -f {0}", "mv {0} /tmp/", "truncate -s 0 {0}"):
        assert ssh("bob", command.format("/var/log/nemo/operations.log")).returncode != 0
    assert runs()[-1]["user"] == "bob"


def test_second_run_is_told_about_the_lock():
    with subprocess.Popen(
        _argv("bob", "ansible ai_dev -m command -a 'sleep 20'"),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as first:
        deadline = time.monotonic() + 60
        while "bob" not in works("alice", "nemo-locks") and time.monotonic() < deadline:
            time.sleep(0.5)
        done = ssh("alice", "NEMO_LOCK_WAIT=0 ansible ai_dev -m command -a true")
        assert done.returncode == 75, done.stdout + done.stderr
        assert "is locked by bob since" in done.stderr
        assert "nemo-locks break" in done.stderr
        works("alice", "NEMO_LOCK_WAIT=0 ansible ai_prod -m command -a true")
        assert first.wait(timeout=120) == 0


def test_who_is_no_operator_has_nothing(on):
    bastion = on("bastion")
    done = bastion.run("runuser -u nobody -- ansible all -m ping")
    assert done.rc == 1
    assert "only operators" in done.stderr
    for path in ("/opt/nemo/workspace/current/", "/etc/nemo/ssh/key", "/var/log/nemo/operations.log"):
        for user in ("nobody", USER):
            assert bastion.run("runuser -u %s -- cat %s", user, path).rc != 0
