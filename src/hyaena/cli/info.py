"""``hyaena info``: what a checkpoint or a configuration is, on one page."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hyaena.cli.formatting import binary_bytes, decimal_bytes, short_count
from hyaena.config import ModelConfig, preset_names
from hyaena.errors import InputError
from hyaena.formats import read_config
from hyaena.sizes import ModelSizes

if TYPE_CHECKING:
    from torch import Tensor

    from hyaena.checkpoints import Checkpoint

HELP = "show a model: its stripes, sizes, cache, and how long its filters remember"

DECAYED = 1e-3
"""A filter has decayed when its envelope is at this fraction of its start."""

HORIZON = 2**40
"""Steps after which a filter that has not decayed is said never to."""

Paint = Callable[[str, str], str]
"""Style and text -> the text, coloured where the terminal is."""

_CONFIG_SUFFIXES = (".yml", ".yaml", ".json")
_BINS = 14  # of the sparkline: two per factor of ten, from 1 to 10^7 steps
_AXIS = "1   100 10k 1M"
_SPARKS = " ▁▂▃▄▅▆▇█"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument(
        "source",
        nargs="?",
        metavar="SOURCE",
        help="a configuration, a folder, a weights file, a hub id (its weights are not downloaded), or a name: "
        f"{', '.join(preset_names())}",
    )
    parser.add_argument("--config", metavar="FILE", help="the configuration, where it does not lie beside the weights")
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of a hub id")
    parser.add_argument("--methods", action="store_true", help="instead: the ways to evaluate a long convolution")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Find, describe, print."""
    if (args.source is None) != args.methods:
        raise InputError("info takes a model or --methods, one of them: name a folder, a file, or a hub id")
    if args.methods:
        table, plain = methods(), not _can_print("·", sys.stdout.encoding)
        lines = [json.dumps(table, indent=2, ensure_ascii=plain)] if args.json else render_methods(table, plain=plain)
        print("\n".join(lines))
        return 0
    config, checkpoint = _find(args.source, args.config, args.revision)
    description = {"source": args.source, **describe(config, checkpoint)}
    if args.json:
        print(json.dumps(description, indent=2, ensure_ascii=False))
        return 0
    coloured = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    plain = not _can_print(_SPARKS + "░·×²", sys.stdout.encoding)
    print("\n".join(render(description, coloured=coloured, plain=plain)))
    return 0


def _find(source: str, config: str | None, revision: str | None) -> tuple[ModelConfig, Checkpoint | None]:
    """The configuration that is meant, and the weights where there are some on this machine."""
    path = Path(source)
    if source in preset_names() and source != "cub":
        if path.exists():
            raise InputError(f"{source} is the name of a preset and of a file here: write ./{source} for the file")
        return ModelConfig.from_name(source), None
    if path.is_file() and path.suffix in _CONFIG_SUFFIXES and not path.name.endswith(".index.json"):
        return read_config(path), None

    from hyaena import checkpoints, hub

    if source not in hub.BUNDLED and path.is_dir() and not checkpoints.has_weights(path):
        return read_config(config or checkpoints.find_config(path)), None
    if source not in hub.BUNDLED and not path.exists() and hub.is_hub_id(source):
        folder = hub.download(source, revision=revision, weights=False)
        found = read_config(config or checkpoints.find_config(folder))
        return (found if config else hub.corrected(source, found)), None
    checkpoint = hub.locate(source, revision=revision, config=config)
    return checkpoint.config, checkpoint


# --- what there is to say --------------------------------------------------------------------------------------------


def describe(config: ModelConfig, checkpoint: Checkpoint | None) -> dict[str, Any]:
    """Everything that ``info`` knows, as plain values. Filters and stored bytes need a checkpoint."""
    dtype, weights = "bfloat16", None
    if checkpoint is not None:
        from hyaena import checkpoints

        dtype = str(checkpoints.survey(checkpoint).dtype).removeprefix("torch.")
        weights = {
            "dtype": dtype,
            "bytes": sum(path.stat().st_size for path in checkpoint.shards),
            "files": [str(path) for path in checkpoint.shards],
        }
    itemsize, sizes = {"float64": 8, "float32": 4}.get(dtype, 2), ModelSizes(config)
    return {
        "config": config.to_dict(),
        "parameters": {"total": sizes.parameters, **sizes.parameters_by_part},
        "weights": weights,
        "cache": {"dtype": dtype, **_cache(sizes, itemsize)},
        "filters": None if checkpoint is None else _filters(checkpoint),
    }


