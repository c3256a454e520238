# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What is wrong with an inventory, before any connection. Pure functions: data in, lists of findings out."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ansible_collections.nemo.platform.plugins.module_utils import operators

ROLES = ("bastion", "vllm", "ai", "eks-node")
# Roles whose hosts run services of the catalogue.
SERVICE_ROLES = ("ai",)
REQUIRED_VARIABLES = (
    "nemo_region",
    "nemo_account_id",
    "nemo_registry",
    "nemo_vpc_cidr",
    "nemo_ssh_user",
    "nemo_services",
)
SERVICE_KEYS = ("group", "port", "repository", "tag_prefix", "memory", "health_path")
# Gone -> what took its place. The ansible_ssh_* names still work in Ansible and would quietly win over the inventory's.
REMOVED_VARIABLES = {
    "ansible_ssh_host": "the instance's addresses from AWS (nemo_private_address, nemo_public_address)",
    "ansible_ssh_user": "nemo_ssh_user",
    "ansible_ssh_private_key": "nemo_ssh_private_key_file",
    "ansible_ssh_port": "nothing: the platform's SSH is on port 22",
}
# Values of nemo_bastion_system.
SYSTEMS = ("amazon-linux-2", "amazon-linux-2023", "debian", "ubuntu")
# What still works and is past its date, by variable and value: what to know, and what to do.
PAST_SUPPORT = {
    ("nemo_bastion_system", "amazon-linux-2"): (
        "Amazon Linux 2 is past its end of support (30 June 2026)",
        "replace the Bastion's instance by one with Amazon Linux 2023 and set nemo_bastion_system: amazon-linux-2023",
    ),
    ("nemo_eks_version", "1.33"): (
        "Kubernetes 1.33 on EKS is past its standard support (29 July 2026; extended, at a price, until July 2027)",
        "upgrade the cluster to 1.34 and set nemo_eks_version to it",
    ),
}
LAB_HINT = "to only look around without AWS: make lab shows everything on this machine"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class Problem(NamedTuple):
    """One finding: what is wrong, and what to do."""

    what: str
    do: str

    def __str__(self) -> str:
        return f"{self.what} -> {self.do}"


@dataclass(frozen=True)
class Host:
    """What the inventory knows of one instance."""

    name: str
    role: str = ""
    services: tuple[str, ...] = ()
    tag_name: str = ""
    instance_id: str = ""
    region: str = ""
    private_address: str = ""
    public_address: str = ""
    variables: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Name for messages."""
        return f"{self.name} ({self.instance_id})" if self.instance_id else self.name


@dataclass(frozen=True)
class Inventory:
    """All that the checks look at."""

    hosts: Sequence[Host] = ()
    groups: Mapping[str, Sequence[str]] = field(default_factory=dict)
    # Values of the platform's variables; what is undefined is absent.
    variables: Mapping[str, Any] = field(default_factory=dict)
    services: Mapping[str, Any] = field(default_factory=dict)
    # (service, secret, variable it asks for) of secrets that have no value.
    missing_secrets: Sequence[tuple[str, str, str]] = ()
    account: Account | None = None


@dataclass(frozen=True)
class Account:
    """What AWS answered when the inventory was empty."""

    region: str = ""
    # "" or the explanation of the error, and whether it is a lack of credentials
    error: str = ""
    no_credentials: bool = False
    identity: str = ""
    # state -> number, of instances with the project's tag, and of all others
    project_states: Mapping[str, int] = field(default_factory=dict)
    other_instances: int = 0
    environment_region: str = ""
    endpoint_url: str = ""


def _names(items: Iterable[str]) -> str:
    return ", ".join(sorted(items))


def type_name(value: Any) -> str:
    """Name of a value's type; Ansible's own types, which it wraps values in, go by what they stand for."""
    return next((kind.__name__ for kind in (bool, str, int, float, dict, list) if isinstance(value, kind)), "null")


def _whole(value: Any) -> int | None:
    """The whole number that a value is or spells, if it is one."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    return int(value) if isinstance(value, str) and re.fullmatch("[0-9]+", value) else None


