"""Every parameter of the project, typed, with its check and its error message.

``params.yaml`` as a whole is :class:`lsgm.params.Params`. A job never reads it: it reads a *frozen* configuration, one
of the stages below, a small JSON file that holds exactly the sections this stage depends on, so that an edit made while
a job waits in a queue cannot change what it does.

This module imports no torch: the workflow reads it at parse time.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, field_validator, model_validator

from lsgm.config.bounds import (
    SMALLEST,
    Batch,
    BelowOne,
    Channels,
    Count,
    Epochs,
    Few,
    Finite,
    Fraction,
    Layers,
    Multiple,
    Name,
    NonNegative,
    Number,
    Pixels,
    Positive,
    Seed,
    Share,
    TimeEps,
    Tolerance,
)
from lsgm.errors import LSGMError
from lsgm.files import read_json
from lsgm.config.mistakes import explain, shown

GEOMETRIC_SIGMA2_MAX = 0.999
MISTAKES = 20  # that are explained at once

LikelihoodName = Literal["bernoulli", "dml", "dl", "normal"]
Stage = Literal["prepare", "statistics", "pretrain", "train", "sample", "nelbo", "evaluate", "illustrate", "tabulate"]
STAGES: tuple[Stage, ...] = get_args(Stage)
Estimator = Literal["ode", "discretized"]
ExtractorName = Literal["inception", "efficientnet_lite0", "mnist_classifier"]

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

    size: Pixels = Field(description="height and width of the stored images")
    channels: Annotated[Literal[1, 3], Number] = Field(3, description="3: RGB; 1: gray")
    crop: Pixels | None = Field(
        None, description="side of the centered square that is resized to `size`; null: the largest"
    )
    split: Annotated[BelowOne, Field(gt=0)] | None = Field(
        0.1, description="share of the images that are the test set, drawn at random; null: folders train and test"
    )
    seed: Seed = Field(0, description="of that draw")
    binary: bool = Field(False, description="pixels are drawn from Bernoulli(intensity) each time an image is seen")

    @model_validator(mode="after")
    def _binary_images_are_gray(self) -> ImagesConfig:
        if self.binary and self.channels != 1:
            raise ValueError(f"binary: true is for gray images, channels: 1, not {self.channels}")
        return self


class DatasetConfig(Section):
    """Where a dataset comes from; of the user's own also what it is."""

    path: str | None = Field(
        None,
        description="folder or file with the originals (the README says which), or with {split}_images.npy; null: "
        "download them, where that is possible",
    )
    images: ImagesConfig | None = Field(None, description="of a set of your own: images in a folder, zip or LMDB")

    @field_validator("path")
    @classmethod
    def _can_be_a_path(cls, path: str | None) -> str | None:
        if path is None:
            return None
        way_out = "expected a folder or file, or null to download the dataset"
        if not path.strip():
            raise ValueError(f"is empty; {way_out}")
        if "\0" in path or len(path) > 4095 or any(len(part.encode()) > 255 for part in path.split("/")):
            reason = "holds a NUL character" if "\0" in path else "is longer than a path may be"
            raise ValueError(f"{reason}: {shown(path)}; {way_out}")
        try:
            Path(path).expanduser()
        except RuntimeError:
            user = path.partition("/")[0]
            raise ValueError(
                f"{user}: there is no such user; write the whole path, or ./{user} for a folder of this name"
            ) from None
        return path


class ImageConfig(Section):
    """The images that a model works on; follows from the dataset."""

    channels: Channels
    size: Pixels = Field(description="height and width of an image, as it is generated and evaluated")
    padded_size: Pixels = Field(description="height and width as the network sees it, the border filled with zeros")
    binary: bool = Field(description="pixels are drawn from Bernoulli(intensity) each time an image is seen")


class BlocksConfig(Section):
    """A chain of down- or up-sampling blocks."""

    blocks: Layers = Field(description="number of blocks, each halves (doubles) the resolution")
    cells: Layers = Field(description="residual cells in a block")


