"""Prompts that are read once and continued many times.

    prefix = hyaena.prefix(model, tokenizer, "a long text …")
    hyaena.generate(model, tokenizer, ["one question", "another"], prefix=prefix)

A prefix can be extended, rolled back by any number of tokens, saved and loaded. Keys and values of attention are
shortened by forgetting their end. The state of a Hyena layer cannot be computed backwards, but it is small (1.75 MiB in
all layers of the 7B), so it is noted every ``MARK_DISTANCE`` tokens. Rolling back returns to the last note before the
new end and reads the tokens from there on again, fewer than ``MARK_DISTANCE`` whatever the length.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from hyaena import files
from hyaena.arguments import as_path, kind_of, whole
from hyaena.cache import Cache, Mark
from hyaena.errors import CheckpointError, InputError, printable
from hyaena.generation.chunks import choose_chunk
from hyaena.model import StripedHyena, uncompiled
from hyaena.ops import KVState
from hyaena.tensor_files.safetensors_file import MOST_HEADER, read_safetensors
from hyaena.tensor_files.stored import StoredTensor, open_regular
from hyaena.tokenizers import Tokenizer, token_ids

MARK_DISTANCE = 2048
"""Tokens between two notes of the Hyena layers' states: for the 7B 1.4 % of what keys and values take."""

_FORMAT = "hyaena-prefix-1"


