"""Test the parts of `make gpu-check` that need no GPU: the plan, the record of results, and refusals."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import checkout
import pytest
import torch
from checkout import ROOT

gpu_check = checkout.load("gpu_check", "scripts")

pytestmark = pytest.mark.source_tree


def _step(name: str, code: str, seconds: float = 60, required: bool = False) -> gpu_check.Step:
    return gpu_check.Step(name, (sys.executable, "-c", code), seconds, required=required)


def _refused(**environment: str) -> str:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts/gpu_check.py")],
        env={**{k: v for k, v in os.environ.items() if k != "OUT"}, "CUDA_VISIBLE_DEVICES": "", **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    return done.stderr


def test_one_clear_line_where_it_cannot_begin(tmp_path: Path) -> None:
    assert _refused() == "gpu-check: OUT is not set: it names the folder that the results are written to\n"
    refusal = _refused(OUT=str(tmp_path / "results"))
    assert refusal == f"gpu-check: torch {torch.__version__} finds no GPU\n"
    assert not (tmp_path / "results").exists()


def test_what_passes_and_what_does_not_is_recorded(tmp_path: Path) -> None:
    log = io.StringIO()
    plan = [
        _step("good", "print('fine')"),
        _step("bad", "print('broken'); raise SystemExit(3)"),
        _step("slow", "print('begun', flush=True); import time; time.sleep(60)", 2),
        gpu_check.Step("absent", ("no-such-tool",), 60),
    ]
    (outcomes,) = gpu_check.run_all([plan], log, 60)
    assert [(outcome.name, outcome.status) for outcome in outcomes] == [
        ("good", "passed"),
        ("bad", "failed"),
        ("slow", "timed out"),
        ("absent", "skipped"),
    ]
    assert outcomes[1].last_lines == ["broken"]
    assert outcomes[2].last_lines == ["begun"]
    assert outcomes[3].last_lines == ["no-such-tool: not found"]
    assert "fine" in log.getvalue()
    path = tmp_path / "record.json"
    gpu_check.write(path, [asdict(outcome) for outcome in outcomes])
    record = json.loads(path.read_text())
    assert [set(entry) for entry in record] == [{"name", "status", "seconds", "command", "last_lines"}] * 4
    assert list(tmp_path.iterdir()) == [path]


def test_nothing_follows_a_failed_build_or_a_spent_budget() -> None:
    broken = [[_step("build", "raise SystemExit(1)", required=True)], [_step("tests", "")]]
    _, (tests,) = gpu_check.run_all(broken, io.StringIO(), 60)
    assert (tests.status, tests.last_lines) == ("skipped", ["build failed"])
    ((late,),) = gpu_check.run_all([[_step("tests", "")]], io.StringIO(), 0)
    assert (late.status, late.last_lines) == ("skipped", ["no time was left"])


def test_a_step_that_is_too_slow_leaves_no_process(tmp_path: Path) -> None:
    """Its children would disturb the timings of later steps."""
    sleep = f"import pathlib, time; time.sleep(4); pathlib.Path({str(tmp_path / 'late')!r}).touch()"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {sleep!r}])"
    assert gpu_check.run(_step("parent", parent), io.StringIO(), 1).status == "timed out"
    time.sleep(4)
    assert not (tmp_path / "late").exists()


def test_the_plan(tmp_path: Path) -> None:
    """All files in the plan exist, and no step needs the network."""
    (build,), checks, *measurements = gpu_check.stages(sys.executable, tmp_path, tmp_path, "9.0")
    assert build.name == "build"
    assert build.required
    assert "--no-index" in build.command
    assert "compute-sanitizer racecheck" in [step.name for step in checks]
    assert [[step.name for step in stage] for stage in measurements] == [["benchmark of step"], ["benchmark of ops"]]
    for step in [build, *checks, *(step for stage in measurements for step in stage)]:
        assert step.cwd.is_dir()
        for part in step.command:
            assert not part.startswith(str(ROOT)) or Path(part).exists(), part


@pytest.mark.thorough
def test_the_build_step_builds(tmp_path: Path) -> None:
    """Builds as on a computer with a GPU, but for the CPU: the result imports from a separate folder."""
    step = gpu_check.stages(sys.executable, tmp_path / "site", tmp_path, "9.0")[0][0]
    environment = {**step.environment, "WAKESLEEP_FORCE_CUDA": "", "WAKESLEEP_FORCE_CPU": "1"}
    outcome = gpu_check.run(
        gpu_check.Step(step.name, step.command, 600, step.cwd, environment), io.StringIO(), seconds=600
    )
    assert outcome.status == "passed", outcome.last_lines
    found = subprocess.run(
        [sys.executable, "-c", "import wakesleep_ext; print(wakesleep_ext.__file__)"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.startswith(str(tmp_path / "site"))
