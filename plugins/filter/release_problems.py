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
from ansible_collections.nemo.platform.plugins.module_utils.preflight import type_name
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

ALLOWED = {
    "repository": "the name of a repository, such as ai",
    "tag_prefix": "the beginning of a tag, such as prod",
}
KINDS = {key: "str" if spec["type"] == "path" else spec["type"] for key, spec in ARGUMENTS.items()}
KINDS.update(repository="str", tag_prefix="str", tag_pattern="str")
# Text that is often written as a number, and means the same.
NUMBERS_TOO = ("memory", "user", "log_max_size")


def number(value: Any, kind: Callable[[Any], Any]) -> Any:
    """The number that Ansible would make of a value, or the value itself, to be named."""
    try:
        return value if value is None or isinstance(value, bool) else kind(value)
    except (TypeError, ValueError, OverflowError):
        return value


def wrong_elements(value: Any, elements: str, label: str) -> list[str]:
    """What is wrong with a list; again without its values."""
    kind, allowed = (Mapping, "names with their values") if elements == "dict" else (str, "text")
    if isinstance(value, (str, Mapping)) or not isinstance(value, Iterable):
        return [f"{label} is a {type_name(value)}; allowed: a list, each entry {allowed}"]
    return [
        f"{label}[{number}] is a {type_name(entry)}; allowed: {allowed}"
        for number, entry in enumerate(value)
        if not isinstance(entry, kind)
    ]


def wrong_types(service: Mapping[str, Any], label: str) -> list[str]:
    """What is not of the type that the rules below take for granted; numbers are theirs."""
    wrong = []
    for key, kind in KINDS.items():
        value = service.get(key)
        if value is None:
            continue
        if kind == "dict" and not isinstance(value, Mapping):
            # without the value, which may be a secret
            wrong.append(f"{label}.{key} is a {type_name(value)}; allowed: names with their values")
        if kind == "list":
            wrong += wrong_elements(value, ARGUMENTS[key]["elements"], f"{label}.{key}")
        if kind == "str" and not isinstance(value, str):
            wrong.append(
                f"{label}.{key} is {value!r}; allowed: {ALLOWED.get(key, 'text, in quotes if it looks like a number')}"
            )
    return wrong


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
    service = {
        key: str(value) if key in NUMBERS_TOO and isinstance(value, int) and not isinstance(value, bool) else value
        for key, value in service.items()
    }
    wrong = wrong_types(service, label)
    if wrong:
        return wrong
    params = {key: spec.get("default") for key, spec in ARGUMENTS.items()}
    params.update({key: value for key, value in service.items() if key in params and value is not None})
    params.update(image="registry/repository", tag=service.get("tag") or "any", digest=service.get("digest"))
    for kind in ("environment", "secrets"):
        params[kind] = {str(key): value for key, value in (params[kind] or {}).items()}
    for name, spec in ARGUMENTS.items():
        if spec["type"] not in ("int", "float"):
            continue
        params[name] = number(params[name], int if spec["type"] == "int" else float)
        good = isinstance(params[name], (int, float)) and not isinstance(params[name], bool)
        # check_request() has a line of its own for a port
        if name not in ("port", "container_port") and params[name] is not None and not good:
            wrong.append(f"{label}.{name} is {params[name]!r}; allowed: a number")
            params[name] = spec.get("default")
    params["cpus"] = params["cpus"] or None
    for line in check_request(params):
        wrong.append(f"{label}.{line}")
    repository = service.get("repository") or ""
    if not re.match(REPOSITORY, repository):
        wrong.append(f"{label}.repository is {repository!r}; allowed: {ALLOWED['repository']}")
    prefix = service.get("tag_prefix")
    if prefix is not None and not re.match(TAG_PREFIX, prefix):
        wrong.append(f"{label}.tag_prefix is {prefix!r}; allowed: {ALLOWED['tag_prefix']}")
    if not (prefix or service.get("tag_pattern") or service.get("tag") or service.get("digest")):
        wrong.append(f"{label} says no tag; allowed: one of tag_prefix, tag_pattern and tag")
    if problem := tag_problem(service):
        wrong.append(f"{label}{problem}")
    return wrong


def release_problems(services: Any, variable: str) -> list[str]:
    """Return what is wrong, one line each."""
    if isinstance(services, (str, Mapping)) or not isinstance(services, Iterable):
        return [f"{variable} is a {type_name(services)}; allowed: a list of services"]
    wrong: list[str] = []
    names: dict[str, str] = {}
    ports: dict[Any, str] = {}
    for index, service in enumerate(services):
        if not isinstance(service, Mapping):
            wrong.append(f"{variable}[{index}] is a {type_name(service)}; allowed: the keys of one service")
            continue
        name = service.get("name")
        label = f"{variable}[{name!r}]" if name and isinstance(name, str) else f"{variable}[{index}]"
        if name and not isinstance(name, str):
            wrong.append(f"{label}.name is {name!r}; allowed: the name of the service")
            continue
        if not name:
            wrong.append(f"{label}.name is missing; allowed: the name of the service")
            continue
        wrong += of_one(service, label)
        port = number(service.get("port"), int)
        port = port if isinstance(port, int) else None
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
