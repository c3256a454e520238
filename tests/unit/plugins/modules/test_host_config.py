# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""host_config against a temporary folder and a small stand-in for systemctl."""

from __future__ import annotations

import grp
import json
import os
import pwd
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible.module_utils.testing import patch_module_args

from ansible_collections.nemo.platform.plugins.module_utils import host_files, systemd_units
from ansible_collections.nemo.platform.plugins.modules import host_config

OWNER = pwd.getpwuid(os.getuid()).pw_name
GROUP = grp.getgrgid(os.getgid()).gr_name

# Units are JSON files; every call is logged, so that a test can say what systemd was asked to do.
SYSTEMCTL = r"""#!{python} -S
import json, os, pathlib, sys, time
root = pathlib.Path("{root}")
args = sys.argv[1:]
with (root / "calls").open("a") as log:
    print(" ".join(args), "offline" if os.environ.get("SYSTEMD_OFFLINE") == "1" else "", file=log)
def load(name):
    file = root / (name + ".unit")
    return json.loads(file.read_text()) if file.exists() else None
def save(name, unit):
    (root / (name + ".unit")).write_text(json.dumps(unit))
verb, names = args[0], [a for a in args[1:] if not a.startswith("-")]
if verb == "show":
    for number, name in enumerate(names):
        unit = load(name) or {{"LoadState": "not-found", "ActiveState": "inactive"}}
        print(("\n" if number else "") + "\n".join(f"{{k}}={{v}}" for k, v in unit.items() if k != "behaviour"))
    sys.exit(0)
if verb == "daemon-reload":
    for file in root.glob("*.unit"):
        unit = json.loads(file.read_text())
        unit["NeedDaemonReload"] = "no"
        file.write_text(json.dumps(unit))
    sys.exit(0)
name = names[0]
unit = load(name)
if unit is None:
    sys.exit(f"Unit {{name}} not found.")
if verb == "is-enabled":
    print(unit["UnitFileState"])
    sys.exit(unit["UnitFileState"] != "enabled")
if verb in ("enable", "disable"):
    unit["UnitFileState"] = verb + "d"
elif verb in ("start", "restart"):
    if unit["behaviour"] == "kill":
        os.kill(os.getppid(), 9)
        sys.exit(1)
    unit["ConditionTimestampMonotonic"] = "1"
    if unit["behaviour"] == "fails":
        unit["ActiveState"], unit["SubState"] = "failed", "failed"
    elif unit["behaviour"] == "condition":
        unit["ConditionResult"] = "no"
        unit["ActiveState"] = "inactive"
    else:
        unit["ConditionResult"] = "yes"
        unit["ActiveState"], unit["SubState"] = "active", "running"
        unit["ActiveEnterTimestampMonotonic"] = str(int(time.clock_gettime(time.CLOCK_MONOTONIC) * 1000000))
elif verb == "stop":
    unit["ActiveState"] = "inactive"
save(name, unit)
if unit["ActiveState"] == "failed" and verb in ("start", "restart"):
    sys.exit(f"Job for {{name}} failed.")
"""


