"""The ``hyaena`` command: finds the subcommand, runs it, and turns errors into one line and an exit status.

Each command is a module of this package with

- ``HELP``: one line for ``hyaena --help``;
- ``add_arguments(parser)``: its options;
- ``run(args) -> int``: does the work and returns the exit status.

The modules import torch and everything heavy inside ``run``, so that help and mistakes answer at once.

Exit status: 0 done, 2 for an error that the message explains, 130 interrupted, 141 the reader of the output went away.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import NoReturn

from hyaena import __version__
from hyaena.errors import HyaenaError

COMMANDS: Mapping[str, str] = {
    "generate": "hyaena.cli.generate",
    "convert": "hyaena.cli.convert",
    "info": "hyaena.cli.info",
    "train": "hyaena.cli.train",
    "bench": "hyaena.cli.bench",
}

EXIT_ERROR = 2
EXIT_INTERRUPTED = 128 + 2  # as a shell reports SIGINT
EXIT_BROKEN_PIPE = 128 + 13  # as a shell reports SIGPIPE


class _Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line, like every other error of the command."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_ERROR, f"hyaena: error: {message} (see '{self.prog} --help')\n")


def build_parser(commands: Mapping[str, str] = COMMANDS) -> argparse.ArgumentParser:
    """The parser of the whole command line.

    Args:
        commands: command names and the modules that hold them, in the order of ``--help``.
    """
    parser = _Parser(prog="hyaena", description="Run, convert, inspect and train StripedHyena models.")
    parser.add_argument("--version", action="version", version=f"hyaena {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, module_name in commands.items():
        module = import_module(module_name)
        subparser = subparsers.add_parser(name, help=module.HELP, description=module.HELP)
        # Suppressed, so that the subparser's default does not undo a --debug given before the command.
        subparser.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
        )
        module.add_arguments(subparser)
        subparser.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None, *, commands: Mapping[str, str] = COMMANDS) -> int:
    """Run the command line and return its exit status.

    Args:
        argv: the arguments after the program's name; those of the process when absent.
        commands: command names and the modules that hold them.
    """
    args = build_parser(commands).parse_args(argv)
    try:
        status = args.run(args)
        sys.stdout.flush()  # here, not at exit, where a broken pipe could no longer be caught
        return status
    except KeyboardInterrupt:
        print("hyaena: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # `hyaena ... | head` closed our output: no error of ours. What is still buffered goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except (HyaenaError, OSError) as error:
        if args.debug:
            traceback.print_exc()
        print(f"hyaena: error: {error}", file=sys.stderr)
        return EXIT_ERROR
