"""Test builds and their error messages, and install the source distribution as users do."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

import checkout
import pytest
import torch as torch_module
from checkout import ROOT

from wakesleep_ext import _C, _build, _loading, info

pytestmark = pytest.mark.source_tree

toolchain, backend = (checkout.load(f"build_support.{name}") for name in ("toolchain", "backend"))
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
    """One line says what is built, and why. A visible GPU is not needed."""
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
    """The toolkit is where the compiler reports it, not where the script is."""
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


@pytest.mark.parametrize(
    ("version", "requirement"),
    [
        ("2.13.0+cpu", "torch==2.13.*"),
        ("2.14.1", "torch==2.14.*"),
        ("2.15.0.dev20270101+cu130", "torch==2.15.*"),
        ("2.10.0a0+b4e4ee8.nv25.12", "torch==2.10.*"),
    ],
)
def test_a_wheel_requires_the_series_that_it_is_compiled_for(version: str, requirement: str) -> None:
    assert Torch(Path("site"), version, None).requirement == requirement


def test_pip_is_asked_for_a_torch_only_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """pip's isolated build can see the environment. With tools whose builds cannot, the build stops."""
    for hook in ("get_requires_for_build_wheel", "get_requires_for_build_editable"):
        monkeypatch.setattr(backend.build_meta, hook, lambda settings: [])
    monkeypatch.setenv("PIP_BUILD_TRACKER", "a folder of pip's")
    assert backend.get_requires_for_build_wheel() == ["ninja"]
    monkeypatch.setattr(toolchain, "find_torch", lambda: None)
    assert toolchain.SUPPORTED_TORCH in backend.get_requires_for_build_wheel()
    monkeypatch.delenv("PIP_BUILD_TRACKER")
    for hook in (backend.get_requires_for_build_wheel, backend.get_requires_for_build_editable):
        with pytest.raises(BuildError, match=r"(?s)cannot see the torch of your environment.*\n    pip install"):
            hook()
    hooks = ("prepare_metadata_for_build_wheel", "prepare_metadata_for_build_editable", "build_wheel", "build_editable")
    for name in hooks:
        with pytest.raises(BuildError, match="there is no torch to build against"):
            getattr(backend, name)("folder")


@pytest.mark.parametrize(
    ("environment", "source", "second"),
    [
        ({}, "/home/me/a clone", "pip install --no-build-isolation --no-cache-dir '/home/me/a clone'"),
        ({"UV": "uv", "PIP_BUILD_TRACKER": "x"}, "/src", "pip install --no-build-isolation --no-cache-dir /src"),
        ({}, "/tmp/pip-req-build-1a", "pip install --no-build-isolation --no-cache-dir SOURCE"),
        ({"UV": "uv"}, "/src", "uv pip install --no-build-isolation --reinstall-package wakesleep_ext /src"),
        (
            {"UV_INTERNAL__BUILD_DIR": "x"},
            "/home/me/.cache/uv/git-v0/checkouts/1/2",
            "uv pip install --no-build-isolation --reinstall-package wakesleep_ext SOURCE",
        ),
    ],
)
def test_the_two_commands(environment: dict[str, str], source: str, second: str) -> None:
    """They name the source, unless it was unpacked into a temporary folder."""
    said = toolchain.commands_without_isolation(environment, Path(source))
    assert _commands(said)[1] == second
    assert ("SOURCE is what you asked to install" in said) == second.endswith("SOURCE")


def _commands(message: str) -> list[str]:
    """Return the indented lines, which are commands."""
    return re.findall(r"^\s+((?:uv )?pip install .*)$", message, re.M)


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