def _list(inventory: Inventory, name: str) -> list[str]:
    """A variable that lists names; nothing where it does not, which _variables() reports."""
    value = inventory.variables.get(name) or []
    return list(value) if _is_list(value) else []


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(one, str) for one in value)


def _empty(inventory: Inventory) -> list[Problem]:
    account = inventory.account
    if account is None:
        return [Problem("the inventory has no running instance", "check the inventory file, or refresh: --flush-cache")]
    if account.error:
        lab = account.endpoint_url != ""
        if account.no_credentials:
            return [Problem(account.error, LAB_HINT)]
        return [Problem(account.error, "if this is the lab: make lab starts it" if lab else LAB_HINT)]
    found = []
    who = f" (asked as {account.identity})" if account.identity else ""
    if account.project_states:
        states = ", ".join(f"{number} {state}" for state, number in sorted(account.project_states.items()))
        if account.project_states.get("running"):
            found.append(
                Problem(
                    f"the inventory is empty, yet {account.region} has instances of the project: {states}{who}",
                    "the cached inventory is older than they are: repeat with --flush-cache, and read the warnings above",
                )
            )
        else:
            found.append(
                Problem(
                    f"no instance of the project is running in {account.region}: {states}{who}",
                    "start them (Lambda eks-ec2-startstop with ACTION=start, or aws ec2 start-instances)",
                )
            )
    else:
        others = f"; {account.other_instances} other instances are there" if account.other_instances else ""
        found.append(
            Problem(
                f"{account.region} has no instance with the project's tag{others}{who}",
                "wrong region or account? check regions in the inventory file, nemo_region and AWS_PROFILE;"
                " or tag the instances Project=nemo",
            )
        )
    if account.environment_region and account.environment_region != account.region:
        found.append(
            Problem(
                f"AWS_REGION is {account.environment_region}, the inventory looks at {account.region}",
                "unset it, or correct regions in the inventory file and nemo_region",
            )
        )
    return found


def _tags(inventory: Inventory) -> list[Problem]:
    found = []
    catalogue = _names(inventory.services) or "nothing"
    for host in inventory.hosts:
        if host.role not in ROLES:
            value = f"has the tag Role={host.role}" if host.role else "has no tag Role"
            found.append(Problem(f"{host.label} {value}", f"allowed: {', '.join(ROLES)}"))
        for service in host.services:
            if service not in inventory.services:
                found.append(
                    Problem(
                        f"{host.label} has the tag Services={'+'.join(host.services)}: {service} is no service",
                        f"nemo_services has {catalogue}; join several with +",
                    )
                )
        repeated = {service for service in host.services if host.services.count(service) > 1}
        if repeated:
            found.append(Problem(f"{host.label} has {_names(repeated)} twice in its tag Services", "name it once"))
        if host.role in SERVICE_ROLES and not host.services:
            found.append(Problem(f"{host.label} has Role={host.role} and no tag Services", f"tag it with {catalogue}"))
        if host.role in ROLES and host.role not in SERVICE_ROLES and set(host.services) & set(inventory.services):
            found.append(
                Problem(
                    f"{host.label} has Services={'+'.join(host.services)} and Role={host.role}, which runs none",
                    f"set Role={SERVICE_ROLES[0]}, or take the tag Services away",
                )
            )
        if host.tag_name and not _NAME.fullmatch(host.tag_name):
            found.append(
                Problem(
                    f"{host.label} has a Name that --limit cannot match: {host.tag_name!r}",
                    "use letters, digits, dots, dashes and underscores",
                )
            )
    return found


