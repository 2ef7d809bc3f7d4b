"""Tokenizers: nothing is lost, nothing is broken, and a stream gives the text of the whole."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Library

from hyaena.errors import CheckpointError, InputError, UnsupportedError
from hyaena.tokenizers import ByteTokenizer, CharacterTokenizer, HFTokenizer, Tokenizer, load_tokenizer
from tokenizer_libraries import TEXTS, byte_level, sentencepiece_like, write


@pytest.fixture(scope="module")
def libraries() -> dict[str, Library]:
    return {
        "strip": sentencepiece_like("strip"),
        "metaspace": sentencepiece_like("metaspace"),
        "byte-level": byte_level(),
    }


@pytest.fixture(scope="module")
def every(libraries: dict[str, Library], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    loaded = {name: HFTokenizer(write(x, tmp_path_factory.mktemp(name))) for name, x in libraries.items()}
    return {"bytes": ByteTokenizer(), "characters": CharacterTokenizer(), **loaded}


KINDS = ["bytes", "characters", "strip", "metaspace", "byte-level"]
HF_KINDS = ["strip", "metaspace", "byte-level"]


# --- bytes and characters


def test_bytes_are_lossless() -> None:
    tokenizer = ByteTokenizer()
    data = bytes(range(256)) * 2
    assert tokenizer.encode(data) == [256, *data]
    assert tokenizer.decode_bytes(tokenizer.encode(data)) == data
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (259, 256, 257, 258)


def test_bytes_of_a_larger_vocabulary_stand_for_nothing() -> None:
    tokenizer = ByteTokenizer(320)
    assert tokenizer.decode([72, 319, 258, 105]) == "Hi"
    with pytest.raises(InputError, match=r"320.*0\.\.319"):
        tokenizer.decode([320])


def test_undecodable_arguments_come_back_as_their_bytes() -> None:
    assert ByteTokenizer().encode(b"a\xff".decode("utf-8", "surrogateescape"), add_special_tokens=False) == [97, 255]
    with pytest.raises(InputError, match="surrogate"):
        ByteTokenizer().encode("\ud800")


def test_characters_are_evos() -> None:
    tokenizer = CharacterTokenizer()
    assert tokenizer.encode("ACGT") == [65, 67, 71, 84]
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (512, None, 0, 1)
    assert tokenizer.decode([1, 1, 65, 67, 300, 0]) == "AC"


# --- the law of streams


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_a_stream_gives_the_text_of_the_whole(every: dict[str, Tokenizer], kind: str, data: st.DataObject) -> None:
    tokenizer = every[kind]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=40))
    stream = tokenizer.stream()
    parts = [stream.push(token) for token in ids]
    assert "".join(parts) + stream.flush() == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", KINDS)
@given(text=st.text(st.characters(exclude_characters="\x00\x01", exclude_categories=["Cs"])), cut=st.integers(0, 60))
def test_a_valid_text_never_shows_a_broken_character(
    every: dict[str, Tokenizer], kind: str, text: str, cut: int
) -> None:
    """Joined parts are the text, each part is a run of it: a split character would appear as U+FFFD."""
    tokenizer = every[kind]
    ids = tokenizer.encode(text)
    if "�" in text or (tokenizer.decode(ids) != text):  # the tokenizer's own normaliser may change a text
        text = tokenizer.decode(ids)
    prompt, rest = ids[:cut], ids[cut:]
    stream = tokenizer.stream(after=prompt)
    parts = [stream.push(token) for token in rest] + [stream.flush()]
    done = tokenizer.decode_bytes(prompt).decode("utf-8", errors="ignore")
    assert done + "".join(parts) == text


def test_a_character_waits_for_its_last_byte() -> None:
    stream = ByteTokenizer().stream()
    assert [stream.push(token) for token in "é🐆".encode()] == ["", "é", "", "", "", "🐆"]
    assert stream.flush() == ""


def test_an_unfinished_character_ends_as_a_replacement() -> None:
    stream = ByteTokenizer().stream()
    assert [stream.push(0xF0), stream.push(0x9F), stream.flush()] == ["", "", "�"]


def test_what_is_held_back_does_not_grow() -> None:
    stream = ByteTokenizer().stream()
    shown = sum(len(stream.push(0x80)) for _ in range(10_000))  # never valid, so each shows at once
    assert shown == 10_000


# --- tokenizer.json


@pytest.mark.parametrize("kind", HF_KINDS)
@pytest.mark.parametrize("text", TEXTS)
def test_ids_and_text_agree_with_the_library(
    every: dict[str, Tokenizer], libraries: dict[str, Library], kind: str, text: str
) -> None:
    ids = every[kind].encode(text, add_special_tokens=False)
    assert ids == libraries[kind].encode(text, add_special_tokens=False).ids
    assert every[kind].decode(ids) == libraries[kind].decode(ids)
    # Metaspace puts no space before a text that begins with one, so that one is lost in the ids already.
    assert every[kind].decode(ids) == (text.removeprefix(" ") if kind == "metaspace" else text)


@pytest.mark.parametrize("kind", ["strip", "metaspace"])
def test_only_the_start_of_a_text_loses_its_space(every: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = every[kind]
    prompt, ids = tokenizer.encode("The four"), tokenizer.encode("hyena", add_special_tokens=False)
    assert tokenizer.decode(ids) == "hyena"
    continued = tokenizer.stream(after=prompt)
    assert "".join(map(continued.push, ids)) == " hyena"
    begun = tokenizer.stream(after=prompt[:1])  # only <s>: the text starts here
    assert "".join(map(begun.push, ids)) == "hyena"


@pytest.mark.parametrize("kind", ["strip", "metaspace"])
def test_a_token_alone_keeps_its_space(every: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = every[kind]
    ids = tokenizer.encode(" hyena the hyena", add_special_tokens=False)
    assert b"".join(map(tokenizer.token_bytes, ids)).lstrip() == b"hyena the hyena"
    assert any(tokenizer.token_bytes(token).startswith(b" ") for token in ids[1:])
    with pytest.raises(InputError, match="outside the vocabulary"):
        tokenizer.token_bytes(tokenizer.vocab_size)


def test_special_tokens_have_no_text(every: dict[str, Tokenizer]) -> None:
    tokenizer = every["strip"]
    ids = tokenizer.encode("hyena", add_special_tokens=False)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, None)
    assert tokenizer.decode([1, *ids, 2]) == "hyena"


def test_bos_goes_in_front_once(every: dict[str, Tokenizer]) -> None:
    tokenizer = every["strip"]
    assert tokenizer.encode("hyena")[:2].count(1) == 1
    assert tokenizer.encode("<s>hyena", special=True).count(1) == 1
    assert 1 not in tokenizer.encode("hyena", add_special_tokens=False)


def test_a_template_that_adds_bos_does_not_add_a_second(tmp_path: Path) -> None:
    library = sentencepiece_like("strip")
    library.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    assert HFTokenizer(write(library, tmp_path)).encode("hyena").count(1) == 1


def test_bos_follows_the_settings_beside_the_file(tmp_path: Path) -> None:
    path = write(sentencepiece_like("strip"), tmp_path, add_bos_token=False, eos_token={"content": "<unk>"})
    tokenizer = HFTokenizer(path)
    assert 1 not in tokenizer.encode("hyena")
    assert tokenizer.eos_id == 0


def test_a_byte_level_file_has_eos_and_no_bos(every: dict[str, Tokenizer]) -> None:
    tokenizer = every["byte-level"]
    assert (tokenizer.bos_id, tokenizer.eos_id) == (None, 0)
    assert tokenizer.decode(tokenizer.encode("x an added wörd 🐆")) == "x an added wörd 🐆"


def test_truncation_and_padding_in_the_file_are_ignored(tmp_path: Path) -> None:
    library = byte_level()
    library.enable_truncation(4)
    library.enable_padding(length=64)
    tokenizer = HFTokenizer(write(library, tmp_path))
    assert tokenizer.decode(tokenizer.encode("hyena " * 50)) == "hyena " * 50
    assert len(tokenizer.encode("hyena")) < 10


def test_bytes_must_be_utf8_for_a_file_that_reads_text(every: dict[str, Tokenizer]) -> None:
    assert every["strip"].encode("hyéna".encode()) == every["strip"].encode("hyéna")
    with pytest.raises(InputError, match="not UTF-8"):
        every["strip"].encode(b"\xff")
    with pytest.raises(InputError, match="surrogate"):
        every["strip"].encode("\udcff")


# --- special tokens in texts


def unigram() -> Library:
    """A file whose model itself would choose its special tokens: they score better than any piece."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("▁", -2.0), *((c, -5.0) for c in "ab</s>|")]
    library = Library(models.Unigram(pieces, unk_id=0))
    library.add_special_tokens(["<unk>", "<s>", "</s>"])
    library.pre_tokenizer, library.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return library


