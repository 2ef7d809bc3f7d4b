"""Generation: what the model says, row by row, with flat passes and clear errors."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from configs import TINY_EVO2
from hyaena.config import ModelConfig
from hyaena.decoding import Decoder, Decoding
from hyaena.errors import InputError, NonFiniteError, UnsupportedError
from hyaena.formats import read_config
from hyaena.generation import Event, Options, generate, stream
from hyaena.model import StripedHyena
from hyaena.ops import ExplicitFilter, ModalFilter
from hyaena.tokenizers import ByteTokenizer, CharacterTokenizer

CONFIG = ModelConfig(
    vocab_size=259,
    hidden_size=32,
    layer_types=("hyena", "attention", "hyena"),
    intermediate_size=48,
    num_attention_heads=4,
    num_key_value_heads=2,
    state_size=2,
    max_length=512,
    tokenizer="bytes",
)
EVO2 = replace(TINY_EVO2, vocab_size=259, hidden_size=32, max_length=512, tokenizer="bytes")
PROMPTS = ["a", "def main(", "The four species of hyenas are", "import os\n" * 5]


@pytest.fixture(scope="module", params=[CONFIG, EVO2], ids=["sh", "evo2"])
def model(request: pytest.FixtureRequest) -> StripedHyena:
    return make(request.param)


@pytest.fixture(scope="module")
def sh() -> StripedHyena:
    """The first of both, for tests that depend on what it says."""
    return make(CONFIG)


def make(config: ModelConfig) -> StripedHyena:
    """Random weights in float64, large enough that the choices are not a tie and depend on the whole prompt."""
    torch.manual_seed(1)
    model = StripedHyena(config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(3)
    return model


class Bytes(ByteTokenizer):
    """A byte tokenizer whose EOS can be any byte, so that random weights reach it."""

    def __init__(self, eos_id: int = 257) -> None:
        super().__init__()
        self.eos_id = eos_id


TOKENIZER = Bytes()


def naive(model: StripedHyena, prompt: str, count: int) -> list[int]:
    """Greedy choices by reading everything again for each."""
    ids = TOKENIZER.encode(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[-count:]


class Recorder:
    """Notes every forward pass of a model: rows, tokens per row, logits kept."""

    def __init__(self, model: StripedHyena) -> None:
        self.passes: list[tuple[int, ...]] = []
        self.handle = model.register_forward_pre_hook(self.note, with_kwargs=True)

    def note(self, module: torch.nn.Module, args: tuple[torch.Tensor], kwargs: dict[str, Any]) -> None:
        assert kwargs["logits_to_keep"] == 1
        self.passes.append(tuple(args[0].shape))

    def __enter__(self) -> list[tuple[int, ...]]:
        return self.passes

    def __exit__(self, *_: object) -> None:
        self.handle.remove()


# --- what is generated


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("chunk", [1, 7, 2048])
def test_greedy_is_what_reading_everything_again_gives(model: StripedHyena, prompt: str, chunk: int) -> None:
    completion = generate(model, TOKENIZER, prompt, max_new_tokens=12, prefill_chunk=chunk)
    assert completion.tokens == naive(model, prompt, 12)
    assert len(set(completion.tokens)) > 3  # a constant would prove little
    assert completion.finish_reason == "length"
    assert completion.text == TOKENIZER.decode(completion.tokens)


@pytest.mark.parametrize("method", ModalFilter.methods)
def test_every_method_gives_the_same(model: StripedHyena, method: str) -> None:
    if model.config.layer_types == EVO2.layer_types and method not in ExplicitFilter.methods:
        with pytest.raises(UnsupportedError, match=f"method '{method}' takes no ExplicitFilter: choose auto"):
            generate(model, TOKENIZER, PROMPTS[2], max_new_tokens=12, method=method)
        return
    completion = generate(model, TOKENIZER, PROMPTS[2], max_new_tokens=12, method=method, prefill_chunk=11)
    assert completion.tokens == naive(model, PROMPTS[2], 12)


def test_the_golden_cases_greedy_ids(golden_case: Path) -> None:
    config = read_config(golden_case / "config.yml")
    model = StripedHyena(config)
    model.load_state_dict(load_file(golden_case / "model.safetensors"))
    expected = load_file(golden_case / "expected.safetensors")
    prompts, wanted = expected["input_ids"].tolist(), expected["greedy_ids"].tolist()
    options = Options(max_new_tokens=len(wanted[0]), stop_at_eos=False)
    batch = generate(model, CharacterTokenizer(config.vocab_size), prompts, **options)
    assert [row.tokens for row in batch] == wanted


@pytest.mark.parametrize("chunk", [8, 40, 64, 2048])
@pytest.mark.parametrize(
    "options",
    [
        Options(),
        Options(temperature=1.0, top_k=40, seed=[5, 6, 7, 8]),
        Options(temperature=0.8, top_p=0.9, min_p=0.01, repetition_penalty=1.4, seed=5),
    ],
    ids=["greedy", "seeds", "penalty"],
)
def test_a_batch_is_its_rows(model: StripedHyena, chunk: int, options: Options) -> None:
    options = Options(**options, max_new_tokens=10, prefill_chunk=chunk, logprobs=2)
    batch = generate(model, TOKENIZER, PROMPTS, **options)
    seeds = options.get("seed")
    for i, (prompt, row) in enumerate(zip(PROMPTS, batch, strict=True)):
        own = Options(**(options | {"seed": seeds[i] if isinstance(seeds, list) else seeds}))
        alone = generate(model, TOKENIZER, prompt, **own)
        assert (row.tokens, row.text) == (alone.tokens, alone.text)
        assert row.logprobs == pytest.approx(alone.logprobs, abs=1e-9)  # float64, another order of sums


def test_rows_leave_the_batch_when_they_finish(model: StripedHyena) -> None:
    whole = [naive(model, prompt, 8) for prompt in PROMPTS]
    # An EOS that some row reaches early and another does not.
    eos = next(token for row in whole for token in row[1:4] if any(token not in other for other in whole))
    tokenizer = Bytes(eos)
    with Recorder(model) as passes:
        rows = generate(model, tokenizer, PROMPTS, max_new_tokens=8)
    for row, tokens in zip(rows, whole, strict=True):
        reached = eos in tokens
        wanted = tokens[: tokens.index(eos) + 1] if reached else tokens
        assert row.tokens == wanted
        assert row.finish_reason == ("eos" if reached else "length")
        assert row.text == tokenizer.decode(wanted[:-1] if reached else wanted)
    sizes = [rows for rows, tokens in passes if tokens == 1]
    assert sizes == [sum(len(row.tokens) > step for row in rows) for step in range(1, len(sizes) + 1)]
    assert sizes[0] > sizes[-1]


def test_eos_can_be_ignored(model: StripedHyena) -> None:
    tokens = naive(model, PROMPTS[1], 6)
    ended = generate(model, Bytes(tokens[0]), PROMPTS[1], max_new_tokens=6)
    assert (ended.tokens, ended.text, ended.finish_reason) == (tokens[:1], "", "eos")
    assert ended.stats.decode_tokens_per_second is None
    assert generate(model, Bytes(tokens[0]), PROMPTS[1], max_new_tokens=6, stop_at_eos=False).tokens == tokens


def test_a_stop_string_ends_the_text_before_it(model: StripedHyena) -> None:
    sampled = Options(temperature=2.0, seed=11, max_new_tokens=60, top_k=80)
    whole = generate(model, TOKENIZER, PROMPTS[1], **sampled)
    at = next(i for i in range(5, len(whole.text) - 2) if "�" not in whole.text[i : i + 2])
    stop = whole.text[at : at + 2]
    cut = generate(model, TOKENIZER, PROMPTS[1], **sampled, stop=["never there", stop])
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finish_reason == "stop"
    assert cut.tokens == whole.tokens[: len(cut.tokens)] != whole.tokens
    events = stream(model, TOKENIZER, PROMPTS[1], **sampled, stop=stop)
    assert "".join(event.text for event in events) == cut.text


@pytest.mark.parametrize("decoding", ["eager", "static"])
def test_the_repetition_penalty_counts_prompt_and_completion(sh: StripedHyena, decoding: Decoding) -> None:
    model = sh
    prompt = list(range(200))  # most of the vocabulary, so that the model would choose from it
    free = generate(model, TOKENIZER, prompt, max_new_tokens=9, decoding=decoding).tokens
    assert free[0] in prompt
    completion = generate(
        model, TOKENIZER, prompt, max_new_tokens=20, repetition_penalty=1e6, stop_at_eos=False, decoding=decoding
    )
    assert not set(completion.tokens) & set(prompt)
    assert len(set(completion.tokens)) == 20
    assert len(set(free)) < 9 or len(set(free) - set(prompt)) < 9  # without the penalty, tokens do repeat


@pytest.mark.parametrize("decoding", ["eager", "static"])
def test_a_penalty_below_one_favours_what_was_seen(model: StripedHyena, decoding: Decoding) -> None:
    prompt = list(range(0, 200, 4))  # many, so that some of their logits are positive
    completion = generate(
        model, TOKENIZER, prompt, max_new_tokens=6, repetition_penalty=1e-6, stop_at_eos=False, decoding=decoding
    )
    assert set(completion.tokens) <= set(prompt)


def test_logprobs_are_the_models(model: StripedHyena) -> None:
    completion = generate(
        model, TOKENIZER, PROMPTS[1], max_new_tokens=5, temperature=1.5, seed=2, repetition_penalty=1.2, logprobs=3
    )
    ids = TOKENIZER.encode(PROMPTS[1]) + completion.tokens
    with torch.no_grad():
        wanted = model(torch.tensor([ids]))[0, -6:-1].log_softmax(-1)
    assert completion.logprobs == pytest.approx(wanted[range(5), completion.tokens].tolist(), abs=1e-9)
    for pairs, row in zip(completion.top_logprobs, wanted, strict=True):
        values, indices = row.topk(3)
        assert [token for token, _ in pairs] == indices.tolist()
        assert [value for _, value in pairs] == pytest.approx(values.tolist(), abs=1e-9)
    assert generate(model, TOKENIZER, "a", max_new_tokens=1).top_logprobs == []


# --- how prompts are given


def test_a_prompt_is_text_bytes_or_ids(model: StripedHyena) -> None:
    ids = TOKENIZER.encode("def")
    forms: list[Any] = ["def", b"def", ids, tuple(ids), torch.tensor(ids)]
    single = [generate(model, TOKENIZER, form, max_new_tokens=4) for form in forms]
    assert len({tuple(row.tokens) for row in single}) == 1
    for many in (["def"] * 2, [b"def"] * 2, [ids] * 2, torch.tensor([ids] * 2), ("def",)):
        rows: Any = generate(model, TOKENIZER, many, max_new_tokens=4)
        assert isinstance(rows, list)
        assert [row.tokens for row in rows] == [single[0].tokens] * len(many)


def test_ids_are_taken_as_they_are(model: StripedHyena) -> None:
    completion = generate(model, TOKENIZER, [65], max_new_tokens=2)
    assert completion.stats.prompt_tokens == 1
    assert generate(model, TOKENIZER, "A", max_new_tokens=2).stats.prompt_tokens == 2  # BOS


# --- passes, memory, events


@pytest.mark.parametrize("chunk", [8, 16, 100])
def test_no_pass_carries_more_than_a_chunk(model: StripedHyena, chunk: int) -> None:
    with Recorder(model) as passes:
        generate(model, TOKENIZER, PROMPTS * 2, max_new_tokens=1, prefill_chunk=chunk)
    assert max(rows * tokens for rows, tokens in passes) <= chunk
    assert chunk < 100 or len(passes) < len(PROMPTS)  # short prompts do share a pass


def test_prompts_share_a_pass_up_to_its_limit_without_padding(model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hyaena.generation.loop.MAX_PREFILL_BATCH_TOKENS", 60)
    with Recorder(model) as passes:
        generate(model, TOKENIZER, ["x" * 39, "x" * 30, "x" * 9, "x" * 5], max_new_tokens=1, prefill_chunk=1000)
        generate(model, TOKENIZER, ["x" * 9, "y" * 9, "z" * 9], max_new_tokens=1)
    assert passes == [(1, 6 + 10 + 31), (1, 40), (3, 10)]


def test_one_cache_of_the_right_size(model: StripedHyena, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    original = StripedHyena.make_cache

    def make_cache(self: StripedHyena, *args: Any, **kwargs: Any) -> Any:
        made.append(original(self, *args, **kwargs))
        return made[-1]

    monkeypatch.setattr(StripedHyena, "make_cache", make_cache)
    completion = generate(model, TOKENIZER, "x" * 99, max_new_tokens=20, prefill_chunk=10)
    assert [cache.max_length for cache in made] == [100 + 20]
    assert made[0].length == 100 + 19  # the last token is not read
    assert len(completion.tokens) == 20


def test_progress_counts_prompt_tokens(model: StripedHyena) -> None:
    seen: list[tuple[int, ...]] = []
    generate(model, TOKENIZER, "x" * 24, max_new_tokens=2, prefill_chunk=10, progress=lambda *x: seen.append(x))
    assert seen == [(10, 25), (20, 25), (25, 25)]
    seen.clear()
    generate(
        model, TOKENIZER, ["x" * 24, "ab", "c"], max_new_tokens=2, prefill_chunk=10, progress=lambda *x: seen.append(x)
    )
    assert seen == [(5, 30), (15, 30), (25, 30), (30, 30)]


def test_events_carry_what_the_completion_collects(model: StripedHyena) -> None:
    events = list(stream(model, TOKENIZER, PROMPTS[:2], max_new_tokens=5))
    assert all(isinstance(event, Event) for event in events)
    rows = generate(model, TOKENIZER, PROMPTS[:2], max_new_tokens=5)
    for index, row in enumerate(rows):
        own = [event for event in events if event.index == index]
        assert [event.token for event in own] == row.tokens
        assert "".join(event.text for event in own) == row.text
        assert [event.finish_reason for event in own] == [None] * 4 + ["length"]
        assert [event.stats is None for event in own] == [True] * 4 + [False]
        assert row.stats.prompt_tokens == len(TOKENIZER.encode(PROMPTS[index]))
        assert row.stats.completion_tokens == 5
        assert row.stats.time_to_first_token > 0
        assert (row.stats.decode_tokens_per_second or 0) > 0
        assert (row.stats.peak_memory or 0) > 10_000_000  # bytes: a Python process with torch takes more


def test_events_arrive_as_they_are_made_and_leave_no_mode_behind(model: StripedHyena) -> None:
    with Recorder(model) as passes:
        events = stream(model, TOKENIZER, "ab", max_new_tokens=3)
        assert passes == []
        for count, _ in enumerate(events, start=1):
            assert len(passes) == count
            assert not torch.is_inference_mode_enabled()


def test_a_batch_with_all_rows_of_one_token(model: StripedHyena) -> None:
    rows = generate(model, TOKENIZER, [[65], [66], [67]], max_new_tokens=6)
    for first, row in zip((65, 66, 67), rows, strict=True):
        assert row.tokens == generate(model, TOKENIZER, [first], max_new_tokens=6).tokens


# --- errors


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("", {}, "the prompt is empty"),
        ([], {}, "the prompt is empty"),
        (["ok", ""], {}, "the prompt is empty"),
        ([[1], []], {}, "the prompt is empty"),
        ([1, 259], {}, r"token id 259 is outside the vocabulary 0\.\.258"),
        ([-1], {}, "token id -1 is outside"),
        (["a", [1]], {}, "all texts or all lists"),
        ([1, [2]], {}, "all texts or all lists"),
        ("x" * 600, {}, "601 prompt tokens and max_new_tokens 256 pass the maximum length 512: shorten"),
        ("x" * 9, {"max_new_tokens": 503}, "pass the maximum length 512"),
        ("x" * 9, {"max_new_tokens": 5, "max_length": 14}, "pass the maximum length 14"),
        ("a", {"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ("a", {"prefill_chunk": 0}, "prefill_chunk must be at least 1"),
        ("a", {"stop": ["x", ""]}, "stop string is empty"),
        ("a", {"logprobs": 260}, "logprobs must be between 0 and"),
        ("a", {"seed": [1, 2]}, "2 seeds for 1 prompts"),
        ("a", {"temperature": -1}, "temperature must be 0 or more"),
    ],
)
def test_mistakes_are_named_at_the_call(model: StripedHyena, prompt: Any, options: Any, message: str) -> None:
    for function in (stream, generate):
        with pytest.raises(InputError, match=message) as caught:
            function(model, TOKENIZER, prompt, **options)
        assert "\n" not in str(caught.value)


def test_a_larger_maximum_length_can_be_asked_for(model: StripedHyena) -> None:
    completion = generate(model, TOKENIZER, "x" * 600, max_new_tokens=2, max_length=603)
    assert completion.tokens == naive(model, "x" * 600, 2)


def test_an_unknown_method(model: StripedHyena) -> None:
    with pytest.raises(UnsupportedError, match="modal-scan"):
        stream(model, TOKENIZER, "a", method="modal-scan")


def test_a_tokenizer_with_too_few_ids_is_refused(model: StripedHyena) -> None:
    with pytest.raises(InputError, match="the tokenizer has 256 ids and the model 259"):
        stream(model, CharacterTokenizer(256), "a")


# --- decoding on fixed memory


@pytest.mark.parametrize(
    "options",
    [
        Options(),
        Options(temperature=1.0, seed=3),
        Options(temperature=1.1, top_k=30, seed=[5, 6, 7, 8], logprobs=2),
        Options(temperature=0.9, top_p=0.9, min_p=0.01, repetition_penalty=1.2, seed=[9, 8, 7, 6]),
        Options(repetition_penalty=1.5, logprobs=1),
    ],
)
@pytest.mark.parametrize("eos", [257, 204, 197])
def test_steps_on_fixed_memory_say_what_calls_of_the_model_say(model: StripedHyena, options: Options, eos: int) -> None:
    """Rows of unequal length that end at different times."""
    ways = [
        generate(model, Bytes(eos), PROMPTS, max_new_tokens=40, stop=["zz", "q"], decoding=decoding, **options)
        for decoding in ("eager", "static")
    ]
    for forward, static in zip(*ways, strict=True):
        assert (forward.tokens, forward.text, forward.finish_reason) == (
            static.tokens,
            static.text,
            static.finish_reason,
        )
        assert forward.logprobs == pytest.approx(static.logprobs, abs=1e-9)
        assert len(static.top_logprobs) == len(forward.top_logprobs)
        for one, other in zip(forward.top_logprobs, static.top_logprobs, strict=True):
            assert [token for token, _ in one] == [token for token, _ in other]


def test_the_rows_of_that_test_do_end_at_different_times(sh: StripedHyena) -> None:
    model = sh
    for eos, options in ((204, Options(temperature=1.0, seed=3)), (197, Options())):
        lengths = {len(row.tokens) for row in generate(model, Bytes(eos), PROMPTS, max_new_tokens=40, **options)}
        assert len(lengths) == len(PROMPTS)


def test_windows_of_cut_filters_step_on_fixed_memory_too(model: StripedHyena) -> None:
    ways = [
        generate(model, TOKENIZER, PROMPTS, max_new_tokens=9, method="truncated", decoding=decoding)
        for decoding in ("eager", "static")
    ]
    assert [row.tokens for row in ways[0]] == [row.tokens for row in ways[1]]


def test_no_step_is_taken_that_nobody_can_read(model: StripedHyena, monkeypatch: pytest.MonkeyPatch) -> None:
    launched = []
    launch = Decoder.launch
    monkeypatch.setattr(Decoder, "launch", lambda self: launched.append(self.rows) or launch(self))
    for count, steps in ((1, 0), (2, 1), (9, 8)):
        launched.clear()
        generate(model, TOKENIZER, "ab", max_new_tokens=count, max_length=3 + count, decoding="static")
        assert len(launched) == steps


def test_an_abandoned_stream_leaves_nothing_running(model: StripedHyena, monkeypatch: pytest.MonkeyPatch) -> None:
    decoders = []
    init = Decoder.__init__
    monkeypatch.setattr(Decoder, "__init__", lambda self, *a, **k: decoders.append(self) or init(self, *a, **k))
    events = stream(model, TOKENIZER, "ab", decoding="static")
    next(events), next(events)
    assert decoders[0].pending
    events.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert not decoders[0].pending


def test_ways_of_decoding_that_cannot_be_are_refused_at_the_call(model: StripedHyena) -> None:
    with pytest.raises(InputError, match="unknown decoding 'fast': choose auto, eager, static, compiled, cuda_graph"):
        stream(model, TOKENIZER, "a", decoding="fast")  # pyright: ignore[reportArgumentType]
    with pytest.raises(UnsupportedError, match="graphs are captured on CUDA devices, and the model is on cpu"):
        stream(model, TOKENIZER, "a", decoding="cuda_graph")
    with Recorder(model), pytest.raises(UnsupportedError, match="the model has forward hooks"):
        stream(model, TOKENIZER, "a", decoding="static")


# --- logits that are not finite


def poison_layer_two(model: StripedHyena) -> None:
    model.layers[2].mlp.up_proj.weight[3, 3] = math.nan  # pyright: ignore


def poison_attention(model: StripedHyena) -> None:
    model.layers[1].mixer.qkv_proj.weight.fill_(math.inf)  # pyright: ignore


def poison_letter_q(model: StripedHyena) -> None:
    model.embed_tokens.weight[ord("q")] = math.nan


def poison_norm(model: StripedHyena) -> None:
    model.norm.weight[0] = math.inf


def poison_head(model: StripedHyena) -> None:
    assert model.lm_head is not None
    model.lm_head.weight[7, 7] = math.nan


@pytest.mark.parametrize(
    ("poison", "where"),
    [
        (poison_layer_two, r"first appear in layer 2 \(hyena\), at token 0;"),
        (poison_attention, r"first appear in layer 1 \(attention\), at token 0;"),
        (poison_letter_q, r"first appear in the embedding, at token 13;"),
        (poison_norm, r"first appear in the final norm, at token 0;"),
        (poison_head, r"first appear in the head, at token 0;"),
    ],
)
@pytest.mark.parametrize(("temperature", "decoding"), [(0.0, "eager"), (1.0, "eager"), (1.0, "static")])
def test_non_finite_logits_stop_and_say_where(
    poison: Callable[[StripedHyena], None], where: str, temperature: float, decoding: Decoding
) -> None:
    model = StripedHyena(CONFIG)
    with torch.no_grad():
        poison(model)
    hooks = [module for module in model.modules() if module._forward_hooks]
    with pytest.raises(NonFiniteError, match=where) as caught:
        options = Options(max_new_tokens=4, temperature=temperature, prefill_chunk=5, decoding=decoding)
        generate(model, TOKENIZER, "hyenas hear q and r", **options)
    assert "after 20 prompt tokens and 0 new ones" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert hooks == [module for module in model.modules() if module._forward_hooks] == []


@pytest.mark.parametrize("decoding", ["eager", "static"])
def test_what_was_said_before_the_numbers_went_wrong_is_kept(sh: StripedHyena, decoding: Decoding) -> None:
    model = sh
    tokens = naive(model, PROMPTS[1], 6)
    fatal = next(i for i in range(2, 6) if tokens[i] not in tokens[:i] + TOKENIZER.encode(PROMPTS[1]))
    broken = StripedHyena(model.config).double()
    broken.load_state_dict(model.state_dict())
    with torch.no_grad():
        broken.embed_tokens.weight[tokens[fatal]] = math.nan
    got = []
    with pytest.raises(NonFiniteError, match="in the embedding, at token"):
        for event in stream(broken, TOKENIZER, [PROMPTS[1]] * 2, max_new_tokens=20, decoding=decoding):
            got += [event.token] * event.index
    assert got == tokens[: fatal + 1]
