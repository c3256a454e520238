"""nemo.platform.container_release: its arguments, its parts, and the module as Ansible runs it; releases themselves are
in test_release_flow."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ansible_collections.nemo.platform.plugins.module_utils import container_release as logic
from ansible_collections.nemo.platform.plugins.module_utils import release_flow
from ansible_collections.nemo.platform.plugins.modules import container_release as module
from tests.unit.plugins.modules.fake_docker import image
from tests.unit.plugins.modules.release_world import SECRET, TAGS, World


@pytest.fixture(autouse=True)
def _no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _descriptor: None)  # no power is lost here


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


ONE, TWO, BROKEN = (TAGS[number] for number in (1, 2, 3))

# -- what docker says

PULL_ERRORS = {
    "engine_down": "Cannot connect to the Docker daemon at unix:///var/run/docker.sock. Is the docker daemon running?",
    "registry_unreachable": "Error response from daemon: Get https://r/v2/: dial tcp 10.0.0.11:443: connect: connection refused",
    "registry_certificate": "Error response from daemon: Get https://r/v2/: x509: certificate signed by unknown authority",
    "authentication": "Error response from daemon: denied: Your authorization token has expired. Reauthenticate and try again.",
    "not_found": "Error response from daemon: manifest for r/ai:x not found: manifest unknown: Requested image not found",
    "no_space": "write /var/lib/docker/tmp/GetImageBlob1: no space left on device",
    "platform": "no matching manifest for linux/amd64 in the manifest list entries",
}
MORE_ERRORS = [
    ("registry_unreachable", "Error response from daemon: Get https://r/v2/: dial tcp: lookup r: no such host"),
    (
        "registry_unreachable",
        "Get https://r/v2/: net/http: request canceled while waiting for connection (Client.Timeout exceeded)",
    ),
    (
        "registry_unreachable",
        "error pulling image configuration: read tcp 1.1.1.1:1->2.2.2.2:443: read: connection reset by peer",
    ),
    ("authentication", "Error response from daemon: Head https://r/v2/ai/manifests/x: no basic auth credentials"),
    ("authentication", "Error response from daemon: unauthorized: authentication required"),
    (
        "authentication",
        'error getting credentials - err: exec: "docker-credential-ecr-login": executable file not found in $PATH',
    ),
    ("authentication", "pulling from host r failed with status code [manifests x]: 403 Forbidden"),
    (
        "not_found",
        "Error response from daemon: name unknown: The repository with name 'ai' does not exist in the registry",
    ),
    (
        "engine_down",
        "Got permission denied while trying to connect to the Docker daemon socket at unix:///var/run/docker.sock",
    ),
    (
        "port_taken",
        "driver failed programming external connectivity: Bind for 0.0.0.0:8000 failed: port is already allocated",
    ),
    ("docker", "something else"),
]


@pytest.mark.parametrize(("reason", "text"), [*PULL_ERRORS.items(), *MORE_ERRORS])
def test_docker_errors_have_a_class_with_advice(reason: str, text: str) -> None:
    assert logic.classify(text) == reason
    assert logic.ADVICE[reason]


# -- the lock


def test_the_lock_names_its_holder_and_goes_with_it(tmp_path: Path) -> None:
    path = str(tmp_path / "run" / "ai-prod.lock")
    ready, done = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        lock = logic.Lock(path)
        lock.acquire(1)
        lock.sign({"by": "alice", "since": "2026-11-22T10:00:00Z", "pid": os.getpid(), "what": "the release of prod-2"})
        os.write(ready[1], b".")
        os.read(done[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    mine = logic.Lock(path)
    try:
        assert not mine.acquire(0)
        assert mine.holder() == f"alice since 2026-11-22T10:00:00Z (process {child}, the release of prod-2)"
    finally:
        os.write(done[1], b".")
        os.waitpid(child, 0)
    assert mine.acquire(0)
    assert "that process is gone" in mine.holder()


# -- arguments

GOOD: dict[str, Any] = {key: spec.get("default") for key, spec in module.ARGUMENTS.items()}
GOOD.update(
    name="ai-prod", image="084375578827.dkr.ecr.ap-northeast-2.amazonaws.com/ai", tag="prod-20250714-1752", port=8000
)


def test_good_arguments_are_accepted() -> None:
    assert logic.check_request(GOOD) == []
    assert (
        logic.check_request(
            {**GOOD, "image": "localhost:5000/ai", "memory": "64m", "user": "0", "digest": "sha256:" + "a" * 64}
        )
        == []
    )


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"name": "ai.next"}, "name is 'ai.next'; allowed: lower-case letters, digits"),
        ({"image": "r/ai:latest"}, "image is 'r/ai:latest'; allowed: a repository without tag"),
        ({"tag": "a b"}, "tag is 'a b'; allowed: one image tag"),
        ({"digest": "sha256:12"}, "digest is 'sha256:12'; allowed: sha256: and 64"),
        ({"port": 0}, "port is 0; allowed: 1 to 65535"),
        ({"port": 65536}, "port is 65536; allowed: 1 to 65535"),
        ({"container_port": 70000}, "container_port is 70000; allowed: 1 to 65535"),
        ({"memory": "63m"}, "memory is '63m'; allowed: 64m or more"),
        ({"memory": "lots"}, "memory is 'lots'; allowed: a number with b, k, m or g"),
        ({"user": "app"}, "user is 'app'; allowed: a numeric uid"),
        ({"health_path": "health"}, "health_path is 'health'; allowed: a path that begins with /"),
        ({"health_path": "/a b"}, "health_path is '/a b'; allowed: a path that begins with /, without blanks"),
        ({"health_body": "x"}, "health_body is set and health_method is GET; allowed: a body with health_method POST"),
        ({"health_request_timeout": 0.0}, "health_request_timeout is 0.0; allowed: more than 0 seconds"),
        ({"runtime": "a b"}, "runtime is 'a b'; allowed: the name of a runtime"),
        ({"shm_size": "much"}, "shm_size is 'much'; allowed: a number with b, k, m or g"),
        ({"pids_limit": -1}, "pids_limit is -1; allowed: 0 or more"),
        ({"proxy_retry_after": -1}, "proxy_retry_after is -1; allowed: 0 or more"),
        (
            {"mounts": [{"source": "models", "target": "/m", "read_only": True}]},
            "mounts[0].source is 'models'; allowed: an",
        ),
        (
            {"mounts": [{"source": "/a,b", "target": "/m", "read_only": True}]},
            "mounts[0].source is '/a,b'; allowed: an",
        ),
        ({"mounts": [{"source": "/a/../b", "target": "/m", "read_only": True}]}, "mounts[0].source is '/a/../b'"),
        (
            {"mounts": [{"source": "/a", "target": "/", "read_only": True}]},
            "mounts[0].target is '/'; allowed: a folder",
        ),
        (
            {"mounts": [{"source": "/a", "target": "/m", "read_only": True}] * 2},
            "mounts[1].target is '/m'; allowed: a folder of its own",
        ),
        ({"command": ["a\0b"]}, "command[0] has a NUL character"),
        ({"phases": [{"name": "x", "pattern": "("}]}, "phases[0] is '('; allowed: a regular expression of Python"),
        (
            {"failure_patterns": [{"pattern": "a(b)", "text": "\\2"}]},
            "failure_patterns[0] is 'a(b)'; allowed: a regular",
        ),
        ({"failure_patterns": [{"pattern": "a", "text": "\\g<x>"}]}, "failure_patterns[0] is 'a'; allowed: a regular"),
        ({"health_timeout": 0}, "health_timeout is 0; allowed: 1 or more"),
        ({"bake_time": -1}, "bake_time is -1; allowed: 0 or more"),
        ({"bake_error_percent": 101.0}, "bake_error_percent is 101.0; allowed: 0 to 100"),
        ({"keep": 0}, "keep is 0; allowed: 1 or more"),
        ({"release_ports": "30000"}, "release_ports is '30000'; allowed: two ports of 1024 to 65535"),
        ({"release_ports": "30000-20000"}, "release_ports is '30000-20000'; allowed: two ports"),
        ({"smoke": {"path": "v1"}}, "smoke.path is 'v1'; allowed: a path that begins with /"),
        ({"cpus": 0.0}, "cpus is 0.0; allowed: more than 0"),
        ({"secrets": {"TOKEN": ""}}, "secrets.TOKEN is empty; allowed: a value that is not empty"),
        ({"secrets": {"../x": "y"}}, "secrets.../x is no valid name"),
        ({"environment": {"A": {}}}, "environment.A is a dict; allowed: one value"),
        ({"environment": {"IMAGE_TAG": "x"}}, "environment.IMAGE_TAG is set by the release itself"),
        ({"environment": {"A": "x"}, "secrets": {"A": "y"}}, "environment.A is a secret too"),
    ],
)
def test_bad_arguments_are_named_with_value_and_what_is_allowed(values: dict[str, Any], text: str) -> None:
    wrong = logic.check_request({**GOOD, **values})
    assert len(wrong) == 1
    assert wrong[0].startswith(text)


@pytest.mark.parametrize(
    ("text", "size"), [("64m", 67108864), ("1g", 1 << 30), ("1.5G", 3 << 29), ("512MB", 1 << 29), ("7", 7)]
)
def test_sizes(text: str, size: int) -> None:
    assert logic.parse_size(text) == size


# -- health and ports, for real


def test_probe_and_listener_on_a_real_port() -> None:
    import http.server
    import threading

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/health" else 503)
            self.end_headers()
            self.wfile.write(b"not yet\n")

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(self.headers["X-Test"].encode() + b" " + body)

        def log_message(self, *_arguments: Any) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    port = server.server_address[1]
    health = logic.question_of({"path": "/health"})
    assert logic.probe_http("127.0.0.1", port, health, 2) is None
    assert logic.probe_http("127.0.0.1", port, health._replace(contains="yet"), 2) is None
    wrong = logic.probe_http("127.0.0.1", port, health._replace(contains="ready"), 2)
    assert wrong == "its answer does not contain 'ready': not yet"
    elsewhere = logic.probe_http("127.0.0.1", port, health._replace(path="/x"), 2)
    assert elsewhere == "it answered 503, not 200: not yet"
    smoke = logic.question_of(
        {"path": "/v1", "method": "POST", "body": "hello", "headers": {"X-Test": "oh"}, "contains": "oh hello"}
    )
    assert logic.probe_http("127.0.0.1", port, smoke, 2) is None
    assert (logic.listener("0.0.0.0", port) or "").startswith(f"process {os.getpid()} (")
    assert logic.listener("127.0.0.2", port) is None
    import socket

    with socket.create_connection(("127.0.0.1", port)):
        assert len(logic.connections("/proc/self", port)) == 1
    server.shutdown()
    server.server_close()
    assert logic.connections("/proc/self", port) == []
    assert "refused" in (logic.probe_http("127.0.0.1", port, health, 2) or "")
    assert logic.listener("0.0.0.0", port) is None


def test_an_answer_that_never_ends_is_none() -> None:
    import http.server
    import threading
    import time

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            for _event in range(30):  # each of them in time
                self.wfile.write(b"data: still here\n\n")
                time.sleep(0.1)

        def log_message(self, *_arguments: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.handle_error = lambda *_arguments: None  # type: ignore[method-assign] # the client leaves on purpose
    threading.Thread(target=server.serve_forever, daemon=True).start()
    began = time.monotonic()
    health = logic.question_of({"path": "/events"})
    assert logic.probe_http("127.0.0.1", server.server_address[1], health, 0.5) == "timed out"
    assert time.monotonic() - began < 2
    server.shutdown()
    server.server_close()


# -- an engine that hangs


@pytest.mark.parametrize("code", [124, 137, -9])
def test_a_docker_command_that_does_not_end_is_an_engine_that_is_down(code: int) -> None:
    asked: list[list[str]] = []

    def run(argv: Any) -> tuple[int, str, str]:
        asked.append(list(argv))
        return code, "", ""

    docker = logic.Docker(run, "/usr/bin/timeout")
    commands: list[Any] = [
        docker.info, lambda: docker.containers(["x"]), lambda: docker.of_service("x"), lambda: docker.image("x"),
        lambda: docker.create([]), lambda: docker.start("x"), lambda: docker.rename("x", "y"), lambda: docker.unpause("x"),
        lambda: docker.remove("x"), lambda: docker.log("x", 9), lambda: docker.remove_image("x"),
        lambda: docker.stop("x", 300), lambda: docker.restart("x", 300),
    ]  # fmt: skip
    for command in commands:
        with pytest.raises(logic.ReleaseError) as caught:
            command()
        assert caught.value.reason == "engine_down"
    assert all(words[0] == "/usr/bin/timeout" and words[3] == "docker" for words in asked)
    patient = [int(words[2]) for words in asked if words[5] in ("stop", "restart")]
    assert len(patient) == 2
    assert min(patient) > 300, "what may take its time is given it"
    with pytest.raises(logic.ReleaseError) as caught:
        docker.pull("x", 5)
    assert caught.value.reason == "pull_timeout"


@pytest.mark.parametrize("what", ["stop", "start", "rm", "restart", "unpause"])
def test_a_container_that_hangs_is_no_engine_that_is_down(what: str) -> None:
    there = {"Name": "/ai-prod.one", "State": {"Status": "running"}}

    def run(argv: Any) -> tuple[int, str, str]:
        return (0, json.dumps(there), "") if "inspect" in argv else (124, "", "")

    docker = logic.Docker(run, "/usr/bin/timeout")
    commands: dict[str, Callable[[str], None]] = {
        "stop": lambda name: docker.stop(name, 10), "start": docker.start, "rm": docker.remove,
        "restart": lambda name: docker.restart(name, 10), "unpause": docker.unpause,
    }  # fmt: skip
    with pytest.raises(logic.ReleaseError) as caught:
        commands[what]("ai-prod.one")
    assert caught.value.reason == "docker"
    assert f"docker container {what} ai-prod.one took more than" in caught.value.text
    assert "the container is running" in caught.value.text


# -- the module as Ansible runs it


def run_module(
    world: World,
    params: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    docker: bool = True,
    **options: Any,
) -> dict[str, Any]:
    from ansible.module_utils import basic
    from ansible.module_utils.testing import patch_module_args

    folder = world.path / "bin"
    folder.mkdir(exist_ok=True)
    if docker:
        script = folder / "docker"
        script.write_text(f'#!/bin/sh\nexec {sys.executable} {Path(__file__).with_name("fake_docker.py")} "$@"\n')
        script.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setenv("FAKE_DOCKER", str(world.engine.path))
    monkeypatch.setattr(basic, "get_best_parsable_locale", lambda *_arguments, **_values: "C", raising=False)
    defaults = (False, world.probe, lambda _a, _p: None, lambda: world.memory, world.sleep, lambda: world.now)
    monkeypatch.setattr(release_flow.Releaser.__init__, "__defaults__", (*defaults, lambda _text: None))
    monkeypatch.setattr(module, "HAProxy", lambda *_arguments, **_values: world.proxy)
    locks: list[logic.Lock] = []

    def make_lock(path: str) -> logic.Lock:
        locks.append(logic.Lock(path))
        return locks[-1]

    monkeypatch.setattr(module, "Lock", make_lock)
    given = {key: value for key, value in params.items() if value is not None}
    with (
        patch_module_args({**given, **{f"_ansible_{key}": value for key, value in options.items()}}),
        pytest.raises(SystemExit),
    ):
        module.main()
    for lock in locks:
        lock.release()  # as the end of the process would
    out = capfd.readouterr().out
    assert SECRET not in out
    data: dict[str, Any] = json.loads(out)
    return data


def test_module_releases_with_a_diff_that_says_what(
    world: World, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    first = run_module(world, world.params(1), monkeypatch, capfd, diff=True)
    assert (first["changed"], first["action"], first["release"]["tag"]) == (True, "released", ONE)
    second = run_module(world, world.params(2, secrets={"TOKEN": SECRET + "2"}), monkeypatch, capfd, diff=True)
    assert second["previous"]["tag"] == ONE
    assert f'"tag": "{ONE}"' in second["diff"]["before"]
    assert f'"tag": "{TWO}"' in second["diff"]["after"]
    before, after = (json.loads(second["diff"][side])["secrets_revision"] for side in ("before", "after"))
    assert before != after
    third = run_module(world, world.params(2, secrets={"TOKEN": SECRET + "2"}), monkeypatch, capfd, diff=True)
    assert not third["changed"]
    assert "diff" not in third
    world.expect_settled(TWO)


def test_module_failure_is_one_line_and_the_log(
    world: World, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run_module(world, world.params(1), monkeypatch, capfd)
    failed = run_module(world, world.params(3), monkeypatch, capfd)
    assert failed["failed"]
    assert failed["reason"] == "unhealthy"
    lines = failed["msg"].splitlines()
    assert lines[0].startswith(
        f"ai-prod: registry/ai:{BROKEN} ({image(3)['digest']}) failed [unhealthy]: GET /health on its port "
    )
    assert lines[0].endswith(logic.ADVICE["unhealthy"])
    assert lines[1:] == ["Its last log lines:", f"  starting {BROKEN}", f"  RuntimeError: {BROKEN} is broken"]
    assert failed["release"]["tag"] == ONE


def test_module_masks_a_secret_that_the_release_logs(
    world: World, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    world.engine.set(log=f"token is {SECRET}\n")
    failed = run_module(world, world.params(3), monkeypatch, capfd)
    assert "token is ****" in failed["msg"]


def test_module_refuses_bad_arguments_in_one_line(
    world: World, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    failed = run_module(world, world.params(1, port=99999, memory="1m"), monkeypatch, capfd)
    assert failed["msg"] == "ai-prod: port is 99999; allowed: 1 to 65535; memory is '1m'; allowed: 64m or more"
    assert world.engine.calls == []


@pytest.mark.parametrize("state", ["present", "absent"])
def test_module_on_a_host_without_docker(
    world: World, state: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from ansible.module_utils import basic

    warned: list[str] = []  # beside the controller's own code, which other tests load, a warning is in no result
    monkeypatch.setattr(basic.AnsibleModule, "warn", lambda _self, text, **_options: warned.append(text))
    foreseen = run_module(
        world, world.params(1, state=state), monkeypatch, capfd, docker=False, check_mode=True, diff=True
    )
    assert not foreseen.get("failed")
    assert foreseen["changed"] is (state == "present")
    assert len(warned) == 1
    assert not (world.path / "lib").exists()
    failed = run_module(world, world.params(1, state=state), monkeypatch, capfd, docker=False)
    assert failed["reason"] == "docker_missing"


def test_module_waits_for_the_lock_and_names_the_holder(
    world: World, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    held = logic.Lock(str(world.path / "run/ai-prod.lock"))
    held.acquire(0)
    held.sign({"by": "bob", "since": "2026-11-22T10:00:00Z", "pid": os.getpid(), "what": "prod-9"})
    failed = run_module(world, world.params(1, lock_timeout=0), monkeypatch, capfd)
    assert failed["reason"] == "lock"
    assert "bob since 2026-11-22T10:00:00Z" in failed["msg"]


def test_module_leaves_only_what_was_seen_to_answer(
    world: World, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    world.release(1)
    seen = world.release(2).current
    world.release(4)
    params = world.params(None, state="rolled_back", image=None, port=None, release=ONE, current=seen)
    refused = run_module(world, params, monkeypatch, capfd)
    said = f"the rollback to {ONE} failed [lock]: another run was faster, and {TAGS[4]} answers since this one looked. "
    assert said in refused["msg"]
    world.expect_settled(TAGS[4])
    assert run_module(world, {**params, "current": world.state()["current"]}, monkeypatch, capfd)["changed"]
    world.expect_settled(ONE)


def test_documentation_and_arguments_agree() -> None:
    import yaml

    documented = yaml.safe_load(module.DOCUMENTATION)["options"]
    assert set(documented) == set(module.ARGUMENTS)
    for name, spec in module.ARGUMENTS.items():
        for key in ("type", "default", "required", "choices", "elements"):
            assert documented[name].get(key) == spec.get(key), (name, key)
    yaml.safe_load(module.EXAMPLES)
    yaml.safe_load(module.RETURN)
