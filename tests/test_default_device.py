"""What a program sets for tensors of its own changes nothing here: ``torch.set_default_device`` and default dtypes.

The device ``meta`` stands for any other than the CPU: its tensors hold no numbers, so that one which was made without
a device cannot be read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import hyaena
from configs import TINY, TINY_EVO2
from hyaena import checkpoints
from hyaena.adapters import add_adapter, save_adapter, with_adapter
from hyaena.decoding.sampler import GraphSampler
from hyaena.filters import LongFilter
from hyaena.formats.evo2.extra_state import read_scales, write_scales
from hyaena.model import StripedHyena
from hyaena.records import Variant
from hyaena.sampling import SamplingParams
from hyaena.scoring import score_variants
from hyaena.tokenizers import ByteTokenizer
from models import spread

WIDE = {"hidden_size": 64, "intermediate_size": 96, "tokenizer": "bytes", "vocab_size": 260, "max_length": 200}
CONFIGS = {"sh": replace(TINY, **WIDE), "evo2": replace(TINY_EVO2, **WIDE)}
TOKENIZER = ByteTokenizer(260)
IDS = torch.arange(3, 33)[None]
OPTIONS = {"temperature": 1.0, "top_k": 9, "repetition_penalty": 1.2, "allowed_tokens": "ACGTacgt", "max_new_tokens": 6}
PROMPTS = ["hello there", "ACGT"]


@pytest.fixture(params=CONFIGS)
def model(request: pytest.FixtureRequest) -> StripedHyena:
    torch.manual_seed(0)
    return spread(CONFIGS[request.param])


@pytest.fixture(params=["device", "dtype"])
def elsewhere(request: pytest.FixtureRequest) -> Iterator[Callable[[], None]]:
    """A function that sets another default; it ends with the test."""
    if request.param == "device":
        yield lambda: torch.set_default_device("meta")
        torch.set_default_device(None)
    else:
        yield lambda: torch.set_default_dtype(torch.bfloat16)
        torch.set_default_dtype(torch.float32)


def test_checkpoints(model: StripedHyena, elsewhere: Callable[[], None], tmp_path: Path) -> None:
    want = model(IDS)
    checkpoints.save_model(model, tmp_path / "m")
    narrow = checkpoints.load_model(tmp_path / "m", weights="int4")(IDS)
    elsewhere()
    assert torch.equal(hyaena.load_model(tmp_path / "m", device="cpu")(IDS), want)
    assert torch.equal(hyaena.load_model(tmp_path / "m", device="cpu", weights="int4")(IDS), narrow)
    checkpoints.quantize_checkpoint(checkpoints.find(tmp_path / "m"), tmp_path / "q", "int4")
    checkpoints.save_model(model, tmp_path / "o", layout="original")
    assert torch.equal(checkpoints.load_model(tmp_path / "q")(IDS), narrow)
    assert torch.equal(checkpoints.load_model(tmp_path / "o")(IDS), want)


@pytest.mark.parametrize("decoding", ["eager", "static", "compiled"])
def test_generation(model: StripedHyena, elsewhere: Callable[[], None], tmp_path: Path, decoding: str) -> None:
    if decoding == "compiled":
        pytest.importorskip("numba", reason="it compiles the kernels")

    def tokens() -> list[list[int]]:
        seeds, options = [3, 4], {**OPTIONS, "decoding": decoding}
        found = hyaena.generate(model, TOKENIZER, PROMPTS, seed=seeds, prefill_chunk=3, logprobs=2, **options)
        prefix = hyaena.prefix(model, TOKENIZER, "hello")
        prefix.save(tmp_path / "prefix")
        prefix = hyaena.load_prefix(tmp_path / "prefix", model, TOKENIZER)
        prefix.extend(" there")
        prefix.rollback(2)
        found.append(hyaena.generate(model, TOKENIZER, "re", prefix=prefix, seed=3, **options))
        return [one.tokens for one in found]

    want = tokens()
    elsewhere()
    assert tokens() == want


def test_reading(model: StripedHyena, elsewhere: Callable[[], None]) -> None:
    genome, variants = {"c": "ACGTTGCAAC" * 12}, [Variant("c", 60, "A", "G"), Variant("c", 61, "C", "CGG")]

    def numbers() -> list[float]:
        found = [one.sum for one in hyaena.score(model, TOKENIZER, PROMPTS, tokens_per_pass=7, top=2)]
        found.append(hyaena.score(model, TOKENIZER, "ACGTT", both_strands=True).sum)
        for pool in ("mean", "last", "none", [0, -1]):
            found += [float(x.sum()) for x in hyaena.embed(model, TOKENIZER, PROMPTS, layers="unembed", pool=pool)]
        found += [one.logprob for one in hyaena.score_continuations(model, [([1, 2, 3], [[4], [5, 6]])])[0]]
        scores = score_variants(model, TOKENIZER, genome, variants, window=40, both_strands=True)
        return found + [one.alternative for one in scores]

    want = numbers()
    elsewhere()
    assert numbers() == want


def test_adapters_and_rows_of_unequal_lengths(
    model: StripedHyena, elsewhere: Callable[[], None], tmp_path: Path
) -> None:
    trained = hyaena.StripedHyena(model.config).eval()
    trained.load_state_dict(model.state_dict())
    add_adapter(trained, rank=2)
    save_adapter(trained, tmp_path)
    want = trained(IDS)
    elsewhere()
    assert torch.equal(with_adapter(model, tmp_path)(IDS), want)
    cache = model.make_cache(2, max_length=40)
    model(IDS, cache=cache, counts=[10, 20])
    assert cache.lengths == [10, 20]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_what_is_float32_is_made_so_under_any_default_dtype(dtype: torch.dtype) -> None:
    """Poles of phase n·π are a quarter of a radian off where n·π is bfloat16; transformers loads under that default."""
    module, again = LongFilter(3, 40), LongFilter(3, 40)
    with torch.no_grad():
        module.init_weights(torch.Generator().manual_seed(0))
        torch.set_default_dtype(dtype)
        try:
            again.init_weights(torch.Generator().manual_seed(0))
            scales = read_scales(write_scales(0.3, 0.7))
            sampler = GraphSampler(1, 5, top=0, device=torch.device("cpu"))
            sampler.add([SamplingParams(logit_bias={1: 0.3})], [torch.Generator()], None)
        finally:
            torch.set_default_dtype(torch.float32)
    assert torch.equal(again.poles, module.poles) and scales == pytest.approx((0.3, 0.7), rel=1e-7)
    assert sampler.bias is not None and sampler.bias.dtype == torch.float32
