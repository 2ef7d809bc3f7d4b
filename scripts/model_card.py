#!/usr/bin/env python3
"""Measure models and compressors on the same held-out bytes, and print the table of the model card.

    python scripts/model_card.py --heldout corpus/heldout.jsonl cub runs/cub-transformer/final

Every number is bits per byte of the UTF-8 text of all documents. A model predicts each document from its own
beginning, through windows of ``--window`` tokens that overlap by ``--overlap``; it pays for end tokens, and its own
size is not counted. ``gzip`` and ``xz`` get all documents in one piece, so they see more context than the models, but
not the training text; ``xz`` after the training text (``--train``) does: what the held-out text adds to the archive.
"""

from __future__ import annotations

import argparse
import gzip
import lzma
import sys
from dataclasses import dataclass

from tqdm import tqdm

from hyaena import hub
from hyaena.errors import HyaenaError
from hyaena.sizes import ModelSizes
from hyaena.train.corpus import tokenize
from hyaena.train.data import evaluation_batches
from hyaena.train.documents import Piece, read_documents
from hyaena.train.evaluate import evaluate


@dataclass(frozen=True)
class Row:
    """One line of the table: what was measured, its size in words, and bits per byte."""

    name: str
    size: str
    bits_per_byte: float


def compressors(text: bytes) -> list[Row]:
    """``gzip -9`` and ``xz -9e`` on the text in one piece."""
    coded = {"gzip -9": gzip.compress(text, 9), "xz -9e": lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)}
    return [Row(name, "", 8 * len(data) / len(text)) for name, data in coded.items()]


def after_training_text(text: bytes, training: bytes) -> Row:
    """What ``xz -9e`` adds for the text when the training text came before it (its window holds 64 MiB)."""
    preset = 9 | lzma.PRESET_EXTREME
    added = len(lzma.compress(training + text, preset=preset)) - len(lzma.compress(training, preset=preset))
    return Row("xz -9e, after the training text", f"{len(training) / 1e6:.1f} MB of text", 8 * added / len(text))


def measure(source: str, pieces: list[Piece], arguments: argparse.Namespace) -> Row:
    """One model on all documents."""
    model, tokenizer = hub.load(source, device=arguments.device, dtype="float32")
    corpus = tokenize(pieces, tokenizer)
    shape = {"window": arguments.window, "overlap": arguments.overlap, "batch_size": arguments.batch_size}
    windows = sum(len(batch.ids) for batch in evaluation_batches(corpus, **shape))
    with tqdm(total=windows, unit="window", desc=model.config.name) as bar:
        result = evaluate(model, corpus, device=arguments.device, progress=bar.update, **shape)
    return Row(model.config.name, f"{ModelSizes(model.config).parameters / 1e6:.2f} M parameters", result.bits_per_byte)


def table(rows: list[Row]) -> str:
    """The rows as Markdown, best last."""
    lines = [f"| {row.name} | {row.size} | {row.bits_per_byte:.4f} |" for row in sorted(rows, key=_worst_first)]
    return "\n".join(["| | size | bits per byte |", "|---|---|---|", *lines])


def _worst_first(row: Row) -> float:
    return -row.bits_per_byte


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Measure models and compressors on the same held-out bytes.")
    parser.add_argument("models", nargs="+", help="bundled names, folders or hub ids")
    parser.add_argument("--heldout", nargs="+", default=["corpus/heldout.jsonl"], help="files or folders")
    parser.add_argument("--train", nargs="+", default=[], help="the training text, for xz to have seen too")
    parser.add_argument("--window", type=int, default=2048, help="tokens per window (default: 2048)")
    parser.add_argument("--overlap", type=int, default=1024, help="tokens of context at least (default: 1024)")
    parser.add_argument("--batch-size", type=int, default=4, help="windows at a time (default: 4)")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    try:
        pieces = list(read_documents(arguments.heldout))
        text = "".join(piece.text for piece in pieces).encode("utf-8")
        rows = compressors(text)
        if arguments.train:
            training = "".join(piece.text for piece in read_documents(arguments.train)).encode("utf-8")
            rows.append(after_training_text(text, training))
        rows += [measure(source, pieces, arguments) for source in arguments.models]
    except HyaenaError as error:
        print(f"model_card: error: {error}", file=sys.stderr)
        return 2
    documents = sum(piece.begins for piece in pieces)
    print(f"{documents} documents, {len(text):,} bytes; windows of {arguments.window}, {arguments.overlap} shared")
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
