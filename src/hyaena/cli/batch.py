"""What ``hyaena score`` and ``hyaena embed`` share: records in, a row each out, through any number of interruptions."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hyaena.cli.model_options import add_model_options
from hyaena.errors import InputError, NonFiniteError, shown
from hyaena.records import FORMATS, Record, Source, check_readable, find_source
from hyaena.records.source import open_source

if TYPE_CHECKING:
    from tqdm import tqdm

    from hyaena.jobs import Column, Row
    from hyaena.jobs.job import Compute
    from hyaena.model import StripedHyena
    from hyaena.records.contents import Shard
    from hyaena.scoring import Encoder
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
    """

    columns: Sequence[Column]
    options: Mapping[str, Any]
    read: Callable[..., Iterator[tuple[int, Any]]]
    row: Callable[[Any], Row]


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
        "-o", "--output", required=True, metavar="FILE", help=f"{rows}; FILE ends in .parquet, .jsonl or .npz"
    )

    group = parser.add_argument_group("input")
    group.add_argument(
        "--format",
        choices=tuple(FORMATS),
        help="how the input is read; by default as the end of its name says, .gz included",
    )
    group.add_argument(
        "--text-key", metavar="KEY", help="the key or column of the text, in JSON lines or Parquet (text)"
    )
    group.add_argument(
        "--name-key", metavar="KEY", help="that of the name (name, else id, else the record is numbered)"
    )
    group.add_argument(
        "--both-strands", action="store_true", help="texts are DNA: read the other strand, too, and give the means"
    )
    group.add_argument("--no-bos", action="store_true", help="put no start token in front of texts")
    group.add_argument(
        "--special", action="store_true", help="read names of special tokens in a text, such as </s>, as the tokens"
    )
    group.add_argument("--max-length", type=int, metavar="N", help="allow N tokens in a text (the model's maximum)")

    group = parser.add_argument_group("job")
    group.add_argument(
        "--shard", default="1/1", metavar="I/N", help="only part I of N, from 1: a run of neighbouring records"
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
    group.add_argument("--quiet", action="store_true", help="no progress bar (there is none where no terminal is)")

    group = parser.add_argument_group("model")
    add_model_options(group)
    group.add_argument("--method", default="auto", help="how long convolutions are evaluated: fft, blocked, … (auto)")
    group.add_argument(
        "--batch-tokens", type=int, metavar="N", help="tokens per pass (2048 on a CPU; on a GPU as memory allows)"
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
    if args.device == "":
        raise InputError("--device is empty: name one, such as cpu")
    keys = {"format": args.format, "text_key": args.text_key, "name_key": args.name_key}
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


def run(args: argparse.Namespace, files: Files, task: Task) -> int:
    """Check every record, load the model, and make the rows that are not there yet."""
    import torch

    from hyaena import checkpoints, hub
    from hyaena.fp8 import check_fp8
    from hyaena.jobs import Column, open_job
    from hyaena.model import StripedHyena
    from hyaena.records.contents import read_contents, read_part
    from hyaena.scoring import ReadOptions

    device = checkpoints.as_device(
        ("cuda" if torch.cuda.is_available() else "cpu") if args.device is None else args.device
    )
    checkpoints.as_dtype(None if args.dtype == "stored" else args.dtype)
    origin = {"revision": args.revision, "config": args.config}
    reading = {
        "bos": False if args.no_bos else None,
        "special": args.special,
        "both_strands": args.both_strands,
        "method": args.method,
        "max_length": args.max_length,
        "tokens_per_pass": args.batch_tokens,
    }
    config, tokenizer = hub.load_tokenizer_of(args.model, **origin)
    check_fp8(args.fp8, config.fp8_input_projections)
    with torch.device("meta"):
        shape = StripedHyena(config)  # without weights: enough to check options and texts
    task.read(shape, tokenizer, [], **reading)
    encoder = ReadOptions(**reading).encoder(shape, tokenizer)
    options = {
        "the command": args.command,
        "--model": args.model,
        "the digest of the model's files": checkpoints.fingerprint(hub.locate(args.model, **origin)),
        "--dtype": args.dtype or ("float32" if device.type == "cpu" else "stored"),
        "--fp8": args.fp8,
        "--shard": str(files.shard),
        "--save-every": args.save_every,
        "--batch-tokens": args.batch_tokens,
        "--max-length": args.max_length,
        "--method": args.method,
        **{f"--{name}": getattr(args, name.replace("-", "_")) for name in ("both-strands", "no-bos", "special")},
        **task.options,
    }
    columns = [Column("name", "text"), *task.columns]
    with open_job(files.output, columns, options, restart=args.restart) as job:
        source = files.source
        if args.input == STANDARD_INPUT:
            source = replace(source, path=job.keep_input(sys.stdin.buffer))
        elif _is_stream(source.path):
            with open_source(source.path, source.label, compressed=False, cure="check its permissions") as stream:
                source = replace(source, path=job.keep_input(stream))
        contents = read_contents(source, partial(_tokens, encoder))
        part = contents.part(files.shard)
        with _Progress(part.size, show=not args.quiet and sys.stderr.isatty()) as progress:

            def start() -> Compute:
                model = hub.load_model(
                    args.model, device=device, dtype=args.dtype, fp8=args.fp8, weights=args.weights, **origin
                )
                progress.begin()
                return _compute(model, tokenizer, source, task, reading, progress)

            try:
                rows = job.run(
                    read_part(source, part),
                    start,
                    window=args.save_every,
                    skip=lambda record: progress.skip(int(contents.sizes[record.index])),
                )
            except (KeyboardInterrupt, SystemExit):
                progress.close()
                if job.is_begun:
                    print(f"hyaena: finished rows are kept in {job.folder}: the same command goes on", file=sys.stderr)
                raise
    print(f"{files.output}: {rows:,} records, {part.size:,} tokens")
    return 0


def _compute(
    model: StripedHyena,
    tokenizer: Tokenizer,
    source: Source,
    task: Task,
    reading: Mapping[str, Any],
    progress: _Progress,
) -> Compute:
    from hyaena.scoring import NonFiniteRecordError, RecordError

    def compute(window: Sequence[Record]) -> Iterable[tuple[int, Row]]:
        texts = (record.text for record in window)
        try:
            for index, result in task.read(model, tokenizer, texts, **reading, progress=progress.window()):
                yield index, {"name": window[index].name, **task.row(result)}
        except (RecordError, NonFiniteRecordError) as error:
            record = window[error.index]
            kind = NonFiniteError if isinstance(error, NonFiniteError) else InputError
            raise kind(f"{source.label}, {record.place}, record {shown(record.name)}: {error.reason}") from error

    return compute


def _tokens(encoder: Encoder, text: str) -> int:
    """The tokens that are read of a text: start tokens and other strands count."""
    from hyaena.scoring import RecordError

    try:
        return sum(map(len, encoder.records([text])))
    except RecordError as error:
        raise InputError(error.reason) from error


def _is_stream(path: Path) -> bool:
    """Whether a path can be read once only: a pipe, such as a shell's ``<(…)``, or a device."""
    return path.exists() and not path.is_file() and not path.is_dir()


class _Progress:
    """A progress bar over tokens, with the time that is left."""

    def __init__(self, tokens: int, *, show: bool) -> None:
        self._bar: tqdm[Any] | None = None
        if show:
            from tqdm import tqdm

            self._bar = tqdm(total=tokens, unit=" tokens", unit_scale=True, file=sys.stderr)

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def begin(self) -> None:
        """Measure the rate from now on: the model is loaded."""
        if self._bar is not None:
            self._bar.unpause()

    def skip(self, tokens: int) -> None:
        """Count what an earlier process read, which says nothing of the rate."""
        if self._bar is not None:
            self._bar.initial += tokens
            self._bar.update(tokens)

    def window(self) -> Callable[[int], None]:
        """Return what counts the tokens of one window: it is called with how many have been read."""
        before = 0

        def tell(tokens: int) -> None:
            nonlocal before
            if self._bar is not None:
                self._bar.update(tokens - before)
            before = tokens

        return tell
