"""Exit rules on held-out data: loss, right answers and mean depth, as the lane engine decodes. Files in reading order:

forced.py       decoding with the data's own tokens
readings.py     what a rule reads at each depth, and the thresholds that follow from it
bench.py        a model, its data and a KV policy, measured at one depth or threshold after the other
sweep.py        `loopwise eval exit_sweep=..`
choose.py       the smallest mean depth within a budget
calibration.py  the choice on one half of the data, and its check on the other
table.py        a sweep or a calibration as a table
"""
