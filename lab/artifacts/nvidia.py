"""What a host with a card downloads: stub packages of NVIDIA's driver and container toolkit, in two signed repositories.

Names, paths and dependencies are those of NVIDIA's repositories for Debian 12, compute-only as its installation guide has
it; the programs are those of lab/nvidia, and the kernel module is an ELF file that modinfo can read and nothing can load.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import pathlib
import platform
import re
import struct
import tarfile
from collections.abc import Iterator, Mapping

from lab.artifacts import signing, store
from lab.engine import Engine
from lab.settings import MIRROR

STUBS = pathlib.Path(__file__).resolve().parent.parent / "nvidia"
# A branch in two versions, and a newer branch, to which nothing may upgrade by itself.
DRIVERS = ("580.95.05", "580.105.08", "590.48.01")
DRIVER = DRIVERS[0]
TOOLKITS = ("1.18.1", "1.19.0")
TOOLKIT = TOOLKITS[0]
FOLDERS = {"x86_64": "x86_64", "aarch64": "sbsa"}  # of CUDA's repository
TRIPLETS = {"x86_64": "x86_64-linux-gnu", "aarch64": "aarch64-linux-gnu"}
MODULES = ("nvidia", "nvidia-uvm", "nvidia-modeset", "nvidia-drm")
KEYS = {"cuda": "3bf863cc.pub", "toolkit": "gpgkey"}

MODPROBE = """# There is no such module: what the kernel would do is done by a program.
install nvidia /usr/lib/nemo-lab/nvidia-module load
remove nvidia /usr/lib/nemo-lab/nvidia-module remove
""" + "".join(f"{verb} {name.replace('-', '_')} /bin/true\n" for name in MODULES[1:] for verb in ("install", "remove"))
# As Ubuntu's package has it: the daemon runs, and persistence mode stays off.
PERSISTENCED = """[Unit]
Description=NVIDIA Persistence Daemon

[Service]
Type=forking
PIDFile=/run/nvidia-persistenced/nvidia-persistenced.pid
ExecStart=/usr/bin/nvidia-persistenced --no-persistence-mode --verbose

[Install]
WantedBy=multi-user.target
"""
CDI_SERVICE = """[Unit]
Description=Refresh NVIDIA CDI specification file
ConditionPathExists=/usr/bin/nvidia-smi

[Service]
Type=oneshot
EnvironmentFile=-/etc/nvidia-container-toolkit/nvidia-cdi-refresh.env
Environment=NVIDIA_CTK_CDI_OUTPUT_FILE_PATH=/var/run/cdi/nvidia.yaml
ExecCondition=/usr/bin/grep -qE '/nvidia.ko' /lib/modules/%v/modules.dep
ExecStart=/usr/bin/nvidia-ctk cdi generate
CapabilityBoundingSet=CAP_SYS_MODULE CAP_SYS_ADMIN CAP_MKNOD

[Install]
WantedBy=multi-user.target
"""
CDI_PATH = """[Unit]
Description=Trigger CDI refresh on NVIDIA driver install / uninstall events

[Path]
PathChanged=/lib/modules/%v/modules.dep
PathChanged=/lib/modules/%v/modules.dep.bin

