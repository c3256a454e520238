#!/usr/bin/python
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Module: a command-line tool at one version, from downloads that are pinned by digest and by signature."""

from __future__ import annotations

DOCUMENTATION = r"""
module: pinned_tool
short_description: A command-line tool at one version, from pinned downloads
version_added: 0.1.0
author: The nemo platform project (@nemo-platform)
description:
  - Downloads the parts of a version, verifies each by its SHA-256 digest and, where it has one, by its detached OpenPGP
    signature, unpacks them into C(<root>/<name>/<version>), runs the tool's own version probe there, and switches the
    link C(<root>/<name>/current) to it by one rename. A run that is killed at any moment leaves the version before it
    in use, and the next run finishes.
  - Nothing is unpacked or run before every part is verified. A version that is there already, unharmed, is neither
    downloaded nor unpacked again, whether it is the one in use or one that was kept. What was installed is known by a
    manifest, and a file that was altered or cut off since then makes the version anew.
  - Signatures are judged by what C(gpg --status-fd) reports, in a keyring of its own that lasts as long as the
    verification. The end of the key's validity is watched on each run, without a download.
  - Proxies come from the environment, as O(ignore:environment) of the task sets it.
options:
  name:
    description: Name of the tool, and of its folder.
    type: str
    required: true
  version:
    description: Version, and name of its folder.
    type: str
    required: true
  root:
    description: Folder that has one folder for each tool.
    type: path
    default: /opt/nemo/tools
  artifacts:
    description: What the version is made of.
    type: list
    elements: dict
    required: true
    suboptions:
      url:
        description: Address, C(http://) or C(https://).
        type: str
        required: true
      sha256:
        description: SHA-256 digest of the file at O(artifacts[].url), 64 hexadecimal digits.
        type: str
        required: true
      format:
        description: V(file) is the tool itself, the others are unpacked.
        type: str
        choices: [file, tar.gz, zip]
        default: file
      path:
        description: Name of the file, or folder that an archive is unpacked to, relative to the version's folder.
        type: str
        default: ""
      strip:
        description: Number of leading folders that are cut off the names in an archive.
        type: int
        default: 0
      only:
        description: Shell patterns of the names that are unpacked, after O(artifacts[].strip). Empty means all.
        type: list
        elements: str
        default: []
      signature_url:
        description: Address of the detached signature. Empty means that the file is not signed.
        type: str
        default: ""
  files:
    description: Small text files that belong to the version.
    type: list
    elements: dict
    default: []
    suboptions:
      path:
        description: Name, relative to the version's folder.
        type: str
        required: true
      content:
        description: The whole content.
        type: str
      command:
        description:
          - The tool makes the content itself, on its standard output. The first word is relative to the version's folder.
        type: list
        elements: str
      executable:
        description: Whether the file can be run.
        type: bool
        default: false
  links:
    description:
      - Links that lead to files of the version in use, as a dictionary of absolute path and path in the version's folder.
      - A link that is there and leads elsewhere is replaced; anything else at its place is an error before the first
        change. A link of an earlier run that is not listed any more is removed.
    type: dict
    default: {}
  probe:
    description: Command that says the version, run in the version's folder before it is used; its first word is relative to it.
    type: list
    elements: str
    default: []
  expect:
    description: Regular expression that must be found in the probe's output.
    type: str
    default: ""
  keep:
    description: Number of versions, beside the one in use, that are kept; those used last stay.
    type: int
    default: 1
  signing_key:
    description: Public key, ASCII armoured, that O(artifacts[].signature_url) is verified with.
    type: str
    default: ""
  signing_key_fingerprint:
    description: Fingerprint of that key's primary key, 40 hexadecimal digits; spaces do not matter.
    type: str
    default: ""
  expiry_warning_days:
    description: Days before the end of the key's validity from which each run warns.
    type: int
    default: 60
  timeout:
    description: Seconds without a byte after which a download is tried again.
    type: int
    default: 30
  retries:
    description: Number of further tries of a download, each of which goes on where the one before it ended.
    type: int
    default: 3
  lock_timeout:
    description: Seconds to wait for another run on the same tool.
    type: int
    default: 120
requirements:
  - C(gpg) on the host, from GnuPG 2.0.22, where an artifact has a signature
attributes:
  check_mode:
    description: Tells what would be done; downloads nothing.
    support: full
  diff_mode:
    description: The version before and after, and the links that change.
    support: full
notes:
  - Needs root for the default of O(root).
  - Every error names the address or file, what was found and what was expected, and leaves the version in use as it was.
"""

EXAMPLES = r"""
- name: Kubectl is the pinned version
  nemo.platform.pinned_tool:
    name: kubectl
    version: 1.33.9
    artifacts:
      - url: https://dl.k8s.io/release/v1.33.9/bin/linux/amd64/kubectl
        sha256: 9e33e3234c0842cd44a12c13e334b4ce930145ea84b855ce7cc0a7b6bc670c22
        path: kubectl
    probe: [kubectl, version, --client]
    expect: 'v1\.33\.9\b'
    files:
      - path: completion.bash
        command: [kubectl, completion, bash]
    links:
      /usr/local/bin/kubectl: kubectl
      /etc/bash_completion.d/kubectl: completion.bash
"""

RETURN = r"""
version:
  description: The version in use.
  returned: success
  type: str
  sample: 1.33.9
previous_version:
  description: The version that was in use before the run, or null.
  returned: success
  type: str
path:
  description: Folder of the version.
  returned: success
  type: str
  sample: /opt/nemo/tools/kubectl/1.33.9
installed:
  description: Whether the version was made by this run.
  returned: success
  type: bool
switched:
  description: Whether the link C(current) was changed.
  returned: success
  type: bool
downloaded:
  description: Addresses of what was downloaded and verified.
  returned: success
  type: list
  elements: str
damaged:
  description: The file for which the version was made anew, or empty.
  returned: success
  type: str
links_changed:
  description: Links that were made, changed or removed.
  returned: success
  type: list
  elements: str
removed:
  description: Folders of old versions that were removed.
  returned: success
  type: list
  elements: str
key_expires:
  description: The day on which the signing key's validity ends, or empty.
  returned: success
  type: str
  sample: "2027-07-01"
missing_program:
  description: A program that the host lacks.
  returned: on failure, when that is the cause
  type: str
  sample: gpg
"""

import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.nemo.platform.plugins.module_utils.downloads import DownloadError, Limits
from ansible_collections.nemo.platform.plugins.module_utils.openpgp import normal_fingerprint
from ansible_collections.nemo.platform.plugins.module_utils.pinned_tool import (
    Artifact,
    Outcome,
    PinnedTool,
    SmallFile,
    ToolError,
    Wanted,
)

ARGUMENT_SPEC: dict[str, Any] = {
    "name": {"type": "str", "required": True},
    "version": {"type": "str", "required": True},
    "root": {"type": "path", "default": "/opt/nemo/tools"},
    "artifacts": {
        "type": "list",
        "elements": "dict",
        "required": True,
        "options": {
            "url": {"type": "str", "required": True},
            "sha256": {"type": "str", "required": True},
            "format": {"type": "str", "choices": ["file", "tar.gz", "zip"], "default": "file"},
            "path": {"type": "str", "default": ""},
            "strip": {"type": "int", "default": 0},
            "only": {"type": "list", "elements": "str", "default": []},
            "signature_url": {"type": "str", "default": ""},
        },
        "required_if": [("format", "file", ("path",))],
    },
    "files": {
        "type": "list",
        "elements": "dict",
        "default": [],
        "options": {
            "path": {"type": "str", "required": True},
            "content": {"type": "str"},
            "command": {"type": "list", "elements": "str"},
            "executable": {"type": "bool", "default": False},
        },
        "mutually_exclusive": [("content", "command")],
        "required_one_of": [("content", "command")],
    },
    "links": {"type": "dict", "default": {}},
    "probe": {"type": "list", "elements": "str", "default": []},
    "expect": {"type": "str", "default": ""},
    "keep": {"type": "int", "default": 1},
    "signing_key": {"type": "str", "default": "", "no_log": False},
    "signing_key_fingerprint": {"type": "str", "default": "", "no_log": False},
    "expiry_warning_days": {"type": "int", "default": 60},
    "timeout": {"type": "int", "default": 30},
    "retries": {"type": "int", "default": 3},
    "lock_timeout": {"type": "int", "default": 120},
}


def run_program(
    argv: Sequence[str], environment: Mapping[str, str], folder: str, seconds: float
) -> tuple[int, str, str]:
    """Run without a shell, and not for ever."""
    try:
        done = subprocess.run(
            list(argv), env=dict(environment), cwd=folder, timeout=seconds, check=False,
            stdin=subprocess.DEVNULL, capture_output=True,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return -1, "", f"no answer within {seconds:g} s"
    return done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")


def wanted_from(params: Mapping[str, Any]) -> Wanted:
    return Wanted(
        name=params["name"],
        version=params["version"],
        root=params["root"],
        artifacts=tuple(Artifact(**{**entry, "only": tuple(entry["only"])}) for entry in params["artifacts"]),
        files=tuple(
            SmallFile(entry["path"], entry["content"] or "", tuple(entry["command"] or ()), entry["executable"])
            for entry in params["files"]
        ),
        links={str(path): str(target) for path, target in params["links"].items()},
        probe=tuple(params["probe"]),
        expect=params["expect"],
        keep=params["keep"],
        signing_key=params["signing_key"],
        fingerprint=normal_fingerprint(params["signing_key_fingerprint"]),
        warn_days=params["expiry_warning_days"],
    )


def diff_of(wanted: Wanted, outcome: Outcome) -> dict[str, str]:
    """The version before and after, and the links."""
    note = f" (altered: {outcome.damaged})" if outcome.damaged else ""
    before = f"{wanted.name} {outcome.previous}{note}\n" if outcome.previous else ""
    after = f"{wanted.name} {wanted.version}\n"
    for path in outcome.links:
        goal = wanted.links.get(path)
        if goal is None:
            before += f"{path}\n"
        else:
            after += f"{path} -> {goal}\n"
    before += "".join(f"kept: {path}\n" for path in outcome.removed)
    header = f"{wanted.root}/{wanted.name}"
    return {"before": before, "after": after, "before_header": header, "after_header": header}


def main() -> None:
    """Run the module."""
    module = AnsibleModule(argument_spec=ARGUMENT_SPEC, supports_check_mode=True)
    params = module.params
    wanted = wanted_from(params)
    tool = PinnedTool(
        wanted,
        run_program,
        module.warn,
        lambda: module.get_bin_path("gpg") or module.get_bin_path("gpg2"),
        Limits(params["timeout"], params["retries"]),
        params["lock_timeout"],
        bool(module.check_mode),
    )
    try:
        outcome = tool.run()
    except ToolError as error:
        extra = {"missing_program": error.program} if error.program else {}
        module.fail_json(msg=f"{wanted.name} {wanted.version}: {error}", **extra)
    except DownloadError as error:
        module.fail_json(msg=f"{wanted.name} {wanted.version}: {error}")
    result: dict[str, Any] = {
        "changed": outcome.changed,
        "version": wanted.version,
        "previous_version": outcome.previous,
        "path": outcome.folder,
        "installed": outcome.installed,
        "switched": outcome.switched,
        "downloaded": outcome.downloaded,
        "damaged": outcome.damaged,
        "links_changed": outcome.links,
        "removed": outcome.removed,
        "key_expires": outcome.key_expires,
    }
    if module._diff:
        result["diff"] = diff_of(wanted, outcome)
    module.exit_json(**result)


if __name__ == "__main__":
    main()
