"""The lab's command line: `python -m lab --help`."""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import fcntl
import os
import shutil
import sys
from collections.abc import Iterator

from lab import engine as engines
from lab import hosts, image, volume
from lab.console import LabError, say
from lab.engine import Engine
from lab.settings import AWS_HOST, CLUSTER_API, DATABASE, INSTANCES, NETWORK, OPERATORS, STATE


@contextlib.contextmanager
def only_one() -> Iterator[None]:
    """Keep a second command of this checkout waiting while one changes the lab."""
    STATE.mkdir(exist_ok=True)
    with (STATE / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another lab command of this checkout is at work: waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def engine_of_this_checkout() -> engines.Engine:
    """The engine, if no other checkout has its lab there: the platform's addresses exist once on a machine."""
    engine = engines.ensure()
    up = sorted(owner for owner, is_up in hosts.others(engine).items() if is_up)
    if up:
        raise LabError(f"the lab of another checkout is up: run `make lab-down` in {', '.join(up)} first")
    hosts.remove_left(engine)
    return engine


def make_image(_: argparse.Namespace) -> None:
    """Build the base image alone; it needs nothing but Python's standard library."""
    with only_one():
        image.ensure(engine_of_this_checkout())


def core(_: argparse.Namespace) -> None:
    """Bring up what every host needs: the engine, the network and the AWS side."""
    with only_one():
        _core()


def _core() -> tuple[engines.Engine, bytes, str]:
    from lab.artifacts import publish  # both need the controller's packages, which `image` must not
    from lab.aws import side

    with concurrent.futures.ThreadPoolExecutor(1) as beside:
        artifacts = beside.submit(publish.prepare)
        engine = engine_of_this_checkout()
        base = image.ensure(engine)
        if not shutil.which("ssh-keygen"):
            engines.apt_install(["openssh-client"])
        hosts.keys()
        hosts.network(engine)
        return engine, *side.up(engine, base, artifacts)


def artifacts(_: argparse.Namespace) -> None:
    """Make what hosts download from the mirror; it needs no container engine, and may run beside `image`."""
    from lab.artifacts import publish

    STATE.mkdir(exist_ok=True)
    publish.prepare()


def up(_: argparse.Namespace) -> None:
    """Bring up the whole lab; what is up already stays as it is."""
    with only_one():
        engine, ca, mirror_key = _core()
        changed = hosts.up(engine, image.name(), ca, mirror_key)
        _attach_volumes(engine)
    say("the lab is up" if changed else "the lab was up already")


def scenario_hosts(arguments: argparse.Namespace) -> None:
    """Make bare hosts for tests beside the platform's, or remove them."""
    with only_one():
        if arguments.remove:
            hosts.scenario_hosts_down(engine_of_this_checkout(), arguments.names)
            return
        engine, ca, mirror_key = _core()
        from lab.aws import seed

        made = hosts.scenario(engine, arguments.names)
        seed.outsiders([host.address for host in made])
        hosts.scenario_hosts(engine, image.name(), ca, mirror_key, made)


def rebuild(arguments: argparse.Namespace) -> None:
    """Make one host of the platform anew, as bare as at its first boot."""
    with only_one():
        engine, ca, mirror_key = _core()
        engine("rm", "--force", "--volumes", f"nemo-lab-{arguments.host}", check=False)
        hosts.up(engine, image.name(), ca, mirror_key)
        _attach_volumes(engine)


def _attach_volumes(engine: Engine) -> None:
    for host in volume.attach(engine):
        engine("restart", host.container)
        hosts.wait_for_boot(engine, host.container)


def volumes(arguments: argparse.Namespace) -> None:
    """Change the volumes of the lab's hosts: `grow` makes them larger, as `aws ec2 modify-volume` does."""
    engine = engines.running()
    if engine is None:
        raise LabError("the lab is down: `make lab` brings it up")
    with only_one():
        print(volume.grow(engine, arguments.gib))


def down(_: argparse.Namespace) -> None:
    """Remove the lab: containers, network, images, and the engine if the lab started it."""
    with only_one():
        engine = engines.running()
        others = hosts.others(engine) if engine else {}
        if engine:
            hosts.down(engine)
        if not others:
            engines.stop()
    say("the lab is down; the cache stays in .lab until `make clean`")


def status(_: argparse.Namespace) -> None:
    """Print the hosts with their addresses, and what to try next."""
    engine = engines.running()
    if engine is None or engine.inspect("network", NETWORK) is None:
        raise LabError("the lab is down: `make lab` brings it up")
    rows = [("host", "address", "state", "what it is")]
    for name, container, address, what in (
        *((host.name, host.container, host.address, host.services or host.role) for host in INSTANCES),
        ("aws", AWS_HOST, "10.0.0.10-12", "AWS API, registry, mirror of packages and tools"),
        ("cluster", AWS_HOST, CLUSTER_API, "API server of the cluster: version, health, who may log in"),
        ("database", AWS_HOST, DATABASE, "a listener in place of RDS"),
    ):
        found = engine.inspect("container", container)
        rows.append((name, address, found["State"]["Status"] if found else "missing", what))
    if any(row[2] != "running" for row in rows[1:]):
        raise LabError("the lab is up in part: `make lab` completes it")
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print(
        "\nTry next:\n"
        "  .venv/bin/python -m lab ssh bastion curl -s 10.0.2.31:8000/health   the production API, as the Bastion sees it\n"
        "  .venv/bin/python -m lab ssh ai-prod                                 a shell on a host, through the Bastion\n"
        "  make site                                                           site.yml again: nothing changes\n"
        "  make site ARGS='--check --diff'                                     what it would change\n"
        "  .venv/bin/python -m lab push prod-20261122-1200 --behaviour unhealthy && make site   a release that fails\n"
        "  make lab-down                                                       remove it all"
    )


def ssh(arguments: argparse.Namespace) -> None:
    """Log in to a host, or run one command there, as the operators do: through the Bastion."""
    check(arguments)
    config = hosts.operator_config(arguments.operator) if arguments.operator else hosts.SSH_CONFIG
    os.execvp("ssh", ["ssh", "-F", str(config), arguments.host, *arguments.command])


def execute(arguments: argparse.Namespace) -> None:
    """Run a command inside a container as root, past SSH."""
    engine = engines.running()
    if engine is None:
        raise LabError("the lab is down: `make lab` brings it up")
    flags = ["--interactive", *(["--tty"] if sys.stdin.isatty() else [])]
    os.execvp(engine.prefix[0], [*engine.prefix, "exec", *flags, f"nemo-lab-{arguments.host}", *arguments.command])


def gpu(arguments: argparse.Namespace) -> None:
    """Set the state of a host's simulated card; without words, show it."""
    engine = engines.running()
    if engine is None:
        raise LabError("the lab is down: `make lab` brings it up")
    from lab.gpu import PROGRAM

    print(engine.exec(f"nemo-lab-{arguments.host}", [PROGRAM, *arguments.words]))


def push(arguments: argparse.Namespace) -> None:
    """Push a release of the AI application, or of the inference server, to the lab's registry."""
    from lab.aws import images, side

    with only_one(), side.errors():
        images.push(arguments.tag, arguments.behaviour, repository=arguments.repository, padding=arguments.padding)


def cpu_image(_: argparse.Namespace) -> None:
    """Make an image of vLLM itself, built for CPUs, and push it to the lab's registry."""
    from lab.aws import side
    from lab.vllm import cpu

    with only_one(), side.errors():
        cpu.ensure()


def remove(arguments: argparse.Namespace) -> None:
    """Remove a tag from the lab's registry."""
    from lab.aws import images, side

    with only_one(), side.errors():
        images.remove(arguments.tag, repository=arguments.repository)


def check(_: argparse.Namespace) -> None:
    """Say whether the lab's addresses lead to the lab; with it down they would lead out of this machine."""
    if not hosts.is_up():
        raise LabError("the lab is down: `make lab` brings it up")


def docker_host(_: argparse.Namespace) -> None:
    """Print the value of DOCKER_HOST with which other programs reach the lab's engine; empty for the default."""
    engine = engines.running()
    print(engine.host_url if engine else "")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m lab", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, function in {
        "up": up, "down": down, "status": status, "core": core, "image": make_image, "ssh": ssh, "exec": execute,
        "artifacts": artifacts, "gpu": gpu, "push": push, "cpu-image": cpu_image, "remove": remove, "docker-host": docker_host, "check": check, "scenario-hosts": scenario_hosts, "rebuild": rebuild,
        "volume": volumes,
    }.items():  # fmt: skip
        command = commands.add_parser(name, help=(function.__doc__ or "").split("\n")[0], description=function.__doc__)
        command.set_defaults(function=function)
        if name in ("ssh", "exec", "rebuild"):
            names = [*(host.name for host in INSTANCES), *(["aws"] if name == "exec" else [])]
            command.add_argument("host", choices=names, help="a host of the platform")
        if name == "ssh":
            command.add_argument(
                "--as", dest="operator", choices=OPERATORS, help="log in to the Bastion as an operator"
            )
        if name in ("ssh", "exec"):
            command.add_argument("command", nargs=argparse.REMAINDER, help="what to run there")
        if name == "gpu":
            command.add_argument("host", help="vllm, or scenario-NAME")
            command.add_argument("words", nargs="*", help="ok, missing, mismatch, lost, hang, xid, memory=MIB, ...")
        if name in ("push", "remove"):
            command.add_argument("tag", help="for example prod-20261122-1200")
            command.add_argument("--repository", default="ai", help="ai (if not given) or vllm-openai")
        if name == "scenario-hosts":
            command.add_argument("names", nargs="*", help="one host each, called nemo-lab-scenario-NAME")
            command.add_argument("--remove", action="store_true", help="remove these, or all of them")
        if name == "volume":
            command.add_argument("act", choices=["grow"])
            command.add_argument("--gib", type=int, default=1, help="by how much (default: 1)")
        if name == "push":
            command.add_argument(
                "--behaviour", default="healthy", help="healthy, unhealthy, crash, slow-start, oom, ..."
            )
            command.add_argument("--padding", type=int, default=0, help="MiB by which the image is larger")
    arguments = parser.parse_args()
    try:
        arguments.function(arguments)
    except LabError as error:
        print(f"lab: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("lab: interrupted; the same command goes on where this one stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
