# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Lookup: does this machine own an address."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Mapping
from typing import Any

from ansible.errors import AnsibleLookupError
from ansible.plugins.lookup import LookupBase

DOCUMENTATION = r"""
name: is_local_address
short_description: Whether the controller itself has an IP address
version_added: 0.1.0
author: The nemo platform project (@nemo-platform)
description:
  - Tells whether any of the given addresses belongs to a network interface of the machine that Ansible runs on.
  - The kernel is asked which source address it would use to reach the address; no packet is sent.
options:
  _terms:
    description: IPv4 or IPv6 addresses. Empty ones are passed over.
    type: list
    elements: str
    required: true
"""

EXAMPLES = r"""
- name: Say whether Ansible runs on the Bastion
  ansible.builtin.debug:
    msg: "{{ lookup('nemo.platform.is_local_address', '10.0.1.10') }}"
"""

RETURN = r"""
_raw:
  description: One element, C(true) when this machine has one of the addresses.
  type: list
  elements: bool
"""


def is_local_address(address: str) -> bool:
    """Whether an interface of this machine has the address; ValueError when it is no address."""
    ip = ipaddress.ip_address(address)
    if ip.is_unspecified or ip.is_multicast:
        return False
    family = socket.AF_INET6 if ip.version == 6 else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            # bind() alone would say yes to anything where net.ipv4.ip_nonlocal_bind is on
            probe.bind((str(ip), 0))
            probe.connect((str(ip), 9))
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((str(ip), 9))
            return ipaddress.ip_address(probe.getsockname()[0]) == ip
    except OSError:
        return False


class LookupModule(LookupBase):
    """The lookup."""

    def run(self, terms: list[Any], variables: Mapping[str, Any] | None = None, **kwargs: Any) -> list[bool]:
        """One element: whether any of the terms is an address of this machine."""
        addresses = [str(term) for term in self._flatten(terms) if term]
        try:
            return [any(is_local_address(address) for address in addresses)]
        except ValueError as error:
            raise AnsibleLookupError(f"is_local_address: {error}") from error
