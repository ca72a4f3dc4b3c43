"""Run `lsgm ARGUMENTS` again and again, each time in a fork of this process that is killed, until it ends.

    python killed.py SEED KILLS [--saving] ARGUMENTS...

By default a kill (SIGKILL) comes at a random moment after the start of every third process, else after its first state.
With --saving it comes while a state is written: before its checksum gets its name, before its content is safe, before
that gets its name, and before older states are removed. Prints how many kills hit.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

from lsgm import cli
from lsgm.training import pretrain, train  # noqa: F401  (slow to import: once, here)
from lsgm.training.state import States


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_while_saving(rng: random.Random) -> None:
    """Let a save of this process, the second to fifth, be its last."""
    save, replace, forget = States.save, os.replace, States._forget
    last, moment, count = rng.randint(2, 5), rng.choice(["content", "name", "checksum", "forget"]), 0

    def dying_save(states: States, step: int, state: dict) -> None:
        nonlocal count
        count += 1
        if count == last:
            if moment == "content":
                os.fsync = die
            elif moment == "forget":
                States._forget = die
            else:
                suffix = ".pt" if moment == "name" else ".sha256"
                os.replace = lambda a, b: die() if str(b).endswith(suffix) else replace(a, b)
        save(states, step, state)

    States.save, States._forget = dying_save, forget


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("step-*.pt")}


def main() -> int:
    seed, kills, *arguments = sys.argv[1:]
    rng, hits = random.Random(int(seed)), 0
    saving = arguments[0] == "--saving"
    state = Path(arguments[arguments.index("--out") + 1]) / "resume"
    while True:
        child = os.fork()
        if child == 0:
            if saving and hits < int(kills):
                die_while_saving(rng)
            os._exit(cli.main(arguments[saving:]))
        if not saving and hits < int(kills):
            before = names(state)
            while hits % 3 and names(state) == before:
                time.sleep(0.005)
            time.sleep(rng.uniform(0, 0.5))
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        if os.WIFEXITED(status):
            print(f"{hits} kills")
            return os.WEXITSTATUS(status)
        hits += 1
        rng.random()  # what the child drew was its own copy's


if __name__ == "__main__":
    sys.exit(main())