class Host:
    """A temporary host: a folder for files, units, and runs of the module."""

    def __init__(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.root = root
        self.etc = root / "etc"
        self.units = root / "systemd"
        self.run_directory = root / "run"
        self.state_directory = root / "state"
        self._capsys = capsys
        self.etc.mkdir()
        self.units.mkdir()

    def program(self, name: str, text: str) -> None:
        path = self.root / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def unit(self, name: str, behaviour: str = "works", **properties: str) -> None:
        values = {
            "LoadState": "loaded",
            "ActiveState": "inactive",
            "SubState": "dead",
            "Type": "notify",
            "UnitFileState": "disabled",
            "NeedDaemonReload": "no",
            "ConditionResult": "no",
            "ConditionTimestampMonotonic": "0",
            "ActiveEnterTimestampMonotonic": "0",
            "behaviour": behaviour,
        }
        (self.units / f"{name}.unit").write_text(json.dumps({**values, **properties}))

    def active_unit(self, name: str, seconds_ago: float = 0, behaviour: str = "works", **properties: str) -> None:
        started = time.clock_gettime(time.CLOCK_MONOTONIC) - seconds_ago
        properties = {
            "ActiveState": "active",
            "SubState": "running",
            "UnitFileState": "enabled",
            "ActiveEnterTimestampMonotonic": str(int(started * 1_000_000)),
            **properties,
        }
        self.unit(name, behaviour, **properties)

    def state_of(self, name: str) -> dict[str, str]:
        return dict(json.loads((self.units / f"{name}.unit").read_text()))

    def calls(self) -> list[str]:
        log = self.units / "calls"
        lines = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return [line.strip() for line in lines if not line.startswith("show")]

    def arguments(self, **arguments: Any) -> dict[str, Any]:
        for kind in ("files", "directories"):
            for entry in arguments.get(kind, []):
                entry.setdefault("owner", OWNER)
                entry.setdefault("group", GROUP)
        return arguments

    def run(self, check: bool = False, ok: bool = True, **arguments: Any) -> dict[str, Any]:
        internal = {"_ansible_check_mode": check, "_ansible_diff": True, "_ansible_inject_invocation": True}
        with patch_module_args({**self.arguments(**arguments), **internal}), pytest.raises(SystemExit) as ended:
            host_config.main()
        output = self._capsys.readouterr().out
        result: dict[str, Any] = json.loads(output)
        assert (ended.value.code == 0) is ok, output
        assert not list(self.root.rglob(".nemo-*")), "staged files were left behind"
        return result


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Host:
    machine = Host(tmp_path, capsys)
    machine.program("systemctl", SYSTEMCTL.format(python=sys.executable, root=machine.units))
    machine.program("journalctl", "#!/bin/sh\necho 'daemon says: cannot bind'\n")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr(host_config, "RUN_DIRECTORY", str(machine.run_directory))
    monkeypatch.setattr(host_config, "STATE_DIRECTORY", str(machine.state_directory))
    monkeypatch.setattr(systemd_units, "is_running", lambda: True)
    monkeypatch.setattr(systemd_units, "SETTLE_SECONDS", 0)
    return machine


# Files


def test_file_and_directory_are_created_then_left_alone(host: Host) -> None:
    path = host.etc / "app" / "conf"
    arguments: dict[str, Any] = {
        "directories": [{"path": str(path.parent), "mode": "0700"}],
        "files": [{"path": str(path), "content": "a = 1\n", "mode": "0600"}],
    }
    result = host.run(**arguments)
    assert result["changed"]
    assert result["changed_paths"] == [str(path.parent), str(path)]
    assert path.read_text() == "a = 1\n"
    assert path.stat().st_mode & 0o7777 == 0o600
    assert path.parent.stat().st_mode & 0o7777 == 0o700
    again = host.run(**arguments)
    assert not again["changed"]
    assert again["diff"] == []


def test_content_is_replaced_by_a_new_file(host: Host) -> None:
    path = host.etc / "conf"
    path.write_text("old\n")
    with path.open() as reader:
        host.run(files=[{"path": str(path), "content": "new\n"}])
        assert reader.read() == "old\n", "a reader of the old file must not see a half-written new one"
    assert path.read_text() == "new\n"


def test_new_content_never_appears_with_the_old_mode(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    path = host.etc / "secret"
    path.write_text("old")
    path.chmod(0o644)
    modes: list[int] = []
    rename = os.rename

    def watched(source: str, target: str) -> None:
        modes.append(Path(source).stat().st_mode & 0o7777)
        rename(source, target)

    monkeypatch.setattr(host_files.os, "rename", watched)
    host.run(files=[{"path": str(path), "content": "new", "mode": "0600"}])
    assert modes == [0o600]


def test_mode_alone_is_a_change(host: Host) -> None:
    path = host.etc / "conf"
    path.write_text("x")
    path.chmod(0o644)
    result = host.run(files=[{"path": str(path), "content": "x", "mode": "0600"}])
    assert result["changed_paths"] == [str(path)]
    assert result["diff"][0]["before"] == "mode: 0644\n"
    assert result["diff"][0]["after"] == "mode: 0600\n"
    assert path.stat().st_mode & 0o7777 == 0o600


def test_failed_validation_replaces_nothing_at_all(host: Host) -> None:
    good, bad = host.etc / "good", host.etc / "bad"
    good.write_text("old good")
    bad.write_text("old bad")
    result = host.run(
        ok=False,
        files=[
            {"path": str(good), "content": "new good", "validate": "grep good %s"},
            {"path": str(bad), "content": "new bad", "validate": "grep --line-number something-else %s"},
        ],
    )
    assert good.read_text() == "old good"
    assert bad.read_text() == "old bad"
    assert result["path"] == str(bad)
    assert f"{bad}: not valid, nothing was replaced" in result["msg"]
    assert "grep --line-number something-else" in result["msg"]


def test_validate_sees_name_and_final_mode_and_says_why(host: Host) -> None:
    host.program(
        "lint",
        '#!/bin/sh\ncase $1 in *-app.service) ;; *) exit 3;; esac\nstat -c %a "$1"; echo "bad: $1" >&2; exit 1\n',
    )
    path = host.etc / "app.service"
    result = host.run(ok=False, files=[{"path": str(path), "content": "x", "validate": "lint %s"}])
    assert "status 1" in result["msg"]
    assert f"bad: {path}" in result["msg"], "the real path is named, not the staged one"


def test_validation_runs_in_check_mode_too(host: Host) -> None:
    path = host.etc / "conf"
    result = host.run(check=True, ok=False, files=[{"path": str(path), "content": "x", "validate": "false %s"}])
    assert "not valid" in result["msg"]


def test_validator_that_is_not_installed(host: Host) -> None:
    entry = {"path": str(host.etc / "conf"), "content": "x", "validate": "no-such-validator %s"}
    assert host.run(check=True, files=[dict(entry)])["changed"]
    assert "'no-such-validator' is not installed" in host.run(ok=False, files=[dict(entry)])["msg"]


def test_json_merge_keeps_foreign_keys(host: Host) -> None:
    path = host.etc / "config.json"
    path.write_text('{"auths": {"a": {"auth": "x"}}, "credHelpers": {"b": "pass", "gone": "x"}}')
    entry = {"path": str(path), "content_json": {"credHelpers": {"c": "ecr-login", "gone": None}}, "merge": True}
    assert host.run(files=[dict(entry)])["changed"]
    assert json.loads(path.read_text()) == {
        "auths": {"a": {"auth": "x"}},
        "credHelpers": {"b": "pass", "c": "ecr-login"},
    }
    assert not host.run(files=[dict(entry)])["changed"]


def test_json_merge_leaves_another_layout_alone(host: Host) -> None:
    path = host.etc / "config.json"
    path.write_text('{"a":1,\n "b":2}')
    assert not host.run(files=[{"path": str(path), "content_json": {"a": 1}, "merge": True, "mode": "0644"}])["changed"]
    assert path.read_text() == '{"a":1,\n "b":2}'


@pytest.mark.parametrize("text", ["{broken", "[1]"])
def test_json_merge_refuses_what_is_no_object(host: Host, text: str) -> None:
    path = host.etc / "config.json"
    path.write_text(text)
    result = host.run(ok=False, files=[{"path": str(path), "content_json": {"a": 1}, "merge": True}])
    assert result["msg"].startswith(str(path))
    assert path.read_text() == text


def test_json_without_merge_owns_the_file(host: Host) -> None:
    path = host.etc / "daemon.json"
    path.write_text('{"foreign": true, "a": 1}')
    host.run(files=[{"path": str(path), "content_json": {"a": True}}])
    assert path.read_text() == '{\n  "a": true\n}\n'


def test_true_is_not_one(host: Host) -> None:
    path = host.etc / "daemon.json"
    path.write_text('{"a": 1}')
    assert host.run(files=[{"path": str(path), "content_json": {"a": True}}])["changed"]


def test_absent(host: Host) -> None:
    path = host.etc / "conf"
    path.write_text("x\n")
    entry = {"path": str(path), "state": "absent"}
    checked = host.run(check=True, files=[dict(entry)])
    assert checked["changed"]
    assert path.exists()
    result = host.run(files=[dict(entry)])
    assert result["changed_paths"] == [str(path)]
    assert result["diff"] == [{"before": "x\n", "after": "", "before_header": str(path), "after_header": "/dev/null"}]
    assert not path.exists()
    assert not host.run(files=[dict(entry)])["changed"]


def test_link_becomes_a_file(host: Host) -> None:
    target, path = host.etc / "target", host.etc / "conf"
    target.write_text("x")
    path.symlink_to(target)
    assert host.run(files=[{"path": str(path), "content": "x"}])["changed"]
    assert not path.is_symlink()
    assert target.read_text() == "x"


def test_check_mode_predicts_and_touches_nothing(host: Host) -> None:
    path = host.etc / "new" / "conf"
    old = host.etc / "old"
    old.write_text("one\n")
    arguments: dict[str, Any] = {
        "directories": [{"path": str(path.parent)}],
        "files": [
            {"path": str(path), "content": "x\n", "validate": "grep x %s"},
            {"path": str(old), "content": "two\n"},
        ],
        "units": [{"name": "notyet", "enabled": True, "state": "started", "files": [str(path)]}],
        "commands": [{"argv": ["touch", str(host.etc / "ran")], "files": [str(path)]}],
    }
    before = sorted(host.root.rglob("*"))
    result = host.run(check=True, **arguments)
    host.calls()
    assert sorted(host.root.rglob("*")) == before
    assert old.read_text() == "one\n"
    assert result["changed_paths"] == [str(path.parent), str(path), str(old)]
    assert result["enabled"] == result["started"] == ["notyet.service"]
    assert len(result["commands_run"]) == 1
    shown = {entry["after_header"]: (entry["before"], entry["after"]) for entry in result["diff"]}
    assert shown[str(path)] == ("", "x\n")
    assert shown[str(old)] == ("one\n", "two\n")


def test_diff_and_invocation_hide_secrets(host: Host) -> None:
    path, config = host.etc / "password", host.etc / "config.json"
    path.write_text("old-and-secret")
    config.write_text('{"auths": "foreign-secret"}')
    result = host.run(
        files=[
            {"path": str(path), "content": "new-and-secret", "mode": "0600", "secret": True},
            {"path": str(config), "content_json": {"key": "json-secret"}, "merge": True, "secret": True},
        ]
    )
    text = json.dumps(result)
    for secret in ("old-and-secret", "new-and-secret", "foreign-secret", "json-secret"):
        assert secret not in text
    assert result["diff"][0]["after"] == "(secret, content differs)\n"


def test_failed_validation_of_a_secret_shows_no_output(host: Host) -> None:
    path = host.etc / "password"
    entry = {"path": str(path), "content": "s3cr3t", "validate": "sh -c 'cat $0; exit 1' %s", "secret": True}
    assert "s3cr3t" not in json.dumps(host.run(ok=False, files=[entry]))


def test_leftover_of_a_killed_run_is_removed(host: Host) -> None:
    path = host.etc / "conf"
    (host.etc / ".nemo-abcdefgh-conf").write_text("half")
    host.run(files=[{"path": str(path), "content": "x"}])
    assert sorted(entry.name for entry in host.etc.iterdir()) == ["conf"]


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"path": "relative", "content": "x"}, "must be absolute"),
        ({"path": "/x", "content": "x", "mode": "420"}, "mode '420' must be a quoted octal"),
        ({"path": "/x"}, "one of content and content_json is required"),
        ({"path": "/x", "content": "x", "merge": True}, "merge needs content_json"),
        ({"path": "/x", "content": "x", "validate": "true"}, "validate must contain %s"),
        ({"path": "/no/such/folder/x", "content": "x"}, "directory /no/such/folder does not exist"),
        ({"path": "/", "content": "x"}, "is a directory"),
    ],
)
def test_bad_file_is_named(host: Host, entry: dict[str, Any], said: str) -> None:
    result = host.run(ok=False, files=[entry])
    assert said in result["msg"]
    assert entry["path"] in result["msg"]


