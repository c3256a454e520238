# Copyright: the nemo.platform authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What is wrong with services before anything is done for them: the rules of container_release, on the controller."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ansible_collections.nemo.platform.plugins.module_utils.container_release import check_request
from ansible_collections.nemo.platform.plugins.module_utils.ecr import EcrError, matches, tag_rule
from ansible_collections.nemo.platform.plugins.modules.container_release import ARGUMENTS

DOCUMENTATION = r"""
name: release_problems
short_description: What is wrong with the services that are to be released
version_added: 0.1.0
author: The nemo platform project (@nemo-platform)
description:
  - Looks at each service as M(nemo.platform.container_release) would, and at all of them together, without a host.
  - No value of a secret appears in what it says.
options:
  _input:
    description: The services, each with its name.
    type: list
    elements: dict
    required: true
  variable:
    description: Name of the variable that holds them, to be named in each line.
    type: str
    required: true
"""

EXAMPLES = r"""
- name: Services can be released
  ansible.builtin.assert:
    that: ai_api_services | nemo.platform.release_problems('ai_api_services') | length == 0
    # [{"name": "ai-prod", "port": 99999, ...}]
    # ["ai_api_services['ai-prod'].port is 99999; allowed: 1 to 65535"]
"""

RETURN = r"""
_value:
  description: One line for each thing that is wrong; none when nothing is.
  type: list
  elements: str
"""

REPOSITORY = r"^[a-z0-9]+(?:[._/-][a-z0-9]+)*$"
TAG_PREFIX = r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,100}$"


def number(value: Any, kind: Callable[[Any], Any]) -> Any:
    """The number that Ansible would make of a value, or the value itself, to be named."""
    try:
        return value if value is None or isinstance(value, bool) else kind(value)
    except (TypeError, ValueError):
        return value


def tag_problem(service: Mapping[str, Any]) -> str:
    """Why the pinned tag may not run, or nothing. Here, because a digest keeps the registry's API from being asked."""
    tag = service.get("tag")
    try:
        rule = tag_rule(service.get("tag_prefix"), service.get("tag_pattern"))
    except EcrError as error:
        return f": {error}"
    if not tag or rule is None or service.get("tag_outside_rule") or matches(str(tag), rule):
        return ""
    return f".tag is {tag!r}; allowed: a tag by the rule {rule.example}, or any with tag_outside_rule: true"


def of_one(service: Mapping[str, Any], label: str) -> list[str]:
    """What is wrong with one service."""
    wrong = []
    params = {key: spec.get("default") for key, spec in ARGUMENTS.items()}
    params.update({key: value for key, value in service.items() if key in params and value is not None})
    params.update(image="registry/repository", tag=service.get("tag") or "any", digest=service.get("digest"))
    for name in ("port", "container_port", "health_timeout"):
        params[name] = number(params[name], int)
    params["cpus"] = number(params["cpus"], float) or None
    for name, kind in (("health_timeout", int), ("cpus", float)):
        if params[name] is not None and not isinstance(params[name], kind):
            wrong.append(f"{label}.{name} is {params[name]!r}; allowed: a number")
            params[name] = ARGUMENTS[name].get("default")
    for line in check_request(params):
        wrong.append(f"{label}.{line}")
    repository = service.get("repository") or ""
    if not re.match(REPOSITORY, repository):
        wrong.append(f"{label}.repository is {repository!r}; allowed: the name of a repository, such as ai")
    prefix = service.get("tag_prefix")
    if prefix is not None and not re.match(TAG_PREFIX, prefix):
        wrong.append(f"{label}.tag_prefix is {prefix!r}; allowed: the beginning of a tag, such as prod")
    if not (prefix or service.get("tag_pattern") or service.get("tag")):
        wrong.append(f"{label} says no tag; allowed: one of tag_prefix, tag_pattern and tag")
    if problem := tag_problem(service):
        wrong.append(f"{label}{problem}")
    if service.get("digest") and not service.get("tag"):
        wrong.append(f"{label}.digest is set without tag; allowed: both, or tag alone")
    return wrong


def release_problems(services: Iterable[Mapping[str, Any]], variable: str) -> list[str]:
    """Return what is wrong, one line each."""
    wrong = []
    names: dict[str, str] = {}
    ports: dict[Any, str] = {}
    for index, service in enumerate(services):
        name = service.get("name")
        label = f"{variable}[{name!r}]" if name else f"{variable}[{index}]"
        if not name:
            wrong.append(f"{label}.name is missing; allowed: the name of the service")
            continue
        wrong += of_one(service, label)
        port = number(service.get("port"), int)
        if name in names:
            wrong.append(f"{label} is there twice; allowed: each name once")
        if port is not None and port in ports:
            wrong.append(f"{label}.port is {port}, as that of {ports[port]}; allowed: a port of its own")
        names[name] = ports[port] = label
    if not names and not wrong:
        wrong.append(f"{variable} is empty; allowed: one service or more")
    return wrong


class FilterModule:
    """The filters of this file."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Name and function of each filter."""
        return {"release_problems": release_problems}
