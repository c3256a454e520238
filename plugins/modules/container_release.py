#!/usr/bin/python
# Copyright: the nemo.platform authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""One service on one host as releases."""

from __future__ import annotations

DOCUMENTATION = r"""
module: container_release
short_description: Run one service on one host as releases of a container image
version_added: 0.1.0
author:
  - The nemo.platform authors (@nemo-platform)
description:
  - Brings one container to the wanted release in one remote execution. It pulls the image by digest, creates the new container while the
    old one still serves, stops the old one, starts the new one, and waits until it is healthy.
  - A release that does not become healthy is removed and the old container is put back. The module then fails with the reason and with the
    last log lines of the failed release.
  - A pull that fails, a full disk or a taken port is found before the old container is touched.
  - A run that was killed at any point is finished or undone by the next run. What a run does on one service is done under a lock, which
    the kernel drops when its holder dies.
  - Containers run with an init process, without capabilities or new privileges, with limits on memory, processes and logs, and restart
    unless they were stopped.
  - Secrets become files under C(/run/secrets) in the container. They appear in no argument, environment, label, diff or log.
  - Needs nothing but Python and the C(docker) command, 20.10 or newer, on the managed host.
attributes:
  check_mode:
    support: full
    description: Says what would be done, on a host without Docker Engine too. What a tag without O(digest) points at is only known after a
      pull, so a moved tag is not foreseen.
  diff_mode:
    support: full
    description: Shows the settings of the release before and after, with the names of the secrets and a revision of their values.
options:
  name:
    description: The service. It is the container's name, and the name of the service's folder below O(state_path).
    type: str
    required: true
  state:
    description: V(present) runs the release; V(absent) removes the service's containers, secrets, record and images.
    type: str
    choices: [present, absent]
    default: present
  image:
    description: The image's repository, without tag and digest. Required with O(state=present).
    type: str
  tag:
    description: The image's tag. Required with O(state=present). It is given to the container as E(IMAGE_TAG).
    type: str
  digest:
    description:
      - The image's digest, C(sha256:) and 64 hexadecimal digits. The container runs this, whatever the tag points at.
      - Nothing is pulled when an image with this digest, or with this id, is on the host already.
      - Without it the tag is pulled in every run and its digest is recorded.
    type: str
  port:
    description: The port of the host, 1 to 65535. Required with O(state=present).
    type: int
  container_port:
    description: The port inside the container. The same as O(port) when it is left out.
    type: int
  bind_address:
    description: The address of the host that O(port) is published on.
    type: str
    default: 0.0.0.0
  network:
    description: The engine's network that the container joins. The engine's own default when it is left out.
    type: str
  environment:
    description: Environment variables of the container. For what is secret there is O(secrets).
    type: dict
    default: {}
  secrets:
    description: Secrets by name; each becomes a file C(/run/secrets/NAME) that only the container's user can read.
    type: dict
    default: {}
  memory:
    description: Memory limit, such as V(512m) or V(1g); at least V(64m). There is no swap beyond it.
    type: str
    default: 1g
  cpus:
    description: CPU limit, in processors. None when it is left out.
    type: float
  pids_limit:
    description: Limit on the number of processes and threads.
    type: int
    default: 512
  user:
    description: Numeric uid, or uid and gid, that the container runs as.
    type: str
    default: 10001:10001
  read_only:
    description: Whether the container's root file system is read-only.
    type: bool
    default: true
  tmpfs:
    description: Folders of the container that are in memory, each with options of its own after a colon if need be.
    type: list
    elements: str
    default: [/tmp]
  log_max_size:
    description: Size at which the container's log file is rotated.
    type: str
    default: 10m
  log_max_file:
    description: Number of log files that are kept.
    type: int
    default: 3
  health_path:
    description: Path that is asked for to see whether the release is healthy.
    type: str
    default: /health
  health_status:
    description: HTTP status of a healthy answer.
    type: int
    default: 200
  health_timeout:
    description: Seconds that a release has to become healthy.
    type: int
    default: 60
  health_interval:
    description: Seconds between two questions.
    type: float
    default: 0.5
  stop_timeout:
    description: Seconds that a container has to end by itself when it is stopped.
    type: int
    default: 10
  pull_timeout:
    description: Seconds that a pull may take.
    type: int
    default: 900
  min_free_disk_mb:
    description: Megabytes (10^6) that must be free in the engine's data folder before a pull. Images that no release needs are removed first.
    type: int
    default: 1024
  lock_timeout:
    description: Seconds to wait for another run on this service to end.
    type: int
    default: 120
  operator:
    description: Who releases; it is recorded and shown to those who wait for the lock. The user that logged in when it is left out.
    type: str
  state_path:
    description: Folder of the records and secrets.
    type: path
    default: /var/lib/nemo
  run_path:
    description: Folder of the locks.
    type: path
    default: /run/nemo
"""

