"""``hyaena generate``: prompts from everywhere, text to standard output, one line for every mistake."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers

import hyaena
from hyaena.adapters import add_adapter, save_adapter
from hyaena.checkpoints import save_model
from hyaena.cli import main
from hyaena.cli.generate import PrefillBar
from hyaena.config import ModelConfig
from hyaena.model import StripedHyena

CONFIG = ModelConfig(
    vocab_size=259,
    hidden_size=32,
    layer_types=("hyena", "attention"),
    intermediate_size=48,
    num_attention_heads=4,
    num_key_value_heads=2,
    state_size=2,
    max_length=512,
    tokenizer="bytes",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    model = StripedHyena(CONFIG)
    with torch.no_grad():
        model.embed_tokens.weight.mul_(10)
        model.embed_tokens.weight[257] = 0
    return str(save_model(model, tmp_path_factory.mktemp("tiny") / "model"))


def wanted(folder: str, prompt: Any, **options: Any) -> Any:
    model, tokenizer = hyaena.load(folder)
    return hyaena.generate(model, tokenizer, prompt, **options)


def standard_input(monkeypatch: pytest.MonkeyPatch, data: bytes, *, tty: bool = False) -> None:
    stdin = io.TextIOWrapper(io.BytesIO(data))
    stdin.isatty = lambda: tty  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stdin", stdin)


def test_the_text_goes_to_standard_output(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--model", folder, "--max-new-tokens", "9", "def main("]) == 0
    captured = capsys.readouterr()
    assert captured.out == wanted(folder, "def main(", max_new_tokens=9).text + "\n"
    assert captured.err == ""


@pytest.fixture
def adapter(folder: str, tmp_path: Path) -> str:
    model = hyaena.load_model(folder)
    add_adapter(model, rank=2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_()
    return str(save_adapter(model, tmp_path / "adapter"))


def test_an_adapter_changes_what_is_written(folder: str, adapter: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", "--model", folder, "--max-new-tokens", "9"]
    assert main([*command, "--adapter", adapter, "def main("]) == 0
    model, tokenizer = hyaena.load(folder, adapter=adapter)
    expected = hyaena.generate(model, tokenizer, "def main(", max_new_tokens=9).text
    assert capsys.readouterr().out == expected + "\n"
    assert expected != wanted(folder, "def main(", max_new_tokens=9).text


def test_a_missing_adapter_is_one_line(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--model", folder, "--adapter", folder, "x"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "a model, not an adapter" in captured.err and captured.err.count("\n") == 1


def test_a_prompt_comes_from_an_argument_a_file_or_standard_input(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = b"byte \xff by byte\r\n"
    (tmp_path / "prompt.txt").write_bytes(data)
    standard_input(monkeypatch, data)
    out = []
    for source in (["--prompt-file", str(tmp_path / "prompt.txt")], [os.fsdecode(data)], []):
        assert main(["generate", "--model", folder, "--max-new-tokens", "9", *source]) == 0
        out.append(capsys.readouterr().out)
    assert out == [wanted(folder, data, max_new_tokens=9).text + "\n"] * 3


def test_every_option_arrives(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--temperature 1.5 --top-k 50 --top-p 0.9 --min-p 0.01 --repetition-penalty 1.2 --seed 4"
    more = "--max-new-tokens 12 --method fft --prefill-chunk 7 --max-length 40 --logprobs 2 --json --stop zz"
    assert main(["generate", "--model", folder, *flags.split(), *more.split(), "import os"]) == 0
    document = json.loads(capsys.readouterr().out)
    completion = wanted(
        folder,
        "import os",
        max_new_tokens=12,
        temperature=1.5,
        top_k=50,
        top_p=0.9,
        min_p=0.01,
        repetition_penalty=1.2,
        seed=4,
        logprobs=2,
        stop="zz",
    )
    assert document["model"] == folder
    assert (document["text"], document["tokens"]) == (completion.text, completion.tokens)
    assert document["finish_reason"] == completion.finish_reason
    assert document["logprobs"] == pytest.approx(completion.logprobs, abs=1e-4)  # fft against blocked, float32
    assert [len(pairs) for pairs in document["top_logprobs"]] == [2] * len(completion.tokens)
    assert document["stats"]["prompt_tokens"] == 10


def test_a_cpu_computes_in_float32_unless_told(folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = hyaena.load(folder)
    half = str(save_model(model.bfloat16(), tmp_path / "half"))

    def said(*flags: str) -> list[float]:
        assert (
            main(["generate", "--model", half, "--device", "cpu", "--json", "--max-new-tokens", "4", *flags, "abc"])
            == 0
        )
        return json.loads(capsys.readouterr().out)["logprobs"]

    def computed(dtype: str) -> list[float]:
        model, _ = hyaena.load(half, dtype=dtype)
        return hyaena.generate(model, tokenizer, "abc", max_new_tokens=4).logprobs

    assert said() == computed("float32") != computed("bfloat16")
    assert said("--dtype", "bfloat16") == computed("bfloat16")


def test_json_has_no_infinities(
    folder: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model may forbid tokens; their log-probability is -infinity, which JSON does not know."""
    forward = StripedHyena.forward

    def forbidding(self: StripedHyena, *args: Any, **options: Any) -> torch.Tensor:
        logits = forward(self, *args, **options).clone()
        logits[..., 2:] = -torch.inf
        return logits

    monkeypatch.setattr(StripedHyena, "forward", forbidding)
    assert (
        main(
            [
                "generate",
                "--model",
                folder,
                "--json",
                "--logprobs",
                "3",
                "--max-new-tokens",
                "2",
                "--decoding",
                "eager",
                "abc",
            ]
        )
        == 0
    )
    text = capsys.readouterr().out
    document = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert [[value is None for _, value in pairs] for pairs in document["top_logprobs"]] == [[False, False, True]] * 2


