"""nemo.platform.container_release against a fake engine: every path of a release, and a kill at every step of each."""

from __future__ import annotations

import functools
import json
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from ansible_collections.nemo.platform.plugins.module_utils import container_release as logic
from ansible_collections.nemo.platform.plugins.modules import container_release as module
from tests.unit.plugins.modules.fake_docker import FakeDocker, image

USER = f"{os.getuid()}:{os.getgid()}"
SECRET = "s3cret-value-that-must-not-appear"


class World:
    """One host: its engine, its files, its clock."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.engine = FakeDocker(path / "engine.json")
        self.listening: str | None = None
        self.engine.push("prod-1", image(1))
        self.engine.push("prod-2", image(2))
        self.engine.push("broken", image(3, "unhealthy"))

    def params(self, number: int | None, **values: Any) -> dict[str, Any]:
        tag = {1: "prod-1", 2: "prod-2", 3: "broken"}.get(number or 0)
        given = {
            "name": "ai-prod",
            "image": "registry/ai",
            "tag": tag,
            "digest": image(number)["digest"] if number else None,
            "port": 8000,
            "user": USER,
            "health_timeout": 3,
            "min_free_disk_mb": 0,
            "state_path": str(self.path / "lib"),
            "run_path": str(self.path / "run"),
            "secrets": {"TOKEN": SECRET},
        }
        defaults = {key: spec.get("default") for key, spec in module.ARGUMENTS.items()}
        return {**defaults, **given, **values}

    def releaser(
        self, params: dict[str, Any], check_mode: bool = False, event: Callable[[str], None] | None = None
    ) -> logic.Releaser:
        happened = event or (lambda what: None)

        def run(argv: Sequence[str]) -> tuple[int, str, str]:
            result = self.engine.run(argv)
            happened("docker " + " ".join(argv[1:3]))
            return result

        now = [0.0]
        return logic.Releaser(
            params,
            logic.Docker(run),
            logic.Store(params["name"], params["state_path"], params["run_path"], after=happened),
            "tester",
            check_mode=check_mode,
            probe=self.engine.probe,
            find_listener=lambda _address, port: self.listening or self.engine.listener(port),
            sleep=lambda seconds: now.__setitem__(0, now[0] + seconds),
            clock=lambda: now[0],
        )

    def release(self, number: int | None, **values: Any) -> logic.Releaser:
        releaser = self.releaser(self.params(number, **values))
        releaser.present()
        return releaser

    def failing(self, number: int | None, **values: Any) -> tuple[logic.ReleaseError, logic.Releaser]:
        releaser = self.releaser(self.params(number, **values))
        with pytest.raises(logic.ReleaseError) as caught:
            releaser.present()
        return caught.value, releaser

    def record(self) -> dict[str, Any]:
        data: dict[str, Any] = json.loads((self.path / "lib/ai-prod/release.json").read_text())
        return data

    def left(self) -> list[str]:
        """What lies in the service's folder."""
        base = self.path / "lib/ai-prod"
        return sorted(str(path.relative_to(base)) for path in base.rglob("*") if path.is_file())

    def expect_settled(self, *tags: str) -> None:
        """Exactly one container, serving, of a known release that is recorded, and nothing left over."""
        containers = self.engine.containers()
        assert list(containers) == ["ai-prod"]
        live = containers["ai-prod"]
        assert live["status"] == "running"
        assert live["behaviour"] == "healthy"
        assert live["labels"]["nemo.tag"] in tags
        record = self.record()
        assert record["release"] == live["labels"]["nemo.release"]
        assert self.left() == ["release.json", f"releases/{record['release']}/secrets/TOKEN"]


