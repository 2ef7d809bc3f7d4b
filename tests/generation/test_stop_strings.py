"""Stop strings: the same text whatever the tokens, and never past a stop string."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hyaena.generation.stop_strings import StopStringFilter
from hyaena.tokenizers import ByteTokenizer


def shown(data: bytes, stops: list[str], prompt: bytes = b"") -> tuple[list[str], bool]:
    """The text that each byte shows, and whether a stop string ended it."""
    end = StopStringFilter(ByteTokenizer(), list(prompt), stops)
    parts = []
    for token in data:
        text, stopped = end.push(token)
        parts.append(text)
        if stopped:
            return parts, True
    text, stopped = end.finish()
    return [*parts, text], stopped


def by_the_definition(text: str, stops: list[str]) -> str:
    """Read character by character until a stop string is complete; the longest of those that are then complete."""
    for n in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:n].endswith(stop)]
        if complete:
            return text[: n - max(map(len, complete))]
    return text


letters = st.text("abé", max_size=14)
stop_strings = st.lists(st.text("abé", min_size=1, max_size=4), max_size=3)


@given(text=letters, stops=stop_strings)
def test_the_text_ends_at_the_stop_string_that_is_complete_first(text: str, stops: list[str]) -> None:
    parts, stopped = shown(text.encode(), stops)
    wanted = by_the_definition(text, stops)
    assert "".join(parts) == wanted
    assert stopped == (wanted != text)


@given(text=letters, more=letters, stops=stop_strings)
def test_nothing_that_was_shown_has_to_be_taken_back(text: str, more: str, stops: list[str]) -> None:
    """Whatever follows, what is on the screen is a beginning of the result; and no less could be held back."""
    end = StopStringFilter(ByteTokenizer(), [], stops)
    so_far = ""
    for token in text.encode():
        part, stopped = end.push(token)
        so_far += part
        if stopped:
            break
    assert by_the_definition(text + more, stops).startswith(so_far)
    held = text[len(so_far) :]
    if by_the_definition(text, stops) == text:
        assert not held or any(stop.startswith(held) for stop in stops)


class Pieces(ByteTokenizer):
    """Tokens of any bytes: one for each piece of a text."""

    def __init__(self, pieces: list[bytes]) -> None:
        super().__init__()
        self._pieces = pieces + [b""] * (self.vocab_size - len(pieces))


@given(text=letters, stops=stop_strings, cuts=st.lists(st.integers(0, 28), max_size=6))
def test_the_result_does_not_depend_on_the_cuts_between_tokens(text: str, stops: list[str], cuts: list[int]) -> None:
    """A token may complete several stop strings, and end in the middle of a character."""
    data = text.encode()
    ends = sorted({min(cut, len(data)) for cut in cuts} | {len(data)})
    pieces = [data[start:end] for start, end in itertools.pairwise([0, *ends])]
    end, parts = StopStringFilter(Pieces(pieces), [], stops), []
    for token in range(len(pieces)):
        part, stopped = end.push(token)
        parts.append(part)
        if stopped:
            break
    else:
        part, stopped = end.finish()
        parts.append(part)
    assert "".join(parts) == by_the_definition(text, stops)
    assert stopped == (by_the_definition(text, stops) != text)


def test_of_two_stop_strings_in_one_token_the_one_complete_first_counts() -> None:
    end = StopStringFilter(Pieces([b"abcd"]), [], ["bcd", "c"])
    assert end.push(0) == ("ab", True)


def test_only_what_may_become_a_stop_string_is_held_back() -> None:
    assert shown(b"one\n\ntwo", ["\n\n"]) == (["o", "n", "e", "", ""], True)
    assert shown(b"a\nb\nc", ["\n\n"]) == (["a", "", "\nb", "", "\nc", ""], False)


def test_the_end_shows_what_was_held_back() -> None:
    assert shown(b"ab", ["abc"]) == (["", "", "ab"], False)
    assert shown("aé".encode()[:-1], ["b"]) == (["a", "", "�"], False)


def test_a_stop_string_across_the_prompts_end_does_not_count() -> None:
    assert shown(b"c", ["bc"], prompt=b"ab") == (["c", ""], False)


def test_a_character_begun_by_the_prompt_is_finished() -> None:
    first, second = "é".encode()
    assert shown(bytes([second]), [], prompt=bytes([97, first])) == (["é", ""], False)


@pytest.mark.parametrize("stops", [["stop"], ["p", "stop"], ["stop", "op"]])
def test_two_stop_strings_complete_with_one_character(stops: list[str]) -> None:
    assert "".join(shown(b"full stop here", stops)[0]) == "full "
