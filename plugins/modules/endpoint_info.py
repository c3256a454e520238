#!/usr/bin/python
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Module: where the names of endpoints lead from this host, and whether anything answers there."""

from __future__ import annotations

DOCUMENTATION = r"""
module: endpoint_info
short_description: Where the names of endpoints lead from a host, and whether anything answers there
version_added: "0.1.0"
author: The nemo platform project (@nemo-platform)
description:
  - Looks up the name of each endpoint as the host itself does, compares the addresses with those that are expected, and
    opens a TCP connection.
  - What is wrong is a warning and stands in the result; the task does not fail. Sends nothing over the connection.
options:
  endpoints:
    description: The endpoints to look at.
    type: list
    elements: dict
    required: true
    suboptions:
      url:
        description: URL of the endpoint. The port is 443 for C(https) and 80 for C(http) unless the URL has one.
        type: str
        required: true
      private:
        description: Whether the name must lead to addresses inside O(networks).
        type: bool
        default: false
  networks:
    description:
      - What counts as inside, such as the address range of a VPC.
      - Without any, every private address does.
    type: list
    elements: str
    default: []
  timeout:
    description: Seconds that a connection may take.
    type: float
    default: 3
attributes:
  check_mode:
    description: Nothing is changed in any mode.
    support: full
  diff_mode:
    description: There is nothing to show.
    support: none
"""

EXAMPLES = r"""
- name: The cluster's private endpoint can be used from here
  nemo.platform.endpoint_info:
    endpoints:
      - url: https://0123456789ABCDEF.gr7.ap-northeast-2.eks.amazonaws.com
        private: true
    networks: [10.0.0.0/16]
"""

RETURN = r"""
endpoints:
  description: One entry for each of O(endpoints).
  returned: success
  type: list
  elements: dict
  contains:
    url:
      description: The endpoint.
      type: str
    addresses:
      description: What its name leads to.
      type: list
      elements: str
      sample: [10.0.3.10]
    problem:
      description: What is wrong, in one line; empty when nothing is.
      type: str
"""

import ipaddress
import socket
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from ansible.module_utils.basic import AnsibleModule


def look_up(name: str, port: int) -> list[str]:
    """The addresses of a name, as every program of this host gets them."""
    found = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def connect(address: str, port: int, timeout: float) -> None:
    """Open a connection and close it."""
    socket.create_connection((address, port), timeout=timeout).close()


def outside(addresses: Sequence[str], networks: Sequence[str]) -> list[str]:
    """Those that are in none of the networks; without networks, those that are not private."""
    known = [ipaddress.ip_network(network) for network in networks]
    parsed = [ipaddress.ip_address(address.partition("%")[0]) for address in addresses]
    return [
        str(address)
        for address in parsed
        if not (any(address in network for network in known) if known else address.is_private)
    ]


def examine(url: str, private: bool, networks: Sequence[str], timeout: float) -> dict[str, Any]:
    """One endpoint; nothing that can be wrong with it raises."""
    parts = urlsplit(url)
    name, port = parts.hostname or "", parts.port or (80 if parts.scheme == "http" else 443)
    try:
        addresses = look_up(name, port)
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or str(error)
        problem = f"{name} cannot be resolved here ({why}): check DNS support and DNS hostnames of the VPC"
        return {"url": url, "addresses": [], "problem": problem}
    result = {"url": url, "addresses": addresses, "problem": ""}
    away = outside(addresses, networks) if private else []
    if away:
        inside = " or ".join(networks) or "a private network"
        result["problem"] = (
            f"{name} leads to {', '.join(away)}, outside {inside}: its private endpoint is off, or this host does not ask"
            " the VPC's own DNS server"
        )
        return result
    try:
        connect(addresses[0], port, timeout)
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        result["problem"] = (
            f"{name} ({addresses[0]}) does not answer on port {port} ({why}): check the security groups of the endpoint and of"
            " this host"
        )
    return result


def main() -> None:
    """Run the module."""
    endpoint = {"url": {"type": "str", "required": True}, "private": {"type": "bool", "default": False}}
    module = AnsibleModule(
        argument_spec={
            "endpoints": {"type": "list", "elements": "dict", "required": True, "options": endpoint},
            "networks": {"type": "list", "elements": "str", "default": []},
            "timeout": {"type": "float", "default": 3},
        },
        supports_check_mode=True,
    )
    networks = module.params["networks"]
    try:
        outside([], networks)
    except ValueError as error:
        module.fail_json(msg=f"networks: {error}; allowed: address ranges such as 10.0.0.0/16")
    results = [
        examine(entry["url"], entry["private"], networks, module.params["timeout"])
        for entry in module.params["endpoints"]
    ]
    for result in results:
        if result["problem"]:
            module.warn(f"{socket.gethostname()}: {result['problem']}")
    module.exit_json(changed=False, endpoints=results)


if __name__ == "__main__":
    main()
