"""The lab's network and hosts: systemd containers at the platform's own addresses, behind its security groups."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import fcntl
import hashlib
import io
import ipaddress
import json
import pathlib
import shutil
import socket
import tarfile
import threading
import time
from collections.abc import Callable
from typing import Any

from lab import gpu, volume
from lab.console import LabError, say
from lab.engine import Engine, tar_entry
from lab.run import run, text
from lab.settings import (
    AI_SERVERS,
    BASTION,
    CHECKOUT,
    EKS_NODES,
    IMDS,
    INSTANCES,
    LABEL,
    MACHINE,
    MIRROR,
    NAMES,
    NETWORK,
    OPERATORS,
    SERVICE_PORTS,
    STATE,
    SUBNET,
    SUITE,
    USER,
    VLLM_PORT,
    Host,
)

KEY = STATE / "ssh" / "id_ed25519"
KNOWN_HOSTS = STATE / "known_hosts"
SSH_CONFIG = STATE / "ssh" / "config"
OPERATORS_KEYS = STATE / "ssh" / "operators"
_KNOWN_HOSTS_LOCK = threading.Lock()
SCENARIO = "scenario-"  # begins the name of every host that is there for tests alone

# A container may do within its namespaces what a machine may. What it would share with this machine stays out of
# reach: the clock, kernel modules, the power switch, and everything under /proc/sys outside its own network.
CAPABILITIES = [
    "--cap-add=ALL",
    *(f"--cap-drop={name}" for name in ("SYS_RESOURCE", "SYS_TIME", "SYS_MODULE", "SYS_BOOT")),
]

BOOT = f"""#!/bin/sh
# First and every boot of a lab host: what EC2 does from outside an instance.
set -eu
if ! cmp -s /usr/local/share/ca-certificates/nemo-lab.crt /etc/nemo-lab/trusted.crt; then
  update-ca-certificates
  cp /usr/local/share/ca-certificates/nemo-lab.crt /etc/nemo-lab/trusted.crt
