"""The `wakesleep` command, a module beside the package: `wakesleep info` answers where the package does not import."""

from __future__ import annotations

import runpy
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path


def main() -> int:
    """Run the command line; returns the exit status."""
    if sys.argv[1:] == ["info"]:
        package = find_spec("wakesleep_ext")  # found, not imported
        assert package is not None
        assert package.origin is not None
        status: int = runpy.run_path(str(Path(package.origin).with_name("info.py")))["main"]()
        return status
    if sys.argv[1:] == ["--version"]:
        print(f"wakesleep_ext {version('wakesleep_ext')}")
        return 0
    try:
        from wakesleep_ext import cli
    except ImportError as error:
        print(f"wakesleep: {error}", file=sys.stderr)
        return 1
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
