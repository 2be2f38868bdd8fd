"""The engine's tests with all of their tensors on a GPU: its kernels, graphs and loop as they run there.

python -m pytest -p tests.helpers.on_gpu tests/serve/{engine,test_{offline,generate}.py} tests/helpers/run_triton.py
"""

import torch

torch.set_default_device("cuda")
