"""The names of tensors in the checkpoints of the original implementations: one table, read in both directions."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

PREFIX = "backbone."
"""What the hub's safetensors files write before every key."""

TOP = {
    "embedding_layer.weight": "embed_tokens.weight",
    "unembed.weight": "lm_head.weight",
    "norm.scale": "norm.weight",
}
LAYER = {
    "pre_norm.scale": "mixer_norm.weight",
    "post_norm.scale": "mlp_norm.weight",
    "mlp.l1.weight": "mlp.gate_proj.weight",
    "mlp.l2.weight": "mlp.up_proj.weight",
    "mlp.l3.weight": "mlp.down_proj.weight",
    "inner_mha_cls.Wqkv.weight": "mixer.qkv_proj.weight",
    "inner_mha_cls.Wqkv.bias": "mixer.qkv_proj.bias",
    "inner_mha_cls.out_proj.weight": "mixer.o_proj.weight",
    "inner_mha_cls.out_proj.bias": "mixer.o_proj.bias",
    "projections.weight": "mixer.in_proj.weight",
    "projections.bias": "mixer.in_proj.bias",
    "out_filter_dense.weight": "mixer.out_proj.weight",
    "out_filter_dense.bias": "mixer.out_proj.bias",
    "filter.short_filter_weight": "mixer.short_filter.weight",
    "filter.short_filter_bias": "mixer.short_filter.bias",
    "filter.D": "mixer.long_filter.skip",
}
"""Names that StripedHyena 1 and 2 share, within a layer and outside of them."""

INTERLEAVED = ("mixer.in_proj.weight", "mixer.in_proj.bias", "mixer.short_filter.weight", "mixer.short_filter.bias")
"""Our names of the tensors whose rows are the channels of ``[x2 | x1 | v]``."""

_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")
_OURS = re.compile(r"layers\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Names:
    """The names of one format.

    Attributes:
        layer: its name within a layer -> ours.
        dropped: what it stores and we do not.
    """

    layer: Mapping[str, str]
    dropped: re.Pattern[str]

    def ours(self, key: str) -> str | None:
        """Our name for a key; None for what is dropped. Other keys stay unchanged."""
        key = key.removeprefix(PREFIX)
        if self.dropped.fullmatch(key):
            return None
        block = _BLOCK.fullmatch(key)
        if block is not None and block[2] in self.layer:
            return f"layers.{block[1]}.{self.layer[block[2]]}"
        return TOP.get(key, key)

    def theirs(self, name: str) -> str:
        """The format's key for a name of ours; other names stay unchanged."""
        layer = _OURS.fullmatch(name)
        if layer is None:
            return {ours: theirs for theirs, ours in TOP.items()}.get(name, name)
        back = {ours: theirs for theirs, ours in self.layer.items()}
        return f"blocks.{layer[1]}.{back[layer[2]]}" if layer[2] in back else name


def part(name: str | None) -> str | None:
    """A name of ours within its layer: ``"layers.2.mlp.up_proj.weight"`` -> ``"mlp.up_proj.weight"``."""
    layer = _OURS.fullmatch(name or "")
    return None if layer is None else layer[2]


def matches_tensors(keys: Iterable[str]) -> bool:
    """Whether a state dict has the names of an original implementation (with or without ``backbone.``)."""
    return any(key.startswith("blocks.") or key in TOP for key in (key.removeprefix(PREFIX) for key in keys))
