"""What the lab consists of: names and addresses, the same as the platform's, and nothing else."""

from __future__ import annotations

import dataclasses
import pathlib

CHECKOUT = pathlib.Path(__file__).resolve().parent.parent
STATE = CHECKOUT / ".lab"
CACHE = STATE / "cache"

LABEL = "nemo.lab"  # on every object of the engine; the value is the checkout that owns it
NETWORK = "nemo-lab"  # also the name of the bridge
SUBNET = "10.0.0.0/16"
MACHINE = "10.0.0.1"  # this machine, seen from the lab: "the outside"
SUITE = "bookworm"
USER = "ec2-user"

ACCOUNT = "084375578827"
REGION = "ap-northeast-2"
REGISTRY = f"{ACCOUNT}.dkr.ecr.{REGION}.amazonaws.com"
AWS_HOST = "nemo-lab-aws"
AWS_API = "10.0.0.10"
REGISTRY_ADDRESS = "10.0.0.11"
MIRROR = "10.0.0.12"
IMDS = "169.254.169.254"
AWS_NAMES = tuple(f"{service}.{REGION}.amazonaws.com" for service in ("api.ecr", "ec2", "sts", "eks"))

CLUSTER = "nemo_EKS_kluster"
CLUSTER_VERSION = "1.33"
CLUSTER_API = "10.0.3.10"
CLUSTER_NAME = f"6F1C0D9A7B3E4528A1D4C7E90B52F386.gr7.{REGION}.eks.amazonaws.com"
DATABASE = "10.0.3.50"
DATABASE_NAME = f"nemo-db-instance.c9k2x7qw4lmz.{REGION}.rds.amazonaws.com"
# What a name server would tell hosts; nothing else has a name in the lab.
NAMES = {
    REGISTRY: REGISTRY_ADDRESS,
    **dict.fromkeys(AWS_NAMES, AWS_API),
    CLUSTER_NAME: CLUSTER_API,
    DATABASE_NAME: DATABASE,
}

EKS_NODES = "10.0.3.0-10.0.5.255"
SERVICE_PORTS = "{ 8000-8002, 9836 }"  # the last one for metrics of the card; in nft's language
VLLM_PORT = 8002


@dataclasses.dataclass(frozen=True)
class Host:
    """One EC2 instance of the platform."""

    name: str
    address: str
    role: str
    services: str = ""
    instance_type: str = "t3.medium"
    subnet: str = "10.0.2.0/24"
    tag: str = ""  # its Name in the account, where that is not the lab's name

    @property
    def container(self) -> str:
        return f"nemo-lab-{self.name}"


BASTION = Host("bastion", "10.0.1.10", "bastion", instance_type="t2.medium", subnet="10.0.1.0/24")
HOSTS = (
    BASTION,
    Host("vllm", "10.0.2.20", "vllm", instance_type="g5.xlarge"),
    Host("ai-prod", "10.0.2.31", "ai", "ai-prod"),
    Host("ai-dev", "10.0.2.32", "ai", "ai-dev"),
)

# A node of the cluster: a neighbour of the hosts that this project configures, and none of them.
NODE = Host("eks-node", "10.0.3.11", "eks-node", instance_type="t3.large", subnet="10.0.3.0/24", tag="eks-node-a")
INSTANCES = (*HOSTS, NODE)
AI_SERVERS = tuple(host.address for host in HOSTS if host.role in ("vllm", "ai"))  # one security group
OPERATORS = ("alice", "bob", "mallory")  # who has a key pair in the lab; the inventory says who of them may do what

# The base image of every lab host: what an instance has at its first boot.
IMAGE_PACKAGES = [
    "systemd", "systemd-sysv", "dbus", "openssh-server", "python3", "python3-apt", "sudo", "iproute2", "iputils-ping",
    "nftables", "ca-certificates", "curl", "gpg", "gpg-agent", "kmod", "procps", "less", "file",
]  # fmt: skip
# What the AI image is made of.
AI_PACKAGES = ["python3-minimal", "python3-fastapi", "python3-uvicorn"]
# What the roles install, served by the lab's own package mirror with everything it depends on.
MIRROR_PACKAGES = [
    "docker.io", "iptables", "tini", "amazon-ecr-credential-helper", "chrony", "unattended-upgrades", "jq", "acl",
    "dnf", "rpm", "createrepo-c", "file", "docker-registry", "bash-completion", "gnupg", "unzip", "faketime", "haproxy",
    # file systems, and what else may be on a volume
    "xfsprogs", "e2fsprogs", "fdisk", "lvm2", "cryptsetup-bin", "btrfs-progs", "libnuma1",
    # the Bastion's tools for debugging the network
    "bind9-dnsutils", "tcpdump", "traceroute", "mtr-tiny", "netcat-openbsd", "socat", "nmap", "ethtool", "iperf3", "lsof",
    "strace", "openssl", "mariadb-client", "kcat", "redis-tools", "git", "rsync", "tmux",
    "python3-requests",  # of community.docker, next to which the bench puts a release
]  # fmt: skip