def test_unknown_owner_is_named_and_nothing_replaced(host: Host) -> None:
    path = host.etc / "conf"
    path.write_text("old")
    result = host.run(ok=False, files=[{"path": str(path), "content": "x", "owner": "nobody-knows"}])
    assert f"{path}: user 'nobody-knows' does not exist" in result["msg"]
    assert path.read_text() == "old"
    assert host.run(check=True, files=[{"path": str(path), "content": "x", "owner": "nobody-knows"}])["changed"]


def test_same_file_twice_is_refused(host: Host) -> None:
    entry = {"path": str(host.etc / "conf"), "content": "x"}
    assert "listed twice" in host.run(ok=False, files=[dict(entry), dict(entry)])["msg"]


# Commands


def test_command_runs_once_per_content(host: Host) -> None:
    path, log = host.etc / "conf", host.etc / "log"
    command = {"argv": ["sh", "-c", f"echo ran >> {log}"], "files": [str(path)]}
    for content, runs in (("a", 1), ("a", 1), ("b", 2), ("b", 2)):
        result = host.run(files=[{"path": str(path), "content": content}], commands=[command])
        assert len(log.read_text().splitlines()) == runs
        assert result["changed"] is bool(result["commands_run"])


def test_failed_command_runs_again(host: Host) -> None:
    path, gate = host.etc / "conf", host.etc / "gate"
    arguments: dict[str, Any] = {
        "files": [{"path": str(path), "content": "a"}],
        "commands": [{"argv": ["cat", str(gate)], "files": [str(path)]}],
    }
    failed = host.run(ok=False, **arguments)
    assert "ended with status 1" in failed["msg"]
    assert failed["changed_paths"] == [str(path)]
    gate.write_text("")
    assert host.run(**arguments)["commands_run"] == [f"cat {gate}"]
    assert not host.run(**arguments)["changed"]


