"""Keys, logins and sessions, as a host's files and journal tell of them."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from ansible_collections.nemo.platform.plugins.modules import account_info as module

BODY = "AAAAC3NzaC1lZDI1NTE5AAAAIGNzE9rnEQoxuqYy9sJ7UqTpRsz1SSV8dQXwl0a8lRi1"
KEY = f"ssh-ed25519 {BODY}"


@pytest.mark.parametrize(
    ("line", "comment"),
    [
        (f"{KEY} me@laptop of mine", "me@laptop of mine"),
        (KEY, ""),
        (f'from="10.0.0.0/8",command="ssh-add -l ssh-ed25519 {BODY[:20]}" {KEY} me', "me"),
        (f"restrict {KEY} me", "me"),
    ],
)
def test_a_key_whatever_stands_in_front_of_it(line: str, comment: str) -> None:
    key = module.read_key(line)
    assert key is not None
    assert key["comment"] == comment
    assert key["fingerprint"] == "SHA256:i6NniYxQZ9/fNsY2/d4gDA09Ev8JhpUB9r0v/E5+uJE"  # ssh-keygen -l


@pytest.mark.parametrize(
    "line", ["hello", "ssh-ed25519", "ssh-rsa " + BODY, "ssh-ed25519 AAAA", "ssh-ed25519 ====" + BODY]
)
def test_a_line_that_is_no_key(line: str) -> None:
    assert module.read_key(line) is None


def test_a_file_of_keys(tmp_path: Path) -> None:
    path = tmp_path / "authorized_keys"
    path.write_text(f"# mine\n\n{KEY} me\nnonsense\n")
    keys, wrong = module.read_keys(str(path))
    assert [key["comment"] for key in keys] == ["me"]
    assert wrong == [f"{path}:4"]
    assert module.read_keys(str(tmp_path / "none")) == ([], [])


def test_where_the_daemon_looks_for_keys() -> None:
    assert module.key_files("port 22\nauthorizedkeysfile .ssh/a /etc/ssh/keys/%u\n") == [".ssh/a", "/etc/ssh/keys/%u"]
    assert module.key_files("authorizedkeysfile none\n") == []
    assert module.key_files("") == module.KEY_FILES
    assert module.expanded(".ssh/a", "al", "/home/al", 7) == "/home/al/.ssh/a"
    assert module.expanded("/etc/%u/%U%%", "al", "/home/al", 7) == "/etc/al/7%"
    assert module.expanded("%h/x", "al", "/home/al", 7) == "/home/al/x"


def entry(message: str, seconds: int, process: int) -> str:
    return json.dumps({"MESSAGE": message, "__REALTIME_TIMESTAMP": str(seconds * 10**6), "_PID": str(process)})


def test_logins_of_the_journal() -> None:
    last, by_process = module.journal_logins(
        [
            entry("Accepted publickey for al from 10.0.0.1 port 40000 ssh2: ED25519 SHA256:abc", 100, 7),
            entry("Accepted publickey for al from 10.0.0.2 port 40001 ssh2: ED25519 SHA256:def", 200, 8),
            entry("Invalid user Accepted publickey for eve from 10.0.0.9 port 1 ssh2", 300, 9),
            entry("Accepted hostbased for bo from ::1 port 40002 ssh2", 400, 10),
            "not JSON Accepted publickey",
        ]
    )
    assert last["al"] == {"user": "al", "at": 200, "from": "10.0.0.2", "key": "SHA256:def"}
    assert last["bo"]["key"] == "hostbased"
    assert "eve" not in last
    assert by_process[7]["from"] == "10.0.0.1"


def record(kind: int, user: str, host: str, seconds: int) -> bytes:
    return struct.pack(
        "<hxxi32s4s32s256shhiii16s20x", kind, 1, b"pts/0", b"0", user.encode(), host.encode(), 0, 0, 0, seconds, 0, b""
    )


def test_logins_of_wtmp() -> None:
    data = record(7, "al", "10.0.0.1", 100) + record(8, "", "", 150) + record(7, "al", "10.0.0.2", 200) + b"cut off"
    assert module.wtmp_logins(data) == {"al": {"user": "al", "at": 200, "from": "10.0.0.2", "key": ""}}


def process(proc: Path, pid: int, parent: int, title: str, program: str = "/usr/sbin/sshd") -> None:
    folder = proc / str(pid)
    folder.mkdir()
    (folder / "cmdline").write_bytes(title.encode() + b"\0")
    (folder / "exe").symlink_to(program)
    (folder / "stat").write_text(f"{pid} (sshd) x) S {parent} 1 1")


def test_open_sessions(tmp_path: Path) -> None:
    process(tmp_path, 1, 0, "sshd: /usr/sbin/sshd -D [listener] 0 of 10-100 startups")
    process(tmp_path, 7, 1, "sshd: al [priv]")
    process(tmp_path, 8, 7, "sshd: al@pts/0")
    process(tmp_path, 9, 1, "sshd-session: bo@notty", "/usr/lib/openssh/sshd-session (deleted)")
    process(tmp_path, 10, 8, "sshd: eve@pts/1", "/home/eve/sshd")
    logins = {7: {"user": "al", "at": 100, "from": "10.0.0.1", "key": "SHA256:abc"}, 1: {"user": "other", "at": 5}}
    found = module.sessions(logins, str(tmp_path))
    assert found["al"] == [{"since": 100, "from": "10.0.0.1", "key": "SHA256:abc", "terminal": "pts/0"}]
    assert set(found) == {"al", "bo"}
    assert found["bo"][0]["terminal"] == found["bo"][0]["from"] == ""
