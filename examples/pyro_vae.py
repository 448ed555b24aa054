"""Train a variational autoencoder in Pyro, with its distributions and with ours: `python examples/pyro_vae.py`.

Model and guide are the same; only the distribution classes differ. Both train on small digits in alternating steps.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn

from wakesleep_ext.pyro import BernoulliVector, DiagonalGaussian
from wakesleep_ext.training.data import DIGITS, load

LATENT, HIDDEN = 16, 128


def pyros_gaussian(mu: Tensor, logvar: Tensor) -> Any:
    return dist.Normal(mu, (logvar / 2).exp()).to_event(1)


def pyros_bernoulli(logits: Tensor) -> Any:
    return dist.Bernoulli(logits=logits).to_event(1)


class VAE(nn.Module):
    def __init__(self, name: str, pixels: int, gaussian: Callable[..., Any], bernoulli: Callable[..., Any]) -> None:
        super().__init__()
        self.name, self.gaussian, self.bernoulli = name, gaussian, bernoulli
        self.encoder = nn.Sequential(nn.Linear(pixels, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 2 * LATENT))
        self.decoder = nn.Sequential(nn.Linear(LATENT, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, pixels))

    def model(self, x: Tensor) -> None:
        pyro.module(f"{self.name} decoder", self.decoder)
        with pyro.plate("images", len(x)):
            zeros = x.new_zeros(len(x), LATENT)
            z = pyro.sample("z", self.gaussian(zeros, zeros))
            pyro.sample("x", self.bernoulli(self.decoder(z)), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module(f"{self.name} encoder", self.encoder)
        with pyro.plate("images", len(x)):
            pyro.sample("z", self.gaussian(*self.encoder(x).chunk(2, -1)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    steps = parser.parse_args().steps
    pyro.enable_validation(False)
    data = load(DIGITS)
    pixels = data.train.grey.shape[1]
    algorithms, losses, seconds = [], ([], []), ([], [])
    for name, gaussian, bernoulli in (
        ("Pyro's", pyros_gaussian, pyros_bernoulli),
        ("fused", DiagonalGaussian, BernoulliVector),
    ):
        torch.manual_seed(0)
        vae = VAE(name, pixels, gaussian, bernoulli)
        algorithms.append(SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 3e-3}), Trace_ELBO()))
    for _ in range(steps):
        index = torch.randint(len(data.train), (256,))
        x = torch.bernoulli(data.train.grey[index] / data.train.white)
        for svi, lost, times in zip(algorithms, losses, seconds, strict=True):
            start = time.perf_counter()
            lost.append(svi.step(x) / len(x))
            times.append(time.perf_counter() - start)
    for name, lost, times in zip(("Pyro's", "fused"), losses, seconds, strict=True):
        print(f"{name}: -ELBO from {lost[0]:.2f} to {lost[-1]:.2f} nats, {1e3 * median(times):.2f} ms a step")
    print(f"speed: {median(seconds[0]) / median(seconds[1]):.2f} times that of Pyro's distributions")


if __name__ == "__main__":
    main()
