# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Action release_announcement: tells a webhook what came of a release. Documented in plugins/modules."""

from __future__ import annotations

import datetime
import http.client
import json
import re
import time
import urllib.error
from collections.abc import Mapping
from typing import Any

from ansible.module_utils.urls import open_url
from ansible.plugins.action import ActionBase
from ansible.utils.display import Display

ARGUMENTS: dict[str, dict[str, Any]] = {
    "url": {"type": "str", "required": True, "no_log": True},
    "service": {"type": "str", "required": True},
    "operator": {"type": "str", "default": ""},
    "tag": {"type": "str", "default": ""},
    "digest": {"type": "str", "default": ""},
    "result": {"type": "dict", "required": True},
    "text_key": {"type": "str", "default": "sentence"},
    "timeout": {"type": "float", "default": 5},
    "retries": {"type": "int", "default": 2},
}
LONGEST_TEXT = 500
TOO_MANY = 429
STEP = re.compile(r"^(\d+[.]\d) s: ")


class NotTaken(Exception):
    """Why the webhook did not take it; never with its address."""

    def __init__(self, text: str, again: bool) -> None:
        super().__init__(text)
        self.again = again


def seconds_of(steps: Any) -> float | None:
    """How long it took, as far as the module's steps tell."""
    found = STEP.match(str(steps[-1])) if isinstance(steps, list) and steps else None
    return float(found[1]) if found else None


def announcement(arguments: Mapping[str, Any], host: str, at: str) -> dict[str, Any]:
    """What is posted."""
    result = arguments["result"]
    failed = bool(result.get("failed") or result.get("unreachable"))
    release = {} if failed else result.get("release") or {}
    said: dict[str, Any] = {
        "service": arguments["service"],
        "host": host,
        "by": arguments["operator"],
        "kind": str(result.get("action") or "none"),
        "result": "failed" if failed else "ok",
        "tag": release.get("tag") or arguments["tag"],
        "digest": release.get("digest") or arguments["digest"],
        "image": release.get("image") or "",
        "previous": (result.get("previous") or {}).get("tag", ""),
        "reason": str(result.get("reason") or "") if failed else "",
        "text": str(result.get("msg") or "").partition("\n")[0][:LONGEST_TEXT] if failed else "",
        "seconds": seconds_of(result.get("steps")),
        "at": at,
    }
    what = f"{said['kind']} {said['tag']}".strip().replace("_", " ")
    sentence = f"{said['service']} on {host}: {what} by {said['by'] or 'somebody'}"
    if failed:
        sentence = f"{said['service']} on {host}: {said['tag'] or 'a rollback'} by {said['by'] or 'somebody'} FAILED: {said['text']}"
    return {**said, arguments["text_key"]: sentence}


def post(url: str, body: bytes, timeout: float) -> None:
    """One attempt."""
    headers = {"Content-Type": "application/json", "User-Agent": "nemo-platform"}
    try:
        open_url(url, method="POST", data=body, headers=headers, timeout=timeout, follow_redirects="none").close()
    except urllib.error.HTTPError as error:
        raise NotTaken(f"it answered {error.code}", error.code == TOO_MANY or error.code >= 500) from error
    except urllib.error.URLError as error:
        reason = error.reason.__class__.__name__ if isinstance(error.reason, Exception) else "no answer"
        raise NotTaken(f"it cannot be reached ({reason})", True) from error
    except (OSError, http.client.HTTPException) as error:
        raise NotTaken(f"it cannot be reached ({error.__class__.__name__})", True) from error
    except (
        Exception
    ) as error:  # an address that is none, a certificate authority that is not there: no release fails on it
        raise NotTaken(f"its address cannot be used ({error.__class__.__name__})", False) from error


class ActionModule(ActionBase):
    """The action."""

    _supports_check_mode = True
    _supports_async = False
    _requires_connection = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Say it, a few times if need be."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        _valid, arguments = self.validate_argument_spec(ARGUMENTS)
        result.update(changed=False, announced=False)
        given = arguments["result"]
        worth = given.get("failed") or given.get("unreachable") or given.get("changed")
        if not arguments["url"] or not worth or self._task.check_mode:
            return result
        host = str((task_vars or {}).get("inventory_hostname", ""))
        at = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
        body = json.dumps(announcement(arguments, host, at)).encode()
        for attempt in range(arguments["retries"] + 1):
            try:
                post(arguments["url"], body, arguments["timeout"])
            except NotTaken as error:
                if error.again and attempt < arguments["retries"]:
                    time.sleep(1)
                    continue
                Display().warning(
                    f"{arguments['service']} on {host}: the webhook was not told of the release: {error}; the release is"
                    " as it is"
                )
                return result
            result["announced"] = True
            return result
        return result
