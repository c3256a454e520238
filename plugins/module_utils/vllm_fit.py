# Copyright: the nemo.platform authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Whether a model, its settings, an image, a card and a host go together, before anything stops.

An error is what cannot work, by numbers that are known. What rests on an estimate, or is unknown, is a warning.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ansible_collections.nemo.platform.plugins.module_utils import model_memory as memory
from ansible_collections.nemo.platform.plugins.module_utils.model_memory import GIB, Config

MIB = 1 << 20
# nvidia-smi counts what the card has, CUDA what a process gets of it: 1.5 to 2 percent less on the A10G.
USABLE = 0.98
# RAM of vLLM's own processes: Python, torch and CUDA's host side, for the API server and each engine.
PROCESS = 3 * GIB
# What a host without work on it holds of its cards: contexts of the display and of persistence.
IDLE_MIB = 600
# Least drivers for CUDA's major versions, for advice. https://docs.nvidia.com/deploy/cuda-compatibility/
DRIVERS = {11: 450, 12: 525, 13: 580}
FAMILIES = ("awq", "gptq", "fp8", "bitsandbytes", "compressed-tensors", "mxfp4")


class Finding(NamedTuple):
    level: str  # error, warning
    about: str
    text: str


class Wanted(NamedTuple):
    """The settings of the server."""

    device: str = "cuda"
    dtype: str = "auto"
    quantization: str = ""
    kv_cache_dtype: str = "auto"
    max_model_len: int = 0
    gpu_memory_utilization: float = 0.9
    tensor_parallel_size: int = 1
    max_lora_rank: int = 16
    memory: int = 0
    shm_size: int = 0
    longer_than_model: bool = False  # VLLM_ALLOW_LONG_MAX_MODEL_LEN


class Host(NamedTuple):
    """What is there. Memory in bytes; GPU memory as gpu.look() says it."""

    gpu: Mapping[str, Any]
    memory_total: int = 0
    own_pids: frozenset[int] = frozenset()
    own_runs: bool = False
    own_model: bool = False  # it runs with the model that is wanted
    free_cache: int | None = None
    free_cache_least: int = 0


def gib(value: float) -> str:
    return "%.1f GiB" % (value / GIB)


def error(about: str, text: str) -> Finding:
    return Finding("error", about, text)


def warning(about: str, text: str) -> Finding:
    return Finding("warning", about, text)


# -- the image and the driver -----------------------------------------------------------------------------------------


def version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text))


def compare(left: tuple[int, ...], operator: str, right: tuple[int, ...]) -> bool:
    length = max(len(left), len(right))
    padded = (left + (0,) * (length - len(left)), right + (0,) * (length - len(right)))
    return {
        ">=": padded[0] >= padded[1],
        ">": padded[0] > padded[1],
        "<=": padded[0] <= padded[1],
        "<": padded[0] < padded[1],
        "=": padded[0] == padded[1],
        "!=": padded[0] != padded[1],
    }[operator]


def requirement_holds(text: str, cuda: str, driver: str) -> bool | None:
    """Whether the runtime would let the container start: blanks mean or, commas and. None where a brand decides."""
    known = {"cuda": version(cuda), "driver": version(driver)}
    undecided = False
    for alternative in text.split():
        verdict: bool | None = True
        for term in alternative.split(","):
            parsed = re.match(r"^(\w+)(>=|<=|!=|=|>|<)(.+)$", term)
            if not parsed or parsed.group(1) not in known:
                verdict = None if verdict else verdict
            elif not compare(known[parsed.group(1)], parsed.group(2), version(parsed.group(3))):
                verdict = False
                break
        if verdict:
            return True
        undecided = undecided or verdict is None
    return None if undecided else False