def test_command_of_files_that_never_were_does_not_run(host: Host) -> None:
    path = str(host.etc / "conf")
    result = host.run(files=[{"path": path, "state": "absent"}], commands=[{"argv": ["false"], "files": [path]}])
    assert not result["changed"]


# Units


def docker(host: Host, content: str = "a", **unit: Any) -> dict[str, Any]:
    path = str(host.etc / "daemon.json")
    return {
        "files": [{"path": path, "content": content}],
        "units": [{"name": "docker", "enabled": True, "state": "started", "files": [path], **unit}],
    }


def test_unit_is_enabled_and_started_then_left_alone(host: Host) -> None:
    host.unit("docker.service")
    result = host.run(**docker(host))
    assert result["enabled"] == result["started"] == ["docker.service"]
    assert result["restarted"] == []
    assert host.calls() == ["enable docker.service", "reset-failed docker.service", "start docker.service"]
    again = host.run(**docker(host))
    assert not again["changed"]
    assert host.calls() == []
    assert not host.run(check=True, **docker(host))["changed"]


def test_changed_file_restarts_once(host: Host) -> None:
    host.active_unit("docker.service")
    result = host.run(**docker(host))
    assert result["restarted"] == ["docker.service"]
    assert host.calls() == ["reset-failed docker.service", "restart docker.service"]
    assert not host.run(**docker(host))["changed"]


