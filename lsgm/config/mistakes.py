"""Check a configuration and explain each mistake in one line: file, key, what was expected and found, how to fix it."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, Tag, ValidationError

from lsgm.config.section import ConfigError, Section

MISTAKES = 20  # at most this many are explained at once
SHOWN = 100  # a message quotes at most this many characters of a wrong value or key


S = TypeVar("S", bound=Section)


def parse(kind: type[S], raw: Any, where: str | Path, lines: Mapping[str, int] | None = None) -> S:
    """Check ``raw``, read from the file ``where``, against the section ``kind``; raises :class:`ConfigError`.

    The message has one line per mistake, which ends with the key's line number in the file if ``lines`` has it.
    """
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        errors = kind.distinct(raw, error.errors(include_url=False))[: MISTAKES + 1]
        found = [line for item in errors for line in explain(kind, item, where, lines).splitlines()]
        if len(found) > MISTAKES:
            found[MISTAKES:] = [f"{where}: there are more mistakes; fix these first"]
        raise ConfigError("\n".join(found)) from None


def explain(kind: type[BaseModel], error: Any, where: str | Path, lines: Mapping[str, int] | None = None) -> str:
    """Describe a mistake that pydantic found in a ``kind`` in one line, with its line number if ``lines`` has it.

    A check of the whole file names the keys itself and may report several mistakes, one line each.
    """
    parts, section = walk(kind, error["loc"])
    path = ".".join(part[:SHOWN] for part in parts)
    key, message = path or "the whole file", error["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    value = shown(error["input"])
    if error["type"] == "string_pattern_mismatch":
        message = "a name of letters, digits and _ that begins with a letter"
    if error["type"] == "extra_forbidden":
        known = list(section.model_fields)
        close = difflib.get_close_matches(parts[-1][:SHOWN], known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"the keys here are {', '.join(known)}"
        said = [f"{key}: unknown key (its value is {value}); {hint}"]
    elif error["type"] == "union_tag_invalid":
        context = error["ctx"]
        names = [name.strip("'") for name in context["expected_tags"].split(", ")]
        close = difflib.get_close_matches(context["tag"][:SHOWN], names, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        said = [f"{key}.{context['discriminator'].removesuffix('()')}: expected {' or '.join(map(repr, names))}, found "
                f"{shown(context['tag'])}{hint}"]  # fmt: skip
    elif error["type"] == "missing":
        said = [f"{key}: missing; a value is required here"]
    elif error["type"] == "value_error":
        place = f"{path}." if path == "models" else f"{path}: "  # models: the message names the model
        said = [f"{place}{message}"] if path else message.splitlines()
    else:
        said = [f"{key}: expected {message}, found {value}{error.get('ctx', {}).get('hint', '')}"]
        if isinstance(error["input"], bool):
            said[0] += "; YAML reads yes, no, on and off as true and false; quote them if you mean text"
    return "\n".join(f"{where}: {one_line(line)}{_place(line, lines or {})}" for line in said)


def walk(kind: type[BaseModel], loc: Sequence[int | str]) -> tuple[list[str], type[BaseModel]]:
    """Turn pydantic's location of a mistake into the parts of its key as users write it, and the section it is in."""
    parts: list[str] = []
    section, here = kind, sections(kind)
    inside: Any = kind  # the type of the value that the parts so far lead to
    for part in loc:
        if part == "[key]":
            continue
        if part in here and part != "":  # a tag that selects one of several sections
            inside, here = here[str(part)], {"": here[str(part)]}
            continue
        parts.append(str(part))
        if "" in here:
            section = here[""]
            field = section.model_fields.get(str(part))
            inside = field.annotation if field is not None else None
        else:  # dictionaries and lists: all values have one type
            inside = get_args(_plain(inside))[-1] if get_args(_plain(inside)) else None
        here = sections(inside)
    return parts, section


def sections(kind: Any) -> dict[str, type[BaseModel]]:
    """The sections that a value of type ``kind`` may be, keyed by their tags; a single one has the key ""."""
    found: dict[str, type[BaseModel]] = {}
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return {"": kind}
    if get_origin(kind) in (dict, list):
        return found
    if get_origin(kind) is Annotated:
        inner, *metadata = get_args(kind)
        tag = next((item.tag for item in metadata if isinstance(item, Tag)), "")
        return {tag or key: section for key, section in sections(inner).items()}
    for member in get_args(kind):
        found |= sections(member)
    return found


def _plain(kind: Any) -> Any:
    return get_args(kind)[0] if get_origin(kind) is Annotated else kind


def _place(message: str, lines: Mapping[str, int]) -> str:
    """The line number of the key that a message begins with, or of the nearest enclosing section."""
    key = message.partition(": ")[0]
    while key and key not in lines:
        key = key.rpartition(".")[0]
    return f" (line {lines[key]})" if key else ""


def shown(value: Any) -> str:
    """A wrong value as quoted in a message: on one line, and truncated if it is long."""
    if isinstance(value, int) and abs(value) >= 10**SHOWN:
        return f"a number of more than {SHOWN} digits"
    if isinstance(value, str):
        value = value[: SHOWN + 1]
    text = _shortened.repr(value) if isinstance(value, (dict, list)) else repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


_shortened = reprlib.Repr()
_shortened.maxstring = _shortened.maxother = SHOWN


def one_line(text: str) -> str:
    """``text`` with line breaks and other unprintable characters escaped."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
