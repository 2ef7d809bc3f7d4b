"""``generate`` and ``stream`` as they are called: samples, ends, prompts, options, and mistakes in all of them."""

from __future__ import annotations

import inspect
import itertools
import pydoc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers

import hyaena
from configs import TINY_BYTES
from hyaena.config import ModelConfig
from hyaena.errors import InputError, UnsupportedError
from hyaena.generation import Options, Settings, generate, parse_prompts, stream
from hyaena.generation.loop import Row
from hyaena.generation.stop_strings import StopStringFilter
from hyaena.model import StripedHyena
from hyaena.sampling import SamplingParams
from hyaena.tokenizers import ByteTokenizer, CharacterTokenizer, HFTokenizer

TOKENIZER = ByteTokenizer()


@pytest.fixture(scope="module")
def model() -> StripedHyena:
    torch.manual_seed(1)
    return StripedHyena(TINY_BYTES).double()


class Fixed(StripedHyena):
    """Gives every token the logits of the next id: a completion counts up from the prompt's last token."""

    def forward(self, ids: torch.Tensor, **options: Any) -> torch.Tensor:  # pyright: ignore
        super().forward(ids, **options)  # the cache advances
        logits = torch.zeros(*ids.shape, self.config.vocab_size)
        logits.scatter_(-1, ((ids + 1) % self.config.vocab_size).unsqueeze(-1), 9.0)
        return logits[:, -1:]


@pytest.fixture(scope="module")
def counting() -> StripedHyena:
    return Fixed(TINY_BYTES)


# --- samples: a model of uniform logits shows the random numbers as they are


@pytest.fixture(scope="module")
def uniform() -> StripedHyena:
    model = StripedHyena(TINY_BYTES)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return model


def tokens(model: StripedHyena, prompts: Any, **options: Any) -> list[list[int]]:
    options = {"max_new_tokens": 24, "temperature": 1.0, "stop_at_eos": False} | options
    rows: Any = generate(model, TOKENIZER, prompts, **options)
    return [row.tokens for row in rows]


def agreement(one: list[int], other: list[int]) -> float:
    return sum(a == b for a, b in zip(one, other, strict=True)) / len(one)


@pytest.mark.parametrize("decoding", ["eager", "static"])
def test_rows_of_one_seed_are_independent_samples(uniform: StripedHyena, decoding: str) -> None:
    prompts = ["ACGT", "ACGA", "TTTT", "ACGT", "ACGT", "A" * 30]
    rows = tokens(uniform, prompts, seed=5, decoding=decoding)
    # Of 24 tokens from 259, two independent rows share 0.1 on average, and 4 or more with probability 2e-6 a pair.
    assert max(agreement(a, b) for a, b in itertools.combinations(rows, 2)) < 4 / 24
    assert rows == tokens(uniform, prompts, seed=5, decoding=decoding)
    assert rows != tokens(uniform, prompts, seed=6, decoding=decoding)


def test_a_row_depends_on_its_own_prompt_and_seed_only(model: StripedHyena) -> None:
    one, two, three = "import ", "def main(", "class A"
    rows = dict(zip((one, two, three), tokens(model, [one, two, three], seed=7), strict=True))
    assert tokens(model, [three, one], seed=7) == [rows[three], rows[one]]
    for prompt, row in rows.items():
        assert tokens(model, [prompt], seed=7) == [row]
        assert generate(model, TOKENIZER, prompt, max_new_tokens=24, temperature=1.0, seed=7).tokens[:9] == row[:9]


