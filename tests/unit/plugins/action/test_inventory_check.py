"""What STS and EC2 say when the inventory is empty. The play itself is in tests/unit/test_inventory.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from ansible_collections.nemo.platform.plugins.action.inventory_check import ask_aws, read_source
from ansible_collections.nemo.platform.plugins.module_utils.preflight import Account
from tests.unit.conftest import REGION, Aws
from tests.unit.helpers import ROOT

PROJECT = {"Project": "nemo"}


def ask(url: str, region: str = REGION, **keys: str) -> Account:
    return ask_aws({"endpoint_url": url, **keys}, region, PROJECT)


def test_states_of_the_project_and_others(aws: Aws) -> None:
    aws.instance("10.0.2.31", state="stopped", Project="nemo")
    aws.instance("10.0.2.32", Project="nemo")
    aws.instance("10.0.2.33", Project="other")
    account = ask(aws.url)
    assert account.error == ""
    assert account.identity.startswith("arn:aws:")
    assert account.project_states == {"stopped": 1, "running": 1}
    assert account.other_instances == 1


def test_other_region_is_empty(aws: Aws, monkeypatch: pytest.MonkeyPatch) -> None:
    aws.instance("10.0.2.31", Project="nemo")
    monkeypatch.setenv("AWS_REGION", REGION)
    account = ask(aws.url, "eu-west-1")
    assert account.project_states == {}
    assert (account.region, account.environment_region) == ("eu-west-1", REGION)


def test_expired_token(expired_url: str, no_aws: None) -> None:
    account = ask(expired_url, access_key="x", secret_key="x")
    assert "token has expired" in account.error
    assert not account.no_credentials


def test_no_credentials(no_aws: None) -> None:
    account = ask("http://127.0.0.1:1")
    assert account.no_credentials
    assert "AWS_PROFILE" in account.error


def test_unknown_profile(no_aws: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    assert "correct AWS_PROFILE" in ask("http://127.0.0.1:1").error


def test_nothing_listens(no_aws: None) -> None:
    assert "http://127.0.0.1:1 cannot be reached" in ask("http://127.0.0.1:1", access_key="x", secret_key="x").error


def test_region_that_is_none(no_aws: None) -> None:
    assert "correct nemo_region" in ask("", "Seoul!", access_key="x", secret_key="x").error


@pytest.mark.parametrize("name", ["aws", "lab"])
def test_region_and_tag_come_from_the_inventory_file(name: str) -> None:
    folder = ROOT / "inventories" / name
    assert read_source(str(folder)) == read_source(str(folder / "aws_ec2.yml")) == (REGION, PROJECT)


def test_other_sources_say_nothing(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("[web]\n")
    assert read_source(str(tmp_path / "hosts")) == ("", {})
    assert read_source("localhost,") == ("", {})
