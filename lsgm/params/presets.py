"""Models that say `extends: OTHER`: the settings of the other one, but for what they set themselves.

Sections are merged key by key, however deep; lists and values are replaced, and null takes a section away. Where a
section chooses another implementation (`vae.backbone`, `prior.network`, `sde.name`, `sample.solver`) with other
keys, it replaces the inherited section.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping
from typing import Any

from lsgm.config.mistakes import shown
from lsgm.registry import BACKBONES, SCORE_NETWORKS, SDES, SOLVERS, Registry

KEY = "extends"
# Section -> the key that chooses its implementation, what it is where the key is not there.
CHOICES: dict[str, tuple[Registry, str, str]] = {
    "vae": (BACKBONES, "backbone", "nvae"),
    "prior": (SCORE_NETWORKS, "network", "ncsnpp"),
    "sde": (SDES, "name", "vpsde"),
    "sample": (SOLVERS, "solver", "ab"),
}


def resolve(models: Mapping[str, Any]) -> dict[str, Any]:
    """The models with what they extend put in.

    Raises:
        ValueError: a model extends itself, by whatever way round, or one that is not there.
    """
    done: dict[str, Any] = {}

    def resolved(name: str, way: tuple[str, ...]) -> Any:
        if name not in done:
            model = models[name]
            if isinstance(model, dict) and model.get(KEY) is not None:
                base = resolved(_parent(models, name, way), (*way, name))
                model = merged(base, model)
            done[name] = model
        return done[name]

    return {name: resolved(name, ()) for name in models}


def ancestors(models: Any, name: Any) -> list[Any]:
    """What the model ``name`` extends, the nearest first; ``models`` as they are in the file or checked."""
    found: list[Any] = []
    while isinstance(models, Mapping) and name in models:
        model = models[name]
        name = model.get(KEY) if isinstance(model, Mapping) else getattr(model, KEY, None)
        if not isinstance(name, str) or name in found:
            break
        found.append(name)
    return found


def _parent(models: Mapping[str, Any], name: str, way: tuple[str, ...]) -> str:
    """The model that ``name`` extends, where ``way`` are the models that extend it."""
    parent, key = models[name][KEY], f"models.{name}.{KEY}"
    if not isinstance(parent, str) or parent not in models:
        close = difflib.get_close_matches(str(parent)[:100], [str(other) for other in models], n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"the models are {', '.join(map(str, models))}"
        raise ValueError(f"{key}: there is no model {shown(parent)}; {hint}")
    if parent in (*way, name):
        circle = " -> ".join([*way, name, parent])
        raise ValueError(f"{key}: is a circle ({circle}); one of these models must not extend another")
    return parent


def inherited_lines(models: Any, lines: Mapping[str, int]) -> dict[str, int]:
    """The line of each key of params.yaml; an inherited key has the line where it stands."""
    found = dict(lines)
    for name in models if isinstance(models, dict) else ():
        for parent in ancestors(models, name):
            start = f"models.{parent}."
            for key, line in lines.items():
                if key.startswith(start):
                    found.setdefault(f"models.{name}.{key.removeprefix(start)}", line)
    return found


def merged(base: Any, own: Any, top: bool = True) -> Any:
    """``own`` over ``base``: sections key by key, anything else replaced. ``top``: they are whole models."""
    if not (isinstance(base, dict) and isinstance(own, dict)):
        return copy.deepcopy(own)
    found = copy.deepcopy(base)
    for key, value in own.items():
        other = top and key in CHOICES and _chooses_another(base.get(key), value, *CHOICES[key])
        found[key] = merged(base[key], value, top=False) if key in base and not other else copy.deepcopy(value)
    return found


def _chooses_another(base: Any, own: Any, registry: Registry, key: str, default: str) -> bool:
    """Whether a section chooses an implementation whose keys are others than those of ``base``."""
    if not (isinstance(base, dict) and isinstance(own, dict)):
        return False
    old = base.get(key, default)
    return registry.places.get(str(old)) != registry.places.get(str(own.get(key, old)))
