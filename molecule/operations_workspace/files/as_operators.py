"""What operators and a stranger see on a Bastion: runs there as root, and acts as Alice, Bob and Mallory.

as_operators.py CHECK...   the checks by name; each says what it saw when it fails
"""

from __future__ import annotations

import json
import os
import pathlib
import pwd
import signal
import subprocess
import sys
import time

LOG = pathlib.Path("/var/log/nemo/operations.log")
LONG = "- hosts: one\n  gather_facts: false\n  tasks:\n    - ansible.builtin.command: sleep {seconds}\n"


def become(user: str, *command: str, folder: str = "/", **environment: str) -> subprocess.CompletedProcess[str]:
    """A command as a user, in an environment that says nothing."""
    bare = {"PATH": "/usr/local/bin:/usr/bin:/bin", **environment}
    return subprocess.run(
        ["/usr/sbin/runuser", "-u", user, "--", *command],
        cwd=folder, env=bare, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL, check=False,
    )  # fmt: skip


def as_user(user: str, *command: str) -> subprocess.Popen[str]:
    """The same, under way."""
    return subprocess.Popen(
        ["/usr/sbin/runuser", "-u", user, "--", *command],
        cwd="/", env={"PATH": "/usr/local/bin:/usr/bin:/bin"}, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def works(user: str, *command: str, **more: str) -> str:
    done = become(user, *command, **more)
    assert done.returncode == 0, f"{user}: {' '.join(command)}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def refused(user: str, *command: str, says: str = "Permission denied") -> None:
    done = become(user, *command)
    assert done.returncode != 0, f"{user} may: {' '.join(command)}"
    assert says in done.stdout + done.stderr, f"{' '.join(command)} said: {done.stdout}{done.stderr}"


def start(user: str, seconds: int) -> tuple[subprocess.Popen[str], int]:
    """A run that holds the host `one` for a while, and the process of its ansible-playbook, once it holds it."""
    playbook = pathlib.Path(f"/srv/{user}-{seconds}.yml")
    playbook.write_text(LONG.format(seconds=seconds))
    runner = as_user(user, "ansible-playbook", str(playbook))
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        held = json.loads(works("alice", "nemo-locks", "--json"))
        for holder in held:
            if holder["host"] == "one" and holder["user"] == user:
                return runner, int(holder["process"]["pid"])
        time.sleep(0.1)
    raise AssertionError(f"no lock after two minutes: {runner.communicate(timeout=60)[0]}")


def last_run() -> dict[str, object]:
    run: dict[str, object] = json.loads(works("alice", "nemo-operations", "--json", "-n", "1"))[0]
    return run


# The checks


def works_without_setting_anything() -> None:
    for folder in ("/", "/tmp", "/var/empty-of-a-test"):
        pathlib.Path(folder).mkdir(exist_ok=True)
        assert "|--one" in works("alice", "ansible-inventory", "--graph", folder=folder)
    assert "pong" in works("alice", "ansible", "all", "-m", "ping")
    assert "pong" in works("bob", "ansible", "two", "-m", "ping", folder="/tmp")


def leaves_out_what_leads_elsewhere() -> None:
    stray = {
        "ANSIBLE_CONFIG": "/nowhere", "ANSIBLE_INVENTORY": "/nowhere", "ANSIBLE_CALLBACKS_ENABLED": "",
        "ANSIBLE_COLLECTIONS_PATH": "/nowhere", "ANSIBLE_HOME": "/nowhere", "PYTHONPATH": "/nowhere", "PYTHONHOME": "/nowhere",
        "HOME": "/root", "LANG": "xx_XX.UTF-8", "AWS_PROFILE": "nobody",
    }  # fmt: skip
    assert "pong" in works("alice", "ansible", "one", "-m", "ping", **stray)
    shown = works(
        "alice",
        "ansible",
        "localhost",
        "-m",
        "command",
        "-a",
        "env",
        "-e",
        "ansible_python_interpreter=/usr/bin/python3",
        **stray,
    )
    assert "AWS_PROFILE" not in shown, shown


def finds_playbooks_of_the_project() -> None:
    for name in ("site.yml", "playbooks/preflight.yml", "preflight.yml"):
        shown = works("alice", "ansible-playbook", name, "--syntax-check", folder="/tmp")
        assert "/opt/nemo/workspace/releases/" in shown, shown
    own = pathlib.Path("/srv/of-a-test")
    own.mkdir(exist_ok=True)
    (own / "preflight.yml").write_text(LONG.format(seconds=0))
    assert "/opt/nemo" not in works("alice", "ansible-playbook", "preflight.yml", "--syntax-check", folder=str(own))


def completes_playbooks() -> None:
    for words, at, offered in (
        ("pre", 1, "preflight.yml"),
        ("--tags re", 2, "restart"),
        ("-e follow_", 2, "follow_for="),
    ):
        script = (
            f"PS1=x; . /etc/profile.d/nemo-workspace.sh; COMP_WORDS=(ansible-playbook {words}); COMP_CWORD={at}; "
            "_nemo_playbooks; echo ${COMPREPLY[*]}"
        )
        assert works("alice", "bash", "-c", script).split() == [offered], words


def keeps_caches_apart() -> None:
    for user in ("alice", "bob"):
        home = pathlib.Path(pwd.getpwnam(user).pw_dir)
        for path in (home / ".ansible", home / ".ansible/nemo_platform", home / ".ansible/tmp"):
            status = path.stat()
            assert (status.st_mode & 0o777, status.st_uid) == (0o700, pwd.getpwnam(user).pw_uid), f"{path}: {status}"
        known = home / ".ansible/nemo_platform/known_hosts"
        assert known.stat().st_mode & 0o077 == 0
        refused("bob" if user == "alice" else "alice", "cat", str(known))


def refuses_a_stranger() -> None:
    for program in ("ansible", "ansible-playbook", "ansible-inventory", "ansible-vault"):
        refused("mallory", program, "--version", says="mallory is none")
    for path in (
        "/opt/nemo/workspace/current/REVISION",
        "/etc/nemo/ssh/key",
        str(LOG),
        "/etc/nemo/inventory/group_vars/all/workspace.yml",
    ):
        refused("mallory", "cat", path)
    refused("mallory", "nemo-operations", says="readable by operators only")
    refused(
        "mallory", "python3", "-c", "import socket; socket.socket(socket.AF_UNIX).connect('/run/nemo/operations.sock')"
    )


def refuses_root() -> None:
    done = subprocess.run(["ansible", "all", "-m", "ping"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "not as root" in done.stderr


def nothing_is_writable_by_operators() -> None:
    for path in (
        "/opt/nemo/workspace/current/site.yml", "/opt/nemo/workspace/current/environment/bin/ansible", "/etc/nemo/ansible.cfg",
        "/etc/nemo/ssh/key", "/usr/local/lib/nemo/operations.py", str(LOG),
    ):  # fmt: skip
        refused("alice", "sh", "-c", f"echo x >> {path}")
    for path in (str(LOG), "/run/nemo/operations.sock", "/run/nemo/locks/one.lock"):
        refused("alice", "rm", "-f", path)
        refused("alice", "mv", path, "/tmp/of-a-test")
    refused("alice", "sh", "-c", "exec 3</run/nemo/locks/one.lock")
    refused("alice", "nemo-workspace", "use", "x", says="only root switches")


def logs_who_and_what() -> None:
    works("alice", "ansible", "one", "-m", "command", "-a", "true", "-e", "token=hush-hush", folder="/tmp")
    run = last_run()
    wanted = {
        "user": "alice",
        "uid": pwd.getpwnam("alice").pw_uid,
        "cwd": "/tmp",
        "result": "ok",
        "hosts": ["one"],
        "check": False,
    }
    assert {key: run[key] for key in wanted} == wanted, run
    assert str(run["command"]).startswith("ansible one -m command -a true -e "), run
    assert run["revision"] == pathlib.Path("/opt/nemo/workspace/current").resolve().name
    assert run["results"] == {
        "one": {"ok": 1, "changed": 1, "failures": 0, "unreachable": 0, "skipped": 0, "rescued": 0, "ignored": 0}
    }, run
    assert "hush-hush" not in LOG.read_text()
    assert become("alice", "ansible", "one", "-m", "command", "-a", "false").returncode != 0
    assert last_run()["result"] == "failed"


def a_forged_record_bears_the_forgers_name() -> None:
    forged = {
        "say": "start",
        "user": "bob",
        "uid": 0,
        "event": "end",
        "time": "1999",
        "hosts": ["one"],
        "login": "bob",
        "check": False,
    }
    before = LOG.read_text()
    works(
        "alice", "python3", "-c",
        "import socket; s = socket.socket(socket.AF_UNIX); s.connect('/run/nemo/operations.sock');"
        f"s.sendall({json.dumps(forged)!r}.encode() + b'\\n'); s.recv(1000)",
    )  # fmt: skip
    time.sleep(1)
    after = LOG.read_text()
    assert after.startswith(before)
    added = [json.loads(line) for line in after[len(before) :].splitlines()]
    assert [record["event"] for record in added] == ["start", "end"]
    assert {record["user"] for record in added} == {"alice"}
    assert added[0]["uid"] == pwd.getpwnam("alice").pw_uid
    assert added[0]["time"] > "2020"


def a_second_run_is_told_who_holds_the_host() -> None:
    runner, pid = start("bob", 600)
    done = become("alice", "ansible", "one", "-m", "command", "-a", "true", NEMO_LOCK_WAIT="0")
    assert done.returncode == 75, done
    for words in (
        "one is locked by bob since",
        "ansible-playbook /srv/bob-600.yml",
        f"process {pid}",
        "nemo-locks break one",
    ):
        assert words in done.stderr, done.stderr
    # What does not touch that host, and what changes nothing, goes on.
    works("alice", "ansible", "two", "-m", "command", "-a", "true", NEMO_LOCK_WAIT="0")
    works("alice", "ansible", "all", "-m", "ping", NEMO_LOCK_WAIT="0")
    works("alice", "ansible", "one", "--check", "-m", "command", "-a", "true", NEMO_LOCK_WAIT="0")
    # Another one waits, says so, and goes on when the host is free. This also is how root ends a run that hangs.
    waiting = as_user("alice", "ansible", "one", "-m", "command", "-a", "true")
    assert waiting.stdout is not None
    line = waiting.stdout.readline()
    assert "one is locked by bob since" in line, line
    os.kill(pid, signal.SIGSTOP)
    assert "(stopped)" in works("alice", "nemo-locks")
    refused("alice", "nemo-locks", "break", "one", says="only root")
    subprocess.run(
        ["/usr/local/bin/nemo-locks", "break", "one"],
        check=True,
        capture_output=True,
        env={**os.environ, "SUDO_USER": "alice"},
    )
    os.kill(runner.pid, signal.SIGCONT)  # runuser stops together with its child
    runner.wait(timeout=60)
    assert waiting.wait(timeout=120) == 0, waiting.stdout.read()
    assert works("alice", "nemo-locks").strip() == "no host is locked"
    results = [
        run["result"] for run in json.loads(works("alice", "nemo-operations", "--json", "--host", "one", "-n", "5"))
    ]
    assert results[-5:] == ["interrupted", "locked out", "ok", "ok", "ok"], results
    runs = json.loads(works("alice", "nemo-operations", "--json", "--user", "bob", "-n", "1"))
    assert (runs[0]["result"], runs[0]["broken_by"]) == ("interrupted", "alice"), runs


def a_killed_run_holds_nothing() -> None:
    runner, pid = start("bob", 3)
    os.kill(pid, signal.SIGKILL)
    runner.wait(timeout=60)
    works("alice", "ansible", "one", "-m", "command", "-a", "true")
    runs = json.loads(works("alice", "nemo-operations", "--json", "--user", "bob", "-n", "1"))
    assert runs[0]["result"] == "interrupted", runs


def a_restarted_socket_drops_no_run() -> None:
    runner, _pid = start("bob", 5)
    subprocess.run(["systemctl", "restart", "nemo-operations.socket"], check=True)
    assert "bob" in works("alice", "nemo-locks")
    assert runner.wait(timeout=180) == 0
    assert json.loads(works("alice", "nemo-operations", "--json", "--user", "bob", "-n", "1"))[0]["result"] == "ok"


def without_the_log_nothing_runs() -> None:
    subprocess.run(["systemctl", "stop", "nemo-operations.socket"], check=True)
    try:
        done = become("alice", "ansible", "one", "-m", "command", "-a", "touch /tmp/unlogged")
        assert done.returncode == 69, done
        assert "sudo systemctl start nemo-operations.socket" in done.stderr, done.stderr
        assert not pathlib.Path("/tmp/unlogged").exists()
    finally:
        subprocess.run(["systemctl", "start", "nemo-operations.socket"], check=True)


def main(names: list[str]) -> int:
    failed = []
    for name in names:
        begun = time.monotonic()
        try:
            globals()[name]()
        except AssertionError as error:
            failed.append(name)
            print(f"FAILED {name}: {error}")
        else:
            print(f"ok {name} ({time.monotonic() - begun:.1f} s)")
    return 1 if failed or not names else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
