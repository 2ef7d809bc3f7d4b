"""Find and load models: the bundled one, a folder, a weights file, the Hugging Face hub.

model, tokenizer = hyaena.load("cub")
model, tokenizer = hyaena.load("togethercomputer/StripedHyena-Nous-7B", dtype="bfloat16", device="cuda")
"""

from __future__ import annotations

import difflib
import errno
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch

from hyaena import checkpoints
from hyaena.adapters import Adapter, check_adapter, merge_adapter, read_adapter
from hyaena.arguments import as_path
from hyaena.checkpoints import Checkpoint
from hyaena.checkpoints.parts import whole_name
from hyaena.config import ModelConfig, preset_names
from hyaena.errors import CheckpointError, ConfigError, InputError
from hyaena.files import expanded
from hyaena.formats import read_config
from hyaena.fp8 import check_fp8, set_fp8
from hyaena.layers import MIXERS, Mixers
from hyaena.model import StripedHyena
from hyaena.ops import cpu
from hyaena.ops.backend import log_once
from hyaena.ops.slots import as_cache_dtype, slots_of
from hyaena.schemes import scheme_of
from hyaena.tokenizers import Tokenizer, load_tokenizer

BUNDLED = ("cub",)
"""Models that come with the package, each in a folder of its name beside this file."""

_FILES = ("config.json", *checkpoints.COMPANIONS)
_WEIGHTS = (
    ("*.safetensors", "*.safetensors.index.json"),
    ("*.bin", "*.bin.index.json", "*.pt", "*.pt.part*"),
)
"""Patterns of weights files; the second kind is fetched only where there is none of the first."""


@dataclass(frozen=True)
class Published:
    """What has to be known about a published model beyond what its files say.

    Attributes:
        revision: the branch, tag or commit to take unless the user names one.
        preset: the name of its configuration, where the hub has weights alone.
        corrections: fields of the configuration that the hub's ``config.json`` does not get right.
    """

    revision: str | None = None
    preset: str | None = None
    corrections: Mapping[str, Any] = field(default_factory=dict)


_EVO = {"tokenizer": "characters"}
PUBLISHED: dict[str, Published] = {
    "togethercomputer/StripedHyena-Hessian-7B": Published(),
    "togethercomputer/StripedHyena-Nous-7B": Published(),
    # The revision that Evo's own loader takes for these two.
    "togethercomputer/evo-1-8k-base": Published("1.1_fix", corrections=_EVO),
    # The context was extended by dividing positions by 16; Evo's own loader has it from its YAML, not from the hub.
    "togethercomputer/evo-1-131k-base": Published(
        "1.1_fix", corrections=_EVO | {"rope_scaling_factor": 16.0, "max_length": 131_072}
    ),
    "LongSafari/evo-1-8k-crispr": Published(corrections=_EVO),
    "LongSafari/evo-1-8k-transposon": Published(corrections=_EVO),
    "evo-design/evo-1.5-8k-base": Published(corrections=_EVO),
    "arcinstitute/evo2_1b_base": Published(preset="evo2-1b-base"),
    "arcinstitute/evo2_7b_base": Published(preset="evo2-7b-base"),
    "arcinstitute/evo2_7b_262k": Published(preset="evo2-7b-262k"),
    "arcinstitute/evo2_7b": Published(preset="evo2-7b"),
    "arcinstitute/evo2_20b": Published(preset="evo2-20b"),
    "arcinstitute/evo2_40b_base": Published(preset="evo2-40b-base"),
    "arcinstitute/evo2_40b": Published(preset="evo2-40b"),
    "evo-design/evo-2-7b-8k-microviridae": Published(preset="evo2-7b-microviridae"),
}

_PRESET_IDS = {"sh-7b": "togethercomputer/StripedHyena-Hessian-7B"}
"""Presets whose names are unlike the hub ids of their weights."""


