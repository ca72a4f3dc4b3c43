"""Training: schedules, divergence, the two stages (LSGM, appendix G)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from lsgm.config.bounds import (
    Batch,
    BelowOne,
    Count,
    Epochs,
    Few,
    Fraction,
    NonNegative,
    Number,
    Positive,
    Seed,
    Share,
)
from lsgm.config.section import Renamed, Section


class DivergenceConfig(Section):
    """What happens to steps whose loss or gradient is not finite, or whose gradient explodes: they are skipped."""

    renamed: ClassVar[Mapping[str, Renamed]] = {
        "bad_steps": Renamed("skip_limit"),
        "tries": Renamed("max_restarts"),
        "explosion": Renamed("explosion_factor"),
        "give_up": Renamed("on_failure", {"fail": "error", "record": "keep_last"}),
    }

    skip_limit: Few = Field(
        10, description="after this many skipped steps in a row training restarts from its last state"
    )
    max_restarts: Annotated[int, Number, Field(ge=0, le=100)] = Field(
        3, description="number of restarts after which training fails"
    )
    lr_factor: Share = Field(0.5, description="factor of the learning rates at each restart")
    spectral_factor: Annotated[Positive, Field(ge=1, le=1000)] = Field(
        2.0, description="factor of the spectral regularization at each restart"
    )
    explosion_factor: Annotated[Positive, Field(gt=1)] = Field(
        1e4, description="a gradient norm this many times the median of the last hundred counts as exploded"
    )
    on_failure: Literal["error", "keep_last"] = Field(
        "error",
        description="what happens after the last restart. keep_last: training ends with its last good state, and "
        "metrics.json and the tables say at which step it diverged; for grids, whose other cells are made all the same",
    )


class ScheduleConfig(Section):
    """Length of a training stage, its learning-rate schedule, and how it is run."""

    renamed: ClassVar[Mapping[str, Renamed]] = {
        "recompute": Renamed("activation_checkpointing"),
        "state_minutes": Renamed("checkpoint_minutes"),
        "look_epochs": Renamed("eval_every_epochs"),
        "look_images": Renamed("eval_images"),
        "rescue": Renamed("divergence"),
    }

    epochs: Epochs = Field(description="passes over the training set; fractions are allowed")
    batch: Batch = Field(description="images per step")
    warmup_epochs: Annotated[NonNegative, Field(le=1e6)] = Field(
        5.0, description="linear warm-up of the learning rates"
    )
    lr_schedule: Literal["epoch", "iteration"] = Field(
        "epoch", description="when the cosine schedule advances: once per epoch, as published, or at every step"
    )
    activation_checkpointing: bool = Field(
        False,
        description="keep only the inputs of the blocks of NVAE and score network, and compute the rest again in the "
        "backward pass: less memory, more time",
    )
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = Field(
        "fp32", description="precision of matrix products and convolutions; fp16 scales the loss"
    )
    compile: bool = Field(
        False, description="compile the networks: takes minutes at first, worth it for long trainings"
    )
    accumulate: Few = Field(
        1,
        description="parts that a process splits its share of a batch into; batch norm and KL balancing see one",
    )
    grad_clip: NonNegative = Field(0.0, description="largest norm of the gradient; 0: no clipping")
    checkpoint_minutes: Positive = Field(10.0, description="minutes between two saved states of the training")
    eval_every_epochs: NonNegative = Field(
        0.0,
        description="epochs between two evaluations during training, for history and TensorBoard: NELBO of test "
        "images, NFE, samples; 0: none",
    )
    eval_images: Count = Field(36, description="number of test images, and of samples, of such an evaluation")
    divergence: DivergenceConfig = DivergenceConfig()
    seed: Seed = 1


class PretrainConfig(ScheduleConfig):
    """First stage: the VAE with the prior N(0, I)."""

    lr: Positive = 1e-2
    lr_min: NonNegative = 1e-4
    adam_eps: Positive = 1e-3
    weight_decay: NonNegative = 3e-4
    kl_const_portion: Fraction = Field(1e-4, description="fraction of the iterations at kl_const_coeff")
    kl_const_coeff: Fraction = 1e-4
    kl_anneal_portion: Fraction = Field(description="fraction of the iterations over which beta rises")
    kl_max_coeff: Positive = Field(description="final value of beta, the KL coefficient")
    spectral_reg: NonNegative = Field(description="weight of the spectral regularization")


class KLAnnealConfig(Section):
    """Linear annealing of the KL coefficient over the beginning of the second stage."""

    start: Fraction = 0.7
    end: Positive = 1.0
    portion: Share = Field(0.1, description="fraction of the iterations that the annealing takes")


class TrainConfig(ScheduleConfig):
    """Second stage: VAE and score prior, end to end (LSGM, appendix G.6)."""

    renamed: ClassVar[Mapping[str, Renamed]] = {
        **ScheduleConfig.renamed,
        "draws": Renamed("time_samples"),
        "q_samples": Renamed("algorithm", {"shared": 1, "own": 2, "reweighted": 3}),
    }

    p_weighting: Literal["ll", "un", "re", "rescale"] = Field(
        "ll", description="weighting of the prior's loss over t; the VAE's is always ll, that of the likelihood"
    )
    p_sampling: Literal["importance", "uniform"] = Field(
        "importance", description="how t is drawn for the prior's loss"
    )
    algorithm: Annotated[Literal[1, 2, 3], Number] = Field(
        1,
        description="algorithm of appendix G.6. 1: one loss trains VAE and prior (p_weighting ll only); 2: the VAE's "
        "loss draws its own t, for w_ll; 3: the VAE's loss takes the prior's t, reweighted to w_ll",
    )
    q_sampling: Literal["importance", "uniform"] = Field(
        "importance", description="algorithm 2: how t is drawn for the VAE's loss"
    )
    q_pass: Literal["in_turn", "joint"] = Field(
        "in_turn",
        description="algorithm 2: the VAE's and the prior's samples pass the score network in turn (least memory and "
        "work) or in one pass of twice the batch (fewer kernels)",
    )
    q_uses_ema: bool = Field(
        False, description="algorithm 2, in_turn: the VAE's pass uses the averaged weights of the prior"
    )
    train_vae: bool = Field(True, description="false: the VAE is frozen (two-stage ablation)")
    time_samples: Few = Field(1, description="samples of (t, noise) per image and step, for the cross entropy")
    lr_vae: Positive = 1e-4
    lr_min_vae: NonNegative = 1e-5
    lr_prior: Positive = 1e-4
    lr_min_prior: NonNegative = 1e-4
    adam_eps_vae: Positive = 1e-3
    adam_eps_prior: Positive = 1e-4
    weight_decay: NonNegative = 3e-4
    ema: BelowOne = Field(0.9999, description="decay of the exponential moving average of the prior's weights")
    kl_anneal: KLAnnealConfig | None = None
    kl_balance: bool = Field(
        False, description="balance the KLs of the groups while they are annealed, as in the first stage"
    )
    spectral_reg_vae: NonNegative = 1e-2
    spectral_reg_prior: NonNegative = 0.0
    spectral_reg_prior_convs: bool = Field(True, description="false: spectral_reg_prior acts on the norm layers only")

    @model_validator(mode="after")
    def _an_algorithm_fits(self) -> TrainConfig:
        if self.algorithm == 1 and self.p_weighting != "ll" and self.train_vae:
            raise ValueError(
                "algorithm: 1 trains the VAE with the prior's weighting, which must then be 'll', not "
                f"{self.p_weighting!r}; with p_weighting: {self.p_weighting} use algorithm: 3 (faster) or 2 (less "
                "memory)"
            )
        if self.q_uses_ema and (self.algorithm, self.q_pass) != (2, "in_turn"):
            raise ValueError(
                "q_uses_ema: the VAE can see other weights than the prior's only in a pass of its own: use algorithm: "
                "2 with q_pass: in_turn"
            )
        if self.kl_balance and (self.algorithm != 1 or not self.train_vae):
            raise ValueError("kl_balance: implemented for algorithm: 1 only")
        if self.precision == "fp16" and self.algorithm == 2:
            raise ValueError("precision: fp16 scales one loss; algorithm: 2 has two: use bf16")
        if self.kl_balance and self.kl_anneal is None:
            raise ValueError("kl_balance: acts while the KL coefficient is below 1: set kl_anneal too")
        return self
