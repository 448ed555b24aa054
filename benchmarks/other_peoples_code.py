"""Measures what the ops change in well-known programs: `python benchmarks/other_peoples_code.py pytorch-vae main.py`.

You give the path of a program that you have. The script replaces a few expressions of its text in memory, runs the
original and the patched text in two processes that take turns, and prints milliseconds per training step, their ratio
and both losses. It measures the CPU. The programs are not part of this repository.

A training step is the time from one call of `Tensor.backward` to the next. Small stand-ins replace what a program
imports and a step does not need, such as the loader of images and the environment of a policy.

In torch and Pyro, distributions check their arguments unless Python runs with `-O`. So does this script:
`python -O benchmarks/other_peoples_code.py ...` measures both versions without these checks.
"""

from __future__ import annotations

import argparse
import datetime
import difflib
import json
import multiprocessing
import os
import random
import re
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass
from itertools import cycle
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import fmean, median, quantiles
from time import perf_counter
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import wakesleep_ext as ws
from wakesleep_ext._files import write_atomically
from wakesleep_ext.benchmark.report import markdown
from wakesleep_ext.benchmark.result import machine
from wakesleep_ext.training.data import DIGITS, load

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/guides/other-peoples-code.md"
CHECKED = 20
"""First steps, in which both versions draw the same noise, so that their losses agree up to rounding."""
MAX_ERROR = 1e-4
"""Largest difference of these losses, relative to their mean magnitude."""

UPDATE, ACTION = "training step", "action"


class Replacement(NamedTuple):
    """An expression of a program, and what takes its place."""

    old: str
    new: str
    times: int = 1
    """How often the expression occurs."""


@dataclass(frozen=True)
class Program:
    """A program that the script can patch and run."""

    name: str
    title: str
    source: str
    """The repository and the file that it comes from."""
    replacements: tuple[Replacement, ...]
    stand_ins: Callable[[Tensor], dict[str, ModuleType]] | None = None
    """Makes the modules that stand in for others, given images `[N, 784]` in [0, 1]."""
    arguments: tuple[str, ...] = ()
    """Command-line arguments that the program gets."""
    marks: int = 20
    """Steps of a turn, actions included."""
    has_distributions: bool = True
    """Whether it has distributions, which check their arguments."""


class PatchError(ValueError):
    """A program is not the one that a patch was written for."""


class DisagreementError(ArithmeticError):
    """The losses of the two versions differ by more than rounding."""


def patch(program: Program, text: str) -> str:
    """The program's text with every expression replaced.

    Raises:
        PatchError: an expression does not occur, or occurs another number of times.
    """
    for old, new, times in program.replacements:
        if (found := text.count(old)) != times:
            raise PatchError(
                f"{program.name}: expected to find this expression {_times(times)}, found it {_times(found)}: "
                f"{textwrap.dedent(old).strip()!r}. The file is another program, or it changed after the patch was "
                "written"
            )
        text = text.replace(old, new)
    return text


def _times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count} times")


def difference(program: Program) -> str:
    """The replaced expressions as a diff."""
    lines: list[str] = []
    for old, new, _ in program.replacements:
        before, after = (textwrap.dedent(side).splitlines() for side in (old, new))
        lines += [line.rstrip() for line in list(difflib.unified_diff(before, after, n=9, lineterm=""))[3:]]
    return "\n".join(lines)


# ---- one version, in a process of its own ----------------------------------------------------------------------------


class _Finished(BaseException):
    """Ends a program from within; not an `Exception`, so that the program does not catch it."""


class Turns:
    """Times a program, and stops it while the other version has its turn.

    Args:
        connection: says how many steps the next turn has, and gets their times and losses.
        checked: in the first steps, as many as this, torch draws its noise as the ops do.
    """

    def __init__(self, connection: Connection, checked: int) -> None:
        self.connection, self.checked = connection, checked
        self.noise = ExitStack()
        self.noise.enter_context(_shared_noise())
        self.updates = 0
        self.last: str | None = None
        self.since = 0.0
        self._wait()

    def backward(self, loss: Tensor) -> None:
        """A program calls `loss.backward()`."""
        if self.updates == self.checked:
            self.noise.close()
        self.updates += 1
        self.mark(UPDATE)
        self.losses.append(loss.item())

    def mark(self, kind: str) -> None:
        """A step begins. It is timed if the step before was of the same kind."""
        now = perf_counter()
        if self.last == kind:
            self.seconds.setdefault(kind, []).append(now - self.since)
        self.last, self.since = kind, now
        if self.left == 0:
            self.connection.send((self.seconds, self.losses))
            self._wait()
        self.left -= 1

    def _wait(self) -> None:
        self.seconds: dict[str, list[float]] = {}
        self.losses: list[float] = []
        self.left: int = self.connection.recv()
        if not self.left:
            raise _Finished
        self.since = perf_counter()


