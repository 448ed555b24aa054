"""Test the training loop: reproducibility, the images it visits, and when it stops."""

import itertools
import math

import pytest
import torch
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

from wakesleep_ext import densities, modules, random, reference
from wakesleep_ext.evaluation.bounds import log_likelihood_bounds
from wakesleep_ext.helmholtz import conditionals, objectives
from wakesleep_ext.helmholtz.config import ModelConfig
from wakesleep_ext.helmholtz.models import HelmholtzMachine
from wakesleep_ext.helmholtz.objectives import (
    dreg_loss,
    elbo_loss,
    iwae_loss,
    reweighted_wake_losses,
    sleep_phi_loss,
    vimco_loss,
    wake_theta_loss,
)
from wakesleep_ext.training import data, descent
from wakesleep_ext.training import step as steps
from wakesleep_ext.training.config import RECIPES, TrainConfig
from wakesleep_ext.training.data import DIGITS, Images, load
from wakesleep_ext.training.divergence import DivergedError
from wakesleep_ext.training.trainer import Trainer

BARS = Images(
    torch.tensor([[255, 255, 0, 0], [0, 0, 255, 255], [255, 0, 255, 0], [0, 255, 0, 255]]).to(torch.uint8).repeat(6, 1),
    white=255,
    shape=(2, 2),
)


def make_trainer(images=BARS, device="cpu", model=None, dtype=torch.float32, **config):
    torch.manual_seed(0)
    model = ModelConfig(images.grey.shape[1], (2,), (8,), (8,)) if model is None else model
    machine = HelmholtzMachine.from_config(model, images.mean()).to(device, dtype)
    return Trainer(machine, images.to(device), TrainConfig(**{"batch_size": 5, "epochs": 3, **config}))


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.machine.parameters()])


def test_the_same_seed_gives_the_same_weights():
    first, second = make_trainer(seed=4), make_trainer(seed=4)
    losses = [e.losses for e in first.epochs()]
    torch.rand(7)  # noise of torch's own generators does not enter
    assert [e.losses for e in second.epochs()] == losses
    assert torch.equal(weights(first), weights(second))


def test_another_seed_gives_other_weights():
    first, second = make_trainer(seed=4), make_trainer(seed=5)
    assert torch.equal(weights(first), weights(second))
    for one in (first, second):
        list(one.epochs())
    assert not torch.equal(weights(first), weights(second))


class Keys(TorchDispatchMode):
    """Records the keys that ops are called with."""

    def __init__(self):
        super().__init__()
        self.used = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.name == "key":
                with no_dispatch():
                    self.used.append(tuple(value.tolist()))
        return func(*args, **(kwargs or {}))


DEEP = ModelConfig(4, (3, 2), (8,), (8,), (5,))
DISCRETE = ModelConfig(4, (3, 2), (8,), (8,), (), "bernoulli")


@pytest.mark.parametrize(
    ("model", "draws", "config"),
    [
        (None, 5, {}),
        (DEEP, 7, {}),
        (DISCRETE, 7, {}),
        (DEEP, 10, {"objective": "reweighted-wake-sleep", "num_samples": 3, "defensive_fraction": 0.5}),
    ],
)
def test_every_draw_of_a_run_has_a_key_of_its_own(model, draws, config):
    with Keys() as keys:
        list(make_trainer(model=model, seed=7, replay=False, **config).epochs())
    offsets = [step * draws + draw for step in range(12) for draw in range(draws) if draw > 0 or step % 4 == 0]
    assert sorted(keys.used) == [(7, offset) for offset in offsets]


def test_a_run_is_continued_from_its_state_and_step():
    whole, first, second = make_trainer(seed=4), make_trainer(seed=4), make_trainer(seed=4)
    losses = [e.losses for e in whole.epochs()]
    next(first.epochs())
    second.load_state_dict(first.state_dict())
    second.step = first.step
    assert [e.losses for e in second.epochs()] == losses[1:]
    assert torch.equal(weights(second), weights(whole))


