"""Bad input and a bad surrounding: one line that says what is wrong and where, and the old release still answers."""

from __future__ import annotations

import json

import pytest

from tests.faults.conftest import LATER

DEV = ("--limit", "ai_dev")
NEWER_DEV = LATER[0]


@pytest.fixture(autouse=True)
def _the_old_release_answers(health):
    before = health("ai-dev")
    assert '"status":"ok"' in before
    yield
    assert health("ai-dev") == before


@pytest.mark.sample
def test_a_broken_newest_image(site, image, health):
    image(NEWER_DEV, "crash")
    run = site(*DEV)
    assert run.returncode != 0
    line = run.line(NEWER_DEV)
    assert "ai-dev" in line
    run.line("cannot load the model index")
    again = site(*DEV)
    assert (again.returncode, again.changed) == (0, 0), again.output[-6000:]
    assert f"{NEWER_DEV} is not tried again" in " ".join(again.output.split())


def test_an_unhealthy_newest_image(site, image):
    image(NEWER_DEV, "unhealthy")
    run = site(*DEV)
    assert run.returncode != 0
    run.line(NEWER_DEV)
    run.line("503")


def test_an_unreachable_registry(site, image, on):
    image(NEWER_DEV, "healthy")
    on("aws", "systemctl stop nemo-lab-registry")
    try:
        run = site(*DEV)
    finally:
        on("aws", "systemctl start nemo-lab-registry")
    assert run.returncode != 0
    run.line("dkr.ecr.ap-northeast-2.amazonaws.com.*(cannot be reached|unreachable|does not answer)")


def test_an_expired_token(site, image, on):
    image(NEWER_DEV, "healthy")
    on("aws", "touch /run/nemo-lab/expired-token")
    try:
        run = site(*DEV)
    finally:
        on("aws", "rm /run/nemo-lab/expired-token")
    assert run.returncode != 0
    run.line("(?i)expired")


@pytest.mark.parametrize(
    ("change", "messages"),
    [
        pytest.param(
            {"tag": "prod-latest"},
            [r"ai_api_services\['ai-dev'\]\.tag is 'prod-latest'; allowed: a tag by the rule dev-YYYYMMDD-HHMM"],
            id="a tag that does not exist or fit",
        ),
        pytest.param(
            {"port": 80010},
            [r"^1\. nemo_services: ai-dev has port 80010 -> allowed: 1 to 65535$"],
            id="a wrong port",
        ),
        pytest.param(
            {"memory": "3m"},
            [r"ai_api_services\['ai-dev'\]\.memory is '3m'; allowed: 64m or more"],
            id="a memory limit below the minimum",
        ),
        pytest.param(
            {"secrets": {"AI_API_TOKEN": "{{ vault_nowhere }}"}},
            ["the secret AI_API_TOKEN of ai-dev has no value"],
            id="a missing secret",
        ),
        pytest.param(
            {"tag_prefix": "staging"}, ["no tag by the rule staging-YYYYMMDD-HHMM"], id="a rule that no tag matches"
        ),
    ],
)
def test_a_wrong_setting(site, tmp_path, change, messages):
    entry = {
        "group": "ai_dev", "port": 8001, "repository": "ai", "tag_prefix": "dev", "memory": "1g",
        "health_path": "/health", "environment": {}, "secrets": {"AI_API_TOKEN": "lab-dev-token"},
    }  # fmt: skip
    prod = {**entry, "group": "ai_prod", "port": 8000, "tag_prefix": "prod"}
    values = tmp_path / "services.json"
    values.write_text(json.dumps({"nemo_services": {"ai-prod": prod, "ai-dev": {**entry, **change}}}))
    run = site(*DEV, "-e", f"@{values}")
    assert run.returncode != 0
    for message in messages:
        run.line(message)
    run.line(r"(failed|fatal): \[ai-dev-10\.0\.2\.32")
    assert run.changed == 0


def test_a_full_disk(site, image, on):
    image(NEWER_DEV, "healthy", padding=16)
    on("ai-dev", "mount -t tmpfs -o size=4m tmpfs /var/lib/docker/tmp")
    try:
        run = site(*DEV)
    finally:
        on("ai-dev", "umount /var/lib/docker/tmp")
    assert run.returncode != 0
    run.line("(?i)no space left")