@pytest.fixture(autouse=True)
def _no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _descriptor: None)  # no power is lost here, and there are 2,000 of them


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """In memory where there is some: a kill at every step makes thousands of small files."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        yield Path(folder)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


# -- the plain paths


def test_first_release_runs_and_is_recorded(world: World) -> None:
    done = world.release(1)
    assert (done.changed, done.action) == (True, "released")
    world.expect_settled("prod-1")
    record = world.record()
    assert record["digest"] == image(1)["digest"]
    assert record["image_id"] == image(1)["id"]
    assert record["by"] == "tester"
    assert record["previous"] is None


def test_no_change_costs_one_docker_command(world: World) -> None:
    world.release(1)
    world.engine.calls.clear()
    done = world.release(1)
    assert (done.changed, done.action) == (False, "none")
    assert [call[:2] for call in world.engine.calls] == [["container", "inspect"]]


def test_replacement_keeps_the_previous_image_and_prunes_older_ones(world: World) -> None:
    world.engine.push("prod-0", image(9))
    world.release(None, tag="prod-0")
    world.release(1)
    done = world.release(2)
    assert (done.changed, done.action) == (True, "replaced")
    world.expect_settled("prod-2")
    assert world.record()["previous"]["tag"] == "prod-1"
    assert {entry["digest"] for entry in world.engine.load()["images"]} == {image(1)["digest"], image(2)["digest"]}


def test_prune_leaves_what_another_service_or_repository_needs(world: World) -> None:
    world.engine.push("prod-0", image(9))
    other = image(8, repository="registry/other")
    world.engine.push("x", other)
    world.engine.set(images=[image(9), other, image(7)])
    world.engine.container("unrelated", image=image(7)["id"], port=9999)
    world.release(None, name="ai-dev", tag="prod-0", port=8001)
    world.release(1)
    assert {entry["id"] for entry in world.engine.load()["images"]} == {image(number)["id"] for number in (1, 7, 8, 9)}


def test_a_digest_that_is_here_is_not_pulled(world: World) -> None:
    world.engine.set(images=[image(1)], errors={"pull": "dial tcp: no such host"})
    world.release(1)
    world.expect_settled("prod-1")


def test_an_image_known_by_its_id_alone_is_run(world: World) -> None:
    loaded = {**image(4), "digest": ""}
    world.engine.set(images=[loaded])
    world.release(None, tag="prod-4", digest=loaded["id"])
    assert world.engine.containers()["ai-prod"]["argv"][-1] == loaded["id"]


def test_without_a_digest_the_tag_is_resolved_in_every_run(world: World) -> None:
    assert world.release(None, tag="prod-1").changed
    assert world.record()["digest"] == image(1)["digest"]
    assert not world.release(None, tag="prod-1").changed
    state = world.engine.load()
    state["registry"]["registry/ai:prod-1"] = image(2)  # the tag was moved
    world.engine.save(state)
    assert world.release(None, tag="prod-1").changed
    assert world.record()["digest"] == image(2)["digest"]


@pytest.mark.parametrize(
    "values",
    [{"memory": "2g"}, {"environment": {"A": "b"}}, {"secrets": {"TOKEN": "other"}}, {"cpus": 1.5}, {"port": 8010}],
    ids=lambda values: next(iter(values)),
)
def test_a_change_of_settings_is_a_new_release(world: World, values: dict[str, Any]) -> None:
    world.release(1)
    assert world.release(1, **values).action == "replaced"
    assert not world.release(1, **values).changed


def test_health_settings_alone_are_no_new_release(world: World) -> None:
    world.release(1)
    assert not world.release(1, health_path="/ready", health_timeout=9).changed


def test_container_is_confined_and_knows_its_release(world: World) -> None:
    world.release(1, environment={"FLAG": True, "DOLLAR": "$HOME"})
    argv = world.engine.containers()["ai-prod"]["argv"]
    text = " ".join(argv)
    for part in (
        "--init",
        "--read-only",
        "--cap-drop ALL",
        "--security-opt no-new-privileges",
        "--restart unless-stopped",
        "--memory 1073741824 --memory-swap 1073741824",
        "--log-opt max-size=10m --log-opt max-file=3",
        "--publish 0.0.0.0:8000:8000",
        f"--user {USER}",
        "--env FLAG=true",
        "--env DOLLAR=$HOME",
        "--env IMAGE_TAG=prod-1",
        f"--env IMAGE_DIGEST={image(1)['digest']}",
        "--env RELEASE_ID=",
        "--label nemo.spec=",
        "--tmpfs /tmp:",
    ):
        assert part in text
    assert argv[-1] == f"registry/ai@{image(1)['digest']}"


def test_secrets_are_files_of_the_container_alone(world: World) -> None:
    done = world.release(1)
    release = world.record()["release"]
    folder = world.path / "lib/ai-prod/releases" / release / "secrets"
    assert (folder / "TOKEN").read_text() == SECRET
    assert stat.S_IMODE((folder / "TOKEN").stat().st_mode) == 0o400
    assert stat.S_IMODE(folder.stat().st_mode) == 0o500
    assert stat.S_IMODE(folder.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE((world.path / "lib/ai-prod").stat().st_mode) == 0o700
    assert stat.S_IMODE((world.path / "lib/.key").stat().st_mode) == 0o600
    assert f"--volume {folder}:/run/secrets:ro,Z" in " ".join(world.engine.containers()["ai-prod"]["argv"])
    shown = json.dumps(
        [world.engine.containers(), world.record(), module.difference("ai-prod", done.before, done.after)]
    )
    assert SECRET not in shown


def test_a_release_that_lost_its_secrets_is_made_again(world: World) -> None:
    world.release(1)
    release = world.record()["release"]
    shutil.rmtree(world.path / "lib/ai-prod/releases" / release)
    foreseen = world.releaser(world.params(1), check_mode=True)
    foreseen.present()
    assert foreseen.action == "recovered"
    assert world.release(1).changed
    world.expect_settled("prod-1")
    folder = world.path / "lib/ai-prod/releases" / world.record()["release"] / "secrets"
    assert (folder / "TOKEN").read_text() == SECRET
    assert not world.release(1).changed


# -- what goes wrong


def test_an_unhealthy_release_is_replaced_by_the_old_one(world: World) -> None:
    world.release(1)
    error, done = world.failing(3)
    assert error.reason == "unhealthy"
    assert "The old release (prod-1) serves again" in error.text
    assert error.log_tail == ["starting broken", "RuntimeError: broken is broken"]
    assert done.action == "restored"
    world.expect_settled("prod-1")


@pytest.mark.parametrize(
    ("behaviour", "reason", "text"),
    [
        ("crash", "unhealthy", "ended with status 3"),
        ("loop", "unhealthy", "ended with status"),
        ("unhealthy", "unhealthy", "no healthy answer within 3 s: it answered 503"),
        ("nostart", "platform", "exec format error"),
    ],
)
def test_each_way_of_not_coming_up(world: World, behaviour: str, reason: str, text: str) -> None:
    world.release(1)
    world.engine.push("bad", image(6, behaviour))
    error, _done = world.failing(None, tag="bad")
    assert error.reason == reason
    assert text in error.text
    world.expect_settled("prod-1")


def test_a_slow_start_is_waited_for(world: World) -> None:
    world.engine.push("slow", image(6, "slow:4"))
    world.release(None, tag="slow")
    assert world.record()["tag"] == "slow"


def test_a_failing_first_release_leaves_nothing(world: World) -> None:
    error, done = world.failing(3)
    assert "nothing serves now" in error.text
    assert error.log_tail
    assert done.action == "removed"
    assert world.engine.containers() == {}
    assert world.left() == []


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


@pytest.mark.parametrize("reason", PULL_ERRORS)
def test_a_failing_pull_never_touches_the_old_release(world: World, reason: str) -> None:
    world.release(1)
    before = world.engine.containers()
    world.engine.set(errors={"pull": PULL_ERRORS[reason]})
    error, done = world.failing(2)
    assert error.reason == reason
    assert error.advice
    assert not done.changed
    after = world.engine.containers()
    after["ai-prod"]["asked"] = before["ai-prod"]["asked"]
    assert after == before
    world.expect_settled("prod-1")


def test_a_failing_create_never_touches_the_old_release(world: World) -> None:
    world.release(1)
    world.engine.set(errors={"container create": "mkdir: no space left on device"})
    error, _done = world.failing(2)
    assert error.reason == "no_space"
    world.engine.set(errors={})
    world.release(1)
    world.expect_settled("prod-1")


def test_a_foreign_platform_is_found_before_the_switch(world: World) -> None:
    world.release(1)
    world.engine.push("arm", image(6, platform="arm64"))
    error, _done = world.failing(None, tag="arm")
    assert error.reason == "platform"
    assert "linux/arm64" in error.text
    assert "linux/amd64" in error.text
    world.expect_settled("prod-1")


def test_a_taken_port_names_its_holder(world: World) -> None:
    world.engine.container("nginx", port=8000)
    error, _done = world.failing(1)
    assert (error.reason, error.text) == ("port_taken", "port 8000 is taken by container nginx")
    world.engine.container("nginx", port=80)
    world.listening = "process 4711 (python3)"
    error, _done = world.failing(1)
    assert error.text == "port 8000 is taken by process 4711 (python3)"


def test_more_memory_than_the_host_has_is_refused(world: World) -> None:
    error, _done = world.failing(1, memory="5g")
    assert error.reason == "memory"
    assert "4096 MiB" in error.text


def test_a_full_disk_is_refused_before_the_pull_and_old_images_go_first(world: World) -> None:
    world.release(1)
    state = world.engine.load()
    state["images"].append(image(9))
    world.engine.save(state)
    error, _done = world.failing(2, min_free_disk_mb=10**9)
    assert error.reason == "no_space"
    assert "MB free" in error.text
    assert image(9)["id"] not in [entry["id"] for entry in world.engine.load()["images"]]
    world.expect_settled("prod-1")


def test_a_failing_commit_is_undone(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.release(1)
    write = logic.Store.write

    def full(self: logic.Store, what: str, data: dict[str, Any]) -> None:
        if what == "release.json":
            raise OSError(28, "No space left on device")
        write(self, what, data)

    monkeypatch.setattr(logic.Store, "write", full)
    error, _done = world.failing(2)
    assert error.reason == "no_space"
    world.expect_settled("prod-1")


def test_an_old_release_that_does_not_come_back_is_said(world: World) -> None:
    world.release(1)
    state = world.engine.load()
    state["containers"]["ai-prod"]["behaviour"] = "crash"
    world.engine.save(state)
    error, _done = world.failing(3)
    assert "THE OLD RELEASE DOES NOT SERVE EITHER" in error.text


# -- a host that is not as the last run left it


def test_a_stopped_release_serves_again(world: World) -> None:
    world.release(1)
    world.engine.container("ai-prod", status="exited")
    done = world.release(1)
    assert (done.changed, done.action) == (True, "recovered")
    world.expect_settled("prod-1")


def test_a_stopped_release_serves_again_even_when_the_new_one_cannot_be_pulled(world: World) -> None:
    world.release(1)
    world.engine.container("ai-prod", status="exited")
    world.engine.set(errors={"pull": PULL_ERRORS["registry_unreachable"]})
    error, _done = world.failing(2)
    assert error.reason == "registry_unreachable"
    world.expect_settled("prod-1")
    world.engine.set(errors={})
    world.engine.container("ai-prod", status="exited")
    world.release(2)
    world.expect_settled("prod-2")


def test_a_paused_release_serves_again(world: World) -> None:
    world.release(1)
    world.engine.container("ai-prod", status="paused")
    assert world.release(1).changed
    world.expect_settled("prod-1")


def test_a_release_that_hangs_is_replaced(world: World) -> None:
    world.release(1)
    first = world.record()["release"]
    world.engine.container("ai-prod", behaviour="unhealthy")
    assert world.release(1).changed
    world.expect_settled("prod-1")
    assert world.record()["release"] != first


def test_a_removed_container_is_made_again(world: World) -> None:
    world.release(1)
    state = world.engine.load()
    state["containers"].clear()
    world.engine.save(state)
    assert world.release(1).changed
    world.expect_settled("prod-1")


def test_a_container_of_other_origin_is_moved_from_and_put_back(world: World) -> None:
    world.engine.container("ai-prod")
    world.failing(3)
    assert world.engine.serving() == ["ai-prod"]
    assert world.engine.containers()["ai-prod"]["labels"] == {}
    assert world.release(1).action == "replaced"
    world.expect_settled("prod-1")


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"format": 99}'])
def test_a_lost_or_damaged_record_is_made_again(world: World, content: str | None, number: int) -> None:
    world.release(1)
    path = world.path / "lib/ai-prod/release.json"
    path.unlink() if content is None else path.write_text(content)
    world.release(number)
    world.expect_settled(f"prod-{number}")


def test_a_stop_that_the_engine_does_late_does_not_take_the_service_down(world: World) -> None:
    """Killed inside docker stop: the container still runs when the next run looks, and is stopped a moment later."""
    world.release(1)
    with_kill(world, 2, "docker container stop")
    state = world.engine.load()
    state["containers"]["ai-prod.previous"]["status"] = "running"
    state["late"] = True
    world.engine.save(state)
    world.release(1)
    world.engine.finish_late_stop()
    world.expect_settled("prod-1")


def test_absent_leaves_nothing(world: World) -> None:
    world.release(1)
    world.engine.container("ai-prod.previous", status="exited")
    params = world.params(None, state="absent", image="registry/ai")
    done = world.releaser(params)
    done.absent()
    assert (done.changed, done.action) == (True, "removed")
    assert world.engine.containers() == {}
    assert world.engine.load()["images"] == []
    assert not (world.path / "lib/ai-prod").exists()
    again = world.releaser(params)
    again.absent()
    assert not again.changed


# -- check mode


def everything(path: Path) -> dict[str, bytes]:
    return {str(entry): entry.read_bytes() for entry in sorted(path.rglob("*")) if entry.is_file()}


@pytest.mark.parametrize(("number", "action"), [(1, "none"), (2, "replaced")])
def test_check_mode_foresees_and_touches_nothing(world: World, number: int, action: str) -> None:
    world.release(1)
    state = world.engine.load()
    before = everything(world.path / "lib")
    done = world.releaser(world.params(number), check_mode=True)
    done.present()
    assert (done.action, done.changed) == (action, action != "none")
    assert everything(world.path / "lib") == before
    after = world.engine.load()
    after["containers"]["ai-prod"]["asked"] = state["containers"]["ai-prod"]["asked"]
    assert after == state


def test_check_mode_on_an_empty_host(world: World) -> None:
    done = world.releaser(world.params(1), check_mode=True)
    done.present()
    assert done.action == "released"
    assert not (world.path / "lib").exists()


def test_check_mode_sees_an_interrupted_release(world: World) -> None:
    world.release(1)
    with_kill(world, 2, "docker container rename")
    done = world.releaser(world.params(1), check_mode=True)
    done.present()
    assert done.changed


# -- a kill at every step


def counted(world: World, number: int) -> list[str]:
    """The steps of a release, in order."""
    steps: list[str] = []
    releaser = world.releaser(world.params(number), event=steps.append)
    try:
        releaser.present()
    except logic.ReleaseError:
        pass
    return steps


def with_kill(world: World, number: int, at: int | str) -> str:
    """Release in a process of its own that dies right after a step, as by SIGKILL: no handler, no finally runs."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        steps = 0

        def event(what: str) -> None:
            nonlocal steps
            steps += 1
            if at in (steps, what):
                os.write(writer, what.encode())
                os._exit(137)

        try:
            world.releaser(world.params(number), event=event).present()
        finally:
            os._exit(0)
    os.close(writer)
    _pid, status = os.waitpid(child, 0)
    what = os.read(reader, 200).decode()
    os.close(reader)
    assert os.waitstatus_to_exitcode(status) == 137, f"the run ended before step {at}"
    return what


