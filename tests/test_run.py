"""Check that the folder of a run survives failures, and rejects files of other runs."""

import errno
import json
import math
import os
import shutil
import threading
from dataclasses import asdict, replace

import pytest
import torch

from wakesleep_ext import __version__
from wakesleep_ext._files import FileError, locked
from wakesleep_ext.helmholtz.config import ModelConfig
from wakesleep_ext.helmholtz.models import HelmholtzMachine
from wakesleep_ext.training import checkpoint, metrics
from wakesleep_ext.training.config import TrainConfig
from wakesleep_ext.training.data import DIGITS, DataError, load
from wakesleep_ext.training.divergence import DivergedError
from wakesleep_ext.training.run import Run
from wakesleep_ext.training.run_config import RunConfig, RunError
from wakesleep_ext.training.trainer import Trainer

MODEL = ModelConfig(64, (2,), (4,), (4,))
TRAINING = TrainConfig(epochs=2, batch_size=400)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def digits():
    return load(DIGITS)


def described(bound_samples=3):
    return {"data": DIGITS, "model": asdict(MODEL), "training": asdict(TRAINING), "bound_samples": bound_samples}


def begin(folder, digits, **options):
    """Train a run of two epochs to its end."""
    config = RunConfig.of(described(), digits)
    trainer = Trainer(HelmholtzMachine.from_config(MODEL, digits.train.mean()), digits.train, TRAINING)
    with Run.begin(folder, config, trainer, **options) as run:
        return list(run.train(trainer, digits.binary_test(), on_step=lambda: None))


def resume(folder, digits):
    with Run.resume(folder, CPU) as (run, trainer, _):
        return list(run.train(trainer, digits.binary_test(), on_step=lambda: None))


@pytest.fixture
def run(tmp_path, digits):
    begin(tmp_path, digits)
    return tmp_path


def save_described(folder, change):
    """Change the description in a checkpoint."""
    tensors, description = checkpoint.load(folder / "checkpoint.safetensors")
    change(description)
    checkpoint.save(folder / "checkpoint.safetensors", tensors, description)


def test_a_run_that_is_over_is_resumed_to_what_it_noted(run, digits):
    noted = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in noted] == [1, 2]
    assert resume(run, digits) == noted


@pytest.mark.parametrize("rest", ['{"epoch": 3, "st', "{", '{"epoch": 3}', "[1", "nul"])
def test_half_a_line_at_the_end_is_left_out(run, digits, rest):
    whole = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(whole + rest)
    assert len(resume(run, digits)) == 2
    assert (run / "metrics.jsonl").read_text() == whole


@pytest.mark.parametrize("line", ["{", "3", '{"epoch": 1}', '{"epoch": 1, "step": "two"}', "\xff"])
def test_another_damaged_line_is_named(run, digits, line):
    whole = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(f"{line}\n{whole}", encoding="latin-1")
    with pytest.raises(RunError, match=r"metrics\.jsonl: line 1 is not a valid record"):
        resume(run, digits)
    assert (run / "metrics.jsonl").read_bytes().endswith(whole.encode())


def test_other_images_of_the_same_shape_are_refused(run, digits):
    save_described(run, lambda described: described.update(data_sha256="0" * 64))
    with pytest.raises(RunError, match="the images in digits differ from those that this run began with"):
        resume(run, digits)


def test_a_digest_is_of_every_image_and_of_what_its_levels_mean(digits):
    others = [
        replace(digits, test=digits.train),
        replace(digits, train=replace(digits.train, white=15)),
        replace(digits, train=replace(digits.train, shape=(4, 16)), test=replace(digits.test, shape=(4, 16))),
        replace(digits, train=replace(digits.train, grey=digits.train.grey.flip(0))),
    ]
    assert len({dataset.sha256() for dataset in (digits, *others)}) == 5
    assert load(DIGITS).sha256() == digits.sha256()


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.pop("training"),
        lambda d: d.pop("data"),
        lambda d: d.pop("step"),
        lambda d: d.update(step="3"),
        lambda d: d.update(step=-1),
        lambda d: d.update(data=3),
        lambda d: d.update(image_shape=[8]),
        lambda d: d.update(bound_samples=2.5),
        lambda d: d.update(bound_samples=True),
        lambda d: d.update(bound_samples=0),
        lambda d: d.update(model=[1]),
        lambda d: d.update(more=1),
        lambda d: d["training"].update(epochs="2"),
        lambda d: d["training"].update(epochs=2.5),
        lambda d: d["training"].update(batch_size=True),
        lambda d: d["training"].update(adam_betas=[0.9]),
        lambda d: d["training"].update(generative_learning_rate=None),
        lambda d: d["training"].update(replay=1),
        lambda d: d["training"].update(objective="luck"),
    ],
)
def test_a_description_that_describes_no_run_is_refused(run, change):
    save_described(run, change)
    with pytest.raises(checkpoint.CheckpointError, match=r"checkpoint\.safetensors: does not"):
        Run.load(run)


def test_a_description_is_restored_as_it_was(run, digits):
    found, _ = Run.load(run)
    assert found.config == RunConfig.of(described(), digits)
    assert RunConfig.restore(json.loads(json.dumps(asdict(found.config)))) == found.config


