"""The loop that both training stages share: precision, steps, learning rates, history, states, rescue from divergence.

Every random number of a step depends on (seed, step) alone, so that what goes on after an interruption is what would
have been. Steps whose loss or gradient is not finite, or whose gradient explodes, are left out; after several in a row
the training goes back to its last state, more careful. So it does from a bad last step, and from weights or statistics
that are not finite; no such state is saved.
"""

from __future__ import annotations

import csv
import math
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lsgm.config import DivergenceConfig, ScheduleConfig
from lsgm.data.batches import Batches
from lsgm.errors import LSGMError, Stopped
from lsgm.files import atomic, named
from lsgm.model import LSGM
from lsgm.networks.layers import NormalizedWeights
from lsgm.progress import Progress, log
from lsgm.per_sample_noise import mix
from lsgm.training.distributed import Ranks, average, barrier, copy_from_first, most
from lsgm.training.draws import Draws
from lsgm.training.objective import Objective
from lsgm.training.regularization import SpectralRegularizer
from lsgm.training.state import States

ROWS = 200  # of a history, at most
ELSEWHERE = "another process has weights or statistics that are not finite"


@dataclass
class Schedule:
    """Linear warm-up, then a cosine from ``lr`` to ``lr_min``.

    With W warm-up epochs of K steps: step i < W K has lr * i / (W K); epoch W keeps the last of these; n epochs later
    lr_min + (lr' - lr_min) (1 + cos(pi n / T)) / 2 with lr' that last value and T = epochs - W - 1. With
    `lr_schedule: iteration` one step takes the place of an epoch after the warm-up.
    """

    config: ScheduleConfig
    steps_per_epoch: int

    @property
    def steps(self) -> int:
        """Steps of the whole training."""
        return max(1, round(self.config.epochs * self.steps_per_epoch))

    def learning_rate(self, step: int, lr: float, lr_min: float) -> float:
        every = self.steps_per_epoch if self.config.lr_schedule == "epoch" else 1
        warmup = round(self.config.warmup_epochs * self.steps_per_epoch)
        if step < warmup:
            return lr * step / warmup
        start = lr * (1 - 1 / warmup) if warmup else lr
        n = (step - warmup) // every
        period = max(1.0, (self.steps - warmup) / every - 1)
        return lr_min + (start - lr_min) * 0.5 * (1 + math.cos(math.pi * min(1.0, n / period)))


@dataclass
class Optimized:
    """An optimizer and the range of its learning rate."""

    name: str
    optimizer: torch.optim.Optimizer
    lr: float
    lr_min: float


