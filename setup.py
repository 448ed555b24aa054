"""Builds the one extension, wakesleep_ext._C, from csrc/. Everything else about the package is in pyproject.toml."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from setuptools import Extension, setup

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # so that build_support can be imported even if pip runs this file

from build_support import toolchain  # noqa: E402

COMPILING = {"build", "build_ext", "bdist_wheel", "editable_wheel", "develop", "install"}

# Floating-point contraction is off, so that every instruction set returns the same bits (csrc/kernels/cpu/vec.h). Jump
# threading and partial redundancy elimination are off because they turn selects into branches, which prevents
# vectorisation. Interprocedural constant propagation and scalar replacement are off because they clone functions, and
# `flatten` cannot inline a clone. A kernel's body would then be compiled for the baseline instruction set. Scheduling
# interleaves the vectors of an unrolled loop, because the processor's own window holds only two of them.
CXX_FLAGS = [
    *("-O3", "-g0", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"),
    *("-fno-thread-jumps", "-fno-tree-pre", "-fno-ipa-cp", "-fno-ipa-sra"),
    *("-fschedule-insns", "-fsched-pressure"),
    # With this macro, torch's headers include only the operators that they use, which halves their compile time.
    "-DAT_PER_OPERATOR_HEADERS",
    # -Wno-psabi: only inlined functions take vectors that are wider than those of the baseline instruction set.
    *("-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-psabi"),
]
# at::parallel_for is header-only and needs OpenMP at compile time. The extension does not link OpenMP, so it uses the
# runtime and the thread pool that torch has loaded.
OPENMP_FLAGS = ["-fopenmp"] if sys.platform != "darwin" else ["-Xclang", "-fopenmp"]
NVCC_FLAGS = ["-O3", "-DAT_PER_OPERATOR_HEADERS", "--expt-relaxed-constexpr", "--diag-suppress=20012"]


def requirement() -> str:
    """Returns any supported torch for a source distribution, or the torch series that a wheel is compiled for."""
    torch = None if "sdist" in sys.argv else toolchain.find_torch()
    return toolchain.SUPPORTED_TORCH if torch is None else torch.requirement


def extension_and_commands() -> dict[str, Any]:
    torch = toolchain.find_torch()
    wants_cuda = torch is not None and torch.cuda is not None and os.environ.get("WAKESLEEP_FORCE_CPU") != "1"
    wants_cuda = wants_cuda or os.environ.get("WAKESLEEP_FORCE_CUDA") == "1"
    plan = toolchain.make_plan(os.environ, torch, toolchain.find_toolkit(os.environ) if wants_cuda else None)
    print(plan.summary, flush=True)
    if plan.toolkit is not None:
        os.environ["CUDA_HOME"] = str(plan.toolkit.home)  # torch.utils.cpp_extension reads it on import
    os.environ["MAX_JOBS"] = str(toolchain.parallel_jobs(os.environ))
    # Another version of ninja could not read the log of this version, and would recompile everything.
    if find_spec("ninja") is not None:
        import ninja

        os.environ["PATH"] = ninja.BIN_DIR + os.pathsep + os.environ.get("PATH", os.defpath)

    import torch.cuda
    from setuptools.command.build import build
    from torch.utils import cpp_extension

    if plan.toolkit is not None:
        capabilities = [torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())]
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", toolchain.default_architectures(plan.toolkit, capabilities))

    # Each torch version has a separate folder, so that builds stay incremental.
    build_base = ROOT / "build" / f"torch-{plan.torch.version}"

    class Build(build):
        def finalize_options(self) -> None:
            self.build_base = str(build_base)
            super().finalize_options()

    class BuildKernels(cpp_extension.BuildExtension):
        def finalize_options(self) -> None:
            super().finalize_options()
            self.build_temp = str(build_base / "objects")  # by default, editable installs use a temporary folder

        def build_extension(self, ext: Extension) -> None:
            # Without the include folders of Python and torch, the command is the same in every environment. So
            # environments with different versions of torch share the objects.
            folders, self.compiler.include_dirs = self.compiler.include_dirs, []
            flags = {"cxx": ["-std=c++17", *cxx_flags], "nvcc": []}
            ext.extra_objects = self.compiler.compile(kernels, str(ROOT / "build" / "kernels"), extra_postargs=flags)
            self.compiler.include_dirs = folders
            super().build_extension(ext)

        def run(self) -> None:
            super().run()
            facts = {
                "TORCH_VERSION": plan.torch.version,
                "CUDA_VERSION": plan.toolkit.version if plan.toolkit else None,
                "CUDA_ARCHITECTURES": os.environ.get("TORCH_CUDA_ARCH_LIST") if plan.toolkit else None,
                "REASON": plan.reason,
            }
            lines = ['"""How this copy was built; written by setup.py."""', ""]
            lines += [f"{name} = {value!r}" for name, value in facts.items()]  # _build.pyi declares their types
            path = Path(self.get_ext_fullpath("wakesleep_ext._C")).with_name("_build.py")
            path.write_text("\n".join(lines) + "\n")
            # This file is part of uv's cache key (pyproject.toml). Every build rewrites it, so uv always builds again
            # instead of reusing a cached wheel. uv does not know that a wheel works with only one version of torch. An
            # incremental build takes seconds.
            (ROOT / "build" / "last-build").write_text(plan.summary + "\n")

    csrc = ROOT / "csrc"
    kernels = sorted(str(path.relative_to(ROOT)) for path in csrc.glob("kernels/cpu/*.cpp"))
    # The other host files are included by these.
    patterns = ["autograd.cpp", "backend.cpp", "module.cpp", "ops.cpp"]
    cxx_flags = [*CXX_FLAGS, *OPENMP_FLAGS]
    host_flags = [*cxx_flags]
    nvcc_flags = [*NVCC_FLAGS]
    include_dirs: list[str] = []
    kind = cpp_extension.CppExtension
    if plan.toolkit is not None:
        kind = cpp_extension.CUDAExtension
        patterns.append("kernels/cuda/*.cu")
        host_flags.append(f'-DWAKESLEEP_CUDA_VERSION="{plan.toolkit.version}"')
        if "NVCC_THREADS" in os.environ:
            nvcc_flags.append(f"--threads={os.environ['NVCC_THREADS']}")
        # The headers of cuBLAS and similar libraries may come with torch's wheels instead of the toolkit.
        include_dirs += [str(path) for path in plan.torch.site_packages.glob("nvidia/cu*/include")]
    extension = kind(
        "wakesleep_ext._C",
        sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in csrc.glob(pattern)),
        include_dirs=include_dirs,
        extra_compile_args={"cxx": host_flags, "nvcc": nvcc_flags},
        depends=sorted(
            str(path.relative_to(ROOT)) for path in csrc.rglob("*") if path.suffix in {".h", ".cuh", ".cpp"}
        ),
    )
    return {"ext_modules": [extension], "cmdclass": {"build": Build, "build_ext": BuildKernels}}


# Building metadata or a source distribution does not need torch.
setup(install_requires=[requirement()], **(extension_and_commands() if COMPILING & set(sys.argv) else {}))
