"""The names of StripedHyena 1's modules, to and from ours: one table, read in both directions.

``NAME.input`` is what the module NAME is called with. Two modules of the original have no counterpart here, because one
operator does their work with what surrounds them: ``blocks.i.filter`` and ``blocks.i.inner_mha_cls.inner_attn``. What
they return is what our output projections are called with.

The channels of ``blocks.i.projections`` are in our order, ``[x2 | x1 | v]``; see ``tensors``.
"""

from __future__ import annotations

import re

INPUT = ".input"
"""The end of a name that means a module's input."""

_TOP = {"embedding_layer": "embed_tokens", "norm": "norm", "unembed": "lm_head"}
_LAYER = {
    "pre_norm": "mixer_norm",
    "post_norm": "mlp_norm",
    "mlp": "mlp",
    "mlp.l1": "mlp.gate_proj",
    "mlp.l2": "mlp.up_proj",
    "mlp.l3": "mlp.down_proj",
    "inner_mha_cls": "mixer",
    "inner_mha_cls.Wqkv": "mixer.qkv_proj",
    "inner_mha_cls.inner_attn": "mixer.o_proj.input",
    "inner_mha_cls.out_proj": "mixer.o_proj",
    "projections": "mixer.in_proj",
    "filter": "mixer.out_proj.input",
    "out_filter_dense": "mixer.out_proj",
}
_TOP_BACK = {ours: theirs for theirs, ours in _TOP.items()}
_LAYER_BACK = {ours: theirs for theirs, ours in _LAYER.items()}

_THEIRS = re.compile(r"blocks\.(\d+)(?:\.(.+))?")
_OURS = re.compile(r"layers\.(\d+)(?:\.(.+))?")


def our_module(name: str) -> str | None:
    """Our name of a module of the original: ``"blocks.2.mlp.l3"`` -> ``"layers.2.mlp.down_proj"``; None for others."""
    return _translate(name, _THEIRS, "layers", _LAYER, _TOP)


def original_module(name: str) -> str | None:
    """The original's name of one of our modules, where it has one."""
    return _translate(name, _OURS, "blocks", _LAYER_BACK, _TOP_BACK)


def _translate(
    name: str, pattern: re.Pattern[str], word: str, layer: dict[str, str], top: dict[str, str]
) -> str | None:
    block = pattern.fullmatch(name)
    if block is None:
        found = top.get(name)
    elif block[2] is None:
        found = f"{word}.{block[1]}"
    else:
        found = None if layer.get(block[2]) is None else f"{word}.{block[1]}.{layer[block[2]]}"
    if found is None and name.endswith(INPUT):
        inner = _translate(name.removesuffix(INPUT), pattern, word, layer, top)
        return None if inner is None or inner.endswith(INPUT) else inner + INPUT
    return found
