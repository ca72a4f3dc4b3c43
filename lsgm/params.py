"""``params.yaml`` as a whole: datasets, models, the grids of the ablations, and what of it each job reads.

A grid is expanded here, once for Snakemake, DVC and the tables (:meth:`Params.cells`), and what models with the same
settings share gets its owner (:meth:`Params.owner`). Without torch, as :mod:`lsgm.config`: the workflow imports it.
"""

from __future__ import annotations

import copy
import difflib
import functools
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import Field, ValidationError, model_validator

from lsgm.config import (
    AnyVAEConfig,
    ConfigError,
    DatasetConfig,
    EvaluateStage,
    GridCell,
    IllustrateStage,
    ModelConfig,
    Name,
    NELBOConfig,
    NELBOStage,
    PrepareStage,
    PretrainStage,
    SampleStage,
    Section,
    Stage,
    StageConfig,
    StatisticsStage,
    TabulateStage,
    TrainStage,
    backbone_of,
    dotted_key,
    explain,
    keys_at,
    parse,
)
from lsgm.data.registry import DATASETS

Shared = Literal["vae", "lsgm", "vae_samples", "lsgm_samples", "nelbo"]  # what models may have in common
SHARED: tuple[Shared, ...] = get_args(Shared)
COMPARISON = "run"  # the name of the frozen configuration of the table that compares the models of `run`

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
    base: Name = Field(description="the model that all cells are, but for what is set here")
    set: Settings = Field({}, description="of all cells: dotted key -> value, as `train.epochs: 0.2`")
    axes: Annotated[dict[str, Annotated[dict[str, Settings], Field(min_length=1)]], Field(min_length=1)] = Field(
        description="axis -> choice -> dotted key -> value"
    )
    seeds: Annotated[list[int], Field(min_length=1)] = Field(
        [1], description="of train and sample; the VAE is pretrained with that of the base, once for all cells"
    )
    columns: list[str] = Field(
        [], description="axes in the columns of the table, whose cells are NELBO / Fréchet distance; []: measures are"
    )
    against: Annotated[list[Literal["nelbo", "nfe", "seconds"]], Field(min_length=1)] = Field(
        ["nelbo"], description="what the figure shows the Fréchet distance against"
    )
    note: str = Field("", description="below the table")

    @model_validator(mode="after")
    def _columns_are_axes(self) -> AblationConfig:
        for axis in self.columns:
            if axis not in self.axes:
                raise ValueError(f"columns: there is no axis {axis!r}; the axes are {', '.join(self.axes)}")
        if len(self.columns) >= len(self.axes):
            raise ValueError("columns: leave an axis for the rows")
        return self

    @model_validator(mode="after")
    def _names_fit_into_a_table(self) -> AblationConfig:
        for axis, choices in self.axes.items():
            if axis in TABLE_COLUMNS:
                raise ValueError(f"axes: {axis!r} is a column of the table already; give the axis another name")
            if bad := [name for name in (axis, *choices) if "|" in name]:
                raise ValueError(f"axes: {bad[0]!r}: a name must not contain '|', which parts the table's columns")
        return self

    @model_validator(mode="after")
    def _a_setting_has_one_place(self) -> AblationConfig:
        keys = {axis: {key for choice in choices.values() for key in choice} for axis, choices in self.axes.items()}
        for (one, first), (other, second) in itertools.combinations(keys.items(), 2):
            for a, b in itertools.product(sorted(first), sorted(second)):
                if f"{a}.".startswith(f"{b}.") or f"{b}.".startswith(f"{a}."):
                    raise ValueError(f"axes: both {one!r} and {other!r} set {a}; make them one axis")
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


