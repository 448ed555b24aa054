"""The command `wakesleep bench`: compare every op, and the whole training step, with other implementations.

`plan` contains the options of a benchmark, and `run` runs it. `op_sizes` and `step_suite` define the cases, and
`baselines` contains the implementations to compare with. `op_case` calls an op, and `classes` our distributions.
`op_suite` and `step_report` interpret the records of ops and steps. `measure` lets implementations take turns with the
`instruments`, and `elsewhere` runs one in its own process. `result` reads and writes result files. `report`, `losses`
and `goals` print them. `suite` defines the common interface of the suites. `command` contains the command.
"""
