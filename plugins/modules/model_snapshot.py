#!/usr/bin/python
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Module: a model of the Hugging Face Hub at one commit, in a folder of its own, by downloads that nothing undoes."""

from __future__ import annotations

DOCUMENTATION = r"""
module: model_snapshot
short_description: A model of the Hugging Face Hub at one commit, on this host
version_added: 0.1.0
author: The nemo platform project (@nemo-platform)
description:
  - Fetches the files of a model at one commit to C(<path>/<owner>--<name>/<commit>/), some at a time, and verifies each by what
    the commit itself says of it, SHA-256 for large files and git's SHA-1 for the others, and its size.
  - The folder gets its name when everything in it is verified and on disk, with a marker that was written last. What reads it
    needs no hub. A run that finds it in order asks no hub either; it compares names, sizes and times.
  - The work is done by a process of its own, which goes on when the run, the connection or the controller ends. Any further run
    for the same snapshot waits for that process, or with O(wait=false) leaves it alone. One that was killed is replaced, and
    goes on at the byte where the one before it ended.
  - A file that arrives damaged is fetched again, three times at most. A line that breaks, hangs or trickles is tried again after
    a pause, O(retries) times in a row without progress. A full disk ends the work and keeps what is there.
  - A finished snapshot in which a file is missing or altered is repaired, file by file. One that was made by other means is taken
    over without a download of what is in order in it.
  - What it says meanwhile stands in C(<run_path>/progress/<name>), one line for each event.
options:
  repository:
    description: The model, as C(owner/name).
    type: str
    required: true
  revision:
    description:
      - Commit of 40 hexadecimal digits.
      - The name of a branch or tag is resolved once and then stays what it was on this host, with a warning that names the commit.
    type: str
    required: true
  path:
    description: Folder of all snapshots. It is made where it is missing.
    type: path
    default: /srv/models/hub
  mount_point:
    description:
      - Folder, above O(path), that must be a mounted file system. Keeps a model off the root disk when the volume is not there. In check
        mode one that is not mounted yet is a warning, and free space is not looked at.
    type: path
  endpoint:
    description: Address of the hub, or of a mirror that speaks as it does. Redirects from C(https) to C(http) are refused.
    type: str
    default: https://huggingface.co
  token:
    description: Token for gated and private models. It goes to the host of O(endpoint) alone, in a header, and is stored nowhere.
    type: str
    default: ""
  include:
    description: Shell patterns of the files to have; C(*) matches C(/) too. The defaults are weights as safetensors, configuration and tokenizers.
    type: list
    elements: str
    default: ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken"]
  exclude:
    description:
      - Shell patterns of files that are left out of O(include). The defaults are the same weights in other formats.
      - Code of a repository (C(*.py)) and pickled weights are in none of the defaults, because they run when they are loaded; a model
        that has pickled weights alone is refused unless O(include) names them.
    type: list
    elements: str
    default: ["original/*", "consolidated*.safetensors", "metal/*", "onnx/*", "openvino/*"]
  wait:
    description: Whether to wait until the snapshot is complete.
    type: bool
    default: true
  timeout:
    description: Seconds to wait. The download goes on after that.
    type: int
    default: 7200
  begun:
    description:
      - What the run that began it with O(wait=false) returned as RV(begun). A download that has failed since then is this run's failure,
        and is not tried again.
    type: float
    default: 0
  stall_timeout:
    description: Seconds without a byte, or with less than 1 KiB a second, after which a request is tried again.
    type: int
    default: 30
  retries:
    description: Number of further tries in a row without progress, each after a pause that doubles, of at most 30 seconds.
    type: int
    default: 6
  parallel:
    description: Number of files that are fetched at the same time.
    type: int
    default: 4
  min_free_disk_mb:
    description: Megabytes (of 1,000,000 bytes) that shall stay free beside what is still missing.
    type: int
    default: 1024
  keep:
    description: Folders of other snapshots that are wanted, too, and that the error of a full disk therefore does not name.
    type: list
    elements: path
    default: []
  verify:
    description:
      - V(size) compares names, sizes and times of what is there, and reads files whose time has changed. V(full) reads every byte.
    type: str
    choices: [size, full]
    default: size
  name:
    description: Name of the progress file. V(model-<owner>--<name>) when it is left out.
    type: str
  run_path:
    description: Folder for locks and progress.
    type: path
    default: /run/nemo
