"""``hyaena --help`` must not import torch, and answers in a fraction of a second."""

from __future__ import annotations

import json
import subprocess
import sys

from benchmarks.machine import ROOT
from benchmarks.registry import IncorrectError, Row, Session, Summary, Target, pairwise
from hyaena.bench.clock import Side, take_turns

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


def command_help(session: Session) -> list[Row]:
    """Modules of torch after ``--help``, and its wall time beside an empty interpreter's."""
    reported = json.loads(python(COUNT))
    if not all(command in reported["help"] for command in ("usage: hyaena", "generate", "train")):
        raise IncorrectError("`hyaena --help` does not show the commands")
    seconds = take_turns(
        {"ours": Side(lambda: python(HELP)), "empty": Side(lambda: python("pass"))}, rounds=2 if session.quick else 11
    )
    return [
        Row(
            what="torch modules that `hyaena --help` imports",
            unit="modules",
            ours=Summary.of([reported["torch"]]),
            target=Target("<=", 0),
        ),
        Row(
            what="wall time of `hyaena --help`",
            unit="s",
            ours=Summary.of(seconds["ours"].values),
            baseline_name="`python -c pass`",
            baseline=Summary.of(seconds["empty"].values),
            ratio=pairwise(seconds["ours"].values, seconds["empty"].values),
            ratio_name="ours / empty",
        ),
    ]
