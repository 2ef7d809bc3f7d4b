"""Where the tests of kernels keep their tensors."""

import torch

# Compiled on a GPU where there is one, else under Triton's interpreter (see conftest.py).
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
