# Copyright: the nemo.platform authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Releases of one service on one host, by the docker command line alone.

Three container names and two small files carry the whole state, so that a run that was killed anywhere is finished or
undone by the next one:

``NAME``           the container that serves, or that is being proven
``NAME.next``      created, never started
``NAME.previous``  the one that served until now, kept until the new one is proven
``release.json``   the release that was proven last; writing it is the moment of commitment
``transition.json`` there while a switch is under way

Nothing here may rely on a ``finally`` clause or an exception handler to leave the host in order: SIGKILL runs neither.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import hmac
import http.client
import json
import os
import re
import secrets as random_source
import shutil
import time
from collections.abc import Mapping, Sequence
from typing import Any, Callable, NamedTuple, NoReturn, Optional

Record = dict[str, Any]
Settings = dict[str, Any]
Runner = Callable[[Sequence[str]], tuple[int, str, str]]
Prober = Callable[[str, int, str, int, float], Optional[str]]

FORMAT = 1
MINIMUM_MEMORY = 64 * 1024 * 1024
RESERVED_ENVIRONMENT = ("IMAGE_TAG", "IMAGE_DIGEST", "RELEASE_ID")
LOG_LINES = 20

ADVICE = {
    "authentication": "Check this host's registry credentials: its instance role needs ECR read access, an ECR token"
    " lives 12 hours, and root's docker configuration must name the credential helper for this registry.",
    "docker_missing": "Install Docker Engine first (role nemo.platform.docker_engine).",
    "engine_down": "Start it and look at its journal: systemctl status docker; journalctl -u docker -n 50.",
    "lock": "Wait for that run to end, then run again.",
    "memory": "Lower the service's memory, or move it to a larger host.",
    "no_space": "Free space on this host: docker system df; docker image prune; journalctl --vacuum-size=200M.",
    "not_found": "Check the repository and the tag: it was never pushed, or a lifecycle rule has removed it.",
    "platform": "Build and push the image for this host's platform.",
    "port_taken": "Stop what holds the port, or give the service another one.",
    "pull_timeout": "Check the way to the registry, or raise pull_timeout.",
    "registry_certificate": "Install the registry's certificate authority on this host, or check its clock.",
    "registry_unreachable": "Check name resolution, routes and security groups from this host to the registry on 443.",
    "start": "Read the reason above; the container was created but the engine could not start it.",
    "unhealthy": "Read the log lines of the failed release, mend the image or its settings, and release again.",
    "docker": "Run the named docker command on the host to see more.",
}

# The first match decides, so what is more telling stands first.
_CLASSES: tuple[tuple[str, str], ...] = (
    (
        "engine_down",
        r"cannot connect to the docker daemon|is the docker daemon running|docker\.sock|docker daemon is not running",
    ),
    ("no_space", r"no space left on device|disk quota exceeded|not enough space"),
    ("platform", r"no matching manifest|exec format error|does not match the (specified|detected host) platform"),
    ("port_taken", r"port is already allocated|address already in use|ports are not available"),
    ("registry_certificate", r"x509:|certificate signed by unknown|certificate has expired"),
    (
        "registry_unreachable",
        r"no such host|connection refused|i/o timeout|tls handshake timeout|network is unreachable|no route to host"
        r"|client\.timeout|connection reset|unexpected eof|: eof\b|name resolution|server misbehaving"
        r"|context deadline exceeded|request canceled|bad gateway|service unavailable|gateway time-?out"
        r"|could not connect to the endpoint|broken pipe",
    ),
    (
        "authentication",
        r"no basic auth|unauthorized|authorization token|expiredtoken|token (has |is )?expired|authentication required"
        r"|error getting credentials|credentials not found|access denied|accessdenied|requested access to the resource"
        r"|\b401\b|\b403\b|forbidden|denied:|nocredentialproviders|no ec2 imds role",
    ),
    ("not_found", r"manifest unknown|name unknown|not found|no such image|repository does not exist|invalidparameter"),
)


class ReleaseError(Exception):
    """What went wrong, its class, what to do about it, and the log lines that tell more."""

    def __init__(self, reason: str, text: str, log_tail: Sequence[str] = ()) -> None:
        super().__init__(text)
        self.reason = reason
        self.text = " ".join(text.split())
        self.log_tail = list(log_tail)

    @property
    def advice(self) -> str:
        return ADVICE.get(self.reason, "")


def classify(stderr: str) -> str:
    """The failure class of what docker wrote, ``docker`` when it is none of the known ones."""
    text = stderr.lower()
    for reason, pattern in _CLASSES:
        if re.search(pattern, text):
            return reason
    return "docker"