SCENARIOS = {"first": (None, 1), "first failing": (None, 3), "replacing": (1, 2), "failing": (1, 3), "settings": (2, 2)}


def prepare(path: Path, scenario: str) -> World:
    world = World(path)
    start = SCENARIOS[scenario][0]
    if start:
        world.release(start, **({"memory": "512m"} if scenario == "settings" else {}))
    return world


@functools.cache
def points() -> list[tuple[str, int]]:
    found = []
    for scenario, (_start, number) in SCENARIOS.items():
        with tempfile.TemporaryDirectory() as folder:
            found += [(scenario, at + 1) for at in range(len(counted(prepare(Path(folder), scenario), number)))]
    return found


@pytest.mark.parametrize("then", ["again", "back", "other"])
@pytest.mark.parametrize(("scenario", "at"), points())
def test_after_a_kill_at_any_step_the_next_run_ends_well(tmp_path: Path, scenario: str, at: int, then: str) -> None:
    world = prepare(tmp_path, scenario)
    start, number = SCENARIOS[scenario]
    with_kill(world, number, at)
    following = {"again": number, "back": start or 1, "other": 1 if number == 2 else 2}[then]
    try:
        world.release(following)
    except logic.ReleaseError:
        assert following == 3
        if start is None:
            assert world.engine.containers() == {}
            assert [name for name in world.left() if name != "release.json"] == []
            return
        world.expect_settled("prod-1")
        return
    assert following != 3
    world.expect_settled(f"prod-{following}")
    assert not world.release(following).changed


