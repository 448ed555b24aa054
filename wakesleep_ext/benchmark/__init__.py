"""The suite behind `wakesleep bench`: every op against what people would write instead, on the machine at hand.

`suite` says what is measured, `eager` and `distributions` against what; `measure` how, `report` what becomes of it.
"""

from wakesleep_ext.benchmark.command import bench

__all__ = ["bench"]
