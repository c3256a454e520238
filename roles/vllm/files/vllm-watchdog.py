#!/usr/bin/python3
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Restarts an inference server whose engine hangs, and never more often than it may.

A timer runs it. It asks the release that serves for what has proven it, one token, on its loopback port; /health stays 200
on an engine that hangs. Only when that fails several times in a row, and vLLM's own counters have not moved meanwhile (an
engine that is busy is not one that hangs), the container is restarted. It does nothing while a release is under way, while
the model loads, and where somebody has stopped the container, and says so. A container that could not be started, such as
at a boot before its volume was there, is started once its folders are; that is tried again for ever, at a slow pace after
the first times. After the restarts that it may make within the window it gives up, says so, and waits for a container that
somebody else has started, or for a boot. It gives up, too, on one that ends again and again before it has answered; the
engine, with pauses of a minute at most, goes on to start that.

    vllm-watchdog CONFIG            one look
    vllm-watchdog CONFIG --clear    forget strikes and restarts, and begin again

The state is in CONFIG's "state" folder, for people and for metrics: state (ok, loading, failing, restarting, down, gave_up),
strikes, restarts and starts (times, UTC), since, reason, looked, valid_until (when the next look is long overdue).
"""

from __future__ import annotations

import calendar
import fcntl
import http.client
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

FORMAT = 2  # of container_release's state.json
# Of work that is done. Counts of requests and prompts also grow by what is given up, such as the question of this program.
COUNTER = "vllm:generation_tokens_total"
BOOT = Path("/proc/sys/kernel/random/boot_id")
OWN_TOKENS = 1  # may be counted for a question that was given up
METRICS_TIMEOUT = 5
# Seconds for a docker command, and for a restart to end what does not end by itself.
DOCKER_TIMEOUT = 60
STOP_SECONDS = 10

Runner = Callable[[Sequence[str], float], "tuple[int, str]"]


class Container(NamedTuple):
    name: str
    status: str
    started: str
    again: int  # starts by the engine itself since somebody's
    error: str  # why it could not be started


class Answer(NamedTuple):
    good: bool
    reason: str
    asks_in_vain: bool = False  # the server works, and refuses the question: no restart mends that


def run(argv: Sequence[str], timeout: float) -> tuple[int, str]:
    try:
        done = subprocess.run(
            list(argv),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return 124, "%s does not end within %d s" % (argv[0], timeout)
    except OSError as error:
        return 127, "%s: %s" % (argv[0], error.strerror)
    return done.returncode, done.stdout.decode("utf-8", "replace")


def utc(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def seconds_of(text: str) -> float:
    """Of a time as utc() or Docker write it; 0 where it is none."""
    try:
        return calendar.timegm(time.strptime(text[:19], "%Y-%m-%dT%H:%M:%S"))
    except ValueError:
        return 0


def read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


class Watchdog:
    """One look at one service."""

    def __init__(self, config: dict[str, Any], run: Runner = run, clock: Callable[[], float] = time.time) -> None:
        self.config, self.run, self.clock = config, run, clock
        self.service = str(config["service"])
        self.base = Path(config["services"], self.service)
        self.path = Path(config["state"], "state.json")
        self.state = read_json(self.path)
        self.state.setdefault("restarts", [])
        self.state.setdefault("starts", [])  # of what could not be started: they are never too many
        self.state.setdefault("strikes", 0)
        self.state.setdefault("ends", [])  # times at which it had ended before it had answered
        self.state.setdefault("state", "ok")

    # -- what is there

    def current(self) -> dict[str, Any] | None:
        """The release that serves."""
        state = read_json(self.base / "state.json")
        if state.get("format") != FORMAT:
            return None
        found = [entry for entry in state.get("releases") or [] if entry.get("release") == state.get("current")]
        return found[0] if found else None

    def lock(self) -> int | None:
        """The lock that releases take: its descriptor, or None while somebody holds it."""
        path = Path(self.config["locks"], "%s.lock" % self.service)
        path.parent.mkdir(mode=0o755, exist_ok=True)  # of /run, which a reboot empties
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            return None
        return descriptor

    def released(self) -> bool:
        """Whether a release is under way."""
        descriptor = self.lock()
        if descriptor is None:
            return True
        os.close(descriptor)
        return False

    def cut_off(self) -> bool:
        """Whether a release ended half done, and waits for the next run."""
        return (self.base / "transition.json").exists()

    def container(self, release: dict[str, Any]) -> Container | None:
        name = "%s.%s" % (self.service, release["release"])
        form = "{{.State.Status}} {{.State.StartedAt}} {{.RestartCount}} {{.State.Error}}"
        code, out = self.run(["docker", "container", "inspect", "--format", form, name], DOCKER_TIMEOUT)
        words = out.split(None, 3)
        if code or len(words) < 3:
            return None
        return Container(name, words[0], words[1], int(words[2]), " ".join(words[3:]).strip())

    def ask(self, release: dict[str, Any]) -> Answer:
        """The release's own proof, with the patience of a busy server."""
        health = release.get("health") or {}
        headers = {"User-Agent": "nemo-vllm-watchdog", "Connection": "close"}
        headers.update(health.get("headers") or {})
        body = str(health.get("body") or "").encode() or None
        method, path = str(health.get("method") or "GET"), str(health.get("path") or "/health")
        limit = float(self.config["timeout"])
        connection = http.client.HTTPConnection("127.0.0.1", int(release["host_port"]), timeout=limit)
        try:
            connection.request(method, path, body=body, headers=headers)
            answer = connection.getresponse()
            text = answer.read(1 << 16).decode("utf-8", "replace")
        except OSError as error:
            said = (error.strerror or str(error)).lower()
            said = "is not answered within %g s" % limit if "timed out" in said else "fails: %s" % said
            return Answer(False, "%s %s %s" % (method, path, said))
        except http.client.HTTPException as error:
            return Answer(False, "%s %s fails: %s" % (method, path, type(error).__name__))
        finally:
            connection.close()
        if answer.status == int(health.get("status") or 200) and str(health.get("contains") or "") in text:
            return Answer(True, "")
        line = " ".join(text.split())[:120]
        reason = "%s %s is answered by %d%s" % (method, path, answer.status, ": %s" % line if line else "")
        return Answer(False, reason, 400 <= answer.status < 500 and answer.status not in (408, 429))

    def counted(self, release: dict[str, Any]) -> float | None:
        """Tokens that the engine has generated; None where it does not say."""
        connection = http.client.HTTPConnection("127.0.0.1", int(release["host_port"]), timeout=METRICS_TIMEOUT)
        try:
            connection.request("GET", "/metrics", headers={"Connection": "close"})
            answer = connection.getresponse()
            text = answer.read(1 << 22).decode("utf-8", "replace") if answer.status == 200 else ""
        except (OSError, http.client.HTTPException):
            return None
        finally:
            connection.close()
        found = re.findall(r"^%s(?:\{[^}]*\})? (\S+)" % COUNTER, text, re.MULTILINE)
        try:
            return sum(map(float, found)) if found else None
        except ValueError:
            return None

    # -- what comes of it

    def say(self, state: str, reason: str) -> str:
        """Writes the state down, and returns the line for the journal."""
        now = self.clock()
        if state != self.state["state"] or "since" not in self.state:
            self.state["since"] = utc(now)
        self.state.update(state=state, reason=reason, looked=utc(now))
        self.state["valid_until"] = utc(now + float(self.config["valid"]))
        temporary = self.path.with_suffix(".tmp")
        with temporary.open("w", encoding="utf-8") as stream:
            os.fchmod(stream.fileno(), 0o644)
            json.dump(self.state, stream, indent=2, sort_keys=True)
            stream.write("\n")
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(self.path)
        strikes = ", strike %d of %d" % (self.state["strikes"], self.config["strikes"]) if self.state["strikes"] else ""
        return "%s%s%s" % (state, strikes, ": %s" % reason if reason else "")

    def quiet(self, state: str, why: str) -> str:
        """Nothing is done now; what was given up stays given up."""
        if self.state["state"] == "gave_up":
            return self.say("gave_up", self.state["reason"])
        return self.say(state, why)

    def releasing(self, runs: bool, why: str = "a release is under way") -> str:
        """What was found before says nothing any more, and one that runs is not asked: that is the release's business."""
        self.state["strikes"] = 0
        known = {"failing": "ok", "restarting": "ok"}.get(self.state["state"], self.state["state"])
        return self.quiet(known if runs else "loading", why)

    def clear(self) -> str:
        self.state.update(strikes=0, ends=[], restarts=[], starts=[])
        return self.say("ok", "cleared")

    def recent(self, what: str) -> list[str]:
        """Restarts, starts or ends within the window."""
        since = self.clock() - float(self.config["window"])
        return [entry for entry in self.state[what] if seconds_of(entry) > since]

    def note(self, box: Container) -> None:
        """What its starts say since the last look."""
        boot = BOOT.read_text().strip()
        booted = self.state.get("boot", boot) != boot
        again = box.again > int(self.state.get("again", box.again))
        if again and not self.state.get("proven"):
            self.state["ends"] = [*self.recent("ends"), utc(self.clock())]
            if len(self.state["ends"]) > int(self.config["max_restarts"]):
                self.say("gave_up", "it ended %d times before it had answered" % len(self.state["ends"]))
        self.state.update(again=box.again, boot=boot)
        if booted:
            self.state.update(restarts=[], starts=[])
        if self.state.get("started") == box.started and not booted:
            return
        # Without a boot the restarts within the window count on.
        self.state.update(started=box.started, proven=False, counted=None)
        if booted or not box.again:  # somebody has started it, or this program has
            self.state.update(strikes=0, ends=[])
            if self.state["state"] == "gave_up":
                self.state["state"] = "ok"

    def look(self) -> str:
        release = self.current()
        box = self.container(release) if release else None
        runs = box is not None and box.status == "running"
        if self.released():
            return self.releasing(runs)
        if release is None:
            return self.quiet("down", "no release serves")
        if self.state.get("release") != release["release"]:
            self.state.update(release=release["release"], restarts=[], starts=[], ends=[], again=0, proven=False)
            self.state["state"] = "ok"
        status = box.status if box else "not there"
        if self.cut_off():
            self.state["strikes"] = 0
            why = "a release was cut off, which the next run ends; the container of the one before it is %s" % status
            return self.quiet("ok" if runs else "down", why)
        if box is None:
            return self.quiet("down", "its container is not there")
        self.note(box)
        if box.status in ("exited", "created") and box.error:
            return self.start(release, box)
        if not runs:
            # The engine starts again what dies by itself; what is stopped was stopped by somebody.
            ended = len(self.recent("ends"))
            times = ", and has ended %d times before it answered" % ended if ended else ""
            return self.quiet("down", "its container is %s%s" % (status, times))
        before = self.counted(release)
        answer = self.ask(release)
        if answer.good:
            self.state.update(strikes=0, ends=[], proven=True, counted=self.counted(release))
            return self.say("ok", "")
        after = self.counted(release)
        age = self.clock() - seconds_of(box.started)
        # Its other pages answer from when the model is loaded.
        if after is None and not self.state.get("proven") and age < float(self.config["load_timeout"]):
            return self.quiet("loading", "it has been loading for %d s" % age)
        moved = after is not None and any(
            then is not None and after > then + OWN_TOKENS for then in (before, self.state.get("counted"))
        )
        if after is not None:
            self.state["counted"] = after
        if moved:
            self.state["strikes"] = 0
            return self.quiet("ok", "busy: %s, and it generates tokens meanwhile" % answer.reason)
        if answer.asks_in_vain:
            self.state["strikes"] = 0
            return self.say("failing", "%s; a restart does not mend that" % answer.reason)
        self.state["strikes"] += 1
        if self.state["strikes"] < int(self.config["strikes"]) and self.state["state"] != "gave_up":
            return self.say("failing", answer.reason)
        return self.restart(release, box, answer.reason)

    def restart(self, release: dict[str, Any], box: Container, reason: str) -> str:
        recent = self.recent("restarts")
        self.state["strikes"] = int(self.config["strikes"])
        if self.state["state"] == "gave_up":
            return self.say("gave_up", self.state["reason"])
        if len(recent) >= int(self.config["max_restarts"]):
            tried = "%d restarts within %d s did not help" % (len(recent), self.config["window"])
            return self.say("gave_up", "%s; %s" % (reason, tried if recent else "no restart is allowed"))
        return self.act("restarts", release, box, reason)

    def act(self, what: str, release: dict[str, Any], box: Container, reason: str) -> str:
        """Restarts the container, if it still is what was looked at."""
        unwell = "failing" if box.status == "running" else "down"
        descriptor = self.lock()
        if descriptor is None:
            return self.releasing(box.status == "running")
        try:
            if self.cut_off() or self.current() != release:
                return self.releasing(box.status == "running", "it was released while it was asked")
            there = self.container(release)
            if there is not None and there.started != box.started:
                self.state["strikes"] = 0
            if there != box:
                status = there.status if there else "not to be found"
                now = "loading" if status == "running" else unwell
                return self.say(now, "%s; it was started or has ended meanwhile, and is %s" % (reason, status))
            # Before it is done, so that one that is cut off counts, too.
            self.state[what] = [*self.recent(what), utc(self.clock())]
            holder = {"by": "vllm-watchdog", "since": utc(self.clock()), "pid": os.getpid(), "what": "a restart"}
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(holder).encode(), 0)
            said = self.say("restarting", reason)
            code, out = self.run(["docker", "container", "logs", "--tail", "20", box.name], DOCKER_TIMEOUT)
            if code == 0:
                said += "\nits last lines:\n" + out.rstrip()
            code, out = self.run(
                ["docker", "container", "restart", "--time", str(STOP_SECONDS), box.name], DOCKER_TIMEOUT + STOP_SECONDS
            )
        finally:
            os.close(descriptor)
        self.state["strikes"] = 0
        if code:
            return said + "\n" + self.say(unwell, "it cannot be restarted: %s" % " ".join(out.split())[-200:])
        return said + "\n" + self.say("restarting", "restarted, as %s" % reason)

    def start(self, release: dict[str, Any], box: Container) -> str:
        """One that could not be started, as at a boot before its volume: when what it mounts is there."""
        folder = self.config["mount_point"]
        if folder and not os.path.ismount(folder):
            # systemd mounts no volume that comes after its time at boot
            self.run(["systemctl", "--no-block", "start", folder], DOCKER_TIMEOUT)
            return self.say("down", "it could not be started, and %s is not mounted" % folder)
        mounts = (release.get("settings") or {}).get("mounts") or []
        missing = [mount["source"] for mount in mounts if not Path(mount["source"]).exists()]
        if missing:
            return self.say("down", "it could not be started, and %s is not there" % ", ".join(missing))
        reason = "it could not be started: %s" % box.error
        strikes = int(self.config["strikes"])
        self.state["strikes"] = min(self.state["strikes"] + 1, strikes)
        if self.state["strikes"] < strikes:
            return self.say("down", reason)
        tried, quick = self.recent("starts"), int(self.config["max_restarts"])
        if not quick:
            return self.say("down", "%s; no restart is allowed" % reason)
        # A card may come back at any time.
        if len(tried) >= quick and self.clock() < seconds_of(tried[-1]) + float(self.config["window"]) / quick:
            return self.say("down", "%s; last tried at %s" % (reason, tried[-1]))
        return self.act("starts", release, box, reason)


def main(arguments: Sequence[str]) -> int:
    config = read_json(Path(arguments[0])) if arguments else {}
    if not config or arguments[1:] not in ([], ["--clear"]):
        print(__doc__, file=sys.stderr)
        return 2
    Path(config["state"]).mkdir(mode=0o755, parents=True, exist_ok=True)
    watchdog = Watchdog(config)
    print(watchdog.clear() if arguments[1:] else watchdog.look())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
