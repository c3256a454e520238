"""What is said of a card and its driver, from a made-up tree of /proc and /sys and the words of the real programs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from ansible_collections.nemo.platform.plugins.module_utils import gpu

KERNEL = "6.1.0-44-cloud-amd64"
NEWER = "6.1.0-45-cloud-amd64"
A10G = "0, GPU-5e1f0a4c, NVIDIA A10G, 00000000:00:1E.0, 23028, 1234, 31, 7, 56.81, 0, [N/A], Enabled\n"
BANNER = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {}  Release Build  (dvs-builder@U22-I3)  Tue Sep 23 01:26:03 UTC 2025\nGCC version:  gcc version 12.2.0\n"
XID = "1763830000.250000 ip-10-0-2-20 kernel: NVRM: Xid (PCI:0000:00:1e): {}, {}\n"


@dataclasses.dataclass
class Host:
    """A host that is well; a test takes something away."""

    root: Path
    module: dict[str, str] = dataclasses.field(
        default_factory=lambda: {KERNEL: "version:        580.95.05\nlicense:        Dual MIT/GPL\n"}
    )
    smi: tuple[int, str, str] = (0, A10G, "")
    apps: str = "4711, /usr/bin/python3, with a comma, 1200\n"
    log: tuple[int, str, str] = (1, "", "")
    dpkg: tuple[int, str, str] = (
        0,
        "hold installed nvidia-open 580.95.05-1\nhold installed libnvidia-ml1 580.95.05-1\n"
        "install config-files nvidia-old 1\ninstall installed nvidia-container-toolkit 1.18.1-1\n"
        "unknown not-installed nvidia-driver\n"
        "hold installed linux-modules-nvidia-580-server-open-aws 1\ninstall installed linux-image-cloud-amd64 6.1\n",
        "",
    )
    rpm: str = ""
    grubby: tuple[int, str, str] = (127, "", "")
    asked: list[list[str]] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        self.write("sys/bus/pci/devices/0000:00:1e.0/vendor", "0x10de\n")
        self.write("sys/bus/pci/devices/0000:00:1e.0/class", "0x030200\n")
        self.write("sys/bus/pci/devices/0000:00:05.0/vendor", "0x1d0f\n")
        self.write("sys/bus/pci/devices/0000:00:05.0/class", "0x020000\n")
        self.write("proc/sys/kernel/osrelease", KERNEL + "\n")
        self.write("proc/driver/nvidia/version", BANNER.format("580.95.05"))
        self.write(f"boot/vmlinuz-{KERNEL}", "")
        self.libraries("580.95.05")

    def write(self, path: str, text: str | bytes) -> None:
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(text if isinstance(text, bytes) else text.encode())

    def libraries(self, version: str) -> None:
        folder = "usr/lib/x86_64-linux-gnu"
        self.write(f"{folder}/libnvidia-ml.so.{version}", "")
        link = self.root / folder / "libnvidia-ml.so.1"
        link.unlink(missing_ok=True)
        link.symlink_to(f"libnvidia-ml.so.{version}")

    def unloaded(self) -> None:
        (self.root / "proc/driver/nvidia/version").unlink()

    def secure(self) -> None:
        self.write(gpu.SECURE_BOOT, b"\x06\x00\x00\x00\x01")

    def run(self, argv: Sequence[str]) -> tuple[int, str, str]:
        self.asked.append(list(argv))
        if argv[0] == "modinfo":
            text = self.module.get(argv[2])
            return (0, text, "") if text else (1, "", f"modinfo: ERROR: Module {argv[3]} not found.")
        if argv[:2] == ["nvidia-smi", "--version"]:
            return (
                0,
                "NVIDIA-SMI version  : 580.95.05\nDRIVER version      : 580.95.05\nCUDA Version        : 13.0\n",
                "",
            )
        if argv[0] == "nvidia-smi":
            return (0, self.apps, "") if "compute-apps" in argv[1] else self.smi
        return {"dpkg-query": self.dpkg, "grubby": self.grubby, "journalctl": self.log, "rpm": (0, self.rpm, "")}[
            argv[0]
        ]

    def look(self) -> dict[str, Any]:
        return gpu.look(str(self.root), self.run)


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def test_a_healthy_card(host: Host) -> None:
    found = host.look()
    assert (found["present"], found["usable"], found["code"], found["problem"]) == (True, True, "", "")
    assert (found["pci"], found["cuda"], found["xids"], found["problems"]) == (["0000:00:1e.0"], "13.0", [], [])
    assert found["reboot"] == {"needed": False, "why": ""}
    driver = found["driver"]
    assert [driver[name] for name in ("loaded", "installed", "libraries")] == ["580.95.05"] * 3
    assert driver["open"]
    assert driver["module_for_next"]
    assert driver["held"]
    assert [package["name"] for package in driver["packages"]] == [
        "nvidia-open",
        "libnvidia-ml1",
        "linux-modules-nvidia-580-server-open-aws",
    ]
    assert driver["kernel_packages"] == [{"name": "linux-image-cloud-amd64", "version": "6.1", "held": False}]
    assert not driver["headers"]
    (card,) = found["devices"]
    assert card["name"] == "NVIDIA A10G"
    assert (card["memory_total_mib"], card["memory_used_mib"], card["temperature_c"]) == (23028, 1234, 31)
    assert (card["power_w"], card["ecc_corrected"], card["ecc_uncorrected"]) == (56.81, 0, None)
    assert card["persistence"]
    assert found["processes"] == [{"pid": 4711, "name": "/usr/bin/python3, with a comma", "memory_used_mib": 1200}]


def test_no_card_on_the_bus(host: Host) -> None:
    host.write("sys/bus/pci/devices/0000:00:1e.0/class", "0x040300\n")  # the sound of a card is no card
    found = host.look()
    assert (found["present"], found["usable"], found["code"]) == (False, False, "no_gpu")
    assert not [argv for argv in host.asked if argv[0] in ("nvidia-smi", "journalctl")]


def test_a_host_without_proc_and_sys(tmp_path: Path) -> None:
    found = gpu.look(str(tmp_path), lambda argv: (127, "", "not there"))
    assert found["code"] == "no_gpu"
    assert found["driver"]["module_for_next"] is False


def bare(host: Host) -> None:
    host.unloaded()
    host.module.clear()
    (host.root / "usr/lib/x86_64-linux-gnu/libnvidia-ml.so.1").unlink()
    host.dpkg = (1, "", "dpkg-query: no packages found matching *nvidia*")


def loaded_differs(host: Host) -> None:
    host.module[KERNEL] = "version: 580.105.08\nlicense: Dual MIT/GPL\n"
    host.libraries("580.105.08")
    host.smi = (18, "Failed to initialize NVML: Driver/library version mismatch\nNVML library version: 580.105\n", "")


def libraries_differ(host: Host) -> None:
    host.libraries("580.105.08")
    host.smi = (18, "Failed to initialize NVML: Driver/library version mismatch\nNVML library version: 580.105\n", "")


def for_another_kernel(host: Host) -> None:
    host.unloaded()
    host.write(f"boot/vmlinuz-{NEWER}", "")
    host.module = {NEWER: host.module[KERNEL]}


def not_for_the_next(host: Host) -> None:
    host.write(f"boot/vmlinuz-{NEWER}", "")


def unsigned(host: Host) -> None:
    host.unloaded()
    host.secure()


def refused(host: Host) -> None:
    unsigned(host)
    host.module[KERNEL] += "signer: nemo DKMS key\n"
    host.log = (0, "1763830000.1 h kernel: Loading of module with unavailable key is rejected\n", "")


def nouveau(host: Host) -> None:
    host.unloaded()
    (host.root / "sys/module/nouveau").mkdir(parents=True)


def lost(host: Host) -> None:
    host.smi = (15, "", "Unable to determine the device handle for GPU0: 0000:00:1E.0: Unknown Error\n")
    host.log = (0, XID.format(79, "pid='<unknown>', name=<unknown>, GPU has fallen off the bus."), "")


def ecc(host: Host) -> None:
    host.log = (0, XID.format(48, "pid=12, DBE") + XID.format(31, "pid=99, name=python3, MMU Fault"), "")


def application(host: Host) -> None:
    host.log = (0, XID.format(31, "pid=99, name=python3, MMU Fault"), "")


def persistence(host: Host) -> None:
    host.smi = (0, A10G.replace("Enabled", "Disabled"), "")


def old_libraries_still_loaded(host: Host) -> None:
    host.module[KERNEL] = "version: 580.105.08\n"


def module_removed(host: Host) -> None:
    host.module.clear()


@pytest.mark.parametrize(
    ("fault", "code", "usable", "reboot", "says"),
    [
        (bare, "driver_missing", False, False, "not installed"),
        (lambda host: (host.unloaded(), host.module.clear()), "module_missing", False, False, KERNEL),
        (for_another_kernel, "module_missing", False, True, f"running kernel {KERNEL}"),
        (loaded_differs, "module_mismatch", False, True, "loaded module is 580.95.05, the installed one 580.105.08"),
        (libraries_differ, "nvml_mismatch", False, False, "libraries are 580.105.08, the module is 580.95.05"),
        (old_libraries_still_loaded, "module_mismatch", True, True, "the installed one 580.105.08"),
        (not_for_the_next, "next_kernel", True, False, f"no module for {NEWER}"),
        (module_removed, "next_kernel", True, False, "any more"),
        (unsigned, "secure_boot", False, False, "580.95.05 out: it is not signed"),
        (refused, "secure_boot", False, False, "the kernel refused its signature"),
        (lambda host: host.unloaded(), "not_loaded", False, False, "580.95.05 is installed, but not loaded"),
        (nouveau, "not_loaded", False, True, "nouveau has the card"),
        (lost, "nvml_error", False, True, "Unable to determine the device handle"),
        (ecc, "xid", True, True, "Xid 48 since the last boot: pid=12, DBE"),
        (application, "", True, False, ""),
        (persistence, "persistence_off", True, False, "off on card 0"),
    ],
)
def test_what_is_wrong(host: Host, fault: Any, code: str, usable: bool, reboot: bool, says: str) -> None:
    fault(host)
    found = host.look()
    assert (found["code"], found["usable"], found["reboot"]["needed"]) == (code, usable, reboot), found
    assert says in found["problem"]
    assert bool(found["reboot"]["why"]) is reboot


def test_everything_that_is_wrong_is_told(host: Host) -> None:
    lost(host)
    not_for_the_next(host)
    found = host.look()
    assert [problem["code"] for problem in found["problems"]] == ["nvml_error", "xid", "next_kernel"]
    assert found["xids"] == [
        {"code": 79, "time": 1763830000.25, "pci": "0000:00:1e", "text": "pid='<unknown>', name=<unknown>, GPU has fallen off the bus."}
    ]  # fmt: skip


def test_headers_of_kernels(host: Host) -> None:
    host.write(f"boot/vmlinuz-{NEWER}", "")
    host.write(f"lib/modules/{NEWER}/build/Makefile", "")
    driver = host.look()["driver"]
    assert (driver["headers"], driver["headers_for_next"]) == (False, True)


def test_the_boot_loader_knows_the_next_kernel(host: Host) -> None:
    host.write(f"boot/vmlinuz-{NEWER}", "")
    host.grubby = (0, f"/boot/vmlinuz-{KERNEL}\n", "")
    assert host.look()["driver"]["next_kernel"] == KERNEL


def test_the_newest_kernel_is_the_next_one(host: Host) -> None:
    for name in (NEWER, "6.1.0-9-cloud-amd64", "0-rescue-1234"):
        host.write(f"boot/vmlinuz-{name}", "")
    assert host.look()["driver"]["next_kernel"] == NEWER


def test_a_journal_that_cannot_search(host: Host) -> None:
    def run(argv: Sequence[str]) -> tuple[int, str, str]:
        if argv[0] == "journalctl" and any(word.startswith("--grep") for word in argv):
            return 1, "", "Compiled without pattern matching support\n"
        if argv[0] == "journalctl":
            return 0, "1.5 h kernel: something else\n" + XID.format(79, "gone"), ""
        return host.run(argv)

    assert [xid["code"] for xid in gpu.look(str(host.root), run)["xids"]] == [79]


@pytest.mark.parametrize(
    ("locks", "held"),
    [
        ("# a comment\nnvidia-driver-3:580.95.05-1.amzn2023.*\nkmod-nvidia-open-dkms-3:580.95.05-1.amzn2023.*\n", True),
        ("nvidia-driver-3:580.95.05-1.amzn2023.*\n", False),
        ("nvidia-driver-3:580.82.07-1.amzn2023.*\nkmod-nvidia-open-dkms-3:580.95.05-1.amzn2023.*\n", False),
        ("nvidia*\nkmod-nvidia-open-dkms*\n", False),  # without a version, a lock fits every version
        ("", False),
    ],
)
def test_packages_of_rpm(host: Host, locks: str, held: bool) -> None:
    host.dpkg = (127, "", "dpkg-query: No such file or directory")
    host.rpm = (
        "nvidia-driver 580.95.05-1.amzn2023\nkmod-nvidia-open-dkms 580.95.05-1.amzn2023\n"
        "libnvidia-container1 1.18.1-1\nnvidia-release 1.0-1\nkernel6.12 6.12.1-1\n"
    )
    host.write("etc/dnf/plugins/versionlock.list", locks)
    driver = host.look()["driver"]
    assert [package["name"] for package in driver["packages"]] == ["kmod-nvidia-open-dkms", "nvidia-driver"]
    assert driver["held"] is held
    assert [package["name"] for package in driver["kernel_packages"]] == ["kernel6.12"]


def test_the_module_of_a_proprietary_driver(host: Host) -> None:
    host.write("proc/driver/nvidia/version", "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19\n")
    host.module[KERNEL] = "version: 535.104.05\nlicense: NVIDIA\nsigner: x\n"
    driver = host.look()["driver"]
    assert (driver["loaded"], driver["open"], driver["signed"]) == ("535.104.05", False, True)


def test_a_program_that_is_not_there_or_does_not_end() -> None:
    assert gpu.program(["nemo-no-such-program"])[0] == 127
    code, _out, err = gpu.program(["sleep", "5"], timeout=0.1)
    assert (code, err) == (124, "sleep does not answer within 0.1 s")
