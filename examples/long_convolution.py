"""The long convolution alone: methods that agree, states, and the law of splitting.

python examples/long_convolution.py
"""

import torch

from hyaena import ops

torch.manual_seed(0)
channels, modes, steps = 4, 2, 1000

# A filter is a sum of damped oscillations: h[t] = Re sum_n R_n p_n^t. Poles inside the unit circle decay.
poles = torch.polar(torch.rand(channels, modes) * 0.1 + 0.89, torch.rand(channels, modes) * 3)
residues = torch.randn(channels, modes, dtype=torch.complex64)
filter = ops.ModalFilter(poles, residues)
x = torch.randn(1, steps, channels)

# Every method computes the same output and leaves the same state.
expected, final = ops.long_conv(x, filter, method="reference")  # a float64 loop over time
for method in ("recurrence", "fft", "blocked", "scan", "canonical-fft"):
    y, state = ops.long_conv(x, filter, method=method)
    print(f"{method:13} largest error {(y - expected).abs().max():.1e}, of the state {(state - final).abs().max():.1e}")

# The law: cut the input anywhere and go on from the state, by another method if you like.
first, state = ops.long_conv(x[:, :300], filter, method="fft")
second, state = ops.long_conv(x[:, 300:], filter, state, method="blocked")
assert torch.allclose(torch.cat([first, second], dim=1), expected, atol=1e-3)
print("state:", tuple(state.shape), state.dtype, "- one number per channel and mode, whatever the length")

# How long does each channel remember? The steps until its filter has decayed to 1/1000.
print("decay:", ops.decay_lengths(filter.poles).amax(1).round().int().tolist(), "steps")
