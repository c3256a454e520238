"""One line of advice for what ssh and AWS say; the messages are those of OpenSSH 9."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ansible.parsing.dataloader import DataLoader
from ansible.template import trust_as_template

from ansible_collections.nemo.platform.plugins.callback.advice import CallbackModule, advice

CHANGED = """Failed to connect to the host via ssh: @@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@
@    WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED!     @
@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@
IT IS POSSIBLE THAT SOMEONE IS DOING SOMETHING NASTY!
Add correct host key in /home/me/a b/known_hosts to get rid of this message.\r
Offending ED25519 key in /home/me/a b/known_hosts:3\r
Host key for 10.0.2.31 has changed and you have requested strict checking.\r
Host key verification failed.\r"""


@pytest.mark.parametrize(
    ("message", "says"),
    [
        (CHANGED, "10.0.2.31 is not the one in /home/me/a b/known_hosts line 3"),
        (CHANGED, "ssh-keygen -R 10.0.2.31 -f '/home/me/a b/known_hosts'"),
        (
            "no such identity: /a b/key: No such file or directory\nec2-user@10.0.1.10: Permission denied (publickey).",
            "the key /a b/key does not exist",
        ),
        ("Host key verification failed.", "does not trust the host's key"),
        ("Failed to connect to the host via ssh: ec2-user@10.0.2.31: Permission denied (publickey).",
         "ec2-user@10.0.2.31 was refused (publickey): is nemo_ssh_private_key_file"),
        ("ssh: connect to host 203.0.113.9 port 22: Connection timed out",
         "203.0.113.9 port 22 does not answer (Connection timed out)"),
        ("ssh: connect to host 203.0.113.9 port 22: Connection timed out", "security group"),
        ("ssh: connect to host 10.0.2.31 port 22: Connection refused", "Connection refused"),
        ("channel 0: open failed: connect failed: No route to host\r\nstdio forwarding failed\r\n"
         "Connection closed by UNKNOWN port 65535", "the Bastion answers, but not the host behind it (connect failed"),
        ("Connection timed out during banner exchange\nConnection to UNKNOWN port 65535 timed out", "is the Bastion running"),
        ("Connection closed by UNKNOWN port 65535", "ssh to the Bastion itself"),
        ("hostname contains invalid characters", "there is no Bastion"),
        ("An error occurred (ExpiredTokenException) when calling DescribeImages", "token has expired"),
    ],
)  # fmt: skip
def test_unreachable(message: str, says: str) -> None:
    line = advice(message, unreachable=True)
    assert line is not None
    assert says in line
    assert "\n" not in line
    assert "\r" not in line


def test_failed_task_is_no_broken_connection() -> None:
    assert advice("git@host: Permission denied (publickey).", unreachable=False) is None
    assert advice("The security token included in the request is expired", unreachable=False) is not None
    assert advice("something else", unreachable=True) is None


def test_same_line_once(monkeypatch: pytest.MonkeyPatch) -> None:
    callback: Any = CallbackModule()
    shown: list[str] = []
    monkeypatch.setattr(callback, "_display", SimpleNamespace(display=lambda text, **_: shown.append(text)))
    denied = "ec2-user@10.0.2.31: Permission denied (publickey)."
    result = SimpleNamespace(result={"msg": denied}, host=SimpleNamespace(get_name=lambda: "ai-prod-10.0.2.31"))
    callback.v2_runner_on_unreachable(result)
    callback.v2_runner_on_unreachable(result)
    assert len(shown) == 1
    assert shown[0].startswith("ADVICE [ai-prod-10.0.2.31]: ec2-user@10.0.2.31 was refused")
    expired = SimpleNamespace(result={"msg": "ExpiredToken"}, host=result.host)
    callback.v2_runner_on_failed(expired, ignore_errors=True)
    assert len(shown) == 1
    callback.v2_runner_on_failed(expired)
    assert len(shown) == 2


class Manager:
    """A play whose variables name the log of the connection to the Bastion."""

    def __init__(self, log: Path) -> None:
        self.log = log

    def get_variable_manager(self) -> Manager:
        return self

    def get_loader(self) -> DataLoader:
        return DataLoader()

    def get_vars(self, **_: Any) -> dict[str, Any]:
        return {"nemo_ssh_jump_log": trust_as_template("{{ folder }}/bastion.log"), "folder": str(self.log.parent)}


def test_what_the_bastion_said_in_this_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    log = tmp_path / ".ansible" / "cp" / "12345678" / "bastion.log"
    log.parent.mkdir(parents=True)
    log.write_text("old@10.0.1.10: Permission denied (publickey).\n")
    callback: Any = CallbackModule()
    shown: list[str] = []
    monkeypatch.setattr(callback, "_display", SimpleNamespace(display=lambda text, **_: shown.append(text)))
    host = SimpleNamespace(get_name=lambda: "ai-prod-10.0.2.31")
    result = SimpleNamespace(result={"msg": "Connection closed by UNKNOWN port 65535"}, host=host, task=None)
    callback.v2_runner_on_unreachable(result)
    assert "broke off" in shown.pop()
    callback.v2_playbook_on_play_start(Manager(log))
    with log.open("a") as file:
        file.write("ssh: connect to host 203.0.113.9 port 22: Connection timed out\n")
    callback.v2_runner_on_unreachable(result)
    assert "203.0.113.9 port 22 does not answer" in shown.pop()


def test_log_of_the_bastion_stays_small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / ".ansible" / "cp" / "12345678"
    folder.mkdir(parents=True)
    for name, size in (("bastion.log", 2_000_000), ("other.log", 2_000_000)):
        (folder / name).write_bytes(b"x" * size)
    small = folder.parent / "87654321" / "bastion.log"
    small.parent.mkdir()
    small.write_text("short")
    CallbackModule()
    assert (folder / "bastion.log").stat().st_size == 0
    assert (folder / "other.log").stat().st_size == 2_000_000
    assert small.read_text() == "short"
