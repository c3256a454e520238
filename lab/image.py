"""The base image of the lab's hosts, and the packages of its mirror: made once, kept in the cache."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import shlex
import shutil
import tempfile

from lab import engine as engines
from lab.console import LabError, step
from lab.engine import Engine
from lab.run import run, text
from lab.settings import AI_PACKAGES, CACHE, IMAGE_PACKAGES, LABEL, MIRROR_PACKAGES, STATE, SUITE, USER

REPOSITORY = "nemo-lab/host"
BASE = "debian:bookworm-slim"  # where a registry is in reach and mmdebstrap cannot run

# Run inside the new root: what a cloud image has been given before its first boot.
CUSTOMISE = f"""set -eu
export DEBIAN_FRONTEND=noninteractive
mkdir -p /nemo-lab-debs
apt-get -o Dir::Cache::archives=/nemo-lab-debs -o APT::Sandbox::User=root -o APT::Keep-Downloaded-Packages=true \\
  install --yes --no-install-recommends --download-only {" ".join(MIRROR_PACKAGES)}
mkdir -p /nemo-lab-debs/app/partial
apt-get -o Dir::Cache::archives=/nemo-lab-debs/app -o APT::Sandbox::User=root -o Dir::State::status=/dev/null \\
  -o APT::Keep-Downloaded-Packages=true install --yes --no-install-recommends --download-only {" ".join(AI_PACKAGES)}
rm -rf /nemo-lab-debs/app/partial /nemo-lab-debs/app/lock
useradd --create-home --shell /bin/bash {USER}
printf '{USER} ALL=(ALL) NOPASSWD: ALL\\n' >/etc/sudoers.d/90-cloud-init-users
chmod 0440 /etc/sudoers.d/90-cloud-init-users
rm -f /etc/ssh/ssh_host_* /etc/machine-id /etc/apt/sources.list /etc/apt/sources.list.d/*
: >/etc/machine-id
systemctl mask systemd-logind.service systemd-networkd.service getty.target console-getty.service
systemctl set-default multi-user.target
"""


def _key() -> str:
    parts = (SUITE, CUSTOMISE, *IMAGE_PACKAGES)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def name() -> str:
    """The image's name; it changes with what goes into the image."""
    return f"{REPOSITORY}:{_key()}"


def debs() -> pathlib.Path:
    """The folder of the mirror's packages."""
    return CACHE / f"debs-{_key()}"


def archive() -> pathlib.Path:
    """The root file system as a tar archive, made where it is not in the cache yet."""
    target = CACHE / f"host-{_key()}.tar"
    if target.exists() and debs().exists():
        return target
    CACHE.mkdir(parents=True, exist_ok=True)
    for old in CACHE.glob("host-*.tar"):
        old.unlink()
    for old in CACHE.glob("debs-*"):
        shutil.rmtree(old)
    for left in STATE.glob("image-*"):  # of runs that were killed
        shutil.rmtree(left)
    with tempfile.TemporaryDirectory(dir=STATE, prefix="image-") as folder:
        work = pathlib.Path(folder)
        if os.geteuid() == 0 and shutil.which("apt-get"):
            _by_mmdebstrap(work)
        else:
            _by_registry(work, engines.ensure())
        (work / "debs").rename(debs())
        (work / "root.tar").rename(target)
    return target


def ensure(engine: Engine) -> str:
    """The image in the engine, imported where it is not there yet."""
    image, missing = name(), engine.inspect("image", name()) is None
    if missing or not debs().exists():
        root = archive()
    if missing:
        with step(f"importing the image {image}"):
            engine("import", "--change", f"LABEL {LABEL}={json.dumps(str(STATE.parent))}", str(root), image)
    return image


def _sources() -> list[str]:
    """The suites with the mirrors that this machine uses itself; none where it is no Debian: mmdebstrap knows its own."""
    found: dict[str, str] = {}
    listing = text(
        ["apt-get", "indextargets", "--format", "$(CREATED_BY)|$(ORIGIN)|$(CODENAME)|$(REPO_URI)"], check=False
    )
    for line in listing.splitlines():
        made_by, origin, codename, uri = line.split("|")
        if made_by == "Packages" and origin == "Debian" and codename.startswith(SUITE):
            found.setdefault(codename, uri)
    return [f"deb {uri} {suite} main" for suite, uri in found.items()] if SUITE in found else []


def _by_mmdebstrap(work: pathlib.Path) -> None:
    if not shutil.which("mmdebstrap"):
        with step("installing mmdebstrap, which makes the lab's base image"):
            engines.apt_install(["mmdebstrap", "debian-archive-keyring"])
    (work / "customise").write_text(CUSTOMISE)
    (work / "debs").mkdir()
    with step(f"making the base image from Debian {SUITE} packages (about a minute, once)"):
        run([
            "mmdebstrap", "--variant=minbase", f"--include={','.join(IMAGE_PACKAGES)}",
            f"--customize-hook=copy-in {shlex.quote(str(work / 'customise'))} /",
            '--customize-hook=chroot "$1" sh /customise',
            f"--customize-hook=sync-out /nemo-lab-debs {shlex.quote(str(work / 'debs'))}",
            '--customize-hook=rm -rf "$1/customise" "$1/nemo-lab-debs" "$1"/usr/share/doc/* "$1"/usr/share/locale/*',
            SUITE, str(work / "root.tar"), *_sources(),
        ])  # fmt: skip
    for other in ("lock", "partial"):
        path = work / "debs" / other
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _by_registry(work: pathlib.Path, engine: Engine) -> None:
    container = "nemo-lab-image-build"
    script = f"apt-get update && apt-get install --yes --no-install-recommends {' '.join(IMAGE_PACKAGES)}\n{CUSTOMISE}"
    try:
        with step(f"making the base image from {BASE} (a few minutes, once)"):
            engine("rm", "--force", container, check=False)
            engine("pull", BASE)
            engine("run", "--name", container, "--label", f"{LABEL}={STATE.parent}", BASE, "sh", "-euc", script)
            (work / "debs").mkdir()
            engine("cp", f"{container}:/nemo-lab-debs/.", str(work / "debs"))
            engine("export", "--output", str(work / "root.tar"), container)
    except LabError as error:
        raise LabError(
            f"the base image could not be made from {BASE}: {error}\n"
            "On Debian or Ubuntu, run this as root: the image is then made from the distribution's packages."
        ) from error
    finally:
        engine("rm", "--force", container, check=False)
