"""Runs a job that makes a row of results of every record, and goes on after any interruption.

Until the output ``scores.parquet`` is complete, the folder ``scores.parquet.unfinished`` lies beside it: what the job
is (``job.json``), its finished rows (``rows``), a copy of the input where that is no file (``input``), and a seed that
was drawn (``seed``). The output is written from the rows when all are there, and then the folder is removed.

Records are worked through in windows, runs of neighbouring records of about equal size. The rows of a
window are kept together when all of them are finished. So the windows of a job that was interrupted are those of one
that was not, and so are the batches inside them, and the results are equal to the last bit.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from hashlib import blake2b
from pathlib import Path
from shutil import copyfileobj
from typing import IO, Any, Protocol, TypeVar

from hyaena.errors import InputError, OutputError, counted, joined, printable, shown
from hyaena.files import cure, flush, locked, reason, write_atomically
from hyaena.jobs.journal import Journal, Mark, Row
from hyaena.jobs.results import Column, check_columns, check_output, write_results

SUFFIX = ".unfinished"
WINDOW = 1 << 20
"""Characters of a window."""

_MANIFEST, _ROWS, _INPUT, _SEED = "job.json", "rows", "input", "seed"


class Record(Protocol):
    """What a job makes a row of; see ``hyaena.records``.

    Attributes:
        name: for messages.
        text: all that its row depends on beside the name and the job's options.
        place: where it stands, for messages.
    """

    @property
    def name(self) -> str: ...

    @property
    def text(self) -> str: ...

    @property
    def place(self) -> str: ...


R = TypeVar("R", bound=Record)

Compute = Callable[[Sequence[R]], Iterable[tuple[int, Row]]]
"""Makes the rows of a window: pairs of a record's position in the window and its row, in any order."""


class Job:
    """A job whose folder is locked; see :func:`open_job`.

    Attributes:
        output: the file that the job makes.
        folder: what holds its finished rows until then.
    """

    def __init__(self, output: Path, columns: Sequence[Column], options: Mapping[str, Any]) -> None:
        self.output, self.columns, self.options = output, columns, options
        self.folder = output.with_name(output.name + SUFFIX)

    @property
    def is_begun(self) -> bool:
        """Whether there are, or may be, finished rows."""
        return (self.folder / _MANIFEST).exists()

    def keep_input(self, stream: IO[bytes]) -> Path:
        """Copy an input that cannot be read twice into the folder; return the copy.

        Raises:
            OutputError: there is no room for it.
        """
        with self.writing(), open(self.folder / _INPUT, "wb") as copy:
            copyfileobj(stream, copy, 1 << 20)
        return self.folder / _INPUT

    def keep_seed(self, seed: int) -> int:
        """Keep a seed that was drawn; return it, or the one of the process whose job goes on.

        Raises:
            InputError: the kept one is damaged.
            OutputError: it cannot be written.
        """
        path = self.folder / _SEED
        if not self.is_begun:
            write_atomically(path, lambda file: file.write(str(seed).encode()))
        try:
            return int(path.read_bytes())
        except (OSError, ValueError):
            raise InputError(f"{path} is damaged: add --restart to begin again") from None

    def run(
        self,
        records: Iterable[R],
        start: Callable[[], Compute[R]],
        *,
        window: int = WINDOW,
        size: Callable[[R], int] = lambda record: len(record.text),
        skip: Callable[[R], object] = lambda record: None,
    ) -> int:
        """Make the rows that are not finished, then write the output; return the number of rows.

        Args:
            records: those of the input, from the first.
            start: is called once, before the first row is made, if any is to be made: it may load a model.
            window: the size of a window.
            size: that of a record; its characters by default.
            skip: is called with every record whose row is there already.

        Raises:
            InputError: the first records are not those of the finished rows.
            OutputError: rows or the output cannot be written. Finished windows are kept.
        """
        if not self.is_begun:
            manifest = json.dumps({"options": self.options}, indent=2).encode() + b"\n"
            write_atomically(self.folder / _MANIFEST, lambda file: file.write(manifest))
        with self.writing():
            journal = Journal(self.folder / _ROWS)
            flush(self.folder)
        try:
            self._work(journal, _windows(records, window, size), start, skip)
            try:
                write_results(self.output, self.columns, journal.read)
            except OutputError as error:
                raise OutputError(f"{error}{_kept(journal)}") from error
            count = journal.rows
        except BaseException:
            if not journal.rows:  # nothing to go on from: the next command may have other options
                with suppress(OutputError):
                    self.discard()
            raise
        finally:
            journal.close()
        self.discard()
        return count

    def discard(self) -> None:
        """Remove what the folder holds, the manifest first: what remains without it is nothing."""
        with self.writing():
            for name in (_MANIFEST, _ROWS, _INPUT, _SEED):
                (self.folder / name).unlink(missing_ok=True)

    def _work(
        self,
        journal: Journal,
        windows: Iterable[Sequence[R]],
        start: Callable[[], Compute[R]],
        skip: Callable[[R], object],
    ) -> None:
        compute: Compute[R] | None = None
        finished = iter(list(journal.marks))
        for batch in windows:
            digest = _digest(batch)
            if (mark := next(finished, None)) is not None:
                if mark != Mark(len(batch), digest):
                    first, last = batch[0], batch[-1]
                    raise self._other_input(
                        f"among the records {shown(first.name)} ({first.place}) to {shown(last.name)} ({last.place})"
                    )
                for record in batch:
                    skip(record)
                continue
            compute = compute or start()
            missing = set(range(len(batch)))
            for index, row in compute(batch):
                missing.remove(index)
                with self.writing(journal):
                    journal.append(index, row)
            assert not missing, f"no rows of the records {sorted(missing)} of a window"
            with self.writing(journal):
                journal.mark(digest)
        if next(finished, None) is not None:
            raise self._other_input("it has fewer records")

    def _other_input(self, where: str) -> InputError:
        return InputError(
            f"the input has changed since the rows in {printable(str(self.folder))} were made ({where}): "
            "give the same input, or add --restart to discard them"
        )

    @contextmanager
    def writing(self, journal: Journal | None = None) -> Iterator[None]:
        """Within it, a failing system call is an ``OutputError`` that says what is kept."""
        try:
            yield
        except OSError as error:
            kept = "" if journal is None else _kept(journal)
            raise OutputError(f"cannot write into {self.folder}: {reason(error)}; {cure(error)}{kept}") from error


