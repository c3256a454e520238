# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the results of all hosts' flows mean: a verdict for each, findings by their cause, and how they are written down."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ansible_collections.nemo.platform.plugins.module_utils.flow_probe import ANSWERED, OPEN
from ansible_collections.nemo.platform.plugins.module_utils.flow_table import OUTSIDE

OK, FAILED, UNPROVEN, SKIPPED = "ok", "FAIL", "unproven", "skipped"
DROP, REJECT = "drop", "reject"
LOOK = {
    "ssh": "systemctl status ssh (or sshd) there",
    "http": "is the service up? its container's or unit's log says why not",
    "mysql": "aws rds describe-db-instances shows its state",
    "kafka": "kubectl get pods shows the brokers; is the listener on this port?",
    "https": "is the service up there?",
    "tls": "is the service up there?",
    "tcp": "is the service up there?",
}


@dataclass
class Row:
    """One flow with its result and what that means."""

    flow: Mapping[str, Any]
    result: Mapping[str, Any]
    status: str = OK
    reason: str = ""

    @property
    def outcome(self) -> str:
        """What the flow came to."""
        return str(self.result.get("outcome", "not_tried"))

    @property
    def place(self) -> str:
        """Where it leads, with its port."""
        return f"{self.flow['target']}:{self.flow['port']}"


@dataclass
class Finding:
    """One thing that is wrong: what, what to do, and the flows that show it."""

    what: str
    do: str
    flows: list[str] = field(default_factory=list)


@dataclass
class Report:
    """Everything that a run found."""

    rows: list[Row]
    findings: list[Finding]
    notes: list[str]

    def count(self, status: str) -> int:
        """Flows with this verdict."""
        return sum(row.status == status for row in self.rows)

    @property
    def summary(self) -> str:
        """One line."""
        counts = f"{self.count(OK)} as the table wants, {self.count(FAILED)} not"
        for status, word in ((UNPROVEN, "closed but not proven"), (SKIPPED, "not tried")):
            counts += f", {self.count(status)} {word}" if self.count(status) else ""
        findings = f"{len(self.findings)} finding{'' if len(self.findings) == 1 else 's'}"
        return f"{len(self.rows)} flows: {counts}; {findings}"


def judge(
    flows: Sequence[Mapping[str, Any]],
    results: Mapping[str, Mapping[str, Any]],
    missing: Mapping[str, str],
    answer: str = DROP,
    optional: Sequence[str] = (),
    unknown: Mapping[str, str] | None = None,
    way_in: str = "",
) -> Report:
    """The verdict on each flow, and the findings.

    results is by the flow's id. missing names sources from which nothing was tried, with the reason; those that are
    optional are a note. answer tells how a security group turns somebody away: AWS drops, so that a refusal comes from
    the host itself. unknown names endpoints whose address could not be found out. way_in is the host through which all others
    are reached, if there is one.
    """
    rows = [Row(flow, results.get(flow["id"], {})) for flow in flows]
    _compare_names(rows)
    # What an allowed flow found to listen: only there does a closed door prove anything.
    listening = {row.place for row in rows if row.flow["expect"] == "open" and row.outcome in ANSWERED}
    for row in rows:
        row.status, row.reason = _verdict(row, row.place in listening, missing, answer)
    findings, notes = _findings(rows, missing, optional, answer, way_in)
    for name, reason in (unknown or {}).items():
        findings.append(
            Finding(f"{name}: its address is not known, so it was not tried: {reason}", "see nemo_endpoints")
        )
    return Report(rows, findings, notes)


def _compare_names(rows: Sequence[Row]) -> None:
    """A private name leads to the same place everywhere; who is sent elsewhere than most has a wrong answer."""
    named = [row for row in rows if row.flow["probe"].get("within") and row.outcome != "dns_wrong"]
    for group in _by((row for row in named if row.result.get("addresses")), lambda row: row.flow["probe"]["host"]):
        answers = {row.flow["source"]: tuple(sorted(row.result["addresses"])) for row in group}
        usual, _count = Counter(answers.values()).most_common(1)[0]
        for row in group:
            here = answers[row.flow["source"]]
            if not set(here) & set(usual):
                name = row.flow["probe"]["host"]
                detail = f"{name} is {', '.join(here)} here, and {', '.join(usual)} elsewhere"
                row.result = {**row.result, "outcome": "dns_wrong", "detail": detail}


def _verdict(row: Row, listening: bool, missing: Mapping[str, str], answer: str) -> tuple[str, str]:
    detail = str(row.result.get("detail", ""))
    if row.flow["source"] in missing:
        return SKIPPED, "nothing could be tried from here"
    if row.outcome in ("dns_failed", "dns_wrong", "not_tried"):
        return FAILED, detail or "no result came back"
    if row.flow["expect"] == "open":
        return (OK, detail) if row.outcome == OPEN else (FAILED, detail)
    if row.outcome in ANSWERED:
        return FAILED, "open, and must be closed"
    if row.outcome == "refused" and answer == DROP:
        return FAILED, "refused by the host itself: its security group lets this in, and must not"
    if not listening:
        return UNPROVEN, f"closed ({row.outcome}), but nobody who may has seen anything listen there"
    return OK, f"closed ({row.outcome})"


