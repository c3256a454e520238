"""Every finding of the preflight, one at a time, on an inventory that is otherwise right."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from ansible_collections.nemo.platform.plugins.module_utils.preflight import (
    REMOVED_VARIABLES,
    REQUIRED_VARIABLES,
    SERVICE_KEYS,
    Account,
    Host,
    Inventory,
    problems,
    report,
    warnings,
)


def service(group: str, port: int, prefix: str) -> dict[str, Any]:
    return {
        "group": group, "port": port, "repository": "ai", "tag_prefix": prefix, "memory": "1g", "health_path": "/health",
    }  # fmt: skip


def host(name: str, role: str, address: str, *services: str) -> Host:
    return Host(f"{name}-{address}", role, services, name, f"i-{name}", "ap-northeast-2", address)


BASTION = host("bastion", "bastion", "10.0.1.10")
VLLM = host("vllm", "vllm", "10.0.2.20")
PROD = host("ai-prod", "ai", "10.0.2.31", "ai-prod")
DEV = host("ai-dev", "ai", "10.0.2.32", "ai-dev")
GOOD = Inventory(
    hosts=(BASTION, VLLM, PROD, DEV),
    groups={"bastion": [BASTION.name], "vllm": [VLLM.name], "ai": [PROD.name, DEV.name]},
    variables={
        **dict.fromkeys(REQUIRED_VARIABLES, "set"),
        "nemo_region": "ap-northeast-2",
        "nemo_services": True,
        "nemo_required_groups": ["bastion", "vllm", "ai"],
    },
    services={"ai-prod": service("ai_prod", 8000, "prod"), "ai-dev": service("ai_dev", 8001, "dev")},
)


def hosts(*changed: Host) -> Inventory:
    return replace(GOOD, hosts=changed)


def services(**changed: Any) -> Inventory:
    return replace(GOOD, services={**GOOD.services, "ai-dev": {**GOOD.services["ai-dev"], **changed}})


def variables(**changed: Any) -> Inventory:
    return replace(GOOD, variables={**GOOD.variables, **changed})


def empty(**account: Any) -> Inventory:
    return replace(GOOD, hosts=(), groups={}, account=Account(**{"region": "ap-northeast-2", **account}))


TWIN = replace(BASTION, name="bastion-10.0.1.11", instance_id="i-other", private_address="10.0.1.11")
SECOND = replace(PROD, name="ai-prod2-10.0.2.33", tag_name="ai-prod2", private_address="10.0.2.33", instance_id="i-2")
BOTH = replace(PROD, services=("ai-prod", "ai-dev"))


@pytest.mark.parametrize(
    ("inventory", "what", "do"),
    [
        (empty(error="no AWS credentials: log in", no_credentials=True), "no AWS credentials", "make lab"),
        (empty(error="the AWS token has expired: log in again"), "token has expired", "make lab"),
        (empty(error="x cannot be reached", endpoint_url="http://x"), "cannot be reached", "make lab starts it"),
        (
            empty(project_states={"stopped": 4}),
            "no instance of the project is running in ap-northeast-2: 4 stopped",
            "start",
        ),
        (empty(project_states={"running": 1}), "has instances of the project: 1 running", "--flush-cache"),
        (
            empty(other_instances=3, identity="arn:x"),
            "3 other instances are there (asked as arn:x)",
            "wrong region or account",
        ),
        (replace(GOOD, hosts=()), "no running instance", "--flush-cache"),
        (replace(GOOD, groups={**GOOD.groups, "vllm": []}), "the group vllm is empty", "correct its tags"),
        (hosts(BASTION, VLLM, PROD), "the service ai-dev has no host", "Services=ai-dev"),
        (
            hosts(BASTION, VLLM, PROD, DEV, SECOND),
            "2 hosts claim ai-prod on port 8000",
            "nemo_services['ai-prod'].hosts",
        ),
        (hosts(BASTION, VLLM, PROD, DEV, TWIN), "2 instances carry the Name bastion", "nemo_shared_names"),
        (hosts(BASTION, VLLM, PROD, replace(DEV, private_address="10.0.2.31")), "one private address", "vpc-id"),
        (
            hosts(replace(BASTION, role="bastoin"), VLLM, PROD, DEV),
            "Role=bastoin",
            "allowed: bastion, vllm, ai, eks-node",
        ),
        (hosts(replace(BASTION, role=""), VLLM, PROD, DEV), "has no tag Role", "allowed"),
        (
            hosts(BASTION, VLLM, PROD, replace(DEV, services=("ai-dev", "ai-test"))),
            "ai-test is no service",
            "ai-dev, ai-prod",
        ),
        (hosts(BASTION, VLLM, PROD, replace(DEV, services=("ai-dev", "ai-dev"))), "ai-dev twice", "once"),
        (hosts(BASTION, VLLM, PROD, DEV, replace(SECOND, services=())), "no tag Services", "ai-dev, ai-prod"),
        (hosts(BASTION, replace(VLLM, services=("ai-dev",)), PROD), "Role=vllm, which runs none", "Role=ai"),
        (
            hosts(replace(BASTION, tag_name="the bastion"), VLLM, PROD, DEV),
            "--limit cannot match: 'the bastion'",
            "letters",
        ),
        (replace(services(port=8000), hosts=(BASTION, VLLM, BOTH)), "both on port 8000", "a port of its own"),
        (services(port=70000), "ai-dev has port 70000", "1 to 65535"),
        (services(port="http"), "ai-dev has port 'http'", "1 to 65535"),
        (services(port=True), "ai-dev has port True", "1 to 65535"),
        (services(memory=""), "ai-dev has no memory", "services.yml"),
        (variables(nemo_vpc_cidr=None), "variable nemo_vpc_cidr is missing", "group_vars"),
        (
            replace(GOOD, missing_secrets=[("ai-dev", "AI_API_TOKEN", "vault_x")]),
            "the secret AI_API_TOKEN of ai-dev has no value",
            "set vault_x",
        ),
        (variables(ansible_ssh_user="root"), "removed variable ansible_ssh_user is set", "nemo_ssh_user"),
        (
            hosts(BASTION, VLLM, PROD, replace(DEV, variables={"ansible_ssh_host": True})),
            "removed variable ansible_ssh_host is set: ai-dev-10.0.2.32",
            "nemo_private_address",
        ),
        (
            hosts(BASTION, VLLM, PROD, replace(DEV, region="us-east-1")),
            "wrong region: nemo_region is ap-northeast-2",
            "the same",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_one_problem(inventory: Inventory, what: str, do: str) -> None:
    found = problems(inventory)
    assert [problem.what for problem in found if what in problem.what] == [problem.what for problem in found]
    assert len(found) == 1
    assert do in found[0].do


def test_good_inventory() -> None:
    assert problems(GOOD) == []
    assert problems(replace(GOOD, hosts=(BASTION, VLLM, BOTH))) == []


def test_meant_to_be_so() -> None:
    node = host("node", "eks-node", "10.0.3.5")
    nodes = (node, replace(node, name="node-10.0.3.6", private_address="10.0.3.6"))
    assert problems(replace(GOOD, hosts=(*GOOD.hosts, *nodes))) == []
    two = replace(variables(nemo_shared_names=["bastion"]), hosts=(*GOOD.hosts, TWIN))
    assert problems(two) == []
    many = {**GOOD.services, "ai-prod": {**GOOD.services["ai-prod"], "hosts": 2}}
    assert problems(replace(GOOD, services=many, hosts=(*GOOD.hosts, SECOND))) == []


def test_other_region_in_the_environment() -> None:
    found = problems(empty(environment_region="us-east-1"))
    assert any("AWS_REGION is us-east-1, the inventory looks at ap-northeast-2" in problem.what for problem in found)


def test_all_at_once_in_one_list() -> None:
    inventory = replace(hosts(TWIN, BASTION, DEV), groups={}, missing_secrets=[("ai-dev", "S", "")])
    text = report(problems(inventory), ["inventories/aws"])
    for part in ("the secret S", "the group vllm", "carry the Name bastion", "the service ai-prod has no host"):
        assert part in text
    lines = text.splitlines()
    assert "problems in the inventory inventories/aws; nothing was connected to" in lines[0]
    assert all(line.startswith(f"{number}. ") and " -> " in line for number, line in enumerate(lines[1:], 1))


def test_every_removed_variable_says_what_took_its_place() -> None:
    assert REMOVED_VARIABLES
    assert all(REMOVED_VARIABLES.values())


@pytest.mark.parametrize("value", [5, 1.5, True, "²", "two", ["a"], {"a": 1}], ids=repr)
@pytest.mark.parametrize("key", [*SERVICE_KEYS, "hosts"])
def test_wrong_type_in_the_catalogue_is_no_exception(key: str, value: Any) -> None:
    assert "\n" not in "".join(problem.what + problem.do for problem in problems(services(**{key: value})))


@pytest.mark.parametrize(
    ("inventory", "what"),
    [
        (services(port="²"), "nemo_services: ai-dev has port '²'"),
        (services(hosts="two"), "nemo_services: ai-dev has hosts 'two'"),
        (services(hosts=-1), "nemo_services: ai-dev has hosts -1"),
        (services(hosts=True), "nemo_services: ai-dev has hosts True"),
        (services(follow="false"), "nemo_services: ai-dev has follow 'false'"),
        (services(secrets="hush-hush"), "nemo_services: ai-dev has secrets of type str"),
        (replace(GOOD, services={**GOOD.services, "ai-dev": None}), "nemo_services: ai-dev is empty"),
        (replace(GOOD, services={**GOOD.services, "ai-dev": "text"}), "nemo_services: ai-dev is of type str"),
        (variables(nemo_services="text"), "nemo_services is of type str"),
        (variables(nemo_required_groups="vllm"), "nemo_required_groups is 'vllm'"),
        (variables(nemo_required_groups=5), "nemo_required_groups is 5"),
        (variables(nemo_shared_names=[["a"]]), "nemo_shared_names is [['a']]"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_type_is_one_problem(inventory: Inventory, what: str) -> None:
    found = problems(inventory)
    assert [problem.what for problem in found] == [what]
    assert "hush-hush" not in str(found)


@pytest.mark.parametrize(
    ("name", "value", "what", "do"),
    [
        (
            "nemo_bastion_system",
            "amazon-linux-2",
            "end of support (30 June 2026)",
            "nemo_bastion_system: amazon-linux-2023",
        ),
        ("nemo_eks_version", "1.33", "standard support (29 July 2026", "nemo_eks_version"),
        ("nemo_eks_version", 1.33, "standard support (29 July 2026", "nemo_eks_version"),
    ],
)
def test_past_its_date_is_a_warning_of_one_line(name: str, value: Any, what: str, do: str) -> None:
    assert problems(variables(**{name: value})) == []
    (warning,) = warnings(variables(**{name: value}))
    assert what in warning.what
    assert do in warning.do
    assert "\n" not in str(warning)
    assert name in str(warning)


@pytest.mark.parametrize("system", ["amazon-linux-2023", "debian", "ubuntu"])
def test_supported_systems_and_clusters_are_passed_over(system: str) -> None:
    inventory = variables(nemo_bastion_system=system, nemo_eks_version="1.34")
    assert (problems(inventory), warnings(inventory)) == ([], [])
    assert (problems(GOOD), warnings(GOOD)) == ([], [])


@pytest.mark.parametrize("value", ["amazon-linux", "Debian", "", 2, True, ["debian"], {"a": 1}], ids=repr)
def test_unknown_system(value: Any) -> None:
    (found,) = problems(variables(nemo_bastion_system=value))
    assert found.what == f"nemo_bastion_system is {value!r}"
    assert found.do == "allowed: amazon-linux-2, amazon-linux-2023, debian, ubuntu"


@pytest.mark.parametrize("value", ["1", "v1.33", "1.33.4", "latest", "", True, ["1.33"]], ids=repr)
def test_unknown_cluster_version(value: Any) -> None:
    (found,) = problems(variables(nemo_eks_version=value))
    assert found.what == f"nemo_eks_version is {value!r}"
    assert "1.33" in found.do
