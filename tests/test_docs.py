"""The reference pages: built without a warning, and with every public name."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import TypeVar

import pytest
from checkout import ROOT

import wakesleep_ext

pytest.importorskip("sphinx")

from sphinx.util.inventory import InventoryFile

pytestmark = [pytest.mark.source_tree, pytest.mark.filterwarnings("default")]

DOCS = ROOT / "docs"


def public_names(module: ModuleType) -> set[str]:
    """What it defines, or says that it has."""
    declared = getattr(module, "__all__", None)
    if declared is None:
        own = {name for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__}
        declared = [name for name in own if not name.startswith("_") and not isinstance(getattr(module, name), TypeVar)]
    return {f"{module.__name__}.{name}" for name in declared}


def test_reference_pages_have_every_public_name_and_no_warning(tmp_path: Path) -> None:
    options = ["--quiet", "--fail-on-warning", "--fresh-env", "--doctree-dir", str(tmp_path / "doctrees")]
    command = [sys.executable, "-m", "sphinx", *options, str(DOCS), str(tmp_path / "html")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    inventory = InventoryFile.loads((tmp_path / "html/objects.inv").read_bytes(), uri="")
    documented = {name for kind in inventory.data.values() for name in kind}
    modules = [
        importlib.import_module(found.name)
        for found in pkgutil.walk_packages(wakesleep_ext.__path__, "wakesleep_ext.")
        if not any(part.startswith("_") for part in found.name.split("."))
    ]
    assert len(modules) > 20
    missing = set().union(*map(public_names, modules)) - documented
    ours = {f"wakesleep_ext.{name}" for name in wakesleep_ext.__all__ if name != "__version__"}
    elsewhere = {name.rpartition(".")[2] for name in documented}
    missing |= {name for name in ours if name.rpartition(".")[2] not in elsewhere}
    assert not missing
