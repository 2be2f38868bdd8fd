"""Decoders with several positions of one request in flight. They find what is put out and what starts; the staggered
tick does both. Plain decoding needs no decoder: every exit is put out, and its token starts.

    wave.py         the exact wave
    cadence.py      when waves draft
    diffusion.py    diffusion forcing
"""
