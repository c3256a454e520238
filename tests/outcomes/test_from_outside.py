"""What an unknown machine on the internet can reach: the Bastion's SSH, with a key, and nothing else."""

from __future__ import annotations

import socket
import subprocess

import pytest

from lab import hosts
from lab.settings import BASTION, HOSTS, USER

PORTS = (22, 80, 443, 2375, 2376, 8000, 8001, 8002, 9094, 9836)


def answers(address: str, port: int) -> bool:
    try:
        with socket.create_connection((address, port), timeout=5):
            return True
    except OSError:
        return False


def ssh(*options: str, address: str = BASTION.address) -> subprocess.CompletedProcess[str]:
    argv = ["ssh", "-F", "/dev/null", "-o", f"UserKnownHostsFile={hosts.KNOWN_HOSTS}", "-o", "ConnectTimeout=5"]
    argv += ["-o", "BatchMode=yes", *options, address, "true"]
    return subprocess.run(argv, capture_output=True, text=True, timeout=30, stdin=subprocess.DEVNULL, check=False)


@pytest.mark.parametrize("port", PORTS)
@pytest.mark.parametrize("host", HOSTS, ids=lambda host: host.name)
def test_only_the_bastions_ssh_answers(host, port):
    assert answers(host.address, port) is (host == BASTION and port == 22)


def test_the_operators_key_opens_the_bastion():
    done = ssh("-i", str(hosts.KEY), "-l", USER)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("user", [USER, "root", "admin"])
def test_a_strangers_key_is_refused(tmp_path, user):
    key = tmp_path / "stranger"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    done = ssh("-i", str(key), "-o", "IdentitiesOnly=yes", "-l", user)
    assert done.returncode == 255
    assert "Permission denied" in done.stderr


def test_root_is_refused_with_the_operators_key():
    done = ssh("-i", str(hosts.KEY), "-o", "IdentitiesOnly=yes", "-l", "root")
    assert "Permission denied" in done.stderr


@pytest.mark.parametrize("host", HOSTS, ids=lambda host: host.name)
def test_no_host_offers_a_password(host):
    jump = [] if host == BASTION else ["-o", f"ProxyCommand=ssh -F '{hosts.SSH_CONFIG}' -W %h:%p {BASTION.name}"]
    done = ssh(*jump, "-o", "PreferredAuthentications=none", "-l", USER, address=host.address)
    assert "Permission denied (publickey)." in done.stderr


def test_ssh_to_a_host_without_the_bastion_is_refused():
    done = ssh("-i", str(hosts.KEY), "-l", USER, address="10.0.2.31")
    assert done.returncode == 255
    assert "refused" in done.stderr
