# Copyright: the nemo.platform authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What releases are made of: what is asked for, the host's files and locks, the engine by its command line, and probes.

How a release is made of them stands in ``release_flow``, what leads traffic to it in ``release_proxy``.
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
import socket
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Callable, NamedTuple, NoReturn, Optional

from ansible_collections.nemo.platform.plugins.module_utils.service_logs import clean

Record = dict[str, Any]
Settings = dict[str, Any]
Runner = Callable[[Sequence[str]], tuple[int, str, str]]
Prober = Callable[[str, int, "Question", float], Optional[str]]

FORMAT = 2
OLD_FORMAT = 1  # of releases that held the public port themselves
MINIMUM_MEMORY = 64 * 1024 * 1024
RESERVED_ENVIRONMENT = ("IMAGE_TAG", "IMAGE_DIGEST", "RELEASE_ID")
LOG_LINES = 20
RESTART = "unless-stopped"  # of every container that serves
DOCKER_SECONDS = 60  # for a docker command; longer where the engine has more to do
# What new hosts have from Docker 29 on; the engine tells the folder of everything else alone.
CONTAINERD_STORE = "io.containerd.snapshotter.v1"
CONTAINERD_ROOT = "/var/lib/containerd"
TIMED_OUT = (124, 137, -9)  # of timeout(1), which dies of its own SIGKILL where the command outlives SIGTERM
# What may hang for the sake of the one container that is its last word: a process that waits for a disk or a card does not end.
OF_ONE = tuple(("container", what) for what in ("start", "stop", "restart", "unpause", "rm"))
LOG_SEARCHED = 2000  # the last lines in which the reason of a failure is looked for
PROBE_AGENT = "nemo-container-release"  # how health questions name themselves