@pytest.mark.parametrize("steps", [1, 4, 6, 8, 13])
def test_a_run_continues_from_any_step_with_another_number_of_steps_per_replay(steps):
    whole, first, second = (make_trainer(batch_size=3, steps_per_replay=count) for count in (1, 1, 3))
    losses = [e.losses for e in whole.epochs()]

    def interrupt():
        if first.step == steps:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        list(first.epochs(interrupt))
    second.load_state_dict(first.state_dict())
    second.step = first.step
    assert [e.losses for e in second.epochs()] == losses[steps // 8 :]
    assert torch.equal(weights(second), weights(whole))


def test_a_step_is_what_one_writes_by_hand():
    """Compares with torch's own optimizers, and a key for each draw."""
    trainer, by_hand = make_trainer(seed=3, num_samples=2), make_trainer(seed=3, num_samples=2)
    machine, config = by_hand.machine, by_hand.config
    recognition, generative = machine.recognition, machine.generative
    wake, sleep = (
        torch.optim.Adam(network.parameters(), 1e-3, config.adam_betas, config.adam_epsilon, fused=True)
        for network in (generative, recognition)
    )
    index = torch.tensor([3, 1, 4, 1, 5])
    for step in range(20):
        keys = [random.make_key(3, 5 * step + draw) for draw in range(5)]
        wake_loss = wake_theta_loss(recognition, generative, BARS.binarize(keys[1], index), 2, keys=keys[2:3])
        wake.zero_grad()
        wake_loss.backward()
        wake.step()
        sleep_loss = sleep_phi_loss(recognition, generative, 5, keys=keys[3:])
        sleep.zero_grad()
        sleep_loss.backward()
        sleep.step()
        losses = torch.stack((wake_loss, sleep_loss)).detach()
        torch.testing.assert_close(trainer.take_step(index), losses, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weights(trainer), weights(by_hand))
    for name, optimizer in (("generative", wake), ("recognition", sleep)):
        state, expected = trainer.optimizers[name].state_dict()["state"], optimizer.state_dict()["state"]
        torch.testing.assert_close(state, expected)
        assert {i: list(slots) for i, slots in state.items()} == {i: list(slots) for i, slots in expected.items()}


def adam(network, config):
    return torch.optim.Adam(network.parameters(), 1e-3, config.adam_betas, config.adam_epsilon, fused=True)


def test_a_step_of_a_mixture_is_what_one_writes_by_hand():
    """The recognition gradient of the wake phase uses the networks before the step; that of the dreams uses the new
    generative network.
    """
    settings = {
        "objective": "reweighted-wake-sleep",
        "sleep_weight": 0.25,
        "num_samples": 3,
        "num_dreams": 7,
        "defensive_fraction": 0.1,
    }
    trainer, by_hand = make_trainer(seed=3, **settings), make_trainer(seed=3, **settings)
    recognition, generative = by_hand.machine.recognition, by_hand.machine.generative
    of_generative, of_recognition = adam(generative, by_hand.config), adam(recognition, by_hand.config)
    index = torch.tensor([3, 1, 4, 1, 5])
    for step in range(10):
        keys = [random.make_key(3, 7 * step + draw) for draw in range(7)]
        x = BARS.binarize(keys[1], index)
        theta, phi = reweighted_wake_losses(recognition, generative, x, 3, defensive_fraction=0.1, keys=keys[2:5])
        by_hand.machine.zero_grad()
        (theta + 0.75 * phi).backward()
        of_generative.step()
        sleep_loss = sleep_phi_loss(recognition, generative, 7, keys=keys[5:])
        (0.25 * sleep_loss).backward()
        of_recognition.step()
        losses = torch.stack((theta, phi, sleep_loss)).detach()
        torch.testing.assert_close(trainer.take_step(index), losses, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weights(trainer), weights(by_hand))


@pytest.mark.parametrize("replay", [True, False])
@pytest.mark.parametrize("max_norm", [0.01, 100.0])
def test_gradients_are_clipped_as_by_torch(max_norm, replay):
    """The smaller norm is always exceeded, and the larger one never."""
    settings = {"dtype": torch.float64, "seed": 3, "max_gradient_norm": max_norm, "replay": replay}
    trainer, by_hand = make_trainer(**settings), make_trainer(**settings)
    recognition, generative = by_hand.machine.recognition, by_hand.machine.generative
    of_generative, of_recognition = adam(generative, by_hand.config), adam(recognition, by_hand.config)
    index = torch.tensor([3, 1, 4, 1, 5])
    for step in range(5):
        keys = [random.make_key(3, 5 * step + draw) for draw in range(5)]
        x = BARS.binarize(keys[1], index, torch.float64)
        wake_theta_loss(recognition, generative, x, keys=keys[2:3]).backward()
        norms = [torch.nn.utils.clip_grad_norm_(generative.parameters(), max_norm)]
        of_generative.step()
        sleep_phi_loss(recognition, generative, 5, keys=keys[3:]).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(recognition.parameters(), max_norm))
        of_recognition.step()
        by_hand.machine.zero_grad()
        assert [norm > max_norm for norm in norms] == [max_norm < 1] * 2
        trainer.take_step(index)
        torch.testing.assert_close(weights(trainer), weights(by_hand), rtol=1e-9, atol=1e-12)
    assert trainer.take_step.replays[True, 1].is_replayed == (replay or None)


