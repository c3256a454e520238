"""gpu_containers, on a host that is made up: its programs answer from a small state that they also change."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from ansible_collections.nemo.platform.plugins.module_utils import container_toolkit, gpu
from ansible_collections.nemo.platform.plugins.modules import gpu_containers
from ansible_collections.nemo.platform.plugins.modules.gpu_containers import CONTAINER, Containers, ContainersError

CARD = "GPU-7c1f0a4c"
LIBRARY = "/usr/lib/x86_64-linux-gnu/libcuda.so.{}"
WANTED: dict[str, Any] = {
    "version": "1.20.1-1", "packages_required": True, "runtime": "nvidia", "runtime_hint": "; set it", "card_required": True,
    "units": ["names.service"], "proof": "changed", "image": "", "timeout": 120,
}  # fmt: skip
ALL_ROUNDS = ["new", "reload", "restart"]


class Host:
    """A host on which everything works; a test breaks something."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.asked: list[list[str]] = []
        self.version, self.held = "1.20.1-1", True
        self.loaded, self.libraries = "580.95.05", "580.95.05"
        self.usable = True
        self.live_restore = True
        self.runtimes = {"nvidia": {"path": "/usr/bin/nvidia-container-runtime"}, "runc": {}}
        self.images: set[str] = set()
        self.containers: dict[str, dict[str, Any]] = {}
        self.units = {"nvidia-cdi-refresh.path", "names.service"}
        self.enabled = {"nvidia-cdi-refresh.path"}
        self.refreshes = True
        self.seen = CARD
        # (event, what the container says after it)
        self.breaks_at: dict[str, str] = {}
        self.broken = ""
        self.ends_at_restart: list[str] = []
        for name in ("sh", "sleep", "nvidia-smi"):
            self.write(f"/usr/bin/{name}", name)
        self.write("/lib/x86_64-linux-gnu/libc.so.6", "libc")
        self.specify("580.95.05")

    def write(self, path: str, text: str) -> None:
        target = self.root / path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)

    def specify(self, version: str) -> None:
        library = LIBRARY.format(version)
        self.write(library, "")
        self.write(container_toolkit.CDI, f"  - hostPath: {library}\n")

    def look(self) -> dict[str, Any]:
        return {
            "usable": self.usable,
            "problem": "" if self.usable else "nvidia-smi does not see the card",
            "devices": [{"uuid": CARD}] if self.usable else [],
            "driver": {"loaded": self.loaded, "libraries": self.libraries, "kernel": "6.12.1"},
        }

    def runs(self, name: str, runtime: str = "runc", **more: Any) -> None:
        self.containers[name] = {
            "Id": f"id-{name}", "Name": f"/{name}", "State": {"Pid": 100 + len(self.containers)},
            "HostConfig": {"Runtime": runtime, "DeviceRequests": None, "AutoRemove": False, **more},
        }  # fmt: skip

    def did(self, *words: str) -> list[list[str]]:
        return [argv for argv in self.asked if argv[: len(words)] == list(words)]

    def run(self, argv: Sequence[str], _timeout: float = 30) -> tuple[int, str, str]:
        argv = list(argv)
        self.asked.append(argv)
        answer = getattr(self, f"_{argv[0].replace('-', '_')}")(*argv[1:])
        return answer if isinstance(answer, tuple) else (0, answer, "")

    def _dpkg_query(self, *_words: str) -> Any:
        state = "hold" if self.held else "install"
        return (
            "".join(f"{state} installed {name} {self.version}\n" for name in container_toolkit.PACKAGES)
            if self.version
            else (1, "", "")
        )

    def _apt_mark(self, *words: str) -> Any:
        self.held = self.held or words[0] == "hold"
        return ""

    def _journalctl(self, *_words: str) -> Any:
        return "Starting\nfailed to generate CDI spec\n"

    def _ldd(self, path: str) -> Any:
        if path.endswith("nvidia-smi"):
            return 1, "", "not a dynamic executable"
        return "\tlinux-vdso.so.1 (0x1)\n\tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x2)\n"

    def _systemctl(self, *words: str) -> Any:
        verb, unit = words[0], words[-1]
        if verb in ("is-active", "is-enabled"):
            return "" if unit in (self.units if verb == "is-active" else self.enabled) else (3, "", "")
        if verb == "daemon-reload":
            self.broken = self.breaks_at.get("reload", self.broken)
        elif verb == "restart" and unit == "docker.service":
            self.broken = self.breaks_at.get("restart", self.broken)
            for name in self.ends_at_restart:
                self.containers[name]["State"]["Pid"] = 0
        elif verb == "restart" and unit == "nvidia-cdi-refresh.service":
            if self.refreshes:
                self.specify(self.libraries)
        elif verb in ("start", "enable"):
            self.units.add(unit)
            self.enabled.add(unit)
        return ""

    def _docker(self, *words: str) -> Any:
        match words[0]:
            case "info":
                return json.dumps(
                    {"ServerVersion": "28", "Runtimes": self.runtimes, "LiveRestoreEnabled": self.live_restore}
                )
            case "run":
                if "start" in self.breaks_at:
                    return 125, "", "docker: Error response from daemon:\nunknown device\n"
                self.runs(CONTAINER, "nvidia")
            case "rm":
                self.containers.pop(words[-1], None)
            case "exec":
                return (1, "", self.broken) if self.broken else f"{self.seen}\n"
            case "ps":
                return "\n".join(self.containers)
            case "inspect":
                return json.dumps([entry for name, entry in self.containers.items() if name in words])
            case "images":
                return "\n".join(name for name in self.images if name.startswith("nemo/gpu-proof"))
            case "image" if words[1] == "inspect":
                return "" if words[2] in self.images else (1, "", "no such image")
            case "image":
                self.images.discard(words[2])
            case "pull":
                return 1, "", "Error response from daemon: no route\n"
            case "import":
                with tarfile.open(words[1]) as archive:
                    self.packed = {member.name: member for member in archive.getmembers()}
                self.images.add(words[2])
        return ""


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    made = Host(tmp_path)
    (tmp_path / "run/nemo").mkdir(parents=True)
    monkeypatch.setattr(gpu, "look", lambda _root, _run: made.look())
    monkeypatch.setattr(Containers, "_program", staticmethod(lambda name: f"/usr/bin/{name}"))
    return made


