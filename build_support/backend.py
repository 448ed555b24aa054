"""Runs setuptools' build backend with the torch of the target environment.

A compiled extension works only with the torch it was built against. pip isolates the build, but uses the interpreter
of the target environment. So this backend finds the torch of that environment and builds against it. If the environment
has no torch, the backend asks pip for a supported torch. The wheel then requires the same series of torch, and pip
installs that series with the wheel.

uv and `python -m build` run the backend in a separate environment, where it cannot find the target environment. The
build then stops before it compiles anything, and prints the commands that work. In a checkout, `[tool.uv]` in
pyproject.toml turns isolation off for uv.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from build_support import toolchain

ROOT = Path(__file__).resolve().parent.parent


def _stop(reason: str) -> toolchain.BuildError:
    commands = toolchain.commands_without_isolation(os.environ, ROOT)
    return toolchain.BuildError(f"wakesleep_ext: {reason} Nothing was compiled. These commands work:\n\n{commands}\n")


try:
    import setuptools
    from setuptools import build_meta
except ImportError:
    raise _stop("this build is not isolated, and the environment has no setuptools.") from None
if int(setuptools.__version__.split(".")[0]) < toolchain.OLDEST_SETUPTOOLS:
    raise _stop(
        f"setuptools {setuptools.__version__} is too old; the build needs {toolchain.OLDEST_SETUPTOOLS} or later."
    )

Settings = dict[str, Any] | None


def _use_environment_torch() -> bool:
    torch = toolchain.find_torch()
    if torch is None:
        return False
    if str(torch.site_packages) not in sys.path:
        sys.path.append(str(torch.site_packages))  # at the end, so that the isolated build tools take precedence
    return True


def _need_torch() -> None:
    if not _use_environment_torch():
        raise _stop("there is no torch to build against.")


def _requirements() -> list[str]:
    if _use_environment_torch():
        return ["ninja"]
    if "PIP_BUILD_TRACKER" in os.environ:  # pip runs the target environment's interpreter, and found no torch
        return ["ninja", toolchain.SUPPORTED_TORCH, "numpy"]
    raise _stop(
        "this isolated build cannot see the torch of your environment, and kernels work only with the torch that they "
        "were compiled for."
    )


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    return [*_requirements(), *build_meta.get_requires_for_build_wheel(config_settings)]


def get_requires_for_build_editable(config_settings: Settings = None) -> list[str]:
    return [*_requirements(), *build_meta.get_requires_for_build_editable(config_settings)]


def prepare_metadata_for_build_wheel(metadata_directory: str, config_settings: Settings = None) -> str:
    _need_torch()
    return build_meta.prepare_metadata_for_build_wheel(metadata_directory, config_settings)


def prepare_metadata_for_build_editable(metadata_directory: str, config_settings: Settings = None) -> str:
    _need_torch()
    return build_meta.prepare_metadata_for_build_editable(metadata_directory, config_settings)


def build_wheel(wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None) -> str:
    _need_torch()
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(
    wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None
) -> str:
    _need_torch()
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)


build_sdist = build_meta.build_sdist
get_requires_for_build_sdist = build_meta.get_requires_for_build_sdist
