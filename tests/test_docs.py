"""The programs and commands in ``docs/`` run, in an empty folder; the list of public names is complete."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
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


def test_tables_are_whole() -> None:
    """A row that no header stands above is shown as plain text."""
    for page in [*pages.PAGES, *(pages.ROOT / "docs" / "log").glob("*.md")]:
        text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
            header, line, *rows = table.splitlines()
            assert re.fullmatch(r"\|[ |:-]+\|", line), f"{page.name}: no header above {header[:60]}"
            cells = {len(re.findall(r"(?<!\\)\|", row)) for row in (header, line, *rows)}
            assert len(cells) == 1, f"{page.name}: rows of unequal length below {header[:60]}"
        assert not re.search(r"^[^|\n].*\n\||^\|.*\n[^|\n]", text, re.MULTILINE), f"{page.name}: text beside a table"


def test_the_table_of_methods_is_that_of_the_code() -> None:
    text = (pages.ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = re.search(r"^\| method \|.*\n.*\n((?:\|.*\n)+)", text, re.MULTILINE)
    assert table is not None
    rows = [[cell.strip() for cell in row.strip("|").split(" | ")] for row in table[1].splitlines()]
    assert [row[0].strip("` ") for row in rows] == list(ops.METHODS)
    for (_, _, cost, memory, documents), (name, method) in zip(rows, ops.METHODS.items(), strict=True):
        assert cost.startswith(method.cost) and memory == method.memory, name
        assert documents == ("yes" if method.reset else "document by document"), name


def test_every_module_has_a_place() -> None:
    """In the layout of ``docs/architecture.md``, and every layer in the table of CONTRIBUTING."""
    layout = (pages.ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").split("## The layout")[1]
    layout, order = layout.split("Imports go one way")
    modules = {path.name for path in (pages.ROOT / "src" / "hyaena").iterdir() if not path.name.startswith("_")}
    for name in modules - {"py.typed"}:
        assert name in layout.replace("/", " ").split(), f"docs/architecture.md: {name}"
    contracts = tomllib.loads((pages.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    layers = [layer.split(" | ") for layer in contracts["contracts"][0]["layers"]][1:]
    listed = " ".join(re.findall(r"^    +(.*)", order, re.MULTILINE)).split(" > ")
    assert [row.split(", ") for row in listed] == layers
    table = re.findall(r"^\| (`.*?`) \|", (pages.ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert [row for row in (re.findall(r"`(\w+)`", row) for row in table) if row in layers] == layers


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
