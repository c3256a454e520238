# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The ad-hoc operations of playbooks/access.yml: what is asked for and of which hosts, and what they show. Pure functions."""

from __future__ import annotations

import base64
import binascii
import difflib
import re
import shlex
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ansible_collections.nemo.platform.plugins.module_utils import service_logs
from ansible_collections.nemo.platform.plugins.module_utils.operators import fingerprint

USAGE = """\
access.yml does one thing at a time, chosen by a tag:

  who      operators, their keys, last logins and open sessions
           ansible-playbook access.yml --tags who
  restart  a service, or a unit of a group's hosts; one host after another, each one healthy before the next
           ansible-playbook access.yml --tags restart -e service=ai-dev
           ansible-playbook access.yml --tags restart -e unit=docker -e group=ai
  logs     of services, or of a unit, of all their hosts by time; from now on with -e follow=true
           ansible-playbook access.yml --tags logs -e service=ai-prod [-e since=10m] [-e lines=200] [-e grep=...]
           ansible-playbook access.yml --tags logs -e service=ai-prod,ai-dev -e follow=true [-e follow_for=600]
           ansible-playbook access.yml --tags logs -e unit=docker [-e group=ai]
  run      a command on a group's hosts, their answers grouped; as root with --become
           ansible-playbook access.yml --tags run -e group=ai -e command='uptime -p'

services: {services}
groups:   {groups}"""

COLOURS = ("cyan", "green", "magenta", "yellow", "blue", "bright cyan", "bright green", "bright purple")
TRUE, FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
UNIT = re.compile(r"[A-Za-z0-9@:._\\-]{1,255}")
# Who restarts one of these by a mistake may not get in again, or ends everybody's session.
REFUSED_UNITS = ("ssh", "sshd", "dbus", "systemd-logind", "systemd-networkd", "NetworkManager", "network", "networking")
# What every inventory has and nobody means.
NO_GROUPS = ("ungrouped", "aws_ec2", "access_targets")
# Which variables belong to which operation.
VARIABLES: dict[str, tuple[str, ...]] = {
    "who": (),
    "restart": ("service", "unit", "group"),
    "logs": ("service", "unit", "group", "since", "lines", "grep", "follow", "follow_for"),
    "run": ("group", "command"),
}
OPERATIONS = tuple(VARIABLES)


class AccessError(Exception):
    """What is wrong with what was asked for, in one sentence that says what is allowed."""


class Target(NamedTuple):
    """One host, and its services that are meant."""

    host: str
    services: list[str]


class Inventory(NamedTuple):
    """What the inventory knows: members by group, and the group of each service."""

    groups: Mapping[str, Sequence[str]]
    services: Mapping[str, str]

    @property
    def group_names(self) -> str:
        return ", ".join(sorted(name for name, members in self.groups.items() if members and name not in NO_GROUPS))

    @property
    def service_names(self) -> str:
        return ", ".join(sorted(self.services)) or "none"


def refused_unit(name: str) -> str:
    """Why a unit may not be restarted, or nothing."""
    plain = re.sub(r"\.(service|socket|target)$", "", name).partition("@")[0]
    if plain in REFUSED_UNITS:
        return f"unit is {name!r}, which logins depend on; allowed: any unit but {', '.join(REFUSED_UNITS)}"
    return ""


def usage(inventory: Inventory) -> str:
    """How access.yml is used."""
    return USAGE.format(services=inventory.service_names, groups=inventory.group_names)


def operation(tags: Iterable[str]) -> str:
    """The one operation that the tags name, or none."""
    chosen = [name for name in OPERATIONS if name in set(tags)]
    if len(chosen) > 1:
        raise AccessError(f"tags are {', '.join(chosen)}; allowed: one of {', '.join(OPERATIONS)}")
    return chosen[0] if chosen else ""


