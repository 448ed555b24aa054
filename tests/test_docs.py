"""The reference pages list every public name. `make docs` builds them, refuses warnings, and runs this test."""

from __future__ import annotations

import importlib
import os
import pkgutil
from types import ModuleType
from typing import TypeVar

import pytest
from checkout import ROOT

import wakesleep_ext

pytest.importorskip("sphinx", reason="`make docs` installs sphinx and runs this test")

from sphinx.util.inventory import InventoryFile

INVENTORY = ROOT / os.environ.get("WAKESLEEP_DOCS", "") / "objects.inv"

pytestmark = [
    pytest.mark.source_tree,
    pytest.mark.filterwarnings("default"),
    pytest.mark.skipif("WAKESLEEP_DOCS" not in os.environ, reason="`make docs` builds the pages and runs this test"),
]


def public_names(module: ModuleType) -> set[str]:
    """What it defines, or says that it has."""
    declared = getattr(module, "__all__", None)
    if declared is None:
        own = {name for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__}
        declared = [name for name in own if not name.startswith("_") and not isinstance(getattr(module, name), TypeVar)]
    return {f"{module.__name__}.{name}" for name in declared}


def test_reference_pages_have_every_public_name() -> None:
    inventory = InventoryFile.loads(INVENTORY.read_bytes(), uri="")
    documented = {name for kind in inventory.data.values() for name in kind}
    modules = [
        importlib.import_module(found.name)
        for found in pkgutil.walk_packages(wakesleep_ext.__path__, "wakesleep_ext.")
        if not any(part.startswith("_") for part in found.name.split("."))
    ]
    missing = set().union(*map(public_names, modules)) - documented
    ours = {f"wakesleep_ext.{name}" for name in wakesleep_ext.__all__ if name != "__version__"}
    elsewhere = {name.rpartition(".")[2] for name in documented}
    missing |= {name for name in ours if name.rpartition(".")[2] not in elsewhere}
    assert not missing
