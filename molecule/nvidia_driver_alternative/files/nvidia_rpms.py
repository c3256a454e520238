"""Makes NVIDIA's repository for Amazon Linux 2023 of the lab's stub packages: signed RPMs at /srv/mirror/nvidia.

nvidia_rpms.py REPOSITORY VERSION...    as root on the stand-in of molecule/amazon_linux
"""

from __future__ import annotations

import os
import pathlib
import platform
import re
import subprocess
import sys
import tempfile
import urllib.request

TARGET = pathlib.Path("/srv/mirror/nvidia/compute/cuda/repos/amzn2023") / {"aarch64": "sbsa"}.get(
    platform.machine(), platform.machine()
)
RELEASE = "1.amzn2023"
KERNEL = platform.release()
# dnf's own plugin is no package of Debian's that the lab has: the same list, the same command, the same effect.
VERSIONLOCK = '''"""Packages that stay at their version: /etc/dnf/plugins/versionlock.list, and `dnf versionlock add|delete NAME...`."""
import os

import dnf
import dnf.cli
import dnf.subject

LIST = "/etc/dnf/plugins/versionlock.list"


def entries():
    if not os.path.exists(LIST):
        return []
    with open(LIST) as stream:
        return [line.strip() for line in stream if line.strip() and not line.startswith("#")]


class VersionLock(dnf.Plugin):
    name = "versionlock"

    def __init__(self, base, cli):
        super().__init__(base, cli)
        if cli is not None:
            cli.register_command(Command)

    def sack(self):
        for entry in entries():
            subject = dnf.subject.Subject(entry)
            names = [found.name for found in subject.get_nevra_possibilities()]
            every = self.base.sack.query().available().filter(name=names)
            self.base.sack.add_excludes(every.difference(subject.get_best_query(self.base.sack)))


class Command(dnf.cli.Command):
    aliases = ("versionlock",)
    summary = "keep packages at their version"

    @staticmethod
    def set_argparser(parser):
        parser.add_argument("act", choices=["add", "delete"])
        parser.add_argument("names", nargs="+")

    def configure(self):
        self.cli.demands.sack_activation = True

    def run(self):
        found = entries()
        for package in self.base.sack.query().installed().filter(name=self.opts.names):
            line = "%s-%s:%s-%s.*" % (package.name, package.epoch, package.version, package.release)
            if self.opts.act == "add" and line not in found:
                found.append(line)
        if self.opts.act == "delete":
            found = [line for line in found if dnf.subject.Subject(line).get_nevra_possibilities()[0].name not in self.opts.names]
        os.makedirs(os.path.dirname(LIST), exist_ok=True)
        with open(LIST, "w") as stream:
            stream.write("".join(line + "\\n" for line in found))
'''


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout


class Shop:
    """A folder in which packages are unpacked, built and signed."""

    def __init__(self, root: pathlib.Path, repository: str) -> None:
        self.root, self.repository = root, repository
        self.index = urllib.request.urlopen(f"{repository}Packages").read().decode()

    def files(self, name: str, version: str = "") -> pathlib.Path:
        """What a stub package of the lab holds."""
        found = re.search(rf"^Filename: \./({re.escape(name)}_{re.escape(version)}.*\.deb)$", self.index, re.MULTILINE)
        assert found, (name, version)
        archive = self.root / found[1]
        archive.write_bytes(urllib.request.urlopen(f"{self.repository}{found[1]}").read())
        tree = archive.with_suffix("")
        run("dpkg-deb", "--extract", str(archive), str(tree))
        return tree

    def rpm(
        self, name: str, version: str, tree: pathlib.Path, *lines: str, after: str = "", before_end: str = ""
    ) -> None:
        files = [
            f"/{path.relative_to(tree)}" for path in sorted(tree.rglob("*")) if path.is_symlink() or path.is_file()
        ]
        spec = self.root / f"{name}-{version}.spec"
        spec.write_text("\n".join([
            "%global debug_package %{nil}", "%global __os_install_post %{nil}", "%global _build_id_links none",
            "%define _binary_payload w1.gzdio",
            f"Name: {name}", f"Version: {version}", f"Release: {RELEASE}", f"Summary: {name} for a test", "License: GPLv3+",
            "AutoReqProv: no", *lines, "%description", "A stand-in.",
            "%install", f"mkdir -p %{{buildroot}} && cp -a {tree}/. %{{buildroot}}/",
            *(["%post", after] if after else []), *(["%preun", before_end] if before_end else []),
            "%files", *files,
        ]) + "\n")  # fmt: skip
        run(
            "rpmbuild", "-bb", "--quiet", "--define", f"_topdir {self.root}", "--define", f"_rpmdir {TARGET}", str(spec)
        )


def empty(root: pathlib.Path, name: str, files: dict[str, str]) -> pathlib.Path:
    tree = root / name
    for path, text in files.items():
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        (tree / path).write_text(text)
    return tree


def main(repository: str, versions: list[str]) -> None:
    TARGET.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        shop = Shop(root, repository)
        for version in versions:
            shop.rpm(
                "kmod-nvidia-open-dkms", version, shop.files("nvidia-kernel-open-dkms", version), "Requires: dkms",
                after=f"dkms autoinstall -v {version}", before_end="[ $1 -gt 0 ] || dkms remove",
            )  # fmt: skip
            library = shop.files("libnvidia-ml1", version)
            (library / "usr").rename(root / "library")
            (library / "usr").mkdir()
            next((root / "library/lib").iterdir()).rename(library / "usr/lib64")
            (root / "library/lib").rmdir()
            (root / "library").rmdir()
            shop.rpm("libnvidia-ml", version, library)
            shop.rpm("nvidia-persistenced", version, shop.files("nvidia-persistenced", version))
            shop.rpm(
                "nvidia-driver-cuda",
                version,
                shop.files("nvidia-driver-cuda", version),
                f"Requires: libnvidia-ml = {version}",
            )
        shop.rpm("dkms", "3.2.0", shop.files("dkms"))
        line = ".".join(KERNEL.split(".")[:2])
        headers = empty(root, "headers", {f"usr/lib/modules/{KERNEL}/build/Makefile": "# a stub\n"})
        shop.rpm(
            f"kernel{line}-devel",
            "1.0",
            headers,
            f"Provides: kernel{line}-devel-{KERNEL}",
            f"Provides: kernel{line}-modules-extra-{KERNEL}",
        )
        plugin = empty(root, "plugin", {"usr/lib/python3/dist-packages/dnf-plugins/versionlock.py": VERSIONLOCK})
        shop.rpm("python3-dnf-plugin-versionlock", "4.3.0", plugin, "Provides: dnf-command(versionlock)")

        os.environ["GNUPGHOME"] = str(root / "gnupg")
        (root / "gnupg").mkdir(mode=0o700)
        run(
            "gpg", "--batch", "--passphrase", "", "--quick-generate-key", "NVIDIA of a test", "rsa3072", "sign", "never"
        )
        (TARGET / "D42D0685.pub").write_text(run("gpg", "--batch", "--armor", "--export"))
        packages = [str(path) for path in TARGET.rglob("*.rpm")]
        run(
            "rpmsign",
            "--define",
            "__gpg /usr/bin/gpg",
            "--define",
            "_gpg_name NVIDIA of a test",
            "--addsign",
            *packages,
        )
        run("gpgconf", "--kill", "gpg-agent")
    run("createrepo_c", "--quiet", str(TARGET))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
