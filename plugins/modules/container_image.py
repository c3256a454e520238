#!/usr/bin/python
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Module: a container image on this host, pulled ahead of its use, and what it says of itself."""

from __future__ import annotations

DOCUMENTATION = r"""
module: container_image
short_description: A container image on this host, pulled ahead of its use
version_added: 0.1.0
author: The nemo platform project (@nemo-platform)
description:
  - Pulls an image by its digest, or by its tag where no digest is given, when the host does not have it, and returns the image's own
    configuration. What is there already is not pulled again; nothing is started or removed.
  - The pull is done by a process of its own, which goes on when the run, the connection or the controller ends. Any further run for
    the same image waits for that process, or with O(wait=false) leaves it alone. After one that was killed, the layers that are
    complete stay.
  - Free disk is compared with what the registry's manifest says the layers need, before the pull.
  - A registry that cannot be reached, or from which nothing comes for O(stall_timeout) seconds, is tried again O(retries) times.
  - What it says meanwhile stands in C(<run_path>/progress/<name>), one line for each event.
options:
  image:
    description: Repository, without tag or digest.
    type: str
    required: true
  tag:
    description: Tag. A tag that has moved since it was pulled is not noticed; give O(digest) to be sure.
    type: str
  digest:
    description: Digest of the manifest, C(sha256:) and 64 hexadecimal digits. The tag is then for people alone.
    type: str
  wait:
    description: Whether to wait until the image is there.
    type: bool
    default: true
  timeout:
    description: Seconds to wait, and seconds after which a pull that does not end is given up.
    type: int
    default: 3600
  stall_timeout:
    description: Seconds without a sign of the pull after which it is begun again. Unpacking one very large layer gives few of them.
    type: int
    default: 600
  retries:
    description: Number of further pulls after a registry that could not be reached.
    type: int
    default: 3
  min_free_disk_mb:
    description: Megabytes (of 1,000,000 bytes) that shall stay free where the engine unpacks images beside what the image needs.
    type: int
    default: 1024
  space_factor:
    description:
      - How many times the size of the compressed layers the image needs on disk while it is pulled. Layers lie there compressed and
        unpacked for some time, and machine learning images unpack to about twice their size. 0 switches this part of the check off.
    type: float
    default: 3.0
  begun:
    description:
      - What the run that began it with O(wait=false) returned as RV(begun). A pull that has failed since then is this run's failure, and
        is not tried again.
    type: float
    default: 0
  name:
    description: Name of the progress file. V(image-) and the last part of O(image) when it is left out.
    type: str
  run_path:
    description: Folder for locks and progress.
    type: path
    default: /run/nemo
attributes:
  check_mode:
    description: Tells whether the image would be pulled, on a host without Docker Engine too.
    support: full
  diff_mode:
    description: The reference that would come.
    support: full
notes:
  - Where logind ends what users leave behind (C(KillUserProcesses=yes)), the process ends with the connection, and the next run goes on.
