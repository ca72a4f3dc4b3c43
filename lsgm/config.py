"""Every parameter of the project, typed, with its check and its error message.

``params.yaml`` is read into :class:`Params`. A job never reads ``params.yaml``: it reads a *frozen*
configuration, a small JSON file that holds exactly the sections one stage depends on (see
:meth:`Params.freeze`), so that an edit made while a job waits in a queue cannot change what it does.

This module imports neither torch nor the rest of the library: the workflow reads it at parse time.
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
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator

from lsgm.errors import LSGMError

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_]*$")]

GEOMETRIC_SIGMA2_MAX = 0.999

LikelihoodName = Literal["bernoulli", "dml", "dl", "normal"]
Stage = Literal["prepare", "statistics", "pretrain", "train", "sample", "nelbo", "evaluate", "illustrate", "tabulate"]
STAGES: tuple[Stage, ...] = get_args(Stage)
DATASET_NAMES = (  # those of lsgm/data/registry.py
    "mnist", "fashion_mnist", "omniglot", "cifar10", "celeba64", "celebahq256", "ffhq256", "lsun_church",
    "lsun_bedroom", "imagenet32",
)  # fmt: skip
Estimator = Literal["ode", "discretised"]
ExtractorName = Literal["inception", "efficientnet_lite0", "mnist_classifier"]


Shared = Literal["vae", "lsgm", "vae_samples", "lsgm_samples", "nelbo"]  # what models may have in common
SHARED: tuple[Shared, ...] = get_args(Shared)
COMPARISON = "run"  # the name of the frozen configuration of the table that compares the models of `run`

GiveUp = Literal["fail", "record"]
RECORDED = "record: its numbers are nan, and the tables say why; for grids, whose other cells go on"

S = TypeVar("S", bound="Section")


class ConfigError(LSGMError):
    """A configuration that cannot be used; the message names the key, the value and what was expected."""


class Section(BaseModel):
    """A part of the configuration: unknown keys are refused, values cannot be changed after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ImagesConfig(Section):
    """How the images of the user's own set are read."""

    size: Count = Field(description="height and width of the stored images")
    channels: Literal[1, 3] = Field(3, description="3: RGB; 1: grey")
    crop: Count | None = Field(
        None, description="side of the centred square that is resized to `size`; null: the largest"
    )
    split: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        0.1, description="share of the images that are the test set, drawn at random; null: folders train and test"
    )
    seed: int = Field(0, description="of that draw")
    binary: bool = Field(False, description="pixels are drawn from Bernoulli(intensity) each time an image is seen")


class DatasetConfig(Section):
    """Where a dataset comes from; of the user's own also what it is."""

    path: str | None = Field(
        None,
        description="folder or file with the originals (the README says which), or with {split}_images.npy; null: "
        "download them, where that is possible",
    )
    images: ImagesConfig | None = Field(None, description="of a set of your own: images in a folder, zip or LMDB")


class ImageConfig(Section):
    """The images that a model works on; follows from the dataset."""

    channels: Count
    size: Count = Field(description="height and width of an image, as it is generated and evaluated")
    padded_size: Count = Field(description="height and width as the network sees it, the border filled with zeros")
    binary: bool = Field(description="pixels are drawn from Bernoulli(intensity) each time an image is seen")


class BlocksConfig(Section):
    """A chain of down- or up-sampling blocks."""

    blocks: Count = Field(description="number of blocks, each halves (doubles) the resolution")
    cells: Count = Field(description="residual cells in a block")


class BackboneConfig(Section):
    """What all VAEs have."""

    likelihood: LikelihoodName = Field(
        "bernoulli",
        description="bernoulli; dml: mixture of ten discretised logistics; dl: one discretised logistic; normal",
    )
    x_bits: Annotated[int, Field(ge=1, le=8)] = Field(8, description="bits per value; the lower ones are dropped")
    log_sigma_clamp: Positive = Field(5.0, description="soft clamp of the posterior's log sigma")


