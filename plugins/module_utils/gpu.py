# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""An NVIDIA card and its driver on one host: what is there, whether containers can use it, and what is wrong.

Standard library alone and Python 3.9 syntax, because modules take it to managed hosts; without Ansible, because programs
that stay on a host are made of it, too. It only looks: nothing on the host changes.
"""

from __future__ import annotations

import contextlib
import glob
import os
import re
import subprocess
from collections.abc import Sequence
from typing import Any, Callable

Runner = Callable[[Sequence[str]], "tuple[int, str, str]"]

VENDOR = "0x10de"
DISPLAY = ("0x0300", "0x0302")  # PCI classes: a VGA controller, and a 3D controller such as the cards of servers
SECURE_BOOT = "sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c"
# Seconds for one program. nvidia-smi hangs on some broken cards; the first call of a cold driver takes some seconds.
TIMEOUT = 30
MODULE = "nvidia"
# In the order in which they may go; nvidia last, because the others use it.
MODULES = ("nvidia_uvm", "nvidia_drm", "nvidia_modeset", MODULE)
PACKAGES = ("*nvidia*", "cuda-drivers*", "libcuda1*")  # names of the driver's packages, of every distribution
# Names of what a kernel comes from and is followed up by; Debian's and Ubuntu's, then Amazon's.
KERNELS = ("linux-image-*", "linux-headers-*", "linux-modules-*", "linux-aws*", "kernel", "kernel[0-9]*", "kernel-*")
FIELDS = (
    "index", "uuid", "name", "pci.bus_id", "memory.total", "memory.used", "temperature.gpu", "utilization.gpu",
    "power.draw", "ecc.errors.corrected.volatile.total", "ecc.errors.uncorrected.volatile.total", "persistence_mode",
)  # fmt: skip

# Xid numbers that NVIDIA's catalogue lays at the application's door, or that only inform: the card is well after them.
# https://docs.nvidia.com/deploy/xid-errors/analyzing-xid-catalog.html; the device plugin for Kubernetes passes over
# the same ones (13, 31, 43, 45, 68, 109).
XIDS_OF_APPLICATIONS = frozenset({13, 31, 43, 45, 63, 68, 94, 109})
# Xid numbers after which the catalogue asks for a reset of the card; a cloud's instance gets it by a reboot.
XIDS_THAT_NEED_A_RESET = frozenset({46, 48, 62, 64, 74, 79, 95, 119, 120, 140, 143, 154})

# What may be wrong, worst first, and whether the card can be used all the same.
CODES = {
    "no_gpu": False,
    "driver_missing": False,
    "secure_boot": False,
    "module_missing": False,
    "module_mismatch": False,  # unless nvidia-smi answers: libraries as old as the loaded module
    "nvml_mismatch": False,
    "not_loaded": False,
    "nvml_error": False,
    "xid": True,
    "next_kernel": True,
    "persistence_off": True,
}

_NUMBER = re.compile(r"\d+(?:\.\d+)+")
_XID = re.compile(r"^(\d+(?:\.\d+)?) .*?NVRM: Xid \((?:PCI:)?([0-9a-fA-F:.]+)\): (\d+), ?(.*)$")
_CUDA = re.compile(r"^\s*CUDA (?:\w+ )?Version\s*:\s*(\d+\.\d+)", re.MULTILINE)
_NVML = re.compile(r"NVML library version:\s*([\d.]+)")
_REFUSED = re.compile(r"module .*(?:is rejected|verification failed|unavailable key)", re.IGNORECASE)


def program(argv: Sequence[str], timeout: float = TIMEOUT) -> tuple[int, str, str]:
    """Run a program; its status and what it said. 127 is one that is not there, 124 one that does not end."""
    environment = {**os.environ, "LC_ALL": "C", "PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin:/usr/bin:/bin"}
    try:
        done = subprocess.run(
            list(argv), stdin=subprocess.DEVNULL, capture_output=True, env=environment,
            encoding="utf-8", errors="replace", timeout=timeout, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return 124, "", f"{argv[0]} does not answer within {timeout:g} s"
    except OSError as error:
        return 127, "", f"{argv[0]}: {error.strerror}"
    return done.returncode, done.stdout, done.stderr


def look(root: str = "/", run: Runner = program) -> dict[str, Any]:
    """Everything about the host's card; `root` and `run` stand for the host in tests."""
    driver = _driver(root, run)
    cards = on_the_bus(root)
    devices, cuda, said = _devices(run) if cards and driver["loaded"] else ([], "", "")
    log = _kernel_log(run) if cards else ""
    xids = read_xids(log)
    found: dict[str, Any] = {
        "present": bool(cards),
        "pci": cards,
        "usable": bool(devices),
        "driver": driver,
        "cuda": cuda,
        "devices": devices,
        "processes": _processes(run) if devices else [],
        "xids": xids,
    }
    problems = _problems(found, said, refused=bool(_REFUSED.search(log)))
    found["problems"] = problems
    found["code"] = problems[0]["code"] if problems else ""
    found["problem"] = problems[0]["text"] if problems else ""
    found["reboot"] = _reboot(found)
    return found


