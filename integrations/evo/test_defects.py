"""What the original implementation got wrong and this package does right, by the numbers of the list in docs/evo.md."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from integrations.evo.cases import Case
from torch import Tensor

from hyaena.errors import ConfigError, InputError, NonFiniteError
from stripedhyena.generation import Generator
from stripedhyena.model import StripedHyena
from stripedhyena.sample import sample
from stripedhyena.tokenizer import CharLevelTokenizer, HFAutoTokenizer
from watching import LargestResult

STYLES = ("fft", "recurrence", "modal-fft", "hybrid-modal-recurrence", "modal-scan", "canonical-fft")
FLOAT32 = {"rtol": 1e-4, "atol": 1e-4}
"""Logits here are of the order of 1."""


def read(model: StripedHyena, parts: list[Tensor], mask: Tensor | None = None) -> tuple[Tensor, dict[str, Any]]:
    """Logits of parts read one after another, and the inference parameters after them."""
    params = model.initialize_inference_params()
    with torch.inference_mode():
        logits = [model(parts[0], params, mask)[0], *(model(part, params)[0] for part in parts[1:])]
    return torch.cat(logits, dim=1), params


def with_poles(case: Case, real: float, imaginary: float, **changes: Any) -> StripedHyena:
    model = case.model(**changes)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("poles"):
                p[..., 0], p[..., 1] = real, imaginary
    return model


def inputs_of_the_long_filter(case: Case, u: Tensor) -> Tensor:
    """x1·v [B,T,D] of the first Hyena layer in float64, from its projection u in the order of the checkpoint."""
    weight, bias = (case.weights[f"blocks.0.filter.short_filter_{name}"].double() for name in ("weight", "bias"))
    z = torch.nn.functional.conv1d(u.double().transpose(1, 2), weight, bias, padding=2, groups=len(bias))
    heads = case.config["num_attention_heads"]
    _, x1, v = z[..., : u.shape[1]].unflatten(1, (heads, 3, -1)).unbind(2)
    return (x1 * v).flatten(1, 2).transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("style", STYLES)
def test_1_the_state_after_a_prompt_is_exact_in_every_style(sh_case: Case, style: str, dtype: torch.dtype) -> None:
    model, seen = with_poles(sh_case, 0.6, 0.3, prefill_style=style).to(dtype), {}
    model.blocks[0].projections.register_forward_hook(lambda _module, _given, out: seen.update(u=out))
    _, params = read(model, [sh_case.ids])
    w = inputs_of_the_long_filter(sh_case, seen["u"])
    age = torch.arange(w.shape[1] - 1, -1, -1)
    expected = torch.einsum("t,btd->bd", torch.tensor(0.6 + 0.3j, dtype=torch.complex128) ** age, w + 0j)
    state = params["hyena"].state_dict[0]
    assert state.dtype == torch.complex64
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2  # bfloat16: the short filter's output has 8 bits
    assert float((state - expected[..., None]).abs().max() / expected.abs().max()) < tolerance


@pytest.mark.parametrize("cuts", [(5,), (1, 2, 30), (20, 21), (36,)])
def test_2_a_continuation_keeps_all_of_its_tokens(case: Case, cuts: tuple[int, ...]) -> None:
    model = case.model()
    logits, params = read(model, list(case.ids.tensor_split(cuts, dim=1)))
    torch.testing.assert_close(logits, case.expected["logits"], **FLOAT32)
    _, whole = read(model, [case.ids])
    for i, state in params["hyena"].state_dict.items():
        torch.testing.assert_close(state, whole["hyena"].state_dict[i], **FLOAT32)
        torch.testing.assert_close(params["hyena"].fir_state_dict[i], whole["hyena"].fir_state_dict[i], **FLOAT32)


def test_3_a_prompt_of_one_token_leaves_a_whole_state(case: Case) -> None:
    model = case.model()
    _, params = read(model, [case.ids[:, :1]])
    assert all(state.shape[2] == 2 for state in params["hyena"].fir_state_dict.values())
    logits, _ = read(model, list(case.ids[:, :12].split(1, dim=1)))
    torch.testing.assert_close(logits, case.expected["logits"][:, :12], **FLOAT32)


@pytest.mark.parametrize("cached", [False, True], ids=["uncached", "cached"])
def test_4_and_13_a_padded_row_is_the_row_alone(case: Case, cached: bool) -> None:
    """sh-tiny has no attention biases, the others have."""
    model = case.model()
    ids = case.ids[:1].repeat(3, 1)
    lengths = (ids.shape[1], 20, 1)
    mask = torch.zeros(ids.shape)
    for row, length in enumerate(lengths):
        mask[row, -length:] = 1
    with torch.inference_mode():
        params = model.initialize_inference_params() if cached else None
        padded, _ = model(ids, params, mask)
        following, _ = model(ids[:, :4], params) if cached else (None, None)
        for row, length in enumerate(lengths):
            own, alone = ids[row : row + 1, -length:], model.initialize_inference_params()
            torch.testing.assert_close(padded[row : row + 1, -length:], model(own, alone)[0], **FLOAT32)
            if following is not None:
                torch.testing.assert_close(following[row : row + 1], model(ids[:1, :4], alone)[0], **FLOAT32)


def test_4_padding_on_the_right_changes_nothing_before_it(case: Case) -> None:
    model = case.model()
    ids, mask = case.ids[:1].clone(), torch.ones(1, case.ids.shape[1])
    ids[:, 20:], mask[:, 20:] = 1, 0
    with torch.inference_mode():
        torch.testing.assert_close(model(ids, padding_mask=mask)[0][:, :20], model(case.ids[:1, :20])[0], **FLOAT32)


class Scripted:
    """In the place of a model: row r chooses the tokens ``script[r]``, one after another."""

    def __init__(self, script: list[list[int]]) -> None:
        self.script, self.calls = torch.tensor(script), 0

    def initialize_inference_params(self) -> dict[str, Any]:
        return {}

    def __call__(self, x: Tensor, inference_params_dict: Any = None) -> tuple[Tensor, Any]:
        logits = torch.nn.functional.one_hot(self.script[:, self.calls], 512).float()
        self.calls += 1
        return logits[:, None].expand(-1, x.shape[1], -1), inference_params_dict


def test_5_the_end_of_text_ends_a_row_and_nothing_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    model = Scripted([[65, 66, 0, 67, 68], [65, 0, 70, 71, 72]])
    generator = Generator(model, CharLevelTokenizer(512), top_k=1)
    ids, scores = generator.generate("cpu", input_ids=torch.ones(2, 3).long(), num_tokens=5, cached_generation=True)
    assert ids.tolist() == [[65, 66, 0], [65, 0, 0]] and scores.shape == (2, 3, 512) and model.calls == 3
    model = Scripted([[65, 0, 66]])
    ids, _ = Generator(model, CharLevelTokenizer(512), top_k=1).generate("cpu", "AC", num_tokens=3, stop_at_eos=False)
    assert ids.tolist() == [[65, 0, 66]] and capsys.readouterr() == ("", "")


def test_6_logits_that_are_not_finite_choose_no_token() -> None:
    for bad in (float("nan"), float("inf")):
        logits = torch.zeros(2, 5)
        logits[1, 3] = bad
        for top_k in (0, 1, 3):
            with pytest.raises(NonFiniteError, match="row 1"):
                sample(logits, top_k=top_k)
    logits = torch.full((1000, 5), -1.0)
    logits[:, 3] = -torch.inf  # the original made it 0, the most probable
    for top_k in (0, 1, 5):
        assert 3 not in sample(logits, top_k=top_k)


@pytest.mark.parametrize("style", ["fft", "hybrid-modal-recurrence"])
def test_7_a_prefill_allocates_nothing_of_modes_times_time(evo_case: Case, style: str) -> None:
    model, length = evo_case.model(prefill_style=style), 2048
    with torch.inference_mode(), LargestResult() as watch:
        model(torch.randint(512, (1, length)), model.initialize_inference_params())
    original = 64 * 8 * 2 * length  # [D,N,2T]
    assert watch.numel < original and watch.numel <= 512 * length  # the logits are the largest


def test_8_a_cache_goes_on_behind_max_seqlen(sh_case: Case) -> None:
    model, ids = sh_case.model(max_seqlen=16), torch.randint(256, (1, 600))
    with torch.inference_mode():
        expected, _ = model(ids)
    logits, params = read(model, list(ids.split([500, 97, 1, 1, 1], dim=1)))
    torch.testing.assert_close(logits, expected, **FLOAT32)
    assert params["mha"].max_seqlen == 16 and params["mha"].lengths == [600]


def test_8_a_cache_goes_on_behind_8192(evo_case: Case) -> None:
    model, ids = evo_case.model(), torch.randint(512, (1, 8200))
    with torch.inference_mode():
        expected, _ = model(ids)
    logits, _ = read(model, list(ids.split([8190, 1, 1, 1, 1, 6], dim=1)))
    torch.testing.assert_close(logits[:, 8189:], expected[:, 8189:], **FLOAT32)


@pytest.mark.parametrize("style", [*STYLES, "iir-fir-caching"])
def test_9_every_prefill_style_runs(case: Case, style: str) -> None:
    model = case.model(prefill_style=style)
    logits, params = read(model, [case.ids[:, :30], *case.ids[:, 30:].split(1, dim=1)])
    torch.testing.assert_close(logits, case.expected["logits"], **FLOAT32)
    for state in params["hyena"].state_dict.values():  # the last style keeps a window of inputs instead of modes
        assert state.is_complex() == (style != "iir-fir-caching")


def test_10_characters_are_lossless() -> None:
    tokenizer = CharLevelTokenizer(512)
    for text in ("ACGT", "", "\n\t|d__Bacteria;|", "Grüße, 鬣狗", "".join(map(chr, range(2, 0x800)))):
        ids = tokenizer.tokenize(text)
        assert all(type(token) is int for token in ids)
        assert tokenizer.detokenize(ids) == text
        assert tokenizer.detokenize_batch(torch.tensor([ids, ids])) == [text, text]
    assert tokenizer.tokenize_batch(["A", "CG"]) == [[65], [67, 71]]
    assert tokenizer.detokenize([0, 65, 1, 300, 255]) == "A\ufffd"


@pytest.mark.parametrize("key", ["use_flash_rmsnorm", "use_interpolated_rotary_pos_emb", "tie_embeddings"])
def test_11_strings_are_no_flags_and_missing_keys_are_named(evo_case: Case, key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        StripedHyena(evo_case.config | {key: "False"})
    with pytest.raises(ConfigError, match="state_size is missing"):
        StripedHyena({k: v for k, v in evo_case.config.items() if k != "state_size"})


@pytest.mark.parametrize(
    "cast",
    [
        lambda model: model.to_bfloat16_except_poles_residues(),
        lambda model: model.to(torch.bfloat16),
        lambda model: model.half(),
        lambda model: model.to("cpu", torch.float16),
        lambda model: model.apply(lambda module: module.bfloat16()),
    ],
)
def test_12_no_cast_narrows_poles_residues_or_frequencies(evo_case: Case, cast: Any) -> None:
    model = evo_case.model()
    cast(model)
    narrowed = {name for name, p in model.named_parameters() if p.dtype.itemsize == 2}
    assert narrowed == {name for name, _ in model.named_parameters() if not name.endswith(("poles", "residues"))}
    for name, tensor in model.state_dict().items():
        if name.endswith(("poles", "residues", "inv_freq")):
            torch.testing.assert_close(tensor, evo_case.weights[name], rtol=1e-6, atol=0)
    assert bool(model(evo_case.ids)[0].isfinite().all())


def test_14_a_pole_at_zero_and_prompts_shorter_than_the_short_filter(case: Case) -> None:
    model = with_poles(case, 0.0, 0.0)
    with torch.inference_mode():
        whole, _ = model(case.ids)
    assert bool(whole.isfinite().all())
    torch.testing.assert_close(read(model, list(case.ids.tensor_split((7, 8), 1)))[0], whole, **FLOAT32)
    model = case.model()
    for length in (1, 2):
        logits, _ = model(case.ids[:, :length])
        torch.testing.assert_close(logits, case.expected["logits"][:, :length], **FLOAT32)
        logits, _ = read(model, [case.ids[:, :length], case.ids[:, length:]])
        torch.testing.assert_close(logits, case.expected["logits"], **FLOAT32)


def test_15_long_filters_do_not_drift(sh_case: Case) -> None:
    """Poles near the unit circle, 20,000 steps: the original's float32 logarithms were 8.4e-4 off."""
    model = sh_case.model()
    part, length = model.blocks[0].filter, 20_000
    with torch.no_grad():
        angle = torch.rand(64, 2) * 3
        part.poles.copy_(torch.view_as_real(torch.polar(torch.full((64, 2), 0.99999), angle)).unsqueeze(2))
    p, r = (torch.view_as_complex(t.detach().double()).squeeze(2)[..., None] for t in (part.poles, part.residues))
    expected = (r * p ** torch.arange(length)).real.sum(1)[None]
    with torch.no_grad():
        h = part.compute_filter(length)[0]
    assert float((h - expected).abs().max() / expected.abs().max()) < 2e-5


def test_16_use_flashfft_may_be_absent(evo_case: Case) -> None:
    StripedHyena({key: value for key, value in evo_case.config.items() if not key.startswith("use_flash")})


def test_tokenizer_files_that_cannot_be_read_are_named(tmp_path: Any) -> None:
    with pytest.raises(InputError, match=r"missing\.json is not a tokenizer\.json"):
        HFAutoTokenizer(str(tmp_path / "missing.json"))
