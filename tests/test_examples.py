"""Run every example for a few steps. The thorough tier runs each in a new process, including the one with Lightning."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from checkout import ROOT

pytestmark = pytest.mark.source_tree

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
NEEDS = {"pyro_vae": "pyro", "lightning_vae": "pytorch_lightning", "npe_sbi": "sbi"}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("default")
def test_an_example_runs(
    example: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if example.stem in NEEDS:
        pytest.importorskip(NEEDS[example.stem])
    monkeypatch.setattr(sys, "argv", [example.stem, "--steps", "2"])
    monkeypatch.chdir(tmp_path)  # sbi writes logs to the current folder
    runpy.run_path(str(example), run_name="__main__")
    assert "\nspeed: " in capsys.readouterr().out


@pytest.mark.thorough
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs_and_tells_its_speed(example: Path, tmp_path: Path) -> None:
    if example.stem in NEEDS:
        pytest.importorskip(NEEDS[example.stem])
    command = [sys.executable, str(example), "--steps", "20"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path, env=dict(os.environ))
    assert done.returncode == 0, done.stdout + done.stderr
    speed = re.search(r"^speed: (\d+\.\d+) times that of ", done.stdout, re.MULTILINE)
    assert speed
    assert float(speed[1]) > 0
