#!/usr/bin/python
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Module: containers on this host see its NVIDIA card, and go on seeing it."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: gpu_containers
short_description: Containers see the host's NVIDIA card, proven
version_added: "0.1.0"
author: The nemo platform project (@nemo-platform)
description:
  - Looks at the packages of NVIDIA's container toolkit, the runtime that the Docker Engine knows, the card, and the CDI
    specification. Where the packages are not of the wanted version it says so and does nothing else.
  - Otherwise it holds the packages, starts O(units), has a stale CDI specification made anew by C(nvidia-cdi-refresh.service),
    and proves that a container sees the card - a new one; one that was there before C(systemctl daemon-reload), and one that was
    there before a restart of the engine. Each must list the same cards as the host.
  - What was proven stands in C(/var/lib/nemo/gpu_containers/proof.json), together with the versions of driver, kernel, toolkit and
    engine. A run that finds the same ones proves nothing anew.
  - Containers that run are not disturbed. With another container on the card the reload and the restart are left out, as a host
    whose containers lose the card by a reload would lose it for that one; RV(proof.left_out) says so. Without live-restore the
    engine is never restarted while a container runs.
options:
  version:
    description: Wanted version of the packages, for example V(1.20.1-1).
    type: str
    required: true
  packages_required:
    description: Whether packages of another version are an error. Otherwise RV(packages_needed) names them.
    type: bool
    default: false
  runtime:
    description: Name of the runtime, as the engine knows it.
    type: str
    default: nvidia
  runtime_hint:
    description: What to do where the engine does not know the runtime; ends the error's sentence.
    type: str
    default: ''
  card_required:
    description: Whether a card that cannot be used is an error. Otherwise nothing is proven there.
    type: bool
    default: true
  units:
    description: Units that shall run before a container gets the card.
    type: list
    elements: str
    default: []
  proof:
    description:
      - When to prove. V(changed) proves when what was proven last is not what is there now; V(always) proves in each run, with the
        reload and the restart, also when other containers use the card; V(never) proves nothing.
    type: str
    choices: [changed, always, never]
    default: changed
  image:
    description:
      - Image of the proof's container, best by digest. It needs a C(sleep) and the GNU C library, as NVIDIA's and vLLM's images have
        them. It is pulled where it is not there.
      - Empty takes an image that the module makes of the host's own shell and C library, some megabytes, so that nothing is pulled.
    type: str
    default: ''
  timeout:
    description: Seconds for one container to start, for a restart of the engine, and for the proof's image to be pulled.
    type: int
    default: 120
attributes:
  check_mode:
    description: Says what would be done. What is not there yet is no error, as the roles before may not have brought it.
    support: full
  diff_mode:
    description: There is nothing to show.
    support: none
notes:
  - Needs root by C(become). One run at a time on a host; a second one waits.
"""

EXAMPLES = r"""
- name: Containers see the card
  nemo.platform.gpu_containers:
    version: 1.20.1-1
    packages_required: true
  become: true

- name: They still do after a reload and a restart of the engine, tried now
  nemo.platform.gpu_containers:
    version: 1.20.1-1
    proof: always
  become: true
"""

RETURN = r"""
packages_needed:
  description: Packages that are not there in the wanted version.
  returned: success
  type: list
  elements: str
packages:
  description: Installed packages by name, each with C(version) and C(held).
  returned: success
  type: dict
done:
  description: What was done, in order.
  returned: success
  type: list
  elements: str
  sample: [made the CDI specification anew, proved that a new container sees the card]
proof:
  description: The proof that holds, with C(rounds) (V(new), V(reload), V(restart)), C(left_out) (sentences that say why others were not tried), C(at) and
    C(facts); empty where nothing was proven.
  returned: success
  type: dict
problems:
  description: What keeps containers from the card; in check mode, or where no card is required.
  returned: success
  type: list
  elements: str
