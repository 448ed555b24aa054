"""Run the GEMMs of a training step and nothing else, each with the fastest library at hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from time import perf_counter

import torch
from torch import Tensor, nn

Product = Callable[[], object]


def of_step(recognition: nn.Sequential, generative: nn.Sequential, batch: int, num_samples: int) -> Callable[[], None]:
    """Return a call that runs the GEMMs of a wake phase and a sleep phase."""
    products = [
        *_of_network(recognition, batch, backward=False),
        *_of_network(generative, num_samples * batch, backward=True),
        *_of_network(generative, batch, backward=False),
        *_of_network(recognition, batch, backward=True),
    ]

    def multiply() -> None:
        for product in products:
            product()

    return multiply


def _of_network(network: nn.Sequential, rows: int, *, backward: bool) -> Iterator[Product]:
    """Yield the GEMMs of a network on a number of rows.

    The backward pass has none for the gradient of the input, which is not needed.
    """
    weights = [layer.weight.detach() for layer in network if isinstance(layer, nn.Linear)]
    widths = [weights[0].shape[1], *(len(weight) for weight in weights)]
    layers, gradients = ([torch.randn(rows, width, device=weights[0].device) for width in widths] for _ in range(2))
    for weight, below, above in zip(weights, layers, layers[1:], strict=False):
        yield _fastest(below, weight.t(), above)
    if not backward:
        return
    for number in reversed(range(len(weights))):
        above = gradients[number + 1]
        yield _fastest(above.t(), layers[number], torch.empty_like(weights[number]))
        if number:
            yield _fastest(above, weights[number], gradients[number])


def _fastest(a: Tensor, b: Tensor, out: Tensor) -> Product:
    """Return the product a b with the fastest library: BLAS, or oneDNN if torch has it and uses it."""
    choices: list[Product] = [partial(torch.mm, a, b, out=out)]
    if a.device.type == "cpu" and torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled:
        choices.append(partial(torch.ops.mkldnn._linear_pointwise, a, b.t(), None, "none", [], ""))
    return min(choices, key=_least_seconds) if len(choices) > 1 else choices[0]


def _least_seconds(product: Product, trials: int = 10) -> float:
    marks = []
    for _ in range(trials + 1):
        product()
        marks.append(perf_counter())
    return min(later - earlier for earlier, later in pairwise(marks))
