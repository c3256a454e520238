"""Revisions on a host: unpacked, switched, pruned, gone back to, and what an interrupted run leaves."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ansible_collections.nemo.platform.plugins.module_utils.workspace_source import look, pack
from ansible_collections.nemo.platform.plugins.modules import workspace
from ansible_collections.nemo.platform.plugins.modules.workspace import Workspace, WorkspaceError
from tests.unit.helpers import ROOT

TOOL = ROOT / "roles/operations_workspace/files/workspace.py"


class Killed(BaseException):
    """SIGKILL: nothing after it runs."""


class Host:
    """A workspace in a folder; its environments are made without pip."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.path = folder, folder / "workspace"
        self.project = folder / "project"
        (self.project / "requirements").mkdir(parents=True)
        (self.project / "requirements/controller.txt").write_text("a==1 --hash=sha256:0\n")
        self.python = folder / "python/1/bin/python3"
        self.made: list[str] = []
        self.commands: list[list[str]] = []
        self.use_python("1")
        monkeypatch.setattr(workspace.grp, "getgrnam", lambda name: SimpleNamespace(gr_gid=os.getgid()))

    def use_python(self, version: str) -> None:
        real = self.folder / f"python/{version}/bin/python3"
        real.parent.mkdir(parents=True)
        real.write_text("")
        current = self.folder / "python/current"
        current.unlink(missing_ok=True)
        current.symlink_to(version)
        self.python = current / "bin/python3"

    def source(self, text: str) -> str:
        (self.project / "site.yml").write_text(text)
        found = look(str(self.project))
        pack(found, str(self.folder / f"{found.revision}.tar"))
        return found.revision

    def pip(self, command: list[str], environ_update: dict[str, str]) -> tuple[int, str, str]:
        """What python -m venv and pip leave."""
        self.commands.append(command)
        if "venv" in command:
            target = Path(command[-1]) / "bin/python3"
            target.parent.mkdir(parents=True)
            target.symlink_to(command[0])
            self.made.append(Path(command[-1]).name)
        return 0, "", ""

    def run(
        self, revision: str, archive: bool = True, sent: bool = True, check: bool = False, **more: Any
    ) -> dict[str, Any]:
        parameters = {name: spec.get("default") for name, spec in workspace.ARGUMENTS.items()}
        parameters |= {
            "path": str(self.path), "group": "operators", "revision": revision, "python": str(self.python), "disk_free": 0, "sent": sent,
            "lock_wait": 0, "archive": str(self.folder / f"{revision}.tar") if archive else None, **more,
        }  # fmt: skip
        module: Any = SimpleNamespace(params=parameters, check_mode=check, run_command=self.pip)
        return Workspace(module).converge()

    @property
    def current(self) -> str:
        return (self.path / "current").readlink().name

    def revisions(self) -> set[str]:
        return {path.name for path in (self.path / "releases").iterdir()}


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    return Host(tmp_path, monkeypatch)


def test_asks_for_the_archive_only_where_it_is_missing(host: Host) -> None:
    first = host.source("one")
    assert host.run(first, archive=False)["archive_needed"] is True
    assert not host.path.exists()
    done = host.run(first)
    assert (done["changed"], done["archive_needed"], host.current) == (True, False, first)
    assert (host.path / "current/site.yml").read_text() == "one"
    assert (host.path / "current/environment/complete").exists()
    again = host.run(first, archive=False)
    assert (again["changed"], again["archive_needed"]) == (False, False)
    assert len(host.made) == 1


def test_folder_is_for_the_group_alone(host: Host) -> None:
    revision = host.source("one")
    host.run(revision)
    assert host.path.stat().st_mode & 0o777 == 0o750
    host.path.chmod(0o755)
    assert host.run(revision, archive=False)["changed"] is True
    assert host.path.stat().st_mode & 0o777 == 0o750


def test_check_mode_touches_nothing(host: Host) -> None:
    done = host.run(host.source("one"), archive=False, check=True)
    assert done["changed"] is True
    assert not host.path.exists()


def test_other_content_shares_the_environment(host: Host) -> None:
    host.run(host.source("one"))
    second = host.source("two")
    assert host.run(second)["previous"] != second
    assert (len(host.made), host.current) == (1, second)


def test_new_lock_is_a_new_environment_and_the_old_one_stays(host: Host) -> None:
    first = host.source("one")
    host.run(first)
    (host.project / "requirements/controller.txt").write_text("a==2 --hash=sha256:0\n")
    host.run(host.source("one"))
    assert len(set(host.made)) == 2
    assert (host.path / "releases" / first / "environment/complete").exists()


def test_new_python_is_a_new_environment_for_the_same_revision(host: Host) -> None:
    revision = host.source("one")
    host.run(revision)
    host.use_python("2")
    assert host.run(revision, archive=False)["changed"] is True
    interpreter = os.path.realpath(host.path / "current/environment/bin/python3")
    assert interpreter.endswith("python/2/bin/python3")
    assert len(list((host.path / "environments").iterdir())) == 1


def test_keeps_the_last_ones(host: Host) -> None:
    made = []
    for number in range(5):
        made.append(host.source(str(number)))
        host.run(made[-1])
    assert host.revisions() == set(made[-3:])


def test_never_removes_what_a_run_uses(host: Host) -> None:
    first = host.source("one")
    host.run(first)
    with (host.path / "releases" / first / "REVISION").open() as used:
        fcntl.flock(used, fcntl.LOCK_SH)
        for number in range(4):
            host.run(host.source(str(number)))
        assert first in host.revisions()
    done = host.run(host.source("last"))
    assert f"releases/{first}" in done["removed"]


