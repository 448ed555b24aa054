"""Check that `wakesleep bench` measures and reports correctly. Speed itself is not tested."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import checkout
import pytest
import torch
from cases import thorough
from checkout import ROOT
from PIL import Image
from torch import Tensor

from wakesleep_ext import cli, ops
from wakesleep_ext._op_table import OPS
from wakesleep_ext.benchmark import goals, instruments, losses, measure, report, run
from wakesleep_ext.benchmark import result as results
from wakesleep_ext.benchmark.command import bench
from wakesleep_ext.benchmark.op_case import OpCase
from wakesleep_ext.benchmark.op_sizes import MEASURED, cases
from wakesleep_ext.benchmark.op_suite import GOALS, SUITE, headline, sections
from wakesleep_ext.benchmark.plan import Plan

CPU = torch.device("cpu")


def small(case: OpCase) -> OpCase:
    """Return the same op, pass and dtypes with few events and few samples."""
    if case.op.name == "adam_":
        return case  # the tensors of two networks
    widths = len(case.measured.widths[0])
    *samples, _ = case.shape[:-widths]
    return replace(case, shape=(*(3 for _ in samples), 40, *case.shape[-widths:]), compiles=True)


SMALL = list(dict.fromkeys(small(case) for case in cases()))


# ---- the suite -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", GOALS)
def test_the_suite_has_every_op_and_every_gradient(device: str) -> None:
    every = cases(device)
    assert len(set(every)) == len(every)
    assert {case.op.name for case in every} == set(OPS) == set(ops.__all__)
    for measured in MEASURED.values():
        of_op = [case for case in every if case.measured is measured]
        assert {case.backward for case in of_op} == ({False, True} if measured.op.is_differentiable else {False})
        assert set(measured.gradients) <= set(measured.op.inputs)
        quick = [case for case in cases(device, quick=True) if case.measured is measured]
        assert quick == [replace(of_op[0], backward=measured.op.is_differentiable)]
    assert any(case.shape == (50, 100, 784) and case.shape_of("x") == (100, 784) for case in every)
    assert max(case.bytes for case in every) >= {"cpu": 60e6, "cuda": 256e6}[device]


def test_the_suite_has_every_size() -> None:
    every = [case for case in cases() if case.op.name != "adam_" and case.measured.ours is ops]
    for measured in {case.measured: None for case in every}:
        of_op = [case for case in every if case.measured is measured]
        rows = {measured.num_events(case.shape) for case in of_op}
        assert {1, 20, 1000} <= rows
        assert not rows.isdisjoint({100, 128})
        assert {case.shape[-len(measured.widths[0]) :] for case in of_op} == set(measured.widths)
        half = [case for case in of_op if case.dtype == torch.bfloat16]
        assert half or measured.op.name in ("binarize", "gaussian_parameters")
        assert any(case.autocast for case in of_op) == measured.multiplies
        compiled = any("compile" in case.candidates and measured.num_events(case.shape) >= 100 for case in of_op)
        assert compiled or measured.label in ("gaussian_parameters", "linear")  # nothing to fuse
    for op, widths in (("gaussian_kl", ((64,), (50,))), ("bernoulli_sample", ((784,), (785,)))):
        assert set(MEASURED[op].widths) == set(widths)
    assert {case.shape_of("weight") for case in every if case.measured.label == "linear, tanh"} == {
        (256, 5),
        (200, 50),
        (200, 200),
        (200, 784),
        (784, 200),
    }
    observed = {case.dtype_of("x") for case in every if "x" in case.op.inputs and case.dtype == torch.float32}
    assert observed == {torch.float32, torch.uint8}
    assert all("compile" in case.candidates for case in cases("cuda") if "compile" in case.measured.baselines)


def test_byte_counts_by_hand() -> None:
    case = OpCase(MEASURED["bernoulli_log_prob"], (10, 784))
    assert case.bytes == 4 * (10 * 784 + 10 * 784 + 10)
    again = 4 * (10 + 10 * 784 + 10 * 784 + 10 * 784)  # upstream gradient, logits, x; gradient of the logits
    assert replace(case, backward=True).bytes == case.bytes + again

    case = OpCase(MEASURED["bernoulli_log_prob"], (50, 10, 784), torch.bfloat16, torch.uint8)
    assert case.bytes == 2 * 50 * 10 * 784 + 10 * 784 + 4 * 50 * 10

    case = OpCase(MEASURED["gaussian_rsample_log_prob"], (50, 10, 64), torch.float64)
    z, parameter, log_prob = 8 * 50 * 10 * 64, 8 * 10 * 64, 8 * 50 * 10
    assert case.bytes == 2 * parameter + z + log_prob
    assert replace(case, backward=True).bytes == case.bytes + z + log_prob + parameter + 2 * parameter

    case = OpCase(MEASURED["linear"], (10, 50, 200), torch.bfloat16, autocast=True)
    h, weight, bias, y = 4 * 10 * 50, 4 * 50 * 200, 4 * 200, 2 * 10 * 200
    assert case.bytes == h + weight + bias + y
    case = OpCase(MEASURED["adam_"], (2124, 200))
    assert case.bytes == 7 * 4 * 2124 * 200  # reads p, g, m and v; writes p, m and v


# ---- the candidates --------------------------------------------------------------------------------------------------


def result_of(case: OpCase, candidate: str) -> tuple[Any, Any]:
    inputs = case.inputs(CPU)
    (call,) = case.calls(candidate, [inputs])
    return inputs, call()


def outputs(case: OpCase, result: Any) -> tuple[Tensor, ...]:
    if case.backward:
        return result[0]
    return (result,) if isinstance(result, Tensor) else result


def check_result(case: OpCase, candidate: str) -> None:
    inputs, result = result_of(case, candidate)
    for name, output in zip(case.op.outputs, outputs(case, result), strict=True):
        assert output.shape == case.shape_of(name)
        assert output.dtype == case.dtype_of(name)
    error = case.error(candidate, inputs, result)
    if error is not None:
        # densities of half types are computed in float32; a GEMM sums up to 785 products
        roundings = (4 if case.dtype == torch.float32 else 1) * (4 if case.measured.multiplies else 1)
        assert error <= torch.finfo(case.dtype).eps * roundings
    if case.op.draws:
        check_draw(case, inputs.arguments, outputs(case, result)[0].double())


def check_draw(case: OpCase, arguments: tuple[Tensor, ...], drawn: Tensor) -> None:
    """Check mean and variance of a draw, within five standard errors and the rounding of half types."""
    rounding = 1e-2
    if case.op.probability:
        p = case.op.probability(*(argument.double() for argument in arguments))
        standard = (drawn - p) / (p * (1 - p)).sqrt().mean()
        assert set(drawn.unique().tolist()) == {0.0, 1.0}
    else:
        mu, logvar = case.op.moments(*(argument.detach().double() for argument in arguments))
        standard = (drawn.detach() - mu) / (0.5 * logvar).exp()
        assert abs(standard.square().mean().item() - 1) < 5 * math.sqrt(2 / drawn.numel()) + rounding
    assert abs(standard.mean().item()) < 5 / math.sqrt(drawn.numel()) + rounding


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_candidates_compute_the_op(case: OpCase) -> None:
    for candidate in case.candidates:
        if candidate != "compile":
            check_result(case, candidate)


def test_each_candidate_updates_tensors_of_its_own() -> None:
    case = OpCase(MEASURED["adam_"], (2124, 200))
    inputs = case.inputs(CPU)
    before = [argument.clone() for argument in inputs.arguments]
    for candidate in case.candidates:
        (call,) = case.calls(candidate, [inputs])
        first = case.error(candidate, inputs, call())
        assert first is not None
        assert first < 1e-6
        assert all(torch.equal(a, b) for a, b in zip(before, inputs.arguments, strict=True))
        for _ in range(100):
            parameters, *_ = call()
        moved = (parameters - before[0]).abs().mean()
        assert 0.1 < moved < 1  # less than the learning rate, 0.01, in each step
        later = case.error(candidate, inputs, call())
        assert later is not None
        assert later > 0.1


def compile_with(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make torch.compile use this backend. aot_eager takes seconds less than inductor."""
    if backend != "inductor":
        usual = torch.compile
        monkeypatch.setattr(torch, "compile", lambda f, options, **rest: usual(f, backend=backend, **rest))


