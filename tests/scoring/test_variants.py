"""Edits that share what stands before them score as whole sequences do."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import hyaena
from configs import TINY, TINY_BYTES, TINY_EVO
from hyaena.config import ModelConfig
from hyaena.errors import HyaenaError, InputError, UnsupportedError
from hyaena.model import StripedHyena
from hyaena.packing import Snapshots
from hyaena.records import Variant, Windows
from hyaena.scoring import Edit, iter_edit_scores, reverse_complement, score_variants
from hyaena.scoring import edits as sharing
from hyaena.scoring.edits import FORK_STEP
from hyaena.tokenizers import ByteTokenizer, CharacterTokenizer
from models import spread

EVO = replace(TINY_EVO, vocab_size=256, max_length=2048)
HESSIAN = replace(TINY, vocab_size=256, max_length=2048)
MULTI = replace(
    HESSIAN,
    layer_types=("hyena_se", "hyena_mr", "attention", "hyena_li", "hyena"),
    se_filter_groups=4,
    mr_filter_groups=4,
)
TOKENIZER = CharacterTokenizer(256)


def dna(length: int, seed: int = 0) -> str:
    return "".join(random.Random(seed).choices("ACGT", k=length))


def edit(sequence: str, start: int, removed: int, added: str) -> Edit:
    return Edit(start, sequence[start : start + removed], added)


def changed(sequence: str, one: Edit) -> str:
    return sequence[: one.start] + one.alternative + sequence[one.start + len(one.reference) :]


def other(letter: str) -> str:
    return {"A": "C", "C": "G", "G": "T", "T": "A"}[letter]


def some_edits(sequence: str) -> list[Edit]:
    """Substitutions, insertions and deletions at both ends and in the middle, several at one place."""
    last, middle = len(sequence) - 1, len(sequence) // 2
    return [
        edit(sequence, middle, 1, other(sequence[middle])),
        edit(sequence, middle, 1, sequence[middle] + "GATTACA"),
        edit(sequence, middle, 5, sequence[middle]),
        edit(sequence, middle + 3, 2, ""),
        edit(sequence, 0, 1, other(sequence[0])),
        edit(sequence, 0, 3, ""),
        edit(sequence, 1, 0, "ACG"),
        edit(sequence, last, 1, other(sequence[last])),
        edit(sequence, last, 1, ""),
        edit(sequence, len(sequence), 0, "TTT"),
        edit(sequence, FORK_STEP, 1, other(sequence[FORK_STEP])),
        edit(sequence, FORK_STEP + 1, 1, other(sequence[FORK_STEP + 1])),
        edit(sequence, 2, len(sequence) - 3, ""),
    ]


def whole(model: StripedHyena, sequence: str, **options: Any) -> float:
    return hyaena.score(model, TOKENIZER, sequence, entropy=False, rank=False, **options).sum


# short passes are many: each kind of model, and one strand and both, meet them once
PASSES = [*itertools.product([HESSIAN, EVO, MULTI], [100, 4096], [False, True])]
PASSES += [(HESSIAN, 7, False), (EVO, 7, True), (MULTI, 7, True)]


@pytest.mark.parametrize(("config", "tokens_per_pass", "both_strands"), PASSES)
def test_shared_windows_score_as_both_full_windows(
    config: ModelConfig, tokens_per_pass: int, both_strands: bool
) -> None:
    model = spread(config)
    sequences = [dna(90), dna(91, 1), dna(20, 2), dna(90, 3)]
    windows = [(sequence, some_edits(sequence)) for sequence in sequences]
    options: dict[str, Any] = {"both_strands": both_strands}
    found = list(iter_edit_scores(model, TOKENIZER, windows, tokens_per_pass=tokens_per_pass, **options))
    assert [index for index, _ in found] == [0, 1, 2, 3]
    for (sequence, edits), (_, scores) in zip(windows, found, strict=True):
        reference = whole(model, sequence, **options)
        assert len(scores) == len(edits)
        for one, score in zip(edits, scores, strict=True):
            assert score.reference == pytest.approx(reference, rel=1e-5)  # float32
            assert score.alternative == pytest.approx(whole(model, changed(sequence, one), **options), rel=1e-5)
            assert score.difference == score.alternative - score.reference


@pytest.mark.parametrize("name", ["evo-tiny", "evo2-tiny", "evo2-tiny/hcm128"])
def test_models_of_the_family_agree(golden: Path, name: str) -> None:
    """The original's weights, an explicit filter of 128 taps among them."""
    model, tokenizer = hyaena.load(golden / name, device="cpu")
    sequence = dna(200)
    edits = some_edits(sequence)
    for both in (False, True):
        ((_, scores),) = iter_edit_scores(model, tokenizer, [(sequence, edits)], both_strands=both)
        for one, score in zip(edits, scores, strict=True):
            want = hyaena.score(model, tokenizer, [sequence, changed(sequence, one)], both_strands=both)
            assert (score.reference, score.alternative) == pytest.approx(tuple(w.sum for w in want), rel=1e-5)
            assert score.difference == pytest.approx(want[1].sum - want[0].sum, abs=1e-3)


