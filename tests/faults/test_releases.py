"""Releases on hosts of their own, under load, with everything that goes wrong with them: what do clients notice?

Two bare hosts: one runs the service, the other its clients. NEMO_REQUESTS is how many requests the long run makes (5,000;
the README's figure is of 100,000), NEMO_KILLS how many runs are killed (4), NEMO_SEED repeats the moments of an earlier
run, NEMO_RELEASE_HOSTS=container,container uses hosts that are there instead of making two.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from lab import engine, hosts
from lab.aws import images
from lab.settings import REGISTRY
from tests.faults.conftest import CHECKOUT

REQUESTS = int(os.environ.get("NEMO_REQUESTS", "5000"))
KILLS = int(os.environ.get("NEMO_KILLS", "4"))
SEED = int(os.environ.get("NEMO_SEED", random.SystemRandom().randrange(10_000)))
NAMES = ("releases-service", "releases-clients")
TAGS = {
    behaviour: f"test-20980101-{number:04d}"
    for number, behaviour in enumerate(
        ("healthy", "slow-start", "unhealthy", "crash", "crash-later", "errors"), start=1
    )
}
NEXT = "test-20980102-0001"  # healthy too
PROCESS = "AnsiballZ_container_release"  # the module on the host
PREPARE = (
    """
- hosts: service
  gather_facts: true
  roles:
    - nemo.platform.docker_engine
    - {role: nemo.platform.ecr_credentials, ecr_credentials_registries: ["%s"]}
    - {role: nemo.platform.packages, packages_names: [haproxy]}