def on_the_bus(root: str = "/") -> list[str]:
    """PCI addresses of NVIDIA's cards, whether a driver is there or not."""
    found = []
    for device in sorted(glob.glob(os.path.join(root, "sys/bus/pci/devices/*"))):
        if read(device, "vendor") == VENDOR and read(device, "class").startswith(DISPLAY):
            found.append(os.path.basename(device))
    return found


def users(root: str = "/") -> list[str]:
    """What has the card open, as "NAME (PID)", or holds its module, whatever nvidia-smi is able to say."""
    found = set()
    for descriptor in glob.iglob(os.path.join(root, "proc/[0-9]*/fd/*")):
        with contextlib.suppress(OSError):  # gone meanwhile
            if os.readlink(descriptor).startswith("/dev/nvidia"):
                found.add(int(descriptor.split(os.sep)[-3]))
    return [f"{read(root, 'proc', str(pid), 'comm')} ({pid})" for pid in sorted(found)] + [
        f"module {name}" for name in sorted(_holders(root) - set(MODULES))
    ]


def references(root: str = "/") -> int:
    """How many of the kernel's references to the loaded module are not those of modules."""
    return int(read(root, f"sys/module/{MODULE}/refcnt") or 0) - len(_holders(root))


def _holders(root: str) -> set[str]:
    return {os.path.basename(path) for path in glob.glob(os.path.join(root, f"sys/module/{MODULE}/holders/*"))}


def version_key(text: str) -> list[tuple[int, int, str]]:
    """A sort key for versions of kernels: numbers by value, the rest by letter."""
    return [(1, int(part), "") if part.isdigit() else (0, 0, part) for part in re.findall(r"\d+|[a-z]+", text)]


def read_xids(log: str) -> list[dict[str, Any]]:
    """The card's errors in the kernel's log (`journalctl --output=short-unix`), oldest first."""
    found = []
    for line in log.splitlines():
        match = _XID.match(line)
        if match:
            found.append({"code": int(match[3]), "time": float(match[1]), "text": match[4].strip(), "pci": match[2]})
    return found


def _driver(root: str, run: Runner) -> dict[str, Any]:
    running = read(root, "proc/sys/kernel/osrelease")
    following = _next_kernel(root, run) or running
    module = _module(run, running)
    packages, kernels = _packages(root, run)
    loaded, is_open = _loaded(root)
    return {
        "loaded": loaded,
        "installed": module.get("version", ""),
        "libraries": _libraries(root),
        "open": is_open if loaded else bool(module) and not module.get("license", "").startswith("NVIDIA"),
        "kernel": running,
        "next_kernel": following,
        "module_for_next": bool(module if following == running else _module(run, following)),
        "headers": _headers(root, running),
        "headers_for_next": _headers(root, following),
        "secure_boot": _secure_boot(root),
        "signed": bool(module.get("signer") or module.get("sig_id")),
        "nouveau": os.path.isdir(os.path.join(root, "sys/module/nouveau")),
        "held": bool(packages) and all(package["held"] for package in packages),
        "packages": packages,
        "kernel_packages": kernels,
    }


def _headers(root: str, kernel: str) -> bool:
    """Whether modules can be built for a kernel."""
    path = os.path.join(root, "lib/modules", kernel, "build")
    return os.path.exists(path)


def _loaded(root: str) -> tuple[str, bool]:
    """Version of the loaded module, and whether it is the open one."""
    for line in read(root, "proc/driver/nvidia/version").splitlines():
        if line.startswith("NVRM version:"):
            number = _NUMBER.search(line)
            return (number[0] if number else ""), "Open Kernel Module" in line
    return "", False


def _module(run: Runner, kernel: str) -> dict[str, str]:
    """What modinfo says of the driver's module for a kernel; nothing where there is none."""
    code, out, _err = run(["modinfo", "--set-version", kernel, MODULE])
    found: dict[str, str] = {}
    if code == 0:
        for line in out.splitlines():
            name, colon, value = line.partition(":")
            if colon:
                found.setdefault(name.strip(), value.strip())
    return found


