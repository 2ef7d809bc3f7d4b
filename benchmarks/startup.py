"""``hyaena --help`` answers at once: it must not import torch."""

from __future__ import annotations

import json
import subprocess
import sys

from benchmarks.machine import ROOT
from benchmarks.measure import Side, take_turns
from benchmarks.registry import Bar, IncorrectError, Row, Spread

HELP = "import sys; from hyaena.cli import main; sys.argv[0] = 'hyaena'; main(['--help'])"
COUNT = """
import contextlib, io, json, sys
from hyaena.cli import main
text = io.StringIO()
with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
    main(["--help"])
heavy = [name for name in sys.modules if name.partition(".")[0] == "torch"]
print(json.dumps({"help": text.getvalue(), "torch": len(heavy)}))
"""


def python(code: str) -> str:
    """The output of a fresh interpreter."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"python -c failed: {done.stderr.strip().splitlines()[-1:]}")
    return done.stdout


def command_help(quick: bool) -> list[Row]:
    """Modules of torch after ``--help``, and its wall time beside an empty interpreter's."""
    told = json.loads(python(COUNT))
    if not all(command in told["help"] for command in ("usage: hyaena", "generate", "train")):
        raise IncorrectError("`hyaena --help` does not show the commands")
    seconds = take_turns(
        {"ours": Side(lambda: python(HELP)), "empty": Side(lambda: python("pass"))}, rounds=2 if quick else 11
    )
    return [
        Row(
            what="torch modules that `hyaena --help` imports",
            unit="modules",
            ours=Spread.of([told["torch"]]),
            bar=Bar("<=", 0),
        ),
        Row(
            what="wall time of `hyaena --help`",
            unit="s",
            ours=Spread.of(seconds["ours"]),
            peer_name="`python -c pass`",
            peer=Spread.of(seconds["empty"]),
            ratio=Spread.of(a / b for a, b in zip(seconds["ours"], seconds["empty"], strict=True)),
            ratio_name="ours / empty",
        ),
    ]
