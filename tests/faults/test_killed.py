"""SIGKILL of the controller at any task, at any moment of it: the next run ends well and leaves nothing half done."""

from __future__ import annotations

import random

import pytest

DEV = ("--limit", "ai_dev")
TASKS = 40  # more than a run has; a number past the end lets the run end by itself
FEWEST = 12  # a run of fewer did not do its work
SEED = random.SystemRandom().randrange(10_000)


def _finish(site, health):
    run = site(*DEV)
    assert run.returncode == 0, run.output[-6000:]
    assert '"status":"ok"' in health("ai-dev")
    again = site(*DEV)
    assert again.returncode == 0, again.output[-6000:]
    assert again.changed == 0, again.output[-6000:]


@pytest.mark.sample
def test_killed_while_the_engine_is_installed(site, site_killed, rebuilt, health):
    rebuilt("ai-dev")
    killed = site_killed("Docker Engine runs", 0.5, *DEV)
    assert killed.killed_at, killed.output[-6000:]
    _finish(site, health)


@pytest.mark.parametrize("number", range(1, TASKS))
def test_killed_on_a_bare_host(site, site_killed, rebuilt, health, number):
    delay = random.Random(f"{SEED} {number}").uniform(0, 4)
    print(f"seed {SEED}: SIGKILL {delay:.2f} s into task {number}")
    rebuilt("ai-dev")
    killed = site_killed(number, delay, *DEV)
    if not killed.killed_at:
        assert killed.returncode == 0, killed.output[-6000:]
        assert killed.tasks >= FEWEST, f"the run ended after {killed.tasks} tasks:\n{killed.output[-6000:]}"
        return
    _finish(site, health)


@pytest.mark.parametrize("delay", [0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0])
@pytest.mark.parametrize("behaviour", ["healthy", "slow-start"])
def test_killed_during_a_release(site, site_killed, image, on, health, behaviour, delay):
    image("dev-20980101-0000", behaviour)
    killed = site_killed("Service runs as one proven release", delay, *DEV)
    assert killed.killed_at, killed.output[-6000:]
    _finish(site, health)
    assert len(on("ai-dev", "docker ps --format '{{.Names}}'").split()) == 1
    assert "transition.json" not in on("ai-dev", "ls /var/lib/nemo/ai-dev")
