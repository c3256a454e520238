# Copyright: the nemo.platform authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The inference server as a release: its inputs checked, and turned into what ``container_release`` takes.

Inputs are those of role vllm without their prefix. No value of a key or token appears in what is said of them.
"""

from __future__ import annotations

import ipaddress
import json
import math
import posixpath
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ansible_collections.nemo.platform.plugins.module_utils.container_release import check_request, parse_size

Inputs = Mapping[str, Any]
Release = dict[str, Any]

DEVICES = ("cuda", "cpu")
DTYPES = ("auto", "half", "float16", "bfloat16", "float", "float32")
KV_CACHE_DTYPES = ("auto", "bfloat16", "fp8", "fp8_e4m3", "fp8_e5m2")
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM allocates for
KEY_LENGTH = 16
# Seconds that vLLM has beyond its own --shutdown-timeout before the engine kills it.
STOP_MARGIN = 30
CACHE = "/cache"
COMPLETION = "/v1/completions"

REPOSITORY = r"^[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*$"
REVISION = r"^[0-9a-f]{40}$"
SERVED_NAME = r"^[A-Za-z0-9][A-Za-z0-9._:/-]{0,95}$"
# Visible characters, without those that a header or HAProxy's configuration would take for its own.
KEY = r"^[A-Za-z0-9._~+/=-]+$"

# Long options that only the role sets, with the input that does; empty where nothing may.
OWNED: dict[str, str] = {
    "model": "vllm_model",
    "revision": "vllm_model_revision",
    "served-model-name": "vllm_served_name",
    "max-model-len": "vllm_max_model_len",
    "gpu-memory-utilization": "vllm_gpu_memory_utilization",
    "dtype": "vllm_dtype",
    "quantization": "vllm_quantization",
    "kv-cache-dtype": "vllm_kv_cache_dtype",
    "tensor-parallel-size": "vllm_tensor_parallel_size",
    "enable-lora": "vllm_lora_modules",
    "lora-modules": "vllm_lora_modules",
    "max-loras": "vllm_lora_modules",
    "max-lora-rank": "vllm_max_lora_rank",
    "shutdown-timeout": "vllm_drain_timeout",
    "port": "vllm_port",
    "api-key": "vllm_api_keys",
    "host": "",
    "uds": "",
    "root-path": "",
    "ssl-keyfile": "",
    "ssl-certfile": "",
    "ssl-ca-certs": "",
    "ssl-cert-reqs": "",
    "enable-ssl-refresh": "",
    "config": "",  # a file of options would go past every check here
    "download-dir": "",
    "hf-token": "vllm_hub_token",
    "pipeline-parallel-size": "vllm_tensor_parallel_size",
    "data-parallel-size": "vllm_tensor_parallel_size",
}
OWNED_SHORT: dict[str, str] = {
    "q": "vllm_quantization",
    "tp": "vllm_tensor_parallel_size",
    "pp": "vllm_tensor_parallel_size",
    "dp": "vllm_tensor_parallel_size",
}
# Environment that would do what an input does, or show a secret to whoever can inspect the container.
REFUSED_ENVIRONMENT: dict[str, str] = {
    "VLLM_API_KEY": "vllm_api_keys",
    "HF_TOKEN": "vllm_hub_token",
    "HUGGING_FACE_HUB_TOKEN": "vllm_hub_token",
    # whoever reaches the API could load files of the container as adapters
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "vllm_lora_modules",
    "VLLM_HOST_IP": "",
    "VLLM_PORT": "vllm_port",
}
# These change the server for everybody, whatever key they come with.
REFUSED_PATHS = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")

# A phase begins with the line that matches; in the order in which a server starts.
PHASES: tuple[tuple[str, str], ...] = (
    ("starting", r"vLLM API server version|non-default args: "),
    ("loading weights", r"Starting to load model"),
    ("compiling", r"Loading weights took|Model loading took"),
    ("measuring memory", r"torch\.compile (?:takes|took)|Memory profiling takes"),
    ("capturing graphs", r"GPU KV cache size|CPU KV cache size|Capturing CUDA graphs?"),
    ("starting the API", r"Graph capturing finished|init engine \(profile|Starting vLLM (?:API )?server"),
    ("first completion", r"Application startup complete"),
)

# The first that matches gives the reason, so what is more telling stands first. Wording of vLLM 0.2x and 0.3x, torch and CUDA.
FAILURES: tuple[tuple[str, str], ...] = (
    (
        r"error: ((?:unrecognized arguments|argument |ambiguous option|the following arguments).*)",
        r"vLLM refuses an argument (\1): see vllm_extra_arguments and the release notes of this version",
    ),
    (
        r"([\d.]+) GiB KV cache is needed.*?available KV cache memory \(([\d.]+) GiB\)(?:.*?maximum model length is (\d+))?",
        r"GPU memory: the context needs \1 GiB of KV cache, \2 GiB are left: lower vllm_max_model_len or raise"
        r" vllm_gpu_memory_utilization",
    ),
    (
        r"Free memory on device.*?\(([\d.]+)/([\d.]+) GiB\) on startup is less than",
        r"GPU memory: only \1 of \2 GiB were free at the start: stop what else holds the card, or lower"
        r" vllm_gpu_memory_utilization",
    ),
    (
        r"No available memory for the cache blocks",
        r"GPU memory: nothing is left for the KV cache: raise vllm_gpu_memory_utilization, or take a smaller or quantised model",
    ),
    (
        r"CUDA out of memory|OutOfMemoryError|CUDA error: out of memory|cudaErrorMemoryAllocation",
        r"GPU memory ran out: lower vllm_max_model_len or vllm_gpu_memory_utilization, or take a smaller or quantised model",
    ),
    (
        r"max_model_len \((\d+)\) is greater than the derived max_model_len \(([^)]*)\)",
        r"vllm_max_model_len is \1, more than the model knows (\2)",
    ),
    (
        r"driver version is insufficient for CUDA runtime|NVIDIA driver on your system is too old"
        r"|unsatisfied condition: cuda|CUDA_ERROR_SYSTEM_DRIVER_MISMATCH|forward compatibility was attempted",
        r"the driver is too old for the CUDA of this image: upgrade the driver, or take the image for an older CUDA",
    ),
    (
        r"no kernel image is available for execution",
        r"this image was not built for this GPU: take another vllm_tag",
    ),
    (
        r"Failed to infer device type|No CUDA GPUs are available|libcuda\.so\.1: cannot open|NVML: Driver/library version mismatch"
        r"|Failed to initialize NVML|CUDA unknown error",
        r"the container sees no GPU: gpu-doctor says why",
    ),
    (
        r"Bfloat16 is only supported on GPUs with compute capability of at least",
        r"this GPU knows no bfloat16: set vllm_dtype to half",
    ),
    (
        r"World size \((\d+)\) is larger than the number of available GPUs \((\d+)\)",
        r"vllm_tensor_parallel_size is \1, the host has \2 GPUs",
    ),
    (
        r"attention heads \((\d+)\) must be divisible by tensor parallel size \((\d+)\)",
        r"vllm_tensor_parallel_size is \2, which does not divide the model's \1 attention heads",
    ),
    (
        r"LoRA rank (\d+) is greater than max_lora_rank (\d+)",
        r"a LoRA module has rank \1, vllm_max_lora_rank is \2",
    ),
    (
        r"No adapter found for (\S+)",
        r"the LoRA module \1 is missing or no adapter: check vllm_lora_modules",
    ),
    (
        r"Quantization method specified in the model config \(([^)]*)\) does not match",
        r"vllm_quantization is not the model's own, \1: leave it empty",
    ),
    (
        r"(?:Model architectures|model type) (.*?) (?:are not supported|failed to be inspected|but Transformers does not recognize)",
        r"this version of vLLM does not know the model's architecture \1: take a newer vllm_tag",
    ),
    (
        r"trust_remote_code=True|requires? you to execute",
        r"the model brings code of its own: add --trust-remote-code to vllm_extra_arguments if you trust it",
    ),
    (
        r"SafetensorError|Error while deserializing header",
        r"the model's files are damaged: the next run verifies and fetches them again",
    ),
    (
        r"does not appear to have a file named (\S+)|Cannot find any model weights|is not a valid model identifier"
        r"|Can't load the configuration of|Invalid repository ID or local directory"
        # it looks on the Hub, which it may not ask, for what is not in the folder
        r"|Repo id must be in the form|LocalEntryNotFoundError",
        r"the model's files are missing or incomplete: check vllm_model",
    ),
    (r"No space left on device", r"a file system is full: look at the volume of vllm_models_path"),
    (r"Permission denied: '?([^'\s]+)", r"vLLM may not use \1: check its owner against vllm_user"),
    # pydantic's, whose first line says no more than that something is wrong
    (r"Value error, (.*?)(?: \[type=|$)", r"vLLM refuses its settings: \1"),
    (r"^(?!.*Engine core initialization failed).*?\b(\w*(?:Error|Exception): .+)", r"\1"),
)

# What the container needs beyond what clients may set: no word goes out, and everything that is worth keeping is under /cache.
ENVIRONMENT: dict[str, str] = {
    "DO_NOT_TRACK": "1",
    "HF_HOME": CACHE + "/huggingface",
    "HF_HUB_OFFLINE": "1",
    "HOME": CACHE + "/home",
    "TORCHINDUCTOR_CACHE_DIR": CACHE + "/torchinductor",
    "TRANSFORMERS_OFFLINE": "1",
    "TRITON_CACHE_DIR": CACHE + "/triton",
    "USER": "vllm",  # the image's passwd does not know the uid, and torch asks for a name
    "VLLM_CACHE_ROOT": CACHE + "/vllm",
    "VLLM_NO_USAGE_STATS": "1",
    "XDG_CACHE_HOME": CACHE + "/xdg",
}
CUDA_ENVIRONMENT: dict[str, str] = {
    "CUDA_CACHE_PATH": CACHE + "/cuda",
    "NVIDIA_DRIVER_CAPABILITIES": "compute,utility",
    "NVIDIA_VISIBLE_DEVICES": "all",
}


class Snapshot(NamedTuple):
    """A model or adapter: what it is on the Hub, and where it lies on the host and in the container."""

    repository: str  # empty for a folder of the volume
    revision: str
    path: str
    target: str


def snapshot(models_path: str, model: str, revision: str) -> Snapshot:
    if model.startswith("/"):
        path = posixpath.normpath(model)
        return Snapshot("", "", path, "/models/" + posixpath.relpath(path, models_path))
    folder = "%s/%s" % (model.replace("/", "--"), revision)
    return Snapshot(model, revision, "%s/hub/%s" % (models_path.rstrip("/"), folder), "/models/%s" % folder)


def whole(value: Any) -> int | None:
    """The whole number that a value stands for, or None. ``-e`` gives text."""
    if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
        return None
    try:
        return int(value)
    except (TypeError, ValueError, OverflowError):
        return None


def number(value: Any) -> float | None:
    if isinstance(value, bool):
        return None
    try:
        parsed = float(value)
    except (TypeError, ValueError):
        return None
    return parsed if math.isfinite(parsed) else None


# -- extra arguments --------------------------------------------------------------------------------------------------


def owned_long(option: str) -> str | None:
    """The owned option that vLLM's parser would take this one for: it accepts beginnings, and _ for -."""
    name = re.split(r"[=.]", option[2:], maxsplit=1)[0].replace("_", "-").rstrip("+")
    positive = name.removeprefix("no-")
    for candidate in OWNED:
        if candidate == positive or (positive and candidate.startswith(positive)):
            return candidate
    return None


