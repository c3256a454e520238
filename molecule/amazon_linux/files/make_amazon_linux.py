#!/usr/bin/python3
"""Makes a Debian host look like Amazon Linux to Ansible: its names, its package manager, its packages.

make_amazon_linux.py [2023 | 2], as root on a throw-away host that has dnf, rpm, createrepo-c, gpg and gpg-agent. It leaves:

- /etc/os-release and /etc/system-release of Amazon Linux; an rpm database that holds the release package and a
  package that stands for what Debian has under other names (a shell, systemd);
- /srv/amazonlinux/<release>: repositories of RPMs signed with a key made here, gpgcheck on. `latest` has the security
  updates that the release does not have yet, and the advisories that say so;
- Docker Engine, containerd, runc, chrony and the ECR credential helper as RPMs: Debian's programs in Amazon's package
  names, paths and units. dnf-automatic is dnf's own code. The rest is empty packages of the right name.

A second run does nothing.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

YUM = sys.argv[1:] == ["2"]
RELEASE = "2" if YUM else "2023.9.20251027"
REPOSITORIES = pathlib.Path("/srv/amazonlinux")
KEY = pathlib.Path("/etc/pki/rpm-gpg/RPM-GPG-KEY-amazon-linux-2" + ("" if YUM else "023"))
DONE = pathlib.Path("/srv/amazonlinux/done")
DIST = "1.amzn2" if YUM else "1.amzn2023"

OS_RELEASE = """\
NAME="Amazon Linux"
VERSION="2023"
ID="amzn"
ID_LIKE="fedora"
VERSION_ID="2023"
PLATFORM_ID="platform:al2023"
PRETTY_NAME="Amazon Linux 2023.9.20251027"
CPE_NAME="cpe:2.3:o:amazon:amazon_linux:2023"
VENDOR_NAME="AWS"
"""
OS_RELEASE_2 = """\
NAME="Amazon Linux"
VERSION="2"
ID="amzn"
ID_LIKE="centos rhel fedora"
VERSION_ID="2"
PRETTY_NAME="Amazon Linux 2"
CPE_NAME="cpe:2.3:o:amazon:amazon_linux:2"
"""
SYSTEM_RELEASE = f"Amazon Linux release {'2 (Karoo)' if YUM else f'{RELEASE} (Amazon Linux)'}\n"
REPOSITORY = f"""\
[amazonlinux]
name=Amazon Linux repository
baseurl=file://{REPOSITORIES}/{"latest" if YUM else "$releasever"}
enabled=1
gpgcheck=1
gpgkey=file://{KEY}
"""
# Amazon's unit reads flags from /etc/sysconfig/docker; one of them must not meet the same key in daemon.json.
DOCKER_SERVICE = """\
[Unit]
Description=Docker Application Container Engine
After=network-online.target docker.socket containerd.service
Wants=network-online.target containerd.service
Requires=docker.socket

[Service]
Type=notify
EnvironmentFile=-/etc/sysconfig/docker
EnvironmentFile=-/etc/sysconfig/docker-storage
EnvironmentFile=-/run/docker/runtimes.env
ExecStart=/usr/bin/dockerd -H fd:// --containerd=/run/containerd/containerd.sock $OPTIONS $DOCKER_STORAGE_OPTIONS $DOCKER_ADD_RUNTIMES
ExecReload=/bin/kill -s HUP $MAINPID
LimitNOFILE=infinity
LimitNPROC=infinity
LimitCORE=infinity
TasksMax=infinity
TimeoutStartSec=0
Delegate=yes
KillMode=process
Restart=on-failure
StartLimitBurst=3
StartLimitInterval=60s

[Install]
WantedBy=multi-user.target
"""
DOCKER_SOCKET = """\
[Unit]
Description=Docker Socket for the API

[Socket]
ListenStream=/run/docker.sock
SocketMode=0660
SocketUser=root
SocketGroup=docker

[Install]
WantedBy=sockets.target
"""
CHRONYD_SERVICE = """\
[Unit]
Description=NTP client/server
ConditionCapability=CAP_SYS_TIME

