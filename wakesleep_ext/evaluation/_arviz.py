"""Import arviz-stats, which only the diagnostics need."""

from __future__ import annotations

from typing import Any, NamedTuple


class ArvizStats(NamedTuple):
    """The parts of `arviz-stats` that the diagnostics use."""

    array_stats: Any
    """Pareto-smoothed importance sampling."""
    ecdf_utils: Any
    """Simultaneous bands of empirical distribution functions."""


def arviz_stats() -> ArvizStats:
    """Import the package.

    Raises:
        ModuleNotFoundError: it, or xarray, is not installed.
    """
    try:
        from arviz_stats import ecdf_utils
        from arviz_stats.base.array import array_stats
    except ImportError as error:
        raise ModuleNotFoundError(
            "the diagnostics need arviz-stats and xarray; install them: pip install 'arviz-stats[xarray]', "
            f"or the extra wakesleep_ext[diagnostics] ({error})"
        ) from error
    return ArvizStats(array_stats, ecdf_utils)
