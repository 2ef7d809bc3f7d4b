from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch

from hyaena import hub
from hyaena.checkpoints import load_model
from hyaena.errors import CheckpointError, ConfigError, InputError, NonFiniteError, OutputError
from hyaena.model import LongFilter
from hyaena.train import loop
from hyaena.train.config import TrainConfig
from hyaena.train.data import read_documents, tokenize
from hyaena.train.evaluate import evaluate
from hyaena.train.loop import Run, train

MODEL: dict[str, Any] = {
    "name": "toy",
    "vocab_size": 264,
    "hidden_size": 16,
    "intermediate_size": 32,
    "layer_types": ["hyena", "attention", "hyena"],
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "state_size": 3,
    "tie_embeddings": True,
    "tokenizer": "bytes",
}


@pytest.fixture
def make(tmp_path: Path) -> Any:
    """Makes configurations of toy runs in a folder with a little text."""
    words = random.Random(1).choices(["the", "hyaena", "laughs", "at", "night", "and", "sleeps\n"], k=600)
    (tmp_path / "train.txt").write_text(" ".join(words[:500]))
    (tmp_path / "more.jsonl").write_text(
        "".join(json.dumps({"text": " ".join(words[i : i + 9])}) + "\n" for i in range(90))
    )
    (tmp_path / "heldout.txt").write_text(" ".join(words[500:]))

    def make(name: str = "run", **changes: Any) -> TrainConfig:
        plain: dict[str, Any] = {
            "output": str(tmp_path / name),
            "model": MODEL,
            "data": {
                "train": [str(tmp_path / "train.txt"), str(tmp_path / "more.jsonl")],
                "heldout": [str(tmp_path / "heldout.txt")],
            },
            "optim": {"lr": 1e-2, "warmup_steps": 2},
            "steps": 8,
            "window": 48,
            "batch_size": 4,
            "log_every": 2,
            "eval_every": 4,
        }
        return TrainConfig.from_dict(plain | changes)

    return make


def run(config: TrainConfig, **options: Any) -> loop.Result:
    return train(config, device="cpu", progress=False, **options)


def stop_after(steps: int) -> Any:
    left = iter([False] * (steps - 1) + [True])
    return lambda: next(left)


