"""``hyaena generate``: continue a prompt and stream the text to standard output."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from hyaena.cli import sequences
from hyaena.cli.batch import add_record_arguments
from hyaena.cli.formatting import json_text
from hyaena.cli.model_options import add_model_options, choose_device, tell_what_is_cut
from hyaena.errors import InputError, UnsupportedError, counted, shown
from hyaena.files import check_place

if TYPE_CHECKING:
    from tqdm import tqdm

    from hyaena.generation import Completion, Options, Stats
    from hyaena.model import StripedHyena

HELP = "continue a prompt with a model"
EXAMPLES = (
    'hyaena generate --max-new-tokens 60 "def fibonacci(n):"',
    'hyaena generate "|d__Bacteria|" --allowed ACGT --temperature 1 -n 100 --output samples.fasta',
)

MAX_PROMPT_BYTES = 64 * 2**20
"""The largest prompt that is read: a device or a pipe might never end."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options; their defaults are those of ``hyaena.generate``, so the default is greedy."""
    parser.add_argument("prompt", nargs="?", help="the text to continue; standard input when there is none")
    parser.add_argument("--prompt-file", metavar="FILE", help="read the prompt from a file, byte for byte")
    parser.add_argument(
        "--prompts", metavar="FILE", help="with --output: a file of prompts, such as a line each of a .txt file"
    )
    parser.add_argument(
        "--prefix-file", metavar="FILE", help="continue what --save-prefix saved; the prompt, if any, follows it"
    )
    parser.add_argument(
        "--save-prefix", metavar="FILE", help="save what the model remembers of the prompt, for --prefix-file"
    )
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="generate at most N tokens (256)")
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be repeated"
    )
    parser.add_argument(
        "--stop-token-id",
        action="append",
        default=[],
        type=int,
        metavar="ID",
        help="end at this token; may be repeated",
    )
    parser.add_argument("--ignore-eos", action="store_true", help="do not end at the token that ends a document")
    parser.add_argument(
        "--special", action="store_true", help="read names of special tokens in the prompt, such as </s>, as the tokens"
    )

    add_record_arguments(parser.add_argument_group("--prompts"))

    group = parser.add_argument_group("model")
    add_model_options(group)
    group.add_argument("--adapter", metavar="FOLDER", help="a LoRA adapter of the model, from PEFT or hyaena")
    group.add_argument(
        "--method", default="auto", help="how the prompt's long convolutions are evaluated: fft, blocked, … (auto)"
    )
    group.add_argument(
        "--decoding",
        default="auto",
        choices=("auto", "eager", "static", "compiled", "cuda_graph"),
        help="how tokens are decoded: by calls of the model, or by steps on memory that does not move: as they are, "
        "compiled for a CPU, or as a CUDA graph (auto: one of the last two where it can run, else eager)",
    )
    group.add_argument("--max-length", type=int, metavar="N", help="allow N tokens in all (the model's maximum)")
    group.add_argument(
        "--prefill-chunk",
        type=int,
        metavar="N",
        help="tokens of the prompt per pass (512 on a CPU; on a GPU 2048 to 32768, as memory allows)",
    )

    group = parser.add_argument_group("sampling, in this order")
    group.add_argument(
        "--repetition-penalty", type=float, default=1.0, metavar="R", help="above 1 avoids tokens that occurred (1)"
    )
    group.add_argument(
        "--logit-bias",
        action="append",
        default=[],
        metavar="ID=B",
        help="add B to the logit of a token, up to 100; -100 forbids it; may be repeated",
    )
    group.add_argument(
        "--allowed", metavar="TEXT", help="only tokens made of these characters, such as ACGT, and the end"
    )
    group.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (0)")
    group.add_argument("--top-k", type=int, default=0, metavar="K", help="keep the K most probable tokens (0: all)")
    group.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="keep those that together reach P (1: all)"
    )
    group.add_argument(
        "--min-p", type=float, default=0.0, metavar="M", help="drop those below M times the best (0: none)"
    )
    group.add_argument("--seed", type=int, metavar="S", help="makes samples reproducible")

    group = parser.add_argument_group("output")
    group.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        help="write a row per sample: FASTA (.fa, .fasta, …; needs --allowed), .jsonl, .parquet, .csv, .tsv or .npz; "
        "the same command goes on after an interruption",
    )
    group.add_argument(
        "--restart", action="store_true", help="with --output: begin again, and replace the output if it is there"
    )
    group.add_argument(
        "--json", action="store_true", help="print one JSON document instead of text; null for infinities"
    )
    group.add_argument("--logprobs", type=int, default=0, metavar="N", help="with --json: N alternatives per token")
    group.add_argument(
        "-n",
        "--samples",
        type=int,
        metavar="N",
        help="N samples of the prompt: with --json the list completions, with --output a record each",
    )
    group.add_argument("--batch-rows", type=int, metavar="N", help="with --output: decode N samples at a time (64)")
    group.add_argument("--echo", action="store_true", help="begin with the prompt")
    group.add_argument("--stats", action="store_true", help="end with times and memory on standard error")


