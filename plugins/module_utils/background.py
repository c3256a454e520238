# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Long work on a host, done by a process that outlives the run, the connection and the controller that wanted it.

One piece of work has one lock, which its worker holds for as long as it lives: the kernel gives it back however the worker
ends. Whoever wants the same work meanwhile waits for that lock, looks again, and finds it done, failed, or left half done
by a worker that was killed, and then goes on with it. What is known of secrets passes by memory alone, through a fork.

Standard library only and Python 3.9 syntax, because this runs on managed hosts.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from typing import Any, Callable, Optional

from ansible_collections.nemo.platform.plugins.module_utils.container_release import Lock, replace_file, utc_now
from ansible_collections.nemo.platform.plugins.module_utils.progress import Progress, duration

Work = Callable[[], None]
Look = Callable[[], Optional[dict[str, Any]]]
RESTARTS = 2  # of workers that were killed, within one run
POLL_SECONDS = 0.25


class WorkError(Exception):
    """What went wrong, in words, and its class."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason
        self.text = " ".join(text.split())


class Background:
    """One piece of work on this host, by its name."""

    def __init__(self, key: str, progress: Progress, run_path: str = "/run/nemo") -> None:
        self.lock = Lock(os.path.join(run_path, "%s.lock" % key))
        self.progress = progress
        self.outcome_path = os.path.join(run_path, "%s.outcome" % key)
        self.killed = 0  # workers that ended without a word while this run waited for them

    def run(
        self, look: Look, prepare: Callable[[], Work], wait: bool, timeout: float, since: float = 0
    ) -> dict[str, Any] | None:
        """What `look` finds when the work is done; None where it goes on in the background.

        `look` says what is there, or None while there is something to do; `prepare` finds what makes the work impossible,
        before anything is changed, and returns it. A worker that has failed since a time (0: none) failed for this run, too.
        Raises WorkError.
        """
        limit = time.monotonic() + timeout
        waited = False
        while True:
            if self.lock.try_acquire():
                found = self._look_alone(look, waited, since)
                if found is not None:
                    return found
                try:
                    self._forget()
                    work = prepare()
                except BaseException:
                    self.lock.release()
                    raise
                self._start(work)
            if not wait:
                self.lock.release()
                return None
            waited = True
            if not self._ended(limit):
                raise WorkError(
                    "timeout",
                    "it is still under way after %s (last: %s), and goes on in the background"
                    % (duration(timeout), self.progress.last() or "nothing said"),
                )

    def _look_alone(self, look: Look, waited: bool, since: float) -> dict[str, Any] | None:
        """With the lock held: what is there; the failure of the worker that this run is about; None to begin."""
        try:
            found = look()
            if found is None and (waited or since):
                outcome = self._outcome() or {}
                if outcome.get("error") and (waited or outcome.get("ended", 0) >= since):
                    raise WorkError(str(outcome["error"]["reason"]), str(outcome["error"]["text"]))
            if found is None and waited:
                self.killed += 1
                if self.killed > RESTARTS:
                    raise WorkError("killed", "its process was ended %d times from outside" % self.killed)
                self.progress.say("its process was ended from outside; another one goes on")
        except BaseException:
            self.lock.release()
            raise
        if found is not None:
            self.lock.release()
        return found

    def _ended(self, limit: float) -> bool:
        """Whether the worker has ended before the time is over."""
        while time.monotonic() < limit:
            if self.lock.try_acquire():
                self.lock.release()
                return True
            time.sleep(POLL_SECONDS)
        return False

    def _outcome(self) -> dict[str, Any] | None:
        try:
            with open(self.outcome_path, encoding="utf-8") as stream:
                data = json.load(stream)
        except (OSError, ValueError):
            return None
        return data if isinstance(data, dict) else None

    def _forget(self) -> None:
        """How the worker before ended is nobody's business any more."""
        try:
            os.unlink(self.outcome_path)
        except FileNotFoundError:
            pass

    def _start(self, work: Work) -> None:
        """The worker, which takes the lock with it."""
        descriptor = self.lock.descriptor
        assert descriptor is not None
        try:
            detach(lambda: self._work(work), keep=descriptor)
        finally:
            self.lock.release()  # here alone: the worker has it now

    def _work(self, work: Work) -> None:
        by = os.environ.get("SUDO_USER") or "root"
        what = os.path.basename(self.progress.path)
        self.lock.sign({"by": by, "since": utc_now(), "pid": os.getpid(), "what": what})
        error: dict[str, str] | None = None
        try:
            work()
        except WorkError as failure:
            error = {"reason": failure.reason, "text": failure.text}
        except Exception as failure:  # a fault of ours must not look like a worker that was killed
            error = {"reason": "internal", "text": "%s: %s" % (type(failure).__name__, failure)}
        if error:
            self.progress.say("failed: %s" % error["text"])
        replace_file(self.outcome_path, json.dumps({"error": error, "ended": time.time()}) + "\n", 0o600)


def detach(work: Work, keep: int) -> None:
    """Do it in a process of its own, in a session of its own, that holds nothing of this one but one descriptor."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        return
    status = 1
    try:
        os.setsid()
        if os.fork() == 0:
            null = os.open(os.devnull, os.O_RDWR)
            for number in (0, 1, 2):
                os.dup2(null, number)
            # A pipe of the connection that stayed open here would keep the run from ending.
            for number in {int(name) for name in os.listdir("/proc/self/fd")} - {0, 1, 2, keep}:
                try:
                    os.close(number)
                except OSError:
                    pass  # the one that listed the folder
            os.chdir("/")
            os.umask(0o022)
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE, signal.SIGCHLD):
                signal.signal(number, signal.SIG_IGN if number == signal.SIGPIPE else signal.SIG_DFL)
            work()
        status = 0
    finally:
        os._exit(status)  # past the clean-up that the parent does itself
