"""How much importance sampling of t, the control variate and stratified t lower the variance of the losses.

    python benchmarks/variance_reduction.py [--model checkpoints/lsgm/mnist_demo --data data/mnist]

1. Importance sampling (the paper's claim iii). For each diffusion and weighting: the relative standard deviation of one
image's loss c(t) / r(t) ||noise - eps(z_t, t)||^2 over images, t and noise, with uniform and with importance-sampled t,
and the ratio of the two variances: how many uniform draws one importance-sampled draw is worth. Two cases:

- Gaussian latents: z0 ~ N(0, I) in D dimensions, and the prediction that is optimal for them;
- a trained model: encodings of test images and its score prior. Its network serves every diffusion: z_t / sqrt(m^2 +
  sigma^2) has the distribution of the model's own z at the time of the same signal-to-noise ratio.

2. The estimators of the cross entropy in the VAE's loss (`train.cross_entropy`), for the trained model: 64 images, of
which the last latent group, (t, noise) are drawn anew. The standard deviation of the batch's cross entropy in nats, and
the rms deviation of one image's gradient with respect to the mean of its last latent group (Euclidean norm) from its
mean; importance-sampled t, weighting ll.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from machine import machine, table
from torch import Tensor

import lsgm
from lsgm.data.batches import preprocess
from lsgm.data.store import ImageStore
from lsgm.networks.posterior import Posterior
from lsgm.prior import ScorePrior
from lsgm.sde import SDE, VESDE, VPSDE, GeometricVPSDE, SubVPSDE
from lsgm.training.batch_noise import BatchNoise
from lsgm.training.control_variate import ControlVariate
from lsgm.training.diffusion import Start
from lsgm.weighting import Sampling, TimeSampler, Weighting

WEIGHTINGS: tuple[Weighting, ...] = ("ll", "un", "re")
Predict = Callable[[SDE, Tensor, Tensor], Tensor]


def optimal(sde: SDE, z_t: Tensor, t: Tensor) -> Tensor:
    return sde.normal_noise(z_t, t[:, None, None, None])


def of_model(prior: ScorePrior) -> Predict:
    """The prior's prediction for z_t of any diffusion."""

    def predict(sde: SDE, z_t: Tensor, t: Tensor) -> Tensor:
        signal, variance = sde.mean_coefficient(t.double()).square(), sde.variance(t.double())
        noise_share = variance / (signal + variance)
        own_t = prior.sde.time_at_variance(noise_share).clamp(0, 1).float()
        scale = (signal + variance).rsqrt().float()[:, None, None, None]
        return prior(scale * z_t, own_t)

    return predict


@torch.no_grad()
def losses(sde: SDE, weighting: Weighting, sampling: Sampling, eps: float, latents: Callable[[int], Tensor],
           predict: Predict, draws: int, batch: int = 1000) -> Tensor:  # fmt: skip
    """The loss of ``draws`` (image, t, noise), [draws]."""
    sampler = TimeSampler(sde, weighting, sampling, eps)
    found = []
    for _ in range(0, draws, batch):
        z0 = latents(batch)
        draw = sampler(torch.rand(batch))
        noise = torch.randn_like(z0)
        z_t = sde.diffuse(z0, noise, draw.t[:, None, None, None])
        error = (noise - predict(sde, z_t, draw.t)).double().square().flatten(1).sum(dim=1)
        found.append(draw.weight.double() * error * (1 - eps if sampling == "uniform" else 1))
    return torch.cat(found)


def row(sde: SDE, weighting: Weighting, eps: float, latents: Callable[[int], Tensor], predict: Predict,
        draws: int) -> list[str]:  # fmt: skip
    """Means (which must agree), relative standard deviations, ratio of the variances."""
    uniform, importance = (losses(sde, weighting, s, eps, latents, predict, draws) for s in ("uniform", "importance"))
    name = f"{type(sde).__name__}, {weighting}"
    means = [f"{x.mean():.4g} ± {x.std() / draws**0.5:.1g}" for x in (uniform, importance)]
    deviations = [f"{x.std() / x.mean():.3f}" for x in (uniform, importance)]
    return [name, *means, *deviations, f"{uniform.var() / importance.var():.2f}"]


KINDS = {"sampled": (False, False), "control variate": (False, True), "marginal": (True, True)}  # marginal, control


