"""Test the parts of `make gpu-check` that need no GPU: the plan, the record of results, and refusals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import checkout
import pytest
import torch
from checkout import ROOT

from wakesleep_ext.benchmark import instruments, result
from wakesleep_ext.benchmark.measure import Rotation
from wakesleep_ext.benchmark.plan import Plan
from wakesleep_ext.benchmark.run import SUITES
from wakesleep_ext.benchmark.step_report import NET

gpu_check = checkout.load("gpu_check", "scripts")
gpu_alternatives = checkout.load("gpu_alternatives", "scripts")
gpu_benchmark = checkout.load("gpu_benchmark", "scripts")

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
    plan = [
        _step("good", "print('fine')"),
        _step("It's bad!", "print('broken'); raise SystemExit(3)"),
        _step("slow", "print('begun', flush=True); import time; time.sleep(60)", 2),
        gpu_check.Step("absent", ("no-such-tool",), 60),
    ]
    outcomes = {outcome.name: outcome for outcome in gpu_check.run_all([plan], tmp_path, 60)}
    assert {name: (outcome.status, outcome.last_lines) for name, outcome in outcomes.items()} == {
        "good": ("passed", ["fine"]),
        "It's bad!": ("failed", ["broken"]),
        "slow": ("timed out", ["begun"]),
        "absent": ("skipped", ["no-such-tool: not found"]),
    }
    logs = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert logs == {"good.log": "fine\n", "it-s-bad-.log": "broken\n", "slow.log": "begun\n"}


def test_the_record_is_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    outcome = gpu_check.Outcome("good", "passed", 0.1, "true", [])
    gpu_check.write(path, [asdict(outcome)])
    assert [set(entry) for entry in json.loads(path.read_text())] == [
        {"name", "status", "seconds", "command", "last_lines"}
    ]
    assert list(tmp_path.iterdir()) == [path]


def test_a_run_that_is_cut_off_has_yielded_what_has_ended(tmp_path: Path) -> None:
    """A step's outcome does not wait for the other steps of its stage, and a log grows as the step prints."""
    slow = _step("slow", "print('begun', flush=True); import time; time.sleep(3)")
    outcomes = gpu_check.run_all([[slow, _step("good", "")]], tmp_path, 60)
    assert next(outcomes).name == "good"
    deadline = time.monotonic() + 60
    while (tmp_path / "slow.log").read_text() != "begun\n":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert next(outcomes).name == "slow"


def test_nothing_follows_a_failed_build_or_a_spent_budget(tmp_path: Path) -> None:
    broken = [[_step("build", "raise SystemExit(1)", required=True)], [_step("tests", "")]]
    _, tests = gpu_check.run_all(broken, tmp_path, 60)
    assert (tests.status, tests.last_lines) == ("skipped", ["build failed"])
    (late,) = gpu_check.run_all([[_step("tests", "")]], tmp_path, 0)
    assert (late.status, late.last_lines) == ("skipped", ["no time was left"])


def test_a_benchmark_is_told_to_end_before_its_time_limit(tmp_path: Path) -> None:
    command = (sys.executable, "-c", "import sys; print(sys.argv[1:])")
    step = gpu_check.Step("measure", command, 600, measures=True)
    assert gpu_check.run(step, tmp_path, 100).last_lines == ["['--seconds', '70']"]


def test_a_step_that_is_too_slow_leaves_no_process(tmp_path: Path) -> None:
    """Its children would disturb the timings of later steps."""
    sleep = f"import pathlib, time; time.sleep(4); pathlib.Path({str(tmp_path / 'late')!r}).touch()"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {sleep!r}])"
    assert gpu_check.run(_step("parent", parent), tmp_path, 1).status == "timed out"
    time.sleep(4)
    assert not (tmp_path / "late").exists()


def test_the_plan(tmp_path: Path) -> None:
    """All files in the plan exist, no step needs the network, and a step that measures runs alone."""
    plan = gpu_check.stages(sys.executable, tmp_path, tmp_path, "9.0")
    assert [stage[0].name for stage in plan] == [
        "build",
        "alternatives of a step",
        "every operator has a CUDA kernel",
        "benchmark of step",
        "compute-sanitizer memcheck",
        "benchmark of ops",
    ]
    (build,) = plan[0]
    assert build.required
    assert "--no-index" in build.command
    every = [step for stage in plan for step in stage]
    assert len({step.name for step in every}) == len(every)
    for step in every:
        assert step.cwd.is_dir()
        for part in step.command:
            assert not part.startswith(str(ROOT)) or Path(part).exists(), part
    assert all(len(stage) == 1 for stage in plan if any("--json" in step.command for step in stage))


