#!/usr/bin/python
# Copyright: the nemo.platform authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""One service on one host as releases."""

from __future__ import annotations

DOCUMENTATION = r"""
module: container_release
short_description: Run one service on one host as releases of a container image, behind HAProxy
version_added: 0.1.0
author:
  - The nemo.platform authors (@nemo-platform)
description:
  - HAProxy owns the service's public port; each release is a container of its own on a loopback port. A release is pulled by digest,
    started beside the one that serves, proven, and led to by a command to the running HAProxy, without a reload. The old one answers what
    it was asked, and is kept, stopped, for a rollback.
  - Until it is committed the old release runs. A new one that does not become healthy, or that fails with real traffic on it, is taken
    back; the module then fails with the reason and with the last log lines of the failed release.
  - An image that failed with the same settings before is not tried again, unless O(force) says so.
  - A pull that fails, a full disk, too little memory for two releases or a taken port is found before anything is touched.
  - A run that was killed at any point is finished or undone by the next run, whoever starts it. What a run does on one service is done
    under a lock, which the kernel drops when its holder dies.
  - A container of an earlier version of this module, or any container that has the service's name and publishes its port, is moved
    behind HAProxy by its next release. New connections are led around it meanwhile, where the host has iptables; connections that
    clients keep open to it are waited for up to O(drain_timeout), and then end with it. One that this module has not made is kept,
    stopped, as C(NAME.before) until the next release; a container of that name that no release has put there is left alone.
  - Containers run with an init process, without capabilities or new privileges, with limits on memory, processes and logs, and restart
    unless they were stopped.
  - Secrets become files under C(/run/secrets) in the container. They appear in no argument, environment, label, diff or log.
  - Needs nothing but Python, systemd, the C(docker) command, 20.10 or newer, and HAProxy, 2.4 or newer, on the managed host.
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
    description: The service. Its containers' names begin with it, and the service's folder below O(state_path) has it.
    type: str
    required: true
  state:
    description:
      - V(present) runs the release; V(absent) removes the service's containers, HAProxy, secrets, state and images.
      - V(rolled_back) goes back to the release before, or to O(release). It pulls nothing, and takes the settings, secrets and health
        questions that the release had. It pins it, see O(intent).
      - A release that a killed run began is undone first; where that leads to what is asked for, it counts as rolled back, too.
    type: str
    choices: [present, absent, rolled_back]
    default: present
  release:
    description: Id, tag or digest of the kept release to roll back to. The release before, other than one that failed, when it is left out.
    type: str
  current:
    description:
      - Id of the release that was seen to answer, and is to be left. Where another one has taken its place meanwhile, nothing is done.
      - Whichever answers, when it is left out.
    type: str
  strategy:
    description:
      - V(beside) runs the new release beside the old one until it is proven. V(stop-start) stops the old one first, and starts it again
        if need be, for a host on which two do not fit. See O(proxy_retry_after) for what clients get meanwhile.
      - Until the new one is proven, the old one starts again by itself when the run is killed or the host reboots.
    type: str
    choices: [beside, stop-start]
    default: beside
  intent:
    description:
      - V(deploy) releases what is asked for. V(converge) is for runs over the whole site - a release that is pinned stays, and so does one
        that was made with V(deploy) where O(tag) is of the rule C(NAME-YYYYMMDD-HHMM) and not newer; with the settings that are asked for.
      - With V(converge) what runs stays as it is, with a warning, where an image is asked for that failed with the same settings before.
    type: str
    choices: [deploy, converge]
    default: deploy
  pin:
    description: Whether O(intent=converge) leaves this release alone from now on.
    type: bool
    default: false
  force:
    description: Whether an image that failed with the same settings before is tried again.
    type: bool
    default: false
  keep:
    description: Number of releases that are kept for a rollback, besides the one that serves.
    type: int
    default: 3
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
    description: The public port of the service, 1 to 65535. Required with O(state=present).
    type: int
  container_port:
    description: The port inside the container. The same as O(port) when it is left out.
    type: int
  bind_address:
    description: The address of the host on which O(port) is open.
    type: str
    default: 0.0.0.0
  release_ports:
    description: Loopback ports from which releases get theirs; outside of the range from which the kernel takes ports for connections.
    type: str
    default: 20000-20999
  network:
    description: The engine's network that the container joins. The engine's own default when it is left out.
    type: str
  command:
    description: Arguments after the image, which take the place of the image's own command. They are visible to anyone who can inspect the container.
    type: list
    elements: str
    default: []
  mounts:
    description:
      - Folders and files of the host that the container sees. One that is missing on the host is an error before anything is stopped.
      - They are part of the release - a rollback brings back the ones that it had, as long as the host has them.
    type: list
    elements: dict
    default: []
    suboptions:
      source: {description: Absolute path on the host., type: str, required: true}
      target: {description: Absolute path in the container., type: str, required: true}
      read_only: {description: Whether the container may not write to it., type: bool, default: true}
  runtime:
    description: The engine's runtime that runs the container, such as V(nvidia). The engine's own default when it is empty.
    type: str
    default: ""
  shm_size:
    description: Size of C(/dev/shm) in the container, such as V(1g). The engine's own default, 64 MiB, when it is empty.
    type: str
    default: ""
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
    description: Limit on the number of processes and threads; V(0) for none.
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
  health_method:
    description: HTTP method of that question. With V(POST) and O(health_body) health can be a piece of the service's real work.
    type: str
    choices: [GET, POST]
    default: GET
  health_headers:
    description: Headers of that question. They are kept with the release, visible to anyone who can inspect the container.
    type: dict
    default: {}
  health_body:
    description: Body of that question, with O(health_method=POST).
    type: str
    default: ""
  health_request_timeout:
    description: Seconds that one answer may take.
    type: float
    default: 5
  health_status:
    description: HTTP status of a healthy answer.
    type: int
    default: 200
  health_contains:
    description: Text that a healthy answer contains.
    type: str
    default: ""
  health_timeout:
    description: Seconds that a release has to become healthy.
    type: int
    default: 60
  health_interval:
    description: Seconds between two questions.
    type: float
    default: 0.5
  settle_time:
    description: Seconds that a new release must be healthy without a break or a restart before it is led to.
    type: int
    default: 3
  phases:
    description:
      - What a release does before it is healthy, by the lines of its log with which each phase begins. The progress says which one it is
        in, for how long, and how long that took last time. See O(progress).
    type: list
    elements: dict
    default: []
    suboptions:
      name: {description: What the phase is called, such as V(loading weights)., type: str, required: true}
      pattern: {description: Regular expression of Python that a line is searched for., type: str, required: true}
  failure_patterns:
    description:
      - Reasons of failures by the log of the release that failed. The first pattern that a line matches gives the reason, which stands in the
        one line of the failure and in RV(cause).
    type: list
    elements: dict
    default: []
    suboptions:
      pattern: {description: Regular expression of Python that a line is searched for., type: str, required: true}
      text:
        description: The reason in plain words. It may use the pattern's groups, as C(\1) or C(\g<name>).
        type: str
        required: true
  progress:
    description: Name of the file below C(progress) of O(run_path) that the progress is written to, a line for each step. O(name) when it is left out.
    type: str
  smoke:
    description: One request that a new release must answer before it is led to. It is kept with the release, visible to anyone who can inspect
      the container.
    type: dict
    suboptions:
      path: {description: Path and query., type: str, required: true}
      method: {description: HTTP method., type: str, default: GET}
      headers: {description: Headers., type: dict, default: {}}
      body: {description: Body., type: str, default: ""}
      status: {description: Status of a good answer., type: int, default: 200}
      contains: {description: Text that a good answer contains., type: str, default: ""}
      timeout: {description: Seconds that the answer may take., type: float, default: 30}
  bake_time:
    description:
      - Seconds for which a new release is watched with real traffic on it, before the old one is stopped. The traffic goes back by itself
        when the container restarts, when it is no longer healthy, or when too many of its requests fail, as HAProxy counts them.
      - Meanwhile the old release gets one request in a few hundred, and what the new one does not accept. A new one that ends is not started
        again, so that its port refuses at once, and the old one answers, whatever the method.
      - A first release is not watched, for there is nothing to turn back to.
    type: int
    default: 30
  bake_error_percent:
    description: Share of requests that may fail in that time (status 500 and above, failed connections, answers that break off).
    type: float
    default: 5
  bake_min_requests:
    description: Number of requests from which on the share says anything.
    type: int
    default: 20
  drain_timeout:
    description: Seconds that the old release has for the requests that it is still answering. What is left then is ended. With
      O(strategy=stop-start) that needs O(proxy_retry_after); without it the old release has O(stop_timeout), while HAProxy holds what comes.
    type: int
    default: 60
  reserve_memory_mb:
    description: Mebibytes of the host that no release may count on when two of them run at once.
    type: int
    default: 256
  proxy_timeout:
    description: Seconds for which HAProxy waits for a client or for a release in the middle of a request.
    type: int
    default: 300
  proxy_keep_alive:
    description: Seconds for which HAProxy keeps an idle connection of a client open.
    type: int
    default: 60
  proxy_max_connections:
    description: Number of connections that HAProxy holds at once.
    type: int
    default: 4000
  proxy_retries:
    description: Number of times, a second apart, that HAProxy tries a release which does not accept a connection, such as one that restarts.
    type: int
    default: 5
  proxy_rules:
    description:
      - What HAProxy lets through. Everything, when the list is empty. Otherwise what no rule names is answered with 404, a client outside
        of a rule's sources with 403, and one without a key with 401, in JSON. A request that several rules name needs one that lets it in.
      - Paths are compared as the client wrote them, byte by byte, so that no other way of writing a path gets past a rule.
      - Changed rules and keys are a reload of HAProxy, without a dropped connection.
    type: list
    elements: dict
    default: []
    suboptions:
      path:
        description: A path, or all paths below one when it ends in C(/*). The query is not part of it.
        type: str
        required: true
      methods: {description: HTTP methods. Any when the list is empty., type: list, elements: str, default: []}
      sources: {description: Networks of clients such as C(10.0.0.0/16). Any when the list is empty., type: list, elements: str, default: []}
      key: {description: Whether one of O(proxy_keys) is needed. V(true) when there are keys and it is left out., type: bool}
  proxy_keys:
    description:
      - Keys that HAProxy accepts in the header C(Authorization), after C(Bearer) and a blank, each at least 16 visible characters. Only their SHA-256 is written.
      - Needs O(proxy_rules). To change a key without a gap, name the old and the new one for a while.
    type: list
    elements: str
    default: []
  proxy_retry_after:
    description:
      - With V(0) HAProxy holds requests for O(proxy_retries) seconds while no release accepts them, and then answers with its own page.
      - Otherwise it answers them at once while a release is replaced (O(strategy=stop-start)), with status 503, these seconds in C(Retry-After), and
        an error object in JSON as the OpenAI API has it. So it does where a release breaks off or takes too long.
    type: int
    default: 0
  proxy_check:
    description:
      - Whether HAProxy asks each release every second, on loopback. After two connections that were refused, or answers other than 2xx and 3xx,
        nothing is led to it until one is good. The release that stands by while a new one is watched then takes over by itself.
    type: bool
    default: false
  proxy_check_path:
    description: Path that it asks for with GET. It should cost the release nothing.
    type: str
    default: /health
  stop_timeout:
    description: Seconds that a container has to end by itself when it is stopped.
    type: int
    default: 10
  pull_timeout:
    description: Seconds that a pull may take.
    type: int
    default: 900
  min_free_disk_mb:
    description: Megabytes (10^6) that must be free in the engine's data folder, and in containerd's where that has the images, before a pull.
      Images that no release needs are removed first.
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
  proxy_path:
    description: Folder of HAProxy's configurations, one for each service.
    type: path
    default: /etc/nemo/proxy
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

- name: A hotfix, which the next run over the site shall leave alone
  nemo.platform.container_release:
    name: ai-prod
    image: 084375578827.dkr.ecr.ap-northeast-2.amazonaws.com/ai
    tag: hotfix-1
    port: 8000
    pin: true
    smoke:
      path: /v1/echo
      method: POST
      headers: {Content-Type: application/json}
      body: '{"text": "hello"}'
      contains: hello

- name: Back to the release before
  nemo.platform.container_release:
    name: ai-prod
    state: rolled_back

- name: A service is gone from this host
  nemo.platform.container_release:
    name: ai-dev
    state: absent
"""

