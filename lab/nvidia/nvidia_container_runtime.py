#!/usr/bin/python3
"""Stands for NVIDIA's runtime: runc, with the simulated card in containers that ask for it (NVIDIA_VISIBLE_DEVICES).

What a container gets is what a CDI specification of the moment says, as the real one does since 1.18.
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

VERSION = "@VERSION@"
VOID = ("", "void", "none")
TAKES_A_VALUE = ("--root", "--log", "--log-format", "--criu", "--rootless")


def option(name: str, arguments: list[str]) -> str:
    """The value of an option, however it is written."""
    for index, word in enumerate(arguments):
        if word == name:
            return arguments[index + 1] if index + 1 < len(arguments) else ""
        if word.startswith(f"{name}="):
            return word.partition("=")[2]
    return ""


def command(arguments: list[str]) -> str:
    """runc's command, behind its own options."""
    skip = False
    for word in arguments:
        if not skip and not word.startswith("-"):
            return word
        skip = not skip and word in TAKES_A_VALUE
    return ""


def fail(arguments: list[str], text: str) -> None:
    """The engine reads why in the log that it named."""
    log = option("--log", arguments)
    if log:
        entry = {"level": "error", "msg": text, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
        with pathlib.Path(log).open("a") as stream:
            stream.write(json.dumps(entry) + "\n")
    print(text, file=sys.stderr)
    sys.exit(1)


def add_card(arguments: list[str], bundle: pathlib.Path) -> None:
    path = bundle / "config.json"
    spec = json.loads(path.read_text())
    process = spec["process"]
    wanted = [
        entry.partition("=")[2] for entry in process.get("env", []) if entry.startswith("NVIDIA_VISIBLE_DEVICES=")
    ]
    if not wanted or wanted[-1] in VOID:
        return
    made = subprocess.run(["nvidia-ctk", "cdi", "generate"], check=False, capture_output=True, text=True)
    if made.returncode:
        said = made.stderr.strip().rpartition('msg="')[2].rstrip('"')
        fail(arguments, f"nvidia-container-runtime: could not inject the devices {wanted[-1]!r}: {said}")
    for mount in json.loads(made.stdout)["containerEdits"]["mounts"]:
        spec["mounts"].append(
            {
                "destination": mount["containerPath"],
                "type": "bind",
                "source": mount["hostPath"],
                "options": mount["options"],
            }
        )
    path.write_text(json.dumps(spec))


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["--version"]:
        print(f"NVIDIA Container Runtime version {VERSION}")
    runc = shutil.which("runc", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/bin:/sbin")
    if not runc:
        fail(arguments, "nvidia-container-runtime: runc is not there")
        return
    if command(arguments) == "create":
        add_card(arguments, pathlib.Path(option("--bundle", arguments) or option("-b", arguments) or "."))
    os.execv(runc, [runc, *arguments])


if __name__ == "__main__":
    main(sys.argv[1:])
