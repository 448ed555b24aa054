"""The command line: `wakesleep train | resume | evaluate | sample | bench | check | selftest | info`."""

from __future__ import annotations

import os
import sys
import time
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import wraps
from importlib.util import find_spec
from inspect import Signature, signature
from json import dumps, loads
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wakesleep_ext import info as information
from wakesleep_ext import random
from wakesleep_ext import selftest as checks
from wakesleep_ext.benchmark import bench
from wakesleep_ext.check import check
from wakesleep_ext.evaluation.bounds import Evaluation, independent_bernoulli_nll, log_likelihood_bounds
from wakesleep_ext.evaluation.bounds import evaluate as evaluate_machine
from wakesleep_ext.helmholtz.models import (
    GenerativeNetwork,
    HelmholtzMachine,
    Latents,
    ModelConfig,
    RecognitionNetwork,
)
from wakesleep_ext.helmholtz.networks import Activation
from wakesleep_ext.report import plots
from wakesleep_ext.training import checkpoint
from wakesleep_ext.training.data import DIGITS, DataError, Dataset, load
from wakesleep_ext.training.trainer import RECIPES, DivergedError, Recipe, TrainConfig, Trainer
from wakesleep_ext.usage import Device, UsageError, find_device

CHECKPOINT = "checkpoint.safetensors"
CONFIG = "config.json"
METRICS = "metrics.jsonl"

_RUN_FILES = (CHECKPOINT, CONFIG, METRICS, "samples.png", "reconstructions.png", "curves.png", "evaluation.png")
_SECONDS_BETWEEN_SAVES = 10.0
_EXTRA_MODULES = ("matplotlib", "numpy", "safetensors", "sklearn", "tqdm", "tyro")


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
    out = out or Path("runs") / dataset.name
    observed = dataset.train.grey.shape[1]
    try:
        model = ModelConfig(observed, latent, recognition_hidden, generative_hidden, latent_hidden, latents, activation)
        torch.manual_seed(training.seed)
        machine = HelmholtzMachine(model, dataset.train.mean()).to(where)
        trainer = Trainer(machine, dataset.train.to(where), training)
    except ValueError as error:
        raise UsageError(str(error)) from error
    description = {
        "data": data if data == DIGITS else os.path.abspath(data),
        "image_shape": dataset.train.shape,
        "model": asdict(model),
        "training": asdict(training),
        "bound_samples": bound_samples,
    }
    _claim(out, overwrite)
    checkpoint.write_atomically(out / CONFIG, dumps(description, indent=2).encode() + b"\n")
    _run_to_the_end(trainer, dataset, description, out)


def resume(run: Path, /, device: Device = "auto") -> None:
    """Go on with a training run that was interrupted, to the numbers that it would have come to.

    Args:
        run: Folder of the training run.
        device: Where to train; auto takes the GPU if there is one.
    """
    machine, description = _load(run, device)
    where = next(machine.parameters()).device
    dataset = _dataset(run, description)
    try:
        training = checkpoint.restore(TrainConfig, description["training"])
        trainer = Trainer(machine, dataset.train.to(where), training)
        trainer.load_state_dict(checkpoint.load(run / CHECKPOINT).tensors)
        trainer.step = description["step"]
    except (KeyError, TypeError, ValueError) as error:
        raise checkpoint.CheckpointError(run / CHECKPOINT, f"does not tell how to go on: {error}") from error
    _run_to_the_end(trainer, dataset, description, run)


def _run_to_the_end(trainer: Trainer, dataset: Dataset, description: dict[str, Any], out: Path) -> None:
    """Train, from wherever the trainer stands; then test, and draw the pictures."""
    from tqdm import tqdm

    machine, where = trainer.machine, trainer.images.grey.device
    test = dataset.binary_test().to(where)
    baseline_nll = independent_bernoulli_nll(dataset.train.mean().to(where), test)

    def save() -> tuple[int, float]:
        described = description | {"step": trainer.step}
        checkpoint.save(out / CHECKPOINT, trainer.state_dict(), described)
        return trainer.step, time.monotonic()

    saved_step, saved_at = save()
    epochs = _epochs_up_to(trainer.step, out / METRICS)
    checkpoint.write_atomically(out / METRICS, "".join(f"{dumps(epoch)}\n" for epoch in epochs).encode())
    steps = trainer.config.epochs * trainer.steps_per_epoch
    with (
        (out / METRICS).open("a") as metrics,
        tqdm(total=steps, initial=trainer.step, unit="step", desc=f"Training on {where}") as bar,
    ):
        try:
            for epoch in trainer.epochs(on_step=bar.update):
                bounds = log_likelihood_bounds(machine.recognition, machine.generative, test, 1)
                elbo = bounds.elbo.mean().item()
                losses = {f"{name}_loss": loss for name, loss in epoch.losses.items()}
                progress = {"epoch": epoch.epoch, "step": epoch.step, "seconds": epoch.seconds}
                epochs.append(progress | losses | {"test_elbo": elbo})
                print(dumps(epochs[-1]), file=metrics, flush=True)
                bar.set_postfix(epoch=epoch.epoch, test_elbo=f"{elbo:.2f}", refresh=False)
                if time.monotonic() > saved_at + _SECONDS_BETWEEN_SAVES:
                    saved_step, saved_at = save()
        except DivergedError as error:
            raise DivergedError(
                f"{error}; the last good checkpoint, of step {saved_step}, is {out / CHECKPOINT}"
            ) from error
        save()
    evaluation = _evaluation(machine, test, description["bound_samples"])
    result = _result(evaluation, baseline_nll)
    with (out / METRICS).open("a") as metrics:
        print(dumps({"step": trainer.step} | result), file=metrics)

    shape = dataset.train.shape
    plots.samples(out / "samples.png", _dream_means(machine, 100), shape)
    shown = test[:40]
    reconstructed = machine.reconstruct(shown, keys=_keys(machine.recognition, 0))
    plots.reconstructions(out / "reconstructions.png", shown, reconstructed, shape)
    plots.curves(out / "curves.png", epochs, baseline_nll)
    plots.evaluation(out / "evaluation.png", evaluation)
    print(_table(result))
    print(f"\nRun folder: {out}")


