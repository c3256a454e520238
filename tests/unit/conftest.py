"""An AWS of one's own for the tests: moto in a thread, on 127.0.0.1, with credentials that open nothing."""

from __future__ import annotations

import http.server
import os
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer

REGION = "ap-northeast-2"
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_EC2_METADATA_DISABLED": "true",
}


class Aws:
    """The running server."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._subnets: dict[str, str] = {}

    def client(self, service: str, region: str = REGION) -> Any:
        return boto3.client(
            service, region_name=region, endpoint_url=self.url, aws_access_key_id="test", aws_secret_access_key="test"
        )

    def instance(self, address: str, state: str = "running", **tags: str) -> str:
        """One instance at a private address."""
        ec2 = self.client("ec2")
        network = address.rsplit(".", 1)[0]
        if network not in self._subnets:
            vpc = ec2.create_vpc(CidrBlock=f"{network}.0/24")["Vpc"]["VpcId"]
            self._subnets[network] = ec2.create_subnet(VpcId=vpc, CidrBlock=f"{network}.0/24")["Subnet"]["SubnetId"]
        specification = {"ResourceType": "instance", "Tags": [{"Key": k, "Value": v} for k, v in tags.items()]}
        instance = ec2.run_instances(
            ImageId="ami-0662f4965dfc70aca", MinCount=1, MaxCount=1, SubnetId=self._subnets[network],
            PrivateIpAddress=address, TagSpecifications=[specification],
        )["Instances"][0]["InstanceId"]  # fmt: skip
        if state == "stopped":
            ec2.stop_instances(InstanceIds=[instance])
        return str(instance)

    def platform(self) -> None:
        """The four hosts of the platform."""
        self.instance("10.0.1.10", Project="nemo", Name="bastion", Role="bastion")
        self.instance("10.0.2.20", Project="nemo", Name="vllm", Role="vllm")
        self.instance("10.0.2.31", Project="nemo", Name="ai-prod", Role="ai", Services="ai-prod")
        self.instance("10.0.2.32", Project="nemo", Name="ai-dev", Role="ai", Services="ai-dev")


@pytest.fixture(scope="session")
def moto_url() -> Iterator[str]:
    os.environ["MOTO_ACCOUNT_ID"] = "084375578827"
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def no_aws(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing of the developer's own AWS set-up, no credentials, no metadata service."""
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))


@pytest.fixture
def aws(moto_url: str, no_aws: None, monkeypatch: pytest.MonkeyPatch) -> Aws:
    """An empty account."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    urllib.request.urlopen(urllib.request.Request(f"{moto_url}/moto-api/reset", method="POST")).close()
    return Aws(moto_url)


@pytest.fixture
def expired_url() -> Iterator[str]:
    """An AWS API to which every token has expired."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if "json" in self.headers.get("Content-Type", ""):
                body, kind = (
                    b'{"__type": "ExpiredTokenException", "message": "The token has expired"}',
                    "application/x-amz-json-1.1",
                )
            else:
                body, kind = (
                    b"<ErrorResponse><Error><Type>Sender</Type><Code>ExpiredToken</Code><Message>The security token included"
                    b" in the request is expired</Message></Error><RequestId>1</RequestId></ErrorResponse>",
                    "text/xml",
                )
            self.send_response(400 if "json" in kind else 403)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
