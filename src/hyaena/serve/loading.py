"""What is served, as a description that can be checked, sent to another machine, and loaded there."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from hyaena import hub
from hyaena.adapters import check_adapter, read_adapter
from hyaena.arguments import real
from hyaena.errors import InputError, shown
from hyaena.serve.app import Server
from hyaena.serve.conversation import find_template
from hyaena.serve.delivery import STREAM_INTERVAL
from hyaena.serve.engine import Engine, EngineSettings
from hyaena.serve.metrics import Metrics
from hyaena.serve.service import Limits, Served

_ORIGIN = re.compile(r"\*|null|[a-z][a-z0-9+.-]*://[^/?#\s@A-Z]+")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@-]{0,127}")


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """A model, its adapters, and how they are served.

    Attributes:
        model, revision, config, device, dtype, fp8, weights, cache_dtype: as in ``hub.load``; without a device, a GPU
            if there is one.
        name: by which clients ask for the model; by default ``model``.
        adapters: names by which clients ask for them -> folders of LoRA adapters.
        chat_template: ``nous``, or a file with a Jinja template; by default what the folders of adapter and model have.
        engine: how the machine is used.
        limits: of every request.
        stream_interval: seconds between the events of a stream, see ``app.Server``.
        keys: bearer keys, one of which a client must send; without any, no key is needed.
        allow_origins: origins of web pages that may call the server (CORS).
        allowed_hosts: hosts that the server answers to beside its own, see ``guards.hosts_to_check``; ``"*"`` is any.
        warm_up: whether the engine compiles what the first requests need before it takes any.
        log_prompts: whether the log holds the bodies of requests.

    Raises:
        InputError: a stream_interval that is no number of seconds from 0 to 10, a key that clients cannot send, or an
            origin that no page has.
    """

    model: str = "cub"
    revision: str | None = None
    config: str | None = None
    device: str | None = None
    dtype: str | None = None
    fp8: str = "auto"
    weights: str | None = None
    cache_dtype: str | None = None
    name: str | None = None
    adapters: Mapping[str, str] = field(default_factory=dict)
    chat_template: str | None = None
    engine: EngineSettings = field(default_factory=EngineSettings)
    limits: Limits = field(default_factory=Limits)
    stream_interval: float = STREAM_INTERVAL
    keys: Sequence[str] = ()
    allow_origins: Sequence[str] = ()
    allowed_hosts: Sequence[str] = ()
    warm_up: bool = True
    log_prompts: bool = False

    def __post_init__(self) -> None:
        for key in self.keys:
            if not re.fullmatch("[!-~]([ -~]*[!-~])?", key):
                why = "has a space at an end, line feeds or letters outside ASCII, or is empty"
                raise InputError(f"a key {why}: choose another")  # not shown: it may be a good one and a line feed
        for origin in self.allow_origins:
            if not _ORIGIN.fullmatch(origin):
                raise InputError(
                    f"{shown(origin)} is no origin of a page: give scheme, host and port alone, such as "
                    "http://localhost:3000, or * for any"
                )
        real(
            "stream_interval", self.stream_interval, "a number of seconds from 0 to 10", lambda value: 0 <= value <= 10
        )


def check_names(adapters: Iterable[str], model: str) -> None:
    """Refuse names of adapters that clients could not write, or that are the model's.

    Raises:
        InputError: one of them.
    """
    for name in adapters:
        if not _NAME.fullmatch(name):
            raise InputError(
                f"{shown(name)} is no name for an adapter: use at most 128 letters, digits and ._:/@- with a letter or "
                "a digit first"
            )
        if name == model:
            raise InputError(f"the adapter {name} has the name of the model: choose another name")


def load_server(options: ServerOptions) -> Server:
    """Load a model and its adapters, and make the engine that runs them, which the caller starts.

    Raises:
        HyaenaError: in one line, what is wrong and how to put it right. Small files are read before large ones.
    """
    import torch

    name = options.name or options.model
    check_names(options.adapters, name)
    home = Path(options.model)
    template = find_template(options.chat_template, [home], options.model)
    folders = {key: Path(folder) for key, folder in options.adapters.items()}
    templates = {
        key: find_template(options.chat_template, [folder, home], options.model) for key, folder in folders.items()
    }
    adapters = {key: read_adapter(folder) for key, folder in folders.items()}
    if adapters:  # before the large files
        config, _ = hub.load_tokenizer_of(options.model, revision=options.revision, config=options.config)
        for adapter in adapters.values():
            check_adapter(config, adapter, merged=False)
    model, tokenizer = hub.load(
        options.model,
        device=options.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        dtype=options.dtype,
        revision=options.revision,
        config=options.config,
        fp8=options.fp8,
        weights=options.weights,
        cache_dtype=options.cache_dtype,
    )
    metrics = Metrics(name)
    engine = Engine(model, tokenizer, options.engine, metrics, adapters)
    base = Served(name=name, engine=engine, tokenizer=tokenizer, template=template)
    served = [replace(base, name=key, template=templates[key], adapter=key, parent=name) for key in adapters]
    return Server([base, *served], metrics, options.limits, stream_interval=options.stream_interval)
