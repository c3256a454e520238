"""Verdicts and findings: one cause, one finding; what is closed and unproven is said to be so."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from typing import Any

import pytest

from ansible_collections.nemo.platform.plugins.module_utils import flow_report
from ansible_collections.nemo.platform.plugins.module_utils.flow_report import FAILED, OK, SKIPPED, UNPROVEN


def flow(source: str, target: str, port: int = 443, endpoint: str = "", expect: str = "open", **more: Any) -> Any:
    endpoint = endpoint or target
    identity = f"{source} > {target}:{port} {endpoint}"
    return {
        "id": identity, "source": source, "target": target, "endpoint": endpoint, "port": port,
        "protocol": more.pop("protocol", "tcp"), "expect": expect, "probe": {"host": f"{target}.example", "id": identity},
    }  # fmt: skip


def seen(outcome: str, detail: str = "", address: str = "", **more: Any) -> dict[str, Any]:
    return {"outcome": outcome, "detail": detail, "addresses": [address] if address else [], "ms": 1.5, **more}


def judged(*pairs: tuple[Any, dict[str, Any]], **more: Any) -> flow_report.Report:
    results = {one["id"]: result for one, result in pairs if result}
    return flow_report.judge([one for one, _ in pairs], results, more.pop("missing", {}), **more)


def test_all_is_well() -> None:
    report = judged(
        (flow("node", "db", 3306), seen("open", "MySQL 8.0.42")), (flow("ai", "db", 3306, expect="closed"), seen("timeout"))
    )  # fmt: skip
    assert [row.status for row in report.rows] == [OK, OK]
    assert report.findings == []
    assert report.summary == "2 flows: 2 as the table wants, 0 not; 0 findings"


def test_closed_proves_nothing_where_nothing_listens() -> None:
    report = judged(
        (flow("node", "db", 3306), seen("refused")), (flow("ai", "db", 3306, expect="closed"), seen("timeout"))
    )
    assert [row.status for row in report.rows] == [FAILED, UNPROVEN]
    assert len(report.findings) == 1
    assert "db:3306 refuses connections, seen from node" in report.findings[0].what
    assert "1 closed but not proven" in report.summary


@pytest.mark.parametrize("outcome", ["tls", "protocol"])
def test_a_broken_service_listens_all_the_same(outcome: str) -> None:
    report = judged(
        (flow("node", "db", 3306), seen(outcome)), (flow("ai", "db", 3306, expect="closed"), seen("timeout"))
    )
    assert [row.status for row in report.rows] == [FAILED, OK]


def test_another_port_of_the_host_proves_nothing() -> None:
    report = judged((flow("a", "h", 22), seen("open")), (flow("b", "h", 23, expect="closed"), seen("timeout")))
    assert report.rows[1].status == UNPROVEN


def test_a_refusal_shows_an_open_group_where_groups_drop() -> None:
    pairs = [(flow("node", "h", 80), seen("open")), (flow("ai", "h", 80, expect="closed"), seen("refused"))]
    assert judged(*pairs, answer="reject").findings == []
    (finding,) = judged(*pairs, answer="drop").findings
    assert finding.what == "h:80 is let through by the security group to ai"


def test_open_and_must_not_be_is_one_finding_for_all_who_get_in() -> None:
    report = judged(
        (flow("bastion", "prod", 22, "ssh"), seen("open")),
        (flow("outside", "prod", 22, "ssh", "closed"), seen("open")),
        (flow("dev", "prod", 22, "ssh", "closed"), seen("open")),
        (flow("dev", "prod", 8000, "ai-prod", "closed"), seen("open")),
    )
    assert [finding.what for finding in report.findings] == [
        "prod:22 (ssh) is open to outside, dev",
        "prod:8000 (ai-prod) is open to dev",
    ]
    assert report.findings[0].flows == ["outside > prod:22 ssh", "dev > prod:22 ssh"]


def test_what_fails_for_one_is_its_own() -> None:
    report = judged(
        (flow("a", "ec2-api"), seen("timeout")), (flow("a", "sts-api"), seen("timeout")),
        (flow("b", "ec2-api"), seen("open")), (flow("b", "sts-api"), seen("open")),
    )  # fmt: skip
    (finding,) = report.findings
    assert finding.what == "a cannot use ec2-api:443, sts-api:443, which others can: does not answer"


def test_one_machine_or_certificate_behind_several_names_is_one_finding() -> None:
    names = ("ec2-api", "sts-api")
    down = judged(*((flow("a", name), seen("refused", address="10.0.0.10")) for name in names))
    assert [finding.what for finding in down.findings] == ["ec2-api:443, sts-api:443 refuses connections, seen from a"]
    expired = judged(
        *((flow("a", name), seen("tls", "expired", address=f"10.0.0.{number}")) for number, name in enumerate(names))
    )
    assert len(expired.findings) == 1
    apart = judged(
        *((flow("a", name), seen("refused", address=f"10.0.0.{number}")) for number, name in enumerate(names))
    )
    assert len(apart.findings) == 2


def test_wrong_names() -> None:
    wrong = seen("dns_wrong", "it is 192.0.2.1")
    report = judged((flow("a", "db", expect="closed"), wrong), (flow("b", "db"), seen("open")))
    (finding,) = report.findings
    assert finding.what == "DNS on a: it is 192.0.2.1"
    report = judged((flow("a", "db", expect="closed"), wrong), (flow("b", "db"), wrong))
    assert report.findings[0].what == "DNS everywhere: it is 192.0.2.1"


def test_a_private_name_leads_to_the_same_place_everywhere() -> None:
    def named(source: str, *addresses: str, within: bool = True, expect: str = "open", **more: Any) -> Any:
        one = flow(source, "db", 3306, expect=expect, **more)
        one["probe"]["within"] = ["10.0.0.0/16"] if within else []
        return one, {**seen("open" if expect == "open" else "timeout"), "addresses": list(addresses)}

    right = [named("a", "10.0.3.50"), named("b", "10.0.3.50", expect="closed")]
    report = judged(*right, named("c", "10.0.3.51", expect="closed"))
    (finding,) = report.findings
    assert finding.what == "DNS on c: db.example is 10.0.3.51 here, and 10.0.3.50 elsewhere"
    assert finding.flows == ["c > db:3306 db"]
    # several addresses in any order, of which each host is given some
    assert judged(*right, named("c", "10.0.3.51", "10.0.3.50")).findings == []
    # Amazon's public names lead everybody elsewhere
    public = [named(source, f"10.0.3.{number}", within=False) for number, source in enumerate("abc")]
    assert judged(*public).findings == []


def test_a_host_without_login() -> None:
    flows: Any = (flow("a", "db"), {}), (flow("bastion", "a", 22, "ssh"), seen("open"))
    report = judged(*flows, missing={"a": "no key"})
    assert [row.status for row in report.rows] == [SKIPPED, OK]
    assert report.findings[0].what == "nothing could be tried from a: no key"
    report = judged(*flows, missing={"a": "no key"}, optional=["a"])
    assert report.findings == []
    assert report.notes == ["nothing was tried from a: no key"]


def test_a_way_in_that_is_closed_is_one_finding() -> None:
    flows: list[Any] = [(flow(source, "db"), {}) for source in ("bastion", "a", "outside")]
    missing = {"a": "broke off", "bastion": "no key", "outside": "nobody answered"}
    report = judged(*flows, missing=missing, way_in="bastion")
    assert [finding.what for finding in report.findings] == ["nothing could be tried from bastion: no key"]
    assert len(report.notes) == 2
    # on the Bastion itself each host is reached, or not, for itself
    report = judged(*flows[:2], missing={"a": "broke off", "bastion": "no key"})
    assert len(report.findings) == 2
    # with one host asked that did not answer, the outside is no finding of its own
    report = judged(flows[1], flows[2], missing={"a": "broke off", "outside": "nobody answered"}, way_in="bastion")
    assert [finding.what for finding in report.findings] == ["nothing could be tried from a: broke off"]


def test_a_host_whose_ssh_is_down_is_one_finding() -> None:
    report = judged(
        (flow("a", "db"), {}), (flow("bastion", "a", 22, "ssh", protocol="ssh"), seen("refused")), missing={"a": "refused"}
    )  # fmt: skip
    (finding,) = report.findings
    assert finding.what == "a:22 (ssh) refuses connections, seen from bastion; nothing was tried from a"


def test_a_lost_result_is_no_success() -> None:
    report = judged((flow("a", "db"), {}), (flow("b", "db", expect="closed"), {}))
    assert [row.status for row in report.rows] == [FAILED, FAILED]


def test_an_address_that_nobody_knows() -> None:
    report = judged((flow("a", "db"), seen("open")), unknown={"cluster-api": "may not ask"})
    assert "cluster-api: its address is not known, so it was not tried: may not ask" in report.findings[0].what


def test_lines_are_columns() -> None:
    report = judged(
        (flow("a", "h", 80, "web"), seen("open", "HTTP 200")), (flow("long-name", "h", 80, "web", "closed"), seen("open"))
    )  # fmt: skip
    (first, one), (second, two) = flow_report.lines(report)
    assert (first, second) == (OK, FAILED)
    assert one == "ok    a          -> h:80  web  open    2 ms  HTTP 200"
    assert two == "FAIL  long-name  -> h:80  web  closed  2 ms  open, and must be closed"
    assert flow_report.explained(report) == [f"1. {report.findings[0].what}\n   -> {report.findings[0].do}"]


def test_for_machines() -> None:
    report = judged(
        (flow("a", "h", 80, "web"), seen("protocol", "says \x00\x1b <html>")),
        (flow("b", "h", 80, "web", "closed"), seen("timeout")),
        (flow("c", "x", 80, "web", "closed"), seen("timeout")),
        unknown={"db": "nobody knows"},
    )
    data = json.loads(json.dumps(flow_report.as_data(report, "then", "now")))
    assert data["passed"] is False
    assert data["summary"] == {"ok": 1, "fail": 1, "unproven": 1, "skipped": 0}
    assert data["flows"][0]["host"] == "h.example"
    assert data["flows"][0]["verdict"] == "fail"
    root = ET.fromstring(flow_report.as_junit(report))  # noqa: S314 - our own
    assert root.attrib == {"name": "nemo verify", "tests": "4", "failures": "2", "skipped": "1"}
    assert [suite.get("name") for suite in root] == ["a", "b", "c", "platform"]
    failure = root.find("./testsuite[@name='a']/testcase/failure")
    assert failure is not None
    assert failure.get("message") == "says ?? <html>"
    assert root.find("./testsuite[@name='c']/testcase/skipped") is not None
