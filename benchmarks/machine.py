"""When and how a benchmark was run; the machine itself is described by ``hyaena.bench.machine``."""

from __future__ import annotations

import datetime
import subprocess
from pathlib import Path

import torch

from hyaena.bench import machine

ROOT = Path(__file__).resolve().parent.parent


def occasion(command: str, commit: str | None = None) -> dict[str, str]:
    """The date, the command, the code, the threads, and how busy the machine was before."""
    now = datetime.datetime.now(datetime.UTC)
    load = machine.load()
    return {
        "date": now.strftime("%Y-%m-%d %H:%M UTC"),
        "command": command,
        "commit": commit or _commit(),
        "threads": str(torch.get_num_threads()),
        "load before": "unknown" if load is None else f"{load:.2f}",
    }


def _commit() -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # the results themselves do not make the code another one
        changed = git("status", "--porcelain", "--", ".", ":!benchmarks/results")
        return git("rev-parse", "--short", "HEAD") + (" with changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
