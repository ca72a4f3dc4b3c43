"""The algorithms of LSGM, appendix G.6: how the losses of VAE (q) and prior (p) become one scalar to minimize.

    q:  E_q[-log p(x | z0)] + beta (E_q[log q(z0 | x)] + CE(q(z0 | x) || p(z0)))
        with CE = E[w_ll ||noise - eps(z_t, t)||^2] + constant                                      (theorem 1)
    p:  E[w_p ||noise - eps(z_t, t)||^2], z0 held fixed                                              (section 3.4)

The gradient of each algorithm's scalar trains the VAE with the first loss and the prior with the second. All in nats.
The VAE's loss adds the control variate of the cross entropy (:mod:`lsgm.training.control_variate`): a term with mean 0
that depends on z0 and not on the prior's weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lsgm.networks.posterior import Posterior
from lsgm.prior import ScorePrior
from lsgm.training.diffusion import Start
from lsgm.training.distributed import all_reduce_mean
from lsgm.weighting import TimeDraw


@dataclass
class Sample:
    """The random samples of a step for B images: z0 from the posterior, and R pairs (t, noise) for each z0."""

    posterior: Posterior
    reconstruction: Tensor  # -log p(x | z0), mean over the batch
    negative_entropy: Tensor  # log q(z0 | x) of each latent group, [B, G]
    lower_scales_kl: Tensor  # KL to N(0, I) of each group of lower scales, which the prior does not cover, [B, F]
    start: Start  # z0, or the Gaussian it is drawn from, [R B, C, H, W]
    noise: Tensor  # [R B, C, H, W]
    p_draw: TimeDraw  # times and weights of the prior's loss, [R B]
    q_draw: TimeDraw  # those of the cross entropy: p_draw itself, except in algorithm 2
    variate: Tensor  # control variate of the cross entropy for q_draw and each latent group, [R B, G]
    constant: float  # the constant term of the cross entropy
    beta: float  # the KL coefficient

    @property
    def kl_without_prior(self) -> Tensor:
        """E[log q] of all latents minus log N(0, I) of the lower scales; adding the cross entropy gives the KL."""
        return torch.cat([self.negative_entropy, self.lower_scales_kl], dim=1).sum(dim=1).mean()


@dataclass
class Losses:
    """The scalar to minimize, and two of its terms: the prior's loss, and the cross entropy without its constant."""

    loss: Tensor
    loss_prior: Tensor
    cross_entropy: Tensor


def algorithm_1(prior: ScorePrior, s: Sample, balance: bool = False) -> Losses:
    """Both losses use the weighting w_ll: the VAE's loss also trains the prior (so beta scales the prior's gradient).

    ``balance``: balance the KLs of the groups, as in the first stage (NVAE, section 3.2).
    """
    groups = s.posterior.groups
    error = s.p_draw.weight[:, None] * squared_error(prior, s.start, s.noise, s.p_draw.t, groups)  # [R B, G]
    variate = s.variate.view(-1, *s.negative_entropy.shape).mean(dim=0)  # [B, G]
    loss_prior = error.sum(dim=1).mean()
    shares = per_group(torch.ones_like(s.noise[:1]), groups) / s.noise[0].numel()
    kl = s.negative_entropy + error.view(-1, *s.negative_entropy.shape).mean(dim=0) + variate + s.constant * shares
    kl = torch.cat([kl, s.lower_scales_kl], dim=1)
    gamma = balancing(kl, s.beta, len(groups)) if balance else 1.0
    loss = s.reconstruction + s.beta * (kl * gamma).sum(dim=1).mean()
    return Losses(loss, loss_prior, loss_prior + variate.sum(dim=1).mean())


