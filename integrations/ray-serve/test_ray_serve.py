"""Two replicas on one machine: the answers of one server, prefixes that are found again, and a replica that dies."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import httpx
import pytest

import hyaena

# Ray's processes get the priority of the tests: below it, another program on the machine would starve them. And a busy
# replica may take its time to say how many requests it has: Ray would go to another one after 0.1 s.
os.environ.update(
    RAY_AUTH_MODE="disabled",
    RAY_USAGE_STATS_ENABLED="0",
    RAY_worker_niceness="0",
    RAY_SERVE_QUEUE_LENGTH_RESPONSE_DEADLINE_S="10",
    RAY_SERVE_MAX_QUEUE_LENGTH_RESPONSE_DEADLINE_S="10",
    OMP_NUM_THREADS="1",
)
ray = pytest.importorskip("ray")

from ray import serve  # noqa: E402

from hyaena.errors import InputError  # noqa: E402
from hyaena.serve.engine import EngineSettings  # noqa: E402
from hyaena.serve.loading import ServerOptions  # noqa: E402
from hyaena.serve.ray import application  # noqa: E402
from hyaena.serve.service import Limits  # noqa: E402

pytestmark = pytest.mark.timeout(1800)

SOURCE = str(Path(hyaena.__file__).parents[1])
PATIENCE = 600.0
"""Seconds after which something has not happened and will not: the kernels take a minute to compile where others want
the cores, and Ray two to start."""

LONG = 40_000
"""Tokens that no machine writes before a client has left or a replica is stopped."""

KEY = "a-key"
OPTIONS = ServerOptions(
    chat_template="nous",
    keys=[KEY],
    allowed_hosts=["a.example"],
    engine=EngineSettings(kv_bytes=2**26, max_rows=4, max_waiting=4),
    limits=Limits(body_bytes=100_000, new_tokens=LONG),
)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    ray.init(
        num_cpus=4,
        include_dashboard=False,
        object_store_memory=100 * 2**20,
        _node_ip_address="127.0.0.1",
        runtime_env={"env_vars": {"PYTHONPATH": SOURCE, "OMP_NUM_THREADS": "1"}},
        log_to_driver=False,
    )
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(application(OPTIONS, replicas=2, cpus=1, slack=3))
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()
    ray.shutdown()


@pytest.fixture
def client(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(
        base_url=url, timeout=PATIENCE, trust_env=False, headers={"Authorization": f"Bearer {KEY}"}
    ) as connected:
        yield connected


def complete(client: httpx.Client, **body: Any) -> httpx.Response:
    return client.post("/v1/completions", json={"prompt": "import ", "max_tokens": 8, "temperature": 0} | body)


def events(lines: Iterator[str]) -> Iterator[Any]:
    """What a stream sends. It must be kept: httpx closes a connection whose iterator nobody has any more."""
    for line in lines:
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data: "))


def counted(client: httpx.Client, name: str, label: str = "") -> float:
    """The sum of a metric over the replicas and over the labels that are not named."""
    answer = client.get("/metrics")
    assert answer.status_code == 200, answer.text
    lines = [line for line in answer.text.splitlines() if line.startswith(f"hyaena:{name}{{") and label in line]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


def begun(client: httpx.Client) -> float:
    """Requests that have got their first token. Unlike the number of those that run, it cannot be missed."""
    return counted(client, "time_to_first_token_seconds_count")


def left(client: httpx.Client) -> float:
    """Requests that ended because their clients had left."""
    return counted(client, "request_success_total", 'finished_reason="cancelled"')


def until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < end, f"not after {PATIENCE} s"
        time.sleep(0.05)


def test_the_example_serves_until_it_is_interrupted(tmp_path: Path) -> None:
    """``docs/serving.md`` refers to it as the whole program. It comes before the tests have a cluster."""
    example = Path(__file__).parents[2] / "examples" / "serve_ray.py"
    port = free_port()
    environment = {"RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES": str(100 * 2**20), "PYTHONPATH": SOURCE}
    log = tmp_path / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, example, str(port)],
            cwd=tmp_path,
            env=os.environ | environment,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=PATIENCE) as client:

            def answers() -> bool:
                assert process.poll() is None, log.read_text()[-3000:]
                try:
                    return complete(client).status_code == 200
                except httpx.TransportError:
                    return False

            until(answers)
            want = hyaena.generate(*hyaena.load("cub", dtype="float32"), "import ", max_new_tokens=8)
            assert complete(client).json()["choices"][0]["text"] == want.text
        process.send_signal(signal.SIGINT)
        process.wait(PATIENCE)
    finally:
        process.kill()
        process.wait()


def test_answers_are_those_of_one_server(client: httpx.Client) -> None:
    want = hyaena.generate(*hyaena.load("cub", dtype="float32"), "import ", max_new_tokens=8)
    answer = complete(client).json()
    assert answer["choices"][0]["text"] == want.text and answer["model"] == "cub"
    sampled = [complete(client, temperature=1, seed=5, n=3).json()["choices"] for _ in range(2)]
    assert sampled[0] == sampled[1]
    chat = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 3}
    assert client.post("/v1/chat/completions", json=chat).json()["usage"]["completion_tokens"] == 3
    assert client.post("/score", json={"input": "x"}).status_code == 200
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["cub"]
    named = complete(client)
    assert len(named.headers.get_list("x-request-id")) == 1
    given = client.post("/v1/completions", json={"prompt": "x", "max_tokens": 1}, headers={"X-Request-Id": "mine"})
    assert given.headers.get_list("x-request-id") == ["mine"]
    assert complete(client, max_tokens="x").status_code == 400 and complete(client, model="y").status_code == 404


def test_streams_come_while_they_are_written(client: httpx.Client) -> None:
    body = {"prompt": "import ", "max_tokens": 8, "temperature": 0, "stream": True, "return_token_ids": True}
    with client.stream("POST", "/v1/completions", json=body) as stream:
        parts = [event["choices"][0] for event in events(stream.iter_lines())]
    assert len(parts[0]["token_ids"]) == 1 and len(parts) >= 2  # the first token waits for no other
    text = complete(client).json()["choices"][0]["text"]
    assert "".join(part["text"] for part in parts) == text


def test_a_second_turn_goes_to_the_replica_of_the_first(client: httpx.Client) -> None:
    replicas = set()
    for number in range(4):
        prompt = f"# module {number}\n" + "import os\n" * 30
        first = complete(client, prompt=prompt)
        prompt += first.json()["choices"][0]["text"] + "\nimport sys\n" * 10
        second = complete(client, prompt=prompt)
        third = complete(client, prompt=prompt + "\nimport re\n")
        assert first.headers["x-replica"] == second.headers["x-replica"] == third.headers["x-replica"]
        hits = [answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in (first, second, third)]
        assert hits[0] == 0 and hits[1] >= 256 and hits[2] >= 384
        replicas.add(first.headers["x-replica"])
    assert len(replicas) == 2 or len({complete(client, prompt=f"{n}" * 64).headers["x-replica"] for n in range(8)}) == 2


def test_keys_and_limits_hold(url: str, client: httpx.Client) -> None:
    body = {"prompt": "x", "max_tokens": 2}
    for headers in ({}, {"Authorization": "Bearer other"}):
        for path in ("/v1/completions", "/metrics"):
            refused = httpx.post(url + path, json=body, headers=headers, trust_env=False)
            assert refused.status_code == 401 and refused.json()["error"]["code"] == "invalid_api_key"
    assert httpx.get(f"{url}/health", trust_env=False).status_code == 200
    for host, status in (("a.example", 200), ("b.example", 403)):
        assert httpx.get(f"{url}/health", headers={"Host": host}, trust_env=False).status_code == status
    assert complete(client, prompt="x" * 200_000).status_code == 413
    pieces = (b"x" * 50_000 for _ in range(4))
    assert client.post("/v1/completions", content=pieces).status_code == 413
    assert complete(client, max_tokens=LONG + 1).status_code == 400
    with ExitStack() as stack, ThreadPoolExecutor(40) as pool:
        holders = [stack.enter_context(held(client)) for _ in range(2)]  # all rows of both replicas
        asked = [pool.submit(complete, client, prompt=f"{n:>64}") for n in range(40)]
        until(lambda: sum(one.done() for one in asked) >= 40 - 2 * 4)  # the others wait
        stack.pop_all().close()
    answers = [one.result() for one in asked]
    refused = [answer for answer in answers if answer.status_code != 200]
    assert len(refused) >= 40 - 2 * 4 and {answer.status_code for answer in refused} == {429}
    assert all(answer.headers["Retry-After"] for answer in refused)
    assert {answer.headers["x-replica"] for answer in answers} == set(holders) and len(set(holders)) == 2


@contextmanager
def held(client: httpx.Client) -> Iterator[str]:
    """Within it, all rows of a replica write a long answer; its name."""
    body = {"prompt": "import ", "n": 4, "max_tokens": LONG, "stream": True, "ignore_eos": True}
    with client.stream("POST", "/v1/completions", json=body) as stream:
        found, started = events(stream.iter_lines()), set[int]()
        while len(started) < 4:
            started.add(next(found)["choices"][0]["index"])
        yield stream.headers["x-replica"]


def test_a_client_that_leaves_ends_its_work(url: str, client: httpx.Client) -> None:
    before, cancelled = begun(client), left(client)
    body = {"prompt": "import ", "max_tokens": LONG, "stream": True, "ignore_eos": True}
    with client.stream("POST", "/v1/completions", json=body) as stream:
        found = events(stream.iter_lines())
        assert next(found)["choices"] and left(client) == cancelled
    until(lambda: left(client) == cancelled + 1)
    host, port = url.removeprefix("http://").split(":")
    connection = HTTPConnection(host, int(port), timeout=PATIENCE)
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    connection.request("POST", "/v1/completions", json.dumps(body | {"stream": False}), headers)
    until(lambda: begun(client) == before + 2)
    connection.close()
    until(lambda: left(client) == cancelled + 2)
    assert counted(client, "num_requests_running") == 0


def test_a_replica_that_dies_hangs_nobody(client: httpx.Client) -> None:
    prompt = "import os\n" * 20
    name = complete(client, prompt=prompt).headers["x-replica"]
    before = begun(client)
    ended: list[Any] = []

    def read_stream() -> None:
        body = {"prompt": prompt, "max_tokens": LONG, "stream": True, "ignore_eos": True}
        with client.stream("POST", "/v1/completions", json=body) as stream:
            assert stream.headers["x-replica"] == name
            ended.extend(events(stream.iter_lines()))

    thread = threading.Thread(target=read_stream)
    thread.start()
    with ThreadPoolExecutor(4) as pool:
        until(lambda: begun(client) == before + 1)
        body = {"prompt": prompt, "max_tokens": 2000, "ignore_eos": True}  # they run until the replica dies
        waiting = [pool.submit(complete, client, **body) for _ in range(2)]
        until(lambda: begun(client) == before + 3)
        ray.kill(ray.get_actor(f"SERVE_REPLICA::default#Replica#{name}", namespace="serve"))
        assert complete(client, prompt=prompt).status_code == 200, "the other replica answers"
        answers = [one.result(PATIENCE) for one in waiting]
        thread.join(PATIENCE)
    assert not thread.is_alive()
    assert ended[-1]["error"]["code"] == "generation_failed"
    assert [answer.status_code for answer in answers] == [200, 200]
    assert name not in {answer.headers["x-replica"] for answer in answers}


def test_hosts_that_are_none_are_refused() -> None:
    with pytest.raises(InputError, match="is no host"):
        application(ServerOptions(allowed_hosts=["http://a.example"]))


@pytest.mark.parametrize("options", [{"replicas": 0}, {"ingresses": "2"}, {"slack": -1}, {"slack": 0.5}])
def test_numbers_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"{next(iter(options))} must be a whole number of at least"):
        application(OPTIONS, **options)
