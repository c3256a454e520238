# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A pull that says how far it is, ends when it hangs, and is tried again from the layers that are there.

Standard library only and Python 3.9 syntax, because this runs on managed hosts.
"""

from __future__ import annotations

import codecs
import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Mapping, Sequence
from typing import Any, Callable

from ansible_collections.nemo.platform.plugins.module_utils.background import WorkError
from ansible_collections.nemo.platform.plugins.module_utils.container_release import (
    Docker,
    ReleaseError,
    architecture,
    classify,
    last_line,
)
from ansible_collections.nemo.platform.plugins.module_utils.progress import Pace, Progress, amount, duration

PROGRESS_SECONDS = 5.0
PAUSE = 2.0
INSPECT_SECONDS = 20
# Failures of the way to the registry, which another try may not meet.
PASSING = ("registry_unreachable", "pull_stalled")
DOWNLOADED = ("Verifying Checksum", "Download complete", "Extracting", "Pull complete", "Already exists")
_LAYER = re.compile(r"^([0-9a-f]{12}): ([A-Z][a-z]+(?: [A-Za-z]+)*)(.*)$")
_AMOUNTS = re.compile(r"([\d.]+) ?([kMGT]?B)/([\d.]+) ?([kMGT]?B)")
_CODES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_UNITS = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}


def run_program(argv: Sequence[str], seconds: float = 120) -> tuple[int, str, str]:
    try:
        done = subprocess.run(
            list(argv), env=dict(os.environ, LC_ALL="C"), stdin=subprocess.DEVNULL, capture_output=True,
            timeout=seconds, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return 124, "", "no answer within %d s" % seconds
    except OSError as error:
        return 127, "", "%s: %s" % (argv[0], error.strerror)
    return done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")


def compressed_size(reference: str, run: Callable[[Sequence[str], float], tuple[int, str, str]], machine: str) -> int:
    """Bytes that a pull of all its layers brings, as the registry's manifest says; 0 where it does not say."""
    for _level in range(2):
        rc, out, _err = run(["docker", "manifest", "inspect", reference], INSPECT_SECONDS)
        try:
            data = json.loads(out) if not rc else {}
            layers = data.get("layers") or []
            if layers:
                return sum(int(layer["size"]) for layer in layers)
            fitting = [
                entry["digest"] for entry in data.get("manifests") or []
                if entry["platform"]["os"] == "linux" and entry["platform"]["architecture"] == machine
            ]  # fmt: skip
        except (ValueError, KeyError, TypeError, AttributeError):
            return 0
        if not fitting:
            return 0
        reference = "%s@%s" % (re.sub(r"(@.*|:[^/:]*)$", "", reference), fitting[0])
    return 0


class Layers:
    """What docker's lines tell about the layers of a pull."""

    def __init__(self) -> None:
        self.states: dict[str, str] = {}
        self.got: dict[str, float] = {}
        self.sizes: dict[str, float] = {}

    def read(self, line: str) -> None:
        found = _LAYER.match(_CODES.sub("", line).strip())
        if not found:
            return
        layer, state, rest = found.groups()
        self.states[layer] = state
        amounts = _AMOUNTS.search(rest)
        if amounts:
            got, unit, size, size_unit = amounts.groups()
            self.sizes[layer] = float(size) * _UNITS[size_unit]
            if state == "Downloading":
                self.got[layer] = float(got) * _UNITS[unit]
        if state in DOWNLOADED and layer in self.sizes:
            self.got[layer] = self.sizes[layer]

    @property
    def done(self) -> int:
        return sum(1 for state in self.states.values() if state in ("Pull complete", "Already exists"))

    @property
    def bytes(self) -> int:
        return int(sum(self.got.values()))

    def text(self, pace: Pace, total: int) -> str:
        words = "%d of %d layers ready" % (self.done, len(self.states))
        known = int(sum(self.sizes.values()))
        if self.bytes and self.bytes < known:
            words += ", downloaded %s" % pace.text(self.bytes, max(total, known))
        elif known:
            words += ", downloaded %s, unpacking" % amount(self.bytes)
        return words


