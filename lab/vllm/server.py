#!/usr/bin/python3
"""The lab's inference server: vLLM's command line, log, endpoints and ways to fail, without an engine behind them.

It needs what the real one needs (a model folder with its configuration and weights, a GPU with enough free memory) and says
what the real one says where that is missing, so that whatever reads its log or talks to it works with vLLM too. It answers
with words that depend on the prompt alone; sampling parameters are taken and not used.

LAB_BEHAVIOUR, baked into the image, says how it behaves:

    healthy      loads, answers, drains
    slow         the same, after LAB_DELAY seconds of loading weights
    oom          the GPU's memory does not suffice while weights load
    bad-kernel   it was not compiled for this GPU
    hang         answers no completion, and goes on calling itself healthy
    exit-zero    its engine dies with its first completion, and the process ends with status 0

While it runs, the file lab-behaviour in its cache (LAB_CONTROL) switches it: "hang" for as long as the file is there,
"exit-zero" at once. "hang once" and "exit-zero once" take the file away, so that a restart helps.

Standard library alone, for the Python 3.11 of its image.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import hmac
import http.server
import json
import math
import os
import pathlib
import re
import select
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

VERSION = os.environ.get("LAB_VERSION", "0.33.0")
BEHAVIOUR = os.environ.get("LAB_BEHAVIOUR", "healthy")
DELAY = float(os.environ.get("LAB_DELAY", "20"))  # seconds for which `slow` loads weights
STEP = float(os.environ.get("LAB_STEP", "0.5"))  # seconds of each other phase of loading; compiling takes three of them
TOKEN = float(os.environ.get("LAB_TOKEN", "0.01"))  # seconds for one token
CONTROL = pathlib.Path(os.environ.get("LAB_CONTROL", "/cache/lab-behaviour"))
OPTIONS = pathlib.Path(__file__).resolve().with_name("options.txt")

GIB = 1 << 30
WEIGHTS = ("*.safetensors", "*.bin", "*.pt")
GUARDED = ("/v1", "/v2", "/inference", "/cohere")  # what the API keys cover; everything else is open to whoever asks
BYTES = {"bfloat16": 2, "float16": 2, "half": 2, "float": 4, "float32": 4, "auto": 2}
WORDS = ("this", "model", "has", "read", "no", "book", "and", "draws", "its", "words", "from", "a", "short", "list")
CONSERVING = "See https://docs.vllm.ai/en/latest/configuration/conserving_memory/ for more details."


# ---- log


def log(process: str, place: str, text: str, level: str = "INFO") -> None:
    """Lines as vLLM's own formatter makes them: each starts with the process, the level, the time and the place."""
    start = f"({process} pid={os.getpid()}) {level} {time.strftime('%m-%d %H:%M:%S')} [{place}] "
    print("\n".join(start + line for line in text.split("\n")), flush=True)


def api(place: str, text: str, level: str = "INFO") -> None:
    log("APIServer", place, text, level)


def core(place: str, text: str, level: str = "INFO") -> None:
    log("EngineCore", place, text, level)


def uvicorn(text: str) -> None:
    print(f"INFO:     {text}", file=sys.stderr, flush=True)


def fail(kind: str, text: str) -> NoReturn:
    """The end of a process by an exception that nobody caught."""
    print(f"Traceback (most recent call last):\n{kind}: {text}", file=sys.stderr, flush=True)
    raise SystemExit(1)


def invalid(config: str, text: str) -> NoReturn:
    """What the validation of the settings says, before any engine is started."""
    fail(
        "pydantic_core._pydantic_core.ValidationError",
        f"1 validation error for {config}\n  Value error, {text} [type=value_error]",
    )


class EngineError(Exception):
    """The engine cannot start: the exception's name in vLLM, and what it says."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


# ---- arguments


def size(text: str) -> int:
    """A number as people write it: 8192, 8k (thousands), 8K (of 1024); auto is 0."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kKmMgG]?)", text.strip())
    if text in ("auto", "-1"):
        return 0
    if not found:
        raise ValueError(text)
    thousand = 1000 if found[2].islower() else 1024
    return int(float(found[1]) * thousand ** " kmg".index(found[2].lower() or " "))


