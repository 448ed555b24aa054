"""What is built, and what is said where it cannot be; then the source distribution, installed as people install it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
from importlib import metadata
from pathlib import Path

import checkout
import pytest
from checkout import ROOT

from wakesleep_ext import _C

pytestmark = pytest.mark.source_tree

toolchain = checkout.load("build_support.toolchain")
Torch, Toolkit, make_plan, BuildError = toolchain.Torch, toolchain.Toolkit, toolchain.make_plan, toolchain.BuildError

CPU_TORCH = Torch(Path("site"), "2.13.0+cpu", None)
CUDA_TORCH = Torch(Path("site"), "2.14.1+cu130", "13.0")
TOOLKIT = Toolkit(Path("cuda"), "13.0")
CUDA, CPU = {"WAKESLEEP_FORCE_CUDA": "1"}, {"WAKESLEEP_FORCE_CPU": "1"}


@pytest.mark.parametrize(
    ("environment", "torch", "toolkit", "summary"),
    [
        ({}, CPU_TORCH, TOOLKIT, "building CPU kernels for torch 2.13.0+cpu (a CPU build of torch)"),
        ({}, CUDA_TORCH, TOOLKIT, "building CPU and CUDA 13.0 kernels for torch 2.14.1+cu130 (nvcc in cuda)"),
        (
            {},
            CUDA_TORCH,
            None,
            "building CPU kernels for torch 2.14.1+cu130 (torch has CUDA 13.0, but no nvcc was found",
        ),
        (CPU, CUDA_TORCH, TOOLKIT, "building CPU kernels for torch 2.14.1+cu130 (WAKESLEEP_FORCE_CPU=1)"),
        (CUDA, CUDA_TORCH, Toolkit(Path("cuda"), "13.2"), "building CPU and CUDA 13.2 kernels"),
    ],
)
def test_plan(environment: dict[str, str], torch: Torch, toolkit: Toolkit | None, summary: str) -> None:
    """One line says what is built, and why; no GPU is asked for."""
    said = make_plan(environment, torch, toolkit).summary
    assert said.startswith(f"wakesleep_ext: {summary}")
    assert "\n" not in said


@pytest.mark.parametrize(
    ("environment", "torch", "toolkit", "message"),
    [
        (CUDA, CUDA_TORCH, None, r"no nvcc was found; install the CUDA toolkit 13.0 and put its nvcc on the PATH"),
        (CUDA, CPU_TORCH, TOOLKIT, r"torch 2.13.0\+cpu is a CPU build; install a CUDA build"),
        ({}, CUDA_TORCH, Toolkit(Path("cuda"), "12.8"), r"is CUDA 12.8, torch 2.14.1\+cu130 was built with CUDA 13.0"),
        (CUDA | CPU, CUDA_TORCH, TOOLKIT, r"exclude each other"),
        ({}, None, TOOLKIT, r"no torch to build against; install one: pip install 'torch>="),
    ],
)
def test_what_cannot_be_built(
    environment: dict[str, str], torch: Torch | None, toolkit: Toolkit | None, message: str
) -> None:
    with pytest.raises(BuildError, match=message):
        make_plan(environment, torch, toolkit)


def _write_nvcc(path: Path, release: str, top: Path | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    dry_run = f"echo '#$ TOP={top}' >&2" if top else "exit 1"
    path.write_text(
        f"#!/bin/sh\n[ \"$1\" = --version ] && echo 'Cuda compilation tools, release {release}, V{release}.1' && exit\n"
        f"{dry_run}\n"
    )
    path.chmod(0o755)


def test_the_toolkit_of_an_nvcc_on_the_path(tmp_path: Path) -> None:
    _write_nvcc(tmp_path / "cuda-13.0/bin/nvcc", "13.0")
    found = toolchain.find_toolkit({"PATH": f"{tmp_path / 'cuda-13.0/bin'}:/usr/bin:/bin"})
    assert found == Toolkit((tmp_path / "cuda-13.0").resolve(), "13.0")


def test_an_nvcc_that_is_a_wrapper_script(tmp_path: Path) -> None:
    """The toolkit is where the compiler says it works from, not where the script lies."""
    (tmp_path / "real").mkdir()
    _write_nvcc(tmp_path / "bin/nvcc", "13.0", top=tmp_path / "real")
    found = toolchain.find_toolkit({"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin"})
    assert found == Toolkit((tmp_path / "real").resolve(), "13.0")


def test_cuda_home_comes_first(tmp_path: Path) -> None:
    _write_nvcc(tmp_path / "on_path/bin/nvcc", "13.0")
    _write_nvcc(tmp_path / "home/bin/nvcc", "12.9")
    environment = {"PATH": f"{tmp_path / 'on_path/bin'}:/usr/bin:/bin", "CUDA_HOME": str(tmp_path / "home")}
    assert toolchain.find_toolkit(environment) == Toolkit((tmp_path / "home").resolve(), "12.9")
    assert toolchain.find_toolkit({**environment, "CUDA_HOME": str(tmp_path / "nowhere")}) is None


def test_an_nvcc_that_does_not_run(tmp_path: Path) -> None:
    nvcc = tmp_path / "bin/nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/nowhere\n")
    nvcc.chmod(0o755)
    assert toolchain.find_toolkit({"PATH": str(nvcc.parent)}) is None


def test_the_torch_of_a_directory(tmp_path: Path) -> None:
    assert toolchain.find_torch([tmp_path]) is None
    (tmp_path / "torch").mkdir()
    version = tmp_path / "torch" / "version.py"
    version.write_text("__version__ = '2.11.0+cu130'\ncuda: Optional[str] = '13.0'\n")
    assert toolchain.find_torch([tmp_path / "none", tmp_path]) == Torch(tmp_path, "2.11.0+cu130", "13.0")
    version.write_text("__version__ = '2.13.0+cpu'\ncuda: Optional[str] = None\n")
    assert toolchain.find_torch([tmp_path]) == Torch(tmp_path, "2.13.0+cpu", None)


def test_jobs() -> None:
    assert toolchain.parallel_jobs({"MAX_JOBS": "7"}, available_bytes=0) == 7
    assert toolchain.parallel_jobs({}, available_bytes=0) == 1
    assert 1 <= toolchain.parallel_jobs({}, available_bytes=2**50) <= (os.cpu_count() or 1)


def test_architectures() -> None:
    assert toolchain.default_architectures(TOOLKIT) == "8.0;9.0;10.0+PTX"
    assert toolchain.default_architectures(Toolkit(Path("cuda"), "12.6")) == "8.0;9.0+PTX"
    assert toolchain.default_architectures(TOOLKIT, [(9, 0), (8, 6), (9, 0)]) == "8.6;9.0+PTX"


def test_a_build_that_cannot_be_ends_before_it_compiles(tmp_path: Path) -> None:
    environment = {**os.environ, **CUDA, "PATH": "/usr/bin:/bin"}
    environment.pop("CUDA_HOME", None)
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(tmp_path)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "WAKESLEEP_FORCE_CUDA=1, but" in done.stderr
    assert "install" in done.stderr
    assert "Traceback" not in done.stderr


def _with_requirements(name: str) -> set[str]:
    """A distribution and what it needs."""
    needed, new = set(), {name}
    while new:
        needed |= new
        new = {
            requirement
            for owner in new
            for entry in metadata.requires(owner) or ()
            if "extra ==" not in entry
            and (requirement := re.split(r"[^\w.-]", entry, maxsplit=1)[0]) not in needed
            and _is_installed(requirement)
        }
    return needed


def _is_installed(name: str) -> bool:
    try:
        metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return False
    return True


STUB = """#!/bin/sh
# Compiles nothing: for each source an empty object. Links what it is given.
previous= output= compiles=
for argument; do
  [ "$previous" = -o ] && output=$argument
  [ "$argument" = -c ] && compiles=yes
  previous=$argument