@dataclass
class History:
    """What a training run recorded: a CSV row every few steps, means since the row before, and TensorBoard events."""

    every: int
    tensorboard: Path | None = None
    rows: list[dict[str, float]] = field(default_factory=list)
    _sums: dict[str, Tensor] = field(default_factory=dict)
    _count: int = 0
    _writer: Any = None

    def begin(self, step: int) -> None:
        """Rows for steps after ``step`` are to come; TensorBoard forgets those that it has of them."""
        if self.tensorboard is None:
            return
        self.flush()
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            log.info("no TensorBoard events: the package tensorboard is not installed")
            return
        threading.excepthook = _without_tensorboard
        with self._folder_named():
            self._writer = SummaryWriter(str(self.tensorboard), purge_step=step + 1)

    def flush(self) -> None:
        """What TensorBoard has is on disk."""
        if self._writer is not None:
            with self._folder_named():
                self._writer.flush()

    def _folder_named(self) -> AbstractContextManager[None]:
        """Errors of TensorBoard's thread, such as that of a full disk, come without a file name."""
        return named(self.tensorboard or "")

    def add(self, terms: dict[str, Tensor]) -> None:
        """Sum on the device; nothing waits for it. A term is a scalar or a vector."""
        for name, value in terms.items():
            self._sums[name] = self._sums[name].to(value.device) + value if name in self._sums else value
        self._count += 1

    def close_row(self) -> tuple[dict[str, float], dict[str, list[float]]]:
        """The means of what was added since the last row: scalars, vectors."""
        sizes = [value.numel() for value in self._sums.values()]
        flat = torch.cat([value.reshape(-1) for value in self._sums.values()]) / self._count
        means = dict(zip(self._sums, flat.cpu().split(sizes), strict=True))
        vectors = {name: means.pop(name).tolist() for name, value in self._sums.items() if value.dim()}
        self._sums, self._count = {}, 0
        return {name: mean.item() for name, mean in means.items()}, vectors

    def add_row(self, row: dict[str, float]) -> None:
        """A row; it has its `step`."""
        self.rows.append(row)
        if self._writer is not None:
            with self._folder_named():
                for name, value in row.items():
                    self._writer.add_scalar(name, value, row["step"])

    def add_images(self, name: str, images: Tensor, step: int) -> None:
        """A grid of images [N, C, H, W] in [0, 1] for TensorBoard."""
        if self._writer is not None:
            with self._folder_named():
                self._writer.add_images(name, images, step)

    @property
    def empty(self) -> bool:
        """Whether nothing was added since the last row."""
        return self._count == 0

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "sums": self._sums, "count": self._count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rows, self._sums, self._count = list(state["rows"]), dict(state["sums"]), int(state["count"])

    def write(self, path: Path) -> None:
        """The rows as CSV."""
        with atomic(path) as part, open(part, "w", newline="") as file:
            columns = list(dict.fromkeys(name for row in self.rows for name in row))
            writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows({k: v if isinstance(v, int) else f"{v:.6g}" for k, v in row.items()} for row in self.rows)
        if self._writer is not None:
            with self._folder_named():
                self._writer.close()


def _without_tensorboard(
    args: threading.ExceptHookArgs, others: Callable[[threading.ExceptHookArgs], Any] = threading.excepthook
) -> None:
    """Print no traceback of TensorBoard's thread: the next call of its writer raises the same error."""
    if not (isinstance(args.exc_value, OSError) and type(args.thread).__module__.startswith("tensorboard.")):
        others(args)


def _not_finite(state: dict[str, Any], device: torch.device) -> str:
    """Which weights, statistics, averages and moments in a state are not finite; empty if all are."""
    found = dict(_tensors({name: state[name] for name in ("parts", "optimizers")}))
    if not found:
        return ""
    # optimizers count steps on the host
    finite = torch.stack([tensor.isfinite().all().to(device) for tensor in found.values()]).tolist()
    wrong = [name for name, good in zip(found, finite, strict=True) if not good]
    more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
    return f"not finite: {wrong[0]}{more}" if wrong else ""