def owned_short(option: str) -> str | None:
    """The same for -q, -tp and their like: -tp 2, -tp=2, -tp2, -qawq."""
    letters = re.match(r"^-([A-Za-z]+)", option)
    if not letters:
        return None
    for candidate in sorted(OWNED_SHORT, key=len, reverse=True):
        exact = letters.group(1) == candidate
        # One letter takes its value without a blank.
        if exact or (len(candidate) == 1 and letters.group(1).startswith(candidate)):
            return candidate
        if len(letters.group(1)) < len(candidate) and candidate.startswith(letters.group(1)):
            return candidate
    return None


def argument_problems(arguments: Sequence[Any]) -> list[str]:
    wrong = []
    for index, argument in enumerate(arguments):
        label = "vllm_extra_arguments[%d] is %r" % (index, argument)
        if not isinstance(argument, str):
            wrong.append("%s; allowed: text, in quotes" % label)
            continue
        if index == 0 and not argument.startswith("-"):
            wrong.append("%s; allowed: an option first, such as --enable-prefix-caching" % label)
        if argument in ("-", "--"):
            wrong.append("%s; allowed: options with their values" % label)
        elif re.match(r"^--?[A-Za-z][\w.-]*\s", argument):
            wrong.append("%s; allowed: an option and its value as two elements, or with = between them" % label)
        elif argument.startswith("--"):
            option = owned_long(argument)
            if option is not None:
                wrong.append("%s, which means --%s; %s" % (label, option, instead(OWNED[option])))
        elif re.match(r"^-[A-Za-z]", argument):
            option = owned_short(argument)
            if option is not None:
                wrong.append("%s, which means -%s; %s" % (label, option, instead(OWNED_SHORT[option])))
    return wrong


