"""Flows tried for real, against sockets of this test on loopback."""

from __future__ import annotations

import base64
import contextlib
import datetime
import re
import socket
import socketserver
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from ansible_collections.nemo.platform.plugins.module_utils import flow_probe

Talk = Callable[[Any], None]
NAME = "api.example"


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True


@pytest.fixture
def serve() -> Iterator[Callable[..., int]]:
    """Listen on a port of loopback and talk to whoever connects; returns the port."""
    with contextlib.ExitStack() as stack:

        def start(talk: Talk, certificate: Path | None = None) -> int:
            context = None
            if certificate:
                context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                context.load_cert_chain(certificate)

            class Handler(socketserver.BaseRequestHandler):
                def handle(self) -> None:
                    with contextlib.suppress(OSError):
                        connection = self.request
                        if context:
                            connection = context.wrap_socket(connection, server_side=True)
                        talk(connection)
                        connection.close()

            server = stack.enter_context(_Server(("127.0.0.1", 0), Handler))
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
            stack.callback(server.shutdown)
            return int(server.server_address[1])

        yield start


def nothing_listens() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextlib.contextmanager
def black_hole() -> Iterator[int]:
    """A port that answers nobody: its queue is full and never emptied."""
    with socket.socket() as full, contextlib.ExitStack() as stack:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for _ in range(4):
            one = stack.enter_context(socket.socket())
            one.setblocking(False)
            one.connect_ex(full.getsockname())
        yield int(full.getsockname()[1])


def tried(port: int, protocol: str = "tcp", timeout: float = 2, retries: int = 0, **more: Any) -> dict[str, Any]:
    flow = {"id": "one", "host": "127.0.0.1", "port": port, "protocol": protocol, **more}
    (result,) = flow_probe.probe_all([flow], timeout, 20, retries)
    assert result["outcome"] in flow_probe.OUTCOMES
    return result


