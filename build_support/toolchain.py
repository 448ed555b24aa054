"""Finds the torch to build against, without importing it, and the CUDA toolkit to build with.

A build always compiles the CPU kernels. It also compiles the CUDA kernels if torch is a CUDA build and nvcc is found,
even if no GPU is visible. ``WAKESLEEP_FORCE_CUDA=1`` turns a missing toolkit into an error, and
``WAKESLEEP_FORCE_CPU=1`` ignores an installed toolkit.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

SUPPORTED_TORCH = "torch>=2.10"
OLDEST_SETUPTOOLS = 77  # the first version with SPDX licence expressions
BUILD_TOOLS = (f"setuptools>={OLDEST_SETUPTOOLS}", "ninja")
UNPACKED = re.compile(r"(git|sdists)-v\d+|pip-(req-build|install)-")  # folders where uv and pip unpack sources
BYTES_PER_JOB = 2 * 2**30  # enough to compile the largest translation unit


class BuildError(SystemExit):
    """The build cannot continue, and the message says what to do."""


@dataclass(frozen=True)
class Torch:
    """An installed torch."""

    site_packages: Path
    version: str
    cuda: str | None

    @property
    def requirement(self) -> str:
        """The requirement for this torch's series, which can load kernels built against it, such as 'torch==2.13.*'."""
        major, minor = self.version.split("+")[0].split(".")[:2]
        return f"torch=={major}.{minor}.*"


@dataclass(frozen=True)
class Toolkit:
    """An installed CUDA toolkit."""

    home: Path
    version: str


@dataclass(frozen=True)
class Plan:
    """The kernels to build, and the reason for the choice."""

    torch: Torch
    toolkit: Toolkit | None
    reason: str

    @property
    def summary(self) -> str:
        kernels = f"CPU and CUDA {self.toolkit.version}" if self.toolkit else "CPU"
        return f"wakesleep_ext: building {kernels} kernels for torch {self.torch.version} ({self.reason})"


def site_directories() -> list[Path]:
    """Returns the package folders of the target environment, even if pip isolates the build."""
    found = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    configuration = Path(sys.prefix, "pyvenv.cfg")
    isolated = sys.prefix != sys.base_prefix
    if isolated and configuration.exists():
        isolated = "include-system-site-packages = true" not in configuration.read_text().lower()
    if not isolated:
        base = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}
        found += [sysconfig.get_path("purelib", vars=base), site.getusersitepackages()]
    return [Path(path) for path in dict.fromkeys([*found, *sys.path]) if path]


def find_torch(directories: list[Path] | None = None) -> Torch | None:
    """Returns the torch of the environment, as its version file describes it, or None if there is no torch."""
    for directory in site_directories() if directories is None else directories:
        version_file = directory / "torch" / "version.py"
        if version_file.is_file():
            facts: dict[str, object] = {}
            text = version_file.read_text()
            for name in ("__version__", "cuda"):
                match = re.search(rf"^{name}(?::[^=]+)?\s*=\s*['\"]([^'\"]+)['\"]", text, re.M)
                facts[name] = match.group(1) if match else None
            cuda = facts["cuda"]
            return Torch(directory, str(facts["__version__"]), str(cuda) if cuda else None)
    return None


def commands_without_isolation(environment: Mapping[str, str], source: Path) -> str:
    """Returns the two commands that install the package if the build cannot see the torch of the target environment.

    Args:
        environment: Environment variables, which show whether uv runs the build.
        source: The source folder of the package.
    """
    by_uv = "UV_INTERNAL__BUILD_DIR" in environment or ("UV" in environment and "PIP_BUILD_TRACKER" not in environment)
    install = "uv pip install" if by_uv else "pip install"
    rebuild = "--reinstall-package wakesleep_ext" if by_uv else "--no-cache-dir"
    is_unpacked = any(UNPACKED.match(part) for part in source.parts)
    lines = [
        f"    {install} {shlex.join([SUPPORTED_TORCH, *BUILD_TOOLS])}",
        f"    {install} --no-build-isolation {rebuild} {'SOURCE' if is_unpacked else shlex.quote(str(source))}",
        "",
        "The first command keeps a supported torch that is already installed. If you name an environment, for example "
        "with --python, name it in both commands.",
    ]
    if is_unpacked:
        lines.append("SOURCE is what you asked to install: a folder, an archive or a repository.")
    return "\n".join(lines)