@pytest.mark.parametrize(
    ("objective", "loss"),
    [("elbo", elbo_loss), ("iwae", iwae_loss), ("dreg", dreg_loss), ("vimco", vimco_loss)],
    ids=["elbo", "iwae", "dreg", "vimco"],
)
def test_a_step_of_a_baseline_trains_both_networks_on_one_loss(objective, loss):
    trainer = make_trainer(model=DEEP, seed=3, objective=objective, num_samples=3)
    by_hand = make_trainer(model=DEEP, seed=3)
    optimizer = adam(by_hand.machine, by_hand.config)
    index = torch.tensor([3, 1, 4, 1, 5])
    for step in range(10):
        keys = [random.make_key(3, 7 * step + draw) for draw in range(7)]
        x = BARS.binarize(keys[1], index)
        value = loss(by_hand.machine.recognition, by_hand.machine.generative, x, 3, keys=keys[2:4])
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        torch.testing.assert_close(trainer.take_step(index), value.detach()[None], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weights(trainer), weights(by_hand))


def test_a_step_with_reparameterised_gradients_is_what_one_writes_by_hand():
    """One loss trains both networks in the wake phase, and the recognition network's part has weight 0.75."""
    settings = {"objective": "reweighted-wake-sleep", "phi_gradient": "dreg", "sleep_weight": 0.25, "num_samples": 3}
    trainer, by_hand = make_trainer(model=DEEP, seed=3, **settings), make_trainer(model=DEEP, seed=3, **settings)
    recognition, generative = by_hand.machine.recognition, by_hand.machine.generative
    of_generative, of_recognition = adam(generative, by_hand.config), adam(recognition, by_hand.config)
    index = torch.tensor([3, 1, 4, 1, 5])
    for step in range(10):
        keys = [random.make_key(3, 7 * step + draw) for draw in range(7)]
        x = BARS.binarize(keys[1], index)
        wake_loss, _ = reweighted_wake_losses(recognition, generative, x, 3, phi_gradient="dreg", keys=keys[2:4])
        by_hand.machine.zero_grad()
        wake_loss.backward()
        for parameter in recognition.parameters():
            parameter.grad *= 0.75
        of_generative.step()
        sleep_loss = sleep_phi_loss(recognition, generative, 5, keys=keys[4:])
        (0.25 * sleep_loss).backward()
        of_recognition.step()
        losses = torch.stack((wake_loss, sleep_loss)).detach()
        torch.testing.assert_close(trainer.take_step(index), losses, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weights(trainer), weights(by_hand))


@pytest.mark.parametrize("objective", ["wake-sleep", "reweighted-wake-sleep", "iwae"])
def test_a_warm_up_has_sleep_phases_only(objective):
    trainer = make_trainer(objective=objective, num_samples=2, sleep_warm_up=1)
    before = [parameter.clone() for parameter in trainer.machine.generative.parameters()]
    epochs = trainer.epochs()
    assert next(epochs).losses.keys() == {"sleep"}
    after = list(trainer.machine.generative.parameters())
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))
    assert "wake" in next(epochs).losses
    assert not torch.equal(before[0], after[0])


