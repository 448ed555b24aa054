"""Plant the faults of `faults.py` one at a time in a copy of the checkout, and check that a test fails for each.

A fault is caught if pytest reports a failed test. A fault that does not build or import proves nothing, so it is an
error. Results are kept in `build/mutants`, and later runs skip faults already caught. When every fault is caught, the
script writes the table `tests/mutants.md`.
"""

from __future__ import annotations

import argparse
import fcntl
import fnmatch
import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from faults import FAULTS, Fault

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "mutants"
COPY, CLEAN, RESULTS = WORK / "copy", WORK / "clean", WORK / "results.json"
TABLE = ROOT / "tests" / "mutants.md"
TIMEOUT = 600  # seconds for the build or the tests of a fault
WHOLE_TIMEOUT = 3600  # for a build from scratch, or tests that also compile every CUDA kernel
BINARIES = ("wakesleep_ext/_C*.so", "wakesleep_ext/_build.py")
BUILT = ("build", *BINARIES)


class InvalidFaultError(Exception):
    """A fault proves nothing, or the tests fail without it."""


@dataclass(frozen=True)
class Finished:
    """A process that has ended."""

    status: int
    output: str

    def tail(self) -> str:
        return "\n".join(self.output.splitlines()[-25:])


def check_table() -> None:
    """Check that the target text of every fault occurs once in its file.

    Raises:
        InvalidFaultError: the text of a fault is missing or ambiguous, spans lines, or a name is used twice.
    """
    problems, names = [], set()
    for fault in all_faults():
        if fault.name in names:
            problems.append(f"{fault.name}: another fault has this name")
        names.add(fault.name)
        if fault.before == fault.after or "\n" in fault.before + fault.after:
            problems.append(f"{fault.name}: a fault changes one line")
        path = ROOT / fault.file
        count = path.read_text().count(fault.before) if path.is_file() else 0
        if count != 1:
            problems.append(f"{fault.name}: expected {fault.before!r} once in {fault.file}, found it {count} times")
    if problems:
        raise InvalidFaultError("\n".join(problems))


def all_faults() -> list[Fault]:
    return [fault for faults in FAULTS.values() for fault in faults]


def run(command: Sequence[str], timeout: int = TIMEOUT) -> Finished:
    """Run a command in the copy, in a new process group that is killed at the timeout.

    Raises:
        InvalidFaultError: the command takes longer than the timeout.
    """
    environment = {**os.environ, "PYTHONPATH": str(COPY), "PYTHONDONTWRITEBYTECODE": "1", "PYTEST_ADDOPTS": ""}
    with subprocess.Popen(
        command,
        cwd=COPY,
        env=environment,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=timeout)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                raise InvalidFaultError(f"{shlex.join(command)} took more than {timeout} s") from error
            raise
    return Finished(process.returncode, output)


def build(timeout: int = TIMEOUT) -> None:
    """Compile the changed sources of the copy."""
    done = run([sys.executable, "setup.py", "build_ext", "--inplace"], timeout)
    if done.status != 0:
        raise InvalidFaultError(f"the copy does not build:\n{done.tail()}")


def run_tests(tests: str, timeout: int = TIMEOUT) -> Finished:
    options = ["-x", "-q", "-p", "no:cacheprovider"]
    return run([sys.executable, "-m", "pytest", *options, *shlex.split(tests)], timeout)


def failed_test(done: Finished) -> str | None:
    """Return the test that failed, or None if all passed.

    Raises:
        InvalidFaultError: pytest ended in another way, for example with an import error.
    """
    failed = [line for line in done.output.splitlines() if line.startswith("FAILED ")]
    if done.status == 1 and failed:
        return failed[0].removeprefix("FAILED ").split(" - ")[0]
    if done.status == 0:
        return None
    raise InvalidFaultError(f"expected passed or failed tests, got status {done.status}:\n{done.tail()}")


# ---- the copy ------------------------------------------------------------------------------------------------------


