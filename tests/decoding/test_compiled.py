"""Compiled decoding on a CPU says what the model's own forward says, for every kind of model."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import hyaena
from configs import TINY, TINY_EVO, TINY_EVO2
from hyaena.decoding import Decoder, resolve_decoding
from hyaena.decoding.decoder import choose_operators
from hyaena.errors import InputError, UnsupportedError
from hyaena.hooks import observing
from hyaena.layers import Hyena
from hyaena.model import StripedHyena
from hyaena.ops import cpu
from hyaena.ops.step import DecodeOperators
from hyaena.sampling import SamplingParams
from hyaena.tokenizers import ByteTokenizer
from models import spread

pytest.importorskip("numba", reason="the kernels are compiled by numba")

from hyaena.ops.cpu import team

CONFIGS = {"sh": TINY, "evo": TINY_EVO, "evo2": TINY_EVO2}
# Several layers of large random weights, each rounded to the dtype; relative to the largest logit.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}
LENGTHS = [9, 1, 70]


def decoder_of(model: StripedHyena, cache, ids: Tensor, operators: DecodeOperators) -> Decoder:
    decoder, params = Decoder(model, len(ids), operators=operators), [SamplingParams()] * len(ids)
    decoder.add(cache, ids, params, [p.generator() for p in params])
    return decoder


@torch.inference_mode()
def prompts(model: StripedHyena, rows: list[int] = LENGTHS, **options):
    """A cache of rows of unequal lengths, and the token that each goes on from."""
    caches, ids = [], []
    for row in rows:
        torch.manual_seed(row)
        cache = model.make_cache(1, max_length=100, **options)
        logits = model(torch.randint(model.config.vocab_size, (1, row)), cache=cache)
        caches.append(cache)
        ids.append(logits[0, -1].argmax())
    merged = caches[0].merge(caches)
    return merged, torch.stack(ids)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_the_model(name: str, dtype: torch.dtype) -> None:
    model = spread(CONFIGS[name]).to(dtype)
    (cache, ids), (twin, _) = prompts(model), prompts(model)
    seen: list[Tensor] = []

    class Watched(type(choose_operators(model, compiled=True))):
        def argmax(self, logits: Tensor, ids: Tensor) -> Tensor:
            seen.append(logits)
            return super().argmax(logits, ids)

    decoder = decoder_of(model, twin, ids, Watched())
    for _ in range(6):
        with torch.inference_mode():
            want = model(decoder.ids[: len(ids), None], cache=cache)[:, -1].float()
        decoder.launch()
        decoder.fetch()
        error = float((seen[-1].float() - want).abs().max() / want.abs().max())
        assert error <= TOLERANCE[dtype]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_row_has_the_same_bits_beside_others(name: str) -> None:
    model = spread(CONFIGS[name])
    operators = choose_operators(model, compiled=True)
    together = decoder_of(model, *prompts(model), operators)
    alone = [decoder_of(model, *prompts(model, [row]), operators) for row in LENGTHS]
    for _ in range(8):
        for decoder in (together, *alone):
            decoder.launch()
        outputs, single = together.fetch(), [decoder.fetch() for decoder in alone]
        assert outputs.tokens == [one.tokens[0] for one in single]
        assert outputs.logprobs == [one.logprobs[0] for one in single]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_cache_of_16_bits_is_read_and_written_as_it_is(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a model of float32: the plain operators read the same rounded numbers."""
    model = spread(CONFIGS[name])
    plain = decoder_of(model, *prompts(model, dtype=torch.bfloat16), DecodeOperators())
    for _ in range(6):
        plain.launch()
    wanted = [plain.fetch() for _ in range(6)]
    compiled = decoder_of(model, *prompts(model, dtype=torch.bfloat16), choose_operators(model, compiled=True))
    for operator in ("linear", "attend", "rotate_and_cache", "hyena"):
        monkeypatch.setattr(DecodeOperators, operator, lambda *_, **__: pytest.fail("a plain operator ran"))
    for want in wanted:
        compiled.launch()
        got = compiled.fetch()
        assert got.tokens == want.tokens
        # a difference in the last bit of float32 may fall on either side of a number of bfloat16
        assert got.logprobs == pytest.approx(want.logprobs, abs=2e-2)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("name", CONFIGS)
