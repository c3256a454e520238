"""The container engine that the lab runs on: the machine's own if it answers, else one that the lab starts."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import tarfile
import time
from collections.abc import Sequence
from typing import Any

from lab.console import LabError, say, step
from lab.run import run
from lab.settings import NETWORK

RUN = pathlib.Path("/run/nemo-lab")
DATA = pathlib.Path("/var/lib/nemo-lab")
SOCKET = RUN / "docker.sock"
PID_FILE = RUN / "dockerd.pid"
LOG = RUN / "dockerd.log"


class Engine:
    """Docker's command line against one engine."""

    def __init__(self, socket: pathlib.Path | None) -> None:
        self.own = socket is not None
        self.prefix = ["docker", *(["--host", f"unix://{socket}"] if socket else [])]

    def __call__(self, *args: str, stdin: bytes | None = None, check: bool = True, timeout: float = 600) -> str:
        done = run([*self.prefix, *args], stdin=stdin, check=check, timeout=timeout)
        return done.stdout.decode(errors="replace").strip()

    def answers(self) -> bool:
        try:
            done = run([*self.prefix, "version", "--format", "{{.Server.Version}}"], check=False, timeout=20)
        except LabError:
            return False
        return done.returncode == 0 and bool(done.stdout.strip())

    def inspect(self, kind: str, name: str) -> dict[str, Any] | None:
        """The description of an object, or None where there is none."""
        done = run([*self.prefix, kind, "inspect", name], check=False)
        found = json.loads(done.stdout or b"[]")
        return found[0] if found else None

    def copy_in(self, container: str, tar: bytes) -> None:
        """Unpack a tar archive at the root of a container, running or not."""
        run([*self.prefix, "cp", "-", f"{container}:/"], stdin=tar)

    def exec(self, container: str, argv: Sequence[str], *, check: bool = True, timeout: float = 600) -> str:
        return self("exec", container, *argv, check=check, timeout=timeout)

    @property
    def host_url(self) -> str:
        """DOCKER_HOST for other programs; empty where the default is right."""
        return f"unix://{SOCKET}" if self.own else ""


def tar_entry(name: str, data: bytes, mode: int = 0o644) -> tuple[tarfile.TarInfo, bytes]:
    """A root-owned file for Engine.copy_in."""
    info = tarfile.TarInfo(name.lstrip("/"))
    info.size, info.mode = len(data), mode
    return info, data


def running() -> Engine | None:
    """The engine that is there already, started by nobody now."""
    own = Engine(SOCKET)
    if SOCKET.exists() and own.answers():
        return own
    system = Engine(None)
    if not shutil.which("docker") or not system.answers():
        return None
    problem = unsuitable(system)
    if problem and os.geteuid() != 0:
        raise LabError(
            f"the Docker client here uses {problem}: the lab needs an engine that runs on this machine itself"
        )
    return None if problem else system


def unsuitable(engine: Engine) -> str:
    """Why an engine cannot carry the lab: its containers must have this machine for a neighbour."""
    endpoint = engine("context", "inspect", "--format", "{{.Endpoints.docker.Host}}", check=False)
    if endpoint and not endpoint.startswith("unix://"):
        return f"a remote engine ({endpoint})"
    about = engine("info", "--format", "{{.OperatingSystem}} {{.SecurityOptions}}", check=False)
    return next(
        (
            kind
            for kind, mark in (("Docker Desktop", "Docker Desktop"), ("a rootless engine", "name=rootless"))
            if mark in about
        ),
        "",
    )


def ensure() -> Engine:
    """An engine that answers: the machine's own, else the lab's, installed and started where that is possible."""
    found = running()
    if found:
        if not found.own:
            say("uses the Docker Engine that runs on this machine")
        return found
    if os.geteuid() != 0:
        raise LabError(
            "no Docker Engine answers. Start one (sudo systemctl start docker), join its group "
            "(sudo usermod -aG docker $USER, then log in again), or run this as root, which brings an engine of its own."
        )
    if not shutil.which("dockerd") or not shutil.which("docker"):
        _install()
    _start()
    return Engine(SOCKET)


def _install() -> None:
    if not shutil.which("apt-get"):
        raise LabError(
            "no Docker Engine is installed: install your distribution's package (docker), then run this again."
        )
    with step("Docker Engine is not installed: installing the distribution's packages"):
        apt_install(["docker.io", "iptables"])
        if not shutil.which("docker"):  # Debian 13 packs the client on its own
            apt_install(["docker-cli"])


