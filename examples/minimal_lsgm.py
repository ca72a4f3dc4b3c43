"""A small LSGM on MNIST in a plain loop: what the library's engine does, without the engine.

    lsgm prepare --config examples/mnist.json --out data/mnist
    python examples/minimal_lsgm.py --data data/mnist --out minimal

Stage 1 trains a VAE with the prior N(0, I), stage 2 trains VAE and score prior end to end (LSGM, sections 3.1 to 3.4),
by algorithm 1 of appendix G.6. The images of --out/samples.png come from the probability-flow ODE. The defaults take
about five minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
from torch import Tensor

from lsgm import checkpoint
from lsgm.config import BackboneConfig, ConvVAEConfig, DiffusionConfig, NCSNppConfig, PriorConfig, SDEConfig
from lsgm.data.batches import preprocess
from lsgm.data.store import ImageStore
from lsgm.evaluation.image_grids import save_grid
from lsgm.model import LSGM
from lsgm.weighting import TimeSampler

VAE = ConvVAEConfig(channels=16, channel_mult=[1, 2, 4, 4], latents=8, likelihood="bernoulli")
PRIOR = NCSNppConfig(channels=64, scales=1, cells_per_scale=2, dropout=0.0, mixing_logit_init=-2.5)
TIME_EPS = 0.01
SDE = SDEConfig(name="vpsde", beta_end=10.0, time_eps=TIME_EPS)


def batches(store: ImageStore, size: int, count: int, padded_size: int):
    """``count`` random batches of binary images [B, 1, H, W] with a border of zeros."""
    images = torch.tensor(store.images("train")[:], dtype=torch.uint8)
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        rows = torch.randint(len(images), (size,), generator=generator)
        yield preprocess(images[rows], generator, padded_size)


def encode(model: LSGM, x: Tensor):
    """A sample of q(z0 | x), and the two terms of the NELBO that need no prior, each [B], nats."""
    posterior, parameters = model.vae.encode(2 * x - 1)
    reconstruction = -model.likelihood.log_prob(x, parameters)  # -log p(x | z0)
    negative_entropy = posterior.log_q.sum(dim=(1, 2, 3))  # log q(z0 | x)
    return posterior, reconstruction, negative_entropy


def pretrain(model: LSGM, store: ImageStore, steps: int, batch: int) -> None:
    """Stage 1: the VAE with the prior N(0, I), its KL coefficient rising to 0.7 over the first half."""
    optimizer = torch.optim.Adamax(model.vae.parameters(), lr=1e-2, eps=1e-3)
    for step, x in enumerate(batches(store, batch, steps, model.image.padded_size)):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - step / steps) + 1e-4
        beta = 0.7 * min(1.0, 2 * (step + 1) / steps)
        posterior, reconstruction, negative_entropy = encode(model, x)
        log_p = torch.distributions.Normal(0.0, 1.0).log_prob(posterior.z).sum(dim=(1, 2, 3))
        kl = negative_entropy - log_p
        loss = (reconstruction + beta * kl).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        report("VAE", step, steps, (reconstruction + kl).mean())


def train(model: LSGM, store: ImageStore, steps: int, batch: int) -> None:
    """Stage 2: both networks by one loss, E[-log p(x | z0) + log q(z0 | x)] + CE(q(z0 | x) || p(z0)) (theorem 1)."""
    prior = model.prior
    assert prior is not None
    times = TimeSampler(prior.sde, weighting="ll", sampling="importance", time_eps=TIME_EPS)
    averaged = copy.deepcopy(prior).requires_grad_(False)
    optimizers = [
        torch.optim.AdamW(model.vae.parameters(), lr=5e-4, eps=1e-3),
        torch.optim.AdamW(prior.parameters(), lr=2e-3, eps=1e-4),
    ]
    for step, x in enumerate(batches(store, batch, steps, model.image.padded_size)):
        for optimizer, lr in zip(optimizers, (5e-4, 2e-3), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = lr * min(1.0, (step + 1) / 50) * (1 - step / steps) + 1e-5

        # 1. Encode the images.
        posterior, reconstruction, negative_entropy = encode(model, x)
        # 2. Draw times for the weighting of the likelihood, and diffuse the latents: z_t = m_t z0 + sigma_t noise.
        draw = times(torch.rand(len(x)))
        noise = torch.randn_like(posterior.z)
        z_t = prior.sde.diffuse(posterior.z, noise, draw.t[:, None, None, None])
        # 3. The cross entropy of theorem 1, with the mixed score of section 3.2.
        error = (noise - prior(z_t, draw.t)).square().sum(dim=(1, 2, 3))
        cross_entropy = draw.weight * error + times.cross_entropy_constant() * noise[0].numel()
        # 4. The NELBO trains VAE and prior together.
        loss = (reconstruction + negative_entropy + cross_entropy).mean()
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        # 5. The moving average of the prior's weights is what samples are drawn with.
        with torch.no_grad():
            decay = min(0.995, step / (step + 10))
            for average, weight in zip(averaged.parameters(), prior.parameters(), strict=True):
                average.lerp_(weight, 1 - decay)
        report("LSGM", step, steps, loss)
    prior.load_state_dict(averaged.state_dict())


def report(stage: str, step: int, steps: int, nelbo: Tensor) -> None:
    if (step + 1) % max(1, steps // 10) == 0:
        print(f"{stage}: step {step + 1} of {steps}, NELBO {nelbo.item():.1f} nats", flush=True)


def main(vae: BackboneConfig = VAE, prior: PriorConfig = PRIOR, sde: DiffusionConfig = SDE) -> None:
    """Train, save and sample; the other examples call it with a part of their own."""
    parser = argparse.ArgumentParser(description="Train a small LSGM on prepared images.")
    parser.add_argument("--data", type=Path, required=True, help="folder of a store of binary images, such as MNIST")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model and its samples")
    parser.add_argument("--steps", type=int, default=1000, help="steps of each stage")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--samples", type=int, default=64)
    args = parser.parse_args()

    torch.manual_seed(0)
    store = ImageStore(args.data)
    model = LSGM(store.image, vae, prior, sde).train()
    pretrain(model, store, args.steps, args.batch)
    train(model, store, args.steps, args.batch)
    model.eval()

    args.out.mkdir(parents=True, exist_ok=True)
    checkpoint.save(model, args.out, stages=[], summary={"steps": args.steps})  # `lsgm.load(args.out)` reads it
    images = model.sample(args.samples, seed=1)
    save_grid(images.mul(255).round().byte().numpy(), args.out / "samples.png", columns=8)
    x = preprocess(torch.tensor(store.images("test")[:32], dtype=torch.uint8), torch.Generator().manual_seed(0), 32)
    nelbo = model.nelbo(x).mean()
    print(f"test NELBO of 32 images: {nelbo.item():.1f} nats; samples in {args.out / 'samples.png'}")


if __name__ == "__main__":
    main()
