"""Files that ``torch.save`` wrote, read without running anything that they name.

A pickle is a small program. Here it can build numbers, text, lists, tuples, dictionaries with plain keys, and
descriptions of tensors; every other instruction and every other name is refused. The numbers of the tensors are read
later, one tensor at a time, and checked against the archive's checksums.

Source of both formats: ``torch/serialization.py``.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Any

import torch

from hyaena.errors import CheckpointError, printable
from hyaena.tensor_files.stored import Storage, StoredTensor, section

_WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
"""Names under which training programs put the weights beside an optimiser's state."""

_RUN = {"model", "optimizer", "rng", "step"}
"""Names of the state of a training run of ours (``train/storage.py``)."""

_MAX_PICKLE = 1_000_000
"""Bytes of the largest pickle that is read, but for long texts; a tensor takes about 150."""
_LONG, _MAX_LONG = 1_000, 16_000_000
"""Bytes of a text that is long, and of all long ones of a pickle: extra states, of a few kilobytes each."""
_MAX_NESTING = 100
_MAX_VERSION = 10
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C

_NAMED_DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
}


@dataclass(frozen=True)
class _StorageOf:
    """A storage as a pickle names it: its key in the archive, its dtype (None: bytes), its number of elements."""

    key: str
    dtype: torch.dtype | None
    count: int


@dataclass(frozen=True)
class _TensorOf:
    """A tensor as a pickle describes it."""

    storage: _StorageOf
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True)
class _Opaque:
    """A value that is no tensor and is not needed."""

    kind: str


@dataclass
class _Bytes:
    """An ``io.BytesIO``."""

    content: bytes = b""


def read_zip(file: IO[bytes]) -> dict[str, StoredTensor]:
    """The tensors of an archive that ``torch.save`` wrote since PyTorch 1.6."""
    return _tensors(*_open_zip(file))


def read_small(content: bytes) -> dict[str, StoredTensor]:
    """The tensors in a dictionary that ``torch.save`` wrote into memory; what else is in it is ignored."""
    file = io.BytesIO(content)
    loaded, storage = _open_zip(file) if zipfile.is_zipfile(file) else _open_legacy(io.BytesIO(content))
    if not isinstance(loaded, dict):
        raise ValueError(f"it holds a {_kind(loaded)}, not a dictionary")
    found = {str(key): value for key, value in loaded.items() if isinstance(value, _TensorOf)}
    return {name: _placed(tensor, storage(tensor.storage)) for name, tensor in found.items()}


def _open_zip(file: IO[bytes]) -> tuple[Any, Callable[[_StorageOf], Storage]]:
    """What an archive holds, and where the numbers of its storages are."""
    archive = zipfile.ZipFile(file)
    entries: dict[str, zipfile.ZipInfo] = {}
    size = file.seek(0, os.SEEK_END)
    for info in archive.infolist():
        name = info.filename.partition("/")[2]
        if name in entries:
            raise ValueError("it has two entries of one name")
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise CheckpointError("its entries are compressed or encrypted: save it again with torch.save")
        if info.volume:
            raise ValueError("an entry is said to be on another disk")
        if info.file_size > size or info.compress_size != info.file_size:
            raise EOFError("an entry is not as long as the file's table of contents says")
        if info.filename.partition("/")[0] != archive.infolist()[0].filename.partition("/")[0]:
            raise CheckpointError("is an archive of several folders: save model.state_dict() with torch.save")
        entries[name] = info
    _check_end(file, len(entries))
    if "constants.pkl" in entries:
        raise CheckpointError("is a TorchScript archive, and only plain tensors are loaded: save its state_dict()")
    if "data.pkl" not in entries:
        raise CheckpointError("is an archive without weights: save model.state_dict() with torch.save")
    small = {name: info for name, info in entries.items() if not name.startswith("data/")}
    if sum(info.file_size for info in small.values()) > _MAX_PICKLE + _MAX_LONG:
        raise _too_large()
    content = {name: archive.read(info) for name, info in small.items()}  # each against its checksum
    if content.get("byteorder", b"little") != b"little" or int(content.get("version", b"3")) > _MAX_VERSION:
        raise CheckpointError(
            "has another byteorder or version than PyTorch writes here: save it again with torch.save"
        )
    loaded = _load(io.BytesIO(content["data.pkl"]))

    def storage(named: _StorageOf) -> Storage:
        info = entries.get(f"data/{named.key}")
        if info is None:
            raise EOFError(f"the numbers {named.key} are missing")
        return Storage(info.file_size, lambda: archive.open(info))

    return loaded, storage


