# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""nemo.platform.container_image with a docker command of its own, as Ansible runs it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ansible_collections.nemo.platform.plugins.module_utils import container_release, image_pull
from ansible_collections.nemo.platform.plugins.module_utils.progress import Pace
from tests.unit.helpers import ROOT

MODULE = ROOT / "plugins" / "modules" / "container_image.py"
IMAGE = "registry.example/vllm-openai"
DIGEST = "sha256:" + "ab" * 32
REFERENCE = f"{IMAGE}@{DIGEST}"
CONFIG: dict[str, Any] = {
    "Env": ["CUDA_VERSION=13.0.2", "NVIDIA_REQUIRE_CUDA=cuda>=13.0 brand=tesla,driver>=580", "EMPTY="],
    "Entrypoint": ["vllm", "serve"], "Cmd": None, "Labels": {"maker": "nemo"}, "User": "", "WorkingDir": "/w",
    "ExposedPorts": {"8000/tcp": {}},
}  # fmt: skip
# Its state is a folder: what it pulls, what goes wrong, and what it was asked.
DOCKER = r"""#!{python}
import json, os, pathlib, sys, time
state = pathlib.Path({state!r})
words = sys.argv[1:]
with (state / "asked").open("a") as asked:
    asked.write(" ".join(words) + "\n")
def fail(text, code=1):
    sys.stderr.write(text + "\n")
    sys.exit(code)
if words[0] == "info":
    if (state / "down").exists():
        fail("Cannot connect to the Docker daemon at unix:///var/run/docker.sock. Is the docker daemon running?")
    print(json.dumps(dict(OSType="linux", Architecture="x86_64", DockerRootDir=str(state))))
elif words[:2] == ["image", "inspect"]:
    if (state / "down").exists():
        fail("Cannot connect to the Docker daemon at unix:///var/run/docker.sock. Is the docker daemon running?")
    if not (state / "image.json").exists():
        fail("Error: No such image: " + words[-1])
    print((state / "image.json").read_text())
elif words[:2] == ["manifest", "inspect"]:
    if not (state / "manifest.json").exists():
        fail("no such manifest: " + words[-1])
    found = json.loads((state / "manifest.json").read_text())
    print(json.dumps(found.get(words[-1].rpartition("@")[2], found)))
elif words[0] == "pull":
    failures = (state / "failures").read_text().splitlines() if (state / "failures").exists() else []
    if failures:
        (state / "failures").write_text("\n".join(failures[1:]))
        if failures[0] == "hang":
            time.sleep(60)
        fail(failures[0])
    bar = "[==>   ]" if sys.stdout.isatty() else ""
    for layer, megabytes in (("aaaaaaaaaaaa", 60), ("bbbbbbbbbbbb", 40)):
        print(layer + ": Pulling fs layer", flush=True)
        for got in (0.5, megabytes / 2, megabytes):
            if bar:
                sys.stdout.write(f"\x1b[1A\x1b[2K\r{{layer}}: Downloading {{bar}}  {{got}}MB/{{megabytes}}MB\r\x1b[1B")
                sys.stdout.flush()
            time.sleep(float((state / "pause").read_text()) if (state / "pause").exists() else 0)
            while (state / "hold").exists():
                time.sleep(0.02)
        print(layer + ": Download complete", flush=True)
        print(layer + ": Pull complete", flush=True)
    (state / "pulled.json").rename(state / "image.json")
else:
    fail("unknown: " + " ".join(words))
"""


class Host:
    def __init__(self, folder: Path) -> None:
        self.state, self.run_path, self.bin = folder / "state", folder / "run", folder / "bin"
        self.state.mkdir()
        self.bin.mkdir()
        self.image = {
            "Id": "sha256:" + "cd" * 32, "Os": "linux", "Architecture": "amd64", "RepoDigests": [REFERENCE],
            "Size": 21_000_000_000, "Config": CONFIG,
        }  # fmt: skip
        (self.state / "pulled.json").write_text(json.dumps(self.image))
        (self.bin / "docker").write_text(DOCKER.format(python=sys.executable, state=str(self.state)))
        (self.bin / "docker").chmod(0o755)

    def start(self, **changes: Any) -> subprocess.Popen[bytes]:
        check = changes.pop("check", False)
        arguments = {
            "image": IMAGE, "tag": "v0.33.0", "digest": DIGEST, "run_path": str(self.run_path), "timeout": 30,
            "min_free_disk_mb": 0, "_ansible_check_mode": check, "_ansible_diff": True, **changes,
        }  # fmt: skip
        paths = os.pathsep.join([str(ROOT / "collections"), str(ROOT), *sys.path])
        environment = {**os.environ, "PYTHONPATH": paths, "PATH": str(self.bin)}
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", str(MODULE)],
            env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        assert process.stdin
        process.stdin.write(json.dumps({"ANSIBLE_MODULE_ARGS": arguments}).encode())
        process.stdin.close()
        process.stdin = None
        return process

    @staticmethod
    def result(process: subprocess.Popen[bytes]) -> dict[str, Any]:
        out, err = process.communicate(timeout=60)
        assert out, err.decode()
        data: dict[str, Any] = json.loads(out)
        return data

    def run(self, **changes: Any) -> dict[str, Any]:
        return self.result(self.start(**changes))

    def asked(self, command: str) -> list[str]:
        lines = (self.state / "asked").read_text().splitlines() if (self.state / "asked").exists() else []
        return [line for line in lines if line.startswith(command)]

    def said(self) -> list[str]:
        return (self.run_path / "progress" / "image-vllm-openai").read_text().splitlines()

    def worker(self) -> int:
        for lock in self.run_path.glob("image-*.lock"):
            text = lock.read_text()
            if text:
                return int(json.loads(text)["pid"])
        return 0


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def eventually(what: Any, seconds: float = 10) -> Any:
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        found = what()
        if found:
            return found
        time.sleep(0.02)
    raise AssertionError("it did not come to be")