[Service]
Type=forking
PIDFile=/run/chrony/chronyd.pid
ExecStart=/usr/sbin/chronyd
RuntimeDirectory=chrony

[Install]
WantedBy=multi-user.target
"""
DNF_AUTOMATIC = """\
#!/usr/bin/python3
import sys
import dnf.automatic.main
sys.exit(dnf.automatic.main.main(sys.argv[1:]))
"""
DNF_AUTOMATIC_SERVICE = """\
[Unit]
Description=dnf automatic

[Service]
Type=oneshot
ExecStart=/usr/bin/dnf-automatic /etc/dnf/automatic.conf --timer
"""
DNF_AUTOMATIC_TIMER = """\
[Unit]
Description=dnf-automatic timer

[Timer]
OnCalendar=*-*-* 6:00
RandomizedDelaySec=60m
Persistent=true

[Install]
WantedBy=timers.target
"""
# The package's own file: it only looks, and knows no package to leave alone.
DNF_AUTOMATIC_CONF = """\
[commands]
upgrade_type = default
download_updates = yes
apply_updates = no
[emitters]
emit_via = stdio
"""
# Of a Bastion, empty: Debian's programs answer to the commands that are used.
NETWORK_TOOLS = [
    "acl",
    "bash-completion",
    "bind-utils",
    "curl",
    "ethtool",
    "git",
    "gnupg2",
    "iproute",
    "iputils",
    "jq",
    "lsof",
    "mariadb",
    "mtr",
    "nmap",
    "nmap-ncat",
    "rsync",
    "socat",
    "strace",
    "sudo",
    "tar",
    "tcpdump",
    "tmux",
    "traceroute",
    "unzip",
    "util-linux",
]
# Where dnf's own Python is on the stand-in for Amazon Linux 2, whose yum has Python 2 for itself.
PYTHON_OF_YUM = "/usr/libexec/amazon-linux-test/python"
YUM_PROGRAM = f"""\
#!/bin/sh
exec {PYTHON_OF_YUM} /usr/bin/dnf-3 "$@"
"""
# Amazon Linux 2's python3, as far as whoever asks for its version can see; it runs no module.
PYTHON_3_7 = """\
#!/bin/sh
echo 3.7.16
exit 3
"""
# What yum-cron does with its configuration, by dnf.
YUM_CRON = f"""\
#!{PYTHON_OF_YUM}
import configparser
import subprocess
import sys
settings = configparser.ConfigParser(interpolation=None)
settings.read(sys.argv[1:] or ["/etc/yum/yum-cron.conf"])
if settings["commands"].getboolean("apply_updates"):
    held = [f"--exclude={{name}}" for name in settings["base"].get("exclude", "").replace(",", " ").split()]
    kind = ["--security"] if settings["commands"]["update_cmd"] == "security" else []
    sys.exit(subprocess.call(["/usr/bin/yum", "--assumeyes", "upgrade", *kind, *held]))
"""
YUM_CRON_SERVICE = """\
[Unit]
Description=Run automatic yum updates as a cron job
ConditionPathExists=!/etc/.no-yum-cron

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/touch /run/lock/yum-cron
ExecStop=/bin/rm -f /run/lock/yum-cron