class VAEConfig(BackboneConfig):
    """The NVAE (arXiv 2007.03898)."""

    backbone: Literal["nvae"] = "nvae"
    arch: Literal["res_bnswish", "res_mbconv"] = Field(description="cells of the decoder")
    channels: Count = Field(description="channels after the stem, times channel_mult[0]")
    channel_mult: list[Count] = Field(
        description="channels of the stem, after each pre-process block and of each smaller scale of latents, in "
        "multiples of `channels`"
    )
    latent_scales: Count = Field(1, description="resolutions with latents; the prior covers the smallest")
    groups_per_scale: Count = Field(description="latent groups of each scale")
    latents_per_group: Count = Field(description="latent channels of a group")
    cells_per_cond: Count = Field(description="cells of a group, in the encoder and in the decoder")
    preprocess: BlocksConfig
    postprocess: BlocksConfig
    use_se: bool = Field(True, description="squeeze-and-excitation at the end of every cell")
    num_nf: Annotated[int, Field(ge=0)] = Field(0, description="pairs of normalising flow steps per group")
    progressive_input: Literal["none", "input_skip"] = Field("none", description="image pyramid into the encoder")

    @model_validator(mode="after")
    def _shapes_fit(self) -> VAEConfig:
        wanted = self.preprocess.blocks + self.latent_scales
        if len(self.channel_mult) != wanted:
            raise ValueError(
                f"channel_mult needs one entry for the stem, one per pre-process block and one per scale but the "
                f"first: {wanted}, not {len(self.channel_mult)}"
            )
        if self.preprocess.blocks != self.postprocess.blocks:
            raise ValueError("preprocess.blocks and postprocess.blocks must be equal: the output has the input's size")
        return self


class ConvVAEConfig(BackboneConfig):
    """A plain convolutional VAE with one group of latents."""

    backbone: Literal["conv"]
    channels: Count = Field(description="channels at full resolution, times channel_mult[0]")
    channel_mult: Annotated[list[Count], Field(min_length=2)] = Field(
        description="channels at each resolution, in multiples of `channels`"
    )
    latents: Count = Field(description="latent channels")


def _backbone(vae: Any) -> str:
    return str(vae.get("backbone", "nvae") if isinstance(vae, dict) else getattr(vae, "backbone", "nvae"))


BACKBONES = {"nvae": VAEConfig, "conv": ConvVAEConfig}
AnyVAEConfig = Annotated[
    Annotated[VAEConfig, Tag("nvae")] | Annotated[ConvVAEConfig, Tag("conv")], Discriminator(_backbone)
]


class RescueConfig(Section):
    """What happens to steps whose loss or gradient is not finite, or whose gradient explodes: they are left out."""

    bad_steps: Count = Field(10, description="so many in a row, and the training goes back to its last state")
    tries: Annotated[int, Field(ge=0)] = Field(3, description="times it goes back before it gives up")
    lr_factor: Annotated[float, Field(gt=0, le=1)] = Field(0.5, description="of the learning rates, each time")
    spectral_factor: Annotated[float, Field(ge=1)] = Field(2.0, description="of the spectral regularisation, each time")
    explosion: Annotated[float, Field(gt=1)] = Field(
        1e4, description="a gradient so many times the median norm of the last hundred counts as bad"
    )
    give_up: GiveUp = Field(
        "fail",
        description="after the tries. record: the training ends with its last good state, and metrics.json and tables "
        "say at which step it diverged; for grids, whose other cells go on",
    )


