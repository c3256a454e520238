"""What role nvidia_driver makes of what it sees: its variables, templated by Ansible, on made-up hosts."""

from __future__ import annotations

import fcntl
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible.parsing.dataloader import DataLoader
from ansible.plugins.loader import init_plugin_loader
from ansible.template import Templar, trust_as_template
from ansible.utils.collection_loader._collection_finder import _AnsibleCollectionFinder

from ansible_collections.nemo.platform.plugins.module_utils.container_release import Lock
from tests.unit.helpers import ROOT

ROLE = ROOT / "roles/nvidia_driver"
OLD, NEW, NEWER_BRANCH = "580.95.05", "580.105.08", "590.48.01"
KERNEL = "6.8.0-101-aws"


@pytest.fixture(scope="module", autouse=True)
def plugins() -> Iterator[None]:
    init_plugin_loader()
    yield
    _AnsibleCollectionFinder._remove()  # else what other tests import from the collection is looked for by it


class Host:
    """A host with a driver of the role's that is well; a test changes what is seen, or what is asked for."""

    def __init__(self, distribution: str = "Debian", release: str = "12", **inputs: Any) -> None:
        self.loader = DataLoader()
        self.driver: dict[str, Any] = {
            "loaded": OLD, "installed": OLD, "libraries": OLD, "kernel": KERNEL, "next_kernel": KERNEL,
            "module_for_next": True, "headers": True, "headers_for_next": True, "packages": [], "kernel_packages": [],
        }  # fmt: skip
        self.look: dict[str, Any] = {"marked": True, "mark": OLD}
        self.gpu: dict[str, Any] = {"driver": self.driver, "usable": True, "problems": [], "reboot": {"needed": False}}
        self.facts = {
            "distribution": distribution, "distribution_version": release, "distribution_major_version": release,
            "os_family": "RedHat" if distribution == "Amazon" else "Debian", "architecture": "x86_64", "kernel": KERNEL,
        }  # fmt: skip
        self.inputs = inputs

    def see(self, *codes: str, **driver: Any) -> Host:
        self.driver.update(driver)
        self.gpu["problems"] = [{"code": code, "text": code} for code in codes]
        self.gpu["usable"] = not set(codes) - {"next_kernel", "xid", "persistence_off"}
        return self

    def packages(self, version: str, *names: str) -> Host:
        self.driver["packages"] += [{"name": name, "version": version, "held": True} for name in names]
        return self

    def __getitem__(self, name: str) -> Any:
        variables: dict[str, Any] = {}
        for path in ("defaults/main.yml", "vars/main.yml"):
            variables |= self.loader.load_from_file(str(ROLE / path), trusted_as_template=True)
        code = self.gpu["problems"][0]["code"] if self.gpu["problems"] else ""
        variables |= {
            **self.inputs,
            "ansible_facts": self.facts,
            "ansible_check_mode": False,
            "inventory_hostname": "vllm",
            "role_path": str(ROLE),
            "__nvidia_driver_look": {**self.look, "gpu": {**self.gpu, "code": code}},
        }
        text = (ROLE / name).read_text() if "/" in name else "{{ __nvidia_driver_%s }}" % name
        return Templar(self.loader, variables=variables).template(trust_as_template(text))


def upgraded(version: str, **inputs: Any) -> Host:
    """The role's driver is loaded, and somebody installed another one."""
    return Host(**inputs).see("module_mismatch", installed=version, libraries=version)


@pytest.mark.parametrize("version", [NEW, NEWER_BRANCH])
def test_an_upgrade_behind_our_back_is_taken_back_without_a_pin(version: str) -> None:
    host = upgraded(version)
    assert host["restore"]
    assert (host["target"], host["wanted_pattern"]) == (OLD, f"{OLD}-*")


def test_an_upgrade_by_this_role_waits_for_a_reboot() -> None:
    host = upgraded(NEW)
    host.packages(NEW, *host["names"])
    host.look["mark"] = NEW
    assert not host["restore"]
    assert not host["change"]