class BackboneConfig(Section):
    """What all VAEs have."""

    likelihood: LikelihoodName = Field(
        "bernoulli",
        description="bernoulli; dml: mixture of ten discretized logistics; dl: one discretized logistic; normal",
    )
    x_bits: Annotated[int, Number, Field(ge=1, le=8)] = Field(
        8, description="bits per value; the lower ones are dropped"
    )
    log_sigma_clamp: Annotated[Positive, Field(le=80)] = Field(
        5.0, description="soft clamp of the posterior's log sigma"
    )


class VAEConfig(BackboneConfig):
    """The NVAE (arXiv 2007.03898)."""

    backbone: Literal["nvae"] = "nvae"
    arch: Literal["res_bnswish", "res_mbconv"] = Field(description="cells of the decoder")
    channels: Channels = Field(description="channels after the stem, times channel_mult[0]")
    channel_mult: list[Multiple] = Field(
        description="channels of the stem, after each pre-process block and of each smaller scale of latents, in "
        "multiples of `channels`"
    )
    latent_scales: Layers = Field(1, description="resolutions with latents; the prior covers the smallest")
    groups_per_scale: Layers = Field(description="latent groups of each scale")
    latents_per_group: Channels = Field(description="latent channels of a group")
    cells_per_cond: Layers = Field(description="cells of a group, in the encoder and in the decoder")
    preprocess: BlocksConfig
    postprocess: BlocksConfig
    use_se: bool = Field(True, description="squeeze-and-excitation at the end of every cell")
    num_nf: Annotated[int, Number, Field(ge=0, le=100)] = Field(
        0, description="pairs of normalizing flow steps per group"
    )
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
    channels: Channels = Field(description="channels at full resolution, times channel_mult[0]")
    channel_mult: Annotated[list[Multiple], Field(min_length=2)] = Field(
        description="channels at each resolution, in multiples of `channels`"
    )
    latents: Channels = Field(description="latent channels")


def backbone_of(vae: Any) -> str:
    return str(vae.get("backbone", "nvae") if isinstance(vae, dict) else getattr(vae, "backbone", "nvae"))


BackboneConfig = Annotated[
    Annotated[VAEConfig, Tag("nvae")] | Annotated[ConvVAEConfig, Tag("conv")], Discriminator(backbone_of)
]


class DivergenceConfig(Section):
    """What happens to steps whose loss or gradient is not finite, or whose gradient explodes: they are left out."""

    bad_steps: Few = Field(10, description="so many in a row, and the training goes back to its last state")
    tries: Annotated[int, Number, Field(ge=0, le=100)] = Field(3, description="times it goes back before it gives up")
    lr_factor: Share = Field(0.5, description="of the learning rates, each time")
    spectral_factor: Annotated[Positive, Field(ge=1, le=1000)] = Field(
        2.0, description="of the spectral regularization, each time"
    )
    explosion: Annotated[Positive, Field(gt=1)] = Field(
        1e4, description="a gradient so many times the median norm of the last hundred counts as bad"
    )
    give_up: GiveUp = Field(
        "fail",
        description="after the tries. record: the training ends with its last good state, and metrics.json and tables "
        "say at which step it diverged; for grids, whose other cells go on",
    )


