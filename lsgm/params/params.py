"""``params.yaml`` as a whole: datasets, models, the grids of the ablations, and what of it each job reads.

A grid is expanded here, once for Snakemake, DVC and the tables (:meth:`Params.cells`), and what models with the same
settings share is kept under the name of one of them (:meth:`Params.canonical_model`). No torch, as in
:mod:`lsgm.config`: the workflow imports it.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, field_validator, model_validator

from lsgm.config import BackboneConfig, ConfigError, NELBOConfig, SampleConfig, Section
from lsgm.config.bounds import Name
from lsgm.config.mistakes import MISTAKES, parse, shown
from lsgm.config.model import AnyDataset, ModelConfig
from lsgm.config.stages import (
    EvaluateStage,
    GridCell,
    IllustrateStage,
    NELBOStage,
    PrepareStage,
    PretrainStage,
    SampleStage,
    Stage,
    StageConfig,
    StatisticsStage,
    TabulateStage,
    TrainStage,
)
from lsgm.data.originals import read_source
from lsgm.data.registry import DATASETS as KNOWN
from lsgm.data.registry import Dataset, dataset
from lsgm.errors import LSGMError
from lsgm.files import read_json
from lsgm.params import grids, plan, presets
from lsgm.params.grids import AblationConfig, Cell
from lsgm.params.plan import COMPARISON
from lsgm.params.yaml_reader import read_yaml
from lsgm.registry import EXTRACTORS, LIKELIHOODS

Shared = Literal["vae", "lsgm", "vae_samples", "lsgm_samples", "nelbo"]  # what models may have in common
SHARED: tuple[Shared, ...] = get_args(Shared)


class Params(Section):
    """``params.yaml``: the one place for every parameter."""

    run: Annotated[list[Name], Field(min_length=1)] = Field(
        description="what a plain `snakemake` makes: models and ablations"
    )
    datasets: dict[Name, AnyDataset] = Field(
        description="the known datasets, and your own: any new name with `images` or another `format`"
    )
    models: dict[Name, ModelConfig]
    ablations: dict[Name, AblationConfig] = Field({}, description="grids of models")

    @classmethod
    def distinct(cls, raw: Any, errors: list[Any]) -> list[Any]:
        """A mistake in a setting that other models inherit is told once, where it stands."""
        found: dict[tuple[Any, ...], set[Any]] = {}  # rest of the key, message -> models
        kept = []
        for error in errors:
            models = found.setdefault((*error["loc"][2:], error["msg"]), set())
            name = error["loc"][1] if error["loc"][:1] == ("models",) and len(error["loc"]) > 1 else None
            if not models & {*presets.ancestors(raw.get("models"), name)}:
                kept.append(error)
            models.add(name)
        return kept

    @field_validator("models", mode="before")
    @classmethod
    def _extend(cls, models: Any) -> Any:
        """Put in what models extend."""
        try:
            return presets.resolve(models) if isinstance(models, dict) else models
        except ValueError as error:
            raise ValueError(str(error).removeprefix("models.")) from None

    @model_validator(mode="after")
    def _the_plan_holds(self) -> Params:
        """What can be known before the first job; each of these checks builds on those before it."""
        for check in (self._wrong_names, self._wrong_models, self._wrong_grids):
            if mistakes := dict.fromkeys(itertools.islice(check(), MISTAKES + 1)):
                raise ValueError("\n".join(mistakes))
        return self

    def _wrong_names(self) -> Iterator[str]:
        yield from plan.wrong_names(self.run, self.models, self.ablations)
        yield from plan.wrong_datasets(self.datasets)
        yield from plan.wrong_ancestry(self.models, self.datasets)

    def _wrong_models(self) -> Iterator[str]:
        found = {
            name: [*self._misfits(model), *plan.wrong_counts(model, self.dataset(model))]
            for name, model in self.models.items()
        }
        for name, mistakes in found.items():
            inherited = {mistake for parent in presets.ancestors(self.models, name) for mistake in found[parent]}
            yield from (f"models.{name}.{mistake}" for mistake in mistakes if mistake not in inherited)

    def _wrong_grids(self) -> Iterator[str]:
        sizes = {name: grids.size(grid) for name, grid in self.ablations.items()}
        if sum(sizes.values()) > grids.MAX_CELLS:
            largest = max(sizes, key=lambda name: sizes[name])
            yield f"ablations: {sum(sizes.values()):,} cells in all, most of them in {largest}, expected at most " \
                  f"{grids.MAX_CELLS:,}; leave out choices or seeds"  # fmt: skip
            return
        taken = {*self.models, *self.ablations, *plan.RULES, plan.COMPARISON}
        for name, grid in self.ablations.items():
            where = f"ablations.{name}"
            if grid.base not in self.models:
                yield f"{where}.base: {grid.base!r}: the models are {', '.join(self.models)}"
                continue
            try:
                found = self.cells(name)
            except ValueError as error:
                yield str(error)
                continue
            for cell in found:
                if cell.name in taken:
                    yield (
                        f"{where}: two cells or models are called {cell.name}; names are made of letters and digits of "
                        "the choices and of the seed, which must differ in them"
                    )
                    break
                taken.add(cell.name)
            first: dict[str, str] = {}  # cell that a mistake is in
            for cell in found:
                for mistake in plan.wrong_counts(cell.model, self.dataset(cell.model)) if cell.model else ():
                    first.setdefault(mistake, cell.name)
            yield from (f"{where}: {cell}: {mistake}" for mistake, cell in first.items())
        found_names = [cell.name for cells in self._cells.values() for cell in cells]
        yield from plan.same_but_for_case("models and cells", [*self.models, *self.ablations, *found_names])

    def dataset(self, model: ModelConfig) -> Dataset:
        """What the project knows of the dataset of a model."""
        return dataset(model.dataset, self.datasets[model.dataset])

    def _misfits(self, model: ModelConfig) -> list[str]:
        """Why there is no such model, which may be a cell: with the VAE that it begins with."""
        first = model
        while first.vae_of is not None:
            first = self.models[first.vae_of]
        assert first.vae is not None
        return plan.misfits_of(model, first.vae, self.dataset(model))

    @functools.cached_property
    def _cells(self) -> dict[str, list[Cell]]:
        return {}  # filled by :meth:`cells`

    def cells(self, ablation: str) -> list[Cell]:
        """The cells of an ablation: what Snakemake, DVC and the tables know of it."""
        if ablation not in self._cells:
            grid = self.ablations[ablation]
            self._cells[ablation] = grids.cells(ablation, grid, self.models[grid.base], self._misfits)
        return self._cells[ablation]

    @functools.cached_property
    def all_models(self) -> dict[str, ModelConfig]:
        """The models, and the cells of all ablations."""
        grids = (cell for name in self.ablations for cell in self.cells(name))
        return self.models | {cell.name: cell.model for cell in grids if cell.model is not None}

    @property
    def table_models(self) -> list[str]:
        """The models that `run` names: one table compares them."""
        return [name for name in self.run if name in self.models]

    def members(self, name: str) -> list[str]:
        """The cells of the ablation ``name``; of a model that itself."""
        if name in self.models:
            return [name]
        return [cell.name for cell in self.cells(name) if cell.model is not None]

    @property
    def selected_models(self) -> list[str]:
        """All models that `run` stands for, including the cells of ablations."""
        return list(dict.fromkeys(model for name in self.run for model in self.members(name)))

    def lineage(self, name: str) -> list[str]:
        """The models trained on the way to the model ``name``, the last of them; the first one's VAE is pretrained."""
        other = self.all_models[name].vae_of
        return [*(self.lineage(other) if other is not None else []), name]

    def vae(self, name: str) -> BackboneConfig:
        """The architecture of the VAE of the model ``name``."""
        vae = self.all_models[self.lineage(name)[0]].vae
        assert vae is not None
        return vae

    def wrong_counts(self, name: str, data: Path) -> list[str]:
        """What the model ``name`` asks of its dataset and cannot have, by the store in the folder ``data``.

        Empty where there is none yet, or one of other settings.
        """
        model = self.all_models[name]
        source = read_source(data / model.dataset).get("stage") or {}
        try:
            counts = read_json(data / model.dataset / "manifest.json")["splits"]
        except (LSGMError, KeyError, TypeError):
            return []
        if source.get("source") != self.datasets[model.dataset].model_dump(mode="json"):
            return []
        dataset = replace(self.dataset(model), counts=counts)
        return [f"params.yaml: models.{name}.{mistake}" for mistake in plan.wrong_counts(model, dataset)]

    def canonical_model(self, what: Shared, name: str) -> str:
        """The model under whose name ``what`` of the model ``name`` is kept: the first with the same settings.

        So cells that differ in the prior share the pretrained VAE, and cells that differ in sampling the trained model.
        """
        return self._canonical[what, self._settings(what, name)]

    @functools.cached_property
    def _canonical(self) -> dict[tuple[Shared, str], str]:
        found: dict[tuple[Shared, str], str] = {}
        for name, model in self.all_models.items():
            for what in SHARED:
                if what != "vae" or model.vae is not None:
                    found.setdefault((what, self._settings(what, name)), name)
        return found

    def _settings(self, what: Shared, name: str) -> str:
        """All settings on which ``what`` of the model ``name`` depends, as text."""
        model = self.all_models[name]
        sections: list[Section | None]
        if what == "vae":
            start, model = "", self.all_models[self.lineage(name)[0]]
            sections = [model.vae, model.pretrain]
        elif what == "lsgm":
            start = self._settings(what, model.vae_of) if model.vae_of is not None else self._settings("vae", name)
            sections = [model.prior, model.sde, model.train]
        elif what == "vae_samples":  # from N(0, I): no solver
            return f"{self._settings('vae', name)}\n{_without_solver(model.sample).model_dump_json()}"
        else:
            start = self._settings("lsgm", name)
            sections = [_nelbo(model) if what == "nelbo" else model.sample]
        return "\n".join([start or model.dataset, *(s.model_dump_json() for s in sections if s is not None)])

    def parts(self, stage: Stage, name: str) -> list[Any]:
        """The implementations that ``stage`` of ``name`` uses of what can be swapped; ``name`` as in :meth:`freeze`."""
        if stage == "prepare":
            found = self.datasets[name]
            return [found.implementation] if name not in KNOWN else []
        if stage == "statistics":
            extractor = name.partition(".")[2]
            return [EXTRACTORS.entry(extractor).implementation] if extractor in EXTRACTORS.names() else []
        if stage == "tabulate":
            return []
        kind, _, model_name = name.rpartition(".")
        model, vae = self.all_models[model_name], self.vae(model_name)
        if stage == "evaluate":
            return [EXTRACTORS.entry(model.evaluate.extractor).implementation] if model.evaluate.extractor else []
        used = [vae, LIKELIHOODS.entry(vae.likelihood)]
        if stage != "pretrain" and kind != "vae":
            used += [model.prior, model.sde]
        if kind == "lsgm":
            used.append(model.sample)
        return [part.implementation for part in used]

    def freeze(self, stage: Stage, name: str, code: str | None = None) -> StageConfig:
        """The sections that ``stage`` of the model ``name`` depends on, and no more.

        ``name`` is that of a dataset for ``prepare``, `DATASET.EXTRACTOR` for ``statistics``, `vae.MODEL` or
        `lsgm.MODEL` for ``sample``, an ablation or :data:`COMPARISON` for ``tabulate``.
        """
        dataset: Any
        extractor: Any
        if stage == "prepare":
            return PrepareStage(code=code, dataset=name, source=self.datasets[name])
        if stage == "statistics":
            dataset, _, extractor = name.partition(".")
            return StatisticsStage(code=code, dataset=dataset, extractor=extractor)
        if stage == "tabulate":
            if name == COMPARISON:
                return TabulateStage(code=code, name=name, models=self.table_models)
            grid, found = self.ablations[name], self.cells(name)
            return TabulateStage(
                code=code,
                name=name,
                models=self.members(name),
                axes={axis: list(labels) for axis, labels in grid.axes.items()},
                cells=[GridCell(name=c.name, labels=c.labels, seed=c.seed, invalid=c.invalid) for c in found],
                **grid.model_dump(include={"title", "note", "columns", "against"}),
            )
        if stage == "sample":
            kind, _, name = name.partition(".")
            sample = self.all_models[name].sample
            return SampleStage(
                code=code,
                kind=kind,
                model=name,
                sample=sample.resolved() if kind == "lsgm" else _without_solver(sample),
            )
        model = self.all_models[name]
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
                sde=model.sde.resolved(),
                train=model.train,
            )
        if stage == "illustrate":
            return IllustrateStage(code=code, model=name, dataset=model.dataset, sample=model.sample.resolved())
        if stage == "nelbo":
            return NELBOStage(code=code, model=name, dataset=model.dataset, nelbo=_nelbo(model))
        return EvaluateStage(code=code, model=name, dataset=model.dataset, evaluate=model.evaluate)


def _nelbo(model: ModelConfig) -> NELBOConfig:
    """The part of the evaluation that is the NELBO's."""
    return NELBOConfig(**model.evaluate.model_dump(include=set(NELBOConfig.model_fields)))


def _without_solver(sample: SampleConfig) -> SampleConfig:
    """What of the settings matters to samples of a VAE, whose prior N(0, I) needs no solver."""
    return SampleConfig(**sample.model_dump(include={"count", "temperature", "vae_batch_statistics", "batch", "seed"}))


def load_params(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Params:
    """Read and check ``params.yaml``; raises :class:`ConfigError` with the path of each wrong key.

    Args:
        overrides: what `snakemake --config` sets; only `run` may be set.
    """
    document, replaced = read_yaml(path), overrides or {}
    if replaced.keys() - {"run"} or not isinstance(replaced.get("run", []), list):
        raise ConfigError(
            f"--config: expected 'run=[NAME]' with names of models and ablations, found {shown(dict(replaced))}; all "
            f"other parameters stand in {path}"
        )
    lines = {key: line for key, line in document.lines.items() if key.partition(".")[0] not in replaced}
    value = {**document.value, **replaced}
    return parse(Params, value, path, presets.inherited_lines(value.get("models"), lines))
