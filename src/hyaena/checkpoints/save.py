"""A model -> a folder that holds a whole checkpoint at every moment.

What ``load_model`` would refuse is refused here first, before a byte is written. The files are then replaced together
(see ``hyaena.files``): a full disk, a killed process or a lost machine leaves the previous checkpoint or the new one.
"""

from __future__ import annotations

import io
import itertools
import json
import shutil
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from hyaena import files
from hyaena.arguments import as_text_path, kind_of, switch, whole
from hyaena.checkpoints.files import (
    COMPANIONS,
    CONFIGS,
    INDEX,
    SINGLE,
    WEIGHTS,
    files_of_checkpoint,
    is_adapter,
    listed,
    other_models,
)
from hyaena.checkpoints.load import as_dtype, dtype_in, wide_parameters
from hyaena.checkpoints.shards import FLOATING
from hyaena.checkpoints.weights import plain_names
from hyaena.config import ModelConfig
from hyaena.errors import CheckpointError, InputError, printable, shown
from hyaena.formats import write_original
from hyaena.formats.tensors import format_of
from hyaena.formats.transformers import code as transformers_code
from hyaena.formats.transformers import config as transformers_config
from hyaena.formats.transformers import tensors as transformers_tensors
from hyaena.layers import MIXERS
from hyaena.model import StripedHyena
from hyaena.ops.fp8 import E4M3
from hyaena.quant import fixed_tensors
from hyaena.tensor_files.gguf_file import BLOCKS, check_gguf, write_gguf
from hyaena.tensor_files.gguf_file import SUFFIX as GGUF
from hyaena.tokenizers import ByteTokenizer, CharacterTokenizer, HFTokenizer, Tokenizer, transformers_files

Layout = Literal["hyaena", "original", "transformers", "gguf"]
CONFIG_NAMES: dict[Layout, str | None] = {
    "hyaena": "config.json",
    "original": "config.yml",
    "transformers": "config.json",
    "gguf": None,  # inside the file
}
WAIT = 60.0
"""Seconds that a save waits for another one in the same folder."""


def save_model(
    model: StripedHyena,
    folder: str | PathLike[str],
    *,
    tokenizer: Tokenizer | None = None,
    layout: Layout = "hyaena",
    dtype: str | torch.dtype | None = None,
    max_shard_size: int = 5_000_000_000,
    extra_files: Mapping[str, bytes] | None = None,
    overwrite: bool = True,
) -> Path:
    """Write a model as a folder that ``load_model`` reads, replacing the checkpoint that was there, if any.

    Args:
        model: its weights may lie on any device. A model that was compiled or wrapped for data parallelism is saved
            as the model inside.
        folder: made if it is not there; files that belong to no checkpoint are left alone.
        tokenizer: the model's; its files are written beside the weights, in the form that the layout has.
        layout: ``"hyaena"`` (``config.json``, our names), ``"original"`` (``config.yml``, the original's names), or
            ``"transformers"`` (what ``hyaena.hf`` reads and writes), or ``"gguf"`` (``model.gguf``, our names).
        dtype: cast the weights on the way; poles and residues stay float32.
        max_shard_size: bytes above which the weights are split over several files. The original layout of
            StripedHyena 2 is one file of ``torch.save``, whatever its size.
        extra_files: further files that go with the model, name -> content. Where neither these nor a tokenizer are
            given, those of the previous model stay; otherwise they are removed.
        overwrite: whether the folder may hold files already.

    Raises:
        CheckpointError: the model cannot be loaded from what would be written, or it could not be written; the
            previous checkpoint is as it was.
        InputError: an argument that cannot be used.
        OutputError: another process is writing there.
    """
    folder = as_text_path("the folder", folder, "safetensors")
    config = getattr(_unwrapped(model), "config", None) if isinstance(model, nn.Module) else None
    if isinstance(config, ModelConfig):
        check_layout(config, layout)
    max_shard_size = whole("max_shard_size", max_shard_size, "a whole number of bytes, 1 or more", 1)
    overwrite = switch("overwrite", overwrite)
    check_extra_files({} if extra_files is None else extra_files)
    if tokenizer is not None:
        extra_files = {**_files_for(tokenizer, model, layout), **(extra_files or {})}
    narrow = as_dtype(dtype)
    config, state, wide, fixed = _state_to_save(model, narrow)
    if layout == "original" and config.tie_embeddings:
        # The original's head is a module of its own, and its state dict has the shared matrix twice.
        state["lm_head.weight"] = state["embed_tokens.weight"].clone()

    dtypes = {
        name: t.dtype if narrow is None or name in fixed else dtype_in(narrow, wide=name in wide)
        for name, t in state.items()
    }

    def fill(stage: Path) -> set[str]:
        check_folder(folder, overwrite)
        _write(stage, folder, state, dtypes, config, layout, max_shard_size, extra_files or {})
        return files_of_checkpoint(folder) | set(() if extra_files is None else COMPANIONS)

    try:
        files.update_folder(folder, fill, wait=WAIT)
    except (OSError, SafetensorError) as error:
        raise save_failed(folder, error) from error
    return folder


