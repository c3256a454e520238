"""The script by which role python_runtime finds or installs a Python, against a mirror of one's own."""

from __future__ import annotations

import hashlib
import http.server
import io
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from tests.unit.helpers import ROOT

SCRIPT = ROOT / "roles/python_runtime/files/python_runtime.sh"
OLD, NEW = "3.13.14+20260805", "3.13.15+20260814"
MACHINE = platform.machine()
Answer = dict[str, str]

pytestmark = pytest.mark.skipif(MACHINE not in ("x86_64", "aarch64"), reason="no relocatable Python for this machine")


def archive(note: str, program: str = f'exec "{sys.executable}" "$@"') -> bytes:
    """A stand-in: a folder python/ whose interpreter is the one that runs this test."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, text in (("python/bin/python3", f"#!/bin/sh\n{program}\n"), ("python/note", note)):
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(text), 0o755
            tar.addfile(info, io.BytesIO(text.encode()))
    return buffer.getvalue()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@dataclass
class Mirror:
    url: str
    files: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    ranges: list[str] = field(default_factory=list)
    delay: float = 0
    # send this much of a file, then hang up
    cut: int = 0

    def put(self, version: str, data: bytes) -> str:
        cpython, release = version.split("+")
        name = f"cpython-{cpython}%2B{release}-{MACHINE}-unknown-linux-gnu-install_only_stripped.tar.gz"
        self.files[f"/{release}/{name}"] = data
        return sha256(data)


@pytest.fixture
def mirror() -> Iterator[Mirror]:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = re.sub("^http://[^/]*", "", self.path)  # as a proxy is asked
            here.asked.append(path)
            data = here.files.get(path)
            if data is None:
                self.send_error(404)
                return
            time.sleep(here.delay)
            wanted = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
            start = int(wanted[1]) if wanted else 0
            if wanted:
                here.ranges.append(self.headers["Range"])
            if start >= len(data):
                self.send_error(416)
                return
            body = data[start:]
            self.send_response(206 if wanted else 200)
            if wanted:
                self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if here.cut:
                self.wfile.write(body[: here.cut])
                self.close_connection = True
            else:
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    here = Mirror(f"http://127.0.0.1:{server.server_address[1]}")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield here
    server.shutdown()
    server.server_close()


class Host:
    """The script on a host whose /opt/nemo/python is a folder of the test."""

    def __init__(self, folder: Path, mirror: Mirror) -> None:
        self.root = folder / "python"
        self.mirror = mirror
        self.text = SCRIPT.read_text().replace("root=/opt/nemo/python\n", f"root={self.root}\n")
        assert str(self.root) in self.text
        self.path = os.environ["PATH"]
        self.environment: dict[str, str] = {"NO_PROXY": "127.0.0.1"}

    def start(
        self,
        version: str = NEW,
        digest: str = "0" * 64,
        *,
        interpreter: str = "",
        install: bool = True,
        relocatable: bool = True,
        patience: int = 20,
        minimum: str = "3.9",
    ) -> subprocess.Popen[str]:
        words = [
            interpreter or str(self.root / "current/bin/python3"), minimum, "yes" if install else "no", str(patience),
            "yes" if relocatable else "no", version, self.mirror.url, digest, digest, "60",
        ]  # fmt: skip
        return subprocess.Popen(
            ["/bin/sh", "-c", self.text, "sh", *words], env={"PATH": self.path, **self.environment},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip

    def answer(self, process: subprocess.Popen[str]) -> Answer:
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, out + err
        return dict(re.findall("^nemo_python_([a-z]+)=(.*)$", out, re.MULTILINE))

    def run(self, version: str = NEW, digest: str = "0" * 64, **options: object) -> Answer:
        return self.answer(self.start(version, digest, **options))  # type: ignore[arg-type]

    @property
    def note(self) -> str:
        return (self.root / "current/note").read_text()

    def without(self, *programs: str) -> None:
        """A PATH that has everything but these."""
        folder = self.root.parent / "bin"
        folder.mkdir()
        for directory in reversed(self.path.split(":")):
            for program in Path(directory).glob("*") if Path(directory).is_dir() else ():
                (folder / program.name).unlink(missing_ok=True)
                (folder / program.name).symlink_to(program)
        for name in programs:
            (folder / name).unlink(missing_ok=True)
        self.path = str(folder)


@pytest.fixture
def host(tmp_path: Path, mirror: Mirror) -> Host:
    return Host(tmp_path, mirror)


class TestRelocatable:
    def test_installed_once_and_found_again(self, host: Host, mirror: Mirror) -> None:
        digest = mirror.put(NEW, archive("new"))
        assert host.run(NEW, digest)["state"] == "installed"
        assert host.note == "new"
        asked = len(mirror.asked)
        answer = host.run(NEW, digest)
        assert (answer["state"], answer["relocatable"]) == ("present", NEW)
        assert len(mirror.asked) == asked == 1

    def test_upgrade_keeps_the_old_one_and_the_way_back_needs_no_download(self, host: Host, mirror: Mirror) -> None:
        old, new = mirror.put(OLD, archive("old")), mirror.put(NEW, archive("new"))
        host.run(OLD, old)
        assert host.run(NEW, new)["state"] == "installed"
        assert host.note == "new"
        assert host.run(OLD, old)["state"] == "installed"
        assert host.note == "old"
        assert len(mirror.asked) == 2
        assert str((host.root / "current").readlink()) == OLD

    def test_wrong_digest_leaves_the_old_one(self, host: Host, mirror: Mirror) -> None:
        host.run(OLD, mirror.put(OLD, archive("old")))
        wanted = mirror.put(NEW, archive("new"))
        found = mirror.put(NEW, archive("neW"))
        answer = host.run(NEW, wanted)
        assert answer["state"] == "relocatable"
        for part in (
            "cpython-3.13.15%2B20260814",
            f"expected sha256 {wanted}",
            f"found {found}",
            "nothing was unpacked",
        ):
            assert part in answer["detail"]
        assert host.note == "old"
        assert not (host.root / NEW).exists()
        assert not list(host.root.glob(".download*")) + list(host.root.glob(".unpack*"))
        mirror.put(NEW, archive("new"))
        assert host.run(NEW, wanted)["state"] == "installed"

    def test_goes_on_where_the_download_ended(self, host: Host, mirror: Mirror) -> None:
        digest = mirror.put(NEW, archive("x" * 20 + os.urandom(30000).hex()))
        mirror.cut = 5000
        answer = host.run(NEW, digest)
        assert answer["state"] == "relocatable"
        assert "could not be downloaded" in answer["detail"]
        mirror.cut = 0
        mirror.ranges.clear()
        assert host.run(NEW, digest)["state"] == "installed"
        assert mirror.ranges == ["bytes=15000-"]

    def test_part_of_another_file_is_thrown_away(self, host: Host, mirror: Mirror) -> None:
        digest = mirror.put(NEW, archive("new" + os.urandom(5000).hex()))
        host.root.mkdir()
        (host.root / f".download.{NEW}.tar.gz").write_bytes(b"x" * 700)
        assert host.run(NEW, digest)["state"] == "installed"
        longer = host.root / f".download.{OLD}.tar.gz"
        longer.write_bytes(b"x" * 99999)
        assert host.run(OLD, mirror.put(OLD, archive("old")))["state"] == "installed"

    def test_two_runs_at_once(self, host: Host, mirror: Mirror) -> None:
        digest = mirror.put(NEW, archive("new"))
        mirror.delay = 1
        runs = [host.start(NEW, digest) for _ in range(2)]
        assert sorted(host.answer(run)["state"] for run in runs) == ["installed", "installed"]
        assert len(mirror.asked) == 1
        assert host.note == "new"

    def test_second_run_does_not_wait_for_ever(self, host: Host, mirror: Mirror) -> None:
        digest = mirror.put(NEW, archive("new"))
        mirror.delay = 4
        first = host.start(NEW, digest)
        time.sleep(1)
        answer = host.run(NEW, digest, patience=1)
        assert answer["state"] == "relocatable"
        assert re.search(r"another run installs into .* since 1 seconds \(process \d+, since ", answer["detail"])
        assert host.answer(first)["state"] == "installed"

    @pytest.mark.parametrize("seconds", [0.05, 0.15, 0.4, 0.8])
    def test_killed_at_any_point(self, host: Host, mirror: Mirror, seconds: float) -> None:
        host.run(OLD, mirror.put(OLD, archive("old")))
        digest = mirror.put(NEW, archive("new"))
        mirror.delay = 0.3
        process = host.start(NEW, digest)
        time.sleep(seconds)
        os.killpg(process.pid, 9)
        process.communicate()
        assert host.note in ("old", "new")
        assert subprocess.run([host.root / "current/bin/python3", "-c", ""], check=False).returncode == 0
        assert host.run(NEW, digest)["state"] in ("installed", "present")
        assert host.note == "new"
        assert not list(host.root.glob(".download*")) + list(host.root.glob(".unpack*"))

    def test_killed_while_it_is_unpacked(self, host: Host, mirror: Mirror, tmp_path: Path) -> None:
        host.run(OLD, mirror.put(OLD, archive("old")))
        tool = tmp_path / "tools"
        tool.mkdir()
        path = host.path
        (tool / "tar").write_text(f'#!/bin/sh\nPATH={path} tar "$@"\nsleep 30\n')
        (tool / "tar").chmod(0o755)
        digest = mirror.put(NEW, archive("new"))
        host.path = f"{tool}:{path}"
        process = host.start(NEW, digest)
        deadline = time.monotonic() + 20
        while not list(host.root.glob("*/python/note")) + list(host.root.glob(".unpack*/python/note")):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.killpg(process.pid, 9)
        process.communicate()
        assert not (host.root / NEW).exists()
        assert host.note == "old"
        host.path = path
        assert host.run(NEW, digest)["state"] == "installed"
        assert host.note == "new"
        assert not list(host.root.glob(".unpack*"))

    def test_damaged_one_is_made_anew(self, host: Host, mirror: Mirror) -> None:
        digest = mirror.put(NEW, archive("new"))
        host.run(NEW, digest)
        (host.root / NEW / "bin/python3").unlink()
        assert host.run(NEW, digest)["state"] == "installed"
        assert host.note == "new"

    def test_another_file_of_the_same_version_is_installed(self, host: Host, mirror: Mirror) -> None:
        host.run(NEW, mirror.put(NEW, archive("first")))
        assert host.run(NEW, mirror.put(NEW, archive("second")))["state"] == "installed"
        assert host.note == "second"

    def test_one_that_does_not_run_here_is_not_put_in_place(self, host: Host, mirror: Mirror) -> None:
        host.run(OLD, mirror.put(OLD, archive("old")))
        answer = host.run(NEW, mirror.put(NEW, archive("new", "echo cannot run >&2; exit 1")))
        assert answer["state"] == "relocatable"
        assert "does not run here: cannot run" in answer["detail"]
        assert host.note == "old"
        assert not (host.root / NEW).exists()

    def test_check_mode_installs_nothing(self, host: Host, mirror: Mirror) -> None:
        digest = mirror.put(NEW, archive("new"))
        assert host.run(NEW, digest, install=False)["state"] == "absent"
        assert not host.root.exists()
        host.run(OLD, mirror.put(OLD, archive("old")))
        answer = host.run(NEW, digest, install=False)
        assert (answer["state"], answer["relocatable"]) == ("present", f"planned: {NEW}")
        assert host.note == "old"

    def test_beside_the_systems_python(self, host: Host, mirror: Mirror) -> None:
        digest = mirror.put(NEW, archive("new"))
        answer = host.run(NEW, digest, interpreter=sys.executable, install=False)
        assert (answer["state"], answer["relocatable"]) == ("present", f"planned: {NEW}")
        assert host.run(NEW, digest, interpreter=sys.executable)["state"] == "installed"
        assert host.run(NEW, digest, interpreter=sys.executable)["state"] == "present"
        answer = host.run(NEW, "1" * 64, interpreter=sys.executable)
        assert answer["state"] == "relocatable"
        assert "is not the file that is pinned" in answer["detail"]

    def test_not_asked_for(self, host: Host, mirror: Mirror) -> None:
        assert host.run(interpreter=sys.executable, relocatable=False)["state"] == "present"
        assert not mirror.asked
        assert not host.root.exists()

    @pytest.mark.parametrize(
        ("version", "digest", "said"),
        [
            ("3.13.15", "0" * 64, "allowed: <CPython>+<release>"),
            ("latest", "0" * 64, "python_runtime_relocatable_version is 'latest'"),
            ("../../etc+1", "0" * 64, "allowed: <CPython>+<release>"),
            ("3.13.1+20250101", "", f"python_runtime_relocatable_digests has no digest of it for {MACHINE}"),
            ("3.13.1+20250101", "0" * 64, "could not be downloaded"),
        ],
    )
    def test_what_it_refuses(self, host: Host, version: str, digest: str, said: str) -> None:
        answer = host.run(version, digest)
        assert answer["state"] == "relocatable"
        assert said in answer["detail"]
        assert not (host.root / "current").exists()


class TestWaysToDownload:
    @pytest.mark.parametrize("missing", [["curl"], ["wget"], ["curl", "wget"]], ids=" ".join)
    def test_any_tool_will_do(self, host: Host, mirror: Mirror, missing: list[str]) -> None:
        if missing == ["curl"] and not shutil.which("wget"):
            pytest.skip("no wget on this machine")
        host.without(*missing)
        assert host.run(NEW, mirror.put(NEW, archive("new")))["state"] == "installed"
        assert host.note == "new"

    def test_none(self, host: Host, mirror: Mirror) -> None:
        host.without("curl", "wget", "python3", "python2", "python")
        answer = host.run(NEW, mirror.put(NEW, archive("new")))
        assert answer["state"] == "relocatable"
        assert "install curl" in answer["detail"]

    def test_tool_that_is_missing_is_named(self, host: Host, mirror: Mirror) -> None:
        host.without("sha256sum")
        answer = host.run(NEW, mirror.put(NEW, archive("new")))
        assert answer["state"] == "relocatable"
        assert "sha256sum is missing" in answer["detail"]
        assert not mirror.asked

    def test_proxy_of_the_environment(self, host: Host, mirror: Mirror) -> None:
        digest = mirror.put(NEW, archive("new"))
        host.environment = {"http_proxy": mirror.url}
        mirror.url = "http://releases.invalid"
        assert host.run(NEW, digest)["state"] == "installed"

    def test_full_disk(self, host: Host, mirror: Mirror, tmp_path: Path) -> None:
        tool = tmp_path / "tools"
        tool.mkdir()
        (tool / "tar").write_text(
            "#!/bin/sh\necho 'tar: python/x: Cannot write: No space left on device' >&2\nexit 2\n"
        )
        (tool / "tar").chmod(0o755)
        host.run(OLD, mirror.put(OLD, archive("old")))
        host.path = f"{tool}:{host.path}"
        answer = host.run(NEW, mirror.put(NEW, archive("new")))
        assert answer["state"] == "relocatable"
        assert re.search(r"No space left on device \(\d+ MB free on /", answer["detail"])
        assert host.note == "old"
        assert not list(host.root.glob(".unpack*"))


class TestSystemPython:
    def test_too_old(self, host: Host) -> None:
        answer = host.run(interpreter=sys.executable, minimum="3.99", relocatable=True)
        assert answer["state"] == "old"
        assert not host.root.exists()

    def test_relocatable_one_that_is_too_old(self, host: Host, mirror: Mirror) -> None:
        assert host.run(NEW, mirror.put(NEW, archive("new")), minimum="3.99")["state"] == "old"


def test_pins_are_complete() -> None:
    """Every pinned version has a digest for both machines, and the default one is pinned."""

    pins = yaml.safe_load((ROOT / "roles/python_runtime/vars/pins.yml").read_text())["__python_runtime_pins"]
    default = yaml.safe_load((ROOT / "roles/python_runtime/defaults/main.yml").read_text())
    assert default["python_runtime_relocatable_version"] in pins
    for digests in pins.values():
        assert sorted(digests) == ["aarch64", "x86_64"]
        assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in digests.values())
