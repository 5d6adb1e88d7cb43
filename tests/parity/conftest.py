"""Comparisons with independent implementations in PyTorch; `pip install '.[parity]'`."""

import torch

torch.use_deterministic_algorithms(True)