def raw_command(extra_vars: Iterable[str]) -> str | None:
    """The command as it was typed. Ansible splits `-e command='df -h'` at the blank and forgets the rest, without a word."""
    found = None
    for item in extra_vars:
        if not item.startswith("command="):
            continue
        text = item[len("command=") :].strip()
        swallowed = re.search(r"\s(group|become)=\S+\s*$", text)
        if swallowed:
            raise AccessError(f"command ends in {swallowed[0].strip()!r}; allowed: each variable with an -e of its own")
        quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" and text[0] not in text[1:-1]
        found = shlex.split(text)[0] if quoted else text
    return found


def _near(value: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(value, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _of_group(value: str, inventory: Inventory) -> list[str]:
    members = list(inventory.groups.get(value) or [])
    if members:
        return members
    if value in inventory.groups.get("all", ()):
        return [value]
    if value in inventory.groups:
        raise AccessError(f"group {value!r} has no host; allowed: {inventory.group_names}, or a host's name")
    near = _near(value, [*inventory.groups, *inventory.groups.get("all", ())])
    raise AccessError(f"group is {value!r}; allowed: {inventory.group_names}, or a host's name{near}")


def _of_services(value: str, several: bool, inventory: Inventory) -> list[Target]:
    names = list(dict.fromkeys(name.strip() for name in value.split(",") if name.strip()))
    if len(names) != 1 and not several:
        raise AccessError(f"service is {value!r}; allowed: one of {inventory.service_names}")
    hosts: dict[str, list[str]] = {}
    for name in names:
        if name not in inventory.services:
            near = _near(name, inventory.services)
            raise AccessError(f"service is {name!r}; allowed: {inventory.service_names}{near}")
        members = inventory.groups.get(inventory.services[name]) or []
        if not members:
            raise AccessError(f"service {name!r} runs on no host: its group {inventory.services[name]} is empty")
        for host in members:
            hosts.setdefault(host, []).append(name)
    return [Target(host, hosts[host]) for host in sorted(hosts)]


def _number(given: Mapping[str, str], name: str, least: int, most: int) -> None:
    value = given.get(name)
    if value is not None and not (re.fullmatch(r"\d{1,9}", value) and least <= int(value) <= most):
        raise AccessError(f"{name} is {value!r}; allowed: {least} to {most}")


def _check_logs(given: Mapping[str, str]) -> None:
    if "since" in given:
        try:
            service_logs.parse_since(given["since"], 0)
        except ValueError as error:
            raise AccessError(f"since is {given['since']!r}; allowed: {service_logs.SINCE}") from error
    _number(given, "lines", 0, 100000)
    _number(given, "follow_for", 1, 86400)
    if given.get("follow", "false").lower() not in TRUE + FALSE:
        raise AccessError(f"follow is {given['follow']!r}; allowed: true or false")
    try:
        re.compile(given.get("grep", ""))
    except re.error as error:
        raise AccessError(f"grep is {given['grep']!r}; allowed: a regular expression ({error})") from error


def _unit(given: Mapping[str, str]) -> str:
    unit = given.get("unit", "")
    if unit and not UNIT.fullmatch(unit):
        raise AccessError(f"unit is {unit!r}; allowed: the name of a systemd unit, such as docker")
    return unit


def targets(what: str, given: Mapping[str, str], inventory: Inventory) -> list[Target]:
    """The hosts of an operation, by name. `given` are the variables that were given, as text."""
    for name in sorted({variable for known in VARIABLES.values() for variable in known} - set(VARIABLES[what])):
        if name in given:
            allowed = ", ".join(VARIABLES[what]) or "none"
            raise AccessError(f"{name} means nothing to {what}; allowed: {allowed}")
    everywhere = sorted(inventory.groups.get("all", ()))
    if not everywhere:
        raise AccessError("the inventory has no host: playbooks/preflight.yml says why")
    if what == "who":
        return [Target(host, []) for host in everywhere]
    if what == "run":
        if not given.get("command", "").strip():
            raise AccessError("command is missing; allowed: a command line, such as -e command='uptime -p'")
        if not given.get("group"):
            raise AccessError(f"group is missing; allowed: {inventory.group_names}, or a host's name")
        return [Target(host, []) for host in sorted(_of_group(given["group"], inventory))]
    if what == "logs":
        _check_logs(given)
    service, unit = given.get("service", ""), _unit(given)
    if bool(service) == bool(unit):
        both = "service and unit are both given" if service else "service is missing"
        raise AccessError(
            f"{both}; allowed: either -e service=... ({inventory.service_names}) or -e unit=... and -e group=..."
        )
    if service:
        found = _of_services(service, what == "logs", inventory)
        if not given.get("group"):
            return found
        members = set(_of_group(given["group"], inventory))
        kept = [target for target in found if target.host in members]
        if not kept:
            names = ", ".join(target.host for target in found)
            raise AccessError(f"no host of group {given['group']!r} runs {service}; it runs on {names}")
        return kept
    if what == "restart" and refused_unit(unit):
        raise AccessError(refused_unit(unit))
    if what == "restart" and not given.get("group"):
        raise AccessError(f"group is missing; allowed: {inventory.group_names}, or a host's name")
    hosts = _of_group(given["group"], inventory) if given.get("group") else everywhere
    return [Target(host, []) for host in sorted(hosts)]


# what is shown


def colour(host: str, hosts: Sequence[str]) -> str:
    """A host's own colour."""
    ordered = sorted(hosts)
    return COLOURS[ordered.index(host) % len(COLOURS)] if host in ordered else "normal"


class Block(NamedTuple):
    """Some lines in one colour."""

    lines: list[str]
    colour: str


def unreachable(result: Mapping[str, Any]) -> str:
    """Why there is no answer of a host, or nothing."""
    if result.get("unreachable"):
        return "not reachable: " + " ".join(str(result.get("msg", "")).split())[:200]
    return ""


def run_blocks(results: Mapping[str, Mapping[str, Any]]) -> tuple[list[Block], list[str]]:
    """Hosts with one answer together, the largest group first, and those on which the command failed."""
    answers: dict[tuple[Any, ...], list[str]] = {}
    failed = []
    for host in sorted(results):
        result = results[host]
        problem = unreachable(result)
        if not problem and "rc" not in result:
            problem = "not run: " + " ".join(str(result.get("msg") or "check mode").split())
        status = None if problem else int(result["rc"])
        if status != 0 and not result.get("skipped"):
            failed.append(host)
        out, err = str(result.get("stdout", "")), str(result.get("stderr", ""))
        answers.setdefault((problem, status, out, err), []).append(host)
    blocks = []
    for (problem, status, out, err), hosts in sorted(answers.items(), key=lambda entry: (-len(entry[1]), entry[1])):
        count = f" ({len(hosts)} hosts)" if len(hosts) > 1 else ""
        head = f"{', '.join(hosts)}{count}: {problem or f'status {status}'}"
        body = [f"  {service_logs.clean(line)}" for line in out.splitlines()]
        body += [f"  stderr: {service_logs.clean(line)}" for line in err.splitlines()]
        good = status == 0 or not set(hosts) & set(failed)
        blocks.append(Block(["", head, *body], "green" if good else "red"))
    return blocks, failed


def log_blocks(results: Mapping[str, Mapping[str, Any]]) -> tuple[list[Block], list[str]]:
    """All lines by time, then what could not be read, and the hosts of that."""
    hosts = sorted(results)
    width = max(map(len, hosts), default=0)
    merged = service_logs.merge({host: results[host].get("lines", []) for host in hosts})
    blocks = [Block([service_logs.line_text(host, line, width)], colour(host, hosts)) for host, line in merged]
    failed = []
    for host in hosts:
        problems = [*results[host].get("problems", []), unreachable(results[host])]
        if results[host].get("failed"):
            problems.append(str(results[host].get("msg")))
        for problem in filter(None, problems):
            blocks.append(Block([f"{host}: {service_logs.clean(problem)}"], "red"))
            failed.append(host)
    absent = [host for host in hosts if results[host].get("absent")]
    if absent:
        blocks.append(Block([f"no such unit on {', '.join(absent)}"], "yellow"))
        failed += absent if absent == hosts else []
    if not merged and not failed:
        blocks.append(Block(["no line in that time"], "normal"))
    return blocks, sorted(set(failed))


def when(seconds: int) -> str:
    """2026-11-22 13:35Z"""
    return time.strftime("%Y-%m-%d %H:%MZ", time.gmtime(seconds)) if seconds else ""


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Text in columns."""
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in [head, *rows]]


def key_text(key: Mapping[str, str]) -> str:
    """ed25519 SHA256:... comment"""
    kind = re.sub(r"^(ssh-|ecdsa-sha2-)|@openssh\.com$", "", key["type"])
    return service_logs.clean(f"{kind} {key['fingerprint']} {key['comment']}".rstrip())


def wanted_fingerprints(keys: Iterable[str]) -> set[str]:
    """The fingerprints of keys as the inventory has them."""
    found = set()
    for key in keys:
        for word in str(key).split():
            if word.startswith("AAAA"):
                try:
                    found.add(fingerprint(base64.b64decode(word, validate=True)))
                except (binascii.Error, ValueError):
                    continue
    return found


def who_rows(host: str, accounts: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The rows of one host: one for each account, and one more for each further key."""
    rows = []
    for account in accounts:
        login, sessions = account["last_login"], account["sessions"]
        last = f"{when(int(login['at']))} {login['from']}".strip() if login else "none known"
        opened = f"{len(sessions)}, since {when(int(sessions[0]['since']))}" if sessions else "-"
        keys = [key_text(key) for key in account["keys"]] or ["no key"]
        kind = "operator" if account["groups"] else "account"
        rows.append([host, account["name"], kind, "yes" if account["sudo"] else "no", last, opened, keys[0]])
        rows += [["", "", "", "", "", "", key] for key in keys[1:]]
    return rows


def who_notes(host: str, accounts: Sequence[Mapping[str, Any]], operators: Sequence[Mapping[str, Any]]) -> list[str]:
    """What differs between the Bastion and the inventory's operators."""
    there = {account["name"]: account for account in accounts if account["groups"]}
    wanted = {str(entry.get("name")): entry for entry in operators}
    notes = [
        f"{host}: {name} is an operator here and not in nemo_operators" for name in sorted(set(there) - set(wanted))
    ]
    notes += [
        f"{host}: {name} is in nemo_operators and no operator here yet" for name in sorted(set(wanted) - set(there))
    ]
    for name in sorted(set(there) & set(wanted)):
        has = {key["fingerprint"] for key in there[name]["keys"]}
        should = wanted_fingerprints(wanted[name].get("keys") or [])
        notes += [f"{host}: {name} has the key {key}, which nemo_operators has not" for key in sorted(has - should)]
        notes += [f"{host}: {name} has not the key {key} of nemo_operators" for key in sorted(should - has)]
    return notes


def who_blocks(
    results: Mapping[str, Mapping[str, Any]], bastions: Sequence[str], operators: Sequence[Mapping[str, Any]]
) -> tuple[list[Block], list[str]]:
    """One table of all hosts, the Bastion first, then what is worth a look."""
    rows: list[list[str]] = []
    notes: list[str] = []
    failed = []
    for host in sorted(results, key=lambda name: (name not in bastions, name)):
        result = results[host]
        if "accounts" not in result:
            failed.append(host)
            notes.append(f"{host}: {unreachable(result) or result.get('msg', 'no answer')}")
            continue
        rows += who_rows(host, result["accounts"])
        if host in bastions:
            notes += who_notes(host, result["accounts"], operators)
        notes += [f"{host}: {place} is no key" for place in result.get("unreadable", [])]
    head = ["HOST", "NAME", "KIND", "SUDO", "LAST LOGIN", "OPEN SESSIONS", "KEYS"]
    lines = table(head, rows)
    blocks = [Block(["", lines[0]], "bright cyan"), Block(lines[1:], "normal")]
    if notes:
        blocks.append(Block(["", *map(service_logs.clean, notes)], "red" if failed else "yellow"))
    return blocks, failed
