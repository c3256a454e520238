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
    partition tables, LVM, LUKS, RAID, swap and more), a partition, a device built on it, a mount or a swap in use;
    and it must read as zeros, all of the first and last 16 MiB and 2,048 samples of 16 KiB between them (a volume of up to 1 GiB is read whole), so that data
    without a known signature counts too. No option changes that.
  - A file system of the wanted type that is there already is used as it is.
  - Writes an entry of C(/etc/fstab) by UUID, mounts it, and grows the file system to the size of the volume.
  - A formatting that was cut off is finished by the next run. That this module began it on an empty volume is noted under
    C(/var/lib/nemo/data_volume) before the first byte is written.
options:
  volume_id:
    description: The id of the volume, such as V(vol-0123456789abcdef0).
    type: str
    required: true
  device_name:
    description:
      - The name of the attachment (C(/dev/sdf)), as EC2 tells it.
      - Used on Xen instances only.
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
    description: Label of the file system, given when it is made; at most 12 characters for V(xfs), 16 for V(ext4).
    type: str
    default: ''
  options:
    description:
      - Mount options. C(nofail) is always added, so that a volume that is away does not keep the host from booting.
    type: list
    elements: str
    default: [defaults, noatime]
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
  wait:
    description: Seconds to wait for a volume that is still being attached.
    type: int
    default: 60
  min_free_mb:
    description: MiB that must be free on the mounted file system; less is an error. V(0) looks at nothing.
    type: int
    default: 0
attributes:
  check_mode:
    support: full
    description: Looks at everything and changes nothing.
  diff_mode:
    support: full
    description: The entry of fstab, and what would happen to the volume.
notes:
  - Needs root, util-linux, and C(mkfs) of the wanted type where the volume is empty.
  - One execution at a time per volume; a second one waits for the first for up to 120 seconds.
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
  description: The block device of the volume; empty in check mode while it is not attached.
  returned: success
  type: str
  sample: /dev/nvme1n1
uuid:
  description: UUID of the file system; empty in check mode where it has yet to be made.
  returned: success
  type: str
done:
  description: What was done, or would be in check mode.
  returned: success
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
import time
import uuid as uuids
from collections.abc import Iterator, Sequence

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.nemo.platform.plugins.module_utils import block_volume as volume
from ansible_collections.nemo.platform.plugins.module_utils.block_volume import VolumeError

FSTAB = "/etc/fstab"
NOTES = "/var/lib/nemo/data_volume"
LOCKS = "/run/nemo/data_volume"
LOCK_SECONDS = 120
LABEL_LENGTH = {"xfs": 12, "ext4": 16}
GROWN_BY = 16 * volume.MIB  # smaller differences are the tail that the file system cannot use