EXAMPLES = r"""
- name: The production API runs its newest release
  nemo.platform.container_release:
    name: ai-prod
    image: 084375578827.dkr.ecr.ap-northeast-2.amazonaws.com/ai
    tag: prod-20250718-1040
    digest: sha256:5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03
    port: 8000
    memory: 1g
    environment:
      LOG_LEVEL: info
    secrets:
      OPENAI_API_KEY: "{{ vault_openai_api_key }}"

- name: A service is gone from this host
  nemo.platform.container_release:
    name: ai-dev
    state: absent
"""

RETURN = r"""
action:
  description:
    - What was done, or in check mode would be done.
    - V(released) is a first release, V(replaced) one in the place of another, V(recovered) that only an interrupted or stopped release was
      put in order; a failed release is V(restored) where the old one serves again, and V(removed) where there was none.
  returned: always
  type: str
  sample: replaced
release:
  description: The release that is in place after the run. Empty before the first one.
  returned: always
  type: dict
  contains:
    id: {description: The release., type: str, sample: 20250718T014102Z-5f3a9c}
    tag: {description: Its image's tag., type: str, sample: prod-20250718-1040}
    digest: {description: Its image's digest., type: str, sample: sha256:5891b5b5…}
    image: {description: Its image's repository., type: str, sample: 084375578827.dkr.ecr.ap-northeast-2.amazonaws.com/ai}
    since: {description: When it was proven (UTC)., type: str, sample: "2025-07-18T01:41:09Z"}
previous:
  description: The release before it, with the same keys as RV(release). Its image is kept on the host.
  returned: always
  type: dict
reason:
  description: The class of the failure.
  returned: failure
  type: str
  sample: unhealthy
advice:
  description: What to do about it, in one line.
  returned: failure
  type: str
  sample: Read the log lines of the failed release, mend the image or its settings, and release again.
log_tail:
  description: The last log lines of the release that failed.
  returned: always
  type: list
  elements: str
  sample: ["RuntimeError: cannot load the model"]
"""

import json
import os
import pwd
from collections.abc import Sequence
from typing import Any

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.nemo.platform.plugins.module_utils.container_release import (
    ADVICE,
    Docker,
    Lock,
    Record,
    ReleaseError,
    Releaser,
    Settings,
    Store,
    check_request,
    settings_of,
    utc_now,
)

ARGUMENTS: dict[str, dict[str, Any]] = {
    "name": {"type": "str", "required": True},
    "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
    "image": {"type": "str"},
    "tag": {"type": "str"},
    "digest": {"type": "str"},
    "port": {"type": "int"},
    "container_port": {"type": "int"},
    "bind_address": {"type": "str", "default": "0.0.0.0"},
    "network": {"type": "str"},
    "environment": {"type": "dict", "default": {}},
    "secrets": {"type": "dict", "default": {}, "no_log": True},
    "memory": {"type": "str", "default": "1g"},
    "cpus": {"type": "float"},
    "pids_limit": {"type": "int", "default": 512},
    "user": {"type": "str", "default": "10001:10001"},
    "read_only": {"type": "bool", "default": True},
    "tmpfs": {"type": "list", "elements": "str", "default": ["/tmp"]},
    "log_max_size": {"type": "str", "default": "10m"},
    "log_max_file": {"type": "int", "default": 3},
    "health_path": {"type": "str", "default": "/health"},
    "health_status": {"type": "int", "default": 200},
    "health_timeout": {"type": "int", "default": 60},
    "health_interval": {"type": "float", "default": 0.5},
    "stop_timeout": {"type": "int", "default": 10},
    "pull_timeout": {"type": "int", "default": 900},
    "min_free_disk_mb": {"type": "int", "default": 1024},
    "lock_timeout": {"type": "int", "default": 120},
    "operator": {"type": "str"},
    "state_path": {"type": "path", "default": "/var/lib/nemo"},
    "run_path": {"type": "path", "default": "/run/nemo"},
}


