"""Makes an apt repository in /srv/repacked of packages that are installed, out of their own files, and removes nothing.

repack.py PACKAGE...
"""

from __future__ import annotations

import hashlib
import pathlib
import shutil
import subprocess
import sys

ROOT = pathlib.Path("/srv/repacked")
INFO = pathlib.Path("/var/lib/dpkg/info")
SCRIPTS = ("preinst", "postinst", "prerm", "postrm", "triggers", "conffiles")
LEFT_OUT = ("Status:", "Conffiles:", " ")


def out(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def repack(name: str) -> pathlib.Path:
    tree = ROOT / name
    (tree / "DEBIAN").mkdir(parents=True)
    description = [line for line in out("dpkg-query", "--status", name).splitlines() if not line.startswith(LEFT_OUT)]
    (tree / "DEBIAN/control").write_text("\n".join(description) + "\n")
    for script in SCRIPTS:
        if (INFO / f"{name}.{script}").exists():
            shutil.copy2(INFO / f"{name}.{script}", tree / "DEBIAN" / script)
    for path in map(pathlib.Path, out("dpkg-query", "--listfiles", name).splitlines()):
        target = tree / str(path).lstrip("/")
        if path.is_dir() and not path.is_symlink():
            target.mkdir(parents=True, exist_ok=True)
        elif path.exists() or path.is_symlink():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, target, follow_symlinks=False)
    made = ROOT / f"{name}.deb"
    out("dpkg-deb", "-Znone", "--build", str(tree), str(made))
    return made


def main(names: list[str]) -> None:
    ROOT.mkdir()
    with (ROOT / "Packages").open("w") as index:
        for made in map(repack, names):
            digest = hashlib.sha256(made.read_bytes()).hexdigest()
            index.write(out("dpkg-deb", "--field", str(made)))
            index.write(f"Filename: ./{made.name}\nSize: {made.stat().st_size}\nSHA256: {digest}\n\n")
    pathlib.Path("/etc/apt/sources.list.d/repacked.list").write_text(f"deb [trusted=yes] file:{ROOT} ./\n")


if __name__ == "__main__":
    main(sys.argv[1:])