@contextmanager
def _shared_noise() -> Iterator[None]:
    """Has torch draw its standard normals by the op, from the same keys as the patched version."""

    def noise(like: Tensor, **_: Any) -> Tensor:
        zeros = torch.zeros_like(like)
        return ws.gaussian_rsample(zeros, zeros)

    def standard_normal(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        return noise(torch.empty(shape, dtype=dtype, device=device))

    def sample(normal: torch.distributions.Normal, shape: Sequence[int] = ()) -> Tensor:
        with torch.no_grad():
            return normal.rsample(torch.Size(shape))

    with (
        mock.patch.object(torch, "randn_like", noise),
        mock.patch.object(torch.distributions.normal, "_standard_normal", standard_normal),
        mock.patch.object(torch.distributions.Normal, "sample", sample),
    ):
        yield


def _play(
    connection: Connection, program: Program, path: Path, patched: bool, data: str, threads: int, checked: int
) -> None:
    """Runs one version of a program as the main module, as long as it gets turns."""
    global _turns
    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    sys.argv = [str(path), *program.arguments]
    if program.stand_ins:
        sys.modules.update(program.stand_ins(_images(data)))
    main = sys.modules["__main__"] = ModuleType("__main__")
    main.__file__ = str(path)
    text = path.read_text()
    # without the program's assertions, one of which wants an exact version of Pyro
    code = compile(patch(program, text) if patched else text, str(path), "exec", optimize=1)
    plain = Tensor.backward

    def backward(loss: Tensor, *arguments: Any, **named: Any) -> None:
        _turns.backward(loss)
        plain(loss, *arguments, **named)

    Tensor.backward = backward  # type: ignore[method-assign, assignment]
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        try:
            _turns = Turns(connection, checked)
            exec(code, main.__dict__)
        except _Finished:
            return
    raise RuntimeError(f"{program.name}: the program ended before it was measured")


_turns: Turns


def _images(data: str) -> Tensor:
    """At most 10,000 images of 28 x 28 pixels, `[N, 784]` in [0, 1]; the small digits are enlarged to that size."""
    images = load(data).train
    grey = images.grey[:10_000].float().view(-1, 1, *images.shape) / images.white
    if images.shape != (28, 28):
        grey = F.pad(F.interpolate(grey, (24, 24)), (2, 2, 2, 2))
    return grey.flatten(1)


# ---- both versions ---------------------------------------------------------------------------------------------------


def measure(
    program: Program, path: Path, data: str, threads: int, turns: int, checked: int = CHECKED
) -> dict[str, Any]:
    """Runs both versions of a program in turn.

    Args:
        program: how to patch and run it.
        path: its text.
        data: what :func:`wakesleep_ext.training.data.load` takes.
        threads: of the CPU.
        turns: of each version, at least two, after a first one that is not timed.
        checked: steps whose losses are compared.

    Raises:
        PatchError: the patch does not fit the program.
        DisagreementError: the losses of the first steps differ by more than rounding.
        RuntimeError: a version of the program failed, or ended too early.
    """
    patch(program, path.read_text())
    spawn = multiprocessing.get_context("spawn")
    versions = []
    with mock.patch.dict(os.environ, CUDA_VISIBLE_DEVICES=""):
        for patched in (False, True):
            own, other = spawn.Pipe()
            arguments = other, program, path.resolve(), patched, data, threads, checked
            process = spawn.Process(target=_play, args=arguments, daemon=True)
            process.start()
            other.close()
            versions.append((process, own))
    try:
        first = [_turn(program, own, max(program.marks, checked + 1)) for _, own in versions]
        rounds = [[_turn(program, own, program.marks) for _, own in versions] for _ in range(turns)]
        for _, own in versions:
            own.send(0)
    finally:
        for process, own in versions:
            own.close()
            process.join(10)
            process.kill()
    original, ours = (torch.tensor(losses[:checked]) for _, losses in first)
    error = ((original - ours).abs().max() / original.abs().mean()).item()
    if not error < MAX_ERROR:
        raise DisagreementError(f"{program.name}: the losses of the first {checked} steps differ by {error:.1e}")
    losses = [fmean(loss for round_ in rounds for loss in round_[version][1]) for version in (0, 1)]
    return {
        "program": program.name,
        "validation": __debug__,
        "date": datetime.date.today().isoformat(),
        "machine": machine(torch.device("cpu"), threads, _command(program, data, threads, turns)),
        "turns": turns,
        "checked_steps": len(original),
        "loss_error": error,
        "mean_losses": losses,
        "steps": [
            _summary(kind, [[seconds[kind] for seconds, _ in round_] for round_ in rounds])
            for kind in (UPDATE, ACTION)
            if kind in rounds[0][0][0]
        ],
    }


def _command(program: Program, data: str, threads: int, turns: int) -> str:
    """What measures this again, without the folders of the computer."""
    flag = "" if __debug__ else " -O"
    source = program.source.rpartition(" ")[2]
    images = "" if data == DIGITS else f" --data {Path(data).name}"
    script = f"python{flag} benchmarks/other_peoples_code.py {program.name} {source}"
    return f"{script}{images} --threads {threads} --turns {turns}"


def _turn(program: Program, connection: Connection, marks: int) -> tuple[dict[str, list[float]], list[float]]:
    try:
        connection.send(marks)
        return connection.recv()
    except (EOFError, OSError) as error:
        raise RuntimeError(f"{program.name}: a version of the program stopped; its error is above") from error


def _summary(kind: str, rounds: Sequence[Sequence[Sequence[float]]]) -> dict[str, Any]:
    """Median and interquartile range over the rounds: of the median step of each version, and of their ratio."""
    medians = [[1e3 * median(seconds) for seconds in round_] for round_ in rounds]
    found: dict[str, Any] = {"step": kind, "steps_per_turn": len(rounds[-1][0])}
    for name, values in (
        ("original_ms", [original for original, _ in medians]),
        ("patched_ms", [patched for _, patched in medians]),
        ("ratio", [original / patched for original, patched in medians]),
    ):
        low, middle, high = quantiles(values, n=4, method="inclusive")
        found[name], found[f"{name}_iqr"] = round(middle, 4), round(high - low, 4)
    return found


# ---- the page --------------------------------------------------------------------------------------------------------


def refresh(text: str, folder: Path) -> str:
    """The guide with its tables and diffs made again; it is up to date if nothing changes."""

    def section(found: re.Match[str]) -> str:
        begin, kind, name, end = found.groups()
        made = table(json.loads((folder / name).read_text())) if kind == "figures" else _fenced(name)
        return f"{begin}\n{made}\n\n{end}"

    return re.sub(r"(<!-- (figures|diff): (\S+) -->\n).*?(<!-- end of \2 -->)", section, text, flags=re.DOTALL)


def _fenced(name: str) -> str:
    return f"~~~diff\n{difference(_program(name))}\n~~~"


def table(records: Sequence[dict[str, Any]]) -> str:
    """Figures of all programs, and where they were measured."""
    lines = [
        ("program", "values checked", "step", "original", "patched", "original takes", "losses differ by"),
    ]
    for record in records:
        program = _program(record["program"])
        validation = "yes" if record["validation"] else "no"
        for step in record["steps"]:
            lines.append(
                (
                    program.title,
                    validation if program.has_distributions else "none",
                    step["step"],
                    *(f"{step[of]:.2f} ± {step[f'{of}_iqr'] / 2:.2f} ms" for of in ("original_ms", "patched_ms")),
                    f"{step['ratio']:.2f} ± {step['ratio_iqr'] / 2:.2f} times",
                    f"{record['loss_error']:.0e}",
                )
            )
    return "\n\n".join((markdown(lines), *dict.fromkeys(_place(record) for record in records)))


def _place(record: dict[str, Any]) -> str:
    about = record["machine"]
    threads = f"{about['threads']} thread{'s' * (about['threads'] != 1)}"
    return (
        f"Measured on an {about['processor']} with {about['simd']}, {threads}, torch {about['torch']}, on "
        f"{record['date']}, in {record['turns']} turns of each version."
    )


# ---- stand-ins -------------------------------------------------------------------------------------------------------


def _module(name: str, **contents: Any) -> ModuleType:
    module = ModuleType(name)
    module.__dict__.update(contents)
    return module


def _nothing(*_: Any, **__: Any) -> None:
    """Does nothing, like a writer of logs or pictures that is left out."""


class Batches:
    """Batches that lie ready in memory, in the place of a `DataLoader`. They never end."""

    def __init__(self, dataset: Tensor, batch_size: int, **_: Any) -> None:
        self.dataset = dataset
        self.batches = dataset[: len(dataset) // batch_size * batch_size].split(batch_size)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, None]]:
        return ((batch, None) for batch in cycle(self.batches))


def _torchvision(images: Tensor) -> dict[str, ModuleType]:
    torch.utils.data.DataLoader = Batches  # type: ignore[assignment, misc]
    pictures = images.view(-1, 1, 28, 28)
    datasets = _module("torchvision.datasets", MNIST=lambda *_, **__: pictures)
    transforms = _module("torchvision.transforms", ToTensor=_nothing)
    utils = _module("torchvision.utils", save_image=_nothing)
    package = _module("torchvision", datasets=datasets, transforms=transforms, utils=utils)
    return {module.__name__: module for module in (package, datasets, transforms, utils)}


def _pyro_utilities(images: Tensor) -> dict[str, ModuleType]:
    def setup_data_loaders(*_: Any, batch_size: int, **__: Any) -> tuple[Batches, Batches]:
        return Batches(images, batch_size), Batches(images, batch_size)

    cached = _module("utils.mnist_cached", MNISTCached=None, setup_data_loaders=setup_data_loaders)
    pictures = _module("utils.vae_plots", mnist_test_tsne=_nothing, plot_llk=_nothing, plot_vae_samples=_nothing)
    return {module.__name__: module for module in (_module("visdom"), _module("utils"), cached, pictures)}


class _Environments:
    """An environment with the sizes of HalfCheetah and no physics: observations are noise, and the reward is highest
    for an action that repeats a part of the observation."""

    def __init__(self, make: Sequence[object]) -> None:
        self.count = len(make)
        self.single_observation_space = SimpleNamespace(shape=(17,))
        self.single_action_space = SimpleNamespace(shape=(6,))
        self.random = np.random.default_rng(0)

    def reset(self, seed: int = 0) -> tuple[Any, dict[str, Any]]:
        self.observation = self.random.standard_normal((self.count, 17))
        return self.observation, {}

    def step(self, action: Any) -> tuple[Any, ...]:
        _turns.mark(ACTION)
        reward = 0.1 - 0.05 * np.square(action - self.observation[:, :6]).mean(-1)
        never = np.zeros(self.count, bool)
        return self.reset()[0], reward, never, never, {}


def _gymnasium(images: Tensor) -> dict[str, ModuleType]:
    class Writer:
        def __init__(self, folder: str) -> None:
            self.add_text = self.add_scalar = _nothing

    return {
        "gymnasium": _module("gymnasium", vector=SimpleNamespace(SyncVectorEnv=_Environments)),
        "torch.utils.tensorboard": _module("torch.utils.tensorboard", SummaryWriter=Writer),
    }


# ---- the programs ----------------------------------------------------------------------------------------------------

PROGRAMS = (
    Program(
        name="pytorch-vae",
        title="PyTorch's VAE example",
        source="pytorch/examples, vae/main.py",
        replacements=(
            Replacement("import torch\n", "import torch\nimport wakesleep_ext as ws\n"),
            Replacement("F.relu(self.fc1(x))", 'ws.linear(x, self.fc1.weight, self.fc1.bias, "relu")'),
            Replacement(
                "        std = torch.exp(0.5*logvar)\n"
                "        eps = torch.randn_like(std)\n"
                "        return mu + eps*std\n",
                "        return ws.gaussian_rsample(mu, logvar)\n",
            ),
            Replacement("F.relu(self.fc3(z))", 'ws.linear(z, self.fc3.weight, self.fc3.bias, "relu")'),
            Replacement("torch.sigmoid(self.fc4(h3))", "self.fc4(h3)"),
            Replacement(
                "F.binary_cross_entropy(recon_x, x.view(-1, 784), reduction='sum')",
                "-ws.bernoulli_log_prob(recon_x, x.view(-1, 784)).sum()",
            ),
            Replacement(
                "-0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())",
                "ws.gaussian_kl(mu, logvar).sum()",
            ),
            Replacement("recon_batch.view(", "recon_batch.sigmoid().view("),
            Replacement("model.decode(sample).cpu()", "model.decode(sample).sigmoid().cpu()"),
        ),
        stand_ins=_torchvision,
        has_distributions=False,
    ),
    Program(
        name="pyro-vae",
        title="Pyro's VAE example",
        source="pyro-ppl/pyro, examples/vae/vae.py",
        replacements=(
            Replacement(
                "import pyro.distributions as dist\n",
                "import pyro.distributions as dist\nfrom wakesleep_ext.pyro import BernoulliVector, DiagonalGaussian\n",
            ),
            Replacement("dist.Normal(z_loc, z_scale).to_event(1)", "DiagonalGaussian(z_loc, scale=z_scale)", times=2),
            Replacement("torch.sigmoid(self.fc21(hidden))", "self.fc21(hidden)"),
            Replacement(
                "dist.Bernoulli(loc_img, validate_args=False).to_event(1)",
                "BernoulliVector(loc_img, validate_args=False)",
            ),
            Replacement("self.decoder(z)\n", "self.decoder(z).sigmoid()\n"),
            Replacement("            return loc_img\n", "            return loc_img.sigmoid()\n"),
        ),
        stand_ins=_pyro_utilities,
    ),
    Program(
        name="cleanrl-ppo",
        title="CleanRL's PPO for continuous actions",
        source="vwxyzjn/cleanrl, cleanrl/ppo_continuous_action.py",
        replacements=(
            Replacement("from torch.distributions.normal import Normal\n", "import wakesleep_ext as ws\n"),
            Replacement(
                "        action_logstd = self.actor_logstd.expand_as(action_mean)\n"
                "        action_std = torch.exp(action_logstd)\n"
                "        probs = Normal(action_mean, action_std)\n",
                "        action_logvar = 2 * self.actor_logstd\n",
            ),
            Replacement("probs.sample()", "ws.gaussian_rsample(action_mean, action_logvar)"),
            Replacement("probs.log_prob(action).sum(1)", "ws.gaussian_log_prob(action_mean, action_logvar, action)"),
            Replacement(
                "probs.entropy().sum(1)",
                "(self.actor_logstd + 0.5 * np.log(2 * np.pi * np.e)).sum(1).expand(len(x))",
            ),
            Replacement("Agent(envs).to(device)", "ws.modules.fuse(Agent(envs).to(device))"),
        ),
        stand_ins=_gymnasium,
        arguments=("--num-steps", "512", "--num-minibatches", "8"),
        marks=512 + 80,
    ),
)


def _program(name: str) -> Program:
    return next(program for program in PROGRAMS if program.name == name)


def keep(path: Path, record: dict[str, Any]) -> None:
    """Adds a record to a JSON file, in the place of an earlier one of the same program."""
    records = json.loads(path.read_text()) if path.exists() else []
    names = [program.name for program in PROGRAMS]
    others = [other for other in records if _case(other) != _case(record)]
    ordered = sorted([*others, record], key=lambda each: (names.index(each["program"]), not each["validation"]))
    write_atomically(path, (json.dumps(ordered, indent=1) + "\n").encode())


def _case(record: dict[str, Any]) -> tuple[Any, ...]:
    return record["program"], record["validation"], record["machine"]["threads"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("program", nargs="?", choices=[program.name for program in PROGRAMS])
    parser.add_argument("path", nargs="?", type=Path, help="your copy of the program")
    parser.add_argument("--data", default=DIGITS, help="folder of MNIST's IDX files; enlarged small digits by default")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--turns", type=int, default=60, help="of each version, after a first one that is not timed")
    parser.add_argument("--json", type=Path, help="file that keeps the figures")
    parser.add_argument("--page", action="store_true", help="write the figures and diffs of the guide again")
    options = parser.parse_args()
    if options.page:
        write_atomically(PAGE, refresh(PAGE.read_text(), ROOT).encode())
        return
    if options.path is None:
        parser.error("name a program and the path of your copy of it")
    program = _program(options.program)
    try:
        record = measure(program, options.path, options.data, options.threads, options.turns)
    except (DisagreementError, OSError, PatchError, RuntimeError) as error:
        raise SystemExit(str(error)) from error
    print(table([record]))
    original, patched = record["mean_losses"]
    print(f"\nMean loss of the timed steps, each version with noise of its own: {original:.6g} and {patched:.6g}.")
    if options.json:
        keep(options.json, record)


if __name__ == "__main__":
    main()
