"""Training: schedules, handling of divergence, and the two stages (LSGM, appendix G)."""

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
    """Handling of divergence. Steps with a non-finite loss or gradient, or an exploding gradient, are skipped."""

    renamed: ClassVar[Mapping[str, Renamed]] = {
        "bad_steps": Renamed("skip_limit"),
        "tries": Renamed("max_restarts"),
        "explosion": Renamed("explosion_factor"),
        "give_up": Renamed("on_failure", {"fail": "error", "record": "keep_last"}),
    }

    skip_limit: Few = Field(
        10, description="number of consecutive skipped steps after which training restarts from its last saved state"
    )
    max_restarts: Annotated[int, Number, Field(ge=0, le=100)] = Field(
        3, description="number of restarts allowed; training fails when it would need another"
    )
    lr_factor: Share = Field(0.5, description="factor applied to the learning rates at each restart")
    spectral_factor: Annotated[Positive, Field(ge=1, le=1000)] = Field(
        2.0, description="factor applied to the weight of the spectral regularization at each restart"
    )
    explosion_factor: Annotated[Positive, Field(gt=1)] = Field(
        1e4,
        description="a gradient counts as exploding if its norm exceeds this many times the median of the last 100 "
        "norms",
    )
    on_failure: Literal["error", "keep_last"] = Field(
        "error",
        description="what happens after the last restart. keep_last: training ends with its last good state, and "
        "metrics.json and the tables say at which step it diverged; for grids, whose other cells are made all the same",
    )


class ScheduleConfig(Section):
    """The length of a training stage, its learning-rate schedule, and how it is executed."""

    renamed: ClassVar[Mapping[str, Renamed]] = {
        "recompute": Renamed("activation_checkpointing"),
        "state_minutes": Renamed("checkpoint_minutes"),
        "look_epochs": Renamed("eval_every_epochs"),
        "look_images": Renamed("eval_images"),
        "rescue": Renamed("divergence"),
    }

    epochs: Epochs = Field(description="number of passes over the training set; fractions are allowed")
    batch: Batch = Field(description="number of images per training step, over all processes")
    warmup_epochs: Annotated[NonNegative, Field(le=1e6)] = Field(
        5.0, description="number of epochs of linear learning-rate warm-up"
    )
    lr_schedule: Literal["epoch", "iteration"] = Field(
        "epoch",
        description="when the cosine learning-rate schedule advances: once per epoch, as published, or at every step",
    )
    activation_checkpointing: bool = Field(
        False,
        description="keep only the inputs of the blocks of VAE and score network, and recompute the activations "
        "inside them in the backward pass: less memory, more time",
    )
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = Field(
        "fp32", description="precision of matrix products and convolutions; fp16 uses loss scaling"
    )
    compile: bool = Field(
        False, description="compile the networks: takes minutes at the start, pays off in long training runs"
    )
    accumulate: Few = Field(
        1,
        description="number of parts into which a process splits its share of a batch (gradient accumulation); batch "
        "norm and KL balancing use the statistics of one part",
    )
    grad_clip: NonNegative = Field(0.0, description="maximum norm of the gradient; 0: no clipping")
    checkpoint_minutes: Positive = Field(10.0, description="minutes between saved training states")
    eval_every_epochs: NonNegative = Field(
        0.0,
        description="epochs between validations during training, whose NELBO of test images, NFE and samples appear "
        "in the history and in TensorBoard; 0: no validation",
    )
    eval_images: Count = Field(
        36, description="number of test images, and of samples, in each validation during training"
    )
    divergence: DivergenceConfig = DivergenceConfig()
    seed: Seed = Field(1, description="seed of all random numbers of this training stage")


class PretrainConfig(ScheduleConfig):
    """First stage: the VAE with the prior N(0, I)."""

    lr: Positive = Field(1e-2, description="learning rate after the warm-up")
    lr_min: NonNegative = Field(1e-4, description="learning rate at the end of the cosine schedule")
    adam_eps: Positive = Field(1e-3, description="epsilon of the Adamax optimizer")
    weight_decay: NonNegative = Field(3e-4, description="weight decay")
    kl_const_portion: Fraction = Field(
        1e-4, description="fraction of the training steps for which the KL coefficient stays at kl_const_coeff"
    )
    kl_const_coeff: Fraction = Field(1e-4, description="initial value of the KL coefficient beta")
    kl_anneal_portion: Fraction = Field(
        description="fraction of the training steps over which the KL coefficient rises"
    )
    kl_max_coeff: Positive = Field(description="final value of the KL coefficient beta")
    spectral_reg: NonNegative = Field(description="weight of the spectral regularization")


class KLAnnealConfig(Section):
    """Linear annealing of the KL coefficient over the beginning of the second stage."""

    start: Fraction = Field(0.7, description="initial value of the KL coefficient")
    end: Positive = Field(1.0, description="final value of the KL coefficient")
    portion: Share = Field(0.1, description="fraction of the training steps over which the KL coefficient is annealed")


