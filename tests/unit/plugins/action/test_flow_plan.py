"""Endpoints that AWS is asked for, and the kind of address that the outside uses."""

from __future__ import annotations

from typing import Any

import pytest

from ansible_collections.nemo.platform.plugins.action import flow_plan
from ansible_collections.nemo.platform.plugins.module_utils.flow_table import Host
from tests.unit.conftest import REGION, Aws

VPC = "10.0.0.0/16"


def connection(aws: Aws | None = None, url: str = "http://127.0.0.1:1") -> dict[str, str]:
    return {"region": REGION, "endpoint_url": aws.url if aws else url, "access_key": "test", "secret_key": "test"}


def test_cluster(aws: Aws) -> None:
    aws.client("eks").create_cluster(
        name="k", version="1.33", roleArn="arn:aws:iam::084375578827:role/k",
        resourcesVpcConfig={"subnetIds": [], "endpointPrivateAccess": True},
    )  # fmt: skip
    found = flow_plan.ask_eks(connection(aws), "k", VPC)
    assert found["host"].endswith(".eks.amazonaws.com")
    assert (found["ports"], found["within"]) == ([443], [VPC])
    assert found["certificate_authority"]


def test_public_cluster_may_be_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = {"endpoint": "https://K.example:8443", "certificate_authority": "x", "private_access": False}
    monkeypatch.setattr(flow_plan.eks_cluster_info, "run", lambda _: {"clusters": [answer]})
    assert flow_plan.ask_eks({}, "k", VPC) == {
        "host": "k.example", "ports": [8443], "certificate_authority": "x", "within": [],
    }  # fmt: skip


def test_database(aws: Aws) -> None:
    aws.client("rds").create_db_instance(
        DBInstanceIdentifier="nemo-db-instance", DBInstanceClass="db.t3.micro", Engine="mysql", AllocatedStorage=20,
        MasterUsername="prod", MasterUserPassword="worthless",
    )  # fmt: skip
    found = flow_plan.ask_rds(connection(aws), "nemo-db-instance")
    assert found["host"].startswith("nemo-db-instance.")
    assert found["ports"] == [3306]


@pytest.mark.parametrize(
    ("ask", "says"),
    [
        (lambda to: flow_plan.ask_rds(to, "x"), f"{REGION} has no database instance 'x'"),
        (lambda to: flow_plan.ask_eks(to, "x", VPC), f"{REGION} has no EKS cluster 'x'"),
    ],
)
def test_absent(aws: Aws, ask: Any, says: str) -> None:
    with pytest.raises(flow_plan.Unknown, match=says):
        ask(connection(aws))


def test_unreachable_and_expired(expired_url: str, no_aws: None) -> None:
    with pytest.raises(flow_plan.Unknown, match=r"http://127.0.0.1:1 cannot be reached"):
        flow_plan.ask_rds(connection(), "x")
    with pytest.raises(flow_plan.Unknown, match="token has expired"):
        flow_plan.ask_rds(connection(url=expired_url), "x")


def endpoints(given: dict[str, Any], only: list[str] | None = None) -> tuple[dict[str, Any], dict[str, str]]:
    arguments = {"aws_connection": {}, "vpc_cidr": VPC, "only": only or []}
    return flow_plan.ActionModule._endpoints(given, arguments)


def test_what_the_table_says_wins_over_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"host": "k.example", "ports": [443], "certificate_authority": "x", "within": [VPC]}
    monkeypatch.setattr(flow_plan, "ask_eks", lambda *_: told)
    given = {"k": {"host": "", "eks_cluster": "k", "ports": [6443], "within": []}, "r": {"host": "r.example"}}
    found, unknown = endpoints(given)
    assert unknown == {}
    assert found["k"] == {**told, "eks_cluster": "k", "ports": [6443]}
    assert found["r"] == {"host": "r.example"}


def test_unknown_addresses_are_told_and_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise flow_plan.Unknown("may not ask")

    monkeypatch.setattr(flow_plan, "ask_rds", fails)
    given = {"db": {"host": "", "rds_instance": "x"}, "lost": {"host": ""}}
    found, unknown = endpoints(given)
    assert found == {}
    assert unknown["db"] == "may not ask"
    assert "neither eks_cluster nor rds_instance" in unknown["lost"]
    # who looks at something else is not told, and AWS is not asked
    assert endpoints(given, ["kafka"]) == ({}, {})


@pytest.mark.parametrize(
    ("public", "bastion", "kind"),
    [("203.0.113.1", "b", "public"), ("", "b", "private"), ("10.0.1.10", "b", "private"), ("", "gone", "")],
)
def test_outside(public: str, bastion: str, kind: str) -> None:
    hosts = [Host("b", ("bastion",), "10.0.1.10", public)]
    assert flow_plan.ActionModule._outside(hosts, bastion, VPC) == kind
