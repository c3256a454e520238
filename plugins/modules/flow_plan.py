#!/usr/bin/python
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Documentation of the action flow_plan; its code is plugins/action/flow_plan.py."""

from __future__ import annotations

DOCUMENTATION = r"""
module: flow_plan
short_description: Every flow that follows from the table of security groups
version_added: "0.1.0"
author: The nemo platform project (@nemo-platform)
description:
  - Puts each host of the play, and the outside, against each endpoint of the platform. What the rules let through must be
    open, all else closed; nothing that is forbidden is listed by hand.
  - Fails with one list of everything that is wrong with the table. Connects to no host.
  - The outside is the machine that Ansible runs on, where that is not the Bastion. It looks at hosts of the inventory alone,
    by their public addresses, or by their private ones where it reaches the Bastion by an address of the VPC.
  - EKS and RDS are asked for endpoints whose host is left empty.
options:
  security_groups:
    description:
      - Name of a group to its rules, such as C(nemo_security_groups).
      - C(members) are inventory groups. C(in) is a list of rules with C(from) and C(ports), C(out) one with C(to) and
        C(ports); without ports a rule is for all. Peers are names of groups, or V(outside), V(vpc) and V(any).
      - C(external) is true for what stands outside the VPC. C(unspecified) names peers about which the table says nothing,
        so that they are not tried where no rule lets them in.
    type: dict
    required: true
  endpoints:
    description:
      - Name to what listens where, such as C(nemo_endpoints).
      - C(members) are inventory groups, each of whose hosts listens; or else C(host) is a name or an address and
        C(security_group) the group that it is in.
      - C(ports) is a list; an empty one takes the endpoint out.
      - C(protocol), C(path), C(status), C(days), C(within), C(server_name) and C(certificate_authority) are those of
        M(nemo.platform.flow_probe).
      - With an empty C(host), C(eks_cluster) or C(rds_instance) names what to ask AWS for.
    type: dict
    required: true
  vpc_cidr:
    description: The network of the VPC.
    type: str
    required: true
  bastion:
    description: Name of the Bastion in the inventory.
    type: str
    default: ""
  on_bastion:
    description: Whether Ansible runs on the Bastion, so that there is no outside to try from.
    type: bool
    default: false
  only:
    description: Names of endpoints and services; empty means all.
    type: list
    elements: str
    default: []
  aws_connection:
    description: How to ask AWS, such as C(nemo_aws_connection).
    type: dict
    default: {}
attributes:
  check_mode:
    description: Nothing is changed in any mode.
    support: full
  diff_mode:
    description: There is nothing to show.
    support: none
  bypass_host_loop:
    description: Runs once per play, whatever its hosts.
    support: full
notes:
  - Reads C(nemo_private_address) and C(nemo_public_address) of each host, and C(nemo_services), each of which is an endpoint.
  - Needs C(eks:DescribeCluster) and C(rds:DescribeDBInstances) where it has to ask.
"""

EXAMPLES = r"""
- name: Derive the flows from the table
  nemo.platform.flow_plan:
    security_groups: "{{ nemo_security_groups }}"
    endpoints: "{{ nemo_endpoints }}"
    vpc_cidr: "{{ nemo_vpc_cidr }}"
    bastion: "{{ nemo_bastion }}"
    on_bastion: "{{ nemo_on_bastion }}"
  run_once: true
  register: plan
"""

RETURN = r"""
flows:
  description: All flows.
  returned: success
  type: list
  elements: dict
  contains:
    id:
      description: Source, target, port and endpoint.
      type: str
      sample: ai-prod-10.0.2.31 > database:3306 database
    source:
      description: Host of the inventory, or V(outside).
      type: str
    target:
      description: Host of the inventory, or the endpoint's name.
      type: str
    endpoint:
      description: Name of the endpoint.
      type: str
    port:
      description: TCP port.
      type: int
    protocol:
      description: What is spoken there.
      type: str
    expect:
      description: V(open) or V(closed).
      type: str
    probe:
      description: The flow as M(nemo.platform.flow_probe) takes it.
      type: dict
unknown:
  description: Endpoints whose address AWS did not tell, with the reason.
  returned: success
  type: dict
notes:
  description: What is left out, and why.
  returned: success
  type: list
  elements: str
way_in:
  description: The host through which all others are reached; empty on the Bastion itself.
  returned: success
  type: str
started:
  description: When, UTC.
  returned: success
  type: str
"""