@pytest.fixture
def act(host: Host) -> Callable[..., dict[str, Any]]:
    def act(check: bool = False, **wanted: Any) -> dict[str, Any]:
        host.asked.clear()
        containers = Containers({**WANTED, **wanted}, host.run, check, str(host.root), sleep=lambda _seconds: None)
        containers.act()
        return containers.result()

    return act


def test_proves_in_three_rounds_and_then_no_more(host: Host, act: Any) -> None:
    first = act()
    assert first["changed"]
    assert (first["proof"]["rounds"], first["proof"]["left_out"]) == (ALL_ROUNDS, [])
    assert host.containers == {}
    assert len(host.did("docker", "run")) == 2
    again = act()
    assert not again["changed"]
    assert again["proof"] == first["proof"]
    assert not host.did("docker", "run")
    assert not host.did("systemctl", "restart")


def test_a_second_run_asks_little(host: Host, act: Any) -> None:
    act()
    act()
    assert len(host.asked) <= 5


@pytest.mark.parametrize(
    "change",
    [
        lambda host: setattr(host, "loaded", "580.105.08"),
        lambda host: host.runtimes.update(nvidia={"path": "/elsewhere"}),
    ],
)
def test_proves_again_after_a_change(host: Host, act: Any, change: Any) -> None:
    act()
    change(host)
    assert "proved that containers see the card" in act()["done"][-1]


def test_never_and_always(host: Host, act: Any) -> None:
    assert act(proof="never")["proof"] == {}
    assert not host.did("docker", "run")
    act()
    assert act(proof="always")["proof"]["rounds"] == ALL_ROUNDS
    assert host.did("systemctl", "daemon-reload")