def check_layout(config: ModelConfig, layout: Layout) -> None:
    """Check that a layout holds models of a configuration, before weights are read.

    Raises:
        CheckpointError: the layout is unknown, or has no form for the model's narrow weights.
        ConfigError: its configuration has no keys for the model.
        UnsupportedError: a package that writes it is missing.
    """
    if layout not in tuple(CONFIG_NAMES):
        raise CheckpointError(f"layout {shown(layout)} is unknown: choose one of {', '.join(CONFIG_NAMES)}")
    if layout == "gguf":
        if config.weights not in (None, *BLOCKS):
            raise CheckpointError(f"GGUF has no blocks of {config.weights} weights: quantize the model to q8_0 or q4_0")
        check_gguf()
    config_text(config, layout, torch.float32)


def check_folder(folder: Path, overwrite: bool) -> None:
    """Refuse to write where files must not be replaced, or where a load would find two models.

    Raises:
        CheckpointError: there are such files.
    """
    if not overwrite and (there := files.others(folder)):
        raise CheckpointError(f"{folder} is not empty ({listed(there, most=3)}): name another folder")
    if others := other_models(folder):
        raise CheckpointError(
            f"{folder}: other weights lie there ({listed(others, most=3)}), and a load could not tell which are "
            "meant: move them away, or name another folder"
        )


def save_failed(folder: Path, error: Exception) -> CheckpointError:
    """The error about a folder that could not be written."""
    return CheckpointError(
        f"{folder}: could not save ({files.reason(error)}); nothing there is lost: {files.cure(error)}"
    )


# --- checks, before anything is written ------------------------------------------------------------------------------


def _state_to_save(
    model: nn.Module, dtype: torch.dtype | None
) -> tuple[ModelConfig, dict[str, Tensor], set[str], set[str]]:
    """The configuration of a model, its parameters under our names, and those that stay float32, or as they are.

    Raises:
        CheckpointError: ``load_model`` would not take them.
    """
    inner = _unwrapped(model)
    config = getattr(inner, "config", None)
    if not isinstance(inner, StripedHyena) or not isinstance(config, ModelConfig):
        raise CheckpointError(f"{kind_of(inner)} cannot be saved: give the StripedHyena model inside it")
    raw = inner.state_dict()
    state = dict(zip(plain_names(list(raw)), raw.values(), strict=True))
    expected = _expected_state(config, state)
    wide = set(plain_names(sorted(wide_parameters(inner))))
    fixed = fixed_tensors(inner)
    if unexpected := sorted(state.keys() - expected.keys()):
        raise CheckpointError(f"cannot save {listed(unexpected, most=3)}: {_cure_of_names(unexpected)}")
    if missing := sorted(expected.keys() - state.keys()):
        raise CheckpointError(f"cannot save a model without {listed(missing, most=3)}: put the module back first")
    # What a load without a dtype of its own casts everything to.
    target = dtype or state["embed_tokens.weight"].dtype
    for problem, found in (
        ("on the meta device and has no weights to save: load them first", lambda _, t: t.is_meta),
        (
            "split over devices: gather the whole state into one model first",
            lambda _, t: type(t) not in (Tensor, nn.Parameter),
        ),
        (
            "changed in shape: the configuration must say so, build the model from a configuration that does",
            lambda name, t: t.shape != expected[name].shape,
        ),
        (
            "quantized: save the model from before it was quantized",
            lambda name, t: (name not in fixed and t.dtype not in FLOATING) or t.layout != torch.strided,
        ),
        (
            "not finite: go back to weights that are",
            lambda _, t: not _is_finite_in(t, t.dtype),
        ),
        (
            f"outside the range of {target}: choose a wider dtype",
            lambda name, t: name not in fixed and not _is_finite_in(t, dtype_in(target, wide=name in wide)),
        ),
    ):
        if names := [name for name, tensor in state.items() if found(name, tensor)]:
            raise CheckpointError(f"the model is {problem} ({listed(names, most=3)})")
    return config, state, wide, fixed


