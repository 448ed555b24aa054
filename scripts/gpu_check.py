"""Build, test, sanitize and benchmark the package on a computer with a GPU: `make gpu-check`.

Needs an installed torch, nvcc, pytest and pytest-xdist, but no network. Takes less than nine minutes, with the most
valuable steps first. The folder in the environment variable OUT receives `gpu-check.json`, one log for each step, and
the measurements: `alternatives.json`, `step.json` and `ops.json`. All of these are written as results come, so that a
run that is cut off leaves them. Exits with 0 if every step passed, 1 if a step failed, and 2 with a one-line reason if
the check cannot start.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUDGET = 8 * 60 + 40.0  # seconds for all steps
ENDING = 30.0
"""Seconds that a benchmark has to finish its last case and to report."""
COMPILERS = {"step": 4, "ops": 6}
"""Number of processes that compile the baselines of each suite."""

DEVICE_TESTS = (
    "test_cuda.py",
    "test_ops.py",
    "test_gradients.py",
    "test_random.py",
    "test_heads.py",
    "test_layers.py",
    "test_binarize.py",
    "test_adam.py",
    "test_replay.py",
)


@dataclass(frozen=True)
class Step:
    """A command and its time limit."""

    name: str
    command: tuple[str, ...]
    seconds: float
    cwd: Path = ROOT
    environment: dict[str, str] = field(default_factory=dict)
    required: bool = False
    """If it fails, the remaining steps are skipped."""
    measures: bool = False
    """The command takes `--seconds`, the time to measure in. It ends before the time limit."""


@dataclass(frozen=True)
class Outcome:
    name: str
    status: str  # passed, failed, timed out, or skipped
    seconds: float
    command: str
    last_lines: list[str]


def stages(python: str, site: Path, out: Path, capability: str) -> list[list[Step]]:
    """Return the steps, those first whose loss would be worst. The first one installs the package into `site`.

    The steps of a stage run at the same time, so a step that measures has a stage of its own. Only the comparison of
    settings precedes the tests: no other computer can make it, and it checks each step that it times against float64.
    """
    tests, scripts = ROOT / "tests", ROOT / "scripts"
    installed = {"PYTHONPATH": str(site)}
    pytest = (
        python,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:benchmark",
        "-q",
        "--thorough",
        "-c",
        str(ROOT / "pyproject.toml"),
    )
    # without torch's caching allocator, so that the sanitizer knows the bounds of every tensor
    sanitized = {**installed, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "CUDA_LAUNCH_BLOCKING": "1"}
    small_pass = (python, str(scripts / "gpu_small_pass.py"))
    benchmark = (python, str(scripts / "gpu_benchmark.py"))
    alternatives = (python, str(scripts / "gpu_alternatives.py"), "--json", str(out / "alternatives.json"))
    pip = (python, "-m", "pip", "install", "--quiet", "--no-index", "--no-build-isolation", "--no-deps")

    def compile_baselines(suite: str) -> list[Step]:
        parts = COMPILERS[suite]
        return [
            Step(
                f"compile the baselines, {suite} {part} of {parts}",
                (*benchmark, suite, "--compile", f"{part}/{parts}"),
                120,
                tests,
                {**installed, "TORCHINDUCTOR_COMPILE_THREADS": "1"},
            )
            for part in range(1, parts + 1)
        ]

    def measure(suite: str, seconds: float) -> list[Step]:
        command = (*benchmark, suite, "--json", str(out / f"{suite}.json"))
        return [Step(f"benchmark of {suite}", command, seconds, tests, installed, measures=True)]

    return [
        [
            Step(
                "build",
                (*pip, "--target", str(site), str(ROOT)),
                240,
                environment={"WAKESLEEP_FORCE_CUDA": "1", "TORCH_CUDA_ARCH_LIST": capability},
                required=True,
            )
        ],
        [Step("alternatives of a step", alternatives, 120, tests, installed)],
        [
            Step("every operator has a CUDA kernel", (python, str(scripts / "cuda_check.py")), 60, tests, installed),
            Step(
                "tests on the device",
                (*pytest, "-n", "6", "--rootdir", str(tests), "-k", "cuda", *(str(tests / f) for f in DEVICE_TESTS)),
                150,
                tests,
                installed,
            ),
            *compile_baselines("step"),
        ],
        measure("step", 150),
        [
            *(
                Step(
                    f"compute-sanitizer {tool}",
                    ("compute-sanitizer", "--tool", tool, "--error-exitcode", "1", *small_pass),
                    120,
                    tests,
                    sanitized,
                )
                for tool in ("memcheck", "racecheck", "initcheck", "synccheck")
            ),
            *compile_baselines("ops"),
        ],
        measure("ops", BUDGET),
    ]


def run(step: Step, logs: Path, seconds: float) -> Outcome:
    """Run a step for at most `seconds`. Its output goes to a log of its own, and the last lines to the outcome."""
    words = step.command
    if step.measures:
        words += ("--seconds", f"{max(0.0, seconds - ENDING):.0f}")
    command = " ".join(words)
    if seconds <= 0 or shutil.which(words[0]) is None:
        reason = "no time was left" if seconds <= 0 else f"{words[0]}: not found"
        return Outcome(step.name, "skipped", 0.0, command, [reason])
    start = time.monotonic()
    with (logs / f"{re.sub(r'[^a-z0-9]+', '-', step.name.lower())}.log").open("w+", errors="replace") as printed:
        process = subprocess.Popen(
            words,
            cwd=step.cwd,
            env={**os.environ, **step.environment},
            stdout=printed,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
            os.killpg(process.pid, signal.SIGKILL)  # its children too, since they would disturb the timings
            process.wait()
        printed.seek(0)
        lines = printed.read().splitlines()
    status = {0: "passed", None: "timed out"}.get(code, "failed")
    return Outcome(step.name, status, round(time.monotonic() - start, 1), command, lines[-12:])


def run_all(plan: Iterable[Sequence[Step]], logs: Path, budget: float) -> Iterator[Outcome]:
    """Run all stages within the budget, and yield each outcome at once. If a required step fails, skip the rest."""
    deadline = time.monotonic() + budget
    broken = ""
    for stage in plan:
        if broken:
            yield from (Outcome(s.name, "skipped", 0.0, " ".join(s.command), [f"{broken} failed"]) for s in stage)
            continue
        left = deadline - time.monotonic()
        with ThreadPoolExecutor(len(stage)) as at_once:
            running = {at_once.submit(run, step, logs, min(step.seconds, left)): step for step in stage}
            for ended in as_completed(running):
                outcome, step = ended.result(), running[ended]
                if step.required and outcome.status != "passed":
                    broken = step.name
                yield outcome


def show(outcome: Outcome) -> None:
    print(f"{outcome.name:40} {outcome.status:10} {outcome.seconds:6.1f} s", flush=True)
    if outcome.status != "passed":
        print("\n".join(f"    {line}" for line in outcome.last_lines), flush=True)


def machine() -> dict[str, str]:
    """Return the GPU and the software versions."""
    import torch

    properties = torch.cuda.get_device_properties(0)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return {
        "gpu": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": str(properties.multi_processor_count),
        "memory_gib": f"{properties.total_memory / 2**30:.1f}",
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "python": sys.version.split()[0],
        "commit": commit.stdout.strip() or "unknown",
    }


def write(path: Path, record: object) -> None:
    """Write a JSON file atomically."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=2) + "\n")
    partial.replace(path)


def obstacle() -> str | None:
    """Return the reason why the check cannot start, or None."""
    if not os.environ.get("OUT"):
        return "OUT is not set: it names the folder that the results are written to"
    try:
        import torch
    except ImportError:
        return f"{sys.executable} has no torch"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no GPU"
    return None


def main() -> int:
    if reason := obstacle():
        print(f"gpu-check: {reason}", file=sys.stderr)
        return 2
    out = Path(os.environ["OUT"]).resolve()
    out.mkdir(parents=True, exist_ok=True)
    about = machine()
    with tempfile.TemporaryDirectory() as site:
        outcomes: list[Outcome] = []
        for outcome in run_all(stages(sys.executable, Path(site), out, about["compute_capability"]), out, BUDGET):
            outcomes.append(outcome)
            show(outcome)
            write(out / "gpu-check.json", {"machine": about, "steps": [asdict(outcome) for outcome in outcomes]})
    return int(any(outcome.status != "passed" for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
