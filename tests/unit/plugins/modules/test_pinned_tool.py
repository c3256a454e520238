# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""pinned_tool against a small server of its own, real archives, and the machine's gpg."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import http.server
import io
import json
import os
import shutil
import signal
import stat
import subprocess
import tarfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible.module_utils.testing import patch_module_args

from ansible_collections.nemo.platform.plugins.module_utils import archives, downloads, openpgp
from ansible_collections.nemo.platform.plugins.module_utils import pinned_tool as store
from ansible_collections.nemo.platform.plugins.module_utils.pinned_tool import (
    Artifact,
    PinnedTool,
    SmallFile,
    ToolError,
    Wanted,
)
from ansible_collections.nemo.platform.plugins.modules import pinned_tool
from tests.unit.helpers import ROOT

GPG = shutil.which("gpg") or ""
needs_gpg = pytest.mark.skipif(not GPG, reason="no gpg on this machine")


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def program(version: str, ballast: int = 0) -> bytes:
    """A tool that says its version, and writes completion for a shell."""
    text = f'#!/bin/sh\ncase "$1" in version) echo "Version: v{version}";; completion) echo "# completion {version}";; esac\n'
    return text.encode() + b"#" * ballast


class Mirror:
    """Files by path, and what to do wrong with them."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.cut_after: dict[str, list[int]] = {}  # path -> bytes after which a connection ends, one for each request
        self.statuses: dict[str, list[int]] = {}
        self.ranges = True
        mirror = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                wanted = self.headers.get("Range", "")
                mirror.requests.append((self.path, wanted))
                if mirror.statuses.get(self.path):
                    self.send_error(mirror.statuses[self.path].pop(0))
                    return
                data = mirror.files.get(self.path)
                if data is None:
                    self.send_error(404)
                    return
                start = int(wanted[6:-1]) if wanted and mirror.ranges else 0
                if start > len(data) or (wanted and mirror.ranges and start == len(data)):
                    self.send_error(416)
                    return
                self.send_response(206 if start else 200)
                if start:
                    self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
                self.send_header("Content-Length", str(len(data) - start))
                self.end_headers()
                cuts = mirror.cut_after.get(self.path)
                end = start + cuts.pop(0) if cuts else len(data)
                self.wfile.write(data[start:end])

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def serve(self, address: str, data: bytes, **changes: Any) -> Artifact:
        self.files[address] = data
        return Artifact(url=self.url + address, sha256=sha256(data), **changes)


@pytest.fixture
def mirror() -> Iterator[Mirror]:
    served = Mirror()
    yield served
    served.server.shutdown()
    served.server.server_close()


class Host:
    """One host: its folders, and runs on it."""

    def __init__(self, folder: Path, mirror: Mirror) -> None:
        self.root = folder / "tools"
        self.bin = folder / "bin"
        self.base = self.root / "kubectl"
        self.mirror = mirror
        self.warnings: list[str] = []

    def wanted(self, version: str, data: bytes | None = None, **changes: Any) -> Wanted:
        artifact = self.mirror.serve(f"/{version}/kubectl", data or program(version), path="kubectl")
        given: dict[str, Any] = {
            "name": "kubectl",
            "version": version,
            "root": str(self.root),
            "artifacts": (artifact,),
            "files": (SmallFile("completion.bash", command=("kubectl", "completion", "bash")),),
            "links": {f"{self.bin}/kubectl": "kubectl"},
            "probe": ("kubectl", "version"),
            "expect": rf"v{version}$",
        }
        return Wanted(**{**given, **changes})

    def tool(self, wanted: Wanted, check: bool = False, **changes: Any) -> PinnedTool:
        given: dict[str, Any] = {
            "limits": downloads.Limits(timeout=3, retries=1, pause=0.01),
            "lock_timeout": 0.3,
            "gpg": lambda: GPG or None,
        }
        return PinnedTool(
            wanted, pinned_tool.run_program, self.warnings.append, check_mode=check, **{**given, **changes}
        )

    def run(self, version: str, check: bool = False, **changes: Any) -> store.Outcome:
        return self.tool(self.wanted(version, **changes), check).run()

    def says(self) -> str:
        """What a user gets."""
        return subprocess.run(
            [self.bin / "kubectl", "version"], capture_output=True, text=True, check=True
        ).stdout.strip()

    def folders(self) -> set[str]:
        return {path.name for path in self.base.iterdir() if not path.name.startswith(".") and path.name != "current"}


@pytest.fixture
def host(tmp_path: Path, mirror: Mirror) -> Host:
    return Host(tmp_path, mirror)


# Versions


def test_first_installation(host: Host) -> None:
    outcome = host.run("1.33.9")
    assert (outcome.previous, outcome.installed, outcome.switched) == (None, True, True)
    assert host.says() == "Version: v1.33.9"
    assert (host.base / "current" / "completion.bash").read_text() == "# completion 1.33.9\n"
    assert (host.base / "current").readlink() == Path("1.33.9")
    assert not [path.name for path in host.base.iterdir() if path.name.endswith(".new") or path.name == ".work"]


def test_second_run_asks_no_server_and_changes_nothing(host: Host) -> None:
    host.run("1.33.9")
    host.mirror.requests.clear()
    before = {path: path.lstat().st_mtime_ns for path in host.root.rglob("*") if path.name != ".lock"}
    outcome = host.run("1.33.9")
    assert not outcome.changed
    assert host.mirror.requests == []
    assert {path: path.lstat().st_mtime_ns for path in host.root.rglob("*") if path.name != ".lock"} == before


def test_upgrade_keeps_the_version_before_and_going_back_needs_no_download(host: Host) -> None:
    host.run("1.33.9")
    outcome = host.run("1.33.10")
    assert outcome.previous == "1.33.9"
    assert host.says() == "Version: v1.33.10"
    host.mirror.requests.clear()
    back = host.run("1.33.9")
    assert (back.installed, back.switched, back.previous) == (False, True, "1.33.10")
    assert host.says() == "Version: v1.33.9"
    forth = host.run("1.33.10")
    assert not forth.installed
    assert host.mirror.requests == []


def test_older_versions_go_by_their_last_use(host: Host) -> None:
    for version in ("1.33.8", "1.33.9", "1.33.10"):
        host.run(version)
    assert host.folders() == {"1.33.9", "1.33.10"}
    host.run("1.33.9")
    outcome = host.run("1.33.11")
    assert host.folders() == {"1.33.9", "1.33.11"}
    assert outcome.removed == [str(host.base / "1.33.10")]


def test_keep_two_then_none(host: Host) -> None:
    for version in ("1.33.8", "1.33.9", "1.33.10"):
        host.run(version, keep=2)
    assert host.folders() == {"1.33.8", "1.33.9", "1.33.10"}
    assert len(host.run("1.33.10", keep=0).removed) == 2
    assert host.folders() == {"1.33.10"}


@pytest.mark.parametrize("harm", ["truncated", "altered", "gone", "mode"])
def test_harmed_version_is_made_again_beside_itself(host: Host, harm: str) -> None:
    host.run("1.33.9")
    path = host.base / "1.33.9" / "kubectl"
    if harm == "truncated":
        path.write_bytes(path.read_bytes()[:20])
    elif harm == "altered":
        times = path.stat()
        path.write_bytes(path.read_bytes().replace(b"v1.33.9", b"v6.66.6"))
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # as one who hides it would
    elif harm == "gone":
        path.unlink()
    else:
        path.chmod(0o4755)
    outcome = host.run("1.33.9")
    assert outcome.damaged == str(path)
    assert host.says() == "Version: v1.33.9"
    assert host.folders() == {"1.33.9~2"}
    assert not host.run("1.33.9").changed


def test_file_that_was_touched_but_is_the_same_is_read_once(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    host.run("1.33.9")
    os.utime(host.base / "1.33.9" / "kubectl")
    read: list[str] = []
    real = store.content_of

    def reading(path: str) -> str:
        read.append(path)
        return real(path)

    monkeypatch.setattr(store, "content_of", reading)
    assert not host.run("1.33.9").changed
    assert len(read) == 1
    assert not host.run("1.33.9").changed
    assert len(read) == 1


def test_other_digest_under_the_same_version_is_another_thing(host: Host) -> None:
    host.run("1.33.9")
    outcome = host.run("1.33.9", data=program("1.33.9", ballast=3))
    assert outcome.installed
    assert host.says() == "Version: v1.33.9"


def test_other_address_is_not(host: Host) -> None:
    wanted = host.wanted("1.33.9")
    host.tool(wanted).run()
    moved = dataclasses.replace(wanted.artifacts[0], url="http://127.0.0.1:1/gone")
    assert not host.tool(dataclasses.replace(wanted, artifacts=(moved,))).run().changed


def test_dangling_link_is_repaired(host: Host) -> None:
    host.run("1.33.9")
    store.replace_link(str(host.base / "current"), "1.33.7")
    outcome = host.run("1.33.9")
    assert (outcome.previous, outcome.installed, outcome.switched) == (None, False, True)
    assert host.says() == "Version: v1.33.9"


# Check mode


def test_check_mode_on_a_bare_host_touches_nothing(host: Host, tmp_path: Path) -> None:
    outcome = host.run("1.33.9", check=True)
    assert outcome.changed
    assert outcome.links == [f"{host.bin}/kubectl"]
    assert list(tmp_path.iterdir()) == []
    assert host.mirror.requests == []


def test_check_mode_tells_an_upgrade_and_what_goes(host: Host) -> None:
    host.run("1.33.8")
    host.run("1.33.9")
    outcome = host.run("1.33.10", check=True)
    assert (outcome.previous, outcome.installed) == ("1.33.9", True)
    assert outcome.removed == [str(host.base / "1.33.8")]
    assert host.folders() == {"1.33.8", "1.33.9"}
    assert not host.run("1.33.9", check=True).changed
    diff = pinned_tool.diff_of(host.wanted("1.33.10"), outcome)
    assert diff["before"].splitlines()[0] == "kubectl 1.33.9"
    assert diff["after"].splitlines()[0] == "kubectl 1.33.10"


# Links


def test_link_that_leads_elsewhere_is_taken_over_and_one_not_listed_any_more_goes(host: Host) -> None:
    host.bin.mkdir()
    (host.bin / "kubectl").symlink_to("/usr/local/lib/kubectl")
    host.run("1.33.9", links={f"{host.bin}/kubectl": "kubectl", f"{host.bin}/k": "kubectl"})
    assert host.says() == "Version: v1.33.9"
    outcome = host.run("1.33.9")
    assert outcome.links == [f"{host.bin}/k"]
    assert not os.path.lexists(host.bin / "k")
    assert not host.run("1.33.9").changed


def test_file_at_the_place_of_a_link_stops_before_the_first_change(host: Host) -> None:
    host.bin.mkdir()
    (host.bin / "kubectl").write_text("mine")
    with pytest.raises(ToolError, match=r"bin/kubectl: is there and not a link"):
        host.run("1.33.9")
    assert (host.bin / "kubectl").read_text() == "mine"
    assert host.mirror.requests == []


# What is refused


def test_tampered_byte_is_refused_and_never_run(host: Host, tmp_path: Path) -> None:
    host.run("1.33.9")
    wanted = host.wanted("1.33.10")
    good = host.mirror.files["/1.33.10/kubectl"]
    bad = good.replace(b"#!/bin/sh\n", b"#!/bin/sh\ntouch %s/ran\n" % str(tmp_path).encode())
    host.mirror.files["/1.33.10/kubectl"] = bad
    with pytest.raises(ToolError) as caught:
        host.tool(wanted).run()
    for word in (
        f"{host.mirror.url}/1.33.10/kubectl",
        f"sha256 is {sha256(bad)}",
        f"expected {sha256(good)}",
        "version 1.33.9 is used",
    ):
        assert word in str(caught.value)
    assert not (tmp_path / "ran").exists()
    assert host.says() == "Version: v1.33.9"
    assert host.folders() == {"1.33.9"}
    assert not (host.base / ".work").exists()


def test_version_that_says_another_is_refused(host: Host) -> None:
    host.run("1.33.9")
    with pytest.raises(ToolError, match=r"says 'Version: v1.32.0', expected is 'v1.33.10\$'; version 1.33.9 is used"):
        host.run("1.33.10", data=program("1.32.0"))
    assert host.says() == "Version: v1.33.9"


def test_version_that_cannot_run_is_refused(host: Host) -> None:
    with pytest.raises(ToolError, match="no version is used as before"):
        host.run("1.33.9", data=b"\x7fELF of another architecture")
    assert host.folders() == set()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"version": "../../etc"}, "version is '../../etc'"),
        ({"version": "current"}, "version is 'current'"),
        ({"links": {"bin/x": "x"}}, "not an absolute path"),
        ({"links": {"/usr/bin/x": "../x"}}, "leads out of the version's folder"),
        ({"signing_key": "x", "fingerprint": "short"}, "signing_key_fingerprint is 'short'"),
    ],
)
def test_bad_request(host: Host, changes: dict[str, Any], words: str) -> None:
    wanted = dataclasses.replace(host.wanted("1.33.9"), **changes)
    with pytest.raises(ToolError, match=words):
        host.tool(wanted).run()
    assert not host.root.exists()


# Downloads


def test_download_goes_on_where_it_broke_off(host: Host) -> None:
    wanted = host.wanted("1.33.9", data=program("1.33.9", ballast=5000))
    host.mirror.cut_after["/1.33.9/kubectl"] = [1000]
    host.tool(wanted).run()
    assert [asked for _, asked in host.mirror.requests] == ["", "bytes=1000-"]
    assert host.says() == "Version: v1.33.9"


def test_server_without_ranges_begins_anew(host: Host) -> None:
    wanted = host.wanted("1.33.9", data=program("1.33.9", ballast=5000))
    host.mirror.cut_after["/1.33.9/kubectl"] = [1000]
    host.mirror.ranges = False
    host.tool(wanted).run()
    assert host.says() == "Version: v1.33.9"


def test_truncated_for_good_is_an_error_and_the_next_run_goes_on(host: Host) -> None:
    host.run("1.33.9")
    wanted = host.wanted("1.33.10", data=program("1.33.10", ballast=5000))
    host.mirror.requests.clear()
    host.mirror.cut_after["/1.33.10/kubectl"] = [1000, 1000]
    with pytest.raises(ToolError, match=r"kubectl: .*the connection ended after 2000 of \d+ bytes \(2 tries\)"):
        host.tool(wanted).run()
    assert host.says() == "Version: v1.33.9"
    host.tool(wanted).run()
    assert [asked for _, asked in host.mirror.requests] == ["", "bytes=1000-", "bytes=2000-"]
    assert host.says() == "Version: v1.33.10"


def test_wrong_beginning_from_an_earlier_run_is_fetched_anew(host: Host) -> None:
    wanted = host.wanted("1.33.9", data=program("1.33.9", ballast=5000))
    work = host.base / ".work"
    work.mkdir(parents=True)
    (work / f"{wanted.artifacts[0].sha256}.part").write_bytes(b"x" * 100)
    host.tool(wanted).run()
    assert [asked for _, asked in host.mirror.requests] == ["bytes=100-", ""]
    assert host.says() == "Version: v1.33.9"


def test_passing_trouble_is_tried_again_and_a_clear_no_is_not(host: Host) -> None:
    wanted = host.wanted("1.33.9")
    host.mirror.statuses["/1.33.9/kubectl"] = [503]
    host.tool(wanted).run()
    wanted = host.wanted("1.33.10")
    host.mirror.statuses["/1.33.10/kubectl"] = [403, 403]
    host.mirror.requests.clear()
    with pytest.raises(ToolError, match=r"/1.33.10/kubectl: the server says 403 Forbidden; version 1.33.9 is used"):
        host.tool(wanted).run()
    assert len(host.mirror.requests) == 1


def test_server_that_is_not_there(host: Host) -> None:
    wanted = host.wanted("1.33.9")
    artifact = dataclasses.replace(wanted.artifacts[0], url="http://127.0.0.1:9/kubectl")
    with pytest.raises(ToolError, match=r"http://127.0.0.1:9/kubectl: ConnectionRefusedError.*\(2 tries\)"):
        host.tool(dataclasses.replace(wanted, artifacts=(artifact,))).run()


def test_proxy_comes_from_the_environment(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = host.wanted("1.33.9")
    data = host.mirror.files["/1.33.9/kubectl"]
    host.mirror.files["http://dl.example.com/kubectl"] = data
    monkeypatch.setenv("http_proxy", host.mirror.url)
    monkeypatch.setenv("no_proxy", "")
    artifact = dataclasses.replace(wanted.artifacts[0], url="http://dl.example.com/kubectl")
    host.tool(dataclasses.replace(wanted, artifacts=(artifact,))).run()
    assert host.says() == "Version: v1.33.9"


def test_disk_without_room_is_seen_before_the_download(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    host.run("1.33.9")
    real = os.statvfs

    def nearly_full(path: Any) -> Any:
        values = list(real(path))
        values[4] = 1
        return os.statvfs_result(values)

    monkeypatch.setattr(os, "statvfs", nearly_full)
    with pytest.raises(ToolError, match=r"\.work: the download of http.*needs .* but the file system has .* left"):
        host.run("1.33.10")
    assert host.says() == "Version: v1.33.9"


@pytest.mark.skipif(os.getuid() != 0 or not shutil.which("mount"), reason="mounts a small file system")
def test_disk_that_fills_up_while_unpacking(tmp_path: Path, mirror: Mirror, monkeypatch: pytest.MonkeyPatch) -> None:
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", small], check=False, capture_output=True
    ).returncode:
        pytest.skip("no mounts here")
    try:
        host = Host(small, mirror)
        monkeypatch.setattr(downloads, "require_space", lambda *_: None)  # somebody else fills it meanwhile
        host.run("1.33.9")
        big = archive_of({"a/kubectl": program("1.33.10"), "a/ballast": os.urandom(700_000)}, "tar.gz")
        artifact = mirror.serve("/big.tar.gz", big, format="tar.gz", strip=1)
        wanted = dataclasses.replace(host.wanted("1.33.10"), artifacts=(artifact,))
        with pytest.raises(ToolError, match=r"No space left.*version 1.33.9 is used as before"):
            host.tool(wanted).run()
        assert host.says() == "Version: v1.33.9"
        assert host.folders() == {"1.33.9"}
        assert not (host.base / ".work").exists()
        assert not host.run("1.33.9").changed
    finally:
        subprocess.run(["umount", small], check=True)


# Archives


def archive_of(files: dict[str, bytes], archive_format: str, links: dict[str, str] | None = None) -> bytes:
    made = io.BytesIO()
    if archive_format == "zip":
        with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as packed:
            for name, data in files.items():
                info = zipfile.ZipInfo(name)
                info.external_attr = (stat.S_IFREG | 0o4755) << 16
                packed.writestr(info, data)
            for name, target in (links or {}).items():
                info = zipfile.ZipInfo(name)
                info.external_attr = (stat.S_IFLNK | 0o777) << 16
                packed.writestr(info, target)
        return made.getvalue()
    with tarfile.open(fileobj=made, mode="w:gz") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.mode, member.uid = len(data), 0o6755, 1000
            tar.addfile(member, io.BytesIO(data))
        for name, target in (links or {}).items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, target
            tar.addfile(member)
    return made.getvalue()


@pytest.mark.parametrize("archive_format", ["tar.gz", "zip"])
def test_archive(host: Host, archive_format: str) -> None:
    data = archive_of(
        {"top/kubectl": program("1.33.9"), "top/lib/data": b"x", "top/other": b"y"},
        archive_format,
        {"top/lib/again": "../kubectl"},
    )
    artifact = host.mirror.serve("/a", data, format=archive_format, strip=1, only=("kubectl", "lib/*"))
    host.tool(dataclasses.replace(host.wanted("1.33.9"), artifacts=(artifact,))).run()
    assert host.says() == "Version: v1.33.9"
    folder = host.base / "1.33.9"
    assert stat.S_IMODE((folder / "kubectl").stat().st_mode) == 0o755, "no setuid from an archive"
    assert (folder / "kubectl").stat().st_uid == os.getuid()
    assert (folder / "lib" / "again").readlink() == Path("../kubectl")
    assert not (folder / "other").exists()
    assert not host.tool(dataclasses.replace(host.wanted("1.33.9"), artifacts=(artifact,))).run().changed


@pytest.mark.parametrize("archive_format", ["tar.gz", "zip"])
@pytest.mark.parametrize(
    ("files", "links"),
    [
        ({"../../evil": b"x"}, {}),
        ({"/etc/evil": b"x"}, {}),
        ({"a/../../evil": b"x"}, {}),
        ({"a\\..\\evil": b"x"}, {}),
        ({}, {"a/link": "/etc"}),
        ({}, {"a/link": "../../etc"}),
        ({}, {"a/link": "b/../../../etc"}),
        ({"a/link/evil": b"x"}, {"a/link": "b"}),
    ],
)
def test_archive_that_leads_out_is_refused_as_a_whole(
    host: Host, archive_format: str, files: dict[str, bytes], links: dict[str, str]
) -> None:
    host.run("1.33.9")
    data = archive_of({"a/kubectl": program("1.33.10"), **files}, archive_format, links)
    artifact = host.mirror.serve("/a", data, format=archive_format, strip=1, only=("kubectl",))
    before = set(host.base.parent.parent.rglob("*"))
    with pytest.raises(ToolError, match=r"outside of it|below a file or link"):
        host.tool(dataclasses.replace(host.wanted("1.33.10"), artifacts=(artifact,))).run()
    assert host.says() == "Version: v1.33.9"
    assert {path for path in set(host.base.parent.parent.rglob("*")) - before if not path.name.endswith(".part")} <= {
        host.base / ".work"
    }


def test_broken_archive_devices_and_doubles(tmp_path: Path) -> None:
    def look(data: bytes, archive_format: str = "tar.gz") -> None:
        path = tmp_path / "archive"
        path.write_bytes(data)
        with archives.opened(str(path), archive_format) as archive:
            archives.look_through(archive, "a", 0, ())

    good = archive_of({"kubectl": os.urandom(5000)}, "tar.gz")
    look(good)
    with pytest.raises(archives.ArchiveError, match="broken"):
        look(good[:2000])
    for archive_format in ("tar.gz", "zip"):
        with pytest.raises(archives.ArchiveError, match="not a"):
            look(b"not an archive", archive_format)
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w:gz") as tar:
        device = tarfile.TarInfo("null")
        device.type = tarfile.CHRTYPE
        tar.addfile(device)
    with pytest.raises(archives.ArchiveError, match="neither file, folder nor link"):
        look(made.getvalue())
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w:gz") as tar:
        for _ in range(2):
            tar.addfile(tarfile.TarInfo("kubectl"))
    with pytest.raises(archives.ArchiveError, match="twice"):
        look(made.getvalue())
    with pytest.raises(archives.ArchiveError, match="no file that is asked for"):
        look(archive_of({}, "tar.gz"))


# Signatures


class Signer:
    """A key of the machine's gpg, in a folder of its own."""

    def __init__(self, folder: Path, expires: str = "0", when: str = "") -> None:
        self.folder = folder
        folder.mkdir(mode=0o700)
        self.when = ["--faked-system-time", when] if when else []
        self.gpg("--passphrase", "", "--quick-generate-key", "Test <test@example.com>", "ed25519", "sign", expires)
        listed = self.gpg("--with-colons", "--list-keys").decode().splitlines()
        self.fingerprint = next(line.split(":")[9] for line in listed if line.startswith("fpr:"))
        self.key = self.gpg("--armor", "--export").decode()

    def gpg(self, *arguments: str, data: bytes = b"") -> bytes:
        command = [
            GPG,
            "--homedir",
            str(self.folder),
            "--batch",
            "--yes",
            "--pinentry-mode",
            "loopback",
            *self.when,
            *arguments,
        ]
        return subprocess.run(command, input=data, check=True, capture_output=True).stdout

    def sign(self, data: bytes, *arguments: str) -> bytes:
        return self.gpg(*arguments, "--detach-sign", data=data)

    def revoke(self) -> str:
        """The key, revoked."""
        text = (self.folder / "openpgp-revocs.d" / f"{self.fingerprint}.rev").read_text()
        return (
            self.gpg("--import", data=text.replace(":-----", "-----").encode()).decode()
            + self.gpg("--armor", "--export").decode()
        )

    def end(self) -> None:
        subprocess.run(["gpgconf", "--homedir", str(self.folder), "--kill", "all"], check=False, capture_output=True)


