"""gpu-doctor: the NVIDIA card of this host on one screen: what is there, what is wrong, and what to do about it.

Ends with 0 when nothing is wrong, 1 when something is, 2 when there is no card. Nothing is changed. The kernel's log (Xid
errors) and the Docker Engine are for root: sudo gpu-doctor. Standard library only.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # python3 -I leaves it out

import container_toolkit
import gpu
import gpu_metrics

WIDTH = 100
NAME = 11
# Memory in use that no process accounts for, in MiB: below it, it is the driver's own.
UNEXPLAINED = 1024
AGAIN = "on the Bastion: ansible-playbook site.yml --limit {host}"
REBOOT = "sudo systemctl reboot"
STOP_AND_START = (
    "stop and start the instance (not reboot): aws ec2 stop-instances, then start-instances; EC2 gives it another card"
)

# What to do about each code of gpu.py.
ADVICE = {
    "driver_missing": AGAIN,
    "secure_boot": "install signed modules, or switch Secure Boot off; what the kernel said: sudo journalctl -k --grep 'nvidia|signature'",
    "module_missing": "sudo dkms autoinstall && sudo modprobe nvidia; where it fails: sudo dkms status, and {again}",
    "module_mismatch": REBOOT,
    "nvml_mismatch": "{again}, which puts the pinned libraries back; or " + REBOOT,
    "not_loaded": "sudo modprobe nvidia; where it fails: sudo journalctl -k --grep 'NVRM|nvidia' --lines 20",
    "nvml_error": "sudo journalctl -k --grep NVRM --lines 20; then " + REBOOT,
    "next_kernel": "sudo dkms autoinstall -k {next_kernel}; or {again}. Until then do not reboot",
    "persistence_off": "sudo systemctl enable --now nvidia-persistenced",
}
# What to do about Xid errors, by number; others: see the list.
XIDS = {
    48: "uncorrectable memory error: " + REBOOT + "; where it comes again, " + STOP_AND_START,
    62: "the card's own processor halted: " + REBOOT,
    64: "a bad page could not be retired: " + STOP_AND_START,
    79: "the card is off the bus: " + STOP_AND_START,
    95: "uncontained memory error: " + REBOOT + "; where it comes again, " + STOP_AND_START,
    119: "the card's own processor does not answer: " + REBOOT,
    120: "the card's own processor failed: " + REBOOT,
}
XID_ELSE = (
    "sudo nvidia-smi --query --display=ECC,PAGE_RETIREMENT; https://docs.nvidia.com/deploy/xid-errors/; then " + REBOOT
)


class Report:
    """Lines of what is there, and findings with what to do."""

    def __init__(self, host: str) -> None:
        self.host = host
        self.rows: list[tuple[str, str]] = []
        self.findings: list[tuple[str, str]] = []

    def row(self, name: str, *words: str) -> None:
        self.rows.append((name, "; ".join(word for word in words if word)))

    def finding(self, text: str, todo: str, **values: str) -> None:
        again = AGAIN.format(host=self.host)
        self.findings.append((text, todo.format(host=self.host, again=again, **values)))

    def text(self, well: str = "nothing is wrong") -> str:
        lines = [f"gpu-doctor on {self.host}, {time.strftime('%Y-%m-%d %H:%M:%S UTC', time.gmtime())}", ""]
        for name, value in self.rows:
            lines += wrapped(value, f"{name:<{NAME}}", " " * NAME)
        count = len(self.findings)
        lines += ["", well if count == 0 else many(count, "finding")]
        for place, (text, todo) in enumerate(self.findings, 1):
            lines += wrapped(text, f"{place:>2}. ", "    ") + wrapped(todo, "    -> ", "       ")
        return "\n".join(lines) + "\n"


def wrapped(text: str, first: str, other: str) -> list[str]:
    # commands stay whole: they are there to be copied
    return textwrap.wrap(
        text, WIDTH, initial_indent=first, subsequent_indent=other, break_long_words=False, break_on_hyphens=False
    ) or [first.rstrip()]


def many(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def unknown(value: Any, unit: str = "") -> str:
    return "?" if value is None else f"{value:g}{unit}"


def cards(report: Report, found: dict[str, Any], limit: float) -> None:
    for card in found["devices"]:
        report.row(
            "card" if len(found["devices"]) == 1 else f"card {card['index']}",
            f"{card['name']} at {card['pci']}",
            f"{unknown(card['temperature_c'], ' C')}, {unknown(card['power_w'], ' W')}",
            f"{unknown(card['utilisation_percent'], ' %')} busy",
            f"{unknown(card['memory_used_mib'])} of {unknown(card['memory_total_mib'], ' MiB')} in use",
            f"ECC errors: {unknown(card['ecc_corrected'])} corrected, {unknown(card['ecc_uncorrected'])} uncorrected",
        )
        which = f"card {card['index']}"
        if card["temperature_c"] is not None and card["temperature_c"] >= limit:
            report.finding(
                f"{which} is at {card['temperature_c']:g} C, the limit is {limit:g} C",
                "sudo nvidia-smi --query --display=TEMPERATURE,PERFORMANCE tells whether it slows down; a card of EC2 that stays so hot: "
                + STOP_AND_START,
            )
        if card["ecc_uncorrected"]:
            report.finding(
                f"{which} has {card['ecc_uncorrected']} uncorrected memory errors since the driver was loaded",
                "sudo nvidia-smi --query --display=ECC,ROW_REMAPPER; then "
                + REBOOT
                + ", which lets it replace the bad rows",
            )
    if not found["devices"]:
        report.row("card", f"{', '.join(found['pci'])}, which nvidia-smi does not see")
    used = sum(card["memory_used_mib"] or 0 for card in found["devices"])
    if used >= UNEXPLAINED and not found["processes"]:
        report.finding(
            f"{used} MiB are in use by no process that nvidia-smi knows", "sudo fuser --verbose /dev/nvidia*"
        )
    names = [
        f"{process['name']} ({process['pid']}) {unknown(process['memory_used_mib'], ' MiB')}"
        for process in found["processes"]
    ]
    if found["devices"]:
        report.row("processes", ", ".join(names) or "none")


def the_driver(report: Report, found: dict[str, Any]) -> None:
    driver = found["driver"]
    report.row(
        "driver",
        f"{driver['loaded'] or 'no module'} loaded{' (open)' if driver['open'] and driver['loaded'] else ''}",
        f"{driver['installed'] or 'none'} installed",
        f"libraries {driver['libraries'] or 'none'}",
        f"runs CUDA up to {found['cuda']}" if found["cuda"] else "",
        ("held" if driver["held"] else "not held") if driver["packages"] else "",
    )
    same = driver["next_kernel"] == driver["kernel"]
    report.row("kernel", driver["kernel"], f"next boot: {'the same' if same else driver['next_kernel']}")
    for problem in found["problems"]:
        if problem["code"] == "xid":
            number = [xid["code"] for xid in found["xids"] if xid["code"] not in gpu.XIDS_OF_APPLICATIONS][-1]
            report.finding(problem["text"], XIDS.get(number, XID_ELSE))
        else:
            report.finding(problem["text"], ADVICE[problem["code"]], next_kernel=driver["next_kernel"])
    loose = [package["name"] for package in driver["packages"] if not package["held"]]
    if loose:
        report.finding(
            f"an upgrade may change the driver under the running containers: not held {'is' if len(loose) == 1 else 'are'} {', '.join(loose)}",
            "{again}; or sudo apt-mark hold " + " ".join(loose) if Path("/usr/bin/dpkg").exists() else "{again}",
        )
    counts = collections.Counter(xid["code"] for xid in found["xids"])
    report.row(
        "Xid errors",
        ", ".join(
            f"{code} x {count}{' (of an application)' if code in gpu.XIDS_OF_APPLICATIONS else ''}"
            for code, count in sorted(counts.items())
        )
        or ("none since the last boot" if os.geteuid() == 0 else "none that this user may see; sudo gpu-doctor"),
    )


def the_containers(report: Report, found: dict[str, Any], runtime: str) -> None:
    if not runtime:
        return
    installed = container_toolkit.packages(gpu.program)
    toolkit = installed.get("nvidia-container-toolkit")
    words = [f"nvidia-container-toolkit {toolkit['version']}" if toolkit else "no nvidia-container-toolkit"]
    if not toolkit:
        report.finding("containers cannot get the card: nvidia-container-toolkit is not installed", "{again}")
    elif not all(package["held"] for package in installed.values()):
        words.append("not held")
    if os.geteuid() != 0:
        words.append("the engine was not asked; sudo gpu-doctor")
    else:
        try:
            known = runtime in (container_toolkit.engine(gpu.program).get("Runtimes") or {})
            words.append(f"the engine knows the runtime {runtime}" if known else "")
            if not known:
                report.finding(
                    f"the Docker Engine knows no runtime {runtime}",
                    "set docker_engine_runtimes: {{"
                    + runtime
                    + ": {{path: /usr/bin/nvidia-container-runtime}}}} in the inventory, and {again}",
                )
        except container_toolkit.EngineError as error:
            report.finding(str(error), "sudo systemctl status docker --lines 20")
    if toolkit and found["usable"]:
        problem = container_toolkit.cdi_problem(found["driver"]["libraries"])
        words.append("" if problem else "CDI specification fits the driver")
        if problem:
            report.finding(problem, "sudo systemctl restart nvidia-cdi-refresh.service")
    report.row("containers", *words)


def the_watchdog(report: Report, path: str) -> None:
    try:
        state = gpu_metrics.read_watchdog(path)
    except ValueError as error:
        look = "systemctl status nemo-vllm-watchdog.timer nemo-vllm-watchdog.service"
        report.finding(f"vLLM's watchdog says nothing: {error}", look)
        return
    if state is None:
        report.row("watchdog", "there is none")
        return
    restarts, strikes = state.get("restarts") or [], state.get("strikes", 0)
    report.row(
        "watchdog",
        f"{state['state']}{' since ' + str(state['since']) if state.get('since') else ''}",
        many(strikes, "failed probe") + " in a row",
        many(len(restarts), "restart") + (f", last {restarts[-1]}" if restarts else ""),
        str(state.get("reason") or ""),
    )
    why = f": {state['reason']}" if state.get("reason") else ""
    logs = "sudo docker ps --all --filter label=nemo.service, and sudo docker logs --tail 50 NAME of the one that should run"
    if state["state"] == "gave_up":
        report.finding(
            f"the watchdog gave up on vLLM after {many(len(restarts), 'restart')}{why}", logs + "; then {again}"
        )
    elif state["state"] == "down":
        report.finding(f"vLLM is down{why}", logs + "; where nobody stopped it: {again}")
    elif state["state"] not in ("ok", "loading"):
        report.finding(
            f"vLLM does not answer its watchdog ({state['state']}, {many(strikes, 'failed probe')}){why}", logs
        )


def the_metrics(report: Report, settings: dict[str, Any]) -> None:
    path, interval = settings["metrics_path"], settings["interval"]
    look = "systemctl status nemo-gpu-metrics.timer nemo-gpu-metrics.service"
    try:
        age = max(0, time.time() - Path(path).stat().st_mtime)
    except OSError as error:
        report.finding(f"there are no metrics: {path}: {error.strerror}", look)
        return
    where = f"http://{settings['listen']}/metrics" if settings["listen"] else ""
    report.row("metrics", f"{path}, {age:.0f} s old", where)
    if age > 3 * interval + 60:
        report.finding(f"the metrics are {age:.0f} s old, they are made every {interval} s", look)


def examine(settings: dict[str, Any]) -> tuple[int, str]:
    """Exit status, and the screen."""
    report = Report(settings["host"])
    found = gpu.look()
    if not found["present"]:
        report.row("card", found["problem"])
        report.row("driver", found["driver"]["installed"] or "not installed")
        the_metrics(report, settings)
        return 2, report.text(well="without a card there is nothing else to look at")
    cards(report, found, settings["temperature_limit"])
    the_driver(report, found)
    the_containers(report, found, settings["container_runtime"])
    the_watchdog(report, settings["watchdog_state"])
    the_metrics(report, settings)
    return (1 if report.findings else 0), report.text()


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="gpu-doctor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--settings", default=gpu_metrics.SETTINGS, help="JSON file of the role gpu_health (default: %(default)s)"
    )
    arguments = parser.parse_args()
    settings = json.loads(Path(arguments.settings).read_text(encoding="utf-8"))
    status, screen = examine(settings)
    sys.stdout.write(screen)
    return status


if __name__ == "__main__":
    sys.exit(main())