@pytest.mark.parametrize(
    ("objective", "phi_gradient", "sleep_weight", "names"),
    [
        ("wake-sleep", None, None, ["wake", "sleep"]),
        ("reweighted-wake-sleep", None, None, ["wake", "sleep"]),
        ("reweighted-wake-sleep", "score", None, ["wake", "wake_phi", "sleep"]),
        ("reweighted-wake-sleep", "score-cv", 0.0, ["wake", "wake_phi"]),
        ("reweighted-wake-sleep", "stl", 0.5, ["wake", "sleep"]),
        ("reweighted-wake-sleep", "dreg", 0.0, ["wake"]),
        ("reweighted-wake-sleep", None, 1.0, ["wake", "sleep"]),
        ("elbo", None, None, ["wake"]),
    ],
)
def test_losses_go_by_their_names(objective, phi_gradient, sleep_weight, names):
    trainer = make_trainer(objective=objective, phi_gradient=phi_gradient, sleep_weight=sleep_weight, num_samples=2)
    epoch = next(trainer.epochs())
    assert list(epoch.losses) == names
    assert all(math.isfinite(loss) for loss in epoch.losses.values())


@pytest.mark.parametrize(
    ("latents", "options", "expected"),
    [
        ("gaussian", {}, ("dreg", 0.05)),
        ("bernoulli", {}, ("score", 0.5)),
        ("gaussian", {"num_samples": 1}, ("score", 0.5)),
        ("gaussian", {"defensive_fraction": 0.1}, ("score", 0.5)),
        ("gaussian", {"phi_gradient": "score-cv"}, ("score-cv", 0.5)),
        ("gaussian", {"sleep_weight": 0.5}, ("dreg", 0.5)),
        ("gaussian", {"objective": "iwae"}, (None, 0.0)),
    ],
)
def test_the_default_gradient_suits_the_latent_variables(latents, options, expected):
    machine = HelmholtzMachine.from_config(ModelConfig(4, latents=latents))
    config = TrainConfig(**{"objective": "reweighted-wake-sleep", "num_samples": 5} | options)
    assert config.phases(machine.recognition.has_rsample)[:2] == expected


@pytest.mark.parametrize("model", [DEEP, DISCRETE], ids=["Gaussian", "Bernoulli"])
@pytest.mark.parametrize("objective", ["wake-sleep", "reweighted-wake-sleep"])
def test_deep_and_discrete_machines_learn(model, objective):
    rates = {"generative_learning_rate": 0.01, "recognition_learning_rate": 0.01}
    trainer = make_trainer(model=model, epochs=150, objective=objective, num_samples=4, **rates)
    x = (BARS.grey[:4] > 0).float()
    networks = trainer.machine.recognition, trainer.machine.generative
    before = log_likelihood_bounds(*networks, x, 500).log_likelihood.mean()
    list(trainer.epochs())
    assert log_likelihood_bounds(*networks, x, 500).log_likelihood.mean() > before + 0.5


def test_discrete_latent_variables_cannot_be_differentiated():
    with pytest.raises(ValueError, match="differentiable draws"):
        make_trainer(model=DISCRETE, objective="elbo")


def test_gradients_that_others_leave_do_not_enter_and_frozen_weights_stay():
    trainer, other = make_trainer(), make_trainer()
    frozen = [trainer_.machine.generative[0].network[0].weight.requires_grad_(False) for trainer_ in (trainer, other)]
    before = frozen[0].clone()
    for parameter in other.machine.parameters():
        parameter.grad = torch.ones_like(parameter)
    for trainer_ in (trainer, other):
        list(trainer_.epochs())
    assert torch.equal(weights(trainer), weights(other))
    assert torch.equal(frozen[0], before)
    assert all((parameter.grad == 1).all() for parameter in other.machine.parameters())


