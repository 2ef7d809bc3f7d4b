"""What the distributions under ``compat/`` share: originals of other packages, by their own names, over hyaena.

Nothing else of hyaena uses this module.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
import torch.distributed
from torch import Tensor, nn

from hyaena import layers, sampling
from hyaena.errors import InputError
from hyaena.sampling import SamplingParams

INITIAL_CAPACITY = 256
"""Tokens for which keys and values have room at first; the room then doubles."""


class Renamed(nn.Module):
    """Mixin for a module of hyaena whose parts are stored under other names, from its birth on.

    Attributes:
        names: hyaena's name of a part → the one that it is stored under.
    """

    names: ClassVar[dict[str, str]] = {}

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(self.names.get(name, name))

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(self.names.get(name, name), value)

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        super().register_buffer(self.names.get(name, name), tensor, persistent)


class RMSNorm(Renamed, layers.RMSNorm):
    """hyaena's RMSNorm with the parameter ``scale``."""

    names: ClassVar = {"weight": "scale"}


class ParallelGatedMLP(Renamed, layers.GatedMLP):
    """hyaena's gated MLP, ``l3(act(l1(x)) · l2(x))``."""

    names: ClassVar = {"gate_proj": "l1", "up_proj": "l2", "down_proj": "l3"}


class dotdict(dict):
    """A dictionary whose items are attributes, too; a missing attribute is None.

    ``Loader``, which programs hand on from ``yaml.load``, is not an item.
    """

    def __init__(self, *args: Any, Loader: Any = None, **items: Any) -> None:
        super().__init__(*args, **items)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copy and pickle look for special methods, and None is not one
            raise AttributeError(name)
        return self.get(name)

    def to_dict(self) -> dict[str, Any]:
        """A plain dictionary; libraries such as PEFT read a model's configuration by this method."""
        return dict(self)

    __setattr__ = dict.__setitem__  # type: ignore[assignment]
    __delattr__ = dict.__delitem__  # type: ignore[assignment]


def print_rank_0(message: object, debug: bool = False, end: str = "\n") -> None:
    """Print, in the first of several processes only."""
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        print(message, flush=True, end=end)


class CharLevelTokenizer:
    """Bytes as ids: text is UTF-8, 0 ends a document, 1 pads.

    ``detokenize(tokenize(text)) == text`` for every text without the bytes 0 and 1. The originals wrote control
    characters as spaces, and every byte of a character beyond ASCII as a character of its own.
    """

    def __init__(self, vocab_size: int = 512) -> None:
        self.name = "CharLevelTokenizer"
        self.vocab_size = vocab_size
        self.eod_id = self.eos_id = self.eod = self.eos = 0
        self.pad_id = 1

    def tokenize(self, text: str) -> list[int]:
        return list(text.encode())

    def tokenize_batch(self, text_batch: Sequence[str] | str) -> list[list[int]] | list[int]:
        if isinstance(text_batch, str):
            return self.tokenize(text_batch)
        return [self.tokenize(text) for text in text_batch]

    def decode_token(self, token: int) -> str:
        return self.detokenize([token])

    def detokenize(self, token_ids: Iterable[int] | Tensor) -> str:
        """The text of ids; 0, 1 and ids from 256 on stand for none, and bytes that are no UTF-8 become U+FFFD."""
        ids = token_ids.tolist() if isinstance(token_ids, Tensor) else token_ids
        return bytes(int(token) for token in ids if 1 < token < 256).decode(errors="replace")

    def detokenize_batch(self, token_ids: Iterable[Iterable[int]] | Tensor) -> list[str]:
        rows = token_ids.tolist() if isinstance(token_ids, Tensor) else token_ids
        return [self.detokenize(row) for row in rows]


def sample(logits: Tensor, top_k: int = 1, top_p: float = 0.0, temperature: float = 1.0) -> Tensor:
    """Choose one token per row, with torch's global random numbers (``torch.manual_seed``).

    Args:
        logits: [B,V]; not changed. Tokens at -infinity are never chosen.
        top_k: 1 takes the most probable token, 0 keeps all, k the k most probable.
        top_p: of those, keep the most probable that reach this probability together; 0 and 1 keep all.
        temperature: 0 takes the most probable token.

    Returns:
        int64 [B].

    Raises:
        InputError: a value outside its range.
        NonFiniteError: a row holds NaN or +infinity, or nothing but -infinity. The originals chose some token.
    """
    if top_k == 1:
        params = SamplingParams()
    else:
        params = SamplingParams(temperature=temperature, top_k=top_k, top_p=1.0 if top_p == 0 else top_p)
    rows = len(logits)
    return sampling.sample(logits, [params] * rows, [torch.default_generator] * rows)


def with_room(stored: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Keys and values of at least this shape [B,capacity,2,G,head_dim], with what was stored in the first slots."""
    rows, needed, _, groups, width = shape
    with torch.inference_mode(False):  # storage that is made in inference mode could not be written outside of it
        if stored is not None and stored.shape[1] >= needed:
            return stored.clone() if stored.is_inference() else stored
        capacity = max(needed, INITIAL_CAPACITY if stored is None else 2 * stored.shape[1])
        storage = torch.zeros(2, rows, groups, capacity, width, dtype=dtype, device=device)  # each head in one piece
        new = storage.permute(1, 3, 0, 2, 4)
        if stored is not None:
            new[:, : stored.shape[1]] = stored
        return new


def leading_mask(padding_mask: Tensor, shape: tuple[int, ...], *, cached: bool) -> Tensor:
    """The mask of the padding on the left alone: in a causal model, nothing sees what stands on the right.

    Args:
        padding_mask: [B,T], nonzero where there is a token.
        shape: B and T of the inputs.
        cached: the inputs go into a cache, which would store what stands on the right.

    Raises:
        InputError: another shape, or padding elsewhere.
    """
    if not isinstance(padding_mask, Tensor) or padding_mask.shape != shape:
        given = tuple(padding_mask.shape) if isinstance(padding_mask, Tensor) else type(padding_mask).__name__
        raise InputError(f"padding_mask must be a tensor of the shape of the ids, {tuple(shape)}, and is {given}")
    mask = padding_mask.to(torch.bool)
    begun, ended = mask.cumsum(1) > 0, mask.flip(1).cumsum(1).flip(1) == 0
    if bool((begun & ~ended & ~mask).any()):
        raise InputError("padding_mask hides tokens between others: padding stands on the left or on the right")
    if cached and bool((begun & ended).any()):
        raise InputError("with inference_params_dict padding stands on the left: tokens on the right would be stored")
    return begun