def image_findings(environment: Mapping[str, Any], gpu: Mapping[str, Any]) -> list[Finding]:
    need = str(environment.get("CUDA_VERSION") or "")
    require = str(environment.get("NVIDIA_REQUIRE_CUDA") or "")
    if str(environment.get("NVIDIA_DISABLE_REQUIRE") or "").lower() in ("1", "true", "yes"):
        require = ""
    has = str(gpu.get("cuda") or "")
    driver = str((gpu.get("driver") or {}).get("loaded") or "")
    if not need and not require:
        return [
            warning(
                "image",
                "the image does not say which CUDA it needs: whether the driver is new enough shows at its start",
            )
        ]
    if not has:
        return [
            warning(
                "image",
                "the driver does not say which CUDA it runs: whether that is enough for the image shows at its start",
            )
        ]
    stated = re.search(r"cuda>=([\d.]+)", require)
    wanted = stated.group(1) if stated else need
    major = (version(wanted) or (0,))[0]
    across = major > version(has)[0]
    advice = (
        "the image needs CUDA %s, the driver %s runs CUDA %s at most: upgrade the driver (%s), or set vllm_tag to an image for CUDA %s%s"
        % (
            wanted,
            driver or "that is loaded",
            has,
            "%d or newer" % DRIVERS[major] if across and major in DRIVERS else "a newer nvidia_driver_branch",
            version(has)[0] if across else has,
            " (vLLM's own have such as -cu129)" if across else "",
        )
    )
    holds = requirement_holds(require, has, driver) if require else True
    if holds is False:
        return [error("image", advice)]
    # Within a major version an older driver runs a newer CUDA. Across them the image's own libraries may make up for it, on cards of
    # some brands, and only where somebody has asked for that.
    if not across:
        return []
    if str(environment.get("VLLM_ENABLE_CUDA_COMPATIBILITY") or "").lower() in ("1", "true", "auto"):
        return [
            warning("image", advice + ". Whether VLLM_ENABLE_CUDA_COMPATIBILITY makes up for it shows at its start")
        ]
    return [error("image", advice)]


# -- the cards --------------------------------------------------------------------------------------------------------


def card_findings(wanted: Wanted, host: Host) -> list[Finding]:
    gpu = host.gpu
    if not gpu.get("usable"):
        said = str(gpu.get("problem") or "no NVIDIA GPU answers")
        return [error("gpu", "%s; set vllm_device to cpu for a build without GPU" % said.rstrip("."))]
    count = len(gpu["devices"])
    if count < wanted.tensor_parallel_size:
        text = "vllm_tensor_parallel_size is %d, the host has %d GPU%s; set %d at most"
        return [error("gpu", text % (wanted.tensor_parallel_size, count, "" if count == 1 else "s", count))]
    return []


def share_bytes(wanted: Wanted, device: Mapping[str, Any]) -> float:
    """What vLLM may take of a card."""
    return float(device["memory_total_mib"]) * MIB * USABLE * wanted.gpu_memory_utilization


def foreign_mib(device: Mapping[str, Any], host: Host, alone: bool) -> tuple[float, str]:
    """GPU memory that will still be held when our own container has stopped, and by whom."""
    used = float(device.get("memory_used_mib") or 0)
    processes = host.gpu.get("processes") or []
    others = [entry for entry in processes if entry.get("pid") not in host.own_pids]
    held = float(sum(entry.get("memory_used_mib") or 0 for entry in others))
    names = ", ".join(
        "%s (pid %s, %s MiB)" % (entry.get("name"), entry.get("pid"), entry.get("memory_used_mib")) for entry in others
    )
    if held:
        return held if alone else min(held, used), names
    seen = any(entry.get("pid") in host.own_pids for entry in processes)
    if seen or host.own_runs or used <= IDLE_MIB:
        return 0, ""
    return used, "processes that nvidia-smi does not name"