[Install]
WantedBy=multi-user.target
"""
CONFIG = """[nvidia-container-runtime]
mode = "auto"
runtimes = ["runc", "crun"]
"""
BUILD = '#!/bin/sh\nset -e\n[ "$1" = configure ] || exit 0\ndkms autoinstall -v {}\n'
UNBUILD = '#!/bin/sh\nset -e\n[ "$1" != remove ] || dkms remove\n'


def units(*names: str) -> Mapping[str, str]:
    """Scripts of a package that has units, as debhelper writes them in essence."""
    words = " ".join(names)
    return {
        "postinst": f'#!/bin/sh\nset -e\n[ "$1" = configure ] || exit 0\n[ -d /run/systemd/system ] || exit 0\n'
        f"systemctl daemon-reload\nsystemctl --quiet enable {words}\nsystemctl restart {words} || true\n",
        "prerm": f'#!/bin/sh\nset -e\n[ "$1" = remove ] || exit 0\n[ -d /run/systemd/system ] || exit 0\n'
        f"systemctl --quiet disable --now {words} || true\n",
    }


class Package:
    """One package: what it needs, holds and does."""

    def __init__(
        self, name: str, version: str, depends: str = "", files: Mapping[str, bytes | str] | None = None,
        scripts: Mapping[str, str] | None = None, links: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        self.name, self.version, self.depends = name, version, depends
        self.files, self.scripts, self.links = files or {}, scripts or {}, links or {}

    def control(self, architecture: str) -> str:
        fields = {
            "Package": self.name, "Version": self.version, "Architecture": architecture,
            "Maintainer": "nemo lab <lab@localhost>", "Section": "non-free/kernel", "Priority": "optional",
            "Depends": self.depends, "Description": "a stub of the nemo lab",
        }  # fmt: skip
        return "".join(f"{name}: {value}\n" for name, value in fields.items() if value)

    def build(self, architecture: str) -> bytes:
        """The package as a file."""
        control = _tar(
            {"control": (self.control(architecture), 0o644)}
            | {name: (text, 0o755) for name, text in self.scripts.items()}
        )
        data = _tar({path: (content, _mode(path)) for path, content in self.files.items()}, self.links)
        members = (("debian-binary", b"2.0\n"), ("control.tar.gz", control), ("data.tar.gz", data))
        return b"!<arch>\n" + b"".join(_member(name, content) for name, content in members)


def elf(machine: str, fields: Mapping[str, str]) -> bytes:
    """A relocatable ELF file with a section .modinfo, which is all that modinfo and depmod want to know of a module."""
    info = b"".join(f"{name}={value}".encode() + b"\0" for name, value in fields.items())
    names = b"\0.modinfo\0.strtab\0.symtab\0.shstrtab\0"
    offset = 64
    sections = [struct.pack("<IIQQQQIIQQ", *[0] * 10)]
    body = b""
    for name, kind, content, link, size in (
        (b".modinfo", 1, info, 0, 0), (b".strtab", 3, b"\0", 0, 0), (b".symtab", 2, b"\0" * 24, 2, 24), (b".shstrtab", 3, names, 0, 0),
    ):  # fmt: skip
        sections.append(
            struct.pack(
                "<IIQQQQIIQQ",
                names.index(b"\0" + name + b"\0") + 1,
                kind,
                2,
                0,
                offset + len(body),
                len(content),
                link,
                0,
                8,
                size,
            )
        )
        body += content + b"\0" * (-len(content) % 8)
    number = {"x86_64": 62, "aarch64": 183}[machine]
    header = b"\x7fELF\x02\x01\x01" + b"\0" * 9
    header += struct.pack(
        "<HHIQQQIHHHHHH", 1, number, 1, 0, 0, offset + len(body), 0, 64, 0, 0, 64, len(sections), len(sections) - 1
    )
    return header + body + b"".join(sections)


def drivers(machine: str) -> Iterator[Package]:
    """The packages of every version of the driver that the roles install, and what those depend on."""
    library = f"usr/lib/{TRIPLETS[machine]}"
    for version in DRIVERS:
        whole = f"{version}-1"
        branch = version.partition(".")[0]
        modules = {
            f"usr/src/nvidia-{version}/{name}.ko": elf(
                machine,
                {"license": "Dual MIT/GPL", "version": version, "description": "a stub of the nemo lab", "depends": "",
                 "name": name.replace("-", "_"), "vermagic": "any SMP mod_unload"},
            )
            for name in MODULES
        }  # fmt: skip
        yield Package(
            "nvidia-kernel-open-dkms", whole, f"dkms, firmware-nvidia-gsp (= {whole}), nvidia-firmware-{branch}-{version}",
            {**modules, "usr/lib/nemo-lab/nvidia-module": _stub("nvidia-module"), "etc/modprobe.d/nvidia-lab.conf": MODPROBE},
            {"postinst": BUILD.format(version), "prerm": UNBUILD},
        )  # fmt: skip
        yield Package("firmware-nvidia-gsp", whole, "", {f"usr/lib/firmware/nvidia/{version}/gsp_ga10x.bin": b"stub\n"})
        # Ubuntu's name for the firmware: no such package has another version, or belongs to another branch.
        yield Package(f"nvidia-firmware-{branch}-{version}", whole)
        for name, file in (("libnvidia-ml1", "libnvidia-ml"), ("libcuda1", "libcuda")):
            yield Package(
                name,
                whole,
                "",
                {f"{library}/{file}.so.{version}": b"a stub\n"},
                links={f"{library}/{file}.so.1": f"{file}.so.{version}"},
            )
        yield Package(
            "nvidia-persistenced", whole, "",
            {"usr/bin/nvidia-persistenced": _stub("nvidia-persistenced"), "usr/lib/systemd/system/nvidia-persistenced.service": PERSISTENCED},
            units("nvidia-persistenced.service"),
        )  # fmt: skip
        yield Package(
            "nvidia-driver-cuda", whole,
            f"libcuda1 (= {whole}), libnvidia-ml1 (= {whole}), nvidia-persistenced (= {whole})", {"usr/bin/nvidia-smi": _stub("nvidia-smi")},
        )  # fmt: skip
        yield Package("nvidia-open", whole, f"nvidia-kernel-open-dkms (= {whole}), nvidia-driver-cuda (= {whole})")
        yield Package(
            f"nvidia-driver-pinning-{version}", whole, "",
            {f"etc/apt/preferences.d/nvidia-driver-pinning-{version}.pref": f"Package: *nvidia* libcuda1\nPin: version {version}-*\nPin-Priority: 1000\n"},
        )  # fmt: skip
        if not any(other.startswith(f"{branch}.") for other in DRIVERS[DRIVERS.index(version) + 1 :]):
            yield Package(
                f"nvidia-driver-pinning-{branch}", whole, "",
                {f"etc/apt/preferences.d/nvidia-driver-pinning-{branch}.pref": f"Package: *nvidia* libcuda1\nPin: version {branch}.*\nPin-Priority: 1000\n"},
            )  # fmt: skip
    # Of Debian itself: what builds modules, and the headers of the kernel that the lab's hosts run on.
    yield Package("dkms", "3.0.10-8", "", {"usr/sbin/dkms": _stub("dkms")})
    kernel = platform.release()
    if re.fullmatch(r"[a-z0-9][a-z0-9.+-]+", kernel):  # else no package can bear its name
        folder = f"usr/src/linux-headers-{kernel}"
        yield Package(
            f"linux-headers-{kernel}",
            "1.0-1",
            "",
            {f"{folder}/Makefile": b"# a stub\n"},
            links={f"usr/lib/modules/{kernel}/build": f"/{folder}"},
        )


def toolkits() -> Iterator[Package]:
    """The packages of the container toolkit."""
    for version in TOOLKITS:
        whole = f"{version}-1"

        def stub(name: str, version: str = version) -> bytes:
            return _stub(name).replace(b"@VERSION@", version.encode())

        yield Package("libnvidia-container1", whole, "", {"usr/share/doc/libnvidia-container1/README": b"a stub\n"})
        yield Package(
            "libnvidia-container-tools", whole, f"libnvidia-container1 (>= {whole})",
            {"usr/bin/nvidia-container-cli": f'#!/bin/sh\necho "cli-version: {version}"\n'},
        )  # fmt: skip
        yield Package(
            "nvidia-container-toolkit-base", whole, "python3",
            {
                "usr/bin/nvidia-ctk": stub("nvidia_ctk.py"),
                "usr/bin/nvidia-container-runtime": stub("nvidia_container_runtime.py"),
                "etc/nvidia-container-runtime/config.toml": CONFIG,
                "usr/lib/systemd/system/nvidia-cdi-refresh.service": CDI_SERVICE,
                "usr/lib/systemd/system/nvidia-cdi-refresh.path": CDI_PATH,
            },
            units("nvidia-cdi-refresh.path", "nvidia-cdi-refresh.service"),
        )  # fmt: skip
        yield Package(
            "nvidia-container-toolkit", whole, f"nvidia-container-toolkit-base (= {whole}), libnvidia-container-tools (>= {whole})",
            {"usr/bin/nvidia-container-runtime-hook": "#!/bin/sh\nexit 0\n"},
        )  # fmt: skip


def repository(folder: pathlib.Path, packages: Iterator[Package], architecture: str, origin: str) -> None:
    """A flat repository without its signature."""
    folder.mkdir(parents=True)
    index = ""
    for package in packages:
        name = f"{package.name}_{package.version}_{architecture}.deb"
        data = package.build(architecture)
        (folder / name).write_bytes(data)
        digest = hashlib.sha256(data).hexdigest()
        index += f"{package.control(architecture)}Filename: ./{name}\nSize: {len(data)}\nSHA256: {digest}\n\n"
    (folder / "Packages").write_text(index)
    listed = f" {hashlib.sha256(index.encode()).hexdigest()} {len(index.encode())} Packages\n"
    (folder / "Release").write_text(
        f"Origin: {origin}\nLabel: {origin}\nArchitectures: {architecture}\nDate: Thu, 01 Jan 2026 00:00:00 UTC\nSHA256:\n{listed}"
    )


def paths(machine: str, architecture: str) -> dict[str, str]:
    """Where the repositories are on the mirror, as upstream has them below its own names."""
    return {
        "cuda": f"nvidia/compute/cuda/repos/debian12/{FOLDERS[machine]}",
        "toolkit": f"nvidia/libnvidia-container/stable/deb/{architecture}",
    }


def repositories(machine: str, architecture: str) -> store.Made:
    """Both repositories, unsigned."""

    def build(folder: pathlib.Path) -> None:
        where = paths(machine, architecture)
        repository(folder / where["cuda"], drivers(machine), architecture, "NVIDIA")
        repository(folder / where["toolkit"], toolkits(), architecture, "https://nvidia.github.io/libnvidia-container")

    stubs = [path.read_bytes() for path in sorted(STUBS.iterdir()) if path.is_file()]
    return store.made(
        "nvidia", [machine.encode(), platform.release().encode(), store.source_of(__name__), *stubs], build
    )


class Signed:
    """The keys of the two repositories, and what they signed."""

    def __init__(self, engine: Engine, base: str, made: store.Made, machine: str, architecture: str) -> None:
        self.keys = {name: signing.key(engine, base, f"nvidia-{name}") for name in KEYS}
        where = paths(machine, architecture)

        def build(folder: pathlib.Path) -> None:
            for name, path in where.items():
                (folder / path).mkdir(parents=True)
                release = made.folder / path / "Release"
                (folder / path / "Release.gpg").write_bytes(signing.sign(engine, base, self.keys[name], release))
            public = {name: signing.public(text) for name, text in self.keys.items()}
            (folder / where["cuda"] / KEYS["cuda"]).write_text(public["cuda"])
            (folder / "nvidia/libnvidia-container" / KEYS["toolkit"]).write_text(public["toolkit"])

        inputs = [made.key.encode(), *(text.encode() for text in self.keys.values()), store.source_of(signing.__name__)]
        self.files = store.made("signed-nvidia", inputs, build)
        self.machine, self.architecture = machine, architecture

    def describe(self) -> dict[str, str | list[str]]:
        """As the roles' inputs want it."""
        where = paths(self.machine, self.architecture)
        described: dict[str, str | list[str]] = {
            "driver_version": DRIVER,
            "driver_versions": list(DRIVERS),
            "toolkit_version": TOOLKIT,
            "toolkit_versions": list(TOOLKITS),
        }
        for name, text in self.keys.items():
            described[f"{name}_repository"] = f"http://{MIRROR}/{where[name]}/"
            described[f"{name}_signing_key"] = signing.public(text)
            described[f"{name}_signing_key_fingerprint"] = signing.fingerprint(text)
        return described


