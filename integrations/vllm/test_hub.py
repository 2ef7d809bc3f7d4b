"""Hub ids, from a cache of the hub and without a network: vLLM then gives a folder of the cache in place of an id."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
import yaml
from integrations.vllm.cases import config, engine, folder_of, make, own_tokens, random_prompts, tokens

from hyaena.config import ModelConfig
from hyaena.hub import PUBLISHED
from hyaena.vllm.config import HyaenaConfigParser

EVO_131K = "togethercomputer/evo-1-131k-base"


def store(cache: Path, hub_id: str, revisions: dict[str, Path]) -> Path:
    """Lay folders out as revisions of a repository in a cache; where they lie."""
    place = cache / ("models--" + hub_id.replace("/", "--"))
    (place / "refs").mkdir(parents=True)
    for number, (revision, folder) in enumerate(revisions.items()):
        commit = str(number) * 40
        (place / "refs" / revision).write_text(commit)
        shutil.copytree(folder, place / "snapshots" / commit)
    return place / "snapshots"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    assert huggingface_hub.constants.HF_HUB_OFFLINE
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture
def evo(tmp_path: Path, cache: Path) -> str:
    """A small model under the id of Evo, with the names of the hub's ``config.json``.

    That leaves out the division of positions, and the right revision is another than ``main``.
    """
    folder = folder_of("evo1", tmp_path, "original")
    file = folder / "config.yml"
    values = yaml.safe_load(file.read_text())
    values["max_seqlen"] = 1024
    for key in ("tokenizer_type", "use_interpolated_rotary_pos_emb", "rotary_emb_scaling_factor"):
        values.pop(key, None)
    file.unlink()
    (folder / "config.json").write_text(json.dumps(values | {"model_type": "stripedhyena", "auto_map": {}}))
    other = shutil.copytree(folder, tmp_path / "other")
    shutil.copy(folder_of("evo1", tmp_path / "2", "original", scale=2) / "model.safetensors", other)
    store(cache, EVO_131K, {"main": other, str(PUBLISHED[EVO_131K].revision): folder})
    return EVO_131K


def test_a_published_model_is_read_with_what_is_known_of_it(evo: str) -> None:
    model = make("evo1")
    prompts = random_prompts(model, [5, 70, 200])
    with engine(evo, enable_prefix_caching=False) as llm:
        assert tokens(llm, prompts, 8)[0] == own_tokens(model, prompts, 8)
        assert llm.get_tokenizer().encode("ACGT") == list(b"ACGT")


def test_a_published_model_needs_the_option(evo: str) -> None:
    message = f"{evo}: its files leave out .*: add --config-format hyaena"
    with pytest.raises(ValueError, match=message), engine(evo, config_format="auto"):
        pass


def test_a_published_model_without_a_configuration(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "README.md").touch()
    place = store(cache, "arcinstitute/evo2_7b", {"main": tmp_path / "empty"}) / ("0" * 40)
    _, parsed = HyaenaConfigParser().parse(place, False)
    assert parsed.record() == ModelConfig.from_name("evo2-7b")


def test_a_folder_elsewhere_is_no_hub_id(tmp_path: Path, cache: Path) -> None:
    folder = folder_of("evo2", tmp_path)
    _, parsed = HyaenaConfigParser().parse(folder, False)
    assert parsed.record() == config("evo2")
