"""What a release costs, on bare hosts of its own: time, requests that fail meanwhile, and what HAProxy adds to each of them."""

from __future__ import annotations

import contextlib
import json
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

from lab import hosts
from lab.aws import images
from lab.settings import REGISTRY
from tests.bench.measure import AI_AGAIN, CHECKOUT, cost, executions_for_services, table
from tests.faults.test_releases import OWN_ERROR, PREPARE, Platform

NAMES = ("bench-service", "bench-second", "bench-clients")
OLD, NEW = "bench-20980101-0001", "bench-20980101-0002"
BAD = {
    behaviour: f"bench-20980102-{number:04d}"
    for number, behaviour in enumerate(("unhealthy", "hang", "crash", "crash-later", "errors", "leak"), start=1)
}
SLOW = "bench-20980102-0000"  # 15 s until it is healthy, and good
MISSING, FOREIGN = "bench-20980103-0001", "bench-20980103-0002"  # never pushed; for another kind of processor
# What the usual way does: the container is stopped, removed, and made anew from the new image.
PLAIN = """
- hosts: service
  gather_facts: false
  tasks:
    - community.docker.docker_container:
        name: plain
        image: "{{ registry }}/ai:{{ tag }}"
        published_ports: ["8009:8000"]
        env: {IMAGE_TAG: "{{ tag }}"}
        memory: 256m
        healthcheck: {test: [NONE]}
"""
# By kamal-deploy.org/docs: deploy_timeout 30, drain_timeout 30, retain_containers 5, proxy.healthcheck.interval 1 (seconds).
KAMAL = "Kamal 2, documented defaults"


@contextlib.contextmanager
def _platform() -> Iterator[Platform]:
    lab = [sys.executable, "-m", "lab", "scenario-hosts"]
    subprocess.run([*lab, *NAMES], cwd=CHECKOUT, check=True, timeout=600)
    try:
        with tempfile.TemporaryDirectory() as folder:
            service, second, clients = (f"nemo-lab-{hosts.SCENARIO}{name}" for name in NAMES)
            made = Platform(service, second, clients, pathlib.Path(folder))
            generator = (CHECKOUT / "tests/load/generator.py").read_bytes()
            for host in (made.service, made.clients):
                write = [*made.engine.prefix, "exec", "-i", host, "sh", "-c", "cat > /root/generator.py"]
                subprocess.run(write, input=generator, check=True)
            for tag in (OLD, NEW):
                images.push(tag)
            for behaviour, tag in {**BAD, "slow-start": SLOW}.items():
                images.push(tag, behaviour)
            images.push(FOREIGN, foreign=True)
            for port in (8000, 8009):
                made.open(made.service, port)
            made.play(PREPARE)
            yield made
    finally:
        for tag in (OLD, NEW, *BAD.values(), SLOW, FOREIGN):
            images.remove(tag)
        subprocess.run([*lab, "--remove", *NAMES], cwd=CHECKOUT, check=True, timeout=300)


def _timed(made: Platform, tag: str | None, **values: object) -> str:
    """Seconds of one run, Ansible's start included, and the requests that failed while clients were asking."""
    with made.load(slow="0") as seen:
        began = time.monotonic()
        made.good(tag, **values)
        seconds = time.monotonic() - began
    return f"{seconds:.1f} s, {seen['failed']} of {seen['requests']} failed"


def _plain(made: Platform) -> str:
    playbook = made.folder / "plain.yml"
    playbook.write_text(PLAIN)

    def run(tag: str) -> float:
        began = time.monotonic()
        made.playbook(str(playbook), "-e", f"registry={REGISTRY} tag={tag}")
        made.until("curl --fail --silent --max-time 2 localhost:8009/health")
        return time.monotonic() - began

    made.play(
        "- hosts: service\n  gather_facts: true\n  roles: [{role: nemo.platform.packages, packages_names: [python3-requests]}]\n"
    )
    run(OLD)
    made.on(made.service, f"docker pull --quiet {REGISTRY}/ai:{NEW}")
    with made.load(port=8009, slow="0") as seen:
        seconds = run(NEW)
    made.on(made.service, "docker rm --force plain")
    return f"{seconds:.1f} s, {seen['failed']} of {seen['requests']} failed"


def _decisions(made: Platform) -> list[tuple[str, ...]]:
    """Of each image that is not simply good: the decision, when it came, how long clients were led to it, and what they lost."""
    rows: list[tuple[str, ...]] = []
    wanted = {**BAD, "missing": MISSING, "wrong architecture": FOREIGN, "slow-start (good)": SLOW}
    for behaviour, tag in wanted.items():
        with made.load(slow="0", own_error=OWN_ERROR) as seen:
            began = time.monotonic()
            result = made.release(tag, health_timeout=20, bake_time=60, bake_min_requests=5)
            seconds = time.monotonic() - began
            time.sleep(2)
        first, last, count = seen["releases"].get(tag, (0.0, 0.0, 0))
        led = f"{last - first:.1f} s" if count else "never"
        lost = f"{seen['failed']} of {seen['requests']}"
        decision = f"[{result['reason']}]" if result["failed"] else "released"
        if not result["failed"]:
            made.good(NEW)
        rows.append((behaviour, decision, f"{seconds:.1f} s", led, str(seen["own_errors"]), lost))
    return rows


def _latency(made: Platform, port: int) -> dict[str, float]:
    """Of requests on kept connections, on the host itself: the network between would hide the difference."""
    words = f"--url http://127.0.0.1:{port} --seconds 20 --keep 4 --new 0 --slow 0 --pause 0.005"
    found: dict[str, float] = json.loads(made.on(made.service, f"python3 /root/generator.py {words}"))["milliseconds"][
        "keep"
    ]
    return found


def releases() -> str:
    """Release, rollback and the proxy, next to what others do."""
    with _platform() as made:
        made.good(OLD)
        quick = {"bake_time": 0, "settle_time": 0}
        watched = _timed(made, NEW, bake_time=30, settle_time=3)
        back = _timed(made, None, state="rolled_back", bake_time=0)
        unwatched = _timed(made, NEW, **quick)
        state = json.loads(made.on(made.service, "cat /var/lib/nemo/api/state.json"))
        direct, proxied = _latency(made, state["releases"][0]["host_port"]), _latency(made, 8000)
        decisions = _decisions(made)
        plain = _plain(made)
    again = cost(AI_AGAIN)
    executions = executions_for_services(again.output)
    text = table(
        "A release, with clients asking (Ansible's start included)",
        ("what", "this project", "plain docker_container", KAMAL),
        [
            ("release, watched for 30 s", watched, "does not watch", "does not watch"),
            ("release, not watched", unwatched, plain, "health asked each second, up to 30 s; drains up to 30 s"),
            ("rollback", back, "as a release, by the old tag", "as a release; 5 old containers are kept"),
        ],
    )
    text += table(
        "Bad images, and a slow one; health_timeout 20 s (Ansible's start included)",
        ("image", "decision", "after", "clients led to it for", "its own errors that they saw", "requests lost"),
        decisions,
    )
    rows = [
        (name, f"{direct[name]:.2f}", f"{proxied[name]:.2f}", f"{proxied[name] - direct[name]:+.2f}")
        for name in ("p50", "p90", "p99", "max")
    ]
    text += table("What HAProxy adds to a request, ms", ("", "the release itself", "through HAProxy", "added"), rows)
    return text + table(
        f"Remote executions for one service, changed={again.changed}", ("host", "number"), list(executions.items())
    )
