"""The watchdog of the inference server: when it restarts, and above all when it does not."""

from __future__ import annotations

import fcntl
import importlib.util
import json
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.unit.helpers import ROOT

START = 1_800_000_000.0
RELEASE = "20260101T000000Z-aaaaaa"


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("vllm_watchdog", ROOT / "roles/vllm/files/vllm-watchdog.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


program = load()


class Server(BaseHTTPRequestHandler):
    """An engine that answers, hangs, refuses, or is busy."""

    mood = "good"
    tokens = 100.0
    asked: list[str] = []  # noqa: RUF012 - shared on purpose
    hold = threading.Event()

    def do_GET(self) -> None:
        text = f'# HELP x\nvllm:generation_tokens_total{{model_name="m"}} {type(self).tokens}\nvllm:prompt_tokens_total {len(self.asked)}\n'
        text += f'vllm:request_success_total{{finished_reason="abort",model_name="m"}} {len(self.asked)}\n'
        self.answer(200, text if self.mood != "silent" else "")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        type(self).asked.append(body)
        if self.mood == "busy":
            type(self).tokens += 50
        if self.mood in ("hang", "busy", "silent"):
            type(self).tokens += 1  # of the question itself, when it is given up
            type(self).hold.wait(5)
            return
        if self.mood == "good":
            type(self).tokens += 1
        codes = {"good": 200, "refuse": 404, "dead": 500, "odd": 200}
        self.answer(codes[self.mood], '{"choices": []}' if self.mood == "good" else '{"error": "no"}')

    def answer(self, code: int, text: str) -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_arguments: Any) -> None:
        pass


