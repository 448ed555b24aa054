"""The command line: `wakesleep train | resume | evaluate | sample | bench | check | selftest | info`."""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import wraps
from importlib.util import find_spec
from inspect import Signature, signature
from json import dumps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wakesleep_ext import info as information
from wakesleep_ext import selftest as checks
from wakesleep_ext._files import FileError
from wakesleep_ext.benchmark import bench
from wakesleep_ext.check import check
from wakesleep_ext.evaluation.bounds import Evaluation, independent_bernoulli_nll
from wakesleep_ext.evaluation.bounds import evaluate as evaluate_machine
from wakesleep_ext.helmholtz.models import HelmholtzMachine, Latents, ModelConfig
from wakesleep_ext.helmholtz.networks import Activation
from wakesleep_ext.report import plots
from wakesleep_ext.report.pictures import draw_dreams, draw_run
from wakesleep_ext.report.tables import table
from wakesleep_ext.training.config import RECIPES, Recipe, TrainConfig
from wakesleep_ext.training.data import DIGITS, Dataset, load
from wakesleep_ext.training.run import Run, RunConfig
from wakesleep_ext.training.trainer import DivergedError, Trainer
from wakesleep_ext.usage import Device, UsageError, find_device

_EXTRA_MODULES = ("matplotlib", "numpy", "safetensors", "sklearn", "tqdm", "typeguard", "tyro")


def train(
    training: TrainConfig = RECIPES["digits"],
    recipe: Recipe = "digits",
    data: str = DIGITS,
    out: Path | None = None,
    overwrite: bool = False,
    device: Device = "auto",
    latent: tuple[int, ...] = ModelConfig.latent,
    recognition_hidden: tuple[int, ...] = ModelConfig.recognition_hidden,
    generative_hidden: tuple[int, ...] = ModelConfig.generative_hidden,
    latent_hidden: tuple[int, ...] = ModelConfig.latent_hidden,
    latents: Latents = ModelConfig.latents,
    activation: Activation = ModelConfig.activation,
    bound_samples: int = 1000,
) -> None:
    """Train a Helmholtz machine on images.

    Args:
        training: How to train.
        recipe: Protocol that the defaults of the training flags are taken from: "mnist" is 100 epochs with falling
            step sizes, "burda" the eight stages of Burda, Grosse & Salakhutdinov (2016), 3,280 epochs of batch 20.
        data: "digits", a folder of IDX files such as MNIST's, or a .npz file with uint8 or bool
            arrays x_train and x_test.
        out: Run folder; runs/<name of the data> by default.
        overwrite: Replace the run that the folder holds.
        device: Where to train; auto takes the GPU if there is one.
        latent: Latent variables of each stochastic layer, from x up; one size, one layer.
        recognition_hidden: Hidden widths of the recognition network, from x to the first latent variables.
        generative_hidden: Hidden widths of the generative network, from the first latent variables to x.
        latent_hidden: Hidden widths between one stochastic layer and the next, in both directions.
        latents: Gaussian latent variables, or Bernoulli ones as in a sigmoid belief network.
        activation: Activation after each hidden layer.
        bound_samples: Samples per test image for the bound that is reported at the end.
    """
    where = find_device(device)
    dataset = load(data)
    try:
        observed = dataset.train.grey.shape[1]
        model = ModelConfig(observed, latent, recognition_hidden, generative_hidden, latent_hidden, latents, activation)
        source = data if data == DIGITS else os.path.abspath(data)
        config = RunConfig.of(source, dataset, model, training, bound_samples)
        torch.manual_seed(training.seed)
        machine = model.build(dataset.train.mean()).to(where)
        trainer = Trainer(machine, dataset.train.to(where), training)
    except ValueError as error:
        raise UsageError(str(error)) from error
    with Run.begin(out or Path("runs") / dataset.name, config, overwrite) as run:
        _finish(run, trainer, dataset)


def resume(run: Path, /, device: Device = "auto") -> None:
    """Go on with a training run that was interrupted, to the numbers that it would have come to.

    Args:
        run: Folder of the training run.
        device: Where to train; auto takes the GPU if there is one.
    """
    with Run.resume(run, find_device(device)) as (resumed, trainer, dataset):
        _finish(resumed, trainer, dataset)


def _finish(run: Run, trainer: Trainer, dataset: Dataset) -> None:
    """Train, from wherever the trainer stands; then test, and draw the pictures."""
    from tqdm import tqdm

    where = trainer.images.grey.device
    test = dataset.binary_test().to(where)
    baseline_nll = independent_bernoulli_nll(dataset.train.mean().to(where), test)
    steps = trainer.config.epochs * trainer.steps_per_epoch
    epochs = []
    with tqdm(total=steps, initial=trainer.step, unit="step", desc=f"Training on {where}") as bar:
        for epoch in run.train(trainer, test, on_step=bar.update):
            epochs.append(epoch)
            bar.set_postfix(epoch=epoch["epoch"], test_elbo=f"{epoch['test_elbo']:.2f}", refresh=False)
    evaluation = _evaluation(trainer.machine, test, run.config.bound_samples)
    result = {"baseline_nll": baseline_nll} | evaluation.summary()
    run.note({"step": trainer.step} | result)
    draw_run(run.picture, trainer.machine, test, dataset.train.shape, epochs, evaluation, baseline_nll)
    print(table(result))
    print(f"\nRun folder: {run.folder}")


