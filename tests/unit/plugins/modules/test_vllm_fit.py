"""vllm_fit on a host: programs that answer for docker and nvidia-smi, and what the task says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ansible.module_utils.testing import patch_module_args

from ansible_collections.nemo.platform.plugins.modules import vllm_fit as module

TINY = {
    "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4,
    "num_key_value_heads": 4, "intermediate_size": 128, "vocab_size": 512, "max_position_embeddings": 2048, "dtype": "float32",
}  # fmt: skip
SMI = """case "$1" in
--query-gpu=*) echo "0, GPU-1, NVIDIA A10G, 00000000:00:1E.0, 23028, 20010, 40, 0, 20.0, 0, 0, Enabled" ;;
--query-compute-apps=*) echo "4242, VLLM::EngineCore, 20000" ;;
--version) echo "CUDA Version        : 13.0" ;;
esac"""
Programs = Callable[[str, str], None]


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Programs:
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

    def write(name: str, text: str) -> None:
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)

    write("docker", "exit 1")
    return write


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "hub/acme--tiny/revision"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(TINY))
    (folder / "model.safetensors").write_bytes(b"x" * 4096)
    return folder


def run(capsys: pytest.CaptureFixture[str], **arguments: Any) -> dict[str, Any]:
    with patch_module_args({"memory": "2g", **arguments}), pytest.raises(SystemExit):
        module.main()
    answer: dict[str, Any] = json.loads(capsys.readouterr().out)
    return answer


def test_own_processes_are_asked_of_the_engine(programs: Programs) -> None:
    programs(
        "docker",
        'case "$1" in ps) [ "$4" = label=nemo.service=vllm ] && echo c1 ;; top) printf "PID\\n4242\\n4243\\n" ;; esac',
    )
    assert module.own_processes("vllm") == (frozenset({4242, 4243}), True)
    assert module.own_processes("other") == (frozenset(), False)


def test_which_model_runs_is_asked_of_the_engine(programs: Programs) -> None:
    programs("docker", 'case " $* " in *" label=nemo.service=vllm "*) echo /srv/hub/a/1,/srv/cache ;; esac')
    assert module.serves("vllm", "/srv/hub/a/1")
    assert not module.serves("vllm", "/srv/hub/a")
    assert not module.serves("other", "/srv/hub/a/1")


def test_no_engine_yet(programs: Programs) -> None:
    programs("docker", "echo 4242; exit 1")
    assert module.own_processes("vllm") == (frozenset(), False)


def test_free_space_of_a_folder_that_is_still_to_be(tmp_path: Path) -> None:
    assert module.free_bytes(str(tmp_path / "a/b")) == pytest.approx(module.free_bytes(str(tmp_path)), rel=0.1)
    assert module.free_bytes("nowhere") is None


def test_fits(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = run(capsys, model=str(model), device="cpu", max_model_len=2048)
    assert answer["findings"] == []
    assert answer["changed"] is False


def test_every_error_is_said_at_once(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = run(capsys, model=str(model), device="cpu", max_model_len=4096, memory="64m")
    assert answer["failed"]
    assert answer["msg"].startswith(
        "vllm: acme--tiny does not fit: vllm_max_model_len is 4096, the model knows 2048 tokens"
    )
    assert "vllm_memory is 0.1 GiB: raise it" in answer["msg"]
    assert [finding["level"] for finding in answer["findings"]] == ["error", "error"]


def test_own_memory_on_the_card_is_free_by_then(
    model: Path, programs: Programs, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    programs("nvidia-smi", SMI)
    monkeypatch.setattr(module.gpu, "on_the_bus", lambda root="/": ["0000:00:1e.0"])
    monkeypatch.setattr(module.gpu, "_loaded", lambda root: ("580.95.05", True))
    arguments = {"model": str(model), "memory": "8g", "image_environment": {"CUDA_VERSION": "13.0.2"}}
    foreign = run(capsys, **arguments)
    assert "held by VLLM::EngineCore (pid 4242, 20000 MiB)" in foreign["msg"]
    programs("docker", 'case "$1" in ps) echo c1 ;; top) printf "PID\\n4242\\n" ;; esac')
    own = run(capsys, **arguments)
    assert own["findings"] == []
    assert own["numbers"]["weights"] == 2048  # halved: float32 is served as float16


def test_check_mode_before_the_model_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = run(capsys, model=str(tmp_path / "not/yet"), _ansible_check_mode=True)
    assert [finding["level"] for finding in answer["findings"]] == ["warning"]
    answer = run(capsys, model=str(tmp_path / "not/yet"), device="cpu")
    assert "no config.json that can be read" in answer["msg"]


def test_size_that_is_none(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        run(capsys, model=str(model), memory="much")["msg"] == "memory is 'much'; allowed: a number with b, k, m or g"
    )