def synchronise() -> None:
    """Update the copy from the checkout.

    A changed file gets the current time. So ninja also recompiles files that an interrupted run left changed.
    """
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    wanted = {name for name in names if (ROOT / name).is_file()}
    for name in sorted(wanted):
        source, target = ROOT / name, COPY / name
        if not target.is_file() or source.read_bytes() != target.read_bytes():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
            shutil.copymode(source, target)
    built = {path for pattern in BINARIES for path in COPY.glob(pattern)}
    for path in [path for path in COPY.rglob("*") if path.is_file()]:
        place = path.relative_to(COPY)
        if place.parts[0] != "build" and str(place) not in wanted and path not in built:
            path.unlink()


def copy_binaries() -> None:
    """Copy the extension from the checkout instead of building one."""
    for pattern in BINARIES:
        found = list(ROOT.glob(pattern))
        if not found:
            raise InvalidFaultError(f"expected {pattern} in the checkout: build it first, or leave out --no-build")
        for path in found:
            target = COPY / path.relative_to(ROOT)
            shutil.copyfile(path, target)
            os.utime(target, (0, 0))  # so that a later build replaces it


def copy_built(source: Path, target: Path) -> None:
    """Copy all build products with their times, so that ninja considers them up to date."""
    for path in [path for pattern in BUILT for path in source.glob(pattern)]:
        to, fresh = target / path.relative_to(source), target / "fresh"
        fresh.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            shutil.rmtree(fresh, ignore_errors=True)
            shutil.copytree(path, fresh)
            shutil.rmtree(to, ignore_errors=True)
            fresh.rename(to)
        else:
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, fresh)
            fresh.replace(to)


def prepare(is_built: bool) -> None:
    """Create the copy, and check that Python imports the package from it."""
    synchronise()
    for lock in (COPY / "build").glob("*/lock"):  # left by a killed build; the next build would wait for it
        lock.unlink()
    if is_built:
        print("Building the copy (minutes, the first time)", flush=True)
        build(WHOLE_TIMEOUT)
    else:
        copy_binaries()
    done = run([sys.executable, "-c", "import wakesleep_ext; print(wakesleep_ext.__file__)"])
    found = done.output.splitlines()[-1:]
    if found != [str(COPY / "wakesleep_ext" / "__init__.py")]:
        raise InvalidFaultError(f"expected the package of {COPY}, got:\n{done.tail()}")


# ---- the faults ----------------------------------------------------------------------------------------------------


def try_fault(fault: Fault) -> str | None:
    """Plant a fault, run its tests, and restore the file. Returns the test that caught it, or None."""
    path = COPY / fault.file
    original, times = path.read_text(), path.stat()
    path.write_text(original.replace(fault.before, fault.after))
    try:
        if fault.changes_extension:
            build()
        return failed_test(run_tests(fault.tests))
    finally:
        if fault.is_compiled:
            copy_built(CLEAN, COPY)
        path.write_text(original)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def check_baseline(faults: Sequence[Fault]) -> None:
    """Check that the tests pass without a fault, in one run per file. Tests of CUDA kernels also compile them.

    Raises:
        InvalidFaultError: a test fails.
    """
    expressions: dict[str, list[str]] = {}
    for fault in faults:
        file, *options = shlex.split(fault.tests)
        expressions.setdefault(file, []).append(options[1] if options else "test")
    for file, of_file in expressions.items():
        print(f"Without a fault: {file}", flush=True)
        every = " or ".join(f"({expression})" for expression in dict.fromkeys(of_file))
        if (name := failed_test(run_tests(shlex.join([file, "-k", every]), WHOLE_TIMEOUT))) is not None:
            raise InvalidFaultError(f"{name} fails without a fault")


def key_of(fault: Fault) -> str:
    """Return the key of a result, which changes with the fault, its file and its tests."""
    shared = ("wakesleep_ext/_op_table.py", "tests/cases.py", "tests/conftest.py")
    files = (fault.file, shlex.split(fault.tests)[0], *shared)
    content = b"".join((ROOT / file).read_bytes() for file in files)
    return hashlib.sha256(repr(fault).encode() + content).hexdigest()