def test_a_driver_of_somebody_elses_is_not_taken_back_within_its_branch() -> None:
    host = upgraded(NEW)
    host.look.update(marked=False, mark="")
    assert not host["restore"]


def test_nothing_can_be_taken_back_from_an_archive_that_has_only_the_newest() -> None:
    ubuntu = {"distribution": "Ubuntu", "release": "24.04", "nvidia_driver_source": "ubuntu"}
    assert not upgraded(NEW, **ubuntu)["restore"]
    assert upgraded(NEW, **ubuntu, nvidia_driver_version=OLD)["restore"]


@pytest.mark.parametrize(("pin", "mark"), [(f"{OLD}-*", OLD), ("580.*", "580")])
def test_the_mark_is_the_version_or_the_branch(pin: str, mark: str) -> None:
    assert Host(__nvidia_driver_pin=pin)["marker_file"]["content"] == f"{mark}\n"


@pytest.mark.parametrize("distribution", ["Debian", "Amazon"])
def test_every_family_has_a_mark(distribution: str) -> None:
    host = Host(distribution, "2023" if distribution == "Amazon" else "12")
    assert "/etc/nemo/nvidia-driver" in [file["path"] for file in host["files"]]
    assert host["directories"] == [{"path": "/etc/nemo"}]


UBUNTU = {"distribution": "Ubuntu", "release": "24.04"}
OF_NVIDIA = ("libnvidia-compute-580", "nvidia-compute-utils-580", "nvidia-utils-580", "nvidia-dkms-580-open")
OF_UBUNTU = ("nvidia-headless-no-dkms-580-server-open", "nvidia-utils-580-server")


def test_a_name_that_bears_a_version_is_asked_for_in_no_other() -> None:
    host = upgraded(NEW, **UBUNTU)
    host.packages(f"{NEW}-0ubuntu1", *OF_NVIDIA, "libnvidia-cfg1-580", "nvidia-modprobe", f"nvidia-firmware-580-{NEW}")
    assert host["of_one_version"] == [*OF_NVIDIA, "libnvidia-cfg1-580", "nvidia-modprobe"]
    assert host["left_behind"] == [f"nvidia-firmware-580-{NEW}"]


def test_what_a_machine_image_had_of_another_branch_goes() -> None:
    others = (
        "libnvidia-compute-570", "nvidia-utils-570", "nvidia-dkms-570-open", "nvidia-firmware-570-570.195.03",
    )  # fmt: skip
    modules = f"linux-modules-nvidia-570-server-open-{KERNEL}"
    host = Host(**UBUNTU, nvidia_driver_replace=True).see(loaded="570.195.03", installed="570.195.03")
    host.packages("570.195.03-0ubuntu1", *others).packages("6.8.0-101.103", modules)
    assert host["replaced"]
    assert host["of_one_version"] == list(OF_NVIDIA)
    assert host["left_behind"] == sorted([*others, modules])


def test_packages_of_the_archive_are_not_those_of_nvidia() -> None:
    names = ("nvidia-utils-580", "nvidia-utils-580-server", f"nvidia-firmware-580-server-{OLD}")
    modules = (f"linux-modules-nvidia-580-server-open-{KERNEL}", "nvidia-dkms-580-open")
    host = upgraded(NEW, **UBUNTU).packages(f"{OLD}-0ubuntu0.24.04.1", *names, *modules)
    assert host["left_behind"] == sorted([*names[1:], modules[0]])
    host.inputs["nvidia_driver_source"] = "ubuntu"
    assert host["left_behind"] == sorted([names[0], modules[1]])
    assert host["of_one_version"] == list(OF_UBUNTU)


def test_packages_without_a_branch_in_their_names_are_left_to_those_with_one() -> None:
    host = upgraded(NEWER_BRANCH, **UBUNTU).packages(f"{NEWER_BRANCH}-1ubuntu1", "libnvidia-compute", "nvidia-modprobe")
    assert host["of_one_version"] == list(OF_NVIDIA)


