"""The inference server, as those who need it see it: the AI hosts, the platform, and nobody else."""

from __future__ import annotations

import json

import pytest

URL = "http://10.0.2.20:8002"
KEY = "lab-vllm-key-0123456789abcdef"  # of the lab's inventory
MODEL = "nemo-chat"
PROMPT = {"model": MODEL, "prompt": "The capital of France is", "max_tokens": 8}

pytestmark = [pytest.mark.journal("vllm", "nemo-proxy-vllm")]


@pytest.fixture
def ask(ssh_from):
    """Status, headers and body of a request that curl makes on a host of the lab."""

    def call(name, path, body=None, key=KEY, method="", options=""):
        argv = f"curl --silent --show-error --max-time 60 --include --path-as-is {options} '{URL}{path}'"
        if key:
            argv += f" --header 'Authorization: Bearer {key}'"
        if method:
            argv += f" --request {method}"
        if body is not None:
            argv += f" --header 'Content-Type: application/json' --data '{json.dumps(body)}'"
        done = ssh_from(name, argv)
        assert done.returncode == 0, done.stderr
        head, _, text = done.stdout.replace("\r\n", "\n").partition("\n\n")
        lines = head.splitlines()
        headers = {line.partition(":")[0].lower(): line.partition(":")[2].strip() for line in lines[1:]}
        return int(lines[0].split()[1]), headers, text

    return call


@pytest.fixture
def answered(on):
    """How many requests the engine has answered, by its own count."""

    def count():
        state = json.loads(on("vllm").file("/var/lib/nemo/vllm/state.json").content_string)
        (current,) = [entry for entry in state["releases"] if entry["release"] == state["current"]]
        text = on("vllm").check_output(f"curl --silent --fail http://127.0.0.1:{current['host_port']}/metrics")
        found = [line for line in text.splitlines() if line.startswith("vllm:request_success_total")]
        assert found, text[:2000]
        return sum(float(line.rsplit(" ", 1)[1]) for line in found)

    return count


@pytest.mark.parametrize("host", ["ai-prod", "ai-dev", "eks-node", "bastion"])
def test_a_completion(ask, host):
    status, _, text = ask(host, "/v1/completions", PROMPT)
    assert status == 200, text
    answer = json.loads(text)
    assert answer["model"] == MODEL
    assert answer["choices"][0]["text"]
    assert 1 <= answer["usage"]["completion_tokens"] <= 8


def test_a_chat(ask):
    messages = [{"role": "user", "content": "Hello"}]
    status, _, text = ask("ai-prod", "/v1/chat/completions", {"model": MODEL, "messages": messages, "max_tokens": 4})
    assert status == 200, text
    assert json.loads(text)["choices"][0]["message"]["role"] == "assistant"


def test_a_streamed_answer_comes_in_parts(ask):
    status, headers, text = ask("ai-prod", "/v1/completions", {**PROMPT, "stream": True})
    assert status == 200, text
    assert headers["content-type"].startswith("text/event-stream")
    assert text.count("data: ") >= 2
    assert text.rstrip().endswith("data: [DONE]")


def test_the_model_has_its_name(ask):
    _, _, text = ask("ai-prod", "/v1/models")
    assert [entry["id"] for entry in json.loads(text)["data"]] == [MODEL]


@pytest.mark.parametrize("service", ["10.0.2.31:8000", "10.0.2.32:8001"])
def test_the_ai_api_answers_through_it(ssh_from, answered, service):
    before = answered()
    body = json.dumps({"prompt": "The capital of France is"})
    done = ssh_from(
        "bastion",
        f"curl --silent --show-error --fail --max-time 60 http://{service}/v1/ask -H 'Content-Type: application/json' -d '{body}'",
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["model"] == MODEL
    assert answer["text"]
    assert answered() > before, "the answer came from somewhere else"


@pytest.mark.parametrize("key", ["", "wrong", KEY[:-1], KEY + "x", KEY.upper()])
def test_a_wrong_key_is_refused(ask, key):
    status, headers, text = ask("ai-prod", "/v1/completions", PROMPT, key=key)
    assert status == 401, text
    assert "bearer" in headers["www-authenticate"].lower()
    assert json.loads(text)["error"]


@pytest.mark.parametrize(
    "path",
    [
        "/tokenize", "/detokenize", "/invocations", "/pause", "/resume", "/sleep", "/reset_prefix_cache", "/docs",
        "/openapi.json", "/v1/load_lora_adapter", "/v1/../tokenize", "//tokenize", "/v1%2f..%2ftokenize", "/TOKENIZE",
        "/v1/completions/../../pause", "/", "/version", "/server_info", "/collective_rpc",
    ],
)  # fmt: skip
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_nothing_but_what_clients_need_is_let_through(ask, path, method):
    status, _, text = ask("ai-prod", path, method=method)
    assert status in (403, 404, 405), text
    assert "error" in json.loads(text)


def test_metrics_are_for_the_platform(ask):
    status, _, text = ask("eks-node", "/metrics", key="")
    assert status == 200
    assert "vllm:" in text
    assert ask("ai-prod", "/metrics", key="")[0] == 403


def test_the_health_needs_no_key(ask):
    assert ask("bastion", "/health", key="")[0] == 200


def test_a_key_is_nowhere_on_the_host(on):
    host = on("vllm")
    found = host.check_output(
        "grep -rlF --exclude-dir=docker %s /etc /var/lib /run /root /home 2>/dev/null || true", KEY
    )
    assert found == ""
    for name in host.check_output("docker ps --all --quiet").split():
        assert KEY not in host.check_output("docker container inspect %s", name)
    assert KEY not in host.check_output("ps -eo args")
    assert KEY not in host.check_output("journalctl --no-pager --boot --unit='nemo*' --unit=docker")


def test_the_model_is_on_the_volume_and_the_engine_asks_no_hub(on, container):
    host = on("vllm")
    assert host.mount_point("/srv/models").exists
    settings = json.loads(host.check_output("docker container inspect %s", container("vllm", "vllm")))[0]
    environment = dict(entry.split("=", 1) for entry in settings["Config"]["Env"])
    assert environment["HF_HUB_OFFLINE"] == "1"
    assert not [name for name in environment if "TOKEN" in name]
    models = [mount for mount in settings["Mounts"] if mount["Source"].startswith("/srv/models/hub")]
    assert models
    assert not [mount for mount in models if mount["RW"]]


def test_the_volume_is_found_again_after_a_boot(on):
    host = on("vllm")
    line = next(line for line in host.file("/etc/fstab").content_string.splitlines() if "/srv/models" in line)
    assert line.startswith("UUID=")
    assert "nofail" in line.split()[3].split(",")
    assert host.check_output("findmnt --noheadings --output UUID /srv/models") == line.split()[0].removeprefix("UUID=")


def test_the_watchdog_runs_and_is_content(on):
    host = on("vllm")
    assert host.check_output("systemctl is-active nemo-vllm-watchdog.timer") == "active"
    host.check_output("systemctl start nemo-vllm-watchdog.service")
    state = json.loads(host.file("/var/lib/nemo/vllm-watchdog/state.json").content_string)
    assert state["state"] == "ok"
    assert state["strikes"] == 0