def load(
    source: str | PathLike[str],
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    revision: str | None = None,
    config: ModelConfig | str | PathLike[str] | None = None,
    adapter: str | PathLike[str] | None = None,
    mixers: Mixers = MIXERS,
    fp8: str = "auto",
    weights: str | None = None,
    cache_dtype: str | torch.dtype | None = None,
) -> tuple[StripedHyena, Tokenizer]:
    """A model, in evaluation mode, and its tokenizer.

    Args:
        source: a bundled name (``"cub"``), a folder in our layout or the original's, a weights file, or a hub id.
        device: where the model goes; by default the CPU.
        dtype: of the weights, such as ``"bfloat16"``; by default float32 on a CPU, since most have no fast arithmetic
            for narrower numbers, and elsewhere as they are stored. ``"auto"`` is bfloat16 on a CPU that multiplies it
            natively, which halves the bytes of a step and changes the numbers as bfloat16 does (docs/numerics.md).
            ``"stored"`` keeps every tensor as it is.
        revision: branch, tag or commit of a hub id.
        config: a configuration or its path, where it does not lie beside the weights.
        adapter: the folder of a LoRA adapter, which is merged into the weights; see ``adapters``.
        mixers: what makes the mixer of each kind of layer, for models with layers of your own; see ``StripedHyena``.
        fp8: how FP8 input projections are computed, which most Evo 2 models have: ``"auto"``, by the tensor cores of a
            Hopper GPU, and elsewhere as plain products; ``"exact"``, the same numbers on every device, slowly where
            there is no Hopper GPU; ``"off"``, as plain products. See docs/numerics.md.
        weights: make the linear layers narrow while they are read: ``"int8"``, ``"int4"``, ``"int4-128"``,
            ``"float8"``, ``"q8_0"`` or ``"q4_0"``. See docs/quantization.md; ``hyaena quantize`` does it once for all.
        cache_dtype: of keys and values in caches: ``"float32"``, ``"bfloat16"``, ``"float16"`` or ``"int8"``; by
            default, and for ``"auto"``, that of the weights. See docs/quantization.md and ``StripedHyena.cache_dtype``.

    Raises:
        HyaenaError: in one line, what is wrong and how to put it right.
    """
    _check_options(dtype, device, weights, adapter, cache_dtype)
    update = None if adapter is None else read_adapter(adapter)
    checkpoint = locate(source, revision=revision, config=config)
    check_fp8(fp8, checkpoint.config.fp8_input_projections)
    tokenizer = _tokenizer_of(checkpoint, config)  # before the large files
    return _load(checkpoint, dtype, device, mixers, update, fp8, weights, cache_dtype), tokenizer


def load_model(
    source: str | PathLike[str],
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    revision: str | None = None,
    config: ModelConfig | str | PathLike[str] | None = None,
    adapter: str | PathLike[str] | None = None,
    mixers: Mixers = MIXERS,
    fp8: str = "auto",
    weights: str | None = None,
    cache_dtype: str | torch.dtype | None = None,
) -> StripedHyena:
    """The model alone; the arguments are those of :func:`load`."""
    _check_options(dtype, device, weights, adapter, cache_dtype)
    update = None if adapter is None else read_adapter(adapter)
    checkpoint = locate(source, revision=revision, config=config)
    check_fp8(fp8, checkpoint.config.fp8_input_projections)
    return _load(checkpoint, dtype, device, mixers, update, fp8, weights, cache_dtype)


def load_tokenizer_of(
    source: str | PathLike[str],
    *,
    revision: str | None = None,
    config: ModelConfig | str | PathLike[str] | None = None,
) -> tuple[ModelConfig, Tokenizer]:
    """The configuration and the tokenizer of a model: no weights are downloaded or read.

    Args:
        source: a bundled name, a folder, a weights file, or a hub id.
        revision: branch, tag or commit of a hub id.
        config: a configuration or its path, where it does not lie beside the weights.

    Raises:
        HyaenaError: the errors of :func:`load`.
    """
    as_path("the model", source)
    name = str(source)
    if name in BUNDLED or not is_hub_id(name) or _is_there(Path(name)):
        checkpoint = locate(source, revision=revision, config=config)
        return checkpoint.config, _tokenizer_of(checkpoint, config)
    found, folder = describe(name, revision=revision, config=config)
    return found, load_tokenizer(folder, found)