def instead(name: str) -> str:
    return "set %s instead" % name if name else "the role sets it by itself"


# -- inputs -----------------------------------------------------------------------------------------------------------


class Checks:
    """Collects what is wrong with inputs, one line each."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        self.wrong: list[str] = []

    def need(self, name: str, good: bool, allowed: str, shown: Any = None) -> bool:
        if not good:
            value = self.inputs.get(name) if shown is None else shown
            self.wrong.append("vllm_%s is %r; allowed: %s" % (name, value, allowed))
        return good

    def range(self, name: str, least: int, most: int | None = None) -> None:
        value = whole(self.inputs[name])
        good = value is not None and value >= least and (most is None or value <= most)
        self.need(name, good, "%d or more" % least if most is None else "%d to %d" % (least, most))

    def size(self, name: str, least: str) -> None:
        try:
            good = parse_size(self.inputs[name]) >= parse_size(least)
        except ValueError:
            good = False
        self.need(name, good, "a number with b, k, m or g, %s or more" % least)

    def choice(self, name: str, choices: Sequence[Any], value: Any = None) -> None:
        value = self.inputs[name] if value is None else value
        self.need(name, value in choices, ", ".join(map(str, choices)))

    def networks(self, name: str) -> None:
        for index, entry in enumerate(self.inputs[name]):
            try:
                ipaddress.ip_network(entry)
            except (ValueError, TypeError):
                self.wrong.append("vllm_%s[%d] is %r; allowed: a network such as 10.0.0.0/16" % (name, index, entry))

    def model(self, label: str, model: Any, revision: Any) -> None:
        root = str(self.inputs["models_path"]).rstrip("/")
        if isinstance(model, str) and model.startswith("/"):
            inside = posixpath.normpath(model).startswith(root + "/")
            if not inside:
                self.wrong.append(
                    "%s is %r; allowed: org/name of the Hub, or a folder under vllm_models_path (%s)"
                    % (label, model, root)
                )
            if revision:
                self.wrong.append(
                    "%s_revision is %r, and %s a folder; allowed: none for a folder" % (label, revision, label)
                )
            return
        good = isinstance(model, str) and bool(re.match(REPOSITORY, model)) and "--" not in model and ".." not in model
        if not good:
            self.wrong.append(
                "%s is %r; allowed: org/name of the Hub, or a folder under vllm_models_path (%s)" % (label, model, root)
            )
        if not re.match(REVISION, str(revision or "")):
            self.wrong.append(
                "%s_revision is %r; allowed: the 40 hexadecimal digits of a commit of the repository"
                % (label, revision)
            )


def keys_problems(keys: Sequence[Any]) -> list[str]:
    """Without a key in it, whatever is wrong with it."""
    wrong = []
    for index, key in enumerate(keys):
        label = "vllm_api_keys[%d]" % index
        if not isinstance(key, str) or len(key) < KEY_LENGTH:
            wrong.append("%s is too short; allowed: %d characters or more" % (label, KEY_LENGTH))
        elif not re.match(KEY, key):
            wrong.append("%s has other characters than letters, digits and ._~+/=-; allowed: those" % label)
        elif key in keys[:index]:
            wrong.append("%s is there twice; allowed: each key once" % label)
    return wrong


def path_problems(paths: Sequence[Any]) -> list[str]:
    wrong = []
    for index, path in enumerate(paths):
        label = "vllm_api_paths[%d] is %r" % (index, path)
        if not isinstance(path, str) or not re.match(r"^/v\d+/[\w./-]+(/\*)?$", path) or ".." in path:
            wrong.append("%s; allowed: a path such as /v1/embeddings or /v1/responses/*" % label)
        elif path in REFUSED_PATHS:
            wrong.append("%s; it changes the server for everybody: set vllm_lora_modules instead" % label)
    return wrong


def lora_problems(checks: Checks, modules: Sequence[Any], served: Any) -> None:
    names: list[Any] = [served]
    for index, module in enumerate(modules):
        label = "vllm_lora_modules[%d]" % index
        if not isinstance(module, Mapping):
            checks.wrong.append("%s is a %s; allowed: name, model, revision" % (label, type(module).__name__))
            continue
        name = module.get("name")
        if not isinstance(name, str) or not re.match(SERVED_NAME, name):
            checks.wrong.append("%s.name is %r; allowed: letters, digits and ._:/-" % (label, name))
        elif name in names:
            checks.wrong.append("%s.name is %r, which is served already; allowed: a name of its own" % (label, name))
        names.append(name)
        extra = sorted(set(module) - {"name", "model", "revision"})
        if extra:
            checks.wrong.append("%s has %s; allowed: name, model, revision" % (label, ", ".join(extra)))
        lines = Checks(checks.inputs)
        lines.model("%s.model" % label, module.get("model"), module.get("revision"))
        checks.wrong += [line.replace(".model_revision", ".revision") for line in lines.wrong]


def problems(inputs: Inputs, arguments: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Everything wrong with the inputs, one line each. ``arguments`` are those of module container_release."""
    checks = Checks(inputs)
    params = {key: spec.get("default") for key, spec in arguments.items()}
    params.update(name="vllm", state="present", image=str(inputs["image"]), tag=str(inputs["tag"]))
    params.update(digest=inputs["digest"] or None, port=whole(inputs["port"]), memory=str(inputs["memory"]))
    params.update(user=str(inputs["user"]), keep=whole(inputs["keep"]) or 0, environment=dict(inputs["environment"]))
    checks.wrong += ["vllm_%s" % line for line in check_request(params)]

    checks.need("models_path", bool(re.match(r"^/[\w./-]*[\w-]$", str(inputs["models_path"]))), "an absolute path")
    volume = str(inputs["volume_id"])
    checks.need(
        "volume_id", not volume or bool(re.match(r"^vol-[0-9a-f]{8,17}$", volume)), "vol-0123456789abcdef0, or none"
    )
    checks.choice("device", DEVICES)
    checks.model("vllm_model", inputs["model"], inputs["model_revision"])
    checks.need("served_name", bool(re.match(SERVED_NAME, str(inputs["served_name"]))), "letters, digits and ._:/-")
    checks.range("max_model_len", 0)
    share = number(inputs["gpu_memory_utilization"])
    checks.need("gpu_memory_utilization", share is not None and 0 < share <= 1, "more than 0, at most 1")
    checks.choice("dtype", DTYPES)
    checks.choice("kv_cache_dtype", KV_CACHE_DTYPES)
    quantization = str(inputs["quantization"] or "")
    checks.need("quantization", bool(re.match(r"^[a-z0-9_-]*$", quantization)), "a method such as awq or fp8, or none")
    checks.range("tensor_parallel_size", 1, 64)
    if inputs["device"] == "cpu":
        checks.need("tensor_parallel_size", whole(inputs["tensor_parallel_size"]) == 1, "1 with vllm_device cpu")
    checks.choice("max_lora_rank", LORA_RANKS, whole(inputs["max_lora_rank"]) or 0)
    lora_problems(checks, inputs["lora_modules"], inputs["served_name"])
    checks.wrong += keys_problems(inputs["api_keys"])
    checks.wrong += path_problems(inputs["api_paths"])
    checks.networks("client_sources")
    checks.networks("metrics_sources")
    endpoint = str(inputs["hub_endpoint"])
    checks.need(
        "hub_endpoint",
        bool(re.match(r"^https?://[^\s/]+(/\S*)?$", endpoint)),
        "an address such as https://huggingface.co",
    )
    if re.match(r"^https?://[^/]*@", endpoint):
        # it would be shown and logged everywhere
        checks.wrong.append("vllm_hub_endpoint holds a password; allowed: an address, and the token in vllm_hub_token")
    token = inputs["hub_token"] or ""
    if token and not re.match(r"^[\x21-\x7e]+$", str(token)):
        checks.wrong.append("vllm_hub_token has blanks or other characters that no token has; allowed: the token alone")
    if endpoint.startswith("http://") and token and not inputs["hub_insecure"]:
        checks.wrong.append(
            "vllm_hub_endpoint is %r, over which vllm_hub_token would be read by others; allowed: https" % endpoint
        )
    checks.size("shm_size", "64m")
    for name, least, most in (
        ("load_timeout", 1, None),
        ("drain_timeout", 0, 3600),
        ("proxy_timeout", 1, None),
        ("bake_time", 0, None),
        ("settle_time", 0, None),
        ("retry_after", 1, 3600),
        ("fetch_timeout", 1, None),
        ("watchdog_interval", 1, 3600),
        ("completion_timeout", 1, 3600),
        ("watchdog_strikes", 1, 100),
        ("watchdog_max_restarts", 0, 100),
        ("watchdog_window", 60, 86400),
    ):
        checks.range(name, least, most)
    own = environment_of(inputs)
    for name in inputs["environment"]:
        if name in REFUSED_ENVIRONMENT:
            checks.wrong.append("vllm_environment.%s is not allowed; %s" % (name, instead(REFUSED_ENVIRONMENT[name])))
        elif name in own:
            checks.wrong.append("vllm_environment.%s is set by the role; allowed: any other name" % name)
    checks.wrong += argument_problems(inputs["extra_arguments"])
    return checks.wrong


