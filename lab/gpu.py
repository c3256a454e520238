"""The simulated card of a lab host: an NVIDIA A10G on its PCI bus, whose state tests and people set.

The driver is not part of it: roles install the stub packages of lab/artifacts/nvidia.py, whose programs read the state.
"""

from __future__ import annotations

from lab.settings import CHECKOUT

STUBS = CHECKOUT / "lab/nvidia"
PROGRAM = "/usr/local/sbin/nemo-lab-gpu"
UNIT = "nemo-lab-gpu"
UNIT_TEXT = f"""[Unit]
Description=The simulated card: what a boot does
DefaultDependencies=no
After=local-fs.target systemd-tmpfiles-setup.service
Before=basic.target nvidia-persistenced.service docker.service

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart={PROGRAM} boot

[Install]
WantedBy=basic.target
"""


def payload_files() -> list[tuple[str, bytes, int]]:
    """Path, content and mode of what a host with a card has; the unit UNIT is to be enabled."""
    return [
        (PROGRAM, (STUBS / "nemo_lab_gpu.py").read_bytes(), 0o755),
        # ahead of the system's in every PATH: systemd's, sshd's, sudo's
        ("/usr/local/bin/journalctl", (STUBS / "journalctl").read_bytes(), 0o755),
        (f"/etc/systemd/system/{UNIT}.service", UNIT_TEXT.encode(), 0o644),
    ]
