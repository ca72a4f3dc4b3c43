"""Data-parallel training by processes that `torchrun` starts on one or more nodes; gloo on CPUs, NCCL on GPUs.

Each process has a copy of the model and gets some rows of every batch. Every process draws random numbers for the whole
batch and uses its own rows, so that the result does not depend on the number of processes (except for dropout).
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

LARGE = 1 << 14  # elements; tensors of at least this size are reduced in place, without packing
TIMEOUT = timedelta(minutes=30)  # of a collective; the first one may wait for a slow compilation


@dataclass(frozen=True)
class Ranks:
    """The rank of this process and the number of processes."""

    rank: int = 0
    world: int = 1
    local: int = 0  # rank on its node

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files."""
        return self.rank == 0


def start(device: torch.device) -> tuple[Ranks, torch.device]:
    """Join the process group if `torchrun` started this process; returns its ranks and its device."""
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
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    """Wait for all other processes."""
    if dist.is_initialized():
        dist.barrier()


@torch.no_grad()
def all_reduce_mean(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by its mean over all processes, in place; small ones of one dtype share a collective."""
    if not dist.is_initialized():
        return
    small: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        if tensor.numel() >= LARGE and tensor.is_contiguous():  # such as a network's gradients, which are one vector
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
    """Copy the values of the first process to all others, in place."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.broadcast(tensor, 0)


@torch.no_grad()
def all_reduce_max(tensor: Tensor) -> None:
    """Replace each element by its maximum over all processes, in place; NaN counts as infinity."""
    if dist.is_initialized():
        if tensor.is_floating_point():
            tensor.nan_to_num_(nan=torch.inf, posinf=torch.inf)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
