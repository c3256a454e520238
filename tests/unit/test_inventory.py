"""Both inventories, read by Ansible itself from an AWS of our own."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.unit.conftest import ENVIRONMENT, Aws
from tests.unit.helpers import ROOT

BIN = Path(sys.executable).parent
# Blanks, a quote and a percent sign, as a checkout may well have.
AWKWARD = "a checkout's 100%h"
FAKE_SSH = f"""#!{sys.executable}
import json, os, sys
with open(os.environ["SSH_LOG"], "a") as log:
    log.write(json.dumps(sys.argv[1:]) + "\\n")
"""


KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIIf1SokRLLetcXVqUY4uQvdfGpGrhNLtVHXsSlBmIb20"


class Checkout:
    """A copy of the inventories at an awkward path, its lab pointing at the test's AWS."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder = folder
        self.home = folder.parent / "home"
        self.home.mkdir()
        shutil.copytree(ROOT / "inventories", folder / "inventories", symlinks=True)
        for name in ("lab/aws_ec2.yml", "lab/group_vars/all/zz_lab.yml"):
            file = folder / "inventories" / name
            file.write_text(file.read_text().replace("http://10.0.0.10:5000", url))
        keys = folder / ".lab/ssh/operators"
        keys.mkdir(parents=True)
        for number, name in enumerate(("alice", "bob")):
            (keys / f"{name}.pub").write_text(f"{KEY[:-1]}{number} {name}\n")
        self.ssh = folder.parent / "bin" / "ssh"
        self.ssh.parent.mkdir()
        self.ssh.write_text(FAKE_SSH)
        self.ssh.chmod(0o755)
        self.log = folder.parent / "ssh.log"

    def run(
        self, program: str, *arguments: str, inventory: str = "lab", **env: str
    ) -> subprocess.CompletedProcess[str]:
        source = self.folder / "inventories" / inventory
        path = f"{self.ssh.parent}:{BIN}:{os.environ['PATH']}"
        return subprocess.run(
            [str(BIN / program), "-i", str(source), *arguments],
            cwd=ROOT,
            env={
                "PATH": path, "HOME": str(self.home), "LANG": "C.UTF-8", "ANSIBLE_NOCOLOR": "1", **ENVIRONMENT,
                "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "SSH_LOG": str(self.log), **env,
            },
            stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=120,
        )  # fmt: skip

    def listing(self, **env: str) -> dict[str, Any]:
        done = self.run("ansible-inventory", "--list", "--flush-cache", **env)
        assert done.returncode == 0, done.stderr
        # values from AWS are marked as data, never to be templates
        return json.loads(done.stdout, object_hook=lambda value: value.get("__ansible_unsafe", value))

    def ssh_calls(self, host: str) -> list[list[str]]:
        """What `ssh` is started with for a host, and then by its ProxyCommand."""
        self.log.unlink(missing_ok=True)
        done = self.run("ansible", host, "-m", "ansible.builtin.raw", "-a", "true", ANSIBLE_PIPELINING="1")
        assert self.log.exists(), done.stdout + done.stderr
        call = json.loads(self.log.read_text().splitlines()[-1])
        calls = [call]
        proxy = [option.removeprefix("ProxyCommand=") for option in call if option.startswith("ProxyCommand=")]
        for command in proxy:
            # As ssh does it: its own %-tokens first, then the shell.
            mark = "\0"
            expanded = command.replace("%%", mark).replace("%h", "10.0.2.31").replace("%p", "22").replace(mark, "%")
            env = {"PATH": str(self.ssh.parent), "SSH_LOG": str(self.log)}
            subprocess.run(["/bin/sh", "-c", f"exec {expanded}"], env=env, check=True)
            calls.append(json.loads(self.log.read_text().splitlines()[-1]))
        return calls


def settings(call: list[str], home: Path) -> dict[str, str]:
    """How the real ssh understands the options of a call."""
    options = [part for flag, value in itertools.pairwise(call) if flag == "-o" for part in (flag, value)]
    command = ["ssh", "-F", "/dev/null", "-G", *options, "host.invalid"]
    done = subprocess.run(
        command, env={"PATH": os.environ["PATH"], "HOME": str(home)}, capture_output=True, text=True, check=True
    )
    return dict(line.split(" ", 1) for line in done.stdout.splitlines() if " " in line)


@pytest.fixture
def checkout(aws: Aws, tmp_path: Path) -> Checkout:
    folder = tmp_path / AWKWARD
    folder.mkdir()
    return Checkout(folder, aws.url)


