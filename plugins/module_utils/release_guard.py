# Copyright: the nemo.platform authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What starts the old release again when a run is killed after it has stopped it, before the new one is proven.

A run that is killed leaves its lock to the kernel, so the lock tells: a transient unit of systemd waits for it. Where the
release is then still under way and HAProxy's file leads to the old one, the run is dead or has given up. The unit stops what
was not proven, starts what served, and lets HAProxy read its file. The next run sees the rest to its end, as after any kill.

A reboot ends the unit too; then the engine starts the old container, by the restart policy that it has meanwhile.
"""

from __future__ import annotations

import shlex

from ansible_collections.nemo.platform.plugins.module_utils.container_release import ReleaseError
from ansible_collections.nemo.platform.plugins.module_utils.release_proxy import WEIGHT, Executor

SCRIPT = """exec 9<>{lock}
flock 9
grep --quiet --fixed-strings {release} {transition} 2>/dev/null || exit 0
echo "the run that released {name} has ended in the middle"
if {unproven}; then
  echo "{old} is started again"
  docker container stop --time {seconds} {new}
  docker container start {old}
fi
{reload}
"""
# Once HAProxy's file leads to the new release, that one is proven, and stays.
LEADS_TO_OLD = "grep --fixed-strings ':{port} weight {weight}' {configuration} | grep --quiet --invert-match disabled"


class Guard:
    """The guard of one service."""

    def __init__(self, name: str, execute: Executor, lock: str, transition: str, configuration: str) -> None:
        self.name = name
        self.execute = execute
        self.lock = lock
        self.transition = transition
        self.configuration = configuration

    def script(self, old: str, new: str, seconds: int, port: int) -> str:
        """What the unit runs. The old release's port is 0 where there is no HAProxy in front of it yet."""
        words = {"name": self.name, "lock": self.lock, "transition": self.transition, "old": old, "new": new}
        words["release"] = '"release": "%s"' % new.rpartition(".")[2]
        words["configuration"] = self.configuration
        quoted = {key: shlex.quote(text) for key, text in words.items()}
        # HAProxy's file is there from the moment at which it takes over the port of a container that held it itself.
        unproven = (
            LEADS_TO_OLD.format(port=port, weight=WEIGHT, **quoted)
            if port
            else "! test -e %s" % quoted["configuration"]
        )
        # Its process may have been told to let nobody through meanwhile, and the file says otherwise.
        reload = "systemctl reload nemo-proxy-%s.service" % self.name if port else ""
        return SCRIPT.format(seconds=seconds, unproven=unproven, reload=reload, **quoted)

    def watch(self, old: str, new: str, seconds: int, port: int) -> None:
        """From now on, until the run's lock is free."""
        unit = "nemo-release-guard-%s" % self.name
        # One of a release that has just ended may still be about to see that there is nothing to do.
        self.execute(("systemctl", "stop", "%s.service" % unit), (), {})
        rc, out, err = self.execute(
            (
                "systemd-run",
                "--quiet",
                "--collect",
                "--unit=%s" % unit,
                "/bin/sh",
                "-c",
                self.script(old, new, seconds, port),
            ),
            (),
            {},
        )
        if rc:
            text = "what would start the old release again after a kill cannot be started: %s"
            raise ReleaseError("start", text % (err or out))
