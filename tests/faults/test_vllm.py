"""What goes wrong on the inference server: the error says why, and the model that answered before answers again."""

from __future__ import annotations

import contextlib
import json
import random
import re
import subprocess
import threading
import time
from collections.abc import Iterator

import pytest

from lab.settings import MIRROR

from .conftest import CHECKOUT, SITE

VLLM = ("--limit", "vllm")
KEY = "lab-vllm-key-0123456789abcdef"
CONTAINER = "docker ps --filter label=nemo.service=vllm --format '{{.Names}}'"
WISH = "/srv/models/cache/lab-behaviour"
PARTS = 20  # in each of which one run is killed
SEED = random.SystemRandom().randrange(10_000)
HUB = json.loads((CHECKOUT / ".lab/artifacts.json").read_text())["hub"]["models"]


def model(name: str, **more: object) -> tuple[str, ...]:
    revision = HUB.get(name, {}).get("revision", "0" * 40)
    return ("-e", json.dumps({"vllm_model": name, "vllm_model_revision": revision, **more}))


@pytest.fixture
def ask(on):
    """Status and answer of a completion, asked for from an AI host."""

    def call(seconds: float = 30) -> tuple[int, str]:
        body = json.dumps({"model": "nemo-chat", "prompt": "Hello", "max_tokens": 2})
        said = on(
            "ai-prod",
            f"curl --silent --max-time {seconds} --write-out '\\n%{{http_code}}' --header 'Authorization: Bearer {KEY}' "
            f"--header 'Content-Type: application/json' --data '{body}' http://10.0.2.20:8002/v1/completions || true",
        )
        text, _, status = said.rpartition("\n")
        return int(status or 0), text

    return call


@pytest.fixture
def release(on):
    """Which release serves, by the host's own record."""
    return lambda: json.loads(on("vllm", "cat /var/lib/nemo/vllm/state.json"))["current"]


@pytest.fixture
def history(on):
    """The releases that the host remembers."""
    return lambda: json.loads(on("vllm", "cat /var/lib/nemo/vllm/state.json"))["history"]


@pytest.fixture
def answers(ask):
    """Ask all the time; the statuses that were not 200, with the seconds at which they came."""

    @contextlib.contextmanager
    def asking() -> Iterator[list[tuple[float, int]]]:
        bad: list[tuple[float, int]] = []
        count, ended, began = [0], threading.Event(), time.monotonic()

        def loop() -> None:
            while not ended.is_set() and count[0] < 2000:
                status, _ = ask()
                count[0] += 1
                if status != 200:
                    bad.append((round(time.monotonic() - began, 1), status))

        thread = threading.Thread(target=loop)
        thread.start()
        try:
            yield bad
        finally:
            ended.set()
            thread.join()
        assert count[0] > 3, "hardly anything was asked"

    return asking


@pytest.fixture(autouse=True)
def _it_answers_before_and_after(ask):
    assert ask()[0] == 200, "it did not answer before"
    yield
    assert wait_for(lambda: ask()[0] == 200, 60), "it does not answer any more"


def wait_for(what, seconds: float) -> bool:
    until = time.monotonic() + seconds
    while not (found := what()) and time.monotonic() < until:
        time.sleep(0.5)
    return bool(found)


@pytest.fixture
def hub(on):
    """Let the hub misbehave: rate, flip, cut, fail."""

    def call(**values: int) -> None:
        on("aws", f"curl --silent --fail --request PUT --data '{json.dumps(values)}' http://{MIRROR}/hub/lab")

    yield call
    call()


# ---- what is found before anything stops


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        pytest.param(model("nemo-lab/huge"), r"vllm.*GiB.* are more than the .*A10G", id="a model that does not fit"),
        pytest.param(("-e", "vllm_tag=newer-cuda"), r"(?i)CUDA.*13\.4.*driver", id="an image for a newer driver"),
        pytest.param(model("nemo-lab/no-such-model"), r"nemo-lab/no-such-model", id="a model that is not there"),
        pytest.param(model("nemo-lab/gated-llama"), r"(?i)gated-llama.*(gated|token)", id="a model without its token"),
        pytest.param(("-e", "vllm_tag=v9.99.9"), r"v9\.99\.9", id="an image that is not there"),
        pytest.param(
            ("-e", '{"vllm_extra_arguments": ["--port", "1"]}'),
            r"vllm_extra_arguments.*--port",
            id="an argument of ours",
        ),
    ],
)
def test_nothing_stops_for_what_cannot_work(site, answers, release, arguments, says):
    before = release()
    with answers() as bad:
        run = site(*VLLM, *arguments)
    assert run.returncode != 0
    run.line(says)
    assert bad == []
    assert release() == before


