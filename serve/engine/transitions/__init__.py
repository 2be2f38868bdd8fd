"""Every change of a State, as functions of whole tensors. Nothing else writes one.

    drafts.py    positions of waves that wait for a read-out
    steps.py     the steps of a pass and a read-out
    requests.py  requests come and go
    routers.py   a router sets depths
    padding.py   padded and warm-up passes leave nothing
    windows.py   waves and diffusions move their windows
    turns.py     rows take turns

In use, `transitions.requests.admit(state, ...)`.
"""

from . import drafts, padding, requests, routers, steps, turns, windows

__all__ = ["drafts", "padding", "requests", "routers", "steps", "turns", "windows"]
