"""Compare training runs on one HTML page, which contains its pictures and refers to no other file."""

from __future__ import annotations

import shlex
from base64 import b64encode
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from importlib.resources import files
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jinja2
import torch
from markupsafe import Markup
from torch import Tensor

from wakesleep_ext import random
from wakesleep_ext.evaluation._arviz import arviz_stats
from wakesleep_ext.evaluation.bounds import recognition_draws
from wakesleep_ext.evaluation.calibration import Ranks
from wakesleep_ext.evaluation.diagnostics import diagnose_machine
from wakesleep_ext.evaluation.importance import (
    ImportanceWeights,
    gathered,
    pareto_k,
    pareto_threshold,
    weighted_draws,
)
from wakesleep_ext.helmholtz.config import ModelConfig
from wakesleep_ext.helmholtz.models import HelmholtzMachine
from wakesleep_ext.report import plots
from wakesleep_ext.training.config import RunOptions, TrainConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from wakesleep_ext.training.run_config import RunConfig

_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#444444")  # Okabe & Ito
MOST_RUNS = len(_COLORS)
"""The most runs on a page: one for each colour."""

_DREAMS, _RECONSTRUCTIONS, _POINTS = 64, 20, 2000
_CHUNK_IMAGES = 20
_NONE = "–"  # noqa: RUF001
_MINUS_ELBO = "−ELBO"  # noqa: RUF001


@dataclass(frozen=True)
class Compared:
    """A run, and what the page shows of it."""

    name: str
    config: RunConfig
    epochs: Sequence[Mapping[str, float]]
    """The metrics of each epoch."""
    result: Mapping[str, Any] | None
    """The final evaluation; None if the run has not ended."""
    machine: HelmholtzMachine
    test: Tensor
    """The test images, binary pixels `[N, D]`, on the device of the machine."""
    labels: Tensor | None = None
    """The labels of the test images, int64 `[N]`; None if there are none."""


class Weights(NamedTuple):
    """Importance weights of test images."""

    log_w: Tensor
    """Log weights, float64 `[K, N]`."""
    pareto_k: Tensor | None
    """Pareto's k of each image, `[N]`; None without `arviz-stats`."""


def page(runs: Sequence[Compared], num_images: int, num_samples: int, num_dreams: int, seed: int = 0) -> str:
    """Return the page as HTML. Pareto's k and the calibration tests are left out if `arviz-stats` is not installed.

    Args:
        runs: the runs to compare, with different names; at most `MOST_RUNS`.
        num_images: the first test images, whose importance weights are shown.
        num_samples: K, the number of importance weights per image, at least 25.
        num_dreams: the number of dreams for the calibration tests, at least 2.
        seed: seed of all draws.
    """
    colors = dict(zip([run.name for run in runs], _COLORS, strict=False))
    has_diagnostics = _has_arviz_stats()
    weights = {run.name: _weights(run, num_images, num_samples, seed, has_diagnostics) for run in runs}
    log_w = {name: of.log_w for name, of in weights.items()}
    k = {name: of.pareto_k for name, of in weights.items() if of.pareto_k is not None}
    ranks = {run.name: _ranks(run, num_dreams, seed) for run in runs if has_diagnostics}
    epochs = {run.name: run.epochs for run in runs}
    nll = {run.name: run.result["nll"] for run in runs if run.result}
    different, equal = _settings([run.config for run in runs])
    salts = map(str, count())

    def svgs(figures: Iterable[Figure]) -> list[Markup]:
        return [Markup(plots.svg(figure, next(salts))) for figure in figures]

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(files(__package__).joinpath("page.html").read_text(encoding="utf-8"))
    return template.render(
        title=" and ".join(colors) if len(runs) < 3 else f"{len(runs)} runs",
        results=_results([_cells(run, weights[run.name]) for run in runs]),
        runs=[
            {
                "name": run.name,
                "color": colors[run.name],
                "dreams": _dreams(run, seed),
                "reconstructions": _reconstructions(run, seed),
                "command": command(run.config),
            }
            for run in runs
        ],
        curves=svgs(plots.curves_of_runs(epochs, nll, colors)),
        weights=svgs(
            [*plots.importance_weights(log_w, colors), *([plots.pareto_k(k, num_samples, colors)] if k else [])]
        ),
        calibration=svgs(plots.calibration(ranks, colors)),
        latents=svgs(figure for run in runs for figure in _latents(run)),
        has_labels=any(run.labels is not None for run in runs),
        has_diagnostics=has_diagnostics,
        num_images=len(next(iter(log_w.values()))[0]),
        num_samples=num_samples,
        num_dreams=num_dreams,
        different=different,
        equal=equal,
    )


def command(config: RunConfig) -> str:
    """Return the command that starts a run with this config. Options with default values are left out.

    The path of data below the current folder is relative to it.
    """
    words = ["wakesleep", "train"]
    for part, options in ((config, RunOptions), (config.model, ModelConfig), (config.training, TrainConfig)):
        for field in fields(options):
            value = getattr(part, field.name)
            if field.name == "observed" or value == field.default:
                continue
            if field.name == "data":
                value = _from_here(value)
            flag = field.name.replace("_", "-")
            if isinstance(value, bool):
                words.append(f"--{flag}" if value else f"--no-{flag}")
            else:
                words += [f"--{flag}", *map(str, value if isinstance(value, tuple) else (value,))]
    return shlex.join(words)


