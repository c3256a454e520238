#!/usr/bin/python
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Module: network flows, tried from a host."""

from __future__ import annotations

DOCUMENTATION = r"""
module: flow_probe
short_description: Try network flows from a host, all at once
version_added: "0.1.0"
author: The nemo platform project (@nemo-platform)
description:
  - Tries each flow from the host it runs on, namely its name, a TCP connection, TLS with the certificate's names and dates,
    and a first exchange in the service's own protocol. Reports what each came to and how long it took.
  - A flow that must be closed is only connected to. One that must be open and fails is tried again O(retries) times.
  - A name that leads out of the networks in O(flows[].within) is a result (V(dns_wrong)), and nothing is sent there.
  - It changes nothing, needs no privileges and nothing but Python. A host that cannot be logged in to, or that has no
    Python, is the result RV(problem) and no failure; M(nemo.platform.flow_report) tells what that means.
options:
  flows:
    description: What to try.
    type: list
    elements: dict
    required: true
    suboptions:
      id:
        description: Comes back with the result.
        type: str
        required: true
      host:
        description: Name or address.
        type: str
        required: true
      port:
        description: TCP port.
        type: int
        required: true
      protocol:
        description:
          - V(tcp) is a connection. V(ssh) reads the daemon's banner. V(tls) is a handshake with a valid certificate.
          - V(http) and V(https) ask for O(flows[].path). V(mysql) reads the greeting and sends a login that is refused,
            as MySQL blocks a host after too many connections without one. V(kafka) asks for ApiVersions.
        type: str
        choices: [tcp, ssh, tls, http, https, mysql, kafka]
        default: tcp
      expect:
        description: Whether it must work.
        type: str
        choices: [open, closed]
        default: open
      path:
        description: Page to ask for.
        type: str
        default: /
      status:
        description: HTTP statuses that are right; empty takes any.
        type: list
        elements: int
        default: []
      days:
        description: Days that the certificate must have left.
        type: int
        default: 0
      within:
        description: Networks (CIDR) in which all addresses of the name must be; empty takes any.
        type: list
        elements: str
        default: []
      server_name:
        description: Name in the certificate, if it is not O(flows[].host).
        type: str
        default: ""
      certificate_authority:
        description: The only authority to trust, as PEM or base64 of it. Empty means those of the system.
        type: str
        default: ""
  timeout:
    description: Seconds for the connection of a flow and all that follows; name resolution comes on top.
    type: float
    default: 3
  total_timeout:
    description: Seconds for all flows together.
    type: float
    default: 30
  retries:
    description: Further tries of a flow that must be open and is not.
    type: int
    default: 1
attributes:
  check_mode:
    description: Nothing is changed in any mode, so all is tried in check mode too.
    support: full
  diff_mode:
    description: There is nothing to show.
    support: none
"""

EXAMPLES = r"""
- name: See whether this host can reach the registry
  nemo.platform.flow_probe:
    flows:
      - id: registry
        host: 084375578827.dkr.ecr.ap-northeast-2.amazonaws.com
        port: 443
        protocol: https
        path: /v2/
        status: [200, 401]
        days: 14
  register: probed

- name: Show what came of it
  ansible.builtin.debug:
    msg: "{{ probed.results[0].outcome }} after {{ probed.results[0].ms }} ms: {{ probed.results[0].detail }}"
"""

RETURN = r"""
problem:
  description: Why nothing could be tried from this host, empty where it could.
  returned: always
  type: str
results:
  description: One for each flow, in the same order.
  returned: always
  type: list
  elements: dict
  contains:
    id:
      description: The flow's.
      type: str
    outcome:
      description:
        - V(open), which includes that TLS and protocol are right; V(refused); V(timeout); V(unreachable).
        - V(dns_failed), the name does not resolve; V(dns_wrong), it leads elsewhere.
        - V(tls), certificate or handshake are wrong; V(protocol), the answer is; V(not_tried).
      type: str
      sample: open
    detail:
      description: What was seen, in words.
      type: str
      sample: HTTP 401, certificate for 396 days
    addresses:
      description: What the name resolved to.
      type: list
      elements: str
    connect_ms:
      description: Milliseconds until the connection stood; null where it never did.
      type: float
    ms:
      description: Milliseconds for all of it, without the name's resolution.
      type: float
    days:
      description: Whole days that the certificate has left, where there is one.
      type: int
    attempts:
      description: How often it was tried.
      type: int
"""

import os

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.nemo.platform.plugins.module_utils.flow_probe import OPEN, PROTOCOLS, probe_all


def main() -> None:
    """Run the module."""
    flow = {
        "id": {"type": "str", "required": True},
        "host": {"type": "str", "required": True},
        "port": {"type": "int", "required": True},
        "protocol": {"type": "str", "choices": list(PROTOCOLS), "default": "tcp"},
        "expect": {"type": "str", "choices": [OPEN, "closed"], "default": OPEN},
        "path": {"type": "str", "default": "/"},
        "status": {"type": "list", "elements": "int", "default": []},
        "days": {"type": "int", "default": 0},
        "within": {"type": "list", "elements": "str", "default": []},
        "server_name": {"type": "str", "default": ""},
        "certificate_authority": {"type": "str", "default": ""},
    }
    module = AnsibleModule(
        argument_spec={
            "flows": {"type": "list", "elements": "dict", "required": True, "options": flow},
            "timeout": {"type": "float", "default": 3},
            "total_timeout": {"type": "float", "default": 30},
            "retries": {"type": "int", "default": 1},
        },
        supports_check_mode=True,
    )
    # Resolvers that are silent are asked for five seconds each by default, twice.
    os.environ.setdefault("RES_OPTIONS", "timeout:2 attempts:2")
    given = module.params
    results = probe_all(given["flows"], given["timeout"], given["total_timeout"], given["retries"])
    module.exit_json(changed=False, results=results, problem="")


if __name__ == "__main__":
    main()