def _epochs_up_to(step: int, metrics: Path) -> list[dict[str, float]]:
    """What has been noted of the epochs that a checkpoint of this step has seen."""
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return [record for line in lines if "epoch" in (record := loads(line)) and record["step"] <= step]


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
    machine, description = _load(run, device)
    dataset = _dataset(run, description, data)
    where = next(machine.parameters()).device
    test = dataset.binary_test().to(where)
    baseline_nll = independent_bernoulli_nll(dataset.train.mean().to(where), test)
    annealing = {"annealed_images": ais_images, "chains": ais_chains, "temperatures": ais_steps}
    evaluation = _evaluation(machine, test, bound_samples, num_dreams=dreams, seed=seed, **annealing)
    if picture is not None:
        picture.parent.mkdir(parents=True, exist_ok=True)
        plots.evaluation(picture, evaluation)
    result = _result(evaluation, baseline_nll)
    print(dumps(result) if json else _table(result))


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
    machine, description = _load(run, device)
    out.parent.mkdir(parents=True, exist_ok=True)
    plots.samples(out, _dream_means(machine, count, seed), description["image_shape"])


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


def _claim(out: Path, overwrite: bool) -> None:
    """Make the run folder, and see that it holds no other run."""
    out.mkdir(parents=True, exist_ok=True)
    held = [name for name in _RUN_FILES if (out / name).exists()]
    if held and not overwrite:
        raise UsageError(
            f"{out} already holds a run ({', '.join(held)}): choose another --out, or replace it with --overwrite"
        )
    for name in held:
        (out / name).unlink()


def _load(run: Path, device: Device) -> tuple[HelmholtzMachine, dict[str, Any]]:
    machine, description = checkpoint.load_machine(run / CHECKPOINT)
    return machine.to(find_device(device)), description


def _dataset(run: Path, description: dict[str, Any], data: str | None = None) -> Dataset:
    """What a run was trained on, or other data of the same shape."""
    dataset = load(data or description["data"])
    if dataset.test.shape != tuple(description["image_shape"]):
        raise UsageError(
            f"{run} was trained on images of shape {description['image_shape']}, "
            f"those of {dataset.name} have {list(dataset.test.shape)}"
        )
    return dataset


@torch.no_grad()
def _dream_means(machine: HelmholtzMachine, count: int, seed: int = 0) -> Tensor:
    latents, _ = machine.dream(count, keys=_keys(machine.generative, seed))
    return machine.generative.pixel_means(latents[0])


def _keys(network: RecognitionNetwork | GenerativeNetwork, seed: int) -> list[Tensor]:
    """For a draw from each of its conditionals."""
    where = next(network.parameters()).device
    return [random.make_key(seed, draw, where) for draw in range(len(network))]


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


def _result(evaluation: Evaluation, baseline_nll: float) -> dict[str, Any]:
    return {"baseline_nll": baseline_nll} | evaluation.summary()


def _table(result: dict[str, Any]) -> str:
    samples, images, dreams = result["bound_samples"], result["images"], result["dreams"]
    rows = {
        "independent Bernoulli pixels": result["baseline_nll"],
        "Helmholtz machine, -ELBO": -result["elbo"],
        "  reconstruction, -E log p(x|z)": -result["reconstruction"],
    }
    rows |= {f"  KL of layer {layer}": kl for layer, kl in enumerate(result["kl"], start=1)}
    rows[f"Helmholtz machine, NLL bound, K = {samples}"] = result["nll"]
    notes = {}
    if (annealed := result.get("ais")) is not None:
        first = f"{annealed['images']} images"
        rows[f"  of the first {first}"] = annealed["bound_nll"]
        rows["  of these by annealed importance sampling"] = annealed["nll"]
        notes["  of these by annealed importance sampling"] = f" +- {annealed['standard_error']:.3f}"
    width = max(map(len, rows))
    lines = [f"{'':{width}}  nats per image ({images} test images)"]
    lines += [f"{name:{width}}  {nats:9.3f}{notes.get(name, '')}" for name, nats in rows.items()]

    wake, sleep = result["posterior_kl"]["wake"], result["posterior_kl"]["sleep"]
    lines += ["", f"{'Recognition against the posterior':{width}}  {'images':>9} {'dreams':>9}"]
    for direction, formula in (("reverse", "KL(q(z|x) || p(z|x))"), ("forward", "KL(p(z|x) || q(z|x))")):
        lines.append(f"{formula:{width}}  {wake[direction]:9.3f} {sleep[direction]:9.3f}")
    active = ", ".join(
        f"{active} of {units}" for active, units in zip(result["active_units"], result["units"], strict=True)
    )
    lines += [
        f"{f'effective sample size, of {samples}':{width}}  {result['effective_sample_size']:9.1f}",
        f"{'active units':{width}}  {active:>9}",
        f"{f'energy distance of {dreams} dreams':{width}}  {result['energy_distance']:9.4f} "
        f"(permutation test: p = {result['energy_distance_p_value']:.3f})",
    ]
    return "\n".join(lines)


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
    except (UsageError, DataError, checkpoint.CheckpointError, DivergedError, OSError) as error:
        return _fail(str(error))
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
