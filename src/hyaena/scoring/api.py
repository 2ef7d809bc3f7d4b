"""``score`` and ``embed`` for texts that are there, ``iter_scores`` and ``iter_embeddings`` for texts that come."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, overload

import numpy as np
import torch
from torch import Tensor

from hyaena.arguments import kind_of, switch, whole
from hyaena.errors import InputError, nearest, shown
from hyaena.generation.chunks import run_steps
from hyaena.generation.nonfinite import remedy, search_non_finite
from hyaena.model import StripedHyena, uncompiled
from hyaena.ops import capabilities
from hyaena.scoring import pooling, token_scores
from hyaena.scoring.places import HEAD, NORM, Layer, Place, find_place, watching
from hyaena.scoring.pooling import Collector, Pool, parse_pool
from hyaena.scoring.reader import Progress, Reader, Span, clip
from hyaena.scoring.records import Encoder, Excerpt, NonFiniteRecordError, Record, as_texts
from hyaena.scoring.token_scores import Score, TokenScorer, Wanted, logits_at_once, make_score
from hyaena.tokenizers import Tokenizer

Text = str | bytes | bytearray | memoryview | Sequence[int] | Excerpt
Output = Literal["numpy", "torch"]

MOST_EXPLAINED = 2**16
"""Tokens up to which a text whose logits are not finite is read again, to name the layer."""


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """How texts are read; ``iter_scores`` describes the options."""

    bos: bool | None = None
    special: bool = False
    both_strands: bool = False
    method: str = "auto"
    tokens_per_pass: int | None = None
    max_length: int | None = None
    output: Output = "numpy"
    progress: Progress | None = None

    def __post_init__(self) -> None:
        for name in ("special", "both_strands"):
            switch(name, getattr(self, name))
        if self.bos is not None:
            switch("bos", self.bos)
        for name in ("tokens_per_pass", "max_length"):
            if getattr(self, name) is not None:
                whole(name, getattr(self, name), "at least 1", 1)
        if not isinstance(self.method, str):
            raise InputError(f"method must be a name, not {shown(self.method)}")
        capabilities(self.method)
        if self.output not in ("numpy", "torch"):
            raise InputError(f"output must be numpy or torch, not {shown(self.output)}")
        if self.progress is not None and not callable(self.progress):
            raise InputError(f"progress must be a function of a number, not {shown(self.progress)}")

    def encoder(self, model: StripedHyena, tokenizer: Tokenizer) -> Encoder:
        return Encoder.of(
            model,
            tokenizer,
            bos=self.bos,
            special=self.special,
            both_strands=self.both_strands,
            max_length=self.max_length,
        )

    def reader(self, model: StripedHyena, depth: int) -> Reader:
        return Reader(
            model,
            depth=depth,
            tokens_per_pass=self.tokens_per_pass,
            method=self.method,
            progress=self.progress,
        )


@overload
def score(
    model: StripedHyena,
    tokenizer: Tokenizer,
    texts: list[str] | list[bytes] | list[list[int]],
    *,
    entropy: bool = True,
    rank: bool = True,
    top: int = 0,
    **options: Any,
) -> list[Score]: ...
@overload
def score(
    model: StripedHyena,
    tokenizer: Tokenizer,
    texts: Text,
    *,
    entropy: bool = True,
    rank: bool = True,
    top: int = 0,
    **options: Any,
) -> Score: ...
def score(
    model: StripedHyena,
    tokenizer: Tokenizer,
    texts: Any,
    *,
    entropy: bool = True,
    rank: bool = True,
    top: int = 0,
    **options: Any,
) -> Score | list[Score]:
    """Score a text, or a list of texts: log-probability, entropy and rank of every token.

    Args:
        model, tokenizer: see ``iter_scores``.
        texts: text, bytes or token ids, or a list of such.
        entropy, rank, top, options: see ``iter_scores``.

    Returns:
        A Score, or a list of them for a list of texts.

    Raises:
        The errors of ``iter_scores``.
    """
    return run_steps(score_steps(model, tokenizer, texts, entropy=entropy, rank=rank, top=top, **options))


def score_steps(
    model: StripedHyena, tokenizer: Tokenizer, texts: Any, **options: Any
) -> Generator[float, None, Score | list[Score]]:
    """``score`` in steps, between which other work may use the model.

    Yields:
        How many tokens were read since the step before; a pass through one layer counts as its share.

    Returns:
        What ``score`` returns.

    Raises:
        The errors of ``iter_scores``, at the first step or later.
    """
    items, single = as_texts(texts)
    scores = []
    for found in _scores(model, items, *_score_settings(model, tokenizer, **options)):
        if isinstance(found, tuple):
            scores.append(found[1])
        else:
            yield found
    return scores[0] if single else scores


def iter_scores(
    model: StripedHyena,
    tokenizer: Tokenizer,
    texts: Iterable[Text],
    *,
    entropy: bool = True,
    rank: bool = True,
    top: int = 0,
    **options: Any,
) -> Iterator[tuple[int, Score]]:
    """Score texts as they come, in bounded memory: no more of them are held than fit into a pass.

    Texts of unequal length are packed into passes without padding; a longer one goes through the model layer by layer.
    What a text gets depends on nothing but itself (in float32 to rounding).

    Args:
        model: any StripedHyena, on any device.
        tokenizer: its tokenizer.
        texts: an iterable of texts: str, bytes or token ids; ``scoring.Excerpt`` is read behind a context.
        entropy, rank: whether to compute these.
        top: how many of the most probable tokens at each position to report.
        bos: whether ``tokenizer.bos_id`` is put in front. None, the default, is what the tokenizer does for a text;
            token ids are taken as they are. Without it nothing predicts the first token, see ``Score``.
        special: whether names of special tokens in a text become these tokens. By default they are text.
        both_strands: texts are DNA; score the other strand as well and give the means, see ``Score.strands``.
        method: how long convolutions are evaluated (``ops.METHODS``).
        tokens_per_pass: the most tokens that one pass of the model reads; unless given 2,048 on a CPU, on CUDA devices
            2,048 to 32,768, as memory allows.
        max_length: the most tokens of a text; ``config.max_length`` unless given.
        output: ``"numpy"`` arrays or ``"torch"`` tensors, on the host.
        progress: called as ``progress(tokens read)`` after each pass.

    Yields:
        (index, Score) in the order of the texts.

    Raises:
        InputError: at the call, an unknown option, or one out of range.
        RecordError: while iterating, a text that cannot be read; it is an InputError with the number of the text.
        UnsupportedError: an unknown method.
        NonFiniteRecordError: the model produced NaN or infinity; the message names the text, and the layer.
    """
    made = _score_settings(model, tokenizer, entropy=entropy, rank=rank, top=top, **options)
    return (found for found in _scores(model, texts, *made) if isinstance(found, tuple))


def _score_settings(
    model: StripedHyena,
    tokenizer: Tokenizer,
    *,
    entropy: bool = True,
    rank: bool = True,
    top: int = 0,
    **options: Any,
) -> tuple[Encoder, ReadOptions, Wanted]:
    settings = _settings(model, options)
    size = model.config.vocab_size
    wanted = Wanted(
        entropy=switch("entropy", entropy),
        rank=switch("rank", rank),
        top=whole("top", top, f"between 0 and the vocabulary size {size}", 0, size),
    )
    return settings.encoder(model, tokenizer), settings, wanted


def _scores(
    model: StripedHyena, texts: Iterable[Text], encoder: Encoder, settings: ReadOptions, wanted: Wanted
) -> Iterator[tuple[int, Score] | float]:
    """The scores, and after every step the tokens that were read."""
    reader = settings.reader(model, len(model.layers) + 1)
    scorer = TokenScorer(model, wanted)
    first: Score | None = None
    reader.watch = lambda: watching(reader, [NORM], scorer.observe)
    for count, group in reader.read(encoder.records(texts)):
        for record in group:
            values = scorer.take(record)
            yield from _require_finite(model, record, values[0], settings.method)
            found = make_score(record, values, wanted, as_torch=settings.output == "torch")
            if settings.both_strands and not record.reverse:
                first = found
                continue
            yield record.index, found if first is None else token_scores.mean_of_strands(first, found)
        yield count


def embed(
    model: StripedHyena,
    tokenizer: Tokenizer,
    texts: Text | Sequence[Text],
    layers: Layer | Sequence[Layer] = "norm",
    *,
    pool: Pool | Sequence[int] = "mean",
    **options: Any,
) -> Any:
    """Embed a text, or a list of texts: vectors of named places in the model.

    Args:
        model, tokenizer: see ``iter_scores``.
        texts: text, bytes or token ids, or a list of such.
        layers, pool, options: see ``iter_embeddings``.

    Returns:
        For one place the vectors: of one text an array [D] (``mean``, ``last``), [T,D] (``none``) or [P,D]
        (P positions); of a list of texts one array with a further axis in front, or a list of arrays where nothing
        is pooled. For a list of places a dictionary with the vectors of each, by what it was called.

    Raises:
        The errors of ``iter_embeddings``.
    """
    return run_steps(embed_steps(model, tokenizer, texts, layers, pool=pool, **options))


def embed_steps(
    model: StripedHyena,
    tokenizer: Tokenizer,
    texts: Text | Sequence[Text],
    layers: Layer | Sequence[Layer] = "norm",
    *,
    pool: Pool | Sequence[int] = "mean",
    **options: Any,
) -> Generator[float, None, Any]:
    """``embed`` in steps, between which other work may use the model; see ``score_steps``."""
    model = uncompiled(model)
    items, single = as_texts(texts)
    found = []
    for vectors in _embeddings(model, items, *_embedding_settings(model, tokenizer, layers, pool, options)):
        if isinstance(vectors, tuple):
            found.append(vectors[1])
        else:
            yield vectors
    if single:
        return found[0]
    if isinstance(found[0], dict):
        return {layer: _stacked([vectors[layer] for vectors in found], pool) for layer in found[0]}
    return _stacked(found, pool)


def iter_embeddings(
    model: StripedHyena,
    tokenizer: Tokenizer,
    texts: Iterable[Text],
    layers: Layer | Sequence[Layer] = "norm",
    *,
    pool: Pool | Sequence[int] = "mean",
    **options: Any,
) -> Iterator[tuple[int, Any]]:
    """Embed texts as they come, in bounded memory; see ``iter_scores`` for how texts are read.

    Only the layers up to the last one that is named are computed.

    Args:
        model, tokenizer, texts: see ``iter_scores``.
        layers: a place or a list of places: a number i for the residual stream behind layer i (from 0; negative numbers
            count from the end), ``"embed"``, ``"norm"`` (what the head reads), ``"unembed"`` (the logits), or the name
            of a module, ours (``"layers.20.mlp.down_proj"``) or the original's (``"blocks.20.mlp.l3"``), for what it
            returns, with ``.input`` behind it for what it reads.
        pool: ``"mean"`` over the tokens of a text, ``"last"`` token, ``"none"`` for all tokens, or a list of positions
            in the text (negative ones count from its end). BOS in front of a text is not pooled.
        options: ``bos``, ``special``, ``both_strands``, ``method``, ``tokens_per_pass``, ``max_length``, ``output`` and
            ``progress`` of ``iter_scores``. With ``both_strands`` vectors are means of the two strands; ``none`` and
            positions pair each position with its complement.

    Yields:
        (index, vectors) in the order of the texts: float32 arrays [D], [T,D] without pooling, [P,D] of P positions; for
        a list of places a dictionary of them.

    Raises:
        InputError: at the call, an unknown place (the message names the nearest) or option.
        The errors of ``iter_scores``, while iterating.
    """
    model = uncompiled(model)
    made = _embedding_settings(model, tokenizer, layers, pool, options)
    return (found for found in _embeddings(model, texts, *made) if isinstance(found, tuple))


def _embedding_settings(
    model: StripedHyena,
    tokenizer: Tokenizer,
    layers: Layer | Sequence[Layer],
    pool: Pool | Sequence[int],
    options: Mapping[str, Any],
) -> tuple[Encoder, ReadOptions, Mapping[Layer, Place], str | tuple[int, ...], bool]:
    """What ``_embeddings`` takes; at last whether several places were named."""
    settings = _settings(model, options)
    parsed = parse_pool(pool)
    several = not isinstance(layers, int | str)
    named = list(layers) if isinstance(layers, Sequence) and several else [layers]
    if not named:
        raise InputError("layers is empty: name at least one place")
    places = {layer: find_place(model, layer) for layer in named}  # type: ignore[arg-type]
    return settings.encoder(model, tokenizer), settings, places, parsed, several  # type: ignore[return-value]


def _embeddings(
    model: StripedHyena,
    texts: Iterable[Text],
    encoder: Encoder,
    settings: ReadOptions,
    places: Mapping[Layer, Place],
    pool: str | tuple[int, ...],
    several: bool,
) -> Iterator[tuple[int, Any] | float]:
    """The vectors, and after every step the tokens that were read."""
    names = list(dict.fromkeys(place.name for place in places.values()))
    reader = settings.reader(model, max(place.depth for place in places.values()))
    collector = Collector(names, pool, remedy(model))

    def records() -> Iterator[Record]:
        for record in encoder.records(texts):
            if isinstance(pool, tuple):
                collector.positions(record)  # refused before anything of it is read
            yield record

    def observe(name: str, x: Tensor, spans: Sequence[Span]) -> None:
        if name in names:
            collector.observe(name, x, spans)
        if name == NORM and HEAD in names:  # a tied head is no module, and logits are computed some positions at a time
            step = logits_at_once(model)
            for start in range(0, x.shape[1], step):
                part = x[:, start : start + step]
                collector.observe(HEAD, model.logits(part), clip(spans, start, start + part.shape[1]))

    watched = {NORM if name == HEAD else name for name in names}
    first: list[Tensor] | None = None
    reader.watch = lambda: watching(reader, watched, observe)
    for count, group in reader.read(records()):
        for record in group:
            vectors = collector.take(record)
            if settings.both_strands:
                if first is None:
                    first = vectors
                    continue
                vectors = [pooling.mean_of_strands(*pair, pool) for pair in zip(first, vectors, strict=True)]
                first = None
            by_name = dict(zip(names, vectors, strict=True))
            made = {layer: by_name[place.name] for layer, place in places.items()}
            made = {layer: x.numpy() if settings.output == "numpy" else x.clone() for layer, x in made.items()}
            yield record.index, made if several else next(iter(made.values()))
        yield count


def _settings(model: Any, options: Mapping[str, Any]) -> ReadOptions:
    """Check the options, and that the model is one.

    Raises:
        InputError: an unknown option or one out of range, or something that is no model.
    """
    if isinstance(model, type) or not hasattr(model, "make_cache") or not hasattr(model, "config"):
        raise InputError(f"model must be a StripedHyena, not {kind_of(model)}: call it with (model, tokenizer, texts)")
    known = [field.name for field in fields(ReadOptions)]
    for name in options:
        if name not in known:
            near = nearest(name, known)
            raise InputError(f"unknown option {shown(name)}: {f'did you mean {near}?' if near else ', '.join(known)}")
    return ReadOptions(**options)


def _stacked(vectors: list[Any], pool: Pool | Sequence[int]) -> Any:
    """Vectors of several texts as one array, or as they are where each text has a length of its own."""
    if pool == "none":
        return vectors
    return torch.stack(vectors) if isinstance(vectors[0], Tensor) else np.stack(vectors)


def _require_finite(model: StripedHyena, record: Record, logprobs: Tensor, method: str) -> Iterator[float]:
    """Check the log-probabilities of a record.

    Yields:
        Where they are not finite, the tokens that were read again since the step before, to find the layer.

    Raises:
        NonFiniteRecordError: with the text, and the layer where the numbers first go wrong.
    """
    predicted = logprobs if record.context else logprobs[1:]
    if bool(torch.isfinite(predicted).all()):
        return
    cause = remedy(model)
    if len(record) <= MOST_EXPLAINED:
        cause = yield from search_non_finite(model, record.ids.tolist(), method=method)
    raise NonFiniteRecordError(record.index, f"its logits are not finite: {cause}")