[Install]
WantedBy=multi-user.target
"""
YUM_CRON_CONF = """\
[commands]
update_cmd = default
download_updates = yes
apply_updates = no
[emitters]
emit_via = stdio
[base]
debuglevel = -2
"""
# The settings that servconf.c of OpenSSH 7.4p1 knows, those that it takes inside Match first.
SSH_IN_MATCH = (
    "acceptenv allowagentforwarding allowgroups allowstreamlocalforwarding allowtcpforwarding allowusers"
    " authenticationmethods authorizedkeyscommand authorizedkeyscommanduser authorizedkeysfile"
    " authorizedprincipalscommand authorizedprincipalscommanduser authorizedprincipalsfile banner chrootdirectory"
    " clientalivecountmax clientaliveinterval denygroups denyusers disableforwarding forcecommand gatewayports"
    " gssapiauthentication hostbasedacceptedkeytypes hostbasedauthentication hostbasedusesnamefrompacketonly ipqos"
    " kbdinteractiveauthentication kerberosauthentication match maxauthtries maxsessions passwordauthentication"
    " permitemptypasswords permitopen permitrootlogin permittty permittunnel permituserrc pubkeyacceptedkeytypes"
    " pubkeyauthentication rekeylimit revokedkeys streamlocalbindmask streamlocalbindunlink trustedusercakeys"
    " x11displayoffset x11forwarding x11uselocalhost"
)
SSH_ELSEWHERE = (
    "addressfamily challengeresponseauthentication ciphers compression fingerprinthash gssapicleanupcredentials"
    " gssapistrictacceptorcheck hostcertificate hostkey hostkeyagent hostkeyalgorithms ignorerhosts"
    " ignoreuserknownhosts kexalgorithms listenaddress logingracetime loglevel macs maxstartups"
    " permituserenvironment pidfile port printlastlog printmotd protocol strictmodes subsystem syslogfacility"
    " tcpkeepalive usedns uselogin usepam useprivilegeseparation versionaddendum xauthlocation"
)
# Ahead of the real daemon: what 7.4 would not read is refused.
SSHD = f"""\
#!/bin/sh
config=/etc/ssh/sshd_config last=
for word in "$@"; do
  case $last in -f) config=$word ;; esac
  last=$word
done
awk -v all=' {SSH_IN_MATCH} ' -v alone=' {SSH_ELSEWHERE} ' '
  {{ key = tolower($1); sub(/=.*/, "", key) }}
  key == "" || key ~ /^#/ {{ next }}
  key == "match" {{ inside = tolower($2) != "all"; next }}
  index(all, " " key " ") {{ next }}
  !index(alone, " " key " ") {{ print FILENAME ": line " FNR ": Bad configuration option: " $1; bad = 1; next }}
  inside {{ print FILENAME ": line " FNR ": Directive " $1 " is not allowed within a Match block"; bad = 1 }}
  END {{ exit bad * 255 }}' "$config" >&2 || exit 255
exec /usr/sbin/sshd.of-debian "$@"
"""
SSHD_CONFIG = """\
HostKey /etc/ssh/ssh_host_rsa_key
HostKey /etc/ssh/ssh_host_ecdsa_key
HostKey /etc/ssh/ssh_host_ed25519_key
SyslogFacility AUTHPRIV
AuthorizedKeysFile .ssh/authorized_keys
PasswordAuthentication yes
ChallengeResponseAuthentication no
UsePAM yes
X11Forwarding yes
AcceptEnv LANG LC_ALL
Subsystem sftp /usr/lib/openssh/sftp-server

