"""From a prompt to text: ``generate`` for the whole, ``stream`` for token by token; one prompt or a list.

A row of a batch is that row alone: it has its own parameters, its own random numbers and its own memory in the
cache.
"""

from __future__ import annotations

import operator
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, Unpack, overload

from torch import Tensor

from hyaena.decoding import Decoding, resolve_decoding
from hyaena.errors import InputError
from hyaena.generation.chunks import MIN_PREFILL_CHUNK, PREFILL_CHUNK, choose_chunk
from hyaena.generation.loop import Event, FinishReason, GenerationLoop, Progress, Row, Stats
from hyaena.generation.stop_strings import StopStringFilter
from hyaena.model import StripedHyena
from hyaena.ops import capabilities
from hyaena.sampling import SamplingParams
from hyaena.tokenizers import Tokenizer

__all__ = [
    "MIN_PREFILL_CHUNK",
    "PREFILL_CHUNK",
    "Completion",
    "Event",
    "Options",
    "Stats",
    "choose_chunk",
    "generate",
    "stream",
]

Prompt = str | bytes | Sequence[int]


@dataclass(frozen=True, kw_only=True)
class Completion:
    """All events of one row.

    Attributes:
        text: the completion, without EOS and without the stop string that ended it.
        tokens: every id that was chosen, EOS and those of a stop string included.
        finish_reason: ``"eos"``, ``"stop"`` or ``"length"``.
        logprobs: the log-probability of each token.
        top_logprobs: per token, the most probable (id, log-probability) pairs; empty unless asked for.
        stats: see Stats.
    """

    text: str
    tokens: list[int]
    finish_reason: FinishReason
    logprobs: list[float]
    top_logprobs: list[tuple[tuple[int, float], ...]]
    stats: Stats


class Options(TypedDict, total=False):
    """The options of ``stream`` and ``generate``; ``stream`` says what they mean."""

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int | Sequence[int | None] | None
    stop: str | Sequence[str]
    stop_at_eos: bool
    logprobs: int
    method: str
    decoding: Decoding
    max_length: int | None
    prefill_chunk: int | None
    progress: Progress | None


def stream(
    model: StripedHyena,
    tokenizer: Tokenizer,
    prompt: Prompt | Sequence[Prompt],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int | Sequence[int | None] | None = None,
    stop: str | Sequence[str] = (),
    stop_at_eos: bool = True,
    logprobs: int = 0,
    method: str = "auto",
    decoding: Decoding = "auto",
    max_length: int | None = None,
    prefill_chunk: int | None = None,
    progress: Progress | None = None,
) -> Iterator[Event]:
    """Continue a prompt, or a list of prompts, token by token. Mistakes in the arguments raise here, at the call.

    Args:
        model: any StripedHyena, on any device.
        tokenizer: its tokenizer.
        prompt: text, bytes or token ids (taken as they are, nothing is put in front), or a list of such.
        max_new_tokens: stop after so many, with finish_reason ``"length"``.
        temperature: 0, the default, is greedy: the same prompt gives the same text. See ``SamplingParams`` for this
            and the next four.
        top_k: keep the k most probable tokens; 0 keeps all.
        top_p: keep the most probable tokens that together reach this probability.
        min_p: drop tokens with less than this fraction of the best one's probability.
        repetition_penalty: above 1 makes tokens of the prompt and the completion less probable.
        seed: one for every row (so a row is the same in any batch), or one per row; None draws anew each time.
        stop: strings that end a row; neither they nor what follows them is ever part of the text.
        stop_at_eos: end a row at the tokenizer's EOS.
        logprobs: how many alternatives to report with each token.
        method: how long convolutions of the prompt are evaluated (``ops.METHODS``); single steps choose themselves,
            from what it left behind.
        decoding: how single steps are evaluated: ``"eager"`` calls the model, ``"static"`` steps on fixed memory,
            ``"cuda_graph"`` does so as one CUDA graph, on CUDA devices; ``"auto"`` is the last where it can be done and
            the first elsewhere.
        max_length: the most tokens of prompt and completion together; ``config.max_length`` unless given.
        prefill_chunk: the most tokens of prompts that one pass reads; unless given 512 on a CPU, on CUDA devices 2,048
            to 32,768, as memory allows, and 2,048 elsewhere.
        progress: called as ``progress(tokens read, tokens of all prompts)`` after each pass.

    Yields:
        Events; the rows of a list advance together.

    Raises:
        InputError: an empty prompt, an id outside the vocabulary, a prompt too long, an option out of range.
        UnsupportedError: an unknown method, or a way of decoding that this model or device does not allow.
        NonFiniteError: the model produced NaN or infinity; the message names the layer. Raised while iterating.
    """
    began = time.perf_counter()
    for name, value in (("max_new_tokens", max_new_tokens), ("prefill_chunk", prefill_chunk)):
        if value is not None and value < 1:
            raise InputError(f"{name} must be at least 1, not {value}")
    if not 0 <= logprobs <= model.config.vocab_size:
        raise InputError(f"logprobs must be between 0 and the vocabulary size {model.config.vocab_size}")
    if tokenizer.vocab_size < model.config.vocab_size:
        raise InputError(
            f"the tokenizer has {tokenizer.vocab_size} ids and the model {model.config.vocab_size}: "
            f"make the tokenizer with vocab_size={model.config.vocab_size}"
        )
    capabilities(method)
    decoding = resolve_decoding(model, decoding, method)
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if "" in stops:
        raise InputError("a stop string is empty: leave it out")
    prompts, _ = _as_list(prompt)
    seeds = list(seed) if isinstance(seed, Sequence) else [seed] * len(prompts)
    if len(seeds) != len(prompts):
        raise InputError(f"{len(seeds)} seeds for {len(prompts)} prompts: give one, or one per prompt")
    limit = model.config.max_length if max_length is None else max_length
    rows = []
    for index, (one, own_seed) in enumerate(zip(prompts, seeds, strict=True)):
        ids = _encode(tokenizer, one, model.config.vocab_size)
        if len(ids) + max_new_tokens > limit:
            raise InputError(
                f"{len(ids)} prompt tokens and max_new_tokens {max_new_tokens} pass the maximum length {limit}: "
                "shorten one of them, or pass a larger max_length"
            )
        params = SamplingParams(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=own_seed,
        )
        eos_id = tokenizer.eos_id if stop_at_eos else None
        rows.append(Row(index, ids, params, StopStringFilter(tokenizer, ids, stops), eos_id, max_new_tokens))
    if prefill_chunk is None:
        longest = max(len(row.prompt) for row in rows)
        prefill_chunk = choose_chunk(model, len(rows) * (longest + max_new_tokens))
    run = GenerationLoop(
        model, rows, method=method, decoding=decoding, chunk=prefill_chunk, top=logprobs, progress=progress
    )
    run.seconds = time.perf_counter() - began
    return run.events()


