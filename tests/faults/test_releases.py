"""Releases on hosts of their own, under load, with everything that goes wrong with them: what do clients notice?

Three bare hosts: two run the service, the third its clients. NEMO_REQUESTS is how many requests the runs of the sample make
(5,000), NEMO_LONG how many the long ones do (100,000) with NEMO_CLIENTS quick clients (12: what two cores stand beside a
release), NEMO_KILLS how many runs are killed (50), NEMO_STEPS how many runs follow each other in any order (8), NEMO_SEED repeats
the moments of an earlier run,
NEMO_RELEASE_HOSTS=container,container,container uses hosts that are there instead of making three.
"""

from __future__ import annotations

import base64
import contextlib
import datetime
import json
import os
import pathlib
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from lab import engine, hosts
from lab.aws import images
from lab.settings import AWS_API, REGION, REGISTRY
from tests.faults.conftest import CHECKOUT

REQUESTS = int(os.environ.get("NEMO_REQUESTS", "5000"))
LONG = int(os.environ.get("NEMO_LONG", "100000"))
CLIENTS = int(os.environ.get("NEMO_CLIENTS", "12"))
MOST = 1200  # seconds that a long run may take; two cores answer some 300 requests in each
KILLS = int(os.environ.get("NEMO_KILLS", "50"))
STEPS = int(os.environ.get("NEMO_STEPS", "8"))
SEED = int(os.environ.get("NEMO_SEED", random.SystemRandom().randrange(10_000)))
NAMES = ("releases-service", "releases-second", "releases-clients")
TAGS = {
    behaviour: f"test-20980101-{number:04d}"
    for number, behaviour in enumerate(
        ("healthy", "slow-start", "unhealthy", "crash", "crash-later", "errors", "hang", "stubborn", "leak"), start=1
    )
}
NEXT = "test-20980102-0001"  # healthy too
PLAIN = "of-a-plain-container"
PROCESS = "AnsiballZ_container_release"  # the module on the host
OWN_ERROR = "the model gave no answer"  # of the image that answers errors; they are no lost requests
REGISTRY_ADDRESS = "10.0.0.11"
PREPARE = (
    """
- hosts: ai
  gather_facts: true
  roles:
    - nemo.platform.docker_engine
    - {role: nemo.platform.ecr_credentials, ecr_credentials_registries: ["%s"]}
    - {role: nemo.platform.packages, packages_names: [haproxy]}
"""
    % REGISTRY
)

# Python with the clock that a host of its own would have; the engine, HAProxy and every command keep the machine's.
# sitecustomize, as libfaketime spoils the absolute time on the monotonic clock that Python's sleep gives to the kernel (EINVAL).
FAKETIME = """
- hosts: service
  gather_facts: true
  roles:
    - {role: nemo.platform.packages, packages_names: [libfaketime]}
  tasks:
    - ansible.builtin.file: {path: /root/clock, state: directory}
    - ansible.builtin.copy:
        dest: /root/clock/sitecustomize.py
        content: |
          import os, select, time
          time.sleep = lambda seconds: select.select([], [], [], seconds) and None
          os.environ.pop("LD_PRELOAD", None)
    - ansible.builtin.shell:
        executable: /bin/bash
        cmd: |
          library=$(dpkg --listfiles libfaketime | grep '/libfaketime[.]so')
          for clock in '+1h later' '-1h earlier'; do
            set -- $clock
            printf '#!/bin/sh\\nexec env LD_PRELOAD=%s FAKETIME=%s FAKETIME_DONT_FAKE_MONOTONIC=1 PYTHONPATH=/root/clock /usr/bin/python3 "$@"\\n' $library $1 > /root/python-1h-$2
            chmod 755 /root/python-1h-$2
          done
"""

# The inventory holds the service at a tag that is older than what an operator released.
OLDER = {
    "name": "api", "group": "ai_test", "port": 8000, "repository": "ai", "tag_prefix": "test", "memory": "256m",
    "health_path": "/health", "tag": TAGS["healthy"],
}  # fmt: skip


