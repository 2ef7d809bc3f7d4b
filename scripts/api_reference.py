#!/usr/bin/env python3
"""Write the API reference from the docstrings, as HTML.

    python scripts/api_reference.py [FOLDER]       # needs pip install '.[docs,hf,serve]'; writes build/docs

``make docs`` does both. A docstring that pdoc cannot read stops it.
"""

from __future__ import annotations

import sys
import warnings
from importlib import import_module
from pathlib import Path

MODULES = (
    "hyaena",
    "hyaena.generation",
    "hyaena.sampling",
    "hyaena.tokenizers",
    "hyaena.scoring",
    "hyaena.records",
    "hyaena.jobs",
    "hyaena.ray",
    "hyaena.evals",
    "hyaena.hub",
    "hyaena.checkpoints",
    "hyaena.adapters",
    "hyaena.hf",
    "hyaena.serve.engine",
    "hyaena.serve.service",
    "hyaena.serve.app",
    "hyaena.config",
    "hyaena.formats",
    "hyaena.sizes",
    "hyaena.model",
    "hyaena.layers",
    "hyaena.cache",
    "hyaena.context",
    "hyaena.packing",
    "hyaena.decoding",
    "hyaena.filters",
    "hyaena.ops",
    "hyaena.ops.long_conv",
    "hyaena.train.config",
    "hyaena.train.loop",
    "hyaena.train.storage",
    "hyaena.errors",
)
"""The modules of the reference; ``docs/api.md`` is its table of contents."""


def write(folder: Path) -> None:
    """Write one page per module, an index and a search index.

    Raises:
        Warning: something in a module cannot be documented.
    """
    from pdoc import doc, render

    import hyaena

    for name in hyaena.__all__:  # they load on first use, and pdoc looks at what is loaded
        getattr(hyaena, name)
    render.configure(docformat="google", show_source=False, footer_text=f"hyaena {hyaena.__version__}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Annotations of NamedTuples do not name their module; pdoc then prints them as they are written.
        warnings.filterwarnings("ignore", message="Error parsing type annotation")
        # Before Python 3.12 pdoc does not see the bases of a TypedDict; what they define is then shown as its own.
        warnings.filterwarnings("ignore", message=r"Cannot determine where hyaena\.generation\.Options\.")
        modules = {name: doc.Module(import_module(name)) for name in MODULES}
        pages = {f"{name.replace('.', '/')}.html": render.html_module(modules[name], modules) for name in MODULES}
        pages |= {"index.html": render.html_index(modules), "search.js": render.search_index(modules)}
    for name, text in pages.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("build/docs"))
