"""Every source of a model, and one clear line for every way in which there is none."""

from __future__ import annotations

import errno
import fnmatch
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import huggingface_hub
import huggingface_hub.constants
import pytest
import torch
import yaml
from huggingface_hub import errors
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as Learned
from tokenizers import decoders, models, pre_tokenizers

import hyaena
from hyaena import hub
from hyaena.checkpoints import save_model
from hyaena.config import ModelConfig
from hyaena.errors import CheckpointError, HyaenaError, InputError
from hyaena.formats import read_config
from hyaena.model import StripedHyena
from hyaena.tokenizers import ByteTokenizer, CharacterTokenizer

GOLDEN = Path(__file__).parent / "golden"
NOUS = "togethercomputer/StripedHyena-Nous-7B"
EVO_131K = "togethercomputer/evo-1-131k-base"


def refusal(*args: Any, **kwargs: Any) -> str:
    with pytest.raises(HyaenaError) as error:
        hub.load_model(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


class Hub:
    """A hub of one repository on the disk, which serves what it is asked for and remembers how."""

    def __init__(self, folder: Path, cache: Path) -> None:
        self.folder, self.cache = folder, cache
        self.asked: list[tuple[str, str | None]] = []

    def snapshot_download(
        self, repo_id: str, *, revision: str | None, allow_patterns: list[str], ignore_patterns: list[str], **_: Any
    ) -> str:
        self.asked.append((repo_id, revision))
        self.cache.mkdir(exist_ok=True)
        for file in self.folder.rglob("*"):
            name = file.relative_to(self.folder).as_posix()
            wanted = any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns)
            if file.is_file() and wanted and not any(fnmatch.fnmatch(name, pattern) for pattern in ignore_patterns):
                shutil.copy(file, self.cache / name)
        return str(self.cache)


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """Evo 131k, tiny, as it would lie on the hub: both kinds of weights, a config.json, and more besides."""
    folder = tmp_path / "remote"
    folder.mkdir()
    config = yaml.safe_load((GOLDEN / "evo-tiny" / "config.yml").read_text())
    del config["tokenizer_type"], config["use_interpolated_rotary_pos_emb"]  # as the hub's file has it
    config |= {"model_type": "stripedhyena", "auto_map": {}, "torch_dtype": "bfloat16", "max_seqlen": 8192}
    (folder / "config.json").write_text(json.dumps(config))
    state = load_file(GOLDEN / "evo-tiny" / "model.safetensors")
    save_file({f"backbone.{key}": tensor for key, tensor in state.items()}, folder / "model.safetensors")
    torch.save(state, folder / "pytorch_model.bin")
    (folder / "README.md").write_text("# Evo")
    (folder / "modeling_hyena.py").write_text("raise SystemExit")
    (folder / "other").mkdir()
    shutil.copy(folder / "model.safetensors", folder / "other" / "copy.safetensors")
    fake = Hub(folder, tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot_download)
    return fake


# --- on this machine -------------------------------------------------------------------------------------------------


def test_importing_hyaena_imports_neither_torch_nor_the_hub() -> None:
    code = "import sys, hyaena; sys.exit('torch' in sys.modules or 'huggingface_hub' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("case", ["evo-tiny", "evo8k-tiny"])
def test_a_folder_in_the_originals_layout_loads_with_its_tokenizer(case: str) -> None:
    model, tokenizer = hyaena.load(GOLDEN / case)
    assert isinstance(tokenizer, CharacterTokenizer)
    expected = load_file(GOLDEN / case / "expected.safetensors")
    with torch.no_grad():
        logits = model(expected["input_ids"])
    assert (logits - expected["logits"]).abs().max() <= 1e-4 * expected["logits"].abs().max()


def test_load_model_takes_the_same_sources_without_a_tokenizer() -> None:
    model = hyaena.load_model(GOLDEN / "sh-tiny", dtype="bfloat16")
    assert model.dtype == torch.bfloat16 and model.config.name == "sh-7b-32k-v1"


def test_a_folder_of_ours_loads_with_its_tokenizer(tmp_path: Path) -> None:
    config = ModelConfig(
        vocab_size=259,
        hidden_size=8,
        layer_types=("hyena",),
        intermediate_size=8,
        num_attention_heads=2,
        num_key_value_heads=1,
        state_size=2,
        tokenizer="bytes",
    )
    save_model(StripedHyena(config), tmp_path)
    model, tokenizer = hyaena.load(str(tmp_path))
    assert isinstance(tokenizer, ByteTokenizer) and model.config == config


def test_a_weights_file_takes_a_configuration(tmp_path: Path) -> None:
    weights = shutil.copy(GOLDEN / "evo-tiny" / "model.safetensors", tmp_path / "w.safetensors")
    model, tokenizer = hyaena.load(weights, config=GOLDEN / "evo-tiny" / "config.yml")
    assert model.config.num_layers == 4 and isinstance(tokenizer, CharacterTokenizer)


