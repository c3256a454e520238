"""The lab's AWS: moto's API over HTTP and HTTPS, and the instance metadata service.

Runs inside the container nemo-lab-aws, under its Python 3.11, with moto from /opt/nemo-lab/site.
"""

from __future__ import annotations

import base64
import contextlib
import datetime
import http.server
import json
import os
import pathlib
import secrets
import socket
import ssl
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterable
from typing import Any

from lab.settings import ACCOUNT, AWS_API, CLUSTER, CLUSTER_NAME, IMDS, REGION

FOLDER = pathlib.Path("/opt/nemo-lab")
AUTHORITY = pathlib.Path("/usr/local/share/ca-certificates/nemo-lab.crt")
EXPIRED = pathlib.Path("/run/nemo-lab/expired-token")  # where this file is, every call finds its credentials expired

# Read by moto on import.
os.environ |= {
    "AWS_DEFAULT_REGION": REGION,
    "AWS_REGION": REGION,
    "AWS_ACCESS_KEY_ID": "lab",
    "AWS_SECRET_ACCESS_KEY": "lab",
    "MOTO_ACCOUNT_ID": ACCOUNT,
    "MOTO_AMIS_PATH": str(
        pathlib.Path(__file__).with_name("amis.json")
    ),  # the platform's own: the 2,000 that moto brings cost a second
    "MOTO_DISABLE_GLOBAL_CORS": "true",
}

from moto.core.responses import ActionResult  # noqa: E402
from moto.ec2.models import EC2Backend, ec2_backends  # noqa: E402
from moto.ec2.models.core import TaggedEC2Resource  # noqa: E402
from moto.ec2.models.instances import Instance  # noqa: E402
from moto.ec2.utils import EC2_PREFIX_TO_RESOURCE, get_prefix  # noqa: E402
from moto.ecr.responses import ECRResponse  # noqa: E402
from moto.eks.models import Cluster  # noqa: E402
from moto.iam.models import iam_backends  # noqa: E402
from moto.moto_server.werkzeug_app import (  # noqa: E402
    DomainDispatcherApplication,
    MotoRequestHandler,
    create_backend_app,
)
from moto.sts.models import sts_backends  # noqa: E402
from werkzeug.serving import BaseWSGIServer, make_server  # noqa: E402

Wsgi = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


def account() -> EC2Backend:
    """The EC2 half of the platform's account and region."""
    return ec2_backends[ACCOUNT][REGION]


# ---- what moto does differently from AWS, where it matters here


def _get_tags(self: Any) -> list[dict[str, str]]:
    """The tags of one resource, without reading those of all others: linear instead of quadratic in the instances."""
    tags = self.ec2_backend.tags.get(self.id, {})
    kind = EC2_PREFIX_TO_RESOURCE.get(get_prefix(self.id), "") if tags else ""
    return [{"resource_id": self.id, "key": key, "value": value, "resource_type": kind} for key, value in tags.items()]


def _get_authorization_token(self: ECRResponse) -> ActionResult:
    """A token lives for twelve hours from now; moto's ended in 2015."""
    answer = _moto_token(self)
    expiry = datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=12)
    for entry in answer.result["authorizationData"]:
        entry["expiresAt"] = expiry
    return answer


def _init_cluster(self: Cluster, name: str, *arguments: Any, **more: Any) -> None:
    """The platform's cluster is where the lab has it, with a certificate of the lab's authority; moto makes both up."""
    _moto_cluster(self, name, *arguments, **more)
    if name == CLUSTER:
        self.endpoint = f"https://{CLUSTER_NAME}"
        if AUTHORITY.exists():  # not where tests import this
            self.certificate_authority = {"data": base64.b64encode(AUTHORITY.read_bytes()).decode()}


_moto_cluster = Cluster.__init__
Cluster.__init__ = _init_cluster
_moto_token = ECRResponse.get_authorization_token
ECRResponse.get_authorization_token = _get_authorization_token
TaggedEC2Resource.get_tags = _get_tags


