"""Gathering a few numbers from all processes on CPUs, which batch norm does a hundred times in a training step.

Processes on one host exchange them through shared memory, in microseconds. Where they are on several hosts, or there
are no kernels, they do over gloo, which takes about a millisecond because threads must be woken.
"""

from __future__ import annotations

import fcntl
import functools
import mmap
import os
import tempfile

import torch
import torch.distributed as dist
from torch import Tensor

from lsgm.errors import LSGMError
from lsgm.networks import kernels

FOLDER = "/dev/shm"  # in memory
CAPACITY = 1 << 14  # numbers that a process can share at once
LINE = 64  # bytes of a cache line
PATIENCE = 1000  # milliseconds until a process checks that the others still run


def gather(own: Tensor) -> Tensor:
    """The vectors ``own`` [N] of all processes, [processes, N]. All processes must call it.

    Raises:
        LSGMError: another process has ended.
    """
    every = own.new_empty(dist.get_world_size(), len(own))
    shared = None
    if own.dtype == torch.float32 and len(own) <= CAPACITY and not torch.compiler.is_compiling():
        shared = _shared_memory(dist.group.WORLD)
    if shared is None:
        dist.all_gather(list(every.unbind()), own)
    else:
        shared.gather(own, every)
    return every


@functools.lru_cache(maxsize=1)
def _shared_memory(group: dist.ProcessGroup) -> _SharedMemory | None:
    """The memory that the processes of ``group`` share; None if one of them cannot."""
    rank, file, path = dist.get_rank(group), -1, [""]
    usable = kernels.library() is not None
    try:
        if rank == 0 and usable:
            file, path[0] = tempfile.mkstemp(prefix="lsgm-", dir=FOLDER)
            os.posix_fallocate(file, 0, _bytes(dist.get_world_size(group)))
    except OSError:  # no such folder, or it is full
        usable = False
    dist.broadcast_object_list(path, 0, group)
    try:
        if rank > 0 and path[0]:
            file = os.open(path[0], os.O_RDWR)
    except OSError:  # on another host
        usable = False
    if usable := usable and file >= 0:
        fcntl.lockf(file, fcntl.LOCK_EX, 1, rank)
    agreed = torch.tensor(int(usable))
    dist.all_reduce(agreed, dist.ReduceOp.MIN, group)
    if rank == 0 and path[0]:
        os.unlink(path[0])
    if agreed:
        return _SharedMemory(file, group)
    if file >= 0:
        os.close(file)
    return None


class _SharedMemory:
    """For each process a cache line with the number of turns that it took, and two places for its numbers.

    A process may be one turn ahead of another, which still reads, but never two: hence two places. Each holds a lock
    on one byte of the file, which the system releases when the process ends.
    """

    def __init__(self, file: int, group: dist.ProcessGroup) -> None:
        self.file, self.turn = file, 0
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)
        self.memory = torch.frombuffer(mmap.mmap(file, _bytes(self.world)), dtype=torch.uint8)

    def gather(self, own: Tensor, every: Tensor) -> None:
        self.turn += 1
        sizes = (len(own), CAPACITY, self.rank, self.world)
        while not kernels.call("gather", self.memory, own.contiguous(), *sizes, self.turn, PATIENCE, every):
            self._check_others()

    def _check_others(self) -> None:
        for rank in set(range(self.world)) - {self.rank}:
            try:
                fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, rank)
            except OSError:  # it holds its lock
                continue
            raise LSGMError(f"process {rank} of this training has ended; it may have said why")


def _bytes(world: int) -> int:
    return world * (LINE + 2 * CAPACITY * 4)
