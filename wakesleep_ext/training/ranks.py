"""Share the rows of a training step between the processes that torchrun has started, and sum their gradients.

Every rank draws the noise of all rows and uses that of its own. So the noise of a row does not depend on the number of
ranks, and several ranks train the same weights as one process, up to rounding.
"""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from wakesleep_ext.training.divergence import DivergedError
from wakesleep_ext.usage import UsageError


class RanksDifferError(DivergedError):
    """The ranks of a run no longer have the same weights."""


class LostRankError(Exception):
    """Another rank has ended. That rank prints the reason, unless it was killed."""

    def __init__(self, rank: int, reason: str) -> None:
        super().__init__(f"rank {rank} cannot continue alone: {reason}")
        self.rank = rank
        """The rank that raises this error."""


def _reduce(tensor: Tensor, operation: Any = dist.ReduceOp.SUM) -> None:
    try:
        dist.all_reduce(tensor, operation)
    except RuntimeError as error:
        raise LostRankError(dist.get_rank(), str(error)) from error


# an operator, so that a recorded step contains the message
_library = torch.library.Library("wakesleep_training", "DEF")
_library.define("sum_over_ranks_(Tensor(a!) flat) -> ()")
_library.impl("sum_over_ranks_", _reduce, "CompositeExplicitAutograd")


