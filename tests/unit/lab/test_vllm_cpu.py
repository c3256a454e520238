"""vLLM built for CPUs as an image: what goes into its layers, and what is said where it cannot be made."""

from __future__ import annotations

import hashlib
import io
import pathlib
import re
import subprocess
import sys
import tarfile
from typing import Any

import pytest
import yaml

from lab.aws import payload
from lab.console import LabError
from lab.vllm import cpu


@pytest.fixture
def package(tmp_path: pathlib.Path) -> pathlib.Path:
    """A Debian package with the library under its full name and a link to it."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:xz") as archive:
        library = tarfile.TarInfo("./usr/lib/x86_64-linux-gnu/libnuma.so.1.0.0")
        library.size = 4
        archive.addfile(library, io.BytesIO(b"numa"))
        link = tarfile.TarInfo("./usr/lib/x86_64-linux-gnu/libnuma.so.1")
        link.type, link.linkname = tarfile.SYMTYPE, "libnuma.so.1.0.0"
        archive.addfile(link)
    content = data.getvalue()
    header = f"{'data.tar.xz':<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode()
    path = tmp_path / "libnuma1_2_amd64.deb"
    path.write_bytes(b"!<arch>\n" + header + content + b"\n" * (len(content) % 2))
    return path


def test_what_is_no_python_package(package: pathlib.Path) -> None:
    with tarfile.open(fileobj=io.BytesIO(cpu._program(package))) as archive:
        files = {info.name: archive.extractfile(info).read() for info in archive if info.isfile()}  # type: ignore[union-attr]
        assert archive.getmember("usr/bin/vllm").mode == 0o755
    assert files["usr/lib/x86_64-linux-gnu/libnuma.so.1"] == b"numa"
    assert b"Name: vllm\nVersion: 0.32.0\n" in files[f"opt/vllm/site/vllm-{cpu.VERSION}.dist-info/METADATA"]


@pytest.mark.parametrize(("name", "calls"), [("__main__", 1), ("__mp_main__", 0)])
def test_a_process_of_its_engine_starts_no_second_server(tmp_path: pathlib.Path, name: str, calls: int) -> None:
    folder = tmp_path / "vllm" / "entrypoints" / "cli"
    folder.mkdir(parents=True)
    (folder / "main.py").write_text("def main():\n    print('served')\n")
    (tmp_path / "command").write_text(cpu.COMMAND)
    code = f"import runpy; runpy.run_path({str(tmp_path / 'command')!r}, run_name={name!r})"
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=False
    )
    assert done.stdout.count("served") == calls, done.stderr


def test_a_layer_is_made_once(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "CACHE", tmp_path)
    made: list[str] = []

    def write(file: Any) -> None:
        made.append("once")
        file.write(b"contents")

    blob, diff = cpu._layer("base", "a", write)
    assert isinstance(blob.content, pathlib.Path)
    packed = blob.content.read_bytes()
    assert diff == "sha256:" + hashlib.sha256(b"contents").hexdigest()
    assert blob.digest == "sha256:" + hashlib.sha256(packed).hexdigest()
    assert blob.size == len(packed)
    assert cpu._layer("base", "a", write) == (blob, diff)
    assert len(made) == 1
    other, _ = cpu._layer("base", "b", write)
    assert len(made) == 2
    assert other.digest == blob.digest  # of the contents alone
    assert not blob.content.exists()  # the cache keeps one


def test_a_layer_that_was_not_finished_is_made_again(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "CACHE", tmp_path)

    def breaks(file: Any) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cpu._layer("base", "a", breaks)
    _, diff = cpu._layer("base", "a", lambda file: file.write(b"whole"))
    assert diff == "sha256:" + hashlib.sha256(b"whole").hexdigest()


def test_where_pip_finds_no_torch_it_says_so(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(argv: list[str], **_: Any) -> subprocess.CompletedProcess[bytes]:
        assert cpu.TORCH in argv
        return subprocess.CompletedProcess(argv, 1)

    monkeypatch.setattr(cpu, "run", run)
    with pytest.raises(LabError, match=r"pip finds no CPU build of torch here \(torch==2\.13\.0\+cpu for Python 3\.11"):
        cpu._install(tmp_path / "site")


def test_another_processor_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(payload, "machine", lambda: "aarch64")
    with pytest.raises(LabError, match=r"VLLM=cpu: .* this machine is aarch64"):
        cpu.ensure()


def test_the_versions_are_those_of_the_lock_and_the_inventory() -> None:
    lock = (cpu.HERE / "requirements.txt").read_text()
    assert f"\nvllm-cpu=={cpu.VERSION} " in lock
    assert not re.search(r"^(torch|triton|nvidia-)", lock, re.MULTILINE)
    inventory = yaml.safe_load((cpu.HERE / "cpu.yml").read_text())
    assert inventory["vllm_tag"] == cpu.TAG
    assert inventory["vllm_device"] == "cpu"