done
if [ "$compiles" ]; then exec c++ -x c++ -fPIC -c /dev/null -o "$output"; else exec c++ "$@"; fi
"""


# What a checkout has besides its sources. The tests that run meanwhile may be writing to it.
NOT_SOURCES = (".*", "__pycache__", "build", "dist", "runs", "*.egg-info", "*.so", "_build.py")


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """The source distribution of a copy of the checkout."""
    checkout = shutil.copytree(ROOT, tmp_path / "checkout", ignore=shutil.ignore_patterns(*NOT_SOURCES))
    sdist = "from build_support import backend; import sys; print(backend.build_sdist(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", sdist, str(tmp_path)],
        cwd=checkout, stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    return tmp_path / done.stdout.splitlines()[-1]


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """A new environment that has torch and its requirements."""
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    site = _site(environment)
    for name in _with_requirements("torch"):
        for file in {
            path.parts[0] for path in metadata.files(name) or () if path.parts[0] not in ("..", "__pycache__")
        }:
            if not (site / file).exists():
                (site / file).symlink_to(Path(str(metadata.distribution(name).locate_file(file))))
    return environment


def _site(environment: Path) -> Path:
    return next((environment / "lib").glob("python3*/site-packages"))


VARIABLES = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MAX_JOBS")} | CPU


def _install(archive: Path, environment: Path, **variables: str) -> None:
    """Installs as people type it, isolated. No cache: it would keep a wheel of empty kernels."""
    options = ["--disable-pip-version-check", "--no-cache-dir"]
    command = [environment / "bin/python", "-m", "pip", "install", *options, str(archive)]
    subprocess.run(command, env=VARIABLES | variables, cwd=archive.parent, check=True)


def _run(environment: Path, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [environment / "bin" / program, *arguments],
        cwd=environment.parent, env=VARIABLES, capture_output=True, text=True, check=False,
    )  # fmt: skip


def _check_that_it_works(environment: Path) -> None:
    """The ops run. The environment keeps its torch and gets no numpy. The trainer names its missing extra."""
    example = (
        "import torch, wakesleep_ext as ws; mu=torch.zeros(4,8,requires_grad=True); lv=torch.zeros(4,8); "
        "z,lq=ws.gaussian_rsample_log_prob(mu,lv,(16,)); print(z.shape,lq.shape)"
    )
    assert _run(environment, "python", "-c", example).stdout == "torch.Size([16, 4, 8]) torch.Size([16, 4])\n"
    installed = _run(environment, "python", "-m", "pip", "list", "--format=freeze").stdout
    assert f"torch=={metadata.version('torch')}" in installed
    assert "numpy" not in installed
    command = _run(environment, "wakesleep", "train")
    assert command.returncode == 1
    assert "missing; install with: pip install 'wakesleep_ext[train]'" in command.stderr


def _python_files(package: Path) -> set[str]:
    return {str(path.relative_to(package)) for path in package.rglob("*.py*") if path.suffix != ".pyc"}


def test_the_source_distribution_installs_where_only_torch_is(archive: Path, environment: Path) -> None:
    """A stub compiler makes empty kernels. Those that run this test then replace them."""
    compiler = archive.parent / "c++"
    compiler.write_text(STUB)
    compiler.chmod(0o755)
    _install(archive, environment, CXX=str(compiler))
    package = _site(environment) / "wakesleep_ext"
    assert _python_files(package) == _python_files(ROOT / "wakesleep_ext")
    info = _run(environment, "wakesleep", "info")
    assert (info.returncode, "Traceback" in info.stderr) == (1, False)
    assert "do not load beside torch" in info.stdout

    shutil.copy(_C.__file__, package)
    _check_that_it_works(environment)


def test_the_source_distribution_has_every_file_that_is_compiled(archive: Path) -> None:
    with tarfile.open(archive) as files:
        packed = {name.partition("/")[2] for name in files.getnames()}
    needed = [path for folder in ("csrc", "build_support") for path in (ROOT / folder).rglob("*.*")]
    assert {str(path.relative_to(ROOT)) for path in needed if path.suffix != ".pyc"} <= packed


@pytest.mark.thorough
def test_the_source_distribution_compiles_where_only_torch_is(archive: Path, environment: Path) -> None:
    """It compiles against the torch that is there, headers included."""
    _install(archive, environment)
    _check_that_it_works(environment)
