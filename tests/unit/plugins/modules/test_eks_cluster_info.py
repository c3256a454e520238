"""Descriptions of clusters, from an EKS of our own and from a stub where moto knows less."""

from __future__ import annotations

import datetime
from typing import Any

import pytest
from botocore.stub import Stubber

from ansible_collections.nemo.platform.plugins.modules import eks_cluster_info as module
from tests.unit.conftest import REGION, Aws

ROLE = "arn:aws:iam::084375578827:role/eks"


def parameters(aws: Aws | None = None, *clusters: str, **changes: Any) -> dict[str, Any]:
    given = {"profile": None, "session_token": None, "access_key": "test", "secret_key": "test"}
    endpoint = aws.url if aws else "http://127.0.0.1:1"
    return {**given, "clusters": list(clusters) or ["nemo"], "region": REGION, "endpoint_url": endpoint, **changes}


def make(aws: Aws, *names: str, **network: Any) -> None:
    for name in names:
        aws.client("eks").create_cluster(
            name=name, version="1.33", roleArn=ROLE, resourcesVpcConfig={"subnetIds": ["subnet-1"], **network}
        )


def cluster(**changes: Any) -> dict[str, Any]:
    whole = {
        "name": "nemo", "arn": "arn:nemo", "version": "1.33", "status": "ACTIVE", "platformVersion": "eks.1",
        "endpoint": "https://x.eks.amazonaws.com", "certificateAuthority": {"data": "Q0E="},
    }  # fmt: skip
    return {**whole, **changes}


def answer(monkeypatch: pytest.MonkeyPatch, *responses: tuple[str, dict[str, Any] | str]) -> Stubber:
    """An EKS that gives these answers in this order; text stands for an error of that code."""
    client = Aws("http://127.0.0.1:1").client("eks")
    stub = Stubber(client)
    for method, response in responses:
        if isinstance(response, str):
            stub.add_client_error(method, response, "no")
        else:
            stub.add_response(method, response)
    stub.activate()
    monkeypatch.setattr(module, "connect", lambda params: client)
    return stub


def test_several_in_the_order_asked_for(aws: Aws) -> None:
    make(aws, "one", "two")
    found = module.run(parameters(aws, "two", "one"))["clusters"]
    assert [entry["name"] for entry in found] == ["two", "one"]
    assert found[0]["endpoint"].startswith("https://")
    assert found[0]["version"] == "1.33"
    assert found[0]["arn"] == f"arn:aws:eks:{REGION}:084375578827:cluster/two"
    assert found[0]["certificate_authority"]


def test_private_endpoint(aws: Aws) -> None:
    make(aws, "nemo", endpointPublicAccess=False, endpointPrivateAccess=True)
    (found,) = module.run(parameters(aws))["clusters"]
    assert (found["public_access"], found["private_access"], found["public_access_cidrs"]) == (False, True, [])


def test_what_is_left_out_is_what_eks_does_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    answer(
        monkeypatch,
        ("describe_cluster", {"cluster": cluster()}),
        ("describe_cluster_versions", "AccessDeniedException"),
    )
    (found,) = module.run(parameters())["clusters"]
    assert (found["public_access"], found["private_access"], found["public_access_cidrs"]) == (
        True,
        False,
        ["0.0.0.0/0"],
    )
    assert (found["standard_support_ends"], found["extended_support_ends"]) == ("", "")


def test_ends_of_support(monkeypatch: pytest.MonkeyPatch) -> None:
    version = {
        "clusterVersion": "1.33",
        "endOfStandardSupportDate": datetime.datetime(2026, 7, 29, tzinfo=datetime.UTC),
        "endOfExtendedSupportDate": datetime.datetime(2027, 7, 29, tzinfo=datetime.UTC),
    }
    stub = answer(
        monkeypatch,
        ("describe_cluster", {"cluster": cluster()}),
        ("describe_cluster_versions", {"clusterVersions": [version]}),
    )
    (found,) = module.run(parameters())["clusters"]
    assert (found["standard_support_ends"], found["extended_support_ends"]) == ("2026-07-29", "2027-07-29")
    stub.assert_no_pending_responses()


def test_no_such_cluster_names_those_that_are(aws: Aws) -> None:
    make(aws, "nemo_EKS_kluster", "other")
    says = rf"{REGION} has no EKS cluster 'nemo_EKS_cluster'; there are nemo_EKS_kluster, other; did you mean nemo_EKS_kluster\?$"
    with pytest.raises(module.ClusterError, match=says):
        module.run(parameters(aws, "nemo_EKS_cluster"))


def test_none_at_all_asks_for_region_and_account(aws: Aws) -> None:
    with pytest.raises(module.ClusterError, match="there is none: is this the right region and account"):
        module.run(parameters(aws))


def test_no_such_cluster_and_no_right_to_list(monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, ("describe_cluster", "ResourceNotFoundException"), ("list_clusters", "AccessDeniedException"))
    with pytest.raises(module.ClusterError, match="has no EKS cluster 'nemo'; these credentials may not list"):
        module.run(parameters())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"status": "CREATING", "endpoint": ""}, "'nemo' is CREATING: .*aws eks wait cluster-active --name nemo"),
        ({"status": "DELETING"}, "'nemo' is DELETING: take it out of the inventory"),
        (
            {"status": "FAILED", "health": {"issues": [{"code": "AccessDenied", "message": "no role"}]}},
            r"'nemo' is FAILED \(AccessDenied: no role\): look at its health",
        ),
        ({"certificateAuthority": {}}, "without endpoint or certificate authority"),
    ],
)
def test_a_cluster_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], says: str) -> None:
    answer(monkeypatch, ("describe_cluster", {"cluster": cluster(**changes)}))
    with pytest.raises(module.ClusterError, match=says) as error:
        module.run(parameters())
    assert "\n" not in str(error.value)


def test_an_updating_cluster_is_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    answer(
        monkeypatch,
        ("describe_cluster", {"cluster": cluster(status="UPDATING")}),
        ("describe_cluster_versions", {"clusterVersions": []}),
    )
    assert module.run(parameters())["clusters"][0]["status"] == "UPDATING"


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("ExpiredTokenException", "token has expired: log in again"),
        ("AccessDeniedException", "may not do this"),
        ("UnrecognizedClientException", "does not accept these credentials"),
    ],
)
def test_credentials_that_are_refused(monkeypatch: pytest.MonkeyPatch, code: str, says: str) -> None:
    answer(monkeypatch, ("describe_cluster", code))
    with pytest.raises(module.ClusterError, match=says):
        module.run(parameters())


def test_no_credentials(no_aws: None) -> None:
    with pytest.raises(module.ClusterError, match=r"no AWS credentials: .*AWS_PROFILE"):
        module.run(parameters(access_key=None, secret_key=None))


def test_unreachable(no_aws: None) -> None:
    with pytest.raises(module.ClusterError, match=r"http://127.0.0.1:1 cannot be reached"):
        module.run(parameters())


def test_wrong_region(no_aws: None) -> None:
    with pytest.raises(module.ClusterError, match="correct nemo_region"):
        module.run(parameters(region="Seoul!"))
