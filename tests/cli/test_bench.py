"""``hyaena bench``: one table, two files, and mistakes that are found before anything is measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from hyaena.bench import memory, rates
from hyaena.bench.rates import Sizes
from hyaena.cli import main
from hyaena.formats import read_config
from hyaena.fp8 import FP8Linear
from hyaena.model import StripedHyena

SRC = Path(__file__).parents[2] / "src"
COMMANDS = {"bench": "hyaena.cli.bench"}


def bench(*arguments: object) -> int:
    return main(["bench", *map(str, arguments)], commands=COMMANDS)


@pytest.fixture(autouse=True)
def _small_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(rates.SIZES, "cpu", Sizes(10_000, 32, 3))


def test_a_table_a_picture_and_json(
    golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["hyaena", "bench", "a\udcff"])  # a name that is not UTF-8
    out = ("--json", tmp_path / "b.json", "--plot", tmp_path / "b.png")
    what = ("--lengths", "20,40", "--contexts", "16", "--batch", "1,2", "--prefill-chunk", "16", "--device", "cpu")
    assert bench("--model", golden / "sh-tiny", *what, *out) == 0
    captured = capsys.readouterr()
    assert "mfu" in captured.out and "2 × 16" in captured.out and "prefill of 40 tokens" in captured.err
    known = json.loads((tmp_path / "b.json").read_text(encoding="utf-8"))
    assert known["command"].startswith("hyaena") and "\udcff" in known["command"]
    assert [p["length"] for p in known["prefill"]] == [20, 40] and known["prefill"][0]["chunk"] == 16
    assert [(d["batch"], d["context"]) for d in known["decode"]] == [(1, 16), (2, 16)]
    assert known["model"]["dtype"] == "float32"
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.json", "b.png"]


def test_a_configuration_alone_gets_random_weights(golden: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--lengths", "20", "--contexts", "8", "--device", "cpu", "--dtype", "bfloat16")
    assert bench("--config", golden / "evo-tiny" / "config.yml", *options) == 0
    assert "bfloat16" in capsys.readouterr().out


def test_narrow_weights_and_fp8_products_count_as_the_bytes_that_they_are(golden: Path, tmp_path: Path) -> None:
    config = yaml.safe_load((golden / "evo2-tiny" / "config.yml").read_text()) | {"use_fp8_input_projections": True}
    (tmp_path / "fp8.yml").write_text(yaml.safe_dump(config))
    options = ("--lengths", "8", "--contexts", "8", "--device", "cpu", "--dtype", "float32", "--json", tmp_path / "b")

    def moved(*given: object) -> int:
        assert bench(*given, *options) == 0
        return json.loads((tmp_path / "b").read_text(encoding="utf-8"))["decode"][0]["bytes"]

    assert moved("--model", "cub", "--weights", "int8") < moved("--model", "cub") / 2
    fp8 = ("--config", tmp_path / "fp8.yml")
    made = StripedHyena(read_config(fp8[1]))
    numbers = sum(module.weight.numel() for module in made.modules() if isinstance(module, FP8Linear))
    assert moved(*fp8, "--fp8", "off") - moved(*fp8, "--fp8", "exact") == 3 * numbers > 0
    assert moved(*fp8, "--weights", "int8") < moved(*fp8)


def test_defaults_keep_within_the_models_length(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {
        "format": "hyaena", "vocab_size": 16, "hidden_size": 8, "layer_types": ["hyena", "attention"],
        "intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1, "state_size": 2, "max_length": 600,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert bench("--config", tmp_path / "config.json", "--device", "cpu", "--json", tmp_path / "b.json") == 0
    known = json.loads((tmp_path / "b.json").read_text(encoding="utf-8"))
    assert [p["length"] for p in known["prefill"]] == [d["context"] for d in known["decode"]] == [512]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lengths", "99999999"], "lengths go up to 99,999,999"),
        (["--device", "abacus"], "device abacus cannot be used"),
        (["--device", ""], "--device is empty"),
        (["--dtype", "int8"], "dtype int8 cannot hold a model"),
        (["--method", "magic"], "magic"),
        (["--fp8", "exact"], "fp8='exact' is for models with FP8 input projections"),
        (["--model", "cubb"], "did you mean cub?"),
        (["--model", "7b", "--config", "x.yml"], "leave --config out"),
        (["--json", "{tmp}/none/b.json"], "name a file in a folder that exists"),
        (["--plot", "{tmp}"], "name a file in a folder"),
        (["--plot", "{tmp}/b.xyz"], "b.xyz ends in .xyz, and a plot is written as one of"),
        (["--plot", "{tmp}/b"], "b has no ending, and a plot is written as one of"),
        (["--json", "{tmp}/b.svg", "--plot", "{tmp}/b.svg"], "name two files"),
        (["--decoding", "cuda_graph"], "captured on CUDA devices"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [argument.format(tmp=tmp_path) for argument in arguments]
    extra = [] if "--device" in given else ["--device", "cpu"]
    extra += [] if "--model" in given else ["--model", "cub"]
    assert bench(*given, *extra) == 2
    captured = capsys.readouterr()
    last = captured.err.splitlines()[-1]
    assert last.startswith("hyaena: error: ") and message in last and "Traceback" not in captured.err
    assert captured.out == "" and not list(tmp_path.iterdir())
    assert "making" not in captured.err  # a model, which may take minutes


@pytest.mark.parametrize("option", ["--lengths", "--contexts", "--batch"])
@pytest.mark.parametrize("value", ["many", "0", "512,-1", "512,", "1.5"])
def test_lists_are_whole_numbers(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        bench(option, value)
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and f"{value!r} is not a list of whole numbers" in err


def test_a_missing_plotting_library_is_found_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert bench("--model", "cub", "--device", "cpu", "--plot", tmp_path / "b.png") == 2
    err = capsys.readouterr().err
    assert err == "hyaena: error: the plot needs matplotlib: pip install 'hyaena[bench]'\n"


def test_nothing_that_was_measured_is_lost_when_the_rest_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from hyaena.bench import plot, run
    from hyaena.errors import NonFiniteError

    def broken(*args: object, **options: object) -> None:
        raise NonFiniteError("broken")

    command = ("--model", "cub", "--device", "cpu", "--lengths", "20", "--contexts", "16")
    files = ("--json", tmp_path / "b.json", "--plot", tmp_path / "b.svg")
    for module, name, decodes in ((run, "measure_decode", 0), (plot, "draw", 1)):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, broken)
            assert bench(*command, *files) == 2
        captured = capsys.readouterr()
        assert captured.err.endswith("hyaena: error: broken\n")
        assert "mfu" in captured.out and ("mbu" in captured.out) == bool(decodes)
        known = json.loads((tmp_path / "b.json").read_text(encoding="utf-8"))
        assert len(known["prefill"]) == 1 and len(known["decode"]) == decodes
        assert [path.name for path in tmp_path.iterdir()] == ["b.json"]


def test_the_7b_does_not_fit_everywhere(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: 10**9)
    assert bench("--device", "cpu") == 2
    assert "7b needs about 31" in capsys.readouterr().err


def test_the_readme_names_the_memory_that_is_required(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(rates.SIZES, "cpu", Sizes(128 * 2**20, 1024, 5))
    monkeypatch.setattr(memory, "free_bytes", lambda device: 10**9)
    readme = (SRC.parent / "README.md").read_text(encoding="utf-8")
    for dtype, named in (("float32", "31 GB of memory on a CPU in float32"), ("bfloat16", "16 GB there with")):
        assert named in readme
        assert bench("--device", "cpu", "--dtype", dtype) == 2
        needed = float(capsys.readouterr().err.split("needs about ")[1].split()[0])
        assert needed == pytest.approx(float(named.split()[0]), rel=0.03)


def test_mistakes_in_the_arguments_need_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from hyaena.cli import main\n"
        f"assert main(['bench', '--json', {str(tmp_path / 'no' / 'b')!r}], commands={COMMANDS!r}) == 2\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": str(SRC)}, stderr=subprocess.DEVNULL)