def find_toolkit(environment: Mapping[str, str]) -> Toolkit | None:
    """Returns the toolkit in CUDA_HOME, or else the toolkit of the nvcc on the PATH, or None.

    nvcc may be a link or a wrapper script, so the toolkit's root is read from the output of a dry run of nvcc.
    """
    home = environment.get("CUDA_HOME") or environment.get("CUDA_PATH")
    nvcc = (
        shutil.which("nvcc", path=os.path.join(home, "bin"))
        if home
        else shutil.which("nvcc", path=environment.get("PATH")) or shutil.which("nvcc", path="/usr/local/cuda/bin")
    )
    if nvcc is None:
        return None
    version = re.search(r"release ([\d.]+)", _output([nvcc, "--version"]))
    if version is None:
        return None
    top = re.search(r"^#\$ TOP=(.+)$", _output([nvcc, "--dryrun", "-E", "-x", "cu", os.devnull]), re.M)
    root = Path(top.group(1).strip()) if top else Path(nvcc).resolve().parent.parent
    return Toolkit(root.resolve(), version.group(1))


def make_plan(environment: Mapping[str, str], torch: Torch | None, toolkit: Toolkit | None) -> Plan:
    """Decides which kernels to build. Raises BuildError if the requested kernels cannot be built."""
    force_cuda = environment.get("WAKESLEEP_FORCE_CUDA") == "1"
    force_cpu = environment.get("WAKESLEEP_FORCE_CPU") == "1"
    if force_cuda and force_cpu:
        raise BuildError("wakesleep_ext: WAKESLEEP_FORCE_CUDA=1 and WAKESLEEP_FORCE_CPU=1 exclude each other")
    if torch is None:
        raise BuildError(f"wakesleep_ext: no torch to build against; install one: pip install '{SUPPORTED_TORCH}'")
    if force_cpu:
        return Plan(torch, None, "WAKESLEEP_FORCE_CPU=1")
    if torch.cuda is None:
        if force_cuda:
            raise BuildError(
                f"wakesleep_ext: WAKESLEEP_FORCE_CUDA=1, but torch {torch.version} is a CPU build; install a CUDA "
                "build of torch"
            )
        return Plan(torch, None, "a CPU build of torch")
    if toolkit is None:
        if force_cuda:
            raise BuildError(
                f"wakesleep_ext: WAKESLEEP_FORCE_CUDA=1, but no nvcc was found; install the CUDA toolkit "
                f"{torch.cuda} and put its nvcc on the PATH, or set CUDA_HOME"
            )
        return Plan(torch, None, f"torch has CUDA {torch.cuda}, but no nvcc was found; set CUDA_HOME to use one")
    if toolkit.version.split(".")[0] != torch.cuda.split(".")[0]:
        raise BuildError(
            f"wakesleep_ext: nvcc in {toolkit.home} is CUDA {toolkit.version}, torch {torch.version} was built with "
            f"CUDA {torch.cuda}; the major versions must agree. Install a matching toolkit and set CUDA_HOME, or "
            "build the CPU kernels alone with WAKESLEEP_FORCE_CPU=1"
        )
    return Plan(torch, toolkit, f"nvcc in {toolkit.home}")


def default_architectures(toolkit: Toolkit, capabilities: Iterable[tuple[int, int]] = ()) -> str:
    """Returns the default for TORCH_CUDA_ARCH_LIST.

    The list has the architectures of the visible GPUs or, if no GPU is visible, Ampere and later. PTX for the newest
    architecture lets later GPUs run the kernels.
    """
    here = [f"{major}.{minor}" for major, minor in sorted(set(capabilities))]
    if here:
        return ";".join(here) + "+PTX"
    version = tuple(int(part) for part in toolkit.version.split(".")[:2])
    return "8.0;9.0;10.0+PTX" if version >= (12, 8) else "8.0;9.0+PTX"


def parallel_jobs(environment: Mapping[str, str], available_bytes: int | None = None) -> int:
    """Returns MAX_JOBS if it is set. Otherwise, returns one job per processor, or fewer if memory is short."""
    if environment.get("MAX_JOBS", "").isdigit():
        return max(1, int(environment["MAX_JOBS"]))
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if available_bytes is None:
        available_bytes = _available_memory()
    if available_bytes is None:
        return processors
    return max(1, min(processors, available_bytes // BYTES_PER_JOB))


def _available_memory() -> int | None:
    try:
        match = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.M)
    except OSError:
        return None
    return int(match.group(1)) * 1024 if match else None


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout + done.stderr
