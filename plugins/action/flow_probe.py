# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Action flow_probe: runs the module of this name, and makes a host from which nothing can be tried a result, too."""

from __future__ import annotations

from typing import Any

from ansible.errors import AnsibleConnectionFailure, AnsibleError
from ansible.plugins.action import ActionBase

from ansible_collections.nemo.platform.plugins.callback.advice import advice


def reason(text: str) -> str:
    """What is known of a failed login, in one line."""
    known = advice(text, True)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return known or (lines[-1] if lines else "no reason was given")


class ActionModule(ActionBase):
    """The action."""

    _supports_check_mode = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Run the module; what keeps it from running is the field problem."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        if not self._task.args.get("flows"):
            return {**result, "changed": False, "results": [], "problem": ""}
        # A host that is down is a finding, and not worth the patience that a change of it would be.
        if self._connection.has_option("reconnection_retries"):
            self._connection.set_option("reconnection_retries", 0)
        try:
            found = self._execute_module(task_vars=task_vars)
        except AnsibleConnectionFailure as error:
            return {**result, "changed": False, "results": [], "problem": reason(str(error))}
        except AnsibleError as error:
            found = {"failed": True, "msg": str(error)}
        if found.get("failed") or "results" not in found:
            text = str(found.get("module_stderr") or found.get("msg") or found)
            return {**result, "changed": False, "results": [], "problem": reason(text)}
        return {**result, **found, "problem": ""}
