#!/usr/bin/python
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Module: how EKS describes clusters, as far as their clients need it."""

from __future__ import annotations

DOCUMENTATION = r"""
module: eks_cluster_info
short_description: Endpoint, certificate authority and version of EKS clusters
version_added: "0.1.0"
author: The nemo platform project (@nemo-platform)
description:
  - Asks EKS for the description of one or more clusters and returns what a client of theirs needs.
  - A cluster that cannot be used is an error that says why. It is not there, it is still being made, it is being deleted,
    or it has failed.
  - Runs where boto3 is, that is on the controller with C(delegate_to=localhost).
options:
  clusters:
    description: Names of the clusters, in the order wanted.
    type: list
    elements: str
    required: true
  region:
    description: Region of the clusters.
    type: str
    required: true
  endpoint_url:
    description: Address of the EKS API, where it is not AWS's own. Empty is as good as absent.
    type: str
    default: ""
  profile:
    description: Named AWS profile. Default is what boto3 finds in the environment of the controller, on an instance its role.
    type: str
  access_key:
    description: AWS access key id.
    type: str
  secret_key:
    description: AWS secret access key.
    type: str
  session_token:
    description: AWS session token.
    type: str
requirements:
  - boto3 on the host that runs it
notes:
  - Needs the permission C(eks:DescribeCluster). C(eks:DescribeClusterVersions) adds the ends of support, and
    C(eks:ListClusters) the names that there are to the error about one that is not; neither is missed.
attributes:
  check_mode:
    description: Nothing is changed in any mode.
    support: full
  diff_mode:
    description: There is nothing to show.
    support: none
"""

EXAMPLES = r"""
- name: Ask EKS for the cluster
  nemo.platform.eks_cluster_info:
    clusters: [nemo_EKS_kluster]
    region: ap-northeast-2
  delegate_to: localhost
  register: described

- name: Show where its API is
  ansible.builtin.debug:
    msg: "{{ described.clusters[0].endpoint }} runs Kubernetes {{ described.clusters[0].version }}"
"""

RETURN = r"""
clusters:
  description: One entry for each name in O(clusters), in that order.
  returned: success
  type: list
  elements: dict
  contains:
    name:
      description: Its name.
      type: str
      sample: nemo_EKS_kluster
    arn:
      description: Its ARN.
      type: str
      sample: arn:aws:eks:ap-northeast-2:084375578827:cluster/nemo_EKS_kluster
    version:
      description: Kubernetes version, major and minor.
      type: str
      sample: "1.33"
    platform_version:
      description: Version of EKS's own parts.
      type: str
      sample: eks.12
    status:
      description: V(ACTIVE) or V(UPDATING).
      type: str
      sample: ACTIVE
    endpoint:
      description: URL of the Kubernetes API.
      type: str
      sample: https://0123456789ABCDEF0123456789ABCDEF.gr7.ap-northeast-2.eks.amazonaws.com
    certificate_authority:
      description: The cluster's certificate authority, PEM in base64, as a kubeconfig holds it.
      type: str
    public_access:
      description: Whether the endpoint answers from the internet.
      type: bool
    private_access:
      description: Whether the endpoint's name leads to addresses inside the VPC, for who asks there.
      type: bool
    public_access_cidrs:
      description: Who may reach the public endpoint.
      type: list
      elements: str
      sample: [0.0.0.0/0]
    vpc_id:
      description: The VPC that the cluster is in.
      type: str
      sample: vpc-0f00d
    standard_support_ends:
      description: Day on which the standard support of this version ends; empty where EKS does not tell.
      type: str
      sample: "2026-07-29"
    extended_support_ends:
      description: Day on which its extended support ends, which costs extra; empty where EKS does not tell.
      type: str
      sample: "2027-07-29"
