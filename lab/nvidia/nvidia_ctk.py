#!/usr/bin/python3
"""Stands for NVIDIA's tool: writes and lists the CDI specification of the simulated card.

nvidia-ctk cdi generate [--output=FILE] | nvidia-ctk cdi list | nvidia-ctk system create-dev-char-symlinks --create-all |
nvidia-ctk --version
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import subprocess
import sys
from typing import Any

VERSION = "@VERSION@"
FOLDERS = ("/etc/cdi", "/var/run/cdi")
# The loaded driver's folder of /proc, where a container's own /proc is not in the way.
PROC = "/run/nemo-lab/nvidia"
LIBRARIES = ("libnvidia-ml", "libcuda")
FILES = ("/usr/bin/nvidia-smi", "/usr/bin/nvidia-persistenced", "/etc/nemo-lab/gpu.json")


def fail(text: str) -> None:
    print(f'time="now" level=error msg="{text}"', file=sys.stderr)
    sys.exit(1)


def specification() -> dict[str, Any]:
    """Everything that a container needs for the card; the driver is asked first, as NVIDIA's tool does."""
    asked = subprocess.run(["nvidia-smi", "-L"], check=False, capture_output=True, text=True)
    found = re.search(r"^GPU 0: .* \(UUID: (.+)\)$", asked.stdout, re.MULTILINE)
    if asked.returncode or not found:
        fail(f"failed to generate CDI spec: failed to initialize NVML: {' '.join(asked.stdout.split())}")
        raise AssertionError
    libraries = [
        str(path) for name in LIBRARIES for path in sorted(pathlib.Path("/usr/lib").glob(f"*-linux-gnu/{name}.so.*.*"))
    ]
    mounts = [
        {"hostPath": path, "containerPath": path, "options": ["ro", "nosuid", "nodev", "rbind", "rprivate"]}
        for path in [*(path for path in FILES if pathlib.Path(path).exists()), *libraries]
    ]
    mounts.append({"hostPath": "/proc/driver/nvidia", "containerPath": PROC, "options": ["ro", "rbind", "rprivate"]})
    edits = {"env": ["NVIDIA_VISIBLE_DEVICES=void"], "mounts": mounts}
    return {
        "cdiVersion": "0.5.0",
        "kind": "nvidia.com/gpu",
        "devices": [{"name": name, "containerEdits": {}} for name in ("0", found[1], "all")],
        "containerEdits": edits,
    }


def generate(arguments: list[str]) -> None:
    output = os.environ.get("NVIDIA_CTK_CDI_OUTPUT_FILE_PATH", "")
    while arguments:
        word = arguments.pop(0)
        name, equals, value = word.partition("=")
        if name == "--output":
            output = value if equals else arguments.pop(0)
        elif name != "--format":
            fail(f"flag provided but not defined: {word}")
    text = json.dumps(specification(), indent=2) + "\n"  # which is YAML as well
    if not output:
        print(text, end="")
        return
    target = pathlib.Path(output)
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_suffix(".new")
    draft.write_text(text)
    draft.replace(target)
    print(f'time="now" level=info msg="Generated CDI spec with version 0.5.0 at {output}"', file=sys.stderr)


def names() -> list[str]:
    found = []
    for folder in FOLDERS:
        for path in sorted(pathlib.Path(folder).glob("*.yaml")):
            spec = json.loads(path.read_text())
            found += [f"{spec['kind']}={device['name']}" for device in spec["devices"]]
    return found


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["--version"]:
        print(f"NVIDIA Container Toolkit CLI version {VERSION}")
    elif arguments[:2] == ["cdi", "generate"]:
        generate(arguments[2:])
    elif arguments[:2] == ["cdi", "list"]:
        print(f'time="now" level=info msg="Found {len(names())} CDI devices"', file=sys.stderr)
        print("\n".join(names()))
    elif arguments == ["system", "create-dev-char-symlinks", "--create-all"]:
        pass  # the card has no device files that could have names
    else:
        fail(
            f"the lab's nvidia-ctk knows cdi, system create-dev-char-symlinks and --version, not {' '.join(arguments)!r}"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
