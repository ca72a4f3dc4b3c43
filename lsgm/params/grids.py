"""Grids of models: what `ablations` in params.yaml holds, and the cells that it stands for."""

from __future__ import annotations

import copy
import difflib
import functools
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError, model_validator

from lsgm.config import Section
from lsgm.config.bounds import NAME_MAX, Name, Seed
from lsgm.config.mistakes import SHOWN, explain, one_line, sections, shown, walk
from lsgm.config.model import ModelConfig
from lsgm.params.presets import CHOICES

MAX_CELLS = 10_000  # of all grids together
TABLE_COLUMNS = (  # of the table of an ablation, besides its axes
    "seed", "model", "state", "nelbo", "nelbo_stderr", "nelbo_vae", "nfe", "sampling_s_per_1000", "training_s",
    "device",
)  # fmt: skip
Settings = dict[str, Any]  # dotted key of a model -> value, which replaces what stands there


class AblationConfig(Section):
    """A grid of models: every combination of one choice of each axis, with every seed.

    Its cells are models like those under `models`. A combination that a model cannot have is marked in the table.
    """

    title: str
    base: Name = Field(description="name of the model that all cells start from")
    set: Settings = Field({}, description="settings of all cells: dotted key -> value, as `train.epochs: 0.2`")
    axes: Annotated[dict[str, Annotated[dict[str, Settings], Field(min_length=1)]], Field(min_length=1)] = Field(
        description="axis -> choice -> dotted key -> value"
    )
    seeds: Annotated[list[Seed], Field(min_length=1)] = Field(
        [1],
        description="seeds of training and sampling; the VAE is pretrained once for all cells, with the base's seed",
    )
    columns: list[str] = Field(
        [],
        description="axes that become columns of the table, whose cells are then NELBO / Fréchet distance; []: one "
        "column per metric",
    )
    against: Annotated[list[Literal["nelbo", "nfe", "seconds"]], Field(min_length=1)] = Field(
        ["nelbo"], description="what the figure plots the Fréchet distance against"
    )
    note: str = Field("", description="text below the table")

    @model_validator(mode="after")
    def _columns_are_axes(self) -> AblationConfig:
        for axis in self.columns:
            if axis not in self.axes:
                raise ValueError(f"columns: there is no axis {axis!r}; the axes are {', '.join(self.axes)}")
        if len(self.columns) >= len(self.axes):
            raise ValueError("columns: leave an axis for the rows")
        for key, values in (("columns", self.columns), ("against", self.against), ("seeds", self.seeds)):
            if twice := [value for value, count in Counter(values).items() if count > 1]:
                raise ValueError(f"{key}: {shown(twice[0])} stands there more than once; delete one")
        return self

    @model_validator(mode="after")
    def _names_fit_into_a_table(self) -> AblationConfig:
        for axis, choices in self.axes.items():
            if axis in TABLE_COLUMNS:
                raise ValueError(f"axes: {axis!r} is a column of the table already; give the axis another name")
            if bad := [name for name in (axis, *choices) if "|" in name]:
                raise ValueError(f"axes: {bad[0]!r}: a name must not contain '|', which parts the table's columns")
            if bad := [name for name in (axis, *choices) if not name.strip() or not name.isprintable()]:
                raise ValueError(f"axes: {shown(bad[0])}: a name is one line of text, which is not empty")
        return self

    @model_validator(mode="after")
    def _a_setting_has_one_place(self) -> AblationConfig:
        keys = {axis: {key for choice in choices.values() for key in choice} for axis, choices in self.axes.items()}
        setter: dict[str, str] = {}
        for axis, own in keys.items():
            for key in sorted(own):
                if setter.setdefault(key, axis) != axis:
                    raise ValueError(f"axes: both {setter[key]!r} and {axis!r} set {key}; make them one axis")
        for key, axis in setter.items():
            for parent in itertools.accumulate(key.split("."), "{}.{}".format):
                if setter.get(parent, axis) != axis:
                    one, other = (name for name in self.axes if name in (axis, setter[parent]))
                    raise ValueError(f"axes: both {one!r} and {other!r} set {key}; make them one axis")
        for key in sorted({*self.set, *itertools.chain(*keys.values())}):
            if key in ("train.seed", "sample.seed"):
                raise ValueError(f"{key}: is set for each of `seeds`; name them there")
        if shared := [key for axis in keys.values() for key in sorted(axis) if key.split(".")[0] == "resources"]:
            raise ValueError(f"axes: {shared[0]}: changes no result; it may stand in `set`")
        return self


@dataclass(frozen=True)
class Cell:
    """One model of an ablation; where its settings make none, ``invalid`` says why."""

    name: str
    ablation: str
    labels: dict[str, str]  # axis -> choice
    seed: int
    model: ModelConfig | None
    invalid: str | None


def size(grid: AblationConfig) -> int:
    """How many cells it has, without making them; of very many just more than :data:`MAX_CELLS`."""
    found = len(grid.seeds)
    for choices in grid.axes.values():
        found = min(found * len(choices), 10**18)
    return found


