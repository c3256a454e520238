# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Where a rollback goes: to one image on all hosts, or nowhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ansible_collections.nemo.platform.plugins.module_utils.release_follow import INTERRUPTED

DOCUMENTATION = r"""
name: rollback_plan
short_description: Which release each host of a service goes back to, the same image everywhere
version_added: 0.2.0
author: The nemo platform project (@nemo-platform)
description:
  - Puts what the hosts of a service run and have kept beside each other, so that a rollback sends no two of them to different images.
  - Without a name it is the release before; where a run was killed in the middle of a release, it is the one which that was to replace,
    and where it was killed at the end of a rollback, what that led to.
  - That is refused where the hosts do not run one image, do not have the same one to go back to, are being worked on, or where the
    last release failed, before it began or after that, as what serves is the one before it.
options:
  _input:
    description: Name of each host to what M(nemo.platform.container_release_info) returned for it as C(services).
    type: dict
    required: true
  release:
    description:
      - Id, tag or digest of a kept release; empty for the release before.
      - Each host has ids of its own. The one of a host stands for its image on the others, where that is one release or what serves.
      - Where not all hosts run it, or it is the id of what serves on one of them, those that run its image keep what they run.
    type: str
    default: ""
"""

EXAMPLES = r"""
- name: One target for all
  ansible.builtin.debug:
    msg: "{{ {'one': what_runs.services} | nemo.platform.rollback_plan }}"
    # {"problem": "", "releases": {"one": "20250718T014102Z-5f3a9c"}}
"""

RETURN = r"""
_value:
  description: Why there is no rollback as C(problem), empty where there is one; name of each host to what it goes back to as C(releases).
  type: dict
"""


def image_of(entry: Mapping[str, Any]) -> str:
    """A release in words that are the same on all hosts."""
    return f"{entry['tag']} ({entry['digest'][:19]})" if entry.get("tag") else "nothing"


def way_out(have: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """What there is to ask for by name: digests, as one tag may be that of several releases."""
    good = [[entry for entry in entries if entry.get("digest") and not entry.get("left")] for entries in have.values()]
    everywhere = set.intersection(*({entry["digest"] for entry in entries} for entries in good))
    running = {entries[0].get("digest") for entries in have.values()}
    names = [
        f"-e release={entry['digest']} ({entry['tag']})"
        for entry in good[0]
        if entry["digest"] in everywhere and {entry["digest"]} != running
    ]
    if not names:
        return "they have no other release in common, so deploy one: playbooks/deploy.yml"
    return f"to go back all the same, name what all of them get: {' or '.join(dict.fromkeys(names))}"


def by_host(said: Mapping[str, str]) -> str:
    return ", ".join(f"{text} on {host}" for host, text in sorted(said.items()))


def problem_before(services: Mapping[str, Mapping[str, Any]], before: Mapping[str, Mapping[str, Any]]) -> str:
    """Why going back to the release before is not what anybody can want."""
    for host, service in sorted(services.items()):
        if service.get("under_way") and not service["under_way"].startswith(INTERRUPTED):
            return f"a release is under way on {host}: {service['under_way']}"
    running = {host: image_of(service) for host, service in services.items()}
    if len(set(running.values())) > 1:
        return f"its hosts do not run one release: {by_host(running)}"
    for host, service in sorted(services.items()):
        last = (service.get("history") or [{}])[0]
        if last.get("result") == "failed" and before[host] is not service:
            text = "the last %s on %s, of %s, failed at %s [%s]: %s serves"
            return text % (last["kind"], host, last["tag"], last["at"], last["reason"], service["tag"] or "nothing")
    behind = {host: image_of(entry) for host, entry in before.items()}
    if len(set(behind.values())) > 1:
        return f"its hosts have not the same release to go back to: {by_host(behind)}"
    return ""


def rollback_plan(found: Mapping[str, Sequence[Mapping[str, Any]]], release: str = "") -> dict[str, Any]:
    """Return the problem, or what each host goes back to."""
    services = {host: entries[0] if entries else {} for host, entries in found.items()}
    have = {host: [service, *(service.get("kept") or [])] for host, service in services.items()}
    if not release:
        # By a run that was killed: undone, or done but for what it has to clear away.
        done = any(service.get("begun") in ("release", "rolled_back") for service in services.values())
        before: dict[str, Mapping[str, Any]] = {
            host: entries[0] if done else next((entry for entry in entries[1:] if not entry["left"]), {})
            for host, entries in have.items()
        }
        problem = problem_before(services, before)
        problem = f"{problem}; {way_out(have)}" if problem else ""
        return {"problem": problem, "releases": {host: entry.get("release", "") for host, entry in before.items()}}
    ids = {entry["release"]: entry["digest"] for entries in have.values() for entry in entries if entry.get("release")}
    image = ids.get(release, release)
    named = {
        host: [
            entry
            for entry in entries
            if release == entry.get("release") or image in (entry.get("tag"), entry.get("digest"))
        ]
        for host, entries in have.items()
    }
    without = {
        host: ", ".join(image_of(entry) for entry in service.get("kept") or []) or "none"
        for host, service in services.items()
        # the release that a killed run began is known to the module alone
        if not named[host] and not service.get("under_way")
    }
    problem = f"release {release} is not on all of its hosts; kept are: {by_host(without)}" if without else ""
    digests = {entry["digest"] for entries in named.values() for entry in entries}
    if len(digests) > 1:
        problem = f"{release} is more than one image; name its digest: {', '.join(sorted(digests))}"
    runs = {host: service["release"] for host, service in services.items() if service in named[host]}
    # With a tag or digest that all of them run they want to get away from it.
    stay = runs if len(runs) < len(services) or release in runs.values() else {}
    own = {host: release for host, entries in named.items() if release in [entry["release"] for entry in entries]}
    several = {
        host: " or ".join(entry["release"] for entry in entries)
        for host, entries in named.items()
        if release in ids and host not in {**stay, **own} and len(entries) > 1
    }
    if several and not problem:  # of one image with other settings or secrets
        problem = f"release {release} is of an image of which there are {by_host(several)}; name one for each host, with --limit"
    return {"problem": problem, "releases": {**dict.fromkeys(services, image), **stay, **own}}


class FilterModule:
    """The filters of this file."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Name and function of each filter."""
        return {"rollback_plan": rollback_plan}
