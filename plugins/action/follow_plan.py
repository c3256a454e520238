# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Action follow_plan: whether the newest image of a service is released by itself. Documented in plugins/modules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ansible.plugins.action import ActionBase
from ansible.utils.display import Display

from ansible_collections.nemo.platform.plugins.module_utils import release_follow

ARGUMENTS = {
    "service": {"type": "str", "required": True},
    "newest": {"type": "dict", "required": True},
    "found": {"type": "dict", "required": True},
    "held": {"type": "str", "default": ""},
    "report": {"type": "str", "default": ""},
}


class ActionModule(ActionBase):
    """The action."""

    BYPASS_HOST_LOOP = True
    _supports_check_mode = True
    _supports_async = False
    _requires_connection = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Decide, say so, and write it down for who has asked for that."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        _valid, arguments = self.validate_argument_spec(ARGUMENTS)
        plan = release_follow.plan(arguments["newest"], arguments["found"], arguments["held"])
        newest = arguments["newest"]
        said = {"hosts": plan.hosts, "why": plan.why, "tag": newest["tag"], "digest": newest["digest"]}
        what = f"released on {', '.join(plan.hosts)}" if plan.hosts else "nothing to release"
        Display().display(f"{arguments['service']}: {what}: {plan.why}")
        if arguments["report"]:
            path = Path(arguments["report"])
            draft = path.with_name(f"{path.name}.new")
            draft.write_text(json.dumps(said))
            draft.replace(path)
        result.update(changed=False, **said)
        return result