def evaluate(
    run: Path,
    /,
    bound_samples: int = 1000,
    dreams: int = 1000,
    ais_images: int = 0,
    ais_chains: int = 16,
    ais_steps: int = 1000,
    data: str | None = None,
    device: Device = "auto",
    seed: int = 0,
    picture: Path | None = None,
    json: bool = False,
) -> None:
    """Test a trained machine: its NLL bound and ELBO beside independent Bernoulli pixels, how far recognition is from
    the posterior, and dreams from the data.

    Args:
        run: Folder of a training run.
        bound_samples: Samples per test image, and per dream, K.
        dreams: How many dreams.
        ais_images: Test images, from the first on, whose likelihood is also found by annealed importance sampling,
            which is slow: seconds an image on a CPU.
        ais_chains: Its chains for each image.
        ais_steps: Its steps from the prior to the posterior.
        data: As for train; what the run was trained on by default.
        device: Where to compute; auto takes the GPU if there is one.
        seed: Seed of the samples.
        picture: A PNG that is drawn of the result.
        json: Print one JSON object instead of a table.
    """
    for flag, value, least in (
        ("--bound-samples", bound_samples, 1),
        ("--dreams", dreams, 2),
        ("--ais-images", ais_images, 0),
        ("--ais-chains", ais_chains, 2),
        ("--ais-steps", ais_steps, 1),
    ):
        if value < least:
            raise UsageError(f"expected {flag} of at least {least}, got {value}")
    where = find_device(device)
    trained, machine = Run.load(run)
    dataset = _dataset(trained, data)
    test = dataset.binary_test().to(where)
    baseline_nll = independent_bernoulli_nll(dataset.train.mean().to(where), test)
    annealing = {"annealed_images": ais_images, "chains": ais_chains, "temperatures": ais_steps}
    evaluation = _evaluation(machine.to(where), test, bound_samples, num_dreams=dreams, seed=seed, **annealing)
    if picture is not None:
        picture.parent.mkdir(parents=True, exist_ok=True)
        plots.evaluation(picture, evaluation)
    result = {"baseline_nll": baseline_nll} | evaluation.summary()
    print(dumps(result) if json else table(result))


def sample(run: Path, /, out: Path, count: int = 100, device: Device = "auto", seed: int = 0) -> None:
    """Dream: draw latent variables and write the images they generate, each pixel as its mean.

    Args:
        run: Folder of a training run.
        out: The picture that is written, a PNG.
        count: How many images.
        device: Where to compute; auto takes the GPU if there is one.
        seed: Seed of the draw.
    """
    if count < 1:
        raise UsageError(f"expected --count of at least 1, got {count}")
    where = find_device(device)
    trained, machine = Run.load(run)
    draw_dreams(out, machine.to(where), trained.config.image_shape, count, seed)


def selftest() -> int:
    """Check every op against float64 on this machine, values and gradients: pass or fail for each."""
    failed = False
    for outcome in checks.outcomes():
        verdict = "pass" if outcome.passed else "FAIL"
        dtype = str(outcome.dtype).removeprefix("torch.")
        print(f"{verdict}  {outcome.op:29} {outcome.device:5} {dtype:9} error {outcome.error:.1e}", flush=True)
        failed |= not outcome.passed
    return int(failed)


def info() -> int:
    """Report versions, how the kernels were built, SIMD level and GPUs."""
    return information.main()


def _dataset(run: Run, data: str | None) -> Dataset:
    """What a run was trained on, or other data of the same shape."""
    dataset = load(data or run.config.data)
    if dataset.test.shape != run.config.image_shape:
        raise UsageError(
            f"{run.folder} was trained on images of shape {list(run.config.image_shape)}, "
            f"those of {dataset.name} have {list(dataset.test.shape)}"
        )
    return dataset


def _evaluation(
    machine: HelmholtzMachine, test: Tensor, bound_samples: int, num_dreams: int = 1000, **settings: int
) -> Evaluation:
    """With a progress bar for each part of it."""
    from tqdm import tqdm

    with ExitStack() as bars:

        def progress(part: str, images: int) -> Callable[[int], object]:
            bars.close()  # that of the part before
            bar = bars.enter_context(tqdm(total=images, unit="image", desc=part))
            return bar.update

        try:
            return evaluate_machine(machine, test, bound_samples, num_dreams, progress=progress, **settings)
        except ValueError as error:
            raise UsageError(str(error)) from error


_COMMANDS: tuple[Callable[..., int | None], ...] = (train, resume, evaluate, sample, bench, check, selftest, info)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    if missing := [name for name in _EXTRA_MODULES if find_spec(name) is None]:
        return _fail(f"{', '.join(missing)} missing; install with: pip install 'wakesleep_ext[train]'")
    import tyro

    argv = sys.argv[1:] if argv is None else argv
    commands = {command.__name__: command for command in _COMMANDS}
    try:
        status: int | None = tyro.extras.subcommand_cli_from_dict(
            commands | {"train": _by_recipe(argv)},
            prog="wakesleep",
            description="Helmholtz machines trained by the wake-sleep algorithm.",
            args=argv,
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
        )
    except (UsageError, FileError, DivergedError, OSError) as error:
        return _fail(str(error))
    except (MemoryError, torch.OutOfMemoryError) as error:
        return _fail(f"out of memory: {error}".splitlines()[0])
    except KeyboardInterrupt:
        return _fail("interrupted", status=130)
    return status or 0


def _by_recipe(argv: Sequence[str]) -> Callable[..., None]:
    """:func:`train`, its defaults those of the recipe that is named on the command line."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--recipe", default="digits")
    recipe = RECIPES.get(parser.parse_known_args(argv)[0].recipe, RECIPES["digits"])  # train itself refuses others
    training, *others = signature(train).parameters.values()

    @wraps(train)
    def command(*arguments: Any, **keywords: Any) -> None:
        train(*arguments, **keywords)

    command.__signature__ = Signature([training.replace(default=recipe), *others])  # type: ignore[attr-defined]
    return command


def _fail(message: str, status: int = 1) -> int:
    print(f"wakesleep: {message}", file=sys.stderr)
    return status