def test_what_cannot_be_evaluated_is_refused_before_training(digits):
    with pytest.raises(ValueError, match="bound_samples of at least 1, got 0"):
        RunConfig.of(described(0), digits)
    one = replace(digits, test=replace(digits.test, grey=digits.test.grey[:1]))
    with pytest.raises(ValueError, match="at least two test images, got 1"):
        RunConfig.of(described(5), one)


def test_a_folder_is_one_process_at_a_time(run, digits):
    entered, leave = threading.Event(), threading.Event()

    def hold():
        with locked(run):
            entered.set()
            leave.wait()

    holder = threading.Thread(target=hold)  # a lock belongs to an open file, so a thread is as good as a process
    holder.start()
    entered.wait()
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    try:
        for write in (lambda: resume(run, digits), lambda: begin(run, digits, overwrite=True)):
            with pytest.raises(FileError, match="another process is writing"):
                write()
        assert {path.name: path.read_bytes() for path in run.iterdir()} == before
        Run.load(run)  # reading is free
    finally:
        leave.set()
        holder.join()
    begin(run, digits, overwrite=True)


def test_data_that_are_gone_are_named(run, tmp_path):
    save_described(run, lambda described: described.update(data=str(tmp_path / "gone.npz")))
    with pytest.raises(DataError, match=r"gone\.npz: .*it does not exist"), Run.resume(run, CPU):
        pass


def damaged(content, count):
    """Yield copies with one changed bit or without their end, at places spread over the content."""
    for number in range(count):
        place = number * len(content) // count
        changed = bytearray(content)
        changed[place] ^= 1 << number % 8
        yield bytes(changed) if number % 3 else content[:place]


def outcome_of_resuming(folder, digits):
    try:
        return resume(folder, digits)
    except FileError as error:
        return str(error)


@pytest.mark.parametrize("count", [10, pytest.param(150, marks=pytest.mark.thorough)])
def test_damage_to_the_metrics_is_named_or_does_not_matter(run, digits, count):
    expected = resume(run, digits)
    path = run / "metrics.jsonl"
    for content in damaged(path.read_bytes(), count):
        path.write_bytes(content)
        found = outcome_of_resuming(run, digits)
        assert "metrics.jsonl" in found if isinstance(found, str) else len(found) <= len(expected)


