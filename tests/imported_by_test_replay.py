"""Functions whose globals are in another file than the function that calls them."""

from __future__ import annotations

import torch
from torch import Tensor

_SCALE = torch.tensor(2.0)


def scale() -> Tensor:
    """Return a tensor that callers can reach through this function only."""
    return _SCALE
