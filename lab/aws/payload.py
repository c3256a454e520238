"""What the container nemo-lab-aws has on top of the base image, as one archive."""

from __future__ import annotations

import hashlib
import io
import pathlib
import platform
import shutil
import sys
import tarfile
import tempfile

from lab import pki
from lab.aws import deb
from lab.console import LabError, step
from lab.run import run
from lab.settings import (
    ACCOUNT,
    AWS_API,
    AWS_NAMES,
    CLUSTER_API,
    CLUSTER_NAME,
    DATABASE,
    EKS_NODES,
    IMDS,
    MACHINE,
    MIRROR,
    REGION,
    REGISTRY,
    REGISTRY_ADDRESS,
    SUBNET,
)

HERE = pathlib.Path(__file__).resolve().parent
ROOT = "opt/nemo-lab"
PYTHON = "3.11"  # of Debian 12, the base image
TOKEN = f"{ACCOUNT}-auth-token"  # the password in every token that moto's ECR hands out
MTIME = 1_700_000_000  # an archive made twice is the same

# Every name that a client on a lab host may look for; the rest of AWS is reached by an endpoint address on port 5000.
API_NAMES = (*AWS_NAMES, f"*.{REGION}.amazonaws.com", "sts.amazonaws.com", "iam.amazonaws.com", AWS_API)

ADDRESSES = f"""[Unit]
Description=The addresses of the registry, the mirror, the instance metadata, the cluster and the database
DefaultDependencies=no
After=local-fs.target
Before=network.target

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/sbin/ip address replace {REGISTRY_ADDRESS}/32 dev eth0
ExecStart=/sbin/ip address replace {MIRROR}/32 dev eth0
ExecStart=/sbin/ip address replace {IMDS}/32 dev eth0
ExecStart=/sbin/ip address replace {CLUSTER_API}/32 dev eth0
ExecStart=/sbin/ip address replace {DATABASE}/32 dev eth0
ExecStart=/usr/sbin/nft -f /{ROOT}/security-groups.nft
# Python's servers look up the name of their own address, and nobody else answers here.
ExecStart=/bin/sh -c 'grep -q "^{MIRROR} " /etc/hosts || printf "%%s\\n" "{MIRROR} mirror" "{IMDS} metadata" >>/etc/hosts'

[Install]
WantedBy=multi-user.target
"""

API = f"""[Unit]
Description=The AWS API and the instance metadata service
Requires=nemo-lab-addresses.service
After=nemo-lab-addresses.service

[Service]
Type=notify
Environment=PYTHONPATH=/{ROOT}:/{ROOT}/site
Environment=PYTHONUNBUFFERED=1
RuntimeDirectory=nemo-lab
RuntimeDirectoryPreserve=yes
ExecStart=/usr/bin/python3 -m lab.aws.server
TimeoutStartSec=120
Restart=on-failure

[Install]
WantedBy=multi-user.target
"""

REGISTRY_UNIT = f"""[Unit]
Description=The container registry
Requires=nemo-lab-addresses.service
After=nemo-lab-addresses.service

[Service]
RuntimeDirectory=nemo-lab
RuntimeDirectoryPreserve=yes
ExecStartPre=/bin/sh -c '/{ROOT}/bin/htpasswd >/run/nemo-lab/htpasswd'
ExecStart=/{ROOT}/bin/docker-registry serve /{ROOT}/registry.yml
Restart=on-failure

[Install]
WantedBy=multi-user.target
"""

MIRROR_UNIT = f"""[Unit]
Description=The package mirror
Requires=nemo-lab-addresses.service
After=nemo-lab-addresses.service

[Service]
Environment=PYTHONPATH=/{ROOT}
ExecStart=/usr/bin/python3 -m lab.aws.files {MIRROR} 80 /srv/mirror
StandardOutput=null
StandardError=null
Restart=on-failure

[Install]
WantedBy=multi-user.target
"""