@pytest.fixture(scope="module")
def signers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Signer]]:
    folder = tmp_path_factory.mktemp("keys")
    made: dict[str, Signer] = {}

    def signer(name: str, **changes: Any) -> Signer:
        if name not in made:
            made[name] = Signer(folder / name, **changes)
        return made[name]

    yield signer
    for each in made.values():
        each.end()


def signed(
    host: Host, signer: Signer, version: str = "1.33.9", signature: bytes | None = None, **changes: Any
) -> Wanted:
    data = program(version)
    host.mirror.files[f"/{version}.sig"] = signer.sign(data) if signature is None else signature
    artifact = host.mirror.serve(
        f"/{version}/kubectl", data, path="kubectl", signature_url=f"{host.mirror.url}/{version}.sig"
    )
    given = {"artifacts": (artifact,), "signing_key": signer.key, "fingerprint": signer.fingerprint, **changes}
    return dataclasses.replace(host.wanted(version), **given)


@needs_gpg
class TestSignature:
    def test_good_one(self, host: Host, signers: Callable[..., Signer]) -> None:
        outcome = host.tool(signed(host, signers("good"))).run()
        assert host.says() == "Version: v1.33.9"
        assert (outcome.key_expires, host.warnings) == ("", [])
        assert not (host.base / ".work").exists()

    def refused(self, host: Host, wanted: Wanted, words: str) -> str:
        with pytest.raises(ToolError, match=words) as caught:
            host.tool(wanted).run()
        assert host.folders() == set()
        assert not (host.base / "current").exists()
        return str(caught.value)

    def test_tampered_signature(self, host: Host, signers: Callable[..., Signer]) -> None:
        signer = signers("good")
        signature = bytearray(signer.sign(program("1.33.9")))
        signature[-1] ^= 1
        wanted = signed(host, signer, signature=bytes(signature))
        text = self.refused(host, wanted, "gpg says BADSIG")
        for word in (
            f"{host.mirror.url}/1.33.9.sig",
            sha256(bytes(signature)),
            wanted.artifacts[0].sha256,
            signer.fingerprint,
        ):
            assert word in text

    def test_signature_of_another_file(self, host: Host, signers: Callable[..., Signer]) -> None:
        signer = signers("good")
        self.refused(host, signed(host, signer, signature=signer.sign(b"another")), "gpg says BADSIG")

    def test_another_key(self, host: Host, signers: Callable[..., Signer]) -> None:
        other = signers("other").sign(program("1.33.9"))
        self.refused(host, signed(host, signers("good"), signature=other), "made by another key .* gpg says NO_PUBKEY")

    def test_key_that_is_not_the_pinned_one(self, host: Host, signers: Callable[..., Signer]) -> None:
        good, other = signers("good"), signers("other")
        wanted = dataclasses.replace(signed(host, other), fingerprint=good.fingerprint)
        self.refused(host, wanted, f"has the fingerprint {other.fingerprint}, pinned is {good.fingerprint}")
        assert host.mirror.requests == []

    def test_two_keys_in_one_block(self, host: Host, signers: Callable[..., Signer]) -> None:
        good, other = signers("good"), signers("other")
        wanted = dataclasses.replace(signed(host, good), signing_key=good.key + other.key)
        self.refused(host, wanted, "2 keys in it instead of one")

    def test_no_key(self, host: Host, signers: Callable[..., Signer]) -> None:
        wanted = dataclasses.replace(signed(host, signers("good")), signing_key="nothing")
        self.refused(host, wanted, "0 keys in it instead of one")

    def test_missing_signature(self, host: Host, signers: Callable[..., Signer]) -> None:
        wanted = signed(host, signers("good"))
        del host.mirror.files["/1.33.9.sig"]
        self.refused(host, wanted, r"no signature: .*/1.33.9.sig: the server says 404")

    @pytest.mark.parametrize("signature", [b"", b"not a signature", b"<html>" + b"x" * 70000])
    def test_something_else_in_its_place(self, host: Host, signers: Callable[..., Signer], signature: bytes) -> None:
        self.refused(host, signed(host, signers("good"), signature=signature), "NODATA|no good signature|longer than")

    def test_key_in_place_of_the_signature(self, host: Host, signers: Callable[..., Signer]) -> None:
        signer = signers("good")
        self.refused(
            host, signed(host, signer, signature=signer.gpg("--export")), "NODATA|UNEXPECTED|no good signature"
        )

    def test_signed_message_in_place_of_the_signature(self, host: Host, signers: Callable[..., Signer]) -> None:
        """A good signature of something else, with that thing in it."""
        signer = signers("good")
        inline = signer.gpg("--sign", data=b"something else")
        self.refused(host, signed(host, signer, signature=inline), "gpg|signature")

    def test_good_and_bad_together(self, host: Host, signers: Callable[..., Signer]) -> None:
        data = program("1.33.9")
        both = signers("good").sign(data) + signers("other").sign(data)
        self.refused(host, signed(host, signers("good"), signature=both), "NO_PUBKEY|no good signature")

    def test_expired_signature(self, host: Host, signers: Callable[..., Signer]) -> None:
        signer = signers("good")
        short = signer.sign(program("1.33.9"), "--default-sig-expire", "seconds=1")
        time.sleep(2.1)
        self.refused(host, signed(host, signer, signature=short), "signature has expired.*gpg says EXPSIG")

    def test_expired_key_is_refused_before_the_download(self, host: Host, signers: Callable[..., Signer]) -> None:
        signer = signers("expired", expires="20200601T000000", when="20200101T000000")
        wanted = signed(host, signer)
        self.refused(host, wanted, f"signing key {signer.fingerprint} of kubectl has expired on 2020-0[56]-")
        assert host.mirror.requests == []

    def test_key_that_expires_before_gpg_looks(
        self, host: Host, signers: Callable[..., Signer], tmp_path: Path
    ) -> None:
        """The clock that gpg sees is moved; it still ends with status 0."""
        signer = signers("short", expires="1y")
        wrapper = tmp_path / "gpg"
        wrapper.write_text(f'#!/bin/sh\nexec {GPG} --faked-system-time 20400101T000000 "$@"\n')
        wrapper.chmod(0o755)
        wanted = signed(host, signer)
        with pytest.raises(ToolError, match=r"has expired|gpg says EXPKEYSIG"):
            host.tool(wanted, gpg=lambda: str(wrapper)).run()
        run = functools.partial(pinned_tool.run_program, environment={"LC_ALL": "C"}, folder="/", seconds=30)
        keyring = openpgp.Keyring(str(wrapper), str(tmp_path / "ring"), run)
        keyring.take(signer.key)
        (tmp_path / "file").write_bytes(program("1.33.9"))
        (tmp_path / "sig").write_bytes(host.mirror.files["/1.33.9.sig"])
        with pytest.raises(openpgp.SignatureError, match="gpg says EXPKEYSIG"):
            keyring.verify(str(tmp_path / "sig"), str(tmp_path / "file"), signer.fingerprint)

    def test_revoked_key(self, host: Host, signers: Callable[..., Signer]) -> None:
        signer = signers("revoked")
        signature = signer.sign(program("1.33.9"))
        wanted = signed(host, signer, signature=signature, signing_key=signer.revoke())
        self.refused(host, wanted, "was revoked")

    def test_warning_comes_on_each_run_without_gpg_or_network(
        self, host: Host, signers: Callable[..., Signer], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        wanted = signed(host, signers("month", expires="30d"))
        assert host.tool(wanted).run().key_expires
        host.mirror.requests.clear()
        assert not host.tool(wanted, gpg=lambda: None).run().changed
        assert host.mirror.requests == []
        assert len(host.warnings) == 2
        assert "in 29 days" in host.warnings[1] or "in 30 days" in host.warnings[1]
        host.warnings.clear()
        host.tool(dataclasses.replace(wanted, warn_days=10)).run()
        assert host.warnings == []
        later = time.time() + 40 * 86400
        monkeypatch.setattr(time, "time", lambda: later)
        assert not host.tool(wanted).run().changed
        assert "has expired" in host.warnings[0]
        assert "another version is refused" in host.warnings[0]
        with pytest.raises(ToolError, match="has expired"):
            host.tool(signed(host, signers("month"), "1.33.10")).run()
        assert host.says() == "Version: v1.33.9"

    def test_renewed_key_is_read_once(self, host: Host, signers: Callable[..., Signer]) -> None:
        signer = signers("renewed", expires="30d")
        wanted = signed(host, signer)
        host.tool(wanted).run()
        signer.gpg("--quick-set-expire", signer.fingerprint, "2y")
        renewed = dataclasses.replace(wanted, signing_key=signer.gpg("--armor", "--export").decode())
        host.warnings.clear()
        assert not host.tool(renewed).run().changed
        assert not host.tool(renewed, gpg=lambda: None).run().changed
        assert host.warnings == []

    def test_without_gpg(self, host: Host, signers: Callable[..., Signer]) -> None:
        with pytest.raises(ToolError, match="gpg is not installed") as caught:
            host.tool(signed(host, signers("good")), gpg=lambda: None).run()
        assert caught.value.program == "gpg"
        assert host.mirror.requests == []

    def test_key_of_the_role(self, tmp_path: Path) -> None:
        """What the role ships is AWS's key, and has not expired unnoticed."""
        run = functools.partial(pinned_tool.run_program, environment={"LC_ALL": "C"}, folder="/", seconds=30)
        keyring = openpgp.Keyring(GPG, str(tmp_path / "ring"), run)
        key = keyring.take((ROOT / "roles/aws_cli/files/aws-cli-team.asc").read_text())
        assert key.fingerprint == "FB5DB77FD5C118B80511ADA8A6310ACC4672475C"
        assert key.expires is not None
        assert openpgp.day(key.expires) >= "2027-07-01"


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("GOODSIG 1 x\nVALIDSIG AAAA 1 1 0 4 0 22 8 00 FFFF", ""),
        ("GOODSIG 1 x\nVALIDSIG FFFF 1 1 0 4 0 22 8 00 AAAA", "made by AAAA, pinned is FFFF"),
        ("EXPKEYSIG 1 x\nVALIDSIG FFFF 1 1 0 4 0 22 8 00 FFFF", "gpg says EXPKEYSIG"),
        ("REVKEYSIG 1 x\nVALIDSIG FFFF 1 1 0 4 0 22 8 00 FFFF", "gpg says REVKEYSIG"),
        ("EXPSIG 1 x\nVALIDSIG FFFF 1 1 0 4 0 22 8 00 FFFF", "gpg says EXPSIG"),
        ("GOODSIG 1 x", "no good signature"),
        ("VALIDSIG FFFF 1 1 0 4 0 22 8 00 FFFF", "no good signature"),
        ("GOODSIG 1 x\nVALIDSIG FFFF 1 1 0 4 0 22 8 00 FFFF\nBADSIG 2 y", "gpg says BADSIG"),
        ("", "no good signature"),
    ],
)
def test_what_gpg_reports(tmp_path: Path, lines: str, words: str) -> None:
    """Whatever its exit status is: it is 0 for every one of these."""
    out = "".join(f"[GNUPG:] {line}\n" for line in lines.splitlines())
    keyring = openpgp.Keyring("gpg", str(tmp_path / "ring"), lambda _: (0, out, ""))
    if not words:
        keyring.verify("s", "f", "FFFF")
        return
    with pytest.raises(openpgp.SignatureError, match=words):
        keyring.verify("s", "f", "FFFF")


