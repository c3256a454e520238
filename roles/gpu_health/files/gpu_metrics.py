"""Metrics of the NVIDIA card, its driver and vLLM's watchdog, in Prometheus' text format, into one file.

Run by nemo-gpu-metrics.timer. Works without a card and without a driver, and says so in the metrics. Standard library
only; gpu.py beside it does the looking.
"""

from __future__ import annotations

import argparse
import calendar
import contextlib
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # python3 -I leaves it out

import gpu

SETTINGS = "/etc/nemo/gpu-health.json"
MIB = 1 << 20
WATCHDOG_STATES = ("ok", "loading", "failing", "restarting", "down", "gave_up")


class Page:
    """Families of metrics in the text format: HELP and TYPE once each, samples after them."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def family(self, name: str, kind: str, text: str, samples: list[tuple[dict[str, Any], Any]]) -> None:
        """Add a family; samples whose value the card does not tell (None) are left out."""
        told = [(labels, value) for labels, value in samples if value is not None]
        if told:
            self._lines.append(f"# HELP {name} {escaped(text, quote=False)}")
            self._lines.append(f"# TYPE {name} {kind}")
        for labels, value in told:
            pairs = ",".join(f'{key}="{escaped(str(word))}"' for key, word in labels.items())
            self._lines.append(f"{name}{{{pairs}}} {number(value)}" if pairs else f"{name} {number(value)}")

    def gauge(self, name: str, text: str, value: Any) -> None:
        self.family(name, "gauge", text, [({}, value)])

    def text(self) -> str:
        return "\n".join(self._lines) + "\n"


def escaped(text: str, quote: bool = True) -> str:
    text = text.replace("\\", "\\\\").replace("\n", "\\n")
    return text.replace('"', '\\"') if quote else text


def number(value: Any) -> str:
    # full digits: %g would cut times to six of them
    return str(int(value)) if isinstance(value, bool) or float(value).is_integer() else repr(float(value))


def seconds(moment: Any) -> float | None:
    """A time of the watchdog's file, `2026-11-22T17:00:00Z` or seconds, as seconds since 1970."""
    if isinstance(moment, (int, float)) and not isinstance(moment, bool):
        return float(moment)
    with contextlib.suppress(TypeError, ValueError):
        return float(calendar.timegm(time.strptime(str(moment)[:19], "%Y-%m-%dT%H:%M:%S")))
    return None


def of_the_driver(page: Page, found: dict[str, Any]) -> None:
    driver, codes = found["driver"], {problem["code"] for problem in found["problems"]}
    page.gauge("nemo_gpu_present", "Whether an NVIDIA card is on the PCI bus.", found["present"])
    page.gauge("nemo_gpu_usable", "Whether nvidia-smi sees a card, so that containers can use it.", found["usable"])
    page.family(
        "nemo_gpu_problem", "gauge", "What gpu-doctor finds wrong with card and driver, by code.",
        [({"code": code}, code in codes) for code in gpu.CODES],
    )  # fmt: skip
    kept = ("loaded", "installed", "libraries", "kernel", "next_kernel")
    labels = {**{name: driver[name] for name in kept}, "open": str(driver["open"]).lower(), "cuda": found["cuda"]}
    page.family(
        "nemo_gpu_driver_info", "gauge", "Versions of the driver, by part; empty where one is missing.", [(labels, 1)]
    )
    page.gauge(
        "nemo_gpu_driver_mismatch",
        "Whether the loaded module differs from the installed one or from the libraries.",
        any(
            driver["loaded"] and driver[part] and driver[part] != driver["loaded"]
            for part in ("installed", "libraries")
        ),
    )
    page.gauge("nemo_gpu_driver_held", "Whether every package of the driver is held at its version.", driver["held"])
    page.gauge("nemo_gpu_reboot_needed", "Whether only a reboot helps.", found["reboot"]["needed"])


def of_the_cards(page: Page, found: dict[str, Any]) -> None:
    cards = [({"gpu": card["index"], "uuid": card["uuid"]}, card) for card in found["devices"]]

    def each(name: str, text: str, field: str, factor: float = 1) -> None:
        values = [(labels, None if card[field] is None else card[field] * factor) for labels, card in cards]
        page.family(name, "gauge", text, values)

    page.family(
        "nemo_gpu_info", "gauge", "The card.",
        [({**labels, "name": card["name"], "pci": card["pci"]}, 1) for labels, card in cards],
    )  # fmt: skip
    each("nemo_gpu_temperature_celsius", "Temperature of the card.", "temperature_c")
    each("nemo_gpu_memory_total_bytes", "Memory of the card.", "memory_total_mib", MIB)
    each("nemo_gpu_memory_used_bytes", "Memory of the card that is in use.", "memory_used_mib", MIB)
    each("nemo_gpu_utilization_ratio", "Share of time that the card computed, 0 to 1.", "utilisation_percent", 0.01)
    each("nemo_gpu_power_watts", "Power that the card draws.", "power_w")
    each(
        "nemo_gpu_persistence_mode", "Whether the driver stays initialised while nothing uses the card.", "persistence"
    )
    page.family(
        "nemo_gpu_ecc_errors_total", "counter", "ECC errors since the driver was loaded.",
        [
            ({**labels, "type": kind}, card[f"ecc_{kind}"])
            for labels, card in cards
            for kind in ("corrected", "uncorrected")
        ],
    )  # fmt: skip
    if found["devices"]:
        page.gauge("nemo_gpu_processes", "Processes that use the cards.", len(found["processes"]))


