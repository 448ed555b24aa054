"""The `wakesleep` command, in a module outside the package.

Because this module is outside the package, `wakesleep info` works even if the package cannot be imported. For the same
reason, `--help` and `--version` do not import torch.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec, module_from_spec
from pathlib import Path

_EXTRA_PACKAGES = {
    "docstring_parser": "docstring_parser",
    "matplotlib": "matplotlib",
    "numpy": "numpy",
    "safetensors": "safetensors",
    "sklearn": "scikit-learn",
    "tqdm": "tqdm",
    "typeguard": "typeguard",
    "tyro": "tyro",
}
"""The modules that the commands need, and the package that contains each. The extra `train` installs the packages."""


def main() -> int:
    """Run the command line and return the exit status."""
    if sys.argv[1:] == ["info"]:
        package = find_spec("wakesleep_ext")  # find_spec does not import the package
        assert package is not None
        assert package.origin is not None
        status: int = runpy.run_path(str(Path(package.origin).with_name("info.py")))["main"]()
        return status
    if sys.argv[1:] == ["--version"]:
        print(f"wakesleep_ext {version('wakesleep_ext')}")
        return 0
    try:
        return _run()
    except KeyboardInterrupt:  # while modules are imported; commands handle it themselves
        return 130


def _run() -> int:
    """Run a command other than `info` and `--version`, and return the exit status."""
    if missing := [package for module, package in _EXTRA_PACKAGES.items() if find_spec(module) is None]:
        packages = " ".join(missing)
        return _fail(f"the command needs packages that are not installed. Install them: pip install {packages}")
    run_package = _put_in_place("wakesleep_ext")
    from wakesleep_ext import cli

    command = cli.parse(sys.argv[1:])
    try:
        run_package()
    except ImportError as error:
        return _fail(str(error))
    return cli.run(command)


def _put_in_place(name: str) -> Callable[[], None]:
    """Make the modules of a package importable without running its `__init__.py`, which imports torch.

    Returns:
        A function that runs `__init__.py` later.
    """
    if name in sys.modules:
        return lambda: None
    spec = find_spec(name)
    assert spec is not None
    assert spec.loader is not None
    package = sys.modules[name] = module_from_spec(spec)
    return partial(spec.loader.exec_module, package)


def _fail(message: str) -> int:
    print(f"wakesleep: {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
