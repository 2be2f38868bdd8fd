"""Depth without training: which layers of a plain model to skip, repeat, or run in smaller steps.

recipe.py    Search, the recipe of `loopwise search`
program.py   a program: the layers that run, in order, and the block that recurs
model.py     a plain model that runs any program
bench.py     the value of a program on text, on answers, or on lm-eval's tasks
record.py    the measured programs, in memory and in a file
scan.py      every block, skipped, repeated and damped
tree.py      Monte-Carlo tree search over chains of layers
chains.py    the tree search for each question, and for all of them together
save.py      a program as a recurrent-depth checkpoint
table.py     the result in lines of text
search.py    the whole search
command.py   `loopwise search`
"""