def of_the_errors(page: Page, found: dict[str, Any]) -> None:
    """Known numbers stand there with 0 before the first error: increase() sees no change of what was not there."""
    if not found["present"]:
        return
    codes = [xid["code"] for xid in found["xids"]]
    known = gpu.XIDS_OF_APPLICATIONS | gpu.XIDS_THAT_NEED_A_RESET
    page.family(
        "nemo_gpu_xid_errors_total", "counter", "Xid errors in the kernel's log since the last boot, by number.",
        [({"code": code}, codes.count(code)) for code in sorted(known.union(codes))],
    )  # fmt: skip
    latest = {xid["code"]: xid["time"] for xid in found["xids"]}
    page.family(
        "nemo_gpu_xid_last_timestamp_seconds", "gauge", "When the last Xid error of a number came.",
        [({"code": code}, moment) for code, moment in sorted(latest.items())],
    )  # fmt: skip


def of_the_watchdog(page: Page, state: dict[str, Any]) -> None:
    page.family(
        "nemo_vllm_watchdog_state", "gauge", "State of vLLM's watchdog; one of them is 1.",
        [({"state": name}, state.get("state") == name) for name in WATCHDOG_STATES],
    )  # fmt: skip
    page.gauge(
        "nemo_vllm_serving",
        "Whether vLLM answered, or was at work, when its watchdog last looked.",
        state["state"] == "ok",
    )
    restarts = state.get("restarts") or []
    page.gauge("nemo_vllm_watchdog_strikes", "Probes that failed one after the other.", state.get("strikes"))
    page.gauge("nemo_vllm_watchdog_restarts", "Restarts of the engine that the watchdog's limit counts.", len(restarts))
    page.gauge(
        "nemo_vllm_watchdog_last_restart_timestamp_seconds", "When it last restarted the engine.",
        seconds(restarts[-1]) if restarts else None,
    )  # fmt: skip
    page.gauge(
        "nemo_vllm_watchdog_since_timestamp_seconds", "Since when it is in its state.", seconds(state.get("since"))
    )
    page.gauge("nemo_vllm_watchdog_last_look_timestamp_seconds", "When it last looked.", seconds(state.get("looked")))


def read_watchdog(path: str) -> dict[str, Any] | None:
    """The watchdog's own file; None where there is no watchdog. Raises ValueError for one that is none of its files, or too old."""
    try:
        state = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    if not isinstance(state, dict) or state.get("state") not in WATCHDOG_STATES:
        raise ValueError(f"{path}: no state of the watchdog")
    if not isinstance(state.get("strikes", 0), int) or not isinstance(state.get("restarts", []), list):
        raise ValueError(f"{path}: strikes or restarts are not what they must be")
    if time.time() > (seconds(state.get("valid_until")) or float("inf")):
        raise ValueError(f"{path}: it last looked at {state.get('looked')}")
    return state


def page_of(watchdog: str) -> str:
    """The whole page. A part that fails is left out and named in a metric, so that the others are there."""
    page, failed, began = Page(), [], time.monotonic()
    try:
        found = gpu.look()
        of_the_driver(page, found)
        of_the_cards(page, found)
        of_the_errors(page, found)
    except Exception as error:  # whatever it is: the time of the last run must not go stale for it
        failed.append("gpu")
        print(f"gpu: {error!r}", file=sys.stderr)
    try:
        state = read_watchdog(watchdog)
        if state is not None:
            of_the_watchdog(page, state)
    except ValueError as error:
        failed.append("watchdog")
        print(f"watchdog: {error}", file=sys.stderr)
    page.family(
        "nemo_gpu_health_failed", "gauge", "Whether a part of these metrics could not be made.",
        [({"part": part}, part in failed) for part in ("gpu", "watchdog")],
    )  # fmt: skip
    page.gauge("nemo_gpu_health_duration_seconds", "How long the look took.", round(time.monotonic() - began, 3))
    page.gauge("nemo_gpu_health_last_run_timestamp_seconds", "When these metrics were made.", round(time.time(), 3))
    return page.text()


def write(path: Path, text: str) -> None:
    """Replace the file in one step: a collector reads the old page or the new one."""
    # a leading dot and no .prom at the end: the textfile collector passes over it
    descriptor, staged = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(text)
            os.fchmod(stream.fileno(), 0o644)
            stream.flush()
            os.fsync(stream.fileno())
        Path(staged).replace(path)
    except BaseException:
        Path(staged).unlink(missing_ok=True)
        raise


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--settings", default=SETTINGS, help="JSON file of the role gpu_health (default: %(default)s)")
    parser.add_argument("--stdout", action="store_true", help="show the page and write nothing")
    arguments = parser.parse_args()
    settings = json.loads(Path(arguments.settings).read_text(encoding="utf-8"))
    text = page_of(settings["watchdog_state"])
    if arguments.stdout:
        sys.stdout.write(text)
    else:
        write(Path(settings["metrics_path"]), text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
