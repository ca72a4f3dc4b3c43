"""The training loop of both stages: steps, history, saved states, restarts after divergence.

Steps with a non-finite loss or gradient, or an exploding gradient, are skipped. After several in a row, training
restarts from its last saved state with lower learning rates. It also restarts if the very last step is bad, or if
weights or statistics are not finite; such a state is never saved. A resumed run ends exactly like an uninterrupted one.
"""

from __future__ import annotations

import math
import signal
import time
from dataclasses import dataclass
from typing import Any

import torch

from lsgm.config import ScheduleConfig
from lsgm.data.batches import Batches
from lsgm.errors import LSGMError, Stopped
from lsgm.model import LSGM
from lsgm.progress import Progress, log
from lsgm.training.distributed import Ranks, all_reduce_max, barrier, broadcast
from lsgm.training.divergence import ELSEWHERE, DivergenceGuard, diagnosis, not_finite
from lsgm.training.history import History
from lsgm.training.state import States
from lsgm.training.step import Outcome, Task, TrainingStep


def compile_networks(model: LSGM) -> None:
    """Compile the networks: the VAE's encode and the score network."""
    model.vae.encode = torch.compile(model.vae.encode, dynamic=False)
    if model.prior is not None:
        model.prior.network.compile(dynamic=False)


@dataclass
class Summary:
    """Facts about a finished training stage; ``seconds`` includes all interrupted runs."""

    steps: int
    images_per_second: float
    seconds: float
    skipped: int  # number of skipped steps
    restarts: int  # number of restarts from an earlier state
    processes: int
    diverged_at: int | None = None  # step of the divergence, if training ended with its last good state

    def __str__(self) -> str:
        text = f"{self.steps} steps, {self.images_per_second:.0f} img/s"
        text = f"{text}, {self.skipped} skipped, {self.restarts} restarts" if self.skipped else text
        return text if self.diverged_at is None else f"{text}, diverged at step {self.diverged_at}"


