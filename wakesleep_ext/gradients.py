"""Start a backward pass from an upstream gradient of 1 that the ops recognise."""

from __future__ import annotations

import torch
from torch import Tensor

from wakesleep_ext import _C

__all__ = ["unit_gradient"]


def unit_gradient(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a 0-dimensional 1, for use as the gradient of a loss with respect to itself.

    Ops that compute their gradients in the forward pass, such as `linear_bernoulli_log_prob_sum`, multiply them by the
    upstream gradient in the backward pass. On a GPU, reading the upstream gradient would wait for the device. The ops
    recognise this tensor without reading it, and skip the multiplication. Create the tensor once:

        one = unit_gradient(loss.device, loss.dtype)
        loss.backward(one)

    The results are the same as with `loss.backward()`. If you modify the tensor in place, it is no longer recognised.
    """
    one = torch.ones((), dtype=dtype, device=device)
    _C.mark_unit_gradient(one)
    return one
