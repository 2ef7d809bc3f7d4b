"""``hyaena train``: train or fine-tune a model as a YAML file says."""

from __future__ import annotations

import argparse
import signal
import sys
from types import FrameType

HELP = "train or fine-tune a model from a YAML file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("config", metavar="CONFIG.yml", help="the run: model, data, optimizer (see configs/train/)")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in the output folder")
    parser.add_argument(
        "--max-seconds", type=_seconds, metavar="S", help="stop after S seconds with a checkpoint to resume from"
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 … (default: a GPU if there is one)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="replace one entry of the YAML file, for example --set optim.lr=1e-3 (repeatable)",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    """Train; Ctrl-C finishes the step, writes a checkpoint and exits with 130."""
    from hyaena.train.config import TrainConfig

    config = TrainConfig.from_file(args.config, args.overrides)
    from hyaena.train.loop import train  # imports torch: after the mistakes that need none

    with _Interrupt() as interrupted:
        result = train(
            config,
            resume=args.resume,
            max_seconds=args.max_seconds,
            device=args.device,
            progress=not args.quiet,
            stop=lambda: interrupted.happened,
        )
    if not result.finished:
        print(f"stopped at step {result.step} of {config.steps}; go on with --resume", file=sys.stderr)
        return 130 if interrupted.happened else 0
    score = "" if result.bits_per_byte is None else f", {result.bits_per_byte:.4f} bits per byte on held-out text"
    print(f"finished {result.step} steps{score}: {config.output}/final")
    return 0


class _Interrupt:
    """Within it, the first Ctrl-C or SIGTERM is remembered only; a second one acts as ever."""

    def __init__(self) -> None:
        self.happened = False

    def __enter__(self) -> _Interrupt:
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.happened = True
        self.__exit__()
        print("\nfinishing this step and writing a checkpoint; once more to stop at once", file=sys.stderr)


def _seconds(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError("must be a positive number of seconds")
    return value
