"""The checkout that the tests lie in: where it is, and its modules, of which an installed wheel has none."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def load(name: str, folder: str = "") -> Any:
    """A module from a folder of the checkout, which does not stay on the path.

    There the processes that tests start would find the package's sources in place of what is installed.
    """
    sys.path.insert(0, str(ROOT / folder))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(ROOT / folder))