def whole_words() -> Library:
    """A byte-level BPE file that looks whole words up before it merges anything."""
    library = byte_level()
    spec = json.loads(library.to_str())
    spec["model"]["ignore_merges"] = True
    spec["pre_tokenizer"] = {"type": "Split", "pattern": {"String": "|"}, "behavior": "Isolated", "invert": False}
    spec["model"]["vocab"]["</s>"] = size = len(spec["model"]["vocab"])
    spec["added_tokens"] = [spec["added_tokens"][0] | {"id": size, "content": "</s>"}]
    return Library.from_str(json.dumps(spec))


def merged() -> Library:
    """A byte-level BPE file whose merges lead to a special token."""
    spec = json.loads(byte_level().to_str())
    vocab = spec["model"]["vocab"]
    spec["added_tokens"][0] = spec["added_tokens"][0] | {"id": vocab["yen"], "content": "yen"}
    return Library.from_str(json.dumps(spec))


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: sentencepiece_like("strip"), "</s>"),
        (lambda: sentencepiece_like("metaspace"), "<s>"),
        (byte_level, "<|endoftext|>"),
        (unigram, "</s>"),
        (whole_words, "</s>"),
        (merged, "yen"),
    ],
    ids=["strip", "metaspace", "byte-level", "unigram", "whole words", "merged"],
)
def test_a_text_holds_no_control_tokens_unless_told(make: Callable[[], Library], name: str, tmp_path: Path) -> None:
    tokenizer = HFTokenizer(write(make(), tmp_path))
    token = tokenizer.special_tokens[name]
    for text in (name, f"a{name}b", f"{name}|{name}"):
        plain = tokenizer.encode(text, add_special_tokens=False)
        assert token not in plain
        assert tokenizer.decode(plain) == text
        assert tokenizer.encode(text, add_special_tokens=False, special=True).count(token) == text.count(name)