def test_groups_names_and_variables(aws: Aws, checkout: Checkout) -> None:
    aws.platform()
    aws.instance("10.0.2.33", Project="nemo", Name="ai-prod", Role="ai", Services="ai-prod + ai-dev")
    aws.instance("10.0.2.34", Project="nemo", Role="ai", Services="ai-dev")
    aws.instance("10.0.2.35", state="stopped", Project="nemo", Name="old", Role="ai", Services="ai-prod")
    aws.instance("10.0.2.36", Project="other", Name="theirs", Role="ai", Services="ai-prod")
    aws.instance("10.0.3.5", Project="nemo", Name="node", Role="eks-node")
    found = checkout.listing()
    assert {group: sorted(found[group]["hosts"]) for group in found if group not in ("_meta", "all")} == {
        "aws_ec2": [
            "10.0.2.34", "ai-dev-10.0.2.32", "ai-prod-10.0.2.31", "ai-prod-10.0.2.33", "bastion-10.0.1.10",
            "node-10.0.3.5", "vllm-10.0.2.20",
        ],
        "bastion": ["bastion-10.0.1.10"],
        "vllm": ["vllm-10.0.2.20"],
        "ai": ["10.0.2.34", "ai-dev-10.0.2.32", "ai-prod-10.0.2.31", "ai-prod-10.0.2.33"],
        "ai_prod": ["ai-prod-10.0.2.31", "ai-prod-10.0.2.33"],
        "ai_dev": ["10.0.2.34", "ai-dev-10.0.2.32", "ai-prod-10.0.2.33"],
        "eks_nodes": ["node-10.0.3.5"],
    }  # fmt: skip
    variables = found["_meta"]["hostvars"]
    both = variables["ai-prod-10.0.2.33"]
    assert both["nemo_host_services"] == ["ai-prod", "ai-dev"]
    assert both["ec2_tags"]["Name"] == both["nemo_name"] == "ai-prod"
    assert both["nemo_private_address"] == "10.0.2.33"
    assert both["nemo_instance_id"].startswith("i-")
    assert "tags" not in both
    assert variables["10.0.2.34"]["nemo_name"] == ""
    assert variables["vllm-10.0.2.20"]["nemo_host_services"] == []


def test_cache_is_used_and_refreshed(aws: Aws, checkout: Checkout) -> None:
    aws.platform()
    assert len(checkout.listing()["aws_ec2"]["hosts"]) == 4
    aws.instance("10.0.3.5", Project="nemo", Name="node", Role="eks-node")
    cached = json.loads(checkout.run("ansible-inventory", "--list").stdout)
    assert len(cached["aws_ec2"]["hosts"]) == 4
    assert len(checkout.listing()["aws_ec2"]["hosts"]) == 5


def test_operators_profile_stays_out_of_the_lab(aws: Aws, checkout: Checkout) -> None:
    aws.platform()
    (checkout.home / ".aws").mkdir()
    (checkout.home / ".aws" / "config").write_text("[profile work]\nregion = us-east-1\n")
    assert len(checkout.listing(AWS_PROFILE="work", AWS_REGION="us-east-1")["aws_ec2"]["hosts"]) == 4


def test_ssh_through_the_bastion(aws: Aws, checkout: Checkout) -> None:
    aws.platform()
    key = checkout.folder / ".lab" / "ssh" / "id_ed25519"
    known_hosts = checkout.folder / ".lab" / "known_hosts"
    key.parent.mkdir(exist_ok=True)
    key.touch()
    direct, jump = checkout.ssh_calls("ai-prod-10.0.2.31")
    assert jump[-5:] == ["-W", "[10.0.2.31]:22", "-l", "ec2-user", "10.0.1.10"]
    for call in (direct, jump):
        told = settings(call, checkout.home)
        assert told["userknownhostsfile"] == str(known_hosts)
        assert told["identityfile"] == str(key).replace("%", "%%")
        assert told["stricthostkeychecking"] == "accept-new"
        assert told["globalknownhostsfile"] == "/dev/null"
        assert told["identitiesonly"] == "yes"
        # of this inventory alone, in a folder of the user's
        assert re.fullmatch(re.escape(f"{checkout.home}/.ansible/cp/") + "[0-9a-f]{8}/[^/]+", told["controlpath"])
    assert settings(jump, checkout.home)["batchmode"] == "yes"
    assert jump[jump.index("-E") + 1].startswith(f"{checkout.home}/.ansible/cp/")
    assert "10.0.2.31" in direct
    assert len(checkout.ssh_calls("bastion-10.0.1.10")) == 1