class ScheduleConfig(Section):
    """Length of a training stage, its learning-rate schedule, and how it is run."""

    epochs: Positive = Field(description="passes over the training set; fractions are allowed")
    batch: Count = Field(description="images per step")
    warmup_epochs: NonNegative = Field(5.0, description="linear warm-up of the learning rates")
    lr_schedule: Literal["epoch", "iteration"] = Field(
        "epoch", description="when the cosine moves: once an epoch, as published, or at every step"
    )
    recompute: bool = Field(
        False,
        description="keep no feature maps inside of the blocks of NVAE and score network, compute them again for the "
        "backward pass: less memory for more time",
    )
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = Field(
        "fp32", description="of matrix products and convolutions; fp16 scales the loss"
    )
    compile: bool = Field(False, description="compile the networks: minutes at first, for long trainings")
    accumulate: Count = Field(
        1,
        description="parts that each process's share of a batch is taken in; batch norm and KL balancing see a part",
    )
    grad_clip: NonNegative = Field(0.0, description="largest norm of the gradient; 0: any")
    state_minutes: Positive = Field(10.0, description="minutes between two saved states")
    look_epochs: NonNegative = Field(
        0.0,
        description="epochs between two looks at the model, for history and TensorBoard: NELBO of test images, NFE, "
        "samples; 0: none",
    )
    look_images: Count = Field(36, description="test images, and samples, of a look")
    rescue: RescueConfig = RescueConfig()
    seed: int = 1


class PretrainConfig(ScheduleConfig):
    """First stage: the VAE with the prior N(0, I)."""

    lr: Positive = 1e-2
    lr_min: NonNegative = 1e-4
    adam_eps: Positive = 1e-3
    weight_decay: NonNegative = 3e-4
    kl_const_portion: Fraction = Field(1e-4, description="share of the iterations at kl_const_coeff")
    kl_const_coeff: Fraction = 1e-4
    kl_anneal_portion: Fraction = Field(description="share of the iterations over which beta rises")
    kl_max_coeff: Positive = Field(description="beta at the end")
    spectral_reg: NonNegative = Field(description="weight of the spectral regularisation")


class DropInactiveConfig(Section):
    """Which latents the encoder does not use, and so are left to N(0, I)."""

    threshold: NonNegative = Field(0.1, description="channels with a KL to N(0, I) of at most so many nats are dropped")
    batches: Count = Field(1000, description="training batches that the KL is averaged over, before the second stage")


class PriorConfig(Section):
    """The NCSN++ score network and the mixed score (arXiv 2011.13456; LSGM, section 3.2)."""

    channels: Count = Field(description="width of the network")
    scales: Annotated[int, Field(ge=1, le=5)] = Field(description="resolutions")
    cells_per_scale: Count = Field(description="residual blocks at each resolution")
    fir: bool = Field(False, description="resample with the FIR kernel [1,3,3,1] (false: nearest and average)")
    dropout: Fraction = 0.2
    embedding: Literal["positional", "fourier"] = Field("positional", description="of t; fourier: random frequencies")
    embedding_dim: Annotated[int, Field(ge=4, multiple_of=2)] = 128
    embedding_scale: Positive = 1000.0
    attention_resolution: Count = Field(16, description="attention where the feature map has this size")
    mixed_prediction: bool = Field(True, description="mix with the score of N(0, I); false: the score network alone")
    mixing_logit_init: float = Field(description="logit of the score network's share alpha at the start")
    drop_inactive: DropInactiveConfig | None = None

    @model_validator(mode="after")
    def _inactive_latents_have_a_prior(self) -> PriorConfig:
        if self.drop_inactive is not None and not self.mixed_prediction:
            raise ValueError("drop_inactive: leaves channels to N(0, I), which needs mixed_prediction: true")
        return self


