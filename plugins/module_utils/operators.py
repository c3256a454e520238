# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Operators as data: what is wrong with them, and what their keys are. Pure functions, for preflight and host alike.

Standard library only and Python 3.9 syntax, because this runs on managed hosts.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

NAME = re.compile(r"[a-z_][a-z0-9_-]{0,30}")
RSA_BITS = 3072
# Length of the public part of keys that have but one size.
ED25519_BYTES = 32
ED25519_TYPES = ("ssh-ed25519", "sk-ssh-ed25519@openssh.com")
ECDSA_CURVES = {
    "ecdsa-sha2-nistp256": ("nistp256", 256),
    "ecdsa-sha2-nistp384": ("nistp384", 384),
    "ecdsa-sha2-nistp521": ("nistp521", 521),
    "sk-ecdsa-sha2-nistp256@openssh.com": ("nistp256", 256),
}
TYPES = ("ssh-rsa", *ED25519_TYPES, *ECDSA_CURVES)
# Options that only take away. `command`, `environment`, `cert-authority`, `permitopen` and their like are refused.
OPTIONS = (
    "restrict",
    "no-agent-forwarding",
    "no-port-forwarding",
    "no-pty",
    "no-user-rc",
    "no-x11-forwarding",
    "from",
)
_OPTION = re.compile(r'([A-Za-z0-9-]+)(?:="((?:[^"\\]|\\.)*)")?(,|[ \t]+|$)')
_FROM = re.compile(r"[A-Za-z0-9.:*?!_/,\[\]-]+")


class Finding(NamedTuple):
    """What is wrong, and what is allowed."""

    what: str
    allowed: str


class KeyProblem(ValueError):
    """A key that no operator may have. The text never holds the key itself."""

    def __init__(self, what: str, allowed: str) -> None:
        super().__init__(f"{what}; allowed: {allowed}")
        self.what = what
        self.allowed = allowed


@dataclass(frozen=True)
class Key:
    """One public key."""

    kind: str
    bits: int
    fingerprint: str  # SHA256:..., as ssh-keygen and the SSH daemon write it
    body: str
    options: str = ""
    comment: str = ""

    @property
    def line(self) -> str:
        """The key as a line of authorized_keys, without its comment."""
        return " ".join(part for part in (self.options, self.kind, self.body) if part)

    def __str__(self) -> str:
        return f"{self.kind} {self.bits} {self.fingerprint}" + (f" ({self.options})" if self.options else "")


def _fields(blob: bytes) -> list[bytes]:
    fields, position = [], 0
    while position < len(blob):
        if position + 4 > len(blob):
            raise ValueError("cut off")
        (length,) = struct.unpack(">I", blob[position : position + 4])
        position += 4
        if position + length > len(blob):
            raise ValueError("cut off")
        fields.append(blob[position : position + length])
        position += length
    return fields


def fingerprint(blob: bytes) -> str:
    """SHA256:... of a key's bytes."""
    return "SHA256:" + base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")


def _split_options(text: str) -> tuple[str, str]:
    """The options in front of a key, checked, and the rest of the line."""
    if text.split(None, 1)[0] in TYPES or text.startswith(("ssh-", "ecdsa-", "sk-")):
        return "", text
    found, position = [], 0
    while True:
        match = _OPTION.match(text, position)
        if match is None:
            raise KeyProblem("it is no public key", "a line as in a .pub file")
        name, value, end = match.groups()
        plain = name.lower()
        if plain not in OPTIONS or (plain == "from") != (value is not None):
            if position == 0 and end != "," and value is None and "-" not in plain:
                raise KeyProblem("it is no public key", "a line as in a .pub file")
            raise KeyProblem(f"it has the option {name}", ", ".join(OPTIONS[:-1]) + ', from="..."')
        if value is not None and not _FROM.fullmatch(value):
            raise KeyProblem("its option from names no addresses", 'from="10.0.0.0/8,host.example.com"')
        found.append(name if value is None else f'{name}="{value}"')
        position = match.end()
        if end != ",":
            return ",".join(found), text[position:]


