"""The lab's package mirror: a signed Debian repository of the packages that the roles install.

The controller puts this file and the packages into the container of the AWS side, which runs it at boot; it uses the
standard library alone and Debian's own dpkg-deb and gpg.
"""

from __future__ import annotations

import hashlib
import pathlib
import subprocess

ROOT = pathlib.Path("/srv/mirror")
SUITE = "bookworm"
GPG = ["gpg", "--homedir", "/etc/nemo-lab/gnupg", "--batch", "--quiet"]


def stanza(deb: pathlib.Path) -> str:
    """One package's entry in the index."""
    control = subprocess.run(["dpkg-deb", "--field", str(deb)], check=True, capture_output=True, text=True).stdout
    digest = hashlib.sha256(deb.read_bytes()).hexdigest()
    return f"{control.rstrip()}\nFilename: {deb.relative_to(ROOT / 'debian')}\nSize: {deb.stat().st_size}\nSHA256: {digest}\n"


def main() -> None:
    """Write the index of every package in the pool, the release file, and its signature."""
    architecture = subprocess.run(
        ["dpkg", "--print-architecture"], check=True, capture_output=True, text=True
    ).stdout.strip()
    suite = ROOT / "debian" / "dists" / SUITE
    index = suite / "main" / f"binary-{architecture}" / "Packages"
    index.parent.mkdir(parents=True, exist_ok=True)
    index.write_text("\n".join(stanza(deb) for deb in sorted((ROOT / "debian" / "pool").glob("*.deb"))))
    data = index.read_bytes()
    (suite / "Release").write_text(
        f"Origin: nemo-lab\nSuite: {SUITE}\nCodename: {SUITE}\nArchitectures: {architecture}\nComponents: main\n"
        "Date: Thu, 01 Jan 2026 00:00:00 UTC\n"
        f"SHA256:\n {hashlib.sha256(data).hexdigest()} {len(data)} {index.relative_to(suite)}\n"
    )
    pathlib.Path("/etc/nemo-lab/gnupg").mkdir(mode=0o700, exist_ok=True)
    subprocess.run([*GPG, "--import", "/etc/nemo-lab/mirror-key.asc"], check=True, capture_output=True)
    subprocess.run(
        [*GPG, "--yes", "--clearsign", "--output", str(suite / "InRelease"), str(suite / "Release")], check=True
    )


if __name__ == "__main__":
    main()