def describe(
    hub_id: str, *, revision: str | None = None, config: ModelConfig | str | PathLike[str] | None = None
) -> tuple[ModelConfig, Path]:
    """The configuration of a hub model, and the folder of its tokenizer: no weights are downloaded.

    Args:
        hub_id: of the model.
        revision: branch, tag or commit.
        config: a configuration or its path, where it should be another.

    Raises:
        HyaenaError: the errors of :func:`load`.
    """
    folder = download(hub_id, revision=revision, weights=False)
    if config is not None:
        return config if isinstance(config, ModelConfig) else read_config(config), folder
    return _preset(hub_id) or corrected(hub_id, read_config(checkpoints.find_config(folder))), folder


def locate(
    source: str | PathLike[str],
    *,
    revision: str | None = None,
    config: ModelConfig | str | PathLike[str] | None = None,
) -> Checkpoint:
    """Find the files of a model on this machine, after downloading them if ``source`` is a hub id.

    A configuration is read before anything is downloaded. A bundled name is one only as text: ``Path("cub")`` is a
    folder.

    Raises:
        CheckpointError: there is no such model, or the hub cannot be reached.
        ConfigError: the configuration is missing or cannot be used.
        InputError: a bundled name that is also a folder here, a revision of something that has none, or no name at all.
    """
    as_path("the model", source)
    name = str(source)
    is_bundled = isinstance(source, str) and name in BUNDLED
    if is_bundled:
        path = bundled(name)
        _check_not_shadowed(name, path)
    else:
        path = expanded(source)
    given = config
    if config is not None and not isinstance(config, ModelConfig):
        given = read_config(config)
    if is_bundled or _is_there(path):
        if revision is not None:
            raise InputError(f"revision {revision!r} is for hub ids, and {name} is on this machine: leave it out")
        return checkpoints.find(path, given)
    if not is_hub_id(name) or _is_there(Path(name.split("/")[0])):
        raise CheckpointError(f"{name}: {_unknown(name, path)}")
    given = given or _preset(name)
    checkpoint = checkpoints.find(_weights_of(download(name, revision=revision)), given)
    return checkpoint if given is not None else replace(checkpoint, config=corrected(name, checkpoint.config))


def bundled(name: str) -> Path:
    """The folder of a bundled model."""
    folder = Path(__file__).parent / name
    if not folder.is_dir():
        raise CheckpointError(f"the bundled model {name!r} is not part of this installation: install hyaena again")
    return folder


def is_hub_id(source: str) -> bool:
    """Whether a name that is no file here may be a hub id: an owner, a slash, a name that is not a file's."""
    if whole_name(source).endswith((".safetensors", ".bin", ".pt", ".pth", ".json", ".yml", ".yaml")):
        return False
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", source) is not None


def download(hub_id: str, *, revision: str | None = None, weights: bool = True) -> Path:
    """Fetch a model's files from the hub into its cache, or find them there; the folder that holds them.

    Configuration, tokenizer and weights only; safetensors rather than pickles where there are both.
    """
    if revision is None:
        revision = PUBLISHED.get(hub_id, Published()).revision
    folder = _snapshot(hub_id, revision, _FILES)
    for patterns in _WEIGHTS if weights else ():
        folder = _snapshot(hub_id, revision, (*_FILES, *patterns))
        if any(file for pattern in patterns for file in folder.glob(pattern)):
            break
    return folder


def _preset(hub_id: str) -> ModelConfig | None:
    """The configuration of a hub model that is published without one."""
    preset = PUBLISHED.get(hub_id, Published()).preset
    return None if preset is None else ModelConfig.from_name(preset)


def corrected(hub_id: str, config: ModelConfig) -> ModelConfig:
    """A hub model's configuration with its name, and with what is known to be missing from the hub's file."""
    return replace(config, **{"name": hub_id.split("/")[1], **PUBLISHED.get(hub_id, Published()).corrections})