AuthorizedKeysCommand /bin/true %u %f
AuthorizedKeysCommandUser nobody
"""
PYTHON_ELSEWHERE = "/opt/amazon-linux/bin/python3"

Content = dict[str, str]


def run(*command: str, cwd: pathlib.Path | None = None) -> None:
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"{' '.join(command)}\n{result.stdout}{result.stderr}")


class Workshop:
    """A folder to build and sign packages in."""

    def __init__(self, root: pathlib.Path) -> None:
        self.root = root
        self.packages = root / "RPMS"
        self.home = root / "gnupg"
        self.home.mkdir(mode=0o700)
        os.environ["GNUPGHOME"] = str(self.home)

    def unpack(self, package: str) -> pathlib.Path:
        """Files of a Debian package from the host's own apt sources."""
        folder = self.root / f"deb-{package}"
        folder.mkdir()
        run("apt-get", "-o", "APT::Sandbox::User=root", "download", package, cwd=folder)
        (archive,) = folder.glob("*.deb")
        run("dpkg-deb", "-x", str(archive), str(folder / "root"))
        return folder / "root"

    def rpm(
        self,
        name: str,
        version: str = "1.0",
        *,
        texts: Content | None = None,
        programs: dict[str, pathlib.Path | str] | None = None,
        provides: tuple[str, ...] = (),
        requires: tuple[str, ...] = (),
        configs: tuple[str, ...] = (),
        before: str = "",
    ) -> None:
        """Build one package: texts are files by path, programs executables by path."""
        tree = self.root / f"tree-{name}-{version}"
        tree.mkdir()
        for path, text in (texts or {}).items():
            target = tree / path.lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text)
            target.chmod(0o644)
        for path, source in (programs or {}).items():
            target = tree / path.lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(source, pathlib.Path):
                shutil.copyfile(source, target)
            else:
                target.write_text(source)
            target.chmod(0o755)
        files = [*(texts or {}), *(programs or {})]
        lines = [
            "%global debug_package %{nil}", "%global __os_install_post %{nil}", "%global _build_id_links none",
            "%define _binary_payload w1.gzdio",
            f"Name: {name}", f"Version: {version}", f"Release: {DIST}", f"Summary: {name} for a test", "License: GPLv3+",
            "AutoReqProv: no", *(f"Provides: {it}" for it in provides), *(f"Requires: {it}" for it in requires),
            "%description", "A stand-in.",
            "%install", f"mkdir -p %{{buildroot}} && cp -a {tree}/. %{{buildroot}}/",
            *(["%pre", before] if before else []),
            "%files", *(f"%config(noreplace) {it}" if it in configs else it for it in files),
        ]  # fmt: skip
        spec = self.root / f"{name}-{version}.spec"
        spec.write_text("\n".join(lines) + "\n")
        run(
            "rpmbuild",
            "-bb",
            "--quiet",
            "--define",
            f"_topdir {self.root}",
            "--define",
            f"_rpmdir {self.packages}",
            str(spec),
        )

    def make_key(self) -> None:
        run(
            "gpg", "--batch", "--pinentry-mode", "loopback", "--passphrase", "",
            "--quick-generate-key", "Amazon Linux of a test", "rsa3072", "sign", "never",
        )  # fmt: skip
        KEY.parent.mkdir(parents=True, exist_ok=True)
        KEY.unlink(missing_ok=True)
        run("gpg", "--batch", "--armor", "--output", str(KEY), "--export")

    def sign(self, *unsigned: str) -> None:
        """Sign every package but the named ones."""
        packages = [str(path) for path in sorted(self.packages.rglob("*.rpm")) if not path.name.startswith(unsigned)]
        run(
            "rpmsign",
            "--define",
            "__gpg /usr/bin/gpg",
            "--define",
            "_gpg_name Amazon Linux of a test",
            "--addsign",
            *packages,
        )


