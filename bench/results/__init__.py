"""The results of docs/results.md, from training to the page. Every step is a `loopwise` command, and none is run twice.

    python -m bench.results [small | real | report] [--out runs/results] [--only b,c,d,e] [--tiny] ...

`small` trains the models of (b) to (e), under two hours of two cores; `real` those of (a), for hours. `report` writes
the page from the files of OUT. A killed run goes on at the same command. Commands name folders of OUT, and run in it.
`report --real FOLDER` takes the files of (f), which `gained.py` lists.

    commands.py    `loopwise` commands in processes of their own: two at once, resumed, with their time
    costs.py       training FLOPs, and the steps that cost as much as another run
    text.py        records of text, and a tokenizer of characters
    markdown.py    tables, error bars and claims
    pictures.py    accuracy against R and FLOPs, losses against FLOPs
    chains.py      chains of assignments: the task, its base models and their tables
    relaxed.py     (a) what tying takes from SmolLM2-135M, and what recovers it
    curriculum.py  (b) difficulty and recurrences that grow, or not
    depth.py       (c) a retrofitted model, and plain ones at equal FLOPs
    routing.py     (d) Mixture-of-Recursions, and fixed recursion
    decoders.py    (e) decoders with several positions in flight
    gained.py      (f) depth in a real model, from the files of its run
    page.py        the page of all results
"""
