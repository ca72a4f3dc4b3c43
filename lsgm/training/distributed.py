"""Data-parallel training by processes that `torchrun` starts on one or more nodes; gloo on CPUs, NCCL on GPUs.

Each process has a copy of the model and gets some rows of every batch. Every process draws random numbers for the whole
batch and uses its own rows, so that the result does not depend on the number of processes (except for dropout).
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

BUCKET = 1 << 18  # elements of a gradient that are reduced together
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
    """Replace each tensor by its mean over all processes, in place; those of one dtype share a collective."""
    if not dist.is_initialized():
        return
    of_dtype: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        of_dtype.setdefault(tensor.dtype, []).append(tensor)
    for group in of_dtype.values():
        flat = torch.cat([tensor.reshape(-1) for tensor in group])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        parts = flat.split([tensor.numel() for tensor in group])
        torch._foreach_copy_(group, [part.view_as(t) for part, t in zip(parts, group, strict=True)])


class GradientReducer:
    """Averages gradients over all processes, in place, while the backward pass goes on.

    A network's gradients are one vector (:mod:`lsgm.training.flat`). It is reduced in buckets, each of them as soon as
    all gradients in it are there. All processes run the same graph, and so start the buckets in the same order.

    Args:
        networks: whose weights' gradients are views of the vectors' gradients.
        vectors: the weights of the networks, as the optimizers have them.
    """

    def __init__(self, networks: Iterable[nn.Module], vectors: Iterable[Tensor]) -> None:
        self.armed = False  # whether the backward pass that runs is the last one of the step
        self._buckets: list[Tensor] = []
        self._sizes: list[int] = []  # number of weights in each bucket
        self._missing: list[int] = []
        self._running: dict[int, dist.Work | None] = {}
        if not dist.is_initialized():
            return
        weights = [p for network in networks for p in network.parameters() if p.grad is not None]
        for vector in vectors:
            assert vector.grad is not None
            memory = vector.grad.untyped_storage().data_ptr()
            own = [p for p in weights if p.grad is not None and p.grad.untyped_storage().data_ptr() == memory]
            starts = [p.grad.storage_offset() for p in own if p.grad is not None]
            first = 0
            for i, p in enumerate(own):
                p.register_post_accumulate_grad_hook(partial(self._arrived, len(self._buckets)))
                end = starts[i + 1] if i + 1 < len(own) else len(vector)
                if end - starts[first] >= BUCKET or end == len(vector):
                    self._buckets.append(vector.grad[starts[first] : end])
                    self._sizes.append(i + 1 - first)
                    first = i + 1
        self._missing = list(self._sizes)

    def _arrived(self, bucket: int, _: Tensor) -> None:
        if self.armed:
            self._missing[bucket] -= 1
            if self._missing[bucket] == 0:
                self._start(bucket)

    def _start(self, bucket: int) -> None:
        self._running[bucket] = dist.all_reduce(self._buckets[bucket], async_op=True)

    @torch.no_grad()
    def finish(self) -> None:
        """Wait until all gradients are averaged; also those that the backward pass did not reach."""
        for bucket in range(len(self._buckets)):
            if bucket not in self._running:
                self._start(bucket)
        for bucket, work in self._running.items():
            if work is not None:
                work.wait()
            self._buckets[bucket] /= dist.get_world_size()
        self._running.clear()
        self._missing, self.armed = list(self._sizes), False


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
