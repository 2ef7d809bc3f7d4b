"""Which hosts a server answers to: pages whose names are resolved to this machine cannot call it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import httpx
import pytest
from benchmarks.serve.process import serving
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.testclient import TestClient

from hyaena.cli import main
from hyaena.errors import InputError
from hyaena.serve.guards import AllowedHosts, hosts_to_check
from serve.clients import PATIENCE


def client(hosts: Sequence[str]) -> TestClient:
    async def page(request: Request) -> Response:
        return PlainTextResponse("answered")

    return TestClient(Starlette(routes=[Route("/", page)], middleware=[Middleware(AllowedHosts, hosts=hosts)]))


LOCAL = hosts_to_check("127.0.0.1", "127.0.0.1", [])


@pytest.mark.parametrize(
    "host", ["localhost", "127.0.0.1", "127.0.0.1:8000", "LocalHost:1", "localhost.", "[::1]:8000", "[::1]"]
)
def test_this_machine_is_answered(host: str) -> None:
    assert client(LOCAL).get("/", headers={"Host": host}).text == "answered"


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "10.0.0.1", "", "*"],
)
def test_other_hosts_are_refused_with_an_error_that_names_the_fix(host: str) -> None:
    answer = client(LOCAL).get("/", headers={"Host": host})
    error = answer.json()["error"]
    assert answer.status_code == 403 and error["code"] == "host_not_allowed" and error["type"] == "permission_error"
    assert "--allowed-host" in error["message"] and "\n" not in error["message"]


def test_every_host_of_a_request_must_be_allowed() -> None:
    headers = [("Host", "localhost"), ("Host", "evil.example")]
    assert client(LOCAL).get("/", headers=headers).status_code == 403


CASES: list[tuple[str, str, list[str], dict[str, bool]]] = [
    ("127.0.0.1", "localhost", [], {"localhost": True, "a.example": False}),
    ("127.0.0.5", "127.0.0.5", [], {"127.0.0.5": True, "127.0.0.1": True, "a.example": False}),
    ("::1", "::1", [], {"[::1]": True, "localhost": True, "a.example": False}),
    ("127.0.0.1", "localhost", ["A.example"], {"a.example": True, "localhost": True, "b.example": False}),
    ("127.0.0.1", "localhost", ["*"], {"a.example": True}),
    ("0.0.0.0", "0.0.0.0", [], {"a.example": True, "10.0.0.7": True}),
    ("10.0.0.7", "box", ["a.example"], {"box": True, "10.0.0.7": True, "localhost": True, "b.example": False}),
    ("fe80::1%eth0", "fe80::1%eth0", [], {"a.example": True}),
]


@pytest.mark.parametrize(("address", "named", "allowed", "answers"), CASES)
def test_what_is_checked_depends_on_the_address(
    address: str, named: str, allowed: list[str], answers: dict[str, bool]
) -> None:
    hosts = hosts_to_check(address, named, allowed)
    for host, answered in answers.items():
        assert (not hosts or client(hosts).get("/", headers={"Host": host}).status_code == 200) == answered, host


def test_an_empty_host_is_named_as_what_it_is() -> None:
    error = client(hosts_to_check("127.0.0.1", "localhost", [])).get("/", headers={"Host": ""}).json()["error"]
    assert error["code"] == "host_not_allowed"
    assert error["message"] == (
        "this server does not answer to requests that name no host: ask it at the address that it listens at, or start "
        "it with --allowed-host '*'"
    )


@pytest.mark.parametrize("host", ["http://a.example", "a.example:8000", "a.example/x", "", "a b", "*.example", "ü"])
def test_what_is_no_host_is_refused(host: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match="is no host"):
        hosts_to_check("127.0.0.1", "localhost", [host])
    assert main(["serve", "--port", "0", "--device", "cpu", f"--allowed-host={host}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "without a scheme, port or path" in line


def test_the_command_checks_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("--kv-memory", "0.05", "--no-warm-up", "--allowed-host", "a.example")
    with serving(*options, environment={"OMP_NUM_THREADS": "1"}) as server:

        def ask(path: str, **headers: str) -> Any:
            return httpx.get(server.url + path, headers=headers, timeout=PATIENCE, trust_env=False)

        for path in ("/", "/health", "/v1/models"):
            assert ask(path).status_code == ask(path, Host="a.example").status_code == 200
            assert ask(path, Host="b.example").status_code == 403
    assert any('"status": 403' in line for line in server.log)
