"""``hyaena quantize``: write a model with narrow weights."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from hyaena.arguments import as_path
from hyaena.cli.destination import find_destination
from hyaena.cli.formatting import decimal_bytes, parse_size
from hyaena.cli.model_options import choose_device
from hyaena.errors import InputError
from hyaena.schemes import SCHEMES

if TYPE_CHECKING:
    from torch import Tensor

    from hyaena.checkpoints import Checkpoint
    from hyaena.train.documents import Piece

HELP = "write a model whose linear layers have 8 or 4 bits"
EXAMPLES = (
    "hyaena quantize cub --weights int4 --output cub-int4",
    "hyaena quantize cub --weights int4 --calibrate text.txt --output cub-int4",
)

CALIBRATION_TOKENS = 1 << 17
"""Tokens of the calibration text that are read, from its beginning."""
CALIBRATION_CHARACTERS = 16 * CALIBRATION_TOKENS
"""Characters in which they are looked for, so that a text of any size may be named."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("source", metavar="MODEL", help="a folder, a weights file, a bundled name, or a hub id")
    parser.add_argument("--weights", choices=tuple(SCHEMES), required=True, help="the scheme (docs/quantization.md)")
    parser.add_argument("--output", metavar="DIR", required=True, help="the folder to write")
    parser.add_argument(
        "--calibrate",
        metavar="FILE",
        help="text or records: round by what the model reads in them; the model is loaded for that",
    )
    parser.add_argument("--device", help="where the calibration text is read (a GPU if there is one)")
    parser.add_argument("--config", metavar="FILE", help="the configuration, where it does not lie beside the weights")
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of a hub id")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="cast everything else; by default it stays as it is stored. Poles and residues stay float32",
    )
    parser.add_argument(
        "--max-shard-size",
        metavar="SIZE",
        default="1GB",
        help="split larger models over several files; so much is in memory (default 1GB)",
    )
    parser.add_argument("--force", action="store_true", help="write into a folder that is not empty")


def run(args: argparse.Namespace) -> int:
    """Read, round, write."""
    limit = parse_size(args.max_shard_size)
    dest = find_destination(args.output, force=args.force)
    if args.device is not None and args.calibrate is None:
        raise InputError("--device is where --calibrate reads its text: add that, or leave --device out")

    from hyaena import checkpoints, hub

    checkpoint = hub.locate(args.source, revision=args.revision, config=args.config)
    checkpoints.check_quantizable(checkpoint, args.weights)
    moments = None if args.calibrate is None else _moments(args)
    paths = [checkpoint.folder / name for name in checkpoints.COMPANIONS]
    extra = {path.name: path.read_bytes() for path in paths if path.is_file()}
    if sys.stderr.isatty():
        print(f"reading {checkpoint.path} …", file=sys.stderr)
    before = _nbytes(checkpoint)  # which may be the model that is replaced
    options = {"dtype": args.dtype, "max_shard_size": limit, "overwrite": args.force}
    checkpoints.quantize_checkpoint(checkpoint, dest, args.weights, moments=moments, extra_files=extra, **options)
    after = _nbytes(checkpoints.find(dest))
    print(f"{dest}: {args.weights} weights, {decimal_bytes(after)} of {decimal_bytes(before)}")
    return 0


def _nbytes(checkpoint: Checkpoint) -> int:
    return sum(file.stat().st_size for file in checkpoint.shards)


def _moments(args: argparse.Namespace) -> dict[str, Tensor]:
    """The second moments of what the linear layers of the model read in the calibration text."""
    import torch

    from hyaena import hub
    from hyaena.quant import collect_moments
    from hyaena.train.corpus import tokenize
    from hyaena.train.documents import read_documents

    texts = read_documents([as_path("--calibrate", args.calibrate)])
    pieces = list(_beginning(texts, CALIBRATION_CHARACTERS))
    if not any(piece.text for piece in pieces):
        raise InputError(f"--calibrate {args.calibrate}: holds no text: name one like those to be read")
    device, source = choose_device(args), {"revision": args.revision, "config": args.config}
    _, tokenizer = hub.load_tokenizer_of(args.source, **source)
    ids = tokenize(pieces, tokenizer).tokens[:CALIBRATION_TOKENS]  # before the weights are read
    model = hub.load_model(args.source, device=device, **source)
    moments = collect_moments(model, torch.tensor(ids, dtype=torch.long, device="cpu"))
    widest = max(layer.in_features for layer in model.modules() if type(layer) is torch.nn.Linear)
    if len(ids) < widest:
        print(
            f"--calibrate {args.calibrate} has {len(ids):,} tokens, fewer than the {widest:,} inputs of a layer: "
            f"rounding goes mostly by the weights themselves; {10 * widest:,} tokens or more are better",
            file=sys.stderr,
        )
    return moments


def _beginning(pieces: Iterator[Piece], characters: int) -> Iterator[Piece]:
    for piece in pieces:
        yield replace(piece, text=piece.text[:characters])
        characters -= len(piece.text)
        if characters <= 0:
            return
