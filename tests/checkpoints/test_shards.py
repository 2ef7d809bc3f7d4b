"""Safetensors files: the header is bounded and checked before anything is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from hyaena.checkpoints.shards import open_shard
from hyaena.errors import CheckpointError
from hyaena.ops import HyenaState, PagePool
from hyaena.tensor_files import memory

Header = dict[str, dict[str, Any]]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.arange(4.0), "b": torch.ones(2, 3, dtype=torch.bfloat16)}, path, metadata={"format": "pt"})
    return path


def rewrite(path: Path, change: Callable[[Header], object], data: Callable[[bytes], bytes] = lambda d: d) -> None:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    changed = change(header)
    text = (changed if isinstance(changed, str) else json.dumps(header)).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data(content[8 + length :]))


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as error, open_shard(path):
        pass
    assert str(error.value).isprintable() and len(str(error.value)) < 1920
    return str(error.value)


def test_tensors_are_read_as_they_are_stored(path: Path) -> None:
    with open_shard(path) as shard:
        assert torch.equal(shard.read("a"), torch.arange(4.0))
        assert torch.equal(shard.read("b"), torch.ones(2, 3, dtype=torch.bfloat16))
    rewrite(path, lambda header: header["b"].update(dtype="F4"))
    with open_shard(path) as shard:
        assert shard.tensors["b"].dtype == "F4"


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h["a"].update(data_offsets=h["b"]["data_offsets"], dtype="BF16", shape=[6]),  # overlap
        lambda h: h["a"].update(shape=[5]),
        lambda h: h["a"].update(shape=[-4]),
        lambda h: h["a"].update(shape=[2**62, 2**62]),
        lambda h: h["a"].update(shape="4"),
        lambda h: h["a"].update(data_offsets=[0]),
        lambda h: h["a"].update(data_offsets=[0.0, 16.0]),
        lambda h: h["a"].update(dtype=5),
        lambda h: h.pop("a") and None,  # a gap
        lambda h: h.update(a=None),
        lambda h: json.dumps(h)[:-1] + ', "a": ' + json.dumps(h["a"]) + "}",  # a name twice
        lambda h: '{"a":' * 100_000,
        lambda h: "[]",
        lambda h: "9" * 5_000,
    ],
)
def test_headers_that_contradict_themselves_are_told(path: Path, change: Callable[[Header], object]) -> None:
    rewrite(path, change)
    assert "truncated or corrupt" in refusal(path)


def test_bytes_too_few_or_too_many_are_told(path: Path) -> None:
    content = path.read_bytes()
    for changed in (content[:-1], content + b"x", content[:8], b"", (2**64 - 1).to_bytes(8, "little") + content[8:]):
        path.write_bytes(changed)
        assert "truncated or corrupt" in refusal(path)
    path.write_bytes((10**8).to_bytes(8, "little") + b"{}")
    with path.open("r+b") as file:
        file.truncate(1 << 30)  # sparse: only its size is read
    assert "its header has 100 MB" in refusal(path)


def test_a_file_that_shrinks_while_it_is_read_is_told(path: Path) -> None:
    save_file({"a": torch.zeros(100_000)}, path)
    with open_shard(path) as shard:
        path.write_bytes(path.read_bytes()[:-8])
        with pytest.raises(CheckpointError, match="shorter than its table of contents says"):
            [shard.read(key) for key in shard.tensors]


THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def asks_for_large_pages(tensor: Tensor) -> bool:
    """Whether a tensor lies on memory for which large pages are asked; whether some are free is the system's affair."""
    address, here = tensor.data_ptr(), False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *others = line.split()
        if first == "VmFlags:" and here:
            return "hg" in others
        if not first.endswith(":"):
            start, end = (int(number, 16) for number in first.split("-"))
            here = start <= address < end
    return False


@pytest.mark.skipif(not THP.exists(), reason="this system has no large pages")
def test_many_numbers_lie_on_large_pages_and_waste_nothing(path: Path) -> None:
    numbers = torch.randn(2 * memory.PAGE // 4 + 3)
    save_file({"a": numbers}, path)
    with open_shard(path) as shard:
        read = shard.read("a")
    assert torch.equal(read, numbers) and read.untyped_storage().nbytes() == numbers.nbytes
    assert asks_for_large_pages(read)
    assert memory.settled(read) is read
    assert torch.equal(memory.settled(numbers), numbers) and memory.settled(numbers) is not numbers
    assert memory.settled(numbers[:100]).data_ptr() == numbers.data_ptr()


@pytest.mark.skipif(not THP.exists(), reason="this system has no large pages")
def test_small_tensors_lie_side_by_side_on_large_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "BLOCK", memory.PAGE)
    shelf, numbers = (
        memory.Shelf(),
        [torch.randn(150_000), torch.randn(7, 3).bfloat16(), torch.tensor(3), torch.ones(0)],
    )
    placed = [shelf.settled(t) for t in numbers]
    assert all(torch.equal(*pair) for pair in zip(placed, numbers, strict=True))
    assert [t.untyped_storage().nbytes() for t in placed] == [t.nbytes for t in numbers]
    assert placed[1].data_ptr() - placed[0].data_ptr() == 600_000 and placed[2].data_ptr() % 64 == 0
    assert all(asks_for_large_pages(t) for t in placed[:3])
    more = [shelf.settled(numbers[0]) for _ in range(3)]  # the last one does not fit behind the others
    assert asks_for_large_pages(more[2]) and torch.equal(more[2], numbers[0])
    large = torch.zeros(memory.PAGE, dtype=torch.uint8)
    assert shelf.settled(large).data_ptr() % memory.PAGE == 0
    turned = torch.randn(5, 4).T
    assert shelf.settled(turned) is turned


@pytest.mark.skipif(not THP.exists(), reason="this system has no large pages")
def test_pages_and_states_of_a_decoder_lie_on_large_pages() -> None:
    shape = (memory.PAGE,)
    zeros = memory.zeros(shape, torch.float32)
    assert asks_for_large_pages(zeros) and zeros.shape == shape and not zeros.any()
    pool = PagePool(200, [(2, 32)], torch.float32, "cpu")
    assert all(asks_for_large_pages(storage) and not storage.any() for storage in pool.layers[0])
    state = HyenaState(torch.randn(3, 6, 2), torch.randn(3, 2, 4))
    settled = state.settled(memory.Shelf())
    assert all(asks_for_large_pages(t) for t in settled)
    assert all(torch.equal(*pair) for pair in zip(settled, state, strict=True))
