"""What the original got wrong and this package does right, by the numbers of the list in docs/vortex.md."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from integrations.evo2.cases import Case, small_config
from torch import Tensor

from hyaena.errors import ConfigError, InputError, NonFiniteError
from vortex.model.generation import Generator, generate, prepare_batch
from vortex.model.model import StripedHyena
from vortex.model.sample import sample
from vortex.model.tokenizer import CharLevelTokenizer
from watching import LargestResult

TOLERANCE = 1e-5
"""Of the largest logit: what the golden cases allow."""


def relative(value: Tensor, expected: Tensor) -> float:
    return float((value - expected).abs().max() / expected.abs().max())


def read(model: StripedHyena, parts: Any, mask: Tensor | None = None) -> tuple[Tensor, dict[str, Any]]:
    """Logits of parts read one after another, and the inference parameters after them."""
    params = model.initialize_inference_params()
    with torch.inference_mode():
        logits = [model(parts[0], params, mask)[0], *(model(part, params)[0] for part in parts[1:])]
    return torch.cat(logits, dim=1), params


def plain(model: StripedHyena, ids: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(ids)[0]


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 6, 7])
def test_1_short_prompts_are_continued_rightly(case: Case, length: int) -> None:
    """The original takes the wrong taps while fewer tokens were seen than a filter has taps."""
    model, ids = case.model(), case.ids[:1, :30]
    logits, params = read(model, [ids[:, :length], *ids[:, length:].split(1, dim=1)])
    assert relative(logits, case.expected["logits"][:1, :30]) < TOLERANCE
    whole = read(model, [ids])[1]
    for name in ("hcs", "hcm"):
        for i, state in params[name].fir_inner_state_dict.items():
            assert relative(state, whole[name].fir_inner_state_dict[i]) < TOLERANCE
    for i, state in params["hcl"].state_dict.items():
        assert relative(state, whole["hcl"].state_dict[i]) < TOLERANCE


@pytest.mark.parametrize("cuts", [(5,), (1, 2, 30), (20, 21), (40, 47)])
def test_2_a_continuation_keeps_all_of_its_tokens(case: Case, cuts: tuple[int, ...]) -> None:
    logits, _ = read(case.model(), case.ids.tensor_split(cuts, dim=1))
    assert relative(logits, case.expected["logits"]) < TOLERANCE


@pytest.mark.parametrize(
    "style", ["fft", "recurrence", "modal-fft", "hybrid-modal-recurrence", "modal-scan", "iir-fir-caching"]
)
def test_3_every_prefill_style_runs(case: Case, style: str) -> None:
    """The original knows one; here all mean the same."""
    logits, params = read(case.model(prefill_style=style, use_flashfft=True), [case.ids])
    assert relative(logits, case.expected["logits"]) < TOLERANCE
    for i, state in params["hcl"].state_dict.items():
        assert relative(state, case.expected[f"prefill.iir_state.{i}"]) < TOLERANCE


@pytest.mark.parametrize("cached", [False, True], ids=["uncached", "cached"])
def test_4_a_padded_row_is_the_row_alone(case: Case, cached: bool) -> None:
    model, ids = case.model(), case.ids[:1].repeat(3, 1)
    lengths = (ids.shape[1], 20, 1)
    mask = torch.zeros(ids.shape)
    for row, length in enumerate(lengths):
        mask[row, -length:] = 1
    with torch.inference_mode():
        params = model.initialize_inference_params() if cached else None
        padded, _ = model(ids, params, mask)
        following = model(ids[:, :4], params)[0] if cached else None
        for row, length in enumerate(lengths):
            own, alone = ids[row : row + 1, -length:], model.initialize_inference_params()
            assert relative(padded[row : row + 1, -length:], model(own, alone)[0]) < TOLERANCE
            if following is not None:
                assert relative(following[row : row + 1], model(ids[:1, :4], alone)[0]) < TOLERANCE


def test_4_padding_on_the_right_changes_nothing_before_it(case: Case) -> None:
    model, ids, mask = case.model(), case.ids[:1].clone(), torch.ones(1, case.ids.shape[1])
    ids[:, 20:], mask[:, 20:] = 1, 0
    with torch.inference_mode():
        assert relative(model(ids, padding_mask=mask)[0][:, :20], case.expected["logits"][:1, :20]) < TOLERANCE


@pytest.mark.parametrize("cached", [False, True], ids=["uncached", "cached"])
def test_5_a_prompt_may_be_longer_than_max_seqlen(case: Case, cached: bool) -> None:
    generator = Generator(case.model(), CharLevelTokenizer(512), top_k=1)
    options: dict[str, Any] = {"num_tokens": 4, "cached_generation": cached, "stop_at_eos": False}
    cut = generator.generate("cpu", input_ids=case.ids, max_seqlen=9, **options)
    short = generator.generate("cpu", input_ids=case.ids[:, -9:], **options)
    assert torch.equal(cut[0], short[0]) and torch.equal(cut[1], short[1])


class Scripted:
    """In the place of a model: row r chooses the tokens ``script[r]``, one after another."""

    def __init__(self, script: list[list[int]]) -> None:
        self.script, self.calls = torch.tensor(script), 0

    def initialize_inference_params(self, max_seqlen: int) -> dict[str, Any]:
        return {}

    def __call__(self, x: Tensor, inference_params_dict: Any = None) -> tuple[Tensor, Any]:
        logits = torch.nn.functional.one_hot(self.script[:, self.calls], 512).float()
        self.calls += 1
        return logits[:, None].expand(-1, x.shape[1], -1), inference_params_dict


def test_6_the_end_of_text_ends_a_row_and_nothing_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    model = Scripted([[65, 66, 0, 67, 68], [65, 0, 70, 71, 72]])
    generator, seen = Generator(model, CharLevelTokenizer(512), top_k=1), []
    ids, scores, _ = generator.generate(
        "cpu", input_ids=torch.ones(2, 3).long(), num_tokens=5, token_callback=seen.append
    )
    assert ids.tolist() == [[65, 66, 0], [65, 0, 0]] and scores.shape == (2, 3, 512)
    assert model.calls == 3 and seen == [0, 1, 2]
    model = Scripted([[65, 0, 66]])
    generator = Generator(model, CharLevelTokenizer(512), top_k=1)
    ids, _, params = generator.generate("cpu", "AC", num_tokens=3, stop_at_eos=False, cached_generation=False)
    assert ids.tolist() == [[65, 0, 66]] and params is None and capsys.readouterr() == ("", "")


@pytest.mark.parametrize("prompts", [["ACGT", "GGCC"], ["ACGT", "G"]])
def test_7_prompts_may_begin_with_the_end_of_document(tiny: Case, prompts: list[str]) -> None:
    """The original looks for a token that its tokenizer does not have."""
    model, tokenizer = tiny.model(), CharLevelTokenizer(512)
    ids, lengths = prepare_batch(prompts, tokenizer, prepend_bos=True, device="cpu")
    assert ids[:, 0].tolist() == [0, 0] and lengths == [1 + len(text) for text in prompts]
    output = generate(
        prompt_seqs=prompts, model=model, tokenizer=tokenizer, n_tokens=5, prepend_bos=True, verbose=0, device="cpu"
    )
    for prompt, text in zip(prompts, output.sequences, strict=True):
        ids = torch.tensor([[0, *prompt.encode()]])
        for _ in range(5):
            ids = torch.cat([ids, plain(model, ids)[:, -1:].argmax(-1)], dim=1)
        assert text == tokenizer.detokenize(ids[0, 1 + len(prompt) :])


def test_8_logits_that_are_not_finite_choose_no_token(tiny: Case) -> None:
    for bad in (float("nan"), float("inf")):
        logits = torch.zeros(2, 5)
        logits[1, 3] = bad
        for top_k in (0, 1, 3):
            with pytest.raises(NonFiniteError, match="row 1"):
                sample(logits, top_k=top_k)
    logits = torch.full((1000, 5), -1.0)
    logits[:, 3] = -torch.inf  # the original makes it 0, the most probable
    assert all(3 not in sample(logits, top_k=top_k) for top_k in (0, 1, 5))


def test_10_a_cache_grows_and_max_seqlen_is_no_limit(tiny: Case) -> None:
    model = tiny.model(max_seqlen=1 << 20)
    _, params = read(model, [tiny.ids])
    assert params["mha"].max_seqlen == 1 << 20
    assert sum(t.nbytes for t in params["mha"].key_value_memory_dict.values()) <= 2 * 256 * 2 * 64 * 4
    model, ids = tiny.model(max_seqlen=16), torch.randint(512, (1, 600))
    logits, params = read(model, ids.split([500, 97, 1, 1, 1], dim=1))
    assert relative(logits, plain(model, ids)) < TOLERANCE and params["mha"].lengths == [600]
    params = model.initialize_inference_params(max_seqlen=700)
    plain_params = model(ids, params)[1]
    assert all(t.shape[1] == 700 for t in plain_params["mha"].key_value_memory_dict.values())


def test_11_what_was_read_is_known(tiny: Case) -> None:
    """In the original, a second prompt for the same parameters steps through its last token."""
    model = tiny.model()
    generator, expected = Generator(model, CharLevelTokenizer(512), top_k=1), tiny.expected["greedy_ids"]
    options: dict[str, Any] = {"stop_at_eos": False, "num_tokens": 6}
    first, _, params = generator.generate("cpu", input_ids=tiny.ids, **options)
    text = torch.cat([tiny.ids, first], dim=1)
    for more in (text, first[:, -1:]):  # everything so far, or the token that was not read
        copied = {name: _copy(part) for name, part in params.items()}
        second, _, _ = generator.generate("cpu", input_ids=more, inference_params_dict=copied, **options)
        assert torch.equal(second, expected[:, 6:12])
    for other in (tiny.ids.flip(1), first, text[:, 1:]):
        with pytest.raises(InputError, match=r"has read 53 tokens.*input_ids\[:, -1:\]"):
            generator.generate("cpu", input_ids=other, inference_params_dict=params, **options)
    params["mha"].reset(64, 2)
    for name in ("hcl", "hcm", "hcs"):
        params[name].reset()
    again, _, _ = generator.generate("cpu", input_ids=tiny.ids, inference_params_dict=params, **options)
    assert torch.equal(again, first)
    fresh = model.initialize_inference_params()  # given, but empty
    again, _, _ = generator.generate("cpu", input_ids=tiny.ids, inference_params_dict=fresh, **options)
    assert torch.equal(again, first)


def _copy(params: Any) -> Any:
    import copy

    return copy.deepcopy(params)


def test_12_states_own_their_memory(case: Case) -> None:
    _, params = read(case.model(), [case.ids])
    for name in ("hcl", "hcm", "hcs"):
        for state in [
            *params[name].fir_state_dict.values(),
            *getattr(params[name], "fir_inner_state_dict", {}).values(),
        ]:
            assert state.untyped_storage().nbytes() == state.nbytes


def test_13_flags_of_kernels_change_nothing(case: Case) -> None:
    flags = dict.fromkeys(("use_hcs_kernel", "use_hcm_kernel", "use_hcl_kernel", "use_flash_depthwise"), True)
    assert torch.equal(plain(case.model(**flags), case.ids), plain(case.model(), case.ids))


def test_14_a_model_is_made_silently(tiny: Case, capfd: pytest.CaptureFixture[str], tmp_path: Any) -> None:
    model = tiny.model()
    model.initialize_inference_params()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("key", ["use_flash_rmsnorm", "use_interpolated_rotary_pos_emb", "interleave"])
def test_15_strings_are_no_flags_and_missing_keys_are_named(tiny: Case, key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        StripedHyena(tiny.config | {key: "False"})
    with pytest.raises(ConfigError, match="hcm_filter_length is missing"):
        StripedHyena({k: v for k, v in tiny.config.items() if k != "hcm_filter_length"})
    with pytest.raises(ConfigError, match="rotary_emb_base"):
        StripedHyena(tiny.config | {"rotary_emb_bse": 3})


def test_16_nothing_is_allocated_for_max_seqlen() -> None:
    model = StripedHyena(small_config("evo2_7b"))
    assert model.architecture.max_length == 1 << 20
    with torch.inference_mode(), LargestResult() as watch:
        model(torch.randint(512, (1, 300)), model.initialize_inference_params())
    assert watch.numel <= 512 * 300


def test_17_a_saved_model_is_loaded_as_it_was(case: Case, tmp_path: Any) -> None:
    """The original reorders the rows of Wqkv a second time, and says nothing."""
    model = case.model()
    torch.save(model.state_dict(), tmp_path / "mine.pt")
    for load in ("custom_load_state_dict", "load_state_dict"):
        other = StripedHyena(case.config).float()
        getattr(other, load)(torch.load(tmp_path / "mine.pt", weights_only=True), strict=True)
        assert torch.equal(plain(other, case.ids), plain(model, case.ids))


def test_18_characters_are_lossless() -> None:
    tokenizer = CharLevelTokenizer(512)
    for text in ("ACGT", "", "\n\t|d__Bacteria;|", "Grüße, 鬣狗", "".join(map(chr, range(2, 0x800)))):
        ids = tokenizer.tokenize(text)
        assert all(type(token) is int for token in ids) and tokenizer.detokenize(ids) == text
        assert tokenizer.detokenize_batch(torch.tensor([ids, ids])) == [text, text]
    assert tokenizer.tokenize_batch(["A", "CG"]) == [[65], [67, 71]]
