"""The fixed engine: every request at one depth, as an ordinary vLLM model with a KV cache for every recurrence.

In reading order:

    recurrence.py  prelude, R times the core, coda, in place of the source model's layers
    relaxation.py  a relaxed layer at one depth
"""
