# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Filter: why ssh cannot use a private key without asking."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ansible_collections.nemo.platform.plugins.module_utils.workspace_source import key_problem

DOCUMENTATION = r"""
name: private_key_problem
short_description: Why a private key is none that ssh can use without asking
version_added: 0.1.0
author: The nemo platform project (@nemo-platform)
description:
  - Looks at the text of a private key and says in a few words what is wrong with it, never what is in it.
options:
  _input:
    description: The key's text.
    type: str
    required: true
"""

EXAMPLES = r"""
- name: Refuse a key with a passphrase
  ansible.builtin.assert:
    that: key | nemo.platform.private_key_problem == ''
    fail_msg: "the key {{ key | nemo.platform.private_key_problem }}"
  vars:
    key: "{{ lookup('ansible.builtin.file', '~/.ssh/keypair-kube-master.pem') }}"
"""

RETURN = r"""
_value:
  description: The rest of a sentence that begins with the key; empty when there is no problem.
  type: str
"""


def private_key_problem(text: Any) -> str:
    """The filter."""
    return key_problem(str(text or ""))


class FilterModule:
    """The filter's name."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """What this file brings."""
        return {"private_key_problem": private_key_problem}
