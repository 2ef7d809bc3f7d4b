"""``hyaena info``: describe a checkpoint or a configuration on one page."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hyaena.cli.formatting import binary_bytes, decimal_bytes, short_count
from hyaena.config import ModelConfig, preset_names
from hyaena.errors import InputError, counted, nearest, printable
from hyaena.formats import read_config
from hyaena.schemes import CACHE_DTYPES, SCHEMES
from hyaena.sizes import ModelSizes

if TYPE_CHECKING:
    from torch import Tensor

    from hyaena.checkpoints import Checkpoint

HELP = "show a model: its stripes, sizes, cache, and how long its filters remember"
EXAMPLES = (
    "hyaena info cub",
    "hyaena info evo2-7b --json",
)

DECAYED = 1e-3
"""A filter has decayed when its envelope is at this fraction of its start."""

HORIZON = 2**40
"""Steps after which a filter that has not decayed is listed as one that never does."""

Paint = Callable[[str, str], str]
"""Style and text -> the text, coloured where the terminal shows colours."""

_CONFIG_SUFFIXES = (".yml", ".yaml", ".json")
_BINS = 14  # of the sparkline: two per factor of ten, from 1 to 10^7 steps
_AXIS = "1   100 10k 1M"
_SPARKS = " ▁▂▃▄▅▆▇█"
_WIDEST = 100  # columns of the page, however wide the terminal is
_NARROWEST = 60
_SIGNS = {"attention": "█", "hyena": "░", "hyena_li": "░", "hyena_mr": "▒", "hyena_se": "▓"}
_PLAIN_SIGNS = {"attention": "#", "hyena": ".", "hyena_li": ".", "hyena_mr": "-", "hyena_se": "="}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument(
        "source",
        nargs="?",
        metavar="SOURCE",
        help="a configuration, a folder, a weights file, a hub id (its weights are not downloaded), or a name: "
        f"{', '.join(preset_names())}",
    )
    parser.add_argument("--config", metavar="FILE", help="the configuration, where it is not beside the weights")
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of a hub id")
    parser.add_argument(
        "--cache-dtype",
        choices=("auto", *CACHE_DTYPES),
        default="auto",
        help="count keys and values in this dtype (auto: the model's)",
    )
    parser.add_argument("--methods", action="store_true", help="instead: the ways to evaluate a long convolution")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Find the model, describe it, print the page."""
    width = min(_WIDEST, max(_NARROWEST, shutil.get_terminal_size().columns))
    if (args.source is None) != args.methods:
        raise InputError("info takes a model or --methods, one of them: name a folder, a file, or a hub id")
    if args.methods:
        table, plain = methods(), not _can_print("·", sys.stdout.encoding)
        if args.json:
            print(json.dumps(table, indent=2, ensure_ascii=plain))
        else:
            print("\n".join(render_methods(table, width=width, plain=plain)))
        return 0
    config, checkpoint = _find(args.source, args.config, args.revision)
    if args.cache_dtype != "auto":
        from hyaena.hub import check_cache_dtype  # torch, which a page without it does not need

        check_cache_dtype(args.cache_dtype, config)
    description = {"source": args.source, **describe(config, checkpoint, args.cache_dtype)}
    if args.json:
        text = json.dumps(description, indent=2, ensure_ascii=False)
        print(text if _can_print(text, sys.stdout.encoding) else json.dumps(description, indent=2))
        return 0
    coloured = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    plain = not _can_print("".join([_SPARKS, *_SIGNS.values(), "·×"]), sys.stdout.encoding)
    print("\n".join(render(description, width=width, coloured=coloured, plain=plain)))
    return 0


