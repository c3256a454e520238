"""The card, its driver and its runtime. The lab's card is simulated: what is proven here is what is around it."""

from __future__ import annotations

import json
import re


def test_a_container_sees_the_card(on, container):
    shown = on("vllm").check_output("docker exec %s nvidia-smi --list-gpus", container("vllm", "vllm"))
    assert re.search(r"GPU 0: NVIDIA A10G \(UUID: GPU-", shown)


def test_the_driver_is_held(on):
    held = on("vllm").check_output("apt-mark showhold").split()
    installed = (
        on("vllm").check_output("dpkg-query --show --showformat '${Package} ${db:Status-Abbrev}\n'").splitlines()
    )
    drivers = [line.split()[0] for line in installed if re.match(r"(lib)?nvidia\S* [hi]i", line)]
    assert drivers
    assert set(drivers) <= set(held)


def test_the_engine_knows_the_runtime_by_its_own_configuration(on):
    runtimes = json.loads(on("vllm").check_output("docker info --format '{{json .Runtimes}}'"))
    assert "nvidia" in runtimes
    assert json.loads(on("vllm").file("/etc/docker/daemon.json").content_string)["runtimes"]["nvidia"]


def test_the_doctor_finds_nothing(on):
    done = on("vllm").run("gpu-doctor")
    assert done.rc == 0, done.stdout
    assert "NVIDIA A10G" in done.stdout


def test_the_metrics(on):
    host = on("vllm")
    assert host.check_output("systemctl is-active nemo-gpu-metrics.timer") == "active"
    host.check_output("systemctl start nemo-gpu-metrics.service")
    text = host.file("/var/lib/nemo/metrics/gpu.prom").content_string
    assert re.search(r"^nemo_gpu_present 1$", text, re.MULTILINE)
    assert 'name="NVIDIA A10G"' in text
    assert host.check_output("curl --silent --fail http://127.0.0.1:9836/metrics") == text.rstrip("\n")