size.__name__ = "human_readable_int_or_auto"  # what argparse calls it in its message
TYPES: dict[str, Callable[[str], Any]] = {"int": int, "float": float, "size": size, "json": json.loads, "text": str}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="vllm serve", usage="vllm serve [model_tag] [options]")
    made.add_argument("model_tag", nargs="?")
    for line in OPTIONS.read_text().splitlines():
        if line.startswith("#"):
            continue
        names, kind = line.split(" ", 1)
        flags = [name for name in names.split(",") if not name.startswith("--no-")]
        if kind == "flag":
            made.add_argument(*flags, action=argparse.BooleanOptionalAction if "--no-" in names else "store_true")
            continue
        value, many = (kind[:-1], kind[-1]) if kind[-1] in "+?" else (kind, None)
        if "|" in value:
            made.add_argument(*flags, nargs=many, choices=value.split("|"))
        else:
            made.add_argument(*flags, nargs=many, type=TYPES[value])
    return made


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The options of `vllm serve`; whatever vLLM does not know ends the process with status 2."""
    if not argv or argv[0] != "serve":
        print("usage: vllm [-h] [-v] {chat,complete,serve,launch,bench,collect-env,run-batch} ...", file=sys.stderr)
        raise SystemExit(2)
    # --max_model_len is --max-model-len.
    dashed = [re.sub(r"^--[^=]+", lambda name: name[0].replace("_", "-"), word) for word in argv[1:]]
    found, unknown = parser().parse_known_args(dashed)
    if unknown:
        print("usage: vllm [-h] [-v] {chat,complete,serve,launch,bench,collect-env,run-batch} ...", file=sys.stderr)
        print(f"vllm: error: unrecognized arguments: {' '.join(unknown)}", file=sys.stderr)
        raise SystemExit(2)
    return found


# ---- model


class Model:
    """A model folder, as far as its configuration and the sizes of its files tell."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.path = options.model_tag or options.model or "Qwen/Qwen3-0.6B"
        self.folder = pathlib.Path(self.path)
        self.config = self._config()
        position = int(self.config.get("max_position_embeddings") or 0)
        self.max_length: int = options.max_model_len or position or 2048
        if position and self.max_length > position and os.environ.get("VLLM_ALLOW_LONG_MAX_MODEL_LEN") != "1":
            invalid(
                "ModelConfig",
                f"User-specified max_model_len ({self.max_length}) is greater than the derived max_model_len "
                f"(max_position_embeddings={position}.0 or model_max_length=None in model's config.json). To allow overriding "
                "this maximum, set the env var VLLM_ALLOW_LONG_MAX_MODEL_LEN=1.",
            )
        quantized = (self.config.get("quantization_config") or {}).get("quant_method")
        if options.quantization and not quantized:
            invalid("VllmConfig", f"Cannot find the config file for {options.quantization}")
        if options.quantization and options.quantization != quantized:
            invalid(
                "VllmConfig",
                f"Quantization method specified in the model config ({quantized}) does not match the quantization method "
                f"specified in the `quantization` argument ({options.quantization}).",
            )
        heads, parts = int(self.config.get("num_attention_heads") or 1), options.tensor_parallel_size or 1
        if heads % parts:
            invalid(
                "VllmConfig",
                f"Total number of attention heads ({heads}) must be divisible by tensor parallel size ({parts}).",
            )
        self.dtype = options.dtype or "auto"
        self.cache_dtype = "fp8" if str(options.kv_cache_dtype).startswith("fp8") else self.dtype
        self.names: list[str] = options.served_model_name or [self.path]

    def _config(self) -> dict[str, Any]:
        if not self.folder.is_absolute() and not self.folder.is_dir():
            fail(
                "huggingface_hub.errors.LocalEntryNotFoundError",
                "Cannot find an appropriate cached snapshot folder for the specified revision on the local disk and outgoing "
                "traffic has been disabled. To enable repo look-ups and downloads online, pass 'local_files_only=False' as input.",
            )
        if not self.folder.is_dir():
            fail(
                "huggingface_hub.errors.HFValidationError",
                f"Repo id must be in the form 'repo_name' or 'namespace/repo_name': '{self.path}'. Use `repo_type` argument if needed.",
            )
        try:
            found: dict[str, Any] = json.loads((self.folder / "config.json").read_text())
        except FileNotFoundError:
            invalid(
                "ModelConfig",
                f"Invalid repository ID or local directory specified: '{self.path}'.\nPlease verify the following requirements:\n"
                "1. Provide a valid Hugging Face repository ID.\n"
                "2. Specify a local directory that contains a recognized configuration file.\n"
                "   - For Hugging Face models: ensure the presence of a 'config.json'.\n"
                "   - For Mistral models: ensure the presence of a 'params.json'.\n",
            )
        except ValueError:
            fail(
                "OSError", f"It looks like the config file at '{self.folder / 'config.json'}' is not a valid JSON file."
            )
        return found

    @property
    def architecture(self) -> str:
        return str((self.config.get("architectures") or ["LlamaForCausalLM"])[0])

    def load(self) -> int:
        """The bytes of its weights; what is missing or cut off is an error."""
        files = next((found for kind in WEIGHTS if (found := sorted(self.folder.glob(kind)))), [])
        if not files:
            raise EngineError("RuntimeError", f"Cannot find any model weights with `{self.path}`")
        for file in files:
            if file.suffix == ".safetensors":
                self._whole(file)
        return sum(file.stat().st_size for file in files)

    def _whole(self, file: pathlib.Path) -> None:
        """Whether a file has all the tensors that its header names."""
        problem = "Error while deserializing header: "
        with file.open("rb") as content:
            length = int.from_bytes(content.read(8), "little")
            total = file.stat().st_size
            if length > min(total, 100 << 20):
                raise EngineError("safetensors._safetensors_rust.SafetensorError", f"{problem}invalid header length")
            try:
                header = json.loads(content.read(length))
            except ValueError as error:
                raise EngineError(
                    "safetensors._safetensors_rust.SafetensorError", f"{problem}invalid JSON in header"
                ) from error
        ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
        if 8 + length + max(ends, default=0) != total:
            raise EngineError(
                "safetensors._safetensors_rust.SafetensorError", f"{problem}incomplete metadata, file not fully covered"
            )

    def cache_bytes(self) -> int:
        """What one token takes in the KV cache."""
        config = self.config
        heads = int(config.get("num_attention_heads") or 1)
        width = int(config.get("head_dim") or int(config.get("hidden_size") or heads) // heads)
        pairs = 2 * int(config.get("num_hidden_layers") or 1) * int(config.get("num_key_value_heads") or heads)
        return pairs * width * (1 if self.cache_dtype == "fp8" else BYTES.get(self.cache_dtype, 2))


def loras(options: argparse.Namespace) -> dict[str, str]:
    """The adapters by name, given as name=path or as JSON."""
    found = {}
    for text in options.lora_modules or []:
        entry = (
            json.loads(text) if text.startswith("{") else dict(zip(("name", "path"), text.split("=", 1), strict=True))
        )
        found[entry["name"]] = entry["path"]
    if found and not options.enable_lora:
        fail("ValueError", "Call to add_lora method failed: LoRA is not enabled. Use --enable-lora to enable LoRA.")
    return found


# ---- GPU


class Gpus:
    """The GPUs that a container was given, as nvidia-smi inside of it shows them."""

    def __init__(self) -> None:
        query = ["--query-gpu=name,memory.total,memory.used", "--format=csv,noheader,nounits"]
        lines = [line.split(", ") for line in _nvidia_smi(*query).splitlines()]
        self.all = [
            (name, int(total) << 20, int(used) << 20)
            for name, total, used in (line[-3:] for line in lines if len(line) >= 3)
        ]
        if not self.all:
            fail(
                "RuntimeError",
                "Failed to infer device type, please set the environment variable `VLLM_LOGGING_LEVEL=DEBUG` to turn on "
                "verbose logging to help debug the issue.",
            )

    def check_driver(self) -> None:
        """A CUDA newer than the driver knows is found out by torch, if the container's runtime let it start at all."""
        shown = re.search(r"CUDA Version:\s*(\d+)\.(\d+)", _nvidia_smi())
        needed = re.search(r"cuda>=(\d+)\.(\d+)", os.environ.get("NVIDIA_REQUIRE_CUDA", ""))
        if shown and needed and (int(shown[1]), int(shown[2])) < (int(needed[1]), int(needed[2])):
            raise EngineError(
                "RuntimeError",
                f"The NVIDIA driver on your system is too old (found version {int(shown[1]) * 1000 + int(shown[2]) * 10}). Please "
                "update your GPU driver by downloading and installing a new version from the URL: "
                "http://www.nvidia.com/Download/index.aspx",
            )

    def reserve(self, share: float) -> int:
        """The bytes that the engine may use; its share must be free when it starts."""
        _, total, used = self.all[0]
        wanted = math.ceil(total * share)
        if total - used < wanted:
            raise EngineError(
                "ValueError",
                f"Free memory on device cuda:0 ({gib(total - used)}/{gib(total)} GiB) on startup is less than desired GPU memory "
                f"utilization ({share}, {gib(wanted)} GiB). Decrease GPU memory utilization or reduce GPU memory used by other "
                "processes.",
            )
        return wanted


def _nvidia_smi(*options: str) -> str:
    """What it prints; nothing where there is none, or no driver that it can talk to."""
    try:
        done = subprocess.run(["nvidia-smi", *options], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def gib(size: int) -> str:
    return f"{size / GIB:.2f}"


# ---- engine


class Dead(Exception):
    """The engine is gone, or is going."""


class Engine:
    """Loads in phases, makes tokens, and does what its behaviour says."""

    def __init__(self, options: argparse.Namespace, model: Model) -> None:
        self.options, self.model = options, model
        self.adapters = loras(options)
        self.dead = threading.Event()
        self.stopping = threading.Event()  # no new requests
        self.aborted = threading.Event()  # and none of the old ones either
        self.paused = threading.Event()
        self.stuck = False
        self.lock = threading.Lock()
        self.running = 0
        self.count = {"prompt": 0, "generation": 0, "stop": 0, "length": 0, "abort": 0}
        self.seconds: list[float] = []

    @property
    def names(self) -> list[str]:
        return [*self.model.names, *self.adapters]

    # -- start

    def start(self) -> None:
        """Everything up to the first completion; an exception of the engine's is told and ends the process."""
        core(
            "core.py:133",
            f"Initializing a V1 LLM engine (v{VERSION}) with config: model='{self.model.path}', dtype={self.model.dtype}",
        )
        try:
            self._load(time.monotonic())
        except EngineError as error:
            trace = f"Traceback (most recent call last):\n{error.kind}: {error}"
            core("core.py:1510", f"EngineCore failed to start.\n{trace}", "ERROR")
            fail("RuntimeError", "Engine core initialization failed. See root cause above. Failed core proc(s): {}")
        for name, path in self.adapters.items():
            if not (pathlib.Path(path) / "adapter_config.json").is_file():
                fail("ValueError", f"Loading lora {name} failed: No adapter found for {path}")

    def _load(self, begun: float) -> None:
        budget = self._reserve()
        core("gpu_model_runner.py:5040", f"Starting to load model {self.model.path}...")
        if BEHAVIOUR == "oom":
            time.sleep(STEP)
            self._out_of_memory(budget)
        start = time.monotonic()
        weights = self.model.load()
        time.sleep(DELAY if BEHAVIOUR == "slow" else STEP)
        core("default_loader.py:501", f"Loading weights took {time.monotonic() - start:.2f} seconds")
        core(
            "gpu_model_runner.py:5150",
            f"Model loading took {gib(weights)} GiB memory and {time.monotonic() - start:.6f} seconds",
        )
        if BEHAVIOUR == "bad-kernel":
            raise EngineError(
                "torch.AcceleratorError",
                "CUDA error: no kernel image is available for execution on the device\nCUDA kernel errors might be asynchronously "
                "reported at some other API call, so the stacktrace below might be incorrect.",
            )
        if not self.options.enforce_eager:
            self._compile()
        self._cache(budget - weights)
        if not self.options.enforce_eager:
            time.sleep(STEP)
            core("gpu_model_runner.py:6582", f"Graph capturing finished in {max(1, round(STEP))} secs, took 0.50 GiB")
        core(
            "core.py:402", f"init engine (profile, create kv cache, warmup model) took {time.monotonic() - begun:.2f} s"
        )

    def _reserve(self) -> int:
        """The memory for weights and cache: the GPU's share, or the machine's where vLLM was built for that."""
        if os.environ.get("VLLM_TARGET_DEVICE") == "cpu":
            return 4 * GIB
        gpus = Gpus()
        gpus.check_driver()
        wanted = self.options.tensor_parallel_size or 1
        if wanted > len(gpus.all):
            raise EngineError(
                "ValueError",
                f"World size ({wanted}) is larger than the number of available GPUs ({len(gpus.all)}) in this node. If this is "
                "intentional and you are using Ray, set VLLM_RAY_DP_PACK_STRATEGY.",
            )
        return gpus.reserve(self.options.gpu_memory_utilization or 0.92) * wanted

    def _out_of_memory(self, budget: int) -> NoReturn:
        text = (
            f"CUDA out of memory. Tried to allocate 224.00 MiB. GPU 0 has a total capacity of {gib(budget)} GiB of which 115.06 MiB "
            "is free. Including non-PyTorch memory, this process has 21.94 GiB memory in use."
        )
        core(
            "gpu_model_runner.py:5147",
            "Failed to load model - not enough GPU memory. Try lowering --gpu-memory-utilization to free memory for weights, "
            f"increasing --tensor-parallel-size, or using --quantization. (original error: {text})",
            "ERROR",
        )
        raise EngineError("torch.OutOfMemoryError", text)

    def _compile(self) -> None:
        """Compiled graphs stay in the cache: the next start with the same settings takes them from there."""
        parts = [VERSION, self.model.dtype, str(self.model.max_length), json.dumps(self.model.config, sort_keys=True)]
        root = pathlib.Path(os.environ.get("VLLM_CACHE_ROOT") or pathlib.Path.home() / ".cache" / "vllm")
        folder = root / "torch_compile_cache" / hashlib.sha256("\n".join(parts).encode()).hexdigest()[:10]
        graph = folder / "rank_0_0" / "backbone" / "computation_graph.py"
        core("backends.py:1105", f"Using cache directory: {graph.parent} for vLLM's torch.compile")
        if graph.exists():
            core(
                "backends.py:296",
                "Directly load the compiled graph(s) for compile range (1, 2048) from the cache, took 0.010 s",
            )
            return
        core("monitor.py:40", "Starting torch.compile")
        start = time.monotonic()
        time.sleep(STEP)
        core("backends.py:1167", f"Dynamo bytecode transform time: {time.monotonic() - start:.2f} s")
        time.sleep(2 * STEP)
        core("backends.py:399", f"Compiling a graph for compile range (1, 2048) takes {2 * STEP:.2f} s")
        try:
            graph.parent.mkdir(parents=True, exist_ok=True)
            graph.write_text("# what torch.compile would have left here\n")
        except OSError as error:
            raise EngineError(type(error).__name__, str(error)) from error
        core("monitor.py:60", f"torch.compile took {time.monotonic() - start:.2f} s in total")

    def _cache(self, available: int) -> None:
        """The KV cache takes what weights leave; one request of full length must fit."""
        available = self.options.kv_cache_memory_bytes or available
        if available <= 0:
            raise EngineError(
                "ValueError",
                "No available memory for the cache blocks. Try increasing `gpu_memory_utilization` when initializing the engine "
                f"(this flag also controls CPU memory reservation on the CPU backend, despite its name). {CONSERVING}",
            )
        core("gpu_worker.py:760", f"Available KV cache memory: {gib(available)} GiB")
        each, length = self.model.cache_bytes(), self.model.max_length
        device = "CPU" if os.environ.get("VLLM_TARGET_DEVICE") == "cpu" else "GPU"
        if each * length > available:
            raise EngineError(
                "ValueError",
                f"To serve at least one request with the model's max seq len ({length}), ({gib(each * length)} GiB KV cache is "
                f"needed, which is larger than the available KV cache memory ({gib(available)} GiB). Based on the available memory, "
                f"the estimated maximum model length is {available // each}. Try increasing `gpu_memory_utilization` (which also "
                "controls CPU memory on the CPU backend) or decreasing `max_model_len` when initializing the engine. "
                f"{CONSERVING}",
            )
        core(
            "kv_cache_utils.py:2327",
            f"{device} KV cache size: {available // each:,} tokens, Maximum concurrency for {length:,} tokens per request: "
            f"{available / each / length:.2f}x",
        )

    # -- tokens

    def generate(
        self, prompt: str, most: int, stop: Sequence[str], gone: Callable[[], bool]
    ) -> Iterator[tuple[str, str | None]]:
        """Pieces of the answer, each with the reason why it is the last one, or None; none for a client that is gone."""
        if self.dead.is_set():
            raise Dead
        with self.lock:
            self.running += 1
            self.count["prompt"] += tokens(prompt)
        start, reason = time.monotonic(), "abort"
        try:
            if BEHAVIOUR == "exit-zero":
                self.die()
            for piece, reason_now in self._pieces(prompt, most, stop, gone):
                with self.lock:
                    self.count["generation"] += 1
                reason = reason_now or reason
                yield piece, reason_now
        finally:
            with self.lock:
                self.running -= 1
                self.count[reason] += 1
                self.seconds.append(time.monotonic() - start)

    def _pieces(
        self, prompt: str, most: int, stop: Sequence[str], gone: Callable[[], bool]
    ) -> Iterator[tuple[str, str | None]]:
        seed = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8], "big")
        said = ""
        for index in range(most):
            self._wait(gone)
            if self.aborted.is_set() or gone():
                yield "", "abort"
                return
            word = WORDS[(seed + index * index) % len(WORDS)]
            piece = word if index == 0 else f" {word}"
            said += piece
            found = any(text and text in said for text in stop)
            yield ("", "stop") if found else (piece, "length" if index == most - 1 else None)
            if found:
                return

    def _wait(self, gone: Callable[[], bool]) -> None:
        """As long as one token takes, or as long as nothing moves."""
        time.sleep(TOKEN)
        while (self.paused.is_set() or self.hung()) and not (self.aborted.is_set() or self.dead.is_set() or gone()):
            time.sleep(0.1)
        if self.dead.is_set():
            raise Dead

    # -- misbehaviour

    def hung(self) -> bool:
        wish, once = control()
        if wish == "hang" and once:
            self.stuck = True
            with contextlib.suppress(OSError):
                CONTROL.unlink()
        return self.stuck or wish == "hang" or BEHAVIOUR == "hang"

    def die(self) -> None:
        """As a crash of the engine's process looks: the API server sees it, and ends with status 0."""
        trace = "Traceback (most recent call last):\ntorch.AcceleratorError: CUDA error: an illegal memory access was encountered"
        core("core.py:1512", f"EngineCore encountered a fatal error.\n{trace}", "ERROR")
        text = "EngineCore encountered an issue. See stack trace (above) for the root cause."
        api(
            "async_llm.py:906",
            f"AsyncLLM output_handler failed.\nvllm.v1.engine.exceptions.EngineDeadError: {text}",
            "ERROR",
        )
        self.dead.set()
        raise Dead

    def watch(self) -> None:
        """Die when the control file says so."""
        while not self.dead.is_set():
            wish, once = control()
            if wish == "exit-zero":
                if once:
                    with contextlib.suppress(OSError):
                        CONTROL.unlink()
                with contextlib.suppress(Dead):
                    self.die()
            time.sleep(0.5)

    # -- stop

    def stop(self, timeout: float) -> None:
        """No new requests; the old ones have this long to end."""
        mode = "drain" if timeout else "abort"
        self.stopping.set()
        core("core.py:1635", f"[shutdown] EngineCore: start mode={mode} timeout={timeout:.0f}s")
        if self.running and timeout:
            core(
                "core.py:1655",
                f"[shutdown] EngineCore: draining in-flight requests count={self.running} timeout={timeout:.0f}s",
            )
        elif self.running:
            core("core.py:1645", f"[shutdown] EngineCore: aborting in-flight requests count={self.running}")
        deadline = time.monotonic() + timeout
        while self.running and not self.dead.is_set() and time.monotonic() < deadline:
            time.sleep(0.05)
        self.aborted.set()
        core("core.py:1666", "[shutdown] EngineCore: request processing complete; starting resource teardown")


