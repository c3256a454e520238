#!/usr/bin/python
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Documentation of the action access_report; its code is plugins/action/access_report.py."""

from __future__ import annotations

DOCUMENTATION = r"""
module: access_report
short_description: Print what an operation of playbooks/access.yml found
version_added: "0.1.0"
author: The nemo platform project (@nemo-platform)
description:
  - Prints the results of all hosts of the play as one piece. Accounts as a table, logs merged by time, answers to a command
    with the hosts together that gave the same one.
  - Fails when a host gave no answer, a log could not be read, or the command failed somewhere, and names the hosts.
options:
  about:
    description: What the results are about.
    type: str
    choices: [who, logs, run]
    required: true
  results:
    description: Name of the variable under which each host has its result.
    type: str
    required: true
  bastions:
    description: Hosts on which operators are expected, shown first.
    type: list
    elements: str
    default: []
  operators:
    description: The operators as the inventory has them, each with C(name) and C(keys); differences are pointed out.
    type: list
    elements: dict
    default: []
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
"""

EXAMPLES = r"""
- name: Uptimes
  ansible.builtin.command: uptime
  register: answer
  changed_when: false

- name: Who says what
  nemo.platform.access_report:
    about: run
    results: answer
"""

RETURN = r"""
failed_hosts:
  description: Hosts on which something failed.
  returned: always
  type: list
  elements: str
"""
