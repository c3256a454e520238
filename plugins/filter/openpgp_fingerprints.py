# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Filter: the fingerprints of the keys in an armoured OpenPGP key block, without gpg."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Callable, Iterator
from typing import Any

DOCUMENTATION = r"""
name: openpgp_fingerprints
short_description: Fingerprints of the primary keys in an armoured OpenPGP public key block
version_added: 0.1.0
author: The nemo platform project (@nemo-platform)
description:
  - Computes the fingerprint of every primary key (version 4) of a public key block in ASCII armour, on the controller and without
    C(gpg), so that a role can refuse a key that is not the one whose fingerprint it was given.
  - A text that is no key block gives an empty list.
options:
  _input:
    description: The key block.
    type: str
    required: true
"""

EXAMPLES = r"""
- name: The key is the one that is meant
  ansible.builtin.assert:
    that: key | nemo.platform.openpgp_fingerprints == ['C95B321B61E88C1809C4F759DDCAE044F796ECB0']
  vars:
    key: "{{ lookup('ansible.builtin.file', 'toolkit.asc') }}"
"""

RETURN = r"""
_value:
  description: 40 hexadecimal digits in capitals for each key, in the order of the block.
  type: list
  elements: str
"""

BLOCK = re.compile(
    r"-----BEGIN PGP PUBLIC KEY BLOCK-----\r?\n(?:[A-Za-z]+: [^\n]*\n)*\s*\n(.*?)-----END PGP PUBLIC KEY BLOCK-----",
    re.DOTALL,
)
PUBLIC_KEY = 6


def packets(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Type and body of each packet (RFC 9580, 4.2); raises IndexError or ValueError where the data is none."""
    at = 0
    while at < len(data):
        first = data[at]
        if not first & 0x80:
            raise ValueError("no packet")
        at += 1
        if first & 0x40:
            kind, size = first & 0x3F, data[at]
            at += 1
            if 192 <= size < 224:
                size = ((size - 192) << 8) + data[at] + 192
                at += 1
            elif size == 255:
                size = int.from_bytes(data[at : at + 4], "big")
                at += 4
            elif size >= 224:
                raise ValueError("a key is no stream")
        else:
            kind, width = (first >> 2) & 0xF, (1, 2, 4, 0)[first & 3]
            size = int.from_bytes(data[at : at + width], "big") if width else len(data) - at
            at += width
        if at + size > len(data):
            raise ValueError("cut off")
        yield kind, data[at : at + size]
        at += size


def openpgp_fingerprints(text: str) -> list[str]:
    """The filter."""
    found = []
    for block in BLOCK.findall(text):
        lines = [line.strip() for line in block.splitlines()]
        body = "".join(line for line in lines if not line.startswith("="))  # the last line is a checksum
        try:
            for kind, content in packets(base64.b64decode(body, validate=True)):
                if kind == PUBLIC_KEY and content[:1] == b"\x04":
                    data = b"\x99" + len(content).to_bytes(2, "big") + content
                    found.append(hashlib.sha1(data, usedforsecurity=False).hexdigest().upper())
        except (binascii.Error, ValueError, IndexError):
            return []
    return found


class FilterModule:
    """The filter's name."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """What this file brings."""
        return {"openpgp_fingerprints": openpgp_fingerprints}
