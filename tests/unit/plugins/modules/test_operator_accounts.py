# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""operator_accounts against a folder and made-up accounts: what it asks for, and in which order."""

from __future__ import annotations

import grp
import json
import pwd
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ansible_collections.nemo.platform.plugins.module_utils import host_files, user_processes
from ansible_collections.nemo.platform.plugins.modules import operator_accounts as module
from tests.unit.plugins.module_utils.test_operators import ed25519, rsa


class Host:
    """Accounts by name, groups by name, and the commands that were run on them."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.users: dict[str, int] = {"root": 0, "ec2-user": 1000}
        self.groups: dict[str, list[str]] = {"nemo-operators": []}
        self.shadow: dict[str, tuple[str, str]] = {}
        self.log: list[str] = []
        self.params: dict[str, Any] = {
            "operators": [], "group": "nemo-operators", "groups": [], "shell": "/bin/sh",
            "keys_directory": str(root / "keys"), "record_directory": str(root / "sudo-io"), "record_retention": "90d",
            "rsa_bits": 3072, "own_users": [], "allow_empty": False,
        }  # fmt: skip
        for name, path in {
            "STATE": "state/operators.json", "REMOVED_JOBS": "removed", "LOCK": "lock/lock", "SUDOERS": "sudoers",
            "SUDOERS_DIRECTORY": "sudoers.d", "TMPFILES": "tmpfiles.conf", "SHADOW": "shadow", "LOGIN_DEFS": "login.defs",
            "LINGER": "linger", "SKELETON": "skel", "LOGIND_USERS": "logind",
        }.items():  # fmt: skip
            monkeypatch.setattr(module, name, str(root / path))
        monkeypatch.setattr(module, "CRONTABS", (str(root / "cron"),))
        monkeypatch.setattr(module, "AT_JOBS", ())
        (root / "sudoers.d").mkdir()
        (root / "cron").mkdir()
        (root / "sudoers").write_text(f"root ALL=(ALL) ALL\n#includedir {root / 'sudoers.d'}\n")
        monkeypatch.setattr(pwd, "getpwnam", self._user)
        monkeypatch.setattr(grp, "getgrnam", self._group)
        monkeypatch.setattr(grp, "getgrgid", lambda _gid: None)
        monkeypatch.setattr(grp, "getgrall", lambda: [self._group(name) for name in self.groups])
        # The account that runs the tests owns everything here.
        monkeypatch.setattr(host_files, "require_ids", lambda _path, _owner, _group: (-1, -1))
        monkeypatch.setattr(host_files, "user_id", lambda _name: (root).stat().st_uid)
        monkeypatch.setattr(host_files, "group_id", lambda _name: (root / "cron").stat().st_gid)
        monkeypatch.setattr(host_files, "apply_plan", self._apply(host_files.apply_plan))
        monkeypatch.setattr(module, "owner_of", lambda path: self.users[Path(path).name])
        # Nothing of the machine that runs the tests.
        (root / "proc").mkdir()
        (root / "proc/stat").write_text("btime 0\n")
        nothing = user_processes.Table(str(root / "proc"))
        monkeypatch.setattr(user_processes, "Table", lambda: nothing)
        monkeypatch.setattr(module.Accounts, "_visudo", staticmethod(lambda: "/usr/sbin/visudo"))
        monkeypatch.setattr(module.time, "sleep", lambda _seconds: None)
        monkeypatch.setattr(user_processes, "end", self._end)
        monkeypatch.setattr(module.Accounts, "_end", self._note_end)
        monkeypatch.setattr(module.os, "chown", lambda *_arguments, **_options: None)
        self.running: set[str] = set()

    def _user(self, name: str) -> Any:
        if name not in self.users:
            raise KeyError(name)
        home = str(self.root / "home" / name)
        return SimpleNamespace(pw_name=name, pw_uid=self.users[name], pw_gid=1, pw_dir=home, pw_shell="/bin/sh")

    def _group(self, name: str) -> Any:
        return SimpleNamespace(gr_name=name, gr_mem=self.groups[name], gr_gid=1)

    def _apply(self, real: Any) -> Any:
        def call(plan: Any, label: Any) -> None:
            verb = "write" if plan.after is not None else "remove"
            self.log.append(f"{verb} {Path(plan.spec.path).relative_to(self.root)}")
            real(plan, label)

        return call

    def _end(self, _select: Any, _spared: Any) -> tuple[list[str], list[str]]:
        return [], []

    def _note_end(self, name: str, reason: str, *_more: Any, **_named: Any) -> None:
        self.log.append(f"end {name}: {reason}")

    def run_command(self, argv: list[str], **_options: Any) -> tuple[int, str, str]:
        program = Path(argv[0]).name
        if program == "visudo":  # a stand-in; the real one is Molecule's
            bad = "no rule" in Path(argv[-1]).read_text()
            return int(bad), "", f"{argv[-1]}: syntax error" if bad else ""
        if program == "ssh-keygen":
            done = subprocess.run(argv, capture_output=True, text=True, check=False)
            return done.returncode, done.stdout, done.stderr
        self.log.append(" ".join([program, *argv[1:]]))
        name = argv[-1]
        if program == "useradd":
            self.users[name] = 1001 + len(self.users)
            self.groups["nemo-operators"].append(name)
            self.shadow[name] = ("*", "")
        elif program == "usermod":
            password, expires = self.shadow[name]
            if "--lock" in argv:
                password, expires = "!" + password, "1"
            if "--password" in argv:
                password, expires = "*", ""
            if "--groups" in argv:
                wanted = argv[argv.index("--groups") + 1].split(",")
                for group, members in self.groups.items():
                    members[:] = [one for one in members if one != name] + ([name] if group in wanted else [])
            self.shadow[name] = (password, expires)
        return 0, "", ""

    def run(self, *operators: dict[str, Any], check: bool = False, **params: Any) -> dict[str, Any]:
        self.log.clear()
        self.warnings: list[str] = []
        lines = [f"{name}:{password}:1:0:99999:7::{expires}:\n" for name, (password, expires) in self.shadow.items()]
        (self.root / "shadow").write_text("".join(lines))
        tmpdir = self.root / "tmp"
        tmpdir.mkdir(exist_ok=True)
        fake: Any = SimpleNamespace(
            params={**self.params, "operators": list(operators), **params}, check_mode=check, tmpdir=str(tmpdir),
            run_command=self.run_command, selinux_enabled=lambda: False, warn=self.warnings.append,
        )  # fmt: skip
        accounts = module.Accounts(fake)
        accounts.run()
        return accounts.result


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    monkeypatch.delenv("SUDO_USER", raising=False)
    return Host(tmp_path, monkeypatch)


def operator(name: str, seed: int, sudo: bool = False) -> dict[str, Any]:
    return {"name": name, "keys": [ed25519(seed)], "sudo": sudo}


ADA, BOB = operator("ada", 1), operator("bob", 2)


def test_makes_what_is_missing_and_then_nothing(host: Host) -> None:
    made = host.run(ADA, BOB)
    assert made["changed"]
    assert made["created"] == ["ada", "bob"]
    assert (host.root / "keys/ada").read_text().splitlines()[-1] == ed25519(1)
    assert oct((host.root / "home/ada").stat().st_mode)[-3:] == "700"
    again = host.run(ADA, BOB)
    assert (again["changed"], host.log) == (False, [])


def test_check_mode_says_so_and_touches_nothing(host: Host) -> None:
    said = host.run(ADA, check=True)
    assert said["changed"]
    assert host.log == []
    assert not (host.root / "keys").exists()
    assert not (host.root / "state").exists()


def test_who_leaves_loses_first_what_opens_the_door(host: Host) -> None:
    host.run(ADA, BOB)
    (host.root / "cron/bob").write_text("* * * * * date\n")
    gone = host.run(ADA)
    assert gone["removed"] == ["bob"]
    assert [text[:3] for text in host.warnings] == ["bob"]
    order = [next(i for i, line in enumerate(host.log) if line.startswith(start)) for start in (
        "remove keys/bob", "usermod --lock", "usermod --groups  bob", "end bob: no operator any more",
    )]  # fmt: skip
    assert order == sorted(order)
    assert not (host.root / "cron/bob").exists()
    assert (host.root / "removed/bob-bob").exists()
    assert (host.root / "home/bob").exists()
    # what a run looks at once more: that nothing of his runs
    again = host.run(ADA)
    assert again["changed"] is False
    assert host.warnings == []
    assert host.log == ["end bob: no operator any more"]


def test_who_comes_back_gets_his_account(host: Host) -> None:
    host.run(ADA, BOB)
    host.run(ADA)
    back = host.run(ADA, BOB)
    assert back["created"] == []
    assert host.shadow["bob"] == ("*", "")
    assert "bob" in host.groups["nemo-operators"]


def test_a_member_of_the_group_who_is_not_in_the_list_leaves(host: Host) -> None:
    host.users["eve"] = 1500
    host.shadow["eve"] = ("hash", "")
    host.groups["nemo-operators"].append("eve")
    assert host.run(ADA)["removed"] == ["eve"]


def test_a_key_that_nobody_knows_goes(host: Host) -> None:
    host.run(ADA)
    (host.root / "keys/eve").write_text(ed25519(9))
    assert host.run(ADA)["changed"]
    assert not (host.root / "keys/eve").exists()


def test_a_run_that_is_killed_owes_the_end_of_sessions_to_the_next(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    host.run(ADA, BOB)
    monkeypatch.setattr(module.Accounts, "_end_stale", lambda _self: (_ for _ in ()).throw(SystemExit))
    with pytest.raises(SystemExit):
        host.run(ADA, operator("bob", 3))
    state = json.loads((host.root / "state/operators.json").read_text())
    assert state["ending"] == {"bob": "key"}
    assert (host.root / "keys/bob").read_text().splitlines()[-1] == ed25519(3)
    monkeypatch.undo()


@pytest.mark.parametrize(
    ("operators", "params", "says"),
    [
        ([], {}, "nobody could log in"),
        ([operator("ec2-user", 1)], {}, "ec2-user is an account that was here before"),
        ([{"name": "ada", "keys": [rsa(2048)], "sudo": False}], {}, "RSA key of 2048 bits"),
        ([ADA], {"shell": "/no/shell"}, "shell is /no/shell"),
        ([ADA], {"groups": ["people"]}, "groups has people"),
    ],
)
def test_refuses_before_the_first_change(host: Host, operators: list[Any], params: dict[str, Any], says: str) -> None:
    with pytest.raises(module.AccountError, match=says):
        host.run(*operators, **params)
    assert host.log == []


def test_refuses_to_lock_out_whose_run_it_is(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    host.run(ADA, BOB)
    with pytest.raises(module.AccountError, match="bob is not in the list"):
        host.run(ADA, own_users=["bob"])
    monkeypatch.setenv("SUDO_USER", "bob")
    with pytest.raises(module.AccountError, match="bob is not in the list"):
        host.run(ADA)
    assert host.log == []


def test_refuses_a_system_account_in_the_group(host: Host) -> None:
    host.users["www-data"] = 33
    host.groups["nemo-operators"].append("www-data")
    with pytest.raises(module.AccountError, match=r"www-data .uid 33. is a system's account"):
        host.run(ADA)


def test_refuses_a_home_of_somebody_else(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "owner_of", lambda _path: 5)
    host.users["ada"] = 1600
    host.groups["nemo-operators"].append("ada")
    (host.root / "home/ada").mkdir(parents=True)
    with pytest.raises(module.AccountError, match="exists and is not ada's"):
        host.run(ADA)


def test_a_damaged_memory_is_named(host: Host) -> None:
    (host.root / "state").mkdir()
    (host.root / "state/operators.json").write_text("{")
    with pytest.raises(module.AccountError, match=r"operators\.json is damaged"):
        host.run(ADA)


class TestSudo:
    def test_rules_of_those_who_have_it(self, host: Host) -> None:
        host.run(operator("ada", 1, sudo=True), BOB)
        text = (host.root / "sudoers.d/nemo-operators").read_text()
        assert "ada ALL=(ALL:ALL) NOPASSWD: ALL\n" in text
        assert "bob" not in text
        assert "log_input, log_output" in text
        host.run(ADA, BOB)
        assert not (host.root / "sudoers.d/nemo-operators").exists()
        assert "end ada: no sudo any more" in host.log

    def test_a_clash_with_other_rules_is_found_before(self, host: Host) -> None:
        (host.root / "sudoers.d/zz-broken").write_text("this is no rule\n")
        with pytest.raises(module.AccountError, match="visudo refuses all rules together"):
            host.run(operator("ada", 1, sudo=True))
        assert host.log == []

    def test_rules_that_are_not_read_are_an_error(self, host: Host) -> None:
        (host.root / "sudoers").write_text("root ALL=(ALL) ALL\n")
        with pytest.raises(module.AccountError, match="does not include"):
            host.run(operator("ada", 1, sudo=True))
