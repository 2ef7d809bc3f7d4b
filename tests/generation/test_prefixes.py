"""A prompt that is read once: its continuations, roll-backs and files equal what reading everything anew gives."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import hyaena
from configs import TINY, TINY_BYTES, TINY_EVO, TINY_EVO2
from hyaena.cache import Cache
from hyaena.config import ModelConfig
from hyaena.errors import CheckpointError, InputError, OutputError
from hyaena.generation import Prefix, generate, load_prefix, prefix, prefixes, stream
from hyaena.model import StripedHyena
from hyaena.tokenizers import ByteTokenizer

CONFIG = replace(TINY_BYTES, layer_types=("hyena", "attention", "hyena"))
TOKENIZER = ByteTokenizer()
TEXT = "The four species of hyenas are the striped, the brown and the spotted hyena, and the aardwolf. "


def make(seed: int = 1, config: ModelConfig = CONFIG) -> StripedHyena:
    torch.manual_seed(seed)
    model = StripedHyena(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "long_filter" not in name:
                p.normal_(std=0.3)
    return model.double()


@pytest.fixture(scope="module")
def model() -> StripedHyena:
    return make()


@pytest.fixture(autouse=True)
def short_distance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefixes, "MARK_DISTANCE", 16)


def logits_after(cache: Cache, model: StripedHyena, ids: list[int]) -> torch.Tensor:
    """The logits of tokens that are read after a copy of a cache."""
    with torch.inference_mode():
        return model(torch.tensor([ids]), cache=cache.select([0]))


def assert_as_if_read_anew(made: Prefix, model: StripedHyena, ids: list[int]) -> None:
    assert made.ids == ids
    fresh, more = prefix(model, TOKENIZER, ids), [*b"and so on"]
    torch.testing.assert_close(logits_after(made.cache, model, more), logits_after(fresh.cache, model, more))


# --- continuations


@pytest.mark.parametrize("decoding", ["eager", "static"])
@pytest.mark.parametrize("prompts", ["One", "", ["One", "Two", "another", "", "One"]], ids=["one", "empty", "several"])
def test_a_continuation_is_what_prefix_and_prompt_give(model: StripedHyena, prompts: Any, decoding: Any) -> None:
    made = prefix(model, TOKENIZER, TEXT)
    options: Any = {"max_new_tokens": 6, "temperature": 1.0, "seed": 3, "decoding": decoding, "stop_at_eos": False}
    whole = [TEXT + one for one in prompts] if isinstance(prompts, list) else TEXT + prompts
    expected = generate(model, TOKENIZER, whole, **options)
    for _ in range(2):  # the prefix does not wear out
        rows = generate(model, TOKENIZER, prompts, prefix=made, **options)
        for row, want in zip(rows, expected, strict=True) if isinstance(prompts, list) else [(rows, expected)]:
            assert (row.tokens, row.text) == (want.tokens, want.text)
            assert row.logprobs == pytest.approx(want.logprobs)
            assert row.stats.prompt_tokens == want.stats.prompt_tokens


def test_a_prefix_is_not_read_again(model: StripedHyena, monkeypatch: pytest.MonkeyPatch) -> None:
    made, counts = prefix(model, TOKENIZER, TEXT), []
    forward = type(model).forward

    def count(self: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor:
        counts.append(ids.numel())
        return forward(self, ids, **options)

    monkeypatch.setattr(StripedHyena, "forward", count)
    generate(model, TOKENIZER, ["abc", "xyz"], prefix=made, max_new_tokens=1)
    assert counts == [2 * 4]  # the last token of the prefix and three more, of both prompts in one pass


def test_prompts_after_a_prefix_are_read_in_chunks(model: StripedHyena) -> None:
    made, rest = prefix(model, TOKENIZER, TEXT), "x" * 50
    seen: list[tuple[int, int]] = []
    options: Any = {"max_new_tokens": 4, "prefill_chunk": 20}
    row = generate(model, TOKENIZER, rest, prefix=made, progress=lambda *n: seen.append(n), **options)
    assert row.tokens == generate(model, TOKENIZER, TEXT + rest, **options).tokens
    assert seen == [(20, 51), (40, 51), (51, 51)]


def test_the_repetition_penalty_counts_the_prefix(model: StripedHyena) -> None:
    options: Any = {"max_new_tokens": 8, "repetition_penalty": 3.0}
    made = prefix(model, TOKENIZER, TEXT)
    row = generate(model, TOKENIZER, "a", prefix=made, **options)
    assert row.tokens == generate(model, TOKENIZER, TEXT + "a", **options).tokens


def test_samples_after_a_prefix(model: StripedHyena) -> None:
    made = prefix(model, TOKENIZER, TEXT)
    options: Any = {"n": 3, "temperature": 1.0, "seed": 5, "max_new_tokens": 5}
    rows = generate(model, TOKENIZER, "a", prefix=made, **options)
    assert [row.tokens for row in rows] == [row.tokens for row in generate(model, TOKENIZER, TEXT + "a", **options)]


# --- rolling back and reading on


@pytest.mark.parametrize("config", [TINY, TINY_EVO, TINY_EVO2], ids=["sh", "evo", "evo2"])
def test_rolled_back_by_any_number_it_is_as_if_read_anew(config: ModelConfig) -> None:
    model, ids = make(config=config), torch.randint(50, (40,)).tolist()
    for count in (0, 1, 2, 7, 8, 9, 15, 22, 23, 24, 25, 38, 39):
        made = prefix(model, TOKENIZER, ids, max_length=60)
        made.rollback(count)
        assert made.ids == ids[: 40 - count]
        more = torch.randint(50, (5,)).tolist()
        with torch.inference_mode():
            wanted = model(torch.tensor([[*made.ids, *more]]))[:, -5:]
        torch.testing.assert_close(logits_after(made.cache, model, [made.ids[-1], *more])[:, 1:], wanted)
        made.extend(ids[:9])
        with torch.inference_mode():
            wanted = model(torch.tensor([[*made.ids, *more]]))[:, -5:]
        torch.testing.assert_close(logits_after(made.cache, model, [made.ids[-1], *more])[:, 1:], wanted)


def test_a_roll_back_reads_less_than_the_distance_of_marks(
    model: StripedHyena, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, read = TOKENIZER.encode(TEXT), []
    forward = type(model).forward

    def count(self: Any, given: torch.Tensor, **options: Any) -> torch.Tensor:
        read.append(given.numel())
        return forward(self, given, **options)

    monkeypatch.setattr(StripedHyena, "forward", count)
    for amount in (1, 5, 17, len(ids) - 20, len(ids) - 1):
        made = prefix(model, TOKENIZER, ids)
        read.clear()
        made.rollback(amount)
        assert sum(read) < 16
    made = prefix(model, TOKENIZER, ids)
    marks = sum(mark.nbytes for mark in made._marks)
    assert len(made._marks) == 1 + (len(ids) - 1) // 16 and made.nbytes == made.cache.nbytes + marks


def test_extend_and_rollback_in_any_order(model: StripedHyena) -> None:
    made, ids = prefix(model, TOKENIZER, TEXT), TOKENIZER.encode(TEXT)
    for count, text in ((3, "abc"), (60, "d"), (0, TEXT), (1, "z"), (90, "the end")):
        made.rollback(count)
        made.extend(text)
        ids = [*ids[: len(ids) - count], *text.encode()]
        assert_as_if_read_anew(made, model, ids)
    made.rollback(len(made) - 1)
    assert_as_if_read_anew(made, model, ids[:1])


def test_what_an_interruption_leaves_is_read_later(model: StripedHyena, monkeypatch: pytest.MonkeyPatch) -> None:
    made, ids = prefix(model, TOKENIZER, TEXT), TOKENIZER.encode(TEXT)

    def fail(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(StripedHyena, "forward", fail)
        with pytest.raises(KeyboardInterrupt):
            made.rollback(21)
    assert_as_if_read_anew(made, model, ids[:-21])


# --- files


def test_a_saved_prefix_continues_as_before(model: StripedHyena, tmp_path: Path) -> None:
    for text in (TEXT, "x", "x" * 32):
        made = prefix(model, TOKENIZER, text)
        path = made.save(tmp_path / "hyenas.safetensors")
        loaded = load_prefix(path, make(), TOKENIZER)  # another copy of the same model
        assert loaded.ids == made.ids and loaded.cache.limits == [None]
        assert [mark.lengths for mark in loaded._marks] == [mark.lengths for mark in made._marks]
        one, other = (logits_after(p.cache, p.model, [*b"and so on"]) for p in (made, loaded))
        assert torch.equal(one, other)
        loaded.extend(TEXT)
        loaded.rollback(len(loaded) - 1 if text == "x" else 40)
        assert_as_if_read_anew(loaded, loaded.model, loaded.ids)


def test_a_prefix_of_another_model_is_refused(model: StripedHyena, tmp_path: Path) -> None:
    made = prefix(model, TOKENIZER, TEXT)
    path = made.save(tmp_path / "p")
    with pytest.raises(InputError, match="read by another model"):
        stream(make(), TOKENIZER, "a", prefix=made)
    other = make()
    with torch.no_grad():
        other.layers[2].mlp.down_proj.weight[3, 5] += 1e-9  # pyright: ignore
    with pytest.raises(CheckpointError, match="other weights"):
        load_prefix(path, other)
    with pytest.raises(CheckpointError, match="was read in float64: load the model with dtype='float64'"):
        load_prefix(path, make().float())
    with pytest.raises(CheckpointError, match="another configuration"):
        load_prefix(path, make(config=TINY))


def test_damaged_files_are_refused(model: StripedHyena, tmp_path: Path) -> None:
    made = prefix(model, TOKENIZER, TEXT)
    path = made.save(tmp_path / "p")
    with pytest.raises(CheckpointError, match="does not exist"):
        load_prefix(tmp_path / "none", model)
    os.mkfifo(tmp_path / "fifo")  # opening it would wait for a writer, whatever signal comes
    for place in (tmp_path / "fifo", tmp_path, Path("/dev/zero")):
        with pytest.raises(CheckpointError, match="not a regular file: name the file that Prefix"):
            load_prefix(place, model)
    content = path.read_bytes()
    for cut in (0, 5, 100, len(content) - 1):
        (tmp_path / "cut").write_bytes(content[:cut])
        with pytest.raises(CheckpointError, match="is damaged"):
            load_prefix(tmp_path / "cut", model)
    tensors = load_file(path)
    save_file(tensors, tmp_path / "plain")
    with pytest.raises(CheckpointError, match="is no prefix"):
        load_prefix(tmp_path / "plain", model)
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    for change in (
        {"ids": tensors["ids"][:-1].clone()},
        {"ids": tensors["ids"] + 1000},
        {"layers.0.0": tensors["layers.0.0"].float()},
        {"layers.9.0": tensors["layers.0.0"].clone()},
    ):
        save_file(tensors | change, tmp_path / "changed", metadata)
        with pytest.raises(CheckpointError, match="does not fit the model"):
            load_prefix(tmp_path / "changed", model)
    save_file(tensors, tmp_path / "changed", metadata | {"marks": "[[[1]]]"})
    with pytest.raises(CheckpointError, match="notes for rollback"):
        load_prefix(tmp_path / "changed", model)


def test_a_file_that_cannot_be_written_is_said_so(model: StripedHyena, tmp_path: Path) -> None:
    made = prefix(model, TOKENIZER, "abc")
    with pytest.raises(OutputError, match="cannot write"):
        made.save(tmp_path / "none" / "p")
    for call in (made.save, lambda path: load_prefix(path, model)):
        with pytest.raises(InputError, match="the file of a prefix is empty"):
            call("")


def test_a_compiled_model_is_the_model(model: StripedHyena, tmp_path: Path) -> None:
    compiled: Any = torch.compile(model, backend="eager")
    path = prefix(compiled, TOKENIZER, bytearray(b"abc")).save(tmp_path / "p")
    made = load_prefix(path, model)
    want = generate(model, TOKENIZER, "abcd", max_new_tokens=3).tokens
    assert generate(compiled, TOKENIZER, "d", max_new_tokens=3, prefix=made).tokens == want


def test_a_file_may_have_any_name(model: StripedHyena, tmp_path: Path) -> None:
    path = prefix(model, TOKENIZER, "abc").save(tmp_path / os.fsdecode(b"a\xff"))
    assert load_prefix(path, model).ids == TOKENIZER.encode("abc")


# --- mistakes


def test_mistakes_are_named(model: StripedHyena) -> None:
    made = prefix(model, TOKENIZER, TEXT)
    cases: list[tuple[Any, str]] = [
        (lambda: prefix(model, TOKENIZER, []), "the text of a prefix is empty"),
        (lambda: prefix(model, TOKENIZER, [999]), "vocabulary 0..258"),
        (lambda: prefix(model, TOKENIZER, "x" * 600), "pass the maximum length 512"),
        (lambda: prefix(model, None, "x"), "tokenizer must be"),  # pyright: ignore
        (lambda: prefix(TOKENIZER, model, "x"), "model must be a StripedHyena, not a ByteTokenizer"),  # pyright: ignore
        (lambda: load_prefix("p", 3), "model must be a StripedHyena, not an int"),  # pyright: ignore
        (lambda: made.rollback(-1), f"from 0 to {len(made) - 1}"),
        (lambda: made.rollback(len(made)), "one token must stay"),
        (lambda: made.extend(""), "is empty"),
        (lambda: made.extend("x" * 500), "pass the maximum length"),
        (lambda: made.extend([-1]), "vocabulary"),
        (lambda: generate(model, TOKENIZER, "a", prefix=TEXT), "made by hyaena.prefix, not a str"),  # pyright: ignore
        (lambda: generate(model, TOKENIZER, [], prefix=made), "prompt is empty"),
        (lambda: generate(model, TOKENIZER, "a", prefix=made, method="truncated"), "keeps no windows"),
        (lambda: generate(model, TOKENIZER, "a", prefix=made, max_new_tokens=500), "pass the maximum length"),
    ]
    for call, message in cases:
        with pytest.raises(InputError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
    assert_as_if_read_anew(made, model, TOKENIZER.encode(TEXT))
    long = prefix(model, TOKENIZER, "x" * 600, max_length=700)
    assert len(long) == 601
    made.tokenizer = None
    with pytest.raises(InputError, match="no tokenizer"):
        made.extend("a")


def test_the_public_names() -> None:
    assert hyaena.prefix is prefix and hyaena.load_prefix is load_prefix