"""

import datetime
import difflib
import traceback
from typing import Any

from ansible.module_utils.basic import AnsibleModule, missing_required_lib

from ansible_collections.nemo.platform.plugins.module_utils import aws_advice

try:
    import boto3
    from botocore.config import Config

    IMPORT_ERROR = None
except ImportError:
    IMPORT_ERROR = traceback.format_exc()

USABLE = ("ACTIVE", "UPDATING")
WHAT_TO_DO = {
    "CREATING": "its endpoint is not known yet; repeat when `aws eks wait cluster-active --name {name}` has ended",
    "PENDING": "its endpoint is not known yet; repeat when `aws eks wait cluster-active --name {name}` has ended",
    "DELETING": "take it out of the inventory",
    "FAILED": "look at its health in the EKS console, or delete it and make it again",
}


class ClusterError(Exception):
    """Why a cluster cannot be described, in one line."""


def connect(params: dict[str, Any]) -> Any:
    """Make the EKS client; fails soon and tries again by itself."""
    session = boto3.session.Session(
        profile_name=params["profile"] or None,
        aws_access_key_id=params["access_key"] or None,
        aws_secret_access_key=params["secret_key"] or None,
        aws_session_token=params["session_token"] or None,
        region_name=params["region"],
    )
    config = Config(connect_timeout=5, read_timeout=20, retries={"mode": "standard", "max_attempts": 3})
    return session.client("eks", endpoint_url=params["endpoint_url"] or None, config=config)


def list_clusters(client: Any) -> list[str] | None:
    """The names that there are; None where the credentials may not ask."""
    try:
        return [name for page in client.get_paginator("list_clusters").paginate() for name in page["clusters"]]
    except Exception:  # of use for a better message only
        return None


def absent(client: Any, name: str, region: str) -> str:
    """The line about a cluster that is not there."""
    there = list_clusters(client)
    if there is None:
        known = "these credentials may not list those that there are"
    elif not there:
        known = "there is none: is this the right region and account?"
    else:
        near = difflib.get_close_matches(name, there, n=1)
        known = f"there {'is' if len(there) == 1 else 'are'} {', '.join(sorted(there))}"
        known += f"; did you mean {near[0]}?" if near else ""
    return f"{region} has no EKS cluster {name!r}; {known}"


def unusable(cluster: dict[str, Any]) -> str:
    """Why nobody can be a client of this cluster, or nothing."""
    name, status = cluster["name"], cluster.get("status", "")
    if status not in USABLE:
        issues = [
            f"{issue.get('code')}: {issue.get('message')}" for issue in cluster.get("health", {}).get("issues", [])
        ]
        why = f" ({'; '.join(issues)})" if issues else ""
        do = WHAT_TO_DO.get(status, "look at it in the EKS console").format(name=name)
        return f"EKS cluster {name!r} is {status or 'of no known status'}{why}: {do}"
    if not cluster.get("endpoint") or not cluster.get("certificateAuthority", {}).get("data"):
        return f"EKS describes cluster {name!r} without endpoint or certificate authority: repeat in a few minutes"
    return ""


def day(value: Any) -> str:
    """A date of the API as text, empty where there is none."""
    return value.date().isoformat() if isinstance(value, datetime.datetime) else str(value or "")[:10]


def ends_of_support(client: Any, versions: list[str]) -> dict[str, tuple[str, str]]:
    """Version -> the days on which its standard and its extended support end, as far as the API tells."""
    try:
        found = client.describe_cluster_versions(clusterVersions=versions)["clusterVersions"]
        return {
            entry["clusterVersion"]: (
                day(entry.get("endOfStandardSupportDate")),
                day(entry.get("endOfExtendedSupportDate")),
            )
            for entry in found
        }
    except Exception:  # an older SDK, a missing permission: nobody's access depends on these dates
        return {}


def described(cluster: dict[str, Any], ends: tuple[str, str]) -> dict[str, Any]:
    """What this module returns of one cluster. What EKS leaves out is what it does by default."""
    network = cluster.get("resourcesVpcConfig", {})
    public = bool(network.get("endpointPublicAccess", True))
    return {
        "name": cluster["name"],
        "arn": cluster.get("arn", ""),
        "version": cluster.get("version", ""),
        "platform_version": cluster.get("platformVersion", ""),
        "status": cluster["status"],
        "endpoint": cluster["endpoint"],
        "certificate_authority": cluster["certificateAuthority"]["data"],
        "public_access": public,
        "private_access": bool(network.get("endpointPrivateAccess", False)),
        "public_access_cidrs": list(network.get("publicAccessCidrs") or (["0.0.0.0/0"] if public else [])),
        "vpc_id": network.get("vpcId") or "",
        "standard_support_ends": ends[0],
        "extended_support_ends": ends[1],
    }


def run(params: dict[str, Any]) -> dict[str, Any]:
    """Ask EKS; ClusterError says in one line why it cannot be told."""
    region, endpoint_url = params["region"], params["endpoint_url"]
    clusters = []
    try:
        client = connect(params)
        for name in params["clusters"]:
            try:
                clusters.append(client.describe_cluster(name=name)["cluster"])
            except Exception as error:
                if aws_advice.error_code(error) != "ResourceNotFoundException":
                    raise
                raise ClusterError(absent(client, name, region)) from error
    except ClusterError:
        raise
    except Exception as error:  # the SDK's exceptions share no useful base; explain() knows them by name
        raise ClusterError(aws_advice.explain(error, region, endpoint_url)) from error
    problems = [problem for problem in map(unusable, clusters) if problem]
    if problems:
        raise ClusterError("; ".join(problems))
    ends = ends_of_support(client, sorted({cluster.get("version", "") for cluster in clusters} - {""}))
    return {"clusters": [described(cluster, ends.get(cluster.get("version", ""), ("", ""))) for cluster in clusters]}


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "clusters": {"type": "list", "elements": "str", "required": True},
            "region": {"type": "str", "required": True},
            "endpoint_url": {"type": "str", "default": ""},
            "profile": {"type": "str"},
            "access_key": {"type": "str"},
            "secret_key": {"type": "str", "no_log": True},
            "session_token": {"type": "str", "no_log": True},
        },
        mutually_exclusive=[("profile", "access_key")],
        required_together=[("access_key", "secret_key")],
        supports_check_mode=True,
    )
    if IMPORT_ERROR:
        module.fail_json(msg=missing_required_lib("boto3"), exception=IMPORT_ERROR)
    try:
        module.exit_json(changed=False, **run(module.params))
    except ClusterError as error:
        module.fail_json(msg=f"eks_cluster_info: {error}")


if __name__ == "__main__":
    main()
