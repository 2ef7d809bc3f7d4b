"""What all commands share, tried with a command made for the purpose: arguments, errors, signals and streams."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import hyaena
from hyaena.cli import COMMANDS, build_parser, main
from hyaena.errors import CapacityError, InputError, OutputError
from hyaena.signals import ENDING

FAKE = {"fake": "fake_command"}


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Installs a command named ``fake`` that does what it is told."""

    def install(run: Callable[[argparse.Namespace], int]) -> None:
        module = types.ModuleType("fake_command")
        module.HELP, module.EXAMPLES = "do as told", ("hyaena fake",)
        module.add_arguments = lambda parser: parser.add_argument("--size", type=int, default=1)
        module.run = run
        monkeypatch.setitem(sys.modules, "fake_command", module)

    return install


def raiser(error: BaseException) -> Callable[[argparse.Namespace], int]:
    def run(args: argparse.Namespace) -> int:
        raise error

    return run


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_examples_that_parse(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    with pytest.raises(SystemExit, match="0"):
        main([name, "--help"])
    _, examples = capsys.readouterr().out.split("\nexamples:\n")
    lines = examples.splitlines()
    assert 1 <= len(lines) <= 3
    parser = build_parser()
    for line in lines:
        program, *words = shlex.split(line)
        assert program == "hyaena" and parser.parse_args(words).command == name and len(line) < 120


def test_the_commands_are_the_promised_ones() -> None:
    assert list(COMMANDS) == [
        "generate",
        "chat",
        "serve",
        "convert",
        "quantize",
        "info",
        "score",
        "embed",
        "variants",
        "train",
        "eval",
        "bench",
    ]


def test_arguments_reach_the_command_and_its_status_returns(command: Callable[..., None]) -> None:
    command(lambda args: args.size)
    assert main(["fake", "--size", "3"], commands=FAKE) == 3
    assert main(["fake"], commands=FAKE) == 1


@pytest.mark.parametrize(
    "error", [InputError("empty prompt; pass some text"), CapacityError("cache full"), OSError(5, "no")]
)
def test_an_error_is_one_line_and_status_2(
    command: Callable[..., None], capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    command(raiser(error))
    assert main(["fake"], commands=FAKE) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"hyaena: error: {error}\n"


@pytest.mark.parametrize("argv", [["--debug", "fake"], ["fake", "--debug"]])
def test_debug_shows_the_traceback(
    command: Callable[..., None], capsys: pytest.CaptureFixture[str], argv: list[str]
) -> None:
    command(raiser(InputError("empty prompt")))
    assert main(argv, commands=FAKE) == 2
    err = capsys.readouterr().err
    assert err.startswith("Traceback")
    assert err.endswith("hyaena: error: empty prompt\n")


def test_a_mistake_of_ours_keeps_its_traceback(command: Callable[..., None]) -> None:
    command(raiser(ZeroDivisionError("a bug")))
    with pytest.raises(ZeroDivisionError):
        main(["fake"], commands=FAKE)


def test_an_interrupt_is_status_130(command: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    command(raiser(KeyboardInterrupt()))
    assert main(["fake"], commands=FAKE) == 130
    assert capsys.readouterr().err == "hyaena: interrupted\n"


def turned(signal: BaseException, *errors: Exception) -> Callable[..., int]:
    """A command in which a signal's exception becomes an error, and that another one."""

    def run(args: argparse.Namespace) -> int:
        try:
            raise signal
        except BaseException:
            try:
                raise errors[0]
            except Exception as error:
                raise errors[-1] from error

    return run


def test_a_signal_that_a_library_turns_into_an_error_ends_the_command(
    command: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    """torch's context of a device fails where it was not entered entirely, and loaders take that for a bad file."""
    command(turned(KeyboardInterrupt(), RuntimeError("empty mode stack"), InputError("no model")))
    assert main(["fake"], commands=FAKE) == 130
    assert capsys.readouterr().err == "hyaena: interrupted\n"
    command(turned(SystemExit(143), RuntimeError("empty mode stack")))
    with pytest.raises(SystemExit, match="143"):
        main(["fake"], commands=FAKE)
    command(turned(KeyboardInterrupt(), OutputError("cannot write x: the disk is full")))  # it has to be known
    assert main(["fake"], commands=FAKE) == 2
    assert "the disk is full" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["sing"],
        ["fake", "--size", "big"],
        ["fake", "--colour"],
        ["fake", "--siz", "3"],
        ["fake", "--size", "9" * 100_000],
        ["fake", "--size", "\x1b[31m\n"],
        ["fake", "x\x1b[31m" * 5000],
    ],
)
def test_a_bad_command_line_is_one_line_and_status_2(
    command: Callable[..., None], capsys: pytest.CaptureFixture[str], argv: list[str]
) -> None:
    command(raiser(AssertionError("must not run")))
    with pytest.raises(SystemExit) as stop:
        main(argv, commands=FAKE)
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("hyaena: error: ")
    assert err.count("\n") == 1
    assert err.removesuffix("\n").isprintable()
    assert len(err) < 700


@pytest.mark.parametrize("word", ["--siz", "--sizes", "--siez=3"])
def test_an_unknown_option_names_the_nearest(
    command: Callable[..., None], capsys: pytest.CaptureFixture[str], word: str
) -> None:
    """Beginnings of options are no options: ``--prompt`` would be read as ``--prompt-file``."""
    command(raiser(AssertionError("must not run")))
    with pytest.raises(SystemExit):
        main(["fake", word], commands=FAKE)
    err = capsys.readouterr().err
    assert f"unrecognized arguments: {word}: did you mean --size? (see 'hyaena fake --help')" in err
    with pytest.raises(SystemExit):
        main(["fake", "--stem"], commands=FAKE)  # like --size in its dashes
    assert "unrecognized arguments: --stem (see" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv",
    [
        ["generate", "--prompt", "x"],
        ["generate", "x", "--max-new", "5"],
        ["convert", "a", "b", "--lay", "original"],
        ["info", "cub", "--rev", "main"],
        ["train", "a.yml", "--res"],
        ["bench", "--dev", "cpu"],
        ["bench", "--prefill-chunk", "1,2"],
        ["--deb", "info", "cub"],
        ["--versio"],
    ],
)
def test_no_command_takes_abbreviations_or_drops_a_number(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("error", [OSError(5, "x\x1b[31m\ny"), InputError("\x1b[31m" * 9000), MemoryError()])
def test_a_message_is_printable_and_at_most_one_screen(
    command: Callable[..., None], capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    command(raiser(error))
    assert main(["fake"], commands=FAKE) == 2
    err = capsys.readouterr().err
    assert err.startswith("hyaena: error: ") and len(err) < 2000
    assert err.removesuffix("\n").isprintable()
    assert err != "hyaena: error: \n"


def test_an_error_of_the_system_names_the_file(
    command: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    command(raiser(OSError(36, "File name too long", "bb\n")))
    assert main(["fake"], commands=FAKE) == 2
    assert capsys.readouterr().err == "hyaena: error: bb\\n: File name too long; check its name and permissions\n"


def test_help_and_version(command: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    command(raiser(AssertionError("must not run")))
    with pytest.raises(SystemExit) as stop:
        main(["--help"], commands=FAKE)
    assert stop.value.code == 0
    assert "do as told" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main(["--version"], commands=FAKE)
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"hyaena {hyaena.__version__}\n"


# --- processes

SCRIPT = """
import os, signal, sys, time, types
from hyaena.cli import main

def run(args):
    {body}
    return 0

module = types.ModuleType("fake_command")
module.HELP, module.EXAMPLES, module.add_arguments, module.run = "do as told", (), lambda parser: None, run
sys.modules["fake_command"] = module
sys.exit(main(sys.argv[1:], commands={{"fake": "fake_command"}}))
"""


def process(body: str, *argv: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run ``fake`` with this body in a process of its own."""
    command = [sys.executable, "-c", SCRIPT.format(body=body), *(argv or ("fake",))]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    # Buffered, as streams are for users: an unwritable one is noticed late.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    environment |= options.pop("env", {})
    return subprocess.run(command, text=True, timeout=200, env=environment, **(streams | options))


@pytest.mark.parametrize(("number", "status"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_ends_the_process_with_its_status(number: str, status: int, tmp_path: Path) -> None:
    """Through the clean-up of whatever was running."""
    mark = tmp_path / "cleaned"
    body = f"""
    try:
        os.kill(os.getpid(), signal.{number})
        time.sleep(30)
    finally:
        if "{number}" == "SIGHUP":  # that of the shell behind that of the kernel
            os.kill(os.getpid(), signal.SIGHUP)
        open({str(mark)!r}, "w").close()
    """
    done = process(body)
    assert done.returncode == status
    assert done.stderr == ("hyaena: interrupted\n" if status == 130 else "")
    assert mark.exists()


@pytest.mark.parametrize(("number", "status"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_during_an_import_is_not_turned_into_another_error(number: str, status: int, tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(
        f"import os, signal, time\ntry:\n    os.kill(os.getpid(), signal.{number})\n    time.sleep(30)\n"
        "except BaseException as error:\n    raise ImportError('broken') from error\n"
    )
    done = process(f"sys.path.insert(0, {str(tmp_path)!r}); import slow")
    assert (done.returncode, done.stderr) == (status, "hyaena: interrupted\n" if status == 130 else "")


@pytest.mark.parametrize("number", ["SIGINT", "SIGHUP"])
def test_an_ignored_signal_stays_ignored(number: str) -> None:
    """As ``nohup`` and shells without job control do."""
    code = SCRIPT.format(body=f"os.kill(os.getpid(), signal.{number}); print('done')")
    code = f"import signal; signal.signal(signal.{number}, signal.SIG_IGN)\n" + code
    done = subprocess.run([sys.executable, "-c", code, "fake"], capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stdout) == (0, "done\n")


def test_an_interrupt_before_the_command_line_is_there() -> None:
    code = """
import os, signal, sys
import hyaena.__main__ as entry

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "hyaena.cli":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Finder())
sys.exit(entry.main())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_handlers_are_put_back(command: Callable[..., None]) -> None:
    command(lambda args: 0)
    before = [signal.getsignal(number) for number in ENDING]
    assert main(["fake"], commands=FAKE) == 0
    assert [signal.getsignal(number) for number in ENDING] == before


@pytest.mark.parametrize("argv", [("fake",), ("--help",), ("--version",), ("fake", "--help")])
@pytest.mark.parametrize(("output", "buffered"), [("gone", ""), ("full", ""), ("full", "1"), ("closed", "")])
def test_an_output_that_cannot_be_written(output: str, buffered: str, argv: tuple[str, ...]) -> None:
    options: dict[str, Any] = {}
    if output == "gone":
        read_end, write_end = os.pipe()
        os.close(read_end)
        options["stdout"] = write_end
    elif output == "full":
        options["stdout"] = write_end = os.open("/dev/full", os.O_WRONLY)
    else:
        options["preexec_fn"] = lambda: os.close(1)
        options["stdout"] = write_end = os.open(os.devnull, os.O_WRONLY)
    if output == "full":
        options["env"] = {"PYTHONUNBUFFERED": buffered}  # the print fails, or the flush at the end
    try:
        done = process("print('x' * 10)", *argv, **options)
    finally:
        os.close(write_end)
    assert done.returncode == {"gone": 141, "full": 2, "closed": 0}[output]
    assert done.stderr.count("\n") == (output == "full")
    assert ("cannot write to standard output: No space left on device" in done.stderr) == (output == "full")


@pytest.mark.parametrize("errors", ["gone", "full", "closed"])
def test_a_standard_error_that_cannot_be_written_changes_nothing(errors: str) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    full = os.open("/dev/full", os.O_WRONLY)
    options: dict[str, Any] = {"stderr": full if errors == "full" else write_end}
    if errors == "closed":
        options["preexec_fn"] = lambda: os.close(2)
    try:
        for body, status in (("print('out'); print('note', file=sys.stderr)", 0), ("raise OSError(5, 'x')", 2)):
            done = process(body, **options)
            assert (done.returncode, done.stdout) == (status, "out\n" if status == 0 else "")
        assert process("", "fake", "--zz", **options).returncode == 2
    finally:
        os.close(write_end)
        os.close(full)


def test_a_closed_stream_lends_its_number_to_no_file(tmp_path: Path) -> None:
    body = f"open({str(tmp_path / 'data')!r}, 'w').write(str(os.fstat(1).st_rdev)); os.write(1, b'stray')"
    assert process(body, preexec_fn=lambda: os.close(1)).returncode == 0
    assert (tmp_path / "data").read_text() == str(os.stat(os.devnull).st_rdev)
