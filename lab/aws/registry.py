"""Pushes to the lab's registry by its HTTP API: no container engine takes part."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import pathlib
import urllib.parse
from typing import Any

import urllib3

from lab.aws import seed
from lab.console import LabError
from lab.settings import REGISTRY, REGISTRY_ADDRESS


def digest_of(data: bytes) -> str:
    """The name by which a registry knows these bytes."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


@dataclasses.dataclass(frozen=True)
class Blob:
    """What a registry keeps under its digest: bytes here, or a file."""

    digest: str
    size: int
    content: bytes | pathlib.Path

    @classmethod
    def of(cls, data: bytes) -> Blob:
        return cls(digest_of(data), len(data), data)


class Registry:
    """The platform's registry, at its lab address, under its own name, with the token that ECR hands out."""

    def __init__(self, authority: pathlib.Path) -> None:
        token = seed.client("ecr").get_authorization_token()["authorizationData"][0]["authorizationToken"]
        self.headers = {"Authorization": f"Basic {token}", "Host": REGISTRY}
        self.pool = urllib3.HTTPSConnectionPool(
            REGISTRY_ADDRESS, 443, ca_certs=str(authority), server_hostname=REGISTRY, assert_hostname=REGISTRY,
            timeout=urllib3.Timeout(connect=5, read=120), retries=urllib3.Retry(3, redirect=0, backoff_factor=0.3),
        )  # fmt: skip

    def push_blob(self, repository: str, blob: Blob) -> None:
        """A layer or a configuration; nothing is sent where the registry has it."""
        if self._call("HEAD", f"/v2/{repository}/blobs/{blob.digest}", (200, 404)).status == 200:
            return
        begun = self._call("POST", f"/v2/{repository}/blobs/uploads/", (202,))
        location = urllib.parse.urlsplit(begun.headers["Location"])
        query = f"{location.query}&" if location.query else ""
        with contextlib.ExitStack() as stack:
            body = blob.content if isinstance(blob.content, bytes) else stack.enter_context(blob.content.open("rb"))
            self._call(
                "PUT", f"{location.path}?{query}digest={urllib.parse.quote(blob.digest)}", (201,),
                body=body, headers={"Content-Type": "application/octet-stream", "Content-Length": str(blob.size)},
            )  # fmt: skip

    def push_manifest(self, repository: str, reference: str, manifest: bytes, media_type: str) -> None:
        """A manifest under a tag, or under its own digest."""
        self._call(
            "PUT",
            f"/v2/{repository}/manifests/{reference}",
            (201,),
            body=manifest,
            headers={"Content-Type": media_type},
        )

    def delete_manifest(self, repository: str, digest: str) -> None:
        """A manifest and every tag on it; it may be gone already."""
        self._call("DELETE", f"/v2/{repository}/manifests/{digest}", (202, 404))

    def _call(
        self, method: str, path: str, expected: tuple[int, ...], headers: dict[str, str] | None = None, **more: Any
    ) -> urllib3.BaseHTTPResponse:
        try:
            answer = self.pool.request(method, path, headers={**self.headers, **(headers or {})}, **more)
        except urllib3.exceptions.HTTPError as error:
            raise LabError(
                f"the lab's registry at {REGISTRY_ADDRESS} does not answer: {error}; is the lab up?"
            ) from error
        if answer.status not in expected:
            raise LabError(f"the lab's registry refused {method} {path}: {answer.status} {answer.data.decode()[:300]}")
        return answer