@pytest.mark.parametrize("backend", ["aot_eager", thorough("inductor")])
def test_compiled_code_computes_the_op(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_with(backend, monkeypatch)
    check_result(OpCase(MEASURED["gaussian_rsample_log_prob"], (3, 40, 64)), "compile")


@pytest.mark.parametrize("backward", [False, True])
def test_a_wrong_result_has_a_large_error(backward: bool) -> None:
    case = OpCase(MEASURED["gaussian_rsample_log_prob"], (40, 64), backward=backward)
    inputs, result = result_of(case, "fused")
    right = case.error("fused", inputs, result)
    assert right is not None
    assert right < 1e-6
    wrong = result[1][1] if backward else result[1]  # the gradient of logvar, or log q
    with torch.no_grad():
        wrong[7] += 0.01 * wrong.abs().max()
    error = case.error("fused", inputs, result)
    assert error == pytest.approx(0.01, rel=0.2)


# ---- the method ------------------------------------------------------------------------------------------------------


def test_candidates_take_turns_and_sets_rotate() -> None:
    called: list[tuple[str, int]] = []
    calls: dict[str, list[measure.Call]] = {
        "fused": [lambda turn=turn: called.append(("fused", turn)) for turn in range(3)],
        "eager": [lambda turn=turn: called.append(("eager", turn)) for turn in range(3)],
    }
    rotation = measure.Rotation(3, CPU)
    implementations = {candidate: measure.Here(own, rotation) for candidate, own in calls.items()}
    times = measure.interleave(implementations, 3, blocks=0, block_seconds=1e-2)
    assert [len(times[candidate]) for candidate in ("fused", "eager")] == [5, 5]
    assert all(second == (first + 1) % 3 for (_, first), (_, second) in pairwise(called))
    changes = sum(first != second for (first, _), (second, _) in pairwise(called))
    assert changes == 7  # two while warming up; and one in each round, since the order is reversed


def test_working_sets_exceed_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "last_level_cache", lambda device: 2**22)
    case = OpCase(MEASURED["bernoulli_log_prob"], (700, 784))
    inputs = measure.working_sets(case, CPU)
    memory = {tensor.data_ptr(): tensor.nbytes for one in inputs for tensor in one.arguments}
    assert len(memory) == 2 * len(inputs)
    assert sum(memory.values()) >= 0.99 * 2 * 2**22
    assert len(measure.working_sets(OpCase(MEASURED["bernoulli_log_prob"], (100, 784)), CPU)) == 1