def _find(source: str, config: str | None, revision: str | None) -> tuple[ModelConfig, Checkpoint | None]:
    """Find the configuration, and the weights where there are some on this machine."""
    path = Path(source)
    if source in preset_names() and source != "cub":  # cub has weights, too
        if os.path.lexists(source):
            raise InputError(f"{source} is the name of a preset and of a file here: write ./{source} for the file")
        if config is not None or revision is not None:
            raise InputError(f"{source} is the name of a configuration: leave --config and --revision out")
        return ModelConfig.from_name(source), None
    # os.path answers False for names that cannot be files; pathlib raises.
    if os.path.isfile(source) and path.suffix in _CONFIG_SUFFIXES and not path.name.endswith(".index.json"):
        if config is not None or revision is not None:
            raise InputError(f"{source} is a configuration itself: leave --config and --revision out")
        return read_config(path), None

    from hyaena import checkpoints, hub

    near = nearest(source, preset_names())
    if near is not None and source not in hub.BUNDLED and not os.path.lexists(source) and not hub.is_hub_id(source):
        raise InputError(f"{source}: no such model: did you mean {near}?")
    if source not in hub.BUNDLED and os.path.isdir(source) and not checkpoints.has_weights(path):
        if revision is not None:
            raise InputError(f"--revision is for hub ids, and {source} is on this machine: leave it out")
        return read_config(config or checkpoints.find_config(path)), None
    if source not in hub.BUNDLED and not os.path.lexists(source) and hub.is_hub_id(source):
        return hub.describe(source, revision=revision, config=config)[0], None
    checkpoint = hub.locate(source, revision=revision, config=config)
    return checkpoint.config, checkpoint


# --- the description -------------------------------------------------------------------------------------------------


def describe(config: ModelConfig, checkpoint: Checkpoint | None, cache_dtype: str = "auto") -> dict[str, Any]:
    """Describe a model in plain values. Filters and stored bytes need a checkpoint.

    ``cache_dtype`` is of keys and values, as in ``hub.load``.

    Raises:
        CheckpointError: its tensors are not those of the configuration.
    """
    dtype, weights = "bfloat16", None
    if checkpoint is not None:
        from hyaena import checkpoints

        checkpoints.check_names_and_shapes(checkpoint)  # else the page would describe another model
        dtype = str(checkpoints.inspect(checkpoint).dtype).removeprefix("torch.")
        weights = {
            "dtype": dtype,
            "bytes": sum(path.stat().st_size for path in checkpoint.shards),
            "files": [str(path) for path in checkpoint.shards],
            "narrow": ModelSizes(config).narrow_bytes(),
        }
    kept, sizes = dtype if cache_dtype == "auto" else cache_dtype, ModelSizes(config)
    cache = _cache(sizes, *({"float64": 8, "float32": 4, "int8": 1}.get(name, 2) for name in (dtype, kept)))
    return {
        "config": config.to_dict(),
        "parameters": {"total": sizes.parameters, **sizes.parameters_by_part},
        "weights": weights,
        "by_scheme": _by_scheme(config),
        "cache": {"dtype": dtype, "kv_dtype": kept, **cache},
        "filters": None if checkpoint is None else _filters(checkpoint),
    }


def _by_scheme(config: ModelConfig) -> dict[str, int]:
    """Bytes of the weights by the schemes that fit the sizes, everything else in bfloat16; see docs/quantization.md."""
    widths = {config.hidden_size, config.intermediate_size}
    fitting = [name for name, scheme in SCHEMES.items() if not any(width % (scheme.group or 1) for width in widths)]
    return {name: ModelSizes(replace(config, weights=name)).weight_bytes(2) for name in fitting}


def _cache(sizes: ModelSizes, itemsize: int, kv_itemsize: int) -> dict[str, int]:
    """Bytes of a cache: keys and values of every token, and states of one sequence whatever its length."""
    return {
        "bytes_per_token": sizes.kv_bytes_per_token(kv_itemsize),
        "bytes_per_sequence": sizes.state_bytes(itemsize),
        "bytes_at_max_length": sizes.cache_bytes(1, sizes.config.max_length, itemsize, kv_itemsize),
    }


