"""``hyaena score``: log-probabilities of the texts in a file."""

from __future__ import annotations

import argparse
from functools import partial
from typing import TYPE_CHECKING

from hyaena.cli import batch

if TYPE_CHECKING:
    from hyaena.jobs import Row
    from hyaena.scoring import Score

HELP = "write log-probabilities of the texts in a file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    batch.add_arguments(parser, rows="a row per record: name, tokens, predicted, sum, mean, perplexity")
    parser.add_argument(
        "--per-token",
        action="store_true",
        help="also write, of every token, its id, log-probability, entropy and rank (no rank with --both-strands)",
    )


def run(args: argparse.Namespace) -> int:
    """Check the files, then score."""
    files = batch.find_files(args)

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
