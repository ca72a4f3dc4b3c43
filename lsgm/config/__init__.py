"""The configuration, section by section: every parameter with its type, checks and description.

:class:`lsgm.params.Params` is ``params.yaml`` as a whole; each job reads a frozen part of it
(:mod:`lsgm.config.stages`). This package holds the sections and the base classes that plugins extend. Nothing in it
imports torch, because Snakemake imports it every time it parses the workflow.
"""

from lsgm.config.backbones import BackboneConfig, BlocksConfig, ConvVAEConfig, VAEConfig
from lsgm.config.data import DatasetConfig, DatasetFormatConfig, ImageConfig, ImagesConfig
from lsgm.config.evaluation import Estimator, EstimatorConfig, EvaluateConfig, NELBOConfig
from lsgm.config.extractors import ExtractorEntry
from lsgm.config.likelihoods import LikelihoodEntry
from lsgm.config.priors import DropInactiveConfig, NCSNppConfig, PriorConfig
from lsgm.config.resources import JobConfig, ResourcesConfig, SharedJobConfig
from lsgm.config.sampling import SampleConfig, SamplerConfig
from lsgm.config.sdes import DiffusionConfig, SDEConfig
from lsgm.config.section import ConfigError, Part, Section
from lsgm.config.training import DivergenceConfig, KLAnnealConfig, PretrainConfig, ScheduleConfig, TrainConfig

__all__ = [
    "BackboneConfig",
    "BlocksConfig",
    "ConfigError",
    "ConvVAEConfig",
    "DatasetConfig",
    "DatasetFormatConfig",
    "DiffusionConfig",
    "DivergenceConfig",
    "DropInactiveConfig",
    "Estimator",
    "EstimatorConfig",
    "EvaluateConfig",
    "ExtractorEntry",
    "ImageConfig",
    "ImagesConfig",
    "JobConfig",
    "KLAnnealConfig",
    "LikelihoodEntry",
    "NCSNppConfig",
    "NELBOConfig",
    "Part",
    "PretrainConfig",
    "PriorConfig",
    "ResourcesConfig",
    "SDEConfig",
    "SampleConfig",
    "SamplerConfig",
    "ScheduleConfig",
    "Section",
    "SharedJobConfig",
    "TrainConfig",
    "VAEConfig",
]
