"""The cold path of the inference server: image, model and driver arrive side by side, against each of them alone."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
import tempfile

from lab import engine
from lab.aws import images
from lab.settings import MIRROR, REGISTRY
from tests.bench.measure import CHECKOUT, Cost, cost, table

REPOSITORY, TAG = "vllm-openai", "bench-cold"
MODEL = "nemo-lab/big-llama"
# So that each part takes about as long as the others: on this lab nothing is slow by itself.
PADDING_MIB, MODEL_BYTES_A_SECOND, BUILD_SECONDS = 400, 700_000, 20
PLAYBOOK = ["scripts/lab-env", "ansible-playbook", "-i", "inventories/lab"]
BEGIN, ARRIVED = "Image begins to arrive", "Model, image, card and host go together"
# The same modules and roles as roles/vllm, one after the other.
ALONE = """
- hosts: vllm
  become: true
  gather_facts: false
  tasks:
    - import_tasks: {facts}
    - import_role: {{name: nemo.platform.data_volume}}
      vars: {{data_volume_id: "{{{{ vllm_volume_id }}}}", data_volume_path: /srv/models, data_volume_label: models}}
    - import_role: {{name: nemo.platform.docker_engine}}
      vars:
        docker_engine_runtimes: {{nvidia: {{path: /usr/bin/nvidia-container-runtime}}}}
    - import_role: {{name: nemo.platform.ecr_credentials}}
      vars: {{ecr_credentials_registries: ["{{{{ nemo_registry }}}}"]}}
    - name: Image alone
      nemo.platform.container_image: {{image: "{registry}/{repository}", tag: {tag}}}
    - name: Model alone
      nemo.platform.model_snapshot:
        repository: {model}
        revision: {revision}
        path: /srv/models/hub
        mount_point: /srv/models
        endpoint: "{{{{ vllm_hub_endpoint }}}}"
    - import_role: {{name: nemo.platform.gpu_health}}
    - import_role: {{name: nemo.platform.nvidia_driver}}
    - import_role: {{name: nemo.platform.nvidia_container_toolkit}}
"""


def vllm() -> str:
    """From a bare host to image, model and driver in their places."""
    revision = json.loads((CHECKOUT / ".lab/artifacts.json").read_text())["hub"]["models"][MODEL]["revision"]
    images.push(TAG, repository=REPOSITORY, padding=PADDING_MIB)
    try:
        with tempfile.TemporaryDirectory() as folder:
            playbook = pathlib.Path(folder) / "alone.yml"
            facts = CHECKOUT / "playbooks/includes/facts.yml"
            playbook.write_text(
                ALONE.format(
                    facts=facts, registry=REGISTRY, repository=REPOSITORY, tag=TAG, model=MODEL, revision=revision
                )
            )
            _bare()
            alone = cost([*PLAYBOOK, str(playbook)])
        _bare()
        wanted = {"vllm_tag": TAG, "vllm_model": MODEL, "vllm_model_revision": revision}
        role = cost([*PLAYBOOK, "nemo.platform.vllm", "-e", json.dumps(wanted)])
    finally:
        _hub()
        _on("/usr/local/sbin/nemo-lab-gpu build-seconds=3")
        images.remove(TAG, repository=REPOSITORY)
    subprocess.run([*PLAYBOOK, "nemo.platform.vllm"], cwd=CHECKOUT, check=True, stdout=subprocess.DEVNULL, timeout=900)
    driver = next(name for name, at in alone.tasks if at > _at(alone, "Model alone"))
    parts = {
        f"image, {PADDING_MIB} MiB": _between(alone, "Image alone", "Model alone"),
        f"model, 34 MB, {MODEL_BYTES_A_SECOND / 1e6:.1f} MB/s a file": _between(alone, "Model alone", driver),
        f"driver (a build of {BUILD_SECONDS} s), container toolkit, gpu-doctor": alone.seconds - _at(alone, driver),
    }
    wall = _between(role, BEGIN, ARRIVED)
    total, longest = sum(parts.values()), max(parts.values())
    rows = [(f"{name}, alone", f"{seconds:.1f}") for name, seconds in parts.items()]
    rows += [
        ("one after the other", f"{total:.1f}"),
        ("the longest of them", f"{longest:.1f}"),
        ("side by side, as the role does it", f"{wall:.1f}"),
        ("the whole playbook, to a completion", f"{role.seconds:.1f}"),
    ]
    return table("The cold path of the inference server", ("what", "seconds"), rows)


def _at(run: Cost, task: str) -> float:
    return next(at for name, at in run.tasks if name == task)


def _between(run: Cost, first: str, last: str) -> float:
    return _at(run, last) - _at(run, first)


def _bare() -> None:
    """The host without anything, its volume without the model, and everything slow."""
    name = MODEL.replace("/", "--")
    _on(f"! mountpoint -q /srv/models || rm -rf /srv/models/hub/{name} /srv/models/hub/.partial")
    subprocess.run([sys.executable, "-m", "lab", "rebuild", "vllm"], cwd=CHECKOUT, check=True, timeout=300)
    _on(f"/usr/local/sbin/nemo-lab-gpu build-seconds={BUILD_SECONDS}")
    _hub(rate=MODEL_BYTES_A_SECOND)


def _hub(**values: int) -> None:
    _on(f"curl --silent --fail --request PUT --data '{json.dumps(values)}' http://{MIRROR}/hub/lab", "aws")


def _on(command: str, host: str = "vllm") -> None:
    found = engine.running()
    assert found, "the lab is down: `make lab` brings it up"
    found.exec(f"nemo-lab-{host}", ["sh", "-c", command])
