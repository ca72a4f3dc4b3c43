"""One complete training step on one page, from a batch of images to the optimizers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lsgm.config import ScheduleConfig
from lsgm.data.batches import Batches
from lsgm.errors import LSGMError
from lsgm.networks.weight_norm import NormalizedWeights
from lsgm.per_sample_noise import mix
from lsgm.training.batch_noise import BatchNoise
from lsgm.training.distributed import GradientReducer, Ranks, all_reduce_max, all_reduce_mean
from lsgm.training.divergence import DivergenceGuard
from lsgm.training.objective import Objective
from lsgm.training.regularization import SpectralRegularizer
from lsgm.training.schedule import Schedule


@dataclass
class OptimizerSpec:
    """An optimizer and the range of its learning rate."""

    name: str
    optimizer: torch.optim.Optimizer
    lr: float
    lr_min: float


class Stateful(Protocol):
    """An object whose state is saved with the training state."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> Any: ...


@dataclass
class Task:
    """The parts of training that differ between the stages.

    Attributes:
        optimized: the optimizers.
        objective: (images of this process, step, steps, noise) -> objective, averaged over these images.
        regularizers: pairs (weight, regularizer) that are added to the loss.
        after_step: called after each step of the optimizers.
        parts: objects whose state is saved in addition to optimizers and history, by name.
        networks: the networks that are trained, by name.
        summarize: (means of the objective's vectors) -> values for the history.
        validate: () -> (measurements of the model, images), both by name; called every `eval_every_epochs`.
    """

    optimized: list[OptimizerSpec]
    objective: Callable[[Tensor, int, int, BatchNoise], Objective]
    regularizers: list[tuple[float, SpectralRegularizer]]
    after_step: Callable[[], None]
    parts: dict[str, Stateful]
    networks: dict[str, nn.Module]
    summarize: Callable[[dict[str, list[float]]], dict[str, float]]
    validate: Callable[[], tuple[dict[str, float], dict[str, Tensor]]]


@dataclass
class Outcome:
    """The result of a step. ``stop`` and ``spoiled`` are set if they are set in any process."""

    good: bool
    terms: dict[str, Tensor]  # means over the batch, with `loss` and `gradient_norm`
    norm: float
    stop: bool
    spoiled: bool


class TrainingStep:
    """Takes one training step. All random numbers of a step depend only on (seed, step).

    Raises:
        LSGMError: the batch cannot be divided evenly among processes and parts.
    """

    def __init__(
        self, task: Task, batches: Batches, config: ScheduleConfig, ranks: Ranks, device: torch.device
    ) -> None:
        self.task, self.batches, self.config, self.ranks, self.device = task, batches, config, ranks, device
        self.schedule = Schedule(config, len(batches))
        share, rest = divmod(batches.batch, ranks.world * config.accumulate)
        if rest:
            raise LSGMError(
                f"batch: {batches.batch} images cannot be divided evenly among {ranks.world} processes "
                f"with {config.accumulate} parts each (accumulate)"
            )
        self.share = share  # images of one forward pass
        self.generator = torch.Generator(device)
        self.autocast = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.precision)
        self.scaler = torch.amp.GradScaler(device.type, init_scale=2.0**6, enabled=config.precision == "fp16")
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.precision == "tf32"
        # Statistics of batch norms and a copy from before the step, which a bad step restores.
        self.buffers = [b for network in task.networks.values() for b in network.buffers() if b.is_floating_point()]
        self.buffers_before = [b.clone() for b in self.buffers]
        self.weights = NormalizedWeights(*task.networks.values())
        self.reducer = GradientReducer(task.networks.values(), self.parameters())

    def __call__(self, step: int, guard: DivergenceGuard, flags: Callable[[], tuple[bool, bool]]) -> Outcome:
        """Take the step ``step`` if it is good and no process is spoiled.

        ``flags`` returns whether this process was told to stop after the step, and whether it is spoiled (has weights
        that are not finite). It is called once the gradients are computed.
        """
        task, config, parts = self.task, self.config, self.config.accumulate
        optimizers = [item.optimizer for item in task.optimized]
        copy_all(self.buffers, self.buffers_before)

        # 1. Learning rates: linear warm-up, then a cosine (LSGM, appendix G).
        for item in task.optimized:
            for group in item.optimizer.param_groups:
                group["lr"] = self.schedule.learning_rate(step, item.lr, item.lr_min) * guard.lr_factor
        torch.manual_seed(mix(config.seed, step, self.ranks.rank))  # for dropout
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=False)

        sums: dict[str, Tensor] = {}
        for part in range(parts):
            # 2. The batch x, and noise that does not depend on how many processes and parts share it.
            start = (self.ranks.rank * parts + part) * self.share
            x = self.batches.batch_at(*divmod(step, len(self.batches)), rows=slice(start, start + self.share))
            self.generator.manual_seed(mix(config.seed, step, -1))
            noise = BatchNoise(start, self.share, self.batches.batch, self.device, self.generator)
            with self.weights:
                # 3. The objective: by one of the algorithms of LSGM, appendix G.6; first stage: the VAE's (NVAE, 3.2).
                with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
                    value = task.objective(x, step, self.schedule.steps, noise)
                loss, terms = value.loss, value.terms
                # 4. Spectral regularization (NVAE, section 3.2), once for all parts.
                if part == 0 and task.regularizers:
                    weighted = [weight * regularizer() for weight, regularizer in task.regularizers]
                    spectral = guard.spectral_factor * parts * torch.stack(weighted).sum()
                    loss, terms = loss + spectral, {**terms, "spectral": spectral.detach()}
                # 5. Gradients; those of the last part are averaged over all processes meanwhile.
                self.reducer.armed = part == parts - 1
                self.scaler.scale(loss / parts).backward()
            for name, term in {"loss": loss.detach(), **terms}.items():
                sums[name] = sums[name] + term / parts if name in sums else term / parts

        # 6. Means over all processes, and the norm of the gradient.
        all_reduce_mean(sums.values())
        self.reducer.finish()
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        for optimizer in optimizers:
            self.scaler.unscale_(optimizer)
        norm = torch.nn.utils.get_total_norm(gradients).float()

        # 7. In one transfer to the host: is the step good, and must any process stop, or is any spoiled?
        told = [torch.full((), float(flag), device=norm.device) for flag in flags()]  # without a transfer
        facts = torch.stack([sums["loss"].float(), norm, *told])
        all_reduce_max(facts)
        worst, size, stops, spoils = facts.tolist()
        good = not spoils and guard.is_good(worst, size)

        # 8. The optimizers and the moving average of the prior's weights, or the statistics from before the step.
        if good:
            if config.grad_clip > 0:
                torch.nn.utils.clip_grads_with_norm_(self.parameters(), config.grad_clip, norm)
            for optimizer in optimizers:
                self.scaler.step(optimizer)
            task.after_step()
        elif not spoils:
            copy_all(self.buffers_before, self.buffers)
        return Outcome(good, {**sums, "gradient_norm": norm}, size, bool(stops), bool(spoils))

    def parameters(self) -> list[Tensor]:
        """The parameters that the optimizers update."""
        return [p for item in self.task.optimized for group in item.optimizer.param_groups for p in group["params"]]

    @property
    def looks_for_scale(self) -> bool:
        """Whether steps may be bad only because fp16 loss scaling has not yet found its scale."""
        return self.scaler.is_enabled() and self.scaler.get_scale() > 1


@torch.no_grad()
def copy_all(source: list[Tensor], target: list[Tensor]) -> None:
    """Copy each tensor of ``source`` to its counterpart in ``target``."""
    if source:
        torch._foreach_copy_(target, source)