attributes:
  check_mode:
    description: Tells what would be fetched, and every error that can be known before; asks the hub where something is missing.
    support: full
  diff_mode:
    description: The files that would come, change or go, with their sizes.
    support: full
notes:
  - Where logind ends what users leave behind (C(KillUserProcesses=yes)), the process ends with the connection, and the next run goes on.
  - Proxies come from the environment, as O(ignore:environment) of the task sets it. Certificates are judged by the system's list.
  - Needs root for the defaults of O(path) and O(run_path).
  - Nothing else removes an old snapshot; a full disk's error lists those that no release on the host mounts
    and that O(keep) does not name.
"""

EXAMPLES = r"""
- name: The model begins to arrive while the driver is built
  nemo.platform.model_snapshot:
    repository: Qwen/Qwen2.5-7B-Instruct
    revision: a09a35458c702b33eeacc393d103063234e8bc28
    mount_point: /srv/models
    token: "{{ vault_hub_token }}"
    wait: false
  register: model

- name: The model is there
  nemo.platform.model_snapshot:
    repository: Qwen/Qwen2.5-7B-Instruct
    revision: a09a35458c702b33eeacc393d103063234e8bc28
    mount_point: /srv/models
    token: "{{ vault_hub_token }}"
    timeout: 3600
    begun: "{{ model.begun }}"
  when: model.action == 'started'
"""

RETURN = r"""
action:
  description:
    - V(present) when it was in order, V(fetched) or V(repaired) when it is now.
    - V(started) with O(wait=false) when a process is at work on it, whoever started that. In check mode, what would be done.
  returned: success
  type: str
  sample: fetched
path:
  description: Folder of the snapshot.
  returned: success
  type: str
  sample: /srv/models/hub/Qwen--Qwen2.5-7B-Instruct/a09a35458c702b33eeacc393d103063234e8bc28
repository:
  description: The model.
  returned: success
  type: str
revision:
  description: The commit, also where a branch or tag was asked for.
  returned: success
  type: str
total_size:
  description: Bytes of all its files; 0 while another run's process is at work on it.
  returned: success
  type: int
files:
  description: Size in bytes and digest of each file by its name; empty while another run's process is at work on it.
  returned: success
  type: dict
  sample: {config.json: {size: 663, digest: "git:0a8c1e6f1d3f9d5b0c1f3a2f7b5f9d1c2e4a6b8d"}}
missing:
  description: Bytes that were still to be fetched when this run looked.
  returned: success
  type: int
damaged:
  description: What was wrong with files of a finished snapshot, by name.
  returned: success
  type: dict
begun:
  description: When this run began, in seconds since 1970 by the host's clock, for O(begun).
  returned: success
  type: float
progress:
  description: The file that tells how far it is.
  returned: success
  type: str
  sample: /run/nemo/progress/model-Qwen--Qwen2.5-7B-Instruct
reason:
  description:
    - Class of the failure. V(repository), V(revision), V(gated), V(token), V(forbidden) and V(rate_limit) come from the hub's answer,
      V(unreachable), V(slow), V(certificate), V(hub_answer), V(corrupt) and V(file) from the way there, V(no_space), V(mount) and V(disk)
      from this host, V(pickle), V(nothing) and V(unsafe) from what the model holds; V(timeout), V(killed), V(arguments), V(internal).
  returned: failure
  type: str
  sample: gated
advice:
  description: What to do about it, in one line.
  returned: failure
  type: str
