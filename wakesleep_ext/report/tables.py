"""Format the evaluation of a model as text."""

from __future__ import annotations

from typing import Any


def table(result: dict[str, Any]) -> str:
    """Format the summary of an evaluation as a table.

    Args:
        result: the return value of :meth:`wakesleep_ext.evaluation.bounds.Evaluation.summary`, with an additional entry
            `baseline_nll`.
    """
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
