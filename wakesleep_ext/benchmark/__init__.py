"""The suites behind `wakesleep bench`: every op, and the whole training step, against what people would write instead.

`plan` says what to measure and `run` measures it. `op_suite` and `step_suite` hold the cases, and
`baselines` what they are compared with; `measure` says how a figure is taken. `result` is the file of figures, `report`
and `goals` show it. `suite` is what these need to know about a suite. `command` is the command.
"""