def _join(names: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(names))


def _findings(
    rows: Sequence[Row], missing: Mapping[str, str], optional: Sequence[str], answer: str, way_in: str
) -> tuple[list[Finding], list[str]]:
    failed = [row for row in rows if row.status == FAILED]
    findings = _names(rows, [row for row in failed if row.outcome in ("dns_failed", "dns_wrong")])
    findings += _opened(
        [row for row in failed if row.flow["expect"] == "closed" and not row.outcome.startswith("dns_")]
    )
    findings += _broken(
        rows, [row for row in failed if row.flow["expect"] == "open" and not row.outcome.startswith("dns_")], answer
    )
    notes = []
    # Nobody is reached past a way in that is closed, and nothing is tried from outside while nobody answers.
    behind = [source for source in missing if way_in in missing and source != way_in]
    behind += [OUTSIDE] if OUTSIDE in missing and len(missing) > 1 and not behind else []
    for source, reason in missing.items():
        # That nobody gets in by SSH is one finding, not two.
        known = next((found for found in findings if any(f"> {source}:22 " in flow for flow in found.flows)), None)
        if source in behind:
            notes.append(f"nothing was tried from {source}, for the same reason")
        elif known:
            known.what += f"; nothing was tried from {source}"
        elif source in optional:
            notes.append(f"nothing was tried from {source}: {reason}")
        else:
            do = f"ansible {source} -m ansible.builtin.ping shows more"
            findings.append(Finding(f"nothing could be tried from {source}: {reason}", do))
    return findings, notes


def _by(rows: Iterable[Row], key: Any) -> list[list[Row]]:
    groups: dict[Any, list[Row]] = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    return list(groups.values())


def _names(rows: Sequence[Row], failed: Sequence[Row]) -> list[Finding]:
    """Names: one finding for a name that is wrong everywhere, else one for each host and name."""
    found = []
    for group in _by(failed, lambda row: row.flow["probe"]["host"]):
        name = group[0].flow["probe"]["host"]
        tried = {row.flow["source"] for row in rows if row.flow["probe"]["host"] == name and row.status != SKIPPED}
        sources = list(dict.fromkeys(row.flow["source"] for row in group))
        where = "everywhere" if len(tried) > 1 and set(sources) == tried else f"on {_join(sources)}"
        do = "look at the host's /etc/hosts and /etc/resolv.conf, and at the VPC's DNS settings and private zones"
        found.append(Finding(f"DNS {where}: {group[0].reason}", do, [row.flow["id"] for row in group]))
    return found


def _opened(failed: Sequence[Row]) -> list[Finding]:
    """Doors that must be closed: one finding for each door."""
    found = []
    for group in _by(failed, lambda row: row.place):
        first = group[0]
        sources = _join(row.flow["source"] for row in group)
        state = "is open" if first.outcome in ANSWERED else "is let through by the security group"
        what = f"{_places(group)} {state} to {sources}"
        do = "take that rule out of its security group, or allow it in nemo_security_groups if it is meant"
        found.append(Finding(what, do, [row.flow["id"] for row in group]))
    return found


def _broken(rows: Sequence[Row], failed: Sequence[Row], answer: str) -> list[Finding]:
    """Flows that must work: what fails for everybody is the target's fault, what fails for some is theirs."""
    found = []
    rest: list[Row] = []
    downs: list[Row] = []
    for group in _by(failed, lambda row: row.place):
        tried = [
            row
            for row in rows
            if row.place == group[0].place and row.flow["expect"] == "open" and row.status != SKIPPED
        ]
        (downs if len(group) == len(tried) else rest).extend(group)
    for group in _by(downs, _cause):
        sources = _join(row.flow["source"] for row in group)
        what = f"{_places(group)} {_says(group[0])}, seen from {sources}"
        found.append(Finding(what, _advice(group[0], answer), [row.flow["id"] for row in group]))
    for group in _by(rest, lambda row: (row.flow["source"], row.outcome)):
        what = f"{group[0].flow['source']} cannot use {_places(group)}, which others can: {_says(group[0])}"
        do = "look at the rules that let it out and those that let it in, at its routes, and at its clock for TLS"
        found.append(Finding(what, do, [row.flow["id"] for row in group]))
    return found


def _cause(row: Row) -> tuple[str, ...]:
    """Equal where one cause is likely: a certificate that several names share, one machine behind several."""
    if row.outcome == "tls":
        return row.outcome, row.reason
    machine = (row.result.get("addresses") or [row.flow["target"]])[0]
    return row.outcome, str(machine), row.reason if row.outcome in ANSWERED else ""