def packages_of_the_release(shop: Workshop) -> None:
    """What the roles install, and what must be there for it to be installable."""
    shop.rpm(
        "system-release",
        RELEASE,
        provides=(f"system-release(releasever) = {RELEASE}",),
        texts={"/etc/amazon-linux-release": ""},
    )
    shop.rpm("debian-underneath", provides=("/bin/sh", "bash", "systemd", "python3-libs"))
    for name in (
        "ca-certificates",
        "procps-ng",
        "less",
        "openssl",
        "kernel",
        "nvidia-driver",
        "python3-dnf",
        "unsigned",
    ):
        shop.rpm(name, texts={f"/usr/share/amazon-linux-test/{name}": "1\n"})
    # the interpreter of a host that has none: a path that Debian does not use
    shop.rpm("python3", "3.9.25", programs={PYTHON_ELSEWHERE: '#!/bin/sh\nexec /usr/bin/python3 "$@"\n'})

    chrony = shop.unpack("chrony")
    shop.rpm(
        "chrony", "4.3",
        programs={"/usr/sbin/chronyd": chrony / "usr/sbin/chronyd", "/usr/bin/chronyc": chrony / "usr/bin/chronyc"},
        texts={"/usr/lib/systemd/system/chronyd.service": CHRONYD_SERVICE, "/etc/chrony.conf": "pool 2.amazon.pool.ntp.org iburst\n"},
        configs=("/etc/chrony.conf",),
    )  # fmt: skip
    if YUM:
        packages_of_yum(shop)
        return
    shop.rpm(
        "dnf-automatic", "4.14.0",
        programs={"/usr/bin/dnf-automatic": DNF_AUTOMATIC},
        texts={
            "/usr/lib/systemd/system/dnf-automatic.service": DNF_AUTOMATIC_SERVICE,
            "/usr/lib/systemd/system/dnf-automatic.timer": DNF_AUTOMATIC_TIMER,
            "/etc/dnf/automatic.conf": DNF_AUTOMATIC_CONF,
        },
        configs=("/etc/dnf/automatic.conf",),
    )  # fmt: skip

    runc, containerd, docker, tini = (shop.unpack(name) for name in ("runc", "containerd", "docker.io", "tini"))
    shop.rpm("runc", "1.1.5", programs={"/usr/bin/runc": runc / "usr/sbin/runc"})
    shop.rpm(
        "containerd", "1.6.20",
        requires=("runc",),
        programs={
            f"/usr/bin/{it}": containerd / "usr/bin" / it
            for it in ("containerd", "containerd-shim", "containerd-shim-runc-v1", "containerd-shim-runc-v2", "ctr")
        },
        texts={
            "/usr/lib/systemd/system/containerd.service": (containerd / "lib/systemd/system/containerd.service").read_text(),
        },
    )  # fmt: skip
    shop.rpm(
        "docker", "25.0.13",
        requires=("runc", "containerd"),
        before="getent group docker >/dev/null || groupadd --system docker",
        programs={
            "/usr/bin/docker": docker / "usr/bin/docker",
            "/usr/bin/dockerd": docker / "usr/sbin/dockerd",
            "/usr/bin/docker-proxy": docker / "usr/sbin/docker-proxy",
            "/usr/libexec/docker/docker-init": tini / "usr/bin/tini-static",
            "/usr/bin/docker-init": tini / "usr/bin/tini-static",
        },
        texts={
            "/usr/lib/systemd/system/docker.service": DOCKER_SERVICE,
            "/usr/lib/systemd/system/docker.socket": DOCKER_SOCKET,
            "/etc/sysconfig/docker": 'DAEMON_MAXFILES=1048576\nOPTIONS="--default-ulimit nofile=32768:65536"\n',
            "/etc/sysconfig/docker-storage": "DOCKER_STORAGE_OPTIONS=\n",
        },
        configs=("/etc/sysconfig/docker", "/etc/sysconfig/docker-storage"),
    )  # fmt: skip
    helper = shop.unpack("amazon-ecr-credential-helper")
    shop.rpm(
        "amazon-ecr-credential-helper", "0.9.1",
        programs={"/usr/bin/docker-credential-ecr-login": helper / "usr/bin/docker-credential-ecr-login"},
    )  # fmt: skip


def packages_of_yum(shop: Workshop) -> None:
    """What only Amazon Linux 2 has; no container engine, as no host of the platform with one runs it."""
    shop.rpm(
        "yum-cron", "3.4.3",
        programs={"/usr/sbin/yum-cron": YUM_CRON},
        texts={"/usr/lib/systemd/system/yum-cron.service": YUM_CRON_SERVICE, "/etc/yum/yum-cron.conf": YUM_CRON_CONF},
        configs=("/etc/yum/yum-cron.conf",),
    )  # fmt: skip
    for name in NETWORK_TOOLS:
        shop.rpm(name, texts={f"/usr/share/amazon-linux-test/{name}": "1\n"})


def packages_of_the_updates(shop: Workshop) -> None:
    """What `latest` has beyond the release."""
    for name in ("openssl", "less", "kernel", "nvidia-driver"):
        shop.rpm(name, "99.0", texts={f"/usr/share/amazon-linux-test/{name}": "2\n"})