def control() -> tuple[str, bool]:
    """What the control file asks for, and whether it asks for it once."""
    try:
        words = CONTROL.read_text().split()
    except OSError:
        return "", False
    return (words[0] if words else ""), words[1:] == ["once"]


def tokens(text: str) -> int:
    """One for each byte, as the tokenizer of the lab's tiny model counts."""
    return len(text.encode())


# ---- HTTP


class Refused(Exception):
    """A request that gets an error: status, type, the parameter at fault, and what is wrong."""

    def __init__(self, status: int, kind: str, text: str, parameter: str | None = None) -> None:
        super().__init__(text)
        self.status = status
        self.body = {"error": {"message": text, "type": kind, "param": parameter, "code": status}}


def wrong(text: str, parameter: str) -> Refused:
    return Refused(400, "BadRequestError", f"{text} (parameter={parameter})", parameter)


class Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    """Bound from the start, as vLLM's port is, and listening once the engine is ready."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], engine: Engine, options: argparse.Namespace) -> None:
        super().__init__(address, Handler, bind_and_activate=False)
        self.engine, self.options = engine, options
        keys = options.api_key or [key for key in [os.environ.get("VLLM_API_KEY", "")] if key]
        self.keys = [hashlib.sha256(key.encode()).digest() for key in keys]
        self.busy = 0
        self.lock = threading.Lock()
        self.answers: dict[tuple[str, str, str], int] = {}
        self.server_bind()

    def server_bind(self) -> None:
        """Without HTTPServer's look-up of this machine's name, which may wait for a name server."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no error."""
        if not isinstance(sys.exc_info()[1], OSError):
            traceback.print_exc()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server
    timeout = 300

    def version_string(self) -> str:
        return "uvicorn"

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        status = http.HTTPStatus(int(code))
        with self.server.lock:
            key = (self.path.partition("?")[0], self.command, f"{status // 100}xx")
            self.server.answers[key] = self.server.answers.get(key, 0) + 1
        if not self.server.options.disable_uvicorn_access_log:
            client = ":".join(str(part) for part in self.client_address[:2])
            print(f'INFO:     {client} - "{self.requestline}" {status.value} {status.phrase}', flush=True)

    def do_GET(self) -> None:
        self._dispatch(GET)

    def do_POST(self) -> None:
        self._dispatch(POST)

    def _dispatch(self, known: dict[str, Callable[[Handler], None]]) -> None:
        path = self.path.partition("?")[0]
        self.content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with self.server.lock:
            self.server.busy += 1
        try:
            if path.startswith(GUARDED) and not self._authorised():
                self.json({"error": "Unauthorized"}, 401)
            elif path in known:
                known[path](self)
            elif path in GET or path in POST:
                self.json({"detail": "Method Not Allowed"}, 405)
            else:
                self.json({"detail": "Not Found"}, 404)
        except Refused as refusal:
            self.json(refusal.body, refusal.status)
        except Dead:
            text = "EngineCore encountered an issue. See stack trace (above) for the root cause."
            self.json(Refused(500, "InternalServerError", text).body, 500)
        finally:
            with self.server.lock:
                self.server.busy -= 1

    def _authorised(self) -> bool:
        scheme, _, key = self.headers.get("Authorization", "").partition(" ")
        given = hashlib.sha256(key.encode()).digest()
        matches = [hmac.compare_digest(given, known) for known in self.server.keys]
        return not self.server.keys or (scheme.lower() == "bearer" and any(matches))

    def json(self, content: Any, status: int = 200) -> None:
        self.text(json.dumps(content, separators=(",", ":")), "application/json", status)

    def text(self, text: str, kind: str = "text/plain; charset=utf-8", status: int = 200) -> None:
        body = text.encode()
        self.send_response(status)
        if body:
            self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    # -- what is asked for

    def body(self) -> dict[str, Any]:
        try:
            found = json.loads(self.content)
        except ValueError as error:
            raise Refused(
                400, "Bad Request", f"1 validation error:\n  {{'type': 'json_invalid', 'msg': '{error}'}}", "body"
            ) from error
        if not isinstance(found, dict):
            raise Refused(400, "Bad Request", "1 validation error:\n  {'type': 'dict_type', 'loc': 'body'}", "body")
        return found

    def model(self, body: dict[str, Any]) -> str:
        """The name of the model that is asked; without one it is the first."""
        names, name = self.server.engine.names, body.get("model")
        if name and name not in names:
            text = f"The model `{name}` does not exist. Valid aliases: {', '.join(names)}."
            raise Refused(404, "NotFoundError", text, "model")
        return str(name or names[0])

    def most(self, body: dict[str, Any], prompt: str, default: int | None) -> int:
        """How many tokens the answer may have: they and the prompt fit in the model's context."""
        length = self.server.engine.model.max_length
        asked = body.get("max_completion_tokens") or body.get("max_tokens")
        if asked is not None and (not isinstance(asked, int) or asked < 1):
            raise wrong(f"max_tokens must be at least 1, got {asked}.", "max_tokens")
        if asked and asked > length:
            text = (
                f"max_tokens={asked} cannot be greater than max_model_len={length}. Please request fewer output tokens."
            )
            raise wrong(text, "max_tokens")
        left = length - tokens(prompt)
        if left < (asked or 1):
            raise wrong(
                f"This model's maximum context length is {length} tokens. However, you requested {asked or 1} output tokens and "
                f"your prompt contains {tokens(prompt)} input tokens, for a total of {tokens(prompt) + (asked or 1)} tokens.",
                "input_tokens",
            )
        return int(asked or min(default or left, left))

    # -- endpoints

    def health(self) -> None:
        self.text("", status=503 if self.server.engine.dead.is_set() else 200)

    def models(self) -> None:
        engine, now = self.server.engine, int(time.time())
        entries = [
            {"id": name, "object": "model", "created": now, "owned_by": "vllm", "root": engine.adapters.get(name, engine.model.path),
             "parent": engine.model.names[0] if name in engine.adapters else None, "max_model_len": engine.model.max_length}
            for name in engine.names
        ]  # fmt: skip
        self.json({"object": "list", "data": entries})

    def completions(self) -> None:
        body = self.body()
        model = self.model(body)
        prompt = body.get("prompt")
        if isinstance(prompt, list):
            prompt = prompt[0] if prompt else ""
        if not prompt or not isinstance(prompt, str):
            raise wrong("Either prompt or prompt_embeds must be provided and non-empty.", "prompt")
        self.answer(body, "cmpl", "text_completion", model, prompt, self.most(body, prompt, 16))

    def chat(self) -> None:
        body = self.body()
        model = self.model(body)
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages:
            raise wrong("`messages` must be a non-empty list.", "messages")
        prompt = "\n".join(str(message.get("content", "")) for message in messages)
        self.answer(body, "chatcmpl", "chat.completion", model, prompt, self.most(body, prompt, None))

    def answer(self, body: dict[str, Any], prefix: str, kind: str, model: str, prompt: str, most: int) -> None:
        if self.server.engine.stopping.is_set():
            raise Refused(500, "InternalServerError", "cannot schedule new futures after shutdown")
        stop = body.get("stop") or []
        pieces = self.server.engine.generate(prompt, most, [stop] if isinstance(stop, str) else stop, self.gone)
        head = {"id": f"{prefix}-{uuid.uuid4().hex[:16]}", "created": int(time.time()), "model": model}
        if body.get("stream"):
            usage = bool((body.get("stream_options") or {}).get("include_usage"))
            return self.stream(pieces, head, kind, prompt, usage)
        parts = list(pieces)
        said, reason = "".join(piece for piece, _ in parts), parts[-1][1]
        choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": reason, "stop_reason": None}
        choice |= {"message": {"role": "assistant", "content": said}} if prefix == "chatcmpl" else {"text": said}
        self.json({**head, "object": kind, "choices": [choice], "usage": self.usage(prompt, len(parts))})
        return None

    def stream(
        self, pieces: Iterator[tuple[str, str | None]], head: dict[str, Any], kind: str, prompt: str, usage: bool
    ) -> None:
        """Server-sent events, one for each token."""
        chat = kind == "chat.completion"
        head = {**head, "object": f"{kind}.chunk" if chat else kind}
        first = next(pieces)  # what fails before it gets a status of its own
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        if chat:
            self.event(
                {
                    **head,
                    "choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}],
                }
            )
        number = 0
        with contextlib.suppress(Dead):
            for piece, reason in _chain(first, pieces):
                number += 1
                content = {"delta": {"content": piece}} if chat else {"text": piece}
                self.event({**head, "choices": [{"index": 0, **content, "logprobs": None, "finish_reason": reason}]})
            if usage:
                self.event({**head, "choices": [], "usage": self.usage(prompt, number)})
            self.chunk("data: [DONE]\n\n")
        self.chunk("")

    def event(self, content: dict[str, Any]) -> None:
        self.chunk(f"data: {json.dumps(content, separators=(',', ':'))}\n\n")

    def chunk(self, text: str) -> None:
        data = text.encode()
        self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))

    def gone(self) -> bool:
        """Whether the client has hung up."""
        readable, _, _ = select.select([self.connection], [], [], 0)
        return bool(readable) and not self.connection.recv(1, socket.MSG_PEEK)

    def usage(self, prompt: str, number: int) -> dict[str, int]:
        return {"prompt_tokens": tokens(prompt), "total_tokens": tokens(prompt) + number, "completion_tokens": number}

    def invocations(self) -> None:
        """What a hosting platform calls: either kind of completion, with no key asked for."""
        self.chat() if "messages" in self.body() else self.completions()

    def tokenize(self) -> None:
        body = self.body()
        self.model(body)
        prompt = str(body.get("prompt", ""))
        length = self.server.engine.model.max_length
        self.json(
            {"count": tokens(prompt), "max_model_len": length, "tokens": list(prompt.encode()), "token_strs": None}
        )

    def pause(self) -> None:
        """Nothing is generated until /resume: one of the endpoints that no client should reach."""
        self.server.engine.paused.set()
        self.json({"status": "paused"})

    def resume(self) -> None:
        self.server.engine.paused.clear()
        self.json({"status": "resumed"})

    def version(self) -> None:
        self.json({"version": VERSION})

    def load(self) -> None:
        self.json({"server_load": self.server.engine.running})

    def metrics(self) -> None:
        engine = self.server.engine
        label = f'engine="0",model_name="{engine.model.names[0]}"'
        with engine.lock:
            count, seconds, running = dict(engine.count), list(engine.seconds), engine.running
        lines = [
            *_metric("vllm:num_requests_running", "gauge", {label: running}),
            *_metric("vllm:num_requests_waiting", "gauge", {label: 0}),
            *_metric("vllm:kv_cache_usage_perc", "gauge", {label: 0}),
            *_metric("vllm:prompt_tokens_total", "counter", {label: count["prompt"]}),
            *_metric("vllm:generation_tokens_total", "counter", {label: count["generation"]}),
            *_metric(
                "vllm:request_success_total", "counter",
                {f'{label},finished_reason="{reason}"': count[reason] for reason in ("stop", "length", "abort")},
            ),
            "# TYPE vllm:e2e_request_latency_seconds histogram",
        ]  # fmt: skip
        for limit in (0.3, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0):
            below = sum(1 for each in seconds if each <= limit)
            lines.append(f'vllm:e2e_request_latency_seconds_bucket{{{label},le="{limit}"}} {below}')
        lines += [
            f'vllm:e2e_request_latency_seconds_bucket{{{label},le="+Inf"}} {len(seconds)}',
            f"vllm:e2e_request_latency_seconds_count{{{label}}} {len(seconds)}",
            f"vllm:e2e_request_latency_seconds_sum{{{label}}} {sum(seconds)}",
        ]
        with self.server.lock:
            answers = {
                f'handler="{path}",method="{method}",status="{status}"': number
                for (path, method, status), number in self.server.answers.items()
            }
        lines += _metric("http_requests_total", "counter", answers)
        self.text("\n".join(lines) + "\n", "text/plain; version=0.0.4; charset=utf-8")


