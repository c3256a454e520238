#!/usr/bin/python
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Module: the image of an ECR repository that a tag rule or a pin names."""

from __future__ import annotations

DOCUMENTATION = r"""
module: ecr_image_info
short_description: The newest image of an ECR repository by its tag
version_added: 0.1.0
author: The nemo platform project (@nemo-platform)
description:
  - Finds the newest image whose tag follows the rule C(<prefix>-YYYYMMDD-HHMM), or the one with a given tag, and returns
    tag, digest and push time.
  - Newest is what sorts last as text, not what was pushed last. The date must be a real one, so that C(prod-20251301-9999)
    is nobody's release. Untagged and archived images are passed over.
  - Runs where boto3 is, that is on the controller with C(delegate_to=localhost).
options:
  repository:
    description: Name of the repository, without the registry.
    type: str
    required: true
  registry_id:
    description: Account of the registry. Default is the account of the credentials.
    type: str
  region:
    description: Region of the registry.
    type: str
    required: true
  endpoint_url:
    description: Address of the ECR API, where it is not AWS's own. Empty is as good as absent.
    type: str
    default: ""
  tag_prefix:
    description: Releases are tagged C(<tag_prefix>-YYYYMMDD-HHMM).
    type: str
  tag_pattern:
    description:
      - Regular expression of a release's tag, in place of the rule.
      - A group named C(stamp) must be a real date and time, C(YYYYMMDD-HHMM).
    type: str
  tag:
    description: This tag and no other. It must follow the rule if one is given as well.
    type: str
  digest:
    description: The image with this digest, under the newest of its tags that follows the rule, or another one where none does.
    type: str
    version_added: 0.2.0
  profile:
    description: Named AWS profile. Default is what boto3 finds in the environment of the controller.
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
attributes:
  check_mode:
    description: Nothing is changed in any mode.
    support: full
  diff_mode:
    description: There is nothing to show.
    support: none
"""

EXAMPLES = r"""
- name: Find the newest production image
  nemo.platform.ecr_image_info:
    repository: ai
    registry_id: "084375578827"
    region: ap-northeast-2
    tag_prefix: prod
  delegate_to: localhost
  register: release

- name: Show what would run
  ansible.builtin.debug:
    msg: "{{ release.image.tag }} is {{ release.image.uri }}"
"""

RETURN = r"""
image:
  description: The image to run.
  returned: success
  type: dict
  contains:
    tag:
      description: Its tag.
      type: str
      sample: prod-20250718-1040
    digest:
      description: Its digest.
      type: str
      sample: sha256:2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae
    pushed_at:
      description: When it was pushed, UTC.
      type: str
      sample: "2025-07-18T01:40:00+00:00"
    name:
      description: Registry and repository.
      type: str
      sample: 084375578827.dkr.ecr.ap-northeast-2.amazonaws.com/ai
    uri:
      description: What to pull, by digest.
      type: str
      sample: 084375578827.dkr.ecr.ap-northeast-2.amazonaws.com/ai@sha256:2c26b46b...
newer:
  description: How many releases are newer than this one; above 0 only for a pinned O(tag).
  returned: success
  type: int
matching:
  description: How many tags follow the rule.
  returned: success
  type: int
malformed:
  description: Tags that begin with O(tag_prefix) and do not follow the rule.
  returned: success
  type: list
  elements: str
untagged:
  description: How many images have no tag.
  returned: success
  type: int
"""

import traceback
from typing import Any

from ansible.module_utils.basic import AnsibleModule, missing_required_lib

from ansible_collections.nemo.platform.plugins.module_utils import aws_advice, ecr

try:
    import boto3
    from botocore.config import Config

    IMPORT_ERROR = None
except ImportError:
    IMPORT_ERROR = traceback.format_exc()


def connect(params: dict[str, Any]) -> Any:
    """Make the ECR client; fails soon and tries again by itself."""
    session = boto3.session.Session(
        profile_name=params["profile"] or None,
        aws_access_key_id=params["access_key"] or None,
        aws_secret_access_key=params["secret_key"] or None,
        aws_session_token=params["session_token"] or None,
        region_name=params["region"],
    )
    config = Config(connect_timeout=5, read_timeout=20, retries={"mode": "standard", "max_attempts": 3})
    return session.client("ecr", endpoint_url=params["endpoint_url"] or None, config=config)


def list_images(client: Any, repository: str, registry_id: str) -> list[dict[str, Any]]:
    """All images of a repository, page by page."""
    arguments = {"repositoryName": repository}
    if registry_id:
        arguments["registryId"] = registry_id
    pages = client.get_paginator("describe_images").paginate(PaginationConfig={"PageSize": 1000}, **arguments)
    return [image for page in pages for image in page["imageDetails"]]


def registry_name(images: list[dict[str, Any]], registry_id: str, region: str) -> str:
    """Host name of the registry."""
    account = registry_id or next((image["registryId"] for image in images if image.get("registryId")), "")
    domain = "amazonaws.com.cn" if region.startswith("cn-") else "amazonaws.com"
    return f"{account}.dkr.ecr.{region}.{domain}"


def run(params: dict[str, Any]) -> dict[str, Any]:
    """Ask ECR and choose; EcrError says in one line why it cannot."""
    repository, region, registry_id = params["repository"], params["region"], params["registry_id"] or ""
    rule = ecr.tag_rule(params["tag_prefix"], params["tag_pattern"])
    try:
        images = list_images(connect(params), repository, registry_id)
    except Exception as error:  # the SDK's exceptions share no useful base; explain() knows them by name
        if aws_advice.error_code(error) == "RepositoryNotFoundException":
            raise ecr.EcrError(
                f"registry {registry_id or 'of these credentials'} in {region} has no repository {repository!r}:"
                " check repository, nemo_account_id and nemo_region"
            ) from error
        raise ecr.EcrError(aws_advice.explain(error, region, params["endpoint_url"])) from error
    choice = ecr.choose(images, repository, rule, params["tag"], params.get("digest"))
    return ecr.result(choice, registry_name(images, registry_id, region), repository)


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "repository": {"type": "str", "required": True},
            "registry_id": {"type": "str"},
            "region": {"type": "str", "required": True},
            "endpoint_url": {"type": "str", "default": ""},
            "tag_prefix": {"type": "str"},
            "tag_pattern": {"type": "str"},
            "tag": {"type": "str"},
            "digest": {"type": "str"},
            "profile": {"type": "str"},
            "access_key": {"type": "str"},
            "secret_key": {"type": "str", "no_log": True},
            "session_token": {"type": "str", "no_log": True},
        },
        mutually_exclusive=[("tag_prefix", "tag_pattern"), ("tag", "digest"), ("profile", "access_key")],
        required_one_of=[("tag", "digest", "tag_prefix", "tag_pattern")],
        required_together=[("access_key", "secret_key")],
        supports_check_mode=True,
    )
    if IMPORT_ERROR:
        module.fail_json(msg=missing_required_lib("boto3"), exception=IMPORT_ERROR)
    try:
        module.exit_json(changed=False, **run(module.params))
    except ecr.EcrError as error:
        module.fail_json(msg=f"ecr_image_info: {error}")


if __name__ == "__main__":
    main()
