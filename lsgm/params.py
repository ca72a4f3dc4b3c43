"""``params.yaml`` as a whole: datasets, models, the grids of the ablations, and what of it each job reads.

A grid is expanded here, once for Snakemake, DVC and the tables (:meth:`Params.cells`), and what models with the same
settings share gets its owner (:meth:`Params.owner`). Without torch, as :mod:`lsgm.config`: the workflow imports it.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, model_validator

from lsgm.params import grids, plan
from lsgm.config.bounds import Name
from lsgm.config import BackboneConfig, ConfigError, DatasetConfig, NELBOConfig, Section
from lsgm.config.mistakes import MISTAKES, parse
from lsgm.config.model import ModelConfig
from lsgm.config.stages import EvaluateStage, GridCell, IllustrateStage, NELBOStage, PrepareStage, PretrainStage, SampleStage, Stage, StageConfig, StatisticsStage, TabulateStage, TrainStage
from lsgm.data.originals import read_source
from lsgm.data.registry import Dataset, dataset
from lsgm.errors import LSGMError
from lsgm.files import read_json
from lsgm.params.grids import AblationConfig, Cell
from lsgm.config.mistakes import shown
from lsgm.params.plan import COMPARISON
from lsgm.params.yaml_reader import read_yaml

Shared = Literal["vae", "lsgm", "vae_samples", "lsgm_samples", "nelbo"]  # what models may have in common
SHARED: tuple[Shared, ...] = get_args(Shared)


class Params(Section):
    """``params.yaml``: the one place for every parameter."""

    run: Annotated[list[Name], Field(min_length=1)] = Field(
        description="what a plain `snakemake` makes: models, and ablations beside them"
    )
    datasets: dict[Name, DatasetConfig] = Field(description="the known ones, and your own: any name with `images`")
    models: dict[Name, ModelConfig]
    ablations: dict[Name, AblationConfig] = Field({}, description="grids of models")

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
        for name, model in self.models.items():
            dataset = self.dataset(model)
            for mistake in [*self._misfits(model), *plan.wrong_counts(model, dataset)]:
                yield f"models.{name}.{mistake}"

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

    def vae(self, name: str) -> BackboneConfig:
        """The architecture of the VAE of the model ``name``."""
        vae = self.everything[self.lineage(name)[0]].vae
        assert vae is not None
        return vae

    def wrong_counts(self, name: str, data: Path) -> list[str]:
        """What the model ``name`` asks of its dataset and cannot have, by the store in the folder ``data``.

        Empty where there is none yet, or one of other settings.
        """
        model = self.everything[name]
        source = read_source(data / model.dataset).get("stage") or {}
        try:
            counts = read_json(data / model.dataset / "manifest.json")["splits"]
        except (LSGMError, KeyError, TypeError):
            return []
        if source.get("source") != self.datasets[model.dataset].model_dump(mode="json"):
            return []
        dataset = replace(self.dataset(model), counts=counts)
        return [f"params.yaml: models.{name}.{mistake}" for mistake in plan.wrong_counts(model, dataset)]

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

    def freeze(self, stage: Stage, name: str, code: str | None = None) -> StageConfig:
        """The sections that ``stage`` of the model ``name`` depends on, and no more.

        For ``prepare`` the name is that of the dataset, for ``statistics`` `DATASET.EXTRACTOR`, for ``tabulate`` that
        of an ablation or :data:`COMPARISON`.
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


def load_params(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Params:
    """Read and check ``params.yaml``; raises :class:`ConfigError` with the path of each wrong key.

    Args:
        overrides: what `snakemake --config` sets; it may be `run` alone.
    """
    document, replaced = read_yaml(path), overrides or {}
    if replaced.keys() - {"run"} or not isinstance(replaced.get("run", []), list):
        raise ConfigError(
            f"--config: expected 'run=[NAME]' with names of models and ablations, found {shown(dict(replaced))}; all "
            f"other parameters stand in {path}"
        )
    lines = {key: line for key, line in document.lines.items() if key.partition(".")[0] not in replaced}
    return parse(Params, {**document.value, **replaced}, path, lines)


def json_schema() -> str:
    """The JSON schema of ``params.yaml`` (kept in ``workflow/schemas``; `python -m lsgm.params` prints it)."""
    return json.dumps(_with_keywords(Params.model_json_schema()), indent=2) + "\n"


def _with_keywords(node: Any) -> Any:
    """A schema in which bounds have their names in JSON Schema: pydantic leaves its own where a validator is around."""
    names = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}
    names |= {"multiple_of": "multipleOf"}
    if isinstance(node, dict):
        bounded = node.get("type") in ("integer", "number")
        return {names.get(key, key) if bounded else key: _with_keywords(value) for key, value in node.items()}
    return [_with_keywords(item) for item in node] if isinstance(node, list) else node


if __name__ == "__main__":
    print(json_schema(), end="")
