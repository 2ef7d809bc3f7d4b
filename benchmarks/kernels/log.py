"""The figures of a run of ``benchmarks.kernels``: printed, and written to a JSON file after each."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from hyaena.bench.clock import Samples
from hyaena.bench.machine import device_name


class Log:
    """Prints figures and, where ``--output`` names a folder, writes all of them to ``NAME.json`` there."""

    def __init__(self, options: argparse.Namespace, name: str, device: torch.device) -> None:
        self.path: Path | None = options.output and options.output / f"{name}.json"
        self.device = device_name(device)
        self.known: dict[str, Any] = {"torch": torch.__version__, "figures": []}
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)

    @staticmethod
    def options(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        """Add the options that these benchmarks share."""
        parser.add_argument("--output", type=Path, metavar="FOLDER", help="write every figure there, as JSON")
        parser.add_argument("--quick", action="store_true", help="tiny sizes on any device, to see that it works")
        return parser

    def note(self, **facts: Any) -> None:
        """Facts of the whole run."""
        self.known |= facts
        print("  " + ", ".join(f"{name} {value}" for name, value in facts.items()), flush=True)
        self._write()

    def figure(self, seconds: Samples, bound: float, **what: Any) -> None:
        """Seconds of a call beside the shortest time that it can take."""
        self.known["figures"].append({**what, "seconds": list(seconds.values), "bound": bound})
        label = " ".join(f"{value:>9,}" if isinstance(value, int) else f"{value!s:<34}" for value in what.values())
        ms = seconds.median * 1e3
        print(f"  {label} {ms:10.4f} ms ± {seconds.spread / 2:.1%}  {seconds.median / bound:7.2f} x bound", flush=True)
        self._write()

    def add(self, **what: Any) -> None:
        """A figure of another kind, as it is."""
        self.known["figures"].append(what)
        self._write()

    def _write(self) -> None:
        if self.path is not None:
            self.path.write_text(json.dumps(self.known, indent=1), encoding="utf-8")
