"""Check that the folder of a run survives failures, and rejects files of other runs."""

import json
import threading
from dataclasses import asdict, replace

import pytest
import torch

from wakesleep_ext._files import FileError, locked
from wakesleep_ext.helmholtz.config import ModelConfig
from wakesleep_ext.helmholtz.models import HelmholtzMachine
from wakesleep_ext.training import checkpoint
from wakesleep_ext.training.config import TrainConfig
from wakesleep_ext.training.data import DIGITS, DataError, load
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
    with Run.begin(folder, config, **options) as run:
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
    with pytest.raises(RunError, match="the images in digits have changed since this run began"):
        resume(run, digits)


def test_a_digest_is_of_every_image_and_of_what_its_levels_mean(digits):
    others = [
        replace(digits, test=digits.train),
        replace(digits, train=replace(digits.train, white=15)),
        replace(digits, train=replace(digits.train, shape=(4, 16))),
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


@pytest.mark.parametrize("part", [20, pytest.param(150, marks=pytest.mark.thorough)])
def test_damage_anywhere_is_named_or_does_not_matter(run, digits, part):
    """Changes a byte or cuts off the end, at places spread over every file of the run."""
    expected = resume(run, digits)
    for file in ("checkpoint.safetensors", "metrics.jsonl"):
        path = run / file
        content = path.read_bytes()
        for number in range(part):
            place = number * len(content) // part
            damaged = bytearray(content)
            damaged[place] ^= 1 << number % 8
            path.write_bytes(damaged if number % 3 else content[:place])
            found = outcome_of_resuming(run, digits)
            if isinstance(found, str):
                assert file in found
            else:
                assert file == "metrics.jsonl"
                assert len(found) <= len(expected)
            path.write_bytes(content)


def outcome_of_resuming(folder, digits):
    try:
        return resume(folder, digits)
    except FileError as error:
        return str(error)
