"""``hyaena train``: train or fine-tune a model as a YAML file says."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from types import FrameType

from hyaena.errors import counted
from hyaena.signals import handled

HELP = "train or fine-tune a model from a YAML file"
EXAMPLES = (
    "hyaena train configs/train/finetune.yml --set init_from=cub --set data.train=rows.jsonl",
    "hyaena train configs/train/cub.yml --resume",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("config", metavar="CONFIG.yml", help="the run: model, data, optimizer (see configs/train/)")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue from the last checkpoint in the output folder; steps may be changed",
    )
    parser.add_argument(
        "--max-seconds", type=_seconds, metavar="S", help="stop after S seconds with a checkpoint to resume from"
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, … (a GPU if there is one)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="replace one entry of the YAML file, for example --set optim.lr=1e-3 (repeatable)",
    )
    parser.add_argument(
        "--quiet", action="store_true", help="no progress bar (there is none where standard error is no terminal)"
    )


def run(args: argparse.Namespace) -> int:
    """Train; the first Ctrl-C, SIGTERM or SIGHUP finishes the step and saves; the exit status is 128 and its number."""
    from hyaena.train.config import TrainConfig

    config = TrainConfig.from_file(args.config, args.overrides)
    from hyaena.train.loop import open_run  # imports torch: after the mistakes that need none

    with (
        _log_to_stderr(),
        open_run(config, resume=args.resume, device=args.device) as trainer,
        _DeferredSignal() as deferred,
    ):
        result = trainer.advance(
            max_seconds=args.max_seconds, progress=not args.quiet, stop=lambda: deferred.number is not None
        )
    if not result.finished:
        _tell(f"stopped at step {result.step} of {config.steps}; go on with --resume")
        return 0 if deferred.number is None else 128 + deferred.number
    score = ""
    if result.bits_per_byte is not None:
        score = f", {result.bits_per_byte:.4f} bits per byte on held-out text"
        if result.initial_bits_per_byte is not None:
            score += f" ({result.initial_bits_per_byte:.4f} before the first step)"
    print(f"finished {counted(result.step, 'step')}{score}: {config.output}/final")
    return 0


class _DeferredSignal:
    """Defers the first signal that ends the process: ``number`` is then its number. The second one acts immediately."""

    def __init__(self) -> None:
        self.number: int | None = None

    def __enter__(self) -> _DeferredSignal:
        self._handling = contextlib.ExitStack()
        self._handling.enter_context(handled(self._note))
        return self

    def __exit__(self, *_: object) -> None:
        self._handling.close()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self.__exit__()
        if sys.stderr is not None:
            # Not print: the signal may have come in the middle of another one.
            with contextlib.suppress(OSError, ValueError):
                os.write(sys.stderr.fileno(), b"\nfinishing this step and saving; once more to stop immediately\n")


@contextlib.contextmanager
def _log_to_stderr() -> Iterator[None]:
    """Write the package's log to the standard error, above a progress bar where there is one."""

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            _tell(record.getMessage())

    logger = logging.getLogger("hyaena")
    handler, before = Lines(), (logger.level, logger.propagate)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.level, logger.propagate = before


def _tell(line: str) -> None:
    """Write a line to the standard error; a stream that is closed is no reason to lose a run."""
    from tqdm import tqdm

    if sys.stderr is not None:
        with contextlib.suppress(OSError, ValueError):
            tqdm.write(line, file=sys.stderr)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be a positive number of seconds, not {text!r}")
    return value
