"""The mirror's server: whole files, parts of them, and no listings."""

from __future__ import annotations

import functools
import http.client
import http.server
import pathlib
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from lab.aws import files


@pytest.mark.parametrize(
    ("header", "wanted"),
    [
        ("bytes=0-3", (0, 4)),
        ("bytes=4-", (4, 6)),
        ("bytes=-3", (7, 3)),
        ("bytes=-30", (0, 10)),
        ("bytes=8-99", (8, 2)),
        ("bytes=10-", (10, 0)),
        ("bytes=5-4", None),
        ("bytes=-", None),
        ("bytes=0-1,3-4", None),
        ("lines=0-3", None),
    ],
)
def test_the_part_that_a_header_asks_for(header: str, wanted: tuple[int, int] | None) -> None:
    assert files.part(header, 10) == wanted


@pytest.fixture
def get(tmp_path: pathlib.Path) -> Iterator[Any]:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a+b.gz").write_bytes(b"0123456789")
    (tmp_path / "simple").mkdir()
    (tmp_path / "simple" / "index.html").write_text("index")
    handler = functools.partial(files.Files, directory=str(tmp_path))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=5)

    def ask(path: str, **headers: str) -> tuple[int, bytes, http.client.HTTPMessage]:
        connection.request("GET", path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read(), answer.headers

    yield ask
    connection.close()
    server.shutdown()
    server.server_close()


def test_a_file_whole_and_in_parts_over_one_connection(get: Any) -> None:
    assert get("/folder/a%2Bb.gz")[:2] == (200, b"0123456789")
    status, body, headers = get("/folder/a+b.gz", Range="bytes=7-")
    assert (status, body, headers["Content-Range"]) == (206, b"789", "bytes 7-9/10")
    status, body, headers = get("/folder/a+b.gz", Range="bytes=10-")
    assert (status, body, headers["Content-Range"]) == (416, b"", "bytes */10")
    assert get("/folder/a+b.gz", Range="bytes=1-0")[:2] == (200, b"0123456789")


def test_a_folder_shows_its_index_or_nothing(get: Any) -> None:
    assert get("/simple/")[:2] == (200, b"index")
    assert get("/simple/", Range="bytes=0-1")[0] == 200
    assert get("/folder/")[0] == 404


def test_nothing_outside_the_folder(get: Any) -> None:
    assert get("/../../etc/passwd")[0] == 404