def losses_of_100_steps(device, latent=(3,), logvar_bounds=None, **config):
    """Return losses in float64, `[steps, losses]`, on images with many grey levels."""
    generator = torch.Generator().manual_seed(2)
    images = Images(torch.randint(256, (40, 12), generator=generator).to(torch.uint8), white=255, shape=(3, 4))
    torch.manual_seed(0)
    model = ModelConfig(12, latent, (9, 8), (8, 9), (7,), logvar_bounds=logvar_bounds)
    machine = HelmholtzMachine.from_config(model, images.mean()).to(device, torch.float64)
    config = {"batch_size": 8, "epochs": 20, "num_samples": 2, "learning_rate_decay": 0.1, **config}
    trainer = Trainer(machine, images.to(device), TrainConfig(**config))
    batches = (index for _ in range(20) for index in trainer.take_step.batches())
    return torch.stack([trainer.take_step(index) for index in batches])


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"objective": "reweighted-wake-sleep", "latent": (3, 2)},
        {"objective": "reweighted-wake-sleep", "phi_gradient": "dreg", "latent": (3, 2)},
        {"objective": "dreg", "logvar_bounds": (-0.1, 0.1), "max_gradient_norm": 0.5},
    ],
    ids=lambda config: config.get("phi_gradient", config.get("objective", "wake-sleep")),
)
def test_training_replayed_called_and_with_the_reference_ops_gives_the_same_losses(device, monkeypatch, config):
    replayed = losses_of_100_steps(device, **config)
    eager = losses_of_100_steps(device, replay=False, **config)
    for module in (conditionals, data, densities, descent, modules, objectives, steps):
        monkeypatch.setattr(module, "ops", reference)
    monkeypatch.setattr("wakesleep_ext.ops._ops", None)  # or a fused op would go unnoticed
    of_reference = losses_of_100_steps(device, replay=False, **config)
    assert len(replayed) == 100
    torch.testing.assert_close(replayed, eager, rtol=1e-9, atol=0)
    torch.testing.assert_close(replayed, of_reference, rtol=1e-7 if config else 1e-9, atol=0)
    assert not torch.equal(replayed, of_reference)


def test_training_teaches():
    trainer = make_trainer(epochs=150, generative_learning_rate=0.01, recognition_learning_rate=0.01)
    x = (BARS.grey[:4] > 0).float()

    def nll():
        machine = trainer.machine
        bounds = log_likelihood_bounds(machine.recognition, machine.generative, x, 500)
        return -bounds.log_likelihood.mean().item()

    before = nll()
    epochs = list(trainer.epochs())
    assert before == pytest.approx(4 * math.log(2), abs=0.3)  # pixels are on half the time
    assert nll() < before - 0.5  # of at most 2 log 2, for four equally likely images
    assert epochs[-1].losses["wake"] < epochs[0].losses["wake"]
    assert epochs[-1].losses["sleep"] < epochs[0].losses["sleep"]


def test_an_epoch_visits_each_image_once_in_an_order_of_its_own():
    trainer = make_trainer(batch_size=6)
    orders = []
    batches = trainer.take_step.batches
    trainer.take_step.batches = lambda: orders.append(batches()) or orders[-1]
    list(trainer.epochs())
    flat = [torch.cat(order).tolist() for order in orders]
    assert all(sorted(order) == list(range(24)) for order in flat)
    assert len({tuple(order) for order in flat}) == 3


def test_a_short_last_batch_is_left_out():
    trainer = make_trainer(batch_size=7)
    assert [len(index) for index in trainer.take_step.batches()] == [7, 7, 7]
    assert [e.step for e in trainer.epochs()] == [3, 6, 9]


def test_a_batch_is_never_larger_than_the_data():
    trainer = make_trainer(batch_size=1000, epochs=2)
    assert [(e.epoch, e.step) for e in trainer.epochs()] == [(1, 1), (2, 2)]


def test_each_step_is_announced():
    trainer, count = make_trainer(), itertools.count(1)
    list(trainer.epochs(on_step=lambda: next(count)))
    assert next(count) - 1 == trainer.step == 12


def test_the_steps_of_a_group_are_announced_after_the_last_one():
    trainer, announced = make_trainer(batch_size=3, epochs=1, steps_per_replay=3), []
    list(trainer.epochs(on_step=lambda: announced.append(trainer.step)))
    assert announced == [3, 3, 3, 6, 6, 6, 7, 8]