class SDEConfig(Section):
    """The forward diffusion; keys that the named one has no use for are ignored, so that one switch changes it."""

    name: Literal["vpsde", "geometric_vpsde", "sub_vpsde", "vesde"] = "vpsde"
    beta_start: NonNegative = Field(0.1, description="vpsde, sub_vpsde: beta at t = 0")
    beta_end: Positive = Field(20.0, description="vpsde, sub_vpsde: beta at t = 1")
    sigma2_min: Positive = Field(3e-5, description="geometric_vpsde, vesde: where the geometric progression starts")
    sigma2_max: Positive | None = Field(
        None,
        description="geometric_vpsde: variance at t = 1 (null: 0.999); vesde: variance at t = 1 (null: the largest "
        "squared distance of two encodings, found when training starts)",
    )
    sigma2_0: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None, description="variance at t = 0; null: 0, or sigma2_min for geometric_vpsde; vesde: always sigma2_min"
    )
    time_eps: Annotated[float, Field(ge=0, lt=1)] = Field(0.01, description="training draws t from [time_eps, 1]")

    @model_validator(mode="after")
    def _can_be_used(self) -> SDEConfig:
        geometric = self.name in ("geometric_vpsde", "vesde")
        starts_at = self.sigma2_0 if self.sigma2_0 is not None and self.name != "vesde" else float(geometric)
        if self.time_eps == 0 and starts_at == 0:
            raise ValueError("the weights diverge at t = 0: time_eps or sigma2_0 must be above 0")
        if geometric and self.sigma2_max is not None and self.sigma2_max <= self.sigma2_min:
            raise ValueError(f"sigma2_max must be above sigma2_min = {self.sigma2_min}, not {self.sigma2_max}")
        end = self.sigma2_max if self.sigma2_max is not None else GEOMETRIC_SIGMA2_MAX
        end += 0 if self.sigma2_0 is None else self.sigma2_0 - self.sigma2_min
        if self.name == "geometric_vpsde" and end >= 1:
            raise ValueError(f"the geometric VPSDE's variance at t = 1 must be below 1, not {end:.3g}")
        if self.name in ("vpsde", "sub_vpsde") and self.beta_end < self.beta_start:
            raise ValueError(f"beta_end must not be below beta_start = {self.beta_start}, not {self.beta_end}")
        return self


class KLAnnealConfig(Section):
    """Linear annealing of the KL coefficient over the beginning of the second stage."""

    start: Fraction = 0.7
    end: Positive = 1.0
    portion: Annotated[float, Field(gt=0, le=1)] = Field(0.1, description="share of the iterations it takes")


class TrainConfig(ScheduleConfig):
    """Second stage: VAE and score prior, end to end (LSGM, appendix G.6)."""

    p_weighting: Literal["ll", "un", "re", "rescale"] = Field(
        "ll", description="weighting of the prior's loss over t; the VAE's is always ll, that of the likelihood"
    )
    p_sampling: Literal["importance", "uniform"] = Field("importance", description="how t is drawn for the prior")
    q_samples: Literal["shared", "own", "reweighted"] = Field(
        "shared",
        description="the t of the VAE's loss. shared: one loss trains both (algorithm 1, p_weighting ll only); own: "
        "drawn for w_ll (algorithm 2); reweighted: those of the prior, weighted for the likelihood (algorithm 3)",
    )
    q_sampling: Literal["importance", "uniform"] = Field("importance", description="how q_samples: own draws its t")
    q_pass: Literal["in_turn", "joint"] = Field(
        "in_turn",
        description="q_samples: own takes the VAE's and the prior's samples through the score network in turn (least "
        "memory and work) or in one pass of twice the batch (fewer kernels)",
    )
    q_uses_ema: bool = Field(False, description="the VAE's pass sees the average of the prior's weights (own, in_turn)")
    train_vae: bool = Field(True, description="false: the VAE stays as it is (two-stage ablation)")
    draws: Count = Field(1, description="draws of (t, noise) per image and step for the cross entropy")
    lr_vae: Positive = 1e-4
    lr_min_vae: NonNegative = 1e-5
    lr_prior: Positive = 1e-4
    lr_min_prior: NonNegative = 1e-4
    adam_eps_vae: Positive = 1e-3
    adam_eps_prior: Positive = 1e-4
    weight_decay: NonNegative = 3e-4
    ema: Annotated[float, Field(ge=0, lt=1)] = Field(0.9999, description="decay of the average of the prior's weights")
    kl_anneal: KLAnnealConfig | None = None
    kl_balance: bool = Field(False, description="balance the groups' KLs while annealed, as in the first stage")
    spectral_reg_vae: NonNegative = 1e-2
    spectral_reg_prior: NonNegative = 0.0
    spectral_reg_prior_convs: bool = Field(True, description="false: spectral_reg_prior acts on the norm layers only")

    @model_validator(mode="after")
    def _an_algorithm_fits(self) -> TrainConfig:
        if self.q_samples == "shared" and self.p_weighting != "ll" and self.train_vae:
            raise ValueError(
                f"q_samples: 'shared' (algorithm 1) trains the VAE with the prior's weighting, which must then be "
                f"'ll', not {self.p_weighting!r}; with p_weighting: {self.p_weighting} use q_samples: reweighted "
                "(algorithm 3, faster) or own (algorithm 2, less memory)"
            )
        if self.q_uses_ema and (self.q_samples, self.q_pass) != ("own", "in_turn"):
            raise ValueError(
                "q_uses_ema: only a pass of the VAE's own can see other weights than the prior's: use q_samples: own "
                "with q_pass: in_turn (algorithm 2)"
            )
        if self.kl_balance and (self.q_samples != "shared" or not self.train_vae):
            raise ValueError("kl_balance: implemented for q_samples: shared (algorithm 1) only")
        if self.precision == "fp16" and self.q_samples == "own":
            raise ValueError("precision: fp16 scales one loss; q_samples: own has two: use bf16")
        if self.kl_balance and self.kl_anneal is None:
            raise ValueError("kl_balance: acts while the KL coefficient is below 1: set kl_anneal too")
        return self


