#!/usr/bin/python
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""An EBS volume, formatted once, mounted by UUID, grown when it has grown."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: data_volume
short_description: An EBS volume by its id, formatted once, mounted by UUID, grown when it has grown
version_added: "0.2.0"
author:
  - nemo platform maintainers (@nemo-platform)
description:
  - Finds an attached EBS volume by its id, never by a device's name that another boot may give to another volume. On Xen
    instances, which tell no id, O(device_name) of the attachment is used.
  - Formats it only where it is empty without a doubt. Nothing on it may be a signature that C(wipefs) knows (file systems,
    partition tables, LVM, LUKS, RAID, swap and more), a partition, a device built on it, a mount or a swap in use. It must
    read as zeros too, so that data without a known signature counts - a volume of up to 1 GiB as a whole; of a larger one
    the first and the last 16 MiB, and 16 KiB of each of 16,384 equal parts between them. No option changes that.
  - A file system of the wanted type that is there already is used as it is, with the label that it has.
  - Writes an entry of C(/etc/fstab) by UUID, mounts it, and grows the file system to the size of the volume. Other lines
    of the file stay as they are, to the byte, and an entry for the same place that belongs to another device is refused.
  - A formatting that was cut off is begun again only where nothing else can be on the volume - it is still empty, or holds
    the very XFS that was begun, marked as unfinished, which no kernel mounts. What was begun is noted under
    C(/var/lib/nemo/data_volume) before the first byte is written. Of an ext4 that was cut off nothing proves what it is,
    so that it is refused like any other data.
options:
  volume_id:
    description: The id of the volume, such as V(vol-0123456789abcdef0).
    type: str
    required: true
  device_name:
    description:
      - The name of the attachment (C(/dev/sdf)), as EC2 tells it.
      - Used on Xen instances only (t2, m4 and others of that age), where C(/dev/sdf) shows up as C(/dev/xvdf). They tell no
        id, so that this name alone says which volume it is.
    type: str
    default: ''
  path:
    description: Absolute path of the mount point.
    type: path
    required: true
  filesystem:
    description: Type of the file system.
    type: str
    choices: [xfs, ext4]
    default: xfs
  label:
    description: Label of the file system, given when it is made; up to 12 of C(A-Za-z0-9._-) for V(xfs), 16 for V(ext4).
    type: str
    default: ''
  options:
    description:
      - Mount options. C(nofail) is always added, so that a volume that is away does not keep the host from booting.
      - V(ro), V(noauto), V(fail) and V(x-systemd.automount) are refused.
    type: list
    elements: str
    default: [defaults, noatime]
  before:
    description:
      - Units of systemd that start after the mount at boot, such as C(docker.service). They start without it where the
        volume is away.
    type: list
    elements: str
    default: []
  device_timeout:
    description: Seconds that systemd waits for the volume at boot, unless O(options) say so themselves.
    type: int
    default: 30
  owner:
    description: Owner of the mounted file system's root folder.
    type: str
    default: root
  group:
    description: Group of the mounted file system's root folder.
    type: str
    default: root
  mode:
    description: Mode of the mounted file system's root folder.
    type: str
    default: '0755'
  attach_timeout:
    description: Seconds to wait for a volume that is still being attached.
    type: int
    default: 60
  lock_timeout:
    description: Seconds to wait for another run on the same volume.
    type: int
    default: 120
  min_free_mb:
    description:
      - MiB that must be free on the mounted file system; less is an error, and so is a file system without inodes.
      - V(0) looks at nothing.
    type: int
    default: 0
attributes:
  check_mode:
    support: full
    description: Looks at everything and changes nothing.
  diff_mode:
    support: full
    description: What happens to the volume, the entry of fstab, and owner and mode of the mounted folder.
notes:
  - Needs root, util-linux, and C(mkfs) of the wanted type where the volume is empty.
  - One execution at a time per volume; a second one waits for the first, and for a C(mkfs) that outlived it.
"""

EXAMPLES = r"""
- name: The models' volume is mounted
  nemo.platform.data_volume:
    volume_id: vol-0123456789abcdef0
    path: /srv/models
    label: models
"""

RETURN = r"""
device:
  description: The block device of the volume.
  returned: success
  type: str
  sample: /dev/nvme1n1
