"""Pictures by `loopwise plot`. Files in reading order:

curriculum.py   a curriculum
run.py          a training run
evaluation.py   a measurement of `loopwise eval`
command.py      `loopwise plot`
"""
