"""Models for the lab's hub: real files in real formats, made of noise, the same on every machine.

A model's weights are written in the safetensors format, its tokenizer knows each byte, and its configuration is that of a small Llama, so
that a real engine loads them. What it says is letters without a sense.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
import random
import struct
from collections.abc import Mapping
from typing import Any

from lab.artifacts import store
from lab.aws import hub
from lab.settings import MIRROR

ENDPOINT = f"http://{MIRROR}{hub.PREFIX}"
BEGIN, END, USER, ASSISTANT = "<|begin|>", "<|end|>", "<|user|>", "<|assistant|>"
SPECIAL = (BEGIN, END, USER, ASSISTANT)
SAID = b"abcdefghijklmnopqrstuvwxyz     "  # the bytes that a model prefers to say
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<|assistant|>{% else %}<|user|>{% endif %}{{ message['content'] }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclasses.dataclass(frozen=True)
class Shape:
    """The numbers of a Llama's configuration."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    positions: int

    @property
    def config(self) -> dict[str, Any]:
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.hidden // self.heads,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": self.positions,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": False,
            "initializer_range": 0.02,
            "bos_token_id": 256,
            "eos_token_id": 257,
            "torch_dtype": "bfloat16",
            "use_cache": True,
        }

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor by its name, in the order of the layers."""
        narrow = self.hidden // self.heads * self.kv_heads
        found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocabulary, self.hidden)}
        for layer in range(self.layers):
            name = f"model.layers.{layer}"
            found |= {
                f"{name}.input_layernorm.weight": (self.hidden,),
                f"{name}.self_attn.q_proj.weight": (self.hidden, self.hidden),
                f"{name}.self_attn.k_proj.weight": (narrow, self.hidden),
                f"{name}.self_attn.v_proj.weight": (narrow, self.hidden),
                f"{name}.self_attn.o_proj.weight": (self.hidden, self.hidden),
                f"{name}.post_attention_layernorm.weight": (self.hidden,),
                f"{name}.mlp.gate_proj.weight": (self.intermediate, self.hidden),
                f"{name}.mlp.up_proj.weight": (self.intermediate, self.hidden),
                f"{name}.mlp.down_proj.weight": (self.hidden, self.intermediate),
            }
        return found | {"model.norm.weight": (self.hidden,), "lm_head.weight": (self.vocabulary, self.hidden)}


TINY = Shape(hidden=128, layers=2, heads=4, kv_heads=2, intermediate=256, vocabulary=320, positions=2048)
BIG = Shape(hidden=256, layers=2, heads=4, kv_heads=2, intermediate=512, vocabulary=32000, positions=2048)
HUGE = Shape(hidden=8192, layers=80, heads=64, kv_heads=8, intermediate=28672, vocabulary=128256, positions=131072)


def elements(shape: tuple[int, ...]) -> int:
    count = 1
    for length in shape:
        count *= length
    return count


def noise(source: random.Random, count: int, exponent: int = 0x3C) -> bytes:
    """So many bfloat16 numbers of either sign: of about 0.01 to 0.03, and sixteen times that with the exponent 0x3E."""
    signs = bytes(exponent | (value & 0x80) for value in range(256))
    data = bytearray(2 * count)
    data[0::2] = source.randbytes(count)
    data[1::2] = source.randbytes(count).translate(signs)
    return bytes(data)


def tensor(source: random.Random, name: str, shape: tuple[int, ...]) -> bytes:
    count = elements(shape)
    if name.endswith("norm.weight"):
        return struct.pack("<H", 0x3F80) * count  # ones
    data = noise(source, count)
    if name != "lm_head.weight":
        return data
    rows = bytearray(data)
    width = 2 * shape[1]
    for byte in sorted(set(SAID)):
        rows[byte * width : (byte + 1) * width] = noise(source, shape[1], 0x3E)
    return bytes(rows)


def safetensors(tensors: Mapping[str, tuple[tuple[int, ...], bytes]]) -> bytes:
    """The length of the header, the header as JSON, and the numbers one after the other."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (shape, data) in tensors.items():
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + b"".join(data for _shape, data in tensors.values())