def _tensors(tree: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """The floating-point tensors of nested dictionaries and lists, by dotted name."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _tensors(value, f"{prefix}{key}.")
        elif isinstance(value, (list, tuple)):
            yield from _tensors(dict(enumerate(value)), f"{prefix}{key}.")
        elif isinstance(value, Tensor) and value.is_floating_point():
            yield f"{prefix}{key}", value


def rows_every(config: ScheduleConfig, steps_per_epoch: int) -> int:
    """Steps from one row of the history to the next."""
    return max(1, Schedule(config, steps_per_epoch).steps // ROWS)


def compile_networks(model: LSGM) -> None:
    """Compile what a training step runs most."""
    model.vae.encode = torch.compile(model.vae.encode, dynamic=False)  # type: ignore[method-assign]
    if model.prior is not None:
        model.prior.network.compile(dynamic=False)


class Stateful(Protocol):
    """What a state is made of."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> Any: ...


@dataclass
class Task:
    """What a stage asks the engine to do.

    Attributes:
        objective: (images of this process, step, steps, draws) -> what is minimized; the mean over its images.
        regularizers: (weight, sum to be minimized too).
        after_step: called after each step of the optimizers.
        parts: what a state holds beside optimizers and history, by name.
        networks: the networks whose gradients are looked at when a step is bad, by name.
        summarize: (means of the objective's vectors) -> what the history keeps of them.
        look: (step) -> what is measured on the model every `look_epochs`, and pictures, by name.
    """

    optimized: list[Optimized]
    objective: Callable[[Tensor, int, int, Draws], Objective]
    regularizers: list[tuple[float, SpectralRegularizer]]
    after_step: Callable[[], None]
    parts: dict[str, Stateful]
    networks: dict[str, nn.Module]
    summarize: Callable[[dict[str, list[float]]], dict[str, float]]
    look: Callable[[], tuple[dict[str, float], dict[str, Tensor]]]


@dataclass
class Summary:
    """What a training stage took; ``seconds`` of all attempts together."""

    steps: int
    images_per_second: float
    seconds: float
    skipped: int  # steps left out
    restarts: int  # times the training went back to an earlier state
    processes: int
    diverged_at: int | None = None  # the step; what is left is the last good state

    def __str__(self) -> str:
        text = f"{self.steps} steps, {self.images_per_second:.0f} img/s"
        text = f"{text}, {self.skipped} left out, {self.restarts} restarts" if self.skipped else text
        return text if self.diverged_at is None else f"{text}, diverged at step {self.diverged_at}"


@dataclass
class Care:
    """How the training fares, and how careful it has become."""

    bad: int = 0  # bad steps in a row
    skipped: int = 0
    restarts: int = 0
    seconds: float = 0.0  # before this process took over
    norms: list[float] = field(default_factory=list)  # of the last gradients

    def lr_factor(self, config: DivergenceConfig) -> float:
        return config.lr_factor**self.restarts

    def spectral_factor(self, config: DivergenceConfig) -> float:
        return config.spectral_factor**self.restarts


class Engine:
    """Runs a training stage, from its beginning or from the newest state in ``states``."""

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
        self.schedule = Schedule(config, len(batches))
        self.care = Care()
        self.step = 0
        self._began = self._saved = time.monotonic()
        share, rest = divmod(batches.batch, ranks.world * config.accumulate)
        if rest:
            raise LSGMError(
                f"batch: {batches.batch} images cannot be shared evenly by {ranks.world} processes of "
                f"{config.accumulate} parts (accumulate)"
            )
        self.share = share  # images of one forward pass
        self.generator = torch.Generator(device)
        self.scaler = torch.amp.GradScaler(device.type, init_scale=2.0**6, enabled=config.precision == "fp16")
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.precision == "tf32"
        # Statistics of batch norms, and what they were before the step: a bad step must not stay in them.
        buffers = [b for network in task.networks.values() for b in network.buffers() if b.is_floating_point()]
        self._buffers, self._buffers_before = buffers, [b.clone() for b in buffers]
        self._weights = NormalizedWeights(*task.networks.values())
        self._rescued_to = -1  # the step of the state that was gone back to
        self._spoilt = ""  # what kept the last state from being saved
        self.diverged_at: int | None = None
        self.stop = False

    # -- state

    def _state(self) -> dict[str, Any]:
        parts = {name: part.state_dict() for name, part in self.task.parts.items()}
        optimizers = {item.name: item.optimizer.state_dict() for item in self.task.optimized}
        return {
            "parts": parts,
            "optimizers": optimizers,
            "scaler": self.scaler.state_dict(),
            "history": self.history.state_dict(),
            "care": asdict(self.care),
        }

    def _save(self) -> None:
        if self.ranks.first and self.states is not None:
            state, seconds = self._state(), self.care.seconds + time.monotonic() - self._began
            if wrong := _not_finite(state, self.device):
                self._spoilt = wrong  # the next step goes back, in all processes
                log.info(f"{self.what}: no state is saved after step {self.step}: {wrong}")
            else:
                self.history.flush()
                self.states.save(self.step, {**state, "care": {**state["care"], "seconds": seconds}})
        self._saved = time.monotonic()

    def _restore(self, below: int | None = None) -> bool:
        """Take the newest state, of fewer than ``below`` steps if given; False where there is none."""
        found = self.states.load(below) if self.states is not None else None
        if found is None:
            return False
        self.step, state = found
        for name, part in self.task.parts.items():
            part.load_state_dict(state["parts"][name])
        for item in self.task.optimized:
            item.optimizer.load_state_dict(state["optimizers"][item.name])
        self.scaler.load_state_dict(state["scaler"])
        self.history.load_state_dict(state["history"])
        self.care = Care(**state["care"])
        return True

    # -- steps

    def fit(self) -> Summary:
        """Train to the end.

        Raises:
            Stopped: on SIGTERM or an interrupt from the keyboard, after the state was saved.
            LSGMError: the training diverged and did not recover (with `rescue.give_up: record` it then ends with the
                last good state); or its states cannot be read or written.
        """
        self._began = time.monotonic()
        found = self._restore()
        steps = torch.tensor([self.step, -self.step], device=self.device)
        most(steps)
        if steps.sum().item() != 0:
            raise LSGMError(
                f"{self.what}: the processes found states of different steps; all must see the same folder "
                f"({self.states.folder if self.states else ''})"
            )
        if found:
            log.info(f"{self.what}: going on after step {self.step} of {self.schedule.steps}")
        else:
            copy_from_first(t for network in self.task.networks.values() for t in network.state_dict().values())
            self._save()  # something to go back to
        self._saved = time.monotonic()
        self.history.begin(self.step)
        previous = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            with Progress(self.what, self.schedule.steps, "img", self.batches.batch, done=self.step) as bar:
                while self.diverged_at is None:
                    if self.step < self.schedule.steps:
                        self.one_step()
                    elif wrong := self._wrong_at_the_end():
                        self._go_back(wrong)
                    else:
                        break
                    rows = self.history.rows
                    bar.to(self.step, lambda: f"NELBO {rows[-1]['nelbo']:.1f} nats" if rows else "")  # noqa: B023
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        seconds = self.care.seconds + time.monotonic() - self._began
        rate = self.step * self.batches.batch / seconds
        care = self.care
        return Summary(self.step, rate, seconds, care.skipped, care.restarts, self.ranks.world, self.diverged_at)

    def _on_signal(self, number: int, _: object) -> None:
        self.stop = True
        if number == signal.SIGINT:  # the second one does not wait for the end of a step
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def one_step(self) -> None:
        """One batch: gradients, optimizers, history, and the state if it is time. Raises as :meth:`fit`."""
        step, config = self.step, self.config
        for item in self.task.optimized:
            lr = self.schedule.learning_rate(step, item.lr, item.lr_min) * self.care.lr_factor(config.rescue)
            for group in item.optimizer.param_groups:
                group["lr"] = lr
        terms, norm = self._gradients(step)
        # What the host must know of a step, in one transfer: is it good, is anyone to stop or to go back?
        flags = torch.tensor([float(self.stop), float(bool(self._spoilt))], device=self.device)
        facts = torch.cat([torch.stack([terms["loss"].float(), norm]), flags])
        most(facts)
        loss, size, stop, spoilt = facts.tolist()
        if spoilt:
            self._go_back(self._spoilt or ELSEWHERE)
        elif not (math.isfinite(loss) and math.isfinite(size)) or self._explodes(size):
            self._bad_step(terms, size)
        else:
            if config.grad_clip > 0:
                torch.nn.utils.clip_grads_with_norm_(self._parameters(), config.grad_clip, norm)
            for item in self.task.optimized:
                self.scaler.step(item.optimizer)
            self.task.after_step()
            self.care.bad = 0
            self.care.norms = [*self.care.norms[-99:], size]
            self.history.add({**terms, "gradient_norm": norm})
            self.step += 1
        if self.diverged_at is not None:
            return
        self.scaler.update()
        self._record()
        if stop:
            self._save()
            barrier()  # a process that ends takes the others down
            raise Stopped(f"{self.what}: told to stop after step {self.step}; the same command goes on from here")
        if time.monotonic() - self._saved > 60 * config.state_minutes and not self.care.bad:
            self._save()

    def _gradients(self, step: int) -> tuple[dict[str, Tensor], Tensor]:
        """Forward and backward; the terms (means over all images) and the gradients' norm."""
        config, parts = self.config, self.config.accumulate
        torch._foreach_copy_(self._buffers_before, self._buffers)
        torch.manual_seed(mix(config.seed, step, self.ranks.rank))  # dropout's
        for item in self.task.optimized:
            item.optimizer.zero_grad(set_to_none=False)
        sums: dict[str, Tensor] = {}
        autocast = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.precision)
        for part in range(parts):
            start = (self.ranks.rank * parts + part) * self.share
            x = self.batches.batch_at(*divmod(step, len(self.batches)), rows=slice(start, start + self.share))
            self.generator.manual_seed(mix(config.seed, step, -1))
            draws = Draws(start, self.share, self.batches.batch, self.device, self.generator)
            with self._weights:
                with torch.autocast(self.device.type, autocast, enabled=autocast is not None):
                    value = self.task.objective(x, step, self.schedule.steps, draws)
                loss, terms = value.loss, value.terms
                if part == 0 and self.task.regularizers:
                    weighted = [weight * regularizer() for weight, regularizer in self.task.regularizers]
                    spectral = self.care.spectral_factor(config.rescue) * parts * torch.stack(weighted).sum()
                    loss, terms = loss + spectral, {**terms, "spectral": spectral.detach()}
                self.scaler.scale(loss / parts).backward()
            for name, term in {"loss": loss.detach(), **terms}.items():
                sums[name] = sums[name] + term / parts if name in sums else term / parts
        average(sums.values())
        gradients = [p.grad for p in self._parameters() if p.grad is not None]
        average(gradients)
        for item in self.task.optimized:
            self.scaler.unscale_(item.optimizer)
        norm = torch.nn.utils.get_total_norm(gradients)
        return sums, norm.float()

    def _parameters(self) -> list[Tensor]:
        return [p for item in self.task.optimized for group in item.optimizer.param_groups for p in group["params"]]

    def _explodes(self, norm: float) -> bool:
        """Far beyond what the last hundred steps had."""
        norms = self.care.norms
        return len(norms) >= 20 and norm > self.config.rescue.explosion * statistics.median(norms)

    def _looks_for_scale(self) -> bool:
        """Whether steps are left out because the loss, in fp16, is scaled too much."""
        return self.scaler.is_enabled() and self.scaler.get_scale() > 1

    def _bad_step(self, terms: dict[str, Tensor], norm: float) -> None:
        care = self.care
        care.bad += 1
        care.skipped += 1
        diagnosis = self._diagnosis(terms, norm)
        log.info(f"{self.what}: step {self.step} left out ({diagnosis})")
        with torch.no_grad():
            torch._foreach_copy_(self._buffers, self._buffers_before)
        self.step += 1
        if care.bad >= self.config.rescue.bad_steps and not self._looks_for_scale():
            self._go_back(diagnosis)

    def _wrong_at_the_end(self) -> str:
        """What makes the training no success after its last step; empty if nothing does. The same in all processes."""
        wrong = _not_finite(self._state(), self.device)
        if self.care.bad and not self._looks_for_scale():
            wrong = f"its last step was left out{f'; {wrong}' if wrong else ''}"
        anywhere = torch.tensor([float(bool(wrong))], device=self.device)
        most(anywhere)
        return wrong or (ELSEWHERE if anywhere.item() else "")

    def _go_back(self, diagnosis: str) -> None:
        """To the last state, with lower learning rates; or give up, after so many times."""
        rescue, care = self.config.rescue, self.care
        self._spoilt = ""
        if care.restarts >= rescue.tries:
            if rescue.give_up == "record" and self.states is not None:
                self._give_up(diagnosis)
                return
            raise LSGMError(
                f"{self.what}: diverged at step {self.step}, after {care.restarts} restarts with lower learning rates "
                f"({diagnosis}); a lower learning rate, a longer warm-up or a larger spectral_reg is the way out"
            )
        skipped, restarts, seconds = care.skipped, care.restarts + 1, care.seconds
        self._restore_good(diagnosis)
        if self.step == self._rescued_to:  # it ended badly from there once already: from further back
            self._restore(below=self.step)
        self._rescued_to = self.step
        self.care.skipped, self.care.restarts, self.care.bad = skipped, restarts, 0
        self.care.seconds = seconds
        self.history.begin(self.step)
        log.info(
            f"{self.what}: back to step {self.step}, learning rates x {self.care.lr_factor(rescue):g}, spectral "
            f"regularization x {self.care.spectral_factor(rescue):g} (restart {restarts} of {rescue.tries})"
        )

    def _restore_good(self, diagnosis: str) -> None:
        """Take the newest state from before this step: a training that ended badly may have saved one at its end."""
        if not self._restore(below=self.step):
            raise LSGMError(
                f"{self.what}: diverged at step {self.step} ({diagnosis}) and there is no state to go back to"
            )

    def _give_up(self, diagnosis: str) -> None:
        """Back to the last good state for good; the history keeps the way there, and says where it diverged."""
        self.diverged_at, care, history = self.step, self.care, self.history.state_dict()
        log.info(f"{self.what}: diverged at step {self.step} for good; the last good state is what is kept")
        self._restore_good(diagnosis)
        self.history.load_state_dict(history)
        self.care.bad, self.care.skipped, self.care.restarts = 0, care.skipped, care.restarts
        self.care.seconds, self.care.norms = care.seconds, care.norms
        care_row = {"skipped": care.skipped, "restarts": care.restarts}
        epoch = self.diverged_at / len(self.batches)
        self.history.add_row({"step": self.diverged_at, "epoch": epoch, "nelbo": math.nan, **care_row})

    def _diagnosis(self, terms: dict[str, Tensor], norm: float) -> str:
        """What is wrong: the terms that are not finite, and the layer with the largest gradient."""
        wrong = [name for name, value in terms.items() if not torch.isfinite(value).all()]
        worst, size = "", -1.0
        for name, network in self.task.networks.items():
            for key, p in network.named_parameters():
                if p.grad is not None:
                    value = p.grad.norm().item()
                    if not math.isfinite(value):
                        worst, size = f"{name}.{key}", value
                        break
                    if value > size:
                        worst, size = f"{name}.{key}", value
        text = f"not finite: {', '.join(wrong)}; " if wrong else ""
        return f"{text}gradient norm {norm:.3g}, largest in {worst}: {size:.3g}"

    def _record(self) -> None:
        """A row of the history, if it is time; with a look at the model, if it is time for that too."""
        step, every, history = self.step, self.history.every, self.history
        last = step == self.schedule.steps
        if history.empty or not (last or step % every == 0):
            return
        row = {"step": step, "epoch": step / len(self.batches)}
        row |= {f"lr_{item.name}": item.optimizer.param_groups[0]["lr"] for item in self.task.optimized}
        scalars, vectors = history.close_row()
        row |= scalars | self.task.summarize(vectors) | {"skipped": self.care.skipped, "restarts": self.care.restarts}
        look_every = self.config.look_epochs * len(self.batches)
        if self.ranks.first and look_every and (last or step % look_every < every):
            facts, pictures = self.task.look()
            row |= facts
            for name, picture in pictures.items():
                history.add_images(name, picture, step)
        history.add_row(row)