class Ranks:
    """The processes that train together. Each has a rank, from 0 to `count` - 1.

    Args:
        rank: rank of this process.
        count: number of processes. They have joined torch's default process group if there are several.
    """

    def __init__(self, rank: int = 0, count: int = 1) -> None:
        self.rank, self.count = rank, count
        self._request, self._stop = torch.zeros(()), torch.zeros(())  # of this rank, and of all ranks

    def rows(self, total: int) -> slice:
        """Return the rows of this rank, of `total` rows.

        Raises:
            ValueError: there are fewer rows than ranks.
        """
        if total < self.count:
            raise ValueError(f"Ranks: expected at least one row for each of {self.count} ranks, got {total} rows")
        return slice(total * self.rank // self.count, total * (self.rank + 1) // self.count)

    def part(self, mean: Tensor, total: int) -> Tensor:
        """Weight a mean over the rows of this rank, such that the sum over ranks is the mean over all rows."""
        rows = self.rows(total)
        return mean if self.count == 1 else mean * ((rows.stop - rows.start) / total)

    def draws(self, total: int) -> AbstractContextManager[object]:
        """Key the noise of all draws by the row among `total` rows while the context is active."""
        return nullcontext() if self.count == 1 else _GlobalDraws(self.rows(total), total)

    def sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Sum tensors over all ranks in one message. The message also carries requests to stop.

        Raises:
            LostRankError: another rank has ended.
        """
        if self.count == 1:
            return list(tensors)
        flat = torch.cat([tensor.reshape(-1) for tensor in (*tensors, self._request)])
        torch.ops.wakesleep_training.sum_over_ranks_.default(flat)
        *parts, stop = flat.split([*(tensor.numel() for tensor in tensors), 1])
        self._stop.copy_(stop[0])
        return [part.view(tensor.shape).to(tensor.dtype) for part, tensor in zip(parts, tensors, strict=True)]

    def agree(self, requested: signal.Signals | None) -> signal.Signals | None:
        """Return a signal if this run must stop now. To be called after each step, by all ranks.

        With several ranks, a request travels with the gradients of the next step. So all of them stop after that step,
        or after the group of steps that begins with it.
        """
        if self.count == 1:
            return requested
        self._request.fill_(requested is not None)
        return (requested or signal.SIGTERM) if self._stop.item() > 0 else None

    def require_equal(self, state: Mapping[str, Tensor]) -> None:
        """Check that all ranks have the same tensors.

        Raises:
            RanksDifferError: the hashes of the tensors differ.
            LostRankError: another rank has ended.
        """
        if self.count == 1:
            return
        digest = hashlib.sha256()
        for tensor in state.values():
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        own = torch.tensor(int.from_bytes(digest.digest()[:8], "big", signed=True))
        least, most = own.clone(), own.clone()
        _reduce(least, dist.ReduceOp.MIN)
        _reduce(most, dist.ReduceOp.MAX)
        if least != most:
            raise RanksDifferError(f"rank {self.rank} of {self.count}: the weights of the ranks are not equal")


ALONE = Ranks()
"""The only process of a run."""


@contextmanager
def joined(device: torch.device) -> Iterator[Ranks]:
    """Join the other processes that torchrun has started, while the context is active.

    Raises:
        UsageError: several processes would train on a GPU.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield ALONE
        return
    if device.type != "cpu":
        raise UsageError(f"expected --device cpu with {count} ranks, got {device}; several GPUs are not supported")
    # Adam imports this module; if it did so after the next line, the group and its threads would stay alive
    import_module("torch._dynamo")
    dist.init_process_group("gloo")
    try:
        yield Ranks(dist.get_rank(), count)
    finally:
        dist.destroy_process_group()


# ---- draws -----------------------------------------------------------------------------------------------------------


class _GlobalDraws(TorchDispatchMode):
    """Makes every sampling op draw for all rows, and returns the draws of this rank.

    A row is an index of the second-to-last dimension of a draw. The parameters of other ranks' rows are set to zero.
    """

    def __init__(self, rows: slice, total: int) -> None:
        super().__init__()
        self._rows, self._count, self._total = rows, rows.stop - rows.start, total

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        draw = _DRAWS.get(func)
        return func(*args, **(kwargs or {})) if draw is None else draw(self, func, *args, **(kwargs or {}))

    def padded(self, tensor: Tensor, dim: int = -2) -> Tensor:
        """Add the rows of the other ranks to a tensor; one without this dimension is the same for all rows."""
        if tensor.dim() < -dim:
            return tensor
        if tensor.shape[dim] != self._count:
            raise RuntimeError(
                f"expected draws of {self._count} rows on this rank, got parameters of shape {list(tensor.shape)}"
            )
        sides = [0, 0] * (-dim - 1) + [self._rows.start, self._total - self._rows.stop]
        return torch.constant_pad_nd(tensor, sides)

    def own(self, tensor: Tensor, dim: int = -2) -> Tensor:
        """Return the rows of this rank."""
        return tensor.narrow_copy(dim, self._rows.start, self._count)

    def sizes(self, sample_shape: Sequence[int], *parameters: Tensor) -> list[int]:
        """Return the sample shape for all rows. It holds the number of rows if the parameters have no rows."""
        if any(parameter.dim() > 1 for parameter in parameters):
            return list(sample_shape)
        if not sample_shape or sample_shape[-1] != self._count:
            raise RuntimeError(f"expected draws of {self._count} rows on this rank, got {list(sample_shape)}")
        return [*sample_shape[:-1], self._total]


def _gaussian(draws: _GlobalDraws, func: Any, mu: Tensor, logvar: Tensor, key: Tensor, sample_shape: Any) -> Any:
    sizes = draws.sizes(sample_shape, mu, logvar)
    drawn = func(draws.padded(mu), draws.padded(logvar), key, sizes)
    if isinstance(drawn, Tensor):
        return draws.own(drawn)
    z, log_prob = drawn
    return draws.own(z), draws.own(log_prob, -1)


def _gaussian_backward(
    draws: _GlobalDraws,
    func: Any,
    grad_z: Tensor | None,
    grad_log_prob: Tensor | None,
    mu: Tensor,
    logvar: Tensor,
    key: Tensor,
    sample_shape: Any,
) -> Tensor:
    of_z = None if grad_z is None else draws.padded(grad_z)
    of_log_prob = None if grad_log_prob is None else draws.padded(grad_log_prob, -1)
    sizes = draws.sizes(sample_shape, mu, logvar)
    gradient: Tensor = func(of_z, of_log_prob, draws.padded(mu), draws.padded(logvar), key, sizes)
    return draws.own(gradient) if gradient.dim() > 1 else gradient


def _bernoulli(
    draws: _GlobalDraws, func: Any, logits: Tensor, key: Tensor, sample_shape: Any, dtype: torch.dtype | None = None
) -> Tensor:
    return draws.own(func(draws.padded(logits), key, draws.sizes(sample_shape, logits), dtype))


def _linear_gaussian(
    draws: _GlobalDraws, func: Any, h: Tensor, weight: Tensor, bias: Tensor, key: Tensor, sample_shape: Any
) -> Tensor:
    mu, logvar = torch.ops.wakesleep_ext.mlp.default(h, [weight], [bias]).chunk(2, -1)  # of the own rows only
    sample = torch.ops.wakesleep_ext.gaussian_rsample.default
    return draws.own(sample(draws.padded(mu), draws.padded(logvar), key, draws.sizes(sample_shape, mu)))


def _linear_bernoulli(
    draws: _GlobalDraws,
    func: Any,
    h: Tensor,
    weight: Tensor,
    bias: Tensor,
    key: Tensor,
    dtype: torch.dtype | None = None,
) -> Tensor:
    logits = torch.nn.functional.linear(h, weight, bias)  # of the own rows only
    sample = torch.ops.wakesleep_ext.bernoulli_sample.default
    return draws.own(sample(draws.padded(logits), key, draws.sizes((), logits), dtype))


_DRAWS: dict[Any, Callable[..., Any]] = {
    torch.ops.wakesleep_ext.gaussian_rsample.default: _gaussian,
    torch.ops.wakesleep_ext.gaussian_rsample_log_prob.default: _gaussian,
    torch.ops.wakesleep_ext.gaussian_rsample_backward.default: _gaussian_backward,
    torch.ops.wakesleep_ext.bernoulli_sample.default: _bernoulli,
    torch.ops.wakesleep_ext.linear_bernoulli_sample.default: _linear_bernoulli,
    torch.ops.wakesleep_ext.linear_gaussian_rsample.default: _linear_gaussian,
}
