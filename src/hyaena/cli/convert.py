"""``hyaena convert``: write a model in our layout, the original's, or that of transformers."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from hyaena.cli.destination import find_destination
from hyaena.cli.formatting import decimal_bytes, parse_size
from hyaena.errors import InputError, counted

if TYPE_CHECKING:
    from hyaena.adapters import Adapter
    from hyaena.config import ModelConfig
    from hyaena.model import StripedHyena

HELP = "write a model in this package's layout, the original's, or that of transformers"
EXAMPLES = (
    "hyaena convert togethercomputer/StripedHyena-Nous-7B nous --dtype bfloat16",
    "hyaena convert runs/mine model --layout transformers",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="a folder, a weights file, a bundled name, a hub id, or the folder of a training run, whose newest state "
        "is written",
    )
    parser.add_argument("dest", metavar="DEST", help="the folder to write")
    parser.add_argument(
        "--layout",
        choices=("hyaena", "original", "transformers", "gguf"),
        default="hyaena",
        help="hyaena: config.json and our names (default); original: config.yml and the original's names; "
        "transformers: what hyaena.hf and AutoTokenizer read; gguf: one file, which holds the configuration, too",
    )
    parser.add_argument("--config", metavar="FILE", help="the configuration, where it does not lie beside the weights")
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of a hub id")
    parser.add_argument("--adapter", metavar="FOLDER", help="merge a LoRA adapter of PEFT or hyaena into the weights")
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
    dest = find_destination(args.dest, force=args.force)

    from hyaena import checkpoints
    from hyaena.adapters import merge_adapter, read_adapter
    from hyaena.sizes import ModelSizes

    adapter = None if args.adapter is None else read_adapter(args.adapter)
    model, extra = _of_run(args) if checkpoints.is_run(args.source) else _of_checkpoint(args, adapter)
    if adapter is not None:
        merge_adapter(model, adapter)
    checkpoints.save_model(
        model, dest, layout=args.layout, max_shard_size=limit, extra_files=extra, overwrite=args.force
    )
    shards = checkpoints.find(dest).shards
    size = sum(file.stat().st_size for file in shards)
    print(
        f"{dest}: {counted(ModelSizes(model.config).parameters, 'parameter')} in the {args.layout} layout, "
        f"{decimal_bytes(size)} in {counted(len(shards), 'file')}"
    )
    return 0


def _of_checkpoint(args: argparse.Namespace, adapter: Adapter | None) -> tuple[StripedHyena, dict[str, bytes]]:
    """The model of a checkpoint as it is stored, and the files that go with it in the layout to write."""
    from hyaena import checkpoints, hub
    from hyaena.adapters import check_adapter

    checkpoint = hub.locate(args.source, revision=args.revision, config=args.config)
    checkpoints.check_layout(checkpoint.config, args.layout)
    if adapter is not None:
        check_adapter(checkpoint.config, adapter, merged=True)
    paths = [checkpoint.folder / name for name in checkpoints.COMPANIONS]
    extra = {path.name: path.read_bytes() for path in paths if path.is_file()}
    extra = _files_of(args.layout, extra, checkpoint.config)
    if sys.stderr.isatty():
        print(f"reading {checkpoint.path} …", file=sys.stderr)
    return checkpoints.load_model(checkpoint, dtype=args.dtype or "stored"), extra


def _of_run(args: argparse.Namespace) -> tuple[StripedHyena, dict[str, bytes]]:
    """The newest model that a training run saved, and the files that go with it."""
    from hyaena.checkpoints import as_dtype
    from hyaena.train.storage import load_run

    if args.config is not None or args.revision is not None:
        raise InputError(f"{args.source} is a training run, which has its own configuration: leave the options out")
    model, extra, step = load_run(args.source)
    print(f"{args.source}: the model of step {step:,}", file=sys.stderr)
    extra = _files_of(args.layout, extra, model.config)
    return model if args.dtype is None else model.to(as_dtype(args.dtype)), extra


def _files_of(layout: str, extra: dict[str, bytes], config: ModelConfig) -> dict[str, bytes]:
    """The files that go with a model; for transformers, those of its tokenizer as it reads them, if it has any."""
    if layout != "transformers" or (config.tokenizer == "hf" and "tokenizer.json" not in extra):
        return extra
    from hyaena.tokenizers import load_tokenizer, transformers_files

    with tempfile.TemporaryDirectory() as folder:
        for name, content in extra.items():
            (Path(folder) / name).write_bytes(content)
        return extra | transformers_files(load_tokenizer(folder, config))