class SampleConfig(Section):
    """Drawing images."""

    count: Count = Field(description="number of images")
    solver: Literal["rk45", "euler", "heun", "rk4", "ancestral"] = Field(
        "rk45",
        description="probability-flow ODE: rk45 (adaptive), euler, heun, rk4 (equal steps); ancestral: the discretised "
        "diffusion",
    )
    tol: Positive = Field(1e-5, description="absolute and relative tolerance of rk45")
    time_eps: Annotated[float, Field(gt=0, lt=1)] = Field(1e-5, description="where the ODE ends")
    steps: Count | None = Field(None, description="of the other solvers; null: 50, and 1000 for ancestral")
    variances: Literal["beta", "posterior"] = Field("beta", description="of the steps of ancestral sampling")
    temperature: Positive = Field(1.0, description="factor of every normal draw")
    vae_batch_statistics: bool = Field(
        False, description="the decoder's batch norm takes the statistics of the batch, as the paper's 256-pixel models"
    )
    compile: bool = Field(False, description="compile the score network: for tens of thousands of images")
    give_up: GiveUp = Field("fail", description=f"where the ODE cannot be solved. {RECORDED}")
    batch: Count = 128
    seed: int = 1


class NELBOConfig(Section):
    """NELBO on test images."""

    images: Count | None = Field(
        description="number of test images for the NELBO, a random subset of the set; null: all of them"
    )
    estimator: Estimator = Field(
        "ode", description="log p(z0) by the probability-flow ODE, or bounded by the discretised diffusion"
    )
    further_estimators: list[Estimator] = Field([], description="reported beside that of `estimator`")
    tol: Positive = Field(1e-5, description="absolute and relative tolerance of the ODE's solver")
    time_eps: Annotated[float, Field(gt=0, lt=1)] = Field(1e-5, description="where the ODE starts")
    probe: Literal["gaussian", "rademacher", "exact"] = Field(
        "rademacher", description="Hutchinson probes of the ODE's trace; exact: a backward pass per latent dimension"
    )
    probes: Count = Field(1, description="number of probes per image")
    steps: Count = Field(1000, description="of the discretised diffusion")
    iw_samples: Count = Field(
        1,
        description="encoder samples per image; above 1 the importance-weighted bound is reported too (noise of the "
        "probes makes it a little too low)",
    )
    give_up: GiveUp = Field("fail", description=f"where the ODE cannot be solved. {RECORDED}")
    batch: Count = 128
    seed: int = 1

    @model_validator(mode="after")
    def _each_estimator_once(self) -> NELBOConfig:
        if len({self.estimator, *self.further_estimators}) <= len(self.further_estimators):
            raise ValueError(
                f"further_estimators: {self.further_estimators} with estimator: {self.estimator} names one twice"
            )
        return self


