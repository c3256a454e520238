"""The AI services, where their clients stand."""

from __future__ import annotations

import boto3
import pytest

from lab.settings import AWS_API, REGION
from tests.bench.measure import AI_AGAIN, cost, executions_for_services

SERVICES = [
    pytest.param("ai-prod", "10.0.2.31", 8000, "prod-20250718-1040", id="ai-prod"),
    pytest.param("ai-dev", "10.0.2.32", 8001, "dev-20250719-0930", id="ai-dev"),
]


@pytest.fixture(scope="module")
def digests():
    """Tag to digest, as ECR has them."""
    ecr = boto3.client(
        "ecr", region_name=REGION, endpoint_url=f"http://{AWS_API}:5000",
        aws_access_key_id="lab", aws_secret_access_key="lab",
    )  # fmt: skip
    pages = ecr.get_paginator("describe_images").paginate(repositoryName="ai")
    return {
        tag: image["imageDigest"]
        for page in pages
        for image in page["imageDetails"]
        for tag in image.get("imageTags", [])
    }


@pytest.mark.parametrize(("host", "address", "port", "tag"), SERVICES)
def test_the_bastion_sees_the_newest_well_formed_release(get_json, digests, host, address, port, tag):
    answer = get_json("bastion", f"http://{address}:{port}/health")
    assert answer == {"status": "ok", "tag": tag, "digest": digests[tag]}


@pytest.mark.parametrize(("host", "address", "port", "tag"), SERVICES)
def test_an_ai_host_is_no_client_of_the_other(ssh_from, host, address, port, tag):
    other = "ai-dev" if host == "ai-prod" else "ai-prod"
    assert ssh_from(other, f"curl --silent --max-time 5 http://{address}:{port}/health").returncode == 7


@pytest.mark.parametrize(("host", "address", "port", "tag"), SERVICES)
def test_the_service_can_read_its_secrets_and_they_are_no_environment(get_json, host, address, port, tag):
    answer = get_json("bastion", f"http://{address}:{port}/v1/settings")
    assert answer["readable"] == ["AI_API_TOKEN", "VLLM_API_KEY"]
    assert not set(answer["readable"]) & set(answer["environment"])


@pytest.mark.parametrize(("host", "address", "port", "tag"), SERVICES)
def test_the_service_answers_a_request(get_json, host, address, port, tag):
    assert get_json("bastion", f"http://{address}:{port}/v1/echo?text=hello") == {"text": "hello"}


def test_a_run_that_changes_nothing_reaches_a_host_twice_for_its_service():
    run = cost(AI_AGAIN, check=False)
    assert (run.returncode, run.changed) == (0, 0), run.output[-6000:]
    # HAProxy's package, and the release; three are promised at most.
    assert executions_for_services(run.output) == {"10.0.2.31": 2, "10.0.2.32": 2}