@pytest.mark.sample
def test_a_model_that_does_not_fit(site, answers, release):
    before = release()
    with answers() as bad:
        run = site(*VLLM, *model("nemo-lab/huge"))
    assert run.returncode != 0
    run.line(r"GiB.* are more than the ")
    assert bad == []
    assert release() == before


# ---- downloads


def test_a_corrupted_and_interrupted_download_is_mended(site, hub, on, answers):
    on("vllm", "rm -rf /srv/models/hub/nemo-lab--big-llama /srv/models/hub/.partial")
    hub(flip=1, cut=2)
    with answers() as bad:
        run = site(*VLLM, *model("nemo-lab/big-llama"))
    assert run.returncode == 0, run.output[-6000:]
    assert {status for _, status in bad} <= {503}, bad
    assert site(*VLLM).returncode == 0


def test_a_download_that_never_is_right_stops_nothing(site, hub, on, answers):
    on("vllm", "rm -rf /srv/models/hub/nemo-lab--big-llama /srv/models/hub/.partial")
    hub(flip=1000)
    with answers() as bad:
        run = site(*VLLM, *model("nemo-lab/big-llama"))
    assert run.returncode != 0
    run.line(r"(?i)big-llama.*(sha256|digest|corrupt|wrong)")
    assert bad == []


def test_a_full_volume_stops_nothing(site, on, answers):
    on("vllm", "rm -rf /srv/models/hub/nemo-lab--big-llama /srv/models/hub/.partial")
    on(
        "vllm",
        "fallocate --length $(($(stat --file-system --format '%a * %S' /srv/models) - 20 * 1048576)) /srv/models/ballast",
    )
    try:
        with answers() as bad:
            run = site(*VLLM, *model("nemo-lab/big-llama"))
    finally:
        on("vllm", "rm /srv/models/ballast")
    assert run.returncode != 0
    run.line(r"(?i)/srv/models.*(free|space)")
    assert bad == []


# ---- what only shows when the new one runs


@pytest.mark.parametrize(
    ("tag", "says"),
    [
        pytest.param("oom", r"(?i)found in its log: .*memory", id="out of memory"),
        pytest.param("bad-kernel", r"(?i)found in its log: ", id="not compiled for this card"),
        pytest.param("exit-zero", r"(?i)ended with status 0|found in its log", id="an engine that exits with 0"),
    ],
)
def test_a_release_that_fails_gives_its_place_back(site, answers, release, tag, says):
    before = release()
    with answers() as bad:
        run = site(*VLLM, "-e", f"vllm_tag={tag}")
    assert run.returncode != 0
    run.line(says)
    assert {status for _, status in bad} <= {503}, "clients were told to come again, or answered"
    assert release() == before


def test_a_release_that_hangs_gives_its_place_back(site, release):
    before = release()
    run = site(*VLLM, "-e", "vllm_tag=hang", "-e", "vllm_load_timeout=20", "-e", "vllm_completion_timeout=5")
    assert run.returncode != 0
    run.line("gave no healthy answer within 20 s")
    assert release() == before


# ---- what goes wrong while nobody looks


@pytest.mark.sample
@pytest.mark.parametrize("wish", ["exit-zero once", "hang once"])
def test_the_engine_comes_back_by_itself(ask, on, wish):
    """Dead with status 0, the engine's restart policy brings it back; hanging with a good /health, the watchdog does."""
    started = "docker container inspect --format '{{.State.StartedAt}}' $(" + CONTAINER + ")"
    before = on("vllm", started)
    on("vllm", f"echo '{wish}' >{WISH}")
    # none runs while it is restarted
    assert wait_for(lambda: on("vllm", f"{started} 2>/dev/null || true") not in ("", before), 180), (
        "nobody restarted it"
    )
    assert wait_for(lambda: ask()[0] == 200, 60)


def test_a_hang_that_no_restart_cures_ends_the_restarts(on):
    state = "/var/lib/nemo/vllm-watchdog/state.json"
    on("vllm", f"echo hang >{WISH}")
    try:
        assert wait_for(lambda: json.loads(on("vllm", f"cat {state}"))["state"] == "gave_up", 400)
        restarts = json.loads(on("vllm", f"cat {state}"))["restarts"]
        time.sleep(30)
        assert json.loads(on("vllm", f"cat {state}"))["restarts"] == restarts
        assert on("vllm", "gpu-doctor || true").count("gave up")
    finally:
        on("vllm", f"rm {WISH}; docker restart $({CONTAINER}); rm -f {state}")


def test_a_container_keeps_its_card_when_systemd_reloads(on):
    for command in ("systemctl daemon-reload", "systemctl restart docker"):
        on("vllm", command)
        assert "A10G" in on("vllm", f"docker exec $({CONTAINER}) nvidia-smi --list-gpus")


