"""What stands on the hosts themselves."""

from __future__ import annotations

import json

import pytest

from lab.settings import HOSTS, USER

ALL = [host.name for host in HOSTS]
SERVICES = [("ai-prod", "ai-prod"), ("ai-dev", "ai-dev")]
SECRETS = {"ai-prod": "lab-prod-token", "ai-dev": "lab-dev-token"}


@pytest.mark.parametrize("name", ALL)
def test_no_unit_has_failed(on, name):
    assert on(name).check_output("systemctl --failed --plain --no-legend") == ""


@pytest.mark.parametrize("name", ALL)
def test_the_ssh_daemon_takes_keys_only(on, name):
    settings = on(name).check_output("sshd -T -C user=%s,host=x,addr=10.0.1.10", USER).splitlines()
    assert "passwordauthentication no" in settings
    assert "permitrootlogin no" in settings
    assert "kbdinteractiveauthentication no" in settings


@pytest.mark.parametrize("name", ALL)
def test_the_journal_is_limited(on, name):
    assert "SystemMaxUse=" in on(name).check_output("systemd-analyze cat-config systemd/journald.conf")


@pytest.mark.parametrize("name", ALL)
def test_security_updates_leave_drivers_kernels_and_the_engine_alone(on, name):
    shown = on(name).check_output("apt-config dump Unattended-Upgrade::Package-Blacklist")
    for package in ("nvidia", "linux-image", "docker"):
        assert package in shown
    assert on(name).check_output("apt-config shell reboot Unattended-Upgrade::Automatic-Reboot") == "reboot='false'"


@pytest.mark.parametrize(("name", "service"), SERVICES)
def test_the_container_is_confined(on, container, name, service):
    running = container(name, service)
    settings = json.loads(on(name).check_output("docker container inspect %s", running))[0]
    host = settings["HostConfig"]
    assert settings["Config"]["User"] == "10001:10001"
    assert host["Memory"] == 1024**3
    assert host["LogConfig"]["Type"] == "json-file"
    assert set(host["LogConfig"]["Config"]) >= {"max-size", "max-file"}
    assert "no-new-privileges" in "".join(host["SecurityOpt"])
    assert host["CapDrop"] == ["ALL"]
    assert host["ReadonlyRootfs"] is True
    assert host["Privileged"] is False
    assert host["RestartPolicy"]["Name"] == "unless-stopped"
    assert "@sha256:" in settings["Config"]["Image"]


@pytest.mark.parametrize(("name", "service"), SERVICES)
def test_no_process_of_the_service_is_root(on, container, name, service):
    users = on(name).check_output("docker top %s -eo pid,uid", container(name, service)).split()[3::2]
    assert users
    assert set(users) == {"10001"}


@pytest.mark.parametrize(("name", "service"), SERVICES)
def test_a_secret_is_in_files_of_root_alone(on, container, name, service):
    host, secret = on(name), SECRETS[service]
    running = container(name, service)
    assert secret not in host.check_output("docker container inspect %s", running)
    assert secret not in host.check_output("docker logs %s 2>&1", running)
    journal = host.check_output("journalctl --no-pager --boot").splitlines()
    assert not [line for line in journal if secret in line and "COMMAND=" not in line]  # sudo logs this very test
    files = host.check_output("grep -rl --exclude-dir=docker %s /etc /var/lib /home /root || true", secret).split()
    assert files, "the secret's file was not found"
    for file in files:
        assert host.run("runuser -u %s -- cat %s", USER, file).rc != 0, f"{USER} can read {file}"


@pytest.mark.parametrize(("name", "service"), SERVICES)
def test_nothing_is_left_of_a_release(on, container, name, service):
    """One container runs; what else there is are kept releases, that stand still and are known."""
    host = on(name)
    assert container(name, service)
    kept = host.check_output("docker ps --all --format '{{.Names}}'").split()
    known = {
        entry["release"]
        for entry in json.loads(host.file(f"/var/lib/nemo/{service}/state.json").content_string)["releases"]
    }
    assert {entry.removeprefix(f"{service}.") for entry in kept} <= known
    assert not host.file(f"/var/lib/nemo/{service}/transition.json").exists


@pytest.mark.parametrize(("name", "service"), SERVICES)
def test_haproxy_owns_the_public_port(on, name, service):
    host = on(name)
    port = {"ai-prod": 8000, "ai-dev": 8001}[service]
    listening = host.check_output(f"ss --listening --tcp --processes --no-header --numeric 'sport = :{port}'")
    assert "haproxy" in listening
    assert "docker-proxy" not in listening
    assert host.check_output(f"stat -c '%a %U' /run/nemo-proxy-{service}/master.sock") == "600 root"
    published = host.check_output("docker ps --format '{{.Ports}}'").split()
    assert all(entry.startswith("127.0.0.1:") for entry in published)


@pytest.mark.parametrize("name", ["vllm", "ai-prod", "ai-dev"])
def test_the_engine_listens_on_no_port(on, name):
    listening = on(name).check_output("ss --listening --tcp --processes --no-header --numeric")
    assert "dockerd" not in listening


@pytest.mark.parametrize("name", ["vllm", "ai-prod", "ai-dev"])
def test_the_registry_needs_no_stored_password(on, name):
    settings = json.loads(on(name).file("/root/.docker/config.json").content_string)
    assert settings["credHelpers"]
    assert "auths" not in settings or not any("auth" in entry for entry in settings["auths"].values())


def test_the_bastion_runs_no_container_engine(on):
    assert on("bastion").run("command -v dockerd").rc != 0
