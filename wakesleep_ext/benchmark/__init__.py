"""The command `wakesleep bench`: compare every op, and the whole training step, with other PyTorch implementations.

`plan` contains the options of a benchmark, and `run` runs it. `op_sizes` and `step_suite` define the cases, and
`baselines` contains the implementations to compare with. `op_case` calls an op, and `op_suite` reports on ops.
`measure` times the calls. `result` reads and writes result files. `report`, `losses` and `goals` print them. `suite`
defines the common interface of the suites. `command` contains the command.
"""
