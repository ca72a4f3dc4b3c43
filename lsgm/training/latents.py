"""Statistics of a pretrained VAE's latents that the second stage needs before it starts."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from lsgm.config import DropInactiveConfig
from lsgm.data.batches import Batches
from lsgm.model import LSGM
from lsgm.progress import Progress


@torch.no_grad()
def kl_per_channel(model: LSGM, batches: Batches, count: int) -> Tensor:
    """KL(q(z0|x) || N(0, I)) of each latent channel, [C], nats: summed over space, mean over ``count`` batches."""
    model.eval()
    total = torch.zeros(model.latent_shape[0], device=model.device)
    with Progress("KL of the latents", count, "img", batches.batch) as bar:
        for i in range(count):
            posterior, _ = model.vae.encode(2 * batches.batch_at(*divmod(i, len(batches))) - 1)
            total += posterior.kl_per_channel()
            bar.step()
    return total / count


def summarize_kl(groups: tuple[int, ...]) -> Callable[[dict[str, list[float]]], dict[str, float]]:
    """Make a function that reduces an objective's vectors for the history: the KL of each group and `active_latents`.

    A channel counts as active if its KL(q || N(0, I)) exceeds 0.1 nats, the default threshold of `drop_inactive`.
    """

    def summarize(means: dict[str, list[float]]) -> dict[str, float]:
        channels, lower_scales = means["kl_per_channel"], means.get("lower_scales_kl_per_group", [])
        ends = list(itertools.accumulate(groups, initial=0))
        per_group = [sum(channels[a:b]) for a, b in itertools.pairwise(ends)] + lower_scales
        active = float(sum(kl > DropInactiveConfig().threshold for kl in channels))
        return {f"kl_group_{i}": kl for i, kl in enumerate(per_group)} | {"active_latents": active}

    return summarize


@torch.no_grad()
def encodings(model: LSGM, batches: Batches, batch: int = 250) -> Tensor:
    """One sample of q(z0|x) for each image of the training set, [N, D], on the host."""
    model.eval()
    found = []
    with Progress("encodings", -(-len(batches.images) // batch), "img", batch) as bar:
        for x in batches.in_order(batch):
            found.append(model.vae.encode(2 * x - 1)[0].z.flatten(1).cpu())
            bar.step()
    return torch.cat(found)


def largest_squared_distance(z: Tensor, block: int = 4096) -> float:
    """The largest ||z_i - z_j||^2 of points [N, D], in blocks of ``block`` x ``block`` distances."""
    centered = z - z.mean(dim=0)
    best, pair = -1.0, (0, 0)
    blocks = centered.split(block)
    norms = [b.square().sum(dim=1) for b in blocks]
    for i in range(len(blocks)):
        for j in range(i, len(blocks)):
            distances = torch.addmm(norms[j], blocks[i], blocks[j].t(), alpha=-2) + norms[i][:, None]
            value, place = distances.flatten().max(dim=0)
            if value > best:
                row, column = divmod(int(place), len(blocks[j]))
                best, pair = value.item(), (i * block + row, j * block + column)
    one, two = z[pair[0]].double(), z[pair[1]].double()
    return (one - two).square().sum().item()  # avoids the rounding errors of the expanded square
