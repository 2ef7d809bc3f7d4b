"""Decoding on pages: rows join, grow, leave and share prefixes, and the tokens are those of ordinary caches."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from configs import TINY, TINY_EVO, TINY_EVO2
from hyaena.cache import Cache
from hyaena.decoding import Decoder, EagerDecoder, PipelinedDecoder
from hyaena.errors import CapacityError, InputError
from hyaena.model import StripedHyena
from hyaena.ops import PAGE, PagePool, pages_for
from hyaena.sampling import SamplingParams

LIMIT = 4 * PAGE
AnyDecoder = EagerDecoder[int] | PipelinedDecoder[int]


def make(config: Any = TINY) -> StripedHyena:
    torch.manual_seed(3)
    model = StripedHyena(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "long_filter" not in name:
                p.normal_(std=0.3)
    return model


def static(model: StripedHyena) -> AnyDecoder:
    return PipelinedDecoder(Decoder(model, 8))


def eager(model: StripedHyena) -> AnyDecoder:
    return EagerDecoder(model)


class Owner:
    """Hands out the pages of a pool, the last that came back first; free pages hold NaN."""

    def __init__(self, model: StripedHyena, pages: int) -> None:
        self.pool: PagePool = model.make_page_pool(pages)
        self.free = random.Random(5).sample(range(pages), pages)
        self.poison(self.free)

    def take(self, count: int) -> list[int]:
        return [self.free.pop() for _ in range(count)]

    def give(self, pages: list[int]) -> None:
        self.free += pages
        self.poison(pages)

    def poison(self, pages: list[int]) -> None:
        for layer in self.pool.layers:
            for stored in layer:
                stored[:, pages] = torch.nan

    def check(self) -> None:
        """Nobody wrote to a page that is free."""
        for layer in self.pool.layers:
            for stored in layer:
                assert bool(stored[:, self.free].isnan().all())


def first_token(model: StripedHyena, cache: Cache, prompt: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(prompt, cache=cache, logits_to_keep=1)[:, -1].argmax(-1)


def life(model: StripedHyena, make_decoder: Callable[[StripedHyena], AnyDecoder], owner: Owner | None) -> dict:
    """Rows join and leave at random; the tokens and log-probabilities of each, the same for every seed and owner."""
    rng = random.Random(11)
    generator = torch.Generator().manual_seed(12)
    decoder, results, live, steps, pages = make_decoder(model), {}, {}, {}, {}
    key = 0
    for _ in range(150):
        while len(live) < 5 and rng.random() < 0.4 and key < 20:
            prompt = torch.randint(50, (1, rng.randint(1, 150)), generator=generator)
            want = rng.choice([3, 30, 70, LIMIT])
            steps[key] = min(want, LIMIT - prompt.shape[1])  # some rows end full
            if owner is None:
                cache = model.make_cache(max_length=LIMIT)
            else:
                pages[key] = owner.take(pages_for(prompt.shape[1]))
                cache = model.make_paged_cache(owner.pool, [pages[key]], max_length=LIMIT)
            ids = first_token(model, cache, prompt)
            greedy = SamplingParams()
            decoder.add([key], [steps[key]], cache, ids, [greedy], [greedy.generator()])
            live[key] = rng.randint(1, steps[key])  # it may leave before it has done all
            results[key] = [int(ids)]
            key += 1
        if not live:
            continue
        if owner is not None:
            for row, count in decoder.missing_pages().items():
                extra = owner.take(count)
                decoder.extend(row, extra)
                pages[row] += extra
        keys, output = decoder.next()
        if owner is not None:
            owner.check()
        for i, row in enumerate(keys):
            if row in live:
                assert output.finite[i]
                results[row] += [(output.tokens[i], output.logprobs[i])]
                live[row] -= 1
        gone = [row for row, left in live.items() if left == 0]
        if gone:
            decoder.remove(gone)
            for row in gone:
                del live[row]
                if owner is not None:
                    owner.give(pages.pop(row))
    assert key == 20
    return results


@pytest.mark.parametrize(
    ("config", "make_decoder"),
    [(TINY, static), (TINY_EVO, static), (TINY_EVO2, static), (TINY_EVO, eager)],
    ids=["sh", "evo", "evo2", "evo-eager"],
)
def test_a_life_on_pages_is_that_of_ordinary_rows(config: Any, make_decoder: Any) -> None:
    """Bit for bit, with pages that pass from row to row at once."""
    model = make(config)
    owner = Owner(model, 5 * pages_for(LIMIT))
    assert life(model, make_decoder, owner) == life(model, make_decoder, None)


def test_the_kernels_live_on_pages() -> None:
    pytest.importorskip("triton", reason="the kernels need triton, which is made for Linux")
    from device import DEVICE
    from hyaena.ops.triton.decode.operators import FusedDecodeOperators

    model = make(dataclasses.replace(TINY, layer_types=("attention", "hyena"))).to(DEVICE)
    prompts = [torch.randint(50, (1, n), device=DEVICE) for n in (63, 3)]
    greedy = SamplingParams()

    def run(paged: bool) -> list[Any]:
        owner = Owner(model, 8)
        decoder = PipelinedDecoder[int](Decoder(model, 2, operators=FusedDecodeOperators(longest=2 * PAGE)))
        outputs: list[Any] = []
        for key, prompt in enumerate(prompts):
            cache = model.make_cache(max_length=LIMIT)
            if paged:
                pages = owner.take(pages_for(prompt.shape[1]))
                cache = model.make_paged_cache(owner.pool, [pages], max_length=LIMIT)
            decoder.add([key], [20], cache, first_token(model, cache, prompt), [greedy], [greedy.generator()])
            for row, count in decoder.missing_pages().items():
                decoder.extend(row, owner.take(count))
            keys, output = decoder.next()
            outputs.append((keys, output.tokens, output.logprobs))
        return outputs

    assert run(True) == run(False)


def test_a_row_that_left_writes_to_no_page_and_frees_its_own_at_once() -> None:
    """Steps that are launched after it left, with its place still taken, go to the scratch page."""
    model = make()
    owner, greedy = Owner(model, 6), SamplingParams()
    pages = [owner.take(1) for _ in range(3)]
    cache = model.make_paged_cache(owner.pool, pages, max_length=PAGE)
    ids = first_token(model, cache, torch.randint(50, (3, 10)))
    decoder = PipelinedDecoder[str](Decoder(model, 4))
    decoder.add(["a", "b", "c"], [40] * 3, cache, ids, [greedy] * 3, [greedy.generator()] * 3)
    decoder.next()
    decoder.remove(["b"])
    owner.give(pages[1])
    for _ in range(3):
        keys, _ = decoder.next()
        assert keys == ["a", "b", "c"]  # its place is kept until rows join
        owner.check()
    assert not bool(owner.pool.layers[0][0][:, owner.pool.scratch].isnan().all())
    with pytest.raises(InputError, match="row 1 was retired"):
        decoder.snapshot_states("b")
    with pytest.raises(InputError, match="row 1 takes no pages"):
        decoder.extend("b", [0])


def test_a_row_that_has_done_its_steps_leaves_its_pages_as_they_are() -> None:
    """It waits for others, and a prefix cache may keep its pages; also when others leave and places are moved."""
    model = make()
    owner, greedy = Owner(model, 8), SamplingParams()
    decoder, pages = PipelinedDecoder[str](Decoder(model, 4)), {}
    for key, steps in (("leaves", 20), ("short", 4), ("long", 30), ("leaves too", 20)):
        pages[key] = owner.take(2)
        cache = model.make_paged_cache(owner.pool, [pages[key]], max_length=LIMIT)
        ids = first_token(model, cache, torch.randint(50, (1, 65)))
        decoder.add([key], [steps], cache, ids, [greedy], [greedy.generator()])
    for _ in range(4):
        decoder.next()
    before = [stored[:, pages["short"]].clone() for stored in owner.pool.layers[0]]
    decoder.next()
    decoder.remove(["leaves", "leaves too"])
    for key in ("leaves", "leaves too"):
        owner.give(pages[key])
    for _ in range(4):
        decoder.next()
        owner.check()
    assert decoder.keys == ["short", "long"]
    for stored, kept in zip(owner.pool.layers[0], before, strict=True):
        assert torch.equal(stored[:, pages["short"]].nan_to_num(7.0), kept.nan_to_num(7.0))


def test_places_without_a_row_work_on_the_scratch_page() -> None:
    """A captured step of four places, of which one has a row."""
    model = make()
    owner, greedy = Owner(model, 4), SamplingParams()
    pages = owner.take(3)
    cache = model.make_paged_cache(owner.pool, [[page] for page in pages], max_length=LIMIT)
    ids = first_token(model, cache, torch.randint(50, (3, 5)))
    decoder = Decoder(model, 4)
    decoder.add(cache, ids, [greedy] * 3, [greedy.generator()] * 3)
    decoder.keep([1])
    owner.give([pages[0], pages[2]])
    with torch.inference_mode():
        decoder._step(dataclasses.replace(decoder._shape(), places=4))
    owner.check()
    assert decoder.static.device_lengths.tolist() == [6, 1, 1, 1]


@pytest.mark.parametrize("make_decoder", [static, eager])
def test_a_row_goes_on_from_a_snapshot_that_was_taken_while_it_decoded(make_decoder: Any) -> None:
    model = make()
    owner, greedy = Owner(model, 8), SamplingParams()
    prompt = torch.randint(50, (1, PAGE - 4))
    pages = owner.take(3)
    cache = model.make_paged_cache(owner.pool, [pages], max_length=LIMIT)
    decoder = make_decoder(model)
    ids = first_token(model, cache, prompt)
    decoder.add([0], [40], cache, ids, [greedy], [greedy.generator()])
    tokens, snapshot = [int(ids)], None
    for _ in range(40):
        tokens += decoder.next()[1].tokens
        if decoder.lengths[0] == PAGE:
            snapshot = decoder.snapshot_states(0)
    assert snapshot is not None and snapshot.length == PAGE
    branch = model.make_paged_cache(owner.pool, [[pages[0], *owner.take(2)]], max_length=LIMIT)
    branch.restore_states(0, snapshot)
    read = PAGE - (PAGE - 4)  # tokens of the answer that lie before the snapshot
    again = make_decoder(model)
    first = torch.tensor(tokens[read : read + 1])
    again.add([0], [30], branch, first, [greedy], [greedy.generator()])
    assert [again.next()[1].tokens[0] for _ in range(30)] == tokens[read + 1 : read + 31]


def test_missing_pages_are_named_one_step_ahead() -> None:
    model = make()
    owner, greedy = Owner(model, 8), SamplingParams()
    cache = model.make_paged_cache(owner.pool, [owner.take(1), owner.take(1)], max_length=3 * PAGE)
    ids = first_token(model, cache, torch.randint(50, (2, PAGE - 2)))
    decoder = PipelinedDecoder[str](Decoder(model, 2))
    decoder.add(["a", "b"], [50, 2], cache, ids, [greedy] * 2, [greedy.generator()] * 2)
    assert decoder.missing_pages() == {}
    decoder.next()  # launches two steps: both rows are full
    assert decoder.lengths["a"] == PAGE and decoder.missing_pages() == {"a": 1}  # b has done its steps
    with pytest.raises(CapacityError, match="row 0 holds 64 tokens on 1 pages of 64: extend it by a page"):
        decoder.next()
    decoder.extend("a", owner.take(1))
    assert decoder.next()[0] == ["a", "b"]
    eager = EagerDecoder[str](model)
    cache = model.make_paged_cache(owner.pool, [owner.take(1)], max_length=LIMIT)
    eager.add(
        ["x"], [9], cache, first_token(model, cache, torch.randint(50, (1, PAGE))), [greedy], [greedy.generator()]
    )
    assert eager.missing_pages() == {"x": 1}
    with pytest.raises(CapacityError, match="give it 2 pages"):
        eager.next()
    eager.extend("x", owner.take(1))
    eager.next()
    assert eager.lengths["x"] == PAGE + 1


def test_the_table_grows_with_the_rows() -> None:
    """A row that is longer than those before it makes a wider table, which knows all rows."""
    model = make()
    owner, greedy = Owner(model, 12), SamplingParams()
    decoder, results = Decoder(model, 2), []
    prompts = [torch.randint(50, (1, n)) for n in (10, 200)]
    for paged in (True, False):
        decoder, tokens = Decoder(model, 2), []
        for prompt, limit in zip(prompts, (PAGE, 5 * PAGE), strict=True):
            cache = model.make_cache(max_length=limit)
            if paged:  # with more pages than the limit needs
                cache = model.make_paged_cache(owner.pool, [owner.take(pages_for(limit) + 1)], max_length=limit)
            decoder.add(cache, first_token(model, cache, prompt), [greedy], [greedy.generator()])
            decoder.launch()
            tokens.append(decoder.fetch())
        results.append(tokens)
        owner = Owner(model, 12)
    assert results[0] == results[1]


def test_mistakes_of_paged_decoding_are_named() -> None:
    model = make()
    pool, other, greedy = model.make_page_pool(4), model.make_page_pool(4), SamplingParams()

    def cache(of: PagePool | None) -> Cache:
        return model.make_cache(max_length=9) if of is None else model.make_paged_cache(of, [[1]], max_length=9)

    ids, params, generators = torch.zeros(1, dtype=torch.int64), [greedy], [greedy.generator()]
    decoder = Decoder(model, 4)
    decoder.add(cache(pool), ids, params, generators)
    for wrong in (None, other):
        with pytest.raises(InputError, match="pages of one pool, or all on none"):
            decoder.add(cache(wrong), ids, params, generators)
    for row, pages, message in ((1, [2], "row 1 takes no pages"), (0, [1], "one page twice"), (0, [4], "from 0 to 3")):
        with pytest.raises(InputError, match=message):
            decoder.extend(row, pages)
    with pytest.raises(InputError, match="make it with max_length"):
        decoder.add(model.make_paged_cache(pool, [[2]]), ids, params, generators)
    ordinary = Decoder(model, 4)
    ordinary.add(cache(None), ids, params, generators)
    with pytest.raises(InputError, match="row 0 takes no pages"):
        ordinary.extend(0, [1])
    with pytest.raises(InputError, match="takes a cache on pages"):
        ordinary.snapshot_states(0)
    assert ordinary.missing_pages(0, 5) == 0
    pipeline = PipelinedDecoder[str](Decoder(model, 4))
    pipeline.add(["a"], [5], cache(pool), ids, params, generators)
    pipeline.next()
    pipeline.remove(["a"])
    with pytest.raises(InputError, match="outputs are still to be read"):
        pipeline.add(["a"], [5], cache(pool), ids, params, generators)
    pipeline.add(["a again"], [5], cache(pool), ids, params, generators)
