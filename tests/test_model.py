"""The laws of the whole model, and the promises that it makes about dtypes, masks and names."""

import copy
import dataclasses
import io
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hyaena.config import ModelConfig
from hyaena.errors import InputError, UnsupportedError
from hyaena.filters import LongFilter
from hyaena.formats import tensors as original
from hyaena.model import StripedHyena
from hyaena.ops import METHODS, HyenaState, ModalFilter

CONFIG = ModelConfig(
    vocab_size=50,
    hidden_size=16,
    layer_types=("hyena", "attention", "hyena"),
    intermediate_size=32,
    num_attention_heads=4,
    num_key_value_heads=2,
    state_size=2,
    attention_qkv_bias=True,
    attention_out_bias=True,
)


def make(config: ModelConfig = CONFIG) -> StripedHyena:
    """Random everything, biases and norms included, so that nothing hides behind a zero."""
    torch.manual_seed(3)
    model = StripedHyena(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "long_filter" not in name:
                p.normal_(std=0.3)
    return model.double()


@pytest.fixture(scope="module")
def model() -> StripedHyena:
    return make()


@pytest.mark.parametrize("method", ModalFilter.methods)
@settings(max_examples=20)
@given(data=st.data())
def test_splitting_law(method: str, data: st.DataObject) -> None:
    """model(a ++ b) equals model(a, cache) then model(b, cache): prefill, continuation and decoding are one call."""
    length = data.draw(st.integers(2, 60))
    cuts = sorted(data.draw(st.sets(st.integers(1, length - 1), max_size=4)))
    model = make()
    ids = torch.randint(50, (2, length))
    cache = model.make_cache(2, method=method)
    with torch.inference_mode():
        whole = model(ids, method=method)
        bounds = [0, *cuts, length]
        parts = [model(ids[:, a:b], cache=cache, method=method) for a, b in itertools.pairwise(bounds)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)
    assert cache.length == length


def test_a_cache_and_a_method_that_do_not_fit(model: StripedHyena) -> None:
    """Windows and modes are never taken for each other, and a refusal leaves the cache as it was."""
    ids = torch.randint(50, (1, 6))
    for made, asked, words in (
        ("auto", "truncated", "make_cache"),
        ("truncated", "blocked", "continue with truncated"),
    ):
        cache = model.make_cache(1, method=made)
        model(ids, cache=cache)
        with pytest.raises(InputError, match=words):
            model(ids, cache=cache, method=asked)
        assert cache.length == 6
    with pytest.raises(UnsupportedError, match="unknown method"):
        model.make_cache(1, method="magic")


def test_the_window_of_a_layer_comes_from_its_tolerance() -> None:
    model = make()
    windows = model.truncation_windows(1e-6)
    cache = model.make_cache(3, method="truncated", tolerance=1e-6)
    assert list(windows) == [0, 2]
    for i, window in windows.items():
        state = cache.states[i]
        assert isinstance(state, HyenaState) and state.long.shape == (3, 16, window - 1)
        assert state.long.dtype == torch.float64
        assert 1 < window < model.truncation_windows()[i]
    with torch.no_grad():
        model.layers[2].mixer.long_filter.poles[5, 1] = torch.tensor([0.8, 0.6])
    with pytest.raises(UnsupportedError, match="layer 2: channel 5 has a pole of"):
        model.make_cache(1, method="truncated")


@settings(max_examples=20)
@given(lengths=st.lists(st.integers(1, 20), min_size=2, max_size=4), more=st.integers(1, 5))
def test_a_padded_batch_equals_its_rows(lengths: list[int], more: int) -> None:
    model = make()
    longest = max(lengths)
    mask = torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]
    ids = torch.randint(50, (len(lengths), longest))
    tokens = torch.randint(50, (len(lengths), more))
    with torch.inference_mode():
        cache = model.make_cache(len(lengths))
        together, after = model(ids, cache=cache, mask=mask), model(tokens, cache=cache)
        uncached = model(ids, mask=mask)
        for row, length in enumerate(lengths):
            alone = model.make_cache(1)
            expected = model(ids[row : row + 1, longest - length :], cache=alone)[0]
            torch.testing.assert_close(together[row, longest - length :], expected)
            torch.testing.assert_close(uncached[row, longest - length :], expected)
            torch.testing.assert_close(after[row], model(tokens[row : row + 1], cache=alone)[0])
            for batch_state, state in zip(cache.states, alone.states, strict=True):
                if isinstance(state, HyenaState) and isinstance(batch_state, HyenaState):
                    torch.testing.assert_close(batch_state.long[row], state.long[0])