def test_equal_prompts_are_told_apart_by_their_order(model: StripedHyena) -> None:
    samples = tokens(model, ["ab"] * 3, seed=7)
    assert len({tuple(row) for row in samples}) == 3
    mixed = tokens(model, ["ab", "cd", "ab", b"ab"], seed=7)
    assert [mixed[0], mixed[2], mixed[3]] == samples
    assert tokens(model, [TOKENIZER.encode("ab")], seed=7) == samples[:1]  # the ids are the prompt


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor])
def test_a_list_of_seeds_gives_each_row_its_own(model: StripedHyena, kind: Any) -> None:
    rows = tokens(model, ["ab", "cd", "ab", "ab"], seed=kind([3, 4, 3, 5]))
    for prompt, seed, row in zip(("ab", "cd", "ab", "ab"), (3, 4, 3, 5), rows, strict=True):
        assert tokens(model, [prompt], seed=seed) == [row]
    assert rows[0] == rows[2] != rows[3]


def test_a_list_of_seeds_may_leave_some_to_chance(model: StripedHyena) -> None:
    first, second = (tokens(model, ["ab", "ab"], seed=[3, None]) for _ in range(2))
    assert first[0] == second[0]
    assert first[1] != second[1]
    assert tokens(model, ["ab"], seed=None) != tokens(model, ["ab"], seed=None)


def test_all_bits_of_a_seed_count(model: StripedHyena) -> None:
    rows = [tokens(model, ["ab"], seed=seed) for seed in (1, 1 + 2**32, 1 + 2**62)]
    assert rows[0] != rows[1] != rows[2] != rows[0]


# --- ends


def test_several_eos_ids_end_a_row(counting: StripedHyena) -> None:
    tokenizer = ByteTokenizer()
    tokenizer.other_eos_ids = (70, 80)
    done = generate(counting, tokenizer, [[65], [75], [85]], max_new_tokens=9)
    assert [row.tokens[-1] for row in done] == [70, 80, 94]
    assert [row.finish_reason for row in done] == ["eos", "eos", "length"]
    assert done[0].text == "BCDE"
    ignoring = generate(counting, tokenizer, [65], max_new_tokens=9, stop_at_eos=False)
    assert (ignoring.text, ignoring.finish_reason) == ("BCDEFGHIJ", "length")


@pytest.mark.parametrize("ids", [[70], (99, 70), np.array([70]), torch.tensor([70], dtype=torch.uint8), range(70, 72)])
def test_stop_tokens_end_a_row(counting: StripedHyena, ids: Any) -> None:
    done = generate(counting, TOKENIZER, [65], max_new_tokens=9, stop_token_ids=ids)
    assert (done.tokens, done.text, done.finish_reason) == ([66, 67, 68, 69, 70], "BCDE", "stop")


def test_a_stop_token_counts_also_where_eos_does_not(counting: StripedHyena) -> None:
    tokenizer = ByteTokenizer()
    tokenizer.eos_id = 70
    done = generate(counting, tokenizer, [65], max_new_tokens=9, stop_token_ids=[70], stop_at_eos=False)
    assert (done.text, done.finish_reason) == ("BCDE", "stop")


def test_what_a_stop_string_held_back_is_shown_at_a_stop_token(counting: StripedHyena) -> None:
    done = generate(counting, TOKENIZER, [65], max_new_tokens=9, stop_token_ids=[70], stop="DEx")
    assert done.text == "BCDE"


def test_what_a_stop_string_held_back_is_shown_at_the_last_token(counting: StripedHyena) -> None:
    done = generate(counting, TOKENIZER, [65], max_new_tokens=3, stop="CDx")
    assert (done.text, done.finish_reason) == ("BCD", "length")


def test_a_stop_string_that_only_the_end_completes(counting: StripedHyena) -> None:
    """An unfinished character becomes U+FFFD where the row ends: at its last token, or at EOS."""
    last = generate(counting, TOKENIZER, [0xC1], max_new_tokens=1, stop="\ufffd")
    assert (last.tokens, last.text, last.finish_reason) == ([0xC2], "", "stop")
    tokenizer = ByteTokenizer()
    tokenizer.eos_id = 0xC3
    ended = generate(counting, tokenizer, [0xC1], max_new_tokens=9, stop="\ufffd")
    assert (ended.tokens, ended.text, ended.finish_reason) == ([0xC2, 0xC3], "", "stop")


