# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Large files over HTTP: with time limits, tried again from where it broke off, and never onto a disk without room.

Standard library only and Python 3.9 syntax, because this runs on managed hosts. Proxies come from the environment.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import re
import socket
import ssl
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Callable

CHUNK_BYTES = 1 << 20
# What a file system shall have left after everything was written.
RESERVE_BYTES = 16 << 20
# Answers that another try may change.
PASSING_STATUSES = (408, 425, 429, 500, 502, 503, 504)
# socket.timeout is a TimeoutError only since Python 3.10.
NETWORK = (
    urllib.error.URLError,
    http.client.HTTPException,
    ConnectionError,
    TimeoutError,
    socket.timeout,
    ssl.SSLError,
)
# A Python that was not built by the distribution (Amazon Linux 2) does not know where these are.
CA_BUNDLES = ("/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/certs/ca-certificates.crt")


class DownloadError(Exception):
    """A file cannot be had; the text names its address."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


@dataclass
class Limits:
    """How long to be patient: seconds without a byte, further tries, seconds before the first of them (then doubled)."""

    timeout: float = 30
    retries: int = 3
    pause: float = 1


def require_space(folder: str, needed: int, purpose: str) -> None:
    """Free space for what will be written below a folder, and some more; an error that gives both numbers."""
    status = os.statvfs(folder)
    free = status.f_bavail * status.f_frsize
    if free < needed + RESERVE_BYTES:
        raise DownloadError(
            f"{folder}: {purpose} needs {megabytes(needed)} and {megabytes(RESERVE_BYTES)} shall stay free,"
            f" but the file system has {megabytes(free)} left; nothing was changed"
        )


def megabytes(size: int) -> str:
    return f"{size / (1 << 20):.1f} MiB"


def sha256_of(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        for block in iter(lambda: handle.read(CHUNK_BYTES), b""):
            digest.update(block)
    return digest.hexdigest()


def tls_context() -> ssl.SSLContext:
    """Certificates are checked against the host's own list, wherever this Python would look for one."""
    context = ssl.create_default_context()
    if "SSL_CERT_FILE" not in os.environ:
        for bundle in CA_BUNDLES:
            if os.path.exists(bundle):
                context.load_verify_locations(cafile=bundle)
                break
    return context


class Downloader:
    """Fetches files; what was fetched before a failure is kept, and asked for no second time."""

    def __init__(self, limits: Limits, sleep: Callable[[float], None] = time.sleep) -> None:
        self.limits = limits
        self._sleep = sleep
        self._opener = urllib.request.build_opener(urllib.request.HTTPSHandler(context=tls_context()))

    def fetch(self, url: str, path: str, limit: int | None = None) -> None:
        """Write the file at `url` to `path`; a `path` that is there already is what an earlier try got."""
        if not url.startswith(("http://", "https://")):
            raise DownloadError(f"{url}: not an address; allowed: http:// and https://")
        pause = self.limits.pause
        for further in range(self.limits.retries, -1, -1):
            try:
                self._try(url, path, limit)
                return
            except urllib.error.HTTPError as error:
                error.close()
                if error.code == 416:  # what is here is not the beginning of what is there
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(path)
                elif error.code not in PASSING_STATUSES:
                    raise DownloadError(f"{url}: the server says {error.code} {error.reason}", error.code) from None
                problem, status = f"the server says {error.code} {error.reason}", error.code
            except NETWORK as error:
                reason = getattr(error, "reason", None) or error
                problem, status = f"{type(reason).__name__}: {reason}", None
            except OSError as error:  # of the disk: a part that fills it is of no use
                with contextlib.suppress(OSError):
                    os.unlink(path)
                raise DownloadError(f"{path}: cannot be written: {error.strerror}") from error
            if further:
                self._sleep(pause)
                pause *= 2
        raise DownloadError(f"{url}: {problem} ({self.limits.retries + 1} tries)", status)

    def _try(self, url: str, path: str, limit: int | None) -> None:
        have = os.path.getsize(path) if os.path.exists(path) else 0
        headers = {"User-Agent": "nemo.platform", "Accept-Encoding": "identity"}
        if have:
            headers["Range"] = f"bytes={have}-"
        with self._opener.open(urllib.request.Request(url, headers=headers), timeout=self.limits.timeout) as answer:
            if answer.status != 206 or not self._continues(answer.headers.get("Content-Range", ""), have):
                if answer.status == 206:  # a piece, but not the one that was asked for
                    os.unlink(path)
                    raise http.client.HTTPException("the server sent another part than the one asked for")
                have = 0
            length = answer.headers.get("Content-Length")
            if length is not None:
                require_space(os.path.dirname(path), int(length), f"the download of {url}")
            with open(path, "ab" if have else "wb") as file:
                got = 0
                while True:
                    block = answer.read(CHUNK_BYTES)
                    if not block:
                        break
                    file.write(block)
                    got += len(block)
                    if limit is not None and have + got > limit:
                        raise DownloadError(f"{url}: longer than {limit} bytes, which this file cannot be")
                file.flush()
                os.fsync(file.fileno())
            if length is not None and got != int(length):
                raise http.client.HTTPException(
                    f"the connection ended after {have + got} of {have + int(length)} bytes"
                )

    @staticmethod
    def _continues(content_range: str, have: int) -> bool:
        matched = re.match(r"bytes (\d+)-", content_range)
        return matched is not None and int(matched.group(1)) == have
