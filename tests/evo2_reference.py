"""StripedHyena 2 in float64, from the original's tensors and configuration keys, written out: an oracle for tests.

It shares no code with the package: no operator, no conversion, no configuration.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

KINDS = ("attn", "hcl", "hcm", "hcs")


def random_state(config: Mapping[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """A checkpoint with the original's names and layouts, of random numbers that keep activations of order one."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(*shape, generator=generator)

    d, v, n, head = config["hidden_size"], config["vocab_size"], config["state_size"], config["num_attention_heads"]
    size, short, width = config["inner_mlp_size"], config["short_filter_length"], d // head
    state = {"embedding_layer.weight": normal(v, d), "norm.scale": 1 + normal(d, scale=0.2)}
    state["unembed.weight"] = state["embedding_layer.weight"] if config["tie_embeddings"] else normal(v, d)
    for i in range(config["num_layers"]):
        kind, block = kind_of(config, i), f"blocks.{i}."
        part = {f"{name}_norm.scale": 1 + normal(d, scale=0.2) for name in ("pre", "post")}
        part |= {f"mlp.{name}.weight": normal(size, d, scale=d**-0.5) for name in ("l1", "l2")}
        part["mlp.l3.weight"] = normal(d, size, scale=size**-0.5)
        if kind == "attn":
            part["inner_mha_cls.Wqkv.weight"] = normal(3 * d, d, scale=d**-0.5)
            part["inner_mha_cls.out_proj.weight"] = normal(d, d, scale=d**-0.5)
            part["inner_mha_cls.out_proj.bias"] = normal(d, scale=0.2)
            base = config.get("rotary_emb_base", 1_000_000)
            part["inner_mha_cls.rotary_emb.inv_freq"] = base ** -(torch.arange(0, width, 2) / width)
        else:
            part["projections.weight"] = normal(3 * d, d, scale=d**-0.5)
            part["filter.short_filter_weight"] = normal(3 * d, 1, short, scale=short**-0.5)
            part["out_filter_dense.weight"] = normal(d, d, scale=d**-0.5)
            part["out_filter_dense.bias"] = normal(d, scale=0.2)
        if kind == "hcl":
            rates = torch.empty(d, n, 1).uniform_(math.log(1e-3), 0, generator=generator)
            part["filter.log_poles"] = -rates.exp()
            part["filter.residues"] = normal(d, n, scale=n**-0.5) * (1 - torch.exp(-2 * rates.exp()[..., 0])).sqrt()
        elif kind in ("hcm", "hcs"):
            taps, groups = config[f"{kind}_filter_length"], config[f"{kind}_filter_groups"]
            part["filter.h"] = normal(groups, 1, taps, scale=taps**-0.5)
        if kind == "hcl" or (kind in ("hcm", "hcs") and config[f"{kind}_filter_length"] >= 128):
            part["filter.D"] = normal(d)
        state |= {block + name: tensor for name, tensor in part.items()}
    return state


def kind_of(config: Mapping[str, Any], layer: int) -> str:
    return next(kind for kind in KINDS if layer in config[f"{kind}_layer_idxs"])


def forward(state: Mapping[str, Tensor], config: Mapping[str, Any], ids: Tensor) -> Tensor:
    """Logits [B,T,V] of ids [B,T]."""
    w = {name: tensor.double() for name, tensor in state.items() if tensor.is_floating_point()}
    eps, time = float(config["eps"]), ids.shape[1]

    def norm(x: Tensor, name: str) -> Tensor:
        return w[name] * x / (x.square().mean(-1, keepdim=True).sqrt() + eps)

    x = w["embedding_layer.weight"][ids]
    for i in range(config["num_layers"]):
        block = {name.removeprefix(f"blocks.{i}."): t for name, t in w.items() if name.startswith(f"blocks.{i}.")}
        u = norm(x, f"blocks.{i}.pre_norm.scale")
        x = x + (attention(u, block, config) if kind_of(config, i) == "attn" else hyena(u, block))
        u = norm(x, f"blocks.{i}.post_norm.scale")
        gate = u @ block["mlp.l1.weight"].T
        if i == 0 or not config.get("evo2_style_activations", False):
            gate = gate * (1 + torch.erf(gate / math.sqrt(2))) / 2
        x = x + (gate * (u @ block["mlp.l2.weight"].T)) @ block["mlp.l3.weight"].T
    assert x.shape[1] == time
    return norm(x, "norm.scale") @ w["unembed.weight"].T


def attention(u: Tensor, w: Mapping[str, Tensor], config: Mapping[str, Any]) -> Tensor:
    """Heads one after another, rotated pair by pair."""
    time, d = u.shape[1:]
    heads = config["num_attention_heads"]
    width = d // heads
    factor = config.get("rotary_emb_scaling_factor", 1) if config.get("use_interpolated_rotary_pos_emb") else 1
    angle = torch.arange(time, dtype=torch.float64)[:, None] / factor * w["inner_mha_cls.rotary_emb.inv_freq"]
    turn = torch.polar(torch.ones_like(angle), angle)  # [T,width/2]

    def rotated(x: Tensor) -> Tensor:
        pairs = torch.complex(*x.split(width // 2, dim=-1)) * turn
        return torch.cat([pairs.real, pairs.imag], dim=-1)

    out = []
    for rows in w["inner_mha_cls.Wqkv.weight"].split(3 * width):
        q, k, v = (u @ rows.T).split(width, dim=-1)
        score = rotated(q) @ rotated(k).mT / math.sqrt(width)
        score = score.masked_fill(torch.ones(time, time, dtype=torch.bool).triu(1), -math.inf)
        out.append(score.softmax(-1) @ v)
    assert len(out) == heads
    return torch.cat(out, -1) @ w["inner_mha_cls.out_proj.weight"].T + w["inner_mha_cls.out_proj.bias"]


def hyena(u: Tensor, w: Mapping[str, Tensor]) -> Tensor:
    """Sums over all steps before, one step at a time."""
    z = u @ w["projections.weight"].T
    time, d = z.shape[1], z.shape[2] // 3
    short = w["filter.short_filter_weight"][:, 0]
    taps = short.shape[1]
    past = torch.nn.functional.pad(z, (0, 0, taps - 1, 0))
    z = sum((short[:, k] * past[:, k : k + time] for k in range(taps)), torch.zeros(()))
    x2, x1, v = z[..., 0::3], z[..., 1::3], z[..., 2::3]
    x = x1 * v
    if "filter.h" in w:
        h = w["filter.h"][:, 0]
        h = torch.stack([h[channel // (d // len(h))] for channel in range(d)])
        if h.shape[1] < 128:
            h = torch.stack([h[:, h.shape[1] - 1 - j] for j in range(h.shape[1])], dim=1)
    else:
        steps = torch.arange(time, dtype=torch.float64)
        h = (w["filter.residues"][..., None] * (w["filter.log_poles"] * steps).exp()).sum(1)
    y = torch.zeros_like(x)
    for t in range(time):
        for j in range(min(t + 1, h.shape[1])):
            y[:, t] += h[:, j] * x[:, t - j]
    y = (y + w["filter.D"] * x if "filter.D" in w else y) * x2
    return y @ w["out_filter_dense.weight"].T + w["out_filter_dense.bias"]
