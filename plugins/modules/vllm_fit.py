#!/usr/bin/python
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Whether a model, its settings, an image, a card and a host go together, before anything stops."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: vllm_fit
short_description: Whether a model fits the card, the driver fits the image, and the host fits both
version_added: "0.2.0"
author:
  - nemo platform maintainers (@nemo-platform)
description:
  - Compares what a model's own files say (C(config.json), the sizes of its weights, C(adapter_config.json)) and what an image
    asks for (C(CUDA_VERSION), C(NVIDIA_REQUIRE_CUDA)) with what C(nvidia-smi) and the kernel say of this host.
  - GPU memory is the weights in the type in which they are served, the KV cache of one request of the longest context
    (grouped, latent and sliding-window attention are known), and an estimate of the rest. What a container of O(service) holds
    now counts as free, as it is stopped before; what other processes hold does not.
  - What cannot work is an error, and the task fails with every one of them, each with its numbers and what to set. What rests
    on an estimate, or an architecture that no formula here knows, is a warning.
  - Changes nothing, and is as quick in check mode.
options:
  model:
    description: Folder of the model on this host.
    type: path
    required: true
  adapters:
    description: LoRA adapters that are served with it.
    type: list
    elements: dict
    default: []
    suboptions:
      name:
        description: Its served name.
        type: str
        required: true
      path:
        description: Its folder on this host.
        type: path
        required: true
  image_environment:
    description: C(Env) of the image's configuration, as M(nemo.platform.container_image) returns it, under what the container is given.
    type: dict
    default: {}
  device:
    description: V(cpu) looks at no card and no driver.
    type: str
    choices: [cuda, cpu]
    default: cuda
  dtype:
    description: As C(--dtype) of C(vllm serve).
    type: str
    default: auto
  quantization:
    description: As C(--quantization); empty for the model's own.
    type: str
    default: ''
  kv_cache_dtype:
    description: As C(--kv-cache-dtype).
    type: str
    default: auto
  max_model_len:
    description: Tokens of the longest context; V(0) for the model's own.
    type: int
    default: 0
  gpu_memory_utilization:
    description: Share of each card that vLLM may use, up to 1.
    type: float
    default: 0.9
  tensor_parallel_size:
    description: Number of cards.
    type: int
    default: 1
  max_lora_rank:
    description: As C(--max-lora-rank).
    type: int
    default: 16
  longer_than_model:
    description: Whether the context may be longer than the model's own, with C(VLLM_ALLOW_LONG_MAX_MODEL_LEN).
    type: bool
    default: false
  memory:
    description: The container's memory limit, such as V(13g).
    type: str
    required: true
  shm_size:
    description: The container's shared memory, such as V(1g).
    type: str
    default: 64m
  cache_path:
    description: Folder on the volume that holds compile caches, or one above it; empty looks at none.
    type: path
  min_free_mb:
    description: Megabytes (10^6) that must be free there; less is a warning where the service runs with this model already.
    type: int
    default: 1024
  service:
    description: Name of the service whose containers are stopped before the new one starts.
    type: str
    default: vllm
attributes:
  check_mode:
    support: full
    description: It never changes anything. A model that is not there yet, which a real run fetches first, is a warning in check mode.
  diff_mode:
    support: none
    description: There is nothing to differ.
seealso:
  - module: nemo.platform.gpu_info
  - module: nemo.platform.container_image
"""

EXAMPLES = r"""
- name: The model fits before the old one stops
  nemo.platform.vllm_fit:
    model: /srv/models/hub/Qwen--Qwen2.5-7B-Instruct/a09a35458c702b33eeacc393d103063234e8bc28
    image_environment:
      CUDA_VERSION: 13.0.2
      NVIDIA_REQUIRE_CUDA: cuda>=13.0
    max_model_len: 8192
    gpu_memory_utilization: 0.9
    memory: 13g
"""

RETURN = r"""
findings:
  description: What does not fit, or may not; errors first.
  returned: always
  type: list
  elements: dict
  contains:
    level: {description: "V(error) or V(warning).", type: str}
    about: {description: "What it is about - V(model), V(context), V(memory), V(image), V(gpu), V(parallel), V(quantization), V(lora), V(ram) or V(disk).", type: str}
    text: {description: "One line, with numbers and what to set.", type: str}
numbers:
  description: The bytes behind it, for one card; a key is missing where it is unknown.
  returned: always
  type: dict
  contains:
    share: {description: What vLLM may use of a card., type: int}
    weights: {description: The weights on it., type: int}
    cache: {description: The KV cache of one request of the longest context., type: int}
    overhead: {description: Estimate of the rest., type: int}
    longest: {description: Tokens of the longest context that fits., type: int}
