"""`wakesleep bench`: that it measures what it says, and says what it measured. How fast anything is, is not tested."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from wakesleep_ext import ops
from wakesleep_ext.benchmark import bench, command, measure, report
from wakesleep_ext.benchmark.suite import OPS, Candidate, Case, function, suite
from wakesleep_ext.usage import UsageError

OP = {op.name: op for op in OPS}
CPU = torch.device("cpu")


def small(case: Case) -> Case:
    """The same op, pass and dtypes, with few events and few samples."""
    return replace(case, shape=(*(3 for _ in case.shape[:-2]), 40, case.shape[-1]))


SMALL = list(dict.fromkeys(small(case) for case in suite()))


# ---- the suite -------------------------------------------------------------------------------------------------------


def test_the_suite_has_every_op_at_every_size() -> None:
    cases = list(suite())
    assert len(set(cases)) == len(cases)
    assert {case.op.name for case in cases} == set(ops.__all__)
    assert {case.op.name for case in suite(quick=True)} == set(ops.__all__)
    for op in OPS:
        of_op = [case for case in cases if case.op == op and case.dtype == torch.float32 and len(case.shape) == 2]
        assert {1, 20, 100, 1000, 10_000} <= {case.shape[0] for case in of_op}
        assert any(case.backward for case in of_op) == (op.name != "bernoulli_sample")
    assert any(case.shape == (50, 100, 784) and case.shape_of("x") == (100, 784) for case in cases)
    assert max(case.bytes for case in suite("cuda")) >= 256e6


def test_byte_counts_by_hand() -> None:
    case = Case(OP["bernoulli_log_prob"], (10, 784))
    assert case.bytes == 4 * (10 * 784 + 10 * 784 + 10)
    again = 4 * (10 + 10 * 784 + 10 * 784 + 10 * 784)  # upstream gradient, logits, x; gradient of the logits
    assert replace(case, backward=True).bytes == case.bytes + again

    case = Case(OP["bernoulli_log_prob"], (50, 10, 784), torch.bfloat16, torch.uint8)
    assert case.bytes == 2 * 50 * 10 * 784 + 10 * 784 + 4 * 50 * 10

    case = Case(OP["gaussian_rsample_log_prob"], (50, 10, 64), torch.float64)
    z, parameter, log_prob = 8 * 50 * 10 * 64, 8 * 10 * 64, 8 * 50 * 10
    assert case.bytes == 2 * parameter + z + log_prob
    assert replace(case, backward=True).bytes == case.bytes + z + log_prob + parameter + 2 * parameter


# ---- the candidates --------------------------------------------------------------------------------------------------


def result_of(case: Case, candidate: Candidate) -> tuple[Any, Any]:
    inputs = case.inputs(CPU)
    with torch.set_grad_enabled(case.backward):
        run = function(case, candidate)
        return inputs, measure._run(run, inputs) if case.backward else run(*inputs.arguments)


def outputs(case: Case, result: Any) -> tuple[Tensor, ...]:
    if case.backward:
        return result[0]
    return (result,) if isinstance(result, Tensor) else result


def check_result(case: Case, candidate: Candidate) -> None:
    inputs, result = result_of(case, candidate)
    for name, output in zip(case.op.outputs, outputs(case, result), strict=True):
        assert output.shape == case.shape_of(name)
        assert output.dtype == case.dtype_of(name)
    error = measure.max_error(case, inputs, result)
    if error is not None:
        assert error <= max(torch.finfo(case.dtype).eps, 1e-14) * (4 if case.dtype == torch.float32 else 1)
    if case.op.draws:
        check_draw(inputs.arguments, outputs(case, result)[0].double())


def check_draw(parameters: tuple[Tensor, ...], drawn: Tensor) -> None:
    """The draw has mean and variance of its distribution, within five standard errors and what half types round."""
    rounding = 1e-2
    if len(parameters) == 1:
        p = parameters[0].double().sigmoid()
        standard = (drawn - p) / (p * (1 - p)).sqrt().mean()
        assert set(drawn.unique().tolist()) == {0.0, 1.0}
    else:
        mu, logvar = (parameter.detach().double() for parameter in parameters)
        standard = (drawn.detach() - mu) / (0.5 * logvar).exp()
        assert abs(standard.square().mean().item() - 1) < 5 * math.sqrt(2 / drawn.numel()) + rounding
    assert abs(standard.mean().item()) < 5 / math.sqrt(drawn.numel()) + rounding


@pytest.mark.parametrize("candidate", ["fused", "eager", "distributions"])
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_candidates_compute_the_op(case: Case, candidate: Candidate) -> None:
    check_result(case, candidate)


def test_compiled_code_computes_the_op() -> None:
    check_result(Case(OP["gaussian_rsample_log_prob"], (3, 40, 64), backward=True), "compile")


@pytest.mark.parametrize("backward", [False, True])
def test_a_wrong_result_has_a_large_error(backward: bool) -> None:
    case = Case(OP["gaussian_rsample_log_prob"], (40, 64), backward=backward)
    inputs, result = result_of(case, "fused")
    right = measure.max_error(case, inputs, result)
    assert right is not None
    assert right < 1e-6
    wrong = result[1][1] if backward else result[1]  # the gradient of logvar, or log q
    with torch.no_grad():
        wrong[7] += 0.01 * wrong.abs().max()
    error = measure.max_error(case, inputs, result)
    assert error == pytest.approx(0.01, rel=0.2)


# ---- the method ------------------------------------------------------------------------------------------------------


def test_candidates_take_turns_and_sets_rotate() -> None:
    called: list[tuple[str, int]] = []
    calls: dict[Candidate, list[measure.Call]] = {
        "fused": [lambda turn=turn: called.append(("fused", turn)) for turn in range(3)],
        "eager": [lambda turn=turn: called.append(("eager", turn)) for turn in range(3)],
    }
    times = measure.interleave(calls, CPU, seconds=0)
    assert [len(times[candidate]) for candidate in ("fused", "eager")] == [5, 5]
    assert all(second == (first + 1) % 3 for (_, first), (_, second) in pairwise(called))
    changes = sum(first != second for (first, _), (second, _) in pairwise(called))
    assert changes == 7  # two while warming up; and one in each round, since the order is reversed


def test_working_sets_exceed_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "last_level_cache", lambda device: 2**22)
    case = Case(OP["bernoulli_log_prob"], (200, 784))
    inputs = measure._sets(case, CPU)
    memory = {tensor.data_ptr(): tensor.nbytes for one in inputs for tensor in one.arguments}
    assert len(memory) == 2 * len(inputs)
    assert sum(memory.values()) >= 0.99 * 2 * 2**22
    assert len(measure._sets(Case(OP["bernoulli_log_prob"], (20, 784)), CPU)) == 1


def test_median_and_interquartile_range() -> None:
    assert measure.median_and_spread([5e-6, 1e-6, 2e-6, 4e-6, 3e-6]) == pytest.approx((3.0, 2.0))


def test_peak_bytes() -> None:
    assert measure.peak_bytes(lambda: (torch.ones(1000) + torch.ones(1000)).sum(), CPU) == 3 * 4000
    logits, x = torch.zeros(100, 784), torch.zeros(100, 784)
    assert 400 <= measure.peak_bytes(lambda: ops.bernoulli_log_prob(logits, x), CPU) < logits.nbytes


def test_copies_tell_the_bandwidth() -> None:
    copy = measure.Copy(CPU)
    copy.seconds = [0.5, 0.25, 1.0]
    assert copy.bandwidth_gbs == pytest.approx(2 * copy.source.nbytes / 0.5 / 1e9)
    assert copy.source.nbytes >= 2 * measure.last_level_cache(CPU)


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def small_suite(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [case for case in SMALL if len(case.shape) == 2 and case.dtype == torch.float32 and not case.x_dtype]
    monkeypatch.setattr(command, "suite", lambda device, quick: cases)
    monkeypatch.setattr(command, "_SECONDS_PER_CASE", 0.0)
    monkeypatch.setattr(command, "keep_freed_memory", lambda: None)  # would outlast the test


@pytest.mark.usefixtures("small_suite")
def test_a_run_from_measurement_to_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = torch.get_num_threads()
    file, picture = tmp_path / "new" / "result.json", tmp_path / "speed.png"
    status = bench("cpu", 1, "gaussian_*", candidates=("fused", "eager"), json=file, plot=picture)
    out = capsys.readouterr().out
    assert status == 0
    assert torch.get_num_threads() == before

    result = json.loads(file.read_text())
    assert list(result) == ["machine", "copy_bandwidth_gbs", "records"]
    about = result["machine"]
    assert about["command"] == "wakesleep bench --device cpu --threads 1 --op 'gaussian_*' --candidates fused eager"
    assert about["threads"] == 1
    assert about["torch"] == torch.__version__
    assert about["simd"] == torch.backends.cpu.get_cpu_capability()
    assert {"processor", "cores", "gpu", "python", "cuda", "wakesleep_ext", "commit", "modified"} <= about.keys()
    assert result["copy_bandwidth_gbs"] > 0

    names = ["op", "pass", "dtype", "shape", "candidate", "median_us", "iqr_us", "max_error", "bytes"]
    for record in result["records"]:
        assert list(record) == [*names, "bandwidth_fraction", "peak_bytes"]
        assert record["op"].startswith("gaussian_")
        assert record["pass"] in ("forward", "forward+backward")
        assert record["dtype"] == "float32"
        assert record["shape"][-2] == 40
        assert record["median_us"] > 0
        assert record["iqr_us"] >= 0
        assert isinstance(record["bytes"], int)
        assert record["bandwidth_fraction"] is None  # so small a case is overhead
        assert record["peak_bytes"] > 0
        only_draws = (record["op"], record["pass"]) == ("gaussian_rsample", "forward")
        assert (record["max_error"] is None) == only_draws
    assert len({(r["op"], r["pass"], r["candidate"]) for r in result["records"]}) == 2 * 2 * 4

    assert out.count("| `gaussian_kl` ") == 2
    assert report.is_plot_of(picture, report.read(file))

    assert bench(show=file, compare=file) == 0
    assert capsys.readouterr().out == out


@pytest.mark.usefixtures("small_suite")
def test_torch_compile_is_left_out_where_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def uncompilable(*_: Any, **__: Any) -> Any:
        def fail(*_: Tensor) -> None:
            raise RuntimeError("No working C++ compiler found\nand much else")

        return fail

    monkeypatch.setattr(torch, "compile", uncompilable)
    file = tmp_path / "result.json"
    assert bench("cpu", 1, "gaussian_kl", candidates=("fused", "compile"), json=file) == 0
    assert {record["candidate"] for record in report.read(file)["records"]} == {"fused"}
    error = capsys.readouterr().err
    assert error.count("wakesleep: torch.compile left out: No working C++ compiler found\n") == 1
    assert "much else" not in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"op": "gaussian"}, "--op gaussian matches none of bernoulli_log_prob, bernoulli_sample, gaussian_rsample,"),
        ({"threads": 0}, "--threads of at least 1, got 0"),
        ({"candidates": ()}, "--candidates from fused, eager, distributions, compile, got none"),
        ({"compare": Path("nowhere.json")}, "nowhere.json: cannot be read"),
        ({"show": Path("nowhere.json")}, "nowhere.json: cannot be read"),
        pytest.param(
            {"device": "cuda"},
            "expected a GPU for --device cuda",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_mistakes_are_usage_errors(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        bench(**arguments)


def test_nothing_heavy_is_imported_before_it_is_needed() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import wakesleep_ext.benchmark; "
        "heavy = {'matplotlib', 'PIL', 'safetensors', 'sklearn', 'tqdm', 'tyro'}; "
        "print(*heavy & (set(sys.modules) - before))"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (process.returncode, process.stdout) == (0, "\n"), process.stderr


# ---- reports ---------------------------------------------------------------------------------------------------------


def record(candidate: str, median_us: float, iqr_us: float = 1.0, **others: Any) -> report.Record:
    usual = {
        "op": "gaussian_kl",
        "pass": "forward",
        "dtype": "float32",
        "shape": [100, 64],
        "candidate": candidate,
        "median_us": median_us,
        "iqr_us": iqr_us,
        "max_error": 1e-7,
        "bytes": 51600,
        "bandwidth_fraction": None,
        "peak_bytes": 400,
    }
    return usual | others  # type: ignore[return-value]


LARGE = {"shape": [10_000, 64], "bandwidth_fraction": 0.75}


def result(*records: report.Record) -> report.Result:
    about = {
        "device": "cpu",
        "processor": "Abacus 3000",
        "simd": "AVX2",
        "threads": 2,
        "gpu": None,
        "torch": "2.13.0",
        "commit": "0123456789abcdef",
        "modified": False,
        "command": "wakesleep bench --device cpu --threads 2",
    }
    return {"machine": about, "copy_bandwidth_gbs": 20.0, "records": list(records)}


RESULT = result(
    record("fused", 10.0),
    record("eager", 25.0, max_error=2e-7),
    record("compile", 8.0),
    record("fused", 1200.0, 120.0, **LARGE),
    record("eager", 6000.0, 60.0, **LARGE),
    record("fused", 9.0, dtype="bfloat16", max_error=None),
    record("eager", 27.0, dtype="bfloat16", max_error=None),
)

HEADLINE = """\
| op            | pass    | dtype   | shape       | time           | eager takes | compile takes | of copy speed | error             |
|---------------|---------|---------|-------------|----------------|-------------|---------------|---------------|-------------------|
| `gaussian_kl` | forward | float32 | 100 × 64    | 10.00 ± 0.50 µs | 2.5×        | 0.8×          | –             | 1.0e-07 (2.0e-07) |
| `gaussian_kl` | forward | float32 | 10,000 × 64 | 1.20 ± 0.06 ms | 5.0×        | –             | 75%           | 1.0e-07 (1.0e-07) |"""  # noqa: E501, RUF001


def cells(text: str) -> list[list[str]]:
    return [[cell.strip().strip("-") for cell in line.split("|")[1:-1]] for line in text.splitlines()]


def test_a_table_from_records() -> None:
    assert cells(report.table(report.headline(RESULT["records"]))) == cells(HEADLINE)
    lines = report.table(RESULT["records"]).splitlines()
    assert len(lines) == 2 + 3
    assert len({len(line) for line in lines}) == 1  # legible as it stands, too
    assert "| bfloat16 |" in lines[-1]


def test_results_are_read_as_written(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    report.write(path, RESULT)
    assert report.read(path) == RESULT
    assert path.read_text().count('"candidate"') == sum('"candidate"' in line for line in path.read_text().splitlines())
    assert list(tmp_path.iterdir()) == [path]


def other_records(records: Any) -> str:
    return json.dumps({**RESULT, "records": records})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "r.json: cannot be read"),
        ("[]", "r.json: expected a JSON object of machine, copy_bandwidth_gbs, records"),
        ('{"records": []}', "r.json: expected a JSON object of machine"),
        (other_records([{"op": "gaussian_kl"}]), "r.json: record 0: expected op, pass, dtype"),
    ],
)
def test_what_is_no_result_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(report.ResultError, match=message):
        report.read(path)


@pytest.fixture
def readme(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "results").mkdir()
    report.write(tmp_path / "results/abacus.json", RESULT)
    path = tmp_path / "README.md"
    path.write_text("# Speed\n<!-- speed table: results/abacus.json -->\nold\n<!-- end of speed table -->\nafter\n")
    return path


def test_a_readme_is_brought_up_to_date(readme: Path) -> None:
    assert bench(readme=readme) == 0
    text = readme.read_text()
    assert report.refresh(text, readme.parent) == text
    assert report.table(report.headline(RESULT["records"])) in text
    assert "Abacus 3000, AVX2, 2 threads; torch 2.13.0, commit 0123456; copies at 20.0 GB/s." in text
    assert "`wakesleep bench --device cpu --threads 2`" in text
    assert "old" not in text
    assert text.startswith("# Speed\n")
    assert text.endswith("\nafter\n")

    newer = result(record("fused", 5.0), *RESULT["records"][1:])
    report.write(readme.parent / "results/abacus.json", newer)
    assert report.refresh(text, readme.parent) != text


def test_a_picture_knows_its_result(tmp_path: Path) -> None:
    path = tmp_path / "speed.png"
    report.plot(path, RESULT)
    assert report.is_plot_of(path, RESULT)
    assert not report.is_plot_of(path, result(record("fused", 5.0)))


def test_a_regression_is_told_from_noise() -> None:
    old = result(record("fused", 100.0, 4.0), record("eager", 300.0, 12.0))
    slower = result(record("fused", 150.0, 4.0), record("eager", 300.0, 12.0))
    (line,) = report.regressions(old, slower)
    assert line.startswith(
        "gaussian_kl forward float32 [100, 64]: takes 1.50 times as long as before relative to eager"
    )
    assert report.regressions(slower, old) == []
    # within the spread, or on a machine that is slower for all
    assert report.regressions(old, result(record("fused", 108.0, 4.0), record("eager", 300.0, 12.0))) == []
    assert report.regressions(old, result(record("fused", 200.0, 8.0), record("eager", 600.0, 24.0))) == []
    # steadier figures show less
    steady = [result(record("fused", f, 0.0), record("eager", 300.0, 0.0)) for f in (100.0, 108.0)]
    assert len(report.regressions(*steady)) == 1
    # without eager, the time itself; a case that is new is no regression
    alone = result(record("fused", 150.0, 4.0), record("fused", 1.0, **LARGE))
    (line,) = report.regressions(result(record("fused", 100.0, 4.0)), alone)
    assert "1.50 times as long as before, noise" in line
    with pytest.raises(report.ResultError, match="no case of the fused ops in common"):
        report.regressions(old, result(record("fused", 1.0, **LARGE)))


def test_the_command_fails_on_a_regression(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    report.write(old, RESULT)
    report.write(new, result(record("fused", 20.0), *RESULT["records"][1:]))
    assert bench(show=new, compare=old) == 1
    assert "wakesleep: gaussian_kl forward float32 [100, 64]: takes 2.00 times" in capsys.readouterr().err
    assert bench(show=old, compare=new) == 0
    assert capsys.readouterr().err == ""

    report.write(new, {**RESULT, "machine": {**RESULT["machine"], "threads": 1}})
    assert bench(show=old, compare=new) == 0
    assert f"{new} was taken elsewhere: Abacus 3000, AVX2, 1 thread\n" in capsys.readouterr().err


def test_an_inaccurate_op_is_named() -> None:
    wrong = [record("fused", 1.0, max_error=1e-4), record("eager", 2.0, max_error=1e-7)]
    (line,) = report.inaccurate(wrong)
    assert line == "gaussian_kl forward float32 [100, 64]: error 1.0e-04, eager's 1.0e-07"
    assert report.inaccurate(RESULT["records"]) == []
