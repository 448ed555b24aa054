"""Plot the dreams, reconstructions, learning curves and evaluation of a run."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor, nn

from wakesleep_ext._files import write_atomically
from wakesleep_ext.evaluation.bounds import ACTIVE, Evaluation
from wakesleep_ext.evaluation.calibration import Ranks
from wakesleep_ext.evaluation.diagnostics import Diagnosis
from wakesleep_ext.evaluation.importance import pareto_threshold
from wakesleep_ext.usage import PICTURES, check_output

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Color: TypeAlias = "str | tuple[str, float]"
"""A colour, or a colour and its opacity."""

_DPI = 150
_MOST_TICKS = 20  # of labels
_LEAST_WEIGHT = -4.0  # of the histogram, in powers of ten; smaller weights are not drawn
_LEAST_ACTIVITY = 1e-5  # lower limit of the plot; smaller and negative estimates are drawn at this value
_WAKE, _SLEEP, _TEST, _BASELINE = "#c2571a", "#35478c", "#1b7f5c", "#8a8a8a"
_NO_DATE: dict[str, dict[str, None]] = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}
_LOSSES = (
    ("wake_loss", "Wake: generative network", "nats per image", _WAKE),
    ("wake_phi_loss", "Wake: recognition network", "nats per image", _SLEEP),
    ("sleep_loss", "Sleep: $-\\log q(z\\,|\\,x)$", "nats per dream", _SLEEP),
)


def samples(path: Path, pixels: Tensor, shape: tuple[int, int]) -> None:
    """Draw images in a square grid.

    Args:
        path: the file to write.
        pixels: `[N, D]` in [0, 1].
        shape: height and width of an image.
    """
    _save_mosaic(path, mosaic_of_samples(pixels, shape))


def mosaic_of_samples(pixels: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return the picture of :func:`samples`, `[height, width]` in [0, 1]."""
    columns = math.ceil(math.sqrt(len(pixels)))
    return _mosaic(pixels.view(-1, *shape), columns)


def reconstructions(path: Path, x: Tensor, pixels: Tensor, shape: tuple[int, int]) -> None:
    """Draw pairs of rows: images above, and the model's reconstructions below.

    Args:
        path: the file to write.
        x: the images, `[N, D]` in [0, 1].
        pixels: their reconstructions, `[N, D]` in [0, 1].
        shape: height and width of an image.
    """
    _save_mosaic(path, mosaic_of_reconstructions(x, pixels, shape))


def mosaic_of_reconstructions(x: Tensor, pixels: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return the picture of :func:`reconstructions`, `[height, width]` in [0, 1]."""
    columns = min(10, len(x))
    pairs = [
        _mosaic(torch.cat((above, below)).view(-1, *shape), columns)
        for above, below in zip(x.split(columns), pixels.split(columns), strict=True)
        if len(above) == columns
    ]
    gap = torch.ones(shape[0] // 4 + 1, pairs[0].shape[1])
    rows = [part for pair in pairs for part in (pair, gap)]
    return torch.cat(rows[:-1])


def curves(path: Path, epochs: Sequence[Mapping[str, float]], baseline_nll: float) -> None:
    """Plot the losses and the test ELBO against the epoch.

    Args:
        path: the file to write.
        epochs: one record per epoch, with `epoch`, `test_elbo` and the losses of the objective, in nats.
        baseline_nll: test NLL of independent Bernoulli pixels, for comparison.
    """
    from matplotlib.figure import Figure

    panels = [panel for panel in _LOSSES if any(panel[0] in record for record in epochs)]
    figure = Figure(figsize=(10 / 3 * (len(panels) + 1), 3.4), dpi=_DPI, layout="constrained")
    *of_losses, right = figure.subplots(1, len(panels) + 1, squeeze=False)[0]
    for axes, (name, title, unit, color) in zip(of_losses, panels, strict=True):
        known = [record for record in epochs if name in record]
        axes.plot([record["epoch"] for record in known], [record[name] for record in known], color=color)
        _label(axes, title, unit)
    epoch = [record["epoch"] for record in epochs]
    right.plot(epoch, [-record["test_elbo"] for record in epochs], color=_TEST, label="Helmholtz machine")
    right.axhline(baseline_nll, color=_BASELINE, linestyle="--", label="independent pixels")
    right.legend(frameon=False)
    _label(right, "Test: $-$ELBO", "nats per image")
    _save(path, figure)


def comparison(
    path: Path, curves: Mapping[str, Sequence[float]], bounds: Mapping[str, Mapping[str, Sequence[float]]]
) -> None:
    """Plot the test losses of several runs against the epoch, and next to them the final bounds.

    Args:
        path: the file to write.
        curves: maps the name of an objective to the -ELBO after each epoch, in nats per image.
        bounds: maps the label of a bound, then the name of an objective, to the bound of each run, in nats per image.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), dpi=_DPI, layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, values in curves.items():
        left.plot(range(1, len(values) + 1), values, label=name)
    last = [values[-1] for values in curves.values()]
    left.set_ylim(min(last) - 1, max(last) + 12)
    left.legend(frameon=False)
    _label(left, "Test: $-$ELBO", "nats per image")

    for (label, by_name), marker, color in zip(bounds.items(), ("o", "D"), (_TEST, _WAKE), strict=True):
        places = [(value, place) for place, name in enumerate(curves) for value in by_name[name]]
        right.plot(*zip(*places, strict=True), marker, color=color, fillstyle="none", label=label)
    right.set_yticks(range(len(curves)), list(curves))
    right.invert_yaxis()
    right.legend(frameon=False, loc="lower right")
    _label(right, "Test, after the last epoch, each run", "", "nats per image")
    _save(path, figure)


