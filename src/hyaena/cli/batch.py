"""What ``hyaena score`` and ``hyaena embed`` share: records in, a row each out, through any number of interruptions."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hyaena.cli.model_options import add_model_options, prepare_model, tell_what_is_cut
from hyaena.cli.progress import Progress
from hyaena.errors import InputError, NonFiniteError, OutputError, counted, shown
from hyaena.records import FORMATS, Record, Source, check_readable, find_source
from hyaena.records.source import open_source

if TYPE_CHECKING:
    from hyaena.jobs import Column, Job, Row
    from hyaena.jobs.job import Compute
    from hyaena.model import StripedHyena
    from hyaena.records.contents import Shard
    from hyaena.scoring import Encoder, Excerpt
    from hyaena.tokenizers import Tokenizer

STANDARD_INPUT = "-"


@dataclass(frozen=True)
class Task:
    """What is made of the records.

    Attributes:
        columns: of the output, after the record's name.
        options: the command's own, by their names; results depend on them.
        read: ``read(model, tokenizer, texts, **options)`` gives pairs of a text's number and its result, lazily, and
            checks its options at the call.
        row: the columns of a result.
        step: letters of a window per number of the row, where rows are of windows; 0 leaves the column
            out.
    """

    columns: Sequence[Column]
    options: Mapping[str, Any]
    read: Callable[..., Iterator[tuple[int, Any]]]
    row: Callable[[Any], Row]
    step: int = 0


@dataclass(frozen=True)
class Files:
    """Where records come from, and where rows go."""

    source: Source
    output: Path
    shard: Shard


def add_arguments(parser: argparse.ArgumentParser, *, rows: str) -> None:
    """Add the options of both commands.

    Args:
        rows: what the rows of the output are, for help.
    """
    parser.add_argument("input", help="a file of records; - is standard input, with --format")
    parser.add_argument(
        "-o",
        "--output",
        required=True,
        metavar="FILE",
        help=f"{rows}; FILE ends in .parquet, .jsonl, .csv, .tsv or .npz",
    )

    group = parser.add_argument_group("input")
    add_record_arguments(group)
    group.add_argument(
        "--both-strands", action="store_true", help="texts are DNA: read the other strand, too, and give the means"
    )
    group.add_argument("--no-bos", action="store_true", help="put no start token in front of texts")
    group.add_argument(
        "--special", action="store_true", help="read names of special tokens in a text, such as </s>, as the tokens"
    )
    group.add_argument("--max-length", type=int, metavar="N", help="allow N tokens in a text (the model's maximum)")

    group = parser.add_argument_group("windows")
    group.add_argument("--window", type=int, metavar="W", help="cut records into windows of W letters, such as 8192")
    group.add_argument(
        "--overlap",
        type=int,
        metavar="O",
        help="letters of a window that are read as context only, such as 4096 (half of W)",
    )

    add_job_arguments(parser, records="records")

    group = parser.add_argument_group("model")
    add_model_options(group)
    group.add_argument("--method", default="auto", help="how long convolutions are evaluated: fft, blocked, … (auto)")
    group.add_argument(
        "--batch-tokens", type=int, metavar="N", help="tokens per pass (2048 on a CPU; on a GPU as memory allows)"
    )


def add_record_arguments(group: argparse._ActionsContainer) -> None:
    """Add the options that say how a file of records is read."""
    group.add_argument(
        "--format",
        choices=tuple(FORMATS),
        help="how the input is read; by default as the end of its name says, .gz included",
    )
    group.add_argument(
        "--text-key", metavar="KEY", help="the key or column of the text, in JSON lines or Parquet (text)"
    )
    group.add_argument(
        "--name-key", metavar="KEY", help="the key or column of the name (name, else id, else the record's number)"
    )


def add_job_arguments(parser: argparse.ArgumentParser, *, records: str) -> None:
    """Add the options of a job that can be interrupted.

    Args:
        records: what it works through, for help.
    """
    group = parser.add_argument_group("job")
    group.add_argument(
        "--shard", default="1/1", metavar="I/N", help=f"only part I of N, from 1: a run of neighbouring {records}"
    )
    group.add_argument(
        "--restart", action="store_true", help="begin again: discard finished rows, and replace the output"
    )
    group.add_argument(
        "--save-every",
        type=int,
        default=1 << 20,
        metavar="N",
        help="keep finished rows after every N characters of input, however the job ends (1,048,576)",
    )
    group.add_argument(
        "--quiet", action="store_true", help="no progress bar (there is none where standard error is no terminal)"
    )


def find_files(args: argparse.Namespace) -> Files:
    """Check what needs neither torch nor the model: files, formats, the shard.

    Raises:
        HyaenaError: one of them cannot be used.
    """
    from hyaena.jobs import check_output  # NumPy
    from hyaena.records.contents import Shard

    output, shard = Path(args.output), Shard.parse(args.shard)
    check_output(output)
    if args.save_every < 1:
        raise InputError(f"--save-every must be at least 1, not {args.save_every}")
    window, overlap = parse_windows(args)
    keys = {"format": args.format, "text_key": args.text_key, "name_key": args.name_key}
    keys |= {"window": window, "overlap": overlap}
    if args.input == STANDARD_INPUT:
        if args.format is None:
            raise InputError(f"the format of standard input is not known: add --format {'|'.join(FORMATS)}")
        if sys.stdin.isatty():
            raise InputError("there is no input: name a file, or send one to standard input")
        return Files(find_source(args.input, label="standard input", **keys), output, shard)
    source = find_source(args.input, **keys)
    if not _is_stream(source.path):
        check_readable(source)
        if output.exists() and output.samefile(source.path):
            raise InputError(f"{source.label} is the input and the output: name another output")
    return Files(source, output, shard)


def parse_windows(args: argparse.Namespace) -> tuple[int | None, int]:
    """The letters of a window and of its overlap.

    Raises:
        InputError: one is out of range.
    """
    window, overlap = args.window, args.overlap
    if window is None:
        if overlap is not None:
            raise InputError("--overlap is of windows: add --window")
        return None, 0
    if window < 1:
        raise InputError(f"--window must be at least 1, not {window}")
    overlap = window // 2 if overlap is None else overlap
    if not 0 <= overlap < window:
        raise InputError(f"--overlap must be between 0 and less than the window of {window:,}, not {overlap}")
    return window, overlap


def run(args: argparse.Namespace, files: Files, task: Task) -> int:
    """Check every record, load the model, and make the rows that are not there yet."""
    from hyaena.jobs import Column, check_contig, open_job
    from hyaena.records.contents import read_contents, read_part
    from hyaena.scoring import ReadOptions

    prepared = prepare_model(args)
    tokenizer = prepared.tokenizer
    reading = {
        "bos": False if args.no_bos else None,
        "special": args.special,
        "both_strands": args.both_strands,
        "method": args.method,
        "max_length": args.max_length,
        "tokens_per_pass": args.batch_tokens,
    }
    task.read(prepared.shape, tokenizer, [], **reading)
    encoder = ReadOptions(**reading).encoder(prepared.shape, tokenizer)
    options = {
        "the command": args.command,
        **prepared.options,
        "--window": files.source.window,
        "--overlap": files.source.overlap,
        "--shard": str(files.shard),
        "--save-every": args.save_every,
        "--batch-tokens": args.batch_tokens,
        "--max-length": args.max_length,
        "--method": args.method,
        **{f"--{name}": getattr(args, name.replace("-", "_")) for name in ("both-strands", "no-bos", "special")},
        **task.options,
    }
    columns = [Column("name", "text")]
    if files.source.window is not None:
        columns += [Column("contig", "text"), Column("start", "integer"), Column("end", "integer")]
        columns += [Column("step", "integer")] if task.step else []
        if files.source.window > encoder.max_letters:
            raise InputError(
                f"a window of {files.source.window:,} letters is longer than the {encoder.max_letters:,} that the "
                "model's context holds: take a smaller --window, or a larger --max-length"
            )
    columns += task.columns

    def measure(record: Record) -> int:
        check_contig(files.output, record.contig)
        return _tokens(encoder, record)

    with open_job(files.output, columns, options, restart=args.restart) as job:
        source = files.source
        if args.input == STANDARD_INPUT:
            source = replace(source, path=job.keep_input(sys.stdin.buffer))
        elif _is_stream(source.path):
            with open_source(source.path, source.label, compressed=False, cure="check its permissions") as stream:
                source = replace(source, path=job.keep_input(stream))
        contents = read_contents(source, measure)
        part = contents.part(files.shard)
        with Progress(part.size, unit="tokens", show=not args.quiet and sys.stderr.isatty()) as progress:

            def start() -> Compute:
                model = prepared.load()
                tell_what_is_cut(model, args.method)
                progress.begin()
                return _compute(model, tokenizer, source, task, reading, progress)

            with telling_what_is_kept(job, progress):
                rows = job.run(
                    read_part(source, part),
                    start,
                    window=args.save_every,
                    skip=lambda record: progress.skip(int(contents.sizes[record.index])),
                )
    print(f"{files.output}: {counted(rows, 'record')}, {counted(part.size, 'token')}")
    return 0


@contextmanager
def telling_what_is_kept(job: Job, progress: Progress) -> Iterator[None]:
    """Within it, an interruption or an error ends the progress bar, and says where finished rows are."""
    try:
        yield
    except BaseException as error:
        progress.close()
        told = isinstance(error, OutputError) or str(job.folder) in str(error)  # what the job raises says so itself
        if job.is_begun and not told:
            print(f"hyaena: finished rows are kept in {job.folder}: the same command goes on", file=sys.stderr)
        raise


def _compute(
    model: StripedHyena,
    tokenizer: Tokenizer,
    source: Source,
    task: Task,
    reading: Mapping[str, Any],
    progress: Progress,
) -> Compute:
    from hyaena.scoring import NonFiniteRecordError, RecordError

    def compute(window: Sequence[Record]) -> Iterable[tuple[int, Row]]:
        texts = map(_text, window)
        try:
            for index, result in task.read(model, tokenizer, texts, **reading, progress=progress.window()):
                yield index, {**_labels(window[index], task.step), **task.row(result)}
        except (RecordError, NonFiniteRecordError) as error:
            record = window[error.index]
            kind = NonFiniteError if isinstance(error, NonFiniteError) else InputError
            raise kind(f"{source.label}, {record.place}, record {shown(record.name)}: {error.reason}") from error

    return compute


def _text(record: Record) -> str | Excerpt:
    """What is read of a record."""
    from hyaena.scoring import Excerpt

    if not record.contig:
        return record.text
    text, end = record.text, len(record.text) - record.after
    return Excerpt(text[record.before : end], text[: record.before], text[end:])


def _labels(record: Record, step: int) -> Row:
    """The first columns of its row."""
    if not record.contig:
        return {"name": record.name}
    end = record.start + len(record.text) - record.before - record.after
    place = {"contig": record.contig, "start": record.start, "end": end}
    return {"name": record.name, **place, **({"step": step} if step else {})}


def _tokens(encoder: Encoder, record: Record) -> int:
    """The tokens that are read of a record: start tokens, overlaps and other strands count."""
    from hyaena.scoring import RecordError

    try:
        return sum(map(len, encoder.records([_text(record)])))
    except RecordError as error:
        raise InputError(error.reason) from error


def _is_stream(path: Path) -> bool:
    """Whether a path can be read once only: a pipe, such as a shell's ``<(…)``, or a device."""
    return path.exists() and not path.is_file() and not path.is_dir()
