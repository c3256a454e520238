"""The simulated card of a lab host: an NVIDIA A10G on its PCI bus, whose state tests and people set.

The driver is not part of it: roles install the stub packages of lab/artifacts/nvidia.py, whose programs read the state.
"""

from __future__ import annotations

from lab.settings import CHECKOUT

STUBS = CHECKOUT / "lab/nvidia"
PROGRAM = "/usr/local/sbin/nemo-lab-gpu"
UNIT = "nemo-lab-gpu"


def payload_files() -> list[tuple[str, bytes, int]]:
    """Path, content and mode of what a host with a card has; the unit UNIT is to be enabled."""
    return [
        (PROGRAM, (STUBS / "nemo_lab_gpu.py").read_bytes(), 0o755),
        # ahead of the system's in every PATH: systemd's, sshd's, sudo's
        ("/usr/local/bin/journalctl", (STUBS / "journalctl").read_bytes(), 0o755),
        (f"/etc/systemd/system/{UNIT}.service", (STUBS / f"{UNIT}.service").read_bytes(), 0o644),
    ]
