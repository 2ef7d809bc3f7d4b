"""``hyaena generate --output FILE``: many samples of many prompts, through any number of interruptions."""

from __future__ import annotations

import argparse
import hashlib
import random
import re
import string
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hyaena.cli.batch import telling_what_is_kept
from hyaena.cli.progress import Progress
from hyaena.errors import InputError, printable, shown
from hyaena.files import check_place
from hyaena.records import find_source, read_records
from hyaena.records.fasta import FASTA_SUFFIXES

if TYPE_CHECKING:
    from hyaena.generation import Completion
    from hyaena.jobs import Row
    from hyaena.jobs.job import Compute

BATCH_ROWS = 64
"""Samples at a time, unless --batch-rows says otherwise."""

_LETTERS = frozenset(string.ascii_letters + "*-")


class Prompt(NamedTuple):
    """What is continued.

    Attributes:
        name: begins the names of its samples.
        text: of the prompt.
        rest: what is still to be read of it, where a prefix holds the rest.
    """

    name: str
    text: bytes
    rest: bytes | None = None


def read_prompts(args: argparse.Namespace) -> list[Prompt]:
    """Read the file of prompts: lines of text, JSON lines, Parquet, FASTA or FASTQ.

    Raises:
        InputError: it cannot be read, or two prompts have one name.
    """
    source = find_source(args.prompts, format=args.format, text_key=args.text_key, name_key=args.name_key)
    prompts = [Prompt(record.name, record.text.encode()) for record in read_records(source)]
    seen = set[str]()
    for name in (_id(prompt.name) for prompt in prompts):
        if name in seen:
            raise InputError(f"{source.label}: two prompts are named {shown(name)}; rename one")
        seen.add(name)
    return prompts


def check_arguments(args: argparse.Namespace) -> None:
    """Check what concerns outputs, before anything is loaded.

    Raises:
        HyaenaError: the options do not go together, or the output cannot be used.
    """
    if args.prompts is None and (args.format, args.text_key, args.name_key) != (None, None, None):
        raise InputError("--format, --text-key and --name-key say how --prompts is read: add that, or leave them out")
    if args.output is None:
        for option in ("prompts", "batch_rows", "restart"):
            if getattr(args, option) not in (None, False):
                raise InputError(f"--{option.replace('_', '-')} needs --output: printed text has one prompt")
        return
    from hyaena.jobs import check_output  # NumPy

    if args.prompts is not None and (args.prompt, args.prompt_file, args.save_prefix) != (None, None, None):
        raise InputError("--prompts names all prompts: leave the argument, --prompt-file and --save-prefix out")
    path = Path(args.output)
    check_output(path)
    check_place(path)
    if args.json or args.logprobs:
        raise InputError(
            "--json and --logprobs are of what is printed: leave them out with --output, which ends in .jsonl for JSON"
        )
    if _is_fasta(path) and (args.allowed is None or not _LETTERS.issuperset(args.allowed)):
        raise InputError("FASTA holds letters only: add --allowed with letters, such as ACGT")
    if args.batch_rows is not None and args.batch_rows < 1:
        raise InputError(f"--batch-rows must be at least 1, not {args.batch_rows}")


class Sample(NamedTuple):
    """What is made a row of; see ``jobs.job.Record``.

    Attributes:
        name: of the row.
        text: of the prompt, and the seed: what the row depends on.
        place: where the prompt stands.
        prompt: that is continued.
        seed: of this sample.
    """

    name: str
    text: str
    place: str
    prompt: Prompt
    seed: int


