"""The log and the locks between real processes: ansible-playbook on one side, the service as systemd would start it on the other."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ansible_collections.nemo.platform.plugins.callback.operations import held_line, only_looks
from tests.unit.helpers import ROOT

PROGRAM = ROOT / "roles/operations_workspace/files/operations.py"
BIN = Path(sys.executable).parent
PLAY = """- hosts: {hosts}
  gather_facts: false
  vars: {variables}
  tasks:
    - ansible.builtin.command: sleep {seconds}
      changed_when: {changed}
"""


def program() -> Any:
    spec = importlib.util.spec_from_file_location("operations_program", PROGRAM)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Bastion:
    """A socket, a service for each connection, and an inventory of local hosts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = folder / "operations.log"
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("ANSIBLE_", "NEMO_"))},
            "NEMO_OPERATIONS_LOG": str(self.log), "NEMO_OPERATIONS_LOCKS": str(folder / "locks"),
            "ANSIBLE_CONFIG": str(folder / "ansible.cfg"), "ANSIBLE_HOME": str(folder / "home"), "ANSIBLE_NOCOLOR": "1",
        }  # fmt: skip
        (folder / "ansible.cfg").write_text(
            f"[defaults]\ncollections_path = {ROOT}/collections\ninventory = {folder}/hosts\nbin_ansible_callbacks = True\n"
            f"callbacks_enabled = nemo.platform.operations\n[callback_operations]\nsocket = {folder}/socket\nlock_wait = 30\n"
        )
        hosts = "".join(
            f"{name} ansible_connection=local ansible_python_interpreter={sys.executable}\n" for name in "abc"
        )
        (folder / "hosts").write_text(f"{hosts}[pair]\na\nb\n")
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(folder / "socket"))
        self.listener.listen()
        self.services: list[subprocess.Popen[bytes]] = []
        self.started: list[subprocess.Popen[str]] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            with connection:
                command = [sys.executable, "-I", str(PROGRAM), "serve"]
                self.services.append(
                    subprocess.Popen(
                        command, stdin=connection.fileno(), stdout=subprocess.DEVNULL, env=self.environment
                    )
                )

    def start(self, *command: str, wait: int = 30) -> subprocess.Popen[str]:
        environment = {**self.environment, "NEMO_LOCK_WAIT": str(wait)}
        process = subprocess.Popen(
            [BIN / command[0], *command[1:]], env=environment, cwd=self.folder, text=True, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        self.started.append(process)
        return process

    def run(self, *command: str, wait: int = 30) -> tuple[int, str]:
        process = self.start(*command, wait=wait)
        output, _ = process.communicate(timeout=60)
        return process.returncode, output

    def play(self, hosts: str, seconds: float = 0, variables: str = "{}", changed: str = "true") -> str:
        path = self.folder / f"play-{hosts}-{seconds}.yml"
        path.write_text(PLAY.format(hosts=hosts, seconds=seconds, variables=variables, changed=changed))
        return str(path)

    def tool(self, *words: str) -> str:
        command = [sys.executable, "-I", str(PROGRAM), *words]
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, check=True).stdout

    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []

    def runs(self) -> list[dict[str, Any]]:
        for service in self.services:
            service.wait(timeout=30)
        found: list[dict[str, Any]] = json.loads(self.tool("log", "--json"))
        return found

    def holding(self, *command: str, host: str = "a") -> subprocess.Popen[str]:
        """A run that is under way and holds a host."""
        process = self.start(*command)
        for _ in range(300):
            if (self.folder / f"locks/{host}.json").exists():
                return process
            time.sleep(0.1)
        raise AssertionError(process.communicate(timeout=30)[0])


@pytest.fixture
def bastion(tmp_path: Path) -> Iterator[Bastion]:
    made = Bastion(tmp_path)
    yield made
    made.listener.close()
    for process in made.started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its workers too
        process.wait()
    for service in made.services:
        service.kill()
        service.wait()


def test_run_is_logged(bastion: Bastion) -> None:
    code, output = bastion.run("ansible-playbook", bastion.play("pair"), "-e", "x=hush", "--diff")
    assert code == 0, output
    (run,) = bastion.runs()
    assert (run["user"], run["uid"], run["result"], run["hosts"]) == (
        os.environ.get("USER", "root"),
        os.getuid(),
        "ok",
        ["a", "b"],
    )
    assert run["command"].startswith("ansible-playbook ")
    assert "x=********" in run["command"]
    assert "hush" not in bastion.log.read_text()
    assert run["cwd"] == str(bastion.folder)
    assert run["results"]["a"]["changed"] == 1


