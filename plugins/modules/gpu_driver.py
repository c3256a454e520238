#!/usr/bin/python
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Module: the installed driver of an NVIDIA card is the loaded one, as far as that goes without a reboot."""

from __future__ import annotations

DOCUMENTATION = r"""
module: gpu_driver
short_description: Loads the installed driver of an NVIDIA card, as far as that goes without a reboot
version_added: "0.1.0"
author: The nemo platform project (@nemo-platform)
description:
  - Loads the driver's kernel module where it is installed and not loaded; takes nouveau out before, if that has the card.
  - Reloads it where the loaded version is another one than the installed one and nothing uses the card, which its open device files
    and the kernel's references tell. What uses it is never ended, so that the older module stays then, and a reboot is due
    (RV(gpu.reboot)).
  - Turns persistence mode on.
  - Looks again afterwards. A driver that stays unusable is no failure of the task, RV(gpu) says what is wrong.
options:
  reload:
    description: Whether a loaded module of another version may be reloaded.
    type: bool
    default: true
  persistence:
    description: Whether persistence mode shall be on.
    type: bool
    default: true
attributes:
  check_mode:
    description: Says what would be done; RV(gpu) is the host as it is.
    support: full
  diff_mode:
    description: There is nothing to show.
    support: none
notes:
  - Needs root by C(become).
"""

EXAMPLES = r"""
- name: The driver is loaded
  nemo.platform.gpu_driver:
  become: true
  register: __loaded

- name: Containers can use the card
  ansible.builtin.assert:
    that: __loaded.gpu.usable
    fail_msg: "{{ inventory_hostname }}: {{ __loaded.gpu.problem }}"
"""

RETURN = r"""
done:
  description: What was done, in order.
  returned: success
  type: list
  elements: str
  sample: [loaded nvidia 580.95.05, turned persistence mode on]
refused:
  description: What was tried and did not work, in the words of the program.
  returned: success
  type: list
  elements: str
gpu:
  description: The card and its driver afterwards, as M(nemo.platform.gpu_info) returns them.
  returned: success
  type: dict
"""

from typing import Any

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.nemo.platform.plugins.module_utils import gpu

DAEMON = "nvidia-persistenced.service"
DAEMON_NAME = DAEMON[:15]  # as the kernel knows it


class Driver:
    """The steps, each of which looks before it acts."""

    def __init__(self, run: gpu.Runner, root: str = "/", check: bool = False) -> None:
        self.run, self.root, self.check = run, root, check
        self.done: list[str] = []
        self.refused: list[str] = []
        self.found = gpu.look(root, run)

    def _try(self, *argv: str) -> bool:
        code, out, err = self.run(argv)
        if code != 0:
            self.refused.append(f"{' '.join(argv)}: {' '.join((err or out).split()) or f'status {code}'}")
        return code == 0

    def _insert(self) -> bool:
        """The module, and the one by which CUDA reaches it, whose device a CDI specification names if it is there."""
        inserted = self._try("modprobe", gpu.MODULE)
        if inserted:
            self.run(["modprobe", "nvidia_uvm"])
        return inserted

    def _did(self, text: str) -> None:
        self.done.append(text)
        if not self.check:
            self.found = gpu.look(self.root, self.run)

    def load(self) -> None:
        """The module where none is loaded."""
        driver = self.found["driver"]
        if not self.found["present"] or driver["loaded"] or not driver["installed"]:
            return
        if driver["nouveau"] and not self.check and not self._try("modprobe", "--remove", "nouveau"):
            return
        if self.check or self._insert():
            self._did(f"loaded nvidia {driver['installed']}")

    def reload(self) -> None:
        """The installed version in place of another one that nothing uses."""
        driver = self.found["driver"]
        if not driver["loaded"] or not driver["installed"] or driver["loaded"] == driver["installed"]:
            return
        # nvidia-smi tells nothing of processes while its library is of another version than the module.
        users = [user for user in gpu.users(self.root) if not user.startswith(DAEMON_NAME)]
        users = [f"{process['name']} ({process['pid']})" for process in self.found["processes"]] or users
        if users:
            self.refused.append(f"nvidia {driver['loaded']} is in use by {', '.join(users)}")
            return
        if self.check:
            self._did(f"would reload nvidia {driver['installed']} if nothing uses {driver['loaded']}")
            return
        # The daemon holds the card all the time, and is no user of it.
        daemon = self.run(["systemctl", "is-active", "--quiet", DAEMON])[0] == 0
        if daemon:
            self._try("systemctl", "stop", DAEMON)
        if not self._remove():
            if daemon:  # its library may be of another version than the module that stays: it need not start
                self.run(["systemctl", "start", DAEMON])
            return
        if self._insert():
            self._did(f"reloaded nvidia: {driver['installed']} in place of {driver['loaded']}")
        if daemon:
            self._try("systemctl", "start", DAEMON)
            self.found = gpu.look(self.root, self.run)

    def _remove(self) -> bool:
        """The modules, nvidia last; none where that one would stay, as the others on the disk are not those that are loaded."""
        if gpu.references(self.root) > 0:
            self.refused.append(f"nvidia {self.found['driver']['loaded']} is in use by the kernel")
            return False
        # One that is not loaded is no error to modprobe, one that is not there is: only the last one counts.
        for module in gpu.MODULES[:-1]:
            self.run(["modprobe", "--remove", module])
        removed = self._try("modprobe", "--remove", gpu.MODULE)
        if not removed:
            self.run(["modprobe", "nvidia_uvm"])
        return removed

    def persist(self) -> None:
        """Persistence mode on every card."""
        off = [device for device in self.found["devices"] if not device["persistence"]]
        if off and (self.check or self._try("nvidia-smi", "-pm", "1")):
            self._did("turned persistence mode on")


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "reload": {"type": "bool", "default": True},
            "persistence": {"type": "bool", "default": True},
        },
        supports_check_mode=True,
    )
    driver = Driver(gpu.program, check=module.check_mode)
    driver.load()
    if module.params["reload"]:
        driver.reload()
    if module.params["persistence"]:
        driver.persist()
    result: dict[str, Any] = {"done": driver.done, "refused": driver.refused, "gpu": driver.found}
    module.exit_json(changed=bool(driver.done), **result)


if __name__ == "__main__":
    main()