class Pull:
    """One image, by the docker command."""

    def __init__(
        self,
        reference: str,
        progress: Progress,
        descriptors: Callable[[], Sequence[int]],
        timeout: float,
        stall_timeout: float,
        retries: int,
        total: int,
    ) -> None:
        self.reference = reference
        self.progress = progress
        self.descriptors = descriptors  # of the lock: a docker command that outlives a killed worker keeps it
        self.limit = time.monotonic() + timeout
        self.timeout = timeout
        self.stall_timeout = stall_timeout
        self.retries = retries
        self.total = total

    def run(self) -> None:
        size = " (%s compressed)" % amount(self.total) if self.total else ""
        self.progress.say("pulling %s%s" % (self.reference, size))
        begun = time.monotonic()
        for further in range(self.retries, -1, -1):
            try:
                self._once()
                break
            except WorkError as error:
                if error.reason not in PASSING or not further:
                    raise
                pause = PAUSE * 2 ** (self.retries - further)
                self.progress.say("%s; next try in %s" % (error.text, duration(pause)))
                time.sleep(pause)
        self.progress.say("pulled in %s" % duration(time.monotonic() - begun))

    def _once(self) -> None:
        # On a terminal docker tells bytes, and without one only the names of layers.
        terminal, end = pty.openpty()
        fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 200, 0, 0))
        try:
            command = subprocess.Popen(
                ["docker", "pull", self.reference], env=dict(os.environ, LC_ALL="C"),
                stdin=subprocess.DEVNULL, stdout=end, stderr=subprocess.PIPE, pass_fds=list(self.descriptors()),
            )  # fmt: skip
        finally:
            os.close(end)
        assert command.stderr
        try:
            said = self._follow(terminal, command.stderr.fileno())
            rc = command.wait(timeout=30)
        finally:
            if command.poll() is None:
                command.send_signal(signal.SIGINT)  # the engine ends its part of the pull with the command
                try:
                    command.wait(timeout=10)
                except subprocess.TimeoutExpired:
                    command.kill()
                    command.wait()
            command.stderr.close()
            os.close(terminal)
        if rc:
            raise WorkError(classify(said), "%s cannot be pulled: %s" % (self.reference, last_line(said)))

    def _follow(self, terminal: int, errors: int) -> str:
        """Read both streams until they end; what was said on the one for errors."""
        layers, pace = Layers(), Pace()
        decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        text, said = "", b""
        heard = told = time.monotonic()
        streams = {terminal, errors}
        while streams:
            ready, _write, _except = select.select(list(streams), [], [], 1.0)
            now = time.monotonic()
            for stream in ready:
                try:
                    block = os.read(stream, 1 << 16)
                except OSError:  # a terminal whose other end was closed
                    block = b""
                if not block:
                    streams.discard(stream)
                elif stream == errors:
                    said += block
                else:
                    heard = now
                    lines = re.split(r"[\r\n]+", text + decode(block))
                    text = lines.pop()
                    for line in lines:
                        layers.read(line)
            pace.note(now, layers.bytes)
            if now - told >= PROGRESS_SECONDS and layers.states:
                self.progress.say(layers.text(pace, self.total))
                told = now
            if now - heard > self.stall_timeout:
                raise WorkError("pull_stalled", "nothing came for %s" % duration(self.stall_timeout))
            if now > self.limit:
                raise WorkError(
                    "pull_timeout", "pulling %s took more than %s" % (self.reference, duration(self.timeout))
                )
        return said.decode(errors="replace")


class Image:
    """One image on this host."""

    def __init__(self, docker: Docker, repository: str, tag: str, digest: str) -> None:
        self.docker = docker
        self.repository = repository
        self.digest = digest
        self.reference = "%s@%s" % (repository, digest) if digest else "%s:%s" % (repository, tag)

    def look(self) -> dict[str, Any] | None:
        """What the engine says of it, None where it is not here. An image that was loaded from a file has no digest of a registry."""
        return self.docker.image(self.reference) or (self.docker.image(self.digest) if self.digest else None)

    def check_platform(self, image: Mapping[str, Any], info: Mapping[str, Any]) -> None:
        built = "%s/%s" % (image.get("Os", "linux"), architecture(image.get("Architecture", "")))
        here = "%s/%s" % (info.get("OSType", "linux"), architecture(info.get("Architecture", "")))
        if built != here:
            raise ReleaseError("platform", "%s is built for %s, this host is %s" % (self.reference, built, here))

    def resolved(self, image: Mapping[str, Any]) -> str:
        for entry in image.get("RepoDigests") or []:
            repository, _at, digest = entry.rpartition("@")
            if repository == self.repository:
                return str(digest)
        return self.digest or str(image["Id"])
