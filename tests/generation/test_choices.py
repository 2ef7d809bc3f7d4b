"""What a row may choose: ``n`` samples, biases and allowed tokens, in every way of decoding."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers

from configs import TINY_BYTES
from hyaena.decoding import Decoder
from hyaena.errors import InputError, NonFiniteError
from hyaena.generation import generate, stream
from hyaena.model import StripedHyena
from hyaena.sampling import SamplingParams, bias_table, sample
from hyaena.tokenizers import ByteTokenizer, CharacterTokenizer, HFTokenizer

TOKENIZER = ByteTokenizer()
EOS = 257


@pytest.fixture(scope="module")
def model() -> StripedHyena:
    torch.manual_seed(1)
    return StripedHyena(TINY_BYTES).double()


def tokens(rows: Any) -> Any:
    return [tokens(row) for row in rows] if isinstance(rows, list) else rows.tokens


DECODING = pytest.mark.parametrize("decoding", ["eager", "static"])

# --- n samples


@DECODING
def test_samples_of_one_prompt(model: StripedHyena, decoding: Any) -> None:
    options: Any = {"temperature": 1.0, "seed": 7, "max_new_tokens": 8, "decoding": decoding, "stop_at_eos": False}
    one = generate(model, TOKENIZER, "ab", **options)
    samples = generate(model, TOKENIZER, "ab", n=4, **options)
    assert isinstance(samples, list) and len({tuple(row.tokens) for row in samples}) == 4
    assert samples[0].tokens == one.tokens
    assert tokens(samples) == tokens(generate(model, TOKENIZER, ["ab"] * 4, **options))
    assert tokens(samples) == tokens(generate(model, TOKENIZER, "ab", n=4, **options))
    assert tokens(generate(model, TOKENIZER, "ab", n=1, **options)) == [one.tokens]
    assert tokens(samples) != tokens(generate(model, TOKENIZER, "ab", n=4, **(options | {"seed": 8})))


def test_samples_of_a_list_of_prompts(model: StripedHyena) -> None:
    options: Any = {"temperature": 1.0, "seed": 7, "max_new_tokens": 6, "stop_at_eos": False}
    prompts = ["ab", "a longer one", "ab"]
    rows = generate(model, TOKENIZER, prompts, n=3, **options)
    assert [len(samples) for samples in rows] == [3, 3, 3]
    assert [samples[0].tokens for samples in rows] == tokens(generate(model, TOKENIZER, prompts, **options))
    assert len({tuple(row.tokens) for samples in rows for row in samples}) == 9
    assert tokens(rows[1]) == tokens(generate(model, TOKENIZER, prompts[1], n=3, **options))
    seeded = generate(model, TOKENIZER, prompts, n=2, **(options | {"seed": [1, 2, 1]}))
    assert tokens(seeded[0]) == tokens(seeded[2])
    assert seeded[0][0].tokens != seeded[0][1].tokens


def test_the_prompt_of_samples_is_read_once(model: StripedHyena, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, ...]] = []
    forward = StripedHyena.forward

    def count(self: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor:
        shapes.append(tuple(ids.shape))
        return forward(self, ids, **options)

    monkeypatch.setattr(StripedHyena, "forward", count)
    generate(model, TOKENIZER, "abcd", n=5, max_new_tokens=2, stop_at_eos=False)
    assert shapes == [(1, 5), (5, 1)]
    shapes.clear()
    generate(model, TOKENIZER, "abcd", n=5, max_new_tokens=1)
    assert shapes == [(1, 5)]


def test_samples_in_a_stream(model: StripedHyena) -> None:
    options: Any = {"temperature": 1.0, "seed": 7, "max_new_tokens": 3, "stop_at_eos": False}
    rows: dict[int, list[int]] = {}
    for event in stream(model, TOKENIZER, ["ab", "cd"], n=2, **options):
        rows.setdefault(event.index, []).append(event.token)
    expected = generate(model, TOKENIZER, ["ab", "cd"], n=2, **options)
    assert [rows[i] for i in range(4)] == tokens([row for samples in expected for row in samples])


# --- biases and allowed tokens


@DECODING
@pytest.mark.parametrize("temperature", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("allowed", ["ACGT", [65, 67, 71, 84]])
def test_only_allowed_tokens_are_chosen(model: StripedHyena, decoding: Any, temperature: float, allowed: Any) -> None:
    options: Any = {"decoding": decoding, "temperature": temperature, "seed": 1, "max_new_tokens": 40}
    row = generate(model, TOKENIZER, "AC", allowed_tokens=allowed, stop_at_eos=False, **options)
    assert set(row.text) <= set("ACGT") and len(row.text) == 40
    assert temperature == 0 or set(row.text) == set("ACGT")


@DECODING
def test_tokens_that_end_a_row_stay_allowed(model: StripedHyena, decoding: Any) -> None:
    options: Any = {"decoding": decoding, "max_new_tokens": 40, "allowed_tokens": "A"}
    row = generate(model, TOKENIZER, "AC", logit_bias={EOS: 100}, **options)
    assert row.tokens == [EOS] and row.finish_reason == "eos"
    row = generate(model, TOKENIZER, "AC", logit_bias={7: 100}, stop_token_ids=[7], **options)
    assert row.tokens == [7] and row.finish_reason == "stop"
    row = generate(model, TOKENIZER, "AC", logit_bias={EOS: -100}, **options)
    assert row.text == "A" * 40


@DECODING
def test_a_bias_is_added_to_the_logits(model: StripedHyena, decoding: Any) -> None:
    """Against the model's own logits: exp(bias) times as probable, and log-probabilities are the model's."""
    options: Any = {"max_new_tokens": 6, "decoding": decoding, "stop_at_eos": False, "logprobs": 2}
    plain = generate(model, TOKENIZER, "ab", **options)
    (best, first), (second, next_) = plain.top_logprobs[0]
    gap = first - next_
    assert generate(model, TOKENIZER, "ab", logit_bias={second: gap * 0.99}, **options).tokens[0] == best
    row = generate(model, TOKENIZER, "ab", logit_bias={second: gap * 1.01}, **options)
    assert row.tokens[0] == second and row.logprobs[0] == pytest.approx(next_)
    assert row.top_logprobs[0] == plain.top_logprobs[0]
    for forbidden in (-math.inf, -100, -1000.0):
        row = generate(model, TOKENIZER, "ab", logit_bias={best: forbidden}, **options)
        assert row.tokens[0] == second and best not in row.tokens


def test_the_order_of_penalty_and_bias() -> None:
    logits = torch.tensor([[2.0, 1.5, -1.0]])
    seen = torch.tensor([[True, False, False]])
    params = [SamplingParams(repetition_penalty=2.0, logit_bias={0: 0.6})]  # 2/2 + 0.6, not (2 + 0.6)/2
    assert sample(logits, params, [params[0].generator()], seen=seen).tolist() == [0]
    params = [SamplingParams(repetition_penalty=2.0, logit_bias={0: 0.4})]
    assert sample(logits, params, [params[0].generator()], seen=seen).tolist() == [1]


def test_samples_have_the_biased_distribution() -> None:
    """4,000 draws of two tokens with equal logits, one with a bias of log 3: 3/4 within 5 standard deviations."""
    count = 4_000
    params = [SamplingParams(temperature=1.0, seed=i, logit_bias={1: math.log(3)}, allowed_tokens=(1, 2))
              for i in range(count)]  # fmt: skip
    drawn = sample(torch.zeros(count, 5), params, [p.generator() for p in params])
    shares = drawn.bincount(minlength=5) / count
    assert shares[[0, 3, 4]].sum() == 0
    assert float(shares[1]) == pytest.approx(0.75, abs=5 * math.sqrt(0.75 * 0.25 / count))


def test_rows_of_a_decoder_have_biases_of_their_own() -> None:
    """Rows with and without a bias join and leave; every row equals itself alone."""
    torch.manual_seed(2)
    model = StripedHyena(TINY_BYTES).double()
    kinds = [
        SamplingParams(),
        SamplingParams(temperature=1.0, seed=1, allowed_tokens=(65, 67)),
        SamplingParams(logit_bias={5: 3.0, 65: -100}),
        SamplingParams(temperature=0.7, top_k=9, seed=2, repetition_penalty=1.2, logit_bias={9: 1.0}),
    ]

    def join(decoder: Decoder, params: SamplingParams) -> None:
        cache = model.make_cache(1, max_length=40)
        with torch.inference_mode():
            model(torch.tensor([[1, 2, 3]]), cache=cache)
        seen = torch.zeros(1, 259, dtype=torch.bool)
        decoder.add(cache, torch.tensor([4]), [params], [params.generator()], seen=seen)

    def steps(decoder: Decoder, count: int) -> list[list[int]]:
        rows = []
        for _ in range(count):
            decoder.launch()
            rows.append(decoder.fetch().tokens)
        return [list(row) for row in zip(*rows, strict=True)]

    alone = []
    for params in kinds:
        decoder = Decoder(model, 1)
        join(decoder, params)
        assert (decoder.sampler.bias is None) == (not params.biased)
        alone.append(steps(decoder, 8))
    decoder = Decoder(model, 4)
    join(decoder, kinds[0])
    found = {0: steps(decoder, 2)[0]}
    assert decoder.sampler.bias is None
    for i in (1, 2, 3):
        join(decoder, kinds[i])
    for i, row in enumerate(steps(decoder, 3)):
        found[i] = found.get(i, []) + row
    decoder.keep([0, 2, 3])
    for i, row in zip((0, 2, 3), steps(decoder, 3), strict=True):
        found[i] += row
    decoder.keep([0])
    assert not decoder.sampler.features.bias
    join(decoder, kinds[1])  # into the place of a row that had another bias
    found[1] = steps(decoder, 8)[1]
    for i, row in found.items():
        assert row == alone[i][0][: len(row)], i


def test_a_bias_table_is_made_for_rows_that_need_one() -> None:
    plain, biased = SamplingParams(), SamplingParams(logit_bias={1: 2.0}, allowed_tokens=[1, 2])
    assert bias_table([plain, plain], 4, "cpu") is None
    table = bias_table([plain, biased], 4, "cpu")
    assert table is not None and table.tolist() == [[0, 0, 0, 0], [-math.inf, 2, 0, -math.inf]]


def test_no_finite_logit_among_the_allowed() -> None:
    logits = torch.tensor([[1.0, -math.inf, 0.0]])
    params = [SamplingParams(allowed_tokens=[1])]
    with pytest.raises(NonFiniteError, match="not finite"):
        sample(logits, params, [params[0].generator()])


# --- which tokens a text allows


def test_the_tokens_of_characters() -> None:
    assert TOKENIZER.tokens_within("ACGT") == [65, 67, 71, 84]
    assert CharacterTokenizer().tokens_within("N") == [78]
    for text in ("é", ""):
        with pytest.raises(InputError, match="name token ids"):
            TOKENIZER.tokens_within(text)


def test_a_tokenizer_of_words_allows_all_that_the_characters_spell(tmp_path: Path) -> None:
    vocab = {"<s>": 0, "A": 1, "C": 2, "AC": 3, "CAC": 4, "ACG": 5, "Ġ": 6, "ĠA": 7}
    library = Library(models.BPE(vocab=vocab, merges=[]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    library.decoder = decoders.ByteLevel()  # pyright: ignore
    library.add_special_tokens(["<s>"])
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = HFTokenizer(tmp_path / "tokenizer.json")
    assert tokenizer.tokens_within("CA") == [1, 2, 3, 4]
    assert tokenizer.tokens_within("A ") == [1, 6, 7]


# --- mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "n must be between 1 and 1,048,576"),
        ({"n": 1.5}, "n must be between 1 and 1,048,576"),
        ({"logit_bias": [5]}, "logit_bias must map ids to numbers"),
        ({"logit_bias": "5"}, "logit_bias must map ids to numbers"),
        ({"logit_bias": {"a": 1.0}}, "a token id is a whole number"),
        ({"logit_bias": {5: "a"}}, "a bias of logit_bias must be a number up to 100"),
        ({"logit_bias": {5: math.nan}}, "must be a number up to 100"),
        ({"logit_bias": {5: math.inf}}, "must be a number up to 100"),
        ({"logit_bias": {5: 101}}, "must be a number up to 100"),
        ({"logit_bias": {259: 1}}, "logit_bias: token id 259 is outside the vocabulary 0..258"),
        ({"allowed_tokens": []}, "allowed_tokens is empty"),
        ({"allowed_tokens": ""}, "allowed_tokens is empty"),
        ({"allowed_tokens": 5}, "allowed_tokens must be a list"),
        ({"allowed_tokens": b"AC"}, "allowed_tokens must be a list"),
        ({"allowed_tokens": [-5]}, "whole number, 0 or more"),
        ({"allowed_tokens": [259]}, "allowed_tokens: token id 259 is outside"),
        ({"allowed_tokens": "é"}, "no token of the tokenizer stands for 'é' alone"),
        ({"allowed_tokens": [5], "logit_bias": {5: -100}, "stop_at_eos": False}, "forbid every token"),
        ({"logit_bias": dict.fromkeys(range(259), -100)}, "forbid every token"),
    ],
)
def test_mistakes_are_named_at_the_call(model: StripedHyena, options: Any, message: str) -> None:
    for function in (stream, generate):
        with pytest.raises(InputError, match=message) as caught:
            function(model, TOKENIZER, "a", **options)
        assert "\n" not in str(caught.value) and not isinstance(caught.value, TypeError)


def test_a_decoder_refuses_before_it_changes(model: StripedHyena) -> None:
    decoder = Decoder(model, 1)
    cache = model.make_cache(1, max_length=9)
    with torch.inference_mode():
        model(torch.tensor([[1, 2]]), cache=cache)
    params = SamplingParams(logit_bias={999: 1.0})
    with pytest.raises(InputError, match="token id 999 is outside"):
        decoder.add(cache, torch.tensor([4]), [params], [params.generator()])
    assert decoder.rows == 0 and cache.lengths == [2]
