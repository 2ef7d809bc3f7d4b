"""Programs that people have: the OpenAI client, LangChain, lm-evaluation-harness, curl."""

from __future__ import annotations

import asyncio
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import torch
from benchmarks.serve.process import ServerProcess
from langchain_openai import ChatOpenAI
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI

import hyaena
from hyaena.evals.harness import HyaenaLM
from hyaena.tokenizers.export import transformers_files

pytestmark = pytest.mark.timeout(600)

PATIENCE = 200.0
"""Seconds after which no answer comes any more, however busy the machine is."""

PROMPT = "def add(a, b):\n    "


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=PATIENCE)


def test_completions(client: openai.OpenAI, cub: Any) -> None:
    want = hyaena.generate(*cub, PROMPT, max_new_tokens=12, logprobs=2)
    answer = client.completions.create(model="cub", prompt=PROMPT, max_tokens=12, temperature=0, logprobs=2)
    (choice,) = answer.choices
    assert choice.text == want.text and choice.finish_reason == "length"
    assert answer.usage and answer.usage.completion_tokens == 12
    assert choice.logprobs and choice.logprobs.tokens and "".join(choice.logprobs.tokens) == want.text
    torch.testing.assert_close(choice.logprobs.token_logprobs, want.logprobs, atol=1e-4, rtol=1e-4)
    several = client.completions.create(model="cub", prompt=[PROMPT, "import "], n=2, max_tokens=3, seed=1)
    assert [one.index for one in several.choices] == [0, 1, 2, 3]


