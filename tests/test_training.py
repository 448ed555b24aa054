"""The loop: what it repeats, what it visits, and when it stops."""

import itertools
import math

import pytest
import torch
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

from wakesleep_ext import conditionals, data, networks, objectives, random, reference, training
from wakesleep_ext.data import DIGITS, Images, load
from wakesleep_ext.evaluation import log_likelihood_bounds
from wakesleep_ext.models import HelmholtzMachine, ModelConfig
from wakesleep_ext.objectives import sleep_phi_loss, wake_theta_loss
from wakesleep_ext.training import DivergedError, TrainConfig, Trainer

BARS = Images(
    torch.tensor([[255, 255, 0, 0], [0, 0, 255, 255], [255, 0, 255, 0], [0, 255, 0, 255]]).to(torch.uint8).repeat(6, 1),
    white=255,
    shape=(2, 2),
)


def make_trainer(images=BARS, device="cpu", **config):
    torch.manual_seed(0)
    machine = HelmholtzMachine(ModelConfig(images.grey.shape[1], (2,), (8,), (8,)), images.mean()).to(device)
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
    for trainer in (first, second):
        list(trainer.epochs())
    assert not torch.equal(weights(first), weights(second))


class Keys(TorchDispatchMode):
    """The keys that ops were called with."""

    def __init__(self):
        super().__init__()
        self.used = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.name == "key":
                with no_dispatch():
                    self.used.append(tuple(value.tolist()))
        return func(*args, **(kwargs or {}))


def test_every_draw_of_a_run_has_a_key_of_its_own():
    with Keys() as keys:
        list(make_trainer(seed=7).epochs())
    offsets = [step * 5 + draw for step in range(12) for draw in range(5) if draw > 0 or step % 4 == 0]
    assert keys.used == [(7, offset) for offset in offsets]


def test_a_run_is_continued_from_its_state_and_step():
    whole, first, second = make_trainer(seed=4), make_trainer(seed=4), make_trainer(seed=4)
    losses = [e.losses for e in whole.epochs()]
    next(first.epochs())
    second.load_state_dict(first.state_dict())
    second.step = first.step
    assert [e.losses for e in second.epochs()] == losses[1:]
    assert torch.equal(weights(second), weights(whole))


def test_a_step_is_what_one_writes_by_hand():
    """With torch's own optimizers, and a key for each draw."""
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
        assert trainer.take_step(index).tolist() == [wake_loss.item(), sleep_loss.item()]
    assert torch.equal(weights(trainer), weights(by_hand))
    for name, optimizer in (("generative", wake), ("recognition", sleep)):
        state, expected = trainer.optimizers[name].state_dict()["state"], optimizer.state_dict()["state"]
        assert all(torch.equal(state[i][slot], expected[i][slot]) for i in expected for slot in expected[i])
        assert {i: list(slots) for i, slots in state.items()} == {i: list(slots) for i, slots in expected.items()}


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


def losses_of_200_steps(device, **config):
    """In float64, `[steps, 2]`, on images of many grey levels."""
    generator = torch.Generator().manual_seed(2)
    images = Images(torch.randint(256, (40, 12), generator=generator).to(torch.uint8), white=255, shape=(3, 4))
    torch.manual_seed(0)
    machine = HelmholtzMachine(ModelConfig(12, (3,), (9, 8), (8, 9)), images.mean()).double().to(device)
    config = {"batch_size": 8, "epochs": 40, "num_samples": 2, "learning_rate_decay": 0.1, **config}
    trainer = Trainer(machine, images.to(device), TrainConfig(**config))
    batches = (index for _ in range(40) for index in trainer._batches())
    return torch.stack([trainer.take_step(index) for index in batches])