def curves_of_runs(
    epochs: Mapping[str, Sequence[Mapping[str, float]]], nll: Mapping[str, float], colors: Mapping[str, str]
) -> list[Figure]:
    """Plot the test -ELBO of several runs against the epoch, then each of their losses, one figure each.

    Args:
        epochs: maps the name of a run to one record per epoch, as for :func:`curves`.
        nll: maps the name of a run to its final NLL bound, if there is one.
        colors: maps the name of a run to its colour.
    """
    figures = []
    for metric, title, unit in (("test_elbo", "Test: $-$ELBO", "nats per image"), *(loss[:3] for loss in _LOSSES)):
        curves = {
            name: [(record["epoch"], record[metric]) for record in records if metric in record]
            for name, records in epochs.items()
        }
        if not any(curves.values()):
            continue
        sign = -1 if metric == "test_elbo" else 1
        figure, axes = _small(len(curves))
        for name, points in curves.items():
            axes.plot([x for x, _ in points], [sign * y for _, y in points], color=colors[name], label=name)
            if metric == "test_elbo" and name in nll and points:
                axes.plot(points[-1][0], nll[name], "o", color=colors[name])
        _zoom(axes, [[sign * y for _, y in points] for points in curves.values()])
        _legend_below(figure)
        axes.locator_params(axis="x", integer=True)
        _label(axes, title, unit)
        figures.append(figure)
    return figures


def importance_weights(log_w: Mapping[str, Tensor], colors: Mapping[str, str]) -> list[Figure]:
    """Plot histograms of relative importance weights, and of effective sample sizes, one figure each.

    Args:
        log_w: maps the name of a run to log weights, `[K, N]`, with the same K for each run.
        colors: maps the name of a run to its colour.
    """
    samples = len(next(iter(log_w.values())))
    figures = {name: _small(len(log_w)) for name in ("weights", "sizes")}
    for name, values in log_w.items():
        shares = values.softmax(0)
        sizes = 1 / shares.square().sum(0)
        relative = (samples * shares).log10().flatten()
        for (_, axes), drawn, edges in (
            (figures["weights"], relative, torch.linspace(_LEAST_WEIGHT, math.log10(samples) + 0.1, 41)),
            (figures["sizes"], sizes.clamp(1, samples), torch.logspace(0, math.log10(samples + 0.01), 31)),
        ):
            weights = [1 / len(drawn)] * len(drawn)
            axes.hist(drawn.tolist(), edges.tolist(), weights=weights, histtype="step", color=colors[name], label=name)
    figures["sizes"][1].set_xscale("log")
    for name, title, unit in (
        ("weights", "Weights relative to their mean", "$\\log_{10}$ of the weight"),
        ("sizes", f"Effective sample size, $K = {samples}$", "samples"),
    ):
        figure, axes = figures[name]
        _legend_below(figure)
        _label(axes, title, "share", unit)
    return [figure for figure, _ in figures.values()]


