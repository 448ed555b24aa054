"""Build, test, sanitize and benchmark the package on a computer with a GPU: `make gpu-check`.

Needs an installed torch, nvcc and pytest, but no network. Writes `gpu-check.json`, all output as `gpu-check.log`, and
`benchmark.json` to the folder in the environment variable OUT. Exits with 0 if every step passed, 1 if a step failed,
and 2 with a one-line reason if the check cannot start.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).resolve().parent.parent
BUDGET = 9 * 60.0  # seconds for all steps

DEVICE_TESTS = (
    "test_cuda.py",
    "test_ops.py",
    "test_gradients.py",
    "test_random.py",
    "test_heads.py",
    "test_layers.py",
    "test_binarize.py",
    "test_adam.py",
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


@dataclass(frozen=True)
class Outcome:
    name: str
    status: str  # passed, failed, timed out, or skipped
    seconds: float
    command: str
    last_lines: list[str]


def steps(python: str, site: Path, out: Path, capability: str) -> list[Step]:
    """Return the steps in order. The first one installs the package into `site`."""
    installed = {"PYTHONPATH": str(site)}
    tests = ROOT / "tests"
    pytest = (python, "-m", "pytest", "-p", "no:cacheprovider", "-q", "--thorough", "-c", str(ROOT / "pyproject.toml"))
    # without torch's caching allocator, so that the sanitizer knows the bounds of every tensor
    sanitized = {**installed, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "CUDA_LAUNCH_BLOCKING": "1"}
    small_pass = (python, str(ROOT / "scripts" / "gpu_small_pass.py"))
    # calls functions, because the packages of the command line may be missing
    bench = (
        "import sys; from pathlib import Path; from wakesleep_ext.benchmark.command import bench; "
        "from wakesleep_ext.benchmark.plan import Plan; from wakesleep_ext.benchmark.result import write; "
        "from wakesleep_ext.benchmark.run import run; "
        f"path = Path({str(out / 'benchmark.json')!r}); write(path, run(Plan(device='cuda', quick=True))); "
        "sys.exit(bench(Plan(), show=path))"
    )
    pip = (python, "-m", "pip", "install", "--quiet", "--no-index", "--no-build-isolation", "--no-deps")
    return [
        Step(
            "build",
            (*pip, "--target", str(site), str(ROOT)),
            240,
            environment={"WAKESLEEP_FORCE_CUDA": "1", "TORCH_CUDA_ARCH_LIST": capability},
            required=True,
        ),
        Step("every operator has a CUDA kernel", (python, str(ROOT / "scripts/cuda_check.py")), 60, tests, installed),
        Step(
            "tests on the device",
            (*pytest, "--rootdir", str(tests), "-k", "cuda", *(str(tests / name) for name in DEVICE_TESTS)),
            180,
            tests,
            installed,
        ),
        *(
            Step(
                f"compute-sanitizer {tool}",
                ("compute-sanitizer", "--tool", tool, "--error-exitcode", "1", *small_pass),
                60,
                tests,
                sanitized,
            )
            for tool in ("memcheck", "racecheck", "initcheck")
        ),
        Step(
            "benchmark",
            (python, "-c", bench),
            240,
            tests,
            installed,
        ),
    ]


def run(step: Step, log: TextIO, seconds: float) -> Outcome:
    """Run a step for at most `seconds`. Its output goes to the log, and the last lines to the outcome."""
    command = " ".join(step.command)
    if seconds <= 0 or shutil.which(step.command[0]) is None:
        reason = "no time was left" if seconds <= 0 else f"{step.command[0]}: not found"
        return Outcome(step.name, "skipped", 0.0, command, [reason])
    print(f"== {step.name}\n{command}", file=log, flush=True)
    start = time.monotonic()
    with tempfile.TemporaryFile("w+", errors="replace") as printed:
        try:
            code: int | None = subprocess.run(
                step.command,
                cwd=step.cwd,
                env={**os.environ, **step.environment},
                stdout=printed,
                stderr=subprocess.STDOUT,
                timeout=seconds,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            code = None
        printed.seek(0)
        text = printed.read()
    log.write(text)
    status = {0: "passed", None: "timed out"}.get(code, "failed")
    return Outcome(step.name, status, round(time.monotonic() - start, 1), command, text.splitlines()[-12:])


def run_all(plan: list[Step], log: TextIO, budget: float) -> list[Outcome]:
    """Run all steps within the budget. After a required step fails, the rest are skipped."""
    deadline = time.monotonic() + budget
    outcomes: list[Outcome] = []
    broken = ""
    for step in plan:
        if broken:
            outcome = Outcome(step.name, "skipped", 0.0, " ".join(step.command), [f"{broken} failed"])
        else:
            outcome = run(step, log, min(step.seconds, deadline - time.monotonic()))
        if step.required and outcome.status != "passed":
            broken = step.name
        print(f"{outcome.name:34} {outcome.status:10} {outcome.seconds:6.1f} s", flush=True)
        if outcome.status != "passed":
            print("\n".join(f"    {line}" for line in outcome.last_lines), flush=True)
        outcomes.append(outcome)
    return outcomes


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
    with tempfile.TemporaryDirectory() as site, (out / "gpu-check.log").open("w") as log:
        plan = steps(sys.executable, Path(site), out, about["compute_capability"])
        outcomes = run_all(plan, log, BUDGET)
    write(out / "gpu-check.json", {"machine": about, "steps": [asdict(outcome) for outcome in outcomes]})
    return int(any(outcome.status != "passed" for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