def _next_kernel(root: str, run: Runner) -> str:
    """The kernel of the next boot: what the boot loader says, else the newest, which GRUB takes by default."""
    code, out, _err = run(["grubby", "--default-kernel"])
    images = [out.strip()] if code == 0 and out.strip() else glob.glob(os.path.join(root, "boot/vmlinuz-*"))
    names = [os.path.basename(image).partition("-")[2] for image in images]
    return max((name for name in names if name and "rescue" not in name), key=version_key, default="")


def _libraries(root: str) -> str:
    """Version of the library that programs and containers talk to the driver by."""
    for pattern in ("usr/lib/*-linux-gnu/libnvidia-ml.so.1", "usr/lib64/libnvidia-ml.so.1"):
        for path in sorted(glob.glob(os.path.join(root, pattern))):
            number = _NUMBER.search(os.path.basename(os.path.realpath(path)))
            if number:
                return number[0]
    return ""


def _packages(root: str, run: Runner) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Installed packages of the driver and of kernels, and whether each is held at its version."""
    shown = "${db:Status-Want} ${db:Status-Status} ${Package} ${Version}\n"
    _code, out, _err = run(["dpkg-query", "--show", "--showformat", shown, *PACKAGES, *KERNELS])
    found: list[dict[str, Any]] = []
    for row in (line.split() for line in out.splitlines()):
        if len(row) == 4 and row[1] not in ("not-installed", "config-files"):
            found.append({"name": row[2], "version": row[3], "held": row[0] == "hold"})
    if not found:
        shown = "%{NAME} %{VERSION}-%{RELEASE}\n"
        _code, out, _err = run(["rpm", "--query", "--all", "--queryformat", shown, *PACKAGES, *KERNELS])
        locks = read(root, "etc/dnf/plugins/versionlock.list").splitlines()
        for row in (line.split() for line in sorted(set(out.splitlines()))):
            if len(row) == 2:
                found.append({"name": row[0], "version": row[1], "held": any(_locks(lock, *row) for lock in locks)})
    of_driver = [package for package in found if _of_the_driver(package["name"])]
    kernels = [
        package for package in found if package["name"].startswith(("linux-", "kernel")) and package not in of_driver
    ]
    return of_driver, kernels


def _locks(lock: str, name: str, version: str) -> bool:
    """Whether a line of versionlock.list (NAME-[EPOCH:]VERSION-RELEASE.*) holds a package at this version."""
    return re.match(rf"{re.escape(name)}-(?:\d+:)?{re.escape(version)}(?:[.]|$)", lock.strip()) is not None


def _of_the_driver(name: str) -> bool:
    """The toolkit for containers has versions of its own, as have repositories' files and settings."""
    if "nvidia" not in name and not name.startswith(("cuda-drivers", "libcuda1")):
        return False
    return not any(word in name for word in ("container", "release", "settings", "pinning"))


def _secure_boot(root: str) -> bool:
    try:
        with open(os.path.join(root, SECURE_BOOT), "rb") as stream:
            return stream.read(5)[4:5] == b"\x01"  # four bytes of attributes, then the value
    except OSError:
        return False


