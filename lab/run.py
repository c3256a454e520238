"""Commands of this machine, with errors that show what was run and what it said."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence

from lab.console import LabError


def run(
    argv: Sequence[str],
    *,
    stdin: bytes | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float = 600,
    check: bool = True,
) -> subprocess.CompletedProcess[bytes]:
    """Run a command to its end; a failure becomes a LabError with the end of its output."""
    try:
        done = subprocess.run(
            list(argv), input=stdin, env=env, timeout=timeout, capture_output=True, check=False,
            stdin=subprocess.DEVNULL if stdin is None else None,
        )  # fmt: skip
    except FileNotFoundError as error:
        raise LabError(f"{argv[0]} is not installed on this machine") from error
    except subprocess.TimeoutExpired as error:
        raise LabError(f"{' '.join(argv)} gave no result in {timeout:.0f} s") from error
    if check and done.returncode != 0:
        said = (done.stderr + done.stdout).decode(errors="replace").strip().splitlines()[-15:]
        raise LabError(f"{' '.join(argv)} failed with status {done.returncode}:\n  " + "\n  ".join(said))
    return done


def text(argv: Sequence[str], *, check: bool = True, timeout: float = 600) -> str:
    """The standard output of a command, stripped."""
    return run(argv, check=check, timeout=timeout).stdout.decode(errors="replace").strip()
