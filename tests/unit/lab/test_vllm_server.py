"""The inference server of the lab: what it refuses, how it fails, what it answers, how it ends."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import pathlib
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from lab.vllm import server

PROGRAM = pathlib.Path(server.__file__)
READY = "Application startup complete."
CARD = "NVIDIA A10G, 23028, {used}"
HEADER = "| NVIDIA-SMI 580.95.05    Driver Version: 580.95.05    CUDA Version: {cuda} |"


@pytest.fixture
def model(tmp_path: pathlib.Path) -> pathlib.Path:
    """A model of two layers, with weights of eight bytes."""
    folder = tmp_path / "model"
    folder.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1,
        "num_hidden_layers": 2, "max_position_embeddings": 2048,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    header = json.dumps({"weight": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 8)
    return folder


class Running:
    """One server process, its log, and requests to it."""

    def __init__(self, process: subprocess.Popen[str], port: int) -> None:
        self.process, self.port = process, port
        self.lines: list[str] = []
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))

    @property
    def log(self) -> str:
        return "\n".join(self.lines)

    def wait_for(self, text: str, seconds: float = 15) -> None:
        deadline = time.monotonic() + seconds
        while text not in self.log:
            assert time.monotonic() < deadline, f"no {text!r} in:\n{self.log}"
            assert self.process.poll() is None or text in self.log, f"it ended before {text!r}:\n{self.log}"
            time.sleep(0.02)

    def end(self, seconds: float = 15) -> int:
        status = self.process.wait(seconds)
        self.reader.join(5)
        return status

    def terminate(self) -> float:
        """The moment of a SIGTERM."""
        self.process.send_signal(signal.SIGTERM)
        return time.monotonic()

    def __call__(
        self, path: str, body: Any = None, method: str = "", key: str = "", timeout: float = 10
    ) -> tuple[int, dict[str, str], str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        with contextlib.closing(connection):
            content = body if isinstance(body, str | None) else json.dumps(body)
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            connection.request(method or ("GET" if body is None else "POST"), path, content, headers)
            answer = connection.getresponse()
            return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read().decode()

    def complete(self, **body: Any) -> tuple[int, dict[str, Any]]:
        status, _, text = self("/v1/completions", {"prompt": "hello", "max_tokens": 1, **body})
        return status, json.loads(text)


Start = Callable[..., Running]


@pytest.fixture
def start(model: pathlib.Path, tmp_path: pathlib.Path) -> Iterator[Start]:
    """Starts `vllm serve` with these arguments on a free port, beside a card of this state."""
    started: list[Running] = []

    def begin(
        *arguments: str, environment: dict[str, str] | None = None, used: int | None = 4, cuda: str = "13.0",
        path: str | None = None, ready: bool = True,
    ) -> Running:  # fmt: skip
        tools = tmp_path / "tools"
        tools.mkdir(exist_ok=True)
        (tools / "nvidia-smi").unlink(missing_ok=True)
        if used is not None:
            text = f'#!/bin/sh\n[ $# -gt 0 ] && echo "{CARD.format(used=used)}" || echo "{HEADER.format(cuda=cuda)}"\n'
            (tools / "nvidia-smi").write_text(text)
            (tools / "nvidia-smi").chmod(0o755)
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        process = subprocess.Popen(
            [sys.executable, str(PROGRAM), "serve", path or str(model), "--host=127.0.0.1", f"--port={port}", *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8",
            env={
                "PATH": str(tools), "PYTHONUNBUFFERED": "1", "HOME": str(tmp_path), "VLLM_CACHE_ROOT": str(tmp_path / "cache"),
                "LAB_STEP": "0.01", "LAB_TOKEN": "0.001", "LAB_CONTROL": str(tmp_path / "lab-behaviour"), **(environment or {}),
            },
        )  # fmt: skip
        running = Running(process, port)
        started.append(running)
        if ready:
            running.wait_for(READY)
        return running

    yield begin
    for running in started:
        running.process.kill()
        running.process.wait()


# ---- arguments


def test_the_options_are_those_of_vllm() -> None:
    line = "serve /m --served-model-name a b --max-model-len 8k --gpu-memory-utilization 0.9 --dtype bfloat16 --quantization awq"
    more = "--tensor_parallel_size 2 --enable-lora --lora-modules one=/a two=/b --shutdown-timeout 30 --no-enable-log-requests"
    found = server.arguments([*line.split(), *more.split()])
    assert (found.model_tag, found.served_model_name, found.max_model_len) == ("/m", ["a", "b"], 8000)
    assert (found.gpu_memory_utilization, found.tensor_parallel_size, found.shutdown_timeout) == (0.9, 2, 30)
    assert found.enable_lora is True
    assert found.enable_log_requests is False
    assert server.arguments(["serve", "/m", "--max-model-l", "5"]).max_model_len == 5  # as far as it is clear
    assert server.loras(found) == {"one": "/a", "two": "/b"}


@pytest.mark.parametrize(
    ("text", "number"), [("8192", 8192), ("8k", 8000), ("8K", 8192), ("1.5k", 1500), ("2M", 2 << 20), ("auto", 0)]
)
def test_a_length_is_written_as_people_do(text: str, number: int) -> None:
    assert server.size(text) == number


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--no-such-thing", "3"], "vllm: error: unrecognized arguments: --no-such-thing 3"),
        (["--max-model-len", "lots"], "vllm serve: error: argument --max-model-len: invalid human_readable_int_or_auto value: 'lots'"),
        (["--dtype", "float33"], "vllm serve: error: argument --dtype: invalid choice: 'float33'"),
        (["--port"], "vllm serve: error: argument --port: expected one argument"),
        (["--serve-model-name", "x"], "unrecognized arguments: --serve-model-name x"),
        (["--max-n", "8"], "vllm serve: error: ambiguous option: --max-n could match"),
    ],
)  # fmt: skip
def test_a_bad_argument_ends_it_with_status_2(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        server.arguments(["serve", "/m", *arguments])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_nothing_but_serve_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        server.arguments(["chat"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("usage: vllm")


# ---- the start


def test_its_log_tells_the_phases_in_their_order(start: Start) -> None:
    log = start().log
    phases = [
        "Starting to load model ", "Loading weights took ", "Model loading took ", "torch.compile took ", "GPU KV cache size: ",
        "Graph capturing finished in ", "init engine (profile, create kv cache, warmup model) took ", READY,
    ]  # fmt: skip
    places = [log.index(phase) for phase in phases]
    assert places == sorted(places)


def test_what_was_compiled_is_taken_from_the_cache(start: Start) -> None:
    assert "torch.compile took" in start().log
    again = start().log
    assert "Directly load the compiled graph(s)" in again
    assert "torch.compile took" not in again
    assert "torch.compile took" in start("--max-model-len=1024").log  # of other settings


def test_a_start_without_graphs_is_quick(start: Start) -> None:
    log = start("--enforce-eager").log
    assert "torch.compile" not in log
    assert "Graph capturing" not in log


def failed(running: Running, status: int = 1) -> str:
    assert running.end() == status
    assert READY not in running.log
    return running.log


def test_a_folder_that_is_not_there(start: Start, tmp_path: pathlib.Path) -> None:
    log = failed(start(path=str(tmp_path / "nothing"), ready=False))
    assert "HFValidationError: Repo id must be in the form" in log


def test_a_repository_is_not_looked_for(start: Start) -> None:
    assert "LocalEntryNotFoundError" in failed(start(path="meta-llama/Llama-3.1-8B", ready=False))


def test_a_folder_without_a_configuration(start: Start, model: pathlib.Path) -> None:
    (model / "config.json").unlink()
    assert "Invalid repository ID or local directory specified" in failed(start(ready=False))


def test_a_model_without_weights(start: Start, model: pathlib.Path) -> None:
    (model / "model.safetensors").unlink()
    log = failed(start(ready=False))
    assert f"RuntimeError: Cannot find any model weights with `{model}`" in log
    assert "EngineCore failed to start." in log
    assert log.endswith(
        "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}"
    )


@pytest.mark.parametrize("cut", [1, 8, 30])
def test_weights_that_are_cut_off(start: Start, model: pathlib.Path, cut: int) -> None:
    whole = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(whole[:-cut])
    assert "SafetensorError: Error while deserializing header" in failed(start(ready=False))


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("--max-model-len=4096", "User-specified max_model_len (4096) is greater than the derived max_model_len (max_position_embeddings=2048.0"),
        ("--quantization=awq", "Cannot find the config file for awq"),
        ("--tensor-parallel-size=3", "Total number of attention heads (2) must be divisible by tensor parallel size (3)."),
        ("--tensor-parallel-size=2", "World size (2) is larger than the number of available GPUs (1)"),
        ("--lora-modules=a=/nowhere", "LoRA is not enabled"),
    ],
)  # fmt: skip
def test_what_does_not_go_with_the_model_or_the_card(start: Start, argument: str, said: str) -> None:
    assert said in failed(start(argument, ready=False))


def test_an_adapter_that_is_not_there(start: Start) -> None:
    log = failed(start("--enable-lora", "--lora-modules", "a=/nowhere", ready=False))
    assert "ValueError: Loading lora a failed: No adapter found for /nowhere" in log


def test_memory_that_somebody_else_has(start: Start) -> None:
    log = failed(start("--gpu-memory-utilization=0.9", used=5000, ready=False))
    assert (
        "ValueError: Free memory on device cuda:0 (17.61/22.49 GiB) on startup is less than desired GPU memory utilization (0.9, 20.24 GiB)."
        in log
    )
    start("--gpu-memory-utilization=0.7", used=5000)


def test_a_context_that_the_cache_cannot_hold(start: Start) -> None:
    log = failed(start("--kv-cache-memory-bytes=262144", ready=False))
    assert "To serve at least one request with the model's max seq len (2048), (0.00 GiB KV cache is needed" in log
    assert "the estimated maximum model length is 1024." in log


def test_without_a_card_it_does_not_start(start: Start) -> None:
    assert "RuntimeError: Failed to infer device type" in failed(start(used=None, ready=False))
    start(used=None, environment={"VLLM_TARGET_DEVICE": "cpu"})


@pytest.mark.parametrize(
    ("needs", "starts"), [("cuda>=13.0 brand=tesla,driver>=535,driver<536", True), ("cuda>=13.4", False)]
)
def test_a_cuda_that_the_driver_does_not_know(start: Start, needs: str, starts: bool) -> None:
    running = start(environment={"NVIDIA_REQUIRE_CUDA": needs}, ready=starts)
    if not starts:
        assert "The NVIDIA driver on your system is too old (found version 13000)" in failed(running)


@pytest.mark.parametrize(
    ("behaviour", "said"),
    [
        ("oom", "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate"),
        ("bad-kernel", "torch.AcceleratorError: CUDA error: no kernel image is available for execution on the device"),
    ],
)
def test_images_that_cannot_start(start: Start, behaviour: str, said: str) -> None:
    assert said in failed(start(environment={"LAB_BEHAVIOUR": behaviour}, ready=False))


def test_a_slow_image_loads_weights_for_long(start: Start) -> None:
    begun = time.monotonic()
    running = start(environment={"LAB_BEHAVIOUR": "slow", "LAB_DELAY": "1"}, ready=False)
    running.wait_for("Starting to load model")
    with pytest.raises(ConnectionRefusedError):
        running("/health")
    running.wait_for(READY)
    assert time.monotonic() - begun > 1


def test_a_cache_that_cannot_be_written(start: Start, tmp_path: pathlib.Path) -> None:
    (tmp_path / "cache").write_text("a file")
    assert "NotADirectoryError" in failed(start(ready=False))


def test_a_port_that_is_taken(start: Start) -> None:
    first = start()
    assert "Address already in use" in failed(start(f"--port={first.port}", ready=False))


def test_it_can_be_ended_while_it_loads(start: Start) -> None:
    running = start(environment={"LAB_BEHAVIOUR": "slow", "LAB_DELAY": "60"}, ready=False)
    running.wait_for("Starting to load model")
    running.terminate()
    assert running.end(5) == 0


# ---- the endpoints


def test_a_completion(start: Start, model: pathlib.Path) -> None:
    running = start("--served-model-name", "chat")
    status, answer = running.complete(max_tokens=3)
    assert status == 200
    assert answer["model"] == "chat"
    assert answer["object"] == "text_completion"
    assert len(answer["choices"][0]["text"].split()) == 3
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"] == {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8}
    assert running.complete(max_tokens=3)[1]["choices"] == answer["choices"]  # of the prompt alone
    assert running.complete(prompt="hullo", max_tokens=3)[1]["choices"] != answer["choices"]
    listed = json.loads(running("/v1/models")[2])["data"]
    assert [(entry["id"], entry["root"], entry["max_model_len"]) for entry in listed] == [("chat", str(model), 2048)]


def test_a_chat(start: Start) -> None:
    status, _, text = start()(
        "/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
    )
    message = json.loads(text)["choices"][0]["message"]
    assert status == 200
    assert message["role"] == "assistant"
    assert len(message["content"].split()) == 2


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_an_answer_in_parts(start: Start, path: str) -> None:
    body = {"prompt": "hi", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "stream": True}
    status, headers, text = start()(path, {**body, "stream_options": {"include_usage": True}})
    events = text.strip().split("\n\n")
    assert status == 200
    assert headers["content-type"].startswith("text/event-stream")
    assert events[-1] == "data: [DONE]"
    parts = [json.loads(event.removeprefix("data: ")) for event in events[:-1]]
    assert parts[-1]["usage"]["completion_tokens"] == 3
    assert [part["choices"][0]["finish_reason"] for part in parts[-4:-1]] == [None, None, "length"]


def test_a_word_at_which_it_stops(start: Start) -> None:
    running = start()
    words = running.complete(max_tokens=8)[1]["choices"][0]["text"].split()
    choice = running.complete(max_tokens=8, stop=words[2])[1]["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert choice["text"].split() == words[:2]


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({"model": "other"}, 404, "The model `other` does not exist. Valid aliases: chat."),
        ({"prompt": ""}, 400, "Either prompt or prompt_embeds must be provided and non-empty."),
        ({"max_tokens": 4000}, 400, "max_tokens=4000 cannot be greater than max_model_len=2048."),
        ({"max_tokens": 0}, 400, "max_tokens must be at least 1, got 0."),
        ({"prompt": "x" * 2048}, 400, "This model's maximum context length is 2048 tokens."),
    ],
)
def test_a_request_that_is_wrong(start: Start, body: dict[str, Any], status: int, said: str) -> None:
    found, answer = start("--served-model-name", "chat").complete(**body)
    assert found == status
    assert answer["error"]["message"].startswith(said)
    assert answer["error"]["code"] == status


def test_what_is_not_there_and_what_is_no_json(start: Start) -> None:
    running = start()
    assert running("/nothing")[0] == 404
    assert running("/v1/completions")[0] == 405
    assert running("/v1/completions", "{bad")[0] == 400
    assert running("/v1/completions", "[]")[0] == 400


@pytest.mark.parametrize("given", [["--api-key", "key-one", "key-two"], []])
def test_keys_cover_the_versioned_paths_alone(start: Start, given: list[str]) -> None:
    running = start(*given, environment={} if given else {"VLLM_API_KEY": "key-one"})
    assert running("/v1/models")[0] == 401
    assert running("/v1/models", key="other")[0] == 401
    assert running("/v1/models", key="key-one")[0] == 200
    assert running("/v1/models", key="key-two")[0] == (200 if given else 401)
    assert running("/health")[0] == running("/metrics")[0] == running("/version")[0] == 200
    assert running("/invocations", {"prompt": "x"})[0] == 200
    assert "key-one" not in running.log


def test_what_no_client_should_reach_is_open(start: Start) -> None:
    running = start()
    assert json.loads(running("/tokenize", {"prompt": "abc"})[2])["count"] == 3
    assert running("/pause", "")[0] == 200
    with pytest.raises(TimeoutError):
        running("/v1/completions", {"prompt": "x", "max_tokens": 1}, timeout=0.3)
    assert running("/resume", "")[0] == 200
    assert running.complete()[0] == 200


def test_its_metrics_have_vllms_names(start: Start) -> None:
    running = start("--served-model-name", "chat")
    running.complete(max_tokens=3)
    text = running("/metrics")[2]
    for line in (
        'vllm:generation_tokens_total{engine="0",model_name="chat"} 3.0', 'vllm:prompt_tokens_total{engine="0",model_name="chat"} 5.0',
        'vllm:request_success_total{engine="0",model_name="chat",finished_reason="length"} 1.0',
        'vllm:num_requests_running{engine="0",model_name="chat"} 0.0', 'vllm:e2e_request_latency_seconds_count{engine="0",model_name="chat"} 1',
    ):  # fmt: skip
        assert line in text.splitlines()


def test_an_adapter_is_a_model_of_its_own(start: Start, tmp_path: pathlib.Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    running = start("--served-model-name", "chat", "--enable-lora", "--lora-modules", f"tuned={tmp_path}")
    assert running.complete(model="tuned")[1]["model"] == "tuned"
    assert [entry["id"] for entry in json.loads(running("/v1/models")[2])["data"]] == ["chat", "tuned"]


# ---- while it runs


def test_a_hung_engine_calls_itself_healthy(start: Start) -> None:
    running = start(environment={"LAB_BEHAVIOUR": "hang"})
    with pytest.raises(TimeoutError):
        running("/v1/completions", {"prompt": "x", "max_tokens": 1}, timeout=0.5)
    assert running("/health")[0] == 200


def test_the_control_file_hangs_it_for_as_long_as_it_is_there(start: Start, tmp_path: pathlib.Path) -> None:
    running = start()
    (tmp_path / "lab-behaviour").write_text("hang\n")
    with pytest.raises(TimeoutError):
        running("/v1/completions", {"prompt": "x", "max_tokens": 1}, timeout=0.5)
    (tmp_path / "lab-behaviour").unlink()
    assert running.complete()[0] == 200


def test_what_is_asked_for_once_ends_with_the_process(start: Start, tmp_path: pathlib.Path) -> None:
    running = start()
    (tmp_path / "lab-behaviour").write_text("hang once\n")
    with pytest.raises(TimeoutError):
        running("/v1/completions", {"prompt": "x", "max_tokens": 1}, timeout=0.5)
    assert not (tmp_path / "lab-behaviour").exists()
    with pytest.raises(TimeoutError):
        running("/v1/completions", {"prompt": "x", "max_tokens": 1}, timeout=0.5)
    assert start().complete()[0] == 200


def test_an_engine_that_dies_ends_it_with_status_0(start: Start) -> None:
    running = start(environment={"LAB_BEHAVIOUR": "exit-zero"})
    assert running("/health")[0] == 200
    status, answer = running.complete()
    assert status == 500
    assert answer["error"]["message"].startswith("EngineCore encountered an issue.")
    assert running.end() == 0
    assert "EngineCore encountered a fatal error." in running.log


def test_the_control_file_kills_the_engine(start: Start, tmp_path: pathlib.Path) -> None:
    running = start()
    (tmp_path / "lab-behaviour").write_text("exit-zero once")
    assert running.end() == 0
    assert not (tmp_path / "lab-behaviour").exists()
    start()


# ---- the end


def asked(running: Running, number: int) -> tuple[threading.Thread, list[Any]]:
    """A request under way, and where its answer will be."""
    answers: list[Any] = []

    def ask() -> None:
        try:
            answers.append(running.complete(max_tokens=number))
        except (OSError, http.client.HTTPException) as error:
            answers.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    deadline = time.monotonic() + 5
    while json.loads(running("/load")[2])["server_load"] == 0:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return thread, answers


def test_what_is_under_way_ends_before_it_does(start: Start) -> None:
    running = start("--shutdown-timeout=10", environment={"LAB_TOKEN": "0.01"})
    thread, answers = asked(running, 100)
    running.terminate()
    running.wait_for("draining in-flight requests count=1 timeout=10s")
    assert running.complete()[0] == 500  # nothing new
    assert running.end() == 0
    thread.join()
    status, answer = answers[0]
    assert status == 200
    assert answer["usage"]["completion_tokens"] == 100
    assert answer["choices"][0]["finish_reason"] == "length"


def test_it_waits_no_longer_than_it_was_told(start: Start) -> None:
    running = start("--shutdown-timeout=1", environment={"LAB_TOKEN": "0.05"})
    thread, answers = asked(running, 2000)
    begun = running.terminate()
    assert running.end() == 0
    assert 1 <= time.monotonic() - begun < 5
    thread.join()
    assert answers[0][1]["choices"][0]["finish_reason"] == "abort"


def test_by_default_it_aborts(start: Start) -> None:
    running = start(environment={"LAB_TOKEN": "0.05"})
    thread, answers = asked(running, 2000)
    begun = running.terminate()
    assert running.end() == 0
    assert time.monotonic() - begun < 3
    thread.join()
    assert "aborting in-flight requests count=1" in running.log
    assert answers[0][1]["choices"][0]["finish_reason"] == "abort"


def test_a_client_that_hangs_up_keeps_nothing_busy(start: Start) -> None:
    running = start(environment={"LAB_TOKEN": "0.05"})
    with pytest.raises(TimeoutError):
        running("/v1/completions", {"prompt": "x", "max_tokens": 2000}, timeout=0.3)
    deadline = time.monotonic() + 5
    while json.loads(running("/load")[2])["server_load"]:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_program_needs_nothing_but_its_options() -> None:
    """It runs under the image's own Python, without this project's packages."""
    done = subprocess.run(
        [sys.executable, "-I", "-S", str(PROGRAM), "chat"],
        capture_output=True,
        text=True,
        check=False,
        env=dict(os.environ),
    )
    assert done.returncode == 2
    assert done.stderr.startswith("usage: vllm")