def test_variants_of_a_genome_in_shared_windows() -> None:
    """Grid windows against exact scores of the same windows, by the function that takes a genome."""
    model, contig = spread(EVO), dna(400, 9)
    genome = {"chr1": contig, "chr2": dna(30, 10).lower()}
    starts = [0, 5, 150, 151, 170, 200, 399]
    variants = [Variant("chr1", p, contig[p], other(contig[p])) for p in starts]
    second = genome["chr2"].upper()
    variants.append(Variant("chr2", 7, second[7:9], second[7]))
    for grid in (1, 25, 50):
        found = score_variants(model, TOKENIZER, genome, variants, window=100, grid=grid)
        for variant, score in zip(variants, found, strict=True):
            text = genome[variant.contig].upper()
            first, stop = Windows.of(100, grid).place(variant.start, len(text))
            one = Edit(variant.start - first, variant.reference, variant.alternative)
            want = [whole(model, t) for t in (text[first:stop], changed(text[first:stop], one))]
            assert score.difference == pytest.approx(want[1] - want[0], abs=1e-3)
            assert tuple(score) == pytest.approx(tuple(want), rel=1e-5)
    with pytest.raises(InputError, match=r"variant 1 .*: its reference allele is"):
        score_variants(
            model, TOKENIZER, genome, [variants[0], Variant("chr1", 1, other(contig[1]), contig[1])], window=100
        )
    with pytest.raises(InputError, match="a window of 4,096 letters is longer than the 2,048 that"):
        score_variants(model, TOKENIZER, genome, variants, window=4096)


def test_a_window_is_read_once_and_each_edit_from_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """The arithmetic that the speed rests on: tokens that pass through the model."""
    model, read = spread(HESSIAN), []
    forward = StripedHyena.forward

    def counting(self: StripedHyena, ids: torch.Tensor, **options: Any) -> torch.Tensor:
        read.append(ids.numel())
        return forward(self, ids, **options)

    monkeypatch.setattr(StripedHyena, "forward", counting)
    sequence = dna(512)
    middle = edit(sequence, 256, 1, other(sequence[256]))
    list(iter_edit_scores(model, TOKENIZER, [(sequence, [middle])]))
    assert sum(read) <= 1.5 * 512 + 2 * FORK_STEP
    read.clear()
    edits = [edit(sequence, 256 + i, 1, other(sequence[256 + i])) for i in range(64)]
    list(iter_edit_scores(model, TOKENIZER, [(sequence, edits)]))
    rests = sum(512 - one.start + FORK_STEP for one in edits)
    assert sum(read) <= (512 + rests) * (1 + 1 / 16)


