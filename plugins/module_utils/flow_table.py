# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The platform's table of security groups, and every flow that follows from it. Pure functions: data in, data out."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ansible_collections.nemo.platform.plugins.module_utils.flow_probe import PROTOCOLS

GROUP_KEYS = ("members", "in", "out", "external", "unspecified")
RULE_KEYS = {"in": ("from", "ports"), "out": ("to", "ports")}
ENDPOINT_KEYS = (
    "members", "host", "security_group", "ports", "protocol", "path", "status", "days", "within", "server_name",
    "certificate_authority", "eks_cluster", "rds_instance",
)  # fmt: skip
# Groups of the inventory, which has none of them that is empty.
GROUPS = ("bastion", "vllm", "ai", "ai_prod", "ai_dev", "eks_nodes")
OUTSIDE = "outside"
WORDS = (OUTSIDE, "vpc", "any")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._-]*")


class Problem(NamedTuple):
    """One finding in the table: what is wrong, and what is allowed."""

    what: str
    do: str


@dataclass(frozen=True)
class Host:
    """What the inventory knows of one instance."""

    name: str
    groups: tuple[str, ...]
    private_address: str
    public_address: str = ""


@dataclass(frozen=True)
class Table:
    """The rules, what listens behind them, and who is there."""

    groups: Mapping[str, Any]
    endpoints: Mapping[str, Any]
    hosts: Sequence[Host] = ()
    inventory_groups: Sequence[str] = ()
    vpc_cidr: str = ""


@dataclass(frozen=True)
class Sources:
    """From where flows are tried: these hosts, and the outside by one kind of address ("public", "private") or not at all."""

    hosts: Sequence[str] = ()
    outside: str = ""
    endpoints: Sequence[str] = field(default_factory=tuple)


def ports_of(value: Any) -> list[tuple[int, int]]:
    """The ranges that a list of ports means; ValueError with the entry that is none."""
    ranges = []
    for entry in value if isinstance(value, (list, tuple)) else [value]:
        found = re.fullmatch(r"(\d{1,5})(?:-(\d{1,5}))?", str(entry).strip()) if not isinstance(entry, bool) else None
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
        if not 1 <= first <= last <= 65535:
            raise ValueError(repr(entry))
        ranges.append((first, last))
    return ranges


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else []


def problems(table: Table) -> list[Problem]:
    """Everything that is wrong with the table."""
    if not isinstance(table.groups, Mapping) or not table.groups:
        return [
            Problem(
                "nemo_security_groups is empty or no dictionary", "allowed: names of groups, each with members, in, out"
            )
        ]
    if not isinstance(table.endpoints, Mapping) or not table.endpoints:
        return [Problem("nemo_endpoints is empty or no dictionary", "allowed: names, each with what listens where")]
    found: list[Problem] = []
    try:
        ipaddress.ip_network(table.vpc_cidr)
    except ValueError:
        found.append(Problem(f"nemo_vpc_cidr is {table.vpc_cidr!r}", "allowed: a network, such as 10.0.0.0/16"))
    for name, group in table.groups.items():
        found += _group_problems(table, str(name), group)
    for name, endpoint in table.endpoints.items():
        found += _endpoint_problems(table, str(name), endpoint)
    if not found:
        for host in table.hosts:
            if not groups_of(table, host):
                found.append(
                    Problem(
                        f"{host.name} is a member of no security group",
                        "add one of its inventory groups to the members of a group in nemo_security_groups",
                    )
                )
    return found


def _group_problems(table: Table, name: str, group: Any) -> list[Problem]:
    at = f"nemo_security_groups['{name}']"
    if name in WORDS or not _NAME.fullmatch(name):
        return [
            Problem(f"{at} has a name that is taken or not fit", f"allowed: letters, digits; not {', '.join(WORDS)}")
        ]
    if not isinstance(group, Mapping):
        return [Problem(f"{at} is {group!r}", f"allowed: a dictionary of {', '.join(GROUP_KEYS)}")]
    found = [
        Problem(f"{at} has the unknown key {key!r}", f"allowed: {', '.join(GROUP_KEYS)}")
        for key in group
        if key not in GROUP_KEYS
    ]
    found += _names_problems(f"{at}.members", group.get("members", []), table.inventory_groups, "inventory groups")
    peers = (*table.groups, *WORDS)
    found += _names_problems(f"{at}.unspecified", group.get("unspecified", []), peers, "security groups")
    if not isinstance(group.get("external", False), bool):
        found.append(Problem(f"{at}.external is {group['external']!r}", "allowed: true, false"))
    for direction, keys in RULE_KEYS.items():
        rules = group.get(direction, [])
        if not isinstance(rules, (list, tuple)):
            found.append(
                Problem(f"{at}.{direction} is {rules!r}", f"allowed: a list of rules with {' and '.join(keys)}")
            )
            continue
        for number, rule in enumerate(rules):
            where = f"{at}.{direction}[{number}]"
            if not isinstance(rule, Mapping) or set(rule) - set(keys) or keys[0] not in rule:
                found.append(Problem(f"{where} is {rule!r}", f"allowed: {keys[0]} (required) and {keys[1]}"))
                continue
            found += _names_problems(f"{where}.{keys[0]}", rule[keys[0]], peers, "security groups")
            found += _ports_problems(f"{where}.ports", rule.get("ports", "1-65535"))
    return found


