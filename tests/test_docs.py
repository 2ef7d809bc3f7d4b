"""The programs and commands in ``docs/`` run, in an empty folder; the list of public names is complete."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import hyaena.errors
import pages
from hyaena import evals, hf, ops

RUN_ELSEWHERE = {
    "evaluation.md": "integrations/eval",
    "evo.md": "integrations/evo",
    "vortex.md": "integrations/evo2",
    "serving.md": "integrations/serve",
    "vllm.md": "integrations/vllm",
}
"""Pages that need packages of an environment of their own, and the tests that run them there."""
RUNNABLE = [
    page for page in pages.PAGES if page.name != "README.md" and page.name not in RUN_ELSEWHERE and pages.blocks(page)
]


def test_there_are_pages_with_programs() -> None:
    assert {"api.md", "extending.md"} <= {page.name for page in RUNNABLE}


def test_pages_that_run_elsewhere_do_so() -> None:
    for name, folder in RUN_ELSEWHERE.items():
        assert any(name in path.read_text(encoding="utf-8") for path in (pages.ROOT / folder).glob("test_*.py"))


@pytest.mark.parametrize("page", RUNNABLE, ids=lambda page: page.name)
def test_every_block_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert {kind for kind, _ in pages.blocks(page)} <= {"python", "bash", "console"}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pages.run(page, monkeypatch)


def test_the_list_of_public_names_is_complete_and_true() -> None:
    """Every name of the package's surface stands in ``docs/api.md``, and every name there exists."""
    text = (pages.ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    listed: dict[str, set[str]] = {}
    for heading, table in re.findall(
        r"^## .*?: (.*)\n\n(?:[^#|\n].*\n+)*\| name.*\n((?:\|.*\n?)+)", text, re.MULTILINE
    ):
        modules = re.findall(r"`(hyaena[\w.]*)`", heading)
        names = {name for row in table.splitlines() for name in re.findall(r"`([\w.]+)[^`]*`", row.split(" | ")[0])}
        for name in names:
            holder = f"hyaena.{name.rpartition('.')[0]}" if "." in name else modules[0]
            assert hasattr(import_module(holder), name.rpartition(".")[2]), f"docs/api.md: {name} is not in {holder}"
        listed[modules[0]] = names
    assert listed["hyaena"] == set(hyaena.__all__)
    assert listed["hyaena.ops"] == set(ops.__all__)
    assert listed["hyaena.evals"] == set(evals.__all__)
    assert listed["hyaena.hf"] == set(hf.__all__)
    errors = {name for name, value in vars(hyaena.errors).items() if isinstance(value, type)}
    assert listed["hyaena.errors"] == {name for name in errors if issubclass(getattr(hyaena.errors, name), Exception)}


@pytest.mark.integration
def test_the_reference_is_generated_from_the_docstrings(tmp_path: Path) -> None:
    pytest.importorskip("pdoc")
    script = pages.ROOT / "scripts" / "api_reference.py"
    done = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    written = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.html")}
    assert {"index.html", "hyaena.html", "hyaena/ops.html", "hyaena/train/loop.html"} <= written
    package, operators = ((tmp_path / name).read_text() for name in ("hyaena.html", "hyaena/ops.html"))
    for name in set(hyaena.__all__) - {"ops", "__version__"}:
        assert f'id="{name}"' in package, name
    for name in ops.__all__:
        assert f'id="{name}"' in operators, name