uuid:
  description: UUID of the file system; empty in check mode where it has yet to be made.
  returned: success
  type: str
done:
  description: What was done, or would be in check mode - C(formatted), C(fstab), C(mounted), C(grown), C(folder).
  returned: always
  type: list
  elements: str
  sample: [formatted, fstab, mounted]
size_bytes:
  description: Size of the volume.
  returned: success
  type: int
free_bytes:
  description: Free space for other users than root; 0 where it is not mounted.
  returned: success
  type: int
"""

import contextlib
import fcntl
import json
import os
import re
import time
import uuid as uuids
from collections.abc import Iterator, Sequence

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.nemo.platform.plugins.module_utils import block_volume as volume
from ansible_collections.nemo.platform.plugins.module_utils import host_files
from ansible_collections.nemo.platform.plugins.module_utils.block_volume import VolumeError
from ansible_collections.nemo.platform.plugins.module_utils.host_files import HostFileError

PACKAGES = {"xfs": "xfsprogs", "ext4": "e2fsprogs"}
LABEL_LENGTH = {"xfs": 12, "ext4": 16}
GROWN_BY = 16 * volume.MIB  # smaller differences are the tail that the file system cannot use
LEAST_INODES = 16
# With them the volume would not be there, for writing, after each boot.
REFUSED_OPTIONS = ("ro", "noauto", "fail", "x-systemd.automount")


class DataVolume:
    """One run."""

    def __init__(self, module: AnsibleModule, places: volume.Places) -> None:
        self.module = module
        self.params = module.params
        self.places = places
        self.volume_id: str = module.params["volume_id"]
        self.path: str = module.params["path"]
        self.filesystem: str = module.params["filesystem"]
        self.done: list[str] = []
        self.diff: list[dict[str, str]] = []
        self.device = ""
        self.lock = -1

    def run(self, argv: Sequence[str]) -> tuple[int, str, str]:
        # A child keeps the lock: where this process is killed, a mkfs that goes on keeps other runs away.
        code, out, err = self.module.run_command(list(argv), pass_fds=[self.lock] if self.lock >= 0 else None)
        return int(code), str(out), str(err)

    def must(self, argv: Sequence[str], what: str) -> str:
        """The output of a command that has to succeed."""
        code, out, err = self.run(argv)
        if code != 0:
            raise VolumeError(f"{what}: {' '.join(argv)} said: {(err or out).strip()[-400:]}")
        return out

    def did(self, what: str) -> bool:
        """Note an act; whether it is to be done for real."""
        self.done.append(what)
        return not self.module.check_mode

    def differs(self, what: str, before: str, after: str) -> None:
        self.diff.append({"before_header": what, "after_header": what, "before": before, "after": after})

    # ---- the way through

    def bring(self) -> dict[str, object]:
        self.check_input()
        with self.only_one(self.volume_id):
            self.device = self.find()
            self.check_place()
            uuid = self.file_system()
            self.fstab(uuid)
            self.mount(uuid)
            self.grow()
            self.folder()
            return self.result(uuid)

    def check_input(self) -> None:
        """Everything that can be wrong before the volume is looked at."""
        label, path = self.params["label"], self.params["path"]
        if not volume.valid_id(self.volume_id):
            raise VolumeError(
                f"volume_id {self.volume_id!r} is no EBS volume's id: it is written vol- and 17 (or 8) of 0-9a-f"
            )
        if not re.fullmatch(r"(/[^/\0\n]+)+/?", path) or os.path.normpath(path) != path.rstrip("/"):
            raise VolumeError(f"path {path!r} is no place for a volume: an absolute path below / is needed")
        self.path = path.rstrip("/")
        if os.path.realpath(self.path) != self.path:
            raise VolumeError(
                f"path {self.path} leads by a link to {os.path.realpath(self.path)}: set it to that, or remove the link"
            )
        if not re.fullmatch(r"[A-Za-z0-9._-]*", label) or len(label) > LABEL_LENGTH[self.filesystem]:
            raise VolumeError(
                f"label {label!r} does not fit {self.filesystem}: up to {LABEL_LENGTH[self.filesystem]} of A-Za-z0-9._- are allowed"
            )
        wrong = [option for option in self.params["options"] if not re.fullmatch(r"[^\s,#\\]+", option)]
        refused = [option for option in self.params["options"] if option in REFUSED_OPTIONS]
        if wrong or refused:
            raise VolumeError(
                f"options hold {(wrong + refused)[0]!r}: each is one mount option without spaces and commas, and "
                f"{', '.join(REFUSED_OPTIONS)} are refused, because the volume shall be there for writing after each boot"
            )
        host_files.parse_mode(self.params["mode"], self.path)
        if not self.module.check_mode:  # where the run before it made the accounts only in check mode
            host_files.require_ids(self.path, self.params["owner"], self.params["group"])

    def find(self) -> str:
        started = time.monotonic()
        while True:
            device = volume.find(self.volume_id, self.params["device_name"], self.places)
            if device:
                with contextlib.suppress(OSError):  # on its way in or out
                    if volume.size(device) > 0:
                        return device
            if time.monotonic() - started >= self.params["attach_timeout"]:
                break
            time.sleep(0.5)
        others = ", ".join(volume.attached_ids(self.places)) or "none"
        name = self.params["device_name"]
        hint = (
            f"; {name} is no device of Xen here either"
            if name
            else ". Instances on Xen (t2, m4, ...) tell no ids: set device_name there"
        )
        raise VolumeError(
            f"{self.volume_id} is not attached to this host (volumes that it shows: {others}; waited "
            f"{self.params['attach_timeout']} s){hint}. Is the id right, and does AWS say in-use and attached? "
            f"aws ec2 describe-volumes --volume-ids {self.volume_id}"
        )

    def check_place(self) -> None:
        """Whether the volume can be at the mount point, or is there in good order."""
        mount = self.mounted()
        if mount:
            if mount.device != volume.number(self.device):
                raise VolumeError(
                    f"{self.path} is taken: {mount.source} ({mount.kind}) is mounted there, and not {self.device} "
                    f"({self.volume_id}). Unmount that, or choose another path"
                )
            self.check_writable(mount)
            return
        elsewhere = [mount.path for mount in self.mounts_of_device()]
        if elsewhere:
            raise VolumeError(
                f"{self.device} ({self.volume_id}) is mounted at {elsewhere[0]} already: unmount it (umount {elsewhere[0]}), "
                "or set path to that"
            )
        if os.path.lexists(self.path) and not os.path.isdir(self.path):
            raise VolumeError(f"{self.path} is no folder: the volume cannot be mounted there")
        names = sorted(os.listdir(self.path)) if os.path.isdir(self.path) else []
        if names:
            raise VolumeError(
                f"{self.path} holds files of the disk below it, which the mount would hide: {', '.join(names[:3])}"
                f"{f' and {len(names) - 3} more' if len(names) > 3 else ''}. Move them away, run this again, and move them onto "
                "the volume"
            )
        if volume.read_only(self.device, self.places):
            raise VolumeError(
                f"{self.device} ({self.volume_id}) takes no writes: the kernel has it as read-only. Attach it again, and see "
                f"journalctl -k | grep {os.path.basename(self.device)}"
            )

    def check_writable(self, mount: volume.Mount) -> None:
        repair = "xfs_repair" if mount.kind == "xfs" else "e2fsck -f"
        advice = (
            f"See journalctl -k | grep {os.path.basename(self.device)}, stop what uses it, umount {self.path}, "
            f"{repair} {self.device}, and run this again"
        )
        if "ro" in mount.options:
            raise VolumeError(
                f"{self.path} is mounted read-only: the kernel does so after an error of the disk or the file system, or "
                f"somebody did. {advice}"
            )
        try:
            os.listdir(self.path)
        except OSError as error:
            raise VolumeError(
                f"{self.path} cannot be read ({error.strerror}): the file system has shut down. {advice}"
            ) from error

    # ---- the file system

    def file_system(self) -> str:
        """The UUID of the file system, which is made where the volume is empty."""
        found = volume.signatures(self.device, self.run)
        kinds = {signature.kind for signature in found}
        begun = self.begun()
        if kinds == {self.filesystem}:
            built = volume.built_on(self.device, self.places)
            if built:
                raise VolumeError(self.refusal(", ".join(built)))
            if self.filesystem == "xfs" and volume.unfinished_xfs(self.device):
                if begun != found[0].uuid:
                    raise VolumeError(
                        self.refusal("an XFS whose making was cut off, and not by this module on this host")
                    )
                return self.make()  # on a volume that was empty; no kernel has mounted that file system since
            if not found[0].uuid:
                raise VolumeError(
                    f"{self.device} ({self.volume_id}) has no UUID to mount it by: give it one (tune2fs -U random)"
                )
            self.forget()
            return found[0].uuid
        if kinds:
            hint = f" To use it as it is, set filesystem to {found[0].kind}." if kinds < set(LABEL_LENGTH) else ""
            raise VolumeError(self.refusal(", ".join(str(signature) for signature in found)) + hint)
        uses = volume.uses(self.device, self.places)
        if uses:
            raise VolumeError(self.refusal(", ".join(uses)))
        offset = volume.first_data(self.device)
        if offset is not None:
            cut = " (perhaps of a formatting that this module began and that was cut off)" if begun else ""
            raise VolumeError(self.refusal(f"data of no known kind at byte {offset}{cut}"))
        return self.make()

    def refusal(self, what: str) -> str:
        force = "-f" if self.filesystem == "xfs" else "-F"
        return (
            f"{self.device} ({self.volume_id}) is not empty: {what}. It is left as it is and never formatted from here. Is this "
            f"the right volume? If nothing on it is needed, say so to the disk yourself (mkfs.{self.filesystem} {force} "
            f"{self.device}): the next run takes it as it is then."
        )

    def make(self) -> str:
        uuid, label = str(uuids.uuid4()), self.params["label"]
        if self.did("formatted"):
            program = f"mkfs.{self.filesystem}"
            if not self.module.get_bin_path(program):
                raise VolumeError(f"{program} is missing: install the package {PACKAGES[self.filesystem]}")
            self.remember(uuid)
            # Forced, because mkfs would ask about an XFS of its own that was cut off. Nothing is discarded: it is empty.
            argv = (
                [program, "-f", "-q", "-K", "-m", f"uuid={uuid}"]
                if self.filesystem == "xfs"
                else [program, "-F", "-q", "-E", "nodiscard", "-U", uuid]
            )
            self.must([*argv, *(["-L", label] if label else []), self.device], f"{self.device} could not be formatted")
            self.forget()
            self.settle(uuid)
        self.differs(self.device, "empty\n", f"{self.filesystem}{f', label {label}' if label else ''}\n")
        return "" if self.module.check_mode else uuid

    def settle(self, uuid: str) -> None:
        """Wait until udev knows the file system: systemd unmounts one whose device it does not know."""
        if os.path.exists(os.path.join(self.places.run, "udev/control")):
            link = os.path.join(self.places.dev, "disk/by-uuid", uuid)
            self.run(["udevadm", "trigger", "--action=change", f"--name-match={self.device}"])
            self.must(["udevadm", "settle", "--timeout=30", f"--exit-if-exists={link}"], "udev is not done")

    # ---- what this module began

    @property
    def note(self) -> str:
        return os.path.join(self.places.notes, f"{self.volume_id}.json")

    def begun(self) -> str:
        """UUID of the file system whose making this module began here and did not see the end of; empty without one."""
        try:
            with open(self.note, encoding="utf-8") as file:
                return str(json.load(file)["uuid"])
        except (OSError, ValueError, KeyError, TypeError):
            return ""

    def remember(self, uuid: str) -> None:
        os.makedirs(self.places.notes, mode=0o700, exist_ok=True)
        self.write(self.note, json.dumps({"uuid": uuid}), 0o600)

    def forget(self) -> None:
        if not self.module.check_mode and os.path.exists(self.note):
            os.unlink(self.note)
            host_files.fsync_directory(self.places.notes)

    @staticmethod
    def read(path: str) -> str:
        """The text of a file, whatever its bytes are; empty where there is none."""
        if not os.path.exists(path):
            return ""
        with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
            return file.read()

    def write(self, path: str, text: str, mode: int) -> None:
        """Replace a file at once and for good, with its owner, mode and context where it was there."""
        draft = f"{path}.nemo-new"
        with open(draft, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            os.fchmod(file.fileno(), mode)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        self.module.atomic_move(draft, path)
        host_files.fsync_directory(os.path.dirname(path))

    # ---- the mount

    def mounts_of_device(self) -> list[volume.Mount]:
        number = volume.number(self.device)
        return [mount for mount in volume.mounts(self.places) if mount.device == number]

    def mounted(self) -> volume.Mount | None:
        """What is mounted at the place, if anything is."""
        here = [mount for mount in volume.mounts(self.places) if mount.path == self.path]
        return here[-1] if here else None

    def options(self) -> list[str]:
        """The mount options of the entry."""
        options = list(self.params["options"])
        if not any(option.startswith("x-systemd.device-timeout=") for option in options):
            options.append(f"x-systemd.device-timeout={self.params['device_timeout']}s")
        options += [f"x-systemd.before={unit}" for unit in self.params["before"]]
        return list(dict.fromkeys([*options, "nofail"]))

    def fstab(self, uuid: str) -> None:
        entry = volume.Entry(
            f"UUID={uuid or '<of the new file system>'}", self.path, self.filesystem, ",".join(self.options())
        )
        with self.only_one("fstab"):
            path = os.path.realpath(self.places.fstab)
            before = self.read(path)
            after, replaced = volume.with_entry(before, entry)
            for other in replaced:
                self.check_entry(other, uuid)
            if after == before:
                return
            self.differs(
                self.places.fstab,
                *(text.encode(errors="surrogateescape").decode(errors="replace") for text in (before, after)),
            )
            if not self.did("fstab"):
                return
            self.write(path, after, 0o644)
        if os.path.isdir(os.path.join(self.places.run, "systemd/system")):  # it makes its mount units of fstab
            self.must(["systemctl", "daemon-reload"], "systemd did not read fstab")
        if self.mounted() and any(_live(other.options) != _live(entry.options) for other in replaced):
            self.must(
                ["mount", "--fstab", self.places.fstab, "-o", "remount", self.path],
                f"{self.path} did not take its new mount options",
            )

    def check_entry(self, other: volume.Entry, uuid: str) -> None:
        """Refuse to replace an entry that belongs to something else."""
        if other.source == f"UUID={uuid}":
            return
        code, out, _ = self.run(["findfs", other.source]) if "=" in other.source else (0, other.source, "")
        device = out.strip() if code == 0 else ""
        is_here = volume.is_block(device)
        local = "=" in other.source or other.source.startswith("/dev/")
        if (is_here and volume.number(device) != volume.number(self.device)) or not local:
            raise VolumeError(
                f"{self.places.fstab} has another entry for {self.path}: {other.source} ({other.kind})"
                f"{f', which is {device}' if is_here else ''}. Remove that line, or choose another path"
            )

    def mount(self, uuid: str) -> None:
        if self.mounted() or not self.did("mounted"):
            return
        _, out, _ = self.run(["blkid", "--match-token", f"UUID={uuid}", "--output", "device"])
        twins = [
            name for name in out.split() if volume.is_block(name) and volume.number(name) != volume.number(self.device)
        ]
        if twins:
            raise VolumeError(
                f"{self.device} ({self.volume_id}) and {twins[0]} have one UUID, {uuid}: a snapshot's copy beside its "
                f"original? Detach one of them, or give one another UUID "
                f"({'xfs_admin -U generate' if self.filesystem == 'xfs' else 'tune2fs -U random'} DEVICE)"
            )
        os.makedirs(self.path, mode=0o755, exist_ok=True)
        self.must(
            ["mount", "--fstab", self.places.fstab, self.path],
            f"{self.device} ({self.volume_id}) could not be mounted at {self.path}, and is left as it is",
        )
        now = self.mounted()
        if not now or now.device != volume.number(self.device):
            raise VolumeError(f"{self.path} is not {self.device} after mount {self.path}: see journalctl -b")
        self.check_writable(now)

    def used(self) -> int:
        """Bytes of the mounted file system."""
        if self.filesystem == "ext4":
            return volume.ext4_size(self.device)
        return volume.xfs_size(self.must(["xfs_growfs", "-n", self.path], f"{self.path} shows no size"))

    def grow(self) -> None:
        if not self.mounted():  # check mode
            return
        used, size = self.used(), volume.size(self.device)
        if size - used < GROWN_BY:
            return
        self.differs(
            self.path,
            *(
                f"{self.filesystem} of {_in_mib(length)} on {self.device} of {_in_mib(size)}\n"
                for length in (used, size)
            ),
        )
        if self.did("grown"):
            argv = ["xfs_growfs", "-d", self.path] if self.filesystem == "xfs" else ["resize2fs", self.device]
            self.must(argv, f"the file system at {self.path} could not be grown")
            if self.used() == used:
                raise VolumeError(f"the file system at {self.path} is as small as before: {' '.join(argv)} did nothing")

    def folder(self) -> None:
        if not self.mounted():  # check mode
            return
        mode = host_files.parse_mode(self.params["mode"], self.path)
        changes = host_files.ensure_directory(
            self.path, mode, self.params["owner"], self.params["group"], self.module.check_mode
        )
        if changes:
            self.done.append("folder")
            self.diff.append(host_files.attribute_diff(self.path, changes))

    def result(self, uuid: str) -> dict[str, object]:
        free = 0
        if self.mounted():
            stat = os.statvfs(self.path)
            free = stat.f_bavail * stat.f_frsize
            wanted = self.params["min_free_mb"] * volume.MIB
            if free < wanted or (wanted and stat.f_files and stat.f_favail < LEAST_INODES):
                what = (
                    f"{_in_mib(free)} are free, {_in_mib(wanted)} are needed"
                    if free < wanted
                    else "no file can be made, all inodes are used"
                )
                raise VolumeError(
                    f"{self.path} is full: {what}. Remove what is not needed, or grow the volume (aws ec2 modify-volume "
                    f"--volume-id {self.volume_id} --size ...): the next run grows the file system. What is on it is whole"
                )
        return {
            "changed": bool(self.done),
            "device": self.device,
            "uuid": uuid,
            "done": self.done,
            "size_bytes": volume.size(self.device),
            "free_bytes": free,
            "diff": self.diff,
        }

    @contextlib.contextmanager
    def only_one(self, name: str) -> Iterator[None]:
        """Keep a second run away from the same volume, or the same file."""
        folder = os.path.join(self.places.run, "nemo/data_volume")
        os.makedirs(folder, mode=0o700, exist_ok=True)  # others could take the lock
        with open(os.path.join(folder, f"{name}.lock"), "a+", encoding="utf-8") as lock:
            deadline = time.monotonic() + self.params["lock_timeout"]
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() >= deadline:
                        lock.seek(0)
                        raise VolumeError(
                            f"another run is at work on {name}: {lock.read() or 'unknown'}; waited {self.params['lock_timeout']} s. "
                            "The lock ends with that process and the programs that it started"
                        ) from None
                    time.sleep(0.2)
            lock.truncate(0)
            lock.write(f"process {os.getpid()} since {time.strftime('%Y-%m-%d %H:%M:%S')}")
            lock.flush()
            before, self.lock = self.lock, lock.fileno()
            try:
                yield
            finally:
                self.lock = before


def _live(options: str) -> set[str]:
    """The options that a mounted file system knows of."""
    return {name for name in options.split(",") if not name.startswith("x-") and name not in ("nofail", "defaults")}


def _in_mib(length: int) -> str:
    return f"{length // volume.MIB} MiB"


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "volume_id": {"type": "str", "required": True},
            "device_name": {"type": "str", "default": ""},
            "path": {"type": "path", "required": True},
            "filesystem": {"type": "str", "choices": ["xfs", "ext4"], "default": "xfs"},
            "label": {"type": "str", "default": ""},
            "options": {"type": "list", "elements": "str", "default": ["defaults", "noatime"]},
            "before": {"type": "list", "elements": "str", "default": []},
            "device_timeout": {"type": "int", "default": 30},
            "owner": {"type": "str", "default": "root"},
            "group": {"type": "str", "default": "root"},
            "mode": {"type": "str", "default": "0755"},
            "attach_timeout": {"type": "int", "default": 60},
            "lock_timeout": {"type": "int", "default": 120},
            "min_free_mb": {"type": "int", "default": 0},
        },
        supports_check_mode=True,
    )
    module.run_command_environ_update = {"LANG": "C", "LC_ALL": "C"}  # what programs say is read
    task = DataVolume(module, volume.Places())
    try:
        result = task.bring()
    except (VolumeError, HostFileError, OSError) as error:
        module.fail_json(msg=str(error), done=task.done, changed=bool(task.done), diff=task.diff)
    module.exit_json(**result)


if __name__ == "__main__":
    main()