def _cache(sizes: ModelSizes, itemsize: int) -> dict[str, int]:
    """Bytes of a cache: keys and values of every token, and states of one sequence whatever its length."""
    return {
        "bytes_per_token": sizes.kv_bytes_per_token(itemsize),
        "bytes_per_sequence": sizes.state_bytes(itemsize),
        "bytes_at_max_length": sizes.cache_bytes(1, sizes.config.max_length, itemsize),
    }


def _filters(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """Per Hyena layer: how long its filters last, and which of its poles lie outside the unit circle."""
    import torch

    from hyaena import checkpoints
    from hyaena.errors import CheckpointError

    tensors = checkpoints.read_tensors(checkpoint, lambda name: name.endswith((".poles", ".residues")))
    layers = []
    for i, kind in enumerate(checkpoint.config.layer_types):
        if kind != "hyena":
            continue
        parts = [tensors.get(f"layers.{i}.mixer.long_filter.{part}") for part in ("poles", "residues")]
        shape = (checkpoint.config.hidden_size, checkpoint.config.state_size, 2)
        if any(part is None or part.shape != shape for part in parts):
            raise CheckpointError(f"{checkpoint.path}: layer {i} has no poles and residues of shape {list(shape)}")
        poles, residues = (torch.view_as_complex(part.double()) for part in parts if part is not None)
        size = poles.abs()
        steps = decay_steps(size, residues.abs())
        ordered = steps.sort().values
        outside = [{"channel": c, "mode": n, "modulus": float(size[c, n])} for c, n in torch.nonzero(size > 1).tolist()]
        layers.append(
            {
                "layer": i,
                "decay_steps": {
                    "min": _finite(ordered[0]),
                    "median": _finite(ordered[(len(ordered) - 1) // 2]),
                    "max": _finite(ordered[-1]),
                },
                "decay_histogram": _histogram(steps),
                "outside_unit_circle": sorted(outside, key=lambda pole: -pole["modulus"]),
            }
        )
    return layers


def decay_steps(size: Tensor, weight: Tensor) -> Tensor:
    """Steps until a filter's envelope ``e[t] = Σ_n |R_n| |p_n|^t`` is at ``DECAYED`` of its start, per channel.

    Args:
        size: |p| [D,N], float64.
        weight: |R| [D,N], float64; a channel whose residues are all zero has decayed at once.

    Returns:
        float64 [D], whole numbers; infinity where the envelope is still larger after ``HORIZON`` steps.
    """
    import torch

    size = torch.where(weight > 0, size, 0)  # a mode without weight says nothing, even if it grows

    def decayed(t: Tensor) -> Tensor:
        return (weight * size ** t[:, None]).sum(1) <= DECAYED * weight.sum(1)

    # Bisection: the envelope has not decayed at `low`, and has at `high`. It never rises, unless it grows for ever.
    low = torch.full((len(size),), -1.0, dtype=torch.float64)
    high = torch.full_like(low, HORIZON)
    ever = decayed(high)
    while bool((high - low > 1).any()):
        middle = torch.where(high - low > 1, ((low + high) / 2).floor(), high)
        done = decayed(middle) | (middle == high)
        low, high = torch.where(done, low, middle), torch.where(done, middle, high)
    return torch.where(ever, high, torch.inf)


def _finite(value: Tensor) -> int | None:
    return int(value) if bool(value.isfinite()) else None


def _histogram(steps: Tensor) -> list[int]:
    """Channels per half factor of ten, from 1 step on; the last bin takes what lasts longer, or for ever."""
    bins = (2 * steps.clamp(min=1).log10()).floor().clamp(max=_BINS - 1).long()
    return bins.bincount(minlength=_BINS).tolist()


def methods() -> dict[str, dict[str, Any]]:
    """``ops.METHODS`` as plain values."""
    from hyaena.ops import METHODS, kinds_of

    return {
        name: {
            "summary": method.summary,
            "filters": [
                re.sub("(?<=[a-z])(?=[A-Z])", " ", kind.__name__.removesuffix("Filter")).lower()
                for kind in kinds_of(name)
            ],
            "state": method.state,
            "exact": method.exact,
            "gradients": method.gradients,
            "padding": method.padding,
            "documents": method.reset,
            "cost": method.cost,
            "memory": method.memory,
        }
        for name, method in METHODS.items()
    }


# --- the page --------------------------------------------------------------------------------------------------------


def render(description: dict[str, Any], *, coloured: bool = False, plain: bool = False) -> Iterator[str]:
    """The lines of the page. ``plain`` keeps to ASCII, for terminals that know nothing else."""
    config = ModelConfig.from_dict(description["config"])
    paint = _painter(coloured)
    yield f"{paint('bold', config.name)}   {paint('dim', description['source'])}"
    yield ""
    yield from _stripes(config, paint, plain)
    yield ""
    yield from _sizes(description, config, plain)
    yield ""
    yield from _memory(description["cache"], config)
    if description["filters"]:
        yield ""
        yield from _filter_table(description["filters"], config, paint, plain)


def _stripes(config: ModelConfig, paint: Paint, plain: bool) -> Iterator[str]:
    """Every layer a bar, dark for attention; two rows high, with a ruler."""
    dark, light = ("#", ".") if plain else ("█", "░")
    step = 2 if config.num_layers <= 48 else 1
    for start in range(0, config.num_layers, 96 // step):
        kinds = config.layer_types[start : start + 96 // step]
        row = "".join(
            paint("attention" if kind == "attention" else "hyena", (dark if kind == "attention" else light) * step)
            for kind in kinds
        )
        yield f"  {row}"
        yield f"  {row}"
        ruler = "".join(f"{start + i:<{8 * step}}" for i in range(0, len(kinds), 8))
        yield paint("dim", f"  {ruler}".rstrip())
    legend = [
        f"{paint(kind, sign * 2)} {kind} {config.layer_types.count(kind)}"
        for kind, sign in (("hyena", light), ("attention", dark))
        if kind in config.layer_types
    ]
    yield "  " + "   ".join(legend)


def _sizes(description: dict[str, Any], config: ModelConfig, plain: bool) -> Iterator[str]:
    parts = description["parameters"]
    total = parts["total"]
    yield f"  {'parameters':<14}{total:>16,}   {short_count(total)}"
    for name in ("embeddings", "mlp", *dict.fromkeys(config.layer_types), "norms"):
        share = parts[name] / total
        if parts[name]:
            bar = ("#" if plain else "█") * round(24 * share)
            yield f"    {name:<12}{parts[name]:>16,}   {share:6.1%}  {bar}".rstrip()
    weights = description["weights"]
    if weights is None:
        size, note = ModelSizes(config).weight_bytes(2), "in bfloat16, poles and residues in float32 (none were read)"
    else:
        count = len(weights["files"])
        size, note = weights["bytes"], f"{weights['dtype']}, {count} file{'s' * (count > 1)}"
    yield f"  {'weights':<14}{decimal_bytes(size):>16}   {note}"
    dot, times = ("/", "x") if plain else ("·", "×")
    inside = "inside" if config.norm_eps_inside_root else "outside"
    scaling = "" if config.rope_scaling_factor == 1 else f", positions / {config.rope_scaling_factor:g}"
    groups = config.num_key_value_heads
    shared = "" if groups == config.num_attention_heads else f" ({groups} key/value)"
    rows = [
        ("shape", f"width {config.hidden_size:,} {dot} MLP {config.intermediate_size:,} {config.activation}"),
        ("", f"RMSNorm eps {config.norm_eps:g} {inside} the root"),
    ]
    if "hyena" in config.layer_types:
        short = f"short filter of {config.short_filter_length}"
        rows.append(("hyena", f"{config.state_size} modes per channel {dot} {short}"))
    if "attention" in config.layer_types:
        heads = f"{config.num_attention_heads} heads{shared} {times} {config.head_dim}"
        rows.append(("attention", f"{heads} {dot} rotary base {config.rope_theta:,.0f}{scaling}"))
    tied = "tied" if config.tie_embeddings else "untied"
    rows.append(("tokens", f"{config.vocab_size:,} ({config.tokenizer}), {tied} {dot} up to {config.max_length:,}"))
    yield ""
    for name, text in rows:
        yield f"  {name:<14}{text}"


def _memory(cache: dict[str, Any], config: ModelConfig) -> Iterator[str]:
    yield f"  cache, {cache['dtype']}"
    per_token, per_sequence = cache["bytes_per_token"], cache["bytes_per_sequence"]
    if per_token:
        yield f"    {'per token':<12}{binary_bytes(per_token):>16}   keys and values"
    if per_sequence:
        yield f"    {'per sequence':<12}{binary_bytes(per_sequence):>16}   Hyena states, whatever the length"
    yield f"    {'in all':<12}{binary_bytes(cache['bytes_at_max_length']):>16}   at {config.max_length:,} tokens"


def _filter_table(filters: list[dict[str, Any]], config: ModelConfig, paint: Paint, plain: bool) -> Iterator[str]:
    yield "  filters: tokens until a channel's filter has decayed to 1/1000"
    yield paint("dim", f"    {'layer':>5}{'min':>12}{'median':>12}{'max':>12}   {_AXIS}  poles outside the unit circle")
    most = max(max(layer["decay_histogram"]) for layer in filters)
    for layer in filters:
        steps = layer["decay_steps"]
        numbers = "".join(f"{_steps(steps[name], plain):>12}" for name in ("min", "median", "max"))
        poles = layer["outside_unit_circle"]
        spark = _spark(layer["decay_histogram"], most, plain)
        yield f"    {layer['layer']:>5}{numbers}   {paint('hyena', spark)}  {_outside(poles, config, paint)}".rstrip()


def _outside(poles: list[dict[str, Any]], config: ModelConfig, paint: Paint) -> str:
    if not poles:
        return "none"
    worst = poles[0]
    count = f"{len(poles):,} of {config.hidden_size * config.state_size:,}"
    where = f"channel {worst['channel']} mode {worst['mode']} |p| = {worst['modulus']:.7f}"
    return paint("warning", f"{count}, the largest: {where}")


def _spark(histogram: list[int], most: int, plain: bool) -> str:
    levels = " .:-=+*#" if plain else _SPARKS
    top = len(levels) - 1
    return "".join(levels[-(-count * top // most)] for count in histogram)


def render_methods(table: dict[str, dict[str, Any]], *, plain: bool = False) -> Iterator[str]:
    """The table of methods: three lines each, so that it fits a terminal."""
    flags = ("exact", "gradients", "padding", "documents")
    header = "".join(f"{flag:<{len(flag) + 2}}" for flag in flags)
    yield f"  {'method':<15}{'state':<8}{header}{'cost':<19}memory"
    for name, method in table.items():
        answers = "".join(f"{'yes' if method[flag] else 'no':<{len(flag) + 2}}" for flag in flags)
        cost, memory = (method[key].replace("·", "*") if plain else method[key] for key in ("cost", "memory"))
        yield ""
        yield f"  {name:<15}{method['state']:<8}{answers}{cost:<19}{memory}"
        yield f"  {'':<15}{method['summary']}"
        yield f"  {'':<15}filters: {', '.join(method['filters'])}"
    yield ""
    yield "  documents: packed documents in one pass; elsewhere one after another"
    yield "  cost, memory: per channel, for T steps, N modes, C steps of a chunk, W taps of a window"


def _painter(coloured: bool) -> Paint:
    codes = {"bold": "1", "dim": "2", "hyena": "33", "attention": "36", "warning": "31"}

    def paint(style: str, text: str) -> str:
        return f"\x1b[{codes[style]}m{text}\x1b[0m" if coloured else text

    return paint


def _steps(count: int | None, plain: bool) -> str:
    if count is None:
        return "never" if plain else "∞"
    return f"{count:,}"


def _can_print(text: str, encoding: str | None) -> bool:
    try:
        text.encode(encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True
