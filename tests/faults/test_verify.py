"""verify.yml finds what is planted in the network of the lab: that fault, as one finding, and nothing else."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import datetime
import json
import pathlib
import re
import subprocess
from collections.abc import Callable, Iterator

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from lab.settings import AWS_API, CLUSTER_API, CLUSTER_NAME, DATABASE, DATABASE_NAME, MACHINE, REGISTRY, STATE

CHECKOUT = pathlib.Path(__file__).resolve().parents[2]
VERIFY = ["scripts/lab-env", "ansible-playbook", "-i", "inventories/lab", "playbooks/verify.yml"]
On = Callable[[str, str], str]
Plant = Callable[[On], "contextlib.AbstractContextManager[None]"]
GROUP = "inet nemo_lab_security_group"


@contextlib.contextmanager
def undone(on: On, host: str, plant: str, undo: str) -> Iterator[None]:
    """Do the one on a host, and the other afterwards, whatever happens in between; and before, for a run that was killed."""
    on(host, undo)
    try:
        on(host, plant)
        yield
    finally:
        on(host, undo)


def rule(host: str, hook: str, priority: int, what: str, kind: str = "filter", family: str = "inet") -> Plant:
    """A rule of the fault's own, ahead of the host's security group."""
    table = f"{family} nemo_planted"
    text = f"table {table} {{ chain fault {{ type {kind} hook {hook} priority {priority}; {what}; }}; }}"
    return lambda on: undone(on, host, f"nft '{text}'", f"nft 'table {table}'; nft delete table {table}")


def closed(host: str, what: str) -> Plant:
    """What a rule lets through, turned away."""
    return rule(host, "prerouting", -200, f"{what} reject with tcp reset")


def opened(host: str, what: str) -> Plant:
    """A rule in a host's security group that must not be there."""
    saved = "/run/nemo-planted.nft"
    keep = f"{{ echo 'table {GROUP}'; echo 'delete table {GROUP}'; nft list table {GROUP}; }} >{saved}"
    return lambda on: undone(
        on,
        host,
        f"{keep}; nft insert rule {GROUP} inbound {what} accept",
        f"[ ! -e {saved} ] || {{ nft -f {saved}; rm {saved}; }}",
    )


def name(host: str, known: str, address: str) -> Plant:
    """A name that leads somewhere else. The file is a mount, and so written to and not replaced."""
    saved = "/run/nemo-planted.hosts"
    change = f"cp /etc/hosts {saved}; sed 's/^[0-9.]*[[:space:]]*{known}$/{address} {known}/' {saved} >/etc/hosts"
    undo = f"[ ! -e {saved} ] || {{ cat {saved} >/etc/hosts; rm {saved}; }}"
    return lambda on: undone(on, host, f"{change}; ! cmp -s /etc/hosts {saved}", undo)


def certificate(known: str, first: int, last: int) -> Plant:
    """A certificate of the cluster's API for this name and these days from now."""
    folder, unit = "/opt/nemo-lab/tls", "nemo-lab-neighbours"
    saved = "/run/nemo-planted.tls"

    def plant(on: On) -> contextlib.AbstractContextManager[None]:
        issuer = x509.load_pem_x509_certificate((STATE / "pki/ca.crt").read_bytes())
        issuer_key = serialization.load_pem_private_key((STATE / "pki/ca.key").read_bytes(), None)
        assert isinstance(issuer_key, ec.EllipticCurvePrivateKey)
        key = ec.generate_private_key(ec.SECP256R1())
        now = datetime.datetime.now(datetime.UTC)
        made = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, known[:64])]))
            .issuer_name(issuer.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + datetime.timedelta(days=first))
            .not_valid_after(now + datetime.timedelta(days=last))
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), False)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(known)]), False)
            .sign(issuer_key, hashes.SHA256())
        )
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        write = f"mkdir -m 700 {saved}; cp -p {folder}/cluster.* {saved}"
        for suffix, data in (("crt", made.public_bytes(serialization.Encoding.PEM)), ("key", private)):
            write += f"; echo {base64.b64encode(data).decode()} | base64 -d >{folder}/cluster.{suffix}"
        wait = "i=0; until ss -ltn | grep -q ':3306 ' || [ $i = 50 ]; do i=$((i+1)); sleep 0.1; done"
        restart = f"systemctl restart {unit}; {wait}"
        undo = f"[ ! -e {saved} ] || {{ cp -p {saved}/cluster.* {folder}; rm -r {saved}; {restart}; }}"
        return undone(on, "aws", f"set -e; {write}; {restart}", undo)

    return plant


@contextlib.contextmanager
def unhealthy(on: On) -> Iterator[None]:
    """Something else on the service's port, that says 503 to everything."""
    server = (
        "import http.server as h\n"
        "class H(h.BaseHTTPRequestHandler):\n"
        "    def do_GET(self): self.send_error(503, explain=\"no model\")\n"
        "h.ThreadingHTTPServer((\"\", 18000), H).serve_forever()"
    )  # fmt: skip
    listens = "i=0; until ss -ltn | grep -q ':18000 ' || [ $i = 50 ]; do i=$((i+1)); sleep 0.1; done"
    start = f"systemd-run --quiet --collect --unit=nemo-planted python3 -c '{server}'; {listens}"
    redirect = rule("ai-prod", "prerouting", -110, "tcp dport 8000 redirect to :18000", "nat", "ip")
    with undone(on, "ai-prod", start, "systemctl stop nemo-planted || true"), redirect(on):
        yield


@dataclasses.dataclass
class Fault:
    """What is planted, and the finding that must come of it."""

    name: str
    plant: Plant
    finding: str
    sample: bool = False


