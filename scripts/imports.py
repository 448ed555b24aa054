"""Print the longest chain of imports between modules, and every import from a higher layer."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "wakesleep_ext"

FLOORS = ("", "helmholtz", "evaluation", "training", "report", "benchmark check", "cli")
"""The layers from the bottom, the ops, to the top. A module may import from its own layer and lower ones."""

CHAIN = ("helmholtz", "evaluation", "training", "report", "cli")
"""The packages whose chains are measured."""


def modules() -> dict[str, Path]:
    """Return the paths of all modules, by name within the package."""
    files = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")
    return {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in files}


@cache
def imports(module: str) -> tuple[str, ...]:
    """Return the modules of the package that a module imports at run time, at any level of its code."""
    known = modules()
    return tuple(sorted({name for name in _imported(known[module]) if name in known} - {module}))


def _imported(path: Path) -> Iterator[str]:
    tree = ast.parse(path.read_text())
    for_types = {
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for statement in block.body
        for node in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if node in for_types:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE.name:
            within = (node.module or "").split(".")[1:]
            yield ".".join(within)
            yield from (".".join([*within, alias.name]) for alias in node.names)


def floor(module: str) -> int:
    top = module.split(".")[0]
    return next((number for number, names in enumerate(FLOORS) if top in names.split()), 0)


def upward() -> list[str]:
    """Return the imports from a higher layer, as text."""
    return [f"{a} imports {b}" for a in modules() for b in imports(a) if floor(b) > floor(a)]


@cache
def longest_chain(module: str) -> tuple[str, ...]:
    """Return the longest chain of imports that starts at a module."""
    chains = [longest_chain(name) for name in imports(module) if name.split(".")[0] in CHAIN]
    return (module, *max(chains, key=len, default=()))


def main() -> None:
    chain = max((longest_chain(module) for module in modules() if module.split(".")[0] in CHAIN), key=len)
    print(f"{len(chain)} levels: {' -> '.join(chain)}")
    for fault in upward():
        print(f"upwards: {fault}")


if __name__ == "__main__":
    main()