def test_other_ids_do_not_depend_on_the_switch(every: dict[str, Tokenizer]) -> None:
    for kind in HF_KINDS:
        for text in TEXTS:
            assert every[kind].encode(text) == every[kind].encode(text, special=True)


@pytest.mark.parametrize(
    ("data", "message"), [(b"AC\x00GT", "byte 0 at position 2"), ("A\x01", "byte 1 at position 1")]
)
def test_characters_refuse_the_bytes_that_would_be_control_tokens(data: str | bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        CharacterTokenizer().encode(data)
    assert CharacterTokenizer().encode(data, special=True) == list(data.encode() if isinstance(data, str) else data)


# --- added tokens


ADDED = ["an added wörd", "    ", "ñ", "a▁b", " y", "Ġz"]


@pytest.mark.parametrize("kind", HF_KINDS)
@pytest.mark.parametrize("normalized", [True, False])
def test_added_tokens_are_plain_text(kind: str, normalized: bool, tmp_path: Path) -> None:
    """Whatever the vocabulary's own alphabet: ñ is one of byte-level BPE's signs for bytes, ▁ a space elsewhere."""
    library = byte_level() if kind == "byte-level" else sentencepiece_like(kind)
    library.add_tokens([AddedToken(text, normalized=normalized) for text in ADDED])
    tokenizer = HFTokenizer(write(library, tmp_path))
    texts = ["x an added wörd q", "x ñ a▁b q", "ñ", "    q", " yq", "q Ġz", "q    "]
    if kind != "metaspace":  # which cannot tell "ñ q" from "ñq": the ids are the same
        texts += ["ñq", "xan added wördq", "    ñ y yq"]
    for text in texts:
        if kind == "metaspace" and text in ("    q", " yq"):
            continue
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids) == text
        for cut in range(len(ids) + 1):
            stream = tokenizer.stream(after=ids[:cut])
            done = tokenizer.decode_bytes(ids[:cut]).decode(errors="ignore")
            assert done + "".join(map(stream.push, ids[cut:])) == text


# --- what generation ends at, and how tokenizers are shown


def test_generation_config_names_more_ends(tmp_path: Path) -> None:
    path = write(sentencepiece_like("strip"), tmp_path)
    (tmp_path / "generation_config.json").write_text('\ufeff{"eos_token_id": [7, 2, 7]}', encoding="utf-8")
    assert (HFTokenizer(path).eos_id, HFTokenizer(path).eos_ids) == (2, (2, 7))
    assert load_tokenizer(tmp_path, Described("bytes", 264)).eos_ids == (257, 7, 2)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 9}')
    assert HFTokenizer(path).eos_ids == (2, 9)
    for wrong in ('"x"', "-1", "[2, 1e3]", "true", "99999"):
        (tmp_path / "generation_config.json").write_text(f'{{"eos_token_id": {wrong}}}')
        with pytest.raises(CheckpointError, match=r"generation_config.json: eos_token_id .* is not an id"):
            load_tokenizer(tmp_path, Described("hf", 512))