def _chain(first: tuple[str, str | None], rest: Iterator[tuple[str, str | None]]) -> Iterator[tuple[str, str | None]]:
    yield first
    yield from rest


def _metric(name: str, kind: str, values: Mapping[str, float]) -> list[str]:
    return [f"# TYPE {name} {kind}", *(f"{name}{{{label}}} {float(value)}" for label, value in values.items())]


GET: dict[str, Callable[[Handler], None]] = {
    "/health": Handler.health, "/ping": Handler.health, "/version": Handler.version, "/load": Handler.load,
    "/metrics": Handler.metrics, "/v1/models": Handler.models,
}  # fmt: skip
POST: dict[str, Callable[[Handler], None]] = {
    "/v1/completions": Handler.completions, "/v1/chat/completions": Handler.chat, "/invocations": Handler.invocations,
    "/ping": Handler.health, "/tokenize": Handler.tokenize, "/pause": Handler.pause, "/resume": Handler.resume,
}  # fmt: skip


# ---- process


def main(argv: Sequence[str]) -> int:
    options = arguments(argv)
    stop = threading.Event()

    def end_of_start(*_: object) -> NoReturn:
        api("launcher.py:254", "[shutdown] API server: shutdown triggered")
        raise SystemExit(0)

    signal.signal(signal.SIGTERM, end_of_start)  # as the first process of a container, nothing else ends it
    signal.signal(signal.SIGINT, end_of_start)
    given = {name: value for name, value in vars(options).items() if value is not None and value is not False}
    given |= {"api_key": "***"} if "api_key" in given else {}
    api("api_utils.py:286", f"version {VERSION}\nnon-default args: {given}")
    model = Model(options)
    api("model.py:733", f"Resolved architecture: {model.architecture}")
    api("model.py:2152", f"Using max model len {model.max_length}")
    engine = Engine(options, model)
    host, port = options.host or "0.0.0.0", 8000 if options.port is None else options.port
    try:
        server = Server((host, port), engine, options)
    except OSError as error:
        fail("OSError", str(error))
    engine.start()
    server.server_activate()
    api("entry.py:140", f"Starting vLLM server on http://{host}:{server.server_port}")
    for path in sorted(GET | POST):
        methods = [name for name, known in (("GET", GET), ("POST", POST)) if path in known]
        api("launcher.py:195", f"Route: {path}, Methods: {', '.join(methods)}")
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    signal.signal(signal.SIGINT, lambda *_: stop.set())
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True).start()
    threading.Thread(target=engine.watch, daemon=True).start()
    uvicorn(f"Started server process [{os.getpid()}]")
    uvicorn("Waiting for application startup.")
    uvicorn("Application startup complete.")
    while not stop.wait(0.2) and not engine.dead.is_set():
        pass
    if not engine.dead.is_set():
        timeout = float(options.shutdown_timeout or 0)
        api("launcher.py:254", "[shutdown] API server: shutdown triggered")
        api(
            "launcher.py:270",
            f"[shutdown] API server: stopping engine client mode={'drain' if timeout else 'abort'} timeout={timeout:.0f}s",
        )
        engine.stop(timeout)
    api("launcher.py:304", "[shutdown] API server: shutting down FastAPI HTTP server")
    deadline = time.monotonic() + 5  # for answers that are on their way
    while server.busy and time.monotonic() < deadline:
        time.sleep(0.05)
    server.server_close()
    uvicorn(f"Finished server process [{os.getpid()}]")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
