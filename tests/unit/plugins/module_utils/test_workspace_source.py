"""Which files of a project go to the Bastion, under which name, and in which bytes."""

from __future__ import annotations

import json
import os
import subprocess
import tarfile
from pathlib import Path

import pytest

from ansible_collections.nemo.platform.plugins.module_utils import workspace_source
from ansible_collections.nemo.platform.plugins.module_utils.workspace_source import SourceError, key_problem, look, pack

SECRETS = {
    ".lab/ssh/key", ".venv/bin/python", ".env", "lab.pem", "ssh/host.key", ".vault-password", ".vault-password-prod", "ssh/id_ed25519",
    "roles/x/__pycache__/y.pyc",
}  # fmt: skip


def git(folder: Path, *words: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.com", "-c", "commit.gpgsign=false"]
    return subprocess.run(
        ["git", *identity, *words], cwd=folder, check=True, capture_output=True, text=True
    ).stdout.strip()


def write(folder: Path, name: str, text: str = "x\n") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A project without git."""
    folder = tmp_path / "project"
    write(folder, "site.yml", "- hosts: all\n")
    write(folder, "requirements/controller.txt", "a==1 --hash=sha256:0\n")
    write(folder, "scripts/run", "#!/bin/sh\n").chmod(0o755)
    (folder / "inventories").mkdir()
    (folder / "inventories/link.yml").symlink_to("../site.yml")
    return folder


@pytest.fixture
def checkout(plain: Path) -> Path:
    """The same as a clean repository."""
    write(plain, ".gitignore", "/ignored\n.lab/\n")
    write(plain, "ignored")
    git(plain, "init", "-q")
    git(plain, "add", "-A")
    git(plain, "commit", "-q", "-m", "first")
    return plain


def unpacked(folder: Path, into: Path) -> Path:
    """What the Bastion has of it."""
    archive = into.parent / "archive.tar"
    pack(look(str(folder)), str(archive))
    with tarfile.open(archive) as tar:
        tar.extractall(into, filter="tar")
    return into


def test_clean_checkout_is_its_commit(checkout: Path) -> None:
    source = look(str(checkout))
    assert source.revision == git(checkout, "rev-parse", "HEAD")[:12]
    assert source.files == (
        ".gitignore", "inventories/link.yml", "requirements/controller.txt", "scripts/run", "site.yml",
    )  # fmt: skip


@pytest.mark.parametrize("change", ["edit", "new", "delete", "mode"])
def test_change_is_in_the_revision(checkout: Path, change: str) -> None:
    clean = look(str(checkout))
    if change == "edit":
        write(checkout, "site.yml", "- hosts: none\n")
    elif change == "new":
        write(checkout, "roles/new/tasks/main.yml")
    elif change == "delete":
        (checkout / "scripts/run").unlink()
    else:
        (checkout / "site.yml").chmod(0o755)
    dirty = look(str(checkout))
    assert dirty.revision.startswith(f"{clean.revision}-")
    assert dirty.content != clean.content
    assert dirty.revision == look(str(checkout)).revision
    assert ("roles/new/tasks/main.yml" in dirty.files) == (change == "new")


def test_ignored_file_changes_nothing(checkout: Path) -> None:
    before = look(str(checkout))
    write(checkout, "ignored", "other\n")
    write(checkout, ".lab/state")
    assert look(str(checkout)) == before


@pytest.mark.parametrize("repository", [True, False])
def test_secrets_stay_at_home(plain: Path, repository: bool) -> None:
    for name in SECRETS:
        write(plain, name)
    write(plain, "files/deploy", "-----BEGIN OPENSSH PRIVATE KEY-----\nx\n")
    if repository:
        git(plain, "init", "-q")
        git(plain, "add", "-A", "-f")
        git(plain, "commit", "-q", "-m", "everything, by accident")
    found = set(look(str(plain)).files)
    assert "site.yml" in found
    assert not found & (SECRETS | {"files/deploy"})


def test_folder_in_a_repository_is_not_that_repository(checkout: Path) -> None:
    write(checkout, "build/sub/site.yml")
    assert look(str(checkout / "build/sub")).commit == ""


def test_workspace_finds_its_own_revision(checkout: Path, tmp_path: Path) -> None:
    workspace = unpacked(checkout, tmp_path / "workspace")
    (workspace / "environment").symlink_to("../env")  # made there
    write(workspace, "plugins/__pycache__/x.pyc")
    assert look(str(workspace)).revision == look(str(checkout)).revision
    assert look(str(workspace)).record == look(str(checkout)).record
    link = workspace / "collections/ansible_collections/nemo/platform"
    assert os.path.realpath(link) == str(workspace)


def test_changed_workspace_is_another_revision(checkout: Path, tmp_path: Path) -> None:
    workspace = unpacked(checkout, tmp_path / "workspace")
    write(workspace, "site.yml", "- hosts: none\n")
    assert look(str(workspace)).revision.startswith("content-")


def test_without_git_the_content_is_the_revision(plain: Path) -> None:
    source = look(str(plain))
    assert source.revision == f"content-{source.content[:12]}"


def test_without_the_git_program(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert look(str(checkout)).revision.startswith("content-")


def test_archive_is_the_same_bytes_elsewhere_and_later(checkout: Path, tmp_path: Path) -> None:
    other = tmp_path / "clone"
    git(tmp_path, "clone", "-q", str(checkout), str(other))
    os.utime(other / "site.yml", (1, 1))
    (other / "site.yml").chmod(0o600)
    pack(look(str(checkout)), str(tmp_path / "a.tar"))
    pack(look(str(other)), str(tmp_path / "b.tar"))
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    with tarfile.open(tmp_path / "a.tar") as tar:
        members = {member.name: member for member in tar}
        record = tar.extractfile("REVISION")
        assert record is not None
        assert json.loads(record.read())["revision"] == look(str(checkout)).revision
    assert {member.uid for member in members.values()} == {0}
    assert {member.mtime for member in members.values()} == {0}
    assert members["scripts/run"].mode == 0o755
    assert members["inventories/link.yml"].issym()


def test_change_while_packing_is_noticed(checkout: Path, tmp_path: Path) -> None:
    source = look(str(checkout))
    write(checkout, "site.yml", "- hosts: none\n")
    with pytest.raises(SourceError, match="changed while it was packed"):
        pack(source, str(tmp_path / "a.tar"))


@pytest.mark.parametrize("target", ["/etc/passwd", "../../outside"])
def test_link_out_of_the_project_is_refused(plain: Path, target: str) -> None:
    (plain / "inventories/out").symlink_to(target)
    with pytest.raises(SourceError, match=r"inventories/out is a link to .*outside the project"):
        look(str(plain))


def test_requirements_need_hashes(plain: Path) -> None:
    workspace_source.check_requirements(look(str(plain)), "requirements/controller.txt")
    with pytest.raises(SourceError, match="is not there"):
        workspace_source.check_requirements(look(str(plain)), "requirements/other.txt")
    write(plain, "requirements/controller.txt", "a==1\n")
    with pytest.raises(SourceError, match="no hashes"):
        workspace_source.check_requirements(look(str(plain)), "requirements/controller.txt")


def test_no_folder() -> None:
    with pytest.raises(SourceError, match="/nowhere is not a folder"):
        look("/nowhere")


@pytest.mark.parametrize("kind", ["openssh", "pem"])
@pytest.mark.parametrize("passphrase", ["", "secret"])
def test_key_with_a_passphrase_is_refused(tmp_path: Path, kind: str, passphrase: str) -> None:
    key = tmp_path / "key"
    options = ["-t", "ed25519"] if kind == "openssh" else ["-t", "rsa", "-b", "2048", "-m", "PEM"]
    subprocess.run(["ssh-keygen", "-q", *options, "-N", passphrase, "-f", str(key)], check=True)
    problem = key_problem(key.read_text())
    assert problem.startswith("has a passphrase") if passphrase else problem == ""
    assert "is cut off" in key_problem("\n".join(key.read_text().splitlines()[:-1]))


@pytest.mark.parametrize("text", ["", "hello", "ssh-ed25519 AAAA me@here"])
def test_what_is_no_key(text: str) -> None:
    assert key_problem(text).startswith("is no private key")


def test_key_that_is_damaged() -> None:
    lines = "-----BEGIN OPENSSH PRIVATE KEY-----\n{}\n-----END OPENSSH PRIVATE KEY-----\n"
    assert "not base64" in key_problem(lines.format("???"))
    assert "damaged" in key_problem(lines.format("AAAA"))
