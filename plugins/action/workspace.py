# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Action workspace: finds the controller's revision, and sends the archive only where it is missing. Documented in plugins/modules."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase

from ansible_collections.nemo.platform.plugins.module_utils import workspace_source
from ansible_collections.nemo.platform.plugins.module_utils.workspace_source import Source, SourceError

MODULE = "nemo.platform.workspace"
OWN_ROOT = str(Path(__file__).resolve().parents[2])  # the checkout, or the installed collection


class ActionModule(ActionBase):
    """The action."""

    _supports_check_mode = True
    _supports_async = False

    def _look(self, arguments: dict[str, Any]) -> Source:
        root = str(arguments.pop("source", None) or OWN_ROOT)
        try:
            source = workspace_source.look(os.path.expanduser(root))
            workspace_source.check_requirements(source, workspace_source.REQUIREMENTS)
        except SourceError as error:
            raise AnsibleActionFail(str(error)) from error
        return source

    def _send(self, source: Source) -> str:
        """The archive's path on the host."""
        descriptor, path = tempfile.mkstemp(suffix=".tar")
        os.close(descriptor)
        try:
            workspace_source.pack(source, path)
            if not self._connection._shell.tmpdir:
                self._make_tmp_path()
            return str(
                self._transfer_file(
                    path, self._connection._shell.join_path(self._connection._shell.tmpdir, "workspace.tar")
                )
            )
        except SourceError as error:
            raise AnsibleActionFail(str(error)) from error
        finally:
            os.unlink(path)

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Ask the host what it lacks, and send that."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        arguments = dict(self._task.args)
        source = None
        if not arguments.get("revision"):
            source = self._look(arguments)
            arguments["revision"] = source.revision
            arguments["sent"] = True
        arguments.pop("source", None)
        try:
            answer = self._execute_module(module_name=MODULE, module_args=arguments, task_vars=task_vars)
            if answer.get("archive_needed") and source is not None and not self._task.check_mode:
                answer = self._execute_module(
                    module_name=MODULE, module_args={**arguments, "archive": self._send(source)}, task_vars=task_vars
                )
        finally:
            self._remove_tmp_path(self._connection._shell.tmpdir)
        result.update(answer)
        return result
