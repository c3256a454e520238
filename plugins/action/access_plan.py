# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Action access_plan: what is asked of playbooks/access.yml, before any connection. Documented in plugins/modules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ansible import context
from ansible.plugins.action import ActionBase
from ansible.utils.display import Display

from ansible_collections.nemo.platform.plugins.module_utils import access


class ActionModule(ActionBase):
    """The action."""

    BYPASS_HOST_LOOP = True
    _supports_check_mode = True
    _requires_connection = False

    def _given(self, task_vars: Mapping[str, Any]) -> dict[str, str]:
        names = {name for known in access.VARIABLES.values() for name in known}
        given = {}
        for name in sorted(names & set(task_vars)):
            # What was typed is never a template: docker's own {{ }} must get through.
            if name != "command" or access.raw_command(self._extra_vars()) is None:
                given[name] = str(self._templar.template(task_vars[name]))
        command = access.raw_command(self._extra_vars())
        return given if command is None else {**given, "command": command}

    def _extra_vars(self) -> list[str]:
        return [str(item) for item in context.CLIARGS.get("extra_vars") or ()]

    def _services(self, task_vars: Mapping[str, Any]) -> dict[str, str]:
        catalogue = task_vars.get("nemo_services") or {}
        if not isinstance(catalogue, Mapping):
            catalogue = self._templar.template(catalogue)
        # Its secrets may be undefined, and are none of this operation's business.
        return {str(name): str(self._templar.template(catalogue[name]["group"])) for name in catalogue}

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Look at tags and variables; the hosts of the operation, or one sentence."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        task_vars = task_vars or {}
        groups = {name: list(members) for name, members in task_vars["groups"].items()}
        found = access.Inventory(groups, {})
        result |= {"changed": False, "operation": "", "targets": []}
        try:
            what = access.operation(task_vars.get("ansible_run_tags") or ())
            hosts = groups.get("all") or []
            # The catalogue is the hosts' own variable: of the first of them, as localhost is none of the inventory's.
            # As it is written: where one host's variables are made for another, there are no hostvars, and environments name some.
            owner = task_vars["hostvars"].raw_get(min(hosts)) if hosts else {}
            found = access.Inventory(groups, self._services(owner))
            if not what:
                Display().display(access.usage(found))
                raise access.AccessError(f"no tag is given; allowed: one of {', '.join(access.OPERATIONS)}")
            if "become" in task_vars:
                raise access.AccessError("become is no variable here; allowed: --become (-b)")
            given = self._given(task_vars)
            chosen = access.targets(what, given, found)
        except access.AccessError as error:
            return {**result, "failed": True, "msg": f"{error}"}
        result["operation"] = what
        result["command"] = given.get("command", "")
        result["targets"] = [{"host": target.host, "services": target.services} for target in chosen]
        return result
