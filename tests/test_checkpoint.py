"""A checkpoint is the old or the new one, exactly as saved, or raises an error that names it."""

import io
import os
import pickle
import signal
import stat
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import safetensors.torch
import torch

from wakesleep_ext.helmholtz.config import ModelConfig
from wakesleep_ext.helmholtz.models import HelmholtzMachine
from wakesleep_ext.training import checkpoint
from wakesleep_ext.training.checkpoint import CheckpointError

TENSORS = {
    "weight": torch.randn(3, 5),
    "transposed": torch.arange(6.0).view(2, 3).T,
    "scalar": torch.tensor(2.5, dtype=torch.float64),
    "empty": torch.zeros(0, 4),
    "half": torch.tensor([1.0, float("nan")], dtype=torch.bfloat16),
    "counts": torch.arange(3),
}
DESCRIPTION = {"model": {"observed": 4}, "step": 12, "name": "Größe"}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    checkpoint.save(path, TENSORS, DESCRIPTION)
    return path


def bits(tensors):
    return {
        name: (t.dtype, t.shape, bytes(t.contiguous().flatten().view(torch.uint8).numpy()))
        for name, t in tensors.items()
    }


def test_what_is_loaded_is_what_was_saved(path):
    loaded = checkpoint.load(path)
    assert bits(loaded.tensors) == bits(TENSORS)
    assert loaded.description == DESCRIPTION
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere: cannot be read"):
        checkpoint.load(tmp_path / "nowhere")


def test_truncation_at_every_byte_is_named(path):
    content = path.read_bytes()
    for size in range(len(content)):
        path.write_bytes(content[:size])
        with pytest.raises(CheckpointError, match=path.name):
            checkpoint.load(path)


@pytest.mark.parametrize("flip", [0x01, 0x20, 0xFF])
def test_a_flipped_byte_is_named(path, flip):
    """The byte may be in the header, in the description or in a tensor."""
    content = path.read_bytes()
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= flip
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=path.name):
            checkpoint.load(path)


def test_another_safetensors_file_is_no_checkpoint(path):
    safetensors.torch.save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="not a wakesleep checkpoint"):
        checkpoint.load(path)


class Explosive:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_nothing_in_a_checkpoint_is_executed(path, tmp_path):
    trap = tmp_path / "sprung"
    for write in (lambda x: path.write_bytes(pickle.dumps(x)), lambda x: torch.save(x, path)):
        write(Explosive(trap))
        with pytest.raises(CheckpointError, match="cannot be read"):
            checkpoint.load(path)
    assert not trap.exists()


class DiskFullError(OSError):
    pass


@pytest.mark.parametrize("survives", [0, 1, 100, 1000, -1])
def test_a_write_that_fails_leaves_the_old_checkpoint(path, monkeypatch, survives):
    """The disk is full after this many bytes; -1 means after the last byte, before the sync."""

    class Disk(io.FileIO):
        def write(self, content):
            super().write(bytes(content)[:survives] if survives >= 0 else content)
            raise DiskFullError

    monkeypatch.setattr(Path, "open", lambda path, mode: Disk(path, mode))
    with pytest.raises(DiskFullError):
        checkpoint.save(path, {"weight": torch.zeros(50, 50)}, {})
    monkeypatch.undo()
    assert bits(checkpoint.load(path).tensors) == bits(TENSORS)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_the_disk_has_the_content_before_the_rename_and_the_rename_before_save_returns(path, monkeypatch):
    """After a power failure, the path holds a complete checkpoint: the new one if save has returned."""
    fsync, replace = os.fsync, os.replace
    events = []

    def note_sync(descriptor):
        found = os.fstat(descriptor)
        is_file = stat.S_ISREG(found.st_mode)
        events.append(("sync", found.st_ino, found.st_size if is_file else None))
        fsync(descriptor)

    def note_rename(source, target):
        events.append(("rename", os.stat(source).st_ino, target))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "replace", note_rename)
    checkpoint.save(path, {"weight": torch.ones(3)}, {})
    file, folder = path.stat(), path.parent.stat()
    assert events == [
        ("sync", file.st_ino, file.st_size),
        ("rename", file.st_ino, path),
        ("sync", folder.st_ino, None),
    ]


