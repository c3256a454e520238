"""The programs behind the Makefile: how results are counted, and what set-up and the lab's environment do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from tests.unit.helpers import ROOT, script


@pytest.fixture(scope="module")
def tests() -> ModuleType:
    return script("test")


class TestCounting:
    def test_own_line(self, tests: ModuleType) -> None:
        assert tests.from_own_line(0, "x\n6 passed, 0 failed\n") == tests.Counts(6, 0)
        assert tests.from_own_line(1, "1 passed, 1 failed\nmore\n4 passed, 2 failed\n") == tests.Counts(4, 2)

    def test_no_line_is_a_failure(self, tests: ModuleType) -> None:
        assert tests.from_own_line(0, "all is well\n").failed == 1

    def test_bad_status_is_a_failure_whatever_the_line_says(self, tests: ModuleType) -> None:
        assert tests.from_own_line(3, "4 passed, 0 failed\n").failed == 1

    def test_junit(self, tests: ModuleType, tmp_path: Path) -> None:
        report = tmp_path / "report.xml"
        report.write_text(
            '<testsuites><testsuite tests="5" failures="1" errors="1" skipped="1"/><testsuite tests="2"/></testsuites>'
        )
        counted = tests.from_junit(report)(1, "")
        assert (counted.passed, counted.failed, counted.note) == (4, 2, "1 skipped")

    def test_missing_report_is_a_failure(self, tests: ModuleType, tmp_path: Path) -> None:
        assert tests.from_junit(tmp_path / "none.xml")(4, "").failed == 1

    def test_pytest_that_breaks_after_its_tests_is_a_failure(self, tests: ModuleType, tmp_path: Path) -> None:
        report = tmp_path / "report.xml"
        report.write_text('<testsuite tests="5"/>')
        assert tests.from_junit(report)(3, "").failed == 1

    def test_recap_counts_hosts_and_names_the_changed(self, tests: ModuleType) -> None:
        output = (
            "a : ok=5 changed=0 unreachable=0 failed=0 skipped=1\n"
            "\x1b[33mb\x1b[0m : ok=5 \x1b[33mchanged=2\x1b[0m unreachable=0 failed=0\n"
        )
        counted = tests.from_recap(0, output)
        assert (counted.passed, counted.failed, counted.note) == (1, 1, "b changed=2")

    def test_recap_without_hosts_is_a_failure(self, tests: ModuleType) -> None:
        assert tests.from_recap(0, "nothing\n").failed == 1

    def test_failed_play_is_a_failure(self, tests: ModuleType) -> None:
        assert tests.from_recap(2, "a : ok=5 changed=0 unreachable=0 failed=1\n").failed == 1

    def test_bare_lab_shows_what_would_change(self, tests: ModuleType) -> None:
        bare = "a : ok=5 changed=0 unreachable=0 failed=0\nb : ok=5 \x1b[33mchanged=2\x1b[0m unreachable=0 failed=0\n"
        assert tests.from_bare(0, bare, lab_was_up=False) == tests.Counts(1, 0)
        assert tests.from_bare(2, bare, lab_was_up=False).failed == 1
        assert tests.from_bare(0, "nothing\n", lab_was_up=False).failed == 1

    def test_finished_lab_is_not_bare(self, tests: ModuleType) -> None:
        finished = "a : ok=5 changed=0 unreachable=0 failed=0\n"
        assert tests.from_bare(0, finished, lab_was_up=False).failed == 1

    def test_lab_that_was_up_before_is_noted(self, tests: ModuleType) -> None:
        finished = "a : ok=5 changed=0 unreachable=0 failed=0\n"
        counted = tests.from_bare(0, finished, lab_was_up=True)
        assert (counted.passed, counted.failed) == (1, 0)
        assert "the lab was up before" in counted.note
        assert tests.from_bare(2, finished, lab_was_up=True).failed == 1


class TestStages:
    def test_again_is_the_whole_first_command(self, tests: ModuleType) -> None:
        again = {stage.name: stage for stage in tests.stages(lab_was_up=False)}["again"]
        assert again.command == ["scripts/lab"]
        assert again.counts(0, "a : ok=5 changed=1 unreachable=0 failed=0\n").failed == 1

    def test_bare_knows_whether_the_lab_was_up(self, tests: ModuleType) -> None:
        finished = "a : ok=5 changed=0 unreachable=0 failed=0\n"
        for was_up, failed in ((True, 0), (False, 1)):
            bare = {stage.name: stage for stage in tests.stages(lab_was_up=was_up)}["bare"]
            assert bare.command == ["scripts/lab", "--check"]
            assert bare.counts(0, finished).failed == failed

    def test_bare_comes_before_everything_that_ends_it(self, tests: ModuleType) -> None:
        names = [stage.name for stage in tests.stages(lab_was_up=False)]
        needing = [stage.name for stage in tests.stages(lab_was_up=False) if stage.needs_lab]
        assert names.index("bare") < names.index("lab") < min(names.index(name) for name in needing)


class TestRunner:
    @pytest.fixture
    def whole(self, tests: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        """Run stages of our own instead of the project's."""

        def run(*commands: tuple[str, str], minutes: float = 1, beside: bool = False) -> int:
            made = [
                tests.Stage(name, ["/bin/sh", "-c", line], tests.from_own_line, minutes, beside=beside)
                for name, line in commands
            ]
            monkeypatch.setattr(tests, "stages", lambda lab_was_up: made)
            monkeypatch.setattr(tests, "lab_is_up", lambda: False)
            monkeypatch.setattr(tests, "KEPT", tmp_path / "kept")
            return tests.main([])

        return run

    def last_line(self, capfd: pytest.CaptureFixture[str]) -> str:
        return capfd.readouterr().out.splitlines()[-1]

    def test_sums(self, whole, capfd: pytest.CaptureFixture[str]) -> None:
        assert whole(("a", "echo '2 passed, 0 failed'"), ("b", "echo '3 passed, 0 failed'")) == 0
        assert self.last_line(capfd) == "5 passed, 0 failed"

    def test_seconds_of_each_and_of_all(self, whole, capfd: pytest.CaptureFixture[str]) -> None:
        whole(("a", "sleep 1; echo '2 passed, 0 failed'"), ("b", "sleep 1; echo '3 passed, 1 failed'"))
        rows = {line.split()[0]: line.split()[1:] for line in capfd.readouterr().out.splitlines() if line}
        assert rows["total"][:2] == ["5", "1"]
        assert int(rows["a"][2]) >= 1
        assert int(rows["b"][2]) >= 1
        assert abs(int(rows["total"][2]) - int(rows["a"][2]) - int(rows["b"][2])) <= 1

    def test_goes_on_after_a_failing_stage(self, whole, capfd: pytest.CaptureFixture[str]) -> None:
        assert whole(("a", "echo '2 passed, 1 failed'; exit 1"), ("b", "echo '3 passed, 0 failed'")) == 1
        assert self.last_line(capfd) == "5 passed, 1 failed"

    def test_stage_without_tests_fails(self, whole, capfd: pytest.CaptureFixture[str]) -> None:
        assert whole(("a", "echo '2 passed, 0 failed'"), ("b", "echo '0 passed, 0 failed'")) == 1
        assert self.last_line(capfd) == "2 passed, 1 failed"

    def test_no_stage_at_all_fails(self, whole, capfd: pytest.CaptureFixture[str]) -> None:
        assert whole() == 1
        assert self.last_line(capfd) == "0 passed, 0 failed"

    def test_hung_stage_is_ended_with_its_children(
        self, whole, capfd: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        started = time.monotonic()
        assert whole(("a", f"(sleep 60; touch '{tmp_path}/late') & sleep 60"), minutes=1 / 60) == 1
        assert time.monotonic() - started < 20
        assert self.last_line(capfd) == "0 passed, 1 failed"

    def test_side_by_side(self, whole, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        first = (
            f"for i in $(seq 100); do [ -e '{tmp_path}/other' ] && echo '1 passed, 0 failed' && exit; sleep 0.1; done"
        )
        assert whole(("a", first), ("b", f"touch '{tmp_path}/other'; echo '2 passed, 0 failed'"), beside=True) == 0
        lines = capfd.readouterr().out.splitlines()
        assert "a: 1 passed, 0 failed" in lines
        assert lines[-1] == "3 passed, 0 failed"

    def test_an_interruption_ends_what_runs(self, whole, capfd: pytest.CaptureFixture[str]) -> None:
        started = time.monotonic()
        stop = f"sleep 3; kill -INT {os.getpid()}; sleep 60"
        # Ignored where a shell has put the tests into its background.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            assert whole(("a", "sleep 60"), ("b", stop), beside=True) == 1
        finally:
            signal.signal(signal.SIGINT, before)
        assert time.monotonic() - started < 20
        assert self.last_line(capfd) == "0 passed, 1 failed"

    def test_unknown_stage(self, tests: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
        assert tests.main(["outcome"]) == 2
        assert "no stage outcome" in capsys.readouterr().out


class TestLabEnvironment:
    def variables(self, **more: str) -> dict[str, str]:
        done = subprocess.run(
            [ROOT / "scripts/lab-env", "env", "-0"], env=os.environ | more, capture_output=True, text=True, check=True
        )
        return dict(line.split("=", 1) for line in done.stdout.split("\0") if "=" in line)

    def test_nothing_leads_to_a_real_account(self) -> None:
        seen = self.variables(
            AWS_PROFILE="production", AWS_SESSION_TOKEN="t", AWS_ROLE_ARN="r", AWS_ACCESS_KEY_ID="AKIAREAL",
            AWS_WEB_IDENTITY_TOKEN_FILE="f", AWS_ENDPOINT_URL="https://example.com", HTTPS_PROXY="http://proxy",
        )  # fmt: skip
        assert seen["AWS_ACCESS_KEY_ID"] == "lab"
        assert {name for name in seen if name.startswith("AWS_")} == {
            "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_CONFIG_FILE",
            "AWS_SHARED_CREDENTIALS_FILE", "AWS_EC2_METADATA_DISABLED",
        }  # fmt: skip
        assert "HTTPS_PROXY" not in seen

    def test_nothing_sets_ansible_up_in_another_way(self) -> None:
        seen = self.variables(
            ANSIBLE_CALLBACKS_ENABLED="x", ANSIBLE_VAULT_PASSWORD_FILE="f", ANSIBLE_CONFIG="/other", NO_COLOR="1",
            PY_COLORS="0",
        )  # fmt: skip
        assert {name for name in seen if name.startswith("ANSIBLE_")} == {"ANSIBLE_CONFIG"}
        assert seen["ANSIBLE_CONFIG"] == str(ROOT / "ansible.cfg")
        assert (seen["NO_COLOR"], seen["PY_COLORS"]) == ("1", "0")

    def test_the_engine_of_the_caller_stays(self) -> None:
        seen = self.variables(DOCKER_HOST="unix:///run/mine.sock", DOCKER_CONTEXT="mine")
        assert (seen["DOCKER_HOST"], seen["DOCKER_CONTEXT"]) == ("unix:///run/mine.sock", "mine")

    def test_programs_of_the_checkout_come_first(self) -> None:
        seen = self.variables()
        assert seen["PATH"].split(":")[0] == str(ROOT / ".venv/bin")
        assert seen["ANSIBLE_CONFIG"] == str(ROOT / "ansible.cfg")


class TestSideBySide:
    def run(self, *jobs: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, ROOT / "scripts/side-by-side", *jobs], capture_output=True, text=True, check=False
        )

    def test_every_line_behind_its_name(self) -> None:
        done = self.run("one=echo first; echo second >&2", "other=echo third")
        assert done.returncode == 0
        assert {"one   | first", "one   | second", "other | third"} <= set(done.stdout.splitlines())

    def test_one_failure_fails_the_whole_but_ends_nothing(self) -> None:
        done = self.run("bad=exit 3", "good=sleep 0.3; echo late")
        assert done.returncode == 1
        assert "bad  | FAILED (3) after 0 s" in done.stdout
        assert "good | late" in done.stdout

    def test_they_run_at_the_same_time(self) -> None:
        started = time.monotonic()
        self.run("a=sleep 1", "b=sleep 1", "c=sleep 1")
        assert time.monotonic() - started < 2.5


class TestSetup:
    """scripts/setup in a checkout of its own, whose Python writes down what it is asked to do."""

    @pytest.fixture
    def checkout(self, tmp_path: Path) -> Path:
        root = tmp_path / "my checkout"
        (root / "scripts").mkdir(parents=True)
        (root / "requirements").mkdir()
        (root / "requirements/dev.txt").write_text("one==1\n")
        (root / "scripts/setup").write_bytes((ROOT / "scripts/setup").read_bytes())
        self.program(root / "scripts/find-python", f'echo "{tmp_path}/python"')
        self.program(
            tmp_path / "python",
            f"""
case "$*" in
  "-m venv "*) echo venv >>"{tmp_path}/log"; mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
  "-m pip "*) echo pip >>"{tmp_path}/log"; [ ! -e "{tmp_path}/broken" ] ;;
  --version) echo Python 3.13.0 ;;
  *) exec "{sys.executable}" "$@" ;;
esac""",
        )
        return root

    def program(self, path: Path, body: str) -> None:
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)

    def setup(self, root: Path, *arguments: str) -> tuple[int, list[str]]:
        log = root.parent / "log"
        log.unlink(missing_ok=True)
        environment = {name: value for name, value in os.environ.items() if name not in ("PYTHON", "NEMO_SETUP_LOCKED")}
        done = subprocess.run(
            ["/bin/sh", root / "scripts/setup", *arguments], env=environment, capture_output=True, check=False
        )
        return done.returncode, log.read_text().split() if log.exists() else []

    def test_made_once(self, checkout: Path) -> None:
        assert self.setup(checkout, "--check") == (1, [])
        assert self.setup(checkout) == (0, ["venv", "pip"])
        assert self.setup(checkout) == (0, [])
        assert self.setup(checkout, "--check") == (0, [])

    def test_made_again_when_the_lock_changed(self, checkout: Path) -> None:
        self.setup(checkout)
        (checkout / "requirements/dev.txt").write_text("one==2\n")
        assert self.setup(checkout) == (0, ["venv", "pip"])

    def test_made_again_when_the_checkout_moved(self, checkout: Path) -> None:
        self.setup(checkout)
        assert self.setup(checkout.rename(checkout.parent / "elsewhere")) == (0, ["venv", "pip"])

    def test_made_again_when_its_python_is_gone(self, checkout: Path) -> None:
        self.setup(checkout)
        self.program(checkout / ".venv/bin/python", "exit 127")
        assert self.setup(checkout) == (0, ["venv", "pip"])

    def test_made_again_after_a_failed_install(self, checkout: Path) -> None:
        (checkout.parent / "broken").touch()
        assert self.setup(checkout) == (1, ["venv", "pip"])
        (checkout.parent / "broken").unlink()
        assert self.setup(checkout) == (0, ["venv", "pip"])


class TestMakefile:
    def make(self, *arguments: str) -> str:
        # Under `make unit` the outer make's own flags and ARGS are in the environment.
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
        done = subprocess.run(
            ["make", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
        )
        return done.stdout.rstrip()

    def test_targets(self) -> None:
        named = {line.split()[1] for line in self.make("help").splitlines() if line.startswith("  make ")}
        assert {
            "lab", "test", "setup", "site", "lint", "unit", "molecule", "outcomes", "bench", "faults", "lab-down",
            "clean", "help",
        } <= named  # fmt: skip

    @pytest.mark.parametrize("target", ["lab", "site", "unit", "outcomes", "bench", "faults", "lint", "test"])
    def test_arguments_are_passed_on(self, target: str) -> None:
        assert self.make("-n", target, "ARGS=--one 'two words'").endswith("--one 'two words'")

    def test_role_is_passed_on(self) -> None:
        assert self.make("-n", "molecule", "ROLE=baseline").endswith("scripts/molecule baseline")
        assert self.make("-n", "molecule", "ROLE=baseline", "ARGS=-v").endswith("scripts/molecule baseline -- -v")
