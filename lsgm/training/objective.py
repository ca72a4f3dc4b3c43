"""What is minimized (LSGM, sections 3.1 to 3.4; NVAE, section 3.2). All in nats per image."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lsgm.model import LSGM
from lsgm.networks.posterior import HALF_LOG_2PI, Posterior
from lsgm.prior import ScorePrior
from lsgm.training.batch_noise import BatchNoise, all_of
from lsgm.training.distributed import all_reduce_mean
from lsgm.weighting import TimeDraw, TimeSampler

Algorithm = Literal[1, 2, 3]


@dataclass
class Objective:
    """A loss and the terms that it is made of, to be looked at; scalars and vectors, means over the batch."""

    loss: Tensor
    terms: dict[str, Tensor]


def per_group(x: Tensor, groups: tuple[int, ...]) -> Tensor:
    """Sums over space and over the channels of each latent group: [B, C, H, W] -> [B, G]."""
    return torch.stack([g.sum(dim=1) for g in x.sum(dim=(2, 3)).split(groups, dim=1)], dim=1)


def balancing(kl: Tensor, beta: float, groups_per_scale: int) -> Tensor | float:
    """gamma_g of KL balancing, [G]: proportional to (mean |KL_g| + 0.01) / a_g, of mean 1, treated as constant.

    a_g = 4^s, the size of the group's scale (s = 0 for the smallest, which comes first). From beta = 1 on there is no
    balancing.
    """
    if beta >= 1 or kl.shape[1] == 1:
        return 1.0
    scale = torch.arange(kl.shape[1], device=kl.device) // groups_per_scale
    mean = kl.detach().abs().mean(dim=0)
    all_reduce_mean([mean])  # over the processes
    gamma = (mean + 0.01) / 4.0**scale
    return gamma / gamma.mean()


def kl_to_normal(posterior: Posterior) -> Tensor:
    """log q - log N(0, I) at the sample for each latent group, top first, [B, G]."""
    top = per_group(posterior.log_q + 0.5 * posterior.z.square() + HALF_LOG_2PI, posterior.groups)
    return torch.cat([top, posterior.lower_scales_kl()], dim=1)


@torch.no_grad()
def _kl_vectors(posterior: Posterior) -> dict[str, Tensor]:
    """KL(q || N(0, I)) of the prior's channels and of the groups of lower scales, means over the batch."""
    vectors = {"kl_per_channel": posterior.kl_per_channel()}
    if posterior.lower_scales:
        vectors["lower_scales_kl_per_group"] = posterior.lower_scales_kl().mean(dim=0)
    return vectors


def _noise(model: LSGM, random: BatchNoise) -> list[Tensor]:
    """The encoder's normal draws."""
    return [random.normal(shape) for shape in (model.latent_shape, *model.vae.lower_scale_shapes)]


class VAEObjective:
    """First stage: reconstruction + beta * sum over groups of gamma_g KL_g(q || N(0, I)), balanced while beta < 1."""

    def __call__(self, model: LSGM, x: Tensor, beta: float, random: BatchNoise | None = None) -> Objective:
        posterior, parameters = model.vae.encode(2 * x - 1, _noise(model, random or all_of(x)))
        reconstruction = -model.likelihood.log_prob(x, parameters)
        kl = kl_to_normal(posterior)  # [B, G]
        gamma = balancing(kl, beta, len(posterior.groups))
        loss = (reconstruction + beta * (gamma * kl).sum(dim=1)).mean()
        kl_total = kl.detach().sum(dim=1).mean()
        terms = {"reconstruction": reconstruction.detach().mean(), "kl": kl_total}
        return Objective(loss, {"nelbo": terms["reconstruction"] + kl_total} | terms | _kl_vectors(posterior))


