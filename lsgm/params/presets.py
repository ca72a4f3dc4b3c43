"""Models that say `extends: OTHER`: the settings of the other one, but for what they set themselves.

Sections are merged key by key, however deep; lists and values are replaced, and null takes a section away. Where a
section chooses another implementation (`vae.backbone`, `prior.network`, `sde.name`, `sample.solver`) with other
keys, it replaces the inherited section.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lsgm.config import ConfigError
from lsgm.config.mistakes import shown
from lsgm.registry import BACKBONES, SCORE_NETWORKS, SDES, SOLVERS, Registry

KEY = "extends"
# Section -> the key that chooses its implementation, what it is where the key is not there.
CHOICES: dict[str, tuple[Registry, str, str]] = {
    "vae": (BACKBONES, "backbone", "nvae"),
    "prior": (SCORE_NETWORKS, "network", "ncsnpp"),
    "sde": (SDES, "name", "vpsde"),
    "sample": (SOLVERS, "solver", "rk45"),
}


def resolve(
    raw: Mapping[str, Any], lines: Mapping[str, int], where: str | Path
) -> tuple[dict[str, Any], dict[str, int]]:
    """params.yaml with every model as it is when what it extends is put in, and the line of each key.

    An inherited key has the line where it stands.

    Raises:
        ConfigError: a model extends itself, by whatever way round, or one that is not there.
    """
    models = raw.get("models")
    if not isinstance(models, dict):
        return dict(raw), dict(lines)
    found_lines = dict(lines)
    done: dict[str, Any] = {}

    def resolved(name: str, way: tuple[str, ...]) -> Any:
        if name in done:
            return done[name]
        model = models[name]
        if isinstance(model, dict) and KEY in model:
            parent, key = model[KEY], f"models.{name}.{KEY}"
            line = f" (line {lines[key]})" if key in lines else ""
            if not isinstance(parent, str) or parent not in models:
                close = difflib.get_close_matches(str(parent)[:100], [str(other) for other in models], n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"the models are {', '.join(map(str, models))}"
                raise ConfigError(f"{where}: {key}: there is no model {shown(parent)}; {hint}{line}")
            if parent in (*way, name):
                circle = " -> ".join([*way, name, parent])
                raise ConfigError(f"{where}: {key}: is a circle: {circle}; one of them must not extend another{line}")
            base = resolved(parent, (*way, name))
            own = {key: value for key, value in model.items() if key != KEY}
            model = merged(base, own)
            for key, line_number in list(found_lines.items()):
                if key.startswith(f"models.{parent}."):
                    found_lines.setdefault(f"models.{name}.{key.removeprefix(f'models.{parent}.')}", line_number)
        done[name] = model
        return model

    return {**raw, "models": {name: resolved(name, ()) for name in models}}, found_lines


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
