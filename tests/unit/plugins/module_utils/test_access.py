"""What access.yml is asked for, and what it shows."""

from __future__ import annotations

from typing import Any

import pytest

from ansible_collections.nemo.platform.plugins.module_utils import access
from ansible_collections.nemo.platform.plugins.module_utils.access import AccessError, Inventory

GROUPS = {
    "all": ["bastion-1", "ai-1", "ai-2", "dev-1"],
    "ungrouped": [],
    "bastion": ["bastion-1"],
    "ai": ["ai-1", "ai-2", "dev-1"],
    "ai_prod": ["ai-1", "ai-2"],
    "ai_dev": ["dev-1"],
    "vllm": [],
}
INVENTORY = Inventory(GROUPS, {"ai-prod": "ai_prod", "ai-dev": "ai_dev", "llm": "vllm"})
KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGNzE9rnEQoxuqYy9sJ7UqTpRsz1SSV8dQXwl0a8lRi1 me"


def hosts(what: str, **given: str) -> list[str]:
    return [target.host for target in access.targets(what, given, INVENTORY)]


def test_hosts_of_each_operation() -> None:
    assert hosts("who") == sorted(GROUPS["all"])
    assert hosts("restart", service="ai-prod") == ["ai-1", "ai-2"]
    assert hosts("restart", service="ai-prod", group="ai-2") == ["ai-2"]
    assert hosts("restart", unit="docker", group="ai") == ["ai-1", "ai-2", "dev-1"]
    assert hosts("logs", unit="docker") == sorted(GROUPS["all"])
    assert hosts("run", command="uptime", group="bastion-1") == ["bastion-1"]
    assert hosts("run", command="uptime", group="all") == sorted(GROUPS["all"])


def test_logs_of_several_services() -> None:
    inventory = Inventory({**GROUPS, "ai_dev": ["dev-1", "ai-1"]}, INVENTORY.services)
    found = access.targets("logs", {"service": "ai-prod, ai-dev"}, inventory)
    assert [tuple(target) for target in found] == [
        ("ai-1", ["ai-prod", "ai-dev"]),
        ("ai-2", ["ai-prod"]),
        ("dev-1", ["ai-dev"]),
    ]


@pytest.mark.parametrize(
    ("what", "given", "says"),
    [
        ("restart", {}, r"service is missing; allowed: either -e service=\.\.\. \(ai-dev, ai-prod, llm\) or -e unit="),
        (
            "restart",
            {"service": "ai-pord"},
            "service is 'ai-pord'; allowed: ai-dev, ai-prod, llm; did you mean ai-prod",
        ),
        ("restart", {"service": "ai-prod,ai-dev"}, "service is 'ai-prod,ai-dev'; allowed: one of"),
        ("restart", {"service": "llm"}, "'llm' runs on no host: its group vllm is empty"),
        (
            "restart",
            {"service": "ai-prod", "group": "ai_dev"},
            "no host of group 'ai_dev' runs ai-prod; it runs on ai-1, ai-2",
        ),
        ("restart", {"service": "ai-prod", "unit": "docker"}, "service and unit are both given"),
        (
            "restart",
            {"unit": "docker"},
            "group is missing; allowed: ai, ai_dev, ai_prod, all, bastion, or a host's name",
        ),
        ("restart", {"unit": "ssh.service", "group": "ai"}, "unit is 'ssh.service', which logins depend on"),
        ("restart", {"unit": "x; reboot", "group": "ai"}, "unit is 'x; reboot'; allowed: the name of a systemd unit"),
        (
            "restart",
            {"service": "ai-prod", "since": "10m"},
            "since means nothing to restart; allowed: service, unit, group",
        ),
        ("logs", {"service": "ai-prod", "since": "soon"}, "since is 'soon'; allowed: a time such as 90s"),
        ("logs", {"service": "ai-prod", "lines": "many"}, "lines is 'many'; allowed: 0 to 100000"),
        ("logs", {"service": "ai-prod", "follow": "maybe"}, "follow is 'maybe'; allowed: true or false"),
        ("logs", {"service": "ai-prod", "follow_for": "0"}, "follow_for is '0'; allowed: 1 to 86400"),
        ("logs", {"service": "ai-prod", "grep": "("}, r"grep is '\('; allowed: a regular expression"),
        ("run", {"group": "ai"}, "command is missing; allowed: a command line"),
        (
            "run",
            {"command": "uptime"},
            "group is missing; allowed: ai, ai_dev, ai_prod, all, bastion, or a host's name",
        ),
        ("run", {"command": "uptime", "group": "bastian"}, "group is 'bastian'; allowed: .*; did you mean bastion"),
        ("run", {"command": "uptime", "group": "vllm"}, "group 'vllm' has no host; allowed: ai,"),
    ],
)
def test_one_sentence_with_what_is_allowed(what: str, given: dict[str, str], says: str) -> None:
    with pytest.raises(AccessError, match=says) as error:
        access.targets(what, given, INVENTORY)
    assert "\n" not in str(error.value)


