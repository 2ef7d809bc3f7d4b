"""The wheel: built from a clone, installed into an environment that has its dependencies only, and run elsewhere."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.integration


def run(*command: str | Path, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built in a copy, so that nothing is left in the clone, by the setuptools of this environment."""
    folder = tmp_path_factory.mktemp("wheel")
    clone = folder / "clone"
    clone.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, clone)
    shutil.copytree(ROOT / "src", clone / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", folder, ".", cwd=clone)
    (built,) = folder.glob("*.whl")
    return built


def test_it_holds_the_presets_the_bundled_model_and_its_metadata(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        text = archive.read(metadata).decode()
    source = ROOT / "src" / "hyaena"
    files = [path for path in source.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert {f"hyaena/{path.relative_to(source).as_posix()}" for path in files} <= names
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"hyaena"}  # the package and its dist-info
    assert "Author: The hyaena authors" in text and "License-Expression: Apache-2.0" in text


def test_it_runs_from_an_environment_of_its_own(wheel: Path, tmp_path: Path) -> None:
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare", cwd=tmp_path)
    python = tmp_path / "bare" / "bin" / "python"
    (packages,) = (tmp_path / "bare").glob("lib/python*/site-packages")
    # torch and the other dependencies are those of this environment; its own hyaena, if it is editable, is not seen.
    paths = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (packages / "dependencies.pth").write_text("".join(f"{path}\n" for path in sorted(paths)))
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    where = run(python, "-c", "import hyaena; print(hyaena.__file__)", cwd=elsewhere)
    assert Path(where.strip()).is_relative_to(packages)
    hyaena = tmp_path / "bare" / "bin" / "hyaena"
    assert "7,912,224" in run(hyaena, "info", "cub", cwd=elsewhere)
    assert "7,646,023,680" in run(hyaena, "info", "sh-7b", cwd=elsewhere)
    text = run(hyaena, "generate", "import ", "--max-new-tokens", "8", cwd=elsewhere)
    assert len(text.strip()) > 0
