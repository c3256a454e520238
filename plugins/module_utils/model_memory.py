# Copyright: the nemo.platform authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The memory that a language model takes on a GPU, from its own files: config.json and the sizes of its weights.

What the files do not say is None, and never a guess: the caller then warns and does not refuse.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

Config = Mapping[str, Any]

GIB = 1 << 30
BYTES: dict[str, float] = {
    "float32": 4,
    "float": 4,
    "float16": 2,
    "half": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "fp8": 1,
    "fp8_e4m3": 1,
    "fp8_e5m2": 1,
}
# Bytes for each weight of a linear layer that vLLM quantises while it loads; the embeddings stay as they are.
ON_THE_FLY: dict[str, float] = {"fp8": 1.0, "bitsandbytes": 0.56, "experts_int8": 1.0, "rtn": 0.56}
# Kinds of layers without a cache that grows with the context. Any other kind that is not attention is unknown.
FULL, SLIDING, RECURRENT = "full_attention", "sliding_attention", ("linear_attention", "mamba", "recurrent")
# Keys of state-space models, whose state no formula here knows.
STATE_SPACE = ("ssm_cfg", "mamba_d_state", "state_size", "mamba_num_heads", "ssm_state_size")
# Models whose older configurations leave it to the program which layer sees the whole context: every nth.
PATTERNS = {"gemma2": 2, "gemma3": 6, "gemma3_text": 6, "cohere2": 4}
# What a position's scaling multiplies the context by; others only change how far apart positions are.
SCALING_WITH_FACTOR = ("linear", "dynamic", "yarn", "deepseek_yarn")

# vLLM 0.3x: tokens of one step, and sequences at once, on a card of less than 70 GiB.
STEP_TOKENS = 2048
SEQUENCES = 256
# CUDA's context, libraries, and the graphs that vLLM captures: measured from 0.5 GiB (small models) to 1 GiB.
BASE_OVERHEAD = 0.75 * GIB


class Shape(NamedTuple):
    """What of a model decides about the memory of its cache and its steps."""

    layers: int
    heads: int
    kv_heads: int
    head_size: int
    hidden: int
    intermediate: int
    vocabulary: int
    latent: int  # elements of a token in one layer with multi-head latent attention, 0 without
    full: int  # layers whose cache grows with the whole context
    sliding: int  # layers whose cache ends at the window
    window: int


def first(config: Config, *names: str) -> int | None:
    for name in names:
        value = config.get(name)
        if isinstance(value, bool):
            continue
        if isinstance(value, (int, float)) and value > 0 and float(value).is_integer():
            return int(value)
    return None


def text_part(config: Config) -> Config:
    """A model for more than text keeps its language model apart."""
    for name in ("text_config", "llm_config", "language_config"):
        part = config.get(name)
        if isinstance(part, Mapping):
            return {**{key: value for key, value in config.items() if key not in part}, **part}
    return config


def shape_of(config: Config) -> Shape | None:
    """None for a model whose cache follows no rule that is known here."""
    config = text_part(config)
    layers = first(config, "num_hidden_layers", "n_layer", "n_layers", "num_layers")
    heads = first(config, "num_attention_heads", "n_head", "n_heads", "num_heads")
    hidden = first(config, "hidden_size", "n_embd", "d_model", "dim")
    if not layers or not heads or not hidden or any(name in config for name in STATE_SPACE):
        return None
    if config.get("is_encoder_decoder"):
        return None
    head_size = first(config, "head_dim", "attention_head_dim") or hidden // heads
    kv_heads = first(config, "num_key_value_heads", "num_kv_heads", "n_head_kv", "n_kv_heads")
    if kv_heads is None:
        kv_heads = 1 if config.get("multi_query") else heads
    latent = 0
    if first(config, "kv_lora_rank"):
        latent = (first(config, "kv_lora_rank") or 0) + (first(config, "qk_rope_head_dim") or 0)
    kinds = layer_kinds(config, layers)
    if kinds is None:
        return None
    full, sliding, window = kinds
    intermediate = first(config, "intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size") or 4 * hidden
    vocabulary = first(config, "vocab_size") or 0
    return Shape(layers, heads, kv_heads, head_size, hidden, intermediate, vocabulary, latent, full, sliding, window)


def layer_kinds(config: Config, layers: int) -> tuple[int, int, int] | None:
    """Layers that see the whole context, those that see a window of it, and that window."""
    window = first(config, "sliding_window") or 0
    if config.get("use_sliding_window") is False:
        window = 0
    kinds = config.get("layer_types")
    if isinstance(kinds, list) and kinds:
        sliding = kinds.count(SLIDING) if window else 0
        full = kinds.count(FULL) + (0 if window else kinds.count(SLIDING))
        known = full + sliding + sum(kinds.count(kind) for kind in RECURRENT)
        return (full, sliding, window) if known == len(kinds) else None
    if not window:
        return layers, 0, 0
    every = first(config, "sliding_window_pattern") or PATTERNS.get(str(config.get("model_type")))
    full = layers // every if every else 0
    return full, layers - full, window


