"""The suite behind `wakesleep bench`: every op against what people would write instead, on the machine at hand.

`op_suite` says what is measured, `eager` and `distributions` against what; `measure` how, whatever the suite; `result`
is what comes of it, `report` and `goals` how that is shown.
"""

from wakesleep_ext.benchmark.command import Plan, bench, run
from wakesleep_ext.benchmark.result import read, write

__all__ = ["Plan", "bench", "read", "run", "write"]