def cells(name: str, grid: AblationConfig, base: ModelConfig) -> list[Cell]:
    """The cells of the ablation ``name``, in the order of its axes, the last one (and then the seed) fastest.

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
            model, invalid = _derived(base, places)
            found.append(Cell(cell, name, dict(combination), seed, model, invalid))
    if all(cell.model is None for cell in found):
        raise ValueError(f"{where}: none of its cells is a model: {found[0].invalid}")
    return found


def _derived(base: ModelConfig, places: dict[str, Settings]) -> tuple[ModelConfig | None, str | None]:
    """``base`` with settings from several places, the later ones first; or why that is no model."""
    raw = base.model_dump(exclude_unset=True)
    origin: dict[str, str] = {}
    for place, settings in places.items():
        for key, value in settings.items():
            known = _dotted_keys(backbone_of(raw.get("vae") or {}))
            if key not in known:
                close = difflib.get_close_matches(key, known, n=1)
                sections = ", ".join(ModelConfig.model_fields)
                hint = f"did you mean {close[0]!r}?" if close else f"it begins with one of {sections}"
                raise ValueError(f"{place}: {key}: no setting of a model; {hint}")
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
            key = dotted_key(problem["loc"])[0]
            setters = [place for k, place in origin.items() if f"{key}.".startswith(f"{k}.")]
            place = setters[-1] if setters else next(iter(places))
            raise ValueError(explain(ModelConfig, problem, place))
    reasons = (
        f"{dotted_key(p['loc'])[0]}: {p['msg']}".replace("Value error, ", "").removeprefix(": ") for p in problems
    )
    return None, " and ".join(reason.partition("; ")[0] for reason in reasons)


@functools.cache
def _dotted_keys(backbone: str) -> list[str]:
    """All settings of a model."""

    def below(path: list[str]) -> Iterator[str]:
        for key in keys_at(ModelConfig, path, backbone):
            yield ".".join([*path, key])
            yield from below([*path, key])

    return list(below([]))


class Params(Section):
    """``params.yaml``: the one place for every parameter."""

    run: Annotated[list[Name], Field(min_length=1)] = Field(
        description="what a plain `snakemake` makes: models, and ablations beside them"
    )
    datasets: dict[Name, DatasetConfig] = Field(description="the known ones, and your own: any name with `images`")
    models: dict[Name, ModelConfig]
    ablations: dict[Name, AblationConfig] = Field({}, description="grids of models")

    @model_validator(mode="after")
    def _names_exist(self) -> Params:
        for name in self.run:
            if name not in self.models and name not in self.ablations:
                ablations = f", the ablations {', '.join(self.ablations)}" if self.ablations else ""
                raise ValueError(f"run: there is no model {name!r}; the models are {', '.join(self.models)}{ablations}")
        if not self.compared:
            raise ValueError(f"run: name a model too; an ablation alone is made by `snakemake {self.run[0]}`")
        for name, dataset in self.datasets.items():
            known = name in DATASETS
            if known and dataset.images is not None:
                raise ValueError(
                    f"datasets.{name}.images: how this dataset is read is known; for another way give it another name"
                )
            if not known and dataset.images is None:
                close = difflib.get_close_matches(name, DATASETS, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"the known datasets are {', '.join(DATASETS)}"
                raise ValueError(
                    f"datasets.{name}: is no known dataset ({hint}); a set of your own needs path (the folder) and "
                    "images (at least its size: images: {size: 64})"
                )
            if not known and dataset.path is None:
                raise ValueError(f"datasets.{name}.path: missing; the folder, zip or LMDB with your images")
        for name, model in self.models.items():
            if model.dataset not in self.datasets:
                raise ValueError(f"models.{name}.dataset: {model.dataset!r} is missing under datasets")
            seen = [name]
            while (other := self.models[seen[-1]].vae_of) is not None:
                if other not in self.models or other in seen:
                    what = "is a circle" if other in seen else f"the models are {', '.join(self.models)}"
                    raise ValueError(f"models.{seen[-1]}.vae_of: {other!r}: {what}")
                if self.models[other].dataset != model.dataset:
                    raise ValueError(f"models.{seen[-1]}.vae_of: {other!r} is a model of another dataset")
                seen.append(other)
        return self

    @model_validator(mode="after")
    def _grids_make_models(self) -> Params:
        taken = {*self.models, *self.ablations, COMPARISON}
        for name, grid in self.ablations.items():
            if name in self.models or name == COMPARISON:
                raise ValueError(f"ablations.{name}: this name is taken; give it another one")
            if grid.base not in self.models:
                raise ValueError(f"ablations.{name}.base: {grid.base!r}: the models are {', '.join(self.models)}")
            for cell in self.cells(name):
                if cell.name in taken:
                    raise ValueError(
                        f"ablations.{name}: two cells or models are called {cell.name}; names are made of letters and "
                        "digits of the choices and of the seed, which must differ in them"
                    )
                taken.add(cell.name)
                base = self.models[grid.base]
                if cell.model is not None and (cell.model.dataset, cell.model.vae_of) != (base.dataset, base.vae_of):
                    raise ValueError(f"ablations.{name}: dataset and vae_of are those of the base {grid.base}")
        return self

    @model_validator(mode="after")
    def _there_are_as_many_test_images(self) -> Params:
        for name, model in self.everything.items():
            asked = model.evaluate.images
            known = DATASETS.get(model.dataset)
            if asked is not None and known is not None and asked > known.counts["test"]:
                raise ValueError(
                    f"{name}: evaluate.images: {model.dataset} has {known.counts['test']} test images, not {asked}; "
                    "null stands for all of them"
                )
        return self

    @functools.cached_property
    def _cells(self) -> dict[str, list[Cell]]:
        return {name: cells(name, grid, self.models[grid.base]) for name, grid in self.ablations.items()}

    def cells(self, ablation: str) -> list[Cell]:
        """The cells of an ablation: what Snakemake, DVC and the tables know of it."""
        return self._cells[ablation]

    @functools.cached_property
    def everything(self) -> dict[str, ModelConfig]:
        """The models, and the cells of all ablations."""
        grids = (cell for name in self.ablations for cell in self.cells(name))
        return self.models | {cell.name: cell.model for cell in grids if cell.model is not None}

    @property
    def compared(self) -> list[str]:
        """The models that `run` names, which one table compares."""
        return [name for name in self.run if name in self.models]

    def members(self, name: str) -> list[str]:
        """The cells of the ablation ``name``; of a model that itself."""
        if name in self.models:
            return [name]
        return [cell.name for cell in self.cells(name) if cell.model is not None]

    @property
    def running(self) -> list[str]:
        """All models that `run` stands for, cells too."""
        return list(dict.fromkeys(model for name in self.run for model in self.members(name)))

    def lineage(self, name: str) -> list[str]:
        """The models trained on the way to the model ``name``, the last of them; the first one's VAE is pretrained."""
        other = self.everything[name].vae_of
        return [*(self.lineage(other) if other is not None else []), name]

    def vae(self, name: str) -> AnyVAEConfig:
        """The architecture of the VAE of the model ``name``."""
        vae = self.everything[self.lineage(name)[0]].vae
        assert vae is not None
        return vae

    def owner(self, what: Shared, name: str) -> str:
        """The model under whose name ``what`` the model ``name`` has is kept: the first with the same settings.

        So cells that differ in the prior share the pretrained VAE, those that differ in sampling the trained model.
        """
        return self._owners[what, self._settings(what, name)]

    @functools.cached_property
    def _owners(self) -> dict[tuple[Shared, str], str]:
        owners: dict[tuple[Shared, str], str] = {}
        for name, model in self.everything.items():
            for what in SHARED:
                if what != "vae" or model.vae is not None:
                    owners.setdefault((what, self._settings(what, name)), name)
        return owners

    def _settings(self, what: Shared, name: str) -> str:
        """All settings that ``what`` the model ``name`` has depends on, as text."""
        model = self.everything[name]
        sections: list[Section | None]
        if what == "vae":
            start, model = "", self.everything[self.lineage(name)[0]]
            sections = [model.vae, model.pretrain]
        elif what == "lsgm":
            start = self._settings(what, model.vae_of) if model.vae_of is not None else self._settings("vae", name)
            sections = [model.prior, model.sde, model.train]
        elif what == "vae_samples":  # from N(0, I): no solver
            of_prior = {"solver", "tol", "time_eps", "steps", "variances", "compile", "give_up"}
            return f"{self._settings('vae', name)}\n{model.sample.model_dump_json(exclude=of_prior)}"
        else:
            start = self._settings("lsgm", name)
            sections = [_nelbo(model) if what == "nelbo" else model.sample]
        return "\n".join([start or model.dataset, *(s.model_dump_json() for s in sections if s is not None)])

    def freeze(self, stage: Stage, name: str, code: str | None = None, originals: str | None = None) -> StageConfig:
        """The sections that ``stage`` of the model ``name`` depends on, and no more.

        For ``prepare`` the name is that of the dataset, whose files the hash ``originals`` identifies, for
        ``statistics`` `DATASET.EXTRACTOR`, for ``tabulate`` that of an ablation or :data:`COMPARISON`.
        """
        dataset: Any
        extractor: Any
        if stage == "prepare":
            return PrepareStage(code=code, dataset=name, source=self.datasets[name], originals=originals)
        if stage == "statistics":
            dataset, _, extractor = name.partition(".")
            return StatisticsStage(code=code, dataset=dataset, extractor=extractor)
        if stage == "tabulate":
            if name == COMPARISON:
                return TabulateStage(code=code, name=name, models=self.compared)
            grid, found = self.ablations[name], self.cells(name)
            return TabulateStage(
                code=code,
                name=name,
                models=self.members(name),
                axes={axis: list(labels) for axis, labels in grid.axes.items()},
                cells=[GridCell(name=c.name, labels=c.labels, seed=c.seed, invalid=c.invalid) for c in found],
                **grid.model_dump(include={"title", "note", "columns", "against"}),
            )
        model = self.everything[name]
        if stage == "pretrain":
            if model.vae is None or model.pretrain is None:
                raise ConfigError(f"models.{name}: has no VAE to pretrain, it takes that of {model.vae_of}")
            return PretrainStage(code=code, model=name, dataset=model.dataset, vae=model.vae, pretrain=model.pretrain)
        if stage == "train":
            return TrainStage(
                code=code,
                model=name,
                dataset=model.dataset,
                vae_of=model.vae_of,
                prior=model.prior,
                sde=model.sde,
                train=model.train,
            )
        if stage == "sample":
            return SampleStage(code=code, model=name, sample=model.sample)
        if stage == "illustrate":
            return IllustrateStage(code=code, model=name, dataset=model.dataset, sample=model.sample)
        if stage == "nelbo":
            return NELBOStage(code=code, model=name, dataset=model.dataset, nelbo=_nelbo(model))
        return EvaluateStage(code=code, model=name, dataset=model.dataset, evaluate=model.evaluate)


def _nelbo(model: ModelConfig) -> NELBOConfig:
    """The part of the evaluation that is the NELBO's."""
    return NELBOConfig(**model.evaluate.model_dump(include=set(NELBOConfig.model_fields)))


def load_params(path: str | Path) -> Params:
    """Read and check ``params.yaml``; raises :class:`ConfigError` with the path of each wrong key."""
    try:
        raw = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: is not valid YAML: {error}") from None
    return parse(Params, raw, path)


def read_params(path: str | Path) -> dict[str, Any]:
    return dict(yaml.safe_load(Path(path).read_text()))


def json_schema() -> str:
    """The JSON schema of ``params.yaml`` (kept in ``workflow/schemas``; `python -m lsgm.params` prints it)."""
    return json.dumps(Params.model_json_schema(), indent=2) + "\n"


if __name__ == "__main__":
    print(json_schema(), end="")