def test_forward_and_backward_are_listed_together() -> None:
    for device in ("cpu", "cuda"):
        shapes = {case: measure.bandwidth_bound(case, torch.device(device)) for case in cases(device) if case.backward}
        for case, beyond in shapes.items():
            assert measure.bandwidth_bound(replace(case, backward=False), torch.device(device)) == beyond


def test_median_and_interquartile_range() -> None:
    assert instruments.median_and_spread([5e-6, 1e-6, 2e-6, 4e-6, 3e-6]) == pytest.approx((3.0, 2.0))


def test_peak_bytes() -> None:
    assert instruments.peak_bytes(lambda: (torch.ones(1000) + torch.ones(1000)).sum(), CPU) == 3 * 4000
    logits, x = torch.zeros(100, 784), torch.zeros(100, 784)
    assert 400 <= instruments.peak_bytes(lambda: ops.bernoulli_log_prob(logits, x), CPU) < logits.nbytes


def test_launches_are_the_kernels_that_the_profiler_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    assert instruments.launches(lambda: None, CPU) is None
    events = [{"cat": "kernel"}, {"cat": "gpu_memcpy"}, {"cat": "kernel"}, {"name": "[memory]"}]
    monkeypatch.setattr(instruments, "trace", lambda call, activity: events)
    assert instruments.launches(lambda: None, torch.device("cuda")) == 2
    monkeypatch.setattr(instruments, "trace", lambda call, activity: events[1::2][:1])
    assert instruments.launches(lambda: None, torch.device("cuda")) is None  # where the profiler has no access


def test_copies_tell_the_bandwidth() -> None:
    copy = instruments.Copy(CPU)
    copy.seconds = [0.5, 0.25, 1.0]
    assert copy.bandwidth_gbs == pytest.approx(2 * copy.source.nbytes / 0.5 / 1e9)
    assert copy.source.nbytes >= 2 * instruments.last_level_cache(CPU)


def test_a_gpu_is_timed_by_its_own_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            happened.append("record")

        def synchronize(self) -> None:
            happened.append("synchronize")

        def elapsed_time(self, end: Event) -> float:
            assert end is not self
            return 2.5  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: happened.append("synchronize"))
    assert instruments.duration(lambda: happened.append("call"), torch.device("cuda")) == 2.5e-3
    assert happened == ["synchronize", "record", "call", "record", "synchronize"]


class Addition(measure.Case[float]):
    """A case unrelated to the ops, with only what a suite must provide."""

    candidates = ("fused", "eager", "broken", "astray")
    labels: ClassVar = {"op": "addition", "pass": "forward", "dtype": "float32", "shape": [1]}
    bytes = 3 * 2**20
    footprint = 2**25

    def inputs(self, device: torch.device) -> float:
        return 1.0

    def calls(self, candidate: str, inputs: Sequence[float]) -> list[measure.Call]:
        if candidate == "broken":
            raise RuntimeError("no working C++ compiler\nand much else")
        return [partial(sum, [one, math.nan if candidate == "astray" else 2.0]) for one in inputs]

    def error(self, candidate: str, inputs: float, result: float) -> float:
        return abs(result - 3.0)


def test_any_case_can_be_measured() -> None:
    said: list[str] = []
    candidates = ["fused", "compile", "broken", "eager"]
    ((bandwidth, records),) = measure.take([Addition()], candidates, CPU, 0, said.append)
    assert [record["candidate"] for record in records] == ["fused", "eager"]
    assert said == ["broken left out: no working C++ compiler"]
    for record in records:
        assert list(record) == list(results.Record.__annotations__)
        assert (record["op"], record["max_error"], record["bytes"]) == ("addition", 0.0, 3 * 2**20)
        assert record["bandwidth_fraction"] == pytest.approx(3 * 2**20 / record["median_us"] / 1e3 / bandwidth)


