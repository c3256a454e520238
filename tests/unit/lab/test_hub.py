"""The lab's model hub: models in the formats that engines read, and answers as the real hub gives them."""

from __future__ import annotations

import functools
import hashlib
import http.client
import http.server
import json
import pathlib
import struct
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from lab.artifacts import hub as models
from lab.artifacts import store
from lab.aws import files, hub

TINY = "nemo-lab/tiny-llama"


@pytest.fixture(scope="module")
def mirror(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("mirror")
    models.write(folder)
    return folder


@pytest.fixture(scope="module")
def described(mirror: pathlib.Path) -> dict[str, Any]:
    return models.describe(store.Made("key", mirror, {}))


@pytest.fixture
def ask(mirror: pathlib.Path) -> Iterator[Any]:
    hub.BEHAVIOUR.set({})
    handler = functools.partial(files.Files, directory=str(mirror))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()

    def request(path: str, method: str = "GET", body: Any = None, **headers: str) -> tuple[int, bytes, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=5)
        connection.request(method, f"/hub{path}", None if body is None else json.dumps(body), headers)
        answer = connection.getresponse()
        try:
            data = answer.read()
        except http.client.IncompleteRead as error:
            data = error.partial
        connection.close()
        return answer.status, data, answer.headers

    yield request
    hub.BEHAVIOUR.set({})
    server.shutdown()
    server.server_close()


# -- models


def tensors(data: bytes) -> dict[str, Any]:
    (length,) = struct.unpack("<Q", data[:8])
    assert length % 8 == 0
    header: dict[str, Any] = json.loads(data[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "pt"}
    end = 0
    for entry in header.values():
        begin, after = entry["data_offsets"]
        assert begin == end
        assert after - begin == 2 * models.elements(entry["shape"])
        end = after
    assert len(data) == 8 + length + end
    return header


def test_weights_are_those_of_the_configuration() -> None:
    made = models.model(models.TINY, 1)
    config = json.loads(made["config.json"])
    found = tensors(made["model.safetensors"])
    assert len(found) == 9 * config["num_hidden_layers"] + 3
    assert found["lm_head.weight"]["shape"] == [config["vocab_size"], config["hidden_size"]]
    assert found["model.layers.1.self_attn.k_proj.weight"]["shape"] == [64, 128]
    assert 500_000 < len(made["model.safetensors"]) < 2_000_000


def test_shards_and_their_index() -> None:
    made = models.model(models.BIG, 2, shards=2)
    index = json.loads(made["model.safetensors.index.json"])
    parts = {name: tensors(data) for name, data in made.items() if name.endswith(".safetensors")}
    assert {name for part in parts.values() for name in part} == set(index["weight_map"])
    assert all(name in parts[part] for name, part in index["weight_map"].items())
    assert 30_000_000 < index["metadata"]["total_size"] < 60_000_000


def test_numbers_are_small_and_those_of_letters_are_larger() -> None:
    noise = models.noise(models.random.Random(1), 1000)
    values = [struct.unpack("<f", b"\0\0" + noise[at : at + 2])[0] for at in range(0, len(noise), 2)]
    assert all(0.005 < abs(value) < 0.04 for value in values)
    assert min(values) < 0 < max(values)


def test_the_tokenizer_knows_every_byte() -> None:
    vocabulary = json.loads(models.tokenizer()["tokenizer.json"])["model"]["vocab"]
    assert sorted(vocabulary.values()) == list(range(260))
    assert (vocabulary["A"], vocabulary["Ġ"], vocabulary["Ċ"], vocabulary["<|end|>"]) == (65, 32, 10, 257)


def test_the_huge_model_says_70_billion() -> None:
    made = models.huge()
    total = json.loads(made["model.safetensors.index.json"])["metadata"]["total_size"]
    assert 140e9 < total < 142e9
    assert not [name for name in made if name.endswith(".safetensors")]


def test_models_are_the_same_each_time(described: dict[str, Any], tmp_path: pathlib.Path) -> None:
    models.write(tmp_path)
    assert models.describe(store.Made("key", tmp_path, {})) == described
    assert set(described["models"]) == {
        f"nemo-lab/{name}" for name in ("big-llama", "gated-llama", "huge", "pickled", "tiny-llama")
    }
    refs = described["models"][TINY]["refs"]
    assert refs["v1"] != refs["main"] == described["models"][TINY]["revision"]


# -- the server


def test_listing_and_files_agree(ask: Any, described: dict[str, Any]) -> None:
    commit = described["models"][TINY]["revision"]
    status, data, _headers = ask(f"/api/models/{TINY}/revision/main")
    assert (status, json.loads(data)["sha"]) == (200, commit)
    entries = json.loads(ask(f"/api/models/{TINY}/tree/{commit}?recursive=true")[1])
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= {entry["path"] for entry in entries}
    for entry in entries:
        status, data, headers = ask(f"/{TINY}/resolve/{commit}/{entry['path']}")
        if "lfs" in entry:
            assert (status, headers["X-Linked-Etag"]) == (302, f'"{entry["lfs"]["oid"]}"')
            status, data, _headers = ask(headers["Location"].partition("/hub")[2])
            assert hashlib.sha256(data).hexdigest() == entry["lfs"]["oid"]
        else:
            assert models.blob(data) == entry["oid"]
            assert (headers["ETag"], headers["X-Repo-Commit"]) == (f'"{entry["oid"]}"', commit)
        assert (status, len(data)) == (200, entry["size"])


def test_parts_of_files(ask: Any, described: dict[str, Any]) -> None:
    path = f"/{TINY}/resolve/main/config.json"
    whole = ask(path)[1]
    status, data, headers = ask(path, Range="bytes=10-")
    assert (status, data, headers["Content-Range"]) == (206, whole[10:], f"bytes 10-{len(whole) - 1}/{len(whole)}")
    assert ask(path, Range=f"bytes={len(whole)}-")[0] == 416
    assert ask(path, method="HEAD")[:2] == (200, b"")


@pytest.mark.parametrize(
    ("path", "token", "status", "code"),
    [
        ("/api/models/nemo-lab/nothing/revision/main", "", 401, "RepoNotFound"),
        ("/api/models/nemo-lab/../revision/main", "", 401, "RepoNotFound"),
        (f"/api/models/{TINY}/revision/{'f' * 40}", "", 404, "RevisionNotFound"),
        (f"/{TINY}/resolve/main/nothing", "", 404, "EntryNotFound"),
        ("/nemo-lab/gated-llama/resolve/main/config.json", "", 401, "GatedRepo"),
        ("/nemo-lab/gated-llama/resolve/main/config.json", "wrong", 401, None),
        ("/nemo-lab/gated-llama/resolve/main/config.json", hub.TOKEN, 200, None),
        ("/api/models/nemo-lab/gated-llama/tree/main", "", 200, None),
        ("/cdn/nemo-lab/../" + "a" * 40 + "/" + "b" * 64 + "/x", "", 404, "EntryNotFound"),
    ],
)
def test_refusals(ask: Any, path: str, token: str, status: int, code: str | None) -> None:
    found = ask(path, **({"Authorization": f"Bearer {token}"} if token else {}))
    assert (found[0], found[2]["X-Error-Code"]) == (status, code)


def test_behaviour_is_set_and_told(ask: Any, described: dict[str, Any]) -> None:
    path = f"/cdn/{TINY}/{described['models'][TINY]['revision']}/{'0' * 64}/model.safetensors"
    whole = ask(path)[1]
    before = json.loads(ask("/lab")[1])["requests"]
    assert json.loads(ask("/lab", "PUT", {"flip": 1, "cut": 1, "fail": 1})[1])["flip"] == 1
    assert ask(path)[0] == 503
    assert ask(path)[1] == bytes([whole[0] ^ 1]) + whole[1 : len(whole) // 2]
    assert ask(path)[1] == whole
    assert json.loads(ask("/lab")[1])["requests"] == before + 3
    assert ask("/lab", "PUT", {"burn": 1})[0] == 400
    assert ask("/lab", "PUT", {"rate": 4_000_000})[0] == 200
    assert ask(path)[1] == whole
