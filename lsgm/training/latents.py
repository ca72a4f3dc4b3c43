"""What the second stage wants to know of a pretrained VAE's latents before it starts."""

from __future__ import annotations

import torch
from torch import Tensor

from lsgm.data.batches import Batches, preprocess
from lsgm.model import LSGM
from lsgm.networks.posterior import HALF_LOG_2PI
from lsgm.progress import Progress


@torch.no_grad()
def kl_per_channel(model: LSGM, batches: Batches, count: int) -> Tensor:
    """KL(q(z0|x) || N(0, I)) of each latent channel, [C], nats: summed over space, mean over ``count`` batches."""
    model.eval()
    total = torch.zeros(model.latent_shape[0], device=model.device)
    with Progress("KL of the latents", count, "img", batches.batch) as bar:
        for i in range(count):
            posterior, _ = model.vae.encode(2 * batches.batch_at(*divmod(i, len(batches))) - 1)
            kl = posterior.log_q + 0.5 * posterior.z.square() + HALF_LOG_2PI
            total += kl.sum(dim=(2, 3)).mean(dim=0)
            bar.step()
    return total / count


@torch.no_grad()
def encodings(model: LSGM, batches: Batches, batch: int = 250) -> Tensor:
    """One sample of q(z0|x) for each image of the training set, [N, D], on the host."""
    model.eval()
    generator = torch.Generator(batches.images.device).manual_seed(batches.seed)
    found = []
    chunks = batches.images.split(batch)
    with Progress("encodings", len(chunks), "img", batch) as bar:
        for images in chunks:
            x = preprocess(images, generator, batches.pad_to, batches.binarise, batches.bits)
            found.append(model.vae.encode(2 * x - 1)[0].z.flatten(1).cpu())
            bar.step()
    return torch.cat(found)


def largest_squared_distance(z: Tensor, block: int = 4096) -> float:
    """The largest ||z_i - z_j||^2 of points [N, D], in blocks of ``block`` x ``block`` distances."""
    centred = z - z.mean(dim=0)
    best, pair = -1.0, (0, 0)
    blocks = centred.split(block)
    norms = [b.square().sum(dim=1) for b in blocks]
    for i in range(len(blocks)):
        for j in range(i, len(blocks)):
            distances = torch.addmm(norms[j], blocks[i], blocks[j].t(), alpha=-2) + norms[i][:, None]
            value, place = distances.flatten().max(dim=0)
            if value > best:
                row, column = divmod(int(place), len(blocks[j]))
                best, pair = value.item(), (i * block + row, j * block + column)
    one, two = z[pair[0]].double(), z[pair[1]].double()
    return (one - two).square().sum().item()  # without the rounding of the expanded square
