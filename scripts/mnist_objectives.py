"""Compare the objectives on MNIST with the same training options: `make mnist DATA=folder`.

Trains the runs that `benchmarks/results/mnist/results.json` lacks, and adds them: the results to `results.json`, a
table with the commands to `README.md`, and learning curves to `curves.png`. Each run takes 10 to 20 minutes on one CPU
thread. To repeat all runs, name another folder with `--results`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from wakesleep_ext import cli
from wakesleep_ext._files import write_atomically
from wakesleep_ext.benchmark import result
from wakesleep_ext.benchmark.report import markdown
from wakesleep_ext.report import plots
from wakesleep_ext.training import metrics
from wakesleep_ext.training.rotation import has_begun

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results/mnist"

BASELINE, COMPARED = "IWAE, L = 5", "wake-wake DReG, L = 5"


@dataclass(frozen=True)
class Study:
    """Objectives that train the same networks in the same way."""

    name: str
    """Name of the picture with its curves."""
    protocol: str
    """The options that all runs share."""
    objectives: dict[str, str]
    """The options of each objective, by its name in the table. A name has one study only."""
    seeds: int
    """Number of seeds, from 0. `COMPARED` and `BASELINE` have `SEEDS_COMPARED`."""


SEEDS_COMPARED = 3
_RWS = "--objective reweighted-wake-sleep"
GAUSSIAN = Study(
    "curves",
    "--recipe mnist --bound-samples 5000",
    {
        "wake-sleep, L = 1": "--objective wake-sleep --num-samples 1",
        "VAE, L = 1": "--objective elbo --num-samples 1",
        "wake-wake, L = 5": f"{_RWS} --phi-gradient score --sleep-weight 0 --num-samples 5",
        "wake-wake score-cv, L = 5": f"{_RWS} --phi-gradient score-cv --sleep-weight 0 --num-samples 5",
        "reweighted wake-sleep, L = 5": f"{_RWS} --phi-gradient score --num-samples 5",
        BASELINE: "--objective iwae --num-samples 5",
        "IWAE-DReG, L = 5": "--objective dreg --num-samples 5",
        "wake-wake STL, L = 5": f"{_RWS} --phi-gradient stl --sleep-weight 0 --num-samples 5",
        COMPARED: f"{_RWS} --phi-gradient dreg --sleep-weight 0 --num-samples 5",
        "DReG, sleep weight 0.05, L = 5": f"{_RWS} --phi-gradient dreg --sleep-weight 0.05 --num-samples 5",
    },
    seeds=2,
)
BELIEF_NETWORK = Study(
    "belief-network",
    "--recipe mnist --bound-samples 5000 --epochs 30 --latents bernoulli --latent 200 200 200 "
    "--recognition-hidden --generative-hidden --latent-hidden --num-samples 5",
    {
        "SBN, VIMCO": "--objective vimco",
        "SBN, reweighted wake-sleep": f"{_RWS} --phi-gradient score",
        "SBN, wake-wake score-cv": f"{_RWS} --phi-gradient score-cv --sleep-weight 0",
    },
    seeds=1,
)
STUDIES = GAUSSIAN, BELIEF_NETWORK


def train(data: Path, runs: Path, results: Path = RESULTS) -> None:
    """Train every objective with every seed, and write the results after each run.

    Args:
        data: Folder of MNIST's IDX files.
        runs: Folder of the run folders; interrupted runs in it are resumed.
        results: Folder of the results; runs in it are not trained again.
    """
    file = results / "results.json"
    records = json.loads(file.read_text()) if file.exists() else []
    order = [name for study in STUDIES for name in study.objectives]
    for study, name, seed in planned():
        if any((record["objective"], record["seed"]) == (name, seed) for record in records):
            continue
        run = runs / folder(name, seed)
        if not finished(run):
            where = ["--data", str(data), "--out", str(run), "--threads", str(torch.get_num_threads())]
            begun = ["resume", str(run)] if has_begun(run) else ["train", *flags(study, name, seed).split(), *where]
            status = cli.main(begun)
            if status:
                raise SystemExit(status)
        records.append(record_of(run, study, name, seed))
        records.sort(key=lambda record: (order.index(record["objective"]), record["seed"]))
        write(records, results)


def planned() -> Iterator[tuple[Study, str, int]]:
    """Yield the study, the objective and the seed of every run."""
    for study in STUDIES:
        for name in study.objectives:
            for seed in range(SEEDS_COMPARED if name in (BASELINE, COMPARED) else study.seeds):
                yield study, name, seed


def folder(name: str, seed: int) -> str:
    return f"{name.replace(', ', '-').replace(' ', '-').replace('=-', '')}-{seed}"


def flags(study: Study, name: str, seed: int) -> str:
    return f"{study.protocol} {study.objectives[name]} --seed {seed}"


def finished(run: Path) -> bool:
    return metrics.read_evaluation(run) is not None


def record_of(run: Path, study: Study, name: str, seed: int) -> dict[str, Any]:
    """Return the results of a finished run, with this computer, on which it is assumed to have run."""
    epochs, last = metrics.read(run), metrics.read_evaluation(run)
    if last is None:
        raise SystemExit(f"{run} has not been evaluated")
    command = f"wakesleep train --data mnist {flags(study, name, seed)}"
    return {
        "objective": name,
        "seed": seed,
        "nll": round(last["nll"], 3),
        "elbo": round(last["elbo"], 3),
        "training_minutes": round(sum(epoch["seconds"] for epoch in epochs) / 60, 1),
        "machine": result.machine(torch.device("cpu"), torch.get_num_threads(), command),
        "test_elbo": [round(epoch["test_elbo"], 2) for epoch in epochs],
    }


def write(records: list[dict[str, Any]], to: Path) -> None:
    """Write the results as JSON, table and curves."""
    to.mkdir(parents=True, exist_ok=True)
    write_atomically(to / "results.json", (json.dumps(records, indent=1) + "\n").encode())
    write_atomically(to / "README.md", page(records).encode())
    for study in STUDIES:
        runs = _by_objective(records, study)
        curves = {name: _mean_curve(records) for name, records in runs.items()}
        bounds = {
            "NLL, $K = 5000$": {name: [record["nll"] for record in records] for name, records in runs.items()},
            "$-$ELBO": {name: [-record["elbo"] for record in records] for name, records in runs.items()},
        }
        if runs:
            plots.comparison(to / f"{study.name}.png", curves, bounds)


def page(records: list[dict[str, Any]]) -> str:
    """Return the page with all runs and their commands."""
    return f"""# Objectives on MNIST