def test_an_image_is_pulled_once_and_says_what_it_is(host: Host) -> None:
    result = host.run()
    assert (result["changed"], result["action"], result["digest"]) == (True, "pulled", DIGEST), result
    assert result["reference"] == REFERENCE
    assert result["id"] == host.image["Id"]
    assert result["size"] == 21_000_000_000
    config = result["config"]
    assert config["Env"] == {
        "CUDA_VERSION": "13.0.2", "NVIDIA_REQUIRE_CUDA": "cuda>=13.0 brand=tesla,driver>=580", "EMPTY": "",
    }  # fmt: skip
    assert (config["Entrypoint"], config["Cmd"], config["ExposedPorts"]) == (["vllm", "serve"], [], ["8000/tcp"])
    again = host.run()
    assert (again["changed"], again["action"], again["config"]) == (False, "present", config), again
    assert len(host.asked("pull")) == 1
    assert host.asked("pull") == [f"pull {REFERENCE}"]


def test_by_its_tag_where_no_digest_is_given(host: Host) -> None:
    result = host.run(digest="")
    assert (result["action"], result["reference"], result["digest"]) == ("pulled", f"{IMAGE}:v0.33.0", DIGEST), result


def test_in_the_background_and_attached_to(host: Host) -> None:
    (host.state / "hold").touch()
    (host.state / "pause").write_text("1")
    started = host.run(wait=False)
    assert (started["changed"], started["action"], started["config"]) == (True, "started", {}), started
    assert host.run(wait=False)["action"] == "started"
    attached = host.start()
    (host.state / "hold").unlink()  # five pauses are left in which it attaches
    assert host.result(attached)["action"] == "pulled"
    assert len(host.asked("pull")) == 1
    assert host.said()[0].startswith(f"pulling {REFERENCE}")
    assert host.said()[-1].startswith("pulled in ")


def test_check_mode_pulls_nothing(host: Host) -> None:
    result = host.run(check=True)
    assert (result["changed"], result["action"]) == (True, "pulled"), result
    assert result["diff"]["after"] == f"{REFERENCE}\n"
    assert not host.asked("pull")
    assert not host.run_path.exists()


@pytest.mark.parametrize("lacks", ["command", "engine"])
def test_check_mode_on_a_bare_host(host: Host, lacks: str) -> None:
    if lacks == "command":
        (host.bin / "docker").unlink()
    else:
        (host.state / "down").touch()
    result = host.run(check=True)
    assert (result["changed"], result["action"]) == (True, "pulled"), result
    assert "a run that is no check sets it up first" in json.dumps(result["warnings"])
    failed = host.run()
    assert failed["reason"] == ("docker_missing" if lacks == "command" else "engine_down"), failed


def test_a_disk_that_is_too_small_for_what_the_manifest_says(host: Host) -> None:
    layers = {"layers": [{"size": 10**15}, {"size": 5}]}
    listed = {"manifests": [{"digest": DIGEST, "platform": {"os": "linux", "architecture": "amd64"}}], DIGEST: layers}
    for manifest in (layers, listed):
        (host.state / "manifest.json").write_text(json.dumps(manifest))
        for check in (True, False):
            result = host.run(check=check, digest="")
            assert (result["failed"], result["reason"]) == (True, "no_space"), result
            assert "3000000.0 GB (1000000.0 GB compressed)" in result["msg"]
    assert not host.asked("pull")
    assert host.run(space_factor=0)["action"] == "pulled"


def test_images_of_containerd_lie_in_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    containerd = {"DockerRootDir": "/data/docker", "DriverStatus": [["driver-type", "io.containerd.snapshotter.v1"]]}
    monkeypatch.setattr(container_release, "CONTAINERD_ROOT", str(tmp_path))
    folders = container_release.image_folders
    assert folders(containerd) == ["/data/docker", str(tmp_path)]
    assert folders({**containerd, "DriverStatus": [["Backing Filesystem", "xfs"]]}) == ["/data/docker"]
    assert folders({"DriverStatus": None}) == ["/var/lib/docker"]
    monkeypatch.setattr(container_release, "CONTAINERD_ROOT", str(tmp_path / "none"))
    assert folders(containerd) == ["/data/docker"]


