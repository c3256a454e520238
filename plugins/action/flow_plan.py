# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Action flow_plan: every flow that follows from the table of security groups. Documented in plugins/modules."""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase

from ansible_collections.nemo.platform.plugins.module_utils import aws_advice, flow_table
from ansible_collections.nemo.platform.plugins.modules import eks_cluster_info

ARGUMENTS = {
    "security_groups": {"type": "dict", "required": True},
    "endpoints": {"type": "dict", "required": True},
    "vpc_cidr": {"type": "str", "required": True},
    "bastion": {"type": "str", "default": ""},
    "on_bastion": {"type": "bool", "default": False},
    "only": {"type": "list", "elements": "str", "default": []},
    "aws_connection": {"type": "dict", "default": {}},
}
CONNECTION = ("region", "endpoint_url", "profile", "access_key", "secret_key", "session_token")


class Unknown(Exception):
    """Why the address of an endpoint cannot be found out, in one line."""


def ask_eks(connection: Mapping[str, Any], cluster: str, vpc_cidr: str) -> dict[str, Any]:
    """What EKS knows of a cluster's API, as keys of an endpoint."""
    parameters = {key: connection.get(key) or None for key in CONNECTION}
    try:
        found = eks_cluster_info.run({**parameters, "clusters": [cluster]})["clusters"][0]
    except eks_cluster_info.ClusterError as error:
        raise Unknown(str(error)) from error
    url = urlsplit(found["endpoint"])
    return {
        "host": url.hostname or "",
        "ports": [url.port or 443],
        "certificate_authority": found["certificate_authority"],
        "within": [vpc_cidr] if found["private_access"] else [],
    }


def ask_rds(connection: Mapping[str, Any], instance: str) -> dict[str, Any]:
    """Where RDS says that a database is, as keys of an endpoint."""
    region = str(connection.get("region") or "")
    endpoint_url = str(connection.get("endpoint_url") or "")
    try:
        import boto3
        from botocore.config import Config

        session = boto3.session.Session(
            profile_name=connection.get("profile") or None,
            aws_access_key_id=connection.get("access_key") or None,
            aws_secret_access_key=connection.get("secret_key") or None,
            aws_session_token=connection.get("session_token") or None,
            region_name=region or None,
        )
        config = Config(connect_timeout=5, read_timeout=10, retries={"mode": "standard", "max_attempts": 2})
        client = session.client("rds", endpoint_url=endpoint_url or None, config=config)
        found = client.describe_db_instances(DBInstanceIdentifier=instance)["DBInstances"][0]
    except Exception as error:  # the SDK's exceptions share no useful base; explain() knows them by name
        if aws_advice.error_code(error) in ("DBInstanceNotFound", "DBInstanceNotFoundFault"):
            raise Unknown(f"{region} has no database instance {instance!r}") from error
        raise Unknown(aws_advice.explain(error, region, endpoint_url)) from error
    address = found.get("Endpoint") or {}
    if not address.get("Address"):
        raise Unknown(f"the database instance {instance!r} is {found.get('DBInstanceStatus')} and has no address")
    return {"host": str(address["Address"]), "ports": [int(address.get("Port") or 3306)]}


