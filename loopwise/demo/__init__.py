"""The main job end to end: `python -m loopwise.demo`, or `make demo`."""