def advisories() -> str:
    """Updates by kind: one that is wanted, some that are held, one that is no security matter."""
    updates = {"openssl": "security", "kernel": "security", "nvidia-driver": "security", "less": "bugfix"}
    machine = os.uname().machine
    entries = "".join(
        f"""<update from="test" status="final" type="{kind}" version="1"><id>ALAS2023-2026-{number}</id><title>{name}</title>
<issued date="2026-01-01 00:00:00"/><severity>important</severity><summary>{name}</summary><description>{name}</description>
<pkglist><collection short="test"><name>test</name><package name="{name}" version="99.0" release="{DIST}" epoch="0"
 arch="{machine}"><filename>{name}-99.0-{DIST}.{machine}.rpm</filename></package></collection></pkglist></update>"""
        for number, (name, kind) in enumerate(updates.items(), 1000)
    )
    return f'<?xml version="1.0" encoding="UTF-8"?>\n<updates>{entries}</updates>\n'


def make_repositories(shop: Workshop) -> None:
    shop.make_key()
    packages_of_the_release(shop)
    released = set(shop.packages.rglob("*.rpm"))
    packages_of_the_updates(shop)
    shop.sign("unsigned")
    for name in (RELEASE, "latest"):
        folder = REPOSITORIES / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for package in shop.packages.rglob("*.rpm"):
            if name == "latest" or package in released:
                os.link(package, folder / package.name)
        run("createrepo_c", "--quiet", str(folder))
    (shop.root / "updateinfo.xml").write_text(advisories())
    run("modifyrepo_c", str(shop.root / "updateinfo.xml"), str(REPOSITORIES / "latest" / "repodata"))


def make_host() -> None:
    """The host's names, its rpm database and its repository."""
    run("rpm", "--import", str(KEY))
    pathlib.Path("/etc/yum.repos.d").mkdir(exist_ok=True)
    pathlib.Path("/etc/yum.repos.d/amazonlinux.repo").write_text(REPOSITORY)
    base = REPOSITORIES / RELEASE
    preinstalled = ("system-release", "debian-underneath", "openssl", "less", "kernel", "nvidia-driver")
    run(
        "rpm",
        "--upgrade",
        "--force-debian",
        "--replacepkgs",
        *(str(next(base.glob(f"{name}-[0-9]*.rpm"))) for name in preinstalled),
    )
    # a link to /usr/lib on Debian; the package there must not change
    os_release = pathlib.Path("/etc/os-release")
    os_release.unlink(missing_ok=True)
    os_release.write_text(OS_RELEASE_2 if YUM else OS_RELEASE)
    pathlib.Path("/etc/system-release").write_text(SYSTEM_RELEASE)
    pathlib.Path("/etc/debian_version").unlink(missing_ok=True)
    if YUM:
        make_host_of_yum()


def program(path: str, text: str) -> None:
    target = pathlib.Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    target.write_text(text)
    target.chmod(0o755)


def make_host_of_yum() -> None:
    """yum without a binding for anyone's Python, a python3 that is too old, and the SSH daemon."""
    program("/usr/bin/yum", YUM_PROGRAM)
    daemon = pathlib.Path("/usr/sbin/sshd")
    daemon.rename("/usr/sbin/sshd.of-debian")
    program(str(daemon), SSHD)
    pathlib.Path("/etc/ssh/sshd_config").write_text(SSHD_CONFIG)
    shutil.rmtree("/etc/ssh/sshd_config.d")
    # last: this program runs on it
    real = pathlib.Path("/usr/bin/python3").resolve()
    pathlib.Path(PYTHON_OF_YUM).parent.mkdir(parents=True, exist_ok=True)
    real.rename(PYTHON_OF_YUM)
    for path in pathlib.Path("/usr/bin").glob("python3*"):
        path.unlink()
    program("/usr/bin/python3", PYTHON_3_7)


def main() -> None:
    if DONE.exists():
        return
    # Debian keeps rpm's database in the home folder of whoever asks; a timer has none
    pathlib.Path("/etc/rpm").mkdir(exist_ok=True)
    pathlib.Path("/etc/rpm/macros").write_text("%_dbpath /var/lib/rpm\n")
    # beside the repositories, which then are links
    REPOSITORIES.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=REPOSITORIES) as folder:
        try:
            make_repositories(Workshop(pathlib.Path(folder)))
        finally:
            subprocess.run(["gpgconf", "--kill", "gpg-agent"], capture_output=True)
    make_host()
    DONE.touch()
    print("made")


if __name__ == "__main__":
    main()