def test_streams(client: openai.OpenAI, cub: Any) -> None:
    want = hyaena.generate(*cub, PROMPT, max_new_tokens=12).text
    chunks = list(
        client.completions.create(
            model="cub",
            prompt=PROMPT,
            max_tokens=12,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == want
    assert chunks[-1].usage and chunks[-1].usage.completion_tokens == 12 and not chunks[-1].choices


def test_chats(client: openai.OpenAI, cub: Any) -> None:
    messages: Any = [{"role": "user", "content": "Say something."}]
    answer = client.chat.completions.create(
        model="cub", messages=messages, max_completion_tokens=9, temperature=0, logprobs=True, top_logprobs=2
    )
    (choice,) = answer.choices
    prompt = "### Instruction:\nSay something.\n\n### Response:\n"
    want = hyaena.generate(*cub, prompt, max_new_tokens=9)
    assert choice.message.role == "assistant" and choice.message.content == want.text
    assert choice.logprobs and choice.logprobs.content and len(choice.logprobs.content[0].top_logprobs) == 2
    chunks = list(
        client.chat.completions.create(model="cub", messages=messages, max_tokens=9, temperature=0, stream=True)
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == want.text
    assert chunks[-1].choices[0].finish_reason == "length"


def test_many_at_a_time(server: ServerProcess, cub: Any) -> None:
    prompts = [f"def f{i}(" for i in range(12)]

    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=PATIENCE) as client:

            async def one(prompt: str) -> str:
                stream = await client.completions.create(
                    model="cub", prompt=prompt, max_tokens=10, temperature=0, stream=True
                )
                return "".join([chunk.choices[0].text async for chunk in stream])

            return await asyncio.gather(*map(one, prompts))

    want = [one.text for one in hyaena.generate(*cub, prompts, max_new_tokens=10)]
    assert asyncio.run(ask()) == want


def test_embeddings_and_models(client: openai.OpenAI, cub: Any) -> None:
    texts = ["import os", "class A:"]
    answer = client.embeddings.create(model="cub", input=texts)  # base64, as the client asks for
    for text, found in zip(texts, answer.data, strict=True):
        (want,) = hyaena.embed(*cub, [text], "norm", pool="mean")
        np.testing.assert_allclose(found.embedding, np.asarray(want), atol=1e-4, rtol=1e-4)
    assert [model.id for model in client.models.list()] == ["cub"]
    assert client.models.retrieve("cub").object == "model"


def test_errors_are_the_exceptions_of_the_client(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="no model none") as missing:
        client.completions.create(model="none", prompt="a")
    assert missing.value.code == "model_not_found" and missing.value.param == "model"
    with pytest.raises(openai.BadRequestError, match="n: "):
        client.completions.create(model="cub", prompt="a", n=1000)
    with pytest.raises(openai.BadRequestError, match="tools"):
        tool: Any = {"type": "function", "function": {"name": "f"}}
        client.chat.completions.create(model="cub", messages=[{"role": "user", "content": "a"}], tools=[tool])
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="cub", prompt=[5] * 70_000, max_tokens=1)
    assert long.value.code == "context_length_exceeded"


def test_langchain(server: ServerProcess, cub: Any) -> None:
    chat = ChatOpenAI(base_url=f"{server.url}/v1", api_key="none", model="cub", temperature=0, max_tokens=9)  # type: ignore[arg-type, call-arg]
    prompt = "### Instruction:\nSay something.\n\n### Response:\n"
    want = hyaena.generate(*cub, prompt, max_new_tokens=9).text
    answer = chat.invoke("Say something.")
    assert answer.content == want and answer.usage_metadata and answer.usage_metadata["output_tokens"] == 9
    assert "".join(str(part.content) for part in chat.stream("Say something.")) == want
    assert asyncio.run(chat.ainvoke("Say something.")).content == want
    assert [one.content for one in chat.batch(["Say something."] * 3)] == [want] * 3


def test_lm_evaluation_harness(server: ServerProcess, cub: Any, tmp_path: Path) -> None:
    """The harness's own client, with cub's tokenizer in the form of transformers, gives the scores of HyaenaLM."""
    for name, data in transformers_files(cub[1]).items():
        (tmp_path / name).write_bytes(data)
    remote = LocalCompletionsAPI(
        base_url=f"{server.url}/v1/completions",
        model="cub",
        tokenizer_backend="huggingface",
        tokenizer=str(tmp_path),
        tokenized_requests=True,
        add_bos_token=True,
        batch_size=3,
        max_length=2048,
    )
    pairs = [("import", " os"), ("def f(x):\n    return", " x + 1"), ("class A", "(object):"), ("a" * 300, "bcd")]
    instances = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    want = HyaenaLM(*cub).loglikelihood(instances)
    assert len({round(value, 2) for value, _ in want}) == len(pairs)
    for (have, greedy), (value, is_greedy) in zip(remote.loglikelihood(instances), want, strict=True):
        assert math.isclose(have, value, abs_tol=1e-4) and greedy == is_greedy
    texts = [Instance("generate_until", {}, ("import ", {"until": ["\n"], "max_gen_toks": 12}), 0)]
    assert remote.generate_until(texts) == HyaenaLM(*cub).generate_until(texts)


def test_curl(server: ServerProcess, cub: Any) -> None:
    body = json.dumps({"model": "cub", "prompt": "import ", "max_tokens": 6, "temperature": 0})
    command = [
        "curl",
        "-sS",
        "--fail",
        "--noproxy",
        "*",
        f"{server.url}/v1/completions",
        "-H",
        "Content-Type: application/json",
    ]
    output = subprocess.run([*command, "-d", body], check=True, capture_output=True, text=True, timeout=PATIENCE).stdout
    want = hyaena.generate(*cub, "import ", max_new_tokens=6).text
    assert json.loads(output)["choices"][0]["text"] == want


def test_no_request_of_the_interface_page_makes_an_error(server: ServerProcess, tmp_path: Path) -> None:
    command = [
        str(Path(sys.executable).parent / "st"), "run", f"{server.url}/openapi.json", "--checks", "not_a_server_error",
        "--phases", "coverage", "--seed", "1", "--request-timeout", f"{PATIENCE:g}",
        "--generation-database", ":memory:", "--no-color",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=2 * PATIENCE, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-500:]
