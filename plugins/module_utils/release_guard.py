# Copyright: the nemo.platform authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What starts the old release again when a run is killed after it has stopped it, before the new one is proven.

A run that is killed leaves its lock to the kernel, so the lock tells: a transient unit of systemd waits for it. Where the
release is then still at its first step, the run is dead or has given up. The unit stops what was not proven, starts what
served, and lets HAProxy read its file, which says so. The next run sees the rest to its end, as after any other kill.

A reboot ends the unit too; then the engine starts the old container, by the restart policy that it has meanwhile.
"""

from __future__ import annotations

import shlex

from ansible_collections.nemo.platform.plugins.module_utils.container_release import ReleaseError
from ansible_collections.nemo.platform.plugins.module_utils.release_proxy import Executor

SCRIPT = """exec 9<>{lock}
flock 9
grep --quiet '"step": "start"' {transition} 2>/dev/null && grep --quiet --fixed-strings {release} {transition} || exit 0
echo "the run that released {name} has ended in the middle: {old} is started again"
docker container stop --time {seconds} {new}
docker container start {old}
{reload}
"""


class Guard:
    """The guard of one service."""

    def __init__(self, name: str, execute: Executor, lock: str, transition: str) -> None:
        self.name = name
        self.execute = execute
        self.lock = lock
        self.transition = transition

    def watch(self, old: str, new: str, seconds: int, proxied: bool) -> None:
        """From now on, until the run's lock is free."""
        reload = "systemctl reload nemo-proxy-%s.service" % self.name if proxied else ""
        words = {"name": self.name, "lock": self.lock, "transition": self.transition, "old": old, "new": new}
        words["release"] = new.rpartition(".")[2]
        script = SCRIPT.format(seconds=seconds, reload=reload, **{key: shlex.quote(text) for key, text in words.items()})
        unit = "nemo-release-guard-%s" % self.name
        # One of a release that has just ended may still be about to see that there is nothing to do.
        self.execute(("systemctl", "stop", "%s.service" % unit), (), {})
        rc, out, err = self.execute(
            ("systemd-run", "--quiet", "--collect", "--unit=%s" % unit, "/bin/sh", "-c", script), (), {}
        )
        if rc:
            text = "what would start the old release again after a kill cannot be started: %s"
            raise ReleaseError("start", text % (err or out))
