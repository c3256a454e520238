#!/usr/bin/python3
"""The state of the simulated card: nemo-lab-gpu WORD...

ok                the card is there and well, whatever was set before
missing           no card is on the PCI bus
mismatch          another version of the module is loaded than the libraries are of, as after an upgrade that nobody asked for
lost              nvidia-smi fails, and the kernel's log says Xid 79
hang              nvidia-smi does not answer
xid[=CODE]        the kernel's log says so (48)
secure-boot       Secure Boot is on (the module is not signed)
next-kernel[=NAME]  another kernel waits for the next boot
boot              what a boot of the machine does; the log of the kernel begins anew
NAME=VALUE        memory=MIB, process=NAME:MIB, temperature=C, power=W, utilisation=%, ecc=COUNT, persistence=on|off,
                  build-seconds=S (how long the driver's module takes to build)
"""

from __future__ import annotations

import fcntl
import json
import pathlib
import shutil
import subprocess
import sys
import time
from typing import Any

STATE = pathlib.Path("/etc/nemo-lab/gpu.json")
LOG = pathlib.Path("/etc/nemo-lab/kernel.log")
LOCK = pathlib.Path("/run/nemo-lab/gpu.lock")
BUS = pathlib.Path("/sys/bus/pci/devices")
DRIVER = pathlib.Path("/proc/driver")
FIRMWARE = pathlib.Path("/sys/firmware")
SECURE_BOOT = FIRMWARE / "efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c"
CARD = "0000:00:1e.0"
DEVICES = {  # PCI address: vendor, device, class; an EBS volume, a network interface and the card of a g5.xlarge
    "0000:00:04.0": ("0x1d0f", "0x8061", "0x010802"),
    "0000:00:05.0": ("0x1d0f", "0xec20", "0x020000"),
    CARD: ("0x10de", "0x2237", "0x030200"),
}
XIDS = {
    31: "pid=4711, name=python3, channel 0x00000008, MMU Fault: ENGINE GRAPHICS faulted",
    48: "pid='<unknown>', name=<unknown>, An uncorrectable double bit error (DBE) has been detected on GPU",
    79: "pid='<unknown>', name=<unknown>, GPU has fallen off the bus.",
    119: "pid=4711, name=python3, Timeout waiting for RPC from GSP!",
}
WELL: dict[str, Any] = {
    "behaviour": "ok",
    "uuid": "GPU-7c1f0a4c-0f0e-4a4b-9d4e-2f1d6a10a10a",
    "name": "NVIDIA A10G",
    "memory_total_mib": 23028,
    "memory_used_mib": 0,
    "temperature_c": 31,
    "utilisation_percent": 0,
    "power_w": 21.5,
    "ecc_corrected": 0,
    "ecc_uncorrected": 0,
    "persistence": False,
    "build_seconds": 3,
    "processes": [],
}
NUMBERS = {
    "memory": "memory_used_mib",
    "temperature": "temperature_c",
    "power": "power_w",
    "utilisation": "utilisation_percent",
    "ecc": "ecc_uncorrected",
    "build-seconds": "build_seconds",
}
KEPT = ("persistence", "build_seconds")  # of `ok`: what the host's software and the tester set


def run(*argv: str) -> int:
    return subprocess.run(argv, check=False, stdin=subprocess.DEVNULL).returncode


def write(state: dict[str, Any]) -> None:
    """The state as its readers want it: one name on a line, in place, because containers have the file itself."""
    STATE.parent.mkdir(parents=True, exist_ok=True)
    with STATE.open("a+") as stream:
        stream.seek(0)
        stream.truncate()
        stream.write(json.dumps(state, indent=1) + "\n")


def read() -> dict[str, Any]:
    try:
        return {**WELL, **json.loads(STATE.read_text())}
    except (OSError, ValueError):
        return dict(WELL)


def mounted(path: pathlib.Path) -> bool:
    return path.is_mount()


