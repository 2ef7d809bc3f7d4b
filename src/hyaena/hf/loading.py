"""What ``from_pretrained`` does beyond transformers: other layouts, and no weight left to chance."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from hyaena import checkpoints, hub
from hyaena.checkpoints.files import listed
from hyaena.errors import CheckpointError, UnsupportedError, printable
from hyaena.formats.transformers.tensors import their_name
from hyaena.hf.configuration import StripedHyenaConfig, is_foreign

_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
_REFUSED = ("cache_dir", "force_download", "proxies", "subfolder", "token", "variant", "gguf_file", "use_safetensors")
"""Options of where files come from that only transformers' own loader has."""


def foreign_weights(source: Any, options: dict[str, Any]) -> dict[str, Any] | None:
    """The weights of a checkpoint that transformers cannot read by itself, as arguments of its ``from_pretrained``.

    They are read as they are stored, checked, and handed over as ``state_dict``; casting and placing them is left to
    transformers. None where ``source`` is a checkpoint that ``save_pretrained`` wrote, or no checkpoint at all.
    """
    if source is None or "state_dict" in options or not _is_foreign(source, options):
        return None
    if refused := [name for name in _REFUSED if options.get(name)]:
        raise UnsupportedError(
            f"{refused[0]} does not work for a checkpoint in this layout: download it first, or write it anew with "
            "`hyaena convert SOURCE FOLDER --layout transformers`"
        )
    is_here = Path(source).exists()
    checkpoint = hub.locate(source, revision=None if is_here else options.pop("revision", None))
    model = checkpoints.load_model(checkpoint, dtype="stored")
    kept = {name: value for name, value in options.items() if name not in {*_REFUSED, *_HUB_OPTIONS}}
    if not isinstance(kept.get("config"), PreTrainedConfig):
        kept.pop("config", None)
        values = StripedHyenaConfig.from_native(checkpoint.config).to_dict()
        config, kept = StripedHyenaConfig.from_dict(values, name_or_path=str(source), return_unused_kwargs=True, **kept)
        kept["config"] = config
    if (checkpoint.folder / "generation_config.json").is_file():
        kept.setdefault("generation_config", GenerationConfig.from_pretrained(checkpoint.folder))
    return kept | {"state_dict": {their_name(name): tensor for name, tensor in model.state_dict().items()}}


@contextmanager
def one_set_of_weights(folder: Path) -> Iterator[None]:
    """Within it a model is saved; afterwards the weights of another save are gone, as a file or by their index.

    transformers leaves a single file beside a new index, and the reverse, and loads the single file: the old weights.
    """
    before = _stamps(folder)
    yield
    after = _stamps(folder)
    stale = [name for name in after if after[name] == before.get(name)]
    if len(stale) < len(after):
        for name in stale:
            (folder / name).unlink()


def _stamps(folder: Path) -> dict[str, tuple[int, ...]]:
    """When the weights of a folder, or their index, were written."""
    files = [folder / name for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)]
    states = {file.name: file.stat() for file in files if file.is_file()}
    return {name: (state.st_ino, state.st_mtime_ns, state.st_size) for name, state in states.items()}


def check_complete(model: PreTrainedModel, info: Any, source: Any) -> None:
    """Refuse a model of which anything but a head of its own was not in the checkpoint.

    Raises:
        CheckpointError: naming the tensors that are missing or misshapen.
    """
    own = {name for name, _ in model.base_model.named_parameters(remove_duplicate=False)}
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    expected = {prefix + name for name in own} | {"lm_head.weight"}
    lost = {"missing": info["missing_keys"], "wrong shape": [name for name, *_ in info["mismatched_keys"]]}
    problems = [f"{what}: {listed(sorted(found))}" for what, names in lost.items() if (found := expected & set(names))]
    if problems:
        raise CheckpointError(
            f"{printable(str(source))}: {'; '.join(problems)}; do the configuration and the weights belong together?"
        )


def _is_foreign(source: Any, options: dict[str, Any]) -> bool:
    """Whether a folder or hub id is in this package's own layout, or the original's."""
    path = Path(source)
    if hub.PUBLISHED.get(str(source), hub.Published()).preset is not None:  # without a configuration
        return True
    if path.is_file() or (path.is_dir() and not (path / "config.json").is_file()):
        return True
    where = {name: options[name] for name in _HUB_OPTIONS if name in options}
    return is_foreign(PreTrainedConfig.get_config_dict(source, **where)[0])
