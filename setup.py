"""Builds the one extension, wakesleep_ext._C, from csrc/. Everything else about the package is in pyproject.toml."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from setuptools import setup

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # build_support, also where pip runs this file

from build_support import toolchain  # noqa: E402

COMPILING = {"build", "build_ext", "bdist_wheel", "editable_wheel", "develop", "install"}

# No contraction: every instruction set then returns the same bits (csrc/cpu/vec.h). No jump threading and no partial
# redundancy elimination: they turn selects into branches, and loops that vectorise into loops that do not.
CXX_FLAGS = [
    *("-O3", "-g0", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"),
    *("-fno-thread-jumps", "-fno-tree-pre"),
    # torch's headers then include the headers of single functions rather than all of them, which halves their time.
    "-DAT_PER_OPERATOR_HEADERS",
    # Vectors wider than the baseline's are passed between functions only where these are inlined.
    *("-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-psabi"),
]
# at::parallel_for is a header and needs OpenMP to be compiled in. It is not linked: the runtime, and with it the pool
# of threads, is then the one that torch has loaded.
OPENMP_FLAGS = ["-fopenmp"] if sys.platform != "darwin" else ["-Xclang", "-fopenmp"]
NVCC_FLAGS = ["-O3", "-DAT_PER_OPERATOR_HEADERS", "--expt-relaxed-constexpr", "--diag-suppress=20012"]


def requirement() -> str:
    """A source distribution takes any supported torch, a wheel the series that its kernels are compiled for."""
    torch = None if "sdist" in sys.argv else toolchain.find_torch()
    return toolchain.SUPPORTED_TORCH if torch is None else torch.requirement


def extension_and_commands() -> dict[str, Any]:
    torch = toolchain.find_torch()
    wants_cuda = torch is not None and torch.cuda is not None and os.environ.get("WAKESLEEP_FORCE_CPU") != "1"
    wants_cuda = wants_cuda or os.environ.get("WAKESLEEP_FORCE_CUDA") == "1"
    plan = toolchain.make_plan(os.environ, torch, toolchain.find_toolkit(os.environ) if wants_cuda else None)
    print(plan.summary, flush=True)
    if plan.toolkit is not None:
        os.environ["CUDA_HOME"] = str(plan.toolkit.home)  # read when torch.utils.cpp_extension is imported
    os.environ["MAX_JOBS"] = str(toolchain.parallel_jobs(os.environ))
    if find_spec("ninja") is not None:  # its log tells nothing to another version, which would compile everything again
        import ninja

        os.environ["PATH"] = ninja.BIN_DIR + os.pathsep + os.environ.get("PATH", os.defpath)

    import torch.cuda
    from setuptools.command.build import build
    from torch.utils import cpp_extension

    if plan.toolkit is not None:
        capabilities = [torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())]
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", toolchain.default_architectures(plan.toolkit, capabilities))

    build_base = ROOT / "build" / f"torch-{plan.torch.version}"  # one for each torch, and so incremental

    class Build(build):
        def finalize_options(self) -> None:
            self.build_base = str(build_base)
            super().finalize_options()

    class BuildKernels(cpp_extension.BuildExtension):
        def finalize_options(self) -> None:
            super().finalize_options()
            self.build_temp = str(build_base / "objects")  # where an editable install would use a temporary folder

        def run(self) -> None:
            super().run()
            facts = {
                "TORCH_VERSION": plan.torch.version,
                "CUDA_VERSION": plan.toolkit.version if plan.toolkit else None,
                "CUDA_ARCHITECTURES": os.environ.get("TORCH_CUDA_ARCH_LIST") if plan.toolkit else None,
                "REASON": plan.reason,
            }
            lines = ['"""How this copy was built; written by setup.py."""', ""]
            lines += [f"{name} = {value!r}" for name, value in facts.items()]  # typed in _build.pyi
            path = Path(self.get_ext_fullpath("wakesleep_ext._C")).with_name("_build.py")
            path.write_text("\n".join(lines) + "\n")
            # uv's key to the wheels that it caches (pyproject.toml): new after every build, for uv does not know that
            # a wheel is for one torch. A build that finds its objects takes seconds.
            (ROOT / "build" / "last-build").write_text(plan.summary + "\n")

    csrc = ROOT / "csrc"
    patterns = ["*.cpp", "cpu/*.cpp"]  # autograd.cpp includes autograd/*.cpp
    cxx_flags = [*CXX_FLAGS, *OPENMP_FLAGS]
    nvcc_flags = [*NVCC_FLAGS]
    include_dirs: list[str] = []
    kind = cpp_extension.CppExtension
    if plan.toolkit is not None:
        kind = cpp_extension.CUDAExtension
        patterns.append("cuda/*.cu")
        cxx_flags.append(f'-DWAKESLEEP_CUDA_VERSION="{plan.toolkit.version}"')
        if "NVCC_THREADS" in os.environ:
            nvcc_flags.append(f"--threads={os.environ['NVCC_THREADS']}")
        # the headers of cuBLAS and its like, where they come with torch's wheels rather than with the toolkit
        include_dirs += [str(path) for path in plan.torch.site_packages.glob("nvidia/cu*/include")]
    extension = kind(
        "wakesleep_ext._C",
        sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in csrc.glob(pattern)),
        include_dirs=include_dirs,
        extra_compile_args={"cxx": cxx_flags, "nvcc": nvcc_flags},
        depends=sorted(
            str(path.relative_to(ROOT)) for path in csrc.rglob("*") if path.suffix in {".h", ".cuh", ".cpp"}
        ),
    )
    return {"ext_modules": [extension], "cmdclass": {"build": Build, "build_ext": BuildKernels}}


# Metadata and source distributions need no torch.
setup(install_requires=[requirement()], **(extension_and_commands() if COMPILING & set(sys.argv) else {}))
