"""The README's commands and programs, run from top to bottom as a reader would.

Blocks marked ``bash`` and ``python`` run, in order, in one folder that looks like a clone; blocks marked ``console``
need the network or an hour and do not.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def test_every_block_runs(tmp_path: Path) -> None:
    blocks = BLOCK.findall((ROOT / "README.md").read_text())
    assert [kind for kind, _ in blocks].count("python") >= 3 and [kind for kind, _ in blocks].count("bash") >= 3
    for name in ("configs", "scripts"):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copy(ROOT / "generate.py", tmp_path)
    (tmp_path / "setup.cfg").write_text("[metadata]\nname = striped\n")
    programs = tmp_path / "bin"  # the reader's `hyaena` and `python` are those of this environment
    programs.mkdir()
    for name, command in (("hyaena", f"{sys.executable} -m hyaena"), ("python", sys.executable)):
        (programs / name).write_text(f'#!/bin/sh\nexec {command} "$@"\n')
        (programs / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT / "src"),
        "HF_HUB_OFFLINE": "1",
    }
    for kind, text in blocks:
        command = ["bash", "-euo", "pipefail", "-c", text] if kind == "bash" else [sys.executable, "-c", text]
        run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
        assert run.returncode == 0, f"{text}\n{run.stdout}\n{run.stderr}"


def test_every_link_leads_somewhere() -> None:
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