# Two at once, and a sudden end


def test_second_run_is_told_who_is_at_work(host: Host) -> None:
    host.run("1.33.9")
    tool = host.tool(host.wanted("1.33.10"))
    with (
        tool._locked(),
        pytest.raises(ToolError, match=rf"at work on kubectl: process {os.getpid()} of .* since 20.* version 1.33.10"),
    ):
        host.run("1.33.9")
    assert not host.run("1.33.9").changed


def killed_at(number: int, tool: PinnedTool) -> bool:
    """Run in a process of its own that dies at its n-th call that touches the disk; whether it came to that."""
    child = os.fork()
    if child == 0:
        calls = 0

        def dying(real: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any, **changes: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*arguments, **changes)

            return call

        for name in ("rename", "symlink", "unlink", "mkdir", "chmod", "fchmod", "fsync", "rmdir", "open"):
            setattr(os, name, dying(getattr(os, name)))
        code = 1
        try:
            tool.run()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL), status
    return status != 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_killed_at_every_step_of_an_upgrade(host: Host, tmp_path: Path) -> None:
    """At each call that changes the disk: the command goes on working, `current` never dangles, the next run finishes."""
    host.run("1.33.8")
    host.run("1.33.9")
    kept = tmp_path / "kept"
    shutil.copytree(host.root, kept, symlinks=True)
    data = archive_of({"a/kubectl": program("1.33.10"), "a/lib/x": b"x" * 3000}, "tar.gz")
    artifact = host.mirror.serve("/a", data, format="tar.gz", strip=1)
    wanted = dataclasses.replace(host.wanted("1.33.10"), artifacts=(artifact,))
    at_rest, ended = threading.Lock(), threading.Event()
    dangled: list[str] = []

    def watch() -> None:
        while not ended.is_set():
            with at_rest:
                if not (host.base / "current" / "kubectl").exists():
                    dangled.append(str((host.base / "current").readlink()))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    seen: list[str] = []
    for number in range(1, 400):
        with at_rest:
            shutil.rmtree(host.root)
            shutil.copytree(kept, host.root, symlinks=True)
        killed = killed_at(number, host.tool(wanted))
        seen.append(host.says())
        assert seen[-1] in ("Version: v1.33.9", "Version: v1.33.10")
        host.tool(wanted).run()
        assert host.says() == "Version: v1.33.10"
        assert host.folders() == {"1.33.9", "1.33.10"}
        assert not host.tool(wanted).run().changed
        if not killed:
            break
    ended.set()
    watcher.join()
    assert dangled == []
    assert number > 30
    assert len(set(seen)) == 2, "kills before the switch and kills after it"


