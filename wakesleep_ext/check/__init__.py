"""`wakesleep check`: problems whose answers are known, trained and evaluated through the real ops and objectives.

`problems` has the problems and their answers, `calibration` the test that posteriors are calibrated, `training` what
they are trained with, `command` the command.
"""
