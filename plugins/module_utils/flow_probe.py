# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Try network flows from where this runs: name, TCP, TLS, protocol. Standard library only; nothing is changed anywhere."""

from __future__ import annotations

import base64
import binascii
import contextlib
import datetime
import errno
import functools
import http.client
import ipaddress
import os
import queue
import socket
import ssl
import struct
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

PROTOCOLS = ("tcp", "ssh", "tls", "http", "https", "mysql", "kafka")
# What a flow can come to. The first is success, the second group got as far as a TCP connection.
OPEN = "open"
ANSWERED = (OPEN, "tls", "protocol")
CLOSED = ("refused", "timeout", "unreachable")
OUTCOMES = (*ANSWERED, *CLOSED, "dns_failed", "dns_wrong", "not_tried")
WORKERS = 64
PAUSE = 0.3  # before the second try
# A Python that brings its own OpenSSL may not know where the system keeps its authorities.
BUNDLES = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem")
_VERIFY_EXPIRED, _VERIFY_NOT_YET, _VERIFY_NAMES = 10, 9, (62, 64)


class Failed(Exception):
    """The flow ended with this outcome."""

    def __init__(self, outcome: str, detail: str) -> None:
        super().__init__(detail)
        self.outcome = outcome
        self.detail = detail


class Clock:
    """What is left of a flow's time."""

    def __init__(self, seconds: float) -> None:
        self.started = time.monotonic()
        self.end = self.started + seconds

    def left(self) -> float:
        """Seconds until the end, never zero: a socket would take that for "do not wait"."""
        return max(self.end - time.monotonic(), 0.001)

    def milliseconds(self) -> float:
        """Time since the beginning."""
        return round((time.monotonic() - self.started) * 1000, 1)


def resolve(host: str, port: int, within: Sequence[str]) -> list[str]:
    """Addresses of a name, IPv4 ones first; none outside the networks in which it must be."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise Failed("dns_failed", f"{host} does not resolve: {_text(error)}") from error
    addresses = []
    for family in (socket.AF_INET, socket.AF_INET6):
        for entry in found:
            if entry[0] == family and str(entry[4][0]) not in addresses:
                addresses.append(str(entry[4][0]))
    if within:
        networks = [ipaddress.ip_network(network) for network in within]
        strangers = [one for one in addresses if not any(ipaddress.ip_address(one) in network for network in networks)]
        if strangers or not addresses:
            # Whoever has that address is no part of the platform: it is not asked anything.
            raise Failed(
                "dns_wrong", f"{host} is {', '.join(addresses)}, not in {', '.join(within)}: nothing was sent there"
            )
    return addresses


def _text(error: BaseException) -> str:
    """An error in a few words."""
    if isinstance(error, OSError) and error.strerror:
        return str(error.strerror)
    return " ".join(str(error).split()) or type(error).__name__


def connect(addresses: Sequence[str], port: int, clock: Clock) -> socket.socket:
    """A connection to the first address that takes one."""
    outcome = Failed("unreachable", "no address")
    for number, address in enumerate(addresses):
        share = clock.left() / (len(addresses) - number)
        try:
            return socket.create_connection((address, port), timeout=share)
        except OSError as error:
            outcome = Failed(closed_by(error), f"{address}: {_text(error)}")
    raise outcome


def closed_by(error: OSError) -> str:
    """The outcome that an error of connect() stands for."""
    if isinstance(error, TimeoutError) or error.errno == errno.ETIMEDOUT:
        return "timeout"
    if isinstance(error, ConnectionError):
        return "refused"
    return "unreachable"


@functools.lru_cache(maxsize=32)
def trust(authority: str) -> ssl.SSLContext:
    """A context that trusts this authority alone (PEM, or base64 of it as EKS writes it), or those of the system."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if not authority:
        bundle = next((path for path in BUNDLES if os.path.isfile(path)), "")
        if bundle:
            context.load_verify_locations(cafile=bundle)
        else:
            context.load_default_certs()
        return context
    text = authority
    if "-----BEGIN" not in authority:
        try:
            text = base64.b64decode(authority, validate=True).decode("ascii")
        except (binascii.Error, ValueError) as error:
            raise Failed("tls", f"the authority to trust is neither PEM nor base64 of it ({_text(error)})") from error
    try:
        context.load_verify_locations(cadata=text)
    except (ssl.SSLError, ValueError) as error:
        raise Failed("tls", f"the authority to trust cannot be read: {_text(error)}") from error
    return context


