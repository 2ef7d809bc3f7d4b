"""Files of ``torch.save``: what is in them is read, checked against the archive's checksums, and never run."""

from __future__ import annotations

import collections
import io
import pickle
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hyaena.checkpoints.shards import open_shard
from hyaena.errors import CheckpointError

TENSORS = {
    "a": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "transposed": torch.arange(12, dtype=torch.bfloat16).reshape(3, 4).t(),
    "part": torch.arange(100, dtype=torch.float64)[10:20:3],
    "expanded": torch.ones(1, 3).expand(5, 3),
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 3),
    "parameter": torch.nn.Parameter(torch.ones(2, dtype=torch.float16)),
}


def read(path: Path) -> dict[str, torch.Tensor]:
    with open_shard(path) as shard:
        return {key: shard.read(key) for key in shard.tensors}


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        read(path)
    assert str(error.value).isprintable() and str(error.value).startswith(str(path))
    return str(error.value)


@pytest.mark.parametrize("new", [True, False])
def test_every_kind_of_view_is_read_contiguous_and_alone(tmp_path: Path, new: bool) -> None:
    torch.save(collections.OrderedDict(TENSORS), tmp_path / "x.pt", _use_new_zipfile_serialization=new)
    found = read(tmp_path / "x.pt")
    assert found.keys() == TENSORS.keys()
    for name, tensor in found.items():
        assert tensor.dtype == TENSORS[name].dtype and torch.equal(tensor, TENSORS[name].detach()), name
        assert tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.uint16])
def test_dtypes_are_known_without_reading(tmp_path: Path, new: bool, dtype: torch.dtype) -> None:
    torch.save({"a": torch.ones(3).to(dtype)}, tmp_path / "x.pt", _use_new_zipfile_serialization=new)
    with open_shard(tmp_path / "x.pt") as shard:
        assert shard.tensors["a"].dtype == dtype and shard.tensors["a"].shape == (3,)


@pytest.mark.parametrize("wrap", [["state_dict"], ["model"], ["module", "model"], ["model_state_dict", "state_dict"]])
def test_wrappers_are_taken_off(tmp_path: Path, wrap: list[str]) -> None:
    state: dict[str, Any] = {"a": TENSORS["a"]}
    for name in wrap:
        state = {name: state, "epoch": 3, "optimizer": {"state": {0: torch.ones(1)}, "lr": 0.1, "betas": (0.9, None)}}
    torch.save(state, tmp_path / "x.pt")
    assert read(tmp_path / "x.pt").keys() == {"a"}


