# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The Hugging Face Hub's HTTP interface, as far as a download needs it: a commit, its files with their digests, and their bytes.

The token goes to the hub's own address alone: redirects are followed here, by hand, and one that leads elsewhere gets none.
Standard library only and Python 3.9 syntax, because this runs on managed hosts. Proxies come from the environment.
"""

from __future__ import annotations

import http.client
import json
import re
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from typing import Any, Callable, NamedTuple

from ansible_collections.nemo.platform.plugins.module_utils.background import WorkError
from ansible_collections.nemo.platform.plugins.module_utils.downloads import (
    PASSING_STATUSES,
    Limits,
    tls_context,
)

REDIRECTS = (301, 302, 303, 307, 308)
HOPS = 5
LONGEST_PAUSE = 60.0
PAGES = 1000  # of a listing: a hub that leads in circles comes to an end
ANSWER_LIMIT = 64 << 20

ADVICE = {
    "arguments": "Set each named argument to an allowed value.",
    "certificate": "Install the certificate authority of the hub or of the proxy on this host, or check its clock.",
    "corrupt": "Look at what stands between this host and the hub (proxy, cache, disk): the bytes change on the way.",
    "disk": "Look at the file system and at the kernel's log: dmesg | tail; mount | grep the path.",
    "file": "Run again; if it stays so, the hub has lost a file of this revision.",
    "forbidden": "Check what the token may do: it needs to read this repository.",
    "gated": "Accept the model's terms on its page with the account that the token belongs to, and give that token.",
    "hub_answer": "Check endpoint, and what a proxy in between answers in its place.",
    "internal": "This is a fault of the module: report it with its whole text.",
    "killed": "Look for what ended it: dmesg | grep -i oom; journalctl -n 50. What was fetched is kept, run again.",
    "mount": "Mount the volume first (role nemo.platform.data_volume).",
    "no_space": "Free space on the volume, or grow it: role nemo.platform.data_volume grows the file system. What was fetched is kept.",
    "nothing": "Check include and exclude against the files that the model has.",
    "pickle": "Take a model with safetensors: role vllm fetches no others. The module does where include names them.",
    "rate_limit": "Wait some minutes, or give a token: the hub allows more to those it knows.",
    "repository": "Check the name (owner/name). A private model needs a token that may read it.",
    "revision": "Name a commit of this repository, 40 hexadecimal digits.",
    "slow": "Check the way to the hub, or try later. What was fetched is kept.",
    "timeout": "Run again to go on waiting, or raise timeout.",
    "token": "Give a token that is valid: the hub does not know this one.",
    "unreachable": "Check name resolution, routes and the proxy (https_proxy) from this host. What was fetched is kept.",
    "unsafe": "Do not use this hub: it names files that would lie outside the snapshot.",
}


class Passing(Exception):
    """A failure that another try may not meet; `pause` is what the server asked for, in seconds."""

    def __init__(self, reason: str, text: str, pause: float = 0) -> None:
        super().__init__(text)
        self.reason = reason
        self.text = text
        self.pause = min(pause, LONGEST_PAUSE)


class Commit(NamedTuple):
    """What a revision leads to."""

    sha: str
    gated: bool


class RemoteFile(NamedTuple):
    """A file of a commit. Large ones have a SHA-256, the others git's SHA-1 of a blob."""

    path: str
    size: int
    sha256: str
    blob: str

    @property
    def digest(self) -> str:
        return "sha256:%s" % self.sha256 if self.sha256 else "git:%s" % self.blob


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_arguments: Any) -> None:
        """Nothing: a redirect comes out as an error with its address."""


def origin(url: str) -> tuple[str, str, int]:
    parts = urllib.parse.urlsplit(url)
    return parts.scheme, parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)


