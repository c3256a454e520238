# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Versions of a command-line tool, each in a folder of its own, and one link that says which of them is used.

    <root>/<name>/1.33.9/             never changed once it has this name; .manifest.json in it says what it holds
    <root>/<name>/1.33.9.new/         an installation at work, or what a killed one left
    <root>/<name>/current             the link; replaced by a rename, so that it always leads to a complete version
    <root>/<name>/.state.json         versions in the order of their use, links that were made, the key's expiry
    <root>/<name>/.work/              downloads

A version that was damaged, or whose making changed, is made again as 1.33.9~2 beside the old one: a folder cannot be
replaced by a rename, and a command that is running goes on with the files it has.
Standard library only and Python 3.9 syntax, because this runs on managed hosts.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any, Callable

from ansible_collections.nemo.platform.plugins.module_utils import archives, downloads, openpgp
from ansible_collections.nemo.platform.plugins.module_utils.archives import ArchiveError
from ansible_collections.nemo.platform.plugins.module_utils.downloads import DownloadError
from ansible_collections.nemo.platform.plugins.module_utils.openpgp import SignatureError

MANIFEST = ".manifest.json"
STATE = ".state.json"
WORK = ".work"
NEW = ".new"
SIGNATURE_LIMIT_BYTES = 64 << 10
SECONDS_A_DAY = 86400
FULL = (errno.ENOSPC, errno.EDQUOT)
VERSION = re.compile(r"[0-9A-Za-z][0-9A-Za-z.+_-]*")

# argv, environment, folder, seconds -> status, output, error output
Run = Callable[[Sequence[str], Mapping[str, str], str, float], "tuple[int, str, str]"]


class ToolError(Exception):
    """The tool cannot be brought to its state; `program` is one that the host lacks."""

    def __init__(self, message: str, program: str | None = None) -> None:
        super().__init__(message)
        self.program = program


@dataclass(frozen=True)
class Artifact:
    """One download of a version, and what becomes of it."""

    url: str
    sha256: str
    format: str = "file"
    path: str = ""
    strip: int = 0
    only: tuple[str, ...] = ()
    signature_url: str = ""


@dataclass(frozen=True)
class SmallFile:
    """A text that belongs to a version: written by us, or made by the tool itself."""

    path: str
    content: str = ""
    command: tuple[str, ...] = ()
    executable: bool = False


