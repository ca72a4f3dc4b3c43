"""A YAML file as plain values and the lines they stand in: text, numbers, booleans, null, lists and mappings.

Nothing in the file is executed or made an object, and what YAML 1.1 reads as something else than it looks like is
refused: keys that are no text, keys that stand there twice, `1:30` (which is 90) and `010` (which is 8). Dates are
text. Anchors and merge keys work, as far as what they stand for stays small.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import yaml

from lsgm.config import ConfigError
from lsgm.config.mistakes import SHOWN, one_line, shown
from lsgm.errors import LSGMError
from lsgm.files import read_text

MAX_BYTES = 1 << 20
MAX_DEPTH = 64
MAX_VALUES = 100_000  # with what aliases stand for
MAX_DIGITS = 100
EXECUTED = ("__use_yte__", "__definitions__", "__variables__")  # by Snakemake's template engine YTE, and keys with `?`
SEXAGESIMAL = re.compile(r"[-+]?\d[\d_]*(:\d+)+(\.[\d_]*)?")
OCTAL = re.compile(r"[-+]?(0[\d_]+|0o[0-7_]+)")
CORE = "tag:yaml.org,2002:"


@dataclass
class Document:
    """What a file holds. ``lines`` has the line of each dotted key, but for those that an alias brings."""

    value: dict[str, Any]
    lines: dict[str, int] = field(default_factory=dict)


def read_yaml(path: str | Path) -> Document:
    """The mapping in a YAML file; raises :class:`lsgm.config.ConfigError` of one line that names file and line."""
    try:
        size = Path(path).stat().st_size if Path(path).is_file() else 0
        if size > MAX_BYTES:
            raise ConfigError(f"{path}: has {size} bytes, expected at most {MAX_BYTES}; is it the right file?")
        text = read_text(path, "save it as UTF-8" if size else "")
    except ConfigError:
        raise
    except LSGMError as error:
        raise ConfigError(str(error)) from None
    return parse_yaml(text, path)


def parse_yaml(text: str, where: str | Path) -> Document:
    """The mapping in a YAML text that was read from ``where``; raises :class:`lsgm.config.ConfigError`."""
    line = 1
    try:
        reader = _Reader(text, where)
        try:
            return reader.document()
        finally:
            line = reader.line + 1
            reader.dispose()
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        found, way_out = f"the character {int(error.character):#04x}, which is no text", "delete it"
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark is not None else line
        found = " ".join(filter(None, (error.context, error.problem))).replace("\\t", "tab")
        way_out = "check the brackets, the quotes and the indentation there"
        if "tab" in found:
            way_out = "indent with spaces"
        elif "mapping values are not allowed" in found:
            way_out = "put text with a colon in quotes, and indent all keys of a section alike"
    except (ValueError, OverflowError) as error:  # PyYAML's own, of escapes and directives with absurd numbers
        found, way_out = str(error), "check the escapes there"
    raise ConfigError(one_line(f"{where}: is not valid YAML: line {line}: {found}; {way_out}"))


@dataclass
class _Value:
    """A value, how many values are in it, and how deep."""

    value: Any
    count: int = 1
    height: int = 1


class _Reader(yaml.SafeLoader):
    """PyYAML's scanner, parser and rules for plain scalars, with a composer of its own."""

    def __init__(self, text: str, where: str | Path) -> None:
        super().__init__(text)
        self.where = where
        self.count = 0
        self.lines: dict[str, int] = {}
        self.anchored: dict[str, _Value | None] = {}  # None while it is being read

    def refuse(self, event: yaml.Event, message: str) -> NoReturn:
        raise ConfigError(one_line(f"{self.where}: line {_line(event)}: {message}"))

    def document(self) -> Document:
        self.get_event()  # the stream's start
        if isinstance(self.peek_event(), yaml.StreamEndEvent):
            raise ConfigError(f"{self.where}: is empty, expected sections (`key: value`)")
        self.get_event()  # the document's start
        start = self.peek_event()
        value = self.read("", 1).value
        self.get_event()  # the document's end
        if not isinstance(end := self.get_event(), yaml.StreamEndEvent):
            self.refuse(end, "a second document begins (`---`), expected one; delete it")
        if not isinstance(value, dict):
            self.refuse(start, f"expected sections (`key: value`), found {shown(value)}")
        return Document(value, self.lines)

    def read(self, path: str, depth: int) -> _Value:
        """The next value, which stands at the dotted key ``path``."""
        event = self.get_event()
        if isinstance(event, yaml.AliasEvent):
            return self.alias(event, depth)
        if event.tag not in (None, "!", f"{CORE}str"):
            tag = _cut(event.tag.replace(CORE, "!!"))
            self.refuse(event, f"found the tag {tag}; expected plain values, delete it")
        if depth > MAX_DEPTH:
            self.refuse(event, f"nested deeper than {MAX_DEPTH} levels")
        if event.anchor in self.anchored:
            self.refuse(event, f"a second anchor &{event.anchor}; give it another name")
        if event.anchor is not None:
            self.anchored[event.anchor] = None
        self.add(event, 1)
        before = self.count
        if isinstance(event, yaml.ScalarEvent):
            found = _Value(self.scalar(event))
        else:
            one = self.mapping if isinstance(event, yaml.MappingStartEvent) else self.sequence
            value, height = one(path, depth)
            found = _Value(value, self.count - before + 1, height + 1)
        if event.anchor is not None:
            self.anchored[event.anchor] = found
        return found

    def add(self, event: yaml.Event, count: int) -> None:
        self.count += count
        if self.count > MAX_VALUES:
            self.refuse(event, f"more than {MAX_VALUES} values up to here, with those that aliases (*name) stand for")

    def alias(self, event: yaml.AliasEvent, depth: int) -> _Value:
        name = event.anchor
        if name not in self.anchored:
            names = ", ".join(f"&{known}" for known in list(self.anchored)[:10]) or "none"
            self.refuse(event, f"the alias *{name} has no anchor &{name} above it; the anchors there are {names}")
        found = self.anchored[name]
        if found is None:
            self.refuse(event, f"the alias *{name} stands within its own anchor &{name}; expected one that ends before")
        self.add(event, found.count)
        if depth + found.height - 1 > MAX_DEPTH:
            self.refuse(event, f"nested deeper than {MAX_DEPTH} levels, with what aliases stand for")
        return found

    def sequence(self, path: str, depth: int) -> tuple[list[Any], int]:
        values: list[Any] = []
        height = 0
        while not isinstance(event := self.peek_event(), yaml.SequenceEndEvent):
            place = f"{path}.{len(values)}"
            self.lines[place] = _line(event)
            found = self.read(place, depth + 1)
            values.append(found.value)
            height = max(height, found.height)
        self.get_event()
        return values, height

    def mapping(self, path: str, depth: int) -> tuple[dict[str, Any], int]:
        own: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        at: dict[str, int] = {}
        height = 0
        while not isinstance(event := self.peek_event(), yaml.MappingEndEvent):
            key, merge = self.key()
            if key in at:
                place = f"{path}.{key}".lstrip(".")
                first = f"line {at[key]}" if at[key] != _line(event) else "the same line"
                self.refuse(event, f"{place}: appears twice, first in {first}; delete one of them")
            at[key] = _line(event)
            place = f"{path}.{key}" if path else key
            self.lines[place] = at[key]
            found = self.read(place, depth + 1)
            height = max(height, found.height)
            if merge:
                merged = self.merged(event, found.value)
            else:
                own[key] = found.value
        self.get_event()
        return merged | own, height

    def merged(self, event: yaml.Event, value: Any) -> dict[str, Any]:
        """What `<<` brings; of several mappings the first ones' values."""
        sections = value if isinstance(value, list) else [value]
        if not all(isinstance(section, dict) for section in sections):
            self.refuse(event, f"<<: expected a section or a list of sections to merge, found {shown(value)}")
        found: dict[str, Any] = {}
        for section in reversed(sections):
            found |= section
        return found

    def key(self) -> tuple[str, bool]:
        """The next key, and whether it is the merge key."""
        event = self.peek_event()
        if not isinstance(event, yaml.ScalarEvent):
            self.refuse(event, "expected text as a key, found a list, a section or an alias")
        if event.implicit[0] and self.tag(event) == f"{CORE}merge":
            self.get_event()
            return "<<", True
        value = self.read("", 1).value
        if not isinstance(value, str):
            text, what = _cut(event.value), "a number" if value and value is not True else str(value).lower()
            self.refuse(event, f"expected text as a key, found {text}, which YAML reads as {what}; put it in quotes")
        if value in EXECUTED or value.startswith("?"):
            self.refuse(event, f"found the key {shown(value)}, which asks for code to be run; delete it")
        if not value.isprintable() or not value:
            self.refuse(event, f"expected one line of text as a key, found {shown(value)}")
        return value, False

    def tag(self, event: yaml.ScalarEvent) -> str:
        """What PyYAML takes a plain scalar for."""
        return str(self.resolve(yaml.ScalarNode, event.value, (True, False)))

    def scalar(self, event: yaml.ScalarEvent) -> Any:
        text = event.value
        if not event.implicit[0]:  # in quotes, or tagged as text
            return text
        if SEXAGESIMAL.fullmatch(text):
            self.refuse(event, f"found {_cut(text)}, which YAML reads as a number to the base 60; write "
                               f"{_decimal(text)}, or put it in quotes where text is meant")  # fmt: skip
        if OCTAL.fullmatch(text) and text.strip("-+0"):
            self.refuse(event, f"found {_cut(text)}, which YAML reads as an octal number; write it without the "
                               "zero, or put it in quotes where text is meant")  # fmt: skip
        kind = self.tag(event).removeprefix(CORE)
        if kind not in ("null", "bool", "int", "float"):
            return text
        node = yaml.ScalarNode(f"{CORE}{kind}", text)
        try:
            if len(text) > MAX_DIGITS:
                raise ValueError
            return self.construct_object(node)
        except ValueError:
            self.refuse(event, f"expected a number, found {_cut(text)}; put it in quotes where text is meant")


def _decimal(text: str) -> str:
    """`1:30` as 1.5: what it most likely stands for."""
    parts = text[:MAX_DIGITS].replace("_", "").lstrip("-+").split(":")
    value = sum(float(part or 0) / 60**i for i, part in enumerate(parts[:10]))
    return f"{'-' * text.startswith('-')}{value:.6g}"


def _line(event: yaml.Event) -> int:
    assert event.start_mark is not None
    return event.start_mark.line + 1


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