class ExpiredToken:
    """In front of moto: answers as AWS does to expired credentials, while a file says so."""

    MESSAGE = "The security token included in the request is expired"

    def __init__(self, application: Wsgi) -> None:
        self.application = application

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if not EXPIRED.exists() or "Credential=" not in environ.get("HTTP_AUTHORIZATION", ""):
            return self.application(environ, start_response)
        with contextlib.suppress(ValueError):  # the connection is kept: nothing of this request may stay in it
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        status, kind, body = self.answer(
            environ["HTTP_AUTHORIZATION"].split("Credential=")[1].split("/")[3], environ.get("CONTENT_TYPE", "")
        )
        headers = [("Content-Type", kind), ("Content-Length", str(len(body)))]
        if "x-amz" not in kind and "json" in kind:
            headers.append(("x-amzn-ErrorType", "ExpiredTokenException"))
        start_response(status, headers)
        return [body]

    def answer(self, service: str, content_type: str) -> tuple[str, str, bytes]:
        """Status, content type and body, in the protocol that the service speaks."""
        if service == "ec2":
            text = f"<Response><Errors><Error><Code>RequestExpired</Code><Message>{self.MESSAGE}</Message></Error>"
            return "400 Bad Request", "text/xml", f"{text}</Errors><RequestID>lab</RequestID></Response>".encode()
        if content_type.startswith("application/x-www-form-urlencoded"):
            text = (
                f"<ErrorResponse><Error><Type>Sender</Type><Code>ExpiredToken</Code><Message>{self.MESSAGE}</Message>"
            )
            return "403 Forbidden", "text/xml", f"{text}</Error><RequestId>lab</RequestId></ErrorResponse>".encode()
        body = json.dumps({"__type": "ExpiredTokenException", "message": self.MESSAGE}).encode()
        if content_type.startswith("application/x-amz-json"):
            return "400 Bad Request", "application/x-amz-json-1.1", body
        return "403 Forbidden", "application/json", body


# ---- instance metadata (IMDSv2 alone, as on Amazon Linux 2023)


def instance_at(address: str) -> Instance | None:
    """The running instance with this private address."""
    for instance in account().all_instances():
        if instance.private_ip == address and instance.state == "running":
            return instance
    return None


def role_of(instance: Instance) -> tuple[str, str] | None:
    """The name and the profile's ARN of the role that the instance runs with."""
    association = account().iam_instance_profile_associations.get(instance.id)
    if association is None or not association.iam_instance_profile.roles:
        return None
    return association.iam_instance_profile.roles[0].name, association.iam_instance_profile.arn


_credentials: dict[tuple[str, str], tuple[float, dict[str, str]]] = {}


def credentials(instance: Instance, role: str) -> dict[str, str]:
    """Six hours of the role's rights, known to moto's STS; the same ones until an hour before their end."""
    end, answer = _credentials.get((instance.id, role), (0.0, {}))
    if end - time.time() < 3600:
        end = time.time() + 6 * 3600
        arn = iam_backends[ACCOUNT]["aws"].get_role(role).arn
        key = sts_backends[ACCOUNT]["aws"].assume_role(REGION, instance.id, arn, "", 6 * 3600, "")
        answer = {
            "Code": "Success",
            "LastUpdated": _timestamp(time.time()),
            "Type": "AWS-HMAC",
            "AccessKeyId": key.access_key_id,
            "SecretAccessKey": key.secret_access_key,
            "Token": key.session_token,
            "Expiration": _timestamp(end),
        }
        _credentials[instance.id, role] = (end, answer)
    return answer


def _timestamp(moment: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(moment))


def metadata(instance: Instance) -> dict[str, Any]:
    """What /latest shows: folders as dictionaries, files as text."""
    zone = str(instance.placement.zone)
    mac = instance.nics[0].mac_address if instance.nics else "06:00:00:00:00:00"
    groups = "\n".join(group.name for group in instance.dynamic_group_list)
    public = {"public-ipv4": instance.public_ip} if instance.public_ip else {}
    tree: dict[str, Any] = {
        "ami-id": instance.image_id,
        "hostname": instance.private_dns_name,
        "instance-id": instance.id,
        "instance-life-cycle": "on-demand",
        "instance-type": instance.instance_type,
        "local-hostname": instance.private_dns_name,
        "local-ipv4": instance.private_ip,
        "mac": mac,
        "network": {
            "interfaces": {
                "macs": {
                    mac: {
                        "local-ipv4s": instance.private_ip,
                        "mac": mac,
                        "owner-id": ACCOUNT,
                        "security-groups": groups,
                        "subnet-id": instance.subnet_id,
                        "vpc-id": instance.vpc_id,
                    }
                }
            }
        },
        "placement": {"availability-zone": zone, "region": REGION},
        "security-groups": groups,
        "services": {"domain": "amazonaws.com", "partition": "aws"},
        **public,
    }
    role = role_of(instance)
    if role:
        name, arn = role
        info = {"Code": "Success", "LastUpdated": _timestamp(time.time()), "InstanceProfileArn": arn}
        tree["iam"] = {
            "info": json.dumps(info, indent=2),
            "security-credentials": {name: json.dumps(credentials(instance, name), indent=2)},
        }
    document = {
        "accountId": ACCOUNT,
        "architecture": instance.architecture,
        "availabilityZone": zone,
        "imageId": instance.image_id,
        "instanceId": instance.id,
        "instanceType": instance.instance_type,
        "pendingTime": instance.launch_time.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "privateIp": instance.private_ip,
        "region": REGION,
        "version": "2017-09-30",
    }
    return {"meta-data": tree, "dynamic": {"instance-identity": {"document": json.dumps(document, indent=2)}}}


