"""The build backend: setuptools', with the torch of the environment that is installed into.

A compiled extension works with the torch it was built against. pip builds in isolation, where that torch is not to be
seen, and would fetch another. So this backend looks into the environment: the torch that is there is used in place;
where there is none, a supported one is asked for.
"""

from __future__ import annotations

import sys
from typing import Any

from setuptools import build_meta

from build_support import toolchain

Settings = dict[str, Any] | None


def _use_environment_torch() -> bool:
    torch = toolchain.find_torch()
    if torch is None:
        return False
    if str(torch.site_packages) not in sys.path:
        sys.path.append(str(torch.site_packages))  # last, so that the isolated build tools come first
    return True


def _requirements() -> list[str]:
    return ["ninja"] if _use_environment_torch() else ["ninja", toolchain.SUPPORTED_TORCH, "numpy"]


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    return [*build_meta.get_requires_for_build_wheel(config_settings), *_requirements()]


def get_requires_for_build_editable(config_settings: Settings = None) -> list[str]:
    return [*build_meta.get_requires_for_build_editable(config_settings), *_requirements()]


def build_wheel(wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None) -> str:
    _use_environment_torch()
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(
    wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None
) -> str:
    _use_environment_torch()
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)


build_sdist = build_meta.build_sdist
get_requires_for_build_sdist = build_meta.get_requires_for_build_sdist
prepare_metadata_for_build_wheel = build_meta.prepare_metadata_for_build_wheel
prepare_metadata_for_build_editable = build_meta.prepare_metadata_for_build_editable
