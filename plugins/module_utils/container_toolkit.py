# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What stands between an NVIDIA card and a container on one host: packages, CDI specification, the engine's runtime.

Standard library alone and Python 3.9 syntax, because modules take it to managed hosts; without Ansible, because programs
that stay on a host are made of it, too. It only looks: nothing on the host changes.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from typing import Any, Callable

Runner = Callable[[Sequence[str]], "tuple[int, str, str]"]

PACKAGES = (
    "libnvidia-container1",
    "libnvidia-container-tools",
    "nvidia-container-toolkit-base",
    "nvidia-container-toolkit",
)
# What nvidia-cdi-refresh.service keeps, and what engines prefer to a file of that name below /etc/cdi.
CDI = "/var/run/cdi/nvidia.yaml"
VERSIONLOCK = "etc/dnf/plugins/versionlock.list"

_LIBRARY = re.compile(r"/lib(?:cuda|nvidia-ml)\.so\.(\d+(?:\.\d+)+)")
# YAML and JSON; containerPath is what a container sees, and says nothing of the host
_HOST_PATH = re.compile(r"""(?m)^[\s\-{]*["']?(?:hostPath|path)["']?\s*:\s*["']?(/[^"'\s,}]+)""")


class EngineError(Exception):
    """The engine does not answer; the text says why."""


def packages(run: Runner, root: str = "/", names: Iterable[str] = PACKAGES) -> dict[str, dict[str, Any]]:
    """Those packages that are installed, by name: `version` and whether it is `held`."""
    wanted = list(names)
    shown = "${db:Status-Want} ${db:Status-Status} ${Package} ${Version}\n"
    code, out, _err = run(["dpkg-query", "--show", f"--showformat={shown}", *wanted])
    if code != 127:
        rows = [line.split() for line in out.splitlines()]
        return {
            row[2]: {"version": row[3], "held": row[0] == "hold"}
            for row in rows
            if len(row) == 4 and row[1] == "installed"
        }
    _code, out, _err = run(["rpm", "--query", "--queryformat", "%{NAME} %{VERSION}-%{RELEASE}\n", *wanted])
    locks = versionlocks(root)
    found = {}
    for line in out.splitlines():
        name, _space, version = line.partition(" ")
        if name in wanted:  # rpm says of others, on this channel, that they are not installed
            found[name] = {"version": version, "held": any(locks_package(lock, name, version) for lock in locks)}
    return found


def versionlocks(root: str = "/") -> list[str]:
    """The lines of dnf's list of locks, comments among them."""
    try:
        with open(os.path.join(root, VERSIONLOCK), encoding="utf-8", errors="replace") as stream:
            return stream.read().splitlines()
    except OSError:
        return []


def locks_package(lock: str, name: str, version: str) -> bool:
    """Whether a line of that list (NAME-[EPOCH:]VERSION-RELEASE.*) holds a package at this version."""
    return re.match(rf"{re.escape(name)}-(?:\d+:)?{re.escape(version)}(?:[.]|$)", lock.strip()) is not None


def cdi_problem(driver: str, root: str = "/", path: str = CDI) -> str:
    """Why the CDI specification does not fit the host; nothing when it does. `driver`: version of the driver's libraries."""
    try:
        with open(os.path.join(root, path.lstrip("/")), encoding="utf-8", errors="replace") as stream:
            text = stream.read()
    except OSError:
        return f"there is no CDI specification {path}"
    made_for = sorted(set(_LIBRARY.findall(text)))
    if not made_for:
        return f"the CDI specification {path} names no library of the driver"
    if driver and made_for != [driver]:
        return f"the CDI specification {path} is for the driver {', '.join(made_for)}, the host's is {driver}"
    for named in sorted(set(_HOST_PATH.findall(text))):
        if not os.path.lexists(os.path.join(root, named.lstrip("/"))):
            return f"the CDI specification {path} names {named}, which is not there"
    return ""


def engine(run: Runner) -> dict[str, Any]:
    """What the Docker Engine says of itself."""
    code, out, err = run(["docker", "info", "--format", "{{json .}}"])
    if code == 127:
        raise EngineError("there is no Docker Engine")
    try:
        told = json.loads(out) if code == 0 else None
    except ValueError:
        told = None
    # A client without its daemon ends with 0, and tells of itself alone.
    if not isinstance(told, dict) or not told.get("ServerVersion"):
        said = " ".join(
            ((told or {}).get("ServerErrors") or [err.strip() or out.strip() or f"status {code}"])[0].split()
        )
        raise EngineError(f"the Docker Engine does not answer: {said}")
    return told
