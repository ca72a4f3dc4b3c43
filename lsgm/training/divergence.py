"""The guard against divergence: which steps are skipped, when training restarts from an earlier state, and why."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lsgm.config import DivergenceConfig

ELSEWHERE = "another process has weights or statistics that are not finite"
REMEMBERED = 100  # gradient norms
FEWEST = 20  # norms that an explosion is judged by


@dataclass
class DivergenceGuard:
    """How the training fares, and how careful it has become.

    A step is bad if its loss or gradient is not finite, or if the norm of its gradient is `explosion_factor` times the
    median of the last hundred. Each restart lowers the learning rates and raises the spectral regularization.
    """

    config: DivergenceConfig
    bad: int = 0  # bad steps in a row
    skipped: int = 0  # bad steps in all
    restarts: int = 0
    norms: list[float] = field(default_factory=list)  # of the last good gradients

    @property
    def lr_factor(self) -> float:
        """What the learning rates are multiplied by."""
        return self.config.lr_factor**self.restarts

    @property
    def spectral_factor(self) -> float:
        """What the spectral regularization is multiplied by."""
        return self.config.spectral_factor**self.restarts

    def is_good(self, loss: float, norm: float) -> bool:
        """Whether a step with this loss and gradient norm may be taken; counts it."""
        explodes = len(self.norms) >= FEWEST and norm > self.config.explosion_factor * statistics.median(self.norms)
        if math.isfinite(loss) and math.isfinite(norm) and not explodes:
            self.bad, self.norms = 0, [*self.norms[1 - REMEMBERED :], norm]
            return True
        self.bad += 1
        self.skipped += 1
        return False

    def state_dict(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if key != "config"}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for key, value in state.items():
            setattr(self, key, value)


def diagnosis(terms: Mapping[str, Tensor], norm: float, networks: Mapping[str, nn.Module]) -> str:
    """What is wrong with a step: the terms that are not finite, and the layer with the largest gradient."""
    wrong = [name for name, value in terms.items() if not torch.isfinite(value).all()]
    worst, size = "", -1.0
    for name, network in networks.items():
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


def not_finite(state: Mapping[str, Any], device: torch.device) -> str:
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