def test_cases_without_the_chosen_candidates_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[OpCase] = []
    monkeypatch.setattr(run, "take", lambda cases, *rest: chosen.extend(cases) or [(1.0, [])])
    monkeypatch.setattr(run, "keep_freed_memory", lambda: None)  # would outlast the test
    list(run.run(Plan(device="cpu", threads=1, candidates=("torch fused",))))
    assert [case.op.name for case in chosen] == ["adam_"]


def test_what_is_ours_is_never_left_out() -> None:
    class Broken(Addition):
        candidates = ("broken", "eager")

    with pytest.raises(RuntimeError, match="no working C"):
        measure.measure(Broken(), ["broken"], CPU, 0.0, pytest.fail)
    with pytest.raises(ArithmeticError, match=r"astray gives NaN or infinity: addition forward float32 \[1\]"):
        measure.measure(Addition(), ["fused", "astray"], CPU, 0.0, pytest.fail)


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def small_suite(monkeypatch: pytest.MonkeyPatch) -> None:
    few = [case for case in SMALL if case.shape[1:] == (64,) and case.dtype == torch.float32]
    monkeypatch.setitem(run.SUITES, "ops", replace(SUITE, cases=lambda device, quick: few))
    monkeypatch.setattr(run, "_BLOCKS_PER_CASE", {"cpu": 0})
    monkeypatch.setattr(run, "keep_freed_memory", lambda: None)  # would outlast the test


