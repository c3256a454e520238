"""The lab's keys for signed downloads, and signatures by them: by GnuPG in a container, as this machine may have none."""

from __future__ import annotations

import pathlib
import re

from lab.engine import Engine
from lab.run import run
from lab.settings import LABEL, STATE

KEYS = STATE / "pki"
# RSA, because Amazon Linux 2 has a GnuPG that knows no other kind of key well.
MAKE_KEY = """set -eu
export GNUPGHOME=$(mktemp -d)
gpg --batch --quiet --passphrase '' --quick-generate-key 'nemo lab {name}' rsa3072 sign 5y
gpg --batch --with-colons --fingerprint | sed -n 's/^fpr:*\\([0-9A-F]*\\):$/Fingerprint: \\1/p'
gpg --batch --export-secret-keys --armor
gpg --batch --export --armor
"""
SIGN = """set -eu
export GNUPGHOME=$(mktemp -d)
head -c {size} >"$GNUPGHOME/key"
gpg --batch --quiet --import "$GNUPGHOME/key"
cat >"$GNUPGHOME/data"
gpg --batch --quiet --detach-sign --armor --output - "$GNUPGHOME/data"
"""


def key(engine: Engine, base: str, name: str = "downloads") -> str:
    """The fingerprint and the key pair as armoured text, made once: what it signed stays good."""
    path = KEYS / f"{name}-key.asc"
    if not path.exists():
        path.parent.mkdir(mode=0o700, exist_ok=True)
        make = MAKE_KEY.format(name=name)
        text = engine("run", "--rm", "--network=none", "--label", f"{LABEL}={STATE.parent}", base, "sh", "-c", make)
        draft = path.with_suffix(".new")
        draft.unlink(missing_ok=True)
        draft.touch(mode=0o600)  # before there is anything to read in it
        draft.write_text(text + "\n")
        draft.replace(path)
    return path.read_text()


def fingerprint(text: str) -> str:
    found = re.search(r"^Fingerprint: ([0-9A-F]{40})$", text, re.MULTILINE)
    assert found, text[:80]
    return found[1]


def public(text: str) -> str:
    return text[text.index("-----BEGIN PGP PUBLIC KEY BLOCK-----") :]


def sign(engine: Engine, base: str, text: str, file: pathlib.Path) -> bytes:
    """A detached signature of a file, armoured."""
    secret = text[text.index("-----BEGIN PGP PRIVATE") : text.index("-----BEGIN PGP PUBLIC")].encode()
    argv = ["run", "--rm", "--interactive", "--network=none", "--label", f"{LABEL}={STATE.parent}", base]
    command = ["sh", "-c", SIGN.format(size=len(secret))]
    return run([*engine.prefix, *argv, *command], stdin=secret + file.read_bytes()).stdout
