# Copyright: the nemo.platform authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Action container_release: runs the module of this name and shows its progress. Documented in plugins/modules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ansible_collections.nemo.platform.plugins.plugin_utils.progress import ProgressAction


class ActionModule(ProgressAction):
    """The action."""

    def progress_of(self, arguments: Mapping[str, Any]) -> str:
        """As the module names it."""
        return str(arguments.get("progress") or arguments.get("name") or "")
