#!/usr/bin/python
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Module: one service of a host begins anew, and is proven."""

from __future__ import annotations

DOCUMENTATION = r"""
module: service_restart
short_description: Restart a service of a host and wait until it is healthy
version_added: "0.1.0"
author: The nemo platform project (@nemo-platform)
description:
  - Restarts the container of the release that answers for a service of M(nemo.platform.container_release), and asks the service's
    public port for its health as that does, for as long as the release may take to become healthy. Or restarts a systemd unit,
    waits until it is active, and then until every such service that answered before is healthy again.
  - A release at work on the same service is waited for, and none begins during the restart. After an interrupted release
    nothing is restarted, as the next release finishes or undoes it.
  - Fails with the last log lines of what does not become healthy.
options:
  container:
    description: The service. One of this and O(unit) is needed.
    type: str
    default: ""
  unit:
    description: A systemd unit. The SSH daemon and what a login needs are refused.
    type: str
    default: ""
  lock_timeout:
    description: Seconds to wait for a release that is at work.
    type: int
    default: 120
  state_path:
    description: Folder of the releases' records.
    type: path
    default: /var/lib/nemo
  run_path:
    description: Folder of the locks.
    type: path
    default: /run/nemo
attributes:
  check_mode:
    description: Says whether it could be restarted, and leaves it alone.
    support: full
  diff_mode:
    description: There is nothing to show.
    support: none
notes:
  - Needs root by C(become).
"""

EXAMPLES = r"""
- name: The development API begins anew
  nemo.platform.service_restart:
    container: ai-dev
  become: true
"""

RETURN = r"""
msg:
  description: What was restarted, how long it took, and what proved it.
  returned: always
  type: str
  sample: ai-dev was restarted; http://127.0.0.1:8001/health is healthy after 2.1 s
seconds:
  description: How long it took until it was healthy.
  returned: success
  type: float
log_tail:
  description: The last log lines of what did not become healthy.
  returned: failure
  type: list
  elements: str
