#!/usr/bin/python
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Documentation of the action follow_plan; its code is plugins/action/follow_plan.py."""

from __future__ import annotations

DOCUMENTATION = r"""
module: follow_plan
short_description: Whether the newest image of a service is released by itself
version_added: 0.2.0
author: The nemo platform project (@nemo-platform)
description:
  - Puts the newest image of the registry against what each host of a service runs. Connects to nothing, and releases nothing.
  - Nothing is to be released where the service is pinned or held by the inventory, where somebody is releasing it, where the newest
    tag failed or was rolled back on one of its hosts before, where a host runs a tag outside of the rule that somebody deployed, or
    where all hosts run it, or something newer, already.
  - A host on which the service was never released is left out.
options:
  service:
    description: The service.
    type: str
    required: true
  newest:
    description: The image, as RV(nemo.platform.ecr_image_info#module:image) has it.
    type: dict
    required: true
  found:
    description: Name of each host of the service to what M(nemo.platform.container_release_info) returned for it as C(services).
    type: dict
    required: true
  held:
    description: The tag at which the inventory holds the service; empty when it holds it at none.
    type: str
    default: ""
  report:
    description: File on the controller that gets the returned values as JSON. None when it is empty.
    type: str
    default: ""
attributes:
  check_mode:
    description: Nothing is changed in any mode; the report is written in any mode.
    support: full
  diff_mode:
    description: There is nothing to show.
    support: none
  bypass_host_loop:
    description: Runs once per play, whatever its hosts.
    support: full
"""

EXAMPLES = r"""
- name: Whether to release
  nemo.platform.follow_plan:
    service: ai-dev
    newest: "{{ found_image.image }}"
    found: {ai-dev-10.0.2.32: "{{ what_runs.services }}"}
  register: plan

- name: Why, or why not
  ansible.builtin.debug:
    msg: "{{ plan.why }}"
"""

RETURN = r"""
hosts:
  description: Hosts on which it is to be released; none where nothing is to be done.
  returned: success
  type: list
  elements: str
why:
  description: Why, or why not, in one line.
  returned: success
  type: str
  sample: dev-20250719-0930 is newer than dev-20250718-1200
tag:
  description: The newest tag.
  returned: success
  type: str
digest:
  description: Its digest.
  returned: success
  type: str
"""