def _expected_state(config: ModelConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the state of a model of a configuration should be, on the meta device.

    The mixers of kinds of layers that are defined elsewhere are taken as they are in ``state``.
    """
    foreign = set(config.layer_types) - MIXERS.keys()
    with torch.device("meta"):
        model = StripedHyena(config, mixers={**MIXERS, **dict.fromkeys(foreign, lambda _: nn.Identity())})
    theirs = tuple(f"layers.{i}.mixer." for i, kind in enumerate(config.layer_types) if kind in foreign)
    return model.state_dict() | {name: tensor for name, tensor in state.items() if name.startswith(theirs)}


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside ``torch.compile`` and data parallelism."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _cure_of_names(names: list[str]) -> str:
    """What to do about parameters that a StripedHyena model does not have."""
    text = " ".join(names)
    if "parametrizations." in text:
        return "remove the parametrizations first (torch.nn.utils.parametrize.remove_parametrizations)"
    if "lora" in text.lower() or "base_layer" in text or "adapter" in text.lower():
        return "merge the adapter into the weights first, and save the model alone"
    if "_flat_param" in text:
        return "gather the whole state into one model first"
    if "weight_g" in text or "weight_v" in text:
        return "remove the weight norm first"
    return (
        "the configuration has no place for it, and a load would refuse it; remove it, or save it in a file of its own"
    )


def _is_finite_in(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether a tensor is finite when it is cast to a dtype; only its extremes are cast. NaN is an extreme."""
    if tensor.dtype == E4M3:
        tensor = tensor.half()  # torch compares no numbers of 8 bits
    return tensor.numel() == 0 or bool(torch.stack(torch.aminmax(tensor.detach())).to(dtype).double().isfinite().all())


def check_extra_files(extra_files: Mapping[str, bytes]) -> None:
    """Refuse further files that would be taken for parts of a checkpoint."""
    if not isinstance(extra_files, Mapping):
        raise InputError(f"extra_files must map names to bytes, and is {kind_of(extra_files)}")
    for name, content in extra_files.items():
        own = {*CONFIGS, *WEIGHTS, files.JOURNAL, files.LOCK}
        plain = isinstance(name, str) and name not in ("", "..") and Path(name).name == name and "\0" not in name
        if not plain or name in own:
            raise InputError(f"extra file {printable(str(name))!r}: name a file of its own, without a folder")
        if not isinstance(content, (bytes, bytearray, memoryview)):
            raise InputError(f"extra file {printable(name)!r} is a {type(content).__name__}: give its bytes")
        if name.endswith((".safetensors", ".bin", ".pt", ".pth")) or is_adapter(name):
            raise InputError(f"extra file {printable(name)!r} would be taken for other weights: name it otherwise")


def _files_for(tokenizer: Tokenizer, model: nn.Module, layout: Layout) -> dict[str, bytes]:
    """The files of a model's tokenizer: as transformers reads them, or as ``load_tokenizer`` does.

    Raises:
        CheckpointError: the model's configuration names another kind of tokenizer, or a file cannot be read.
        InputError: it is no tokenizer, or has no form for transformers.
    """
    if not isinstance(tokenizer, Tokenizer):
        raise InputError(f"tokenizer must be what hyaena.load returns, not {kind_of(tokenizer)}")
    config = getattr(_unwrapped(model), "config", None)
    kinds = {"hf": HFTokenizer, "bytes": ByteTokenizer, "characters": CharacterTokenizer}
    if isinstance(config, ModelConfig) and not isinstance(tokenizer, kinds[config.tokenizer]):
        raise CheckpointError(
            f"the model's configuration has tokenizer {config.tokenizer!r}, and this is {kind_of(tokenizer)}: save "
            "the one that was loaded with the model"
        )
    if layout == "transformers":
        return transformers_files(tokenizer)
    return files_of_tokenizer(tokenizer)


def files_of_tokenizer(tokenizer: Tokenizer) -> dict[str, bytes]:
    """The files from which ``load_tokenizer`` makes a tokenizer again, and what lies beside them: name -> content.

    Raises:
        CheckpointError: a file cannot be read.
    """
    if not isinstance(tokenizer, HFTokenizer):  # the configuration names it; it has no file
        ends = {"eos_token_id": list(tokenizer.eos_ids)}
        return {"generation_config.json": json.dumps(ends).encode()} if tokenizer.other_eos_ids else {}
    paths = {name: tokenizer.path.with_name(name) for name in COMPANIONS} | {"tokenizer.json": tokenizer.path}
    try:
        return {name: path.read_bytes() for name, path in paths.items() if name == "tokenizer.json" or path.is_file()}
    except OSError as error:
        raise CheckpointError(f"cannot read the tokenizer's files beside {tokenizer.path}: {error.strerror}") from error


# --- writing ---------------------------------------------------------------------------------------------------------


def _write(
    stage: Path,
    folder: Path,
    state: Mapping[str, Tensor],
    dtypes: Mapping[str, torch.dtype],
    config: ModelConfig,
    layout: Layout,
    limit: int,
    extra_files: Mapping[str, bytes],
) -> None:
    total, original = 0, format_of(config)
    shards = _split({name: tensor.numel() * dtypes[name].itemsize for name, tensor in state.items()}, limit)
    names = shard_names(folder, len(shards))
    single = {"original": original.SINGLE_FILE, "gguf": f"model{GGUF}"}.get(layout)
    if single is not None:
        shards, names = [list(state)], [single]
    weight_map: dict[str, str] = {}
    text = config_text(config, layout, dtypes["embed_tokens.weight"])
    config_name = CONFIG_NAMES[layout]
    if config_name is not None:
        write_bytes(stage / config_name, text.encode())
    for file, keys in zip(names, shards, strict=True):
        tensors = {key: state[key].to("cpu", dtypes[key]) for key in keys}
        if layout == "original":
            items = (original.to_theirs(key, tensor, config) for key, tensor in tensors.items())
            tensors = dict(item for item in items if item is not None)
            if file == names[-1]:  # its head was written with the others
                tensors |= original.extra_tensors(
                    {k: t for k, t in state.items() if k != "embed_tokens.weight"}, config
                )
        elif layout == "transformers":
            tensors = {transformers_tensors.their_name(key): tensor for key, tensor in tensors.items()}
        tensors = apart(tensors)
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
        if layout == "gguf":
            write_gguf(stage / file, tensors, text)
            files.flush(stage / file)
            continue
        assert config_name is not None
        write_tensors(stage / file, tensors)
        shutil.copymode(stage / config_name, stage / file)  # safetensors makes its files private
    for name, content in extra_files.items():
        write_bytes(stage / name, content)
    if layout == "transformers":
        write_bytes(stage / transformers_code.FILE, transformers_code.CODE.encode())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_bytes(stage / INDEX, json.dumps(index, indent=1).encode())


def _split(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Names, in order, cut into runs of at most ``limit`` bytes (a larger tensor has a shard of its own)."""
    shards: list[list[str]] = [[]]
    total = 0
    for name, nbytes in sizes.items():
        if shards[-1] and total + nbytes > limit:
            shards.append([])
            total = 0
        shards[-1].append(name)
        total += nbytes
    return shards


def shard_names(folder: Path, count: int) -> list[str]:
    """Names of shards; a name that is taken by a file of no checkpoint is left to it."""
    if count == 1:
        return [SINGLE]
    taken = {path.name for path in folder.iterdir()} - files_of_checkpoint(folder)
    for stem in itertools.chain(["model"], (f"model{i}" for i in itertools.count(2))):
        names = [f"{stem}-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
        if not taken.intersection(names):
            return names
    raise AssertionError


def config_text(config: ModelConfig, layout: Layout, dtype: torch.dtype) -> str:
    """The configuration file of a layout."""
    if layout == "original":
        import yaml

        return yaml.safe_dump(write_original(config), sort_keys=False, default_flow_style=None, width=120)
    values = config.to_dict()
    if layout == "transformers":
        head = {"architectures": [transformers_config.ARCHITECTURE], "dtype": str(dtype).removeprefix("torch.")}
        values = head | transformers_config.write_config(config) | {"auto_map": transformers_code.AUTO_MAP}
    return json.dumps(values, indent=2) + "\n"


def apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors, each alone in its storage, as safetensors wants them; layers may share their weights."""
    apart, taken = {}, set[int]()
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        storage = tensor.untyped_storage()
        if storage.nbytes() != tensor.nbytes or storage.data_ptr() in taken:
            tensor = tensor.clone()
        taken.add(storage.data_ptr())
        apart[name] = tensor
    return apart


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write one weights file, and wait for the disk."""
    if path.suffix == ".pt":
        extra = {key: io.BytesIO(t.numpy().tobytes()) for key, t in tensors.items() if key.endswith("_extra_state")}
        torch.save({**tensors, **extra}, path)
        files.flush(path)
        return
    save_file(dict(tensors), path, metadata={"format": "pt"})
    with safe_open(path, framework="pt") as file:  # a file that was cut short cannot be opened
        assert set(file.keys()) == set(tensors)
    files.flush(path)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file, and wait for the disk."""
    path.write_bytes(content)
    files.flush(path)