class ScheduleConfig(Section):
    """Length of a training stage, its learning-rate schedule, and how it is run."""

    epochs: Epochs = Field(description="passes over the training set; fractions are allowed")
    batch: Batch = Field(description="images per step")
    warmup_epochs: Annotated[NonNegative, Field(le=1e6)] = Field(
        5.0, description="linear warm-up of the learning rates"
    )
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
    accumulate: Few = Field(
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
    rescue: DivergenceConfig = DivergenceConfig()
    seed: Seed = 1


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
    spectral_reg: NonNegative = Field(description="weight of the spectral regularization")


class DropInactiveConfig(Section):
    """Which latents the encoder does not use, and so are left to N(0, I)."""

    threshold: NonNegative = Field(0.1, description="channels with a KL to N(0, I) of at most so many nats are dropped")
    batches: Count = Field(1000, description="training batches that the KL is averaged over, before the second stage")


class PriorConfig(Section):
    """The NCSN++ score network and the mixed score (arXiv 2011.13456; LSGM, section 3.2)."""

    channels: Annotated[Channels, Field(ge=4)] = Field(description="width of the network")
    scales: Annotated[int, Number, Field(ge=1, le=5)] = Field(description="resolutions")
    cells_per_scale: Layers = Field(description="residual blocks at each resolution")
    fir: bool = Field(False, description="resample with the FIR kernel [1,3,3,1] (false: nearest and average)")
    dropout: BelowOne = 0.2
    embedding: Literal["positional", "fourier"] = Field("positional", description="of t; fourier: random frequencies")
    embedding_dim: Annotated[Channels, Field(ge=4, multiple_of=2)] = 128
    embedding_scale: Positive = 1000.0
    attention_resolution: Pixels = Field(16, description="attention where the feature map has this size")
    mixed_prediction: bool = Field(True, description="mix with the score of N(0, I); false: the score network alone")
    mixing_logit_init: Annotated[Finite, Field(ge=-1000, le=1000)] = Field(
        description="logit of the score network's share alpha at the start"
    )
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
    beta_end: Annotated[Positive, Field(ge=1e-6)] = Field(20.0, description="vpsde, sub_vpsde: beta at t = 1")
    sigma2_min: Annotated[Positive, Field(ge=SMALLEST)] = Field(
        3e-5, description="geometric_vpsde, vesde: where the geometric progression starts"
    )
    sigma2_max: Positive | None = Field(
        None,
        description="geometric_vpsde: variance at t = 1 (null: 0.999); vesde: variance at t = 1 (null: the largest "
        "squared distance of two encodings, found when training starts)",
    )
    sigma2_0: BelowOne | None = Field(
        None, description="variance at t = 0; null: 0, or sigma2_min for geometric_vpsde; vesde: always sigma2_min"
    )
    time_eps: BelowOne = Field(0.01, description="training draws t from [time_eps, 1]")

    @model_validator(mode="after")
    def _can_be_used(self) -> SDEConfig:
        geometric = self.name in ("geometric_vpsde", "vesde")
        starts_at = self.sigma2_0 if self.sigma2_0 is not None and self.name != "vesde" else float(geometric)
        if max(self.time_eps, starts_at) < SMALLEST:
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
    portion: Share = Field(0.1, description="share of the iterations it takes")


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
    draws: Few = Field(1, description="draws of (t, noise) per image and step for the cross entropy")
    lr_vae: Positive = 1e-4
    lr_min_vae: NonNegative = 1e-5
    lr_prior: Positive = 1e-4
    lr_min_prior: NonNegative = 1e-4
    adam_eps_vae: Positive = 1e-3
    adam_eps_prior: Positive = 1e-4
    weight_decay: NonNegative = 3e-4
    ema: BelowOne = Field(0.9999, description="decay of the average of the prior's weights")
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
        description="probability-flow ODE: rk45 (adaptive), euler, heun, rk4 (equal steps); ancestral: the discretized "
        "diffusion",
    )
    tol: Tolerance = Field(1e-5, description="absolute and relative tolerance of rk45")
    time_eps: TimeEps = Field(1e-5, description="where the ODE ends")
    steps: Count | None = Field(None, description="of the other solvers; null: 50, and 1000 for ancestral")
    variances: Literal["beta", "posterior"] = Field("beta", description="of the steps of ancestral sampling")
    temperature: Annotated[Positive, Field(le=1000)] = Field(1.0, description="factor of every normal draw")
    vae_batch_statistics: bool = Field(
        False, description="the decoder's batch norm takes the statistics of the batch, as the paper's 256-pixel models"
    )
    compile: bool = Field(False, description="compile the score network: for tens of thousands of images")
    give_up: GiveUp = Field("fail", description=f"where the ODE cannot be solved. {RECORDED}")
    batch: Batch = 128
    seed: Seed = 1


