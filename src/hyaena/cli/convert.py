"""``hyaena convert``: write a model in our layout or the original's."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from hyaena.cli.formatting import decimal_bytes, parse_size
from hyaena.errors import InputError

HELP = "write a model in this package's layout or the original's"

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("source", metavar="SOURCE", help="a folder, a weights file, a bundled name or a hub id")
    parser.add_argument("dest", metavar="DEST", type=Path, help="the folder to write")
    parser.add_argument(
        "--layout",
        choices=("hyaena", "original"),
        default="hyaena",
        help="hyaena: config.json and our names (default); original: config.yml and the original's names",
    )
    parser.add_argument("--config", metavar="FILE", help="the configuration, where it does not lie beside the weights")
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of a hub id")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="cast the weights; by default they stay as they are stored. Poles and residues stay float32",
    )
    parser.add_argument(
        "--max-shard-size", metavar="SIZE", default="5GB", help="split larger models over several files (default 5GB)"
    )
    parser.add_argument("--force", action="store_true", help="write into a folder that is not empty")


def run(args: argparse.Namespace) -> int:
    """Read, convert, write."""
    limit = parse_size(args.max_shard_size)
    dest: Path = args.dest
    if dest.exists() and not dest.is_dir():
        raise InputError(f"{dest} is a file: name a folder to write")
    if dest.is_dir() and any(dest.iterdir()) and not args.force:
        raise InputError(f"{dest} is not empty: name another folder, or add --force to replace the model in it")

    from hyaena import checkpoints, hub
    from hyaena.sizes import ModelSizes

    checkpoint = hub.locate(args.source, revision=args.revision, config=args.config)
    extra = {name: path.read_bytes() for name in _TOKENIZER_FILES if (path := checkpoint.folder / name).is_file()}
    if sys.stderr.isatty():
        print(f"reading {checkpoint.path} …", file=sys.stderr)
    model = checkpoints.load_model(checkpoint.path, checkpoint.config, dtype=args.dtype or checkpoints.STORED)
    checkpoints.save_model(model, dest, layout=args.layout, max_shard_size=limit, extra_files=extra)
    files = checkpoints.find(dest).shards
    size = sum(file.stat().st_size for file in files)
    print(
        f"{dest}: {ModelSizes(model.config).parameters:,} parameters in the {args.layout} layout, "
        f"{decimal_bytes(size)} in {len(files)} file{'s' * (len(files) > 1)}"
    )
    return 0
