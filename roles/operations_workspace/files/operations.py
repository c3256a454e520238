"""The operations log and the locks of the hosts, on the Bastion.

serve      what systemd starts as root for each run of Ansible that connects to /run/nemo/operations.sock. It lives as long as
           that run: it writes who it is (from the kernel, not from what the run says) and what it does to the log, holds the
           locks of its hosts, and sees its end, SIGKILL included.
log        the command nemo-operations: who ran what, when, on which hosts, with what result.
locks      the command nemo-locks: who holds which host; `nemo-locks break HOST` (root) ends a run that hangs.

Standard library only. Operators can neither write the log nor hold a lock without being named.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import fcntl
import gzip
import json
import os
import pathlib
import pwd
import re
import select
import shlex
import signal
import socket
import struct
import sys
import time
import urllib.parse
import uuid
from collections.abc import Iterator
from typing import Any

LOG = pathlib.Path(os.environ.get("NEMO_OPERATIONS_LOG", "/var/log/nemo/operations.log"))
LOCKS = pathlib.Path(os.environ.get("NEMO_OPERATIONS_LOCKS", "/run/nemo/locks"))
PROC = pathlib.Path("/proc")
LONGEST_LINE = 4 << 20
LONGEST_WAIT = 86400
MOST_HOSTS = 20000
LONGEST_TEXT = 4000
NO_LOGIN = 0xFFFFFFFF  # what /proc/PID/loginuid says of a process that no login has begun
CREDENTIALS = struct.Struct("3i")  # pid, uid, gid: struct ucred
SECRET = re.compile(
    r"(?i)([\w-]*(?:pass(?:word|wd|phrase)?|secret|token|api_?key|access_?key)[\w-]*\s*[=:]\s*)(\"[^\"]*\"|'[^']*'|\S+)"
)
MASK = "********"
# What the playbooks are asked to do: the log is there to tell it. Every other variable may be a secret.
SHOWN = {
    "batch", "command", "digest", "follow", "follow_for", "follow_report", "follow_state", "force", "grep", "group", "lines",
    "max_fail_percentage", "pin", "release", "service", "since", "strategy", "tag", "unit", "verify_only",
}  # fmt: skip
# -e, also behind options without a value (-be, -vve), also with its value glued on.
VARIABLES = re.compile(r"(-[bCDhJkKov]*e=?)(.*)", re.DOTALL)


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


# Processes


def started(pid: int) -> int | None:
    """When a process began, in ticks since boot; with the boot it tells two processes of one number apart. None: it is gone."""
    try:
        fields = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def boot() -> str:
    return (PROC / "sys/kernel/random/boot_id").read_text().strip()


def is_alive(process: Any) -> bool:
    """Whether a process of a record still runs."""
    if not isinstance(process, dict) or process.get("boot") != boot():
        return False
    return started(int(process.get("pid") or 0)) == process.get("started")


def identity(pid: int) -> dict[str, Any]:
    return {"pid": pid, "started": started(pid), "boot": boot()}


def user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


# Who asks


def masked(words: list[str]) -> list[str]:
    """A command line without the values of its extra variables but those of SHOWN, and of what looks like a secret elsewhere."""
    shown: list[str] = []
    is_variables = False
    for word in words:
        option, equals, value = word.partition("=")
        short = VARIABLES.fullmatch(word)
        if is_variables:
            shown.append(masked_variables(word))
        elif equals and is_extra_vars(option):
            shown.append(f"{option}={masked_variables(value)}")
        elif short:
            shown.append(short[1] + (masked_variables(short[2]) if short[2] else ""))
        else:
            shown.append(without_secrets(word))
        is_variables = is_extra_vars(word) or bool(short and not short[2])
    return shown


def is_extra_vars(option: str) -> bool:
    """Ansible knows a long option by its beginning."""
    return len(option) > 2 and "--extra-vars".startswith(option)


def without_secrets(text: str) -> str:
    return SECRET.sub(rf"\1{MASK}", text)


def masked_variables(text: str) -> str:
    """What follows -e. A command goes on to the end of its word, as playbooks/access.yml reads it."""
    if text.startswith("@"):
        return text
    if text.lstrip().startswith(("{", "[")):
        return MASK
    if text.startswith("command="):
        return without_secrets(text)
    try:
        assignments = [word.partition("=") for word in shlex.split(text)]
    except ValueError:
        return MASK
    if all(equals and name in SHOWN for name, equals, _ in assignments):
        return without_secrets(text)
    return " ".join(masked_variable(*assignment) for assignment in assignments)


def masked_variable(name: str, equals: str, value: str) -> str:
    if not equals:
        return MASK  # a word that belongs to the value before it
    return f"{name}={shlex.quote(without_secrets(value)) if name in SHOWN else MASK}"


def peer(connection: socket.socket) -> dict[str, Any]:
    """What the kernel knows of the process at the other end."""
    size = CREDENTIALS.size
    pid, uid, _gid = CREDENTIALS.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    folder = PROC / str(pid)

    def read(name: str) -> str:
        try:
            return (folder / name).read_bytes().decode(errors="replace")
        except OSError:
            return ""

    environment = dict(item.partition("=")[::2] for item in read("environ").split("\0") if "=" in item)
    login = int(read("loginuid") or NO_LOGIN)
    words = [word for word in read("cmdline").split("\0") if word]
    found: dict[str, Any] = {
        "user": user_name(uid),
        "uid": uid,
        "login": user_name(login) if login != NO_LOGIN else "",
        "process": identity(pid),
        "command": shlex.join(masked(program_of(words))),
    }
    with contextlib.suppress(OSError):
        found["cwd"] = str((folder / "cwd").readlink())
    with contextlib.suppress(OSError):
        terminal = str((folder / "fd/0").readlink())
        found["tty"] = terminal if terminal.startswith(("/dev/pts/", "/dev/tty")) else ""
    # The process's own environment: a hint, as its user can write it. Of root's it is sudo that wrote it.
    found["ssh_client"] = environment.get("SSH_CONNECTION", "").split(" ")[0]
    found["unattended"] = environment.get("NEMO_UNATTENDED", "") == "1"
    if uid == 0:
        found["sudo_user"] = environment.get("SUDO_USER", "")
    return found


def program_of(words: list[str]) -> list[str]:
    """`python3 -I /…/bin/ansible-playbook site.yml` is `ansible-playbook site.yml` to its user."""
    for index, word in enumerate(words):
        if index and not word.startswith("-"):
            return [pathlib.PurePath(word).name, *words[index + 1 :]]
    return words


# The log


def append(record: dict[str, Any]) -> None:
    """One line in the file, and the same in the journal, where systemd put our output."""
    line = json.dumps(record, ensure_ascii=False, separators=(",", ":"))
    descriptor = os.open(LOG, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        size = os.fstat(descriptor).st_size
        # A line that a full disk cut off must not take this one with it.
        begin = "\n" if size and os.pread(descriptor, 1, size - 1) != b"\n" else ""
        os.write(descriptor, f"{begin}{line}\n".encode(errors="replace"))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    print(line, flush=True)


# The service


class Gone(Exception):
    """The run at the other end has ended."""


class Run:
    """One run of Ansible, from its connection to its end."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.buffer = b""
        self.who = peer(connection)
        self.id = uuid.uuid4().hex[:12]
        self.begun = 0.0
        self.result: dict[str, Any] = {}
        self.held: dict[str, int] = {}
        self.start: dict[str, Any] = {}

    # Lines of JSON in both directions

    def say(self, message: dict[str, Any]) -> None:
        try:
            self.connection.sendall(json.dumps(message).encode() + b"\n")
        except OSError as error:
            raise Gone from error

    def listen(self, timeout: float | None) -> dict[str, Any] | None:
        """The next message, or None after the time given."""
        while b"\n" not in self.buffer:
            if not select.select([self.connection], [], [], timeout)[0]:
                return None
            try:
                data = self.connection.recv(1 << 16)
            except OSError as error:
                raise Gone from error
            if not data or len(self.buffer) > LONGEST_LINE:
                raise Gone
            self.buffer += data
        line, _, self.buffer = self.buffer.partition(b"\n")
        try:
            message = json.loads(line)
        except ValueError as error:
            raise Gone from error
        if not isinstance(message, dict):
            raise Gone
        return message

    # What a run may say

    def begin(self, message: dict[str, Any]) -> None:
        self.begun = time.monotonic()
        self.start = {
            "event": "start", "id": self.id, "time": now(), **self.who, "service": identity(os.getpid()),
            "playbook": text(message.get("playbook")), "revision": text(message.get("revision")),
            "check": bool(message.get("check")), "hosts": names(message.get("hosts")),
        }  # fmt: skip
        append(self.start)
        self.say({"ok": True, "id": self.id})

    def take(self, message: dict[str, Any]) -> None:
        """The locks of these hosts, in the order of their names: two runs that ask once never wait for each other.

        A run that holds some already asks for more with wait=0, as its hosts may be what the other run waits for.
        """
        wait = min(max(float(message.get("wait") or 0), 0), LONGEST_WAIT)
        deadline = time.monotonic() + wait
        told = ""
        for host in sorted(set(names(message.get("hosts"))) - set(self.held)):
            while not self.try_lock(host):
                holder = holder_of(host)
                if time.monotonic() >= deadline:
                    append(
                        {
                            "event": "refused",
                            "id": self.id,
                            "time": now(),
                            "user": self.who["user"],
                            "host": host,
                            "holder": holder.get("id", ""),
                        }
                    )
                    self.say({"ok": False, "host": host, "holder": holder, "waited": int(wait)})
                    return
                if told != f"{host} {holder.get('id')}":
                    told = f"{host} {holder.get('id')}"
                    self.say({"waiting": True, "host": host, "holder": holder, "for": int(deadline - time.monotonic())})
                if self.buffer or select.select([self.connection], [], [], 0.5)[0]:
                    self.listen(0)  # nothing is to be said now: it is the end
                    raise Gone
        self.say({"ok": True})

    def try_lock(self, host: str) -> bool:
        LOCKS.mkdir(mode=0o750, parents=True, exist_ok=True)  # the group is the service's: the operators
        descriptor = os.open(lock_file(host), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return False
        self.held[host] = descriptor
        keys = ("id", "user", "login", "command", "process", "service", "ssh_client", "tty")
        holder = {"host": host, "since": now(), **{key: self.start[key] for key in keys if key in self.start}}
        draft = holder_file(host).with_suffix(".new")
        draft.write_text(json.dumps(holder))
        draft.chmod(0o640)
        draft.rename(holder_file(host))
        return True

    def release(self) -> None:
        for host, descriptor in self.held.items():
            holder_file(host).unlink(missing_ok=True)
            os.close(descriptor)
        self.held = {}

    def serve(self) -> None:
        try:
            while True:
                message = self.listen(None)
                assert message is not None
                if message.get("say") == "start" and not self.start:
                    self.begin(message)
                elif message.get("say") == "lock" and self.start:
                    self.take(message)
                elif message.get("say") == "playbook" and self.start:
                    self.result = {}
                elif message.get("say") == "end" and self.start:
                    self.result = {"result": text(message.get("result")), "hosts": counted(message.get("hosts"))}
                else:
                    return
        except Gone:
            pass
        finally:
            if self.start:
                ended = self.result or {"result": "interrupted", "hosts": {}}
                seconds = round(time.monotonic() - self.begun, 1)
                append(
                    {
                        "event": "end",
                        "id": self.id,
                        "time": now(),
                        "user": self.who["user"],
                        "seconds": seconds,
                        "locked": sorted(self.held),
                        **ended,
                    }
                )
            self.release()


def text(value: Any) -> str:
    return str(value or "")[:LONGEST_TEXT]


def names(value: Any) -> list[str]:
    return [text(item) for item in value[:MOST_HOSTS]] if isinstance(value, list) else []


def counted(value: Any) -> dict[str, dict[str, int]]:
    """Of each host how many tasks were ok, changed, ..."""
    hosts = list(value.items())[:MOST_HOSTS] if isinstance(value, dict) else []
    return {
        text(host): {text(key): int(number) for key, number in list(counts.items())[:20] if isinstance(number, int)}
        for host, counts in hosts
        if isinstance(counts, dict)
    }


def serve() -> int:
    """The connection is standard input: the socket's unit says Accept=yes."""
    os.umask(0o022)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    Run(socket.socket(fileno=os.dup(0))).serve()
    return 0


# Locks


def lock_file(host: str) -> pathlib.Path:
    return LOCKS / f"{urllib.parse.quote(host, safe='')}.lock"


def holder_file(host: str) -> pathlib.Path:
    return LOCKS / f"{urllib.parse.quote(host, safe='')}.json"


def holder_of(host: str) -> dict[str, Any]:
    try:
        found = json.loads(holder_file(host).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and is_alive(found.get("service")) else {}


def holders() -> list[dict[str, Any]]:
    try:
        paths = list(LOCKS.iterdir())  # glob would find nothing where it may not look
    except FileNotFoundError:
        return []
    hosts = sorted(urllib.parse.unquote(path.stem) for path in paths if path.suffix == ".json")
    return [holder for host in hosts if (holder := holder_of(host))]


def condition(process: dict[str, Any]) -> str:
    """What is to be known of a run's process beside its number."""
    if not is_alive(process):
        return " (killed, its last tasks go on)"
    with contextlib.suppress(OSError):
        if (PROC / str(process["pid"]) / "stat").read_text().rpartition(")")[2].split()[0] in "Tt":
            return " (stopped)"
    return ""


def break_lock(host: str) -> int:
    """End the run that holds a host; its locks go with it."""
    if os.geteuid() != 0:
        print("nemo-locks: only root ends another's run: sudo /usr/local/bin/nemo-locks break HOST", file=sys.stderr)
        return 1
    holder = holder_of(host)
    if not holder:
        print(f"nemo-locks: nobody holds {host}", file=sys.stderr)
        return 1
    by = os.environ.get("SUDO_USER") or "root"
    append({"event": "broken", "id": holder["id"], "time": now(), "user": by, "host": host})
    # First the run, gently; what is left of it and of its service by force.
    for process, number, seconds in (
        (holder["process"], signal.SIGTERM, 5),
        (holder["process"], signal.SIGKILL, 5),
        (holder["service"], signal.SIGTERM, 5),
        (holder["service"], signal.SIGKILL, 5),
    ):
        if is_alive(process):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process["pid"], number)
                os.kill(process["pid"], signal.SIGCONT)  # a stopped one takes SIGTERM only when it goes on
        deadline = time.monotonic() + seconds
        while is_alive(holder["service"]) and time.monotonic() < deadline:
            time.sleep(0.1)
        if not is_alive(holder["service"]):
            break
    print(f"{host} is free: the run of {holder['user']} (process {holder['process']['pid']}) was ended")
    return 0


def show_locks(as_json: bool) -> int:
    try:
        found = holders()
    except PermissionError:
        print(f"nemo-locks: {LOCKS} is readable by operators only", file=sys.stderr)
        return 1
    if as_json:
        print(json.dumps(found, indent=2))
        return 0
    if not found:
        print("no host is locked")
        return 0
    rows = [["HOST", "USER", "SINCE", "PROCESS", "COMMAND"]]
    for holder in found:
        process = f"{holder['process']['pid']}{condition(holder['process'])}"
        rows.append([holder["host"], holder["user"], holder["since"], process, holder["command"]])
    table(rows)
    print("\nA run that hangs is ended, and its hosts are freed, by: sudo /usr/local/bin/nemo-locks break HOST")
    return 0


# The reader


def records() -> Iterator[dict[str, Any]]:
    """Oldest first: the rotated files, then today's."""
    rotated = sorted(LOG.parent.glob(f"{LOG.name}[.-]*"), key=lambda path: path.stat().st_mtime)
    for path in [*rotated, LOG]:
        if not path.exists():
            continue
        with gzip.open(path, "rt", errors="replace") if path.suffix == ".gz" else path.open(errors="replace") as lines:
            for line in lines:
                with contextlib.suppress(ValueError):
                    record = json.loads(line)
                    if isinstance(record, dict):
                        yield record


def runs() -> list[dict[str, Any]]:
    """One entry for each start, with what came of it."""
    found: dict[str, dict[str, Any]] = {}
    for record in records():
        name = str(record.get("id"))
        if record.get("event") == "start":
            found[name] = {**record, "result": "", "results": {}}
        elif name in found and record.get("event") == "end":
            found[name] |= {
                "result": record["result"],
                "results": record["hosts"],
                "ended": record["time"],
                "seconds": record["seconds"],
                "locked": record.get("locked", []),
            }
        elif name in found and record.get("event") == "refused":
            found[name] |= {"refused_by": record.get("holder")}
        elif name in found and record.get("event") == "broken":
            found[name] |= {"broken_by": record.get("user")}
    for run in found.values():
        if not run["result"]:
            run["result"] = "running" if is_alive(run.get("service")) else "interrupted"
        elif run["result"] == "interrupted" and "refused_by" in run:
            run["result"] = "locked out"
    return list(found.values())


def only_looked_by_itself(run: dict[str, Any]) -> bool:
    """A look of a timer that led to nothing: there is one every few minutes."""
    return bool(run.get("unattended") and run["result"] == "ok" and not run.get("locked"))


def show_log(arguments: argparse.Namespace) -> int:
    try:
        LOG.open().close()
    except FileNotFoundError:
        print("nothing was run yet", file=sys.stderr)
        return 0
    except PermissionError:
        print(f"nemo-operations: {LOG} is readable by operators only", file=sys.stderr)
        return 1
    found = [run for run in runs() if not arguments.user or arguments.user in (run["user"], run.get("login"))]
    found = [run for run in found if not arguments.host or arguments.host in {*run["hosts"], *run["results"]}]
    if not arguments.all:
        found = [run for run in found if not only_looked_by_itself(run)]
    found = found[-arguments.lines :] if arguments.lines else found
    if arguments.json:
        print(json.dumps(found, indent=2))
        return 0
    rows = [["WHEN", "WHO", "RESULT", "SECONDS", "HOSTS", "COMMAND"]]
    for run in found:
        who = run["user"] if run.get("login") in ("", run["user"], None) else f"{run['login']} as {run['user']}"
        hosts = sorted({*run["hosts"], *run["results"]})
        shown = ", ".join(hosts[:4]) + (f" and {len(hosts) - 4} more" if len(hosts) > 4 else "")
        check = " (check)" if run.get("check") else ""
        rows.append([run["time"], who, f"{run['result']}{check}", str(run.get("seconds", "")), shown, run["command"]])
    table(rows)
    return 0


def table(rows: list[list[str]]) -> None:
    # What a run says of itself reaches the reader's terminal without control characters.
    clean = [[re.sub(r"[\x00-\x1f\x7f-\x9f]", "?", cell) for cell in row] for row in rows]
    widths = [max(len(cell) for cell in column) for column in zip(*clean, strict=True)]
    for row in clean:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog=f"nemo-{'locks' if words[:1] == ['locks'] else 'operations'}")
    commands = parser.add_subparsers(dest="what", required=True)
    commands.add_parser("serve")
    log = commands.add_parser(
        "log", prog="nemo-operations", description="Who ran what, when, on which hosts, with what result."
    )
    log.add_argument("--json", action="store_true", help="everything that is known")
    log.add_argument("--user", help="runs of this operator")
    log.add_argument("--host", help="runs on this host")
    log.add_argument("--all", action="store_true", help="looks of timers that led to nothing, too")
    log.add_argument("-n", "--lines", type=int, default=20, help="the last N runs; 0 for all (default 20)")
    locks = commands.add_parser("locks", prog="nemo-locks", description="Who holds which host.")
    locks.add_argument("--json", action="store_true")
    locks.add_argument("act", nargs="?", choices=["break"], help="end the run that holds HOST (root)")
    locks.add_argument("host", nargs="?", metavar="HOST")
    arguments = parser.parse_args(words)
    if arguments.what == "serve":
        return serve()
    if arguments.what == "log":
        return show_log(arguments)
    if bool(arguments.act) != bool(arguments.host):
        locks.error("break needs a HOST")
    return break_lock(arguments.host) if arguments.act else show_locks(arguments.json)


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError, KeyboardInterrupt):
        sys.exit(main(sys.argv[1:]))
