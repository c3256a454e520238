"""An EBS volume of a lab host: a sparse file behind a loop device, under the name that udev gives a volume on EC2.

Runs on the host (Python's standard library alone) as nemo-lab-volume@ID.service, and is what holds the loop device: one that
is set to clear itself goes when this process and all mounts are gone, so that none outlives its container. SIGHUP takes over
the file's new size.

A container has neither udev nor systemd's mounts of devices (its generator leaves them out of fstab), so that this makes
the device's names, and mounts what fstab asks for.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import pathlib
import signal
import socket
import stat
import struct
import subprocess
import sys

DEV = pathlib.Path("/dev")
IMAGES = pathlib.Path("/var/lib/nemo-lab/volumes")
SIZE = 8 << 30
# linux/loop.h
LOOP_CTL_GET_FREE = 0x4C82
LOOP_CONFIGURE = 0x4C0A
LOOP_GET_STATUS64 = 0x4C05
LOOP_SET_CAPACITY = 0x4C07
AUTOCLEAR = 4
MAJOR = 7
INFO = struct.Struct("=5Q4I64s64s32s2Q")  # loop_info64; its first two fields are device and inode of the file


def node(path: pathlib.Path, kind: int, major: int, minor: int) -> pathlib.Path:
    """A device node, made where it is missing."""
    with contextlib.suppress(FileExistsError):
        os.mknod(path, kind | 0o660, os.makedev(major, minor))
    return path


def attached(image: pathlib.Path) -> int | None:
    """The number of the loop device that has this file already: of a mount that outlived an earlier process."""
    wanted = image.stat()
    for folder in pathlib.Path("/sys/block").glob("loop*/loop"):
        number = int(folder.parent.name.removeprefix("loop"))
        path = DEV / f"nemo-lab-loop{number}"  # under a name that nothing looks for: most are other hosts' devices
        try:
            descriptor = os.open(node(path, stat.S_IFBLK, MAJOR, number), os.O_RDONLY)
        except OSError:  # it went meanwhile
            continue
        finally:
            path.unlink(missing_ok=True)
        try:
            info = INFO.unpack(fcntl.ioctl(descriptor, LOOP_GET_STATUS64, bytes(INFO.size)))
        except OSError:  # it went meanwhile
            continue
        finally:
            os.close(descriptor)
        if info[:2] == (wanted.st_dev, wanted.st_ino):
            return number
    return None


def attach(image: pathlib.Path) -> tuple[int, int]:
    """A loop device's number, and a descriptor that holds it."""
    number = attached(image)
    if number is not None:
        return number, os.open(node(DEV / f"loop{number}", stat.S_IFBLK, MAJOR, number), os.O_RDWR)
    control = os.open(node(DEV / "loop-control", stat.S_IFCHR, 10, 237), os.O_RDWR)
    file = os.open(image, os.O_RDWR)
    try:
        while True:
            number = fcntl.ioctl(control, LOOP_CTL_GET_FREE)
            held = os.open(node(DEV / f"loop{number}", stat.S_IFBLK, MAJOR, number), os.O_RDWR)
            info = INFO.pack(*[0] * 8, AUTOCLEAR, str(image).encode()[-63:], b"", b"", 0, 0)
            try:
                fcntl.ioctl(held, LOOP_CONFIGURE, struct.pack("=2I", file, 0) + info + bytes(64))
                return number, held
            except OSError as error:
                os.close(held)
                if error.errno != errno.EBUSY:  # another host was faster
                    raise
    finally:
        os.close(file)
        os.close(control)


def ready() -> None:
    """Tell systemd that the volume is there."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.sendto(b"READY=1", os.environ["NOTIFY_SOCKET"].replace("@", "\0", 1))


def main(volume_id: str) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP, signal.SIGTERM})
    IMAGES.mkdir(parents=True, exist_ok=True, mode=0o700)
    image = IMAGES / f"{volume_id}.img"
    if not image.exists():
        with image.open("wb") as file:
            file.truncate(SIZE)
    number, held = attach(image)
    link = DEV / "disk/by-id" / f"nvme-Amazon_Elastic_Block_Store_{volume_id.replace('-', '')}"
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(f"../../loop{number}")
    # Entries of file systems that are not there are none of its business: all of them have `nofail`.
    subprocess.run(["mount", "--all", "--types", "xfs,ext4"], check=False)
    ready()
    while signal.sigwait({signal.SIGHUP, signal.SIGTERM}) == signal.SIGHUP:
        fcntl.ioctl(held, LOOP_SET_CAPACITY)
    link.unlink(missing_ok=True)


if __name__ == "__main__":
    main(sys.argv[1])