"""

import os
from typing import Any

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.nemo.platform.plugins.module_utils import gpu
from ansible_collections.nemo.platform.plugins.module_utils.container_release import memory_now, parse_size
from ansible_collections.nemo.platform.plugins.module_utils.vllm_fit import Finding, Host, Wanted, examine

ARGUMENTS: dict[str, dict[str, Any]] = {
    "model": {"type": "path", "required": True},
    "adapters": {
        "type": "list",
        "elements": "dict",
        "default": [],
        "options": {"name": {"type": "str", "required": True}, "path": {"type": "path", "required": True}},
    },
    "image_environment": {"type": "dict", "default": {}},
    "device": {"type": "str", "choices": ["cuda", "cpu"], "default": "cuda"},
    "dtype": {"type": "str", "default": "auto"},
    "quantization": {"type": "str", "default": ""},
    "kv_cache_dtype": {"type": "str", "default": "auto"},
    "max_model_len": {"type": "int", "default": 0},
    "gpu_memory_utilization": {"type": "float", "default": 0.9},
    "tensor_parallel_size": {"type": "int", "default": 1},
    "max_lora_rank": {"type": "int", "default": 16},
    "longer_than_model": {"type": "bool", "default": False},
    "memory": {"type": "str", "required": True},
    "shm_size": {"type": "str", "default": "64m"},
    "cache_path": {"type": "path"},
    "min_free_mb": {"type": "int", "default": 1024},
    "service": {"type": "str", "default": "vllm"},
}


def serves(service: str, model: str) -> bool:
    """Whether a container of the service that runs has this model."""
    words = ["docker", "ps", "--no-trunc", "--filter", "label=nemo.service=%s" % service, "--format", "{{.Mounts}}"]
    code, out, _err = gpu.program(words)
    return code == 0 and any(model in line.split(",") for line in out.splitlines())


def own_processes(service: str) -> tuple[frozenset[int], bool]:
    """The processes of the service's containers, as nvidia-smi numbers them, and whether any container runs."""
    code, out, _err = gpu.program(["docker", "ps", "--quiet", "--filter", "label=nemo.service=%s" % service])
    containers = out.split() if code == 0 else []
    pids: set[int] = set()
    for container in containers:
        code, out, _err = gpu.program(["docker", "top", container, "-eo", "pid"])
        pids.update(int(line) for line in out.split() if code == 0 and line.isdigit())
    return frozenset(pids), bool(containers)


def free_bytes(path: str) -> int | None:
    """What is free on the file system that the folder is on, or will be."""
    while path and not os.path.isdir(path):
        path = os.path.dirname(path) if path != "/" else ""
    if not path:
        return None
    found = os.statvfs(path)
    return found.f_bavail * found.f_frsize


def host_of(params: dict[str, Any]) -> Host:
    pids, runs = own_processes(params["service"])
    return Host(
        gpu=gpu.look() if params["device"] == "cuda" else {},
        memory_total=memory_now()[0],
        own_pids=pids,
        own_runs=runs,
        own_model=serves(params["service"], params["model"]),
        free_cache=free_bytes(params["cache_path"]) if params["cache_path"] else None,
        free_cache_least=params["min_free_mb"] * 10**6,
    )


def main() -> None:
    module = AnsibleModule(argument_spec=ARGUMENTS, supports_check_mode=True)
    params: dict[str, Any] = module.params
    sizes: dict[str, int] = {}
    for name in ("memory", "shm_size"):
        try:
            sizes[name] = parse_size(params[name])
        except ValueError:
            module.fail_json(
                msg="%s is %r; allowed: a number with b, k, m or g" % (name, params[name]), findings=[], numbers={}
            )
    shared = ("device", "dtype", "quantization", "kv_cache_dtype", "max_model_len", "gpu_memory_utilization",
              "tensor_parallel_size", "max_lora_rank", "longer_than_model")  # fmt: skip
    wanted = Wanted(memory=sizes["memory"], shm_size=sizes["shm_size"], **{name: params[name] for name in shared})
    if module.check_mode and not os.path.isdir(params["model"]):
        text = (
            "%s is not there yet: a run that is no check fetches it, and then looks whether it fits" % params["model"]
        )
        module.warn(text)
        module.exit_json(changed=False, findings=[Finding("warning", "model", text)._asdict()], numbers={})
    adapters = [(entry["name"], entry["path"]) for entry in params["adapters"]]
    found, numbers = examine(params["model"], adapters, params["image_environment"], wanted, host_of(params))
    result = {
        "changed": False,
        "findings": [finding._asdict() for finding in found],
        "numbers": {name: int(value) for name, value in numbers.items()},
    }
    wrong = [finding.text for finding in found if finding.level == "error"]
    for finding in found:
        if finding.level == "warning":
            module.warn(finding.text)
    if wrong:
        module.fail_json(
            msg="%s: %s does not fit: %s"
            % (params["service"], os.path.basename(os.path.dirname(params["model"])), "; ".join(wrong)),
            **result,
        )
    module.exit_json(**result)


if __name__ == "__main__":
    main()
