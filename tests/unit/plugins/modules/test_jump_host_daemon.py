# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Rules of the jump host for old and new daemons, and what counts as proven. Real daemons are Molecule's business."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from ansible_collections.nemo.platform.plugins.modules import jump_host_daemon as module
from ansible_collections.nemo.platform.plugins.modules.jump_host_daemon import Effective, Person

PARAMS: dict[str, Any] = {
    "deploy_user": "ec2-user", "group": "nemo-operators", "keys_directory": "/etc/ssh/authorized_keys.d",
    "permit_open": ["10.0.2.31:22"], "agent_forwarding": False, "idle_seconds": 1800, "alive_seconds": 30,
    "instance_connect": False,
}  # fmt: skip
ALGORITHMS = {"Ciphers": ["aes256-ctr"], "KexAlgorithms": [], "MACs": ["hmac-sha2-512"]}


def rules(*unknown: str, **changed: Any) -> module.Rules:
    return module.make_rules({**PARAMS, **changed}, ALGORITHMS, unknown)


class TestRules:
    def test_everybody_begins_with_nothing(self) -> None:
        everyone = rules().everyone
        assert everyone["AuthorizedKeysFile"] == everyone["AuthorizedKeysCommand"] == "none"
        assert everyone["AllowTcpForwarding"] == "no"
        assert everyone["AllowGroups"] == "nemo-operators"

    def test_an_old_daemon_is_spared_what_it_does_not_know(self) -> None:
        old = rules(*module.YOUNG)
        settings = {**old.everyone, **old.operator, **old.deploy}
        assert not set(settings) & set(module.YOUNG)
        # the only way there to see permitted forwards
        assert settings["LogLevel"] == "DEBUG1"
        assert settings["ChallengeResponseAuthentication"] == "no"

    def test_the_deploy_user_is_never_idle(self) -> None:
        assert not {"ChannelTimeout", "UnusedConnectionTimeout"} & set(rules().deploy)
        assert "ChannelTimeout" in rules().operator
        assert "ChannelTimeout" not in rules(idle_seconds=0).operator

    def test_no_target_is_none(self) -> None:
        assert rules(permit_open=[]).operator["PermitOpen"] == rules(permit_open=[]).deploy["PermitOpen"] == "none"

    def test_inputs(self) -> None:
        assert rules(agent_forwarding=True).operator["AllowAgentForwarding"] == "yes"
        assert "AuthorizedKeysCommand" not in rules(instance_connect=True).everyone

    def test_no_empty_list_of_algorithms(self) -> None:
        assert "KexAlgorithms" not in rules().everyone

    def test_the_deploy_user_comes_first(self) -> None:
        """The first block that matches counts, and the deploy user may be a member of the group."""
        text = module.render(rules(), "ec2-user", "nemo-operators")
        assert text.index("Match User ec2-user\n") < text.index("Match Group nemo-operators\n")
        assert text.endswith("Match all\n")

    def test_targets(self) -> None:
        good = ["10.0.2.31:22", "[fd00::1]:22", "host.example.com:*", "a:1"]
        bad = ["10.0.2.31", ":22", "a:0", "a:65536", "a b:22", "a:22 b:22", "*:22", "a:22\nPermitOpen any"]
        assert module.target_problems(good + bad) == bad


@pytest.mark.parametrize(
    ("user", "interactive", "limit"),
    [("nemo-operators", True, "60"), ("others", True, ""), ("nemo-operators", False, "")],
)
def test_idle_shells(tmp_path: Path, user: str, interactive: bool, limit: str) -> None:
    """Run by a shell whose groups are these."""
    profile = tmp_path / "idle.sh"
    profile.write_text(module.render_profile("nemo-operators", 60))
    tool = tmp_path / "id"
    tool.write_text(f"#!/bin/sh\necho alice {user}\n")
    tool.chmod(0o755)
    script = f'PATH={tmp_path}:$PATH; . {profile}; . {profile}; echo "${{TMOUT-}}"; TMOUT=9 && echo changed'
    argv = ["bash", "--norc", "--noprofile", *(["-i"] if interactive else []), "-c", script]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    assert done.stdout.splitlines()[0] == limit
    assert ("changed" in done.stdout) is not bool(limit)


def effective(settings: dict[str, str], *more: str) -> Effective:
    return Effective.parse("\n".join([*(f"{name.lower()} {value}" for name, value in settings.items()), *more]))


class TestProof:
    def person(self, **changed: Any) -> Person:
        made = rules()
        values: dict[str, Any] = {
            "kind": "operator", "user": "alice", "admitted": True, "settings": {**made.everyone, **made.operator},
            "groups": ("alice", "nemo-operators"), **changed,
        }  # fmt: skip
        return Person(**values)

    def test_what_was_written_arrived(self) -> None:
        person = self.person()
        assert module.deviations(effective(dict(person.settings)), person) == []

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("PasswordAuthentication", "yes"),
            ("PermitRootLogin", "without-password"),
            ("AllowTcpForwarding", "yes"),
            ("PermitOpen", "any"),
            ("PermitOpen", "10.0.2.31:22 10.0.0.1:22"),
            ("AuthorizedKeysFile", "/etc/ssh/authorized_keys.d/%u .ssh/authorized_keys"),
            ("AuthorizedKeysCommand", "/opt/keys"),
            ("Ciphers", "aes256-ctr,3des-cbc"),
            ("LogVerbose", "nothing"),
        ],
    )
    def test_what_did_not_is_named(self, name: str, value: str) -> None:
        person = self.person()
        found = module.deviations(effective({**person.settings, name: value}), person)
        assert found == [(name, value, person.settings[name])]

    def test_comfort_may_differ(self) -> None:
        person = self.person()
        assert (
            module.deviations(effective({**person.settings, "LogLevel": "INFO", "ClientAliveInterval": "9"}), person)
            == []
        )

    def test_the_log_of_an_old_daemon_may_not(self) -> None:
        made = rules(*module.YOUNG)
        person = self.person(settings={**made.everyone, **made.operator})
        found = module.deviations(effective({**person.settings, "LogLevel": "INFO"}), person)
        assert found == [("LogLevel", "INFO", "DEBUG1")]
        assert module.deviations(effective({**person.settings, "LogLevel": "DEBUG3"}), person) == []

    @pytest.mark.parametrize(
        ("lines", "by"),
        [
            (["allowusers bob"], "AllowUsers"),
            (["allowusers alice@10.0.0.1"], "AllowUsers"),
            (["denyusers ali*"], "DenyUsers"),
            (["denyusers alice@*"], "DenyUsers"),
            (["denygroups nemo-*"], "DenyGroups"),
            (["allowgroups wheel"], "AllowGroups"),
            (["allowgroups !alice,*"], "AllowGroups"),
            (["allowusers *"], ""),
            (["allowusers bob", "allowusers al?ce"], ""),
            (["allowgroups wheel", "allowgroups nemo-operators"], ""),
            ([], ""),
        ],
    )
    def test_who_is_let_in(self, lines: list[str], by: str) -> None:
        assert module.refused_by(Effective.parse("\n".join(lines)), "alice", ("alice", "nemo-operators")) == by

    def test_a_stranger_who_is_let_in(self) -> None:
        stranger = self.person(kind="stranger", user="nobody", admitted=False, settings={}, groups=("nogroup",))
        assert module.deviations(effective({"AllowGroups": "nemo-operators"}), stranger) == []
        assert [name for name, _value, _must in module.deviations(effective({}), stranger)] == ["AllowGroups"]