def test_changed_file_reloads_or_does_nothing(host: Host) -> None:
    host.active_unit("docker.service")
    assert host.run(**docker(host, on_change="reload"))["reloaded"] == ["docker.service"]
    assert host.calls() == ["reload docker.service"]
    result = host.run(**docker(host, content="b", on_change="none"))
    assert (result["restarted"], result["reloaded"], host.calls()) == ([], [], [])


def test_run_killed_between_write_and_restart_is_finished_by_the_next(host: Host) -> None:
    """The real thing: the module as its own process dies at the moment of the restart."""
    # The unit's start lies after any file change, so that only the stamp can tell.
    host.active_unit("docker.service", seconds_ago=-3600, behaviour="kill")
    script = (
        "import json, sys\n"
        "from ansible.module_utils.testing import patch_module_args\n"
        "from ansible_collections.nemo.platform.plugins.module_utils import systemd_units\n"
        "from ansible_collections.nemo.platform.plugins.modules import host_config\n"
        f"host_config.RUN_DIRECTORY, host_config.STATE_DIRECTORY = {str(host.run_directory)!r}, {str(host.state_directory)!r}\n"
        "systemd_units.is_running = lambda: True\n"
        "with patch_module_args(json.loads(sys.argv[1])):\n"
        "    host_config.main()\n"
    )
    argv = [sys.executable, "-c", script, json.dumps(host.arguments(**docker(host)))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    killed = subprocess.run(argv, env=environment, capture_output=True, text=True, check=False)
    assert killed.returncode == -9, killed.stderr
    assert (host.etc / "daemon.json").read_text() == "a"
    host.active_unit("docker.service", seconds_ago=-3600)
    host.calls()
    assert host.run(check=True, **docker(host))["restarted"] == ["docker.service"]
    assert host.run(**docker(host))["restarted"] == ["docker.service"]
    assert not host.run(**docker(host))["changed"]


def test_unit_older_than_its_file_is_stale_without_a_stamp(host: Host) -> None:
    path = host.etc / "daemon.json"
    path.write_text("a")
    path.chmod(0o644)
    host.active_unit("docker.service", seconds_ago=60)
    assert host.run(**docker(host))["restarted"] == ["docker.service"]


def test_unit_younger_than_its_file_is_fresh_without_a_stamp(host: Host) -> None:
    path = host.etc / "daemon.json"
    path.write_text("a")
    path.chmod(0o644)
    os.utime(path, (time.time() - 60, time.time() - 60))
    host.active_unit("docker.service")
    assert not host.run(**docker(host))["changed"]


def test_failed_restart_names_unit_and_journal_and_is_tried_again(host: Host) -> None:
    host.active_unit("docker.service", behaviour="fails")
    result = host.run(ok=False, **docker(host))
    assert result["unit"] == "docker.service"
    assert "docker.service did not restart: Job for docker.service failed." in result["msg"]
    assert "daemon says: cannot bind" in result["msg"]
    assert result["changed_paths"] == [str(host.etc / "daemon.json")]
    failed = host.state_of("docker.service")
    (host.units / "docker.service.unit").write_text(json.dumps({**failed, "behaviour": "works"}))
    assert host.run(**docker(host))["started"] == ["docker.service"]


def test_process_that_dies_at_once_is_noticed(host: Host) -> None:
    host.unit("docker.service", Type="simple")
    host.program("settle", "")
    real = (host.root / "bin" / "systemctl").read_text()
    # start succeeds, and the state afterwards is a restart loop
    host.program("systemctl", real.replace('"active", "running"', '"activating", "auto-restart"'))
    result = host.run(ok=False, **docker(host))
    assert "state activating/auto-restart" in result["msg"]


def test_unmet_condition_is_neither_error_nor_change(host: Host) -> None:
    host.unit("chrony.service", behaviour="condition", UnitFileState="enabled")
    arguments: dict[str, Any] = {"units": [{"name": "chrony", "enabled": True, "state": "started"}]}
    for check in (False, False, True):
        result = host.run(check=check, **arguments)
        assert not result["changed"]
        assert result["conditions_unmet"] == ["chrony.service"]


def test_missing_unit_is_an_error_but_not_in_check_mode(host: Host) -> None:
    arguments = docker(host)
    assert host.run(check=True, **arguments)["started"] == ["docker.service"]
    result = host.run(ok=False, **arguments)
    assert "docker.service does not exist on this host; is its package installed?" in result["msg"]


def test_missing_unit_that_shall_not_run_is_fine(host: Host) -> None:
    assert not host.run(units=[{"name": "old", "enabled": False, "state": "stopped"}])["changed"]


def test_masked_unit_is_explained(host: Host) -> None:
    host.unit("docker.service", LoadState="masked", UnitFileState="masked")
    assert "systemctl unmask docker.service" in host.run(ok=False, **docker(host))["msg"]


def test_unit_is_stopped_and_disabled_before_its_file_goes(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    path = host.etc / "old.service"
    path.write_text("x")
    monkeypatch.setattr(host_config, "UNIT_FILE_PATHS", (str(host.etc),))
    host.active_unit("old.service")
    arguments: dict[str, Any] = {
        "files": [{"path": str(path), "state": "absent"}],
        "units": [{"name": "old", "enabled": False, "state": "stopped"}],
    }
    result = host.run(**arguments)
    assert result["stopped"] == result["disabled"] == ["old.service"]
    assert host.calls() == ["stop old.service", "disable old.service", "daemon-reload"]
    assert not path.exists()
    assert not host.run(**arguments)["changed"]


def test_daemon_reload_once_for_unit_files_and_after_an_interruption(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_config, "UNIT_FILE_PATHS", (str(host.etc),))
    host.unit("app.service", UnitFileState="enabled")
    files = [str(host.etc / "app.service"), str(host.etc / "app.conf")]
    arguments: dict[str, Any] = {
        "files": [{"path": path, "content": "x"} for path in files],
        "units": [{"name": "app", "enabled": True, "state": "started", "files": files}],
    }
    host.run(**arguments)
    assert host.calls().count("daemon-reload") == 1
    host.run(**arguments)
    assert "daemon-reload" not in host.calls()
    (host.run_directory / "daemon-reload").touch()
    host.run(**arguments)
    assert host.calls() == ["daemon-reload"]
    assert not (host.run_directory / "daemon-reload").exists()
    host.active_unit("app.service", NeedDaemonReload="yes")
    host.run(**arguments)
    assert "daemon-reload" in host.calls()


def test_without_running_systemd_states_are_skipped_and_links_made(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(systemd_units, "is_running", lambda: False)
    host.unit("docker.service")
    result = host.run(**docker(host))
    assert result["skipped_units"] == result["enabled"] == ["docker.service"]
    assert result["started"] == []
    assert host.calls() == ["is-enabled docker.service offline", "enable docker.service offline"]
    assert not host.run(**docker(host))["changed"]


def test_one_show_for_all_units(host: Host) -> None:
    names = [f"unit{number}" for number in range(5)]
    for name in names:
        host.active_unit(f"{name}.service")
    host.run(units=[{"name": name, "enabled": True, "state": "started"} for name in names])
    assert len((host.units / "calls").read_text().splitlines()) == 1


def test_lock_names_itself(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    monkeypatch.setattr(host_config, "LOCK_TIMEOUT_SECONDS", 0)
    host.run_directory.mkdir()
    with (host.run_directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = host.run(ok=False, files=[{"path": str(host.etc / "conf"), "content": "x"}])
    assert "another host_config" in result["msg"]
    assert not (host.etc / "conf").exists()


# The module's own documentation


def _described(options: dict[str, Any]) -> dict[str, Any]:
    return {
        name: {
            "type": option.get("type", "str"),
            "elements": option.get("elements"),
            "required": option.get("required", False),
            "default": option.get("default"),
            "choices": option.get("choices"),
            "options": _described(option.get("options") or option.get("suboptions") or {}),
        }
        for name, option in options.items()
    }


def test_documentation_and_argument_spec_agree() -> None:
    documentation = yaml.safe_load(host_config.DOCUMENTATION)
    assert _described(documentation["options"]) == _described(host_config.ARGUMENT_SPEC)


def test_every_returned_key_is_documented(host: Host) -> None:
    returned = set(host.run()) - {"changed", "diff", "invocation"}
    assert returned <= set(yaml.safe_load(host_config.RETURN))


def test_arguments_stay_out_of_the_system_log(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[str] = []
    monkeypatch.setattr(host_config.QuietModule, "log", lambda _self, text, **_: logged.append(text))
    host.run(files=[{"path": str(host.etc / "conf"), "content": "not-for-the-journal"}])
    assert logged
    assert not re.search("not-for-the-journal", " ".join(logged))