def _check_end(file: IO[bytes], count: int) -> None:
    """Refuse an archive whose last records contradict its table of contents; ``zipfile`` ignores most of them."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(size - 98, 0))
    end = file.read()
    signature, disk, first_disk, here, total, _, _, comment = struct.unpack("<4s4H2LH", end[-22:])
    many = (count, 0xFFFF)  # the larger number where a record of 64 bits precedes it
    sound = signature == b"PK\x05\x06" and not (disk or first_disk or comment) and here == total and total in many
    if end[-42:-38] == b"PK\x06\x07":  # where that record is
        sound = sound and struct.unpack("<LQL", end[-38:-22]) == (0, size - 98, 1)
        signature, length, _, _, disk, first_disk, here, total, _, _ = struct.unpack("<4sQ2H2L4Q", end[-98:-42])
        sound = sound and (signature, length, disk, first_disk, here, total) == (b"PK\x06\x06", 44, 0, 0, count, count)
    if not sound:
        raise ValueError("its last records contradict its table of contents")


def read_legacy(file: IO[bytes]) -> dict[str, StoredTensor]:
    """The tensors of a file that ``torch.save`` wrote before PyTorch 1.6; it has no checksums."""
    return _tensors(*_open_legacy(file))


def _open_legacy(file: IO[bytes]) -> tuple[Any, Callable[[_StorageOf], Storage]]:
    if _load(file) != _LEGACY_MAGIC:
        raise ValueError("it does not begin as a file of torch.save does")
    _load(file)  # the version of the format: there is one only
    system = _load(file)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise CheckpointError("was written on a big-endian machine: save it again with torch.save")
    named: dict[str, _StorageOf] = {}
    loaded = _load(file, named)
    keys = _load(file)
    if not isinstance(keys, list) or any(key not in named for key in keys):
        raise ValueError("its list of storages is not one")
    sections = {}
    for key in keys:  # each: 8 bytes with the number of elements, and the elements
        count, header = named[key].count, file.read(8)
        if len(header) < 8 or int.from_bytes(header, "little") != count:
            raise EOFError(f"the numbers {key} are cut short")
        nbytes = count * (named[key].dtype or torch.uint8).itemsize
        sections[key] = section(file, file.tell(), nbytes)
        file.seek(nbytes, os.SEEK_CUR)
    if file.tell() > file.seek(0, os.SEEK_END):
        raise EOFError("it is shorter than its table of contents says")
    return loaded, lambda named: sections[named.key]


def _tensors(loaded: Any, storage: Callable[[_StorageOf], Storage]) -> dict[str, StoredTensor]:
    """The state dict in what a file holds, each tensor with its place; the bytes of an extra state are uint8 [n]."""
    for _ in range(4):
        if isinstance(loaded, dict) and loaded.keys() >= _RUN:
            raise CheckpointError(
                "is the state of a training run: load the run's folder best or final, or write its newest model "
                "with `hyaena convert RUN OUT`"
            )
        wrapper = next((w for w in _WRAPPERS if isinstance(loaded, dict) and isinstance(loaded.get(w), dict)), None)
        if wrapper is None:
            break
        loaded = loaded[wrapper]
    if not isinstance(loaded, dict):
        raise CheckpointError(f"holds a {_kind(loaded)}, not a state dict: save model.state_dict()")
    state: dict[str, StoredTensor] = {}
    strange = []
    for key, value in loaded.items():
        name = str(key)
        if isinstance(value, _TensorOf):
            if name in state:
                raise CheckpointError(f"has two tensors named {printable(name)}: save model.state_dict()")
            state[name] = _placed(value, storage(value.storage))
        elif name.endswith("_extra_state"):
            if isinstance(value, bytes | _Bytes):
                state[name] = _in_memory(value if isinstance(value, bytes) else value.content)
        else:
            strange.append(f"{printable(name)} ({_kind(value)})")
    if strange:
        rest = f", and {len(strange) - 6} more" if len(strange) > 6 else ""
        raise CheckpointError(f"not tensors: {', '.join(strange[:6])}{rest}: save model.state_dict() alone")
    return state


def _in_memory(content: bytes) -> StoredTensor:
    return StoredTensor(torch.uint8, (len(content),), (1,), 0, Storage(len(content), lambda: io.BytesIO(content)))


def _placed(tensor: _TensorOf, storage: Storage) -> StoredTensor:
    """A tensor with its storage; refuses one that reaches beyond it."""
    last = tensor.offset + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride, strict=True))
    empty = 0 in tensor.shape
    if not empty and (last + 1) * tensor.dtype.itemsize > storage.nbytes:
        raise EOFError("a tensor reaches beyond its numbers")
    if math.prod(tensor.shape) > 1 << 48:  # such as one number repeated
        raise ValueError("a tensor is larger than any memory")
    return StoredTensor(tensor.dtype, tensor.shape, tensor.stride, 0 if empty else tensor.offset, storage)


def _kind(value: object) -> str:
    names = {_TensorOf: "tensor", _StorageOf: "storage", _Bytes: "BytesIO"}
    return value.kind if isinstance(value, _Opaque) else names.get(type(value), type(value).__name__)


# --- the pickles -----------------------------------------------------------------------------------------------------


def _load(file: IO[bytes], storages: dict[str, _StorageOf] | None = None) -> Any:
    return _Unpickler(_Bounded(file), {} if storages is None else storages).load()


class _Bounded:
    """A file of which a pickle may read so many bytes and no more."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._left, self._left_long = file, _MAX_PICKLE, _MAX_LONG

    def read(self, count: int) -> bytes:
        self._spend(count)
        return self._file.read(count)

    def readline(self) -> bytes:
        line = self._file.readline(1000)
        self._spend(len(line))
        if not line.endswith(b"\n"):
            raise EOFError("its pickle is cut short")
        return line

    def readinto(self, buffer: Any) -> int:
        self._spend(len(buffer))
        return self._file.readinto(buffer)  # type: ignore[attr-defined]

    def _spend(self, count: int) -> None:
        if count > _LONG:
            self._left_long -= count
        else:
            self._left -= count
        if count < 0 or min(self._left, self._left_long) < 0:
            raise _too_large()


