"""The public names: loaded on first use, so that an import is instant."""

from __future__ import annotations

import subprocess
import sys

import pytest

import hyaena
import hyaena.config


def modules_after(code: str) -> set[str]:
    """The names of the modules that a fresh interpreter holds after running ``code``."""
    script = f"import sys\n{code}\nsys.stderr.write(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stderr.split())


def test_import_loads_neither_torch_nor_numpy() -> None:
    assert not {"torch", "numpy"} & modules_after("import hyaena")


def test_reading_the_config_class_loads_no_torch() -> None:
    assert "torch" not in modules_after("import hyaena\nhyaena.ModelConfig")


def test_help_lists_the_commands_and_loads_no_torch() -> None:
    code = """
from hyaena.cli import main
try:
    main(["--help"])
except SystemExit as stop:
    assert stop.code == 0
"""
    assert not {"torch", "numpy", "transformers", "matplotlib"} & modules_after(code)


def test_lazy_names_are_the_objects_themselves() -> None:
    assert hyaena.ModelConfig is hyaena.config.ModelConfig
    assert hyaena.ops.__name__ == "hyaena.ops"


def test_every_public_name_resolves_and_is_listed() -> None:
    for name in hyaena.__all__:
        assert getattr(hyaena, name) is not None
        assert name in dir(hyaena)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        _ = hyaena.lod