def run(args: argparse.Namespace) -> int:
    """Read the prompt, check everything that needs no weights, load the model, write the completion."""
    sequences.check_arguments(args)
    named = [] if args.prompts is None else sequences.read_prompts(args)
    prompt = b"" if named else read_prompt(args)
    bias = parse_bias(args.logit_bias)
    if args.logprobs and not args.json:
        raise InputError("--logprobs needs --json: streamed text has no place for them")
    if args.samples is not None and not args.json and args.output is None:
        raise InputError("--samples needs --json or --output: streamed text has one completion")
    if args.stats and args.output is not None:
        raise InputError("--stats is of one completion: leave it out with --output")
    if args.save_prefix is not None:
        check_place(Path(args.save_prefix))
    if args.echo and args.json:
        raise InputError("--echo is for text: leave it out with --json")

    from hyaena import checkpoints, hub
    from hyaena.fp8 import check_fp8
    from hyaena.generation import Settings, encode_prompts, generate, load_prefix, parse_prompts, prefix, stream
    from hyaena.generation.prefixes import check_prefix
    from hyaena.ops import capabilities

    bar = PrefillBar()
    options: Options = {
        "max_new_tokens": args.max_new_tokens,
        "temperature": args.temperature,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "min_p": args.min_p,
        "repetition_penalty": args.repetition_penalty,
        "logit_bias": bias,
        "allowed_tokens": args.allowed,
        "seed": args.seed,
        "stop": args.stop,
        "stop_token_ids": args.stop_token_id,
        "stop_at_eos": not args.ignore_eos,
        "special": args.special,
        "logprobs": args.logprobs,
        "method": args.method,
        "decoding": args.decoding,
        "max_length": args.max_length,
        "prefill_chunk": args.prefill_chunk,
        "progress": bar if sys.stderr.isatty() else None,
        "n": args.samples,
    }
    settings = Settings(**options)
    if (args.prefix_file, args.save_prefix) != (None, None) and capabilities(args.method).state == "window":
        raise InputError(
            f"a prefix keeps no windows of inputs, from which {args.method} goes on: choose another --method"
        )
    named = named or [sequences.Prompt("prompt", prompt)]
    prompts = parse_prompts([one.text for one in named], allow_empty=args.prefix_file is not None)[0]
    device = choose_device(args)
    dtype = hub.choose_dtype(args.dtype, device)
    if args.decoding == "cuda_graph" and device.type != "cuda":
        raise UnsupportedError(f"graphs are captured on CUDA devices, not on {device}: choose another --decoding")
    began = time.perf_counter()
    source = {"revision": args.revision, "config": args.config}
    config, tokenizer = hub.load_tokenizer_of(args.model, **source)
    if args.prefix_file is None:  # before the weights are downloaded and read
        encode_prompts(tokenizer, config, prompts, settings)
    else:
        check_prefix(args.prefix_file)
    check_fp8(args.fp8, config.fp8_input_projections)

    def load() -> StripedHyena:
        """The model; beside it, ``options`` has the prefix that is continued, and --save-prefix is done."""
        model = hub.load_model(
            args.model,
            device=device,
            dtype=args.dtype,
            adapter=args.adapter,
            fp8=args.fp8,
            weights=args.weights,
            cache_dtype=args.cache_dtype,
            **source,
        )
        tell_what_is_cut(model, args.method)
        beginning = None if args.prefix_file is None else load_prefix(args.prefix_file, model, tokenizer)
        if args.save_prefix is not None:
            if beginning is None:
                beginning = prefix(model, tokenizer, prompt, special=args.special, max_length=args.max_length)
            elif prompt:
                beginning.extend(prompt, special=args.special)
            beginning.save(args.save_prefix)
        options["prefix"] = beginning
        return model

    given = prompt if args.save_prefix is None else b""  # the rest is in what was saved
    if args.output is not None:
        if args.save_prefix is not None:
            named = [named[0]._replace(rest=given)]
        made_by = {
            "the digest of the model's files": checkpoints.fingerprint(hub.locate(args.model, **source)),
            "--dtype": str(dtype or "stored").removeprefix("torch."),
        }

        def start() -> Callable[[list[bytes], list[int]], list[Completion]]:
            model = load()

            def decode(texts: list[bytes], seeds: list[int]) -> list[Completion]:
                own: dict[str, Any] = {**options, "n": None, "progress": None, "seed": seeds}
                return generate(model, tokenizer, texts, **own)

            return decode

        count = sequences.write_samples(args, named, made_by, start)
        print(f"{args.output}: {counted(count, 'sample')}")
        return 0
    model = load()
    load_seconds = time.perf_counter() - began
    stats: Stats | None = None
    if args.json:
        completions: Any = generate(model, tokenizer, given, **options)
        rows = [completions] if args.samples is None else completions
        written = [dataclasses.asdict(row) for row in rows]
        for row in written:
            row["stats"]["load_seconds"] = load_seconds
        print(json_text({"model": args.model, **(written[0] if args.samples is None else {"completions": written})}))
        stats = rows[-1].stats
    else:
        text = prompt.decode("utf-8", errors="replace") if args.echo else ""
        sys.stdout.write(text)
        for event in stream(model, tokenizer, given, **options):
            text = event.text or text
            sys.stdout.write(event.text)
            sys.stdout.flush()
            stats = event.stats
        if not text.endswith("\n"):
            sys.stdout.write("\n")
            sys.stdout.flush()
    if args.stats and stats is not None:
        print(describe(stats, load_seconds), file=sys.stderr)
    return 0


