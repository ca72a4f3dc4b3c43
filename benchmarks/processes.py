"""Several processes that train one model on one host, against one process with as many threads.

    python benchmarks/processes.py [--processes 2] [--models demo small medium] [--stages ...] [--rounds 9]

The processes share each batch and talk by gloo, as those that `torchrun` starts; each has one thread. They and the one
process take their steps in turns. Run it where nothing else runs and there are as many cores as processes.
"""

from __future__ import annotations

import argparse
import socket
import statistics
from pathlib import Path

import torch
from machine import machine, table
from training import STAGES, Stepper

from lsgm.runtime import limit_spinning


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--models", nargs="+", default=["demo", "small", "medium"], help="also any name in params.yaml")
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=list(STAGES))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=4, help="of each in a round")
    parser.add_argument("--data", type=Path, default=Path("data/mnist"))
    args = parser.parse_args()
    limit_spinning()
    print(machine(torch.device("cpu")), flush=True)
    here, rows = Path(__file__).resolve().parents[1], []
    for model in args.models:
        for stage in args.stages:
            arguments = (model, stage, str(args.data.resolve()), "cpu")
            one = [Stepper(here, *arguments, OMP_NUM_THREADS=str(args.processes))]
            several = group(here, *arguments, processes=args.processes)
            together(one, 3)
            together(several, 3)
            turns = [(together(one, args.steps), together(several, args.steps)) for _ in range(args.rounds)]
            for stepper in one + several:
                stepper.process.stdin.close()
            for stepper in one + several:
                stepper.process.wait()
            times = [f"{1e3 * statistics.median(seconds):.0f}" for seconds in zip(*turns, strict=True)]
            low, middle, high = statistics.quantiles([a / b for a, b in turns], n=4)
            rows.append([f"{model}, {stage}", *times, f"{middle:.0%} ± {(high - low) / 2:.0%}"])
            print(" | ".join(rows[-1]), flush=True)
    n = args.processes
    print(table(["step", f"1 process, {n} threads, ms", f"{n} processes, ms", "speed, of one process"], rows))


def group(folder: Path, *arguments: str, processes: int) -> list[Stepper]:
    """Processes of one thread that train one model together."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    return [Stepper(folder, *arguments, **shared, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(processes)]


def together(steppers: list[Stepper], count: int) -> float:
    """Let all take ``count`` steps at once; seconds per step of the slowest."""
    for stepper in steppers:
        stepper.begin(count)
    return max(stepper.finish() for stepper in steppers) / count


if __name__ == "__main__":
    main()
