"""Time a typical variational autoencoder before and after changing two lines: `python examples/mnist_vae.py`.

Both versions train on the same batches with torch's Adam, alternating every 50 steps. The second records its step once
and replays it. `--data` names a folder of MNIST's IDX files; by default, scikit-learn's small digits are used.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import wakesleep_ext as ws
from wakesleep_ext.replay import Replay
from wakesleep_ext.training.data import DIGITS, load

TURN = 50  # steps, so that each model runs with warm caches, as it would alone


class VAE(nn.Module):
    def __init__(self, pixels: int, hidden: int = 400, latent: int = 20) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(pixels, hidden), nn.ReLU(), nn.Linear(hidden, 2 * latent))
        self.decoder = nn.Sequential(nn.Linear(latent, hidden), nn.ReLU(), nn.Linear(hidden, pixels))

    def loss(self, x: Tensor) -> Tensor:
        mu, logvar = self.encoder(x).chunk(2, -1)
        z = mu + torch.exp(logvar / 2) * torch.randn_like(mu)
        reconstruction = F.binary_cross_entropy(torch.sigmoid(self.decoder(z)), x, reduction="sum")
        kl = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())
        return (reconstruction + kl) / len(x)


class FusedVAE(VAE):
    def loss(self, x: Tensor) -> Tensor:
        mu, logvar = self.encoder(x).chunk(2, -1)
        z = ws.gaussian_rsample(mu, logvar)
        return (ws.gaussian_kl(mu, logvar) - ws.bernoulli_log_prob(self.decoder(z), x)).mean()


def step(model: VAE, optimizer: torch.optim.Optimizer, x: Tensor) -> Tensor:
    """Take a training step and return the loss."""
    optimizer.zero_grad()
    loss = model.loss(x)
    loss.backward()
    optimizer.step()
    return loss.detach()


def seconds(function: Callable[[Tensor], Tensor], x: Tensor) -> float:
    start = time.perf_counter()
    function(x)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default=DIGITS, help="folder of MNIST's IDX files")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=128)
    options = parser.parse_args()
    data = load(options.data)
    pixels = data.train.grey.shape[1]
    models: list[VAE] = []
    make: Callable[[int], VAE]
    for make in (VAE, FusedVAE):
        torch.manual_seed(0)
        models.append(make(pixels))
    ws.modules.fuse(models[1])
    optimizers = [torch.optim.Adam(model.parameters(), fused=True) for model in models]
    steps: list[Callable[[Tensor], Tensor]] = [
        partial(step, model, optimizer) for model, optimizer in zip(models, optimizers, strict=True)
    ]
    steps[1] = Replay(steps[1])
    times: list[list[float]] = [[], []]
    for first in range(0, options.steps, TURN):
        indices = torch.randint(len(data.train), (min(TURN, options.steps - first), options.batch_size))
        batches = [ws.binarize(data.train.grey, data.train.white, index, dtype=torch.float32) for index in indices]
        for own, function in zip(times, steps, strict=True):
            own += [seconds(function, x) for x in batches]
    test = data.binary_test().float()
    with torch.no_grad():
        for name, model, own in zip(("eager", "fused"), models, times, strict=True):
            print(f"{name}: {1e3 * median(own):.2f} ms a step, test -ELBO {model.loss(test).item():.2f} nats")
    print(f"speed: {median(times[0]) / median(times[1]):.2f} times that of eager")


if __name__ == "__main__":
    main()
