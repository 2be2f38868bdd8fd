"""Every change of a State, as functions of whole tensors. Nothing else writes one.

    steps.py     the steps of a pass and a read-out
    requests.py  requests come and go
    routers.py   a router sets depths
    padding.py   padded and warm-up passes leave nothing
    windows.py   waves and diffusions move their windows

In use, `transitions.requests.admit(state, ...)`.
"""

from . import padding, requests, routers, steps, windows

__all__ = ["padding", "requests", "routers", "steps", "windows"]
