"""What is saved is what is loaded, bit for bit, and nothing that was there before is lost when a save fails."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import hyaena
from hyaena.checkpoints import find, load_model, quantize_checkpoint, save, save_model
from hyaena.errors import CheckpointError, InputError
from hyaena.formats import read_config
from hyaena.model import StripedHyena
from hyaena.tokenizers import ByteTokenizer, CharacterTokenizer, load_tokenizer
from tokenizer_libraries import sentencepiece_like, write

GOLDEN = Path(__file__).parents[1] / "golden"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder's weights files."""
    if (folder / "model.pt").exists():
        return torch.load(folder / "model.pt", weights_only=True)
    return {key: tensor for path in sorted(folder.glob("*.safetensors")) for key, tensor in load_file(path).items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("limit", [10**9, 100_000])
def test_original_to_ours_to_original_is_bit_exact(case: str, tmp_path: Path, limit: int) -> None:
    start = load_model(GOLDEN / case / "model.safetensors", GOLDEN / case / "config.yml")
    save_model(start, tmp_path / "ours", max_shard_size=limit)
    ours = load_model(tmp_path / "ours")
    assert ours.config == start.config and equal(ours.state_dict(), start.state_dict())
    save_model(ours, tmp_path / "original", layout="original", max_shard_size=limit)
    expected = load_file(GOLDEN / case / "model.safetensors")
    if start.config.tie_embeddings:  # the original's head is a module of its own and must be in the file
        expected["unembed.weight"] = expected["embedding_layer.weight"]
    stray = ("filter.t", "_extra_state")  # what Evo 2's files hold and nobody reads
    assert equal(weights(tmp_path / "original"), {k: t for k, t in expected.items() if not k.endswith(stray)})
    assert read_config(tmp_path / "original" / "config.yml") == start.config
    again = load_model(tmp_path / "original")
    assert equal(again.state_dict(), start.state_dict())


@pytest.mark.parametrize("options", [{}, {"layout": "original"}, {"max_shard_size": 6_000}])
def test_weights_that_modules_share_are_saved(model: StripedHyena, tmp_path: Path, options: dict[str, Any]) -> None:
    assert model.lm_head is not None
    model.lm_head.weight = model.embed_tokens.weight
    model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(model.layers[0].mlp.gate_proj.weight.detach()[:])
    save_model(model, tmp_path, **options)
    loaded = load_model(tmp_path).state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layout": []}, r"layout \[\] is unknown"),
        ({"layout": "Original"}, "layout 'Original' is unknown"),
        ({"max_shard_size": True}, "max_shard_size must be a whole number of bytes, 1 or more, not True"),
        ({"max_shard_size": "9" * 5000}, "max_shard_size must be a whole number of bytes"),
        ({"overwrite": "no"}, "overwrite must be True or False, not 'no'"),
        ({"extra_files": ["tokenizer.json"]}, "extra_files must map names to bytes, and is a list"),
        ({"extra_files": b""}, "extra_files must map names to bytes, and is a bytes"),
        ({"extra_files": {"..": b""}}, "extra file '..': name a file of its own"),
        ({"extra_files": {"adapter_config.json": b""}}, "would be taken for other weights"),
        ({"extra_files": {"tokenizer.json": "{}"}}, "is a str: give its bytes"),
    ],
)
def test_wrong_arguments_of_a_save_write_nothing(
    model: StripedHyena, tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    with pytest.raises((CheckpointError, InputError), match=words) as caught:
        save_model(model, tmp_path / "a", **options)
    assert not (tmp_path / "a").exists() and len(str(caught.value)) < 300


@pytest.mark.parametrize("wrong", [None, 5, {}, torch.nn.Linear(2, 2), StripedHyena])
def test_what_is_no_model_is_not_saved(tmp_path: Path, wrong: Any) -> None:
    with pytest.raises(CheckpointError, match="cannot be saved: give the StripedHyena model inside it"):
        save_model(wrong, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_saved_folder_holds_exactly_one_configuration_and_one_file(model: StripedHyena, tmp_path: Path) -> None:
    save_model(model, tmp_path / "deep" / "down")
    assert files(tmp_path / "deep" / "down") == {"config.json", "model.safetensors"}
    assert json.loads((tmp_path / "deep" / "down" / "config.json").read_text())["format"] == "hyaena"


def test_weights_are_as_readable_as_any_file(model: StripedHyena, tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    save_model(model, tmp_path)
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1


def test_shards_stay_below_the_limit_and_the_index_names_them(model: StripedHyena, tmp_path: Path) -> None:
    save_model(model, tmp_path, max_shard_size=6_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 3 and {path.name for path in shards} == set(index["weight_map"].values())
    for path in shards:
        state = load_file(path)
        assert sum(tensor.nbytes for tensor in state.values()) <= 6_000 or len(state) == 1
        assert all(index["weight_map"][key] == path.name for key in state)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in weights(tmp_path).values())
    assert equal(load_model(tmp_path).state_dict(), model.state_dict())


def test_a_tied_matrix_is_saved_once_and_twice_for_the_original(tmp_path: Path) -> None:
    start = load_model(GOLDEN / "evo-tiny" / "model.safetensors", GOLDEN / "evo-tiny" / "config.yml")
    for layout, names in (
        ("hyaena", ["embed_tokens.weight"]),
        ("original", ["embedding_layer.weight", "unembed.weight"]),
    ):
        save_model(start, tmp_path / layout, layout=layout)
        assert [key for key, tensor in weights(tmp_path / layout).items() if tensor.shape[0] == 512] == names


@pytest.mark.parametrize("layout", ["hyaena", "original"])
def test_a_cast_leaves_poles_and_residues_alone(model: StripedHyena, tmp_path: Path, layout: Any) -> None:
    save_model(model, tmp_path, layout=layout, dtype=torch.bfloat16)
    for key, tensor in weights(tmp_path).items():
        exact = key.endswith((".poles", ".residues", ".inv_freq"))
        assert tensor.dtype == (torch.float32 if exact else torch.bfloat16), key
    loaded, exact = load_model(tmp_path), dict(model.named_parameters())
    for name, parameter in loaded.named_parameters():
        if name.endswith((".poles", ".residues")):
            assert torch.equal(parameter, exact[name])


def test_weights_that_are_views_of_something_larger_are_saved_alone(model: StripedHyena, tmp_path: Path) -> None:
    large = torch.randn(10, *model.norm.weight.shape)
    model.norm.weight = torch.nn.Parameter(large[3])
    save_model(model, tmp_path)
    assert torch.equal(load_model(tmp_path).norm.weight, large[3])


def test_extra_files_go_with_it_and_strangers_stay(model: StripedHyena, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    save_model(model, tmp_path, extra_files={"tokenizer.json": b"{}"})
    assert files(tmp_path) == {"config.json", "model.safetensors", "tokenizer.json", "notes.txt"}


@pytest.mark.parametrize("layout", ["hyaena", "original", "transformers"])
def test_a_tokenizer_goes_with_it(tmp_path: Path, layout: Any) -> None:
    model, tokenizer = hyaena.load("cub", dtype="stored")
    save_model(model, tmp_path / "bytes", tokenizer=tokenizer, layout=layout)
    _, again = hyaena.load(tmp_path / "bytes")
    assert type(again) is ByteTokenizer and again.encode("hyena") == tokenizer.encode("hyena")
    with pytest.raises(CheckpointError, match="has tokenizer 'bytes', and this is a CharacterTokenizer"):
        save_model(model, tmp_path / "other", tokenizer=CharacterTokenizer(264), layout=layout)
    with pytest.raises(InputError, match=r"tokenizer must be what hyaena\.load returns, not a str"):
        save_model(model, tmp_path / "other", tokenizer="cub", layout=layout)  # type: ignore[arg-type]
    assert not (tmp_path / "other").exists()


def test_files_of_a_tokenizer_go_with_it(model: StripedHyena, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    write(sentencepiece_like("metaspace"), source, add_bos_token=True)
    (source / "generation_config.json").write_text('{"eos_token_id": [2, 3]}')
    model = StripedHyena(replace(model.config, tokenizer="hf", vocab_size=400))
    tokenizer = load_tokenizer(source, model.config)
    save_model(model, tmp_path / "model", tokenizer=tokenizer, extra_files={"NOTICE": b"mine"})
    assert files(tmp_path / "model") == {"config.json", "model.safetensors", "NOTICE", *files(source)}
    _, again = hyaena.load(tmp_path / "model")
    assert again.eos_ids == tokenizer.eos_ids and again.encode("a b") == tokenizer.encode("a b")
    save_model(model, tmp_path / "model")
    assert files(source) < files(tmp_path / "model")
    (source / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"cannot read the tokenizer's files beside .*: No such file"):
        save_model(model, tmp_path / "new", tokenizer=tokenizer)
    assert not (tmp_path / "new").exists()


def altered(model: StripedHyena) -> StripedHyena:
    with torch.no_grad():
        model.norm.weight.add_(1)
    return model


@pytest.mark.parametrize("first", [{}, {"max_shard_size": 6_000}, {"layout": "original"}])
@pytest.mark.parametrize("second", [{}, {"max_shard_size": 6_000}, {"max_shard_size": 9_000, "layout": "original"}])
def test_a_save_replaces_the_previous_one_entirely(
    model: StripedHyena, tmp_path: Path, first: dict[str, Any], second: dict[str, Any]
) -> None:
    save_model(model, tmp_path, **first)
    save_model(altered(model), tmp_path, **second)
    assert equal(load_model(tmp_path).state_dict(), model.state_dict())
    save_model(model, tmp_path.with_name("fresh"), **second)
    shards = [len(list(folder.glob("*.safetensors"))) for folder in (tmp_path, tmp_path.with_name("fresh"))]
    assert shards[0] == shards[1] and len(files(tmp_path)) == len(files(tmp_path.with_name("fresh")))


@pytest.mark.parametrize("first", [{}, {"max_shard_size": 6_000}])
@pytest.mark.parametrize("second", [{}, {"max_shard_size": 6_000}])
def test_at_every_interruption_one_whole_checkpoint_is_there(
    model: StripedHyena, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: dict[str, Any], second: dict[str, Any]
) -> None:
    """The machine stops before the n-th change to the folder, for every n: old weights or new ones, never a mixture."""

    class Stopped(BaseException):
        pass

    replace, unlink, before = os.replace, Path.unlink, {k: v.clone() for k, v in model.state_dict().items()}
    after = {k: v.clone() for k, v in altered(model).state_dict().items()}
    seen = set()
    for stop in range(100):
        folder = tmp_path / str(stop)
        model.load_state_dict(before)
        save_model(model, folder, **first)
        model.load_state_dict(after)
        left = [stop]

        def counted(function: Callable[..., Any], left: list[int] = left) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                if not left[0]:
                    raise Stopped
                left[0] -= 1
                return function(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", counted(replace))
            patch.setattr(Path, "unlink", counted(unlink))
            try:
                save_model(model, folder, **second)
                finished = True
            except Stopped:
                finished = False
        loaded = load_model(folder).state_dict()
        seen.add("new" if equal(loaded, after) else "old")
        assert equal(loaded, after) or equal(loaded, before)
        if finished:
            assert equal(loaded, after)
            break
    assert finished and seen == {"old", "new"}


@pytest.mark.parametrize("function", ["save_file", "write_bytes"])
def test_a_full_disk_leaves_the_previous_checkpoint(
    model: StripedHyena, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    save_model(model, tmp_path)
    before, listed = {k: v.clone() for k, v in model.state_dict().items()}, files(tmp_path)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(save, function, full)
    with pytest.raises(CheckpointError, match=r"could not save \(No space left on device\); nothing there is lost"):
        save_model(altered(model), tmp_path)
    assert files(tmp_path) == listed and equal(load_model(tmp_path).state_dict(), before)
    with pytest.raises(CheckpointError, match="could not save"):
        save_model(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


# --- what a load would refuse is not written -------------------------------------------------------------------------


class WithAdapter(torch.nn.Module):
    """A linear layer with low-rank additions beside it, as adapters are made."""

    def __init__(self, base_layer: torch.nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = torch.nn.Parameter(torch.zeros(2, 2))


def adapted(model: StripedHyena) -> None:
    model.layers[0].mlp.down_proj = WithAdapter(model.layers[0].mlp.down_proj)


def parametrized(model: StripedHyena) -> None:
    torch.nn.utils.parametrizations.weight_norm(model.layers[0].mlp.down_proj)


def fill(value: float) -> Callable[[StripedHyena], None]:
    def change(model: StripedHyena) -> None:
        with torch.no_grad():
            model.layers[1].mlp.up_proj.weight[3, 5] = value

    return change


REFUSED: dict[str, tuple[Callable[[StripedHyena], Any], dict[str, Any], str]] = {
    "adapter": (adapted, {}, "merge the adapter into the weights first"),
    "parametrization": (parametrized, {}, "remove the parametrizations first"),
    "extra": (lambda m: m.register_parameter("gain", torch.nn.Parameter(torch.ones(1))), {}, "cannot save gain"),
    "missing": (lambda m: setattr(m, "norm", torch.nn.Identity()), {}, "without norm.weight: put the module back"),
    "NaN": (fill(float("nan")), {}, "not finite: go back to weights that are (layers.1.mlp.up_proj.weight)"),
    "infinity": (fill(float("-inf")), {}, "not finite"),
    "overflow": (fill(70_000), {"dtype": torch.float16}, "outside the range of torch.float16: choose a wider dtype"),
    "rounds to infinity": (fill(3.4e38), {"dtype": "bf16"}, "outside the range of torch.bfloat16"),
    "overflow when loaded": (
        lambda m: (fill(70_000)(m), m.embed_tokens.half()),
        {},
        "outside the range of torch.float16",
    ),
    "shape": (lambda m: setattr(m.norm, "weight", torch.nn.Parameter(torch.ones(3))), {}, "changed in shape"),
    "integers": (
        lambda m: setattr(m.norm, "weight", torch.nn.Parameter(torch.ones(16).to(torch.int8), requires_grad=False)),
        {},
        "quantized",
    ),
    "meta": (lambda m: m.norm.to("meta"), {}, "on the meta device"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_load_would_refuse_is_refused_before_a_byte_is_written(
    model: StripedHyena, tmp_path: Path, case: str
) -> None:
    change, options, words = REFUSED[case]
    save_model(model, tmp_path / "good")
    before = {path.name: path.read_bytes() for path in (tmp_path / "good").iterdir()}
    change(model)
    for folder in ("good", "new"):
        with pytest.raises(CheckpointError, match=re.escape(words)) as error:
            save_model(model, tmp_path / folder, **options)
        assert "\n" not in str(error.value)
    assert {path.name: path.read_bytes() for path in (tmp_path / "good").iterdir()} == before
    assert files(tmp_path) == {"good"}


def test_a_compiled_or_wrapped_model_is_saved_as_the_model_inside(model: StripedHyena, tmp_path: Path) -> None:
    expected = dict(model.state_dict())
    for name, wrapped in (("compiled", torch.compile(model)), ("parallel", torch.nn.DataParallel(model))):
        save_model(wrapped, tmp_path / name)  # type: ignore[arg-type]
        assert equal(load_model(tmp_path / name).state_dict(), expected)
    for i, layer in enumerate(model.layers):
        model.layers[i] = torch.compile(layer)  # type: ignore[assignment]
    save_model(model, tmp_path / "layers")
    assert equal(load_model(tmp_path / "layers").state_dict(), expected)
    with pytest.raises(CheckpointError, match="a Linear cannot be saved: give the StripedHyena model inside it"):
        save_model(torch.nn.Linear(2, 2), tmp_path / "x")  # type: ignore[arg-type]


def test_a_folder_whose_name_is_not_utf8_is_refused(model: StripedHyena, tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"a\xff")
    with pytest.raises(InputError, match=r"\\udcff: the name is not UTF-8, .*: choose another"):
        save_model(model, folder)
    source = find(save_model(model, tmp_path / "model"))
    with pytest.raises(InputError, match=r"\\udcff: the name is not UTF-8, .*: choose another"):
        quantize_checkpoint(source, folder, "int8")
    assert not folder.exists()


@pytest.mark.parametrize(
    "extra",
    [{"../x": b""}, {"config.json": b""}, {"a/b": b""}, {"": b""}, {"x": "text"}, {"y.safetensors": b""}, {3: b""}],
)
def test_extra_files_have_names_of_their_own(model: StripedHyena, tmp_path: Path, extra: Any) -> None:
    with pytest.raises(InputError, match="extra file"):
        save_model(model, tmp_path / "x", extra_files=extra)
    assert not files(tmp_path)


# --- whose files are replaced ----------------------------------------------------------------------------------------


def test_the_previous_models_other_files_go_with_it(model: StripedHyena, tmp_path: Path) -> None:
    save_model(model, tmp_path, extra_files={"tokenizer.json": b"old", "tokenizer_config.json": b"old"})
    save_model(model, tmp_path)
    assert files(tmp_path) == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    save_model(model, tmp_path, extra_files={"tokenizer.json": b"new"})
    assert files(tmp_path) == {"config.json", "model.safetensors", "tokenizer.json"}
    save_model(model, tmp_path, extra_files={})
    assert files(tmp_path) == {"config.json", "model.safetensors"}


def test_a_checkpoint_of_another_kind_is_replaced_and_strangers_are_not(model: StripedHyena, tmp_path: Path) -> None:
    strangers = {"model-fp32-00001-of-00002.safetensors", "model-00001-of-00004.safetensors", "optimizer.pt"}
    for name in strangers:
        (tmp_path / name).write_bytes(b"mine")
    torch.save(model.state_dict(), tmp_path / "pytorch-model.bin")
    (tmp_path / "config.yml").write_text(json.dumps(model.config.to_dict()))
    save_model(model, tmp_path, max_shard_size=6_000)
    own = set(json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"].values())
    assert files(tmp_path) == strangers | own | {"config.json", "model.safetensors.index.json"}
    save_model(model, tmp_path)
    assert files(tmp_path) == strangers | {"config.json", "model.safetensors"}
    assert all((tmp_path / name).read_bytes() == b"mine" for name in strangers)
    assert equal(load_model(tmp_path).state_dict(), model.state_dict())


def test_a_folder_with_other_weights_is_refused(model: StripedHyena, tmp_path: Path) -> None:
    torch.save(model.state_dict(), tmp_path / "mine.pt")
    with pytest.raises(CheckpointError, match=r"other weights lie there \(mine\.pt\)"):
        save_model(model, tmp_path)
    assert files(tmp_path) == {"mine.pt"}


def test_without_overwrite_only_an_empty_folder_is_taken(model: StripedHyena, tmp_path: Path) -> None:
    (tmp_path / ".unfinished-12345678").mkdir()  # of a killed save
    save_model(model, tmp_path, overwrite=False)
    with pytest.raises(CheckpointError, match=r"is not empty \(config\.json, model\.safetensors\)"):
        save_model(altered(model), tmp_path, overwrite=False)
    assert not equal(load_model(tmp_path).state_dict(), model.state_dict())


def test_writers_in_one_folder_lose_no_success(model: StripedHyena, tmp_path: Path) -> None:
    """The folder holds the model of the writer that finished last, whole."""
    finished: list[int] = []
    models = []
    for i in range(4):
        models.append(StripedHyena(model.config))
        with torch.no_grad():
            models[i].norm.weight.fill_(i)

    def writer(i: int) -> None:
        for _ in range(3):
            save_model(models[i], tmp_path / "m", max_shard_size=6_000 if i % 2 else 10**9)
            finished.append(i)

    threads = [threading.Thread(target=writer, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(finished) == 12
    loaded = load_model(tmp_path / "m").state_dict()
    assert [i for i in range(4) if equal(loaded, models[i].state_dict())] == [int(loaded["norm.weight"][0])]


LIMITED = """
import resource, sys, torch
from hyaena.checkpoints import load_model, save_model
from hyaena.errors import CheckpointError
from hyaena.formats import read_config
model = load_model(sys.argv[1])
with torch.no_grad():
    model.norm.weight.add_(1)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    save_model(model, sys.argv[1])
except CheckpointError as error:
    print(error)
"""


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="needs a limit on the size of files")
def test_a_write_that_really_fails_leaves_the_previous_checkpoint(model: StripedHyena, tmp_path: Path) -> None:
    """The kernel refuses every byte of a file beyond 10,000, as it would on a full disk."""
    save_model(model, tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size > 10_000
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2] / "src"), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", LIMITED, tmp_path], env=environment, capture_output=True, text=True, check=True
    )
    assert "could not save" in result.stdout and "nothing there is lost" in result.stdout
    assert files(tmp_path) == {"config.json", "model.safetensors"}
    assert equal(load_model(tmp_path).state_dict(), model.state_dict())


def test_leftovers_of_a_killed_save_are_removed_by_the_next(model: StripedHyena, tmp_path: Path) -> None:
    (tmp_path / ".unfinished-abc").mkdir()
    (tmp_path / ".unfinished-abc" / "model.safetensors").write_bytes(b"half")
    save_model(model, tmp_path)
    assert files(tmp_path) == {"config.json", "model.safetensors"}


def test_what_cannot_be_saved_is_told(model: StripedHyena, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="layout 'other' is unknown: choose one of hyaena, original"):
        save_model(model, tmp_path / "a", layout="other")  # type: ignore[arg-type]
    with torch.device("meta"):
        empty = StripedHyena(model.config)
    with pytest.raises(CheckpointError, match="on the meta device and has no weights to save"):
        save_model(empty, tmp_path / "a")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="could not save"):
        save_model(model, tmp_path / "file")
    assert files(tmp_path) == {"file"}