requirements:
  - The C(docker) command, 20.10 or newer, with the credentials of whoever runs the module (root's for C(become))
"""

EXAMPLES = r"""
- name: The engine's image begins to arrive
  nemo.platform.container_image:
    image: 084375578827.dkr.ecr.ap-northeast-2.amazonaws.com/vllm-openai
    tag: v0.33.0
    digest: sha256:2b7412e6465c3c7fc5bb21d3e6f1917c167358449fecac8176c6e496e5c1f05f
    wait: false
  register: image

- name: The engine's image is there
  nemo.platform.container_image:
    image: 084375578827.dkr.ecr.ap-northeast-2.amazonaws.com/vllm-openai
    digest: sha256:2b7412e6465c3c7fc5bb21d3e6f1917c167358449fecac8176c6e496e5c1f05f
    begun: "{{ image.begun }}"
  when: image.action == 'started'
"""

RETURN = r"""
action:
  description: V(present) when it was here, V(pulled) when it is now, V(started) with O(wait=false) when a process pulls it.
  returned: success
  type: str
  sample: pulled
reference:
  description: What the image is called on this host, for C(docker run).
  returned: success
  type: str
digest:
  description: The manifest's digest, also where a tag was asked for; the image's id for one that came from no registry. Empty while it is pulled.
  returned: success
  type: str
id:
  description: The image's id. Empty while it is pulled.
  returned: success
  type: str
size:
  description: Bytes on disk; 0 while it is pulled.
  returned: success
  type: int
config:
  description: What the image says of itself. Empty while it is pulled.
  returned: success
  type: dict
  contains:
    Env:
      description: Its environment.
      type: dict
      sample: {CUDA_VERSION: 13.0.2}
    Entrypoint:
      description: Its entry point.
      type: list
      elements: str
    Cmd:
      description: Its command.
      type: list
      elements: str
    Labels:
      description: Its labels.
      type: dict
    User:
      description: The user that it runs as.
      type: str
    WorkingDir:
      description: The folder that it begins in.
      type: str
    ExposedPorts:
      description: The ports that it names, such as C(8000/tcp).
      type: list
      elements: str
begun:
  description: When this run began, in seconds since 1970 by the host's clock, for O(begun).
  returned: success
  type: float
progress:
  description: The file that tells how far it is.
  returned: success
  type: str
reason:
  description: Class of the failure, as M(nemo.platform.container_release) has it, or V(pull_stalled), V(timeout), V(killed), V(internal).
  returned: failure
  type: str
  sample: no_space
advice:
  description: What to do about it, in one line.
  returned: failure
  type: str
"""

import hashlib
import os
import re
import time
from collections.abc import Sequence
from typing import Any

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.nemo.platform.plugins.module_utils.background import Background, Work, WorkError
from ansible_collections.nemo.platform.plugins.module_utils.container_release import (
    ADVICE as RELEASE_ADVICE,
)
from ansible_collections.nemo.platform.plugins.module_utils.container_release import (
    Docker,
    Lock,
    ReleaseError,
    architecture,
    image_folders,
)
from ansible_collections.nemo.platform.plugins.module_utils.image_pull import (
    Image,
    Pull,
    compressed_size,
    run_program,
)
from ansible_collections.nemo.platform.plugins.module_utils.progress import Progress, amount

ARGUMENTS: dict[str, dict[str, Any]] = {
    "image": {"type": "str", "required": True},
    "tag": {"type": "str"},
    "digest": {"type": "str"},
    "wait": {"type": "bool", "default": True},
    "timeout": {"type": "int", "default": 3600},
    "stall_timeout": {"type": "int", "default": 600},
    "retries": {"type": "int", "default": 3},
    "min_free_disk_mb": {"type": "int", "default": 1024},
    "space_factor": {"type": "float", "default": 3.0},
    "begun": {"type": "float", "default": 0.0},
    "name": {"type": "str"},
    "run_path": {"type": "path", "default": "/run/nemo"},
}
ADVICE = {
    **RELEASE_ADVICE,
    "arguments": "Set each named argument to an allowed value.",
    "internal": "This is a fault of the module: report it with its whole text.",
    "killed": "Look for what ended it: dmesg | grep -i oom; journalctl -n 50. Layers that are complete stay, run again.",
    "pull_stalled": "Check the way to the registry and the engine's disk, or raise stall_timeout. Layers that are complete stay.",
    "pull_timeout": "Check the way to the registry, or raise timeout. Layers that are complete stay.",
    "timeout": "Run again to go on waiting, or raise timeout.",
}


def check_request(params: dict[str, Any]) -> list[str]:
    """Everything wrong with the arguments, one line each."""
    wrong: list[str] = []

    def need(name: str, good: bool, allowed: str) -> None:
        if not good:
            wrong.append("%s is %r; allowed: %s" % (name, params[name], allowed))

    image = params["image"]
    plain = re.match(r"^[a-z0-9][a-zA-Z0-9._:/-]*$", image) and ":" not in image.rsplit("/", 1)[-1]
    need("image", bool(plain), "a repository without tag or digest")
    need("tag", not params["tag"] or bool(re.match(r"^\w[\w.-]{0,127}$", params["tag"])), "one image tag")
    digest = params["digest"]
    need("digest", not digest or bool(re.match(r"^sha256:[0-9a-f]{64}$", digest)), "sha256: and 64 hexadecimal digits")
    need(
        "name",
        not params["name"] or bool(re.match(r"^\w[\w.-]{0,200}$", params["name"])),
        "letters, digits, _, . and -",
    )
    for name, least in (
        ("timeout", 1),
        ("stall_timeout", 1),
        ("retries", 0),
        ("min_free_disk_mb", 0),
        ("space_factor", 0),
    ):
        need(name, params[name] >= least, "%d or more" % least)
    return wrong


class Run:
    """One run of the module."""

    def __init__(self, params: dict[str, Any]) -> None:
        self.params = params
        self.begun = time.time()
        self.docker = Docker(run_program)
        self.image = Image(self.docker, params["image"], params["tag"] or "", params["digest"] or "")
        name = params["name"] or "image-%s" % params["image"].rsplit("/", 1)[-1]
        self.progress = Progress(name, params["run_path"])
        key = "image-%s" % hashlib.sha256(self.image.reference.encode()).hexdigest()[:16]
        self.background = Background(key, self.progress, params["run_path"])

    def run(self, check_mode: bool) -> dict[str, Any]:
        found = self.image.look()
        if found:
            self.image.check_platform(found, self.docker.info())
            return self._result("present", found)
        if check_mode:
            self._need_space()
            return self._result("pulled", None)
        wait, timeout, begun = (self.params[name] for name in ("wait", "timeout", "begun"))
        data = self.background.run(self.image.look, self._prepare, wait, timeout, begun)
        if data is None:
            return self._result("started", None)
        self.image.check_platform(data, self.docker.info())
        return self._result("pulled", data)

    def _need_space(self) -> int:
        """Compressed bytes of the image, if there is room for it."""
        info = self.docker.info()
        machine = architecture(info.get("Architecture", ""))
        size = compressed_size(self.image.reference, run_program, machine) if self.params["space_factor"] else 0
        root = image_folders(info)[-1]
        status = os.statvfs(root)
        free, reserve = status.f_bavail * status.f_frsize, self.params["min_free_disk_mb"] * 1000000
        needed = int(size * self.params["space_factor"])
        if free < needed + reserve:
            raise ReleaseError(
                "no_space",
                "%s has %s free, and a pull of %s needs %s%s and %s in reserve"
                % (
                    root, amount(free), self.image.reference, amount(needed),
                    " (%s compressed)" % amount(size) if size else "", amount(reserve),
                ),
            )  # fmt: skip
        return size

    def _prepare(self) -> Work:
        size = self._need_space()
        params, background = self.params, self.background
        images = Lock(os.path.join(params["run_path"], "images.lock"))

        def descriptors() -> Sequence[int]:
            return [entry.descriptor for entry in (background.lock, images) if entry.descriptor is not None]

        pull = Pull(
            self.image.reference, self.progress, descriptors, params["timeout"], params["stall_timeout"],
            params["retries"], size,
        )  # fmt: skip

        def work() -> None:
            # While it is held no other run removes images; it goes with this process.
            if not images.acquire(params["timeout"], shared=True):
                raise WorkError("lock", "another run is removing images, and holds %s" % images.path)
            pull.run()

        return work

    def _result(self, action: str, found: dict[str, Any] | None) -> dict[str, Any]:
        config = (found or {}).get("Config") or {}
        environment = (entry.partition("=") for entry in config.get("Env") or [])
        return {
            "changed": action != "present",
            "action": action,
            "reference": self.image.reference,
            "digest": self.image.resolved(found) if found else self.params["digest"] or "",
            "id": found["Id"] if found else "",
            "size": int(found.get("Size") or 0) if found else 0,
            "config": {
                "Env": {name: value for name, _sign, value in environment},
                "Entrypoint": config.get("Entrypoint") or [],
                "Cmd": config.get("Cmd") or [],
                "Labels": config.get("Labels") or {},
                "User": config.get("User") or "",
                "WorkingDir": config.get("WorkingDir") or "",
                "ExposedPorts": sorted(config.get("ExposedPorts") or {}),
            }
            if found
            else {},
            "begun": self.begun,
            "progress": self.progress.path,
        }


def main() -> None:
    """Run the module."""
    module = AnsibleModule(argument_spec=ARGUMENTS, required_one_of=[("tag", "digest")], supports_check_mode=True)
    params: dict[str, Any] = module.params
    wrong = check_request(params)
    if wrong:
        module.fail_json(msg="; ".join(wrong), reason="arguments", advice=ADVICE["arguments"])
    run = Run(params)
    reason, text = "", ""
    result: dict[str, Any] = {}
    try:
        if not module.get_bin_path("docker"):
            raise ReleaseError("docker_missing", "there is no docker command on this host")
        result = run.run(bool(module.check_mode))
    except (ReleaseError, WorkError) as error:
        reason, text = error.reason, error.text
    except OSError as error:
        reason, text = "no_space" if error.errno in (28, 122) else "docker", str(error)
    if reason in ("docker_missing", "engine_down") and module.check_mode:
        module.warn("%s; a run that is no check sets it up first" % text)
        result, reason = run._result("pulled", None), ""
    if reason:
        advice = ADVICE.get(reason, ADVICE["docker"])
        what = run.image.reference
        module.fail_json(
            msg="%s failed [%s]: %s. %s" % (what, reason, text.rstrip("."), advice), reason=reason, advice=advice
        )
    if module._diff and result["changed"]:
        after = "%s\n" % run.image.reference
        result["diff"] = {"before": "", "after": after, "before_header": "images", "after_header": "images"}
    module.exit_json(**result)


if __name__ == "__main__":
    main()
