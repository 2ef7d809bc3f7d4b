"""``hyaena bench``: how fast a model runs on this machine, beside the bounds that the machine sets."""

from __future__ import annotations

import argparse
import io
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hyaena.cli.formatting import json_file
from hyaena.cli.model_options import add_precision_options, choose_device
from hyaena.errors import InputError
from hyaena.files import check_place, write_atomically

if TYPE_CHECKING:
    import torch

    from hyaena.config import ModelConfig
    from hyaena.model import StripedHyena

HELP = "measure prefill and decoding on this machine, beside the bounds that its memory and its arithmetic set"
EXAMPLES = (
    "hyaena bench --model cub --lengths 64,512 --contexts 64,4096",
    "hyaena bench --config sh-7b --device cuda --json bench.json --plot bench.png",
)

PRESET = "7b"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        help="7b: the shape of StripedHyena-Hessian-7B with random weights (31 GB of memory in float32, 16 to 20 GB in "
        "bfloat16); or a model as generate takes it (7b)",
    )
    group.add_argument(
        "--config",
        metavar="FILE",
        help="the configuration of a weights file; without --model, one for random weights, or the name of a preset",
    )
    group.add_argument("--device", help="cpu, cuda, cuda:1, … (a GPU if there is one)")
    group.add_argument(
        "--dtype", help="float32, bfloat16, float16 or auto (on a CPU float32, elsewhere bfloat16 or as stored)"
    )
    add_precision_options(group)

    group = parser.add_argument_group("what to measure")
    group.add_argument(
        "--lengths", type=_counts, metavar="T,…", help="tokens of prompts (2048,8192,32768; on a CPU 512,2048)"
    )
    group.add_argument(
        "--contexts",
        type=_counts,
        metavar="T,…",
        help="tokens that a row has read when it is decoded (2048,32768; on a CPU 512,4096)",
    )
    group.add_argument(
        "--batch", type=_counts, default=(1,), metavar="B,…", help="rows decoded together, at each context (1)"
    )
    group.add_argument(
        "--prefill-chunk", type=_count, metavar="N", help="tokens of the prompt per pass (as `hyaena generate`)"
    )
    group.add_argument("--method", default="auto", help="how the prompt's long convolutions are evaluated (auto)")
    group.add_argument(
        "--decoding",
        default="auto",
        choices=("auto", "eager", "static", "compiled", "cuda_graph"),
        help="how steps are evaluated, as in generate (auto)",
    )

    group = parser.add_argument_group("output, beside the table")
    group.add_argument("--json", type=Path, metavar="FILE", help="write every sample, the machine and the command")
    group.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        help="write a picture, in the format of its name: .png, .svg, .pdf (needs matplotlib)",
    )


def run(args: argparse.Namespace) -> int:
    """Check, measure, print, write."""
    for path in (args.json, args.plot):
        if path is not None:
            check_place(path)
    if args.json is not None and args.json == args.plot:
        raise InputError(f"--json and --plot are both {args.json}: name two files")

    from hyaena.bench import plot, report
    from hyaena.bench.run import Plan, Result
    from hyaena.bench.run import run as measure
    from hyaena.ops.slots import as_cache_dtype

    if args.plot is not None:
        plot.require_format(args.plot)
    device = choose_device(args)
    config, dtype, make = _model(args, device)
    lengths, contexts = ((512, 2048), (512, 4096)) if device.type == "cpu" else ((2048, 8192, 32_768), (2048, 32_768))
    short = tuple(n for n in lengths if n <= config.max_length) or (config.max_length,)
    near = tuple(n for n in contexts if n <= config.max_length) or (config.max_length,)
    plan = Plan(
        lengths=args.lengths or short,
        contexts=args.contexts or near,
        batches=args.batch,
        chunk=args.prefill_chunk,
        method=args.method,
        decoding=args.decoding,
        steps=8 if device.type == "cpu" else 24,
    )
    latest: list[Result] = []

    def found(result: Result) -> None:
        latest[:] = [result]
        if args.json is not None:  # after each figure: what fails later loses nothing
            _write_json(args.json, report.as_dict(result))

    try:
        measure(
            config,
            make,
            plan,
            device=device,
            dtype=dtype,
            cache_dtype=as_cache_dtype(args.cache_dtype) or dtype,
            progress=lambda text: print(f"{text} …", file=sys.stderr, flush=True),
            found=found,
        )
    finally:
        for result in latest:
            _show(report.render(result))
    if args.plot is not None:
        plot.draw(latest[0], args.plot)
    return 0


def _write_json(path: Path, known: dict[str, Any]) -> None:
    document = {"command": shlex.join(["hyaena", *sys.argv[1:]]), **known}
    content = json_file(document)
    write_atomically(path, lambda file: file.write(content))


def _show(text: str) -> None:
    """Print; a terminal that cannot show a sign gets a question mark, not a traceback."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    print(text, flush=True)


def _model(
    args: argparse.Namespace, device: torch.device
) -> tuple[ModelConfig, torch.dtype, Callable[[], StripedHyena]]:
    """The configuration and the dtype of the model that the options name, and a function that makes it."""
    import torch

    from hyaena import checkpoints, hub
    from hyaena.bench.run import SH_7B, random_model
    from hyaena.formats import read_config
    from hyaena.fp8 import check_fp8, set_fp8
    from hyaena.hub import check_cache_dtype, choose_dtype

    dtype = choose_dtype(args.dtype, device)
    if dtype == "stored":
        raise InputError("bench computes in one dtype: name it, or leave --dtype out for that of the embedding")
    weights = args.weights
    if args.model in (None, PRESET):
        if args.model == PRESET and args.config is not None:
            raise InputError("--model 7b has its own configuration: leave --config out, or --model")
        config, wanted = SH_7B if args.config is None else read_config(args.config), dtype or torch.bfloat16
        config = replace(config, weights=weights or config.weights)
        made = partial(random_model, config, device, wanted)
    else:
        checkpoint = hub.locate(args.model, config=args.config)
        config, wanted = checkpoint.config, dtype or checkpoints.inspect(checkpoint).dtype
        made = partial(checkpoints.load_model, checkpoint, device=device, dtype=wanted, weights=weights)
        config = replace(config, weights=weights or config.weights)
    check_fp8(args.fp8, config.fp8_input_projections)
    check_cache_dtype(args.cache_dtype, config)

    def make() -> StripedHyena:
        model = made()
        set_fp8(model, args.fp8)
        model.cache_dtype = args.cache_dtype
        return model

    return config, wanted, make


def _count(text: str) -> int:
    values = _counts(text)
    if len(values) != 1:
        raise argparse.ArgumentTypeError(f"{text!r} is more than one number")
    return values[0]


def _counts(text: str) -> tuple[int, ...]:
    """Numbers of at least 1, separated by commas."""
    try:
        values = tuple(int(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or min(values) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers of at least 1, such as 512,2048")
    return values
