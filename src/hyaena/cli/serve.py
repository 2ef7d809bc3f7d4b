"""``hyaena serve``: an OpenAI-compatible server with a playground."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from hyaena.cli.model_options import add_model_options
from hyaena.errors import InputError, shown
from hyaena.extras import require

HELP = "serve a model over HTTP, with OpenAI's API and a playground"
EXAMPLES = (
    "hyaena serve --model cub --port 8000",
    "hyaena serve --model togethercomputer/StripedHyena-Nous-7B --device cuda --adapter support=adapters/support",
)

KEY_VARIABLE = "HYAENA_API_KEY"

MAX_ROWS = 65_536
"""Most requests decoded together; tables of so many rows are made at the start."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options; without any, the bundled model is served on this machine only."""
    group = parser.add_argument_group("model")
    add_model_options(group)
    group.add_argument("--name", help="the name by which clients ask for the model (what --model says)")
    group.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="NAME=FOLDER",
        help="also serve the model with this LoRA adapter, under this name; may be repeated",
    )
    group.add_argument("--chat-template", metavar="NAME", help="nous, or a file with a Jinja template")

    group = parser.add_argument_group("address and access")
    group.add_argument("--host", default="127.0.0.1", help="the address to listen at (127.0.0.1: this machine only)")
    group.add_argument("--port", type=int, default=8000, metavar="N", help="0 takes a free one (8000)")
    group.add_argument(
        "--api-key",
        action="append",
        default=[],
        metavar="KEY",
        help=f"ask clients for a bearer key; may be repeated; better in the variable {KEY_VARIABLE}",
    )
    group.add_argument(
        "--allow-origin", action="append", default=[], metavar="URL", help="let pages from there call the server (CORS)"
    )
    group.add_argument(
        "--allowed-host",
        action="append",
        default=[],
        metavar="NAME",
        help="also answer to requests for this host, * for any; may be repeated (at an address of this machine only: "
        "localhost and --host; at others: any)",
    )

    group = parser.add_argument_group("memory and scheduling")
    group.add_argument(
        "--kv-memory", type=float, metavar="GB", help="for keys and values (half of a GPU's free memory; 1 on a CPU)"
    )
    group.add_argument(
        "--prefix-memory", type=float, default=0.25, metavar="GB", help="for states of the prefix cache; 0: off (0.25)"
    )
    group.add_argument("--max-rows", type=int, default=64, metavar="N", help="requests decoded together (64)")
    group.add_argument("--max-waiting", type=int, default=256, metavar="N", help="requests that may wait (256)")
    group.add_argument(
        "--chunk", type=int, metavar="N", help="tokens of prompts per pass (as --prefill-chunk of generate)"
    )
    group.add_argument(
        "--decoding",
        default="auto",
        choices=("auto", "eager", "static", "compiled", "cuda_graph"),
        help="as in generate (auto)",
    )
    group.add_argument(
        "--deterministic",
        action="store_true",
        help="give every request bitwise the same numbers whatever runs beside it; slow",
    )
    group.add_argument(
        "--no-warm-up",
        dest="warm_up",
        action="store_false",
        help="take requests before kernels are compiled and graphs captured: the first ones wait for that",
    )

    group.add_argument(
        "--stream-interval",
        type=float,
        default=0.02,
        metavar="S",
        help="seconds between the events of a stream, in which tokens that come sooner are sent together; 0: an event "
        "for each token (0.02)",
    )

    group = parser.add_argument_group("limits")
    group.add_argument("--max-new-tokens", type=int, default=16384, metavar="N", help="of a completion (16384)")
    group.add_argument("--max-body", type=float, default=4, metavar="MB", help="size of a request (4)")
    group.add_argument("--timeout", type=float, default=3600, metavar="S", help="seconds of a request (3600)")
    group.add_argument("--drain", type=float, default=30, metavar="S", help="seconds to finish after SIGTERM (30)")

    group = parser.add_argument_group("log")
    group.add_argument("--quiet", action="store_true", help="do not log requests")
    group.add_argument("--log-prompts", action="store_true", help="log the bodies of requests, prompts and all")


