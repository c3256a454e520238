"""The command nemo-workspace: which revisions of the project are on this Bastion, and going back to one (root)."""

from __future__ import annotations

import argparse
import datetime
import fcntl
import json
import os
import pathlib
import sys
from typing import Any

WORKSPACE = pathlib.Path(os.environ.get("NEMO_WORKSPACE_PATH", "/opt/nemo/workspace"))


class CannotUse(Exception):
    """The revision cannot be the current one; the text says why."""


def record(release: pathlib.Path) -> dict[str, Any]:
    try:
        found = json.loads((release / "REVISION").read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def current() -> str:
    try:
        return (WORKSPACE / "current").readlink().name
    except OSError:
        return ""


def releases() -> list[pathlib.Path]:
    """The one that was current last comes first."""
    found = [path for path in (WORKSPACE / "releases").iterdir() if path.suffix != ".new" and record(path)]
    return sorted(found, key=lambda path: path.stat().st_mtime_ns, reverse=True)


def is_usable(release: pathlib.Path) -> bool:
    environment = release / "environment"
    return (environment / "complete").exists() and (environment / "bin/python3").exists()


def show() -> None:
    for release in releases():
        used = datetime.datetime.fromtimestamp(release.stat().st_mtime, datetime.UTC).strftime("%Y-%m-%d %H:%MZ")
        notes = ["current"] if release.name == current() else []
        notes += [] if is_usable(release) else ["its Python environment is gone"]
        print(f"{release.name}  {used}  {', '.join(notes)}".rstrip())


def use(revision: str) -> None:
    release = WORKSPACE / "releases" / revision
    if release.parent != WORKSPACE / "releases" or record(release).get("revision") != revision:
        raise CannotUse(f"there is no revision {revision}; there are: {', '.join(path.name for path in releases())}")
    if not is_usable(release):
        raise CannotUse(
            f"the Python environment of {revision} is gone: run the role operations_workspace with"
            f" operations_workspace_revision={revision}"
        )
    with (WORKSPACE / ".lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.seek(0)
            raise CannotUse(f"another run works on {WORKSPACE}: {lock.read().strip()}") from None
        before = current()
        if before != revision:
            os.utime(release)
            draft = WORKSPACE / "current.new"
            draft.unlink(missing_ok=True)
            draft.symlink_to(f"releases/{revision}")
            draft.rename(WORKSPACE / "current")
    print(
        f"{revision} is current"
        + (f", {before} was; the next run of the role brings the controller's" if before != revision else "")
    )


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="nemo-workspace", description="Revisions of the project on this Bastion.")
    commands = parser.add_subparsers(dest="what", required=True)
    commands.add_parser("list", help="the revisions that are here, the one that was used last first")
    going = commands.add_parser("use", help="go to a revision that is here (root); runs that are under way keep theirs")
    going.add_argument("revision")
    arguments = parser.parse_args(words)
    try:
        if arguments.what == "list":
            show()
        elif os.geteuid() != 0 and not os.access(WORKSPACE, os.W_OK):
            raise CannotUse("only root switches the revision: sudo /usr/local/bin/nemo-workspace use REVISION")
        else:
            use(arguments.revision)
    except CannotUse as error:
        print(f"nemo-workspace: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"nemo-workspace: {error.filename}: {error.strerror}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
