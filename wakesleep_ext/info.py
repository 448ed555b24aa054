"""Report the installed versions, the build and the hardware, for `wakesleep info`.

The report must work even if the package cannot be imported. So the command line runs this file directly, and the
module imports no other part of the package at import time. If a value cannot be determined, the report shows the error
in its place.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import Distribution, PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname


def info() -> dict[str, str]:
    """Return the versions, the build, the processor and the GPUs, as text keyed by name.

    Never raises: if a value cannot be determined, its text is the error.
    """
    return {name: _answer(question) for name, question in _QUESTIONS.items()}


def main() -> int:
    """Print one value per line. Return 0 if the kernels load, 1 otherwise."""
    facts = info()
    width = max(map(len, facts))
    for name, fact in facts.items():
        print(f"{name:{width}}  {fact}")
    return 0 if facts["kernels"] == _LOADED else 1


def gpu_support(capability: tuple[int, int], architectures: str) -> str:
    """Describe whether kernels compiled for `architectures` run on a GPU, and if not, how to rebuild them.

    Args:
        capability: compute capability of the GPU, such as (9, 0) for sm_90.
        architectures: list of compute capabilities, in the format of `TORCH_CUDA_ARCH_LIST`, such as "8.0;9.0+PTX".
    """
    wanted = f"{capability[0]}.{capability[1]}"
    for entry in architectures.replace(" ", ";").split(";"):
        number, _, ptx = entry.partition("+")
        major, minor = (int(part.rstrip("af")) for part in number.split("."))
        if major == capability[0] and minor <= capability[1]:
            return "supported"
        if ptx and (major, minor) <= capability:
            return "supported by compiling PTX at first use"
    command = reinstall_command(f'TORCH_CUDA_ARCH_LIST="{wanted}"')
    return f"not supported: the kernels were compiled for {architectures}. Reinstall them for this GPU: {command}"


def commit_of(checkout: Path) -> tuple[str | None, bool | None]:
    """Return the commit of a checkout, and True if tracked files differ from it. Elsewhere, both are None."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(checkout), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != checkout:
            return None, None
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "-uno"))
    except (OSError, subprocess.SubprocessError):
        return None, None


def reinstall_command(*variables: str) -> str:
    """Return the command that recompiles the kernels for the installed torch.

    The command uses the installer (pip or uv) and the source that the package metadata records. If the source is
    unknown, the command contains the placeholder SOURCE and a description of it.

    Args:
        variables: environment variables for the build, such as 'WAKESLEEP_FORCE_CUDA=1'.
    """
    try:
        installed = distribution("wakesleep_ext")
    except PackageNotFoundError:
        installed = None
    if installed is not None and (installed.read_text("INSTALLER") or "").strip() == "uv":
        command = "uv pip install --no-deps --no-build-isolation --reinstall-package wakesleep_ext"
    else:
        command = "pip install --force-reinstall --no-deps --no-cache-dir"
    source = _source(installed) or "SOURCE (a checkout or a source distribution of wakesleep_ext)"
    return " ".join([*variables, command, source])


def _source(installed: Distribution | None) -> str | None:
    """Return the source to install from, as PEP 610 records it. None if it is a wheel or no longer exists."""
    record = json.loads((installed and installed.read_text("direct_url.json")) or "{}")
    url, location = record.get("url", ""), None
    if "vcs_info" in record:
        facts = record["vcs_info"]
        return shlex.quote(f"{facts['vcs']}+{url}@{facts['commit_id']}")
    if url.startswith("file:"):
        location = Path(url2pathname(urlsplit(url).path))
    elif url and not url.endswith(".whl"):
        return shlex.quote(url)
    elif not url:  # built in place
        location = Path(__file__).resolve().parents[1]
    if location is None or location.suffix == ".whl" or not (location.is_file() or (location / "setup.py").is_file()):
        return None
    is_editable = record.get("dir_info", {}).get("editable", False)
    return ("-e " if is_editable else "") + shlex.quote(str(location))


_LOADED = "loaded"


def _answer(question: Callable[[], object]) -> str:
    try:
        return str(question())
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _import(name: str) -> Any:
    return importlib.import_module(name)


def _torch() -> str:
    torch = _import("torch")
    return f"{torch.__version__} (CUDA {torch.version.cuda})" if torch.version.cuda else f"{torch.__version__} (CPU)"


def _kernels() -> str:
    _import("wakesleep_ext")
    return _LOADED


def _build() -> str:
    config = _import("wakesleep_ext._C").build_config()
    build = _import("wakesleep_ext._build")
    cuda = f"CUDA {config['cuda']} for {build.CUDA_ARCHITECTURES}" if config["cuda"] else "no CUDA"
    cuda += f" ({build.REASON})"
    return f"for torch {config['torch']}, {cuda}, compiler {config['compiler']}"


def _simd() -> str:
    capability = _import("torch").backends.cpu.get_cpu_capability()
    chosen = os.environ.get("ATEN_CPU_CAPABILITY")
    return f"{capability} (ATEN_CPU_CAPABILITY={chosen})" if chosen else str(capability)


def _gpus() -> str:
    cuda = _import("torch").cuda
    if not cuda.is_available():
        return "none"
    architectures = _import("wakesleep_ext._build").CUDA_ARCHITECTURES
    found = []
    for index in range(cuda.device_count()):
        support = (
            gpu_support(cuda.get_device_capability(index), architectures) if architectures else "built without CUDA"
        )
        found.append(f"{cuda.get_device_name(index)}, {support}")
    return "; ".join(found)


_QUESTIONS: dict[str, Callable[[], object]] = {
    "wakesleep_ext": lambda: version("wakesleep_ext"),
    "python": lambda: f"{platform.python_version()} ({sys.executable})",
    "torch": _torch,
    "kernels": _kernels,
    "built": _build,
    "processor": platform.machine,
    "SIMD": _simd,
    "threads": lambda: _import("torch").get_num_threads(),
    "GPUs": _gpus,
    "reinstall": reinstall_command,
}