# -- what it becomes --------------------------------------------------------------------------------------------------


def environment_of(inputs: Inputs) -> dict[str, str]:
    """What the role itself sets."""
    environment = dict(ENVIRONMENT)
    if inputs["device"] == "cuda":
        environment.update(CUDA_ENVIRONMENT)
        if whole(inputs["tensor_parallel_size"]) == 1:
            environment["VLLM_SKIP_P2P_CHECK"] = "1"  # one card has no peer, and the check takes minutes
    else:
        environment["VLLM_TARGET_DEVICE"] = "cpu"
    return environment


def snapshots(inputs: Inputs) -> list[Snapshot]:
    """The model, then its adapters."""
    wanted = [(inputs["model"], inputs["model_revision"])]
    wanted += [(module["model"], module.get("revision") or "") for module in inputs["lora_modules"]]
    return [snapshot(str(inputs["models_path"]), str(model), str(revision or "")) for model, revision in wanted]


def command_of(inputs: Inputs) -> list[str]:
    """The arguments of ``vllm serve``, the image's entrypoint."""
    model, *adapters = snapshots(inputs)
    command = [model.target, "--served-model-name", str(inputs["served_name"])]
    command += [
        "--host",
        "0.0.0.0",
        "--port",
        str(inputs["port"]),
    ]  # of the container: the host publishes it on loopback
    if whole(inputs["max_model_len"]):
        command += ["--max-model-len", str(inputs["max_model_len"])]
    if inputs["device"] == "cuda":
        command += ["--gpu-memory-utilization", str(inputs["gpu_memory_utilization"])]
        command += ["--tensor-parallel-size", str(inputs["tensor_parallel_size"])]
    command += ["--dtype", inputs["dtype"]]
    if inputs["quantization"]:
        command += ["--quantization", inputs["quantization"]]
    if inputs["kv_cache_dtype"] != "auto":
        command += ["--kv-cache-dtype", inputs["kv_cache_dtype"]]
    if adapters:
        command += ["--enable-lora", "--max-loras", str(len(adapters)), "--max-lora-rank", str(inputs["max_lora_rank"])]
        command += ["--lora-modules"]
        for module, entry in zip(inputs["lora_modules"], adapters):
            command.append(json.dumps({"name": module["name"], "path": entry.target}, sort_keys=True))
    command += ["--shutdown-timeout", str(inputs["drain_timeout"])]
    return command + list(inputs["extra_arguments"])


