"""A Docker Engine for tests: the commands that container_release uses, with its state in one JSON file.

It runs in the test's process (``FakeDocker(path).run(argv)``) and as a ``docker`` command (``python fake_docker.py``
with the path in FAKE_DOCKER). An image's behaviour decides what a container of it does: ``healthy``, ``unhealthy``,
``crash`` (ends at once), ``loop`` (restarts for ever), ``slow:N`` (healthy from the Nth question on), ``fades:N`` (until then),
``nostart``. With ``single`` a container that is started beside a running one ends at once, as where there is one GPU.
"""

from __future__ import annotations

import json
import os
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DIGEST = "sha256:" + "{:064d}"


def image(
    number: int, behaviour: str = "healthy", platform: str = "amd64", repository: str = "registry/ai"
) -> dict[str, Any]:
    return {
        "id": "sha256:" + f"{number + 5000:064d}",
        "digest": DIGEST.format(number),
        "repository": repository,
        "behaviour": behaviour,
        "arch": platform,
    }


class FakeDocker:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.calls: list[list[str]] = []
        if not path.exists():
            self.save({"containers": {}, "images": [], "registry": {}, "errors": {}, "memory": 4 << 30})

    def load(self) -> dict[str, Any]:
        state: dict[str, Any] = json.loads(self.path.read_text())
        return state

    def save(self, state: dict[str, Any]) -> None:
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(state))
        temporary.replace(self.path)

    # for tests

    def push(self, tag: str, what: dict[str, Any]) -> str:
        state = self.load()
        state["registry"][f"{what['repository']}:{tag}"] = what
        state["registry"][f"{what['repository']}@{what['digest']}"] = what
        self.save(state)
        return str(what["digest"])

    def set(self, **values: Any) -> None:
        state = self.load()
        state.update(values)
        self.save(state)

    def container(self, name: str, **values: Any) -> None:
        state = self.load()
        state["containers"].setdefault(name, {"labels": {}, "port": 8000, "image": "x", "argv": [], "restarts": 0})
        state["containers"][name].update({"status": "running", "behaviour": "healthy", "asked": 0, **values})
        self.save(state)

    def containers(self) -> dict[str, Any]:
        containers: dict[str, Any] = self.load()["containers"]
        return containers

    def serving(self) -> list[str]:
        return [name for name, entry in self.containers().items() if entry["status"] == "running"]

    def probe(self, _address: str, port: int, _question: Any, _timeout: float) -> str | None:
        state = self.load()
        for entry in state["containers"].values():
            if entry["status"] == "running" and entry["port"] == port:
                entry["asked"] += 1
                self.save(state)
                if self.is_healthy(entry):
                    return None
                return "it answered 503, not 200"
        return "connection refused"

    def listener(self, port: int) -> str | None:
        held = any(entry["status"] == "running" and entry["port"] == port for entry in self.containers().values())
        return "process 1 (docker-proxy)" if held else None

    @staticmethod
    def is_healthy(entry: dict[str, Any]) -> bool:
        behaviour, _colon, number = entry["behaviour"].partition(":")
        return (
            behaviour == "healthy"
            or (behaviour == "slow" and entry["asked"] >= int(number))
            or (behaviour == "fades" and entry["asked"] < int(number))
        )

    def restart(self) -> None:
        """The host starts again: each container by its restart policy."""
        state = self.load()
        for entry in state["containers"].values():
            ran, policy = entry["status"] == "running", entry.get("policy", "unless-stopped")
            entry["status"] = "running" if policy == "always" or (ran and policy == "unless-stopped") else "exited"
        self.save(state)

    # the engine

    def run(self, argv: Sequence[str]) -> tuple[int, str, str]:
        words = list(argv)
        if words[0].endswith("timeout"):
            words = words[3:]
        assert words[0] == "docker", words
        words = words[1:]
        self.calls.append(words)
        state = self.load()
        command = words[0] if words[0] in ("info", "pull") else " ".join(words[:2])
        error = state["errors"].get(command)
        if error:
            return 1, "", error
        result = getattr(self, "do_" + command.replace(" ", "_"))(
            state, words[1:] if command in ("info", "pull") else words[2:]
        )
        self.save(state)
        return result

    def do_info(self, state: dict[str, Any], _words: list[str]) -> tuple[int, str, str]:
        data = {
            "OSType": "linux",
            "Architecture": "x86_64",
            "MemTotal": state["memory"],
            "DockerRootDir": str(self.path.parent),
            "DriverStatus": state.get("storage", []),
            "Runtimes": {"runc": {}, "nvidia": {}},
        }
        return 0, json.dumps(data), ""

    def do_pull(self, state: dict[str, Any], words: list[str]) -> tuple[int, str, str]:
        found = state["registry"].get(words[-1])
        if not found:
            return 1, "", f"Error response from daemon: manifest for {words[-1]} not found: manifest unknown"
        if found not in state["images"]:
            state["images"].append(found)
        return 0, words[-1], ""

    @staticmethod
    def find_image(state: dict[str, Any], reference: str) -> dict[str, Any] | None:
        for entry in state["images"]:
            tags = [key for key, value in state["registry"].items() if value == entry]
            if reference in (entry["id"], *tags):
                return dict(entry)
        return None

    def do_image_inspect(self, state: dict[str, Any], words: list[str]) -> tuple[int, str, str]:
        found = self.find_image(state, words[-1])
        if not found:
            return 1, "", f"Error: No such image: {words[-1]}"
        digests = [f"{found['repository']}@{found['digest']}"] if found["digest"] else []
        return (
            0,
            json.dumps({"Id": found["id"], "Os": "linux", "Architecture": found["arch"], "RepoDigests": digests}),
            "",
        )

    def do_image_ls(self, state: dict[str, Any], words: list[str]) -> tuple[int, str, str]:
        return 0, "\n".join(entry["id"] for entry in state["images"] if entry["repository"] == words[-1]), ""

    def do_image_rm(self, state: dict[str, Any], words: list[str]) -> tuple[int, str, str]:
        if any(entry["image"] == words[-1] for entry in state["containers"].values()):
            return 1, "", "conflict: unable to remove repository reference"
        state["images"] = [entry for entry in state["images"] if entry["id"] != words[-1]]
        return 0, "", ""

    def do_container_ls(self, state: dict[str, Any], words: list[str]) -> tuple[int, str, str]:
        if "--filter" in words and words[words.index("--filter") + 1].startswith("publish="):
            port = int(words[words.index("--filter") + 1].partition("=")[2])
            return (
                0,
                "\n".join(n for n, c in state["containers"].items() if c["status"] == "running" and c["port"] == port),
                "",
            )
        label = next((word.partition("=")[2] for word in words if word.startswith("label=")), "")
        key, _equals, value = label.partition("=")
        found = [
            name
            for name, entry in state["containers"].items()
            if not label or (key in entry["labels"] and value in ("", entry["labels"][key]))
        ]
        return 0, "\n".join(found), ""

    def do_container_inspect(self, state: dict[str, Any], words: list[str]) -> tuple[int, str, str]:
        out, err = [], []
        for name in words[2:]:
            entry = state["containers"].get(name)
            if not entry:
                err.append(f"Error: No such container: {name}")
            elif words[1] == "{{.Image}}":
                out.append(entry["image"])
            else:
                if entry["behaviour"] == "loop" and entry["status"] == "running":
                    entry["restarts"] += 1
                data = {
                    "Id": entry.setdefault("id", uuid.uuid4().hex),  # it outlives a change of name
                    "Name": "/" + name,
                    "RestartCount": entry["restarts"],
                    "State": {
                        "Status": entry["status"],
                        "Running": entry["status"] in ("running", "paused"),
                        "Paused": entry["status"] == "paused",
                        "ExitCode": entry.get("exit", 0),
                        "OOMKilled": entry.get("oom", False),
                    },
                    "NetworkSettings": {
                        "Networks": {"bridge": {"IPAddress": "172.17.0.2" if entry["status"] == "running" else ""}}
                    },
                    "Config": {"Labels": entry["labels"]},
                    "Image": entry["image"],
                    "HostConfig": {
                        "Memory": 1 << 30,
                        "RestartPolicy": {"Name": entry.get("policy", "unless-stopped"), "MaximumRetryCount": 0},
                        "PortBindings": {"8000/tcp": [{"HostIp": "", "HostPort": str(entry["port"])}]},
                    },
                }
                out.append(json.dumps(data))
        return (1 if err else 0), "\n".join(out), "\n".join(err)

    def do_container_create(self, state: dict[str, Any], words: list[str]) -> tuple[int, str, str]:
        name = words[words.index("--name") + 1]
        if name in state["containers"]:
            return (
                1,
                "",
                f'Error response from daemon: Conflict. The container name "/{name}" is already in use by container "1".',
            )
        place = 0
        while words[place].startswith("--"):
            place += 1 if words[place] in ("--init", "--read-only") else 2
        found = self.find_image(state, words[place])
        if not found:
            return 1, "", f"Error: No such image: {words[place]}"
        labels = dict(words[at + 1].split("=", 1) for at, word in enumerate(words) if word == "--label")
        state["containers"][name] = {
            "status": "created",
            "policy": words[words.index("--restart") + 1],
            "labels": labels,
            "image": found["id"],
            "behaviour": found["behaviour"],
            "port": int(words[words.index("--publish") + 1].split(":")[1]),
            "argv": words,
            "asked": 0,
            "restarts": 0,
        }
        return 0, "id", ""

    def do_container_rename(self, state: dict[str, Any], words: list[str]) -> tuple[int, str, str]:
        if words[0] not in state["containers"]:
            return 1, "", f"Error: No such container: {words[0]}"
        if words[1] in state["containers"]:
            return 1, "", f"Conflict. The container name {words[1]} is already in use"
        state["containers"][words[1]] = state["containers"].pop(words[0])
        return 0, "", ""

    def do_container_start(self, state: dict[str, Any], words: list[str]) -> tuple[int, str, str]:
        entry = state["containers"][words[0]]
        if entry["status"] == "running":
            return 0, "", ""
        if any(c["status"] == "running" and c["port"] == entry["port"] for c in state["containers"].values()):
            return 1, "", "Bind for 0.0.0.0:8000 failed: port is already allocated"
        if entry["behaviour"] == "nostart":
            return 1, "", "exec /app: exec format error"
        if state.get("single") and any(c["status"] == "running" for c in state["containers"].values()):
            entry["status"], entry["exit"] = "exited", 1
            return 0, words[0], ""
        entry["status"], entry["asked"] = "running", 0
        if entry["behaviour"] == "crash":
            entry["status"], entry["exit"] = "exited", 3
        return 0, words[0], ""

    def do_container_stop(self, state: dict[str, Any], words: list[str]) -> tuple[int, str, str]:
        state["containers"][words[-1]]["status"] = "exited"
        return 0, words[-1], ""

    def do_container_update(self, state: dict[str, Any], words: list[str]) -> tuple[int, str, str]:
        assert words[0] == "--restart"
        for name in words[2:]:
            if name not in state["containers"]:
                return 1, "", f"Error: No such container: {name}"
            state["containers"][name]["policy"] = words[1]
        return 0, "", ""

    def do_container_unpause(self, state: dict[str, Any], words: list[str]) -> tuple[int, str, str]:
        state["containers"][words[-1]]["status"] = "running"
        return 0, words[-1], ""

    def do_container_rm(self, state: dict[str, Any], words: list[str]) -> tuple[int, str, str]:
        if not state["containers"].pop(words[-1], None):
            return 1, "", f"Error: No such container: {words[-1]}"
        return 0, words[-1], ""

    def do_container_logs(self, state: dict[str, Any], words: list[str]) -> tuple[int, str, str]:
        tag = state["containers"][words[-1]]["labels"].get("nemo.tag", "?")
        return (
            0,
            f"starting {tag}\n{state.get('log', '')}",
            f'RuntimeError: {tag} is broken\nINFO: 10.0.0.1 - "GET /health HTTP/1.1" 503\n',
        )


if __name__ == "__main__":
    code, stdout, stderr = FakeDocker(Path(os.environ["FAKE_DOCKER"])).run(["docker", *sys.argv[1:]])
    sys.stdout.write(stdout)
    sys.stderr.write(stderr)
    sys.exit(code)
