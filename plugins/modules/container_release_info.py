#!/usr/bin/python
# Copyright: the nemo.platform authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What runs on a host as releases."""

from __future__ import annotations

DOCUMENTATION = r"""
module: container_release_info
short_description: Which releases of which services a host runs, has kept, and has seen fail
version_added: 0.2.0
author:
  - The nemo.platform authors (@nemo-platform)
description:
  - Reads what M(nemo.platform.container_release) keeps on the host, and asks each service for its health through its public port.
  - Changes nothing, and waits for nobody; a release that is under way is said to be.
attributes:
  check_mode:
    support: full
    description: It only looks.
  diff_mode:
    support: none
    description: It only looks.
options:
  name:
    description: The service. All services of the host when it is left out.
    type: str
  state_path:
    description: Folder of the records.
    type: path
    default: /var/lib/nemo
  run_path:
    description: Folder of the locks.
    type: path
    default: /run/nemo
"""

EXAMPLES = r"""
- name: What runs here
  nemo.platform.container_release_info:
  register: what
"""

RETURN = r"""
services:
  description: One entry for each service, by name.
  returned: always
  type: list
  elements: dict
  contains:
    name: {description: The service., type: str, sample: ai-prod}
    port: {description: Its public port., type: int, sample: 8000}
    tag: {description: The tag that answers., type: str, sample: prod-20250718-1040}
    digest: {description: Its digest., type: str, sample: "sha256:5891b5b5…"}
    image: {description: Its repository., type: str, sample: 084375578827.dkr.ecr.ap-northeast-2.amazonaws.com/ai}
    release: {description: Its id., type: str, sample: 20250718T014102Z-5f3a9c}
    since: {description: When it was committed (UTC)., type: str, sample: "2025-07-18T01:41:09Z"}
    by: {description: Who released it., type: str, sample: alice}
    kind: {description: How it came there., type: str, sample: rollback}
    intent: {description: "V(deploy) where somebody asked for just this one, else V(converge).", type: str, sample: converge}
    health: {description: V(ok), or what is wrong., type: str, sample: ok}
    pinned: {description: "Why runs over the whole site leave it alone; empty where they do not.", type: str}
    under_way: {description: Which release is being made by whom since when; empty when none is., type: str}
    begun:
      description: >-
        What was begun and serves nobody for good yet, V(release) or V(rollback). V(rolled_back) where what a rollback leads to serves
        for good, and the rest of that work is open. Empty otherwise.
      type: str
    kept: {description: "Releases that can be rolled back to, the next one first.", type: list, elements: dict}
    failed: {description: "Releases that failed and are not tried again by themselves.", type: list, elements: dict}
    history:
      description:
        - Releases and rollbacks, the last one first, with result and duration; releases that failed before they began too.
        - One that fails again in the same way takes the place of the one before.
      type: list
      elements: dict
"""

import os
from typing import Any

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.nemo.platform.plugins.module_utils.container_release import (
    Lock,
    Record,
    ReleaseError,
    Store,
    probe_http,
    question_of,
    request_timeout,
)

ARGUMENTS: dict[str, dict[str, Any]] = {
    "name": {"type": "str"},
    "state_path": {"type": "path", "default": "/var/lib/nemo"},
    "run_path": {"type": "path", "default": "/run/nemo"},
}
BRIEF = ("release", "tag", "digest", "since", "by", "kind")


def under_way(store: Store) -> str:
    """Who is at work, if somebody is; a run that was killed is told from one that lives by its lock."""
    journal = store.read("transition.json")
    busy = ""
    if os.path.exists(store.lock_path):
        lock = Lock(store.lock_path)
        if not lock.try_acquire(shared=True):
            busy = lock.holder()
        lock.release()
    if busy:
        return busy
    if journal:
        text = "interrupted: %s of %s by %s, begun at %s; the next run finishes or undoes it"
        return text % (journal["kind"], journal["record"]["tag"], journal["by"], journal["since"])
    return ""


def begun(journal: Record | None, current: str | None) -> str:
    """What a rollback has to know of a transition."""
    if not journal:
        return ""
    kind = str(journal["kind"])
    if journal["record"]["release"] != current:
        return kind
    return "rolled_back" if kind == "rollback" else ""


def health_of(record: Record, public: Record) -> str:
    address = public["address"]
    local = "127.0.0.1" if address in ("", "0.0.0.0") else "::1" if address == "::" else address
    question = question_of(record["health"])
    return probe_http(local, public["port"], question, request_timeout(record["health"])) or "ok"


def service(store: Store, name: str) -> Record | None:
    state = store.read("state.json")
    if not state:
        return None
    releases = state.get("releases") or []
    current: Record = next((entry for entry in releases if entry["release"] == state.get("current")), {})
    pinned = state.get("pinned")
    left = {entry["release"] for entry in state.get("failed") or []}
    kept = [entry for entry in releases if entry is not current]
    public = state.get("proxy") or {}
    journal = store.read("transition.json")
    return {
        "name": name,
        "port": public.get("port", 0),
        "image": current.get("image", ""),
        **{key: current.get(key, "") for key in BRIEF},
        "intent": current.get("intent", ""),
        "health": health_of(current, public) if current and public else "nothing serves",
        "pinned": "%s, by %s at %s" % (pinned["why"], pinned["by"], pinned["since"]) if pinned else "",
        "under_way": under_way(store),
        "begun": begun(journal, state.get("current")),
        "kept": [
            dict({key: entry.get(key, "") for key in BRIEF}, left=entry["release"] in left)
            for entry in sorted(kept, key=lambda entry: entry["release"] in left)
        ],
        "failed": [{key: entry[key] for key in entry if key != "key"} for entry in state.get("failed") or []],
        "history": state.get("history") or [],
    }


def main() -> None:
    module = AnsibleModule(argument_spec=ARGUMENTS, supports_check_mode=True)
    path, run, name = (module.params[key] for key in ("state_path", "run_path", "name"))
    try:
        names = [name] if name else sorted(entry for entry in os.listdir(path) if not entry.startswith("."))
    except FileNotFoundError:
        names = []
    try:
        found = [service(Store(entry, path, run), entry) for entry in names]
    except ReleaseError as error:
        module.fail_json(msg="%s. %s" % (error.text, error.advice))
    module.exit_json(changed=False, services=[entry for entry in found if entry])


if __name__ == "__main__":
    main()
