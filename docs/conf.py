"""Builds the documentation site: `make docs`.

Neither the build nor the pages need a network: the pages load no script, style or font from another server.
"""

from __future__ import annotations

import pkgutil
from html import escape
from importlib import import_module
from importlib.metadata import version as version_of
from importlib.util import find_spec
from pathlib import Path

from docutils import nodes
from math_core import LatexError, LatexToMathML
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.writers.html5 import HTML5Translator

# What people import. Each entry is a module, or a package whose modules are all public.
PUBLIC = (
    "ops",
    "distributions",
    "modules",
    "densities",
    "random",
    "replay",
    "npe",
    "reference",
    "pyro",
    "helmholtz",
    "training",
    "evaluation",
)

project = "wakesleep_ext"
author = "the wakesleep_ext authors"
version = release = version_of("wakesleep_ext")

extensions = [
    "myst_nb",  # reads Markdown, as myst_parser does, and notebooks
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
]
exclude_patterns = ["build"]
default_role = "code"
suppress_warnings = ["ref.python"]  # annotations are not qualified, and some names occur in two modules

html_theme = "furo"
html_title = "wakesleep_ext"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_copyright = False
html_math_renderer = "mathml"

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # notebooks are committed with their output

add_module_names = False
napoleon_use_ivar = True
autodoc_member_order = "bysource"
python_maximum_signature_line_length = 100
autodoc_default_options = {"members": True, "undoc-members": True, "show-inheritance": True}
autosummary_generate = False

# The full inventories of Python and PyTorch would have to be fetched at every build, and they change. The two files
# here list the names that our pages refer to, in version 1 of the format, which is plain text.
intersphinx_mapping = {
    "python": ("https://docs.python.org/3/", "inventories/python.txt"),
    "torch": ("https://docs.pytorch.org/docs/stable/", "inventories/torch.txt"),
}

DOCS = Path(__file__).parent
PAGES = DOCS / "api"  # generated, and ignored by git
PACKAGE = "wakesleep_ext"


def submodules(entry: str) -> list[str]:
    """Names of the modules in a public package; empty if `entry` is a module."""
    spec = find_spec(f"{PACKAGE}.{entry}")
    if spec is None:
        raise ModuleNotFoundError(f"docs/conf.py: PUBLIC lists {entry}, but {PACKAGE}.{entry} does not exist")
    found = pkgutil.iter_modules(spec.submodule_search_locations or [])
    return [module.name for module in found if not module.name.startswith("_")]


def public_modules() -> list[str]:
    """Full names of all public modules."""
    return [
        f"{PACKAGE}.{name}" for entry in PUBLIC for name in (entry, *(f"{entry}.{sub}" for sub in submodules(entry)))
    ]


def page(entry: str, modules: list[str]) -> str:
    """The page of a module, or of a package with a table of its modules.

    If a module has `__all__`, its page lists only these names, but in the order of the source.
    """
    title = f"{entry}\n{'=' * len(entry)}\n\n.. automodule:: {PACKAGE}.{entry}\n"
    if names := getattr(import_module(f"{PACKAGE}.{entry}"), "__all__", None):
        title += f"   :ignore-module-all:\n   :members: {', '.join(names)}\n"
    if not modules:
        return title
    table = "".join(f"   {name}\n" for name in modules)
    pages = "".join(f"   {name} <{entry}/{name}>\n" for name in modules)
    return f"{title}\n.. autosummary::\n\n{table}\n.. toctree::\n   :hidden:\n\n{pages}"


def write_pages(app: Sphinx) -> None:
    """Writes a page for every public module, and removes pages of modules that are gone."""
    pages: dict[Path, str] = {}
    for entry in PUBLIC:
        modules = submodules(entry)
        pages[PAGES / f"{entry}.rst"] = page(entry, modules)
        for name in modules:
            pages[PAGES / entry / f"{name}.rst"] = page(f"{entry}.{name}", [])
    for path in PAGES.rglob("*.rst"):
        if path not in pages:
            path.unlink()
    for path, text in pages.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


def keep_attribute_docstring(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Hides the first line of an attribute's docstring from napoleon, which would split "Kind: text" into a type
    and a text.

    Napoleon parses only the first line, so an empty comment is inserted there.
    """
    if what in ("attribute", "data", "property"):
        lines[:0] = ["..", ""]


CONVERTER = LatexToMathML()


def mathml(node: nodes.Element, displaystyle: bool) -> str:
    """A formula as MathML, which browsers render without a script; if the formula is invalid, its source."""
    try:
        return CONVERTER.convert_with_local_state(node.astext(), displaystyle=displaystyle)
    except LatexError as error:
        logging.getLogger(__name__).warning("invalid formula %r: %s", node.astext(), error, location=node)
        return f"<code>{escape(node.astext())}</code>"


def visit_math(translator: HTML5Translator, node: nodes.math) -> None:
    translator.body.append(mathml(node, displaystyle=False))
    raise nodes.SkipNode


def visit_displaymath(translator: HTML5Translator, node: nodes.math_block) -> None:
    translator.body.append(f'<div class="formula">{mathml(node, displaystyle=True)}</div>\n')
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    app.connect("builder-inited", write_pages)
    app.connect("autodoc-process-docstring", keep_attribute_docstring, priority=400)  # napoleon's is 500
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_displaymath, None))
