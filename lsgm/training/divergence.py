"""The guard against divergence: decides which steps are skipped, and explains why."""

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
REMEMBERED = 100  # number of recent gradient norms that are kept
FEWEST = 20  # number of norms needed to detect an exploding gradient


@dataclass
class DivergenceGuard:
    """Counts bad steps and restarts.

    A step is bad if its loss or gradient is not finite, or if its gradient norm exceeds `explosion_factor` times the
    median of the last 100 good norms. Each restart lowers the learning rates and raises the spectral regularization.
    """

    config: DivergenceConfig
    bad: int = 0  # consecutive bad steps
    skipped: int = 0  # total number of bad steps
    restarts: int = 0
    norms: list[float] = field(default_factory=list)  # norms of the last good gradients

    @property
    def lr_factor(self) -> float:
        """The current factor of the learning rates."""
        return self.config.lr_factor**self.restarts

    @property
    def spectral_factor(self) -> float:
        """The current factor of the spectral regularization."""
        return self.config.spectral_factor**self.restarts

    def is_good(self, loss: float, norm: float) -> bool:
        """Whether a step with this loss and gradient norm may be taken; updates the counts."""
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
    """Describe a bad step: the terms that are not finite, and the layer with the largest gradient."""
    wrong = [name for name, value in terms.items() if not torch.isfinite(value).all()]
    norms = {
        f"{name}.{key}": p.grad.norm()
        for name, network in networks.items()
        for key, p in network.named_parameters()
        if p.grad is not None
    }
    sizes = dict(zip(norms, torch.stack(list(norms.values())).tolist(), strict=True))  # in one transfer to the host
    bad = (name for name, size in sizes.items() if not math.isfinite(size))
    worst = next(bad, max(sizes, key=sizes.__getitem__))
    text = f"not finite: {', '.join(wrong)}; " if wrong else ""
    return f"{text}gradient norm {norm:.3g}, largest in {worst}: {sizes[worst]:.3g}"


def not_finite(state: Mapping[str, Any], device: torch.device) -> str:
    """Describe which weights, statistics, averages and moments in a state are not finite; empty if all are finite."""
    found = dict(_tensors({name: state[name] for name in ("parts", "optimizers")}))
    if not found:
        return ""
    # .to(device): optimizers keep their step counts on the host
    finite = torch.stack([tensor.isfinite().all().to(device) for tensor in found.values()]).tolist()
    wrong = [name for name, good in zip(found, finite, strict=True) if not good]
    more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
    return f"not finite: {wrong[0]}{more}" if wrong else ""


def _tensors(tree: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """The floating-point tensors in nested dictionaries and lists, with dotted names."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _tensors(value, f"{prefix}{key}.")
        elif isinstance(value, (list, tuple)):
            yield from _tensors(dict(enumerate(value)), f"{prefix}{key}.")
        elif isinstance(value, Tensor) and value.is_floating_point():
            yield f"{prefix}{key}", value