def rules_of(inputs: Inputs) -> list[dict[str, Any]]:
    """What HAProxy lets through; it answers everything else by itself."""
    clients = list(inputs["client_sources"])
    platform = list(inputs["metrics_sources"])
    # Who may read metrics may ask for health, too. No clients named: anybody.
    everybody = clients + [entry for entry in platform if entry not in clients] if clients else []
    rules: list[dict[str, Any]] = [{"path": "/health", "methods": ["GET", "HEAD"], "sources": everybody, "key": False}]
    if platform:
        rules.append({"path": "/metrics", "methods": ["GET"], "sources": platform, "key": False})
    for path in inputs["api_paths"]:
        methods = ["GET", "HEAD"] if path == "/v1/models" else ["GET", "POST"] if path.endswith("/*") else ["POST"]
        rules.append({"path": path, "methods": methods, "sources": clients, "key": bool(inputs["api_keys"])})
    return rules


def completion_of(inputs: Inputs) -> dict[str, Any]:
    """The request that proves a release: one token of the served model."""
    body = {"max_tokens": 1, "model": inputs["served_name"], "prompt": "1", "temperature": 0}
    return {
        "method": "POST",
        "path": COMPLETION,
        "headers": {"Content-Type": "application/json"},
        "body": json.dumps(body, sort_keys=True),
        "contains": '"choices"',
    }


