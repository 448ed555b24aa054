"""Train a VAE in Lightning, with eager losses and with the fused ops: `python examples/lightning_vae.py`."""

from __future__ import annotations

import argparse
import logging
import time
import warnings

import pytorch_lightning as lightning
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import wakesleep_ext as ws
from wakesleep_ext.training.data import DIGITS, load


class VAE(lightning.LightningModule):
    def __init__(self, pixels: int, hidden: int = 200, latent: int = 20) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(pixels, hidden), nn.Tanh(), nn.Linear(hidden, 2 * latent))
        self.decoder = nn.Sequential(nn.Linear(latent, hidden), nn.Tanh(), nn.Linear(hidden, pixels))

    def loss(self, x: Tensor) -> Tensor:
        mu, logvar = self.encoder(x).chunk(2, -1)
        z = mu + torch.exp(logvar / 2) * torch.randn_like(mu)
        reconstruction = F.binary_cross_entropy_with_logits(self.decoder(z), x, reduction="sum")
        kl = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())
        return (reconstruction + kl) / len(x)

    def training_step(self, batch: list[Tensor], number: int) -> Tensor:
        (grey,) = batch
        loss = self.loss(ws.binarize(grey, 16, dtype=torch.float32))
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=3e-3, fused=True)


class FusedVAE(VAE):
    """The same VAE with fused layers and heads; its state dict has the same keys."""

    def __init__(self, pixels: int) -> None:
        super().__init__(pixels)
        ws.modules.fuse(self)
        self.encoder[2] = ws.modules.GaussianHead.from_linear(self.encoder[2])
        self.decoder[2] = ws.modules.BernoulliHead.from_linear(self.decoder[2])

    def loss(self, x: Tensor) -> Tensor:
        q = self.encoder[2].distribution(self.encoder[:2](x))
        p = self.decoder[2].distribution(self.decoder[:2](q.rsample()))
        return (ws.gaussian_kl(q.mu, q.logvar).sum() - p.log_prob_sum(x)) / len(x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=500)
    steps = parser.parse_args().steps
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    images = load(DIGITS).train
    loader = DataLoader(TensorDataset(images.grey), batch_size=128, shuffle=True, drop_last=True)
    seconds = []
    for kind in (VAE, FusedVAE):
        lightning.seed_everything(0, verbose=False)
        trainer = lightning.Trainer(
            max_steps=steps,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        start = time.perf_counter()
        trainer.fit(kind(images.grey.shape[1]), loader)
        seconds.append((time.perf_counter() - start) / steps)
        print(f"{kind.__name__}: -ELBO {trainer.callback_metrics['loss']:.2f} nats, {1e3 * seconds[-1]:.2f} ms a step")
    print(f"speed: {seconds[0] / seconds[1]:.2f} times that of eager")


if __name__ == "__main__":
    main()
