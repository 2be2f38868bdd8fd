"""The measurement of `loopwise eval`: held-out loss, right answers, and the effect of the recurrences.

Files in reading order:

    answers.py     conversations as sequences, with their answers and groups
    depths.py      losses, right answers and states at several depths, in one pass if possible
    result.py      means, standard errors, the effect of the recurrences
    endpoint.py    the answers of a running server
    report.py      the result as a table
"""