def test_a_recorded_step_has_the_bits_of_calls(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows join and leave, and the step of each number of rows is recorded when it is taken for the first time."""
    model = spread(CONFIGS[name]).to(dtype)
    operators = choose_operators(model, compiled=True)
    recorded, called = (decoder_of(model, *prompts(model), operators) for _ in range(2))
    monkeypatch.setattr(called, "operators", type("Called", (type(operators),), {"record": DecodeOperators.record})())
    calls = []
    run = team.run
    monkeypatch.setattr(team, "run", lambda *arguments: calls.append(arguments) or run(*arguments))
    for step in range(12):
        outputs, counts = [], []
        for decoder in (recorded, called):
            calls.clear()
            decoder.launch()
            outputs.append(decoder.fetch())
            counts.append(len(calls))
        assert outputs[0] == outputs[1]
        first = step in (0, 4)
        assert (counts[0] == 1) != first  # the step, and the choice of the tokens with it
        assert counts[1] > 2 * len(model.layers)
        if step == 3:
            recorded.keep([0, 2]), called.keep([0, 2])
        if step == 7:
            for decoder in (recorded, called):
                cache, ids = prompts(model, [3])
                decoder.add(cache, ids, [SamplingParams()], [SamplingParams().generator()])


def test_greedy_steps_after_and_before_sampled_ones() -> None:
    """The outputs of recorded steps lie in the same memory; what was looked at does not change with the next step."""
    model = spread(CONFIGS["sh"])
    decoders = [
        decoder_of(model, *prompts(model), choose_operators(model, compiled=compiled)) for compiled in (True, False)
    ]
    for top in (0, 0, 2, 0, 0, 0):
        outputs = []
        for decoder in decoders:
            decoder.sampler.top = top
            decoder.launch(), decoder.launch()
            outputs.append([decoder.fetch(), decoder.fetch()])
        ours, wanted = outputs
        assert [output.tokens for output in ours] == [output.tokens for output in wanted]
        assert ours[0].logprobs == pytest.approx(wanted[0].logprobs, abs=1e-4)
        assert [len(row) for row in ours[1].top] == [top] * len(ours[1].tokens)


@pytest.mark.parametrize("twice", [lambda y: y * 2, lambda y: y.mul_(2)], ids=["anew", "in place"])
def test_what_torch_computes_in_a_step_is_not_left_out(twice) -> None:
    """A mixer of the user's that computes something itself: the step is not recorded."""

    class Louder(Hyena):
        def step(self, x: Tensor, norm, state, context) -> Tensor:
            return twice(super().step(x, norm, state, context))

        def forward(self, x: Tensor, context, state, keep: int):
            y, state = super().forward(x, context, state, keep)
            return x[:, -keep:] + 2 * y, state

    model = spread(BYTES)
    model.layers[0].mixer.__class__ = Louder
    assert generate(model, decoding="compiled") == generate(model, decoding="static")


def _assign(model: StripedHyena) -> None:
    model.load_state_dict({name: 1.3 * t for name, t in model.state_dict().items()}, assign=True)


def _cast(model: StripedHyena) -> None:
    model.double()


def _hook(model: StripedHyena) -> None:
    model.layers[0].mlp.up_proj.register_forward_hook(lambda module, args, y: 2 * y)


def _replace(model: StripedHyena) -> None:
    torch.manual_seed(0)
    model.layers[0].mlp.up_proj = nn.Linear(16, 32, bias=False)


@pytest.mark.parametrize("change", [_assign, _cast, _hook, _replace])
def test_a_model_that_changes_between_steps_is_read_as_it_is(change) -> None:
    """Recorded steps hold addresses: of weights that are gone they would read what lies there now."""
    found = []
    for decoding in ("eager", "compiled"):
        torch.manual_seed(1)
        model, tokens = spread(BYTES).requires_grad_(False), []
        stream = hyaena.stream(model, ByteTokenizer(259), "ab", max_new_tokens=12, stop_at_eos=False, decoding=decoding)
        for event in stream:
            tokens.append(event.token)
            if len(tokens) == 4:
                change(model)
        found.append(tokens)
    assert found[0] == found[1]


def test_hooks_that_a_step_would_not_call_are_named_when_they_come() -> None:
    model = spread(CONFIGS["sh"])
    decoder = decoder_of(model, *prompts(model), choose_operators(model, compiled=True))
    decoder.launch()
    handle = model.register_forward_hook(lambda *_: None)
    with pytest.raises(UnsupportedError, match="forward hooks"):
        decoder.launch()
    handle.remove()
    decoder.launch()
    assert len(decoder.pending) == 2


def test_hooks_of_another_thread_change_nothing() -> None:
    """Scores in one thread hang on modules of the model from which another one generates."""
    model = spread(BYTES)
    want, seen = generate(model), []
    decoder = decoder_of(model, *prompts(model), choose_operators(model, compiled=True))
    decoder.launch()
    parts, found = decoder.parts, []

    def other() -> None:
        found.append(generate(model, decoding="compiled"))
        decoder.launch()

    modules = [model, model.layers[0], model.layers[0].mlp.up_proj, model.norm]
    with observing((module, lambda *_: seen.append(1)) for module in modules):
        thread = threading.Thread(target=other)
        thread.start(), thread.join()
        assert seen == []
        assert decoder.parts is parts
        with pytest.raises(UnsupportedError, match="forward hooks"):
            decoder.launch()
    assert found == [want]
    decoder.launch()
    assert len(decoder.pending) == 3


def test_rows_that_are_refused_leave_the_tables_of_recorded_steps_alone() -> None:
    model = spread(CONFIGS["sh"])
    decoder = Decoder(model, 8, operators=choose_operators(model, compiled=True))
    cache, ids = prompts(model)
    decoder.add(cache, ids, [SamplingParams()] * 3, [SamplingParams().generator()] * 3)
    decoder.launch(), decoder.fetch()
    rotary = decoder.static.rotary
    other = model.make_cache(1, max_length=5_000, dtype=torch.int8)
    with torch.inference_mode():
        model(torch.tensor([[1]]), cache=other)
    with pytest.raises(InputError, match="dtype"):
        decoder.add(other, ids[:1], [SamplingParams()], [SamplingParams().generator()])
    assert decoder.static.rotary is rotary
    assert other.lengths == [1]


@pytest.mark.parametrize("compiled", [True, False])
def test_a_step_that_raises_halfway_is_not_gone_on_from(compiled: bool) -> None:
    """The first layers have moved on and the last have not: tokens would be of no text at all."""

    class Failing(nn.Linear):
        fails = False

        def forward(self, x: Tensor) -> Tensor:
            if self.fails:
                raise KeyboardInterrupt
            return super().forward(x)

    model = spread(CONFIGS["sh"])
    layer = model.layers[1].mlp.up_proj
    layer.__class__ = Failing
    operators = choose_operators(model, compiled=compiled)
    decoder = decoder_of(model, *prompts(model), operators)
    wanted = []
    for _ in range(3):
        decoder.launch()
        wanted.append(decoder.fetch().tokens)
    layer.fails = True
    with pytest.raises(KeyboardInterrupt):
        decoder.launch()
    layer.fails = False
    for use in (decoder.launch, decoder.cache, lambda: decoder.snapshot_states(0), lambda: decoder.keep([0, 1])):
        with pytest.raises(InputError, match="broken off"):
            use(), decoder.launch()
    decoder.keep([])
    decoder.add(*prompts(model, LENGTHS), [SamplingParams()] * 3, [SamplingParams().generator()] * 3)
    for tokens in wanted:
        decoder.launch()
        assert decoder.fetch().tokens == tokens


def generate(model: StripedHyena, **options) -> list[int]:
    return hyaena.generate(model, ByteTokenizer(259), "ab", max_new_tokens=12, stop_at_eos=False, **options).tokens


BYTES = replace(TINY, vocab_size=259)


@pytest.mark.parametrize("name", CONFIGS)
def test_generate_takes_it_by_itself(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = spread(replace(CONFIGS[name], vocab_size=259))
    assert resolve_decoding(model, "auto", "auto") == "compiled"
    want = generate(model, decoding="eager")
    assert generate(model) == generate(model, decoding="compiled") == want
    monkeypatch.setattr(DecodeOperators, "linear", lambda *_, **__: pytest.fail("the plain operators ran"))
    assert generate(model) == want


def test_windows_of_cut_filters_are_stepped_by_the_plain_operator() -> None:
    model = spread(BYTES)
    assert generate(model, method="truncated") == generate(model, method="truncated", decoding="eager")


def test_layers_that_are_no_plain_weights_are_called() -> None:
    class Twice(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = spread(BYTES)
    for parent in (model.layers[1].mixer, model.layers[0].mlp):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                other = Twice(child.in_features, child.out_features, bias=child.bias is not None)
                other.load_state_dict(child.state_dict())
                setattr(parent, name, other)
    called = []
    model.layers[2].mlp.up_proj.register_forward_hook(lambda *_: called.append(1))
    assert resolve_decoding(model, "auto", "auto") == "compiled"
    assert generate(model) == generate(model, decoding="eager")
    assert len(called) == 2 * 12


def test_what_cannot_be_compiled_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    model = StripedHyena(BYTES)
    with pytest.raises(UnsupportedError, match="kernels take float32, bfloat16 and float16, not float64"):
        resolve_decoding(model.double(), "compiled", "auto")
    assert resolve_decoding(model, "auto", "auto") == "eager"
    model.float()
    monkeypatch.setattr(cpu, "_has_numba", lambda: False)
    with pytest.raises(UnsupportedError, match=r"numba, .* is missing: pip install 'hyaena\[cpu\]'; decode with"):
        resolve_decoding(model, "compiled", "auto")
    assert resolve_decoding(model, "auto", "auto") == "eager"
    monkeypatch.undo()
    model.register_forward_hook(lambda *_: None)
    with pytest.raises(UnsupportedError, match="the model has forward hooks"):
        resolve_decoding(model, "compiled", "auto")


def test_the_fastest_way_needs_no_numba_to_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it, everything runs as it would if there were no kernels."""
    model = spread(BYTES)
    want = generate(model, decoding="eager")
    monkeypatch.setattr(cpu, "_has_numba", lambda: False)
    assert generate(model) == want