def _devices(run: Runner) -> tuple[list[dict[str, Any]], str, str]:
    """The cards as nvidia-smi sees them, the newest CUDA that the driver runs, and what it said instead."""
    code, out, err = run(["nvidia-smi", f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader,nounits"])
    rows = [[cell.strip() for cell in line.split(",")] for line in out.splitlines()]
    devices = [_device(row) for row in rows if code == 0 and len(row) == len(FIELDS)]
    if not devices:
        return [], "", " ".join((err.strip() or out.strip() or f"nvidia-smi ended with status {code}").split())
    _code, out, _err = run(["nvidia-smi", "--version"])
    cuda = _CUDA.search(out)
    return devices, cuda[1] if cuda else "", ""


def _device(row: Sequence[str]) -> dict[str, Any]:
    return {
        "index": _whole(row[0]),
        "uuid": row[1],
        "name": row[2],
        "pci": row[3],
        "memory_total_mib": _whole(row[4]),
        "memory_used_mib": _whole(row[5]),
        "temperature_c": _whole(row[6]),
        "utilisation_percent": _whole(row[7]),
        "power_w": _real(row[8]),
        "ecc_corrected": _whole(row[9]),
        "ecc_uncorrected": _whole(row[10]),
        "persistence": row[11] == "Enabled",
    }


def _processes(run: Runner) -> list[dict[str, Any]]:
    code, out, _err = run(
        ["nvidia-smi", "--query-compute-apps=pid,process_name,used_gpu_memory", "--format=csv,noheader,nounits"]
    )
    found = []
    for line in out.splitlines() if code == 0 else []:
        pid, _comma, rest = line.partition(",")
        name, _comma, memory = rest.rpartition(",")  # a name may hold commas
        if pid.strip().isdigit():
            found.append({"pid": int(pid), "name": name.strip(), "memory_used_mib": _whole(memory)})
    return found


def _kernel_log(run: Runner) -> str:
    """The lines of this boot that are about the driver."""
    # grep in journalctl, where it was built with it: the log of a long boot is long
    argv = ["journalctl", "--dmesg", "--quiet", "--no-pager", "--output=short-unix"]
    code, out, err = run([*argv, "--grep=NVRM|module"])
    if code != 0 and "pattern matching" in err.lower():
        out = run(argv)[1]
    return out


def _problems(found: dict[str, Any], said: str, refused: bool) -> list[dict[str, str]]:
    """Everything that is wrong, worst first."""
    driver = found["driver"]
    if not found["present"]:
        return [_entry("no_gpu", "no NVIDIA card is on the PCI bus: is this a GPU instance?")]
    texts: dict[str, str] = {}
    loaded, installed, libraries = driver["loaded"], driver["installed"], driver["libraries"]
    if not loaded and not installed and not libraries and not driver["packages"]:
        texts["driver_missing"] = "the NVIDIA driver is not installed"
    elif not loaded and driver["secure_boot"] and installed and (refused or not driver["signed"]):
        why = "the kernel refused its signature" if driver["signed"] else "it is not signed"
        texts["secure_boot"] = f"Secure Boot is on and keeps the module {installed} out: {why}"
    elif not loaded and not installed:
        texts["module_missing"] = f"the driver has no module for the running kernel {driver['kernel']}"
    elif loaded and installed and loaded != installed:
        texts["module_mismatch"] = f"the loaded module is {loaded}, the installed one {installed}"
    elif loaded and "version mismatch" in said.lower():
        other = _NVML.search(said)
        texts["nvml_mismatch"] = (
            f"the libraries are {libraries or (other[1] if other else 'others')}, the module is {loaded}"
        )
    elif not loaded:
        instead = "; nouveau has the card" if driver["nouveau"] else ""
        texts["not_loaded"] = f"the module {installed} is installed, but not loaded{instead}"
    elif said:
        texts["nvml_error"] = f"nvidia-smi does not see the card: {said}"
    if loaded and not installed and not texts:
        # A module that is loaded and has no file any more does not come back with the next boot.
        texts["next_kernel"] = f"the loaded module {loaded} is not installed for kernel {driver['kernel']} any more"
    if not driver["module_for_next"] and driver["next_kernel"] != driver["kernel"] and "driver_missing" not in texts:
        texts["next_kernel"] = f"the driver has no module for {driver['next_kernel']}, the kernel of the next boot"
    bad = [xid for xid in found["xids"] if xid["code"] not in XIDS_OF_APPLICATIONS]
    if bad:
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        texts["xid"] = f"the kernel reports Xid {bad[-1]['code']} since the last boot: {bad[-1]['text']}{more}"
    off = [str(device["index"]) for device in found["devices"] if not device["persistence"]]
    if off:
        texts["persistence_off"] = f"persistence mode is off on card {', '.join(off)}"
    return [_entry(code, texts[code]) for code in CODES if code in texts]


def _entry(code: str, text: str) -> dict[str, str]:
    return {"code": code, "text": text}


def _reboot(found: dict[str, Any]) -> dict[str, Any]:
    """Whether only a reboot (or a reload of the module with nothing using the card) helps, and why."""
    driver = found["driver"]
    codes = {problem["code"]: problem["text"] for problem in found["problems"]}
    resets = [xid for xid in found["xids"] if xid["code"] in XIDS_THAT_NEED_A_RESET]
    why = ""
    if "module_mismatch" in codes:
        why = codes["module_mismatch"]
    elif "not_loaded" in codes and driver["nouveau"]:
        why = codes["not_loaded"]
    elif "module_missing" in codes and driver["next_kernel"] != driver["kernel"] and driver["module_for_next"]:
        why = f"the driver is built for {driver['next_kernel']}, the kernel of the next boot, alone"
    elif resets:
        why = f"Xid {resets[-1]['code']} needs a reset of the card"
    return {"needed": bool(why), "why": why}


def read(*parts: str) -> str:
    """A file's text without white space around it; nothing where it cannot be read."""
    with contextlib.suppress(OSError), open(os.path.join(*parts), encoding="utf-8", errors="replace") as stream:
        return stream.read().strip()
    return ""


def _whole(text: str) -> int | None:
    """A number of nvidia-smi; None for what the card does not tell ("[N/A]")."""
    number = _real(text)
    return None if number is None else int(number)


def _real(text: str) -> float | None:
    try:
        return float(text.strip())
    except ValueError:
        return None