def pareto_k(k: Mapping[str, Tensor], num_weights: int, colors: Mapping[str, str]) -> Figure:
    """Plot histograms of Pareto's k. Values that are infinite or NaN are not drawn.

    Args:
        k: maps the name of a run to the k of each image, `[N]`.
        num_weights: importance weights per image.
        colors: maps the name of a run to its colour.
    """
    finite = {name: values[values.isfinite()].tolist() for name, values in k.items()}
    drawn = [value for values in finite.values() for value in values]
    edges = torch.linspace(min(drawn, default=0), max(drawn, default=1) + 1e-3, 31).tolist()
    figure, axes = _small(len(k) + 1)
    for name, values in finite.items():
        weights = [1 / len(k[name])] * len(values)
        axes.hist(values, edges, weights=weights, histtype="step", color=colors[name], label=name)
    threshold = pareto_threshold(num_weights)
    axes.axvline(threshold, color=_BASELINE, linestyle="--", label=f"threshold {threshold:.2f}")
    _legend_below(figure)
    _label(axes, "Pareto's $k$ of the weights", "share", "$k$")
    return figure


def calibration(ranks: Mapping[str, Mapping[str, Ranks]], colors: Mapping[str, str]) -> list[Figure]:
    """Plot the calibration tests of several runs with their bands.

    Args:
        ranks: maps the name of a run to :attr:`~wakesleep_ext.evaluation.diagnostics.Diagnosis.ranks`.
        colors: maps the name of a run to its colour.

    Returns:
        One figure for each test. A test of several variables has one figure for each run.
    """
    figures = []
    for test in dict.fromkeys(test for found in ranks.values() for test in found):
        of_runs = {name: found[test] for name, found in ranks.items() if test in found}
        several = any(found.ranks.shape[1] > 1 for found in of_runs.values())
        for group in [{name: found} for name, found in of_runs.items()] if several else [of_runs]:
            figure, axes = _small(len(group))
            _band(axes, next(iter(group.values())))
            for name, found in group.items():
                _ecdf(axes, found, inside=(colors[name], 0.3), outside=(colors[name], 0.8))
                label = f"{name}: {found.outside().sum()} of {found.ranks.shape[1]} outside the band"
                axes.plot([], color=colors[name], label=label)
            _legend_below(figure)
            _label(axes, test, "ECDF $-$ uniform", "level")
            figures.append(figure)
    return figures


def latent_means(means: Tensor, labels: Tensor | None, title: str) -> Figure:
    """Plot the posterior means of images in a plane: their first two principal components if K > 2.

    Args:
        means: `[N, K]`.
        labels: integers `[N]`, which give the colours; None for points of one colour.
        title: title of the figure.
    """
    import matplotlib

    points, units = _plane(means.double())
    figure, axes = _small()
    scatter = partial(axes.scatter, points[:, 0], points[:, 1], s=5, linewidths=0, rasterized=True)
    if labels is None:
        scatter(color=_BASELINE)
    else:
        values, index = labels.unique(return_inverse=True)
        palette = matplotlib.colormaps["tab10" if len(values) <= 10 else "turbo"].resampled(len(values))
        found = scatter(c=index, cmap=palette, vmin=-0.5, vmax=len(values) - 0.5)
        ticks = range(0, len(values), math.ceil(len(values) / _MOST_TICKS))
        bar = figure.colorbar(found, ticks=ticks, format=lambda tick, _: str(values[tick].item()), label="label")
        bar.ax.tick_params(length=0)
        bar.outline.set_visible(False)
    _label(axes, title, units[1], units[0])
    return figure


def _plane(values: Tensor) -> tuple[Tensor, list[str]]:
    """Return values `[N, K]` as points of a plane, `[N, 2]`, and the names of its axes."""
    size = values.shape[1]
    if size <= 2:
        return nn.functional.pad(values, (0, 2 - size)), ["$z_1$", "$z_2$" if size > 1 else ""]
    centred = values - values.mean(0)
    variances, directions = torch.linalg.eigh(centred.t() @ centred)
    first = directions[:, [-1, -2]]
    first = first * first.gather(0, first.abs().argmax(0, keepdim=True)).sign()  # eigh leaves the sign open
    shares = (variances[[-1, -2]] / variances.sum()).tolist()
    return centred @ first, [f"component {i} ({share:.0%} of the variance)" for i, share in enumerate(shares, start=1)]


def svg(figure: Figure, salt: str) -> str:
    """Return a figure as an SVG element. Equal figures and salts give equal elements.

    Args:
        figure: the figure.
        salt: a different text for each figure of a page, so that their ids differ.
    """
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": salt}):
        figure.savefig(text, format="svg", dpi=_DPI, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    short = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), text.getvalue())  # 0.01 points
    return short.partition("<svg")[2].join(("<svg role='img'", ""))