def secure(plain: socket.socket, flow: Mapping[str, Any], clock: Clock) -> tuple[ssl.SSLSocket, int]:
    """The connection under TLS and the days that its certificate has left; everything that is wrong with it is an outcome."""
    context = trust(flow.get("certificate_authority") or "")
    name = flow.get("server_name") or flow["host"]
    plain.settimeout(clock.left())
    address = plain.getpeername()
    try:
        secured = context.wrap_socket(plain, server_hostname=name)
    except ssl.SSLCertVerificationError as error:
        raise Failed("tls", _certificate_problem(error, name, certificate_at(address, name, clock))) from error
    except (TimeoutError, socket.timeout) as error:
        raise Failed("tls", "the port is open, but no TLS handshake came in time") from error
    except (ssl.SSLError, OSError) as error:
        raise Failed("tls", f"the port is open, but speaks no TLS: {_text(error)}") from error
    certificate = secured.getpeercert() or {}
    left = days_left(str(certificate["notAfter"])) if "notAfter" in certificate else 0
    if left < int(flow.get("days") or 0):
        secured.close()
        raise Failed(
            "tls", f"the certificate expires in {left} days ({certificate.get('notAfter')}), less than {flow['days']}"
        )
    return secured, left


def days_left(not_after: str) -> int:
    """Whole days until the end of a certificate, as ssl writes it."""
    end = datetime.datetime.fromtimestamp(ssl.cert_time_to_seconds(not_after), datetime.timezone.utc)
    return (end - datetime.datetime.now(datetime.timezone.utc)).days


def _certificate_problem(error: ssl.SSLCertVerificationError, name: str, found: Mapping[str, Any]) -> str:
    issuer = _name(found, "issuer")
    by = f" (issued by {issuer})" if issuer else ""
    if error.verify_code == _VERIFY_EXPIRED:
        return f"the certificate has expired: {found.get('notAfter', 'at a date that cannot be read')}{by}"
    if error.verify_code == _VERIFY_NOT_YET:
        return f"the certificate is not valid yet: from {found.get('notBefore', '?')}; is this host's clock right?"
    if error.verify_code in _VERIFY_NAMES:
        names = (
            ", ".join(value for _kind, value in found.get("subjectAltName", ())) or _name(found, "subject") or "others"
        )
        return f"the certificate is for {names}, not for {name}{by}"
    return f"the certificate is not trusted: {error.verify_message}{by}"


def _name(certificate: Mapping[str, Any], part: str) -> str:
    entries = {key: value for group in certificate.get(part, ()) for key, value in group}
    return str(entries.get("commonName") or entries.get("organizationName") or "")


