"""The launcher of trainings: what it starts with what a job was given. Programs that print their arguments stand in."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "workflow" / "scripts" / "launch.sh"
IN_TASK = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_NODEID": "1",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1",
}
ONE_NODE = "torchrun --no-python --standalone --nproc-per-node"


@pytest.mark.parametrize(
    ("nodes", "gpus", "given", "there", "starts"),
    [
        (1, 0, {}, 0, "lsgm train --log a b OMP=8"),
        (1, 0, {}, 4, "lsgm train --log a b OMP=8"),
        (1, 4, {}, 0, "lsgm train --log a b OMP=8"),
        (2, 8, {}, 1, "lsgm train --log a b OMP=8"),
        (1, 4, {"CUDA_VISIBLE_DEVICES": ""}, 4, "lsgm train --log a b OMP=8"),
        (1, 1, {"CUDA_VISIBLE_DEVICES": "3"}, 4, "lsgm train --log a b OMP=8"),
        (1, 4, {}, 8, f"{ONE_NODE} 4 -- lsgm train --log a b OMP=2"),
        (1, 4, {"CUDA_VISIBLE_DEVICES": "1,5"}, 8, f"{ONE_NODE} 2 -- lsgm train --log a b OMP=4"),
        (2, 8, {}, 2, f"{ONE_NODE} 2 -- lsgm train --log a b OMP=4"),
        (
            *(2, 8, {"SLURM_JOB_ID": "7"}, 8),
            "srun --nodes=2 --ntasks=2 --ntasks-per-node=1 --cpus-per-task=8 --wait=45 --gres=gpu:8 "
            f"{LAUNCH} 1 8 lsgm train --log a b OMP=8",
        ),
        (
            *(2, 0, {"SLURM_JOB_ID": "7"}, 0),
            "srun --nodes=2 --ntasks=2 --ntasks-per-node=1 --cpus-per-task=8 --wait=45 "
            f"{LAUNCH} 1 0 lsgm train --log a b OMP=8",
        ),
        (
            *(1, 8, {**IN_TASK, "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}, 8),
            "torchrun --no-python --nnodes 2 --node-rank 1 --nproc-per-node 8 --master-addr 10.0.0.1 "
            "--master-port 20007 --rdzv-id 7 -- lsgm train --log a b OMP=1",
        ),
    ],
)
def test_starts(tmp_path: Path, nodes: int, gpus: int, given: dict[str, str], there: int, starts: str) -> None:
    for name in ("lsgm", "torchrun", "srun"):
        (tmp_path / name).write_text(f'#!/bin/sh\necho "{name} $* OMP=$OMP_NUM_THREADS"\n')
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\nseq {there}\n")
    for file in tmp_path.iterdir():
        file.chmod(0o755)
    environment = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "8", **given}
    command = [LAUNCH, str(nodes), str(gpus), "lsgm", "train", "--log", "a b"]
    said = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    assert said.strip() == starts
