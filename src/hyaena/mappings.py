"""Reads YAML and JSON files that map names to values, within bounds.

A file may come from anywhere, so its kind, its size, its nesting and the number of its values are checked before
anything is built from it. A key that is written twice is an error: one of the two values would be lost.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hyaena.errors import ConfigError, printable

if TYPE_CHECKING:
    import yaml

MAX_BYTES = 1_000_000
"""Size of the largest file that is read."""
MAX_DEPTH = 32
"""Deepest nesting of mappings and lists in YAML; Python's own JSON reader has a bound of its own."""
MAX_VALUES = 5_000
"""Most keys and values of a YAML file, each alias counted with everything that it repeats."""
MAX_DIGITS = 100
"""Most digits of a whole number in JSON; converting a number takes time that grows faster than its length."""


def read_mapping(path: Path) -> dict[str, Any]:
    """Read a file that maps names to values: JSON where it begins with ``{`` or is called ``.json``, else YAML.

    Raises:
        ConfigError: the file is missing, not a regular file, too large, not text, not valid, or not a mapping.
    """
    text = read_text(path)
    as_json = path.suffix.lower() == ".json" or text.lstrip().startswith("{")
    values = parse_json(text) if as_json else parse_yaml(text)
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError("does not map names to values: write one `key: value` per line")
    return values


def parse_json(text: str) -> Any:
    """Parse a JSON text.

    Raises:
        ConfigError: it is not valid, repeats a key, or is nested too deeply.
    """

    def mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key, value in pairs:
            if key in values:
                raise ConfigError(f"{printable(key)} is written twice: keep one")
            values[key] = value
        return values

    def integer(digits: str) -> int:
        if len(digits) > MAX_DIGITS:
            raise ConfigError(f"a number has {len(digits):,} digits: write it with at most {MAX_DIGITS}")
        return int(digits)

    try:
        return json.loads(text, object_pairs_hook=mapping, parse_int=integer)
    except json.JSONDecodeError as error:
        raise ConfigError(f"is not valid JSON: {_one_line(error)}") from None
    except RecursionError:
        raise ConfigError("is not usable JSON: it is nested too deeply") from None


def parse_yaml(text: str) -> Any:
    """Parse a YAML text; tags that would make Python objects are refused.

    Raises:
        ConfigError: it is not valid, repeats a key, is nested too deeply, or has too many values.
    """
    import yaml  # here, so that importing this module stays instant

    try:
        return yaml.load(text, _loader())  # a SafeLoader
    except yaml.YAMLError as error:
        raise ConfigError(f"is not valid YAML: {_one_line(error)}") from None
    except ConfigError:
        raise
    # PyYAML converts values that only look like dates or numbers without checking them: 2001-99-99, `!!int x`.
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
        raise ConfigError(f"is not valid YAML: a value cannot be read ({_one_line(error)})") from None


def _loader() -> type[yaml.SafeLoader]:
    """A SafeLoader that counts values and depth while it reads, before anything is built."""
    import yaml

    class Loader(yaml.SafeLoader):
        def __init__(self, stream: str) -> None:
            super().__init__(stream)
            self.depth = self.count = 0
            self.sizes: dict[int, int] = {}  # of finished nodes, by identity

        def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
            alias, before = self.check_event(yaml.AliasEvent), self.count
            self.depth += 1
            if self.depth > MAX_DEPTH:
                raise ConfigError(f"is not usable YAML: it is nested deeper than {MAX_DEPTH} levels")
            node = super().compose_node(parent, index)
            self.depth -= 1
            if alias and id(node) not in self.sizes:
                raise ConfigError("is not usable YAML: a value contains itself")
            self.count += self.sizes[id(node)] if alias else 1
            if self.count > MAX_VALUES:
                raise ConfigError(f"is not usable YAML: it has more than {MAX_VALUES:,} keys and values")
            if not alias:
                self.sizes[id(node)] = self.count - before
            return node

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            keys = set()
            for key, _ in node.value:
                if not isinstance(key, yaml.ScalarNode):
                    raise ConfigError("is not usable YAML: a key is a list or a mapping")
                if key.value in keys:
                    raise ConfigError(f"{printable(key.value)} is written twice: keep one")
                keys.add(key.value)
            return super().construct_mapping(node, deep)

    return Loader


def read_text(path: Path) -> str:
    """The text of a regular file of at most ``MAX_BYTES``; a byte order mark at its start is left out."""
    try:
        kind = os.stat(path)  # before it is opened: opening a FIFO waits, and opening a device may do anything
        if stat.S_ISDIR(kind.st_mode):
            raise ConfigError("is a folder: name the configuration file in it")
        if not stat.S_ISREG(kind.st_mode):
            raise ConfigError("is not a regular file: name a configuration file")
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
    except ConfigError:
        raise
    except FileNotFoundError:
        raise ConfigError("no such file: check the path of the configuration") from None
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL character
        raise ConfigError(f"cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if len(content) > MAX_BYTES:
        raise ConfigError(f"is larger than {MAX_BYTES / 1e6:g} MB: this is not a configuration file")
    try:
        return content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ConfigError(f"cannot be read as UTF-8 text (byte {error.start:,}): save it as UTF-8") from None


def _one_line(error: Exception) -> str:
    return printable(" ".join(str(error).split()), limit=300)
