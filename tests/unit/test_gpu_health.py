"""The programs of the role gpu_health: the page of metrics, its server, and gpu-doctor, on hosts that are made up."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from ansible_collections.nemo.platform.plugins.module_utils import container_toolkit, gpu
from tests.unit.helpers import ROOT

FILES = ROOT / "roles/gpu_health/files"
UUID = "GPU-7c1f0a4c"
NAME = re.compile(r"[a-z][a-z0-9_]*[a-z0-9]")
SAMPLE = re.compile(r"(?P<name>[a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(?P<labels>.*)\})? (?P<value>\S+)")
LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\\n]|\\["\\n])*)"(?:,|$)')
BASE_UNITS = ("bytes", "celsius", "ratio", "seconds", "watts")
FOUND: dict[str, Any] = {
    "present": True,
    "pci": ["0000:00:1e.0"],
    "usable": True,
    "problem": "",
    "code": "",
    "problems": [],
    "driver": {
        "loaded": "580.95.05", "installed": "580.95.05", "libraries": "580.95.05", "open": True, "kernel": "6.12.1",
        "next_kernel": "6.12.1", "module_for_next": True, "secure_boot": False, "signed": False, "nouveau": False,
        "held": True, "packages": [{"name": "nvidia-open", "version": "580.95.05-1", "held": True}],
    },
    "cuda": "13.0",
    "devices": [
        {
            "index": 0, "uuid": UUID, "name": "NVIDIA A10G", "pci": "00000000:00:1E.0", "memory_total_mib": 23028,
            "memory_used_mib": 20480, "temperature_c": 54, "utilisation_percent": 37, "power_w": 112.5,
            "ecc_corrected": 3, "ecc_uncorrected": 0, "persistence": True,
        }
    ],
    "processes": [{"pid": 4711, "name": "VLLM::EngineCore", "memory_used_mib": 20470}],
    "xids": [],
    "reboot": {"needed": False, "why": ""},
}  # fmt: skip
WATCHDOG = {"state": "ok", "strikes": 0, "restarts": ["2026-11-22T10:00:00Z"], "since": "2026-11-22T10:01:00Z",
            "looked": "2026-11-22T10:02:00Z"}  # fmt: skip


@pytest.fixture(autouse=True)
def beside_the_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the role puts beside its programs on the host."""
    monkeypatch.setitem(sys.modules, "gpu", gpu)
    monkeypatch.setitem(sys.modules, "container_toolkit", container_toolkit)
    monkeypatch.syspath_prepend(str(FILES))
    for name in ("gpu_metrics", "gpu_doctor", "gpu_metrics_http"):
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.fixture
def metrics() -> ModuleType:
    return __import__("gpu_metrics")


