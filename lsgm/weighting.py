"""Weightings of the denoising loss, and variance reduction by importance sampling of t (LSGM, section 3.4, appendix B).

The prior's loss is the denoising score matching integral (LSGM, theorem 1, with the factor 1/2 in c)

    E_{t ~ U[time_eps, 1]} [c(t) ||noise - eps(z_t, t)||^2].

If z0 ~ N(0, I) and the mixing coefficient alpha -> 0, the expected squared error is D s(t) in D dimensions, with
s(t) = m_t^2 / (m_t^2 + sigma_t^2) = :meth:`SDE.alpha_bar`. Then t drawn from the proposal

    r(t) = c(t) s(t) / Z,   Z = the integral of c s over [time_eps, 1],

give the same c(t) / r(t) ||...||^2 in expectation for every t: its variance over t vanishes. All proposals below are of
this form. The integral has a closed form for some (appendix B); for the others its inverse is tabulated, in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lsgm.normal_error import integrated_normal_error
from lsgm.sde import SDE, VESDE, VPSDE, GeometricVPSDE

Weighting = Literal["ll", "un", "re", "rescale"]
Sampling = Literal["importance", "uniform"]


@dataclass
class TimeDraw:
    """Times and the weights of the squared error at them; each [B]."""

    t: Tensor
    weight: Tensor  # c(t) / r(t), of the prior's loss
    likelihood_weight: Tensor  # g^2 / (2 sigma^2) / r(t), of the encoder's loss (appendix G.6, algorithm 3)


@dataclass
class Proposal:
    """A density r(t) = c(t) s(t) / Z on [time_eps, 1], by its inverse distribution function."""

    time_at: Callable[[Tensor], Tensor]  # rho ~ U[0, 1] -> t ~ r
    integral: float  # Z


class TimeSampler:
    """Map rho ~ U[0, 1], [B], to times in [time_eps, 1] and their weights (LSGM, section 3.4).

    Args:
        weighting: c(t), see :func:`coefficient`.
        sampling: `importance` draws t from r(t), for the sub-VPSDE from the proposal of the VPSDE. `uniform` draws
            uniform t with the weight c(t), as published without the factor 1 - time_eps. `rescale` is always uniform.
        time_eps: smallest time that is drawn.
    """

    def __init__(self, sde: SDE, weighting: Weighting, sampling: Sampling, time_eps: float) -> None:
        self.sde = sde
        self.weighting = weighting
        self.sampling = sampling
        self.time_eps = time_eps
        self._smallest_variance = sde.variance(torch.tensor(time_eps, dtype=torch.float64)).item()
        self.proposal: Proposal | None = None  # uniform
        if sampling == "importance" and weighting != "rescale":
            settings = (sde.proposal, weighting, time_eps)
            self.proposal = closed_form(*settings) or tabulated(*settings)

    def __call__(self, rho: Tensor) -> TimeDraw:
        if self.proposal is None:
            t = self.time_eps + (1 - self.time_eps) * rho.double()
            inverse_density: Tensor | float = 1.0
        else:
            t = self.proposal.time_at(rho.double()).clamp(self.time_eps, 1)
            sde = self.sde.proposal
            inverse_density = self.proposal.integral / (coefficient(sde, self.weighting, t) * sde.alpha_bar(t))
        weight = coefficient(self.sde, self.weighting, t) * inverse_density
        likelihood_weight = coefficient(self.sde, "ll", t) * inverse_density
        return TimeDraw(*(x.to(rho.dtype) for x in (t, weight, likelihood_weight)))

    def cross_entropy_constant(self) -> float:
        """The constant of theorem 1 in nats per latent dimension: (1 + log(2 pi sigma^2)) / 2 at t = time_eps."""
        return 0.5 * (1 + math.log(math.tau * self._smallest_variance))

    def normal_cross_entropy(self) -> tuple[float, float]:
        """(A, B): given z0, the mean of likelihood_weight ||noise - normal_noise||^2 is A D + B ||z0||^2, in nats.

        Like the weights, it is without the factor 1 - time_eps if t are uniform.
        """
        a, b = integrated_normal_error(self.sde, self.time_eps)
        interval = 1 - self.time_eps if self.proposal is None else 1.0
        return a / interval, b / interval


def coefficient(sde: SDE, weighting: Weighting, t: Tensor) -> Tensor:
    """c(t), the factor of the squared error in the loss with uniform t (LSGM, section 3.3).

    - `ll`, likelihood weighting: g^2 / (2 sigma^2), that of theorem 1;
    - `un`, unweighted: 1, for the best samples;
    - `re`, reweighted: g^2 / 2, in between;
    - `rescale`: 1 / (2 s), an experiment of the published code that the paper does not have.
    """
    if weighting == "ll":
        return sde.diffusion_squared(t) / (2 * sde.variance(t))
    if weighting == "un":
        return torch.ones_like(t)
    if weighting == "re":
        return sde.diffusion_squared(t) / 2
    return 0.5 / sde.alpha_bar(t)


def closed_form(sde: SDE, weighting: Weighting, time_eps: float) -> Proposal | None:
    """The proposal if the integral of c s has a closed form, else None (LSGM, appendix B).

    The integral is a function of the variance v = sigma_t^2. Only for `un` on the VPSDE it is that of a Gaussian in
    t.
    """
    ends = torch.tensor([time_eps, 1.0], dtype=torch.float64)
    kind = type(sde)  # a subclass may have another schedule
    if isinstance(sde, VPSDE) and kind is VPSDE and weighting == "un":
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
    if kind in (VPSDE, GeometricVPSDE) and weighting == "ll":
        integral, inverse, factor = torch.log, torch.exp, 0.5
    elif kind in (VPSDE, GeometricVPSDE) and weighting == "re":
        integral, inverse, factor = torch.clone, torch.clone, 0.5
    elif isinstance(sde, VESDE) and kind is VESDE and weighting == "re":
        s0 = sde.sigma2_0
        integral, inverse, factor = lambda v: torch.log1p(v - s0), lambda y: torch.expm1(y) + s0, 0.5
    elif isinstance(sde, VESDE) and kind is VESDE:  # `un` is `ll` over log(r) / 2: g^2 / sigma^2 is constant
        s0 = sde.sigma2_0
        integral, inverse = lambda v: torch.log(v / (1 + v - s0)), lambda y: (s0 - 1) * torch.exp(y) / torch.expm1(y)
        factor = (0.5 if weighting == "ll" else 1 / sde.log_ratio) / (1 - s0)
    else:
        return None
    low, high = integral(sde.variance(ends)).tolist()
    return Proposal(lambda rho: sde.time_at_variance(inverse(low + (high - low) * rho)), factor * (high - low))


def tabulated(sde: SDE, weighting: Weighting, time_eps: float, nodes: int = 8192) -> Proposal:
    """The proposal of any SDE and weighting: c s is linear between ``nodes`` nodes, its integral inverted cell by cell.

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
    tables = {t.device: (t, density, slope, mass)}

    def time_at(rho: Tensor) -> Tensor:
        if rho.device not in tables:  # copied once: every copy to a GPU waits for it
            tables[rho.device] = (t.to(rho.device), density.to(rho.device), slope.to(rho.device), mass.to(rho.device))
        nodes_, start, rise, cumulative = tables[rho.device]
        target = rho * cumulative[-1]
        cell = (torch.searchsorted(cumulative, target, right=True) - 1).clamp(0, len(rise) - 1)
        # the root u of slope u^2 / 2 + density u = what is left, in its stable form
        left, d, a = target - cumulative[cell], start[cell], rise[cell]
        return nodes_[cell] + 2 * left / (d + torch.sqrt((d * d + 2 * a * left).clamp(min=0)))

    return Proposal(time_at, mass[-1].item())
