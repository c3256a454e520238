#!/usr/bin/python
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Documentation of the action access_plan; its code is plugins/action/access_plan.py."""

from __future__ import annotations

DOCUMENTATION = r"""
module: access_plan
short_description: What is asked of playbooks/access.yml, and of which hosts
version_added: "0.1.0"
author: The nemo platform project (@nemo-platform)
description:
  - Reads the run's tags and the variables C(service), C(unit), C(group), C(command), C(since), C(lines), C(grep), C(follow) and
    C(follow_for), connects to no host, and returns the hosts of the operation.
  - What is missing, unknown or of no use is one sentence that says what is allowed. Without a tag of an operation it prints how the
    playbook is used, and fails.
  - A C(command) is taken as it was typed after C(-e), blanks and braces included, where Ansible itself would keep its first word.
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
  - Reads C(nemo_services) of the inventory's hosts.
"""

EXAMPLES = r"""
- name: What is asked for
  hosts: localhost:all
  gather_facts: false
  tasks:
    - name: It is known, and so are its hosts
      nemo.platform.access_plan:
      register: plan
"""

RETURN = r"""
operation:
  description: The operation, or nothing.
  returned: success
  type: str
  sample: logs
targets:
  description: Its hosts, each with C(host) and the C(services) that are meant.
  returned: success
  type: list
  elements: dict
  sample: [{"host": "ai-dev-10.0.2.32", "services": ["ai-dev"]}]
command:
  description: The command to run.
  returned: success
  type: str
"""