The model has one Gaussian layer and tanh networks, 784-200-200-50 and back. Training takes 100 epochs with batch size
100 and Adam (ε = 1e-4), whose learning rate falls exponentially from 1e-3 to 1e-4. Training images are binarised again
in each epoch. Results are in nats per image on the 10,000 test images, binarised once with a fixed seed. NLL is the
bound with K = 5000 samples, and the ELBO uses the same samples.

![Test -ELBO by epoch, and the NLL and -ELBO of each run](curves.png)

{_runs(records, GAUSSIAN)}

Each run used one thread. The processors were running other jobs too, and some runs were paused, so times are
approximate. `make mnist DATA=mnist` trains the runs that the table lacks.

## Wake-sleep and IWAE
{_comparison(records)}
Both train the generative network on the same bound of five samples. They train the recognition network differently:
IWAE follows the gradient of the bound, and wake-wake descends KL(p(z|x) || q(z|x)), which makes q cover the posterior.
With the score function ("wake-wake", "reweighted wake-sleep"), this gradient is so noisy that training ends behind
IWAE, even with a control variate ("score-cv"). With estimates of the same gradient that differentiate through the
draws ("DReG", "STL"), training ends ahead of IWAE. So does IWAE with such an estimate of its own gradient
("IWAE-DReG"). The seeds of these objectives differ by as much as the objectives do. The runs of version 0.1.0 used the
score function and a sleep weight of 0.5 by default, so their commands do not name these options.