def test_goes_back_and_forth(host: Host) -> None:
    first = host.source("one")
    host.run(first)
    second = host.source("two")
    host.run(second)
    assert host.run(first, archive=False, sent=False)["changed"] is True
    assert host.current == first
    with pytest.raises(WorkspaceError, match=f"revision nothing is not on this host; there are: {first}, {second}"):
        host.run("nothing", archive=False, sent=False)
    assert host.current == first


@pytest.mark.parametrize("point", ["unpack", "venv", "install", "complete", "link", "switch"])
def test_interrupted_run_is_finished_by_the_next(host: Host, monkeypatch: pytest.MonkeyPatch, point: str) -> None:
    first = host.source("one")
    host.run(first)
    (host.project / "requirements/controller.txt").write_text("a==2 --hash=sha256:0\n")
    second = host.source("two")
    with monkeypatch.context() as patch:
        pip = host.pip

        def killed(*_arguments: Any, **_more: Any) -> Any:
            raise Killed

        def killed_in_pip(command: list[str], environ_update: dict[str, str]) -> tuple[int, str, str]:
            if point in command:
                raise Killed
            return pip(command, environ_update)

        if point == "unpack":
            patch.setattr(workspace.os, "rename", killed)
        elif point in ("venv", "install"):
            patch.setattr(host, "pip", killed_in_pip)
        elif point == "complete":
            patch.setattr(workspace, "write_atomically", killed)
        else:
            real, calls = workspace.link_atomically, []

            def link(path: str, target: str) -> None:
                calls.append(path)
                if len(calls) == (1 if point == "link" else 2):
                    raise Killed
                real(path, target)

            patch.setattr(workspace, "link_atomically", link)
        with pytest.raises(Killed):
            host.run(second)
    assert host.current == first
    assert (host.path / "current/environment/complete").exists()
    needed = host.run(second, archive=False)
    if needed["archive_needed"]:
        assert point == "unpack"
        host.run(second)
    assert host.current == second
    assert (host.path / "current/environment/complete").exists()
    assert not list(host.path.rglob("*.new"))
    assert host.run(second, archive=False)["changed"] is False


def test_second_run_is_told_who_holds_the_lock(host: Host) -> None:
    host.run(host.source("one"))
    with (host.path / ".lock").open("a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write("process 4711 of alice, since 2026-11-22T13:00:00+00:00")
        lock.flush()
        with pytest.raises(WorkspaceError, match="process 4711 of alice, since 2026"):
            host.run(host.source("two"))


def test_full_disk_is_said_before_anything_is_made(host: Host) -> None:
    revision = host.source("one")
    with pytest.raises(WorkspaceError, match=r"the Python environment needs 999999999 MiB below .*MiB are free"):
        host.run(revision, disk_free=999999999)
    assert host.made == []


def test_pip_takes_what_is_hashed_from_one_index(host: Host) -> None:
    host.run(host.source("one"), index_url="http://10.0.0.12:8080/simple/")
    (install,) = [command for command in host.commands if "install" in command]
    assert {"--require-hashes", "--only-binary=:all:", "--index-url=http://10.0.0.12:8080/simple/"} <= set(install)
    assert "--trusted-host=10.0.0.12:8080" in install


def test_pip_failure_is_told_and_changes_nothing(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    first = host.source("one")
    host.run(first)
    (host.project / "requirements/controller.txt").write_text("a==2 --hash=sha256:0\n")
    monkeypatch.setattr(
        host, "pip", lambda command, environ_update: (1, "", "ERROR: THESE PACKAGES DO NOT MATCH THE HASHES")
    )
    with pytest.raises(WorkspaceError, match="DO NOT MATCH THE HASHES"):
        host.run(host.source("two"))
    assert host.current == first


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"revision": "../x"}, "revision '../x' is none"),
        ({"keep": 0}, "keep is 0"),
        ({"python": "/nowhere/python3"}, "/nowhere/python3 does not exist: the role python_runtime"),
        ({"required_files": {"/nowhere/key": "there is no key"}}, "there is no key"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_made(host: Host, more: dict[str, Any], says: str) -> None:
    with pytest.raises(WorkspaceError, match=says.replace(".", r"\.")):
        host.run(**({"revision": host.source("one")} | more))
    assert not host.path.exists()


def test_archive_of_another_revision_is_refused(host: Host) -> None:
    first, second = host.source("one"), host.source("two")
    (host.folder / f"{first}.tar").replace(host.folder / f"{second}.tar")
    with pytest.raises(WorkspaceError, match=f"not that of revision {second}"):
        host.run(second)


def tool(host: Host, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "NEMO_WORKSPACE_PATH": str(host.path)}
    return subprocess.run(
        [sys.executable, "-I", TOOL, *words], env=environment, capture_output=True, text=True, check=False
    )


def test_command_lists_and_goes_back(host: Host) -> None:
    first = host.source("one")
    host.run(first)
    second = host.source("two")
    host.run(second)
    assert [line.split()[0] for line in tool(host, "list").stdout.splitlines()] == [second, first]
    done = tool(host, "use", first)
    assert done.returncode == 0, done.stderr
    assert host.current == first
    lines = tool(host, "list").stdout.splitlines()
    assert [line.endswith("current") for line in lines if line.startswith(first)] == [True]


def test_command_refuses_what_would_not_work(host: Host) -> None:
    first = host.source("one")
    host.run(first)
    second = host.source("two")
    host.run(second)
    for name in ("nothing", "../environments", ""):
        assert "there is no revision" in tool(host, "use", name).stderr
    (host.path / "releases" / first / "environment/complete").unlink()
    assert f"operations_workspace_revision={first}" in tool(host, "use", first).stderr
    assert host.current == second
    assert json.loads((host.path / "current/REVISION").read_text())["revision"] == second
