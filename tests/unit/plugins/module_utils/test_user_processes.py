# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Whose a process is, by a /proc made for the test; and the end of real ones."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ansible_collections.nemo.platform.plugins.module_utils import user_processes
from ansible_collections.nemo.platform.plugins.module_utils.user_processes import NO_LOGIN, Table

ALICE, BOB = 1001, 1002


class Proc:
    """A /proc with one process after the other."""

    def __init__(self, path: Path) -> None:
        self.path = path
        (path / "stat").write_text("cpu 0\nbtime 1000\n")
        self.add(1, 0, "systemd", 0)

    def add(
        self, pid: int, parent: int, name: str, uid: int, login: int = NO_LOGIN, group: str = "/x", state: str = "S"
    ) -> None:
        folder = self.path / str(pid)
        folder.mkdir()
        (folder / "stat").write_text(f"{pid} ({name}) {state} {parent} " + "0 " * 17 + "500 0\n")
        (folder / "status").write_text(f"Name:\t{name}\nUid:\t{uid}\t{uid}\t{uid}\t{uid}\n")
        (folder / "cgroup").write_text(f"0::{group}\n")
        (folder / "loginuid").write_text(str(login))


@pytest.fixture
def proc(tmp_path: Path) -> Proc:
    return Proc(tmp_path)


def of_user(proc: Proc, uid: int) -> set[int]:
    return Table(str(proc.path)).of_user(uid)


def test_own_ones_and_what_became_root(proc: Proc) -> None:
    proc.add(10, 1, "sshd", 0)
    proc.add(11, 10, "sshd", ALICE)
    proc.add(12, 11, "sudo (a) x", 0)
    proc.add(13, 12, "bash", 0)
    proc.add(20, 1, "bash", BOB)
    assert of_user(proc, ALICE) == {11, 12, 13}


def test_what_came_from_a_login_and_left_its_parent(proc: Proc) -> None:
    proc.add(10, 1, "sleep", 0, login=ALICE)
    assert of_user(proc, ALICE) == {10}


def test_logins_mean_nothing_where_init_has_one(tmp_path: Path) -> None:
    """The engine of a lab was started by somebody whose number an operator has here."""
    proc = Proc(tmp_path)
    (tmp_path / "1/loginuid").write_text(str(ALICE))
    proc.add(10, 1, "dockerd", 0, login=ALICE)
    assert of_user(proc, ALICE) == set()


@pytest.mark.parametrize("group", ["/system.slice/docker-abc.scope", "/docker/abc", "/kubepods.slice/pod"])
def test_a_containers_user_is_another(proc: Proc, group: str) -> None:
    proc.add(10, 1, "app", ALICE, group=group)
    assert of_user(proc, ALICE) == set()


def test_nobody_hides_by_the_name_of_a_group(proc: Proc) -> None:
    proc.add(10, 1, "app", ALICE, group="/user.slice/user-1001.slice/docker-abc.scope")
    assert of_user(proc, ALICE) == {10}


def test_the_dead_do_not_count(proc: Proc) -> None:
    proc.add(10, 1, "app", ALICE, state="Z")
    assert of_user(proc, ALICE) == set()


@pytest.mark.parametrize("name", ["sshd", "sshd-session"])
def test_ssh_sessions(proc: Proc, name: str) -> None:
    proc.add(5, 1, "sshd", 0)
    proc.add(10, 5, name, 0)
    proc.add(11, 10, name, ALICE)
    proc.add(12, 11, "bash", ALICE)
    proc.add(13, 12, "sshd", ALICE)  # a daemon of her own
    assert Table(str(proc.path)).ssh_sessions(ALICE) == {11: 10}


def test_a_session_is_its_scope(proc: Proc) -> None:
    proc.add(11, 1, "sshd", ALICE, group="/user.slice/session-3.scope")
    proc.add(12, 1, "nohup", ALICE, group="/user.slice/session-3.scope")
    proc.add(13, 1, "bash", ALICE, group="/user.slice/session-4.scope")
    assert Table(str(proc.path)).of_session(11) == {11, 12}


class TestLoginKeys:
    def keys(self, proc: Proc, *entries: dict[str, str]) -> object:
        out = "\n".join(json.dumps(entry) for entry in entries) + "\nno json\n"
        return user_processes.login_keys(lambda _argv: (0, out, ""), Table(str(proc.path)), [10])

    def entry(self, key: str, pid: int = 10, seconds: float = 1005.0) -> dict[str, str]:
        message = f"Accepted publickey for alice from 10.0.0.1 port 5 ssh2: ED25519 SHA256:{key}"
        return {"MESSAGE": message, "_PID": str(pid), "__REALTIME_TIMESTAMP": str(int(seconds * 1e6))}

    def test_of_the_process_that_is_there_now(self, proc: Proc) -> None:
        proc.add(10, 1, "sshd", 0)  # began at 1000 + 500 / 100
        found = self.keys(proc, self.entry("old", seconds=900), self.entry("new"), self.entry("x", pid=11))
        assert found == {10: "SHA256:new"}

    def test_nothing_known(self, proc: Proc) -> None:
        proc.add(10, 1, "sshd", 0)
        assert self.keys(proc, {"MESSAGE": "Connection closed", "_PID": "10", "__REALTIME_TIMESTAMP": "1"}) == {}
        assert self.keys(proc, self.entry("old", seconds=900)) == {}


STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"


@pytest.fixture
def running() -> Iterator[list[subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        process.kill()
        process.wait()


def test_who_does_not_go_is_made_to(running: list[subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(user_processes, "TERM_SECONDS", 0.3)
    for code in (STUBBORN, "import time; print('up', flush=True); time.sleep(60)"):
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        running.append(process)
        assert process.stdout
        process.stdout.readline()
    pids = {process.pid for process in running}
    began = time.monotonic()
    ended, left = user_processes.end(lambda table: pids & set(table.by_pid), spared=set())
    assert left == []
    assert len(ended) == 2
    assert [process.wait(5) for process in running] == [-9, -15]
    assert time.monotonic() - began < 5


def test_the_run_spares_itself(running: list[subprocess.Popen[str]]) -> None:
    process = subprocess.Popen(["sleep", "60"], text=True)
    running.append(process)
    assert user_processes.end(lambda _table: {process.pid}, spared={process.pid}) == ([], [])
    assert process.poll() is None
