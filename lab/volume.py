"""The volumes of the lab's hosts: sparse files behind loop devices, known by the ids that the lab's AWS account gives them.

What runs on the host is in loop_volume.py. It lets go of its loop device when its container ends, so that there is nothing
to clean up when the lab goes down.
"""

from __future__ import annotations

from lab.console import LabError
from lab.engine import Engine
from lab.settings import CHECKOUT, HOSTS, Host

PROGRAM = "/usr/local/lib/nemo-lab/loop_volume.py"
IMAGES = "/var/lib/nemo-lab/volumes"
UNIT = f"""[Unit]
Description=EBS volume %i
Before=docker.service containerd.service

[Service]
Type=notify
ExecStart=/usr/bin/python3 -I {PROGRAM} %i
ExecReload=/bin/kill -HUP $MAINPID
Restart=on-failure
RestartSec=1

[Install]
WantedBy=multi-user.target
"""
# An account that was seeded anew calls the volume by another id: it is the same one. It may be mounted under the old one, so
# that only a boot brings it back under the new one.
ATTACH = f"""set -eu
mkdir -p {IMAGES}
cd {IMAGES}
for old in vol-*.img; do
  if [ -e "$old" ] && [ "$old" != "$1.img" ]; then
    systemctl disable --quiet "nemo-lab-volume@${{old%.img}}.service"
    mv "$old" "$1.img"
    systemctl enable --quiet "nemo-lab-volume@$1.service"
    echo boot
    exit
  fi
done
systemctl enable --quiet --now "nemo-lab-volume@$1.service"
"""
GROW = f"""set -eu
cd {IMAGES}
for image in vol-*.img; do
  truncate --size="+$1G" "$image"
  systemctl reload "nemo-lab-volume@${{image%.img}}.service"
  stat --format="${{image%.img}} %s" "$image"
done
"""


def hosts() -> list[Host]:
    """The hosts that have a volume beside their root disk."""
    return [host for host in HOSTS if host.role == "vllm"]


def files() -> list[tuple[str, bytes, int]]:
    """What a host needs to have volumes: path, content, mode."""
    return [
        (PROGRAM, (CHECKOUT / "lab" / "loop_volume.py").read_bytes(), 0o644),
        ("/etc/systemd/system/nemo-lab-volume@.service", UNIT.encode(), 0o644),
    ]


def attached(host: Host) -> str:
    """The id of the volume that the account says is attached to a host."""
    from lab.aws import seed  # needs the controller's packages, which `image` and `down` must not

    names = [{"Name": "tag:Name", "Values": [f"{host.name}-data"]}, {"Name": "status", "Values": ["in-use"]}]
    found = seed.client("ec2").describe_volumes(Filters=names)["Volumes"]
    if len(found) != 1:
        raise LabError(
            f"the account has {len(found)} volumes called {host.name}-data: `make lab-down lab` seeds it anew"
        )
    return str(found[0]["VolumeId"])


def attach(engine: Engine) -> list[Host]:
    """Give each host its volume, under the id that the account knows; one that has it keeps it. Who must boot for it."""
    said = {host: engine.exec(host.container, ["sh", "-c", ATTACH, "attach", attached(host)]) for host in hosts()}
    return [host for host, text in said.items() if text.strip() == "boot"]


def grow(engine: Engine, gib: int) -> str:
    """Make the volumes larger, as `aws ec2 modify-volume` does; ids and new sizes in bytes."""
    return "\n".join(engine.exec(host.container, ["sh", "-c", GROW, "grow", str(gib)]) for host in hosts())