def test_debian_names_no_branch() -> None:
    host = upgraded(NEWER_BRANCH).packages(
        f"{NEWER_BRANCH}-1", "libnvidia-ml1", "libcuda1", f"nvidia-firmware-590-{NEWER_BRANCH}"
    )
    assert host["of_one_version"][-2:] == ["libnvidia-ml1", "libcuda1"]
    assert host["left_behind"] == [f"nvidia-firmware-590-{NEWER_BRANCH}"]


def test_the_archive_of_ubuntu_is_passed_over_before_the_version_counts() -> None:
    lines = [line for line in Host(**UBUNTU)["templates/preferences.j2"].splitlines() if not line.startswith("#")]
    assert lines[:3] == ["Package: *nvidia*-580 *nvidia*-580-*", "Pin: release o=Ubuntu", "Pin-Priority: -1"]
    assert lines[-1] == "Pin-Priority: 1001"
    for other in (Host(), Host(**UBUNTU, nvidia_driver_source="ubuntu")):
        assert "release" not in other["templates/preferences.j2"]


def prebuilt(*kernels: str) -> list[str]:
    return [f"linux-modules-nvidia-580-server-open-{kernel}" for kernel in kernels]


def test_a_bare_host_gets_the_modules_of_the_kernels_that_it_has() -> None:
    bare = {"loaded": "", "installed": "", "libraries": "", "next_kernel": "6.8.0-102-aws", "module_for_next": False}
    host = Host(**UBUNTU, nvidia_driver_source="ubuntu").see("driver_missing", **bare)
    assert host["prebuilt"] == prebuilt(KERNEL, "6.8.0-102-aws")
    assert not [name for name in host["names"] if name.startswith("linux-")]
    assert Host(**UBUNTU).see("driver_missing", **bare)["prebuilt"] == []


def test_a_module_for_the_next_kernel_alone() -> None:
    host = Host(**UBUNTU, nvidia_driver_source="ubuntu")
    host.see("next_kernel", next_kernel="6.8.0-102-aws", module_for_next=False)
    assert host["prebuilt"] == prebuilt("6.8.0-102-aws")


def test_another_branch_needs_modules_although_there_are_some() -> None:
    host = Host(**UBUNTU, nvidia_driver_source="ubuntu", nvidia_driver_replace=True)
    assert host.see(loaded="570.195.03", installed="570.195.03")["prebuilt"] == prebuilt(KERNEL)


@pytest.mark.parametrize(
    ("status", "built"),
    [
        (f"nvidia/{OLD}, {KERNEL}, x86_64: installed", ""),
        (f"nvidia/{OLD}: added", f"install -m nvidia -v {OLD} -k {KERNEL}"),
        (f"nvidia, {OLD}, 6.8.0-99-aws, x86_64: installed", f"install -m nvidia -v {OLD} -k {KERNEL}"),
        (f"nvidia-open/{OLD}, 6.8.0-99-aws, x86_64: built", f"install -m nvidia-open -v {OLD} -k {KERNEL}"),
        (f"nvidia/{OLD}: added\nnvidia/{NEW}: added", f"install -m nvidia -v {NEW} -k {KERNEL}"),
        ("nvidia-fs/2.24.2: added\nlustre-client/2.12.8: added", ""),
        ("", ""),
    ],
)
def test_only_the_drivers_module_is_built(tmp_path: Path, status: str, built: str) -> None:
    words = tmp_path / "words"
    (tmp_path / "status").write_text(status)
    dkms = tmp_path / "dkms"
    dkms.write_text(
        f'#!/bin/sh\ncd {tmp_path}; [ "$1" = status ] || exec echo "$@" >words\n'
        '[ $# = 1 ] && exec cat status; grep "$7" status\n'
    )
    dkms.chmod(0o755)
    script = (ROLE / "files/build.sh").read_text()
    subprocess.run(["sh", "-c", script, "sh", KERNEL], check=True, env={"PATH": f"{tmp_path}:/usr/bin:/bin"})
    assert (words.read_text().strip() if words.exists() else "") == built


