# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a host shows of its volumes, and the edit of fstab, against folders that stand for /dev, /sys and /proc."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ansible_collections.nemo.platform.plugins.module_utils import block_volume as volume
from ansible_collections.nemo.platform.plugins.module_utils.block_volume import Entry, Places, VolumeError

ID = "vol-0123456789abcdef0"
MIB = volume.MIB


class Host:
    """A host's folders; devices are plain files."""

    def __init__(self, root: Path) -> None:
        self.dev, self.sys, self.proc = (root / name for name in ("dev", "sys", "proc"))
        for folder in (self.dev / "disk/by-id", self.sys / "block", self.sys / "class/block", self.proc / "self"):
            folder.mkdir(parents=True)
        self.places = Places(str(self.dev), str(self.sys), str(self.proc))

    def device(self, name: str, serial: str = "") -> str:
        (self.dev / name).touch()
        if serial:
            folder = self.sys / "block" / name / "device"
            folder.mkdir(parents=True)
            (folder / "serial").write_text(f"{serial}   \n")  # padded, as NVMe does
        return str(self.dev / name)

    def link(self, serial: str, name: str) -> None:
        (self.dev / "disk/by-id" / f"nvme-Amazon_Elastic_Block_Store_{serial}").symlink_to(f"../../{name}")


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    monkeypatch.setattr(volume, "is_block", os.path.isfile)
    return Host(tmp_path)


class TestFind:
    def test_by_the_name_that_udev_gives(self, host: Host) -> None:
        device = host.device("nvme1n1")
        host.link("vol0123456789abcdef0", "nvme1n1")
        assert volume.find(ID, "", host.places) == device

    def test_by_the_serial_number_of_the_controller(self, host: Host) -> None:
        host.device("nvme0n1", "vol0000000000000000a")
        device = host.device("nvme2n1", "vol0123456789abcdef0")
        assert volume.find(ID, "", host.places) == device

    def test_a_link_that_was_left_behind_leads_nowhere(self, host: Host) -> None:
        host.device("nvme1n1", "vol0000000000000000a")
        host.link("vol0123456789abcdef0", "nvme1n1")
        assert volume.find(ID, "", host.places) == ""
        device = host.device("nvme2n1", "vol0123456789abcdef0")
        assert volume.find(ID, "", host.places) == device

    @pytest.mark.parametrize(("name", "shown"), [("/dev/sdf", "xvdf"), ("/dev/xvdf", "xvdf"), ("/dev/sdf", "sdf")])
    def test_by_the_name_of_the_attachment_on_xen(self, host: Host, name: str, shown: str) -> None:
        device = host.device(shown)
        assert volume.find(ID, name, host.places) == device
        assert volume.find(ID, "", host.places) == ""

    def test_a_name_that_leads_to_another_nvme_volume_is_not_xen(self, host: Host) -> None:
        host.device("nvme1n1", "vol0000000000000000a")
        (host.dev / "sdf").symlink_to("nvme1n1")
        assert volume.find(ID, "/dev/sdf", host.places) == ""

    def test_nothing_is_there(self, host: Host) -> None:
        assert volume.find(ID, "/dev/sdf", host.places) == ""
        assert volume.find(ID, "", Places("/nowhere", "/nowhere", "/nowhere")) == ""

    def test_what_the_host_shows(self, host: Host) -> None:
        host.device("nvme0n1", "vol0000000000000000a")
        host.device("nvme1n1", "AWS7D38CE5EB5A55")  # an instance store
        host.device("loop0")
        host.link("vol0000000000000000b", "loop0")
        host.link("vol0000000000000000c", "gone")
        assert volume.attached_ids(host.places) == ["vol-0000000000000000a", "vol-0000000000000000b"]


@pytest.mark.parametrize(
    ("text", "good"),
    [
        (ID, True),
        ("vol-0123abcd", True),
        ("vol-0123456789abcdef", False),
        ("vol0123456789abcdef0", False),
        (f"{ID}\n", False),
        ("", False),
        ("snap-0123456789abcdef0", False),
    ],
)
def test_ids(text: str, good: bool) -> None:
    assert volume.valid_id(text) is good


