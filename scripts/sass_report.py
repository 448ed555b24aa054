"""Report registers, spills, shared memory, loads, and work per element of every compiled kernel.

Reads the machine code of a CUDA build, by default of the installed package. Needs cuobjdump, from the CUDA toolkit or
the triton package, but no GPU. Exits with 1 if a kernel spills, or a row kernel does not load whole words.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

BYTES = {"double": 8, "float": 4, "Half": 2, "BFloat16": 2, "unsigned char": 1}
WIDE = 16
LOADS = {
    16: r"LDG.*\.128",
    8: r"LDG.*\.64",
    4: r"LDG(?!.*\.(128|64|[US]16|[US]8))",
    2: r"LDG.*\.[US]16",
    1: r"LDG.*\.[US]8",
}
SUMMED = -2
TEAMS = {0: "team", -1: "grid", SUMMED: "summed"}
"""How many threads share a row, if the compiler does not know the number. A summed kernel also sums over rows."""
BLOCK_THREADS, TILE_THREADS = 256, 64  # csrc/kernels/cuda/launch.cuh, small_batch.cuh
BYTES_OF_ROWS = 8  # kRowsOfWarp in csrc/kernels/cuda/column_sums.cuh, in bytes of the compute type
MULTIPLY_ADD = r"[FD]FMA"
REGISTERS_PER_SM, THREADS_PER_SM = 65536, 2048

# the operands that a row kernel reads along the row, as indices into its template arguments
OPERANDS = {
    "MlpRows": (0, 0),  # products and bias
    "BernoulliLogProbRows": (0, 1),
    "BernoulliLogProbBackwardRows": (0, 1),
    "BernoulliSampleRows": (0,),
    "BinarizeRows": (0,),
    "GaussianKlRows": (0, 0),
    "GaussianKlBackwardRows": (0, 0),
    "GaussianKlBetweenRows": (0, 0, 0, 0),
    "GaussianKlBetweenBackwardRows": (0, 0, 0, 0),
    "GaussianLogProbRows": (0, 0, 0),
    "GaussianLogProbBackwardRows": (0, 0, 0),
    "GaussianLogProbAndGradientsRows": (0, 0, 0),
    "GaussianRsampleRows": (0, 0),
    "LinearBernoulliLogProbRows": (0, 0, 1),  # products, bias and x
    "LinearBernoulliLogProbBackwardRows": (0, 0, 1),
    "LinearBernoulliSampleRows": (0, 0),
    "MlpBackwardRows": (1, 1),  # gradients and activations
    "GaussianRsampleBackwardRows": (0,),  # its loop over samples reads only the gradient of z
    "StandardGaussianLogProbRows": (0,),
    "StandardGaussianLogProbBackwardRows": (0,),
}


@dataclass
class Instruction:
    address: int
    opcode: str  # with modifiers, such as LDG.E.128.CONSTANT
    target: int | None = None  # of a branch


@dataclass
class Kernel:
    """A kernel compiled for one architecture."""

    architecture: str
    name: str
    threads: int | None = None  # per row, or one of TEAMS; None if it is not a row kernel
    arguments: tuple[str, ...] = ()
    registers: int = 0
    stack: int = 0
    shared: int = 0
    instructions: list[Instruction] = field(default_factory=list)

    def count(self, pattern: str, where: list[Instruction] | None = None) -> int:
        return sum(bool(re.match(pattern, i.opcode)) for i in (self.instructions if where is None else where))

    @property
    def spills(self) -> int:
        """The number of moves between registers and local memory."""
        return self.count(r"STL|LDL")

    @property
    def occupancy(self) -> float:
        """The fraction of a multiprocessor's threads in use, for compute capability 8.0 to 10.0."""
        per_thread = -(-self.registers // 8) * 8
        threads = TILE_THREADS if self.name == "layer_kernel" else BLOCK_THREADS
        blocks = min(THREADS_PER_SM // threads, REGISTERS_PER_SM // (per_thread * threads))
        return blocks * threads / THREADS_PER_SM

    @property
    def word(self) -> int:
        """The bytes of the first operand that a row kernel loads at once."""
        elements = int(self.arguments[-1]) if self.arguments[-1].isdigit() else WIDE
        return min(WIDE, elements * BYTES[self.arguments[OPERANDS[self.name][0]]])

    def loop_with_most(self, pattern: str) -> list[Instruction]:
        """Return the innermost loop with the most instructions that match, and the shortest of these."""
        loops = [(i.target, i.address) for i in self.instructions if i.target is not None and i.target <= i.address]
        bodies = [[i for i in self.instructions if first <= i.address <= last] for first, last in loops]
        matching = [body for body in bodies if self.count(pattern, body)]
        innermost = [
            body
            for body in matching
            if not any(other is not body and _inside(other, body) for other in matching)
        ]  # fmt: skip
        return max(innermost, key=lambda body: (self.count(pattern, body), -len(body)), default=[])

    @property
    def main_loop(self) -> list[Instruction]:
        """The loop of a row kernel with the most loads of a word, or of another kernel with the most multiply-adds."""
        return self.loop_with_most(MULTIPLY_ADD if self.threads is None else LOADS[self.word])

    @property
    def elements(self) -> float:
        """The multiply-adds per iteration of the main loop or, in a row kernel, the elements, from the loads."""
        if self.threads is None:
            return self.count(MULTIPLY_ADD, self.main_loop)
        if self.threads == SUMMED and self.name != "GaussianLogProbAndGradientsRows":  # all rows share the bias
            return BYTES_OF_ROWS / BYTES[self.arguments[0]] * self.word / BYTES[self.arguments[OPERANDS[self.name][0]]]
        sizes = [BYTES[self.arguments[index]] for index in OPERANDS[self.name]]
        # narrower operands use narrower loads, and wider ones wider loads, if there are any
        alike = sum(size for size in sizes if size == sizes[0] or (size > sizes[0] and self.word == WIDE))
        return self.count(LOADS[self.word], self.main_loop) * self.word / alike


def _inside(inner: list[Instruction], outer: list[Instruction]) -> bool:
    within = outer[0].address <= inner[0].address and inner[-1].address <= outer[-1].address
    return within and len(inner) < len(outer)


def disassembler() -> str | None:
    """Return the path of cuobjdump, from the PATH or from triton; None if there is none."""
    found = shutil.which("cuobjdump")
    if found is None and (triton := importlib.util.find_spec("triton")) and triton.origin:
        bundled = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump"
        found = str(bundled) if bundled.exists() else None
    return found


def read_kernels(binary: Path) -> list[Kernel]:
    """Return the kernels in a library, an object file or a cubin."""
    tool = disassembler()
    if tool is None:
        raise FileNotFoundError("no cuobjdump: put the bin folder of a CUDA toolkit on the PATH, or install triton")
    kernels: dict[tuple[str, str], Kernel] = {}
    architecture = symbol = ""
    for line in _lines(tool, "-res-usage", str(binary)):
        if match := re.match(r"arch = (sm_\w+)", line):
            architecture = match[1]
        elif match := re.match(r" Function (\S+):", line):
            symbol = match[1]
        elif match := re.match(r"\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", line):
            registers, stack, shared = map(int, match.groups())
            kernels[architecture, symbol] = Kernel(
                architecture, symbol, registers=registers, stack=stack, shared=shared
            )
    kernel = None
    for line in _lines(tool, "-sass", str(binary)):
        if match := re.match(r"arch = (sm_\w+)", line):
            architecture = match[1]
        elif match := re.match(r"\s+Function : (\S+)", line):
            kernel = kernels[architecture, match[1]]
        elif kernel and (match := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)(.*);", line)):
            target = re.search(r"(0x[0-9a-f]+)\s*$", match[3]) if match[2].startswith("BRA") else None
            kernel.instructions.append(Instruction(int(match[1], 16), match[2], int(target[1], 16) if target else None))
    names = subprocess.run(
        ["c++filt"], input="\n".join(symbol for _, symbol in kernels), capture_output=True, text=True, check=True
    ).stdout.splitlines()
    for kernel, name in zip(kernels.values(), names, strict=True):
        name = re.sub(r"\(anonymous namespace\)::|\(int\)|wakesleep::(cuda::)?", "", name)
        if match := re.search(r"\b(row|summed_rows|summed_parts)_kernel<(-?\d+)?.*?(\w+)<(.*?)> ?>\(", name):
            kernel.threads, kernel.name = int(match[2]) if match[1] == "row" else SUMMED, match[3]
            kernel.arguments = tuple(argument.strip() for argument in match[4].split(","))
        elif match := re.match(r"(?:void )?(\w+)(?:<(.*)>)?\(", name):
            kernel.name, kernel.arguments = match[1], (match[2],) if match[2] else ()
    return sorted(kernels.values(), key=lambda k: (k.architecture, k.name, k.arguments, k.threads or 0))


def _lines(*command: str) -> Iterator[str]:
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield from process.stdout
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)


def faults(kernels: list[Kernel]) -> list[str]:
    """Return a message for each kernel that spills or lacks wide loads."""
    found = []
    for kernel in kernels:
        where = f"{kernel.architecture} {title(kernel)}"
        if kernel.spills or kernel.stack:
            found.append(f"{where}: spills, {kernel.spills} moves to or from {kernel.stack} bytes of local memory")
        if kernel.threads is not None and not kernel.count(LOADS[kernel.word], kernel.main_loop):
            found.append(f"{where}: no {8 * kernel.word}-bit load in its main loop")
    return found


def title(kernel: Kernel) -> str:
    arguments = ", ".join(kernel.arguments).replace("unsigned char", "uint8").replace(" >", ">")
    name = f"{kernel.name}<{arguments}>" if arguments else kernel.name
    return name if kernel.threads is None else f"{name} / {TEAMS.get(kernel.threads, kernel.threads)}"


def table(kernels: list[Kernel]) -> str:
    """Format one line per kernel. Instructions and special functions (MUFU) are per element of the main loop or, if it
    is not a row kernel, per multiply-add.
    """
    lines = [
        f"{'':7}{'kernel / threads per row':72}{'regs':>5}{'occ.':>6}{'spills':>7}{'shared':>7}"
        f"{'loads':>7}{'STG128':>7}{'elem.':>7}{'instr.':>8}{'MUFU':>6}"
    ]
    for kernel in kernels:
        line = (
            f"{kernel.architecture:7}{title(kernel):72}{kernel.registers:5}{kernel.occupancy:6.0%}"
            f"{kernel.spills:7}{kernel.shared:7}"
        )
        loop, elements = kernel.main_loop, kernel.elements
        loads = kernel.count("LDG" if kernel.threads is None else LOADS[kernel.word], loop)
        wide_stores = kernel.count(r"STG.*\.128")
        line += f"{loads:7}{wide_stores:7}{elements:7.0f}"
        if elements:
            line += f"{len(loop) / elements:8.1f}{kernel.count('MUFU', loop) / elements:6.2f}"
        lines.append(line)
    return "\n".join(lines)


def installed_binary() -> Path:
    """Return the path of the compiled module, without importing the package."""
    package = importlib.util.find_spec("wakesleep_ext")
    if package is None or package.origin is None:
        raise FileNotFoundError("wakesleep_ext is not installed")
    return next(Path(package.origin).parent.glob("_C*.so"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("binary", nargs="?", type=Path, help="a library, object file or cubin")
    arguments = parser.parse_args()
    kernels = read_kernels(arguments.binary or installed_binary())
    if not kernels:
        parser.error("no CUDA kernels in it: a CPU build?")
    print(table(kernels))
    for fault in (found := faults(kernels)):
        print(fault, file=sys.stderr)
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
