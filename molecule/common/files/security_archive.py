"""Makes this host a security archive of its own: signed, under Debian's names, with a newer version of each package named.

security_archive.py PACKAGE...      version 1.0 of each is installed, 2.0 is in the archive
"""

from __future__ import annotations

import hashlib
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path("/srv/security")
SUITE = "bookworm-security"
CONTROL = """Package: {name}
Version: {version}
Architecture: all
Maintainer: a test <test@localhost>
Description: a stand-in
"""


def run(*command: str) -> bytes:
    return subprocess.run(command, check=True, capture_output=True).stdout


def package(name: str, version: str) -> pathlib.Path:
    tree = ROOT / f"{name}-{version}"
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "DEBIAN/control").write_text(CONTROL.format(name=name, version=version))
    made = ROOT / f"{name}_{version}_all.deb"
    run("dpkg-deb", "--build", str(tree), str(made))
    return made


def main(names: list[str]) -> None:
    os.environ["GNUPGHOME"] = str(ROOT / "gnupg")
    (ROOT / "gnupg").mkdir(parents=True, mode=0o700)
    index = ROOT / "dists" / SUITE / "main" / "binary-all" / "Packages"
    index.parent.mkdir(parents=True)
    for name in names:
        run("dpkg", "--install", str(package(name, "1.0")))
        update = package(name, "2.0")
        digest = hashlib.sha256(update.read_bytes()).hexdigest()
        with index.open("a") as file:
            file.write(run("dpkg-deb", "--field", str(update)).decode().rstrip())
            file.write(f"\nFilename: {update.name}\nSize: {update.stat().st_size}\nSHA256: {digest}\n\n")
    data = index.read_bytes()
    suite = ROOT / "dists" / SUITE
    (suite / "Release").write_text(
        f"Origin: Debian\nLabel: Debian-Security\nSuite: stable-security\nCodename: {SUITE}\nArchitectures: all\n"
        "Components: main\nDate: Thu, 01 Jan 2026 00:00:00 UTC\n"
        f"SHA256:\n {hashlib.sha256(data).hexdigest()} {len(data)} main/binary-all/Packages\n"
    )
    run("gpg", "--batch", "--passphrase", "", "--quick-generate-key", "Security of a test", "ed25519", "sign", "never")
    run("gpg", "--batch", "--clearsign", "--output", str(suite / "InRelease"), str(suite / "Release"))
    run("gpg", "--batch", "--output", "/etc/apt/security-of-a-test.gpg", "--export")
    run("gpgconf", "--kill", "gpg-agent")
    pathlib.Path("/etc/apt/sources.list.d/security-of-a-test.sources").write_text(
        f"Types: deb\nURIs: file:{ROOT}\nSuites: {SUITE}\nComponents: main\nSigned-By: /etc/apt/security-of-a-test.gpg\n"
    )
    run("apt-get", "--quiet", "update")


if __name__ == "__main__":
    main(sys.argv[1:])
