"""What is loaded, reloaded and left alone, on a host whose kernel is a dictionary."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from ansible_collections.nemo.platform.plugins.modules import gpu_driver as module

NEW, OLD = "580.105.08", "580.95.05"
KERNEL = "6.1.0-44-cloud-amd64"


class Kernel:
    """A host with a card: files as the kernel shows them, and programs that change them."""

    def __init__(self, root: Path) -> None:
        self.root, self.installed, self.persistence = root, NEW, True
        self.daemon = self.in_use = self.broken = self.mute = False
        self.processes = ""
        self.acts: list[str] = []
        self.write("sys/bus/pci/devices/0000:00:1e.0/vendor", "0x10de")
        self.write("sys/bus/pci/devices/0000:00:1e.0/class", "0x030200")
        self.write("proc/sys/kernel/osrelease", KERNEL)
        self.write("lib/modules", "", folder=True)

    def write(self, path: str, text: str, folder: bool = False) -> None:
        target = self.root / path
        (target if folder else target.parent).mkdir(parents=True, exist_ok=True)
        if not folder:
            target.write_text(text)

    @property
    def banner(self) -> Path:
        return self.root / "proc/driver/nvidia/version"

    def load(self, version: str) -> None:
        self.write(
            "proc/driver/nvidia/version", f"NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {version}  x\n"
        )

    def run(self, argv: Sequence[str]) -> tuple[int, str, str]:
        words = " ".join(argv)
        if argv[0] in ("modprobe", "systemctl") and "is-active" not in argv:
            self.acts.append(words)
        if argv[0] == "modinfo":
            return (0, f"version: {self.installed}\nlicense: Dual MIT/GPL\n", "") if self.installed else (1, "", "none")
        if words == "modprobe nvidia":
            if self.broken:
                return 1, "", "modprobe: ERROR: could not insert 'nvidia': Key was rejected by service"
            self.load(self.installed)
            return 0, "", ""
        if words == "modprobe --remove nvidia":
            if self.in_use or self.daemon:
                return 1, "", "modprobe: FATAL: Module nvidia is in use."
            self.banner.unlink()
            return 0, "", ""
        if argv[0] == "modprobe":
            return (1, "", "FATAL: Module nouveau is in use.") if "nouveau" in argv and self.in_use else (0, "", "")
        if argv[0] == "systemctl":
            if "is-active" in argv:
                return (0 if self.daemon else 3), "", ""
            self.daemon = "start" in argv
            return 0, "", ""
        if argv[0] == "nvidia-smi":
            return self.smi(argv)
        return 127, "", "not there"

    def smi(self, argv: Sequence[str]) -> tuple[int, str, str]:
        if "-pm" in argv:
            self.persistence = True
            self.acts.append(" ".join(argv))
            return 0, "", ""
        if not self.banner.exists() or self.mute:
            return 9, "NVIDIA-SMI has failed", ""
        if "compute-apps" in argv[1]:
            return 0, self.processes, ""
        mode = "Enabled" if self.persistence else "Disabled"
        return 0, f"0, GPU-1, NVIDIA A10G, 00000000:00:1E.0, 23028, 0, 31, 0, 21.5, 0, 0, {mode}\n", ""


@pytest.fixture
def kernel(tmp_path: Path) -> Kernel:
    return Kernel(tmp_path)


def go(kernel: Kernel, check: bool = False) -> module.Driver:
    driver = module.Driver(kernel.run, str(kernel.root), check)
    driver.load()
    driver.reload()
    driver.persist()
    return driver


def test_what_is_loaded_already_stays(kernel: Kernel) -> None:
    kernel.load(NEW)
    driver = go(kernel)
    assert (driver.done, driver.refused, kernel.acts) == ([], [], [])
    assert driver.found["usable"]


def test_what_is_not_loaded_is(kernel: Kernel) -> None:
    kernel.persistence = False
    driver = go(kernel)
    assert driver.done == [f"loaded nvidia {NEW}", "turned persistence mode on"]
    assert kernel.acts == ["modprobe nvidia", "modprobe nvidia_uvm", "nvidia-smi -pm 1"]
    assert driver.found["usable"]
    assert driver.found["code"] == ""


def test_nouveau_makes_room(kernel: Kernel) -> None:
    kernel.write("sys/module/nouveau", "", folder=True)
    assert go(kernel).done == [f"loaded nvidia {NEW}"]
    assert kernel.acts[0] == "modprobe --remove nouveau"


def test_nouveau_that_is_in_use_stays(kernel: Kernel) -> None:
    kernel.write("sys/module/nouveau", "", folder=True)
    kernel.in_use = True
    driver = go(kernel)
    assert (driver.done, kernel.acts) == ([], ["modprobe --remove nouveau"])
    assert driver.refused == ["modprobe --remove nouveau: FATAL: Module nouveau is in use."]
    assert driver.found["reboot"]["needed"]


def test_a_module_that_the_kernel_refuses(kernel: Kernel) -> None:
    kernel.broken = True
    driver = go(kernel)
    assert driver.done == []
    assert "Key was rejected by service" in driver.refused[0]
    assert not driver.found["usable"]


def test_no_module_to_load(kernel: Kernel) -> None:
    kernel.installed = ""
    assert (go(kernel).done, kernel.acts) == ([], [])


def test_another_version_is_reloaded_and_the_daemon_comes_back(kernel: Kernel) -> None:
    kernel.load(OLD)
    kernel.daemon = True
    driver = go(kernel)
    assert driver.done == [f"reloaded nvidia: {NEW} in place of {OLD}"]
    assert kernel.acts[0] == "systemctl stop nvidia-persistenced.service"
    assert kernel.acts[-1] == "systemctl start nvidia-persistenced.service"
    assert kernel.daemon
    assert driver.found["driver"]["loaded"] == NEW


@pytest.mark.parametrize("seen", [True, False])
def test_what_is_in_use_is_never_taken_away(kernel: Kernel, seen: bool) -> None:
    kernel.load(OLD)
    kernel.in_use, kernel.mute = True, not seen
    kernel.processes = "4711, python3, 1200\n" if seen else ""
    driver = go(kernel)
    assert driver.done == []
    assert ("python3 (4711)" if seen else "Module nvidia is in use") in driver.refused[0]
    assert driver.found["driver"]["loaded"] == OLD
    assert driver.found["reboot"]["needed"]


def opens(kernel: Kernel, pid: int, name: str, file: str) -> None:
    kernel.write(f"proc/{pid}/comm", f"{name}\n")
    kernel.write(f"proc/{pid}/fd", "", folder=True)
    (kernel.root / f"proc/{pid}/fd/7").symlink_to(file)


def test_who_has_the_card_open_is_seen_though_nvidia_smi_says_nothing(kernel: Kernel) -> None:
    kernel.load(OLD)
    kernel.daemon = kernel.mute = True
    opens(kernel, 812, "nvidia-persiste", "/dev/nvidiactl")
    opens(kernel, 900, "bash", "/dev/null")
    opens(kernel, 4711, "dcgm-exporter", "/dev/nvidia0")
    driver = go(kernel)
    assert driver.refused == [f"nvidia {OLD} is in use by dcgm-exporter (4711)"]
    assert (driver.done, kernel.acts) == ([], [])


def test_a_module_that_holds_the_drivers_is_named(kernel: Kernel) -> None:
    kernel.load(OLD)
    for name in ("nvidia_uvm", "nvidia_peermem"):
        kernel.write(f"sys/module/nvidia/holders/{name}", "", folder=True)
    assert go(kernel).refused == [f"nvidia {OLD} is in use by module nvidia_peermem"]
    assert kernel.acts == []


def test_the_daemon_alone_is_no_user(kernel: Kernel) -> None:
    kernel.load(OLD)
    kernel.daemon = True
    opens(kernel, 812, "nvidia-persiste", "/dev/nvidiactl")
    assert go(kernel).done == [f"reloaded nvidia: {NEW} in place of {OLD}"]


def test_what_the_kernel_counts_is_asked_before_anything_goes(kernel: Kernel) -> None:
    kernel.load(OLD)
    kernel.daemon = True
    kernel.write("sys/module/nvidia/holders/nvidia_uvm", "", folder=True)
    kernel.write("sys/module/nvidia/refcnt", "2\n")
    assert go(kernel).refused == [f"nvidia {OLD} is in use by the kernel"]
    assert kernel.acts == ["systemctl stop nvidia-persistenced.service", "systemctl start nvidia-persistenced.service"]
    kernel.write("sys/module/nvidia/refcnt", "1\n")
    assert go(kernel).done == [f"reloaded nvidia: {NEW} in place of {OLD}"]


def test_a_refusal_leaves_all_as_it_was(kernel: Kernel) -> None:
    kernel.load(OLD)
    kernel.daemon = kernel.in_use = kernel.mute = True
    driver = go(kernel)
    assert driver.refused == ["modprobe --remove nvidia: modprobe: FATAL: Module nvidia is in use."]
    assert kernel.acts[-2:] == ["modprobe nvidia_uvm", "systemctl start nvidia-persistenced.service"]


def test_check_mode_does_nothing(kernel: Kernel) -> None:
    kernel.load(OLD)
    kernel.persistence = False
    assert len(go(kernel, check=True).done) == 2
    assert kernel.acts == []


def test_check_mode_of_a_module_that_is_not_loaded(kernel: Kernel) -> None:
    assert go(kernel, check=True).done == [f"loaded nvidia {NEW}"]
    assert kernel.acts == []