def test_a_timers_look_that_led_to_nothing_is_left_out(bastion: Bastion) -> None:
    bastion.environment["NEMO_UNATTENDED"] = "1"
    looks = bastion.play("a", 0, "{nemo_hosts_lock: false}")
    assert bastion.run("ansible-playbook", looks)[0] == 0
    assert bastion.runs() == []
    assert len(json.loads(bastion.tool("log", "--json", "--all"))) == 1
    assert bastion.run("ansible-playbook", bastion.play("a"))[0] == 0
    assert [run["locked"] for run in bastion.runs()] == [["a"]]
    assert bastion.run("ansible-playbook", looks, "-e", "ansible_connection=none_such")[0] != 0
    assert [run["result"] for run in bastion.runs()] == ["ok", "failed"]


@pytest.mark.parametrize(
    ("words", "result", "check"),
    [
        (("-m", "command", "-a", "false"), "failed", False),
        (("-m", "command", "-a", "true"), "ok", False),
        (("-m", "ping", "--check"), "ok", True),
    ],
)
def test_ad_hoc_is_logged(bastion: Bastion, words: tuple[str, ...], result: str, check: bool) -> None:
    bastion.run("ansible", "a", *words)
    (run,) = bastion.runs()
    assert (run["result"], run["check"], run["hosts"]) == (result, check, ["a"])


def test_second_run_waits_and_says_for_whom(bastion: Bastion) -> None:
    first = bastion.holding("ansible-playbook", bastion.play("pair", 4))
    code, output = bastion.run("ansible", "a", "-m", "command", "-a", "true")
    assert code == 0, output
    assert "a is locked by" in output
    assert f"process {first.pid}" in output
    assert first.poll() is not None, "it did not wait"
    ends = [record["id"] for record in bastion.records() if record["event"] == "end"]
    assert ends[0] == bastion.records()[0]["id"]


def test_second_run_gives_up(bastion: Bastion) -> None:
    bastion.holding("ansible-playbook", bastion.play("pair", 60))
    code, output = bastion.run("ansible", "b", "-m", "command", "-a", "touch touched", wait=0)
    assert code == 75, output
    assert "nothing was run" in output
    assert "nemo-locks break b" in output
    assert not (bastion.folder / "touched").exists()
    bastion.services[1].wait(timeout=30)
    assert [run["result"] for run in json.loads(bastion.tool("log", "--json"))] == ["running", "locked out"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ("ansible", "c", "-m", "command", "-a", "true"),
        ("ansible", "a", "-m", "ping"),
        ("ansible", "a", "-m", "command", "-a", "true", "--check"),
        ("ansible", "localhost", "-m", "command", "-a", "true"),
    ],
    ids=["other host", "only looks", "check mode", "localhost"],
)
def test_what_does_not_clash_goes_on(bastion: Bastion, words: tuple[str, ...]) -> None:
    first = bastion.holding("ansible-playbook", bastion.play("pair", 60))
    code, output = bastion.run(*words, wait=0)
    assert code == 0, output
    assert first.poll() is None


def test_play_that_only_looks_takes_no_lock(bastion: Bastion) -> None:
    bastion.holding("ansible-playbook", bastion.play("pair", 60))
    code, output = bastion.run("ansible-playbook", bastion.play("a", 0, "{nemo_hosts_lock: false}"), wait=0)
    assert code == 0, output


def test_limit_counts(bastion: Bastion) -> None:
    bastion.holding("ansible-playbook", bastion.play("pair", 60), "--limit", "a")
    assert bastion.run("ansible", "b", "-m", "command", "-a", "true", wait=0)[0] == 0
    assert bastion.run("ansible", "a", "-m", "command", "-a", "true", wait=0)[0] == 75


def test_host_that_turns_up_later_is_locked_then(bastion: Bastion) -> None:
    bastion.holding("ansible-playbook", bastion.play("c", 60), host="c")
    late = bastion.folder / "late.yml"
    late.write_text(
        "- hosts: a\n  gather_facts: false\n  tasks:\n    - ansible.builtin.add_host: {name: c, groups: late}\n"
        "- hosts: late\n  gather_facts: false\n  tasks:\n    - ansible.builtin.command: touch touched\n"
    )
    code, output = bastion.run("ansible-playbook", str(late), wait=0)
    assert code == 75, output
    assert "c is locked by" in output
    assert "stopped before this play" in output
    assert "nothing was run" not in output
    assert not (bastion.folder / "touched").exists()


