"""Compare the objectives on MNIST with the same training options: `make mnist DATA=folder`.

Trains the runs that `benchmarks/results/mnist/results.json` lacks, and adds them: the results to `results.json`, a
table with the commands to `README.md`, and learning curves to `curves.png`. Each run takes 10 to 20 minutes on one CPU
thread. To repeat all runs, name another folder with `--results`.
"""

from __future__ import annotations

import json
import math
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

BASELINE, BEST = "IWAE, L = 5", "wake-wake DReG, L = 5"
OBJECTIVES = {
    "wake-sleep, L = 1": "--objective wake-sleep --num-samples 1",
    "VAE, L = 1": "--objective elbo --num-samples 1",
    "wake-wake, L = 5": "--objective reweighted-wake-sleep --sleep-weight 0 --num-samples 5",
    "reweighted wake-sleep, L = 5": "--objective reweighted-wake-sleep --num-samples 5",
    BASELINE: "--objective iwae --num-samples 5",
    BEST: "--objective reweighted-wake-sleep --phi-gradient dreg --sleep-weight 0 --num-samples 5",
}
PROTOCOL = "--recipe mnist --bound-samples 5000"


def train(data: Path, runs: Path, seeds: tuple[int, ...] = (0, 1), results: Path = RESULTS) -> None:
    """Train every objective with every seed, and write the results after each run.

    Args:
        data: Folder of MNIST's IDX files.
        runs: Folder of the run folders; interrupted runs in it are resumed.
        seeds: Seeds of the initial weights and all draws.
        results: Folder of the results; runs in it are not trained again.
    """
    file = results / "results.json"
    records = json.loads(file.read_text()) if file.exists() else []
    for name in OBJECTIVES:
        for seed in seeds:
            if any((record["objective"], record["seed"]) == (name, seed) for record in records):
                continue
            run = runs / folder(name, seed)
            if not finished(run):
                where = ["--data", str(data), "--out", str(run), "--threads", str(torch.get_num_threads())]
                status = cli.main(
                    ["resume", str(run)] if has_begun(run) else ["train", *flags(name, seed).split(), *where]
                )
                if status:
                    raise SystemExit(status)
            records.append(record_of(run, name, seed))
            records.sort(key=lambda record: (list(OBJECTIVES).index(record["objective"]), record["seed"]))
            write(records, results)


def folder(name: str, seed: int) -> str:
    return f"{name.replace(', ', '-').replace(' ', '-').replace('=-', '')}-{seed}"


def flags(name: str, seed: int) -> str:
    return f"{PROTOCOL} {OBJECTIVES[name]} --seed {seed}"


def finished(run: Path) -> bool:
    return metrics.read_evaluation(run) is not None


def record_of(run: Path, name: str, seed: int) -> dict[str, Any]:
    """Return the results of a finished run, with this computer, on which it is assumed to have run."""
    epochs, last = metrics.read(run), metrics.read_evaluation(run)
    if last is None:
        raise SystemExit(f"{run} has not been evaluated")
    command = f"wakesleep train --data mnist {flags(name, seed)}"
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
    runs = _by_objective(records)
    curves = {name: _mean_curve(records) for name, records in runs.items()}
    bounds = {
        "NLL, $K = 5000$": {name: [record["nll"] for record in records] for name, records in runs.items()},
        "$-$ELBO": {name: [-record["elbo"] for record in records] for name, records in runs.items()},
    }
    plots.comparison(to / "curves.png", curves, bounds)


def page(records: list[dict[str, Any]]) -> str:
    """Return the page with all runs and their commands."""
    lines = [("objective", "seed", "NLL", "-ELBO", "training", "processor", "commit", "command")]
    for record in records:
        figures = f"{record['nll']:.2f}", f"{-record['elbo']:.2f}", f"{record['training_minutes']:.0f} min"
        machine = record["machine"]
        where = f"{machine['processor']}, {machine['simd']}", str(machine["commit"])[:7]
        lines.append((record["objective"], str(record["seed"]), *figures, *where, f"`{machine['command']}`"))
    return f"""# Objectives on MNIST

The model has one Gaussian layer and tanh networks, 784-200-200-50 and back. Training takes 100 epochs with batch size
100 and Adam (ε = 1e-4), whose learning rate falls exponentially from 1e-3 to 1e-4. Training images are binarised again
in each epoch. Results are in nats per image on the 10,000 test images, binarised once with a fixed seed. NLL is the
bound with K = 5000 samples, and the ELBO uses the same samples.

![Test -ELBO by epoch, and the NLL and -ELBO of each run](curves.png)

{markdown(lines)}

Each run used one thread. The processors were running other jobs too, so times are approximate. `make mnist DATA=mnist`
trains the runs that the table lacks.

## Wake-sleep and IWAE
{_comparison(records)}
Both train the generative network on the same bound of five samples. They train the recognition network differently:
IWAE follows the gradient of the bound, and wake-wake descends KL(p(z|x) || q(z|x)), which makes q cover the posterior.
With the score function ("wake-wake", "reweighted wake-sleep"), this gradient is so noisy that training ends 0.4 to 1.3
nats behind IWAE. With a doubly reparameterised estimate of the same gradient (DReG), wake-wake ends ahead of IWAE.

Without it, the sleep weight makes little difference: with seed 0, `--sleep-weight 0.25` gave 89.94 and `0.75` gave
90.28. Less noisy dreams help a little: `--num-dreams 500` gave 89.80. These three are single runs on another processor,
an Intel Xeon, and are not in `results.json`.
"""


def _comparison(records: list[dict[str, Any]]) -> str:
    """Compare the best objective with the baseline by seed. Returns an empty paragraph unless both have two seeds."""
    differences = paired_differences(records, BEST, BASELINE)
    if len(differences) < 2:
        return ""
    error = stdev(differences) / math.sqrt(len(differences))
    listed = ", ".join(f"{difference:+.2f}" for difference in differences)
    return f"""
The NLL of "{BEST}" minus that of "{BASELINE}" is {listed} for the seeds that both have. The mean is
{mean(differences):+.3f}, with a standard error of {error:.3f}.
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
    """Return a table with one row per objective: the bound of each run, and the mean ELBO."""
    lines = [("objective", "NLL of each run", "-ELBO")]
    for name, runs in _by_objective(records).items():
        bounds = ", ".join(f"{record['nll']:.2f}" for record in runs)
        lines.append((name, bounds, f"{-mean(record['elbo'] for record in runs):.2f}"))
    return markdown(lines)


def _by_objective(records: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        found.setdefault(record["objective"], []).append(record)
    return found


def _mean_curve(records: list[dict[str, Any]]) -> list[float]:
    return [-mean(values) for values in zip(*(record["test_elbo"] for record in records), strict=True)]


if __name__ == "__main__":
    import tyro

    tyro.cli(train)