@pytest.mark.parametrize("most", [1, 2, 5])
def test_few_copies_of_states_are_kept(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = spread(MULTI)
    sequences = [dna(200), dna(180, 1)]
    windows = [(s, [edit(s, p, 1, other(s[p])) for p in range(0, len(s), 7)]) for s in sequences]
    expected = list(iter_edit_scores(model, TOKENIZER, windows))
    held, fork = [], sharing._Reading.fork

    def watching(self: sharing._Reading, *args: Any) -> Any:
        held.append(len(self.states))
        return fork(self, *args)

    monkeypatch.setattr(sharing, "MAX_STATES", most)
    monkeypatch.setattr(sharing._Reading, "fork", watching)
    found = list(iter_edit_scores(model, TOKENIZER, windows))
    assert 0 < max(held) <= most + 1  # both sequences fork at one place
    for (_, one), (_, other_scores) in zip(found, expected, strict=True):
        for a, b in zip(one, other_scores, strict=True):
            assert tuple(a) == pytest.approx(tuple(b), rel=1e-5)


def test_windows_that_are_alike_are_read_together(monkeypatch: pytest.MonkeyPatch) -> None:
    model, shapes = spread(HESSIAN), []
    forward = StripedHyena.forward

    def recording(self: StripedHyena, ids: torch.Tensor, **options: Any) -> torch.Tensor:
        shapes.append(tuple(ids.shape))
        return forward(self, ids, **options)

    monkeypatch.setattr(StripedHyena, "forward", recording)
    windows = [(s, [edit(s, 32, 1, other(s[32]))]) for s in (dna(64, seed) for seed in range(6))]
    list(iter_edit_scores(model, TOKENIZER, windows, tokens_per_pass=4096))
    assert shapes == [(6, 16), (12, 47)]


def test_a_start_token_stands_before_both() -> None:
    model = spread(TINY_BYTES)
    tokenizer = ByteTokenizer(259)
    sequence = dna(40)
    edits = some_edits(sequence)[:6]
    found = dict(iter_edit_scores(model, tokenizer, [(sequence, edits)], bos=True))[0]
    for one, score in zip(edits, found, strict=True):
        want = [hyaena.score(model, tokenizer, text, bos=True).sum for text in (sequence, changed(sequence, one))]
        assert (score.reference, score.alternative) == pytest.approx(tuple(want), rel=1e-5)


def test_passes_are_deterministic_and_progress_counts_edits() -> None:
    model, told = spread(EVO), []
    windows = [(s, some_edits(s)) for s in (dna(64, 5), dna(80, 6))]
    one, two = (list(iter_edit_scores(model, TOKENIZER, windows, progress=told.append)) for _ in range(2))
    assert one == two
    assert told == [13, 26] * 2
    assert next(iter_edit_scores(model, TOKENIZER, [("ACGT", []), windows[0]])) == (0, [])


def test_the_other_strand_is_the_reverse_complement() -> None:
    model, sequence = spread(EVO), dna(50)
    edits = some_edits(sequence)
    turned = reverse_complement(sequence)
    other_edits = [
        Edit(50 - e.start - len(e.reference), reverse_complement(e.reference), reverse_complement(e.alternative))
        for e in edits
    ]
    (_, forward), (_, backward) = iter_edit_scores(model, TOKENIZER, [(sequence, edits), (turned, other_edits)])
    ((_, both),) = iter_edit_scores(model, TOKENIZER, [(sequence, edits)], both_strands=True)
    for f, b, mean in zip(forward, backward, both, strict=True):
        assert mean.difference == pytest.approx((f.difference + b.difference) / 2, abs=1e-4)


@pytest.mark.parametrize(
    ("window", "message"),
    [
        (("ACGT", [Edit(1, "A", "T")]), "'C' stands at 1, and the edit names 'A'"),
        (("ACGT", [Edit(3, "TT", "T")]), "does not lie in the sequence"),
        (("ACGT", [Edit(-1, "", "T")]), "does not lie in the sequence"),
        (("ACGT", [Edit(1, "C", "C")]), "changes nothing"),
        (("ACGT", [Edit(0, "ACGT", "")]), "the edit at 0 leaves nothing of the sequence"),
        (("ACGT" * 600, [Edit(1, "C", "T")]), "2,400 tokens pass the maximum length 2,048"),
        (("ACGT" * 512, [Edit(1, "C", "CT")]), "2,049 tokens of the sequence with the edit at 1 pass the maximum"),
        (("", []), "it is empty"),
    ],
)
def test_windows_that_cannot_be_read(window: Any, message: str) -> None:
    model = spread(HESSIAN)
    good = ("ACGTA", [Edit(1, "C", "T")])
    with pytest.raises(InputError, match=message) as caught:
        list(iter_edit_scores(model, TOKENIZER, [good, window]))
    assert getattr(caught.value, "index", None) == 1


def test_wrong_options_are_refused_at_the_call() -> None:
    model = spread(HESSIAN)
    for options in ({"tokens_per_pass": 0}, {"both_strands": 3}, {"method": "fast"}):
        with pytest.raises(HyaenaError):
            iter_edit_scores(model, TOKENIZER, [], **options)  # pyright: ignore[reportArgumentType]


def test_numbers_that_are_not_finite_are_refused() -> None:
    model = spread(HESSIAN)
    with torch.no_grad():
        model.norm.weight.fill_(float("nan"))
    with pytest.raises(HyaenaError, match="not finite"):
        list(iter_edit_scores(model, TOKENIZER, [("ACGTACGT", [Edit(4, "A", "T")])]))


def test_a_mixer_whose_states_are_not_copied_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Snapshots, "states", lambda *_: {})
    sequence = dna(64)
    with pytest.raises(UnsupportedError, match="layer 0 does not evaluate its recurrence through the context"):
        list(iter_edit_scores(spread(HESSIAN), TOKENIZER, [(sequence, [edit(sequence, 40, 1, other(sequence[40]))])]))


def test_edits_at_every_place_agree() -> None:
    """All places of a short sequence, where forks, ends and BOS meet."""
    model, sequence = spread(MULTI), dna(2 * FORK_STEP + 3)
    edits = [
        edit(sequence, start, removed, added)
        for start, removed, added in itertools.product(range(len(sequence)), (0, 1, 2), ("", "G", "TA"))
        if start + removed <= len(sequence) and sequence[start : start + removed] != added
    ]
    ((_, scores),) = iter_edit_scores(model, TOKENIZER, [(sequence, edits)], tokens_per_pass=64)
    wholes = hyaena.score(model, TOKENIZER, [changed(sequence, one) for one in edits], entropy=False, rank=False)
    for one, want in zip(scores, wholes, strict=True):
        assert one.alternative == pytest.approx(want.sum, rel=1e-5)