def test_the_prompt_can_be_shown_first(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--model", folder, "--max-new-tokens", "9", "--echo", "def main("]) == 0
    captured = capsys.readouterr()
    assert captured.out == "def main(" + wanted(folder, "def main(", max_new_tokens=9).text + "\n"


def test_a_byte_order_mark_is_no_part_of_a_prompt(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = b"\xef\xbb\xbfabc"
    (tmp_path / "prompt.txt").write_bytes(data)
    standard_input(monkeypatch, data)
    for source in (["--prompt-file", str(tmp_path / "prompt.txt")], []):
        assert main(["generate", "--model", folder, "--max-new-tokens", "2", "--json", *source]) == 0
        assert json.loads(capsys.readouterr().out)["stats"]["prompt_tokens"] == 4


def test_a_stop_token_ends_the_output(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["generate", "--model", folder, "--max-new-tokens", "9", "--json", "abc"]
    assert main(flags) == 0
    tokens = json.loads(capsys.readouterr().out)["tokens"]
    assert main([*flags, "--stop-token-id", "258", "--stop-token-id", str(tokens[4])]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["tokens"] == tokens[: tokens.index(tokens[4]) + 1]
    assert document["finish_reason"] == "stop"


def test_special_tokens_in_a_prompt_need_a_flag(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    library = Library(models.BPE({name: i for i, name in enumerate(alphabet)}, []))
    library.pre_tokenizer, library.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    library.add_special_tokens(["</s>"])
    files = {"tokenizer.json": library.to_str().encode()}
    model = StripedHyena(dataclasses.replace(CONFIG, tokenizer="hf"))
    folder = str(save_model(model, tmp_path / "model", extra_files=files))
    counts = []
    for flags in ([], ["--special"]):
        assert main(["generate", "--model", folder, "--max-new-tokens", "1", "--json", *flags, "ab</s>"]) == 0
        counts.append(json.loads(capsys.readouterr().out)["stats"]["prompt_tokens"])
    assert counts == [6, 3]


def test_stats_are_the_last_line_of_standard_error(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--model", folder, "--max-new-tokens", "5", "--stats", "abc"]) == 0
    line = capsys.readouterr().err.splitlines()[-1]
    for part in ("loaded in ", "4 + 5 tokens", "time to first token", "tokens/s", "peak memory", "MiB"):
        assert part in line


def test_a_stop_string_ends_the_output(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["generate", "--model", folder, "--temperature", "2", "--seed", "3", "--max-new-tokens", "40", "abc"]
    assert main(flags) == 0
    whole = capsys.readouterr().out
    stop = whole[7:9]
    assert main([*flags, "--stop", "not there", "--stop", stop]) == 0
    assert capsys.readouterr().out.removesuffix("\n") == whole[: whole.index(stop)].removesuffix("\n")


def test_a_terminal_that_cannot_show_a_character_gets_a_question_mark(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    flags = ["--temperature", "3", "--seed", "1", "--max-new-tokens", "40"]  # random bytes: some are not ASCII
    assert main(["generate", "--model", folder, *flags, "abc"]) == 0
    assert b"?" in out.buffer.getvalue()  # type: ignore[attr-defined]


def test_the_bar_shows_only_for_prompts_of_several_passes(capsys: pytest.CaptureFixture[str]) -> None:
    PrefillBar()(5, 5)
    assert capsys.readouterr().err == ""
    bar = PrefillBar()
    for done in (10, 20, 25):
        bar(done, 25)
    assert "reading" in capsys.readouterr().err


def test_no_bar_where_standard_error_is_not_a_terminal(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--prefill-chunk", "8", "--max-new-tokens", "2"]
    assert main(["generate", "--model", folder, *flags, "x" * 60]) == 0
    assert capsys.readouterr().err == ""


def test_samples_biases_and_allowed_tokens(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [
        "--temperature",
        "1",
        "--seed",
        "3",
        "--allowed",
        "ACGT",
        "--logit-bias",
        "257=-100",
        "--logit-bias",
    ]
    assert main(["generate", "--model", folder, *flags, "65=1.5", "--json", "--samples", "3", "AC"]) == 0
    rows = json.loads(capsys.readouterr().out)["completions"]
    options: Any = {"temperature": 1.0, "seed": 3, "allowed_tokens": "ACGT", "logit_bias": {257: -100, 65: 1.5}}
    model, tokenizer = hyaena.load(folder)
    completions = hyaena.generate(model, tokenizer, "AC", n=3, **options)
    assert [row["text"] for row in rows] == [row.text for row in completions]
    assert all(set(row["text"]) <= set("ACGT") for row in rows) and len({row["text"] for row in rows}) == 3


def test_a_prompt_is_saved_and_continued(folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, longer = str(tmp_path / "p"), str(tmp_path / "longer")
    command = ["generate", "--model", folder, "--max-new-tokens", "6"]

    def output(*flags: str) -> str:
        assert main([*command, *flags]) == 0
        return capsys.readouterr().out

    assert output("import os", "--save-prefix", path) == output("import os")
    assert output("--prefix-file", path) == output("import os")
    assert output("--prefix-file", path, ".path as p") == output("import os.path as p")
    assert output("--prefix-file", path, "--save-prefix", longer, ".path") == output("import os.path")
    assert output("--prefix-file", longer, " as p") == output("import os.path as p")
    assert main([*command, "--prefix-file", str(tmp_path / "none"), "x"]) == 2
    assert "does not exist" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["", "--max-new-tokens", "5"], "the prompt is empty"),
        (["x" * 600], "pass the maximum length 512"),
        (["a", "--prompt-file", "b"], "the prompt is given twice"),
        (["--prompt-file", "/nowhere/prompt"], "cannot read the prompt file /nowhere/prompt"),
        (["a", "--logprobs", "3"], "--logprobs needs --json"),
        (["a", "--temperature", "-1"], "temperature must be 0 or more"),
        (["a", "--method", "modal-scan"], "unknown method 'modal-scan'"),
        (["a", "--model", "no-such-model"], "no-such-model"),
        (["a", "--dtype", "float7"], "float7"),
        (["a", "--device", ""], "--device is empty"),
        (["a", "--decoding", "cuda_graph", "--device", "cpu"], "graphs are captured on CUDA devices"),
        (["a", "--top-k", "-1"], "top_k must be a whole number"),
        (["a", "--top-p", "nan"], "top_p must be above 0"),
        (["a", "--seed", "-3"], "seed must be a whole number"),
        (["a", "--stop", ""], "a stop string is empty"),
        (["a", "--stop-token-id", "259"], "stop_token_ids: token id 259 is outside"),
        (["a", "--json", "--logprobs", "260"], "logprobs must be between 0 and the vocabulary size 259"),
        (["a", "--max-length", "0"], "max_length must be at least 1"),
        (["a", "--prefill-chunk", "0"], "prefill_chunk must be at least 1"),
        (["a", "--echo", "--json"], "--echo is for text"),
        (["a", "--samples", "2"], "--samples needs --json or --output"),
        (["a", "--json", "--samples", "0"], "n must be between 1 and 1,048,576"),
        (["a", "--logit-bias", "5"], "--logit-bias '5' is not understood: write a token's id and a number, 5=-1.5"),
        (["a", "--logit-bias", "5=200"], "a bias of logit_bias must be a number up to 100"),
        (["a", "--allowed", ""], "allowed_tokens is empty"),
        (["a", "--logit-bias", "5=1", "--logit-bias", "5=2"], "--logit-bias '5=2' is the second one of token 5"),
        (["a", "--batch-rows", "2"], "--batch-rows needs --output"),
        (["", "--save-prefix", "p"], "the prompt is empty"),
        (["a", "--save-prefix", ""], "cannot write .: name a file"),
        (["a", "--save-prefix", "/nowhere/p"], "name a file in a folder that exists"),
        (["a", "--save-prefix", "p", "--method", "truncated"], "a prefix keeps no windows of inputs"),
        (["a", "--prefix-file", "/nowhere/p"], "the prefix /nowhere/p does not exist"),
        (["a", "--prefix-file", __file__], "is damaged, or no safetensors file"),
        (["a", "--prefix-file", "p", "--method", "truncated"], "a prefix keeps no windows of inputs"),
    ],
)
def test_mistakes_are_one_line_before_weights_are_read(
    folder: str,
    flags: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("hyaena.hub.load_model", lambda *_, **__: pytest.fail("the weights were read"))
    flags = flags if "--model" in flags else ["--model", folder, *flags]
    assert main(["generate", *flags]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("hyaena: error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err


def test_a_prompt_that_does_not_end_is_refused(
    folder: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hyaena.cli.generate.MAX_PROMPT_BYTES", 2**20)
    assert main(["generate", "--model", folder, "--prompt-file", "/dev/zero"]) == 2
    assert "the prompt file /dev/zero is larger than 1 MiB" in capsys.readouterr().err


def test_no_prompt_at_a_terminal_is_a_mistake(
    folder: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    standard_input(monkeypatch, b"", tty=True)
    assert main(["generate", "--model", folder]) == 2
    assert "there is no prompt" in capsys.readouterr().err


def test_numbers_that_go_wrong_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = StripedHyena(CONFIG)
    with torch.no_grad():  # finite in the file, not in the computation
        model.layers[1].mlp.up_proj.weight.fill_(3e38)  # pyright: ignore
    folder = str(save_model(model, tmp_path / "model"))
    assert main(["generate", "--model", folder, "abc"]) == 2
    error = capsys.readouterr().err
    assert "first appear in layer 1 (attention)" in error
    assert error.count("\n") == 1


def test_as_a_process(folder: str) -> None:
    """Streams through a pipe, and importing the command costs no torch."""
    code = (
        "import sys, hyaena.cli.generate; assert 'torch' not in sys.modules; import hyaena.cli as c; sys.exit(c.main())"
    )
    command = [sys.executable, "-c", code, "generate", "--model", folder, "--max-new-tokens", "5", "--stats"]
    done = subprocess.run(command, input=b"def main(", capture_output=True, check=True)
    assert done.stdout.decode() == wanted(folder, "def main(", max_new_tokens=5).text + "\n"
    assert b"tokens/s" in done.stderr