def _too_large() -> CheckpointError:
    return CheckpointError("its pickle is larger than that of any model: save model.state_dict() alone")


# These take the arguments of the functions of torch that they stand for: what torch would refuse is refused here, too.
def _rebuild_v1(storage: Any, offset: Any, shape: Any, stride: Any) -> _TensorOf:
    """``torch._utils._rebuild_tensor``."""
    return _rebuild_as(storage, offset, shape, stride, storage.dtype)


def _rebuild_v2(
    storage: Any, offset: Any, shape: Any, stride: Any, _grad: Any, _hooks: Any, view: Any = None
) -> _TensorOf:
    """``torch._utils._rebuild_tensor_v2``; a lazy view names its kind."""
    if view:
        raise CheckpointError("has a conjugated or negated view in it: save a clone of the tensor")
    return _rebuild_as(storage, offset, shape, stride, storage.dtype)


def _rebuild_v3(storage: Any, offset: Any, shape: Any, stride: Any, _grad: Any, _hooks: Any, dtype: Any) -> _TensorOf:
    """``torch._utils._rebuild_tensor_v3``: the dtype is not the storage's."""
    return _rebuild_as(storage, offset, shape, stride, dtype)


def _rebuild_as(storage: Any, offset: Any, shape: Any, stride: Any, dtype: Any) -> _TensorOf:
    numbers = (offset, *shape, *stride)
    if not isinstance(storage, _StorageOf) or not isinstance(dtype, torch.dtype) or not len(shape) == len(stride) < 17:
        raise ValueError("a tensor is not described as one")
    if any(type(number) is not int or not 0 <= number < 1 << 62 for number in numbers):
        raise ValueError("a tensor has sizes or strides that no tensor has")
    return _TensorOf(storage, dtype, offset, tuple(shape), tuple(stride))


def _mapping(pairs: Any = ()) -> dict[Any, Any]:
    """``collections.OrderedDict``."""
    return dict((_plain(key), value) for key, value in pairs)


def _plain(key: Any) -> str | int:
    if type(key) not in (str, int):  # hashing others may take for ever
        raise CheckpointError(f"has a {_kind(key)} as a name in it: save model.state_dict()")
    return key


def _bytes_io(content: Any = b"") -> _Bytes:
    """``io.BytesIO``."""
    return _Bytes(content if type(content) is bytes else b"")


def _opaque(kind: str) -> Callable[..., _Opaque]:
    return lambda *_: _Opaque(kind)


_FUNCTIONS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _mapping,
    ("torch._utils", "_rebuild_tensor"): _rebuild_v1,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_v2,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_v3,
    ("torch._utils", "_rebuild_parameter"): lambda data, _grad, _hooks: data,
    ("torch", "Size"): lambda sizes=(): tuple(sizes),
    ("torch", "device"): _opaque("device"),
    ("_io", "BytesIO"): _bytes_io,
    ("__builtin__", "bytes"): lambda: b"",
    ("__builtin__", "bytearray"): _opaque("bytearray"),
    ("builtins", "bytearray"): _opaque("bytearray"),
}
"""What a pickle may call, each with what is called here in its place."""

