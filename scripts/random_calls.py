"""Call every operator of torch.ops.wakesleep_ext with random arguments: `python scripts/random_calls.py --seed 0`.

Operators are public, so they must return a result or raise an error whatever their arguments are. A call starts from
valid arguments. Half of the calls change one argument: its shape, dtype, layout, device, memory or value. A quarter
make three changes, and a quarter none. Calls run in subprocesses, so a crash or hang is reported with its seed.
"""

from __future__ import annotations

import argparse
import faulthandler
import math
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch

import wakesleep_ext  # noqa: F401  registers the operators

HANGS_AFTER = 60  # seconds
PER_PROCESS = 100


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--calls", type=int, default=400, help="number of calls of each operator")
    parser.add_argument("--only", help="call this operator only")
    options = parser.parse_args()
    outcomes: Counter[str] = Counter()
    failures = []
    for name in [options.only] if options.only else OPERATORS:
        for first in range(0, options.calls, PER_PROCESS):
            count = min(PER_PROCESS, options.calls - first)
            arguments = [name, str(options.seed), str(first), str(count)]
            done = subprocess.run(
                [sys.executable, __file__, "--child", *arguments],
                capture_output=True, text=True, timeout=PER_PROCESS * HANGS_AFTER, check=False,
            )  # fmt: skip
            made = done.stdout.split()
            outcomes.update(word for word in made if not word.isdigit())
            if done.returncode != 0:
                failures.append(f"{name}: exit status {done.returncode} in call {made[-1]} of seed {options.seed}")
                print(failures[-1], done.stderr[-1500:], sep="\n", flush=True)
    print(f"{outcomes.total()} calls of {len(OPERATORS)} operators: {dict(outcomes)}; {len(failures)} failed")
    return bool(failures)


# ---- in a subprocess -------------------------------------------------------------------------------------------------


def make_calls(name: str, seed: int, first: int, count: int) -> None:
    torch.set_num_threads(1)
    operator = getattr(torch.ops.wakesleep_ext, name)
    for number in range(first, first + count):
        print(number, flush=True)
        faulthandler.dump_traceback_later(HANGS_AFTER, exit=True)
        chosen = random.Random(f"{name} {seed} {number}")
        torch.manual_seed(chosen.getrandbits(32))
        arguments = OPERATORS[name](Maker(chosen))
        for _ in range(chosen.choice([0, 1, 1, 3])):
            with suppress(RuntimeError, NotImplementedError):  # torch cannot make this change
                change_one(chosen, arguments)
        try:
            results = operator(*arguments)
            for result in torch.utils._pytree.tree_leaves(results):
                if isinstance(result, torch.Tensor) and result.device.type == "cpu":
                    result.double().sum().item()
        except Exception as error:
            print("error" if type(error) is not AssertionError else "assertion", flush=True)
        else:
            print("result", flush=True)
        faulthandler.cancel_dump_traceback_later()


class Maker:
    """Makes valid arguments."""

    def __init__(self, chosen: random.Random) -> None:
        self.random = chosen
        self.dtype = chosen.choice([torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16])
        self.sizes = {letter: chosen.choice([0, 1, 2, 3, 5, 8, 17, 33, 70]) for letter in "BDHKS"}

    def floats(self, letters: str) -> Any:
        return torch.randn([self.sizes[letter] for letter in letters]).to(self.dtype)

    def compute(self, letters: str) -> Any:
        return self.floats(letters).to(torch.float64 if self.dtype == torch.float64 else torch.float32)

    def observed(self, letters: str) -> Any:
        return (self.floats(letters) > 0).to(self.random.choice([torch.bool, torch.uint8, self.dtype]))

    def key(self) -> Any:
        return torch.tensor([self.random.getrandbits(60), self.random.getrandbits(59)])

    def flag(self) -> bool:
        return self.random.random() < 0.5

    def scale(self) -> float:
        return self.random.choice([1.0, -0.5, math.nan])

    def shape(self) -> list[int]:
        return self.random.choice([[], [2], [3, 1], [0]])


def _head(m: Maker) -> list[Any]:
    return [m.floats("BH"), m.floats("DH"), m.floats("D")]


def _layers(m: Maker) -> list[Any]:
    m.sizes["B"] = m.random.choice([0, 1, 3, 65, 70])
    return [m.floats("BH"), [m.floats("DH"), m.floats("KD")], [m.floats("D"), m.floats("K")]]


def _names(m: Maker) -> list[Any]:
    return [m.random.choice([None, "relu", "tanh", "sigmoid"]) for _ in range(2)]