def memory_findings(
    config: Config, stored: int | None, wanted: Wanted, host: Host
) -> tuple[list[Finding], dict[str, float]]:
    """Weights, cache and the rest of it against each card's share."""
    cards = wanted.tensor_parallel_size
    devices = host.gpu["devices"][:cards]
    if any(not device.get("memory_total_mib") for device in devices):
        return [
            warning(
                "memory",
                "nvidia-smi does not say how much memory the card has: whether the model fits shows at its start",
            )
        ], {}
    device = min(devices, key=lambda entry: entry["memory_total_mib"])
    name, total = device.get("name") or "the GPU", float(device["memory_total_mib"]) * MIB
    share = share_bytes(wanted, device)
    found: list[Finding] = []

    for entry in devices:
        held, by = foreign_mib(entry, host, len(host.gpu["devices"]) == 1)
        free = float(entry["memory_total_mib"]) * MIB * USABLE - held * MIB
        if held and share_bytes(wanted, entry) > free:
            fitting = max(0, int(free / (float(entry["memory_total_mib"]) * MIB * USABLE) * 100)) / 100
            text = "%s of %s are held by %s, and vllm_gpu_memory_utilization %s asks for %s: stop that, or set %.2f at most"
            found.append(
                error(
                    "memory",
                    text
                    % (
                        gib(held * MIB),
                        gib(float(entry["memory_total_mib"]) * MIB),
                        by,
                        wanted.gpu_memory_utilization,
                        gib(share_bytes(wanted, entry)),
                        fitting,
                    ),
                )
            )

    shape = memory.shape_of(config)
    overhead = memory.overhead_bytes(shape, cards)
    numbers: dict[str, float] = {"share": share, "overhead": overhead}
    if stored is None:
        found.append(warning("memory", "the size of the weights is unknown: whether they fit shows at the start"))
        return found, numbers
    weights = memory.loaded_bytes(config, stored, wanted.dtype, wanted.quantization) / cards
    numbers["weights"] = weights
    whole = "%s (%s x vllm_gpu_memory_utilization %s)" % (gib(share), name, wanted.gpu_memory_utilization)
    if weights > share:
        text = "weights of %s for each card are more than the %s that vLLM may use: %s"
        found.append(error("memory", text % (gib(weights), whole, smaller(weights + overhead, total, wanted))))
        return found, numbers
    element = memory.cache_element(config, wanted.kv_cache_dtype, wanted.dtype)
    tokens = wanted.max_model_len or memory.longest_context(config) or 0
    if shape is None or element is None or not tokens:
        kind = ", ".join(config.get("architectures") or []) or config.get("model_type") or "unknown"
        found.append(
            warning(
                "memory",
                "the weights take %s of %s; how much the context takes is not known for this architecture (%s)"
                % (gib(weights), whole, kind),
            )
        )
        return found, numbers
    cache = memory.cache_bytes(shape, tokens, element, cards)
    numbers["cache"] = cache
    fits = memory.longest_fit(shape, share - weights - overhead, element, cards) if share > weights + overhead else 0
    numbers["longest"] = fits
    parts = "weights %s + context of %d tokens %s" % (gib(weights), tokens, gib(cache))
    advice = "set vllm_max_model_len to %d or less" % fits if fits >= 256 else ""
    advice += (", or " if advice else "") + smaller(weights + cache + overhead, total, wanted)
    if weights + cache > share:
        found.append(error("memory", "%s are more than the %s: %s" % (parts, whole, advice)))
    elif weights + cache + overhead > share:
        text = "%s + about %s for CUDA and a step are more than the %s; it may fail to start: %s"
        found.append(warning("memory", text % (parts, gib(overhead), whole, advice)))
    return found, numbers


def smaller(need: float, total: float, wanted: Wanted) -> str:
    """What to set so that it fits."""
    ways = []
    # Beyond 0.95 the rest of the card is too little for CUDA itself.
    share = need / (total * USABLE)
    if wanted.gpu_memory_utilization < share <= 0.95:
        ways.append("set vllm_gpu_memory_utilization to %.2f" % (int(share * 100 + 1) / 100))
    ways.append("take a smaller or quantised model")
    ways.append("more cards (vllm_tensor_parallel_size)")
    return ", ".join(ways[:-1]) + " or " + ways[-1]


# -- the model and its settings ---------------------------------------------------------------------------------------