def test_two_runs_that_want_each_others_hosts_later_do_not_wait(bastion: Bastion) -> None:
    plays = {}
    for mine, other in ("ab", "ba"):
        plays[mine] = bastion.folder / f"{mine}-then-{other}.yml"
        plays[mine].write_text(
            f"- hosts: {mine}\n  gather_facts: false\n  tasks:\n    - ansible.builtin.add_host: {{name: {other}, groups: late}}\n"
            f"    - ansible.builtin.command: touch {mine}.ready\n"
            f"    - ansible.builtin.wait_for: {{path: {bastion.folder}/{other}.ready, timeout: 30}}\n"
            "- hosts: late\n  gather_facts: false\n  tasks:\n    - ansible.builtin.command: sleep 2\n"
        )
    both = [bastion.start("ansible-playbook", str(path), wait=300) for path in plays.values()]
    codes = sorted(process.wait(timeout=60) for process in both)
    assert codes in ([0, 75], [75, 75])  # the second may find the first already gone


def test_holders_are_the_operators_own(bastion: Bastion) -> None:
    bastion.holding("ansible-playbook", bastion.play("pair", 60))
    locks = bastion.folder / "locks"
    assert locks.stat().st_mode & 0o777 == 0o750
    assert (locks / "a.json").stat().st_mode & 0o777 == 0o640


def test_who_may_not_see_the_locks_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = program()
    monkeypatch.setattr(module, "LOCKS", tmp_path / "locks")
    assert module.main(["locks"]) == 0
    assert capsys.readouterr().out == "no host is locked\n"
    (tmp_path / "locks").mkdir(mode=0o000)
    user = os.geteuid()
    os.seteuid(user or 65534)
    try:
        assert module.main(["locks"]) == 1
    finally:
        os.seteuid(user)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "readable by operators only" in shown.err


@pytest.mark.parametrize(
    ("typed", "logged"),
    [
        ("-e command='rm -rf /srv'", "-e command=rm -rf /srv"),
        ("-e 'command=mysql --password=hunter2 x'", "-e command=mysql --password=******** x"),
        ("-e 'command=uptime since=x'", "-e command=uptime since=x"),
        ("-e 'group=ai command=rm -rf'", "-e group=ai command=rm ********"),
        ("-e 'group=ai token=hunter2'", "-e group=ai token=********"),
        ("-e 'dbpw=\"hunter 2\" grep=\"a b\"'", "-e dbpw=******** grep='a b'"),
        ("-e grep=token=hunter2", "-e grep=token=********"),
        ("-e service=ai-prod -e unit=ssh -e since=1h", "-e service=ai-prod -e unit=ssh -e since=1h"),
        ("-e lines=5 -e follow=true -e follow_for=9 -e verify_only=a", "-e lines=5 -e follow=true -e follow_for=9 -e verify_only=a"),
        ("-e service=a -e tag=t -e digest=d -e pin=true", "-e service=a -e tag=t -e digest=d -e pin=true"),
        ("-e commands=hunter2 -e hunter2", "-e commands=******** -e ********"),
        ("-e '{\"group\": \"ai\"}' -e '[1]'", "-e ******** -e ********"),
        ("-e @vars.yml", "-e @vars.yml"),
        ("-e 'group=\"ai'", "-e ********"),
        ("-be dbpw=hunter2 -b", "-be dbpw=******** -b"),
        ("-Ke dbpw=hunter2", "-Ke dbpw=********"),
        ("-vve dbpw=hunter2", "-vve dbpw=********"),
        ("-vvedbpw=hunter2", "-vvedbpw=********"),
        ("-edbpw=hunter2 -e=dbpw=hunter2", "-edbpw=******** -e=dbpw=********"),
        ("-begroup=ai", "-begroup=ai"),
        ("--extra-vars dbpw=hunter2 --extra=dbpw=hunter2 --ex dbpw=hunter2", "--extra-vars dbpw=******** --extra=dbpw=******** --ex dbpw=********"),
        ("-fe=1 -l ve --check", "-fe=1 -l ve --check"),
        ("-a 'x token=hunter2'", "-a x token=********"),
    ],
)  # fmt: skip
def test_command_line_in_the_log(typed: str, logged: str) -> None:
    assert " ".join(program().masked(shlex.split(typed))) == logged


def test_killed_run_frees_its_hosts_and_is_interrupted(bastion: Bastion) -> None:
    first = bastion.holding("ansible-playbook", bastion.play("pair", 2))
    first.kill()
    first.wait()
    code, output = bastion.run("ansible", "a", "-m", "command", "-a", "true")
    assert code == 0, output
    assert [run["result"] for run in bastion.runs()] == ["interrupted", "ok"]