def read_results() -> dict[str, dict[str, str | float]]:
    """Return the faults caught so far: `{key: {"test": ..., "seconds": ...}}`."""
    return json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}


def write_table(results: dict[str, dict[str, str | float]]) -> None:
    lines = [
        "# Planted faults",
        "",
        "`make mutants` writes this table: each fault of [scripts/faults.py](../scripts/faults.py), the everyday test",
        "that caught it, and the seconds that the build and the test took.",
        "",
        "| area | fault | file | before → after | caught by | s |",
        "| --- | --- | --- | --- | --- | ---: |",
    ]
    for area, faults in FAULTS.items():
        for fault in faults:
            found = results[key_of(fault)]
            change = f"{code(fault.before.strip())} → {code(fault.after.strip())}"
            cells = [area, fault.name, code(fault.file), change, code(str(found["test"])), f"{found['seconds']:.0f}"]
            lines.append(f"| {' | '.join(cells)} |")
    TABLE.write_text("\n".join(lines) + "\n")
    print(f"Wrote {TABLE.relative_to(ROOT)}")


def code(text: str) -> str:
    return "`" + text.replace("|", "\\|") + "`"


def select(pattern: str) -> list[Fault]:
    """Return the faults whose name or area contains a pattern, which may have wildcards."""
    chosen = []
    for area, faults in FAULTS.items():
        chosen += [f for f in faults for name in (f.name, area) if fnmatch.fnmatch(name, f"*{pattern}*")]
    return list(dict.fromkeys(chosen))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", default="", help="part of the name or area of the faults to plant; may have wildcards"
    )
    parser.add_argument("--fresh", action="store_true", help="discard the results of earlier runs")
    parser.add_argument("--no-build", action="store_true", help="plant only faults in Python, without building")
    options = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    try:
        with (WORK / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InvalidFaultError(f"another run uses {WORK}") from None
            return plant(options.only, is_fresh=options.fresh, is_built=not options.no_build)
    except InvalidFaultError as error:
        print(error, file=sys.stderr)
        return 2


def plant(pattern: str, *, is_fresh: bool, is_built: bool) -> int:
    """Plant the selected faults that no earlier run caught. Returns the exit status."""
    check_table()
    if is_fresh:
        RESULTS.unlink(missing_ok=True)
    results = read_results()
    chosen = [fault for fault in select(pattern) if is_built or not fault.is_compiled]
    if not chosen:
        raise InvalidFaultError(f"no fault matches {pattern!r}")
    missing = [fault for fault in chosen if key_of(fault) not in results]
    print(f"{len(chosen)} faults chosen, {len(chosen) - len(missing)} of them caught before", flush=True)
    survivors, invalid = [], []
    if missing:
        prepare(is_built)
        check_baseline(missing)
        if is_built:
            shutil.rmtree(CLEAN, ignore_errors=True)
            copy_built(COPY, CLEAN)
    for number, fault in enumerate(missing, 1):
        start = time.monotonic()
        try:
            test = try_fault(fault)
        except InvalidFaultError as error:
            invalid.append(fault.name)
            test = f"INVALID: {error}"
        else:
            if test is None:
                survivors.append(fault.name)
            else:
                results[key_of(fault)] = {"name": fault.name, "test": test, "seconds": time.monotonic() - start}
                RESULTS.write_text(json.dumps(results, indent=1))
        seconds = time.monotonic() - start
        print(f"{number}/{len(missing)} {fault.name} {seconds:.0f} s: {test or 'SURVIVED'}", flush=True)
    if all(key_of(fault) in results for fault in all_faults()):
        write_table(results)
    for what, names in (("survived", survivors), ("proved nothing", invalid)):
        if names:
            print(f"{len(names)} faults {what}: {', '.join(names)}", file=sys.stderr)
    return 1 if survivors or invalid else 0


if __name__ == "__main__":
    sys.exit(main())
