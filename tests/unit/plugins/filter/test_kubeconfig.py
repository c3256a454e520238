"""What the kubeconfig holds, and what it refuses to."""

from __future__ import annotations

from typing import Any

import pytest

from ansible_collections.nemo.platform.plugins.filter.kubeconfig import (
    kubeconfig,
    kubeconfig_endpoints,
    kubeconfig_problems,
)

DESCRIBED = {"endpoint": "https://ABC.gr7.eks.amazonaws.com", "certificate_authority": "Q0E="}
REGION = "ap-northeast-2"
ROLE = "arn:aws:iam::084375578827:role/nemo-operators"


def test_one_cluster_by_the_instances_role() -> None:
    made = kubeconfig([{"name": "nemo_EKS_kluster", "context": "nemo"}], [DESCRIBED], REGION)
    assert made["current-context"] == "nemo"
    server = {"server": "https://ABC.gr7.eks.amazonaws.com", "certificate-authority-data": "Q0E="}
    assert made["clusters"] == [{"name": "nemo", "cluster": server}]
    assert made["contexts"] == [{"name": "nemo", "context": {"cluster": "nemo", "user": "nemo"}}]
    credentials = made["users"][0]["user"]["exec"]
    assert credentials["apiVersion"] == "client.authentication.k8s.io/v1beta1"
    assert credentials["command"] == "/usr/local/bin/aws"
    assert credentials["interactiveMode"] == "Never"
    assert credentials["args"] == [
        "--region", REGION, "eks", "get-token", "--cluster-name", "nemo_EKS_kluster", "--output", "json",
    ]  # fmt: skip
    assert "env" not in credentials


def test_two_with_everything() -> None:
    two = {"name": "two", "namespace": "kafka", "role_arn": ROLE, "endpoint": "https://10.0.3.10"}
    environment = {"AWS_CA_BUNDLE": "/etc/ca.pem", "AWS_ENDPOINT_URL": ""}
    made = kubeconfig([{"name": "one"}, two], [DESCRIBED, DESCRIBED], REGION, "/opt/aws", environment, "two")
    assert made["current-context"] == "two"
    assert [entry["name"] for entry in made["contexts"]] == ["one", "two"]
    assert made["contexts"][1]["context"]["namespace"] == "kafka"
    server = made["clusters"][1]["cluster"]
    assert (server["server"], server["tls-server-name"]) == ("https://10.0.3.10", "abc.gr7.eks.amazonaws.com")
    credentials = made["users"][1]["user"]["exec"]
    assert credentials["args"][-2:] == ["--role-arn", ROLE]
    assert credentials["command"] == "/opt/aws"
    assert credentials["env"] == [{"name": "AWS_CA_BUNDLE", "value": "/etc/ca.pem"}]
    assert "--role-arn" not in made["users"][0]["user"]["exec"]["args"]


def test_a_description_too_few_is_no_kubeconfig() -> None:
    with pytest.raises(ValueError, match="zip"):
        kubeconfig([{"name": "one"}, {"name": "two"}], [DESCRIBED], REGION)


@pytest.mark.parametrize(
    ("cluster", "says"),
    [
        ({}, "x[0].name is missing; allowed: the name of an EKS cluster"),
        ({"name": "a b"}, "x[0].name is 'a b'; allowed: the name of an EKS cluster"),
        ({"name": "a", "context": "a b"}, "x[0].context is 'a b'; allowed: letters, digits and . _ @ -"),
        ({"name": "a", "namespace": "Kube"}, "x[0].namespace is 'Kube'; allowed: lower-case letters"),
        ({"name": "a", "role_arn": "nemo"}, "x[0].role_arn is 'nemo'; allowed: an ARN such as"),
        ({"name": "a", "endpoint": "10.0.3.10"}, "x[0].endpoint is '10.0.3.10'; allowed: an address such as https://"),
    ],
)
def test_what_is_refused(cluster: dict[str, Any], says: str) -> None:
    (line, *rest) = kubeconfig_problems([cluster], "x")
    assert line.startswith(says)
    assert not rest


def test_contexts_are_there_once_and_the_default_is_one_of_them() -> None:
    assert kubeconfig_problems([{"name": "a"}, {"name": "b", "context": "a"}], "x", "c") == [
        "x has the context 'a' 2 times; allowed: each context once",
        "the default context is 'c'; allowed: a, a",
    ]
    assert kubeconfig_problems([], "x") == ["x is empty; allowed: one cluster or more"]
    assert (
        kubeconfig_problems([{"name": "a", "role_arn": ROLE, "namespace": "kafka", "endpoint": "https://a:6443"}], "x")
        == []
    )


def test_endpoints_to_look_at_are_there_once() -> None:
    described = {**DESCRIBED, "private_access": False}
    clusters = [
        {"name": "a"},
        {"name": "a", "context": "b"},
        {"name": "a", "context": "c", "endpoint": "https://10.0.3.10"},
    ]
    assert kubeconfig_endpoints(clusters, [described] * 3) == [
        {"url": DESCRIBED["endpoint"], "private": False},
        {"url": "https://10.0.3.10", "private": True},
    ]
    assert kubeconfig_endpoints([{"name": "a"}], [{**DESCRIBED, "private_access": True}])[0]["private"] is True