def test_a_host_without_dkms_builds_nothing() -> None:
    script = (ROLE / "files/build.sh").read_text().replace("command -v dkms", "command -v there-is-none")
    subprocess.run(["sh", "-c", script, "sh", KERNEL], check=True)


class TestReboot:
    """The command of the reboot, on a host that is a folder."""

    @pytest.fixture
    def host(self, tmp_path: Path) -> Path:
        for folder in ("lib", "run", "proxy", "bin"):
            (tmp_path / folder).mkdir()
        for service in ("ai-prod", "vllm"):
            (tmp_path / "lib" / service).mkdir()
            (tmp_path / "lib" / service / "state.json").touch()
        (tmp_path / "proxy/vllm.cfg").touch()
        (tmp_path / "bin/systemctl").write_text(
            f'#!/bin/sh\necho "$*" >>{tmp_path}/acts\n[ "$1" != reboot ] || [ ! -e {tmp_path}/broken ]\n'
        )
        (tmp_path / "bin/systemctl").chmod(0o755)
        return tmp_path

    def run(self, host: Path) -> subprocess.CompletedProcess[str]:
        script = (ROLE / "files/reboot.sh").read_text()
        for real, made in (("/var/lib/nemo", "lib"), ("/run/nemo", "run"), ("/etc/nemo/proxy", "proxy")):
            assert real in script
            script = script.replace(real, str(host / made))
        assert "sleep 60" in script
        script = script.replace("sleep 60", "sleep 1")
        environment = {"PATH": f"{host}/bin:/usr/bin:/bin"}
        return subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=False, env=environment)

    def is_held(self, host: Path, service: str) -> bool:
        with (host / f"run/{service}.lock").open() as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    def test_has_every_lock_until_the_shutdown(self, host: Path) -> None:
        assert self.run(host).returncode == 0
        assert self.is_held(host, "ai-prod")
        assert self.is_held(host, "vllm")
        assert (host / "acts").read_text().splitlines() == ["stop nemo-proxy-*.socket", "reboot"]
        for service in ("ai-prod", "vllm"):
            lock = Lock(str(host / f"run/{service}.lock"))
            assert not lock.try_acquire()
            assert re.match(r"root since 20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ .* a reboot\)$", lock.holder())
            lock.release()

    def test_one_that_begins_at_the_last_moment_is_told(self, host: Path) -> None:
        """After the look at its lock, and before the lock is taken."""
        flock = host / "bin/flock"
        flock.write_text('#!/bin/sh\n[ "$3" = true ] || exec /usr/bin/flock "$@"\n')
        flock.chmod(0o755)
        with (host / "run/vllm.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            done = self.run(host)
        assert done.returncode == 75
        assert done.stderr == "no reboot: another run has just begun on a service of this host\n"
        assert not (host / "acts").exists()

    def test_waits_for_nobody(self, host: Path) -> None:
        with (host / "run/vllm.lock").open("w") as lock:
            lock.write('{"by": "kim", "what": "v0.33.0"}')
            lock.flush()
            fcntl.flock(lock, fcntl.LOCK_EX)
            done = self.run(host)
        assert done.returncode == 75
        assert done.stderr == 'no reboot while another run is at work on vllm: {"by": "kim", "what": "v0.33.0"}\n'
        assert not (host / "acts").exists()

    def test_one_that_does_not_come_about_gives_the_service_back(self, host: Path) -> None:
        (host / "broken").touch()
        assert self.run(host).returncode == 1
        assert (host / "acts").read_text().splitlines()[-1] == "start nemo-proxy-vllm.service"
        assert not self.is_held(host, "vllm")

    def test_a_host_without_services(self, tmp_path: Path, host: Path) -> None:
        for service in ("ai-prod", "vllm"):
            (host / "lib" / service / "state.json").unlink()
        (host / "proxy/vllm.cfg").unlink()
        assert self.run(host).returncode == 0
