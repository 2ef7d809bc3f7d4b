"""FP8 scales in the extra states of Transformer Engine: read without running anything, refused in one line."""

from __future__ import annotations

import io
import pickle
import random
import zipfile
from typing import Any

import pytest
import torch

from hyaena.errors import CheckpointError
from hyaena.formats.evo2.extra_state import read_scales, write_scales


def saved(state: Any, *, new: bool = True) -> bytes:
    file = io.BytesIO()
    torch.save(state, file, _use_new_zipfile_serialization=new)
    return file.getvalue()


def theirs(**changes: Any) -> dict[str, Any]:
    """What Transformer Engine 1.13 writes for a linear layer, by its source."""
    return {
        "scale_fwd": torch.tensor([37.7, 9001.3, 1.0]),
        "scale_inv_fwd": 1 / torch.tensor([37.7, 9001.3, 1.0]),
        "amax_history_fwd": torch.rand(16, 3),
        "scale_bwd": torch.ones(2),
        "scale_inv_bwd": torch.ones(2),
        "amax_history_bwd": torch.zeros(16, 2),
        "extra_fp8_variables": {
            "fp8_checkpoint": True,
            "num_gemms": 1,
            "fp8_max_fwd": 448.0,
            "names": ("a", ["b"]),
            "update_amax_and_scale_fwd": False,
        },
    } | changes


@pytest.mark.parametrize("new", [True, False])
def test_the_scales_of_input_and_weight(new: bool) -> None:
    scales = torch.tensor([37.7, 9001.3]).tolist()
    assert list(read_scales(saved(theirs(), new=new))) == scales
    assert list(read_scales(saved(theirs(scale_fwd=torch.tensor([0.5, 0.25], dtype=torch.bfloat16))))) == [0.5, 0.25]
    assert read_scales(b"") == (1.0, 1.0)


@pytest.mark.parametrize("scales", [(1.0, 1.0), (37.7, 9001.3), (1e-30, 1e30)])
def test_what_is_written_is_read(scales: tuple[float, float]) -> None:
    content = write_scales(*scales)
    assert list(read_scales(content)) == torch.tensor(scales).tolist()
    state = torch.load(io.BytesIO(content), weights_only=True)
    assert state.keys() == theirs().keys()
    for name, tensor in theirs().items():
        if isinstance(tensor, torch.Tensor):
            assert state[name].shape == tensor.shape and state[name].dtype == torch.float32
    torch.testing.assert_close(state["amax_history_fwd"][0, :2] * state["scale_fwd"][:2], torch.full((2,), 448.0))


class Calls:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def compressed() -> bytes:
    """A small archive that unpacks to much."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", b"\0" * 100_000_000)
    return file.getvalue()


ran: list[int] = []


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (saved({}), "holds no scale_fwd"),
        (saved({"scale_fwd": 3.0}), "holds no scale_fwd"),
        (saved([torch.ones(3)]), "holds a list"),
        (saved(theirs(scale_fwd=torch.ones(1))), "holds 1 scales"),
        (saved(theirs(scale_fwd=torch.ones(1).expand(1 << 40))), "holds 1099511627776 scales"),
        (saved(theirs(scale_fwd=torch.ones(3, 1))), r"scale_fwd of torch.float32 \[3, 1\]"),
        (saved(theirs(scale_fwd=torch.ones(3, dtype=torch.int64))), "scale_fwd of torch.int64"),
        *[
            (saved(theirs(scale_fwd=torch.tensor([1.0, bad, 1.0]))), "which is none")
            for bad in (0.0, -1.0, float("nan"), float("inf"), 1e-45)
        ],
        (saved(theirs(z=Calls(ran.append, 1))), "wants to run code"),
        (saved(theirs(z=Calls(eval, "1"))), "wants to run code"),
        (pickle.dumps({"recipe": 1, "scale_fwd": torch.ones(3)}), "Transformer Engine 2"),
        (pickle.dumps(Calls(ran.append, 1)), "Transformer Engine 2"),
        (b"\x80", "Transformer Engine 2"),
        (b"hello", "is damaged"),
        (b"PK\x03\x04" + bytes(100), "is damaged"),
        (saved(theirs())[:-200], "is damaged"),
        (saved(theirs(), new=False)[:-5], "is damaged"),
        (compressed(), "compressed"),
        (bytes(1_000_001), "more than any FP8 state"),
    ],
)
def test_hostile_contents_are_one_line(content: bytes, words: str) -> None:
    with pytest.raises(CheckpointError, match=words) as error:
        read_scales(content)
    assert str(error.value).isprintable() and len(str(error.value)) < 400 and not ran


def test_a_flipped_bit_is_refused_or_changes_nothing() -> None:
    whole = saved(theirs())
    want, rng = read_scales(whole), random.Random(0)
    for at in rng.sample(range(len(whole)), 300):
        flipped = bytearray(whole)
        flipped[at] ^= 1 << rng.randrange(8)
        try:
            assert read_scales(bytes(flipped)) == want
        except CheckpointError as error:
            assert str(error).isprintable()
