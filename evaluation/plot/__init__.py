"""Pictures by `loopwise plot`. Files in reading order:

recipe.py       keys for a picture of a model on a text
curriculum.py   a curriculum
run.py          a training run
evaluation.py   a measurement of `loopwise eval`
sweep.py        a sweep of exit rules, or a calibration
search.py       a search for layers to skip and repeat
observe.py      the tokens of a text, their depths and their states
text.py         a text, each token in the colour of its depth
states.py       paths of states
router.py       the tokens that each recurrence of a routed model takes
exits.py        exit depths of a running server
command.py      `loopwise plot`
"""