# fmt: off
_OPCODES = [
    "PROTO", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE", "INT", "BININT", "BININT1",
    "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "UNICODE",
    "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "EMPTY_LIST", "LIST", "APPEND", "APPENDS",
    "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_DICT", "DICT", "SETITEM", "SETITEMS", "GLOBAL",
    "STACK_GLOBAL", "REDUCE", "NEWOBJ", "BUILD", "PUT", "BINPUT", "LONG_BINPUT", "GET", "BINGET", "LONG_BINGET",
    "MEMOIZE", "BINPERSID",
]
# fmt: on


# Python's own unpickler, in Python: the one in C lets a file reserve memory for a memo of any size.
class _Unpickler(pickle._Unpickler):  # type: ignore[name-defined, misc]
    """Runs a pickle with the names of ``_FUNCTIONS`` and the instructions of ``_OPCODES``."""

    stack: list[Any]
    metastack: list[list[Any]]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, file: _Bounded, storages: dict[str, _StorageOf]) -> None:
        super().__init__(file, encoding="latin-1")
        self.storages = storages
        self.left = _MAX_LONG

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if (module, name) in (("torch.storage", "UntypedStorage"), ("torch", "UntypedStorage")):
            return None
        if module == "torch" and name in _NAMED_DTYPES:
            return _NAMED_DTYPES[name]
        if (module, name) == ("_codecs", "encode"):
            return self._encode
        if (module, name) in _FUNCTIONS:
            return _FUNCTIONS[module, name]
        called = printable(f"{module}.{name}")
        if called.startswith("torch._utils._rebuild_"):
            raise CheckpointError(
                f"holds a kind of tensor that is not loaded ({called}): save it as a plain, dense one"
            )
        raise CheckpointError(
            f"wants to run code ({called}), and only plain tensors are loaded: "
            "save it again as a state dict, or as safetensors"
        )

    def persistent_load(self, saved: Any) -> _StorageOf:
        kind, dtype, key, _location, count, *view = saved
        sound = kind == "storage" and type(key) is str and type(count) is int and count >= 0 and not any(view)
        if not sound or not (dtype is None or isinstance(dtype, torch.dtype)):
            raise ValueError("a storage is not described as one")
        return self.storages.setdefault(key, _StorageOf(key, dtype, count))

    def _encode(self, text: Any, encoding: Any) -> bytes:
        """``_codecs.encode``, by which pickles of protocol 2 hold bytes; one text may be encoded again and again."""
        if type(text) is not str or encoding != "latin1":
            raise ValueError("bytes are not written as bytes are")
        self.left -= len(text)
        if self.left < 0:
            raise _too_large()
        return text.encode("latin-1")

    def load_mark(self) -> None:
        if len(self.metastack) > _MAX_NESTING:
            raise ValueError("it is nested too deeply")
        super().load_mark()  # type: ignore[misc]

    def _set_items(self, target: Any, pairs: Iterator[tuple[Any, Any]]) -> None:
        if type(target) is not dict:
            raise ValueError("it sets items of something that has none")
        target.update((_plain(key), value) for key, value in pairs)

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set_items(self.stack[-1], iter([(key, value)]))

    def load_setitems(self) -> None:
        items = self.pop_mark()
        self._set_items(self.stack[-1], zip(items[::2], items[1::2], strict=True))

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append(_mapping(zip(items[::2], items[1::2], strict=True)))

    def load_newobj(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        self.append(function(*arguments))

    def load_build(self) -> None:
        attributes, built = self.stack.pop(), self.stack[-1]
        if isinstance(built, _Bytes):  # its content, its position and attributes
            built.content = _bytes_io(attributes[0]).content
        # Others, such as the versions in a state dict's `_metadata`, are of no use here.

    dispatch: Mapping[int, Callable[[Any], None]] = {}


_OWN = {
    pickle.MARK: _Unpickler.load_mark,
    pickle.SETITEM: _Unpickler.load_setitem,
    pickle.SETITEMS: _Unpickler.load_setitems,
    pickle.DICT: _Unpickler.load_dict,
    pickle.NEWOBJ: _Unpickler.load_newobj,
    pickle.BUILD: _Unpickler.load_build,
}
_Unpickler.dispatch = {
    code[0]: _OWN.get(code, pickle._Unpickler.dispatch[code[0]])  # type: ignore[attr-defined]
    for code in (getattr(pickle, name) for name in _OPCODES)
}