ALL = r"(bastion-\S+|ai-dev-\S+|ai-prod-\S+|vllm-\S+|eks-node-\S+)"
FAULTS = [
    Fault("an AI port is closed", closed("ai-prod", "iifname eth0 tcp dport 8000"),
          r"ai-prod-10\.0\.2\.31:8000 \(ai-prod\) refuses connections, seen from bastion-\S+, eks-node-\S+"),
    Fault("an AI port says nothing to the cluster", rule("ai-dev", "prerouting", -200, "ip saddr 10.0.3.0/24 tcp dport 8001 drop"),
          r"eks-node-a-10\.0\.3\.11 cannot use ai-dev-10\.0\.2\.32:8001 \(ai-dev\), which others can: does not answer"),
    Fault("a forbidden port is open between AI servers", opened("ai-prod", "ip saddr 10.0.2.20 tcp dport 8000"),
          r"ai-prod-10\.0\.2\.31:8000 \(ai-prod\) is open to vllm-10\.0\.2\.20", sample=True),
    Fault("SSH of an AI server is open to the outside", opened("ai-dev", f"ip saddr {MACHINE} tcp dport 22"),
          r"ai-dev-10\.0\.2\.32:22 \(ssh\) is open to outside"),
    Fault("a NodePort is open to the outside", opened("eks-node", f"ip saddr {MACHINE} tcp dport 30080"),
          r"eks-node-a-10\.0\.3\.11:30080 \(node-port\) is open to outside"),
    Fault("the database is open to everyone", opened("aws", f"ip daddr {DATABASE} tcp dport 3306"),
          rf"database:3306 is open to ({ALL}(, )?){{4}}"),
    Fault("a name leads elsewhere in the VPC", name("ai-dev", DATABASE_NAME, "10.0.0.12"),
          rf"DNS on ai-dev-10\.0\.2\.32: {DATABASE_NAME} is 10\.0\.0\.12 here, and {DATABASE} elsewhere"),
    Fault("the registry's name leads out of the VPC", name("ai-prod", REGISTRY, "192.0.2.1"),
          rf"DNS on ai-prod-10\.0\.2\.31: {REGISTRY} is 192\.0\.2\.1, not in 10\.0\.0\.0/16: nothing was sent there"),
    Fault("the certificate of the cluster's API has expired", certificate(CLUSTER_NAME, -10, -1),
          r"cluster-api:443 is wrong: the certificate has expired: .* GMT \(issued by nemo lab authority\), seen from", True),
    Fault("the certificate of the cluster's API is another's", certificate("other.example", -1, 90),
          r"cluster-api:443 is wrong: the certificate is for other\.example, not for \S+ \(issued by"),
    Fault("the certificate of the cluster's API expires soon", certificate(CLUSTER_NAME, -1, 5),
          r"cluster-api:443 is wrong: the certificate expires in 4 days \(.*\), less than 14"),
    Fault("the cluster's API is down", closed("aws", f"ip daddr {CLUSTER_API} tcp dport 443"),
          r"cluster-api:443 refuses connections, seen from bastion-\S+, eks-node-\S+"),
    Fault("the database is down", closed("aws", f"ip daddr {DATABASE} tcp dport 3306"),
          r"database:3306 refuses connections, seen from eks-node-\S+"),
    Fault("Kafka is down", closed("eks-node", "tcp dport 9094"),
          rf"eks-node-a-10\.0\.3\.11:9094 \(kafka\) refuses connections, seen from ({ALL}(, )?){{4}}"),
    Fault("something else is on Kafka's port",
          rule("eks-node", "prerouting", -110, "tcp dport 9094 redirect to :30080", "nat", "ip"),
          r"eks-node-a-10\.0\.3\.11:9094 \(kafka\) is wrong: the port is open, but "),
    Fault("one host cannot reach the AWS API", rule("ai-dev", "output", -200, f"ip daddr {AWS_API} tcp dport 443 drop"),
          r"ai-dev-10\.0\.2\.32 cannot use registry-api:443, ec2-api:443, eks-api:443, sts-api:443, which others can: does not"),
    Fault("a service is not healthy", unhealthy,
          r"ai-prod-10\.0\.2\.31:8000 \(ai-prod\) is wrong: /health answers 503, not 200: .*, seen from bastion-\S+, eks-node"),
    Fault("nobody gets in to a host", closed("vllm", "tcp dport 22"),
          r"vllm-10\.0\.2\.20:22 \(ssh\) refuses connections, seen from bastion-\S+"),
]  # fmt: skip


@pytest.mark.parametrize(
    "fault", [pytest.param(one, id=one.name, marks=[pytest.mark.sample] if one.sample else []) for one in FAULTS]
)
def test_fault(on, tmp_path, fault):
    with fault.plant(on):
        done = subprocess.run(
            [*VERIFY, "-e", f"verify_report_dir={tmp_path}"], cwd=CHECKOUT, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120, check=False,
        )  # fmt: skip
    assert done.returncode == 2, done.stdout[-8000:]
    report = json.loads((tmp_path / "verify.json").read_text())
    found = [finding["what"] for finding in report["findings"]]
    assert len(found) == 1, "\n".join(found)
    assert re.match(fault.finding, found[0]), found[0]
    # what the run says on its way out, and the lines that show it
    assert f"1. {found[0]}\n   -> " in done.stdout
    failed = {flow["id"] for flow in report["flows"] if flow["verdict"] == "fail"}
    assert failed == set(report["findings"][0]["flows"])
    assert done.stdout.count("\nFAIL  ") == len(failed) > 0
    assert '<failure type="' in (tmp_path / "verify.xml").read_text()
