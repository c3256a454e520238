"""What every role keeps: its defaults and its argument spec say the same, and its README says what the spec says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.unit.conftest import ENVIRONMENT
from tests.unit.helpers import ROOT, script

ROLES = sorted(path for path in (ROOT / "roles").iterdir() if (path / "tasks").is_dir())
role_docs = script("role-docs")


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text()) if path.exists() else None


def options(role: Path) -> dict[str, Any]:
    """The inputs of every entry point of a role."""
    specs = (load(role / "meta/argument_specs.yml") or {}).get("argument_specs", {})
    merged: dict[str, Any] = {}
    for spec in specs.values():
        merged |= spec.get("options", {})
    return merged


def test_there_are_roles() -> None:
    assert ROLES


@pytest.mark.parametrize("role", ROLES, ids=lambda role: role.name)
class TestRole:
    def test_has_an_argument_spec(self, role: Path) -> None:
        assert "main" in load(role / "meta/argument_specs.yml")["argument_specs"]

    def test_optional_inputs_and_defaults_are_the_same_names(self, role: Path) -> None:
        optional = {name for name, option in options(role).items() if not option.get("required")}
        assert optional == set(load(role / "defaults/main.yml") or {})

    def test_defaults_are_the_same_values(self, role: Path) -> None:
        defaults = load(role / "defaults/main.yml") or {}
        specified = {name: option["default"] for name, option in options(role).items() if "default" in option}
        assert specified == {name: defaults.get(name) for name in specified}

    def test_default_in_one_file_stands_in_the_other(self, role: Path) -> None:
        """A spec without `default` is one whose default is computed, and defaults/main.yml then holds a template."""
        specs = options(role)
        silent = {
            name: value
            for name, value in (load(role / "defaults/main.yml") or {}).items()
            if name in specs and "default" not in specs[name] and "{{" not in str(value)
        }
        assert not silent

    def test_inputs_begin_with_the_role_name(self, role: Path) -> None:
        assert [name for name in options(role) if not name.startswith(f"{role.name}_")] == []

    def test_inputs_have_a_type_and_a_description(self, role: Path) -> None:
        bare = [
            name for name, option in options(role).items() if not (option.get("type") and option.get("description"))
        ]
        assert bare == []

    def test_internal_variables_are_marked(self, role: Path) -> None:
        """What vars/ holds is nobody's input: its names begin with two underscores."""
        names = {name for path in role.glob("vars/**/*.yml") for name in load(path) or {}}
        assert {name for name in names if not name.startswith(f"__{role.name}_")} == set()

    def test_readme_has_the_table_of_the_spec(self, role: Path) -> None:
        specs = load(role / "meta/argument_specs.yml")["argument_specs"]
        readme = role / "README.md"
        assert readme.exists(), "make docs writes it"
        assert role_docs.table(specs) in readme.read_text(), "make docs brings it up to date"


class TestTable:
    def test_rows(self) -> None:
        made = role_docs.table(
            {
                "main": {
                    "options": {
                        "x_name": {"type": "str", "required": True, "description": "The V(name)."},
                        "x_mode": {
                            "type": "str",
                            "choices": ["a", "b"],
                            "default": "a",
                            "description": ["One.", "A|B."],
                        },
                        "x_list": {
                            "type": "list",
                            "elements": "dict",
                            "default": [],
                            "description": "Things.",
                            "options": {"port": {"type": "int", "description": "A port."}},
                        },
                    }
                }
            }
        )
        assert made.splitlines()[3:-2] == [
            "| input | type | default | meaning |",
            "|---|---|---|---|",
            "| `x_name` | str | **required** | The `name`. |",
            "| `x_mode` | str: `a`, `b` | `a` | One. A\\|B. |",
            "| `x_list` | list of dict | `[]` | Things. |",
            "| `x_list[].port` | int |  | A port. |",
        ]

    def test_replaces_what_is_between_the_markers(self) -> None:
        table = role_docs.table({"main": {}})
        old = f"# x\n\n{role_docs.BEGIN}\nold\n{role_docs.END}\n\nafter\n"
        assert role_docs.written(old, table) == f"# x\n\n{table}\n\nafter\n"

    def test_adds_markers_once(self) -> None:
        table = role_docs.table({"main": {}})
        once = role_docs.written("# x\n", table)
        assert once == f"# x\n\n## Inputs\n\n{table}\n"
        assert role_docs.written(once, table) == once

    def test_table_by_hand_gives_way(self) -> None:
        table = role_docs.table({"main": {}})
        old = "# x\n\n## Inputs\n\nSome words.\n\n| a | b |\n|---|---|\n| c | d |\n\n## Example\n"
        assert role_docs.written(old, table) == f"# x\n\n## Inputs\n\nSome words.\n\n{table}\n\n## Example\n"


def test_packages_asks_no_mirror_before_something_is_missing() -> None:
    """A host that has everything needs no mirror: only the repair refreshes the lists."""
    first, repair = load(ROOT / "roles/packages/tasks/main.yml")
    for values in (*first["module_defaults"].values(), first["ansible.builtin.package"]):
        assert not {"update_cache", "cache_valid_time"} & set(values)
    assert repair["when"] == "__packages_repair | length > 0"
    assert load(ROOT / "roles/packages/tasks/repair.yml")[-1]["ansible.builtin.package"]["update_cache"] is True


@pytest.mark.parametrize(
    ("registry", "names"),
    [("registry.example.com:5000", "'registry.example.com:5000'"), ("a.b.c.d.e", "'a.b.c.d.e'"), (5, "'5'")],
)
def test_ai_api_names_a_registry_that_is_not_ecr(tmp_path: Path, registry: object, names: str) -> None:
    service = {"name": "x", "port": 1, "repository": "x", "tag": "x", "digest": "sha256:" + "a" * 64}
    role = {"role": "nemo.platform.ai_api", "ai_api_registry": registry, "ai_api_services": [service]}
    playbook = tmp_path / "play.yml"
    playbook.write_text(yaml.safe_dump([{"hosts": "localhost", "gather_facts": False, "roles": [role]}]))
    done = subprocess.run(
        [Path(sys.executable).parent / "ansible-playbook", "-i", "localhost,", "-c", "local", "--check", playbook],
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1"},
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode != 0
    assert f"ai_api_registry is {names}; allowed: a name such as" in done.stdout, done.stdout + done.stderr


def test_what_a_service_of_ai_api_may_say_reaches_its_release() -> None:
    role = ROOT / "roles/ai_api"
    service = options(role)["ai_api_services"]["options"]
    passed = (role / "tasks/release.yml").read_text()
    # of the inventory, or of the image, which is found before
    elsewhere = {"group", "hosts", "follow", "tag_prefix", "tag_pattern", "tag_outside_rule"}
    assert {name for name in service if f"__ai_api_service.{name}" not in passed} == elsewhere
    assert {"health_status", "bake_error_percent", "network", "proxy_retry_after", "proxy_check"} < set(service)
