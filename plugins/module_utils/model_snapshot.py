# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A model at one commit in a folder of its own: what is there, what is missing, and how that gets there.

What is under way lies in ``<root>/.partial/<model>/<commit>``: ``parts/`` are beginnings of files, ``files/`` those that are
whole, verified and on disk. The folder takes its place in one rename, with a marker in it that was written last; a file of a
finished snapshot that went bad is replaced by one rename as well. So whatever ends the work, the next one goes on from there.

Standard library only and Python 3.9 syntax, because this runs on managed hosts.
"""

from __future__ import annotations

import errno
import fnmatch
import glob
import hashlib
import http.client
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Callable, NamedTuple

from ansible_collections.nemo.platform.plugins.module_utils.background import WorkError
from ansible_collections.nemo.platform.plugins.module_utils.container_release import (
    replace_file,
    sync_folder,
    utc_now,
)
from ansible_collections.nemo.platform.plugins.module_utils.model_hub import Hub, Passing, RemoteFile, said
from ansible_collections.nemo.platform.plugins.module_utils.progress import Pace, Progress, amount, duration

FORMAT = 1
MARKER = ".nemo-snapshot.json"
REFS = ".nemo-refs.json"
PARTIAL = ".partial"
STATE = "/var/lib/nemo"  # of the releases
CHUNK_BYTES = 1 << 18
HASH_BYTES = 1 << 20
# A try that brought this much is no failure: the next ones begin to count anew.
PROGRESS_BYTES = 1 << 20
# Less than this a second over a whole stall timeout is a server that hangs with an open line.
LEAST_RATE = 1024
CORRUPT_TRIES = 3
PAUSE_LIMIT = 30.0
PROGRESS_SECONDS = 5.0
WEIGHTS = ("*.safetensors",)
# Formats that run code of whoever made them when they are loaded.
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")
FULL_DISK = (errno.ENOSPC, errno.EDQUOT)


class Wanted(NamedTuple):
    repository: str
    revision: str  # a commit
    root: str
    include: tuple[str, ...]
    exclude: tuple[str, ...]


class Found(NamedTuple):
    """A finished snapshot, as far as it is in order."""

    tree: dict[str, RemoteFile]  # everything that the commit has
    wanted: dict[str, RemoteFile]
    bad: dict[str, str]  # path -> what is wrong with it
    extra: list[str]  # files of the snapshot that are not wanted any more
    marker: dict[str, Any]

    @property
    def good(self) -> bool:
        return not self.bad and not self.extra


def folder_of(repository: str) -> str:
    return repository.replace("/", "--")


def check_request(params: Mapping[str, Any]) -> list[str]:
    """Everything wrong with the arguments, one line each. The token's value is in none of them."""
    wrong: list[str] = []

    def need(name: str, good: bool, allowed: str) -> None:
        if not good:
            wrong.append("%s is %r; allowed: %s" % (name, params[name], allowed))

    part = r"[A-Za-z0-9](?:[\w.-]{0,94}[A-Za-z0-9_])?"
    repository = params["repository"]
    named = re.match(r"^%s/%s$" % (part, part), repository, re.ASCII)
    need("repository", bool(named) and not re.search(r"--|\.\.", repository), "owner/name")
    revision = params["revision"]
    ref = re.match(r"^[A-Za-z0-9][\w./-]{0,199}$", revision, re.ASCII)
    need(
        "revision",
        bool(ref) and ".." not in revision,
        "a commit of 40 hexadecimal digits, or the name of a branch or tag",
    )
    need(
        "endpoint",
        bool(re.match(r"^https?://[^\s/?#@]+(/[^\s?#]*)?$", params["endpoint"])),
        "an http:// or https:// address",
    )
    need("path", params["path"].startswith("/"), "an absolute path")
    above = params["mount_point"]
    need("mount_point", not above or os.path.commonpath([above, params["path"]]) == above, "a folder above path")
    need(
        "name",
        not params["name"] or bool(re.match(r"^[\w][\w.-]{0,200}$", params["name"])),
        "letters, digits, _, . and -",
    )
    if params["token"] and not re.match(r"^[\x21-\x7e]+$", params["token"]):
        wrong.append("token has blanks or characters that no token has; allowed: letters, digits and punctuation")
    for name, least in (
        ("timeout", 1), ("stall_timeout", 1), ("retries", 0), ("parallel", 1), ("min_free_disk_mb", 0),
    ):  # fmt: skip
        need(name, params[name] >= least, "%d or more" % least)
    need("include", bool(params["include"]), "one pattern or more")
    return wrong


