"""Continue prompts through the transformers library, by the original's command:

    python generate_transformers.py --model_id togethercomputer/StripedHyena-Nous-7B --input-file test_prompt.txt

Without an input file it asks for prompts, one after another, until the input ends. Text appears as it is generated.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from generate import Parser

from hyaena.cli import EXIT_ERROR, EXIT_INTERRUPTED
from hyaena.cli.process import signals_end_the_process, usable_streams
from hyaena.errors import HyaenaError, InputError, UnsupportedError, nearest, printable

SAMPLING = ("top_k", "top_p")
"""Options that need a temperature."""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The original's flags, and a few that it lacked."""
    description = "Continue prompts with a StripedHyena model, through the transformers library."
    parser = Parser(prog="generate_transformers.py", description=description, allow_abbrev=False)
    parser.add_argument(
        "--model_id", "--model-id", "--model-name", required=True, help="a hub id, a folder, or the bundled cub"
    )
    parser.add_argument("--input-file", "--input_file", help="the prompt; without it, prompts are asked for")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="how many tokens to generate (128)")
    parser.add_argument("--temperature", type=float, help="above 0 samples; without it generation is greedy")
    parser.add_argument("--top-k", type=int, help="sample from the K most probable tokens")
    parser.add_argument("--top-p", type=float, help="sample from the tokens that together reach P")
    parser.add_argument("--repetition-penalty", type=float, help="above 1 avoids tokens that occurred")
    parser.add_argument("--penalty-alpha", type=float, help="not supported: contrastive search takes tokens back")
    parser.add_argument("--seed", type=int, help="makes samples reproducible")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, … (a GPU if there is one)")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16 (on a CPU float32, elsewhere as stored)")
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        known = [option for action in parser._actions for option in action.option_strings]
        near = nearest(unknown[0].split("=")[0], known)
        parser.error(f"unrecognized arguments: {' '.join(unknown)}" + (f": did you mean {near}?" if near else ""))
    if args.penalty_alpha is not None:
        parser.error("--penalty-alpha is not supported: contrastive search takes tokens back, and Hyena blocks cannot")
    if not args.temperature and (given := [name for name in SAMPLING if getattr(args, name) is not None]):
        parser.error(f"--{given[0].replace('_', '-')} is for sampling: add --temperature")
    return args


def prompts(file: str | None) -> Iterator[str]:
    """The text of the file; without one, what is typed, line by line."""
    if file is not None:
        try:
            yield Path(file).read_bytes().decode("utf-8")
        except OSError as error:
            raise InputError(f"cannot read the input file {printable(file)}: {error.strerror or error}") from error
        except UnicodeDecodeError as error:
            raise InputError(f"{printable(file)} is not UTF-8 (byte {error.start})") from error
        return
    while True:
        try:
            line = input("> ")
        except EOFError:
            return
        if line:
            yield line


def run(args: argparse.Namespace) -> int:
    """Load the model and continue every prompt."""
    import torch
    from transformers import TextStreamer

    import hyaena.hf

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer = hyaena.hf.load(args.model_id, device=device, dtype=args.dtype, revision=args.revision)
    options: dict[str, Any] = {"max_new_tokens": args.max_new_tokens, "do_sample": bool(args.temperature)}
    if args.temperature:
        options |= {"temperature": args.temperature, "top_k": args.top_k or 0}
    if args.top_p is not None:
        options["top_p"] = args.top_p
    if args.repetition_penalty is not None:
        options["repetition_penalty"] = args.repetition_penalty
    if args.seed is not None:
        torch.manual_seed(args.seed)
    for prompt in prompts(args.input_file):
        inputs = tokenizer(prompt, return_tensors="pt").to(device)
        if not inputs["input_ids"].numel():
            raise InputError("the prompt is empty: give it some text")
        streamer = TextStreamer(tokenizer, skip_special_tokens=True)
        try:
            model.generate(**inputs, streamer=streamer, **options)
        except ValueError as error:  # how transformers refuses an option
            raise UnsupportedError(" ".join(str(error).split())) from error
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    args = parse(argv)
    with signals_end_the_process(), usable_streams():
        try:
            return run(args)
        except KeyboardInterrupt:
            return EXIT_INTERRUPTED
        except HyaenaError as error:
            print(f"generate_transformers.py: error: {error}", file=sys.stderr)
            return EXIT_ERROR


if __name__ == "__main__":
    sys.exit(main())