def _load(
    checkpoint: Checkpoint,
    dtype: str | torch.dtype | None,
    device: str | torch.device | None,
    mixers: Mixers,
    adapter: Adapter | None,
    fp8: str,
    weights: str | None,
    cache_dtype: str | torch.dtype | None,
) -> StripedHyena:
    check_cache_dtype(cache_dtype, checkpoint.config)
    if adapter is not None:
        check_adapter(checkpoint.config, adapter, merged=True, mixers=mixers)
    dtype = choose_dtype(dtype, checkpoints.as_device(device))
    model = checkpoints.load_model(checkpoint, dtype=dtype, device=device, mixers=mixers, weights=weights)
    if adapter is not None:
        merge_adapter(model, adapter)
    set_fp8(model, fp8)
    model.cache_dtype = cache_dtype
    return model


def check_cache_dtype(value: str | torch.dtype | None, config: ModelConfig) -> None:
    """Refuse, before weights are read, a dtype of keys and values that the model's caches cannot have.

    Raises:
        InputError: it is unknown, or its slots do not fit the model's heads.
    """
    kept = as_cache_dtype(value)
    if kept is not None and "attention" in config.layer_types:
        slots_of(kept).check(config.head_dim)


def _check_options(
    dtype: str | torch.dtype | None,
    device: str | torch.device | None,
    weights: str | None,
    adapter: str | PathLike[str] | None,
    cache_dtype: str | torch.dtype | None,
) -> None:
    """Refuse what cannot be used before anything is downloaded or read."""
    as_cache_dtype(cache_dtype)
    choose_dtype(dtype, checkpoints.as_device(device))
    if weights is not None:
        scheme_of(weights)
        if adapter is not None:
            raise InputError(
                f"an adapter cannot be merged into {weights} weights: load the model without it, and compute it beside "
                "them (adapters.with_adapter), or merge it first (hyaena convert --adapter)"
            )


def choose_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype | Literal["stored"] | None:
    """The dtype of weights on a device, from what ``load`` takes; ``"stored"``, or None for as the embedding is stored.

    Raises:
        InputError: the name is not that of a floating-point dtype that a model can have.
    """
    if isinstance(dtype, str) and dtype in ("auto", "stored"):
        if dtype == "stored":
            return "stored"
        if device.type != "cpu":
            return None
        native = cpu.multiplies_bfloat16()
        what = "bfloat16, which this processor multiplies" if native else "float32: this processor widens bfloat16"
        log_once("weights with dtype='auto' are", what)
        return torch.bfloat16 if native else torch.float32
    if dtype is None:
        return torch.float32 if device.type == "cpu" else None
    return checkpoints.as_dtype(dtype)


def _check_not_shadowed(name: str, path: Path) -> None:
    """Refuse a bundled name where a folder here has the same name and a model in it: both may be meant."""
    here = Path(name)
    if here.is_dir() and here.resolve() != path.resolve() and checkpoints.has_weights(here):
        raise InputError(
            f"{name} is the bundled model and a folder here with a model: write ./{name} for the folder, "
            "or rename the folder"
        )


def _is_there(path: Path) -> bool:
    """Whether there is something at a path, even if it cannot be read."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False
    except OSError as error:
        return error.errno != errno.ENAMETOOLONG
    return True


def _weights_of(folder: Path) -> Path:
    """The weights in a folder of the hub's cache, which may have them in both formats."""
    return next((folder / name for name in checkpoints.WEIGHTS if (folder / name).is_file()), folder)


def _tokenizer_of(checkpoint: Checkpoint, config: ModelConfig | str | PathLike[str] | None) -> Tokenizer:
    """The tokenizer of a checkpoint, whose configuration was named as ``config`` where it is not beside the weights."""
    try:
        return load_tokenizer(_tokenizer_path(checkpoint, config), checkpoint.config)
    except CheckpointError:
        if config is not None:  # of another model, maybe, whose tokenizer is not missed
            with suppress(ConfigError):  # layers of a kind that is defined elsewhere
                checkpoints.check_names_and_shapes(checkpoint)
        raise