def test_the_figures_of_a_row() -> None:
    """Five tokens at given seconds: the speed counts the four after the first."""
    row = Row(
        index=0,
        prompt=[65, 66],
        params=SamplingParams(),
        text=StopStringFilter(TOKENIZER, [65, 66], ()),
        eos_ids=frozenset(),
        stop_ids=frozenset(),
        max_new_tokens=9,
    )
    for now in (1.0, 1.5, 2.0, 2.5, 3.0):
        row.take(67, now)
    stats = row.stats(3.0, torch.device("cpu"))
    assert (stats.prompt_tokens, stats.completion_tokens) == (2, 5)
    assert (stats.time_to_first_token, stats.decode_tokens_per_second) == (1.0, 2.0)


@pytest.fixture
def named(tmp_path: Path) -> HFTokenizer:
    """Ids 0..255 are bytes, 256 to 258 are special tokens, of which 257 is EOS."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    library = Library(models.BPE({name: i for i, name in enumerate(alphabet)}, []))
    library.pre_tokenizer, library.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    library.add_special_tokens(["<one>", "</s>", "<end>"])
    library.save(str(tmp_path / "tokenizer.json"))
    return HFTokenizer(tmp_path / "tokenizer.json")


def test_a_stop_string_that_names_a_special_token_stops_there(counting: StripedHyena, named: HFTokenizer) -> None:
    def run(**options: Any) -> tuple[list[int], str]:
        done = generate(counting, named, [255], max_new_tokens=4, **options)
        return done.tokens, done.finish_reason

    assert run(stop="<one>") == ([256], "stop")
    assert run() == ([256, 257], "eos")
    assert run(stop="</s>") == ([256, 257], "eos")
    assert run(stop="</s>", stop_at_eos=False) == ([256, 257], "stop")
    assert run(stop=["x", "<end>"], stop_at_eos=False) == ([256, 257, 258], "stop")


def test_special_tokens_in_a_prompt_are_text_unless_told(counting: StripedHyena, named: HFTokenizer) -> None:
    plain = generate(counting, named, "ab</s>", max_new_tokens=1)
    told = generate(counting, named, "ab</s>", max_new_tokens=1, special=True)
    assert (plain.stats.prompt_tokens, told.stats.prompt_tokens) == (6, 3)
    assert told.tokens == [258]


def test_evos_characters_have_no_bytes_0_and_1() -> None:
    model = StripedHyena(ModelConfig(**{**vars(TINY_BYTES), "vocab_size": 512, "tokenizer": "characters"}))
    with pytest.raises(InputError, match="byte 1 at position 2"):
        generate(model, CharacterTokenizer(), "AC\x01")


# --- prompts


@pytest.mark.parametrize(
    "prompt",
    [
        bytearray(b"def"),
        memoryview(b"def"),
        np.str_("def"),
        np.array([256, 100, 101, 102]),
        np.array([256, 100, 101, 102], np.uint16),
        [np.int64(256), np.uint8(100), torch.tensor(101), 102],
        torch.tensor([256, 100, 101, 102], dtype=torch.int32),
        (token for token in (256, 100, 101, 102)),
        np.array([256, 100, 101, 102]).tolist(),
    ],
)
def test_one_prompt_in_any_form(model: StripedHyena, prompt: Any) -> None:
    wanted = generate(model, TOKENIZER, "def", max_new_tokens=3)
    assert generate(model, TOKENIZER, prompt, max_new_tokens=3).tokens == wanted.tokens


@pytest.mark.parametrize(
    "prompts",
    [
        [bytearray(b"ab"), "cd"],
        (text for text in ("ab", b"cd")),
        np.array(["ab", "cd"]),
        {"x": "ab", "y": "cd"}.values(),
        [torch.tensor([256, 97, 98]), np.array([256, 99, 100])],
        torch.tensor([[256, 97, 98], [256, 99, 100]], dtype=torch.int16),
        ([256, 97, 98], range(256, 257)),
    ],
)
def test_several_prompts_in_any_form(prompts: Any) -> None:
    parsed, single = parse_prompts(prompts)
    assert not single
    ids = [TOKENIZER.encode(one) if isinstance(one, str | bytes) else one for one in parsed]
    assert ids == [[256, 97, 98], [256, 99, 100]] or ids == [[256, 97, 98], [256]]


WRONG_PROMPTS = [
    None,
    5,
    1.5,
    True,
    {"a": 1},
    {"prompt": "text"},
    {1, 2},
    frozenset(["a"]),
    object(),
    torch.tensor(5),
    np.array(5),
    torch.tensor([True, False]),
    np.array([True, False]),
    torch.tensor([1.0, 2.0]),
    np.array([0.5]),
    torch.zeros(2, 2, 2, dtype=torch.long),
    torch.empty(3, dtype=torch.long, device="meta"),
    memoryview(np.arange(4)),
    [None],
    [1.5],
    [True],
    [1, None],
    [1, "a"],
    ["a", 1],
    ["a", None],
    ["a", ["b"]],
    [["a"], ["b"]],
    [[1], [[2]]],
    [[1], {2: 3}],
    [[1.5]],
    [[True]],
    [{"a": 1}],
    [{1, 2}],
    [10**400],
    [[1], 2],
    itertools.repeat(1),
    {"a": 1}.keys(),
]


@pytest.mark.parametrize("prompt", WRONG_PROMPTS, ids=lambda prompt: type(prompt).__name__)
def test_what_is_no_prompt_is_refused_in_one_line(model: StripedHyena, prompt: Any) -> None:
    for function in (stream, generate):
        with pytest.raises(InputError) as caught:
            function(model, TOKENIZER, prompt)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 300
        assert not isinstance(caught.value, TypeError)


def test_a_file_is_no_prompt(model: StripedHyena, tmp_path: Path) -> None:
    (tmp_path / "prompt").write_text("one\ntwo\n")
    with open(tmp_path / "prompt") as file, pytest.raises(InputError, match="read the file first"):
        generate(model, TOKENIZER, file)  # pyright: ignore


@pytest.mark.parametrize(
    "prompt", ["", b"", bytearray(), [], (), [[]], [""], ["a", ""], [[1], []], torch.zeros(0), iter(())]
)
def test_an_empty_prompt_is_named(model: StripedHyena, prompt: Any) -> None:
    with pytest.raises(InputError, match="the prompt is empty"):
        stream(model, TOKENIZER, prompt)


# --- options


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("max_new_tokens", None, "max_new_tokens must be at least 1, not None"),
        ("max_new_tokens", 5.0, "max_new_tokens must be at least 1, not 5.0"),
        ("max_new_tokens", "5", "max_new_tokens must be at least 1, not '5'"),
        ("max_new_tokens", True, "max_new_tokens must be at least 1"),
        ("max_new_tokens", 10**400, "pass the maximum length 512"),
        ("max_new_tokens", torch.tensor([1, 2]), "max_new_tokens must be"),
        ("temperature", "0.5", "temperature must be 0 or more, not '0.5'"),
        ("temperature", None, "temperature must be 0 or more, not None"),
        ("temperature", True, "temperature must be 0 or more"),
        ("temperature", 10**400, "temperature must be 0 or more"),
        ("temperature", torch.tensor([1.0, 2.0]), "temperature must be"),
        ("top_k", 2.0, "top_k must be a whole number"),
        ("top_k", None, "top_k must be a whole number"),
        ("top_k", 10**400, "top_k must be a whole number"),
        ("top_p", "1", "top_p must be above 0"),
        ("min_p", [0.1], "min_p must be between"),
        ("repetition_penalty", 1e-320, "repetition_penalty must be above 0"),
        ("repetition_penalty", 1e308, "repetition_penalty must be above 0"),
        ("seed", "7", "seed must be a whole number"),
        ("seed", 1.0, "seed must be a whole number"),
        ("seed", 2**63, "seed must be a whole number"),
        ("seed", {"a": 1}, "seed must be a whole number"),
        ("seed", {1}, "seed must be a whole number"),
        ("seed", [1.5], "seed must be a whole number"),
        ("seed", ["1"], "seed must be a whole number"),
        ("seed", [[1]], "seed must be a whole number"),
        ("seed", [], "0 seeds for 1 prompts"),
        ("stop", 5, "stop must be text or a list of texts, not an int"),
        ("stop", b"x", "stop must be text"),
        ("stop", {"a": 1}, "stop must be text"),
        ("stop", [5], "a stop string is text, not 5: ids go into stop_token_ids"),
        ("stop", [b"x"], "a stop string is text"),
        ("stop", [None], "a stop string is text"),
        ("stop", [["a"]], "a stop string is text"),
        ("stop_token_ids", 5, "stop_token_ids must be a list"),
        ("stop_token_ids", 0, "stop_token_ids must be a list"),
        ("stop_token_ids", "5", "stop_token_ids must be a list"),
        ("stop_token_ids", ["5"], "stop_token_ids must be whole numbers"),
        ("stop_token_ids", [1.0], "stop_token_ids must be whole numbers"),
        ("stop_token_ids", [259], "stop_token_ids: token id 259 is outside the vocabulary"),
        ("stop_token_ids", [-1], "stop_token_ids: token id -1 is outside"),
        ("stop_at_eos", "no", "stop_at_eos must be True or False, not 'no'"),
        ("stop_at_eos", 1, "stop_at_eos must be True or False"),
        ("special", None, "special must be True or False"),
        ("logprobs", 1.0, "logprobs must be a whole number"),
        ("logprobs", True, "logprobs must be a whole number"),
        ("logprobs", None, "logprobs must be a whole number"),
        ("logprobs", -1, "logprobs must be a whole number"),
        ("method", None, "method must be a name, not None"),
        ("method", ["fft"], "method must be a name"),
        ("decoding", None, "decoding must be a name"),
        ("decoding", np.array(["eager", "x"]), "decoding must be a name"),
        ("max_length", 0, "max_length must be at least 1"),
        ("max_length", "9", "max_length must be at least 1"),
        ("max_length", 9.5, "max_length must be at least 1"),
        ("prefill_chunk", 1.5, "prefill_chunk must be at least 1"),
        ("prefill_chunk", "8", "prefill_chunk must be at least 1"),
        ("progress", 5, "progress must be a function"),
    ],
)
def test_wrong_options_are_named_in_one_line(model: StripedHyena, option: str, value: Any, message: str) -> None:
    for function in (stream, generate):
        with pytest.raises(InputError, match=message) as caught:
            function(model, TOKENIZER, "a", **{option: value})  # pyright: ignore
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 300
        assert not isinstance(caught.value, TypeError)


@pytest.mark.parametrize(
    ("option", "value", "same"),
    [
        ("max_new_tokens", np.int32(3), 3),
        ("max_new_tokens", torch.tensor(3), 3),
        ("temperature", np.float32(0.5), 0.5),
        ("temperature", torch.tensor(0.5), 0.5),
        ("top_k", np.uint8(5), 5),
        ("seed", np.int64(9), 9),
        ("seed", torch.tensor(9), 9),
        ("seed", [np.uint8(9)], 9),
        ("stop", None, ()),
        ("stop", {"a"}, "a"),
        ("stop_token_ids", None, ()),
        ("stop_at_eos", np.bool_(False), False),
        ("logprobs", np.int8(2), 2),
        ("prefill_chunk", np.int16(1), 1),
        ("max_length", np.int64(30), 30),
    ],
)
def test_numbers_of_numpy_and_torch_are_numbers(model: StripedHyena, option: str, value: Any, same: Any) -> None:
    options: Any = {"max_new_tokens": 4, "temperature": 1.0, "seed": 1}
    given, wanted = (generate(model, TOKENIZER, "ab", **(options | {option: x})) for x in (value, same))
    assert (given.tokens, given.top_logprobs) == (wanted.tokens, wanted.top_logprobs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temprature": 1.0}, "has no option 'temprature': did you mean temperature"),
        ({"max_tokens": 5}, "has no option 'max_tokens': did you mean max_new_tokens"),
        ({"stop_ids": [5]}, "has no option 'stop_ids': did you mean stop_token_ids"),
        ({"temp": 1.0}, "has no option 'temp': did you mean temperature"),
        ({"echo": True}, "has no option 'echo': it has max_new_tokens"),  # nothing like "method"
        ({"zzz": 1}, "has no option 'zzz': it has max_new_tokens, temperature"),
    ],
)
def test_a_misspelt_option_names_the_nearest_and_the_function(model: StripedHyena, options: Any, message: str) -> None:
    for function in (stream, generate):
        with pytest.raises(InputError, match=rf"^{function.__name__}\(\) {message}") as caught:
            function(model, TOKENIZER, "a", **options)
        assert isinstance(caught.value, TypeError)  # as Python itself raises for a wrong call


def test_arguments_that_are_missing_or_too_many(model: StripedHyena) -> None:
    for function in (stream, generate):
        name = function.__name__
        with pytest.raises(InputError, match=rf"^{name}\(\): missing a required argument: 'prompt'"):
            function(model, TOKENIZER)  # pyright: ignore
        with pytest.raises(InputError, match=rf"^{name}\(\): too many positional arguments"):
            function(model, TOKENIZER, "a", 5)  # pyright: ignore
        with pytest.raises(InputError, match=rf"^{name}\(\): multiple values for argument 'prompt'"):
            function(model, TOKENIZER, "a", prompt="b")  # pyright: ignore


def test_arguments_in_another_order_are_noticed(model: StripedHyena) -> None:
    cases: list[tuple[tuple[Any, ...], str]] = [
        ((TOKENIZER, model, "a"), "the model and the tokenizer are swapped: call {}"),
        ((model, "a", TOKENIZER), "the tokenizer and the prompt are swapped: call {}"),
        (((model, TOKENIZER), "a", "b"), "model is a tuple: load it with"),
        (("cub", TOKENIZER, "a"), "model is a str: load it with"),
        ((None, TOKENIZER, "a"), "model must be a StripedHyena, not None"),
        ((StripedHyena, TOKENIZER, "a"), "model must be a StripedHyena, not"),
        ((torch.nn.Linear(2, 2), TOKENIZER, "a"), "model must be a StripedHyena, not a Linear"),
        ((model, None, "a"), "tokenizer must be the one that hyaena.load returns, not None"),
        ((model, ByteTokenizer, "a"), "tokenizer must be the one"),
        ((model, model, "a"), "tokenizer must be the one that hyaena.load returns, not a StripedHyena"),
    ]
    for function in (stream, generate):
        for arguments, message in cases:
            with pytest.raises(InputError, match=message.format(function.__name__)) as caught:
                function(*arguments)
            assert "\n" not in str(caught.value)


def test_the_signature_lists_the_options() -> None:
    for function in (hyaena.generate, hyaena.stream):
        parameters = inspect.signature(function).parameters.values()
        keywords = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
        assert list(keywords) == list(Options.__annotations__)
        assert (keywords["max_new_tokens"], keywords["temperature"], keywords["seed"]) == (256, 0.0, None)
        assert "max_new_tokens" in pydoc.plain(pydoc.render_doc(function)).splitlines()[2]
        assert all(f"{name}: " in (hyaena.stream.__doc__ or "") for name in keywords)


def test_settings_are_checked_without_a_model() -> None:
    assert Settings(seed=[1, None], stop="x").seeds(2) == [1, None]
    with pytest.raises(InputError, match="seed must be"):
        Settings(seed=[1, -1])
    with pytest.raises(UnsupportedError, match="zz"):
        Settings(method="zz")
