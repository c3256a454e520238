#!/usr/bin/python
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Packages by yum's own program, on hosts whose Python for modules has no binding of yum."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: yum_package
short_description: Packages by yum, without a Python binding
version_added: "0.1.0"
author:
  - The nemo platform project (@nemo-platform)
description:
  - Installs packages with the program C(yum), for Amazon Linux 2, whose yum is written in Python 2 and whose modules run
    on a Python of their own. The module M(ansible.builtin.dnf) needs a binding that cannot be imported there.
  - What is installed is asked of C(rpm) in one query, and where nothing is missing C(yum) is not started and no network
    is needed.
  - What was asked for is looked up again after C(yum) ran, because yum 3 ends with success when it knew only some of
    the packages.
  - Metadata that is older than the repository is thrown away and C(yum) is asked once more.
options:
  name:
    description:
      - Packages, or what packages provide (a capability or the path of a file), that the host shall have.
      - Groups, globs and addresses of RPM files are refused, as one query cannot tell whether they are installed.
    type: list
    elements: str
    required: true
    aliases: [pkg]
  state:
    description: V(present) installs what is missing and upgrades nothing that is there.
    type: str
    choices: [present]
    default: present
  update_cache:
    description: Throw the metadata away before C(yum) looks for packages. Nothing happens where none is missing.
    type: bool
    default: false
  lock_timeout:
    description: Seconds to wait while another process holds the lock of yum or rpm.
    type: int
    default: 300
requirements:
  - the programs rpm and yum
attributes:
  check_mode:
    support: full
    description: Says what would be installed; whether the repositories have it is not looked up.
  diff_mode:
    support: none
    description: There is nothing to show but RV(installed).
notes:
  - Needs root to install.
  - A package of an C(amazon-linux-extras) topic is unknown until its topic is enabled.
seealso:
  - module: ansible.builtin.dnf
"""

EXAMPLES = r"""
- name: Tools for looking at the network
  nemo.platform.yum_package:
    name: [bind-utils, tcpdump, /usr/bin/nc]

- name: The same, by the package module that knows its manager
  ansible.builtin.package:
    use: nemo.platform.yum_package
    name: [bind-utils, tcpdump]
"""

RETURN = r"""
installed:
  description: Names out of O(name) that were missing and now are there; in check mode those that are missing.
  returned: success
  type: list
  elements: str
  sample: [tcpdump]
missing:
  description: Names out of O(name) that are still missing.
  returned: failure
  type: list
  elements: str
"""

import re
import time
from collections.abc import Callable, Sequence

from ansible.module_utils.basic import AnsibleModule

Run = Callable[[Sequence[str]], "tuple[int, str, str]"]

LOCKED = re.compile(
    r"another copy is running as pid|holding the yum lock|Waiting for process with pid"
    r"|can't create transaction lock|cannot open Packages database|Failed to obtain (the )?transaction lock"
    r"|rpmdb: .*lock",
    re.IGNORECASE,
)
STALE = re.compile(
    r"No package .* available|No match for argument|Unable to find a match|HTTP Error 404|\[Errno 14\]|\[Errno 256\]"
    r"|Error downloading packages|Cannot find a valid baseurl|Cannot retrieve repository metadata"
    r"|metadata .*(does not match|checksum)",
    re.IGNORECASE,
)
NOT_PACKAGES = re.compile(r"^@|[*?\[\]]|://|\.rpm$|^-|^\s*$")
PAUSE = 3


class YumError(Exception):
    """Packages cannot be installed; the text says which and why."""

    def __init__(self, message: str, missing: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.missing = list(missing)


def last_lines(text: str, count: int = 4) -> str:
    """What a program said at its end, on one line."""
    return "; ".join([line.strip() for line in text.splitlines() if line.strip()][-count:])


class Yum:
    """rpm and yum on this host."""

    def __init__(self, run: Run, lock_timeout: int, sleep: Callable[[float], None] = time.sleep) -> None:
        self._run = run
        self._sleep = sleep
        self._patience = lock_timeout

    def missing(self, names: Sequence[str]) -> list[str]:
        """Those out of names that no installed package bears or provides, in their order."""
        # one query for all; its answers stand in the order of the names, one or more lines for each
        code, out, err = self._run(["rpm", "--query", "--whatprovides", "--queryformat", "%{NAME}\n", *names])
        if code == 0:
            return []
        found = []
        for name in names:
            if f"no package provides {name}\n" in out or f"file {name}: " in err + out or f"file {name} " in out:
                found.append(name)
        if not found:
            raise YumError(f"rpm cannot be asked what is installed (status {code}): {last_lines(err or out)}")
        return found

    def install(self, names: Sequence[str], update_cache: bool) -> None:
        """Install names by yum; what yum leaves out is an error."""
        if update_cache:
            self._clean()
        said = self._yum(names)
        left = self.missing(names)
        if left and not update_cache and STALE.search(said):
            self._clean()
            said = self._yum(left)
            left = self.missing(names)
        if left:
            raise YumError(f"yum did not install {', '.join(left)}: {last_lines(said)}", left)

    def _clean(self) -> None:
        self._patiently(["yum", "--quiet", "clean", "expire-cache"])

    def _yum(self, names: Sequence[str]) -> str:
        # exit_on_lock: yum would wait for ever otherwise
        return self._patiently(["yum", "--assumeyes", "--setopt=exit_on_lock=1", "install", *names])

    def _patiently(self, argv: Sequence[str]) -> str:
        waited = 0
        while True:
            code, out, err = self._run(argv)
            said = f"{out}\n{err}"
            if code == 0 or not LOCKED.search(said):
                return said
            if waited >= self._patience:
                raise YumError(f"another process held yum's lock for {self._patience} seconds: {last_lines(said, 2)}")
            self._sleep(PAUSE)
            waited += PAUSE


def ensure(yum: Yum, names: Sequence[str], update_cache: bool, check_mode: bool) -> list[str]:
    """Install what is missing, and return it."""
    wrong = [name for name in names if NOT_PACKAGES.search(name)]
    if wrong:
        raise YumError(
            f"name has {', '.join(map(repr, wrong))}; allowed: names, capabilities and paths of files", wrong
        )
    if not names:
        return []
    wanted = yum.missing(list(dict.fromkeys(names)))
    if wanted and not check_mode:
        yum.install(wanted, update_cache)
    return wanted


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "name": {"type": "list", "elements": "str", "required": True, "aliases": ["pkg"]},
            "state": {"type": "str", "choices": ["present"], "default": "present"},
            "update_cache": {"type": "bool", "default": False},
            "lock_timeout": {"type": "int", "default": 300},
        },
        supports_check_mode=True,
    )
    module.run_command_environ_update = {"LC_ALL": "C", "LANG": "C"}
    for program in ("rpm", "yum"):
        module.get_bin_path(program, required=True)

    def run(argv: Sequence[str]) -> tuple[int, str, str]:
        code, out, err = module.run_command(list(argv))
        return code, out, err

    yum = Yum(run, module.params["lock_timeout"])
    try:
        installed = ensure(yum, module.params["name"], module.params["update_cache"], module.check_mode)
    except YumError as error:
        module.fail_json(msg=str(error), missing=error.missing)
    module.exit_json(changed=bool(installed), installed=installed)


if __name__ == "__main__":
    main()
