"""The command line's frame, tried with a command made for the purpose."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import types
from collections.abc import Callable

import pytest

import hyaena
from hyaena.cli import COMMANDS, main
from hyaena.errors import CapacityError, InputError

FAKE = {"fake": "fake_command"}


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Installs a command named ``fake`` that does what it is told."""

    def install(run: Callable[[argparse.Namespace], int]) -> None:
        module = types.ModuleType("fake_command")
        module.HELP = "do as told"
        module.add_arguments = lambda parser: parser.add_argument("--size", type=int, default=1)
        module.run = run
        monkeypatch.setitem(sys.modules, "fake_command", module)

    return install


def raiser(error: BaseException) -> Callable[[argparse.Namespace], int]:
    def run(args: argparse.Namespace) -> int:
        raise error

    return run


def test_the_commands_are_the_promised_ones() -> None:
    assert list(COMMANDS) == ["generate", "convert", "info", "train", "bench"]


def test_arguments_reach_the_command_and_its_status_returns(command: Callable[..., None]) -> None:
    command(lambda args: args.size)
    assert main(["fake", "--size", "3"], commands=FAKE) == 3
    assert main(["fake"], commands=FAKE) == 1


@pytest.mark.parametrize(
    "error", [InputError("empty prompt; pass some text"), CapacityError("cache full"), FileNotFoundError(2, "no", "x")]
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


@pytest.mark.parametrize("argv", [[], ["sing"], ["fake", "--size", "big"], ["fake", "--colour"]])
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


def test_a_reader_that_goes_away_is_no_error() -> None:
    script = """
import sys, types
from hyaena.cli import main
module = types.ModuleType("fake_command")
module.HELP = "print"
module.add_arguments = lambda parser: None
module.run = lambda args: print("x" * 10) or 0
sys.modules["fake_command"] = module
sys.exit(main(["fake"], commands={"fake": "fake_command"}))
"""
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        done = subprocess.run([sys.executable, "-c", script], stdout=write_end, stderr=subprocess.PIPE, text=True)
    finally:
        os.close(write_end)
    assert (done.returncode, done.stderr) == (141, "")