class DataVolume:
    """One run."""

    def __init__(self, module: AnsibleModule) -> None:
        self.module = module
        self.volume_id: str = module.params["volume_id"]
        self.path: str = module.params["path"].rstrip("/") or "/"
        self.filesystem: str = module.params["filesystem"]
        self.places = volume.Places()
        self.done: list[str] = []
        self.diff: list[dict[str, str]] = []
        self.device = ""
        self.note = os.path.join(NOTES, f"{self.volume_id}.json")

    def run(self, argv: Sequence[str]) -> tuple[int, str, str]:
        code, out, err = self.module.run_command(list(argv))
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

    # ---- the way through

    def bring(self) -> dict[str, object]:
        self.check_input()
        self.device = self.find()
        uuid = self.file_system()
        self.check_place()
        self.fstab(uuid)
        self.mount()
        self.grow()
        self.folder()
        return self.result(uuid)

    def check_input(self) -> None:
        label = self.module.params["label"]
        if not volume.valid_id(self.volume_id):
            raise VolumeError(
                f"volume_id {self.volume_id!r} is no EBS volume's id: it is written vol- and 17 (or 8) of 0-9a-f"
            )
        if not self.path.startswith("/") or self.path == "/":
            raise VolumeError(f"path {self.path!r} is no place for a volume: an absolute path below / is needed")
        if len(label) > LABEL_LENGTH[self.filesystem]:
            raise VolumeError(
                f"label {label!r} has {len(label)} characters, {self.filesystem} holds {LABEL_LENGTH[self.filesystem]}"
            )

    def find(self) -> str:
        deadline = time.monotonic() + self.module.params["wait"]
        while True:
            device = volume.find(self.volume_id, self.module.params["device_name"], self.places)
            if device:
                try:
                    if volume.size(device) > 0:
                        return device
                except OSError:
                    pass  # on its way in or out
            if time.monotonic() >= deadline:
                break
            time.sleep(0.5)
        others = ", ".join(volume.attached_ids(self.places)) or "none"
        raise VolumeError(
            f"{self.volume_id} is not attached to this host (volumes here: {others}; waited "
            f"{self.module.params['wait']} s). Is the id right, and its state in-use? aws ec2 describe-volumes "
            f"--volume-ids {self.volume_id}"
        )

    def file_system(self) -> str:
        """The UUID of the file system, which is made where the volume is empty."""
        found = volume.signatures(self.device, self.run)
        kinds = sorted({signature.kind for signature in found})
        begun = self.begun()
        if kinds == [self.filesystem]:
            built = volume.parts_and_holders(self.device, self.places)
            if built:
                raise VolumeError(self.refusal(", ".join(built)))
            if begun and begun["uuid"] != found[0].uuid:
                begun = {}  # somebody made another one since
            if not begun or self.whole(found[0].uuid):
                self.forget()
                return found[0].uuid
        elif kinds and not begun:
            hint = ""
            if len(kinds) == 1 and kinds[0] in LABEL_LENGTH:
                hint = f" To use it as it is, set filesystem to {kinds[0]}."
            raise VolumeError(self.refusal(", ".join(str(signature) for signature in found)) + hint)
        used = volume.parts_and_holders(self.device, self.places)
        used += [f"mounted at {mount.path}" for mount in self.mounts_of_device()]
        used += ["in use as swap"] if volume.swap_in_use(self.device, self.places) else []
        if used:
            raise VolumeError(self.refusal(", ".join(used)))
        if not begun:
            offset = volume.first_data(self.device)
            if offset is not None:
                raise VolumeError(self.refusal(f"data of no known kind at byte {offset}"))
        return self.make()

    def refusal(self, what: str) -> str:
        return (
            f"{self.device} ({self.volume_id}) is not empty: {what}. It is left as it is and never formatted. Is this the "
            "right volume? If it may be overwritten, say so to the disk yourself: wipefs and blkdiscard."
        )

    def make(self) -> str:
        uuid = str(uuids.uuid4())
        label = self.module.params["label"]
        if self.did("formatted"):
            program = f"mkfs.{self.filesystem}"
            if not self.module.get_bin_path(program):
                package = {"xfs": "xfsprogs", "ext4": "e2fsprogs"}[self.filesystem]
                raise VolumeError(f"{program} is missing: install the package {package}")
            self.remember(uuid)
            # Both would ask before they overwrite something, and that question was answered above.
            argv = (
                [program, "-f", "-q", "-m", f"uuid={uuid}"]
                if self.filesystem == "xfs"
                else [program, "-F", "-q", "-U", uuid]
            )
            self.must([*argv, *(["-L", label] if label else []), self.device], f"{self.device} could not be formatted")
            self.must(["blockdev", "--flushbufs", self.device], f"{self.device} could not be flushed")
            self.forget()
        self.diff.append(
            {
                "before_header": self.device,
                "after_header": self.device,
                "before": "empty\n",
                "after": f"{self.filesystem}{f', label {label}' if label else ''}\n",
            }
        )
        return "" if self.module.check_mode else uuid

    def whole(self, uuid: str) -> bool:
        """Whether a file system whose making was cut off is complete all the same."""
        if any(True for _ in self.mounts_of_device()):
            return True
        check = {"xfs": ["xfs_repair", "-n", self.device], "ext4": ["e2fsck", "-f", "-n", self.device]}[self.filesystem]
        return self.run(check)[0] == 0

    # ---- what this module began

    def begun(self) -> dict[str, str]:
        try:
            with open(self.note, encoding="utf-8") as file:
                note = json.load(file)
        except (OSError, ValueError):
            return {}
        return note if isinstance(note, dict) and note.get("volume_id") == self.volume_id else {}

    def remember(self, uuid: str) -> None:
        os.makedirs(NOTES, mode=0o700, exist_ok=True)
        draft = f"{self.note}.new"
        with open(draft, "w", encoding="utf-8") as file:
            json.dump({"volume_id": self.volume_id, "uuid": uuid, "filesystem": self.filesystem}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, self.note)
        self.sync_folder(NOTES)

    def forget(self) -> None:
        if not self.module.check_mode and os.path.exists(self.note):
            os.unlink(self.note)
            self.sync_folder(NOTES)

    @staticmethod
    def sync_folder(path: str) -> None:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    # ---- the mount

    def mounts_of_device(self) -> Iterator[volume.Mount]:
        number = volume.number(self.device)
        return (mount for mount in volume.mounts(self.places) if mount.device == number)

    def mounted(self) -> volume.Mount | None:
        """What is mounted at the place, if anything is."""
        here = [mount for mount in volume.mounts(self.places) if mount.path == self.path]
        return here[-1] if here else None

    def check_place(self) -> None:
        mount = self.mounted()
        if mount:
            if mount.device != volume.number(self.device):
                raise VolumeError(f"{self.path} is taken: {mount.source} ({mount.kind}) is mounted there")
            if "ro" in mount.options:
                raise VolumeError(
                    f"{self.path} is mounted read-only: the kernel does so after an error of the disk or the file system "
                    f"(journalctl -k | grep {os.path.basename(self.device)}). Stop what uses it, unmount it, check it "
                    f"({'xfs_repair' if self.filesystem == 'xfs' else 'e2fsck -f'} {self.device}), and run this again."
                )
            return
        elsewhere = [mount.path for mount in self.mounts_of_device()]
        if elsewhere:
            raise VolumeError(f"{self.device} is mounted at {elsewhere[0]} already: unmount it, or set path to that")
        if os.path.islink(self.path) or (os.path.exists(self.path) and not os.path.isdir(self.path)):
            raise VolumeError(f"{self.path} is no folder: the volume cannot be mounted there")
        if os.path.isdir(self.path) and os.listdir(self.path):
            raise VolumeError(
                f"{self.path} holds files of the root disk, which the mount would hide: move them away first "
                f"({', '.join(sorted(os.listdir(self.path))[:3])} ...)"
            )

    def fstab(self, uuid: str) -> None:
        before = ""
        with contextlib.suppress(FileNotFoundError), open(FSTAB, encoding="utf-8") as file:
            before = file.read()
        options = list(dict.fromkeys([*self.module.params["options"], "nofail"]))
        entry = volume.Entry(
            f"UUID={uuid or '<of the new file system>'}", self.path, self.filesystem, ",".join(options)
        )
        after, _ = volume.with_entry(before, entry)
        if after.split("\n") == before.rstrip("\n").split("\n") + [""]:
            return
        self.diff.append({"before_header": FSTAB, "after_header": FSTAB, "before": before, "after": after})
        if self.did("fstab"):
            draft = f"{FSTAB}.nemo-new"
            with open(draft, "w", encoding="utf-8") as file:
                os.fchmod(file.fileno(), 0o644)
                file.write(after)
                file.flush()
                os.fsync(file.fileno())
            self.module.atomic_move(draft, FSTAB)
            self.sync_folder(os.path.dirname(FSTAB))
            if os.path.isdir("/run/systemd/system"):  # systemd makes its mount units of fstab when it reads it
                self.must(["systemctl", "daemon-reload"], "systemd did not read fstab")

    def mount(self) -> None:
        if self.mounted():
            return
        if self.did("mounted"):
            os.makedirs(self.path, mode=0o755, exist_ok=True)
            self.must(["mount", self.path], f"{self.device} could not be mounted at {self.path}")
            now = self.mounted()
            if not now or now.device != volume.number(self.device):
                raise VolumeError(f"{self.path} is not {self.device} after mount {self.path}: see fstab")

    def grow(self) -> None:
        if not self.mounted():  # check mode
            return
        if self.filesystem == "xfs":
            used = volume.xfs_size(self.must(["xfs_growfs", "-n", self.path], f"{self.path} shows no size"))
        else:
            used = volume.ext4_size(self.device)
        difference = volume.size(self.device) - used
        if difference < GROWN_BY:
            return
        if self.did("grown"):
            argv = ["xfs_growfs", "-d", self.path] if self.filesystem == "xfs" else ["resize2fs", self.device]
            self.must(argv, f"the file system at {self.path} could not be grown")

    def folder(self) -> None:
        if self.module.check_mode and not self.mounted():
            return
        params = self.module.params
        changed = self.module.set_mode_if_different(self.path, params["mode"], False)
        changed |= self.module.set_owner_if_different(self.path, params["owner"], False)
        changed |= self.module.set_group_if_different(self.path, params["group"], False)
        if changed:
            self.done.append("folder")

    def result(self, uuid: str) -> dict[str, object]:
        free = 0
        if self.mounted():
            stat = os.statvfs(self.path)
            free = stat.f_bavail * stat.f_frsize
            wanted = self.module.params["min_free_mb"] * volume.MIB
            if free < wanted:
                raise VolumeError(
                    f"{self.path} is full: {free // volume.MIB} MiB are free, {wanted // volume.MIB} are needed. Remove what is "
                    f"not needed, or grow the volume (aws ec2 modify-volume --volume-id {self.volume_id} --size ...): the next "
                    "run grows the file system"
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
def only_one(volume_id: str) -> Iterator[None]:
    """Keep a second run away from the same volume."""
    os.makedirs(LOCKS, mode=0o700, exist_ok=True)
    descriptor = os.open(os.path.join(LOCKS, f"{volume_id}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise VolumeError(f"another run has been at work on {volume_id} for {LOCK_SECONDS} s") from None
                time.sleep(0.2)
        yield
    finally:
        os.close(descriptor)


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "volume_id": {"type": "str", "required": True},
            "device_name": {"type": "str", "default": ""},
            "path": {"type": "path", "required": True},
            "filesystem": {"type": "str", "choices": ["xfs", "ext4"], "default": "xfs"},
            "label": {"type": "str", "default": ""},
            "options": {"type": "list", "elements": "str", "default": ["defaults", "noatime"]},
            "owner": {"type": "str", "default": "root"},
            "group": {"type": "str", "default": "root"},
            "mode": {"type": "str", "default": "0755"},
            "wait": {"type": "int", "default": 60},
            "min_free_mb": {"type": "int", "default": 0},
        },
        supports_check_mode=True,
    )
    task = DataVolume(module)
    try:
        task.check_input()
        with only_one(task.volume_id):
            result = task.bring()
    except VolumeError as error:
        module.fail_json(msg=str(error), done=task.done, changed=bool(task.done))
    module.exit_json(**result)


if __name__ == "__main__":
    main()
