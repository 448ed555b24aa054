"""Check the machine code of the CUDA kernels, for every compiled architecture; needs no GPU."""

from __future__ import annotations

import checkout
import pytest

from wakesleep_ext import _build

if _build.CUDA_VERSION is None:
    pytest.skip("built without CUDA", allow_module_level=True)


sass_report = checkout.load("sass_report", "scripts")


@pytest.fixture(scope="module")
def kernels() -> list:
    if sass_report.disassembler() is None:
        pytest.skip("no cuobjdump, neither on the PATH nor in the triton package")
    return sass_report.read_kernels(sass_report.installed_binary())


def test_nothing_spills_and_rows_are_read_16_bytes_at_a_time(kernels: list) -> None:
    assert sass_report.faults(kernels) == []


def test_every_kernel_is_there_for_every_architecture(kernels: list) -> None:
    compiled: dict[str, set[str]] = {}
    for kernel in kernels:
        compiled.setdefault(kernel.architecture, set()).add(kernel.name)
    wanted = {f"sm_{entry.split('+')[0].replace('.', '')}" for entry in _build.CUDA_ARCHITECTURES.split(";")}
    assert set(compiled) == wanted
    others = {"write_key", "adam", "summed_rows_kernel", "layer_kernel", "layer_gradients_kernel"}
    for names in compiled.values():
        assert names == {*sass_report.OPERANDS, *others}


def test_gradients_are_written_16_bytes_at_a_time(kernels: list) -> None:
    writing = [kernel for kernel in kernels if kernel.name.endswith("BackwardRows")]
    assert writing
    for kernel in writing:
        # a head makes gradients of half types from four products in float32 at a time
        narrow = kernel.name.startswith("Linear") and kernel.arguments[2] in ("wakesleep::Half", "wakesleep::BFloat16")
        assert kernel.count(r"STG.*\.64" if narrow else r"STG.*\.128"), sass_report.title(kernel)


def test_adam_reads_and_writes_16_bytes_at_a_time(kernels: list) -> None:
    steps = [kernel for kernel in kernels if kernel.name == "adam"]
    assert steps
    for kernel in steps:
        assert kernel.count(r"LDG.*\.128") >= 4
        assert kernel.count(r"STG.*\.128") >= 3


def test_no_float_atomics(kernels: list) -> None:
    assert not any(kernel.count(r"(REDG?|ATOM[GS]?)\b") for kernel in kernels)