"""

import os
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.nemo.platform.plugins.module_utils import container_release as release
from ansible_collections.nemo.platform.plugins.module_utils import systemd_units
from ansible_collections.nemo.platform.plugins.module_utils.access import refused_unit
from ansible_collections.nemo.platform.plugins.module_utils.container_release import (
    Container,
    Docker,
    Lock,
    ReleaseError,
    Store,
    question_of,
    request_timeout,
)
from ansible_collections.nemo.platform.plugins.module_utils.release_flow import Releaser

UNIT_SECONDS = 90
ADVICE = {
    "absent": "release it first: playbooks/ai.yml",
    "interrupted": "finish or undo that release first: playbooks/ai.yml",
}


class Service(NamedTuple):
    """A service whose release answers on this host."""

    name: str
    record: release.Record
    public: dict[str, Any]
    box: Container


def sign(lock: Lock) -> None:
    """Say to those who wait who holds it."""
    by = os.environ.get("SUDO_USER") or "root"
    lock.sign({"by": by, "since": release.utc_now(), "pid": os.getpid(), "what": "a restart"})


class Restarter:
    """One restart."""

    def __init__(
        self,
        params: dict[str, Any],
        run: release.Runner,
        check_mode: bool,
        probe: release.Prober = release.probe_http,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.params, self.run, self.check_mode = params, run, check_mode
        self.docker = Docker(run)
        self.probe, self.clock, self.sleep = probe, clock, sleep

    # containers

    def find(self, name: str) -> Service:
        """A service, fit to be restarted."""
        store = Store(name, self.params["state_path"], self.params["run_path"])
        state = store.read("state.json") or {}
        record = next(
            (entry for entry in state.get("releases") or [] if entry["release"] == state.get("current")), None
        )
        if not record:
            raise ReleaseError("absent", f"this host has no release of {name}")
        if store.read("transition.json"):
            raise ReleaseError("interrupted", f"a release of {name} was interrupted")
        box = self.look(f"{name}.{record['release']}")
        return Service(name, record, state["proxy"], box)

    def look(self, container: str) -> Container:
        box = self.docker.containers([container]).get(container)
        if box is None:
            raise ReleaseError("absent", f"the container {container} is gone")
        return box

    def wait(self, service: Service, restarts: int) -> str:
        """Until the service is healthy where its users ask; the URL that said so."""
        health, public = service.record["health"], service.public
        address = Releaser.local(public["address"])
        question, limit = question_of(health), self.clock() + health["timeout"]
        url = "http://%s:%d%s" % (address, public["port"], question.path)
        while True:
            problem = self.probe(address, public["port"], question, request_timeout(health))
            box = self.look(service.box.name)
            if not box.running or box.restarts > restarts:
                self.give_up(service, f"{service.name}: {Releaser.death(box, service.record['settings'])}")
            if problem is None:
                return url
            if self.clock() >= limit:
                self.give_up(service, f"{url} gave no healthy answer within {health['timeout']} s: {problem}")
            self.sleep(health["interval"])

    def give_up(self, service: Service, text: str) -> None:
        raise ReleaseError("unhealthy", text, self.docker.logs(service.box.name, service.record["health"]))

    def container(self, name: str) -> dict[str, Any]:
        """Restart a container."""
        service = self.find(name)
        if self.check_mode:
            return {"changed": True, "msg": f"{name} would be restarted", "seconds": 0.0}
        started = self.clock()
        box = service.box.name
        if service.box.paused:
            self.docker.unpause(box)
        seconds = str(service.record["settings"]["stop_timeout"])
        self.docker.call(f"{name} cannot be restarted", "container", "restart", "-t", seconds, box)
        # The engine counts restarts anew where it was asked for one.
        url = self.wait(service, self.look(box).restarts)
        took = self.clock() - started
        return {
            "changed": True,
            "msg": f"{name} was restarted; {url} is healthy after {took:.1f} s",
            "seconds": round(took, 1),
        }

    # units

    def services(self) -> list[Service]:
        """Services that answer on this host now; none where there is no engine."""
        rc, out, _err = self.run(["docker", "ps", "--filter", "label=nemo.service", "--format", "{{.Names}}"])
        names = {name.partition(".")[0] for name in ([] if rc else out.split())}
        found = []
        for name in sorted(names):
            try:
                found.append(self.find(name))
            except ReleaseError:  # interrupted, or nothing of ours: the restart changes nothing about that
                continue
        return [service for service in found if service.box.running]

    def journal(self, unit: str) -> list[str]:
        rc, out, err = self.run(["journalctl", "--no-pager", "--quiet", "--lines=20", "--output=cat", f"--unit={unit}"])
        return (err if rc else out).splitlines()

    def systemctl(self, *arguments: str) -> tuple[int, str]:
        rc, out, err = self.run(["systemctl", *arguments])
        return rc, (out or err).strip()

    def unit(self, name: str) -> dict[str, Any]:
        """Restart a unit, and wait for the services that may depend on it."""
        unit = systemd_units.full_name(name)
        if self.systemctl("show", "--property=LoadState", unit)[1] != "LoadState=loaded":
            raise ReleaseError("absent", f"this host has no unit {unit}")
        if self.check_mode:
            return {"changed": True, "msg": f"{unit} would be restarted", "seconds": 0.0}
        running = self.services()
        locks = [Lock(os.path.join(self.params["run_path"], f"{service.name}.lock")) for service in running]
        for lock, service in zip(locks, running):
            if not lock.acquire(self.params["lock_timeout"]):  # held until this process ends
                raise ReleaseError("lock", f"another run is at work on {service.name}: {lock.holder()}")
            sign(lock)
        started = self.clock()
        # A unit that was restarted often is refused by systemd for a while, unless its count is reset.
        self.systemctl("reset-failed", unit)
        rc, said = self.systemctl("restart", unit)
        if rc:
            raise ReleaseError("start", f"{unit} cannot be restarted: {release.last_line(said)}", self.journal(unit))
        limit = self.clock() + UNIT_SECONDS
        self.sleep(systemd_units.SETTLE_SECONDS)
        while True:
            state = self.systemctl("show", "--property=ActiveState", unit)[1].rpartition("=")[2]
            if state == "active":
                break
            if state in ("failed", "inactive") or self.clock() >= limit:
                raise ReleaseError("start", f"{unit} is {state} after its restart", self.journal(unit))
            self.sleep(systemd_units.SETTLE_SECONDS)
        proofs = []
        for service in running:
            self.wait(service, self.look(service.box.name).restarts)
            proofs.append(service.name)
        took = self.clock() - started
        also = f", {' and '.join(proofs)} healthy" if proofs else ""
        return {
            "changed": True,
            "msg": f"{unit} was restarted; it is active{also} after {took:.1f} s",
            "seconds": round(took, 1),
        }


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "container": {"type": "str", "default": ""},
            "unit": {"type": "str", "default": ""},
            "lock_timeout": {"type": "int", "default": 120},
            "state_path": {"type": "path", "default": "/var/lib/nemo"},
            "run_path": {"type": "path", "default": "/run/nemo"},
        },
        supports_check_mode=True,
    )
    params = module.params
    name, unit = params["container"], params["unit"]
    if bool(name) == bool(unit):
        module.fail_json(msg="service_restart: allowed: either container or unit")
    if unit and refused_unit(unit):
        module.fail_json(msg=f"service_restart: {refused_unit(unit)}")
    lock = Lock(os.path.join(params["run_path"], f"{name}.lock")) if name else None

    def run(command: Sequence[str]) -> tuple[int, str, str]:
        # A docker command that outlives a killed run keeps the lock until it has ended.
        descriptors = [lock.descriptor] if lock and lock.descriptor is not None else []
        rc, out, err = module.run_command(
            list(command), environ_update={"LC_ALL": "C"}, expand_user_and_vars=False,
            errors="surrogate_then_replace", pass_fds=descriptors, handle_exceptions=False,
        )  # fmt: skip
        return rc, out, err

    restarter = Restarter(params, run, module.check_mode)
    try:
        if not name:
            module.exit_json(**restarter.unit(unit))
        if not module.get_bin_path("docker"):
            raise ReleaseError("docker_missing", "there is no docker command on this host")
        if lock and not module.check_mode:
            restarter.find(name)  # before the lock's file is made for a service that is not here
            if not lock.acquire(params["lock_timeout"]):
                raise ReleaseError("lock", f"another run is at work on {name}: {lock.holder()}")
            sign(lock)
        module.exit_json(**restarter.container(name))
    except (ReleaseError, OSError) as error:
        text = error.text if isinstance(error, ReleaseError) else str(error)
        advice = ADVICE.get(error.reason, error.advice) if isinstance(error, ReleaseError) else ""
        tail = error.log_tail if isinstance(error, ReleaseError) else []
        lines = [f"{name or unit}: {text.rstrip('.')}. {advice}".strip()]
        if tail:
            lines += ["Its last log lines:"] + [f"  {line}" for line in tail]
        module.fail_json(msg="\n".join(lines), log_tail=tail)


if __name__ == "__main__":
    main()
