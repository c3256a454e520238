# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which image of an ECR repository is the one to run. Pure functions on what ecr:DescribeImages returns."""

from __future__ import annotations

import datetime
import difflib
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

STAMP = r"(?P<stamp>\d{8}-\d{4})"


class EcrError(Exception):
    """Why there is no image to run, in one line."""


class TagRule(NamedTuple):
    """Which tags are releases: a regular expression, and what a tag looks like, for messages."""

    regexp: re.Pattern[str]
    example: str
    prefix: str


class Choice(NamedTuple):
    """The chosen image and what was left aside."""

    image: dict[str, Any]
    tag: str
    newer: int
    matching: int
    malformed: list[str]
    untagged: int


def tag_rule(prefix: str | None = None, pattern: str | None = None) -> TagRule | None:
    """Build the rule <prefix>-YYYYMMDD-HHMM, or one of the caller's own."""
    if pattern:
        try:
            return TagRule(re.compile(pattern), pattern, "")
        except re.error as error:
            raise EcrError(f"tag_pattern {pattern!r} is no regular expression: {error}") from error
    if prefix:
        return TagRule(re.compile(rf"{re.escape(prefix)}-{STAMP}"), f"{prefix}-YYYYMMDD-HHMM", prefix)
    return None


def _is_time(stamp: str) -> bool:
    try:
        datetime.datetime.strptime(stamp, "%Y%m%d-%H%M")
    except ValueError:
        return False
    return True


def matches(tag: str, rule: TagRule) -> bool:
    """Whether a tag is a release by the rule; the group `stamp`, where the rule has one, must be a real date and time."""
    found = rule.regexp.fullmatch(tag) if rule.prefix else rule.regexp.search(tag)
    if not found or not tag.isascii():
        return False
    stamp = found.groupdict().get("stamp")
    return stamp is None or _is_time(stamp)


def _active(images: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return [image for image in images if image.get("imageStatus", "ACTIVE") == "ACTIVE"]


def _tag_of(images: Iterable[dict[str, Any]], repository: str, digest: str, rule: TagRule | None) -> str:
    """The tag to call an image by that is asked for by its digest: the newest by the rule, or else any."""
    image = next((image for image in images if image["imageDigest"] == digest), None)
    if image is None:
        raise EcrError(f"repository {repository!r} has no image with the digest {digest}")
    tags = sorted(image.get("imageTags") or [])
    if not tags:
        raise EcrError(
            f"the image {digest} of repository {repository!r} has no tag; give it one, or name one beside the digest"
        )
    return ([tag for tag in tags if rule is not None and matches(tag, rule)] or tags)[-1]


def choose(
    images: Iterable[dict[str, Any]],
    repository: str,
    rule: TagRule | None,
    pin: str | None = None,
    digest: str | None = None,
) -> Choice:
    """Choose the pinned tag, or the newest by the text of the tag: push times change when an image is pushed again."""
    if digest:
        images = list(images)
        pin = _tag_of(_active(images), repository, digest, rule)
        rule = rule if rule is not None and matches(pin, rule) else None
    if rule is None and not pin:
        raise EcrError("one of tag, tag_prefix and tag_pattern is needed")
    if pin and rule is not None and not matches(pin, rule):
        raise EcrError(f"tag {pin!r} does not follow the rule {rule.example}")

    active = _active(images)
    by_tag = {tag: image for image in active for tag in image.get("imageTags") or []}
    untagged = sum(1 for image in active if not image.get("imageTags"))
    matching = sorted(tag for tag in by_tag if rule is not None and matches(tag, rule))
    malformed = sorted(
        tag
        for tag in by_tag
        if rule is not None and rule.prefix and tag.startswith(rule.prefix) and tag not in matching
    )
    if not active:
        raise EcrError(f"repository {repository!r} has no image: push one")
    if pin and pin not in by_tag:
        near = difflib.get_close_matches(pin, list(by_tag), n=3) or matching[-3:]
        hint = f"; the nearest are {', '.join(near)}" if near else ""
        raise EcrError(f"repository {repository!r} has no image with the tag {pin!r}{hint}")
    if not pin and not matching:
        assert rule is not None
        near = malformed[-5:] or difflib.get_close_matches(rule.example, list(by_tag), n=5, cutoff=0.3)
        # Else the last one of each kind.
        there = list({tag.partition("-")[0]: tag for tag in sorted(by_tag)}.values())[-5:]
        found = f"the nearest tags are {', '.join(near)}" if near else f"it has {', '.join(there)}"
        do = "set tag_prefix to what the tags to run begin with"
        if not rule.prefix:
            do = "set tag_pattern to what the tags to run look like"
        if not there:
            found, do = "no image has a tag", "push one that has"
        count = f"{len(active)} image{'s' if len(active) > 1 else ''}, {untagged} untagged"
        raise EcrError(f"repository {repository!r} has no tag by the rule {rule.example} ({count}); {found}: {do}")
    tag = pin or matching[-1]
    return Choice(by_tag[tag], tag, sum(1 for one in matching if one > tag), len(matching), malformed, untagged)


def result(choice: Choice, registry: str, repository: str) -> dict[str, Any]:
    """What the module returns."""
    pushed = choice.image.get("imagePushedAt")
    if isinstance(pushed, datetime.datetime):
        pushed = pushed.astimezone(datetime.timezone.utc).isoformat(timespec="seconds")
    digest = choice.image["imageDigest"]
    return {
        "image": {
            "tag": choice.tag,
            "digest": digest,
            "pushed_at": pushed,
            "name": f"{registry}/{repository}",
            "uri": f"{registry}/{repository}@{digest}",
        },
        "newer": choice.newer,
        "matching": choice.matching,
        "malformed": choice.malformed,
        "untagged": choice.untagged,
    }
