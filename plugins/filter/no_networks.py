# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Filter: what among networks is none."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Sequence
from typing import Any

DOCUMENTATION = r"""
name: no_networks
short_description: What among networks is none
version_added: 0.1.0
author: The nemo platform project (@nemo-platform)
description:
  - Picks what is no IPv4 or IPv6 network in CIDR notation. Bits of the host may be set; scopes are not allowed.
options:
  _input:
    description: What ought to be networks.
    type: list
    elements: str
    required: true
"""

EXAMPLES = r"""
- name: Refuse what is no network
  ansible.builtin.assert:
    that: sources | nemo.platform.no_networks | length == 0
    fail_msg: "no networks: {{ sources | nemo.platform.no_networks | join(', ') }}"
  vars:
    sources: [10.0.3.0/24, "::1/128"]
"""

RETURN = r"""
_value:
  description: Those that are none, as they were.
  type: list
  elements: str
"""


def is_network(text: str) -> bool:
    """Whether it is one in CIDR notation."""
    try:
        ipaddress.ip_network(text, strict=False)
    except ValueError:
        return False
    return text.partition("/")[2].isdecimal() and "%" not in text


def no_networks(entries: Sequence[Any]) -> list[Any]:
    """The filter."""
    return [entry for entry in entries if not is_network(str(entry))]


class FilterModule:
    """The filter's name."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """What this file brings."""
        return {"no_networks": no_networks}