"""
    % REGISTRY
)


class Platform:
    """The two hosts, and what is done on them."""

    def __init__(self, service: str, clients: str, folder: pathlib.Path) -> None:
        found = engine.running()
        assert found
        self.engine, self.service, self.clients = found, service, clients
        self.inventory = folder / "hosts.json"
        variables = {
            "ansible_connection": "community.docker.docker",
            "ansible_host": service,
            "ansible_python_interpreter": "/usr/bin/python3",
        }
        self.inventory.write_text(json.dumps({"all": {"hosts": {"service": variables}}}))
        self.address = found.inspect("container", service)["NetworkSettings"]["Networks"]["nemo-lab"]["IPAddress"]  # type: ignore[index]
        self.folder = folder
        self.prefix = ["scripts/lab-env"] if (CHECKOUT / "scripts/lab-env").exists() else []

    def on(self, host: str, command: str, check: bool = True) -> str:
        return self.engine.exec(host, ["bash", "-c", command], check=check)

    def play(self, text: str) -> None:
        path = self.folder / "play.yml"
        path.write_text(text)
        done = subprocess.run(
            [*self.prefix, "ansible-playbook", "-i", str(self.inventory), str(path)], cwd=CHECKOUT,
            capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=600, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]

    def begin(self, **values: Any) -> subprocess.Popen[str]:
        """A run of the module, as Ansible runs it."""
        given = {
            "name": "api", "image": f"{REGISTRY}/ai", "port": 8000, "memory": "256m", "settle_time": 1, "bake_time": 3,
            "drain_timeout": 20, "health_timeout": 40, "min_free_disk_mb": 10, "operator": "test", "force": True,
        }  # fmt: skip
        return subprocess.Popen(
            [*self.prefix, "ansible", "-i", str(self.inventory), "service", "-o", "-m",
             "nemo.platform.container_release", "-a", json.dumps({**given, **values})],
            cwd=CHECKOUT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, stdin=subprocess.DEVNULL,
        )  # fmt: skip

    def release(self, tag: str | None, **values: Any) -> dict[str, Any]:
        process = self.begin(**({"tag": tag} if tag else {}), **values)
        output = process.communicate(timeout=300)[0]
        at = output.find("=> {")
        assert at >= 0, output
        found: dict[str, Any] = json.JSONDecoder().raw_decode(output[at + 3 :])[0]
        return {**found, "failed": process.returncode != 0}

    def good(self, tag: str | None, **values: Any) -> dict[str, Any]:
        result = self.release(tag, **values)
        assert not result.get("failed"), result["msg"]
        return result

    def answering(self) -> str:
        return str(json.loads(self.on(self.service, "curl --silent --max-time 20 localhost:8000/health"))["tag"])

    def settled(self) -> None:
        """One known release runs, and nothing of a transition is left."""
        state = json.loads(self.on(self.service, "cat /var/lib/nemo/api/state.json"))
        assert self.on(self.service, "ls /var/lib/nemo/api").split() in (["state.json"], ["releases", "state.json"])
        shown = self.on(
            self.service, "docker ps --all --filter label=nemo.service=api --format '{{.Names}} {{.State}}'"
        )
        rows = [line.split() for line in shown.splitlines()]
        assert [name for name, status in rows if status == "running"] == [f"api.{state['current']}"]
        known = {f"api.{entry['release']}" for entry in state["releases"]}
        assert {name for name, _status in rows} <= known
        assert "REDIRECT" not in self.on(self.service, "iptables -t nat -S | grep nemo-proxy || true")

    @contextlib.contextmanager
    def load(self, requests: int = 0, **options: str) -> Iterator[dict[str, Any]]:
        """Clients ask as long as this lasts, and at least so often; what they saw is filled in at its end."""
        words = {"keep": "4", "new": "3", "slow": "3", "slow-seconds": "3", "pause": "0.01", **options}
        command = ["python3", "/root/generator.py", "--url", f"http://{self.address}:8000", "--seconds", "3000"]
        command += [part for name, value in words.items() for part in (f"--{name}", value)]
        command += ["--requests", str(requests)] if requests else []
        process = subprocess.Popen(
            [*self.engine.prefix, "exec", self.clients, *command], stdout=subprocess.PIPE, text=True
        )
        seen: dict[str, Any] = {}
        time.sleep(2)
        try:
            yield seen
        finally:
            self.on(self.clients, "pkill --signal TERM --full '/root/generator[.]py --url'", check=False)
            seen.update(json.loads(process.communicate(timeout=3000)[0]))
            print(json.dumps(seen))


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    given = os.environ.get("NEMO_RELEASE_HOSTS", "")
    names = given.split(",") if given else [f"nemo-lab-{hosts.SCENARIO}{name}" for name in NAMES]
    lab = [sys.executable, "-m", "lab", "scenario-hosts"]
    if not given:
        subprocess.run([*lab, *NAMES], cwd=CHECKOUT, check=True, timeout=300)
    made = Platform(names[0], names[1], tmp_path_factory.mktemp("releases"))
    try:
        for behaviour, tag in TAGS.items():
            images.push(tag, behaviour)
        images.push(NEXT)
        generator = (CHECKOUT / "tests/load/generator.py").read_bytes()
        for name in names:
            subprocess.run(
                [*made.engine.prefix, "exec", "-i", name, "sh", "-c", "cat > /root/generator.py"],
                input=generator,
                check=True,
            )
        # the clients are no client that the security group of an AI host knows
        made.on(
            names[0], "nft insert rule inet nemo_lab_security_group inbound ip saddr 10.0.0.0/16 tcp dport 8000 accept"
        )
        made.play(PREPARE)
        yield made
    finally:
        for tag in (*TAGS.values(), NEXT):
            images.remove(tag)
        if not given:
            subprocess.run([*lab, "--remove", *NAMES], cwd=CHECKOUT, check=True, timeout=300)


@pytest.fixture
def running(platform: Platform) -> Platform:
    """The service answers with the healthy release."""
    platform.good(TAGS["healthy"])
    assert platform.answering() == TAGS["healthy"]
    return platform


def test_no_request_fails_in_a_release_a_rollback_and_a_change_of_haproxy(running: Platform) -> None:
    with running.load(REQUESTS) as seen:
        running.good(NEXT)
        assert running.good(None, state="rolled_back")["action"] == "rolled_back"
        running.good(TAGS["healthy"], proxy_keep_alive=30)
        running.good(TAGS["slow-start"], proxy_keep_alive=30)
    assert seen["failed"] == 0, seen["first_failures"]
    assert seen["requests"] >= REQUESTS
    assert set(seen["releases"]) >= {TAGS["healthy"], NEXT, TAGS["slow-start"]}
    running.settled()


@pytest.mark.parametrize(("behaviour", "text"), [("unhealthy", "model not loaded"), ("crash", "cannot load the model")])
def test_a_bad_image_gets_no_request(running: Platform, behaviour: str, text: str) -> None:
    with running.load() as seen:
        result = running.release(TAGS[behaviour], health_timeout=8)
    assert result["failed"]
    assert result["reason"] == "unhealthy"
    assert text in result["msg"]
    assert TAGS[behaviour] in result["msg"]
    assert seen["failed"] == 0, seen["first_failures"]
    assert TAGS[behaviour] not in seen["releases"]
    assert running.release(TAGS[behaviour], health_timeout=8, force=False)["reason"] == "failed_before"
    running.settled()


@pytest.mark.parametrize("behaviour", ["errors", "crash-later"])
def test_a_release_that_fails_with_traffic_on_it_is_taken_back(running: Platform, behaviour: str) -> None:
    with running.load() as seen:
        result = running.release(TAGS[behaviour], bake_time=40, bake_min_requests=5)
        assert result["reason"] == "bake", result["msg"]
        time.sleep(3)
    assert running.answering() == TAGS["healthy"]
    running.settled()
    last = max(float(line.split(" s ")[0]) for line in seen["first_failures"]) if seen["first_failures"] else 0.0
    assert seen["releases"][TAGS["healthy"]][1] > last, "it failed to the end"


def test_a_tag_that_is_missing_and_an_image_for_another_machine(running: Platform) -> None:
    foreign = "test-20980103-0001"
    images.push(foreign, architecture="arm64")
    try:
        with running.load() as seen:
            assert running.release("test-20990101-0000")["reason"] == "not_found"
            assert running.release(foreign)["reason"] == "platform"
    finally:
        images.remove(foreign)
    assert seen["failed"] == 0, seen["first_failures"]
    running.settled()


def test_haproxy_is_restarted_reloaded_and_killed(running: Platform) -> None:
    with running.load(slow="0") as seen:
        running.on(running.service, "systemctl restart nemo-proxy-api.service")
        time.sleep(2)
        running.on(running.service, "systemctl reload nemo-proxy-api.service")
        time.sleep(2)
    assert seen["failed"] == 0, seen["first_failures"]
    with running.load() as seen:
        running.on(running.service, "systemctl kill --signal=KILL nemo-proxy-api.service")
        time.sleep(3)
    # what it was in the middle of, once for each client, and nothing else
    assert seen["failed"] <= 10, seen["failures"]
    assert not [text for text in seen["failures"] if "Refused" in text]
    assert not running.good(TAGS["healthy"])["changed"]


def test_the_engine_is_killed(running: Platform) -> None:
    running.on(
        running.service,
        "systemctl kill --signal=KILL docker.service; systemctl reset-failed docker; systemctl start docker",
    )
    running.good(TAGS["healthy"])
    assert running.answering() == TAGS["healthy"]
    running.settled()


def test_two_operators_at_once(running: Platform) -> None:
    first = running.begin(tag=NEXT, operator="alice", bake_time=10)
    held = f"grep -q alice /run/nemo/api.lock && pgrep -f {PROCESS}"
    deadline = time.monotonic() + 60
    while not running.on(running.service, held, check=False) and time.monotonic() < deadline:
        time.sleep(0.2)
    second = running.release(TAGS["healthy"], operator="bob", lock_timeout=0)
    assert second["reason"] == "lock"
    assert "alice since" in second["msg"]
    assert "CHANGED" in first.communicate(timeout=300)[0]
    assert running.answering() == NEXT


@pytest.mark.parametrize("number", range(KILLS))
def test_a_killed_run_takes_nothing_down(running: Platform, number: int) -> None:
    chance = random.Random(f"{SEED} {number}")
    tag, delay = chance.choice([NEXT, TAGS["slow-start"], TAGS["unhealthy"]]), chance.uniform(0, 15)
    print(f"NEMO_SEED={SEED}: SIGKILL {delay:.2f} s into the release of {tag}")
    with running.load() as seen:
        process = running.begin(tag=tag, health_timeout=20)

        def find() -> list[str]:
            return running.on(running.service, f"pgrep -f {PROCESS}", check=False).split()

        deadline = time.monotonic() + 60
        while not find() and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(delay)
        if pids := find():
            running.on(running.service, f"kill -9 {' '.join(pids)}", check=False)
        process.kill()
        process.wait()
        running.good(NEXT)
    assert seen["failed"] == 0, seen["first_failures"]
    assert running.answering() == NEXT
    running.settled()
