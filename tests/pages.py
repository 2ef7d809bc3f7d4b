"""The code blocks of pages, run in this process as a reader would run them in a shell.

Blocks marked ``bash`` and ``python`` run; ``console`` marks what needs a download, a GPU or minutes. Shell lines are of
one form, ``[echo TEXT |] PROGRAM ARGUMENT…``, and a page that uses another form fails: each process would import torch
again, which takes most of the time of such a test. ``hyaena serve … &`` runs until the end of the page, on a free port,
for which the port in the page stands, 8000 or that of ``--port``.
"""

from __future__ import annotations

import contextlib
import io
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from benchmarks.serve.process import ServerProcess, serving

from hyaena.cli import main

ROOT = Path(__file__).parent.parent
PAGES = sorted(path for path in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[tuple[str, str]]:
    """The fenced blocks of a page: language and text."""
    return _BLOCK.findall(page.read_text(encoding="utf-8"))


def run(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the blocks of a page from top to bottom, in the working directory. Each Python block is its own program."""
    with contextlib.ExitStack() as stack:
        servers: dict[str, ServerProcess] = {}
        for number, (kind, text) in enumerate(blocks(page), start=1):
            if kind == "bash":
                for line in text.replace("\\\n", " ").splitlines():
                    if line.startswith("hyaena serve") and line.endswith("&"):
                        options = shlex.split(line[:-1])[2:]
                        port = options.pop(options.index("--port") + 1) if "--port" in options else "8000"
                        options = [option for option in options if option != "--port"]
                        servers[port] = stack.enter_context(serving(*options))
                    else:
                        _run_line(_with_ports(line, servers), monkeypatch)
            elif kind == "python":
                code = compile(_with_ports(text, servers), f"{page.name}, block {number}", "exec")
                exec(code, {"__name__": "__main__"})
        for server in servers.values():
            assert server.end() == 0


def _with_ports(text: str, servers: Mapping[str, ServerProcess]) -> str:
    return re.sub(r":(\d+)\b", lambda found: f":{servers[found[1]].port}" if found[1] in servers else found[0], text)


def _run_line(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(line)
    given = ""
    if words[0] == "echo" and words[2] == "|":
        given, words = words[1] + "\n", words[3:]
    program, *arguments = words
    assert not {"|", ">", "<", "&&", ";"} & set(words), f"{line}: a form of line that this test cannot run"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given.encode())))
    if program == "hyaena":
        assert main(arguments) == 0, line
    elif program == "curl":
        done = subprocess.run(["curl", "--silent", "--noproxy", "*", *arguments], check=False, capture_output=True)
        assert done.returncode == 0, line
    elif program == "python":
        monkeypatch.setattr(sys, "argv", arguments)
        try:
            runpy.run_path(arguments[0], run_name="__main__")
        except SystemExit as end:
            assert not end.code, line
    else:
        pytest.fail(f"{line}: a program that this test cannot run")


def clone(folder: Path) -> None:
    """Make a folder that looks like a bare clone: a link to everything at the top that git tracks, and nothing else."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git repository, so what a clone holds is unknown")
    for name in {path.split("/")[0] for path in listed.stdout.decode().split("\0") if path}:
        if (ROOT / name).exists():
            (folder / name).symlink_to(ROOT / name)