def cells(
    name: str, grid: AblationConfig, base: ModelConfig, misfits: Callable[[ModelConfig], list[str]]
) -> list[Cell]:
    """The cells of the ablation ``name``, in the order of its axes, the last one (and then the seed) fastest.

    ``misfits`` says why a model cannot be had on its data.

    Raises:
        ValueError: a setting is not one of a model, or no combination makes one.
    """
    where, found = f"ablations.{name}", []
    choices = [[(axis, label) for label in labels] for axis, labels in grid.axes.items()]
    for combination in itertools.product(*choices):
        for seed in grid.seeds:
            places = {f"{where}.set": grid.set}
            places |= {f"{where}.axes.{axis}.{label}": grid.axes[axis][label] for axis, label in combination}
            places[f"{where}.seeds"] = {"train.seed": seed, "sample.seed": seed}
            parts = [name, *(label for _, label in combination), f"seed{seed}"]
            cell = "_".join(re.sub(r"[^A-Za-z0-9_]+", "_", part).strip("_") for part in parts)
            if len(cell) > NAME_MAX:
                raise ValueError(f"{where}: a cell's name is {len(cell)} characters long, expected at most {NAME_MAX} "
                                 f"({cell[:60]}...); shorten the names of choices")  # fmt: skip
            model, invalid = _derived(base, places)
            if model is not None and (model.dataset, model.vae_of) != (base.dataset, base.vae_of):
                raise ValueError(f"{where}: dataset and vae_of are those of the base {grid.base}")
            if model is not None and (reasons := misfits(model)):
                model, invalid = None, _reason(reasons)
            found.append(Cell(cell, name, dict(combination), seed, model, invalid))
    if all(cell.model is None for cell in found):
        raise ValueError(f"{where}: none of its cells is a model: {found[0].invalid}")
    return found


def _reason(reasons: Iterable[str]) -> str:
    """Why a combination is no model, without the ways out."""
    return " and ".join(reason.partition("; ")[0] for reason in reasons)


def _derived(base: ModelConfig, places: dict[str, Settings]) -> tuple[ModelConfig | None, str | None]:
    """``base`` with settings from several places, the later ones first; or why that is no model."""
    raw = base.model_dump(exclude_unset=True)
    origin: dict[str, str] = {}
    for place, settings in places.items():
        for key, value in settings.items():
            key, value = _with_new_names(key, value)
            known = _dotted_keys(tuple(_choice(raw, name) for name in CHOICES))
            if key not in known:
                close = difflib.get_close_matches(key[:SHOWN], known, n=1)
                known_first = ", ".join(name for name in ModelConfig.model_fields if name != "extends")
                hint = f"did you mean {close[0]!r}?" if close else f"it begins with one of {known_first}"
                raise ValueError(f"{place}: {one_line(key[:SHOWN])}: no setting of a model; {hint}")
            *parents, last = key.split(".")
            section = raw
            for name in parents:
                if not isinstance(section.get(name), dict):
                    section[name] = {}
                section = section[name]
            section[last] = copy.deepcopy(value)
            origin[key] = place
    try:
        return ModelConfig.model_validate(raw), None
    except ValidationError as error:
        problems = error.errors()
    for problem in problems:
        if problem["type"] != "value_error":  # no combination that does not fit, but a mistake
            key = _dotted(problem)
            setters = [place for k, place in origin.items() if f"{key}.".startswith(f"{k}.")]
            place = setters[-1] if setters else next(iter(places))
            raise ValueError(explain(ModelConfig, problem, place))
    return None, _reason(f"{_dotted(p)}: {p['msg']}".replace("Value error, ", "").removeprefix(": ") for p in problems)


def _dotted(problem: Any) -> str:
    return ".".join(walk(ModelConfig, problem["loc"])[0])


def _choice(raw: Settings, section: str) -> str:
    """Which implementation a section of a model chooses."""
    _, key, default = CHOICES[section]
    found = raw.get(section)
    return str(found.get(key, default)) if isinstance(found, dict) else default


@functools.cache
def _dotted_keys(choices: tuple[str, ...]) -> list[str]:
    """All settings of a model whose sections choose these implementations; of an unknown one, those of the first."""

    def below(section: type[BaseModel], path: list[str]) -> Iterator[str]:
        for name, field in section.model_fields.items():
            yield ".".join([*path, name])
            found = sections(field.annotation)
            chosen = dict(zip(CHOICES, choices, strict=True)).get(name, "")
            if inner := found.get("", found.get(chosen, next(iter(found.values()), None))):
                yield from below(inner, [*path, name])

    return [key for key in below(ModelConfig, []) if key != "extends"]


def _with_new_names(key: str, value: Any) -> tuple[str, Any]:
    """A dotted key whose parts may be old names, and its value, as they are called now."""
    section: type[Section] = ModelConfig
    path: list[str] = []
    for part in key.split("."):
        new = section.renamed.get(part)
        path.append(new.key if new is not None else part)
        field = section.model_fields.get(path[-1])
        below = sections(field.annotation) if field is not None else {}
        if not below:
            return ".".join([*path, *key.split(".")[len(path) :]]), new.value(value) if new is not None else value
        section = next(iter(below.values()))  # type: ignore[assignment]  # all of ours are sections
    return ".".join(path), value
