from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from hyaena.errors import ConfigError, InputError
from hyaena.sizes import ModelSizes
from hyaena.train.config import TrainConfig

ROOT = Path(__file__).parents[2]

MODEL: dict[str, Any] = {
    "vocab_size": 264,
    "hidden_size": 16,
    "intermediate_size": 32,
    "layer_types": ["hyena", "attention"],
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "state_size": 2,
    "tie_embeddings": True,
    "tokenizer": "bytes",
}


def values(**changes: Any) -> dict[str, Any]:
    plain = {"output": "run", "model": MODEL, "data": {"train": "a.txt"}, "optim": {"lr": 1e-3}, "steps": 10}
    return plain | changes


def test_reads_nested_values_and_fills_defaults() -> None:
    config = TrainConfig.from_dict(values(data={"train": "a.txt", "heldout": ["b", "c"]}))
    assert config.data.train == ("a.txt",)
    assert config.data.heldout == ("b", "c")
    assert config.model is not None and config.model.layer_types == ("hyena", "attention")
    assert config.optim.betas == (0.9, 0.95)


def test_plain_values_read_back_to_an_equal_record() -> None:
    config = TrainConfig.from_dict(values())
    assert TrainConfig.from_dict(yaml.safe_load(yaml.safe_dump(config.to_dict()))) == config


@pytest.mark.parametrize("output", ["a\0b", "\udcff"])
def test_an_output_that_not_all_writers_take_is_refused_before_the_run(output: str) -> None:
    with pytest.raises(ConfigError, match="is no name of a folder: it must be UTF-8 text"):
        TrainConfig.from_dict(values(output=output))


@pytest.mark.parametrize("path", [None, 5, b"x", ""])
def test_what_is_no_path_of_a_configuration(path: Any) -> None:
    with pytest.raises(InputError, match=r"the configuration (must be a path|is empty)"):
        TrainConfig.from_file(path)


def test_overrides_are_texts(tmp_path: Path) -> None:
    (tmp_path / "run.yml").write_text(yaml.safe_dump(values()))
    with pytest.raises(ConfigError, match="takes key=value, not 5"):
        TrainConfig.from_file(tmp_path / "run.yml", [5])  # type: ignore[list-item]


def test_a_number_without_a_point_is_a_number(tmp_path: Path) -> None:
    path = tmp_path / "run.yml"
    path.write_text(yaml.safe_dump(values()).replace("lr: 0.001", "lr: 1e-3"))
    assert TrainConfig.from_file(path).optim.lr == 1e-3


def test_overrides_replace_entries(tmp_path: Path) -> None:
    path = tmp_path / "run.yml"
    path.write_text(yaml.safe_dump(values()))
    config = TrainConfig.from_file(path, ["optim.lr=2e-3", "steps=7", "data.train=[x, y]", "model.state_size=4"])
    assert (config.optim.lr, config.steps, config.data.train) == (2e-3, 7, ("x", "y"))
    assert config.model is not None and config.model.state_size == 4


