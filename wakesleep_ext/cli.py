"""The command line: `wakesleep train | resume | evaluate | sample | encode | report | bench | check | selftest | info`.

:func:`parse` reads the arguments and :func:`run` runs the command. Each command imports the
modules it needs when it runs, so that parsing and `--help` do not import torch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial, wraps
from json import dumps
from os.path import commonpath
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

import tyro
from tyro.conf import FlagCreatePairsOff

from wakesleep_ext._files import FileError, write_atomically
from wakesleep_ext._options import options_of
from wakesleep_ext.benchmark.command import bench
from wakesleep_ext.check.command import check
from wakesleep_ext.helmholtz.config import ModelConfig
from wakesleep_ext.training.config import RECIPES, Recipe, RunOptions, TrainConfig
from wakesleep_ext.usage import (
    PICTURES,
    Device,
    Log,
    Threads,
    UsageError,
    check_output,
    find_device,
    load_logger,
    on_threads,
)

if TYPE_CHECKING:
    from torch import Tensor

    from wakesleep_ext.evaluation.bounds import Evaluation
    from wakesleep_ext.evaluation.diagnostics import Diagnosis
    from wakesleep_ext.helmholtz.models import HelmholtzMachine
    from wakesleep_ext.training.data import Dataset
    from wakesleep_ext.training.run import Run
    from wakesleep_ext.training.trainer import Trainer

    ChosenRun: TypeAlias = dict[str, Any]
    ChosenModel: TypeAlias = dict[str, Any]
    ChosenTraining: TypeAlias = dict[str, Any]
else:
    ChosenRun = options_of(RunOptions, {"default": RunOptions()})
    ChosenModel = options_of(ModelConfig, {"default": ModelConfig(observed=1)}, without=frozenset({"observed"}))
    ChosenTraining = options_of(TrainConfig, RECIPES)

Command: TypeAlias = Callable[[], "int | None"]


def train(
    run: ChosenRun,
    model: ChosenModel,
    training: ChosenTraining,
    recipe: Annotated[Recipe | None, tyro.conf.arg(help_behavior_hint="(default: digits)")] = None,
    config: Path | None = None,
    out: Path | None = None,
    overwrite: FlagCreatePairsOff[bool] = False,
    log: tuple[Log, ...] = (),
    threads: Threads = "auto",
    device: Device = "auto",
) -> None:
    """Train a Helmholtz machine on images.

    Args:
        run: Options for the data and the final evaluation.
        model: Options for the networks.
        training: Options for the training.
        recipe: A set of defaults for the training options; burda follows Burda, Grosse & Salakhutdinov (2016).
        config: JSON file with defaults for all options, such as the config.json of a run folder.
        out: Run folder to create; runs/<name of the data> by default.
        overwrite: Replace an existing run in the run folder.
        log: Also send the metrics of each epoch to these loggers. tensorboard writes event files to the run folder.
        threads: Number of CPU threads; auto measures which number is fastest on this computer at this moment.
        device: Device to train on; auto uses the GPU if there is one.
    """
    from wakesleep_ext.training.data import load
    from wakesleep_ext.training.ranks import joined
    from wakesleep_ext.training.run import Run
    from wakesleep_ext.training.run_config import RunConfig, overlaid, read_config
    from wakesleep_ext.training.threads import choose
    from wakesleep_ext.training.trainer import Trainer

    if recipe is not None and config is not None:
        raise UsageError("expected --recipe or --config, got both")
    where, loggers = find_device(device), [load_logger(name) for name in log]
    base = {"training": asdict(RECIPES[recipe or "digits"])} if config is None else read_config(config)
    description = overlaid(base, {**run, "model": model, "training": training})
    arrays = {name: description[name] for name in ("train_array", "test_array")}
    dataset = load(description["data"], **arrays)
    with joined(where) as ranks:
        try:
            made = RunConfig.of(description, dataset)
            trainer = Trainer(made.machine(dataset).to(where), dataset.train.to(where), made.training, ranks)
        except (TypeError, ValueError) as error:
            raise UsageError(f"{config}: {error}" if config else str(error)) from error
        to = out or Path("runs") / dataset.name
        with on_threads(choose(threads, trainer.take_step)), Run.begin(to, made, trainer, overwrite) as folder:
            _finish(folder, trainer, dataset, loggers)


def resume(
    run: Path,
    /,
    data: str | None = None,
    log: tuple[Log, ...] = (),
    threads: Threads = "auto",
    device: Device = "auto",
) -> None:
    """Resume an interrupted training run. The result is bit for bit the same as without the interruption.

    Args:
        run: Folder of the training run.
        data: Where the data of the run are now, if they have moved. The images must be the same.
        log: Also send the metrics of each epoch to these loggers. tensorboard writes event files to the run folder.
        threads: Number of CPU threads; auto uses that of the run, but at most torch's default number.
        device: Device to train on; auto uses the GPU if there is one.
    """
    from wakesleep_ext.training.ranks import joined
    from wakesleep_ext.training.run import Run

    where, loggers = find_device(device), [load_logger(name) for name in log]
    with joined(where) as ranks, Run.resume(run, where, ranks, data, threads) as (resumed, trainer, dataset):
        _finish(resumed, trainer, dataset, loggers)


def _finish(run: Run, trainer: Trainer, dataset: Dataset, loggers: Sequence[Any]) -> None:
    """Train up to the last epoch, evaluate the model, and draw the pictures of the run folder."""
    from tqdm import tqdm

    from wakesleep_ext.evaluation.bounds import independent_bernoulli_nll
    from wakesleep_ext.report.pictures import draw_run
    from wakesleep_ext.report.tables import table
    from wakesleep_ext.training.metrics import write_evaluation
    from wakesleep_ext.training.signals import requests

    where = trainer.images.grey.device
    test = dataset.binary_test().to(where)
    baseline_nll = independent_bernoulli_nll(dataset.train.mean().to(where), test)
    steps = trainer.config.epochs * trainer.steps_per_epoch
    epochs: list[dict[str, Any]] = []
    is_first = trainer.ranks.rank == 0
    bar = tqdm(total=steps, initial=trainer.step, unit="step", desc=f"Training on {where}", disable=not is_first)
    with bar, requests() as stop, ExitStack() as stack:
        followers = [stack.enter_context(follow(run.folder)) for follow in loggers if is_first]
        for epoch in run.train(trainer, test, bar.update, stop):
            for consume in (epochs.append, *followers):
                consume(epoch)
            bar.set_postfix(_progress(trainer, epoch), refresh=False)
    if not is_first:
        return
    evaluation = _evaluation(trainer.machine, test, Effort(run.config.bound_samples))
    result = {"baseline_nll": baseline_nll} | evaluation.summary()
    write_evaluation(run.folder, {"step": trainer.step} | result)
    draw_run(run.picture, trainer.machine, test, dataset.train.shape, epochs, evaluation, baseline_nll)
    print(table(result))
    print(f"\nRun folder: {run.folder}")


def _progress(trainer: Trainer, epoch: dict[str, float]) -> dict[str, str]:
    """Return what the progress bar shows about an epoch: its number, the test ELBO, and the speed of its phases."""
    batch, steps = trainer.take_step.batch_size, trainer.steps_per_epoch
    phases = {"images/s": ("wake_loss", batch), "dreams/s": ("sleep_loss", trainer.config.num_dreams or batch)}
    speeds = {name: f"{size * steps / epoch['seconds']:,.0f}" for name, (loss, size) in phases.items() if loss in epoch}
    return {"epoch": f"{epoch['epoch']}", "test_elbo": f"{epoch['test_elbo']:.2f}"} | speeds


@dataclass(frozen=True)
class Effort:
    """The numbers of samples in an evaluation."""

    bound_samples: int = 1000
    """Number of samples K per test image and per dream."""
    dreams: int = 1000
    """Number of dreams to compare with the test images."""
    ais_images: int = 0
    """Number of test images for annealed importance sampling: the first ones. Each image takes seconds on a CPU."""
    ais_chains: int = 16
    """Number of chains per image in annealed importance sampling."""
    ais_steps: int = 1000
    """Number of steps from prior to posterior in annealed importance sampling."""
    diagnostics: int = 0
    """Number of dreams for calibration tests of the recognition network, such as 1000, and number of gradients per
    objective, at most 200. 0 leaves all diagnostics out. They need the extra "diagnostics"."""

    def check(self) -> None:
        """Raise a UsageError if any of the numbers is too small."""
        least_of = {"bound_samples": 1, "dreams": 2, "ais_images": 0, "ais_chains": 2, "ais_steps": 1, "diagnostics": 0}
        for name, least in least_of.items():
            if (value := getattr(self, name)) < least:
                raise UsageError(f"expected --{name.replace('_', '-')} of at least {least}, got {value}")
        if self.diagnostics:
            from wakesleep_ext.evaluation import _arviz

            for name, least in {"diagnostics": 2, "bound_samples": 25}.items():
                if (value := getattr(self, name)) < least:
                    option = name.replace("_", "-")
                    raise UsageError(f"expected --{option} of at least {least} with --diagnostics, got {value}")
            try:
                _arviz.arviz_stats()
            except ModuleNotFoundError as error:
                raise UsageError(f"--diagnostics: {error}") from error


def evaluate(
    run: Path,
    /,
    effort: Effort,
    data: str | None = None,
    device: Device = "auto",
    seed: int = 0,
    checkpoint: Literal["last", "best"] = "last",
    picture: Path | None = None,
    json: bool = False,
) -> None:
    """Evaluate a trained model by its NLL bound and ELBO; the baseline is independent Bernoulli pixels. Also measure
    the divergence of the recognition network from the posterior, and the distance between dreams and the data.

    Args:
        run: Folder of a training run.
        effort: The numbers of samples.
        data: Data to test on, in the format of train --data; by default, the data of the run.
        device: Device to compute on; auto uses the GPU if there is one.
        seed: Seed of the random number generator.
        checkpoint: The last checkpoint of the run, or the one with the highest test ELBO.
        picture: File for a plot of the result: .png, .pdf or .svg. With --diagnostics, a second file, whose name ends
            in -diagnostics, is for their plot.
        json: Print one JSON object instead of a table.
    """
    from wakesleep_ext.evaluation.bounds import independent_bernoulli_nll
    from wakesleep_ext.report import plots
    from wakesleep_ext.report.tables import table
    from wakesleep_ext.training.run import Run

    effort.check()
    if picture:
        check_output(picture, "--picture", *PICTURES)
    where = find_device(device)
    trained, machine = Run.load(run, checkpoint)
    dataset = trained.load_data(data)
    test = dataset.binary_test().to(where)
    baseline_nll = independent_bernoulli_nll(dataset.train.mean().to(where), test)
    evaluation = _evaluation(machine.to(where), test, effort, seed)
    diagnosis = _diagnosis(machine, test, effort, seed) if effort.diagnostics else None
    if picture:
        plots.evaluation(picture, evaluation)
        if diagnosis:
            plots.diagnosis(picture.with_stem(f"{picture.stem}-diagnostics"), diagnosis)
    result = {"baseline_nll": baseline_nll} | evaluation.summary()
    if json:
        print(dumps(result | ({"diagnostics": diagnosis.summary()} if diagnosis else {})))
    else:
        print("\n\n".join([table(result), *([diagnosis.table()] if diagnosis else [])]))


def sample(
    run: Path,
    /,
    out: Path,
    count: int = 100,
    device: Device = "auto",
    seed: int = 0,
    checkpoint: Literal["last", "best"] = "last",
) -> None:
    """Draw dreams from the generative network, and write a picture of their pixel means.

    Args:
        run: Folder of a training run.
        out: File for the picture: .png, .pdf or .svg.
        count: Number of dreams.
        device: Device to compute on; auto uses the GPU if there is one.
        seed: Seed of the random number generator.
        checkpoint: The last checkpoint of the run, or the one with the highest test ELBO.
    """
    from wakesleep_ext.report.pictures import draw_dreams
    from wakesleep_ext.training.run import Run

    if count < 1:
        raise UsageError(f"expected --count of at least 1, got {count}")
    check_output(out, "--out", *PICTURES)
    where = find_device(device)
    trained, machine = Run.load(run, checkpoint)
    draw_dreams(out, machine.to(where), trained.config.image_shape, count, seed)


def encode(run: Path, /, out: Path, data: str | None = None, device: Device = "auto") -> None:
    """Write the latent variables that the recognition network infers for all images.

    The file holds train_mu, train_logvar, test_mu and test_logvar, float32 [N, K]. Further stochastic layers have the
    suffix _2, _3 and so on; their values hold at the mean of the layer below. Images that are not binary are first
    binarised with a fixed seed.

    Args:
        run: Folder of a training run.
        out: File for the arrays: .npz.
        data: Data to encode, in the format of train --data; by default, the data of the run.
        device: Device to compute on; auto uses the GPU if there is one.
    """
    import io

    import numpy as np

    from wakesleep_ext.training.run import Run

    check_output(out, "--out", ".npz")
    where = find_device(device)
    trained, machine = Run.load(run)
    dataset = trained.load_data(data)
    machine.to(where)
    arrays: dict[str, Any] = {}
    for of, images in (("train", dataset.train), ("test", dataset.test)):
        for layer, code in enumerate(machine.encode(images.to(where).binarize_once()), start=1):
            suffix = f"_{layer}" if layer > 1 else ""
            arrays |= {f"{of}_{name}{suffix}": value.cpu().numpy() for name, value in code._asdict().items()}
    content = io.BytesIO()
    np.savez(content, **arrays)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, content.getvalue())


def report(
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional],
    out: Path,
    data: str | None = None,
    label_array: str = "y_test",
    images: int = 500,
    weights: int = 200,
    dreams: int = 1000,
    device: Device = "auto",
    seed: int = 0,
) -> None:
    """Compare training runs on one HTML page: learning curves, dreams, reconstructions, latent variables, importance
    weights, calibration, settings and commands. Pareto's k and the calibration need the extra "diagnostics".

    Args:
        runs: Folders of training runs.
        out: File for the page: .html. It contains its pictures, and refers to no other file.
        data: Data to test all runs on, in the format of train --data; by default, the data of each run.
        label_array: Array with the labels of the test images, if the data are an .npz file. Labels give the latent
            variables their colours. Digits and folders of IDX files also have labels.
        images: Number of test images whose importance weights are shown: the first ones.
        weights: Number of importance weights per image.
        dreams: Number of dreams for the calibration tests of the recognition networks.
        device: Device to compute on; auto uses the GPU if there is one.
        seed: Seed of the random number generator.
    """
    from wakesleep_ext.report.page import MOST_RUNS, Compared, page
    from wakesleep_ext.training import metrics
    from wakesleep_ext.training.data import load_test_labels
    from wakesleep_ext.training.run import Run

    folders = dict.fromkeys(run.resolve() for run in runs)
    if not 1 <= len(folders) <= MOST_RUNS:
        raise UsageError(f"expected one to {MOST_RUNS} runs, got {len(folders)}")
    for option, value, least in (("--images", images, 1), ("--weights", weights, 25), ("--dreams", dreams, 2)):
        if value < least:
            raise UsageError(f"expected {option} of at least {least}, got {value}")
    check_output(out, "--out", ".html")
    where = find_device(device)
    alike = len({folder.name for folder in folders}) < len(folders)
    above = commonpath([folder.parent for folder in folders])
    compared = []
    for folder in folders:
        run, machine = Run.load(folder)
        test = run.load_data(data).binary_test().to(where)
        labels = load_test_labels(data or run.config.data, len(test), array=label_array)
        epochs, result = metrics.read(folder), metrics.read_evaluation(folder)
        name = str(folder.relative_to(above)) if alike else folder.name
        compared.append(Compared(name, run.config, epochs, result, machine.to(where), test, labels))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, page(compared, images, weights, dreams, seed).encode())


def selftest() -> int:
    """Check the values and gradients of every op against a float64 reference. Prints pass or fail for each op."""
    from wakesleep_ext import selftest as checks

    failed = False
    for outcome in checks.outcomes():
        verdict = "pass" if outcome.passed else "FAIL"
        dtype = str(outcome.dtype).removeprefix("torch.")
        print(f"{verdict}  {outcome.op:29} {outcome.device:5} {dtype:9} error {outcome.error:.1e}", flush=True)
        failed |= not outcome.passed
    return int(failed)


def info() -> int:
    """Print the versions, the build of the kernels, the SIMD level and the GPUs."""
    from wakesleep_ext import info as information

    return information.main()


def _evaluation(machine: HelmholtzMachine, test: Tensor, effort: Effort, seed: int = 0) -> Evaluation:
    """Evaluate a model, and show a progress bar for each part of the evaluation."""
    from wakesleep_ext.evaluation import bounds

    with _progress_bars("image") as progress:
        try:
            return bounds.evaluate(
                machine,
                test,
                effort.bound_samples,
                effort.dreams,
                annealed_images=effort.ais_images,
                chains=effort.ais_chains,
                temperatures=effort.ais_steps,
                seed=seed,
                progress=progress,
            )
        except ValueError as error:
            raise UsageError(str(error)) from error


def _diagnosis(machine: HelmholtzMachine, test: Tensor, effort: Effort, seed: int) -> Diagnosis:
    """Diagnose a recognition network, and show a progress bar for each part."""
    from wakesleep_ext.evaluation.diagnostics import diagnose_machine

    with _progress_bars() as progress:
        try:
            return diagnose_machine(
                machine,
                test,
                effort.diagnostics,
                num_weights=effort.bound_samples,
                num_gradients=min(effort.diagnostics, 200),
                seed=seed,
                progress=progress,
            )
        except ValueError as error:
            raise UsageError(str(error)) from error


@contextmanager
def _progress_bars(unit: str = "it") -> Iterator[Callable[[str, int], Callable[[int], object]]]:
    """Yield a function that shows a progress bar for a part, given its name and size, and closes the previous one."""
    from tqdm import tqdm

    with ExitStack() as bars:

        def progress(part: str, size: int) -> Callable[[int], object]:
            bars.close()
            return bars.enter_context(tqdm(total=size, unit=unit, desc=part)).update

        yield progress


_COMMANDS: tuple[Callable[..., int | None], ...] = (
    train,
    resume,
    evaluate,
    sample,
    encode,
    report,
    bench,
    check,
    selftest,
    info,
)


def parse(argv: Sequence[str]) -> Command:
    """Parse a command and its arguments. Exits after `--help`, and with status 2 if the arguments are invalid."""
    command: Command = tyro.extras.subcommand_cli_from_dict(
        {command.__name__: _deferred(command) for command in _COMMANDS},
        prog="wakesleep",
        description="Helmholtz machines trained by the wake-sleep algorithm.",
        args=argv,
        config=(tyro.conf.OmitArgPrefixes,),
    )
    return command


def _deferred(command: Callable[..., int | None]) -> Callable[..., Command]:
    """Wrap a command so that the parser only binds its arguments; the returned function runs the command."""

    @tyro.conf.configure(*(() if command is train else (FlagCreatePairsOff,)))
    @wraps(command)
    def later(*arguments: Any, **keywords: Any) -> Command:
        return partial(command, *arguments, **keywords)

    return later


def run(command: Command) -> int:
    """Run a command and return the exit status."""
    import torch

    from wakesleep_ext.training.divergence import DivergedError
    from wakesleep_ext.training.ranks import LostRankError
    from wakesleep_ext.training.signals import StoppedError

    try:
        return command() or 0
    except StoppedError as stopped:
        return _fail(str(stopped), stopped.status)
    except LostRankError as lost:  # if all ranks told this, the reason would be hard to find
        return 1 if lost.rank > 0 else _fail(str(lost))
    except (UsageError, FileError, DivergedError, OSError) as error:
        return _fail(str(error))
    except (MemoryError, torch.OutOfMemoryError) as error:
        return _fail(f"out of memory: {error}".splitlines()[0])
    except KeyboardInterrupt:
        return _fail("interrupted", status=130)


def main(argv: Sequence[str]) -> int:
    """Parse a command, run it, and return the exit status."""
    return run(parse(argv))


def _fail(message: str, status: int = 1) -> int:
    print(f"wakesleep: {message}", file=sys.stderr)
    return status
