"""The suites behind `wakesleep bench`: every op, and the whole training step, against what people would write instead,
on the machine at hand.

`op_suite` and `step_suite` say what is measured, `eager` and `distributions` against what; `measure` how, whatever the
suite; `result` is what comes of it, `report` and `goals` how that is shown. `suite` is what these ask of a suite.
"""

from wakesleep_ext.benchmark.command import Plan, bench, run, suite_of
from wakesleep_ext.benchmark.result import read, write

__all__ = ["Plan", "bench", "read", "run", "suite_of", "write"]
