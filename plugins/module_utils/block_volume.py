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
import stat
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Callable

Runner = Callable[[Sequence[str]], tuple[int, str, str]]

VOLUME_ID = re.compile(r"vol-[0-9a-f]{8}(?:[0-9a-f]{9})?")
BY_ID = "nvme-Amazon_Elastic_Block_Store_"
MIB = 1024 * 1024
# An empty volume is one that reads as zeros: all of both ends, where file systems, partition tables, databases and
# archives keep what they are known by, and a piece of each of so many equal parts between them. A small one is read
# whole. The pieces of a large one take about 10 s on a volume of 3,000 operations a second, once in its life.
WHOLE_BYTES = 1024 * MIB
EDGE_BYTES = 16 * MIB
SAMPLES = 16 * 1024
SAMPLE_BYTES = 16 * 1024
XFS_IN_PROGRESS = 126  # sb_inprogress of the on-disk superblock, struct xfs_dsb


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


@dataclass(frozen=True)
class Places:
    """Where the host shows its devices and keeps its files; tests give others."""

    dev: str = "/dev"
    sys: str = "/sys"
    proc: str = "/proc"
    run: str = "/run"
    fstab: str = "/etc/fstab"
    notes: str = "/var/lib/nemo/data_volume"


def valid_id(volume_id: str) -> bool:
    """Whether this is how AWS writes a volume's id."""
    return VOLUME_ID.fullmatch(volume_id) is not None


def is_block(path: str) -> bool:
    """Whether this is a block device that is there."""
    try:
        return stat.S_ISBLK(os.stat(path).st_mode)
    except OSError:
        return False


def find(volume_id: str, device_name: str, places: Places) -> str:
    """The device of a volume, empty where it is not attached (yet).

    On NVMe instances the controller's serial number is the id; Xen tells no id, so that only the name of the attachment
    finds the device there.
    """
    serial = volume_id.replace("-", "")
    serials = _serials(places)
    link = os.path.join(places.dev, "disk/by-id", BY_ID + serial)
    if is_block(link):
        device = os.path.realpath(link)
        # A link that was left behind may lead to what took the volume's place: the controller knows better.
        if serials.get(os.path.basename(device), "") in ("", serial):
            return device
    for name, known in serials.items():
        if known == serial:
            return os.path.join(places.dev, name)
    if device_name:
        base = os.path.basename(device_name)
        for name in (re.sub(r"^(sd|xvd)", "xvd", base), base):
            path = os.path.join(places.dev, name)
            # A link of that name to an NVMe device, whose serial number is another one, is another volume.
            if is_block(path) and not os.path.basename(os.path.realpath(path)).startswith("nvme"):
                return os.path.realpath(path)
    return ""


def attached_ids(places: Places) -> list[str]:
    """The ids of the EBS volumes that this host shows, for messages."""
    folder = os.path.join(places.dev, "disk/by-id")
    links = [name[len(BY_ID) :] for name in _names(folder) if name.startswith(BY_ID) and is_block(f"{folder}/{name}")]
    found = (re.fullmatch(r"vol([0-9a-f]+)", serial) for serial in (*links, *_serials(places).values()))
    return sorted({f"vol-{match[1]}" for match in found if match})


def _serials(places: Places) -> dict[str, str]:
    """The serial numbers of the NVMe devices."""
    block = os.path.join(places.sys, "block")
    return {
        name: _read(os.path.join(block, name, "device/serial")).strip()
        for name in _names(block)
        if name.startswith("nvme")
    }


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


def read_only(device: str, places: Places) -> bool:
    """Whether the kernel takes no writes for this device."""
    return _read(os.path.join(places.sys, "class/block", os.path.basename(device), "ro")).strip() == "1"


def signatures(device: str, run: Runner) -> list[Found]:
    """Everything that wipefs recognises: file systems, partition tables, LVM, LUKS, RAID, swap and more."""
    code, out, err = run(["wipefs", "--no-act", "--json", device])
    if code != 0:
        raise VolumeError(f"{device} could not be examined: {err.strip() or out.strip() or 'wipefs failed'}")
    entries = json.loads(out).get("signatures", []) if out.strip() else []
    return [
        Found(entry["type"], entry["offset"], entry.get("uuid") or "", entry.get("label") or "") for entry in entries
    ]