## Sigmoid belief networks

These models have three layers of 200 Bernoulli variables, connected by linear layers. Training uses five samples and
takes 30 epochs; the rest is as above. The variables are discrete, so the bound cannot be differentiated through draws.

![Test -ELBO by epoch, and the NLL and -ELBO of each run](belief-network.png)

{_runs(records, BELIEF_NETWORK)}

Reweighted wake-sleep, here with the score function and sleep weight 0.5, has the best likelihood. Without dreams but
with a control variate, the recognition network fits better, as -ELBO shows, but the likelihood is half a nat worse.
Each result is of one seed.

Published results for such networks are not comparable: Bornschein & Bengio (2015) and Mnih & Rezende (2016) train much
longer, on images that are binarised once, and choose the learning rate of each method.
"""


def _comparison(records: list[dict[str, Any]]) -> str:
    """Compare two objectives by seed. Returns an empty paragraph unless both have two seeds."""
    differences = paired_differences(records, COMPARED, BASELINE)
    if len(differences) < 2:
        return ""
    error = stdev(differences) / math.sqrt(len(differences))
    listed = ", ".join(f"{difference:+.2f}" for difference in differences)
    return f"""
The NLL of "{COMPARED}" minus that of "{BASELINE}" is {listed} for the seeds that both have.
The mean is {mean(differences):+.3f}, with a standard error of {error:.3f}.
"""


def paired_differences(records: list[dict[str, Any]], one: str, other: str) -> list[float]:
    """Return the NLL of one objective minus that of the other, for each seed that both have in one version."""
    found = {(record["objective"], record["seed"]): record for record in records}
    pairs = [(found.get((one, seed)), found.get((other, seed))) for seed in sorted({seed for _, seed in found})]
    return [
        first["nll"] - second["nll"]
        for first, second in pairs
        if first and second and first["machine"]["wakesleep_ext"] == second["machine"]["wakesleep_ext"]
    ]


def summary(records: list[dict[str, Any]]) -> str:
    """Return a table with one row per objective: the mean bound and the mean -ELBO of its runs."""
    lines = [("objective", "NLL", "-ELBO")]
    for name, runs in _by_objective(records, GAUSSIAN).items():
        nll, elbo = mean(record["nll"] for record in runs), mean(record["elbo"] for record in runs)
        lines.append((name, f"{nll:.2f}", f"{-elbo:.2f}"))
    return markdown(lines)


def _runs(records: list[dict[str, Any]], study: Study) -> str:
    """Return a table with one row per run."""
    lines = [("objective", "seed", "NLL", "-ELBO", "training", "processor", "commit", "command")]
    for name, runs in _by_objective(records, study).items():
        for record in runs:
            figures = f"{record['nll']:.2f}", f"{-record['elbo']:.2f}", f"{record['training_minutes']:.0f} min"
            machine = record["machine"]
            where = f"{machine['processor']}, {machine['simd']}", str(machine["commit"])[:7]
            lines.append((name, str(record["seed"]), *figures, *where, f"`{machine['command']}`"))
    return markdown(lines)


def _by_objective(records: list[dict[str, Any]], study: Study) -> dict[str, list[dict[str, Any]]]:
    """Return the runs of each objective of a study that has any."""
    runs = {name: [record for record in records if record["objective"] == name] for name in study.objectives}
    return {name: found for name, found in runs.items() if found}


def _mean_curve(records: list[dict[str, Any]]) -> list[float]:
    return [-mean(values) for values in zip(*(record["test_elbo"] for record in records), strict=True)]


if __name__ == "__main__":
    import tyro

    tyro.cli(train)
