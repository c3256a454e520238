#!/usr/bin/python
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Documentation of the action flow_report; its code is plugins/action/flow_report.py."""

from __future__ import annotations

DOCUMENTATION = r"""
module: flow_report
short_description: The verdict on all flows, one line each, as JSON and as JUnit
version_added: "0.1.0"
author: The nemo platform project (@nemo-platform)
description:
  - Tries the flows from outside, if the plan has any and a host of the platform answered before. Then judges all results,
    prints one line for each flow, writes C(verify.json) and C(verify.xml), and fails if there is a finding.
  - One cause is one finding, with what to do. What fails for everybody who may use it is the target's, what fails for some is
    theirs.
  - A closed port passes only where somebody who may use it has found something listening. If nobody has, it is V(unproven),
    which is no finding of its own.
options:
  plan:
    description: What M(nemo.platform.flow_plan) returned.
    type: dict
    required: true
  results:
    description: Host to what M(nemo.platform.flow_probe) returned there.
    type: dict
    required: true
  closed_by:
    description:
      - How a security group turns somebody away. AWS drops without a word, so that a refusal comes from the host itself and
        shows that its group lets the flow in. V(reject) takes a refusal for a closed door.
    type: str
    choices: [drop, reject]
    default: drop
  optional:
    description: Hosts that may be impossible to log in to. That is a note then, and no finding.
    type: list
    elements: str
    default: []
  directory:
    description:
      - Where to write. Empty means C(build/verify) of the checkout, and where that cannot be written to
        C(~/.ansible/nemo_platform/verify).
    type: str
    default: ""
  timeout:
    description: Seconds for a flow from outside.
    type: float
    default: 3
  total_timeout:
    description: Seconds for all flows from outside together.
    type: float
    default: 30
  retries:
    description: Further tries of a flow from outside that must be open and is not.
    type: int
    default: 1
attributes:
  check_mode:
    description: Nothing of the platform is changed in any mode; the report is written in check mode too.
    support: full
  diff_mode:
    description: There is nothing to show.
    support: none
  bypass_host_loop:
    description: Runs once per play, whatever its hosts.
    support: full
"""

EXAMPLES = r"""
- name: Report what was found
  nemo.platform.flow_report:
    plan: "{{ plan }}"
    results: "{{ dict(ansible_play_hosts_all | zip(ansible_play_hosts_all | map('extract', hostvars, 'probed'))) }}"
"""

RETURN = r"""
passed:
  description: Whether there is no finding.
  returned: always
  type: bool
msg:
  description: The counts, in one line. The findings are printed above it, numbered, and stand in C(verify.json).
  returned: failure
  type: str
notes:
  description: What could not be looked at, and need not be.
  returned: success
  type: list
  elements: str
summary:
  description: Number of flows by verdict (ok, fail, unproven, skipped).
  returned: success
  type: dict
directory:
  description: Where C(verify.json) and C(verify.xml) are.
  returned: always
  type: str
"""