def test_no_host_at_all() -> None:
    with pytest.raises(AccessError, match="the inventory has no host"):
        access.targets("who", {}, Inventory({"all": []}, {}))


def test_one_operation_at_a_time() -> None:
    assert access.operation(["all"]) == ""
    assert access.operation(["who"]) == "who"
    with pytest.raises(AccessError, match="tags are restart, logs; allowed: one of"):
        access.operation(["logs", "restart"])


@pytest.mark.parametrize(
    ("typed", "command"),
    [
        ("command=df -h", "df -h"),
        ("command='df -h'", "df -h"),
        ('command="a  b"', "a  b"),
        ("command=echo 'a' 'b'", "echo 'a' 'b'"),
        ("command=docker ps --format {{.Names}}", "docker ps --format {{.Names}}"),
        ("command=LC_ALL=C date", "LC_ALL=C date"),
    ],
)
def test_a_command_as_it_was_typed(typed: str, command: str) -> None:
    assert access.raw_command(["service=x", typed]) == command


def test_a_command_that_swallowed_another_variable() -> None:
    with pytest.raises(AccessError, match="command ends in 'group=ai'; allowed: each variable with an -e of its own"):
        access.raw_command(["command=uptime group=ai"])
    assert access.raw_command(['{"command": "uptime"}', "group=ai"]) is None


def answer(out: str, status: int = 0, err: str = "") -> dict[str, Any]:
    return {"rc": status, "stdout": out, "stderr": err}


def test_equal_answers_stand_together_the_most_common_one_first() -> None:
    results = {"c": answer("x"), "a": answer("y"), "b": answer("x"), "d": answer("x", 1, "no\x1b[2J")}
    blocks, failed = access.run_blocks(results)
    assert [block.lines[1:] for block in blocks] == [
        ["b, c (2 hosts): status 0", "  x"],
        ["a: status 0", "  y"],
        ["d: status 1", "  x", "  stderr: no"],
    ]
    assert [block.colour for block in blocks] == ["green", "green", "red"]
    assert failed == ["d"]


def test_a_host_that_gave_no_answer_is_a_failure() -> None:
    blocks, failed = access.run_blocks({"a": {"unreachable": True, "msg": "no\nroute"}, "b": answer("x")})
    assert failed == ["a"]
    assert "a: not reachable: no route" in [line for block in blocks for line in block.lines]


def test_check_mode_is_no_failure() -> None:
    blocks, failed = access.run_blocks({"a": {"skipped": True, "msg": "Command would have run if not in check mode"}})
    assert failed == []
    assert blocks[0].lines[1] == "a: not run: Command would have run if not in check mode"


def test_logs_are_merged_and_each_host_has_a_colour() -> None:
    results: dict[str, dict[str, Any]] = {
        "b": {"lines": [["2000000000", "ai", "two"]], "problems": []},
        "a": {
            "lines": [["1000000000", "ai", "one"], ["3000000000", "ai", "three"]],
            "problems": ["ai: no such container"],
        },
    }
    blocks, failed = access.log_blocks(results)
    assert [block.lines[0].rpartition(" ")[2] for block in blocks[:3]] == ["one", "two", "three"]
    assert blocks[0].colour == blocks[2].colour != blocks[1].colour
    assert blocks[3].lines == ["a: ai: no such container"]
    assert failed == ["a"]