NEIGHBOURS = f"""[Unit]
Description=The cluster's API server and the database, as far as they listen
Requires=nemo-lab-addresses.service
After=nemo-lab-addresses.service

[Service]
ExecStart=/usr/bin/python3 -I /{ROOT}/lab/listeners.py kubernetes={CLUSTER_API}:443=/{ROOT}/tls/cluster mysql={DATABASE}:3306
Restart=on-failure
RestartSec=1

[Install]
WantedBy=multi-user.target
"""

UNITS = {"addresses": ADDRESSES, "aws": API, "registry": REGISTRY_UNIT, "mirror": MIRROR_UNIT, "neighbours": NEIGHBOURS}

# The cluster's endpoint is private: open to the VPC, and this machine stands for what is outside.
SECURITY_GROUPS = f"""table inet nemo_lab_security_group
delete table inet nemo_lab_security_group
table inet nemo_lab_security_group {{
  chain inbound {{
    type filter hook prerouting priority -150; policy accept;
    ip daddr != {{ {CLUSTER_API}, {DATABASE} }} accept
    iifname != "eth0" accept
    ct state established,related accept
    meta l4proto icmp accept
    ip daddr {CLUSTER_API} ip saddr {SUBNET} ip saddr != {MACHINE} tcp dport 443 accept
    ip daddr {DATABASE} ip saddr {EKS_NODES} tcp dport 3306 accept
    meta l4proto tcp reject with tcp reset
    drop
  }}
}}
"""

REGISTRY_CONFIG = f"""version: 0.1
log:
  level: warn
  accesslog:
    disabled: true
storage:
  delete:
    enabled: true
  filesystem:
    rootdirectory: /var/lib/nemo-lab/registry
http:
  addr: {REGISTRY_ADDRESS}:443
  relativeurls: true
  secret: lab
  tls:
    certificate: /{ROOT}/tls/registry.crt
    key: /{ROOT}/tls/registry.key
auth:
  htpasswd:
    realm: https://{REGISTRY}/
    path: /run/nemo-lab/htpasswd
"""

# Where it runs, the standard library still knows bcrypt; the cost is the lowest, for every request pays it.
HTPASSWD = f"""#!/usr/bin/python3 -Wignore
import crypt

print("AWS:" + crypt.crypt("{TOKEN}", crypt.mksalt(crypt.METHOD_BLOWFISH, rounds=16)))
"""


def build(state: pathlib.Path, debs: pathlib.Path) -> pathlib.Path:
    """A tar archive to unpack at / before the first start; made once for the same contents.

    state is the folder .lab of the checkout; debs holds Debian's docker-registry package.
    """
    files = _files(state, _registry_package(debs))
    key = hashlib.sha256(machine().encode())
    for path, (data, mode) in sorted(files.items()):
        key.update(f"{path}\0{mode}\0{len(data)}\0".encode() + data)
    cache = state / "cache"
    target = cache / f"aws-{key.hexdigest()[:16]}.tar"
    if not target.exists():
        site = _site(cache)
        for old in cache.glob("aws-*.tar"):
            old.unlink()
        draft = target.with_suffix(".new")
        draft.touch(mode=0o600)  # the servers' keys are in it
        with step("packing the AWS side of the lab"), tarfile.open(draft, "w") as archive:
            for path, (data, mode) in sorted(files.items()):
                archive.addfile(_entry(path, len(data), mode), io.BytesIO(data))
            archive.addfile(_entry("srv/mirror", 0, 0o755, tarfile.DIRTYPE))
            for unit in UNITS:
                link = _entry(
                    f"etc/systemd/system/multi-user.target.wants/nemo-lab-{unit}.service", 0, 0o777, tarfile.SYMTYPE
                )
                link.linkname = f"/etc/systemd/system/nemo-lab-{unit}.service"
                archive.addfile(link)
            for source in sorted(site.rglob("*")):
                if source.is_file():
                    info = _entry(f"{ROOT}/site/{source.relative_to(site)}", source.stat().st_size, 0o644)
                    with source.open("rb") as file:
                        archive.addfile(info, file)
        draft.replace(target)
    return target