@pytest.mark.usefixtures("small_suite")
def test_a_run_from_measurement_to_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = torch.get_num_threads()
    file, picture = tmp_path / "new" / "result.json", tmp_path / "speed.png"
    options = "--device cpu --threads 1 --op 'gaussian_[kl]*' --candidates fused eager"
    status = cli.main(["bench", *shlex.split(options), "--json", str(file), "--plot", str(picture)])
    out, err = capsys.readouterr()
    assert status == 0
    assert "8/8" in err  # a progress bar
    assert torch.get_num_threads() == before

    written = json.loads(file.read_text())
    assert list(written) == ["suite", "machine", "copy_bandwidth_gbs", "records"]
    assert written["suite"] == "ops"
    about = written["machine"]
    assert list(about) == list(results.Machine.__annotations__)
    assert about["command"] == f"wakesleep bench {options}"
    assert about["threads"] == 1
    assert about["torch"] == torch.__version__
    assert about["simd"] == torch.backends.cpu.get_cpu_capability()
    assert written["copy_bandwidth_gbs"] > 0
    for each in written["records"]:
        assert list(each) == list(results.Record.__annotations__)
        assert each["median_us"] > 0
        assert each["iqr_us"] >= 0
        assert each["max_error"] < 1e-6
        assert each["bandwidth_fraction"] is None  # so small a case is overhead
        assert each["peak_bytes"] > 0
        assert each["launches"] is None  # on a CPU
    assert [(r["op"], r["pass"], r["shape"], r["candidate"]) for r in written["records"]] == [
        (op, backward, [40, 64], candidate)
        for op in ("gaussian_log_prob", "gaussian_log_prob_sum", "gaussian_kl", "gaussian_kl_between")
        for backward in ("forward", "forward+backward")
        for candidate in ("fused", "eager")
    ]

    assert out.count("| `gaussian_kl` ") == 2
    assert shows(picture, results.read(file))
    assert cli.main(["bench", "--show", str(file), "--compare", str(file)]) == 0
    assert capsys.readouterr().out == out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--op gaussian", "expected --op to match one of bernoulli_log_prob, bernoulli_sample, binarize,"),
        ("--threads 0", "expected --threads of at least 1, got 0"),
        (
            "--candidates fused jax",
            "expected --candidates to be among fused, eager, distributions, compile, torch fused, got jax",
        ),
        ("--compare nowhere.json", "nowhere.json: cannot be read"),
        ("--show nowhere.json", "nowhere.json: cannot be read"),
        ("--plot speed.jpg", "expected --plot to end in .png, got speed.jpg"),
        ("--json .", "expected --json to name a file that can be written, got ."),
        pytest.param(
            "--device cuda",
            "expected a GPU for --device cuda",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_mistakes_are_answered_in_one_line(
    arguments: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["bench", *arguments.split()]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"wakesleep: {message}")
    assert not list(tmp_path.iterdir())


# ---- results and reports ---------------------------------------------------------------------------------------------


def record(candidate: str, median_us: float, iqr_us: float = 1.0, **others: Any) -> results.Record:
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


LARGE = {"shape": [10_000, 64], "bandwidth_fraction": 0.75, "peak_bytes": 1_200_000}


def result(*records: results.Record, **about: Any) -> results.Result:
    machine = {
        "device": "cpu",
        "processor": "Abacus 3000",
        "simd": "AVX2",
        "cores": 2,
        "threads": 2,
        "gpu": None,
        "python": "3.11.7",
        "torch": "2.13.0",
        "cuda": None,
        "wakesleep_ext": "0.1.0",
        "commit": "0123456789abcdef",
        "modified": False,
        "command": "wakesleep bench --device cpu --threads 2",
    }
    return {"machine": machine | about, "copy_bandwidth_gbs": 20.0, "records": list(records)}  # type: ignore[typeddict-item]


RESULT = result(
    record("fused", 10.0),
    record("eager", 25.0, max_error=2e-7, peak_bytes=99_960),
    record("compile", 8.0),
    record("fused", 1200.0, 120.0, **LARGE),
    record("eager", 6000.0, 60.0, **LARGE),
    record("fused", 9.0, dtype="bfloat16", max_error=None),
    record("eager", 27.0, dtype="bfloat16", max_error=None),
)

TEXT = """\
Beyond the cache:

| op            | pass    | dtype   | shape       | time           | eager takes | of copy speed | memory (eager)  | error (eager) |
|---------------|---------|---------|-------------|----------------|-------------|---------------|-----------------|---------------|
| `gaussian_kl` | forward | float32 | 10,000 × 64 | 1.20 ± 0.06 ms | 5.0×        | 75%           | 1.2 MB (1.2 MB) | 1e-07 (1e-07) |

Within the cache, where overhead counts:

| op            | pass    | dtype    | shape    | time            | eager takes | compile takes | of copy speed | memory (eager)   | error (eager) |
|---------------|---------|----------|----------|-----------------|-------------|---------------|---------------|------------------|---------------|
| `gaussian_kl` | forward | float32  | 100 × 64 | 10.00 ± 0.50 µs | 2.5×        | 0.8×          | –             | 400 B (100.0 kB) | 1e-07 (2e-07) |
| `gaussian_kl` | forward | bfloat16 | 100 × 64 | 9.00 ± 0.50 µs  | 3.0×        | –             | –             | 400 B (400 B)  | – (–)         |

A baseline is faster in 1 of 4 comparisons:

- `gaussian_kl` forward, compile: 0.80× at float32 100 × 64, 1 of 1 cases.

Abacus 3000, AVX2, 2 threads; torch 2.13.0, commit 0123456; copies at 20.0 GB/s. Measured by `wakesleep bench --device cpu --threads 2`."""  # noqa: E501, RUF001


def cells(text: str) -> list[list[str]]:
    return [[cell.strip().strip("-") for cell in line.split("|")] for line in text.splitlines()]


def test_a_result_in_words() -> None:
    text = report.text(RESULT, SUITE)
    assert cells(text) == cells(TEXT)
    for table in text.split("\n\n")[1:4:2]:
        assert len({len(line) for line in table.splitlines()}) == 1  # legible as it stands, too


def test_a_narrow_report_has_a_table_for_each_pass_and_dtype() -> None:
    parts = report.text(RESULT, SUITE, narrow=True).split("\n\n")
    assert [part for part in parts if part.endswith(":")] == [
        "Beyond the cache, forward, float32:",
        "Within the cache, where overhead counts, forward, float32:",
        "A baseline is faster in 1 of 4 comparisons:",
    ]
    assert cells(parts[1])[0] == ["", "op", "shape", "time", "eager", "of copy", ""]
    assert cells(parts[3])[2] == ["", "`gaussian_kl`", "100 × 64", "10.00 µs", "2.5×", "0.8×", ""]  # noqa: RUF001
    assert max(len(line) for part in parts for line in part.splitlines()) <= 100
    assert [part.split() for part in parts[-3:]] == [part.split() for part in TEXT.split("\n\n")[-3:]]


def test_every_loss_is_listed() -> None:
    def kl(rows: int, eager: float, compiled: float, **others: Any) -> list[results.Record]:
        labels = {"shape": [rows, 64], "bytes": 516 * rows, **others}
        return [record(name, t, **labels) for name, t in (("fused", 100.0), ("eager", eager), ("compile", compiled))]

    records = [
        *kl(1000, 200.0, 90.0),
        *kl(20, 99.6, 70.4),
        *kl(100, 99.4, 100.0),
        *kl(100, 50.0, 60.0, dtype="float16"),
    ]
    backward = kl(1, 80.0, 100.0, **{"pass": "forward+backward"})
    assert losses.slower([*records, *backward], SUITE) == [
        "A baseline is faster in 6 of 10 comparisons:",
        "- `gaussian_kl` forward, eager: 0.50× to 0.99× at float32 100 × 64 to float16 100 × 64, 2 of 4 cases.\n"  # noqa: RUF001
        "- `gaussian_kl` forward, compile: 0.60× to 0.90× at float32 20 × 64 to float32 1,000 × 64, 3 of 4 cases.\n"  # noqa: RUF001
        "- `gaussian_kl` forward+backward, eager: 0.80× at float32 1 × 64, 1 of 1 cases.",  # noqa: RUF001
    ]
    assert losses.count([*records, *backward], SUITE) == (6, 10)
    faster = [record("fused", 1.0), record("eager", 2.0), record("compile", 3.0)]
    assert losses.slower(faster, SUITE) == ["A baseline is faster in none of 2 comparisons."]
    assert losses.slower(faster[:1], SUITE) == []


def test_the_headline_is_float32_small_and_large() -> None:
    odd = record("fused", 1.0, shape=[10_000, 50], bandwidth_fraction=0.5)
    between = record("fused", 1.0, shape=[1000, 64])
    assert headline([*RESULT["records"], odd, between]) == RESULT["records"][:5]
    layers = [record("fused", 1.0, op="linear", shape=[rows, 784, 200]) for rows in (20, 128, 1000)]
    other = record("fused", 1.0, op="linear", shape=[1000, 200, 784])
    unknown = record("fused", 1.0, op="retired", shape=[100, 64])
    assert headline([*layers, other, unknown]) == layers[1:]


def test_layers_and_optimizers_have_sections() -> None:
    head = record("fused", 9.0, op="linear_bernoulli_sample", shape=[100, 200, 784])
    adam = record("fused", 9.0, op="adam_", shape=[2124, 200], bandwidth_fraction=0.5)
    assert [(heading, len(part)) for heading, part in sections([*RESULT["records"], head, adam])] == [
        ("Beyond the cache:", 1),
        ("Within the cache, where overhead counts:", 2),
        ("Layers and heads, where arithmetic counts:", 1),
        ("Optimizers:", 1),
    ]


def test_results_are_read_as_written(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    results.write(path, RESULT)
    assert results.read(path) == RESULT
    assert path.read_text().count('"candidate"') == sum('"candidate"' in line for line in path.read_text().splitlines())
    assert list(tmp_path.iterdir()) == [path]


def test_a_result_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    results.write(path, RESULT)
    with pytest.raises(ValueError, match="JSON compliant"):
        results.write(path, result(record("fused", math.nan)))
    assert results.read(path) == RESULT
    assert list(tmp_path.iterdir()) == [path]


def with_record(**others: Any) -> str:
    return json.dumps(result(record("fused", 1.0) | others))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "r.json: cannot be read: "),
        ("[]", r"r.json: result: expected an object, got \[\]"),
        ('{"records": []}', "r.json: result: has no machine"),
        (json.dumps({**RESULT, "machine": {}}), "r.json: result.machine: has no device"),
        (json.dumps({**RESULT, "records": {}}), "r.json: result.records: expected list"),
        (json.dumps({**RESULT, "records": [{"op": "gaussian_kl"}]}), r"r.json: result.records\[0\]: has no pass"),
        (with_record(median_us="fast"), r"r.json: result.records\[0\].median_us: expected float, got 'fast'"),
        (with_record(median_us=0.0), r"r.json: result.records\[0\].median_us: expected > 0, got 0.0"),
        (with_record(shape=["a"]), r"r.json: result.records\[0\].shape\[0\]: expected int, got 'a'"),
        (with_record(launches="few"), r"r.json: result.records\[0\].launches: expected int \| None, got 'few'"),
        (with_record(max_error="none"), r"r.json: result.records\[0\].max_error: expected float \| None, got 'none'"),
    ],
)
def test_what_is_no_result_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(results.ResultError, match=message):
        results.read(path)


