"""Who works on the Bastion: alice with sudo, bob without, mallory with a key and no access, and the project's own user."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from lab import hosts
from lab.settings import BASTION, CHECKOUT, USER

pytestmark = pytest.mark.journal("bastion", "ssh")

PERMITTED = ("10.0.2.20:22", "10.0.2.31:22", "10.0.2.32:22", "10.0.2.31:8000", "10.0.2.32:8001")
FORBIDDEN = ("10.0.2.31:2375", "10.0.0.10:5000", "10.0.0.12:80", "localhost:22", "192.0.2.1:80")


def argv(name: str, *arguments: str) -> list[str]:
    config = hosts.SSH_CONFIG if name == USER else hosts.operator_config(name)
    return [
        "ssh",
        "-F",
        str(config),
        "-o",
        "BatchMode=yes",
        "-o",
        "ControlPath=none",
        "-o",
        "LogLevel=INFO",
        *arguments,
    ]


def as_(name: str, *arguments: str, text: str = "", seconds: int = 30) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        argv(name, *arguments), capture_output=True, text=True, timeout=seconds, check=False, input=text
    )


@pytest.mark.parametrize("name", ["alice", "bob", USER])
def test_logs_in_by_key(name):
    done = as_(name, "bastion", "id -un")
    assert done.stdout == f"{name}\n", done.stderr


def test_a_stranger_does_not():
    done = as_("mallory", "bastion", "true")
    assert done.returncode == 255
    assert "Permission denied (publickey)" in done.stderr


@pytest.mark.parametrize("user", ["root", "bob", USER])
def test_nobody_logs_in_as_another(user):
    done = as_("alice", "-l", user, "bastion", "true")
    assert "Permission denied (publickey)" in done.stderr


@pytest.mark.parametrize("name", ["alice", "bob", USER])
def test_no_password_is_asked_for(name):
    done = as_(name, "-o", "PreferredAuthentications=password,keyboard-interactive", "bastion", "true")
    assert "Permission denied (publickey)." in done.stderr


def test_sudo_is_for_those_who_have_it_and_recorded(on: Callable[[str], Any]):
    word = f"hello-{time.time_ns()}"
    done = as_("alice", "bastion", f"sudo -n sh -c 'echo {word}; id -u'")
    assert done.stdout.split() == [word, "0"], done.stderr
    records = on("bastion").check_output("sudoreplay -l user alice").splitlines()
    last = next(part for part in records[-1].split(" ; ") if part.strip().startswith("TSID=")).strip()[5:]
    assert word in on("bastion").check_output("sudoreplay -n -s 1000 %s", last)
    assert as_("bob", "bastion", "sudo -n id").returncode != 0
    assert as_("bob", "bastion", "ls /var/log/sudo-io").returncode != 0


@pytest.mark.parametrize("target", PERMITTED)
@pytest.mark.parametrize("name", ["alice", USER])
def test_forwards_to_the_platform(name, target):
    text = "" if target.endswith(":22") else "GET /health HTTP/1.0\r\n\r\n"
    with subprocess.Popen(
        argv(name, "-W", target, "bastion"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin
        assert process.stdout
        process.stdin.write(text)
        process.stdin.flush()
        try:
            assert process.stdout.readline().startswith(("SSH-2.0", "HTTP/1"))
        finally:
            process.kill()


@pytest.mark.parametrize("target", FORBIDDEN)
@pytest.mark.parametrize("name", ["alice", USER])
def test_forwards_to_nothing_else(name, target):
    done = as_(name, "-W", target, "bastion")
    assert done.returncode == 255
    assert "administratively prohibited" in done.stderr


@pytest.mark.parametrize("what", [("-R", "7001:localhost:22"), ("-R", "/tmp/of-a-test:localhost:22")])
def test_listens_for_nobody(what):
    done = as_("alice", "-o", "ExitOnForwardFailure=yes", "-N", *what, "bastion")
    assert done.returncode == 255
    assert "forwarding failed" in done.stderr


def test_each_forward_is_in_the_journal_with_whose_it_was(on: Callable[[str], Any]):
    since = on("bastion").check_output("date '+%Y-%m-%d %H:%M:%S'")
    as_("bob", "-W", "10.0.0.12:80", "bastion")
    lines = on("bastion").check_output("journalctl --quiet --output=cat --since=%s _UID=$(id -u bob)", since)
    assert "target 10.0.0.12 port 80" in lines
    assert "the request was denied" in lines


@pytest.fixture
def carol(tmp_path: Any) -> Iterator[Callable[[bool], None]]:
    """An operator for a while: her key, and the Bastion's play with or without her."""
    key = tmp_path / "carol"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)

    def play(there: bool) -> None:
        extra = f"{{name: carol, keys: ['{key.with_suffix('.pub').read_text().strip()}'], sudo: true}}" if there else ""
        (tmp_path / "more.yml").write_text(f'operators_accounts: "{{{{ nemo_operators + more }}}}"\nmore: [{extra}]\n')
        subprocess.run(
            ["ansible-playbook", "-i", "inventories/lab", "playbooks/jump_host.yml", "-e", f"@{tmp_path / 'more.yml'}"],
            cwd=CHECKOUT, check=True, timeout=300, stdin=subprocess.DEVNULL, capture_output=True,
        )  # fmt: skip

    yield play
    play(False)


def test_who_is_removed_loses_access_and_open_sessions(carol, tmp_path, on: Callable[[str], Any]):
    carol(True)
    login = ["-o", f"IdentityFile={tmp_path / 'carol'}", "-o", "IdentitiesOnly=yes", "-l", "carol", "bastion"]
    base = ["ssh", "-F", "none", "-o", f"UserKnownHostsFile={hosts.KNOWN_HOSTS}", "-o", "BatchMode=yes"]
    base += ["-o", f"HostName={BASTION.address}", *login]
    working = subprocess.Popen([*base, "echo up; sudo -n sleep 7001"], stdout=subprocess.PIPE, text=True)
    forwarding = subprocess.Popen([*base[:-1], "-N", "-L", "127.0.0.1:17001:10.0.2.31:22", base[-1]])
    try:
        assert working.stdout
        assert working.stdout.readline() == "up\n"
        carol(False)
        assert working.wait(10) != 0
        assert forwarding.wait(10) != 0
        assert on("bastion").run("pgrep -u carol; pgrep -xf 'sleep 7001'").stdout == ""
        done = subprocess.run([*base, "true"], capture_output=True, text=True, check=False, timeout=30)
        assert "Permission denied (publickey)" in done.stderr
    finally:
        working.kill()
        forwarding.kill()