def brief(record: Record | None) -> dict[str, str]:
    if not record:
        return {}
    return {
        "id": record.get("release", ""),
        "tag": record.get("tag", ""),
        "digest": record.get("digest", ""),
        "image": record.get("image", ""),
        "since": record.get("since", ""),
    }


def difference(name: str, before: Settings | None, after: Settings | None) -> dict[str, str]:
    def text(settings: Settings | None) -> str:
        return json.dumps(settings, indent=2, sort_keys=True) + "\n" if settings else ""

    return {
        "before_header": "release of %s" % name,
        "after_header": "release of %s" % name,
        "before": text(before),
        "after": text(after),
    }


def login() -> str:
    try:
        return os.environ.get("SUDO_USER") or pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


def one_line(name: str, params: dict[str, Any], error: ReleaseError) -> str:
    what = "%s:%s" % (params["image"], params["tag"]) if params["image"] else "its removal"
    digest = " (%s)" % params["digest"] if params["digest"] else ""
    return (
        "%s: %s%s failed [%s]: %s. %s" % (name, what, digest, error.reason, error.text.rstrip("."), error.advice)
    ).strip()


def main() -> None:
    module = AnsibleModule(
        argument_spec=ARGUMENTS,
        required_if=[("state", "present", ("image", "tag", "port"))],
        supports_check_mode=True,
    )
    params: dict[str, Any] = module.params
    name: str = params["name"]
    wrong = check_request(params)
    if wrong:
        module.fail_json(
            msg="%s: %s" % (name, "; ".join(wrong)),
            reason="arguments",
            advice="Set each named argument to an allowed value.",
            action="none",
            release={},
            previous={},
            log_tail=[],
        )

    lock = Lock(os.path.join(params["run_path"], "%s.lock" % name))

    def run(command: Sequence[str]) -> tuple[int, str, str]:
        # A docker command that outlives a killed run keeps the lock until it has ended.
        descriptors = [lock.descriptor] if lock.descriptor is not None else []
        rc, out, err = module.run_command(
            list(command),
            environ_update={"LC_ALL": "C"},
            expand_user_and_vars=False,
            errors="surrogate_then_replace",
            pass_fds=descriptors,
        )
        return rc, out, err

    store = Store(name, params["state_path"], params["run_path"])
    by = params["operator"] or login()
    docker = Docker(run, module.get_bin_path("timeout"))
    releaser = Releaser(params, docker, store, by, check_mode=module.check_mode)
    error: ReleaseError | None = None
    try:
        if not module.get_bin_path("docker"):
            raise ReleaseError("docker_missing", "there is no docker command on this host")
        if not module.check_mode:
            if not lock.acquire(params["lock_timeout"]):
                raise ReleaseError("lock", "another run is at work: %s" % lock.holder())
            lock.sign({"by": by, "since": utc_now(), "pid": os.getpid(), "what": params["tag"] or "nothing"})
        if params["state"] == "present":
            releaser.present()
        else:
            releaser.absent()
    except ReleaseError as failure:
        error = failure
    except OSError as failure:
        error = ReleaseError("no_space" if failure.errno in (28, 122) else "docker", str(failure))

    bare = module.check_mode and error is not None and error.reason in ("docker_missing", "engine_down")
    if bare and error:
        # The host is still to be set up by what comes before this module: say what would then be done.
        releaser.warnings.append("%s; a run that is no check sets it up first" % error.text)
        releaser.record = None if error.reason == "docker_missing" else store.read("release.json")
        present = params["state"] == "present"
        releaser.changed, releaser.action = (True, "released") if present else (False, "none")
        releaser.after = settings_of(params, params["digest"], "new" if params["secrets"] else "") if present else None
        error = None

    result: dict[str, Any] = {
        "changed": releaser.changed,
        "action": releaser.action,
        "release": brief(releaser.record),
        "previous": brief((releaser.record or {}).get("previous")),
        "log_tail": error.log_tail if error else [],
    }
    for warning in releaser.warnings:
        module.warn("%s: %s" % (name, warning))
    if error:
        lines: list[str] = [one_line(name, params, error)]
        if error.log_tail:
            lines += ["Its last log lines:"] + ["  %s" % line for line in error.log_tail]
        module.fail_json(msg="\n".join(lines), reason=error.reason, advice=error.advice or ADVICE["docker"], **result)
    if module._diff and releaser.changed:
        result["diff"] = difference(name, releaser.before, releaser.after)
    module.exit_json(**result)


if __name__ == "__main__":
    main()
