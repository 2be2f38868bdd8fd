"""The main job end to end: `python -m loopwise.demo`, or `make demo`.

Files in reading order:

    processes.py     steps and servers as processes
    pretrained.py    part (a): a pretrained model becomes recurrent
    chains.py        part (b): a small model that gains by depth
    serving.py       part (c): both models on vLLM servers
    __main__.py      the command
"""
