"""The command line: `wakesleep train | evaluate | sample | bench | selftest | info`."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from json import dumps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wakesleep_ext import checkpoint, plots, random
from wakesleep_ext import info as information
from wakesleep_ext import selftest as checks
from wakesleep_ext.benchmark import bench
from wakesleep_ext.data import DIGITS, DataError, load
from wakesleep_ext.evaluation import independent_bernoulli_nll, log_likelihood_bounds
from wakesleep_ext.models import Activation, HelmholtzMachine, ModelConfig
from wakesleep_ext.training import DivergedError, TrainConfig, Trainer
from wakesleep_ext.usage import Device, UsageError, find_device

CHECKPOINT = "checkpoint.safetensors"
CONFIG = "config.json"
METRICS = "metrics.jsonl"

_RUN_FILES = (CHECKPOINT, CONFIG, METRICS, "samples.png", "reconstructions.png", "curves.png")
_SECONDS_BETWEEN_SAVES = 10.0
_EXTRA_MODULES = ("matplotlib", "numpy", "safetensors", "sklearn", "tqdm", "tyro")


def train(
    training: TrainConfig,
    data: str = DIGITS,
    out: Path | None = None,
    overwrite: bool = False,
    device: Device = "auto",
    latent: int = ModelConfig.latent,
    recognition_hidden: tuple[int, ...] = ModelConfig.recognition_hidden,
    generative_hidden: tuple[int, ...] = ModelConfig.generative_hidden,
    activation: Activation = ModelConfig.activation,
    bound_samples: int = 1000,
) -> None:
    """Train a Helmholtz machine on images.

    Args:
        training: How to train.
        data: "digits", a folder of IDX files such as MNIST's, or a .npz file with uint8 or bool
            arrays x_train and x_test.
        out: Run folder; runs/<name of the data> by default.
        overwrite: Replace the run that the folder holds.
        device: Where to train; auto takes the GPU if there is one.
        latent: Latent variables.
        recognition_hidden: Hidden widths of the recognition network, from x to z.
        generative_hidden: Hidden widths of the generative network, from z to x.
        activation: Activation after each hidden layer.
        bound_samples: Samples per test image for the bound that is reported at the end.
    """
    from tqdm import tqdm

    where = find_device(device)
    dataset = load(data)
    out = out or Path("runs") / dataset.name
    observed = dataset.train.grey.shape[1]
    try:
        model = ModelConfig(observed, latent, recognition_hidden, generative_hidden, activation)
    except ValueError as error:
        raise UsageError(str(error)) from error
    description: dict[str, Any] = {
        "data": data if data == DIGITS else os.path.abspath(data),
        "image_shape": dataset.train.shape,
        "model": asdict(model),
        "training": asdict(training),
    }
    _claim(out, overwrite)
    checkpoint.write_atomically(out / CONFIG, dumps(description, indent=2).encode() + b"\n")

    torch.manual_seed(training.seed)
    machine = HelmholtzMachine(model, dataset.train.mean()).to(where)
    trainer = Trainer(machine, dataset.train.to(where), training)
    test = dataset.binary_test().to(where)
    baseline_nll = independent_bernoulli_nll(dataset.train.mean().to(where), test)

    def save() -> tuple[int, float]:
        described = description | {"step": trainer.step}
        checkpoint.save(out / CHECKPOINT, trainer.state_dict(), described)
        return trainer.step, time.monotonic()

    saved_step, saved_at = save()
    epochs = []
    steps = training.epochs * trainer.steps_per_epoch
    with (
        (out / METRICS).open("w") as metrics,
        tqdm(total=steps, unit="step", desc=f"Training on {where}") as bar,
    ):
        try:
            for epoch in trainer.epochs(on_step=bar.update):
                bounds = log_likelihood_bounds(machine.recognition, machine.generative, test, 1)
                elbo = bounds.elbo.mean().item()
                epochs.append(asdict(epoch) | {"test_elbo": elbo})
                print(dumps(epochs[-1]), file=metrics, flush=True)
                bar.set_postfix(epoch=epoch.epoch, test_elbo=f"{elbo:.2f}", refresh=False)
                if time.monotonic() > saved_at + _SECONDS_BETWEEN_SAVES:
                    saved_step, saved_at = save()
        except DivergedError as error:
            raise DivergedError(
                f"{error}; the last good checkpoint, of step {saved_step}, is {out / CHECKPOINT}"
            ) from error
        save()
    result = _result(machine, test, baseline_nll, bound_samples)
    with (out / METRICS).open("a") as metrics:
        print(dumps({"step": trainer.step} | result), file=metrics)

    shape = dataset.train.shape
    plots.samples(out / "samples.png", _dream_means(machine, 100), shape)
    shown = test[:40]
    reconstructed = machine.reconstruct(shown, key=random.make_key(0, device=where))
    plots.reconstructions(out / "reconstructions.png", shown, reconstructed, shape)
    plots.curves(out / "curves.png", epochs, baseline_nll)
    print(_table(result))
    print(f"\nRun folder: {out}")


def evaluate(
    run: Path,
    /,
    bound_samples: int = 1000,
    data: str | None = None,
    device: Device = "auto",
    seed: int = 0,
    json: bool = False,
) -> None:
    """Test a trained machine: its NLL bound and ELBO beside independent Bernoulli pixels.

    Args:
        run: Folder of a training run.
        bound_samples: Samples per test image, K.
        data: As for train; what the run was trained on by default.
        device: Where to compute; auto takes the GPU if there is one.
        seed: Seed of the samples.
        json: Print one JSON object instead of a table.
    """
    machine, description = _load(run, device)
    dataset = load(data or description["data"])
    if dataset.test.shape != tuple(description["image_shape"]):
        raise UsageError(
            f"{run} was trained on images of shape {description['image_shape']}, "
            f"those of {dataset.name} have {list(dataset.test.shape)}"
        )
    where = next(machine.parameters()).device
    test = dataset.binary_test().to(where)
    baseline_nll = independent_bernoulli_nll(dataset.train.mean().to(where), test)
    result = _result(machine, test, baseline_nll, bound_samples, seed)
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
        print(f"{verdict}  {outcome.op:26} {outcome.device:5} {dtype:9} error {outcome.error:.1e}", flush=True)
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


@torch.no_grad()
def _dream_means(machine: HelmholtzMachine, count: int, seed: int = 0) -> Tensor:
    where = next(machine.parameters()).device
    keys = (random.make_key(seed, 0, where), random.make_key(seed, 1, where))
    means: Tensor = machine.generative(machine.dream(count, keys=keys).z).sigmoid()
    return means


def _result(
    machine: HelmholtzMachine, test: Tensor, baseline_nll: float, samples: int, seed: int = 0
) -> dict[str, float]:
    from tqdm import tqdm

    with tqdm(total=len(test), unit="image", desc=f"NLL bound, K = {samples}") as bar:
        bounds = log_likelihood_bounds(
            machine.recognition, machine.generative, test, samples, seed=seed, on_images=bar.update
        )
    return {
        "nll": -bounds.log_likelihood.mean().item(),
        "elbo": bounds.elbo.mean().item(),
        "baseline_nll": baseline_nll,
        "bound_samples": samples,
        "images": len(test),
    }


def _table(result: dict[str, float]) -> str:
    rows = {
        "independent Bernoulli pixels": result["baseline_nll"],
        "Helmholtz machine, -ELBO": -result["elbo"],
        f"Helmholtz machine, NLL bound, K = {result['bound_samples']}": result["nll"],
    }
    width = max(map(len, rows))
    lines = [f"{'':{width}}  nats per image ({result['images']} test images)"]
    lines += [f"{name:{width}}  {nats:9.3f}" for name, nats in rows.items()]
    return "\n".join(lines)


_COMMANDS: tuple[Callable[..., int | None], ...] = (train, evaluate, sample, bench, selftest, info)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    if missing := [name for name in _EXTRA_MODULES if find_spec(name) is None]:
        return _fail(f"{', '.join(missing)} missing; install with: pip install 'wakesleep_ext[train]'")
    import tyro

    try:
        status: int | None = tyro.extras.subcommand_cli_from_dict(
            {command.__name__: command for command in _COMMANDS},
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


def _fail(message: str, status: int = 1) -> int:
    print(f"wakesleep: {message}", file=sys.stderr)
    return status
