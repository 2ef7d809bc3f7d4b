"""Ray Serve: replicas of the server on many machines, and requests that begin alike on the same replica.

    from ray import serve

    from hyaena.serve.loading import ServerOptions
    from hyaena.serve.ray import application

    serve.run(application(ServerOptions(model="FOLDER"), replicas=4, gpus=1))

An *ingress* takes the requests, checks their size and key, and forwards each to a *replica*, which has an engine and
the application of ``hyaena serve``. Which one is decided by :class:`PrefixRouter`, in the process of the ingress.
"""

# ruff: noqa: E402

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from hyaena.extras import require

require("ray", extra="ray", purpose="hyaena.serve.ray")

from ray import serve
from ray.exceptions import RayError
from ray.serve.config import RequestRouterConfig
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Message

from hyaena.arguments import whole
from hyaena.serve.affinity import Affinity
from hyaena.serve.app import add_errors, cross_origin, make_app
from hyaena.serve.forwarding import Forwarder, ServerLostError, answer
from hyaena.serve.guards import AllowedHosts, Authentication, BodyLimit, hosts_to_check
from hyaena.serve.loading import ServerOptions, load_server
from hyaena.serve.metrics import MEDIA_TYPE, merged
from hyaena.serve.protocol import ApiError
from hyaena.serve.run import leave_out_of_collections, log_requests
from hyaena.serve.warmup import warm_up

DRAIN = 35.0
"""Seconds that a replica has to finish its requests when it is stopped."""

METRICS = 10.0
"""Seconds that a replica has to send its metrics."""


def application(
    options: ServerOptions | None = None,
    *,
    replicas: int = 1,
    gpus: float = 0,
    cpus: float = 1,
    ingresses: int = 1,
    slack: int = 16,
) -> serve.Application:
    """What ``serve.run`` and ``serve run`` take; to be served at the route ``/``.

    Args:
        options: what every replica serves, see ``ServerOptions``. Folders must be there on every machine.
        replicas: engines, each with the weights of the model.
        gpus, cpus: of a replica.
        ingresses: processes that forward requests. Each remembers which prefixes it has sent where.
        slack: see ``Affinity``.

    Raises:
        InputError: a number that is out of range, or a host that is none.
    """
    options = options or ServerOptions()
    for name, value, least in (("replicas", replicas, 1), ("ingresses", ingresses, 1), ("slack", slack, 0)):
        whole(name, value, f"a whole number of at least {least}", least)
    _hosts(options)
    most = 2 * (options.engine.max_rows + options.engine.max_waiting)  # the engine's queue refuses before Ray's waits
    replica = Replica.options(
        num_replicas=replicas,
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
        max_ongoing_requests=most,
        graceful_shutdown_timeout_s=DRAIN,
        request_router_config=RequestRouterConfig(
            request_router_class=PrefixRouter, request_router_kwargs={"slack": slack}
        ),
    )
    ingress = Ingress.options(
        num_replicas=ingresses,
        ray_actor_options={"num_cpus": 0},  # it computes next to nothing, and must not wait for a core
        max_ongoing_requests=most * replicas,
        graceful_shutdown_timeout_s=DRAIN,
    )
    return ingress.bind(options, replica.bind(options))


