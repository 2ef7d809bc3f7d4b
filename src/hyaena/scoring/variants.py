"""Variants of a genome: each in a window of its contig, those of one window together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from hyaena.arguments import kind_of
from hyaena.errors import InputError
from hyaena.model import StripedHyena
from hyaena.records import Checked, Genome, MemoryGenome, Variant, Windows, check_variants
from hyaena.scoring.edits import Edit, EditScore, iter_edit_scores
from hyaena.scoring.records import Encoder, NonFiniteRecordError, RecordError
from hyaena.tokenizers import Tokenizer


def score_variants(
    model: StripedHyena,
    tokenizer: Tokenizer,
    genome: Genome | Mapping[str, str],
    variants: Iterable[Variant],
    *,
    window: int = 8192,
    grid: int = 1,
    max_length: int | None = None,
    **options: Any,
) -> list[EditScore]:
    """Score variants of a genome, each in a window of its contig.

    The window of a variant has half of its letters before the variant. At the start of a contig it begins with the
    contig, and at the end it is cut off. With ``grid`` it begins at a multiple of ``grid``, up to ``grid - 1`` letters
    earlier, so that neighbours have the same window, which is then read once for all of them. The edited window ends
    where the window does in the genome: an insertion makes it longer.

    Args:
        model, tokenizer: see ``iter_edit_scores``.
        genome: ``records.FastaGenome(path)``, or a dictionary of contigs.
        variants: ``records.Variant``s, from ``records.read_variants(path)`` or made by hand.
        window: letters of a window.
        grid: where windows may begin, at most half a window; 1 puts every variant in the middle.
        max_length, options: of ``iter_edit_scores``.

    Returns:
        An EditScore per variant, in their order.

    Raises:
        InputError: an option out of range, or a variant that does not fit the genome; the message names it.
        The errors of ``iter_edit_scores``.
    """
    limit = letters_within(model, tokenizer, bos=options.get("bos"), max_length=max_length)
    windows = windows_within(limit, window, grid)
    sequences = MemoryGenome(genome) if isinstance(genome, Mapping) else genome
    if not (hasattr(sequences, "lengths") and hasattr(sequences, "fetch")):
        raise InputError(f"genome must be records.FastaGenome(path) or a dictionary of contigs, not {kind_of(genome)}")
    checked = []
    for one in check_variants(variants, sequences, windows, max_length=limit):
        if one.problem:
            raise InputError(f"variant {one.index} ({one.name}): {one.text}")
        checked.append(one)
    found = dict(iter_variant_scores(model, tokenizer, checked, max_length=max_length, **options))
    return [found[i] for i in range(len(checked))]


def letters_within(model: StripedHyena, tokenizer: Tokenizer, *, bos: bool | None, max_length: int | None) -> int:
    """The most letters that a model reads in a window: its context, less the start token where there is one.

    Args:
        model, tokenizer, bos, max_length: see ``iter_edit_scores``.
    """
    encoder = Encoder.of(model, tokenizer, bos=bos, special=False, both_strands=False, max_length=max_length)
    return encoder.max_letters


def windows_within(limit: int, window: int, grid: int) -> Windows:
    """Windows that a model can read.

    Raises:
        InputError: a number out of range, or a window that is longer than ``limit``, the letters of the context.
    """
    windows = Windows.of(window, grid)
    if window > limit:
        raise InputError(
            f"a window of {window:,} letters is longer than the {limit:,} that the model's context holds: take a "
            "smaller window, or pass a larger max_length"
        )
    return windows


def iter_variant_scores(
    model: StripedHyena, tokenizer: Tokenizer, checked: Sequence[Checked], **options: Any
) -> Iterator[tuple[int, EditScore]]:
    """Score variants that lie in their windows; those of one window together.

    Args:
        model, tokenizer, options: see ``iter_edit_scores``.
        checked: from ``records.check_variants``, without problems.

    Yields:
        (position in ``checked``, score), window by window.

    Raises:
        The errors of ``iter_edit_scores``, with the position of a variant.
    """
    groups: dict[tuple[str, int, int], list[int]] = {}
    for position, one in enumerate(checked):
        groups.setdefault((one.variant.contig, one.first, one.stop), []).append(position)
    members = list(groups.values())
    windows = [
        (
            checked[group[0]].text,
            [Edit(v.start - first, v.reference, v.alternative) for v in (checked[i].variant for i in group)],
        )
        for (_, first, _), group in groups.items()
    ]
    try:
        for index, scores in iter_edit_scores(model, tokenizer, windows, **options):
            yield from zip(members[index], scores, strict=True)
    except (RecordError, NonFiniteRecordError) as error:
        raise type(error)(members[error.index][0], error.reason) from error
