"""A package index (PEP 503) of what the controller's lock names, for the Bastion's workspace."""

from __future__ import annotations

import html
import pathlib
import re
import tempfile
import urllib.parse

from lab.artifacts import store
from lab.console import step
from lab.settings import CHECKOUT

LOCK = CHECKOUT / "requirements" / "controller.txt"


def project(wheel: str) -> str:
    """The normal form of the name of the project that a wheel belongs to."""
    return re.sub(r"[-_.]+", "-", wheel.split("-", maxsplit=1)[0]).lower()


def page(title: str, links: list[tuple[str, str]]) -> str:
    """One page of the index: links with their texts."""
    lines = "".join(f'<a href="{html.escape(href)}">{html.escape(text)}</a><br>\n' for href, text in links)
    return f'<!DOCTYPE html>\n<html><head><meta name="pypi:repository-version" content="1.0"><title>{title}</title></head>\n<body>\n{lines}</body></html>\n'


def write(folder: pathlib.Path, wheels: list[pathlib.Path]) -> None:
    """The index of these wheels, which move into it."""
    projects: dict[str, list[pathlib.Path]] = {}
    for wheel in wheels:
        projects.setdefault(project(wheel.name), []).append(wheel)
    folder.mkdir(parents=True)
    (folder / "index.html").write_text(page("simple", [(f"{name}/", name) for name in sorted(projects)]))
    for name, files in projects.items():
        (folder / name).mkdir()
        links = [(f"{urllib.parse.quote(file.name)}#sha256={store.digest_of(file)}", file.name) for file in files]
        (folder / name / "index.html").write_text(page(name, links))
        for file in files:
            file.rename(folder / name / file.name)


def simple(minor: str, machine: str) -> store.Made:
    """The index, with wheels for one Python."""

    def build(folder: pathlib.Path) -> None:
        with (
            step("downloading the packages of the Bastion's workspace"),
            tempfile.TemporaryDirectory(dir=folder.parent) as work,
        ):
            wheels = store.download(store.locked(LOCK), pathlib.Path(work) / "wheels", machine, minor)
            write(folder / "simple", wheels)

    return store.made("index", [LOCK.read_bytes(), f"{minor} {machine}".encode(), store.source_of(__name__)], build)