fi >/dev/null 2>&1
ssh-keygen -A >/dev/null
ip route replace {IMDS}/32 dev eth0
nft -f /etc/nemo-lab/security-groups.nft
# An engine inside a container finds its control groups read-only otherwise ("bind": only this mount, not the file system).
for folder in /sys/fs/cgroup /sys/fs/cgroup/*; do
  if [ ! -L "$folder" ] && mountpoint -q "$folder"; then mount -o remount,bind,rw "$folder"; fi
done
"""

BOOT_UNIT = """[Unit]
Description=What EC2 does from outside an instance
After=local-fs.target systemd-tmpfiles-setup.service
Before=network.target ssh.service docker.service containerd.service

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/usr/local/sbin/nemo-lab-boot

[Install]
WantedBy=multi-user.target
"""

# What listens on a host in place of a service that the lab does not have, by role.
LISTENERS = {
    "eks-node": (
        "nemo-lab-cluster",
        "What the cluster's workloads listen on",
        (
            "kafka={0}:9094",
            "node-port={0}:30080",
            "node-port={0}:443=/etc/nemo-lab/node",
            "redis={0}:6379",
            "redis={0}:26379",
        ),
    ),
}
LISTENERS_UNIT = """[Unit]
Description={description}
After=nemo-lab-boot.service

[Service]
ExecStart=/usr/bin/python3 -I /usr/local/lib/nemo-lab/listeners.py {arguments}
Restart=on-failure
RestartSec=1

[Install]
WantedBy=multi-user.target
"""


def security_group(host: Host) -> str:
    """The inbound rules of a host, in nft's language, ahead of the rules by which Docker publishes ports."""
    bastion = BASTION.address
    if host.role == "eks-node":
        # The machine's own address is in the network's range, and stands for the outside.
        allowed = f"ip saddr {bastion} tcp dport 22 accept\n    ip saddr {SUBNET} ip saddr != {MACHINE} tcp dport != 22 accept"
    elif host == BASTION:
        allowed = f"ip saddr {MACHINE} tcp dport 22 accept"  # the operators' named addresses
    else:
        allowed = f"""ip saddr {bastion} tcp dport 22 accept
    ip saddr {{ {EKS_NODES}, {bastion} }} tcp dport {SERVICE_PORTS} accept
    ip saddr {{ {", ".join(AI_SERVERS)} }} tcp dport {VLLM_PORT} accept"""
    return f"""table inet nemo_lab_security_group
delete table inet nemo_lab_security_group
table inet nemo_lab_security_group {{
  chain inbound {{
    type filter hook prerouting priority -150; policy accept;
    iifname != "eth0" accept
    ct state established,related accept
    meta l4proto icmp accept
    meta l4proto icmpv6 accept
    {allowed}
    meta l4proto tcp reject with tcp reset
    drop
  }}
}}
"""


def payload(host: Host, ca: bytes, mirror_key: str) -> bytes:
    """Everything in which one host differs from the base image, as a tar archive."""
    source = f"Types: deb\nURIs: http://{MIRROR}/debian\nSuites: {SUITE}\nComponents: main\nSigned-By:\n"
    source += "".join(f" {line or '.'}\n" for line in mirror_key.strip().splitlines())
    key = KEY.with_suffix(".pub").read_bytes()
    extra, units = _listeners(host)
    if host in volume.hosts() or host.name.startswith(SCENARIO):
        extra = [*extra, *volume.files()]
    if host.role == "vllm":
        extra, units = [*extra, *gpu.payload_files()], [*units, gpu.UNIT]
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for path, data, mode in (
            *extra,
            # The authority's certificate is among the system's; what brings authorities of its own is told so.
            ("/etc/environment", b"AWS_CA_BUNDLE=/etc/ssl/certs/ca-certificates.crt\n", 0o644),
            ("/usr/local/share/ca-certificates/nemo-lab.crt", ca, 0o644),
            ("/etc/apt/sources.list.d/nemo-lab.sources", source.encode(), 0o644),
            ("/etc/nemo-lab/security-groups.nft", security_group(host).encode(), 0o644),
            ("/usr/local/sbin/nemo-lab-boot", BOOT.encode(), 0o755),
            ("/etc/systemd/system/nemo-lab-boot.service", BOOT_UNIT.encode(), 0o644),
        ):
            info, content = tar_entry(path, data, mode)
            tar.addfile(info, io.BytesIO(content))
        for unit in ("nemo-lab-boot", *units):
            link = tarfile.TarInfo(f"etc/systemd/system/multi-user.target.wants/{unit}.service")
            link.type, link.linkname = tarfile.SYMTYPE, f"/etc/systemd/system/{unit}.service"
            tar.addfile(link)
        for path, data, mode in (
            (f"/home/{USER}/.ssh", b"", 0o700),
            (f"/home/{USER}/.ssh/authorized_keys", key, 0o600),
        ):
            info, content = tar_entry(path, data, mode)
            info.uid = info.gid = 1000
            if not data:
                info.type = tarfile.DIRTYPE
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def _listeners(host: Host) -> tuple[list[tuple[str, bytes, int]], list[str]]:
    """Files and units of what listens on a host in place of services."""
    if host.role not in LISTENERS:
        return [], []
    unit, description, arguments = LISTENERS[host.role]
    text = LISTENERS_UNIT.format(description=description, arguments=" ".join(arguments).format(host.address))
    files = [
        ("/usr/local/lib/nemo-lab/listeners.py", (CHECKOUT / "lab" / "listeners.py").read_bytes(), 0o644),
        (f"/etc/systemd/system/{unit}.service", text.encode(), 0o644),
    ]
    if host.role == "eks-node":
        from lab import pki  # needs the controller's packages, which `image` and `down` must not

        certificate, key = pki.server(STATE / "pki", host.name, (host.address,))
        files += [
            ("/etc/nemo-lab/node.crt", certificate.read_bytes(), 0o644),
            ("/etc/nemo-lab/node.key", key.read_bytes(), 0o600),
        ]
    return files, [unit]


def network(engine: Engine) -> None:
    """The lab's network, isolated: nothing in it reaches anything but the lab and this machine."""
    if engine.inspect("network", NETWORK):
        return
    taken = _route_conflict()
    if taken:
        raise LabError(
            f"the lab needs the platform's network {SUBNET}, but this machine routes part of it elsewhere ({taken}). "
            "Disconnect that VPN or network while the lab is up."
        )
    engine(
        "network", "create", "--internal", "--subnet", SUBNET, "--gateway", MACHINE, "--label", f"{LABEL}={STATE.parent}",
        "--opt", f"com.docker.network.bridge.name={NETWORK}", NETWORK,
    )  # fmt: skip


def _route_conflict() -> str:
    if not shutil.which("ip"):
        return ""
    subnet = ipaddress.ip_network(SUBNET)
    for route in json.loads(text(["ip", "-json", "-4", "route"], check=False) or "[]"):
        if route["dst"] != "default" and ipaddress.ip_network(route["dst"], strict=False).overlaps(subnet):
            return f"{route['dst']} by {route.get('dev', 'another interface')}"
    return ""


def keys() -> None:
    """The key pairs that open the lab's hosts, and the configurations with which plain ssh reaches them."""
    _key_pair(KEY, "nemo-lab")
    SSH_CONFIG.write_text(ssh_config())
    for name in OPERATORS:
        _key_pair(OPERATORS_KEYS / name, f"{name}@nemo-lab")
        operator_config(name).write_text(ssh_config(name))


def _key_pair(key: pathlib.Path, comment: str) -> None:
    """An Ed25519 key pair, made once."""
    key.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not key.exists():  # the private part is there last, so that it stands for both
        draft = key.with_name("draft")
        for left in (draft, draft.with_suffix(".pub")):
            left.unlink(missing_ok=True)
        run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", comment, "-f", str(draft)])
        draft.with_suffix(".pub").replace(key.with_suffix(".pub"))
        draft.replace(key)


def operator_config(name: str) -> pathlib.Path:
    """The configuration with which ssh goes to the hosts as one of the operators."""
    return OPERATORS_KEYS / f"{name}.config"


def ssh_config(operator: str = "") -> str:
    """The way to every host: directly to the Bastion, through it to the others.

    An operator has an account on the Bastion alone, and goes on to the others as the platform's own user.
    """
    lines = [f"Host {host.name}\n  HostName {host.address}\n" for host in INSTANCES]
    lines += [f"Host {BASTION.name} {BASTION.address}\n  ProxyJump none\n"]
    if operator:
        lines += [f'  User {operator}\n  IdentityFile "{OPERATORS_KEYS / operator}"\n']
        others = " ".join(f"{host.name} {host.address}" for host in INSTANCES if host != BASTION)
        lines += [f'Host {others}\n  IdentityFile "{KEY}"\n']
    identity = "" if operator else f'  IdentityFile "{KEY}"\n'
    lines += [
        f"Host *\n  User {USER}\n  ProxyJump {BASTION.name}\n{identity}  IdentitiesOnly yes\n"
        f'  UserKnownHostsFile "{KNOWN_HOSTS}"\n  StrictHostKeyChecking accept-new\n  HashKnownHosts no\n  LogLevel ERROR\n  ConnectTimeout 10\n'
    ]
    return "".join(lines)


def create(
    engine: Engine, image: str, name: str, hostname: str, address: str, identity: str, build: Callable[[], list[bytes]]
) -> bool:
    """A running container with these archives unpacked in it; one that was made from the same stays as it is."""
    names = [f"--add-host={known}:{where}" for known, where in NAMES.items()]
    fingerprint = hashlib.sha256(f"{image} {identity} {names}".encode()).hexdigest()[:16]
    found = engine.inspect("container", name)
    # One that never started may lack its archives: the run that made it was interrupted.
    whole = found and found["State"]["Status"] != "created"
    if found and whole and found["Config"]["Labels"].get("nemo.lab.contents") == fingerprint:
        if found["State"]["Running"]:
            return False
        engine("start", name)
        return True
    if found:
        engine("rm", "--force", "--volumes", name)
    _forget(address)
    engine(
        "create", "--name", name, "--hostname", hostname, "--network", NETWORK, "--ip", address, *names, *CAPABILITIES,
        "--security-opt=seccomp=unconfined", "--security-opt=apparmor=unconfined", "--cgroupns=private",
        "--tmpfs=/run", "--tmpfs=/run/lock", "--tmpfs=/tmp:exec,mode=1777", "--volume=/var/lib/docker",
        # Loop devices, which stand for volumes.
        "--device-cgroup-rule=b 7:* rmw", "--device-cgroup-rule=c 10:237 rmw",
        "--stop-signal=SIGRTMIN+3", "--memory=4g",
        "--label", f"{LABEL}={STATE.parent}", "--label", f"nemo.lab.contents={fingerprint}", image, "/sbin/init",
    )  # fmt: skip
    for archive in build():
        engine.copy_in(name, archive)
    engine("start", name)
    return True


def _create_host(engine: Engine, image: str, host: Host, hostname: str, ca: bytes, mirror_key: str) -> bool:
    archive = payload(host, ca, mirror_key)
    made = create(
        engine, image, host.container, hostname, host.address, hashlib.sha256(archive).hexdigest(), lambda: [archive]
    )
    wait_for_boot(engine, host.container)
    if made:
        say(f"{host.name} is up at {host.address}")
    return made


def wait_for_boot(engine: Engine, name: str, seconds: float = 90) -> None:
    """Return when systemd has started everything, and say what failed if it did not."""
    deadline = time.monotonic() + seconds
    state = ""
    while time.monotonic() < deadline:
        state = engine.exec(name, ["systemctl", "is-system-running"], check=False)
        if state in ("running", "degraded"):
            break
        time.sleep(0.3)
    failed = engine.exec(name, ["systemctl", "--failed", "--plain", "--no-legend"], check=False)
    lab_units = [line for line in failed.splitlines() if "nemo-lab" in line]
    if state not in ("running", "degraded") or lab_units:
        log = engine.exec(name, ["journalctl", "--no-pager", "--lines=20", "--unit=nemo-lab*"], check=False)
        raise LabError(f"{name} did not come up (systemd says {state!r}; failed: {failed or 'none'}):\n{log}")


def wait_for_port(address: str, port: int, seconds: float = 60) -> None:
    """Return when a port of the lab answers."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            with socket.create_connection((address, port), timeout=2):
                return
        except OSError as error:
            if time.monotonic() > deadline:
                raise LabError(f"{address}:{port} does not answer: {error}") from error
            time.sleep(0.2)


def up(engine: Engine, image: str, ca: bytes, mirror_key: str) -> bool:
    """All instances of the platform, running and reachable by SSH through the Bastion."""

    def bring(host: Host) -> bool:
        return _create_host(engine, image, host, f"ip-{host.address.replace('.', '-')}", ca, mirror_key)

    with concurrent.futures.ThreadPoolExecutor() as pool:
        made = list(pool.map(bring, INSTANCES))
    wait_for_port(BASTION.address, 22)
    return any(made)


def scenario(engine: Engine, names: list[str]) -> list[Host]:
    """The hosts with these names for tests: each at an address that no other one has."""
    wanted = {host.container: host for host in (Host(f"{SCENARIO}{name}", "", "ai") for name in names)}
    found = [
        engine.inspect("container", name) for name in containers(engine) if name.startswith(f"nemo-lab-{SCENARIO}")
    ]
    taken = {
        entry["NetworkSettings"]["Networks"][NETWORK]["IPAMConfig"]["IPv4Address"]
        for entry in found
        if entry and entry["Name"].lstrip("/") not in wanted
    }
    free = (address for address in map("10.0.2.{}".format, range(101, 200)) if address not in taken)
    return [dataclasses.replace(host, address=next(free)) for host in wanted.values()]


def scenario_hosts(engine: Engine, image: str, ca: bytes, mirror_key: str, hosts: list[Host]) -> None:
    """Bare hosts for tests, each with nothing on it but its first boot; one that exists is made anew."""

    def bring(host: Host) -> None:
        hostname = host.name.removeprefix(SCENARIO).replace("_", "-")
        _create_host(engine, image, host, hostname, ca, mirror_key)

    for host in hosts:
        if engine.inspect("container", host.container):  # its address may be another one's now
            engine("rm", "--force", "--volumes", host.container)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        list(pool.map(bring, hosts))


def _forget(address: str) -> None:
    """A host made anew has a new key: the only time that the lab may drop the old one by itself."""
    with _KNOWN_HOSTS_LOCK:
        if KNOWN_HOSTS.exists():
            run(["ssh-keygen", "-R", address, "-f", str(KNOWN_HOSTS)])


def is_up() -> bool:
    """Whether the lab's addresses lead to the lab, and not out of this machine."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.bind((MACHINE, 0))
        # A bridge without one container has no carrier. Just after an engine was killed it still has one: the containers'
        # network namespaces stay mounted. Nothing leaves this machine then; `make lab` brings the lab back.
        return pathlib.Path(f"/sys/class/net/{NETWORK}/carrier").read_text().strip() == "1"
    except OSError:
        return False


def containers(engine: Engine) -> dict[str, str]:
    """Containers of any lab on this engine, by name, with the checkout that owns each."""
    return {name: owner for name, (owner, _) in _labelled(engine, "container").items()}


def others(engine: Engine) -> dict[str, bool]:
    """Other checkouts with hosts on this engine, and whether their lab is up or about to be; one that is gone has none."""
    found: dict[str, bool] = {}
    for owner, entry in _labelled(engine, "container").values():
        if owner != str(STATE.parent) and not _gone(owner):
            found[owner] = found.get(owner, False) or entry["State"]["Running"] or _at_work(owner)
    return found


def _gone(checkout: str) -> bool:
    try:
        pathlib.Path(checkout).stat()
    except (FileNotFoundError, NotADirectoryError):
        return True
    except PermissionError:  # below another user's home
        pass
    return False


def _at_work(checkout: str) -> bool:
    """Whether a lab command of that checkout runs just now."""
    try:
        with (pathlib.Path(checkout) / STATE.name / "lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def remove_left(engine: Engine) -> None:
    """Remove what other checkouts' labs left here: their containers hold the names and addresses of this one's."""
    left = {name: owner for name, owner in containers(engine).items() if owner != str(STATE.parent)}
    for owner in sorted(set(left.values())):
        say(f"removing what is left of the lab of {owner}")
    for name, owner in left.items():
        # Not by force where the owner may have started it meanwhile: the engine refuses then.
        engine("rm", *(["--force"] if _gone(owner) else []), "--volumes", name)


def _labelled(engine: Engine, kind: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """Objects of any lab on this engine: the checkout that owns each, and its description."""
    listing = ["images", "--format", "{{.ID}}"] if kind == "image" else ["ps", "--all", "--format", "{{.Names}}"]
    names = engine(*listing, "--filter", f"label={LABEL}").splitlines()
    found = {name: engine.inspect(kind, name) for name in names}
    return {name: (entry["Config"]["Labels"][LABEL], entry) for name, entry in found.items() if entry}


def scenario_hosts_down(engine: Engine, names: list[str]) -> None:
    """Remove hosts of scenario_hosts: those that are named, or all."""
    for name in containers(engine):
        if name.removeprefix(f"nemo-lab-{SCENARIO}") in names or (
            name.startswith(f"nemo-lab-{SCENARIO}") and not names
        ):
            engine("rm", "--force", "--volumes", name)


def down(engine: Engine) -> None:
    """Remove this lab's containers, volumes, network and images; all bear its label."""
    kept = others(engine)
    for name, owner in containers(engine).items():
        if owner not in kept:
            engine("rm", "--force", "--volumes", name, check=False)
    if not kept and engine.inspect("network", NETWORK):
        engine("network", "rm", NETWORK)
    for image, (owner, _) in _labelled(engine, "image").items():
        if owner not in kept:
            engine("rmi", "--force", image, check=False)
    for left in (KNOWN_HOSTS, KNOWN_HOSTS.with_name("known_hosts.old")):
        left.unlink(missing_ok=True)