def test_a_broken_record_is_none(host: Host, act: Any) -> None:
    act()
    (host.root / "var/lib/nemo/gpu_containers/proof.json").write_text("{")
    assert act()["proof"]["rounds"] == ALL_ROUNDS


class TestOthers:
    def test_one_on_the_card_is_left_alone(self, host: Host, act: Any) -> None:
        host.runs("vllm-a", "nvidia")
        result = act()
        assert result["proof"]["rounds"] == ["new"]
        assert result["proof"]["left_out"] == [
            "no daemon-reload and no restart of the engine was tried, with vllm-a on the card"
        ]
        assert not host.did("systemctl", "daemon-reload")
        assert list(host.containers) == ["vllm-a"]

    def test_one_by_a_device_request_too(self, host: Host, act: Any) -> None:
        host.runs("vllm-a", DeviceRequests=[{"Driver": "nvidia"}])
        assert act()["proof"]["rounds"] == ["new"]

    def test_on_demand_with_it(self, host: Host, act: Any) -> None:
        host.runs("vllm-a", "nvidia")
        assert act(proof="always")["proof"]["rounds"] == ALL_ROUNDS

    @pytest.mark.parametrize("proof", ["changed", "always"])
    def test_no_restart_without_live_restore(self, host: Host, act: Any, proof: str) -> None:
        host.live_restore = False
        host.runs("web")
        result = act(proof=proof)
        assert result["proof"]["rounds"] == ["new", "reload"]
        assert result["proof"]["left_out"] == [
            "no restart of the engine was tried: live-restore is off, it would end web"
        ]
        assert not host.did("systemctl", "restart", "docker.service")

    def test_no_restart_with_one_that_removes_itself(self, host: Host, act: Any) -> None:
        host.runs("job", AutoRemove=True)
        assert act()["proof"]["left_out"] == ["no restart of the engine was tried: it would end job, started with --rm"]

    def test_a_restart_that_ends_one_is_an_error(self, host: Host, act: Any) -> None:
        host.runs("web")
        host.ends_at_restart = ["web"]
        with pytest.raises(ContainersError, match="ended web, though live-restore is on"):
            act()


class TestFailures:
    @pytest.mark.parametrize(
        ("event", "says"),
        [
            ("start", "no container starts with the runtime nvidia: unknown device"),
            (
                "reload",
                "a running container, after systemctl daemon-reload, does not see the card: Unknown Error; .*native.cgroupdriver=cgroupfs",
            ),
            ("restart", "a running container, after a restart of the engine, does not see the card: Unknown Error$"),
        ],
    )
    def test_a_round_that_fails(self, host: Host, act: Any, event: str, says: str) -> None:
        host.breaks_at = {event: "Failed to initialize NVML:\nUnknown Error\n"}
        with pytest.raises(ContainersError, match=says):
            act()
        assert host.containers == {}
        assert not (host.root / "var/lib/nemo/gpu_containers/proof.json").exists()

    def test_another_card(self, host: Host, act: Any) -> None:
        host.seen = "GPU-other"
        with pytest.raises(ContainersError, match=f"sees GPU-other, the host has {CARD}"):
            act()

    def test_nothing_is_touched_where_the_engine_does_not_know_the_runtime(self, host: Host, act: Any) -> None:
        del host.runtimes["nvidia"]
        host.version, host.held = "1.19.0-1", False
        with pytest.raises(ContainersError, match="knows no runtime nvidia; set it"):
            act(packages_required=False)
        assert {argv[0] for argv in host.asked} == {"dpkg-query", "docker"}

    def test_no_card(self, host: Host, act: Any) -> None:
        host.usable = False
        with pytest.raises(ContainersError, match="the card cannot be used: nvidia-smi does not see the card"):
            act()
        result = act(card_required=False)
        assert not result["changed"]
        assert result["problems"] == ["the card cannot be used: nvidia-smi does not see the card"]

    def test_an_image_that_cannot_be_pulled(self, act: Any) -> None:
        with pytest.raises(
            ContainersError, match=r"the image registry/x@sha256:1 of the proof .* cannot be pulled .*: .*no route"
        ):
            act(image="registry/x@sha256:1")


