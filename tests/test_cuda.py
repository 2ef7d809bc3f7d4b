"""The same laws on a GPU; skipped where there is none."""

import importlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import hyaena
from hyaena.adapters import Adapter, Update, with_adapter
from hyaena.bench.run import SH_7B, random_model
from hyaena.cli import main
from hyaena.config import ModelConfig
from hyaena.decoding import Decoder, PipelinedDecoder, resolve_decoding
from hyaena.formats import read_config
from hyaena.generation import Options
from hyaena.model import StripedHyena
from hyaena.ops import HyenaState, ModalFilter, attention, long_conv, pages_for, to_canonical, to_modal
from hyaena.sampling import SamplingParams
from hyaena.tokenizers import ByteTokenizer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

CONFIG = ModelConfig(
    vocab_size=64,
    hidden_size=64,
    layer_types=("hyena", "attention", "hyena"),
    intermediate_size=128,
    num_attention_heads=4,
    num_key_value_heads=2,
    state_size=2,
)


def make() -> StripedHyena:
    torch.manual_seed(0)
    return StripedHyena(CONFIG).cuda()


def test_golden_greedy_ids(golden_case: Path) -> None:
    config = read_config(golden_case / "config.yml")
    model = StripedHyena(config)
    model.load_state_dict(load_file(golden_case / "model.safetensors"))
    model.cuda()
    expected = load_file(golden_case / "expected.safetensors", device="cuda")
    ids, greedy = expected["input_ids"], expected["greedy_ids"]
    cache = model.make_cache(ids.shape[0], max_length=ids.shape[1] + greedy.shape[1])
    with torch.inference_mode():
        logits = model(ids, cache=cache)
        assert float((logits - expected["logits"]).abs().max() / expected["logits"].abs().max()) < 1e-4
        chosen = [logits[:, -1:].argmax(-1)]
        for _ in range(greedy.shape[1] - 1):
            chosen.append(model(chosen[-1], cache=cache).argmax(-1))
    assert torch.equal(torch.cat(chosen, dim=1), greedy)


