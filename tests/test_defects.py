"""What the original implementation got wrong, one test each."""

import dataclasses
import itertools

import pytest
import torch

import hyaena
from hyaena import ops
from hyaena.config import ModelConfig
from hyaena.errors import CapacityError, ConfigError, NonFiniteError
from hyaena.formats import config_from_dict
from hyaena.formats.stripedhyena.config import write_config
from hyaena.model import StripedHyena
from hyaena.ops import HyenaState
from hyaena.tokenizers import ByteTokenizer, CharacterTokenizer
from watching import LargestResult

CONFIG = ModelConfig(
    vocab_size=259,
    hidden_size=16,
    layer_types=("hyena", "attention", "hyena"),
    intermediate_size=32,
    num_attention_heads=4,
    num_key_value_heads=2,
    state_size=2,
    attention_qkv_bias=True,
    attention_out_bias=True,
    tokenizer="bytes",
)


@pytest.fixture
def model() -> StripedHyena:
    model = StripedHyena(CONFIG)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):  # padding shows where biases are
                p.normal_()
    return model.double().eval()


def test_1_the_recurrence_keeps_real_and_imaginary_parts_apart_and_its_state_precise() -> None:
    poles = torch.complex(torch.full((4, 1), 0.6), torch.full((4, 1), 0.3))
    filter = ops.ModalFilter(poles, torch.randn(4, 1, dtype=torch.complex64))
    x = torch.randn(1, 200, 4).bfloat16()
    y, _ = ops.long_conv(x.float(), filter, method="recurrence")
    expected, expected_state = ops.long_conv(x.double(), filter, method="reference")
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    _, from_bfloat16 = ops.long_conv(x, filter, method="recurrence")
    assert from_bfloat16.dtype == torch.complex64
    torch.testing.assert_close(from_bfloat16, expected_state.to(torch.complex64), rtol=1e-5, atol=1e-5)


def test_2_a_continuation_of_several_tokens_keeps_them_all(model: StripedHyena) -> None:
    ids = torch.randint(259, (1, 12))
    cache = model.make_cache()
    with torch.inference_mode():
        model(ids[:, :5], cache=cache)
        torch.testing.assert_close(model(ids[:, 5:], cache=cache), model(ids)[:, 5:])


def test_3_a_one_token_prompt_leaves_a_whole_window(model: StripedHyena) -> None:
    ids = torch.randint(259, (1, 4))
    cache = model.make_cache()
    with torch.inference_mode():
        parts = [model(ids[:, :1], cache=cache)]
        states = [layer for layer in cache.states if isinstance(layer, HyenaState)]
        assert all(state.short.shape == (1, 48, 2) for state in states)
        parts += [model(ids[:, t : t + 1], cache=cache) for t in range(1, 4)]
        torch.testing.assert_close(torch.cat(parts, dim=1), model(ids))


def test_4_padding_is_masked_on_the_cached_path_and_in_attention_with_biases(model: StripedHyena) -> None:
    ids, more = torch.randint(259, (1, 6)), torch.randint(259, (1, 3))
    padded = torch.cat([torch.randint(259, (1, 4)), ids], dim=1)
    cache, alone = model.make_cache(), model.make_cache()
    with torch.inference_mode():
        torch.testing.assert_close(
            model(padded, cache=cache, mask=torch.arange(10)[None] >= 4)[:, 4:], model(ids, cache=alone)
        )
        torch.testing.assert_close(model(more, cache=cache), model(more, cache=alone))


def test_5_eos_ends_generation_and_nothing_is_printed(
    model: StripedHyena, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = ByteTokenizer()
    free = hyaena.generate(model, tokenizer, "abc", max_new_tokens=10)
    third = next(t for i, t in enumerate(free.tokens) if t not in free.tokens[:i] and i >= 1)
    monkeypatch.setattr(ByteTokenizer, "eos_id", third, raising=False)
    ended = hyaena.generate(model, tokenizer, "abc", max_new_tokens=10)
    assert ended.finish_reason == "eos"
    assert ended.tokens == free.tokens[: free.tokens.index(third) + 1]
    assert capsys.readouterr() == ("", "")


def test_6_nan_logits_are_an_error_and_never_a_token(model: StripedHyena) -> None:
    with torch.no_grad():
        model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan  # type: ignore[union-attr, index]
    with pytest.raises(NonFiniteError, match="layer 1"):
        hyaena.generate(model, ByteTokenizer(), "abc", max_new_tokens=3)


@pytest.mark.parametrize("method", ["fft", "blocked"])
def test_7_no_array_of_all_modes_and_steps(method: str) -> None:
    config = dataclasses.replace(CONFIG, layer_types=("hyena",), state_size=16, intermediate_size=16)
    model, length = StripedHyena(config), 2048
    with torch.inference_mode(), LargestResult() as largest:
        model(torch.randint(259, (1, length)), cache=model.make_cache(), logits_to_keep=1, method=method)
    assert 0 < largest.numel < config.hidden_size * config.state_size * length


def test_8_the_key_value_cache_does_not_end_at_8192() -> None:
    config = dataclasses.replace(CONFIG, layer_types=("attention",), num_key_value_heads=1)
    model = StripedHyena(config)
    ids = torch.randint(259, (1, 8200))
    with torch.inference_mode():
        cache, limited = model.make_cache(), model.make_cache(max_length=8192)
        for part in ids.split(4100, dim=1):
            last = model(part, cache=cache, logits_to_keep=1)
        torch.testing.assert_close(last, model(ids, logits_to_keep=1), rtol=1e-4, atol=1e-4)
        with pytest.raises(CapacityError, match="8192"):
            model(ids, cache=limited)
    assert cache.length == 8200 and limited.length == 0


@pytest.mark.parametrize("method", ops.ModalFilter.methods)
def test_9_every_method_that_is_offered_runs(model: StripedHyena, method: str) -> None:
    ids = torch.randint(259, (1, 40))
    with torch.inference_mode():
        torch.testing.assert_close(model(ids, method=method), model(ids), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("tokenizer", "first"), [(ByteTokenizer(), 0), (CharacterTokenizer(), 2)])
def test_10_bytes_survive_the_round_trip(tokenizer: ByteTokenizer | CharacterTokenizer, first: int) -> None:
    """All of them; Evo's characters 0 and 1 are its end and padding."""
    all_bytes = range(first, 256)
    everything = bytes(all_bytes) + bytes(itertools.chain.from_iterable((b, 0xFF, b) for b in all_bytes))
    assert tokenizer.decode_bytes(tokenizer.encode(everything, add_special_tokens=False)) == everything


def test_11_flags_are_booleans_and_missing_keys_are_named() -> None:
    values = write_config(CONFIG)
    with pytest.raises(ConfigError, match="qkv_proj_bias"):
        config_from_dict(values | {"qkv_proj_bias": "False"})
    del values["num_attention_heads"]
    with pytest.raises(ConfigError, match="num_attention_heads"):
        config_from_dict(values)


def test_12_casting_the_whole_model_spares_poles_and_residues() -> None:
    model = StripedHyena(CONFIG)
    before = {n: p.clone() for n, p in model.named_parameters() if n.endswith(("poles", "residues"))}
    model.to(torch.bfloat16)
    assert len(before) == 4 and model.dtype == torch.bfloat16
    for name, value in before.items():
        assert torch.equal(model.get_parameter(name), value)