def longest_context(config: Config) -> int | None:
    """The longest context that the model itself knows, None where it says none."""
    config = text_part(config)
    limit = first(config, "max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_sequence_length")
    if limit is None:
        return None
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(scaling, Mapping):
        return limit
    kind = scaling.get("rope_type") or scaling.get("type")
    factor = scaling.get("factor")
    if kind in SCALING_WITH_FACTOR and isinstance(factor, (int, float)) and factor > 0:
        original = first(scaling, "original_max_position_embeddings") if str(kind).endswith("yarn") else None
        return max(int((original or limit) * factor), limit if original else 0)
    return limit


# -- weights ----------------------------------------------------------------------------------------------------------


def weights_in(folder: str) -> int | None:
    """Bytes of the weights that vLLM would load from a folder, None where there are none."""
    index = read_json(os.path.join(folder, "model.safetensors.index.json"))
    if index:
        names = set((index.get("weight_map") or {}).values())
        sizes = [size_of(os.path.join(folder, name)) for name in sorted(names)]
        if sizes and all(sizes):
            return sum(sizes)
        total = (index.get("metadata") or {}).get("total_size")
        if isinstance(total, (int, float)) and total > 0:
            return int(total)
    try:
        names = set(os.listdir(folder))
    except OSError:
        return None
    for ending in (".safetensors", ".bin", ".pt", ".gguf"):
        # Some repositories hold the same weights a second time, for another program.
        found = [name for name in sorted(names) if name.endswith(ending)]
        found = [name for name in found if not name.startswith("consolidated")] or found
        found = [name for name in found if name not in ("training_args.bin", "optimizer.pt", "scheduler.pt")]
        total = sum(size_of(os.path.join(folder, name)) for name in found)
        if total:
            return total
    return None


def size_of(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return 0


def read_json(path: str) -> dict[str, Any] | None:
    try:
        with open(path, encoding="utf-8") as stream:
            data = json.load(stream)
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) else None


def stored_dtype(config: Config) -> str | None:
    """The type in which the weights lie on disk."""
    for part in (config, text_part(config)):
        name = part.get("dtype") or part.get("torch_dtype")
        if isinstance(name, str):
            return name.replace("torch.", "")
    return None


def served_dtype(config: Config, wanted: str) -> str | None:
    """The type that vLLM computes in: auto is the model's own, but for float32, which it halves."""
    if wanted != "auto":
        return wanted
    stored = stored_dtype(config)
    return "float16" if stored == "float32" else stored


def method_of(config: Config) -> str:
    """The quantisation that the model brings."""
    for part in (config, text_part(config)):
        entry = part.get("quantization_config") or part.get("compression_config")
        if isinstance(entry, Mapping):
            return str(entry.get("quant_method") or "").lower()
    return ""


def embedding_elements(config: Config) -> int:
    shape = shape_of(config)
    if not shape:
        return 0
    return shape.vocabulary * shape.hidden * (1 if text_part(config).get("tie_word_embeddings") else 2)


def loaded_bytes(config: Config, stored: int, dtype: str, quantization: str) -> int:
    """Bytes that the weights take once they are loaded, on all cards together."""
    if method_of(config):
        return stored
    was = BYTES.get(stored_dtype(config) or "")
    becomes = BYTES.get(served_dtype(config, dtype) or "")
    if not was or not becomes:
        return stored
    elements = stored / was
    if quantization in ON_THE_FLY:
        embeddings = min(embedding_elements(config), elements)
        return int(embeddings * becomes + (elements - embeddings) * ON_THE_FLY[quantization])
    return int(elements * becomes)


# -- cache and steps --------------------------------------------------------------------------------------------------


def token_bytes(shape: Shape, element: float, cards: int) -> float:
    """Bytes of one token in one layer's cache on one card. Latent attention keeps the whole on each of them."""
    if shape.latent:
        return shape.latent * element
    return 2 * max(1, math.ceil(shape.kv_heads / cards)) * shape.head_size * element


def cache_bytes(shape: Shape, tokens: int, element: float, cards: int) -> int:
    """Bytes of the cache for one request of this many tokens, on one card."""
    each = token_bytes(shape, element, cards)
    # A window's cache holds the tokens of a step besides.
    inside = min(tokens, shape.window + STEP_TOKENS) if shape.window else tokens
    return int(each * (shape.full * tokens + shape.sliding * inside))


def longest_fit(shape: Shape, room: float, element: float, cards: int) -> int:
    """Tokens of one request whose cache fits into the room, by whole blocks of 16."""
    low, high = 0, 1 << 24
    while low < high:
        middle = (low + high + 1) // 2
        if cache_bytes(shape, middle, element, cards) <= room:
            low = middle
        else:
            high = middle - 1
    return low // 16 * 16


def cache_element(config: Config, cache_dtype: str, dtype: str) -> float | None:
    name = cache_dtype if cache_dtype != "auto" else served_dtype(config, dtype)
    return BYTES.get(name or "")


def overhead_bytes(shape: Shape | None, cards: int) -> int:
    """An estimate of what vLLM takes beside weights and cache."""
    if not shape:
        return int(BASE_OVERHEAD)
    step = STEP_TOKENS * (2 * shape.intermediate / cards + 4 * shape.hidden) * 2
    logits = SEQUENCES * shape.vocabulary * 4 * 2
    return int(BASE_OVERHEAD + step + logits)
