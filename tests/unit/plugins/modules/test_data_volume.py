# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""data_volume against a host that is simulated, against disks that hold something, and against real loop devices."""

from __future__ import annotations

import contextlib
import fcntl
import grp
import json
import multiprocessing
import os
import pwd
import shutil
import sqlite3
import struct
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from ansible_collections.nemo.platform.plugins.module_utils import block_volume as volume
from ansible_collections.nemo.platform.plugins.module_utils.block_volume import Places, VolumeError
from ansible_collections.nemo.platform.plugins.module_utils.host_files import HostFileError
from ansible_collections.nemo.platform.plugins.modules.data_volume import DataVolume
from lab import loop_volume

ID = "vol-0123456789abcdef0"
OTHER = "vol-00000000000000bad"
SIZE = 64 * volume.MIB
OWNER = pwd.getpwuid(os.getuid()).pw_name
GROUP = grp.getgrgid(os.getgid()).gr_name
FSTAB = "# caf\udce9\r\nLABEL=root  /   ext4\tdefaults 0 1"


class Killed(BaseException):
    """The process ends here, without a word."""


class FakeModule:
    """What DataVolume uses of AnsibleModule."""

    def __init__(
        self, params: dict[str, Any], run: Callable[[Sequence[str]], tuple[int, str, str]], check: bool
    ) -> None:
        self.params, self._run, self.check_mode = params, run, check
        self.step: Callable[[Sequence[str]], None] = lambda _: None

    def run_command(self, argv: Sequence[str], pass_fds: Sequence[int] | None = None) -> tuple[int, str, str]:
        return self._run(argv)

    def get_bin_path(self, name: str) -> str | None:
        return f"/usr/sbin/{name}"

    def atomic_move(self, source: str, target: str) -> None:
        self.step(["atomic_move", source, target])
        Path(source).replace(target)