ADVICE = {
    "authentication": "Check this host's registry credentials: its instance role needs ECR read access, an ECR token"
    " lives 12 hours, and root's docker configuration must name the credential helper for this registry.",
    "docker_missing": "Install Docker Engine first (role nemo.platform.docker_engine).",
    "engine_down": "Start it and look at its journal: systemctl status docker; journalctl -u docker -n 50.",
    "lock": "Wait for that run to end, then run again.",
    "bake": "Read the log lines of the failed release. It was healthy, and then failed with real traffic: mend it, and"
    " release it under a new tag, or with force.",
    "failed_before": "Release a newer image. To try this one again all the same, set force: playbooks/deploy.yml -e force=true, or"
    " playbooks/vllm.yml -e vllm_force=true.",
    "mount": "Mount what is missing on this host, or name another folder; nothing was stopped.",
    "runtime": "Install that runtime and name it in the engine's daemon.json (role docker_engine, docker_engine_runtimes).",
    "memory": "Lower the service's memory, free memory on the host, or let the old release stop before the new one starts:"
    " strategy stop-start, in the inventory, or for one run by playbooks/deploy.yml -e strategy=stop-start.",
    "no_release": "Name one of the releases that this host has kept; playbooks/releases.yml lists them.",
    "proxy": "Look at its journal: journalctl -u 'nemo-proxy-*' -n 50.",
    "proxy_missing": "Install HAProxy on this host first: it owns the service's public port (role container_service does).",
    "no_space": "Free space on this host: docker system df; docker image prune; journalctl --vacuum-size=200M.",
    "not_found": "Check the repository and the tag: it was never pushed, or a lifecycle rule has removed it.",
    "platform": "Build and push the image for this host's platform.",
    "port_taken": "Stop what holds the port, or give the service another one.",
    "pull_timeout": "Check the way to the registry, or raise pull_timeout.",
    "registry_certificate": "Install the registry's certificate authority on this host, or check its clock.",
    "registry_unreachable": "Check name resolution, routes and security groups from this host to the registry on 443.",
    "state": "Nothing was touched. Put the file back from a backup; or, where the service may be down for a moment, remove it"
    " together with the service's containers (docker ps -a --filter label=nemo.service=NAME), and release again.",
    "start": "Read the reason above; the container was created but the engine could not start it.",
    "unhealthy": "Read the log lines of the failed release, mend the image or its settings, and release again.",
    "docker": "Run the named docker command on the host to see more.",
    "unexpected": "Neither the image nor its settings caused it: mend what the host lacks (memory, open files, a command), or report"
    " it, and run again.",
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

    def __init__(self, reason: str, text: str, log_tail: Sequence[str] = (), cause: str = "") -> None:
        super().__init__(text)
        self.reason = reason
        self.cause = cause  # what the failed release's log says of it
        self.text = " ".join(text.split())
        self.log_tail = list(log_tail)

    @property
    def advice(self) -> str:
        return ADVICE.get(self.reason, "")


def release_error(error: Exception) -> ReleaseError:
    """Anything that may go wrong, as what a run fails with."""
    if isinstance(error, ReleaseError):
        return error
    if isinstance(error, OSError):
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        return ReleaseError("no_space" if full else "unexpected", str(error))
    where = traceback.extract_tb(error.__traceback__)[-1:]
    place = "".join(" (%s:%d)" % (os.path.basename(frame.filename), frame.lineno or 0) for frame in where)
    return ReleaseError("unexpected", "%s: %s%s" % (type(error).__name__, error, place))


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


def port_range(value: str) -> range:
    """The ports of a range such as 20000-20999. ValueError when it is none."""
    match = re.match(r"^(\d+)-(\d+)$", value)
    if not match or not 1024 <= int(match.group(1)) <= int(match.group(2)) <= 65535:
        raise ValueError(value)
    return range(int(match.group(1)), int(match.group(2)) + 1)


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
    if params["state"] != "present":
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
    wrong += check_container(params) + check_health(params) + check_patterns(params)
    for name, least in (
        ("health_status", 100),
        ("health_timeout", 1),
        ("settle_time", 0),
        ("bake_time", 0),
        ("bake_min_requests", 1),
        ("drain_timeout", 0),
        ("keep", 1),
        ("reserve_memory_mb", 0),
        ("proxy_timeout", 1),
        ("proxy_keep_alive", 1),
        ("proxy_max_connections", 10),
        ("proxy_retries", 0),
        ("pids_limit", 0),
        ("proxy_retry_after", 0),
        ("log_max_file", 1),
        ("pull_timeout", 1),
        ("stop_timeout", 0),
        ("min_free_disk_mb", 0),
        ("lock_timeout", 0),
    ):
        need(name, params[name] >= least, "%d or more" % least)
    need("health_interval", params["health_interval"] > 0, "more than 0 seconds")
    need("bake_error_percent", 0 <= params["bake_error_percent"] <= 100, "0 to 100")
    smoke = params.get("smoke") or {}
    if smoke and not str(smoke.get("path") or "").startswith("/"):
        wrong.append("smoke.path is %r; allowed: a path that begins with /" % smoke.get("path"))
    try:
        port_range(params["release_ports"])
    except ValueError:
        need("release_ports", False, "two ports of 1024 to 65535 with - between them, such as 20000-20999")
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


def check_container(params: Mapping[str, Any]) -> list[str]:
    """What is wrong with the container's command, mounts, runtime and shared memory."""
    wrong: list[str] = []
    if params["runtime"] and not re.match(r"^[A-Za-z0-9][\w.-]*$", params["runtime"]):
        wrong.append("runtime is %r; allowed: the name of a runtime of the engine, such as nvidia" % params["runtime"])
    if params["shm_size"]:
        try:
            parse_size(params["shm_size"])
        except ValueError:
            text = "shm_size is %r; allowed: a number with b, k, m or g, such as 512m or 1g"
            wrong.append(text % params["shm_size"])
    targets: set[str] = set()
    for number, mount in enumerate(params["mounts"] or []):
        for side in ("source", "target"):
            path = str(mount[side])
            # docker reads a mount as fields with commas between them
            if not path.startswith("/") or os.path.normpath(path) != path or re.search(r'[,"\s]', path):
                text = "mounts[%d].%s is %r; allowed: an absolute path without .., commas, quotes and blanks"
                wrong.append(text % (number, side, path))
        if mount["target"] in targets or mount["target"] in ("/", "/run/secrets"):
            text = "mounts[%d].target is %r; allowed: a folder of its own, neither / nor /run/secrets"
            wrong.append(text % (number, mount["target"]))
        targets.add(mount["target"])
    for number, word in enumerate(params["command"] or []):
        if "\0" in word:
            wrong.append("command[%d] has a NUL character; allowed: text without one" % number)
    return wrong


def check_health(params: Mapping[str, Any]) -> list[str]:
    wrong: list[str] = []
    for name in ("health_path", "proxy_check_path"):
        # It becomes a request line, and a line of HAProxy's configuration.
        if not re.match(r"^/[!-~]*$", params[name]) or re.search(r"[\"'#\\]", params[name]):
            wrong.append(
                "%s is %r; allowed: a path that begins with /, without blanks, quotes and #" % (name, params[name])
            )
    if params["health_request_timeout"] <= 0:
        text = "health_request_timeout is %r; allowed: more than 0 seconds"
        wrong.append(text % params["health_request_timeout"])
    if params["health_body"] and params["health_method"] == "GET":
        wrong.append("health_body is set and health_method is GET; allowed: a body with health_method POST")
    return wrong


def check_patterns(params: Mapping[str, Any]) -> list[str]:
    """Regular expressions that are none, and texts that name groups which their expression does not have."""
    wrong: list[str] = []
    for kind in ("phases", "failure_patterns"):
        for number, entry in enumerate(params[kind] or []):
            try:
                re.compile(entry["pattern"]).sub(entry.get("text") or "", "")
            except (re.error, IndexError) as error:
                text = "%s[%d] is %r; allowed: a regular expression of Python, and groups that it has (%s)"
                wrong.append(text % (kind, number, entry["pattern"], error))
    return wrong


def settings_of(params: Mapping[str, Any], digest: str | None, secrets_revision: str) -> Settings:
    """What defines a release, without a secret value in it: this is hashed, labelled, recorded and shown in a diff."""
    settings = {
        "image": params["image"],
        "tag": params["tag"],
        "digest": digest,
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
    # Only where they are set: a release of before these inputs is still the same release.
    later = {
        "command": list(params["command"] or []),
        "mounts": [{key: mount[key] for key in ("source", "target", "read_only")} for mount in params["mounts"] or []],
        "runtime": params["runtime"] or "",
        "shm_size": parse_size(params["shm_size"]) if params["shm_size"] else 0,
    }
    settings.update({key: value for key, value in later.items() if value})
    return settings


def spec_of(settings: Settings) -> str:
    text = json.dumps({"format": FORMAT, "settings": settings}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


class Question(NamedTuple):
    """One request, and what a good answer to it is."""

    method: str
    path: str
    headers: dict[str, str]
    body: str
    status: int
    contains: str

    @property
    def text(self) -> str:
        return "%s %s" % (self.method, self.path)


def question_of(data: Mapping[str, Any]) -> Question:
    return Question(
        str(data.get("method") or "GET"),
        str(data["path"]),
        {str(key): str(value) for key, value in (data.get("headers") or {}).items()},
        str(data.get("body") or ""),
        int(data.get("status") or 200),
        str(data.get("contains") or ""),
    )


def health_of(params: Mapping[str, Any]) -> Record:
    """How a release is proven: kept with it, so that a rollback proves it in the same way."""
    health = {
        "path": params["health_path"],
        "status": params["health_status"],
        "contains": params["health_contains"] or "",
        "timeout": params["health_timeout"],
        "interval": params["health_interval"],
        "settle": params["settle_time"],
        "smoke": params["smoke"] or {},
    }
    later = {
        "method": params["health_method"] if params["health_method"] != "GET" else "",
        "headers": params["health_headers"],
        "body": params["health_body"],
        "request_timeout": params["health_request_timeout"] if params["health_request_timeout"] != 5 else 0,
    }
    health.update({key: value for key, value in later.items() if value})
    return health


def request_timeout(health: Mapping[str, Any]) -> float:
    """Seconds that one answer to a release's health question may take."""
    return float(health.get("request_timeout") or 5)


def create_arguments(
    name: str, reference: str, record: Record, secrets_path: str | None, restart: str = RESTART
) -> list[str]:
    """The arguments of ``docker create`` for a release. Secrets are a mount, never an argument."""
    wanted: Settings = record["settings"]
    arguments = ["--name", name, "--pull", "never", "--init", "--restart", restart]
    arguments += ["--security-opt", "no-new-privileges", "--cap-drop", "ALL", "--user", wanted["user"]]
    arguments += ["--memory", str(wanted["memory"]), "--memory-swap", str(wanted["memory"])]
    arguments += ["--stop-timeout", str(wanted["stop_timeout"])]
    if wanted["pids_limit"]:
        arguments += ["--pids-limit", str(wanted["pids_limit"])]
    if wanted.get("runtime"):
        arguments += ["--runtime", wanted["runtime"]]
    if wanted.get("shm_size"):
        arguments += ["--shm-size", str(wanted["shm_size"])]
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
    for mount in wanted.get("mounts") or []:
        # Not --volume: that would create a missing source, as an empty folder of root's.
        access = ",readonly" if mount["read_only"] else ""
        arguments += ["--mount", "type=bind,source=%s,target=%s%s" % (mount["source"], mount["target"], access)]
    if wanted["network"]:
        arguments += ["--network", wanted["network"]]
    # On the loopback address: HAProxy owns the public one.
    arguments += ["--publish", "127.0.0.1:%d:%d" % (record["host_port"], wanted["container_port"])]
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
    return arguments + list(wanted.get("command") or [])


# -- the host's files -------------------------------------------------------------------------------------------------


def sync_folder(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: str, text: str, mode: int) -> None:
    """The whole new text or the whole old one, after a loss of power too."""
    temporary = "%s.tmp" % path
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fchmod(stream.fileno(), mode)
        os.fsync(stream.fileno())
    os.replace(temporary, path)
    sync_folder(os.path.dirname(path))


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

    def read(self, what: str, form: int = FORMAT) -> Record | None:
        return self._read(os.path.join(self.base, what), form)

    @staticmethod
    def _read(path: str, form: int = FORMAT) -> Record | None:
        try:
            with open(path, encoding="utf-8") as stream:
                data = json.load(stream)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError) as error:
            # It is written whole or not at all: without it nobody knows what serves, and guessing would stop that.
            raise ReleaseError("state", "%s cannot be read: %s" % (path, error)) from error
        return data if isinstance(data, dict) and data.get("format") == form else None

    def write(self, what: str, data: Record) -> None:
        self._directory(self.base, 0o700)
        text = json.dumps(dict(data, format=FORMAT), indent=2, sort_keys=True)
        replace_file(os.path.join(self.base, what), text + "\n", 0o600)
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
        sync_folder(path)

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
        self.delete_release(release)  # what a killed run may have written half
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
        path = os.path.join(self.releases, release)
        if os.path.isdir(path):
            shutil.rmtree(path, ignore_errors=True)
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
            folder = os.path.join(self.root, service)
            state = self._read(os.path.join(folder, "state.json")) or {}
            entries = list(state.get("releases") or [])
            entries.append((self._read(os.path.join(folder, "transition.json")) or {}).get("record"))
            old = self._read(os.path.join(folder, "release.json"), OLD_FORMAT)
            entries += [old, (old or {}).get("previous")]
            needed.update(entry.get("image_id", "") for entry in entries if entry)
        return needed - {""}

    def used_ports(self) -> set[int]:
        """Ports of this host that a recorded release of any service has."""
        used: set[int] = set()
        try:
            services = os.listdir(self.root)
        except OSError:
            return used
        for service in services:
            try:
                state = self._read(os.path.join(self.root, service, "state.json")) or {}
            except ReleaseError:  # another service's; who listens is looked at, too
                continue
            used.update(int(entry.get("host_port") or 0) for entry in state.get("releases") or [])
        return used


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
            text = "%s since %s (process %d, %s)" % (data["by"], data["since"], pid, data["what"])
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
    memory: int
    image: str
    started: str = ""  # when, as the engine writes it
    policy: str = RESTART
    pid: int = 0
    address: str = ""  # in a network of the engine
    id: str = ""  # which outlives a change of name
    inside: Mapping[int, int] = MappingProxyType({})  # port in the container, by the port of the host that leads to it

    @property
    def record(self) -> Record | None:
        """The release that this container is, None for a container that is not one of ours."""
        try:
            data = json.loads(self.labels.get("nemo.record", ""))
        except ValueError:
            return None
        return data if isinstance(data, dict) else None

    @property
    def release(self) -> str:
        return self.labels.get("nemo.release", "")

    @property
    def spec(self) -> str:
        return self.labels.get("nemo.spec", "")

    @classmethod
    def parse(cls, data: Mapping[str, Any]) -> Container:
        state = data["State"]
        host = data.get("HostConfig") or {}
        inside: dict[int, int] = {}
        for port, bindings in (host.get("PortBindings") or {}).items():
            number = int(port.partition("/")[0])
            inside.update({int(entry["HostPort"]): number for entry in bindings or [] if entry.get("HostPort")})
        networks = ((data.get("NetworkSettings") or {}).get("Networks") or {}).values()
        restart = host.get("RestartPolicy") or {}
        most = restart.get("MaximumRetryCount")
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
            ports=set(inside),
            memory=int(host.get("Memory") or 0),
            image=data.get("Image") or "",
            started=state.get("StartedAt") or "",
            pid=int(state.get("Pid") or 0),
            address=next((entry["IPAddress"] for entry in networks if entry.get("IPAddress")), ""),
            inside=inside,
            id=data.get("Id") or "",
            policy=(restart.get("Name") or "no") + (":%d" % most if most else ""),
        )


def image_folders(info: Mapping[str, Any]) -> list[str]:
    """What a pull fills: the engine's own folder and, where images are containerd's, that of containerd, in which they are unpacked."""
    folders = [info.get("DockerRootDir") or "/var/lib/docker"]
    if ["driver-type", CONTAINERD_STORE] in (info.get("DriverStatus") or []) and os.path.isdir(CONTAINERD_ROOT):
        folders.append(CONTAINERD_ROOT)
    return folders


class Docker:
    """The few docker commands that a release needs; every failure comes out as a ReleaseError with its class."""

    def __init__(self, run: Runner, timeout_command: str | None = None) -> None:
        self.run = run
        self.timeout_command = timeout_command

    @staticmethod
    def fail(doing: str, stderr: str) -> NoReturn:
        raise ReleaseError(classify(stderr), "%s: %s" % (doing, last_line(stderr)))

    def limited(self, words: Sequence[str], seconds: int = DOCKER_SECONDS) -> tuple[int, str, str]:
        """A docker command, which an engine that hangs would otherwise not end, nor let go of the lock."""
        if not self.timeout_command:
            return self.run(["docker"] + list(words))
        rc, out, err = self.run([self.timeout_command, "--kill-after=10", str(seconds), "docker"] + list(words))
        if rc in TIMED_OUT and tuple(words[:2]) in OF_ONE:
            box = self.containers(words[-1:]).get(words[-1])  # says so itself where it is the engine that hangs
            text = "docker container %s %s took more than %d s; the engine answers, and the container is %s"
            raise ReleaseError("docker", text % (words[1], words[-1], seconds, box.status if box else "gone"))
        if rc in TIMED_OUT:
            text = "the Docker Engine does not answer: docker %s took more than %d s"
            raise ReleaseError("engine_down", text % (" ".join(words[:2]), seconds))
        return rc, out, err

    def call(self, doing: str, *arguments: str, seconds: int = DOCKER_SECONDS) -> str:
        rc, out, err = self.limited(arguments, seconds)
        if rc:
            self.fail(doing, err or out)
        return out

    def containers(self, names: Sequence[str]) -> dict[str, Container]:
        if not names:
            return {}
        rc, out, err = self.limited(["container", "inspect", "--format", "{{json .}}"] + list(names))
        if rc and [line for line in err.splitlines() if line.strip() and "no such container" not in line.lower()]:
            self.fail("the containers cannot be inspected", err)
        found = [Container.parse(json.loads(line)) for line in out.splitlines() if line.startswith("{")]
        return {entry.name: entry for entry in found if entry.name in names}

    def of_service(self, name: str | None) -> list[str]:
        """Names of the containers that are releases of this service, or of any."""
        label = "label=nemo.service=%s" % name if name else "label=nemo.service"
        out = self.call(
            "containers cannot be listed", "container", "ls", "--all", "--filter", label, "--format", "{{.Names}}"
        )
        return [line.strip() for line in out.splitlines() if line.strip()]

    def info(self) -> Record:
        data: Record = json.loads(self.call("the Docker Engine does not answer", "info", "--format", "{{json .}}"))
        if data.get("ServerErrors"):
            self.fail("the Docker Engine does not answer", data["ServerErrors"][-1])
        return data

    def image(self, reference: str) -> Record | None:
        rc, out, err = self.limited(["image", "inspect", "--format", "{{json .}}", reference])
        if not rc:
            data: Record = json.loads(out)
            return data
        if "no such image" not in err.lower():
            self.fail("image %s cannot be inspected" % reference, err)
        return None

    def pull(self, reference: str, limit: int) -> None:
        try:
            rc, out, err = self.limited(["pull", "--quiet", reference], limit)
        except ReleaseError as error:
            raise ReleaseError("pull_timeout", "pulling %s took more than %d s" % (reference, limit)) from error
        if rc:
            self.fail("%s cannot be pulled" % reference, err or out)

    def create(self, arguments: Sequence[str]) -> None:
        self.call("the container cannot be created", "container", "create", *arguments, seconds=2 * DOCKER_SECONDS)

    def rename(self, old: str, new: str) -> None:
        self.call("%s cannot be renamed to %s" % (old, new), "container", "rename", old, new)

    def start(self, name: str) -> None:
        rc, out, err = self.limited(["container", "start", name], 2 * DOCKER_SECONDS)
        if rc:
            reason = classify(err)
            text = "%s cannot be started: %s" % (name, last_line(err or out))
            known = ("engine_down", "no_space", "platform", "port_taken")
            raise ReleaseError(reason if reason in known else "start", text)

    def stop(self, name: str, seconds: int) -> None:
        doing = "%s cannot be stopped" % name
        self.call(doing, "container", "stop", "-t", str(seconds), name, seconds=seconds + DOCKER_SECONDS)

    def restart(self, name: str, seconds: int) -> None:
        doing = "%s cannot be restarted" % name
        self.call(doing, "container", "restart", "-t", str(seconds), name, seconds=seconds + 2 * DOCKER_SECONDS)

    def unpause(self, name: str) -> None:
        self.call("%s cannot be resumed" % name, "container", "unpause", name)

    def remove(self, name: str, volumes: bool = True) -> None:
        command = ["container", "rm", "--force"] + (["--volumes"] if volumes else []) + [name]
        rc, _out, err = self.limited(command, 2 * DOCKER_SECONDS)
        if not rc or "no such container" in err.lower():
            return
        if "already in progress" in err.lower():  # of a run that was killed in the middle of this very command
            for _attempt in range(60):
                if name not in self.containers([name]):
                    return
                time.sleep(0.5)
        self.fail("%s cannot be removed" % name, err)

    def log(self, name: str, lines: int, since: str = "") -> list[str]:
        """The last lines of both streams of a container, fit to be shown."""
        limits = ["--tail", str(lines)] + (["--since", since] if since else [])
        rc, out, err = self.limited(["container", "logs"] + limits + [name])
        # An application writes to either stream; what it said on stderr is what matters more, so it stands last.
        return [] if rc else [clean(line) for line in (out + err).splitlines() if line.strip()]

    def logs(self, name: str, health: Mapping[str, Any]) -> list[str]:
        """The last lines of a container's log, without those that only say that its health was asked for."""
        asked = '"%s %s HTTP' % (health.get("method") or "GET", health["path"])
        lines = self.log(name, 10 * LOG_LINES)
        telling = [line for line in lines if asked not in line]
        return (telling or lines)[-LOG_LINES:]

    def restart_policy(self, policy: str, *names: str) -> None:
        self.call("%s cannot be updated" % " and ".join(names), "container", "update", "--restart", policy, *names)

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
        rc, _out, _err = self.limited(["image", "rm", image], 5 * DOCKER_SECONDS)
        return not rc


# -- health and ports -------------------------------------------------------------------------------------------------


def probe_http(address: str, port: int, question: Question, timeout: float) -> str | None:
    """One request; None when it is answered as it should be, otherwise what was wrong."""
    connection = http.client.HTTPConnection(address, port, timeout=timeout)
    late = threading.Event()

    def end(sock: socket.socket) -> None:
        late.set()
        try:
            sock.shutdown(socket.SHUT_RDWR)
        except OSError:  # it is over by itself
            pass

    limit = None
    try:
        connection.connect()
        # A socket's timeout begins anew with each byte: an answer that never ends would not end here either.
        limit = threading.Timer(timeout, end, (connection.sock,))
        limit.daemon = True
        limit.start()
        headers = {"User-Agent": PROBE_AGENT, "Connection": "close"}
        headers.update(question.headers)
        connection.request(question.method, question.path, body=question.body.encode() or None, headers=headers)
        answer = connection.getresponse()
        body = answer.read(1 << 20).decode("utf-8", "replace")
        if late.is_set():
            return "timed out"
        shown = body.strip().splitlines()[0][:80] if body.strip() else ""
        if answer.status != question.status:
            return "it answered %d, not %d%s" % (answer.status, question.status, ": %s" % shown if shown else "")
        if question.contains not in body:
            return "its answer does not contain %r%s" % (question.contains, ": %s" % shown if shown else "")
        return None
    except OSError as error:
        return "timed out" if late.is_set() else (error.strerror or str(error) or type(error).__name__).lower()
    except http.client.HTTPException as error:
        return "timed out" if late.is_set() else "it answered what is not HTTP (%s)" % type(error).__name__
    finally:
        if limit:
            limit.cancel()
        connection.close()


def memory_now(meminfo: str = "/proc/meminfo") -> tuple[int, int]:
    """Bytes of memory that there are, and that are free to use; zeros where the kernel does not say."""
    values: dict[str, int] = {}
    try:
        with open(meminfo, encoding="ascii") as stream:
            for line in stream:
                name, _colon, rest = line.partition(":")
                values[name] = int(rest.split()[0]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return values.get("MemTotal", 0), values.get("MemAvailable", 0)


def connections(process: str, port: int, state: str = "01") -> list[list[str]]:
    """Rows of the kernel's tables of TCP, as a process sees them: those with this local port in this state (01: established)."""
    found: list[list[str]] = []
    for table in ("tcp", "tcp6"):
        try:
            with open(os.path.join(process, "net", table), encoding="ascii") as stream:
                rows = [row.split() for row in stream.readlines()[1:]]
        except OSError:
            continue
        found += [row for row in rows if row[3] == state and int(row[1].rpartition(":")[2], 16) == port]
    return found


def listener(address: str, port: int, proc: str = "/proc") -> str | None:
    """Who listens on a TCP port of this host, None when nobody does."""
    inodes: set[str] = set()
    for fields in connections(proc, port, "0A"):
        bound = fields[1].rpartition(":")[0]
        if len(bound) == 8 and address != "0.0.0.0" and bound != "00000000":
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


def architecture(name: str) -> str:
    """The name that images use for what a kernel calls its machine."""
    return {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm"}.get(name, name)
