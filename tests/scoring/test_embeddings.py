"""Vectors of named places: what a forward pass computes there, pooled; by our names and the original's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import hyaena
import models
import test_foreign_layer as foreign
from configs import TINY, TINY_EVO, TINY_EVO2
from hyaena.errors import InputError, NonFiniteError
from hyaena.formats import read_config
from hyaena.model import StripedHyena
from hyaena.scoring import RecordError, find_place
from hyaena.tokenizers import ByteTokenizer

TOKENIZER = ByteTokenizer(260)
EVO2 = replace(TINY_EVO2, layer_types=("hyena_mr", "attention", "hyena_li"))
TEXTS = ["a hyena laughs at", "x", "the moon, " * 6]
PLACES = {
    0: "layers.0",
    1: "layers.1",
    -1: "layers.2",
    "embed": "embed_tokens",
    "norm": "norm",
    "unembed": "lm_head",
    "norm.input": "norm.input",
    "layers.1.mixer": "layers.1.mixer",
    "blocks.0.filter": "layers.0.mixer.out_proj.input",
    "blocks.1.inner_mha_cls.inner_attn": "layers.1.mixer.o_proj.input",
    "blocks.1.inner_mha_cls.Wqkv": "layers.1.mixer.qkv_proj",
    "blocks.2.mlp.l3": "layers.2.mlp.down_proj",
    "layers.2.mlp.input": "layers.2.mlp.input",
    "layers.0.mixer_norm": "layers.0.mixer_norm",
}
"""What a user names, and the module that is meant."""
EVERYWHERE = list(PLACES)


def make(config: hyaena.ModelConfig = TINY) -> StripedHyena:
    return models.spread(replace(config, vocab_size=260, max_length=1000)).double()


def captured(model: StripedHyena, text: str) -> dict[Any, torch.Tensor]:
    """What modules return and read in one forward pass over BOS and a text, at the text's tokens."""
    seen: dict[str, torch.Tensor] = {}

    def hook(name: str) -> Any:
        def take(module: Any, args: Any, output: Any) -> None:
            seen[name] = output[0] if isinstance(output, tuple) else output
            seen[name + ".input"] = args[0] if args else torch.empty(0)

        return take

    handles = [module.register_forward_hook(hook(name)) for name, module in model.named_modules() if name]
    with torch.inference_mode():
        logits = model(torch.tensor([TOKENIZER.encode(text)]))
    for handle in handles:
        handle.remove()
    seen["lm_head"] = logits
    return {place: seen[name][0, 1:].float() for place, name in PLACES.items()}


@pytest.mark.parametrize("config", [TINY, TINY_EVO, EVO2], ids=["sh", "evo", "evo2"])
@pytest.mark.parametrize("tokens_per_pass", [None, 25, 4])
def test_vectors_are_those_of_a_forward_pass(config: hyaena.ModelConfig, tokens_per_pass: int | None) -> None:
    model = make(config)
    expected = [captured(model, text) for text in TEXTS]
    options: dict[str, Any] = {"layers": EVERYWHERE, "tokens_per_pass": tokens_per_pass, "output": "torch"}
    everything = hyaena.embed(model, TOKENIZER, TEXTS, pool="none", **options)
    means = hyaena.embed(model, TOKENIZER, TEXTS, pool="mean", **options)
    lasts = hyaena.embed(model, TOKENIZER, TEXTS, pool="last", **options)
    chosen = hyaena.embed(model, TOKENIZER, TEXTS, pool=[0, -1], **options)
    assert list(everything) == EVERYWHERE
    for place in EVERYWHERE:
        for i, seen in enumerate(expected):
            x = seen[place]
            torch.testing.assert_close(everything[place][i], x)  # float32 of two float64 results
            torch.testing.assert_close(means[place][i], x.mean(0))
            torch.testing.assert_close(lasts[place][i], x[-1])
            torch.testing.assert_close(chosen[place][i], x[[0, -1]])


def test_shapes_and_kinds() -> None:
    model = make()
    one = hyaena.embed(model, TOKENIZER, "abc", 1)
    assert isinstance(one, np.ndarray) and one.shape == (16,) and one.dtype == np.float32
    assert hyaena.embed(model, TOKENIZER, ["abc", "d"], 1).shape == (2, 16)
    assert [x.shape for x in hyaena.embed(model, TOKENIZER, ["abc", "d"], 1, pool="none")] == [(3, 16), (1, 16)]
    assert hyaena.embed(model, TOKENIZER, ["abc", "de"], 1, pool=[-1, 0, 1]).shape == (2, 3, 16)
    both = hyaena.embed(model, TOKENIZER, "abc", [1, "unembed"])
    assert {place: x.shape for place, x in both.items()} == {1: (16,), "unembed": (260,)}
    np.testing.assert_array_equal(hyaena.embed(model, TOKENIZER, "abc"), hyaena.embed(model, TOKENIZER, "abc", "norm"))
    compiled: Any = torch.compile(model, backend="eager")  # its modules have other names, and no hooks of later
    np.testing.assert_array_equal(hyaena.embed(compiled, TOKENIZER, "abc", 1), one)
    # BOS is read, and not pooled
    assert hyaena.embed(model, TOKENIZER, "abc", pool="none", bos=False).shape == (3, 16)
    assert hyaena.embed(model, TOKENIZER, list(b"abc"), pool="none").shape == (3, 16)
    found = hyaena.embed(model, TOKENIZER, "abc", output="torch")
    assert isinstance(found, torch.Tensor) and not found.is_inference()


