"""Compiles the CUDA kernels as C++, into a library that the package can use instead of its CPU kernels.

The library and the package must be built from the same headers. ``WAKESLEEP_SANITIZE=1`` compiles the library with the
address and undefined-behaviour sanitizers, whose run-time libraries must be preloaded. ``make cuda-on-cpu-asan`` does
that.
"""

from __future__ import annotations

import ctypes
import inspect
import os
import platform
import shlex
import subprocess
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
from ninja.ninja_syntax import Writer

from wakesleep_ext import _C

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
toolchain = checkout.load("build_support.toolchain")
SANITIZE = os.environ.get("WAKESLEEP_SANITIZE") == "1"
FOLDER = ROOT / "build" / ("cuda_on_cpu-sanitized" if SANITIZE else "cuda_on_cpu")
LIBRARY = "wakesleep_cuda_on_cpu.so"


def _write_plan() -> None:
    """Writes the file that tells ninja how to compile the library."""
    # As on a GPU, multiplications and additions are contracted. The error bounds hold either way.
    flags = ["-std=c++17", "-O1", "-ffp-contract=fast", *(["-mfma"] if platform.machine() == "x86_64" else [])]
    flags += ["-fPIC", "-fvisibility=hidden", "-pthread"]
    linked = ["-shared", "-pthread", "-Wl,-z,defs"]  # a kernel without a definition is an error
    if SANITIZE:
        sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=all"]
        flags += [*sanitizers, "-g1", "-fno-omit-frame-pointer"]
        linked += sanitizers
    flags += ["-x", "c++", "-include", str(HERE / "cuda_on_cpu.h")]
    compiler = os.environ.get("CXX", "c++")
    with (FOLDER / "build.ninja").open("w") as file:
        plan = Writer(file)
        compiling = f"{compiler} {shlex.join(flags)} -MMD -MF $out.d -c $in -o $out"
        plan.rule("compile", compiling, deps="gcc", depfile="$out.d")
        plan.rule("link", f"{compiler} $in {shlex.join(linked)} -o $out")
        kernels = sorted((ROOT / "csrc" / "kernels" / "cuda").glob("*.cu"))
        sources = [HERE / "cuda_on_cpu.cpp", HERE / "emulator_cases.cu", *kernels]
        objects = [plan.build(f"{source.stem}.o", "compile", str(source))[0] for source in sources]
        plan.build(LIBRARY, "link", objects)


def _build() -> None:
    """Compiles what has changed since the last build. Raises RuntimeError with the compiler's messages."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}  # not for the compiler
    command = [f"{ninja.BIN_DIR}/ninja", "--quiet", f"-j{toolchain.parallel_jobs(os.environ)}"]
    with FileLock(FOLDER / "build.lock"):  # several workers may build at once
        _write_plan()
        done = subprocess.run(command, cwd=FOLDER, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"the CUDA kernels do not compile for the CPU:\n{done.stdout}{done.stderr}")


@cache
def load() -> ctypes.CDLL:
    """Builds the library if necessary, and loads it."""
    _build()
    library = ctypes.CDLL(str(FOLDER / LIBRARY))
    library.wakesleep_cuda_kernels.argtypes, library.wakesleep_cuda_kernels.restype = [], ctypes.c_void_p
    library.schedule.argtypes, library.schedule.restype = [ctypes.c_bool, ctypes.c_int64], None
    library.launches.argtypes, library.launches.restype = [], ctypes.c_int64
    library.run_case.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p]
    library.run_case.restype = ctypes.c_char_p
    return library


@contextmanager
def cuda_kernels() -> Iterator[None]:
    """Makes the package's operators run the CUDA kernels on CPU tensors."""
    _C.use_on_cpu(load().wakesleep_cuda_kernels())
    try:
        yield
    finally:
        _C.use_on_cpu(None)


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
    load().schedule(shuffled, max_blocks)


def launches() -> int:
    """Returns the number of kernels launched so far."""
    return load().launches()


def run_case(name: str, x: torch.Tensor) -> torch.Tensor:
    """Returns what a kernel of emulator_cases.cu makes of 64 numbers. Raises RuntimeError if the emulation does."""
    result = torch.zeros_like(x)
    error = load().run_case(name.encode(), x.data_ptr(), result.data_ptr())
    if error is not None:
        raise RuntimeError(error.decode())
    return result


if __name__ == "__main__":
    load()