def test_a_long_pad_spanning_several_chunks(model: StripedHyena) -> None:
    """A row whose past is nothing but padding sees only itself."""
    ids = torch.randint(50, (2, 8))
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[1, :5] = False
    cache = model.make_cache(2)
    with torch.inference_mode():
        model(ids[:, :6], cache=cache, mask=mask[:, :6])
        got = model(ids[:, 6:], cache=cache)
        torch.testing.assert_close(got[1], model(ids[1:, 5:])[0, 1:])


def test_packed_documents_equal_documents_alone(model: StripedHyena) -> None:
    lengths = [7, 1, 12, 2]
    ids = torch.randint(50, (1, sum(lengths)))
    segment_ids = torch.repeat_interleave(torch.tensor([4, 5, 6, 4]), torch.tensor(lengths))[None]
    with torch.inference_mode():
        packed = model(ids, segment_ids=segment_ids)
        alone = [model(part) for part in ids.split(lengths, dim=1)]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1))


@pytest.mark.parametrize("last", ["hyena", "attention"])
@pytest.mark.parametrize("keep", [1, 4, 9, 30])
def test_only_the_asked_logits_are_computed(last: str, keep: int) -> None:
    model = make(dataclasses.replace(CONFIG, layer_types=("attention", "hyena", last)))
    ids, more = torch.randint(50, (2, 9)), torch.randint(50, (2, 3))
    options = ({}, {"mask": torch.arange(9) >= torch.tensor([[6], [0]])}, {"segment_ids": ids % 3})
    with torch.inference_mode():
        for option in options:
            torch.testing.assert_close(
                model(ids, logits_to_keep=keep, **option)[:, -3:], model(ids, **option)[:, -min(keep, 3) :]
            )
        caches = model.make_cache(2), model.make_cache(2)
        kept, whole = model(ids, cache=caches[0], logits_to_keep=keep), model(ids, cache=caches[1])
        torch.testing.assert_close(kept, whole[:, -keep:])
        torch.testing.assert_close(model(more, cache=caches[0]), model(more, cache=caches[1]))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32])
def test_ids_of_any_width(model: StripedHyena, dtype: torch.dtype) -> None:
    ids = torch.randint(50, (2, 9))
    with torch.inference_mode():
        torch.testing.assert_close(model(ids.to(dtype)), model(ids))


def test_every_parameter_has_a_gradient(model: StripedHyena) -> None:
    for method in (name for name in ModalFilter.methods if METHODS[name].gradients):
        model.zero_grad()
        model(torch.randint(50, (2, 40)), method=method).logsumexp(-1).sum().backward()
        for name, p in model.named_parameters():
            assert p.grad is not None and torch.isfinite(p.grad).all() and p.grad.abs().sum() > 0, name


CASTS = {
    "to": lambda m: m.to(torch.bfloat16),
    "bfloat16": lambda m: m.bfloat16(),
    "half": lambda m: m.half(),
    "to(device, dtype)": lambda m: m.to("cpu", torch.bfloat16),
    "type": lambda m: m.type(torch.bfloat16),
    "twice": lambda m: m.half().float().bfloat16(),
    "layer": lambda m: m.layers.to(torch.bfloat16) and m,
    "deepcopy": lambda m: copy.deepcopy(m).bfloat16(),
    "after backward": lambda m: (m(torch.zeros(1, 4, dtype=torch.long)).sum().backward(), m.bfloat16())[1],
}


@pytest.mark.parametrize("road", CASTS)
def test_poles_and_residues_stay_float32(road: str) -> None:
    torch.manual_seed(0)
    model = StripedHyena(CONFIG)
    before = {k: v.clone() for k, v in model.state_dict().items() if k.endswith(("poles", "residues"))}
    cast = CASTS[road](model)
    for name, value in before.items():
        parameter = cast.get_parameter(name)
        assert parameter.dtype == torch.float32 and torch.equal(parameter.detach(), value)
        assert parameter.grad is None or parameter.grad.dtype == torch.float32
    assert cast.layers[0].mlp.up_proj.weight.dtype != torch.float32


def test_a_cast_model_keeps_float32_states() -> None:
    model = StripedHyena(CONFIG).bfloat16()
    cache = model.make_cache(1)
    with torch.inference_mode():
        for length in (20, 1):
            logits = model(torch.randint(50, (1, length)), cache=cache)
    assert logits.dtype == torch.bfloat16
    for layer in cache.states:
        if isinstance(layer, HyenaState):
            assert layer.long.dtype == torch.complex64 and layer.short.dtype == torch.bfloat16