def test_training_continues_after_the_group_in_which_a_call_raised():
    whole, trainer = make_trainer(batch_size=3), make_trainer(batch_size=3, steps_per_replay=3)
    announced = []

    def fail_once():
        announced.append(trainer.step)
        if len(announced) == 5:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        next(trainer.epochs(fail_once))
    assert announced == [3, 3, 3, 6, 6]
    assert [e.losses for e in trainer.epochs(fail_once)] == [e.losses for e in whole.epochs()]
    assert announced[5:8] == [7, 8, 11]
    assert torch.equal(weights(trainer), weights(whole))


def test_learning_rates_are_separate_and_fall_by_the_decay():
    trainer = make_trainer(
        epochs=50, generative_learning_rate=1e-2, recognition_learning_rate=3e-3, learning_rate_decay=0.1
    )
    rates = {"generative": [], "recognition": []}

    def note():
        for name, optimizer in trainer.optimizers.items():
            rates[name].append(optimizer.param_groups[0]["lr"].item())

    list(trainer.epochs(on_step=note))
    for name, start in (("generative", 1e-2), ("recognition", 3e-3)):
        assert rates[name][0] == start
        assert rates[name][100] == pytest.approx(start * 0.1**0.5)
        assert rates[name][-1] == pytest.approx(start * 0.1, rel=0.02)


def test_a_staged_schedule_falls_stage_by_stage():
    """The stages have 1, 3 and 9 epochs."""
    trainer = make_trainer(epochs=13, learning_rate_decay=0.01, schedule="staged")
    rates = []
    list(trainer.epochs(on_step=lambda: rates.append(trainer.optimizers["generative"].param_groups[0]["lr"].item())))
    assert rates == pytest.approx([1e-3] * 4 + [1e-4] * 12 + [1e-5] * 36)
    assert RECIPES["burda"].stages == [0, 1, 4, 13, 40, 121, 364, 1093]


def test_optimizers_are_what_was_asked_for():
    trainer = make_trainer(adam_betas=(0.8, 0.9), adam_epsilon=1e-3)
    for network, optimizer in trainer.optimizers.items():
        (group,) = optimizer.param_groups
        assert (group["betas"], group["eps"]) == ((0.8, 0.9), 1e-3)
        expected = list(getattr(trainer.machine, network).parameters())
        assert all(a is b for a, b in zip(group["params"], expected, strict=True))


def test_what_waits_for_networks_is_called_at_every_step():
    """Hooks are called at every step, even if they are added after replays have started."""
    trainer, other = make_trainer(), make_trainer(replay=False)
    next(trainer.epochs())
    next(other.epochs())
    seen = []
    hooks = [
        one.machine.generative[0].network[0].register_forward_hook(lambda *_, one=one: seen.append(one.step))
        for one in (trainer, other)
    ]
    epochs, others = trainer.epochs(), other.epochs()
    assert next(epochs).losses == next(others).losses
    assert seen == 2 * [step for step in range(4, 8) for _ in ("wake", "sleep")]
    for hook in hooks:
        hook.remove()
    assert next(epochs).losses == next(others).losses
    assert len(seen) == 16
    assert torch.equal(weights(trainer), weights(other))


def returns_nan_in_phase(network, step, trainer, *, with_gradients):
    """Make a network return NaN from one step on; the trained network is the one with gradients."""

    def hook(module, arguments, output):
        if trainer.step + 1 >= step and torch.is_grad_enabled() == with_gradients:
            return output * math.nan
        return output

    network.register_forward_hook(hook)


@pytest.mark.parametrize(("phase", "network"), [("wake", "generative"), ("sleep", "recognition")])
def test_a_nan_loss_stops_and_names_phase_and_step(phase, network):
    trainer = make_trainer()
    returns_nan_in_phase(getattr(trainer.machine, network)[0].network, 6, trainer, with_gradients=True)
    epochs = trainer.epochs()
    assert next(epochs).step == 4
    with pytest.raises(DivergedError, match=rf"the {phase} loss became nan at step 6$"):
        next(epochs)


