"""A mixer and a kind of filter that nothing in ``src`` knows: everything that a model does works with them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import hyaena
from hyaena import ops
from hyaena.cache import Cache
from hyaena.config import ModelConfig
from hyaena.context import ForwardContext
from hyaena.decoding import Decoder
from hyaena.errors import ConfigError
from hyaena.generation.chunks import choose_chunk, measured_size
from hyaena.layers import MIXERS, Hyena, record
from hyaena.model import StripedHyena
from hyaena.ops import RowTensors, StepContext
from hyaena.sampling import SamplingParams
from hyaena.sizes import LAYER_SIZES, LayerSize, ModelSizes
from hyaena.tokenizers import ByteTokenizer

# --- a mixer: the mean of all values so far ---------------------------------------------------------------------------


class _Fields(NamedTuple):
    total: Tensor  # [B,D], the sum of the values
    count: Tensor  # [B], how many there were


class MeanState(RowTensors, _Fields):
    __slots__ = ()


class Mean(nn.Module):
    """``y[t] = out(mean over s <= t of v[s])``, which remembers a sum and a count."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.value = nn.Linear(config.hidden_size, config.hidden_size)
        self.out = nn.Linear(config.hidden_size, config.hidden_size)

    def make_state(self, batch: int, *, max_length: int | None, dtype: torch.dtype, device: Any, **_: Any) -> MeanState:
        width = self.value.in_features
        return MeanState(torch.zeros(batch, width, dtype=dtype, device=device), torch.zeros(batch, device=device))

    def forward(
        self, x: Tensor, context: ForwardContext, state: MeanState | None, keep: int
    ) -> tuple[Tensor, MeanState]:
        v, ones = self.value(x), torch.ones(x.shape[:2], device=x.device)
        if context.mask is not None:
            v, ones = v * context.mask[..., None], ones * context.mask
        total, count = v.cumsum(1), ones.cumsum(1)
        if state is not None:
            total, count = total + state.total[:, None], count + state.count[:, None]
        y = total / count.clamp(min=1).to(x)[..., None]
        return self.out(y[:, -keep:]), MeanState(total[:, -1], count[:, -1])

    def step(self, x: Tensor, norm: ops.Norm, state: MeanState, context: StepContext) -> Tensor:
        state.total.add_(context.operators.linear(x, record(self.value), norm=norm))
        state.count.add_(1)
        return context.operators.linear(state.total / state.count.to(x)[:, None], record(self.out), residual=x)

    def output_projection(self) -> nn.Module:
        return self.out


# --- a kind of filter: an echo after a fixed number of steps ----------------------------------------------------------

LAG = 5


class Echo(NamedTuple):
    """``y[t] = gain·x[t-LAG] + skip·x[t]``; the state is the last LAG inputs [B,D,LAG]."""

    gain: Tensor  # [F]
    skip: Tensor | None = None

    @property
    def groups(self) -> int:
        return self.gain.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return torch.promote_types(torch.float32, self.gain.dtype)

    def initial_state(self, batch: int, channels: int, method: str = "auto") -> Tensor:
        return torch.zeros(batch, channels, LAG, dtype=self.dtype, device=self.gain.device)

    def check_state(self, state: Tensor, batch: int, channels: int, method: str = "auto") -> None:
        assert state.shape == (batch, channels, LAG)

    def choose_method(self, length: int, state: Tensor | None = None) -> str:
        return "shift"

    def shift(self, x: Tensor, state: Tensor, reset: Tensor | None) -> tuple[Tensor, Tensor]:
        assert reset is None
        past = torch.cat([state, x.transpose(1, 2)], dim=2)
        return (past[..., :-LAG] * self.gain.to(x)[:, None]).transpose(1, 2), past[..., -LAG:]

    methods: ClassVar[Mapping[str, Any]] = {"shift": shift}