def last_line(text: str) -> str:
    """The telling line of docker's error output: the last one that is not a hint to read the help."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    telling = [line for line in lines if not line.startswith(("See '", "Run '", "Using default tag"))]
    return (telling or lines or ["no output"])[-1]


def utc_now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def parse_size(value: str) -> int:
    """Bytes of a size as docker writes it (512m, 1g, 1073741824). ValueError when it is none."""
    match = re.match(r"^(\d+(?:\.\d+)?)\s*([bkmgt]?)(?:i?b)?$", str(value).strip().lower())
    if not match:
        raise ValueError(value)
    return int(float(match.group(1)) * 1024 ** "bkmgt".index(match.group(2) or "b"))


def environment_text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value)


# -- what is asked for ------------------------------------------------------------------------------------------------


def check_request(params: Mapping[str, Any]) -> list[str]:
    """Everything wrong with the module's arguments, one line each; an empty list when nothing is."""
    wrong: list[str] = []

    def need(name: str, good: bool, allowed: str) -> None:
        if not good:
            wrong.append("%s is %r; allowed: %s" % (name, params.get(name), allowed))

    need(
        "name",
        bool(re.match(r"^[a-z0-9][a-z0-9_-]{0,62}$", params["name"])),
        "lower-case letters, digits, - and _, at most 63 of them",
    )
    if params["state"] == "absent":
        return wrong
    image = params.get("image") or ""
    need(
        "image",
        bool(re.match(r"^[a-z0-9][a-zA-Z0-9._:/-]*$", image)) and ":" not in image.rsplit("/", 1)[-1],
        "a repository without tag or digest, such as 123456789012.dkr.ecr.ap-northeast-2.amazonaws.com/ai",
    )
    need(
        "tag",
        bool(re.match(r"^\w[\w.-]{0,127}$", params.get("tag") or "")),
        "one image tag, such as prod-20250714-1752",
    )
    digest = params.get("digest")
    need("digest", not digest or bool(re.match(r"^sha256:[0-9a-f]{64}$", digest)), "sha256: and 64 hexadecimal digits")
    for name in ("port", "container_port"):
        value = params.get(name)
        if value is None and name == "container_port":
            continue
        need(name, isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 65535, "1 to 65535")
    for name in ("memory", "log_max_size"):
        try:
            size = parse_size(params[name])
        except ValueError:
            need(name, False, "a number with b, k, m or g, such as 512m or 1g")
            continue
        if name == "memory":
            need(name, size >= MINIMUM_MEMORY, "64m or more")
    if params.get("cpus") is not None:
        need("cpus", params["cpus"] > 0, "more than 0, such as 0.5 or 2")
    need("user", bool(re.match(r"^\d+(:\d+)?$", params["user"])), "a numeric uid or uid:gid, such as 10001:10001")
    need("health_path", params["health_path"].startswith("/"), "a path that begins with /")
    for name, least in (
        ("health_status", 100),
        ("health_timeout", 1),
        ("pids_limit", 1),
        ("log_max_file", 1),
        ("pull_timeout", 1),
        ("stop_timeout", 0),
        ("min_free_disk_mb", 0),
        ("lock_timeout", 0),
    ):
        need(name, params[name] >= least, "%d or more" % least)
    need("health_interval", params["health_interval"] > 0, "more than 0 seconds")
    for kind in ("environment", "secrets"):
        for name, value in (params[kind] or {}).items():
            label = "%s.%s" % (kind, name)
            if not re.match(r"^[A-Za-z_][A-Za-z0-9_]*$", name):
                wrong.append("%s is no valid name; allowed: letters, digits and _, not a digit first" % label)
            if isinstance(value, (dict, list)):
                wrong.append("%s is a %s; allowed: one value" % (label, type(value).__name__))
            if kind == "environment" and name in RESERVED_ENVIRONMENT:
                wrong.append("%s is set by the release itself; allowed: any other name" % label)
            if kind == "secrets" and environment_text(value) == "":
                wrong.append("%s is empty; allowed: a value that is not empty" % label)
    for name in sorted(set(params["environment"] or {}) & set(params["secrets"] or {})):
        wrong.append("environment.%s is a secret too; allowed: in environment or in secrets, not in both" % name)
    return wrong


def settings_of(params: Mapping[str, Any], digest: str | None, secrets_revision: str) -> Settings:
    """What defines a release, without a secret value in it: this is hashed, labelled, recorded and shown in a diff."""
    return {
        "image": params["image"],
        "tag": params["tag"],
        "digest": digest,
        "bind_address": params["bind_address"],
        "port": params["port"],
        "container_port": params["container_port"] or params["port"],
        "network": params["network"] or "",
        "environment": {key: environment_text(value) for key, value in (params["environment"] or {}).items()},
        "secrets": sorted(params["secrets"] or {}),
        "secrets_revision": secrets_revision,
        "memory": parse_size(params["memory"]),
        "cpus": params["cpus"],
        "pids_limit": params["pids_limit"],
        "user": params["user"],
        "read_only": params["read_only"],
        "tmpfs": list(params["tmpfs"] or []),
        "log_max_size": params["log_max_size"],
        "log_max_file": params["log_max_file"],
        "stop_timeout": params["stop_timeout"],
    }


