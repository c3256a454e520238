# Copyright: the nemo.platform authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What is wrong with the inputs of role vllm, on the controller."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ansible_collections.nemo.platform.plugins.module_utils.vllm_server import problems
from ansible_collections.nemo.platform.plugins.modules.container_release import ARGUMENTS

DOCUMENTATION = r"""
name: vllm_problems
short_description: What is wrong with the inputs of role vllm
version_added: 0.2.0
author: The nemo platform project (@nemo-platform)
description:
  - Looks at all inputs of the role, without a host. Extra arguments that would set what an input sets are found under every
    spelling that vLLM's parser takes - with C(=), with C(_) for C(-), shortened, negated.
  - No value of a key or token appears in what it says.
options:
  _input:
    description: The inputs, by name without the prefix C(vllm_).
    type: dict
    required: true
"""

EXAMPLES = r"""
- name: Inputs are ones that this role knows
  ansible.builtin.assert:
    that: __vllm_inputs | nemo.platform.vllm_problems | length == 0
    # {"max_model_len": -1, "extra_arguments": ["--dtyp=half"], ...}
    # ["vllm_max_model_len is -1; allowed: 0 or more",
    #  "vllm_extra_arguments[0] is '--dtyp=half', which means --dtype; set vllm_dtype instead"]
"""

RETURN = r"""
_value:
  description: One line for each thing that is wrong; none when nothing is.
  type: list
  elements: str
"""


def vllm_problems(inputs: Mapping[str, Any]) -> list[str]:
    """Return what is wrong, one line each."""
    return problems(inputs, ARGUMENTS)


class FilterModule:
    """The filters of this file."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Name and function of each filter."""
        return {"vllm_problems": vllm_problems}