def read_prompt(args: argparse.Namespace) -> bytes:
    """The prompt's bytes: the argument, else the file, else standard input unless that is a terminal.

    A byte order mark at the start of a file or of standard input is left out.
    """
    if args.prompt is not None and args.prompt_file is not None:
        raise InputError("the prompt is given twice: as an argument and with --prompt-file; keep one")
    if args.prompt is not None:
        return os.fsencode(args.prompt)
    if args.prompt_file is not None:
        try:
            with open(args.prompt_file, "rb") as file:
                return _read(file, f"the prompt file {args.prompt_file}")
        except (OSError, ValueError) as error:  # ValueError: a path with a NUL character
            if isinstance(error, InputError):
                raise
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"cannot read the prompt file {args.prompt_file}: {reason}") from error
    if args.prefix_file is not None:  # the prompt that was saved is continued
        return b""
    if sys.stdin.isatty():
        raise InputError("there is no prompt: give it as an argument, with --prompt-file or on standard input")
    return _read(sys.stdin.buffer, "the prompt")


def parse_bias(words: list[str]) -> dict[int, float]:
    """The biases of ``--logit-bias ID=B``.

    Raises:
        InputError: a word of another form.
    """
    bias: dict[int, float] = {}
    for word in words:
        name, _, value = word.partition("=")
        try:
            token, number = int(name), float(value)
        except ValueError:
            raise InputError(
                f"--logit-bias {shown(word)} is not understood: write a token's id and a number, 5=-1.5"
            ) from None
        if token in bias:
            raise InputError(f"--logit-bias {shown(word)} is the second one of token {shown(token)}: keep one")
        bias[token] = number
    return bias


def _read(file: IO[bytes], name: str) -> bytes:
    data = file.read(MAX_PROMPT_BYTES + 1)
    if len(data) > MAX_PROMPT_BYTES:
        raise InputError(f"{name} is larger than {MAX_PROMPT_BYTES // 2**20} MiB: shorten it")
    return data.removeprefix(b"\xef\xbb\xbf")


def describe(stats: Stats, load_seconds: float) -> str:
    """The figures of one completion, on one line for people."""
    parts = [
        f"loaded in {load_seconds:.1f} s",
        f"{stats.prompt_tokens:,} + {counted(stats.completion_tokens, 'token')}",
        f"time to first token {stats.time_to_first_token:.3f} s",
    ]
    if stats.decode_tokens_per_second is not None:
        parts.append(f"{stats.decode_tokens_per_second:.1f} tokens/s")
    if stats.peak_memory is not None:
        parts.append(f"peak memory {stats.peak_memory / 2**20:,.0f} MiB")
    return " | ".join(parts)


class PrefillBar:
    """A progress bar on standard error while a prompt of more than one pass is read."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None

    def __call__(self, done: int, total: int) -> None:
        """``done`` of ``total`` tokens have been read."""
        if self._bar is None:
            if done == total:
                return
            from tqdm import tqdm

            self._bar = tqdm(total=total, unit=" tokens", desc="reading", leave=False, file=sys.stderr)
        self._bar.update(done - self._bar.n)
        if done == total:
            self._bar.close()