"""

import contextlib
import fcntl
import hashlib
import io
import json
import os
import re
import shutil
import tarfile
import time
from collections.abc import Iterator, Sequence
from typing import Any, Callable

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.nemo.platform.plugins.module_utils import container_toolkit, gpu

STATE = "/var/lib/nemo/gpu_containers"
LOCK = "/run/nemo/gpu_containers.lock"
CONTAINER = "nemo-gpu-proof"
IMAGE = "nemo/gpu-proof"
REFRESH = "nvidia-cdi-refresh"
# Seconds after which a container that a killed run left behind ends by itself.
LIFETIME = 900
LIST_CARDS = ["nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader"]
RELOAD_HINT = (
    "containers on this host lose the card at each systemctl daemon-reload: see `ls -l /dev/char | grep nvidia`, where the card's devices need a name, and where it stays so"
    ' set docker_engine_options: {exec-opts: ["native.cgroupdriver=cgroupfs"]} (nvidia-container-toolkit issue 48)'
)

Run = Callable[..., "tuple[int, str, str]"]


class ContainersError(Exception):
    """Containers do not see the card; the text says why, and what to do."""


def one_line(*texts: str) -> str:
    """The last thing that a program said."""
    said = [line.strip() for text in texts for line in text.splitlines() if line.strip()]
    return said[-1] if said else "it said nothing"


class Containers:
    """The steps of one run. `run(argv, timeout)` is a program of the host; `root` is / but in tests."""

    def __init__(
        self,
        wanted: dict[str, Any],
        run: Run,
        check: bool,
        root: str = "/",
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.wanted, self.run, self.check, self.root, self.sleep = wanted, run, check, root, sleep
        self.done: list[str] = []
        self.problems: list[str] = []
        self.proof: dict[str, Any] = {}
        self.packages: dict[str, dict[str, Any]] = {}
        self.gpu: dict[str, Any] = {}
        self.engine: dict[str, Any] = {}

    @property
    def needed(self) -> list[str]:
        """Packages that are not there in the wanted version."""
        return [
            name
            for name in container_toolkit.PACKAGES
            if self.packages.get(name, {}).get("version") != self.wanted["version"]
        ]

    def _must(self, what: str, *argv: str, timeout: float | None = None) -> str:
        code, out, err = self.run(argv, timeout or self.wanted["timeout"])
        if code != 0:
            raise ContainersError(f"{what}: {one_line(out, err)}")
        return out

    def _did(self, text: str) -> None:
        self.done.append(text)

    # Looks

    def look(self) -> None:
        """What is there; raises for what no later step of this run can bring."""
        self.packages = container_toolkit.packages(self.run, self.root)
        self.gpu = gpu.look(self.root, self.run)
        try:
            self.engine = container_toolkit.engine(self.run)
            if self.wanted["runtime"] not in (self.engine.get("Runtimes") or {}):
                self.problems.append(
                    f"the Docker Engine knows no runtime {self.wanted['runtime']}{self.wanted['runtime_hint']}"
                )
        except container_toolkit.EngineError as error:
            self.problems.append(str(error))
        if self.problems and not self.check:
            raise ContainersError("; ".join(self.problems))
        if not self.gpu["usable"]:
            text = f"the card cannot be used: {self.gpu['problem']}"
            if self.wanted["card_required"] and not self.check:
                raise ContainersError(text)
            self.problems.append(text)
        if self.needed and self.wanted["packages_required"] and not self.check:
            found = ", ".join(
                f"{name} {self.packages.get(name, {}).get('version', '(not there)')}" for name in self.needed
            )
            raise ContainersError(f"wanted is {self.wanted['version']}, the host has {found}")

    def facts(self) -> dict[str, Any]:
        """What a proof holds for."""
        driver = self.gpu["driver"]
        return {
            "driver": driver["loaded"],
            "libraries": driver["libraries"],
            "kernel": driver["kernel"],
            "cards": self.cards,
            "toolkit": self.wanted["version"],
            "engine": self.engine.get("ServerVersion"),
            "runtime": ((self.engine.get("Runtimes") or {}).get(self.wanted["runtime"]) or {}).get("path"),
            "image": self.wanted["image"],
        }

    @property
    def cards(self) -> list[str]:
        return sorted(device["uuid"] for device in self.gpu["devices"])

    @property
    def _proof_path(self) -> str:
        return os.path.join(self.root, STATE.lstrip("/"), "proof.json")

    def last_proof(self) -> dict[str, Any]:
        try:
            with open(self._proof_path, encoding="utf-8") as stream:
                found = json.load(stream)
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    # Steps

    def hold(self) -> None:
        loose = [name for name in container_toolkit.PACKAGES if not self.packages[name]["held"]]
        if not loose:
            return
        if not self.check:
            if self.run(["apt-mark", "--version"], 30)[0] != 127:
                self._must("packages cannot be held", "apt-mark", "hold", *loose)
            else:
                # a lock of an earlier version would stay beside the new one
                self.run(["dnf", "--quiet", "versionlock", "delete", *loose], self.wanted["timeout"])
                self._must("packages cannot be locked", "dnf", "--quiet", "versionlock", "add", *loose)
            self.packages = container_toolkit.packages(self.run, self.root)
        self._did(f"held {', '.join(loose)}")

    def start_units(self) -> None:
        for unit in self.wanted["units"]:
            if self.run(["systemctl", "is-active", "--quiet", unit], 30)[0] != 0:
                if not self.check:
                    self._must(f"{unit} does not start", "systemctl", "start", unit)
                    if self.run(["systemctl", "is-active", "--quiet", unit], 30)[0] != 0:
                        continue  # a condition of its own keeps it from starting
                self._did(f"started {unit}")

    def watch_driver(self) -> None:
        """The unit that sees a driver change, and has the specification made anew."""
        path = f"{REFRESH}.path"
        enabled = self.run(["systemctl", "is-enabled", "--quiet", path], 30)[0] == 0
        if not enabled or self.run(["systemctl", "is-active", "--quiet", path], 30)[0] != 0:
            if not self.check:
                self._must(f"{path} does not start", "systemctl", "enable", "--now", path)
            self._did(f"enabled {path}")

    def refresh(self) -> None:
        libraries = self.gpu["driver"]["libraries"]
        problem = container_toolkit.cdi_problem(libraries, self.root)
        if not problem:
            return
        if not self.check:
            unit = f"{REFRESH}.service"
            code, _out, err = self.run(["systemctl", "restart", unit], self.wanted["timeout"])
            still = container_toolkit.cdi_problem(libraries, self.root)
            if still:
                _code, journal, _err = self.run(
                    ["journalctl", "--unit", unit, "--lines=5", "--output=cat", "--no-pager"], 30
                )
                why = one_line(journal, err if code else "")
                raise ContainersError(f"{still}, and {unit} did not make one that fits: {why}")
        self._did(f"made the CDI specification anew: {problem}")

    # The proof

    def prove(self) -> None:
        last, facts = self.last_proof(), self.facts()
        if self.wanted["proof"] == "never":
            return
        if self.wanted["proof"] == "changed" and last.get("facts") == facts:
            self.proof = last
            return
        if self.check:
            self._did("proved that containers see the card")
            return
        left_out: list[str] = []
        self._remove()
        try:
            image = self._image()
            self._start(image)
            self._see("a new container")
            rounds = ["new"]
            others = self._others_on_the_card()
            if others and self.wanted["proof"] != "always":
                left_out.append(
                    f"no daemon-reload and no restart of the engine was tried, with {', '.join(others)} on the card"
                )
            else:
                self._must("systemd cannot reload its units", "systemctl", "daemon-reload")
                self._see("a running container, after systemctl daemon-reload,", RELOAD_HINT)
                rounds.append("reload")
                left = self._restart_engine()
                if left:
                    left_out.append(f"no restart of the engine was tried: {left}")
                else:
                    self._see("a running container, after a restart of the engine,")
                    self._remove()
                    self._start(image)
                    self._see("a new container, after a restart of the engine,")
                    rounds.append("restart")
        finally:
            self._remove()
        self.proof = {
            "facts": facts,
            "rounds": rounds,
            "left_out": left_out,
            "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        self._keep()
        names = {"new": "new", "reload": "after a daemon-reload", "restart": "after a restart of the engine"}
        self._did(f"proved that containers see the card: {', '.join(names[word] for word in rounds)}")

    def _keep(self) -> None:
        os.makedirs(os.path.dirname(self._proof_path), exist_ok=True)
        draft = f"{self._proof_path}.new"
        with open(draft, "w", encoding="utf-8") as stream:
            stream.write(json.dumps(self.proof, indent=2) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(draft, self._proof_path)

    def _remove(self) -> None:
        self.run(["docker", "rm", "--force", CONTAINER], self.wanted["timeout"])

    def _start(self, image: str) -> None:
        self._must(
            f"no container starts with the runtime {self.wanted['runtime']}",
            "docker", "run", "--detach", "--name", CONTAINER, "--runtime", self.wanted["runtime"], "--pull", "never",
            "--env", "NVIDIA_VISIBLE_DEVICES=all", "--env", "NVIDIA_DRIVER_CAPABILITIES=compute,utility",
            "--network", "none", "--log-driver", "none", "--pids-limit", "64", "--memory", "512m", "--security-opt", "no-new-privileges",
            "--entrypoint", "sleep", image, str(LIFETIME),
        )  # fmt: skip

    def _see(self, who: str, hint: str = "") -> None:
        code, out, err = self.run(["docker", "exec", CONTAINER, *LIST_CARDS], self.wanted["timeout"])
        seen = sorted(line.strip() for line in out.splitlines() if line.strip())
        if code != 0:
            raise ContainersError(f"{who} does not see the card: {one_line(err, out)}{'; ' + hint if hint else ''}")
        if seen != self.cards:
            raise ContainersError(f"{who} sees {', '.join(seen) or 'no card'}, the host has {', '.join(self.cards)}")

    def _running(self) -> list[dict[str, Any]]:
        names = self._must("containers cannot be listed", "docker", "ps", "--quiet", "--no-trunc").split()
        if not names:
            return []
        code, out, _err = self.run(["docker", "inspect", *names], self.wanted["timeout"])
        # one that ended meanwhile makes the status 1; the others are there all the same
        found = json.loads(out) if code in (0, 1) and out.strip() else []
        return [entry for entry in found if entry["Name"].lstrip("/") != CONTAINER]

    def _others_on_the_card(self) -> list[str]:
        return [
            entry["Name"].lstrip("/")
            for entry in self._running()
            if entry["HostConfig"].get("Runtime") == self.wanted["runtime"] or entry["HostConfig"].get("DeviceRequests")
        ]

    def _restart_engine(self) -> str:
        """Restart it, and see that every container lives on; why not, where it would end one."""
        before = {entry["Id"]: entry for entry in self._running()}
        names = {key: entry["Name"].lstrip("/") for key, entry in before.items()}
        if not self.engine.get("LiveRestoreEnabled"):
            return (
                f"live-restore is off, it would end {', '.join(sorted(names.values())) or 'the container of the proof'}"
            )
        fleeting = sorted(names[key] for key, entry in before.items() if entry["HostConfig"].get("AutoRemove"))
        if fleeting:  # the engine removes them when it starts, live-restore or not
            return f"it would end {', '.join(fleeting)}, started with --rm"
        # restarts of others may have used up what systemd allows
        self.run(["systemctl", "reset-failed", "docker.service"], 30)
        self._must("the engine does not restart", "systemctl", "restart", "docker.service")
        deadline = time.monotonic() + self.wanted["timeout"]
        while True:
            try:
                container_toolkit.engine(self.run)
                break
            except container_toolkit.EngineError as error:
                if time.monotonic() > deadline:
                    raise ContainersError(f"after its restart {error}") from error
                self.sleep(0.5)
        after = {entry["Id"]: entry for entry in self._running()}
        gone = [
            names[key]
            for key, entry in before.items()
            if after.get(key, {}).get("State", {}).get("Pid") != entry["State"]["Pid"]
        ]
        if gone:
            raise ContainersError(f"the restart of the engine ended {', '.join(gone)}, though live-restore is on")
        return ""

    # The image

    def _image(self) -> str:
        image = self.wanted["image"]
        if image:
            if self.run(["docker", "image", "inspect", image], 30)[0] != 0:
                self._must(
                    f"the image {image} of the proof is not there and cannot be pulled (an empty one takes the host's own C library)",
                    "docker", "pull", "--quiet", image,
                )  # fmt: skip
            return str(image)
        files = self._files()
        digest = hashlib.sha256()
        for path in files:
            with open(os.path.join(self.root, path.lstrip("/")), "rb") as stream:
                digest.update(path.encode() + hashlib.sha256(stream.read()).digest())
        image = f"{IMAGE}:{digest.hexdigest()[:12]}"
        if self.run(["docker", "image", "inspect", image], 30)[0] == 0:
            return image
        older = self._must("images cannot be listed", "docker", "images", "--quiet", IMAGE).split()
        archive = os.path.join(self.root, LOCK.lstrip("/") + ".tar")
        try:
            self._pack(files, archive)
            self._must("the image of the proof cannot be made", "docker", "import", archive, image)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(archive)
        for name in older:
            self.run(["docker", "image", "rm", name], self.wanted["timeout"])
        return image

    def _files(self) -> list[str]:
        """A shell, sleep, and the libraries that they and nvidia-smi need."""
        programs = [self._program(name) for name in ("sh", "sleep")]
        found = set(programs)
        for program in [*programs, self._program("nvidia-smi")]:
            code, out, _err = self.run(["ldd", program], 30)
            if code == 0:  # a script has no libraries
                found.update(re.findall(r"(?:=> |^\s*)(/\S+) \(0x", out, re.MULTILINE))
        return sorted(found)

    @staticmethod
    def _program(name: str) -> str:
        return shutil.which(name, path="/usr/bin:/bin:/usr/sbin:/sbin") or f"/usr/bin/{name}"

    def _pack(self, files: Sequence[str], target: str) -> None:
        with tarfile.open(target, "w") as archive:
            for name, mode in (("tmp", 0o1777), ("etc", 0o755), ("usr", 0o755)):
                folder = tarfile.TarInfo(name)
                folder.type, folder.mode = tarfile.DIRTYPE, mode
                archive.addfile(folder)
            for name in ("bin", "lib", "lib64"):
                path = os.path.join(self.root, name)
                if os.path.islink(path):  # to the folder of that name below /usr
                    link = tarfile.TarInfo(name)
                    link.type, link.linkname = tarfile.SYMTYPE, os.readlink(path)
                    archive.addfile(link)
            for path in files:
                with open(os.path.join(self.root, path.lstrip("/")), "rb") as stream:
                    content = stream.read()
                folder_of = os.path.realpath(os.path.dirname(path))
                member = tarfile.TarInfo(os.path.join(folder_of, os.path.basename(path)).lstrip("/"))
                member.size, member.mode = len(content), 0o755
                archive.addfile(member, io.BytesIO(content))

    # The run

    def act(self) -> None:
        self.look()
        if self.needed:
            return
        self.hold()
        self.watch_driver()
        if self.problems:
            return
        self.start_units()
        self.refresh()
        self.prove()

    def result(self) -> dict[str, Any]:
        return {
            "changed": bool(self.done),
            "packages_needed": self.needed,
            "packages": self.packages,
            "done": self.done,
            "proof": self.proof,
            "problems": self.problems,
        }


@contextlib.contextmanager
def alone(path: str) -> Iterator[None]:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "a", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def run(argv: Sequence[str], timeout: float = gpu.TIMEOUT) -> tuple[int, str, str]:
    return gpu.program(argv, timeout)


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "version": {"type": "str", "required": True},
            "packages_required": {"type": "bool", "default": False},
            "runtime": {"type": "str", "default": "nvidia"},
            "runtime_hint": {"type": "str", "default": ""},
            "card_required": {"type": "bool", "default": True},
            "units": {"type": "list", "elements": "str", "default": []},
            "proof": {"type": "str", "choices": ["changed", "always", "never"], "default": "changed"},
            "image": {"type": "str", "default": ""},
            "timeout": {"type": "int", "default": 120},
        },
        supports_check_mode=True,
    )
    containers = Containers(module.params, run, bool(module.check_mode))
    try:
        with contextlib.nullcontext() if module.check_mode else alone(LOCK):
            containers.act()
    except ContainersError as error:
        module.fail_json(msg=str(error), **containers.result())
    module.exit_json(**containers.result())


if __name__ == "__main__":
    main()