def _stub(name: str) -> bytes:
    return (STUBS / name).read_bytes()


def _mode(path: str) -> int:
    return 0o755 if "/bin/" in path or "/sbin/" in path or path.startswith("usr/lib/nemo-lab/") else 0o644


def _member(name: str, content: bytes) -> bytes:
    header = f"{name:<16}{store.MTIME:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n"
    return header.encode() + content + b"\n" * (len(content) % 2)


def _tar(files: Mapping[str, tuple[bytes | str, int]], links: Mapping[str, str] | None = None) -> bytes:
    buffer = io.BytesIO()
    with (
        gzip.GzipFile(filename="", fileobj=buffer, mode="wb", compresslevel=store.LEVEL, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w|", format=tarfile.GNU_FORMAT) as archive,
    ):
        folders = {str(parent) for path in (*files, *(links or {})) for parent in pathlib.PurePosixPath(path).parents}
        for name in sorted(folders):
            info = tarfile.TarInfo("./" if name == "." else f"./{name}/")
            info.type, info.mode, info.mtime = tarfile.DIRTYPE, 0o755, store.MTIME
            archive.addfile(info)
        for path, (content, mode) in files.items():
            data = content.encode() if isinstance(content, str) else content
            store.add(archive, f"./{path}", io.BytesIO(data), len(data), mode)
        for path, target in (links or {}).items():
            info = tarfile.TarInfo(f"./{path}")
            info.type, info.linkname, info.mtime = tarfile.SYMTYPE, target, store.MTIME
            archive.addfile(info)
    return buffer.getvalue()