RETURN = r"""
action:
  description:
    - What was done, or in check mode would be done.
    - V(released) is a first release, V(replaced) one in the place of another, V(rolled_back) one that was there before, V(recovered) that
      only an interrupted or stopped release or HAProxy was put in order, V(pinned) and V(unpinned) that only that changed.
    - A failed release is V(removed) where nobody had been led to it, and V(restored) where the old one serves again.
  returned: always
  type: str
  sample: replaced
kept:
  description: Why another release than the one that was asked for stays, with O(intent=converge). Empty otherwise.
  returned: always
  type: str
steps:
  description: What was done when, in seconds since the start.
  returned: always
  type: list
  elements: str
  sample: ["0.4 s: pulling …", "9.1 s: healthy"]
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
  description: The release that a rollback would go back to, with the same keys as RV(release).
  returned: always
  type: dict
reason:
  description: The class of the failure.
  returned: failure
  type: str
  sample: unhealthy
cause:
  description: What the log of the failed release says of the reason, by O(failure_patterns). Empty where none matches.
  returned: failure
  type: str
  sample: "out of GPU memory (torch.OutOfMemoryError: CUDA out of memory.)"
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
from collections.abc import Mapping, Sequence
from typing import Any

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.nemo.platform.plugins.module_utils.container_release import (
    ADVICE,
    Docker,
    Lock,
    Record,
    ReleaseError,
    Settings,
    Store,
    check_request,
    release_error,
    settings_of,
    utc_now,
)
from ansible_collections.nemo.platform.plugins.module_utils.progress import Progress
from ansible_collections.nemo.platform.plugins.module_utils.release_flow import Releaser
from ansible_collections.nemo.platform.plugins.module_utils.release_guard import Guard
from ansible_collections.nemo.platform.plugins.module_utils.release_proxy import HAProxy, check_proxy

PHASE: dict[str, dict[str, Any]] = {
    "name": {"type": "str", "required": True},
    "pattern": {"type": "str", "required": True},
}
FAILURE: dict[str, dict[str, Any]] = {
    "pattern": {"type": "str", "required": True},
    "text": {"type": "str", "required": True},
}
MOUNT: dict[str, dict[str, Any]] = {
    "source": {"type": "str", "required": True},
    "target": {"type": "str", "required": True},
    "read_only": {"type": "bool", "default": True},
}
RULE: dict[str, dict[str, Any]] = {
    "path": {"type": "str", "required": True},
    "methods": {"type": "list", "elements": "str", "default": []},
    "sources": {"type": "list", "elements": "str", "default": []},
    "key": {"type": "bool"},
}
SMOKE: dict[str, dict[str, Any]] = {
    "path": {"type": "str", "required": True},
    "method": {"type": "str", "default": "GET"},
    "headers": {"type": "dict", "default": {}},
    "body": {"type": "str", "default": ""},
    "status": {"type": "int", "default": 200},
    "contains": {"type": "str", "default": ""},
    "timeout": {"type": "float", "default": 30},
}

ARGUMENTS: dict[str, dict[str, Any]] = {
    "name": {"type": "str", "required": True},
    "state": {"type": "str", "choices": ["present", "absent", "rolled_back"], "default": "present"},
    "release": {"type": "str"},
    "current": {"type": "str"},
    "strategy": {"type": "str", "choices": ["beside", "stop-start"], "default": "beside"},
    "intent": {"type": "str", "choices": ["deploy", "converge"], "default": "deploy"},
    "pin": {"type": "bool", "default": False},
    "force": {"type": "bool", "default": False},
    "keep": {"type": "int", "default": 3},
    "image": {"type": "str"},
    "tag": {"type": "str"},
    "digest": {"type": "str"},
    "port": {"type": "int"},
    "container_port": {"type": "int"},
    "bind_address": {"type": "str", "default": "0.0.0.0"},
    "release_ports": {"type": "str", "default": "20000-20999"},
    "network": {"type": "str"},
    "command": {"type": "list", "elements": "str", "default": []},
    "mounts": {"type": "list", "elements": "dict", "options": MOUNT, "default": []},
    "runtime": {"type": "str", "default": ""},
    "shm_size": {"type": "str", "default": ""},
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
    "health_method": {"type": "str", "choices": ["GET", "POST"], "default": "GET"},
    "health_headers": {"type": "dict", "default": {}},
    "health_body": {"type": "str", "default": ""},
    "health_request_timeout": {"type": "float", "default": 5},
    "health_status": {"type": "int", "default": 200},
    "health_contains": {"type": "str", "default": ""},
    "health_timeout": {"type": "int", "default": 60},
    "health_interval": {"type": "float", "default": 0.5},
    "settle_time": {"type": "int", "default": 3},
    "phases": {"type": "list", "elements": "dict", "options": PHASE, "default": []},
    "failure_patterns": {"type": "list", "elements": "dict", "options": FAILURE, "default": []},
    "progress": {"type": "str"},
    "smoke": {"type": "dict", "options": SMOKE},
    "bake_time": {"type": "int", "default": 30},
    "bake_error_percent": {"type": "float", "default": 5},
    "bake_min_requests": {"type": "int", "default": 20},
    "drain_timeout": {"type": "int", "default": 60},
    "reserve_memory_mb": {"type": "int", "default": 256},
    "proxy_timeout": {"type": "int", "default": 300},
    "proxy_keep_alive": {"type": "int", "default": 60},
    "proxy_max_connections": {"type": "int", "default": 4000},
    "proxy_retries": {"type": "int", "default": 5},
    "proxy_rules": {"type": "list", "elements": "dict", "options": RULE, "default": []},
    "proxy_keys": {"type": "list", "elements": "str", "default": [], "no_log": True},
    "proxy_retry_after": {"type": "int", "default": 0},
    "proxy_check": {"type": "bool", "default": False},
    "proxy_check_path": {"type": "str", "default": "/health"},
    "stop_timeout": {"type": "int", "default": 10},
    "pull_timeout": {"type": "int", "default": 900},
    "min_free_disk_mb": {"type": "int", "default": 1024},
    "lock_timeout": {"type": "int", "default": 120},
    "operator": {"type": "str"},
    "state_path": {"type": "path", "default": "/var/lib/nemo"},
    "run_path": {"type": "path", "default": "/run/nemo"},
    "proxy_path": {"type": "path", "default": "/etc/nemo/proxy"},
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


def work(params: dict[str, Any]) -> str:
    if params["state"] == "rolled_back":
        return "the rollback" + (" to %s" % params["release"] if params["release"] else "")
    return "its removal" if params["state"] == "absent" else "the release of %s" % params["tag"]


def one_line(name: str, params: dict[str, Any], error: ReleaseError) -> str:
    what = "%s:%s" % (params["image"], params["tag"]) if params["state"] == "present" else work(params)
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
    wrong = check_request(params) or (check_proxy(params) if params["state"] == "present" else [])
    if wrong:
        module.fail_json(
            msg="%s: %s" % (name, "; ".join(wrong)),
            reason="arguments",
            cause="",
            advice="Set each named argument to an allowed value.",
            action="none",
            kept="",
            steps=[],
            release={},
            previous={},
            log_tail=[],
        )

    lock = Lock(os.path.join(params["run_path"], "%s.lock" % name))

    def execute(
        command: Sequence[str], descriptors: Sequence[int], environment: Mapping[str, str]
    ) -> tuple[int, str, str]:
        rc, out, err = module.run_command(
            list(command),
            environ_update=dict({"LC_ALL": "C"}, **environment),
            expand_user_and_vars=False,
            errors="surrogate_then_replace",
            handle_exceptions=False,
            pass_fds=list(descriptors),
        )
        return rc, out, err

    def run(command: Sequence[str]) -> tuple[int, str, str]:
        # A docker command that outlives a killed run keeps the lock until it has ended.
        return execute(command, [lock.descriptor] if lock.descriptor is not None else [], {})

    def guarded(
        command: Sequence[str], descriptors: Sequence[int], environment: Mapping[str, str]
    ) -> tuple[int, str, str]:
        try:
            return execute(command, descriptors, environment)
        except OSError as failure:  # a command that this host does not have
            return 127, "", str(failure)

    store = Store(name, params["state_path"], params["run_path"])
    by = params["operator"] or login()
    docker = Docker(run, module.get_bin_path("timeout"))
    proxy = HAProxy(name, guarded, module.get_bin_path("haproxy"), folder=params["proxy_path"])
    progress = Progress(params["progress"] or name, params["run_path"])

    def say(text: str) -> None:
        module.log(text)
        progress.say(text)

    transition = os.path.join(store.base, "transition.json")
    watched = Guard(name, guarded, lock.path, transition, proxy.configuration)
    guard = watched if module.get_bin_path("systemd-run") else None
    releaser = Releaser(params, docker, store, proxy, by, guard=guard, check_mode=module.check_mode, say=say)
    error: ReleaseError | None = None
    try:
        if not module.get_bin_path("docker"):
            raise ReleaseError("docker_missing", "there is no docker command on this host")
        if not module.check_mode:
            if not lock.acquire(params["lock_timeout"]):
                raise ReleaseError("lock", "another run is at work: %s" % lock.holder())
            lock.sign({"by": by, "since": utc_now(), "pid": os.getpid(), "what": work(params)})
        releaser.load()  # another run may have released while this one waited for the lock
        if params["current"] and params["current"] != releaser.current:
            found = releaser.record or {"tag": "nothing"}
            raise ReleaseError("lock", "another run was faster, and %s answers since this one looked" % found["tag"])
        {"present": releaser.present, "absent": releaser.absent, "rolled_back": releaser.rollback}[params["state"]]()
    except Exception as failure:
        error = release_error(failure)

    bare = module.check_mode and error is not None and error.reason in ("docker_missing", "engine_down")
    bare = bare and params["state"] != "rolled_back"
    if bare and error:
        # The host is still to be set up by what comes before this module: say what would then be done.
        releaser.warnings.append("%s; a run that is no check sets it up first" % error.text)
        present = params["state"] == "present"
        releaser.changed, releaser.action = (True, "released") if present else (False, "none")
        releaser.after = settings_of(params, params["digest"], "new" if params["secrets"] else "") if present else None
        error = None

    result: dict[str, Any] = {
        "changed": releaser.changed,
        "action": releaser.action,
        "release": brief(releaser.record),
        "previous": brief(releaser.previous),
        "kept": releaser.kept,
        "steps": releaser.steps,
        "log_tail": error.log_tail if error else [],
    }
    for warning in releaser.warnings:
        module.warn("%s: %s" % (name, warning))
    if error:
        lines: list[str] = [one_line(name, params, error)]
        if error.log_tail:
            lines += ["Its last log lines:"] + ["  %s" % line for line in error.log_tail]
        module.fail_json(
            msg="\n".join(lines),
            reason=error.reason,
            cause=error.cause,
            advice=error.advice or ADVICE["docker"],
            **result,
        )
    if module._diff and releaser.changed:
        result["diff"] = difference(name, releaser.before, releaser.after)
    module.exit_json(**result)


if __name__ == "__main__":
    main()