class Host:
    """A host with NVMe volumes: sparse files, whose file systems are what `made` says."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.places = Places(*(str(root / name) for name in ("dev", "sys", "proc", "run", "etc/fstab", "notes")))
        for name in ("dev/disk/by-id", "sys/block", "proc/self", "run/systemd/system", "etc", "srv"):
            (root / name).mkdir(parents=True)
        self.fstab = root / "etc/fstab"
        self.fstab.write_bytes(FSTAB.encode(errors="surrogateescape"))
        self.mountinfo = root / "proc/self/mountinfo"
        self.mountinfo.write_text("22 1 259:0 / / rw - ext4 /dev/nvme0n1p1 rw\n")
        self.path = root / "srv/models"
        self.made: dict[str, dict[str, Any]] = {}  # by device: kind, uuid, label, size
        self.calls: list[list[str]] = []
        self.answers: dict[str, tuple[int, str, str]] = {}
        self.kill_at = -1

    def attach(self, volume_id: str = ID, name: str = "nvme1n1", size: int = SIZE) -> Path:
        device = self.root / "dev" / name
        with device.open("ab") as file:
            file.truncate(size)
        folder = self.root / "sys/block" / name / "device"
        folder.mkdir(parents=True)
        (folder / "serial").write_text(volume_id.replace("-", "") + "\n")
        return device

    def number(self, device: str) -> str:
        return f"259:{Path(device).name.removeprefix('nvme').removesuffix('n1')}"

    def mount(self, device: Path, path: Path, options: str = "rw,noatime") -> None:
        kind = self.made[str(device)]["kind"]
        line = f"30 22 {self.number(str(device))} / {path} {options} - {kind} {device} {options}\n"
        self.mountinfo.write_text(self.mountinfo.read_text() + line)

    def reboot(self) -> None:
        """Mounts are gone, and what fstab knows is mounted again."""
        self.mountinfo.write_text(self.mountinfo.read_text().splitlines()[0] + "\n")
        for line in self.fstab.read_text(errors="surrogateescape").split("\n"):
            found = volume.entry(line)
            if found and found.source.startswith("UUID="):
                self.mount(Path(self.by("uuid", found.source)), Path(found.path))

    def by(self, what: str, token: str) -> str:
        value = token.partition("=")[2]
        return next((device for device, made in self.made.items() if made[what] == value), "")

    def run(self, argv: Sequence[str]) -> tuple[int, str, str]:
        self.step(argv)
        if argv[0] in self.answers:
            return self.answers[argv[0]]
        done: tuple[int, str, str] = getattr(self, f"do_{argv[0].partition('.')[0]}")(argv)
        return done

    def step(self, argv: Sequence[str]) -> None:
        """Something that the module does, and before or amid which it may be killed."""
        self.calls.append(list(argv))
        if len(self.calls) == self.kill_at:
            if argv[0] == "mkfs.xfs":  # half of what it does
                self.do_mkfs(argv, done=False)
            raise Killed

    def do_wipefs(self, argv: Sequence[str]) -> tuple[int, str, str]:
        made = self.made.get(argv[-1])
        entries = (
            [{"type": made["kind"], "offset": "0x0", "uuid": made["uuid"], "label": made["label"]}] if made else []
        )
        return 0, json.dumps({"signatures": entries}), ""

    def do_mkfs(self, argv: Sequence[str], done: bool = True) -> tuple[int, str, str]:
        device, kind = argv[-1], argv[0].removeprefix("mkfs.")
        uuid = argv[argv.index("-m") + 1].removeprefix("uuid=") if kind == "xfs" else argv[argv.index("-U") + 1]
        label = argv[argv.index("-L") + 1] if "-L" in argv else ""
        self.made[device] = {"kind": kind, "uuid": uuid, "label": label, "size": Path(device).stat().st_size}
        self.superblock(device, done)
        return 0, "", ""

    def superblock(self, device: str, done: bool = True) -> None:
        made = self.made[device]
        with Path(device).open("r+b") as file:
            if made["kind"] == "xfs":
                file.write(b"XFSB".ljust(volume.XFS_IN_PROGRESS, b"x") + bytes([not done]))
            else:  # in blocks of 1 KiB
                file.write(b"\0" * 1024 + struct.pack("<8I", 0, made["size"] // 1024, 0, 0, 0, 0, 0, 0))

    def do_findfs(self, argv: Sequence[str]) -> tuple[int, str, str]:
        device = self.by(argv[1].partition("=")[0].lower(), argv[1])
        return (0, f"{device}\n", "") if device else (1, "", "unable to resolve")

    def do_blkid(self, argv: Sequence[str]) -> tuple[int, str, str]:
        uuid = argv[argv.index("--match-token") + 1].removeprefix("UUID=")
        return 0, "\n".join(device for device, made in self.made.items() if made["uuid"] == uuid), ""

    def do_systemctl(self, _: Sequence[str]) -> tuple[int, str, str]:
        return 0, "", ""

    def do_mount(self, argv: Sequence[str]) -> tuple[int, str, str]:
        if "remount" in argv:
            return 0, "", ""
        entries = (volume.entry(line) for line in self.fstab.read_text(errors="surrogateescape").split("\n"))
        found = next(entry for entry in entries if entry and entry.path == argv[-1])
        self.mount(Path(self.by("uuid", found.source)), Path(found.path))
        return 0, "", ""

    def do_xfs_growfs(self, argv: Sequence[str]) -> tuple[int, str, str]:
        device, made = next((device, made) for device, made in self.made.items() if made["kind"] == "xfs")
        if "-d" in argv:
            made["size"] = Path(device).stat().st_size
        return 0, f"data     =                bsize=4096   blocks={made['size'] // 4096}, imaxpct=25\n", ""

    def do_resize2fs(self, argv: Sequence[str]) -> tuple[int, str, str]:
        self.made[argv[1]]["size"] = Path(argv[1]).stat().st_size
        self.superblock(argv[1])
        return 0, "", ""

    def __call__(self, check: bool = False, **inputs: Any) -> dict[str, Any]:
        """One run of the module."""
        module = FakeModule(parameters(self.path, **inputs), self.run, check)
        module.step = self.step
        return DataVolume(module, self.places).bring()

    @property
    def formatted(self) -> int:
        return sum(call[0].startswith("mkfs") for call in self.calls)


def parameters(place: Path, **inputs: Any) -> dict[str, Any]:
    return {
        "volume_id": ID, "device_name": "", "path": str(place), "filesystem": "xfs", "label": "",
        "options": ["defaults", "noatime"], "before": [], "device_timeout": 30, "owner": OWNER, "group": GROUP,
        "mode": "0755", "attach_timeout": 0, "lock_timeout": 0, "min_free_mb": 0,
    } | inputs  # fmt: skip


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    made = Host(tmp_path)
    monkeypatch.setattr(volume, "is_block", os.path.isfile)
    monkeypatch.setattr(volume, "number", made.number)
    return made


class TestTheWayThrough:
    def test_an_empty_volume_is_formatted_labelled_mounted(self, host: Host) -> None:
        device = str(host.attach())
        result = host(label="models", mode="0750")
        assert result["done"] == ["formatted", "fstab", "mounted", "folder"]
        assert host.made[device] == {"kind": "xfs", "uuid": result["uuid"], "label": "models", "size": SIZE}
        line = f"UUID={result['uuid']}\t{host.path}\txfs\tdefaults,noatime,x-systemd.device-timeout=30s,nofail\t0\t0\n"
        assert host.fstab.read_bytes() == f"{FSTAB}\n{line}".encode(errors="surrogateescape")
        assert host.path.stat().st_mode & 0o7777 == 0o750
        assert (result["device"], result["size_bytes"], result["changed"]) == (device, SIZE, True)
        assert not list(Path(host.places.notes).iterdir())

    def test_a_second_run_changes_nothing(self, host: Host) -> None:
        host.attach()
        first = host()
        calls = len(host.calls)
        second = host()
        assert (second["changed"], second["diff"], second["uuid"]) == (False, [], first["uuid"])
        assert [call[0] for call in host.calls[calls:]] == ["wipefs", "xfs_growfs"]

    def test_ext4(self, host: Host) -> None:
        device = str(host.attach())
        host(filesystem="ext4", label="sixteen-letters-")
        assert (host.made[device]["kind"], host.made[device]["label"]) == ("ext4", "sixteen-letters-")
        assert "\text4\t" in host.fstab.read_text(errors="replace")
        assert not host(filesystem="ext4", label="sixteen-letters-")["changed"]

    @pytest.mark.parametrize("kind", ["xfs", "ext4"])
    def test_a_file_system_that_is_there_is_used_as_it_is(self, host: Host, kind: str) -> None:
        device = str(host.attach())
        host.made[device] = {"kind": kind, "uuid": "abc", "label": "old", "size": SIZE}
        host.superblock(device)
        result = host(filesystem=kind, label="new")
        assert (result["uuid"], host.made[device]["label"], host.formatted) == ("abc", "old", 0)

    def test_what_systemd_is_told(self, host: Host) -> None:
        host.attach()
        host(before=["docker.service"], options=["nofail", "x-systemd.device-timeout=5s"])
        assert "\tnofail,x-systemd.device-timeout=5s,x-systemd.before=docker.service\t" in host.fstab.read_text(
            errors="replace"
        )
        assert ["systemctl", "daemon-reload"] in host.calls

    def test_other_options_take_hold_at_once(self, host: Host) -> None:
        host.attach()
        host()
        result = host(options=["noatime", "nosuid"])
        assert result["done"] == ["fstab"]
        assert ["mount", "--fstab", str(host.fstab), "-o", "remount", str(host.path)] in host.calls
        calls = len(host.calls)
        host(options=["noatime", "nosuid"], before=["docker.service"])  # for systemd alone
        assert "mount" not in [call[0] for call in host.calls[calls:]]

    @pytest.mark.parametrize("kind", ["xfs", "ext4"])
    def test_a_volume_that_has_grown(self, host: Host, kind: str) -> None:
        device = host.attach()
        host(filesystem=kind)
        os.truncate(device, 3 * SIZE)
        seen = host(check=True, filesystem=kind)
        result = host(filesystem=kind)
        assert (seen["done"], result["done"]) == (["grown"], ["grown"])
        assert "64 MiB" in result["diff"][0]["before"]
        assert "192 MiB" in result["diff"][0]["after"]
        assert not host(filesystem=kind)["changed"]

    def test_growth_that_did_nothing_is_said(self, host: Host) -> None:
        device = host.attach()
        host()
        os.truncate(device, 3 * SIZE)
        host.answers["xfs_growfs"] = (0, "data     =                bsize=4096   blocks=16384, imaxpct=25\n", "")
        with pytest.raises(VolumeError, match="as small as before"):
            host()

    def test_fstab_behind_a_link(self, host: Host) -> None:
        target = host.fstab.rename(host.fstab.with_name("fstab.real"))
        host.fstab.symlink_to(target)
        host.attach()
        host()
        assert host.fstab.is_symlink()
        assert "xfs" in target.read_text(errors="replace")


class TestCheckMode:
    def test_on_an_empty_volume(self, host: Host) -> None:
        host.attach()
        result = host(check=True, label="models")
        assert result["done"] == ["formatted", "fstab", "mounted"]
        assert (host.made, host.fstab.read_bytes(), host.path.exists()) == (
            {},
            FSTAB.encode(errors="surrogateescape"),
            False,
        )
        assert (result["diff"][0]["before"], result["diff"][0]["after"]) == ("empty\n", "xfs, label models\n")
        assert result["diff"][1]["after"].startswith(result["diff"][1]["before"])
        assert "UUID=<of" in result["diff"][1]["after"]

    def test_accounts_may_come_later(self, host: Host) -> None:
        host.attach()
        host(check=True, owner="nobody-yet")
        with pytest.raises(HostFileError, match="user 'nobody-yet' does not exist"):
            host(owner="nobody-yet")
        assert not host.made

    def test_on_a_finished_host(self, host: Host) -> None:
        host.attach()
        host()
        assert not host(check=True)["changed"]
        result = host(check=True, mode="0700")
        assert (result["done"], host.path.stat().st_mode & 0o777) == (["folder"], 0o755)
        assert result["diff"][0]["after"] == "mode: 0700\n"


class TestRefusals:
    @pytest.mark.parametrize(
        ("inputs", "words"),
        [
            ({"volume_id": "nvme1n1"}, r"volume_id 'nvme1n1' is no EBS volume's id"),
            ({"path": "/"}, r"path '/' is no place"),
            ({"path": "srv"}, r"path 'srv' is no place"),
            ({"path": "/srv/../etc"}, r"is no place"),
            ({"path": "/srv/a\nb"}, r"is no place"),
            ({"label": "thirteen-long"}, r"label 'thirteen-long' does not fit xfs: up to 12"),
            ({"label": "a b"}, r"label 'a b' does not fit"),
            ({"options": ["ro"]}, r"options hold 'ro'"),
            ({"options": ["x-systemd.automount"]}, r"options hold 'x-systemd.automount'"),
            ({"options": ["noatime,nodev"]}, r"options hold 'noatime,nodev'"),
            ({"options": ["defaults", ""]}, r"options hold ''"),
            ({"mode": "755"}, r"mode '755' must be a quoted octal"),
        ],
    )
    def test_inputs(self, host: Host, inputs: dict[str, Any], words: str) -> None:
        host.attach()
        with pytest.raises((VolumeError, HostFileError), match=words):
            host(**inputs)
        assert host.calls == []

    def test_a_wrong_id_names_those_that_are_there(self, host: Host) -> None:
        host.attach(OTHER)
        with pytest.raises(
            VolumeError, match=rf"{ID} is not attached to this host \(volumes that it shows: {OTHER}; waited 0 s\)"
        ):
            host()

    def test_a_volume_that_is_still_being_attached(self, host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
        waited: list[float] = []

        def sleep(seconds: float) -> None:
            waited.append(seconds)
            if len(waited) == 2:
                host.attach(size=0)  # there, and empty-handed
            if len(waited) == 4:
                os.truncate(host.root / "dev/nvme1n1", SIZE)

        monkeypatch.setattr(time, "sleep", sleep)
        assert host(attach_timeout=60)["changed"]
        assert len(waited) == 4

    def test_a_mount_point_with_files(self, host: Host) -> None:
        host.attach()
        host.path.mkdir()
        for name in ("a", "b", "c", "d"):
            (host.path / name).touch()
        with pytest.raises(VolumeError, match=r"holds files of the disk below it, .*: a, b, c and 1 more"):
            host()
        assert host.formatted == 0

    def test_a_mount_point_that_is_no_folder(self, host: Host) -> None:
        host.attach()
        host.path.touch()
        with pytest.raises(VolumeError, match="is no folder"):
            host()

    def test_a_mount_point_behind_a_link(self, host: Host) -> None:
        host.attach()
        host.path.symlink_to(host.root / "srv/real")
        with pytest.raises(VolumeError, match=r"leads by a link to .*srv/real: set it to that"):
            host()

    def test_a_mount_point_of_another_volume(self, host: Host) -> None:
        host.attach()
        other = host.attach(OTHER, "nvme2n1")
        host.made[str(other)] = {"kind": "xfs", "uuid": "x", "label": "", "size": SIZE}
        host.mount(other, host.path)
        with pytest.raises(VolumeError, match=r"is taken: .*nvme2n1 \(xfs\) is mounted there, and not .*nvme1n1"):
            host()
        assert host.formatted == 0

    def test_a_volume_that_is_mounted_elsewhere(self, host: Host) -> None:
        device = host.attach()
        host.made[str(device)] = {"kind": "xfs", "uuid": "x", "label": "", "size": SIZE}
        host.mount(device, Path("/mnt"))
        with pytest.raises(VolumeError, match=r"is mounted at /mnt already: unmount it \(umount /mnt\)"):
            host()

    def test_read_only(self, host: Host) -> None:
        device = host.attach()
        host.made[str(device)] = {"kind": "xfs", "uuid": "x", "label": "", "size": SIZE}
        host.mount(device, host.path, "ro,noatime")
        with pytest.raises(
            VolumeError, match=r"is mounted read-only: .*umount .*xfs_repair .*nvme1n1, and run this again"
        ):
            host()

    def test_a_file_system_that_shut_down(self, host: Host) -> None:
        device = host.attach()
        host.made[str(device)] = {"kind": "xfs", "uuid": "x", "label": "", "size": SIZE}
        host.mount(device, host.path)  # and the folder cannot be read
        with pytest.raises(
            VolumeError, match=r"cannot be read \(No such file or directory\): the file system has shut down"
        ):
            host()

    def test_a_device_that_takes_no_writes(self, host: Host) -> None:
        host.attach()
        folder = host.root / "sys/class/block/nvme1n1"
        folder.mkdir(parents=True)
        (folder / "ro").write_text("1\n")
        with pytest.raises(VolumeError, match="takes no writes"):
            host()
        assert host.formatted == 0

    def test_a_full_one_is_grown_first(self, host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
        device = host.attach()
        host()
        full = os.statvfs_result((4096, 4096, 16384, 10, 10, 100, 100, 100, 0, 255))
        monkeypatch.setattr(os, "statvfs", lambda _: full)
        with pytest.raises(
            VolumeError, match=r"is full: 0 MiB are free, 1 MiB are needed.*modify-volume --volume-id vol-0123"
        ):
            host(min_free_mb=1)
        assert host()["free_bytes"] == 40960  # nobody asked
        os.truncate(device, 2 * SIZE)
        monkeypatch.setattr(
            os,
            "statvfs",
            lambda _: (
                full
                if host.made[str(device)]["size"] == SIZE
                else os.statvfs_result((4096, 4096, 9**6, 9**5, 9**5, 9, 9, 9, 0, 255))
            ),
        )
        with pytest.raises(VolumeError, match="all inodes are used"):
            host(min_free_mb=1)
        assert host.made[str(device)]["size"] == 2 * SIZE

    def test_another_entry_of_fstab_for_the_place(self, host: Host) -> None:
        host.attach()
        other = host.attach(OTHER, "nvme2n1")
        host.made[str(other)] = {"kind": "xfs", "uuid": "77", "label": "", "size": SIZE}
        for line in (f"UUID=77 {host.path} xfs defaults 0 0\n", f"nas:/models {host.path} nfs defaults 0 0\n"):
            host.fstab.write_text(line)
            with pytest.raises(
                VolumeError,
                match=rf"another entry for {host.path}: (UUID=77 \(xfs\), which is .*nvme2n1|nas:/models \(nfs\))\.",
            ):
                host()
            assert host.fstab.read_text() == line

    def test_an_entry_of_a_volume_that_is_gone_makes_way(self, host: Host) -> None:
        host.attach()
        host.fstab.write_text(f"UUID=gone {host.path} xfs defaults 0 0\n")
        assert "fstab" in host()["done"]
        assert "gone" not in host.fstab.read_text()

    def test_a_copy_beside_its_original(self, host: Host) -> None:
        for name, known in (("nvme1n1", ID), ("nvme2n1", OTHER)):
            device = str(host.attach(known, name))
            host.made[device] = {"kind": "xfs", "uuid": "same", "label": "", "size": SIZE}
            host.superblock(device)
        with pytest.raises(VolumeError, match=r"nvme1n1 \(vol-.*\) and .*nvme2n1 have one UUID, same"):
            host()

    def test_a_mount_that_fails(self, host: Host) -> None:
        device = str(host.attach())
        host.made[device] = {"kind": "xfs", "uuid": "x", "label": "", "size": SIZE}
        host.superblock(device)
        host.answers["mount"] = (32, "", "mount: wrong fs type, bad superblock")
        with pytest.raises(VolumeError, match=r"could not be mounted at .*, and is left as it is: .*bad superblock"):
            host()
        assert host.formatted == 0

    def test_mkfs_is_missing(self, host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
        host.attach()
        monkeypatch.setattr(FakeModule, "get_bin_path", lambda *_: None)
        with pytest.raises(VolumeError, match=r"mkfs.xfs is missing: install the package xfsprogs"):
            host()
        assert not Path(host.places.notes).exists()


class TestTwoAtOnce:
    def test_a_second_run_waits_and_says_for_whom(self, host: Host) -> None:
        host.attach()
        folder = Path(host.places.run) / "nemo/data_volume"
        folder.mkdir(parents=True)
        with (folder / f"{ID}.lock").open("w") as lock:
            lock.write("process 1 since yesterday")
            lock.flush()
            fcntl.flock(lock, fcntl.LOCK_EX)
            with pytest.raises(
                VolumeError, match=rf"another run is at work on {ID}: process 1 since yesterday; waited 0 s"
            ):
                host()
        assert host()["changed"]

    def test_a_mkfs_that_outlives_its_run_keeps_the_lock(self, host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
        host.attach()
        children = []

        def mkfs(argv: Sequence[str], fds: Sequence[int]) -> None:
            children.append(subprocess.Popen(["sleep", "60"], pass_fds=fds))
            raise Killed

        original = FakeModule.run_command
        monkeypatch.setattr(
            FakeModule,
            "run_command",
            lambda self, argv, pass_fds=None: mkfs(argv, pass_fds) if argv[0] == "mkfs.xfs" else original(self, argv),
        )
        with pytest.raises(Killed):
            host()
        try:
            with pytest.raises(VolumeError, match="another run is at work"):
                host()
        finally:
            children[0].kill()
            children[0].wait()
        monkeypatch.setattr(FakeModule, "run_command", original)
        assert host()["changed"]


class TestKilled:
    @pytest.mark.parametrize("filesystem", ["xfs", "ext4"])
    def test_at_each_command_the_next_run_finishes(self, host: Host, filesystem: str) -> None:
        """And what was formatted to its end is never formatted again."""
        device = host.attach()
        kills = 0
        for number in range(1, 30):
            for note in Path(host.places.notes).glob("*"):
                note.unlink()
            device.write_bytes(b"")
            os.truncate(device, SIZE)
            host.made.clear()
            host.calls.clear()
            host.fstab.write_bytes(b"")
            host.reboot()
            host.kill_at = number
            with contextlib.suppress(Killed):
                host(filesystem=filesystem)
                break
            kills += 1
            host.kill_at = -1
            whole = (
                host.made.get(str(device), {}).get("uuid")
                if not (filesystem == "xfs" and volume.unfinished_xfs(str(device)))
                else None
            )
            host.reboot()
            result = host(filesystem=filesystem)
            assert (host.made[str(device)]["size"], whole in (None, result["uuid"])) == (SIZE, True)
            assert host.mountinfo.read_text().count(str(host.path)) == 1
            assert not host(filesystem=filesystem)["changed"]
        assert kills >= 7

    def test_after_mkfs_was_done_and_before_the_run_knew(self, host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
        """The note is still there; the file system is complete, and somebody may have put data on it since."""
        host.attach()
        monkeypatch.setattr(DataVolume, "forget", lambda _: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            host()
        monkeypatch.undo()
        monkeypatch.setattr(volume, "is_block", os.path.isfile)
        monkeypatch.setattr(volume, "number", host.number)
        assert list(Path(host.places.notes).iterdir())
        result = host()
        assert ("formatted" not in result["done"], host.formatted) == (True, 1)
        assert not list(Path(host.places.notes).iterdir())

    def test_an_unfinished_xfs_by_others_is_not_touched(self, host: Host) -> None:
        device = str(host.attach())
        host.made[device] = {"kind": "xfs", "uuid": "x", "label": "", "size": SIZE}
        host.superblock(device, done=False)
        with pytest.raises(VolumeError, match="whose making was cut off, and not by this module on this host"):
            host()

    @pytest.mark.parametrize("kind", ["LVM2_member", "ext4", "crypto_LUKS"])
    def test_a_note_is_no_leave_to_format_what_came_since(self, host: Host, kind: str) -> None:
        device = str(host.attach())
        host.kill_at = 3  # mkfs
        with pytest.raises(Killed):
            host()
        host.kill_at = -1
        assert list(Path(host.places.notes).iterdir())
        host.made[device] = {"kind": kind, "uuid": "theirs", "label": "", "size": SIZE}
        with pytest.raises(VolumeError, match=f"is not empty: {kind}"):
            host()
        host.made.clear()
        Path(device).write_bytes(b"raw data")
        os.truncate(device, SIZE)
        with pytest.raises(VolumeError, match=r"data of no known kind at byte 0 \(perhaps of a formatting"):
            host()
        assert host.formatted == 1

    @pytest.mark.parametrize("note", ["", "[]", "{}", '{"uuid": 1}'])
    def test_a_note_that_cannot_be_read_is_none(self, host: Host, note: str) -> None:
        device = str(host.attach())
        Path(host.places.notes).mkdir()
        (Path(host.places.notes) / f"{ID}.json").write_text(note)
        host.made[device] = {"kind": "xfs", "uuid": "x", "label": "", "size": SIZE}
        host.superblock(device, done=False)
        with pytest.raises(VolumeError, match="cut off"):
            host()


def sqlite(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(":memory:")) as database:
        database.execute("CREATE TABLE models (name TEXT)")
        bytes_at(0, database.serialize())(path)


def command(*argv: str) -> Callable[[Path], None]:
    """A program that makes a file system or the like on the path that comes last."""

    def make(path: Path) -> None:
        program = shutil.which(argv[0], path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
        if not program:
            pytest.skip(f"this machine has no {argv[0]}")
        feed = b"label: %b\n,8M\n" % argv[1].encode() if argv[0] == "sfdisk" else b"secret"
        words = ["--quiet"] if argv[0] == "sfdisk" else list(argv[1:])
        subprocess.run([program, *words, str(path)], input=feed, check=True, capture_output=True, timeout=60)

    return make


def bytes_at(offset: int, data: bytes) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        with path.open("r+b") as file:
            file.seek(offset, os.SEEK_END if offset < 0 else os.SEEK_SET)
            file.write(data)

    return make


# What may be on a disk, how it comes there, and what the refusal calls it.
CONTENTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "ext4": (command("mkfs.ext4", "-q", "-F"), "ext4 at 0x438"),
    "ext2": (command("mkfs.ext2", "-q", "-F"), "ext2 at 0x438"),
    "xfs": (command("mkfs.xfs", "-q", "-f"), "xfs at 0x0"),
    "swap": (command("mkswap"), "swap at 0xff6"),
    "MBR": (command("sfdisk", "dos"), "dos at 0x1fe"),
    "GPT": (command("sfdisk", "gpt"), "gpt at 0x"),
    "LUKS": (
        command("cryptsetup", "luksFormat", "-q", "--pbkdf=pbkdf2", "--pbkdf-force-iterations=1000", "--key-file=-"),
        "crypto_LUKS at 0x0",
    ),
    "LVM": (command("pvcreate", "--quiet", "--yes"), "LVM2_member at 0x218"),
    "btrfs": (bytes_at(0x10040, b"_BHRfS_M"), "(btrfs at 0x10040|data of no known kind at byte 65600)"),
    "SQLite": (sqlite, "data of no known kind at byte 0"),
    # The system tablespace's first page: checksum, page 0, FIL_PAGE_TYPE_FSP_HDR at 24.
    "InnoDB": (
        bytes_at(0, struct.pack(">II", 0x8A4A9E3B, 0).ljust(24, b"\xff") + b"\0\x08"),
        "data of no known kind at byte 0",
    ),
    # pg_control of version 16: system identifier, PG_CONTROL_VERSION, CATALOG_VERSION_NO.
    "PostgreSQL": (
        bytes_at(0, struct.pack("<QII", 7301234567890123456, 1300, 202307071)),
        "data of no known kind at byte 0",
    ),
    "tar": (bytes_at(257, b"ustar\0" + b"00"), "data of no known kind at byte 257"),
    "the middle alone": (bytes_at(20 * volume.MIB + 5, b"\1"), f"data of no known kind at byte {20 * volume.MIB + 5}"),
    "the tail alone": (bytes_at(-1, b"\1"), "data of no known kind at byte "),
}


class Machine:
    """The real programs, except that nothing may be formatted here."""

    def __init__(self) -> None:
        self.forbidden: tuple[str, ...] = ("mkfs", "mount")

    def __call__(self, argv: Sequence[str]) -> tuple[int, str, str]:
        assert not argv[0].startswith(self.forbidden), argv
        path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
        done = subprocess.run(argv, capture_output=True, text=True, env={"PATH": path, "LC_ALL": "C"}, check=False)
        return done.returncode, done.stdout, done.stderr


needs_wipefs = pytest.mark.skipif(
    not shutil.which("wipefs", path="/usr/sbin:/sbin"), reason="this machine has no wipefs"
)


def digest(path: Path) -> str:
    return subprocess.run(["sha256sum", path], capture_output=True, check=True, text=True).stdout.split()[0]


@needs_wipefs
class TestDisksThatHoldSomething:
    """With the real wipefs, on plain files."""

    @pytest.mark.parametrize("contents", [name for name in CONTENTS if name != "LVM"])
    @pytest.mark.parametrize("filesystem", ["xfs", "ext4"])
    def test_none_is_formatted(self, host: Host, contents: str, filesystem: str) -> None:
        if contents == filesystem:
            pytest.skip("is adopted")
        make, words = CONTENTS[contents]
        device = host.attach(size=512 * volume.MIB if contents == "xfs" else SIZE)
        make(device)
        before = digest(device)
        machine = Machine()
        module = FakeModule(parameters(host.path, filesystem=filesystem), machine, check=False)
        with pytest.raises(VolumeError, match=rf"nvme1n1 \({ID}\) is not empty: .*{words}.*never formatted"):
            DataVolume(module, host.places).bring()
        assert digest(device) == before

    def test_a_file_system_without_uuid_is_not_mounted(self, host: Host) -> None:
        device = host.attach()
        CONTENTS["ext4"][0](device)
        command("tune2fs", "-U", "clear")(device)
        with pytest.raises(VolumeError, match="has no UUID to mount it by"):
            DataVolume(
                FakeModule(parameters(host.path, filesystem="ext4"), Machine(), check=False), host.places
            ).bring()

    def test_the_other_file_system_is_named(self, host: Host) -> None:
        CONTENTS["ext4"][0](host.attach())
        with pytest.raises(VolumeError, match=r"To use it as it is, set filesystem to ext4\."):
            DataVolume(FakeModule(parameters(host.path), Machine(), check=False), host.places).bring()


class Loops:
    """Real block devices of this test alone. Each one goes with its descriptor, thus at the latest with this process."""

    def __init__(self, root: Path, places: Places) -> None:
        self.root, self.places = root, places
        self.held: list[int] = []

    def attach(self, volume_id: str = ID, mib: int = 512) -> tuple[Path, Path]:
        """The image and the device."""
        image = self.root / f"{volume_id}.img"
        with image.open("ab") as file:
            file.truncate(mib * volume.MIB)
        try:
            number, descriptor = loop_volume.attach(image)
        except OSError as error:
            pytest.skip(f"no loop device is to be had here: {error}")
        self.held.append(descriptor)
        device = Path(f"/dev/loop{number}")
        link = Path(self.places.dev) / f"disk/by-id/nvme-Amazon_Elastic_Block_Store_{volume_id.replace('-', '')}"
        link.symlink_to(device)
        return image, device

    def grow(self, image: Path, mib: int) -> None:
        os.truncate(image, mib * volume.MIB)
        fcntl.ioctl(self.held[-1], loop_volume.LOOP_SET_CAPACITY)

    def end(self) -> None:
        for line in Path("/proc/self/mounts").read_text().splitlines():
            if line.split()[1].startswith(str(self.root)):
                subprocess.run(["umount", line.split()[1]], check=False)
        for descriptor in self.held:
            os.close(descriptor)


@pytest.fixture
def loops(tmp_path: Path) -> Iterator[Loops]:
    if os.geteuid() != 0:
        pytest.skip("loop devices are root's")
    for name in ("dev/disk/by-id", "etc", "srv"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "etc/fstab").write_text("# others\n")
    places = Places(
        dev=str(tmp_path / "dev"),
        run=str(tmp_path / "run"),
        fstab=str(tmp_path / "etc/fstab"),
        notes=str(tmp_path / "notes"),
    )
    made = Loops(tmp_path, places)
    try:
        yield made
    finally:
        made.end()


def bring(loops: Loops, check: bool = False, **inputs: Any) -> dict[str, Any]:
    """A run with the machine's own programs."""
    machine = Machine()
    machine.forbidden = ()
    module = FakeModule(parameters(loops.root / "srv/models", **inputs), machine, check)
    return DataVolume(module, loops.places).bring()


