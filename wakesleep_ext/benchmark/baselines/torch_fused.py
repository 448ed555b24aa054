"""Call the ops that torch itself fuses, as :class:`torch.optim.Adam` does with `fused=True`."""

from __future__ import annotations

import torch
from torch import Tensor


def adam_(
    parameters: list[Tensor],
    gradients: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    step: Tensor,
    lr: Tensor,
) -> None:
    torch._fused_adam_(
        parameters,
        gradients,
        exp_avgs,
        exp_avg_sqs,
        [],
        [step.float()] * len(parameters),
        lr=lr.float(),
        beta1=0.9,
        beta2=0.999,
        weight_decay=0.0,
        eps=1e-8,
        amsgrad=False,
        maximize=False,
    )
