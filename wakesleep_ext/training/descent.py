"""Update the weights of a network with Adam, at a learning rate that follows a schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from wakesleep_ext import ops
from wakesleep_ext.gradients import unit_gradient
from wakesleep_ext.training.config import TrainConfig


def require_wide(machine: nn.Module) -> None:
    """Check that the parameters are in float32 or float64.

    Raises:
        TypeError: a parameter is not. Half precision would lose Adam's updates and moments.
    """
    for name, parameter in machine.named_parameters():
        if parameter.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"Trainer: expected the machine's parameters to be float32 or float64, got {parameter.dtype} for "
                f"{name}; Adam's small updates would be rounded away. Keep the parameters in float32, and set "
                'precision="bfloat16" to multiply in bfloat16'
            )


def clipped(gradients: Sequence[Tensor], max_norm: float) -> tuple[Tensor, ...]:
    r"""Scale gradients g such that their joint norm is at most `max_norm`. Reads no value on the host.

    .. math:: g \cdot \min\left(\frac{\text{max\_norm}}{\lVert g \rVert_2 + 10^{-6}}, 1\right)

    The formula is that of :func:`torch.nn.utils.clip_grad_norm_`. But if the norm is infinite, every result is NaN
    instead of zero, so that training stops with an error instead of standing still.
    """
    norm = torch.nn.utils.get_total_norm(gradients)
    scale = (max_norm / (norm + 1e-6)).clamp(max=1) + 0 * norm  # infinity times 0 is NaN
    return torch._foreach_mul(list(gradients), scale)


class Descent:
    """Applies Adam to the parameters of a network. The constructor allocates the optimizer state on their device.

    You may freeze or replace parameters between steps.
    """

    def __init__(self, network: nn.Module, learning_rate: float, config: TrainConfig) -> None:
        device = next(network.parameters()).device
        dtype = torch.float32 if device.type == "cuda" else torch.float64  # required by torch's fused Adam
        self.network = network
        self.optimizer = torch.optim.Adam(
            network.parameters(),
            lr=torch.tensor(learning_rate, dtype=dtype, device=device),
            betas=config.adam_betas,
            eps=config.adam_epsilon,
            fused=True,
            capturable=True,
        )
        (group,) = self.optimizer.param_groups
        self._start, self._max_norm = learning_rate, config.max_gradient_norm
        loss_dtype = torch.promote_types(next(network.parameters()).dtype, torch.float32)
        self._unit = unit_gradient(device, loss_dtype)
        self.steps = torch.zeros(len(group["params"]), device=device)
        for parameter, step in zip(group["params"], self.steps, strict=True):
            self.optimizer.state[parameter] = {
                "step": step,
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    def trained(self) -> list[Tensor]:
        """Return the parameters that are not frozen.

        If a parameter was replaced, for example by `load_state_dict(assign=True)`, the new parameter inherits the
        optimizer state of the old one.
        """
        parameters = list(self.network.parameters())
        (group,) = self.optimizer.param_groups
        for number, (old, new) in enumerate(zip(group["params"], parameters, strict=True)):
            if old is not new:
                group["params"][number] = new
                self.optimizer.state[new] = self.optimizer.state.pop(old)
        return [parameter for parameter in parameters if parameter.requires_grad]

    def gradients(self, loss: Tensor) -> tuple[Tensor, ...]:
        """Return the gradients of the trained parameters. Existing `.grad` values are ignored."""
        trained = self.trained()
        return self.gradients_of(loss, trained)

    def gradients_of(self, loss: Tensor, parameters: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return the gradients of any parameters. Creates no tensor for the gradient of the loss, which is 1."""
        unit = self._unit if loss.dtype == self._unit.dtype else None
        return torch.autograd.grad(loss, parameters, unit) if parameters else ()

    def set_learning_rate(self, factor: Tensor) -> None:
        """Set the learning rate to `factor` times its initial value."""
        (group,) = self.optimizer.param_groups
        group["lr"].copy_(self._start * factor)

    @torch.no_grad()
    def descend(self, gradients: Sequence[Tensor]) -> None:
        """Take an Adam step, given the gradients of the trained parameters. The caller has advanced `steps`."""
        trained = self.trained()
        if not trained:
            return
        if self._max_norm is not None:
            gradients = clipped(gradients, self._max_norm)
        (group,) = self.optimizer.param_groups
        states = [self.optimizer.state[parameter] for parameter in trained]
        exp_avgs, exp_avg_sqs = ([state[slot] for state in states] for slot in ("exp_avg", "exp_avg_sq"))
        beta1, beta2 = group["betas"]
        step = states[0]["step"]  # equal for all parameters
        ops.adam_(trained, gradients, exp_avgs, exp_avg_sqs, step, group["lr"], beta1, beta2, group["eps"])

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the name and tensor of each optimizer state, such as `weight.exp_avg`. The tensors are not copies."""
        for name, parameter in self.network.named_parameters():
            for slot, value in self.optimizer.state[parameter].items():
                yield f"{name}.{slot}", value


class Schedule:
    """Sets the learning rates to a fraction of their initial values, which it computes on the device.

    Args:
        config: training options.
        steps_per_epoch: number of steps in an epoch.
        device: device of the networks.
    """

    def __init__(self, config: TrainConfig, steps_per_epoch: int, device: torch.device) -> None:
        self._config, self._steps = config, config.epochs * steps_per_epoch
        self._falls = torch.tensor(config.stages[1:], dtype=torch.float64, device=device) * steps_per_epoch

    def apply(self, completed: Callable[[], Tensor], descents: Iterable[Descent]) -> None:
        """Set the learning rates of a step, given the number of completed steps in float64."""
        decay = self._config.learning_rate_decay
        if decay == 1:
            return
        if self._config.schedule == "exponential":
            part = completed() / self._steps
        else:
            part = (completed() >= self._falls).double().sum() / max(1, len(self._falls))
        for descent in descents:
            descent.set_learning_rate(decay**part)