class World:
    """A host: its files, its clock, a server and a docker command."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder, self.now, self.status, self.started = folder, START, "running", START - 1000
        self.again, self.error = 0, ""
        self.commands: list[list[str]] = []
        self.restart_code = 0
        self.config: dict[str, Any] = {
            "service": "vllm", "services": str(folder), "locks": str(folder / "run"), "state": str(folder / "vllm-watchdog"),
            "strikes": 3, "max_restarts": 2, "window": 3600, "load_timeout": 600,
            "mount_point": "", "valid": 450,
        }  # fmt: skip
        (folder / "vllm").mkdir()
        (folder / "vllm-watchdog").mkdir()
        health = {
            "method": "POST",
            "path": "/v1/completions",
            "body": '{"max_tokens": 1}',
            "contains": '"choices"',
            "status": 200,
        }
        self.release(RELEASE, {"release": RELEASE, "host_port": port, "health": health})

    def release(self, current: str, *entries: dict[str, Any]) -> None:
        state = {"format": 2, "current": current, "releases": list(entries)}
        (self.folder / "vllm/state.json").write_text(json.dumps(state))

    def run(self, argv: list[str], _timeout: float) -> tuple[int, str]:
        self.commands.append(argv)
        if "inspect" in argv:
            told = f"{self.status} {program.utc(self.started)} {self.again} {self.error}\n"
            return (0, told) if self.status else (1, "No such container")
        if "restart" in argv:
            # what was written down before it
            assert self.state["restarts"] or self.state["starts"]
            assert self.state["state"] == "restarting"
            if not self.restart_code:
                self.status, self.started, self.again, self.error = "running", self.now, 0, ""
            return self.restart_code, "cannot"
        return 0, "Traceback\nlast line\n"

    def crash(self) -> None:
        """It ends by itself, and the engine starts it again."""
        self.again, self.started = self.again + 1, self.now + 1

    def watchdog(self, run: Any = None) -> Any:
        # a machine at work answers late, and what hangs never does
        self.config["timeout"] = 0.05 if Server.mood in ("hang", "busy", "silent") else 5
        return program.Watchdog(self.config, run or self.run, lambda: self.now)

    def look(self, after: float = 30) -> str:
        self.now += after
        said: str = self.watchdog().look()
        return said

    @property
    def state(self) -> dict[str, Any]:
        data: dict[str, Any] = json.loads((self.folder / "vllm-watchdog/state.json").read_text())
        return data

    @property
    def restarts(self) -> int:
        return len([argv for argv in self.commands if "restart" in argv])


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    Server.mood, Server.tokens, Server.asked, Server.hold = "good", 100.0, [], threading.Event()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield World(tmp_path, server.server_address[1])
    Server.hold.set()
    server.shutdown()
    server.server_close()


def test_answer(world: World) -> None:
    assert world.look() == "ok"
    assert Server.asked == ['{"max_tokens": 1}']
    assert (world.state["state"], world.state["strikes"], world.state["restarts"]) == ("ok", 0, [])
    assert world.state["since"] == program.utc(START + 30)
    assert world.state["valid_until"] == program.utc(START + 480)
    world.look()
    assert world.state["since"] == program.utc(START + 30)


def test_hang_is_restarted_after_so_many_strikes(world: World) -> None:
    world.look()
    Server.mood = "hang"
    assert "failing, strike 1 of 3: POST /v1/completions is not answered within 0.05 s" in world.look()
    assert world.state["state"] == "failing"
    world.look()
    assert world.restarts == 0
    said = world.look()
    assert world.restarts == 1
    assert ["docker", "container", "restart", "--time", "10", f"vllm.{RELEASE}"] in world.commands
    assert "last line" in said
    assert world.state["state"] == "restarting"
    assert world.state["restarts"] == [program.utc(world.now)]
    Server.mood = "good"
    assert world.look() == "ok"
    assert world.state["restarts"], "they count within the window"


@pytest.mark.parametrize("mood", ["dead", "odd", "silent"])
def test_other_ways_to_fail(world: World, mood: str) -> None:
    world.look()
    Server.mood = mood
    for _ in range(3):
        world.look()
    assert world.restarts == 1


def test_busy_is_not_hung(world: World) -> None:
    world.look()
    Server.mood = "busy"
    for _ in range(5):
        assert "busy: POST /v1/completions is not answered" in world.look()
    assert world.restarts == 0
    assert (world.state["state"], world.state["strikes"]) == ("ok", 0)


def test_progress_between_two_looks_counts(world: World) -> None:
    world.look()
    Server.mood = "hang"
    world.look()
    Server.tokens += 10
    assert "busy" in world.look()
    assert world.state["strikes"] == 0


def test_refused_question_is_no_reason_to_restart(world: World) -> None:
    world.look()
    Server.mood = "refuse"
    for _ in range(5):
        assert "is answered by 404" in world.look()
    assert world.restarts == 0
    assert world.state["state"] == "failing"


def test_loading_is_waited_for_and_not_for_ever(world: World) -> None:
    world.started, Server.mood = START, "silent"
    for _ in range(10):
        assert "it has been loading for" in world.look()
    assert world.state["state"] == "loading"
    world.look(600)
    world.look()
    world.look()
    assert world.restarts == 1


def test_one_that_hangs_with_its_first_completion_is_not_loading(world: World) -> None:
    world.started, Server.mood = START, "hang"
    for _ in range(3):
        world.look()
    assert world.restarts == 1


def test_one_that_has_answered_is_not_loading(world: World) -> None:
    world.started = START
    world.look()
    Server.mood = "silent"
    assert "strike 1" in world.look()


def test_never_loops(world: World) -> None:
    world.look()
    Server.mood = "hang"
    for _ in range(30):
        world.look()
    assert world.restarts == 2
    assert world.state["state"] == "gave_up"
    assert "2 restarts within 3600 s did not help" in world.state["reason"]
    world.look(7200)
    world.look()
    world.look()
    world.look()
    assert world.restarts == 2, "the end of the window alone clears nothing"


def hang_until_it_gives_up(world: World) -> None:
    world.config.update(max_restarts=0)
    world.look()
    Server.mood = "hang"
    for _ in range(3):
        world.look()
    assert world.state["state"] == "gave_up"
    assert "no restart is allowed" in world.state["reason"]
    world.config.update(max_restarts=2)
    world.look()
    assert world.restarts == 0


def test_started_by_somebody_else(world: World) -> None:
    hang_until_it_gives_up(world)
    world.started = world.now
    assert "strike 1" in world.look()
    assert world.state["state"] == "failing"
    world.look()
    world.look()
    assert world.restarts == 1


def test_another_release_begins_anew(world: World) -> None:
    world.look()
    Server.mood = "hang"
    for _ in range(3):
        world.look()
    assert len(world.state["restarts"]) == 1
    state = json.loads((world.folder / "vllm/state.json").read_text())
    state["releases"][0]["release"] = state["current"] = "20260102T000000Z-bbbbbb"
    (world.folder / "vllm/state.json").write_text(json.dumps(state))
    Server.mood = "good"
    world.look()
    assert world.state["restarts"] == []


def test_clear(world: World) -> None:
    hang_until_it_gives_up(world)
    assert world.watchdog().clear() == "ok: cleared"
    assert (world.state["state"], world.state["strikes"], world.state["restarts"]) == ("ok", 0, [])
    for _ in range(3):
        world.look()
    assert world.restarts == 1


def test_answers_again_by_itself(world: World) -> None:
    hang_until_it_gives_up(world)
    Server.mood = "good"
    assert world.look() == "ok"


@pytest.mark.parametrize("status", ["exited", "restarting", "paused", "created", ""])
def test_container_that_does_not_run_is_not_ours(world: World, status: str) -> None:
    Server.mood, world.status = "hang", status
    for _ in range(5):
        assert "its container is" in world.look()
    assert world.restarts == 0
    assert Server.asked == []
    assert world.state["state"] == "down"


def crash_in_a_circle(world: World) -> None:
    """A look sees it loading, waiting for its next start, or gone again; it never answers."""
    world.look()
    Server.mood = "silent"
    for _ in range(3):
        world.crash()
        world.look()
        world.status = "restarting"
        assert "its container is restarting" in world.look()
        world.status = "running"
    assert world.state["state"] == "down"
    assert len(world.state["ends"]) == 2, "the first one had answered before"
    world.crash()
    assert world.look() == "gave_up: it ended 3 times before it had answered"
    world.status = "restarting"
    assert world.look() == "gave_up: it ended 3 times before it had answered"
    world.status = "running"
    assert {argv[2] for argv in world.commands} == {"inspect"}, "the engine goes on to start it"


def test_the_reason_for_giving_up_stays(world: World) -> None:
    crash_in_a_circle(world)
    Server.mood = "hang"
    world.now += 3600  # for longer than it may load
    assert world.look().startswith("gave_up")
    assert world.state["reason"] == "it ended 3 times before it had answered"


def test_crashes_in_a_circle(world: World) -> None:
    crash_in_a_circle(world)
    Server.mood = "good"
    assert world.look() == "ok", "a card that came back, a volume that has room again"
    assert world.state["ends"] == []


def test_crashes_in_a_circle_before_a_start_by_somebody(world: World) -> None:
    crash_in_a_circle(world)
    world.started, world.again = world.now, 0
    assert "loading" in world.look()
    assert world.state["ends"] == []


def test_crashes_outside_of_the_window_are_forgotten(world: World) -> None:
    world.look()
    Server.mood = "silent"
    for _ in range(9):
        world.now += 1900
        world.crash()
        assert "loading" in world.look()
    assert len(world.state["ends"]) == 2


def test_a_boot_begins_anew(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the engine could not even try to start it, so that nothing else has changed."""
    boot = world.folder / "boot_id"
    monkeypatch.setattr(program, "BOOT", boot)
    boot.write_text("one\n")
    crash_in_a_circle(world)
    boot.write_text("two\n")
    assert "loading" in world.look()
    assert world.state["ends"] == []


