#!/usr/bin/python
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Documentation of the action inventory_check; its code is plugins/action/inventory_check.py."""

from __future__ import annotations

DOCUMENTATION = r"""
module: inventory_check
short_description: Everything that is wrong with the inventory, in one list
version_added: 0.1.0
author: The nemo platform project (@nemo-platform)
description:
  - Looks at the inventory and its variables, connects to no host, and fails with one numbered list of all problems, each
    on one line with what to do about it.
  - It finds no credentials, an expired token, a wrong region, no running instance, an empty group, a service with no host,
    more hosts than a service may have, two services on one port, duplicate names, unknown values of the tags Role and
    Services, missing variables and secrets, removed variables that are still set, and unknown values of
    C(nemo_bastion_system) and C(nemo_eks_version).
  - What is past its end of support and still works is a warning of one line that names the variable to move on by.
  - Only when the inventory is empty are STS and EC2 asked, once each, to tell why.
options: {}
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
  - Reads C(nemo_region), C(nemo_account_id), C(nemo_services), C(nemo_required_groups), C(nemo_shared_names),
    C(nemo_aws_connection), C(nemo_bastion_system), C(nemo_eks_version), C(nemo_operators), C(operators_allow_empty)
    and C(operators_rsa_bits), and of each host C(nemo_role), C(nemo_host_services), C(nemo_name) and its addresses.
"""

EXAMPLES = r"""
- name: The inventory makes sense
  hosts: localhost:all
  gather_facts: false
  any_errors_fatal: true
  tasks:
    - name: Everything that this platform needs is in the inventory
      nemo.platform.inventory_check:
"""

RETURN = r"""
msg:
  description: All problems, numbered, one a line, each with what to do behind an arrow.
  returned: failure
  type: str
"""