def may_resize_ext4() -> bool:
    """The kernel grows a mounted ext4 for CAP_SYS_RESOURCE alone, which a container may lack; that bit is number 24."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("CapEff:"))
    return bool(int(line.split()[1], 16) >> 24 & 1)


def needs_file_system(kind: str) -> None:
    if kind not in Path("/proc/filesystems").read_text():
        pytest.skip(f"this kernel has no {kind}")
    if not shutil.which(f"mkfs.{kind}", path="/usr/sbin:/sbin"):
        pytest.skip(f"this machine has no mkfs.{kind}")


@needs_wipefs
class TestLoopDevices:
    @pytest.mark.parametrize("kind", ["xfs", "ext4"])
    def test_from_empty_to_grown(self, loops: Loops, kind: str) -> None:
        needs_file_system(kind)
        image, device = loops.attach()
        place = loops.root / "srv/models"
        seen = bring(loops, check=True, filesystem=kind)
        assert (seen["done"], volume.first_data(str(image))) == (["formatted", "fstab", "mounted"], None)
        first = bring(loops, filesystem=kind, label="models", mode="0750")
        assert first["done"] == ["formatted", "fstab", "mounted", "folder"]
        (place / "data").write_text("kept")
        assert not bring(loops, filesystem=kind, mode="0750")["changed"]
        if kind == "xfs" or may_resize_ext4():
            loops.grow(image, 700)
            grown = bring(loops, filesystem=kind, mode="0750")
            assert (grown["done"], (place / "data").read_text()) == (["grown"], "kept")
            assert grown["free_bytes"] > first["free_bytes"] + 150 * volume.MIB
            assert not bring(loops, filesystem=kind, mode="0750")["changed"]

        subprocess.run(["umount", place], check=True)
        assert bring(loops, check=True, filesystem=kind)["done"] == ["mounted"]
        again = bring(loops, filesystem=kind, mode="0750")
        assert (again["done"], again["uuid"], (place / "data").read_text()) == (["mounted"], first["uuid"], "kept")
        label = subprocess.run(
            ["blkid", "-p", "-o", "value", "-s", "LABEL", device], capture_output=True, text=True, check=True
        )
        assert label.stdout.strip() == "models"

        subprocess.run(["mount", "-o", "remount,ro", place], check=True)
        with pytest.raises(VolumeError, match="is mounted read-only"):
            bring(loops, filesystem=kind)
        subprocess.run(["mount", "-o", "remount,rw", place], check=True)
        with (place / "much").open("wb") as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4 * volume.MIB))
        with pytest.raises(VolumeError, match=r"is full: \d MiB are free, 100 MiB are needed"):
            bring(loops, filesystem=kind, min_free_mb=100, mode="0750")
        assert (place / "data").read_text() == "kept"

    @pytest.mark.parametrize("contents", CONTENTS)
    def test_none_that_holds_something_is_formatted(self, loops: Loops, contents: str) -> None:
        image, device = loops.attach(mib=512 if contents == "xfs" else 64)
        try:
            CONTENTS[contents][0](device)
        except subprocess.CalledProcessError as error:  # LVM may want a device mapper
            pytest.skip(f"{contents} cannot be made here: {error.stderr.decode().strip().splitlines()[-1]}")
        os.sync()
        before = digest(image)
        filesystem = "ext4" if contents == "xfs" else "xfs"
        with pytest.raises(VolumeError, match=rf"is not empty: .*{CONTENTS[contents][1]}"):
            bring(loops, filesystem=filesystem)
        os.sync()
        assert digest(image) == before

    @pytest.mark.skipif(
        not shutil.which("strace"), reason="this machine has no strace, which kills a mkfs at one of its writes"
    )
    @pytest.mark.parametrize("kind", ["xfs", "ext4"])
    @pytest.mark.parametrize("write", [1, 3, 5, 20, 50])
    def test_mkfs_that_is_killed(self, loops: Loops, kind: str, write: int) -> None:
        needs_file_system(kind)
        _, device = loops.attach()
        killed = Machine()
        killed.forbidden = ()

        def run(argv: Sequence[str]) -> tuple[int, str, str]:
            if argv[0].startswith("mkfs"):
                killed(["strace", "-f", "-o", "/dev/null", "-e", f"inject=pwrite64:signal=KILL:when={write}", *argv])
                raise Killed
            return killed(argv)

        with pytest.raises(Killed):
            DataVolume(
                FakeModule(parameters(loops.root / "srv/models", filesystem=kind), run, check=False), loops.places
            ).bring()
        if kind == "ext4" and volume.first_data(str(device)) is not None:
            with pytest.raises(
                VolumeError, match=r"data of no known kind .*perhaps of a formatting that this module began"
            ):
                bring(loops, filesystem=kind)
            return
        result = bring(loops, filesystem=kind)
        assert result["done"][:3] == ["formatted", "fstab", "mounted"]
        assert not bring(loops, filesystem=kind)["changed"]

    def test_two_runs_at_once_format_once(self, loops: Loops) -> None:
        needs_file_system("xfs")
        loops.attach()
        context = multiprocessing.get_context("fork")
        queue = context.Queue()
        runs = [context.Process(target=lambda: queue.put(bring(loops, lock_timeout=60)["done"])) for _ in range(3)]
        for run in runs:
            run.start()
        done = sorted((queue.get(timeout=120) for _ in runs), key=len)
        for run in runs:
            run.join()
        assert done == [[], [], ["formatted", "fstab", "mounted"]]
        assert (loops.root / "etc/fstab").read_text().count("xfs") == 1

    def test_a_copy_of_a_snapshot_is_told_from_its_original(self, loops: Loops) -> None:
        needs_file_system("xfs")
        image, _ = loops.attach()
        bring(loops)
        subprocess.run(["umount", loops.root / "srv/models"], check=True)
        shutil.copy(image, loops.root / f"{OTHER}.img")
        loops.attach(OTHER)
        with pytest.raises(VolumeError, match="have one UUID"):
            bring(loops)