class LSGMObjective:
    """Second stage: one scalar whose gradient trains VAE (q) and prior (p), each by its own loss.

        q:  E_q[-log p(x|z0)] + beta (E_q[log q(z0|x)] + CE(q(z0|x) || p(z0)))
            with CE = E[w_q ||noise - eps(z_t, t)||^2] + constant
        p:  E[w_p ||noise - eps(z_t, t)||^2], z0 held fixed

    w_q is the weighting of the likelihood (theorem 1), w_p any. The algorithms of appendix G.6, by ``algorithm``:

    1. The weightings are the same. The q loss is everybody's (so beta scales the prior's gradient too).
    2. q draws its own t for w_ll, through ``q``, and passes the network on its own.
    3. q takes p's t with the weight of the likelihood. The two losses differ by a factor per image, so
       one backward pass of p's loss gives both: on its way to the encoder an image's gradient is multiplied by
       beta w_q / w_p. (The paper takes two passes over one graph.)

    Args:
        p: draws t for the prior.
        q: draws t for the VAE; algorithm 2 only.
        joint: algorithm 2 takes both through the network in one pass of twice the batch, else in turn.
        q_prior: the prior that q's pass sees (algorithm 2, in turn), one with averaged weights; None: the trained one.
        time_samples: samples of (t, noise) per latent and step. More cost passes of the score network and lower the
            variance of the gradient, the encoder's too.
        balance: balance the groups' KLs (algorithm 1 only).
        train_vae: False: p's loss alone, on samples of a frozen VAE.
    """

    def __init__(
        self,
        p: TimeSampler,
        algorithm: Algorithm = 1,
        *,
        q: TimeSampler | None = None,
        joint: bool = False,
        q_prior: ScorePrior | None = None,
        time_samples: int = 1,
        balance: bool = False,
        train_vae: bool = True,
    ) -> None:
        self.p, self.algorithm, self.q, self.joint, self.q_prior = p, algorithm, q, joint, q_prior
        self.time_samples, self.balance, self.train_vae = time_samples, balance, train_vae

    def __call__(self, model: LSGM, x: Tensor, beta: float, random: BatchNoise | None = None) -> Objective:
        prior = model.prior
        assert isinstance(prior, ScorePrior)
        random = random or all_of(x)
        with torch.set_grad_enabled(self.train_vae):
            posterior, parameters = model.vae.encode(2 * x - 1, _noise(model, random))
            reconstruction = -model.likelihood.log_prob(x, parameters).mean()
        groups = posterior.groups
        negative_entropy = per_group(posterior.log_q, groups)  # [B, G]
        lower_scales_kl = posterior.lower_scales_kl()  # of the scales that the prior does not cover, [B, F]
        kl_without_prior = torch.cat([negative_entropy, lower_scales_kl], dim=1).sum(dim=1).mean()
        z0 = posterior.z.repeat(self.time_samples, 1, 1, 1)
        draw = self.p(random.uniform(self.time_samples))
        noise = random.normal(model.latent_shape, self.time_samples)
        constant = self.p.cross_entropy_constant() * z0[0].numel()

        if not self.train_vae:
            error = self.squared_error(prior, z0, noise, draw.t).sum(dim=1)
            loss = loss_prior = (draw.weight * error).mean()
            cross_entropy = (draw.likelihood_weight * error).mean()
        elif self.algorithm == 1:
            error = draw.weight[:, None] * self.squared_error(prior, z0, noise, draw.t, groups)  # [B, G]
            cross_entropy = loss_prior = error.sum(dim=1).mean()
            shares = torch.tensor(groups, device=x.device) / sum(groups)
            kl = negative_entropy + error.view(self.time_samples, -1, len(groups)).mean(dim=0) + constant * shares
            kl = torch.cat([kl, lower_scales_kl], dim=1)
            gamma = balancing(kl, beta, len(groups)) if self.balance else 1.0
            loss = reconstruction + beta * (kl * gamma).sum(dim=1).mean()
        elif self.algorithm == 3:
            factor = beta * draw.likelihood_weight / draw.weight
            error = self.squared_error(prior, z0, noise, draw.t, factor=factor).sum(dim=1)
            loss_prior = (draw.weight * error).mean()
            cross_entropy = (draw.likelihood_weight * error.detach()).mean()
            loss = reconstruction + beta * kl_without_prior + loss_prior
        else:
            cross_entropy, loss_prior = self._own(prior, z0, noise, draw, random.uniform(self.time_samples))
            loss = reconstruction + beta * (kl_without_prior + cross_entropy) + loss_prior

        terms = {
            "reconstruction": reconstruction.detach(),
            "negative_entropy": negative_entropy.detach().sum(dim=1).mean(),
            "cross_entropy": cross_entropy.detach() + constant,
        }
        if posterior.lower_scales:
            terms["lower_scales_kl"] = lower_scales_kl.detach().sum(dim=1).mean()
        terms = {"nelbo": torch.stack(list(terms.values())).sum()} | terms
        return Objective(loss, terms | {"loss_prior": loss_prior.detach()} | _kl_vectors(posterior))

    def _own(self, prior: ScorePrior, z0: Tensor, noise: Tensor, draw: TimeDraw, rho: Tensor) -> tuple[Tensor, Tensor]:
        """q's cross entropy without its constant, with a gradient for the encoder alone, and p's loss."""
        assert self.q is not None
        q_draw = self.q(rho)
        z_q = prior.sde.diffuse(z0, noise, q_draw.t[:, None, None, None])
        z_p = prior.sde.diffuse(z0.detach(), noise, draw.t[:, None, None, None])
        leaf = z_q.detach().requires_grad_()  # q's graph through the network ends here, and is freed before p's starts

        def q_loss(predicted: Tensor) -> tuple[Tensor, Tensor]:
            loss = (q_draw.weight * (noise - predicted).square().sum(dim=(1, 2, 3))).mean()
            return loss, torch.autograd.grad(loss, leaf, retain_graph=self.joint)[0]

        if self.joint:
            predicted_q, predicted_p = prior(torch.cat([leaf, z_p]), torch.cat([q_draw.t, draw.t])).chunk(2)
            cross_entropy, gradient = q_loss(predicted_q)
        else:
            q_prior = self.q_prior or prior
            with _frozen(q_prior):
                cross_entropy, gradient = q_loss(q_prior(leaf, q_draw.t))
            predicted_p = prior(z_p, draw.t)
        loss_prior = (draw.weight * (noise - predicted_p).square().sum(dim=(1, 2, 3))).mean()
        linear = (z_q * gradient).sum()  # has the cross entropy's gradient; its value is put right below
        return cross_entropy.detach() + linear - linear.detach(), loss_prior

    @staticmethod
    def squared_error(
        prior: ScorePrior,
        z0: Tensor,
        noise: Tensor,
        t: Tensor,
        groups: tuple[int, ...] | None = None,
        factor: Tensor | None = None,
    ) -> Tensor:
        """||noise - eps(z_t, t)||^2 of each latent group, [B, G], for times [B]; all latents are one group by default.

        ``factor`` [B] multiplies the gradient with respect to ``z0``.
        """
        z_t = prior.sde.diffuse(z0, noise, t[:, None, None, None])
        if factor is not None:
            z_t = _ScaleGradient.apply(z_t, factor[:, None, None, None])
        return per_group((noise - prior(z_t, t)).square(), groups or (z0.shape[1],))


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """No gradient goes to the module's weights."""
    before = [p.requires_grad for p in module.parameters()]
    try:
        module.requires_grad_(False)
        yield
    finally:
        for p, wanted in zip(module.parameters(), before, strict=True):
            p.requires_grad_(wanted)


class _ScaleGradient(torch.autograd.Function):
    """The identity, whose gradient is multiplied by ``factor``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(factor)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (factor,) = ctx.saved_tensors
        return gradient * factor, None
