"""What the account holds: the platform's network, instances, volumes, repositories and cluster, and some decoys."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import ClientError

from lab.settings import ACCOUNT, AWS_API, CLUSTER, CLUSTER_VERSION, REGION, SUBNET, Host

ENDPOINT = f"http://{AWS_API}:5000"
PROJECT = "nemo"
KEY_PAIR = "keypair-kube-master"
AMAZON_LINUX_2, AMAZON_LINUX_2023 = "ami-0662f4965dfc70aca", "ami-0c0ffee2025091500"  # both in amis.json
REPOSITORIES = ("ai", "backend", "frontend", "vllm-openai")

SUBNETS = {
    "10.0.1.0/24": ("nemo-public-2a", f"{REGION}a", "elb"),
    "10.0.2.0/24": ("nemo-public-2b", f"{REGION}b", "elb"),
    "10.0.3.0/24": ("nemo-private-2a", f"{REGION}a", "internal-elb"),
    "10.0.4.0/24": ("nemo-private-2b", f"{REGION}b", "internal-elb"),
    "10.0.5.0/24": ("nemo-private-2c", f"{REGION}c", "internal-elb"),
}
NODES = [{"CidrIp": cidr} for cidr in ("10.0.3.0/24", "10.0.4.0/24", "10.0.5.0/24")]
WITHIN = [{"CidrIp": SUBNET}]
# Inbound rules by group: (first port, last port, sources); a source that names a group stands for its members.
GROUPS: Mapping[str, tuple[str, Sequence[tuple[int, int, Any]]]] = {
    "nemo-bastion": ("Bastion", [(22, 22, [{"CidrIp": "203.0.113.10/32", "Description": "a named operator"}])]),
    "nemo-eks-nodes": (
        "EKS nodes",
        [(-1, -1, WITHIN), (30000, 32767, WITHIN), (9094, 9094, WITHIN), (443, 443, WITHIN)],
    ),
    "nemo-ai": (
        "AI servers",
        [(8000, 8002, NODES), (9836, 9836, NODES), (8002, 8002, "nemo-ai"), (22, 22, "nemo-bastion")],
    ),
    "nemo-rds": ("RDS", [(3306, 3306, "nemo-eks-nodes")]),
}


GROUP_OF = {"bastion": "nemo-bastion", "eks-node": "nemo-eks-nodes"}  # by role; all others are AI servers


@dataclasses.dataclass(frozen=True)
class _Instance:
    """One instance as run_instances wants it."""

    name: str
    address: str
    tags: Mapping[str, str]
    instance_type: str
    subnet: str
    group: str
    role: str = ""
    image: str = AMAZON_LINUX_2023
    running: bool = True
    public: bool = False
    data_volume: int = 0  # GiB


# What filters must leave out: one that is stopped, one that is somebody else's.
DECOYS = (
    _Instance(
        "ai-old", "10.0.2.39", {"Name": "ai-old", "Project": PROJECT, "Role": "ai", "Services": "ai-prod"},
        "t3.medium", "10.0.2.0/24", "nemo-ai", running=False,
    ),
    _Instance(
        "other-web", "10.0.2.90", {"Name": "other-web", "Project": "other", "Role": "ai", "Services": "ai-prod"},
        "t3.micro", "10.0.2.0/24", "nemo-ai",
    ),
)  # fmt: skip


def session() -> boto3.Session:
    """Access to the lab's account: never with the credentials, profile or configuration of whoever runs this."""
    return boto3.Session(aws_access_key_id="lab", aws_secret_access_key="lab", region_name=REGION)


@functools.cache
def client(service: str) -> Any:
    """A client of one service of the lab's account."""
    config = Config(
        connect_timeout=5, read_timeout=30, retries={"mode": "standard", "total_max_attempts": 2}, proxies={}
    )
    return session().client(service, endpoint_url=ENDPOINT, config=config)


def seed(hosts: Sequence[Host]) -> bool:
    """Create what is missing; whether there was anything. Answers at once where the account is complete."""
    ec2: Any = client("ec2")
    changed = _instances(ec2, [*(_instance(host) for host in hosts), *DECOYS])
    changed |= _repositories()
    changed |= _cluster(ec2)
    return changed


def outsiders(addresses: Sequence[str]) -> None:
    """Instances of no project, for hosts that are there for tests: with the AI hosts' role, in no inventory."""
    wanted = [
        _Instance(
            f"test-{address}", address, {"Name": f"test-{address}", "Project": "test"}, "t3.medium", "10.0.2.0/24",
            group="nemo-ai", role="nemo-ai",
        )
        for address in addresses
    ]  # fmt: skip
    _instances(client("ec2"), wanted)


