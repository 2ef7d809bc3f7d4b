"""``hyaena chat``: what is typed and what is shown."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import hyaena
from hyaena.adapters import LoRALinear, add_adapter, save_adapter
from hyaena.cli import main
from hyaena.cli.chat import Chat, converse, read_message
from hyaena.sampling import SamplingParams
from hyaena.serve.conversation import ChatTemplate
from hyaena.serve.engine import Engine, EngineSettings
from hyaena.tokenizers.chat import TEMPLATES
from serve.clients import until


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    model, tokenizer = hyaena.load("cub", dtype="float32")
    made = Engine(model, tokenizer, EngineSettings(max_rows=1, kv_bytes=2**24))
    made.start()
    yield made
    made.stop(timeout=10)


@pytest.fixture
def chat(engine: Engine) -> Chat:
    return Chat(engine, ChatTemplate(TEMPLATES["nous"]), SamplingParams(), 12)


def typed(*lines: str) -> Any:
    source = iter(lines)

    def read(prompt: str) -> str:
        line = next(source, None)
        if line is None:
            raise EOFError
        if line == "^C":
            raise KeyboardInterrupt
        return line

    return read


def test_a_conversation_is_read_again_only_where_it_is_new(
    chat: Chat, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    question = "a long question " * 20
    path = tmp_path / "chat.json"
    assert converse(chat, typed(question, "and?", "/stats", f"/save {path}")) == 0
    out = capsys.readouterr().out
    messages = json.loads(path.read_text())["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant", "user", "assistant"]
    assert messages[0]["content"] == question and messages[1]["content"] in out
    found = re.search(r"tokens read \((\d+) of them from the cache\)", out)
    assert found is not None and int(found[1]) >= 320  # as many as the first turn had, in whole pages
    want = hyaena.generate(
        chat.engine.model,
        chat.engine.tokenizer,
        chat.template.encode(chat.engine.tokenizer, messages[:1]),
        max_new_tokens=12,
        stop="\n### Instruction:",
    )
    assert want.text.strip() == messages[1]["content"]


def test_commands(chat: Chat, capsys: pytest.CaptureFixture[str]) -> None:
    lines = ["/help", "/system be brief", "hello", "/reset", "/nothing", "/save", "^C", "", "/quit", "never read"]
    assert converse(chat, typed(*lines)) == 0
    captured = capsys.readouterr()
    assert "/system TEXT" in captured.out and "Ctrl-D" in captured.out
    assert "there is no command /nothing" in captured.err and "/save takes the name" in captured.err
    assert chat.messages == [{"role": "system", "content": "be brief"}]


def test_what_cannot_be_saved_ends_no_conversation(
    chat: Chat, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    bad = ["/save .", "/save /", "/save ~no-such-user/x", "/save a\0b"]
    assert converse(chat, typed("h\udcffi", *bad, f"/save {tmp_path}/c.json")) == 0  # a byte that is no UTF-8
    assert capsys.readouterr().err.count("hyaena: error: cannot write ") == len(bad)
    assert json.loads((tmp_path / "c.json").read_text())["messages"][0]["content"] == "h\udcffi"


def test_a_message_may_have_several_lines() -> None:
    assert read_message(typed("one")) == "one"
    assert read_message(typed("one\\", "two")) == "one\ntwo"
    assert read_message(typed('"""', "one", "", "two", '"""')) == "one\n\ntwo"


def test_ctrl_c_stops_the_answer_and_keeps_the_conversation(chat: Chat) -> None:
    shown: list[str] = []

    def show(text: str) -> None:
        shown.append(text)
        if len(shown) == 3:
            raise KeyboardInterrupt

    chat.ask("hello", show)
    assert chat.messages[-1]["role"] == "assistant"
    assert chat.messages[-1]["content"] == "".join(shown[:3]).strip()
    chat.ask("again", lambda text: None)
    assert len(chat.messages) == 4


def test_ctrl_c_before_the_answer_takes_the_message_back(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted:
        def put(self, delta: object) -> None: ...

        def get(self) -> object:
            raise KeyboardInterrupt

    monkeypatch.setattr("hyaena.cli.chat.queue.SimpleQueue", Interrupted)
    chat.ask("hello", lambda text: None)
    assert chat.messages == []
    until(lambda: not chat.engine._requests, "the end of the answer")


def test_ctrl_c_at_any_place_keeps_the_session(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice, while the first one is told, and before the answer began."""
    monkeypatch.setattr(chat, "max_new_tokens", 10_000)
    said: list[str] = []

    def interrupted(*texts: object, **_: object) -> None:
        said.append(" ".join(map(str, texts)))
        if len(said) in (2, 3):
            raise KeyboardInterrupt

    monkeypatch.setattr("builtins.print", interrupted)
    assert converse(chat, typed("hello", "/help")) == 0
    assert said[2] == " \u2026" and said[4].startswith("/reset") and chat.messages == []
    until(lambda: not chat.engine._requests, "the end of the answer")
    monkeypatch.setattr(chat.template, "encode", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert converse(chat, typed("hello", "/help")) == 0


def test_bytes_that_are_no_text_do_not_end_a_session(chat: Chat, tmp_path: Path) -> None:
    """A terminal sends them where its encoding is another one."""
    chat.ask("caf\udce9", lambda text: None)
    chat.save(tmp_path / "chat.json")
    assert json.loads((tmp_path / "chat.json").read_text())["messages"][0]["content"] == "caf\udce9"


def test_a_conversation_that_is_too_long_is_refused(chat: Chat, capsys: pytest.CaptureFixture[str]) -> None:
    assert converse(chat, typed("x" * (chat.engine.max_length + 10))) == 0
    assert "/reset" in capsys.readouterr().err and chat.messages == []


def test_models_without_dialogue_are_refused(golden: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["chat", "--model", "cub"]) == 2
    assert "no dialogue" in capsys.readouterr().err
    assert main(["chat", "--model", str(tmp_path), "--chat-template", "none"]) == 2
    assert "there is no chat template none" in capsys.readouterr().err
    assert main(["chat", "--model", str(tmp_path / "no")]) == 2
    assert "no such model" in capsys.readouterr().err
    assert main(["chat", "--model", str(golden / "evo-tiny")]) == 2
    assert "--chat-template" in capsys.readouterr().err
    assert main(["chat", "--model", str(tmp_path), "--chat-template", "nous", "--device", ""]) == 2
    assert "--device is empty" in capsys.readouterr().err


def test_an_adapter_is_talked_to_with_its_own_template(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = hyaena.load("cub", dtype="float32")[0]
    add_adapter(model, rank=2, targets=("down_proj",))
    for module in model.modules():
        if isinstance(module, LoRALinear):
            torch.nn.init.normal_(module.lora_B, std=0.2)
    save_adapter(model, tmp_path, base="cub")
    (tmp_path / "chat_template.jinja").write_text("{{ messages[-1]['content'] }}")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xe9\nimport \n")))
    options = ["--device", "cpu", "--temperature", "0", "--max-new-tokens", "8"]
    assert main(["chat", "--model", "cub", "--adapter", str(tmp_path), *options]) == 0
    want = hyaena.generate(*hyaena.load("cub", dtype="float32", adapter=tmp_path), "import ", max_new_tokens=8)
    assert want.text.strip() and want.text in capsys.readouterr().out