class TestUses:
    def test_partitions_holders_mounts_swap(self, host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
        device = host.device("nvme1n1")
        monkeypatch.setattr(volume, "number", lambda _: "259:1")
        assert volume.uses(device, host.places) == []
        folder = host.sys / "class/block/nvme1n1"
        (folder / "nvme1n1p1").mkdir(parents=True)
        (folder / "nvme1n1p1/partition").touch()
        (folder / "queue").mkdir()
        (folder / "holders/dm-0").mkdir(parents=True)
        (host.proc / "self/mountinfo").write_text(
            "22 1 259:1 / /mnt/with\\040space rw,noatime shared:1 - xfs /dev/nvme1n1 rw,attr2\n"
            "23 1 259:2 / /other rw - ext4 /dev/nvme2n1 rw\n"
        )
        (host.proc / "swaps").write_text(f"Filename Type Size Used Priority\n{device} partition 1 0 -2\n")
        assert volume.uses(device, host.places) == [
            "dm-0 is built on it",
            "partition nvme1n1p1",
            "mounted at /mnt/with space",
            "in use as swap",
        ]

    def test_read_only_of_the_superblock_counts(self, host: Host) -> None:
        (host.proc / "self/mountinfo").write_text(
            "22 1 259:1 / /a rw,noatime - ext4 /dev/nvme1n1 ro,errors=remount-ro\n"
        )
        assert "ro" in volume.mounts(host.places)[0].options

    def test_device_that_takes_no_writes(self, host: Host) -> None:
        device = host.device("nvme1n1")
        assert not volume.read_only(device, host.places)
        (host.sys / "class/block/nvme1n1").mkdir()
        (host.sys / "class/block/nvme1n1/ro").write_text("1\n")
        assert volume.read_only(device, host.places)


class TestFirstData:
    SIZE = 2 * volume.WHOLE_BYTES
    STEP = (SIZE - 2 * volume.EDGE_BYTES) // volume.SAMPLES

    def sparse(self, path: Path, size: int, *written: int) -> str:
        with path.open("wb") as file:
            file.truncate(size)
            for offset in written:
                file.seek(offset)
                file.write(b"\1")
        return str(path)

    @pytest.mark.parametrize("size", [1, 512, 64 * MIB + 17, SIZE])
    def test_zeros(self, tmp_path: Path, size: int) -> None:
        assert volume.first_data(self.sparse(tmp_path / "x", size)) is None

    @pytest.mark.parametrize("offset", [0, 1, 4095, 3 * MIB + 7, 32 * MIB, 64 * MIB - 1])
    def test_a_lonely_byte_of_a_small_volume(self, tmp_path: Path, offset: int) -> None:
        assert volume.first_data(self.sparse(tmp_path / "x", 64 * MIB, offset)) == offset

    @pytest.mark.parametrize("offset", [0, volume.EDGE_BYTES - 1, SIZE - volume.EDGE_BYTES, SIZE - 1])
    def test_a_lonely_byte_at_the_ends_of_a_large_one(self, tmp_path: Path, offset: int) -> None:
        assert volume.first_data(self.sparse(tmp_path / "x", self.SIZE, offset)) == offset

    def test_between_the_ends_nothing_longer_than_a_part_is_missed(self) -> None:
        last = volume.EDGE_BYTES
        for start, length in sorted(volume.looked_at(200 * 1024 * MIB)):
            assert start - last <= 200 * 1024 * MIB / volume.SAMPLES
            last = start + length
        assert last == 200 * 1024 * MIB

    def test_pieces_stay_within(self) -> None:
        for size in (volume.WHOLE_BYTES, volume.WHOLE_BYTES + 1, 3 * volume.WHOLE_BYTES + 511):
            assert all(start >= 0 and start + length <= size for start, length in volume.looked_at(size))

    def test_in_the_middle_of_a_large_one(self, tmp_path: Path) -> None:
        offset = volume.EDGE_BYTES + 777 * self.STEP + 5
        assert volume.first_data(self.sparse(tmp_path / "x", self.SIZE, offset)) == offset

    def test_what_cannot_be_read_is_not_empty(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = self.sparse(tmp_path / "x", MIB)

        def broken(*_: int) -> bytes:
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(os, "pread", broken)
        with pytest.raises(VolumeError, match=r"cannot be read: Input/output error"):
            volume.first_data(path)
        monkeypatch.setattr(os, "pread", lambda *_: b"")
        with pytest.raises(VolumeError, match="not read to its end"):
            volume.first_data(path)


class TestSignatures:
    def test_wipefs_that_fails_is_no_empty_volume(self) -> None:
        with pytest.raises(VolumeError, match="could not be examined: wipefs: probing failed"):
            volume.signatures("/dev/x", lambda _: (1, "", "wipefs: probing failed"))

    def test_none(self) -> None:
        assert volume.signatures("/dev/x", lambda _: (0, "", "")) == []


def test_sizes() -> None:
    geometry = "meta-data=/dev/x isize=512\n         =       sectsz=512\ndata     =                       bsize=4096   blocks=262144, imaxpct=25\nlog      =internal bsize=4096 blocks=16384\n"
    assert volume.xfs_size(geometry) == 1024 * MIB
    with pytest.raises(VolumeError, match="shows no size"):
        volume.xfs_size("nothing")


WANTED = Entry("UUID=1234", "/srv/models", "xfs", "defaults,nofail")
LINE = "UUID=1234\t/srv/models\txfs\tdefaults,nofail\t0\t0"
# Bytes that must come out as they went in: tabs, carriage return, no UTF-8, a form feed, no line end.
OTHERS = "# caf\udce9\nLABEL=root  /   ext4\terrors=remount-ro 0 1\r\n\n\t# /srv/models\n/x\x0cy none swap sw 0 0"


class TestFstab:
    @pytest.mark.parametrize(
        ("before", "after"),
        [
            ("", f"{LINE}\n"),
            ("a /a x y\n", f"a /a x y\n{LINE}\n"),
            ("a /a x y", f"a /a x y\n{LINE}\n"),
            (OTHERS, f"{OTHERS}\n{LINE}\n"),
            (f"{OTHERS}\n\n\n", f"{OTHERS}\n\n\n{LINE}\n"),
        ],
    )
    def test_is_added_at_the_end(self, before: str, after: str) -> None:
        assert volume.with_entry(before, WANTED) == (after, [])

    @pytest.mark.parametrize(
        "line",
        [
            LINE,
            "UUID=1234 /srv/models  xfs defaults,nofail",
            f"{LINE}\r",
            "UUID=1234 /srv/models/ xfs defaults,nofail 0 2",
        ],
    )
    def test_an_entry_that_says_the_same_stays(self, line: str) -> None:
        before = f"a /a x y\n{line}\n{OTHERS}"
        after, replaced = volume.with_entry(before, WANTED)
        if "models/ " in line:  # written differently is written anew
            assert after == f"a /a x y\n{LINE}\n{OTHERS}"
        else:
            assert (after, replaced) == (before, [])

    @pytest.mark.parametrize(
        "line",
        [
            "UUID=99 /srv/models xfs defaults 0 0",
            "/dev/xvdf\t/srv/models/ ext4",
            "UUID=1234 /old xfs defaults 0 0",
            "UUID=1234 /srv/models xfs ro",
        ],
    )
    def test_is_replaced_in_its_place(self, line: str) -> None:
        after, replaced = volume.with_entry(f"a /a x y\n{line}\n{OTHERS}", WANTED)
        assert after == f"a /a x y\n{LINE}\n{OTHERS}"
        assert replaced == [volume.entry(line)]

    def test_one_remains_of_many(self) -> None:
        before = f"UUID=1 /srv/models x y\n{OTHERS}\n{LINE}\n{LINE}\nUUID=1234 /b x y\n"
        after, replaced = volume.with_entry(before, WANTED)
        assert after == f"{OTHERS}\n{LINE}\n"
        assert [entry.path for entry in replaced] == ["/srv/models", "/srv/models", "/b"]

    def test_names_with_spaces(self) -> None:
        wanted = Entry("UUID=1", "/srv/a b#c", "ext4", "defaults")
        text = volume.with_entry("", wanted)[0]
        assert text == "UUID=1\t/srv/a\\040b\\043c\text4\tdefaults\t0\t2\n"
        assert volume.with_entry(text, wanted) == (text, [])

    def test_a_second_time_changes_nothing(self) -> None:
        once = volume.with_entry(OTHERS, WANTED)[0]
        assert volume.with_entry(once, WANTED) == (once, [])
