"""``generate`` and ``stream``: checks of their arguments, and the rows that they make of prompts."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar, Unpack, overload

from hyaena.arguments import kind_of
from hyaena.decoding import resolve_decoding
from hyaena.errors import InputError, nearest, shown
from hyaena.generation.chunks import choose_chunk
from hyaena.generation.loop import Event, FinishReason, GenerationLoop, Row, Stats
from hyaena.generation.settings import Options, RowOptions, Settings, encode_prompts, parse_prompts
from hyaena.generation.stop_strings import StopStringFilter
from hyaena.model import StripedHyena, uncompiled
from hyaena.tokenizers import Tokenizer

Prompt = str | bytes | bytearray | memoryview | Sequence[int]

_P = ParamSpec("_P")
_T = TypeVar("_T")


class CallError(InputError, TypeError):
    """A function was called with other arguments than it has; a TypeError, as Python itself raises for that."""


@dataclass(frozen=True, kw_only=True)
class Completion:
    """All events of one row.

    Attributes:
        text: the completion, without EOS and without the stop string that ended it.
        tokens: every id that was chosen, EOS and those of a stop string included.
        finish_reason: ``"eos"``, ``"stop"`` (a stop string or a stop token) or ``"length"``.
        logprobs: the log-probability of each token.
        top_logprobs: per token, the most probable (id, log-probability) pairs; empty with ``logprobs=0``.
        stats: see Stats.
    """

    text: str
    tokens: list[int]
    finish_reason: FinishReason
    logprobs: list[float]
    top_logprobs: list[tuple[tuple[int, float], ...]]
    stats: Stats


def _with_options(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Give a function of ``**options`` a signature that lists them, and report wrong arguments in one line."""
    own = [p for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD]
    options = [
        inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type)
        for field in dataclasses.fields(Settings)
    ]
    signature = inspect.signature(function).replace(parameters=[*own, *options])
    name = function.__name__

    @functools.wraps(function)
    def checked(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        unknown = next((key for key in kwargs if key not in signature.parameters), None)
        if unknown is not None:
            near = nearest(unknown, signature.parameters)
            hint = f"did you mean {near}?" if near else f"it has {', '.join(option.name for option in options)}"
            raise CallError(f"{name}() has no option {shown(unknown)}: {hint}")
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise CallError(f"{name}(): {error}; call {name}(model, tokenizer, prompt, option=value, …)") from None
        _check_order(name, *(bound.arguments[own_parameter.name] for own_parameter in own))
        return function(*args, **kwargs)

    checked.__signature__ = signature  # pyright: ignore[reportAttributeAccessIssue]
    return checked


@_with_options
def stream(
    model: StripedHyena, tokenizer: Tokenizer, prompt: Prompt | Sequence[Prompt], **options: Unpack[Options]
) -> Iterator[Event]:
    """Continue a prompt, or a list of prompts, token by token. Mistakes in the arguments raise here, at the call.

    Rows of one call are independent samples, and a row's tokens depend on nothing but its own prompt, options and seed.
    Equal prompts in one call with one seed are told apart by their order: the first is what the prompt gives alone.
    Equal prompts are read once. So ``n=3`` gives, and costs, what ``[prompt] * 3`` does.

    Args:
        model: any StripedHyena, on any device.
        tokenizer: its tokenizer.
        prompt: text, bytes or token ids (taken as they are, nothing is put in front), or a list of such.
        max_new_tokens: stop after so many, with finish_reason ``"length"``.
        temperature: 0, the default, is greedy: the same prompt gives the same text. See ``SamplingParams`` for this
            and the next five.
        top_k: keep the k most probable tokens; 0 keeps all.
        top_p: keep the most probable tokens that together reach this probability.
        min_p: drop tokens with less than this fraction of the best one's probability.
        repetition_penalty: above 1 makes tokens of the prompt and the completion less probable.
        logit_bias: id -> a number, at most 100, that is added to the token's logit; -100 and less forbid the token.
        allowed_tokens: only these are chosen, and the tokens that end a row: EOS (unless ``stop_at_eos=False``) and
            ``stop_token_ids``. Ids, or a text such as ``"ACGT"``: then all tokens whose text has no other characters.
        seed: makes a call reproducible: one for the call, from which each row draws numbers of its own; or one per row,
            each of which gives what its prompt gives alone with that seed. None draws others each time.
        stop: strings that end a row; neither they nor what follows them is ever part of the text. A stop string that is
            the name of a special token, such as ``"</s>"``, also stops at that token.
        stop_token_ids: ids that end a row, with finish_reason ``"stop"``.
        stop_at_eos: end a row at any of the tokenizer's EOS ids, with finish_reason ``"eos"``.
        special: whether names of special tokens in a prompt's text become these tokens. By default they are text.
        prefix: what stands before every prompt, read once (``hyaena.prefix``). A prompt is then tokenized by itself,
            without BOS, and may be an empty text. Figures and limits count the prefix.
        logprobs: how many alternatives to report with each token.
        method: how long convolutions of the prompt are evaluated (``ops.METHODS``); single steps choose themselves,
            from the state that it left.
        decoding: how single steps are evaluated: ``"eager"`` calls the model, ``"static"`` steps on fixed memory,
            ``"cuda_graph"`` does so as one CUDA graph, on CUDA devices; ``"auto"`` is the last where it is supported
            and the first elsewhere.
        max_length: the most tokens of prompt and completion together; ``config.max_length`` unless given.
        prefill_chunk: the most tokens of prompts that one pass reads; unless given 512 on a CPU, on CUDA devices 2,048
            to 32,768, as memory allows, and 2,048 elsewhere.
        progress: called as ``progress(tokens read, tokens of all prompts)`` after each pass.
        n: samples of each prompt, which differ where the temperature is above 0. Sample s of prompt p is row p·n + s.

    Yields:
        Events; the rows of a list advance together.

    Raises:
        InputError: an empty prompt, an id outside the vocabulary, a prompt too long, an unknown option or one out of
            range, arguments in another order.
        UnsupportedError: an unknown method, or a way of decoding that this model or device does not allow.
        NonFiniteError: the model produced NaN or infinity; the message names the layer. Raised while iterating.
    """
    settings = Settings(**options)
    return _start(model, tokenizer, _parse(prompt, settings)[0], settings)


Prompts = list[str] | list[bytes] | list[list[int]]


@overload
def generate(
    model: StripedHyena, tokenizer: Tokenizer, prompt: Prompt, **options: Unpack[RowOptions]
) -> Completion: ...
@overload
def generate(
    model: StripedHyena, tokenizer: Tokenizer, prompt: Prompts, **options: Unpack[RowOptions]
) -> list[Completion]: ...
@overload
def generate(
    model: StripedHyena, tokenizer: Tokenizer, prompt: Prompt, *, n: int, **options: Unpack[RowOptions]
) -> list[Completion]: ...
@overload
def generate(
    model: StripedHyena, tokenizer: Tokenizer, prompt: Prompts, *, n: int, **options: Unpack[RowOptions]
) -> list[list[Completion]]: ...
@_with_options
def generate(
    model: StripedHyena, tokenizer: Tokenizer, prompt: Any, **options: Unpack[Options]
) -> Completion | list[Completion] | list[list[Completion]]:
    """Continue a prompt, or a list of prompts, to the end: ``stream``, collected.

    Args:
        model: any StripedHyena.
        tokenizer: its tokenizer.
        prompt: one prompt, or a list of prompts.
        options: those of ``stream``, which describes them; by default greedy, at most 256 new tokens.

    Returns:
        A Completion, or a list of them for a list of prompts; with ``n``, a list of n Completions in the place of each.

    Raises:
        The errors of ``stream``.
    """
    settings = Settings(**options)
    prompts, single = _parse(prompt, settings)
    samples = settings.n or 1
    events: list[list[Event]] = [[] for _ in range(len(prompts) * samples)]
    for event in _start(model, tokenizer, prompts, settings):
        events[event.index].append(event)
    rows = [_collect(row) for row in events]
    completions = rows if settings.n is None else [rows[i : i + samples] for i in range(0, len(rows), samples)]
    return completions[0] if single else completions  # pyright: ignore[reportReturnType]


def _parse(prompt: Any, settings: Settings) -> tuple[list[str | bytes | list[int]], bool]:
    return parse_prompts(prompt, allow_empty=settings.prefix is not None)


def _start(
    model: StripedHyena, tokenizer: Tokenizer, prompts: list[str | bytes | list[int]], settings: Settings
) -> Iterator[Event]:
    """Check everything that is left to check, and begin."""
    began = time.perf_counter()
    if settings.prefix is not None and uncompiled(settings.prefix.model) is not uncompiled(model):
        raise InputError("the prefix was read by another model: make it with hyaena.prefix and this one")
    seeds = settings.seeds(len(prompts))
    encoded = encode_prompts(tokenizer, model.config, prompts, settings)
    decoding = resolve_decoding(model, settings.decoding, settings.method)
    stops: tuple[str, ...] = settings.stop  # pyright: ignore[reportAssignmentType]  a tuple since it was checked
    special = tokenizer.special_tokens
    stop_ids = frozenset(settings.stop_token_ids or ()) | {special[stop] for stop in stops if stop in special}
    eos_ids = frozenset(tokenizer.eos_ids if settings.stop_at_eos else ())
    allowed = settings.allowed_ids(tokenizer, [*eos_ids, *stop_ids], model.config.vocab_size)
    settings.sampling(None, allowed).bias(model.config.vocab_size)
    rows: list[Row] = []
    for ids, seed, repeats in zip(encoded, seeds, settings.repeats(encoded), strict=True):
        params = settings.sampling(seed, allowed)
        rows += [
            Row(
                index=len(rows) + sample,
                prompt=ids,
                params=params,
                text=StopStringFilter(tokenizer, ids, stops),
                eos_ids=eos_ids,
                stop_ids=stop_ids,
                max_new_tokens=settings.max_new_tokens,
                repeat=repeat,
            )
            for sample, repeat in enumerate(repeats)
        ]
    longest = max(len(row.prompt) for row in rows)
    run = GenerationLoop(
        model,
        rows,
        prefix=None if settings.prefix is None else settings.prefix.cache,
        method=settings.method,
        decoding=decoding,
        chunk=settings.prefill_chunk or choose_chunk(model, len(rows) * (longest + settings.max_new_tokens)),
        top=settings.logprobs,
        progress=settings.progress,
    )
    run.seconds = time.perf_counter() - began
    return run.events()


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


def _check_order(name: str, model: Any, tokenizer: Any, prompt: Any) -> None:
    """Name arguments in the wrong place.

    Raises:
        InputError: the model is not one, or the tokenizer is not one.
    """
    call = f"call {name}(model, tokenizer, prompt)"
    if isinstance(model, Tokenizer) and _is_model(tokenizer):
        raise InputError(f"the model and the tokenizer are swapped: {call}")
    if _is_model(model) and isinstance(prompt, Tokenizer):
        raise InputError(f"the tokenizer and the prompt are swapped: {call}")
    if isinstance(model, tuple | list | str):
        raise InputError(f"model is {kind_of(model)}: load it with `model, tokenizer = hyaena.load(…)` and {call}")
    if not _is_model(model):
        raise InputError(f"model must be a StripedHyena, not {kind_of(model)}: {call}")
    if not isinstance(tokenizer, Tokenizer):
        raise InputError(f"tokenizer must be the one that hyaena.load returns, not {kind_of(tokenizer)}: {call}")


def _is_model(value: Any) -> bool:
    """Also for what wraps a model and passes attributes on, such as a compiled one."""
    return not isinstance(value, type) and hasattr(value, "make_cache") and hasattr(value, "config")
