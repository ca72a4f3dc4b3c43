"""The base classes of all sections of the configuration.

A section is a pydantic model that rejects unknown keys. A *part* is a section that describes a swappable component: it
names its implementation, which is imported only when the part is built, so that reading params.yaml does not import
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
    """An invalid configuration. The message names the key, its value and what was expected."""


class Renamed:
    """The new name of an old key that is still read, and the new names of its values.

    ``key`` equals the old key if only values were renamed.
    """

    def __init__(self, key: str, values: Mapping[Any, Any] | None = None) -> None:
        self.key, self.values = key, values or {}

    def value(self, old: Any) -> Any:
        """The new name of the value ``old``."""
        if isinstance(old, list):
            return [self.value(item) for item in old]
        return self.values.get(old, old) if isinstance(old, (str, bool)) else old


class Section(BaseModel):
    """A section of the configuration. Unknown keys are rejected, and values are immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    renamed: ClassVar[Mapping[str, Renamed]] = {}

    @classmethod
    def distinct(cls, raw: Any, errors: list[Any]) -> list[Any]:
        """The mistakes that pydantic found in ``raw``, without repetitions of the same mistake."""
        return errors

    @model_validator(mode="before")
    @classmethod
    def _read_old_names(cls, raw: Any) -> Any:
        """Translate old keys and values, and log the new name of each."""
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
    """A section that describes a swappable component."""

    implementation: ClassVar[Any]  # "module:name" of the class or function to build, or the object itself
    not_passed: ClassVar[frozenset[str]] = frozenset()  # keys that are not arguments of the implementation

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments that the configuration passes to the implementation."""
        return self.model_dump(exclude=set(self.not_passed))

    def build(self, **context: Any) -> Any:
        """Call the implementation with :meth:`arguments` and the keyword arguments in ``context``."""
        return load(self.implementation)(**self.arguments(), **context)


def any_of(registry: Registry, key: str, default: str) -> Any:
    """The union of the configuration classes in ``registry``; ``key`` selects one, by default ``default``."""
    entries = registry.entries()

    def which(value: Any) -> str:
        found = value.get(key, default) if isinstance(value, dict) else getattr(value, key, default)
        return found if isinstance(found, str) else repr(found)

    which.__name__ = key  # the name that pydantic's errors use
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