@pytest.mark.parametrize(("scenario", "at"), [point for point in points() if point[0] in ("replacing", "failing")])
def test_two_kills_in_a_row_are_survived_too(tmp_path: Path, scenario: str, at: int) -> None:
    for second in range(1 + at % 3, 40, 3):  # a third of all pairs; neighbours differ by a look at the engine
        path = tmp_path / str(second)
        path.mkdir()
        world = prepare(path, scenario)
        number = SCENARIOS[scenario][1]
        with_kill(world, number, at)
        try:
            with_kill(world, number, second)
        except AssertionError:
            break
        world.release(1)
        world.expect_settled("prod-1")


def test_a_kill_before_the_old_release_is_stopped_takes_nothing_down(tmp_path: Path) -> None:
    steps = counted(prepare(tmp_path, "replacing"), 2)
    for at in range(1, steps.index("docker container stop") + 1):
        path = tmp_path / str(at)
        path.mkdir()
        world = prepare(path, "replacing")
        with_kill(world, 2, at)
        assert [world.engine.containers()[name]["labels"]["nemo.tag"] for name in world.engine.serving()] == ["prod-1"]


# -- the lock


def test_the_lock_names_its_holder_and_goes_with_it(tmp_path: Path) -> None:
    path = str(tmp_path / "run" / "ai-prod.lock")
    ready, done = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        lock = logic.Lock(path)
        lock.acquire(1)
        lock.sign({"by": "alice", "since": "2026-11-22T10:00:00Z", "pid": os.getpid(), "what": "prod-2"})
        os.write(ready[1], b".")
        os.read(done[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    mine = logic.Lock(path)
    try:
        assert not mine.acquire(0)
        assert mine.holder() == f"alice since 2026-11-22T10:00:00Z (process {child}, releasing prod-2)"
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
        ({"health_timeout": 0}, "health_timeout is 0; allowed: 1 or more"),
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

        def log_message(self, *_arguments: Any) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    port = server.server_address[1]
    assert logic.probe_http("127.0.0.1", port, "/health", 200, 2) is None
    assert logic.probe_http("127.0.0.1", port, "/x", 200, 2) == "it answered 503, not 200: not yet"
    assert (logic.listener("0.0.0.0", port) or "").startswith(f"process {os.getpid()} (")
    assert logic.listener("127.0.0.2", port) is None
    server.shutdown()
    server.server_close()
    assert "refused" in (logic.probe_http("127.0.0.1", port, "/health", 200, 2) or "")
    assert logic.listener("0.0.0.0", port) is None


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
    monkeypatch.setattr(
        logic.Releaser.__init__,
        "__defaults__",
        (False, world.engine.probe, lambda _a, _p: None, lambda _s: None, FakeClock()),
    )
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


class FakeClock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


def test_module_releases_with_a_diff_that_says_what(
    world: World, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    first = run_module(world, world.params(1), monkeypatch, capfd, diff=True)
    assert (first["changed"], first["action"], first["release"]["tag"]) == (True, "released", "prod-1")
    second = run_module(world, world.params(2, secrets={"TOKEN": SECRET + "2"}), monkeypatch, capfd, diff=True)
    assert second["previous"]["tag"] == "prod-1"
    assert '"tag": "prod-1"' in second["diff"]["before"]
    assert '"tag": "prod-2"' in second["diff"]["after"]
    before, after = (json.loads(second["diff"][side])["secrets_revision"] for side in ("before", "after"))
    assert before != after
    third = run_module(world, world.params(2, secrets={"TOKEN": SECRET + "2"}), monkeypatch, capfd, diff=True)
    assert not third["changed"]
    assert "diff" not in third
    world.expect_settled("prod-2")


def test_module_failure_is_one_line_and_the_log(
    world: World, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run_module(world, world.params(1), monkeypatch, capfd)
    failed = run_module(world, world.params(3), monkeypatch, capfd)
    assert failed["failed"]
    assert failed["reason"] == "unhealthy"
    lines = failed["msg"].splitlines()
    assert lines[0].startswith(
        f"ai-prod: registry/ai:broken ({image(3)['digest']}) failed [unhealthy]: http://127.0.0.1:8000/health gave no"
    )
    assert lines[0].endswith(logic.ADVICE["unhealthy"])
    assert lines[1:] == ["Its last log lines:", "  starting broken", "  RuntimeError: broken is broken"]
    assert failed["release"]["tag"] == "prod-1"


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


@pytest.mark.parametrize("when", ["before the pull", "after a prune in the middle"])
def test_lock_of_the_images_that_another_run_keeps_is_named(
    world: World, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    held = logic.Lock(str(world.path / "run/images.lock"))
    values: dict[str, Any] = {"lock_timeout": 0}
    if when == "before the pull":
        held.acquire(0)
    else:
        values["min_free_disk_mb"] = 10**9
        monkeypatch.setattr(logic.Releaser, "prune", lambda self: held.acquire(0))
    error, _done = world.failing(1, **values)
    assert error.reason == "lock"
    assert "images.lock" in str(error)
    assert world.engine.containers() == {}


def test_documentation_and_arguments_agree() -> None:
    import yaml

    documented = yaml.safe_load(module.DOCUMENTATION)["options"]
    assert set(documented) == set(module.ARGUMENTS)
    for name, spec in module.ARGUMENTS.items():
        for key in ("type", "default", "required", "choices", "elements"):
            assert documented[name].get(key) == spec.get(key), (name, key)
    yaml.safe_load(module.EXAMPLES)
    yaml.safe_load(module.RETURN)
