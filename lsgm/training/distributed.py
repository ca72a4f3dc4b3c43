"""Several processes that train one model, started by `torchrun` on one or many nodes; gloo on CPUs, NCCL on GPUs.

Each process has a copy of the model and its rows of every batch. Random numbers are drawn for the whole batch by every
process, which takes its rows: the result does not depend on how many processes share the batch (dropout apart).
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

LARGE = 1 << 14  # elements of a tensor that is averaged where it is
TIMEOUT = timedelta(minutes=30)  # of a collective: the first one may wait for a slow compilation


@dataclass(frozen=True)
class Ranks:
    """Which process of how many this is."""

    rank: int = 0
    world: int = 1
    local: int = 0  # on its node

    @property
    def first(self) -> bool:
        """Whether this process writes."""
        return self.rank == 0


def start(device: torch.device) -> tuple[Ranks, torch.device]:
    """Join the processes that `torchrun` started, if it did; this process and its device."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return Ranks(), device
    ranks = Ranks(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ.get("LOCAL_RANK", 0)))
    if device.type == "cuda":
        device = torch.device("cuda", ranks.local)
        torch.cuda.set_device(device)
    if ranks.world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    return ranks, device


def stop() -> None:
    """Leave, where joined."""
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    """Wait for the others."""
    if dist.is_initialized():
        dist.barrier()


@torch.no_grad()
def all_reduce_mean(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by its mean over the processes, in place; small ones share a collective for each dtype."""
    if not dist.is_initialized():
        return
    small: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        if (
            tensor.numel() >= LARGE and tensor.is_contiguous()
        ):  # such as the gradients of a network, which are one vector
            dist.all_reduce(tensor)
            tensor /= dist.get_world_size()
        else:
            small.setdefault(tensor.dtype, []).append(tensor)
    for group in small.values():
        flat = torch.cat([tensor.reshape(-1) for tensor in group])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        parts = flat.split([tensor.numel() for tensor in group])
        torch._foreach_copy_(group, [part.view_as(t) for part, t in zip(parts, group, strict=True)])


@torch.no_grad()
def broadcast(tensors: Iterable[Tensor]) -> None:
    """Give every process the first one's values."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.broadcast(tensor, 0)


@torch.no_grad()
def all_reduce_max(tensor: Tensor) -> None:
    """Replace each element by the largest of all processes, in place; NaN counts as the largest."""
    if dist.is_initialized():
        if tensor.is_floating_point():
            tensor.nan_to_num_(nan=torch.inf, posinf=torch.inf)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
