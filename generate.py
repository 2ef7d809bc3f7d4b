"""Continue a prompt with a checkpoint of the original implementation, by the original's command:

    python generate.py --config_path config.yml --checkpoint_path pytorch-model.bin \\
        --cached_generation --prompt_file prompt.txt --num_tokens 84

It is ``hyaena generate`` under the names that users of the original know; ``hyaena generate --help`` offers more.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

import hyaena.cli
from hyaena.errors import HyaenaError, nearest, printable
from hyaena.formats import read_config

FLAGS = {
    "config_path": "config",
    "checkpoint_path": "model",
    "num_tokens": "max-new-tokens",
    "temperature": "temperature",
    "top_k": "top-k",
    "top_p": "top-p",
    "repetition_penalty": "repetition-penalty",
    "seed": "seed",
    "device": "device",
    "dtype": "dtype",
}
"""Flags of this script -> flags of ``hyaena generate``."""


DEMO_PROMPT = "import argparse\n"


class Parser(argparse.ArgumentParser):
    """An argument parser with one line for every mistake."""

    def error(self, message: str) -> NoReturn:
        """End with status 2 and one line."""
        self.exit(2, f"{self.prog}: error: {printable(message, limit=500)} (see --help)\n")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The original's flags, and a few that it lacked."""
    description = "Continue a prompt with a checkpoint of the original's layout."
    parser = Parser(prog="generate.py", description=description, allow_abbrev=False)
    parser.add_argument("--config_path", help="the original YAML; its prefill_style chooses the method")
    parser.add_argument("--checkpoint_path", help="the weights: .bin, .pt, .safetensors or a folder")
    parser.add_argument("--num_tokens", type=int, default=84, help="how many tokens to generate (84)")
    parser.add_argument("--prompt_file", help="the prompt (./prompt.txt; with --demo, one of its own)")
    parser.add_argument(
        "--cached_generation",
        action="store_true",
        help="without effect: there is always a cache, and it is exact",
    )
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy, as the original's script was (0)")
    parser.add_argument("--top_k", type=int, default=0, help="keep the K most probable tokens; 0 keeps all (0)")
    parser.add_argument("--top_p", type=float, default=1.0, help="keep the tokens that together reach P (1)")
    parser.add_argument("--repetition_penalty", type=float, default=1.0, help="above 1 avoids tokens that occurred (1)")
    parser.add_argument("--seed", type=int, help="makes samples reproducible")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, … (a GPU if there is one)")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16 (on a CPU float32, elsewhere as stored)")
    parser.add_argument("--demo", action="store_true", help="run the bundled model instead of a checkpoint")
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        near = nearest(unknown[0].split("=")[0], [f"--{flag}" for flag in vars(args)])
        parser.error(f"unrecognized arguments: {' '.join(unknown)}" + (f": did you mean {near}?" if near else ""))
    if args.demo and (args.checkpoint_path or args.config_path):
        parser.error("--demo brings its own checkpoint and config: leave --checkpoint_path and --config_path out")
    if not args.demo and not args.checkpoint_path:
        parser.error("no --checkpoint_path, so there are no weights to run: name them, or run the bundled --demo")
    if not args.demo and not args.config_path:
        parser.error("no --config_path: name the YAML of the checkpoint")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Translate the flags and run ``hyaena generate``."""
    args = parse(argv)
    command = ["generate", "--stats"]
    if args.demo:
        command.append("--echo")  # so that the completion is not read as the whole
    else:
        try:
            method = read_config(args.config_path).prefill_method
        except HyaenaError as error:
            print(f"generate.py: error: {error}", file=sys.stderr)
            return 2
        command.append(f"--method={method}")
    for flag, ours in FLAGS.items():
        value = getattr(args, flag)
        if value is not None:
            command.append(f"--{ours}={value}")
    if args.demo and args.prompt_file is None:
        command += ["--", DEMO_PROMPT]
    else:
        command.append(f"--prompt-file={args.prompt_file or './prompt.txt'}")
    return hyaena.cli.main(command)


if __name__ == "__main__":
    sys.exit(main())