def test_restarts_before_a_boot_do_not_count(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    boot = world.folder / "boot_id"
    monkeypatch.setattr(program, "BOOT", boot)
    boot.write_text("one\n")
    world.look()
    Server.mood = "hang"
    for _ in range(30):
        world.look()
    assert (world.state["state"], world.restarts) == ("gave_up", 2)
    world.status, world.error = "exited", "no such card"
    boot.write_text("two\n")
    assert world.look().startswith("down, strike 1 of 3: it could not be started")
    assert world.state["restarts"] == []
    world.look()
    world.look()
    assert (world.state["state"], world.restarts) == ("restarting", 3)
    for _ in range(3):
        world.look()
    assert world.restarts == 4, "a server that hangs may be restarted as often as ever"


def test_one_that_answers_in_between_is_started_again_for_ever(world: World) -> None:
    for _ in range(9):
        world.look()
        world.crash()
    assert world.look() == "ok"
    assert world.state["ends"] == []


def test_restarts_of_the_engine_forget_no_strike(world: World) -> None:
    world.look()
    Server.mood = "hang"
    world.look()
    assert "strike 2" in world.look()
    world.status = "restarting"
    assert "down, strike 2 of 3: its container is restarting" in world.look()
    world.status, Server.mood = "running", "silent"
    world.crash()
    assert "loading, strike 2 of 3" in world.look()
    Server.mood = "hang"
    world.look()
    assert world.restarts == 1


@pytest.fixture
def unstarted(world: World) -> World:
    """A boot without the volume: the engine could not start the container, and does not try again."""
    release = json.loads((world.folder / "vllm/state.json").read_text())["releases"][0]
    release["settings"] = {"mounts": [{"source": str(world.folder / "volume/model")}, {"source": str(world.folder)}]}
    world.release(RELEASE, release)
    world.look()
    world.status, world.error = "exited", "error while creating mount source path: no such file"
    return world


def test_container_that_could_not_be_started(unstarted: World) -> None:
    for _ in range(5):
        assert "it could not be started, and" in unstarted.look()
    assert unstarted.state["reason"].endswith("volume/model is not there")
    assert (unstarted.state["state"], unstarted.restarts) == ("down", 0)
    (unstarted.folder / "volume/model").mkdir(parents=True)
    assert "down, strike 1 of 3: it could not be started: error while" in unstarted.look()
    unstarted.look()
    assert "restarted, as it could not be started" in unstarted.look()
    assert unstarted.look() == "ok"


def test_start_that_fails_is_tried_slowly_for_ever(unstarted: World) -> None:
    (unstarted.folder / "volume/model").mkdir(parents=True)
    unstarted.restart_code = 1
    for _ in range(6):
        unstarted.look()
    assert unstarted.restarts == 2
    for _ in range(59):  # half of the window, as two are allowed within it
        assert unstarted.look().startswith("down, strike ")
    assert "could not be started: error while" in unstarted.state["reason"]
    unstarted.look()
    assert unstarted.restarts == 3
    for _ in range(600):
        unstarted.look()
    assert unstarted.restarts == 13
    assert unstarted.state["restarts"] == [], "they do not use up those of a server that hangs"
    unstarted.restart_code = 0
    for _ in range(63):
        said = unstarted.look()
    assert said == "ok"


def test_restarts_of_a_hung_server_do_not_end_the_starts(unstarted: World) -> None:
    """The card went away under the last one."""
    (unstarted.folder / "volume/model").mkdir(parents=True)
    path = unstarted.folder / "vllm-watchdog/state.json"
    state = unstarted.state | {"state": "gave_up", "restarts": [program.utc(unstarted.now)] * 2}
    path.write_text(json.dumps(state))
    assert "down, strike 1 of 3" in unstarted.look()
    for _ in range(3):
        unstarted.look()
    assert (unstarted.state["state"], unstarted.restarts) == ("ok", 1)


def test_no_restarts_at_all(unstarted: World) -> None:
    (unstarted.folder / "volume/model").mkdir(parents=True)
    unstarted.config["max_restarts"] = 0
    for _ in range(9):
        unstarted.look()
    assert unstarted.state["reason"].endswith("no restart is allowed")
    assert (unstarted.state["state"], unstarted.restarts) == ("down", 0)


def test_volume_that_came_late_is_mounted(unstarted: World, monkeypatch: pytest.MonkeyPatch) -> None:
    (unstarted.folder / "volume/model").mkdir(parents=True)
    unstarted.config["mount_point"] = folder = str(unstarted.folder / "volume")
    for _ in range(5):
        assert unstarted.look() == f"down: it could not be started, and {folder} is not mounted"
    assert ["systemctl", "--no-block", "start", folder] in unstarted.commands
    assert unstarted.restarts == 0
    monkeypatch.setattr("os.path.ismount", lambda path: path == folder)
    for _ in range(3):
        unstarted.look()
    assert unstarted.restarts == 1


def test_container_that_somebody_stopped_stays_stopped(unstarted: World) -> None:
    (unstarted.folder / "volume/model").mkdir(parents=True)
    unstarted.error = ""
    for _ in range(5):
        assert unstarted.look() == "down: its container is exited"
    assert unstarted.restarts == 0


def test_no_release_yet(world: World) -> None:
    for text in ("{", "{}", json.dumps({"format": 1, "current": "x", "releases": []})):
        (world.folder / "vllm/state.json").write_text(text)
        assert world.look() == "down: no release serves"
    assert world.commands == []


def test_release_under_way_is_left_alone(world: World) -> None:
    world.look()
    Server.mood = "hang"
    world.look()
    world.look()
    with (world.folder / "run/vllm.lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        assert world.look() == "ok: a release is under way"
        world.status = "exited"
        assert world.look() == "loading: a release is under way"
        world.status = "running"
        assert world.look() == "loading: a release is under way", "nothing has answered yet"
    assert "strike 1" in world.look(), "it begins to count anew"


def test_release_that_was_cut_off(world: World) -> None:
    world.look()
    Server.mood = "hang"
    (world.folder / "vllm/transition.json").write_text("{}")
    assert "ok: a release was cut off" in world.look()
    world.status = "exited"
    assert (
        "down: a release was cut off, which the next run ends; the container of the one before it is exited"
        in world.look()
    )
    assert world.restarts == 0


def test_lock_of_a_release_is_respected(world: World) -> None:
    (world.folder / "run").mkdir()
    with (world.folder / "run/vllm.lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        assert "a release is under way" in world.look()
    assert world.look() == "ok"


def test_release_that_begins_at_the_last_moment(world: World) -> None:
    world.look()
    Server.mood = "hang"
    world.look()
    world.look()
    with (world.folder / "run/vllm.lock").open("w") as stream:
        watchdog = world.watchdog()
        watchdog.released = lambda: False
        fcntl.flock(stream, fcntl.LOCK_EX)
        assert "a release is under way" in watchdog.look()
    assert world.restarts == 0


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (lambda world: world.release("20260102T000000Z-bbbbbb"), "ok: it was released while"),
        (lambda world: (world.folder / "vllm/transition.json").write_text("{}"), "ok: it was released while"),
        (lambda world: setattr(world, "started", world.now), "loading: POST /v1/completions is not"),
        (lambda world: setattr(world, "status", "exited"), "failing, strike 3 of 3: POST /v1/completions is not"),
        (lambda world: setattr(world, "status", ""), "failing, strike 3 of 3: POST /v1/completions is not"),
    ],
    ids=["another release", "a release that was cut off", "started", "stopped or died", "removed, or docker hangs"],
)
def test_what_was_done_while_it_asked(world: World, act: Callable[[World], object], said: str) -> None:
    world.look()
    Server.mood = "hang"
    world.look()
    world.look()
    watchdog = world.watchdog()
    ask = watchdog.ask
    watchdog.ask = lambda release: (ask(release), act(world))[0]
    assert watchdog.look().startswith(said)
    assert world.restarts == 0
    assert world.state["restarts"] == []
    with (world.folder / "run/vllm.lock").open() as stream:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_lock_is_held_and_signed_while_it_restarts(world: World) -> None:
    held = []

    def run(argv: list[str], timeout: float) -> tuple[int, str]:
        if "restart" in argv:
            with (world.folder / "run/vllm.lock").open() as stream:
                held.append(json.load(stream)["by"])
                with pytest.raises(BlockingIOError):
                    fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return world.run(argv, timeout)

    world.look()
    Server.mood = "hang"
    for _ in range(3):
        world.now += 30
        world.watchdog(run).look()
    assert held == ["vllm-watchdog"]


def test_restart_that_fails_counts(world: World) -> None:
    world.look()
    Server.mood, world.restart_code = "hang", 1
    for _ in range(12):
        world.look()
    assert world.restarts == 2
    assert world.state["state"] == "gave_up"


def test_state_can_be_read_by_all_and_is_never_half(world: World) -> None:
    world.look()
    path = world.folder / "vllm-watchdog/state.json"
    assert path.stat().st_mode & 0o777 == 0o644
    assert [entry.name for entry in path.parent.iterdir()] == ["state.json"]
    path.write_text("{")
    assert world.look() == "ok"


def test_program(world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    config = world.folder / "config.json"
    config.write_text(json.dumps(world.config))
    monkeypatch.setenv("PATH", str(world.folder))
    assert program.main([str(config)]) == 0
    assert "down: its container is not there" in capsys.readouterr().out
    assert program.main([str(config), "--clear"]) == 0
    assert program.main([str(config), "--help"]) == 2
    assert program.main([]) == 2


def test_programs_that_hang_or_are_missing() -> None:
    assert program.run(["sleep", "5"], 0.1)[0] == 124
    assert program.run(["/nowhere"], 1)[0] == 127
