"""The container of the AWS side: the API, the registry and the package mirror, filled with what the account holds."""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import io
import pathlib
import tarfile
from collections.abc import Iterator

from botocore.exceptions import BotoCoreError, ClientError

from lab import hosts, image, mirror
from lab.artifacts import publish
from lab.aws import images, payload, seed
from lab.console import LabError, say
from lab.engine import Engine, tar_entry
from lab.settings import AWS_API, AWS_HOST, INSTANCES, LABEL, MIRROR, REGISTRY_ADDRESS, STATE

MIRROR_KEY = STATE / "pki" / "mirror-key.asc"
INDEX_UNIT = """[Unit]
Description=Index of the lab's package mirror
Before=nemo-lab-mirror.service

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/usr/bin/python3 /opt/nemo-lab/mirror.py

[Install]
WantedBy=multi-user.target
"""


# Made inside a container of the base image, because this machine may have no gpg; kept, so that hosts stay as they are.
MAKE_KEY = """set -eu
export GNUPGHOME=$(mktemp -d)
gpg --batch --quiet --passphrase '' --quick-generate-key 'nemo lab mirror' ed25519 sign never
gpg --batch --export-secret-keys --armor
gpg --batch --export --armor
"""


def _mirror_key(engine: Engine, base: str) -> str:
    """The mirror's key pair as one armoured text, the secret part first."""
    if not MIRROR_KEY.exists():
        MIRROR_KEY.parent.mkdir(mode=0o700, exist_ok=True)
        text = engine("run", "--rm", "--network=none", "--label", f"{LABEL}={STATE.parent}", base, "sh", "-c", MAKE_KEY)
        temporary = MIRROR_KEY.with_suffix(".new")
        temporary.write_text(text + "\n")
        temporary.chmod(0o600)
        temporary.rename(MIRROR_KEY)
    return MIRROR_KEY.read_text()


def _mirror_archive(key: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data, mode in (
            ("/opt/nemo-lab/mirror.py", pathlib.Path(mirror.__file__).read_bytes(), 0o644),
            ("/etc/systemd/system/nemo-lab-mirror-index.service", INDEX_UNIT.encode(), 0o644),
            ("/etc/nemo-lab/mirror-key.asc", key.encode(), 0o600),
            *(
                (f"/srv/mirror/debian/pool/{deb.name}", deb.read_bytes(), 0o644)
                for deb in sorted(image.debs().glob("*.deb"))
            ),
        ):
            info, content = tar_entry(name, data, mode)
            tar.addfile(info, io.BytesIO(content))
        for name, target in (
            ("multi-user.target.wants/nemo-lab-mirror-index.service", "../nemo-lab-mirror-index.service"),
            ("ssh.service", "/dev/null"),  # AWS is nobody's host to log in to
        ):
            link = tarfile.TarInfo(f"etc/systemd/system/{name}")
            link.type, link.linkname = tarfile.SYMTYPE, target
            tar.addfile(link)
    return buffer.getvalue()


@contextlib.contextmanager
def errors() -> Iterator[None]:
    """Make one line of whatever the lab's AWS API or registry answers."""
    if not hosts.is_up():
        raise LabError("the lab is down: `make lab` brings it up")
    try:
        yield
    except (BotoCoreError, ClientError, OSError) as error:
        raise LabError(f"the AWS side of the lab answered: {error}; `make lab` repairs what it can") from error


def up(engine: Engine, base: str, artifacts: concurrent.futures.Future[publish.Artifacts]) -> tuple[bytes, str]:
    """The AWS side, running and filled; returns the lab's CA certificate and the public key of its mirror."""
    archive, key = payload.build(STATE, image.debs()), _mirror_key(engine, base)
    identity = hashlib.sha256("\n".join([
        archive.name, pathlib.Path(mirror.__file__).read_text(), INDEX_UNIT, key,
        *(f"{deb.name} {deb.stat().st_size}" for deb in sorted(image.debs().glob("*.deb"))),
    ]).encode()).hexdigest()  # fmt: skip
    if hosts.create(
        engine, base, AWS_HOST, "aws", AWS_API, identity, lambda: [archive.read_bytes(), _mirror_archive(key)]
    ):
        say("the AWS side starts: API, registry, package mirror")
    hosts.wait_for_boot(engine, AWS_HOST)
    for address, port in ((AWS_API, 5000), (AWS_API, 443), (REGISTRY_ADDRESS, 443), (MIRROR, 80)):
        hosts.wait_for_port(address, port)
    with errors():
        if seed.seed(INSTANCES):
            say("the AWS account holds its instances, volumes, repositories and cluster")
        images.ensure()
    publish.publish(engine, base, artifacts.result())
    return (STATE / "pki" / "ca.crt").read_bytes(), key[key.index("-----BEGIN PGP PUBLIC KEY BLOCK-----") :]