def release(inputs: Inputs) -> Release:
    """What role container_service is given, and the snapshots that must be there before."""
    wanted = snapshots(inputs)
    cache = "%s/cache" % str(inputs["models_path"]).rstrip("/")
    owner, _colon, group = str(inputs["user"]).partition(":")
    adapters = [
        {"name": module["name"], "path": entry.path} for module, entry in zip(inputs["lora_modules"], wanted[1:])
    ]
    mounts = {entry.target: {"source": entry.path, "target": entry.target, "read_only": True} for entry in wanted}
    mounts[CACHE] = {"source": cache, "target": CACHE, "read_only": False}
    return {
        "command": command_of(inputs),
        "environment": dict(inputs["environment"], **environment_of(inputs)),
        "mounts": list(mounts.values()),
        "cache": cache,
        "cache_folders": [{"path": path, "owner": owner, "group": group or owner} for path in (cache, cache + "/home")],
        "snapshots": [entry._asdict() for entry in wanted],
        "adapters": adapters,
        "health": completion_of(inputs),
        "phases": [{"name": name, "pattern": pattern} for name, pattern in PHASES],
        "failure_patterns": [{"pattern": pattern, "text": text} for pattern, text in FAILURES],
        "proxy_rules": rules_of(inputs),
        "stop_timeout": (whole(inputs["drain_timeout"]) or 0) + STOP_MARGIN,
    }
