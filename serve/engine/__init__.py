"""The depth-wise engine: lanes at mixed depths through one core. Nothing here imports vLLM.

A *lane* is (request row, position, depth, state). A *tick* runs the core once over all lanes, whatever their depth; a
lane that exits is read out, sampled, and its successor starts at depth 0 in the next tick. Prompt tokens are lanes.
Shapes: N rows of a call (lanes), D width, H heads, V vocabulary.
"""