class EvaluateConfig(NELBOConfig):
    """NELBO on test images; FID (or the Fréchet distance of other features), KID, precision and recall of samples."""

    extractor: ExtractorName | None = Field(
        description="whose features samples are compared with the training images by: inception (FID, as published; "
        "its weights are downloaded), efficientnet_lite0 (trained on ImageNet, weights from a package), "
        "mnist_classifier (weights in this repository); null: they are not compared"
    )
    cross_check: bool = Field(False, description="the FID by clean-fid too, from its own weights and resizing")

    @model_validator(mode="after")
    def _the_cross_check_has_something_to_check(self) -> EvaluateConfig:
        if self.cross_check and self.extractor != "inception":
            raise ValueError(f"cross_check: compares two FIDs, which need extractor: inception, not {self.extractor}")
        return self

    @property
    def extractors(self) -> list[str]:
        """Those whose statistics of the training images the evaluation needs."""
        found: list[str] = [self.extractor] if self.extractor is not None else []
        return found + ["clean_fid"] * self.cross_check


class JobConfig(Section):
    """What a job asks the cluster for. It changes where and how fast the job runs, and is no part of what it reads."""

    nodes: Count = 1
    gpus: Annotated[int, Field(ge=0)] = Field(0, description="on each node; a training runs one process on each")
    cpus: Count = Field(2, description="for each process: one on each GPU, or one on each node without GPUs")
    mem_gb: Positive = Field(8, description="main memory on each node")
    hours: Positive = Field(24, description="time limit; a training that needs longer goes on in another job")


class EvaluateJobConfig(JobConfig):
    """What the jobs of an evaluation ask for, each of them."""

    jobs: Count = Field(1, description="that share the test images of the NELBO; the result is the same for any number")


class ResourcesConfig(Section):
    """The jobs of a model."""

    pretrain: JobConfig = JobConfig()
    train: JobConfig = JobConfig()
    sample: JobConfig = JobConfig(hours=4)
    evaluate: EvaluateJobConfig = EvaluateJobConfig(hours=12)

    @model_validator(mode="after")
    def _one_process_uses_one_gpu(self) -> ResourcesConfig:
        for stage, job in (("sample", self.sample), ("evaluate", self.evaluate)):
            if job.nodes > 1 or job.gpus > 1:
                raise ValueError(f"{stage}: is one process, which uses one node and at most one GPU")
        return self


