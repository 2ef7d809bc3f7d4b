"""``hyaena variants``: log-likelihoods of the variants of a VCF file."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hyaena.cli.batch import add_job_arguments, telling_what_is_kept
from hyaena.cli.model_options import add_model_options, prepare_model, tell_what_is_cut
from hyaena.cli.progress import Progress
from hyaena.errors import InputError, NonFiniteError, counted, printable
from hyaena.records import Checked, FastaGenome, Windows, check_variants, read_variants

if TYPE_CHECKING:
    from hyaena.jobs import Row
    from hyaena.jobs.job import Compute
    from hyaena.model import StripedHyena
    from hyaena.scoring import EditScore
    from hyaena.tokenizers import Tokenizer

HELP = "write log-likelihoods of the variants of a VCF file, against the reference"
EXAMPLES = (
    "hyaena variants --reference genome.fa --vcf calls.vcf --output scores.tsv",
    "hyaena variants --reference genome.fa --vcf calls.vcf.gz --both-strands --shard 1/8 --output part1.parquet",
)

MOST_TOLD = 20
"""Lines about variants that cannot be scored; the rest is counted."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument(
        "--reference", required=True, metavar="FILE", help="the genome: FASTA, plain or compressed by bgzip"
    )
    parser.add_argument("--vcf", required=True, metavar="FILE", help="the variants: VCF or BCF, .gz included")
    parser.add_argument(
        "-o",
        "--output",
        required=True,
        metavar="FILE",
        help="a row per alternative; FILE ends in .parquet, .csv, .tsv, .jsonl or .npz",
    )
    parser.add_argument("--window", type=int, default=8192, metavar="W", help="letters around a variant (8192)")
    parser.add_argument(
        "--grid",
        type=int,
        default=1,
        metavar="N",
        help="windows begin at multiples of N, so that neighbouring variants share them (1: every variant in the "
        "middle of its window)",
    )
    parser.add_argument(
        "--both-strands", action="store_true", help="read the reverse complement, too, and give the means"
    )
    parser.add_argument(
        "--on-error",
        choices=("fail", "skip", "keep"),
        default="fail",
        help="what becomes of variants that do not fit the genome: nothing is written, they are left out, or their "
        "rows have no numbers and a note (fail)",
    )
    parser.add_argument("--no-bos", action="store_true", help="put no start token in front of windows")
    parser.add_argument("--max-length", type=int, metavar="N", help="allow N tokens in a window (the model's maximum)")
    add_job_arguments(parser, records="variants")

    group = parser.add_argument_group("model")
    add_model_options(group)
    group.add_argument("--method", default="auto", help="how long convolutions are evaluated: fft, blocked, … (auto)")
    group.add_argument(
        "--batch-tokens", type=int, metavar="N", help="tokens per pass (2048 on a CPU; on a GPU as memory allows)"
    )


@dataclass(frozen=True)
class _Input:
    """Both files, and what is to be made of them."""

    vcf: Path
    genome: FastaGenome
    windows: Windows
    limit: int
    keep: bool

    @property
    def label(self) -> str:
        return printable(str(self.vcf))

    def variants(self) -> Iterator[Checked]:
        return check_variants(read_variants(self.vcf), self.genome, self.windows, max_length=self.limit)

    def rows(self) -> Iterator[Checked]:
        """The variants that get a row."""
        return (one for one in self.variants() if self.keep or not one.problem)