def _endpoint_problems(table: Table, name: str, endpoint: Any) -> list[Problem]:
    at = f"nemo_endpoints['{name}']"
    if not isinstance(endpoint, Mapping):
        return [Problem(f"{at} is {endpoint!r}", f"allowed: a dictionary of {', '.join(ENDPOINT_KEYS)}")]
    found = [
        Problem(f"{at} has the unknown key {key!r}", f"allowed: {', '.join(ENDPOINT_KEYS)}")
        for key in endpoint
        if key not in ENDPOINT_KEYS
    ]
    if ("members" in endpoint) == ("host" in endpoint):
        found.append(
            Problem(f"{at} has members and host, or neither", "allowed: one of them, hosts of the inventory or a name")
        )
    elif "members" in endpoint:
        found += _names_problems(f"{at}.members", endpoint["members"], table.inventory_groups, "inventory groups")
    else:
        group = endpoint.get("security_group")
        if group not in table.groups:
            found.append(Problem(f"{at}.security_group is {group!r}", f"allowed: {', '.join(table.groups)}"))
        if not isinstance(endpoint["host"], str) or re.search(r"[\s/:]", endpoint["host"]):
            found.append(
                Problem(
                    f"{at}.host is {endpoint['host']!r}", "allowed: a name or an address, without https:// and port"
                )
            )
    found += _ports_problems(f"{at}.ports", endpoint.get("ports"), single=True)
    protocol = endpoint.get("protocol", "tcp")
    if protocol not in PROTOCOLS:
        found.append(Problem(f"{at}.protocol is {protocol!r}", f"allowed: {', '.join(PROTOCOLS)}"))
    path = endpoint.get("path", "/")
    if not isinstance(path, str) or not re.fullmatch(r"/[\x21-\x7e]*", path):
        found.append(Problem(f"{at}.path is {path!r}", "allowed: begins with /, no blanks"))
    for status in _list(endpoint.get("status", [])) or ([] if endpoint.get("status") in (None, []) else [None]):
        if not isinstance(status, int) or isinstance(status, bool) or not 100 <= status <= 599:
            found.append(
                Problem(f"{at}.status is {endpoint['status']!r}", "allowed: a list of HTTP statuses, 100 to 599")
            )
            break
    days = endpoint.get("days", 0)
    if not isinstance(days, int) or isinstance(days, bool) or days < 0:
        found.append(
            Problem(f"{at}.days is {days!r}", "allowed: whole days that its certificate must have left, 0 or more")
        )
    within = endpoint.get("within", [])
    try:
        for network in within if isinstance(within, (list, tuple)) else [""]:
            ipaddress.ip_network(str(network))
    except ValueError:
        found.append(Problem(f"{at}.within is {within!r}", "allowed: a list of networks, such as 10.0.0.0/16"))
    return found


def _names_problems(at: str, value: Any, allowed: Iterable[str], kind: str) -> list[Problem]:
    if not isinstance(value, (list, tuple)):
        return [Problem(f"{at} is {value!r}", f"allowed: a list of {kind}")]
    known = sorted(set(allowed))
    return [
        Problem(f"{at} names {name!r}, which is none of the {kind}", f"allowed: {', '.join(known)}")
        for name in value
        if name not in known
    ]


def _ports_problems(at: str, value: Any, single: bool = False) -> list[Problem]:
    allowed = "a list of ports, 1 to 65535" + ("" if single else ", or ranges such as 8000-8002")
    if single and not isinstance(value, (list, tuple)):
        return [Problem(f"{at} is {value!r}", f"allowed: {allowed}")]
    try:
        ranges = ports_of(value)
    except ValueError as error:
        return [Problem(f"{at} has {error}", f"allowed: {allowed}")]
    if single and any(first != last for first, last in ranges):
        return [Problem(f"{at} is {value!r}", f"allowed: {allowed}; a range says nothing about what listens")]
    return []