class ActionModule(ActionBase):
    """The action."""

    BYPASS_HOST_LOOP = True
    _supports_check_mode = True
    _requires_connection = False

    def _hosts(self, task_vars: Mapping[str, Any]) -> list[flow_table.Host]:
        groups: Mapping[str, Any] = task_vars["groups"]
        found = []
        for name in sorted(groups.get("all", [])):
            values = task_vars["hostvars"][name]
            if values.get("nemo_private_address"):
                member = tuple(sorted(group for group, members in groups.items() if group != "all" and name in members))
                public = str(values.get("nemo_public_address") or "")
                found.append(flow_table.Host(str(name), member, str(values["nemo_private_address"]), public))
        return found

    def _services(self, task_vars: Mapping[str, Any]) -> dict[str, Any]:
        """An endpoint for each service of the catalogue. Its secrets, which may have no value here, are not touched."""
        catalogue = task_vars.get("nemo_services") or {}
        if not isinstance(catalogue, Mapping):
            catalogue = self._templar.template(catalogue)
        found = {}
        for name, raw in catalogue.items():
            entry = raw if isinstance(raw, Mapping) else self._templar.template(raw)
            group, port, path = (self._templar.template(entry[key]) for key in ("group", "port", "health_path"))
            found[str(name)] = {
                "members": [str(group)], "ports": [port], "protocol": "http", "path": str(path), "status": [200],
            }  # fmt: skip
        return found

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Check the table, find out the addresses that it leaves to AWS, and derive the flows."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        task_vars = task_vars or {}
        _valid, arguments = self.validate_argument_spec(ARGUMENTS)
        hosts = self._hosts(task_vars)
        given = {**self._services(task_vars), **arguments["endpoints"]}
        endpoints, unknown = self._endpoints(given, arguments)
        known = sorted({*task_vars["groups"], *flow_table.GROUPS})
        table = flow_table.Table(arguments["security_groups"], endpoints, hosts, known, arguments["vpc_cidr"])
        problems = flow_table.problems(table)
        problems += [
            flow_table.Problem(f"verify_only names {name!r}", f"allowed: {', '.join(given)}")
            for name in arguments["only"]
            if name not in given
        ]
        if problems:
            lines = [f"{number}. {one.what}\n   -> {one.do}" for number, one in enumerate(problems, 1)]
            count = "one problem" if len(problems) == 1 else f"{len(problems)} problems"
            raise AnsibleActionFail(f"{count} in the table of security groups:\n" + "\n".join(lines))
        names = {host.name for host in hosts}
        sources = [name for name in task_vars["ansible_play_hosts_all"] if name in names]
        sources.sort(key=lambda name: (name != arguments["bastion"], name))
        on_bastion = arguments["on_bastion"]
        outside = "" if on_bastion else self._outside(hosts, arguments["bastion"], arguments["vpc_cidr"])
        flows = flow_table.flows(table, flow_table.Sources(sources, outside, arguments["only"]))
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        notes = ["this run stands on the Bastion, so nothing was tried from outside"] if on_bastion else []
        way_in = "" if on_bastion else arguments["bastion"]
        result.update(changed=False, flows=flows, unknown=unknown, notes=notes, way_in=way_in, started=now)
        return result

    @staticmethod
    def _outside(hosts: list[flow_table.Host], bastion: str, vpc_cidr: str) -> str:
        """The kind of address that this machine, which is not the Bastion, uses for the platform."""
        found = next((host for host in hosts if host.name == bastion), None)
        if found is None:
            return ""
        way_in = ipaddress.ip_address(found.public_address or found.private_address)
        return "private" if way_in in ipaddress.ip_network(vpc_cidr) else "public"

    @staticmethod
    def _endpoints(given: dict[str, Any], arguments: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
        endpoints, unknown = dict(given), {}
        for name, endpoint in given.items():
            if not isinstance(endpoint, Mapping) or endpoint.get("host") != "":
                continue
            if arguments["only"] and name not in arguments["only"]:
                del endpoints[name]
                continue
            try:
                if endpoint.get("eks_cluster"):
                    found = ask_eks(arguments["aws_connection"], endpoint["eks_cluster"], arguments["vpc_cidr"])
                elif endpoint.get("rds_instance"):
                    found = ask_rds(arguments["aws_connection"], endpoint["rds_instance"])
                else:
                    raise Unknown("host is empty, and neither eks_cluster nor rds_instance says whom to ask")
            except Unknown as error:
                unknown[name] = str(error)
                del endpoints[name]
                continue
            endpoints[name] = {
                **found,
                **{key: value for key, value in endpoint.items() if value not in ("", [], None)},
            }
        return endpoints, unknown
