"""scripts/pins against publishers of one's own, on roles of one's own."""

from __future__ import annotations

import hashlib
import http.server
import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from tests.unit.helpers import ROOT, script

ARCHITECTURES = ("amd64", "arm64")
Files = dict[str, bytes]


def sha256(text: str | bytes) -> str:
    return hashlib.sha256(text.encode() if isinstance(text, str) else text).hexdigest()


class Publisher:
    """All publishers in one: paths to what they answer."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.files: Files = {}
        self.asked: list[str] = []
        self.broken: dict[str, int] = {}

    def put(self, path: str, content: object) -> None:
        if not isinstance(content, bytes):
            content = (content if isinstance(content, str) else json.dumps(content)).encode()
        self.files[path] = content

    def kubectl(self, version: str, newest: bool = False) -> Files:
        for it in ARCHITECTURES:
            self.put(f"/kubectl/release/v{version}/bin/linux/{it}/kubectl.sha256", sha256(f"kubectl{version}{it}"))
        if newest:
            self.put(f"/kubectl/release/stable-{version.rpartition('.')[0]}.txt", f"v{version}\n")
        return self.files

    def helm(self, version: str) -> None:
        for it in ARCHITECTURES:
            name = f"helm-v{version}-linux-{it}.tar.gz"
            self.put(f"/helm/{name}.sha256sum", f"{sha256(f'helm{version}{it}')}  {name}\n")
        self.put(f"/helm/helm{version[0]}-latest-version", f"v{version}")

    def helm_diff(self, version: str, with_digests: bool = True) -> None:
        files = []
        for it in ARCHITECTURES:
            name, data = f"helm-diff-linux-{it}.tgz", f"diff{version}{it}"
            files.append({"name": name, "digest": f"sha256:{sha256(data)}" if with_digests else None})
            self.put(f"/helm_diff/v{version}/{name}", data)
        release = {"tag_name": f"v{version}", "assets": files}
        self.put(f"/helm_diff_releases/tags/v{version}", release)
        self.put("/helm_diff_releases/latest", release)

    def python(self, release: str, *versions: str) -> None:
        lines = [
            f"{sha256(version + machine)}  cpython-{version}+{release}-{machine}-unknown-linux-gnu-install_only_stripped.tar.gz"
            for version in versions
            for machine in ("x86_64", "aarch64")
        ]
        lines.append(f"{'0' * 64}  cpython-3.13.99+{release}-x86_64-unknown-linux-musl-install_only_stripped.tar.gz")
        self.put(f"/python_runtime/{release}/SHA256SUMS", "\n".join(lines))
        self.put("/python_runtime_releases/latest", {"tag_name": release})


@pytest.fixture
def publisher() -> Iterator[Publisher]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            here.asked.append(self.path)
            status = here.broken.get(self.path, 200 if self.path in here.files else 404)
            body = here.files.get(self.path, b"") if status == 200 else b"broken"
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    here = Publisher(f"http://127.0.0.1:{server.server_address[1]}")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield here
    server.shutdown()
    server.server_close()


class Pins:
    """The program with roles in a folder of the test."""

    def __init__(self, module: ModuleType, root: Path, publisher: Publisher) -> None:
        self.module, self.root, self.publisher = module, root, publisher

    def write(self, role: str, **mappings: dict[str, dict[str, str]]) -> Path:
        path = self.root / "roles" / role / "vars/pins.yml"
        path.parent.mkdir(parents=True, exist_ok=True)
        text = "---\n"
        for name, pins in mappings.items():
            text += f"# where {name} come from\n{self.module.block(f'__{name}_pins', pins)}\n"
        path.write_text(text)
        return path

    def read(self, role: str, name: str) -> dict[str, dict[str, str]]:
        return yaml.safe_load((self.root / "roles" / role / "vars/pins.yml").read_text())[f"__{name}_pins"]

    def run(self, *arguments: str) -> int:
        addresses = [f"--address={name}={self.publisher.url}/{name}" for name in self.module.ADDRESSES]
        return self.module.main([*addresses, *arguments])


@pytest.fixture
def pins(publisher: Publisher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pins:
    module = script("pins")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setenv("NEMO_PINS_PAUSE", "0")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return Pins(module, tmp_path, publisher)


def kubectl(*versions: str) -> dict[str, dict[str, str]]:
    return {version: {it: sha256(f"kubectl{version}{it}") for it in ARCHITECTURES} for version in versions}


@pytest.fixture
def one(pins: Pins, publisher: Publisher) -> Path:
    """kubectl with one release pinned and a newer one published."""
    publisher.kubectl("1.33.9")
    publisher.kubectl("1.33.11", newest=True)
    return pins.write("kubectl", kubectl=kubectl("1.33.9"))


def test_new_release(pins: Pins, one: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pins.run("kubectl") == 0
    assert pins.read("kubectl", "kubectl") == kubectl("1.33.11", "1.33.9")
    assert list(pins.read("kubectl", "kubectl")) == ["1.33.11", "1.33.9"]
    out = capsys.readouterr().out
    assert "kubectl: 1.33.9 -> 1.33.11" in out
    assert f"  amd64: {sha256('kubectl1.33.11amd64')}" in out
    assert one.read_text().startswith("---\n# where kubectl come from\n__kubectl_pins:\n")
    assert pins.run("kubectl") == 0
    assert "kubectl: nothing new (1.33.11, 1.33.9)" in capsys.readouterr().out


def test_check_writes_nothing(pins: Pins, one: Path) -> None:
    before = one.read_text()
    assert pins.run("--check", "kubectl") == 1
    assert one.read_text() == before
    pins.run("kubectl")
    assert pins.run("--check", "kubectl") == 0


def test_added_release(pins: Pins, one: Path, publisher: Publisher) -> None:
    publisher.kubectl("1.34.2")
    assert pins.run("kubectl", "--add", "kubectl=v1.34.2") == 0
    assert list(pins.read("kubectl", "kubectl")) == ["1.34.2", "1.33.11", "1.33.9"]


def test_every_pinned_minor_is_looked_up(pins: Pins, publisher: Publisher) -> None:
    for version in ("1.33.11", "1.34.5"):
        publisher.kubectl(version, newest=True)
    for version in ("1.33.9", "1.34.4"):
        publisher.kubectl(version)
    pins.write("kubectl", kubectl=kubectl("1.33.9", "1.34.4"))
    assert pins.run("kubectl") == 0
    assert list(pins.read("kubectl", "kubectl")) == ["1.34.5", "1.34.4", "1.33.11", "1.33.9"]


def test_published_file_that_changed(
    pins: Pins, one: Path, publisher: Publisher, capsys: pytest.CaptureFixture[str]
) -> None:
    before = one.read_text()
    publisher.put("/kubectl/release/v1.33.9/bin/linux/arm64/kubectl.sha256", "f" * 64)
    assert pins.run("kubectl") == 2
    err = capsys.readouterr().err
    pinned = sha256("kubectl1.33.9arm64")
    assert f"kubectl 1.33.9 arm64: pinned {pinned}, but the publisher now has {'f' * 64}" in err
    assert "nothing was written" in err
    assert one.read_text() == before


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b"<html>maintenance</html>", "no SHA-256 in it, but '<html>maintenance</html>'"),
        (b"", "no SHA-256 in it"),
        (None, "404"),
    ],
)
def test_one_architecture_missing(
    pins: Pins, one: Path, publisher: Publisher, capsys: pytest.CaptureFixture[str], answer: bytes | None, said: str
) -> None:
    before = one.read_text()
    path = "/kubectl/release/v1.33.11/bin/linux/arm64/kubectl.sha256"
    del publisher.files[path]
    if answer is not None:
        publisher.files[path] = answer
    assert pins.run("kubectl") == 2
    assert said in capsys.readouterr().err
    assert one.read_text() == before


def test_failure_of_one_tool_keeps_the_others_back(pins: Pins, one: Path, publisher: Publisher) -> None:
    before = one.read_text()
    pins.write("helm", helm={"4.1.4": dict.fromkeys(ARCHITECTURES, "a" * 64)})
    assert pins.run("kubectl", "helm") == 2
    assert one.read_text() == before


def test_failing_write_changes_neither(
    pins: Pins, one: Path, publisher: Publisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    publisher.helm("4.1.4")
    publisher.helm("4.2.0")
    other = pins.write("helm", helm={"4.1.4": {it: sha256(f"helm4.1.4{it}") for it in ARCHITECTURES}})
    before = (one.read_text(), other.read_text())
    real = Path.write_text

    def full(self: Path, *arguments: object, **options: object) -> int:
        if "kubectl" in str(self):
            raise OSError(28, "No space left on device")
        return real(self, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        pins.run("helm", "kubectl")
    assert (one.read_text(), other.read_text()) == before
    assert not list(pins.root.rglob("*.new"))


def test_busy_server_is_asked_again(pins: Pins, one: Path, publisher: Publisher) -> None:
    path = "/kubectl/release/stable-1.33.txt"
    publisher.broken[path] = 503
    assert pins.run("kubectl") == 2
    assert publisher.asked.count(path) == pins.module.TRIES


def test_server_that_names_another_minor(
    pins: Pins, one: Path, publisher: Publisher, capsys: pytest.CaptureFixture[str]
) -> None:
    publisher.put("/kubectl/release/stable-1.33.txt", "v1.99.0")
    assert pins.run("kubectl") == 2
    assert "'1.99.0' is no release of 1.33" in capsys.readouterr().err


class TestHelm:
    def test_both_mappings_of_one_file(self, pins: Pins, publisher: Publisher) -> None:
        for version in ("4.1.4", "4.2.0"):
            publisher.helm(version)
        for version in ("3.14.0", "3.15.10"):
            publisher.helm_diff(version)
        path = pins.write(
            "helm",
            helm={"4.1.4": {it: sha256(f"helm4.1.4{it}") for it in ARCHITECTURES}},
            helm_diff={"3.14.0": {it: sha256(f"diff3.14.0{it}") for it in ARCHITECTURES}},
        )
        assert pins.run() == 2  # the other publishers have nothing
        assert pins.run("helm", "helm_diff") == 0
        assert list(pins.read("helm", "helm")) == ["4.2.0", "4.1.4"]
        assert list(pins.read("helm", "helm_diff")) == ["3.15.10", "3.14.0"]
        assert pins.read("helm", "helm_diff")["3.15.10"]["arm64"] == sha256("diff3.15.10arm64")
        text = path.read_text()
        assert text.index("# where helm come from") < text.index("__helm_pins") < text.index("# where helm_diff")

    def test_release_without_digests_is_downloaded(self, pins: Pins, publisher: Publisher) -> None:
        publisher.helm_diff("3.15.10", with_digests=False)
        pins.write("helm", helm_diff={})
        assert pins.run("helm_diff") == 0
        assert pins.read("helm", "helm_diff")["3.15.10"]["amd64"] == sha256("diff3.15.10amd64")


class TestPython:
    def test_newest_of_each_minor(self, pins: Pins, publisher: Publisher) -> None:
        publisher.python("20260805", "3.13.14", "3.12.14", "3.14.2")
        publisher.python("20260814", "3.13.15", "3.13.14", "3.12.14", "3.14.3")
        old = {
            f"{it}+20260805": {machine: sha256(it + machine) for machine in ("x86_64", "aarch64")}
            for it in ("3.13.14", "3.12.14")
        }
        pins.write("python_runtime", python_runtime=old)
        assert pins.run("python_runtime") == 0
        found = pins.read("python_runtime", "python_runtime")
        # another build of 3.12.14 is no news, and 3.14 was not asked for
        assert list(found) == ["3.13.15+20260814", "3.13.14+20260805", "3.12.14+20260805"]
        assert found["3.13.15+20260814"] == {it: sha256("3.13.15" + it) for it in ("aarch64", "x86_64")}

    def test_version_without_release(self, pins: Pins, publisher: Publisher) -> None:
        publisher.python("20260814", "3.13.15")
        pins.write("python_runtime", python_runtime={})
        assert pins.run("python_runtime", "--add", "python_runtime=3.13.15") == 2
        assert pins.run("python_runtime", "--add", "python_runtime=3.13.15+20260814") == 0

    def test_one_machine_missing(self, pins: Pins, publisher: Publisher, capsys: pytest.CaptureFixture[str]) -> None:
        publisher.python("20260814", "3.13.15")
        sums = publisher.files["/python_runtime/20260814/SHA256SUMS"].splitlines()
        publisher.put(
            "/python_runtime/20260814/SHA256SUMS", b"\n".join(line for line in sums if b"aarch64" not in line)
        )
        pins.write("python_runtime", python_runtime={})
        assert pins.run("python_runtime", "--add", "python_runtime=3.13.15+20260814") == 2
        assert "no digest for aarch64" in capsys.readouterr().err


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, str]]]:
    home = tmp_path_factory.mktemp("gnupg")
    home.chmod(0o700)
    fingerprints = {}
    for name in ("team", "stranger"):
        command: list[str | Path] = [
            "gpg",
            "--homedir",
            home,
            "--batch",
            "--pinentry-mode",
            "loopback",
            "--passphrase",
            "",
        ]
        subprocess.run([*command, "--quick-generate-key", name, "ed25519", "sign", "never"], check=True)
        listing = subprocess.run(
            ["gpg", "--homedir", home, "--with-colons", "--fingerprint", "--list-keys", name],
            check=True, capture_output=True, text=True,
        ).stdout  # fmt: skip
        fingerprints[name] = next(line.split(":")[9] for line in listing.splitlines() if line.startswith("fpr"))
    yield home, fingerprints
    subprocess.run(["gpgconf", "--homedir", home, "--kill", "all"], capture_output=True, check=False)


@pytest.mark.skipif(not shutil.which("gpg"), reason="no gpg on this machine")
class TestAwsCli:
    def publish(
        self, pins: Pins, keys: tuple[Path, dict[str, str]], version: str, signer: str = "team", tampered: bool = False
    ) -> None:
        home, fingerprints = keys
        role = pins.root / "roles/aws_cli"
        for folder in ("defaults", "files"):
            (role / folder).mkdir(parents=True, exist_ok=True)
        (role / "defaults/main.yml").write_text(f"aws_cli_signing_key_fingerprint: {fingerprints['team']}\n")
        key = subprocess.run(
            ["gpg", "--homedir", home, "--armor", "--export", "team"], check=True, capture_output=True
        ).stdout
        (role / "files/aws-cli-team.asc").write_bytes(key)
        for machine in ("x86_64", "aarch64"):
            name = f"awscli-exe-linux-{machine}-{version}.zip"
            data = f"{name} bundle".encode()
            signature = subprocess.run(
                ["gpg", "--homedir", home, "--batch", "--local-user", signer, "--detach-sign", "--output", "-"],
                input=data, check=True, capture_output=True,
            ).stdout  # fmt: skip
            pins.publisher.put(f"/aws_cli/{name}", data + b"!" if tampered else data)
            pins.publisher.put(f"/aws_cli/{name}.sig", signature)
        tags = [{"name": it} for it in ("1.99.0", version, "2.0.0dev1", "2.1.9")]
        pins.publisher.put("/aws_cli_releases", tags)
        pins.write("aws_cli", aws_cli={"2.36.9": dict.fromkeys(ARCHITECTURES, "a" * 64)})

    def test_signed_bundle(self, pins: Pins, keys: tuple[Path, dict[str, str]]) -> None:
        self.publish(pins, keys, "2.36.29")
        assert pins.run("aws_cli") == 0
        found = pins.read("aws_cli", "aws_cli")
        assert list(found) == ["2.36.29", "2.36.9"]
        assert found["2.36.29"]["arm64"] == sha256("awscli-exe-linux-aarch64-2.36.29.zip bundle")

    @pytest.mark.parametrize(
        ("how", "said"),
        [({"signer": "stranger"}, "made by another key"), ({"tampered": True}, "does not fit the file")],
        ids=["stranger", "tampered"],
    )
    def test_refused(
        self,
        pins: Pins,
        keys: tuple[Path, dict[str, str]],
        how: dict[str, object],
        said: str,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        self.publish(pins, keys, "2.36.29", **how)  # type: ignore[arg-type]
        assert pins.run("aws_cli") == 2
        assert said in capsys.readouterr().err
        assert list(pins.read("aws_cli", "aws_cli")) == ["2.36.9"]


@pytest.mark.parametrize(
    "arguments",
    [["nothing"], ["--add", "kubectl"], ["--add", "nothing=1"], ["--address", "nothing=http://x"]],
    ids=" ".join,
)
def test_wrong_words(pins: Pins, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        pins.run(*arguments)
    assert ended.value.code == 2


@pytest.mark.parametrize("name", ["aws_cli", "helm", "helm_diff", "kubectl", "python_runtime"])
def test_files_of_the_roles(name: str) -> None:
    """What is in the repository has the shape that the program reads and writes, and the default version is in it."""
    module = script("pins")
    tool = {it.name: it for it in module.TOOLS}[name](module.Web(module.ADDRESSES))
    pinned = tool.pinned()
    for version, digests in pinned.items():
        assert tool.check(digests, version) == dict(sorted(digests.items()))
    text = tool.path.read_text()
    assert module.replaced(text, tool.variable, pinned) == text
    defaults = yaml.safe_load((tool.path.parent.parent / "defaults/main.yml").read_text())
    version = defaults["python_runtime_relocatable_version" if name == "python_runtime" else f"{name}_version"]
    assert version in pinned
    assert ROOT in tool.path.parents
