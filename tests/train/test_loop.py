from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch

from hyaena import hub
from hyaena.checkpoints import load_model, save_model
from hyaena.cli import main
from hyaena.config import ModelConfig
from hyaena.errors import CheckpointError, ConfigError, InputError, NonFiniteError, OutputError
from hyaena.filters import LongFilter
from hyaena.model import StripedHyena
from hyaena.tokenizers import ByteTokenizer
from hyaena.train import loop
from hyaena.train.config import TrainConfig
from hyaena.train.corpus import tokenize
from hyaena.train.documents import read_documents
from hyaena.train.evaluate import evaluate
from hyaena.train.filters import plain_state_dict
from hyaena.train.loop import Trainer, open_run, train
from hyaena.train.storage import Metrics, export_model, load_run

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

EVO2 = MODEL | {
    "layer_types": ["hyena_se", "attention", "hyena_mr", "hyena_li"],
    "num_key_value_heads": 2,
    "activation": "identity",
    "first_activation": "gelu",
    "hyena_in_bias": False,
    "short_filter_bias": False,
    "rope_frequencies_stored": True,
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


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write an empty file for a loss curve, which costs more time than a toy run; see test_plot."""
    monkeypatch.setattr(loop, "plot_metrics", lambda runs, output, title: output.write_bytes(b""))


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
    [
        {},
        {"model": EVO2},
        {"micro_batch_size": 2, "activation_checkpointing": True, "optim": {"lr": 1e-2, "filter_lr_ratio": 0.5}},
    ],
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
    assert held[0] == held[1] and [row["step"] for row in held[0]] == [0, 4, 8]


def test_what_was_logged_after_the_checkpoint_is_logged_once(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parts = make("whole", save_every=2, log_every=1), make("parts", save_every=2, log_every=1)
    run(whole)

    def killed(self: Trainer, *_: Any) -> Any:
        if self.step == 5:
            raise KeyboardInterrupt
        return original(self)

    original = Trainer.update
    monkeypatch.setattr(Trainer, "update", killed)
    with pytest.raises(KeyboardInterrupt):
        run(parts)
    monkeypatch.setattr(Trainer, "update", original)
    assert metrics(parts)[-1]["step"] == 5
    assert run(parts, resume=True).finished
    assert metrics(parts) == metrics(whole)


def test_accumulation_equals_one_large_batch(make: Any) -> None:
    runs = [Trainer(make(str(micro), micro_batch_size=micro)) for micro in (4, 1)]
    (loss, norm), (parts_loss, parts_norm) = [one.update() for one in runs]
    # The same sums in another order, float32.
    torch.testing.assert_close(parts_loss, loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(parts_norm, norm, rtol=1e-4, atol=0)


def test_activation_checkpointing_changes_nothing(make: Any) -> None:
    runs = [Trainer(make(str(on), activation_checkpointing=on)) for on in (False, True)]
    for one in runs:
        one.update()
    assert_equal(*(one.model.state_dict() for one in runs))


def test_the_loss_falls_and_the_export_is_the_model(make: Any, tmp_path: Path) -> None:
    config = make(steps=60, eval_every=30, export_dtype="bfloat16")
    result = run(config)
    rows = metrics(config)
    held = [row["bits_per_byte"] for row in rows if row["kind"] == "heldout"]
    assert rows[0]["step"] == 0 and rows[0]["bits_per_byte"] > 7 and result.bits_per_byte is not None
    assert result.bits_per_byte < 3.5
    assert result.initial_bits_per_byte == pytest.approx(held[0], abs=1e-6)  # rounded in the file
    assert result.best_bits_per_byte == pytest.approx(min(held), abs=1e-6)
    folder = Path(config.output)
    assert TrainConfig.from_file(folder / "config.yml") == config
    model = load_model(folder / "final")
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    assert {dtype for name, dtype in dtypes.items() if name.endswith(("poles", "residues"))} == {torch.float32}
    assert {dtype for name, dtype in dtypes.items() if not name.endswith(("poles", "residues"))} == {torch.bfloat16}
    for module in model.modules():
        if isinstance(module, LongFilter):
            assert (module.poles.norm(dim=-1) < 1).all()
    heldout = tokenize(read_documents(config.data.heldout), ByteTokenizer())
    exported = evaluate(model.float(), heldout, window=config.window)
    # Weights rounded to 8 bits of mantissa.
    assert exported.bits_per_byte == pytest.approx(result.bits_per_byte, rel=0.02)


def test_a_loss_that_is_not_finite_stops_the_run_with_nothing_lost(
    make: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make(save_every=2)
    original = Trainer.update

    def broken(self: Trainer) -> Any:
        if self.step == 4:
            with torch.no_grad():
                self.model.norm.weight[0] = math.nan
        return original(self)

    monkeypatch.setattr(Trainer, "update", broken)
    with pytest.raises(NonFiniteError, match=r"step 5: go back to the last checkpoint in .* with --resume, or start"):
        run(config)
    with pytest.raises(NonFiniteError, match="step 5: start again with a lower"):  # nothing was saved
        run(make("unsaved", save_every=0))
    assert main(["info", str(Path(config.output).parent / "unsaved")]) == 2
    assert "config.yml: it is of a training run, for `hyaena train`" in capsys.readouterr().err
    monkeypatch.setattr(Trainer, "update", original)
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
    assert not Path(make().output).exists()
    run(make(), stop=stop_after(1))
    with pytest.raises(CheckpointError, match="already holds a run"):
        run(make())
    with pytest.raises(CheckpointError, match=r"another batch_size, optim\.lr; use the same"):
        run(make(steps=9, batch_size=2, optim={"lr": 2e-2, "warmup_steps": 2}), resume=True)
    for text in (tmp_path / "train.txt", tmp_path / "heldout.txt"):
        before = text.read_text()
        text.write_text(before.replace("night", "noon."))
        with pytest.raises(CheckpointError, match="the training text or the held-out text is not the one"):
            run(make(), resume=True)
        text.write_text(before)
    (Path(make().output) / "last.pt").write_bytes(b"PK damaged")
    with pytest.raises(CheckpointError, match=r"last\.pt is damaged.*remove it"):
        run(make(), resume=True)


def test_a_file_that_is_no_saved_state_is_refused_and_kept(make: Any) -> None:
    config = make(steps=2)
    run(config, stop=stop_after(1))
    folder = Path(config.output)
    good = torch.load(folder / "last.pt", weights_only=True)
    moments = good["optimizer"]["state"][0]
    first = {**good["optimizer"], "state": {**good["optimizer"]["state"], 0: {**moments, "exp_avg": torch.zeros(2, 2)}}}
    groups = [{key: value for key, value in g.items() if key != "lr_ratio"} for g in good["optimizer"]["param_groups"]]
    others: list[tuple[Any, str]] = [
        (5, "it is a int"),
        ([good], "it is a list"),
        *(({k: v for k, v in good.items() if k != name}, f"{name} is missing") for name in good),
        *(({**good, name: object_}, f"{name} is a") for name in good for object_ in ([], True)),
        ({**good, "config": "{"}, "config is not JSON"),
        ({**good, "config": "5"}, "config is not a mapping"),
        ({**good, "config": "{}"}, "no number of steps"),
        ({**good, "step": -1}, "no number of steps"),
        ({**good, "model": {}}, "does not fit"),
        ({**good, "model": {**good["model"], "norm.weight": torch.zeros(3)}}, "does not fit"),
        ({**good, "model": dict.fromkeys(good["model"], 5)}, "does not fit"),
        ({**good, "optimizer": {}}, "does not fit"),
        ({**good, "optimizer": first}, "does not fit"),
        ({**good, "optimizer": {**good["optimizer"], "param_groups": groups}}, "does not fit"),
        ({**good, "rng": torch.zeros(3)}, "does not fit"),
    ]
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "last.pt"}
    for state, message in others:
        torch.save(state, folder / "last.pt")
        with pytest.raises(CheckpointError, match=message):
            run(config, resume=True)
        assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "last.pt"} == before
    torch.save(good, folder / "last.pt")
    assert run(config, resume=True).finished


@pytest.mark.parametrize(
    "line",
    [
        b"[1]",
        b"5",
        b"\xff",
        b"{",
        b"",
        b"[" * 20_000,
        b'{"step": ' + b"9" * 5000 + b"}",
        b'{"a": 1}',
        b'{"kind": 1, "step": 1}',
        b'{"kind": "train", "step": 1.5}',
        b'{"kind": "train", "step": 1, "loss": 1, "bits_per_byte": 1, "lr": 1}',
        b'{"kind": "train", "step": 1, "loss": 1, "bits_per_byte": 1, "lr": 1, "losses": ["a"]}',
        b'{"kind": "heldout", "step": 1, "bits_per_byte": null}',
    ],
)
def test_damaged_metrics_are_named_and_kept(make: Any, line: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make(steps=2)
    with open_run(config) as trainer:
        trainer.save()
    path = Path(config.output) / "metrics.jsonl"
    content = b'{"kind": "note", "step": 0}\n' + line + b"\n"
    path.write_bytes(content)
    monkeypatch.setattr(loop, "read_documents", None)  # the file is refused before the text is read
    with pytest.raises(CheckpointError, match=r"line 2 of .*metrics\.jsonl is not a row of metrics: .*move"):
        run(config, resume=True)
    assert path.read_bytes() == content


def test_metrics_that_are_no_file_are_not_opened(make: Any) -> None:
    config = make(steps=2)
    with open_run(config) as trainer:
        trainer.save()
    path = Path(config.output) / "metrics.jsonl"
    path.unlink()
    os.mkfifo(path)  # opening it would wait for a writer
    with pytest.raises(CheckpointError, match="not a regular file; move it away to go on without it"):
        run(config, resume=True)


@pytest.mark.parametrize("config", [None, 5, {"output": "run"}])
def test_a_configuration_is_a_record(config: Any) -> None:
    with pytest.raises(InputError, match="config must be a TrainConfig, not "):
        train(config)


@pytest.mark.parametrize("seconds", ["5", -1, math.nan, True, [1]])
def test_a_time_is_a_number(make: Any, seconds: Any) -> None:
    config = make(steps=2)
    with pytest.raises(InputError, match="max_seconds must be a number, 0 or more, not "):
        train(config, max_seconds=seconds)
    assert not Path(config.output).exists()


def test_a_row_of_metrics_that_cannot_be_written_leaves_no_part_of_it(make: Any) -> None:
    """In a process of its own, whose files may not grow beyond 100 bytes."""
    import resource

    folder = Path(make().output)
    folder.mkdir()
    metrics = Metrics(folder)
    metrics.append(kind="note", step=0)
    before = (folder / "metrics.jsonl").read_bytes()
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        try:
            metrics.append(kind="train", step=1, losses=[0.5] * 100)
        except OSError:
            os._exit(7)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_a_line_of_metrics_that_was_cut_short_is_dropped(make: Any) -> None:
    config = make(steps=2)
    with open_run(config) as trainer:
        trainer.save()
    path = Path(config.output) / "metrics.jsonl"
    path.write_bytes(b'{"kind": "note", "step": 0}\n{"kind": "tr')
    with open_run(config, resume=True):
        assert path.read_bytes() == b'{"kind": "note", "step": 0}\n'
    path.unlink()
    path.mkdir()
    with pytest.raises(CheckpointError, match=r"cannot read .*metrics\.jsonl"):
        run(config, resume=True)


def test_a_run_goes_on_with_another_number_of_steps_and_logs_what_changes(
    make: Any, caplog: pytest.LogCaptureFixture
) -> None:
    assert run(make(steps=4)).finished
    with pytest.raises(CheckpointError, match="has done 4 steps, so steps cannot become 3"):
        run(make(steps=3), resume=True)
    caplog.clear()
    result = run(make(steps=10), resume=True)
    assert (result.finished, result.step) == (True, 10)
    (line,) = [record.getMessage() for record in caplog.records if "steps:" in record.getMessage()]
    assert "steps: 10 instead of 4" in line and "until step 10: at step 4" in line
    rows = metrics(make())
    assert [row["step"] for row in rows if row["kind"] == "heldout"] == [0, 4, 8, 10]
    # The schedule is that of 10 steps from the fifth on, and the folder says so.
    config = TrainConfig.from_file(Path(make().output) / "config.yml")
    assert config.steps == 10
    assert rows[-2]["lr"] == pytest.approx(1e-2 * config.optim.min_lr_ratio)
    assert next(row["lr"] for row in rows if row["kind"] == "train" and row["step"] == 6) > 5e-3


def test_steps_may_be_lowered_to_where_a_run_is(make: Any) -> None:
    run(make(), stop=stop_after(3))
    result = run(make(steps=3), resume=True)
    assert result.finished and [row["step"] for row in metrics(make()) if row["kind"] == "heldout"] == [0, 3]
    load_model(Path(make().output) / "final")


def test_two_processes_do_not_train_in_one_folder(make: Any) -> None:
    config = make()
    with open_run(config), pytest.raises(OutputError, match=rf"process {os.getpid()}\b.* is writing here"):
        run(config)
    assert run(config).finished  # the lock went with its holder
    assert not [path.name for path in Path(config.output).iterdir() if "lock" in path.name]


def test_a_stopped_run_yields_its_model(make: Any, tmp_path: Path) -> None:
    config = make()
    run(config, stop=stop_after(3))
    with open_run(config, resume=True) as trainer:
        expected = plain_state_dict(trainer.model)
    for path in (Path(config.output), Path(config.output) / "last.pt"):
        folder = export_model(path, tmp_path / f"out-{path.name}")
        assert_equal(dict(load_model(folder).state_dict()), dict(expected))
    model, files, step = load_run(config.output)
    assert (step, files, model.training) == (3, {}, False)
    export_model(config.output, tmp_path / "narrow", dtype=torch.bfloat16)
    assert load_model(tmp_path / "narrow").dtype == torch.bfloat16


def test_what_is_no_run_is_not_exported(make: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is no run"):
        load_run(tmp_path)
    torch.save({"model": {}}, tmp_path / "last.pt")
    with pytest.raises(CheckpointError, match="not the saved state of a run"):
        load_run(tmp_path)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model": {**MODEL, "vocab_size": 200}}, CheckpointError, "at least 259"),
        ({"window": 8000}, InputError, "too few for windows of 8000"),
        ({"data": {"train": "absent.txt"}}, InputError, "absent.txt"),
        ({"model": None, "init_from": "cub", "window": 600_000}, ConfigError, "longer than the model's maximum"),
    ],
)
def test_what_cannot_be_trained_writes_nothing(make: Any, changes: dict[str, Any], error: type, message: str) -> None:
    config = make(**changes)
    with pytest.raises(error, match=message):
        run(config)
    assert not Path(config.output).exists()


@pytest.mark.parametrize("device", ["abacus", "meta", "", "cpu:x", "cuda:99"])
def test_a_device_that_cannot_train_is_named(make: Any, device: str) -> None:
    with pytest.raises(InputError, match=f"device {device} " if device else "the device is empty: name one"):
        train(make(), device=device, progress=False)
    assert not Path(make().output).exists()


def test_a_run_without_held_out_text_ends_with_an_export(make: Any, tmp_path: Path) -> None:
    config = make(data={"train": str(tmp_path / "train.txt")}, steps=2)
    result = run(config)
    assert result.finished and result.bits_per_byte is None
    load_model(Path(config.output) / "final")


def test_mistakes_are_found_before_weights_are_read(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights may be a download of many gigabytes, so everything else is looked at first."""

    def read(*_: Any, **__: Any) -> Any:
        raise AssertionError("weights were read")

    monkeypatch.setattr(hub, "load_model", read)
    monkeypatch.setattr(hub, "load", read)
    source = {"model": None, "init_from": "cub"}
    for changes in (
        {"data": {"train": "absent.txt"}},
        {"data": {"train": make().data.train, "heldout": "absent.txt"}},
        {"window": 600_000},
        {"window": 8000},
        {"output": make().data.train[0]},
    ):
        with pytest.raises((InputError, ConfigError)):
            run(make(**source, **changes))
    run(make(), stop=stop_after(1))
    with pytest.raises(CheckpointError, match="already holds a run"):
        run(make(**source))


def test_resuming_needs_nothing_of_the_start(make: Any, tmp_path: Path) -> None:
    """A run knows its architecture and its tokenizer: what it was made of may be changed, or gone."""
    run(make("first", steps=1))
    (start := Path(make("first").output) / "final").rename(source := tmp_path / "source")
    tuned = make("second", model=None, init_from=str(source))
    run(tuned, stop=stop_after(1))
    source.rename(start)
    assert run(tuned, resume=True).finished


def test_what_a_run_writes_is_not_its_text(make: Any, tmp_path: Path) -> None:
    """Where the output lies in a folder of text, or is it."""
    alone = make("alone", data={"train": str(tmp_path / "train.txt")}, steps=3)
    run(alone)
    for name in ("text", "text/run"):
        (text := tmp_path / "text").mkdir()
        (text / "train.txt").write_text((tmp_path / "train.txt").read_text())
        config = make(name, data={"train": str(text)}, steps=3)
        run(config, stop=stop_after(2))
        assert run(config, resume=True).finished
        states = [torch.load(Path(c.output) / "last.pt", weights_only=True)["model"] for c in (config, alone)]
        assert_equal(*states)
        shutil.rmtree(text)


def test_fine_tuning_begins_with_the_checkpoints_own_logits(
    make: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """To the last bit, also with poles on and outside the unit circle; the log tells how many and how far."""
    model = StripedHyena(ModelConfig(**MODEL | {"layer_types": tuple(MODEL["layer_types"])}))
    with torch.no_grad():
        model.layers[2].mixer.long_filter.poles[3, 1] = torch.tensor([1.003, 0.004])
        model.layers[2].mixer.long_filter.poles[4, 0] = torch.tensor([0.0, -1.0])
    save_model(model, tmp_path / "outside")
    config = make(model=None, init_from=str(tmp_path / "outside"))
    ids = torch.randint(256, (2, 60))
    with open_run(config) as trainer, torch.no_grad():
        assert torch.equal(trainer.model(ids), load_model(tmp_path / "outside")(ids))
    (line,) = [record.getMessage() for record in caplog.records if "unit circle" in record.getMessage()]
    assert line.startswith("2 of 96 poles") and "1.003008" in line and "layer 2:" in line and "kept" in line
    assert run(config).finished  # and it trains


def test_held_out_text_is_scored_before_the_first_step(make: Any) -> None:
    run(make("first", steps=3))
    source = make("first").output + "/final"
    tuned = make("second", model=None, init_from=source)
    run(tuned)
    start, *_ = [row for row in metrics(tuned) if row["kind"] == "heldout"]
    heldout = tokenize(read_documents(tuned.data.heldout), ByteTokenizer())
    alone = evaluate(load_model(source), heldout, window=tuned.window, batch_size=tuned.batch_size)
    assert start["step"] == 0 and start["bits_per_byte"] == round(alone.bits_per_byte, 6)


def test_no_bar_is_drawn_where_nobody_looks(make: Any, capsys: pytest.CaptureFixture[str]) -> None:
    train(make(), device="cpu", progress=True)
    assert capsys.readouterr() == ("", "")


def test_the_metrics_hold_the_loss_of_every_step(make: Any) -> None:
    config = make(log_every=3)
    run(config)
    rows = [row for row in metrics(config) if row["kind"] == "train"]
    assert [len(row["losses"]) for row in rows] == [3, 1, 2, 2]  # logged at 3, and at 4, 6 and 8 before what is written
    every = make("every", log_every=1)
    run(every)
    alone = [row["loss"] for row in metrics(every) if row["kind"] == "train"]
    assert [loss for row in rows for loss in row["losses"]] == alone
    for row in rows:
        assert row["loss"] == pytest.approx(sum(row["losses"]) / len(row["losses"]), abs=2e-6)


def test_answers_are_learned_and_prompts_are_not(make: Any, tmp_path: Path) -> None:
    """The prompts are noise: what their prediction would cost shows in a loss over all text, and not over answers."""
    noise = random.Random(2)
    for name, count in (("train", 60), ("heldout", 10)):
        rows = [
            {"prompt": "".join(noise.choices("0123456789abcdef", k=20)), "completion": " laughs\n"}
            for _ in range(count)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"train": str(tmp_path / "train.jsonl"), "heldout": str(tmp_path / "heldout.jsonl")}
    result = run(make(data=data, steps=60, eval_every=0))
    assert result.initial_bits_per_byte is not None and result.initial_bits_per_byte > 7
    assert result.bits_per_byte is not None and result.bits_per_byte < 0.5  # sixteen digits alone cost 4 bits each


def test_fine_tuning_starts_at_the_given_weights(make: Any) -> None:
    run(make("first", steps=2))
    source = str(Path(make("first").output) / "final")
    tuned = make("second", model=None, init_from=source, optim={"lr": 1e-12, "warmup_steps": 0, "weight_decay": 0.0})
    assert run(tuned).finished
    before, after = (load_model(folder).state_dict() for folder in (source, Path(tuned.output) / "final"))
    for name, tensor in before.items():
        # Eight Adam steps of a learning rate of 1e-12, far below one rounding of any weight but a zero.
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=2e-11, msg=name)


def test_the_tokenizer_file_goes_with_the_model(make: Any, tmp_path: Path) -> None:
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE({"</s>": 0} | {c: i + 1 for i, c in enumerate(alphabet)}, [])
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(tmp_path / "my-tokenizer.json"))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [0, 7]}')
    data = {"train": str(tmp_path / "train.txt"), "tokenizer": str(tmp_path / "my-tokenizer.json")}
    first = make("first", model={**MODEL, "tokenizer": "hf"}, data=data, steps=1)
    run(first)
    second = make("second", model=None, init_from=first.output + "/final", data={"train": data["train"]}, steps=1)
    run(second)
    _, loaded = hub.load(second.output + "/final")
    assert loaded.decode(loaded.encode("hyaena", add_special_tokens=False)) == "hyaena"
    assert loaded.other_eos_ids == (0, 7)