"""

import hashlib
import os
import time
from typing import Any, Callable

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.nemo.platform.plugins.module_utils.background import Background, Work, WorkError
from ansible_collections.nemo.platform.plugins.module_utils.downloads import Limits
from ansible_collections.nemo.platform.plugins.module_utils.model_hub import ADVICE, Hub, RemoteFile
from ansible_collections.nemo.platform.plugins.module_utils.model_snapshot import (
    Fetcher,
    Found,
    Snapshot,
    Wanted,
    check_request,
    folder_of,
    is_commit,
    pin,
    pinned,
    size_of_all,
)
from ansible_collections.nemo.platform.plugins.module_utils.progress import Progress, amount

ARGUMENTS: dict[str, dict[str, Any]] = {
    "repository": {"type": "str", "required": True},
    "revision": {"type": "str", "required": True},
    "path": {"type": "path", "default": "/srv/models/hub"},
    "mount_point": {"type": "path"},
    "endpoint": {"type": "str", "default": "https://huggingface.co"},
    "token": {"type": "str", "default": "", "no_log": True},
    "include": {
        "type": "list",
        "elements": "str",
        "default": ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken"],
    },
    "exclude": {
        "type": "list",
        "elements": "str",
        "default": ["original/*", "consolidated*.safetensors", "metal/*", "onnx/*", "openvino/*"],
    },
    "wait": {"type": "bool", "default": True},
    "timeout": {"type": "int", "default": 7200},
    "begun": {"type": "float", "default": 0.0},
    "stall_timeout": {"type": "int", "default": 30},
    "retries": {"type": "int", "default": 6},
    "parallel": {"type": "int", "default": 4},
    "min_free_disk_mb": {"type": "int", "default": 1024},
    "keep": {"type": "list", "elements": "path", "default": []},
    "verify": {"type": "str", "choices": ["size", "full"], "default": "size"},
    "name": {"type": "str"},
    "run_path": {"type": "path", "default": "/run/nemo"},
}
# Before anything is started, a hub that cannot be reached shall be known soon; the download itself is more patient.
FIRST_RETRIES = 2


class Run:
    """One run of the module."""

    def __init__(self, params: dict[str, Any], check_mode: bool, warn: Callable[[str], None]) -> None:
        self.params = params
        self.begun = time.time()
        self.check_mode = check_mode
        self.warn = warn
        self.name = params["name"] or "model-%s" % folder_of(params["repository"])
        self.progress = Progress(self.name, params["run_path"])
        self.limits = Limits(params["stall_timeout"], params["retries"])
        first = Limits(params["stall_timeout"], min(FIRST_RETRIES, params["retries"]))
        self.hub = Hub(params["endpoint"], params["token"], first)
        self.tree: dict[str, RemoteFile] = {}
        self.missing = 0
        self.damaged: dict[str, str] = {}
        self.todo: list[RemoteFile] = []
        self.extra: list[str] = []
        self.mounted = True
        self.resolved = ""  # the commit that a name leads to, where this host has not kept one yet
        self.suspects: set[str] = set()  # files whose contents are looked at again, whatever their times say
        self.snapshot = self._snapshot("")

    def _snapshot(self, revision: str) -> Snapshot:
        params = self.params
        wanted = Wanted(
            params["repository"], revision, params["path"], tuple(params["include"]), tuple(params["exclude"])
        )
        return Snapshot(wanted, self.progress, keep=params["keep"])

    def run(self) -> dict[str, Any]:
        self._need_mount()
        self.snapshot = self._snapshot(self._commit())
        found = self.snapshot.look(self.params["verify"] == "full")
        if found and found.good:
            if not self.check_mode:
                self._keep(found)
            return self._result("present", found)
        self.suspects = set(found.bad) if found else set()
        done = "repaired" if found else "fetched"
        if self.check_mode:
            self._plan()
            return self._result(done, None)
        wait, timeout, begun = (self.params[name] for name in ("wait", "timeout", "begun"))
        data = self._background().run(self._look, self._prepare, wait, timeout, begun)
        return self._result("started", None) if data is None else self._result(done, data["found"])

    def _need_mount(self) -> None:
        mount_point = self.params["mount_point"]
        self.mounted = not mount_point or os.path.ismount(mount_point)
        if self.mounted:
            return
        text = "%s is no mounted file system, and a model would fill the disk below it" % mount_point
        if not self.check_mode:
            raise WorkError("mount", text)
        self.warn("%s; a run that is no check mounts it first" % text)

    def _background(self) -> Background:
        key = "model-%s" % hashlib.sha256(os.path.realpath(self.snapshot.path).encode()).hexdigest()[:16]
        return Background(key, self.progress, self.params["run_path"])

    def _keep(self, found: Found) -> None:
        """What is in order stays; what only helps the next look is put right."""
        self._pin()
        self.snapshot.refresh(found)
        if os.path.isdir(self.snapshot.partial):  # of a worker that was killed when all was done
            lock = self._background().lock
            if lock.try_acquire():
                self.snapshot.tidy()
            lock.release()

    def _pin(self) -> None:
        if self.resolved:
            pin(self.params["path"], self.params["repository"], self.params["revision"], self.resolved)

    def _commit(self) -> str:
        """The commit of the revision: itself, or what its name was resolved to at first."""
        repository, revision, root = self.params["repository"], self.params["revision"], self.params["path"]
        if is_commit(revision):
            return str(revision)
        known = pinned(root, repository, revision)
        commit = known[0] if known else self.hub.commit(repository, revision).sha
        self.resolved = "" if known else commit
        when = "since %s, and stays it" % known[1] if known else "now, and stays it once it is fetched"
        text = "%s: %s is a name that moves. On this host it is commit %s %s; pin it: revision: %s"
        self.warn(text % (repository, revision, commit, when, commit))
        return commit

    def _look(self) -> dict[str, Any] | None:
        found = self.snapshot.look(suspects=self.suspects)
        return {"found": found} if found and found.good else None

    def _prepare(self) -> Work:
        """The work, if nothing stands against it."""
        found = self._plan()
        self._pin()
        snapshot, tree = self.snapshot, self.tree
        hub = Hub(self.params["endpoint"], self.params["token"], self.limits)
        fetcher = Fetcher(snapshot, hub, self.params["parallel"])
        return lambda: snapshot.complete(tree, found, fetcher.fetch)

    def _plan(self) -> Found | None:
        """What is to be done; the snapshot as it is."""
        snapshot, repository = self.snapshot, self.params["repository"]
        found = snapshot.look(suspects=self.suspects)
        if found:
            self.tree, self.damaged, self.extra = found.tree, found.bad, found.extra
        else:
            commit = self.hub.commit(repository, snapshot.wanted.revision)
            if commit.sha != snapshot.wanted.revision:
                raise WorkError("hub_answer", "the hub says that this commit is %s" % commit.sha)
            self.tree = {file.path: file for file in self.hub.files(repository, commit.sha)}
        for warning in snapshot.check_selection(self.tree):
            self.warn("%s: %s" % (repository, warning))
        self.todo = snapshot.missing(self.tree, found)
        self.missing = snapshot.missing_bytes(self.todo)
        if self.mounted:
            snapshot.need_space(self.todo, self.params["min_free_disk_mb"] * 1000000)
        if self.todo:
            smallest = min(self.todo, key=lambda file: file.size)
            self.hub.prove_access(repository, snapshot.wanted.revision, smallest.path)
        return found

    def _result(self, action: str, found: Found | None) -> dict[str, Any]:
        files = found.wanted if found else self.snapshot.select(self.tree)
        return {
            "changed": action != "present",
            "action": action,
            "path": self.snapshot.path,
            "repository": self.params["repository"],
            "revision": self.snapshot.wanted.revision,
            "total_size": size_of_all(files),  # Ansible itself puts the folder's own into "size"
            "files": {path: {"size": file.size, "digest": file.digest} for path, file in sorted(files.items())},
            "missing": self.missing,
            "damaged": self.damaged,
            "begun": self.begun,
            "progress": self.progress.path,
        }

    def diff(self) -> dict[str, str]:
        before = "".join("%s (%s)\n" % (path, self.damaged[path]) for path in sorted(self.damaged))
        before += "".join("%s\n" % path for path in self.extra)
        after = "".join("%s (%s)\n" % (file.path, amount(file.size)) for file in self.todo)
        header = self.snapshot.path
        return {"before": before, "after": after, "before_header": header, "after_header": header}


def main() -> None:
    """Run the module."""
    module = AnsibleModule(argument_spec=ARGUMENTS, supports_check_mode=True)
    params: dict[str, Any] = module.params
    what = "%s at %s" % (params["repository"], params["revision"])
    wrong = check_request(params)
    if wrong:
        module.fail_json(msg="%s: %s" % (what, "; ".join(wrong)), reason="arguments", advice=ADVICE["arguments"])
    run = Run(params, bool(module.check_mode), module.warn)
    try:
        result = run.run()
    except WorkError as error:
        advice = ADVICE.get(error.reason, "")
        module.fail_json(
            msg="%s failed [%s]: %s. %s" % (what, error.reason, error.text.rstrip("."), advice),
            reason=error.reason,
            advice=advice,
        )
    except OSError as failure:
        problem = run.snapshot.disk_problem(failure)
        advice = ADVICE[problem.reason]
        module.fail_json(
            msg="%s failed [%s]: %s. %s" % (what, problem.reason, problem.text, advice),
            reason=problem.reason,
            advice=advice,
        )
    if module._diff and result["changed"]:
        result["diff"] = run.diff()
    module.exit_json(**result)


if __name__ == "__main__":
    main()