def run(args: argparse.Namespace) -> int:
    """Check the options, load the model, and serve until a signal ends it."""
    require("fastapi", "uvicorn", "prometheus_client", "jinja2", extra="serve", purpose="hyaena serve")
    for name in ("kv_memory", "prefix_memory", "max_body", "timeout", "drain"):
        value = getattr(args, name)
        may_be_0 = name in ("prefix_memory", "drain")
        if value is not None and not (0 <= value < 1e9 and (value or may_be_0)):
            wanted = "a number, 0 or more" if may_be_0 else "a number above 0"
            raise InputError(f"--{name.replace('_', '-')} must be {wanted} (and below 1e9), not {value}")
    for name in ("max_rows", "max_waiting", "chunk", "max_new_tokens"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
    if args.max_rows > MAX_ROWS:
        raise InputError(f"--max-rows must be at most {MAX_ROWS:,}, not {args.max_rows}")
    if not 0 <= args.stream_interval <= 10:
        raise InputError(f"--stream-interval must be a number of seconds from 0 to 10, not {args.stream_interval}")
    if "" in args.api_key:  # of a variable that is not set: the server would be open to all
        raise InputError("--api-key is empty: give a key, or leave it out to serve without one")
    if os.environ.get(KEY_VARIABLE) == "":
        raise InputError(f"{KEY_VARIABLE} is set and empty: give a key, or unset it to serve without one")
    if args.name == "":
        raise InputError("--name is empty: give the model a name, or leave it out")
    if not 0 <= args.port < 65536:
        raise InputError(f"--port must be a number from 0 to 65535, not {args.port}")
    adapters = parse_adapters(args.adapter)

    from hyaena.serve.app import make_app
    from hyaena.serve.engine import EngineSettings
    from hyaena.serve.guards import hosts_to_check
    from hyaena.serve.loading import ServerOptions, load_server
    from hyaena.serve.run import listen, log_requests, serve
    from hyaena.serve.service import Limits
    from hyaena.serve.warmup import warm_up

    options = ServerOptions(
        model=args.model,
        revision=args.revision,
        config=args.config,
        device=args.device,
        dtype=args.dtype,
        fp8=args.fp8,
        weights=args.weights,
        cache_dtype=args.cache_dtype,
        name=args.name,
        adapters=adapters,
        chat_template=args.chat_template,
        engine=EngineSettings(
            kv_bytes=None if args.kv_memory is None else int(args.kv_memory * 1e9),
            snapshot_bytes=int(args.prefix_memory * 1e9),
            max_rows=args.max_rows,
            max_waiting=args.max_waiting,
            chunk=args.chunk,
            decoding=args.decoding,
            deterministic=args.deterministic,
        ),
        limits=Limits(body_bytes=int(args.max_body * 1e6), new_tokens=args.max_new_tokens, seconds=args.timeout),
        stream_interval=args.stream_interval,
        keys=[*args.api_key, *([os.environ[KEY_VARIABLE]] if KEY_VARIABLE in os.environ else [])],
        allow_origins=args.allow_origin,
        allowed_hosts=args.allowed_host,
        warm_up=args.warm_up,
        log_prompts=args.log_prompts,
    )
    opened = listen(args.host, args.port)  # before gigabytes are loaded
    host, port = opened.getsockname()[:2]
    hosts = hosts_to_check(host, args.host, options.allowed_hosts)
    server = load_server(options)
    app = make_app(
        server, keys=options.keys, allow_origins=options.allow_origins, hosts=hosts, log_prompts=options.log_prompts
    )
    engine = server.default.engine
    log_requests(quiet=args.quiet)
    engine.start()
    if options.warm_up:
        warm_up(engine)
    place = f"[{host}]" if ":" in host else host
    names = ", ".join(server.models)
    print(
        f"hyaena serves {names} at http://{place}:{port} (OpenAI's API under /v1, a playground at /)", file=sys.stderr
    )
    serve(app, opened, [engine], drain=args.drain)


def parse_adapters(words: Sequence[str]) -> dict[str, str]:
    """The names and folders of ``--adapter NAME=FOLDER``.

    Raises:
        InputError: a word of another form, or a name that is given twice.
    """
    folders: dict[str, str] = {}
    for word in words:
        name, sign, folder = word.partition("=")
        if not (name and sign and folder):
            raise InputError(f"--adapter {shown(word)} is not understood: write NAME=FOLDER")
        if name in folders:
            raise InputError(f"--adapter {shown(name)} is given twice: give every adapter a name of its own")
        folders[name] = folder
    return folders
