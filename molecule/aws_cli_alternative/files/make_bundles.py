#!/usr/bin/env python3
"""Bundles in the layout of AWS's, a few lines each, with a key and signatures: make_bundles.py FOLDER VERSION..."""

import os
import pathlib
import subprocess
import sys
import tempfile
import zipfile

GPG = ["gpg", "--batch", "--quiet", "--passphrase", ""]


def main(folder: pathlib.Path, versions: list[str]) -> None:
    folder.mkdir(parents=True)
    os.environ["GNUPGHOME"] = tempfile.mkdtemp()
    subprocess.run([*GPG, "--quick-generate-key", "of a test", "rsa3072", "sign", "30d"], check=True)
    for version in versions:
        path = folder / f"awscli-exe-linux-x86_64-{version}.zip"
        with zipfile.ZipFile(path, "w") as bundle:
            for name, text in (
                ("aws/dist/aws", f"#!/bin/sh\necho aws-cli/{version} of a test\n"),
                ("aws/dist/aws_completer", "#!/bin/sh\n"),
                ("aws/install", "#!/bin/sh\ntouch /srv/installer-ran\n"),
            ):
                entry = zipfile.ZipInfo(name)
                entry.external_attr = 0o100755 << 16
                bundle.writestr(entry, text)
        subprocess.run([*GPG, "--detach-sign", str(path)], check=True)
    key = subprocess.run([*GPG, "--armor", "--export"], check=True, capture_output=True).stdout
    (folder / "key.asc").write_bytes(key)
    listed = subprocess.run([*GPG, "--with-colons", "--fingerprint"], check=True, capture_output=True, text=True).stdout
    fingerprint = next(line.split(":")[9] for line in listed.splitlines() if line.startswith("fpr:"))
    (folder / "fingerprint").write_text(fingerprint)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), sys.argv[2:])
