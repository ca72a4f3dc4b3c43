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
    """Which latent channels the encoder does not use: their prior stays N(0, I)."""

    threshold: NonNegative = Field(
        0.1, description="channels whose KL to N(0, I) is at most this many nats are dropped"
    )
    batches: Count = Field(
        1000, description="number of training batches over which the KL is averaged before the second stage"
    )


class PriorConfig(Part):
    """The mixed score (LSGM, section 3.2), with whatever network predicts the noise.

    For a score network of your own, subclass it and give it a `network` of its own. The implementation is a module
    (z_t [B, C, H, W], t [B]) -> predicted noise [B, C, H, W]; it is called with the keys of the subclass, and with
    `latent_shape` (C, H, W) and `image_size`.
    """

    not_passed = frozenset({"network", "mixed_prediction", "mixing_logit_init", "drop_inactive"})

    network: str
    mixed_prediction: bool = Field(True, description="mix with the score of N(0, I); false: the score network alone")
    mixing_logit_init: Annotated[Finite, Field(ge=-1000, le=1000)] = Field(
        description="initial value of the logit of alpha, the score network's share in the mixed score"
    )
    drop_inactive: DropInactiveConfig | None = None

    @model_validator(mode="after")
    def _inactive_latents_have_a_prior(self) -> Self:
        if self.drop_inactive is not None and not self.mixed_prediction:
            raise ValueError("drop_inactive: leaves channels to N(0, I), which needs mixed_prediction: true")
        return self

    def misfits(self, latent_shape: Shape, image: ImageConfig) -> Iterator[str]:
        """Why the network cannot be built for these latents: a line for each reason that begins with its key."""
        yield from ()


class NCSNppConfig(PriorConfig):
    """The NCSN++ (arXiv 2011.13456, appendix H)."""

    implementation = "lsgm.networks.ncsnpp:NCSNpp"

    network: Literal["ncsnpp"] = "ncsnpp"

    channels: Annotated[Channels, Field(ge=4)] = Field(description="width of the network")
    scales: Annotated[int, Number, Field(ge=1, le=5)] = Field(description="resolutions")
    cells_per_scale: Layers = Field(description="residual blocks at each resolution")
    fir: bool = Field(False, description="resample with the FIR kernel [1,3,3,1]; false: nearest and average")
    dropout: BelowOne = 0.2
    embedding: Literal["positional", "fourier"] = Field(
        "positional", description="embedding of t; fourier: random frequencies"
    )
    embedding_dim: Annotated[Channels, Field(ge=4, multiple_of=2)] = 128
    embedding_scale: Positive = 1000.0
    attention_resolution: Pixels = Field(16, description="attention where the feature map has this size")

    def misfits(self, latent_shape: Shape, image: ImageConfig) -> Iterator[str]:
        yield from _wrong_norms(self, image)
        blocks = self.cells_per_scale * self.scales
        if blocks > MAX_CELLS:
            yield f"prior.cells_per_scale: {blocks} residual blocks on the way down, expected at most {MAX_CELLS}"
        step, size = 2 ** (self.scales - 1), latent_shape[1]
        if size % step:
            yield f"prior.scales: {self.scales} scales need latents of a size divisible by {step}, not {size}x{size}"


def _wrong_norms(prior: NCSNppConfig, image: ImageConfig) -> Iterator[str]:
    """Each group norm parts its feature maps into groups of at least four, as many as there can be up to 32."""
    multipliers = width_multipliers(prior.scales, image.padded_size)

    def bad(channels: int) -> int | None:
        widths = _normalized(channels, multipliers)
        return next((w for w in widths if w < 4 or w % min(w // 4, NORM_GROUPS)), None)

    width = bad(prior.channels)
    if width is not None:
        wider = next(c for c in range(prior.channels + 1, prior.channels + 2 * 4 * NORM_GROUPS + 1) if bad(c) is None)
        lower = next((c for c in range(prior.channels - 1, 3, -1) if bad(c) is None), None)
        groups = f"{width} feature maps do not part evenly into {min(width // 4, NORM_GROUPS)} groups"
        reason = "a group norm needs at least 4 feature maps" if width < 4 else groups
        nearest = f"{lower} or {wider}" if lower is not None else f"{wider}"
        yield f"prior.channels: expected {nearest} or another number that group norm can part, found " \
              f"{prior.channels} ({reason})"  # fmt: skip


def _normalized(channels: int, multipliers: tuple[int, ...]) -> list[int]:
    """Numbers of feature maps that the score network has group norms on: of each level, and where a skip joins it."""
    widths = [channels * m for m in multipliers]
    found = set(widths)
    # On the way up a level's blocks get skips of its own width, and the last one that of the level above it.
    for level, width in enumerate(widths):
        below = widths[level + 1] if level + 1 < len(widths) else width
        above = widths[level - 1] if level > 0 else width
        found |= {below + width, 2 * width, width + above}
    return sorted(found)
