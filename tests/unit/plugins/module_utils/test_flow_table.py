"""The table of security groups: what is wrong with one, and every flow that follows from the platform's own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import yaml
from jinja2.nativetypes import NativeEnvironment

from ansible_collections.nemo.platform.plugins.module_utils import flow_table
from ansible_collections.nemo.platform.plugins.module_utils.flow_table import Host, Sources, Table
from tests.unit.helpers import ROOT

HOSTS = (
    Host("bastion", ("aws_ec2", "bastion"), "10.0.1.10", "203.0.113.1"),
    Host("vllm", ("aws_ec2", "vllm"), "10.0.2.20", "203.0.113.2"),
    Host("prod", ("ai", "ai_prod", "aws_ec2"), "10.0.2.31", "203.0.113.3"),
    Host("dev", ("ai", "ai_dev", "aws_ec2"), "10.0.2.32"),
    Host("node", ("aws_ec2", "eks_nodes"), "10.0.3.11"),
)
NAMES = tuple(host.name for host in HOSTS)
API = ("registry:443", "registry-api:443", "ec2-api:443", "eks-api:443", "sts-api:443")
SERVICES = {
    "ai-prod": {"members": ["ai_prod"], "ports": [8000], "protocol": "http", "path": "/health"},
    "ai-dev": {"members": ["ai_dev"], "ports": [8001], "protocol": "http", "path": "/health"},
}


def platform() -> dict[str, Any]:
    """The real files of the inventory, with what stands in braces filled in."""
    folder = ROOT / "inventories/aws/group_vars/all"
    values: dict[str, Any] = {}
    for name in ("platform", "network"):
        values |= yaml.safe_load((folder / f"{name}.yml").read_text())
    values |= {"nemo_eks_endpoint": "k8s.example", "nemo_rds_endpoint": "db.example"}
    values |= {"nemo_node_ports": [30080], "nemo_node_https_ports": [443]}

    def filled(value: Any) -> Any:
        while isinstance(value, str) and "{{" in value:
            value = NativeEnvironment().from_string(value).render(values)
        if isinstance(value, dict):
            return {key: filled(entry) for key, entry in value.items()}
        return [filled(entry) for entry in value] if isinstance(value, list) else value

    return {"groups": filled(values["nemo_security_groups"]), "endpoints": SERVICES | filled(values["nemo_endpoints"])}


def table(**changes: Any) -> Table:
    given = {**platform(), "hosts": HOSTS, "inventory_groups": flow_table.GROUPS, "vpc_cidr": "10.0.0.0/16", **changes}
    return Table(**given)


def matrix(outside: str = "private", **changes: Any) -> dict[str, dict[str, list[str]]]:
    """source -> open and closed -> places."""
    found: dict[str, dict[str, list[str]]] = {}
    for flow in flow_table.flows(table(**changes), Sources(NAMES, outside)):
        places = found.setdefault(flow["source"], {"open": [], "closed": []})
        places[flow["expect"]].append(f"{flow['target']}:{flow['port']}")
    return found


def test_the_platforms_table_is_right() -> None:
    assert flow_table.problems(table()) == []


# Written down by hand from the platform's description; everything else is closed.
WANTED = {
    "outside": {"bastion:22"},
    "bastion": {"prod:8000", "dev:8001", "vllm:8002", "vllm:9836", "vllm:22", "prod:22", "dev:22", "node:22", "node:9094",
                "node:30080", "node:443", "cluster-api:443", *API},
    "vllm": {"node:9094", "node:30080", "node:443", *API},
    "prod": {"vllm:8002", "node:9094", "node:30080", "node:443", *API},
    "dev": {"vllm:8002", "node:9094", "node:30080", "node:443", *API},
    "node": {"prod:8000", "dev:8001", "vllm:8002", "vllm:9836", "cluster-api:443", "database:3306", *API},
}  # fmt: skip


@pytest.mark.parametrize("source", WANTED)
def test_what_must_be_open(source: str) -> None:
    assert set(matrix()[source]["open"]) == WANTED[source]


def test_all_else_is_closed_and_nothing_is_forgotten() -> None:
    own = {"bastion:22", "vllm:22", "prod:22", "dev:22", "node:22", "prod:8000", "dev:8001", "vllm:8002", "vllm:9836", "node:9094",
           "node:30080", "node:443"}  # fmt: skip
    everything = own | {"cluster-api:443", "database:3306", *API}
    for source, found in matrix().items():
        itself = {place for place in own if place.startswith(f"{source}:")}
        expected = own if source == "outside" else everything - itself
        # of the AI servers and the cluster's API the table says nothing
        left_out = {"cluster-api:443"} if source in ("vllm", "prod", "dev") else set()
        assert set(found["open"]) | set(found["closed"]) == expected - left_out
        assert not set(found["open"]) & set(found["closed"])
        assert len(found["open"] + found["closed"]) == len(expected - left_out)


@pytest.mark.parametrize(
    ("source", "place"),
    [
        ("outside", "prod:8000"), ("outside", "prod:22"), ("outside", "node:30080"), ("bastion", "database:3306"),
        ("prod", "database:3306"), ("prod", "dev:22"), ("prod", "dev:8001"), ("vllm", "prod:8000"), ("node", "prod:22"),
        ("dev", "bastion:22"), ("dev", "node:22"),
    ],
)  # fmt: skip
def test_closed(source: str, place: str) -> None:
    assert place in matrix()[source]["closed"]


def test_the_outside_asks_only_addresses_of_hosts() -> None:
    flows = flow_table.flows(table(), Sources(NAMES, "public"))
    assert {flow["probe"]["host"] for flow in flows if flow["source"] == "outside"} == {
        "203.0.113.1",
        "203.0.113.2",
        "203.0.113.3",
    }
    flows = flow_table.flows(table(), Sources(NAMES, "private"))
    assert {flow["probe"]["host"] for flow in flows if flow["source"] == "outside"} == {
        host.private_address for host in HOSTS
    }
    stranger = Host("stranger", ("ai",), "192.0.2.1")
    flows = flow_table.flows(table(hosts=(*HOSTS, stranger)), Sources((), "private"))
    assert "192.0.2.1" not in {flow["probe"]["host"] for flow in flows}
    assert flow_table.flows(table(), Sources(("prod",), "")) == [
        flow for flow in flow_table.flows(table(), Sources(NAMES, "private")) if flow["source"] == "prod"
    ]


def test_rules_out_count_too() -> None:
    changed = platform()
    changed["groups"]["bastion"]["out"] = [{"to": ["ai-servers"], "ports": [22]}]
    found = matrix(groups=changed["groups"])["bastion"]
    assert set(found["open"]) == {"vllm:22", "prod:22", "dev:22"}
    # the VPC does not reach as far as Amazon's own services
    changed["groups"]["bastion"]["out"] = [{"to": ["vpc"]}]
    assert not set(API) & set(matrix(groups=changed["groups"])["bastion"]["open"])


def test_a_rule_for_everyone_lets_the_outside_in_and_one_for_the_vpc_does_not() -> None:
    changed = platform()["groups"]
    changed["ai-servers"]["in"].append({"from": ["vpc"], "ports": [22]})
    assert "prod:22" in matrix(groups=changed)["dev"]["open"]
    assert "prod:22" in matrix(groups=changed)["outside"]["closed"]
    changed["ai-servers"]["in"].append({"from": ["any"], "ports": [22]})
    assert "prod:22" in matrix(groups=changed)["outside"]["open"]


def test_a_host_in_two_groups_has_the_rules_of_both() -> None:
    both = Host("both", ("ai", "eks_nodes"), "10.0.3.12")
    hosts = (*HOSTS, both)
    flows = flow_table.flows(table(hosts=hosts), Sources(("both", "prod"), ""))
    found = {(flow["source"], flow["target"], flow["port"]): flow["expect"] for flow in flows}
    assert found["both", "database", 3306] == "open"
    assert found["prod", "both", 9094] == "open"


def test_only_some_endpoints() -> None:
    flows = flow_table.flows(table(), Sources(NAMES, "private", ("kafka",)))
    assert {flow["endpoint"] for flow in flows} == {"kafka"}


def test_what_the_probe_is_told() -> None:
    flows = {flow["id"]: flow for flow in flow_table.flows(table(), Sources(NAMES, ""))}
    assert flows["node > database:3306 database"]["probe"] == {
        "id": "node > database:3306 database", "host": "db.example", "port": 3306, "protocol": "mysql", "expect": "open",
        "within": ["10.0.0.0/16"],
    }  # fmt: skip
    assert flows["bastion > registry:443 registry"]["probe"]["status"] == [200, 401]


@pytest.mark.parametrize(
    ("text", "ranges"),
    [([22, "8000-8002"], [(22, 22), (8000, 8002)]), ("65535", [(65535, 65535)]), ([" 1 "], [(1, 1)])],
)
def test_ports(text: Any, ranges: list[tuple[int, int]]) -> None:
    assert flow_table.ports_of(text) == ranges


CHANGES: list[tuple[str, Any, str, str]] = [
    ("groups", {}, "nemo_security_groups is empty or no dictionary", "members, in, out"),
    ("groups", "text", "nemo_security_groups is empty or no dictionary", ""),
    ("endpoints", None, "nemo_endpoints is empty or no dictionary", ""),
    ("vpc_cidr", "10.0.0.1/16", "nemo_vpc_cidr is '10.0.0.1/16'", "such as 10.0.0.0/16"),
    ("groups.outside", {}, "nemo_security_groups['outside'] has a name that is taken", "not outside, vpc, any"),
    ("groups.bastion", [], "nemo_security_groups['bastion'] is []", "a dictionary of members"),
    ("groups.bastion.inn", [], "nemo_security_groups['bastion'] has the unknown key 'inn'", "members, in, out"),
    ("groups.bastion.members", ["bastio"], "['bastion'].members names 'bastio', which is none of the inventory groups",
     "ai, ai_dev, ai_prod, bastion"),
    ("groups.bastion.members", "bastion", "['bastion'].members is 'bastion'", "a list of inventory groups"),
    ("groups.bastion.in", "all", "['bastion'].in is 'all'", "a list of rules with from and ports"),
    ("groups.bastion.in", [{"ports": [22]}], "['bastion'].in[0] is {'ports': [22]}", "from (required) and ports"),
    ("groups.bastion.in", [{"from": ["any"], "port": 22}], "['bastion'].in[0] is {", "from (required) and ports"),
    ("groups.bastion.in", [{"from": ["nodes"], "ports": [22]}], "in[0].from names 'nodes', which is none of the security groups",
     "eks-nodes"),
    ("groups.bastion.in", [{"from": ["any"], "ports": [0]}], "in[0].ports has 0", "1 to 65535"),
    ("groups.bastion.in", [{"from": ["any"], "ports": ["9-8"]}], "in[0].ports has '9-8'", "8000-8002"),
    ("groups.bastion.in", [{"from": ["any"], "ports": [True]}], "in[0].ports has True", ""),
    ("groups.bastion.out", [{"from": ["any"]}], "['bastion'].out[0] is {", "to (required) and ports"),
    ("groups.bastion.external", "yes", "['bastion'].external is 'yes'", "true, false"),
    ("groups.cluster.unspecified", ["ai"], "['cluster'].unspecified names 'ai'", "ai-servers"),
    ("endpoints.kafka", 9094, "nemo_endpoints['kafka'] is 9094", "a dictionary of members"),
    ("endpoints.kafka.port", 9094, "nemo_endpoints['kafka'] has the unknown key 'port'", "ports"),
    ("endpoints.kafka.host", "x", "nemo_endpoints['kafka'] has members and host, or neither", "one of them"),
    ("endpoints.kafka.members", ["brokers"], "['kafka'].members names 'brokers'", "eks_nodes"),
    ("endpoints.database.security_group", "rds", "['database'].security_group is 'rds'", "database"),
    ("endpoints.database.host", "https://db", "['database'].host is 'https://db'", "without https://"),
    ("endpoints.kafka.ports", 9094, "['kafka'].ports is 9094", "a list of ports"),
    ("endpoints.kafka.ports", ["9094-9096"], "['kafka'].ports is ['9094-9096']", "says nothing about what listens"),
    ("endpoints.kafka.ports", [70000], "['kafka'].ports has 70000", "1 to 65535"),
    ("endpoints.kafka.protocol", "udp", "['kafka'].protocol is 'udp'", "tcp, ssh, tls, http, https, mysql, kafka"),
    ("endpoints.vllm.path", "health", "['vllm'].path is 'health'", "begins with /"),
    ("endpoints.vllm.path", "/a b", "['vllm'].path is '/a b'", "no blanks"),
    ("endpoints.vllm.status", [20], "['vllm'].status is [20]", "100 to 599"),
    ("endpoints.vllm.status", 200, "['vllm'].status is 200", "a list"),
    ("endpoints.registry.days", -1, "['registry'].days is -1", "0 or more"),
    ("endpoints.registry.within", "10.0.0.0/16", "['registry'].within is '10.0.0.0/16'", "a list of networks"),
    ("endpoints.registry.within", ["10.0.0.0/33"], "['registry'].within is ['10.0.0.0/33']", "a list of networks"),
]  # fmt: skip


@pytest.mark.parametrize(("where", "value", "what", "do"), CHANGES, ids=[f"{one[0]}={one[1]}" for one in CHANGES])
def test_problems(where: str, value: Any, what: str, do: str) -> None:
    given: dict[str, Any] = {**platform(), "vpc_cidr": "10.0.0.0/16"}
    *path, last = where.split(".")
    entry = given
    for step in path:
        entry = entry[step]
    entry[last] = copy.deepcopy(value)
    found = flow_table.problems(table(**given))
    assert any(what in one.what and do in one.do for one in found), found


def test_a_host_without_a_group() -> None:
    found = flow_table.problems(table(hosts=(*HOSTS, Host("lost", ("aws_ec2",), "10.0.2.40"))))
    assert [one.what for one in found] == ["lost is a member of no security group"]