class TrainConfig(ScheduleConfig):
    """Second stage: VAE and score prior, end to end (LSGM, appendix G.6)."""

    renamed: ClassVar[Mapping[str, Renamed]] = {
        **ScheduleConfig.renamed,
        "draws": Renamed("time_samples"),
        "q_samples": Renamed("algorithm", {"shared": 1, "own": 2, "reweighted": 3}),
    }

    p_weighting: Literal["ll", "un", "re", "rescale"] = Field(
        "ll",
        description="weighting over t in the prior's loss (section 3.4); the VAE's loss always uses the likelihood "
        "weighting ll",
    )
    p_sampling: Literal["importance", "uniform"] = Field(
        "importance", description="how t is drawn for the prior's loss"
    )
    algorithm: Annotated[Literal[1, 2, 3], Number] = Field(
        1,
        description="training algorithm of appendix G.6. 1: one loss trains VAE and prior (only with p_weighting: "
        "ll); 2: the VAE's loss uses its own samples of t; 3: the VAE's loss reuses the prior's samples of t, "
        "reweighted to ll",
    )
    q_sampling: Literal["importance", "uniform"] = Field(
        "importance", description="algorithm 2: how t is drawn for the VAE's loss"
    )
    q_pass: Literal["in_turn", "joint"] = Field(
        "in_turn",
        description="algorithm 2: whether the samples of the VAE's and the prior's loss go through the score network "
        "one after the other (less memory and work) or jointly in one batch of twice the size (fewer kernel launches)",
    )
    q_uses_ema: bool = Field(
        False, description="algorithm 2 with q_pass: in_turn: the VAE's loss uses the averaged weights of the prior"
    )
    train_vae: bool = Field(
        True, description="train VAE and prior together; false: the VAE is frozen (two-stage ablation)"
    )
    time_samples: Few = Field(
        1, description="number of samples of (t, noise) per image and step, which estimate the cross entropy"
    )
    cross_entropy: Literal["marginal", "control_variate", "sampled"] = Field(
        "control_variate",
        description="how the cross entropy is estimated, always with the same mean. sampled: all of it from samples, "
        "as in the paper; control_variate: its part for the prior N(0, I) is computed exactly and only the rest from "
        "samples, which is less noisy; marginal: in addition the last latent group is integrated out instead of "
        "drawn, which also makes the prior's gradient less noisy",
    )
    stratified_t: bool = Field(
        True,
        description="spread the samples of t evenly over the images of a batch; false: independent samples, as in the "
        "paper",
    )
    lr_vae: Positive = Field(1e-4, description="learning rate of the VAE after the warm-up")
    lr_min_vae: NonNegative = Field(1e-5, description="learning rate of the VAE at the end of the cosine schedule")
    lr_prior: Positive = Field(1e-4, description="learning rate of the prior after the warm-up")
    lr_min_prior: NonNegative = Field(1e-4, description="learning rate of the prior at the end of the cosine schedule")
    adam_eps_vae: Positive = Field(1e-3, description="epsilon of the VAE's AdamW optimizer")
    adam_eps_prior: Positive = Field(1e-4, description="epsilon of the prior's AdamW optimizer")
    weight_decay: NonNegative = Field(3e-4, description="weight decay of VAE and prior")
    ema: BelowOne = Field(0.9999, description="decay of the exponential moving average of the prior's weights")
    ema_vae: BelowOne | None = Field(
        None,
        description="decay of the moving average of the VAE's weights, which the trained model then has; null: it has "
        "those of the last step, as in the paper",
    )
    kl_anneal: KLAnnealConfig | None = Field(
        None, description="annealing of the KL coefficient; null: the coefficient is 1 throughout"
    )
    kl_balance: bool = Field(
        False,
        description="algorithm 1: balance the KLs of the latent groups while they are annealed, as in the first stage",
    )
    spectral_reg_vae: NonNegative = Field(1e-2, description="weight of the VAE's spectral regularization")
    spectral_reg_prior: NonNegative = Field(0.0, description="weight of the prior's spectral regularization")
    spectral_reg_prior_convs: bool = Field(
        True, description="apply spectral_reg_prior to convolutions and norm layers; false: to norm layers only"
    )

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
                "q_uses_ema: needs a separate pass of the VAE's samples through the score network: use algorithm: 2 "
                "with q_pass: in_turn"
            )
        if self.kl_balance and (self.algorithm != 1 or not self.train_vae):
            raise ValueError("kl_balance: implemented for algorithm: 1 only")
        if self.precision == "fp16" and self.algorithm == 2:
            raise ValueError("precision: fp16 scales a single loss, but algorithm: 2 has two; use bf16")
        if self.kl_balance and self.kl_anneal is None:
            raise ValueError("kl_balance: has an effect only while the KL coefficient is below 1; set kl_anneal too")
        return self