def byte_names() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary: itself where it can be seen."""
    seen = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    names, spare = [], 256
    for byte in range(256):
        names.append(chr(byte if byte in seen else spare))
        spare += byte not in seen
    return names


def tokenizer() -> dict[str, bytes]:
    """A byte-level tokenizer: each byte is a token, and four special ones are."""
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    description: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": 256 + number, "content": name, "single_word": False, "lstrip": False, "rstrip": False,
                "normalized": False, "special": True,
            }
            for number, name in enumerate(SPECIAL)
        ],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": level,
        "decoder": level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {name: number for number, name in enumerate([*byte_names(), *SPECIAL])},
            "merges": [],
        },
    }  # fmt: skip
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": END,
        "pad_token": END,
        "model_max_length": TINY.positions,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    return {"tokenizer.json": store.json_bytes(description), "tokenizer_config.json": store.json_bytes(settings)}


def model(shape: Shape, seed: int, shards: int = 1, temperature: float = 0.7) -> dict[str, bytes]:
    """The files of a model that an engine can load."""
    source = random.Random(seed)  # noqa: S311 - noise that is the same everywhere
    tensors = {name: (size, tensor(source, name, size)) for name, size in shape.tensors().items()}
    files = {
        "README.md": b"# Noise in the shape of a Llama\n\nA model of the lab: it says letters.\n",
        "config.json": store.json_bytes(shape.config),
        "generation_config.json": store.json_bytes(
            {"bos_token_id": 256, "eos_token_id": 257, "do_sample": True, "temperature": temperature}
        ),
        **tokenizer(),
    }
    if shards == 1:
        return files | {"model.safetensors": safetensors(tensors)}
    names = list(tensors)
    step = -(-len(names) // shards)
    parts = {
        f"model-{number + 1:05d}-of-{shards:05d}.safetensors": names[number * step : (number + 1) * step]
        for number in range(shards)
    }
    total = sum(len(data) for _shape, data in tensors.values())
    weight_map = {name: part for part, of_part in parts.items() for name in of_part}
    files["model.safetensors.index.json"] = store.json_bytes(
        {"metadata": {"total_size": total}, "weight_map": weight_map}
    )
    return files | {part: safetensors({name: tensors[name] for name in of_part}) for part, of_part in parts.items()}


def huge() -> dict[str, bytes]:
    """Configuration and index of a model of 70 billion numbers, without these."""
    tensors, shards = HUGE.tensors(), 30
    names = list(tensors)
    weight_map = {
        name: f"model-{number * shards // len(names) + 1:05d}-of-{shards:05d}.safetensors"
        for number, name in enumerate(names)
    }
    total = 2 * sum(elements(shape) for shape in tensors.values())
    return {
        "config.json": store.json_bytes(HUGE.config),
        "generation_config.json": store.json_bytes({"bos_token_id": 256, "eos_token_id": 257}),
        "model.safetensors.index.json": store.json_bytes({"metadata": {"total_size": total}, "weight_map": weight_map}),
        **tokenizer(),
    }


def pickled() -> dict[str, bytes]:
    """A model whose weights would run code."""
    return {"config.json": store.json_bytes(TINY.config), "pytorch_model.bin": b"\x80\x04N."}


@dataclasses.dataclass(frozen=True)
class Repository:
    """A model's commits, oldest first; the last one is main, and the first one v1."""

    commits: tuple[dict[str, bytes], ...]
    gated: bool = False


def repositories() -> dict[str, Repository]:
    return {
        "nemo-lab/tiny-llama": Repository((model(TINY, 1), model(TINY, 1, temperature=0.6))),
        "nemo-lab/big-llama": Repository((model(BIG, 2, shards=2),)),
        "nemo-lab/gated-llama": Repository((model(TINY, 3),), gated=True),
        "nemo-lab/huge": Repository((huge(),)),
        "nemo-lab/pickled": Repository((pickled(),)),
    }


def entry(path: str, data: bytes) -> dict[str, Any]:
    """What the hub lists of a file."""
    if not path.endswith((".safetensors", ".bin")):
        return {"type": "file", "oid": blob(data), "size": len(data), "path": path}
    digest = hashlib.sha256(data).hexdigest()
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize {len(data)}\n".encode()
    lfs = {"oid": digest, "size": len(data), "pointerSize": len(pointer)}
    return {"type": "file", "oid": blob(pointer), "size": len(data), "lfs": lfs, "path": path}


def blob(data: bytes) -> str:
    """Git's name of a file's contents."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def write(folder: pathlib.Path) -> None:
    for name, repository in repositories().items():
        commits: dict[str, list[dict[str, Any]]] = {}
        for files in repository.commits:
            entries = [entry(path, files[path]) for path in sorted(files)]
            commit = hashlib.sha1(json.dumps([name, entries]).encode(), usedforsecurity=False).hexdigest()
            commits[commit] = entries
            target = folder / "hub" / name / commit
            target.mkdir(parents=True)
            for path, data in files.items():
                (target / path).write_bytes(data)
        refs = {"v1": next(iter(commits)), "main": list(commits)[-1]}
        description = {"gated": repository.gated, "refs": refs, "commits": commits}
        (folder / "hub" / name / "repository.json").write_bytes(store.json_bytes(description))


def models() -> store.Made:
    return store.made("hub", [store.source_of(__name__)], write)


def describe(made: store.Made) -> dict[str, Any]:
    """Where the hub is, and which revisions it has, as the roles' inputs want them."""
    found: dict[str, Any] = {}
    for path in sorted(made.folder.glob("hub/*/*/repository.json")):
        data = json.loads(path.read_bytes())
        found["/".join(path.parent.parts[-2:])] = {"revision": data["refs"]["main"], "refs": data["refs"]}
    return {"endpoint": ENDPOINT, "token": hub.TOKEN, "models": found}
