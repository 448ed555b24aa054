"""Check that `make mutants` finds every line that its table of faults changes."""

from __future__ import annotations

import re
import shlex

import pytest
from checkout import ROOT, load

pytestmark = pytest.mark.source_tree

mutants = load("mutants", "scripts")


def test_every_fault_changes_a_line_that_there_is() -> None:
    mutants.check_table()


def test_there_are_enough_faults() -> None:
    faults = mutants.all_faults()
    assert len(faults) >= 60
    assert sum(fault.is_compiled for fault in faults) >= 20


def test_every_fault_names_tests_that_there_are() -> None:
    every_test = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    for fault in mutants.all_faults():
        file, *options = shlex.split(fault.tests)
        assert (ROOT / file).is_file(), fault.name
        assert options[:1] in ([], ["-k"]), fault.name
        for name in re.findall(r"test_\w+", "".join(options)):
            assert f"def {name}" in every_test, fault.name


def test_a_fault_whose_text_is_missing_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    fault = mutants.Fault("gone", "wakesleep_ext/ops.py", "no such text", "", "tests/test_ops.py")
    monkeypatch.setattr(mutants, "FAULTS", {"ops": (fault,)})
    with pytest.raises(mutants.InvalidFaultError, match=r"gone: expected 'no such text' once in .*, found it 0 times"):
        mutants.check_table()


@pytest.mark.parametrize(
    ("status", "output", "test"),
    [
        (0, "1 passed", None),
        (
            1,
            "FAILED tests/test_a.py::test_b[in order-3] - assert 1 == 2\n1 failed",
            "tests/test_a.py::test_b[in order-3]",
        ),
    ],
)
def test_only_a_failed_test_catches_a_fault(status: int, output: str, test: str | None) -> None:
    assert mutants.failed_test(mutants.Finished(status, output)) == test


@pytest.mark.parametrize(
    ("status", "output"),
    [(1, "ERROR tests/test_a.py::test_b - OSError"), (2, "ERROR tests/test_a.py"), (5, "no tests ran"), (-11, "")],
    ids=["a fixture fails", "a module does not import", "nothing is selected", "a crash"],
)
def test_an_error_proves_nothing(status: int, output: str) -> None:
    with pytest.raises(mutants.InvalidFaultError, match=f"got status {status}"):
        mutants.failed_test(mutants.Finished(status, output))
