# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A kubeconfig for EKS clusters, and what is wrong with what it is asked to hold."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

DOCUMENTATION = r"""
name: kubeconfig
short_description: A kubeconfig for EKS clusters
version_added: "0.1.0"
author: The nemo platform project (@nemo-platform)
description:
  - Makes the content of a kubeconfig out of clusters to be reached and their descriptions by
    M(nemo.platform.eks_cluster_info). Credentials come from C(aws eks get-token) at each use, and none stands in the file.
options:
  _input:
    description: The clusters, each with C(name) and perhaps C(context), C(namespace), C(role_arn), C(endpoint).
    type: list
    elements: dict
    required: true
  described:
    description: What EKS says of each, in the same order.
    type: list
    elements: dict
    required: true
  region:
    description: Region of the clusters.
    type: str
    required: true
  aws_command:
    description: Absolute path of the AWS CLI.
    type: str
    default: /usr/local/bin/aws
  environment:
    description: Environment variables for the AWS CLI; empty ones are left out.
    type: dict
    default: {}
  default_context:
    description: The context to begin with. Empty for the first.
    type: str
    default: ""
"""

EXAMPLES = r"""
- name: A kubeconfig
  ansible.builtin.debug:
    msg: "{{ [{'name': 'nemo_EKS_kluster', 'context': 'nemo'}] | nemo.platform.kubeconfig(described.clusters, 'ap-northeast-2') }}"
    # {"apiVersion": "v1", "kind": "Config", "current-context": "nemo", ...}
"""

RETURN = r"""
_value:
  description: The kubeconfig as data.
  type: dict
"""

PATTERNS = {
    "name": (r"[0-9A-Za-z][0-9A-Za-z_-]{0,99}", "the name of an EKS cluster, such as nemo_EKS_kluster"),
    "context": (r"[0-9A-Za-z][0-9A-Za-z._@-]{0,62}", "letters, digits and . _ @ -, such as nemo"),
    "namespace": (r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", "lower-case letters, digits and -, such as kube-system"),
    "role_arn": (
        r"arn:aws[a-z-]*:iam::[0-9]{12}:role/[\w+=,.@/-]+",
        "an ARN such as arn:aws:iam::084375578827:role/nemo-operators",
    ),
    "endpoint": (r"https://[^\s/]+/?", "an address such as https://10.0.3.10 or https://cluster.example.com:6443"),
}


def context_of(cluster: Mapping[str, Any]) -> str:
    """The name that humans use: the one that was given, else the cluster's own."""
    return str(cluster.get("context") or cluster.get("name"))


def one_problem(cluster: Mapping[str, Any], label: str) -> list[str]:
    """What is wrong with one cluster."""
    wrong = [
        f"{label}.{key} is {cluster[key]!r}; allowed: {allowed}"
        for key, (pattern, allowed) in PATTERNS.items()
        if (cluster.get(key) or (key == "name" and key in cluster))
        and not (isinstance(cluster[key], str) and re.fullmatch(pattern, cluster[key], re.ASCII))
    ]
    return wrong if "name" in cluster else [f"{label}.name is missing; allowed: {PATTERNS['name'][1]}", *wrong]


def kubeconfig_problems(clusters: Sequence[Mapping[str, Any]], variable: str, default_context: str = "") -> list[str]:
    """What is wrong with the clusters asked for, one line each."""
    wrong = [line for index, cluster in enumerate(clusters) for line in one_problem(cluster, f"{variable}[{index}]")]
    contexts = [context_of(cluster) for cluster in clusters]
    if not contexts:
        wrong.append(f"{variable} is empty; allowed: one cluster or more")
    for context, count in Counter(contexts).items():
        if count > 1:
            wrong.append(f"{variable} has the context {context!r} {count} times; allowed: each context once")
    if default_context and default_context not in contexts:
        wrong.append(
            f"the default context is {default_context!r}; allowed: {', '.join(contexts) or 'a context that there is'}"
        )
    return wrong


def kubeconfig(
    clusters: Sequence[Mapping[str, Any]],
    described: Sequence[Mapping[str, Any]],
    region: str,
    aws_command: str = "/usr/local/bin/aws",
    environment: Mapping[str, str] | None = None,
    default_context: str = "",
) -> dict[str, Any]:
    """Return the kubeconfig. Cluster, user and context share one name, as each cluster may be there by several roles."""
    variables = [{"name": name, "value": str(value)} for name, value in (environment or {}).items() if value]
    made: dict[str, list[dict[str, Any]]] = {"clusters": [], "users": [], "contexts": []}
    for cluster, facts in zip(clusters, described, strict=True):
        name = context_of(cluster)
        server = {"server": facts["endpoint"], "certificate-authority-data": facts["certificate_authority"]}
        if cluster.get("endpoint"):
            # The certificate is for the name that EKS gave, whatever the way to it.
            server |= {"server": cluster["endpoint"], "tls-server-name": urlsplit(facts["endpoint"]).hostname}
        arguments = ["--region", region, "eks", "get-token", "--cluster-name", cluster["name"], "--output", "json"]
        if cluster.get("role_arn"):
            arguments += ["--role-arn", cluster["role_arn"]]
        credentials: dict[str, Any] = {
            "apiVersion": "client.authentication.k8s.io/v1beta1",
            "command": aws_command,
            "args": arguments,
            "interactiveMode": "Never",
            "installHint": f"{aws_command} is missing on this host: the role aws_cli installs it",
        }
        if variables:
            credentials["env"] = variables
        context = {"cluster": name, "user": name}
        if cluster.get("namespace"):
            context["namespace"] = cluster["namespace"]
        made["clusters"].append({"name": name, "cluster": server})
        made["users"].append({"name": name, "user": {"exec": credentials}})
        made["contexts"].append({"name": name, "context": context})
    first = default_context or context_of(clusters[0])
    return {"apiVersion": "v1", "kind": "Config", "preferences": {}, **made, "current-context": first}


def kubeconfig_endpoints(
    clusters: Sequence[Mapping[str, Any]], described: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Return what M(nemo.platform.endpoint_info) looks at; an address that was given in place of EKS's is inside by intent."""
    made = [
        {
            "url": cluster.get("endpoint") or facts["endpoint"],
            "private": bool(cluster.get("endpoint")) or facts["private_access"],
        }
        for cluster, facts in zip(clusters, described, strict=True)
    ]
    return [entry for index, entry in enumerate(made) if entry not in made[:index]]


class FilterModule:
    """The filters of this file."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Name and function of each filter."""
        return {
            "kubeconfig": kubeconfig,
            "kubeconfig_endpoints": kubeconfig_endpoints,
            "kubeconfig_problems": kubeconfig_problems,
        }