def test_generation_config_alone_gives_an_end(tmp_path: Path) -> None:
    library = Library(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 1}')
    tokenizer = HFTokenizer(write(library, tmp_path))
    assert (tokenizer.eos_id, tokenizer.eos_ids) == (1, (1,))


def test_a_tokenizer_shows_what_it_is(tmp_path: Path) -> None:
    assert repr(ByteTokenizer(264)) == "ByteTokenizer(vocab_size=264, bos_id=256, eos_ids=[257])"
    path = write(byte_level(), tmp_path)
    assert repr(HFTokenizer(path, 512)) == f"HFTokenizer({str(path)!r}, vocab_size=512, bos_id=None, eos_ids=[0])"


# --- arguments


@pytest.mark.parametrize("kind", ["bytes", "characters", "strip"])
@pytest.mark.parametrize("text", [None, 5, 1.5, ["a"], {"a": 1}, object(), memoryview(np.arange(3)), torch.zeros(2)])
def test_only_text_can_be_encoded(every: dict[str, Tokenizer], kind: str, text: Any) -> None:
    with pytest.raises(InputError) as caught:
        every[kind].encode(text)
    assert "\n" not in str(caught.value)


def test_any_bytes_are_text(every: dict[str, Tokenizer]) -> None:
    for kind in ("bytes", "characters", "strip"):
        wanted = every[kind].encode("hyena")
        for form in (b"hyena", bytearray(b"hyena"), memoryview(b"hyena"), np.str_("hyena")):
            assert every[kind].encode(form) == wanted


@pytest.mark.parametrize("option", ["special", "add_special_tokens"])
def test_switches_are_true_or_false(option: str) -> None:
    with pytest.raises(InputError, match=f"{option} must be True or False, not 'no'"):
        ByteTokenizer().encode("a", **{option: "no"})


ONE = np.uint8(104)


@pytest.mark.parametrize(
    "ids",
    [
        [104, 105],
        (104, 105),
        range(104, 106),
        iter([104, 105]),
        np.array([104, 105], np.uint8),
        torch.tensor([104, 105], dtype=torch.uint8),
        [ONE, torch.tensor(105)],
    ],
)
def test_ids_come_in_any_sequence(ids: Any) -> None:
    assert ByteTokenizer().decode(ids) == "hi"


@pytest.mark.parametrize(
    "ids",
    [
        None,
        5,
        1.5,
        "hi",
        b"hi",
        bytearray(b"hi"),
        {104: 105},
        {104, 105},
        [1.0],
        ["1"],
        [True],
        [None],
        [[104]],
        [torch.tensor([104])],
        torch.tensor(104),
        torch.tensor([[104]]),
        torch.tensor([True]),
        torch.tensor([1.0]),
        torch.empty(2, dtype=torch.long, device="meta"),
        np.array(104),
        np.array("hi"),
        np.array(b"hi"),
        np.array([1.0]),
        np.array([True]),
        [10**400],
        [-1],
    ],
)
def test_what_is_no_ids_is_refused_in_one_line(ids: Any) -> None:
    for function in (
        ByteTokenizer().decode,
        ByteTokenizer().decode_bytes,
        lambda ids: ByteTokenizer().stream(after=ids),
    ):
        with pytest.raises(InputError) as caught:
            function(ids)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 300


@pytest.mark.parametrize("token", [None, "a", 1.0, True, [104], 259, -1])
def test_a_stream_takes_ids_only(token: Any) -> None:
    stream = ByteTokenizer().stream()
    with pytest.raises(InputError, match="token id"):
        stream.push(token)
    assert stream.push(np.int64(104)) == "h"


@pytest.mark.parametrize("size", [None, "300", 300.5, True, 10**12, 5])
def test_sizes_of_vocabularies_are_checked(size: Any) -> None:
    for kind in (ByteTokenizer, CharacterTokenizer):
        with pytest.raises(InputError, match="vocab_size"):
            kind(size)