class Engine:
    """Runs a training stage, from the beginning or from the newest state in ``states``."""

    def __init__(
        self,
        what: str,
        task: Task,
        batches: Batches,
        config: ScheduleConfig,
        history: History,
        states: States | None,
        ranks: Ranks,
        device: torch.device,
    ) -> None:
        self.what, self.task, self.batches, self.config = what, task, batches, config
        self.history, self.states, self.ranks, self.device = history, states, ranks, device
        self.take_step = TrainingStep(task, batches, config, ranks, device)
        self.schedule = self.take_step.schedule
        self.guard = DivergenceGuard(config.divergence)
        self.step = 0
        self.seconds = 0.0  # training time before this process started
        self._began = self._saved = time.monotonic()
        self._restarted_from = -1  # the step from which training last restarted
        self._spoiled = ""  # why the last state could not be saved
        self.diverged_at: int | None = None
        self.stop = False

    # -- state

    def _state(self) -> dict[str, Any]:
        return {
            "parts": {name: part.state_dict() for name, part in self.task.parts.items()},
            "optimizers": {item.name: item.optimizer.state_dict() for item in self.task.optimized},
            "scaler": self.take_step.scaler.state_dict(),
            "history": self.history.state_dict(),
            "guard": self.guard.state_dict(),
            "seconds": self.seconds + time.monotonic() - self._began,
        }

    def _save(self) -> None:
        if self.ranks.first and self.states is not None:
            state = self._state()
            if wrong := not_finite(state, self.device):
                self._spoiled = wrong  # the next step restarts all processes
                log.info(f"{self.what}: state not saved after step {self.step}: {wrong}")
            else:
                self.history.flush()
                self.states.save(self.step, state)
        self._saved = time.monotonic()

    def _restore(self, below: int | None = None) -> bool:
        """Load the newest state, with fewer than ``below`` steps if given; False if there is none."""
        found = self.states.load(below) if self.states is not None else None
        if found is None:
            return False
        self.step, state = found
        for name, part in self.task.parts.items():
            part.load_state_dict(state["parts"][name])
        for item in self.task.optimized:
            item.optimizer.load_state_dict(state["optimizers"][item.name])
        self.take_step.scaler.load_state_dict(state["scaler"])
        self.history.load_state_dict(state["history"])
        self.guard.load_state_dict(state["guard"])
        self.seconds = state["seconds"]
        return True

    # -- steps

    def fit(self) -> Summary:
        """Train to the end.

        Raises:
            Stopped: on SIGTERM or a keyboard interrupt, after the state was saved.
            LSGMError: training diverged and did not recover (with `divergence.on_failure: keep_last` it ends with the
                last good state instead), or its states cannot be read or written.
        """
        self._began = time.monotonic()
        found = self._restore()
        steps = torch.tensor([self.step, -self.step], device=self.device)
        all_reduce_max(steps)
        if steps.sum().item() != 0:
            raise LSGMError(
                f"{self.what}: the processes found states of different steps; all of them must see the same folder "
                f"({self.states.folder if self.states else ''})"
            )
        if found:
            log.info(f"{self.what}: resuming after step {self.step} of {self.schedule.steps}")
        else:
            broadcast(t for network in self.task.networks.values() for t in network.state_dict().values())
            self._save()  # so that there is a state to restart from
        self._saved = time.monotonic()
        self.history.begin(self.step)
        previous = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            with Progress(self.what, self.schedule.steps, "img", self.batches.batch, done=self.step) as bar:
                while self.diverged_at is None:
                    if self.step < self.schedule.steps:
                        self.one_step()
                    elif wrong := self._wrong_at_the_end():
                        self._restart(wrong)
                    else:
                        break
                    rows = self.history.rows
                    bar.to(self.step, lambda: f"NELBO {rows[-1]['nelbo']:.1f} nats" if rows else "")  # noqa: B023
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        seconds = self.seconds + time.monotonic() - self._began
        rate = self.step * self.batches.batch / seconds
        return Summary(
            self.step, rate, seconds, self.guard.skipped, self.guard.restarts, self.ranks.world, self.diverged_at
        )

    def _on_signal(self, number: int, _: object) -> None:
        self.stop = True
        if number == signal.SIGINT:  # a second interrupt does not wait for the step to end
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def one_step(self) -> None:
        """Process one batch: take the step, update the history, save the state when due. Raises like :meth:`fit`."""
        found = self.take_step(self.step, self.guard, lambda: (self.stop, bool(self._spoiled)))
        if found.spoiled:
            self._restart(self._spoiled or ELSEWHERE)
        elif found.good:
            self.history.add(found.terms)
            self.step += 1
        else:
            self._skip(found)
        if self.diverged_at is not None:
            return
        self.take_step.scaler.update()
        self._record()
        if found.stop:
            self._save()
            barrier()  # a process that exits takes the others down
            raise Stopped(f"{self.what}: told to stop after step {self.step}; the same command resumes from here")
        if time.monotonic() - self._saved > 60 * self.config.checkpoint_minutes and not self.guard.bad:
            self._save()

    def _skip(self, found: Outcome) -> None:
        """Skip a bad step; restart if there were too many in a row."""
        reason = diagnosis(found.terms, found.norm, self.task.networks)
        log.info(f"{self.what}: step {self.step} skipped ({reason})")
        self.step += 1
        if self.guard.bad >= self.config.divergence.skip_limit and not self.take_step.looks_for_scale:
            self._restart(reason)

    def _wrong_at_the_end(self) -> str:
        """Why training failed at its last step; empty if it succeeded. All processes agree on whether it did."""
        wrong = not_finite(self._state(), self.device)
        if self.guard.bad and not self.take_step.looks_for_scale:
            wrong = f"its last step was skipped{f'; {wrong}' if wrong else ''}"
        anywhere = torch.tensor([float(bool(wrong))], device=self.device)
        all_reduce_max(anywhere)
        return wrong or (ELSEWHERE if anywhere.item() else "")

    # -- restarts

    def _restart(self, reason: str) -> None:
        """Restart from the last state with lower learning rates, or give up after `max_restarts`."""
        config, guard, seconds = self.config.divergence, self.guard, self.seconds
        self._spoiled = ""
        if guard.restarts >= config.max_restarts:
            if config.on_failure == "keep_last" and self.states is not None:
                self._give_up(reason)
                return
            raise LSGMError(
                f"{self.what}: diverged at step {self.step}, after {guard.restarts} restarts with lower learning rates "
                f"({reason}); try a lower learning rate, a longer warm-up or a larger spectral_reg"
            )
        kept = {"skipped": guard.skipped, "restarts": guard.restarts + 1, "bad": 0}
        self._restore_good(reason)
        if self.step == self._restarted_from:  # it already failed from this state: go further back
            self._restore(below=self.step)
        self._restarted_from = self.step
        guard.load_state_dict(kept)
        self.seconds = seconds
        self.history.begin(self.step)
        log.info(
            f"{self.what}: back to step {self.step}, learning rates x {guard.lr_factor:g}, spectral regularization x "
            f"{guard.spectral_factor:g} (restart {guard.restarts} of {config.max_restarts})"
        )

    def _restore_good(self, reason: str) -> None:
        """Load the newest state from before this step: a failed run may have saved a state at this very step."""
        if not self._restore(below=self.step):
            raise LSGMError(
                f"{self.what}: diverged at step {self.step} ({reason}), and there is no state to go back to"
            )

    def _give_up(self, reason: str) -> None:
        """End with the last good state; the history keeps all rows and records where training diverged."""
        self.diverged_at, history, seconds = self.step, self.history.state_dict(), self.seconds
        kept = {**self.guard.state_dict(), "bad": 0}
        log.info(f"{self.what}: diverged at step {self.step} and did not recover; the last good state is kept")
        self._restore_good(reason)
        self.history.load_state_dict(history)
        self.guard.load_state_dict(kept)
        self.seconds = seconds
        row = {"step": self.diverged_at, "epoch": self.diverged_at / len(self.batches), "nelbo": math.nan}
        self.history.add_row({**row, "skipped": self.guard.skipped, "restarts": self.guard.restarts})

    def _record(self) -> None:
        """Add a row to the history when due, with a validation of the model when that is due, too."""
        step, every, history = self.step, self.history.every, self.history
        last = step == self.schedule.steps
        if history.empty or not (last or step % every == 0):
            return
        row = {"step": step, "epoch": step / len(self.batches)}
        row |= {f"lr_{item.name}": item.optimizer.param_groups[0]["lr"] for item in self.task.optimized}
        scalars, vectors = history.close_row()
        row |= scalars | self.task.summarize(vectors) | {"skipped": self.guard.skipped, "restarts": self.guard.restarts}
        eval_every = self.config.eval_every_epochs * len(self.batches)
        if self.ranks.first and eval_every and (last or step % eval_every < every):
            facts, pictures = self.task.validate()
            row |= facts
            for name, picture in pictures.items():
                history.add_images(name, picture, step)
        history.add_row(row)
