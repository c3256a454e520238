# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Action access_report: prints what an operation of playbooks/access.yml found. Documented in plugins/modules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ansible.plugins.action import ActionBase
from ansible.utils.display import Display

from ansible_collections.nemo.platform.plugins.module_utils import access

ARGUMENTS = {
    "about": {"type": "str", "required": True, "choices": ["who", "logs", "run"]},
    "results": {"type": "str", "required": True},
    "bastions": {"type": "list", "elements": "str", "default": []},
    "operators": {"type": "list", "elements": "dict", "default": []},
}
FAILED = {"who": "no answer of", "logs": "not all logs could be read on", "run": "the command failed on"}


class ActionModule(ActionBase):
    """The action."""

    BYPASS_HOST_LOOP = True
    _supports_check_mode = True
    _requires_connection = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Print; fail where a host did."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        task_vars = task_vars or {}
        _spec, arguments = self.validate_argument_spec(ARGUMENTS)
        about, name = arguments["about"], arguments["results"]
        hostvars = task_vars["hostvars"]
        results: dict[str, Mapping[str, Any]] = {
            str(host): hostvars[host].get(name) or {"unreachable": True}
            for host in task_vars.get("ansible_play_hosts_all", [])
        }
        if about == "run":
            blocks, failed = access.run_blocks(results)
        elif about == "logs":
            blocks, failed = access.log_blocks(results)
        else:
            blocks, failed = access.who_blocks(results, arguments["bastions"], arguments["operators"])
        display = Display()
        for block in blocks:
            for line in block.lines:
                display.display(line, color=block.colour)
        result |= {"changed": False, "failed_hosts": failed}
        if failed:
            result |= {"failed": True, "msg": f"{FAILED[about]} {', '.join(failed)}"}
        return result