@pytest.mark.parametrize("override", ["steps", "=3", "steps.more=3", "steps=[1", "stepz=3"])
def test_wrong_overrides_are_errors(tmp_path: Path, override: str) -> None:
    path = tmp_path / "run.yml"
    path.write_text(yaml.safe_dump(values()))
    with pytest.raises(ConfigError):
        TrainConfig.from_file(path, [override])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stepps": 1}, "unknown key stepps: did you mean steps"),
        ({"optim": {"lr": 1e-3, "weight_decoy": 0}}, "unknown key optim.weight_decoy: did you mean optim.weight_decay"),
        ({"data": {"train": "a", "zzz": 1}}, "unknown key data.zzz: there are train, "),
        ({"optim": {}}, "optim.lr is missing"),
        ({"optim": 3}, "optim must be a mapping"),
        ({"optim": {"lr": "fast"}}, "optim.lr must be of type float"),
        ({"optim": {"lr": 1e-3, "betas": [0.9]}}, "optim.betas must hold 2 values"),
        ({"optim": {"lr": -1.0}}, "optim.lr must be positive"),
        ({"steps": 1.5}, "steps must be of type int"),
        ({"steps": True}, "steps must be of type int"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"precision": "float16"}, "precision must be one of auto, float32, bfloat16.*did you mean bfloat16"),
        ({"optim": {"lr": ".nan"}}, "optim.lr must be"),
        ({"optim": {"lr": float("inf")}}, "optim.lr must be a finite number"),
        ({"optim": {"lr": 1e-3, "weight_decay": float("nan")}}, "optim.weight_decay must be a finite number"),
        ({"optim": {"lr": 10**400}}, "optim.lr must be of type float"),
        ({"seed": -1}, "seed must lie in 0"),
        ({"seed": 10**5000}, "seed must lie in 0"),
        ({"output": ""}, "output is empty"),
        ({"data": {"train": ""}}, "data.train has an empty name"),
        ({"data": {"train": "a", "heldout": ["b", ""]}}, "data.heldout has an empty name"),
        ({"data": {"train": "a", "pattern": "/etc/*"}}, "data.pattern must be a pattern"),
        ({"data": {"train": "a", "pattern": ""}}, "data.pattern must be a pattern"),
        ({"export_dtype": ["float32"]}, "export_dtype must be one of"),
        ({"steps" + chr(27) + "[2J": 1}, "unknown key steps"),
        ({"batch_size": 6, "micro_batch_size": 4}, "batch_size 6 must be a multiple of micro_batch_size 4"),
        ({"window": 100, "eval_overlap": 100}, "eval_overlap must be smaller than window"),
        ({"window": 100_000}, "window must not be longer than model.max_length"),
        ({"init_from": "cub"}, "exactly one of `model` and `init_from`"),
        ({"model": None}, "exactly one of `model` and `init_from`"),
        ({"model": {**MODEL, "tokenizer": "hf"}}, "name its tokenizer.json in data.tokenizer"),
        ({"data": {"train": "a", "tokenizer": "x.json"}}, "data.tokenizer is for new models with tokenizer: hf only"),
        ({"model": {**MODEL, "state_sise": 2}}, "model: .*state_size"),
        ({"model": 3}, "model must be the fields of a model"),
        ({"data": {"train": []}}, "data.train names no file"),
    ],
)
def test_every_mistake_is_one_line_that_names_it(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        TrainConfig.from_dict(values(**changes))
    assert str(caught.value).isprintable() and len(str(caught.value)) < 500


@pytest.mark.parametrize(("name", "dtype"), [("bf16", "bfloat16"), ("fp32", "float32"), ("bfloat16", "bfloat16")])
def test_types_have_short_names(name: str, dtype: str) -> None:
    config = TrainConfig.from_dict(values(precision=name, export_dtype=name))
    assert (config.precision, config.export_dtype) == (dtype, dtype)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yml"):
        TrainConfig.from_file(tmp_path / "absent.yml")


def test_cub_fits_its_size_and_its_yardstick_differs_in_the_model_and_its_best_rate_alone() -> None:
    cub = TrainConfig.from_file(ROOT / "configs/train/cub.yml")
    other = TrainConfig.from_file(ROOT / "configs/train/cub-transformer.yml")
    assert cub.model is not None and other.model is not None
    assert set(other.model.layer_types) == {"attention"}
    assert abs(ModelSizes(other.model).parameters / ModelSizes(cub.model).parameters - 1) < 0.01
    hyena_layers = cub.model.layer_types.count("hyena")
    wide = 4 * cub.model.hidden_size * cub.model.state_size * hyena_layers  # poles and residues, float32
    assert 2 * ModelSizes(cub.model).parameters + 2 * wide < 16_000_000 - 32_768  # and room for the file's header
    rate = dataclasses.replace(other.optim, lr=cub.optim.lr)
    assert dataclasses.replace(other, model=cub.model, output=cub.output, optim=rate) == cub
