"""``hyaena info``: its numbers are the model's, and its page reads well in any terminal."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from configs import TINY
from hyaena import hub
from hyaena.checkpoints import load_model, save_model
from hyaena.cli import main
from hyaena.cli.info import decay_steps, describe, methods, render, render_methods
from hyaena.config import ModelConfig, preset_names
from hyaena.errors import InputError
from hyaena.model import StripedHyena
from hyaena.ops import METHODS

SMALL = replace(TINY, hidden_size=8, name="small")


def info(*args: object) -> int:
    return main(["info", *map(str, args)], commands={"info": "hyaena.cli.info"})


def as_json(capsys: pytest.CaptureFixture[str], *args: object) -> dict[str, Any]:
    assert info(*args, "--json") == 0
    return json.loads(capsys.readouterr().out)


# --- the numbers -----------------------------------------------------------------------------------------------------


def test_a_configuration_alone_needs_no_torch() -> None:
    code = "import sys; from hyaena.cli import main; main(sys.argv[1:], commands={'info': 'hyaena.cli.info'}); "
    code += "sys.exit('torch' in sys.modules)"
    path = "sh-7b"
    result = subprocess.run(
        [sys.executable, "-c", code, "info", str(path)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0 and "7,646,023,680" in result.stdout


def test_the_7b_remembers_what_is_published(capsys: pytest.CaptureFixture[str]) -> None:
    """In bfloat16: 65,536 bytes for every token, and 1.75 MiB of Hyena state whatever the length."""
    known = as_json(capsys, "sh-7b")
    assert known["cache"]["bytes_per_token"] == 65_536
    assert known["cache"]["bytes_per_sequence"] == 1.75 * 2**20
    assert known["weights"] is None and known["filters"] is None
    assert known["parameters"]["total"] == 7_646_023_680


def test_a_cache_that_load_refuses_has_no_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = replace(TINY, hidden_size=24, num_attention_heads=4, num_key_value_heads=2)  # heads of 6 channels
    save_model(StripedHyena(config), tmp_path)
    with pytest.raises(InputError) as refused:
        hub.load_model(tmp_path, cache_dtype="int8")
    assert info(tmp_path, "--cache-dtype", "int8") == 2
    assert capsys.readouterr() == ("", f"hyaena: error: {refused.value}\n")
    assert as_json(capsys, tmp_path, "--cache-dtype", "float16")["cache"]["kv_dtype"] == "float16"


def test_cache_bytes_are_those_of_the_models_cache(golden_case: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = as_json(capsys, golden_case)["cache"]
    model = load_model(golden_case)
    for length in (1, 100):
        expected = model.make_cache(1, max_length=length).nbytes
        assert cache["bytes_per_sequence"] + length * cache["bytes_per_token"] == expected


def test_parts_are_those_of_the_model(golden_case: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = as_json(capsys, golden_case)["parameters"]
    model = load_model(golden_case)
    counted = dict.fromkeys(("embeddings", "mlp", "norms", *model.config.layer_types), 0)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            part = "norms"
        elif ".mlp." in name:
            part = "mlp"
        elif ".mixer." in name:
            part = model.config.layer_types[int(name.split(".")[1])]
        else:
            part = "embeddings"
        counted[part] += parameter.numel()
    assert parts == {"total": sum(counted.values()), **counted}


def test_decay_is_the_first_step_at_which_the_envelope_is_small() -> None:
    torch.manual_seed(0)
    size, weight = torch.rand(50, 3).double() ** 0.1, torch.rand(50, 3).double()
    steps = decay_steps(size, weight)

    def envelope(t: torch.Tensor) -> torch.Tensor:
        return (weight * size ** t[:, None]).sum(1)

    start = envelope(torch.zeros(50).double())
    assert bool((envelope(steps) <= 1e-3 * start).all())
    assert bool((envelope(steps - 1) > 1e-3 * start).all())


@pytest.mark.parametrize(
    ("size", "weight", "steps"),
    [
        ([0.5, 0.5], [1.0, 1.0], 10),  # 2^-10 < 1e-3 < 2^-9
        ([0.09, 0.9], [1.0, 0.0], 3),  # a mode without weight does not count
        ([0.0, 0.0], [1.0, 1.0], 1),
        ([0.9, 0.9], [0.0, 0.0], 0),
        ([1.0, 0.5], [1.0, 1.0], float("inf")),
        ([1.1, 0.5], [1e-9, 1.0], float("inf")),
        ([1.1, 0.5], [0.0, 1.0], 10),
    ],
)
def test_decay_of_special_filters(size: list[float], weight: list[float], steps: float) -> None:
    assert decay_steps(torch.tensor([size]).double(), torch.tensor([weight]).double()).tolist() == [steps]


def test_poles_outside_the_unit_circle_are_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = StripedHyena(SMALL)
    with torch.no_grad():
        model.layers[2].mixer.long_filter.poles[3, 1] = torch.tensor([0.9, 0.9])
        model.layers[2].mixer.long_filter.poles[5, 0] = torch.tensor([0.0, -2.0])
        model.layers[2].mixer.long_filter.poles[6, 0] = torch.tensor([1.0, 0.0])  # on it, not outside
    save_model(model, tmp_path)
    first, second = as_json(capsys, tmp_path)["filters"]
    assert (first["layer"], second["layer"]) == (0, 2)
    assert first["outside_unit_circle"] == []
    found = [(pole["channel"], pole["mode"]) for pole in second["outside_unit_circle"]]
    assert found == [(5, 0), (3, 1)]  # the largest first
    assert second["outside_unit_circle"][0]["modulus"] == 2.0
    assert second["decay_steps"]["max"] is None  # JSON has no infinity
    assert sum(second["decay_histogram"]) == 8
    assert info(tmp_path) == 0
    page = capsys.readouterr().out
    assert "2 of 16" in page and "the largest: channel 5 mode 0 |p| = 2.0000000" in page and "∞" in page


@pytest.mark.parametrize("layout", ["hyaena", "original"])
def test_both_layouts_say_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str], layout: Any) -> None:
    model = StripedHyena(SMALL)
    save_model(model, tmp_path / "a")
    save_model(model, tmp_path / "b", layout=layout, max_shard_size=2000)
    a, b = (as_json(capsys, tmp_path / name) for name in "ab")
    assert len(b["weights"]["files"]) > 1
    assert a["filters"] == b["filters"] and a["config"] == b["config"] and a["cache"] == b["cache"]


def test_real_modes_decay_by_the_exponential_of_their_logarithms(tmp_path: Path, capsys: Any) -> None:
    config = replace(SMALL, layer_types=("hyena_li",))
    log_poles = torch.full((8, 2), 0.5).log()
    log_poles[3, 1] = 0.25  # grows
    model = StripedHyena(config)
    with torch.no_grad():
        model.layers[0].mixer.long_filter.log_poles.copy_(log_poles)
        model.layers[0].mixer.long_filter.residues.fill_(1.0)
    save_model(model, tmp_path)
    (layer,) = as_json(capsys, tmp_path)["filters"]
    assert layer["decay_steps"] == {"min": 10, "median": 10, "max": None}  # 2^-10 < 1e-3 < 2^-9
    (pole,) = layer["outside_unit_circle"]
    assert (pole["channel"], pole["mode"]) == (3, 1) and pole["modulus"] == pytest.approx(1.2840254)


# --- the page --------------------------------------------------------------------------------------------------------


def page(config: ModelConfig, **options: Any) -> list[str]:
    return list(render({"source": "here", **describe(config, None)}, **options))


def test_layers_are_drawn_as_stripes() -> None:
    lines = page(replace(SMALL, layer_types=("hyena", "attention", "hyena", "hyena")))
    assert lines[0] == "small   here"
    assert lines[2] == lines[3] == "  ░░██░░░░"
    assert lines[5] == "  ░░ hyena 3   ██ attention 1"


def test_many_layers_are_drawn_narrow_and_wrapped() -> None:
    lines = page(replace(SMALL, layer_types=("hyena",) * 100))
    assert lines[2] == "  " + "░" * 96 and lines[5] == "  " + "░" * 4
    assert lines[4].split() == [str(i) for i in range(0, 96, 8)] and lines[7].strip() == "96"


def test_evo2_is_drawn_in_four_kinds(capsys: pytest.CaptureFixture[str]) -> None:
    lines = page(ModelConfig.from_name("evo2-7b"))
    assert lines[2] == "  " + "▓▓▒▒░░██" + "▓▓▒▒░░▓▓▒▒░░██" * 4
    assert lines[5] == "  ░░ hyena_li 9   ▒▒ hyena_mr 9   ▓▓ hyena_se 9   ██ attention 5"
    text = "\n".join(lines)
    assert "MLP 11,264 identity (gelu in layer 0)" in text and "positions / 128" in text
    assert "FP8           input projections of Hyena layers" in text
    cache = as_json(capsys, "evo2-7b")["cache"]
    assert (cache["bytes_per_token"], cache["bytes_per_sequence"]) == (81_920, 24_625_152 - 2 * 663_552)


def test_every_kind_of_layer_has_a_sign_and_a_row() -> None:
    kinds = ("hyena_se", "hyena_mr", "hyena_li", "attention")
    lines = page(replace(SMALL, layer_types=kinds, se_filter_groups=4))
    assert lines[2] == "  ▓▓▒▒░░██"
    text = "\n".join(lines)
    assert "7 taps, 4 filters" in text and "128 taps, one filter per channel" in text and "2 real modes" in text
    assert page(replace(SMALL, layer_types=kinds), plain=True)[2] == "  ==--..##"


@pytest.mark.parametrize("width", [60, 66, 80, 96, 100])
def test_the_page_fits_the_terminal_and_is_plain_where_it_must_be(width: int) -> None:
    long = "a/folder/with/a/long/path/" * 10 + "model"
    filters = {
        "layer": 1000,
        "decay_steps": {"min": 2**40, "median": 9_999_999, "max": None},
        "decay_histogram": list(range(14)),
        "outside_unit_circle": [{"channel": 1023, "mode": 15, "modulus": 1.2345678}] * 5000,
    }
    configs = [ModelConfig.from_name(name) for name in preset_names()]
    kinds = ("hyena_se", "hyena_mr", "hyena_li", "attention") * 12
    configs.append(replace(configs[0], layer_types=kinds, name="ü" * 200))
    for config in configs:
        description = {"source": long, **describe(config, None), "filters": [filters]}
        lines = list(render(description, width=width))
        assert max(map(len, lines)) <= width and "\x1b" not in "".join(lines)
        coloured = list(render(description, width=width, coloured=True))
        assert [re.sub("\x1b\\[[0-9]+m", "", line) for line in coloured] == lines and "\x1b[33m" in "".join(coloured)
        plain = list(render(description, width=width, plain=True))
        assert "".join(plain).isascii() and max(map(len, plain)) <= width
    for lines in (render_methods(methods(), width=width), render_methods(methods(), width=width, plain=True)):
        assert max(map(len, lines)) <= width


@pytest.mark.parametrize("columns", [60, 80])
def test_the_terminal_decides_the_width(columns: int, golden: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    for arguments in ((golden / "evo-tiny",), ("evo-1-131k",), ("--methods",)):
        assert info(*arguments) == 0
        longest = max(map(len, capsys.readouterr().out.splitlines()))
        assert columns - 20 < longest <= columns  # it is used, and not exceeded


def test_output_that_is_no_terminal_has_no_colour(golden: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert info(golden / "evo-tiny") == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and "243,712" in out and "░░░░██░░" in out and "positions / 16" in out


def test_a_terminal_without_unicode_gets_ascii(golden: Path) -> None:
    code = "import sys; from hyaena.cli import main; sys.exit(main(sys.argv[1:], commands={'info': 'hyaena.cli.info'}))"
    command = [sys.executable, "-X", "utf8=0", "-c", code, "info", str(golden / "evo-tiny")]
    import os

    result = subprocess.run(command, capture_output=True, check=True, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert result.stdout.decode("ascii").splitlines()[2] == "  ....##.."


def test_the_table_of_methods_is_that_of_the_code(monkeypatch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    assert info("--methods") == 0
    page = capsys.readouterr().out
    assert list(as_json(capsys, "--methods")) == [*METHODS]
    for name, method in METHODS.items():
        row = next(line for line in page.splitlines() if line.startswith(f"  {name} ")).split(maxsplit=6)
        flags = [method.exact, method.gradients, method.padding, method.reset]
        assert row[:6] == [name, method.state, *("yes" if flag else "no" for flag in flags)]
        assert method.cost in row[6] and method.memory in row[6] and method.summary in " ".join(page.split())
    assert max(map(len, page.splitlines())) <= 100
    assert "\n".join(render_methods(methods(), plain=True)).isascii()


def test_presets_have_names(tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert as_json(capsys, "evo-1-131k")["config"]["max_length"] == 131_072
    assert info("evo-1-131k", "--revision", "main") == 2
    assert "leave --config and --revision out" in capsys.readouterr().err
    (tmp_path / "evo-1-131k").mkdir()
    assert info("evo-1-131k") == 2
    assert "write ./evo-1-131k for the file" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [(), ("cub", "--methods")])
def test_a_model_or_the_methods(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert info(*arguments) == 2
    assert "a model or --methods" in capsys.readouterr().err


# --- sources ---------------------------------------------------------------------------------------------------------


def test_folders_without_weights_and_single_files(golden: Path, tmp_path: Path, capsys: Any) -> None:
    shutil.copy(golden / "sh-tiny" / "config.yml", tmp_path / "any-name.yml")
    assert as_json(capsys, tmp_path)["weights"] is None
    shutil.copy(golden / "sh-tiny" / "model.safetensors", tmp_path / "model.safetensors")
    assert as_json(capsys, tmp_path)["weights"]["bytes"] == (tmp_path / "model.safetensors").stat().st_size
    assert as_json(capsys, tmp_path / "model.safetensors")["weights"]["dtype"] == "float32"
    assert as_json(capsys, tmp_path / "any-name.yml")["weights"] is None


def test_of_a_hub_id_only_the_configuration_is_fetched(golden: Path, monkeypatch: Any, capsys: Any) -> None:
    asked = []

    def download(hub_id: str, *, revision: str | None, weights: bool) -> Path:
        asked.append((hub_id, revision, weights))
        return golden / "evo-tiny"

    monkeypatch.setattr(hub, "download", download)
    known = as_json(capsys, "togethercomputer/evo-1-131k-base", "--revision", "main")
    assert asked == [("togethercomputer/evo-1-131k-base", "main", False)]
    assert known["weights"] is None and known["config"]["max_length"] == 131_072


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("nothing", "nothing: no such model: name a folder"),
        ("evo-1", "evo-1: no such model: did you mean evo-1"),
        ("{tmp}/bad.yml", "bad.yml: "),
        ("{tmp}/empty", "no config.json and no config.yml"),
        ("{tmp}/half", "shards are missing"),
    ],
)
def test_mistakes_are_one_line(source: str, words: str, golden: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "bad.yml").write_text("vocab_size: 3")
    (tmp_path / "empty").mkdir()
    (tmp_path / "half").mkdir()
    shutil.copy(golden / "sh-tiny" / "config.yml", tmp_path / "half")
    (tmp_path / "half" / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b.safetensors"}}')
    assert info(source.format(tmp=tmp_path)) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("hyaena: error: ") and captured.err.count("\n") == 1 and words in captured.err
    assert captured.out == ""


def test_weights_of_another_configuration_are_told(golden: Path, tmp_path: Path, capsys: Any) -> None:
    torch.save({"embedding_layer.weight": torch.zeros(256, 64)}, tmp_path / "x.pt")
    assert info(tmp_path / "x.pt", "--config", golden / "sh-tiny" / "config.yml") == 2
    assert "do the configuration and the weights belong together?" in capsys.readouterr().err
    # Another vocabulary: every filter fits.
    config = json.loads((hub.bundled("cub") / "config.json").read_text())
    (tmp_path / "wide.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] + 8}))
    assert info("cub", "--config", tmp_path / "wide.json") == 2
    err = capsys.readouterr().err
    assert "wrong shape: embed_tokens.weight is [" in err and err.count("\n") == 1


def test_options_that_have_no_effect_are_refused(golden: Path, tmp_path: Path, capsys: Any) -> None:
    config = golden / "sh-tiny" / "config.yml"
    shutil.copy(config, tmp_path)
    for arguments in (
        (config, "--revision", "main"),
        (config, "--config", config),
        (tmp_path, "--revision", "main"),
        (golden / "sh-tiny", "--revision", "main"),
    ):
        assert info(*arguments) == 2, arguments
        captured = capsys.readouterr()
        assert "out" in captured.err and captured.err.count("\n") == 1 and captured.out == ""


@pytest.mark.parametrize("name", ["cub", "evo-1-131k"])
def test_a_name_stands_once_in_the_title(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert info(name) == 0
    assert capsys.readouterr().out.splitlines()[0] == name
