# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a long action says while it works: one line for each event, in a file that whoever waits can follow.

Standard library only and Python 3.9 syntax, because this runs on managed hosts.
"""

from __future__ import annotations

import os

FOLDER = "progress"
LIMIT_BYTES = 1 << 20  # a file that has grown beyond this begins anew


class Progress:
    """``<run_path>/progress/<name>``. Saying something never fails: the work matters more than its report."""

    def __init__(self, name: str, run_path: str = "/run/nemo") -> None:
        self.path = os.path.join(run_path, FOLDER, name)

    def say(self, text: str) -> None:
        line = " ".join(text.split()) + "\n"
        try:
            os.makedirs(os.path.dirname(self.path), mode=0o755, exist_ok=True)
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        except OSError:
            return
        try:
            status = os.fstat(descriptor)
            if status.st_mode & 0o777 != 0o644:
                os.fchmod(descriptor, 0o644)  # whatever the umask is: operators read it without root
            if status.st_size > LIMIT_BYTES:
                os.ftruncate(descriptor, 0)
            os.write(descriptor, line.encode("utf-8", "replace"))
        except OSError:
            pass
        finally:
            os.close(descriptor)

    def last(self) -> str:
        """The last line, empty where nothing was said."""
        try:
            with open(self.path, "rb") as stream:
                stream.seek(0, os.SEEK_END)
                stream.seek(max(stream.tell() - 4096, 0))
                lines = stream.read().decode("utf-8", "replace").splitlines()
        except OSError:
            return ""
        return lines[-1] if lines else ""


def amount(size: float) -> str:
    """A number of bytes for people, in the units that disks and networks are sold in."""
    for unit, factor, digits in (("GB", 1e9, 1), ("MB", 1e6, 1 if size < 1e7 else 0)):
        if size >= factor:
            return "%.*f %s" % (digits, size / factor, unit)
    return "%.0f kB" % (size / 1e3) if size >= 1e3 else "%d B" % size


def duration(seconds: float) -> str:
    """A number of seconds for people."""
    whole = int(seconds + 0.5)
    if whole < 60:
        return "%d s" % whole
    if whole < 3600:
        return "%d min %d s" % divmod(whole, 60)
    return "%d h %d min" % (whole // 3600, whole % 3600 // 60)


class Pace:
    """How fast it goes, over the last moments, and how long the rest takes at that pace."""

    WINDOW = 20.0

    def __init__(self) -> None:
        self._seen: list[tuple[float, int]] = []

    def note(self, now: float, done: int) -> None:
        if self._seen and done < self._seen[-1][1]:
            self._seen = []  # something begins again
        self._seen.append((now, done))
        while len(self._seen) > 2 and now - self._seen[1][0] >= self.WINDOW:
            del self._seen[0]

    @property
    def rate(self) -> float:
        """Bytes a second; 0 where nothing can be said yet."""
        if len(self._seen) < 2 or self._seen[-1][0] <= self._seen[0][0]:
            return 0.0
        return (self._seen[-1][1] - self._seen[0][1]) / (self._seen[-1][0] - self._seen[0][0])

    def text(self, done: int, total: int) -> str:
        words = "%s of %s" % (amount(done), amount(total))
        if self.rate > 0:
            words += ", %s/s, %s left" % (amount(self.rate), duration(max(total - done, 0) / self.rate))
        return words
