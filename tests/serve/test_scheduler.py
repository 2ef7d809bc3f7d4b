"""The scheduler against a runner without tensors: pages hold tokens, and a state is the list of tokens before it.

A token that was read with an adapter is another one than the same token that was read without.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hyaena.errors import CapacityError
from hyaena.serve.pages import Pages
from hyaena.serve.prefix_cache import GRID_PAGES, PrefixCache, Rank
from hyaena.serve.scheduler import TURNS_APART, Plan, Scheduler

PAGE = 4
ALONE = ("", "")
"""The tree of requests without adapter and salt."""


Kept = tuple[str, int]


def next_token(tokens: list[int], adapter: str = "", vocabulary: int = 3) -> int:
    """What the fake model says: a function of everything before, so that a wrong state or page shows."""
    value = 7
    for token in (*adapter.encode(), *tokens):
        value = (value * 31 + token + 1) % 1_000_003
    return value % vocabulary


@dataclass
class Row:
    adapter: str
    pages: list[int]
    state: list[Kept]  # what a Hyena layer remembers


@dataclass
class FakeRunner:
    """Carries plans out, and checks that every row finds in its pages and its state what it has read."""

    scheduler: Scheduler
    limits: dict[int, int]
    memory: dict[int, list[Kept | None]] = field(default_factory=dict)
    snapshots: dict[int, list[Kept]] = field(default_factory=dict)
    rows: dict[int, Row] = field(default_factory=dict)
    decoding: list[int] = field(default_factory=list)
    results: dict[int, list[int]] = field(default_factory=dict)
    passes: list[int] = field(default_factory=list)

    def store(self, row: Row, tokens: list[int]) -> None:
        for token in tokens:
            place = len(row.state)
            self.memory.setdefault(row.pages[place // PAGE], [None] * PAGE)[place % PAGE] = (row.adapter, token)
            row.state.append((row.adapter, token))

    def attended(self, row: Row) -> list[Kept | None]:
        return [self.memory[row.pages[i // PAGE]][i % PAGE] for i in range(len(row.state))]

    def choose(self, key: int) -> None:
        row = self.rows[key]
        assert self.attended(row) == row.state
        job = self.scheduler.jobs[key]
        assert row.state == [(job.adapter, token) for token in job.tokens], "the row has read something else"
        token = next_token(job.tokens, job.adapter)
        self.results.setdefault(key, []).append(token)
        self.scheduler.append(key, token)
        if len(self.results[key]) == self.limits[key]:
            self.finish(key)

    def finish(self, key: int) -> None:
        self.scheduler.finish(key, self.at_page_ends().get(key))
        if key in self.decoding:
            self.decoding.remove(key)

    def at_page_ends(self) -> dict[int, int]:
        lengths = {key: len(self.rows[key].state) for key in self.decoding}
        return {key: length for key, length in lengths.items() if length % PAGE == 0}

    def turn(self) -> None:
        self.run(self.scheduler.plan(self.at_page_ends()))

    def run(self, plan: Plan) -> None:
        for key, number in plan.copy.items():
            self.snapshots[number] = list(self.rows[key].state)
        for key in plan.drop:
            del self.rows[key]
            if key in self.decoding:
                self.decoding.remove(key)
        for start in plan.start:
            state = [] if start.snapshot is None else list(self.snapshots[start.snapshot])
            assert len(state) == start.length
            self.rows[start.key] = Row(start.adapter, list(start.pages), state)
        for number in plan.forget:
            self.snapshots.pop(number, None)
        for read in plan.reads:
            row = self.rows[read.key]
            assert len(row.state) == read.start
            for token in (*read.tokens, *read.replay):
                self.store(row, [token])
                if (number := read.snapshots.get(len(row.state))) is not None:
                    self.snapshots[number] = list(row.state)
            assert self.attended(row) == row.state
        self.passes.append(sum(len(read.tokens) for read in plan.reads))
        assert len(plan.reads) < 2 or all(read.last for read in plan.reads)
        for key, pages in plan.grow.items():
            self.rows[key].pages += pages
        assert sorted(plan.decode) == sorted({self.rows[key].adapter for key in self.decoding})
        for adapter in plan.decode:
            for key in [key for key in self.decoding if self.rows[key].adapter == adapter]:
                self.store(self.rows[key], self.scheduler.jobs[key].tokens[-1:])
                self.choose(key)
        self.scheduler.done(plan)
        for read in plan.reads:
            if read.last and read.key in self.scheduler.jobs:
                self.decoding.append(read.key)
                self.choose(read.key)


def expected(prompt: list[int], count: int, adapter: str = "") -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens, adapter))
    return tokens[len(prompt) :]


requests = st.lists(
    st.tuples(
        # Few tokens: prefixes are often shared, in half of the cases by more than lies between places of the grid.
        st.tuples(st.sampled_from([0, 33]), st.lists(st.integers(0, 2), min_size=1, max_size=40)).map(
            lambda parts: ([0] * parts[0] + parts[1])[:40]
        ),
        st.integers(1, 20),
        st.integers(0, 12),  # the turn in which it arrives
        st.one_of(st.none(), st.integers(0, 15)),  # the turn in which it is cancelled
        st.sampled_from(["", "", "a", "b"]),
        st.one_of(st.none(), st.tuples(st.integers(0, 15), st.integers(0, 10))),  # is paused then, for so many turns
    ),
    min_size=1,
    max_size=12,
)


@given(
    requests=requests,
    pages=st.integers(16, 60),
    max_rows=st.integers(1, 5),
    chunk=st.sampled_from([4, 8, 32]),
    max_snapshots=st.integers(0, 20),
    fixed_passes=st.booleans(),
)
def test_any_requests_get_what_they_get_alone(
    requests: list, pages: int, max_rows: int, chunk: int, max_snapshots: int, fixed_passes: bool
) -> None:
    scheduler = Scheduler(
        pages=pages,
        page_size=PAGE,
        max_rows=max_rows,
        chunk=chunk,
        max_snapshots=max_snapshots,
        fixed_passes=fixed_passes,
    )
    runner = FakeRunner(scheduler, {key: count for key, (_, count, *_) in enumerate(requests)})
    cancelled: set[int] = set()
    for turn in range(10_000):
        for key, (prompt, count, arrives, cancels, adapter, paused) in enumerate(requests):
            if arrives == turn:
                scheduler.add(key, prompt, count, adapter=adapter)
            if cancels == turn and key in scheduler.jobs:
                runner.finish(key)
                cancelled.add(key)
            if paused and key in scheduler.jobs:
                if turn == paused[0]:
                    scheduler.pause(key, runner.at_page_ends().get(key))
                    if key in runner.decoding:
                        runner.decoding.remove(key)
                if turn == sum(paused):
                    scheduler.resume(key)
        if scheduler.idle and turn > 25:
            break
        plan = scheduler.plan(runner.at_page_ends())
        assert len(runner.rows) <= 2 * max_rows
        runner.run(plan)
        assert runner.passes[-1] <= max(chunk, 1)
        assert len(scheduler.prefix._recent) + scheduler.pages.free <= pages
        assert scheduler.prefix.snapshots <= max_snapshots
    else:
        pytest.fail("the requests never ended")
    for key, (prompt, count, _, _, adapter, _) in enumerate(requests):
        result = runner.results.get(key, [])
        want = expected(prompt, count, adapter)
        assert result == (want[: len(result)] if key in cancelled else want)
    assert scheduler.pages.free == pages - scheduler.prefix.cached_pages, "a page was lost"
    scheduler.prefix.clear()
    assert scheduler.pages.free == pages and scheduler.prefix.snapshots == 0
    assert not scheduler.prefix._roots


def drive(scheduler: Scheduler, requests: dict[int, tuple[list[int], int]], turns: int = 500) -> FakeRunner:
    runner = FakeRunner(scheduler, {key: count for key, (_, count) in requests.items()})
    for key, (prompt, count) in requests.items():
        scheduler.add(key, prompt, count)
    for _ in range(turns):
        if scheduler.idle:
            break
        runner.turn()
    assert scheduler.idle
    return runner


def test_a_short_prompt_overtakes_a_long_one() -> None:
    scheduler = Scheduler(pages=100, page_size=PAGE, max_rows=4, chunk=8, max_snapshots=0)
    runner = FakeRunner(scheduler, {0: 2, 1: 2})
    scheduler.add(0, [0] * 200, 2)
    runner.turn()
    scheduler.add(1, [1] * 4, 2)
    for _ in range(2):
        runner.turn()
    assert len(runner.results[1]) >= 1 and 0 not in runner.results


def test_free_rows_are_not_kept_for_ever() -> None:
    """Fifteen streams of sixteen go on and on, and two requests wait, which would start together."""
    scheduler = Scheduler(pages=400, page_size=PAGE, max_rows=16, chunk=64, max_snapshots=0)
    runner = FakeRunner(scheduler, {**dict.fromkeys(range(15), 500), 15: 3, 16: 3})
    for key in range(15):
        scheduler.add(key, [key % 3], 500)
    for _ in range(3):
        runner.turn()
    scheduler.add(15, [1], 3)
    scheduler.add(16, [1], 3)
    for _ in range(TURNS_APART + 3):
        runner.turn()
    assert 15 in runner.results


@pytest.mark.parametrize("fixed_passes", [False, True])
def test_samples_of_a_long_prompt_read_it_once(fixed_passes: bool) -> None:
    """They wait for the first, and others behind them do not."""
    grid = GRID_PAGES * PAGE
    prompt, other = [0] * (5 * grid + 3), [0] * grid + [1] * 50
    scheduler = Scheduler(
        pages=200, page_size=PAGE, max_rows=16, chunk=grid, max_snapshots=99, fixed_passes=fixed_passes
    )
    runner = FakeRunner(scheduler, dict.fromkeys(range(6), 5))
    for key in range(4):
        scheduler.add(key, prompt, 5)
    scheduler.add(4, [2, 2], 5)
    scheduler.add(5, other, 5)
    runner.turn()
    assert scheduler.running_keys == [0, 4]
    runner.turn()
    runner.turn()
    assert 5 in scheduler.running_keys, "the beginning that it shares with others was read"
    while not scheduler.idle:
        runner.turn()
    assert sum(runner.passes) == len(prompt) + 3 * 3 + 2 + len(other) - grid
    want = {key: expected(prompt, 5) for key in range(4)} | {4: expected([2, 2], 5), 5: expected(other, 5)}
    assert runner.results == want


def test_who_waits_for_a_beginning_goes_on_when_its_reader_leaves() -> None:
    prompt = [0] * (5 * GRID_PAGES * PAGE)
    scheduler = Scheduler(pages=200, page_size=PAGE, max_rows=16, chunk=PAGE, max_snapshots=99)
    runner = FakeRunner(scheduler, dict.fromkeys(range(4), 2))
    for key in range(4):
        scheduler.add(key, prompt, 2)
    for leave in (scheduler.finish, scheduler.pause, scheduler.finish):
        runner.turn()
        leave(scheduler.running_keys[0])
    runner.turn()
    assert scheduler.running_keys == [3]


def test_many_short_prompts_do_not_starve_a_long_one() -> None:
    scheduler = Scheduler(pages=200, page_size=PAGE, max_rows=4, chunk=8, max_snapshots=0)
    runner = FakeRunner(scheduler, {0: 1, **{key: 1 for key in range(1, 400)}})
    scheduler.add(0, [0] * 160, 1)
    for turn in range(1, 45):
        scheduler.add(turn, [1] * 8, 1)  # as much as one pass can read
        runner.turn()
    assert 0 in runner.results  # 20 passes of its own among 41


def test_a_stream_takes_a_step_with_every_pass() -> None:
    scheduler = Scheduler(pages=200, page_size=PAGE, max_rows=4, chunk=8, max_snapshots=0)
    runner = FakeRunner(scheduler, {0: 30, 1: 1})
    scheduler.add(0, [0] * 4, 30)
    runner.turn()
    scheduler.add(1, [1] * 160, 1)
    for turn in range(1, 15):
        runner.turn()
        assert len(runner.results[0]) == 1 + turn


def test_the_youngest_gives_way_and_nothing_is_wrong() -> None:
    scheduler = Scheduler(pages=12, page_size=PAGE, max_rows=4, chunk=8, max_snapshots=4)
    requests = {key: ([key % 3] * 6, 30) for key in range(4)}
    runner = drive(scheduler, requests)
    assert scheduler.preemptions > 0
    assert all(runner.results[key] == expected(*request) for key, request in requests.items())


def test_a_prompt_that_was_read_is_not_read_again() -> None:
    scheduler = Scheduler(pages=100, page_size=PAGE, max_rows=4, chunk=32, max_snapshots=100)
    prompt = [i % 3 for i in range(50)]
    drive(scheduler, {0: (prompt, 3)})
    scheduler.add(1, prompt, 3)
    plan = scheduler.plan()
    assert plan.start[0].length == 48 and plan.reads[0].tokens == tuple(prompt[48:])
    runner_pages = plan.start[0].pages[:12]
    assert all(scheduler.pages.users(page) == 2 for page in runner_pages)
    scheduler.add(2, prompt[:-1], 3)  # and a hit is never the whole prompt: something must be read to go on
    assert scheduler.plan().start[0].length == 48


def test_every_page_of_a_prefix_is_a_place_to_start_from() -> None:
    scheduler = Scheduler(pages=100, page_size=PAGE, max_rows=4, chunk=32, max_snapshots=100)
    prompt = [i % 3 for i in range(50)]
    drive(scheduler, {0: (prompt, 1)})
    for length in range(1, 50):
        found = scheduler.prefix.match([*prompt[:length], 9, 9, 9, 9], ALONE)
        assert found.length == length // PAGE * PAGE


def test_with_few_snapshots_the_grid_and_the_ends_remain() -> None:
    scheduler = Scheduler(pages=200, page_size=PAGE, max_rows=4, chunk=32, max_snapshots=8)
    prompt = [i % 3 for i in range(98)]
    drive(scheduler, {0: (prompt, 1)})
    assert scheduler.prefix.match(prompt, ALONE).length == 96  # the end
    for length in range(20, 98):
        found = scheduler.prefix.match([*prompt[:length], 9], ALONE)
        assert length - found.length < PAGE + 4 * PAGE


def test_prefixes_with_another_salt_or_adapter_are_not_seen() -> None:
    scheduler = Scheduler(pages=100, page_size=PAGE, max_rows=4, chunk=32, max_snapshots=100)
    runner = FakeRunner(scheduler, {0: 1})
    scheduler.add(0, [1] * 20, 1, salt="a", adapter="x")
    while not scheduler.idle:
        runner.turn()
    assert scheduler.prefix.match([1] * 20, ("x", "a")).length == 16
    for other in (("x", "b"), ("", "a"), ("a", "x"), ("xa", ""), ("", "")):
        assert scheduler.prefix.match([1] * 20, other).length == 0


def test_a_second_turn_goes_on_from_the_end_of_the_first() -> None:
    scheduler = Scheduler(pages=100, page_size=PAGE, max_rows=4, chunk=32, max_snapshots=10)
    runner = drive(scheduler, {0: ([1, 2, 0], 10)})
    history = [1, 2, 0, *runner.results[0]]
    assert scheduler.prefix.match([*history, 1], ALONE).length == 12  # 13 tokens, of which the last was never read


def test_what_can_never_fit_is_refused() -> None:
    scheduler = Scheduler(pages=4, page_size=PAGE, max_rows=4, chunk=32, max_snapshots=0)
    scheduler.add(0, [0] * 10, 6)
    with pytest.raises(CapacityError, match="do not fit"):
        scheduler.add(1, [0] * 10, 7)
    assert 1 not in scheduler.jobs


def test_more_pages_than_there_are_cannot_be_taken_or_given_back_twice() -> None:
    pages = Pages(2)
    taken = pages.take(2)
    with pytest.raises(AssertionError):
        pages.take(1)
    pages.share(taken[:1])
    pages.release(taken)
    assert pages.free == 1
    with pytest.raises(AssertionError):
        pages.release(taken[1:])


def test_the_least_recently_used_prefix_goes_first() -> None:
    pages = Pages(10)
    cache = PrefixCache(pages, page_size=2, max_snapshots=10)
    for first in (1, 2, 3):
        own = pages.take(2)
        numbers = cache.take_snapshot_numbers([Rank.END])
        assert numbers[0] is not None
        cache.insert([first] * 4, own, {4: (numbers[0], Rank.END)})
        pages.release(own)
    cache.match([1] * 5)
    cache.free_pages(6)
    assert [cache.match([first] * 5).length for first in (1, 2, 3)] == [4, 0, 4]
    assert len(cache.forget()) == 1


def test_shuffled_load_ends() -> None:
    """A long run with arrivals at random, as a service sees it."""
    rng = random.Random(0)
    scheduler = Scheduler(pages=64, page_size=PAGE, max_rows=6, chunk=16, max_snapshots=12)
    texts = [[rng.randrange(3) for _ in range(rng.randrange(1, 80))] for _ in range(20)]
    limits: dict[int, int] = {}
    runner = FakeRunner(scheduler, limits)
    prompts: dict[int, list[int]] = {}
    for turn in range(3000):
        if turn < 1200 and rng.random() < 0.3:
            key = len(limits)
            prompts[key] = [*rng.choice(texts)[: rng.randrange(1, 81)], rng.randrange(3)]
            limits[key] = rng.randrange(1, 24)
            scheduler.add(key, prompts[key], limits[key])
        if not scheduler.idle:
            runner.turn()
    assert scheduler.idle
    assert all(runner.results[key] == expected(prompts[key], limits[key]) for key in limits)
