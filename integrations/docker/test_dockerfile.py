"""The Dockerfile without an engine: hadolint reads it, and the commands of its RUN steps run in a scratch folder."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "Dockerfile"


class Step(NamedTuple):
    """One instruction of a stage."""

    stage: str
    word: str
    text: str


def steps() -> list[Step]:
    """The instructions in order, each on one line, without comments; stages without a name are called "final"."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.lstrip().startswith("#")]
    stage, found = "", []
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        if line.strip():
            word, _, text = line.strip().partition(" ")
            if word == "FROM":
                named = re.search(r" AS ([\w-]+)$", text)
                stage = named[1] if named else "final"
            found.append(Step(stage, word, text.strip()))
    return found


def of(stage: str, word: str) -> list[str]:
    return [step.text for step in steps() if (step.stage, step.word) == (stage, word)]


def test_hadolint_finds_nothing() -> None:
    done = subprocess.run(
        [Path(sys.executable).parent / "hadolint", DOCKERFILE], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


def test_hadolint_finds_what_is_wrong(tmp_path: Path) -> None:
    """The check above can fail."""
    (tmp_path / "Dockerfile").write_text("FROM python\nRUN cd /tmp && pip install torch\nUSER root\n")
    done = subprocess.run(
        [Path(sys.executable).parent / "hadolint", tmp_path / "Dockerfile"], capture_output=True, text=True, check=False
    )
    assert done.returncode != 0 and "DL3006" in done.stdout and "DL3013" in done.stdout


def test_stages_images_and_users() -> None:
    stages = [step for step in steps() if step.word == "FROM"]
    assert [step.stage for step in stages] == ["wheel", "environment", "runtime-cpu", "runtime-cuda", "final"]
    assert all(step.text.startswith("${PYTHON_IMAGE} ") for step in stages[:-1])
    assert stages[-1].text == "runtime-${VARIANT}"
    arguments = dict(text.partition("=")[::2] for text in of("", "ARG"))
    assert re.fullmatch(r"python:\d+\.\d+\.\d+-slim-\w+", arguments["PYTHON_IMAGE"])
    assert arguments["VARIANT"] == "cuda"
    assert of("final", "USER") == ["1000"]
    assert of("final", "ENTRYPOINT") == ['["hyaena"]']
    words = [step.word for step in steps() if step.stage == "final"]
    assert words.index("USER") > max(i for i, word in enumerate(words) if word in ("RUN", "COPY"))


def test_what_is_copied_is_sent_and_there() -> None:
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {
        name
        for step in steps()
        if step.word == "COPY" and not step.text.startswith("--from")
        for name in step.text.split()[:-1]
    }
    assert copied == sent
    assert all((ROOT / name).exists() for name in copied)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder in the place of the image's root, with a Python whose torch is there already."""
    for name in ("src", "build"):
        (tmp_path / name).mkdir()
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "usr"], check=True)
    (packages,) = (tmp_path / "usr").glob("lib/python*/site-packages")
    (packages / "parent.pth").write_text(parents())
    pip = tmp_path / "usr" / "bin" / "pip"
    pip.write_text(f'#!/bin/sh\nexec "{tmp_path}/usr/bin/python" -m pip "$@"\n')
    pip.chmod(0o755)
    return tmp_path


def parents() -> str:
    """The folders from which this environment has torch: those of a .pth file, which a .pth file cannot name."""
    return "".join(f"{path}\n" for path in sys.path if path.endswith("site-packages"))


def run(command: str, root: Path, folder: str, arguments: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run one step with the image's paths in the scratch folder."""
    for path in ("/opt/hyaena", "/wheels"):
        command = command.replace(path, f"{root}{path}")
    path = f"{root}/opt/hyaena/bin:{root}/usr/bin:{os.environ['PATH']}"
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    return subprocess.run(
        ["/bin/sh", "-ec", command],
        cwd=root / folder,
        env=env | arguments | {"PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )


def copy(texts: list[str], folder: Path) -> None:
    for text in texts:
        if not text.startswith("--from"):
            *names, _ = text.split()
            for name in names:
                if (ROOT / name).is_dir():
                    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
                    shutil.copytree(ROOT / name, folder / name, ignore=ignored)
                else:
                    shutil.copy(ROOT / name, folder)


def test_the_steps_build_an_environment_that_runs(root: Path) -> None:
    """All but the download of torch, which is in this environment, and the steps of Debian and its users."""
    arguments = {"VARIANT": "cuda", "TORCH_INDEX": "", "EXTRAS": "[parquet]"}
    for stage, folder in (("wheel", "src"), ("environment", "build")):
        copy(of(stage, "COPY"), root / folder)
        for command in of(stage, "RUN"):
            done = run(command, root, folder, arguments)
            assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
            if "venv" in command:  # as the image's Python, whose packages are those of this machine
                (packages,) = (root / "opt" / "hyaena").glob("lib/python*/site-packages")
                (packages / "parent.pth").write_text(parents())
    (packages,) = (root / "opt" / "hyaena").glob("lib/python*/site-packages")
    assert (packages / "hyaena" / "cub" / "config.json").exists()
    (check,) = of("final", "HEALTHCHECK")
    program, argument = re.findall(r'"([^"]+)"', check)
    done = run(f"{program} {argument} && {program} generate 'import ' --max-new-tokens 4", root, "build", arguments)
    assert done.returncode == 0, done.stderr


def test_the_cpu_variant_needs_an_index(tmp_path: Path) -> None:
    (command,) = (text for text in of("environment", "RUN") if "TORCH_INDEX" in text)
    done = run(command, tmp_path, ".", {"VARIANT": "cpu", "TORCH_INDEX": ""})
    assert done.returncode == 1 and "VARIANT=cpu needs TORCH_INDEX" in done.stderr