@pytest.mark.parametrize("method", ModalFilter.methods)
def test_every_method_equals_itself_on_the_cpu(method: str) -> None:
    poles = torch.polar(0.95 * torch.rand(8, 2), 3 * torch.rand(8, 2))
    filter = ModalFilter(poles, torch.randn(8, 2, dtype=torch.complex64), torch.randn(8))
    x, more = torch.randn(2, 100, 8), torch.randn(2, 1, 8)
    there = ModalFilter(*(t.cuda() for t in filter if t is not None))
    y, state = long_conv(x.cuda(), there, method=method)
    expected, last = long_conv(x, filter, method=method)
    torch.testing.assert_close(y.cpu().to(expected.dtype), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(state.cpu(), last, rtol=1e-4, atol=1e-4)
    step, _ = long_conv(more.cuda(), there, state)
    torch.testing.assert_close(step.cpu(), long_conv(more, filter, last)[0], rtol=1e-4, atol=1e-4)


def test_the_canonical_form_equals_itself_on_the_cpu() -> None:
    poles = torch.polar(torch.linspace(0.5, 0.9, 8), torch.linspace(0, 2, 8)).unsqueeze(1)
    filter, x = ModalFilter(poles, torch.randn(8, 1, dtype=torch.complex64)), torch.randn(2, 100, 8)
    there = to_canonical(ModalFilter(poles.cuda(), filter.residues.cuda()))
    for method in ("recurrence", "canonical-fft"):
        y, state = long_conv(x.cuda(), there, method=method)
        expected, last = long_conv(x, to_canonical(filter), method=method)
        torch.testing.assert_close(y.cpu(), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(state.cpu(), last)
    assert to_modal(there).poles.is_cuda


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padded", [False, True])
def test_chunks_continuation_and_padding(dtype: torch.dtype, padded: bool) -> None:
    model = make().to(dtype)
    ids = torch.randint(64, (2, 300), device="cuda")
    mask = torch.arange(300, device="cuda") >= torch.tensor([[0], [17 if padded else 0]], device="cuda")
    with torch.inference_mode():
        cache = model.make_cache(2, max_length=300)
        parts = [model(ids[:, :100], cache=cache, mask=mask[:, :100])]
        parts += [model(ids[:, a:b], cache=cache) for a, b in ((100, 101), (101, 250), (250, 300))]
        got, whole = torch.cat(parts, dim=1), model(ids, mask=mask)
        row = model(ids[1:, 17 if padded else 0 :])
    tolerance = 1e-3 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(got[1, 17:], whole[1, 17:], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(got[1, 17:], row[0, 0 if padded else 17 :], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kernel", ["cudnn", "flash"])
@pytest.mark.parametrize(("heads", "groups", "head_dim"), [(32, 8, 128), (4, 4, 64), (6, 2, 8)])
@pytest.mark.parametrize(("length", "past"), [(1, 1000), (2, 0), (700, 0), (700, 2), (63, 1000)])
def test_attention_of_every_kernel(monkeypatch, kernel: str, heads: int, groups: int, head_dim: int, length, past):
    module = importlib.import_module("hyaena.ops.attention")  # the function has its name in ops
    monkeypatch.setattr(module, "CUDNN_PAIRS", 0 if kernel == "cudnn" else 2**60)
    q = torch.randn(2, length, heads + groups, head_dim, device="cuda").transpose(1, 2)[:, :heads]
    k, v = torch.randn(2, 2, groups, 2000, head_dim, device="cuda")[:, :, :, : length + past]
    q, k, v = (t.bfloat16() for t in (q, 3 * k, v))
    called = []
    original = getattr(module, f"_{kernel}")
    monkeypatch.setattr(module, f"_{kernel}", lambda *a: (called.append(kernel), original(*a))[1])
    with torch.inference_mode():
        got = attention(q, k, v)
        expected = attention(q.cpu().double(), k.cpu().double(), v.cpu().double())
    if torch.cuda.get_device_capability()[0] == 9:
        assert called
    assert got.transpose(1, 2).is_contiguous()
    # bfloat16 weights and values, and a result rounded up to three times, where the past is merged
    error = (got.cpu().double() - expected).norm() / expected.norm()
    assert float(error) < 1e-2


def test_packed_training_step_equals_the_cpu() -> None:
    ids = torch.randint(64, (2, 200))
    segment_ids = (torch.arange(200) // 37)[None].expand(2, -1)
    gradients = []
    for device in ("cpu", "cuda"):
        model = make().to(device)
        model(ids.to(device), segment_ids=segment_ids.to(device)).logsumexp(-1).mean().backward()
        gradients.append({name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None})
    for name, expected in gradients[0].items():
        error = (gradients[1][name] - expected).abs().max() / expected.abs().max()
        assert float(error) < 1e-3, name


@pytest.fixture(scope="module")
def cub():
    return hyaena.load("cub", device="cuda", dtype="float32")


def test_generation_of_a_batch(cub) -> None:
    model, tokenizer = cub
    prompts = ["import os\n", "def main(", "class Stack:\n    def push(self"]
    together = hyaena.generate(model, tokenizer, prompts, max_new_tokens=40, temperature=0.7, seed=1)
    for prompt, completion in zip(prompts, together, strict=True):
        assert hyaena.generate(model, tokenizer, prompt, max_new_tokens=40, temperature=0.7, seed=1).text == (
            completion.text
        )


@pytest.mark.parametrize(
    "sampling",
    [
        Options(),
        Options(temperature=0.8, seed=[1, 2, 3, 4, 5]),
        Options(temperature=1.0, top_k=40, min_p=0.02, repetition_penalty=1.1, seed=5),
        Options(temperature=1.0, logit_bias={10: 1.5, 101: -100}, allowed_tokens=range(10, 127), seed=3),
    ],
    ids=["greedy", "seeds", "penalty", "biases"],
)
def test_captured_steps_write_what_calls_of_the_model_do(cub, sampling: Options) -> None:
    """Over unequal prompts whose rows join and end at different times, past the numbers that are drawn in one block."""
    model, tokenizer = cub
    prompts = ["import os\n", "def main(", "class Stack:\n    def push(self", "x = ", "a = 1\n" * 700]
    options = Options(max_new_tokens=300, stop=["\n\n"], prefill_chunk=1024, **sampling)
    wanted = hyaena.generate(model, tokenizer, prompts, **options, decoding="eager")
    assert len({len(row.tokens) for row in wanted}) >= 3
    assert resolve_decoding(model, "auto", "auto") == "cuda_graph"
    for decoding in ("cuda_graph", "auto"):
        got = hyaena.generate(model, tokenizer, prompts, **options, decoding=decoding)
        for one, other in zip(got, wanted, strict=True):
            assert (one.text, one.tokens, one.finish_reason) == (other.text, other.tokens, other.finish_reason)
            # float32, another order of sums
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-3)
    texts = [""] * len(prompts)
    for event in hyaena.stream(model, tokenizer, prompts, **options, decoding="cuda_graph"):
        texts[event.index] += event.text
    assert texts == [row.text for row in wanted]


def test_rows_with_a_bias_join_captured_rows(cub) -> None:
    """A bias table is made when the first row needs one, after steps were captured without it."""
    model, _ = cub
    kinds = [SamplingParams(), SamplingParams(allowed_tokens=range(65, 91)), SamplingParams(logit_bias={32: 5.0})]
    found = []
    for cuda_graph in (True, False):
        decoder, rows = Decoder(model, 4, cuda_graph=cuda_graph), []
        for keep, params in (([0], kinds[0]), ([0, 1], kinds[1]), ([0, 2], kinds[2])):
            cache = model.make_cache(max_length=64)
            with torch.inference_mode():
                model(torch.tensor([[256, 100, 101, 102]], device="cuda"), cache=cache)
            decoder.add(cache, torch.tensor([32]), [params], [params.generator()])
            for _ in range(5):
                decoder.launch()
                rows.append(decoder.fetch().tokens)
            decoder.keep(keep)
        found.append(rows)
    assert found[0] == found[1]
    assert all(65 <= step[1] < 91 for step in found[0][5:])


@pytest.mark.parametrize("decoding", ["eager", "cuda_graph"])
def test_a_prefix_is_continued_rolled_back_and_sampled(cub, decoding, tmp_path: Path) -> None:
    model, tokenizer = cub
    text = "import json\n\n\ndef load(path):\n" * 100
    prefix = hyaena.prefix(model, tokenizer, text)
    options = Options(max_new_tokens=30, temperature=0.7, seed=2, decoding=decoding, n=3)
    wanted = [row.tokens for row in hyaena.generate(model, tokenizer, text + "    with", **options)]
    loaded = hyaena.load_prefix(prefix.save(tmp_path / "p"), model, tokenizer)
    for one in (prefix, loaded):
        assert [row.tokens for row in hyaena.generate(model, tokenizer, "    with", prefix=one, **options)] == wanted
        one.extend("x = 1\n" * 20)
        one.rollback(120)
        assert [row.tokens for row in hyaena.generate(model, tokenizer, "    with", prefix=one, **options)] == wanted


def test_captured_steps_compute_with_an_adapter(cub) -> None:
    base, tokenizer = cub
    linear = {name: module for name, module in base.named_modules() if isinstance(module, torch.nn.Linear)}
    shapes = {name: module.weight.shape for name, module in linear.items()} | {
        "lm_head": base.embed_tokens.weight.shape
    }
    updates = {
        name: Update(torch.randn(4, columns) * columns**-0.5, torch.randn(rows, 4) * 0.1, 1.0)
        for name, (rows, columns) in shapes.items()
    }
    model = with_adapter(base, Adapter("random numbers", updates))
    got, wanted, without = (
        hyaena.generate(made, tokenizer, "import os\n", max_new_tokens=30, stop_at_eos=False, decoding=decoding)
        for made, decoding in ((model, "cuda_graph"), (model, "eager"), (base, "eager"))
    )
    assert got.tokens == wanted.tokens != without.tokens
    assert got.logprobs == pytest.approx(wanted.logprobs, abs=1e-3)


EVO2_7B = replace(ModelConfig.from_name("evo2-7b"), fp8_input_projections=False)


@pytest.mark.wide
@pytest.mark.parametrize(
    "config",
    [
        replace(SH_7B, layer_types=("hyena", "attention")),
        replace(EVO2_7B, layer_types=("hyena_se", "hyena_mr", "hyena_li", "attention")),
    ],
    ids=["sh", "evo2"],
)
def test_captured_steps_at_the_width_of_the_7b(config: ModelConfig) -> None:
    model = random_model(config, torch.device("cuda"), torch.float32)
    with torch.no_grad():  # the best logit stands out, as that of a trained model does
        for name, p in model.named_parameters():
            if "long_filter" not in name:
                p.normal_(std=2.3 / model.config.hidden_size**0.5)
    prompts = [torch.randint(config.vocab_size, (length,)).tolist() for length in (5, 43, 50)]
    tokenizer = ByteTokenizer(model.config.vocab_size)
    got, wanted = (
        hyaena.generate(model, tokenizer, prompts, max_new_tokens=40, stop_at_eos=False, decoding=decoding)
        for decoding in ("cuda_graph", "eager")
    )
    for one, other in zip(got, wanted, strict=True):
        assert one.tokens == other.tokens
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-3)


def test_the_command_line_captures(cub, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--device", "cuda", "--dtype", "float32", "--decoding", "cuda_graph", "--max-new-tokens", "40"]
    assert main(["generate", *flags, "def main("]) == 0
    wanted = hyaena.generate(*cub, "def main(", max_new_tokens=40, decoding="eager")
    assert capsys.readouterr().out == wanted.text + "\n"


def test_poles_stay_precise_and_states_complex_on_the_device() -> None:
    model = make().half().to("cuda", torch.bfloat16)
    cache = model.make_cache()
    with torch.inference_mode():
        model(torch.randint(64, (1, 50), device="cuda"), cache=cache)
    for layer in cache.states:
        if isinstance(layer, HyenaState):
            assert layer.long.is_cuda and layer.long.dtype == torch.complex64
    for name, p in model.named_parameters():
        assert p.dtype == (torch.float32 if name.endswith(("poles", "residues")) else torch.bfloat16)


def test_captured_steps_live_on_pages() -> None:
    """Rows grow, leave and give their pages to others at once; nothing is captured again, and all tokens are right."""
    model, limit, greedy = make(), 200, SamplingParams()
    torch.manual_seed(4)
    prompts = [torch.randint(64, (1, n), device="cuda") for n in (60, 1, 127, 64, 30, 100)]

    def run(paged: bool) -> tuple[dict[int, list[int]], int]:
        pool = model.make_page_pool(10)
        free, pages = list(range(10)), {}
        decoder = PipelinedDecoder[int](Decoder(model, 4, cuda_graph=True))
        tokens: dict[int, list[int]] = {}
        for key, prompt in enumerate(prompts):
            if key >= 3:
                decoder.remove([key - 3])
                free += pages.pop(key - 3, [])
            cache = model.make_cache(max_length=limit)
            if paged:
                pages[key] = [free.pop() for _ in range(pages_for(prompt.shape[1]))]
                cache = model.make_paged_cache(pool, [pages[key]], max_length=limit)
            with torch.inference_mode():
                ids = model(prompt, cache=cache)[:, -1].argmax(-1)
            decoder.add([key], [60], cache, ids, [greedy], [greedy.generator()])
            tokens[key] = []
            for _ in range(15):
                for row, count in decoder.missing_pages().items():
                    extra = [free.pop() for _ in range(count)]
                    decoder.extend(row, extra)
                    pages[row] += extra
                keys, output = decoder.next()
                for row, token, finite in zip(keys, output.tokens, output.finite, strict=True):
                    if row > key - 3:
                        assert finite
                        tokens[row].append(token)
        decoder.wait()
        return tokens, len(decoder.decoder.graphs)

    assert run(True) == run(False)
