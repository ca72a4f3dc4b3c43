"""What all sections of the configuration have in common.

A section is a pydantic model that refuses unknown keys. A *part* is a section that stands for something that can be
swapped: it names its implementation, which is imported when the part is built, so that reading params.yaml imports no
torch.
"""

from __future__ import annotations

import difflib
import functools
import logging
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Union

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Tag, model_validator
from pydantic_core import PydanticCustomError

from lsgm.errors import LSGMError
from lsgm.registry import Registry, load

logger = logging.getLogger("lsgm")

OnFailure = Literal["error", "record"]
ON_FAILURE = "record: its numbers become NaN, the tables say why, and the other cells of a grid are made all the same"


class ConfigError(LSGMError):
    """A configuration that cannot be used; the message names the key, the value and what was expected."""


class Renamed:
    """An old key that is still read: what it is called now, and what its values are called now.

    ``key`` may be the same as before, where only values were renamed.
    """

    def __init__(self, key: str, values: Mapping[Any, Any] | None = None) -> None:
        self.key, self.values = key, values or {}

    def value(self, old: Any) -> Any:
        """What stands for the value ``old`` now."""
        if isinstance(old, list):
            return [self.value(item) for item in old]
        return self.values.get(old, old) if isinstance(old, (str, bool)) else old


class Section(BaseModel):
    """A part of the configuration: unknown keys are refused, values cannot be changed after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    renamed: ClassVar[Mapping[str, Renamed]] = {}

    @classmethod
    def distinct(cls, raw: Any, errors: list[Any]) -> list[Any]:
        """The mistakes that pydantic found in ``raw``, each once where it is found in several places."""
        return errors

    @model_validator(mode="before")
    @classmethod
    def _read_old_names(cls, raw: Any) -> Any:
        """Translate old keys and values; one line for each says what it is called now."""
        if not isinstance(raw, dict):
            return raw
        found = dict(raw)
        for old, new in cls.renamed.items():
            if old in found and (old == new.key or new.key not in found):
                value = found.pop(old)
                found[new.key] = new.value(value)
                if old != new.key:
                    _announce(cls.__name__, old, new.key)
                elif found[new.key] != value:
                    _announce(cls.__name__, f"{old}: {value}", f"{old}: {found[new.key]}")
        return found


@functools.cache
def _announce(section: str, old: str, new: str) -> None:
    logger.warning("%s: %s is now called %s; the old name is still read", section, old, new)


class Part(Section):
    """A section that stands for a part which can be swapped."""

    implementation: ClassVar[Any]  # "module:name" of what is built from it, or that itself
    not_passed: ClassVar[frozenset[str]] = frozenset()  # keys that are not arguments of the implementation

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of the implementation that follow from the configuration."""
        return self.model_dump(exclude=set(self.not_passed))

    def build(self, **context: Any) -> Any:
        """The implementation, called with :meth:`arguments` and the keyword arguments of the ``context``."""
        return load(self.implementation)(**self.arguments(), **context)


def any_of(registry: Registry, key: str, default: str) -> Any:
    """The type of a section that any entry of ``registry`` may describe; ``key`` says which (``default``)."""
    entries = registry.entries()

    def which(value: Any) -> str:
        found = value.get(key, default) if isinstance(value, dict) else getattr(value, key, default)
        return found if isinstance(found, str) else repr(found)

    which.__name__ = key  # how pydantic's errors call it
    if len(entries) == 1:
        return next(iter(entries.values()))
    members = tuple(Annotated[entry, Tag(name)] for name, entry in entries.items())
    return Annotated[Union[members], Discriminator(which)]  # noqa: UP007  (a tuple)


def one_of(registry: Registry) -> Any:
    """Metadata for a field that holds the name of an entry of ``registry``."""

    def known(name: str) -> str:
        names = registry.names()
        if name not in names:
            close = difflib.get_close_matches(name[:100], names, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise PydanticCustomError(
                "unknown_entry", "Input should be {names}", {"names": " or ".join(names), "hint": hint}
            )
        return name

    return AfterValidator(known)
