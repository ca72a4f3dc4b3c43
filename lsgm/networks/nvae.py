"""NVAE: a hierarchical VAE whose groups of latents share features (arXiv 2007.03898; LSGM, appendix G).

The encoder runs bottom-up over the image; the decoder runs top-down and draws one group of latents after the
other. Every prior factor is N(0, I) and knows nothing of earlier groups: that is what lets one score-based prior
cover all groups, concatenated on the channels.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lsgm.gaussian import log_prob_of_noise
from lsgm.networks.batch_norm import BatchNormSwish
from lsgm.networks.flow import Flow
from lsgm.networks.layers import Conv2d, soft_clamp
from lsgm.networks.mbconv import MBConvBranch
from lsgm.networks.nvae_cells import BNSwishBranch, Cell
from lsgm.networks.posterior import Posterior
from lsgm.networks.weight_norm import WNConv2d

MBCONV_EXPANSION_TOWER = 6
MBCONV_EXPANSION_POST = 3


class NVAE(nn.Module):
    """The VAE of ``latent_scales`` scales with ``groups_per_scale`` groups each.

    Args:
        arch: cells of the decoder, `res_bnswish` or `res_mbconv`.
        channels, channel_mult: width of the stem, after each pre-process block and of each smaller scale of latents.
        latent_scales, groups_per_scale, latents_per_group: resolutions with latents, their groups, and
            the channels of a group.
        cells_per_cond: cells of a group, in the encoder and in the decoder.
        preprocess, postprocess: `blocks`, each of which halves (doubles) the resolution, of `cells` cells.
        use_se: whether cells end in squeeze-and-excitation.
        num_nf: pairs of normalizing flow steps per group.
        progressive_input: `input_skip` adds an image pyramid to the encoder, `none` does not.
        log_sigma_clamp: soft clamp of the posterior's log sigma.
        image_channels, image_size: of the images; the size must be divisible by 2 ** (blocks + latent_scales - 1).
        output_channels: parameters per pixel of the likelihood.
    """

    def __init__(
        self,
        *,
        arch: str,
        channels: int,
        channel_mult: Sequence[int],
        latent_scales: int,
        groups_per_scale: int,
        latents_per_group: int,
        cells_per_cond: int,
        preprocess: Mapping[str, int],
        postprocess: Mapping[str, int],
        use_se: bool = True,
        num_nf: int = 0,
        progressive_input: str = "none",
        log_sigma_clamp: float = 5.0,
        image_channels: int,
        image_size: int,
        output_channels: int,
    ) -> None:
        super().__init__()
        self.arch, self.use_se, self.log_sigma_clamp = arch, use_se, log_sigma_clamp
        self.cells_per_cond, self.groups_per_scale = cells_per_cond, groups_per_scale
        blocks, groups, latents = preprocess["blocks"], groups_per_scale, latents_per_group
        widths = [channels * m for m in channel_mult]
        latent_widths = widths[blocks:]  # of each scale, largest resolution first
        self._add_encoder(widths, image_channels, blocks, preprocess["cells"], progressive_input == "input_skip")

        # Top down: the decoder's first group is the encoder's last. Lists below are in the decoder's order.
        sizes = [image_size // 2 ** (blocks + k) for k in range(latent_scales)]
        self.latent_shape = (groups * latents, sizes[-1], sizes[-1])
        self.latent_groups = (latents,) * groups
        self.lower_scale_shapes = tuple((latents, size, size) for size in sizes[-2::-1] for _ in range(groups))
        of_group = [width for width in reversed(latent_widths) for _ in range(groups)]
        self.encoder_combiners = nn.ModuleList(WNConv2d(width, width, 1) for width in of_group[1:])
        self.posterior_heads = nn.ModuleList(WNConv2d(width, 2 * latents, 3) for width in of_group)
        self.flows = nn.ModuleList(Flow(latents, num_nf) for _ in of_group if num_nf)

        self.top = nn.Parameter(torch.rand(latent_widths[-1], sizes[-1], sizes[-1]))
        self.latent_convs = nn.ModuleList(WNConv2d(latents, latents, 3) for _ in of_group)
        self.decoder_mixers = nn.ModuleList(WNConv2d(width + latents, width, 1) for width in of_group)
        self._add_decoder(of_group, widths, blocks, postprocess["cells"])
        self.output_head: Conv2d = WNConv2d(widths[0], output_channels, 3)

    def _encoder_cell(self, c_in: int, c_out: int, resample: int = 0) -> Cell:
        return Cell(BNSwishBranch(c_in, c_out, resample), c_in, c_out, resample, self.use_se)

    def _decoder_cell(self, c_in: int, c_out: int, resample: int, expansion: int) -> Cell:
        branch: nn.Module = (
            MBConvBranch(c_in, c_out, resample, expansion)
            if self.arch == "res_mbconv"
            else BNSwishBranch(c_in, c_out, resample)
        )
        return Cell(branch, c_in, c_out, resample, self.use_se)

    def _add_encoder(self, widths: list[int], image_channels: int, blocks: int, cells: int, input_skip: bool) -> None:
        """Bottom up: the pre-process blocks, then from the largest latents to the smallest."""
        self.stem = WNConv2d(image_channels, widths[0], 3)
        # The last cell of a pre-process block halves the resolution and changes the channels ...
        self.preprocess = nn.Sequential()
        for c_in, c_out in itertools.pairwise(widths[: blocks + 1]):
            self.preprocess.extend(self._encoder_cell(c_in, c_in) for _ in range(cells - 1))
            self.preprocess.append(self._encoder_cell(c_in, c_out, resample=-1))

        # The groups' cells, and a down cell between scales.
        latent_widths = widths[blocks:]
        self.encoder_groups = nn.ModuleList(
            nn.Sequential(*(self._encoder_cell(width, width) for _ in range(self.cells_per_cond)))
            for width in latent_widths
            for _ in range(self.groups_per_scale)
        )
        pairs = list(itertools.pairwise(latent_widths))
        self.encoder_down = nn.ModuleList(self._encoder_cell(c_in, c_out, resample=-1) for c_in, c_out in pairs)
        self.input_pyramid = nn.ModuleList(PyramidStep(c_in, c_out) for c_in, c_out in (pairs if input_skip else []))

    def _add_decoder(self, of_group: list[int], widths: list[int], blocks: int, cells: int) -> None:
        """Top down: the groups' cells and an up cell between scales, then the post-process blocks."""
        pairs = list(itertools.pairwise(widths[blocks:]))
        self.decoder_groups = nn.ModuleList(
            nn.Sequential(
                *(self._decoder_cell(width, width, 0, MBCONV_EXPANSION_TOWER) for _ in range(self.cells_per_cond))
            )
            for width in of_group
        )
        self.decoder_up = nn.ModuleList(
            self._decoder_cell(c_out, c_in, 1, MBCONV_EXPANSION_TOWER) for c_in, c_out in reversed(pairs)
        )
        # ... and the first cell of a post-process block doubles it.
        self.postprocess = nn.Sequential()
        for c_in, c_out in itertools.pairwise(widths[blocks::-1]):
            self.postprocess.append(self._decoder_cell(c_in, c_out, 1, MBCONV_EXPANSION_POST))
            self.postprocess.extend(
                self._decoder_cell(c_out, c_out, 0, MBCONV_EXPANSION_POST) for _ in range(cells - 1)
            )

    def encode(self, x: Tensor, noise: Sequence[Tensor] | None = None) -> tuple[Posterior, Tensor]:
        """Draw z0 ~ q(z0 | x).

        Args:
            x: images in [-1, 1], [B, C, H, W].
            noise: standard normal draws: one in the shape of the top scale's latents, then one for each group of the
                lower scales; drawn here if None.
        Returns:
            the posterior sample and the likelihood's parameters [B, output_channels, H, W] that it decodes to
            (the decoder runs anyway: later groups depend on it).
        """
        states = self._encoder_states(self.preprocess(self.stem(x)))
        if noise is None:
            shapes = (self.latent_shape, *self.lower_scale_shapes)
            noise = [torch.randn(x.shape[0], *shape, device=x.device, dtype=x.dtype) for shape in shapes]
        draws = [*noise[0].split(self.latent_groups, dim=1), *noise[1:]]
        zs: list[Tensor] = []
        log_qs: list[Tensor] = []
        gaussian: dict[str, Tensor] = {}  # of the top scale's last group
        h = self._top(x.shape[0])
        for g, (state, draw) in enumerate(zip(reversed(states), draws, strict=True)):
            if g > 0:
                state = state + self.encoder_combiners[g - 1](h)
            mu, log_sigma = self.posterior_heads[g](F.elu(state)).chunk(2, dim=1)
            mu, log_sigma = soft_clamp(mu), soft_clamp(log_sigma, self.log_sigma_clamp)
            sigma = log_sigma.exp()
            z = torch.addcmul(mu, sigma, draw)
            if self.flows:
                z = self.flows[g](z)
            elif g == self.groups_per_scale - 1:
                gaussian = {"mean": mu, "std": sigma}
            zs.append(z)
            log_qs.append(log_prob_of_noise(draw, log_sigma))
            h = self._decode_group(g, h, z)
        n = self.groups_per_scale
        top, log_q = torch.cat(zs[:n], dim=1), torch.cat(log_qs[:n], dim=1)
        posterior = Posterior(top, log_q, self.latent_groups, tuple(zs[n:]), tuple(log_qs[n:]), **gaussian)
        return posterior, self._image(h)

    def decode(self, z: Tensor, lower_scales: Sequence[Tensor] = ()) -> Tensor:
        """The likelihood's parameters [B, output_channels, H, W] for the latents of the top and of the lower scales."""
        if len(lower_scales) != len(self.lower_scale_shapes):
            raise ValueError(
                f"lower_scales: expected the latents of {len(self.lower_scale_shapes)} groups, got {len(lower_scales)}"
            )
        h = self._top(z.shape[0])
        for g, z_g in enumerate([*z.split(self.latent_groups, dim=1), *lower_scales]):
            h = self._decode_group(g, h, z_g)
        return self._image(h)

    def _encoder_states(self, s: Tensor) -> list[Tensor]:
        """The state of each group, bottom up."""
        states = []
        pyramid = s
        for i, cells in enumerate(self.encoder_groups):
            s = cells(s)
            states.append(s)
            scale, last = divmod(i + 1, self.groups_per_scale)
            if last == 0 and scale <= len(self.encoder_down):
                s = self.encoder_down[scale - 1](s)
                if self.input_pyramid:
                    pyramid = self.input_pyramid[scale - 1](pyramid)
                    s = s + pyramid
        return states

    def _top(self, batch: int) -> Tensor:
        return self.top.expand(batch, -1, -1, -1)

    def _decode_group(self, g: int, h: Tensor, z: Tensor) -> Tensor:
        h = self.decoder_groups[g](self.decoder_mixers[g](torch.cat([h, self.latent_convs[g](z)], dim=1)))
        scale, last = divmod(g + 1, self.groups_per_scale)
        return self.decoder_up[scale - 1](h) if last == 0 and scale <= len(self.decoder_up) else h

    def _image(self, h: Tensor) -> Tensor:
        return self.output_head(F.elu(self.postprocess(h)))


class PyramidStep(nn.Module):
    """A step of the input pyramid: batch norm -> swish -> conv3x3 of stride 2."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.norm = BatchNormSwish(c_in)
        self.conv = WNConv2d(c_in, c_out, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(self.norm(x))
        return y