def _from_here(source: str) -> str:
    path, here = Path(source), Path.cwd()
    return f"./{path.relative_to(here)}" if path.is_relative_to(here) else source  # ./ tells folders from "digits"


def _settings(configs: Sequence[RunConfig]) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Return the settings that differ between the runs, and those that are equal: the values of each run by name."""
    described = [asdict(config) for config in configs]
    flat = [
        {name: value for name, value in config.items() if not isinstance(value, dict)}
        | {"data": Path(config["data"]).name}
        | {f"{part} {name}": value for part in ("model", "training") for name, value in config[part].items()}
        for config in described
    ]
    different: dict[str, list[str]] = {}
    equal: dict[str, list[str]] = {}
    for name in flat[0]:
        values = [config[name] for config in flat]
        into = equal if all(value == values[0] for value in values) else different
        into[name.replace("_", " ")] = [_text(value) for value in values]
    return different, equal


def _text(value: Any) -> str:
    text = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return text if len(text) <= 40 else f"…{text[-39:]}"


def _results(cells: Sequence[Mapping[str, str]]) -> dict[str, list[str]]:
    return {name: [of_run[name] for of_run in cells] for name in cells[0]}


def _cells(run: Compared, weights: Weights) -> dict[str, str]:
    """Return the results of a run, by name."""
    log_w, k = weights
    statistics = ImportanceWeights(log_w.shape[1])
    statistics.add(log_w)
    found = run.result or {}
    elbo = found.get("elbo", run.epochs[-1]["test_elbo"] if run.epochs else None)
    layers = zip(found.get("active_units", ()), found.get("units", ()), strict=True)
    cells = {
        "objective": run.config.training.objective,
        "epochs": f"{run.epochs[-1]['epoch'] if run.epochs else 0} of {run.config.training.epochs}",
        "NLL bound": f"{found['nll']:.2f} (K = {found['bound_samples']})" if found else _NONE,
        _MINUS_ELBO: _NONE if elbo is None else f"{-elbo:.2f}",
        "KL": f"{sum(found['kl']):.2f}" if found else _NONE,
        "active units": ", ".join(f"{active} of {units}" for active, units in layers) or _NONE,
        "energy distance": f"{found['energy_distance']:.4f}" if found else _NONE,
        f"effective samples of {len(log_w)}": f"{statistics.effective_sample_size.mean():.1f}",
    }
    if k is not None:
        threshold = pareto_threshold(len(log_w))
        cells["median Pareto k"] = f"{k.nanmedian():.2f}"
        cells[f"images with k > {threshold:.2f}"] = f"{(k > threshold).double().mean():.0%}"
    return cells


def _has_arviz_stats() -> bool:
    try:
        arviz_stats()
    except ModuleNotFoundError:
        return False
    return True


@torch.no_grad()
def _weights(run: Compared, num_images: int, num_samples: int, seed: int, with_k: bool) -> Weights:
    machine, x = run.machine, run.test[:num_images]
    draw = recognition_draws(machine.recognition, machine.generative, seed, x.device)
    groups = weighted_draws(draw, x, num_samples, chunk_rows=_CHUNK_IMAGES * num_samples)
    log_w, equal = zip(*(gathered(chunks) for _, chunks in groups), strict=True)
    weights = torch.cat(log_w, 1)
    return Weights(weights, pareto_k(weights, torch.cat(equal)) if with_k else None)


def _ranks(run: Compared, num_dreams: int, seed: int) -> dict[str, Ranks]:
    return diagnose_machine(run.machine, run.test, num_dreams, num_weights=0, num_gradients=0, seed=seed).ranks


def _latents(run: Compared) -> Iterator[Figure]:
    labels = None if run.labels is None else run.labels[:_POINTS]
    codes = run.machine.encode(run.test[:_POINTS])
    for layer, code in enumerate(codes, start=1):
        title = f"{run.name}, layer {layer}" if len(codes) > 1 else run.name
        yield plots.latent_means(code.mu.cpu(), labels, title)


def _keys(run: Compared, count: int, seed: int) -> list[Tensor]:
    return [random.make_key(seed, draw, run.test.device) for draw in range(count)]


def _dreams(run: Compared, seed: int) -> str:
    generative = run.machine.generative
    latents = generative.sample_latents((_DREAMS,), keys=_keys(run, len(generative) - 1, seed))
    return _base64(plots.png(plots.mosaic_of_samples(generative.pixel_means(latents[0]), run.config.image_shape)))


def _reconstructions(run: Compared, seed: int) -> str:
    shown = run.test[:_RECONSTRUCTIONS]
    pixels = run.machine.reconstruct(shown, keys=_keys(run, len(run.machine.recognition), seed))
    return _base64(plots.png(plots.mosaic_of_reconstructions(shown, pixels, run.config.image_shape)))


def _base64(content: bytes) -> str:
    return b64encode(content).decode()
