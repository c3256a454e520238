"""The inference server as a release: inputs that are refused, and what the others become."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from ansible_collections.nemo.platform.plugins.filter.vllm_problems import vllm_problems
from ansible_collections.nemo.platform.plugins.module_utils.vllm_server import FAILURES, PHASES, release

REVISION = "a" * 40
KEY = "k3y-0123456789abcdef"
GOOD: dict[str, Any] = {
    "image": "vllm/vllm-openai",
    "tag": "v0.33.0",
    "digest": "",
    "device": "cuda",
    "model": "acme/chat-7b",
    "model_revision": REVISION,
    "served_name": "chat",
    "max_model_len": 8192,
    "gpu_memory_utilization": 0.9,
    "dtype": "auto",
    "quantization": "",
    "kv_cache_dtype": "auto",
    "tensor_parallel_size": 1,
    "lora_modules": [],
    "max_lora_rank": 16,
    "api_keys": [],
    "api_paths": ["/v1/models", "/v1/completions", "/v1/chat/completions"],
    "client_sources": [],
    "metrics_sources": ["127.0.0.0/8"],
    "hub_endpoint": "https://huggingface.co",
    "hub_token": "",
    "hub_insecure": False,
    "extra_arguments": [],
    "environment": {},
    "port": 8002,
    "memory": "13g",
    "shm_size": "1g",
    "user": "10001:10001",
    "keep": 2,
    "models_path": "/srv/models",
    "volume_id": "",
    "load_timeout": 1800,
    "drain_timeout": 120,
    "proxy_timeout": 600,
    "bake_time": 30,
    "settle_time": 3,
    "retry_after": 15,
    "fetch_timeout": 7200,
    "watchdog_interval": 30,
    "completion_timeout": 60,
    "watchdog_strikes": 3,
    "watchdog_max_restarts": 3,
    "watchdog_window": 3600,
}
LORA = {"name": "tone", "model": "acme/tone", "revision": "b" * 40}


def problems(**values: Any) -> list[str]:
    return vllm_problems({**GOOD, **values})


def made(**values: Any) -> dict[str, Any]:
    inputs = {**GOOD, **values}
    assert vllm_problems(inputs) == []
    return release(inputs)


class TestProblems:
    def test_good_inputs_have_none(self) -> None:
        assert problems() == []
        assert problems(port="8002", max_model_len="4096", gpu_memory_utilization="0.5", tensor_parallel_size="2") == []
        assert problems(model="/srv/models/own/chat", model_revision="") == []
        assert (
            problems(lora_modules=[LORA], api_keys=[KEY], quantization="awq", volume_id="vol-0123456789abcdef0") == []
        )

    @pytest.mark.parametrize(
        ("values", "text"),
        [
            ({"image": "Vllm"}, "vllm_image is 'Vllm'; allowed: a repository without tag or digest"),
            ({"tag": "a b"}, "vllm_tag is 'a b'; allowed: one image tag"),
            ({"digest": "sha256:12"}, "vllm_digest is 'sha256:12'; allowed: sha256: and 64"),
            ({"port": "http"}, "vllm_port is None; allowed: 1 to 65535"),
            ({"memory": "1x"}, "vllm_memory is '1x'; allowed: a number with b, k, m or g"),
            ({"user": "vllm"}, "vllm_user is 'vllm'; allowed: a numeric uid"),
            ({"keep": 0}, "vllm_keep is 0; allowed: 1 or more"),
            ({"device": "tpu"}, "vllm_device is 'tpu'; allowed: cuda, cpu"),
            ({"model": "chat"}, "vllm_model is 'chat'; allowed: org/name of the Hub, or a folder under"),
            ({"model": "a/../b"}, "vllm_model is 'a/../b'; allowed: org/name"),
            ({"model": "/etc", "model_revision": ""}, "vllm_model is '/etc'; allowed: org/name of the Hub, or a folder"),
            ({"model": "/srv/models/../x", "model_revision": ""}, "vllm_model is '/srv/models/../x'; allowed"),
            ({"model": "/srv/models/x"}, "and vllm_model a folder; allowed: none for a folder"),
            ({"model_revision": "main"}, "vllm_model_revision is 'main'; allowed: the 40 hexadecimal digits"),
            ({"served_name": "a b"}, "vllm_served_name is 'a b'; allowed: letters, digits"),
            ({"max_model_len": -1}, "vllm_max_model_len is -1; allowed: 0 or more"),
            ({"max_model_len": "8k"}, "vllm_max_model_len is '8k'; allowed: 0 or more"),
            ({"gpu_memory_utilization": 0}, "vllm_gpu_memory_utilization is 0; allowed: more than 0, at most 1"),
            ({"gpu_memory_utilization": 90}, "vllm_gpu_memory_utilization is 90; allowed: more than 0, at most 1"),
            ({"gpu_memory_utilization": float("nan")}, "vllm_gpu_memory_utilization is nan; allowed"),
            ({"dtype": "int8"}, "vllm_dtype is 'int8'; allowed: auto, half"),
            ({"quantization": "AWQ!"}, "vllm_quantization is 'AWQ!'; allowed: a method"),
            ({"kv_cache_dtype": "fp4"}, "vllm_kv_cache_dtype is 'fp4'; allowed: auto, bfloat16, fp8"),
            ({"tensor_parallel_size": 0}, "vllm_tensor_parallel_size is 0; allowed: 1 to 64"),
            ({"tensor_parallel_size": 2, "device": "cpu"}, "vllm_tensor_parallel_size is 2; allowed: 1 with vllm_device cpu"),
            ({"max_lora_rank": 7}, "vllm_max_lora_rank is 7; allowed: 1, 8, 16"),
            ({"lora_modules": ["x"]}, "vllm_lora_modules[0] is a str; allowed: name, model, revision"),
            ({"lora_modules": [{**LORA, "name": "chat"}]}, "vllm_lora_modules[0].name is 'chat', which is served already"),
            ({"lora_modules": [LORA, LORA]}, "vllm_lora_modules[1].name is 'tone', which is served already"),
            ({"lora_modules": [{**LORA, "revision": "x"}]}, "vllm_lora_modules[0].revision is 'x'; allowed: the 40"),
            ({"lora_modules": [{**LORA, "path": "/x"}]}, "vllm_lora_modules[0] has path; allowed: name, model, revision"),
            ({"api_paths": ["/pause"]}, "vllm_api_paths[0] is '/pause'; allowed: a path such as /v1/embeddings"),
            ({"api_paths": ["/v1/*"]}, "vllm_api_paths[0] is '/v1/*'; allowed: a path such as"),
            ({"api_paths": ["/v1/load_lora_adapter"]}, "it changes the server for everybody"),
            ({"client_sources": ["10.0.0.1/16"]}, "vllm_client_sources[0] is '10.0.0.1/16'; allowed: a network such as"),
            ({"metrics_sources": ["all"]}, "vllm_metrics_sources[0] is 'all'; allowed: a network such as"),
            ({"hub_endpoint": "hub"}, "vllm_hub_endpoint is 'hub'; allowed: an address such as"),
            ({"shm_size": "1m"}, "vllm_shm_size is '1m'; allowed: a number with b, k, m or g, 64m or more"),
            ({"load_timeout": 0}, "vllm_load_timeout is 0; allowed: 1 or more"),
            ({"drain_timeout": 3601}, "vllm_drain_timeout is 3601; allowed: 0 to 3600"),
            ({"watchdog_window": 5}, "vllm_watchdog_window is 5; allowed: 60 to 86400"),
            ({"models_path": "srv"}, "vllm_models_path is 'srv'; allowed: an absolute path"),
            ({"volume_id": "/dev/nvme1n1"}, "vllm_volume_id is '/dev/nvme1n1'; allowed: vol-0123456789abcdef0, or none"),
            ({"environment": {"HF_HUB_OFFLINE": "0"}}, "vllm_environment.HF_HUB_OFFLINE is set by the role"),
            ({"environment": {"HF_TOKEN": "x"}}, "vllm_environment.HF_TOKEN is not allowed; set vllm_hub_token instead"),
            ({"environment": {"1A": "x"}}, "vllm_environment.1A is no valid name"),
        ],
    )  # fmt: skip
    def test_names_variable_value_and_what_is_allowed(self, values: dict[str, Any], text: str) -> None:
        found = problems(**values)
        assert [line for line in found if text in line], found

    def test_each_is_one_problem(self) -> None:
        assert len(problems(port=0, dtype="x", served_name="")) == 3

    @pytest.mark.parametrize("key", ["hush", "hush hush hush hush", 'hush"hush"hush"hush', 5])
    def test_keys_are_not_shown(self, key: object) -> None:
        found = problems(api_keys=[key])
        assert len(found) == 1
        assert "vllm_api_keys[0]" in found[0]
        assert str(key) not in found[0]

    def test_key_that_is_there_twice(self) -> None:
        assert problems(api_keys=[KEY, KEY]) == ["vllm_api_keys[1] is there twice; allowed: each key once"]

    def test_token_is_not_shown_and_does_not_travel_in_the_open(self) -> None:
        found = problems(hub_token="hf_se cret", hub_endpoint="http://hub")
        assert len(found) == 2
        assert "hf_se" not in " ".join(found)
        assert problems(hub_token="hf_secret", hub_endpoint="http://hub", hub_insecure=True) == []
        assert "holds a password" in problems(hub_endpoint="https://me:secret@hub")[0]


class TestExtraArguments:
    @pytest.mark.parametrize(
        ("arguments", "means"),
        [
            (["--max-model-len", "5"], "--max-model-len; set vllm_max_model_len"),
            (["--max-model-len=5"], "--max-model-len; set vllm_max_model_len"),
            (["--max_model_len", "5"], "--max-model-len; set vllm_max_model_len"),
            (["--max-model", "5"], "--max-model-len; set vllm_max_model_len"),
            (["--max_mod=5"], "--max-model-len; set vllm_max_model_len"),
            (["--dtyp=half"], "--dtype; set vllm_dtype"),
            (["--model=x"], "--model; set vllm_model instead"),
            (["--served_model", "x"], "--served-model-name; set vllm_served_name"),
            (["--no-enable-lora"], "--enable-lora; set vllm_lora_modules"),
            (["--enforce-eager", "--api-key", "x"], "--api-key; set vllm_api_keys"),
            (["--host=::"], "--host; the role sets it by itself"),
            (["--config", "x.yaml"], "--config; the role sets it by itself"),
            (["-q", "awq"], "-q; set vllm_quantization"),
            (["-qawq"], "-q; set vllm_quantization"),
            (["-q=awq"], "-q; set vllm_quantization"),
            (["-tp", "2"], "-tp; set vllm_tensor_parallel_size"),
            (["-tp=2"], "-tp; set vllm_tensor_parallel_size"),
            (["-tp2"], "-tp; set vllm_tensor_parallel_size"),
        ],
    )
    def test_owned_under_every_spelling(self, arguments: list[str], means: str) -> None:
        found = problems(extra_arguments=arguments)
        assert len(found) == 1, found
        assert f"which means {means}" in found[0]

    @pytest.mark.parametrize(
        "arguments",
        [
            ["--enable-prefix-caching"],
            ["--max-num-seqs", "64"],
            ["--max-num-batched-tokens=4096"],
            ["--model-loader-extra-config", '{"concurrency": 8}'],
            ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"],
            ["--quantization-config.x", "1"],
            ["-O3"],
            ["-dcp", "1"],
            ["--seed", "-1"],
            ["--kv-cache-memory-bytes", "67108864"],
            ["--config-format", "hf"],
            ["--hf-overrides", '{"a": 1}'],
        ],
    )
    def test_others_pass(self, arguments: list[str]) -> None:
        assert problems(extra_arguments=arguments) == []

    @pytest.mark.parametrize("arguments", [["other/model"], ["--"], ["-"], ["--seed 1"], [5]])
    def test_what_no_parser_would_take(self, arguments: list[Any]) -> None:
        assert "vllm_extra_arguments[0]" in problems(extra_arguments=arguments)[0]


class TestRelease:
    def test_command(self) -> None:
        folder = f"/models/acme--chat-7b/{REVISION}"
        assert made(extra_arguments=["--enforce-eager"])["command"] == [
            folder, "--served-model-name", "chat", "--host", "0.0.0.0", "--port", "8002", "--max-model-len", "8192",
            "--gpu-memory-utilization", "0.9", "--tensor-parallel-size", "1", "--dtype", "auto",
            "--shutdown-timeout", "120", "--enforce-eager",
        ]  # fmt: skip

    def test_cpu_knows_no_gpu(self) -> None:
        one = made(device="cpu", max_model_len=0)
        assert "--gpu-memory-utilization" not in one["command"]
        assert "--max-model-len" not in one["command"]
        assert "NVIDIA_VISIBLE_DEVICES" not in one["environment"]
        assert one["environment"]["VLLM_TARGET_DEVICE"] == "cpu"

    def test_options(self) -> None:
        command = made(quantization="awq", kv_cache_dtype="fp8", tensor_parallel_size=4)["command"]
        assert command[command.index("--quantization") + 1] == "awq"
        assert command[command.index("--kv-cache-dtype") + 1] == "fp8"
        assert command[command.index("--tensor-parallel-size") + 1] == "4"

    def test_adapters(self) -> None:
        one = made(lora_modules=[LORA], max_lora_rank=64)
        at = one["command"].index("--lora-modules")
        assert json.loads(one["command"][at + 1]) == {"name": "tone", "path": f"/models/acme--tone/{'b' * 40}"}
        assert one["command"][at - 5 : at] == ["--enable-lora", "--max-loras", "1", "--max-lora-rank", "64"]
        assert one["adapters"] == [{"name": "tone", "path": f"/srv/models/hub/acme--tone/{'b' * 40}"}]
        assert [entry["repository"] for entry in one["snapshots"]] == ["acme/chat-7b", "acme/tone"]

    def test_mounts_are_read_only_but_for_the_cache(self) -> None:
        assert made()["mounts"] == [
            {
                "source": f"/srv/models/hub/acme--chat-7b/{REVISION}",
                "target": f"/models/acme--chat-7b/{REVISION}",
                "read_only": True,
            },
            {"source": "/srv/models/cache", "target": "/cache", "read_only": False},
        ]

    @pytest.mark.parametrize(("user", "group"), [("1000:2000", "2000"), ("1000", "1000")])
    def test_caches_belong_to_the_containers_user(self, user: str, group: str) -> None:
        assert made(user=user)["cache_folders"] == [
            {"path": path, "owner": "1000", "group": group} for path in ("/srv/models/cache", "/srv/models/cache/home")
        ]

    def test_folder_of_the_volume(self) -> None:
        one = made(model="/srv/models/own/chat", model_revision="")
        assert one["mounts"][0] == {"source": "/srv/models/own/chat", "target": "/models/own/chat", "read_only": True}
        assert one["snapshots"][0]["repository"] == ""

    def test_environment(self) -> None:
        one = made(environment={"VLLM_LOGGING_LEVEL": "DEBUG"}, api_keys=[KEY], hub_token="hf_secret")
        assert one["environment"]["HF_HUB_OFFLINE"] == "1"
        assert one["environment"]["VLLM_SKIP_P2P_CHECK"] == "1"
        assert one["environment"]["VLLM_LOGGING_LEVEL"] == "DEBUG"
        assert "VLLM_SKIP_P2P_CHECK" not in made(tensor_parallel_size=2)["environment"]
        assert KEY not in json.dumps(one)
        assert "hf_secret" not in json.dumps(one)

    def test_everything_written_lies_in_the_cache(self) -> None:
        paths = [value for value in made()["environment"].values() if value.startswith("/")]
        assert len(paths) >= 6
        assert all(path.startswith("/cache/") for path in paths)

    def test_engine_has_longer_than_it_takes_to_drain(self) -> None:
        assert made(drain_timeout=200)["stop_timeout"] == 230

    def test_proof_is_a_token_of_the_served_model(self) -> None:
        health = made()["health"]
        assert (health["method"], health["path"]) == ("POST", "/v1/completions")
        assert json.loads(health["body"]) == {"model": "chat", "prompt": "1", "max_tokens": 1, "temperature": 0}

    def test_rules(self) -> None:
        rules = made(api_keys=[KEY], client_sources=["10.0.0.0/16"], api_paths=["/v1/models", "/v1/completions"])[
            "proxy_rules"
        ]
        assert rules == [
            {"path": "/health", "methods": ["GET", "HEAD"], "sources": ["10.0.0.0/16", "127.0.0.0/8"], "key": False},
            {"path": "/metrics", "methods": ["GET"], "sources": ["127.0.0.0/8"], "key": False},
            {"path": "/v1/models", "methods": ["GET", "HEAD"], "sources": ["10.0.0.0/16"], "key": True},
            {"path": "/v1/completions", "methods": ["POST"], "sources": ["10.0.0.0/16"], "key": True},
        ]

    def test_metrics_are_nobodys_unless_somebody_is_named(self) -> None:
        rules = made(metrics_sources=[])["proxy_rules"]
        assert "/metrics" not in [rule["path"] for rule in rules]
        assert rules[0]["sources"] == []


def reason(log: str) -> str:
    """As container_release reads it: the first pattern that is in the log, its text with the groups filled in."""
    for pattern, text in FAILURES:
        for line in log.splitlines():
            found = re.search(pattern, line)
            if found:
                return found.expand(text)
    return ""


class TestLogs:
    @pytest.mark.parametrize(
        ("line", "text"),
        [
            (
                "(EngineCore pid=110) ERROR 08-28 07:39:28 [core.py:1346] ValueError: To serve at least one request with the"
                " model's max seq len (40960), (4.38 GiB KV cache is needed, which is larger than the available KV cache memory"
                " (1.0 GiB). Based on the available memory, the estimated maximum model length is 9344. Try",
                "GPU memory: the context needs 4.38 GiB of KV cache, 1.0 GiB are left: lower vllm_max_model_len",
            ),
            (
                "ValueError: Free memory on device cuda:0 (3.25/23.43 GiB) on startup is less than desired GPU memory"
                " utilization (0.96, 22.49 GiB).",
                "GPU memory: only 3.25 of 23.43 GiB were free at the start",
            ),
            ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.", "GPU memory ran out"),
            ("vllm serve: error: unrecognized arguments: --task embed", "vLLM refuses an argument (unrecognized arguments: --task"),
            ("vllm: error: argument --dtype: invalid choice: 'x'", "vLLM refuses an argument (argument --dtype"),
            ("RuntimeError: CUDA error: no kernel image is available for execution on the device", "not built for this GPU"),
            ("RuntimeError: The NVIDIA driver on your system is too old (found version 12040).", "the driver is too old"),
            ("RuntimeError: Failed to infer device type, please set", "the container sees no GPU"),
            (
                "Value error, User-specified max_model_len (200000) is greater than the derived max_model_len"
                " (max_position_embeddings=131072 or model_max_length=None in model's config.json).",
                "vllm_max_model_len is 200000, more than the model knows (max_position_embeddings=131072 or",
            ),
            ("OSError: /models/x does not appear to have a file named config.json.", "the model's files are missing"),
            ("ValueError: LoRA rank 64 is greater than max_lora_rank 16.", "a LoRA module has rank 64, vllm_max_lora_rank is 16"),
            ("PermissionError: [Errno 13] Permission denied: '/cache/home'", "vLLM may not use /cache/home"),
            (
                "(APIServer pid=1) pydantic_core._pydantic_core.ValidationError: 1 validation error for VllmConfig\n"
                "(APIServer pid=1)   Value error, Cannot find the config file for awq_marlin [type=value_error,"
                " input_value=ArgsKwargs((), {'model_co... 'shutdown_timeout': 0}), input_type=ArgsKwargs]",
                "vLLM refuses its settings: Cannot find the config file for awq_marlin",
            ),
            ("  Value error, No model architectures are specified", "settings: No model architectures are specified"),
            (
                "huggingface_hub.errors.HFValidationError: Repo id must be in the form 'repo_name' or 'namespace/repo_name':"
                " '/models/x'. Use `repo_type` argument if needed.",
                "the model's files are missing",
            ),
            (
                "huggingface_hub.errors.LocalEntryNotFoundError: Cannot find the requested files in the disk cache and outgoing"
                " traffic has been disabled.",
                "the model's files are missing",
            ),
            (
                "vllm.exceptions.LoRAAdapterNotFoundError: Loading lora tone failed: No adapter found for /models/own/tone",
                "the LoRA module /models/own/tone is missing or no adapter",
            ),
            ("KeyError: 'layers.0.mlp'", "KeyError: 'layers.0.mlp'"),
        ],
    )  # fmt: skip
    def test_reason(self, line: str, text: str) -> None:
        last = "(APIServer pid=1) RuntimeError: Engine core initialization failed. See root cause above."
        assert text in reason(f"INFO starting\n{line}\n{last}")

    def test_consequence_is_no_reason(self) -> None:
        assert (
            reason("RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}")
            == ""
        )

    def test_healthy_log_has_no_reason(self) -> None:
        assert reason("INFO Application startup complete.\nINFO 10.0.0.1 - POST /v1/completions 200 OK") == ""

    def test_phases_follow_one_another(self) -> None:
        log = [
            "INFO 11-20 10:00:00 [api_server.py:1971] vLLM API server version 0.33.0",
            "(EngineCore pid=9) INFO [gpu_model_runner.py:3000] Starting to load model /models/x...",
            "(EngineCore pid=9) INFO [default_loader.py:384] Loading weights took 18.35 seconds",
            "(EngineCore pid=9) INFO [monitor.py:34] torch.compile takes 31.22 s in total",
            "(EngineCore pid=9) INFO [kv_cache_utils.py:1087] GPU KV cache size: 49,152 tokens",
            "(EngineCore pid=9) INFO [gpu_model_runner.py:3480] Graph capturing finished in 8 secs, took 0.31 GiB",
            "INFO:     Application startup complete.",
        ]
        found = [name for line in log for name, pattern in PHASES if re.search(pattern, line)]
        assert found == [name for name, _pattern in PHASES]

    def test_start_of_a_version_that_draws_its_name(self) -> None:
        line = "(APIServer pid=1) INFO 11-20 10:00:00 [utils.py:233] non-default args: {'model_tag': '/models/x', 'port': 8002}"
        assert [name for name, pattern in PHASES if re.search(pattern, line)] == ["starting"]
