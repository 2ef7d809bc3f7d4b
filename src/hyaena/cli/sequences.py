"""``hyaena generate --output x.fasta``: many samples of many prompts, as the records of a FASTA file."""

from __future__ import annotations

import argparse
import random
import re
import string
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hyaena.cli.progress import Progress
from hyaena.errors import InputError, printable, shown
from hyaena.files import check_place, write_atomically
from hyaena.records import find_source, read_records
from hyaena.records.fasta import FASTA_SUFFIXES

if TYPE_CHECKING:
    from hyaena.generation import Completion
    from hyaena.model import StripedHyena
    from hyaena.tokenizers import Tokenizer

WIDTH = 60
"""Letters of a line."""

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


def read_prompts(path: str) -> list[Prompt]:
    """Read a file of prompts: lines of text, JSON lines, Parquet, FASTA or FASTQ, as the end of its name says.

    Raises:
        InputError: it cannot be read, or two prompts have one name.
    """
    prompts = [Prompt(record.name, record.text.encode()) for record in read_records(find_source(path))]
    seen = set[str]()
    for name in (_id(prompt.name) for prompt in prompts):
        if name in seen:
            raise InputError(f"{printable(path)}: two prompts are named {shown(name)}; rename one")
        seen.add(name)
    return prompts


def check_arguments(args: argparse.Namespace) -> None:
    """Check what concerns FASTA, before anything is loaded.

    Raises:
        InputError: the options do not go together.
    """
    if args.output is None:
        if args.prompts is not None:
            raise InputError("--prompts needs --output: streamed text has one prompt")
        if args.batch_rows is not None:
            raise InputError("--batch-rows needs --output: elsewhere all samples are decoded together")
        return
    if args.prompts is not None and (args.prompt, args.prompt_file, args.save_prefix) != (None, None, None):
        raise InputError("--prompts names all prompts: leave the argument, --prompt-file and --save-prefix out")
    path = Path(args.output)
    if path.suffix.lower() not in FASTA_SUFFIXES:
        raise InputError(
            f"the output {printable(str(path))} must end in {', '.join(sorted(FASTA_SUFFIXES))}: it is FASTA"
        )
    check_place(path)
    if args.json or args.logprobs:
        raise InputError("--output is FASTA, which has no place for JSON and log-probabilities: leave them out")
    if args.allowed is None or not _LETTERS.issuperset(args.allowed):
        raise InputError("FASTA holds letters only: add --allowed with letters, such as ACGT")
    if args.batch_rows is not None and args.batch_rows < 1:
        raise InputError(f"--batch-rows must be at least 1, not {args.batch_rows}")


def write_fasta(
    args: argparse.Namespace,
    model: StripedHyena,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    options: Mapping[str, Any],
) -> int:
    """Continue every prompt ``--samples`` times, ``--batch-rows`` at a time, and write the file; return the records.

    Every sample has a seed of its own, which its header names: ``--seed``, and one more for each sample that follows.

    Raises:
        InputError: ``--echo`` and a prompt that is no sequence.
    """
    from hyaena.generation import generate

    if args.echo:
        for prompt in prompts:
            if wrong := set(prompt.text.decode("latin-1")) - _LETTERS:
                raise InputError(
                    f"--echo: the prompt {shown(prompt.name)} has {shown(min(wrong))}, for which FASTA has no place: "
                    "leave --echo out"
                )
    samples = 1 if args.samples is None else args.samples
    seed = random.SystemRandom().randrange(2**31) if args.seed is None else args.seed
    total = len(prompts) * samples
    if seed + total > 2**63:
        raise InputError(f"--seed {seed} and one more for each of {total:,} samples pass 2**63 - 1: take a smaller one")
    drawn = ((prompt, sample) for prompt in prompts for sample in range(1, samples + 1))
    rows = ((*row, seed + number) for number, row in enumerate(drawn))
    records: list[bytes] = []
    with Progress(total, unit="samples", show=sys.stderr.isatty()) as progress:
        while part := list(islice(rows, args.batch_rows or BATCH_ROWS)):
            own = {"n": None, "progress": None, "seed": [number for *_, number in part]}
            texts = [prompt.text if prompt.rest is None else prompt.rest for prompt, *_ in part]
            found = generate(model, tokenizer, texts, **{**options, **own})
            records += [_record(args.echo, *row, one) for row, one in zip(part, found, strict=True)]
            progress.window()(len(part))
    write_atomically(Path(args.output), lambda file: file.writelines(records))
    return len(records)


def _record(echo: bool, prompt: Prompt, sample: int, seed: int, found: Completion) -> bytes:
    mean = sum(found.logprobs) / len(found.logprobs)
    text = printable(prompt.text.decode(errors="replace"), limit=100)
    header = f">{_id(prompt.name)}-{sample} prompt={text} seed={seed} end={found.finish_reason} mean_loglik={mean:.4f}"
    sequence = prompt.text.decode("latin-1") * echo + found.text
    return "\n".join([header, *_lines(sequence), ""]).encode()


def _lines(sequence: str) -> Iterator[str]:
    return (sequence[i : i + WIDTH] for i in range(0, len(sequence), WIDTH))


def _id(name: str) -> str:
    """A name as the first word of a header."""
    return re.sub(r"\s+", "_", printable(name))
