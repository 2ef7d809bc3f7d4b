"""Log-likelihoods of sequences and of edited copies of them: what is equal before an edit is read once.

A window is a sequence with its edits. It is read up to its last edit, and the states of the layers are copied shortly
before every edit. From each copy one row goes on with the edited rest, and one more with the sequence's own. With one
edit in the middle of a window of W tokens that is 1.5·W tokens instead of 2·W; each further edit of the window adds
what follows it.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hyaena.arguments import as_whole, each, switch, whole
from hyaena.cache import Cache, Mark
from hyaena.errors import HyaenaError, InputError, UnsupportedError, shown
from hyaena.generation.nonfinite import remedy
from hyaena.model import StripedHyena
from hyaena.ops import capabilities
from hyaena.packing import Snapshots
from hyaena.scoring.reader import Progress, choose_pass
from hyaena.scoring.records import Encoder, NonFiniteRecordError, RecordError
from hyaena.scoring.strands import reverse_complement
from hyaena.scoring.token_scores import Wanted, logits_at_once, token_statistics
from hyaena.tokenizers import Tokenizer

FORK_STEP = 16
"""States are copied after a multiple of so many tokens, so that neighbouring edits share a copy."""
ALIKE = 256
"""Windows are read together whose first copies are at most so many tokens apart."""
MAX_STATES = 128
"""Copies of states that are kept; then the rows that go on from them are read. One of Evo 2 7B has 23 MB."""
MAX_COPIES = 2
"""Tokens whose keys and values are copied at a time, in passes, or one row where it is longer."""
WANTED = Wanted(entropy=False, rank=False)


class Edit(NamedTuple):
    """A change of a sequence.

    Attributes:
        start: where it begins, from 0.
        reference: the letters that stand there.
        alternative: the letters that take their place; there may be more, fewer, or none.
    """

    start: int
    reference: str
    alternative: str


class EditScore(NamedTuple):
    """Log-likelihoods, natural logarithms summed over tokens. The first token counts where BOS stands before it.

    Attributes:
        reference: of the sequence.
        alternative: of the edited sequence.
    """

    reference: float
    alternative: float

    @property
    def difference(self) -> float:
        """``alternative - reference``: negative where the model finds the edit less likely."""
        return self.alternative - self.reference


class _Change(NamedTuple):
    """An edit of token ids: ``ids[start:stop]`` become ``new``. It forks after ``fork`` tokens."""

    fork: int
    start: int
    stop: int
    new: list[int]


@dataclass(frozen=True, eq=False)
class _Item:
    """One strand of a window: the number of the window, its ids, BOS included, and its edits."""

    index: int
    ids: Tensor
    changes: list[_Change]

    @property
    def first(self) -> int:
        return min(change.fork for change in self.changes)

    @property
    def last(self) -> int:
        return max(change.fork for change in self.changes)


class _Row(NamedTuple):
    """What is read from a copy of the states on; its first token is the sequence's own, and predicted before the fork.

    Attributes:
        number: of the sequence in its batch.
        item: the sequence.
        edit: the number of its edit; None for the sequence itself.
        fork: tokens before.
    """

    number: int
    item: _Item
    edit: int | None
    fork: int

    @property
    def length(self) -> int:
        """Tokens from the fork on."""
        if self.edit is None:
            return len(self.item.ids) - self.fork
        _, start, stop, new = self.item.changes[self.edit]
        return len(self.item.ids) - self.fork - (stop - start) + len(new)

    @property
    def ids(self) -> Tensor:
        """These tokens, int64 [length]."""
        ids = self.item.ids
        if self.edit is None:
            return ids[self.fork :]
        _, start, stop, new = self.item.changes[self.edit]
        return torch.cat([ids[self.fork : start], torch.tensor(new, dtype=torch.int64, device="cpu"), ids[stop:]])


def iter_edit_scores(
    model: StripedHyena,
    tokenizer: Tokenizer,
    windows: Iterable[tuple[str, Sequence[Edit]]],
    *,
    both_strands: bool = False,
    bos: bool | None = None,
    method: str = "auto",
    tokens_per_pass: int | None = None,
    max_length: int | None = None,
    progress: Progress | None = None,
) -> Iterator[tuple[int, list[EditScore]]]:
    """Score sequences and edited copies of them as they come.

    Equations: with tokens t of a sequence, ``reference = Σ log p(t_i | t_<i)``, and ``alternative`` the same of the
    sequence ``s[:start] + alternative + s[start + len(reference):]``. Both equal the sums of ``score`` of the two
    sequences, in float32 to rounding.

    Args:
        model: any StripedHyena, on any device.
        tokenizer: its tokenizer, which reads a letter as a token.
        windows: pairs of a sequence and its edits; those of neighbouring places share most work.
        both_strands: score the reverse complements as well, and give the means of both log-likelihoods.
        bos: whether ``tokenizer.bos_id`` stands in front; None for what the tokenizer does for a text.
        method: how long convolutions are evaluated.
        tokens_per_pass: the most tokens that one pass of the model reads; see ``iter_scores``.
        max_length: the most tokens of a sequence, edited or not; ``config.max_length`` unless given.
        progress: called as ``progress(edits scored)`` as windows are done.

    Yields:
        (index, a score per edit) in the order of the windows.

    Raises:
        InputError: at the call, an option out of range.
        RecordError: while iterating, a window that cannot be read, or an edit that does not fit it; it has the
            number of the window.
        UnsupportedError: at the call, an unknown method; while iterating, one that a filter does not have, or a mixer
            whose state cannot be copied inside a pass.
        NonFiniteRecordError: the model produced NaN or infinity.
    """
    encoder = Encoder.of(model, tokenizer, bos=bos, special=False, both_strands=False, max_length=max_length)
    capabilities(method)
    most = choose_pass(model) if tokens_per_pass is None else whole("tokens_per_pass", tokens_per_pass, "at least 1", 1)
    strands = 2 if switch("both_strands", both_strands) else 1
    return _scores(model, encoder, windows, strands, method, most, progress)


def _scores(
    model: StripedHyena,
    encoder: Encoder,
    windows: Iterable[tuple[str, Sequence[Edit]]],
    strands: int,
    method: str,
    most: int,
    progress: Progress | None,
) -> Iterator[tuple[int, list[EditScore]]]:
    waiting: dict[int, list[list[EditScore]]] = {}
    done = 0
    for batch in _batches(_items(encoder, windows, strands), most):
        for item, scores in zip(
            batch, _score_batch(model, batch, method, most) if batch[0].changes else [[]], strict=True
        ):
            both = waiting.setdefault(item.index, [])
            both.append(scores)
            if len(both) == strands:
                del waiting[item.index]
                done += len(scores)
                if progress is not None:
                    progress(done)
                yield item.index, [_mean(pair) for pair in zip(*both, strict=True)]


def _mean(scores: Sequence[EditScore]) -> EditScore:
    return EditScore(*(sum(values) / len(scores) for values in zip(*scores, strict=True)))


def check_edit(sequence: str, edit: Edit) -> None:
    """Check that an edit fits a sequence.

    Raises:
        InputError: it reaches beyond the sequence, changes nothing, or names other letters than stand there.
    """
    start, reference, alternative = edit
    found = sequence[start : start + len(reference)]
    if not 0 <= start <= len(sequence) or len(found) < len(reference):
        raise InputError(f"the edit at {start:,} does not lie in the sequence of {len(sequence):,} letters")
    if found != reference:
        raise InputError(f"{shown(found)} stands at {start:,}, and the edit names {shown(reference)}")
    if reference == alternative:
        raise InputError(f"the edit at {start:,} changes nothing")


def _items(encoder: Encoder, windows: Iterable[tuple[str, Sequence[Edit]]], strands: int) -> Iterator[_Item]:
    for index, pair in enumerate(each("windows", windows, "pairs of a sequence and a list of its edits")):
        try:
            sequence, edits = _parse(pair)
            for edit in edits:
                check_edit(sequence, edit)
            yield _item(encoder, index, sequence, edits)
            if strands == 2:
                turned = [
                    Edit(
                        len(sequence) - edit.start - len(edit.reference),
                        reverse_complement(edit.reference),
                        reverse_complement(edit.alternative),
                    )
                    for edit in edits
                ]
                yield _item(encoder, index, reverse_complement(sequence), turned)
        except RecordError:
            raise
        except HyaenaError as error:
            raise RecordError(index, str(error)) from None


def _parse(pair: Any) -> tuple[str, list[Edit]]:
    try:
        sequence, given = pair
        edits = [Edit(*edit) for edit in given]
    except (TypeError, ValueError):
        sequence, edits = None, []
    texts = [text for edit in edits for text in edit[1:]]
    if (
        isinstance(sequence, str)
        and all(isinstance(text, str) for text in texts)
        and all(as_whole(edit.start) is not None for edit in edits)
    ):
        return sequence, edits
    raise InputError(f"a window is a sequence and a list of scoring.Edit, not {shown(pair)}")


def _item(encoder: Encoder, index: int, sequence: str, edits: Sequence[Edit]) -> _Item:
    try:
        record = next(iter(encoder.records([sequence])))
    except RecordError as error:
        raise InputError(error.reason) from None
    ids, before = record.ids, record.context
    _require_letters(len(ids) - before, sequence)
    changes = []
    for start, reference, alternative in edits:
        new, place = _letters(encoder.tokenizer, alternative), before + start
        # strictly before the edit, so that the token at the fork is the sequence's own
        fork = min(max(0, (place - 1) // FORK_STEP * FORK_STEP), len(ids) - 1)
        length = len(ids) - len(reference) + len(new)
        if length == before:
            raise InputError(f"the edit at {start:,} leaves nothing of the sequence: leave it out")
        if length > encoder.max_length:
            raise InputError(
                f"{length:,} tokens of the sequence with the edit at {start:,} pass the maximum length "
                f"{encoder.max_length:,}: take a smaller window, or leave the edit out"
            )
        changes.append(_Change(fork, place, place + len(reference), new))
    return _Item(index, ids, changes)


def _letters(tokenizer: Tokenizer, text: str) -> list[int]:
    ids = tokenizer.encode(text, add_special_tokens=False) if text else []
    _require_letters(len(ids), text)
    return ids


def _require_letters(tokens: int, text: str) -> None:
    if tokens != len(text):
        raise InputError(
            f"the tokenizer makes {tokens:,} tokens of {len(text):,} letters: edits are scored with models that read a "
            "letter as a token, such as Evo"
        )


def _batches(items: Iterable[_Item], most: int) -> Iterator[list[_Item]]:
    """Neighbouring items that are read together up to their last forks; what has no edits stands alone."""
    batch: list[_Item] = []
    for item in items:
        if batch and not (
            item.changes
            and batch[0].changes
            and abs(item.first - batch[0].first) <= ALIKE
            and (len(batch) + 1) * max(one.last for one in (*batch, item)) <= most
        ):
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


class _Reading:
    """Sequences on their way to their last forks.

    The pass is cut at the first fork of all, so that states inside a pass are computed for few tokens, and wherever
    ``MAX_STATES`` copies have come together. A sequence that forks for the last time before the others is read on, and
    shorter ones are padded: neither changes what was copied before.

    Attributes:
        sums: float64 [R,n+1], the log-likelihood of the tokens up to each, that token included.
    """

    def __init__(self, model: StripedHyena, batch: Sequence[_Item], method: str, most: int) -> None:
        self.model, self.batch, self.method = model, batch, method
        first, last = min(item.first for item in batch), max(item.last for item in batch)
        ids = torch.nn.utils.rnn.pad_sequence([item.ids[: last + 1] for item in batch], batch_first=True)
        self.ids = torch.nn.functional.pad(ids, (0, last + 1 - ids.shape[1])).to(model.device)
        self.cache = model.make_cache(len(batch), max_length=max(1, last), method=method)
        self.start = self.cache.mark()
        self.states: dict[tuple[int, int], Mapping[int, Any]] = {}
        self.sums = torch.zeros(len(batch), last + 1, dtype=torch.float64, device="cpu")
        step = max(1, most // len(batch))
        edges = {*range(0, first, step), *range(first, last, step), last}
        copies = 0
        for fork, count in sorted(Counter(fork for item in batch for fork in _forks(item)).items()):
            copies += count
            if copies >= MAX_STATES:
                edges.add(fork)
                copies = 0
        self.edges = sorted(edges)

    def read(self) -> Iterator[int]:
        """Read on; yield how many tokens are read where the copies have to be used, which are then dropped."""
        for start, stop in itertools.pairwise(self.edges):
            self._pass(start, stop)
            if len(self.states) >= MAX_STATES:
                yield stop
                self.states.clear()
        yield self.edges[-1]

    def _pass(self, start: int, stop: int) -> None:
        stops = {
            row: [fork - start for fork in _forks(item) if start < fork <= stop] for row, item in enumerate(self.batch)
        }
        snapshots = Snapshots({row: places for row, places in stops.items() if places})
        logits = self.model(
            self.ids[:, start:stop],
            cache=self.cache,
            method=self.method,
            snapshots=snapshots if snapshots.stops else None,
            wide_logits=True,
        )
        values = _logprobs(self.model, logits, self.ids[:, start + 1 : stop + 1]).double().cpu()
        self.sums[:, start + 1 : stop + 1] = self.sums[:, start, None] + values.cumsum(1)
        for row, places in stops.items():
            self.states |= {(row, start + place): snapshots.states(row, place) for place in places}

    def fork(self, rows: Sequence[_Row], longest: int) -> Cache:
        """A cache whose rows hold what stands before the forks of ``rows``, with room for ``longest`` more tokens.

        Raises:
            UnsupportedError: a layer's state was not copied.
        """
        room = max(self.cache.length, max(row.fork for row in rows) + longest)
        copies = self.cache.select([row.number for row in rows], max_length=room)
        parts: list[Any] = []
        for layer, empty in enumerate(self.start.parts):
            if empty is None:  # keys and values: those behind the fork are cut off
                parts.append(None)
                continue
            try:
                found = [
                    self.states[row.number, row.fork][layer] if row.fork else empty.select([row.number]) for row in rows
                ]
            except KeyError:
                raise UnsupportedError(
                    f"layer {layer} does not evaluate its recurrence through the context, so that its state cannot be "
                    "copied inside a pass: score both sequences with hyaena.score"
                ) from None
            parts.append(found[0].join(found[1:]))
        copies.rewind(Mark(tuple(row.fork for row in rows), tuple(parts)))
        return copies


def _forks(item: _Item) -> list[int]:
    """Where an item forks, each place once, rising; 0 needs no copy."""
    return sorted({change.fork for change in item.changes if change.fork})


@torch.inference_mode()
def _score_batch(model: StripedHyena, batch: Sequence[_Item], method: str, most: int) -> list[list[EditScore]]:
    rows = [_Row(i, item, None, item.last) for i, item in enumerate(batch)]
    rows += [
        _Row(i, item, number, change.fork) for i, item in enumerate(batch) for number, change in enumerate(item.changes)
    ]
    rows.sort(key=lambda row: -row.length)
    totals: dict[tuple[int, int | None], float] = {}
    reading = _Reading(model, batch, method, most)
    for stop in reading.read():
        ready = [row for row in rows if row.fork <= stop]
        rows = [row for row in rows if row.fork > stop]
        for part in _parts(ready, most):
            for row, value in zip(part, _continue(reading, part, most), strict=True):
                totals[row.number, row.edit] = float(reading.sums[row.number, row.fork]) + value
    for (i, _), total in totals.items():
        if total - total != 0:
            raise NonFiniteRecordError(batch[i].index, f"its logits are not finite: {remedy(model)}")
    return [
        [EditScore(totals[i, None], totals[i, number]) for number in range(len(item.changes))]
        for i, item in enumerate(batch)
    ]


def _parts(rows: Sequence[_Row], most: int) -> Iterator[list[_Row]]:
    """Rows of about equal lengths, falling, that fit into a pass together."""
    part: list[_Row] = []
    for row in rows:
        if part:
            longest, count = part[0].length, len(part) + 1
            copied = max(one.fork for one in (*part, row)) + longest
            if count * longest > most or count * copied > MAX_COPIES * most or longest - row.length > longest // 16:
                yield part
                part = []
        part.append(row)
    if part:
        yield part


def _continue(reading: _Reading, rows: Sequence[_Row], most: int) -> list[float]:
    """The log-likelihoods of all tokens of rows but their first."""
    model, width = reading.model, rows[0].length
    if width == 1:
        return [0.0] * len(rows)
    cache = reading.fork(rows, width - 1)
    ids = torch.nn.utils.rnn.pad_sequence([row.ids for row in rows], batch_first=True).to(model.device)
    values, position = [], 0
    for part in ids[:, :-1].split(max(1, most // len(rows)), dim=1):
        targets = ids[:, position + 1 : position + 1 + part.shape[1]]
        values.append(_logprobs(model, model(part, cache=cache, method=reading.method, wide_logits=True), targets))
        position += part.shape[1]
    counts = torch.tensor([row.length - 1 for row in rows], device=model.device)
    there = torch.arange(width - 1, device=model.device) < counts[:, None]
    return torch.where(there, torch.cat(values, dim=1).double(), 0.0).sum(1).tolist()


def _logprobs(model: StripedHyena, logits: Tensor, targets: Tensor) -> Tensor:
    """Log-probabilities [R,t] of targets, from logits [R,t,V]."""
    step = logits_at_once(model)
    pairs = zip(logits.flatten(0, 1).split(step), targets.flatten().split(step), strict=True)
    return torch.cat([token_statistics(*pair, WANTED)[0] for pair in pairs]).view(targets.shape)