def png(mosaic: Tensor) -> bytes:
    """Return a mosaic as a PNG file with one pixel for each of its elements."""
    from matplotlib.image import imsave

    picture = io.BytesIO()
    imsave(picture, mosaic.numpy(), cmap="gray", vmin=0, vmax=1, format="png")
    return picture.getvalue()


def _small(legend: int = 0) -> tuple[Figure, Axes]:
    """Return a figure for a column of a page, with room for the lines of a legend below its axes, and the axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.9, 3 + 0.2 * legend), layout="constrained")
    return figure, figure.subplots()


def _legend_below(figure: Figure) -> None:
    figure.legend(frameon=False, loc="outside lower center")


def _zoom(axes: Axes, curves: Sequence[Sequence[float]]) -> None:
    """Hide the first tenth of each curve if it is far above the rest."""
    rest = [value for curve in curves for value in curve[len(curve) // 10 :]]
    low, high = min(rest), max(rest)
    margin = 0.06 * (high - low or 1)
    bottom, top = axes.get_ylim()
    axes.set_ylim(max(bottom, low - 20 * margin), min(top, high + margin))


def rank_histograms(path: Path, ranks: Mapping[str, Tensor], num_ranks: int) -> None:
    """Plot rank histograms of simulation-based calibration, with the 99% band for uniform ranks.

    Args:
        path: the file to write.
        ranks: maps the name of a calibrated variable to its ranks, integers `[N]` starting at 0.
        num_ranks: the number of possible ranks.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.4 * len(ranks), 3.2), dpi=_DPI, layout="constrained")
    for axes, (name, values) in zip(figure.subplots(1, len(ranks), squeeze=False)[0], ranks.items(), strict=True):
        expected = len(values) / num_ranks
        spread = 2.58 * math.sqrt(expected * (1 - 1 / num_ranks))
        axes.bar(range(num_ranks), values.bincount(minlength=num_ranks).tolist(), width=1, color=_SLEEP, alpha=0.7)
        band = axes.axhspan(expected - spread, expected + spread, color=_BASELINE, alpha=0.4)
        _label(axes, name, "dreams per rank", f"rank among {num_ranks - 1} posterior samples")
    figure.legend([band], ["99% of counts if ranks are uniform"], loc="outside lower center", frameon=False, fontsize=9)
    _save(path, figure)