def test_replaced_bastion_is_not_reached_over_the_old_connection(aws: Aws, checkout: Checkout) -> None:
    """The path of the shared connection is one for each Bastion, user and key."""
    aws.platform()
    lab = checkout.folder / "inventories/lab/group_vars/all/zz_lab.yml"
    before = lab.read_text()
    paths = []
    for line in ("", "nemo_ssh_user: other", "nemo_ssh_private_key_file: /other"):
        lab.write_text(f"{before}\n{line}\n")
        paths.append(settings(checkout.ssh_calls("ai-prod-10.0.2.31")[1], checkout.home)["controlpath"])
    lab.write_text(before)
    (old,) = aws.client("ec2").describe_instances(Filters=[{"Name": "tag:Role", "Values": ["bastion"]}])["Reservations"]
    aws.client("ec2").terminate_instances(InstanceIds=[old["Instances"][0]["InstanceId"]])
    aws.instance("10.0.1.11", Project="nemo", Name="bastion", Role="bastion")
    checkout.listing()
    paths.append(settings(checkout.ssh_calls("ai-prod-10.0.2.31")[1], checkout.home)["controlpath"])
    assert len(set(paths)) == 4
    assert all(re.search("/bastion-[0-9a-f]{8}$", path) for path in paths)


def test_ssh_on_the_bastion_itself(aws: Aws, checkout: Checkout) -> None:
    aws.platform()
    aws.instance("127.0.0.1", Project="nemo", Name="a-bastion", Role="bastion")
    calls = checkout.ssh_calls("ai-prod-10.0.2.31")
    assert len(calls) == 1
    assert "10.0.2.31" in calls[0]


def test_bastion_by_its_public_address(aws: Aws, checkout: Checkout) -> None:
    aws.platform()
    instances = aws.client("ec2").describe_instances(Filters=[{"Name": "tag:Role", "Values": ["bastion"]}])
    public = instances["Reservations"][0]["Instances"][0].get("PublicIpAddress")
    if not public:
        address = aws.client("ec2").allocate_address(Domain="vpc")
        instance = instances["Reservations"][0]["Instances"][0]["InstanceId"]
        aws.client("ec2").associate_address(AllocationId=address["AllocationId"], InstanceId=instance)
        public = address["PublicIp"]
    assert checkout.ssh_calls("ai-prod-10.0.2.31")[1][-1] == public
    assert public in checkout.ssh_calls("bastion-10.0.1.10")[0]


def test_controller_tasks_run_on_the_controllers_python(aws: Aws, checkout: Checkout) -> None:
    """boto3 is in Ansible's own Python only; the AWS connection of the inventory is the module's default."""
    aws.platform()
    aws.client("ecr").create_repository(repositoryName="ai")
    playbook = checkout.folder / "delegate.yml"
    play = {
        "hosts": "ai", "gather_facts": False,
        "module_defaults": yaml.safe_load((ROOT / "playbooks" / "ai.yml").read_text())[0]["module_defaults"],
        "tasks": [
            {
                "nemo.platform.ecr_image_info": {"repository": "ai", "tag_prefix": "prod"},
                "delegate_to": "localhost", "register": "found", "failed_when": "'has no image' not in found.msg",
            },
        ],
    }  # fmt: skip
    playbook.write_text(yaml.safe_dump([play]))
    done = checkout.run("ansible-playbook", str(playbook), AWS_ACCESS_KEY_ID="", AWS_SECRET_ACCESS_KEY="")
    assert done.returncode == 0, done.stdout + done.stderr
    assert not checkout.log.exists()


def sections(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / "inventories" / name / "aws_ec2.yml").read_text())


def test_lab_differs_in_endpoint_and_credentials_alone() -> None:
    aws, lab = sections("aws"), sections("lab")
    only_lab = {key: lab.pop(key) for key in set(lab) - set(aws)}
    assert lab == aws
    assert sorted(only_lab) == [
        "access_key",
        "assume_role_arn",
        "endpoint_url",
        "profile",
        "secret_key",
        "session_token",
    ]


def test_lab_shares_the_files_of_the_platform() -> None:
    platform, lab = ROOT / "inventories/aws/group_vars", ROOT / "inventories/lab/group_vars"
    for file in platform.rglob("*.yml"):
        if file.name == "vault.yml":
            continue
        twin = lab / file.relative_to(platform)
        if twin.with_suffix("").is_dir():  # a group with a file of its own beside the platform's
            twin = twin.with_suffix("") / "platform.yml"
        assert twin.is_symlink(), twin
        assert not twin.readlink().is_absolute()
        assert twin.resolve() == file.resolve()
    own = [file.name for file in lab.rglob("*.yml") if not file.is_symlink()]
    assert set(own) == {"zz_lab.yml"}


def test_one_region_and_one_endpoint() -> None:
    variables = yaml.safe_load((ROOT / "inventories/aws/group_vars/all/platform.yml").read_text())
    assert sections("aws")["regions"] == [variables["nemo_region"]]
    lab = yaml.safe_load((ROOT / "inventories/lab/group_vars/all/zz_lab.yml").read_text())
    assert sections("lab")["endpoint_url"] == lab["nemo_aws_endpoint_url"]