@pytest.mark.parametrize("path", [None, 5, b"x", ["x"]])
def test_paths_are_checked(path: Any) -> None:
    for function in (HFTokenizer, lambda path: load_tokenizer(path, Described("hf", 512))):
        with pytest.raises(InputError, match="path must be"):
            function(path)
    with pytest.raises(InputError, match="config must be"):
        load_tokenizer("x", path)


# --- load_tokenizer


@dataclass(frozen=True)
class Described:
    tokenizer: str
    vocab_size: int


def test_load_tokenizer_chooses_by_the_config(tmp_path: Path) -> None:
    assert isinstance(load_tokenizer(tmp_path, Described("bytes", 264)), ByteTokenizer)
    assert isinstance(load_tokenizer(tmp_path / "absent", Described("characters", 512)), CharacterTokenizer)
    path = write(byte_level(), tmp_path)
    (tmp_path / "model.safetensors").touch()
    for place in (tmp_path, path, tmp_path / "model.safetensors"):
        tokenizer = load_tokenizer(place, Described("hf", 512))
        assert isinstance(tokenizer, HFTokenizer)
        assert tokenizer.vocab_size == 512
        assert tokenizer.decode([511]) == ""  # a row that pads the embedding


@pytest.mark.parametrize(
    ("content", "described", "message"),
    [
        (None, Described("hf", 512), "no tokenizer.json in"),
        ("{", Described("hf", 512), "not a usable tokenizer.json"),
        ('{"version": "1.0"}', Described("hf", 512), "not a usable tokenizer.json"),
        (None, Described("bytes", 256), "tokenizer 'bytes'.*259"),
        (None, Described("words", 256), "unknown tokenizer 'words'"),
    ],
)
def test_load_tokenizer_says_what_is_wrong(
    tmp_path: Path, content: str | None, described: Described, message: str
) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_tokenizer(tmp_path, described)
    assert "\n" not in str(caught.value)


def changed(**values: Any) -> bytes:
    """A byte-level file with other entries."""
    return json.dumps(json.loads(byte_level().to_str()) | values).encode()