class PrefixRouter(RequestRouter):
    """Sends a request to the replica that has read the beginning of its prompt; see ``Affinity``."""

    def initialize_state(self, slack: int = 16) -> None:
        """Begin with no request routed."""
        self._affinity: Affinity[ReplicaID] = Affinity(slack=slack)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The replicas, the best first."""
        by_id = {replica.replica_id: replica for replica in candidate_replicas}
        return [[by_id[name]] for name in self._affinity.rank(_starts(pending_request), list(by_id))]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """Remember where a request went."""
        request = pending_request.metadata.internal_request_id
        self._affinity.began(request, _starts(pending_request), replica_id)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """A request has ended."""
        self._affinity.ended(internal_request_id, replica_id)

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """A replica is gone."""
        super().on_replica_actor_died(replica_id)
        self._affinity.lost(replica_id)


def _starts(request: PendingRequest | None) -> Sequence[bytes]:
    return () if request is None else request.kwargs.get("starts", ())


def _hosts(options: ServerOptions) -> list[str]:
    """The hosts that are answered to: all unless some are named, for Ray decides where it listens."""
    return hosts_to_check("0.0.0.0", "0.0.0.0", options.allowed_hosts)


@serve.deployment
class Replica:
    """An engine, and the application of ``hyaena serve`` before it.

    Args:
        options: what is served.
    """

    def __init__(self, options: ServerOptions) -> None:
        self.server = load_server(options)
        self.app = make_app(self.server, log_prompts=options.log_prompts)
        self.name = serve.get_replica_context().replica_id.unique_id
        log_requests()
        self.server.default.engine.start()
        if options.warm_up:
            warm_up(self.server.default.engine)
        leave_out_of_collections()

    async def answer(
        self, scope: dict[str, Any], body: bytes, *, starts: Sequence[bytes] = ()
    ) -> AsyncGenerator[Message]:
        """The messages of the application; ``starts`` is for the router."""
        async with contextlib.aclosing(answer(self.app, self.name, scope, body)) as messages:
            async for message in messages:
                yield message

    async def metrics(self) -> tuple[str, str]:
        """The name of the replica, and its metrics in Prometheus's text format."""
        return self.name, self.server.metrics.text().decode()

    def check_health(self) -> None:
        """Have Ray replace this replica where its engine has stopped.

        Raises:
            RuntimeError: it has.
        """
        if not self.server.default.engine.alive:
            raise RuntimeError("the engine has stopped")

    def __del__(self) -> None:
        if hasattr(self, "server"):
            self.server.default.engine.stop(timeout=0, abandon=1)


@serve.deployment
@serve.ingress()
class Ingress:
    """Takes requests and forwards them.

    Args:
        options: what is served.
        replicas: handle of the replicas.
    """

    def __init__(self, options: ServerOptions, replicas: DeploymentHandle) -> None:
        self.options, self.replicas = options, replicas

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """The application, which Ray asks for here."""
        guards = [Middleware(BodyLimit, most=self.options.limits.body_bytes)]
        if self.options.keys:
            guards.insert(0, Middleware(Authentication, keys=self.options.keys))
        if self.options.allow_origins:
            guards.insert(0, Middleware(CORSMiddleware, **cross_origin(self.options.allow_origins)))
        if hosts := _hosts(self.options):
            guards.insert(0, Middleware(AllowedHosts, hosts=hosts))
        routes = [Route("/metrics", self._metrics), Mount("/", Forwarder(self._ask))]
        app = Starlette(routes=routes, middleware=guards)
        add_errors(app)
        return app

    async def _ask(self, scope: dict[str, Any], body: bytes, starts: Sequence[bytes]) -> AsyncGenerator[Message]:
        messages = self.replicas.options(stream=True).answer.remote(scope, body, starts=starts)
        try:
            async for message in messages:
                yield message
        except (RayError, RayServeException) as error:
            raise ServerLostError(str(error)) from error
        finally:
            messages.cancel()

    async def _metrics(self, request: Request) -> Response:
        """The metrics of all replicas, each with the label ``replica``.

        Raises:
            ApiError: one of them does not answer.
        """
        try:
            found = await self.replicas.broadcast("metrics").results_async(timeout_s=METRICS, return_exceptions=True)
        except TimeoutError:
            message = f"a replica did not send its metrics within {METRICS:g} seconds: try again later"
            raise ApiError(503, message, code="unavailable", headers={"Retry-After": "10"}) from None
        texts = dict(pair for pair in found if not isinstance(pair, BaseException))
        return Response(await asyncio.to_thread(merged, texts), media_type=MEDIA_TYPE)