def test_a_unit_that_is_on_some_hosts_and_one_that_is_nowhere() -> None:
    there, absent = {"lines": [["1", "x", "one"]], "problems": []}, {"lines": [], "problems": [], "absent": True}
    blocks, failed = access.log_blocks({"a": there, "b": absent})
    assert (blocks[-1].lines, failed) == (["no such unit on b"], [])
    assert access.log_blocks({"a": absent, "b": absent})[1] == ["a", "b"]


def test_no_line_says_so() -> None:
    blocks, failed = access.log_blocks({"a": {"lines": [], "problems": []}})
    assert (blocks[0].lines, failed) == (["no line in that time"], [])


def account(name: str, *fingerprints: str, **changes: Any) -> dict[str, Any]:
    keys = [{"type": "ssh-ed25519", "fingerprint": one, "comment": "me", "file": "/x"} for one in fingerprints]
    whole = {"name": name, "groups": ["nemo-operators"], "sudo": False, "keys": keys, "last_login": {}, "sessions": []}
    return {**whole, **changes}


def test_the_table_of_who_has_access() -> None:
    login = {"at": 1795348800, "from": "10.0.0.1", "key": "SHA256:a"}
    results: dict[str, dict[str, Any]] = {
        "ai-1": {"accounts": [account("ec2-user", "SHA256:z", groups=[], sudo=True)], "unreadable": ["/root/x:3"]},
        "bastion-1": {
            "accounts": [account("alice", "SHA256:a", "SHA256:b", last_login=login, sessions=[{"since": 1795348800}])]
        },
        "gone": {"unreachable": True, "msg": "timed out"},
    }
    blocks, failed = access.who_blocks(
        results, ["bastion-1"], [{"name": "alice", "keys": []}, {"name": "bob", "keys": [KEY]}]
    )
    head, rows, notes = (block.lines for block in blocks)
    assert head[1].split("  ")[0] == "HOST"
    assert [row.split()[:4] for row in rows] == [
        ["bastion-1", "alice", "operator", "no"],
        ["ed25519", "SHA256:b", "me"],
        ["ai-1", "ec2-user", "account", "yes"],
    ]
    assert "2026-11-22 12:00Z 10.0.0.1" in rows[0]
    assert "1, since 2026-11-22 12:00Z" in rows[0]
    assert notes[1:] == [
        "bastion-1: bob is in nemo_operators and no operator here yet",
        "bastion-1: alice has the key SHA256:a, which nemo_operators has not",
        "bastion-1: alice has the key SHA256:b, which nemo_operators has not",
        "ai-1: /root/x:3 is no key",
        "gone: not reachable: timed out",
    ]
    assert failed == ["gone"]


def test_operators_that_are_as_the_inventory_wants_are_no_note() -> None:
    (fingerprint,) = access.wanted_fingerprints([f'from="10.0.0.0/8" {KEY}'])
    assert fingerprint.startswith("SHA256:")
    assert access.who_notes("b", [account("alice", fingerprint)], [{"name": "alice", "keys": [KEY]}]) == []
    stranger = access.who_notes("b", [account("eve", fingerprint)], [])
    assert stranger == ["b: eve is an operator here and not in nemo_operators"]


def test_usage_names_services_and_groups() -> None:
    text = access.usage(INVENTORY)
    assert "services: ai-dev, ai-prod, llm" in text
    assert "groups:   ai, ai_dev, ai_prod, all, bastion" in text
    assert all(f"--tags {name}" in text for name in access.OPERATIONS)


def test_colours_differ_between_hosts() -> None:
    names = [f"h{number}" for number in range(len(access.COLOURS))]
    assert len({access.colour(name, names) for name in names}) == len(names)


def test_an_operator_without_the_key_of_the_inventory_is_a_note() -> None:
    (fingerprint,) = access.wanted_fingerprints([KEY])
    notes = access.who_notes("b", [account("alice")], [{"name": "alice", "keys": [KEY]}])
    assert notes == [f"b: alice has not the key {fingerprint} of nemo_operators"]
