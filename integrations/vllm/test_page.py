"""``docs/vllm.md``: what a machine without a GPU can run of it runs as it stands there."""

from __future__ import annotations

import json
import re
import shlex
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from integrations.vllm.cases import CUB, close

import hyaena

PAGE = (Path(__file__).parents[2] / "docs" / "vllm.md").read_text(encoding="utf-8")
PROMPT = "import "


def own_text(count: int) -> str:
    """What hyaena writes, without numba: where that was imported, vLLM 0.32 starts no further engine."""
    return hyaena.generate(*hyaena.load("cub"), PROMPT, max_new_tokens=count, temperature=0, decoding="eager").text


def ask(url: str, body: dict[str, Any] | None = None) -> tuple[int, Any]:
    """Status and answer of a request, of a POST where there is a body."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=60) as answer:
            return answer.status, json.loads(answer.read() or "null")
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def test_the_program_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (program,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(program, "vllm.md", "exec"), names)
    close([names.pop("llm")])
    assert own_text(8) in capsys.readouterr().out


def test_the_server_answers() -> None:
    (command,) = re.findall(r"^python (-m vllm\.entrypoints.*FOLDER.*)$", PAGE, re.MULTILINE)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--block-size", "32"]
    options += ["--max-model-len", "256", "--enforce-eager", "--kv-cache-memory-bytes", str(64 * 2**20)]
    words = [sys.executable, *shlex.split(command.replace("FOLDER", str(CUB))), *options]
    url, body = f"http://127.0.0.1:{port}", {"model": str(CUB), "prompt": PROMPT, "max_tokens": 8, "temperature": 0}
    server = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        deadline = time.monotonic() + 200
        while not listens(port):
            assert server.poll() is None, server.communicate()[0][-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.2)
        status, answer = ask(f"{url}/v1/completions", body)
        assert status == 200
        assert answer["choices"][0]["text"] == own_text(8)
        status, answer = ask(f"{url}/v1/completions", body | {"prompt": PROMPT * 50})
        assert status == 400
        assert "maximum context length is 256 tokens" in answer["error"]["message"]
    finally:
        server.terminate()
        server.communicate(timeout=60)


def listens(port: int) -> bool:
    """Whether there is a server at a port of this machine; vLLM's listens when its engine is ready."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