@pytest.mark.parametrize("prefix", ["", "backbone."])
@pytest.mark.parametrize("interleaved", [True, False])
def test_load_state_dict_takes_the_original_names(prefix: str, interleaved: bool) -> None:
    config = dataclasses.replace(CONFIG, column_split_hyena=interleaved)
    model, other = StripedHyena(config), StripedHyena(config)
    state = {prefix + k: v for k, v in original.state_to_theirs(model.state_dict(), config).items()}
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True), strict=True)
    for (name, a), (_, b) in zip(model.state_dict().items(), other.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def test_fresh_filters_lie_inside_the_unit_circle_and_keep_power() -> None:
    model = StripedHyena(dataclasses.replace(CONFIG, hidden_size=256, state_size=8))
    for module in model.modules():
        if isinstance(module, LongFilter):
            filter = ModalFilter(*(t.detach() for t in module()))
            magnitude = filter.poles.abs()
            assert float(magnitude.min()) > 0.9 and float(magnitude.max()) < 1
            gain = (filter.residues.abs() ** 2 / (1 - magnitude**2)).sum(-1)
            assert 0.8 < float(gain.mean()) < 1.2


@pytest.mark.parametrize(
    ("ids", "options", "words"),
    [
        (torch.zeros(1, 0, dtype=torch.long), {}, "T>=1"),
        (torch.zeros(3, dtype=torch.long), {}, "T>=1"),
        (torch.tensor([[50]]), {}, "50 is outside the vocabulary"),
        (torch.tensor([[-1]]), {}, "-1 is outside the vocabulary"),
        (torch.zeros(1, 4, dtype=torch.long), {"mask": torch.tensor([[1, 1, 1, 0]])}, "left"),
        (torch.zeros(1, 4, dtype=torch.long), {"mask": torch.tensor([[0, 1, 0, 1]])}, "left"),
        (torch.zeros(1, 4, dtype=torch.long), {"mask": torch.tensor([[0, 1]])}, "shape"),
        (torch.zeros(1, 4, dtype=torch.long), {"logits_to_keep": 0}, r"1 \(the last position\) or more, not 0"),
        (torch.zeros(1, 4, dtype=torch.long), {"logits_to_keep": 1.5}, "logits_to_keep must be a whole number"),
        (torch.zeros(1, 4, dtype=torch.long), {"logits_to_keep": True}, "logits_to_keep must be a whole number"),
        (torch.zeros(1, 4, dtype=torch.long), {"mask": [[True] * 4]}, "mask must be a tensor"),
        (torch.zeros(1, 4, dtype=torch.long), {"segment_ids": [[0] * 4]}, "segment_ids must be a tensor"),
        (torch.zeros(1, 4, dtype=torch.long), {"cache": [1]}, "cache is a list"),
        (torch.zeros(1, 4, dtype=torch.long), {"segment_ids": torch.zeros(1, 3)}, "segment_ids"),
    ],
)
def test_bad_inputs(model: StripedHyena, ids: torch.Tensor, options: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        model(ids, **options)


def test_padding_after_the_first_tokens_is_refused(model: StripedHyena) -> None:
    cache = model.make_cache(1)
    with torch.inference_mode():
        model(torch.zeros(1, 2, dtype=torch.long), cache=cache)
        with pytest.raises(InputError, match="before the first token"):
            model(torch.zeros(1, 2, dtype=torch.long), cache=cache, mask=torch.tensor([[0, 1]]))


@pytest.mark.parametrize("chunk", [1, 2, 3, 5])
def test_padding_may_take_several_passes(model: StripedHyena, chunk: int) -> None:
    """A row of a padded batch, read in chunks, is stored and continued as the row alone."""
    ids, skips = torch.randint(0, 50, (3, 8)), (0, 3, 7)
    mask = torch.arange(8) >= torch.tensor(skips)[:, None]
    cache = model.make_cache(3)
    with torch.inference_mode():
        for part, seen in zip(ids.split(chunk, dim=1), mask.split(chunk, dim=1), strict=True):
            logits = model(part, cache=cache, mask=seen)
        assert cache.lengths == [8 - skip for skip in skips]
        next_ids = logits[:, -1:].argmax(-1)
        after = model(next_ids, cache=cache)
        for row, skip in enumerate(skips):
            alone = model(torch.cat([ids[row, skip:], next_ids[row]])[None])[0, -2:]
            torch.testing.assert_close(torch.cat([logits[row, -1:], after[row]]), alone, rtol=1e-5, atol=1e-5)
