"""``hyaena score``: log-probabilities of the texts in a file."""

from __future__ import annotations

import argparse
from functools import partial
from typing import TYPE_CHECKING

from hyaena.cli import batch
from hyaena.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from hyaena.jobs import Row
    from hyaena.scoring import Score

HELP = "write log-probabilities of the texts in a file"
EXAMPLES = (
    "hyaena score genes.fa --output scores.parquet",
    "hyaena score genome.fa --window 8192 --bin 16 --output genome.bedgraph",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    batch.add_arguments(
        parser,
        rows="a row per record: name, tokens, predicted, sum, mean, perplexity; or a row per window (.bedgraph, too)",
    )
    parser.add_argument(
        "--per-token",
        action="store_true",
        help="also write, of every token, its id, log-probability, entropy and rank (no rank with --both-strands)",
    )

    parser.add_argument(
        "--bin",
        type=int,
        metavar="B",
        help="with --window: means of B neighbouring positions instead of a number for each",
    )


def run(args: argparse.Namespace) -> int:
    """Check the files, then score."""
    files = batch.find_files(args)
    if files.source.window is not None:
        return _run_windows(args, files)
    if args.bin is not None:
        raise InputError("--bin is of windows: add --window")

    from hyaena.jobs import Column
    from hyaena.scoring import iter_scores

    ranks = args.per_token and not args.both_strands
    columns = [
        Column("tokens", "integer"),
        Column("predicted", "integer"),
        *(Column(name, "real") for name in ("sum", "mean", "perplexity")),
    ]
    if args.per_token:
        columns += [Column("ids", "integers"), Column("logprobs", "reals"), Column("entropies", "reals")]
    if ranks:
        columns.append(Column("ranks", "integers"))

    def row(score: Score) -> Row:
        values = {
            "tokens": len(score.tokens),
            "predicted": score.count,
            "sum": score.sum,
            "mean": score.mean,
            "perplexity": score.perplexity,
        }
        if args.per_token:
            values |= {"ids": score.tokens, "logprobs": score.logprobs, "entropies": score.entropies}
        return values | {"ranks": score.ranks} if ranks else values

    read = partial(iter_scores, entropy=args.per_token, rank=ranks)
    return batch.run(args, files, batch.Task(columns, {"--per-token": args.per_token}, read, row))


def _run_windows(args: argparse.Namespace, files: batch.Files) -> int:
    """A row per window, with the log-probability of every position, or of every bin."""
    from hyaena.jobs import Column
    from hyaena.scoring import iter_scores

    step = (files.source.window or 0) - files.source.overlap
    size = 1 if args.bin is None else args.bin
    if args.per_token:
        raise InputError("--per-token is of whole records: windows have a number per position as they are")
    if size < 1 or step % size:
        raise InputError(
            f"--bin must divide the {step:,} letters by which windows advance (--window less --overlap), not be {size}"
        )

    def row(score: Score) -> Row:
        return {"logprobs": means(score.logprobs, size)}

    columns = [Column("logprobs", "reals")]
    read = partial(iter_scores, entropy=False, rank=False)
    return batch.run(args, files, batch.Task(columns, {"--bin": size}, read, row, step=size))


def means(values: np.ndarray, size: int) -> np.ndarray:
    """Means of ``size`` neighbouring values each, fewer at the end; NaN does not count, except among NaN alone."""
    import numpy as np

    if size == 1:
        return values
    starts = np.arange(0, len(values), size)
    known = np.isfinite(values)
    sums = np.add.reduceat(np.where(known, values, 0).astype(np.float64), starts)
    counts = np.add.reduceat(known.astype(np.int64), starts)
    with np.errstate(invalid="ignore"):
        return (sums / counts).astype(np.float32)