def test_link_is_complete_while_versions_come_and_go(host: Host) -> None:
    host.run("1.33.9")
    host.run("1.33.10")
    stop = threading.Event()
    wrong: list[BaseException] = []

    def use() -> None:
        while not stop.is_set():
            try:
                assert (host.base / "current" / "kubectl").read_bytes().startswith(b"#!/bin/sh")
            except (OSError, AssertionError) as error:
                wrong.append(error)

    user = threading.Thread(target=use)
    user.start()
    for _ in range(20):
        host.run("1.33.9")
        host.run("1.33.10")
    path = (host.base / "current").resolve() / "completion.bash"
    path.write_text("altered")
    host.run("1.33.10")
    stop.set()
    user.join()
    assert wrong == []


# The module


def module_run(capsys: pytest.CaptureFixture[str], **params: Any) -> dict[str, Any]:
    check, diff = params.pop("check", False), params.pop("diff", False)
    arguments = {**params, "_ansible_check_mode": check, "_ansible_diff": diff, "_ansible_remote_tmp": "/tmp"}
    with patch_module_args(arguments), contextlib.suppress(SystemExit):
        pinned_tool.main()
    answer: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return answer


def test_module(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = host.wanted("1.33.9")
    params = {
        "name": "kubectl",
        "version": "1.33.9",
        "root": str(host.root),
        "artifacts": [{"url": wanted.artifacts[0].url, "sha256": wanted.artifacts[0].sha256, "path": "kubectl"}],
        "links": {f"{host.bin}/kubectl": "kubectl"},
    }
    planned = module_run(capsys, **params, check=True, diff=True)
    assert planned["changed"]
    assert planned["diff"]["before"] == ""
    assert planned["diff"]["after"] == f"kubectl 1.33.9\n{host.bin}/kubectl -> kubectl\n"
    done = module_run(capsys, **params)
    assert (done["changed"], done["version"], done["previous_version"]) == (True, "1.33.9", None)
    again = module_run(capsys, **params, diff=True)
    assert not again["changed"]
    assert again["diff"]["before"] == again["diff"]["after"]
    params["artifacts"] = [{"url": wanted.artifacts[0].url, "sha256": "0" * 64, "path": "kubectl"}]
    failed = module_run(capsys, **params)
    assert failed["failed"]
    assert f"expected {'0' * 64}" in failed["msg"]


def test_documentation_names_every_option() -> None:
    import yaml

    documented = yaml.safe_load(pinned_tool.DOCUMENTATION)["options"]
    assert set(documented) == set(pinned_tool.ARGUMENT_SPEC)
    for name, option in pinned_tool.ARGUMENT_SPEC.items():
        assert documented[name].get("default") == option.get("default"), name
        assert set(documented[name].get("suboptions", {})) == set(option.get("options", {})), name
