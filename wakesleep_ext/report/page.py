"""Compare training runs on one HTML page, which contains its pictures and refers to no other file."""

from __future__ import annotations

import shlex
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import jinja2
import torch
from markupsafe import Markup
from torch import Tensor

from wakesleep_ext import random
from wakesleep_ext.evaluation.bounds import recognition_draws
from wakesleep_ext.evaluation.importance import ImportanceWeights, gathered, weighted_draws
from wakesleep_ext.helmholtz.config import ModelConfig
from wakesleep_ext.helmholtz.models import HelmholtzMachine
from wakesleep_ext.report import plots
from wakesleep_ext.training.config import RunOptions, TrainConfig

if TYPE_CHECKING:
    from wakesleep_ext.training.run_config import RunConfig

_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#444444")  # Okabe & Ito
MOST_RUNS = len(_COLORS)
"""The most runs on a page: one for each colour."""

_DREAMS, _RECONSTRUCTIONS = 64, 20
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


def page(runs: Sequence[Compared], num_images: int, num_samples: int, seed: int = 0) -> str:
    """Return the page as HTML.

    Args:
        runs: the runs to compare, with different names; at most `MOST_RUNS`.
        num_images: the first test images, whose importance weights are shown.
        num_samples: K, the number of importance weights per image.
        seed: seed of all draws.
    """
    colors = dict(zip([run.name for run in runs], _COLORS, strict=False))
    weights = {run.name: _log_weights(run.machine, run.test[:num_images], num_samples, seed) for run in runs}
    epochs = {run.name: run.epochs for run in runs}
    nll = {run.name: run.result["nll"] for run in runs if run.result}
    different, equal = _settings([run.config for run in runs])
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(files(__package__).joinpath("page.html").read_text(encoding="utf-8"))
    return template.render(
        title=" and ".join(colors) if len(runs) < 3 else f"{len(runs)} runs",
        heads=["run", *_cells(runs[0], weights[runs[0].name])],
        runs=[
            {
                "name": run.name,
                "color": colors[run.name],
                "cells": _cells(run, weights[run.name]).values(),
                "dreams": _dreams(run, seed),
                "reconstructions": _reconstructions(run, seed),
                "command": command(run.config),
            }
            for run in runs
        ],
        curves=[Markup(plots.svg(figure)) for figure in plots.curves_of_runs(epochs, nll, colors)],
        weights=[Markup(plots.svg(figure)) for figure in plots.importance_weights(weights, colors)],
        num_images=len(next(iter(weights.values()))[0]),
        num_samples=num_samples,
        different=different,
        equal=equal,
    )


def command(config: RunConfig) -> str:
    """Return the command that starts a run with this config. Options with default values are left out."""
    words = ["wakesleep", "train"]
    for part, options in ((config, RunOptions), (config.model, ModelConfig), (config.training, TrainConfig)):
        for field in fields(options):
            value = getattr(part, field.name)
            if field.name == "observed" or value == field.default:
                continue
            flag = field.name.replace("_", "-")
            if isinstance(value, bool):
                words.append(f"--{flag}" if value else f"--no-{flag}")
            else:
                words += [f"--{flag}", *map(str, value if isinstance(value, tuple) else (value,))]
    return shlex.join(words)


def _settings(configs: Sequence[RunConfig]) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Return the settings that differ between the runs, and those that are equal: the values of each run by name."""
    described = [asdict(config) for config in configs]
    flat = [
        {name: value for name, value in config.items() if not isinstance(value, dict)}
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


def _cells(run: Compared, log_w: Tensor) -> dict[str, str]:
    """Return the row of a run in the first table, by column."""
    weights = ImportanceWeights(log_w.shape[1])
    weights.add(log_w)
    found = run.result or {}
    elbo = found.get("elbo", run.epochs[-1]["test_elbo"] if run.epochs else None)
    layers = zip(found.get("active_units", ()), found.get("units", ()), strict=True)
    return {
        "objective": run.config.training.objective,
        "epochs": f"{run.epochs[-1]['epoch'] if run.epochs else 0} of {run.config.training.epochs}",
        "NLL bound": f"{found['nll']:.2f} (K = {found['bound_samples']})" if found else _NONE,
        _MINUS_ELBO: _NONE if elbo is None else f"{-elbo:.2f}",
        "KL": f"{sum(found['kl']):.2f}" if found else _NONE,
        "active units": ", ".join(f"{active} of {units}" for active, units in layers) or _NONE,
        f"effective samples of {len(log_w)}": f"{weights.effective_sample_size.mean():.1f}",
        "energy distance": f"{found['energy_distance']:.4f}" if found else _NONE,
    }


@torch.no_grad()
def _log_weights(machine: HelmholtzMachine, x: Tensor, num_samples: int, seed: int) -> Tensor:
    """Return log p(x, z) - log q(z|x) for samples from q, float64 `[K, N]`, on the CPU."""
    draw = recognition_draws(machine.recognition, machine.generative, seed, x.device)
    groups = weighted_draws(draw, x, num_samples, chunk_rows=_CHUNK_IMAGES * num_samples)
    return torch.cat([gathered(chunks)[0] for _, chunks in groups], 1)


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
