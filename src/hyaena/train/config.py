"""The configuration of a training run: one frozen record, read from YAML and checked before anything heavy starts.

Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import math
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from hyaena.arguments import as_path
from hyaena.config import ModelConfig
from hyaena.errors import ConfigError, nearest, printable, shown
from hyaena.formats import config_from_dict, read_config
from hyaena.mappings import parse_yaml, read_mapping


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The text of a run.

    Attributes:
        train: files or folders; see ``documents.read_documents`` for the formats. Relative paths start at the working
            directory.
        heldout: the same, for evaluation; may be empty.
        pattern: which files of a folder to read, recursively.
        tokenizer: the ``tokenizer.json`` (or its folder) of a new model with ``tokenizer: hf``; byte and character
            models need none, and ``init_from`` brings its own.
    """

    train: tuple[str, ...]
    heldout: tuple[str, ...] = ()
    pattern: str = "*"
    tokenizer: str | None = None

    def __post_init__(self) -> None:
        for name in ("train", "heldout"):
            _require(all(getattr(self, name)), f"data.{name} has an empty name; name a file or a folder")
        relative = bool(self.pattern) and not Path(self.pattern).is_absolute()
        _require(relative, f"data.pattern must be a pattern like *.py, not {shown(self.pattern)}")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and its schedule: linear warm-up, then a cosine from ``lr`` down to ``lr * min_lr_ratio``.

    Attributes:
        lr: the peak learning rate.
        warmup_steps: steps of linear warm-up.
        min_lr_ratio: the last step's learning rate as a share of the peak.
        betas: decay rates of AdamW's two moments.
        eps: AdamW's epsilon.
        weight_decay: applied to the matrices of linear layers and embeddings only.
        clip: largest gradient norm; larger gradients are scaled down to it.
        filter_lr_ratio: learning rate of the long filters (poles, residues, skips) as a share of the others'.
    """

    lr: float
    warmup_steps: int = 100
    min_lr_ratio: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0
    filter_lr_ratio: float = 1.0

    def __post_init__(self) -> None:
        for name in ("lr", "eps", "weight_decay", "filter_lr_ratio"):
            _require(math.isfinite(getattr(self, name)), f"optim.{name} must be a finite number")
        _require(self.lr > 0, "optim.lr must be positive")
        _require(self.warmup_steps >= 0, "optim.warmup_steps must not be negative")
        _require(0 <= self.min_lr_ratio <= 1, "optim.min_lr_ratio must lie in [0, 1]")
        _require(all(0 <= beta < 1 for beta in self.betas), "optim.betas must lie in [0, 1)")
        _require(self.eps > 0, "optim.eps must be positive")
        _require(self.weight_decay >= 0, "optim.weight_decay must not be negative")
        _require(self.clip > 0, "optim.clip must be positive")
        _require(self.filter_lr_ratio >= 0, "optim.filter_lr_ratio must not be negative")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run.

    Attributes:
        output: folder for checkpoints, metrics, the loss curve and the exported models.
        model: the architecture, as the fields of ``ModelConfig`` or the path of a configuration file.
        init_from: start from these weights instead (a bundled name, a folder, a hub id); excludes ``model``.
        data, optim: see ``DataConfig`` and ``OptimConfig``.
        steps: optimizer steps in total.
        window: tokens per packed window.
        batch_size: windows per optimizer step.
        micro_batch_size: windows per forward pass (gradients accumulate over the rest); by default all of them.
        seed: decides the initial weights and the order of the data.
        precision: matrix products in this type; parameters, optimizer and filters are float32 always. ``"auto"`` is
            bfloat16 on CUDA and float32 elsewhere.
        activation_checkpointing: recompute each layer in the backward pass instead of keeping its activations.
        compile: run the model through ``torch.compile``.
        log_every, eval_every, save_every: in steps; 0 for ``eval_every`` evaluates at the end only, 0 for
            ``save_every`` saves at the end of each command only.
        eval_overlap: tokens that consecutive held-out windows share; they give context and are scored once.
        export_dtype: type of the exported weights (poles and residues are float32 always).
    """

    output: str
    data: DataConfig
    optim: OptimConfig
    steps: int
    model: ModelConfig | None = None
    init_from: str | None = None
    window: int = 2048
    batch_size: int = 32
    micro_batch_size: int | None = None
    seed: int = 0
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    activation_checkpointing: bool = False
    compile: bool = False
    log_every: int = 10
    eval_every: int = 0
    save_every: int = 500
    eval_overlap: int = 0
    export_dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        _require((self.model is None) != (self.init_from is None), "give exactly one of `model` and `init_from`")
        _require(bool(self.output), "output is empty: name the folder of the run")
        _require(_is_name(self.output), f"output {shown(self.output)} is no name of a folder: it must be UTF-8 text")
        _require(0 <= self.seed < 2**63, f"seed must lie in 0 … 2^63 - 1, not {shown(self.seed)}")
        for name in ("steps", "batch_size", "log_every"):
            _require(getattr(self, name) >= 1, f"{name} must be at least 1")
        for name in ("eval_every", "save_every", "eval_overlap"):
            _require(getattr(self, name) >= 0, f"{name} must not be negative")
        _require(self.window >= 2, "window must be at least 2")
        _require(self.eval_overlap < self.window, "eval_overlap must be smaller than window")
        _require(len(self.data.train) > 0, "data.train names no file")
        micro = self.micro_batch_size
        _require(
            micro is None or (micro >= 1 and self.batch_size % micro == 0),
            f"batch_size {self.batch_size} must be a multiple of micro_batch_size {micro}",
        )
        _require(
            self.data.tokenizer is None or (self.model is not None and self.model.tokenizer == "hf"),
            "data.tokenizer is for new models with tokenizer: hf only; remove it",
        )
        _require(
            self.model is None or self.model.tokenizer != "hf" or self.data.tokenizer is not None,
            "model.tokenizer is hf: name its tokenizer.json in data.tokenizer, or use bytes",
        )
        _require(
            self.model is None or self.window <= self.model.max_length,
            "window must not be longer than model.max_length",
        )

    @classmethod
    def from_file(cls, path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
        """Read a YAML file; ``overrides`` are ``section.key=value`` strings that replace its entries.

        Raises:
            ConfigError: the file is missing or no YAML mapping, or a key or a value is wrong.
        """
        try:
            values = read_mapping(as_path("the configuration", path))
            for override in overrides:
                _override(values, override)
            return cls.from_dict(values)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """Build from nested mappings; unknown keys, missing keys and wrong types raise ``ConfigError``."""
        return _record(cls, values, "")

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values; ``from_dict`` reads them back to an equal record."""
        values = _plain(asdict(self))
        if self.model is not None:
            values["model"] = _plain(self.model.to_dict())
        return values


_DTYPES = {"bf16": "bfloat16", "fp32": "float32", "float": "float32"}
"""Other names of types."""


def _is_name(path: str) -> bool:
    """Whether a path can be written, too, by libraries that take UTF-8 only."""
    try:
        return "\0" not in path and bool(path.encode())
    except UnicodeEncodeError:
        return False


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _override(values: dict[str, Any], override: str) -> None:
    name, separator, text = override.partition("=") if isinstance(override, str) else ("", "", "")
    if not separator or not name.strip():
        raise ConfigError(f"--set takes key=value, not {shown(override)}, for example --set optim.lr=1e-3")
    *sections, key = name.strip().split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ConfigError(f"--set {name}: {section} is a single value, not a section")
    try:
        values[key] = parse_yaml(text)
    except ConfigError as error:
        raise ConfigError(f"--set {name}: {shown(text)} is not a YAML value") from error


def _record(cls: Any, values: Any, where: str) -> Any:
    """Build the dataclass ``cls`` from a mapping, each value converted to its field's type."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where.rstrip('.') or 'the configuration'} must be a mapping of keys to values")
    hints = get_type_hints(cls)
    for key in values:
        if key not in hints:
            near = nearest(str(key), hints)
            hint = f"did you mean {where}{near}?" if near else f"there are {', '.join(hints)}"
            raise ConfigError(f"unknown key {where}{printable(str(key))}: {hint}")
    for entry in fields(cls):
        if entry.default is MISSING and entry.default_factory is MISSING and entry.name not in values:
            raise ConfigError(f"the key {where}{entry.name} is missing")
    return cls(**{key: _convert(value, hints[key], where + key) for key, value in values.items()})


def _convert(value: Any, kind: Any, where: str) -> Any:
    if get_origin(kind) in (Union, types.UnionType):
        if value is None:
            return None
        (kind,) = (option for option in get_args(kind) if option is not type(None))
    if kind is ModelConfig:
        return _model(value, where)
    if kind in (DataConfig, OptimConfig):
        return _record(kind, value, where + ".")
    if get_origin(kind) is Literal:
        known = get_args(kind)
        value = _DTYPES.get(value, value) if isinstance(value, str) else value
        if value in known:
            return value
        near = nearest(str(value), known)
        hint = f": did you mean {near}?" if near else ""
        raise ConfigError(f"{where} must be one of {', '.join(map(str, known))}, not {shown(value)}{hint}")
    if get_origin(kind) is tuple:
        return _tuple(value, get_args(kind), where)
    if kind is float and isinstance(value, str):  # YAML 1.1 reads 1e-3 (no point) as a string
        with contextlib.suppress(ValueError):
            value = float(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):
            value = float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ConfigError(f"{where} must be of type {kind.__name__}, not {shown(value)}")
    return value


def _tuple(value: Any, kinds: tuple[Any, ...], where: str) -> tuple[Any, ...]:
    items = list(value) if isinstance(value, (list, tuple)) else [value]
    if kinds[-1] is Ellipsis:
        kinds = (kinds[0],) * len(items)
    if len(items) != len(kinds):
        raise ConfigError(f"{where} must hold {len(kinds)} values, not {len(items)}")
    return tuple(_convert(item, kind, where) for item, kind in zip(items, kinds, strict=True))


def _model(value: Any, where: str) -> ModelConfig:
    if isinstance(value, str):
        return read_config(value)
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where} must be the fields of a model or the path of a configuration file")
    try:
        return config_from_dict(value)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
