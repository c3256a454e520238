#!/usr/bin/python
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Module: the NVIDIA card of a host, its driver, and what is wrong with either."""

from __future__ import annotations

DOCUMENTATION = r"""
module: gpu_info
short_description: The NVIDIA card of a host, its driver, and what is wrong with either
version_added: "0.1.0"
author: The nemo platform project (@nemo-platform)
description:
  - Looks at the PCI bus, the loaded and the installed kernel module (for the running kernel and for that of the next boot), Secure
    Boot, the driver's libraries and packages, the card itself by C(nvidia-smi), and Xid errors in the kernel's log since the last
    boot.
  - What is wrong stands in the result, worst first; the task does not fail, without a card or a driver neither. Each program is
    given 30 seconds, as C(nvidia-smi) hangs on some broken cards.
options:
  marker:
    description:
      - A file whose presence is told in RV(marked) and whose text in RV(mark), so that a role can see in the same look whether it
        was here before, and what it left.
    type: path
attributes:
  check_mode:
    description: Nothing is changed in any mode.
    support: full
  diff_mode:
    description: There is nothing to show.
    support: none
notes:
  - Needs root by C(become), for the kernel's log.
"""

EXAMPLES = r"""
- name: The card and its driver
  nemo.platform.gpu_info:
  become: true
  register: __found

- name: Containers can use the card
  ansible.builtin.assert:
    that: __found.gpu.usable
    fail_msg: "{{ inventory_hostname }}: {{ __found.gpu.problem }}"
"""

RETURN = r"""
marked:
  description: Whether O(marker) is there.
  returned: success
  type: bool
mark:
  description: The text of O(marker), without white space around it; empty where there is none.
  returned: success
  type: str
  sample: 580.95.05
gpu:
  description: All that was found.
  returned: success
  type: dict
  contains:
    present:
      description: Whether an NVIDIA card is on the PCI bus.
      type: bool
    pci:
      description: PCI addresses of the cards.
      type: list
      elements: str
      sample: ["0000:00:1e.0"]
    usable:
      description: Whether C(nvidia-smi) sees a card; containers can use it then.
      type: bool
    code:
      description:
        - What is wrong, in one word; empty when nothing is.
        - One of V(no_gpu), V(driver_missing), V(secure_boot), V(module_missing), V(module_mismatch), V(nvml_mismatch), V(not_loaded),
          V(nvml_error), V(xid), V(next_kernel), V(persistence_off), in the order of their weight.
      type: str
    problem:
      description: The same in one line for people.
      type: str
      sample: the loaded module is 580.95.05, the installed one 580.105.08
    problems:
      description: Everything that is wrong, each with C(code) and C(text), worst first.
      type: list
      elements: dict
    driver:
      description: The kernel module and what belongs to it.
      type: dict
      contains:
        loaded:
          description: Version of the loaded module; empty when none is.
          type: str
        installed:
          description: Version of the module that is installed for the running kernel; empty when none is.
          type: str
        libraries:
          description: Version of the management library (C(libnvidia-ml)).
          type: str
        open:
          description: Whether it is the open kernel module.
          type: bool
        kernel:
          description: The running kernel.
          type: str
        next_kernel:
          description: The kernel that the next boot takes.
          type: str
        module_for_next:
          description: Whether a module is installed for the kernel of the next boot.
          type: bool
        secure_boot:
          description: Whether Secure Boot is on.
          type: bool
        signed:
          description: Whether the installed module bears a signature.
          type: bool
        nouveau:
          description: Whether nouveau is loaded.
          type: bool
        headers:
          description: Whether modules can be built for the running kernel.
          type: bool
        headers_for_next:
          description: Whether modules can be built for the kernel of the next boot.
          type: bool
        kernel_packages:
          description: Installed packages of kernels, each with C(name), C(version) and C(held).
          type: list
          elements: dict
        held:
          description: Whether every installed package of the driver is held at its version.
          type: bool
        packages:
          description: Installed packages of the driver, each with C(name), C(version) and C(held).
          type: list
          elements: dict
    cuda:
      description: The newest CUDA version that the driver runs; empty while the card cannot be used.
      type: str
      sample: "13.0"
    devices:
      description:
        - One entry for each card, with C(index), C(uuid), C(name), C(pci), C(memory_total_mib), C(memory_used_mib), C(temperature_c),
          C(utilisation_percent), C(power_w), C(ecc_corrected), C(ecc_uncorrected) and C(persistence).
        - What a card does not tell is null.
      type: list
      elements: dict
    processes:
      description: What uses the cards, each with C(pid), C(name) and C(memory_used_mib).
      type: list
      elements: dict
    xids:
      description: The cards' errors in the kernel's log since the last boot, each with C(code), C(time) (seconds since 1970), C(text) and C(pci).
      type: list
      elements: dict
    reboot:
      description: C(needed), whether only a reboot or a reload of the module helps, and C(why).
      type: dict
"""

import os

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.nemo.platform.plugins.module_utils import gpu


def main() -> None:
    """Run the module."""
    module = AnsibleModule(argument_spec={"marker": {"type": "path"}}, supports_check_mode=True)
    marker = module.params["marker"]
    marked = bool(marker) and os.path.exists(marker)
    module.exit_json(changed=False, marked=marked, mark=gpu.read(marker) if marked else "", gpu=gpu.look())


if __name__ == "__main__":
    main()