def groups_of(table: Table, host: Host) -> list[str]:
    """The security groups that a host is in."""
    return [name for name, group in table.groups.items() if set(group.get("members", [])) & set(host.groups)]


def _covers(rule: Mapping[str, Any], port: int) -> bool:
    return any(first <= port <= last for first, last in ports_of(rule.get("ports", "1-65535")))


def _names(peers: Sequence[str], groups: Iterable[str], in_vpc: bool) -> bool:
    """Whether a rule's list of peers means somebody in these groups."""
    return "any" in peers or (in_vpc and "vpc" in peers) or bool(set(groups) & set(peers))


def allowed(table: Table, source: Sequence[str], target: Sequence[str], port: int) -> bool:
    """Whether the rules let a member of some groups (or the outside) reach a port of members of others."""
    outside = OUTSIDE in source
    inbound = any(
        _covers(rule, port) and _names(rule["from"], source, not outside)
        for name in target
        for rule in table.groups[name].get("in", [])
    )
    if outside:
        return inbound
    in_vpc = not any(table.groups[name].get("external", False) for name in target)
    return inbound and any(
        _covers(rule, port) and _names(rule["to"], target, in_vpc)
        for name in source
        for rule in table.groups[name].get("out", [])
    )


def _unspecified(table: Table, source: Sequence[str], target: Sequence[str]) -> bool:
    """Whether the table leaves a pair open: what no rule allows is then not tried, in place of expected closed."""
    return any(_names(table.groups[name].get("unspecified", []), source, OUTSIDE not in source) for name in target)


class _Target(NamedTuple):
    name: str
    address: str
    groups: list[str]
    host: Host | None


def flows(table: Table, sources: Sources) -> list[dict[str, Any]]:
    """Each source against each endpoint, with what the table wants: what a rule lets through is open, all else closed."""
    hosts = {host.name: host for host in table.hosts}
    found = []
    starts: list[tuple[str, list[str]]] = [(name, groups_of(table, hosts[name])) for name in sources.hosts]
    if sources.outside:
        starts.insert(0, (OUTSIDE, [OUTSIDE]))
    for source, source_groups in starts:
        for label, endpoint in table.endpoints.items():
            if sources.endpoints and label not in sources.endpoints:
                continue
            for target in _targets(table, str(label), endpoint):
                address = target.address
                if source == target.name:
                    continue
                if source == OUTSIDE:
                    address = _seen_from_outside(table, target, sources.outside)
                if not address:
                    continue
                for port, _last in ports_of(endpoint["ports"]):
                    opened = allowed(table, source_groups, target.groups, port)
                    if not opened and _unspecified(table, source_groups, target.groups):
                        continue
                    found.append(_flow(source, target, str(label), endpoint, address, port, opened))
    return found


def _targets(table: Table, label: str, endpoint: Mapping[str, Any]) -> list[_Target]:
    if "host" in endpoint:
        return [_Target(label, endpoint["host"], [endpoint["security_group"]], None)]
    return [
        _Target(host.name, host.private_address, groups_of(table, host), host)
        for host in table.hosts
        if set(host.groups) & set(endpoint["members"]) and host.private_address
    ]


def _seen_from_outside(table: Table, target: _Target, kind: str) -> str:
    """Where the outside finds a host of the inventory; anything else is never asked from there."""
    if target.host is None:
        return ""
    if kind == "public":
        return target.host.public_address
    address = target.host.private_address
    return address if ipaddress.ip_address(address) in ipaddress.ip_network(table.vpc_cidr) else ""


def _flow(
    source: str, target: _Target, label: str, endpoint: Mapping[str, Any], address: str, port: int, opened: bool
) -> dict[str, Any]:
    expect = "open" if opened else "closed"
    probe = {
        "id": f"{source} > {target.name}:{port} {label}",
        "host": address,
        "port": port,
        "protocol": endpoint.get("protocol", "tcp"),
        "expect": expect,
    }
    for key in ("path", "status", "days", "within", "server_name", "certificate_authority"):
        if endpoint.get(key):
            probe[key] = endpoint[key]
    return {
        "id": probe["id"], "source": source, "target": target.name, "endpoint": label, "port": port,
        "protocol": probe["protocol"], "expect": expect, "probe": probe,
    }  # fmt: skip