def spec_of(settings: Settings) -> str:
    text = json.dumps({"format": FORMAT, "settings": settings}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def health_of(params: Mapping[str, Any]) -> Record:
    return {
        "path": params["health_path"],
        "status": params["health_status"],
        "timeout": params["health_timeout"],
        "interval": params["health_interval"],
    }


def create_arguments(name: str, reference: str, record: Record, secrets_path: str | None) -> list[str]:
    """The arguments of ``docker create`` for a release. Secrets are a mount, never an argument."""
    wanted: Settings = record["settings"]
    arguments = ["--name", name, "--pull", "never", "--init", "--restart", "unless-stopped"]
    arguments += ["--security-opt", "no-new-privileges", "--cap-drop", "ALL", "--user", wanted["user"]]
    arguments += ["--memory", str(wanted["memory"]), "--memory-swap", str(wanted["memory"])]
    arguments += ["--pids-limit", str(wanted["pids_limit"]), "--stop-timeout", str(wanted["stop_timeout"])]
    if wanted["cpus"] is not None:
        arguments += ["--cpus", str(wanted["cpus"])]
    arguments += ["--log-driver", "json-file"]
    arguments += [
        "--log-opt",
        "max-size=%s" % wanted["log_max_size"],
        "--log-opt",
        "max-file=%d" % wanted["log_max_file"],
    ]
    if wanted["read_only"]:
        arguments.append("--read-only")
    for mount in wanted["tmpfs"]:
        arguments += ["--tmpfs", mount if ":" in mount else "%s:rw,nosuid,nodev,mode=1777" % mount]
    if wanted["network"]:
        arguments += ["--network", wanted["network"]]
    arguments += ["--publish", "%s:%d:%d" % (wanted["bind_address"], wanted["port"], wanted["container_port"])]
    if secrets_path:
        # Z gives the files the container's own label where SELinux is on, and does nothing elsewhere.
        arguments += ["--volume", "%s:/run/secrets:ro,Z" % secrets_path]
    environment = dict(wanted["environment"])
    environment.update(IMAGE_TAG=record["tag"], IMAGE_DIGEST=record["digest"], RELEASE_ID=record["release"])
    for key in sorted(environment):
        arguments += ["--env", "%s=%s" % (key, environment[key])]
    for key in ("service", "release", "tag", "digest", "spec"):
        arguments += ["--label", "nemo.%s=%s" % (key, record[key])]
    arguments += ["--label", "nemo.record=%s" % json.dumps(record, sort_keys=True), reference]
    return arguments


# -- the host's files -------------------------------------------------------------------------------------------------


class Store:
    """The files of one service: every write is atomic and durable, every removal can be repeated."""

    def __init__(
        self, name: str, state_path: str, run_path: str, after: Callable[[str], None] = lambda what: None
    ) -> None:
        self.root = state_path
        self.base = os.path.join(state_path, name)
        self.releases = os.path.join(self.base, "releases")
        self.lock_path = os.path.join(run_path, "%s.lock" % name)
        self.images_lock_path = os.path.join(run_path, "images.lock")
        self.run_path = run_path
        self.after = after  # a test's place to kill the run

    def read(self, what: str) -> Record | None:
        return self._read(os.path.join(self.base, what))

    @staticmethod
    def _read(path: str) -> Record | None:
        try:
            with open(path, encoding="utf-8") as stream:
                data = json.load(stream)
        except (OSError, ValueError):
            return None
        return data if isinstance(data, dict) and data.get("format") == FORMAT else None

    def write(self, what: str, data: Record) -> None:
        self._directory(self.base, 0o700)
        path = os.path.join(self.base, what)
        temporary = "%s.tmp" % path
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            json.dump(data, stream, indent=2, sort_keys=True)
            stream.write("\n")
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
        self._sync(self.base)
        self.after("write %s" % what)

    def delete(self, what: str) -> None:
        try:
            os.unlink(os.path.join(self.base, what))
        except FileNotFoundError:
            return
        self._sync(self.base)
        self.after("delete %s" % what)

    def _directory(self, path: str, mode: int) -> None:
        if not os.path.isdir(path):
            parent = os.path.dirname(path)
            if not os.path.isdir(parent):
                self._directory(parent, 0o700 if parent.startswith(self.base) else 0o755)
            os.mkdir(path, mode)
            os.chmod(path, mode)

    @staticmethod
    def _sync(path: str) -> None:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    # secrets

    def key(self, create: bool) -> bytes | None:
        """The host's own key: it turns secrets into a revision that says nothing about them without the key."""
        path = os.path.join(self.root, ".key")
        for attempt in range(2):
            try:
                with open(path, "rb") as stream:
                    data = stream.read()
                if len(data) == 32:
                    return data
                if create:
                    os.unlink(path)
            except FileNotFoundError:
                pass
            if not create or attempt:
                break
            self._directory(self.root, 0o755)
            temporary = "%s.%d" % (path, os.getpid())
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(descriptor, "wb") as out:
                out.write(random_source.token_bytes(32))
                out.flush()
                os.fsync(out.fileno())
            try:
                os.link(temporary, path)  # the first one wins when two services begin at once
            except FileExistsError:
                pass
            os.unlink(temporary)
            self._sync(self.root)
            self.after("write .key")
        return None

    def revision(self, values: Mapping[str, str], create: bool) -> str:
        if not values:
            return ""
        key = self.key(create)
        if key is None:
            return "new"
        text = json.dumps(dict(values), sort_keys=True)
        return hmac.new(key, text.encode(), hashlib.sha256).hexdigest()[:16]

    def write_secrets(self, release: str, values: Mapping[str, str], user: str) -> str | None:
        """One file for each secret, for the container's user alone; the folders above it are root's alone."""
        if not values:
            return None
        uid, _colon, gid = user.partition(":")
        folder = os.path.join(self.releases, release, "secrets")
        self._directory(folder, 0o700)
        for name in sorted(values):
            path = os.path.join(folder, name)
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o400)
            with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
                stream.write(values[name])
                stream.flush()
                os.fsync(stream.fileno())
                os.fchown(stream.fileno(), int(uid), int(gid or 0))
        os.chown(folder, int(uid), int(gid or 0))
        os.chmod(folder, 0o500)
        self._sync(folder)
        self.after("write secrets")
        return folder

    def missing_secrets(self, release: str, names: Sequence[str]) -> list[str]:
        """Secrets of a release whose files are gone: its container sees them gone too, or will at its next start."""
        folder = os.path.join(self.releases, release, "secrets")
        return [name for name in names if not os.path.isfile(os.path.join(folder, name))]

    def release_ids(self) -> set[str]:
        try:
            return set(os.listdir(self.releases))
        except OSError:
            return set()

    def delete_release(self, release: str) -> None:
        shutil.rmtree(os.path.join(self.releases, release), ignore_errors=True)
        self.after("delete secrets")

    def delete_all(self) -> bool:
        existed = os.path.isdir(self.base)
        if existed:
            shutil.rmtree(self.base)
            self.after("delete state")
        return existed

    def needed_images(self) -> set[str]:
        """Images that a recorded release of any service on this host needs."""
        needed: set[str] = set()
        try:
            services = os.listdir(self.root)
        except OSError:
            return needed
        for service in services:
            record = self._read(os.path.join(self.root, service, "release.json"))
            for entry in (record, (record or {}).get("previous")):
                if entry:
                    needed.add(entry.get("image_id", ""))
        return needed - {""}