@pytest.fixture
def gpu_without_kernels(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Simulate a torch with CUDA that finds a GPU, and kernels for the CPU only."""
    monkeypatch.setattr(torch_module.version, "cuda", "13.0")
    monkeypatch.setattr(torch_module.cuda, "_device_count_nvml", lambda: 1)
    monkeypatch.setattr(_build, "CUDA_VERSION", None)
    monkeypatch.setattr(_build, "REASON", "no nvcc was found")
    return monkeypatch


def test_a_gpu_that_the_kernels_do_not_use(gpu_without_kernels: pytest.MonkeyPatch) -> None:
    """The import warns why there are no CUDA kernels, and how to get them."""
    with pytest.warns(RuntimeWarning, match=r"built without CUDA kernels \(no nvcc was found\)") as said:
        _loading.load_kernels()
    assert len(said) == 1
    assert "CUDA 13.0 toolkit" in str(said[0].message)
    assert "`WAKESLEEP_FORCE_CUDA=1 pip install --force-reinstall" in str(said[0].message)


def _fails() -> int:
    raise OSError("no NVML")


@pytest.mark.parametrize(
    ("owner", "name", "value"),
    [
        (_build, "CUDA_VERSION", "13.0"),
        (torch_module.version, "cuda", None),
        (torch_module.cuda, "_device_count_nvml", lambda: 0),
        (torch_module.cuda, "_device_count_nvml", lambda: warnings.warn("no NVML", stacklevel=1) or -1),
        (torch_module.cuda, "_device_count_nvml", _fails),
    ],
    ids=["CUDA kernels", "a CPU torch", "no GPU", "no driver", "an error"],
)
def test_no_warning_without_cause(gpu_without_kernels: pytest.MonkeyPatch, owner: Any, name: str, value: Any) -> None:
    gpu_without_kernels.setattr(owner, name, value)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _loading.load_kernels()


def test_the_import_does_not_initialise_cuda(gpu_without_kernels: pytest.MonkeyPatch) -> None:
    """A process that has initialised CUDA cannot use it in a forked child."""

    def initialises(*arguments: Any) -> Any:
        raise AssertionError("CUDA was initialised")

    for owner, name in ((torch_module._C, "_cuda_getDeviceCount"), (torch_module.cuda, "_lazy_init")):
        gpu_without_kernels.setattr(owner, name, initialises, raising=False)
    with pytest.warns(RuntimeWarning, match="WAKESLEEP_FORCE_CUDA=1"):
        _loading.load_kernels()


def test_info_says_why_these_kernels_were_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_build, "REASON", "because")
    assert "(because)" in info.info()["built"]


class Installed(metadata.Distribution):
    """The files that an installer leaves in a dist-info folder."""

    def __init__(self, installer: str, record: dict[str, Any] | None) -> None:
        self._texts = {"INSTALLER": f"{installer}\n", "direct_url.json": None if record is None else json.dumps(record)}

    def read_text(self, filename: str) -> str | None:
        return self._texts.get(filename)

    def locate_file(self, path: Any) -> Any:
        return path


UNKNOWN = "SOURCE (a checkout or a source distribution of wakesleep_ext)"
PIP = "pip install --force-reinstall --no-deps --no-cache-dir"
UV = "uv pip install --no-deps --no-build-isolation --reinstall-package wakesleep_ext"
LOCAL, ARCHIVE = ROOT.as_uri(), (ROOT / "setup.py").as_uri()  # a file serves as an archive: it is there
GIT = {"url": "https://example.org/w.git", "vcs_info": {"vcs": "git", "commit_id": "1a2b"}}


@pytest.mark.parametrize(
    ("installer", "record", "command"),
    [
        ("pip", {"url": LOCAL, "dir_info": {}}, f"{PIP} {ROOT}"),
        ("uv", {"url": LOCAL, "dir_info": {}}, f"{UV} {ROOT}"),
        ("pip", {"url": LOCAL, "dir_info": {"editable": True}}, f"{PIP} -e {ROOT}"),
        ("uv", {"url": LOCAL, "dir_info": {"editable": True}}, f"{UV} -e {ROOT}"),
        ("pip", {"url": ARCHIVE, "archive_info": {}}, f"{PIP} {ROOT / 'setup.py'}"),
        ("pip", {"url": "file:///gone/away", "dir_info": {}}, f"{PIP} {UNKNOWN}"),
        ("pip", {"url": f"{LOCAL}/dist/w.whl", "archive_info": {}}, f"{PIP} {UNKNOWN}"),
        ("pip", {"url": "https://example.org/w.tar.gz", "archive_info": {}}, f"{PIP} https://example.org/w.tar.gz"),
        ("pip", GIT, f"{PIP} git+https://example.org/w.git@1a2b"),
        ("pip", None, f"{PIP} {ROOT}"),  # built in place
    ],
)
def test_reinstalling_needs_no_index(
    installer: str, record: dict[str, Any] | None, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command names the source that this copy came from."""
    monkeypatch.setattr(info, "distribution", lambda name: Installed(installer, record))
    monkeypatch.setattr(info, "__file__", str(ROOT / "wakesleep_ext" / "info.py"))
    assert info.reinstall_command("A=1") == f"A=1 {command}"


def test_reinstalling_an_installed_wheel_of_unknown_source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(info, "distribution", lambda name: Installed("pip", None))
    monkeypatch.setattr(info, "__file__", str(tmp_path / "wakesleep_ext" / "info.py"))
    assert info.reinstall_command() == f"{PIP} {UNKNOWN}"


def test_the_stubs_name_what_the_modules_have() -> None:
    for module, name in ((_C, "_C"), (_build, "_build")):
        body = ast.parse((ROOT / f"wakesleep_ext/{name}.pyi").read_text()).body
        stubs = {_name_of(node): node for node in body if _name_of(node)}
        public = {name for name in vars(module) if not name.startswith("_")}
        assert {name for name in stubs if not name.startswith("_")} == public
        for owner, node in stubs.items():
            if isinstance(node, ast.ClassDef) and owner in public:
                members = {name for name in vars(getattr(module, owner)) if not name.startswith("_")}
                assert {_name_of(member) for member in node.body} - {"__init__"} == members


def _name_of(node: ast.stmt) -> str | None:
    return getattr(node, "name", None) or getattr(getattr(node, "target", None), "id", None)


def test_versions_that_stand_in_two_files() -> None:
    """pre-commit hooks use the versions of constraints.txt, and the citation has the version of the package."""
    pinned = set(re.findall(r"^(\S+==\S+)$", (ROOT / "constraints.txt").read_text(), re.M))
    hooks = set(re.findall(r"[\w-]+==[\w.]+", (ROOT / ".pre-commit-config.yaml").read_text()))
    assert {hook.partition("==")[0] for hook in hooks} == {"clang-format", "mypy", "ruff"}
    assert hooks <= pinned
    project = (ROOT / "pyproject.toml").read_text()
    versions = [
        re.search(pattern, text, re.M)
        for pattern, text in (
            (r'^version = "(.*)"$', project),
            (r"^version: (.*)$", (ROOT / "CITATION.cff").read_text()),
        )
    ]
    assert len({found and found.group(1) for found in versions}) == 1
    assert f'requires = ["setuptools>={toolchain.OLDEST_SETUPTOOLS}"]' in project


def _with_requirements(name: str) -> set[str]:
    """Return a distribution and its requirements."""
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
def sources(tmp_path: Path) -> Path:
    """A copy of the checkout."""
    return shutil.copytree(ROOT, tmp_path / "checkout", ignore=shutil.ignore_patterns(*NOT_SOURCES))


@pytest.fixture
def archive(sources: Path, tmp_path: Path) -> Path:
    """The source distribution of a copy of the checkout."""
    sdist = "from build_support import backend; import sys; print(backend.build_sdist(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", sdist, str(tmp_path)],
        cwd=sources, stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    return tmp_path / done.stdout.splitlines()[-1]


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """A new environment with torch and its requirements."""
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
    """Install as users do, isolated. The cache is off, because it would keep a wheel of empty kernels.

    The constraint protects the torch of the tests, which the environment links to: pip must not replace it.
    """
    constraints = archive.with_name("constraints.txt")
    constraints.write_text(f"torch=={metadata.version('torch')}\n")
    options = ["--disable-pip-version-check", "--no-cache-dir", "--constraint", str(constraints)]
    command = [environment / "bin/python", "-m", "pip", "install", *options, str(archive)]
    subprocess.run(command, env=VARIABLES | variables, cwd=archive.parent, check=True)


