"""The lab's certificates, judged by the strictest client at hand: Python's ssl with every check on."""

from __future__ import annotations

import datetime
import pathlib
import ssl

import pytest

from lab import pki


def handshake(authority: pathlib.Path, certificate: pathlib.Path, key: pathlib.Path, name: str) -> None:
    """A TLS handshake in memory; raises what a client would."""
    client_context = ssl.create_default_context(cafile=str(authority))
    client_context.verify_flags |= ssl.VERIFY_X509_STRICT  # the default from Python 3.13 on
    server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_context.load_cert_chain(certificate, key)
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = client_context.wrap_bio(to_client, to_server, server_hostname=name)
    server = server_context.wrap_bio(to_server, to_client, server_side=True)
    done: set[ssl.SSLObject] = set()
    for _ in range(10):
        for side in (client, server):
            try:
                side.do_handshake()
                done.add(side)
            except ssl.SSLWantReadError:
                pass
    assert len(done) == 2


@pytest.mark.parametrize("name", ["api.example.com", "10.0.0.11", "ec2.region.example.com"])
def test_a_strict_client_trusts_every_name(tmp_path: pathlib.Path, name: str) -> None:
    certificate, key = pki.server(tmp_path, "a", ["api.example.com", "*.region.example.com", "10.0.0.11"])
    handshake(pki.authority(tmp_path), certificate, key, name)


def test_a_name_that_is_not_in_it_is_refused(tmp_path: pathlib.Path) -> None:
    certificate, key = pki.server(tmp_path, "a", ["api.example.com"])
    with pytest.raises(ssl.SSLCertVerificationError, match="match"):
        handshake(pki.authority(tmp_path), certificate, key, "other.example.com")


def test_the_second_call_changes_nothing(tmp_path: pathlib.Path) -> None:
    pki.server(tmp_path, "a", ["api.example.com"])
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    pki.server(tmp_path, "a", ["api.example.com"])
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_other_names_or_another_authority_make_a_new_one(tmp_path: pathlib.Path) -> None:
    first = pki.server(tmp_path, "a", ["api.example.com"])[0].read_bytes()
    second = pki.server(tmp_path, "a", ["api.example.com", "10.0.0.11"])[0].read_bytes()
    (tmp_path / "ca.crt").unlink()
    certificate, key = pki.server(tmp_path, "a", ["api.example.com", "10.0.0.11"])
    assert len({first, second, certificate.read_bytes()}) == 3
    handshake(pki.authority(tmp_path), certificate, key, "api.example.com")


def test_one_about_to_expire_is_renewed(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = pki.server(tmp_path, "a", ["api.example.com"])[0].read_bytes()
    monkeypatch.setattr(pki, "RENEW", datetime.timedelta(days=400))
    assert pki.server(tmp_path, "a", ["api.example.com"])[0].read_bytes() != first


def test_keys_are_for_their_owner_alone(tmp_path: pathlib.Path) -> None:
    pki.server(tmp_path / "pki", "a", ["api.example.com"])
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "pki").glob("*.key")}
    assert modes == {"ca.key": 0o600, "a.key": 0o600}
