"""Tokenizers: nothing is lost, nothing is broken, and the stream says what the whole says."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from hyaena.errors import CheckpointError, InputError, UnsupportedError
from hyaena.tokenizers import ByteTokenizer, CharacterTokenizer, HFTokenizer, Tokenizer, load_tokenizer

CORPUS = [
    "The four species of hyenas are the striped hyena, the brown hyena, the spotted hyena and the aardwolf.",
    "the the the hyena hyena laughs; héllo wörld, 你好 你好 🐆🐆, Ünïcödé",
    "    indented = code(x)\n\treturn None\n",
]
TEXTS = ["The striped hyena", " leading", "  two  spaces ", "new\nline\ttab", "héllo 你好 🐆 Ω", "<0x41>", "a", ""]
BYTE_NAMES = [f"<0x{value:02X}>" for value in range(256)]


def sentencepiece_like(decoder: str) -> Library:
    """A BPE file as Llama's and Mistral's look: spaces become U+2581, one is put before the text, bytes as fallback."""
    library = Library(models.BPE(byte_fallback=True, unk_token="<unk>"))
    if decoder == "metaspace":
        library.pre_tokenizer = pre_tokenizers.Metaspace()
    else:
        library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<unk>", "<s>", "</s>", *BYTE_NAMES], show_progress=False
    )
    library.train_from_iterator(CORPUS, trainer)
    spec = json.loads(library.to_str())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if not token["content"].startswith("<0x")]
    library = Library.from_str(json.dumps(spec))
    if decoder == "metaspace":
        library.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()])
    else:
        replace = decoders.Replace("▁", " ")
        library.decoder = decoders.Sequence(
            [replace, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    return library


def byte_level() -> Library:
    """A BPE file as GPT-2's looks."""
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(CORPUS, trainer)
    library.add_tokens(["an added wörd"])
    return library


def write(library: Library, folder: Path, **settings: object) -> Path:
    path = folder / "tokenizer.json"
    library.save(str(path))
    if settings:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


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
def test_the_stream_says_what_the_whole_says(every: dict[str, Tokenizer], kind: str, data: st.DataObject) -> None:
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


def test_special_tokens_have_no_text(every: dict[str, Tokenizer]) -> None:
    tokenizer = every["strip"]
    ids = tokenizer.encode("hyena", add_special_tokens=False)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, None)
    assert tokenizer.decode([1, *ids, 2]) == "hyena"


def test_bos_goes_in_front_once(every: dict[str, Tokenizer]) -> None:
    tokenizer = every["strip"]
    assert tokenizer.encode("hyena")[:2].count(1) == 1
    assert tokenizer.encode("<s>hyena").count(1) == 1
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


def test_a_decoder_that_is_not_made_of_bytes_is_refused(tmp_path: Path) -> None:
    library = byte_level()
    library.decoder = decoders.WordPiece()
    with pytest.raises(UnsupportedError, match="WordPiece"):
        HFTokenizer(write(library, tmp_path))
