"""Check the built documentation. `make docs` builds it, treats warnings as errors, and runs these tests."""

from __future__ import annotations

import importlib
import os
import re
import runpy
from collections.abc import Iterator
from types import ModuleType
from typing import Any, TypeVar

import pytest
from checkout import ROOT

import wakesleep_ext

pytest.importorskip("sphinx", reason="`make docs` installs sphinx and runs these tests")

from sphinx.util.inventory import InventoryFile

pytestmark = [
    pytest.mark.source_tree,
    pytest.mark.filterwarnings("default"),
    pytest.mark.skipif("WAKESLEEP_DOCS" not in os.environ, reason="`make docs` builds the pages and runs these tests"),
]

PAGES = ROOT / os.environ.get("WAKESLEEP_DOCS", "")


@pytest.fixture(scope="module")
def conf() -> dict[str, Any]:
    """The names that docs/conf.py defines."""
    return runpy.run_path(str(ROOT / "docs/conf.py"))


@pytest.fixture(scope="module")
def documented() -> set[str]:
    """The full names that the pages document."""
    inventory = InventoryFile.loads((PAGES / "objects.inv").read_bytes(), uri="")
    return {name for kind in inventory.data.values() for name in kind}


def public_names(module: ModuleType) -> set[str]:
    """Return the names in `__all__`, or those that the module defines itself."""
    declared = getattr(module, "__all__", None)
    if declared is None:
        own = {name for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__}
        declared = [name for name in own if not name.startswith("_") and not isinstance(getattr(module, name), TypeVar)]
    return {f"{module.__name__}.{name}" for name in declared}


def test_reference_pages_have_every_public_name(conf: dict[str, Any], documented: set[str]) -> None:
    modules = conf["public_modules"]()
    assert set(modules) <= documented
    assert not set().union(*(public_names(importlib.import_module(name)) for name in modules)) - documented


def test_reference_pages_have_every_name_of_the_package(documented: set[str]) -> None:
    names = set(wakesleep_ext.__all__) - {"__version__"}
    assert not {name for name in names if not {f"wakesleep_ext.{name}", f"wakesleep_ext.ops.{name}"} & documented}


def test_reference_has_public_modules_only(conf: dict[str, Any]) -> None:
    pages = {path.relative_to(PAGES / "api").with_suffix("") for path in (PAGES / "api").rglob("*.html")}
    assert {"wakesleep_ext." + ".".join(page.parts) for page in pages} == set(conf["public_modules"]())


# An address of another server where a page or a style loads something. A link to a page loads nothing.
FETCHED_BY_PAGE = re.compile(
    r"<(?:script|link|img|iframe|source|video|audio|embed|object)\b[^>]*?\s(?:src|href|data|srcset)\s*=\s*[\"']?"
    r"((?:https?:)?//[^\"'> ]+)"
)
FETCHED_BY_STYLE = re.compile(r"(?:url\(|@import)\s*[\"']?((?:https?:)?//[^\"') ]+)")


def fetched() -> Iterator[str]:
    for pattern, suffix in ((FETCHED_BY_PAGE, "html"), (FETCHED_BY_STYLE, "css")):
        for path in PAGES.rglob(f"*.{suffix}"):
            for found in pattern.finditer(path.read_text()):
                yield f"{path.relative_to(PAGES)}: {found[1]}"


def test_pages_fetch_nothing_from_other_servers() -> None:
    assert not list(fetched())


def test_formulas_are_mathml() -> None:
    page = (PAGES / "api/ops.html").read_text()
    assert page.count("<math") > 20
    assert ":math:" not in page
