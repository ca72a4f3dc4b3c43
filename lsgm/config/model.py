"""The configuration of one model, from its dataset to its evaluation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from lsgm.config.backbones import BackboneConfig
from lsgm.config.bounds import Name
from lsgm.config.data import DatasetConfig
from lsgm.config.evaluation import EvaluateConfig
from lsgm.config.priors import PriorConfig
from lsgm.config.resources import ResourcesConfig
from lsgm.config.sampling import SampleConfig
from lsgm.config.sdes import DiffusionConfig
from lsgm.config.section import Section, any_of
from lsgm.config.training import PretrainConfig, TrainConfig
from lsgm.registry import BACKBONES, DATASETS, SCORE_NETWORKS, SDES, SOLVERS

if TYPE_CHECKING:
    AnyBackbone = BackboneConfig
    AnyPrior = PriorConfig
    AnySDE = DiffusionConfig
    AnySampling = SampleConfig
    AnyDataset = DatasetConfig
else:  # plugins add entries
    AnyBackbone = any_of(BACKBONES, "backbone", "nvae")
    AnyPrior = any_of(SCORE_NETWORKS, "network", "ncsnpp")
    AnySDE = any_of(SDES, "name", "vpsde")
    AnySampling = any_of(SOLVERS, "solver", "ab")
    AnyDataset = any_of(DATASETS, "format", "images")


class ModelConfig(Section):
    """One model: everything from the name of its dataset to its evaluation.

    Its VAE is either pretrained (``vae`` and ``pretrain``) or taken from another model after that model's end-to-end
    training (``vae_of``).
    """

    extends: Name | None = Field(
        None, description="name of the model from which this one inherits every setting that it does not set"
    )
    dataset: Name = Field(description="name of the dataset, a key of `datasets`")
    vae: AnyBackbone | None = None
    pretrain: PretrainConfig | None = None
    vae_of: Name | None = Field(
        None, description="name of the model whose trained VAE this one starts from, instead of `vae` and `pretrain`"
    )
    prior: AnyPrior
    sde: AnySDE
    train: TrainConfig
    sample: AnySampling
    evaluate: EvaluateConfig
    resources: ResourcesConfig = ResourcesConfig()

    @model_validator(mode="after")
    def _has_one_vae(self) -> ModelConfig:
        given = [key for key in ("vae", "pretrain", "vae_of") if getattr(self, key) is not None]
        if given not in (["vae", "pretrain"], ["vae_of"]):
            raise ValueError(
                "a model needs either vae and pretrain, or vae_of (the name of another model); this one has "
                f"{' and '.join(given) or 'none of them'}"
            )
        return self

    @model_validator(mode="after")
    def _discretized_diffusions_preserve_variance(self) -> ModelConfig:
        if not self.sde.variance_preserving:
            values = [("sample.solver", self.sample.solver), ("evaluate.estimator", self.evaluate.estimator)]
            values += [("evaluate.extra_estimators", value) for value in self.evaluate.extra_estimators]
            for key, value in values:
                if value in ("ancestral", "discretized"):
                    raise ValueError(f"{key}: {value!r} needs sde.name vpsde or geometric_vpsde, not {self.sde.name!r}")
        return self
