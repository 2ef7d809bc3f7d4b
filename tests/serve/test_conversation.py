"""Conversations as prompts: what a message says stays text, and templates are found where folders have them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hyaena.serve.conversation import ChatTemplate, find_template
from hyaena.tokenizers import ByteTokenizer


class Special(ByteTokenizer):
    """Bytes, and two control tokens whose names are made of few letters."""

    special_tokens = {"</s>": 257, "<s": 258}  # noqa: RUF012


TOKENIZER = Special()
texts = st.text(alphabet="</s> ", max_size=6)


@pytest.mark.parametrize("source", ["{{ a }}{{ b }}</s>", "{{ a | trim }}{{ b | trim }}s>", "<{{ a.strip() }}>{{ b }}"])
@given(said=st.tuples(texts, texts))
def test_messages_beside_each_other_and_the_template_become_no_special_token(
    source: str, said: tuple[str, str]
) -> None:
    named = "{% set a = messages[0].content %}{% set b = messages[1].content %}" + source
    ids = ChatTemplate(named).encode(TOKENIZER, [{"role": "user", "content": text} for text in said])
    assert [token for token in ids if token > 256] == [257] * source.count("</s>")
    stripped = [text.strip() for text in said] if "trim" in source else [said[0].strip(), said[1]]
    a, b = stripped if "strip" in source or "trim" in source else said
    want = source.replace("{{ a }}", a).replace("{{ a | trim }}", a).replace("{{ a.strip() }}", a)
    want = want.replace("{{ b }}", b).replace("{{ b | trim }}", b)
    assert "".join("</s>" if token == 257 else chr(token) for token in ids) == want


def test_the_default_of_several_templates_is_taken(tmp_path: Path) -> None:
    several = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    for found, want in ((several, "plain"), (several[:1], None), ("one", "one"), ([3, None], None)):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": found}))
        template = find_template(None, [tmp_path], "model")
        assert (template and template.source) == want
