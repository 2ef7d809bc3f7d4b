"""The options of a generation and its prompts, checked before any work is done."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypedDict

from hyaena.arguments import as_whole, kind_of, require_ids, switch, whole
from hyaena.decoding import Decoding
from hyaena.errors import InputError, shown
from hyaena.generation.loop import Progress
from hyaena.generation.prefixes import Prefix
from hyaena.ops import capabilities
from hyaena.sampling import SamplingParams
from hyaena.tokenizers import Tokenizer, token_ids
from hyaena.tokenizers.base import as_list

Seed = int | Sequence[int | None] | None

MAX_SAMPLES = 1 << 20
"""Most samples of a prompt in one call, whose results are in memory together."""


class RowOptions(TypedDict, total=False):
    """The options of ``stream`` and ``generate`` but ``n``, for type checkers; ``stream`` describes them."""

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    logit_bias: Mapping[int, float] | None
    allowed_tokens: str | Sequence[int] | None
    seed: Seed
    stop: str | Iterable[str] | None
    stop_token_ids: Sequence[int] | None
    stop_at_eos: bool
    special: bool
    prefix: Prefix | None
    logprobs: int
    method: str
    decoding: Decoding
    max_length: int | None
    prefill_chunk: int | None
    progress: Progress | None


class Options(RowOptions, total=False):
    """All options."""

    n: int | None


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The options of ``stream``, with their defaults, as far as they can be checked without a model.

    Raises:
        InputError: an option has the wrong type or is out of range.
        UnsupportedError: an unknown method.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] | None = None
    allowed_tokens: str | Sequence[int] | None = None
    seed: Seed = None
    stop: str | Iterable[str] | None = ()
    stop_token_ids: Sequence[int] | None = ()
    stop_at_eos: bool = True
    special: bool = False
    prefix: Prefix | None = None
    logprobs: int = 0
    method: str = "auto"
    decoding: Decoding = "auto"
    max_length: int | None = None
    prefill_chunk: int | None = None
    progress: Progress | None = None
    n: int | None = None

    def __post_init__(self) -> None:
        checked: dict[str, Any] = {
            "max_new_tokens": _at_least_1("max_new_tokens", self.max_new_tokens),
            "logprobs": whole("logprobs", self.logprobs, "a whole number, 0 or more", 0),
            "stop": _stop_strings(self.stop),
            "stop_token_ids": ()
            if self.stop_token_ids is None
            else tuple(token_ids(self.stop_token_ids, "stop_token_ids")),
            "stop_at_eos": switch("stop_at_eos", self.stop_at_eos),
            "special": switch("special", self.special),
            "seed": _seeds(self.seed),
            "allowed_tokens": _allowed_tokens(self.allowed_tokens),
        }
        for name in ("max_length", "prefill_chunk"):
            if getattr(self, name) is not None:
                checked[name] = _at_least_1(name, getattr(self, name))
        if self.n is not None:
            checked["n"] = whole("n", self.n, f"between 1 and {MAX_SAMPLES:,}", 1, MAX_SAMPLES)
        for name in ("method", "decoding"):
            if not isinstance(getattr(self, name), str):
                raise InputError(f"{name} must be a name, not {shown(getattr(self, name))}")
        if self.prefix is not None and not isinstance(self.prefix, Prefix):
            raise InputError(f"prefix must be made by hyaena.prefix, not {kind_of(self.prefix)}")
        if capabilities(self.method).state == "window" and self.prefix is not None:
            raise InputError(f"a prefix keeps no windows of inputs, from which {self.method!r} goes on: choose another")
        if self.progress is not None and not callable(self.progress):
            raise InputError(f"progress must be a function of two numbers, not {shown(self.progress)}")
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        for seed in self.seeds(len(self.seed)) if isinstance(self.seed, tuple) else [self.seed]:
            self.sampling(seed)

    def seeds(self, count: int) -> list[int | None]:
        """The seed of each of ``count`` rows.

        Raises:
            InputError: there is a list of seeds of another length.
        """
        if not isinstance(self.seed, tuple):
            return [self.seed] * count  # pyright: ignore[reportReturnType]  a number or None
        if len(self.seed) != count:
            raise InputError(f"{len(self.seed)} seeds for {count} prompts: give one, or one per prompt")
        return list(self.seed)

    def allowed_ids(self, tokenizer: Tokenizer, enders: Iterable[int], vocab_size: int) -> list[int] | None:
        """The ids that ``allowed_tokens`` allows, with the tokens that end a row; None where it allows all.

        Raises:
            InputError: characters that are no tokens of their own.
        """
        if self.allowed_tokens is None:
            return None
        ids = self.allowed_tokens
        if isinstance(ids, str):
            ids = [token for token in tokenizer.tokens_within(ids) if token < vocab_size]
        return [*dict.fromkeys([*ids, *(token for token in enders if token < vocab_size)])]

    def sampling(self, seed: Any, allowed: Sequence[int] | None = None) -> SamplingParams:
        """The sampling parameters of a row, which may choose the ``allowed`` ids only."""
        return SamplingParams(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            logit_bias=() if self.logit_bias is None else self.logit_bias,
            allowed_tokens=allowed,
            seed=seed,
        )

    def repeats(self, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        """For each of the ``n`` samples of each prompt, its number among the rows of equal prompts with the same seed.

        Rows with a list of seeds have exactly their own, so that equal seeds give equal rows.
        """
        if isinstance(self.seed, tuple):
            return [[*range(self.n or 1)] for _ in prompts]
        return repeats(prompts, self.n or 1)


def repeats(prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    """For each of so many samples of each prompt, its number among the samples of all equal prompts.

    The first samples of all prompts are counted first, so that they are what one sample of each gives.
    """
    equal, before = Counter(map(tuple, prompts)), Counter[tuple[int, ...]]()
    found = []
    for prompt in map(tuple, prompts):
        found.append([before[prompt] + sample * equal[prompt] for sample in range(count)])
        before[prompt] += 1
    return found


class _Sizes(Protocol):
    """The two fields of a ModelConfig that bound a prompt."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def max_length(self) -> int: ...


