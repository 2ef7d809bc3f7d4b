"""Log-probability, entropy and rank against a direct computation in float64, and against the original's logits."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import hyaena
import models
from configs import TINY, TINY_EVO
from hyaena.errors import InputError, NonFiniteError
from hyaena.formats import read_config
from hyaena.model import StripedHyena
from hyaena.quant import QuantizedLinear
from hyaena.schemes import SCHEMES
from hyaena.scoring import (
    Edit,
    NonFiniteRecordError,
    RecordError,
    Score,
    Wanted,
    iter_edit_scores,
    token_scores,
    token_statistics,
)
from hyaena.tokenizers import ByteTokenizer, CharacterTokenizer

BYTES = replace(TINY, vocab_size=260, max_length=200)


def spread(config: hyaena.ModelConfig = BYTES) -> StripedHyena:
    return models.spread(config)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_statistics_are_those_of_the_distribution(dtype: torch.dtype) -> None:
    logits, targets = 5 * torch.randn(7, 300, dtype=dtype), torch.randint(300, (7,))
    logits[3, :299] = -torch.inf  # one token with all the probability
    targets[3] = 299
    logp, entropy, rank, *best = token_statistics(logits, targets, Wanted(top=3)).double()
    z = logits.double()
    exact = z - z.exp().sum(-1, keepdim=True).log()
    p = exact.exp()
    # float32 sums of 300 terms; with the dtype of the logits nothing is lost
    torch.testing.assert_close(logp, exact.gather(1, targets[:, None])[:, 0], atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(entropy, -torch.where(p > 0, p * exact, 0).sum(-1), atol=2e-6, rtol=2e-6)
    assert rank.tolist() == [1 + int((row > row[t]).sum()) for row, t in zip(z, targets, strict=True)]
    assert logp[3] == 0 and entropy[3] == 0 and rank[3] == 1
    top_logprobs, top_ids = torch.stack(best[:3], dim=1), torch.stack(best[3:], dim=1).long()
    torch.testing.assert_close(top_logprobs, exact.topk(3).values, atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(exact.gather(1, top_ids), exact.topk(3).values)


def test_only_what_is_wanted_is_computed() -> None:
    logits, targets = torch.randn(4, 9), torch.randint(9, (4,))
    everything = token_statistics(logits, targets, Wanted(top=2))
    for wanted, rows in (
        (Wanted(entropy=False, rank=False), [0]),
        (Wanted(entropy=False), [0, 2]),
        (Wanted(rank=False), [0, 1]),
        (Wanted(entropy=False, rank=False, top=2), [0, 3, 4, 5, 6]),
    ):
        assert torch.equal(token_statistics(logits, targets, wanted), everything[rows])
        assert sum(wanted.sections) == len(rows)


def direct(model: StripedHyena, ids: list[int]) -> torch.Tensor:
    """log p of every token but the first, float64."""
    with torch.inference_mode():
        logp = model(torch.tensor([ids]))[0, :-1].double().log_softmax(-1)
    return logp.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def test_a_text_has_a_number_for_each_of_its_tokens() -> None:
    model, tokenizer = spread(), ByteTokenizer(260)
    found = hyaena.score(model, tokenizer, "hyena!")
    assert isinstance(found, Score) and found.entropies is not None and found.ranks is not None
    expected = direct(model, [256, *b"hyena!"])
    np.testing.assert_allclose(found.logprobs, expected, atol=1e-5)
    assert found.tokens.tolist() == list(b"hyena!") and found.count == 6
    assert (found.logprobs.dtype, found.entropies.dtype, found.ranks.dtype) == (np.float32, np.float32, np.int32)
    assert found.sum == pytest.approx(float(expected.sum()), abs=1e-5)
    assert found.mean == pytest.approx(found.sum / 6) and found.perplexity == pytest.approx(math.exp(-found.sum / 6))


def test_without_bos_nothing_predicts_the_first_token() -> None:
    model, tokenizer = spread(), ByteTokenizer(260)
    for found in (hyaena.score(model, tokenizer, b"hyena", bos=False), hyaena.score(model, tokenizer, list(b"hyena"))):
        assert found.entropies is not None and found.ranks is not None
        assert np.isnan(found.logprobs[0]) and np.isnan(found.entropies[0]) and found.ranks[0] == 0
        np.testing.assert_allclose(found.logprobs[1:], direct(model, list(b"hyena")), atol=1e-5)
        assert found.count == 4 and found.sum == pytest.approx(float(direct(model, list(b"hyena")).sum()), abs=1e-5)
    top = hyaena.score(model, tokenizer, list(b"hyena"), top=2, output="torch")
    assert top.top_ids.shape == top.top_logprobs.shape == (5, 2)
    assert top.top_ids[0].tolist() == [-1, -1] and bool(top.top_logprobs[0].isnan().all())
    assert bool((top.top_logprobs[1:, 0] >= top.logprobs[1:]).all())
    best = top.ranks == 1
    assert torch.equal(top.top_ids[best, 0], top.tokens[best])
    single = hyaena.score(model, tokenizer, [65])
    assert single.count == 0 and single.sum == 0 and math.isnan(single.mean) and math.isnan(single.perplexity)
    with_bos = hyaena.score(model, tokenizer, list(b"hyena"), bos=True)
    np.testing.assert_array_equal(with_bos.logprobs, hyaena.score(model, tokenizer, b"hyena").logprobs)
    # an id that happens to be BOS is the caller's
    assert len(hyaena.score(model, tokenizer, [256, 65, 66]).logprobs) == 3


def test_scores_are_of_logits_that_are_not_rounded_to_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer, ids = spread().bfloat16(), ByteTokenizer(260), torch.randint(260, (1, 20))
    assert model.lm_head is not None
    with torch.inference_mode():
        found = model(ids, wide_logits=True)
        assert found.dtype == torch.float32 and torch.equal(found.bfloat16(), model(ids))
        assert torch.equal(found[:, -1:], model(ids, wide_logits=True, cache=model.make_cache())[:, -1:])
        (score,) = hyaena.score(model, tokenizer, ids.tolist(), bos=False)
        want = found.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
        np.testing.assert_allclose(score.logprobs[1:], want.numpy(), rtol=1e-6)

        computed, logits = [], StripedHyena.logits
        monkeypatch.setattr(StripedHyena, "logits", lambda *a, **k: computed.append(logits(*a, **k)) or computed[-1])
        hyaena.score_continuations(model, [([1, 2], [[3, 4], [5]]), ([1], [[2]])])
        list(iter_edit_scores(model, tokenizer, [("ACGTACGT", [Edit(3, "T", "GG")])]))
        assert len(computed) >= 4 and {t.dtype for t in computed} == {torch.float32}
        for head in (spread().lm_head, QuantizedLinear(16, 260, SCHEMES["float8"])):
            model.lm_head = head.bfloat16()  # type: ignore[union-attr]
            monkeypatch.setattr("hyaena.model.WIDEST_HEAD", 260 * 16 - 1)
            assert model(ids, wide_logits=True).dtype == torch.bfloat16


def test_logits_come_in_chunks_of_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = spread(), ByteTokenizer(260)
    whole = hyaena.score(model, tokenizer, ["some text", "more text than that"])
    sizes = []
    head = model.lm_head
    assert head is not None
    handle = head.register_forward_hook(lambda module, args, output: sizes.append(output.numel()))
    monkeypatch.setitem(token_scores.LOGITS_AT_ONCE, "cpu", 5 * 260)
    chunked = hyaena.score(model, tokenizer, ["some text", "more text than that"])
    handle.remove()
    assert max(sizes) == 5 * 260 and sum(sizes) == 28 * 260  # every predicted token once, the last positions not
    for one, other in zip(whole, chunked, strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-6)


def test_scores_are_those_of_the_originals_logits(golden_case: Path) -> None:
    config = read_config(golden_case / "config.yml")
    model = StripedHyena(config).eval()
    model.load_state_dict(load_file(golden_case / "model.safetensors"))
    expected = load_file(golden_case / "expected.safetensors")
    ids, logp = expected["input_ids"], expected["logits"].double().log_softmax(-1)
    tokenizer = ByteTokenizer(max(259, config.vocab_size))
    for found, row, given in zip(hyaena.score(model, tokenizer, ids.tolist()), logp, ids, strict=True):
        wanted = row[:-1].gather(1, given[1:, None].long())[:, 0].numpy()
        # logits agree to 1e-4 of the largest, which is of order 1 to 10
        np.testing.assert_allclose(found.logprobs[1:], wanted, atol=1e-4 * float(expected["logits"].abs().max()))
        entropy = -(row.exp() * row).sum(-1)[:-1].numpy()
        np.testing.assert_allclose(found.entropies[1:], entropy, atol=1e-3)


# --- both strands


@pytest.mark.parametrize("bos", [False, None])
def test_both_strands_are_scored_and_averaged(bos: bool | None) -> None:
    model = spread(replace(TINY_EVO, vocab_size=512) if bos is False else replace(BYTES, vocab_size=259))
    tokenizer = CharacterTokenizer(512) if bos is False else ByteTokenizer(259)
    text, other = "ACGGTNa", "tNACCGT"
    found = hyaena.score(model, tokenizer, ["TTT", text], both_strands=True, bos=bos)[1]
    one, two = hyaena.score(model, tokenizer, [text, other], bos=bos)
    assert found.strands is not None and found.ranks is None
    for mine, alone in zip(found.strands, (one, two), strict=True):
        np.testing.assert_allclose(mine.logprobs, alone.logprobs, atol=1e-6)
        np.testing.assert_array_equal(mine.ranks, alone.ranks)
    assert found.sum == pytest.approx((one.sum + two.sum) / 2, abs=1e-5) and found.count == one.count
    pairs = np.stack([one.logprobs, two.logprobs[::-1]])
    np.testing.assert_allclose(found.logprobs, np.nanmean(pairs, axis=0), atol=1e-6)
    assert not np.isnan(found.logprobs).any()
    tensors = hyaena.score(model, tokenizer, text, both_strands=True, bos=bos, output="torch")
    np.testing.assert_allclose(tensors.logprobs.numpy(), found.logprobs, atol=1e-6)


def test_both_strands_want_dna() -> None:
    model, tokenizer = spread(), ByteTokenizer(260)
    with pytest.raises(RecordError, match="text 1: 'e' at position 1 is no base"):
        hyaena.score(model, tokenizer, ["ACGT", "hello"], both_strands=True)
    with pytest.raises(RecordError, match="token ids have no complement"):
        hyaena.score(model, tokenizer, [65, 66], both_strands=True)


# --- results


def test_tensors_can_be_trained_with() -> None:
    model, tokenizer = spread(), ByteTokenizer(260)
    found = hyaena.score(model, tokenizer, "abc", output="torch")
    weight = torch.ones(3, requires_grad=True)
    (found.logprobs * weight).sum().backward()
    torch.testing.assert_close(weight.grad, found.logprobs)


def test_results_come_in_order_as_passes_are_done() -> None:
    model, tokenizer = spread(), ByteTokenizer(260)
    taken, read = [], []
    texts = (taken.append(i) or "x" * (5 + i % 3) for i in range(20))
    results = hyaena.iter_scores(model, tokenizer, texts, tokens_per_pass=20, progress=read.append)
    assert not taken  # nothing is read at the call
    index, first = next(results)
    assert index == 0 and len(first.logprobs) == 5 and len(taken) <= 4  # those of the first pass, and the next one
    assert [0, *(i for i, _ in results)] == list(range(20))
    assert read == sorted(read) and read[-1] == sum(6 + i % 3 for i in range(20))


def test_what_comes_before_a_bad_text_is_scored() -> None:
    model, tokenizer = spread(), ByteTokenizer(260)
    results = hyaena.iter_scores(model, tokenizer, ["a", "b", "", "c"])
    assert [next(results)[0], next(results)[0]] == [0, 1]
    with pytest.raises(RecordError, match="text 2: it is empty") as caught:
        next(results)
    assert caught.value.index == 2 and caught.value.reason == "it is empty: leave it out"


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ([], {}, "there are no texts"),
        (None, {}, "texts are text, bytes"),
        (["ok", 3], {}, "text 1: a prompt is text"),
        (["ok", ["a", "b"]], {}, "text 1: a text is str, bytes or a list of token ids"),
        ([[1, 2], [3, 260]], {}, "text 1: token id 260 is outside the vocabulary 0..259"),
        ([[1, -2]], {}, "text 0: token id -2 is outside"),
        (["ok", "x" * 200], {}, "text 1: 201 tokens pass the maximum length 200: shorten it, or pass a larger"),
        ("ok", {"max_length": 2}, "text 0: 3 tokens pass"),
        ("ok", {"tokens_per_pass": 0}, "tokens_per_pass must be at least 1"),
        ("ok", {"method": "ftt"}, "unknown method"),
        ("ok", {"output": "list"}, "output must be numpy or torch"),
        ("ok", {"both_strand": True}, "did you mean both_strands"),
        ("ok", {"top": 261}, "top must be between 0 and the vocabulary size 260"),
        ("ok", {"entropy": "yes"}, "entropy must be True or False"),
        ("ok", {"progress": 3}, "progress must be a function"),
    ],
)
def test_mistakes_are_one_line(texts: object, options: dict[str, object], message: str) -> None:
    with pytest.raises((InputError, hyaena.errors.UnsupportedError), match=message):
        hyaena.score(spread(), ByteTokenizer(260), texts, **options)  # type: ignore[arg-type]


def test_a_longer_text_can_be_allowed() -> None:
    assert hyaena.score(spread(), ByteTokenizer(260), "x" * 300, max_length=400).count == 300


def test_models_and_tokenizers_that_do_not_fit() -> None:
    with pytest.raises(InputError, match="make the tokenizer with vocab_size=260"):
        hyaena.score(spread(), ByteTokenizer(259), "a")
    with pytest.raises(InputError, match="model must be a StripedHyena"):
        hyaena.score("cub", ByteTokenizer(260), "a")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="tokenizer must be the one"):
        hyaena.score(spread(), None, "a")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no id that begins a document"):
        hyaena.score(spread(replace(TINY, vocab_size=256)), CharacterTokenizer(256), "a", bos=True)
    with pytest.raises(RecordError, match="text 0: the text has the byte 0"):
        hyaena.score(spread(replace(TINY, vocab_size=256)), CharacterTokenizer(256), "a\0")


@pytest.mark.parametrize("tokens_per_pass", [None, 4])
def test_logits_that_are_not_finite_name_the_text_and_the_layer(tokens_per_pass: int | None) -> None:
    model, tokenizer = spread(), ByteTokenizer(260)
    with torch.no_grad():
        model.embed_tokens.weight[ord("z")] = torch.nan
    with pytest.raises(NonFiniteError, match="text 1: its logits are not finite: they first") as caught:
        hyaena.score(model, tokenizer, ["abc", "abzabc"], tokens_per_pass=tokens_per_pass)
    assert isinstance(caught.value, NonFiniteRecordError) and caught.value.index == 1
    assert "the embedding, at token 3" in str(caught.value)
