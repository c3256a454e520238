"""scripts/find-python: what it takes, what it refuses, and what it says. Every Python here is a shell script."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts/find-python"


def fake(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def good(path: Path) -> Path:
    return fake(path, f"echo '{path}'")


def too_old(path: Path) -> Path:
    return fake(path, "echo 'is Python 3.11'; exit 3")


def without_venv(path: Path) -> Path:
    return fake(path, "echo 'is Python 3.12 without the module ensurepip'; exit 4")


def shim(path: Path) -> Path:
    """What pyenv leaves on PATH for a version that is installed but not selected."""
    return fake(path, "echo 'pyenv: python3.13: command not found' >&2; exit 127")


@pytest.fixture
def find(tmp_path: Path):
    """Run the script where nothing of this machine is in sight."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("sh", "cat"):
        (tools / tool).symlink_to(f"/bin/{tool}")

    def run(*folders: Path, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["/bin/sh", str(SCRIPT)],
            env={
                "PATH": os.pathsep.join(map(str, [*folders, tools])),
                "HOME": str(tmp_path / "home"),
                "NEMO_PYTHON_DIRS": str(tmp_path / "opt*/bin"),
                **environment,
            },
            capture_output=True,
            text=True,
            check=False,
        )

    return run


def test_newest_on_path(find, tmp_path: Path) -> None:
    too_old(tmp_path / "bin/python3")
    good(tmp_path / "bin/python3.12")
    newest = good(tmp_path / "bin/python3.13")
    assert find(tmp_path / "bin").stdout == f"{newest}\n"


def test_plain_python3_when_it_is_new_enough(find, tmp_path: Path) -> None:
    python = good(tmp_path / "bin/python3")
    assert find(tmp_path / "bin").stdout == f"{python}\n"


def test_path_with_a_space(find, tmp_path: Path) -> None:
    python = good(tmp_path / "my tools/python3.12")
    assert find(tmp_path / "my tools").stdout == f"{python}\n"


def test_shim_that_does_not_run_is_passed_over(find, tmp_path: Path) -> None:
    shim(tmp_path / "shims/python3.13")
    python = good(tmp_path / "shims/python3.12")
    assert find(tmp_path / "shims").stdout == f"{python}\n"


def test_pyenv_version_that_is_not_selected(find, tmp_path: Path) -> None:
    shim(tmp_path / "shims/python3.13")
    python = good(tmp_path / "pyenv/versions/3.13.0/bin/python")
    assert find(tmp_path / "shims", PYENV_ROOT=str(tmp_path / "pyenv")).stdout == f"{python}\n"


def test_pyenv_in_its_usual_place(find, tmp_path: Path) -> None:
    python = good(tmp_path / "home/.pyenv/versions/3.12.4/bin/python")
    assert find().stdout == f"{python}\n"


def test_python_of_uv(find, tmp_path: Path) -> None:
    python = good(tmp_path / "home/.local/share/uv/python/cpython-3.14.1-linux-x86_64-gnu/bin/python3.14")
    assert find().stdout == f"{python}\n"


def test_administrators_folders(find, tmp_path: Path) -> None:
    python = good(tmp_path / "opt-tools/bin/python3.12")
    assert find().stdout == f"{python}\n"


def test_chosen_python_wins(find, tmp_path: Path) -> None:
    good(tmp_path / "bin/python3.14")
    chosen = good(tmp_path / "mine/python")
    assert find(tmp_path / "bin", PYTHON=str(chosen)).stdout == f"{chosen}\n"


def test_chosen_python_that_does_not_fit_is_an_error(find, tmp_path: Path) -> None:
    good(tmp_path / "bin/python3.14")
    chosen = too_old(tmp_path / "mine/python")
    result = find(tmp_path / "bin", PYTHON=str(chosen))
    assert (result.returncode, result.stdout) == (1, "")
    assert f"PYTHON={chosen} cannot be used" in result.stderr
    assert "is Python 3.11" in result.stderr


def test_python_without_venv_is_passed_over_with_the_package_to_install(find, tmp_path: Path) -> None:
    broken = without_venv(tmp_path / "bin/python3.12")
    result = find(tmp_path / "bin")
    assert result.returncode == 1
    assert (
        f"{broken} is Python 3.12 without the module ensurepip (Debian and Ubuntu: apt-get install python3-venv)"
        in (result.stderr)
    )


def test_none_says_what_to_type(find, tmp_path: Path) -> None:
    old = too_old(tmp_path / "bin/python3")
    result = find(tmp_path / "bin")
    assert (result.returncode, result.stdout) == (1, "")
    assert f"{old} is Python 3.11" in result.stderr
    for command in (
        "apt-get install python3",
        "dnf install python3.12",
        "brew install",
        "pyenv install",
        "uv python install",
    ):
        assert command in result.stderr


def test_nothing_at_all(find) -> None:
    result = find()
    assert result.returncode == 1
    assert "there is no python3 at all" in result.stderr


def test_real_python_here() -> None:
    result = subprocess.run([str(SCRIPT)], capture_output=True, text=True, check=True)
    version = subprocess.run(
        [result.stdout.strip(), "-c", "import sys, venv, ensurepip; print(sys.version_info[:2] >= (3, 12))"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert version.stdout == "True\n"
