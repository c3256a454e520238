# Copyright: the nemo.platform authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What container_release_info found, in lines that a person reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ansible_collections.nemo.platform.plugins.module_utils.release_flow import RULE

DOCUMENTATION = r"""
name: release_table
short_description: The releases of a host in a few lines
version_added: 0.2.0
author: The nemo platform project (@nemo-platform)
description:
  - Turns what M(nemo.platform.container_release_info) returns into lines to be shown.
options:
  _input:
    description: The services, as that module returns them.
    type: list
    elements: dict
    required: true
  newest:
    description: The newest image of the registry (C(tag), C(digest), C(pushed_at)) by service.
    type: dict
    default: {}
  follows:
    description: What C(nemo-follow --json) says on the Bastion, by service.
    type: dict
    default: {}
"""

EXAMPLES = r"""
- name: Releases
  ansible.builtin.debug:
    msg: "{{ found.services | nemo.platform.release_table({'ai-prod': image}) }}"
"""

RETURN = r"""
_value:
  description: Lines of text.
  type: list
  elements: str
"""

SHOWN = 5  # runs of the past


def in_the_registry(service: Mapping[str, Any], newest: Mapping[str, Any]) -> str:
    """What the registry has that does not run here; nothing where it has nothing else."""
    tag = str(newest["tag"])
    if (tag, newest.get("digest")) == (service["tag"], service["digest"]):
        return ""
    if tag == service["tag"]:
        return f"{tag} was pushed again ({str(newest.get('digest'))[:19]})"
    return f"{tag}, pushed at {newest.get('pushed_at') or '?'}"


def outside_the_rule(tag: str, newest: str) -> bool:
    """Whether a tag is none of the kind that the newest is of."""
    mine, theirs = RULE.match(tag), RULE.match(newest)
    return bool(theirs and not (mine and mine[1] == theirs[1]))


def release_table(
    services: Sequence[Mapping[str, Any]],
    newest: Mapping[str, Mapping[str, Any]] | None = None,
    follows: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[str]:
    """Return the lines."""
    lines: list[str] = []
    for service in services:
        name, tag = service["name"], service["tag"] or "nothing"
        image = (newest or {}).get(name)
        lines.append(
            f"{name} on port {service['port']}: {tag} ({service['digest'][:19]}), {service['health']}, "
            f"since {service['since'] or 'never'} by {service['by'] or 'nobody'}"
        )
        if image and service["tag"] and outside_the_rule(service["tag"], str(image["tag"])):
            lines.append(f"  outside its rule: {service['tag']} is no tag such as {image['tag']}")
        if image and (other := in_the_registry(service, image)):
            lines.append(f"  in the registry: {other}")
        if service["pinned"]:
            lines.append(f"  pinned: {service['pinned']}")
        if name in (follows or {}):
            lines.append(f"  follows the registry: {(follows or {})[name]['text']}")
        if service["under_way"]:
            lines.append(f"  under way: {service['under_way']}")
        for entry in service["kept"]:
            left = ", was left because it was bad" if entry["left"] else ""
            lines.append(f"  kept: {entry['tag']} ({entry['release']}, served since {entry['since'] or '?'}{left})")
        for entry in service["failed"]:
            lines.append(f"  failed: {entry['tag']} at {entry['at']} by {entry['by']} [{entry['reason']}]")
        for entry in service["history"][:SHOWN]:
            lines.append(
                f"  {entry['at']}: {entry['kind']} of {entry['tag']} by {entry['by']}: {entry['result']} in {entry['seconds']} s"
            )
    return lines or ["no service has been released here"]


class FilterModule:
    """The filters of this file."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Name and function of each filter."""
        return {"release_table": release_table}
