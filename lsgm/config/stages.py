"""The frozen configuration of each job: exactly the settings that it depends on."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, TypeVar, get_args

from pydantic import Field

from lsgm.config.bounds import Name, Seed
from lsgm.config.evaluation import EvaluateConfig, NELBOConfig
from lsgm.config.mistakes import parse
from lsgm.config.model import AnyBackbone, AnyDataset, AnyPrior, AnySampling, AnySDE
from lsgm.config.section import ConfigError, Section
from lsgm.config.training import PretrainConfig, TrainConfig
from lsgm.errors import LSGMError
from lsgm.files import read_json

Stage = Literal["prepare", "statistics", "pretrain", "train", "sample", "nelbo", "evaluate", "illustrate", "tabulate"]
STAGES: tuple[Stage, ...] = get_args(Stage)

S = TypeVar("S", bound="Section")


class StageConfig(Section):
    """The configuration of one job. ``code`` is the fingerprint of the code that the workflow ran it with."""

    stage: Stage
    code: str | None = None


class PrepareStage(StageConfig):
    stage: Literal["prepare"] = "prepare"
    dataset: Name
    source: AnyDataset
    originals: str | None = Field(None, description="hash of the names, sizes and times of the files at source.path")


class StatisticsStage(StageConfig):
    stage: Literal["statistics"] = "statistics"
    dataset: Name
    extractor: str


class PretrainStage(StageConfig):
    stage: Literal["pretrain"] = "pretrain"
    model: Name
    dataset: Name
    vae: AnyBackbone
    pretrain: PretrainConfig


class TrainStage(StageConfig):
    stage: Literal["train"] = "train"
    model: Name
    dataset: Name
    vae_of: Name | None = None
    prior: AnyPrior
    sde: AnySDE
    train: TrainConfig


class SampleStage(StageConfig):
    stage: Literal["sample"] = "sample"
    kind: Literal["vae", "lsgm"] = "lsgm"
    model: Name
    sample: AnySampling


class IllustrateStage(StageConfig):
    stage: Literal["illustrate"] = "illustrate"
    model: Name
    dataset: Name
    sample: AnySampling


class NELBOStage(StageConfig):
    stage: Literal["nelbo"] = "nelbo"
    model: Name
    dataset: Name
    nelbo: NELBOConfig


class EvaluateStage(StageConfig):
    stage: Literal["evaluate"] = "evaluate"
    model: Name
    dataset: Name
    evaluate: EvaluateConfig


class GridCell(Section):
    """The facts about a cell that the tables need; everything else is in its metrics.json."""

    name: Name
    labels: dict[str, str]
    seed: Seed
    invalid: str | None = None


class TabulateStage(StageConfig):
    """A table and a figure of the models in `run`, or of one ablation."""

    stage: Literal["tabulate"] = "tabulate"
    name: Name
    models: list[Name]
    title: str = ""
    note: str = ""
    axes: dict[str, list[str]] = Field({})
    columns: list[str] = Field([])
    against: list[Literal["nelbo", "nfe", "seconds"]] = Field([])
    cells: list[GridCell] = Field([])


def load_stage(kind: type[S], path: str | Path) -> S:
    """Read a frozen configuration; raises :class:`ConfigError`."""
    try:
        raw = read_json(path, "delete it; the workflow writes it again" if issubclass(kind, StageConfig) else "")
    except LSGMError as error:
        raise ConfigError(str(error)) from None
    return parse(kind, raw, path)