class ModelConfig(Section):
    """One model: everything from the dataset's name to the evaluation.

    Its VAE is pretrained (``vae`` and ``pretrain``), or that of another model after its end-to-end training
    (``vae_of``).
    """

    dataset: Name
    vae: AnyVAEConfig | None = None
    pretrain: PretrainConfig | None = None
    vae_of: Name | None = Field(None, description="the model whose trained VAE this one starts from, in place of vae")
    prior: PriorConfig
    sde: SDEConfig
    train: TrainConfig
    sample: SampleConfig
    evaluate: EvaluateConfig
    resources: ResourcesConfig = ResourcesConfig()

    @model_validator(mode="after")
    def _has_one_vae(self) -> ModelConfig:
        given = [key for key in ("vae", "pretrain", "vae_of") if getattr(self, key) is not None]
        if given not in (["vae", "pretrain"], ["vae_of"]):
            raise ValueError(
                "a model has either vae and pretrain, or vae_of (the name of another model); this one has "
                f"{' and '.join(given) or 'none of them'}"
            )
        return self

    @model_validator(mode="after")
    def _discretised_diffusions_preserve_variance(self) -> ModelConfig:
        if self.sde.name in ("sub_vpsde", "vesde"):
            values = [("sample.solver", self.sample.solver), ("evaluate.estimator", self.evaluate.estimator)]
            values += [("evaluate.further_estimators", value) for value in self.evaluate.further_estimators]
            for key, value in values:
                if value in ("ancestral", "discretised"):
                    raise ValueError(f"{key}: {value!r} needs sde.name vpsde or geometric_vpsde, not {self.sde.name!r}")
        return self


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
            known = _dotted_keys(_backbone(raw.get("vae") or {}))
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
            key = _dotted(problem["loc"])[0]
            setters = [place for k, place in origin.items() if f"{key}.".startswith(f"{k}.")]
            place = setters[-1] if setters else next(iter(places))
            raise ValueError(_explain(ModelConfig, problem, place))
    reasons = (f"{_dotted(p['loc'])[0]}: {p['msg']}".replace("Value error, ", "").removeprefix(": ") for p in problems)
    return None, " and ".join(reason.partition("; ")[0] for reason in reasons)


class StageConfig(Section):
    """What one job reads. ``code`` is the fingerprint of the code that the workflow ran it with."""

    stage: Stage
    code: str | None = None


class PrepareStage(StageConfig):
    stage: Literal["prepare"] = "prepare"
    dataset: Name
    source: DatasetConfig


class StatisticsStage(StageConfig):
    stage: Literal["statistics"] = "statistics"
    dataset: Name
    extractor: ExtractorName | Literal["clean_fid"]


class PretrainStage(StageConfig):
    stage: Literal["pretrain"] = "pretrain"
    model: Name
    dataset: Name
    vae: AnyVAEConfig
    pretrain: PretrainConfig


class TrainStage(StageConfig):
    stage: Literal["train"] = "train"
    model: Name
    dataset: Name
    vae_of: Name | None = None
    prior: PriorConfig
    sde: SDEConfig
    train: TrainConfig


class SampleStage(StageConfig):
    stage: Literal["sample"] = "sample"
    model: Name
    sample: SampleConfig


class IllustrateStage(StageConfig):
    stage: Literal["illustrate"] = "illustrate"
    model: Name
    dataset: Name
    sample: SampleConfig


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
    """A cell as the tables know it; the rest is in its metrics.json."""

    name: Name
    labels: dict[str, str]
    seed: int
    invalid: str | None = None


class TabulateStage(StageConfig):
    """A table and a figure: of the models of `run`, or of an ablation."""

    stage: Literal["tabulate"] = "tabulate"
    name: Name
    models: list[Name]
    title: str = ""
    note: str = ""
    axes: dict[str, list[str]] = {}
    columns: list[str] = []
    against: list[Literal["nelbo", "nfe", "seconds"]] = []
    cells: list[GridCell] = []


