"""A version of transformers that is not supported, or none, is one line with the fix."""

from __future__ import annotations

import importlib.metadata
import re
import tomllib

import pytest
import transformers

from hyaena import extras
from hyaena.errors import UnsupportedError
from hyaena.hf.versions import BELOW, OLDEST, check_versions
from pages import ROOT


@pytest.mark.parametrize("version", ["4.57.1", "5.15.0", "6.0.0", "6.1.0.dev0"])
def test_versions_out_of_range(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers, "__version__", version)
    with pytest.raises(UnsupportedError, match=rf"found {version}: pip install 'transformers>=5.15.1,<6'"):
        check_versions()


def test_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UnsupportedError, match=r"pip install 'hyaena\[hf\]'"):
        check_versions()


def test_the_range_is_that_of_the_extra() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (found,) = (line for line in project["hf"] if line.startswith("transformers"))
    oldest, below = (".".join(map(str, version)) for version in (OLDEST, BELOW))
    assert found == f"transformers>={oldest},<{below}"
    assert re.match(r"5\.\d+", importlib.metadata.version("transformers"))
