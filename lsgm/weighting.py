"""Which t to draw for the prior's loss, and what weight the draw carries (LSGM, section 3.4 and appendix B).

The loss is E_t[c(t) ||noise - prediction||^2]. With z0 ~ N(0, I) and alpha -> 0 the squared error is D s(t) in
expectation, s(t) = m_t^2 / (m_t^2 + sigma_t^2). Drawing t from

    r(t) = c(t) s(t) / Z,   Z = the integral of c s over [time_eps, 1],

makes the weighted error c / r ||...||^2 the same for every t there: its variance over t vanishes. Every proposal below
is this one; where the integral has a closed form it is used, else its inverse is tabulated. All in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lsgm.sde import SDE, VESDE, VPSDE, GeometricVPSDE

Weighting = Literal["ll", "un", "re", "rescale"]
Sampling = Literal["importance", "uniform"]


@dataclass
class TimeDraw:
    """Times and what they weigh; each [B]."""

    t: Tensor
    weight: Tensor  # c(t) / r(t): factor of the squared error in the loss
    likelihood_weight: Tensor  # the same for c = ll: what algorithm 3 gives to the encoder's loss


@dataclass
class Proposal:
    """A density r(t) = c(t) s(t) / Z on [time_eps, 1], by its inverse distribution function."""

    time_at: Callable[[Tensor], Tensor]  # rho ~ U[0, 1] -> t ~ r
    integral: float  # Z


class TimeSampler:
    """Map rho ~ U[0, 1] [B] to times in [time_eps, 1] and their weights.

    Args:
        weighting: c(t) = g^2 / (2 sigma^2) for `ll` (the likelihood), 1 for `un`, g^2 / 2 for `re`, 1 / (2 s) for
            `rescale`.
        sampling: `importance`, from r(t) above; for the sub-VPSDE, from that of the VPSDE. Or `uniform`: weight c(t),
            as published without the factor 1 - time_eps. For `rescale` both are the same.
    """

    def __init__(self, sde: SDE, weighting: Weighting, sampling: Sampling, time_eps: float) -> None:
        self.sde = sde
        self.weighting = weighting
        self.sampling = sampling
        self.time_eps = time_eps
        self.proposal: Proposal | None = None  # uniform
        if sampling == "importance" and weighting != "rescale":
            of = (sde.proposal, weighting, time_eps)
            self.proposal = closed_form(*of) or tabulated(*of)

    def __call__(self, rho: Tensor) -> TimeDraw:
        if self.proposal is None:
            t = self.time_eps + (1 - self.time_eps) * rho.double()
            inverse_density: Tensor | float = 1.0
        else:
            t = self.proposal.time_at(rho.double()).clamp(self.time_eps, 1)
            of = self.sde.proposal
            inverse_density = self.proposal.integral / (coefficient(of, self.weighting, t) * of.alpha_bar(t))
        weight = coefficient(self.sde, self.weighting, t) * inverse_density
        likelihood_weight = coefficient(self.sde, "ll", t) * inverse_density
        return TimeDraw(*(x.to(rho.dtype) for x in (t, weight, likelihood_weight)))

    def cross_entropy_constant(self) -> float:
        """What the cross entropy adds per latent dimension: (1 + log(2 pi sigma_eps^2)) / 2 nats (theorem 1)."""
        variance = self.sde.variance(torch.tensor(self.time_eps, dtype=torch.float64)).item()
        return 0.5 * (1 + math.log(math.tau * variance))


def coefficient(sde: SDE, weighting: Weighting, t: Tensor) -> Tensor:
    """c(t), the factor of the squared error in the loss with uniform t."""
    if weighting == "ll":
        return sde.diffusion_squared(t) / (2 * sde.variance(t))
    if weighting == "un":
        return torch.ones_like(t)
    if weighting == "re":
        return sde.diffusion_squared(t) / 2
    return 0.5 / sde.alpha_bar(t)


def closed_form(sde: SDE, weighting: Weighting, time_eps: float) -> Proposal | None:
    """The proposal by an integral of c s that is known, None where there is none.

    The integral is a function of the variance v = sigma_t^2, apart from that of `un` on the VPSDE: there it is an
    integral over a Gaussian in t.
    """
    ends = torch.tensor([time_eps, 1.0], dtype=torch.float64)
    if isinstance(sde, VPSDE) and weighting == "un":
        # s = (1 - s0) e^-B and B = k (t + h)^2 - k h^2
        k = 0.5 * (sde.beta_end - sde.beta_start)
        if k <= 0 or 0.5 * sde.beta_start / math.sqrt(k) > 3:  # nearly constant beta: the Gaussian's far tail
            return None
        h = 0.5 * sde.beta_start / k
        low, high = torch.erf(math.sqrt(k) * (ends + h)).tolist()
        scale = (1 - sde.sigma2_0) * math.exp(k * h * h) * math.sqrt(math.pi / k) / 2
        return Proposal(lambda rho: torch.erfinv(low + (high - low) * rho) / math.sqrt(k) - h, scale * (high - low))

    # F(v) with dF/dt = c s / factor, and its inverse
    integral: Callable[[Tensor], Tensor]
    inverse: Callable[[Tensor], Tensor]
    if isinstance(sde, (VPSDE, GeometricVPSDE)) and weighting == "ll":
        integral, inverse, factor = torch.log, torch.exp, 0.5
    elif isinstance(sde, (VPSDE, GeometricVPSDE)) and weighting == "re":
        integral, inverse, factor = torch.clone, torch.clone, 0.5
    elif isinstance(sde, VESDE) and weighting == "re":
        s0 = sde.sigma2_0
        integral, inverse, factor = lambda v: torch.log1p(v - s0), lambda y: torch.expm1(y) + s0, 0.5
    elif isinstance(sde, VESDE):  # `un` is `ll` over log(r) / 2: g^2 / sigma^2 is constant
        s0 = sde.sigma2_0
        integral, inverse = lambda v: torch.log(v / (1 + v - s0)), lambda y: (s0 - 1) * torch.exp(y) / torch.expm1(y)
        factor = (0.5 if weighting == "ll" else 1 / sde.log_ratio) / (1 - s0)
    else:
        return None
    low, high = integral(sde.variance(ends)).tolist()
    return Proposal(lambda rho: sde.time_at_variance(inverse(low + (high - low) * rho)), factor * (high - low))


def tabulated(sde: SDE, weighting: Weighting, time_eps: float, nodes: int = 8192) -> Proposal:
    """The proposal of any c s: linear between ``nodes`` nodes, inverted cell by cell.

    Half of the nodes are equidistant in t and half in log t, for densities that rise towards 0.
    """
    t = torch.cat(
        [
            torch.linspace(time_eps, 1, nodes // 2, dtype=torch.float64),
            torch.logspace(math.log10(max(time_eps, 1e-8)), 0, nodes // 2, dtype=torch.float64),
        ]
    ).clamp(time_eps, 1)
    t = t.unique()
    density = coefficient(sde, weighting, t) * sde.alpha_bar(t)
    width, slope = t.diff(), density.diff() / t.diff()
    mass = torch.cat([t.new_zeros(1), (0.5 * (density[1:] + density[:-1]) * width).cumsum(0)])

    def time_at(rho: Tensor) -> Tensor:
        nodes_, start, rise, cumulative = (x.to(rho.device) for x in (t, density, slope, mass))
        target = rho * cumulative[-1]
        cell = (torch.searchsorted(cumulative, target, right=True) - 1).clamp(0, len(rise) - 1)
        # the root u of slope u^2 / 2 + density u = what is left, in its stable form
        left, d, a = target - cumulative[cell], start[cell], rise[cell]
        return nodes_[cell] + 2 * left / (d + torch.sqrt((d * d + 2 * a * left).clamp(min=0)))

    return Proposal(time_at, mass[-1].item())
