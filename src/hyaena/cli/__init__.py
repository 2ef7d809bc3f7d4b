"""The ``hyaena`` command: finds the subcommand, runs it, and turns errors into one line and an exit status.

Each command is a module of this package with

- ``HELP``: one line for ``hyaena --help``;
- ``EXAMPLES``: command lines for its own ``--help``;
- ``add_arguments(parser)``: its options;
- ``run(args) -> int``: does the work and returns the exit status.

The modules import torch and everything heavy inside ``run``, so that help and mistakes answer immediately.

Exit status: 0 done, 2 for an error that the message explains, 129 the terminal was closed, 130 interrupted, 141 the
reader of the output left, 143 terminated.
"""

from __future__ import annotations

import argparse
import errno
import sys
import traceback
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any, NoReturn

from hyaena import __version__
from hyaena.cli.process import signal_behind, signals_end_the_process, usable_streams
from hyaena.errors import SCREEN, HyaenaError, OutputError, nearest, printable

COMMANDS: Mapping[str, str] = {
    "generate": "hyaena.cli.generate",
    "chat": "hyaena.cli.chat",
    "serve": "hyaena.cli.serve",
    "convert": "hyaena.cli.convert",
    "quantize": "hyaena.cli.quantize",
    "info": "hyaena.cli.info",
    "score": "hyaena.cli.score",
    "embed": "hyaena.cli.embed",
    "variants": "hyaena.cli.variants",
    "train": "hyaena.cli.train",
    "eval": "hyaena.cli.eval",
    "bench": "hyaena.cli.bench",
}

EXIT_ERROR = 2
EXIT_INTERRUPTED = 128 + 2  # as a shell reports SIGINT
EXIT_BROKEN_PIPE = 128 + 13  # as a shell reports SIGPIPE


class Parser(argparse.ArgumentParser):
    """An argument parser with one line for every mistake, and without abbreviations of options.

    ``--prompt`` would otherwise be read as ``--prompt-file``.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Parse, and name the nearest option for one that does not exist."""
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            options = [option for action in self._actions for option in action.option_strings]
            known = [option[2:] for option in options if option.startswith("--")]  # all of them begin alike
            near = (nearest(word[2:].split("=")[0], known) for word in unknown if word.startswith("--"))
            near = next((option for option in near if option is not None), None)
            self.error(f"unrecognized arguments: {' '.join(unknown)}" + (f": did you mean --{near}?" if near else ""))
        return namespace, unknown

    def error(self, message: str) -> NoReturn:
        """End with status 2 and one line."""
        self.exit(EXIT_ERROR, f"hyaena: error: {printable(message, limit=500)} (see '{self.prog} --help')\n")

    def _print_message(self, message: str, file: Any = None) -> None:
        # argparse's own ignores errors: help that cannot be written would be a success.
        if message:
            (file or sys.stderr).write(message)


class _HelpFormatter(argparse.HelpFormatter):
    """Leaves the lines of examples as they are, so that they can be copied."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if "\n" in text else super()._fill_text(text, width, indent)


def build_parser(commands: Mapping[str, str] = COMMANDS) -> argparse.ArgumentParser:
    """The parser of the whole command line.

    Args:
        commands: command names and the modules that hold them, in the order of ``--help``.
    """
    parser = Parser(prog="hyaena", description="Run, convert, inspect and train StripedHyena models.")
    parser.add_argument("--version", action="version", version=f"hyaena {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, module_name in commands.items():
        module = import_module(module_name)
        examples = "\n  ".join(["examples:", *module.EXAMPLES])
        subparser = subparsers.add_parser(
            name, help=module.HELP, description=module.HELP, epilog=examples, formatter_class=_HelpFormatter
        )
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

    Raises:
        SystemExit: as argparse does, after help or a mistake in the arguments.
    """
    with signals_end_the_process(), usable_streams():
        try:
            return _run(argv, commands)
        except KeyboardInterrupt:
            print("hyaena: interrupted", file=sys.stderr)
            return EXIT_INTERRUPTED


def _run(argv: Sequence[str] | None, commands: Mapping[str, str]) -> int:
    debug = False
    try:
        try:
            args = build_parser(commands).parse_args(argv)
            debug = args.debug
            status = args.run(args)
        except SystemExit:
            _flush_output()
            raise
        except Exception as error:
            if (end := signal_behind(error)) is not None:
                raise end from None
            raise
        _flush_output()
        return status
    except BrokenPipeError:
        return EXIT_BROKEN_PIPE  # `hyaena … | head` closed the output: not an error of ours
    except (HyaenaError, OSError, MemoryError) as error:
        if debug:
            traceback.print_exc()
        message = _described(error)
        print(f"hyaena: error: {printable(message, limit=SCREEN)}", file=sys.stderr)
        return EXIT_ERROR


def _described(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:  # a path that nobody looked at before
        return f"{error.filename}: {error.strerror}; check its name and permissions"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):  # of a print, since files have names
        return f"cannot write to standard output: {error.strerror}; free some space or choose another place"
    return str(error) or "out of memory"


def _flush_output() -> None:
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(
            f"cannot write to standard output: {error.strerror or error}; choose another place"
        ) from error