def test_a_missing_tokenizer_is_told_before_the_weights_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_load", lambda *_: pytest.fail("the weights were read"))
    with pytest.raises(HyaenaError, match=r"no tokenizer\.json in .*sh-tiny"):
        hyaena.load(GOLDEN / "sh-tiny")


def test_a_configuration_of_another_model_is_told_and_not_its_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_load", lambda *_: pytest.fail("the weights were read"))
    for load in (hyaena.load, hub.load_tokenizer_of):
        with pytest.raises(CheckpointError, match=r"cub: missing: .* and \d+ more; .* belong together\?$") as caught:
            load("cub", config="sh-7b")
        assert len(str(caught.value)) < 700
    with pytest.raises(HyaenaError, match="or the name of a preset: did you mean evo-1-8k"):
        hyaena.load("cub", config="evo1-8k")


def test_a_tokenizer_is_looked_for_beside_the_weights_then_beside_the_configuration(tmp_path: Path) -> None:
    weights, settings = tmp_path / "weights", tmp_path / "settings"
    weights.mkdir()
    settings.mkdir()
    for name, folder in (("model.safetensors", weights), ("config.yml", settings)):
        shutil.copy(GOLDEN / "sh-tiny" / name, folder / name)
    checkpoint = hub.locate(weights, config=settings / "config.yml")
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        hub._tokenizer_path(checkpoint, settings / "config.yml")
    (settings / "tokenizer.json").write_text("{}")
    assert hub._tokenizer_path(checkpoint, settings / "config.yml") == settings
    (weights / "tokenizer.json").write_text("{}")
    assert hub._tokenizer_path(checkpoint, settings / "config.yml") == weights


def test_a_bundled_name_means_the_packages_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "__file__", str(tmp_path / "hub.py"))
    assert "the bundled model 'cub' is not part of this installation" in refusal("cub")
    shutil.copytree(GOLDEN / "evo-tiny", tmp_path / "cub")
    assert hub.load_model("cub").config.num_layers == 4


def test_a_revision_is_refused_where_it_means_nothing() -> None:
    with pytest.raises(InputError, match="revision 'main' is for hub ids"):
        hub.load_model(GOLDEN / "sh-tiny", revision="main")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("cubb", "no such model: did you mean cub?"),
        ("sh-7b", "without weights: take togethercomputer/StripedHyena-Hessian-7B"),
        ("evo-1.5-8k", "without weights: take evo-design/evo-1.5-8k-base"),
        ("evo2-7b-microviridae", "without weights: take evo-design/evo-2-7b-8k-microviridae"),
        ("./nothing/here", "no such model: name a folder, a weights file, a hub id or cub"),
        ("/a/b/c.safetensors", "no such model"),
        ("runs/model.safetensors", "no such model: name a folder"),
        ("", "the model is empty: name a path, or . for the current folder"),
        (".", "several"),
    ],
)
def test_unknown_models_are_told(name: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for file in ("a.pt", "b.pt"):
        torch.save({}, file)
    assert words in refusal(name)


@pytest.mark.parametrize("options", [{"dtype": "int8"}, {"device": "warp"}, {"config": "none.yml"}])
def test_options_are_checked_before_anything_is_downloaded(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("downloaded"))
    for function in (hub.load, hub.load_model):
        with pytest.raises(HyaenaError, match=r"int8|warp|none\.yml"):
            function(NOUS, **options)


def test_a_mistyped_path_is_no_question_to_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "final").mkdir(parents=True)
    assert "runs/finel: no such model: did you mean runs/final?" in refusal("runs/finel")
    assert "did you mean runs/final?" in refusal("./run/final")
    assert f"did you mean {tmp_path}/runs/final?" in refusal(tmp_path / "runs" / "fina")
    assert "no such model: name a folder" in refusal("runs/x")
    assert "no such model" in refusal("~nobody-of-this-name/x")


def test_a_bundled_name_that_is_also_a_folder_here_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cub").mkdir()
    monkeypatch.setattr(hub, "__file__", str(tmp_path / "package" / "hub.py"))
    shutil.copytree(GOLDEN / "evo-tiny", tmp_path / "package" / "cub")
    assert hub.load_model("cub").config.num_layers == 4  # the folder has no model in it
    shutil.copy(GOLDEN / "sh-tiny" / "model.safetensors", tmp_path / "cub")
    shutil.copy(GOLDEN / "sh-tiny" / "config.yml", tmp_path / "cub")
    assert "cub is the bundled model and a folder here with a model: write ./cub for the folder" in refusal("cub")
    for named in ("./cub", Path("cub"), tmp_path / "cub"):
        assert hub.load_model(named).config.name == "sh-7b-32k-v1"