@pytest.mark.parametrize("tokens_per_pass", [None, 3])
def test_both_strands(tokens_per_pass: int | None) -> None:
    model = make()
    text, other = "ACGGTTTN", "NAAACCGT"
    options: dict[str, Any] = {"layers": 1, "tokens_per_pass": tokens_per_pass}

    def strand(sequence: str) -> np.ndarray:
        return hyaena.embed(model, TOKENIZER, sequence, pool="none", **options)

    one, two = strand(text), strand(other)
    for pool, expected in (
        ("none", (one + two[::-1]) / 2),
        ("mean", (one.mean(0) + two.mean(0)) / 2),
        ("last", (one[-1] + two[-1]) / 2),
        ([0, -2], (one + two[::-1])[[0, -2]] / 2),
    ):
        found = hyaena.embed(model, TOKENIZER, ["GG", text], pool=pool, both_strands=True, **options)[1]
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_tied_head_has_logits_too() -> None:
    model = make(TINY_EVO)
    assert model.lm_head is None
    np.testing.assert_allclose(
        hyaena.embed(model, TOKENIZER, "abc", "unembed", pool="last"),
        captured(model, "abc")["unembed"][-1],
        rtol=1e-5,
    )


def test_a_golden_case_by_the_originals_names(golden_case: Path) -> None:
    """The residual stream behind the last layer, by the name of the original's block, gives the original's logits."""
    model = StripedHyena(read_config(golden_case / "config.yml")).eval()
    model.load_state_dict(load_file(golden_case / "model.safetensors"))
    expected = load_file(golden_case / "expected.safetensors")
    tokenizer = ByteTokenizer(max(259, model.config.vocab_size))
    ids, count = expected["input_ids"], len(model.layers)
    block = hyaena.embed(
        model, tokenizer, ids.tolist(), f"blocks.{count - 1}", pool="none", output="torch", tokens_per_pass=5
    )
    with torch.inference_mode():
        logits = torch.stack([model.logits(model.norm(x)) for x in block])
    assert float((logits - expected["logits"]).abs().max() / expected["logits"].abs().max()) < 1e-4


def test_a_foreign_layer_has_its_modules() -> None:
    model = models.spread(replace(foreign.CONFIG, max_length=1000), mixers=foreign.MIXERS_OF_OURS)
    whole = hyaena.embed(model, TOKENIZER, TEXTS, ["layers.0.mixer.value", "layers.2.mixer", 3])
    chunked = hyaena.embed(model, TOKENIZER, TEXTS, ["layers.0.mixer.value", "layers.2.mixer", 3], tokens_per_pass=4)
    for place, x in whole.items():
        np.testing.assert_allclose(x, chunked[place], rtol=1e-4, atol=1e-4 * np.abs(x).max())


# --- places


@pytest.mark.parametrize("config", [TINY, TINY_EVO, EVO2], ids=["sh", "evo", "evo2"])
def test_every_module_of_a_model_can_be_named(config: hyaena.ModelConfig) -> None:
    model = make(config)
    for name, _ in model.named_modules():
        if name:
            place = find_place(model, name)
            assert place.name == name
            layer = name.split(".")[1] if name.startswith("layers.") else None
            assert place.depth == (int(layer) + 1 if layer else 0 if name == "embed_tokens" else 4)
    assert find_place(model, -3) == find_place(model, 0) == ("layers.0", 1)
    assert find_place(model, np.int64(2)).name == "layers.2"
    assert find_place(model, "unembed").name == "lm_head" and find_place(model, "embedding_layer").depth == 0


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (3, r"layer 3 does not exist: this model has layers 0 … 2"),
        (-4, "layer -4 does not exist"),
        ("blocks.2.mlp.l4", "did you mean blocks.2.mlp.l3"),
        ("layers.2.mlp.dwn_proj", "did you mean layers.2.mlp.down_proj"),
        ("blocks.7", "did you mean blocks.[012]"),
        ("nrom", "did you mean norm"),
        ("zzz", "name a number from 0 to 2 or a module"),
        ("", "the model has no layer ''"),
        (".input", "the model has no layer"),
        (None, "a layer is a number or the name"),
        (1.5, "a layer is a number or the name"),
        (True, "a layer is a number or the name"),
        ([], "layers is empty"),
        ("layers", "layers"),
        ("layers.0.mixer.long_filter", "long_filter does not hold one vector per token"),
        ("layers.0.mixer.short_filter", "does not hold one vector per token"),
    ],
)
def test_places_that_there_are_not(layer: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        hyaena.embed(make(), TOKENIZER, "abc", layer)


@pytest.mark.parametrize("pool", ["max", 3, None, [], [0.5], ["a"], {0}])
def test_poolings_that_there_are_not(pool: Any) -> None:
    with pytest.raises(InputError, match="pool must be mean, last, none or a list of positions"):
        hyaena.embed(make(), TOKENIZER, "abc", pool=pool)


def test_positions_outside_a_text_name_it() -> None:
    with pytest.raises(RecordError, match="text 1: position 2 is outside its 2 tokens"):
        hyaena.embed(make(), TOKENIZER, ["abc", "de"], pool=[0, 2])


def test_vectors_that_are_not_finite_name_the_text() -> None:
    model = make()
    with torch.no_grad():
        model.embed_tokens.weight[ord("z")] = torch.inf
    with pytest.raises(NonFiniteError, match=r"text 1: the vectors of layers\.1 are not finite"):
        hyaena.embed(model, TOKENIZER, ["abc", "xyz"], 1)


# --- memory


@pytest.mark.integration
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is measured on Linux only")
def test_100_000_characters_take_at_most_500_mb() -> None:
    from benchmarks.cpu.memory import probe

    assert probe("--embed", 100_000, 1)["growth"] <= 500e6