def _duplicates(inventory: Inventory) -> list[Problem]:
    shared = set(_list(inventory, "nemo_shared_names"))
    by_name: dict[str, list[Host]] = defaultdict(list)
    for host in inventory.hosts:
        # The nodes of a node group share their Name as a rule.
        if host.tag_name and host.role != "eks-node" and host.tag_name not in shared:
            by_name[host.tag_name].append(host)
    return [
        Problem(
            f"{len(hosts)} instances carry the Name {name}: {_names(host.label for host in hosts)}",
            "rename or stop one of them, or add the Name to nemo_shared_names if this is meant",
        )
        for name, hosts in sorted(by_name.items())
        if len(hosts) > 1
    ]


def _groups(inventory: Inventory) -> list[Problem]:
    return [
        Problem(f"the group {group} is empty", "start its instance, or correct its tags; see nemo_required_groups")
        for group in _list(inventory, "nemo_required_groups")
        if not inventory.groups.get(group)
    ]


def _services(inventory: Inventory) -> list[Problem]:
    found = []
    for name, service in sorted(inventory.services.items()):
        if not isinstance(service, Mapping):
            what = "empty" if service is None else f"of type {type_name(service)}"
            found.append(Problem(f"nemo_services: {name} is {what}", f"allowed: the keys {', '.join(SERVICE_KEYS)}"))
            continue
        missing = [key for key in SERVICE_KEYS if service.get(key) in (None, "")]
        if missing:
            found.append(Problem(f"nemo_services: {name} has no {', '.join(missing)}", "see the head of services.yml"))
        port = service.get("port")
        if "port" not in missing and not 1 <= (_whole(port) or 0) <= 65535:
            found.append(Problem(f"nemo_services: {name} has port {port!r}", "allowed: 1 to 65535"))
        hosts = [host for host in inventory.hosts if name in host.services]
        secrets = service.get("secrets") or {}
        if not isinstance(secrets, Mapping):
            kind = type_name(secrets)
            found.append(
                Problem(f"nemo_services: {name} has secrets of type {kind}", "allowed: names with their values")
            )
        allowed = 1 if service.get("hosts") is None else _whole(service["hosts"])
        if allowed is None or allowed < 1:
            found.append(Problem(f"nemo_services: {name} has hosts {service['hosts']!r}", "allowed: 1 or more"))
            allowed = len(hosts)
        if not isinstance(service.get("follow", False), bool):
            found.append(Problem(f"nemo_services: {name} has follow {service['follow']!r}", "allowed: true or false"))
        if not hosts:
            found.append(
                Problem(
                    f"the service {name} has no host",
                    f"start its instance or tag one Services={name}; or take it out of nemo_services",
                )
            )
        elif len(hosts) > allowed:
            found.append(
                Problem(
                    f"{len(hosts)} hosts claim {name} on port {port}: {_names(host.label for host in hosts)}",
                    f"allowed: {allowed}. Take the service out of the tag Services of the others, or set"
                    f" nemo_services['{name}'].hosts",
                )
            )
    for host in inventory.hosts:
        claims: dict[str, list[str]] = defaultdict(list)
        for name in sorted(set(host.services)):
            service = inventory.services.get(name)
            if isinstance(service, Mapping) and service.get("port"):
                claims[str(service["port"])].append(name)
        for port, names in claims.items():
            if len(names) > 1:
                found.append(
                    Problem(
                        f"{host.label} has {' and '.join(names)} both on port {port}", "give each a port of its own"
                    )
                )
    return found


