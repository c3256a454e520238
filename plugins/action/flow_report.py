# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Action flow_report: the verdict on all flows, printed, written down, and failed on. Documented in plugins/modules."""

from __future__ import annotations

import datetime
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase

from ansible_collections.nemo.platform.plugins.module_utils import flow_probe, flow_report
from ansible_collections.nemo.platform.plugins.module_utils.flow_table import OUTSIDE

ARGUMENTS = {
    "plan": {"type": "dict", "required": True},
    "results": {"type": "dict", "required": True},
    "closed_by": {"type": "str", "choices": [flow_report.DROP, flow_report.REJECT], "default": flow_report.DROP},
    "optional": {"type": "list", "elements": "str", "default": []},
    "directory": {"type": "str", "default": ""},
    "timeout": {"type": "float", "default": 3},
    "total_timeout": {"type": "float", "default": 30},
    "retries": {"type": "int", "default": 1},
}
COLOURS = {flow_report.FAILED: "red", flow_report.UNPROVEN: "yellow", flow_report.SKIPPED: "yellow"}


def default_directory(playbooks: str, home: Path) -> Path:
    """build/verify of the checkout that is being worked in; where there is none to write to, a folder of the user's own."""
    here = Path(playbooks).resolve()
    for folder in (here, *here.parents):
        if (folder / "galaxy.yml").is_file() and (folder / "ansible.cfg").is_file():
            if os.access(folder, os.W_OK):
                return folder / "build" / "verify"
            break
    return home / ".ansible" / "nemo_platform" / "verify"


def write(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write the files, each as a whole."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        with tempfile.NamedTemporaryFile(dir=folder, prefix=f".{name}.", delete=False) as draft:
            draft.write(data)
        Path(draft.name).chmod(0o644)
        Path(draft.name).replace(folder / name)


class ActionModule(ActionBase):
    """The action."""

    BYPASS_HOST_LOOP = True
    _supports_check_mode = True
    _requires_connection = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Try what is tried from this machine, judge, print, write, and fail where there is a finding."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        _valid, arguments = self.validate_argument_spec(ARGUMENTS)
        plan = arguments["plan"]
        results, missing = self._collect(arguments)
        report = flow_report.judge(
            plan["flows"],
            results,
            missing,
            arguments["closed_by"],
            arguments["optional"],
            plan["unknown"],
            plan["way_in"],
        )
        for status, line in flow_report.lines(report):
            self._display.display(line, color=COLOURS.get(status))
        report.notes[:0] = plan["notes"]
        for note in report.notes:
            self._display.display(f"note: {note}", color="yellow")
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        data = flow_report.as_data(report, plan["started"], now)
        folder = Path(arguments["directory"] or default_directory(self._loader.get_basedir(), Path.home())).expanduser()
        files = {
            "verify.json": json.dumps(data, indent=1).encode() + b"\n",
            "verify.xml": flow_report.as_junit(report),
        }
        try:
            write(folder, files)
        except OSError as error:
            raise AnsibleActionFail(
                f"the report cannot be written to {folder} ({error.strerror}): set verify_report_dir; {report.summary}"
            ) from error
        for line in flow_report.explained(report):
            self._display.display(line, color="red")
        told = f"{report.summary}; also in {folder}/verify.json and verify.xml"
        result.update(changed=False, passed=not report.findings, directory=str(folder))
        if report.findings:
            return {**result, "failed": True, "msg": told}
        self._display.display(told, color="green")
        return {**result, "notes": data["notes"], "summary": data["summary"]}

    @staticmethod
    def _collect(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
        """Results by flow, and the sources from which there are none."""
        results: dict[str, Any] = {}
        missing: dict[str, str] = {}
        for host, answer in arguments["results"].items():
            if answer.get("problem"):
                missing[host] = str(answer["problem"])
            results.update({one["id"]: one for one in answer.get("results") or ()})
        outside = [flow["probe"] for flow in arguments["plan"]["flows"] if flow["source"] == OUTSIDE]
        if not outside:
            return results, missing
        if not results:
            # Without one host that answered, these addresses may as well be somebody else's.
            missing[OUTSIDE] = "no host of the platform answered, so nothing was tried from this machine"
            return results, missing
        found = flow_probe.probe_all(outside, arguments["timeout"], arguments["total_timeout"], arguments["retries"])
        results.update({one["id"]: one for one in found})
        return results, missing