@overload
def generate(model: StripedHyena, tokenizer: Tokenizer, prompt: Prompt, **options: Unpack[Options]) -> Completion: ...
@overload
def generate(
    model: StripedHyena,
    tokenizer: Tokenizer,
    prompt: list[str] | list[bytes] | list[list[int]],
    **options: Unpack[Options],
) -> list[Completion]: ...
def generate(
    model: StripedHyena, tokenizer: Tokenizer, prompt: Any, **options: Unpack[Options]
) -> Completion | list[Completion]:
    """Continue a prompt to its end: ``stream``, collected.

    Args:
        model: any StripedHyena.
        tokenizer: its tokenizer.
        prompt: one prompt, or a list of prompts.
        options: those of ``stream``, which explains them; by default greedy, at most 256 new tokens.

    Returns:
        A Completion, or a list of them for a list of prompts.

    Raises:
        What ``stream`` raises.
    """
    prompts, single = _as_list(prompt)
    events: list[list[Event]] = [[] for _ in prompts]
    for event in stream(model, tokenizer, prompts, **options):
        events[event.index].append(event)
    completions = [_collect(row) for row in events]
    return completions[0] if single else completions


def _collect(events: list[Event]) -> Completion:
    last = events[-1]
    assert last.finish_reason is not None and last.stats is not None
    return Completion(
        text="".join(event.text for event in events),
        tokens=[event.token for event in events],
        finish_reason=last.finish_reason,
        logprobs=[event.logprob for event in events],
        top_logprobs=[event.top_logprobs for event in events if event.top_logprobs],
        stats=last.stats,
    )


def _as_list(prompt: Any) -> tuple[list[Prompt], bool]:
    """A list of prompts, and whether there was one that was not in a list."""
    if isinstance(prompt, Tensor):
        prompt = prompt.tolist()
    if isinstance(prompt, str | bytes):
        return [prompt], True
    items = list(prompt)
    if not items:
        raise InputError("the prompt is empty: give it at least one token")
    if all(isinstance(item, str | bytes) for item in items):
        return items, False
    nested = [not isinstance(item, str | bytes) and hasattr(item, "__len__") for item in items]
    if any(nested) and not all(nested):
        raise InputError("a list of prompts must be all texts or all lists of token ids")
    return (items, False) if all(nested) else ([items], True)


def _encode(tokenizer: Tokenizer, prompt: Prompt, vocab_size: int) -> list[int]:
    if not len(prompt):
        raise InputError("the prompt is empty: give it some text (or [tokenizer.bos_id], to begin from nothing)")
    if isinstance(prompt, str | bytes):
        ids = tokenizer.encode(prompt)
    else:
        try:
            ids = [operator.index(token) for token in prompt]
        except TypeError as error:
            raise InputError(f"a prompt is text or whole numbers: {error}") from error
    outside = next((token for token in ids if not 0 <= token < vocab_size), None)
    if outside is not None:
        raise InputError(f"token id {outside} is outside the vocabulary 0..{vocab_size - 1} of the model")
    return ids
