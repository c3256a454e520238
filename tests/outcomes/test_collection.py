"""The collection, built and installed in a folder that knows nothing of the checkout, finds the platform as it is."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
BIN = pathlib.Path(sys.executable).parent


def test_the_installed_collection_has_nothing_to_change(tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ANSIBLE_")}
    environment |= {"ANSIBLE_COLLECTIONS_PATH": str(tmp_path / "collections"), "ANSIBLE_NOCOLOR": "1"}

    def run(program: str, *arguments: str | pathlib.Path) -> str:
        done = subprocess.run(
            [BIN / program, *arguments],
            cwd=tmp_path,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run("ansible-galaxy", "collection", "build", ROOT, "--output-path", tmp_path)
    archive = next(tmp_path.glob("nemo-platform-*.tar.gz"))
    run("ansible-galaxy", "collection", "install", archive, "--offline", "--no-deps", "-p", tmp_path / "collections")
    # What the Bastion has is the checkout; the installed collection would be another project.
    project = f"operations_workspace_source={ROOT}"
    output = run("ansible-playbook", "nemo.platform.site", "-i", ROOT / "inventories" / "lab", "--check", "-e", project)
    assert str(ROOT / "roles") not in output
    assert len(re.findall(r"changed=0 +unreachable=0 +failed=0", output)) == 5, output