def test_a_sync_that_fails_leaves_the_old_checkpoint(path, monkeypatch):
    def fail(descriptor):
        raise DiskFullError

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(DiskFullError):
        checkpoint.save(path, {"weight": torch.zeros(50, 50)}, {})
    monkeypatch.undo()
    assert bits(checkpoint.load(path).tensors) == bits(TENSORS)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_process_killed_while_saving_leaves_a_whole_checkpoint(path):
    """A process saves weights and a matching description repeatedly, and is killed at random times."""
    script = """
import sys, torch
from pathlib import Path
from wakesleep_ext.training import checkpoint
for step in range(1_000_000):
    checkpoint.save(Path(sys.argv[1]), {"w": torch.full((300, 300), float(step))}, {"step": step})
    print(step, flush=True)
"""
    command = [sys.executable, "-c", script, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        printed = [process.stdout.readline() for _ in range(5)]
        time.sleep(0.0137)
        process.send_signal(signal.SIGKILL)
        printed += process.stdout.read().split()
    loaded = checkpoint.load(path)
    assert loaded.description["step"] >= int(printed[-1])
    assert (loaded.tensors["w"] == loaded.description["step"]).all()
    checkpoint.save(path, TENSORS, DESCRIPTION)  # what the killed one left behind is no obstacle
    assert [p.name for p in path.parent.iterdir()] == [path.name]


MODEL = ModelConfig(6, (2,), (5,), (4, 3), activation="elu")


@pytest.mark.parametrize("seconds", [2, pytest.param(10, marks=pytest.mark.thorough)])
def test_two_writers_and_a_reader(path, seconds):
    """Every load gets a complete checkpoint, and every save succeeds."""
    script = """
import sys, time, torch
from pathlib import Path
from wakesleep_ext.training import checkpoint
end = time.monotonic() + float(sys.argv[2])
for step in range(1_000_000):
    checkpoint.save(Path(sys.argv[1]), {"w": torch.full((300, 300), float(step))}, {"step": step})
    if step == 0:
        print("ready", flush=True)
    if time.monotonic() > end:
        break
"""
    command = [sys.executable, "-c", script, str(path), str(seconds)]
    writers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
    loads = 0
    while any(writer.poll() is None for writer in writers):
        loaded = checkpoint.load(path)
        assert (loaded.tensors["w"] == loaded.description["step"]).all()
        loads += 1
    assert [writer.returncode for writer in writers] == [0, 0]
    assert loads > 20
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    for writer in writers:
        writer.stdout.close()


@pytest.fixture
def machine():
    return HelmholtzMachine.from_config(MODEL)


def save_machine(path, machine, **model):
    tensors = {f"machine.{name}": t for name, t in machine.state_dict().items()}
    described = {**asdict(MODEL), **model}
    checkpoint.save(path, tensors, {"model": described, "step": 3})


def test_a_machine_comes_back_as_it_was(path, machine):
    save_machine(path, machine)
    held = checkpoint.load(path)
    loaded = checkpoint.machine_of(path, held)
    assert repr(loaded) == repr(machine)
    assert bits(loaded.state_dict()) == bits(machine.state_dict())
    assert all(p.requires_grad and p.is_leaf for p in loaded.parameters())
    assert held.description["step"] == 3
    x = torch.ones(2, 6)
    assert torch.equal(loaded.recognition[0](x).mu, machine.recognition[0](x).mu)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ({"observed": 7}, "size mismatch"),
        ({"observed": 10**12}, "size mismatch"),
        ({"generative_hidden": (4,)}, "Unexpected key"),
        ({"activation": "__import__"}, "expected activation to be one of"),
        ({"layers": 3}, "unexpected keyword"),
    ],
)
def test_weights_that_do_not_fit_the_description_are_refused(path, machine, model, reason):
    save_machine(path, machine, **model)
    with pytest.raises(CheckpointError, match=f"(?s){path.name}: does not hold the model.*{reason}"):
        checkpoint.machine_of(path, checkpoint.load(path))


@pytest.mark.parametrize("bounds", [None, (-3.0, 2.5)])
def test_bounds_on_log_variances_come_back(path, machine, bounds):
    save_machine(path, machine, logvar_bounds=bounds)
    loaded = checkpoint.machine_of(path, checkpoint.load(path))
    assert [conditional.logvar_bounds for conditional in loaded.recognition] == [bounds]


def test_a_description_of_an_earlier_version_has_no_bounds(path, machine):
    save_machine(path, machine)
    tensors, description = checkpoint.load(path)
    del description["model"]["logvar_bounds"]
    checkpoint.save(path, tensors, description)
    assert checkpoint.machine_of(path, checkpoint.load(path)).recognition[0].logvar_bounds is None


def test_loading_a_machine_draws_no_random_numbers(path, machine):
    save_machine(path, machine)
    before = torch.get_rng_state()
    checkpoint.machine_of(path, checkpoint.load(path))
    assert torch.equal(torch.get_rng_state(), before)
