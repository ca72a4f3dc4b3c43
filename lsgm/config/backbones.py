"""The VAEs: what all have, and the settings of ours."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, model_validator

from lsgm.config.bounds import Channels, Layers, Multiple, Number, Positive
from lsgm.config.data import ImageConfig
from lsgm.config.section import Part, Section, one_of
from lsgm.registry import LIKELIHOODS

Shape = tuple[int, int, int]  # channels, height, width

MAX_CELLS = 500  # of a network, to one of its ends; the largest of the paper has 160


class BlocksConfig(Section):
    """A chain of down- or up-sampling blocks."""

    blocks: Layers = Field(description="number of blocks, each halves (doubles) the resolution")
    cells: Layers = Field(description="residual cells in a block")


class BackboneConfig(Part):
    """What all VAEs have. For a backbone of your own, subclass it and give it a `backbone` of its own.

    The implementation is a :class:`lsgm.networks.posterior.Backbone`; it is called with the keys below, but for
    `backbone`, `likelihood` and `x_bits`, and with `image_channels`, `image_size` and `output_channels`.
    """

    not_passed = frozenset({"backbone", "likelihood", "x_bits"})

    backbone: str
    likelihood: Annotated[str, one_of(LIKELIHOODS)] = Field(
        "bernoulli",
        description="p(x | z). bernoulli; dml: mixture of ten discretized logistics; dl: one such logistic; normal",
        json_schema_extra={"enum": [*LIKELIHOODS.names()]},
    )
    x_bits: Annotated[int, Number, Field(ge=1, le=8)] = Field(
        8, description="bits per pixel value; the lower bits are dropped"
    )
    log_sigma_clamp: Annotated[Positive, Field(le=80)] = Field(
        5.0, description="soft clamp of the posterior's log sigma"
    )

    def latent_shapes(self, image: ImageConfig) -> list[Shape]:
        """The shapes (C, H, W) of the latents: those that the score prior covers, then the groups of lower scales."""
        raise NotImplementedError(f"{type(self).__name__} must define latent_shapes(image)")

    def misfits(self, image: ImageConfig) -> Iterator[str]:
        """Why the backbone cannot be built for these images: a line for each reason that begins with its key."""
        yield from ()


class VAEConfig(BackboneConfig):
    """The NVAE (arXiv 2007.03898)."""

    implementation = "lsgm.networks.nvae:NVAE"

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

    @property
    def halvings(self) -> int:
        """How often the images are halved on the way to the smallest latents."""
        return self.preprocess.blocks + self.latent_scales - 1

    def latent_shapes(self, image: ImageConfig) -> list[Shape]:
        sizes = [image.padded_size // 2 ** (self.preprocess.blocks + k) for k in range(self.latent_scales)]
        groups, latents = self.groups_per_scale, self.latents_per_group
        lower = [(latents, size, size) for size in sizes[-2::-1] for _ in range(groups)]
        return [(groups * latents, sizes[-1], sizes[-1]), *lower]

    def misfits(self, image: ImageConfig) -> Iterator[str]:
        yield from _odd_size("vae.preprocess.blocks, vae.latent_scales", self.halvings, image)
        towers = 2 * self.latent_scales * self.groups_per_scale * max(self.cells_per_cond, self.num_nf)
        cells = towers + self.preprocess.blocks * (self.preprocess.cells + self.postprocess.cells)
        if cells > MAX_CELLS:
            yield f"vae.groups_per_scale, vae.cells_per_cond: {cells} residual cells, expected at most {MAX_CELLS}"


class ConvVAEConfig(BackboneConfig):
    """A plain convolutional VAE with one group of latents."""

    implementation = "lsgm.networks.convvae:ConvVAE"

    backbone: Literal["conv"] = "conv"
    channels: Channels = Field(description="channels at full resolution, times channel_mult[0]")
    channel_mult: Annotated[list[Multiple], Field(min_length=2)] = Field(
        description="channels at each resolution, in multiples of `channels`"
    )
    latents: Channels = Field(description="latent channels")

    @property
    def halvings(self) -> int:
        """How often the images are halved on the way to the latents."""
        return len(self.channel_mult) - 1

    def latent_shapes(self, image: ImageConfig) -> list[Shape]:
        size = image.padded_size // 2**self.halvings
        return [(self.latents, size, size)]

    def misfits(self, image: ImageConfig) -> Iterator[str]:
        yield from _odd_size("vae.channel_mult", self.halvings, image)


def _odd_size(keys: str, halvings: int, image: ImageConfig) -> Iterator[str]:
    if image.padded_size % 2**halvings:
        yield f"{keys}: {halvings} halvings need an image size divisible by {2**halvings}, not {image.padded_size}"
