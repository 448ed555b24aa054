"""Test the script that patches and times other people's programs on a program of our own, and check its page."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import checkout
import pytest
from checkout import ROOT

pytestmark = pytest.mark.source_tree

TEXT = """
import torch

torch.manual_seed(1)
layer = torch.nn.Linear(8, 2 * 4)
for number in range(STEPS):
    x = torch.randn(16, 8)
    mu, logvar = layer(x).chunk(2, -1)
    std = torch.exp(0.5 * logvar)
    z = mu + std * torch.randn_like(std)
    kl = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())
    loss = (z - x[:, :4]).square().sum() + kl
    layer.zero_grad()
    loss.backward()
    with torch.no_grad():  # torch.optim takes seconds to import
        for parameter in layer.parameters():
            parameter -= 1e-3 * parameter.grad
"""
KL = "-0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))  # for the processes that it starts
    return checkout.load("other_peoples_code", "benchmarks")


@pytest.fixture
def program(script: Any) -> Any:
    return script.Program(
        name="tiny",
        title="A tiny program",
        source="here, tiny.py",
        replacements=(
            script.Replacement("import torch\n", "import torch\nimport wakesleep_ext as ws\n"),
            script.Replacement("mu + std * torch.randn_like(std)", "ws.gaussian_rsample(mu, logvar)"),
            script.Replacement(KL, "ws.gaussian_kl(mu, logvar).sum()"),
        ),
        marks=5,
    )


def written(folder: Path, steps: int = 10**6) -> Path:
    path = folder / "tiny.py"
    path.write_text(TEXT.replace("STEPS", str(steps)))
    return path


def test_a_patch_replaces_expressions_and_nothing_else(script: Any, program: Any) -> None:
    before, after = TEXT.splitlines(), script.patch(program, TEXT).splitlines()
    assert "import wakesleep_ext as ws" in after
    assert "    z = ws.gaussian_rsample(mu, logvar)" in after
    assert "    kl = ws.gaussian_kl(mu, logvar).sum()" in after
    assert len(set(before) - set(after)) == 2
    assert len(after) == len(before) + 1


def test_a_patch_that_does_not_match_names_program_and_expression(script: Any, program: Any, tmp_path: Path) -> None:
    path = written(tmp_path)
    path.write_text(path.read_text().replace("0.5 * torch.sum", "0.5 * torch.mean"))
    with pytest.raises(script.PatchError) as raised:
        script.measure(program, path, "digits", threads=1, turns=2)
    assert "tiny: " in str(raised.value)
    assert KL in str(raised.value)
    with pytest.raises(script.PatchError, match=r"tiny: .* once, found it twice: 'import torch'"):
        script.patch(program, TEXT + "import torch\n")


def test_both_versions_are_timed_and_their_losses_agree(script: Any, program: Any, tmp_path: Path) -> None:
    record = script.measure(program, written(tmp_path), "digits", threads=1, turns=3)
    assert record["loss_error"] < 1e-5
    assert record["checked_steps"] == script.CHECKED
    (step,) = record["steps"]
    assert step["step"] == "training step"
    assert min(step["original_ms"], step["patched_ms"], step["ratio"]) > 0
    first, second = record["mean_losses"]
    assert first != second  # from then on, each has noise of its own


@pytest.mark.thorough
def test_a_patch_that_changes_the_loss_is_found(script: Any, program: Any, tmp_path: Path) -> None:
    wrong = program.replacements[-1]._replace(new="2 * ws.gaussian_kl(mu, logvar).sum()")
    program = replace(program, replacements=(*program.replacements[:-1], wrong))
    with pytest.raises(script.DisagreementError, match="tiny: the losses of the first 20 steps differ by"):
        script.measure(program, written(tmp_path), "digits", threads=1, turns=2)


@pytest.mark.thorough
def test_a_program_that_ends_too_early_is_an_error(script: Any, program: Any, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="tiny: a version of the program stopped"):
        script.measure(program, written(tmp_path, steps=3), "digits", threads=1, turns=2)


def test_a_file_keeps_one_record_for_each_program(script: Any, tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    machine = {"threads": 1}
    for name, turns in (("pyro-vae", 1), ("pytorch-vae", 2), ("pyro-vae", 3)):
        script.keep(path, {"program": name, "validation": True, "machine": machine, "turns": turns})
    kept = script.json.loads(path.read_text())
    assert [(record["program"], record["turns"]) for record in kept] == [("pytorch-vae", 2), ("pyro-vae", 3)]


def test_the_page_is_up_to_date(script: Any) -> None:
    """If not, run `python benchmarks/other_peoples_code.py --page`."""
    text = script.PAGE.read_text()
    assert script.refresh(text, ROOT) == text
    for program in script.PROGRAMS:
        assert f"<!-- diff: {program.name} -->" in text
        assert f"other_peoples_code.py {program.name} " in text
