# Copyright: the nemo.platform authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The inputs of role vllm as a release of role container_service."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ansible_collections.nemo.platform.plugins.module_utils.vllm_server import release

DOCUMENTATION = r"""
name: vllm_release
short_description: The inputs of role vllm as a release of role container_service
version_added: 0.2.0
author: The nemo platform project (@nemo-platform)
description:
  - Turns inputs that P(nemo.platform.vllm_problems#filter) finds nothing wrong with into the arguments of C(vllm serve), its
    environment, mounts and proof, and the rules of its HAProxy.
options:
  _input:
    description: The inputs, by name without the prefix C(vllm_).
    type: dict
    required: true
"""

EXAMPLES = r"""
- name: What vLLM is started with
  ansible.builtin.debug:
    msg: "{{ (__vllm_inputs | nemo.platform.vllm_release).command | join(' ') }}"
    # /models/Qwen--Qwen2.5-7B-Instruct/a09a... --served-model-name chat --host 0.0.0.0 --port 8002 --max-model-len 8192 ...
"""

RETURN = r"""
_value:
  description: What the release is made of.
  type: dict
  contains:
    command: {description: Arguments after the image., type: list, elements: str}
    environment: {description: The container's environment., type: dict}
    mounts: {description: "Bind mounts, each with source, target and read_only.", type: list, elements: dict}
    cache: {description: Folder of the host for compile and engine caches., type: str}
    cache_folders: {description: "Folders that the container's user must own: path, owner, group.", type: list, elements: dict}
    snapshots: {description: "The model and its adapters: repository, revision, path and target.", type: list, elements: dict}
    adapters: {description: "The adapters: served name and path.", type: list, elements: dict}
    health: {description: "The request that proves a release: method, path, headers, body, contains.", type: dict}
    phases: {description: What a line of its log tells about its start., type: list, elements: dict}
    failure_patterns: {description: What a line of its log tells about its end., type: list, elements: dict}
    proxy_rules: {description: What HAProxy lets through., type: list, elements: dict}
    stop_timeout: {description: Seconds that the container has to end., type: int}
"""


class FilterModule:
    """The filters of this file."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Name and function of each filter."""
        return {"vllm_release": release}
