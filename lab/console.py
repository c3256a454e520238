"""What the lab tells the person at the keyboard: every step with its time, errors that say what to do."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator

_START = time.monotonic()


class LabError(Exception):
    """Something the user has to know; the text says what to do about it."""


def say(text: str) -> None:
    """One line of progress, with the seconds since the start."""
    # One write with its newline: steps run beside each other.
    print(f"[lab {time.monotonic() - _START:5.1f}s] {text}\n", file=sys.stderr, end="", flush=True)


@contextlib.contextmanager
def step(text: str) -> Iterator[None]:
    """Announce a step that takes a while, and say how long it took."""
    say(f"{text} ...")
    start = time.monotonic()
    yield
    say(f"{text}: {time.monotonic() - start:.1f} s")
