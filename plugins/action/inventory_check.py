# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Action inventory_check: collects what the checks of module_utils/preflight.py look at. Documented in plugins/modules."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from ansible.errors import AnsibleError
from ansible.plugins.action import ActionBase

from ansible_collections.nemo.platform.plugins.module_utils import aws_advice, preflight

PLATFORM_VARIABLES = (
    *preflight.REQUIRED_VARIABLES,
    "nemo_required_groups",
    "nemo_shared_names",
    "nemo_aws_connection",
    "nemo_bastion_system",
    "nemo_eks_version",
    "nemo_operators",
    "operators_allow_empty",
    "operators_rsa_bits",
)
_UNDEFINED = re.compile(r"'(\w+)' is undefined")


def _host(name: str, values: Mapping[str, Any]) -> preflight.Host:
    def text(key: str) -> str:
        return str(values.get(key) or "")

    return preflight.Host(
        name=name,
        role=text("nemo_role"),
        services=tuple(str(service) for service in values.get("nemo_host_services") or ()),
        tag_name=text("nemo_name"),
        instance_id=text("nemo_instance_id"),
        region=text("nemo_instance_region"),
        private_address=text("nemo_private_address"),
        public_address=text("nemo_public_address"),
        variables={key: True for key in preflight.REMOVED_VARIABLES if key in values},
    )


def read_source(source: str) -> tuple[str, dict[str, str]]:
    """The first region and the tag filters of an aws_ec2 inventory file, or of the one in a folder."""
    files = sorted(Path(source).glob("*aws_ec2.y*ml")) if Path(source).is_dir() else [Path(source)]
    for file in files:
        try:
            data = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            continue
        if isinstance(data, Mapping):
            regions = data.get("regions") or [""]
            filters = data.get("filters") or {}
            tags = {str(key)[4:]: str(value) for key, value in filters.items() if str(key).startswith("tag:")}
            return str(regions[0]), tags
    return "", {}


def ask_aws(connection: Mapping[str, Any], region: str, project: Mapping[str, str]) -> preflight.Account:
    """Ask STS and EC2 once each why no instance was found."""
    region = region or str(connection.get("region") or "")
    endpoint_url = str(connection.get("endpoint_url") or "")
    environment_region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or ""
    try:
        import boto3
        from botocore.config import Config
    except ImportError:
        return preflight.Account(region, error="boto3 is missing: make setup installs what the controller needs")
    try:
        session = boto3.session.Session(
            profile_name=connection.get("profile") or None,
            aws_access_key_id=connection.get("access_key") or None,
            aws_secret_access_key=connection.get("secret_key") or None,
            region_name=region or None,
        )
        config = Config(connect_timeout=5, read_timeout=10, retries={"mode": "standard", "max_attempts": 2})
        settings: dict[str, Any] = {"endpoint_url": endpoint_url or None, "config": config}
        if session.get_credentials() is None:
            error = f"no AWS credentials: {aws_advice.GET_CREDENTIALS}"
            return preflight.Account(region, error, True, endpoint_url=endpoint_url)
        identity = session.client("sts", **settings).get_caller_identity()["Arn"]
        states: Counter[str] = Counter()
        others = 0
        for page in session.client("ec2", **settings).get_paginator("describe_instances").paginate():
            for instance in (one for reservation in page["Reservations"] for one in reservation["Instances"]):
                tags = {tag["Key"]: tag["Value"] for tag in instance.get("Tags", [])}
                if project.items() <= tags.items():
                    states[instance["State"]["Name"]] += 1
                else:
                    others += 1
    except Exception as error:  # the SDK's exceptions share no useful base; explain() knows them by name
        return preflight.Account(
            region,
            aws_advice.explain(error, region, endpoint_url),
            aws_advice.error_code(error) in aws_advice.NO_CREDENTIALS,
            environment_region=environment_region,
            endpoint_url=endpoint_url,
        )
    return preflight.Account(region, "", False, identity, states, others, environment_region, endpoint_url)


class ActionModule(ActionBase):
    """The action."""

    BYPASS_HOST_LOOP = True
    _supports_check_mode = True
    _requires_connection = False

    def _variables(self, task_vars: Mapping[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name in (*PLATFORM_VARIABLES, *preflight.REMOVED_VARIABLES):
            if name not in task_vars:
                continue
            if name == "nemo_services":
                # Its secrets may be undefined: looked at one by one in _services().
                catalogue = self._catalogue(task_vars)
                found[name] = True if isinstance(catalogue, Mapping) else catalogue
                continue
            try:
                found[name] = self._templar.template(task_vars[name])
            except AnsibleError:
                found[name] = None
        return found

    def _catalogue(self, task_vars: Mapping[str, Any]) -> Any:
        catalogue = task_vars.get("nemo_services") or {}
        return catalogue if isinstance(catalogue, Mapping) else self._templar.template(catalogue)

    def _services(self, task_vars: Mapping[str, Any]) -> tuple[dict[str, Any], list[tuple[str, str, str]]]:
        catalogue = self._catalogue(task_vars)
        services: dict[str, Any] = {}
        missing: list[tuple[str, str, str]] = []
        for name, raw_entry in catalogue.items() if isinstance(catalogue, Mapping) else ():
            entry = raw_entry if isinstance(raw_entry, Mapping) else self._templar.template(raw_entry)
            if not isinstance(entry, Mapping):
                services[str(name)] = entry
                continue
            services[str(name)] = {}
            for key in (*preflight.SERVICE_KEYS, "hosts"):
                if key in entry:
                    services[str(name)][key] = self._templar.template(entry[key])
            secrets = entry.get("secrets") or {}
            if not isinstance(secrets, Mapping):
                secrets = self._templar.template(secrets)
            if not isinstance(secrets, Mapping):
                services[str(name)]["secrets"] = secrets
                continue
            for secret, raw in secrets.items():
                try:
                    value = self._templar.template(raw)
                except AnsibleError as error:
                    undefined = _UNDEFINED.search(str(error))
                    missing.append((str(name), str(secret), undefined.group(1) if undefined else ""))
                    continue
                if value in (None, ""):
                    missing.append((str(name), str(secret), ""))
        return services, missing

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Collect, check, report."""
        self._task.args = {}
        result: dict[str, Any] = super().run(tmp, task_vars)
        task_vars = task_vars or {}
        variables = self._variables(task_vars)
        services, missing = self._services(task_vars)
        hostvars = task_vars["hostvars"]
        groups = {name: list(members) for name, members in task_vars["groups"].items()}
        hosts = [_host(name, hostvars[name]) for name in sorted(groups.get("all", []))]
        account = None
        sources = list(task_vars.get("ansible_inventory_sources") or [])
        if not hosts:
            region, project = read_source(sources[0]) if sources else ("", {})
            account = ask_aws(variables.get("nemo_aws_connection") or {}, region, project)
        inventory = preflight.Inventory(
            hosts=hosts,
            groups=groups,
            variables=variables,
            services=services,
            missing_secrets=missing,
            account=account,
        )
        found = preflight.problems(inventory)
        for warning in preflight.warnings(inventory):
            self._display.warning(str(warning))
        result["changed"] = False
        if found:
            result["failed"] = True
            result["msg"] = preflight.report(
                found, [min(source, os.path.relpath(source), key=len) for source in sources]
            )
        return result