def added(**values: Any) -> bytes:
    spec = json.loads(byte_level().to_str())
    return changed(added_tokens=[spec["added_tokens"][0] | values])


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"null",
        b"[1]",
        b"\xff\xfe{",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"a": ' + b"9" * 10_000 + b"}",
        b'{"a": [' + b"{}," * 2_100_000 + b"{}]}",
        b'{"\x1b[31m": 5}',
        changed(model=5),
        changed(decoder=5),
        changed(decoder={"type": "Sequence", "decoders": [{"type": "Fuse"}] * 100}),
        changed(decoder={"type": "Replace", "pattern": {"String": ""}, "content": "x" * 10_000}),
        changed(decoder={"type": "Replace", "pattern": {"String": "e"}, "content": "x" * 2_000_000}),
        changed(decoder={"type": "\x1b[31m" * 1000}),
        changed(added_tokens=None),
        added(id=-1),
        added(id="x"),
        added(content=5),
        added(special="x"),
    ],
    ids=lambda content: str(content[:24]),
)
def test_a_hostile_file_is_one_line_of_error(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises((CheckpointError, UnsupportedError)) as caught:
        load_tokenizer(tmp_path, Described("hf", 512))
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 600


def test_an_id_far_beyond_the_tokens_is_refused(tmp_path: Path) -> None:
    spec = json.loads(byte_level().to_str())
    spec["model"]["vocab"]["far"] = 4_000_000_000
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(CheckpointError, match="numbers its tokens up to 4,000,000,000"):
        HFTokenizer(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_config", "special_tokens_map", "generation_config"])
def test_only_regular_files_are_opened(name: str, tmp_path: Path) -> None:
    """A FIFO would wait for ever, a device never end."""
    write(byte_level(), tmp_path)
    path = tmp_path / f"{name}.json"

    def refused(message: str) -> None:
        with pytest.raises(CheckpointError, match=message):
            load_tokenizer(tmp_path, Described("hf", 512))

    path.unlink(missing_ok=True)
    os.mkfifo(path)
    refused("not a regular file")
    path.unlink()
    path.symlink_to("/dev/zero")
    refused("not a regular file")
    path.unlink()
    path.mkdir()
    refused("is a folder")
    path.rmdir()
    with open(path, "wb") as file:
        file.truncate(65 * 2**20)
    refused("larger than 64 MiB")


@pytest.mark.parametrize("value", [5, ["x"], {"content": 5}, "\x1b[31m" * 1000, "\ud800", {"content": "a\udfff"}])
@pytest.mark.parametrize("key", ["bos_token", "eos_token", "pad_token"])
def test_settings_of_wrong_types_are_named(key: str, value: Any, tmp_path: Path) -> None:
    path = write(byte_level(), tmp_path, **{key: value})
    with pytest.raises(CheckpointError, match=key) as caught:
        HFTokenizer(path)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 600


def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path: Path) -> None:
    path = write(byte_level(), tmp_path, eos_token="<|endoftext|>")
    for file in tmp_path.iterdir():
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert HFTokenizer(path).encode("hyena") == byte_level().encode("hyena").ids


def test_a_text_that_the_file_cannot_encode_is_an_input_error(tmp_path: Path) -> None:
    library = Library(models.WordLevel({"a": 0}, unk_token="[UNK]"))
    with pytest.raises(InputError, match="cannot encode the text"):
        HFTokenizer(write(library, tmp_path)).encode("b")


def test_a_tokenizer_larger_than_the_model_is_not_its_tokenizer(tmp_path: Path) -> None:
    path = write(byte_level(), tmp_path)
    with pytest.raises(CheckpointError, match="tokens but the model has 300"):
        HFTokenizer(path, 300)


def test_settings_that_name_an_absent_token_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no token '<nowhere>'.*eos_token"):
        HFTokenizer(write(byte_level(), tmp_path, eos_token="<nowhere>"))
    (tmp_path / "tokenizer_config.json").write_text("[")
    with pytest.raises(CheckpointError, match="not readable JSON"):
        HFTokenizer(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("pattern", ["a", Regex(".")])
@pytest.mark.parametrize("nested", [False, True])
def test_a_normalizer_that_multiplies_a_text_is_refused(pattern: Any, nested: bool, tmp_path: Path) -> None:
    library = byte_level()
    steps = [normalizers.Replace(pattern, "a" * 10)] * 3
    library.normalizer = normalizers.Sequence([*steps, normalizers.NFC()])
    if pattern == "a":  # 10 · 10 · 10 is at the bound
        HFTokenizer(write(library, tmp_path))
    more = normalizers.Sequence([normalizers.Replace("aa", "a" * 4)])
    library.normalizer = normalizers.Sequence([*steps, more if nested else normalizers.Replace("a", "aa")])
    with pytest.raises(CheckpointError, match="its normalizer makes a text more than 1,000 times as long"):
        HFTokenizer(write(library, tmp_path))


def charsmap(replacement: str) -> bytes:
    """The table of a ``Precompiled`` normalizer that replaces "a": a double-array trie, and the replacement."""
    units = [0] * 768
    units[0] = 256 << 10  # the root's children begin at 256
    units[256 ^ ord("a")] = ord("a") | 1 << 8 | (256 ^ ord("a") ^ 512) << 10  # has a leaf, which is unit 512: offset 0
    trie = b"".join(unit.to_bytes(4, "little") for unit in units)
    return len(trie).to_bytes(4, "little") + trie + replacement.encode() + b"\0"


def test_a_table_that_multiplies_a_text_is_refused(tmp_path: Path) -> None:
    library = byte_level()
    library.normalizer = normalizers.Sequence([normalizers.Precompiled(charsmap("é" * 1000))])
    assert library.normalizer.normalize_str("ab") == "é" * 1000 + "b"
    HFTokenizer(write(library, tmp_path))
    library.normalizer = normalizers.Precompiled(charsmap("é" * 1001))
    with pytest.raises(CheckpointError, match="its normalizer makes a text more than 1,000 times as long"):
        HFTokenizer(write(library, tmp_path))


def test_an_expression_that_backtracks_without_end_is_an_input_error(tmp_path: Path) -> None:
    """The library's limit of steps at one place of the text ends it: 2**30 of them are needed here."""
    library = byte_level()
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex("(h+)+$"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer = HFTokenizer(write(library, tmp_path))
    assert tokenizer.decode(tokenizer.encode("hhh")) == "hhh"
    with pytest.raises(InputError, match=r"tokenizer\.json cannot encode the text .*retry-limit"):
        tokenizer.encode("h" * 30 + "e")


def test_a_decoder_that_is_not_made_of_bytes_is_refused(tmp_path: Path) -> None:
    library = byte_level()
    library.decoder = decoders.WordPiece()
    with pytest.raises(UnsupportedError, match="WordPiece"):
        HFTokenizer(write(library, tmp_path))