def test_training_with_a_graph_without_and_with_the_reference_ops_gives_the_same_losses(device, monkeypatch):
    """A graph, where there are any."""
    replayed = losses_of_200_steps(device)
    eager = losses_of_200_steps(device, cuda_graph=False)
    for module in (conditionals, data, networks, objectives, training):
        monkeypatch.setattr(module, "ops", reference)
    monkeypatch.setattr("wakesleep_ext.ops.call", None)  # or a fused op would go unnoticed
    of_reference = losses_of_200_steps(device, cuda_graph=False)
    assert replayed.shape == (200, 2)
    torch.testing.assert_close(replayed, eager, rtol=1e-9, atol=0)
    torch.testing.assert_close(replayed, of_reference, rtol=1e-9, atol=0)
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
    batches = trainer._batches
    trainer._batches = lambda: orders.append(batches()) or orders[-1]
    list(trainer.epochs())
    flat = [torch.cat(order).tolist() for order in orders]
    assert all(sorted(order) == list(range(24)) for order in flat)
    assert len({tuple(order) for order in flat}) == 3


def test_a_short_last_batch_is_left_out():
    trainer = make_trainer(batch_size=7)
    assert [len(index) for index in trainer._batches()] == [7, 7, 7]
    assert [e.step for e in trainer.epochs()] == [3, 6, 9]


def test_a_batch_is_never_larger_than_the_data():
    trainer = make_trainer(batch_size=1000, epochs=2)
    assert [(e.epoch, e.step) for e in trainer.epochs()] == [(1, 1), (2, 2)]


def test_each_step_is_announced():
    trainer, count = make_trainer(), itertools.count(1)
    list(trainer.epochs(on_step=lambda: next(count)))
    assert next(count) - 1 == trainer.step == 12


def test_learning_rates_are_separate_and_fall_by_the_decay():
    trainer = make_trainer(
        epochs=50, generative_learning_rate=1e-2, recognition_learning_rate=3e-3, learning_rate_decay=0.1
    )
    rates = {"generative": [], "recognition": []}

    def note():
        for name, optimizer in trainer.optimizers.items():
            rates[name].append(optimizer.param_groups[0]["lr"])

    list(trainer.epochs(on_step=note))
    for name, start in (("generative", 1e-2), ("recognition", 3e-3)):
        assert rates[name][0] == start
        assert rates[name][100] == pytest.approx(start * 0.1**0.5)
        assert rates[name][-1] == pytest.approx(start * 0.1, rel=0.02)


def test_optimizers_are_what_was_asked_for():
    trainer = make_trainer(adam_betas=(0.8, 0.9), adam_epsilon=1e-3)
    for network, optimizer in trainer.optimizers.items():
        (group,) = optimizer.param_groups
        assert (group["betas"], group["eps"]) == ((0.8, 0.9), 1e-3)
        expected = list(getattr(trainer.machine, network).parameters())
        assert all(a is b for a, b in zip(group["params"], expected, strict=True))


def returns_nan_in_phase(network, step, trainer, *, with_gradients):
    """Makes a network return NaN from one step on; the trained network is the one with gradients."""

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
    with pytest.raises(DivergedError, match=rf"the {phase} loss became nan at step 6 \(epoch 2\)"):
        next(epochs)


def test_weights_that_explode_in_the_last_step_stop_the_run():
    trainer = make_trainer()

    def explode():
        if trainer.step == 4:
            with torch.no_grad():
                trainer.machine.recognition[0].network[0].weight[0, 0] = math.inf

    with pytest.raises(DivergedError, match="a weight of the recognition network became infinite at step 4"):
        next(trainer.epochs(on_step=explode))


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
    ],
)
def test_values_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=f"TrainConfig: {name} is out of range, got"):
        TrainConfig(**{name: value})


def test_the_digits_are_learnt():
    """A few epochs take the ELBO past the independent-Bernoulli baseline of 27 nats."""
    digits = load(DIGITS)
    torch.manual_seed(0)
    machine = HelmholtzMachine(ModelConfig(64), digits.train.mean())
    list(Trainer(machine, digits.train, TrainConfig(epochs=25)).epochs())
    bounds = log_likelihood_bounds(machine.recognition, machine.generative, digits.binary_test(), 100)
    assert -bounds.log_likelihood.mean() < 26