class Platform:
    """The hosts, and what is done on them."""

    def __init__(self, service: str, second: str, clients: str, folder: pathlib.Path) -> None:
        found = engine.running()
        assert found
        self.engine, self.service, self.second, self.clients = found, service, second, clients
        self.inventory = folder / "hosts.json"
        catalogue = {
            "group": "ai_test", "port": 8000, "repository": "ai", "tag_prefix": "test", "memory": "256m", "health_path": "/health",
            "health_timeout": 20, "bake_time": 3, "settle_time": 1, "drain_timeout": 20,
        }  # fmt: skip
        variables = {
            "ansible_connection": "community.docker.docker", "ansible_python_interpreter": "/usr/bin/python3",
            "ansible_docker_extra_args": " ".join(found.prefix[1:]),  # the engine that has the lab
            "nemo_services": {"api": catalogue}, "nemo_host_services": ["api"], "nemo_registry": REGISTRY, "nemo_bastion": "",
            "ai_api_services": "{{ nemo_host_services | nemo.platform.catalogue_entries(nemo_services) }}",
            "nemo_aws_endpoint_url": f"http://{AWS_API}:5000", "container_service_min_free_disk_mb": 10,
            "nemo_aws_connection": {
                "region": REGION, "endpoint_url": f"http://{AWS_API}:5000", "access_key": "lab", "secret_key": "lab",
            },
        }  # fmt: skip
        names = {"service": {"ansible_host": service}, "service-second": {"ansible_host": second}}
        groups = {"ai": {"vars": variables, "children": {"ai_test": {"hosts": names}}}}
        self.inventory.write_text(json.dumps({"all": {"children": groups}}))
        self.folder = folder
        self.prefix = ["scripts/lab-env"] if (CHECKOUT / "scripts/lab-env").exists() else []

    def address(self, host: str) -> str:
        found = self.engine.inspect("container", host)
        assert found
        return str(found["NetworkSettings"]["Networks"]["nemo-lab"]["IPAddress"])

    def open(self, host: str, port: int = 8000) -> None:
        """The clients are no client that the security group of an AI host knows."""
        rule = f"inet nemo_lab_security_group inbound ip saddr 10.0.0.0/16 tcp dport {port} accept"
        self.on(host, f"nft insert rule {rule}")

    def on(self, host: str, command: str, check: bool = True) -> str:
        return self.engine.exec(host, ["bash", "-c", command], check=check)

    def playbook(self, *arguments: str, fails: bool = False) -> str:
        done = subprocess.run(
            [*self.prefix, "ansible-playbook", "-i", str(self.inventory), *arguments], cwd=CHECKOUT, text=True, check=False,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=600,
        )  # fmt: skip
        assert (done.returncode != 0) is fails, done.stdout[-6000:]
        return done.stdout

    def play(self, text: str) -> None:
        path = self.folder / "play.yml"
        path.write_text(text)
        self.playbook(str(path))

    def until(self, command: str, seconds: float = 60, host: str = "") -> None:
        """A shell command on the service's host succeeds at last."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                self.on(host or self.service, command)
                return
            except Exception:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)

    def now(self) -> str:
        return self.on(self.service, "date +%s").strip()

    def pids(self) -> list[str]:
        """Of a run of the module."""
        return self.on(self.service, f"pgrep -f {PROCESS}", check=False).split()

    def plain(self) -> None:
        """The service as it was before releases: one container that has the port itself, and nothing else."""
        self.good(None, state="absent")
        image = f"{REGISTRY}/ai:{TAGS['healthy']}"
        given = f"--name api --restart unless-stopped --memory 256m --publish 8000:8000 --env IMAGE_TAG={PLAIN}"
        self.on(self.service, f"docker run --detach {given} {image}")
        self.until("curl --fail --silent --max-time 5 localhost:8000/health")

    def until_watched(self, since: str) -> None:
        """A release that was begun since then has traffic on it, and is not committed."""
        said = f"journalctl -t ansible-nemo.platform.container_release --since @{since}"
        self.until(f"{said} | grep -q 'watching it'")

    def begin(self, python: str = "/usr/bin/python3", **values: Any) -> subprocess.Popen[str]:
        """A run of the module, as Ansible runs it."""
        given = {
            "name": "api", "image": f"{REGISTRY}/ai", "port": 8000, "memory": "256m", "settle_time": 1, "bake_time": 3,
            "drain_timeout": 20, "health_timeout": 40, "min_free_disk_mb": 10, "operator": "test", "force": True,
        }  # fmt: skip
        return subprocess.Popen(
            [*self.prefix, "ansible", "-i", str(self.inventory), "service", "-o", "-m",
             "nemo.platform.container_release", "-a", json.dumps({**given, **values}),
             "-e", f"ansible_python_interpreter={python}"],
            cwd=CHECKOUT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, stdin=subprocess.DEVNULL,
        )  # fmt: skip

    def release(self, tag: str | None = None, **values: Any) -> dict[str, Any]:
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

    def behind(self) -> set[str]:
        """The tags of the releases that a rollback without a name can go to."""
        state = json.loads(self.on(self.service, "cat /var/lib/nemo/api/state.json 2>/dev/null || echo '{}'"))
        left = {state.get("current"), *(entry.get("release") for entry in state.get("failed", []))}
        return {entry["tag"] for entry in state.get("releases", []) if entry["release"] not in left}

    def answering(self, host: str = "") -> str:
        answer = self.on(host or self.service, "curl --silent --max-time 20 localhost:8000/health")
        return str(json.loads(answer)["tag"])

    def settled(self, host: str = "") -> None:
        """One known release runs, and nothing of a transition is left."""
        host = host or self.service
        state = json.loads(self.on(host, "cat /var/lib/nemo/api/state.json"))
        assert self.on(host, "ls /var/lib/nemo/api").split() in (["state.json"], ["releases", "state.json"])
        shown = self.on(host, "docker ps --all --filter label=nemo.service=api --format '{{.Names}} {{.State}}'")
        rows = [line.split() for line in shown.splitlines()]
        assert [name for name, status in rows if status == "running"] == [f"api.{state['current']}"]
        known = {f"api.{entry['release']}" for entry in state["releases"]}
        assert {name for name, _status in rows} <= known
        assert "REDIRECT" not in self.on(host, "iptables -t nat -S | grep nemo-proxy || true")

    @contextlib.contextmanager
    def load(self, requests: int = 0, host: str = "", port: int = 8000, **options: str) -> Iterator[dict[str, Any]]:
        """Clients ask as long as this lasts, and at least so often; what they saw is filled in at its end."""
        url = f"http://{self.address(host or self.service)}:{port}"
        words = {"keep": "4", "new": "3", "slow": "3", "slow_seconds": "3", "pause": "0.01", **options}
        command = ["python3", "/root/generator.py", "--url", url, "--seconds", "3000"]
        command += [part for name, value in words.items() for part in (f"--{name.replace('_', '-')}", value)]
        command += ["--requests", str(requests)] if requests else []
        process = subprocess.Popen(
            [*self.engine.prefix, "exec", self.clients, *command], stdout=subprocess.PIPE, text=True
        )
        seen: dict[str, Any] = {}
        time.sleep(2)
        try:
            yield seen
        finally:
            self.on(self.clients, f"pkill --signal TERM --full '/root/generator[.]py --url {url} '", check=False)
            seen.update(json.loads(process.communicate(timeout=3000)[0]))
            print(json.dumps(seen))


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    given = os.environ.get("NEMO_RELEASE_HOSTS", "")
    names = given.split(",") if given else [f"nemo-lab-{hosts.SCENARIO}{name}" for name in NAMES]
    lab = [sys.executable, "-m", "lab", "scenario-hosts"]
    if not given:
        subprocess.run([*lab, *NAMES], cwd=CHECKOUT, check=True, timeout=300)
    made = Platform(names[0], names[1], names[2], tmp_path_factory.mktemp("releases"))
    try:
        for behaviour, tag in TAGS.items():
            images.push(tag, behaviour)
        images.push(NEXT)
        generator = (CHECKOUT / "tests/load/generator.py").read_bytes()
        write = [*made.engine.prefix, "exec", "-i", made.clients, "sh", "-c", "cat > /root/generator.py"]
        subprocess.run(write, input=generator, check=True)
        made.open(made.service)
        made.open(made.second)
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


def only_posts_were_lost(seen: dict[str, Any]) -> None:
    """A release that dies loses what it was in the middle of, unless that may be asked again: one POST of each quick client.

    HAProxy answers 502 to the first request of a connection; a later one is not answered, that its client may ask again.
    """
    died = (
        "new POST: Failure was answered 502",
        "keep POST: Failure was answered 502",
        "keep POST: IncompleteReadError 0 bytes",
    )
    assert all(text.startswith(died) for text in seen["failures"]), seen["first_failures"]
    assert seen["failed"] <= 7, seen["first_failures"]


@pytest.mark.parametrize("behaviour", ["errors", "crash-later"])
def test_a_release_that_fails_with_traffic_on_it_is_taken_back(running: Platform, behaviour: str) -> None:
    with running.load(own_error=OWN_ERROR) as seen:
        result = running.release(TAGS[behaviour], bake_time=40, bake_min_requests=5)
        assert result["reason"] == "bake", result["msg"]
        time.sleep(3)
    assert running.answering() == TAGS["healthy"]
    running.settled()
    assert (seen["own_errors"] > 0) is (behaviour == "errors")
    if behaviour == "errors":
        assert seen["failed"] == 0, seen["first_failures"]
    only_posts_were_lost(seen)


@pytest.mark.sample
def test_no_request_fails_on_two_hosts_and_the_first_proves_for_the_second(running: Platform) -> None:
    deploy = ("playbooks/deploy.yml", "-e", "service=api", "-e", "force=true", "-e")
    running.playbook("playbooks/ai.yml", "-e", json.dumps({"ai_api_intent": "deploy"}))

    def tried() -> int:
        return running.on(running.second, "cat /var/lib/nemo/api/state.json").count(TAGS["unhealthy"])

    before = tried()
    with running.load(REQUESTS) as first, running.load(REQUESTS, host=running.second) as second:
        running.playbook(*deploy, f"tag={TAGS['healthy']}")
        running.playbook(*deploy, f"tag={NEXT}")
        said = running.playbook(*deploy, f"tag={TAGS['unhealthy']}", fails=True)
        refused = running.playbook("playbooks/rollback.yml", "-e", "service=api", fails=True)
        running.playbook("playbooks/rollback.yml", "-e", f"service=api release={TAGS['healthy']}")
    for seen in (first, second):
        assert seen["failed"] == 0, seen["first_failures"]
        assert seen["requests"] >= REQUESTS
        assert set(seen["releases"]) - {"-"} >= {TAGS["healthy"], NEXT}
        assert TAGS["unhealthy"] not in seen["releases"]
    assert "failed [unhealthy]" in said
    assert "PLAY RECAP" in said
    assert f"of {TAGS['unhealthy']}, failed at" in refused, "it would take both from the good release to the one before"
    assert tried() == before, "the second host tried it too"
    for host in (running.service, running.second):
        assert running.answering(host) == TAGS["healthy"]
        running.settled(host)


def test_site_brings_nothing_back_that_an_operator_released(running: Platform) -> None:
    hotfix = "hotfix-of-a-test"
    images.push(hotfix)
    try:
        running.playbook("playbooks/deploy.yml", "-e", f"service=api tag={hotfix} pin=true force=true")
        said = running.playbook("playbooks/ai.yml")
        assert f"api is pinned to {hotfix}" in said
        assert {running.answering(host) for host in (running.service, running.second)} == {hotfix}
        shown = running.playbook("playbooks/releases.yml")
        assert f"outside its rule: {hotfix}" in shown
        assert "pinned: pinned at its release" in shown
        running.playbook("playbooks/deploy.yml", "-e", f"service=api tag={NEXT} force=true")
        said = running.playbook("playbooks/ai.yml", "-e", json.dumps({"ai_api_services": [OLDER]}))
        assert "is newer than" in said
        assert {running.answering(host) for host in (running.service, running.second)} == {NEXT}
    finally:
        images.remove(hotfix)


def test_an_image_that_hangs_and_one_that_does_not_end(running: Platform) -> None:
    with running.load() as seen:
        assert running.release(TAGS["hang"], health_timeout=8)["reason"] == "unhealthy"
        running.good(TAGS["stubborn"], stop_timeout=3)
        began = time.monotonic()
        running.good(TAGS["healthy"], stop_timeout=3)
    assert time.monotonic() - began < 60
    assert seen["failed"] == 0, seen["first_failures"]
    running.settled()


def test_an_image_that_leaks_is_taken_back(running: Platform) -> None:
    with running.load() as seen:
        result = running.release(TAGS["leak"], bake_time=90, memory="128m")
        time.sleep(2)
    assert result["reason"] == "bake", result["msg"]
    assert running.answering() == TAGS["healthy"]
    running.settled()
    only_posts_were_lost(seen)


def test_a_tag_that_is_missing_and_an_image_for_another_machine(running: Platform) -> None:
    foreign = "test-20980103-0001"
    images.push(foreign, foreign=True)
    try:
        with running.load() as seen:
            assert running.release("test-20990101-0000")["reason"] == "not_found"
            assert running.release(foreign)["reason"] == "platform"
    finally:
        images.remove(foreign)
    assert seen["failed"] == 0, seen["first_failures"]
    running.settled()


def test_haproxy_is_restarted_reloaded_and_killed(running: Platform) -> None:
    with running.load() as seen:
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


def lost_only(seen: dict[str, Any], down: float, up: float) -> None:
    """What was lost was under way when it went down, a slow answer for example, or begun before it was up again."""
    within = down - 5 < seen["failed_from"] <= seen["failed_until"] < up
    assert not seen["failed"] or within, (down, up, seen["failed_from"], seen["failed_until"], seen["first_failures"])
    answered = seen["begun"] + max(last for _first, last, _count in seen["releases"].values())
    assert answered > up, "nobody was answered since"


@pytest.mark.parametrize("under_way", [False, True])
def test_the_engine_is_killed(running: Platform, under_way: bool) -> None:
    with running.load() as seen:
        began = running.now()
        process = running.begin(tag=NEXT, bake_time=15) if under_way else None
        if process:
            running.until_watched(began)
        down = time.time()
        running.on(running.service, "systemctl kill --signal=KILL docker.service")
        if process:
            process.communicate(timeout=300)
        running.on(running.service, "systemctl reset-failed docker; systemctl start docker")
        running.until("docker ps && curl --fail --silent --max-time 5 localhost:8000/health")
        up = time.time()
        time.sleep(2)
        running.good(NEXT)
    lost_only(seen, down, up)
    assert running.answering() == NEXT
    running.settled()


def test_haproxy_is_killed_in_the_middle_of_a_release(running: Platform) -> None:
    with running.load() as seen:
        began = running.now()
        process = running.begin(tag=NEXT, bake_time=10)
        running.until_watched(began)
        running.on(running.service, "systemctl kill --signal=KILL nemo-proxy-api.service")
        process.communicate(timeout=300)
        running.good(NEXT)
    assert seen["failed"] <= 10, seen["failures"]  # what it was in the middle of, once for each client
    assert not [text for text in seen["failures"] if "Refused" in text]
    assert running.answering() == NEXT
    running.settled()


@pytest.mark.parametrize("under_way", [False, True])
def test_the_host_is_restarted(running: Platform, under_way: bool) -> None:
    """Idle, and in the middle of a release: what was committed comes back by itself, and the next run puts all in order."""
    with running.load() as seen:
        began = running.now()
        process = running.begin(tag=NEXT, bake_time=60) if under_way else None
        if process:
            running.until_watched(began)
        down = time.time()
        subprocess.run([*running.engine.prefix, "restart", "--time", "0", running.service], check=True, timeout=120)
        if process:
            process.communicate(timeout=120)
        running.until("curl --fail --silent --max-time 5 localhost:8000/health", 120)
        running.open(running.service)
        up = time.time()
        time.sleep(2)
        running.good(NEXT)
    lost_only(seen, down, up)
    assert running.answering() == NEXT
    running.settled()


def test_the_disk_is_full(running: Platform) -> None:
    folder, fresh = "/var/lib/nemo/api", "test-20980106-0001"
    small = f"cp -a {folder} /root/kept && mount -t tmpfs -o size=256k none {folder} && cp -a /root/kept/. {folder}"
    images.push(fresh)
    try:
        with running.load() as seen:
            assert running.release(fresh, min_free_disk_mb=10**8)["reason"] == "no_space"
            # Neither is there room for the state.
            running.on(running.service, f"{small} && dd if=/dev/zero of={folder}/.full bs=1k 2>/dev/null || true")
            try:
                result = running.release(fresh)
            finally:
                back = (
                    f"rm -f {folder}/.full; cp -a {folder}/. /root/kept; umount {folder}; cp -a /root/kept/. {folder}"
                )
                running.on(running.service, f"{back}; rm -r /root/kept")
            assert result["reason"] == "no_space", result["msg"]
            assert running.answering() == TAGS["healthy"]
            running.good(fresh)
    finally:
        images.remove(fresh)
    assert seen["failed"] == 0, seen["first_failures"]
    running.settled()


@contextlib.contextmanager
def slow_pull(platform: Platform, tag: str) -> Iterator[tuple[subprocess.Popen[str], Callable[[str], None]]]:
    """A release in the middle of pulling a large image, and what puts another rule in place of the one that slows it down."""
    images.push(tag, padding=64)
    table = "inet of_a_test"
    to_registry = f"nft add rule {table} out ip daddr {REGISTRY_ADDRESS}"

    def instead(rule: str) -> None:
        platform.on(platform.service, f"nft flush chain {table} out; {to_registry} {rule}")

    try:
        chain = f"nft add table {table}; nft add chain {table} out '{{ type filter hook output priority 0; }}'"
        platform.on(platform.service, f"{chain}; {to_registry} limit rate over 20/second drop")
        process = platform.begin(tag=tag, pull_timeout=15)
        platform.until(f"pgrep -f 'docker.* pull .*{tag}'")
        time.sleep(2)
        yield process, instead
    finally:
        platform.on(platform.service, f"nft delete table {table}", check=False)
        images.remove(tag)


def test_the_registry_goes_away_in_the_middle_of_a_pull(running: Platform) -> None:
    large = "test-20980104-0001"
    with running.load() as seen, slow_pull(running, large) as (process, instead):
        instead("drop")
        output = process.communicate(timeout=120)[0]
        assert "[pull_timeout]" in output or "[registry_unreachable]" in output, output[-3000:]
        instead("accept")
        running.good(large)
    assert seen["failed"] == 0, seen["first_failures"]
    assert running.answering() == large
    running.settled()


def test_the_registrys_token_expires_in_the_middle_of_a_pull(running: Platform) -> None:
    """The connection ends, and the rest of the layer is asked for with a token that the registry does not take any more."""
    large, users = "test-20980104-0002", "/run/nemo-lab/htpasswd"
    with running.load() as seen, slow_pull(running, large) as (process, instead):
        running.on("nemo-lab-aws", f"sed -i.kept 's/^AWS:/EXPIRED:/' {users}")
        try:
            instead("tcp dport 443 reject with tcp reset")
            time.sleep(1)
            instead("accept")
            output = process.communicate(timeout=120)[0]
        finally:
            running.on("nemo-lab-aws", f"mv {users}.kept {users}")
        assert "[authentication]" in output, output[-3000:]
        running.good(large)
    assert seen["failed"] == 0, seen["first_failures"]
    assert running.answering() == large
    running.settled()


def test_the_registrys_token_has_expired(running: Platform) -> None:
    fresh = "test-20980105-0001"
    images.push(fresh)
    expired = json.dumps({"auths": {REGISTRY: {"auth": base64.b64encode(b"AWS:of-yesterday").decode()}}})
    try:
        running.on(
            running.service,
            f"cp -a /root/.docker/config.json /root/kept.json; echo '{expired}' > /root/.docker/config.json",
        )
        with running.load() as seen:
            assert running.release(fresh)["reason"] == "authentication"
            running.on(running.service, "mv /root/kept.json /root/.docker/config.json")
            running.good(fresh)
        assert seen["failed"] == 0, seen["first_failures"]
        running.settled()
    finally:
        images.remove(fresh)


def test_a_lock_that_nobody_holds_is_no_lock(running: Platform) -> None:
    stale = json.dumps({"by": "alice", "since": "2020-01-01T00:00:00Z", "pid": 4194303, "what": "prod-1"})
    running.on(running.service, f"echo '{stale}' > /run/nemo/api.lock")
    running.good(NEXT, lock_timeout=0)
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


def test_clocks_are_an_hour_wrong(running: Platform) -> None:
    def hours_wrong() -> int:
        last = json.loads(running.on(running.service, "cat /var/lib/nemo/api/state.json"))["history"][0]
        ahead = datetime.datetime.fromisoformat(last["at"]) - datetime.datetime.now(datetime.UTC)
        return round(ahead.total_seconds() / 3600)

    running.play(FAKETIME)
    with running.load() as seen:
        running.good(NEXT, python="/root/python-1h-later")
        assert hours_wrong() == 1
        running.good(TAGS["healthy"], python="/root/python-1h-earlier")
        assert hours_wrong() == -1
        assert running.good(None, state="rolled_back", python="/root/python-1h-later")["action"] == "rolled_back"
        assert running.answering() == NEXT
        running.good(TAGS["healthy"])
    assert seen["failed"] == 0, seen["first_failures"]
    running.settled()


# The first move: from a container that has the port itself


@pytest.fixture
def plain(platform: Platform) -> Platform:
    """The service answers with a container that no release has made."""
    platform.plain()
    return platform


def test_the_first_move_loses_at_most_what_was_sent_to_the_old_container_as_it_ended(plain: Platform) -> None:
    with plain.load() as seen:
        plain.good(NEXT)
        time.sleep(2)
    kept = ("keep ", "slow ")  # connections that outlive a request
    assert all(text.startswith(kept) for text in seen["failures"]), seen["first_failures"]
    assert seen["failed"] <= 7, seen["first_failures"]  # once for each of them
    assert set(seen["releases"]) >= {PLAIN, NEXT}
    plain.settled()


def test_the_first_move_to_a_bad_image_leaves_the_plain_container_alone(plain: Platform) -> None:
    with plain.load() as seen:
        assert plain.release(TAGS["unhealthy"], health_timeout=8)["reason"] == "unhealthy"
    assert seen["failed"] == 0, seen["first_failures"]
    assert set(seen["releases"]) - {"-"} == {PLAIN}
    assert plain.answering() == PLAIN


def test_the_first_move_where_two_do_not_fit(plain: Platform) -> None:
    """While the new one starts nothing can answer; before and after that nothing is lost."""
    with plain.load() as seen:
        down = time.time()
        plain.good(NEXT, strategy="stop-start")
        up = time.time()
        time.sleep(2)
    lost_only(seen, down, up)
    assert set(seen["releases"]) >= {PLAIN, NEXT}
    plain.settled()


# A hundred thousand requests


def long_load(
    platform: Platform, requests: int, clients: int, host: str = ""
) -> contextlib.AbstractContextManager[dict[str, Any]]:
    keep, new = str(clients - clients // 3), str(clients // 3)
    return platform.load(requests, host, keep=keep, new=new, most=str(MOST), own_error=OWN_ERROR)


def nothing_was_lost(seen: dict[str, Any], requests: int) -> None:
    assert seen["failed"] == 0, seen["first_failures"]
    assert seen["requests"] >= requests, f"in {MOST} s; fewer NEMO_LONG, or a faster machine"
    assert seen["by_kind"]["slow"] > 10
    assert set(seen["releases"]) >= {TAGS["healthy"], NEXT}


def test_a_hundred_thousand_requests_on_one_host(running: Platform) -> None:
    """A release, a rollback, an automatic switch-back and a change of HAProxy's configuration."""
    with long_load(running, LONG, CLIENTS) as seen:
        running.good(NEXT)
        assert running.good(None, state="rolled_back")["action"] == "rolled_back"
        assert running.release(TAGS["errors"], bake_time=40, bake_min_requests=5)["reason"] == "bake"
        running.good(TAGS["healthy"], proxy_keep_alive=30)
    nothing_was_lost(seen, LONG)
    assert seen["own_errors"] > 0
    assert running.answering() == TAGS["healthy"]
    running.settled()