def evaluation(path: Path, found: Evaluation) -> None:
    """Plot the activity of latent variables, effective sample sizes, and the divergence of q from the posterior.

    Args:
        path: the file to write.
        found: the evaluation to draw.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.4), dpi=_DPI, layout="constrained")
    left, middle, right = figure.subplots(1, 3)

    for layer, activity in enumerate(found.activities, start=1):
        ranked = activity.sort(descending=True).values.clamp_min(_LEAST_ACTIVITY)
        label = f"layer {layer}: {found.active_units[layer - 1]} of {len(activity)} active"
        left.plot(range(1, len(ranked) + 1), ranked.tolist(), marker=".", label=label)
    left.axhline(ACTIVE, color=_BASELINE, linestyle="--")
    left.set_yscale("log")
    left.legend(frameon=False)
    _label(left, "Latent variables by activity", "variance of the posterior mean", "rank")

    for bounds, label, color in ((found.wake, "images", _WAKE), (found.sleep, "dreams", _SLEEP)):
        size = bounds.effective_sample_size.clamp(1, found.num_samples)
        edges = [found.num_samples ** (i / 30) for i in range(31)] if found.num_samples > 1 else 1
        shares = [1 / len(size)] * len(size)
        middle.hist(size.tolist(), edges, weights=shares, histtype="step", label=label, color=color)
    middle.set_xscale("log")
    middle.legend(frameon=False)
    _label(middle, f"Effective sample size, $K = {found.num_samples}$", "share", "samples")

    divergences = found.summary()["posterior_kl"]
    for shift, (phase, label, color) in enumerate((("wake", "images", _WAKE), ("sleep", "dreams", _SLEEP))):
        heights = [divergences[phase]["reverse"], divergences[phase]["forward"]]
        bars = right.bar([0.4 * shift, 1 + 0.4 * shift], heights, 0.36, label=label, color=color)
        right.bar_label(bars, fmt="%.2f", fontsize=8)
    right.set_xticks([0.2, 1.2], ["KL$(q\\,\\|\\,p)$", "KL$(p\\,\\|\\,q)$"])
    right.margins(y=0.3)  # room for the legend above the bars
    right.legend(frameon=False)
    _label(right, "Recognition against the posterior", "nats", "")
    _save(path, figure)


def diagnosis(path: Path, found: Diagnosis) -> None:
    """Plot the calibration tests with their bands, Pareto's k, and the signal-to-noise ratios of gradients.

    Args:
        path: the file to write.
        found: the diagnosis to draw.
    """
    from matplotlib.figure import Figure

    panels = len(found.ranks) + (found.pareto_k is not None) + bool(found.gradients)
    rows = math.ceil(panels / 3)
    figure = Figure(figsize=(10, 3.2 * rows), dpi=_DPI, layout="constrained")
    grid = figure.subplots(rows, 3, squeeze=False).flatten()
    for unused in grid[panels:]:
        unused.set_axis_off()
    axes_left = iter(grid)

    for name, ranks in found.ranks.items():
        axes, outside = next(axes_left), ranks.outside()
        _band(axes, ranks)
        _ecdf(axes, ranks, inside=_SLEEP, outside=_WAKE)
        _label(axes, f"{name}: {outside.sum()} of {len(outside)} leave the 95% band", "ECDF $-$ uniform", "level")

    if found.pareto_k is not None:
        axes, threshold = next(axes_left), pareto_threshold(found.num_weights)
        axes.hist(found.pareto_k[found.pareto_k.isfinite()].tolist(), 30, color=_TEST, alpha=0.7)
        axes.axvline(threshold, color=_BASELINE, linestyle="--")
        above = (found.pareto_k > threshold).double().mean().item()
        _label(axes, f"Pareto k: {above:.0%} above {threshold:.2f}", "observations", "k")

    if found.gradients:
        axes, ratios = next(axes_left), {name: of.ratio for name, of in found.gradients.items()}
        bars = axes.barh(list(ratios), list(ratios.values()), color=_SLEEP)
        axes.bar_label(bars, fmt="%.2f", fontsize=8)
        axes.invert_yaxis()
        axes.margins(x=0.15)  # room for the numbers
        _label(axes, "Gradient of q", "", "signal-to-noise ratio")
    _save(path, figure)


def _band(axes: Axes, ranks: Ranks) -> None:
    """Draw the 95% band of the curves of a calibration test."""
    levels, (lower, upper) = ranks.levels(), ranks.band()
    axes.fill_between(levels, lower - levels, upper - levels, color=_BASELINE, alpha=0.4, linewidth=0)


def _ecdf(axes: Axes, ranks: Ranks, inside: Color, outside: Color) -> None:
    """Draw the curves of a calibration test, in another colour outside their band."""
    levels, is_outside = ranks.levels(), ranks.outside()
    curves = torch.cat((ranks.ecdf() - levels[:, None], torch.full((1, len(is_outside)), torch.nan)))
    for chosen, color in ((~is_outside, inside), (is_outside, outside)):
        x = torch.cat((levels, levels.new_full((1,), torch.nan))).repeat(int(chosen.sum()))
        axes.plot(x, curves[:, chosen].t().flatten(), color=color, linewidth=1)  # NaN divides one line into curves


def _label(axes: Axes, title: str, unit: str, horizontal: str = "epoch") -> None:
    axes.set_title(title, fontsize=11)
    axes.set_xlabel(horizontal)
    axes.set_ylabel(unit)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _mosaic(images: Tensor, columns: int) -> Tensor:
    """Arrange images `[N, H, W]` in rows of `columns` images on a white background. Return `[height, width]`."""
    count, height, width = images.shape
    gap = max(1, width // 8)
    rows = -(-count // columns)
    paper = torch.ones(rows * (height + gap) + gap, columns * (width + gap) + gap)
    for i, image in enumerate(images.float().cpu()):
        top = gap + (i // columns) * (height + gap)
        left = gap + (i % columns) * (width + gap)
        paper[top : top + height, left : left + width] = 1 - image
    return paper


def _save_mosaic(path: Path, mosaic: Tensor) -> None:
    from matplotlib.figure import Figure

    height, width = mosaic.shape
    scale = max(1, 900 // width)  # an integer, so that all pixels have the same size
    figure = Figure(figsize=(width * scale / _DPI, height * scale / _DPI), dpi=_DPI)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.imshow(mosaic.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    _save(path, figure)


def _save(path: Path, figure: Figure) -> None:
    """Write the figure to a file. The suffix of the file name determines the format."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    check_output(path, "path", *PICTURES)
    kind = path.suffix.lower().removeprefix(".")
    picture = io.BytesIO()
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": path.name}):  # equal figures give equal files
        FigureCanvasAgg(figure).print_figure(picture, format=kind, dpi=_DPI, metadata=_NO_DATE.get(kind))
    write_atomically(path, picture.getvalue())
