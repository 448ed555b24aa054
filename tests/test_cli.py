"""Test the commands as users type them."""

import json
import shutil
import signal
import subprocess
import sys
from importlib import metadata

import numpy as np
import pytest
import torch
from matplotlib.image import imread

import _wakesleep_command
from wakesleep_ext import cli
from wakesleep_ext.helmholtz.config import ModelConfig
from wakesleep_ext.helmholtz.models import HelmholtzMachine
from wakesleep_ext.training import checkpoint
from wakesleep_ext.training import run as runs
from wakesleep_ext.training import trainer as trainers
from wakesleep_ext.training.config import TrainConfig
from wakesleep_ext.training.data import Images, load
from wakesleep_ext.training.trainer import Trainer

pytestmark = pytest.mark.xdist_group("command line")

RUN_FILES = {
    "best.safetensors",
    "checkpoint.safetensors",
    "config.json",
    "curves.png",
    "evaluation.json",
    "evaluation.png",
    "metrics.jsonl",
    "previous.safetensors",
    "reconstructions.png",
    "samples.png",
}
SMALL = ["--latent", "3", "--recognition-hidden", "8", "--generative-hidden", "8", "--epochs", "2"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "stripes.npz"
    rng = np.random.default_rng(0)
    images = np.repeat(rng.integers(256, size=(150, 6, 1), dtype=np.uint8), 5, axis=2)
    np.savez(path, x_train=images[:120], x_test=images[120:], y_test=np.arange(30) % 4)
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory, data):
    """The folder of a run of two epochs."""
    folder = tmp_path_factory.mktemp("runs") / "stripes"
    command = ["train", "--data", str(data), "--out", str(folder), "--device", "cpu", *SMALL]
    assert cli.main([*command, "--num-samples", "2", "--seed", "5", "--bound-samples", "30"]) == 0
    return folder


def read_metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def read_evaluation(run):
    return json.loads((run / "evaluation.json").read_text())


def test_a_run_leaves_its_files(run):
    assert {path.name for path in run.iterdir()} == RUN_FILES
    for picture in run.glob("*.png"):
        pixels = imread(picture)
        assert np.ptp(pixels[..., :3]) > 0.3


def test_the_config_tells_how_the_run_was_made(run, data):
    config = json.loads((run / "config.json").read_text())
    assert config["data"] == str(data)
    assert config["image_shape"] == [6, 5]
    assert config["model"] == {
        "observed": 30,
        "latent": [3],
        "recognition_hidden": [8],
        "generative_hidden": [8],
        "latent_hidden": [100, 100],
        "latents": "gaussian",
        "activation": "tanh",
        "logvar_bounds": None,
    }
    assert config["training"]["num_samples"] == 2
    assert config["training"]["seed"] == 5
    described = checkpoint.load(run / "checkpoint.safetensors").description
    made_with = described.pop("made_with")
    assert made_with["torch"] == torch.__version__
    assert made_with.keys() == {"wakesleep_ext", "torch", "commit", "modified", "threads", "ranks"}
    assert described == {**config, "step": 2, "seconds": 0.0}


def test_the_metrics_are_one_object_an_epoch_and_the_result(run):
    epochs, result = read_metrics(run), read_evaluation(run)
    assert [record["epoch"] for record in epochs] == [1, 2]
    for record in epochs:
        assert record["wake_loss"] > 0
        assert {"sleep_loss", "test_elbo", "step", "seconds"} <= record.keys()
    assert result["nll"] <= -result["elbo"]
    assert (result["bound_samples"], result["images"], result["step"]) == (30, 30, 2)


MACHINES = {
    "deep": ["--latent", "3", "2", "--latent-hidden", "4", "--logvar-bounds", "-5", "5"],
    "discrete": ["--latent", "3", "2", "--latent-hidden", "4", "--latents", "bernoulli"],
}