def test_weights_that_explode_in_the_last_step_stop_the_run():
    trainer = make_trainer()

    def explode():
        if trainer.step == 4:
            with torch.no_grad():
                trainer.machine.recognition[0].network[0].weight[0, 0] = math.inf

    with pytest.raises(DivergedError, match="a weight of the recognition network is not finite after step 4: machine"):
        next(trainer.epochs(on_step=explode))


def test_large_numbers_are_finite():
    """The squares of these weights are not."""
    trainer = make_trainer()
    with torch.no_grad():
        trainer.machine.generative[0].network[0].weight.fill_(1e30)
    trainer.check_finite()


@pytest.mark.parametrize("factor", [1e30, math.inf, math.nan])
def test_clipping_hides_no_gradient_without_a_finite_norm(factor):
    trainer = make_trainer(max_gradient_norm=1.0)
    trainer.machine.generative[0].network[0].weight.register_hook(lambda gradient: gradient * factor)
    with pytest.raises(DivergedError, match="the wake loss became nan at step 2"):
        next(trainer.epochs())


def test_the_state_names_every_weight_and_both_optimizers():
    trainer = make_trainer()
    list(trainer.epochs())
    state = trainer.state_dict()
    assert not state.pop("machine.generative.1.zeros").any()  # the prior's
    for network in ("generative", "recognition"):
        for name, parameter in getattr(trainer.machine, network).named_parameters():
            assert torch.equal(state.pop(f"machine.{network}.{name}"), parameter)
            assert state.pop(f"optimizer.{network}.{name}.exp_avg").shape == parameter.shape
            assert (state.pop(f"optimizer.{network}.{name}.exp_avg_sq") >= 0).all()
            assert state.pop(f"optimizer.{network}.{name}.step") == 12
    assert not state


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", -1),
        ("seed", 2**63),
        ("epochs", -1),
        ("batch_size", 0),
        ("num_samples", 0),
        ("generative_learning_rate", 0.0),
        ("recognition_learning_rate", math.nan),
        ("learning_rate_decay", 1.5),
        ("adam_betas", (0.9, 1.0)),
        ("adam_epsilon", -1e-8),
        ("max_gradient_norm", 0.0),
        ("max_gradient_norm", math.inf),
        ("objective", "adversarial"),
        ("sleep_weight", 1.5),
        ("defensive_fraction", 1.0),
        ("sleep_warm_up", -1),
        ("num_dreams", 0),
        ("schedule", "cosine"),
        ("steps_per_replay", 0),
    ],
)
def test_values_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=f"TrainConfig: {name} is out of range, got"):
        TrainConfig(**{name: value})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sleep_weight": 0.5}, "expected sleep_weight 1 with objective 'wake-sleep', got 0.5"),
        ({"objective": "iwae", "sleep_weight": 0.5}, "expected sleep_weight 0 with objective 'iwae', got 0.5"),
        (
            {"objective": "elbo", "defensive_fraction": 0.1},
            "expected defensive_fraction 0 with objective 'elbo', got 0.1",
        ),
        ({"schedule": "staged", "epochs": 100}, r"whole stages \(1, 4, 13, 40, 121, .*staged schedule, got 100"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**settings)


def test_a_state_that_lacks_a_tensor_is_refused_whole():
    trainer, other = make_trainer(), make_trainer(seed=1)
    list(other.epochs())
    state, before = other.state_dict(), weights(trainer)
    del state["machine.recognition.0.network.0.bias"]
    with pytest.raises(KeyError, match=r"machine\.recognition\.0\.network\.0\.bias"):
        trainer.load_state_dict(state)
    assert torch.equal(weights(trainer), before)


def test_the_digits_are_learnt():
    """A few epochs improve the ELBO beyond the independent-Bernoulli baseline of 27 nats."""
    digits = load(DIGITS)
    torch.manual_seed(0)
    machine = HelmholtzMachine.from_config(ModelConfig(64), digits.train.mean())
    list(Trainer(machine, digits.train, TrainConfig(epochs=25)).epochs())
    bounds = log_likelihood_bounds(machine.recognition, machine.generative, digits.binary_test(), 100)
    assert -bounds.log_likelihood.mean() < 26


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_in_half_precision_are_refused(dtype):
    machine = make_trainer().machine
    machine.generative.to(dtype)
    message = rf"expected the machine's parameters to be float32 or float64, got {dtype} for generative\."
    with pytest.raises(TypeError, match=message):
        Trainer(machine, BARS, TrainConfig())