# ---- what the plan measures ------------------------------------------------------------------------------------------


def test_alternatives_that_change_nothing_are_left_out() -> None:
    def chosen(batch: int, num_samples: int) -> list[str]:
        return list(gpu_alternatives.AlternativeCase(NET, batch, num_samples, "cuda").candidates)

    always, replays = ["fused", "no early launches"], ["4 steps in a replay", "16 steps in a replay"]
    assert chosen(20, 1) == [*always, "bfloat16", *replays, "small batches of 0"]
    always += ["tf32", "bfloat16"]
    assert chosen(100, 5) == [*always, *replays, "small batches of 0", "small batches of 512"]
    assert chosen(100, 50) == [*always, "small batches of 0", "chunks of 8 MiB"]
    assert chosen(1000, 50) == [*always, *(f"chunks of {mib} MiB" for mib in (8, 16, 32, 64, 96))]


def test_alternatives_are_measured_and_written_after_each_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a CPU, too, but TF32 is left out. Every block of calls runs with its own settings, which then end."""
    monkeypatch.setattr(gpu_alternatives, "NET", (12, 6, 5, 3))
    monkeypatch.setattr(gpu_alternatives.AlternativeCase, "block_seconds", 1e-4)
    monkeypatch.setattr(instruments, "last_level_cache", lambda device: 0)  # makes copies short
    written: list[int] = []
    monkeypatch.setattr(gpu_alternatives.result, "write", lambda path, figures: written.append(len(figures["records"])))
    with pytest.warns(UserWarning, match="tf32 left out: Step: expected precision"):
        gpu_alternatives.main(["20x1", "100x5", "--device", "cpu", "--seconds", "0", "--json", str(tmp_path / "x")])
    assert written == [6, 6 + 7]
    assert "small batches of 512" in capsys.readouterr().out


def test_a_block_of_calls_runs_with_its_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers: dict[str, int | None] = {}
    for name in ("small_batch", "chunk_mib", "dependent_launch"):
        monkeypatch.setattr(gpu_alternatives._C, f"set_{name}", partial(numbers.__setitem__, name))
    seen: list[dict[str, int | None]] = []
    settings = gpu_alternatives.Settings(small_batch=64, dependent_launch=0, steps=4)
    rotation = Rotation(1, torch.device("cpu"))
    alternative = gpu_alternatives.Alternative([lambda: seen.append(dict(numbers))], rotation, settings)
    alternative.first()
    alternative.seconds(7)
    assert seen == [{"small_batch": 64, "chunk_mib": None, "dependent_launch": 0}] * (1 + 2)
    assert set(numbers.values()) == {None}


def test_a_benchmark_writes_each_case_and_ends_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its records are in the order of the suite, though it measures one case of each op first."""
    suite = [case for case in SUITES["ops"].cases("cpu") if case.labels["op"].startswith("gaussian_kl")]
    machine = result.machine(torch.device("cpu"), 1, "a command")
    measured: list[Any] = []

    def run(plan: Plan, order: Callable[[Sequence[Any]], Sequence[Any]]) -> Iterator[result.Result]:
        for case in order(suite):
            measured.append(case)
            numbers = {"median_us": 1.0, "iqr_us": 0.0, "max_error": None, "bytes": 1, "bandwidth_fraction": None}
            records = [{**one.labels, "candidate": "fused", **numbers, "peak_bytes": 1} for one in measured]
            yield {"suite": plan.suite, "machine": machine, "copy_bandwidth_gbs": 1.0, "records": records}

    monkeypatch.setattr(gpu_benchmark, "run", run)
    path = tmp_path / "ops.json"
    gpu_benchmark.measure(Plan("ops"), 0, path)
    assert len(measured) == len(result.read(path)["records"]) == 1
    measured.clear()
    gpu_benchmark.measure(Plan("ops"), 60, path)
    assert measured != suite
    titles = [result.title(record) for record in result.read(path)["records"]]
    assert titles == [result.title(case.labels) for case in suite]


@pytest.mark.thorough
def test_the_build_step_builds(tmp_path: Path) -> None:
    """Builds as on a computer with a GPU, but for the CPU: the result imports from a separate folder."""
    step = gpu_check.stages(sys.executable, tmp_path / "site", tmp_path, "9.0")[0][0]
    environment = {**step.environment, "WAKESLEEP_FORCE_CUDA": "", "WAKESLEEP_FORCE_CPU": "1"}
    outcome = gpu_check.run(gpu_check.Step(step.name, step.command, 600, step.cwd, environment), tmp_path, seconds=600)
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