def test_a_flipped_bit_in_the_numbers_or_the_names_never_loads(tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "x.pt")
    content = (tmp_path / "x.pt").read_bytes()
    expected = read(tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt") as archive:
        places = [(info.header_offset, info.file_size, info.filename) for info in archive.infolist()]
    rng = random.Random(0)
    for offset, size, name in places:
        if not name.endswith("data.pkl") and "/data/" not in name:
            continue
        start = offset + 30 + sum(int.from_bytes(content[offset + i : offset + i + 2], "little") for i in (26, 28))
        for at in sorted({rng.randrange(size) for _ in range(8)} if size else ()):
            flipped = bytearray(content)
            flipped[start + at] ^= 1 << rng.randrange(8)
            (tmp_path / "x.pt").write_bytes(flipped)
            if name.endswith("serialization_id"):
                continue
            with pytest.raises(CheckpointError, match=r"truncated or corrupt|wants to run code|larger than"):
                read(tmp_path / "x.pt")
    for at in rng.sample(range(len(content)), 100):  # anywhere: refused, or the same numbers
        flipped = bytearray(content)
        flipped[at] ^= 1 << rng.randrange(8)
        (tmp_path / "x.pt").write_bytes(flipped)
        try:
            found = read(tmp_path / "x.pt")
        except CheckpointError:
            continue
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_last_record_that_no_program_writes_is_refused(tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "x.pt")
    content = (tmp_path / "x.pt").read_bytes()
    # From the end: disks and counts of the record of 64 bits, what points to it, disks and counts of the short record.
    for at in (*range(98, 86, -1), *range(82, 58, -1), *range(42, 22, -1), *range(22, 10, -1), 2, 1):
        flipped = bytearray(content)
        flipped[-at] ^= 16
        (tmp_path / "x.pt").write_bytes(flipped)
        assert "truncated or corrupt" in refusal(tmp_path / "x.pt"), at


def test_an_entry_on_another_disk_is_refused_as_torch_does(tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "x.pt")
    content = bytearray((tmp_path / "x.pt").read_bytes())
    content[content.rindex(b"PK\x01\x02") + 34] = 8
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(RuntimeError, match="multidisk"):
        torch.load(tmp_path / "x.pt", weights_only=True)
    assert "on another disk" in refusal(tmp_path / "x.pt")


@pytest.mark.parametrize("new", [True, False])
def test_a_call_without_an_argument_that_torch_needs_is_refused(tmp_path: Path, new: bool) -> None:
    torch.save({"a": TENSORS["a"]}, tmp_path / "x.pt", _use_new_zipfile_serialization=new)

    def without_hooks(_: str, content: bytes) -> bytes:
        return content.replace(b"ccollections\nOrderedDict\nq\n)Rq\x0bt", b"t")

    if new:
        rewritten(tmp_path / "x.pt", without_hooks)
    else:
        content = (tmp_path / "x.pt").read_bytes()
        (tmp_path / "x.pt").write_bytes(without_hooks("", content))
    with pytest.raises(TypeError, match="backward_hooks"):
        torch.load(tmp_path / "x.pt", weights_only=True)
    assert "truncated or corrupt" in refusal(tmp_path / "x.pt")


class Calls:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize(
    "value",
    [
        Calls(eval, "1"),
        Calls(torch.Tensor, 10**12),
        collections.Counter("a"),
        torch.ones(2).to_sparse(),
        torch.ones(2, device="meta"),
        {(1, 2): 3},
        {None: 3},
    ],
    ids=lambda value: type(value).__name__,
)
def test_whatever_is_not_a_tensor_or_plain_is_refused(tmp_path: Path, new: bool, value: Any) -> None:
    torch.save({"a": TENSORS["a"], "z": value}, tmp_path / "x.pt", _use_new_zipfile_serialization=new)
    refusal(tmp_path / "x.pt")


@pytest.mark.parametrize("new", [True, False])
def test_extra_states_are_read_as_their_bytes(tmp_path: Path, new: bool) -> None:
    content = bytes(range(256)) * 40
    extra = {"a._extra_state": io.BytesIO(content), "b._extra_state": b"y", "c._extra_state": io.BytesIO()}
    other = {"_extra_state": bytearray(b"x"), "d._extra_state": None}  # of no use to anybody
    torch.save(TENSORS | extra | other, tmp_path / "x.pt", _use_new_zipfile_serialization=new)
    found = read(tmp_path / "x.pt")
    assert found.keys() == TENSORS.keys() | extra.keys()
    for name, want in (("a", content), ("b", b"y"), ("c", b"")):
        assert found[f"{name}._extra_state"].dtype == torch.uint8
        assert bytes(found[f"{name}._extra_state"].tolist()) == want


def test_many_extra_states_are_read_and_too_many_are_refused(tmp_path: Path) -> None:
    """The 40B has 350, of some kilobytes each; a pickle may not ask for any amount of memory by them."""
    extra = {f"blocks.{i}._extra_state": io.BytesIO(random.Random(i).randbytes(6000)) for i in range(350)}
    torch.save(extra, tmp_path / "x.pt")
    assert bytes(read(tmp_path / "x.pt")["blocks.7._extra_state"].tolist()) == extra["blocks.7._extra_state"].getvalue()
    torch.save({"a._extra_state": io.BytesIO(b"x" * 17_000_000)}, tmp_path / "x.pt")
    assert "larger than that of any model" in refusal(tmp_path / "x.pt")


def rewritten(path: Path, change: Callable[[str, bytes], bytes | None], method: int = zipfile.ZIP_STORED) -> None:
    """Write an archive again, each entry as ``change`` returns it (None: without it)."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in entries.items():
            changed = change(name, content)
            if changed is not None:
                archive.writestr(name, changed)


def shared_tuple(count: int) -> bytes:
    """A pickle of a tuple of tuples, ``2**count`` leaves large and a few bytes long."""
    pairs = b"".join(b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) for i in range(count))
    return b")q\x00" + pairs


@pytest.mark.parametrize(
    ("pickled", "words"),
    [
        (b"", "truncated or corrupt"),
        (b"\x80\x02}", "truncated or corrupt"),
        (b"\x80\x02}0}.", "truncated or corrupt"),  # an instruction that torch does not know either
        (b"\x80\x02" + b"(" * 50_000 + b".", "truncated or corrupt"),
        (b"\x80\x02" + b"]" * 50_000 + b"a" * 49_999 + b".", "holds a list"),
        (b"\x80\x02" + b"]" * 1_000_000 + b".", "larger than that of any model"),
        (b"\x80\x02\x8b\xff\xff\xff\x7f.", "larger than that of any model"),
        (b"\x80\x02X\xff\xff\xff\x7f.", "larger than that of any model"),
        (b"\x80\x02Nr\xff\xff\xff\xff.", "holds a NoneType"),  # a memo of four thousand million entries
        (b"\x80\x02}(" + shared_tuple(60) + b"K\x01u.", "as a name"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "wants to run code (os.system)"),
        (b"c\x1b[31mos\n\x1b[2Jsystem\n.", "wants to run code (\\x1b[31mos"),
        (b"(S'id'\nios\nsystem\n.", "truncated or corrupt"),
        (pickle.dumps({"step": 5, "name": "x"}, 2), "not tensors: "),
        (
            b"\x80\x02X\x00\x09\x3d\x00"
            + b"x" * 4_000_000
            + b"q\x00c_codecs\nencode\nq\x01]"
            + b"h\x01h\x00X\x06\x00\x00\x00latin1\x86Ra" * 1000
            + b".",
            "larger than that of any model",
        ),
        (b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00xX\x05\x00\x00\x00rot13\x86R.", "truncated or corrupt"),
    ],
)
def test_hostile_pickles_are_one_line(tmp_path: Path, pickled: bytes, words: str) -> None:
    torch.save(TENSORS, tmp_path / "x.pt")
    rewritten(tmp_path / "x.pt", lambda name, content: pickled if name.endswith("data.pkl") else content)
    assert words in refusal(tmp_path / "x.pt")


@pytest.mark.parametrize(
    ("change", "method", "words"),
    [
        (lambda name, content: content, zipfile.ZIP_DEFLATED, "compressed or encrypted"),
        (lambda name, content: None if name.endswith("data.pkl") else content, zipfile.ZIP_STORED, "without weights"),
        (lambda name, content: content[:2] if name.endswith("/data/0") else content, zipfile.ZIP_STORED, "beyond"),
        (lambda name, content: None if name.endswith("/data/0") else content, zipfile.ZIP_STORED, "are missing"),
        (lambda name, content: b"big" if name.endswith("byteorder") else content, zipfile.ZIP_STORED, "byteorder"),
        (lambda name, content: b"99" if name.endswith("/version") else content, zipfile.ZIP_STORED, "version"),
    ],
)
def test_archives_that_torch_does_not_write_are_refused(
    tmp_path: Path, change: Callable[[str, bytes], bytes | None], method: int, words: str
) -> None:
    torch.save(TENSORS, tmp_path / "x.pt")
    rewritten(tmp_path / "x.pt", change, method)
    assert words in refusal(tmp_path / "x.pt")


@pytest.mark.parametrize("number", [1, 300, -1])
def test_a_truncated_file_before_zip_is_told(tmp_path: Path, number: int) -> None:
    torch.save(TENSORS, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    content = (tmp_path / "x.pt").read_bytes()
    (tmp_path / "x.pt").write_bytes(content[:number])
    assert "truncated or corrupt" in refusal(tmp_path / "x.pt")
