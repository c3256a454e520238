"""verify.yml on the healthy lab: every flow is tried, from every host and from outside, and nothing is found."""

from __future__ import annotations

import json
import pathlib
import subprocess
import xml.etree.ElementTree as ET
from typing import Any

import pytest

from lab.settings import BASTION

CHECKOUT = pathlib.Path(__file__).resolve().parents[2]
VERIFY = ["scripts/lab-env", "ansible-playbook", "-i", "inventories/lab", "playbooks/verify.yml"]
SOURCES = {
    "outside",
    "bastion-10.0.1.10",
    "vllm-10.0.2.20",
    "ai-prod-10.0.2.31",
    "ai-dev-10.0.2.32",
    "eks-node-a-10.0.3.11",
}


def verify(folder: pathlib.Path, *arguments: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    done = subprocess.run(
        [*VERIFY, "-e", f"verify_report_dir={folder}", *arguments], cwd=CHECKOUT, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:]
    return done, json.loads((folder / "verify.json").read_text())


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("verify")
    return (*verify(folder), folder)


def test_nothing_is_found_and_nothing_left_unproven(healthy):
    done, report, _ = healthy
    assert report["findings"] == report["notes"] == []
    assert report["summary"]["ok"] == len(report["flows"])
    assert {flow["source"] for flow in report["flows"]} == SOURCES
    assert "changed=0" in done.stdout


def test_one_line_for_each_flow(healthy):
    done, report, _ = healthy
    lines = [line for line in done.stdout.splitlines() if line.startswith("ok  ")]
    assert len(lines) == len(report["flows"])
    assert all(" ms  " in line for line in lines)


# what must work, with a word of the answer, and what must not
@pytest.mark.parametrize(
    ("flow", "says"),
    [
        ("bastion-10.0.1.10 > cluster-api:443 cluster-api", "HTTP 200, certificate for"),
        ("eks-node-a-10.0.3.11 > database:3306 database", "MySQL 8.0"),
        ("ai-prod-10.0.2.31 > database:3306 database", "closed"),
        ("ai-prod-10.0.2.31 > eks-node-a-10.0.3.11:9094 kafka", "Kafka"),
        ("eks-node-a-10.0.3.11 > ai-prod-10.0.2.31:8000 ai-prod", "HTTP 200"),
        ("outside > ai-prod-10.0.2.31:8000 ai-prod", "closed"),
        ("eks-node-a-10.0.3.11 > vllm-10.0.2.20:8002 vllm", "HTTP 200"),
        ("ai-prod-10.0.2.31 > vllm-10.0.2.20:8002 vllm", "HTTP 200"),
        ("eks-node-a-10.0.3.11 > vllm-10.0.2.20:9836 gpu-metrics", "HTTP 200"),
        ("ai-prod-10.0.2.31 > vllm-10.0.2.20:9836 gpu-metrics", "closed"),
        ("ai-dev-10.0.2.32 > ai-prod-10.0.2.31:8000 ai-prod", "closed"),
        ("ai-dev-10.0.2.32 > ai-prod-10.0.2.31:22 ssh", "closed"),
        ("outside > bastion-10.0.1.10:22 ssh", "SSH-2.0"),
        ("vllm-10.0.2.20 > registry:443 registry", "HTTP 401, certificate for"),
        ("ai-dev-10.0.2.32 > registry-api:443 registry-api", "TLS, certificate for"),
    ],
)
def test_flow(healthy, flow, says):
    _, report, _ = healthy
    (found,) = [one for one in report["flows"] if one["id"] == flow]
    assert found["verdict"] == "ok"
    assert says in found["reason"]
    assert found["ms"] >= 0


def test_junit(healthy):
    _, report, folder = healthy
    root = ET.parse(folder / "verify.xml").getroot()  # noqa: S314 - our own
    assert root.get("tests") == str(len(report["flows"]))
    assert (root.get("failures"), root.get("skipped")) == ("0", "0")
    assert {suite.get("name") for suite in root} == SOURCES


def test_check_mode_with_a_limit_and_a_choice_tries_just_these(tmp_path):
    _, report = verify(tmp_path, "--check", "--limit", "ai_prod", "-e", "verify_only=kafka,ssh")
    assert {flow["source"] for flow in report["flows"]} == {"outside", "ai-prod-10.0.2.31"}
    assert {flow["endpoint"] for flow in report["flows"]} == {"kafka", "ssh"}
    (way_in,) = [flow for flow in report["flows"] if flow["expect"] == "open" and flow["source"] == "outside"]
    assert (way_in["host"], way_in["outcome"]) == (BASTION.address, "open")
    # whether anything listens behind a closed door only a host knows that was left out
    assert report["summary"]["unproven"] > 0