def apt_install(packages: Sequence[str]) -> None:
    """Install packages of this machine's distribution without starting any of their services."""
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "NEEDRESTART_MODE": "l"}
    argv = ["apt-get", "-o", "DPkg::Lock::Timeout=300", "install", "--yes", "--no-install-recommends", *packages]
    policy = pathlib.Path("/usr/sbin/policy-rc.d")  # what Debian's maintainer scripts ask before they start anything
    answer = "#!/bin/sh\n# The nemo lab installs packages; remove this file if it is still here.\nexit 101\n"
    ours = not policy.exists() or policy.read_text() == answer  # one of an interrupted run goes too
    try:
        if ours:
            policy.write_text(answer)
            policy.chmod(0o755)
        if run(argv, env=env, check=False).returncode != 0:  # no package lists yet, or old ones
            run(["apt-get", "-o", "DPkg::Lock::Timeout=300", "update"], env=env)
            run(argv, env=env)
    finally:
        if ours:
            policy.unlink()


def _start() -> None:
    RUN.mkdir(parents=True, exist_ok=True)
    DATA.mkdir(parents=True, exist_ok=True, mode=0o710)
    # No bridge, no firewall rules, no forwarding: the lab's network is isolated, so nothing of the machine changes.
    # Namespaces of its own, because dockerd uses the machine's containerd where one runs.
    argv = [
        "dockerd", "--host", f"unix://{SOCKET}", "--data-root", str(DATA / "docker"), "--exec-root", str(RUN / "exec"),
        "--pidfile", str(PID_FILE), "--bridge", "none", "--iptables=false", "--ip6tables=false", "--ip-masq=false",
        "--ip-forward=false", "--containerd-namespace", "nemo-lab", "--containerd-plugins-namespace", "nemo-lab-plugins",
    ]  # fmt: skip
    with step("no Docker Engine runs here: starting the lab's own"):
        if not _processes("dockerd"):  # else an interrupted run has started it already
            PID_FILE.unlink(missing_ok=True)
            with LOG.open("wb") as log:
                subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
            time.sleep(0.5)
        engine, deadline = Engine(SOCKET), time.monotonic() + 60
        while not (SOCKET.exists() and engine.answers()):
            if not _processes("dockerd") or time.monotonic() > deadline:
                lines = LOG.read_text(errors="replace").splitlines()[-8:]
                raise LabError("the lab's Docker Engine did not start:\n  " + "\n  ".join(lines))
            time.sleep(0.2)


def _processes(*programs: str) -> list[int]:
    """The lab's own engine processes: of these programs, with its folder among their arguments."""
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            argv = path.read_bytes().split(b"\0")
            stat = path.with_name("stat").read_text().rpartition(")")[2].split()
            program = pathlib.Path(argv[0].decode(errors="replace")).name
            if stat[0] != "Z" and program in programs and any(str(RUN).encode() in argument for argument in argv):
                found.append(int(path.parent.name))
    return found


def _end(signum: int, seconds: float, *programs: str) -> None:
    for pid in _processes(*programs):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signum)
    deadline = time.monotonic() + seconds
    while _processes(*programs) and time.monotonic() < deadline:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(-1, os.WNOHANG)
        time.sleep(0.1)


def stop() -> None:
    """Stop the engine that the lab started, and remove all it stored. Any other engine is left alone."""
    if _processes("dockerd", "containerd"):
        with step("stopping the lab's own Docker Engine"):
            _end(signal.SIGTERM, 30, "dockerd")
            _end(signal.SIGKILL, 10, "dockerd", "containerd", "containerd-shim-runc-v2")
    killed = DATA.exists() and pathlib.Path("/sys/class/net", NETWORK).exists()  # else it took its bridge away
    for folder in (RUN, DATA):
        if folder.exists():
            for mount in sorted(_mounts_below(folder), reverse=True):
                run(["umount", "--lazy", mount], check=False)
            shutil.rmtree(folder)
    if killed and shutil.which("ip"):
        run(["ip", "link", "delete", NETWORK])


def _mounts_below(folder: pathlib.Path) -> list[str]:
    mounts = [line.split()[1] for line in pathlib.Path("/proc/mounts").read_text().splitlines()]
    return [mount for mount in mounts if mount.startswith(f"{folder}/")]
