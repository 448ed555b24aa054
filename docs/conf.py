"""How the reference pages are built, `make docs`: every public module has a page, made of its docstrings."""

from __future__ import annotations

import pkgutil
from pathlib import Path

import wakesleep_ext

project = "wakesleep_ext"
author = "the wakesleep_ext developers"
version = release = wakesleep_ext.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "myst_parser",
]
html_theme = "furo"
html_title = "wakesleep_ext"
exclude_patterns = ["build"]
default_role = "code"
add_module_names = False
napoleon_use_ivar = True
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_default_options = {"members": True, "undoc-members": True, "show-inheritance": True}
suppress_warnings = ["ref.python"]  # annotations are not qualified, and some names are there twice

PAGES = Path(__file__).parent / "api"


def public_modules() -> list[str]:
    """Of the package, those that do not begin with an underscore."""
    found = pkgutil.walk_packages(wakesleep_ext.__path__, "wakesleep_ext.")
    return [module.name for module in found if not any(part.startswith("_") for part in module.name.split("."))]


def write_pages() -> None:
    PAGES.mkdir(exist_ok=True)
    for name in public_modules():
        title = name.removeprefix("wakesleep_ext.")
        (PAGES / f"{name}.rst").write_text(f"{title}\n{'=' * len(title)}\n\n.. automodule:: {name}\n")


write_pages()