def is_commit(revision: str) -> bool:
    return bool(re.match(r"^[0-9a-f]{40}$", revision))


def matches(path: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)


def select(tree: Mapping[str, RemoteFile], include: Sequence[str], exclude: Sequence[str]) -> dict[str, RemoteFile]:
    return {path: file for path, file in tree.items() if matches(path, include) and not matches(path, exclude)}


def hasher_of(file: RemoteFile) -> Any:
    if file.sha256:
        return hashlib.sha256()
    # Git names a blob so; the commit's identity is made of these names.
    hasher = hashlib.sha1(usedforsecurity=False)
    hasher.update(b"blob %d\0" % file.size)
    return hasher


def feed(hasher: Any, path: str, keep_on: Callable[[], bool] = lambda: True) -> int:
    """The hasher fed with a file; how many bytes that were."""
    done = 0
    with open(path, "rb", buffering=0) as stream:
        buffer = memoryview(bytearray(HASH_BYTES))
        while keep_on():
            got = stream.readinto(buffer)
            if not got:
                break
            hasher.update(buffer[:got])
            done += got
    return done


def is_file(path: str, size: int) -> bool:
    try:
        return os.path.isfile(path) and not os.path.islink(path) and os.path.getsize(path) == size
    except OSError:
        return False


def is_intact(path: str, file: RemoteFile) -> bool:
    if not is_file(path, file.size):
        return False
    hasher = hasher_of(file)
    try:
        feed(hasher, path)
    except OSError:
        return False
    return bool(hasher.hexdigest() == (file.sha256 or file.blob))


def read_json(path: str) -> dict[str, Any] | None:
    try:
        with open(path, encoding="utf-8") as stream:
            data = json.load(stream)
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) and data.get("format") == FORMAT else None


def write_json(path: str, data: Mapping[str, Any]) -> None:
    replace_file(path, json.dumps(dict(data, format=FORMAT), indent=1, sort_keys=True) + "\n", 0o644)


def make_folder(path: str) -> None:
    """With its parents, readable by the engine's user whatever the umask is."""
    if not os.path.isdir(path):
        make_folder(os.path.dirname(path))
        try:
            os.mkdir(path)
        except FileExistsError:
            return
        os.chmod(path, 0o755)  # noqa: S103 - whoever runs the engine reads it


def existing(path: str) -> str:
    """The folder itself, or the nearest one above it that there is."""
    while not os.path.isdir(path):
        path = os.path.dirname(path)
    return path


def free_bytes(path: str) -> int:
    status = os.statvfs(existing(path))
    return status.f_bavail * status.f_frsize


def publish(source: str, target: str) -> None:
    make_folder(os.path.dirname(target))
    os.replace(source, target)


# -- names of branches and tags ---------------------------------------------------------------------------------------


def pinned(root: str, repository: str, ref: str) -> tuple[str, str] | None:
    """The commit that a name was resolved to on this host, and when; a name that moves does not move what runs here."""
    entry = ((read_json(os.path.join(root, folder_of(repository), REFS)) or {}).get("refs") or {}).get(ref) or {}
    commit = str(entry.get("commit") or "")
    return (commit, str(entry.get("since") or "")) if is_commit(commit) else None


def pin(root: str, repository: str, ref: str, commit: str) -> None:
    folder = os.path.join(root, folder_of(repository))
    make_folder(folder)
    data = read_json(os.path.join(folder, REFS)) or {}
    refs = dict(data.get("refs") or {}, **{ref: {"commit": commit, "since": utc_now()}})
    write_json(os.path.join(folder, REFS), {"refs": refs})


# -- one snapshot -----------------------------------------------------------------------------------------------------