def _variables(inventory: Inventory) -> list[Problem]:
    found = []
    for name in REQUIRED_VARIABLES:
        if inventory.variables.get(name) in (None, "", {}):
            found.append(Problem(f"the variable {name} is missing", "set it in group_vars/all/"))
    catalogue = inventory.variables.get("nemo_services")
    if catalogue not in (None, "", True) and not isinstance(catalogue, Mapping):
        what = f"nemo_services is of type {type_name(catalogue)}"
        found.append(Problem(what, "allowed: the names of services, each with its keys"))
    for name in ("nemo_required_groups", "nemo_shared_names"):
        value = inventory.variables.get(name)
        if value and not _is_list(value):
            found.append(Problem(f"{name} is {value!r}", "allowed: a list of names"))
    system = inventory.variables.get("nemo_bastion_system")
    if system is not None and system not in SYSTEMS:
        found.append(Problem(f"nemo_bastion_system is {system!r}", f"allowed: {', '.join(SYSTEMS)}"))
    release = inventory.variables.get("nemo_eks_version")
    if release is not None and not re.fullmatch(r"1\.[0-9]{1,3}", str(release)):
        found.append(
            Problem(f"nemo_eks_version is {release!r}", 'allowed: the cluster\'s minor version, such as "1.33"')
        )
    for service, secret, variable in inventory.missing_secrets:
        what = f"the secret {secret} of {service} has no value"
        name = variable or f"nemo_services['{service}'].secrets.{secret}"
        found.append(Problem(what, f"set {name} in group_vars/all/vault.yml (ansible-vault edit)"))
    where: dict[str, list[str]] = defaultdict(list)
    for name in REMOVED_VARIABLES:
        if name in inventory.variables:
            where[name].append("group_vars")
        where[name].extend(host.name for host in inventory.hosts if name in host.variables)
    for name, places in where.items():
        if places:
            found.append(
                Problem(
                    f"the removed variable {name} is set: {_names(set(places))}",
                    f"in its place: {REMOVED_VARIABLES[name]}",
                )
            )
    region = inventory.variables.get("nemo_region")
    strangers = [host for host in inventory.hosts if host.region and region and host.region != region]
    if strangers:
        found.append(
            Problem(
                f"wrong region: nemo_region is {region}, but {_names(f'{host.label} in {host.region}' for host in strangers)}",
                "make nemo_region and regions in the inventory file the same",
            )
        )
    return found


def _addresses(inventory: Inventory) -> list[Problem]:
    by_address: dict[str, list[Host]] = defaultdict(list)
    for host in inventory.hosts:
        if host.private_address:
            by_address[host.private_address].append(host)
    return [
        Problem(
            f"{_names(host.label for host in hosts)} have one private address, {address}",
            "two networks? add vpc-id to the filters of the inventory file",
        )
        for address, hosts in sorted(by_address.items())
        if len(hosts) > 1
    ]


def _operators(inventory: Inventory) -> list[Problem]:
    variables = inventory.variables
    if "nemo_operators" not in variables:
        return []
    rsa_bits = _whole(variables.get("operators_rsa_bits")) or operators.RSA_BITS
    allow_empty = variables.get("operators_allow_empty") is True
    reserved = [str(variables.get("nemo_ssh_user"))]
    found = operators.problems(variables["nemo_operators"], reserved, allow_empty, rsa_bits)
    return [Problem(f"nemo_operators: {what}", f"allowed: {allowed}") for what, allowed in found]


def problems(inventory: Inventory) -> list[Problem]:
    """All that is wrong, most basic first."""
    if not inventory.hosts:
        return _empty(inventory) + _variables(inventory)
    found: list[Problem] = []
    for check in (_variables, _tags, _duplicates, _addresses, _groups, _services, _operators):
        found.extend(check(inventory))
    return found


def warnings(inventory: Inventory) -> list[Problem]:
    """What is no problem today, one line each."""
    return [
        Problem(f"{name} is {value}: {what}", do)
        for (name, value), (what, do) in PAST_SUPPORT.items()
        if str(inventory.variables.get(name)) == value
    ]


def report(found: Sequence[Problem], sources: Sequence[str] = ()) -> str:
    """The list, for people."""
    where = f" {', '.join(sources)}" if sources else ""
    count = "one problem" if len(found) == 1 else f"{len(found)} problems"
    lines = [f"{count} in the inventory{where}; nothing was connected to or changed:"]
    lines += [f"{number}. {problem}" for number, problem in enumerate(found, 1)]
    return "\n".join(lines)