def estimators(sde: SDE, eps: float, posterior: Posterior, predict: Predict, draws: int) -> list[str]:
    """Standard deviations of the cross entropy, rms deviations of its gradient: of each kind, with t as it comes and
    stratified."""
    sampler = TimeSampler(sde, "ll", "importance", eps)
    control = ControlVariate(sampler)
    values, gradients = [], []
    mean, std = posterior.mean, posterior.std
    assert mean is not None and std is not None
    drawn = posterior.z[:, : posterior.z.shape[1] - mean.shape[1]]  # the groups before the last one, which stay fixed
    for stratified in (False, True):
        for marginal, controlled in KINDS.values():
            random = BatchNoise(0, len(mean), len(mean), mean.device, torch.Generator().manual_seed(1))
            terms, slopes = [], []
            for _ in range(draws):
                leaf = mean.clone().requires_grad_()
                z = torch.cat([drawn, torch.addcmul(leaf, std, random.normal(tuple(mean.shape[1:])))], dim=1)
                start = Start.of(replace(posterior, z=z, mean=leaf), 1, marginal)
                draw = sampler(random.stratified() if stratified else random.uniform())
                noise = random.normal(tuple(z.shape[1:]))
                z_t, target = start.diffuse(sde, noise, draw.t)
                error = (target - predict(sde, z_t, draw.t)).square()
                loss = (draw.weight[:, None, None, None] * error).sum()
                if controlled:
                    loss = loss + control(sde, start, noise, draw).sum()
                slopes.append(torch.autograd.grad(loss, leaf)[0].flatten(1))
                terms.append(loss.detach() / len(mean))
            values.append(torch.stack(terms).std())
            gradients.append(torch.stack(slopes).var(dim=0).sum(dim=1).mean().sqrt())
    return [type(sde).__name__, *(f"{x:.2f}" for x in (*values, *gradients))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="checkpoints/lsgm/mnist_demo")
    parser.add_argument("--data", default="data/mnist", type=Path)
    parser.add_argument("--draws", type=int, default=100_000, help="for Gaussian latents")
    parser.add_argument("--model-draws", type=int, default=4_000)
    parser.add_argument("--batch-draws", type=int, default=100, help="draws of a batch's (t, noise), part 2")
    parser.add_argument("--only-estimators", action="store_true", help="part 2 alone")
    args = parser.parse_args()
    print(machine(torch.device("cpu")) + "\n")
    torch.manual_seed(0)
    model = lsgm.load(args.model)
    prior = model.prior
    assert prior is not None and model.sde_config is not None
    header = [
        "diffusion, weighting",
        "loss, uniform t",
        "loss, importance",
        "rel. std, uniform",
        "rel. std, importance",
    ]
    header.append("ratio of variances")

    eps, shape = model.sde_config.time_eps, prior.latent_shape
    store = ImageStore(args.data)
    images = torch.from_numpy(store.images("test")[:2000].copy())
    x = preprocess(images, torch.Generator().manual_seed(0), model.image.padded_size, model.image.binary)
    encoded = torch.cat([model.encode(chunk).z for chunk in x.split(250)])
    with torch.no_grad():
        posterior, _ = model.vae.encode(2 * x[:64] - 1)
    farthest = 4 * encoded.flatten(1).square().sum(dim=1).max().item()  # at least the largest squared distance

    diffusions = [VPSDE(0.1, 20.0), GeometricVPSDE(3e-5, 0.999, 3e-5), SubVPSDE(0.1, 20.0), VESDE(3e-5, farthest)]
    if not args.only_estimators:
        print(f"Gaussian latents {list(shape)}, t from 0.01, {args.draws} draws\n")
        rows = [
            row(sde, weighting, 0.01, lambda n: torch.randn(n, *shape), optimal, args.draws)
            for sde in diffusions
            for weighting in WEIGHTINGS
        ]
        print(table(header, rows))

    # each diffusion from the time at which its noise share is that of the model's time_eps
    share = prior.sde.variance(torch.tensor(eps, dtype=torch.float64))
    own = model.sde_config
    diffusions[0] = VPSDE(own.beta_start, own.beta_end, own.sigma2_0 or 0.0)
    rows, of_estimators = [], []
    for sde in diffusions:
        grid = torch.linspace(1e-6, 1, 200_001, dtype=torch.float64)
        shares = sde.variance(grid) / (sde.mean_coefficient(grid).square() + sde.variance(grid))
        start = grid[torch.searchsorted(shares, share).clamp(max=len(grid) - 1)].item()
        pick = lambda n: encoded[torch.randint(len(encoded), (n,))]  # noqa: E731
        if not args.only_estimators:
            rows += [row(sde, w, start, pick, of_model(prior), args.model_draws) for w in WEIGHTINGS]
        of_estimators.append(estimators(sde, start, posterior, of_model(prior), args.batch_draws))
    if rows:
        print(
            f"\n{args.model}: encodings of 2000 test images, from noise share {share:.2g}, {args.model_draws} draws\n"
        )
        print(table(header, rows))
    print(f"\n{args.model}: estimators of the cross entropy of 64 test images, {args.batch_draws} draws\n")
    kinds = [*KINDS, *(f"{kind}, stratified" for kind in KINDS)]
    print(table(["diffusion", *(f"std, {k}" for k in kinds), *(f"gradient, {k}" for k in kinds)], of_estimators))


if __name__ == "__main__":
    main()
