# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Filters on the catalogue of services (nemo_services)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ansible.errors import AnsibleFilterError

DOCUMENTATION = r"""
name: catalogue_entries
short_description: The catalogue entries of some services, each with its name
version_added: 0.1.0
author: The nemo platform project (@nemo-platform)
description:
  - Picks entries out of a catalogue (service name to settings) and adds the C(name) of the service to each.
options:
  _input:
    description: Names of the services, in the order wanted.
    type: list
    elements: str
    required: true
  catalogue:
    description: Service name to settings, such as C(nemo_services).
    type: dict
    required: true
  without:
    description: Keys that are left out; their values, which may be secrets that have no value here, are not touched.
    type: list
    elements: str
    default: []
"""

EXAMPLES = r"""
- name: The services of this host
  ansible.builtin.debug:
    msg: "{{ ['ai-prod'] | nemo.platform.catalogue_entries({'ai-prod': {'port': 8000}, 'ai-dev': {'port': 8001}}) }}"
    # [{"name": "ai-prod", "port": 8000}]
"""

RETURN = r"""
_value:
  description: The entries; an unknown name is an error that lists the known ones.
  type: list
  elements: dict
"""


def catalogue_entries(
    names: Iterable[str], catalogue: Mapping[str, Mapping[str, Any]], without: Iterable[str] = ()
) -> list[dict[str, Any]]:
    """Return the entries of the named services, each with its name."""
    names = list(names)
    unknown = [name for name in names if name not in catalogue]
    if unknown:
        raise AnsibleFilterError(
            f"no such service: {', '.join(unknown)}; the catalogue has {', '.join(sorted(catalogue)) or 'none'}"
        )
    left = set(without)
    return [
        {"name": name, **{key: catalogue[name][key] for key in catalogue[name] if key not in left}} for name in names
    ]


class FilterModule:
    """The filters of this file."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Name to function."""
        return {"catalogue_entries": catalogue_entries}
