"""A kind of layer that the package does not know, in a model that generates text with it.

    python examples/own_layer.py

The layer is ``y[t] = out(mean over s <= t of value(x[s]))``: attention with equal weights.
It remembers one sum per row.
docs/extending.md explains the protocol, tests/test_foreign_layer.py adds padding, a filter, sizes and saving.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

import hyaena
from hyaena.layers import MIXERS, record
from hyaena.ops import RowTensors
from hyaena.tokenizers import ByteTokenizer


class Fields(NamedTuple):
    """The tensors of the state; the first axis of each is the row."""

    total: Tensor  # [B,D], the sum of the values so far
    count: Tensor  # [B], how many there were


class MeanState(RowTensors, Fields):
    """What the layer remembers. Selecting, joining and copying rows are inherited."""

    __slots__ = ()


class Mean(nn.Module):
    """Average the values of all tokens so far."""

    def __init__(self, config):
        super().__init__()
        self.value, self.out = (nn.Linear(config.hidden_size, config.hidden_size) for _ in range(2))

    def make_state(self, batch, *, max_length, dtype, device):
        width = self.value.in_features
        return MeanState(torch.zeros(batch, width, dtype=dtype, device=device), torch.zeros(batch, device=device))

    def forward(self, x, context, state, keep):  # any number of tokens: training, prefill
        total = self.value(x).cumsum(1)
        count = torch.arange(1.0, x.shape[1] + 1, device=x.device).expand(x.shape[:2])
        if state is not None:
            total, count = total + state.total[:, None], count + state.count[:, None]
        y = self.out(total[:, -keep:] / count[:, -keep:, None].to(x))
        return y, MeanState(total[:, -1], count[:, -1])

    def step(self, x, norm, state, context):  # one token per row, in place, with norm and residual: static decoding
        state.total.add_(context.operators.linear(x, record(self.value), norm=norm))
        state.count.add_(1)
        return context.operators.linear(state.total / state.count.to(x)[:, None], record(self.out), residual=x)

    def output_projection(self):  # its weights start smaller in deep models
        return self.out


config = hyaena.ModelConfig(
    layer_types=("mean", "hyena", "attention"),
    vocab_size=260,
    hidden_size=32,
    intermediate_size=64,
    num_attention_heads=4,
    num_key_value_heads=2,
    state_size=2,
    tokenizer="bytes",
)
torch.manual_seed(0)
model = hyaena.StripedHyena(config, mixers={**MIXERS, "mean": Mean})

# The splitting law: a sequence read in one pass, or split and continued from the cache, gives the same logits.
ids = torch.randint(256, (1, 20))
with torch.inference_mode():
    cache = model.make_cache(1)
    parts = torch.cat([model(ids[:, :7], cache=cache), model(ids[:, 7:], cache=cache)], dim=1)
    assert torch.allclose(parts, model(ids), atol=1e-5)

texts = {
    way: hyaena.generate(model, ByteTokenizer(260), "ab", max_new_tokens=8, decoding=way).tokens
    for way in ("eager", "static")
}
assert texts["eager"] == texts["static"]
print(sum(p.numel() for p in model.parameters()), "parameters, untrained, write", texts["eager"])