def _bits(kind: str, fields: Sequence[bytes], rsa_bits: int) -> int:
    if kind == "ssh-rsa":
        if len(fields) != 3:
            raise ValueError("wrong number of fields")
        bits = int.from_bytes(fields[2], "big").bit_length()
        if bits < rsa_bits:
            raise KeyProblem(f"it is an RSA key of {bits} bits", f"{rsa_bits} bits or more, or ed25519")
        if int.from_bytes(fields[1], "big") < 3:
            raise ValueError("exponent")
        return bits
    hardware = kind.startswith("sk-")
    if kind in ED25519_TYPES:
        if len(fields) != 2 + hardware or len(fields[1]) != ED25519_BYTES:
            raise ValueError("wrong length")
        return 256
    curve, bits = ECDSA_CURVES[kind]
    if len(fields) != 3 + hardware or fields[1] != curve.encode() or len(fields[2]) != 1 + 2 * ((bits + 7) // 8):
        raise ValueError("wrong length")
    return bits


def parse_key(text: Any, rsa_bits: int = RSA_BITS) -> Key:
    """One line of authorized_keys; raises KeyProblem."""
    if not isinstance(text, str) or not text.strip():
        raise KeyProblem("it is empty or no text", "a line as in a .pub file")
    text = text.strip()
    if "PRIVATE KEY" in text:
        raise KeyProblem(
            "it is a private key: take it out of the inventory and its history, and make a new pair", "the public part"
        )
    if any(ord(letter) < 32 and letter != "\t" for letter in text):
        raise KeyProblem("it has more than one line", "one key in each entry")
    options, rest = _split_options(text)
    words = rest.split(None, 2)
    kind = words[0] if words else ""
    if kind == "ssh-dss":
        raise KeyProblem("it is a DSA key", "ed25519, ecdsa or RSA")
    if kind not in TYPES:
        what = (
            "it is a certificate" if "-cert-" in kind else f"it is of the type {kind!r}" if kind else "it has no type"
        )
        raise KeyProblem(what, ", ".join(TYPES))
    try:
        body = words[1]
        blob = base64.b64decode(body, validate=True)
        fields = _fields(blob)
        if fields[0] != kind.encode():
            raise KeyProblem("its type and its body disagree", "a line as in a .pub file")
        bits = _bits(kind, fields, rsa_bits)
    except KeyProblem:
        raise
    except (ValueError, IndexError, binascii.Error) as error:
        raise KeyProblem("its body is damaged or cut off", "a line as in a .pub file") from error
    comment = words[2] if len(words) > 2 else ""
    return Key(kind, bits, fingerprint(blob), base64.b64encode(blob).decode(), options, comment)


def keys_of(operator: Mapping[str, Any], rsa_bits: int = RSA_BITS) -> list[Key]:
    """The keys of an operator that problems() has nothing to say about."""
    return [parse_key(text, rsa_bits) for text in operator["keys"]]


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _of_keys(label: str, keys: Any, owners: dict[str, str], rsa_bits: int) -> Iterable[Finding]:
    if not _is_list(keys) or not keys:
        yield Finding(f"{label} has no list of keys", "keys: [at least one public key]")
        return
    here: set[str] = set()
    for number, text in enumerate(keys, 1):
        try:
            key = parse_key(text, rsa_bits)
        except KeyProblem as problem:
            yield Finding(f"key {number} of {label} is refused: {problem.what}", problem.allowed)
            continue
        owner = owners.setdefault(key.fingerprint, label)
        if key.fingerprint in here:
            yield Finding(f"{label} has the key {key.fingerprint} twice", "once")
        elif owner != label:
            yield Finding(f"{owner} and {label} have the same key {key.fingerprint}", "a key for each operator alone")
        here.add(key.fingerprint)


def problems(
    operators: Any, reserved: Iterable[str] = (), allow_empty: bool = False, rsa_bits: int = RSA_BITS
) -> list[Finding]:
    """All that is wrong with a list of operators; empty where nothing is."""
    shape = "a list of {name: ..., keys: [...], sudo: false}"
    if not _is_list(operators):
        return [Finding("it is no list", shape)]
    if not operators and not allow_empty:
        return [Finding("it is empty: nobody could log in", f"{shape}; or operators_allow_empty: true")]
    found: list[Finding] = []
    taken = {"root", *reserved}
    seen: set[str] = set()
    owners: dict[str, str] = {}
    for number, operator in enumerate(operators, 1):
        if not isinstance(operator, Mapping):
            found.append(Finding(f"entry {number} is no operator", shape))
            continue
        name = operator.get("name")
        label = str(name) if isinstance(name, str) and name else f"entry {number}"
        if not isinstance(name, str) or not NAME.fullmatch(name):
            found.append(
                Finding(
                    f"the name of entry {number} is {name!r}",
                    "lower-case letters, digits, _ and -, a letter or _ first, 31 at most",
                )
            )
        elif name in taken:
            found.append(Finding(f"{name} is the name of another account", "a name of the operator's own"))
        elif name in seen:
            found.append(Finding(f"{name} is there twice", "each operator once"))
        seen.add(label)
        unknown = sorted(str(key) for key in operator if key not in ("name", "keys", "sudo"))
        if unknown:
            found.append(Finding(f"{label} has {', '.join(unknown)}", "name, keys and sudo"))
        if not isinstance(operator.get("sudo", False), bool):
            found.append(Finding(f"sudo of {label} is {operator['sudo']!r}", "true or false"))
        found.extend(_of_keys(label, operator.get("keys"), owners, rsa_bits))
    return found