def algorithm_2(prior: ScorePrior, s: Sample, q_prior: ScorePrior, joint: bool) -> Losses:
    """The VAE's loss has its own times, drawn for w_ll, and its own pass through the score network.

    Args:
        q_prior: the prior that the VAE's pass sees: ``prior``, or its average.
        joint: one pass with twice the batch; otherwise two passes, one after the other.
    """
    ends = s.start.diffuse(prior.sde, s.noise, s.q_draw.t)
    z_p, target_p = s.start.detach().diffuse(prior.sde, s.noise, s.p_draw.t)
    # q's graph through the network ends at z_q and its target and is freed before p's starts
    z_q, target_q = (end.detach().requires_grad_() for end in ends)

    def q_loss(predicted: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        loss = (s.q_draw.weight * (target_q - predicted).square().sum(dim=(1, 2, 3))).mean()
        return loss, torch.autograd.grad(loss, (z_q, target_q), retain_graph=joint)

    if joint:
        predicted_q, predicted_p = prior(torch.cat([z_q, z_p]), torch.cat([s.q_draw.t, s.p_draw.t])).chunk(2)
        cross_entropy, gradients = q_loss(predicted_q)
    else:
        with _frozen(q_prior):
            cross_entropy, gradients = q_loss(q_prior(z_q, s.q_draw.t))
        predicted_p = prior(z_p, s.p_draw.t)
    loss_prior = (s.p_draw.weight * (target_p - predicted_p).square().sum(dim=(1, 2, 3))).mean()
    # has the cross entropy's gradient, but not its value
    linear = torch.stack([(end * gradient).sum() for end, gradient in zip(ends, gradients, strict=True)]).sum()
    cross_entropy = cross_entropy.detach() + linear - linear.detach() + s.variate.sum(dim=1).mean()
    return Losses(
        s.reconstruction + s.beta * (s.kl_without_prior + cross_entropy) + loss_prior, loss_prior, cross_entropy
    )


def algorithm_3(prior: ScorePrior, s: Sample) -> Losses:
    """The VAE's loss reuses the prior's times, reweighted to w_ll.

    The two losses differ by a factor per image, so the backward pass of the prior's loss gives both gradients. Before
    it reaches the encoder, an image's gradient is multiplied by beta w_ll / w_p. (The paper does two backward passes.)
    The control variate's gradient is added beside it.
    """
    factor = s.beta * s.p_draw.likelihood_weight / s.p_draw.weight
    error = squared_error(prior, s.start, s.noise, s.p_draw.t, factor=factor).sum(dim=1)
    loss_prior = (s.p_draw.weight * error).mean()
    variate = s.variate.sum(dim=1).mean()
    cross_entropy = (s.p_draw.likelihood_weight * error.detach()).mean() + variate
    loss = s.reconstruction + s.beta * (s.kl_without_prior + variate) + loss_prior
    return Losses(loss, loss_prior, cross_entropy)


def frozen_vae(prior: ScorePrior, s: Sample) -> Losses:
    """Only the prior's loss, on samples from a frozen VAE (the paper's two-stage ablation)."""
    error = squared_error(prior, s.start, s.noise, s.p_draw.t).sum(dim=1)
    loss_prior = (s.p_draw.weight * error).mean()
    cross_entropy = (s.p_draw.likelihood_weight * error + s.variate.sum(dim=1)).mean()
    return Losses(loss_prior, loss_prior, cross_entropy)


def squared_error(
    prior: ScorePrior,
    start: Start,
    noise: Tensor,
    t: Tensor,
    groups: tuple[int, ...] | None = None,
    factor: Tensor | None = None,
) -> Tensor:
    """||noise - eps(z_t, t)||^2 of each latent group, [B, G], for times [B]; by default all latents are one group.

    Of a Gaussian ``start`` ||E[noise | z_t] - eps(z_t, t)||^2. ``factor`` [B] multiplies the gradient with respect to
    ``start``.
    """
    z_t, target = start.diffuse(prior.sde, noise, t)
    if factor is not None:
        z_t, target = (_ScaleGradient.apply(v, factor[:, None, None, None]) for v in (z_t, target))
    return per_group((target - prior(z_t, t)).square(), groups or (noise.shape[1],))


def per_group(x: Tensor, groups: tuple[int, ...]) -> Tensor:
    """Sums over space and over the channels of each latent group: [B, C, H, W] -> [B, G]."""
    return torch.stack([g.sum(dim=1) for g in x.sum(dim=(2, 3)).split(groups, dim=1)], dim=1)


def balancing(kl: Tensor, beta: float, groups_per_scale: int) -> Tensor | float:
    """gamma_g of KL balancing, [G]: proportional to (mean |KL_g| + 0.01) / a_g, normalized to mean 1, without gradient.

    a_g = 4^s is the size of the group's scale (s = 0 for the smallest, which comes first). There is no balancing once
    beta reaches 1 (NVAE, section 3.2).
    """
    if beta >= 1 or kl.shape[1] == 1:
        return 1.0
    scale = torch.arange(kl.shape[1], device=kl.device) // groups_per_scale
    mean = kl.detach().abs().mean(dim=0)
    all_reduce_mean([mean])
    gamma = (mean + 0.01) / 4.0**scale
    return gamma / gamma.mean()


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """Compute no gradients of the module's weights."""
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
