"""The program by which Amazon Linux 2's SSH daemon heeds drop-ins, beside an sshd that only looks for one word."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.unit.helpers import ROOT

ORIGINAL = """\
# as the image brings it
HostKey /etc/ssh/ssh_host_ed25519_key
PasswordAuthentication yes
Subsystem sftp /usr/libexec/openssh/sftp-server

match user backup
  ForceCommand /bin/true

"""
FIRST = "PasswordAuthentication no\nMatch User a\n  PermitTTY no\n"
SECOND = "GatewayPorts no\n\tMATCH Group b\n  PermitTTY yes\n"


class Daemon:
    def __init__(self, folder: Path) -> None:
        self.main = folder / "sshd_config"
        self.main.write_text(ORIGINAL)
        self.main.chmod(0o600)
        self.fragments = folder / "sshd_config.d"
        self.fragments.mkdir()
        sshd = folder / "sshd"
        sshd.write_text('#!/bin/sh\n[ "$1 $2" = "-t -f" ] || exit 9\n! grep -n WRONG "$3" >&2\n')
        sshd.chmod(0o755)
        text = (ROOT / "roles/baseline/files/nemo-sshd-config").read_text()
        for old, new in (
            ("main=/etc/ssh/sshd_config\n", f"main={self.main}\n"),
            ("fragments=/etc/ssh/sshd_config.d\n", f"fragments={self.fragments}\n"),
            ("sshd=/usr/sbin/sshd\n", f"sshd={sshd}\n"),
        ):
            assert old in text
            text = text.replace(old, new)
        self.text = text

    def run(self, *words: str, ok: bool = True) -> str:
        done = subprocess.run(["/bin/sh", "-c", self.text, "sh", *words], capture_output=True, text=True, check=False)
        assert (done.returncode == 0) == ok, done.stdout + done.stderr
        assert sorted(path.name for path in self.main.parent.iterdir()) == ["sshd", "sshd_config", "sshd_config.d"]
        return done.stdout if ok else done.stderr

    @property
    def lines(self) -> list[str]:
        """Of the file, without comments, empty lines and indents."""
        stripped = [line.strip() for line in self.main.read_text().splitlines()]
        return [line for line in stripped if line and not line.startswith("#")]


@pytest.fixture
def daemon(tmp_path: Path) -> Daemon:
    made = Daemon(tmp_path)
    (made.fragments / "00-a.conf").write_text(FIRST)
    (made.fragments / "10-b.conf").write_text(SECOND)
    (made.fragments / "ignored.txt").write_text("WRONG\n")
    return made


def test_order(daemon: Daemon) -> None:
    assert daemon.run("apply") == "changed\n"
    assert daemon.lines == [
        "PasswordAuthentication no",
        "GatewayPorts no",
        "HostKey /etc/ssh/ssh_host_ed25519_key",
        "PasswordAuthentication yes",
        "Subsystem sftp /usr/libexec/openssh/sftp-server",
        "Match User a",
        "PermitTTY no",
        "MATCH Group b",
        "PermitTTY yes",
        "Match all",
        "match user backup",
        "ForceCommand /bin/true",
    ]
    assert daemon.main.stat().st_mode & 0o777 == 0o600


def test_again_and_back(daemon: Daemon) -> None:
    daemon.run("apply")
    first = daemon.main.read_text()
    inode = daemon.main.stat().st_ino
    assert daemon.run("apply") == "unchanged\n"
    assert (daemon.main.read_text(), daemon.main.stat().st_ino) == (first, inode)
    assert daemon.run("undo") == "changed\n"
    assert daemon.main.read_text() == ORIGINAL
    assert daemon.run("undo") == "unchanged\n"


def test_changed_and_removed_fragments(daemon: Daemon) -> None:
    daemon.run("apply")
    (daemon.fragments / "00-a.conf").write_text("MaxAuthTries 2\n")
    (daemon.fragments / "10-b.conf").unlink()
    daemon.run("apply")
    assert daemon.lines[:2] == ["MaxAuthTries 2", "HostKey /etc/ssh/ssh_host_ed25519_key"]
    assert "Match all" not in daemon.lines
    (daemon.fragments / "00-a.conf").unlink()
    daemon.run("apply")
    assert daemon.main.read_text() == ORIGINAL


def test_what_others_append_stays(daemon: Daemon) -> None:
    daemon.run("apply")
    with daemon.main.open("a") as file:
        file.write("AuthorizedKeysCommand /opt/aws/bin/eic_run_authorized_keys %u %f\n")
    daemon.run("apply")
    daemon.run("undo")
    assert daemon.main.read_text() == ORIGINAL + "AuthorizedKeysCommand /opt/aws/bin/eic_run_authorized_keys %u %f\n"


def test_invalid_whole_changes_nothing(daemon: Daemon) -> None:
    daemon.run("apply")
    before = daemon.main.read_text()
    (daemon.fragments / "10-b.conf").write_text("WRONG\n")
    said = daemon.run("apply", ok=False)
    assert "not valid" in said
    assert f"{daemon.main} stays as it is: 3:WRONG" in said
    assert daemon.main.read_text() == before


def test_a_fragment_is_tried_out(daemon: Daemon, tmp_path_factory: pytest.TempPathFactory) -> None:
    daemon.run("apply")
    before = daemon.main.read_text()
    draft = tmp_path_factory.mktemp("draft") / "staged"
    draft.write_text("GatewayPorts yes\n")
    daemon.run("validate", "10-b.conf", str(draft))
    composed = daemon.run("compose", "10-b.conf", str(draft))
    assert "GatewayPorts yes" in composed
    assert "GatewayPorts no" not in composed
    assert "Z yes" in daemon.run("compose", "20-new.conf", str(draft)).replace("GatewayPorts", "Z")
    draft.write_text("WRONG\n")
    assert "WRONG" in daemon.run("validate", "10-b.conf", str(draft), ok=False)
    assert daemon.main.read_text() == before


def test_marks_that_do_not_pair(daemon: Daemon) -> None:
    daemon.run("apply")
    broken = daemon.main.read_text().replace("# nemo-sshd-config: end\n", "", 1)
    daemon.main.write_text(broken)
    for command in ("apply", "undo", "validate"):
        assert "do not pair" in daemon.run(command, ok=False)
    assert daemon.main.read_text() == broken


def test_cut_off_run_leaves_nothing(daemon: Daemon) -> None:
    (daemon.main.parent / "sshd_config.nemo.AbCdEf").write_text("half")
    daemon.run("apply")


@pytest.mark.parametrize(
    "words",
    [[], ["go"], ["apply", "10-b.conf", "/etc/hostname"], ["validate", "../x.conf", "/etc/hostname"],
     ["validate", "x", "/etc/hostname"], ["validate", "x.conf", "/nowhere"], ["validate", "x.conf"]],
    ids=" ".join,
)  # fmt: skip
def test_wrong_words(daemon: Daemon, words: list[str]) -> None:
    daemon.run(*words, ok=False)
    assert daemon.main.read_text() == ORIGINAL
