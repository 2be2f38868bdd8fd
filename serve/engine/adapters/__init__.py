"""Models in the engine's pieces (forward.Parts).

transformers.py    a transformers RecurrentDepthForCausalLM
"""
