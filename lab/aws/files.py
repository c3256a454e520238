"""The mirror's server: files over HTTP, in parts where a client asks for a part, and no listings of folders.

What lies below /hub is answered as a model hub would. Runs in the container of the AWS side, under its own Python:
  python3 -m lab.aws.files ADDRESS PORT FOLDER
"""

from __future__ import annotations

import functools
import http.server
import io
import os
import pathlib
import re
import sys
from typing import Any, BinaryIO

from lab.aws import hub


class Part(io.RawIOBase):
    """A part of a file, closed together with it."""

    def __init__(self, file: BinaryIO, first: int, length: int) -> None:
        self.file, self.left = file, length
        file.seek(first)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self.file.read(min(len(buffer), self.left))
        buffer[: len(data)] = data
        self.left -= len(data)
        return len(data)

    def close(self) -> None:
        self.file.close()
        super().close()


def part(header: str, size: int) -> tuple[int, int] | None:
    """First byte and length of the one part that a header asks for; nothing where the whole is the answer.

    A length of 0 stands for a part that is not in the file.
    """
    found = re.fullmatch(r"bytes=(\d*)-(\d*)", header.strip())
    if not found or not (found[1] or found[2]):
        return None
    if not found[1]:
        length = min(int(found[2]), size)
        return size - length, length
    first, last = int(found[1]), min(int(found[2] or size), size - 1)
    if found[2] and int(found[2]) < first:
        return None
    return first, max(last - first + 1, 0)


class Files(http.server.SimpleHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server_version = "nemo-lab-mirror"
    sys_version = ""
    timeout = 120

    def do_GET(self) -> None:
        if self.path.startswith(f"{hub.PREFIX}/"):
            hub.answer(self, pathlib.Path(self.directory))
        else:
            super().do_GET()

    def do_HEAD(self) -> None:
        if self.path.startswith(f"{hub.PREFIX}/"):
            hub.answer(self, pathlib.Path(self.directory))
        else:
            super().do_HEAD()

    def do_PUT(self) -> None:
        if self.path == hub.CONTROL:
            hub.answer(self, pathlib.Path(self.directory))
        else:
            self.send_error(405)

    def send_head(self) -> Any:
        path = pathlib.Path(self.translate_path(self.path))
        wanted = self.headers.get("Range", "")
        if not wanted or "If-Range" in self.headers or not path.is_file():
            return super().send_head()
        file = path.open("rb")
        status = os.fstat(file.fileno())
        asked = part(wanted, status.st_size)
        if asked is None:
            file.close()
            return super().send_head()
        first, length = asked
        if not length:
            file.close()
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{status.st_size}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return None
        self.send_response(206)
        self.send_header("Content-Type", self.guess_type(str(path)))
        self.send_header("Content-Range", f"bytes {first}-{first + length - 1}/{status.st_size}")
        self.send_header("Content-Length", str(length))
        self.send_header("Last-Modified", self.date_time_string(int(status.st_mtime)))
        self.end_headers()
        return Part(file, first, length)

    def end_headers(self) -> None:
        self.send_header("Accept-Ranges", "bytes")
        super().end_headers()

    def list_directory(self, path: Any) -> None:
        """A folder without an index has no page."""
        self.send_error(404)

    def log_message(self, *arguments: Any) -> None:
        """Nothing: a missing file is the client's to tell."""


def main(address: str, port: str, folder: str) -> None:
    http.server.ThreadingHTTPServer((address, int(port)), functools.partial(Files, directory=folder)).serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