class EchoFilter(nn.Module):
    """The parameters of the filter, one gain for each group of two channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.empty(channels // 2))
        self.skip = nn.Parameter(torch.empty(channels))

    def forward(self) -> Echo:
        return Echo(self.gain.clone(), self.skip.clone())

    def view(self) -> Echo:
        return Echo(self.gain, self.skip)

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        nn.init.normal_(self.gain, generator=generator)
        nn.init.ones_(self.skip)


# --- a model with both ------------------------------------------------------------------------------------------------

CONFIG = ModelConfig(
    vocab_size=260,
    hidden_size=16,
    layer_types=("mean", "attention", "echo", "hyena"),
    intermediate_size=32,
    num_attention_heads=4,
    num_key_value_heads=2,
    state_size=2,
    tokenizer="bytes",
)
MIXERS_OF_OURS = {**MIXERS, "mean": Mean, "echo": lambda c: Hyena(c, EchoFilter(c.hidden_size))}


def make(dtype: torch.dtype = torch.float64) -> StripedHyena:
    torch.manual_seed(0)
    return StripedHyena(CONFIG, mixers=MIXERS_OF_OURS).to(dtype)


@pytest.fixture(scope="module")
def model() -> StripedHyena:
    return make()


def test_forward_in_any_chunks(model: StripedHyena) -> None:
    ids = torch.randint(256, (2, 40))
    with torch.inference_mode():
        whole = model(ids)
        for cuts in ([1, 2, 3], [17], [39], list(range(1, 40))):
            cache = model.make_cache(2)
            parts = [model(ids[:, a:b], cache=cache) for a, b in itertools.pairwise([0, *cuts, 40])]
            torch.testing.assert_close(torch.cat(parts, dim=1), whole)


def test_padded_rows_equal_rows_alone(model: StripedHyena) -> None:
    ids, more = torch.randint(256, (2, 12)), torch.randint(256, (2, 3))
    mask = torch.arange(12) >= torch.tensor([[7], [0]])
    with torch.inference_mode():
        cache = model.make_cache(2)
        model(ids, cache=cache, mask=mask)
        together = model(more, cache=cache)
        for row, padding in enumerate((7, 0)):
            alone = model.make_cache(1)
            model(ids[row : row + 1, padding:], cache=alone)
            torch.testing.assert_close(together[row], model(more[row : row + 1], cache=alone)[0])


def test_the_verbs_of_the_cache(model: StripedHyena) -> None:
    prompts, more = [torch.randint(256, (1, n)) for n in (4, 9, 2)], torch.randint(256, (3, 3))
    with torch.inference_mode():
        caches = [model.make_cache(1) for _ in prompts]
        expected = []
        for prompt, cache, tokens in zip(prompts, caches, more, strict=True):
            model(prompt, cache=cache)
            expected.append(model(tokens[None], cache=cache.snapshot())[0])
        batch = Cache.merge(caches)
        torch.testing.assert_close(model(more, cache=batch.snapshot()), torch.stack(expected))
        chosen = batch.select([2, 0])
        torch.testing.assert_close(model(more[[2, 0]], cache=chosen), torch.stack([expected[2], expected[0]]))
        batch.keep([1])
        torch.testing.assert_close(model(more[1:2], cache=batch)[0], expected[1])
        batch.reset()
        torch.testing.assert_close(model(more[:1], cache=batch), model(more[:1]))


def test_static_decoding(model: StripedHyena) -> None:
    """Rows of unequal length join and leave."""
    params = [SamplingParams()]
    decoder, expected, got = Decoder(model, 2), [], [[], []]
    for length in (3, 8):
        cache = model.make_cache(1, max_length=30)
        with torch.inference_mode():
            ids = model(torch.randint(256, (1, length)), cache=cache)[:, -1].argmax(-1)
            forward, token, tokens = cache.snapshot(), ids, []
            for _ in range(8):
                token = model(token[:, None], cache=forward)[:, -1].argmax(-1)
                tokens.append(int(token))
        expected.append(tokens)
        decoder.add(cache, ids, params, [torch.Generator()])
        for _ in range(4):
            decoder.launch()
            for place, token in enumerate(decoder.fetch().tokens):
                got[place].append(token)
    assert got == [expected[0], expected[1][:4]]
    decoder.keep([1])
    decoder.launch()
    assert decoder.fetch().tokens == [expected[1][4]]


def test_generate_and_train(model: StripedHyena) -> None:
    texts = [
        [c.text for c in hyaena.generate(model, ByteTokenizer(260), ["ab", "abcdefgh"], max_new_tokens=6, decoding=way)]
        for way in ("eager", "static")
    ]
    assert texts[0] == texts[1]
    trained = make(torch.float32)
    trained(torch.randint(256, (2, 9))).logsumexp(-1).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained.parameters())


def test_sizes(model: StripedHyena) -> None:
    d = CONFIG.hidden_size
    kinds = {
        **LAYER_SIZES,
        "mean": lambda _: LayerSize(parameters=2 * (d * d + d), state=d, float32_state=1),
        "echo": lambda c: dataclasses.replace(
            LAYER_SIZES["hyena"](c),
            parameters=4 * d * d + 4 * d + 3 * d * 3 + 3 * d + d // 2 + d,
            float32_parameters=0,
            float32_state=d * LAG,
        ),
    }
    sizes = ModelSizes(CONFIG, kinds=kinds)
    assert sizes.parameters == sum(p.numel() for p in model.parameters())
    small = make(torch.bfloat16)
    cache = small.make_cache(1, max_length=50)
    assert cache.nbytes == sizes.state_bytes(2) + 50 * sizes.kv_bytes_per_token(2)
    with pytest.raises(ConfigError, match="mean"):
        ModelSizes(CONFIG)


def test_passes_over_prompts_on_a_cuda_device(model: StripedHyena, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a pass holds is measured where no table knows the kind of a layer."""
    sizes = measured_size(model.layers[0].mixer, model.dtype)  # type: ignore[arg-type]
    d = CONFIG.hidden_size
    assert CONFIG.layer_types[0] == "mean" and sizes.parameters == 2 * (d * d + d)
    state = model.make_cache(1).states[0]
    assert sizes.state == state.total.numel() + state.count.numel() * 4 // model.dtype.itemsize
    assert sizes.kv_per_token == 0 and sizes.activations_per_token == 4 * d
    attention = StripedHyena(dataclasses.replace(CONFIG, layer_types=("attention",))).layers[0].mixer
    known = LAYER_SIZES["attention"](CONFIG)
    measured = measured_size(attention, torch.float32)  # type: ignore[arg-type]
    assert (measured.kv_per_token, measured.state, measured.parameters) == (known.kv_per_token, 0, known.parameters)
    monkeypatch.setattr(StripedHyena, "device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 0)
    free = 2 * 2**13 * model.dtype.itemsize * 12 * d  # 4 beside the echo, and 8 inside
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, free))
    assert choose_chunk(model, 0) == 8192
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free - 1, free))
    assert choose_chunk(model, 0) == 4096


def test_save_and_load(model: StripedHyena, tmp_path: Path) -> None:
    hyaena.save_model(model, tmp_path / "mine")
    loaded = hyaena.load_model(tmp_path / "mine", dtype="stored", mixers=MIXERS_OF_OURS)
    ids = torch.randint(256, (1, 9))
    with torch.inference_mode():
        assert torch.equal(loaded(ids), model(ids))
    with pytest.raises(ConfigError, match="layer 0: unknown layer kind 'mean'"):
        hyaena.load_model(tmp_path / "mine")


def test_an_unknown_kind_is_named() -> None:
    with pytest.raises(ConfigError, match="unknown layer kind 'atention': did you mean attention"):
        StripedHyena(dataclasses.replace(CONFIG, layer_types=("atention",)))