def parse_prompts(prompt: Any, *, allow_empty: bool = False) -> tuple[list[str | bytes | list[int]], bool]:
    """A list of prompts, and whether there was one that was not in a list. After a prefix, texts may be empty.

    Text is ``str`` or any bytes. Token ids come in any sequence: lists, ranges, iterators, numpy arrays, tensors of one
    dimension. Several prompts are a list of texts, a list of such sequences, or an array of two dimensions.

    Raises:
        InputError: an empty prompt, or anything else.
    """
    if (text := _as_text(prompt)) is not None:
        if not allow_empty:
            _require_content(text)
        return [text], True
    problem = "a prompt is text, bytes, a list of token ids, or a list of such, not "
    if isinstance(prompt, io.IOBase):
        raise InputError(problem + f"{kind_of(prompt)}: read the file first")
    items = as_list(prompt, problem)
    _require_content(items)
    texts = [_as_text(item) for item in items]
    if all(text is not None for text in texts):
        prompts: list[Any] = texts
    elif all(_is_list(item) for item in items):
        prompts = [token_ids(item, "the token ids of a prompt") for item in items]
    elif any(text is not None for text in texts) or any(map(_is_list, items)):
        raise InputError("a list of prompts must be all texts or all lists of token ids")
    else:
        wrong = [item for item in items if as_whole(item) is None]
        if wrong:
            raise InputError(f"a prompt is text or whole numbers, and one of its items is {shown(wrong[0])}")
        return [token_ids(items)], True
    for one in prompts:
        if not allow_empty or isinstance(one, list):
            _require_content(one)
    return prompts, False


def encode_prompts(
    tokenizer: Tokenizer, config: _Sizes, prompts: Sequence[str | bytes | list[int]], settings: Settings
) -> list[list[int]]:
    """The token ids of each prompt, those of the prefix in front, checked against the sizes of a model.

    Raises:
        InputError: the tokenizer does not fit the model, a text cannot be encoded, an id is outside the vocabulary, or
            a prompt and its completion pass the maximum length.
    """
    size = config.vocab_size
    if tokenizer.vocab_size < size:
        raise InputError(
            f"the tokenizer has {tokenizer.vocab_size} ids and the model {size}: "
            f"make the tokenizer with vocab_size={size}"
        )
    if settings.logprobs > size:
        raise InputError(f"logprobs must be between 0 and the vocabulary size {size}, not {shown(settings.logprobs)}")
    require_ids(settings.stop_token_ids or (), size, "stop_token_ids: ")
    limit = config.max_length if settings.max_length is None else settings.max_length
    before = [] if settings.prefix is None else settings.prefix.ids
    encoded = []
    for prompt in prompts:
        if isinstance(prompt, str | bytes):
            prompt = tokenizer.encode(prompt, special=settings.special, add_special_tokens=settings.prefix is None)
        require_ids(prompt, size)
        ids = [*before, *prompt]
        _require_content(ids)
        if len(ids) + settings.max_new_tokens > limit:
            raise InputError(
                f"{len(ids)} prompt tokens and max_new_tokens {shown(settings.max_new_tokens)} pass the maximum length "
                f"{shown(limit)}: shorten one of them, or pass a larger max_length"
            )
        encoded.append(ids)
    return encoded


def _at_least_1(name: str, value: Any) -> int:
    return whole(name, value, "at least 1", 1)


def _stop_strings(stop: Any) -> tuple[str, ...]:
    if stop is None:
        return ()
    if isinstance(stop, bytes | bytearray | memoryview | Mapping) or not isinstance(stop, Iterable):
        raise InputError(f"stop must be text or a list of texts, not {kind_of(stop)}; ids go into stop_token_ids")
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    for one in stops:
        if not isinstance(one, str):
            raise InputError(f"a stop string is text, not {shown(one)}: ids go into stop_token_ids")
        if not one:
            raise InputError("a stop string is empty: leave it out")
    return stops


def _allowed_tokens(tokens: Any) -> str | tuple[int, ...] | None:
    if tokens is None:
        return None
    if not isinstance(tokens, str):
        tokens = tuple(token_ids(tokens, "allowed_tokens"))
    if not tokens:
        raise InputError("allowed_tokens is empty: name characters or ids, or leave it out to allow all tokens")
    return tokens


def _seeds(seed: Any) -> Any:
    """A list of seeds as a tuple; anything else as it is, to be checked with the sampling parameters."""
    if as_whole(seed) is not None or isinstance(seed, str | bytes) or not hasattr(seed, "__iter__"):
        return seed
    return tuple(as_list(seed, "seed must be a whole number or a list of them, not "))


def _as_text(value: Any) -> str | bytes | None:
    """A text as str or bytes; None for anything else, such as a memoryview of larger items."""
    if isinstance(value, str | bytes):
        return value
    if isinstance(value, bytearray) or (isinstance(value, memoryview) and value.itemsize == 1):
        return bytes(value)
    return None


def _is_list(item: Any) -> bool:
    if _as_text(item) is not None:
        return False
    return hasattr(item, "__iter__") and as_whole(item) is None and getattr(item, "ndim", 1) > 0


def _require_content(prompt: Sequence[Any]) -> None:
    if not len(prompt):
        raise InputError("the prompt is empty: give it some text (or [tokenizer.bos_id], to begin from nothing)")
