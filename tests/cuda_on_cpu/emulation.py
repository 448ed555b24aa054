"""Compiles the CUDA kernels as C++ and runs them instead of the CPU kernels.

``WAKESLEEP_SANITIZE=1`` compiles them with the address and undefined-behaviour sanitizers, whose run-time libraries
must be preloaded. ``make cuda-on-cpu-asan`` does that.
"""

from __future__ import annotations

import inspect
import os
import platform
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType

import checkout
import ninja
import torch
from cases import Case, as_tuple, make_key
from filelock import FileLock
from torch.utils import cpp_extension

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
toolchain = checkout.load("build_support.toolchain")
_library = torch.library.Library("wakesleep_cuda_on_cpu", "FRAGMENT")
SANITIZE = os.environ.get("WAKESLEEP_SANITIZE") == "1"


def operators() -> list[str]:
    """Returns the names of all operators in the package's schema table that have kernels."""
    names = [schema.name for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("wakesleep_ext::")]
    return [name.split("::")[1] for name in names if torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU")]


@cache
def load() -> None:
    """Builds the library if necessary, and registers its kernels for CPU tensors as ``wakesleep_cuda_on_cpu``."""
    build = ROOT / "build" / ("cuda_on_cpu-sanitized" if SANITIZE else "cuda_on_cpu")
    build.mkdir(parents=True, exist_ok=True)
    sources = [HERE / "cuda_on_cpu.cpp", *(ROOT / "csrc" / name for name in ("aten.cpp", "registration.cpp"))]
    with FileLock(build / "sources.lock"):  # several workers may build at once
        for kernels in (*sorted((ROOT / "csrc" / "cuda").glob("*.cu")), HERE / "emulator_cases.cu"):
            source = build / f"{kernels.stem}.cpp"  # a name that compiles as C++
            text = f'#include "{HERE / "cuda_on_cpu.h"}"\n#include "{kernels}"\n'
            if not source.exists() or source.read_text() != text:
                source.write_text(text)
            sources.append(source)
    # As on a GPU, multiplications and additions are contracted. The error bounds hold either way.
    flags = ["-O1", "-DAT_PER_OPERATOR_HEADERS", "-ffp-contract=fast"]
    flags += ["-mfma"] if platform.machine() == "x86_64" else []
    linked = []
    if SANITIZE:
        sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=all"]
        flags += [*sanitizers, "-g1", "-fno-omit-frame-pointer"]
        linked += sanitizers
    os.environ["MAX_JOBS"] = str(toolchain.parallel_jobs(os.environ))
    os.environ["PATH"] = f"{ninja.BIN_DIR}{os.pathsep}{os.environ['PATH']}"
    cpp_extension.load(
        name="wakesleep_cuda_on_cpu",
        sources=[str(source) for source in sources],
        extra_include_paths=[str(HERE / "include")],
        extra_cflags=flags,
        extra_ldflags=linked,
        build_directory=str(build),
        is_python_module=False,
    )
    for name in operators():
        schema = str(getattr(torch.ops.wakesleep_ext, name).default._schema)
        _library.define(schema.removeprefix("wakesleep_ext::"))
        _library.impl(name, torch.library.fallthrough_kernel, "Autograd")


@contextmanager
def cuda_kernels() -> Iterator[None]:
    """Makes the package's operators run the CUDA kernels on CPU tensors."""
    load()
    library = torch.library.Library("wakesleep_ext", "IMPL")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # overriding kernels is the purpose
            for name in operators():
                kernel = getattr(torch.ops.wakesleep_cuda_on_cpu, name).default
                library.impl(name, kernel, "CPU", allow_override=True)
        yield
    finally:
        library._destroy()


def device_tests(*modules: ModuleType) -> dict[str, Callable[..., None]]:
    """Returns the tests of these modules that take a device, by name."""
    found: dict[str, Callable[..., None]] = {}
    for module in modules:
        for name, test in vars(module).items():
            if name.startswith("test_") and "device" in inspect.signature(test).parameters:
                assert name not in found, f"two tests are called {name}; one of them would not run"
                found[name] = test
    return found


def count_launches(case: Case) -> tuple[int, int | None]:
    """Returns the number of kernel launches forward and backward, the latter None without a gradient."""
    inputs = case.inputs(torch.float32, requires_grad=True)
    function = case.function(key=make_key())
    before = launches()
    results = as_tuple(function(*inputs))
    forward = launches() - before
    if not results[0].requires_grad:
        return forward, None
    torch.autograd.grad(sum(result.sum() for result in results), inputs)
    return forward, launches() - before - forward


def schedule(*, shuffled: bool = False, max_blocks: int = 0) -> None:
    """Sets whether a random runnable thread runs next, and the largest number of blocks (0 means no limit)."""
    load()
    torch.ops.cuda_on_cpu.schedule(shuffled, max_blocks)


def launches() -> int:
    """Returns the number of kernels launched so far."""
    return int(torch.ops.cuda_on_cpu.launches())


if __name__ == "__main__":
    load()
