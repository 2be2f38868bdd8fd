"""Scores of lm-eval's tasks by recurrences: `loopwise eval MODEL tasks=... num_recurrences=1,2,4`.

From Python, `loopwise.evaluation.harness.measure.evaluate_tasks` measures. Prompts, batches, stops and metrics are
those of lm-eval (https://github.com/EleutherAI/lm-evaluation-harness, 0.4.13); only the models are Loopwise's. Files in
reading order:

    local.py       a .jsonl of questions and answers, or a short .yaml about one, as a task of lm-eval
    trust.py       task files without their code
    templates.py   templates of tasks in a sandbox, and the limits of these and of chat templates
    faults.py      errors of tasks out of files, as one line
    catalogue.py   names and files in `tasks` as tasks of lm-eval, with errors of one line
    work.py        tokens, recurrences and seconds of a model's requests
    models.py      `loopwise`: lm-eval's transformers model at a number of recurrences
    lanes.py       `loopwise-lanes`: the same, which generates by the lane engine
    served.py      `loopwise-served`: lm-eval's client of a running server, with the depth in every request
    loaded.py      the model that a recipe asks for, as one of these
    prepare.py     tasks as a recipe changes them, and what cannot be measured
    rows.py        the scores of one task as a row of the result
    table.py       the result as a Markdown table
    record.py      the file of the result: finished pairs of task and depth stay in it
    pairs.py       every pair of a task and a depth, one after the other
    measure.py     the whole measurement, if lm-eval is there
"""
