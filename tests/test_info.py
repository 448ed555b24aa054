"""Test `wakesleep info` and `wakesleep selftest`, in intact and broken installations."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import wakesleep_ext as ws
from wakesleep_ext import cli, info, ops, selftest
from wakesleep_ext._op_table import OPS


def test_facts() -> None:
    facts = info.info()
    assert facts["wakesleep_ext"] == ws.__version__
    assert facts["torch"].startswith(torch.__version__)
    assert facts["kernels"] == "loaded"
    assert torch.__version__.split("+")[0] in facts["built"]
    assert facts["SIMD"].startswith(torch.backends.cpu.get_cpu_capability())


def test_whatever_fails_is_reported(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(name: str) -> Any:
        raise ImportError(f"no {name} here")

    monkeypatch.setattr(info.importlib, "import_module", broken)
    assert info.main() == 1
    assert "ImportError: no torch here" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda package: (package / "_C.broken.so").rename(package / _binary_name()), "do not load with torch"),
        (lambda package: (package / "_build.py").write_text("raise ImportError"), "has no compiled kernels"),
        (lambda package: (package / "_build.py").write_text("TORCH_VERSION = '1.0.0'"), "was built for torch 1.0.0"),
    ],
    ids=["not a binary", "never built", "another torch"],
)
def test_a_broken_installation_is_described(tmp_path: Path, damage: Callable[[Path], Any], message: str) -> None:
    package = tmp_path / "wakesleep_ext"
    shutil.copytree(Path(ws.__file__).parent, package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (package / "_C.broken.so").write_bytes(b"\x7fELF, or so it says")
    damage(package)

    # -c puts the working directory, and with it the damaged copy, before everything that is installed
    commands = (
        "import sys, _wakesleep_command as command\n"
        "for name in ('info', 'train'):\n"
        "    sys.argv[1:] = [name]; print('status', command.main()); print('-- end of', name, file=sys.stderr)"
    )
    arguments = [sys.executable, "-c", commands]
    done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, check=True)
    *of_info, status, of_train = done.stdout.splitlines()
    assert (status, of_train) == ("status 1", "status 1")
    assert done.stderr.startswith("-- end of info\nwakesleep: ")
    assert message in done.stderr
    assert message in "\n".join(of_info)
    assert "Traceback" not in done.stdout + done.stderr


def _binary_name() -> str:
    from wakesleep_ext import _C

    return Path(_C.__file__).name


@pytest.mark.parametrize(
    ("capability", "architectures", "verdict"),
    [
        ((9, 0), "8.0;9.0", "supported"),
        ((8, 6), "8.0;9.0", "supported"),  # binaries run on later minor versions
        ((10, 0), "8.0 9.0+PTX", "supported by compiling PTX at first use"),
        ((10, 0), "8.0;9.0", 'TORCH_CUDA_ARCH_LIST="10.0" pip install'),
        ((7, 5), "8.0;9.0+PTX", "compiled for 8.0;9.0+PTX"),
        ((9, 0), "9.0a", "supported"),
    ],
)
def test_gpus_older_and_newer_than_the_kernels(capability: tuple[int, int], architectures: str, verdict: str) -> None:
    assert verdict in info.gpu_support(capability, architectures)


def test_selftest_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["selftest"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[1] for line in lines} == set(ops.__all__)
    assert all(line.startswith("pass") for line in lines)


@pytest.mark.parametrize("name", ops.__all__)
def test_selftest_finds_the_op_that_is_wrong(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = getattr(ops, name)

    def wrong(*arguments: Any, **keywords: Any) -> Any:
        result = right(*arguments, **keywords)
        first = result
        while not isinstance(first, Tensor):
            first = arguments[0] if first is None else first[0]  # of the parameters, where they change in place
        last = first.data[(-1,) * first.dim()]  # one element
        last.copy_(1 - last if OPS[name].probability else last + 0.05)
        return result

    monkeypatch.setattr(ops, name, wrong)
    assert cli.main(["selftest"]) == 1
    failed = {line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("FAIL")}
    assert failed == {name}


@pytest.mark.parametrize("name", [op.name for op in OPS.values() if op.is_differentiable])
def test_selftest_finds_a_wrong_gradient(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(ops, name)

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, tensor: Tensor) -> Tensor:
            return tensor.clone()

        @staticmethod
        def backward(context: Any, grad: Tensor) -> Tensor:
            grad = grad.clone()
            grad.view(-1)[-1] += 0.05 * grad.abs().max() + 0.05
            return grad

    monkeypatch.setattr(ops, name, lambda first, *rest, **keywords: right(Wrong.apply(first), *rest, **keywords))
    assert not all(selftest.check(name, "cpu", dtype).passed for dtype in (torch.float64, torch.float32))