def write_samples(
    args: argparse.Namespace,
    prompts: Sequence[Prompt],
    made_by: Mapping[str, Any],
    start: Callable[[], Callable[..., list[Completion]]],
) -> int:
    """Continue every prompt ``--samples`` times, ``--batch-rows`` at a time, and write the file; return the rows.

    Every sample has a seed of its own, which its row names: ``--seed``, and one more for each sample that follows.
    Every batch that is finished is kept, and the same command goes on behind it, with the seed that was drawn if there
    is no ``--seed``.

    Args:
        args: of the command.
        prompts: to continue.
        made_by: what samples depend on beside the command's options, by what messages call it.
        start: loads the model, and returns ``generate(texts, seeds)``.

    Raises:
        InputError: ``--echo`` and a prompt that is no sequence; the output is there already.
    """
    from hyaena.jobs import Column, open_job

    output = Path(args.output)
    if args.echo and _is_fasta(output):
        for prompt in prompts:
            if wrong := set(prompt.text.decode("latin-1")) - _LETTERS:
                raise InputError(
                    f"--echo: the prompt {shown(prompt.name)} has {shown(min(wrong))}, for which FASTA has no place: "
                    "leave --echo out"
                )
    samples = 1 if args.samples is None else args.samples
    total = len(prompts) * samples
    first = random.SystemRandom().randrange(2**31) if args.seed is None else args.seed
    if first + total > 2**63:
        raise InputError(
            f"--seed {first} and one more for each of {total:,} samples pass 2**63 - 1: take a smaller one"
        )
    columns = [
        *(Column("name", "text"), Column("prompt", "text"), Column("seed", "integer"), Column("end", "text")),
        *(Column("mean_loglik", "real"), Column("text", "text")),
    ]
    options = {f"--{name.replace('_', '-')}": value for name, value in vars(args).items() if name not in _NO_RESULT}
    for name in ("prefix_file", "adapter"):
        if (path := getattr(args, name)) is not None:
            options[f"the digest of --{name.replace('_', '-')}"] = _digest(Path(path))
    with (
        open_job(output, columns, {"the command": args.command, **made_by, **options}, restart=args.restart) as job,
        Progress(total, unit="samples", show=sys.stderr.isatty()) as progress,
    ):
        if args.seed is None:
            first = job.keep_seed(first)

        def begin() -> Compute[Sample]:
            generate = start()
            progress.begin()

            def compute(batch: Sequence[Sample]) -> Iterable[tuple[int, Row]]:
                texts = [_text(one.prompt) for one in batch]
                found = generate(texts, [one.seed for one in batch])
                progress.window()(len(batch))
                return enumerate(_row(args.echo, *pair) for pair in zip(batch, found, strict=True))

            return compute

        drawn = ((prompt, number) for prompt in prompts for number in range(1, samples + 1))
        rows = (_sample(prompt, number, first + count) for count, (prompt, number) in enumerate(drawn))
        with telling_what_is_kept(job, progress):
            return job.run(
                rows,
                begin,
                window=args.batch_rows or BATCH_ROWS,
                size=lambda sample: 1,
                skip=lambda sample: progress.skip(1),
            )


_NO_RESULT = {
    *("command", "run", "debug", "device", "output", "restart", "stats", "json", "logprobs"),
    *("prompt", "prompt_file", "prompts", "format", "text_key", "name_key", "save_prefix"),
}
"""Options on which rows do not depend by their values: every prompt is part of its sample."""


def _is_fasta(path: Path) -> bool:
    return path.suffix.lower() in FASTA_SUFFIXES


def _sample(prompt: Prompt, number: int, seed: int) -> Sample:
    text = prompt.text.decode(errors="replace")
    return Sample(f"{_id(prompt.name)}-{number}", f"{seed} {text}", f"sample {number}", prompt, seed)


def _text(prompt: Prompt) -> bytes:
    """What the model reads."""
    return prompt.text if prompt.rest is None else prompt.rest


def _row(echo: bool, sample: Sample, found: Completion) -> Row:
    prompt = sample.prompt.text.decode(errors="replace")
    return {
        "name": sample.name,
        "prompt": prompt,
        "seed": sample.seed,
        "end": found.finish_reason,
        "mean_loglik": sum(found.logprobs) / len(found.logprobs),
        "text": prompt * echo + found.text,
    }


def _digest(path: Path) -> str:
    """A digest of a file, or of the files of a folder."""
    digest = hashlib.blake2b(digest_size=16)
    try:
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            if file.is_file():
                with file.open("rb") as content:
                    digest.update(hashlib.file_digest(content, "blake2b").digest())
    except OSError as error:
        raise InputError(f"cannot read {printable(str(path))}: {error.strerror}; check its permissions") from error
    return digest.hexdigest()


def _id(name: str) -> str:
    """A name as the first word of a header."""
    return re.sub(r"\s+", "_", printable(name))