class Host:
    """A host that is well: a test takes something away."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.found = copy.deepcopy(FOUND)
        self.packages = {name: {"version": "1.20.1-1", "held": True} for name in container_toolkit.PACKAGES}
        self.engine: dict[str, Any] | Exception = {"ServerVersion": "28", "Runtimes": {"nvidia": {}, "runc": {}}}
        self.cdi = ""
        self.user = 0
        self.watchdog = folder / "state.json"
        self.watchdog.write_text(json.dumps(WATCHDOG))
        self.settings: dict[str, Any] = {
            "host": "vllm", "metrics_path": str(folder / "gpu.prom"), "interval": 60, "listen": "127.0.0.1:9836",
            "watchdog_state": str(self.watchdog), "container_runtime": "nvidia", "temperature_limit": 85,
        }  # fmt: skip
        Path(self.settings["metrics_path"]).write_text("")
        monkeypatch.setattr(gpu, "look", lambda: self.found)
        monkeypatch.setattr(container_toolkit, "packages", lambda _run: self.packages)
        monkeypatch.setattr(container_toolkit, "engine", self.ask)
        monkeypatch.setattr(container_toolkit, "cdi_problem", lambda _driver: self.cdi)
        monkeypatch.setattr(os, "geteuid", lambda: self.user)

    def ask(self, _run: object) -> dict[str, Any]:
        if isinstance(self.engine, Exception):
            raise self.engine
        return self.engine

    def without_a_card(self) -> None:
        text = "no NVIDIA card is on the PCI bus: is this a GPU instance?"
        self.found.update(
            present=False, usable=False, pci=[], devices=[], processes=[], cuda="", code="no_gpu", problem=text,
            problems=[{"code": "no_gpu", "text": text}],
        )  # fmt: skip
        self.found["driver"].update(loaded="", installed="", libraries="", packages=[], held=False)

    def wrong(self, code: str, text: str) -> None:
        self.found.update(code=code, problem=text, problems=[{"code": code, "text": text}])

    def page(self, metrics: ModuleType) -> str:
        return str(metrics.page_of(str(self.watchdog)))

    def doctor(self) -> tuple[int, str]:
        status, screen = __import__("gpu_doctor").examine(self.settings)
        return int(status), str(screen)


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    return Host(tmp_path, monkeypatch)


def families(page: str) -> dict[str, dict[str, float]]:
    """Samples by family and labels; fails for what Prometheus or its textfile collector would not take, or takes badly."""
    assert page.endswith("\n")
    found: dict[str, dict[str, float]] = {}
    kind, name, lines = "", "", page.splitlines()
    for place, line in enumerate(lines):
        if line.startswith("# HELP "):
            name, _space, text = line.removeprefix("# HELP ").partition(" ")
            assert NAME.fullmatch(name)
            assert name not in found, f"{name} comes twice"
            assert text.endswith("."), line
            assert lines[place + 1].startswith(f"# TYPE {name} ")
            found[name] = {}
        elif line.startswith("# TYPE "):
            assert line.split()[2] == name
            kind = line.split()[3]
            assert kind in ("gauge", "counter")
            assert name.endswith("_total") == (kind == "counter"), f"{name} is a {kind}"
        else:
            match = SAMPLE.fullmatch(line)
            assert match, line
            assert match["name"] == name, "samples stand below their own HELP and TYPE"
            labels = match["labels"] or ""
            assert "".join(part[0] for part in re.finditer(LABEL, labels)) == labels, line
            assert labels not in found[name], f"{line} comes twice"
            found[name][labels] = float(match["value"])
    assert all(samples for samples in found.values()), "a family has samples"
    for family in found:
        for word in re.findall(r"_(mib|mb|percent|milliseconds|fahrenheit)(?:_|$)", family):
            raise AssertionError(f"{family}: {word} is no base unit; those are {BASE_UNITS}")
    return found


def one(page: dict[str, dict[str, float]], name: str) -> float:
    (value,) = page[name].values()
    return value


class TestMetrics:
    def test_a_card_that_is_well(self, host: Host, metrics: ModuleType) -> None:
        page = families(host.page(metrics))
        card = f'gpu="0",uuid="{UUID}"'
        assert one(page, "nemo_gpu_present") == one(page, "nemo_gpu_usable") == 1
        assert page["nemo_gpu_temperature_celsius"] == {card: 54}
        assert page["nemo_gpu_memory_used_bytes"] == {card: 20480 * 2**20}
        assert page["nemo_gpu_memory_total_bytes"] == {card: 23028 * 2**20}
        assert page["nemo_gpu_utilization_ratio"] == {card: pytest.approx(0.37)}
        assert page["nemo_gpu_power_watts"] == {card: 112.5}
        assert page["nemo_gpu_ecc_errors_total"] == {f'{card},type="corrected"': 3, f'{card},type="uncorrected"': 0}
        assert page["nemo_gpu_problem"] == {f'code="{code}"': 0 for code in gpu.CODES}
        assert one(page, "nemo_gpu_driver_mismatch") == one(page, "nemo_gpu_reboot_needed") == 0
        assert 'loaded="580.95.05"' in next(iter(page["nemo_gpu_driver_info"]))
        assert one(page, "nemo_gpu_health_last_run_timestamp_seconds") == pytest.approx(time.time(), abs=60)
        assert page["nemo_gpu_health_failed"] == {'part="gpu"': 0, 'part="watchdog"': 0}

    def test_without_a_card(self, host: Host, metrics: ModuleType) -> None:
        host.without_a_card()
        host.watchdog.unlink()
        page = families(host.page(metrics))
        assert one(page, "nemo_gpu_present") == one(page, "nemo_gpu_usable") == 0
        assert page["nemo_gpu_problem"]['code="no_gpu"'] == 1
        assert not [name for name in page if name.startswith(("nemo_gpu_xid", "nemo_gpu_memory", "nemo_vllm"))]
        assert page["nemo_gpu_health_failed"] == {'part="gpu"': 0, 'part="watchdog"': 0}

    @pytest.mark.parametrize("part", ["installed", "libraries"])
    def test_another_version_is_loaded(self, host: Host, metrics: ModuleType, part: str) -> None:
        host.found["driver"][part] = "580.105.08"
        assert one(families(host.page(metrics)), "nemo_gpu_driver_mismatch") == 1

    def test_what_a_card_does_not_tell(self, host: Host, metrics: ModuleType) -> None:
        for field in ("power_w", "ecc_corrected", "ecc_uncorrected", "memory_used_mib"):
            host.found["devices"][0][field] = None
        page = families(host.page(metrics))
        assert not {"nemo_gpu_power_watts", "nemo_gpu_ecc_errors_total", "nemo_gpu_memory_used_bytes"} & set(page)

    def test_xid_errors(self, host: Host, metrics: ModuleType) -> None:
        before = families(host.page(metrics))["nemo_gpu_xid_errors_total"]
        assert before['code="79"'] == before['code="31"'] == 0
        host.found["xids"] = [
            {"code": code, "time": moment, "text": "", "pci": ""}
            for code, moment in ((79, 1795341600.25), (79, 1795341700.5), (500, 3.0))
        ]
        page = families(host.page(metrics))
        assert page["nemo_gpu_xid_errors_total"]['code="79"'] == 2
        assert page["nemo_gpu_xid_errors_total"]['code="500"'] == 1
        assert page["nemo_gpu_xid_last_timestamp_seconds"] == {'code="79"': 1795341700.5, 'code="500"': 3}

    def test_watchdog(self, host: Host, metrics: ModuleType) -> None:
        host.watchdog.write_text(json.dumps({**WATCHDOG, "valid_until": "2999-01-01T00:00:00Z"}))
        page = families(host.page(metrics))
        assert page["nemo_vllm_watchdog_state"] == {
            'state="ok"': 1, 'state="loading"': 0, 'state="failing"': 0, 'state="restarting"': 0, 'state="down"': 0,
            'state="gave_up"': 0,
        }  # fmt: skip
        assert one(page, "nemo_vllm_serving") == 1
        assert one(page, "nemo_vllm_watchdog_restarts") == 1
        assert one(page, "nemo_vllm_watchdog_last_restart_timestamp_seconds") == 1795341600
        assert one(page, "nemo_vllm_watchdog_since_timestamp_seconds") == 1795341660
        assert one(page, "nemo_vllm_watchdog_last_look_timestamp_seconds") == 1795341720

    @pytest.mark.parametrize("state", ["loading", "failing", "restarting", "down", "gave_up"])
    def test_it_serves_or_it_does_not(self, host: Host, metrics: ModuleType, state: str) -> None:
        host.watchdog.write_text(json.dumps({**WATCHDOG, "state": state}))
        page = families(host.page(metrics))
        assert page["nemo_vllm_watchdog_state"][f'state="{state}"'] == 1
        assert one(page, "nemo_vllm_serving") == 0

    @pytest.mark.parametrize(
        "text",
        [
            '{"state":',
            "[]",
            '{"state": "fine"}',
            '{"state": "ok", "strikes": "2"}',
            '{"state": "ok", "restarts": 3}',
            "",
            '{"state": "ok", "looked": "2026-11-22T10:02:00Z", "valid_until": "2026-11-22T10:09:00Z"}',
        ],
    )
    def test_watchdog_of_others_or_one_that_has_ended(self, host: Host, metrics: ModuleType, text: str) -> None:
        host.watchdog.write_text(text)
        page = families(host.page(metrics))
        assert page["nemo_gpu_health_failed"] == {'part="gpu"': 0, 'part="watchdog"': 1}
        assert "nemo_vllm_serving" not in page
        assert one(page, "nemo_gpu_usable") == 1

    def test_a_look_that_fails(self, host: Host, metrics: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
        def broken() -> None:
            raise KeyError("driver")

        monkeypatch.setattr(gpu, "look", broken)
        page = families(host.page(metrics))
        assert page["nemo_gpu_health_failed"] == {'part="gpu"': 1, 'part="watchdog"': 0}
        assert page["nemo_vllm_watchdog_state"]['state="ok"'] == 1
        assert "nemo_gpu_health_last_run_timestamp_seconds" in page

    def test_names_are_escaped(self, host: Host, metrics: ModuleType) -> None:
        host.found["devices"][0]["name"] = 'a "b"\\c\nd'
        (labels,) = families(host.page(metrics))["nemo_gpu_info"]
        assert r'name="a \"b\"\\c\nd"' in labels

    def test_file_is_replaced_in_one_step(
        self, metrics: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        target = tmp_path / "gpu.prom"
        metrics.write(target, "old 1\n")
        with target.open() as reader:
            metrics.write(target, "new 1\n")
            assert reader.read() == "old 1\n"
        assert (target.read_text(), target.stat().st_mode & 0o777) == ("new 1\n", 0o644)

        def full(_descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            metrics.write(target, "newer 1\n")
        assert [path.name for path in tmp_path.iterdir()] == ["gpu.prom"]
        assert target.read_text() == "new 1\n"


class TestServer:
    @pytest.fixture
    def ask(self, tmp_path: Path) -> Any:
        page = tmp_path / "gpu.prom"
        page.write_text("up 1\n")

        def ask(request: str, peer: str = "127.0.0.1") -> SimpleNamespace:
            networks = ["127.0.0.0/8", "10.0.3.0/24", "fd00::/8"]
            argv = [sys.executable, "-I", str(FILES / "gpu_metrics_http.py"), str(page), *networks]
            done = subprocess.run(
                argv, input=request.encode(), capture_output=True, check=True, timeout=30, env={"REMOTE_ADDR": peer}
            )
            head, _blank, body = done.stdout.decode().partition("\r\n\r\n")
            return SimpleNamespace(status=int(head.split()[1]), head=head, body=body, page=page)

        return ask

    def test_metrics(self, ask: Any) -> None:
        answer = ask("GET /metrics HTTP/1.1\r\nHost: x\r\nAccept: */*\r\n\r\n")
        assert (answer.status, answer.body) == (200, "up 1\n")
        assert "Content-Type: text/plain; version=0.0.4" in answer.head
        assert "Content-Length: 5" in answer.head

    def test_head(self, ask: Any) -> None:
        answer = ask("HEAD /metrics HTTP/1.1\r\n\r\n")
        assert (answer.status, answer.body) == (200, "")
        assert "Content-Length: 5" in answer.head

    @pytest.mark.parametrize(
        ("request_line", "status"),
        [
            ("GET / HTTP/1.1", 404),
            ("GET /metrics/../../etc/passwd HTTP/1.1", 404),
            ("GET /metrics?x=1 HTTP/1.0", 200),
            ("POST /metrics HTTP/1.1", 405),
            ("", 400),
            ("nonsense", 400),
            ("GET /" + "x" * 20000, 400),
        ],
    )
    def test_other_requests(self, ask: Any, request_line: str, status: int) -> None:
        assert ask(f"{request_line}\r\n\r\n").status == status

    @pytest.mark.parametrize(
        ("peer", "status"),
        [("10.0.3.7", 200), ("fd00::7", 200), ("10.0.4.7", 403), ("fe80::1%eth0", 403), ("", 403), ("name", 403)],
    )
    def test_who_is_answered(self, ask: Any, peer: str, status: int) -> None:
        answer = ask("GET /metrics HTTP/1.1\r\n\r\n", peer)
        assert answer.status == status
        assert (answer.body == "up 1\n") == (status == 200)

    def test_no_page_yet(self, ask: Any, tmp_path: Path) -> None:
        (tmp_path / "gpu.prom").unlink()
        answer = ask("GET /metrics HTTP/1.1\r\n\r\n")
        assert answer.status == 503
        assert "nemo-gpu-metrics.service" in answer.body


def said(screen: str) -> str:
    return " ".join(screen.split())


class TestDoctor:
    def test_all_is_well(self, host: Host) -> None:
        status, screen = host.doctor()
        assert status == 0, screen
        assert screen.endswith("\nnothing is wrong\n")
        for words in ("NVIDIA A10G", "54 C, 112.5 W", "20480 of 23028 MiB", "580.95.05 loaded (open)", "VLLM::EngineCore (4711)",
                      "the engine knows the runtime nvidia", "CDI specification fits", "watchdog ok since"):  # fmt: skip
            assert words in said(screen)
        assert len(screen.splitlines()) <= 24
        assert max(map(len, screen.splitlines())) <= 100

    def test_without_a_card(self, host: Host) -> None:
        host.without_a_card()
        status, screen = host.doctor()
        assert status == 2
        assert "no NVIDIA card is on the PCI bus" in screen
        assert "nothing is wrong" not in screen

    @pytest.mark.parametrize("code", [code for code in gpu.CODES if code not in ("no_gpu", "xid")])
    def test_every_problem_has_its_advice(self, host: Host, code: str) -> None:
        host.found["driver"]["next_kernel"] = "6.12.2"
        host.wrong(code, "something is wrong")
        status, screen = host.doctor()
        assert status == 1
        assert re.search(r" 1\. something is wrong\n    -> \S+", screen)
        assert "{" not in screen
        if code == "next_kernel":
            assert "dkms autoinstall -k 6.12.2" in screen

    @pytest.mark.parametrize(
        ("number", "advice"), [(79, "stop and start the instance"), (48, "systemctl reboot"), (999, "xid-errors")]
    )
    def test_xid(self, host: Host, number: int, advice: str) -> None:
        host.found["xids"] = [{"code": code, "time": 1.0, "text": "", "pci": ""} for code in (number, 31)]
        host.wrong("xid", f"the kernel reports Xid {number} since the last boot")
        status, screen = host.doctor()
        assert status == 1
        assert advice in said(screen)
        assert "31 x 1 (of an application)" in said(screen)

    def test_many_findings_stay_on_a_screen(self, host: Host) -> None:
        host.found["problems"] = [
            {"code": code, "text": f"{code} is wrong"} for code in gpu.CODES if code not in ("no_gpu", "xid")
        ]
        status, screen = host.doctor()
        assert status == 1
        assert "9 findings" in screen
        assert len(screen.splitlines()) <= 50

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            (lambda host: host.found["devices"][0].update(temperature_c=85), "card 0 is at 85 C, the limit is 85 C"),
            (lambda host: host.found["devices"][0].update(ecc_uncorrected=2), "2 uncorrected memory errors"),
            (lambda host: host.found.update(processes=[]), "20480 MiB are in use by no process"),
            (lambda host: host.found["driver"]["packages"][0].update(held=False), "not held is nvidia-open"),
            (lambda host: host.packages.clear(), "nvidia-container-toolkit is not installed"),
            (lambda host: host.engine.update(Runtimes={"runc": {}}), "set docker_engine_runtimes: {nvidia: {path: /usr/bin/nvidia-container-runtime}}"),
            (lambda host: setattr(host, "engine", container_toolkit.EngineError("there is no Docker Engine")), "there is no Docker Engine"),
            (lambda host: setattr(host, "cdi", "the CDI specification is for another"), "systemctl restart nvidia-cdi-refresh"),
            (lambda host: host.watchdog.write_text(json.dumps({**WATCHDOG, "state": "failing", "strikes": 2})), "does not answer its watchdog (failing, 2 failed probes)"),
            (lambda host: host.watchdog.write_text(json.dumps({**WATCHDOG, "state": "gave_up", "reason": "timeout"})), "gave up on vLLM after 1 restart: timeout"),
            (lambda host: host.watchdog.write_text(json.dumps({**WATCHDOG, "state": "down", "reason": "its container is exited"})), "vLLM is down: its container is exited -> sudo docker ps"),
            (lambda host: host.watchdog.write_text("{"), "watchdog says nothing"),
            (lambda host: host.watchdog.write_text(json.dumps({**WATCHDOG, "valid_until": "2026-11-22T10:09:00Z"})), "it last looked at 2026-11-22T10:02:00Z -> systemctl status nemo-vllm-watchdog.timer"),
            (lambda host: Path(host.settings["metrics_path"]).unlink(), "there are no metrics"),
            (lambda host: os.utime(host.settings["metrics_path"], (0, 0)), "s old, they are made every 60 s"),
        ],
    )  # fmt: skip
    def test_findings(self, host: Host, change: Any, says: str) -> None:
        change(host)
        status, screen = host.doctor()
        assert status == 1
        assert "1 finding\n" in screen
        assert says in said(screen)
        assert "\n    -> " in screen

    def test_an_ordinary_user_is_told_what_was_not_looked_at(self, host: Host) -> None:
        host.user, host.engine = 1000, container_toolkit.EngineError("permission denied")
        status, screen = host.doctor()
        assert status == 0
        assert said(screen).count("sudo gpu-doctor") == 2

    def test_containers_are_none_of_its_business(self, host: Host) -> None:
        host.settings["container_runtime"] = ""
        host.packages.clear()
        status, screen = host.doctor()
        assert status == 0
        assert "containers " not in screen

    def test_a_model_that_loads_is_no_finding(self, host: Host) -> None:
        host.watchdog.write_text(json.dumps({**WATCHDOG, "state": "loading", "reason": "it has been loading for 12 s"}))
        status, screen = host.doctor()
        assert status == 0
        assert "watchdog loading since 2026-11-22T10:01:00Z; 0 failed probes in a row; 1 restart" in said(screen)
        assert "it has been loading for 12 s" in said(screen)

    def test_no_watchdog(self, host: Host) -> None:
        host.watchdog.unlink()
        assert host.doctor()[0] == 0

    def test_programs_run_where_the_role_puts_them(self, tmp_path: Path) -> None:
        for path in (
            *FILES.glob("*.py"),
            ROOT / "plugins/module_utils/gpu.py",
            ROOT / "plugins/module_utils/container_toolkit.py",
        ):
            (tmp_path / path.name).write_text(path.read_text())
        settings = {
            "host": "x", "metrics_path": str(tmp_path / "gpu.prom"), "interval": 60, "listen": "",
            "watchdog_state": str(tmp_path / "none"), "container_runtime": "", "temperature_limit": 85,
        }  # fmt: skip
        (tmp_path / "settings.json").write_text(json.dumps(settings))
        options = ["--settings", str(tmp_path / "settings.json")]
        subprocess.run([sys.executable, "-I", tmp_path / "gpu_metrics.py", *options], check=True)
        families((tmp_path / "gpu.prom").read_text())
        done = subprocess.run(
            [sys.executable, "-I", tmp_path / "gpu_doctor.py", *options], capture_output=True, text=True
        )
        assert (done.returncode, done.stderr) == (2 if not gpu.on_the_bus() else done.returncode, "")
        assert done.stdout.startswith("gpu-doctor on x, ")
