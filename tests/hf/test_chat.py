"""The Nous prompt format as a chat template: texts, ids, and what the assistant says."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("transformers")

import hyaena.hf
from hyaena.errors import InputError
from hyaena.hf import fast_tokenizer, set_chat_template
from hyaena.tokenizers import ByteTokenizer

ONE = [{"role": "user", "content": "Name a hyena."}, {"role": "assistant", "content": "The aardwolf."}]


@pytest.fixture
def tokenizer() -> Any:
    made = fast_tokenizer(ByteTokenizer())
    set_chat_template(made)
    return made


def text(tokenizer: Any, messages: list[dict[str, str]], **options: Any) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, **options)


def test_one_turn_is_the_published_format(tokenizer: Any) -> None:
    prompt = "<s>### Instruction:\nName a hyena.\n\n### Response:\n"
    assert text(tokenizer, ONE[:1], add_generation_prompt=True) == prompt
    assert text(tokenizer, ONE) == prompt + "The aardwolf.</s>"


def test_turns_and_a_system_message(tokenizer: Any) -> None:
    system = [{"role": "system", "content": "Be brief."}]
    expected = (
        "<s>Be brief.\n\n### Instruction:\nName a hyena.\n\n### Response:\nThe aardwolf.</s>\n\n"
        "### Instruction:\nName a hyena.\n\n### Response:\nThe aardwolf.</s>"
    )
    assert text(tokenizer, system + ONE + ONE) == expected


def test_each_conversation_begins_with_what_came_before(tokenizer: Any) -> None:
    """So that a cache of the turns before can be continued, and TRL finds the completion behind its prompt."""
    for messages in (ONE, ONE + ONE):
        prompt = text(tokenizer, messages[:-1], add_generation_prompt=True)
        assert text(tokenizer, messages).startswith(prompt)
        assert text(tokenizer, messages, add_generation_prompt=True).startswith(text(tokenizer, messages))


def test_special_tokens_and_what_the_assistant_says(tokenizer: Any) -> None:
    done = tokenizer.apply_chat_template(ONE + ONE, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    ids, said = done["input_ids"], done["assistant_masks"]
    assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1
    assert [i for i, token in enumerate(ids) if token == tokenizer.eos_token_id][-1] == len(ids) - 1
    assert tokenizer.decode([t for t, s in zip(ids, said, strict=True) if s]) == "The aardwolf.</s>" * 2
    turn = [*b"### Instruction:\nName a hyena.\n\n### Response:\nThe aardwolf.", tokenizer.eos_token_id]
    assert ids == [tokenizer.bos_token_id, *turn, *b"\n\n", *turn]


@pytest.mark.parametrize(
    "messages",
    [[{"role": "tool", "content": "x"}], [*ONE, {"role": "system", "content": "late"}]],
)
def test_other_roles_are_refused(tokenizer: Any, messages: list[dict[str, str]]) -> None:
    with pytest.raises(Exception, match="the roles are user and assistant"):
        text(tokenizer, messages)


def test_bad_names_and_tokenizers_without_an_end(tokenizer: Any) -> None:
    with pytest.raises(InputError, match="no chat template nos: choose nous"):
        set_chat_template(tokenizer, "nos")
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="no end token"):
        hyaena.hf.set_chat_template(tokenizer)
