# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Detached OpenPGP signatures, judged by what gpg reports and never by its exit status, which is 0 for an expired key too.

The keyring is a folder of its own that holds one key. Works with GnuPG 2.0.22 (Amazon Linux 2) and everything after it.
Standard library only and Python 3.9 syntax, because this runs on managed hosts.
"""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass
from typing import Callable

Run = Callable[[list[str]], "tuple[int, str, str]"]

# What gpg says about one signature when it is not a good one by a valid key.
REFUSALS = {
    "BADSIG": "the signature does not fit the file: one of them was altered",
    "EXPSIG": "the signature has expired",
    "EXPKEYSIG": "the key that made it has expired",
    "REVKEYSIG": "the key that made it was revoked",
    "NO_PUBKEY": "it was made by another key",
    "ERRSIG": "gpg cannot check it",
    "NODATA": "there is no signature in it",
    "UNEXPECTED": "it is not a signature",
}
INVALID_KEYS = {"r": "was revoked", "e": "has expired", "i": "is not valid", "d": "is disabled"}


class SignatureError(Exception):
    """Something is not signed as it must be."""


@dataclass(frozen=True)
class Key:
    """The primary key of a key block: fingerprint, end of its validity (None: never), and gpg's letter for its state."""

    fingerprint: str
    expires: int | None
    state: str


def day(seconds: int) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc).strftime("%Y-%m-%d")


def normal_fingerprint(text: str) -> str:
    return text.replace(" ", "").upper()


class Keyring:
    """A throw-away keyring with the one key that is trusted."""

    def __init__(self, program: str, folder: str, run: Run) -> None:
        self._command = [program, "--no-options", "--homedir", folder, "--batch", "--no-tty", "--status-fd", "1"]
        self._folder = folder
        self._run = run
        os.makedirs(folder, mode=0o700)

    def take(self, text: str) -> Key:
        """Read a key block, which must hold exactly one key."""
        path = os.path.join(self._folder, "key.asc")
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
        _, out, err = self._run([*self._command, "--import", path])
        _, out_list, _ = self._run(
            [*self._command, "--with-colons", "--fixed-list-mode", "--fingerprint", "--list-keys"]
        )
        keys, primary = [], False
        for line in out_list.splitlines():
            fields = line.split(":")
            if fields[0] == "pub":
                primary = True
                keys.append(["", fields[6], fields[1]])
            elif fields[0] == "fpr" and primary:
                keys[-1][0], primary = fields[9], False
        if len(keys) != 1:
            said = " ".join((err or out).split())
            raise SignatureError(
                f"the signing key cannot be read: {len(keys)} keys in it instead of one; gpg says: {said}"
            )
        fingerprint, expires, state = keys[0]
        return Key(fingerprint, int(expires) if expires else None, state[:1])

    def verify(self, signature: str, file: str, fingerprint: str) -> None:
        """Return only if `signature` is a good signature of `file` by the key with this primary fingerprint, valid now."""
        _, out, err = self._run([*self._command, "--trust-model", "always", "--verify", signature, file])
        lines = [line.split()[1:] for line in out.splitlines() if line.startswith("[GNUPG:] ")]
        said = {words[0]: words[1:] for words in lines if words}
        # NO_PUBKEY comes with an ERRSIG, and says more.
        for word in sorted(set(said) & set(REFUSALS), key=list(REFUSALS).index):
            by = (
                f" (key {said[word][0]})"
                if word in ("NO_PUBKEY", "EXPKEYSIG", "REVKEYSIG", "BADSIG", "EXPSIG") and said[word]
                else ""
            )
            raise SignatureError(f"{REFUSALS[word]}{by}; gpg says {word}")
        if "GOODSIG" not in said or "VALIDSIG" not in said:
            raise SignatureError(f"gpg finds no good signature in it: {' '.join(err.split()) or 'it says nothing'}")
        # The last field of every VALIDSIG is the fingerprint of the primary key.
        signers = {words[-1] for words in lines if words and words[0] == "VALIDSIG"}
        if signers != {fingerprint}:
            raise SignatureError(f"it was made by {', '.join(sorted(signers))}, pinned is {fingerprint}")
