"""Two actors of Ray Data on one machine give the numbers of ``hyaena.score`` and ``hyaena.embed``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hyaena
from hyaena.ray import Embedder, Scorer

# Ray's processes get the priority of the tests: below it, another program on the machine would starve them.
os.environ.update(RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0", RAY_worker_niceness="0", OMP_NUM_THREADS="1")
ray = pytest.importorskip("ray")

pytestmark = pytest.mark.timeout(1200)

MODEL = str(Path(__file__).parents[2] / "tests" / "golden" / "evo-tiny")
LETTERS = np.random.default_rng(0)
RECORDS = [{"name": f"r{i}", "text": "".join(LETTERS.choice([*"ACGT"], 5 + 13 * i % 97))} for i in range(24)]


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    source = str(Path(hyaena.__file__).parents[1])
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=100 * 2**20,
        _node_ip_address="127.0.0.1",
        runtime_env={"env_vars": {"PYTHONPATH": source, "OMP_NUM_THREADS": "1"}},
        log_to_driver=False,
    )
    ray.data.DataContext.get_current().wait_for_min_actors_s = 600  # both take part, however late one starts
    yield
    ray.shutdown()


class Counted(Scorer):
    """A Scorer that says which process it is."""

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return super().__call__(batch) | {"process": np.full(len(batch["name"]), os.getpid())}


def run(actor: type, **options: Any) -> list[dict[str, Any]]:
    records = ray.data.from_items(RECORDS, override_num_blocks=8)
    rows = records.map_batches(
        actor,
        fn_constructor_kwargs={"model": MODEL, "device": "cpu", **options},
        compute=ray.data.ActorPoolStrategy(size=2, max_tasks_in_flight_per_actor=1),
        batch_size=3,
    ).take_all()
    return sorted(rows, key=lambda row: int(row["name"][1:]))


def test_scores_of_two_actors() -> None:
    network, tokenizer = hyaena.load(MODEL)
    expected = hyaena.score(network, tokenizer, [record["text"] for record in RECORDS])
    rows = run(Counted, per_token=True)
    assert len({row["process"] for row in rows}) == 2
    for row, record, one in zip(rows, RECORDS, expected, strict=True):  # type: ignore[arg-type]
        assert (row["name"], row["text"], row["tokens"]) == (record["name"], record["text"], len(record["text"]))
        assert row["predicted"] == one.count
        np.testing.assert_allclose(row["sum"], one.sum, rtol=1e-4)
        np.testing.assert_allclose(row["perplexity"], one.perplexity, rtol=1e-4)
        np.testing.assert_allclose(row["logprobs"], one.logprobs, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(row["ids"], one.tokens)


def test_vectors_of_two_actors() -> None:
    layers = [0, "blocks.1.mlp.l3"]
    network, tokenizer = hyaena.load(MODEL)
    expected = hyaena.embed(network, tokenizer, [record["text"] for record in RECORDS], layers)
    rows = run(Embedder, layers=layers)
    for layer in layers:
        found = np.stack([row[str(layer)] for row in rows])
        np.testing.assert_allclose(found, expected[layer], rtol=1e-4, atol=1e-5)


def test_a_bad_text_fails_with_the_name_of_its_record() -> None:
    records = ray.data.from_items([{"name": "good", "text": "AC"}, {"name": "bad", "text": "A\0C"}])
    with pytest.raises(Exception, match="record 'bad': the text has the byte 0 at position 1"):
        records.map_batches(
            Scorer,
            fn_constructor_kwargs={"model": MODEL, "device": "cpu"},
            compute=ray.data.ActorPoolStrategy(size=1),
        ).take_all()
