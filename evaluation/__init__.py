"""Measure a model: held-out loss and right answers by recurrences, with pictures.

From Python, `loopwise.evaluation.loss.evaluate` measures, and `loopwise.evaluation.harness.measure.evaluate_tasks`
scores tasks. This package may use `convert`, `train` and `serve`. Files in reading order:

    recipe.py      Evaluate, the recipe of `loopwise eval`
    result_file.py  files of results, written whole and read back
    answers.py     conversations as sequences, with their answers and groups
    guess.py       the right answers that guessing gets, of generated tasks
    depths.py      losses, right answers and states at several depths, in one pass if possible
    result.py      means, standard errors, the effect of the recurrences
    replies.py     replies to the questions of the data: right answers, depths, speed
    endpoint.py    the answers of a running server
    lanes.py       the answers of the lane engine in this process
    exits/         exit rules: loss, right answers and mean depth along their thresholds
    loss.py        the whole measurement of loss and answers
    report.py      the result as a table
    harness/       scores of lm-eval's tasks by recurrences
    command.py     `loopwise eval`
    calibrate.py   `loopwise calibrate`: an exit threshold, or those of a router
    search/        `loopwise search`: depth without training
    plot/          `loopwise plot`
"""