def _places(rows: Iterable[Row]) -> str:
    return _join(
        row.place if row.flow["endpoint"] == row.flow["target"] else f"{row.place} ({row.flow['endpoint']})"
        for row in rows
    )


def _says(row: Row) -> str:
    return {
        "refused": "refuses connections",
        "timeout": "does not answer",
        "unreachable": "cannot be reached",
    }.get(row.outcome, f"is wrong: {row.reason}")


def _advice(row: Row, answer: str) -> str:
    look = LOOK.get(str(row.flow["protocol"]), LOOK["tcp"])
    if row.outcome == "refused":
        # Where groups drop, a refusal is the host's own word.
        return f"nothing listens there: {look}" if answer == DROP else f"{look}; or its security group lets nobody in"
    if row.outcome in ("timeout", "unreachable"):
        return "is the host up? else its security group, a route or a network ACL drops this"
    if row.outcome == "tls":
        return "renew or correct the certificate of that service, or the authority that this host trusts"
    return look


def lines(report: Report) -> list[tuple[str, str]]:
    """(verdict, line) for each flow, in columns."""
    table = [
        (
            row.status,
            row.flow["source"],
            f"-> {row.place}",
            row.flow["endpoint"] if row.flow["endpoint"] != row.flow["target"] else row.flow["protocol"],
            row.flow["expect"],
            "-" if row.result.get("ms") is None else f"{row.result['ms']:.0f} ms",
            row.reason,
        )
        for row in report.rows
    ]
    widths = [max((len(line[column]) for line in table), default=0) for column in range(7)]
    made = []
    for line in table:
        cells = [
            cell.rjust(width) if number == 5 else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(line, widths))
        ]
        made.append((line[0], "  ".join(cells).rstrip()))
    return made


def explained(report: Report) -> list[str]:
    """The findings, numbered, each with what to do."""
    return [f"{number}. {found.what}\n   -> {found.do}" for number, found in enumerate(report.findings, 1)]


def as_data(report: Report, started: str, finished: str) -> dict[str, Any]:
    """For machines: everything that is known of each flow."""
    return {
        "started": started,
        "finished": finished,
        "passed": not report.findings,
        "summary": {status.lower(): report.count(status) for status in (OK, FAILED, UNPROVEN, SKIPPED)},
        "findings": [{"what": found.what, "do": found.do, "flows": found.flows} for found in report.findings],
        "notes": report.notes,
        "flows": [
            {
                **{key: row.flow[key] for key in ("id", "source", "target", "endpoint", "port", "protocol", "expect")},
                "host": row.flow["probe"]["host"],
                "verdict": row.status.lower(),
                "outcome": row.outcome,
                "reason": row.reason,
                **{key: row.result.get(key) for key in ("addresses", "ms", "connect_ms", "days", "attempts")},
            }
            for row in report.rows
        ],
    }


_UNPRINTABLE = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd]")


def as_junit(report: Report) -> bytes:
    """For a CI server: a suite for each source, a case for each flow; findings without a flow are a suite of their own."""

    def clean(text: str) -> str:
        return _UNPRINTABLE.sub("?", text)

    root = ET.Element("testsuites", name="nemo verify")
    totals = {"tests": 0, "failures": 0, "skipped": 0}

    def suite(name: str, cases: list[ET.Element]) -> None:
        counts = {
            "tests": len(cases),
            "failures": sum(case.find("failure") is not None for case in cases),
            "skipped": sum(case.find("skipped") is not None for case in cases),
        }
        element = ET.SubElement(root, "testsuite", name=name, errors="0")
        for key, value in counts.items():
            element.set(key, str(value))
        element.extend(cases)
        for key, value in counts.items():
            totals[key] += value

    for group in _by(report.rows, lambda row: row.flow["source"]):
        cases = []
        for row in group:
            name = f"{row.place} {row.flow['endpoint']} is {row.flow['expect']}"
            seconds = f"{(row.result.get('ms') or 0) / 1000:.4f}"
            case = ET.Element("testcase", classname=row.flow["source"], name=clean(name), time=seconds)
            if row.status == FAILED:
                ET.SubElement(case, "failure", type=row.outcome, message=clean(row.reason))
            elif row.status != OK:
                ET.SubElement(case, "skipped", message=clean(row.reason))
            cases.append(case)
        suite(group[0].flow["source"], cases)
    alone = [found for found in report.findings if not found.flows]
    if alone:
        cases = []
        for found in alone:
            case = ET.Element("testcase", classname="platform", name=clean(found.what.split(":")[0]), time="0")
            ET.SubElement(case, "failure", type="finding", message=clean(f"{found.what} -> {found.do}"))
            cases.append(case)
        suite("platform", cases)
    for key, value in totals.items():
        root.set(key, str(value))
    ET.indent(root)
    return ET.tostring(root, encoding="utf-8", xml_declaration=True) + b"\n"
