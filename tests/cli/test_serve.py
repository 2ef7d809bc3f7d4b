"""Options of ``hyaena serve`` that cannot be meant, refused before anything is loaded."""

from __future__ import annotations

import pytest

from hyaena import hub
from hyaena.cli import main

for module in ("fastapi", "uvicorn", "prometheus_client", "jinja2"):
    pytest.importorskip(module, reason="the command asks for the extra first")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--kv-memory", "0"], "--kv-memory must be a number above 0 (and below 1e9), not 0.0"),
        (["--kv-memory", "1e30"], "--kv-memory must be a number above 0 (and below 1e9), not 1e+30"),
        (["--max-body", "0"], "--max-body must be a number above 0"),
        (["--timeout", "nan"], "--timeout must be a number above 0"),
        (["--drain", "-1"], "--drain must be a number, 0 or more"),
        (["--prefix-memory", "inf"], "--prefix-memory must be a number, 0 or more"),
        (["--max-rows", "0"], "--max-rows must be at least 1, not 0"),
        (["--max-rows", "99999999999"], "--max-rows must be at most 65,536, not 99999999999"),
        (["--api-key", "secret", "--api-key", ""], "--api-key is empty: give a key, or leave it out"),
        (["--api-key", "schl\u00fcssel"], "a key has a space at an end, line feeds or letters outside ASCII"),
        (["--api-key", "good\n"], "a key has a space at an end, line feeds or letters outside ASCII"),
        (["--allow-origin", "http://a.example/"], "is no origin of a page"),
        (["--allow-origin", "localhost:3000"], "is no origin of a page"),
        (["--name", ""], "--name is empty"),
        (["--host", ""], "'' is no address to listen at: give 0.0.0.0 or ::"),
        (["--host", "*"], "'*' is no address to listen at: give 0.0.0.0 or ::"),  # glibc takes it for loopback
    ],
)
def test_mistakes_are_one_line(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "load_model", lambda *_, **__: pytest.fail("read the weights"))
    assert main(["serve", "--port", "0", *flags]) == 2
    err = capsys.readouterr().err
    assert err.startswith("hyaena: error: ") and err.count("\n") == 1 and message in err


def test_a_key_that_is_set_and_empty_does_not_open_the_server(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "load_model", lambda *_, **__: pytest.fail("read the weights"))
    monkeypatch.setenv("HYAENA_API_KEY", "")
    assert main(["serve", "--port", "0"]) == 2
    assert "HYAENA_API_KEY is set and empty" in capsys.readouterr().err