def test_a_failure_between_begin_and_wait_is_not_tried_again(host: Host) -> None:
    (host.state / "failures").write_text("denied: access forbidden\n" * 5)
    begun = host.run(wait=False)
    assert begun["action"] == "started", begun
    while not list(host.run_path.glob("*.outcome")):
        time.sleep(0.05)
    pulls = len(host.asked("pull"))
    assert host.run(begun=begun["begun"])["failed"]
    assert len(host.asked("pull")) == pulls


def test_a_reserve_is_kept_where_no_manifest_says_a_size(host: Host) -> None:
    assert host.run(min_free_disk_mb=10**10)["reason"] == "no_space"
    assert not host.asked("pull")


UNREACHABLE = "Error response from daemon: Get https://registry.example/v2/: dial tcp: i/o timeout"


def test_a_registry_that_cannot_be_reached_is_tried_again(host: Host) -> None:
    (host.state / "failures").write_text(UNREACHABLE)
    assert host.run(retries=1)["action"] == "pulled"
    assert len(host.asked("pull")) == 2
    assert any("i/o timeout; next try in 2 s" in line for line in host.said())


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (UNREACHABLE, "registry_unreachable"),
        ("Error response from daemon: manifest for x not found: manifest unknown", "not_found"),
        ("Error response from daemon: pull access denied: no basic auth credentials", "authentication"),
        ("write /var/lib/docker/tmp/GetImageBlob1: no space left on device", "no_space"),
    ],
)
def test_what_the_registry_refuses_is_an_error_of_one_line(host: Host, said: str, reason: str) -> None:
    (host.state / "failures").write_text(f"{said}\n{said}")
    result = host.run(retries=0)
    assert (result["failed"], result["reason"]) == (True, reason), result
    assert said.rpartition("daemon: ")[2] in result["msg"]
    assert result["advice"] in result["msg"]
    assert "\n" not in result["msg"]
    assert len(host.asked("pull")) == 1
    assert host.said()[-1].startswith("failed: ")


def test_a_pull_that_hangs_is_begun_again(host: Host) -> None:
    (host.state / "failures").write_text("hang")
    assert host.run(stall_timeout=1, retries=1)["action"] == "pulled"
    assert any("nothing came for 1 s; next try" in line for line in host.said())


def test_a_worker_that_is_killed_is_replaced_when_its_pull_has_ended(host: Host) -> None:
    (host.state / "pause").write_text("0.3")
    run = host.start()
    eventually(lambda: host.asked("pull"))
    pid = eventually(host.worker)
    os.kill(pid, signal.SIGKILL)
    assert host.result(run)["action"] == "pulled"


def test_a_run_that_is_killed_leaves_the_pull_at_work(host: Host) -> None:
    (host.state / "pause").write_text("0.2")
    run = host.start()
    eventually(lambda: host.asked("pull"))
    run.kill()
    run.wait()
    eventually((host.state / "image.json").exists)
    assert host.run()["action"] == "present"
    assert len(host.asked("pull")) == 1


def test_an_image_for_another_platform(host: Host) -> None:
    (host.state / "pulled.json").write_text(json.dumps({**host.image, "Architecture": "arm64"}))
    result = host.run()
    assert (result["failed"], result["reason"]) == (True, "platform"), result
    assert "built for linux/arm64, this host is linux/amd64" in result["msg"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("image", f"{IMAGE}:v1"), ("image", "UPPER"), ("tag", "a b"), ("digest", "sha256:12"), ("timeout", 0),
        ("name", "../x"), ("space_factor", -1), ("retries", -1),
    ],
)  # fmt: skip
def test_arguments(host: Host, name: str, value: Any) -> None:
    result = host.run(**{name: value})
    assert (result["failed"], result["reason"]) == (True, "arguments"), result
    assert f"{name} is " in result["msg"]


# -- what docker says


def test_layers_as_docker_tells_them() -> None:
    layers = image_pull.Layers()
    for line in (
        "v0.33.0: Pulling from vllm-openai",
        "aaaaaaaaaaaa: Already exists",
        "\x1b[1Abbbbbbbbbbbb: Downloading [=>     ]  1.5GB/3GB\x1b[1B",
        "cccccccccccc: Downloading  512kB/1MB",
        "dddddddddddd: Waiting",
    ):
        layers.read(line)
    assert (layers.done, len(layers.states), layers.bytes) == (1, 4, 1_500_512_000)
    pace = Pace()
    pace.note(0, 0)
    pace.note(10, 1_500_512_000)
    assert layers.text(pace, 6_000_000_000) == "1 of 4 layers ready, downloaded 1.5 GB of 6.0 GB, 150 MB/s, 30 s left"
    for line in (
        "bbbbbbbbbbbb: Extracting [=>  ]  1GB/3GB",
        "cccccccccccc: Pull complete",
        "dddddddddddd: Extracting 3 s",
    ):
        layers.read(line)
    assert layers.text(pace, 0) == "2 of 4 layers ready, downloaded 3.0 GB, unpacking"