class TestPreflight:
    """The play, with its real inventory and its real messages."""

    @staticmethod
    def run(checkout: Checkout, *arguments: str, **options: str) -> subprocess.CompletedProcess[str]:
        playbook = checkout.folder / "site.yml"
        after = {"hosts": "all", "gather_facts": False, "tasks": [{"ansible.builtin.debug": {"msg": "went on"}}]}
        playbook.write_text(yaml.safe_dump([{"import_playbook": "nemo.platform.preflight"}, after]))
        return checkout.run("ansible-playbook", str(playbook), "--flush-cache", *arguments, **options)

    def test_good(self, aws: Aws, checkout: Checkout) -> None:
        aws.platform()
        done = self.run(checkout)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.count("went on") == 4
        assert not checkout.log.exists()

    def test_past_its_date_is_a_warning(self, aws: Aws, checkout: Checkout) -> None:
        aws.platform()
        lab = checkout.folder / "inventories/lab/group_vars/all/zz_lab.yml"
        before = lab.read_text()
        lab.write_text(before + "\nnemo_bastion_system: amazon-linux-2\nnemo_eks_version: '1.33'\n")
        done = self.run(checkout)
        assert done.returncode == 0, done.stdout + done.stderr
        said = done.stdout + done.stderr
        assert (
            len(
                re.findall(
                    "^.*end of support .30 June 2026.*nemo_bastion_system: amazon-linux-2023$", said, re.MULTILINE
                )
            )
            == 1
        )
        assert len(re.findall("^.*Kubernetes 1.33 .*29 July 2026.*nemo_eks_version", said, re.MULTILINE)) == 1
        lab.write_text(before + "\nnemo_bastion_system: amazon-linux\nnemo_eks_version: '1.34'\n")
        done = self.run(checkout)
        assert done.returncode != 0
        assert "1. nemo_bastion_system is 'amazon-linux' -> allowed: amazon-linux-2, " in done.stdout
        assert "30 June" not in done.stdout + done.stderr

    def test_limit_does_not_skip_it_and_failure_stops_all(self, aws: Aws, checkout: Checkout) -> None:
        aws.platform()
        aws.instance("10.0.2.33", Project="nemo", Name="x", Role="ai", Services="ai-test")
        done = self.run(checkout, "--limit", "ai_prod")
        assert done.returncode != 0
        assert "ai-test is no service" in done.stdout
        assert "went on" not in done.stdout

    def test_secret_and_removed_variable(self, aws: Aws, checkout: Checkout) -> None:
        aws.platform()
        lab = checkout.folder / "inventories/lab/group_vars/all/zz_lab.yml"
        lab.write_text(lab.read_text().replace("vault_ai_dev_api_token: lab-dev-token", "ansible_ssh_user: root"))
        done = self.run(checkout)
        assert done.returncode != 0
        assert "2 problems in the inventory" in done.stdout
        assert "the secret AI_API_TOKEN of ai-dev has no value" in done.stdout
        assert "set vault_ai_dev_api_token in" in done.stdout
        assert "the removed variable ansible_ssh_user is set" in done.stdout

    def test_empty_entry_and_secrets_that_are_none(self, aws: Aws, checkout: Checkout) -> None:
        aws.platform()
        lab = checkout.folder / "inventories/lab/group_vars/all/zz_lab.yml"
        with lab.open("a") as file:
            file.write("nemo_services: {ai-prod: , ai-dev: {port: 8001, secrets: hush-hush}}\n")
        done = self.run(checkout)
        assert done.returncode != 0
        assert "nemo_services: ai-prod is empty" in done.stdout
        assert "nemo_services: ai-dev has secrets of type str" in done.stdout
        assert "hush-hush" not in done.stdout + done.stderr
        lab.write_text(lab.read_text() + "nemo_services: text\n")
        assert "nemo_services is of type str" in self.run(checkout).stdout

    def test_no_credentials(self, aws: Aws, checkout: Checkout) -> None:
        done = self.run(checkout, inventory="aws", AWS_ACCESS_KEY_ID="", AWS_SECRET_ACCESS_KEY="")
        assert done.returncode != 0
        assert "no AWS credentials: log in" in done.stdout
        assert "make lab shows everything" in done.stdout

    def test_only_stopped_instances(self, aws: Aws, checkout: Checkout) -> None:
        aws.instance("10.0.2.31", state="stopped", Project="nemo", Name="ai-prod", Role="ai", Services="ai-prod")
        aws.instance("10.0.2.36", Project="other", Name="theirs")
        done = self.run(checkout)
        assert done.returncode != 0
        assert "no instance of the project is running in ap-northeast-2: 1 stopped" in done.stdout
