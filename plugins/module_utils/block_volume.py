# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""An EBS volume as a block device: found by its id, looked at without a doubt, never taken for empty when it is not.

Standard library only and Python 3.9 syntax, because this runs on managed hosts.
"""

from __future__ import annotations

import errno
import json
import os
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Callable

Runner = Callable[[Sequence[str]], tuple[int, str, str]]

VOLUME_ID = re.compile(r"vol-[0-9a-f]{8}(?:[0-9a-f]{9})?")
BY_ID = "nvme-Amazon_Elastic_Block_Store_"
MIB = 1024 * 1024
# An empty volume is one that reads as zeros: all of both ends, where file systems, partition tables, databases and
# archives keep what they are known by, and a piece of each of so many equal parts between them. A small one is read whole.
WHOLE_BYTES = 1024 * MIB
EDGE_BYTES = 16 * MIB
SAMPLES = 2048
SAMPLE_BYTES = 16 * 1024


class VolumeError(Exception):
    """Why the volume cannot be used; the text says what to do."""


@dataclass(frozen=True)
class Found:
    """One signature: what it is and where."""

    kind: str
    offset: str
    uuid: str = ""
    label: str = ""

    def __str__(self) -> str:
        return f"{self.kind} at {self.offset}" + (f", label {self.label}" if self.label else "")


@dataclass(frozen=True)
class Mount:
    """One line of /proc/self/mountinfo."""

    device: str  # major:minor
    path: str
    options: frozenset[str]
    kind: str
    source: str


@dataclass
class Places:
    """Where the kernel shows its devices; tests give others."""

    dev: str = "/dev"
    sys: str = "/sys"
    proc: str = "/proc"
    root: str = field(default="/")


def valid_id(volume_id: str) -> bool:
    """Whether this is how AWS writes a volume's id."""
    return VOLUME_ID.fullmatch(volume_id) is not None


def find(volume_id: str, device_name: str, places: Places) -> str:
    """The device of a volume, empty where it is not attached (yet).

    On NVMe instances the controller's serial number is the id; Xen tells no id, so that only the name of the attachment
    finds the device there.
    """
    serial = volume_id.replace("-", "")
    link = os.path.join(places.dev, "disk/by-id", BY_ID + serial)
    if os.path.exists(link):
        return os.path.realpath(link)
    block = os.path.join(places.sys, "block")
    for name in sorted(os.listdir(block)) if os.path.isdir(block) else []:
        if name.startswith("nvme") and _read(os.path.join(block, name, "device/serial")).strip() == serial:
            return os.path.join(places.dev, name)
    if device_name:
        letters = re.sub(r"^(sd|xvd)", "", os.path.basename(device_name))
        for name in (f"xvd{letters}", os.path.basename(device_name)):
            path = os.path.join(places.dev, name)
            real = os.path.basename(os.path.realpath(path))
            # A link to an NVMe device with another serial number is another volume.
            if os.path.exists(path) and not real.startswith("nvme"):
                return os.path.realpath(path)
    return ""


def attached_ids(places: Places) -> list[str]:
    """The ids of the EBS volumes that this host shows, for messages."""
    found = set()
    folder = os.path.join(places.dev, "disk/by-id")
    for name in os.listdir(folder) if os.path.isdir(folder) else []:
        match = re.fullmatch(re.escape(BY_ID) + r"vol([0-9a-f]+)", name)
        if match:
            found.add(f"vol-{match[1]}")
    block = os.path.join(places.sys, "block")
    for name in os.listdir(block) if os.path.isdir(block) else []:
        match = re.fullmatch(r"vol([0-9a-f]+)", _read(os.path.join(block, name, "device/serial")).strip())
        if match:
            found.add(f"vol-{match[1]}")
    return sorted(found)


def size(device: str) -> int:
    """Bytes of a block device."""
    descriptor = os.open(device, os.O_RDONLY)
    try:
        return os.lseek(descriptor, 0, os.SEEK_END)
    finally:
        os.close(descriptor)


def number(device: str) -> str:
    """major:minor, as mountinfo writes it."""
    device_number = os.stat(device).st_rdev
    return f"{os.major(device_number)}:{os.minor(device_number)}"


def signatures(device: str, run: Runner) -> list[Found]:
    """Everything that wipefs recognises: file systems, partition tables, LVM, LUKS, RAID, swap and more."""
    code, out, err = run(["wipefs", "--no-act", "--json", device])
    if code != 0:
        raise VolumeError(f"{device} could not be examined: wipefs: {err.strip() or out.strip()}")
    entries = json.loads(out).get("signatures", []) if out.strip() else []
    return [
        Found(entry["type"], entry["offset"], entry.get("uuid") or "", entry.get("label") or "") for entry in entries
    ]


