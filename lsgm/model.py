"""LSGM: a VAE, a prior over its latents and a likelihood, joined (Vahdat, Kreis, Kautz, NeurIPS 2021)."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lsgm.config import ImageConfig, PriorConfig, SDEConfig, VAEConfig
from lsgm.errors import LSGMError
from lsgm.likelihoods import Bernoulli
from lsgm.networks.ncsnpp import NCSNpp
from lsgm.networks.nvae import HALF_LOG_2PI, NVAE, Posterior
from lsgm.prior import ScorePrior
from lsgm.progress import Progress
from lsgm.sampling import ode
from lsgm.sde import build_sde


@dataclass
class SampleInfo:
    """What sampling took."""

    images: int
    solver: str
    tol: float
    nfe: float  # evaluations of the score network per batch, mean over batches
    seconds: float


@dataclass
class NELBO:
    """The negative ELBO and its two parts, each [B], nats per image: nelbo = reconstruction + kl."""

    nelbo: Tensor
    reconstruction: Tensor  # -log p(x | z0)
    kl: Tensor  # log q(z0 | x) - log p(z0), at the sample
    nfe: int  # evaluations of the score network


class LSGM(nn.Module):
    """A VAE with a prior over its latents: a :class:`ScorePrior`, or N(0, I) where ``prior`` is None.

    Args:
        image: the images' format.
        vae: the VAE's architecture.
        prior, sde: the score prior's; both None for a VAE with the prior N(0, I).
    """

    def __init__(
        self, image: ImageConfig, vae: VAEConfig, prior: PriorConfig | None = None, sde: SDEConfig | None = None
    ) -> None:
        super().__init__()
        if image.padded_size % 2**vae.preprocess.blocks:
            raise LSGMError(
                f"vae.preprocess.blocks: {vae.preprocess.blocks} blocks need an image size divisible by "
                f"{2**vae.preprocess.blocks}, not {image.padded_size}"
            )
        self.image = image
        self.vae_config, self.prior_config, self.sde_config = vae, prior, sde
        self.likelihood = Bernoulli(image.size)
        self.vae = NVAE(vae, image.channels, image.padded_size, self.likelihood.parameters_per_pixel)
        self.prior: ScorePrior | None = None
        if prior is not None and sde is not None:
            size = self.latent_shape[1]
            if size % 2 ** (prior.scales - 1):
                raise LSGMError(
                    f"prior.scales: {prior.scales} scales need latents of a size divisible by "
                    f"{2 ** (prior.scales - 1)}, not {size}x{size}"
                )
            network = NCSNpp(prior, self.latent_shape)
            mixing_logit = prior.mixing_logit_init if prior.mixed_prediction else None
            self.prior = ScorePrior(build_sde(sde), network, self.latent_shape, mixing_logit)
        # the layout in which convolutions are fastest, everywhere
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's stubs

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the latents."""
        return self.vae.latent_shape

    @property
    def device(self) -> torch.device:
        return self.vae.top.device

    @property
    def dimensions(self) -> int:
        """Number of dimensions of an image: bits per dimension = nats / (ln 2 * dimensions)."""
        return self.image.channels * self.image.size**2

    def bits_per_dimension(self, nats: Tensor) -> Tensor:
        return nats / (math.log(2) * self.dimensions)

    def _padded(self, x: Tensor) -> Tensor:
        border = (self.image.padded_size - x.shape[-1]) // 2
        return F.pad(x, (border,) * 4) if border else x

    def encode(self, x: Tensor, noise: Tensor | None = None) -> Posterior:
        """Draw z0 ~ q(z0 | x) for images [B, C, H, W] in [0, 1]; ``noise`` replaces the normal draws."""
        return self.vae.encode(2 * self._padded(x) - 1, noise)[0]

    def decode(self, z: Tensor) -> Tensor:
        """The mean images [B, C, H, W] in [0, 1] of p(x | z) for latents [B, C', h, w]."""
        return self.likelihood.mean(self.vae.decode(z))

    @overload
    def sample(
        self, count: int, *, return_info: Literal[False] = False, seed: int = 0, solver: str = "rk45",
        tol: float = 1e-5, time_eps: float = 1e-5, batch: int = 64,
    ) -> Tensor: ...  # fmt: skip

    @overload
    def sample(
        self, count: int, *, return_info: Literal[True], seed: int = 0, solver: str = "rk45",
        tol: float = 1e-5, time_eps: float = 1e-5, batch: int = 64,
    ) -> tuple[Tensor, SampleInfo]: ...  # fmt: skip

    @torch.no_grad()
    def sample(
        self,
        count: int,
        *,
        return_info: bool = False,
        seed: int = 0,
        solver: str = "rk45",
        tol: float = 1e-5,
        time_eps: float = 1e-5,
        batch: int = 64,
    ) -> Tensor | tuple[Tensor, SampleInfo]:
        """Draw ``count`` images: latents from the prior, then the mean of the decoder.

        Args:
            seed: of the start noise, which is drawn on the host: the same on every device and for every ``batch``.
            solver: `rk45`, the adaptive solver of the probability-flow ODE. (The prior N(0, I) needs none.)
            tol, time_eps: the solver's tolerance and where the ODE ends.
            batch: images at a time.
        Returns:
            images [count, C, H, W] in [0, 1] and, if ``return_info``, what it took.
        """
        if solver != "rk45":
            raise LSGMError(f"solver: expected 'rk45', found {solver!r}")
        self.eval()
        start = time.perf_counter()
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(count, *self.latent_shape, generator=generator).split(batch)
        images, nfe = [], 0
        with Progress("sampling", len(noise), "img", batch) as bar:
            for chunk in noise:
                z = chunk.to(self.device)
                if self.prior is not None:
                    solution = ode.sample(self.prior, z, tol, time_eps)
                    z, nfe = solution.y, nfe + solution.nfe
                images.append(self.decode(z))
                bar.step(f"NFE {nfe / len(images):.0f}")
        x = torch.cat(images)
        if not return_info:
            return x
        if x.is_cuda:
            torch.cuda.synchronize()
        return x, SampleInfo(count, solver, tol, nfe / len(noise), time.perf_counter() - start)

    @torch.no_grad()
    def nelbo_terms(
        self, x: Tensor, *, generator: torch.Generator | None = None, tol: float = 1e-5, time_eps: float = 1e-5
    ) -> NELBO:
        """-log p(x | z0) + log q(z0 | x) - log p(z0) at one sample z0 ~ q(z0 | x).

        log p(z0) is exact for the prior N(0, I), and an ODE solve with one Gaussian Hutchinson probe for the score
        prior.

        Args:
            x: images [B, C, H, W] in [0, 1]; binary where the data are.
            generator: a generator on the host for the posterior's and the probe's draws.
        """
        self.eval()
        shape = (x.shape[0], *self.latent_shape)
        draws = [torch.randn(shape, generator=generator).to(self.device) for _ in range(2)]
        padded = self._padded(x)
        posterior, parameters = self.vae.encode(2 * padded - 1, draws[0])
        reconstruction = -self.likelihood.log_prob(padded, parameters)
        nfe = 0
        if self.prior is None:
            log_p = -(0.5 * posterior.z.square() + HALF_LOG_2PI).sum(dim=(1, 2, 3))
        else:
            log_p, nfe = ode.log_prob(self.prior, posterior.z, draws[1], tol, time_eps)
        kl = posterior.log_q.sum(dim=(1, 2, 3)) - log_p
        return NELBO(reconstruction + kl, reconstruction, kl, nfe)

    def nelbo(self, x: Tensor, *, seed: int = 0, tol: float = 1e-5, time_eps: float = 1e-5) -> Tensor:
        """The negative ELBO in nats per image, [B]; see :meth:`nelbo_terms`."""
        generator = torch.Generator().manual_seed(seed)
        return self.nelbo_terms(x, generator=generator, tol=tol, time_eps=time_eps).nelbo
