"""What the mirror serves: made once, the same for the same inputs, in the layouts that upstream has."""

from __future__ import annotations

import hashlib
import io
import pathlib
import tarfile
from types import SimpleNamespace
from typing import Any

import pytest

from lab.artifacts import awscli, index, interpreter, kubernetes, publish, signing, store
from lab.console import LabError

LOCK = """# made by hand
one==1.0 \\
    --hash=sha256:aa \\
    --hash=sha256:bb
    # via two
two-more==2.1 ; python_version > '3' \\
    --hash=sha256:cc
"""


@pytest.fixture
def lock(tmp_path: pathlib.Path) -> pathlib.Path:
    path = tmp_path / "lock.txt"
    path.write_text(LOCK)
    return path


# ---- locks and the cache


def test_a_lock_is_read_with_its_hashes_and_without_its_comments(lock: pathlib.Path) -> None:
    assert store.locked(lock) == (
        "one==1.0 \\\n    --hash=sha256:aa \\\n    --hash=sha256:bb\n"
        "two-more==2.1 ; python_version > '3' \\\n    --hash=sha256:cc\n"
    )


def test_a_part_of_a_lock(lock: pathlib.Path) -> None:
    assert store.locked(lock, ["two-more"]) == "two-more==2.1 ; python_version > '3' \\\n    --hash=sha256:cc\n"
    with pytest.raises(LabError, match="does not pin three"):
        store.locked(lock, ["one", "three"])


def test_the_version_in_a_lock(lock: pathlib.Path) -> None:
    assert store.version_of(lock.read_text(), "two-more") == "2.1"
    with pytest.raises(LabError, match="no version of two is pinned"):
        store.version_of(lock.read_text(), "two")


@pytest.mark.parametrize("path", [store.REQUIREMENTS, kubernetes.LOCK, index.LOCK])
def test_every_requirement_of_the_real_locks_has_a_hash(path: pathlib.Path) -> None:
    entries = store.locked(path).replace("\\\n", "").splitlines()
    assert entries
    assert not [entry for entry in entries if "--hash=sha256:" not in entry]


def test_a_folder_is_made_once_for_the_same_inputs(tmp_path: pathlib.Path) -> None:
    calls: list[pathlib.Path] = []

    def build(folder: pathlib.Path) -> None:
        calls.append(folder)
        (folder / "a").mkdir()
        (folder / "a" / "b").write_text(f"made {len(calls)} times")

    first = store.made("kind", [b"1", b"2"], build, tmp_path)
    assert store.made("kind", [b"1", b"2"], build, tmp_path) == first
    assert first.digest("a/b") == hashlib.sha256(b"made 1 times").hexdigest()
    assert store.made("kind", [b"12", b""], build, tmp_path).key != first.key
    assert len(calls) == 2
    assert [path.name for path in tmp_path.iterdir()] != []
    assert len(list(tmp_path.iterdir())) == 1, "what is not asked for any more is gone"


