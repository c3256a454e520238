"""The second way in: the collection, built and installed, works apart from the checkout under the same names."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.unit.helpers import ROOT

BIN = Path(sys.executable).parent
GALAXY = yaml.safe_load((ROOT / "galaxy.yml").read_text())


def run(*command: str | Path, cwd: Path, collections: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("ANSIBLE_", "AWS_"))}
    environment |= {"ANSIBLE_HOME": str(cwd / ".ansible"), "ANSIBLE_NOCOLOR": "1"}
    if collections:
        environment["ANSIBLE_COLLECTIONS_PATH"] = str(collections)
    program, *arguments = command
    return subprocess.run(
        [BIN / program, *arguments],
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that has nothing of the checkout in it."""
    return tmp_path_factory.mktemp("elsewhere")


@pytest.fixture(scope="module")
def archive(elsewhere: Path) -> Path:
    built = run("ansible-galaxy", "collection", "build", ROOT, "--output-path", elsewhere, cwd=elsewhere)
    assert built.returncode == 0, built.stderr
    return elsewhere / f"nemo-platform-{GALAXY['version']}.tar.gz"


@pytest.fixture(scope="module")
def installed(archive: Path, elsewhere: Path) -> Path:
    collections = elsewhere / "collections"
    done = run(
        "ansible-galaxy", "collection", "install", archive, "--offline", "--no-deps", "-p", collections, cwd=elsewhere
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return collections


def test_archive_holds_the_collection_and_nothing_of_the_checkout(archive: Path) -> None:
    with tarfile.open(archive) as tar:
        names = tar.getnames()
        links = [member.name for member in tar if member.issym() or member.islnk()]
    tops = {name.split("/")[0] for name in names}
    assert tops <= {
        "CHANGELOG.md", "FILES.json", "LICENSE", "MANIFEST.json", "README.md", "docs", "inventories", "meta",
        "playbooks", "plugins", "requirements", "roles",
    }  # fmt: skip
    assert {"README.md", "LICENSE", "meta", "playbooks", "plugins", "roles"} <= tops
    assert not [name for name in names if "lab" in name.split("/") or "__pycache__" in name or "known_hosts" in name]
    assert links == []


def test_archive_holds_no_secret_that_lies_in_the_checkout(tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    for name in tree("."):
        target = checkout / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target, follow_symlinks=False)
    planted = {
        ".env", ".env.production", ".idea/workspace.xml", ".vault-password", ".vault-password-prod", ".vscode/launch.json",
        "vault.yml", "key.pem", ".README.md.swp",
        "inventories/aws/.env", "inventories/aws/.idea/workspace.xml", "inventories/aws/.vault-password",
        "inventories/aws/.vscode/launch.json", "inventories/aws/group_vars/all/vault.yml",
        "inventories/aws/group_vars/ai/vault.yaml", "inventories/aws/group_vars/all/.vault.yml.swp", "roles/ai_api/files/a.key",
    }  # fmt: skip
    for name in planted:
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_text("secret\n")
    built = run("ansible-galaxy", "collection", "build", checkout, "--output-path", tmp_path, cwd=tmp_path)
    assert built.returncode == 0, built.stderr
    with tarfile.open(tmp_path / f"nemo-platform-{GALAXY['version']}.tar.gz") as tar:
        names = set(tar.getnames())
    assert "inventories/aws/group_vars/all/platform.yml" in names
    assert planted & names == set()
    assert not [name for name in names if {".idea", ".vscode"} & set(name.split("/"))]


def tree(folder: str) -> set[str]:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", folder],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return {name for name in listed.stdout.split("\0") if name and (ROOT / name).exists()}


@pytest.mark.parametrize("folder", ["meta", "playbooks", "plugins", "roles"])
def test_archive_misses_no_file(archive: Path, folder: str) -> None:
    with tarfile.open(archive) as tar:
        files = {member.name for member in tar if member.isfile()}
    assert tree(folder) - files == set()


def test_playbooks_of_the_installed_collection(installed: Path, elsewhere: Path) -> None:
    names = sorted(path.stem for path in (ROOT / "playbooks").glob("*.yml"))
    assert {"preflight", "site"} <= set(names)
    done = run(
        "ansible-playbook", *(f"nemo.platform.{name}" for name in names), "--syntax-check", "-i", "localhost,",
        cwd=elsewhere, collections=installed,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if line] == [
        f"playbook: {installed}/ansible_collections/nemo/platform/playbooks/{name}.yml" for name in names
    ]


def documented(collections: Path, cwd: Path) -> dict[str, dict[str, Any]]:
    """What ansible-doc reads of the collection: kind of plugin -> full name -> documentation."""
    dumped = run("ansible-doc", "--metadata-dump", "nemo.platform", cwd=cwd, collections=collections)
    assert dumped.returncode == 0, dumped.stderr
    kinds = json.loads(dumped.stdout)["all"]
    return {
        kind: {name: doc for name, doc in plugins.items() if name.startswith("nemo.platform.")}
        for kind, plugins in kinds.items()
    }


def without_place(doc: Any) -> Any:
    if isinstance(doc, dict):
        return {key: without_place(value) for key, value in doc.items() if key not in ("filename", "path")}
    return doc


def test_same_names_and_documentation_in_both(installed: Path, elsewhere: Path) -> None:
    checkout, collection = documented(ROOT / "collections", ROOT), documented(installed, elsewhere)
    assert without_place(checkout) == without_place(collection)
    assert {name.rsplit(".")[-1] for name in collection["role"]} == {
        path.parent.parent.name for path in ROOT.glob("roles/*/meta/argument_specs.yml")
    }
    modules = {path.stem for path in (ROOT / "plugins/modules").glob("[a-z]*.py")}
    assert modules <= {name.rsplit(".")[-1] for name in collection["module"]}
    assert all("doc" in plugin for plugin in collection["module"].values())


def test_every_module_is_documented_with_an_example() -> None:
    for path in sorted((ROOT / "plugins/modules").glob("[a-z]*.py")):
        text = path.read_text()
        for part in ("DOCUMENTATION", "EXAMPLES", "RETURN"):
            assert re.search(rf'^{part} = r?"""', text, re.MULTILINE), f"{path.name} has no {part}"
        assert f"nemo.platform.{path.stem}:" in text, f"{path.name}: no example uses its full name"


HOST_CODE = sorted([*(ROOT / "plugins/modules").glob("*.py"), *(ROOT / "plugins/module_utils").glob("*.py")])


@pytest.mark.parametrize("path", HOST_CODE, ids=lambda path: path.stem)
def test_modules_are_written_for_the_oldest_python_of_a_host(path: Path) -> None:
    ast.parse(path.read_text(), feature_version=(3, 9))


def test_modules_import_on_a_real_python_39(tmp_path: Path) -> None:
    """Where the machine has one: with what the grammar allows, the library may still lack a name."""
    homes = [Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")), Path("/usr")]
    pythons = [
        path for home in homes for path in (*home.glob("versions/3.9.*/bin/python"), *home.glob("bin/python3.9"))
    ]
    if not pythons:
        pytest.skip("no Python 3.9 here")
    # Of the controller's packages a host sees ansible.module_utils alone.
    (tmp_path / "ansible").symlink_to(Path(str(distribution("ansible-core").locate_file("ansible"))))
    (tmp_path / "ansible_collections").symlink_to(ROOT / "collections/ansible_collections")
    modules = [path.stem for path in HOST_CODE if path.parent.name == "modules" and "boto3" not in path.read_text()]
    assert modules
    lines = [f"import ansible_collections.nemo.platform.plugins.modules.{name}" for name in modules]
    done = subprocess.run(
        [pythons[0], "-S", "-c", "\n".join(lines)],
        env={"PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_dependencies_are_those_of_requirements() -> None:
    wanted = yaml.safe_load((ROOT / "collections/requirements.yml").read_text())["collections"]
    assert GALAXY["dependencies"] == {entry["name"]: entry["version"] for entry in wanted}


def test_versions_agree() -> None:
    assert f'version = "{GALAXY["version"]}"' in (ROOT / "pyproject.toml").read_text()
    assert f"## [{GALAXY['version']}]" in (ROOT / "CHANGELOG.md").read_text()


def test_changelog_begins_with_unreleased_or_this_version() -> None:
    headings = re.findall(r"^## \[([^]]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] in ("Unreleased", GALAXY["version"])