class Lock:
    """An advisory lock on a file: the kernel lets go of it when its last holder dies, so it can never go stale."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.descriptor: int | None = None

    def try_acquire(self, shared: bool = False) -> bool:
        if self.descriptor is None:
            os.makedirs(os.path.dirname(self.path), mode=0o755, exist_ok=True)
            self.descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self.descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            return False
        return True

    def acquire(self, timeout: float, shared: bool = False) -> bool:
        limit = time.monotonic() + timeout
        while not self.try_acquire(shared):
            if time.monotonic() >= limit:
                return False
            time.sleep(0.2)
        return True

    def release(self) -> None:
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None

    def sign(self, holder: Record) -> None:
        assert self.descriptor is not None
        os.ftruncate(self.descriptor, 0)
        os.pwrite(self.descriptor, json.dumps(holder).encode(), 0)

    def holder(self) -> str:
        assert self.descriptor is not None
        try:
            data = json.loads(os.pread(self.descriptor, 4096, 0).decode())
            pid = int(data["pid"])
            text = "%s since %s (process %d, releasing %s)" % (data["by"], data["since"], pid, data["what"])
        except (ValueError, KeyError, TypeError):
            return "another run that has not said who it is"
        if not os.path.exists("/proc/%d" % pid):
            text += "; that process is gone, but a docker command that it started is still at work"
        return text


# -- the engine -------------------------------------------------------------------------------------------------------


class Container(NamedTuple):
    name: str
    status: str
    running: bool
    paused: bool
    exit_code: int
    oom_killed: bool
    restarts: int
    error: str
    labels: dict[str, str]
    ports: set[int]

    @property
    def record(self) -> Record | None:
        """The release that this container is, None for a container that is not one of ours."""
        try:
            data = json.loads(self.labels.get("nemo.record", ""))
        except ValueError:
            return None
        return data if isinstance(data, dict) and data.get("format") == FORMAT else None

    @property
    def release(self) -> str:
        return self.labels.get("nemo.release", "")

    @property
    def spec(self) -> str:
        return self.labels.get("nemo.spec", "")

    @classmethod
    def parse(cls, data: Mapping[str, Any]) -> Container:
        state = data["State"]
        ports: set[int] = set()
        for bindings in ((data.get("HostConfig") or {}).get("PortBindings") or {}).values():
            ports.update(int(entry["HostPort"]) for entry in bindings or [] if entry.get("HostPort"))
        return cls(
            name=data["Name"].lstrip("/"),
            status=state.get("Status", ""),
            running=bool(state.get("Running")) and not state.get("Restarting"),
            paused=bool(state.get("Paused")),
            exit_code=int(state.get("ExitCode") or 0),
            oom_killed=bool(state.get("OOMKilled")),
            restarts=int(data.get("RestartCount") or 0),
            error=state.get("Error") or "",
            labels=(data.get("Config") or {}).get("Labels") or {},
            ports=ports,
        )


class Docker:
    """The few docker commands that a release needs; every failure comes out as a ReleaseError with its class."""

    def __init__(self, run: Runner, timeout_command: str | None = None) -> None:
        self.run = run
        self.timeout_command = timeout_command

    @staticmethod
    def fail(doing: str, stderr: str) -> NoReturn:
        raise ReleaseError(classify(stderr), "%s: %s" % (doing, last_line(stderr)))

    def call(self, doing: str, *arguments: str) -> str:
        rc, out, err = self.run(["docker"] + list(arguments))
        if rc:
            self.fail(doing, err or out)
        return out

    def containers(self, names: Sequence[str]) -> dict[str, Container]:
        rc, out, err = self.run(["docker", "container", "inspect", "--format", "{{json .}}"] + list(names))
        if rc and [line for line in err.splitlines() if line.strip() and "no such container" not in line.lower()]:
            self.fail("the containers cannot be inspected", err)
        found = [Container.parse(json.loads(line)) for line in out.splitlines() if line.startswith("{")]
        return {entry.name: entry for entry in found if entry.name in names}

    def info(self) -> Record:
        data: Record = json.loads(self.call("the Docker Engine does not answer", "info", "--format", "{{json .}}"))
        if data.get("ServerErrors"):
            self.fail("the Docker Engine does not answer", data["ServerErrors"][-1])
        return data

    def image(self, reference: str) -> Record | None:
        rc, out, err = self.run(["docker", "image", "inspect", "--format", "{{json .}}", reference])
        if not rc:
            data: Record = json.loads(out)
            return data
        if "no such image" not in err.lower():
            self.fail("image %s cannot be inspected" % reference, err)
        return None

    def pull(self, reference: str, limit: int) -> None:
        command = ["docker", "pull", "--quiet", reference]
        if self.timeout_command:
            command = [self.timeout_command, "--kill-after=10", str(limit)] + command
        rc, out, err = self.run(command)
        if rc == 124 and self.timeout_command:
            raise ReleaseError("pull_timeout", "pulling %s took more than %d s" % (reference, limit))
        if rc:
            self.fail("%s cannot be pulled" % reference, err or out)

    def create(self, arguments: Sequence[str]) -> None:
        self.call("the container cannot be created", "container", "create", *arguments)

    def rename(self, old: str, new: str) -> None:
        self.call("%s cannot be renamed to %s" % (old, new), "container", "rename", old, new)

    def start(self, name: str) -> None:
        rc, out, err = self.run(["docker", "container", "start", name])
        if rc:
            reason = classify(err)
            text = "%s cannot be started: %s" % (name, last_line(err or out))
            known = ("engine_down", "no_space", "platform", "port_taken")
            raise ReleaseError(reason if reason in known else "start", text)

    def stop(self, name: str, seconds: int | None) -> None:
        limit = ["-t", str(seconds)] if seconds is not None else []
        self.call("%s cannot be stopped" % name, "container", "stop", *(limit + [name]))

    def unpause(self, name: str) -> None:
        self.call("%s cannot be resumed" % name, "container", "unpause", name)

    def remove(self, name: str, volumes: bool = True) -> None:
        command = ["docker", "container", "rm", "--force"] + (["--volumes"] if volumes else []) + [name]
        rc, _out, err = self.run(command)
        if not rc or "no such container" in err.lower():
            return
        if "already in progress" in err.lower():  # of a run that was killed in the middle of this very command
            for _attempt in range(60):
                if name not in self.containers([name]):
                    return
                time.sleep(0.5)
        self.fail("%s cannot be removed" % name, err)

    def logs(self, name: str, health_path: str) -> list[str]:
        """The last lines of a container's log, without those that only say that its health was asked for."""
        rc, out, err = self.run(["docker", "container", "logs", "--tail", str(10 * LOG_LINES), name])
        # An application writes to either stream; what it said on stderr is what matters more, so it stands last.
        lines = [] if rc else [line.rstrip() for line in (out + err).splitlines() if line.strip()]
        telling = [line for line in lines if '"GET %s HTTP' % health_path not in line]
        return (telling or lines)[-LOG_LINES:]

    def publishers(self, port: int) -> list[str]:
        out = self.call(
            "containers cannot be listed", "container", "ls", "--filter", "publish=%d" % port, "--format", "{{.Names}}"
        )
        return [line.strip() for line in out.splitlines() if line.strip()]

    def images(self, repository: str) -> set[str]:
        out = self.call("images cannot be listed", "image", "ls", "--no-trunc", "--quiet", repository)
        return {line.strip() for line in out.splitlines() if line.strip()}

    def used_images(self) -> set[str]:
        ids = self.call("containers cannot be listed", "container", "ls", "--all", "--quiet", "--no-trunc").split()
        if not ids:
            return set()
        out = self.call("containers cannot be inspected", "container", "inspect", "--format", "{{.Image}}", *ids)
        return {line.strip() for line in out.splitlines() if line.strip()}

    def remove_image(self, image: str) -> bool:
        rc, _out, _err = self.run(["docker", "image", "rm", image])
        return not rc


