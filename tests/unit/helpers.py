"""What the tests of the project's own rules share."""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]


def script(name: str) -> ModuleType:
    """A program of scripts/ as a module; its file has no suffix."""
    loader = SourceFileLoader(f"script_{name.replace('-', '_')}", str(ROOT / "scripts" / name))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)

    sys.modules[loader.name] = module  # dataclasses look their module up
    loader.exec_module(module)
    return module
