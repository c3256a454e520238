"""Packages by the program yum, on a host whose rpm and yum are made of a dictionary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from ansible_collections.nemo.platform.plugins.modules import yum_package
from ansible_collections.nemo.platform.plugins.modules.yum_package import Yum, YumError, ensure


@dataclass
class Host:
    installed: set[str] = field(default_factory=set)
    available: set[str] = field(default_factory=set)
    # in the repository, but not in the metadata that the host has
    newer: set[str] = field(default_factory=set)
    # answers of yum that come before it does anything
    first: list[tuple[int, str, str]] = field(default_factory=list)
    calls: list[list[str]] = field(default_factory=list)
    slept: float = 0

    def run(self, argv: Sequence[str]) -> tuple[int, str, str]:
        self.calls.append(list(argv))
        if argv[0] == "rpm":
            out = err = ""
            for name in argv[5:]:
                if name in self.installed:
                    out += f"{name}\n"
                elif name.startswith("/"):
                    err += f"error: file {name}: No such file or directory\n"
                else:
                    out += f"no package provides {name}\n"
            return int("no package" in out or bool(err)), out, err
        if self.first:
            return self.first.pop(0)
        if "clean" in argv:
            self.available |= self.newer
            return 0, "", ""
        names = argv[argv.index("install") + 1 :]
        known = [name for name in names if name in self.available]
        self.installed |= set(known)
        said = "".join(f"No package {name} available.\n" for name in names if name not in known)
        # as yum 3 does: success where it knew one of them
        return (0, said, "") if known else (1, said, "Error: Nothing to do\n")

    def sleep(self, seconds: float) -> None:
        self.slept += seconds

    def ensure(self, *names: str, check_mode: bool = False, update_cache: bool = False, patience: int = 9) -> list[str]:
        return ensure(Yum(self.run, patience, self.sleep), names, update_cache, check_mode)

    @property
    def yum_calls(self) -> list[list[str]]:
        return [call for call in self.calls if call[0] == "yum"]


def test_nothing_missing_is_one_query() -> None:
    host = Host(installed={"tcpdump", "nc"})
    assert host.ensure("tcpdump", "nc") == []
    assert len(host.calls) == 1
    assert host.calls[0][0] == "rpm"


def test_what_is_missing_is_installed_in_one_go() -> None:
    host = Host(installed={"nc"}, available={"tcpdump", "bind-utils"})
    assert host.ensure("tcpdump", "nc", "bind-utils", "tcpdump") == ["tcpdump", "bind-utils"]
    assert [call[-2:] for call in host.yum_calls] == [["tcpdump", "bind-utils"]]
    # without the latter yum 3 waits for its lock for ever
    assert {"--assumeyes", "--setopt=exit_on_lock=1"} <= set(host.yum_calls[0])


def test_path_of_a_file() -> None:
    host = Host(available={"/usr/bin/nc"})
    assert host.ensure("/usr/bin/nc") == ["/usr/bin/nc"]


def test_check_mode_asks_rpm_alone() -> None:
    host = Host(available={"tcpdump"})
    assert host.ensure("tcpdump", check_mode=True, update_cache=True) == ["tcpdump"]
    assert not host.yum_calls


def test_yum_that_knew_only_some_is_an_error() -> None:
    host = Host(available={"tcpdump"})
    with pytest.raises(YumError, match=r"yum did not install of-a-test: .*No package of-a-test available") as raised:
        host.ensure("tcpdump", "of-a-test")
    assert raised.value.missing == ["of-a-test"]


def test_old_metadata_is_thrown_away_once() -> None:
    host = Host(newer={"tcpdump"})
    assert host.ensure("tcpdump") == ["tcpdump"]
    assert [call[-1] for call in host.yum_calls] == ["tcpdump", "expire-cache", "tcpdump"]


def test_update_cache_comes_first() -> None:
    host = Host(newer={"tcpdump"})
    assert host.ensure("tcpdump", update_cache=True) == ["tcpdump"]
    assert [call[-1] for call in host.yum_calls] == ["expire-cache", "tcpdump"]


@pytest.mark.parametrize(
    "said",
    [
        "Existing lock /var/run/yum.pid: another copy is running as pid 4711.",
        "Another app is currently holding the yum lock; waiting for it to exit...",
        "error: can't create transaction lock on /var/lib/rpm/.rpm.lock (Resource temporarily unavailable)",
        "Waiting for process with pid 4711 to finish.",
    ],
)
def test_lock_is_waited_for(said: str) -> None:
    host = Host(available={"tcpdump"}, first=[(200, "", said), (200, said, "")])
    assert host.ensure("tcpdump") == ["tcpdump"]
    assert host.slept == 2 * yum_package.PAUSE


def test_lock_that_stays() -> None:
    line = "Existing lock /var/run/yum.pid: another copy is running as pid 4711."
    host = Host(available={"tcpdump"}, first=[(200, "", line)] * 99)
    with pytest.raises(YumError, match=r"for 6 seconds: .*pid 4711"):
        host.ensure("tcpdump", patience=6)
    assert host.slept == 6


def test_other_failures_are_told_and_not_repeated() -> None:
    said = "Error: Package: x requires y\n You could try using --skip-broken"
    host = Host(available={"tcpdump"}, first=[(1, "", said)])
    with pytest.raises(YumError, match="x requires y; You could try"):
        host.ensure("tcpdump")
    assert len(host.yum_calls) == 1


def test_rpm_that_fails() -> None:
    def run(argv: Sequence[str]) -> tuple[int, str, str]:
        return 1, "", "error: cannot open Packages index\n"

    with pytest.raises(YumError, match=r"rpm cannot be asked .*cannot open Packages index"):
        ensure(Yum(run, 0), ["tcpdump"], False, False)


@pytest.mark.parametrize("name", ["@development", "python3*", "https://x/y.rpm", "./y.rpm", "--nogpgcheck", "", "a[b]"])
def test_what_is_no_package_is_refused(name: str) -> None:
    host = Host(available={name})
    with pytest.raises(YumError, match="allowed: names, capabilities and paths"):
        host.ensure("tcpdump", name)
    assert not host.calls


def test_no_names_is_nothing() -> None:
    host = Host()
    assert host.ensure() == []
    assert not host.calls
