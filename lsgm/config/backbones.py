"""VAE backbones: the settings that all of them share, and those of the built-in ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, model_validator

from lsgm.config.bounds import Channels, Layers, Multiple, Number, Positive
from lsgm.config.data import ImageConfig
from lsgm.config.section import Part, Section, one_of
from lsgm.registry import LIKELIHOODS

Shape = tuple[int, int, int]  # channels, height, width

MAX_CELLS = 500  # residual cells in one half of a network; the paper's largest network has 160


class BlocksConfig(Section):
    """A chain of downsampling or upsampling blocks."""

    blocks: Layers = Field(
        description="number of blocks; each halves (preprocess) or doubles (postprocess) the resolution"
    )
    cells: Layers = Field(description="number of residual cells per block")


class BackboneConfig(Part):
    """Settings that all VAEs share. To add a backbone, subclass this and give `backbone` a new value.

    The implementation is a :class:`lsgm.networks.posterior.Backbone`. It is called with the keys below, except
    `backbone`, `likelihood` and `x_bits`, and with `image_channels`, `image_size` and `output_channels`.
    """

    not_passed = frozenset({"backbone", "likelihood", "x_bits"})

    backbone: str
    likelihood: Annotated[str, one_of(LIKELIHOODS)] = Field(
        "bernoulli",
        description="likelihood p(x | z). dml: mixture of ten discretized logistics; dl: a single discretized logistic",
        json_schema_extra={"enum": [*LIKELIHOODS.names()]},
    )
    x_bits: Annotated[int, Number, Field(ge=1, le=8)] = Field(
        8, description="bits per pixel value (1 to 8); the lower bits are dropped"
    )
    log_sigma_clamp: Annotated[Positive, Field(le=80)] = Field(
        5.0, description="soft bound on the absolute value of the posterior's log sigma"
    )

    def latent_shapes(self, image: ImageConfig) -> list[Shape]:
        """The latent shapes (C, H, W): first that of the score prior's latents, then each group of lower scales."""
        raise NotImplementedError(f"{type(self).__name__} must define latent_shapes(image)")

    def misfits(self, image: ImageConfig) -> Iterator[str]:
        """The reasons why the backbone cannot be built for these images; each is one line and begins with its key."""
        yield from ()


class VAEConfig(BackboneConfig):
    """The NVAE (arXiv 2007.03898)."""

    implementation = "lsgm.networks.nvae:NVAE"

    backbone: Literal["nvae"] = "nvae"
    arch: Literal["res_bnswish", "res_mbconv"] = Field(description="type of the decoder's residual cells")
    channels: Channels = Field(description="base number of channels; the stem has channel_mult[0] times as many")
    channel_mult: list[Multiple] = Field(
        description="channels as multiples of `channels`: one entry for the stem, one for each preprocess block and "
        "one for each smaller latent scale"
    )
    latent_scales: Layers = Field(
        1, description="number of resolutions that have latents; the score prior covers the smallest"
    )
    groups_per_scale: Layers = Field(description="number of latent groups per scale")
    latents_per_group: Channels = Field(description="number of latent channels per group")
    cells_per_cond: Layers = Field(description="number of residual cells per group, in the encoder and in the decoder")
    preprocess: BlocksConfig = Field(description="downsampling blocks between the stem and the latents")
    postprocess: BlocksConfig = Field(description="upsampling blocks between the latents and the image")
    use_se: bool = Field(True, description="end every cell with squeeze-and-excitation")
    num_nf: Annotated[int, Number, Field(ge=0, le=100)] = Field(
        0, description="number of pairs of normalizing-flow steps per group; 0: no flows"
    )
    progressive_input: Literal["none", "input_skip"] = Field(
        "none", description="input_skip: the encoder also sees the image at every lower resolution"
    )

    @model_validator(mode="after")
    def _shapes_fit(self) -> VAEConfig:
        wanted = self.preprocess.blocks + self.latent_scales
        if len(self.channel_mult) != wanted:
            raise ValueError(
                f"channel_mult: expected {wanted} entries (one for the stem, one per preprocess block, one per latent "
                f"scale after the first), found {len(self.channel_mult)}"
            )
        if self.preprocess.blocks != self.postprocess.blocks:
            raise ValueError(
                "preprocess.blocks and postprocess.blocks must be equal, so that the output has the input's size"
            )
        return self

    @property
    def halvings(self) -> int:
        """How many times the resolution is halved between the image and the smallest latents."""
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
    channels: Channels = Field(
        description="base number of channels; at full resolution there are channel_mult[0] times as many"
    )
    channel_mult: Annotated[list[Multiple], Field(min_length=2)] = Field(
        description="channels at each resolution, as multiples of `channels`"
    )
    latents: Channels = Field(description="number of latent channels")

    @property
    def halvings(self) -> int:
        """How many times the resolution is halved between the image and the latents."""
        return len(self.channel_mult) - 1

    def latent_shapes(self, image: ImageConfig) -> list[Shape]:
        size = image.padded_size // 2**self.halvings
        return [(self.latents, size, size)]

    def misfits(self, image: ImageConfig) -> Iterator[str]:
        yield from _odd_size("vae.channel_mult", self.halvings, image)


def _odd_size(keys: str, halvings: int, image: ImageConfig) -> Iterator[str]:
    if image.padded_size % 2**halvings:
        yield f"{keys}: {halvings} halvings need an image size divisible by {2**halvings}, not {image.padded_size}"
