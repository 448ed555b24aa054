"""What a function refers to by the globals of another file than its own."""

from __future__ import annotations

import torch
from torch import Tensor

_SCALE = torch.tensor(2.0)


def scale() -> Tensor:
    """A tensor that callers refer to by this function alone."""
    return _SCALE