# --- the hub ---------------------------------------------------------------------------------------------------------


def test_a_hub_id_loads_with_the_pinned_revision_and_corrections(remote: Hub) -> None:
    model, tokenizer = hyaena.load(EVO_131K)
    assert set(remote.asked) == {(EVO_131K, "1.1_fix")}
    assert isinstance(tokenizer, CharacterTokenizer)
    assert (model.config.rope_scaling_factor, model.config.max_length) == (16, 131_072)
    assert model.config.name == "evo-1-131k-base"
    expected = load_file(GOLDEN / "evo-tiny" / "expected.safetensors")
    with torch.no_grad():
        logits = model(expected["input_ids"])
    assert (logits - expected["logits"]).abs().max() <= 1e-4 * expected["logits"].abs().max()


def test_only_what_is_needed_is_downloaded(remote: Hub) -> None:
    hub.load_model(EVO_131K)
    assert {file.name for file in remote.cache.iterdir()} == {"config.json", "model.safetensors"}


def test_pickles_are_fetched_where_there_is_nothing_else(remote: Hub) -> None:
    (remote.folder / "model.safetensors").unlink()
    hub.load_model(EVO_131K)
    assert {file.name for file in remote.cache.iterdir()} == {"config.json", "pytorch_model.bin"}


def test_the_configuration_alone_can_be_fetched(remote: Hub) -> None:
    hub.download(EVO_131K, weights=False)
    assert {file.name for file in remote.cache.iterdir()} == {"config.json"}


@pytest.mark.parametrize(
    ("hub_id", "given", "asked"),
    [
        ("togethercomputer/evo-1-8k-base", None, "1.1_fix"),
        ("togethercomputer/evo-1-131k-base", None, "1.1_fix"),
        ("togethercomputer/evo-1-8k-base", "main", "main"),
        ("evo-design/evo-1.5-8k-base", None, None),
        ("LongSafari/evo-1-8k-crispr", None, None),
        ("LongSafari/evo-1-8k-transposon", None, None),
        (NOUS, None, None),
        ("togethercomputer/StripedHyena-Hessian-7B", "abc", "abc"),
        ("someone/their-model", None, None),
    ],
)
def test_revisions(remote: Hub, hub_id: str, given: str | None, asked: str | None) -> None:
    hub.load_model(hub_id, revision=given)
    assert set(remote.asked) == {(hub_id, asked)}


def test_a_configuration_of_the_users_own_is_not_corrected(remote: Hub) -> None:
    config = read_config(GOLDEN / "evo-tiny" / "config.yml")
    assert hub.load_model(EVO_131K, config=config).config == config


def response(status: int) -> httpx.Response:
    return httpx.Response(status, request=httpx.Request("GET", "https://huggingface.co"))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (lambda: errors.LocalEntryNotFoundError("cannot find\nthe files"), "the hub cannot be reached"),
        (lambda: errors.OfflineModeIsEnabled("offline"), "the hub cannot be reached"),
        (lambda: ConnectionError(errno.ECONNREFUSED, "refused"), "the hub cannot be reached"),
        (lambda: errors.HfHubHTTPError("503", response=response(503)), "the hub cannot be reached"),
        (lambda: errors.RepositoryNotFoundError("404", response=response(404)), "no such model"),
        (lambda: errors.RevisionNotFoundError("404", response=response(404)), "has no revision 'v9'"),
        (lambda: errors.GatedRepoError("403", response=response(403)), "its owner grants access by hand"),
        (lambda: OSError(errno.ENOSPC, "No space left on device"), "cannot store it in the hub's cache: No space"),
    ],
)
def test_what_the_hub_refuses_is_one_line(
    monkeypatch: pytest.MonkeyPatch, error: Callable[[], Exception], words: str
) -> None:
    def fails(*_: Any, **__: Any) -> str:
        raise error()

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fails)
    message = refusal("togethercomputer/evo-1-8k-base", revision="v9")
    assert words in message and message.startswith("togethercomputer/evo-1-8k-base: ")


def test_a_misspelt_hub_id_names_the_right_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> str:
        raise errors.RepositoryNotFoundError("404", response=response(404))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fails)
    assert f"did you mean {NOUS}?" in refusal("togethercomputer/StripedHyena-Nous-7b")