def run(args: argparse.Namespace) -> int:
    """Check the files and every variant, load the model, and make the rows that are not there yet."""
    from hyaena.jobs import Column, check_columns, check_output, open_job
    from hyaena.records.contents import Shard

    output, shard = Path(args.output), Shard.parse(args.shard)
    check_output(output)
    if args.save_every < 1:
        raise InputError(f"--save-every must be at least 1, not {args.save_every}")
    keep = args.on_error == "keep"
    columns = [
        Column("contig", "text"),
        Column("position", "integer"),
        *(Column(name, "text") for name in ("id", "ref", "alt")),
        *(Column(name, "real") for name in ("ref_loglik", "alt_loglik", "difference")),
        *(Column(name, "integer") for name in ("window_start", "window_end", "unknown")),
    ]
    columns += [Column("note", "text")] if keep else []
    check_columns(output, columns)
    Windows.of(args.window, args.grid)
    next(read_variants(args.vcf), None)
    genome = FastaGenome(args.reference)
    for name in (args.reference, args.vcf):
        if output.exists() and output.samefile(name):
            raise InputError(f"{printable(str(output))} is the input and the output: name another output")

    from hyaena.scoring import iter_edit_scores
    from hyaena.scoring.variants import letters_within, windows_within

    prepared = prepare_model(args)
    reading = {
        "both_strands": args.both_strands,
        "bos": False if args.no_bos else None,
        "method": args.method,
        "tokens_per_pass": args.batch_tokens,
        "max_length": args.max_length,
    }
    limit = letters_within(prepared.shape, prepared.tokenizer, bos=reading["bos"], max_length=args.max_length)
    windows = windows_within(limit, args.window, args.grid)
    list(iter_edit_scores(prepared.shape, prepared.tokenizer, [("ACGT", [])], **reading))  # reads nothing
    given = _Input(Path(args.vcf), genome, windows, limit, keep)
    total = _check(given, args.on_error)
    first, stop = (total * number // shard.count for number in (shard.number - 1, shard.number))

    options = {
        "the command": args.command,
        **prepared.options,
        "--window": args.window,
        "--grid": args.grid,
        "--on-error": args.on_error,
        "--shard": str(shard),
        "--save-every": args.save_every,
        "--batch-tokens": args.batch_tokens,
        "--max-length": args.max_length,
        "--method": args.method,
        "--both-strands": args.both_strands,
        "--no-bos": args.no_bos,
    }
    with (
        open_job(output, columns, options, restart=args.restart) as job,
        Progress(stop - first, unit="variants", show=not args.quiet and sys.stderr.isatty()) as progress,
    ):

        def start() -> Compute[Any]:
            model = prepared.load()
            tell_what_is_cut(model, args.method)
            progress.begin()
            return partial(_compute, model, prepared.tokenizer, given, reading, progress)

        with telling_what_is_kept(job, progress):
            rows = job.run(
                islice(given.rows(), first, stop),
                start,
                window=args.save_every,
                skip=lambda variant: progress.skip(1),
            )
    print(f"{output}: {counted(rows, 'variant')}")
    return 0


def _check(given: _Input, on_error: str) -> int:
    """Read all variants; say which of them cannot be scored; return how many rows there will be.

    Raises:
        InputError: there is no variant, or ``on_error`` is ``"fail"`` and one cannot be scored.
    """
    total = wrong = unknown = 0
    told: list[str] = []
    for one in given.variants():
        total += 1
        if one.problem:
            wrong += 1
            if len(told) < MOST_TOLD:
                told.append(f"{given.label}, {one.place}, {printable(one.name)}: {one.text}")
        elif _unknown(one):
            unknown += 1
    if not total:
        raise InputError(f"{given.label} holds no variant")
    if wrong and on_error == "fail":
        more = f" ({wrong:,} of {total:,} variants cannot be scored)" if wrong > 1 else ""
        raise InputError(f"{told[0]}{more}: correct the file, or add --on-error skip or keep")
    for line in told:
        print(f"hyaena: {'kept without numbers' if given.keep else 'left out'}: {line}", file=sys.stderr)
    if wrong > len(told):
        print(f"hyaena: and {wrong - len(told):,} more", file=sys.stderr)
    if unknown:
        print(
            f"hyaena: {counted(unknown, 'window')} with letters other than A, C, G, T; see the column unknown",
            file=sys.stderr,
        )
    rows = total if given.keep else total - wrong
    if not rows:
        raise InputError(f"{given.label}: none of {total:,} variants can be scored")
    return rows


def _unknown(one: Checked) -> int:
    """Letters of a window that are none of A, C, G, T."""
    return len(one.text) - sum(map(one.text.count, "ACGT"))


def _compute(
    model: StripedHyena,
    tokenizer: Tokenizer,
    given: _Input,
    reading: dict[str, Any],
    progress: Progress,
    window: Sequence[Checked],
) -> Iterable[tuple[int, Row]]:
    from hyaena.scoring import NonFiniteRecordError, RecordError, iter_variant_scores

    places = [i for i, one in enumerate(window) if not one.problem]
    yield from ((i, _row(one, None, given.keep)) for i, one in enumerate(window) if one.problem)
    progress.skip(len(window) - len(places))
    scored = [window[i] for i in places]
    try:
        for position, score in iter_variant_scores(model, tokenizer, scored, **reading, progress=progress.window()):
            yield places[position], _row(scored[position], score, given.keep)
    except (RecordError, NonFiniteRecordError) as error:
        one = scored[error.index]
        kind = NonFiniteError if isinstance(error, NonFiniteError) else InputError
        raise kind(f"{given.label}, {one.place}, {printable(one.name)}: {error.reason}") from error


def _row(one: Checked, score: EditScore | None, keep: bool) -> Row:
    variant = one.variant
    row = {
        "contig": variant.contig,
        "position": variant.start + 1,
        "id": variant.name,
        "ref": variant.reference,
        "alt": variant.alternative,
        "ref_loglik": math.nan if score is None else score.reference,
        "alt_loglik": math.nan if score is None else score.alternative,
        "difference": math.nan if score is None else score.difference,
        "window_start": one.first,
        "window_end": one.stop,
        "unknown": 0 if score is None else _unknown(one),
    }
    return {**row, "note": one.text if one.problem else ""} if keep else row