def _run(environment: Path, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [environment / "bin" / program, *arguments],
        cwd=environment.parent, env=VARIABLES, capture_output=True, text=True, check=False,
    )  # fmt: skip


def _check_that_it_works(environment: Path) -> None:
    """Check that the ops run, torch is unchanged, numpy is absent, and the trainer names its missing extra."""
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
    assert "Install them: pip install docstring_parser matplotlib numpy safetensors" in command.stderr


@pytest.fixture
def compiler(tmp_path: Path) -> str:
    """A compiler that makes empty kernels."""
    path = tmp_path / "c++"
    path.write_text(STUB)
    path.chmod(0o755)
    return str(path)


FAKE_TORCH = {
    "__init__.py": "",
    "cuda.py": "",
    "utils/__init__.py": "",
    "utils/cpp_extension.py": """
from pathlib import Path
from setuptools import Extension
from setuptools.command.build_ext import build_ext
class Compiler:
    include_dirs = []
    def compile(self, *arguments, **options):
        return []
class BuildExtension(build_ext):
    def build_extensions(self):
        self.compiler = Compiler()
        super().build_extensions()
    def build_extension(self, extension):
        path = Path(self.get_ext_fullpath(extension.name))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
def CppExtension(name, sources, **rest):
    return Extension(name, sources)
""",
}


