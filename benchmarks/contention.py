"""Training beside a busy process: images per second on a quiet machine and on a busy one, by how long threads spin.

    python benchmarks/contention.py [--others 1] [--rounds 7] [--variables OMP_WAIT_POLICY=passive ...]

Steps of the demo's second stage, in processes that start as `lsgm train` does, one for each setting of OpenMP. In every
round each takes its steps on the quiet machine, then each beside busy processes (loops of plain Python). `lsgm` is
what a user gets (:func:`lsgm.runtime.limit_spinning`), `default` is what GNU's OpenMP does by itself; --variables adds
settings, several variables in one joined by a comma. Run it where nothing else runs.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from machine import machine, table
from training import STAGES, Stepper, configs

DEFAULT = "300000"  # turns of GNU's waiting loop if nothing is set


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """Within it so many processes use a core each."""
    started = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="also any name in params.yaml")
    parser.add_argument("--stage", default="end to end, ll", choices=list(STAGES))
    parser.add_argument("--others", type=int, default=1, help="busy processes")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=6, help="of each setting in a round")
    parser.add_argument("--variables", nargs="*", default=[], metavar="NAME=VALUE[,NAME=VALUE]")
    parser.add_argument("--data", type=Path, default=Path("data/mnist"))
    args = parser.parse_args()
    print(machine(torch.device("cpu")), flush=True)
    first, second = configs(args.model, args.stage, {})
    batch = first.pretrain.batch if second is None else second.train.batch
    found = measure(args)
    rows = []
    for name, (quiet, beside) in found.items():
        rates = [f"{batch / seconds:.0f}" for seconds in (statistics.median(quiet), statistics.median(beside))]
        low, middle, high = statistics.quantiles([a / b for a, b in zip(quiet, beside, strict=True)], n=4)
        rows.append([name, *rates, f"{middle:.0%} ± {(high - low) / 2:.0%}"])
    print(table(["OpenMP", "quiet, images/s", f"beside {args.others} busy, images/s", "share"], rows))


def measure(args: argparse.Namespace) -> dict[str, tuple[list[float], list[float]]]:
    """Seconds per step on the quiet and on the busy machine for each setting, one value for each round."""
    here = Path(__file__).resolve().parents[1]
    settings: dict[str, dict[str, str]] = {"default": {"GOMP_SPINCOUNT": DEFAULT}, "lsgm": {}}
    settings |= {text: dict(pair.split("=", 1) for pair in text.split(",")) for text in args.variables}
    arguments = (args.model, args.stage, str(args.data.resolve()), "cpu")
    steppers = {name: Stepper(here, *arguments, **variables) for name, variables in settings.items()}
    found: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in settings}
    for stepper in steppers.values():
        stepper.steps(3)
    for _ in range(args.rounds):
        for name, stepper in steppers.items():
            found[name][0].append(stepper.steps(args.steps))
        with busy(args.others):
            for name, stepper in steppers.items():
                found[name][1].append(stepper.steps(args.steps))
    for stepper in steppers.values():
        stepper.close()
    return found


if __name__ == "__main__":
    main()