def find(tree: dict[str, Any], path: str) -> str | None:
    """The file at a path, or the listing of a folder; nothing where there is neither."""
    node: Any = tree
    for name in filter(None, path.split("/")):
        if not isinstance(node, dict) or name not in node:
            return None
        node = node[name]
    if isinstance(node, dict):
        # A role's name is listed without the slash of a folder, and so is every file.
        return "\n".join(f"{name}/" if isinstance(child, dict) else name for name, child in node.items())
    return str(node)


class Metadata(http.server.BaseHTTPRequestHandler):
    """http://169.254.169.254 for every instance that asks, known by its address."""

    protocol_version = "HTTP/1.1"
    server_version = "EC2ws"
    sys_version = ""
    timeout = 60
    HEADER = "X-aws-ec2-metadata-token"
    tokens: dict[str, tuple[float, str]] = {}  # noqa: RUF012 - shared by all requests on purpose
    lock = threading.Lock()

    def do_PUT(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        self.rfile.read(length)
        if urllib.parse.urlsplit(self.path).path != "/latest/api/token":
            return self.answer(404)
        if "X-Forwarded-For" in self.headers:  # as AWS: a token is not for whoever stands behind a proxy
            return self.answer(403)
        ttl = self.headers.get(f"{self.HEADER}-ttl-seconds", "")
        if not ttl.isdigit() or not 1 <= int(ttl) <= 21600:
            return self.answer(400)
        now, token = time.monotonic(), secrets.token_urlsafe(40) + "=="
        with self.lock:
            for old in [known for known, (end, _) in self.tokens.items() if end < now]:
                del self.tokens[old]
            self.tokens[token] = (now + int(ttl), self.client_address[0])
        return self.answer(200, token, {f"{self.HEADER}-ttl-seconds": ttl})

    def do_GET(self) -> None:
        end, owner = self.tokens.get(self.headers.get(self.HEADER, ""), (0.0, ""))
        if end < time.monotonic() or owner != self.client_address[0]:
            return self.answer(401)
        path = urllib.parse.urlsplit(self.path).path
        instance = instance_at(self.client_address[0])
        if instance is None or not path.startswith("/latest"):
            return self.answer(404)
        found = find(metadata(instance), path.removeprefix("/latest"))
        return self.answer(404) if found is None else self.answer(200, found)

    do_HEAD = do_GET

    def answer(self, status: int, text: str = "", headers: dict[str, str] | None = None) -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/plain")
        self.send_header("Content-Length", str(len(body)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Nothing: the journal is for errors."""


# ---- the process


class ApiHandler(MotoRequestHandler):
    """One connection to the API; silent about requests that went well and about clients that hang up."""

    timeout = 300

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        if str(code).startswith("5"):
            super().log_request(code, size)

    def connection_dropped(self, error: BaseException, environ: Any = None) -> None:
        """Nothing: a port probe does just this."""


def api(application: Wsgi, port: int, context: ssl.SSLContext | None = None) -> BaseWSGIServer:
    """A listening server; its TLS handshakes happen in each connection's thread, so that a silent client blocks none."""
    server = make_server(AWS_API, port, application, threaded=True, request_handler=ApiHandler)
    if context:
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        server.ssl_context = context
    return server


def warm(application: DomainDispatcherApplication) -> None:
    """Load what the first call to each service would wait for."""
    for service in ("ec2", "ecr", "sts", "iam", "eks"):
        scope = f"AWS4-HMAC-SHA256 Credential=lab/20250101/{REGION}/{service}/aws4_request, SignedHeaders=host"
        application.get_application({"PATH_INFO": "/", "HTTP_AUTHORIZATION": scope})
    account()


def ready() -> None:
    """Tell systemd that the ports are open."""
    address = os.environ.get("NOTIFY_SOCKET")
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            notify.connect(address.replace("@", "\0", 1))
            notify.sendall(b"READY=1")


def main() -> None:
    dispatcher = DomainDispatcherApplication(create_backend_app)
    warm(dispatcher)
    application = ExpiredToken(dispatcher)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(FOLDER / "tls" / "aws.crt", FOLDER / "tls" / "aws.key")
    imds = http.server.ThreadingHTTPServer((IMDS, 80), Metadata)
    imds.daemon_threads = True
    servers = [api(application, 5000), api(application, 443, context), imds]
    threads = [threading.Thread(target=server.serve_forever, daemon=True) for server in servers]
    for thread in threads:
        thread.start()
    ready()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main()