def test_a_folder_that_could_not_be_made_is_not_there(tmp_path: pathlib.Path) -> None:
    def build(folder: pathlib.Path) -> None:
        (folder / "half").touch()
        raise LabError("no route")

    with pytest.raises(LabError):
        store.made("kind", [b"1"], build, tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_archive_depends_on_its_contents_alone(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, now in (("one", 1e9), ("two", 2e9)):
        monkeypatch.setattr("time.time", lambda now=now: now)
        with store.tgz(tmp_path / name / f"{name}.tar.gz") as archive:
            store.add(archive, "x/y", io.BytesIO(b"data"), 4, 0o755)
    first, second = ((tmp_path / name / f"{name}.tar.gz").read_bytes() for name in ("one", "two"))
    assert first == second
    with tarfile.open(fileobj=io.BytesIO(first)) as opened:
        (info,) = opened.getmembers()
        assert (info.name, info.mode, info.uid) == ("x/y", 0o755, 0)


def test_a_failed_download_names_what_was_asked_for(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pip(argv: list[str], **_: Any) -> Any:
        assert "--require-hashes" in argv
        return SimpleNamespace(returncode=1, stdout=b"", stderr=b"WARNING: old\nERROR: no route\n")

    monkeypatch.setattr(store, "run", pip)
    with pytest.raises(LabError, match=r"(?s)could not download one==1\.0, two==2.*ERROR: no route"):
        store.download("one==1.0 --hash=sha256:aa\ntwo==2 --hash=sha256:bb\n", tmp_path / "wheels", "x86_64")


# ---- the package index


@pytest.mark.parametrize(
    ("wheel", "name"),
    [
        ("ansible_core-2.21.5-py3-none-any.whl", "ansible-core"),
        ("PyYAML-6.0.3-cp313-cp313-manylinux_2_28_x86_64.whl", "pyyaml"),
        ("zope.interface-1-py3-none-any.whl", "zope-interface"),
    ],
)
def test_a_project_has_the_name_that_pip_asks_for(wheel: str, name: str) -> None:
    assert index.project(wheel) == name


def test_the_index_leads_to_each_wheel_with_its_digest(tmp_path: pathlib.Path) -> None:
    wheel = tmp_path / "ansible_core-1+local-py3-none-any.whl"
    wheel.write_bytes(b"wheel")
    index.write(tmp_path / "simple", [wheel])
    assert '<a href="ansible-core/">ansible-core</a>' in (tmp_path / "simple" / "index.html").read_text()
    page = (tmp_path / "simple" / "ansible-core" / "index.html").read_text()
    digest = hashlib.sha256(b"wheel").hexdigest()
    assert f'href="ansible_core-1%2Blocal-py3-none-any.whl#sha256={digest}"' in page
    assert (tmp_path / "simple" / "ansible-core" / wheel.name).read_bytes() == b"wheel"


# ---- the AWS CLI


def test_the_bundle_says_its_own_version() -> None:
    data = awscli.contents("awscli/__init__.py", lambda: b"import os\n__version__ = '1.46.3'\nx = 1\n")
    assert data == f'import os\n__version__ = "{awscli.version()}"\nx = 1\n'.encode()
    assert awscli.version().startswith("2.")


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("awscli/clidriver.py", b"whole"),
        ("awscli/botocore/data/endpoints.json", b"whole"),
        ("awscli/botocore/data/sts/2011-06-15/service-2.json", b"whole"),
        ("awscli/botocore/data/sts/2011-06-15/paginators-1.json", b"whole"),
        ("awscli/botocore/data/sdb/2009-04-15/service-2.json", awscli.EMPTY),
        ("awscli/botocore/data/sdb/2009-04-15/paginators-1.json", None),
        ("awscli/examples/sts/get-caller-identity.rst", None),
        ("yaml/_yaml.cpython-311-x86_64-linux-gnu.so", None),
        ("awscli-1.46.3.dist-info/RECORD", None),
    ],
)
def test_of_services_that_the_platform_lacks_the_bundle_has_the_name(name: str, wanted: bytes | None) -> None:
    assert awscli.contents(name, lambda: b"whole") == wanted


# ---- the interpreter


def about(**more: Any) -> interpreter.Interpreter:
    known = {
        "version": "3.13.1", "minor": "3.13", "build": "3.13.1 (main)", "program": "/opt/py/bin/python3.13",
        "prefix": "/opt/py", "stdlib": "/opt/py/lib/python3.13", "dynload": "",
    }  # fmt: skip
    return interpreter.Interpreter({**known, **more})


def test_the_archive_has_the_name_of_upstreams() -> None:
    assert interpreter.path_of(about(), "x86_64") == (
        f"python-build-standalone/{interpreter.DATE}/"
        f"cpython-3.13.1+{interpreter.DATE}-x86_64-unknown-linux-gnu-install_only_stripped.tar.gz"
    )


def test_an_interpreter_of_the_system_is_refused() -> None:
    assert "belongs to the system" in about(prefix="/usr").problem()


def test_an_interpreter_for_a_newer_c_library_is_refused(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interpreter, "text", lambda *_, **__: "libc.so.6 => /lib/libc.so.6")
    (tmp_path / "lib").mkdir()
    program, library = tmp_path / "python3.13", tmp_path / "lib" / "libpython3.13.so.1.0"
    program.write_bytes(b"\0GLIBC_2.4\0GLIBC_2.36\0")
    python = about(program=str(program), prefix=str(tmp_path))
    assert python.problem() == ""
    library.write_bytes(b"\0GLIBC_2.38\0")
    assert python.problem() == "needs the C library 2.38, and lab hosts have 2.36"
    monkeypatch.setattr(interpreter, "text", lambda *_, **__: "libc.musl-x86_64.so.1 => /lib/ld-musl-x86_64.so.1")
    library.unlink()
    assert "musl" in python.problem()


def test_versions_compare_as_numbers(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"GLIBC_2.9\0GLIBC_2.17\0GLIBC_PRIVATE\0")
    assert interpreter.glibc(path) == (2, 17)


def test_where_no_interpreter_fits_the_error_says_what_to_install(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interpreter, "ask", lambda _: about(prefix="/usr"))
    for name in ("PYENV_ROOT", "UV_PYTHON_INSTALL_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    with pytest.raises(LabError, match=r"(?s)belongs to the system.*uv python install 3\.\d+"):
        interpreter.find()


def test_the_libraries_that_a_program_takes_along(monkeypatch: pytest.MonkeyPatch) -> None:
    listing = """	linux-vdso.so.1 (0x00007f4a61410000)
	libssl.so.3 => /lib/x86_64-linux-gnu/libssl.so.3 (0x1)
	libpython3.13.so.1.0 => /opt/py/lib/libpython3.13.so.1.0 (0x2)
	libc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x3)
	libm.so.6 => /lib/x86_64-linux-gnu/libm.so.6 (0x3)
	libmd.so.0 => /lib/x86_64-linux-gnu/libmd.so.0 (0x3)
	/lib64/ld-linux-x86-64.so.2 (0x4)"""
    monkeypatch.setattr(interpreter, "text", lambda *_, **__: listing)
    found = [path.name for path in interpreter._needed(pathlib.Path("/p"))]
    assert found == ["libssl.so.3", "libpython3.13.so.1.0", "libmd.so.0"]
    monkeypatch.setattr(interpreter, "text", lambda *_, **__: "	libfoo.so.1 => not found")
    with pytest.raises(LabError, match=r"needs libfoo\.so\.1"):
        interpreter._needed(pathlib.Path("/p"))


@pytest.mark.parametrize(
    "name",
    [
        "test", "idlelib", "site-packages", "config-3.13-x86_64-linux-gnu", "json/__pycache__", "unittest/test",
        "lib-dynload/_tkinter.cpython-313.so", "lib-dynload/_testcapi.cpython-313.so", "libpython3.13.a",
    ],
)  # fmt: skip
def test_what_no_host_opens_stays_out(name: str) -> None:
    assert interpreter.LEFT_OUT.match(name)


@pytest.mark.parametrize(
    "name",
    ["json", "unittest", "unittest/mock.py", "configparser.py", "lib-dynload/_ssl.cpython-313.so", "ensurepip/_bundled",
     "_sysconfigdata__linux_x86_64-linux-gnu.py", "doctest.py", "lib-dynload"],
)  # fmt: skip
def test_what_programs_import_comes_along(name: str) -> None:
    assert not interpreter.LEFT_OUT.match(name)


# ---- the description for the inventory


def test_the_description_has_each_version_with_its_digests(tmp_path: pathlib.Path) -> None:
    def made(*paths: str) -> store.Made:
        return store.Made("key", tmp_path, {path: f"digest of {path}" for path in paths})

    key = "Fingerprint: " + "AB" * 20 + "\n-----BEGIN PGP PRIVATE KEY BLOCK-----\nsecret\n"
    key += "-----BEGIN PGP PUBLIC KEY BLOCK-----\npublic\n"
    artifacts: Any = SimpleNamespace(
        machine="x86_64", architecture="amd64", python=about(), key=key,
        relocatable=made(interpreter.path_of(about(), "x86_64")), diff=made(kubernetes.helm_diff_path("amd64")),
        bundle=made(awscli.path_of("x86_64")), tools=made(kubernetes.KUBECTL_PATH, kubernetes.HELM_PATH),
        models=made(), signed=SimpleNamespace(describe=dict),
    )  # fmt: skip
    described = publish.Artifacts.describe(artifacts)
    assert described["kubectl"]["digests"][kubernetes.KUBECTL] == {"amd64": f"digest of {kubernetes.KUBECTL_PATH}"}
    for name, architecture in (
        ("python", "x86_64"), ("kubectl", "amd64"), ("helm", "amd64"), ("helm_diff", "amd64"), ("aws_cli", "amd64"),
    ):  # fmt: skip
        assert list(described[name]["digests"]) == [described[name]["version"]]
        assert list(described[name]["digests"][described[name]["version"]]) == [architecture]
    assert described["aws_cli"]["signing_key_fingerprint"] == "AB" * 20
    assert "secret" not in str(described)
    assert signing.public(key) == "-----BEGIN PGP PUBLIC KEY BLOCK-----\npublic\n"
    artifacts.tools = None
    assert {"kubectl", "helm"}.isdisjoint(publish.Artifacts.describe(artifacts))
