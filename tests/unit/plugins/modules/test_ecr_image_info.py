"""The image that a rule or a pin names, from an ECR of our own."""

from __future__ import annotations

import datetime
import json
from typing import Any

import pytest
from botocore.stub import Stubber

from ansible_collections.nemo.platform.plugins.module_utils import aws_advice, ecr
from ansible_collections.nemo.platform.plugins.modules import ecr_image_info
from tests.unit.conftest import REGION, Aws


def parameters(aws: Aws | None = None, **changes: Any) -> dict[str, Any]:
    given = dict.fromkeys(("registry_id", "tag_prefix", "tag_pattern", "tag", "profile", "session_token"))
    keys = {"access_key": "test", "secret_key": "test"}
    endpoint = aws.url if aws else "http://127.0.0.1:1"
    return {**given, **keys, "repository": "ai", "region": REGION, "endpoint_url": endpoint, **changes}


def push(aws: Aws, *tags: str | None, repository: str = "ai") -> dict[str, str]:
    """Push an image for each tag; returns tag -> digest."""
    client = aws.client("ecr")
    try:
        client.create_repository(repositoryName=repository)
    except client.exceptions.RepositoryAlreadyExistsException:
        pass
    digests = {}
    for number, tag in enumerate(tags):
        kind = "application/vnd.docker.distribution.manifest.v2+json"
        manifest = {"schemaVersion": 2, "mediaType": kind, "config": {"digest": f"sha256:{number:064x}"}, "layers": []}
        request = {"repositoryName": repository, "imageManifest": json.dumps(manifest)}
        if tag is not None:
            request["imageTag"] = tag
        image = client.put_image(**request)["image"]
        digests[str(tag)] = image["imageId"]["imageDigest"]
    return digests


def test_newest_by_tag_not_by_push(aws: Aws) -> None:
    digests = push(aws, "prod-20250718-1040", "prod-20250714-1752", "dev-20260101-0000")
    found = ecr_image_info.run(parameters(aws, tag_prefix="prod", registry_id="084375578827"))
    assert found["image"]["tag"] == "prod-20250718-1040"
    assert found["image"]["digest"] == digests["prod-20250718-1040"]
    registry = "084375578827.dkr.ecr.ap-northeast-2.amazonaws.com"
    assert found["image"]["uri"] == f"{registry}/ai@{digests['prod-20250718-1040']}"
    assert datetime.datetime.fromisoformat(found["image"]["pushed_at"]).utcoffset() == datetime.timedelta(0)
    assert (found["newer"], found["matching"]) == (0, 2)


def test_malformed_and_untagged_are_passed_over(aws: Aws) -> None:
    push(aws, "prod-20250718-1040", "prod-20251301-9999", "prod-20250230-1200", "prod-2025", "prod-99999999-9999-rc",
         "production-20270101-0000", "latest", None)  # fmt: skip
    found = ecr_image_info.run(parameters(aws, tag_prefix="prod"))
    assert found["image"]["tag"] == "prod-20250718-1040"
    assert "prod-20251301-9999" in found["malformed"]
    assert found["untagged"] == 1
    assert found["matching"] == 1


def test_account_of_the_credentials_names_the_registry(aws: Aws) -> None:
    push(aws, "prod-20250718-1040")
    found = ecr_image_info.run(parameters(aws, tag_prefix="prod"))
    assert found["image"]["name"].endswith(f".dkr.ecr.{REGION}.amazonaws.com/ai")
    assert found["image"]["name"].split(".")[0].isdigit()


def test_pin(aws: Aws) -> None:
    digests = push(aws, "prod-20250714-1752", "prod-20250718-1040")
    found = ecr_image_info.run(parameters(aws, tag="prod-20250714-1752", tag_prefix="prod"))
    assert found["image"]["digest"] == digests["prod-20250714-1752"]
    assert found["newer"] == 1


def test_digest_is_called_by_a_tag() -> None:
    images: list[dict[str, Any]] = [
        {"imageDigest": "sha256:1", "imageTags": ["latest", "prod-20250714-1752", "prod-20250101-0000"]},
        {"imageDigest": "sha256:2", "imageTags": ["prod-20250718-1040"]},
        {"imageDigest": "sha256:3", "imageTags": ["hotfix"]},
        {"imageDigest": "sha256:4"},
    ]
    rule = ecr.tag_rule("prod")
    found = ecr.choose(images, "ai", rule, digest="sha256:1")
    assert (found.tag, found.image["imageDigest"], found.newer) == ("prod-20250714-1752", "sha256:1", 1)
    assert ecr.choose(images, "ai", rule, digest="sha256:3").tag == "hotfix"
    assert ecr.choose(images, "ai", None, digest="sha256:2").tag == "prod-20250718-1040"
    with pytest.raises(ecr.EcrError, match="has no tag; give it one"):
        ecr.choose(images, "ai", rule, digest="sha256:4")
    with pytest.raises(ecr.EcrError, match="has no image with the digest sha256:5"):
        ecr.choose(images, "ai", rule, digest="sha256:5")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"tag": "prod-20250714-1753"},
            r"no image with the tag 'prod-20250714-1753'; the nearest are prod-20250714-1752",
        ),
        ({"tag": "hotfix", "tag_prefix": "prod"}, r"tag 'hotfix' does not follow the rule prod-YYYYMMDD-HHMM"),
        ({"tag": "prod-20251301-0000", "tag_prefix": "prod"}, r"'prod-20251301-0000' does not follow the rule"),
        ({"tag_prefix": "stage"}, r"has no tag by the rule stage-YYYYMMDD-HHMM \(1 image, 0 untagged\)"),
        ({"tag_prefix": "stage"}, r"; it has prod-20250714-1752: set tag_prefix to what the tags to run begin with$"),
        ({"tag_pattern": "^x$"}, r"; it has prod-20250714-1752: set tag_pattern to what the tags to run look like$"),
        ({"tag_pattern": "("}, r"tag_pattern '\(' is no regular expression"),
        ({"tag_prefix": "prod", "repository": "nothing"}, r"has no repository 'nothing': check repository"),
        ({}, r"one of tag, tag_prefix and tag_pattern"),
    ],
)
def test_one_line_errors(aws: Aws, changes: dict[str, Any], says: str) -> None:
    push(aws, "prod-20250714-1752")
    with pytest.raises(ecr.EcrError, match=says) as error:
        ecr_image_info.run(parameters(aws, **changes))
    assert "\n" not in str(error.value)