class Hub:
    """One hub, asked with one token or none."""

    def __init__(self, endpoint: str, token: str, limits: Limits, sleep: Callable[[float], None] = time.sleep) -> None:
        self.endpoint = endpoint.rstrip("/")
        self.limits = limits
        self._token = token
        self._sleep = sleep
        self._opener = urllib.request.build_opener(_NoRedirect, urllib.request.HTTPSHandler(context=tls_context()))

    # what there is

    def commit(self, repository: str, revision: str) -> Commit:
        data, _next = self._json(
            "/api/models/%s/revision/%s" % (repository, urllib.parse.quote(revision, safe="")), repository, revision
        )
        sha = str(data.get("sha") or "") if isinstance(data, dict) else ""
        if not re.match(r"^[0-9a-f]{40}$", sha):
            raise WorkError("hub_answer", "%s does not say which commit %s is" % (self.endpoint, revision))
        return Commit(sha, bool(data.get("gated") or data.get("private")))

    def files(self, repository: str, sha: str) -> list[RemoteFile]:
        found: list[RemoteFile] = []
        url = "/api/models/%s/tree/%s?recursive=true" % (repository, sha)
        for _page in range(PAGES):
            data, url = self._json(url, repository, sha)
            if not isinstance(data, list):
                raise WorkError("hub_answer", "%s lists no files of %s" % (self.endpoint, repository))
            found += [self._file(entry) for entry in data if not isinstance(entry, dict) or entry.get("type") == "file"]
            if not url:
                return found
        raise WorkError("hub_answer", "%s lists the files of %s without an end" % (self.endpoint, repository))

    def _file(self, entry: Any) -> RemoteFile:
        try:
            lfs = entry.get("lfs") or {}
            sha256 = str(lfs.get("oid") or "").removeprefix("sha256:")
            file = RemoteFile(
                str(entry["path"]), int(lfs.get("size", entry["size"])), sha256, str(entry.get("oid") or "")
            )
        except (AttributeError, KeyError, TypeError, ValueError):
            raise WorkError("hub_answer", "%s lists a file without path, size or digest" % self.endpoint) from None
        good = re.match(r"^[0-9a-f]{64}$", sha256) if sha256 else re.match(r"^[0-9a-f]{40}$", file.blob)
        if not good or file.size < 0:
            raise WorkError("hub_answer", "%s gives no size or digest of %r" % (self.endpoint, file.path))
        parts = file.path.split("/")
        if not all(parts) or {".", ".."} & set(parts) or re.search(r"[\x00-\x1f\\]", file.path):
            raise WorkError("unsafe", "%s names a file %r" % (self.endpoint, file.path))
        return file

    def _json(self, path: str, repository: str, revision: str) -> tuple[Any, str]:
        """The answer, and the address of its next page or nothing."""
        with self.patiently(lambda: self.open("GET", path, repository, revision)) as answer:
            text = answer.read(ANSWER_LIMIT)
            links = answer.headers.get("Link") or ""
        try:
            data = json.loads(text.decode())
        except ValueError:
            raise WorkError("hub_answer", "%s answers with what is no JSON" % self.endpoint) from None
        following = re.search(r'<([^>]+)>;\s*rel="?next"?', links)
        return data, urllib.parse.urljoin(self._absolute(path), following.group(1)) if following else ""

    # its bytes

    def prove_access(self, repository: str, sha: str, path: str) -> None:
        """Whether a file may be had, without having it."""
        self.patiently(lambda: self.open("HEAD", self._resolve(repository, sha, path), repository, sha)).close()

    def download(self, repository: str, sha: str, path: str, start: int) -> Any:
        """The answer that has the file's bytes from `start` on, if the server does parts. Raises Passing, or WorkError."""
        headers = {"Range": "bytes=%d-" % start} if start else {}
        return self.open("GET", self._resolve(repository, sha, path), repository, sha, headers)

    @staticmethod
    def _resolve(repository: str, sha: str, path: str) -> str:
        return "/%s/resolve/%s/%s" % (repository, sha, urllib.parse.quote(path))

    def _absolute(self, path: str) -> str:
        return path if path.startswith(("http://", "https://")) else self.endpoint + path

    # one request

    def patiently(self, ask: Callable[[], Any]) -> Any:
        pause = self.limits.pause
        for further in range(self.limits.retries, -1, -1):
            try:
                return ask()
            except Passing as failure:
                if not further:
                    raise WorkError(failure.reason, "%s (%d tries)" % (failure.text, self.limits.retries + 1)) from None
                self._sleep(max(pause, failure.pause))
                pause *= 2
        raise AssertionError("not reached")

    def open(
        self, method: str, path: str, repository: str, revision: str, headers: dict[str, str] | None = None
    ) -> Any:
        """One request and the redirects that it meets. A HEAD ends where the hub sends it elsewhere: that says enough."""
        url = self._absolute(path)
        for _hop in range(HOPS):
            request = urllib.request.Request(url, headers=dict(headers or {}, **self._headers(url)), method=method)
            where = "%s://%s" % (request.type, request.host)  # the rest of a redirect may be a signature
            try:
                return self._opener.open(request, timeout=self.limits.timeout)
            except urllib.error.HTTPError as error:
                if error.code not in REDIRECTS:
                    raise self._refusal(error, where, repository, revision) from None
                target = urllib.parse.urljoin(url, error.headers.get("Location") or "")
                error.close()
                self._check_target(url, target)
                if method == "HEAD" and origin(target) != origin(self.endpoint):
                    return error
                url = target
            except (OSError, http.client.HTTPException) as error:
                raise self._no_answer(error, where) from None
        raise WorkError("hub_answer", "%s redirects more than %d times" % (self.endpoint, HOPS))

    def _headers(self, url: str) -> dict[str, str]:
        headers = {"User-Agent": "nemo.platform", "Accept-Encoding": "identity"}
        if self._token and origin(url) == origin(self.endpoint):
            headers["Authorization"] = "Bearer %s" % self._token
        return headers

    def _check_target(self, url: str, target: str) -> None:
        scheme = origin(target)[0]
        if scheme not in ("http", "https") or (scheme == "http" and origin(url)[0] == "https"):
            raise WorkError("hub_answer", "%s redirects to an address without TLS" % self.endpoint)

    @staticmethod
    def _no_answer(error: Exception, where: str) -> Exception:
        cause = getattr(error, "reason", None) or error
        if isinstance(cause, ssl.SSLCertVerificationError):
            return WorkError("certificate", "the certificate of %s is not good: %s" % (where, cause.verify_message))
        return Passing("unreachable", "%s does not answer (%s)" % (where, said(error)))

    def _refusal(self, error: urllib.error.HTTPError, where: str, repository: str, revision: str) -> Exception:
        code = error.headers.get("X-Error-Code") or ""
        message = " ".join((error.headers.get("X-Error-Message") or "").split())[:200]
        pause = error.headers.get("Retry-After") or ""
        error.close()
        if error.code == 429:
            limit = re.search(r"\bt=(\d+)", error.headers.get("RateLimit") or "")
            pause = pause if pause.isdigit() else (limit.group(1) if limit else "")
            return Passing("rate_limit", "%s allows no more requests now" % where, float(pause or 0))
        if error.code == 416:
            return Passing("corrupt", "%s has less of it than the hub lists" % where)
        if error.code in PASSING_STATUSES:
            text = "%s answers %d %s" % (where, error.code, error.reason)
            return Passing("unreachable", text, float(pause) if pause.isdigit() else 0)
        if origin("%s/" % where) != origin(self.endpoint):  # a signed address that has expired is asked for anew
            return Passing("unreachable", "%s answers %d %s" % (where, error.code, error.reason))
        if code == "GatedRepo":
            text = "%s is gated, and %s"
            why = "the account of this token was not granted access" if self._token else "no token is given"
            return WorkError("gated", text % (repository, why))
        if code == "RevisionNotFound":
            return WorkError("revision", "%s has no revision %s" % (repository, revision))
        if code == "EntryNotFound":
            return WorkError("file", "%s has lost a file of revision %s" % (repository, revision))
        if self._token and error.code == 401 and code != "RepoNotFound":
            return WorkError("token", "%s refuses the token%s" % (where, ": %s" % message if message else ""))
        if code == "RepoNotFound" or error.code in (401, 404):
            return WorkError(
                "repository",
                "%s has no model %s%s"
                % (where, repository, "" if self._token else " that can be seen without a token"),
            )
        if error.code == 403:
            return WorkError("forbidden", "%s forbids it%s" % (where, ": %s" % message if message else ""))
        return WorkError(
            "hub_answer", "%s answers %d %s%s" % (where, error.code, error.reason, ": %s" % message if message else "")
        )


def said(error: BaseException) -> str:
    """What a network error says, in one line."""
    cause = getattr(error, "reason", None) or error
    if isinstance(cause, http.client.IncompleteRead):
        return "the connection ended early"
    return str(getattr(cause, "strerror", None) or cause or type(cause).__name__)
