"""The command `wakesleep check` trains and evaluates problems with known answers, using the real ops and objectives.

`problems` contains the problems and their answers, and `calibration` tests whether posteriors are calibrated.
`training` contains the networks and training loops, and `command` contains the command.
"""