def test_empty_repository(aws: Aws) -> None:
    push(aws)
    with pytest.raises(ecr.EcrError, match="repository 'ai' has no image"):
        ecr_image_info.run(parameters(aws, tag_prefix="prod"))


def test_only_malformed_names_them(aws: Aws) -> None:
    push(aws, "prod-20251301-9999", None)
    with pytest.raises(ecr.EcrError, match=r"2 images, 1 untagged.*the nearest tags are prod-20251301-9999"):
        ecr_image_info.run(parameters(aws, tag_prefix="prod"))


def test_expired_token(expired_url: str, no_aws: None) -> None:
    with pytest.raises(ecr.EcrError, match="token has expired: log in again"):
        ecr_image_info.run(parameters(endpoint_url=expired_url, tag_prefix="prod"))


def test_no_credentials(no_aws: None) -> None:
    with pytest.raises(ecr.EcrError, match=r"no AWS credentials: .*AWS_PROFILE"):
        ecr_image_info.run(parameters(access_key=None, secret_key=None, tag_prefix="prod"))


def test_unreachable(no_aws: None) -> None:
    with pytest.raises(ecr.EcrError, match=r"http://127.0.0.1:1 cannot be reached"):
        ecr_image_info.run(parameters(tag_prefix="prod"))


def test_wrong_region(no_aws: None) -> None:
    with pytest.raises(ecr.EcrError, match="correct nemo_region"):
        ecr_image_info.run(parameters(region="Seoul!", tag_prefix="prod"))


def test_every_page_is_read(aws: Aws) -> None:
    client = aws.client("ecr")
    one = {"imageDigest": "sha256:1", "imageTags": ["prod-20250714-1752"], "registryId": "084375578827"}
    two = {"imageDigest": "sha256:2", "imageTags": ["prod-20250718-1040"], "registryId": "084375578827"}
    asked = {"repositoryName": "ai", "registryId": "084375578827", "maxResults": 1000}
    with Stubber(client) as stub:
        stub.add_response("describe_images", {"imageDetails": [one] * 1000, "nextToken": "more"}, asked)
        stub.add_response("describe_images", {"imageDetails": [two]}, {**asked, "nextToken": "more"})
        images = ecr_image_info.list_images(client, "ai", "084375578827")
        stub.assert_no_pending_responses()
    assert len(images) == 1001
    assert ecr.choose(images, "ai", ecr.tag_rule("prod")).tag == "prod-20250718-1040"


@pytest.mark.parametrize(
    ("tag", "follows"),
    [
        ("prod-20250714-1752", True),
        ("prod-20240229-0000", True),
        ("prod-20250229-0000", False),
        ("prod-20250714-2400", False),
        ("prod-20250714-1752\n", False),
        ("prod-２０２５0714-1752", False),
        ("xprod-20250714-1752", False),
        ("prod-20250714-1752-arm", False),
        ("", False),
    ],
)
def test_rule(tag: str, follows: bool) -> None:
    rule = ecr.tag_rule("prod")
    assert rule is not None
    assert ecr.matches(tag, rule) is follows


def test_prefix_is_no_expression() -> None:
    rule = ecr.tag_rule("p.od")
    assert rule is not None
    assert not ecr.matches("prod-20250714-1752", rule)


def test_pattern_with_a_stamp_of_its_own() -> None:
    rule = ecr.tag_rule(pattern=r"^v-(?P<stamp>\d{8}-\d{4})$")
    images = [{"imageDigest": "sha256:1", "imageTags": ["v-20251301-0000", "v-20250101-0000"]}]
    assert ecr.choose(images, "ai", rule).tag == "v-20250101-0000"


def test_archived_images_are_passed_over() -> None:
    images: list[dict[str, Any]] = [
        {"imageDigest": "sha256:1", "imageTags": ["prod-20250101-0000"]},
        {"imageDigest": "sha256:2", "imageTags": ["prod-20260101-0000"], "imageStatus": "ARCHIVED"},
    ]
    assert ecr.choose(images, "ai", ecr.tag_rule("prod")).tag == "prod-20250101-0000"


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("ExpiredTokenException", "expired"),
        ("UnrecognizedClientException", "does not accept these credentials"),
        ("AccessDeniedException", "may not do this"),
        ("SomethingElse", "AWS in ap-northeast-2: SomethingElse"),
    ],
)
def test_explanations(code: str, says: str) -> None:
    error = Exception("the\nmessage")
    error.response = {"Error": {"Code": code}}  # type: ignore[attr-defined]
    line = aws_advice.explain(error, REGION)
    assert says in line
    assert "\n" not in line
