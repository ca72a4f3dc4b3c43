"""Activation checkpointing: activations inside blocks are recomputed in the backward pass instead of being kept."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lsgm.networks.batch_norm import Untracked


def checkpoint_activations(network: nn.Module) -> None:
    """Keep only the inputs of residual cells, flow steps and attention layers for the backward pass.

    Values and gradients stay the same: the recomputation uses the same dropout masks and does not update the running
    statistics of batch norms.
    """
    for block in network.modules():
        if getattr(block, "activation_checkpointing", False):
            block.forward = partial(_recomputed, block)


def _recomputed(block: nn.Module, *inputs: Any) -> Any:
    forward = partial(type(block).forward, block)
    if not torch.is_grad_enabled():
        return forward(*inputs)
    return checkpoint(forward, *inputs, use_reentrant=False, context_fn=lambda: (nullcontext(), Untracked(block)))
