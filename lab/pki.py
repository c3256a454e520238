"""The lab's certificate authority, and the certificates of its servers."""

from __future__ import annotations

import datetime
import ipaddress
import pathlib
from collections.abc import Sequence

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

AUTHORITY = "nemo lab authority"
RENEW = datetime.timedelta(days=30)  # a certificate with less than this left is made anew
BACKDATE = datetime.timedelta(days=1)  # clocks differ


def authority(folder: pathlib.Path) -> pathlib.Path:
    """The authority's certificate (its key beside it, for the owner alone), made once."""
    certificate = folder / "ca.crt"
    if not _usable(certificate):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, AUTHORITY)])
        made = (
            _builder(name, name, key.public_key(), key.public_key(), datetime.timedelta(days=3650))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(certificates=True), critical=True)
            .sign(key, hashes.SHA256())
        )
        _write(certificate, made, key)
    return certificate


def server(folder: pathlib.Path, name: str, hosts: Sequence[str]) -> tuple[pathlib.Path, pathlib.Path]:
    """Certificate and key of a server that answers to these names and addresses, signed by the lab's authority."""
    root = authority(folder)
    certificate, key_file = folder / f"{name}.crt", folder / f"{name}.key"
    if not _usable(certificate, hosts, root):
        issuer = x509.load_pem_x509_certificate(root.read_bytes())
        issuer_key = serialization.load_pem_private_key(root.with_suffix(".key").read_bytes(), None)
        assert isinstance(issuer_key, ec.EllipticCurvePrivateKey)
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, hosts[0][:64])])
        made = (
            _builder(subject, issuer.subject, key.public_key(), issuer_key.public_key(), datetime.timedelta(days=397))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(x509.SubjectAlternativeName([_general_name(host) for host in hosts]), critical=False)
            .sign(issuer_key, hashes.SHA256())
        )
        _write(certificate, made, key)
    return certificate, key_file


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    issuer_key: ec.EllipticCurvePublicKey,
    lifetime: datetime.timedelta,
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATE)
        .not_valid_after(now - BACKDATE + lifetime)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key), critical=False)
    )


def _usage(*, certificates: bool) -> x509.KeyUsage:
    """An authority signs certificates and revocations, a server its handshakes; Python 3.13 insists."""
    return x509.KeyUsage(
        digital_signature=not certificates, key_cert_sign=certificates, crl_sign=certificates,
        content_commitment=False, key_encipherment=False, data_encipherment=False, key_agreement=False,
        encipher_only=False, decipher_only=False,
    )  # fmt: skip


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _usable(certificate: pathlib.Path, hosts: Sequence[str] = (), root: pathlib.Path | None = None) -> bool:
    """Whether the certificate is there with its key, lasts, names these hosts, and is this authority's."""
    if not (certificate.exists() and certificate.with_suffix(".key").exists()):
        return False
    found = x509.load_pem_x509_certificate(certificate.read_bytes())
    if found.not_valid_after_utc - datetime.datetime.now(datetime.UTC) < RENEW:
        return False
    if root:
        try:
            found.verify_directly_issued_by(x509.load_pem_x509_certificate(root.read_bytes()))
        except (ValueError, TypeError, InvalidSignature):  # of three kinds, all of which mean "no"
            return False
        names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        return list(names) == [_general_name(host) for host in hosts]
    return True


def _write(path: pathlib.Path, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
    """The certificate last: with it in place, the key is too."""
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public = certificate.public_bytes(serialization.Encoding.PEM)
    path.unlink(missing_ok=True)
    for target, data, mode in ((path.with_suffix(".key"), private, 0o600), (path, public, 0o644)):
        draft = target.with_suffix(target.suffix + ".new")
        draft.unlink(missing_ok=True)
        draft.touch(mode=mode)  # before there is anything to read in it
        draft.write_bytes(data)
        draft.replace(target)
