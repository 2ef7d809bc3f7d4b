"""The distribution."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from integrations.evo2.cases import ROOT


def test_the_wheel_holds_one_package_and_meets_the_requirement(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    ignored = shutil.ignore_patterns("*.egg-info", "build", "__pycache__")
    shutil.copytree(ROOT / "compat" / "vortex", clone, ignore=ignored)
    command = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", tmp_path, clone]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.startswith("vtx-1.1.0+hyaena-")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    source = ROOT / "compat" / "vortex" / "src"
    files = {file for file in source.rglob("*") if file.suffix in (".py", ".typed")}
    assert names == {file.relative_to(source).as_posix() for file in files}
