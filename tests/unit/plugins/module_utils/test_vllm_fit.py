"""Whether a model fits: facts of well-known models, and numbers that vLLM itself has logged for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ansible_collections.nemo.platform.plugins.module_utils import model_memory as memory
from ansible_collections.nemo.platform.plugins.module_utils.model_memory import GIB
from ansible_collections.nemo.platform.plugins.module_utils.vllm_fit import (
    Finding,
    Host,
    Wanted,
    examine,
    image_findings,
    memory_findings,
    requirement_holds,
)

Config = dict[str, Any]


def config(layers: int, hidden: int, heads: int, kv: int, inter: int, vocab: int, longest: int, **more: Any) -> Config:
    return {
        "num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads, "num_key_value_heads": kv,
        "intermediate_size": inter, "vocab_size": vocab, "max_position_embeddings": longest, "torch_dtype": "bfloat16",
        **more,
    }  # fmt: skip


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}
LLAMA_8B = config(32, 4096, 32, 8, 14336, 128256, 131072, rope_scaling=LLAMA3)
LLAMA_8B_BYTES = 16060522496
LLAMA_70B = config(80, 8192, 64, 8, 28672, 128256, 131072, rope_scaling=LLAMA3)
LLAMA_70B_BYTES = 141107412992
QWEN_14B = config(48, 5120, 40, 8, 13824, 152064, 32768, sliding_window=131072, use_sliding_window=False)
QWEN_14B_BYTES = 29540067328
QWEN_14B_AWQ = {**QWEN_14B, "torch_dtype": "float16", "quantization_config": {"quant_method": "awq", "bits": 4}}
QWEN_14B_AWQ_BYTES = 9985000000
MISTRAL_7B = config(32, 4096, 32, 8, 14336, 32000, 32768, sliding_window=4096)
GEMMA_2_9B = config(42, 3584, 16, 8, 14336, 256000, 8192, head_dim=256, sliding_window=4096, model_type="gemma2")
DEEPSEEK_LITE = config(27, 2048, 16, 16, 10944, 102400, 163840, kv_lora_rank=512, qk_rope_head_dim=64)
QWEN3_30B = config(48, 2048, 32, 4, 6144, 151936, 262144, head_dim=128)
QWEN15_7B = config(32, 4096, 32, 32, 11008, 151936, 32768)
QWEN3_1_7B = config(28, 2048, 16, 8, 6144, 151936, 40960, head_dim=128)
MAMBA: Config = {"num_hidden_layers": 64, "hidden_size": 4096, "state_size": 128, "model_type": "mamba2"}

A10G: dict[str, Any] = {
    "index": 0,
    "name": "NVIDIA A10G",
    "memory_total_mib": 23028,
    "memory_used_mib": 4,
}
GPU: dict[str, Any] = {
    "usable": True,
    "cuda": "13.0",
    "driver": {"loaded": "580.95.05"},
    "devices": [A10G],
    "processes": [],
}
CUDA_13 = {"CUDA_VERSION": "13.0.2", "NVIDIA_REQUIRE_CUDA": "cuda>=13.0 brand=tesla,driver>=535,driver<536"}
HOST = Host(gpu=GPU, memory_total=16 * GIB)
WANTED = Wanted(max_model_len=8192, memory=13 * GIB, shm_size=GIB)


def shape(of: Config) -> memory.Shape:
    found = memory.shape_of(of)
    assert found is not None
    return found


def findings(of: Config, stored: int | None, host: Host = HOST, **wanted: Any) -> list[Finding]:
    return memory_findings(of, stored, WANTED._replace(**wanted), host)[0]


def errors(found: list[Finding]) -> list[str]:
    return [finding.text for finding in found if finding.level == "error"]


class TestCache:
    @pytest.mark.parametrize(
        ("of", "tokens", "gib"),
        [
            # "(N tokens), X GiB KV cache is needed", as vLLM says it of these models
            (QWEN3_1_7B, 40960, 4.38),
            (QWEN3_30B, 262144, 24.0),
            (QWEN15_7B, 32768, 16.0),
            (LLAMA_8B, 131072, 16.0),
            (LLAMA_70B, 8192, 2.5),
            (QWEN_14B_AWQ, 32768, 6.0),
        ],
    )
    def test_is_what_vllm_counts(self, of: Config, tokens: int, gib: float) -> None:
        assert memory.cache_bytes(shape(of), tokens, 2, 1) / GIB == pytest.approx(gib, abs=0.01)

    def test_latent_attention(self) -> None:
        assert memory.cache_bytes(shape(DEEPSEEK_LITE), 1, 2, 1) == 27 * 576 * 2
        assert memory.cache_bytes(shape(DEEPSEEK_LITE), 1, 2, 4) == 27 * 576 * 2

    def test_window_ends_the_growth(self) -> None:
        assert memory.cache_bytes(shape(MISTRAL_7B), 32768, 2, 1) == 131072 * (4096 + memory.STEP_TOKENS)
        assert memory.cache_bytes(shape(MISTRAL_7B), 1000, 2, 1) == 131072 * 1000

    def test_window_in_some_layers(self) -> None:
        assert (shape(GEMMA_2_9B).full, shape(GEMMA_2_9B).sliding) == (21, 21)
        kinds = (["sliding_attention"] * 5 + ["full_attention"]) * 4
        mixed = shape(config(24, 1152, 4, 1, 6912, 262144, 32768, sliding_window=512, layer_types=kinds))
        assert (mixed.full, mixed.sliding, mixed.window) == (4, 20, 512)

    def test_window_that_is_off(self) -> None:
        assert shape(QWEN_14B).sliding == 0

    def test_recurrent_layers_have_no_cache(self) -> None:
        kinds = ["linear_attention", "linear_attention", "linear_attention", "full_attention"] * 12
        assert shape({**QWEN3_30B, "layer_types": kinds}).full == 12

    def test_more_cards_share_the_heads(self) -> None:
        assert memory.cache_bytes(shape(LLAMA_8B), 100, 2, 4) == memory.cache_bytes(shape(LLAMA_8B), 100, 2, 1) / 4
        assert memory.cache_bytes(shape(LLAMA_8B), 100, 2, 16) == memory.cache_bytes(shape(LLAMA_8B), 100, 2, 8)

    def test_smaller_elements(self) -> None:
        assert memory.cache_element(LLAMA_8B, "fp8", "auto") == 1
        assert memory.cache_element(LLAMA_8B, "auto", "float32") == 4

    @pytest.mark.parametrize(
        "of",
        [
            MAMBA,
            {},
            {"is_encoder_decoder": True, **LLAMA_8B},
            {**LLAMA_8B, "layer_types": ["full_attention", "chunked"]},
        ],
    )
    def test_unknown_architectures_are_not_guessed(self, of: Config) -> None:
        assert memory.shape_of(of) is None

    def test_language_model_within_another(self) -> None:
        assert shape({"model_type": "mllama", "text_config": LLAMA_8B}) == shape(LLAMA_8B)

    def test_names_of_older_models(self) -> None:
        gpt2 = {"n_layer": 12, "n_head": 12, "n_embd": 768, "n_positions": 1024, "vocab_size": 50257}
        assert shape(gpt2).kv_heads == 12
        assert memory.longest_context(gpt2) == 1024

    @pytest.mark.parametrize(("room", "tokens"), [(4 * GIB, 32768), (131072 * 17, 16), (0, 0)])
    def test_longest_that_fits(self, room: float, tokens: int) -> None:
        assert memory.longest_fit(shape(LLAMA_8B), room, 2, 1) == tokens


class TestContext:
    @pytest.mark.parametrize(
        ("of", "longest"),
        [
            (LLAMA_8B, 131072),
            (QWEN_14B, 32768),
            (
                {
                    **QWEN_14B,
                    "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
                },
                131072,
            ),
            ({**QWEN_14B, "rope_scaling": {"type": "linear", "factor": 2.0}}, 65536),
            ({**QWEN_14B, "rope_scaling": {"type": "mrope"}}, 32768),
            ({**QWEN_14B, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, 32768),
            ({}, None),
        ],
    )
    def test_longest(self, of: Config, longest: int | None) -> None:
        assert memory.longest_context(of) == longest


class TestWeights:
    def test_as_they_lie(self) -> None:
        assert memory.loaded_bytes(LLAMA_8B, LLAMA_8B_BYTES, "auto", "") == LLAMA_8B_BYTES
        assert memory.loaded_bytes(QWEN_14B_AWQ, QWEN_14B_AWQ_BYTES, "half", "") == QWEN_14B_AWQ_BYTES

    def test_of_another_type(self) -> None:
        assert memory.loaded_bytes(LLAMA_8B, LLAMA_8B_BYTES, "float32", "") == 2 * LLAMA_8B_BYTES
        single = {**LLAMA_8B, "torch_dtype": "float32"}
        assert memory.loaded_bytes(single, 2 * LLAMA_8B_BYTES, "auto", "") == LLAMA_8B_BYTES

    def test_quantised_while_they_load(self) -> None:
        assert memory.loaded_bytes(LLAMA_8B, LLAMA_8B_BYTES, "auto", "fp8") / GIB == pytest.approx(8.5, abs=0.2)
        assert memory.loaded_bytes(LLAMA_8B, LLAMA_8B_BYTES, "auto", "bitsandbytes") / GIB == pytest.approx(
            5.6, abs=0.3
        )

    def test_by_the_index(self, tmp_path: Path) -> None:
        index = {"metadata": {"total_size": LLAMA_70B_BYTES}, "weight_map": {"a": "model-1.safetensors"}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        assert memory.weights_in(str(tmp_path)) == LLAMA_70B_BYTES
        (tmp_path / "model-1.safetensors").write_bytes(b"x" * 100)
        (tmp_path / "consolidated.safetensors").write_bytes(b"x" * 100)
        assert memory.weights_in(str(tmp_path)) == 100

    def test_without_an_index(self, tmp_path: Path) -> None:
        assert memory.weights_in(str(tmp_path)) is None
        assert memory.weights_in(str(tmp_path / "nowhere")) is None
        (tmp_path / "training_args.bin").write_bytes(b"x")
        assert memory.weights_in(str(tmp_path)) is None
        (tmp_path / "pytorch_model.bin").write_bytes(b"x" * 10)
        assert memory.weights_in(str(tmp_path)) == 10
        (tmp_path / "model.safetensors").write_bytes(b"x" * 9)
        (tmp_path / "consolidated.safetensors").write_bytes(b"x" * 9)
        assert memory.weights_in(str(tmp_path)) == 9


class TestMemory:
    def test_8b_fits_the_a10g(self) -> None:
        assert findings(LLAMA_8B, LLAMA_8B_BYTES) == []
        assert findings(LLAMA_8B, LLAMA_8B_BYTES, max_model_len=16384) == []

    def test_8b_with_its_whole_context_does_not(self) -> None:
        found = findings(LLAMA_8B, LLAMA_8B_BYTES, max_model_len=0)
        (text,) = errors(found)
        assert "weights 15.0 GiB + context of 131072 tokens 16.0 GiB are more than the 19.8 GiB (NVIDIA A10G x" in text
        assert "set vllm_max_model_len to " in text
        longest = int(text.split("set vllm_max_model_len to ")[1].split()[0])
        assert 24000 < longest < 34000
        assert findings(LLAMA_8B, LLAMA_8B_BYTES, max_model_len=longest) == []

    def test_14b_only_quantised(self) -> None:
        (text,) = errors(findings(QWEN_14B, QWEN_14B_BYTES))
        assert text.startswith("weights of 27.5 GiB for each card are more than the 19.8 GiB (NVIDIA A10G x")
        assert "quantised" in text
        assert findings(QWEN_14B_AWQ, QWEN_14B_AWQ_BYTES, dtype="half") == []

    def test_70b_on_one_card_and_on_eight(self) -> None:
        assert errors(findings(LLAMA_70B, LLAMA_70B_BYTES))[0].startswith(
            "weights of 131.4 GiB for each card are more than"
        )
        eight = HOST._replace(gpu={**GPU, "devices": [A10G] * 8})
        assert errors(findings(LLAMA_70B, LLAMA_70B_BYTES, eight, tensor_parallel_size=8)) == []

    def test_what_rests_on_an_estimate_is_a_warning(self) -> None:
        found = findings(LLAMA_8B, LLAMA_8B_BYTES, max_model_len=36000)
        assert [finding.level for finding in found] == ["warning"]
        assert "may fail to start" in found[0].text

    def test_share_that_would_do(self) -> None:
        found = findings(LLAMA_8B, LLAMA_8B_BYTES, gpu_memory_utilization=0.75)
        assert "vllm_gpu_memory_utilization to 0." in found[0].text
        share = float(found[0].text.split("vllm_gpu_memory_utilization to ")[1].split(",")[0])
        assert findings(LLAMA_8B, LLAMA_8B_BYTES, gpu_memory_utilization=share) == []

    def test_unknown_architecture_warns(self) -> None:
        (finding,) = findings({**MAMBA, "architectures": ["Mamba2ForCausalLM"]}, 5 * GIB)
        assert finding.level == "warning"
        assert "not known for this architecture (Mamba2ForCausalLM)" in finding.text

    def test_unknown_architecture_whose_weights_alone_are_too_much(self) -> None:
        assert errors(findings(MAMBA, 50 * GIB))

    def test_unknown_weights_warn(self) -> None:
        assert [finding.level for finding in findings(LLAMA_8B, None)] == ["warning"]

    def test_card_that_does_not_say(self) -> None:
        silent = HOST._replace(gpu={**GPU, "devices": [{**A10G, "memory_total_mib": None}]})
        assert [finding.level for finding in findings(LLAMA_8B, LLAMA_8B_BYTES, silent)] == ["warning"]

    def test_what_others_hold(self) -> None:
        other = {"pid": 77, "name": "python3", "memory_used_mib": 9000}
        busy = HOST._replace(gpu={**GPU, "devices": [{**A10G, "memory_used_mib": 9010}], "processes": [other]})
        (text,) = errors(findings(LLAMA_8B, LLAMA_8B_BYTES, busy))
        assert text.startswith("8.8 GiB of 22.5 GiB are held by python3 (pid 77, 9000 MiB)")
        assert text.endswith("stop that, or set 0.60 at most")

    def test_what_our_own_container_holds_is_free_by_then(self) -> None:
        own = {"pid": 78, "name": "VLLM::EngineCore", "memory_used_mib": 20000}
        gpu = {**GPU, "devices": [{**A10G, "memory_used_mib": 20010}], "processes": [own]}
        assert findings(LLAMA_8B, LLAMA_8B_BYTES, HOST._replace(gpu=gpu, own_pids=frozenset({78}))) == []

    def test_memory_without_a_process(self) -> None:
        gpu = {**GPU, "devices": [{**A10G, "memory_used_mib": 20000}]}
        assert "that nvidia-smi does not name" in errors(findings(LLAMA_8B, LLAMA_8B_BYTES, HOST._replace(gpu=gpu)))[0]
        assert findings(LLAMA_8B, LLAMA_8B_BYTES, HOST._replace(gpu=gpu, own_runs=True)) == []


class TestImage:
    @pytest.mark.parametrize(
        ("text", "cuda", "driver", "holds"),
        [
            ("cuda>=13.0", "13.0", "580.95.05", True),
            ("cuda>=13.1", "13.0", "580.95.05", False),
            ("cuda>=9.0", "13.0", "580.95.05", True),
            ("cuda>=13.0 brand=tesla,driver>=535,driver<536", "12.8", "570.86.15", False),
            ("cuda>=13.0 brand=tesla,driver>=570,driver<571", "12.8", "570.86.15", None),
            ("cuda>=13.0 driver>=570,driver<571", "12.8", "570.86.15", True),
        ],
    )
    def test_requirement(self, text: str, cuda: str, driver: str, holds: bool | None) -> None:
        assert requirement_holds(text, cuda, driver) is holds

    def test_new_enough(self) -> None:
        assert image_findings(CUDA_13, GPU) == []
        assert image_findings({"CUDA_VERSION": "13.2.0"}, GPU) == []

    @pytest.mark.parametrize("environment", [CUDA_13, {"CUDA_VERSION": "13.0.2"}])
    def test_too_old(self, environment: dict[str, str]) -> None:
        (finding,) = image_findings(environment, {**GPU, "cuda": "12.8", "driver": {"loaded": "570.86.15"}})
        assert finding.level == "error"
        assert "the image needs CUDA 13.0" in finding.text
        assert "the driver 570.86.15 runs CUDA 12.8 at most: upgrade the driver (580 or newer)" in finding.text
        assert "-cu129" in finding.text

    def test_minor_that_is_required(self) -> None:
        environment = {"CUDA_VERSION": "13.2.0", "NVIDIA_REQUIRE_CUDA": "cuda>=13.2"}
        (finding,) = image_findings(environment, GPU)
        assert finding.level == "error"
        assert finding.text.endswith(
            "upgrade the driver (a newer nvidia_driver_branch), or set vllm_tag to an image for CUDA 13.0"
        )
        assert image_findings({**environment, "NVIDIA_DISABLE_REQUIRE": "1"}, GPU) == []

    def test_brand_decides_only_where_somebody_has_asked_for_it(self) -> None:
        environment = {"CUDA_VERSION": "13.0.2", "NVIDIA_REQUIRE_CUDA": "cuda>=13.0 brand=tesla,driver>=570,driver<571"}
        older = {**GPU, "cuda": "12.8", "driver": {"loaded": "570.86.15"}}
        assert [finding.level for finding in image_findings(environment, older)] == ["error"]
        asked = {**environment, "VLLM_ENABLE_CUDA_COMPATIBILITY": "1"}
        assert [finding.level for finding in image_findings(asked, older)] == ["warning"]
        assert [finding.level for finding in image_findings({**asked, "NVIDIA_REQUIRE_CUDA": "cuda>=13.0"}, older)] == [
            "error"
        ]

    def test_image_that_says_nothing(self) -> None:
        assert [finding.level for finding in image_findings({"PATH": "/bin"}, GPU)] == ["warning"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    index = {"metadata": {"total_size": LLAMA_8B_BYTES}, "weight_map": {"a": "x.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    return tmp_path


class TestAll:
    def examined(self, folder: Path, host: Host = HOST, adapters: Any = (), **wanted: Any) -> list[str]:
        found, _numbers = examine(str(folder), adapters, CUDA_13, WANTED._replace(**wanted), host)
        return [f"{finding.level} {finding.about}: {finding.text}" for finding in found]

    def test_everything_fits(self, folder: Path) -> None:
        found, numbers = examine(str(folder), [], CUDA_13, WANTED, HOST)
        assert found == []
        assert numbers["weights"] == LLAMA_8B_BYTES
        assert numbers["cache"] == GIB

    def test_no_model(self, tmp_path: Path) -> None:
        assert self.examined(tmp_path) == [
            "error model: its folder has no config.json that can be read: check vllm_model"
        ]

    def test_context_beyond_the_model(self, folder: Path) -> None:
        text = "error context: vllm_max_model_len is 200000, the model knows 131072 tokens; set 131072 at most, or 0"
        assert [line for line in self.examined(folder, max_model_len=200000) if line.startswith(text)]
        assert not [
            line for line in self.examined(folder, max_model_len=200000, longer_than_model=True) if "context:" in line
        ]

    def test_no_gpu(self, folder: Path) -> None:
        broken = HOST._replace(gpu={"usable": False, "problem": "there is no NVIDIA GPU on the bus"})
        assert self.examined(folder, broken)[0].startswith(
            "error gpu: there is no NVIDIA GPU on the bus; set vllm_device"
        )

    def test_too_few_cards(self, folder: Path) -> None:
        assert "error gpu: vllm_tensor_parallel_size is 4, the host has 1 GPU; set 1 at most" in self.examined(
            folder, tensor_parallel_size=4
        )

    def test_cards_that_do_not_divide_the_heads(self, folder: Path) -> None:
        three = HOST._replace(gpu={**GPU, "devices": [A10G] * 3})
        assert [line for line in self.examined(folder, three, tensor_parallel_size=3) if "error parallel:" in line]

    def test_quantisation(self, folder: Path) -> None:
        assert (
            "error quantization: vllm_quantization is awq, the model's weights"
            in self.examined(folder, quantization="awq")[0]
        )
        (folder / "config.json").write_text(json.dumps({**LLAMA_8B, "quantization_config": {"quant_method": "gptq"}}))
        assert self.examined(folder, quantization="gptq_marlin") == []
        assert "the model is quantised by gptq" in self.examined(folder, quantization="awq")[0]

    def test_adapters(self, folder: Path, tmp_path: Path) -> None:
        adapter = tmp_path / "tone"
        adapter.mkdir()
        assert self.examined(folder, adapters=[("tone", str(adapter))])[0].startswith(
            "error lora: tone: its folder has no"
        )
        (adapter / "adapter_config.json").write_text(json.dumps({"r": 64}))
        assert self.examined(folder, adapters=[("tone", str(adapter))]) == [
            "error lora: tone has rank 64, vllm_max_lora_rank is 16; set 64 or more"
        ]
        assert self.examined(folder, adapters=[("tone", str(adapter))], max_lora_rank=64) == []

    def test_host_memory(self, folder: Path) -> None:
        small = HOST._replace(memory_total=3 * GIB)
        assert [line for line in self.examined(folder, small) if "error ram: vLLM needs 4.0 GiB" in line]
        assert [line for line in self.examined(folder, memory=2 * GIB) if "vllm_memory is 2.0 GiB: raise it" in line]
        assert [line for line in self.examined(folder, memory=20 * GIB) if line.startswith("warning ram: vllm_memory")]

    def test_cpu_needs_the_weights_in_ram_and_no_gpu(self, folder: Path) -> None:
        none = Host(gpu={}, memory_total=16 * GIB)
        assert [
            line
            for line in self.examined(folder, none, device="cpu")
            if "and 15.0 GiB of weights), vllm_memory" in line
        ]
        assert self.examined(folder, none._replace(memory_total=64 * GIB), device="cpu", memory=20 * GIB) == []

    def test_full_volume(self, folder: Path) -> None:
        full = HOST._replace(free_cache=GIB // 2, free_cache_least=GIB)
        assert "error disk: 0.5 GiB are free for compile caches" in self.examined(folder, full)[0]
        assert "warning disk: 0.5 GiB" in self.examined(folder, full._replace(own_model=True))[0]

    def test_errors_come_first(self, folder: Path) -> None:
        lines = self.examined(folder, HOST._replace(free_cache=0, free_cache_least=GIB, own_model=True), memory=GIB)
        assert [line.split()[0] for line in lines] == ["error", "warning"]