# -- health and ports -------------------------------------------------------------------------------------------------


def probe_http(address: str, port: int, path: str, status: int, timeout: float) -> str | None:
    """One GET; None when it answers as it should, otherwise what was wrong."""
    connection = http.client.HTTPConnection(address, port, timeout=timeout)
    try:
        connection.request("GET", path, headers={"User-Agent": "nemo-container-release", "Connection": "close"})
        answer = connection.getresponse()
        if answer.status == status:
            return None
        body = answer.read(80).decode("utf-8", "replace").strip()
        return "it answered %d, not %d%s" % (answer.status, status, ": %s" % body.splitlines()[0] if body else "")
    except OSError as error:
        return (error.strerror or str(error) or type(error).__name__).lower()
    except http.client.HTTPException as error:
        return "it answered what is not HTTP (%s)" % type(error).__name__
    finally:
        connection.close()


def listener(address: str, port: int, proc: str = "/proc") -> str | None:
    """Who listens on a TCP port of this host, None when nobody does."""
    inodes: set[str] = set()
    for table in ("tcp", "tcp6"):
        try:
            with open(os.path.join(proc, "net", table), encoding="ascii") as stream:
                rows = stream.readlines()[1:]
        except OSError:
            continue
        for row in rows:
            fields = row.split()
            bound, _colon, number = fields[1].rpartition(":")
            if fields[3] != "0A" or int(number, 16) != port:
                continue
            if table == "tcp" and address != "0.0.0.0" and bound != "00000000":
                octets = [str(int(bound[index : index + 2], 16)) for index in (6, 4, 2, 0)]
                if ".".join(octets) != address:
                    continue
            inodes.add(fields[9])
    if not inodes:
        return None
    wanted = {"socket:[%s]" % inode for inode in inodes}
    for pid in filter(str.isdigit, os.listdir(proc)):
        try:
            if wanted & open_files(os.path.join(proc, pid, "fd")):
                with open(os.path.join(proc, pid, "comm"), encoding="utf-8") as stream:
                    return "process %s (%s)" % (pid, stream.read().strip())
        except OSError:
            continue
    return "a process that cannot be seen from here"


def open_files(folder: str) -> set[str]:
    found = set()
    for number in os.listdir(folder):
        try:
            found.add(os.readlink(os.path.join(folder, number)))
        except OSError:
            continue  # closed in the meantime
    return found


# -- the release itself -----------------------------------------------------------------------------------------------


