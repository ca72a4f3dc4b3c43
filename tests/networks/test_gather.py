"""Real processes gather numbers from each other."""

import os
import socket
import subprocess
import sys

import pytest

from lsgm.networks import kernels

SCRIPT = """
import os, random, sys, time
import torch, torch.distributed as dist
from lsgm.networks import gather
dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
random.seed(rank)
for turn in range(300):
    if turn == 100 and os.environ.get("ENDS") == str(rank):
        os._exit(0)
    n = 1 + (turn * 37) % (gather.CAPACITY + 5)
    every = gather.gather(torch.arange(n, dtype=torch.float32) + 1000 * rank + turn)
    assert every.shape == (world, n)
    for other in range(world):
        assert torch.equal(every[other], torch.arange(n, dtype=torch.float32) + 1000 * other + turn), (turn, other)
    if random.random() < 0.1:
        time.sleep(0.003)
assert torch.equal(gather.gather(torch.full([2], 0.5 + rank, dtype=torch.float64))[:, 1], torch.arange(world) + 0.5)
print("shared" if gather._shared_memory(dist.group.WORLD) else "gloo", flush=True)
dist.barrier()
"""


def results(world, of_rank=lambda rank: {}):
    """Exit code, output and messages of each process."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    shared = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", SCRIPT],
            env={**shared, "WORLD_SIZE": str(world), "RANK": str(rank), **of_rank(rank)},
            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for rank in range(world)
    ]  # fmt: skip
    said = [process.communicate(timeout=300) for process in started]
    return [(process.returncode, *texts) for process, texts in zip(started, said, strict=True)]


needs_kernels = pytest.mark.skipif(kernels.library() is None, reason="no kernels here")


@needs_kernels
@pytest.mark.parametrize("world", [2, 3])
def test_all_get_the_numbers_of_all(world):
    for code, out, err in results(world):
        assert code == 0 and out == "shared\n", err
    assert not [name for name in os.listdir("/dev/shm") if name.startswith("lsgm-")]


def test_over_gloo_where_one_process_has_no_kernels():
    for code, out, err in results(3, lambda rank: {"LSGM_KERNELS": "0"} if rank == 1 else {}):
        assert code == 0 and out == "gloo\n", err


@needs_kernels
def test_the_end_of_a_process_is_noticed():
    (code, _, err), (other, _, _) = results(2, lambda _: {"ENDS": "1"})
    assert other == 0 and code == 1
    assert "LSGMError: process 1 of this training has ended" in err