def _files(state: pathlib.Path, registry: pathlib.Path) -> dict[str, tuple[bytes, int]]:
    """All but moto: contents and mode by path."""
    pki_folder = state / "pki"
    api = pki.server(pki_folder, "aws", API_NAMES)
    ecr = pki.server(pki_folder, "registry", (REGISTRY, REGISTRY_ADDRESS))
    cluster = pki.server(pki_folder, "cluster", (CLUSTER_NAME, CLUSTER_API, "kubernetes.default.svc"))
    requirements = (HERE / "requirements.txt").read_bytes()
    files = {
        "usr/local/share/ca-certificates/nemo-lab.crt": (pki.authority(pki_folder).read_bytes(), 0o644),
        f"{ROOT}/requirements.txt": (requirements, 0o644),
        f"{ROOT}/bin/docker-registry": (deb.read(registry, "usr/bin/docker-registry"), 0o755),
        f"{ROOT}/bin/htpasswd": (HTPASSWD.encode(), 0o755),
        f"{ROOT}/registry.yml": (REGISTRY_CONFIG.encode(), 0o644),
        f"{ROOT}/security-groups.nft": (SECURITY_GROUPS.encode(), 0o644),
    }
    for name, (certificate, private) in {"aws": api, "registry": ecr, "cluster": cluster}.items():
        files[f"{ROOT}/tls/{name}.crt"] = (certificate.read_bytes(), 0o644)
        files[f"{ROOT}/tls/{name}.key"] = (private.read_bytes(), 0o600)
    for path in (
        "__init__.py", "settings.py", "listeners.py", "aws/__init__.py", "aws/server.py", "aws/files.py", "aws/hub.py",
        "aws/amis.json",
    ):  # fmt: skip
        files[f"{ROOT}/lab/{path}"] = ((HERE.parent / path).read_bytes(), 0o644)
    for name, text in UNITS.items():
        files[f"etc/systemd/system/nemo-lab-{name}.service"] = (text.encode(), 0o644)
    return files


def _registry_package(debs: pathlib.Path) -> pathlib.Path:
    found = sorted(debs.glob("docker-registry_*.deb"))
    if not found:
        raise LabError(f"{debs} holds no docker-registry package: remove the folder .lab/cache, and try again")
    return found[-1]


def _site(cache: pathlib.Path) -> pathlib.Path:
    """A folder of moto and all that it needs, for the Python of the base image on this machine's processor."""
    lock = HERE / "requirements.txt"
    key = hashlib.sha256(lock.read_bytes() + f"{machine()} {PYTHON}".encode()).hexdigest()[:16]
    target = cache / f"aws-site-{key}"
    if target.exists():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    for old in cache.glob("aws-site-*"):
        shutil.rmtree(old)
    platforms = [
        f"--platform={kind}_{machine()}"
        for kind in ("manylinux2014", "manylinux_2_17", "manylinux_2_28", "manylinux_2_34")
    ]
    with step("installing moto for the lab"), tempfile.TemporaryDirectory(dir=cache, prefix="aws-new-") as folder:
        run([
            sys.executable, "-m", "pip", "install", "--quiet", "--no-input", "--disable-pip-version-check",
            "--require-hashes", "--no-deps", "--only-binary=:all:", "--no-compile", "--implementation=cp",
            f"--python-version={PYTHON}", *platforms, f"--target={folder}/site", f"--requirement={lock}",
        ])  # fmt: skip
        shutil.rmtree(pathlib.Path(folder) / "site" / "bin", ignore_errors=True)
        (pathlib.Path(folder) / "site").rename(target)
    return target


def machine() -> str:
    """The processor of this machine, as wheels name it."""
    machine = {"amd64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())
    if machine not in ("x86_64", "aarch64"):
        raise LabError(f"the lab runs on x86_64 and aarch64 machines, not on {machine}")
    return machine


def _entry(path: str, size: int, mode: int, kind: bytes = tarfile.REGTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(path)
    info.size, info.mode, info.type, info.mtime = size, mode, kind, MTIME
    return info
