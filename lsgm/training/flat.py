"""Store the weights of a network in one vector."""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import nn

ALIGNMENT = 16  # elements


@torch.no_grad()
def flatten(network: nn.Module) -> nn.Parameter:
    """Make the weights of ``network`` views of one vector and their gradients views of its gradient; return it.

    An optimizer updates it in a few operations instead of thousands for hundreds of tensors. The gradients must stay
    where they are: zero them in place.
    """
    weights = [p for p in network.parameters() if p.requires_grad]
    sizes = [-(-p.numel() // ALIGNMENT) * ALIGNMENT for p in weights]
    vector = nn.Parameter(weights[0].new_zeros(sum(sizes)))
    vector.grad = torch.zeros_like(vector)
    for p, start in zip(weights, accumulate(sizes, initial=0), strict=False):
        view = vector.data.as_strided(p.shape, p.stride(), start)
        p.data = view.copy_(p)
        p.grad = vector.grad.as_strided(p.shape, p.stride(), start)
    return vector
