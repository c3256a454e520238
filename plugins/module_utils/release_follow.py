# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Whether the newest image of a service is released by itself, and where. Pure functions on what hosts and registry say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ansible_collections.nemo.platform.plugins.module_utils.release_flow import newer, outlasts

INTERRUPTED = "interrupted"  # what container_release_info says of a release that nobody is at work on


class Plan(NamedTuple):
    """On which hosts to release (none: nothing to do), and why, in one line."""

    hosts: list[str]
    why: str


def plan(newest: Mapping[str, Any], found: Mapping[str, Sequence[Mapping[str, Any]]], held: str = "") -> Plan:
    """What an operator would do who is careful: nothing that failed, that somebody holds, or that somebody works on."""
    tag, digest = newest["tag"], newest["digest"]
    running = {host: services[0] for host, services in sorted(found.items()) if services and services[0].get("release")}
    if held:
        return Plan([], f"the inventory holds it at {held}")
    if not running:
        return Plan([], "it was never released; site.yml does that first")
    for host, service in running.items():
        if service.get("pinned"):
            return Plan([], f"pinned on {host}: {service['pinned']}")
        if service.get("under_way") and not service["under_way"].startswith(INTERRUPTED):
            return Plan([], f"under way on {host}: {service['under_way']}")
        if service.get("intent") == "deploy" and not newer(service["tag"], tag) and outlasts(service["tag"], tag):
            return Plan(
                [], f"{service['tag']} runs on {host}, which {service['by']} deployed and no rule compares with {tag}"
            )
    behind = [
        host
        for host, service in running.items()
        if (service["tag"], service["digest"]) != (tag, digest) and not newer(service["tag"], tag)
    ]
    if not behind:
        return Plan([], f"{', '.join(sorted({service['tag'] for service in running.values()}))} runs already")
    for host, service in running.items():
        for failure in service.get("failed") or []:
            if failure["tag"] == tag:
                return Plan([], f"{tag} failed on {host} before ({failure['at']}, [{failure['reason']}])")
    before = ", ".join(sorted({running[host]["tag"] for host in behind}))
    return Plan(behind, f"{tag} is newer than {before}" if before != tag else f"{tag} was pushed again")