def test_killed_service_leaves_no_stale_holder(bastion: Bastion) -> None:
    first = bastion.holding("ansible-playbook", bastion.play("pair", 60))
    assert bastion.tool("locks").count(str(first.pid)) == 2
    bastion.services[0].kill()
    bastion.services[0].wait()
    assert bastion.tool("locks").strip() == "no host is locked"
    assert bastion.runs()[0]["result"] == "interrupted"  # a start without an end


@pytest.mark.skipif(os.getuid() != 0, reason="only root breaks locks")
def test_break_ends_a_run_that_is_stopped(bastion: Bastion) -> None:
    first = bastion.holding("ansible-playbook", bastion.play("pair", 60))
    os.kill(first.pid, signal.SIGSTOP)
    assert "(stopped)" in bastion.tool("locks")
    assert "a is free" in bastion.tool("locks", "break", "a")
    assert first.wait(timeout=10) != 0
    assert bastion.tool("locks").strip() == "no host is locked"


def test_two_runs_in_opposite_order_both_end(bastion: Bastion) -> None:
    plays = [bastion.folder / "ab.yml", bastion.folder / "ba.yml"]
    for path, order in zip(plays, ("ab", "ba"), strict=True):
        path.write_text("".join(PLAY.format(hosts=host, variables="{}", seconds=1, changed="true") for host in order))
    both = [bastion.start("ansible-playbook", str(path)) for path in plays]
    assert [process.wait(timeout=60) for process in both] == [0, 0]


def test_without_the_service_nothing_runs(bastion: Bastion) -> None:
    bastion.listener.close()
    (bastion.folder / "socket").unlink()
    code, output = bastion.run("ansible", "a", "-m", "command", "-a", "touch touched")
    assert code == 69, output
    assert "sudo systemctl start nemo-operations.socket" in output
    assert not (bastion.folder / "touched").exists()


def test_claims_of_a_run_cannot_change_what_the_kernel_says(bastion: Bastion) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(bastion.folder / "socket"))
        client.sendall(
            b'{"say": "start", "user": "somebody", "uid": 4711, "event": "end", "time": "1999", "hosts": ["a"]}\n'
        )
        client.recv(1000)
        client.sendall(b'{"say": "end", "result": "ok", "user": "somebody", "hosts": {"a": {"ok": "x\\n{}"}}}\n')
    (run,) = bastion.runs()
    assert (run["uid"], run["result"], run["hosts"]) == (os.getuid(), "ok", ["a"])
    assert run["time"] > "2020"
    assert "somebody" not in bastion.log.read_text()
    assert len(bastion.log.read_text().splitlines()) == 2


@pytest.mark.parametrize(
    "sent", [b"\n", b"not json\n", b"[]\n", b'{"say": "lock", "hosts": ["a"]}\n', b'{"say": "end"}\n', b""]
)
def test_nonsense_is_no_record(bastion: Bastion, sent: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(bastion.folder / "socket"))
        client.sendall(sent)
    time.sleep(0.3)
    for service in bastion.services:
        assert service.wait(timeout=10) == 0
    assert bastion.records() == []


def test_line_that_a_full_disk_cut_off_costs_no_other(bastion: Bastion) -> None:
    bastion.log.write_text('{"event":"start","id":"cut')
    bastion.run("ansible", "a", "-m", "ping")
    assert [run["result"] for run in bastion.runs()] == ["ok"]


def test_table_shows_no_control_characters(bastion: Bastion) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(bastion.folder / "socket"))
        client.sendall(json.dumps({"say": "start", "hosts": ["\x1b[2Jx"]}).encode() + b"\n")
        client.recv(1000)
    bastion.runs()
    assert "\x1b" not in bastion.tool("log")


@pytest.mark.parametrize(
    ("module", "looks"),
    [
        ("ping", True), ("ansible.builtin.setup", True), ("amazon.aws.ec2_instance_info", True), ("command", False), ("shell", False),
        ("service", False), ("nemo.platform.host_config", False),
    ],
)  # fmt: skip
def test_modules_that_only_look(module: str, looks: bool) -> None:
    assert only_looks(module) is looks


def test_line_names_the_login_behind_sudo() -> None:
    holder = {
        "user": "root",
        "login": "bob",
        "since": "2026-11-22T13:00:00Z",
        "command": "ansible all",
        "process": {"pid": 7},
    }
    assert held_line("a", holder).startswith(
        "a is locked by bob as root since 2026-11-22T13:00:00Z: ansible all (process 7)"
    )