@pytest.mark.parametrize(
    ("name", "hub_id"), [("arcinstitute/evo2_7b", True), ("a/b.pt", False), ("a/b.pt.part0", False)]
)
def test_names_of_files_are_no_hub_ids(name: str, hub_id: bool) -> None:
    assert hub.is_hub_id(name) is hub_id


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("evo-1-131k-base", "togethercomputer/evo-1-131k-base"),
        ("StripedHyena-Nous-7B", NOUS),
        ("evo-design/evo-1.5-8k", "evo-design/evo-1.5-8k-base"),
        ("Cub", "cub"),
    ],
)
def test_near_hub_ids_are_suggested_without_asking_twice(
    name: str, near: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> str:
        raise errors.LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fails)
    monkeypatch.chdir(tmp_path)
    assert f"did you mean {near}?" in refusal(name)


def test_a_name_that_may_be_a_path_is_one_first_where_the_hub_cannot_be_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> str:
        raise errors.OfflineModeIsEnabled("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fails)
    monkeypatch.chdir(tmp_path)
    assert refusal("models/mine").startswith("models/mine: no such file or folder. If it is the name of a model on the")


def test_safetensors_are_chosen_where_the_cache_has_both(remote: Hub) -> None:
    remote.cache.mkdir()
    shutil.copy(remote.folder / "pytorch_model.bin", remote.cache)
    hub.load_model(EVO_131K)
    assert hub.locate(EVO_131K).shards == (remote.cache / "model.safetensors",)


def test_without_a_network_the_real_client_gives_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="the hub cannot be reached: check the name and the network"):
        hub.load_model(NOUS)


def test_the_vocab_file_of_a_configuration_is_used_or_named(tmp_path: Path) -> None:
    """Only inside the model's folder: a path to elsewhere is reduced to its name."""
    for name in ("config.yml", "model.safetensors"):
        shutil.copy(GOLDEN / "sh-tiny" / name, tmp_path)
    text = (tmp_path / "config.yml").read_text()
    alphabet = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    learned = Learned(models.BPE(vocab=alphabet, merges=[]))
    learned.pre_tokenizer, learned.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = learned.to_str().encode()
    assert "vocab_file: tokenizer/tokenizer.json" in text
    with pytest.raises(CheckpointError, match=r"no tokenizer.json.*\(tokenizer/tokenizer.json\)"):
        hyaena.load(tmp_path)
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_bytes(tokenizer)
    assert hyaena.load(tmp_path)[1].encode("hyena")
    for elsewhere in (tmp_path.parent / "outside-tokenizer.json", Path("../outside-tokenizer.json")):
        (tmp_path.parent / "outside-tokenizer.json").write_bytes(tokenizer)
        (tmp_path / "config.yml").write_text(text.replace("tokenizer/tokenizer.json", str(elsewhere)))
        with pytest.raises(CheckpointError, match=r"outside-tokenizer\.json"):
            hyaena.load(tmp_path)


@pytest.mark.parametrize("hub_id", [hub_id for hub_id, known in hub.PUBLISHED.items() if known.preset is not None])
def test_models_that_are_published_without_a_configuration_have_a_preset(
    hub_id: str, remote: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hub folder of Evo 2: one ``.pt`` file in parts. Its tiny stand-in is of no preset."""
    for file in list(remote.folder.iterdir()):
        shutil.rmtree(file) if file.is_dir() else file.unlink()
    tiny = read_config(GOLDEN / "evo2-tiny" / "config.yml")
    preset = ModelConfig.from_name(hub.PUBLISHED[hub_id].preset or "")
    assert hub.describe(hub_id)[0] == preset
    torch.save(load_file(GOLDEN / "evo2-tiny" / "model.safetensors"), remote.folder / "whole.pt")
    content = (remote.folder / "whole.pt").read_bytes()
    (remote.folder / "whole.pt").unlink()
    for number, start in enumerate((0, 400_000, 800_000)):
        (remote.folder / f"{hub_id.split('/')[1]}.pt.part{number}").write_bytes(content[start : start + 400_000])
    (remote.folder / "README.md").write_text("# Evo 2")
    config, tokenizer = hub.load_tokenizer_of(hub_id)
    assert config == preset and isinstance(tokenizer, CharacterTokenizer)
    checkpoint = hub.locate(hub_id)
    assert checkpoint.config == preset and len(checkpoint.shards) == 3
    assert "do the configuration and the weights belong together" in refusal(hub_id)
    monkeypatch.setattr(ModelConfig, "from_name", lambda _: tiny)
    model, _ = hub.load(hub_id)
    expected = load_file(GOLDEN / "evo2-tiny" / "expected.safetensors")
    with torch.no_grad():
        logits = model(expected["input_ids"])
    assert (logits - expected["logits"]).abs().max() <= 1e-5 * expected["logits"].abs().max()


@pytest.mark.parametrize(("native", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_dtype_auto_asks_the_processor(native: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hyaena.ops.cpu.multiplies_bfloat16", lambda: native)
    assert hyaena.load_model("cub", dtype="auto").dtype == dtype
    assert hyaena.load_model("cub").dtype == torch.float32