@contextmanager
def open_job(
    output: Path, columns: Sequence[Column], options: Mapping[str, Any], *, restart: bool = False
) -> Iterator[Job]:
    """Lock the folder of a job, and check that its contents belong to this job.

    Args:
        output: the file to make; its suffix says its format.
        columns: of the results.
        options: all that the results depend on but the input, as text and numbers; keys are for messages.
        restart: discard finished rows, and replace the output if it is there.

    Raises:
        InputError: the output is there, its format has no place for a column, or the folder holds rows that other
            options gave.
        OutputError: another process runs this job, or the folder cannot be written.
    """
    check_output(output)
    check_columns(output, columns)
    if output.is_dir():
        raise InputError(f"the output {printable(str(output))} is a folder: name a file")
    job = Job(output, columns, options)
    try:
        with ExitStack() as stack:
            with job.writing():
                stack.enter_context(locked(job.folder))
            if restart or not job.is_begun:
                job.discard()
            if job.is_begun:
                _check_options(job)
            elif output.exists() and not restart:
                name = printable(str(output))
                raise InputError(f"the output {name} is there already: name another, or add --restart to replace it")
            try:
                yield job
            finally:
                if not job.is_begun:
                    job.discard()
    finally:
        with suppress(OSError):  # it stays as long as there is something in it
            job.folder.rmdir()


def _kept(journal: Journal) -> str:
    return f"; {counted(journal.rows, 'finished row')} kept: the same command goes on" if journal.rows else ""


def _check_options(job: Job) -> None:
    path = job.folder / _MANIFEST
    try:
        before = json.loads(path.read_bytes())["options"]
        names = [*job.options, *(name for name in before if name not in job.options)]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise InputError(f"{path} is damaged: add --restart to begin again") from None
    now = json.loads(json.dumps(job.options))
    changed = [
        f"{name} was {_value(before.get(name))}, and is {_value(now.get(name))} now"
        for name in names
        if before.get(name) != now.get(name)
    ]
    if changed and not _has_rows(job):  # its process was killed before it kept any
        job.discard()
    elif changed:
        raise InputError(
            f"{printable(str(job.folder))} holds rows that were made with other options ({joined(changed)}): "
            "give the same options, or add --restart to discard the rows"
        )


def _has_rows(job: Job) -> bool:
    with job.writing():
        journal = Journal(job.folder / _ROWS)
    journal.close()
    return journal.rows > 0


def _value(value: Any) -> str:
    return "not given" if value is None else value if isinstance(value, str) else shown(value)


def _windows(records: Iterable[R], limit: int, size: Callable[[R], int]) -> Iterator[list[R]]:
    window: list[R] = []
    total = 0
    for record in records:
        window.append(record)
        total += size(record)
        if total >= limit:
            yield window
            window, total = [], 0
    if window:
        yield window


def _digest(records: Sequence[Record]) -> str:
    digest = blake2b(digest_size=16)
    for record in records:
        for text in (record.name, record.text):
            data = text.encode()
            digest.update(len(data).to_bytes(8, "little"))
            digest.update(data)
    return digest.hexdigest()