def test_a_driver_upgraded_behind_our_back(site, answers, on):
    """As somebody's `apt-get upgrade` on a host whose holds were taken away; the module that runs is the old one."""
    names = "dpkg-query --show --showformat '${Package} ${Version}\\n' | grep -F ' 580.95' | grep -v '^[^ ]*580[.]'"
    packages = on("vllm", f"{names} | cut -d' ' -f1").split()
    later = " ".join(f"{name}=580.105*" for name in packages)
    on(
        "vllm",
        f"apt-get update -qq; apt-get install --quiet --yes --allow-change-held-packages --allow-downgrades {later}",
    )
    with answers() as bad:
        run = site(*VLLM)
    assert run.returncode == 0, run.output[-6000:]
    assert bad == []
    assert on("vllm", f"{names} | cut -d' ' -f1").split() == packages
    assert set(packages) <= set(on("vllm", "apt-mark showhold").split())
    again = site(*VLLM)
    assert (again.returncode, again.changed) == (0, 0), again.output[-6000:]


# ---- interruptions


@pytest.fixture(scope="module")
def tasks() -> int:
    """How many tasks a run on this host has."""
    run = subprocess.run([*SITE, *VLLM], cwd=CHECKOUT, capture_output=True, text=True, timeout=900, check=True)
    return len(re.findall(r"^TASK \[", run.stdout, re.MULTILINE))


@pytest.mark.parametrize("part", range(PARTS))
def test_killed_at_any_task(site, site_killed, rebuilt, ask, tasks, part):
    """On a bare host, so that every task has something to do; once in each part of the run."""
    chance = random.Random(f"{SEED} {part}")
    number, delay = int((part + chance.random()) * tasks / PARTS) + 1, chance.uniform(0, 4)
    print(f"seed {SEED}: SIGKILL {delay:.2f} s into task {number} of {tasks}")
    rebuilt("vllm")
    killed = site_killed(number, delay, *VLLM)
    assert killed.killed_at, killed.output[-6000:]
    print(killed.killed_at)
    _finish(site, ask)


@pytest.mark.parametrize("moment", [pytest.param(0, marks=pytest.mark.sample), *range(1, 5)])
def test_killed_while_the_server_is_replaced(site, site_killed, ask, on, moment):
    """What had to stop serves again before any other run, or the new one does."""
    delay = random.Random(f"{SEED} replaced {moment}").uniform(0, 12)
    print(f"seed {SEED}: SIGKILL after {delay:.2f} s")
    killed = site_killed("Service runs as one proven release", delay, *VLLM, "-e", "vllm_tag=v0.34.0")
    assert killed.killed_at, killed.output[-6000:]
    assert wait_for(lambda: ask()[0] == 200, 120), "nothing serves"
    _finish(site, ask)
    assert len(on("vllm", CONTAINER).split()) == 1


def test_a_reboot_in_the_middle(site, site_killed, ask, on):
    killed = site_killed("Service runs as one proven release", 2.0, *VLLM, "-e", "vllm_tag=v0.34.0")
    assert killed.killed_at, killed.output[-6000:]
    docker = subprocess.run(
        ["scripts/lab-env", "python", "-m", "lab", "docker-host"],
        cwd=CHECKOUT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    where = ["--host", docker] if docker else []
    subprocess.run(["docker", *where, "restart", "nemo-lab-vllm"], check=True, capture_output=True, timeout=120)
    assert wait_for(lambda: ask()[0] == 200, 180), "it does not answer after the reboot"
    _finish(site, ask)
    assert on("vllm", "findmnt --noheadings --output FSTYPE /srv/models").strip() == "xfs"


def _finish(site, ask):
    run = site(*VLLM)
    assert run.returncode == 0, run.output[-6000:]
    assert ask()[0] == 200
    again = site(*VLLM)
    assert again.returncode == 0, again.output[-6000:]
    assert again.changed == 0, again.output[-6000:]


def test_two_runs_at_once(ask, history):
    before = history()
    runs = [
        subprocess.Popen(
            [*SITE, *VLLM, "-e", f"vllm_tag={tag}"], cwd=CHECKOUT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, stdin=subprocess.DEVNULL,
        )
        for tag in ("v0.34.0", "v0.34.0")
    ]  # fmt: skip
    outputs = [run.communicate(timeout=900)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], "\n".join(output[-3000:] for output in outputs)
    made = [(entry["tag"], entry["result"]) for entry in history() if entry not in before]
    assert made == [("v0.34.0", "ok")], "the second one finds it done"
    assert ask()[0] == 200