def _write_torch(environment: Path, version: str) -> None:
    """Write a torch that compiles nothing. It is not linked, because uv would write through to the tests' torch."""
    for path in _site(environment).glob("torch*"):
        shutil.rmtree(path)
    texts = {f"torch/{name}": text for name, text in FAKE_TORCH.items()}
    texts["torch/version.py"] = f"__version__ = '{version}+cpu'\ncuda: str | None = None\n"
    _write_distribution(environment, "torch", version, texts)


def _write_distribution(environment: Path, name: str, version: str, texts: dict[str, str]) -> None:
    folder = f"{name}-{version}.dist-info"
    texts = texts | {
        f"{folder}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{folder}/RECORD": "",
    }
    for file, text in texts.items():
        path = _site(environment) / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture
def fake_environment(tmp_path: Path) -> Path:
    """A new environment with the setuptools that torch requires, without downloads."""
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    for path in {path.parts[0] for path in metadata.files("setuptools") or ()} - {"..", "__pycache__"}:
        found = Path(str(metadata.distribution("setuptools").locate_file(path)))
        (shutil.copytree if found.is_dir() else shutil.copy)(found, _site(environment) / path)
    _write_distribution(environment, "ninja", "99", {})
    _write_torch(environment, "2.98.0")
    return environment