def test_records_may_say_more(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text(with_record(watts=3))
    assert results.read(path)["records"][0]["watts"] == 3  # type: ignore[typeddict-item]


def test_launches_are_shown_where_there_are_any() -> None:
    counted = result(record("fused", 1.0, launches=1), record("eager", 2.0, launches=12), record("fused", 1.0, **LARGE))
    large, small = (
        cells(report.text(counted, SUITE).split("\n\n")[1]),
        cells(report.text(counted, SUITE).split("\n\n")[3]),
    )
    assert "launches (eager)" not in large[0]
    assert (small[0][-2], small[2][-2]) == ("launches (eager)", "1 (12)")


def test_a_result_of_an_unknown_suite_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "r.json"
    results.write(path, {**RESULT, "suite": "epochs"})
    assert cli.main(["bench", "--show", str(path)]) == 1
    assert capsys.readouterr().err == "wakesleep: expected the suite of the result to be ops or step, got epochs\n"


def shows(path: Path, result: results.Result) -> bool:
    """Return true if a picture shows exactly these records."""
    with Image.open(path) as image:
        return bool(image.info[report.DIGEST] == report.digest(result))


def test_a_picture_knows_its_result(tmp_path: Path) -> None:
    path = tmp_path / "speed.png"
    report.plot(path, RESULT, SUITE)
    assert shows(path, RESULT)
    assert not shows(path, result(record("fused", 5.0), *RESULT["records"][1:]))
    with Image.open(path) as image:
        colours = {rgb for _, rgb in image.convert("RGB").getcolors(1 << 24)}
    assert {(0xD5, 0x5E, 0x00), (0x00, 0x72, 0xB2)} <= colours  # fused and compile; distributions was not measured
    with pytest.raises(results.ResultError, match="nothing to draw"):
        report.plot(path, result(record("fused", 5.0)), SUITE)
    assert shows(path, RESULT)


def test_a_regression_is_told_from_noise() -> None:
    old = result(record("fused", 100.0, 4.0), record("eager", 300.0, 12.0))
    slower = result(record("fused", 150.0, 4.0), record("eager", 300.0, 12.0))
    (line,) = results.regressions(old, slower)
    assert line.startswith(
        "gaussian_kl forward float32 [100, 64]: takes 1.50 times as long as before relative to eager"
    )
    assert results.regressions(slower, old) == []
    # within the spread, or on a machine that is slower for all
    assert results.regressions(old, result(record("fused", 108.0, 4.0), record("eager", 300.0, 12.0))) == []
    assert results.regressions(old, result(record("fused", 200.0, 8.0), record("eager", 600.0, 24.0))) == []
    # steadier figures show less
    steady = [result(record("fused", f, 0.0), record("eager", 300.0, 0.0)) for f in (100.0, 108.0)]
    assert len(results.regressions(*steady)) == 1
    # without eager, the time itself; a case that is new is no regression
    alone = result(record("fused", 150.0, 4.0), record("fused", 1.0, **LARGE))
    (line,) = results.regressions(result(record("fused", 100.0, 4.0)), alone)
    assert "1.50 times as long as before, noise" in line
    with pytest.raises(results.ResultError, match="no case of the fused ops in common"):
        results.regressions(old, result(record("fused", 1.0, **LARGE)))


def test_the_command_fails_on_a_regression(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    results.write(old, RESULT)
    results.write(new, result(record("fused", 20.0), *RESULT["records"][1:]))
    assert bench(Plan(), show=new, compare=old) == 1
    assert "wakesleep: gaussian_kl forward float32 [100, 64]: takes 2.00 times" in capsys.readouterr().err
    assert bench(Plan(), show=old, compare=new) == 0
    assert capsys.readouterr().err == ""

    results.write(new, result(*RESULT["records"], threads=1))
    assert bench(Plan(), show=old, compare=new) == 0
    assert f"{new} was measured elsewhere: Abacus 3000, AVX2, 1 thread\n" in capsys.readouterr().err


def test_an_inaccurate_op_is_named() -> None:
    wrong = [record("fused", 1.0, max_error=1e-4), record("eager", 2.0, max_error=1e-7)]
    (line,) = results.inaccurate(wrong)
    assert line == "gaussian_kl forward float32 [100, 64]: error 1.0e-04, eager's 1.0e-07"
    assert results.inaccurate(RESULT["records"]) == []


def of(name: str, shape: list[int], times: dict[str, float], **others: Any) -> list[results.Record]:
    return [record(candidate, time, op=name, shape=shape, **others) for candidate, time in times.items()]


def test_goals_are_held_to_every_case(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = [
        *of("gaussian_kl", [100, 64], {"fused": 10.0, "eager": 20.0, "distributions": 50.0, "compile": 11.0}),
        *of("gaussian_kl", [20, 64], {"fused": 10.0, "eager": 9.0, "compile": 5.0}),
        *of("bernoulli_log_prob", [10_000, 784], {"fused": 10.0, "eager": 20.0}, bandwidth_fraction=0.55),
        *of("linear, tanh", [20, 784, 200], {"fused": 100.0, "eager": 99.0, "compile": 50.0}),
        *of("linear", [20, 100, 784, 200], {"fused": 100.0, "compile": 90.0}),
    ]
    path = tmp_path / "r.json"
    results.write(path, result(*records, threads=1))
    assert bench(Plan(), show=path, goals=True) == 0
    text = capsys.readouterr().out
    where = "gaussian_kl forward float32 [20, 64]"
    shown = [[cell for cell in line if cell] for line in cells(text[text.index("| what") :])[2:9]]
    assert shown == [
        ["ops versus eager", "≥ 1×", "0.90×", where, "2 of 3", "missed"],  # noqa: RUF001
        ["layers versus eager", "≥ 0.98×", "0.99×", "linear, tanh forward float32 [20, 784, 200]", "1 of 1", "met"],  # noqa: RUF001
        ["ops versus distributions", "≥ 1×", "5.00×", where.replace("20", "100"), "1 of 1", "met"],  # noqa: RUF001
        ["ops versus torch fused", "≥ 1×", "–", "–", "0 of 0", "not measured"],  # noqa: RUF001
        [
            "ops versus compile, 100 rows or more",
            "≥ 1×",  # noqa: RUF001
            "0.90×",  # noqa: RUF001
            "linear forward float32 [20, 100, 784, 200]",
            "1 of 2",
            "missed",
        ],
        [
            "densities, forward",
            "≥ 0.6 of copy speed",
            "0.55 of copy speed",
            "bernoulli_log_prob forward float32 [10000, 784]",
            "0 of 1",
            "missed",
        ],
        ["densities, forward+backward", "≥ 0.5 of copy speed", "–", "–", "0 of 0", "not measured"],  # noqa: RUF001
    ]
    assert "2 of 7 goals are met" in text


def test_goals_of_a_gpu() -> None:
    large = {"shape": [100_000, 784], "bandwidth_fraction": 0.85}
    ragged = {"shape": [100_000, 785], "bandwidth_fraction": 0.5}
    records = [
        *(record("fused", 100.0, op=op, **large) for op in ("bernoulli_log_prob", "bernoulli_sample")),
        record("fused", 100.0, op="bernoulli_log_prob", **ragged),
        *of("gaussian_kl", [20, 64], {"fused": 10.0, "compile": 9.0}),
    ]
    text = goals.text(result(*records, device="cuda", gpu="Abacus 9000"), SUITE)
    shown = {cell[1]: cell[3:7] for cell in cells(text)[2:-2]}
    assert shown["ops versus compile"][:1] == ["0.90×"]  # noqa: RUF001
    assert shown["densities"][::2] == ["0.85 of copy speed", "0 of 1"]
    assert shown["samplers"][::2] == ["0.85 of copy speed", "1 of 1"]
    assert "1 of 7 goals are met; they are set for an NVIDIA H200, this is Abacus 9000." in text


@pytest.mark.parametrize("device", GOALS)
def test_every_goal_can_be_measured(device: str) -> None:
    measured = [
        {name: record(name, 1.0, bandwidth_fraction=1.0, **case.labels) for name in case.candidates}
        for case in cases(device)
    ]
    for goal in GOALS[device]:
        assert any(goal.applies(row["fused"]) and goal.measured(row) is not None for row in measured), goal.what


# ---- the README ------------------------------------------------------------------------------------------------------


@pytest.fixture
def update_readme() -> Any:
    return checkout.load("update_readme", "scripts")


@pytest.mark.source_tree
def test_the_pages_show_the_committed_results(update_readme: Any) -> None:
    stale = "tables or pictures are older than the results: run `make readme`"
    for page in (ROOT / "README.md", ROOT / "docs/benchmarks.md"):
        text = page.read_text()
        assert update_readme.refresh(text, page.parent) == text, stale
    paths = [page.parent / path for path in update_readme.results(text)]
    assert paths
    for path in paths:
        assert shows(path.with_suffix(".png"), results.read(path)), stale
    with Image.open(ROOT / "docs/speed.png") as picture:
        figures = update_readme.pictured([results.read(path) for path in paths])
        assert picture.info[report.DIGEST] == update_readme.digest(figures), stale


@pytest.mark.source_tree
def test_pages_are_brought_up_to_date(update_readme: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(update_readme, "ROOT", tmp_path)
    for folder in ("docs", "results"):
        (tmp_path / folder).mkdir()
    results.write(tmp_path / "results/abacus.json", RESULT)
    (tmp_path / "pyproject.toml").write_text('[project.urls]\nSource = "https://github.com/a/b"\n')
    (tmp_path / "README.md").write_text("![Bars](docs/speed.png)\n")
    page = tmp_path / "docs/benchmarks.md"
    page.write_text("# Speed\n<!-- speed: ../results/abacus.json -->\nold\n<!-- end of speed -->\nafter\n")
    update_readme.main()
    text = page.read_text()
    assert "old" not in text
    assert text.startswith("# Speed\n<!-- speed: ../results/abacus.json -->\n\n![")
    assert text.endswith("\n<!-- end of speed -->\nafter\n")
    assert report.text(RESULT, SUITE, narrow=True) in text
    assert shows(tmp_path / "results/abacus.png", RESULT)
    assert (tmp_path / "docs/speed.png").stat().st_size > 10_000
    assert (tmp_path / "README.md").read_text() == "![Bars](https://github.com/a/b/raw/HEAD/docs/speed.png)\n"
    update_readme.main()
    assert page.read_text() == text

    results.write(tmp_path / "results/abacus.json", result(record("fused", 5.0), *RESULT["records"][1:]))
    assert update_readme.refresh(text, page.parent) != text


@pytest.mark.source_tree
def test_the_overview_shows_the_first_result_of_each_suite_and_device(update_readme: Any) -> None:
    names = ("1-thread", "1-thread-step", "2-threads-step")
    found = [results.read(ROOT / f"benchmarks/results/0.2.0-amd-epyc-zen3-avx2-{name}.json") for name in names]
    assert update_readme.pictured(found) == found[:2]


@pytest.mark.source_tree
def test_the_rows_of_the_overview_align_equal_cases() -> None:
    labels = checkout.load("update_readme", "scripts")._labels
    assert labels([{"c": {}}, {"a": {}, "b": {}, "c": {}}, {"b": {}, "d": {}}]) == ["a", "b", "c", "d"]
