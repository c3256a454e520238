"""What stands between a card and a container, from made-up files and the words of the real programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from ansible_collections.nemo.platform.plugins.module_utils import container_toolkit

LIBRARY = "/usr/lib/x86_64-linux-gnu/libcuda.so.580.95.05"
# as nvidia-ctk writes it
SPECIFICATION = f"""---
cdiVersion: 0.5.0
kind: nvidia.com/gpu
devices:
- name: "0"
  containerEdits:
    deviceNodes:
    - path: /dev/nvidia0
containerEdits:
  deviceNodes:
  - path: /dev/nvidiactl
  hooks:
  - hookName: createContainer
    path: /usr/bin/nvidia-cdi-hook
    args: [nvidia-cdi-hook, create-symlinks, --link, libcuda.so.1::/nowhere/libcuda.so]
  mounts:
  - hostPath: {LIBRARY}
    containerPath: /somewhere/else/libcuda.so.580.95.05
    options: [ro]
"""
NAMED = ("/dev/nvidia0", "/dev/nvidiactl", "/usr/bin/nvidia-cdi-hook", LIBRARY)


def write(root: Path, path: str, text: str = "") -> None:
    target = root / path.lstrip("/")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write(tmp_path, container_toolkit.CDI, SPECIFICATION)
    for path in NAMED:
        write(tmp_path, path)
    return tmp_path


class TestSpecification:
    def test_fits(self, root: Path) -> None:
        assert container_toolkit.cdi_problem("580.95.05", str(root)) == ""

    def test_json_is_yaml(self, root: Path) -> None:
        mounts = [
            {"hostPath": LIBRARY, "containerPath": "/elsewhere", "options": ["ro"]},
            {"hostPath": "/gone", "containerPath": LIBRARY},
        ]
        write(root, container_toolkit.CDI, json.dumps({"containerEdits": {"mounts": mounts[:1]}}, indent=2))
        assert container_toolkit.cdi_problem("580.95.05", str(root)) == ""
        write(root, container_toolkit.CDI, json.dumps({"containerEdits": {"mounts": mounts}}, indent=2))
        assert container_toolkit.cdi_problem("580.95.05", str(root)).endswith("names /gone, which is not there")

    def test_missing(self, tmp_path: Path) -> None:
        assert "there is no CDI specification" in container_toolkit.cdi_problem("580.95.05", str(tmp_path))

    def test_another_driver(self, root: Path) -> None:
        assert container_toolkit.cdi_problem("580.105.08", str(root)).endswith(
            "is for the driver 580.95.05, the host's is 580.105.08"
        )

    def test_no_library(self, root: Path) -> None:
        write(root, container_toolkit.CDI, "kind: nvidia.com/gpu\n")
        assert container_toolkit.cdi_problem("580.95.05", str(root)).endswith("names no library of the driver")

    @pytest.mark.parametrize("gone", NAMED)
    def test_a_file_that_is_gone(self, root: Path, gone: str) -> None:
        (root / gone.lstrip("/")).unlink()
        assert container_toolkit.cdi_problem("580.95.05", str(root)).endswith(f"names {gone}, which is not there")


class TestPackages:
    def test_dpkg(self) -> None:
        def run(_argv: Sequence[str]) -> tuple[int, str, str]:
            rows = "hold installed libnvidia-container1 1.20.1-1\ninstall installed nvidia-container-toolkit 1.19.0-1\nhold config-files nvidia-container-toolkit-base 1.18.0-1\n"
            return 1, rows, "dpkg-query: no packages found matching libnvidia-container-tools"

        assert container_toolkit.packages(run) == {
            "libnvidia-container1": {"version": "1.20.1-1", "held": True},
            "nvidia-container-toolkit": {"version": "1.19.0-1", "held": False},
        }

    @pytest.mark.parametrize(
        ("locks", "held"),
        [
            ("", False),
            ("# Added lock\nnvidia-container-toolkit-0:1.20.1-1.*\n", True),
            ("nvidia-container-toolkit-1.20.1-1.*\n", True),
            ("nvidia-container-toolkit-base-0:1.20.1-1.*\n", False),
            ("nvidia-container-toolkit-0:1.19.0-1.*\n", False),
            ("nvidia-container-toolkit-0:1.20.1-10.*\n", False),
        ],
    )
    def test_rpm(self, tmp_path: Path, locks: str, held: bool) -> None:
        write(tmp_path, container_toolkit.VERSIONLOCK, locks)

        def run(argv: Sequence[str]) -> tuple[int, str, str]:
            if argv[0] == "dpkg-query":
                return 127, "", ""
            return 1, "package libnvidia-container1 is not installed\nnvidia-container-toolkit 1.20.1-1\n", ""

        found = container_toolkit.packages(run, str(tmp_path))
        assert found == {"nvidia-container-toolkit": {"version": "1.20.1-1", "held": held}}


class TestEngine:
    @pytest.mark.parametrize(
        ("answer", "says"),
        [
            ((127, "", ""), "there is no Docker Engine"),
            ((1, "", "permission denied\n"), "does not answer: permission denied"),
            (
                (0, json.dumps({"ID": "", "ServerErrors": ["Cannot connect to\nthe daemon"]}), ""),
                "does not answer: Cannot connect to the daemon",
            ),
            ((0, "nonsense", ""), "does not answer: nonsense"),
        ],
    )
    def test_does_not_answer(self, answer: Any, says: str) -> None:
        with pytest.raises(container_toolkit.EngineError, match=says):
            container_toolkit.engine(lambda _argv: answer)

    def test_answers(self) -> None:
        told = {"ServerVersion": "28.0", "Runtimes": {"runc": {}}}
        assert container_toolkit.engine(lambda _argv: (0, json.dumps(told), "")) == told
