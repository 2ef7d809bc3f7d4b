"""``hyaena chat``: a conversation in the terminal."""

from __future__ import annotations

import argparse
import contextlib
import io
import queue
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hyaena.cli.formatting import json_file
from hyaena.cli.model_options import DTYPE_HELP, add_cache_option, choose_device
from hyaena.errors import SCREEN, HyaenaError, InputError, counted, printable
from hyaena.extras import require
from hyaena.files import expanded, write_atomically

if TYPE_CHECKING:
    from hyaena.serve.conversation import ChatTemplate
    from hyaena.serve.engine import Delta, Engine

HELP = "talk to a model in the terminal"
EXAMPLES = (
    "hyaena chat --model togethercomputer/StripedHyena-Nous-7B",
    'hyaena chat --model togethercomputer/StripedHyena-Nous-7B --system "Answer briefly." --temperature 0.7',
)

COMMANDS = """\
/reset            forget the conversation
/system TEXT      begin the conversation anew with a system message
/save FILE        write the conversation as JSON
/stats            times and tokens of the last answer
/quit             leave (Ctrl-D does, too)
A line that ends in \\ goes on in the next; a line of \"\"\" begins and ends a text of several lines.
Ctrl-C stops an answer."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options; sampling is that of the published models' cards unless told otherwise."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        default="togethercomputer/StripedHyena-Nous-7B",
        help="a folder or a hub id of a model that learned dialogue (togethercomputer/StripedHyena-Nous-7B)",
    )
    group.add_argument("--revision", metavar="REV", help="branch, tag or commit of a hub id")
    group.add_argument("--adapter", metavar="FOLDER", help="a LoRA adapter of the model, from PEFT or hyaena")
    group.add_argument("--device", help="cpu, cuda, cuda:1, … (a GPU if there is one)")
    group.add_argument("--dtype", help=DTYPE_HELP)
    add_cache_option(group)
    group.add_argument("--chat-template", metavar="NAME", help="nous, or a file with a Jinja template")
    group.add_argument("--system", metavar="TEXT", help="the message that stands before the conversation")

    group = parser.add_argument_group("answers")
    group.add_argument("--max-new-tokens", type=int, default=1024, metavar="N", help="of an answer (1024)")
    group.add_argument("--temperature", type=float, default=0.7, metavar="T", help="0 is greedy (0.7)")
    group.add_argument(
        "--top-p", type=float, default=0.95, metavar="P", help="keep tokens that together reach P (0.95)"
    )
    group.add_argument(
        "--repetition-penalty", type=float, default=1.0, metavar="R", help="above 1 avoids tokens that occurred (1)"
    )
    group.add_argument("--seed", type=int, metavar="S", help="makes answers reproducible")


def run(args: argparse.Namespace) -> int:
    """Load the model and read lines until the end of the input."""
    require("jinja2", "prometheus_client", extra="serve", purpose="hyaena chat")
    from hyaena.sampling import SamplingParams

    params = SamplingParams(
        temperature=args.temperature, top_p=args.top_p, repetition_penalty=args.repetition_penalty, seed=args.seed
    )
    if args.max_new_tokens < 1:
        raise InputError(f"--max-new-tokens must be at least 1, not {args.max_new_tokens}")
    if args.model == "cub" and args.adapter is None:
        raise InputError(
            "cub learned Python source and no dialogue: chat with togethercomputer/StripedHyena-Nous-7B, name an "
            "adapter that learned it with --adapter, or continue text with `hyaena generate`"
        )
    from hyaena import hub
    from hyaena.serve.conversation import find_template

    folders = [Path(folder) for folder in (args.adapter, args.model) if folder is not None]
    template = find_template(args.chat_template, folders, args.model)
    if template is None:
        hub.load_tokenizer_of(args.model, revision=args.revision)  # where there is no model, that is the cause
        raise InputError(f"{args.model} has no chat template: name one with --chat-template, such as nous")

    device = choose_device(args)

    from hyaena.serve.engine import Engine, EngineSettings

    model, tokenizer = hub.load(
        args.model,
        device=device,
        dtype=args.dtype,
        revision=args.revision,
        adapter=args.adapter,
        cache_dtype=args.cache_dtype,
    )
    engine = Engine(model, tokenizer, EngineSettings(max_rows=1, max_waiting=1))
    engine.start()
    try:
        chat = Chat(engine, template, params, args.max_new_tokens, system=args.system)
        for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "replace")):  # no byte ends the session
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors=errors)
        if sys.stdin.isatty():
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  (line editing and history of input())
            print(f"{args.model} on {device}. /help lists the commands.")
        return converse(chat, _read_line)
    finally:
        engine.stop(timeout=0)


class Chat:
    """A conversation with a model.

    Args:
        engine: that runs the model; its prefix cache spares every turn the ones before.
        template: turns messages into a prompt.
        params: how tokens are chosen.
        max_new_tokens: of an answer.
        system: the message before the conversation.
    """

    def __init__(
        self, engine: Engine, template: ChatTemplate, params: Any, max_new_tokens: int, *, system: str | None = None
    ) -> None:
        self.engine, self.template, self.params, self.max_new_tokens = engine, template, params, max_new_tokens
        self.messages: list[dict[str, str]] = []
        self.stats = "no answer yet"
        self.begin(system)

    def begin(self, system: str | None) -> None:
        """Begin anew, with a system message or without."""
        self.messages = [{"role": "system", "content": system}] if system else []

    def ask(self, text: str, show: Callable[[str], object]) -> None:
        """Add a message and show the answer as it comes. Ctrl-C keeps what was said until then, if anything was.

        Raises:
            HyaenaError: the conversation is too long, or the model failed; it is as it was before the message.
        """
        from hyaena.serve.engine import Request

        messages = [*self.messages, {"role": "user", "content": text}]
        tokenizer = self.engine.tokenizer
        prompt = self.template.encode(tokenizer, messages)
        room = min(self.max_new_tokens, self.engine.max_length - len(prompt))
        if room < 1:
            raise InputError(f"the conversation fills the {self.engine.max_length} tokens of the model: /reset it")
        deltas: queue.SimpleQueue[Delta] = queue.SimpleQueue()
        began = time.perf_counter()
        key = self.engine.submit(
            Request(
                prompt=prompt,
                params=self.params,
                max_new_tokens=room,
                eos_ids=frozenset(tokenizer.eos_ids),
                stop=("\n### Instruction:",),
            ),
            deltas.put,
        )
        parts, count, cached, first = [], 0, 0, 0.0
        try:
            while True:
                delta = deltas.get()
                if delta.error is not None:
                    raise HyaenaError(delta.error)
                if delta.token is not None:
                    first = first or time.perf_counter() - began
                    count, cached = count + 1, delta.cached_tokens
                    parts.append(delta.text)
                    show(delta.text)
                if delta.finish_reason is not None:
                    break
        except KeyboardInterrupt:
            show(" …")
            if not count:
                return
        finally:  # also where a second Ctrl-C comes
            self.engine.cancel(key)
        seconds = time.perf_counter() - began - first
        rate = f", {(count - 1) / seconds:.1f} tokens/s" if count > 1 and seconds > 0 else ""
        self.stats = (
            f"{counted(len(prompt), 'token')} read ({cached} of them from the cache), first token after {first:.2f} s, "
            f"{counted(count, 'token')} written{rate}"
        )
        self.messages = [*messages, {"role": "assistant", "content": "".join(parts).strip()}]

    def save(self, path: Path) -> None:
        """Write the messages as JSON.

        Raises:
            HyaenaError: the file cannot be written.
        """
        content = json_file({"messages": self.messages})
        write_atomically(path, lambda file: file.write(content))


def converse(chat: Chat, read_line: Callable[[str], str]) -> int:
    """Read messages and commands until the input ends.

    Args:
        chat: the conversation.
        read_line: shows a prompt and returns the line that was typed; EOFError at the end.
    """
    while True:
        try:
            text = read_message(read_line)
        except EOFError:
            print()
            return 0
        except KeyboardInterrupt:
            print("\n(Ctrl-D or /quit leaves)")
            continue
        command, _, rest = text.partition(" ")
        try:
            if command == "/quit":
                return 0
            if command == "/help":
                print(COMMANDS)
            elif command == "/reset":
                chat.begin(next((m["content"] for m in chat.messages if m["role"] == "system"), None))
                print("(the conversation is forgotten)")
            elif command == "/system":
                chat.begin(rest.strip() or None)
                print("(a new conversation begins)")
            elif command == "/save":
                if not rest.strip():
                    raise InputError("/save takes the name of a file")
                chat.save(expanded(rest.strip()))
                print(f"(saved to {rest.strip()})")
            elif command == "/stats":
                print(chat.stats)
            elif command.startswith("/"):
                raise InputError(
                    f"there is no command {command}: /help lists them; begin a message like this with a space"
                )
            elif text.strip():
                chat.ask(text, lambda part: print(part, end="", flush=True))
                print()
        except KeyboardInterrupt:
            print("\n(Ctrl-D or /quit leaves)")
        except HyaenaError as error:
            print(f"hyaena: error: {printable(str(error), limit=SCREEN)}", file=sys.stderr)


def read_message(read_line: Callable[[str], str]) -> str:
    """One message: a line, lines that end in a backslash, or lines between two of triple quotes."""
    line = read_line("> ")
    if line.strip() == '"""':
        lines = []
        while (line := read_line("… ")).strip() != '"""':
            lines.append(line)
        return "\n".join(lines)
    parts = [line]
    while parts[-1].endswith("\\"):
        parts[-1] = parts[-1][:-1]
        parts.append(read_line("… "))
    return "\n".join(parts)


def _read_line(prompt: str) -> str:
    return input(prompt if sys.stdin.isatty() else "")