def _adam(m: Maker) -> list[Any]:
    shapes = m.random.choice([["D"], ["D", "HK", ""], []])
    lists = [[m.floats(shape) for shape in shapes] for _ in range(3)]
    squares = [m.floats(shape).abs() for shape in shapes]
    return [*lists, squares, torch.tensor(3.0), torch.tensor(0.01), 0.9, 0.999, 1e-8]


def _binarize(m: Maker) -> list[Any]:
    images = m.random.randint(1, 9)
    grey = torch.randint(256, (images, m.sizes["D"]), dtype=torch.uint8)
    index = m.random.choice([None, torch.randint(images, (m.sizes["B"],))])
    return [grey, m.key(), 255, index, m.random.choice([None, torch.float32, torch.bool])]


OPERATORS: dict[str, Callable[[Maker], list[Any]]] = {
    "draw_key": lambda m: [m.floats("B")],
    "gaussian_parameters": lambda m: [m.floats("BDHK"[m.random.randint(0, 3) :]).repeat_interleave(2, -1)],
    "gaussian_rsample": lambda m: [m.floats("BK"), m.floats("K"), m.key(), m.shape()],
    "gaussian_rsample_log_prob": lambda m: [m.floats("BK"), m.floats("BK"), m.key(), m.shape()],
    "gaussian_rsample_backward": lambda m: [
        m.floats("SBK"), m.compute("SB"), m.floats("BK"), m.floats("BK"), m.key(), [m.sizes["S"]],
    ],
    "bernoulli_sample": lambda m: [m.floats("BD"), m.key(), m.shape(), None],
    "binarize": _binarize,
    "gaussian_log_prob": lambda m: [m.floats("BK"), m.floats("K"), m.floats("SBK")],
    "gaussian_log_prob_backward": lambda m: [
        m.compute("SB"), m.floats("BK"), m.floats("BK"), m.floats("SBK"), m.flag(),
    ],
    "gaussian_log_prob_sum": lambda m: [
        m.floats("BK"), m.floats("K"), m.floats("SBK"), m.random.choice([None, m.compute("SB")]), m.scale(),
    ],
    "gaussian_log_prob_and_gradients": lambda m: [
        m.floats("BK"), m.floats("BK"), m.floats("SBK"), m.random.choice([None, m.compute("B")]), m.scale(),
        m.flag(), m.flag(),
    ],
    "standard_gaussian_log_prob": lambda m: [m.floats("SBK")],
    "standard_gaussian_log_prob_backward": lambda m: [m.compute("SB"), m.floats("SBK")],
    "gaussian_kl": lambda m: [m.floats("BK"), m.floats("BK")],
    "gaussian_kl_backward": lambda m: [m.compute("B"), m.floats("BK"), m.floats("BK")],
    "gaussian_kl_between": lambda m: [m.floats("SBK"), m.floats("BK"), m.floats("BK"), m.floats("K")],
    "gaussian_kl_between_backward": lambda m: [
        m.compute("SB"), m.floats("SBK"), m.floats("BK"), m.floats("BK"), m.floats("K"), m.flag(), m.flag(),
    ],
    "bernoulli_log_prob": lambda m: [m.floats("SBD"), m.observed("BD")],
    "bernoulli_log_prob_backward": lambda m: [m.compute("SB"), m.floats("SBD"), m.observed("BD")],
    "mlp": lambda m: [*_layers(m), *_names(m)],
    "mlp_with_hidden": lambda m: [*_layers(m), *_names(m)],
    "mlp_backward": lambda m: (
        lambda layers: [
            m.floats("BK"), m.floats("BK"), [m.floats("BD")], *layers, *_names(m), m.flag(), m.flag(),
        ]
    )(_layers(m)),
    "linear_bernoulli_sample": lambda m: [*_head(m), m.key(), None],
    "linear_gaussian_rsample": lambda m: [
        m.floats("BH"), m.floats("DH").repeat(2, 1), m.floats("D").repeat(2), m.key(), m.shape(),
    ],
    "linear_bernoulli_log_prob": lambda m: [*_head(m), m.observed("BD"), m.random.choice([None, True, False])],
    "linear_bernoulli_log_prob_and_logits": lambda m: [
        *_head(m), m.observed("BD"), m.random.choice([-1, 0, 2**20, 2**62]),
    ],
    "linear_bernoulli_log_prob_backward": lambda m: [
        m.compute("B"), *_head(m), m.observed("BD"), m.random.choice([None, m.compute("BD")]), m.flag(), m.flag(),
    ],
    "linear_bernoulli_log_prob_sum": lambda m: [
        *_head(m), m.observed("BD"), m.random.choice([None, m.compute("B")]), m.scale(),
    ],
    "linear_bernoulli_log_prob_and_gradients": lambda m: [
        *_head(m), m.observed("BD"), m.random.choice([None, m.compute("B")]), m.scale(), m.flag(), m.flag(), m.flag(),
    ],
    "advance_": lambda m: [[torch.zeros(3), torch.zeros((), dtype=torch.int64)], [1, m.random.randint(-5, 5)]],
    "adam_": _adam,
}  # fmt: skip


