"""``hyaena embed``: vectors of the texts in a file."""

from __future__ import annotations

import argparse
from functools import partial
from typing import TYPE_CHECKING, Any

from hyaena.cli import batch
from hyaena.errors import InputError, shown

if TYPE_CHECKING:
    from hyaena.jobs import Row

HELP = "write vectors of a model's layers for the texts in a file"
EXAMPLES = (
    "hyaena embed genes.fa --output vectors.npz",
    "hyaena embed texts.jsonl --text-key body --layers norm --output vectors.parquet",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    batch.add_arguments(parser, rows="a row per record: name, and the vectors of each layer")
    parser.add_argument(
        "--layers",
        default="norm",
        metavar="LAYER,…",
        help="numbers from 0 (-1: the last), embed, norm, unembed, or modules by our name or the original's, such as "
        "12,blocks.20.mlp.l3 (norm)",
    )
    parser.add_argument(
        "--pool",
        default="mean",
        help="mean over the tokens of a text, its last token, none for all tokens, or positions such as 0,99,-1 (mean)",
    )


def run(args: argparse.Namespace) -> int:
    """Check the files, then embed."""
    files = batch.find_files(args)
    layers, pool = parse_layers(args.layers), parse_pool(args.pool)

    from hyaena.jobs import Column
    from hyaena.scoring import iter_embeddings

    columns = [Column(str(layer), "vector" if pool in ("mean", "last") else "matrix") for layer in layers]

    def row(vectors: dict[int | str, Any]) -> Row:
        return {str(layer): vectors[layer] for layer in layers}

    chosen: dict[str, Any] = {"layers": layers, "pool": pool}
    options = {"--layers": [str(layer) for layer in layers], "--pool": args.pool}
    return batch.run(args, files, batch.Task(columns, options, partial(iter_embeddings, **chosen), row))


def parse_layers(text: str) -> list[int | str]:
    """Read layers: numbers and names, separated by commas.

    Raises:
        InputError: one is empty, or given twice.
    """
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if not name or name == "name" or names.count(name) > 1:
            raise InputError(f"--layers must be different layers separated by commas, not {shown(text)}")
    return [int(name) if name.lstrip("-").isdecimal() else name for name in names]


def parse_pool(text: str) -> str | list[int]:
    """Read a way of pooling: a name, or positions separated by commas."""
    try:
        return [int(position) for position in text.split(",")]
    except ValueError:
        return text