def test_a_hundred_thousand_requests_on_two_hosts(running: Platform) -> None:
    """The same by the playbooks, half of the requests on each host; the first one's switch-back spares the second."""
    deploy = ("playbooks/deploy.yml", "-e", "service=api", "-e", "force=true", "-e")
    half = LONG // 2, CLIENTS // 2
    running.playbook(*deploy, f"tag={TAGS['healthy']}")
    with long_load(running, *half) as first, long_load(running, *half, running.second) as second:
        running.playbook(*deploy, f"tag={NEXT}")
        running.playbook("playbooks/rollback.yml", "-e", "service=api")
        said = running.playbook(*deploy, f"tag={TAGS['errors']}", fails=True)
        running.playbook(*deploy, f"tag={TAGS['healthy']}", "-e", "ai_api_proxy_timeout=299")
    assert "failed [bake]" in said
    for seen in (first, second):
        nothing_was_lost(seen, LONG // 2)
    assert first["own_errors"] > 0
    assert second["own_errors"] == 0
    for host in (running.service, running.second):
        assert running.answering(host) == TAGS["healthy"]
        assert "timeout server 299s" in running.on(host, "cat /etc/nemo/proxy/api.cfg")
        running.settled(host)


# Runs that are killed

KINDS: dict[str, dict[str, Any]] = {
    "release": {"tag": NEXT},
    "slow release": {"tag": TAGS["slow-start"]},
    "bad release": {"tag": TAGS["unhealthy"], "health_timeout": 8},
    "rollback": {"state": "rolled_back"},
    "stop-start": {"tag": NEXT, "strategy": "stop-start"},
    "first move": {"tag": NEXT},
    "first move, stop-start": {"tag": NEXT, "strategy": "stop-start"},
}
# After a kill: where the old one had to stop, it serves again without another run, unless the new one does. A stop that outlives the
# run keeps its lock, and so does what starts the old one again.
SERVES = "flock --nonblock /run/nemo/api.lock true && curl --fail --silent --max-time 5 localhost:8000/health"
LENGTHS: dict[str, float] = {}  # seconds from the module's begin to its end, of one run of each kind that nobody killed


def prepare(platform: Platform, kind: str) -> None:
    """What serves before the run: the healthy release, or the plain container."""
    if kind.startswith("first move"):
        platform.plain()
        return
    if kind == "rollback":
        platform.good(NEXT)
    platform.good(TAGS["healthy"])


def start(platform: Platform, values: dict[str, Any]) -> subprocess.Popen[str]:
    """A run of which the module has begun."""
    process = platform.begin(**values)
    deadline = time.monotonic() + 60
    while not platform.pids():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process


def length(platform: Platform, kind: str) -> float:
    if kind not in LENGTHS:
        prepare(platform, kind)
        with platform.load():
            process = start(platform, KINDS[kind])
            began = time.monotonic()
            while platform.pids():
                time.sleep(0.05)
            LENGTHS[kind] = time.monotonic() - began
            process.communicate(timeout=300)
    return LENGTHS[kind]


def kill(platform: Platform, values: dict[str, Any], delay: float) -> bool:
    """A run that is killed, if it is still alive by then."""
    process = start(platform, values)
    time.sleep(delay)
    pids = platform.pids()
    if pids:
        platform.on(platform.service, f"kill -9 {' '.join(pids)}", check=False)
        process.kill()
        process.wait()
    else:
        process.communicate(timeout=300)
    return bool(pids)


@pytest.mark.parametrize("number", range(KILLS))
def test_a_killed_run_takes_nothing_down(platform: Platform, number: int) -> None:
    chance = random.Random(f"{SEED} {number}")
    kind = chance.choice(list(KINDS)) if number % 2 else "release"
    whole, share = length(platform, kind), chance.random()
    for _attempt in range(3):
        print(f"NEMO_SEED={SEED}: SIGKILL {share * whole:.2f} s into a {kind}, which takes {whole:.2f} s")
        prepare(platform, kind)
        with platform.load() as seen:
            down = time.time()
            hit = kill(platform, KINDS[kind], share * whole)
            platform.until(SERVES)
            up = time.time()
            platform.good(NEXT)
            if kind.startswith("first move"):
                up = time.time()  # the next run moves, and ends connections to the old container
            time.sleep(2)
        assert platform.answering() == NEXT
        platform.settled()
        if hit:
            break
        share /= 2  # this run was quicker than the one that was measured
    assert hit, "it had ended before"
    if "stop-start" in kind:
        lost_only(seen, down, up)
    else:
        # the first move ends connections to the old container, each once
        assert seen["failed"] <= (7 if kind == "first move" else 0), seen["first_failures"]


# Runs in any order: the rules of tests/unit/plugins/modules/test_release_machine.py, on the real engine


@pytest.mark.sample
def test_in_any_order_what_served_once_serves(platform: Platform) -> None:
    runs = {"release": KINDS["release"], "older release": {"tag": TAGS["healthy"]}}
    runs |= {kind: KINDS[kind] for kind in ("bad release", "rollback", "stop-start")}
    chance = random.Random(f"{SEED} order")
    platform.plain() if chance.random() < 0.5 else platform.good(TAGS["healthy"])
    expected = {platform.answering()}  # what may answer now: more than one after a kill
    turns = False  # whether two take turns: one that began and was killed is undone so, too
    for step in range(STEPS):
        kind = chance.choice(list(runs))
        delay = chance.uniform(0, 8) if chance.random() < 0.5 and step < STEPS - 1 else None
        print(f"NEMO_SEED={SEED}: {kind}" + (f", SIGKILL after {delay:.2f} s" if delay else ""))
        behind, first_move, result, killed = platform.behind(), PLAIN in expected, None, False
        with platform.load() as seen:
            down = time.time()
            if delay is None:
                result = platform.release(**runs[kind])
            else:
                killed = kill(platform, runs[kind], delay)
                platform.until(SERVES)
            up = time.time()
            time.sleep(2)
        turns |= kind == "stop-start"
        if turns:
            lost_only(seen, down, up)
        else:
            assert seen["failed"] <= (7 if first_move else 0), seen["first_failures"]  # as the first move alone
        now = platform.answering()
        if result and len(expected) == 1:
            wanted = {"bad release": expected, "rollback": behind or expected}.get(kind, {runs[kind].get("tag")})
            assert now in wanted
            assert result["failed"] is (kind == "bad release" or (kind == "rollback" and not behind)), result["msg"]
        may = expected | (behind if kind == "rollback" else {runs[kind]["tag"]} - {TAGS["unhealthy"]})
        assert now in may
        expected = may if killed else {now}
        turns &= killed
        if not killed and now != PLAIN:
            platform.settled()