def unfinished_xfs(device: str) -> bool:
    """Whether the making of this XFS was cut off.

    mkfs.xfs writes this mark with the first superblock, and takes it away last of all; the kernel mounts none that has it.
    """
    with open(device, "rb") as file:
        return file.read(XFS_IN_PROGRESS + 1)[XFS_IN_PROGRESS:] == b"\1"


def uses(device: str, places: Places) -> list[str]:
    """What uses the device: partitions, what is built on it (LVM, RAID, device mapper), mounts, swap."""
    folder = os.path.join(places.sys, "class/block", os.path.basename(device))
    found = built_on(device, places)
    found += [f"partition {name}" for name in _names(folder) if os.path.exists(f"{folder}/{name}/partition")]
    found += [f"mounted at {mount.path}" for mount in mounts(places) if mount.device == number(device)]
    swaps = _read(os.path.join(places.proc, "swaps")).splitlines()[1:]
    found += ["in use as swap"] if device in (line.split()[0] for line in swaps if line.strip()) else []
    return found


def built_on(device: str, places: Places) -> list[str]:
    """What the kernel has built on the device."""
    holders = os.path.join(places.sys, "class/block", os.path.basename(device), "holders")
    return [f"{name} is built on it" for name in _names(holders)]


def first_data(device: str) -> int | None:
    """Offset of something that is not zero; None where the device reads as zeros."""
    descriptor = os.open(device, os.O_RDONLY)
    try:
        total = os.lseek(descriptor, 0, os.SEEK_END)
        for start, length in looked_at(total):
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


def looked_at(total: int) -> Iterator[tuple[int, int]]:
    """(start, length) of the pieces of so large a device that are read."""
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
        fields, tail = left.split(" "), right.split(" ")
        options = frozenset(fields[5].split(",")) | frozenset(tail[2].split(",") if len(tail) > 2 else ())
        found.append(Mount(fields[2], unescaped(fields[4]), options, tail[0], unescaped(tail[1])))
    return found


def xfs_size(geometry: str) -> int:
    """Bytes of a mounted XFS, from what `xfs_growfs -n` shows; its first block on the disk lags behind the kernel."""
    match = re.search(r"^data\s+=\s+bsize=(\d+)\s+blocks=(\d+)", geometry, re.MULTILINE)
    if not match:
        raise VolumeError(f"xfs_growfs -n shows no size: {geometry.strip()[:200]}")
    return int(match[1]) * int(match[2])


def ext4_size(device: str) -> int:
    """Bytes of an ext4, from its superblock."""
    with open(device, "rb") as file:
        superblock = file.read(2048)[1024:]
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
        checked = 2 if self.kind == "ext4" else 0  # XFS is never checked at boot
        return f"{escaped(self.source)}\t{escaped(self.path)}\t{self.kind}\t{self.options}\t0\t{checked}"


def entry(line: str) -> Entry | None:
    """What one line of fstab says; None for comments and empty ones."""
    fields = re.split(r"[ \t]+", line.strip(" \t\r"))
    if line.lstrip(" \t").startswith("#") or len(fields) < 2:
        return None
    kind, options = (*fields[2:4], "", "")[:2]
    return Entry(unescaped(fields[0]), unescaped(fields[1]), kind, options)


def with_entry(fstab: str, wanted: Entry) -> tuple[str, list[Entry]]:
    """fstab with this one entry for its mount point and its source, and the entries that it takes the place of.

    Every other line stays as it is, to the byte.
    """
    lines = fstab.split("\n")
    entries = [entry(line) for line in lines]
    mine = {
        index: found
        for index, found in enumerate(entries)
        if found and (found.path.rstrip("/") == wanted.path or found.source == wanted.source)
    }
    place = next((index for index, found in mine.items() if found == wanted), next(iter(mine), None))
    replaced = [found for index, found in mine.items() if index != place or found != wanted]
    if place is None:
        lines[len(lines) - (lines[-1] == "") :] = [str(wanted), ""]
    elif mine[place] != wanted:
        lines[place] = str(wanted)
    return "\n".join(line for index, line in enumerate(lines) if index not in mine or index == place), replaced


def escaped(text: str) -> str:
    """A field of fstab."""
    return re.sub(r"[\s\\#]", lambda match: f"\\{ord(match[0]):03o}", text)


def unescaped(text: str) -> str:
    """What a field of fstab or mountinfo stands for."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def _names(folder: str) -> list[str]:
    return sorted(os.listdir(folder)) if os.path.isdir(folder) else []


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""
