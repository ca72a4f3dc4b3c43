"""LSGM: a VAE, a prior over its latents and a likelihood, joined (Vahdat, Kreis, Kautz, NeurIPS 2021)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lsgm import arguments
from lsgm.arguments import check_choice, check_count
from lsgm.config import (
    BackboneConfig,
    DiffusionConfig,
    EstimatorConfig,
    ImageConfig,
    PriorConfig,
    SampleConfig,
    Section,
)
from lsgm.config.mistakes import parse
from lsgm.errors import LSGMError, SolverError
from lsgm.gaussian import standard_log_prob
from lsgm.likelihoods import Likelihood
from lsgm.networks.batch_norm import batch_statistics
from lsgm.networks.posterior import Posterior
from lsgm.per_sample_noise import PerSampleNoise, mix
from lsgm.prior import ScorePrior
from lsgm.progress import Progress
from lsgm.registry import LIKELIHOODS, SOLVERS, load
from lsgm.shapes import misfits
from lsgm.solvers.likelihood import estimate_log_prob

Shape = tuple[int, ...]
C = TypeVar("C", bound=Section)


@dataclass
class SampleInfo:
    """What sampling took."""

    images: int
    solver: str
    tol: float | None  # of a solver with adaptive steps
    nfe: float  # evaluations of the score network per batch, mean over batches
    temperature: float
    seconds: float

    @classmethod
    def of(cls, config: SampleConfig, nfe: float, seconds: float) -> SampleInfo:
        tol = config.resolved().tol if config.solver in ("rk45", "adaptive_sde") else None
        return cls(config.count, config.label, tol, nfe, config.temperature, seconds)


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
        prior, sde: those of the score prior; both None for a VAE with the prior N(0, I).
    Raises:
        LSGMError: they do not fit together.
    """

    def __init__(
        self,
        image: ImageConfig,
        vae: BackboneConfig,
        prior: PriorConfig | None = None,
        sde: DiffusionConfig | None = None,
    ) -> None:
        super().__init__()
        self.image = image
        self.vae_config, self.prior_config, self.sde_config = vae, prior, sde
        if reasons := misfits(image, vae, prior):
            raise LSGMError(reasons[0])
        self.likelihood: Likelihood = load(LIKELIHOODS.entry(vae.likelihood).implementation)(
            image=image, x_bits=vae.x_bits
        )
        self.vae = vae.build(
            image_channels=image.channels,
            image_size=image.padded_size,
            output_channels=self.likelihood.parameters_per_pixel,
        )
        self.prior: ScorePrior | None = None
        if prior is not None and sde is not None:
            network = prior.build(latent_shape=self.latent_shape, image_size=image.padded_size)
            mixing_logit = prior.mixing_logit_init if prior.mixed_prediction else None
            self.prior = ScorePrior(sde.build(), network, self.latent_shape, mixing_logit)
        # the layout in which convolutions are fastest, everywhere
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's stubs

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the latents that the prior covers, those of the smallest scale."""
        return self.vae.latent_shape

    @property
    def device(self) -> torch.device:
        return next(self.vae.parameters()).device

    @property
    def dimensions(self) -> int:
        """Number of dimensions of an image: bits per dimension = nats / (ln 2 * dimensions)."""
        return self.image.channels * self.image.size**2

    def bits_per_dimension(self, nats: Tensor) -> Tensor:
        return nats / (math.log(2) * self.dimensions)

    def _seen(self, x: Tensor) -> Tensor:
        """Images of 256 values in [0, 1] as the VAE sees them: the upper `x_bits` bits, a border of zeros."""
        bits = self.vae_config.x_bits
        if bits < 8 and not self.image.binary:  # what has the fewer bits already stays as it is
            x = (torch.round(255 * x) / 2 ** (8 - bits)).floor() / (2**bits - 1)
        border = (self.image.padded_size - x.shape[-1]) // 2
        return F.pad(x, (border,) * 4) if border else x

    def _checked(self, x: Tensor, gray: bool) -> Tensor:
        """Images of any dtype that is allowed, with or without their border, in that of the weights."""
        image, weight = self.image, next(self.vae.parameters())
        sizes = (image.size, image.padded_size)
        return arguments.check_images(x, image.channels, sizes, weight, binary=image.binary, gray=gray)

    def encode(self, x: Tensor, noise: Sequence[Tensor] | None = None) -> Posterior:
        """Draw z0 ~ q(z0 | x) for images [B, C, H, W] in [0, 1]; ``noise`` replaces the normal draws.

        Images of any floating-point type are taken, and uint8 ones as values of 0 to 255. Those of a binary model may
        be gray, as its samples are, or bool.

        Raises:
            LSGMError: the images have another shape or range, are not finite or on another device, or there is none;
                or ``noise`` is not a tensor [B, *shape] for each shape of latents.
        """
        x = self._checked(x, gray=True)
        if noise is not None:
            shapes = (self.latent_shape, *self.vae.lower_scale_shapes)
            noise = arguments.check_latents(arguments.each("noise", noise, len(shapes)), shapes, x, len(x))
        return self.vae.encode(2 * self._seen(x) - 1, noise)[0]

    def decode(self, z: Tensor, lower_scales: Sequence[Tensor] | None = None) -> Tensor:
        """The mean images [B, C, H, W] in [0, 1] of p(x | z) for latents [B, C', h, w].

        ``lower_scales`` are the latents of the scales that the prior does not cover, group by group; drawn from N(0, I)
        here if None (by PyTorch's global generator).

        Raises:
            LSGMError: latents have another shape, are not finite or on another device, or there is none.
        """
        shapes, weight = self.vae.lower_scale_shapes, next(self.vae.parameters())
        given = {} if lower_scales is None else arguments.each("lower_scales", lower_scales, len(shapes))
        latents = (self.latent_shape, *(shapes if given else ()))
        z, *lower_scales = arguments.check_latents({"z": z, **given}, latents, weight)
        if not given:
            lower_scales = [torch.randn(len(z), *shape, device=z.device, dtype=z.dtype) for shape in shapes]
        return self.likelihood.mean(self.vae.decode(z, lower_scales))

    @property
    def time_eps(self) -> float:
        """The smallest time that the score prior was trained at; 0 where there is none."""
        return 0.0 if self.sde_config is None else self.sde_config.time_eps

    def sample(self, count: int, *, return_info: bool = False, **settings: Any) -> Any:
        """Draw ``count`` images: latents from the prior, then the mean of the decoder.

        Args:
            settings: those of :class:`lsgm.config.SampleConfig`, or of the configuration of an added ``solver``:
                solver ("ab"), form, order, grid, steps (10 evaluations), tol, time_eps and so on, temperature (1; 0
                draws one image alone), vae_batch_statistics, batch (64 images at a time) and seed (0). The prior
                N(0, I) needs no solver. Image i depends on (seed, i) alone: not on ``batch``, ``count`` or the device.
                (To the solver's tolerance for `rk45`, whose steps suit a whole batch; with vae_batch_statistics on the
                images of its batch too.)
        Returns:
            images [count, C, H, W] in [0, 1]; if ``return_info``, a pair of them and a :class:`SampleInfo`.
        Raises:
            SolverError: the ODE cannot be solved, or an image is not finite: the training may have diverged.
            LSGMError: an argument is unknown or out of its range. All are checked, those too that the solver ignores.
        """
        start = time.perf_counter()
        solver = settings.get("solver", SampleConfig.model_fields["solver"].default)
        check_choice("solver", solver, SOLVERS.names())
        given = {"count": count, "seed": 0, "batch": 64, **settings}
        config = settings_of(SOLVERS.entry(solver), given, hidden=("on_failure", "compile"))
        images, nfe = [], []
        for x, evaluations in self.sample_batches(config):
            images.append(x)
            nfe.append(evaluations)
        if not return_info:
            return torch.cat(images)
        if images[0].is_cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        return torch.cat(images), SampleInfo.of(config, sum(nfe) / len(nfe), seconds)

    def sample_batches(
        self, config: SampleConfig, batches: Iterable[int] | None = None
    ) -> Iterator[tuple[Tensor, float]]:
        """:meth:`sample`, batch by batch, for what does not fit into memory at once: images and NFE of each.

        Args:
            batches: the numbers of the batches that are wanted; None: all of them.
        Raises:
            SolverError: as :meth:`sample`, when the batch is asked for.
        """
        config = config.resolved()
        if config.time_eps is None:
            config = config.model_copy(update={"time_eps": self.time_eps})
        solve = load(config.implementation)
        wanted = list(range(-(-config.count // config.batch)) if batches is None else batches)

        def one_batch(first: int) -> tuple[Tensor, float]:
            streams = PerSampleNoise(config.seed, range(first, min(first + config.batch, config.count)), self.device)

            def draw(shape: Shape = self.latent_shape) -> Tensor:
                return config.temperature * streams.normal(shape)

            # All that the decoder needs comes before what a solver draws, which may depend on the batch.
            z, lower_scales = draw(), [draw(shape) for shape in self.vae.lower_scale_shapes]
            nfe = 0.0
            if self.prior is not None:
                solution = solve(self.prior, z, draw, config)
                z, nfe = solution.y, solution.nfe
            with batch_statistics(self.vae) if config.vae_batch_statistics else nullcontext():
                images = self.decode(z, lower_scales)
            if not images.isfinite().all():
                raise SolverError(f"sample: images after {first} are not finite; the training may have diverged")
            return images, nfe

        self.eval()
        total = 0.0
        with Progress("sampling", len(wanted), "img", config.batch) as bar:
            for done, number in enumerate(wanted, start=1):
                with torch.no_grad():
                    images, nfe = one_batch(number * config.batch)
                total += nfe
                bar.step(f"NFE {total / done:.0f}")
                yield images, nfe

    def compile_prior(self) -> None:
        """Compile the prior for sampling; its weights must not change afterwards.

        Takes up to a minute, at the first call for each batch size; on the CPU it needs a C++ compiler.
        """
        if self.prior is not None:
            self.prior.compile(dynamic=False, options={"freezing": True})

    @torch.no_grad()
    def nelbo_terms(
        self,
        x: Tensor,
        streams: tuple[PerSampleNoise, PerSampleNoise],
        settings: EstimatorConfig = EstimatorConfig(),  # noqa: B008  (frozen)
    ) -> NELBO:
        """-log p(x | z0) + log q(z0 | x) - log p(z0) at one sample z0 ~ q(z0 | x).

        log p(z0) is exact for the prior N(0, I), and estimated or bounded by ``settings`` for the score prior, see
        :func:`lsgm.solvers.likelihood.estimate_log_prob`.

        Args:
            x: images [B, C, H, W] in [0, 1]; zeros and ones where the data are binary, which may be bool. Of any
                floating-point type, or uint8 for values of 0 to 255.
            streams: the draws for these images, see :meth:`per_sample_noise`.
        Raises:
            SolverError: the ODE cannot be solved, or a NELBO is not finite: the training may have diverged.
            LSGMError: the images have another shape or range, are not finite or on another device, or there is none;
                or a setting is out of its range.
        """
        x = self._checked(x, gray=False)
        encoder_draws, prior_draws = streams
        if not len(encoder_draws) == len(prior_draws) == len(x):
            raise LSGMError(f"streams: expected those of {len(x)} images, found those of {len(encoder_draws)}")
        self.eval()
        x = self._seen(x)
        shapes = (self.latent_shape, *self.vae.lower_scale_shapes)
        posterior, parameters = self.vae.encode(2 * x - 1, [encoder_draws.normal(shape) for shape in shapes])
        reconstruction = -self.likelihood.log_prob(x, parameters)
        nfe = 0
        if self.prior is None:
            log_p = standard_log_prob(posterior.z).sum(dim=(1, 2, 3))
        else:
            time_eps = self.time_eps if settings.time_eps is None else settings.time_eps
            log_p, nfe = estimate_log_prob(self.prior, posterior.z, prior_draws, settings, time_eps)
        kl = posterior.log_q.sum(dim=(1, 2, 3)) - log_p + posterior.lower_scales_kl().sum(dim=1)
        nelbo = reconstruction + kl
        if bad := int((~nelbo.isfinite()).sum()):
            raise SolverError(f"nelbo: not finite for {bad} of {len(x)} images; the training may have diverged")
        return NELBO(nelbo, reconstruction, kl, nfe)

    def per_sample_noise(self, seed: int, images: Iterable[int]) -> tuple[PerSampleNoise, PerSampleNoise]:
        """The encoder's draws for images of these numbers, and those of the estimate of log p(z0).

        They are apart, so that models with different priors see the same encoder samples. The seed is one from 0 to
        2^63 - 1, or :class:`LSGMError` is raised.
        """
        seed, numbers = arguments.check_seed(seed), list(images)
        of = [PerSampleNoise(mix(seed, use), numbers, self.device) for use in range(2)]
        return of[0], of[1]

    def nelbo(self, x: Tensor, *, seed: int = 0, samples: int = 1, **settings: Any) -> Tensor:
        """The negative ELBO in nats per image, [B], for images [B, C, H, W] in [0, 1].

        Args:
            samples: K > 1 gives the tighter importance-weighted bound -log (1/K sum_k p(x, z_k) / q(z_k | x)) (Burda et
                al., arXiv 1509.00519), from K encoder samples. What noise the estimate of log p(z0) has makes it too
                low: use `probe="exact"` where that matters.
            settings: those of :class:`lsgm.config.EstimatorConfig`: estimator ("ode"), solver ("rk4"), steps (16
                evaluations), tol, time_eps, probe and probes.
        Raises:
            SolverError, LSGMError: as :meth:`nelbo_terms`; a NELBO that is not finite is never returned.
        """
        config = settings_of(EstimatorConfig, settings)
        samples, x = check_count("samples", samples), self._checked(x, gray=False)
        streams = self.per_sample_noise(seed, range(len(x)))
        terms = [self.nelbo_terms(x, streams, config).nelbo for _ in range(samples)]
        return importance_weighted(torch.stack(terms))


def importance_weighted(nelbo: Tensor) -> Tensor:
    """The bound -log (1/K sum_k exp(-nelbo_k)), [B], from the negative ELBOs of K encoder samples, [K, B]."""
    return math.log(len(nelbo)) - torch.logsumexp(-nelbo, dim=0)


CHECKS: dict[str, Callable[[Any], Any]] = {
    **{name: partial(check_count, name) for name in ("count", "batch", "steps", "probes")},
    "seed": arguments.check_seed,
    "tol": arguments.check_tol,
    "time_eps": arguments.check_time_eps,
    "temperature": arguments.check_temperature,
}


def settings_of(kind: type[C], given: dict[str, Any], hidden: Sequence[str] = ()) -> C:
    """The keyword arguments of a call, which may be numbers of NumPy or PyTorch, as a section of the configuration.

    Raises :class:`LSGMError` in one line if one is unknown or out of its range, or if two do not fit together.
    """
    arguments.check_known(given, [name for name in kind.model_fields if name not in hidden])
    checked = dict(given)
    for name, value in given.items():
        field = kind.model_fields[name]
        if value is None and field.default is None:
            continue
        parts = (field.annotation, *get_args(field.annotation))  # Literal, or Literal | None
        options = [option for part in parts for option in get_args(part) if isinstance(option, str)]
        if name in CHECKS:
            checked[name] = CHECKS[name](value)
        elif options:
            check_choice(name, value, options)
    return parse(kind, checked, "arguments")
