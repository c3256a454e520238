"""The lab's stub packages of NVIDIA's: files that apt, dpkg and modinfo take for what they say they are."""

from __future__ import annotations

import hashlib
import json
import re
import struct
import subprocess
from pathlib import Path

import pytest

from lab import gpu
from lab.artifacts import nvidia
from lab.aws import deb
from tests.unit.helpers import ROOT

MACHINE = "x86_64"


@pytest.fixture(scope="module")
def packages() -> dict[tuple[str, str], nvidia.Package]:
    return {(package.name, package.version): package for package in [*nvidia.drivers(MACHINE), *nvidia.toolkits()]}


def test_names_of_the_installation_guide(packages) -> None:
    names = {name for name, _version in packages}
    assert {
        "nvidia-driver-cuda",
        "nvidia-kernel-open-dkms",
        "nvidia-open",
        "nvidia-persistenced",
        "nvidia-driver-pinning-580",
    } <= names
    assert {
        "nvidia-container-toolkit",
        "nvidia-container-toolkit-base",
        "libnvidia-container1",
        "libnvidia-container-tools",
    } <= names


def test_a_branch_in_two_versions_and_a_newer_one() -> None:
    branches = [version.partition(".")[0] for version in nvidia.DRIVERS]
    assert branches.count("580") == 2
    assert max(branches) > "580"
    assert len(nvidia.TOOLKITS) == 2


def test_a_package_can_be_read_and_depends_on_its_own_version(packages, tmp_path: Path) -> None:
    version = f"{nvidia.DRIVER}-1"
    package = packages["nvidia-driver-cuda", version]
    file = tmp_path / "a.deb"
    file.write_bytes(package.build("amd64"))
    assert deb.read(file, "usr/bin/nvidia-smi") == (ROOT / "lab/nvidia/nvidia-smi").read_bytes()
    assert f"libnvidia-ml1 (= {version})" in package.control("amd64")
    with deb.contents(file) as archive:
        assert archive.getmember("./usr/bin/nvidia-smi").mode == 0o755


def test_every_dependency_is_there(packages) -> None:
    names = {name for name, _version in packages} | {"python3"}
    for package in packages.values():
        for entry in filter(None, package.depends.split(", ")):
            name, _space, wanted = entry.partition(" ")
            assert name in names, package.name
            exact = re.fullmatch(r"\(= (.+)\)", wanted)
            assert exact is None or (name, exact[1]) in packages


def test_the_module_tells_its_version() -> None:
    data = nvidia.elf(MACHINE, {"version": "580.95.05", "license": "Dual MIT/GPL"})
    offset, count = struct.unpack_from("<Q", data, 40)[0], struct.unpack_from("<H", data, 60)[0]
    assert offset + 64 * count == len(data)
    assert b"version=580.95.05\0license=Dual MIT/GPL\0" in data


def test_the_index_describes_what_is_there(tmp_path: Path) -> None:
    folder = tmp_path / "repository"
    nvidia.repository(folder, nvidia.toolkits(), "amd64", "a test")
    index = (folder / "Packages").read_text()
    for name, size, digest in re.findall(r"Filename: \./(\S+)\nSize: (\d+)\nSHA256: (\w+)", index):
        data = (folder / name).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (int(size), digest)
    assert hashlib.sha256(index.encode()).hexdigest() in (folder / "Release").read_text()


def test_packages_are_the_same_each_time() -> None:
    first, second = ([package.build("amd64") for package in nvidia.drivers(MACHINE)] for _ in range(2))
    assert first == second


@pytest.mark.parametrize("name", ["nvidia-smi", "nvidia-module", "nvidia-persistenced", "dkms", "journalctl"])
def test_shell_programs_can_be_read_by_a_shell(name: str) -> None:
    subprocess.run(["sh", "-n", str(gpu.STUBS / name)], check=True)


def test_what_a_host_with_a_card_gets() -> None:
    paths = {path for path, _data, _mode in gpu.payload_files()}
    assert paths == {gpu.PROGRAM, "/usr/local/bin/journalctl", f"/etc/systemd/system/{gpu.UNIT}.service"}


@pytest.mark.parametrize(
    ("loaded", "library", "behaviour", "status", "says"),
    [
        ("580.95.05", "580.95.05", "ok", 0, "NVIDIA A10G, 580.95.05, 23028, Disabled"),
        ("", "580.95.05", "ok", 9, "couldn't communicate with the NVIDIA driver"),
        ("580.95.05", "580.105.08", "ok", 18, "Driver/library version mismatch\nNVML library version: 580.105"),
        ("580.95.05", "580.95.05", "lost", 15, "Unable to determine the device handle"),
    ],
)
def test_nvidia_smi(tmp_path: Path, loaded: str, library: str, behaviour: str, status: int, says: str) -> None:
    state = {
        "behaviour": behaviour,
        "name": "NVIDIA A10G",
        "memory_total_mib": 23028,
        "persistence": False,
        "processes": [],
    }
    (tmp_path / "gpu.json").write_text(json.dumps(state, indent=1))
    (tmp_path / "lib").mkdir()
    (tmp_path / f"lib/libnvidia-ml.so.{library}").touch()
    if loaded:
        (tmp_path / "version").write_text(
            f"NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {loaded}  Release\n"
        )
    text = (gpu.STUBS / "nvidia-smi").read_text()
    for real, made in (
        ("/etc/nemo-lab/gpu.json", "gpu.json"), ("/proc/driver/nvidia/version", "version"),
        ("/run/nemo-lab/nvidia/version", "none"), ("/usr/lib/*/", "lib/"), ("/usr/lib64/", "none/"),
    ):  # fmt: skip
        assert real in text
        text = text.replace(real, str(tmp_path / made) + ("/" if made.endswith("/") else ""))
    (tmp_path / "nvidia-smi").write_text(text)
    fields = "name,driver_version,memory.total,persistence_mode"
    argv = ["sh", str(tmp_path / "nvidia-smi"), f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert (done.returncode, says in done.stdout) == (status, True), done