def parts_and_holders(device: str, places: Places) -> list[str]:
    """Partitions of the device, and what is built on it (LVM, RAID, device mapper)."""
    folder = os.path.join(places.sys, "class/block", os.path.basename(device))
    found = []
    if os.path.isdir(folder):
        for name in sorted(os.listdir(folder)):
            if os.path.exists(os.path.join(folder, name, "partition")):
                found.append(f"partition {name}")
        holders = os.path.join(folder, "holders")
        found += [f"{name} is built on it" for name in sorted(os.listdir(holders) if os.path.isdir(holders) else [])]
    return found


def swap_in_use(device: str, places: Places) -> bool:
    """Whether the host swaps to it."""
    return any(
        line.split()[0] == device for line in _read(os.path.join(places.proc, "swaps")).splitlines()[1:] if line.split()
    )


def first_data(device: str) -> int | None:
    """Offset of something that is not zero; None where the device reads as zeros."""
    descriptor = os.open(device, os.O_RDONLY)
    try:
        total = os.lseek(descriptor, 0, os.SEEK_END)
        for start, length in _looked_at(total):
            offset = start
            while offset < start + length:
                block = os.pread(descriptor, min(MIB, start + length - offset), offset)
                if not block:
                    raise VolumeError(f"{device} ends at {offset} instead of {total}: it is not read to its end")
                if block.count(0) != len(block):
                    return offset + next(index for index, byte in enumerate(block) if byte)
                offset += len(block)
    except OSError as error:
        raise VolumeError(f"{device} cannot be read: {os.strerror(error.errno or errno.EIO)}") from error
    finally:
        os.close(descriptor)
    return None


def _looked_at(total: int) -> Iterator[tuple[int, int]]:
    """(start, length) of the pieces that are read."""
    if total <= WHOLE_BYTES:
        yield 0, total
        return
    yield 0, EDGE_BYTES
    yield total - EDGE_BYTES, EDGE_BYTES
    step = (total - 2 * EDGE_BYTES) // SAMPLES
    for index in range(SAMPLES):
        yield EDGE_BYTES + index * step, min(SAMPLE_BYTES, step)


def mounts(places: Places) -> list[Mount]:
    """What is mounted, in the order in which it was."""
    found = []
    for line in _read(os.path.join(places.proc, "self/mountinfo")).splitlines():
        left, _, right = line.partition(" - ")
        fields, tail = left.split(), right.split()
        options = frozenset(fields[5].split(",")) | frozenset(tail[2].split(",") if len(tail) > 2 else ())
        found.append(Mount(fields[2], _unescape(fields[4]), options, tail[0], _unescape(tail[1])))
    return found


def xfs_size(geometry: str) -> int:
    """Bytes of a mounted XFS, from what `xfs_growfs -n` shows; its first block on the disk lags behind the kernel."""
    match = re.search(r"^data\s+=\s+bsize=(\d+)\s+blocks=(\d+)", geometry, re.MULTILINE)
    if not match:
        raise VolumeError(f"xfs_growfs -n shows no size: {geometry.strip()[:200]}")
    return int(match[1]) * int(match[2])


def ext4_size(device: str) -> int:
    """Bytes of an ext4, from its superblock."""
    descriptor = os.open(device, os.O_RDONLY)
    try:
        superblock = os.pread(descriptor, 1024, 1024)
    finally:
        os.close(descriptor)
    low, shift = struct.unpack("<I", superblock[4:8])[0], struct.unpack("<I", superblock[24:28])[0]
    wide = struct.unpack("<I", superblock[0x60:0x64])[0] & 0x80  # INCOMPAT_64BIT
    high = struct.unpack("<I", superblock[0x150:0x154])[0] if wide else 0
    return int((1024 << shift) * (low + (high << 32)))


@dataclass(frozen=True)
class Entry:
    """One entry of fstab."""

    source: str
    path: str
    kind: str
    options: str

    def __str__(self) -> str:
        return f"{_escape(self.source)}\t{_escape(self.path)}\t{self.kind}\t{self.options}\t0\t2"


def with_entry(fstab: str, wanted: Entry) -> tuple[str, list[str]]:
    """fstab with one entry for this mount point, and the entries that it takes the place of."""
    lines, replaced, done = [], [], False
    for line in fstab.splitlines():
        fields = line.split()
        mine = len(fields) >= 2 and not line.lstrip().startswith("#")
        same_place = mine and _unescape(fields[1]).rstrip("/") == wanted.path.rstrip("/")
        if same_place and fields[:4] == str(wanted).split()[:4] and not done:
            done = True
            lines.append(line)
        elif same_place or (mine and _unescape(fields[0]) == wanted.source):
            replaced.append(line)
            if not done:
                done = True
                lines.append(str(wanted))
        else:
            lines.append(line)
    if not done:
        lines.append(str(wanted))
    return "\n".join(lines) + "\n", replaced


def _escape(text: str) -> str:
    return re.sub(r"[\s\\#]", lambda match: f"\\{ord(match[0]):03o}", text)


def _unescape(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""