class Params(Section):
    """``params.yaml``: the one place for every parameter."""

    run: Annotated[list[Name], Field(min_length=1)] = Field(
        description="what a plain `snakemake` makes: models, and ablations beside them"
    )
    datasets: dict[Name, DatasetConfig] = Field(description="the known ones, and your own: any name with `images`")
    models: dict[Name, ModelConfig]
    ablations: dict[Name, AblationConfig] = {}

    @model_validator(mode="after")
    def _names_exist(self) -> Params:
        for name in self.run:
            if name not in self.models and name not in self.ablations:
                ablations = f", the ablations {', '.join(self.ablations)}" if self.ablations else ""
                raise ValueError(f"run: there is no model {name!r}; the models are {', '.join(self.models)}{ablations}")
        if not self.compared:
            raise ValueError(f"run: name a model too; an ablation alone is made by `snakemake {self.run[0]}`")
        for name, dataset in self.datasets.items():
            known = name in DATASET_NAMES
            if known and dataset.images is not None:
                raise ValueError(
                    f"datasets.{name}.images: how this dataset is read is known; for another way give it another name"
                )
            if not known and dataset.images is None:
                close = difflib.get_close_matches(name, DATASET_NAMES, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"the known datasets are {', '.join(DATASET_NAMES)}"
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


def load_params(path: str | Path) -> Params:
    """Read and check ``params.yaml``; raises :class:`ConfigError` with the path of each wrong key."""
    try:
        raw = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: is not valid YAML: {error}") from None
    return parse(Params, raw, path)


def load_stage(kind: type[S], path: str | Path) -> S:
    """Read a frozen configuration; raises :class:`ConfigError`."""
    try:
        raw = json.loads(Path(path).read_text())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: is not valid JSON: {error}") from None
    return parse(kind, raw, path)


def parse(kind: type[S], raw: Any, where: str | Path) -> S:
    """Check ``raw`` (as read from the file ``where``) against ``kind``; raises :class:`ConfigError`."""
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(kind, item, where) for item in error.errors())) from None


def _explain(kind: type[Section], error: Any, where: str | Path) -> str:
    """One line for one mistake: file, path of the key, what was expected, what stands there."""
    path, backbone = _dotted(error["loc"])
    loc = path.split(".") if path else []
    key = path or "the whole file"
    if error["type"] == "extra_forbidden":
        known = _keys_at(kind, loc[:-1], backbone)
        close = difflib.get_close_matches(loc[-1], known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"the keys here are {', '.join(known)}"
        return f"{where}: {key}: unknown key (its value is {error['input']!r}); {hint}"
    if error["type"] == "union_tag_invalid":
        return f"{where}: {key}.backbone: expected {' or '.join(map(repr, BACKBONES))}, found {error['ctx']['tag']!r}"
    if error["type"] == "missing":
        return f"{where}: {key}: missing, a value is required here"
    message = error["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    if error["type"] == "value_error":
        return f"{where}: {key}: {message}"
    return f"{where}: {key}: expected {message}, found {error['input']!r}"


def _dotted(loc: tuple[int | str, ...]) -> tuple[str, str]:
    """The key of a mistake as one writes it, and the backbone of the VAE that it is in."""
    parts = [str(part) for part in loc if part != "[key]"]
    backbone = next((tag for before, tag in itertools.pairwise(parts) if before == "vae" and tag in BACKBONES), "nvae")
    return ".".join(p for i, p in enumerate(parts) if not (i and parts[i - 1] == "vae" and p == backbone)), backbone


@functools.cache
def _dotted_keys(backbone: str) -> list[str]:
    """All settings of a model."""

    def below(path: list[str]) -> Iterator[str]:
        for key in _keys_at(ModelConfig, path, backbone):
            yield ".".join([*path, key])
            yield from below([*path, key])

    return list(below([]))


def _keys_at(kind: Any, path: list[str], backbone: str) -> list[str]:
    """The keys that the configuration has at ``path``."""
    for part in path:
        if kind is ModelConfig and part == "vae":
            kind = BACKBONES[backbone]
            continue
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            kind = kind.model_fields[part].annotation
        elif get_args(kind):  # dict[str, Section]: every key leads to the same section
            kind = get_args(kind)[-1]
        sections = [k for k in get_args(kind) if isinstance(k, type) and issubclass(k, BaseModel)]
        if type(None) in get_args(kind) and sections:
            kind = sections[0]
    return list(kind.model_fields) if isinstance(kind, type) and issubclass(kind, BaseModel) else []


def json_schema() -> str:
    """The JSON schema of ``params.yaml`` (kept in ``workflow/schemas``; `python -m lsgm.config` prints it)."""
    return json.dumps(Params.model_json_schema(), indent=2) + "\n"


if __name__ == "__main__":
    print(json_schema(), end="")
