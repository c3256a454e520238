"""The volumes of the lab's hosts: their files on the host, their ids in the account, and the loop device that ends by itself."""

from __future__ import annotations

import fcntl
import io
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from lab import hosts, loop_volume, volume
from lab.aws import seed
from lab.console import LabError
from lab.settings import BASTION, HOSTS, Host

VLLM = next(host for host in HOSTS if host.role == "vllm")
ID = "vol-0123456789abcdef0"


class FakeEngine:
    """Notes what is run where."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Sequence[str]]] = []

    def exec(self, container: str, argv: Sequence[str]) -> str:
        self.calls.append((container, argv))
        return f"{ID} 9663676416"


class Account:
    """What the account says of volumes."""

    def __init__(self, *ids: str) -> None:
        self.ids = ids

    def describe_volumes(self, Filters: list[Any]) -> dict[str, Any]:
        assert {"Name": "tag:Name", "Values": ["vllm-data"]} in Filters
        return {"Volumes": [{"VolumeId": name} for name in self.ids]}


def names(host: Host, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    key = tmp_path / "id"
    key.with_suffix(".pub").write_text("ssh-ed25519 x")
    monkeypatch.setattr(hosts, "KEY", key)
    monkeypatch.setattr(hosts, "_listeners", lambda _: ([], []))
    with tarfile.open(fileobj=io.BytesIO(hosts.payload(host, b"", ""))) as tar:
        return tar.getnames()


@pytest.mark.parametrize(
    ("host", "has"), [(VLLM, True), (BASTION, False), (Host(f"{hosts.SCENARIO}x", "10.0.2.101", "ai"), True)]
)
def test_who_may_have_volumes(host: Host, has: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = names(host, monkeypatch, tmp_path)
    assert ("usr/local/lib/nemo-lab/loop_volume.py" in found) is has
    assert ("etc/systemd/system/nemo-lab-volume@.service" in found) is has


def test_the_id_is_what_the_account_says(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine()
    monkeypatch.setattr(seed, "client", lambda _: Account(ID))
    volume.attach(engine)  # type: ignore[arg-type]
    assert engine.calls == [("nemo-lab-vllm", ["sh", "-c", volume.ATTACH, "attach", ID])]


@pytest.mark.parametrize("ids", [(), (ID, "vol-2")])
def test_an_account_that_does_not_know_is_an_error(ids: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seed, "client", lambda _: Account(*ids))
    with pytest.raises(LabError, match=f"the account has {len(ids)} volumes called vllm-data"):
        volume.attach(FakeEngine())  # type: ignore[arg-type]


def script(text: str, folder: Path, *arguments: str) -> list[str]:
    """What a script asks of systemd, with a folder of one's own."""
    log = folder / "systemctl.log"
    program = folder / "bin/systemctl"
    program.parent.mkdir(exist_ok=True)
    program.write_text(f'#!/bin/sh\necho "$*" >>{log}\n')
    program.chmod(0o755)
    log.write_text("")
    subprocess.run(
        ["sh", "-c", text.replace(volume.IMAGES, str(folder / "volumes")), "x", *arguments],
        env={"PATH": f"{program.parent}:{os.environ['PATH']}"}, check=True,
    )  # fmt: skip
    return log.read_text().splitlines()


def test_a_volume_keeps_its_contents_under_a_new_id(tmp_path: Path) -> None:
    assert script(volume.ATTACH, tmp_path, "vol-1") == ["enable --quiet --now nemo-lab-volume@vol-1.service"]
    (tmp_path / "volumes/vol-1.img").write_text("data")
    assert script(volume.ATTACH, tmp_path, "vol-1") == ["enable --quiet --now nemo-lab-volume@vol-1.service"]
    assert script(volume.ATTACH, tmp_path, "vol-2") == [
        "disable --quiet nemo-lab-volume@vol-1.service",
        "enable --quiet nemo-lab-volume@vol-2.service",
    ]
    assert [path.name for path in (tmp_path / "volumes").iterdir()] == ["vol-2.img"]
    assert (tmp_path / "volumes/vol-2.img").read_text() == "data"


def test_grow(tmp_path: Path) -> None:
    (tmp_path / "volumes").mkdir()
    image = tmp_path / "volumes/vol-1.img"
    image.touch()
    assert script(volume.GROW, tmp_path, "3") == ["reload nemo-lab-volume@vol-1.service"]
    assert image.stat().st_size == 3 << 30


@pytest.fixture
def image(tmp_path: Path) -> Path:
    if os.geteuid() != 0:
        pytest.skip("loop devices are root's")
    path = tmp_path / "x.img"
    with path.open("wb") as file:
        file.truncate(1 << 20)
    return path


def attach(image: Path) -> tuple[int, int]:
    try:
        return loop_volume.attach(image)
    except OSError as error:
        pytest.skip(f"no loop device is to be had here: {error}")


def gone(number: int) -> bool:
    """Whether a loop device has let go of its file, which the kernel may do a moment later."""
    deadline = time.monotonic() + 10
    while Path(f"/sys/block/loop{number}/loop").exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def test_a_loop_device_ends_with_its_descriptor(image: Path) -> None:
    number, held = attach(image)
    same, again = loop_volume.attach(image)
    os.close(again)
    assert same == number, "one file, one device"
    image.write_bytes(b"hello".ljust(1 << 20, b"\0"))
    assert Path(f"/dev/loop{number}").read_bytes()[:5] == b"hello"
    os.truncate(image, 2 << 20)
    fcntl.ioctl(held, loop_volume.LOOP_SET_CAPACITY)
    assert int(Path(f"/sys/block/loop{number}/size").read_text()) * 512 == 2 << 20
    os.close(held)
    assert gone(number)


def test_a_loop_device_ends_with_its_process(image: Path) -> None:
    number, held = attach(image)
    os.close(held)
    assert gone(number)
    program = f"import pathlib, time; from lab import loop_volume; print(loop_volume.attach(pathlib.Path({str(image)!r}))[0], flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        number = int(holder.stdout.readline())
        assert not Path(f"/sys/block/loop{number}/loop/backing_file").read_text().endswith("(deleted)\n")
        holder.send_signal(signal.SIGKILL)
    assert gone(number)
