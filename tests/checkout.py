"""Find the checkout of the tests, and load its modules that are not part of an installed wheel."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def load(name: str, folder: str = "") -> Any:
    """Load a module from a folder of the checkout, without leaving the folder on the path.

    Otherwise, processes that tests start would import the package from its sources, not from the installation.
    """
    sys.path.insert(0, str(ROOT / folder))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(ROOT / folder))