def bus(present: bool) -> None:
    """The PCI bus, with the card or without it; the machine's own is out of the way."""
    if not BUS.is_dir():  # a machine without a bus
        run("mount", "-t", "tmpfs", "tmpfs", "/sys/bus")
        BUS.mkdir(parents=True)
    elif not (BUS / "0000:00:05.0").is_dir() or not mounted(BUS):
        run("mount", "-t", "tmpfs", "tmpfs", str(BUS))
    if not DRIVER.is_mount():
        run("mount", "-t", "tmpfs", "tmpfs", str(DRIVER))
    (DRIVER / "nvidia").mkdir(exist_ok=True)
    for address, values in DEVICES.items():
        folder = BUS / address
        if address == CARD and not present:
            shutil.rmtree(folder, ignore_errors=True)
            (DRIVER / "nvidia/version").unlink(missing_ok=True)
            continue
        folder.mkdir(exist_ok=True)
        for name, value in zip(("vendor", "device", "class"), values, strict=True):
            (folder / name).write_text(value + "\n")


def loads() -> None:
    """udev loads a driver that is installed for a card that is there."""
    found = subprocess.run(["modinfo", "--field=version", "nvidia"], check=False, capture_output=True)
    if found.returncode == 0:
        run("modprobe", "nvidia")


def log(code: int) -> None:
    with LOG.open("a") as stream:
        stream.write(
            f"{time.time():.6f} lab kernel: NVRM: Xid (PCI:{CARD[:-2]}): {code}, {XIDS.get(code, 'an error')}\n"
        )


def secure_boot(on: bool) -> None:
    if on and not SECURE_BOOT.exists():
        run("mount", "-t", "tmpfs", "tmpfs", str(FIRMWARE))
        SECURE_BOOT.parent.mkdir(parents=True)
        SECURE_BOOT.write_bytes(b"\x06\x00\x00\x00\x01")
        (DRIVER / "nvidia/version").unlink(missing_ok=True)
    elif not on and SECURE_BOOT.exists():
        run("umount", str(FIRMWARE))


def apply(word: str, state: dict[str, Any]) -> dict[str, Any]:
    """One word of the command line; the state after it."""
    name, _equals, value = word.partition("=")
    if name == "ok":
        state = {**WELL, **{key: state[key] for key in KEPT}}
        secure_boot(False)
        LOG.unlink(missing_ok=True)
        for image in pathlib.Path("/boot").glob("vmlinuz-*nemo*"):
            image.unlink()
        bus(True)
        (DRIVER / "nvidia/version").unlink(missing_ok=True)
        loads()
    elif name == "boot":
        LOG.unlink(missing_ok=True)
        state = {**state, "persistence": False}
        bus(state["behaviour"] != "missing")
        loads()
    elif name == "missing":
        bus(False)
        state = {**state, "behaviour": "missing"}
    elif name == "mismatch":
        banner = DRIVER / "nvidia/version"
        banner.write_text(
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.82.07  Release Build  (lab@lab)\n"
        )
    elif name == "lost":
        log(79)
        state = {**state, "behaviour": "lost"}
    elif name == "hang":
        state = {**state, "behaviour": "hang"}
    elif name == "xid":
        log(int(value or 48))
    elif name == "secure-boot":
        secure_boot(True)
    elif name == "next-kernel":
        pathlib.Path("/boot").mkdir(exist_ok=True)
        pathlib.Path(f"/boot/vmlinuz-{value or '99.0.0-nemo'}").touch()
    elif name == "process":
        title, _colon, memory = value.rpartition(":")
        entries = [*state["processes"], f"{4711 + len(state['processes'])}, {title}, {int(memory)}"]
        state = {**state, "processes": entries, "memory_used_mib": state["memory_used_mib"] + int(memory)}
    elif name == "persistence" and value in ("on", "off", "1", "0"):
        state = {**state, "persistence": value in ("on", "1")}
    elif name in NUMBERS and value:
        number = float(value)
        state = {**state, NUMBERS[name]: int(number) if number.is_integer() else number}
    else:
        raise SystemExit(f"nemo-lab-gpu: {word!r} is none of\n{__doc__}")
    return state


def main(words: list[str]) -> None:
    if not words:
        print(STATE.read_text() if STATE.exists() else json.dumps(WELL, indent=1), end="")
        return
    LOCK.parent.mkdir(exist_ok=True)
    with LOCK.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for word in words:
            write(apply(word, read()))


if __name__ == "__main__":
    main(sys.argv[1:])
