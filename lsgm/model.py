"""LSGM: a VAE, a prior over its latents and a likelihood, joined (Vahdat, Kreis, Kautz, NeurIPS 2021)."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lsgm.config import ImageConfig, PriorConfig, SDEConfig, VAEConfig
from lsgm.errors import LSGMError, check_choice
from lsgm.likelihoods import Bernoulli
from lsgm.networks.ncsnpp import NCSNpp
from lsgm.networks.nvae import HALF_LOG_2PI, NVAE, Posterior
from lsgm.prior import ScorePrior
from lsgm.progress import Progress
from lsgm.sampling import ancestral, ode
from lsgm.sde import build_sde
from lsgm.streams import Streams, mix

Solver = Literal["rk45", "euler", "heun", "rk4", "ancestral"]
SOLVERS: tuple[Solver, ...] = get_args(Solver)
Estimator = Literal["ode", "discretised"]
Probe = Literal["gaussian", "rademacher", "exact"]


@dataclass
class SampleInfo:
    """What sampling took."""

    images: int
    solver: str
    tol: float | None  # rk45's
    nfe: float  # evaluations of the score network per batch, mean over batches
    temperature: float
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
        self, count: int, *, return_info: Literal[False] = False, seed: int = 0, solver: Solver = "rk45",
        tol: float = 1e-5, time_eps: float = 1e-5, steps: int | None = None, variances: ancestral.Variances = "beta",
        temperature: float = 1.0, batch: int = 64,
    ) -> Tensor: ...  # fmt: skip

    @overload
    def sample(
        self, count: int, *, return_info: Literal[True], seed: int = 0, solver: Solver = "rk45",
        tol: float = 1e-5, time_eps: float = 1e-5, steps: int | None = None, variances: ancestral.Variances = "beta",
        temperature: float = 1.0, batch: int = 64,
    ) -> tuple[Tensor, SampleInfo]: ...  # fmt: skip

    @torch.no_grad()
    def sample(
        self,
        count: int,
        *,
        return_info: bool = False,
        seed: int = 0,
        solver: Solver = "rk45",
        tol: float = 1e-5,
        time_eps: float = 1e-5,
        steps: int | None = None,
        variances: ancestral.Variances = "beta",
        temperature: float = 1.0,
        batch: int = 64,
    ) -> Tensor | tuple[Tensor, SampleInfo]:
        """Draw ``count`` images: latents from the prior, then the mean of the decoder.

        Args:
            seed: image i depends on (seed, i) alone: not on ``batch``, ``count`` or the device. (To the solver's
                tolerance for `rk45`, whose steps suit a whole batch.)
            solver: of the probability-flow ODE, `rk45` (adaptive), `euler`, `heun` or `rk4` (equal steps); or
                `ancestral`, the discretised diffusion. The prior N(0, I) needs none.
            tol: absolute and relative tolerance of `rk45`.
            time_eps: where the ODE ends.
            steps: of the other solvers; 50, and 1000 for `ancestral`, where None.
            variances: of the steps of `ancestral`: beta, or that of the true posterior (`posterior`).
            temperature: factor of every normal draw; below 1: less variety, more typical images.
            batch: images at a time.
        Returns:
            images [count, C, H, W] in [0, 1] and, if ``return_info``, what it took.
        """
        check_choice("solver", solver, SOLVERS)
        if steps is None:
            steps = 1000 if solver == "ancestral" else 50
        if steps < 1:
            raise LSGMError(f"steps: expected at least 1, found {steps}")
        self.eval()
        start = time.perf_counter()
        images, nfe = [], []
        groups = torch.arange(count).split(batch)
        with Progress("sampling", len(groups), "img", batch) as bar:
            for group in groups:
                streams = Streams(seed, group.tolist(), self.latent_shape, self.device)

                def draw(streams: Streams = streams) -> Tensor:
                    return temperature * streams.normal()

                z = draw()
                if self.prior is not None:
                    if solver == "ancestral":
                        solution = ancestral.sample(self.prior, z, steps, draw, variances)
                    else:
                        solution = ode.sample(self.prior, z, tol, time_eps, solver, steps)
                    z = solution.y
                    nfe.append(solution.nfe)
                images.append(self.decode(z))
                bar.step(f"NFE {sum(nfe) / len(images):.0f}")
        x = torch.cat(images)
        if not return_info:
            return x
        if x.is_cuda:
            torch.cuda.synchronize()
        info = SampleInfo(count, solver, tol if solver == "rk45" else None, sum(nfe) / len(groups), temperature, 0.0)
        info.seconds = time.perf_counter() - start
        return x, info

    def compile_prior(self) -> None:
        """Compile the score network for sampling; its weights must not change afterwards.

        Takes up to a minute, at the first call for each batch size; on the CPU it needs a C++ compiler.
        """
        if self.prior is not None:
            self.prior.network.compile(dynamic=False, options={"freezing": True})

    @torch.no_grad()
    def nelbo_terms(
        self,
        x: Tensor,
        streams: tuple[Streams, Streams],
        *,
        estimator: Estimator = "ode",
        tol: float = 1e-5,
        time_eps: float = 1e-5,
        probe: Probe = "rademacher",
        probes: int = 1,
        steps: int = 1000,
    ) -> NELBO:
        """-log p(x | z0) + log q(z0 | x) - log p(z0) at one sample z0 ~ q(z0 | x).

        log p(z0) is exact for the prior N(0, I). For the score prior it is

        - `ode`: that of the probability-flow ODE from ``time_eps`` to 1 with tolerance ``tol``, its trace by
          ``probes`` Hutchinson probes (`gaussian` or `rademacher`), or `exact`, where there are few latents;
        - `discretised`: a lower bound, the variational bound of the diffusion in ``steps`` steps.

        Args:
            x: images [B, C, H, W] in [0, 1]; binary where the data are.
            streams: the draws for these images, see :meth:`streams`.
        """
        check_choice("estimator", estimator, get_args(Estimator))
        check_choice("probe", probe, get_args(Probe))
        encoder_draws, prior_draws = streams
        self.eval()
        padded = self._padded(x)
        posterior, parameters = self.vae.encode(2 * padded - 1, encoder_draws.normal())
        reconstruction = -self.likelihood.log_prob(padded, parameters)
        nfe = 0
        if self.prior is None:
            log_p = -(0.5 * posterior.z.square() + HALF_LOG_2PI).sum(dim=(1, 2, 3))
        elif estimator == "discretised":
            log_p, nfe = ancestral.elbo(self.prior, posterior.z, steps, prior_draws.normal)
        else:
            directions = None
            if probe != "exact":
                draw = prior_draws.normal if probe == "gaussian" else prior_draws.rademacher
                directions = torch.stack([draw() for _ in range(probes)])
            log_p, nfe = ode.log_prob(self.prior, posterior.z, directions, tol, time_eps)
        kl = posterior.log_q.sum(dim=(1, 2, 3)) - log_p
        return NELBO(reconstruction + kl, reconstruction, kl, nfe)

    def streams(self, seed: int, images: Iterable[int]) -> tuple[Streams, Streams]:
        """The encoder's draws for images of these numbers, and those of the estimate of log p(z0).

        They are apart, so that models with different priors see the same encoder samples.
        """
        numbers = list(images)
        of = [Streams(mix(seed, use), numbers, self.latent_shape, self.device) for use in range(2)]
        return of[0], of[1]

    def nelbo(self, x: Tensor, *, seed: int = 0, samples: int = 1, **settings: Any) -> Tensor:
        """The negative ELBO in nats per image, [B], for images [B, C, H, W] in [0, 1].

        Args:
            samples: K > 1 gives the tighter importance-weighted bound -log (1/K sum_k p(x, z_k) / q(z_k | x)) (Burda et
                al., arXiv 1509.00519), from K encoder samples. What noise the estimate of log p(z0) has makes it too
                low: use `probe="exact"` where that matters.
            settings: those of :meth:`nelbo_terms`: tol, time_eps, estimator, probe, probes, steps.
        """
        streams = self.streams(seed, range(len(x)))
        terms = [self.nelbo_terms(x, streams, **settings).nelbo for _ in range(samples)]
        return importance_weighted(torch.stack(terms))


def importance_weighted(nelbo: Tensor) -> Tensor:
    """The bound -log (1/K sum_k exp(-nelbo_k)), [B], from the negative ELBOs of K encoder samples, [K, B]."""
    return math.log(len(nelbo)) - torch.logsumexp(-nelbo, dim=0)
