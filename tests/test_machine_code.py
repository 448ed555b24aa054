"""Check the machine code of the kernels: of the CPU's, and of CUDA's for every compiled architecture; needs no GPU."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess

import checkout
import pytest

from wakesleep_ext import _C, _build

sass_report = checkout.load("sass_report", "scripts")

_FUNCTION = re.compile(r"^[0-9a-f]+ <(\S+)>:$")
_CALL = re.compile(r"\t(?:call|jmp) +[0-9a-f]+ <([^>+]+)>$")


@pytest.mark.skipif(platform.machine() != "x86_64", reason="not an x86-64 processor")
@pytest.mark.skipif(shutil.which("objdump") is None, reason="no objdump")
def test_cpu_kernels_are_inlined_into_the_function_of_each_instruction_set() -> None:
    """A function that is called instead is compiled for the baseline, and takes twice the time or more."""
    command = ["objdump", "--disassemble", "--no-show-raw-insn", _C.__file__]
    code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    callers, called, caller = set(), set(), ""
    for line in code.splitlines():
        if function := _FUNCTION.match(line):
            caller = function[1]
        elif re.search(r"(run|fill)_avx(2|512)I", caller):
            callers.add(caller)
            if call := _CALL.search(line):
                called.add(call[1])
    assert len(callers) > 100
    ours = [name for name in called if "wakesleep" in name and not name.endswith(".cold")]
    assert [name for name in ours if not re.search(r"(run|fill)_avx(2|512)I|15instruction_setEv", name)] == []


@pytest.fixture(scope="module")
def kernels() -> list:
    if _build.CUDA_VERSION is None:
        pytest.skip("built without CUDA")
    if sass_report.disassembler() is None:
        pytest.skip("no cuobjdump, neither on the PATH nor in the triton package")
    return sass_report.read_kernels(sass_report.installed_binary())


def test_nothing_spills_and_rows_are_read_in_words(kernels: list) -> None:
    assert sass_report.faults(kernels) == []


def test_every_kernel_is_there_for_every_architecture(kernels: list) -> None:
    compiled: dict[str, set[str]] = {}
    for kernel in kernels:
        compiled.setdefault(kernel.architecture, set()).add(kernel.name)
    wanted = {f"sm_{entry.split('+')[0].replace('.', '')}" for entry in _build.CUDA_ARCHITECTURES.split(";")}
    assert set(compiled) == wanted
    others = {"write_key", "adam", "advance", "column_sums_kernel", "layer_kernel", "layer_gradients_kernel"}
    for names in compiled.values():
        assert names == {*sass_report.OPERANDS, *others}


def test_gradients_are_written_16_bytes_at_a_time(kernels: list) -> None:
    writing = [kernel for kernel in kernels if kernel.name.endswith("BackwardRows") and kernel.word == sass_report.WIDE]
    assert writing
    for kernel in writing:
        # a head makes gradients of half types from four products in float32 at a time
        narrow = kernel.name.startswith("Linear") and kernel.arguments[2] in ("Half", "BFloat16")
        assert kernel.count(r"STG.*\.64" if narrow else r"STG.*\.128"), sass_report.title(kernel)


def test_adam_reads_and_writes_16_bytes_at_a_time(kernels: list) -> None:
    steps = [kernel for kernel in kernels if kernel.name == "adam"]
    assert steps
    for kernel in steps:
        assert kernel.count(r"LDG.*\.128") >= 4
        assert kernel.count(r"STG.*\.128") >= 3


def test_adam_loads_its_operands_before_a_thread_computes_the_powers(kernels: list) -> None:
    for kernel in kernels:
        if kernel.name == "adam":
            opcodes = [instruction.opcode for instruction in kernel.instructions]
            powers = next(i for i, code in enumerate(opcodes) if code.startswith("CALL"))
            barrier = next(i for i, code in enumerate(opcodes) if code.startswith("BAR"))
            wide = [i for i, code in enumerate(opcodes) if re.match(r"LDG.*\.128", code)]
            assert max(wide) < powers < barrier


def test_no_float_atomics(kernels: list) -> None:
    assert not any(kernel.count(r"(REDG?|ATOM[GS]?)\b") for kernel in kernels)


def test_every_kernel_waits_for_the_previous_one_before_it_touches_memory(kernels: list) -> None:
    """Also, it lets the next kernel start only after the wait. The next kernel waits for this one alone."""
    architectures = {int(re.sub(r"\D", "", kernel.architecture)) for kernel in kernels}
    for kernel in kernels:
        opcodes = [instruction.opcode for instruction in kernel.instructions]
        waits, triggers = ([i for i, code in enumerate(opcodes) if code.startswith(o)] for o in ("ACQBULK", "PREEXIT"))
        if min(architectures) < 90:
            assert not waits + triggers, sass_report.title(kernel)
            continue
        touches = [i for i, code in enumerate(opcodes) if re.match(r"(LDG?|STG?|ATOMG?|RED)\b", code)]
        assert len(waits) == len(triggers) == 1, sass_report.title(kernel)
        assert waits[0] < triggers[0] < min(touches), sass_report.title(kernel)
