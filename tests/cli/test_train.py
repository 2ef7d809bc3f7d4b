from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from hyaena.cli import main
from hyaena.signals import ENDING

SRC = Path(__file__).parents[2] / "src"
COMMANDS = {"train": "hyaena.cli.train"}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "text").mkdir()
    for number in range(4):
        (tmp_path / "text" / f"{number}.py").write_text(f"def f{number}(x):\n    return x + {number}\n" * 8)
    values: dict[str, Any] = {
        "output": str(tmp_path / "run"),
        "model": {
            "vocab_size": 259,
            "hidden_size": 8,
            "intermediate_size": 16,
            "layer_types": ["hyena", "attention"],
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "state_size": 2,
            "tie_embeddings": True,
            "tokenizer": "bytes",
        },
        "data": {"train": str(tmp_path / "text"), "heldout": str(tmp_path / "text" / "0.py"), "pattern": "*.py"},
        "optim": {"lr": 1e-2, "warmup_steps": 1},
        "steps": 4,
        "window": 32,
        "batch_size": 2,
    }
    path = tmp_path / "run.yml"
    path.write_text(yaml.safe_dump(values))
    return path


def train(*arguments: str | Path) -> int:
    return main(["train", *map(str, arguments), "--device", "cpu", "--quiet"], commands=COMMANDS)


def test_trains_and_says_where_the_model_is(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(config, "--set", "steps=2") == 0
    out = capsys.readouterr().out
    assert (
        "finished 2 steps" in out and "bits per byte" in out and "before the first step" in out and "run/final" in out
    )
    folder = config.parent / "run"
    assert {path.name for path in folder.iterdir()} == {
        *("config.yml", "metrics.jsonl", "loss.png", "last.pt", "best", "final")
    }
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [(row["kind"], row["step"]) for row in rows] == [("heldout", 0), ("train", 2), ("heldout", 2)]
    assert {"tokens", "loss", "losses", "bits_per_byte", "lr", "grad_norm", "tokens_per_second"} <= set(rows[1])


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_leaves_a_checkpoint_to_resume_from(
    config: Path, number: int, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from hyaena.train.loop import Trainer

    original = Trainer.update

    def interrupted(self: Trainer) -> Any:
        if self.step == 1:
            signal.raise_signal(number)
            if number == signal.SIGHUP:
                signal.raise_signal(number)  # the shell's, behind the kernel's
        return original(self)

    before = {one: signal.getsignal(one) for one in ENDING}
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "update", interrupted)
        assert train(config) == status
    if number == signal.SIGHUP:  # ignored until the process ends
        signal.signal(number, before[number])
    assert {one: signal.getsignal(one) for one in ENDING} == before
    assert "stopped at step 2 of 4; go on with --resume" in capsys.readouterr().err
    assert torch.load(config.parent / "run" / "last.pt", weights_only=True)["step"] == 2
    assert train(config, "--resume") == 0


def test_sigterm_before_the_first_step_leaves_nothing(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hyaena.train import loop

    def interrupted(*_: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(loop, "initial_model", interrupted)
    with pytest.raises(SystemExit) as caught:
        train(config)
    assert caught.value.code == 143 and not (config.parent / "run").exists()


def test_the_log_has_lines_and_no_bar(config: Path) -> None:
    """In a process of its own, whose standard error is a file: what a batch system keeps."""
    command = [sys.executable, "-m", "hyaena", "train", str(config), "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(SRC)})
    assert done.returncode == 0
    assert "\r" not in done.stderr and "step/s" not in done.stderr
    lines = done.stderr.splitlines()
    assert lines[0].startswith("3,528 parameters; ") and lines[-1].startswith("step 4: held-out ")
    assert any("Hyena operator" in line and "plain torch" in line for line in lines)


def test_closed_streams_do_not_lose_a_run(config: Path) -> None:
    command = f"exec {sys.executable} -m hyaena train {config} --device cpu --set steps=1 <&- >&- 2>&-"
    subprocess.run(["sh", "-c", command], env={**os.environ, "PYTHONPATH": str(SRC)})
    assert torch.load(config.parent / "run" / "last.pt", weights_only=True)["step"] == 1
    assert (config.parent / "run" / "final" / "model.safetensors").is_file()


def test_a_reader_that_leaves_does_not_stop_a_run(config: Path) -> None:
    command = [sys.executable, "-m", "hyaena", "train", str(config), "--device", "cpu"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(SRC)})
    assert process.stderr is not None
    process.stderr.close()
    assert process.wait() == 0
    assert torch.load(config.parent / "run" / "last.pt", weights_only=True)["step"] == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent.yml"], "absent.yml"),
        (["{config}", "--set", "optim.lrr=1"], "unknown key optim.lrr: did you mean optim.lr?"),
        (["{config}", "--set", "model.tokenizer=words"], "tokenizer is 'words'"),
        (["{config}", "--set", "data.train=absent.txt"], "cannot read absent.txt"),
        (["{config}", "--resume"], "nothing to resume"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(
    config: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(*(argument.format(config=config) for argument in arguments)) == 2
    err = capsys.readouterr().err
    assert err.startswith("hyaena: error: ") and err.count("\n") == 1 and message in err
    assert not (config.parent / "run").exists()


@pytest.mark.parametrize("seconds", ["0", "-1", "soon"])
def test_a_time_limit_is_positive(config: Path, seconds: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        train(config, "--max-seconds", seconds)
    assert caught.value.code == 2
    assert "--max-seconds" in capsys.readouterr().err


def test_wrong_configurations_are_found_without_torch(config: Path) -> None:
    code = (
        "import sys; from hyaena.cli import main\n"
        f"assert main(['train', {str(config)!r}, '--set', 'stepz=1'], commands={COMMANDS!r}) == 2\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": str(SRC)}, stderr=subprocess.DEVNULL)