class NELBOConfig(Section):
    """NELBO on test images."""

    images: Count | None = Field(
        description="number of test images for the NELBO, a random subset of the set; null: all of them"
    )
    estimator: Estimator = Field(
        "ode", description="log p(z0) by the probability-flow ODE, or bounded by the discretized diffusion"
    )
    further_estimators: list[Estimator] = Field([], description="reported beside that of `estimator`")
    tol: Tolerance = Field(1e-5, description="absolute and relative tolerance of the ODE's solver")
    time_eps: TimeEps = Field(1e-5, description="where the ODE starts")
    probe: Literal["gaussian", "rademacher", "exact"] = Field(
        "rademacher", description="Hutchinson probes of the ODE's trace; exact: a backward pass per latent dimension"
    )
    probes: Few = Field(1, description="number of probes per image")
    steps: Count = Field(1000, description="of the discretized diffusion")
    iw_samples: Few = Field(
        1,
        description="encoder samples per image; above 1 the importance-weighted bound is reported too (noise of the "
        "probes makes it a little too low)",
    )
    give_up: GiveUp = Field("fail", description=f"where the ODE cannot be solved. {RECORDED}")
    batch: Batch = 128
    seed: Seed = 1

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

    nodes: Few = 1
    gpus: Annotated[int, Number, Field(ge=0, le=1024)] = Field(
        0, description="on each node; a training runs one process on each"
    )
    cpus: Few = Field(2, description="for each process: one on each GPU, or one on each node without GPUs")
    mem_gb: Annotated[Positive, Field(le=1e6)] = Field(8, description="main memory on each node")
    hours: Annotated[Positive, Field(le=1e5)] = Field(
        24, description="time limit; a training that needs longer goes on in another job"
    )


class EvaluateJobConfig(JobConfig):
    """What the jobs of an evaluation ask for, each of them."""

    jobs: Few = Field(1, description="that share the test images of the NELBO; the result is the same for any number")


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
    vae: BackboneConfig | None = None
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
    def _discretized_diffusions_preserve_variance(self) -> ModelConfig:
        if self.sde.name in ("sub_vpsde", "vesde"):
            values = [("sample.solver", self.sample.solver), ("evaluate.estimator", self.evaluate.estimator)]
            values += [("evaluate.further_estimators", value) for value in self.evaluate.further_estimators]
            for key, value in values:
                if value in ("ancestral", "discretized"):
                    raise ValueError(f"{key}: {value!r} needs sde.name vpsde or geometric_vpsde, not {self.sde.name!r}")
        return self


class StageConfig(Section):
    """What one job reads. ``code`` is the fingerprint of the code that the workflow ran it with."""

    stage: Stage
    code: str | None = None


class PrepareStage(StageConfig):
    stage: Literal["prepare"] = "prepare"
    dataset: Name
    source: DatasetConfig
    originals: str | None = Field(None, description="names, sizes and times of the files at source.path, as one hash")


class StatisticsStage(StageConfig):
    stage: Literal["statistics"] = "statistics"
    dataset: Name
    extractor: ExtractorName | Literal["clean_fid"]


class PretrainStage(StageConfig):
    stage: Literal["pretrain"] = "pretrain"
    model: Name
    dataset: Name
    vae: BackboneConfig
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
    seed: Seed
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


def load_stage(kind: type[S], path: str | Path) -> S:
    """Read a frozen configuration; raises :class:`ConfigError`."""
    try:
        raw = read_json(path, "delete it, the workflow writes it again" if issubclass(kind, StageConfig) else "")
    except LSGMError as error:
        raise ConfigError(str(error)) from None
    return parse(kind, raw, path)


def parse(kind: type[S], raw: Any, where: str | Path, lines: Mapping[str, int] | None = None) -> S:
    """Check ``raw`` (as read from the file ``where``) against ``kind``; raises :class:`ConfigError`.

    The message has a line for each mistake; it ends with the line of the key in the file where ``lines`` has it.
    """
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        errors = error.errors(include_url=False)[: MISTAKES + 1]
        found = [line for item in errors for line in explain(kind, item, where, lines).splitlines()]
        if len(found) > MISTAKES:
            found[MISTAKES:] = [f"{where}: and more mistakes; correct these first"]
        raise ConfigError("\n".join(found)) from None
