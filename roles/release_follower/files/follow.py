"""Services that follow their registry, on the Bastion: the command nemo-follow.

(no word)          which service follows, what came of it last, and why one was stopped; --json for programs
stop SERVICE WHY   nothing is released by itself any more, until somebody says resume
resume SERVICE     it follows again, and its failures are forgotten
run                what nemo-follow.timer starts: playbooks/follow.yml for each service, one after the other

A service that has failed too often in a row is stopped, and the releases' webhook is told. A host, a registry or a disk that is in
the way is tried again the next time, and more often than an image. Standard library only.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import fcntl
import json
import os
import pathlib
import pwd
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

SETTINGS = pathlib.Path(os.environ.get("NEMO_FOLLOW_SETTINGS", "/etc/nemo/follow.json"))
STATES = pathlib.Path(os.environ.get("NEMO_FOLLOW_STATES", "/var/lib/nemo/follow"))
PLAYBOOK = os.environ.get("NEMO_FOLLOW_PLAYBOOK", "/usr/local/bin/ansible-playbook")
TIMER = "nemo-follow.timer"
LOCKED_OUT = 75  # of the callback operations: an operator works on the hosts
LONGEST_TEXT = 500
# What follow.yml fails with, as ansible-core says it.
ERROR = re.compile(r"^\[ERROR\]: (?:Task failed: )?(?:Module failed: |Action failed: )?(.*)")
# What lies with the image and its settings, as container_release names it (release_flow.TO_REMEMBER).
OF_THE_IMAGE = re.compile(r" failed \[(?:unhealthy|start|bake|platform)\]: ")
# Looks in a row whose release something else hindered, most of an hour by default: each may have moved the traffic there and back.
HINDERED = 10


class Refused(Exception):
    """What the command cannot do, in one line."""


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def settings() -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(SETTINGS.read_text())
    except FileNotFoundError:
        raise Refused(f"there is no {SETTINGS}: nothing follows here (role release_follower)") from None
    return found


def who() -> str:
    return os.environ.get("SUDO_USER") or pwd.getpwuid(os.getuid()).pw_name


# The state of one service: a file that every operator may read and write.


def read(service: str) -> dict[str, Any]:
    """What is known; nothing where there is no file, or one that is damaged."""
    try:
        found = json.loads((STATES / f"{service}.json").read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write(service: str, state: dict[str, Any]) -> None:
    with tempfile.NamedTemporaryFile("w", dir=STATES, prefix=f".{service}.", delete=False) as draft:
        json.dump(state, draft, indent=1)
        draft.flush()
        os.fsync(draft.fileno())
    pathlib.Path(draft.name).chmod(0o660)
    pathlib.Path(draft.name).replace(STATES / f"{service}.json")


@contextlib.contextmanager
def alone(service: str) -> Iterator[None]:
    """No two of us change the state of a service at once."""
    descriptor = os.open(STATES / f"{service}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o660)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


# A run


def play(service: str, report: pathlib.Path) -> tuple[int, list[str]]:
    """follow.yml; what it says is shown from the moment on in which it has something to release."""
    command = [PLAYBOOK, "follow.yml", "-e", f"service={service}", "-e", f"follow_report={report}"]
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    assert process.stdout
    lines: list[str] = []
    shown = 0
    for line in process.stdout:
        lines.append(line.rstrip("\n"))
        if shown or to_release(report):
            print("\n".join(lines[shown:]), flush=True)
            shown = len(lines)
    code = process.wait()
    if code and not shown:
        print("\n".join(lines), flush=True)
    return code, lines


def reported(report: pathlib.Path) -> dict[str, Any]:
    try:
        found = json.loads(report.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def to_release(report: pathlib.Path) -> bool:
    return bool(reported(report).get("hosts"))


def reason_of(lines: list[str]) -> str:
    """The one line that says what went wrong."""
    found = [match[1] for line in lines if (match := ERROR.match(line))]
    found.sort(key=lambda line: not OF_THE_IMAGE.search(line))
    return (found[0] if found else next((line for line in reversed(lines) if line.strip()), "it said nothing"))[
        :LONGEST_TEXT
    ]


def announce(service: str) -> None:
    """The webhook of the releases hears that it is stopped; where that fails, the state says it all the same."""
    command = [PLAYBOOK, "includes/follow_stopped.yml", "-e", f"service={service}"]
    done = subprocess.run(
        [*command, "-e", f"follow_state={STATES / f'{service}.json'}"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, errors="replace", check=False,
    )  # fmt: skip
    if done.returncode:
        print(f"{done.stdout}\n{service}: the webhook was not told", flush=True)


def follow(service: str, limit: int) -> bool:
    """One look, and what it leads to; whether all is well."""
    state = read(service)
    if state.get("stopped"):
        print(f"{service}: {text_of(state)}", flush=True)
        return True
    report = STATES / f"{service}.report"
    report.unlink(missing_ok=True)
    code, lines = play(service, report)
    said = reported(report)
    why = ""
    last = {"at": now(), "tag": said.get("tag", ""), "result": "nothing", "text": said.get("why", "")}
    with alone(service):
        state = read(service)  # somebody may have stopped it meanwhile
        if code == LOCKED_OUT:
            last.update(result="locked", text=reason_of(lines))
        elif code and not said.get("hosts"):
            last.update(result="unable", text=reason_of(lines))
        elif code and not OF_THE_IMAGE.search(reason_of(lines)):
            last.update(result="hindered", text=reason_of(lines))
            state["hindered"] = state.get("hindered", 0) + 1
            if state["hindered"] >= HINDERED:
                why = f"{HINDERED} looks in a row could not release {last['tag']}; the last one: {last['text']}"
        elif code:
            last.update(result="failed", text=reason_of(lines))
            state["hindered"] = 0
            state["failures"] = [
                *state.get("failures", []),
                {"at": last["at"], "tag": last["tag"], "text": last["text"]},
            ]
            if len(state["failures"]) >= limit:
                tags = ", ".join(str(failure["tag"]) for failure in state["failures"])
                why = f"{len(state['failures'])} releases in a row failed ({tags}); the last one: {last['text']}"
        else:
            state["hindered"] = 0
            if said.get("hosts"):
                last.update(result="released")
                state["failures"] = []
                state["released"] = {"at": last["at"], "tag": last["tag"]}
        why = "" if state.get("stopped") else why
        if why:
            state["stopped"] = {"since": now(), "by": "nemo-follow", "why": why}
        state["last"] = last
        write(service, state)
    if why:
        announce(service)
    print(f"{service}: {text_of(state)}", flush=True)
    return last["result"] in ("nothing", "released", "locked")


def run() -> int:
    given = settings()
    good = [follow(service, int(given["failures"])) for service in given["services"]]
    return 0 if all(good) else 1


# What people see and say


def text_of(state: dict[str, Any]) -> str:
    """The state of a service in one line."""
    stopped, last, failures = state.get("stopped"), state.get("last") or {}, state.get("failures") or []
    if stopped:
        return f"STOPPED since {stopped['since']} by {stopped['by']}: {stopped['why']}"
    if not last:
        return "it was not looked at yet"
    what = {"nothing": "nothing to release", "released": f"released {last['tag']}", "failed": f"{last['tag']} FAILED",
            "locked": "an operator's run was in the way", "unable": "CANNOT LOOK",
            "hindered": f"{last['tag']} COULD NOT BE RELEASED (look {state.get('hindered', 1)} of {HINDERED})"}  # fmt: skip
    text = f"{what.get(last['result'], last['result'])} at {last['at']}: {last['text']}"
    return f"{text} (failed in a row: {len(failures)})" if failures and last["result"] != "failed" else text


def status(as_json: bool) -> int:
    given = settings()
    states = {service: read(service) for service in given["services"]}
    if as_json:
        print(json.dumps({name: {**state, "text": text_of(state)} for name, state in states.items()}))
        return 0
    if not states:
        print("no service follows its registry (follow: true in nemo_services)")
    for name, state in states.items():
        # what a release's log says reaches the reader's terminal without control characters
        print(re.sub(r"[\x00-\x1f\x7f-\x9f]", "?", f"{name}: {text_of(state)}"))
        if state.get("stopped"):
            print(f"  to go on: nemo-follow resume {name}")
    if states and shutil.which("systemctl") and subprocess.run(["systemctl", "is-active", "--quiet", TIMER]).returncode:
        print(f"{TIMER} does not run, so nothing is released: sudo systemctl start {TIMER}")
    return 0


def change(act: str, service: str, why: str) -> int:
    known = settings()["services"]
    if service not in known:
        raise Refused(f"{service} follows nothing; those that do: {', '.join(known) or 'none'}")
    with alone(service):
        state = read(service)
        if act == "stop":
            state["stopped"] = {"since": now(), "by": who(), "why": why or "no reason was given"}
        else:
            state.pop("stopped", None)
            state.update(failures=[], hindered=0)
        write(service, state)
    print(f"{service}: {text_of(state)}" if act == "stop" else f"{service} follows its registry again")
    return 0


def main(words: list[str]) -> int:
    os.umask(0o007)  # files are the group's: operators stop and resume
    parser = argparse.ArgumentParser(
        prog="nemo-follow", description="Services that follow their registry by themselves."
    )
    parser.add_argument(
        "act", nargs="?", choices=["stop", "resume", "run"], help="stop or resume a service; run: what the timer does"
    )
    parser.add_argument("service", nargs="?", metavar="SERVICE")
    parser.add_argument("why", nargs="*", metavar="WHY", help="with stop: why, for those who wonder")
    parser.add_argument("--json", action="store_true", help="the state of all, for programs")
    arguments = parser.parse_args(words)
    if (arguments.act in ("stop", "resume")) != bool(arguments.service):
        parser.error("stop and resume need a SERVICE, run takes none")
    try:
        if arguments.act == "run":
            return run()
        if arguments.act:
            return change(arguments.act, arguments.service, " ".join(arguments.why))
        return status(arguments.json)
    except Refused as error:
        print(f"nemo-follow: {error}", file=sys.stderr)
        return 1
    except PermissionError as error:
        print(f"nemo-follow: operators only ({error.filename})", file=sys.stderr)
        return 1


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError, KeyboardInterrupt):
        sys.exit(main(sys.argv[1:]))