@pytest.mark.parametrize("count", [10, pytest.param(200, marks=pytest.mark.thorough)])
def test_a_damaged_checkpoint_is_replaced_by_the_previous_one(run, digits, caplog, count):
    """The run then takes its last steps again, to the same bits. Without a previous checkpoint, the damage is named."""
    last, previous = run / "checkpoint.safetensors", run / "previous.safetensors"
    content, before, noted = last.read_bytes(), previous.read_bytes(), (run / "metrics.jsonl").read_bytes()
    expected, saved = [{**r, "seconds": 0} for r in resume(run, digits)], checkpoint.load(last).tensors
    for number, changed in enumerate(damaged(content, count)):
        last.write_bytes(changed)
        caplog.clear()
        if number % 5:
            assert [{**record, "seconds": 0} for record in resume(run, digits)] == expected
            (warning,) = caplog.messages
            assert str(last) in warning
            assert str(previous) in warning
            assert all(torch.equal(saved[name], value) for name, value in checkpoint.load(last).tensors.items())
        else:
            previous.write_bytes(changed[: number * len(changed) // count])
            found = outcome_of_resuming(run, digits)
            assert isinstance(found, str)
            assert found.startswith(f"{last}: ")
            assert "previous.safetensors" in found
        previous.write_bytes(before)
        (run / "metrics.jsonl").write_bytes(noted)


def test_a_newer_format_is_refused(run, digits, monkeypatch):
    held = checkpoint.load(run / "checkpoint.safetensors")
    with monkeypatch.context() as later:
        later.setattr(checkpoint, "FORMAT", checkpoint.FORMAT + 1)
        checkpoint.save(run / "checkpoint.safetensors", *held)
    with pytest.raises(checkpoint.CheckpointError, match=r"checkpoint\.safetensors: expected a format up to 2, got 3"):
        resume(run, digits)


def test_a_checkpoint_of_the_first_format_is_resumed(run, digits, monkeypatch):
    """It stores neither its format nor what it was made with."""
    tensors, description = checkpoint.load(run / "checkpoint.safetensors")
    for name in ("made_with", "seconds"):
        del description[name]
    with monkeypatch.context() as earlier:
        earlier.setattr(checkpoint, "FORMAT", 1)
        checkpoint.save(run / "checkpoint.safetensors", tensors, description)
    assert len(resume(run, digits)) == 2


@pytest.mark.parametrize(
    ("before", "told"),
    [
        ({}, None),
        ({"commit": "0123456"}, None),
        ({"torch": "1.13.0", "ranks": 3}, ("torch 1.13.0, ranks 3", f"torch {torch.__version__}, ranks 1")),
        ({"wakesleep_ext": "0.1.0"}, ("wakesleep_ext 0.1.0", f"wakesleep_ext {__version__}")),
        ({"threads": 10**6}, (f"threads {10**6}", f"threads {torch.get_num_threads()}")),
    ],
)
def test_a_resumed_run_tells_once_what_is_no_longer_the_same(run, digits, caplog, before, told):
    save_described(run, lambda description: description["made_with"].update(before))
    resume(run, digits)
    assert len(caplog.messages) == (told is not None)
    for message in caplog.messages:
        was, is_now = told
        last = run / "checkpoint.safetensors"
        assert message == f"{last} was made with {was}. The run continues with {is_now}, so it may round differently"


def test_a_checkpoint_without_the_losses_of_its_epoch_is_refused(run, digits):
    save_described(run, lambda description: description.update(step=1))
    with pytest.raises(checkpoint.CheckpointError, match="does not hold the losses of its incomplete epoch"):
        resume(run, digits)


def test_the_best_checkpoint_is_that_of_the_highest_test_elbo(tmp_path, digits):
    trainer = Trainer(HelmholtzMachine.from_config(MODEL, digits.train.mean()), digits.train, TRAINING)
    first, test = {}, digits.binary_test()
    with Run.begin(tmp_path, RunConfig.of(described(), digits), trainer) as run:
        for record in run.train(trainer, test):
            if not first:
                first = {name: value.clone() for name, value in trainer.machine.state_dict().items()}
                with torch.no_grad():  # the second epoch ends worse than the first
                    trainer.machine.generative[0].network.head.bias += 3
            elbo = record["test_elbo"]
    best, last = (Run.load(tmp_path, which)[1].state_dict() for which in ("best", "last"))
    assert all(torch.equal(best[name], value) for name, value in first.items())
    assert not torch.equal(best["generative.0.network.0.weight"], last["generative.0.network.0.weight"])
    assert metrics.read(tmp_path)[0]["test_elbo"] > elbo


def test_a_full_disk_is_found_before_training(tmp_path, digits, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**6))
    with pytest.raises(FileError, match=r"expected [0-9,]+ free bytes on its disk, got 1,000,000"):
        begin(tmp_path / "new", digits)
    assert not list(tmp_path.iterdir())


def test_a_first_checkpoint_that_cannot_be_written_leaves_no_file(tmp_path, digits, monkeypatch):
    def fail(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        begin(tmp_path, digits)
    assert not list(tmp_path.iterdir())


def test_a_later_checkpoint_that_cannot_be_written_is_named_with_the_last_good_one(tmp_path, digits, monkeypatch):
    def fail(path, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    trainer = Trainer(HelmholtzMachine.from_config(MODEL, digits.train.mean()), digits.train, TRAINING)
    with Run.begin(tmp_path, RunConfig.of(described(), digits), trainer) as run:
        epochs = run.train(trainer, digits.binary_test())
        next(epochs)
        monkeypatch.setattr(checkpoint, "write_atomically", fail)
        with pytest.raises(RunError, match=r"No space left.*the last good checkpoint, of step 0, is .*checkpoint\."):
            list(epochs)
    assert checkpoint.load(tmp_path / "checkpoint.safetensors").description["step"] == 0


@pytest.mark.parametrize("of", ["machine.generative.0.network.0.bias", "optimizer.recognition.0.network"])
def test_weights_and_moments_that_are_not_finite_replace_no_checkpoint(tmp_path, digits, of):
    """The trainer finds them at most 100 steps later, and a save finds them at once."""
    longer = replace(TRAINING, epochs=1000, batch_size=1)
    trainer = Trainer(HelmholtzMachine.from_config(MODEL, digits.train.mean()), digits.train, longer)
    (tensor, *_) = (value for name, value in trainer.state_dict().items() if name.startswith(of))
    broken = 30

    def after_step():
        if trainer.step == broken:
            with torch.no_grad():
                tensor.fill_(math.inf)

    config = RunConfig.of({**described(), "training": asdict(longer)}, digits)
    with Run.begin(tmp_path, config, trainer) as run, pytest.raises(DivergedError, match="good checkpoint, of step 0"):
        list(run.train(trainer, digits.binary_test(), after_step))
    assert broken <= trainer.step <= broken + 100
    state = checkpoint.load(tmp_path / "checkpoint.safetensors").tensors
    assert all(value.isfinite().all() for value in state.values())


def test_an_older_run_holds_its_evaluation_in_the_last_line_of_its_metrics(tmp_path):
    epoch, evaluation = {"epoch": 1, "step": 4, "test_elbo": -9.5}, {"step": 4, "nll": 8.5}
    assert metrics.read_evaluation(tmp_path) is None
    (tmp_path / "metrics.jsonl").write_text(f"{json.dumps(epoch)}\n{json.dumps(evaluation)}\n")
    assert metrics.read(tmp_path) == [epoch]
    assert metrics.read_evaluation(tmp_path) == evaluation
    metrics.write_evaluation(tmp_path, {"nll": 8.0, "kl": (1.0, math.nan)})
    assert (tmp_path / "evaluation.json").read_text().count("null") == 1  # JSON has no NaN
    assert metrics.read_evaluation(tmp_path) == {"nll": 8.0, "kl": [1.0, None]}