def change_one(chosen: random.Random, arguments: list[Any]) -> None:
    """Change one argument, or one element of a list."""
    place = chosen.randrange(len(arguments))
    value = arguments[place]
    if isinstance(value, list) and value and chosen.random() < 0.7:
        change_one(chosen, value)
    else:
        arguments[place] = changed(chosen, value, arguments)


def changed(chosen: random.Random, value: Any, others: Sequence[Any]) -> Any:
    if isinstance(value, torch.Tensor):
        return chosen.choice(CHANGES)(chosen, value, others)
    if isinstance(value, list):
        return chosen.choice([[], value[:-1], value * 2, [-1], [2**62, 2**62], [2**40], [0, 3]])
    numbers = [0, 1, -1, 7, 2**31, 2**62, -(2**63), 0.5, 1.5, -0.5, float("nan"), float("inf"), True, False]
    return chosen.choice([None, "relu", "softmax", "", torch.int64, torch.float64, *numbers])


def _another_size(chosen: random.Random, tensor: Any, others: Sequence[Any]) -> Any:
    if tensor.dim() == 0:
        return tensor.expand(chosen.choice([0, 1, 3]))
    dim = chosen.randrange(tensor.dim())
    size = chosen.choice([0, 1, max(0, tensor.shape[dim] - 1), tensor.shape[dim] + 1])
    shape = [*tensor.shape]
    shape[dim] = size
    return tensor.new_ones(shape)


def _another_memory(chosen: random.Random, tensor: Any, others: Sequence[Any]) -> Any:
    """Return a view of another argument's memory, if one is large enough."""
    for other in others:
        for candidate in other if isinstance(other, list) else [other]:
            is_tensor = isinstance(candidate, torch.Tensor) and candidate.device == tensor.device
            if is_tensor and candidate.dtype == tensor.dtype and candidate.numel() >= tensor.numel() > 0:
                return candidate.flatten()[: tensor.numel()].view(tensor.shape)
    return tensor


def _with_strange_values(chosen: random.Random, tensor: Any, others: Sequence[Any]) -> Any:
    if tensor.dtype == torch.bool:
        return torch.full(tensor.shape, chosen.choice([2, 255]), dtype=torch.uint8).view(torch.bool)
    if not tensor.dtype.is_floating_point:
        return torch.full_like(tensor, chosen.choice([0, 1, 100, 255] + [-1, 2**62] * (tensor.dtype == torch.int64)))
    value = chosen.choice([0.0, 1e30, -1e30, float("nan"), float("inf"), float("-inf")])
    return torch.full(tensor.shape, value, dtype=torch.float64).to(tensor.dtype)


def _another_dtype(chosen: random.Random, tensor: Any, others: Sequence[Any]) -> Any:
    of = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.complex64]
    of += [torch.int64, torch.int32, torch.uint8, torch.int8, torch.bool]
    return tensor.to(torch.float32).to(chosen.choice(of))


CHANGES: list[Callable[[random.Random, Any, Sequence[Any]], Any]] = [
    _another_size,
    _another_size,
    _another_memory,
    _another_dtype,
    _with_strange_values,
    lambda chosen, tensor, others: tensor.unsqueeze(chosen.randint(0, tensor.dim())),
    lambda chosen, tensor, others: tensor.flatten(),
    lambda chosen, tensor, others: tensor.sum() if tensor.dtype.is_floating_point else tensor.new_zeros(()),
    lambda chosen, tensor, others: tensor.new_zeros((chosen.randint(0, 9), 0)),
    lambda chosen, tensor, others: tensor.to("meta"),
    lambda chosen, tensor, others: tensor.mT if tensor.dim() > 1 else tensor.flip(0) if tensor.dim() else tensor,
    lambda chosen, tensor, others: tensor[..., :1].expand(tensor.shape) if tensor.dim() and tensor.numel() else tensor,
    lambda chosen, tensor, others: tensor.repeat_interleave(2, -1)[..., ::2] if tensor.dim() else tensor,
    lambda chosen, tensor, others: tensor.to_sparse() if tensor.dim() else tensor,
    lambda chosen, tensor, others: tensor.requires_grad_() if tensor.dtype.is_floating_point else tensor,
    lambda chosen, tensor, others: None,
    lambda chosen, tensor, others: 1.5,
]

if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        make_calls(sys.argv[2], *map(int, sys.argv[3:]))
    else:
        sys.exit(main())