class Authority:
    """Makes certificates, good and bad ones."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test authority")])
        self.certificate = self._make(self.name, self.key, -1, 10, x509.BasicConstraints(ca=True, path_length=0))

    def _make(self, name: x509.Name, key: Any, first: float, last: float, *extensions: Any) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateBuilder().subject_name(name).issuer_name(self.name).public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + datetime.timedelta(days=first)).not_valid_after(now + datetime.timedelta(days=last))
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), False)
        )  # fmt: skip
        for extension in extensions:
            builder = builder.add_extension(extension, isinstance(extension, x509.BasicConstraints))
        usage = x509.KeyUsage(True, False, False, False, False, name == self.name, name == self.name, False, False)
        return builder.add_extension(usage, True).sign(self.key, hashes.SHA256())

    @property
    def pem(self) -> str:
        return self.certificate.public_bytes(serialization.Encoding.PEM).decode()

    def server(self, name: str = NAME, first: float = -2, last: float = 5.5) -> Path:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        made = self._make(subject, key, first, last, x509.SubjectAlternativeName([x509.DNSName(name)]))
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        path = self.folder / "server.pem"
        path.write_bytes(private + made.public_bytes(serialization.Encoding.PEM))
        return path


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


def silent(connection: Any) -> None:
    connection.recv(1)


def says(*parts: bytes) -> Talk:
    def talk(connection: Any) -> None:
        for part in parts:
            connection.sendall(part)
        with contextlib.suppress(OSError):
            connection.recv(4096)

    return talk


def page(status: int, body: bytes = b"", seen: list[bytes] | None = None) -> Talk:
    def talk(connection: Any) -> None:
        request = connection.recv(4096)
        if seen is not None:
            seen.append(request)
        connection.sendall(b"HTTP/1.1 %d Word\r\nContent-Length: %d\r\n\r\n%s" % (status, len(body), body))

    return talk


def test_open(serve):
    found = tried(serve(silent))
    assert (found["outcome"], found["attempts"], found["addresses"]) == ("open", 1, ["127.0.0.1"])
    assert 0 <= found["connect_ms"] <= found["ms"]


def test_refused_and_tried_again():
    found = tried(nothing_listens(), retries=1)
    assert (found["outcome"], found["attempts"], found["connect_ms"]) == ("refused", 2, None)
    assert found["detail"] == "127.0.0.1: Connection refused"


def test_what_must_be_closed_is_tried_once():
    assert tried(nothing_listens(), retries=3, expect="closed")["attempts"] == 1


def test_filtered():
    with black_hole() as port:
        started = time.monotonic()
        found = tried(port, timeout=0.5)
        assert found["outcome"] == "timeout"
        assert 0.4 < time.monotonic() - started < 2


def test_a_flaky_port_gets_its_second_chance(serve):
    turns: list[int] = []

    def talk(connection: Any) -> None:
        turns.append(1)
        if len(turns) > 1:
            connection.sendall(b"SSH-2.0-x\r\n")

    found = tried(serve(talk), "ssh", retries=1)
    assert (found["outcome"], found["attempts"]) == ("open", 2)


def test_unreachable(monkeypatch):
    def no_route(*_: Any, **__: Any) -> None:
        raise OSError(113, "No route to host")

    monkeypatch.setattr(socket, "create_connection", no_route)
    assert tried(1)["outcome"] == "unreachable"


def test_a_name_that_does_not_resolve(monkeypatch):
    def unknown(*_: Any, **__: Any) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    found = tried(1, host="nowhere.invalid")
    assert found["outcome"] == "dns_failed"
    assert found["detail"] == "nowhere.invalid does not resolve: Name or service not known"


def test_a_name_that_leads_elsewhere_is_not_asked(serve):
    asked: list[Any] = []
    found = tried(serve(asked.append), within=["10.0.0.0/16"], retries=1)
    assert (found["outcome"], found["attempts"]) == ("dns_wrong", 1)
    assert found["detail"] == "127.0.0.1 is 127.0.0.1, not in 10.0.0.0/16: nothing was sent there"
    time.sleep(0.2)
    assert asked == []
    assert tried(serve(silent), within=["10.0.0.0/16", "127.0.0.0/8"])["outcome"] == "open"


def test_the_second_address_is_tried_when_the_first_refuses(serve, monkeypatch):
    port = serve(silent)
    entries = [(socket.AF_INET, 1, 6, "", (address, port)) for address in ("127.0.0.2", "127.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: entries)
    real = socket.create_connection

    def connect(address: Any, **more: Any) -> Any:
        if address[0] == "127.0.0.2":
            raise ConnectionRefusedError(111, "Connection refused")
        return real(address, **more)

    monkeypatch.setattr(socket, "create_connection", connect)
    assert tried(port)["outcome"] == "open"


def test_a_resolver_that_hangs_costs_no_other_flow_its_result(serve, monkeypatch):
    real = socket.getaddrinfo
    release = threading.Event()

    def slow(host: str, *arguments: Any, **more: Any) -> Any:
        if host == "slow.invalid":
            release.wait(10)
        return real(host, *arguments, **more)

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    port = serve(silent)
    flows = [
        {"id": host, "host": host, "port": port, "protocol": "tcp", "expect": "open"}
        for host in ("slow.invalid", "127.0.0.1")
    ]
    started = time.monotonic()
    hung, fine = flow_probe.probe_all(flows, 0.5, 1, 0)
    release.set()
    assert time.monotonic() - started < 3
    assert (hung["outcome"], hung["detail"]) == ("dns_failed", "no result within 1 s")
    assert fine["outcome"] == "open"


def test_all_at_once():
    with black_hole() as port:
        flows = [
            {"id": str(number), "host": "127.0.0.1", "port": port, "protocol": "tcp", "expect": "closed"}
            for number in range(30)
        ]
        started = time.monotonic()
        found = flow_probe.probe_all(flows, 0.7, 20, 0)
        assert time.monotonic() - started < 3
    assert [one["id"] for one in found] == [str(number) for number in range(30)]
    assert {one["outcome"] for one in found} == {"timeout"}


def test_nothing_to_try():
    assert flow_probe.probe_all([], 1, 1, 0) == []


def test_an_error_of_ours_is_a_result(monkeypatch):
    monkeypatch.setattr(flow_probe, "attempt", lambda *_: 1 / 0)
    assert tried(1)["outcome"] == "not_tried"


class TestTls:
    def test_good(self, serve, authority):
        port = serve(silent, authority.server())
        found = tried(port, "tls", server_name=NAME, certificate_authority=authority.pem, days=5)
        assert (found["outcome"], found["days"]) == ("open", 5)
        assert found["detail"] == "TLS, certificate for 5 days"

    def test_authority_as_eks_gives_it(self, serve, authority):
        encoded = base64.b64encode(authority.pem.encode()).decode()
        found = tried(
            serve(page(200), authority.server()), "https", server_name=NAME, certificate_authority=encoded, status=[200]
        )
        assert (found["outcome"], found["detail"]) == ("open", "HTTP 200, certificate for 5 days")

    @pytest.mark.parametrize(
        ("certificate", "more", "says"),
        [
            ({"last": -1}, {}, r"the certificate has expired: \w{3} .* GMT \(issued by test authority\)"),
            ({"first": 1}, {}, r"the certificate is not valid yet: from \w{3} .*clock"),
            ({"name": "other.example"}, {}, r"the certificate is for other\.example, not for api\.example \(issued by"),
            ({}, {"certificate_authority": ""}, r"the certificate is not trusted: .*\(issued by test authority\)"),
            ({}, {"days": 6}, r"the certificate expires in 5 days \(.*\), less than 6"),
        ],
    )
    def test_bad(self, serve, authority, certificate, more, says):
        port = serve(silent, authority.server(**certificate))
        found = tried(port, "tls", **{"server_name": NAME, "certificate_authority": authority.pem, **more})
        assert found["outcome"] == "tls"
        assert re.fullmatch(f"{says}.*", found["detail"]), found["detail"]
        assert found["connect_ms"] is not None

    def test_no_tls_at_all(self, serve, authority):
        found = tried(serve(says(b"220 hello\r\n")), "tls", certificate_authority=authority.pem)
        assert found["outcome"] == "tls"
        assert "speaks no TLS" in found["detail"]

    def test_no_handshake(self, serve, authority):
        def wait(connection: Any) -> None:
            time.sleep(1.5)

        found = tried(serve(wait), "tls", timeout=0.5, certificate_authority=authority.pem)
        assert (found["outcome"], found["detail"]) == ("tls", "the port is open, but no TLS handshake came in time")

    @pytest.mark.parametrize(
        ("text", "says"), [("!", "neither PEM nor base64"), ("-----BEGIN CERTIFICATE-----", "cannot be read")]
    )
    def test_an_authority_that_is_none(self, serve, authority, text, says):
        found = tried(serve(silent, authority.server()), "tls", certificate_authority=text)
        assert found["outcome"] == "tls"
        assert says in found["detail"]


class TestHttp:
    def test_status(self, serve):
        seen: list[bytes] = []
        found = tried(serve(page(200, b"x", seen)), "http", path="/health", status=[200])
        assert (found["outcome"], found["detail"]) == ("open", "HTTP 200")
        assert seen[0].startswith(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1")

    def test_any_status_where_none_is_named(self, serve):
        assert tried(serve(page(404)), "http")["outcome"] == "open"

    def test_wrong_status(self, serve):
        found = tried(serve(page(503, b"cannot load\x1b[31m")), "http", path="/health", status=[200, 204])
        assert found["outcome"] == "protocol"
        assert found["detail"] == "/health answers 503, not 200 or 204: cannot load.[31m"

    @pytest.mark.parametrize("answer", [b"SSH-2.0-x\r\n", b""])
    def test_no_http(self, serve, answer):
        def talk(connection: Any) -> None:
            connection.recv(4096)
            connection.sendall(answer)

        assert tried(serve(talk), "http")["outcome"] == "protocol"

    def test_silence(self, serve):
        def talk(connection: Any) -> None:
            time.sleep(1.5)

        found = tried(serve(talk), "http", timeout=0.4)
        assert found["outcome"] == "protocol"
        assert found["detail"] == "the port is open, but nothing answers http within 0.4 s"

    def test_what_must_be_closed_is_not_spoken_to(self, serve):
        seen: list[bytes] = []
        assert tried(serve(page(503, b"", seen)), "http", status=[200], expect="closed")["outcome"] == "open"
        assert [request for request in seen if request] == []


class TestSsh:
    def test_banner(self, serve):
        assert tried(serve(says(b"SSH-2.0-", b"OpenSSH_9\r\n")), "ssh")["detail"] == "SSH-2.0-OpenSSH_9"

    def test_something_else(self, serve):
        found = tried(serve(says(b"220 mail\r\n")), "ssh")
        assert (found["outcome"], "220 mail" in found["detail"]) == ("protocol", True)

    def test_closed_at_once(self, serve):
        assert tried(serve(lambda _: None), "ssh")["outcome"] == "protocol"


def mysql_packet(number: int, body: bytes) -> bytes:
    return len(body).to_bytes(3, "little") + bytes([number]) + body


GREETING = (
    b"\x0a8.0.42\0" + bytes(4) + b"saltsalt\0" + b"\xff\xf7\xff\x02\0\xff\xdf\x15" + bytes(10) + b"saltsaltsalt\0"
)


class TestMysql:
    def test_greeting_and_a_login_that_ends(self, serve):
        """Unless the handshake ends in an answer, MySQL counts an error for this host and one day blocks it."""
        heard: list[bytes] = []

        def talk(connection: Any) -> None:
            connection.sendall(mysql_packet(0, GREETING))
            login = connection.recv(4096)
            connection.sendall(mysql_packet(2, b"\xfecaching_sha2_password\0saltsalt"))
            heard.extend([login, connection.recv(4096)])
            connection.sendall(mysql_packet(4, b"\xff\x15\x04#28000Access denied"))
            heard.append(connection.recv(1))

        found = tried(serve(talk), "mysql")
        assert (found["outcome"], found["detail"]) == ("open", "MySQL 8.0.42")
        deadline = time.monotonic() + 2
        while len(heard) < 3 and time.monotonic() < deadline:
            time.sleep(0.02)
        login, empty, end = heard
        assert login[:4] == (len(login) - 4).to_bytes(3, "little") + b"\x01"
        assert b"nemo_verify\0\0mysql_native_password\0" in login
        assert (empty, end) == (b"\0\0\0\x03", b"")

    def test_error(self, serve):
        packet = mysql_packet(0, b"\xff\x69\x04Host '10.0.3.11' is blocked")
        found = tried(serve(says(packet)), "mysql")
        assert (found["outcome"], found["detail"]) == (
            "protocol",
            "MySQL answers error 1129: Host '10.0.3.11' is blocked",
        )

    @pytest.mark.parametrize("answer", [b"SSH-2.0-OpenSSH\r\n", mysql_packet(0, b"\x09old"), b"\0\0\0\0"])
    def test_something_else(self, serve, answer):
        assert tried(serve(says(answer)), "mysql")["outcome"] == "protocol"

    def test_the_connection_ends_after_the_greeting(self, serve):
        def talk(connection: Any) -> None:
            connection.sendall(mysql_packet(0, GREETING))

        assert tried(serve(talk), "mysql")["outcome"] == "open"


class TestKafka:
    @staticmethod
    def broker(error: int = 0, shift: int = 0) -> Talk:
        def talk(connection: Any) -> None:
            request = connection.recv(4096)
            size, key, version, identity = struct.unpack(">ihhi", request[:12])
            assert (size, key, version) == (len(request) - 4, 18, 0)
            body = struct.pack(">ihi", identity + shift, error, 1) + struct.pack(">hhh", 18, 0, 3)
            connection.sendall(struct.pack(">i", len(body)) + body)

        return talk

    def test_broker(self, serve):
        found = tried(serve(self.broker()), "kafka")
        assert (found["outcome"], found["detail"]) == ("open", "Kafka, 1 requests known")

    def test_error(self, serve):
        assert tried(serve(self.broker(error=35)), "kafka")["detail"] == "the Kafka broker answers error 35"

    @pytest.mark.parametrize("talk", [broker(shift=1), page(400), says(b"\x15\x03\x03\0\x02\x02\x46\0")])
    def test_something_else(self, serve, talk):
        assert tried(serve(talk), "kafka")["outcome"] == "protocol"