class Prefix:
    """The beginning of a prompt, read by a model; made by ``prefix`` and ``load_prefix``.

    Attributes:
        model: that has read it.
        tokenizer: for ``extend`` with text, or None.
        ids: its tokens.
        max_length: the most tokens that it may grow to.

    The cache always lacks the last token, with which every continuation begins: so a continuation has at least one
    token to read, also of an empty prompt, and no logits need to be kept.
    """

    def __init__(
        self, model: StripedHyena, tokenizer: Tokenizer | None, ids: Sequence[int], cache: Cache, max_length: int
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.ids = list(ids)
        self.max_length = max_length
        self._cache = cache
        self._marks: list[Mark] = [cache.mark()]

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        return f"Prefix({len(self)} tokens, {self.nbytes:,} bytes)"

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and states, with the notes for ``rollback``."""
        return self._cache.nbytes + sum(mark.nbytes for mark in self._marks)

    @property
    def cache(self) -> Cache:
        """A cache of one row that has read all tokens but the last. Copy it (``select``) before you read on."""
        self._read()
        return self._cache

    def extend(self, text: str | bytes | Sequence[int], *, special: bool = False) -> None:
        """Read more: text, tokenized by itself and without BOS, or ids.

        Raises:
            InputError: nothing to read, text without a tokenizer, an id outside the vocabulary, or a prefix that
                passes its maximum length. Nothing has changed.
        """
        ids = _encode(self.model, self.tokenizer, text, special, begin=False)
        _check_length(len(self) + len(ids), self.max_length)
        self.ids += ids
        self._read()

    def rollback(self, count: int) -> None:
        """Forget the last ``count`` tokens: the prefix is then as if only the others had been read.

        Raises:
            InputError: a negative number, or no token would be left.
        """
        most = len(self) - 1
        count = whole("rollback", count, f"a whole number from 0 to {most}, since one token must stay", 0, most)
        self._return(len(self) - 1 - count)  # before the ids go: an interruption leaves a cache that lacks tokens
        del self.ids[len(self) - count :]
        self._read()

    def save(self, path: str | PathLike[str]) -> Path:
        """Write the prefix as one safetensors file, for ``load_prefix``. The file holds the tokens.

        Raises:
            InputError: this names no file.
            OutputError: the file cannot be written; what stood there is unharmed.
        """
        path = as_path("the file of a prefix", path)
        tensors = {"ids": torch.tensor(self.ids, device="cpu")} | _tensors(self.cache, self._marks)
        stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        kept = {state.dtype for state in self.cache.states if isinstance(state, KVState)} or {self.model.cache_dtype}
        metadata = {"format": _FORMAT, **_identity(self.model, kept.pop()), "weights": _weights_digest(self.model)}
        metadata["marks"] = json.dumps([mark.lengths[0] for mark in self._marks])
        files.write_atomically(path, lambda file: file.write(save(stored, metadata)))
        return path

    @torch.inference_mode()
    def _read(self) -> None:
        """Read what the cache lacks, in passes that end where states are noted."""
        wanted, chunk = len(self) - 1, 0
        while (held := self._cache.length) < wanted:
            chunk = chunk or choose_chunk(self.model, wanted - held)
            stop = min(wanted, held + chunk, (held // MARK_DISTANCE + 1) * MARK_DISTANCE)
            ids = torch.tensor([self.ids[held:stop]], device=self.model.device)
            self.model(ids, cache=self._cache, logits_to_keep=1)
            if stop % MARK_DISTANCE == 0:
                self._marks.append(self._cache.mark())

    @torch.inference_mode()
    def _return(self, length: int) -> None:
        """Return to the last mark of at most ``length`` tokens, where the cache holds more."""
        if self._cache.length > length:
            marks = [mark for mark in self._marks if mark.lengths[0] <= length]
            self._cache.rewind(marks[-1])
            self._marks = marks


def prefix(
    model: StripedHyena,
    tokenizer: Tokenizer,
    text: str | bytes | Sequence[int],
    *,
    special: bool = False,
    max_length: int | None = None,
) -> Prefix:
    """Read the beginning of a prompt, for any number of continuations: ``generate(…, prefix=…)``.

    Args:
        model: any StripedHyena.
        tokenizer: its tokenizer.
        text: text or bytes, tokenized as a prompt is, BOS included; or token ids, taken as they are.
        special: whether names of special tokens in the text become these tokens.
        max_length: the most tokens of the prefix; ``config.max_length`` unless given.

    Raises:
        InputError: an empty text, an id outside the vocabulary, or a text that passes the maximum length.
    """
    _require_model(model)
    if not isinstance(tokenizer, Tokenizer):
        raise InputError(f"tokenizer must be the one that hyaena.load returns, not {kind_of(tokenizer)}")
    ids = _encode(model, tokenizer, text, special, begin=True)
    limit = model.config.max_length if max_length is None else whole("max_length", max_length, "at least 1", 1)
    _check_length(len(ids), limit)
    made = Prefix(model, tokenizer, ids, model.make_cache(1), limit)
    made._read()
    return made


def load_prefix(path: str | PathLike[str], model: StripedHyena, tokenizer: Tokenizer | None = None) -> Prefix:
    """Read a prefix that ``Prefix.save`` wrote.

    Args:
        path: the file.
        model: the one that read the prefix: with the same configuration, the same weights and the same dtype.
        tokenizer: for ``Prefix.extend`` with text.

    Raises:
        CheckpointError: the file is missing or damaged, no prefix, or of another model; the message says which.
    """
    _require_model(model)
    with _opened(path) as (name, stored, metadata):
        _check_metadata(metadata, model, name)
        with _undamaged(name):
            tensors = {key: tensor.read() for key, tensor in stored.items()}
            positions = json.loads(metadata["marks"])
    try:
        made = _build(model, tokenizer, tensors, positions)
    except (KeyError, InputError, TypeError, RuntimeError) as error:
        reason = printable(str(error), limit=200)
        raise CheckpointError(f"the prefix {name} does not fit the model ({reason}): save it again") from error
    return made


def check_prefix(path: str | PathLike[str]) -> None:
    """Check that a file is a prefix, before its model is loaded.

    Raises:
        CheckpointError: the file is missing or damaged, or no prefix.
    """
    with _opened(path):
        pass


@contextmanager
def _opened(path: str | PathLike[str]) -> Iterator[tuple[str, dict[str, StoredTensor], Mapping[str, Any]]]:
    """The name of the file of a prefix for messages, its tensors, which are not read yet, and its metadata."""
    path = as_path("the file of a prefix", path)
    name = printable(str(path))
    if not path.exists():
        raise CheckpointError(f"the prefix {name} does not exist: save it again")
    with open_regular(path, "the file that Prefix.save wrote") as file:
        with _undamaged(name):
            stored, metadata = read_safetensors(file, max_header=MOST_HEADER)
        if metadata.get("format") != _FORMAT:
            raise CheckpointError(f"{name} is no prefix of this version of hyaena: make it with Prefix.save")
        yield name, stored, metadata


@contextmanager
def _undamaged(name: str) -> Iterator[None]:
    """Turn whatever a damaged file raises into one line."""
    try:
        yield
    except Exception as error:
        raise CheckpointError(f"the prefix {name} is damaged, or no safetensors file: save it again") from error


@torch.inference_mode()
def _build(
    model: StripedHyena, tokenizer: Tokenizer | None, tensors: dict[str, Tensor], positions: list[Any]
) -> Prefix:
    """The prefix that tensors of a file hold, each checked against what the model itself would make."""
    ids = token_ids(tensors["ids"])
    _check_ids(model, ids)
    length = len(ids) - 1
    limit = max(len(ids), model.config.max_length)
    made = Prefix(model, tokenizer, ids, model.make_cache(1, max_length=max(1, length)), limit)
    if not isinstance(positions, list) or positions != [*range(0, length + 1, MARK_DISTANCE)]:
        raise InputError("its notes for rollback are not where they should be")
    made._marks = [Mark((position,), made._cache.mark().parts) for position in positions]
    wanted = _tensors(made._cache, made._marks, copy=False)
    if wanted.keys() != tensors.keys() - {"ids"}:
        raise InputError("it has other tensors")
    for key, tensor in wanted.items():
        if (tensor.shape, tensor.dtype) != (tensors[key].shape, tensors[key].dtype):
            raise InputError(f"{key} has another shape or dtype")
        tensor.copy_(tensors[key])
    made._cache.lengths = [length]
    made._cache.limits = list[int | None]([None])
    return made


def _tensors(cache: Cache, marks: Sequence[Mark], *, copy: bool = True) -> dict[str, Tensor]:
    """All numbers of a cache of one row and of its marks, by name. Keys and values are cut to what the row holds."""
    row = cache.select([0], max_length=max(1, cache.length)) if copy else cache
    named = {f"layers.{i}.{j}": t for i, state in enumerate(row.states) for j, t in enumerate(state.tensors())}
    for mark in marks:
        named |= {f"marks.{mark.lengths[0]}.{j}": t for j, t in enumerate(mark.tensors())}
    return {name: torch.view_as_real(t) if t.is_complex() else t for name, t in named.items()}  # files have real ones


def _identity(model: StripedHyena, cache_dtype: torch.dtype) -> dict[str, str]:
    """What must be equal for a cache of this dtype to fit a model, beside its weights."""
    config = json.dumps(model.config.to_dict(), sort_keys=True)
    dtype, kept = (str(dtype).removeprefix("torch.") for dtype in (model.dtype, cache_dtype))
    return {"config": config, "dtype": dtype, "cache_dtype": kept}


def _weights_digest(model: StripedHyena) -> str:
    """SHA-256 of all weights, with their names, shapes and dtypes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(uncompiled(model).state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _check_metadata(metadata: Mapping[str, Any], model: StripedHyena, name: str) -> None:
    found = _identity(model, model.cache_dtype)
    if metadata.get("config") != found["config"]:
        raise CheckpointError(f"the prefix {name} was read by a model of another configuration: read its text again")
    if metadata.get("dtype") != found["dtype"]:
        dtype = printable(str(metadata.get("dtype")), limit=20)
        raise CheckpointError(f"the prefix {name} was read in {dtype}: load the model with dtype={dtype!r}")
    kept = metadata.get("cache_dtype", found["dtype"])  # files of older versions do not say
    if kept != found["cache_dtype"] and model._kv_shapes():  # without keys and values it means nothing
        kept = printable(kept, limit=20)
        raise CheckpointError(
            f"the prefix {name} holds keys and values in {kept}, and the model's caches are {found['cache_dtype']}: "
            f"load the model with cache_dtype={kept!r}"
        )
    if metadata.get("weights") != _weights_digest(model):
        raise CheckpointError(f"the prefix {name} was read by a model with other weights: read its text again")


def _encode(
    model: StripedHyena, tokenizer: Tokenizer | None, text: str | bytes | Iterable[int], special: bool, *, begin: bool
) -> list[int]:
    """The ids of a text, or ids as they are, checked."""
    if isinstance(text, bytearray) or (isinstance(text, memoryview) and text.itemsize == 1):
        text = bytes(text)
    if isinstance(text, str | bytes):
        if tokenizer is None:
            raise InputError("the prefix has no tokenizer for text: extend it with ids, or load it with a tokenizer")
        ids = tokenizer.encode(text, special=special, add_special_tokens=begin)
    else:
        ids = token_ids(text, "the token ids of a prefix")
    if not ids:
        raise InputError("the text of a prefix is empty: give it some")
    _check_ids(model, ids)
    return ids


def _require_model(model: Any) -> None:
    if isinstance(model, type) or not hasattr(model, "make_cache") or not hasattr(model, "config"):
        raise InputError(f"model must be a StripedHyena, not {kind_of(model)}")


def _check_ids(model: StripedHyena, ids: Sequence[int]) -> None:
    size = model.config.vocab_size
    if not ids or min(ids) < 0 or max(ids) >= size:
        raise InputError(f"the ids of a prefix must lie in the vocabulary 0..{size - 1} of the model")


def _check_length(length: int, limit: int) -> None:
    if length > limit:
        raise InputError(
            f"{length} tokens pass the maximum length {limit}: shorten the prefix, or make it with a larger max_length"
        )