def _instances(ec2: Any, wanted: Sequence[_Instance]) -> bool:
    """Launch those that are not there; whether there was one."""
    present = {
        (instance.get("PrivateIpAddress"), tag["Value"])
        for page in ec2.get_paginator("describe_instances").paginate()
        for reservation in page["Reservations"]
        for instance in reservation["Instances"]
        if instance["State"]["Name"] in ("running", "stopped")
        for tag in instance.get("Tags", [])
        if tag["Key"] == "lab:complete"  # set last: without it, an earlier run was cut off
    }
    missing = [instance for instance in wanted if (instance.address, _fingerprint(instance)) not in present]
    if missing:
        subnets = _network(ec2)
        groups = _groups(ec2)
        _roles({instance.role for instance in missing} - {""})
        for instance in missing:
            _remove(ec2, instance.address)
            _launch(ec2, instance, subnets[instance.subnet], groups[instance.group])
    return bool(missing)


def _instance(host: Host) -> _Instance:
    tags = {"Name": host.tag or host.name, "Project": PROJECT, "Role": host.role}
    if host.services:
        tags["Services"] = host.services
    bastion = host.role == "bastion"
    return _Instance(
        host.name, host.address, tags, host.instance_type, host.subnet,
        group=GROUP_OF.get(host.role, "nemo-ai"), role=f"nemo-{host.role}",
        image=AMAZON_LINUX_2 if bastion else AMAZON_LINUX_2023, public=bastion,
        data_volume=200 if host.role == "vllm" else 0,
    )  # fmt: skip


def _fingerprint(instance: _Instance) -> str:
    parts = [instance.instance_type, instance.image, instance.role, instance.group]
    text = " ".join([*parts, *(f"{key}={value}" for key, value in sorted(instance.tags.items()))])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _tags(name: str, **more: str) -> list[Any]:
    return [{"Key": key, "Value": value} for key, value in {"Name": name, "Project": PROJECT, **more}.items()]


def _vpc(ec2: Any) -> str:
    """The platform's VPC, made where it is missing."""
    found = ec2.describe_vpcs(Filters=[{"Name": "tag:Name", "Values": ["nemo"]}])["Vpcs"]
    if found:
        return str(found[0]["VpcId"])
    made = ec2.create_vpc(CidrBlock=SUBNET, TagSpecifications=[{"ResourceType": "vpc", "Tags": _tags("nemo")}])
    vpc: str = made["Vpc"]["VpcId"]
    ec2.modify_vpc_attribute(VpcId=vpc, EnableDnsHostnames={"Value": True})
    return vpc


def _network(ec2: Any) -> dict[str, str]:
    """The identifiers of the subnets, by address range."""
    vpc = _vpc(ec2)
    of_vpc: list[Any] = [{"Name": "vpc-id", "Values": [vpc]}]
    found = {subnet["CidrBlock"]: subnet["SubnetId"] for subnet in ec2.describe_subnets(Filters=of_vpc)["Subnets"]}
    for cidr, (name, zone, balancer) in SUBNETS.items():
        if cidr not in found:
            tags = [*_tags(name), {"Key": f"kubernetes.io/role/{balancer}", "Value": "1"}]
            tags.append({"Key": f"kubernetes.io/cluster/{CLUSTER}", "Value": "owned"})
            made = ec2.create_subnet(
                VpcId=vpc, CidrBlock=cidr, AvailabilityZone=zone,
                TagSpecifications=[{"ResourceType": "subnet", "Tags": tags}],
            )  # fmt: skip
            found[cidr] = made["Subnet"]["SubnetId"]
    return found


def _groups(ec2: Any) -> dict[str, str]:
    """The identifiers of the security groups, by name."""
    vpc = _vpc(ec2)
    of_vpc: list[Any] = [{"Name": "vpc-id", "Values": [vpc]}]
    found = {group["GroupName"]: group for group in ec2.describe_security_groups(Filters=of_vpc)["SecurityGroups"]}
    ids = {name: group["GroupId"] for name, group in found.items()}
    for name, (description, rules) in GROUPS.items():
        if name not in ids:
            ids[name] = ec2.create_security_group(
                GroupName=name, Description=description, VpcId=vpc,
                TagSpecifications=[{"ResourceType": "security-group", "Tags": _tags(name)}],
            )["GroupId"]  # fmt: skip
        if name not in found or not found[name].get("IpPermissions"):
            permissions: list[Any] = []
            for first, last, sources in rules:
                who = (
                    {"UserIdGroupPairs": [{"GroupId": ids[sources]}]}
                    if isinstance(sources, str)
                    else {"IpRanges": sources}
                )
                ports = {"IpProtocol": "-1"} if first < 0 else {"IpProtocol": "tcp", "FromPort": first, "ToPort": last}
                permissions.append({**ports, **who})
            ec2.authorize_security_group_ingress(GroupId=ids[name], IpPermissions=permissions)
    return ids