def model_findings(config: Config | None, wanted: Wanted) -> list[Finding]:
    if config is None:
        return [error("model", "its folder has no config.json that can be read: check vllm_model")]
    found = []
    limit = memory.longest_context(config)
    if limit and wanted.max_model_len > limit and not wanted.longer_than_model:
        text = "vllm_max_model_len is %d, the model knows %d tokens; set %d at most, or 0 for all of them"
        found.append(error("context", text % (wanted.max_model_len, limit, limit)))
    shape = memory.shape_of(config)
    if shape and shape.heads % wanted.tensor_parallel_size:
        text = "vllm_tensor_parallel_size is %d, which does not divide the model's %d attention heads"
        found.append(error("parallel", text % (wanted.tensor_parallel_size, shape.heads)))
    method = memory.method_of(config)
    asked = wanted.quantization
    if method and asked and family(method) != family(asked) and {family(method), family(asked)} <= set(FAMILIES):
        text = "vllm_quantization is %s, the model is quantised by %s; leave it empty"
        found.append(error("quantization", text % (asked, method)))
    if asked in ("awq", "gptq", "awq_marlin", "gptq_marlin") and not method:
        text = "vllm_quantization is %s, the model's weights are not quantised; take a model that is, or leave it empty"
        found.append(error("quantization", text % asked))
    return found


def family(method: str) -> str:
    return method.replace("_marlin", "")


def adapter_findings(name: str, adapter: Config | None, config: Config | None, wanted: Wanted) -> list[Finding]:
    if adapter is None:
        return [error("lora", "%s: its folder has no adapter_config.json that can be read" % name)]
    found = []
    rank = adapter.get("r")
    if isinstance(rank, int) and rank > wanted.max_lora_rank:
        text = "%s has rank %d, vllm_max_lora_rank is %d; set %d or more"
        found.append(error("lora", text % (name, rank, wanted.max_lora_rank, rank)))
    if adapter.get("use_dora"):
        found.append(warning("lora", "%s uses DoRA, which vLLM may not know" % name))
    return found


# -- the host ---------------------------------------------------------------------------------------------------------


def host_findings(config: Config | None, stored: int | None, wanted: Wanted, host: Host) -> list[Finding]:
    found = []
    need = PROCESS + wanted.shm_size
    parts = "%s for its processes and %s shared memory" % (gib(PROCESS), gib(wanted.shm_size))
    if wanted.device == "cpu":
        # Small models run on less: a test's take a gigabyte.
        weights = memory.loaded_bytes(config, stored, wanted.dtype, wanted.quantization) if config and stored else 0
        need, parts = GIB + weights, "%s for its processes and %s of weights" % (gib(GIB), gib(weights))
    if host.memory_total and need > host.memory_total:
        found.append(
            error("ram", "vLLM needs %s (%s), the host has %s of RAM" % (gib(need), parts, gib(host.memory_total)))
        )
    elif wanted.memory and need > wanted.memory:
        found.append(
            error("ram", "vLLM needs %s (%s), vllm_memory is %s: raise it" % (gib(need), parts, gib(wanted.memory)))
        )
    if host.memory_total and wanted.memory > host.memory_total:
        text = "vllm_memory is %s, the host has %s: the whole host runs out before the limit is met"
        found.append(warning("ram", text % (gib(wanted.memory), gib(host.memory_total))))
    if host.free_cache is not None and host.free_cache < host.free_cache_least:
        # What serves has its caches, and another key for it needs no space.
        level = warning if host.own_model else error
        text = "%s are free for compile caches on the volume of the models, %s are needed: remove models that are no longer used"
        found.append(level("disk", text % (gib(host.free_cache), gib(host.free_cache_least))))
    return found


# -- all of it --------------------------------------------------------------------------------------------------------


def examine(
    folder: str, adapters: Sequence[tuple[str, str]], image_environment: Mapping[str, Any], wanted: Wanted, host: Host
) -> tuple[list[Finding], dict[str, float]]:
    """Every finding, errors first, and the numbers behind them in bytes."""
    config = memory.read_json(os.path.join(folder, "config.json"))
    stored = memory.weights_in(folder)
    numbers: dict[str, float] = {}
    found = model_findings(config, wanted)
    for name, path in adapters:
        found += adapter_findings(name, memory.read_json(os.path.join(path, "adapter_config.json")), config, wanted)
    if wanted.device == "cuda":
        cards = card_findings(wanted, host)
        found += cards
        if not cards:
            found += image_findings(image_environment, host.gpu)
            if config is not None:
                fit, numbers = memory_findings(config, stored, wanted, host)
                found += fit
    found += host_findings(config, stored, wanted, host)
    return sorted(found, key=lambda finding: finding.level != "error"), numbers
