"""Check that several processes train the weights that one process trains."""

from __future__ import annotations

import signal
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing

from wakesleep_ext import cli
from wakesleep_ext.helmholtz.config import ModelConfig
from wakesleep_ext.helmholtz.models import HelmholtzMachine
from wakesleep_ext.training import metrics
from wakesleep_ext.training.config import TrainConfig
from wakesleep_ext.training.data import Images
from wakesleep_ext.training.ranks import ALONE, LostRankError, Ranks, RanksDifferError
from wakesleep_ext.training.step import Step
from wakesleep_ext.training.trainer import Trainer

IMAGES = Images(
    torch.randint(256, (30, 12), generator=torch.Generator().manual_seed(2)).to(torch.uint8), white=255, shape=(3, 4)
)
CASES: list[dict[str, Any]] = [
    {"epochs": 5, "max_gradient_norm": 0.1},
    {"latents": "bernoulli", "learning_rate_decay": 0.1, "sleep_warm_up": 1},
    {"objective": "reweighted-wake-sleep", "num_samples": 3, "defensive_fraction": 0.2, "num_dreams": 7},
    {"objective": "reweighted-wake-sleep", "num_samples": 3, "sleep_weight": 0.0, "phi_gradient": "dreg"},
    {"objective": "iwae", "num_samples": 2, "replay": False},
    {"objective": "vimco", "num_samples": 2},
    {"epochs": 5, "max_gradient_norm": 0.1, "steps_per_replay": 2},
]


def train(ranks: Ranks, latents: str = "gaussian", **config: Any) -> tuple[Tensor, Tensor]:
    """Return the losses of the last epoch and the ELBO of seven images after it, and the weights.

    The batch of nine is not even, nor are the chunks of test images, of three and four.
    """
    torch.manual_seed(0)
    model = ModelConfig(12, (3, 2), (9,), (8,), (7,), latents)  # type: ignore[arg-type]
    machine = HelmholtzMachine.from_config(model, IMAGES.mean()).double()
    trainer = Trainer(machine, IMAGES, TrainConfig(**{"batch_size": 9, "epochs": 3, **config}), ranks)
    *_, last = trainer.epochs()
    assert trainer.take_step.replays[True, 1].is_replayed is (True if trainer.config.replay else None)
    ranks.require_equal(trainer.state_dict())
    with pytest.MonkeyPatch.context() as small:
        small.setattr(metrics, "_CHUNK_ROWS", 5)
        elbo = metrics.test_elbo(machine, IMAGES.binarize_once()[:7], ranks)
    return torch.tensor([*last.losses.values(), elbo]), torch.cat([p.detach().flatten() for p in machine.parameters()])


def train_as_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    import_module("torch._dynamo")  # as in `joined`
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    ranks = Ranks(rank, 2)
    results = [train(ranks, **case) for case in CASES]
    torch.save(results, f"{folder}/{rank}.pt")
    if rank == 1:
        results[0][1][3] += 1e-12
    try:
        ranks.require_equal({"weights": results[0][1]})
    except RanksDifferError as error:
        Path(folder, f"{rank}.txt").write_text(str(error))
    stop_together(ranks)
    take_steps_alone(ranks)
    dist.destroy_process_group()


def make_step(ranks: Ranks, **config: Any) -> Step:
    """Make a step, of which an epoch has five."""
    return Step(HelmholtzMachine.from_config(ModelConfig(12, (3,))), IMAGES, TrainConfig(batch_size=6, **config), ranks)


def stop_together(ranks: Ranks) -> None:
    """A request of rank 1 during the first group stops both ranks after the second one, however often they ask."""
    step = make_step(ranks, steps_per_replay=2)
    for index, expected in zip(step.batches(), (None, signal.SIGTERM), strict=False):
        step(index)
        for _ in range(2):
            assert ranks.agree(signal.SIGTERM if ranks.rank == 1 else None) == expected


def take_steps_alone(ranks: Ranks) -> None:
    """Rank 0 ends after five steps. Rank 1 finds out in a step that is replayed, and in the comparison of weights."""
    step = make_step(ranks)
    for index in step.batches():
        step(index)
    if ranks.rank == 0:
        return
    assert step.replays[True, 1].is_replayed
    with pytest.raises(LostRankError, match="rank 1 cannot continue alone: "):
        step(index)
    with pytest.raises(LostRankError, match="rank 1 cannot continue alone: "):
        ranks.require_equal(step.machine.state_dict())


def test_two_ranks_train_what_one_process_trains(tmp_path: Path) -> None:
    """Up to rounding. The steps are replayed, with the messages between the ranks inside the recording."""
    multiprocessing.spawn(train_as_rank, (str(tmp_path),), nprocs=2)
    of_ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for case, one, other in zip(CASES, *of_ranks, strict=True):
        losses, weights = train(ALONE, **case)
        assert torch.equal(one[1], other[1])
        assert torch.equal(one[0], other[0])
        torch.testing.assert_close(one[0], losses, rtol=1e-9, atol=1e-9, msg=str(case))
        torch.testing.assert_close(one[1], weights, rtol=1e-9, atol=1e-9, msg=str(case))
    assert torch.equal(of_ranks[0][0][1], of_ranks[0][-1][1])  # with one step or two per replay
    for rank in range(2):  # weights that differ by a rounding error are found
        told = (tmp_path / f"{rank}.txt").read_text()
        assert told == f"rank {rank} of 2: the weights of the ranks are not equal"


@pytest.mark.parametrize(("rank", "told"), [(0, "wakesleep: rank 0 cannot continue alone: closed\n"), (1, "")])
def test_a_rank_that_is_left_alone_ends_and_only_rank_0_says_so(
    rank: int, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The rank that has ended prints the reason."""

    def left() -> None:
        raise LostRankError(rank, "closed")

    assert cli.run(left) == 1
    assert capsys.readouterr().err == told


def test_rows_are_shared_without_a_gap() -> None:
    rows = [Ranks(rank, 3).rows(10) for rank in range(3)]
    assert [index for part in rows for index in range(10)[part]] == list(range(10))
    with pytest.raises(ValueError, match="at least one row for each of 3 ranks, got 2 rows"):
        Ranks(0, 3).rows(2)
