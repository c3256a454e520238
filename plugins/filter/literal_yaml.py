# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Filter: variables as the text of a vars file, whose values mean what they say."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import yaml
from ansible.errors import AnsibleFilterError

DOCUMENTATION = r"""
name: literal_yaml
short_description: Variables as the text of a vars file that Ansible reads back unchanged
version_added: 0.1.0
author: The nemo platform project (@nemo-platform)
description:
  - Writes variables as YAML, sorted by name. A text that looks like a template is marked C(!unsafe), so that a password with
    two braces in it stays what it is.
options:
  _input:
    description: The variables.
    type: dict
    required: true
"""

EXAMPLES = r"""
- name: Keep variables for a later run
  ansible.builtin.copy:
    content: "{{ {'token': 'a{{b'} | nemo.platform.literal_yaml }}"
    # token: !unsafe 'a{{b'
    dest: /etc/nemo/inventory/group_vars/all.yml
    mode: "0640"
"""

RETURN = r"""
_value:
  description: The text of the file, with a newline at its end.
  type: str
"""

MARKS = ("{{", "{%", "{#")


class _Unsafe(str):
    """A text that is no template."""

    __slots__ = ()


class _Dumper(yaml.SafeDumper):
    """Knows that text, and repeats a value instead of pointing to it."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_representer(_Unsafe, lambda dumper, text: dumper.represent_scalar("!unsafe", str(text), style="'"))


def _plain(value: Any, where: str) -> Any:
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, str):
        text = str(value)
        return _Unsafe(text) if any(mark in text for mark in MARKS) else text
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{where}[{number}]") for number, item in enumerate(value)]
    raise AnsibleFilterError(
        f"literal_yaml: {where.lstrip('.')} is of type {type(value).__name__}, which no vars file can hold"
    )


def literal_yaml(variables: Mapping[str, Any]) -> str:
    """The filter."""
    if not isinstance(variables, Mapping):
        raise AnsibleFilterError(f"literal_yaml: a dictionary is needed, not {type(variables).__name__}")
    return yaml.dump(_plain(variables, ""), Dumper=_Dumper, sort_keys=True, allow_unicode=True, width=10**6)


class FilterModule:
    """The filter's name."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """What this file brings."""
        return {"literal_yaml": literal_yaml}
