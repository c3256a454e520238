"""The launcher of the Bastion's commands, with a Python that shows what it was called with."""

from __future__ import annotations

import configparser
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from jinja2 import Environment

from ansible_collections.nemo.platform.plugins.filter.literal_yaml import literal_yaml
from tests.unit.helpers import ROOT

ROLE = ROOT / "roles/operations_workspace"
SHOW = """#!/bin/sh
exec /usr/bin/env python3 -c 'import json, os, sys; print(json.dumps([dict(os.environ), sys.argv[1:], os.getcwd()]))' "$@"
"""


class Bastion:
    """A workspace in a folder, and programs that say who is there."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.home, self.bin = folder, folder / "home", folder / "bin"
        self.release = folder / "workspace/releases/abc"
        (self.release / "playbooks").mkdir(parents=True)
        for name in ("site.yml", "playbooks/verify.yml", "REVISION"):
            (self.release / name).write_text("x")
        python = folder / "workspace/environments/e/bin/python3"
        python.parent.mkdir(parents=True)
        python.write_text(SHOW)
        python.chmod(0o755)
        (self.release / "environment").symlink_to("../../environments/e")
        (folder / "workspace/current").symlink_to("releases/abc")
        self.home.mkdir()
        self.bin.mkdir()
        self.is_user("alice", 1000, "alice nemo-operators")
        self.render({"https_proxy": "http://proxy:3128/a b"})

    def is_user(self, name: str, uid: int, groups: str) -> None:
        for program, text in (
            ("id", f'case $1 in -u) echo {uid};; -un) echo {name};; -Gn) echo "{groups}";; esac'),
            ("getent", f"echo {name}:x:{uid}:{uid}::{self.home}:/bin/bash"),
        ):
            path = self.bin / program
            path.write_text(f"#!/bin/sh\n{text}\n")
            path.chmod(0o755)

    def render(self, environment: dict[str, str], inventory: str = "inventories/aws") -> None:
        engine = Environment(trim_blocks=True, keep_trailing_newline=True, autoescape=False)  # noqa: S701 - a shell script
        engine.filters["quote"] = lambda value: "'" + value.replace("'", "'\"'\"'") + "'"
        text = engine.from_string((ROLE / "templates/launch.sh.j2").read_text()).render(
            __operations_workspace_path=self.folder / "workspace", __operations_workspace_settings=self.folder / "etc",
            operations_workspace_group="nemo-operators", operations_workspace_inventory=inventory,
            __operations_workspace_environment=environment,
        )  # fmt: skip
        (self.folder / "launch").write_text(text)

    def call(self, *words: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["sh", self.folder / "launch", *words], cwd=cwd or self.folder, capture_output=True, text=True, check=False,
            env={"PATH": f"{self.bin}:{os.environ['PATH']}", "HOME": "/somebody", **environment},
        )  # fmt: skip

    def shown(self, *words: str, cwd: Path | None = None, **environment: str) -> tuple[dict[str, str], list[str], str]:
        done = self.call(*words, cwd=cwd, **environment)
        assert done.returncode == 0, done.stderr
        made: Any = json.loads(done.stdout)
        return made[0], made[1][2:], made[2]


@pytest.fixture
def bastion(tmp_path: Path) -> Bastion:
    return Bastion(tmp_path)


def test_sets_all_that_an_operator_would_have_to(bastion: Bastion) -> None:
    environment, words, folder = bastion.shown("ansible", "all", "-m", "ping", "a b", "", cwd=bastion.home)
    assert words == ["all", "-m", "ping", "a b", ""]
    assert folder == str(bastion.home)
    assert environment["ANSIBLE_CONFIG"] == f"{bastion.folder}/etc/ansible.cfg"
    assert environment["ANSIBLE_INVENTORY"] == f"{bastion.release}/inventories/aws,{bastion.folder}/etc/inventory"
    assert environment["ANSIBLE_COLLECTIONS_PATH"] == f"{bastion.release}/collections"
    assert environment["NEMO_WORKSPACE_REVISION"] == "abc"
    assert environment["HOME"] == str(bastion.home)
    assert environment["https_proxy"] == "http://proxy:3128/a b"
    assert "ANSIBLE_VAULT_PASSWORD_FILE" not in environment


def test_leaves_out_what_leads_elsewhere(bastion: Bastion) -> None:
    stray = {
        "ANSIBLE_LIBRARY": "x", "ANSIBLE_CALLBACKS_ENABLED": "", "_ANSIBLE_CALLBACK_DISPATCH_ERROR_BEHAVIOR": "ignore", "AWS_PROFILE": "x",
        "AWS_ACCESS_KEY_ID": "x", "PYTHONPATH": "x", "VIRTUAL_ENV": "x",
    }  # fmt: skip
    environment, _, _ = bastion.shown(
        "ansible", cwd=None, **stray, ANSIBLE_NOCOLOR="1", NEMO_LOCK_WAIT="7", TERM="xterm"
    )
    assert not set(stray) & set(environment)
    assert (environment["ANSIBLE_NOCOLOR"], environment["NEMO_LOCK_WAIT"], environment["TERM"]) == ("1", "7", "xterm")


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["site.yml"], ["{release}/site.yml"]),
        (["-v", "verify.yml", "--limit", "x"], ["-v", "{release}/playbooks/verify.yml", "--limit", "x"]),
        (["playbooks/verify.yml"], ["{release}/playbooks/verify.yml"]),
        (["own.yml", "site.yml"], ["own.yml", "{release}/site.yml"]),
        (["nothing.yml"], ["nothing.yml"]),
        (["-e", "site.yml"], ["-e", "site.yml"]),
        (["nemo.platform.site"], ["nemo.platform.site"]),
        (["--limit", "a b*", "site.yml"], ["--limit", "a b*", "{release}/site.yml"]),
    ],
)
def test_finds_playbooks(bastion: Bastion, words: list[str], found: list[str]) -> None:
    (bastion.home / "own.yml").write_text("x")
    _, shown, _ = bastion.shown("ansible-playbook", *words, cwd=bastion.home)
    assert shown == [word.format(release=bastion.release) for word in found]


def test_own_playbook_of_that_name_wins(bastion: Bastion) -> None:
    (bastion.home / "site.yml").write_text("x")
    assert bastion.shown("ansible-playbook", "site.yml", cwd=bastion.home)[1] == ["site.yml"]


def test_only_playbooks_are_looked_for(bastion: Bastion) -> None:
    assert bastion.shown("ansible-vault", "view", "site.yml", cwd=bastion.home)[1] == ["view", "site.yml"]


def test_folders_are_the_operators_alone(bastion: Bastion) -> None:
    (bastion.home / ".ansible").mkdir(mode=0o755)
    bastion.shown("ansible")
    for name in (".ansible", ".ansible/nemo_platform"):
        assert (bastion.home / name).stat().st_mode & 0o777 == 0o700


def test_vault_password_where_there_is_one(bastion: Bastion) -> None:
    (bastion.folder / "etc").mkdir()
    (bastion.folder / "etc/vault_password").write_text("x")
    assert bastion.shown("ansible")[0]["ANSIBLE_VAULT_PASSWORD_FILE"] == f"{bastion.folder}/etc/vault_password"
    assert bastion.shown("ansible", ANSIBLE_VAULT_PASSWORD_FILE="/own")[0]["ANSIBLE_VAULT_PASSWORD_FILE"] == "/own"


def test_inventory_elsewhere(bastion: Bastion) -> None:
    bastion.render({}, "/srv/hosts.yml")
    assert bastion.shown("ansible")[0]["ANSIBLE_INVENTORY"].startswith("/srv/hosts.yml,")


# Of all playbooks, as none is named.
ALL_VARIABLES = "batch= command= digest= follow= follow_for= force= grep= group= lines= pin= release= service= since= strategy= tag= unit="


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("pre", ""),
        ("ver", "verify.yml"),
        ("--tags ''", "all always logs never restart run tagged untagged who"),
        ("verify.yml -t re", "restart"),
        ("--tags = w", "who"),
        ("--tags =", "all always logs never restart run tagged untagged who"),
        ("-e ''", ALL_VARIABLES),
        ("-e fol", "follow= follow_for="),
        ("--extra-vars = un", "unit="),
        ("-e service =", "ai-dev ai-prod vllm_a"),
        ("-e service = ai", "ai-dev ai-prod"),
        ("--extra-vars = service = v", "vllm_a"),
        ("-e group = zz", ""),
    ],
)
def test_completion(bastion: Bastion, typed: str, offered: str) -> None:
    inventory = bastion.release / "inventories/aws"
    (inventory / "group_vars/all").mkdir(parents=True)
    (inventory / "group_vars/all/services.yml").write_text(
        "---\n# ai\nnemo_services:\n  ai-prod:\n    group: ai\n  # no\n  ai-dev:\n    group: ai\n\n  vllm_a: {}\nother:\n  air: 1\n"
    )
    engine = Environment(keep_trailing_newline=True, autoescape=False)  # noqa: S701 - a shell script
    engine.filters["dirname"] = os.path.dirname
    text = engine.from_string((ROLE / "templates/completion.bash.j2").read_text()).render(
        __operations_workspace_path=bastion.folder / "workspace",
        __operations_workspace_project_known_hosts=f"{bastion.folder}/workspace/current/inventories/aws/known_hosts",
    )
    script = f"{text}\nCOMP_WORDS=(ansible-playbook {typed}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); _nemo_playbooks; echo ${{COMPREPLY[*]}}"
    done = subprocess.run(["bash", "-c", script], cwd=bastion.home, capture_output=True, text=True, check=True)
    assert " ".join(sorted(done.stdout.split())) == offered
    assert done.stderr == ""


def test_locale_that_is_not_utf8(bastion: Bastion) -> None:
    assert bastion.shown("ansible", LC_ALL="C")[0]["LC_ALL"] == "C.UTF-8"
    assert bastion.shown("ansible", LC_ALL="C.UTF-8")[0]["LC_ALL"] == "C.UTF-8"


@pytest.mark.parametrize(
    ("name", "uid", "groups", "says"),
    [
        ("mallory", 1001, "mallory", "only operators (group nemo-operators) run this, and mallory is none"),
        ("mallory", 1001, "mallory nemo-operators2", "mallory is none"),
        ("root", 0, "root nemo-operators", "not as root"),
    ],
)
def test_refuses(bastion: Bastion, name: str, uid: int, groups: str, says: str) -> None:
    bastion.is_user(name, uid, groups)
    done = bastion.call("ansible", "all")
    assert done.returncode == 1
    assert done.stderr.startswith("ansible: ")
    assert says in done.stderr


@pytest.mark.parametrize("gone", ["current", "environments/e/bin/python3"])
def test_says_what_is_missing(bastion: Bastion, gone: str) -> None:
    (bastion.folder / "workspace" / gone).unlink()
    done = bastion.call("ansible")
    assert done.returncode == 1
    assert "run the role operations_workspace again" in done.stderr


def test_configuration_is_the_projects_own_beside_what_the_bastion_needs() -> None:
    own, rendered = configparser.ConfigParser(interpolation=None), configparser.ConfigParser(interpolation=None)
    own.read(ROOT / "ansible.cfg")
    rendered.read_string((ROLE / "templates/ansible.cfg.j2").read_text())
    differs = {
        "defaults": {"inventory", "collections_path", "callbacks_enabled", "bin_ansible_callbacks"},
        "ssh_connection": {"ssh_args"},
        "callback_operations": {"lock_wait"},
    }
    for section in {*own.sections(), *rendered.sections()}:
        keys = {key for parser in (own, rendered) if section in parser for key in parser[section]}
        for key in keys - differs.get(section, set()):
            assert rendered.get(section, key, fallback=None) == own.get(section, key, fallback=None), (
                f"[{section}] {key}"
            )
    assert rendered["defaults"]["callbacks_enabled"].startswith(own["defaults"]["callbacks_enabled"])
    assert rendered["ssh_connection"]["ssh_args"].startswith(own["ssh_connection"]["ssh_args"])


def test_variables_mean_what_they_say() -> None:
    text = literal_yaml({"b": "a{{b}}", "a": {"c": [1, True, None, 1.5, "yes", "{% x"]}})
    assert text.splitlines()[-1] == "b: !unsafe 'a{{b}}'"

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!unsafe", lambda _loader, node: node.value)
    assert yaml.load(text, Loader=Loader) == {"b": "a{{b}}", "a": {"c": [1, True, None, 1.5, "yes", "{% x"]}}  # noqa: S506