def _tokenizer_path(checkpoint: Checkpoint, config: ModelConfig | str | PathLike[str] | None) -> Path:
    """Find the tokenizer: ``tokenizer.json`` or the configuration's ``vocab_file``.

    It is looked for beside the weights, then beside a configuration in another folder; nowhere else, whatever folders
    ``vocab_file`` names.

    Raises:
        CheckpointError: the configuration names a tokenizer that is not there.
    """
    folders = [checkpoint.folder]
    if config is not None and not isinstance(config, ModelConfig):
        folders.append(Path(config).parent)
    named = checkpoint.config.vocab_file
    for folder in folders:
        if (folder / "tokenizer.json").is_file():
            return folder
        if named is not None and named.endswith("tokenizer.json"):
            inside = not Path(named).is_absolute() and ".." not in Path(named).parts
            for file in (folder / named, folder / Path(named).name)[0 if inside else 1 :]:
                if file.is_file():
                    return file
    if named is not None and checkpoint.config.tokenizer == "hf":
        raise CheckpointError(
            f"no tokenizer.json in {checkpoint.folder}, nor the file that the configuration names ({named}): "
            "put it there as tokenizer.json"
        )
    return checkpoint.folder


def _snapshot(hub_id: str, revision: str | None, patterns: Sequence[str]) -> Path:
    # Heavy, and of no use to those whose models lie on this machine.
    from huggingface_hub import errors, snapshot_download

    try:
        folder = snapshot_download(
            hub_id,
            revision=revision,
            allow_patterns=list(patterns),
            ignore_patterns=["*/*"],  # copies for other programs lie in subfolders
            library_name="hyaena",
        )
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{hub_id}: its owner grants access by hand: ask at https://huggingface.co/{hub_id}, then `hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{hub_id}: has no revision {revision!r}: name a branch, a tag or a commit") from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise CheckpointError(f"{hub_id}: {_unknown(hub_id)}") from error
    except OSError as error:  # every way of not reaching the hub is one
        if error.errno is not None and not isinstance(error, ConnectionError):
            raise CheckpointError(f"{hub_id}: cannot store it in the hub's cache: {error.strerror}") from error
        raise CheckpointError(f"{hub_id}: {_unreachable(hub_id)}") from error
    return Path(str(folder))


def _unreachable(hub_id: str) -> str:
    """Why a name that is no path here and may be a hub id leads nowhere."""
    if hub_id in PUBLISHED:
        return "not in the hub's cache, and the hub cannot be reached: check the name and the network, or name a folder"
    near = _near_id(hub_id)
    hint = f"did you mean {near}? " if near else ""
    return (
        f"no such file or folder. {hint}If it is the name of a model on the hub: it is not in the hub's cache, and "
        "the hub cannot be reached: check the name and the network"
    )


def _unknown(name: str, path: Path | None = None) -> str:
    if name in preset_names():
        found = _PRESET_IDS.get(name) or _near_id(name)
        return f"no such model: it is the name of a configuration, without weights: take {found}"
    near = _near_id(name) or (None if path is None else _near_path(path))
    hint = f"did you mean {near}?" if near else f"name a folder, a weights file, a hub id or {' or '.join(BUNDLED)}"
    return f"no such model: {hint}"


def _near_id(name: str) -> str | None:
    """The bundled name or published hub id that is most like a name, with or without its owner."""
    ids = (*BUNDLED, *PUBLISHED)
    known = {i.lower(): i for i in ids} | {i.lower().split("/")[-1]: i for i in ids}
    return next((known[key] for key in difflib.get_close_matches(name.lower()[:200], known, n=1, cutoff=0.7)), None)


def _near_path(path: Path) -> str | None:
    """The path most like one that does not exist: its first missing part replaced by a name that is there."""
    missing = next((part for part in (*reversed(path.parents), path) if not _is_there(part)), path)
    try:
        names = os.listdir(missing.parent)
    except OSError:
        return None
    near = difflib.get_close_matches(missing.name, names[:10_000], n=1, cutoff=0.7)
    if not near:
        return None
    full = missing.parent / near[0] / path.relative_to(missing)
    return str(full if _is_there(full) else missing.parent / near[0])