class Releaser:
    """Brings one service to the wanted release, whatever an earlier run has left behind."""

    def __init__(
        self,
        params: Mapping[str, Any],
        docker: Docker,
        store: Store,
        by: str,
        check_mode: bool = False,
        probe: Prober = probe_http,
        find_listener: Callable[[str, int], str | None] = listener,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.params = params
        self.docker = docker
        self.store = store
        self.by = by
        self.check_mode = check_mode
        self.probe = probe
        self.find_listener = find_listener
        self.sleep = sleep
        self.clock = clock
        self.name: str = params["name"]
        self.next = "%s.next" % self.name
        self.previous = "%s.previous" % self.name
        self.changed = False
        self.action = "none"
        self.warnings: list[str] = []
        self.before: Settings | None = None
        self.after: Settings | None = None
        self.record: Record | None = None
        self.images_lock = Lock(store.images_lock_path)
        self.server = ""
        self.data_root = "/var/lib/docker"

    # what stands on the host

    def look(self) -> tuple[Container | None, Container | None, Container | None]:
        found = self.docker.containers([self.name, self.next, self.previous])
        return found.get(self.name), found.get(self.next), found.get(self.previous)

    def lock_images(self) -> None:
        """Until it is released, no other run removes an image."""
        if not self.images_lock.acquire(self.params["lock_timeout"], shared=True):
            text = "another run is removing images, and did not end in %s s (it holds %s)"
            raise ReleaseError("lock", text % (self.params["lock_timeout"], self.images_lock.path))

    def wanted(self, digest: str | None) -> Settings:
        secrets = {key: environment_text(value) for key, value in (self.params["secrets"] or {}).items()}
        return settings_of(self.params, digest, self.store.revision(secrets, create=not self.check_mode))

    # the two states

    def absent(self) -> None:
        live, upcoming, previous = self.look()
        record = self.store.read("release.json")
        self.before = (record or (live.record if live else None) or {}).get("settings")
        found = [entry for entry in (upcoming, previous, live) if entry]
        if not found and not os.path.isdir(self.store.base):
            return
        self.changed, self.action = True, "removed"
        if self.check_mode:
            return
        for entry in found:
            if entry.running:
                self.docker.stop(entry.name, self.params["stop_timeout"])
            self.docker.remove(entry.name, volumes=bool(entry.record))
        self.store.delete_all()
        if self.params["image"]:
            self.prune()

    def present(self) -> None:
        digest: str | None = self.params["digest"] or None
        if self.check_mode:
            self.predict(digest)
            return
        wanted = self.wanted(digest)
        live, resume = self.recover(spec_of(wanted) if digest else None)
        self.record = self.store.read("release.json")
        self.before = self.record["settings"] if self.record else None
        if live and live.record and resume:
            self.after = wanted
            self.switch(live.record)
            return
        if digest and live and live.spec == spec_of(wanted) and self.serves(live):
            self.after = wanted
            return
        self.lock_images()
        self.preflight(live)
        image = self.fetch(digest)
        if not digest:
            digest = self.resolved(image)
            wanted = self.wanted(digest)
            if live and live.spec == spec_of(wanted) and self.serves(live):
                self.after = wanted
                return
        self.after = wanted
        record = self.new_record(wanted, image["Id"])
        self.create(record, image)
        self.images_lock.release()
        self.switch(record)

    def predict(self, digest: str | None) -> None:
        """Check mode: look, and touch nothing."""
        live, upcoming, previous = self.look()
        self.record = self.store.read("release.json")
        self.before = self.record["settings"] if self.record else None
        if not digest and live and live.record and live.record["tag"] == self.params["tag"]:
            digest = live.record["digest"]  # what the tag points at today is only known after a pull
        self.after = self.wanted(digest)
        interrupted = upcoming or previous or self.store.read("transition.json")
        if not live:
            self.changed, self.action = True, "recovered" if previous else "released"
        elif live.spec != spec_of(self.after):
            self.changed, self.action = True, "replaced"
        elif (
            interrupted
            or not self.record
            or self.record["release"] != live.release
            or not live.running
            or self.store.missing_secrets(live.release, self.after["secrets"])
            or self.health_problem(self.after, health_of(self.params))
        ):
            self.changed, self.action = True, "recovered"

    # what an interrupted run has left

    def recover(self, spec: str | None) -> tuple[Container | None, bool]:
        """Finish or undo what a killed run began. Says which container is live, and whether to go on proving it."""
        live, upcoming, previous = self.look()
        record = self.store.read("release.json")
        journal = self.store.read("transition.json")
        resume = came_back = False
        if upcoming or previous or journal:
            self.recovered("an earlier run was interrupted (%s); this one has put that in order" % self.story(journal))
        if upcoming:
            self.docker.remove(self.next)
        if previous and live:
            if record and live.release and record["release"] == live.release:
                self.docker.remove(self.previous, volumes=bool(previous.record))  # only the tidying was missing
                previous = None
            elif spec and live.spec == spec:
                resume = True
            else:
                self.docker.remove(self.name)
                live = None
        if previous and not live:
            # A stop that the killed run had asked for may still be under way: let it end before the start.
            if journal and journal.get("step") == "stop" and previous.running:
                self.docker.stop(self.previous, None)
            self.docker.rename(self.previous, self.name)
            live, came_back = self.docker.containers([self.name]).get(self.name), True
        unproven = live and live.record and not came_back and (not record or record["release"] != live.release)
        if live and live.record and not resume and unproven:
            # Nothing proves it, and nothing is there to go back to: the first release, or a lost record.
            if spec and live.spec == spec:
                resume = True
            elif live.running and self.healthy_now(live.record):
                self.commit(live.record, None)
            else:
                self.docker.remove(self.name)
                live = None
            self.recovered("%s was there without a record of having been proven" % self.name)
        if live and not resume and (live.paused or not live.running) and (live.record or journal):
            self.revive(live)
            live = self.docker.containers([self.name]).get(self.name)
        if not resume:
            self.store.delete("transition.json")
        self.tidy(live, previous)
        return live, resume

    def recovered(self, text: str) -> None:
        self.changed = True
        self.action = "recovered"
        self.warnings.append(text)

    @staticmethod
    def story(journal: Record | None) -> str:
        return "begun by %s at %s" % (journal["by"], journal["since"]) if journal else "before its switch began"

    def revive(self, live: Container) -> None:
        """A proven release that stands still serves again, before anything that could fail is tried."""
        self.recovered("%s was %s; it was started again" % (self.name, live.status))
        try:
            if live.paused:
                self.docker.unpause(self.name)
            elif live.status != "restarting":
                self.docker.start(self.name)
        except ReleaseError as error:
            self.warnings.append(error.text)
            return
        if live.record:
            try:
                self.wait(live.record["settings"], live.record["health"])
            except ReleaseError as error:
                self.warnings.append("the release that was there does not become healthy: %s" % error.text)

    def tidy(self, *kept: Container | None) -> None:
        """Secrets of releases that no container and no record needs."""
        record = self.store.read("release.json")
        needed = {entry.release for entry in kept if entry} | {(record or {}).get("release", "")}
        for release in sorted(self.store.release_ids() - needed):
            self.store.delete_release(release)

    # health

    @staticmethod
    def address(settings: Settings) -> str:
        return "127.0.0.1" if settings["bind_address"] in ("0.0.0.0", "") else settings["bind_address"]

    def health_problem(self, settings: Settings, health: Record, timeout: float = 2.0) -> str | None:
        return self.probe(self.address(settings), settings["port"], health["path"], health["status"], timeout)

    def healthy_now(self, record: Record) -> bool:
        return self.health_problem(record["settings"], record["health"]) is None

    def serves(self, live: Container) -> bool:
        """The wanted release is up; one that is only slow or still starting gets its time before it is replaced."""
        assert live.record
        settings, health = live.record["settings"], health_of(self.params)
        lost = self.store.missing_secrets(live.release, settings["secrets"])
        if lost:
            self.recovered("%s had lost the files of %s and is replaced" % (self.name, ", ".join(lost)))
            return False
        if live.running and not live.paused and self.health_problem(settings, health) is None:
            return True
        try:
            self.wait(settings, health)
        except ReleaseError as error:
            if error.reason != "unhealthy":
                raise
            self.recovered("%s was not healthy and is replaced: %s" % (self.name, error.text))
            return False
        return True

    def wait(self, settings: Settings, health: Record, fresh: bool = False) -> None:
        """Until the live container is healthy, or has died (for a fresh one: once), or the time is over."""
        limit = self.clock() + health["timeout"]
        url = "http://%s:%d%s" % (self.address(settings), settings["port"], health["path"])
        restarts = 0 if fresh else None
        while True:
            problem = self.health_problem(settings, health, timeout=min(5.0, health["timeout"]))
            live = self.docker.containers([self.name]).get(self.name)
            if live is None:
                raise ReleaseError("unhealthy", "the container has disappeared")
            restarts = live.restarts if restarts is None and live.running else restarts
            if not live.running or live.restarts > (restarts or 0):
                raise ReleaseError("unhealthy", self.death(live, settings))
            if problem is None:
                return
            if self.clock() >= limit:
                text = "%s gave no healthy answer within %s s: %s" % (url, health["timeout"], problem)
                raise ReleaseError("unhealthy", text)
            self.sleep(health["interval"])

    @staticmethod
    def death(live: Container, settings: Settings) -> str:
        if live.oom_killed:
            return "it was killed for using more memory than its %d MiB" % (settings["memory"] >> 20)
        if live.error:
            return "it could not run: %s" % live.error
        return "it ended with status %d before it was healthy" % live.exit_code

    # before the switch: nothing here touches the container that serves

    def preflight(self, live: Container | None) -> None:
        info = self.docker.info()
        self.server = "%s/%s" % (info.get("OSType", "linux"), architecture(info.get("Architecture", "")))
        self.data_root = info.get("DockerRootDir") or self.data_root
        total = info.get("MemTotal") or 0
        memory = parse_size(self.params["memory"])
        if total and memory > total:
            text = "memory is %s; allowed: at most the %d MiB that this host has" % (self.params["memory"], total >> 20)
            raise ReleaseError("memory", text)
        port = self.params["port"]
        if live and live.running and port in live.ports:
            return
        holders = self.docker.publishers(port)
        holder = (
            "container %s" % ", ".join(holders) if holders else self.find_listener(self.params["bind_address"], port)
        )
        if holder:
            raise ReleaseError("port_taken", "port %d is taken by %s" % (port, holder))

    def fetch(self, digest: str | None) -> Record:
        """The image, pulled where it is not here yet, and fit for this host's platform."""
        repository, tag = self.params["image"], self.params["tag"]
        reference = "%s@%s" % (repository, digest) if digest else "%s:%s" % (repository, tag)
        image = None
        if digest:
            # An image that was loaded from a file has no digest of a registry; its id says as much.
            image = self.docker.image(reference) or self.docker.image(digest)
        if not image:
            self.need_space()
            try:
                self.docker.pull(reference, self.params["pull_timeout"])
            except ReleaseError as error:
                local = self.docker.image(reference) if not digest and error.reason == "not_found" else None
                if not local:
                    raise
                image = local  # made on this host: no registry has it
            image = image or self.docker.image(reference)
        if not image:
            raise ReleaseError("not_found", "%s was pulled, and is gone again" % reference)
        platform = "%s/%s" % (image.get("Os", "linux"), architecture(image.get("Architecture", "")))
        if platform != self.server:
            raise ReleaseError("platform", "%s is built for %s, this host is %s" % (reference, platform, self.server))
        return image

    def resolved(self, image: Record) -> str:
        for entry in image.get("RepoDigests") or []:
            repository, _at, digest = entry.rpartition("@")
            if repository == self.params["image"]:
                return str(digest)
        return str(image["Id"])

    def need_space(self) -> None:
        wanted = self.params["min_free_disk_mb"]
        free = self.free_mb()
        if free is None or free >= wanted:
            return
        self.images_lock.release()
        self.prune()
        self.lock_images()
        free = self.free_mb()
        if free is not None and free < wanted:
            text = "no space left to pull: %s has %d MB free; allowed: %d MB or more" % (self.data_root, free, wanted)
            raise ReleaseError("no_space", text)

    def free_mb(self) -> int | None:
        try:
            state = os.statvfs(self.data_root)
        except OSError:
            return None
        return state.f_bavail * state.f_frsize // 1000000

    def new_record(self, settings: Settings, image_id: str) -> Record:
        return {
            "format": FORMAT,
            "service": self.name,
            "release": "%s-%s" % (time.strftime("%Y%m%dT%H%M%SZ", time.gmtime()), random_source.token_hex(3)),
            "image": settings["image"],
            "image_id": image_id,
            "tag": settings["tag"],
            "digest": settings["digest"],
            "spec": spec_of(settings),
            "settings": settings,
            "health": health_of(self.params),
            "by": self.by,
        }

    def create(self, record: Record, image: Record) -> None:
        secrets = {key: environment_text(value) for key, value in (self.params["secrets"] or {}).items()}
        folder = self.store.write_secrets(record["release"], secrets, self.params["user"])
        reference = "%s@%s" % (record["image"], record["digest"])
        if reference not in (image.get("RepoDigests") or []):
            reference = image["Id"]
        arguments = create_arguments(self.next, reference, record, folder)
        try:
            self.docker.create(arguments)
        except ReleaseError as error:
            if "already in use" not in error.text:
                raise
            self.docker.remove(self.next)  # the late work of a run that was killed while it created
            self.docker.create(arguments)

    # the switch

    def switch(self, record: Record) -> None:
        """From the old container to the new one, and back when it does not prove itself. Every step can be repeated."""
        live, upcoming, previous = self.look()
        journal = {"format": FORMAT, "release": record["release"], "by": self.by, "since": utc_now(), "step": "switch"}
        try:
            if upcoming:
                self.store.write("transition.json", journal)
                if live:
                    self.docker.rename(self.name, self.previous)
                    previous = live
                self.docker.rename(self.next, self.name)
            if previous and (previous.running or previous.status == "restarting"):
                self.store.write("transition.json", dict(journal, step="stop"))
                self.docker.stop(self.previous, self.old_stop_timeout(previous))
            self.docker.start(self.name)  # of a container that runs already this is no change
            self.wait(record["settings"], health_of(self.params), fresh=True)
            self.commit(record, previous)
        except (ReleaseError, OSError) as error:
            self.restore(record, error)
        try:
            if previous:
                self.docker.remove(self.previous, volumes=bool(previous.record))
            self.store.delete("transition.json")
            self.tidy()
            self.prune()
        except (ReleaseError, OSError) as error:
            self.warnings.append("the release serves, but tidying up failed and is left to the next run: %s" % error)

    @staticmethod
    def old_stop_timeout(previous: Container) -> int | None:
        return int(previous.record["settings"]["stop_timeout"]) if previous.record else None

    def commit(self, record: Record, previous: Container | None) -> None:
        old = self.store.read("release.json")
        kept = (
            {key: old[key] for key in ("release", "tag", "digest", "image", "image_id", "since") if key in old}
            if old
            else None
        )
        if old and old["image_id"] == record["image_id"] and old.get("previous"):
            kept = old["previous"]  # new settings for the same image: the image to go back to stays the same
        committed = dict(record, since=utc_now(), by=self.by, previous=kept)
        self.store.write("release.json", committed)
        self.changed = True
        self.action = "replaced" if old or previous else "released"
        self.record = committed

    def restore(self, record: Record, error: Exception) -> NoReturn:
        """The old release serves again; then the run fails with what the new one said."""
        reason = error.reason if isinstance(error, ReleaseError) else "start"
        text = error.text if isinstance(error, ReleaseError) else str(error)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            reason = "no_space"
        log: list[str] = []
        self.changed = True
        try:
            live, upcoming, previous = self.look()
            if upcoming:
                self.docker.remove(self.next)
            if live and live.release == record["release"]:
                log = self.docker.logs(self.name, record["health"]["path"])
                self.docker.remove(self.name)
                live = None
            if previous and not live:
                self.docker.rename(self.previous, self.name)
                live = previous
            if live:
                self.action = "restored"
                self.docker.start(self.name)
                if live.record:
                    self.wait(live.record["settings"], live.record["health"])
                text += ". The old release (%s) serves again" % (
                    live.labels.get("nemo.tag") or "a container of other origin"
                )
            else:
                self.action = "removed"
                text += ". There was no release before it, so nothing serves now"
            self.store.delete("transition.json")
            self.tidy(live)
        except (ReleaseError, OSError) as second:
            log += (
                ["-- the old release:"] + self.docker.logs(self.name, record["health"]["path"])
                if isinstance(second, ReleaseError)
                else []
            )
            text += ". THE OLD RELEASE DOES NOT SERVE EITHER: %s. The next run tries again" % second
        raise ReleaseError(reason, text, log)

    def prune(self) -> None:
        """Images of this repository that no container and no recorded release needs; not while another run pulls."""
        lock = Lock(self.store.images_lock_path)
        if not lock.try_acquire():
            lock.release()
            return
        candidates = self.docker.images(self.params["image"]) - self.store.needed_images()
        if candidates:
            for image in sorted(candidates - self.docker.used_images()):
                self.docker.remove_image(image)
        lock.release()


def architecture(name: str) -> str:
    """The name that images use for what a kernel calls its machine."""
    return {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm"}.get(name, name)
