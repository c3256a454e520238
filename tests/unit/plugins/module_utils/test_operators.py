# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Keys and lists of operators: what is refused, by which words, and what ssh-keygen says of the same keys."""

from __future__ import annotations

import base64
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest

from ansible_collections.nemo.platform.plugins.module_utils import preflight
from ansible_collections.nemo.platform.plugins.module_utils.operators import KeyProblem, parse_key, problems


def blob(*fields: bytes) -> str:
    return base64.b64encode(b"".join(struct.pack(">I", len(field)) + field for field in fields)).decode()


def ed25519(seed: int = 1) -> str:
    return f"ssh-ed25519 {blob(b'ssh-ed25519', bytes([seed]) * 32)}"


def rsa(bits: int) -> str:
    number = (1 << (bits - 1)) | 1
    return f"ssh-rsa {blob(b'ssh-rsa', bytes([1, 0, 1]), b'\0' + number.to_bytes(bits // 8, 'big'))}"


CURVE = blob(b"ecdsa-sha2-nistp256", b"nistp256", b"\4" + bytes(64))
SK = blob(b"sk-ssh-ed25519@openssh.com", bytes(32), b"ssh:")


@pytest.mark.parametrize(("kind", "bits"), [("ed25519", 256), ("ecdsa", 384), ("rsa", 3072)])
def test_says_of_a_key_what_ssh_keygen_says(tmp_path: Path, kind: str, bits: int) -> None:
    path = tmp_path / "key"
    size = [] if kind == "ed25519" else ["-b", str(bits)]
    subprocess.run(["ssh-keygen", "-q", "-t", kind, *size, "-N", "", "-C", "a b", "-f", path], check=True)
    said = subprocess.run(["ssh-keygen", "-l", "-f", path], check=True, capture_output=True, text=True).stdout.split()
    key = parse_key(path.with_suffix(".pub").read_text())
    assert [str(key.bits), key.fingerprint] == said[:2]
    assert key.comment == "a b"
    assert "a b" not in key.line


@pytest.mark.parametrize(
    "text",
    [
        ed25519(),
        rsa(3072),
        f"ecdsa-sha2-nistp256 {CURVE}",
        f"sk-ssh-ed25519@openssh.com {SK}",
        f"restrict {ed25519()}",
        f'from="10.0.0.0/8,*.example.com",no-pty {ed25519()} comment',
    ],
)
def test_takes(text: str) -> None:
    assert parse_key(text).line == " ".join(text.removesuffix(" comment").split())


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "empty"),
        (None, "no text"),
        (5, "no text"),
        ("hello world", "no public key"),
        ("ssh-ed25519", "damaged"),
        ("ssh-ed25519 AAAA", "damaged"),
        (ed25519()[:-8], "damaged"),
        (f"ssh-ed25519 {blob(b'ssh-ed25519', bytes(31))}", "damaged"),
        (f"ssh-ed25519 {CURVE}", "disagree"),
        (f"ssh-rsa {ed25519().split()[1]}", "disagree"),
        (f"ecdsa-sha2-nistp384 {blob(b'ecdsa-sha2-nistp384', b'nistp256', bytes(65))}", "damaged"),
        (rsa(2048), "RSA key of 2048 bits"),
        ("ssh-dss AAAAB3NzaC1kc3M=", "DSA"),
        (f"ssh-ed25519-cert-v01@openssh.com {SK}", "certificate"),
        ("-----BEGIN OPENSSH PRIVATE KEY-----\nabc", "private key"),
        (f"{ed25519()}\n{ed25519(2)}", "more than one line"),
        (f'command="/bin/sh" {ed25519()}', "option command"),
        (f'environment="LD_PRELOAD=x" {ed25519()}', "option environment"),
        (f"cert-authority {ed25519()}", "option cert-authority"),
        (f'restrict,permitopen="*:*" {ed25519()}', "option permitopen"),
        (f"restrict,port-forwarding {ed25519()}", "option port-forwarding"),
        (f'from="a b" {ed25519()}', "names no addresses"),
        (f"from {ed25519()}", "no public key"),
    ],
)
def test_refuses(text: Any, says: str) -> None:
    with pytest.raises(KeyProblem, match=says) as caught:
        parse_key(text)
    assert "AAAA" not in str(caught.value)


def operator(name: Any = "ada", *keys: Any, **more: Any) -> dict[str, Any]:
    return {"name": name, "keys": list(keys) or [ed25519()], **more}


def said(*entries: Any, **options: Any) -> str:
    return "\n".join(": ".join(finding) for finding in problems(list(entries), ["ec2-user"], **options))


def test_nothing_to_say() -> None:
    assert said(operator(), operator("bob_2-x", ed25519(2), ed25519(3), sudo=True)) == ""
    assert said(allow_empty=True) == ""
    assert said(operator("ada", rsa(2048)), rsa_bits=2048) == ""


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ([], "nobody could log in"),
        (["ada"], "entry 1 is no operator"),
        ([operator("Ada")], "name of entry 1 is 'Ada'"),
        ([operator("a" * 32)], "name of entry 1"),
        ([operator("../ada")], "name of entry 1"),
        ([operator("ada\n")], "name of entry 1"),
        ([operator(None)], "name of entry 1 is None"),
        ([operator("root")], "root is the name of another account"),
        ([operator("ec2-user")], "ec2-user is the name of another account"),
        ([operator(), operator("ada", ed25519(2))], "ada is there twice"),
        ([operator(), operator("bob")], "ada and bob have the same key SHA256:"),
        ([operator("ada", ed25519(), ed25519())], "ada has the key SHA256:.* twice"),
        ([{"name": "ada"}], "ada has no list of keys"),
        ([{"name": "ada", "keys": []}], "ada has no list of keys"),
        ([{"name": "ada", "keys": ed25519()}], "ada has no list of keys"),
        ([operator(sudo="yes")], "sudo of ada is 'yes'"),
        ([operator(groups=["docker"])], "ada has groups"),
        ([operator("ada", ed25519(), rsa(1024))], "key 2 of ada is refused: it is an RSA key of 1024 bits"),
    ],
)
def test_finds(entries: list[Any], says: str) -> None:
    found = problems(entries, ["ec2-user"])
    assert len(found) == 1
    with pytest.raises(AssertionError, match=says):
        raise AssertionError(found[0].what)


def test_no_list() -> None:
    assert [finding.what for finding in problems({"name": "ada"})] == ["it is no list"]


def test_the_preflight_asks() -> None:
    host = preflight.Host("b", "bastion", (), "b", "i-1", "r", "10.0.1.10")
    variables: dict[str, Any] = {**dict.fromkeys(preflight.REQUIRED_VARIABLES, "set"), "nemo_ssh_user": "ec2-user"}
    variables["nemo_services"] = True
    for listed, wrong in (
        ([operator()], []),
        ([operator("ec2-user")], ["nemo_operators: ec2-user is the name of another account"]),
    ):
        inventory = preflight.Inventory((host,), {}, {**variables, "nemo_region": "r", "nemo_operators": listed})
        assert [problem.what for problem in preflight.problems(inventory)] == wrong