def _roles(names: set[str]) -> None:
    """A role and an instance profile of one name for each kind of host: whom the metadata service speaks for."""
    iam = client("iam")
    trust = '{"Version":"2012-10-17","Statement":[{"Effect":"Allow","Principal":{"Service":"ec2.amazonaws.com"},'
    trust += '"Action":"sts:AssumeRole"}]}'
    for name in sorted(names):
        _ignoring("EntityAlreadyExists", iam.create_role, RoleName=name, AssumeRolePolicyDocument=trust)
        _ignoring("EntityAlreadyExists", iam.create_instance_profile, InstanceProfileName=name)
        if not iam.get_instance_profile(InstanceProfileName=name)["InstanceProfile"]["Roles"]:
            iam.add_role_to_instance_profile(InstanceProfileName=name, RoleName=name)


def _remove(ec2: Any, address: str) -> None:
    """An instance at this address from a run that was cut off, or with other properties."""
    found = ec2.describe_instances(
        Filters=[
            {"Name": "private-ip-address", "Values": [address]},
            {"Name": "instance-state-name", "Values": ["running", "stopped"]},
        ]
    )
    ids = [instance["InstanceId"] for reservation in found["Reservations"] for instance in reservation["Instances"]]
    if ids:
        volumes = ec2.describe_volumes(Filters=[{"Name": "attachment.instance-id", "Values": ids}])["Volumes"]
        ec2.terminate_instances(InstanceIds=ids)
        for volume in volumes:
            if any(tag["Key"] == "Name" for tag in volume.get("Tags", [])):
                _ignoring("InvalidVolume.NotFound", ec2.delete_volume, VolumeId=volume["VolumeId"])


def _launch(ec2: Any, instance: _Instance, subnet: str, group: str) -> None:
    tags: list[Any] = [{"Key": key, "Value": value} for key, value in instance.tags.items()]
    profile: Any = {"IamInstanceProfile": {"Name": instance.role}} if instance.role else {}
    made = ec2.run_instances(
        ImageId=instance.image, InstanceType=instance.instance_type, MinCount=1, MaxCount=1, KeyName=KEY_PAIR,
        SubnetId=subnet, SecurityGroupIds=[group], PrivateIpAddress=instance.address, **profile,
        MetadataOptions={"HttpTokens": "required", "HttpPutResponseHopLimit": 2},
        TagSpecifications=[{"ResourceType": "instance", "Tags": tags}],
    )["Instances"][0]  # fmt: skip
    identifier = made["InstanceId"]
    if instance.data_volume:
        volume = ec2.create_volume(
            Size=instance.data_volume, VolumeType="gp3", AvailabilityZone=SUBNETS[instance.subnet][1],
            TagSpecifications=[{"ResourceType": "volume", "Tags": _tags(f"{instance.name}-data", Role="models")}],
        )["VolumeId"]  # fmt: skip
        ec2.attach_volume(InstanceId=identifier, VolumeId=volume, Device="/dev/sdf")
    if instance.public:
        _public_address(ec2, identifier, instance.address)
    if not instance.running:
        ec2.stop_instances(InstanceIds=[identifier])
    ec2.create_tags(Resources=[identifier], Tags=[{"Key": "lab:complete", "Value": _fingerprint(instance)}])


def _public_address(ec2: Any, identifier: str, address: str) -> None:
    """An Elastic IP that is the private address too: from this machine, the lab's Bastion is reached by that."""
    known = ec2.describe_addresses(Filters=[{"Name": "public-ip", "Values": [address]}])["Addresses"]
    allocation = (
        known[0]["AllocationId"] if known else ec2.allocate_address(Domain="vpc", Address=address)["AllocationId"]
    )
    ec2.associate_address(InstanceId=identifier, AllocationId=allocation, AllowReassociation=True)


def _repositories() -> bool:
    """The repositories for container images; whether one was missing."""
    ecr = client("ecr")
    found = {entry["repositoryName"] for entry in ecr.describe_repositories()["repositories"]}
    missing = [name for name in REPOSITORIES if name not in found]
    for name in missing:
        ecr.create_repository(repositoryName=name, tags=[{"Key": "Project", "Value": PROJECT}])
    return bool(missing)


def _cluster(ec2: Any) -> bool:
    """The description of the Kubernetes cluster; whether it was missing."""
    eks = client("eks")
    if CLUSTER in eks.list_clusters()["clusters"]:
        return False
    subnets = _network(ec2)
    eks.create_cluster(
        name=CLUSTER, version=CLUSTER_VERSION, roleArn=f"arn:aws:iam::{ACCOUNT}:role/nemo-eks-cluster", tags={"Project": PROJECT},
        resourcesVpcConfig={
            "subnetIds": [subnets[cidr] for cidr, (_, _, balancer) in SUBNETS.items() if balancer == "internal-elb"],
            "securityGroupIds": [_groups(ec2)["nemo-eks-nodes"]],
            "endpointPrivateAccess": True,
            "endpointPublicAccess": False,
        },
    )  # fmt: skip
    return True


def _ignoring(code: str, call: Any, **arguments: Any) -> None:
    """A call whose one expected error is that it was made before."""
    try:
        call(**arguments)
    except ClientError as error:
        if error.response["Error"]["Code"] != code:
            raise
