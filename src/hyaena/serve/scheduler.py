"""Decides what the engine does next: which prompts are read, which rows decode, whose pages go. Holds no tensors.

Requests are served first come, first served. A request waits until there is a row and pages for its prompt; it is read
in passes of at most ``chunk`` tokens, and every pass is followed by a decoding step of all rows, so no stream stands
still longer than one pass. Passes alternate between the oldest prompt and the one with the fewest tokens left: a short
prompt need not wait for a long one, and the long one is never starved.

Pages are taken as sequences grow. When none is free, the prefix cache gives up pages; when it has none left, the
youngest request is pre-empted: its pages are freed and it waits again, to be read anew from what the prefix cache
still has, prompt and completion alike. A request whose client does not read what was written gives way in the same
way, and waits again when it is resumed. A prompt whose beginning another one is just reading waits for that.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from types import MappingProxyType

from hyaena.errors import CapacityError
from hyaena.serve.pages import Pages
from hyaena.serve.prefix_cache import GRID_PAGES, PrefixCache, Rank, shared_tokens

Key = int

STEPS_AHEAD = 2
"""Tokens behind those that are known for which a decoding row has pages: the decoder runs one step ahead."""

GROWTH_PAGES = 4
"""Pages that are left free for every active request when another is admitted, so that it is not soon pre-empted."""

ROWS_TOGETHER = 8
"""Under load, an eighth of the rows starts together."""

TURNS_APART = 64
"""Turns for which free rows wait for others to start with; streams may be long, and none of them need end soon."""


class Phase(Enum):
    """Where a sequence stands."""

    WAITING = auto()
    READING = auto()
    DECODING = auto()
    PAUSED = auto()


@dataclass(eq=False)
class Job:
    """A request as the scheduler sees it: a sequence of tokens that grows.

    Attributes:
        key: of the request.
        arrival: its place in the order of arrival.
        tokens: prompt and completion.
        most: the most tokens that it may come to have.
        adapter: the name of the adapter that it is computed with; "" for the model alone.
        salt: isolates its prefixes from those of requests with other salts.
        prompt_length: tokens of the prompt among them.
        phase: where it stands.
        read: tokens whose keys, values and states are stored.
        pages: that hold them, and room for what comes.
        cached: tokens that the prefix cache spared it when it was first admitted.
        turn: the last snapshot that was taken while it decoded: number of tokens before it, and its number.
        behind: a request that reads its beginning, and how many tokens of it; None where it need not wait for one.
    """

    key: Key
    arrival: int
    tokens: list[int]
    most: int
    adapter: str
    salt: str
    prompt_length: int
    phase: Phase = Phase.WAITING
    read: int = 0
    pages: list[int] = field(default_factory=list)
    cached: int | None = None
    turn: tuple[int, int] | None = None
    behind: tuple[Job, int] | None = None

    @property
    def tree(self) -> tuple[str, str]:
        """The tree of the prefix cache that it uses: an adapter has keys, values and states of its own."""
        return self.adapter, self.salt

    @property
    def left(self) -> int:
        """Tokens to be read before the next one can be chosen."""
        return len(self.tokens) - self.read


@dataclass(frozen=True)
class Start:
    """A row to be set up: its first pages, how many tokens they hold, and the snapshot of the states behind them."""

    key: Key
    adapter: str
    pages: tuple[int, ...]
    length: int
    snapshot: int | None


@dataclass(frozen=True)
class Read:
    """Tokens of a sequence to be read in a pass.

    Attributes:
        key: of the job.
        tokens: that are read.
        start: tokens of the sequence before them.
        replay: tokens to be read after them, each in a step of its own.
        last: whether the next token is to be chosen afterwards, and the row to be decoded.
        snapshots: number of tokens -> number of the snapshot to take there.
    """

    key: Key
    tokens: tuple[int, ...]
    start: int
    replay: tuple[int, ...]
    last: bool
    snapshots: dict[int, int]

    @property
    def stop(self) -> int:
        """Tokens that are stored afterwards."""
        return self.start + len(self.tokens) + len(self.replay)


@dataclass
class Plan:
    """What the runner does in one turn, in this order.

    Attributes:
        copy: rows of which a snapshot is to be taken now, and its number.
        drop: rows to be dropped: pre-empted, finished or cancelled.
        start: rows to be set up.
        forget: snapshots that are no longer needed.
        reads: of one pass per adapter; where there are several, all are the last of their rows.
        grow: pages to be appended to decoding rows.
        decode: adapters whose decoding rows take a step; "" is the model alone.
    """

    copy: dict[Key, int] = field(default_factory=dict)
    drop: list[Key] = field(default_factory=list)
    start: list[Start] = field(default_factory=list)
    forget: list[int] = field(default_factory=list)
    reads: list[Read] = field(default_factory=list)
    grow: dict[Key, list[int]] = field(default_factory=dict)
    decode: list[str] = field(default_factory=list)

    @property
    def steps_only(self) -> bool:
        """Whether rows only take a step, as in almost all turns."""
        return not (self.copy or self.drop or self.start or self.forget or self.reads or self.grow)


class Scheduler:
    """See the module.

    Args:
        pages: pages of keys and values.
        page_size: tokens per page.
        max_rows: rows that are read or decoded at a time.
        chunk: the most tokens of a pass; a multiple of the page.
        max_snapshots: the budget of the prefix cache; 0 turns it off.
        fixed_passes: read every prompt alone, in passes that end at multiples of ``chunk``, take snapshots there only,
            and step through completions that are read again: a sequence is then always read in the same passes.
        packed: whether prompts share passes.
    """

    def __init__(
        self,
        *,
        pages: int,
        page_size: int,
        max_rows: int,
        chunk: int,
        max_snapshots: int,
        fixed_passes: bool = False,
        packed: bool = True,
    ) -> None:
        assert chunk % page_size == 0, "a pass must be able to end at a page"
        self.pages = Pages(pages)
        self.prefix = PrefixCache(self.pages, page_size=page_size, max_snapshots=max_snapshots)
        self.page_size = page_size
        self.max_rows = max_rows
        self.chunk = chunk
        self.fixed_passes = fixed_passes
        self.packed = packed
        self.jobs: dict[Key, Job] = {}
        self._waiting: deque[Job] = deque()  # in order of arrival
        self._active: list[Job] = []  # reading or decoding, in order of arrival
        self._drop: list[Key] = []
        self._copy: dict[Key, int] = {}
        self._arrivals = 0
        self._turn = 0
        self._apart = 0  # turns for which free rows have waited
        self.preemptions = 0

    # --- requests ------------------------------------------------------------------------------------------------

    def check(self, prompt_length: int, max_new_tokens: int) -> None:
        """Raise CapacityError where a request would not fit even alone."""
        if self._pages_for(prompt_length + max_new_tokens) > self.pages.count:
            most = self.pages.count * self.page_size
            raise CapacityError(
                f"{prompt_length} tokens of prompt and {max_new_tokens} new ones do not fit into the memory for keys "
                f"and values, {most} tokens: shorten the prompt, or ask for fewer new tokens"
            )

    def add(self, key: Key, prompt: Sequence[int], max_new_tokens: int, salt: str = "", adapter: str = "") -> None:
        """Queue a request.

        Raises:
            CapacityError: it would not fit even alone.
        """
        self.check(len(prompt), max_new_tokens)
        most = len(prompt) + max_new_tokens
        job = Job(key, self._arrivals, list(prompt), most, adapter, salt, prompt_length=len(prompt))
        self._arrivals += 1
        self.jobs[key] = job
        self._waiting.append(job)

    def append(self, key: Key, token: int) -> Job:
        """Add a token that was chosen for a row; the job that has it."""
        job = self.jobs[key]
        job.tokens.append(token)
        if job.phase is Phase.DECODING:
            job.read = len(job.tokens) - 1
        return job

    def finish(self, key: Key, page_end: int | None = None) -> None:
        """A request has ended or was cancelled: its row goes; the prefix cache keeps the pages that it can use.

        Args:
            key: of the request.
            page_end: where the states of its row are those at the end of a page, their number of tokens.
        """
        job = self.jobs.pop(key)
        if page_end is not None:
            self._take_copy(job, page_end)
        self._leave(job)

    def pause(self, key: Key, page_end: int | None = None) -> None:
        """Take the row and the pages of a request until it is resumed; ``page_end`` as for ``finish``."""
        job = self.jobs[key]
        if job.phase is Phase.PAUSED:
            return
        if page_end is not None:
            self._take_copy(job, page_end)
        self._leave(job)
        job.phase, job.read, job.pages = Phase.PAUSED, 0, []

    def resume(self, key: Key) -> None:
        """Have a paused request wait for a row, in its place by arrival."""
        job = self.jobs[key]
        if job.phase is Phase.PAUSED:
            self._wait_again(job)

    @property
    def waiting(self) -> int:
        """Requests without a row: those that wait for one, and those that are paused."""
        return len(self.jobs) - len(self._active)

    @property
    def running(self) -> int:
        return len(self._active)

    @property
    def running_keys(self) -> list[Key]:
        """Requests that are read or decoded, in order of arrival."""
        return [job.key for job in self._active]

    @property
    def idle(self) -> bool:
        """Whether a turn would do nothing."""
        return not (self._waiting or self._active or self._drop)

    # --- one turn ------------------------------------------------------------------------------------------------

    def plan(self, at_page_ends: Mapping[Key, int] = MappingProxyType({}), *, read: bool = True) -> Plan:
        """What to do next. The caller carries it out, then calls ``done``, and ``append`` and ``finish`` for what came.

        Args:
            at_page_ends: decoding rows whose states are those at the end of a page, and their number of tokens.
            read: whether prompts are read in this turn.
        """
        for key, length in at_page_ends.items():
            if key in self.jobs:
                self._take_copy(self.jobs[key], length)
        plan = Plan()
        self._grow(plan)
        self._admit(plan)
        if read:
            self._choose_reads(plan)
        plan.decode = list(dict.fromkeys(job.adapter for job in self._active if job.phase is Phase.DECODING))
        plan.copy, self._copy = self._copy, {}
        plan.drop, self._drop = self._drop, []
        plan.forget = self.prefix.forget()
        self._turn += read
        return plan

    def done(self, plan: Plan) -> None:
        """The reads of a plan were carried out: their pages and snapshots can be used by others from now on."""
        for read in plan.reads:
            job = self.jobs.get(read.key)
            if job is None:
                self.prefix.drop_numbers(list(read.snapshots.values()))
                continue
            job.read = read.stop
            self._insert(job, {length: (number, self._rank(job, length)) for length, number in read.snapshots.items()})
            if read.last:
                job.phase = Phase.DECODING

    def _take_copy(self, job: Job, length: int) -> None:
        """Keep the newest states of a completion: a next turn of the conversation goes on from there."""
        if self.fixed_passes:  # steps round otherwise than the passes that a prompt is read in
            return
        if job.phase is not Phase.DECODING or length > len(job.tokens):
            return
        (number,) = self.prefix.take_snapshot_numbers([Rank.END])
        if number is not None:
            self._drop_turn(job)
            job.turn = (length, number)
            self._copy[job.key] = number

    def _drop_turn(self, job: Job) -> None:
        if job.turn is not None:
            self.prefix.drop_numbers([job.turn[1]])
            job.turn = None

    def _grow(self, plan: Plan) -> None:
        """Pages for the next tokens of decoding rows, oldest first; where there are none the youngest rows give way."""
        for job in list(self._active):
            if len(job.tokens) + STEPS_AHEAD <= len(job.pages) * self.page_size or job.phase is not Phase.DECODING:
                continue  # as almost always
            need = self._pages_for(min(len(job.tokens) + STEPS_AHEAD, job.most)) - len(job.pages)
            if need > 0 and self._obtain(need, job):
                new = self.pages.take(need)
                job.pages += new
                plan.grow[job.key] = new

    def _obtain(self, count: int, job: Job) -> bool:
        """Make pages free, at the cost of younger requests; False where the sequence itself had to give way."""
        while self.prefix.free_pages(count) < count:
            victim = self._active[-1]
            self._preempt(victim)
            if victim is job:
                return False
        return job.phase is not Phase.WAITING

    def _preempt(self, job: Job) -> None:
        self.preemptions += 1
        self._leave(job)
        self._wait_again(job)

    def _wait_again(self, job: Job) -> None:
        job.phase, job.read, job.pages = Phase.WAITING, 0, []
        waiting = list(self._waiting)
        insort(waiting, job, key=lambda other: other.arrival)
        self._waiting = deque(waiting)

    def _leave(self, job: Job) -> None:
        """Take a sequence out of its queue, with its row and its pages."""
        if job.phase is Phase.WAITING:
            self._waiting.remove(job)
        if job.phase in (Phase.WAITING, Phase.PAUSED):
            return
        if job.turn is not None:
            length, number = job.turn
            job.turn = None
            self._insert(job, {length: (number, Rank.END)})
        self._active.remove(job)
        self._drop.append(job.key)
        self.pages.release(job.pages)

    def _admit(self, plan: Plan) -> None:
        """Start waiting requests, in order, as far as there are rows and pages for all they have to read.

        Where all rows are busy and requests queue, several rows are let free before new ones start, which then share a
        pass: a pass of a few tokens costs hardly less than one of thousands, and every row waits for it.
        """
        together = min(len(self._waiting), max(1, self.max_rows // ROWS_TOGETHER))
        free = self.max_rows - len(self._active)
        if self._active and free < together and self._apart < TURNS_APART:
            self._apart += free > 0
            return
        self._apart = 0
        for job in list(self._waiting):
            if len(self._active) == self.max_rows or job.key in self._drop:  # its old row must go first
                return
            if self._waits_behind(job):
                continue
            match = self.prefix.match(job.tokens, job.tree)
            job.behind = self._ahead(job, match.length)
            if job.behind is not None:
                continue
            self.pages.share(match.pages)
            need = self._pages_for(min(len(job.tokens) + STEPS_AHEAD, job.most)) - len(match.pages)
            reserve = sum(min(GROWTH_PAGES, self._pages_for(other.most) - len(other.pages)) for other in self._active)
            if self.prefix.free_pages(need + reserve) < need + reserve:
                self.pages.release(match.pages)
                return
            self._waiting.remove(job)
            job.pages = [*match.pages, *self.pages.take(need)]
            job.read = match.length
            job.phase = Phase.READING
            if job.cached is None:
                job.cached = match.length
            insort(self._active, job, key=lambda other: other.arrival)
            plan.start.append(Start(job.key, job.adapter, tuple(job.pages), match.length, match.snapshot))

    def _ahead(self, job: Job, cached: int) -> tuple[Job, int] | None:
        """A request that is just reading so much of a waiting one's beginning that it pays to wait: see ``behind``."""
        grid = GRID_PAGES * self.page_size
        if not self.prefix.max_snapshots or len(job.tokens) - cached <= grid:
            return None
        step = self.chunk if self.fixed_passes else self.page_size
        for other in self._active:
            if other.phase is Phase.READING and other.tree == job.tree:
                shared = min(
                    shared_tokens(job.tokens, other.tokens, grid), len(job.tokens) - 1, other.prompt_length - 1
                )
                place = shared // step * step
                if place < other.prompt_length - step:  # not its end, where a snapshot is taken in any case
                    place = place // grid * grid
                if place - cached >= grid and other.read < place:
                    return other, place
        return None

    def _waits_behind(self, job: Job) -> bool:
        """Whether the request before it in ``behind`` has not come as far yet."""
        if job.behind is None:
            return False
        other, place = job.behind
        return other.phase is Phase.READING and other.read < place and other.key in self.jobs

    def _choose_reads(self, plan: Plan) -> None:
        reading = [job for job in self._active if job.phase is Phase.READING]
        if not reading:
            return
        by_left = sorted(reading, key=lambda job: job.left)
        first = reading[0] if self._turn % 2 == 0 else by_left[0]
        plan.reads.append(self._read(first, self.chunk))
        if self.fixed_passes or not self.packed:
            return
        room = self.chunk - first.left
        for other in by_left:  # whole prompts share a pass
            if other is first:
                continue
            if other.left > room:
                break
            room -= other.left
            plan.reads.append(self._read(other, self.chunk))

    def _read(self, job: Job, most: int) -> Read:
        start, end = job.read, len(job.tokens)
        if not self.fixed_passes:
            stop = min(end, start + most)
            return self._make_read(job, start, stop, stop)
        stop = min(job.prompt_length, (start // self.chunk + 1) * self.chunk)
        return self._make_read(job, start, stop, end if stop == job.prompt_length else stop)

    def _make_read(self, job: Job, start: int, middle: int, stop: int) -> Read:
        return Read(
            job.key,
            tokens=tuple(job.tokens[start:middle]),
            start=start,
            replay=tuple(job.tokens[middle:stop]),
            last=stop == len(job.tokens),
            snapshots=self._snapshots(job, start, middle),
        )

    def _snapshots(self, job: Job, start: int, stop: int) -> dict[int, int]:
        """Where to take snapshots in a pass: at its pages, those of a higher rank first where numbers are short."""
        if self.fixed_passes:
            places = [stop] if stop % self.chunk == 0 else []
        else:
            first = (start // self.page_size + 1) * self.page_size
            places = list(range(first, stop + 1, self.page_size))
        places.sort(key=lambda length: self._rank(job, length), reverse=True)
        numbers = self.prefix.take_snapshot_numbers([self._rank(job, length) for length in places])
        taken = {length: number for length, number in zip(places, numbers, strict=True) if number is not None}
        return dict(sorted(taken.items()))

    def _rank(self, job: Job, length: int) -> Rank:
        if length == (job.prompt_length - 1) // self.page_size * self.page_size:
            return Rank.END
        return Rank.GRID if length % (GRID_PAGES * self.page_size) == 0 else Rank.BETWEEN

    def _insert(self, job: Job, snapshots: dict[int, tuple[int, Rank]]) -> None:
        if snapshots:
            self.prefix.insert(job.tokens, job.pages, snapshots, job.tree)

    def _pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)