def test_steps_in_bfloat16_are_replayed_and_learn():
    """Weights stay in single precision: training does not update copies made by autocast."""
    losses = {}
    for precision in ("float32", "bfloat16"):
        rates = {"generative_learning_rate": 0.02, "recognition_learning_rate": 0.02}
        trainer = make_trainer(epochs=100, precision=precision, **rates)
        losses[precision] = [epoch.losses["wake"] for epoch in trainer.epochs()]
        assert trainer.take_step.replays[True, 1].is_replayed
        assert {value.dtype for value in trainer.state_dict().values()} <= {torch.float32, torch.float64}
    low = losses["bfloat16"]
    assert low[-1] < low[0] - 0.5
    assert low[-1] == pytest.approx(losses["float32"][-1], abs=0.2)
    assert low != losses["float32"]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_autocast_outside_does_not_change_a_step(precision):
    index, plain, within = torch.arange(5), make_trainer(precision=precision), make_trainer(precision=precision)
    for _ in range(4):
        expected = plain.take_step(index)
        with torch.autocast("cpu", torch.float16):
            assert torch.equal(within.take_step(index), expected)
    assert torch.equal(weights(plain), weights(within))
    assert not torch.is_autocast_enabled("cpu")


ONE_BATCH_AND_TWO = pytest.mark.parametrize("index", [torch.arange(5), torch.arange(10).view(2, 5)], ids=["one", "two"])


@ONE_BATCH_AND_TWO
def test_frozen_networks_are_not_trained(index):
    trainer = make_trainer()
    for _ in range(3):
        trainer.take_step(index)
    assert trainer.take_step.replays[True, index.dim()].is_replayed
    before = {name: value.clone() for name, value in trainer.machine.state_dict().items()}
    trainer.machine.generative.requires_grad_(False)
    for _ in range(3):
        trainer.take_step(index)
    for name, value in trainer.machine.state_dict().items():
        assert torch.equal(value, before[name]) is not name.startswith("recognition"), name


@ONE_BATCH_AND_TWO
def test_a_changed_learning_rate_is_used_in_the_next_replay(index):
    called, replayed = make_trainer(replay=False), make_trainer()
    for number in range(8):
        if number == 4:
            assert replayed.take_step.replays[True, index.dim()].is_replayed
            for trainer in (called, replayed):
                (group,) = trainer.optimizers["recognition"].param_groups
                group["lr"] = group["lr"] * 10  # another tensor
        assert torch.equal(called.take_step(index), replayed.take_step(index))
    assert torch.equal(weights(called), weights(replayed))


@ONE_BATCH_AND_TWO
def test_weights_that_are_assigned_are_trained_with_the_moments_of_before(index):
    called, replayed = make_trainer(replay=False), make_trainer()
    for number in range(8):
        if number == 4:
            for trainer in (called, replayed):
                state = {name: value * 0.5 for name, value in trainer.machine.state_dict().items()}
                trainer.machine.load_state_dict(state, assign=True)
        assert torch.equal(called.take_step(index), replayed.take_step(index))
    assert torch.equal(weights(called), weights(replayed))
    assert called.state_dict().keys() == replayed.state_dict().keys()
    for name, value in called.state_dict().items():
        assert torch.equal(value, replayed.state_dict()[name])


def test_tf32_is_refused_on_a_cpu() -> None:
    with pytest.raises(ValueError, match='or "bfloat16" on cpu, got "tf32", which only a GPU has'):
        make_trainer(precision="tf32")
    with pytest.raises(ValueError, match="precision is out of range, got half"):
        TrainConfig(precision="half")


def test_parameters_in_float64_are_not_multiplied_in_bfloat16() -> None:
    machine = make_trainer().machine.double()
    message = 'expected parameters in float32 with precision "bfloat16", got torch.float64'
    with pytest.raises(ValueError, match=message):
        Trainer(machine, BARS, TrainConfig(precision="bfloat16"))