def _filters(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """Per layer with modal filters: how long they last, and which of their poles lie outside the unit circle."""
    import torch

    from hyaena import checkpoints

    config, layers = checkpoint.config, []
    tensors = checkpoints.read_tensors(checkpoint, lambda name: name.endswith(("poles", "residues")))
    for i, kind in enumerate(config.layer_types):
        if kind not in ("hyena", "hyena_li"):
            continue
        names = ("poles" if kind == "hyena" else "log_poles", "residues")
        poles, residues = (tensors[f"layers.{i}.mixer.long_filter.{name}"].double() for name in names)
        if kind == "hyena":
            poles, residues = torch.view_as_complex(poles), torch.view_as_complex(residues)
        else:
            poles = poles.exp()
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
        weight: |R| [D,N], float64; a channel whose residues are all zero has decayed at step 0.

    Returns:
        float64 [D], whole numbers; infinity where the envelope is still larger after ``HORIZON`` steps.
    """
    import torch

    size = torch.where(weight > 0, size, 0)  # a mode without weight has no effect, even if it grows

    def decayed(t: Tensor) -> Tensor:
        return (weight * size ** t[:, None]).sum(1) <= DECAYED * weight.sum(1)

    # Bisection: the envelope has not decayed at `low`, and has at `high`. It never rises, unless it grows for ever.
    low = torch.full((len(size),), -1.0, dtype=torch.float64, device="cpu")
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


def render(
    description: dict[str, Any], *, width: int = _WIDEST, coloured: bool = False, plain: bool = False
) -> Iterator[str]:
    """Write the page, in lines of at most ``width`` columns; ``plain`` uses ASCII only."""
    config = ModelConfig.from_dict(description["config"])
    paint = _painter(coloured)
    name = _fitted(config.name, width, plain)
    source = _fitted(str(description["source"]), width - 3, plain)
    if source == name:  # the bundled model and the presets
        yield paint("bold", name)
    elif len(name) + 3 + len(source) <= width:
        yield f"{paint('bold', name)}   {paint('dim', source)}"
    else:
        yield paint("bold", name)
        yield f"   {paint('dim', source)}"
    yield ""
    yield from _stripes(config, paint, width, plain)
    yield ""
    yield from _sizes(description, config, width, plain)
    yield ""
    yield from _shape(config, width, plain)
    yield ""
    yield from _memory(description["cache"], config, width)
    if description["filters"]:
        yield ""
        yield from _filter_table(description["filters"], config, paint, width, plain)


def _fitted(text: str, width: int, plain: bool) -> str:
    """A text from outside in at most ``width`` columns."""
    text = printable(text, limit=width)
    return text.replace("…", "~").encode("ascii", "backslashreplace").decode()[:width] if plain else text


def _stripes(config: ModelConfig, paint: Paint, width: int, plain: bool) -> Iterator[str]:
    """Draw every layer as a bar, dark for attention; two rows high, with a ruler."""
    signs = _PLAIN_SIGNS if plain else _SIGNS
    space = width - 2
    step = 2 if config.num_layers <= 48 and 2 * config.num_layers <= space else 1
    per_row = space // step // 8 * 8

    def drawn(kind: str, columns: int) -> str:
        return paint("attention" if kind == "attention" else "hyena", signs.get(kind, "?") * columns)

    for start in range(0, config.num_layers, per_row):
        kinds = config.layer_types[start : start + per_row]
        row = "".join(drawn(kind, step) for kind in kinds)
        yield f"  {row}"
        yield f"  {row}"
        ruler = "".join(f"{start + i:<{8 * step}}" for i in range(0, len(kinds), 8))
        yield paint("dim", f"  {ruler}".rstrip())
    counts = {kind: config.layer_types.count(kind) for kind in sorted(set(config.layer_types), key=_order)}
    legend, columns = "", 0
    for kind, count in counts.items():
        length = len(f"   {kind} {count}   ")
        if columns and columns + length > space:
            yield f"  {legend.rstrip()}"
            legend, columns = "", 0
        legend += f"{drawn(kind, 2)} {kind} {count}   "
        columns += length
    yield f"  {legend.rstrip()}"


def _order(kind: str) -> tuple[bool, str]:
    """Kinds as they are listed: attention last."""
    return kind == "attention", kind


def _row(head: str, text: str, width: int) -> Iterator[str]:
    """Write a text after the head of its row, wrapped under its own beginning."""
    indent = " " * len(head)
    yield from textwrap.wrap(text, width, initial_indent=head, subsequent_indent=indent, break_on_hyphens=False)


def _sizes(description: dict[str, Any], config: ModelConfig, width: int, plain: bool) -> Iterator[str]:
    parts = description["parameters"]
    total = parts["total"]
    yield f"  {'parameters':<14}{total:>16,}   {short_count(total)}"
    bar = min(24, width - 43)
    for name in ("embeddings", "mlp", *sorted(set(config.layer_types), key=_order), "norms"):
        share = parts[name] / total
        if parts[name]:
            drawn = ("#" if plain else "█") * round(bar * share)
            yield f"    {name:<12}{parts[name]:>16,}   {share:6.1%}  {drawn}".rstrip()
    weights = description["weights"]
    if weights is None:
        size, note = ModelSizes(config).weight_bytes(2), "in bfloat16, poles and residues in float32 (none were read)"
    else:
        count = len(weights["files"])
        narrow = [f"{name} {decimal_bytes(size)}" for name, size in weights["narrow"].items()]
        size, note = weights["bytes"], ", ".join([*narrow, f"{weights['dtype']}, {counted(count, 'file')}"])
    yield from _row(f"  {'weights':<14}{decimal_bytes(size):>16}   ", note, width)
    if config.weights is None:
        dot = "," if plain else " ·"
        sizes = f"{dot} ".join(f"{name} {decimal_bytes(size)}" for name, size in description["by_scheme"].items())
        yield from _row(f"  {'narrow':<33}", sizes, width)


def _shape(config: ModelConfig, width: int, plain: bool) -> Iterator[str]:
    """Describe widths, norms, filters, heads and tokens, one row each."""
    dot, times = ("/", "x") if plain else ("·", "×")
    inside = "inside" if config.norm_eps_inside_root else "outside"
    scaling = "" if config.rope_scaling_factor == 1 else f", positions / {config.rope_scaling_factor:g}"
    groups = config.num_key_value_heads
    shared = "" if groups == config.num_attention_heads else f" ({groups} key/value)"
    heads = f"{counted(config.num_attention_heads, 'head')}{shared} {times} {config.head_dim}"
    short = f"short filter of {config.short_filter_length}"
    texts = {
        "hyena": f"{counted(config.state_size, 'mode')} per channel {dot} {short}",
        "hyena_li": f"{counted(config.state_size, 'real mode')} per channel {dot} {short}",
        "hyena_se": f"{_taps(config.se_filter_length, config.se_filter_groups)} {dot} {short}",
        "hyena_mr": f"{_taps(config.mr_filter_length, config.mr_filter_groups)} {dot} {short}",
        "attention": f"{heads} {dot} rotary base {config.rope_theta:,.0f}{scaling}",
    }
    tied = "tied" if config.tie_embeddings else "untied"
    first = config.activation_of(0)
    activation = config.activation if first == config.activation else f"{config.activation} ({first} in layer 0)"
    rows = [
        ("shape", f"width {config.hidden_size:,} {dot} MLP {config.intermediate_size:,} {activation}"),
        ("", f"RMSNorm eps {config.norm_eps:g} {inside} the root"),
        *((kind, texts[kind]) for kind in sorted(set(config.layer_types), key=_order) if kind in texts),
        *([("FP8", "input projections of Hyena layers")] if config.fp8_input_projections else []),
        ("tokens", f"{config.vocab_size:,} ({config.tokenizer}), {tied} {dot} up to {config.max_length:,}"),
    ]
    for name, text in rows:
        yield from _row(f"  {name:<14}", text, width)


def _taps(length: int, groups: int | None) -> str:
    return f"{counted(length, 'tap')}, {'one filter per channel' if groups is None else counted(groups, 'filter')}"


def _memory(cache: dict[str, Any], config: ModelConfig, width: int) -> Iterator[str]:
    kept = "" if cache["kv_dtype"] == cache["dtype"] else f", keys and values in {cache['kv_dtype']}"
    yield f"  cache, {cache['dtype']}{kept}"
    rows = [
        ("per token", cache["bytes_per_token"], "keys and values"),
        ("per sequence", cache["bytes_per_sequence"], "Hyena states, whatever the length"),
        ("in all", cache["bytes_at_max_length"], f"at {config.max_length:,} tokens"),
    ]
    for name, size, note in rows:
        if size:
            yield from _row(f"    {name:<12}{binary_bytes(size):>16}   ", note, width)


def _filter_table(
    filters: list[dict[str, Any]], config: ModelConfig, paint: Paint, width: int, plain: bool
) -> Iterator[str]:
    """Tabulate how long filters last. Narrow terminals get narrower columns and short titles."""
    wide, sparks = width >= 96, width >= 76
    column, axis = (12 if wide else 10), f"   {_AXIS}  " if sparks else "   "
    title = "poles outside the unit circle" if wide else "|p| > 1"
    yield from _row("  ", "filters: tokens until a channel's filter has decayed to 1/1000", width)
    heads = "".join(f"{head:>{column}}" for head in ("min", "median", "max"))
    yield paint("dim", f"  {'layer':>7}{heads}{axis}{title}")
    most = max(max(layer["decay_histogram"]) for layer in filters)
    for layer in filters:
        steps = layer["decay_steps"]
        numbers = "".join(f"{_steps(steps[name], plain):>{column}}" for name in ("min", "median", "max"))
        spark = f"{paint('hyena', _spark(layer['decay_histogram'], most, plain))}  " if sparks else ""
        count, worst = _outside(layer["outside_unit_circle"], config)
        yield f"  {layer['layer']:>7}{numbers}   {spark}{paint('warning', count) if worst else 'none'}"
        if worst:
            yield paint("warning", f"{'':>9}the largest: {worst}")


def _outside(poles: list[dict[str, Any]], config: ModelConfig) -> tuple[str, str]:
    """How many poles lie outside the unit circle, and which is the largest; nothing where there are none."""
    if not poles:
        return "", ""
    worst = poles[0]
    return (
        f"{len(poles):,} of {config.hidden_size * config.state_size:,}",
        f"channel {worst['channel']} mode {worst['mode']} |p| = {worst['modulus']:.7f}",
    )


def _spark(histogram: list[int], most: int, plain: bool) -> str:
    levels = " .:-=+*#" if plain else _SPARKS
    top = len(levels) - 1
    return "".join(levels[-(-count * top // most)] for count in histogram)


def render_methods(table: dict[str, dict[str, Any]], *, width: int = _WIDEST, plain: bool = False) -> Iterator[str]:
    """Write the table of methods, in lines of at most ``width`` columns: a few lines for each."""
    flags = ("exact", "gradients", "padding", "documents")
    header = "".join(f"{flag:<{len(flag) + 2}}" for flag in flags)
    wide, table_fits = width >= 96, width >= 66
    if table_fits:
        yield f"  {'method':<15}{'state':<8}{header}{'cost'.ljust(19) + 'memory' if wide else ''}".rstrip()
    for name, method in table.items():
        answers = "".join(f"{'yes' if method[flag] else 'no':<{len(flag) + 2}}" for flag in flags)
        cost, memory = (method[key].replace("·", "*") if plain else method[key] for key in ("cost", "memory"))
        yield ""
        if table_fits:
            yield f"  {name:<15}{method['state']:<8}{answers}{f'{cost:<19}{memory}' if wide else ''}".rstrip()
        else:
            known = ", ".join(flag for flag in flags if method[flag])
            yield from _row(f"  {name:<15}", f"state: {method['state']}; {known}", width)
        if not wide:
            yield from _row(f"  {'':<15}", f"cost {cost}, memory {memory}", width)
        yield from _row(f"  {'':<15}", method["summary"], width)
        yield from _row(f"  {'':<15}", f"filters: {', '.join(method['filters'])}", width)
    yield ""
    for note in (
        "documents: packed documents in one pass; elsewhere one after another",
        "cost, memory: per channel, for T steps, N modes, C steps of a chunk, W taps of a window",
    ):
        yield from _row("  ", note, width)


def _painter(coloured: bool) -> Paint:
    codes = {"bold": "1", "dim": "2", "hyena": "33", "attention": "36", "warning": "31"}

    def paint(style: str, text: str) -> str:
        return f"\x1b[{codes[style]}m{text}\x1b[0m" if coloured else text

    return paint


def _steps(count: int | None, plain: bool) -> str:
    if count is None:
        return "never" if plain else "∞"
    return f"{count:,}" if count < 10**7 else f"{count:.1e}"  # what fits a column


def _can_print(text: str, encoding: str | None) -> bool:
    try:
        text.encode(encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True