class Snapshot:
    def __init__(
        self,
        wanted: Wanted,
        progress: Progress,
        after: Callable[[str], None] = lambda what: None,
        keep: Collection[str] = (),
    ) -> None:
        self.wanted = wanted
        self.keep = keep
        self.progress = progress
        self.after = after  # a test's place to kill the work
        model = folder_of(wanted.repository)
        self.model_folder = os.path.join(wanted.root, model)
        self.path = os.path.join(self.model_folder, wanted.revision)
        self.partial = os.path.join(wanted.root, PARTIAL, model, wanted.revision)
        self.whole = os.path.join(self.partial, "files")
        self.parts = os.path.join(self.partial, "parts")

    # what is there

    def look(self, full: bool = False, suspects: Collection[str] = ()) -> Found | None:
        """None where there is no finished snapshot. Reads names, sizes and times; every byte of suspects, or of all."""
        marker = read_json(os.path.join(self.path, MARKER))
        try:
            listed = (marker or {})["tree"]
            tree = {path: RemoteFile(path, *entry) for path, entry in listed.items()}
            times: dict[str, int] = dict((marker or {})["files"])
        except (KeyError, TypeError, ValueError, AttributeError):
            return None
        if (
            not marker
            or marker.get("repository") != self.wanted.repository
            or marker.get("revision") != self.wanted.revision
        ):
            return None
        wanted = self.select(tree)
        bad: dict[str, str] = {}
        for path in sorted(wanted):
            problem = self._problem(wanted[path], times.get(path), full or path in suspects)
            if problem:
                bad[path] = problem
        return Found(tree, wanted, bad, sorted(set(times) - set(wanted)), marker)

    def _problem(self, file: RemoteFile, time_ns: int | None, full: bool) -> str:
        """What is wrong with a file of the snapshot; a file whose time is not the recorded one is read as a whole."""
        path = os.path.join(self.path, file.path)
        if time_ns is None or not os.path.lexists(path):
            return "missing"
        if not is_file(path, file.size):
            return "size differs"
        if (full or os.stat(path).st_mtime_ns != time_ns) and not is_intact(path, file):
            return "content differs"
        return ""

    def select(self, tree: Mapping[str, RemoteFile]) -> dict[str, RemoteFile]:
        return select(tree, self.wanted.include, self.wanted.exclude)

    def check_selection(self, tree: Mapping[str, RemoteFile]) -> list[str]:
        """Warnings about what is selected; WorkError where it is of no use, or of danger."""
        wanted = self.select(tree)
        if not wanted:
            raise WorkError("nothing", "none of the %d files of %s is wanted" % (len(tree), self.wanted.repository))
        if MARKER in wanted:
            raise WorkError("unsafe", "%s holds a file %s" % (self.wanted.repository, MARKER))
        pickles = sorted(path for path in tree if matches(path, PICKLES))
        chosen = [path for path in pickles if path in wanted]
        if chosen:
            return ["%s runs code of whoever made it when it is loaded" % ", ".join(chosen)]
        if not any(matches(path, WEIGHTS) for path in wanted):
            if pickles and not any(matches(path, WEIGHTS) for path in tree):
                raise WorkError(
                    "pickle",
                    "the weights of %s are pickles alone (%s), which run code when they are loaded"
                    % (self.wanted.repository, ", ".join(pickles[:3])),
                )
            return ["none of the files that are wanted of %s holds weights" % self.wanted.repository]
        return []

    def unused(self) -> str:
        """For who looks for space: what else lies in the root, finished or begun, that no release on this host mounts, or will."""
        root = self.wanted.root
        kept = mounted().union(self.keep, [self.path])
        found = []
        for base in (root, os.path.join(root, PARTIAL)):
            for path in sorted(glob.glob(os.path.join(glob.escape(base), "*", "*"))):
                finished = os.path.join(root, os.path.relpath(path, base))
                if is_commit(os.path.basename(path)) and finished not in kept:
                    found.append("%s (%s)" % (path, amount(size_of_folder(path))))
        return "; no release uses %s" % ", ".join(found) if found else ""

    # what is missing

    def part_of(self, file: RemoteFile) -> str:
        return os.path.join(self.parts, hashlib.sha256(file.path.encode()).hexdigest()[:32])

    def missing(self, tree: Mapping[str, RemoteFile], found: Found | None) -> list[RemoteFile]:
        """Files that are in order neither in the snapshot nor among what was fetched before.

        Those of a folder without a marker are missing until they are verified, which the work begins with.
        """
        todo = []
        for path, file in sorted(self.select(tree).items()):
            if found is not None and path not in found.bad:
                continue
            if is_file(os.path.join(self.whole, path), file.size):
                continue
            todo.append(file)
        return todo

    def missing_bytes(self, todo: Iterable[RemoteFile]) -> int:
        return sum(max(file.size - size_of(self.part_of(file)), 0) for file in todo)

    def need_space(self, todo: Sequence[RemoteFile], reserve: int) -> None:
        missing, free = self.missing_bytes(todo), free_bytes(self.wanted.root)
        if missing and free < missing + reserve:
            raise WorkError(
                "no_space",
                "%s has %s free, and needs %s for what is still missing and %s in reserve%s"
                % (
                    existing(self.wanted.root), amount(free), amount(missing), amount(reserve),
                    self.unused(),
                ),
            )  # fmt: skip

    # the work

    def complete(
        self, tree: Mapping[str, RemoteFile], found: Found | None, fetch: Callable[[Sequence[RemoteFile]], None]
    ) -> None:
        """Fetch what is missing, and put everything in its place."""
        wanted = self.select(tree)
        try:
            for folder in (self.whole, self.parts):
                make_folder(folder)
            if found is None:
                self._adopt(wanted)
            todo = self.missing(tree, found)
            fetch(todo)
            self.after("fetched")
            self._place(tree, wanted, found)
        except OSError as error:
            raise self.disk_problem(error) from error
        self.tidy()
        self.progress.say("complete: %d files, %s, in %s" % (len(wanted), amount(size_of_all(wanted)), self.path))

    def tidy(self) -> None:
        """Nothing of a finished snapshot stays among what is under way."""
        shutil.rmtree(self.partial, ignore_errors=True)
        for folder in (os.path.dirname(self.partial), os.path.join(self.wanted.root, PARTIAL)):
            try:
                os.rmdir(folder)
            except OSError:
                break  # another download is under way

    def _adopt(self, wanted: Mapping[str, RemoteFile]) -> None:
        """A folder without a marker was filled by somebody else: what is in order in it is not fetched again."""
        for path, file in sorted(wanted.items()):
            there, here = os.path.join(self.path, path), os.path.join(self.whole, path)
            if not is_file(there, file.size) or is_file(here, file.size):
                continue
            self.progress.say("%s is there already, and is verified" % path)
            if is_intact(there, file):
                make_folder(os.path.dirname(here))
                os.link(there, here)  # what reads the folder meanwhile keeps it

    def _place(self, tree: Mapping[str, RemoteFile], wanted: Mapping[str, RemoteFile], found: Found | None) -> None:
        if found is None and not os.path.lexists(self.path):
            self._mark(self.whole, tree, wanted)
            self._sync_tree(self.whole)
            make_folder(self.model_folder)
            self.after("marked")
            os.rename(self.whole, self.path)
            sync_folder(self.model_folder)
            self.after("renamed")
            return
        for path in sorted(wanted):
            fresh = os.path.join(self.whole, path)
            if os.path.isfile(fresh):
                publish(fresh, os.path.join(self.path, path))
                self.after("replaced")
        for path in found.extra if found else []:
            try:
                os.unlink(os.path.join(self.path, path))
            except FileNotFoundError:
                pass
        self._sync_tree(self.path)
        self._mark(self.path, tree, wanted)

    def _mark(self, folder: str, tree: Mapping[str, RemoteFile], wanted: Mapping[str, RemoteFile]) -> None:
        marker = {
            "repository": self.wanted.repository,
            "revision": self.wanted.revision,
            "since": utc_now(),
            "size": size_of_all(wanted),
            "files": {path: os.stat(os.path.join(folder, path)).st_mtime_ns for path in wanted},
            "tree": {path: list(file[1:]) for path, file in tree.items()},
        }
        write_json(os.path.join(folder, MARKER), marker)

    def _sync_tree(self, folder: str) -> None:
        for base, _folders, _files in os.walk(folder):
            sync_folder(base)

    def refresh(self, found: Found) -> None:
        """Times that changed while the contents did not: recorded, so that the next look is a cheap one."""
        times = {path: os.stat(os.path.join(self.path, path)).st_mtime_ns for path in found.wanted}
        if times != found.marker["files"]:
            write_json(os.path.join(self.path, MARKER), dict(found.marker, files=times))

    def disk_problem(self, error: OSError) -> WorkError:
        if error.errno in FULL_DISK:
            return WorkError(
                "no_space",
                "%s is full (%s free); what was fetched is kept%s"
                % (
                    self.wanted.root, amount(free_bytes(self.wanted.root)),
                    self.unused(),
                ),
            )  # fmt: skip
        return WorkError("disk", "%s: %s" % (error.filename or self.wanted.root, error.strerror or error))