def _uv(directory: Path, *arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the real uv of the extra `test`, with a separate cache."""
    uv = shutil.which("uv", path=sysconfig.get_path("scripts") + os.pathsep + os.environ.get("PATH", os.defpath))
    assert uv is not None, "uv is missing; install the extra 'test'"
    # uv breaks the lines of errors after so many COLUMNS
    others = ("VIRTUAL_ENV", "UV_", "COLUMNS")
    environment = {name: value for name, value in VARIABLES.items() if not name.startswith(others)}
    return subprocess.run(
        [uv, *arguments],
        cwd=directory, env=environment | {"UV_CACHE_DIR": str(directory.parent / "cache")} | variables,
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def _metadata(folder: Path) -> str:
    (path,) = folder.glob("wakesleep_ext-*.dist-info/METADATA")
    return path.read_text()


def test_uv_in_a_checkout(sources: Path, fake_environment: Path) -> None:
    """uv builds for the torch of the environment, and builds again for another torch."""
    for series in ("2.98", "2.97"):
        _write_torch(fake_environment, f"{series}.0")
        done = _uv(sources, "pip", "install", "--python", fake_environment, ".", UV_OFFLINE="1")
        assert done.returncode == 0, done.stderr
        assert f"Requires-Dist: torch=={series}.*\n" in _metadata(_site(fake_environment))
        build = (_site(fake_environment) / "wakesleep_ext/_build.py").read_text()
        assert f"TORCH_VERSION = '{series}.0+cpu'\n" in build


def test_uv_elsewhere_stops_with_commands_that_work(sources: Path, fake_environment: Path) -> None:
    """uv's isolated build cannot see the environment. So it compiles nothing, and prints commands that work."""
    elsewhere = fake_environment.parent / "elsewhere"
    elsewhere.mkdir()
    done = _uv(elsewhere, "pip", "install", "--python", fake_environment, sources)
    assert done.returncode != 0
    assert "cannot see the torch of your environment" in done.stderr
    assert "Traceback" not in done.stderr
    for command in _commands(done.stderr):
        done = _uv(elsewhere, *shlex.split(command)[1:], "--python", fake_environment, UV_OFFLINE="1")
        assert done.returncode == 0, done.stderr
    assert "Requires-Dist: torch==2.98.*\n" in _metadata(_site(fake_environment))


def test_uv_without_torch_stops(sources: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "none"], check=True)
    done = _uv(sources, "pip", "install", "--python", tmp_path / "none", ".", UV_OFFLINE="1")
    assert done.returncode != 0
    assert "the environment has no setuptools. Nothing was compiled." in done.stderr
    assert len(_commands(done.stderr)) == 2
    assert "Traceback" not in done.stderr


def _python_files(package: Path) -> set[str]:
    return {str(path.relative_to(package)) for path in package.rglob("*.py*") if path.suffix != ".pyc"}


def test_the_source_distribution_installs_where_only_torch_is(archive: Path, environment: Path, compiler: str) -> None:
    """A stub compiler makes empty kernels, and the test then replaces them with real ones."""
    _install(archive, environment, CXX=compiler)
    installed = _metadata(_site(environment))
    assert {"License-Expression: BSD-3-Clause", "License-File: LICENSE"} <= set(installed.splitlines())
    (licence,) = _site(environment).glob("wakesleep_ext-*.dist-info/licenses/LICENSE")
    assert licence.read_text() == (ROOT / "LICENSE").read_text()
    assert _requirements(installed) == _requirements(_prepared_metadata(archive.parent))
    package = _site(environment) / "wakesleep_ext"
    assert _python_files(package) == _python_files(ROOT / "wakesleep_ext")
    info = _run(environment, "wakesleep", "info")
    assert (info.returncode, "Traceback" in info.stderr) == (1, False)
    assert "do not load with torch" in info.stdout

    shutil.copy(_C.__file__, package)
    _check_that_it_works(environment)


def _requirements(text: str) -> set[str]:
    return set(re.findall(r"^Requires-Dist: (.*)$", text, re.M))


def _prepared_metadata(folder: Path) -> str:
    """Return the metadata that a tool reads from a copy of the checkout before it builds a wheel."""
    prepare = "from build_support import backend; import sys; backend.prepare_metadata_for_build_wheel(sys.argv[1])"
    (folder / "prepared").mkdir()
    command = [sys.executable, "-c", prepare, str(folder / "prepared")]
    subprocess.run(command, cwd=folder / "checkout", stdout=subprocess.DEVNULL, check=True)
    return _metadata(folder / "prepared")


def test_the_source_distribution_has_every_file_that_is_compiled(archive: Path) -> None:
    with tarfile.open(archive) as files:
        packed = {name.partition("/")[2] for name in files.getnames()}
    assert {"LICENSE", "CITATION.cff", "SECURITY.md"} <= packed
    needed = [path for folder in ("csrc", "build_support") for path in (ROOT / folder).rglob("*.*")]
    assert {str(path.relative_to(ROOT)) for path in needed if path.suffix != ".pyc"} <= packed


@pytest.mark.thorough
def test_the_source_distribution_compiles_where_only_torch_is(archive: Path, environment: Path) -> None:
    """It compiles against the installed torch and its headers."""
    _install(archive, environment)
    _check_that_it_works(environment)