class TestPackages:
    def test_another_version_is_told_and_nothing_done(self, host: Host, act: Any) -> None:
        host.version = "1.19.0-1"
        result = act(packages_required=False)
        assert (result["packages_needed"], result["changed"]) == (list(container_toolkit.PACKAGES), False)
        with pytest.raises(ContainersError, match=r"wanted is 1.20.1-1, the host has libnvidia-container1 1.19.0-1"):
            act()

    def test_held(self, host: Host, act: Any) -> None:
        host.held = False
        result = act()
        assert result["done"][0].startswith("held libnvidia-container1, ")
        assert all(package["held"] for package in result["packages"].values())

    def test_locked_where_there_is_dnf(self, host: Host, act: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        host.held = False
        monkeypatch.setattr(Host, "_apt_mark", lambda *_words: (127, "", ""))
        monkeypatch.setattr(Host, "_dnf", lambda *_words: "", raising=False)
        act()
        verbs = [argv[3] for argv in host.did("dnf", "--quiet", "versionlock")]
        assert verbs == ["delete", "add"]


class TestSpecification:
    def test_made_anew(self, host: Host, act: Any) -> None:
        host.specify("580.65.06")
        result = act()
        assert "made the CDI specification anew: the CDI specification" in " ".join(result["done"])
        assert "is for the driver 580.65.06, the host's is 580.95.05" in " ".join(result["done"])

    def test_a_unit_that_makes_none(self, host: Host, act: Any) -> None:
        host.specify("580.65.06")
        host.refreshes = False
        with pytest.raises(
            ContainersError, match=r"nvidia-cdi-refresh.service did not make one that fits: failed to generate CDI spec"
        ):
            act()

    def test_units_run(self, host: Host, act: Any) -> None:
        host.units.clear()
        host.enabled.clear()
        done = act()["done"]
        assert done[:2] == ["enabled nvidia-cdi-refresh.path", "started names.service"]


class TestImage:
    def test_of_the_hosts_own_files(self, host: Host, act: Any) -> None:
        act()
        assert {"usr/bin/sh", "usr/bin/sleep", "tmp"} <= set(host.packed)
        assert [name for name in host.packed if name.endswith("/libc.so.6")]
        assert "usr/bin/nvidia-smi" not in host.packed
        assert not (host.root / "run/nemo/gpu_containers.lock.tar").exists()

    def test_made_once_and_the_old_one_goes(self, host: Host, act: Any) -> None:
        act()
        act(proof="always")
        assert not host.did("docker", "import")
        (first,) = host.images
        host.write("/lib/x86_64-linux-gnu/libc.so.6", "newer")
        act(proof="always")
        assert len(host.images) == 1
        assert first not in host.images

    def test_one_of_the_users(self, host: Host, act: Any) -> None:
        host.images.add("vllm@sha256:1")
        assert act(image="vllm@sha256:1")["proof"]["facts"]["image"] == "vllm@sha256:1"
        assert not host.did("docker", "import")


class TestCheckMode:
    def test_on_a_bare_host(self, host: Host, act: Any) -> None:
        host.version, host.usable = "", False
        host.runtimes.clear()
        result = act(check=True)
        assert (result["changed"], result["packages_needed"]) == (False, list(container_toolkit.PACKAGES))
        assert len(result["problems"]) == 2

    def test_says_what_it_would_do(self, host: Host, act: Any) -> None:
        host.held = False
        host.specify("580.65.06")
        result = act(check=True)
        assert [text.split()[0] for text in result["done"]] == ["held", "made", "proved"]
        assert not host.did("apt-mark", "hold")
        assert not host.did("systemctl", "restart")
        assert not host.did("docker", "run")
        assert not host.did("docker", "rm")

    def test_finished_host(self, act: Any) -> None:
        act()
        assert not act(check=True)["changed"]


def test_one_line() -> None:
    assert gpu_containers.one_line("", "a\n b \n\n") == "b"
    assert gpu_containers.one_line("", "") == "it said nothing"