def size_of(path: str) -> int:
    try:
        return os.path.getsize(path)
    except OSError:
        return 0


def size_of_folder(path: str) -> int:
    return sum(size_of(os.path.join(base, name)) for base, _folders, names in os.walk(path) for name in names)


def mounted() -> set[str]:
    """What the releases of all services on this host mount, those under way among them."""
    found: set[str] = set()
    for path in glob.glob(os.path.join(glob.escape(STATE), "*", "*.json")):
        try:
            with open(path, encoding="utf-8") as stream:
                data = json.load(stream)
            releases = [data["record"]] if path.endswith("/transition.json") else data["releases"]
            found.update(mount["source"] for entry in releases for mount in entry["settings"].get("mounts") or [])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # another program's file
    return found


def size_of_all(files: Mapping[str, RemoteFile]) -> int:
    return sum(file.size for file in files.values())


# -- its files, some at a time ----------------------------------------------------------------------------------------


class Stopped(Exception):
    """Another file's failure ends this one."""


class Fetcher:
    """Brings files to `<partial>/files`, each verified; what it has of a file is never fetched twice, unless it is bad."""

    def __init__(
        self,
        snapshot: Snapshot,
        hub: Hub,
        parallel: int = 4,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.snapshot = snapshot
        self.hub = hub
        self.parallel = parallel
        self.progress = snapshot.progress
        self._clock = clock
        self._lock = threading.Lock()
        self._ended = threading.Condition(self._lock)
        self._stop = threading.Event()
        self._error: Exception | None = None
        self._queue: list[RemoteFile] = []
        self._working = 0
        self._have: dict[str, int] = {}  # bytes of each file that are here

    def fetch(self, todo: Sequence[RemoteFile]) -> None:
        """All of them, or the first failure."""
        if not todo:
            return
        # The few small ones first, because they fail at once if anything does; then the largest, so that none is left over.
        self._queue = sorted(todo, key=lambda file: (file.size > PROGRESS_BYTES, -file.size), reverse=True)
        self._have = {file.path: size_of(self.snapshot.part_of(file)) for file in todo}
        total = sum(file.size for file in todo)
        self.progress.say(
            "fetching %d files of %s, %s of %s" % (
                len(todo), self.snapshot.wanted.repository, amount(total - sum(self._have.values())), amount(total),
            )
        )  # fmt: skip
        threads = [threading.Thread(target=self._serve, daemon=True) for _ in range(min(self.parallel, len(todo)))]
        self._working = len(threads)
        for thread in threads:
            thread.start()
        self._report(total)
        for thread in threads:
            thread.join()
        if self._error:
            raise self._error

    def _serve(self) -> None:
        try:
            while True:
                with self._lock:
                    if self._stop.is_set() or not self._queue:
                        return
                    file = self._queue.pop()
                self._bring(file)
        except Stopped:
            pass
        except Exception as error:  # handed to whoever waits for the files
            with self._lock:
                self._error = self._error or error
            self._stop.set()
        finally:
            with self._ended:
                self._working -= 1
                self._ended.notify_all()

    def _report(self, total: int) -> None:
        """Say how far it is, until every thread has ended."""
        pace = Pace()
        pace.note(self._clock(), sum(self._have.values()))
        while True:
            with self._ended:
                if self._ended.wait_for(lambda: self._working == 0, PROGRESS_SECONDS):
                    return
                done = sum(self._have.values())
            pace.note(self._clock(), done)
            self.progress.say(pace.text(done, total))

    # one file

    def _bring(self, file: RemoteFile) -> None:
        part = Part(self.snapshot.part_of(file), file)
        corrupt = failures = 0
        while True:
            before = size_of(part.path)
            try:
                self._go_on(part)
            except Passing as failure:
                failures = 1 if part.have - before >= PROGRESS_BYTES else failures + 1
                if failures > self.hub.limits.retries:
                    text = "%s: %s (%d tries in a row)" % (file.path, failure.text, failures)
                    raise WorkError(failure.reason, text) from None
                pause = max(min(self.hub.limits.pause * 2 ** (failures - 1), PAUSE_LIMIT), failure.pause)
                self.progress.say("%s: %s; next try in %s" % (file.path, failure.text, duration(pause)))
                if self._stop.wait(pause):
                    raise Stopped() from None
                continue
            if part.digest == (file.sha256 or file.blob):
                break
            corrupt += 1
            part.begin()
            self._note(file, 0)
            if corrupt >= CORRUPT_TRIES:
                raise WorkError(
                    "corrupt", "%s arrived damaged %d times; %s was expected" % (file.path, corrupt, file.digest)
                )
            text = "%s arrived damaged, and is fetched again (try %d of %d)"
            self.progress.say(text % (file.path, corrupt + 1, CORRUPT_TRIES))
        target = os.path.join(self.snapshot.whole, file.path)
        part.publish(target)
        self.snapshot.after("file")

    def _go_on(self, part: Part) -> None:
        """The rest of a file, after what is there."""
        file, wanted = part.file, self.snapshot.wanted
        part.resume(lambda: not self._stop.is_set())
        self._note(file, part.have)
        if part.have < file.size:
            with self.hub.download(wanted.repository, wanted.revision, file.path, part.have) as answer:
                if self._start_of(answer, part) != part.have:
                    part.begin()
                self._receive(answer, part)
        if self._stop.is_set():
            raise Stopped()

    @staticmethod
    def _start_of(answer: Any, part: Part) -> int:
        """Where the answer begins: at what was asked for, or at the beginning where the server does no parts."""
        if answer.status == 206:
            given = re.match(r"bytes (\d+)-\d+/(\d+|\*)$", answer.headers.get("Content-Range") or "")
            if not given or int(given.group(1)) != part.have:
                raise Passing("hub_answer", "the server sent another part than the one that was asked for")
            start, whole = part.have, given.group(2)
        else:
            start, whole = 0, answer.headers.get("Content-Length")
        if whole not in (None, "*", str(part.file.size)):
            raise Passing("corrupt", "the server has %s bytes of it, the hub lists %d" % (whole, part.file.size))
        return start

    def _receive(self, answer: Any, part: Part) -> None:
        size = part.file.size
        since, have_then = self._clock(), part.have
        with part.open() as stream:
            while part.have < size and not self._stop.is_set():
                try:
                    block = answer.read1(CHUNK_BYTES)
                except (OSError, http.client.HTTPException) as error:
                    raise Passing("unreachable", "after %s: %s" % (amount(part.have), said(error))) from None
                if not block:
                    text = "the connection ended after %s of %s" % (amount(part.have), amount(size))
                    raise Passing("unreachable", text)
                part.add(stream, block[: size - part.have])  # more than the hub lists is of no use
                self._note(part.file, part.have)
                now = self._clock()
                if now - since >= self.hub.limits.timeout:
                    got = part.have - have_then
                    if got < LEAST_RATE * (now - since) and part.have < size:
                        raise Passing("slow", "only %s in %s" % (amount(got), duration(now - since)))
                    since, have_then = now, part.have

    def _note(self, file: RemoteFile, have: int) -> None:
        with self._lock:
            self._have[file.path] = have


class Part:
    """The beginning of a file, and the digest of what is there of it."""

    def __init__(self, path: str, file: RemoteFile) -> None:
        self.path = path
        self.file = file
        self.have = 0
        self._hasher = hasher_of(file)

    @property
    def digest(self) -> str:
        return str(self._hasher.hexdigest())

    def begin(self) -> None:
        """From the first byte."""
        try:
            os.unlink(self.path)
        except FileNotFoundError:
            pass
        self.have, self._hasher = 0, hasher_of(self.file)

    def resume(self, keep_on: Callable[[], bool]) -> None:
        """As far as the file goes: that of a killed process is read, that of an earlier try is known."""
        there = size_of(self.path)
        if there == self.have:
            return
        self.have, self._hasher = 0, hasher_of(self.file)
        if there > self.file.size:
            self.begin()
        else:
            self.have = feed(self._hasher, self.path, keep_on)

    def open(self) -> Any:
        return open(self.path, "ab", buffering=0)

    def add(self, stream: Any, block: bytes) -> None:
        self._hasher.update(block)
        self.have += len(block)
        rest = memoryview(block)
        while rest:
            rest = rest[stream.write(rest) :]

    def publish(self, target: str) -> None:
        """Whole and verified: on disk before it has its name."""
        with open(self.path, "ab") as stream:
            os.fchmod(stream.fileno(), 0o644)
            os.fsync(stream.fileno())
        publish(self.path, target)
        sync_folder(os.path.dirname(target))
