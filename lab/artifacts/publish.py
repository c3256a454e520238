"""All artefacts: made side by side, put on the mirror, described in .lab/artifacts.json for the lab's inventory."""

from __future__ import annotations

import concurrent.futures
import fcntl
import hashlib
import json
import pathlib
from typing import Any

from lab.artifacts import awscli, hub, index, interpreter, kubernetes, nvidia, signing, store
from lab.aws.payload import machine
from lab.console import say, step
from lab.engine import Engine, tar_entry
from lab.settings import AWS_HOST, CACHE, MIRROR, STATE

DESCRIPTION = STATE / "artifacts.json"
STAMP = "/opt/nemo-lab/artifacts"  # in the container: what was put there
ROOT = "/srv/mirror"
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


class Artifacts:
    """What the mirror serves beside packages of the distribution."""

    def __init__(self) -> None:
        """Make what is not in the cache; needs no engine."""
        self.machine = machine()
        self.architecture = ARCHITECTURES[self.machine]
        self.python = interpreter.find()  # first: where it fails, nothing has been waited for
        with concurrent.futures.ThreadPoolExecutor() as pool:
            simple = pool.submit(index.simple, self.python.minor, self.machine)
            tools = pool.submit(kubernetes.tools, self.machine)
            bundle = pool.submit(awscli.bundle, self.machine)
            relocatable = pool.submit(interpreter.relocatable, self.python, self.machine)
            diff = pool.submit(kubernetes.helm_diff, self.architecture)
            models = pool.submit(hub.models)
            card = pool.submit(nvidia.repositories, self.machine, self.architecture)
            self.index, self.tools, self.bundle = simple.result(), tools.result(), bundle.result()
            self.relocatable, self.diff, self.nvidia = relocatable.result(), diff.result(), card.result()
            self.models = models.result()
        if self.tools is None:
            say(f"kubectl and helm are in no package registry for {self.architecture}: the Bastion goes without them")

    def sign(self, engine: Engine, base: str) -> None:
        """Sign what is signed upstream."""
        self.key = signing.key(engine, base)
        archive = self.bundle.folder / awscli.path_of(self.machine)

        def build(folder: pathlib.Path) -> None:
            target = folder / f"{awscli.path_of(self.machine)}.sig"
            target.parent.mkdir(parents=True)
            target.write_bytes(signing.sign(engine, base, self.key, archive))

        inputs = [self.bundle.key.encode(), self.key.encode(), store.source_of(signing.__name__)]
        self.signature = store.made("signature", inputs, build)
        self.signed = nvidia.Signed(engine, base, self.nvidia, self.machine, self.architecture)

    @property
    def every(self) -> list[store.Made]:
        found = [
            self.models,
            self.index,
            self.tools,
            self.bundle,
            self.signature,
            self.relocatable,
            self.diff,
            self.nvidia,
            self.signed.files,
        ]
        return [made for made in found if made]

    def describe(self) -> dict[str, Any]:
        """Versions and digests, as the roles' inputs want them."""
        python = interpreter.release(self.python)
        bundle = awscli.version()
        described: dict[str, Any] = {
            "mirror": f"http://{MIRROR}",
            "index_url": f"http://{MIRROR}/simple/",
            "python": {
                "version": python,
                "digests": {
                    python: {
                        self.machine: self.relocatable.digest(interpreter.path_of(self.python, self.machine)),
                    }
                },
            },
            "helm_diff": {
                "version": kubernetes.HELM_DIFF,
                "digests": {
                    kubernetes.HELM_DIFF: {
                        self.architecture: self.diff.digest(kubernetes.helm_diff_path(self.architecture))
                    }
                },
            },
            "hub": hub.describe(self.models),
            "aws_cli": {
                "version": bundle,
                "digests": {bundle: {self.architecture: self.bundle.digest(awscli.path_of(self.machine))}},
                "signing_key": signing.public(self.key),
                "signing_key_fingerprint": signing.fingerprint(self.key),
            },
            "nvidia": self.signed.describe(),
        }
        if self.tools:
            for name, version, path in (
                ("kubectl", kubernetes.KUBECTL, kubernetes.KUBECTL_PATH),
                ("helm", kubernetes.HELM, kubernetes.HELM_PATH),
            ):
                described[name] = {"version": version, "digests": {version: {"amd64": self.tools.digest(path)}}}
        return described


def prepare() -> Artifacts:
    """Make what is missing, one process at a time."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "mirror.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return Artifacts()


def publish(engine: Engine, base: str, artifacts: Artifacts) -> bool:
    """Put them on the mirror, and describe them; whether the mirror had others."""
    artifacts.sign(engine, base)
    described = json.dumps(artifacts.describe(), indent=2, sort_keys=True) + "\n"
    if not DESCRIPTION.exists() or DESCRIPTION.read_text() != described:
        draft = DESCRIPTION.with_suffix(".new")
        draft.write_text(described)
        draft.replace(DESCRIPTION)
    stamp = hashlib.sha256(json.dumps([made.digests for made in artifacts.every], default=dict).encode()).hexdigest()
    if engine.exec(AWS_HOST, ["cat", STAMP], check=False) == stamp:
        return False
    folders = sorted({path.name for made in artifacts.every for path in made.folder.iterdir()})
    with step("filling the mirror with what hosts download"):
        engine.exec(AWS_HOST, ["rm", "-rf", STAMP, *(f"{ROOT}/{name}" for name in folders)])
        for made in artifacts.every:
            engine("cp", f"{made.folder}/.", f"{AWS_HOST}:{ROOT}/")
        engine.exec(AWS_HOST, ["chown", "-R", "root:root", *(f"{ROOT}/{name}" for name in folders)])
        engine.copy_in(AWS_HOST, tar_of(STAMP, stamp.encode()))
    return True


def tar_of(path: str, data: bytes) -> bytes:
    """An archive of one file."""
    import io
    import tarfile

    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        info, content = tar_entry(path, data)
        archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()