@pytest.mark.parametrize("machine", MACHINES)
def test_deep_and_discrete_machines_go_by_the_same_commands(tmp_path, data, machine, capsys):
    out = tmp_path / "run"
    reweighted = ["--objective", "reweighted-wake-sleep", "--num-samples", "3"]
    command = ["train", "--data", str(data), "--out", str(out), *SMALL, *MACHINES[machine], *reweighted]
    assert cli.main([*command, "--epochs", "30", "--bound-samples", "20"]) == 0
    assert {path.name for path in out.iterdir()} == RUN_FILES
    first, *_, last = read_metrics(out)
    result = read_evaluation(out)
    assert last["test_elbo"] > first["test_elbo"]
    assert {"wake_loss", "sleep_loss"} <= last.keys()
    assert cli.main(["evaluate", str(out), "--bound-samples", "20", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["nll"] == pytest.approx(result["nll"])
    assert cli.main(["sample", str(out), "--count", "4", "--out", str(tmp_path / "dreams.png")]) == 0


class Interrupted(Trainer):
    """Receives a signal in its tenth step, which is in the middle of an epoch."""

    def epochs(self, on_step):
        def after_step():
            if self.step == 10:
                signal.raise_signal(self.signal)
            on_step()

        return super().epochs(after_step)


def assert_same_run(one, other):
    """Check that two runs have the same checkpoints, bit for bit, and the same metrics and evaluation."""
    for name in ("checkpoint.safetensors", "best.safetensors"):
        tensors, same = (checkpoint.load(folder / name).tensors for folder in (one, other))
        assert tensors.keys() == same.keys()
        assert all(torch.equal(tensors[name], same[name]) for name in tensors)
    records = [[{k: v for k, v in r.items() if k != "seconds"} for r in read_metrics(f)] for f in (one, other)]
    assert records[0] == records[1]
    assert read_evaluation(one) == read_evaluation(other)


@pytest.mark.parametrize(
    ("number", "flags"),
    [
        (signal.SIGINT, ["--objective", "reweighted-wake-sleep", "--num-samples", "2"]),
        (signal.SIGTERM, ["--sleep-warm-up", "3", "--steps-per-replay", "2"]),
    ],
)
def test_a_signal_saves_the_run_after_the_step_and_it_resumes_to_the_same_end(
    tmp_path, data, monkeypatch, capsys, number, flags
):
    command = ["train", "--data", str(data), *SMALL, "--epochs", "4", "--batch-size", "30", "--bound-samples", "5"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert cli.main([*command, *flags, "--out", str(whole)]) == 0
    with monkeypatch.context() as interrupted:
        interrupted.setattr(Interrupted, "signal", number, raising=False)
        interrupted.setattr(trainers, "Trainer", Interrupted)
        assert cli.main([*command, *flags, "--out", str(broken)]) == 128 + number
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == f"wakesleep: stopped by {number.name} after step 10; wakesleep resume {broken} continues"
    assert checkpoint.load(broken / "checkpoint.safetensors").description["step"] == 10
    assert len(read_metrics(broken)) == 2
    with (broken / "metrics.jsonl").open("a") as metrics:  # of an epoch that the checkpoint has not seen
        print(json.dumps({"epoch": 3, "step": 12, "test_elbo": -1.0}), file=metrics)
    assert cli.main(["resume", str(broken)]) == 0
    assert_same_run(whole, broken)


def test_a_run_is_resumed_where_its_data_are_now(tmp_path, run, data, capsys):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    tensors, described = checkpoint.load(folder / "checkpoint.safetensors")
    checkpoint.save(folder / "checkpoint.safetensors", tensors, {**described, "data": str(tmp_path / "old.npz")})
    assert cli.main(["resume", str(folder)]) == 1
    assert "old.npz: expected 'digits', a folder" in capsys.readouterr().err
    np.savez(tmp_path / "other.npz", x_train=np.eye(30)[:9].reshape(9, 6, 5) > 0, x_test=np.ones((3, 6, 5), bool))
    assert cli.main(["resume", str(folder), "--data", str(tmp_path / "other.npz")]) == 1
    assert "other.npz differ from those that this run began with" in capsys.readouterr().err
    assert cli.main(["resume", str(folder), "--data", str(data)]) == 0
    assert json.loads((folder / "config.json").read_text())["data"] == str(data)
    assert checkpoint.load(folder / "checkpoint.safetensors").description["data"] == str(data)


def test_a_run_stops_when_its_elbo_stalls_and_does_not_go_on(tmp_path, data):
    still = ["--generative-learning-rate", "1e-30", "--recognition-learning-rate", "1e-30", "--bound-samples", "2"]
    command = ["train", "--data", str(data), "--out", str(tmp_path / "run"), *SMALL, *still, "--epochs", "9"]
    assert cli.main([*command, "--patience", "2"]) == 0
    assert [record.get("epoch") for record in read_metrics(tmp_path / "run")] == [1, 2, 3]
    assert cli.main(["resume", str(tmp_path / "run")]) == 0
    assert [record.get("epoch") for record in read_metrics(tmp_path / "run")] == [1, 2, 3]


@pytest.mark.parametrize(
    ("elbos", "stalled"),
    [
        ([], False),
        ([-9, -8], False),
        ([-9, -8, -8.5], False),
        ([-9, -8, -8.5, -8], True),
        ([-9, -8, -8.5, -7], False),
    ],
)
def test_patience_counts_epochs_without_a_better_elbo(elbos, stalled):
    assert TrainConfig(patience=2).has_stalled(elbos) == stalled
    assert not TrainConfig().has_stalled(elbos)


@pytest.mark.usefixtures("not_trained")
def test_the_names_of_the_arrays_belong_to_the_run(tmp_path, data):
    arrays = np.load(data)
    np.savez(tmp_path / "named.npz", seen=arrays["x_train"] / 255, unseen=arrays["x_test"] / 255)
    command = ["train", "--data", str(tmp_path / "named.npz"), "--train-array", "seen", "--test-array", "unseen"]
    assert cli.main([*command, "--out", str(tmp_path / "run")]) == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["train_array"], config["test_array"]) == ("seen", "unseen")


def test_tensorboard_gets_the_metrics_of_every_epoch_once(tmp_path, run):
    """Also if the run is resumed, which yields its earlier epochs again."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from wakesleep_ext.report.tensorboard import follow

    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    with follow(folder) as log:
        log({"epoch": 1, "step": 1, "seconds": 1.0, "test_elbo": 99.0})
    assert cli.main(["resume", str(folder), "--log", "tensorboard"]) == 0
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    epochs = [record for record in read_metrics(run) if "epoch" in record]
    assert set(events.Tags()["scalars"]) == epochs[0].keys() - {"epoch", "step"}
    for name in ("test_elbo", "wake_loss"):
        found = [(scalar.step, scalar.value) for scalar in events.Scalars(name)]
        assert found == [(record["step"], pytest.approx(record[name], rel=1e-6)) for record in epochs]


def test_a_missing_logger_is_named_before_the_training(tmp_path, monkeypatch, data, capsys):
    for name in ("torch.utils.tensorboard", "wakesleep_ext.report.tensorboard"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    command = ["train", "--data", str(data), "--out", str(tmp_path / "run"), "--log", "tensorboard"]
    assert cli.main(command) == 1
    assert "--log tensorboard needs the package tensorboard, which is not installed" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("losses", "shown"),
    [
        ({"wake_loss": 9.0, "sleep_loss": 3.0}, {"images/s": "250", "dreams/s": "75"}),
        ({"sleep_loss": 3.0}, {"dreams/s": "75"}),
    ],
)
def test_the_progress_bar_shows_the_speed_of_each_phase(losses, shown):
    images = Images.of(torch.rand(500, 6))
    machine = HelmholtzMachine.from_config(ModelConfig(6, (2,), (3,), (3,)))
    trainer = Trainer(machine, images, TrainConfig(batch_size=100, num_dreams=30))
    epoch = {"epoch": 3, "step": 15, "seconds": 2.0, "test_elbo": -7.125} | losses
    assert cli._progress(trainer, epoch) == {"epoch": "3", "test_elbo": "-7.12"} | shown


def test_a_checkpoint_that_does_not_tell_how_to_go_on_is_refused(tmp_path, run, capsys):
    tensors, description = checkpoint.load(run / "checkpoint.safetensors")
    for change, reason in (
        ({"training": {"epochs": -1}}, "epochs is out of range"),
        ({"training": {"speed": 3}}, "unexpected keyword argument 'speed'"),
    ):
        checkpoint.save(tmp_path / "checkpoint.safetensors", tensors, {**description, **change})
        assert cli.main(["resume", str(tmp_path)]) == 1
        assert reason in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], {"epochs": 500, "learning_rate_decay": 1.0}),
        (["--recipe", "mnist"], {"epochs": 100, "learning_rate_decay": 0.1, "schedule": "exponential"}),
        (["--recipe", "mnist", "--epochs", "7"], {"epochs": 7, "learning_rate_decay": 0.1}),
        (["--recipe=burda"], {"epochs": 3280, "batch_size": 20, "schedule": "staged"}),
    ],
)
@pytest.mark.usefixtures("not_trained")
def test_a_recipe_is_what_the_flags_default_to(tmp_path, data, arguments, expected):
    assert cli.main(["train", "--data", str(data), "--out", str(tmp_path), *arguments]) == 0
    training = json.loads((tmp_path / "config.json").read_text())["training"]
    assert training.items() >= expected.items()


@pytest.fixture
def not_trained(monkeypatch):
    """Start runs, but do not train."""
    monkeypatch.setattr(cli, "_finish", lambda *run: None)


@pytest.mark.usefixtures("not_trained")
def test_the_config_of_a_run_makes_another_like_it(tmp_path, run, data):
    again, changed = tmp_path / "again", tmp_path / "changed"
    assert cli.main(["train", "--config", str(run / "config.json"), "--out", str(again)]) == 0
    assert (again / "config.json").read_text() == (run / "config.json").read_text()

    other = ["--epochs", "9", "--latent", "4", "2", "--data", "digits"]
    assert cli.main(["train", "--config", str(run / "config.json"), "--out", str(changed), *other]) == 0
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (run, changed))
    assert after["training"] == {**before["training"], "epochs": 9}
    assert after["model"] == {**before["model"], "latent": [4, 2], "observed": 64}
    assert (after["data"], after["image_shape"]) == ("digits", [8, 8])


@pytest.mark.usefixtures("not_trained")
def test_a_config_may_be_written_by_hand(tmp_path, data):
    config = tmp_path / "mine.json"
    config.write_text('{"training": {"objective": "iwae", "num_samples": 5, "replay": false}, "bound_samples": 7}')
    command = ["train", "--config", str(config), "--data", str(data), "--out", str(tmp_path / "run"), "--replay"]
    assert cli.main(command) == 0
    made = json.loads((tmp_path / "run" / "config.json").read_text())
    assert made["bound_samples"] == 7
    assert made["training"].items() >= {"objective": "iwae", "num_samples": 5, "replay": True, "epochs": 500}.items()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "mine.json: cannot be read as JSON: "),
        ("[1]", "mine.json: expected the file to be a JSON object, got [1]"),
        ('{"training": 3}', "mine.json: expected training to be a JSON object, got 3"),
        ('{"training": {"epoch": 3}, "model": {}}', "mine.json: has unknown keys: training.epoch"),
        ('{"seed": 3}', "mine.json: has unknown keys: seed"),
        ('{"training": {"epochs": "three"}}', "mine.json: epochs: "),
        ('{"training": {"epochs": -3}}', "mine.json: TrainConfig: epochs is out of range, got -3"),
        ('{"data": "digits", "data_sha256": "0"}', "mine.json: expected the images that data_sha256 identifies"),
        ('{"bound_samples": 1.5}', "mine.json: bound_samples: "),
        ('{"data": 3}', "mine.json: data: "),
        ('{"data": null}', "mine.json: data: "),
    ],
)
def test_a_config_that_is_none_is_refused(tmp_path, monkeypatch, capsys, content, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.json").write_text(content)
    assert cli.main(["train", "--config", "mine.json"]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"wakesleep: {message}")
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["mine.json"]


def test_an_unknown_recipe_is_refused(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--recipe", "secret"])
    assert "secret" in capsys.readouterr().err


def test_evaluate_prints_one_json_object(run, capsys):
    assert cli.main(["evaluate", str(run), "--bound-samples", "50", "--json"]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert captured.out.count("\n") == 1
    assert result["bound_samples"] == 50
    assert result["nll"] <= -result["elbo"]
    trained = read_evaluation(run)
    assert result["baseline_nll"] == trained["baseline_nll"]
    assert result["nll"] == pytest.approx(trained["nll"], abs=0.5)


def test_evaluate_prints_a_table(run, capsys):
    assert cli.main(["evaluate", str(run), "--bound-samples", "5"]) == 0
    out = capsys.readouterr().out
    assert "independent Bernoulli pixels" in out
    assert "K = 5" in out


def test_diagnostics_are_printed_and_drawn(run, tmp_path, capsys):
    pytest.importorskip("arviz_stats", reason="the extra wakesleep_ext[diagnostics] contains it")
    command = ["evaluate", str(run), "--bound-samples", "25", "--dreams", "20", "--diagnostics", "5"]
    assert cli.main([*command, "--picture", str(tmp_path / "found.png")]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"found.png", "found-diagnostics.png"}
    assert "expected coverage" in capsys.readouterr().out
    assert cli.main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["diagnostics"]
    assert found["simulations"] == 5
    assert found["gradient_signal_to_noise"]["sleep"] >= 0


def test_annealing_is_asked_for_and_drawn_with_the_rest(run, tmp_path, capsys):
    picture = tmp_path / "new" / "evaluation.png"
    annealed = ["--ais-images", "4", "--ais-chains", "3", "--ais-steps", "5"]
    command = ["evaluate", str(run), "--bound-samples", "5", "--dreams", "20", *annealed]
    assert cli.main([*command, "--picture", str(picture)]) == 0
    assert "of these by annealed importance sampling" in capsys.readouterr().out
    assert imread(picture).shape == imread(run / "evaluation.png").shape
    assert cli.main([*command, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["dreams"] == 20
    assert result["ais"]["images"] == 4
    assert result["ais"]["standard_error"] > 0


def test_sample_draws_as_many_dreams_as_asked(run, tmp_path):
    sizes = []
    for count in (4, 16):
        path = tmp_path / "new" / f"{count}.png"
        assert cli.main(["sample", str(run), "--count", str(count), "--out", str(path)]) == 0
        sizes.append(imread(path).shape)
    assert sizes[0][0] > sizes[0][1]  # images are taller than wide
    again = tmp_path / "again.png"
    cli.main(["sample", str(run), "--count", "4", "--out", str(again)])
    assert again.read_bytes() == (tmp_path / "new" / "4.png").read_bytes()


def test_encode_writes_the_latent_variables_of_both_sets(run, tmp_path, data):
    out = tmp_path / "new" / "latents.npz"
    assert cli.main(["encode", str(run), "--out", str(out)]) == 0
    latents = np.load(out)
    shapes = {name: latents[name].shape for name in latents}
    assert shapes == {f"{of}_{name}": (n, 3) for of, n in (("train", 120), ("test", 30)) for name in ("mu", "logvar")}
    _, machine = runs.Run.load(run)
    code, *_ = machine.encode(load(data).binary_test())
    assert torch.equal(code.mu, torch.from_numpy(latents["test_mu"]))
    assert torch.equal(code.logvar, torch.from_numpy(latents["test_logvar"]))


def test_report_compares_runs_on_one_page(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "arviz_stats", None)  # its import takes seconds
    other = tmp_path / "other"
    shutil.copytree(run, other)
    out = tmp_path / "new" / "report.html"
    assert cli.main(["report", str(run), str(other), "--out", str(out), "--images", "9", "--weights", "25"]) == 0
    page = out.read_text()
    assert "coloured by their labels" in page
    result = read_evaluation(run)
    assert page.count(f"{result['nll']:.2f} (K = 30)") == 2
    assert f"<title>{run.name} and other</title>" in page


PICTURES = {"png": b"\x89PNG", "PNG": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}


@pytest.mark.parametrize(("suffix", "magic"), PICTURES.items())
def test_pictures_are_what_their_suffix_says(run, tmp_path, suffix, magic):
    dreams, again, evaluation = (tmp_path / f"{name}.{suffix}" for name in ("dreams", "more/dreams", "evaluation"))
    for path in (dreams, again):
        assert cli.main(["sample", str(run), "--count", "4", "--out", str(path)]) == 0
    assert cli.main(["evaluate", str(run), "--bound-samples", "2", "--dreams", "9", "--picture", str(evaluation)]) == 0
    for path in (dreams, evaluation):
        assert path.read_bytes().startswith(magic)
    assert dreams.read_bytes() == again.read_bytes()


def test_the_table_names_the_baseline_beside_the_bound(tmp_path, data, capsys):
    command = ["train", "--data", str(data), "--out", str(tmp_path / "r"), *SMALL]
    assert cli.main([*command, "--bound-samples", "7"]) == 0
    out = capsys.readouterr().out
    result = read_evaluation(tmp_path / "r")
    assert f"{result['baseline_nll']:.3f}" in out
    assert f"{result['nll']:.3f}" in out
    assert "K = 7" in out


def test_a_run_is_not_overwritten_unless_asked(tmp_path, data, capsys):
    command = ["train", "--data", str(data), "--out", str(tmp_path), *SMALL, "--bound-samples", "1"]
    assert cli.main(command) == 0
    before = (tmp_path / "checkpoint.safetensors").read_bytes()
    assert cli.main([*command, "--seed", "1"]) == 1
    assert "already holds a run" in capsys.readouterr().err
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == before
    assert cli.main([*command, "--seed", "1", "--overwrite"]) == 0
    assert (tmp_path / "checkpoint.safetensors").read_bytes() != before
    assert len(read_metrics(tmp_path)) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--data", "nowhere"], "nowhere: expected 'digits', a folder of IDX files"),
        (["train", "--epochs", "-1"], "TrainConfig: epochs is out of range, got -1"),
        (["train", "--objective", "elbo", "--sleep-weight", "0.5"], "expected sleep_weight 0 with objective 'elbo'"),
        (["train", "--phi-gradient", "dreg"], "expected phi_gradient None with objective 'wake-sleep', got 'dreg'"),
        (["train", "--objective", "vimco"], "expected num_samples of at least 2 with objective 'vimco', got 1"),
        (
            ["train", "--objective", "reweighted-wake-sleep", "--phi-gradient", "dreg", "--latents", "bernoulli"],
            "expected recognition to have differentiable draws",
        ),
        (["train", "--recipe", "mnist", "--config", "x.json"], "expected --recipe or --config, got both"),
        (["train", "--config", "x.json"], "x.json: cannot be read as JSON"),
        (["train", "--latent", "0"], "expected latent > 0, got (0,)"),
        (["train", "--latents", "bernoulli", "--objective", "elbo"], "differentiable draws"),
        (["resume", "nowhere"], "nowhere: cannot be opened: No such file or directory"),
        (["evaluate", "nowhere"], "nowhere/checkpoint.safetensors: cannot be read"),
        (["evaluate", "nowhere", "--dreams", "1"], "--dreams of at least 2, got 1"),
        (["evaluate", "nowhere", "--ais-images", "-1"], "--ais-images of at least 0, got -1"),
        (["sample", "nowhere", "--out", "x.jpg"], "expected --out to end in .png, .pdf, .svg, got x.jpg"),
        (["evaluate", "nowhere", "--picture", "x"], "expected --picture to end in .png, .pdf, .svg, got x"),
        (["sample", "nowhere", "--out", "x.png", "--count", "0"], "--count of at least 1, got 0"),
        (["sample", "nowhere", "--out", "/dev/null/x.png"], "--out to name a file that can be written, got /dev/null/"),
        (["check", "--plot", "x.gif"], "expected --plot to end in .png, .pdf, .svg, got x.gif"),
        (["bench", "--plot", "x.svg"], "expected --plot to end in .png, got x.svg"),
        (["encode", "nowhere", "--out", "x.npy"], "expected --out to end in .npz, got x.npy"),
        (["report", "nowhere", "--out", "x.pdf"], "expected --out to end in .html, got x.pdf"),
        (["report", "nowhere", "--out", "x.html", "--weights", "9"], "expected --weights of at least 25, got 9"),
        (["report", "nowhere", "--out", "x.html", "--dreams", "1"], "expected --dreams of at least 2, got 1"),
        (["report", "--out", "x.html"], "expected one to 7 runs, got 0"),
        (["encode", "nowhere", "--out", "x.npz"], "nowhere/checkpoint.safetensors: cannot be read"),
    ],
)
def test_mistakes_are_answered_in_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("wakesleep: ")
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_missed(run, capsys):
    assert cli.main(["evaluate", str(run), "--device", "cuda"]) == 1
    assert "expected a GPU for --device cuda" in capsys.readouterr().err


def test_other_data_of_another_shape_are_refused(run, capsys):
    assert cli.main(["evaluate", str(run), "--data", "digits"]) == 1
    message = "was trained on images of shape [6, 5], but the images of digits have shape [8, 8]"
    assert message in capsys.readouterr().err


def test_a_diverging_run_names_its_last_good_checkpoint(tmp_path, data, capsys):
    command = ["train", "--data", str(data), "--out", str(tmp_path), *SMALL]
    assert cli.main([*command, "--generative-learning-rate", "1e38"]) == 1
    error = capsys.readouterr().err
    assert "after step 1: " in error
    assert f"the last good checkpoint, of step 0, is {tmp_path}/checkpoint.safetensors" in error
    assert checkpoint.load(tmp_path / "checkpoint.safetensors").description["step"] == 0


PACKAGES = {
    module: "scikit-learn" if module == "sklearn" else module
    for module in ("docstring_parser", "matplotlib", "numpy", "safetensors", "sklearn", "tqdm", "typeguard", "tyro")
}


@pytest.mark.parametrize("module", PACKAGES)
def test_a_missing_extra_is_named_with_its_cure(tmp_path, monkeypatch, capsys, module):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(sys, "argv", ["wakesleep", "train", "--out", str(tmp_path / "run")])
    assert _wakesleep_command.main() == 1
    error = capsys.readouterr().err
    assert error.startswith("wakesleep: ")
    assert error.endswith(f"Install them: pip install {PACKAGES[module]}\n")
    assert not list(tmp_path.iterdir())


def test_the_command_line_in_a_process_of_its_own(run):
    wakesleep = [sys.executable, "-m", "_wakesleep_command"]
    arguments = ["evaluate", str(run), "--bound-samples", "3", "--json"]
    process = subprocess.run([*wakesleep, *arguments], capture_output=True, text=True, timeout=120, check=False)
    assert process.returncode == 0, process.stderr
    assert {"nll", "elbo"} <= json.loads(process.stdout).keys()


def test_the_version_needs_no_torch(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(sys, "argv", ["wakesleep", "--version"])
    assert _wakesleep_command.main() == 0
    assert capsys.readouterr().out == f"wakesleep_ext {metadata.version('wakesleep_ext')}\n"


COMMANDS = ("train", "resume", "evaluate", "sample", "encode", "report", "bench", "check", "selftest", "info")


def test_help_names_the_commands(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--help"])
    assert ended.value.code == 0
    told = capsys.readouterr().out
    for command in COMMANDS:
        assert command in told


def test_help_shows_what_each_recipe_has(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    told = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "Passes over the training images. (digits: 500, mnist: 100, burda: 3280)" in told
    assert "(default: 200 200)" in told
    assert "tyro" not in told


WITHOUT_TORCH = """
import contextlib, io, sys

class NoTorch:
    def find_spec(self, name, path=None, target=None):
        assert name.partition(".")[0] != "torch"

sys.meta_path.insert(0, NoTorch())
import _wakesleep_command
for command in sys.argv[1:]:
    sys.argv[1:] = [command, "--help"] if command != "all" else ["--help"]
    told = io.StringIO()
    with contextlib.redirect_stdout(told), contextlib.suppress(SystemExit):
        _wakesleep_command.main()
    assert "usage: wakesleep" in told.getvalue(), command
"""


def test_help_needs_no_torch():
    command = [sys.executable, "-c", WITHOUT_TORCH, "all", *COMMANDS]
    process = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert process.returncode == 0, process.stderr
