"""How many gradient evaluations tuned AdamW needs for the loss that an optimizer reached.

`tasks`, `drivers` and `optimizers` are what is trained and by what, `training` is one run, `runs`
many of them in a file, `judge` compares them, `report` and `plots` show that, and `command` is the
command line.
"""