@dataclass(frozen=True)
class Wanted:
    """A version of a tool."""

    name: str
    version: str
    root: str
    artifacts: tuple[Artifact, ...]
    files: tuple[SmallFile, ...] = ()
    links: Mapping[str, str] = field(default_factory=dict)
    probe: tuple[str, ...] = ()
    expect: str = ""
    keep: int = 1
    signing_key: str = ""
    fingerprint: str = ""
    warn_days: int = 60

    @property
    def recipe(self) -> str:
        """What the version is made of; where its parts come from does not matter."""
        parts = {
            "artifacts": [[a.sha256, a.format, a.path, a.strip, a.only, bool(a.signature_url)] for a in self.artifacts],
            "files": [[f.path, f.content, f.command, f.executable] for f in self.files],
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@dataclass
class Outcome:
    """What was done, or would be in check mode."""

    previous: str | None = None
    folder: str = ""
    installed: bool = False
    switched: bool = False
    damaged: str = ""
    downloaded: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    key_expires: str = ""

    @property
    def changed(self) -> bool:
        return self.installed or self.switched or bool(self.links or self.removed)


def read_json(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            data = json.load(file)
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def write_json(path: str, data: Mapping[str, Any]) -> None:
    """Replace a file by a complete one."""
    temporary = f"{path}{NEW}"
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(data, file, indent=1, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())
    os.rename(temporary, path)


def flush(folder: str) -> None:
    """Everything on the folder's file system to disk: one call, where a flush for each of thousands of files takes long."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if ctypes.CDLL(None).syncfs(descriptor) != 0:
            os.sync()
    except (AttributeError, OSError):  # no syncfs in this C library
        os.sync()
    finally:
        os.close(descriptor)


def flush_folder(folder: str) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def link_at(path: str) -> str | None:
    try:
        return os.readlink(path)
    except OSError:
        return None


def replace_link(path: str, target: str) -> None:
    """One rename: at every moment the link is the old one or the new one."""
    temporary = os.path.join(os.path.dirname(path), f".{os.path.basename(path)}{NEW}")
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary)
    os.symlink(target, temporary)
    os.rename(temporary, path)
    flush_folder(os.path.dirname(path))


def identity(path: str) -> list[int]:
    """What differs as soon as somebody wrote to a file, without reading it."""
    found = os.lstat(path)
    return [found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_mode, found.st_uid]


def content_of(path: str) -> str:
    """A link's target, a file's digest."""
    target = link_at(path)
    return f"-> {target}" if target is not None else downloads.sha256_of(path)


def inventory_of(folder: str) -> dict[str, list[Any]]:
    """Every file and link below a folder: its content and its identity."""
    found: dict[str, list[Any]] = {}
    for here, folders, files in os.walk(folder):
        for name in files + [name for name in folders if os.path.islink(os.path.join(here, name))]:
            path = os.path.join(here, name)
            relative = os.path.relpath(path, folder)
            if relative != MANIFEST:
                found[relative] = [content_of(path), identity(path)]
    return found


class PinnedTool:
    """One run for one tool."""

    def __init__(
        self,
        wanted: Wanted,
        run: Run,
        warn: Callable[[str], None],
        gpg: Callable[[], str | None],
        limits: downloads.Limits | None = None,
        lock_timeout: float = 120,
        check_mode: bool = False,
    ) -> None:
        self.wanted = wanted
        self.base = os.path.join(wanted.root, wanted.name)
        self.current = os.path.join(self.base, "current")
        self.outcome = Outcome()
        self.check_mode = check_mode
        self._run = run
        self._warn = warn
        self._gpg = gpg
        self._limits = limits or downloads.Limits()
        self._lock_timeout = lock_timeout
        self._state: dict[str, Any] = {}

    # The run

    def run(self) -> Outcome:
        os.umask(0o022)
        self._check_request()
        if self.check_mode:
            self._bring_about()
            return self.outcome
        try:
            os.makedirs(self.base, mode=0o755, exist_ok=True)
            with self._locked():
                self._clear()
                try:
                    self._bring_about()
                except OSError as error:
                    if error.errno in FULL:
                        shutil.rmtree(os.path.join(self.base, WORK), ignore_errors=True)
                    raise
                finally:
                    self._clear()
        except OSError as error:
            if error.errno in FULL:
                room = shutil.disk_usage(self.wanted.root).free if os.path.isdir(self.wanted.root) else 0
                raise ToolError(
                    f"{error.filename or self.base}: {error.strerror}: {self.wanted.name} {self.wanted.version} was not"
                    f" installed, {self._used()} is used as before ({downloads.megabytes(room)} free)"
                ) from error
            raise ToolError(f"{error.filename or self.base}: {error.strerror}") from error
        return self.outcome

    def _bring_about(self) -> None:
        self._state = read_json(os.path.join(self.base, STATE))
        self._check_links()
        used = self._used_folder()
        self.outcome.previous = self._version_of(used) if used else None
        folder = self._usable(used)
        if folder is None:
            folder = self._free_name()
            self.outcome.installed = True
            if not self.check_mode:
                self._install(folder)
        elif used != folder and not self.check_mode:
            self._probe(os.path.join(self.base, folder))
        self.outcome.folder = os.path.join(self.base, folder)
        self._watch_key()
        if used != folder:
            self.outcome.switched = True
            if not self.check_mode:
                replace_link(self.current, folder)
        self._make_links()
        self._prune(folder, used)

    def _check_request(self) -> None:
        wanted = self.wanted
        if not VERSION.fullmatch(wanted.version) or wanted.version.endswith(NEW) or wanted.version == "current":
            raise ToolError(f"version is {wanted.version!r}; allowed are letters, digits and . + - _, as in 1.33.9")
        if not VERSION.fullmatch(wanted.name):
            raise ToolError(f"name is {wanted.name!r}; allowed are letters, digits and . + - _")
        for artifact in wanted.artifacts:
            if not re.fullmatch("[0-9a-f]{64}", artifact.sha256):
                raise ToolError(f"sha256 of {artifact.url} is {artifact.sha256!r}; allowed are 64 hexadecimal digits")
            if artifact.signature_url and not wanted.signing_key:
                raise ToolError(f"{artifact.url} has a signature_url, and there is no signing_key to check it with")
        if wanted.signing_key and not re.fullmatch("[0-9A-F]{40}", wanted.fingerprint):
            raise ToolError(f"signing_key_fingerprint is {wanted.fingerprint!r}; allowed are 40 hexadecimal digits")
        inside = [a.path for a in wanted.artifacts] + [f.path for f in wanted.files] + list(wanted.links.values())
        for path in inside:
            if path.startswith("/") or ".." in path.split("/"):
                raise ToolError(f"path {path!r} leads out of the version's folder")
        for path in wanted.links:
            if not path.startswith("/") or os.path.normpath(path) != path:
                raise ToolError(f"link {path!r} is not an absolute path")

    # The lock

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        path = os.path.join(self.base, ".lock")
        with open(path, "a+", encoding="utf-8") as lock:
            self._take(lock)
            lock.truncate(0)
            who = os.environ.get("SUDO_USER") or f"uid {os.getuid()}"
            since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
            lock.write(f"process {os.getpid()} of {who} since {since}, for version {self.wanted.version}")
            lock.flush()
            try:
                yield
            finally:
                lock.truncate(0)

    def _take(self, lock: IO[str]) -> None:
        deadline = time.monotonic() + self._lock_timeout
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    lock.seek(0)
                    raise ToolError(
                        f"{lock.name}: another run is at work on {self.wanted.name}: {lock.read() or 'unknown'};"
                        f" waited {self._lock_timeout:g} s. The lock ends with that process."
                    ) from None
                time.sleep(min(0.2, self._lock_timeout))

    def _clear(self) -> None:
        """What a run left, but for a download of this version, which goes on where it ended."""
        used = link_at(self.current)
        for name in os.listdir(self.base):
            if name.endswith(NEW) and name != used:
                path = os.path.join(self.base, name)
                if os.path.isdir(path) and not os.path.islink(path):
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    os.unlink(path)
        work = os.path.join(self.base, WORK)
        goes_on = {f"{artifact.sha256}.part" for artifact in self.wanted.artifacts}
        if os.path.isdir(work):
            for name in os.listdir(work):
                path = os.path.join(work, name)
                if os.path.isdir(path):
                    shutil.rmtree(path, ignore_errors=True)
                elif name not in goes_on:
                    os.unlink(path)
            if not os.listdir(work):
                os.rmdir(work)

    # What is there

    def _used_folder(self) -> str | None:
        """The folder that the link leads to, if it is one of ours and there."""
        target = link_at(self.current)
        if target is None:
            if os.path.lexists(self.current):
                raise ToolError(f"{self.current}: is not a link; move it away")
            return None
        return target if "/" not in target and os.path.isdir(os.path.join(self.base, target)) else None

    def _used(self) -> str:
        used = link_at(self.current)
        return f"version {self._version_of(used)}" if used else "no version"

    def _folders(self) -> list[str]:
        """Every complete version."""
        if not os.path.isdir(self.base):
            return []
        names = [name for name in os.listdir(self.base) if not name.endswith(NEW)]
        return sorted(
            name for name in names if os.path.isfile(os.path.join(self.base, name, MANIFEST)) and name != "current"
        )

    def _manifest(self, folder: str) -> dict[str, Any]:
        return read_json(os.path.join(self.base, folder, MANIFEST))

    def _version_of(self, folder: str) -> str:
        return str(self._manifest(folder).get("version", folder))

    def _usable(self, used: str | None) -> str | None:
        """The folder that holds what is wanted, unharmed; the one in use first."""
        for folder in sorted(self._folders(), key=lambda name: (name != used, name)):
            manifest = self._manifest(folder)
            if (manifest.get("version"), manifest.get("recipe")) != (self.wanted.version, self.wanted.recipe):
                continue
            harm = self._harm(folder, manifest)
            if not harm:
                return folder
            self.outcome.damaged = self.outcome.damaged or os.path.join(self.base, folder, harm)
        return None

    def _harm(self, folder: str, manifest: Mapping[str, Any]) -> str:
        """The first file that is not what was installed. Only a file that somebody touched is read."""
        files: dict[str, list[Any]] = manifest.get("files", {})
        touched = False
        for relative, (content, seen) in files.items():
            path = os.path.join(self.base, folder, relative)
            try:
                now = identity(path)
                if now == seen:
                    continue
                if now[4:] != seen[4:] or content_of(path) != content:
                    return relative
            except OSError:
                return relative
            files[relative][1], touched = now, True
        if touched and not self.check_mode:
            write_json(os.path.join(self.base, folder, MANIFEST), {**manifest, "files": files})
        return "" if files else MANIFEST

    def _free_name(self) -> str:
        version, number = self.wanted.version, 1
        name = version
        while os.path.lexists(os.path.join(self.base, name)):
            number += 1
            name = f"{version}~{number}"
        return name

    # A new version

    def _install(self, folder: str) -> None:
        work = os.path.join(self.base, WORK)
        os.makedirs(work, mode=0o700, exist_ok=True)
        keyring = self._trusted_keyring(work)
        files = [self._download(artifact, work) for artifact in self.wanted.artifacts]
        for artifact, file in zip(self.wanted.artifacts, files):
            if artifact.signature_url:
                assert keyring is not None
                self._verify(artifact, file, keyring, work)
        staging = os.path.join(self.base, f"{folder}{NEW}")
        os.mkdir(staging, 0o755)
        try:
            for artifact, file in zip(self.wanted.artifacts, files):
                self._unpack(artifact, file, staging)
        except (ArchiveError, DownloadError) as error:
            raise ToolError(f"{error}; {self._used()} is used as before") from error
        for small in self.wanted.files:
            if not small.command:
                self._write(staging, small, small.content)
        self._probe(staging)
        for small in self.wanted.files:
            if small.command:
                self._write(staging, small, self._ask(staging, small.command))
        manifest = {
            "version": self.wanted.version,
            "recipe": self.wanted.recipe,
            "artifacts": [[artifact.url, artifact.sha256] for artifact in self.wanted.artifacts],
            "files": inventory_of(staging),
        }
        write_json(os.path.join(staging, MANIFEST), manifest)
        flush(self.base)
        os.rename(staging, os.path.join(self.base, folder))
        flush_folder(self.base)
        for file in files:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(file)

    def _download(self, artifact: Artifact, work: str) -> str:
        """The file with the right digest. One that was begun by an earlier run and is wrong is fetched anew, once."""
        path = os.path.join(work, f"{artifact.sha256}.part")
        begun = os.path.exists(path)
        downloader = downloads.Downloader(self._limits)
        while True:
            found = downloads.sha256_of(path) if begun else ""
            if found != artifact.sha256:
                try:
                    downloader.fetch(artifact.url, path)
                except DownloadError as error:
                    raise ToolError(f"{error}; {self._used()} is used as before") from error
                found = downloads.sha256_of(path)
            if found == artifact.sha256:
                self.outcome.downloaded.append(artifact.url)
                return path
            os.unlink(path)
            if not begun:
                raise ToolError(
                    f"{artifact.url}: sha256 is {found}, expected {artifact.sha256}: not the file that was pinned."
                    f" It was deleted, neither unpacked nor run; {self._used()} is used as before"
                )
            begun = False

    def _trusted_keyring(self, work: str) -> openpgp.Keyring | None:
        """The keyring, if anything is signed; an error before the download if the key is not good today."""
        if not any(artifact.signature_url for artifact in self.wanted.artifacts):
            return None
        keyring, key = self._read_key(os.path.join(work, "gnupg"))
        self._require_fingerprint(key)
        state = openpgp.INVALID_KEYS.get(key.state)
        if key.expires is not None and key.expires <= time.time():
            state = f"has expired on {openpgp.day(key.expires)}"
        if state:
            raise ToolError(
                f"the signing key {key.fingerprint} of {self.wanted.name} {state}: nothing was downloaded,"
                f" {self._used()} is used as before. Take the renewed key from the publisher"
            )
        self._remember_key(key)
        return keyring

    def _require_fingerprint(self, key: openpgp.Key) -> None:
        if key.fingerprint != self.wanted.fingerprint:
            raise ToolError(
                f"the signing key has the fingerprint {key.fingerprint}, pinned is {self.wanted.fingerprint}: nothing was"
                f" downloaded, {self._used()} is used as before"
            )

    def _read_key(self, folder: str) -> tuple[openpgp.Keyring, openpgp.Key]:
        program = self._gpg()
        if program is None:
            raise ToolError(
                f"gpg is not installed, and {self.wanted.name} is verified by it; nothing was changed", "gpg"
            )

        def run(argv: list[str]) -> tuple[int, str, str]:
            return self._run(argv, {**os.environ, "LC_ALL": "C"}, os.path.dirname(folder), 60)

        try:
            keyring = openpgp.Keyring(program, folder, run)
            return keyring, keyring.take(self.wanted.signing_key)
        except SignatureError as error:
            raise ToolError(str(error)) from error

    def _verify(self, artifact: Artifact, file: str, keyring: openpgp.Keyring, work: str) -> None:
        path = os.path.join(work, "signature")
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        end = f"{artifact.url} was neither unpacked nor run; {self._used()} is used as before"
        try:
            downloads.Downloader(self._limits).fetch(artifact.signature_url, path, SIGNATURE_LIMIT_BYTES)
            keyring.verify(path, file, self.wanted.fingerprint)
        except DownloadError as error:
            raise ToolError(f"no signature: {error}; {end}") from error
        except SignatureError as error:
            digest = downloads.sha256_of(path)
            os.unlink(file)
            raise ToolError(
                f"{artifact.signature_url} (sha256 {digest}): {error}. Expected is a signature of the file with sha256"
                f" {artifact.sha256} by the key {self.wanted.fingerprint}; {end}"
            ) from error

    def _unpack(self, artifact: Artifact, file: str, staging: str) -> None:
        place = os.path.join(staging, artifact.path)
        if artifact.format == "file":
            os.makedirs(os.path.dirname(place), mode=0o755, exist_ok=True)
            os.rename(file, place)
            os.chmod(place, 0o755)  # noqa: S103 - a command for everybody
            return
        with archives.opened(file, artifact.format) as archive:
            members = archives.look_through(archive, artifact.url, artifact.strip, artifact.only)
            downloads.require_space(staging, archives.size_of(members), f"the content of {artifact.url}")
            os.makedirs(place, mode=0o755, exist_ok=True)
            archives.unpack(archive, artifact.url, members, place)

    @staticmethod
    def _write(staging: str, small: SmallFile, content: str) -> None:
        path = os.path.join(staging, small.path)
        os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
        with open(path, "w", encoding="utf-8") as file:
            file.write(content)
            os.fchmod(file.fileno(), 0o755 if small.executable else 0o644)

    def _ask(self, folder: str, command: Sequence[str]) -> str:
        """What the tool says, run from its folder, with a home of its own and nothing of the caller's environment."""
        home = os.path.join(self.base, WORK, "home")
        os.makedirs(home, mode=0o700, exist_ok=True)
        environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": home, "LC_ALL": "C.UTF-8", "TMPDIR": home}
        argv = [os.path.join(folder, command[0]), *command[1:]]
        try:
            code, out, err = self._run(argv, environment, folder, 120)
        except OSError as error:
            code, out, err = -1, "", str(error.strerror)
        if code != 0:
            said = " ".join((err or out).split())
            raise ToolError(f"'{' '.join(argv)}' ends with status {code}: {said}; {self._used()} is used as before")
        return out

    def _probe(self, folder: str) -> None:
        """The version says of itself what it is, before anybody uses it."""
        if self.wanted.probe:
            said = self._ask(folder, self.wanted.probe)
            if not re.search(self.wanted.expect, said):
                raise ToolError(
                    f"{os.path.join(folder, self.wanted.probe[0])} says {' '.join(said.split())!r}, expected is"
                    f" {self.wanted.expect!r}; {self._used()} is used as before"
                )

    # The key's end

    def _remember_key(self, key: openpgp.Key) -> None:
        digest = hashlib.sha256(self.wanted.signing_key.encode()).hexdigest()
        self._state["key"] = {"digest": digest, "expires": key.expires, "fingerprint": key.fingerprint}

    def _watch_key(self) -> None:
        """Warn of the end of the key's validity, on each run; the key is read once and its date kept."""
        if not self.wanted.signing_key:
            return
        digest = hashlib.sha256(self.wanted.signing_key.encode()).hexdigest()
        known = self._state.get("key", {})
        if known.get("digest") != digest:
            if self.check_mode or self._gpg() is None:
                return
            work = os.path.join(self.base, WORK)
            os.makedirs(work, mode=0o700, exist_ok=True)
            _, key = self._read_key(os.path.join(work, "gnupg"))
            self._require_fingerprint(key)
            self._remember_key(key)
            self._save()
        expires = self._state["key"]["expires"]
        if expires is None:
            return
        self.outcome.key_expires = openpgp.day(expires)
        left = int((expires - time.time()) // SECONDS_A_DAY)
        what = f"the signing key {self.wanted.fingerprint} of {self.wanted.name}"
        if left < 0:
            self._warn(
                f"{what} has expired on {openpgp.day(expires)}: what is installed stays, another version is refused"
            )
        elif left < self.wanted.warn_days:
            self._warn(f"{what} expires on {openpgp.day(expires)}, in {left} days: take the renewed key before that")

    # Links and old versions

    def _goal(self, path: str) -> str:
        return os.path.join(self.current, self.wanted.links[path])

    def _check_links(self) -> None:
        for path in self.wanted.links:
            if os.path.lexists(path) and not os.path.islink(path):
                raise ToolError(f"{path}: is there and not a link: move it away, or the command would stay another one")

    def _make_links(self) -> None:
        old = [path for path in self._state.get("links", []) if path not in self.wanted.links]
        for path in old:
            if (link_at(path) or "").startswith(f"{self.current}/"):
                self.outcome.links.append(path)
                if not self.check_mode:
                    os.unlink(path)
        for path in self.wanted.links:
            if link_at(path) != self._goal(path):
                self.outcome.links.append(path)
                if not self.check_mode:
                    os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
                    replace_link(path, self._goal(path))

    def _prune(self, folder: str, used: str | None) -> None:
        """Keep what was used before, newest first; a damaged version is none of them."""
        there = self._folders()
        before = [name for name in [used, *self._state.get("history", [])] if name in there and name != folder]
        harmed = os.path.relpath(self.outcome.damaged, self.base).split("/")[0] if self.outcome.damaged else ""
        kept = [name for name in dict.fromkeys(before) if name != harmed][: self.wanted.keep]
        for name in there:
            if name not in (folder, *kept):
                self.outcome.removed.append(os.path.join(self.base, name))
                if not self.check_mode:
                    self._remove(name)
        self._state.update(history=[folder, *kept], links=sorted(self.wanted.links))
        if not self.check_mode:
            self._save()

    def _remove(self, name: str) -> None:
        """By a name that nobody takes for a version, so that half a folder is none."""
        dying = os.path.join(self.base, f"{name}{NEW}")
        os.rename(os.path.join(self.base, name), dying)
        shutil.rmtree(dying, ignore_errors=True)

    def _save(self) -> None:
        path = os.path.join(self.base, STATE)
        if read_json(path) != self._state:
            write_json(path, self._state)