def assert_equal(a: Any, b: Any, where: str = "state") -> None:
    """Bit for bit, through nested dictionaries and lists."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for index, pair in enumerate(zip(a, b, strict=True)):
            assert_equal(*pair, f"{where}[{index}]")
    else:
        assert a == b, where


def metrics(config: TrainConfig) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (Path(config.output) / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row.pop("elapsed")
        row.pop("tokens_per_second", None)
    return rows


@pytest.mark.parametrize(
    "changes",
    [{}, {"micro_batch_size": 2, "activation_checkpointing": True, "optim": {"lr": 1e-2, "filter_lr_ratio": 0.5}}],
)
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(make: Any, changes: dict[str, Any]) -> None:
    whole, parts = make("whole", **changes), make("parts", **changes)
    assert run(whole).finished
    assert not run(parts, stop=stop_after(3)).finished
    torch.randn(7)  # whatever else the process does with random numbers
    assert not run(parts, resume=True, max_seconds=1e-9).finished  # one step at least
    assert run(parts, resume=True).finished
    states = [torch.load(Path(config.output) / "last.pt", weights_only=True) for config in (whole, parts)]
    for state in states:
        del state["elapsed"]
    assert states[0]["step"] == 8
    assert_equal(*states)
    for folder in ("best", "final"):
        first, second = (load_model(Path(config.output) / folder).state_dict() for config in (whole, parts))
        assert_equal(first, second, folder)
    held = [[row for row in metrics(config) if row["kind"] == "heldout"] for config in (whole, parts)]
    assert held[0] == held[1] and [row["step"] for row in held[0]] == [4, 8]


def test_what_was_logged_after_the_checkpoint_is_logged_once(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parts = make("whole", save_every=2, log_every=1), make("parts", save_every=2, log_every=1)
    run(whole)

    def killed(self: Run, *_: Any) -> Any:
        if self.step == 5:
            raise KeyboardInterrupt
        return original(self)

    original = Run.update
    monkeypatch.setattr(Run, "update", killed)
    with pytest.raises(KeyboardInterrupt):
        run(parts)
    monkeypatch.setattr(Run, "update", original)
    assert metrics(parts)[-1]["step"] == 5
    assert run(parts, resume=True).finished
    assert metrics(parts) == metrics(whole)


def test_accumulation_equals_one_large_batch(make: Any) -> None:
    runs = [Run(make(str(micro), micro_batch_size=micro), device="cpu") for micro in (4, 1)]
    (loss, norm), (parts_loss, parts_norm) = [one.update() for one in runs]
    # The same sums in another order, float32.
    torch.testing.assert_close(parts_loss, loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(parts_norm, norm, rtol=1e-4, atol=0)


def test_activation_checkpointing_changes_nothing(make: Any) -> None:
    runs = [Run(make(str(on), activation_checkpointing=on), device="cpu") for on in (False, True)]
    for one in runs:
        one.update()
    assert_equal(*(one.model.state_dict() for one in runs))


def test_the_loss_falls_and_the_export_is_the_model(make: Any, tmp_path: Path) -> None:
    config = make(steps=60, eval_every=30, export_dtype="bfloat16")
    result = run(config)
    rows = metrics(config)
    assert rows[0]["bits_per_byte"] > 7 and result.bits_per_byte is not None
    assert result.bits_per_byte < 3.5
    assert result.best_bits_per_byte == min(
        row["bits_per_byte"] for row in rows if row["kind"] == "heldout"
    ) or math.isclose(
        result.best_bits_per_byte or 0,
        min(row["bits_per_byte"] for row in rows if row["kind"] == "heldout"),
        abs_tol=1e-6,
    )
    folder = Path(config.output)
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert TrainConfig.from_file(folder / "config.yml") == config
    model = load_model(folder / "final")
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    assert {dtype for name, dtype in dtypes.items() if name.endswith(("poles", "residues"))} == {torch.float32}
    assert {dtype for name, dtype in dtypes.items() if not name.endswith(("poles", "residues"))} == {torch.bfloat16}
    for module in model.modules():
        if isinstance(module, LongFilter):
            assert (module.poles.norm(dim=-1) < 1).all()
    heldout = tokenize(read_documents(config.data.heldout), Run(config, device="cpu").tokenizer)
    exported = evaluate(model.float(), heldout, window=config.window)
    # Weights rounded to 8 bits of mantissa.
    assert exported.bits_per_byte == pytest.approx(result.bits_per_byte, rel=0.02)


def test_a_loss_that_is_not_finite_stops_the_run_with_nothing_lost(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make(save_every=2)
    original = Run.update

    def broken(self: Run) -> Any:
        if self.step == 4:
            with torch.no_grad():
                self.model.norm.weight[0] = math.nan
        return original(self)

    monkeypatch.setattr(Run, "update", broken)
    with pytest.raises(NonFiniteError, match=r"step 5.*--resume"):
        run(config)
    monkeypatch.setattr(Run, "update", original)
    state = torch.load(Path(config.output) / "last.pt", weights_only=True)
    assert state["step"] == 4 and all(torch.isfinite(tensor).all() for tensor in state["model"].values())
    assert metrics(config)[-1]["step"] == 4
    assert run(config, resume=True).finished


def test_a_full_disk_keeps_the_previous_checkpoint(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make()
    run(config, stop=stop_after(2))
    path = Path(config.output) / "last.pt"
    before = path.read_bytes()

    def full(state: Any, file: Any) -> None:
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(OutputError, match="No space left"):
            run(config, resume=True)
    assert path.read_bytes() == before
    assert not list(path.parent.glob("*.partial"))
    assert run(config, resume=True).finished


def test_runs_are_not_overwritten_nor_mixed(make: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="without --resume"):
        run(make(), resume=True)
    run(make(), stop=stop_after(1))
    with pytest.raises(CheckpointError, match="already holds a run"):
        run(make())
    with pytest.raises(CheckpointError, match=r"another optim\.lr, steps"):
        run(make(steps=9, optim={"lr": 2e-2, "warmup_steps": 2}), resume=True)
    text = tmp_path / "train.txt"
    before = text.read_text()
    text.write_text(before.replace("night", "noon."))
    with pytest.raises(CheckpointError, match="the training text is not the one"):
        run(make(), resume=True)
    text.write_text(before)
    (Path(make().output) / "last.pt").write_bytes(b"PK damaged")
    with pytest.raises(CheckpointError, match=r"last\.pt is damaged"):
        run(make(), resume=True)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model": {**MODEL, "vocab_size": 200}}, CheckpointError, "vocabulary needs 259"),
        ({"window": 8000}, InputError, "too few for windows of 8000"),
        ({"data": {"train": "absent.txt"}}, InputError, "absent.txt"),
    ],
)
def test_what_cannot_be_trained_writes_nothing(make: Any, changes: dict[str, Any], error: type, message: str) -> None:
    config = make(**changes)
    with pytest.raises(error, match=message):
        run(config)
    assert not Path(config.output).exists()


def test_an_unknown_device_is_named(make: Any) -> None:
    with pytest.raises(ConfigError, match="abacus"):
        train(make(), device="abacus", progress=False)


def test_a_run_without_held_out_text_ends_with_an_export(make: Any, tmp_path: Path) -> None:
    config = make(data={"train": str(tmp_path / "train.txt")}, steps=2)
    result = run(config)
    assert result.finished and result.bits_per_byte is None
    load_model(Path(config.output) / "final")


def test_fine_tuning_starts_at_the_given_weights(make: Any) -> None:
    run(make("first", steps=2))
    source = str(Path(make("first").output) / "final")
    tuned = make("second", model=None, init_from=source, optim={"lr": 1e-12, "warmup_steps": 0, "weight_decay": 0.0})
    assert run(tuned).finished
    before, after = (load_model(folder).state_dict() for folder in (source, Path(tuned.output) / "final"))
    for name, tensor in before.items():
        # A learning rate of nothing; poles go through their parametrisation and back.
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=3e-7, msg=name)


def test_the_tokenizer_file_goes_with_the_model(make: Any, tmp_path: Path) -> None:
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE({"</s>": 0} | {c: i + 1 for i, c in enumerate(alphabet)}, [])
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    data = {"train": str(tmp_path / "train.txt"), "tokenizer": str(tmp_path / "tokenizer.json")}
    first = make("first", model={**MODEL, "tokenizer": "hf"}, data=data, steps=1)
    run(first)
    second = make("second", model=None, init_from=first.output + "/final", data={"train": data["train"]}, steps=1)
    run(second)
    _, loaded = hub.load(second.output + "/final")
    assert loaded.decode(loaded.encode("hyaena", add_special_tokens=False)) == "hyaena"
