"""The score prior: the mixed score and its network (LSGM, section 3.2)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from lsgm.config.backbones import MAX_CELLS, Shape
from lsgm.config.bounds import BelowOne, Channels, Count, Finite, Layers, NonNegative, Number, Pixels, Positive
from lsgm.config.data import ImageConfig
from lsgm.config.section import Part, Section
from lsgm.widths import width_multipliers

NORM_GROUPS = 32  # groups of the score network's group norms, at most


class DropInactiveConfig(Section):
    """How to find the latent channels that the encoder does not use; their prior stays N(0, I)."""

    threshold: NonNegative = Field(
        0.1, description="latent channels whose KL to N(0, I) is at most this many nats keep the prior N(0, I)"
    )
    batches: Count = Field(
        1000,
        description="number of training batches over which the KL of each channel is averaged before the second stage",
    )


class PriorConfig(Part):
    """The mixed score prior (LSGM, section 3.2), with any network that predicts the noise.

    To add a score network, subclass this and give `network` a new value. The implementation is a module
    (z_t [B, C, H, W], t [B]) -> predicted noise [B, C, H, W]. It is constructed with the keys of the subclass, and with
    `latent_shape` (C, H, W) and `image_size`.
    """

    not_passed = frozenset({"network", "mixed_prediction", "mixing_logit_init", "drop_inactive"})

    network: str
    mixed_prediction: bool = Field(
        True, description="mix the score network with the score of N(0, I); false: use the score network alone"
    )
    mixing_logit_init: Annotated[Finite, Field(ge=-1000, le=1000)] = Field(
        description="initial logit of the mixing coefficient alpha, the weight of the score network in the mixed score"
    )
    drop_inactive: DropInactiveConfig | None = Field(
        None, description="leave inactive latent channels to N(0, I); null: the prior covers all channels"
    )

    @model_validator(mode="after")
    def _inactive_latents_have_a_prior(self) -> Self:
        if self.drop_inactive is not None and not self.mixed_prediction:
            raise ValueError("drop_inactive: leaves channels to N(0, I), which needs mixed_prediction: true")
        return self

    def misfits(self, latent_shape: Shape, image: ImageConfig) -> Iterator[str]:
        """The reasons why the network cannot be built for these latents; each is one line and begins with its key."""
        yield from ()


class NCSNppConfig(PriorConfig):
    """The NCSN++ (arXiv 2011.13456, appendix H)."""

    implementation = "lsgm.networks.ncsnpp:NCSNpp"

    network: Literal["ncsnpp"] = "ncsnpp"

    channels: Annotated[Channels, Field(ge=4)] = Field(description="base number of channels of the score network")
    scales: Annotated[int, Number, Field(ge=1, le=5)] = Field(description="number of resolutions of the score network")
    cells_per_scale: Layers = Field(description="number of residual blocks per resolution")
    fir: bool = Field(
        False,
        description="resample with the FIR kernel [1, 3, 3, 1]; false: nearest-neighbor upsampling and average pooling",
    )
    dropout: BelowOne = Field(0.2, description="dropout probability in the residual blocks")
    embedding: Literal["positional", "fourier"] = Field(
        "positional", description="embedding of the time t. positional: fixed frequencies; fourier: random frequencies"
    )
    embedding_dim: Annotated[Channels, Field(ge=4, multiple_of=2)] = Field(
        128, description="dimension of the time embedding"
    )
    embedding_scale: Positive = Field(1000.0, description="scale of the frequencies of the time embedding")
    attention_resolution: Pixels = Field(
        16, description="resolution of the feature maps that have attention, in pixels"
    )

    def misfits(self, latent_shape: Shape, image: ImageConfig) -> Iterator[str]:
        yield from _wrong_norms(self, image)
        blocks = self.cells_per_scale * self.scales
        if blocks > MAX_CELLS:
            yield f"prior.cells_per_scale: {blocks} residual blocks for downsampling, expected at most {MAX_CELLS}"
        step, size = 2 ** (self.scales - 1), latent_shape[1]
        if size % step:
            yield f"prior.scales: {self.scales} scales need a latent size divisible by {step}, not {size}x{size}"


def _wrong_norms(prior: NCSNppConfig, image: ImageConfig) -> Iterator[str]:
    """Each group norm splits its channels into groups of at least four, with as many groups as possible up to 32."""
    multipliers = width_multipliers(prior.scales, image.padded_size)

    def bad(channels: int) -> int | None:
        widths = _normalized(channels, multipliers)
        return next((w for w in widths if w < 4 or w % min(w // 4, NORM_GROUPS)), None)

    width = bad(prior.channels)
    if width is not None:
        wider = next(c for c in range(prior.channels + 1, prior.channels + 2 * 4 * NORM_GROUPS + 1) if bad(c) is None)
        lower = next((c for c in range(prior.channels - 1, 3, -1) if bad(c) is None), None)
        groups = f"{width} channels do not split evenly into {min(width // 4, NORM_GROUPS)} groups"
        reason = "a group norm needs at least 4 channels" if width < 4 else groups
        nearest = f"{lower} or {wider}" if lower is not None else f"{wider}"
        yield f"prior.channels: expected {nearest} or another number that group norm can split, found " \
              f"{prior.channels} ({reason})"  # fmt: skip


def _normalized(channels: int, multipliers: tuple[int, ...]) -> list[int]:
    """The channel counts of the score network's group norms: those of each level, and those after a skip is joined."""
    widths = [channels * m for m in multipliers]
    found = set(widths)
    # In the upsampling path a level's blocks get skips of its own width; the last one gets that of the level above.
    for level, width in enumerate(widths):
        below = widths[level + 1] if level + 1 < len(widths) else width
        above = widths[level - 1] if level > 0 else width
        found |= {below + width, 2 * width, width + above}
    return sorted(found)