def certificate_at(address: Any, name: str, clock: Clock) -> dict[str, Any]:
    """What a server's certificate says, without trusting it; empty where it cannot be had."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    decode = getattr(getattr(ssl, "_ssl", None), "_test_decode_cert", None)
    if decode is None:
        return {}
    with contextlib.suppress(OSError, ValueError):
        plain = socket.create_connection(address[:2], timeout=clock.left())
        with plain, context.wrap_socket(plain, server_hostname=name) as secured:
            raw = secured.getpeercert(binary_form=True)
        with tempfile.NamedTemporaryFile("w", suffix=".pem") as file:
            file.write(ssl.DER_cert_to_PEM_cert(raw or b""))
            file.flush()
            return dict(decode(file.name))
    return {}


def receive(connection: socket.socket, count: int, clock: Clock) -> bytes:
    """Exactly so many bytes."""
    data = b""
    while len(data) < count:
        connection.settimeout(clock.left())
        part = connection.recv(count - len(data))
        if not part:
            raise Failed("protocol", "the port is open, but the connection was closed before an answer")
        data += part
    return data


def speak_ssh(connection: socket.socket, flow: Mapping[str, Any], clock: Clock) -> str:
    """The banner of an SSH daemon."""
    banner = b""
    while not banner.endswith(b"\n") and len(banner) < 255:
        banner += receive(connection, 1, clock)
    if not banner.startswith(b"SSH-"):
        raise Failed("protocol", f"the port is open, but is no SSH daemon: it says {_shown(banner)}")
    return _shown(banner)


def speak_http(connection: socket.socket, flow: Mapping[str, Any], clock: Clock) -> str:
    """The status of a page."""
    path = flow.get("path") or "/"
    client = http.client.HTTPConnection(flow.get("server_name") or flow["host"], flow["port"])
    connection.settimeout(clock.left())
    client.sock = connection
    try:
        client.request("GET", path, headers={"Connection": "close", "User-Agent": "nemo-verify", "Accept": "*/*"})
        answer = client.getresponse()
        body = answer.read(200)
    except http.client.HTTPException as error:
        raise Failed(
            "protocol", f"the port is open, but speaks no HTTP: {_text(error) or type(error).__name__}"
        ) from error
    wanted = [int(status) for status in flow.get("status") or ()]
    if wanted and answer.status not in wanted:
        allowed = " or ".join(map(str, wanted))
        raise Failed("protocol", f"{path} answers {answer.status}, not {allowed}: {_shown(body)}")
    return f"HTTP {answer.status}"


def speak_mysql(connection: socket.socket, flow: Mapping[str, Any], clock: Clock) -> str:
    """The server's greeting; the login that follows is refused, and is there because of max_connect_errors.

    A connection that ends within the handshake counts as an error of its host, and after a hundred of these MySQL blocks
    the host (manual, "Host Cache"). A refused login does not count.
    """
    _number, greeting = _mysql_packet(connection, clock)
    if greeting[:1] == b"\xff":
        code = int.from_bytes(greeting[1:3], "little")
        raise Failed("protocol", f"MySQL answers error {code}: {_shown(greeting[3:])}")
    if greeting[:1] != b"\x0a":
        raise Failed("protocol", f"the port is open, but is no MySQL: it says {_shown(greeting)}")
    version = greeting[1:].split(b"\0")[0]
    with contextlib.suppress(OSError, Failed):
        # protocol 4.1, secure connection, plugin authentication
        login = struct.pack("<IIB23x", 0x0008_8200, 1 << 24, 45) + b"nemo_verify\0" + b"\0" + b"mysql_native_password\0"
        connection.sendall(len(login).to_bytes(3, "little") + b"\x01" + login)
        for _turn in range(3):
            number, packet = _mysql_packet(connection, clock)
            if packet[:1] in (b"\xff", b"\x00"):
                break
            connection.sendall(b"\0\0\0" + bytes([(number + 1) % 256]))  # no password, whatever the method
    return f"MySQL {_shown(version)}"


def _mysql_packet(connection: socket.socket, clock: Clock) -> tuple[int, bytes]:
    head = receive(connection, 4, clock)
    size = int.from_bytes(head[:3], "little")
    if not 0 < size <= 65536:
        raise Failed("protocol", f"the port is open, but is no MySQL: it says {_shown(head)}")
    return head[3], receive(connection, size, clock)


def speak_kafka(connection: socket.socket, flow: Mapping[str, Any], clock: Clock) -> str:
    """The answer to ApiVersions, the question that a broker takes before any login."""
    identity = 0x6E65_6D6F
    client = b"nemo-verify"
    request = struct.pack(">hhih", 18, 0, identity, len(client)) + client
    connection.sendall(struct.pack(">i", len(request)) + request)
    size, answered = struct.unpack(">ii", receive(connection, 8, clock))
    if answered != identity or not 6 <= size <= 65536:
        raise Failed("protocol", "the port is open, but is no Kafka broker (or wants TLS)")
    error, count = struct.unpack(">hi", receive(connection, size - 4, clock)[:6].ljust(6, b"\0"))
    if error:
        raise Failed("protocol", f"the Kafka broker answers error {error}")
    return f"Kafka, {count} requests known"


def _shown(data: bytes) -> str:
    """Bytes of a stranger, fit to be printed."""
    text = data.decode("utf-8", "replace").strip()[:80]
    return "".join(character if character.isprintable() else "." for character in text) or "nothing"


SPEAK = {"ssh": speak_ssh, "http": speak_http, "https": speak_http, "mysql": speak_mysql, "kafka": speak_kafka}


def attempt(flow: Mapping[str, Any], timeout: float, progress: dict[str, Any]) -> dict[str, Any]:
    """One try of a flow. A flow that must be closed is not spoken to: a connection says enough."""
    clock = Clock(timeout)
    result: dict[str, Any] = {"addresses": [], "connect_ms": None, "days": None}
    protocol = flow["protocol"] if flow.get("expect", OPEN) == OPEN else "tcp"
    connection: socket.socket | None = None
    try:
        progress["stage"] = "dns_failed"
        result["addresses"] = resolve(flow["host"], flow["port"], flow.get("within") or ())
        progress["stage"] = "timeout"
        clock = Clock(timeout)  # a slow resolver does not make a port look closed
        connection = connect(result["addresses"], flow["port"], clock)
        result["connect_ms"] = clock.milliseconds()
        detail = "connected"
        progress["stage"] = "protocol"
        try:
            if protocol in ("tls", "https"):
                connection, result["days"] = secure(connection, flow, clock)
                detail = "TLS"
            if protocol in SPEAK:
                detail = SPEAK[protocol](connection, flow, clock)
        except (TimeoutError, socket.timeout) as error:
            raise Failed(
                "protocol", f"the port is open, but nothing answers {protocol} within {timeout:g} s"
            ) from error
        except OSError as error:
            raise Failed("protocol", f"the port is open, but the connection broke: {_text(error)}") from error
        if result["days"] is not None:
            detail += f", certificate for {result['days']} days"
        result.update(outcome=OPEN, detail=detail)
    except Failed as failed:
        result.update(outcome=failed.outcome, detail=failed.detail)
    finally:
        if connection is not None:
            connection.close()
    result["ms"] = clock.milliseconds()
    return result


def probe(flow: Mapping[str, Any], timeout: float, retries: int, progress: dict[str, Any]) -> dict[str, Any]:
    """Try a flow; one that must work and does not gets another chance."""
    for number in range(retries + 1):
        result = attempt(flow, timeout, progress)
        result["attempts"] = number + 1
        if result["outcome"] == OPEN or flow.get("expect", OPEN) != OPEN or result["outcome"] == "dns_wrong":
            break
        if number < retries:
            time.sleep(PAUSE)
    return result


def probe_all(flows: Sequence[Mapping[str, Any]], timeout: float, total: float, retries: int) -> list[dict[str, Any]]:
    """Try all flows at once; what has no result when the total time is over is reported with the stage that it hangs in."""
    work: queue.SimpleQueue[int] = queue.SimpleQueue()
    results: dict[int, dict[str, Any]] = {}
    progress: list[dict[str, Any]] = [{"stage": "not_tried"} for _flow in flows]
    done: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in range(len(flows)):
        work.put(number)

    def worker() -> None:
        while True:
            try:
                number = work.get_nowait()
            except queue.Empty:
                return
            try:
                results[number] = probe(flows[number], timeout, retries, progress[number])
            except Exception as error:  # one flow's trouble must not cost the others their results
                results[number] = {"outcome": "not_tried", "detail": f"{type(error).__name__}: {_text(error)}"}
            done.put(number)

    # Reading a hundred authorities takes longer than many a handshake, and is no latency.
    for authority in {
        flow.get("certificate_authority") or "" for flow in flows if flow["protocol"] in ("tls", "https")
    }:
        with contextlib.suppress(Failed, OSError):
            trust(authority)
    deadline = time.monotonic() + total
    for _worker in range(min(WORKERS, len(flows))):
        # Daemons: one that hangs in the resolver does not keep the process.
        threading.Thread(target=worker, daemon=True).start()
    for _flow in flows:
        try:
            done.get(timeout=max(deadline - time.monotonic(), 0.001))
        except queue.Empty:
            break
    empty: dict[str, Any] = {"addresses": [], "connect_ms": None, "days": None, "ms": None, "attempts": 1}
    answers = []
    for number, flow in enumerate(flows):
        hung = {"outcome": progress[number]["stage"], "detail": f"no result within {total:g} s"}
        answers.append({"id": flow["id"], **empty, **results.get(number, hung)})
    return answers
