"""Tables of speed, cost and scale: `make bench` for all but `lab`, `make bench ARGS=lab`, `make bench ARGS='site inventory'`.

  site        a no-change `make site`: time, memory, and how many commands reach each host, by role (the lab must be up)
  bastion     the same of the Bastion's playbook
  lab-again   `make lab` on the lab that is up
  inventory   finding 4, 100 and 1,000 hosts, without and with the cache (a moto server of its own on the loopback)
  releases    a release and a rollback under load, what HAProxy adds, next to a plain docker_container (hosts of its own)
  vllm        the cold path of the inference server: what runs side by side, against each part alone (its host is made anew)
  lab         TAKES THE LAB DOWN: `make lab` from nothing but the caches (none after `make clean`), then again

Each one's tables are also written to build/bench/NAME.md.
"""

from __future__ import annotations

import os
import pathlib
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

from tests.bench.measure import CHECKOUT, Cost, cost, memory_in_use, remote_executions, table
from tests.bench.releases import releases
from tests.bench.vllm import vllm

WRITTEN = CHECKOUT / "build" / "bench"
COLUMNS = ("run", "seconds", "peak memory, MiB", "changed", "remote executions")
SITE = ["scripts/lab-env", "ansible-playbook", "-i", "inventories/lab", "site.yml"]
BASTION = [*SITE[:-1], "nemo.platform.bastion"]
LAB = ["scripts/lab"]  # what `make lab` runs; a make below `make bench ARGS=...` would inherit these ARGS
LAB_COUNTED = [*LAB, "-vvv"]


def _row(name: str, run: Cost, counted: Cost) -> tuple[object, ...]:
    """A run, and the remote executions of it or of another one that does the same with -vvv."""
    executions = sum(remote_executions(counted.output).values())
    return name, f"{run.seconds:.1f}", f"{run.memory_mib:.0f}", run.changed, executions


def site() -> str:
    """The cost of a run that has nothing to do."""
    return _no_change("`make site`", SITE)


def bastion() -> str:
    """The cost of the Bastion's own playbook where it has nothing to do."""
    return _no_change("`playbooks/bastion.yml`", BASTION)


def _no_change(what: str, argv: list[str]) -> str:
    cost(argv)  # whatever there was to do is done now
    quiet = [cost(argv) for _ in range(3)]
    counted = cost([*argv, "-vvv"])
    rows = [_row(f"no change, run {number}", run, counted) for number, run in enumerate(quiet, start=1)]
    text = table(f"A no-change {what}", COLUMNS, rows)
    counts = remote_executions(counted.output)
    hosts = sorted({host for _, host in counts})
    typical = sorted(quiet, key=lambda run: run.seconds)[1]
    roles = list(dict.fromkeys([*typical.seconds_by_role, *(role for role, _ in counts)]))

    def seconds(role: str) -> str:
        return f"{typical.seconds_by_role.get(role, 0.0):.1f}"

    by_role: list[tuple[object, ...]] = [
        (role, seconds(role), *(counts.get((role, host), 0) for host in hosts)) for role in roles
    ]
    sums = (sum(counts.get((role, host), 0) for role in roles) for host in hosts)
    by_role.append(("all", f"{typical.seconds:.1f}", *sums))
    return text + table(f"What each role costs in a no-change {what}", ("role", "seconds", *hosts), by_role)


def lab() -> str:
    """The cost of the first command of the README."""
    subprocess.run([*LAB, "--down"], cwd=CHECKOUT, check=True, stdin=subprocess.DEVNULL)
    empty = "caches kept" if (CHECKOUT / ".lab" / "cache").exists() else "cold"
    cold = cost(LAB_COUNTED)  # a second run would not be cold: this one is measured and counted
    return table("`make lab`", COLUMNS, [_row(f"lab down, {empty}", cold, cold), _again()])


def lab_again() -> str:
    """The cost of the same command on a finished lab."""
    cost(LAB)  # whatever there was to do is done now
    return table("`make lab` again", COLUMNS, [_again()])


def _again() -> tuple[object, ...]:
    return _row("again", cost(LAB), cost(LAB_COUNTED))


def inventory() -> str:
    """What it costs to find the hosts, by their number."""
    rows = []
    for number in (4, 100, 1000):
        with tempfile.TemporaryDirectory() as folder:
            rows.append((number, *_inventory(number, pathlib.Path(folder))))
    return table("Finding the hosts", ("instances", "seconds", "seconds with the cache"), rows)


def _inventory(number: int, folder: pathlib.Path) -> tuple[str, str]:
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        endpoint = "http://{}:{}".format(*server.get_host_and_port())
        keys = {"aws_access_key_id": "lab", "aws_secret_access_key": "lab", "region_name": "ap-northeast-2"}
        ec2 = boto3.client("ec2", endpoint_url=endpoint, **keys)
        tags = [{"Key": "Project", "Value": "nemo"}, {"Key": "Role", "Value": "ai"}, {"Key": "Name", "Value": "ai"}]
        image = ec2.describe_images()["Images"][0]["ImageId"]
        ec2.run_instances(
            ImageId=image, MinCount=number, MaxCount=number, InstanceType="t3.medium",
            TagSpecifications=[{"ResourceType": "instance", "Tags": tags}],
        )  # fmt: skip
        text = (CHECKOUT / "inventories" / "lab" / "aws_ec2.yml").read_text()
        lines = [line for line in text.splitlines() if not line.startswith(("endpoint_url:", "cache_connection:"))]
        source = folder / "aws_ec2.yml"
        source.write_text("\n".join([*lines, f"endpoint_url: {endpoint}", f"cache_connection: {folder}/cache", ""]))
        seconds = []
        for _ in range(2):
            start = time.monotonic()
            found = subprocess.run(
                ["scripts/lab-env", "ansible-inventory", "-i", str(source), "--graph"],
                cwd=CHECKOUT, capture_output=True, text=True, check=True, timeout=600,
            ).stdout  # fmt: skip
            seconds.append(f"{time.monotonic() - start:.1f}")
            assert found.count("|--ai-") >= number, found[-500:]
        return seconds[0], seconds[1]
    finally:
        server.stop()


BENCHES: dict[str, Callable[[], str]] = {
    "site": site,
    "bastion": bastion,
    "lab-again": lab_again,
    "inventory": inventory,
    "releases": releases,
    "vllm": vllm,
    "lab": lab,
}


def main() -> int:
    wanted = sys.argv[1:] or [name for name in BENCHES if name != "lab"]
    if unknown := set(wanted) - set(BENCHES):
        print(f"no bench called {', '.join(sorted(unknown))}\n{__doc__}", file=sys.stderr)
        return 2
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    print(f"{machine}, {memory_in_use():.0f} MiB in use before")
    WRITTEN.mkdir(parents=True, exist_ok=True)
    for name in wanted:
        text = BENCHES[name]()
        (WRITTEN / f"{name}.md").write_text(f"{machine}\n{text}")
        print(text, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
